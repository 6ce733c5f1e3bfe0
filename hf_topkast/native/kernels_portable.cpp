#define ISA_NAME "portable"
#define VECTOR_WIDTH 4
#include "kernels.inl"

const hf_topkast::Kernels* hf_topkast::portable_kernels() { return &TABLE; }

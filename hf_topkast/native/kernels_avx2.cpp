#define ISA_NAME "avx2"
#define VECTOR_WIDTH 8
#include "kernels.inl"

const hf_topkast::Kernels* hf_topkast::avx2_kernels() { return &TABLE; }

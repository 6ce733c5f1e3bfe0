#define ISA_NAME "avx512"
#define VECTOR_WIDTH 16
#include "kernels.inl"

const hf_topkast::Kernels* hf_topkast::avx512_kernels() { return &TABLE; }

#define SA_ISA isa_avx512
#define SA_ISA_NAME "avx512"
#include "cpu/simd/instruction_set.inc"

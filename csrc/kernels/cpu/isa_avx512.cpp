// The CPU kernels for the instruction set "avx512" (flags in setup.py).
#define FASTKD_KERNELS kAvx512Kernels
#define FASTKD_ISA_NAME "avx512"
#include "kernels.h"

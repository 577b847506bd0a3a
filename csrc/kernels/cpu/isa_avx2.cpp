// The CPU kernels for the instruction set "avx2" (flags in setup.py).
#define FASTKD_KERNELS kAvx2Kernels
#define FASTKD_ISA_NAME "avx2"
#include "kernels.h"

// The CPU kernels for the instruction set "baseline" (flags in setup.py).
#define FASTKD_KERNELS kBaselineKernels
#define FASTKD_ISA_NAME "baseline"
#include "kernels.h"

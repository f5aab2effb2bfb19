#include "cpu/rows_impl.h"

const sppo::RowKernels sppo::row_kernels_avx2 = {&row_logps, &row_backward};

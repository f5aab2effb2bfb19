#include "cpu/rows_impl.h"

const sppo::RowKernels sppo::row_kernels_avx512 = {&row_logps, &row_backward};

#include "cpu/rows_impl.h"

const sppo::RowKernels sppo::row_kernels_default = {&row_logps, &row_backward};

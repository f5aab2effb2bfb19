#include "cpu/stats_impl.h"

const sppo::StatsKernels sppo::stats_kernels_avx512 = {&row_stats, &row_gradient};

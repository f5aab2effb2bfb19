#include "cpu/stats_impl.h"

const sppo::StatsKernels sppo::stats_kernels_avx2 = {&row_stats, &row_gradient};

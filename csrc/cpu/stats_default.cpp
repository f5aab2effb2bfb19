#include "cpu/stats_impl.h"

const sppo::StatsKernels sppo::stats_kernels_default = {&row_stats, &row_gradient};

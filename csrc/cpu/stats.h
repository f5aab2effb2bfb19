// Statistics of one row of logits, and the gradient of its log-probability and entropy.
// Plain C types only: the same header is compiled for several instruction sets.
#pragma once

#include "cpu/rows.h"

namespace sppo {

struct StatsWanted {
  bool entropy, squares, mean, top1;
};

// p = softmax(u). Only what is wanted is filled; `maximum`, `sum` and `depth` come with entropy.
struct RowStats {
  float maximum;
  float sum;    // of exp(u - maximum)
  float depth;  // mean of maximum - u under p: at least 0, and entropy = log(sum) + depth
  float entropy;
  float log_sum_squares;  // log of the sum of p^2
  float mean;             // of u
  bool top1;              // the label is the first maximum
};

struct StatsKernels {
  // `scratch` holds at least `vocab` floats when the transform is not the identity.
  RowStats (*stats)(Element type, const void* z, int64_t vocab, int64_t label,
                    const RowTransform& transform, StatsWanted wanted, float* scratch);
  // Overwrites row `z` with d(g_logp log p[label] + g_entropy H)/dz; `saved` holds maximum, sum and
  // depth.
  void (*gradient)(Element type, void* z, int64_t vocab, int64_t label,
                   const RowTransform& transform, const RowStats& saved, float g_logp,
                   float g_entropy);
};

extern const StatsKernels stats_kernels_default;
extern const StatsKernels stats_kernels_avx2;
extern const StatsKernels stats_kernels_avx512;

}  // namespace sppo

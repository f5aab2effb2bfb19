// CPU operators for the statistics of rows of logits: sppo_kernels::native_row_stats*.
#include "cpu/stats.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/capability.h"
#include "cpu/rows_tensors.h"

namespace sppo {
namespace {

const StatsKernels& kernels() {
#if defined(__x86_64__)
  switch (cpu_capability()) {
    case Capability::kAvx512: return stats_kernels_avx512;
    case Capability::kAvx2: return stats_kernels_avx2;
    default: break;
  }
#endif
  return stats_kernels_default;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_stats(
    const Tensor& logits, const Tensor& labels, std::optional<Tensor> bias, double logit_scale,
    std::optional<double> softcap, int64_t ignore_index, bool entropy, bool squares, bool mean,
    bool top1) {
  const Rows z(torch::stable::unsqueeze(logits, 0));
  const Integers label(labels);
  STD_TORCH_CHECK(labels.numel() == z.count, "labels: expected one for each row");
  const RowTransform transform = transform_of(bias, logit_scale, softcap, z.vocab);
  const StatsWanted wanted{entropy, squares, mean, top1};
  const int64_t n = z.count;
  Tensor norm = new_float(logits, {3, entropy ? n : 0});
  Tensor entropies = new_float(logits, {entropy ? n : 0});
  Tensor sums = new_float(logits, {squares ? n : 0});
  Tensor means = new_float(logits, {mean ? n : 0});
  Tensor tops = torch::stable::new_empty(logits, {top1 ? n : 0}, ScalarType::Bool);
  float *norms = floats(norm), *h = floats(entropies), *q = floats(sums), *mu = floats(means);
  bool* is_top1 = static_cast<bool*>(tops.data_ptr());
  const StatsKernels& row = kernels();
  torch::stable::parallel_for(0, n, row_grain(z.vocab), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(transform.identity() ? 0 : z.vocab);
    for (int64_t i = begin; i < end; ++i) {
      RowStats s{};
      if (label[i] != ignore_index) {
        if (label[i] < 0 || label[i] >= z.vocab) {
          s = {kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, false};
        } else {
          s = row.stats(z.type, z[i], z.vocab, label[i], transform, wanted, scratch.data());
        }
      }
      if (entropy) {
        norms[i] = s.maximum;
        norms[n + i] = s.sum;
        norms[2 * n + i] = s.depth;
        h[i] = s.entropy;
      }
      if (squares) q[i] = s.log_sum_squares;
      if (mean) mu[i] = s.mean;
      if (top1) is_top1[i] = s.top1;
    }
  });
  return {norm, entropies, sums, means, tops};
}

void row_stats_backward(const Tensor& logits, const Tensor& labels, std::optional<Tensor> bias,
                        double logit_scale, std::optional<double> softcap, int64_t ignore_index,
                        const Tensor& norm, const Tensor& grad_logp, const Tensor& grad_entropy) {
  const Rows z(torch::stable::unsqueeze(logits, 0));
  const Integers label(labels);
  STD_TORCH_CHECK(labels.numel() == z.count, "labels: expected one for each row");
  for (const Tensor* t : {&grad_logp, &grad_entropy}) {
    STD_TORCH_CHECK(
        t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->numel() == z.count,
        "grad_logp, grad_entropy: expected contiguous float32, one for each row");
  }
  STD_TORCH_CHECK(norm.scalar_type() == ScalarType::Float && norm.dim() == 2 && norm.size(0) == 3 &&
                      norm.size(1) == z.count && (z.count < 2 || norm.stride(1) == 1),
                  "norm: expected float32 [3, rows] with unit stride over the rows");
  const RowTransform transform = transform_of(bias, logit_scale, softcap, z.vocab);
  const float *maximum = floats(norm), *a = floats(grad_logp), *b = floats(grad_entropy);
  const float *sum = maximum + norm.stride(0), *depth = sum + norm.stride(0);
  const StatsKernels& row = kernels();
  torch::stable::parallel_for(0, z.count, row_grain(z.vocab), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (label[i] == ignore_index) {
        zero_row(z[i], z);
      } else if (label[i] < 0 || label[i] >= z.vocab) {
        nan_row(z[i], z);
      } else {
        RowStats saved{};
        saved.maximum = maximum[i];
        saved.sum = sum[i];
        saved.depth = depth[i];
        row.gradient(z.type, z[i], z.vocab, label[i], transform, saved, a[i], b[i]);
      }
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(sppo_kernels, CPU, m) {
  m.impl("native_row_stats", TORCH_BOX(&row_stats));
  m.impl("native_row_stats_backward", TORCH_BOX(&row_stats_backward));
}

}  // namespace
}  // namespace sppo

// CPU operators on rows of logits and on sequences of rows: sppo_kernels::native_*.
#include "cpu/rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/capability.h"
#include "cpu/rows_tensors.h"

namespace sppo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const RowKernels& kernels() {
#if defined(__x86_64__)
  switch (cpu_capability()) {
    case Capability::kAvx512: return row_kernels_avx512;
    case Capability::kAvx2: return row_kernels_avx2;
    default: break;
  }
#endif
  return row_kernels_default;
}

// `maximum` and `sum` may be null.
void run_rows(const Rows& z, const Integers& labels, const RowTransform& transform,
              int64_t ignore_index, bool write_grad, float* logp, float* maximum, float* sum) {
  const RowKernels& row = kernels();
  torch::stable::parallel_for(0, z.count, row_grain(z.vocab), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(write_grad || !transform.identity() ? z.vocab : 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t label = labels[i];
      RowResult result{0.0f, 0.0f, 0.0f};
      if (label == ignore_index) {
        if (write_grad) zero_row(z[i], z);
      } else if (label < 0 || label >= z.vocab) {
        result = {kNaN, kNaN, kNaN};
        if (write_grad) nan_row(z[i], z);
      } else {
        result = row.logps(z.type, z[i], z.vocab, label, transform, write_grad, scratch.data());
      }
      logp[i] = result.logp;
      if (maximum != nullptr) maximum[i] = result.maximum;
      if (sum != nullptr) sum[i] = result.sum;
    }
  });
}

std::tuple<Tensor, Tensor> token_logps(const Tensor& logits, const Tensor& labels,
                                       int64_t ignore_index) {
  const Rows z(logits);
  const Integers label(labels);
  STD_TORCH_CHECK(labels.numel() == z.count, "labels: expected one for each row of logits");
  Tensor logp = new_float(logits, {logits.size(0), logits.size(1)});
  Tensor norm = new_float(logits, {2, logits.size(0), logits.size(1)});
  float* maximum = floats(norm);
  run_rows(z, label, {nullptr, 1.0f, 0.0f}, ignore_index, false, floats(logp), maximum,
           maximum + z.count);
  return {logp, norm};
}

void token_logps_backward(const Tensor& grad, const Tensor& logits, const Tensor& labels,
                          const Tensor& logp, const Tensor& norm, int64_t ignore_index,
                          const Tensor& out) {
  const Rows z(logits), dz(out);
  const Integers label(labels);
  for (const Tensor* t : {&grad, &logp, &norm}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous() &&
                        t->numel() == (t == &norm ? 2 : 1) * z.count,
                    "grad, logp [rows], norm [2, rows]: expected contiguous float32");
  }
  STD_TORCH_CHECK(
      labels.numel() == z.count && dz.count == z.count && dz.vocab == z.vocab && dz.type == z.type,
      "shapes or dtypes of logits, labels and out differ");
  const float *coef = floats(grad), *at_label = floats(logp), *maximum = floats(norm);
  const float* sum = maximum + z.count;
  const RowKernels& row = kernels();
  torch::stable::parallel_for(0, z.count, row_grain(z.vocab), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (label[i] == ignore_index) {
        zero_row(dz[i], dz);
      } else if (label[i] < 0 || label[i] >= z.vocab) {
        nan_row(dz[i], dz);
      } else {
        row.backward(z.type, z[i], dz[i], z.vocab, label[i], {at_label[i], maximum[i], sum[i]},
                     coef[i]);
      }
    }
  });
}

Tensor row_logps(const Tensor& logits, const Tensor& labels, std::optional<Tensor> bias,
                 double logit_scale, std::optional<double> softcap, int64_t ignore_index,
                 bool write_grad) {
  const Rows z(torch::stable::unsqueeze(logits, 0));
  const Integers label(labels);
  STD_TORCH_CHECK(labels.numel() == z.count, "labels: expected one for each row");
  const RowTransform transform = transform_of(bias, logit_scale, softcap, z.vocab);
  Tensor logp = new_float(logits, {z.count});
  run_rows(z, label, transform, ignore_index, write_grad, floats(logp), nullptr, nullptr);
  return logp;
}

void check_offsets(const Integers& offsets, int64_t sequences, int64_t rows) {
  STD_TORCH_CHECK(offsets[0] == 0, "cu_seqlens: expected 0 first, got ", offsets[0]);
  for (int64_t s = 0; s < sequences; ++s) {
    STD_TORCH_CHECK(offsets[s] <= offsets[s + 1], "cu_seqlens: expected no decrease, got ",
                    offsets[s], " then ", offsets[s + 1], " at position ", s);
  }
  STD_TORCH_CHECK(offsets[sequences] == rows, "cu_seqlens: expected the number of rows, ", rows,
                  ", last, got ", offsets[sequences]);
}

Tensor segment_sum(const Tensor& values, const Tensor& cu_seqlens) {
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && values.is_contiguous(),
                  "values: expected contiguous float32");
  const Integers offsets(cu_seqlens);
  const int64_t sequences = cu_seqlens.numel() - 1;
  check_offsets(offsets, sequences, values.numel());
  Tensor out = new_float(values, {sequences});
  const float* x = floats(values);
  float* y = floats(out);
  for (int64_t s = 0; s < sequences; ++s) {
    double sum = 0;
    for (int64_t i = offsets[s]; i < offsets[s + 1]; ++i) sum += x[i];
    y[s] = static_cast<float>(sum);
  }
  return out;
}

Tensor segment_expand(const Tensor& values, const Tensor& cu_seqlens, int64_t rows) {
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && values.is_contiguous(),
                  "values: expected contiguous float32");
  const Integers offsets(cu_seqlens);
  const int64_t sequences = cu_seqlens.numel() - 1;
  check_offsets(offsets, sequences, rows);
  Tensor out = new_float(values, {rows});
  const float* x = floats(values);
  float* y = floats(out);
  for (int64_t s = 0; s < sequences; ++s) std::fill(y + offsets[s], y + offsets[s + 1], x[s]);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(sppo_kernels, CPU, m) {
  m.impl("native_token_logps", TORCH_BOX(&token_logps));
  m.impl("native_token_logps_backward", TORCH_BOX(&token_logps_backward));
  m.impl("native_row_logps", TORCH_BOX(&row_logps));
  m.impl("native_segment_sum", TORCH_BOX(&segment_sum));
  m.impl("native_segment_expand", TORCH_BOX(&segment_expand));
}

}  // namespace
}  // namespace sppo

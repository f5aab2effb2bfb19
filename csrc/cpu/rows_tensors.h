// Rows of logits and integers as the CPU operators see them, behind torch tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "cpu/rows.h"

namespace sppo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Element element(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Element::kFloat32;
    case ScalarType::BFloat16: return Element::kBFloat16;
    case ScalarType::Half: return Element::kFloat16;
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

inline int64_t element_size(Element type) { return type == Element::kFloat32 ? 4 : 2; }

// Labels and offsets come as int32 or int64.
class Integers {
 public:
  explicit Integers(const Tensor& t)
      : data_(t.data_ptr()), wide_(t.scalar_type() == ScalarType::Long) {
    STD_TORCH_CHECK(wide_ || t.scalar_type() == ScalarType::Int, "expected int32 or int64");
    STD_TORCH_CHECK(t.is_contiguous(), "expected contiguous integers");
  }
  int64_t operator[](int64_t i) const {
    return wide_ ? static_cast<const int64_t*>(data_)[i] : static_cast<const int32_t*>(data_)[i];
  }

 private:
  const void* data_;
  bool wide_;
};

// Rows handed to one thread at the least: about 32k elements.
inline int64_t row_grain(int64_t vocab) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, vocab));
}

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// [B, T, V] with unit stride over V; row r is (r / T, r % T).
struct Rows {
  explicit Rows(const Tensor& t)
      : type(element(t)),
        steps(t.size(1)),
        count(t.size(0) * t.size(1)),
        vocab(t.size(2)),
        data(static_cast<char*>(t.data_ptr())),
        outer(t.stride(0) * element_size(type)),
        inner(t.stride(1) * element_size(type)) {
    STD_TORCH_CHECK(vocab > 0, "expected at least one column");
    STD_TORCH_CHECK(vocab == 1 || t.stride(2) == 1, "expected unit stride over the vocabulary");
  }
  void* operator[](int64_t row) const {
    return data + (row / steps) * outer + (row % steps) * inner;
  }
  Element type;
  int64_t steps, count, vocab;
  char* data;
  int64_t outer, inner;
};

inline void zero_row(void* row, const Rows& rows) {
  std::fill_n(static_cast<char*>(row), rows.vocab * element_size(rows.type), 0);
}

inline void nan_row(void* row, const Rows& rows) {
  for (int64_t i = 0; i < rows.vocab; ++i) {
    switch (rows.type) {
      case Element::kFloat32: static_cast<float*>(row)[i] = kNaN; break;
      case Element::kBFloat16: static_cast<uint16_t*>(row)[i] = 0x7fc0; break;
      case Element::kFloat16: static_cast<uint16_t*>(row)[i] = 0x7e00; break;
    }
  }
}

inline float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

inline RowTransform transform_of(const std::optional<Tensor>& bias, double scale,
                                 std::optional<double> softcap, int64_t vocab) {
  RowTransform transform{nullptr, static_cast<float>(scale),
                         static_cast<float>(softcap.value_or(0.0))};
  if (bias.has_value()) {
    STD_TORCH_CHECK(
        bias->scalar_type() == ScalarType::Float && bias->is_contiguous() && bias->numel() == vocab,
        "bias: expected contiguous float32 of the vocabulary's size");
    transform.bias = floats(*bias);
  }
  return transform;
}

inline Tensor new_float(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, std::vector<int64_t>(shape), ScalarType::Float);
}

}  // namespace sppo

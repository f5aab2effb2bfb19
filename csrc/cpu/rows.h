// One row of logits at a time: log-probability of a label, and the row's gradient.
// Plain C types only: the same header is compiled for several instruction sets.
#pragma once

#include <cstdint>

namespace sppo {

enum class Element { kFloat32, kBFloat16, kFloat16 };

// The logits are u = softcap(scale * (z + bias)), softcap(x) = cap * tanh(x / cap); cap == 0: none.
struct RowTransform {
  const float* bias;  // [vocab] or nullptr
  float scale;
  float cap;
  bool identity() const { return bias == nullptr && scale == 1.0f && cap == 0.0f; }
};

struct RowResult {
  float logp;     // log softmax(u)[label]
  float maximum;  // of u
  float sum;      // of exp(u - maximum); kept apart, because a float log-sum-exp rounds p by 1e-6
};

struct RowKernels {
  // Reads row `z`; with `write_grad`, overwrites it with (softmax(u) - onehot(label)) * du/dz.
  // `scratch` holds at least `vocab` floats. Both modes give the same bits.
  RowResult (*logps)(Element type, void* z, int64_t vocab, int64_t label,
                     const RowTransform& transform, bool write_grad, float* scratch);
  // out = coef * (softmax(z) - onehot(label)), from the saved result; out may be z.
  void (*backward)(Element type, const void* z, void* out, int64_t vocab, int64_t label,
                   RowResult saved, float coef);
};

extern const RowKernels row_kernels_default;
extern const RowKernels row_kernels_avx2;
extern const RowKernels row_kernels_avx512;

}  // namespace sppo

// The row kernels, written once on the vectors of vec.h; each rows_<isa>.cpp includes this file.
//
//   values    log p(y) = (u_y - m) - log l, m = max u, l = sum exp(u - m), u = softcap(scale (z +
//   b)) gradient  dz = coef (exp(u - m) / l - 1_y) du/dz, in place or into `out` bytes     z is
//   read for m and again (from L2) for l; the gradient is written from the kept
//             exponentials. About 12 flops an element
//   numerics  sums of kBlock elements in float, then in double; m and l are kept apart; the label's
//             p - 1 is expm1(log p). docs/math.md, section 5
#pragma once

#include <cmath>

#include "cpu/rows.h"
#include "cpu/rows_transform.h"

namespace {

using sppo::Element;
using sppo::RowKernels;
using sppo::RowResult;

// Sum of exp(z - m); with kKeep the terms go to `terms`.
template <bool kKeep, class T>
inline double sum_exp(const T* z, int64_t vocab, float m, float* terms) {
  double total = 0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
    VecF s0 = VecF{}, s1 = VecF{}, s2 = VecF{}, s3 = VecF{};
    int64_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      const VecF e0 = exp(load(z + i) - m);
      const VecF e1 = exp(load(z + i + kLanes) - m);
      const VecF e2 = exp(load(z + i + 2 * kLanes) - m);
      const VecF e3 = exp(load(z + i + 3 * kLanes) - m);
      s0 = s0 + e0;
      s1 = s1 + e1;
      s2 = s2 + e2;
      s3 = s3 + e3;
      if (kKeep) {
        store(terms + i, e0);
        store(terms + i + kLanes, e1);
        store(terms + i + 2 * kLanes, e2);
        store(terms + i + 3 * kLanes, e3);
      }
    }
    for (; i + kLanes <= end; i += kLanes) {
      const VecF e = exp(load(z + i) - m);
      s0 = s0 + e;
      if (kKeep) store(terms + i, e);
    }
    double block = reduce_add((s0 + s1) + (s2 + s3));
    for (; i < end; ++i) {
      const float e = exp1(load1(z + i) - m);
      block += e;
      if (kKeep) terms[i] = e;
    }
    total += block;
  }
  return total;
}

inline RowResult finish(double sum, float m, float at_label) {
  const double logp = (static_cast<double>(at_label) - m) - std::log(sum);
  return {static_cast<float>(logp), m, static_cast<float>(sum)};
}

template <class T>
RowResult logps_plain(T* z, int64_t vocab, int64_t label, bool write_grad, float* scratch) {
  const float m = row_max(z, vocab);
  const double sum =
      write_grad ? sum_exp<true>(z, vocab, m, scratch) : sum_exp<false>(z, vocab, m, scratch);
  const RowResult result = finish(sum, m, load1(z + label));
  if (write_grad) {
    const float inverse = 1.0f / result.sum;
    int64_t i = 0;
    for (; i + kLanes <= vocab; i += kLanes) store(z + i, load(scratch + i) * inverse);
    for (; i < vocab; ++i) store1(z + i, scratch[i] * inverse);
    store1(z + label, std::expm1(result.logp));
  }
  return result;
}

template <class T>
RowResult logps_transformed(T* z, int64_t vocab, int64_t label, const RowTransform& t,
                            bool write_grad, float* u) {
  int64_t i = 0;
  for (; i + kLanes <= vocab; i += kLanes) store(u + i, transformed(z, i, t));
  for (; i < vocab; ++i) u[i] = transformed1(z, i, t);
  const float m = row_max(u, vocab);
  const double sum = sum_exp<false>(u, vocab, m, u);
  const RowResult result = finish(sum, m, u[label]);
  if (write_grad) {
    const float inverse = 1.0f / result.sum;
    for (i = 0; i + kLanes <= vocab; i += kLanes) {
      const VecF x = load(u + i);
      store(z + i, exp(x - m) * inverse * slope(x, t));
    }
    for (; i < vocab; ++i) store1(z + i, exp1(u[i] - m) * inverse * slope(splat(u[i]), t)[0]);
    store1(z + label, std::expm1(result.logp) * slope(splat(u[label]), t)[0]);
  }
  return result;
}

template <class T>
RowResult logps_typed(void* z, int64_t vocab, int64_t label, const RowTransform& t, bool write_grad,
                      float* scratch) {
  T* row = static_cast<T*>(z);
  if (t.identity()) return logps_plain<T>(row, vocab, label, write_grad, scratch);
  return logps_transformed<T>(row, vocab, label, t, write_grad, scratch);
}

RowResult row_logps(Element type, void* z, int64_t vocab, int64_t label, const RowTransform& t,
                    bool write_grad, float* scratch) {
  switch (type) {
    case Element::kFloat32: return logps_typed<float>(z, vocab, label, t, write_grad, scratch);
    case Element::kBFloat16: return logps_typed<BFloat16>(z, vocab, label, t, write_grad, scratch);
    default: return logps_typed<Float16>(z, vocab, label, t, write_grad, scratch);
  }
}

template <class T>
void backward_typed(const void* z_, void* out_, int64_t vocab, int64_t label, RowResult saved,
                    float coef) {
  const T* z = static_cast<const T*>(z_);
  T* out = static_cast<T*>(out_);
  const float m = saved.maximum;
  const float factor = coef / saved.sum;
  int64_t i = 0;
  for (; i + 2 * kLanes <= vocab; i += 2 * kLanes) {
    const VecF e0 = exp(load(z + i) - m) * factor;
    const VecF e1 = exp(load(z + i + kLanes) - m) * factor;
    store(out + i, e0);
    store(out + i + kLanes, e1);
  }
  for (; i < vocab; ++i) store1(out + i, exp1(load1(z + i) - m) * factor);
  store1(out + label, coef * std::expm1(saved.logp));
}

void row_backward(Element type, const void* z, void* out, int64_t vocab, int64_t label,
                  RowResult saved, float coef) {
  switch (type) {
    case Element::kFloat32: return backward_typed<float>(z, out, vocab, label, saved, coef);
    case Element::kBFloat16: return backward_typed<BFloat16>(z, out, vocab, label, saved, coef);
    default: return backward_typed<Float16>(z, out, vocab, label, saved, coef);
  }
}

}  // namespace

// The statistics kernels, written once on the vectors of vec.h; each stats_<isa>.cpp includes this.
//
//   values    H = log l + eps, eps = sum e_j (m - u_j) / l; log sum e_j^2 - 2 log l; mean of u;
//             m = max u, e = exp(u - m), l = sum e, p = e / l. One read of z for the maximum and
//             one (of L2) for the sums; about 15 flops an element
//   gradient  dz = (g_logp (1_y - p) - g_entropy p (u - m + eps)) du/dz: a read and a write
//   numerics  both terms of H are at least 0, so nothing cancels; sums of kBlock elements in float,
//             then in double; the label's p - 1 is expm1(log p). docs/math.md, section 6
#pragma once

#include <cmath>

#include "cpu/rows_transform.h"
#include "cpu/stats.h"

namespace {

using sppo::Element;
using sppo::RowStats;
using sppo::StatsWanted;

// Maximum of u[begin, end), and with kSum its sum.
template <bool kSum, class T>
inline float max_and_sum(const T* u, int64_t begin, int64_t end, double* sum) {
  VecF m0 = splat(-INFINITY), m1 = m0;
  float tail = -INFINITY;
  double total = 0;
  for (; begin < end; begin += kBlock) {
    const int64_t stop = begin + kBlock < end ? begin + kBlock : end;
    VecF s0 = VecF{}, s1 = VecF{};
    int64_t i = begin;
    for (; i + 2 * kLanes <= stop; i += 2 * kLanes) {
      const VecF x0 = load(u + i), x1 = load(u + i + kLanes);
      m0 = max(x0, m0);
      m1 = max(x1, m1);
      if (kSum) {
        s0 = s0 + x0;
        s1 = s1 + x1;
      }
    }
    if (kSum) total += reduce_add(s0 + s1);
    for (; i < stop; ++i) {
      const float x = load1(u + i);
      tail = x > tail ? x : tail;
      if (kSum) total += x;
    }
  }
  if (kSum) *sum += total;
  const float m = reduce_max(max(m0, m1));
  return tail > m ? tail : m;
}

// Sums over the row of e = exp(u - m), of e (m - u) and of e^2.
struct Moments {
  double sum, depth, squares;
};

struct VecMoments {
  VecF sum = VecF{}, depth = VecF{}, squares = VecF{};
  inline void add(VecF u, float m) {
    const VecF d = u - m;
    const VecF e = exp(d);
    sum = sum + e;
    depth = depth - e * max(d, splat(kExpMin));  // below kExpMin e is 0: -inf gives 0, not NaN
    squares = squares + e * e;
  }
};

template <class T>
inline Moments moments(const T* u, int64_t vocab, float m) {
  Moments total{0, 0, 0};
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
    VecMoments a, b;
    int64_t i = begin;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      a.add(load(u + i), m);
      b.add(load(u + i + kLanes), m);
    }
    total.sum += reduce_add(a.sum + b.sum);
    total.depth += reduce_add(a.depth + b.depth);
    total.squares += reduce_add(a.squares + b.squares);
    for (; i < end; ++i) {
      VecMoments one;
      one.add(splat(load1(u + i)), m);
      total.sum += one.sum[0];
      total.depth += one.depth[0];
      total.squares += one.squares[0];
    }
  }
  return total;
}

template <class T>
RowStats stats_of(const T* u, int64_t vocab, int64_t label, StatsWanted wanted) {
  RowStats out{};
  double sum = 0;
  const auto range = wanted.mean ? &max_and_sum<true, T> : &max_and_sum<false, T>;
  const float before = range(u, 0, label, &sum);
  const float rest = range(u, label, vocab, &sum);
  const float m = before > rest ? before : rest;
  const float at_label = load1(u + label);
  out.maximum = m;
  out.mean = static_cast<float>(sum / static_cast<double>(vocab));
  out.top1 = at_label == m && before < at_label;
  if (wanted.entropy || wanted.squares) {
    const Moments found = moments(u, vocab, m);
    const double log_sum = std::log(found.sum);
    const double depth = found.depth / found.sum;
    out.sum = static_cast<float>(found.sum);
    out.depth = static_cast<float>(depth);
    out.entropy = static_cast<float>(log_sum + depth);
    out.log_sum_squares = static_cast<float>(std::log(found.squares) - 2 * log_sum);
  }
  return out;
}

template <class T>
RowStats stats_typed(const void* z_, int64_t vocab, int64_t label, const RowTransform& t,
                     StatsWanted wanted, float* u) {
  const T* z = static_cast<const T*>(z_);
  if (t.identity()) return stats_of(z, vocab, label, wanted);
  int64_t i = 0;
  for (; i + kLanes <= vocab; i += kLanes) store(u + i, transformed(z, i, t));
  for (; i < vocab; ++i) u[i] = transformed1(z, i, t);
  return stats_of(u, vocab, label, wanted);
}

RowStats row_stats(Element type, const void* z, int64_t vocab, int64_t label, const RowTransform& t,
                   StatsWanted wanted, float* scratch) {
  switch (type) {
    case Element::kFloat32: return stats_typed<float>(z, vocab, label, t, wanted, scratch);
    case Element::kBFloat16: return stats_typed<BFloat16>(z, vocab, label, t, wanted, scratch);
    default: return stats_typed<Float16>(z, vocab, label, t, wanted, scratch);
  }
}

// -p (g_logp + g_entropy (log p + H)) du/dz, which is the gradient everywhere but at the label;
// log p + H = (u - maximum) + depth.
inline VecF descent(VecF u, const RowTransform& t, const RowStats& s, float inverse, float g_logp,
                    float g_entropy) {
  const VecF d = u - s.maximum;
  const VecF p = exp(d) * inverse;
  const VecF weight = (max(d, splat(kExpMin)) + s.depth) * g_entropy + g_logp;
  return -(p * weight) * slope(u, t);
}

template <class T>
void gradient_typed(void* z_, int64_t vocab, int64_t label, const RowTransform& t,
                    const RowStats& s, float g_logp, float g_entropy) {
  T* z = static_cast<T*>(z_);
  const float inverse = 1.0f / s.sum;
  const float u_y = transformed1(z, label, t);
  int64_t i = 0;
  for (; i + kLanes <= vocab; i += kLanes) {
    store(z + i, descent(transformed(z, i, t), t, s, inverse, g_logp, g_entropy));
  }
  for (; i < vocab; ++i) {
    const VecF u = splat(transformed1(z, i, t));
    store1(z + i, descent(u, t, s, inverse, g_logp, g_entropy)[0]);
  }
  const double logp = (static_cast<double>(u_y) - s.maximum) - std::log(static_cast<double>(s.sum));
  const VecF of_entropy = descent(splat(u_y), t, s, inverse, 0.0f, g_entropy);
  const float of_logp = -g_logp * static_cast<float>(std::expm1(logp));
  store1(z + label, of_logp * slope(splat(u_y), t)[0] + of_entropy[0]);
}

void row_gradient(Element type, void* z, int64_t vocab, int64_t label, const RowTransform& t,
                  const RowStats& s, float g_logp, float g_entropy) {
  switch (type) {
    case Element::kFloat32: gradient_typed<float>(z, vocab, label, t, s, g_logp, g_entropy); break;
    case Element::kBFloat16:
      gradient_typed<BFloat16>(z, vocab, label, t, s, g_logp, g_entropy);
      break;
    default: gradient_typed<Float16>(z, vocab, label, t, s, g_logp, g_entropy); break;
  }
}

}  // namespace

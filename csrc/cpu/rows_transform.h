// The head's elementwise part and its derivative, on the vectors of vec.h.
#pragma once

#include <cmath>

#include "cpu/rows.h"
#include "cpu/vec.h"

namespace {

using sppo::RowTransform;

constexpr int64_t kBlock = 4096;  // elements summed in float before the sum moves to double

// u = softcap(scale * (z + bias)) of one vector or one element.
template <class T>
inline VecF transformed(const T* z, int64_t i, const RowTransform& t) {
  VecF u = load(z + i);
  if (t.bias != nullptr) u = u + load(t.bias + i);
  u = u * t.scale;
  if (t.cap != 0.0f) u = tanh(u / t.cap) * t.cap;
  return u;
}

template <class T>
inline float transformed1(const T* z, int64_t i, const RowTransform& t) {
  VecF u = splat(load1(z + i));
  if (t.bias != nullptr) u = u + t.bias[i];
  u = u * t.scale;
  if (t.cap != 0.0f) u = tanh(u / t.cap) * t.cap;
  return u[0];
}

// du/dz, from u.
inline VecF slope(VecF u, const RowTransform& t) {
  if (t.cap == 0.0f) return splat(t.scale);
  const VecF tanh_u = u / t.cap;
  return (1.0f - tanh_u * tanh_u) * t.scale;
}

template <class T>
inline float row_max(const T* z, int64_t vocab) {
  VecF m0 = splat(-INFINITY), m1 = m0, m2 = m0, m3 = m0;
  int64_t i = 0;
  for (; i + 4 * kLanes <= vocab; i += 4 * kLanes) {
    m0 = max(load(z + i), m0);
    m1 = max(load(z + i + kLanes), m1);
    m2 = max(load(z + i + 2 * kLanes), m2);
    m3 = max(load(z + i + 3 * kLanes), m3);
  }
  for (; i + kLanes <= vocab; i += kLanes) m0 = max(load(z + i), m0);
  float m = reduce_max(max(max(m0, m1), max(m2, m3)));
  for (; i < vocab; ++i) m = load1(z + i) > m ? load1(z + i) : m;
  return m;
}

inline float exp1(float x) { return exp(splat(x))[0]; }

}  // namespace

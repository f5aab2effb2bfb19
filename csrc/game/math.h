// exp and the logistic pair, written once for scalars and for SIMD lanes (one game a lane), so that
// CPU and GPU, and every instruction set, give the same bits: only +, -, *, / and bit moves, no
// contraction into FMA (the build forbids it for these files).
#pragma once

#include "game/common.h"

namespace sppo {
namespace game {
inline namespace SPPO_GAME_ISA {

// What a value type V is made of: `Int`, lanes of integers of the same width, and its scalar.
template <class V>
struct Lanes;
template <>
struct Lanes<float> {
  using Scalar = float;
  using Int = int32_t;
  using Unsigned = uint32_t;
  using IntScalar = int32_t;
  static constexpr int kWidth = 1;
};
template <>
struct Lanes<double> {
  using Scalar = double;
  using Int = int64_t;
  using Unsigned = uint64_t;
  using IntScalar = int64_t;
  static constexpr int kWidth = 1;
};

template <class V>
using ScalarOf = typename Lanes<V>::Scalar;
template <class V>
using IntOf = typename Lanes<V>::Int;

template <class M, class V>
SPPO_HD V select(M mask, V yes, V no) {
  return mask ? yes : no;
}

template <class To, class From>
SPPO_HD To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
#if defined(__CUDA_ARCH__)
  memcpy(&to, &from, sizeof(To));
#else
  __builtin_memcpy(&to, &from, sizeof(To));
#endif
  return to;
}

// Constants of exp(x) = 2^n e^r, |r| <= ln(2)/2: Taylor terms enough for half an ulp, ln 2 in two
// pieces of which the first has trailing zeros, and 1.5 * 2^mantissa, which rounds when added.
template <class S>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kLog2e = 1.44269504088896341f;
  static constexpr float kLn2Hi = 0.693359375f;
  static constexpr float kLn2Lo = -2.12194440054690583e-4f;
  static constexpr float kRound = 12582912.0f;
  static constexpr int kMantissa = 23, kBias = 127, kTerms = 7;
  static constexpr float kMax = 87.0f;
};
template <>
struct ExpConstants<double> {
  static constexpr double kLog2e = 1.44269504088896340736;
  static constexpr double kLn2Hi = 0.693147180369123816490;
  static constexpr double kLn2Lo = 1.90821492927058770002e-10;
  static constexpr double kRound = 6755399441055744.0;
  static constexpr int kMantissa = 52, kBias = 1023, kTerms = 13;
  static constexpr double kMax = 708.0;
};

template <class S, int N>
struct InverseFactorial {
  static constexpr S value = InverseFactorial<S, N - 1>::value / N;
};
template <class S>
struct InverseFactorial<S, 0> {
  static constexpr S value = 1;
};

// Horner's scheme for sum_{n=N}^{last} r^(n-N) / n!.
template <class V, int N, bool Last>
struct Taylor {
  static SPPO_HD V sum(V r) {
    using S = ScalarOf<V>;
    return Taylor<V, N + 1, N + 1 == ExpConstants<S>::kTerms>::sum(r) * r +
           InverseFactorial<S, N>::value;
  }
};
template <class V, int N>
struct Taylor<V, N, true> {
  static SPPO_HD V sum(V r) { return r * ScalarOf<V>(0) + InverseFactorial<ScalarOf<V>, N>::value; }
};

// e^x for |x| <= kMax; beyond it the caller clamps. NaN stays NaN.
template <class V>
SPPO_HD V exp_of(V x) {
  using S = ScalarOf<V>;
  using U = typename Lanes<V>::Unsigned;
  using C = ExpConstants<S>;
  const V shifted = x * C::kLog2e + C::kRound;
  const V n = shifted - C::kRound;
  const V r = (x - n * C::kLn2Hi) - n * C::kLn2Lo;
  const V y = Taylor<V, 0, false>::sum(r);
  const U bias = bits_of<U>(V{} + C::kRound) - C::kBias;
  const U exponent = (bits_of<U>(shifted) - bias) << C::kMantissa;
  return y * bits_of<V>(exponent);
}

// P_ij = sigma(d) and P_ji = sigma(-d), both accurate to the last bits, however small.
template <class V>
SPPO_HD void logistic_pair(V d, V& p, V& q) {
  using S = ScalarOf<V>;
  constexpr S kMax = ExpConstants<S>::kMax;
  const V size = select(d < V{}, -d, d);
  const V e = exp_of<V>(-select(size > kMax, V{} + kMax, size));
  const V large = S(1) / (S(1) + e);
  const V small = e * large;
  p = select(d < V{}, small, large);
  q = select(d < V{}, large, small);
}

}  // namespace SPPO_GAME_ISA
}  // namespace game
}  // namespace sppo

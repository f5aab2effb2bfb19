// Vectors of floats in the width of the translation unit's instruction set (compiler vector
// extensions), loads and stores of float32, bfloat16 and float16, exp and tanh.
// Everything has internal linkage: each instruction set must keep its own copy.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline VecF splat(float x) { return VecF{} + x; }

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff);
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ff) << 13));
  // Exponent moved by a multiplication, which handles subnormal halves too.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
}

inline uint16_t float_to_half(float f) {
  const uint32_t bits = bit_cast<uint32_t>(f);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // rounds to infinity
  if (magnitude < 0x38800000u) {                       // subnormal half: align, let the FPU round
    const float aligned = bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(bit_cast<uint32_t>(aligned) - 0x3f000000u);
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return sign | static_cast<uint16_t>((magnitude + 0xfffu + odd - 0x38000000u) >> 13);
}

inline float load1(const float* p) { return *p; }
inline float load1(const BFloat16* p) { return bit_cast<float>(uint32_t{p->bits} << 16); }
inline float load1(const Float16* p) { return half_to_float(p->bits); }

inline uint16_t float_to_bfloat(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline void store1(float* p, float x) { *p = x; }
inline void store1(BFloat16* p, float x) { p->bits = float_to_bfloat(x); }
inline void store1(Float16* p, float x) { p->bits = float_to_half(x); }

inline VecF load(const float* p) {
  VecF x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline VecF load(const BFloat16* p) {
  VecH h;
  std::memcpy(&h, p, sizeof(h));
  return bit_cast<VecF>(__builtin_convertvector(h, VecU) << 16);
}

inline VecF load(const Float16* p) {
#if defined(__AVX512F__)
  return bit_cast<VecF>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return bit_cast<VecF>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  VecF x;
  for (int i = 0; i < kLanes; ++i) x[i] = half_to_float(p[i].bits);
  return x;
#endif
}

inline void store(float* p, VecF x) { std::memcpy(p, &x, sizeof(x)); }

inline void store(BFloat16* p, VecF x) {
  const VecU bits = bit_cast<VecU>(x);
  VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  rounded = (bits & 0x7fffffffu) > 0x7f800000u ? VecU{} + 0x7fc0u : rounded;
  const VecH h = __builtin_convertvector(rounded, VecH);
  std::memcpy(p, &h, sizeof(h));
}

inline void store(Float16* p, VecF x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = float_to_half(x[i]);
#endif
}

// NaN in `a` gives `b`: a NaN must reach the sum, not the maximum.
inline VecF max(VecF a, VecF b) { return a > b ? a : b; }

inline float reduce_max(VecF x) {
  float m = x[0];
  for (int i = 1; i < kLanes; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

inline double reduce_add(VecF x) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

constexpr float kExpMin = -87.0f;  // below it exp is taken as 0, before results become subnormal

// exp(x) for x <= 88: n = round(x / ln 2), a degree-6 polynomial
// (relative error 3e-9, fitted by reweighted least squares) of x - n ln 2, times 2^n. NaN stays
// NaN.
inline VecF exp(VecF x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const VecF clamped = x < kExpMin ? splat(kExpMin) : x;
  const VecF shifted = clamped * 1.44269504f + magic;
  const VecF n = shifted - magic;
  VecF r = clamped - n * 0.693145752f;
  r = r - n * 1.42860682e-6f;
  VecF p = splat(1.38143717e-3f);
  p = p * r + 8.36875537e-3f;
  p = p * r + 4.16683937e-2f;
  p = p * r + 1.66665203e-1f;
  p = p * r + 4.99999934e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // The low bits of `shifted` hold n; moved into the exponent they scale p by 2^n.
  const VecU exponent = (bit_cast<VecU>(shifted) + 127u) << 23;
  const VecF result = p * bit_cast<VecF>(exponent);
  return x < kExpMin ? VecF{} : result;
}

inline VecF tanh(VecF x) {
  VecF c = x < -9.1f ? splat(-9.1f) : x;
  c = c > 9.1f ? splat(9.1f) : c;
  const VecF e = exp(c * 2.0f);
  return (e - 1.0f) / (e + 1.0f);
}

}  // namespace

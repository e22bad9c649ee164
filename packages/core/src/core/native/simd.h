// One vector of floats, whose width W is the processor's: the kernels are written once, in these words.
//
// A library is compiled for one instruction set (core/native/build.py chooses it); these are
//   AVX-512 (W = 16), AVX2 with FMA (8), NEON (4), and plain vectors of the compiler (4), which have no fused multiply-add.
// The compiler contracts nothing (-ffp-contract=off): what is rounded when is what is written here, so that the same sum
// has the same bits in whichever tile it is computed.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(FLAXMILL_PLAIN)
#elif defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // of a lambda

namespace flaxmill {

// Calls f(0) to f(N - 1) with numbers the compiler knows: arrays indexed by them are registers.
template <class Call, int... N>
INLINE void each(const Call& call, std::integer_sequence<int, N...>) {
  (call(std::integral_constant<int, N>()), ...);
}
template <int N, class Call>
INLINE void each(const Call& call) {
  each(call, std::make_integer_sequence<int, N>());
}

struct bf16 {  // the upper half of a float
  uint16_t bits;
};

INLINE float widen(float x) { return x; }
INLINE float widen(int8_t x) { return x; }
INLINE float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

#if defined(__AVX512F__) && !defined(FLAXMILL_PLAIN)

using F = __m512;
constexpr int W = 16;

INLINE __mmask16 first(int count) { return __mmask16((1u << count) - 1); }

INLINE F zero() { return _mm512_setzero_ps(); }
INLINE F set(float x) { return _mm512_set1_ps(x); }
INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where one is NaN
INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }  // b where one is NaN
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }  // a b + c

INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
INLINE F load(const bf16* p) {
  __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}
INLINE F load(const int8_t* p) {
  __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(narrow));
}
INLINE F load(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
INLINE void store(float* p, F x, int count) { _mm512_mask_storeu_ps(p, first(count), x); }

#elif defined(__AVX2__) && !defined(FLAXMILL_PLAIN)

using F = __m256;
constexpr int W = 8;

INLINE __m256i first(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

INLINE F zero() { return _mm256_setzero_ps(); }
INLINE F set(float x) { return _mm256_set1_ps(x); }
INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
INLINE F load(const bf16* p) {
  __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}
INLINE F load(const int8_t* p) {
  __m128i narrow = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(narrow));
}
INLINE F load(const float* p, int count) { return _mm256_maskload_ps(p, first(count)); }
INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
INLINE void store(float* p, F x, int count) { _mm256_maskstore_ps(p, first(count), x); }

#else

using F = float __attribute__((vector_size(16)));
using I = int32_t __attribute__((vector_size(16)));
using U = uint32_t __attribute__((vector_size(16)));  // for sums and shifts that go beyond int32
constexpr int W = 4;

INLINE F zero() { return F{0, 0, 0, 0}; }
INLINE F set(float x) { return F{x, x, x, x}; }
INLINE F add(F a, F b) { return a + b; }
INLINE F sub(F a, F b) { return a - b; }
INLINE F mul(F a, F b) { return a * b; }
INLINE F div(F a, F b) { return a / b; }
INLINE F select(I yes, F a, F b) { return (F)((yes & (I)a) | (~yes & (I)b)); }
INLINE F max(F a, F b) { return select(a > b, a, b); }
INLINE F min(F a, F b) { return select(a < b, a, b); }
#if defined(__ARM_NEON) && !defined(FLAXMILL_PLAIN)
INLINE F fma(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
INLINE F fma(F a, F b, F c) { return a * b + c; }  // rounded twice
#endif

INLINE F load(const float* p) {
  F x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
INLINE F load(const bf16* p) { return F{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
INLINE F load(const int8_t* p) { return F{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
INLINE F load(const float* p, int count) {
  F x = zero();
  std::memcpy(&x, p, 4 * count);
  return x;
}
INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
INLINE void store(float* p, F x, int count) { std::memcpy(p, &x, 4 * count); }

#endif

// The first `count` < W numbers at `p`, then zeros. Nothing beyond them is read.
template <class Narrow>
INLINE F load(const Narrow* p, int count) {
  Narrow whole[W] = {};
  std::memcpy(whole, p, sizeof(Narrow) * count);
  return load(whole);
}

// Keeps x in a register, where the compiler would read it from memory again for each use.
#if defined(FLAXMILL_PLAIN)
INLINE void keep(F&) {}
#elif defined(__AVX2__)
INLINE void keep(F& x) { __asm__("" : "+v"(x)); }
#elif defined(__ARM_NEON)
INLINE void keep(F& x) { __asm__("" : "+w"(x)); }
#else
INLINE void keep(F&) {}
#endif

// The sum of the lanes: first those at distance W/2, then those at W/4, and so on.
#if defined(__AVX512F__) && !defined(FLAXMILL_PLAIN)
INLINE float sum(__m128 x) {
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
INLINE float sum(__m256 x) {
  return sum(_mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
INLINE float sum(__m512 x) {
  return sum(_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)));
}
#elif defined(__AVX2__) && !defined(FLAXMILL_PLAIN)
INLINE float sum(__m256 x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#else
INLINE float sum(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
#endif

}  // namespace flaxmill

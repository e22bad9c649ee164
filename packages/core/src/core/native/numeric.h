// The exponential, what folds vectors into numbers, and what turns a square of them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace flaxmill {

// x with 2^n multiplied in, for n in the low bits of `shifted`, and 0 where `low` is below `least`.
#if defined(__AVX512F__) && !defined(FLAXMILL_PLAIN)
INLINE F scaled(F x, F shifted, F low, F least) {
  __m512i bits = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  __mmask16 kept = _mm512_cmp_ps_mask(low, least, _CMP_NLT_UQ);
  return _mm512_castsi512_ps(_mm512_maskz_add_epi32(kept, _mm512_castps_si512(x), bits));
}
#elif defined(__AVX2__) && !defined(FLAXMILL_PLAIN)
INLINE F scaled(F x, F shifted, F low, F least) {
  __m256i bits = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  F power = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), bits));
  return _mm256_and_ps(power, _mm256_cmp_ps(low, least, _CMP_NLT_UQ));
}
#else
INLINE F scaled(F x, F shifted, F low, F least) {
  return (F)(((U)x + ((U)shifted << 23)) & (U)~(low < least));
}
#endif

// e^x for x up to 88.3; 0 below -86, NaN for NaN. At most 2 units in the last place off (the polynomial is Cephes').
INLINE F exponential(F x) {
  F magic = set(12582912.0f);  // 1.5 * 2^23: a number added to it is rounded to a whole one, in its low bits
  F shifted = add(mul(x, set(1.44269504f)), magic);
  F n = sub(shifted, magic);
  F r = fma(n, set(2.12194440e-4f), fma(n, set(-0.693359375f), x));  // the logarithm of 2, in two parts
  F p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set(1.0f));
  return scaled(p, shifted, x, set(-86.0f));
}

// Lane i becomes the sum of the lanes of x[i]: those at distance W/2 are added, then W/4, and so on.
#if defined(__AVX512F__) && !defined(FLAXMILL_PLAIN)
INLINE F sums(const F (&x)[W]) {
  constexpr int at[W] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};
  F a[8], b[4], c[2];
  each<8>([&](auto i) INLINED {
    F p = x[at[i]], q = x[at[i + 8]];
    a[i] = add(_mm512_shuffle_f32x4(p, q, 0x44), _mm512_shuffle_f32x4(p, q, 0xEE));
  });
  each<4>([&](auto i) INLINED {
    b[i] = add(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xDD));
  });
  each<2>([&](auto i) INLINED {
    c[i] = add(_mm512_shuffle_ps(b[i], b[i + 2], 0x44), _mm512_shuffle_ps(b[i], b[i + 2], 0xEE));
  });
  return add(_mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xDD));
}
#elif defined(__AVX2__) && !defined(FLAXMILL_PLAIN)
INLINE F sums(const F (&x)[W]) {
  constexpr int at[W] = {0, 2, 1, 3, 4, 6, 5, 7};
  F b[4], c[2];
  each<4>([&](auto i) INLINED {
    F p = x[at[i]], q = x[at[i + 4]];
    b[i] = add(_mm256_permute2f128_ps(p, q, 0x20), _mm256_permute2f128_ps(p, q, 0x31));
  });
  each<2>([&](auto i) INLINED {
    c[i] = add(_mm256_shuffle_ps(b[i], b[i + 2], 0x44), _mm256_shuffle_ps(b[i], b[i + 2], 0xEE));
  });
  return add(_mm256_shuffle_ps(c[0], c[1], 0x88), _mm256_shuffle_ps(c[0], c[1], 0xDD));
}
#else
INLINE F sums(const F (&x)[W]) {
  float each[W];
  for (int i = 0; i < W; ++i) each[i] = sum(x[i]);
  return load(each);
}
#endif

#if defined(__AVX512F__) && !defined(FLAXMILL_PLAIN)
// The sums of up to eight vectors, each in the order of `sum`.
template <int N>
INLINE void sums(const F (&x)[N], float* to) {
  if constexpr (N <= 2) return each<N>([&](auto i) INLINED { to[i] = sum(x[i]); });
  constexpr int H = (N + 1) / 2, Q = (H + 1) / 2;
  static_assert(Q <= 2);
  F halves[H], quarters[2];
  each<H>([&](auto i) INLINED {
    const F a = x[2 * i], b = x[2 * i + 1 < N ? 2 * i + 1 : N - 1];
    halves[i] = add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  });
  each<Q>([&](auto i) INLINED {
    const F a = halves[2 * i], b = halves[2 * i + 1 < H ? 2 * i + 1 : H - 1];
    quarters[i] = add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  });
  const __m512d a = _mm512_castps_pd(quarters[0]), b = _mm512_castps_pd(quarters[Q - 1]);
  const F pairs = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  float lanes[W];
  store(lanes, add(pairs, _mm512_permute_ps(pairs, 0xB1)));
  for (int i = 0; i < N; ++i) to[i] = lanes[i % 4 * 4 + i / 4 * 2];
}
#else
template <int N>
INLINE void sums(const F (&x)[N], float* to) {
  each<N>([&](auto i) INLINED { to[i] = sum(x[i]); });
}
#endif

// Lane j of x[i] becomes lane i of x[j].
#if defined(__AVX512F__) && !defined(FLAXMILL_PLAIN)
INLINE void transpose(F (&x)[W]) {
  F a[W], b[W];
  each<8>([&](auto i) INLINED {
    a[2 * i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
  });
  auto low = [](F p, F q) INLINED { return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(p), _mm512_castps_pd(q))); };
  auto high = [](F p, F q) INLINED { return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(p), _mm512_castps_pd(q))); };
  each<4>([&](auto i) INLINED {
    b[4 * i] = low(a[4 * i], a[4 * i + 2]), b[4 * i + 1] = high(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = low(a[4 * i + 1], a[4 * i + 3]), b[4 * i + 3] = high(a[4 * i + 1], a[4 * i + 3]);
  });
  // A quarter k of b[4 i + j] is column 4 k + j of four rows from 4 i on.
  each<4>([&](auto j) INLINED {
    F even[2] = {_mm512_shuffle_f32x4(b[j], b[4 + j], 0x88), _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88)};
    F odd[2] = {_mm512_shuffle_f32x4(b[j], b[4 + j], 0xDD), _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xDD)};
    x[j] = _mm512_shuffle_f32x4(even[0], even[1], 0x88), x[8 + j] = _mm512_shuffle_f32x4(even[0], even[1], 0xDD);
    x[4 + j] = _mm512_shuffle_f32x4(odd[0], odd[1], 0x88), x[12 + j] = _mm512_shuffle_f32x4(odd[0], odd[1], 0xDD);
  });
}
#else
INLINE void transpose(F (&x)[W]) {
  float rows[W][W], column[W];
  for (int i = 0; i < W; ++i) store(rows[i], x[i]);
  for (int j = 0; j < W; ++j) {
    for (int i = 0; i < W; ++i) column[i] = rows[i][j];
    x[j] = load(column);
  }
}
#endif

// The highest lane. Which number it is where one is NaN is not defined.
INLINE float highest(F x) {
#if defined(__AVX512F__) && !defined(FLAXMILL_PLAIN)
  return _mm512_reduce_max_ps(x);
#else
  float lanes[W];
  store(lanes, x);
  return *std::max_element(lanes, lanes + W);
#endif
}

inline void narrow(float x, float* to) { *to = x; }

// To the nearest, ties to even.
inline void narrow(float x, bf16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  to->bits = uint16_t(nan ? bits >> 16 | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace flaxmill

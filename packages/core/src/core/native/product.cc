// The product of some rows and a weight matrix, y_RO = x_RI w, in float32.
//
// The order of a sum is fixed by how the matrix is stored, and by nothing else: not by the number of rows, the tile, the
// thread or what the other rows are.
//   [I, O]  y += x_i w_i for i = 0, 1, ...: one number after another. Vectors lie along O.
//   [O, I]  lane l of a vector sums the i that are l modulo its lanes, in order; then the lanes are added (`sum`).
// So R, O and I are cut as suits the caches: a sum that is interrupted goes to memory and comes back as it was.
//
// A decoding step reads every weight once, and at few rows its time is that of the memory. So a part of the matrix is
// asked for (`Ahead`) while the one before is multiplied, in the order in which it lies in memory, and nothing is copied.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "numeric.h"
#include "simd.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace flaxmill {
namespace {

namespace ffi = xla::ffi;

#if defined(__AVX512BW__) && !defined(FLAXMILL_PLAIN)
#define FLAXMILL_WIDE
#endif

// Rows of a tile. With kVectors of an arithmetic, at most 24 registers of 32, or 12 of 16, accumulate.
constexpr int kRows = W == 8 ? 4 : 8;
// For fewer rows an [I, O] matrix is read nearly as it lies: more columns, fewer rows of it at a time.
constexpr int64_t kFewRows = 4;
// Bytes of x, beside weights that pass, that stay in the first cache.
constexpr int64_t kNear = 16384;

struct Shape {
  int64_t R, I, O;
};

// `count` of the W numbers at p: all, some or none.
template <class Number>
INLINE F load_some(const Number* p, int64_t count) {
  return count >= W ? load(p) : count > 0 ? load(p, int(count)) : zero();
}
INLINE void store_some(float* p, F x, int64_t count) {
  if (count >= W) store(p, x);
  else if (count > 0) store(p, x, int(count));
}

// Of numbers that were rounded: what one is worth, by output of the matrix and by row of x, and what is to be taken from
// the sums of a row.
struct Units {
  const float* outputs;
  const float* rows;
  const int32_t* offsets;
};

// Some rows of x, some outputs, and which of the numbers of I now.
template <class A>
struct Task {
  const typename A::X* x;       // [., I], from the first row on
  const typename A::Weight* w;  // from the first output on, and from i = 0
  float* y;                     // [., O], from the first row and output on
  Shape s;
  int64_t n;           // outputs
  int64_t begin, end;  // of I
  int64_t ask, asked;  // the steps of `ahead` go with these i
  const Units* units = nullptr;
  int64_t r = 0, o = 0;  // which row and output the first ones are
};

// y_RO: the sum of each vector.
template <int Rows, int V>
INLINE void sum_up(const F (&x)[Rows][V], float* y, int64_t O) {
  each<V>([&](auto v) INLINED {
    F column[Rows];
    float totals[Rows];
    each<Rows>([&](auto r) INLINED { column[r] = x[r][v]; });
    sums(column, totals);
    each<Rows>([&](auto r) INLINED { y[r * O + v] = totals[r]; });
  });
}

// ---- Arithmetics: what is multiplied, and how. A tile has kVectors of sums side by side; by columns it goes on by kDeep
// numbers of I at a time, by rows, kTall rows and kOutputs outputs, by kLanes. `n` says how many columns there are, where that may be less than a tile.

// Numbers of float32 and weights that become such, which is exact; fused multiply-adds.
template <class Weight_>
struct Widened {
  using X = float;
  using Weight = Weight_;
  using Part = F;
  using Sum = F;
  static constexpr int kVectors = 3, kDeep = 1, kLanes = W, kTall = kRows, kOutputs = 3;
  static constexpr int64_t kWidth = sizeof(Weight) > 1 ? kVectors * W : 0;  // columns; int8 lies by rows alone

  static INLINE Sum none() { return zero(); }
  static INLINE Sum add(Part x, Part w, Sum sum) { return fma(x, w, sum); }

  template <bool Whole>
  static INLINE void columns(const Weight* w, int64_t, bool, int64_t n, Part (&row)[kVectors]) {
    each<kVectors>([&](auto v) INLINED { row[v] = Whole ? load(w + v * W) : load_some(w + v * W, n - v * W); });
  }
  static INLINE Part scale(const X* x, bool) { return set(*x); }
  template <bool Whole>
  static INLINE void resume(const float* y, int64_t n, Sum (&sums)[kVectors]) {
    each<kVectors>([&](auto v) INLINED { sums[v] = Whole ? load(y + v * W) : load_some(y + v * W, n - v * W); });
  }
  template <bool Whole>
  static INLINE void leave(float* y, int64_t n, const Sum (&sums)[kVectors]) {
    each<kVectors>([&](auto v) INLINED { Whole ? store(y + v * W, sums[v]) : store_some(y + v * W, sums[v], n - v * W); });
  }

  template <class... Count>
  static INLINE Part weights(const Weight* w, Count... count) { return load(w, count...); }
  template <class... Count>
  static INLINE Part row(const X* x, Count... count) {
    Part part = load(x, count...);
    keep(part);
    return part;
  }
  template <int Rows, int V>
  static INLINE void totals(const Sum (&x)[Rows][V], const Units*, int64_t, int64_t, float* y, int64_t O) { sum_up(x, y, O); }
};

#if defined(__AVX512BF16__) && !defined(FLAXMILL_PLAIN)
#define FLAXMILL_DOTS

// Pairs of bfloat16: their products are exact, and each of the two is added to the sum and rounded.
struct Dotted {
  using X = bf16;
  using Weight = bf16;
  using Part = __m512i;  // 16 pairs
  using Sum = F;
  static constexpr int kVectors = 2, kDeep = 2, kLanes = 32, kTall = kRows, kOutputs = 3;
  static constexpr int64_t kWidth = 32;

  static INLINE Sum none() { return zero(); }
  static INLINE Sum add(Part x, Part w, Sum sum) { return _mm512_dpbf16_ps(sum, __m512bh(x), __m512bh(w)); }

  // Two rows of the matrix, in pairs. That puts the columns in another order: 0-3, 8-11, ... and 4-7, 12-15, ...
  template <bool Whole>
  static INLINE void columns(const Weight* w, int64_t O, bool lone, int64_t n, Part (&row)[kVectors]) {
    Part a = Whole ? weights(w) : weights(w, int(n));
    Part b = lone ? _mm512_setzero_si512() : Whole ? weights(w + O) : weights(w + O, int(n));
    row[0] = _mm512_unpacklo_epi16(a, b);
    row[1] = _mm512_unpackhi_epi16(a, b);
  }
  static INLINE Part scale(const X* x, bool lone) {
    int32_t pair = 0;
    std::memcpy(&pair, x, lone ? 2 : 4);
    return _mm512_set1_epi32(pair);
  }
  template <bool Whole>
  static INLINE void resume(const float* y, int64_t n, Sum (&sums)[kVectors]) {
    F a = Whole ? load(y) : load_some(y, n), b = Whole ? load(y + W) : load_some(y + W, n - W);
    sums[0] = _mm512_shuffle_f32x4(a, b, 0x88);
    sums[1] = _mm512_shuffle_f32x4(a, b, 0xDD);
  }
  template <bool Whole>
  static INLINE void leave(float* y, int64_t n, const Sum (&sums)[kVectors]) {
    F a = _mm512_shuffle_f32x4(sums[0], sums[1], 0x44), b = _mm512_shuffle_f32x4(sums[0], sums[1], 0xEE);
    a = _mm512_shuffle_f32x4(a, a, 0xD8);
    b = _mm512_shuffle_f32x4(b, b, 0xD8);
    Whole ? store(y, a) : store_some(y, a, n);
    Whole ? store(y + W, b) : store_some(y + W, b, n - W);
  }

  static INLINE Part weights(const bf16* w) { return _mm512_loadu_si512(w); }
  static INLINE Part weights(const bf16* w, int count) { return _mm512_maskz_loadu_epi16((1u << count) - 1, w); }
  template <class... Count>
  static INLINE Part row(const bf16* x, Count... count) {
    Part part = weights(x, count...);
    __asm__("" : "+v"(part));
    return part;
  }
  template <int Rows, int V>
  static INLINE void totals(const Sum (&x)[Rows][V], const Units*, int64_t, int64_t, float* y, int64_t O) { sum_up(x, y, O); }
};
#endif

// Whole numbers from -127 to 127, whose products and sums int32 has exactly, in whatever order.
struct Rounded {
  using X = int8_t;
  using Weight = int8_t;
  static constexpr int64_t kWidth = 0;
#if defined(FLAXMILL_WIDE)
  static constexpr int kTall = 4, kOutputs = 4;  // whose sums are the lanes of a vector
#else
  static constexpr int kTall = kRows, kOutputs = 3;
#endif
#if defined(__AVX512VNNI__) && !defined(FLAXMILL_PLAIN)
  // The instruction takes one side without a sign: the weights are 128 too large, and sums by 128 times the row's sum.
  using Part = __m512i;
  using Sum = __m512i;
  static constexpr int kLanes = 64, kOffset = 128;
  static INLINE Sum none() { return _mm512_setzero_si512(); }
  static INLINE Sum add(Part x, Part w, Sum sum) { return _mm512_dpbusd_epi32(sum, w, x); }
  static INLINE Part row(const X* x) { return _mm512_loadu_si512(x); }
  static INLINE Part row(const X* x, int count) { return _mm512_maskz_loadu_epi8((uint64_t(1) << count) - 1, x); }
  template <class... Count>
  static INLINE Part weights(const Weight* w, Count... count) { return _mm512_xor_si512(row(w, count...), _mm512_set1_epi8(-128)); }
  static INLINE int32_t lanes(Sum x) { return _mm512_reduce_add_epi32(x); }
#elif defined(__AVX512BW__) && !defined(FLAXMILL_PLAIN)
  using Part = __m512i;
  using Sum = __m512i;
  static constexpr int kLanes = 32, kOffset = 0;
  static INLINE Sum none() { return _mm512_setzero_si512(); }
  static INLINE Sum add(Part x, Part w, Sum sum) { return _mm512_add_epi32(sum, _mm512_madd_epi16(x, w)); }
  static INLINE Part row(const X* x) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }
  static INLINE Part row(const X* x, int count) { return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((1u << count) - 1, x)); }
  template <class... Count>
  static INLINE Part weights(const Weight* w, Count... count) { return row(w, count...); }
  static INLINE int32_t lanes(Sum x) { return _mm512_reduce_add_epi32(x); }
#elif defined(__AVX2__) && !defined(FLAXMILL_PLAIN)
  using Part = __m256i;
  using Sum = __m256i;
  static constexpr int kLanes = 16, kOffset = 0;
  static INLINE Sum none() { return _mm256_setzero_si256(); }
  static INLINE Sum add(Part x, Part w, Sum sum) { return _mm256_add_epi32(sum, _mm256_madd_epi16(x, w)); }
  static INLINE Part row(const X* x) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }
  static INLINE Part row(const X* x, int count) {
    X whole[kLanes] = {};
    std::memcpy(whole, x, count);
    return row(whole);
  }
  template <class... Count>
  static INLINE Part weights(const Weight* w, Count... count) { return row(w, count...); }
  static INLINE int32_t lanes(Sum x) {
    alignas(32) int32_t all[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(all), x);
    return std::accumulate(all, all + 8, 0);
  }
#else
  using Part = int32_t __attribute__((vector_size(16)));
  using Sum = Part;
  static constexpr int kLanes = 4, kOffset = 0;
  static INLINE Sum none() { return Sum{0, 0, 0, 0}; }
  static INLINE Sum add(Part x, Part w, Sum sum) { return sum + x * w; }
  static INLINE Part row(const X* x) { return Part{x[0], x[1], x[2], x[3]}; }
  static INLINE Part row(const X* x, int count) {
    return Part{x[0], count > 1 ? x[1] : 0, count > 2 ? x[2] : 0, 0};
  }
  template <class... Count>
  static INLINE Part weights(const Weight* w, Count... count) { return row(w, count...); }
  static INLINE int32_t lanes(Sum x) { return x[0] + x[1] + x[2] + x[3]; }
#endif
  template <int Rows, int V>
  static INLINE void totals(const Sum (&x)[Rows][V], const Units* units, int64_t r, int64_t o, float* y, int64_t O) {
    each<Rows>([&](auto i) INLINED {
      each<V>([&](auto v) INLINED { y[i * O + v] = float(lanes(x[i][v]) - units->offsets[r + i]) * units->outputs[o + v] * units->rows[r + i]; });
    });
  }
#if defined(FLAXMILL_WIDE)
  // The same of four rows and four outputs: it takes a third of the time of what else there is to do at I = 768.
  static INLINE void totals(const Sum (&x)[4][4], const Units* units, int64_t r, int64_t o, float* y, int64_t O) {
    Sum fours[4], twos[2];
    auto halves = [](Sum a, Sum b) INLINED { return _mm512_add_epi32(_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xEE)); };
    each<4>([&](auto v) INLINED {
      Sum a = halves(x[0][v], x[1][v]), b = halves(x[2][v], x[3][v]);
      fours[v] = _mm512_add_epi32(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xDD));
    });
    each<2>([&](auto pair) INLINED {
      Sum a = fours[2 * pair], b = fours[2 * pair + 1];
      twos[pair] = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    });
    __m512 a = _mm512_castsi512_ps(twos[0]), b = _mm512_castsi512_ps(twos[1]);
    Sum all = _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)), _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xDD)));
    // Now a row's four outputs lie side by side.
    __m128 outputs = _mm_loadu_ps(units->outputs + o);
    each<4>([&](auto i) INLINED {
      __m128i whole = _mm_sub_epi32(_mm512_extracti32x4_epi32(all, i), _mm_set1_epi32(units->offsets[r + i]));
      _mm_storeu_ps(y + i * O, _mm_mul_ps(_mm_mul_ps(_mm_cvtepi32_ps(whole), outputs), _mm_set1_ps(units->rows[r + i])));
    });
  }
#endif
};

// W numbers within int8's range, to the nearest whole ones, ties to even.
INLINE void round(F x, int8_t* to) {
#if defined(__AVX512F__) && !defined(FLAXMILL_PLAIN)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
#else
  const F magic = set(12582912.0f);  // 1.5 * 2^23, next to which there are but whole numbers
  float lanes[W];
  store(lanes, sub(add(x, magic), magic));
  for (int i = 0; i < W; ++i) to[i] = int8_t(lanes[i]);
#endif
}

// Rounds I numbers to int8, in units of a 127th of the largest magnitude. A row that is not finite has no finite unit.
inline void round_row(const float* x, int64_t I, int8_t* rounded, float& unit, int32_t& offset) {
  F largest = zero(), poison = zero();
  for (int64_t i = 0; i < I; i += W) {
    const F part = load_some(x + i, I - i);
    largest = max(max(part, sub(zero(), part)), largest);
    poison = fma(part, zero(), poison);
  }
  float lanes[W];
  store(lanes, largest);
  unit = *std::max_element(lanes, lanes + W) / 127;
  if (unit == 0) unit = 1;
  for (int64_t i = 0; i < I; i += W) {
    // What is no number becomes a bound.
    const F part = max(min(div(load_some(x + i, I - i), set(unit)), set(127)), set(-127));
    int8_t whole[W];
    round(part, whole);
    std::memcpy(rounded + i, whole, std::min<int64_t>(W, I - i));
  }
  offset = Rounded::kOffset * std::accumulate(rounded, rounded + I, 0);
  unit += sum(poison);
}

// ---- Memory

constexpr int64_t kLine = 64;

// Asks for `rows` pieces of `bytes`, `stride` apart, and then for one more elsewhere, some cache lines at a step.
struct Ahead {
  const char* at = nullptr;
  int64_t bytes = 0, stride = 0, rows = 0;
  const char* then = nullptr;
  int64_t then_bytes = 0;
  int64_t begun = 0;  // of the piece at `at`

  template <int64_t Bytes>
  INLINE void step() {
    if (rows <= 0) return;
    for (int64_t line = 0; line < Bytes; line += kLine) __builtin_prefetch(at + begun + line, 0, 2);
    begun += Bytes;
    if (begun < bytes) return;
    begun = 0;
    at += stride;
    if (--rows > 0 || then_bytes <= 0) return;
    *this = {then, then_bytes, 0, 1};
  }
};

// Calls call(Rows, first row) for blocks of rows that make up R, of a few sizes that the compiler knows.
template <int Most, class Call>
INLINE void blocks_of_rows(int64_t R, const Call& call) {
  const int64_t blocks = (R + Most - 1) / Most;
  for (int64_t r = 0; r < R;) {
    const int64_t rows = std::min(R - r, (R + blocks - 1) / blocks);
    auto block = [&](auto size) INLINED {
      call(size, r);
      r += size;
    };
    if (Most == 8 && rows == 8) block(std::integral_constant<int, Most>());
    else if (Most == 8 && rows >= 6) block(std::integral_constant<int, Most * 3 / 4>());
    else if (rows >= 4) block(std::integral_constant<int, 4>());
    else if (rows == 3) block(std::integral_constant<int, 3>());
    else if (rows == 2) block(std::integral_constant<int, 2>());
    else block(std::integral_constant<int, 1>());
  }
}

// ---- [I, O]

template <class A, int Rows, bool Whole>
INLINE void columns_tile(const Task<A>& task, int64_t o, Ahead& ahead) {
  const int64_t I = task.s.I, O = task.s.O, n = task.n - o, ask = task.ask, asked = task.asked - ask;
  const auto* x = task.x;
  const auto* w = task.w + task.begin * O + o;
  float* y = task.y + o;
  typename A::Sum sums[Rows][A::kVectors];
  if (task.begin == 0) each<Rows>([&](auto r) INLINED { each<A::kVectors>([&](auto v) INLINED { sums[r][v] = A::none(); }); });
  else each<Rows>([&](auto r) INLINED { A::template resume<Whole>(y + r * O, n, sums[r]); });
  auto step = [&](int64_t i, bool lone) INLINED {
    typename A::Part row[A::kVectors];
    A::template columns<Whole>(w, O, lone, n, row);
    each<Rows>([&](auto r) INLINED {
      auto scale = A::scale(x + r * I + i, lone);
      each<A::kVectors>([&](auto v) INLINED { sums[r][v] = A::add(scale, row[v], sums[r][v]); });
    });
    w += A::kDeep * O;
    if (uint64_t(i - ask) < uint64_t(asked)) ahead.template step<A::kDeep * A::kWidth * sizeof(*w)>();
  };
  int64_t i = task.begin;
  for (; i + A::kDeep <= task.end; i += A::kDeep) step(i, false);
  if (i < task.end) step(i, true);
  each<Rows>([&](auto r) INLINED { A::template leave<Whole>(y + r * O, n, sums[r]); });
}

template <class A, int Rows>
__attribute__((noinline)) void columns_block(const Task<A>& task, Ahead& ahead) {
  Ahead local = ahead;
  int64_t o = 0;
  for (; o + A::kWidth <= task.n; o += A::kWidth) columns_tile<A, Rows, true>(task, o, local);
  ahead = local;
  if (o == task.n) return;
  // The last columns, fewer than a tile's: row by row, for the sake of less code.
  Task<A> row = task;
  for (int r = 0; r < Rows; ++r, row.x += task.s.I, row.y += task.s.O) columns_tile<A, 1, false>(row, o, local);
}

// Outputs o to o + n of all rows. `next` is where this thread will go on, it is hoped.
template <class A>
void columns(const typename A::X* x, const typename A::Weight* w, float* y, const Shape& s, int64_t o, int64_t n, int64_t next) {
  constexpr int64_t size = sizeof(*w);
  const int64_t height = s.R < kFewRows ? 16 : 64;
  for (int64_t begin = 0; begin < s.I; begin += height) {
    const int64_t end = std::min(begin + height, s.I);
    const bool last = end == s.I;
    Ahead ahead;
    if (!last) ahead = {reinterpret_cast<const char*>(w + end * s.O + o), n * size, s.O * size, std::min(height, s.I - end)};
    else if (next < s.O) ahead = {reinterpret_cast<const char*>(w + next), std::min(n, s.O - next) * size, s.O * size, height};
    blocks_of_rows<kRows>(s.R, [&](auto rows, int64_t r) INLINED {
      const int64_t depth = end - begin;
      Task<A> task{x + r * s.I, w + o, y + r * s.O + o, s, n, begin, end, begin + r * depth / s.R, begin + (r + rows) * depth / s.R};
      columns_block<A, decltype(rows)::value>(task, ahead);
    });
  }
}

// ---- [O, I]

// From task.begin to task.end; `kept` is what sums have come to in between.
template <class A, int Rows, int V>
INLINE void rows_tile(const Task<A>& task, int64_t o, Ahead& ahead, typename A::Sum* kept) {
  const int64_t I = task.s.I, ask = task.ask, asked = task.asked - ask;
  const auto* x = task.x;
  const auto* w = task.w + o * I;
  typename A::Sum sums[Rows][V];
  each<Rows>([&](auto r) INLINED { each<V>([&](auto v) INLINED { sums[r][v] = task.begin ? kept[r * V + v] : A::none(); }); });
  auto step = [&](int64_t i, auto... count) INLINED {
    typename A::Part columns[V];
    each<V>([&](auto v) INLINED { columns[v] = A::weights(w + v * I + i, count...); });
    each<Rows>([&](auto r) INLINED {
      auto row = A::row(x + r * I + i, count...);
      each<V>([&](auto v) INLINED { sums[r][v] = A::add(row, columns[v], sums[r][v]); });
    });
  };
  int64_t i = task.begin;
  for (; i + A::kLanes <= task.end; i += A::kLanes) {
    step(i);
    if (uint64_t(i - ask) < uint64_t(asked)) ahead.template step<V * A::kLanes * sizeof(*w)>();
  }
  if (task.end < I) return each<Rows>([&](auto r) INLINED { each<V>([&](auto v) INLINED { kept[r * V + v] = sums[r][v]; }); });
  if (i < I) step(i, int(I - i));
  A::totals(sums, task.units, task.r, task.o + o, task.y + o, task.s.O);
}

// `deep` numbers of I at a time.
template <class A, int Rows>
__attribute__((noinline)) void rows_block(Task<A> task, int64_t deep, typename A::Sum* kept, Ahead& ahead) {
  constexpr int V = A::kOutputs;
  Ahead local = ahead;
  const int64_t I = task.s.I, whole = task.n / V * V;
  for (int64_t i = 0; i < I; i += deep) {
    task.begin = i, task.end = std::min(I, i + deep);
    for (int64_t o = 0; o < whole; o += V) rows_tile<A, Rows, V>(task, o, local, kept + o * Rows);
  }
  ahead = local;
  task.begin = 0, task.end = I;
  for (int r = 0; r < Rows && whole < task.n; ++r, task.x += I, task.y += task.s.O, ++task.r)
    for (int64_t last = whole; last < task.n; ++last) rows_tile<A, 1, 1>(task, last, local, nullptr);
}

template <class A>
void rows(const typename A::X* x, const typename A::Weight* w, float* y, const Shape& s, int64_t o, int64_t n, int64_t next,
          const Units* units) {
  const int64_t most = std::min<int64_t>(s.R, A::kTall), parts = std::max<int64_t>(1, most * s.I * sizeof(*x) / kNear);
  const int64_t deep = (s.I / parts + A::kLanes) / A::kLanes * A::kLanes;
  std::vector<typename A::Sum> kept(deep < s.I ? n * most : 0);
  // One block of rows is a tile behind what it asks for; several have the time to ask for all that comes next.
  const int64_t size = s.I * sizeof(*w), left = std::min(n, s.O - next) * size;
  auto* here = reinterpret_cast<const char*>(w + o * s.I), *there = reinterpret_cast<const char*>(w + next * s.I);
  Ahead ahead;
  if (s.R > A::kTall || deep < s.I) ahead = {there, left, 0, left > 0};
  else if (n > A::kOutputs) ahead = {here + A::kOutputs * size, (n - A::kOutputs) * size, 0, 1, there, std::min(left, A::kOutputs * size)};
  blocks_of_rows<A::kTall>(s.R, [&](auto rows, int64_t r) INLINED {
    Task<A> task{x + r * s.I, w + o * s.I, y + r * s.O + o, s, n, 0, s.I, r * s.I / s.R, (r + rows) * s.I / s.R, units, r, o};
    rows_block<A, decltype(rows)::value>(task, deep, kept.data(), ahead);
  });
}

// Cuts the outputs, in units of `step`, for the threads; chunk(o, n, next).
template <class Chunk>
void cut(ffi::ThreadPool& pool, int64_t O, int64_t step, int64_t most, const Chunk& chunk) {
  const int64_t threads = std::max<int64_t>(1, pool.num_threads()), units = (O + step - 1) / step;
  most = std::max<int64_t>(1, most);
  const int64_t rounds = (units + threads * most - 1) / (threads * most), parts = std::min(units, threads * rounds);
  auto begin = [&](int64_t part) { return part < parts ? part * units / parts * step : O; };
  parallel(pool, parts, [&](int64_t part) {
    chunk(begin(part), begin(part + 1) - begin(part), begin(part + threads));
  });
}

template <class A>
void multiply(ffi::ThreadPool& pool, const typename A::X* x, ffi::AnyBuffer matrix, float* y, const Shape& s, int64_t axis,
              const Units* units = nullptr) {
  const auto* w = static_cast<const typename A::Weight*>(matrix.untyped_data());
  // Outputs at a time: 1.5 or 12 KB of each row of an [I, O] matrix, 64 KB of whole rows of an [O, I] one.
  if constexpr (A::kWidth > 0)
    if (axis == 0)
      return cut(pool, s.O, A::kWidth, (s.R < kFewRows ? 12288 : 1536) / (A::kWidth * sizeof(*w)), [&](int64_t o, int64_t n, int64_t next) {
        columns<A>(x, w, y, s, o, n, next);
      });
  cut(pool, s.O, A::kOutputs, (s.R > A::kTall ? 131072 : 65536) / (A::kOutputs * s.I * sizeof(*w) + 1), [&](int64_t o, int64_t n, int64_t next) {
    rows<A>(x, w, y, s, o, n, next, units);
  });
}

ffi::Error RoundedProduct(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::AnyBuffer w, ffi::BufferR1<ffi::F32> scales,
                          ffi::ResultBufferR2<ffi::F32> y) {
  const Shape s{x.dimensions()[0], x.dimensions()[1], w.dimensions()[0]};
  std::vector<int8_t> rounded(s.R * s.I);
  std::vector<float> units(s.R);
  std::vector<int32_t> offsets(s.R);
  constexpr int64_t some = 4;
  parallel(pool, (s.R + some - 1) / some, [&](int64_t part) {
    for (int64_t r = part * some; r < std::min(s.R, (part + 1) * some); ++r)
      round_row(x.typed_data() + r * s.I, s.I, rounded.data() + r * s.I, units[r], offsets[r]);
  });
  const Units all{scales.typed_data(), units.data(), offsets.data()};
  multiply<Rounded>(pool, rounded.data(), w, y->typed_data(), s, 1, &all);
  return ffi::Error::Success();
}

ffi::Error Product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::ResultBufferR2<ffi::F32> y, int64_t axis) {
  const Shape s{x.dimensions()[0], x.dimensions()[1], w.dimensions()[1 - axis]};
  if (s.I == 0) std::fill_n(y->typed_data(), s.R * s.O, 0.0f);
  const auto* narrow = x.element_type() == ffi::BF16 ? static_cast<const bf16*>(x.untyped_data()) : nullptr;
#if defined(FLAXMILL_DOTS)
  if (narrow && w.element_type() == ffi::BF16) {
    multiply<Dotted>(pool, narrow, w, y->typed_data(), s, axis);
    return ffi::Error::Success();
  }
#endif
  std::vector<float> wide;
  if (narrow) {
    wide.resize(s.R * s.I);
    std::transform(narrow, narrow + s.R * s.I, wide.begin(), [](bf16 x) { return widen(x); });
  }
  const float* rows = narrow ? wide.data() : static_cast<const float*>(x.untyped_data());
  if (w.element_type() == ffi::F32) multiply<Widened<float>>(pool, rows, w, y->typed_data(), s, axis);
  else if (w.element_type() == ffi::BF16) multiply<Widened<bf16>>(pool, rows, w, y->typed_data(), s, axis);
  else multiply<Widened<int8_t>>(pool, rows, w, y->typed_data(), s, axis);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace flaxmill

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    product, flaxmill::Product,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::AnyBuffer>()
        .Ret<xla::ffi::BufferR2<xla::ffi::F32>>()
        .Attr<int64_t>("axis"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    rounded_product, flaxmill::RoundedProduct,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::BufferR1<xla::ffi::F32>>()
        .Ret<xla::ffi::BufferR2<xla::ffi::F32>>());

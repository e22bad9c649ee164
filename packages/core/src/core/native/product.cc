// The product of some rows and a weight matrix, y_RO = x_RI w, in float32.
//
// The order of a sum is fixed by how the matrix is stored, and by nothing else: not by the number of rows, the tile, the
// thread or what the other rows are.
//   [I, O]  y = fma(x_i, w_i, y) for i = 0, 1, ...: one number after another. Vectors lie along O.
//   [O, I]  lane l of a vector sums the i that are l modulo W, in order; then the lanes are added (`sum`).
// So R, O and I are cut as suits the caches: a sum that is interrupted goes to memory and comes back as it was.
//
// A decoding step reads every weight once, and at few rows its time is that of the memory. So a block of the matrix is
// asked for (`Ahead`) while the one before is multiplied, in the order in which it lies in memory, and nothing is copied.

#include <algorithm>
#include <cstdint>
#include <memory>

#include "simd.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace flaxmill {
namespace {

namespace ffi = xla::ffi;

// A tile is kRows rows by kVectors vectors of sums ([I, O]) or sums of vectors ([O, I]): 24 registers of 32 or 12 of 16
// accumulate; the rest hold a row of the tile.
constexpr int kRows = W == 8 ? 4 : 8;
constexpr int kVectors = 3;
constexpr int64_t kLine = 64;

struct Shape {
  int64_t R, I, O;
};

// Asks for a block of `rows` pieces of `bytes`, `stride` apart, a few cache lines at a step.
struct Ahead {
  const char* at = nullptr;
  int64_t bytes = 0, stride = 0, rows = 0;
  int64_t begun = 0;  // of the piece at `at`

  template <int64_t Lines>
  INLINE void step() {
    if (rows <= 0) return;
    for (int64_t line = 0; line < Lines; ++line) __builtin_prefetch(at + begun + line * kLine, 0, 2);
    begun += Lines * kLine;
    if (begun < bytes) return;
    begun = 0;
    at += stride;
    --rows;
  }
};

// Calls call(Rows, first) for blocks of Rows <= kRows rows, nearly equal; Rows is known to the compiler.
template <int Rows = kRows, class Call>
INLINE void with_rows(int64_t rows, const Call& call) {
  if constexpr (Rows > 0) {
    if (rows == Rows) call(std::integral_constant<int, Rows>());
    else with_rows<Rows - 1>(rows, call);
  }
}

// `count` of the W numbers at p: all, some or none.
template <class Number>
INLINE F load_some(const Number* p, int64_t count) {
  return count >= W ? load(p) : count > 0 ? load(p, int(count)) : zero();
}
INLINE void store_some(float* p, F x, int64_t count) {
  if (count >= W) store(p, x);
  else if (count > 0) store(p, x, int(count));
}

// ---- [I, O]

// Columns o to o + n of rows r to r + Rows, and what of the sum is at hand.
template <class Weight>
struct Columns {
  const float* x;  // [., I]
  const Weight* w; // [., O]
  float* y;        // [., O]
  Shape s;
  int64_t n, begin, end; // columns; the i that are summed now
  int64_t ask_begin, ask_end; // the i at which a step of `ahead` is taken
};

template <int Rows, bool Whole, class Weight>
INLINE void columns_tile(const Columns<Weight>& c, int64_t o, Ahead& ahead) {
  constexpr int64_t lines = kVectors * W * sizeof(Weight) / kLine;
  const int64_t I = c.s.I, O = c.s.O, n = c.n - o, asked = c.ask_end - c.ask_begin;
  const float* x = c.x;
  const Weight* w = c.w + c.begin * O + o;
  float* y = c.y + o;
  F sums[Rows][kVectors];
  auto all = [](auto call) INLINED {
    each<Rows>([&](auto r) INLINED { each<kVectors>([&](auto v) INLINED { call(r, v); }); });
  };
  auto read = [&](auto* p, auto v) INLINED {
    return Whole ? load(p + v * W) : load_some(p + v * W, n - v * W);
  };
  if (c.begin == 0) all([&](auto r, auto v) INLINED { sums[r][v] = zero(); });
  else all([&](auto r, auto v) INLINED { sums[r][v] = read(y + r * O, v); });
  for (int64_t i = c.begin; i < c.end; ++i, w += O) {
    F row[kVectors];
    each<kVectors>([&](auto v) INLINED { row[v] = read(w, v); });
    each<Rows>([&](auto r) INLINED {
      F scale = set(x[r * I + i]);
      each<kVectors>([&](auto v) INLINED { sums[r][v] = fma(scale, row[v], sums[r][v]); });
    });
    if (uint64_t(i - c.ask_begin) < uint64_t(asked)) ahead.template step<(lines > 0 ? lines : 1)>();
  }
  all([&](auto r, auto v) INLINED {
    float* to = y + r * O + v * W;
    Whole ? store(to, sums[r][v]) : store_some(to, sums[r][v], n - v * W);
  });
}

template <int Rows, class Weight>
__attribute__((noinline)) void columns_block(const Columns<Weight>& c, Ahead& ahead) {
  Ahead local = ahead;
  int64_t o = 0;
  for (; o + kVectors * W <= c.n; o += kVectors * W) columns_tile<Rows, true>(c, o, local);
  if (o < c.n) columns_tile<Rows, false>(c, o, local);
  ahead = local;
}

// All of the columns o to o + n; then those from `next` on are this thread's, it is hoped.
template <class Weight>
void columns(const float* x, const Weight* w, float* y, const Shape& s, int64_t o, int64_t n, int64_t next) {
  const int64_t height = s.R < 4 ? 16 : 64, blocks = (s.R + kRows - 1) / kRows;
  for (int64_t i = 0; i < s.I; i += height) {
    const int64_t end = std::min(i + height, s.I);
    const bool last = end == s.I;
    const Weight* from = last ? w + next : w + end * s.O + o;
    const int64_t width = last ? std::min(n, s.O - next) : n;
    Ahead ahead{reinterpret_cast<const char*>(from), width * int64_t(sizeof(Weight)), s.O * int64_t(sizeof(Weight)),
                width > 0 ? std::min(height, last ? s.I : s.I - end) : 0};
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t r = b * s.R / blocks, rows = (b + 1) * s.R / blocks - r;
      Columns<Weight> block{x + r * s.I, w + o, y + r * s.O + o, s, n, i, end,
                            i + b * (end - i) / blocks, i + (b + 1) * (end - i) / blocks};
      with_rows(rows, [&](auto count) { columns_block<decltype(count)::value>(block, ahead); });
    }
  }
}

// ---- [O, I]

template <class Weight>
struct Rows {
  const float* x;  // [., I]
  const Weight* w; // [., I]
  float* y;        // [., O]
  Shape s;
  int64_t n;  // outputs
  int64_t ask_begin, ask_end;
};

template <int R, int V, class Weight>
INLINE void rows_tile(const Rows<Weight>& c, int64_t o, Ahead& ahead) {
  constexpr int64_t lines = V * W * sizeof(Weight) / kLine;
  const int64_t I = c.s.I, asked = c.ask_end - c.ask_begin;
  const float* x = c.x;
  const Weight* w = c.w + o * I;
  F sums[R][V];
  each<R>([&](auto r) INLINED { each<V>([&](auto v) INLINED { sums[r][v] = zero(); }); });
  auto add = [&](int64_t i, auto read) INLINED {
    F columns[V];
    each<V>([&](auto v) INLINED { columns[v] = read(w + v * I + i); });
    each<R>([&](auto r) INLINED {
      F row = read(x + r * I + i);
      keep(row);
      each<V>([&](auto v) INLINED { sums[r][v] = fma(row, columns[v], sums[r][v]); });
    });
  };
  int64_t i = 0;
  for (; i + W <= I; i += W) {
    add(i, [](auto* p) INLINED { return load(p); });
    if (uint64_t(i - c.ask_begin) < uint64_t(asked)) ahead.template step<(lines > 0 ? lines : 1)>();
  }
  if (i < I) add(i, [rest = int(I - i)](auto* p) INLINED { return load(p, rest); });
  float* y = c.y + o;
  each<R>([&](auto r) INLINED { each<V>([&](auto v) INLINED { y[r * c.s.O + v] = sum(sums[r][v]); }); });
}

template <int R, class Weight>
__attribute__((noinline)) void rows_block(const Rows<Weight>& c, Ahead& ahead) {
  Ahead local = ahead;
  int64_t o = 0;
  for (; o + kVectors <= c.n; o += kVectors) rows_tile<R, kVectors>(c, o, local);
  for (; o < c.n; ++o) rows_tile<R, 1>(c, o, local);
  ahead = local;
}

template <class Weight>
void rows(const float* x, const Weight* w, float* y, const Shape& s, int64_t o, int64_t n, int64_t next) {
  const int64_t blocks = (s.R + kRows - 1) / kRows;
  const int64_t bytes = std::min(n, s.O - next) * s.I * int64_t(sizeof(Weight));
  Ahead ahead{reinterpret_cast<const char*>(w + next * s.I), bytes, bytes, bytes > 0};
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t r = b * s.R / blocks, rows = (b + 1) * s.R / blocks - r;
    Rows<Weight> block{x + r * s.I, w + o * s.I, y + r * s.O + o, s, n, b * s.I / blocks, (b + 1) * s.I / blocks};
    with_rows(rows, [&](auto count) { rows_block<decltype(count)::value>(block, ahead); });
  }
}

// ----

template <class Weight>
void run(ffi::ThreadPool& pool, const void* x, const void* w, float* y, const Shape& s, int64_t axis) {
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t step = axis == 0 ? kVectors * W : kVectors;
  const int64_t most = axis == 0 ? 8 : std::max<int64_t>(1, 65536 / (kVectors * s.I * int64_t(sizeof(Weight))));
  const int64_t tiles = (s.O + step - 1) / step;
  const int64_t rounds = (tiles + threads * most - 1) / (threads * most);
  const int64_t parts = std::min(tiles, threads * rounds);
  auto begin = [&](int64_t part) { return std::min(s.O, part * tiles / parts * step); };
  parallel(pool, parts, [&](int64_t part) {
    const int64_t o = begin(part), next = part + threads < parts ? begin(part + threads) : s.O;
    (axis == 0 ? columns<Weight> : rows<Weight>)(static_cast<const float*>(x), static_cast<const Weight*>(w), y, s, o, begin(part + 1) - o, next);
  });
}

ffi::Error Product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w,
                   ffi::Result<ffi::AnyBuffer> y, int64_t axis) {
  Shape s{x.dimensions()[0], x.dimensions()[1], w.dimensions()[1 - axis]};
  (w.element_type() == ffi::BF16 ? run<bf16> : run<float>)(
      pool, x.untyped_data(), w.untyped_data(), static_cast<float*>(y->untyped_data()), s, axis);
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
        .Ret<xla::ffi::AnyBuffer>()
        .Attr<int64_t>("axis"));

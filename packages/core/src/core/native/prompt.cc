// A chunk of a prompt over the cache that it has just been written to: many queries a row, each of which sees all
// positions up to its own.
//
// Per key head, blocks of 64 keys are turned, so that vectors lie along the keys, and meet tiles of queries: scores,
// softmax, which is kept up from block to block (Milakov & Gimelshein 2018, arXiv:1805.02867), and the weighted sum of the
// values. All of it is float32. A key that a query does not see has weight 0: so a query's numbers follow from its
// position and from what lies before it, not from the threads or from other rows. (A value that is no number reaches
// the queries of its chunk that come before it as well.)

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "attention.h"
#include "numeric.h"
#include "simd.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace flaxmill {
namespace {

namespace ffi = xla::ffi;

constexpr int kBlock = 64;                                  // keys
constexpr int kRows = W == 16 ? 6 : 4;                      // queries of a tile
constexpr int kVectors = W == 16 ? 4 : 2;                   // and what they are multiplied by, side by side
constexpr int64_t kWidth = kVectors * W;
constexpr int64_t kTask = 128;                              // queries that share the keys that were turned
constexpr float kNone = -std::numeric_limits<float>::infinity();

// y = y keep + a b for Rows rows of n numbers a; b and y are kWidth wide.
template <int Rows>
INLINE void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t n, const float* keep, float* y,
                     int64_t y_stride) {
  F sums[Rows][kVectors];
  each<Rows>([&](auto r) INLINED { each<kVectors>([&](auto v) INLINED { sums[r][v] = zero(); }); });
  for (int64_t i = 0; i < n; ++i) {
    F columns[kVectors];
    each<kVectors>([&](auto v) INLINED { columns[v] = load(b + i * b_stride + v * W); });
    each<Rows>([&](auto r) INLINED {
      F x = set(a[r * a_stride + i]);
      each<kVectors>([&](auto v) INLINED { sums[r][v] = fma(x, columns[v], sums[r][v]); });
    });
  }
  each<Rows>([&](auto r) INLINED {
    each<kVectors>([&](auto v) INLINED {
      float* at = y + r * y_stride + v * W;
      store(at, keep ? fma(load(at), set(keep[r]), sums[r][v]) : sums[r][v]);
    });
  });
}

// Some queries of one row that share a key head. Of query i, i / G is the token and i % G the head.
template <class Query, class Number>
class Task {
 public:
  Task(const Sizes& sizes, const Query* q_TNH, const Number* k_SH, const Number* v_SH, const float* sinks, int64_t head,
       int64_t position, int64_t count, int64_t begin, int64_t end)
      : sizes_(sizes), k_(k_SH), v_(v_SH), head_(head), position_(position), count_(count), begin_(begin),
        queries_(end - begin), rows_((queries_ + kRows - 1) / kRows * kRows), width_(sizes.padded(kWidth)), q_(rows_ * width_),
        keys_(width_ * kBlock), values_(kBlock * width_), mixed_(rows_ * width_), tops_(rows_, kNone), totals_(rows_, zero()) {
    for (int64_t i = 0; i < queries_; ++i) {
      const Query* from = q_TNH + offset(i);
      for (int64_t h = 0; h < sizes.H; ++h) q_[i * width_ + h] = widen(from[h]) * sizes.scale;
      if (!sinks) continue;
      tops_[i] = sinks[head * sizes.G() + (begin + i) % sizes.G()];  // met already, with weight 1
      totals_[i] = load(kOne);
    }
  }

  void run() {
    const int64_t last = position(queries_ - 1);
    for (int64_t block = 0; block <= last; block += kBlock) {
      const int64_t held = std::min<int64_t>(kBlock, std::min(position_ + count_, sizes_.S) - block);
      take(block, held);
      for (int64_t i = 0; i < queries_; i += kRows) {
        const int64_t seen = std::min(held, position(std::min(i + kRows, queries_) - 1) + 1 - block);
        if (seen > 0) meet(i, block, seen);
      }
    }
  }

  void finish(Query* out_TNH) const {
    for (int64_t i = 0; i < queries_; ++i) {
      const float total = sum(totals_[i]);
      for (int64_t h = 0; h < sizes_.H; ++h) narrow(mixed_[i * width_ + h] / total, out_TNH + offset(i) + h);
    }
  }

 private:
  static constexpr float kOne[W] = {1};

  int64_t position(int64_t i) const { return position_ + (begin_ + i) / sizes_.G(); }
  int64_t offset(int64_t i) const {
    const int64_t G = sizes_.G(), all = begin_ + i;
    return (all / G * sizes_.N + head_ * G + all % G) * sizes_.H;
  }

  // Keys and values of a block, widened; the keys turned, and zeros for those that nobody has written.
  void take(int64_t block, int64_t held) {
    const int64_t H = sizes_.H;
    for (int64_t first = 0; first < kBlock; first += W)
      for (int64_t h = 0; h < H; h += W) {
        F square[W];
        each<W>([&](auto i) INLINED { square[i] = part(k_, block + first + i, h, first + i < held); });
        transpose(square);
        each<W>([&](auto i) INLINED { store(&keys_[(h + i) * kBlock + first], square[i]); });
      }
    for (int64_t i = 0; i < kBlock; ++i)
      for (int64_t h = 0; h < H; h += W) store(&values_[i * width_ + h], part(v_, block + i, h, i < held));
  }
  F part(const Number* from, int64_t slot, int64_t h, bool held) const {
    const Number* at = from + slot * sizes_.H + h;
    const int64_t left = sizes_.H - h;
    return !held ? zero() : left >= W ? load(at) : load(at, int(left));
  }

  // A tile of queries over the first `seen` keys of a block.
  void meet(int64_t first, int64_t block, int64_t seen) {
    alignas(64) float weights[kRows * kBlock], keep[kRows];
    for (int64_t i = 0; i < seen; i += kWidth)
      multiply<kRows>(&q_[first * width_], width_, &keys_[i], kBlock, sizes_.H, nullptr, weights + i, kBlock);
    for (int r = 0; r < kRows; ++r)
      keep[r] = weigh(weights + r * kBlock, first + r < queries_ ? std::min(seen, position(first + r) + 1 - block) : 0, first + r);
    for (int64_t h = 0; h < sizes_.H; h += kWidth)
      multiply<kRows>(weights, kBlock, &values_[h], width_, seen, keep, &mixed_[first * width_ + h], width_);
  }

  // Makes weights of scores, of which a query sees the first `seen`; returns what its sums so far are worth.
  float weigh(float* scores, int64_t seen, int64_t i) {
    for (int64_t key = std::clamp<int64_t>(seen, 0, kBlock); key < kBlock; ++key) scores[key] = kNone;
    F tops = set(tops_[i]);
    each<kBlock / W>([&](auto j) INLINED { tops = max(load(scores + j * W), tops); });
    const float top = highest(tops);
    const F keep = exponential(set(tops_[i] - top));
    F total = mul(totals_[i], keep);
    each<kBlock / W>([&](auto j) INLINED {
      F weight = exponential(sub(load(scores + j * W), set(top)));
      store(scores + j * W, weight);
      total = add(total, weight);
    });
    tops_[i] = top, totals_[i] = total;
    float lanes[W];
    store(lanes, keep);
    return lanes[0];
  }

  const Sizes& sizes_;
  const Number *k_, *v_;
  int64_t head_, position_, count_, begin_, queries_, rows_, width_;
  std::vector<float> q_, keys_, values_, mixed_, tops_;
  std::vector<F> totals_;
};

template <class Query, class Number>
void run(ffi::ThreadPool& pool, const Sizes& sizes, const Arrays<Query, Number>& arrays) {
  const int64_t T = sizes.T, N = sizes.N, H = sizes.H, K = sizes.K, G = sizes.G(), tasks = (T * G + kTask - 1) / kTask;
  parallel(pool, sizes.B * K * tasks, [&](int64_t i) {
    const int64_t b = i / (K * tasks), head = i / tasks % K, begin = i % tasks * kTask;
    const int64_t count = arrays.count(sizes, b), end = std::min(begin + kTask, count * G), at = (b * K + head) * sizes.S * H;
    Query* out = arrays.out + b * T * N * H;
    if (begin < end) {
      Task<Query, Number> task(sizes, arrays.q + b * T * N * H, arrays.k + at, arrays.v + at, arrays.sinks, head,
                               arrays.positions[b], count, begin, end);
      task.run();
      task.finish(out);
    }
    if (begin == 0)
      for (int64_t t = count; t < T; ++t) std::fill_n(out + (t * N + head * G) * H, G * H, Query{});
  });
}

ffi::Error AttendPrompt(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                        ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::S32> first_row,
                        ffi::Buffer<ffi::F32> sinks, ffi::Result<ffi::AnyBuffer> out, float scale) {
  return with_arrays(q, k, v, positions, lengths, first_row, sinks, out, scale, 0,
                     [&](const Sizes& sizes, const auto& arrays) { run(pool, sizes, arrays); });
}

}  // namespace
}  // namespace flaxmill

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    attend_prompt, flaxmill::AttendPrompt,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
        .Ret<xla::ffi::AnyBuffer>()
        .Attr<float>("scale"));

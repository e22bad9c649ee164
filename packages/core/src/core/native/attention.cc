// A few queries a row over a cache of keys and values, of which only the positions that they see are read.
//
// Scores and softmax are float32. A query goes through its positions in blocks that are the same for every query, with
// the softmax kept up from block to block (Milakov & Gimelshein 2018, arXiv:1805.02867), and keys that it does not see
// take no part: so its numbers are the same whatever else is computed, and whoever computes it. Long contexts are cut
// into splits of fixed positions, for several threads to work on one row; what they find is joined in order.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "numeric.h"
#include "simd.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace flaxmill {
namespace {

namespace ffi = xla::ffi;

constexpr int kBlock = 64;            // positions between two looks at the highest score
constexpr int64_t kSplit = 2048;      // positions of one task; whole blocks
constexpr float kNone = -std::numeric_limits<float>::infinity();

// What one query has gathered: `total` and `values` are in units of e^highest.
struct Gathered {
  float highest = kNone;
  F total = zero();
};

template <class Number>
INLINE F load_to(const Number* p, int64_t left) { return left >= W ? load(p) : load(p, int(left)); }

// The scores of the n <= W keys that `keys` points at; lanes from n on are not to be used.
template <class Number>
INLINE F scores(const float* q, const Number* const* keys, int n, int64_t H, float scale) {
  F products[W];
  each<W>([&](auto i) INLINED { products[i] = zero(); });
  if (n == W && H % W == 0) {
    for (int64_t h = 0; h < H; h += W) {
      F x = load(q + h);
      each<W>([&](auto i) INLINED { products[i] = fma(x, load(keys[i] + h), products[i]); });
    }
  } else {
    for (int i = 0; i < n; ++i)
      for (int64_t h = 0; h < H; h += W) products[i] = fma(load(q + h), load_to(keys[i] + h, H - h), products[i]);
  }
  return mul(sums(products), set(scale));
}

// values = values keep + the weighted sum of V vectors' width of rows `from` to `to`, even and odd ones apart.
template <int V, class Number>
INLINE void mix(const float* weights, const Number* const* rows, int from, int to, int64_t h, int64_t H, F keep,
                float* values) {
  F even[V], odd[V];
  each<V>([&](auto j) INLINED { even[j] = odd[j] = zero(); });
  auto add_row = [&](int i, F(&to)[V]) INLINED {
    F weight = set(weights[i]);
    each<V>([&](auto j) INLINED {
      const Number* at = rows[i] + h + j * W;
      to[j] = fma(weight, V > 1 ? load(at) : load_to(at, H - h), to[j]);
    });
  };
  int i = from;
  if (i & 1) add_row(i++, odd);
  for (; i + 2 <= to; i += 2) {
    add_row(i, even);
    add_row(i + 1, odd);
  }
  if (i < to) add_row(i, even);
  each<V>([&](auto j) INLINED {
    float* at = values + h + j * W;
    store(at, fma(load(at), keep, add(even[j], odd[j])));
  });
}

// One query over the positions `from` to `to` of a block.
template <class Number>
void take_block(const float* q, const Number* const* keys, const Number* const* rows, int from, int to,
                const Sizes& sizes, Gathered& gathered, float* values) {
  float weights[kBlock];
  F tops = set(gathered.highest);
  for (int first = 0; first < kBlock; first += W) {
    int begin = std::max(from, first), end = std::min(to, first + W);
    F found = set(kNone);
    if (end - begin == W) {
      found = scores(q, keys + begin, W, sizes.H, sizes.scale);
    } else if (begin < end) {
      float lanes[W];
      store(lanes, found);
      store(lanes + begin - first, scores(q, keys + begin, end - begin, sizes.H, sizes.scale), end - begin);
      found = load(lanes);
    }
    tops = max(found, tops);
    store(weights + first, found);
  }
  float top = highest(tops);
  F keep = exponential(set(gathered.highest - top));
  F total = mul(gathered.total, keep);
  for (int first = 0; first < kBlock; first += W) {
    F weight = exponential(sub(load(weights + first), set(top)));
    store(weights + first, weight);
    total = add(total, weight);
  }
  gathered = {top, total};
  int64_t h = 0, H = sizes.H;
  for (; h + 4 * W <= H; h += 4 * W) mix<4>(weights, rows, from, to, h, H, keep, values);
  for (; h < H; h += W) mix<1>(weights, rows, from, to, h, H, keep, values);
}

// Asks for a row of H numbers.
template <class Number>
INLINE void ask(const Number* row, int64_t H) {
  for (int64_t h = 0; h < H; h += 64 / int64_t(sizeof(Number))) __builtin_prefetch(row + h, 0, 2);
}

// The queries of one row that share a key head, over the positions of one split. Meanwhile it asks for what lies `ahead`
// numbers further on: the same positions of who is next, it is hoped.
template <class Query, class Number>
class Task {
 public:
  Task(const Sizes& sizes, const Query* q_TNH, const Number* k_SH, const Number* v_SH, int64_t head, int64_t position,
       int64_t count, int64_t ahead)
      : sizes_(sizes), k_(k_SH), v_(v_SH), ahead_(ahead), position_(position), count_(count), queries_(count * sizes.G()),
        q_(queries_ * sizes.padded(W)), gathered(queries_), values(queries_ * sizes.padded(W)) {
    int64_t G = sizes.G(), N = sizes.N, H = sizes.H;
    for (int64_t t = 0; t < count; ++t)
      for (int64_t g = 0; g < G; ++g)
        for (int64_t h = 0; h < H; ++h)
          q_[(t * G + g) * sizes.padded(W) + h] = widen(q_TNH[(t * N + head * G + g) * H + h]);
  }

  void run(int64_t begin, int64_t end) {
    begin = std::max(begin, sizes_.low(position_)), end = std::min(end, position_ + count_);
    for (int64_t block = begin / kBlock * kBlock; block < end; block += kBlock)
      take(block, int(std::max(begin - block, int64_t(0))), int(std::min<int64_t>(end - block, kBlock)));
  }

 private:
  // Every query over its own part of positions block + from to block + to.
  void take(int64_t block, int from, int to) {
    const Number *keys[kBlock], *rows[kBlock];
    int64_t slot = (block + from) % sizes_.S;
    for (int i = from; i < to; ++i) {
      keys[i] = k_ + slot * sizes_.H, rows[i] = v_ + slot * sizes_.H;
      if (ahead_) ask(keys[i] + ahead_, sizes_.H), ask(rows[i] + ahead_, sizes_.H);
      slot = slot + 1 == sizes_.S ? 0 : slot + 1;
    }
    if constexpr (!std::is_same_v<Number, float>) {
      if (queries_ > 1) {  // widened once for all
        const float *wide_keys[kBlock], *wide_rows[kBlock];
        wide_.resize(2 * kBlock * sizes_.padded(W));
        for (int i = from; i < to; ++i) {
          wide_keys[i] = widened(keys[i], wide_.data() + i * sizes_.padded(W));
          wide_rows[i] = widened(rows[i], wide_.data() + (kBlock + i) * sizes_.padded(W));
        }
        take(wide_keys, wide_rows, block, from, to);
        return;
      }
    }
    take(keys, rows, block, from, to);
  }

  template <class Wide>
  void take(const Wide* const* keys, const Wide* const* rows, int64_t block, int from, int to) {
    int64_t G = sizes_.G();
    for (int64_t i = 0; i < queries_; ++i) {
      int64_t position = position_ + i / G;
      int first = std::max<int64_t>(from, sizes_.low(position) - block), last = std::min<int64_t>(to, position + 1 - block);
      if (first >= last) continue;
      int64_t at = i * sizes_.padded(W);
      take_block(&q_[at], keys, rows, first, last, sizes_, gathered[i], &values[at]);
    }
  }

  const float* widened(const Number* from, float* to) {
    for (int64_t h = 0; h < sizes_.H; h += W) store(to + h, load_to(from + h, sizes_.H - h));
    return to;
  }

  const Sizes& sizes_;
  const Number *k_, *v_;
  int64_t ahead_, position_, count_, queries_;
  std::vector<float> q_, wide_;

 public:
  std::vector<Gathered> gathered;
  std::vector<float> values;
};

// Joins what a query has gathered in its splits, in order, and lets the sink take its share.
template <class Query>
void finish(const Gathered* const* gathered, const float* const* values, int64_t splits, const float* sink,
            const Sizes& sizes, Query* out) {
  float top = sink ? *sink : kNone;
  for (int64_t s = 0; s < splits; ++s) top = std::max(top, gathered[s]->highest);
  auto share = [&](float highest) { return exponential(set(highest - top)); };
  float total = sink ? sum(share(*sink)) / W : 0.0f;
  for (int64_t s = 0; s < splits; ++s) total += sum(mul(gathered[s]->total, share(gathered[s]->highest)));
  for (int64_t h = 0; h < sizes.H; h += W) {
    F joined = zero();
    for (int64_t s = 0; s < splits; ++s) joined = fma(load(values[s] + h), share(gathered[s]->highest), joined);
    float lanes[W];
    store(lanes, div(joined, set(total)));
    for (int64_t i = 0; i < std::min<int64_t>(W, sizes.H - h); ++i) narrow(lanes[i], out + h + i);
  }
}

template <class Query, class Number>
void run(ffi::ThreadPool& pool, const Sizes& sizes, const Arrays<Query, Number>& arrays) {
  struct Part {
    int64_t b, head, split, splits;
  };
  std::vector<Part> parts;
  int64_t T = sizes.T, N = sizes.N, K = sizes.K, H = sizes.H, G = sizes.G();
  for (int64_t b = 0; b < sizes.B; ++b) {
    int64_t count = arrays.count(sizes, b);
    std::fill_n(arrays.out + (b * T + count) * N * H, (T - count) * N * H, Query{});
    if (!count) continue;
    int64_t position = arrays.positions[b];
    int64_t first = sizes.low(position) / kSplit, last = (position + count - 1) / kSplit;
    for (int64_t head = 0; head < K; ++head)
      for (int64_t split = first; split <= last; ++split) parts.push_back({b, head, split, last - first + 1});
  }
  std::vector<std::unique_ptr<Task<Query, Number>>> tasks(parts.size());
  auto end_row = [&](int64_t first) {
    auto [b, head, split, splits] = parts[first];
    std::vector<const Gathered*> gathered(splits);
    std::vector<const float*> values(splits);
    for (int64_t i = 0; i < int64_t(tasks[first]->gathered.size()); ++i) {
      int64_t n = head * G + i % G;
      for (int64_t s = 0; s < splits; ++s) {
        gathered[s] = &tasks[first + s]->gathered[i];
        values[s] = &tasks[first + s]->values[i * sizes.padded(W)];
      }
      finish(gathered.data(), values.data(), splits, arrays.sinks ? arrays.sinks + n : nullptr, sizes,
             arrays.out + ((b * T + i / G) * N + n) * H);
    }
    for (int64_t s = 0; s < splits; ++s) tasks[first + s].reset();
  };
  auto place = [&](int64_t i) { return (parts[i].b * K + parts[i].head) * sizes.S * H; };
  parallel(pool, parts.size(), [&](int64_t i) {
    auto [b, head, split, splits] = parts[i];
    int64_t at = place(i), next = i + pool.num_threads(), ahead = next < int64_t(parts.size()) ? place(next) - at : 0;
    tasks[i] = std::make_unique<Task<Query, Number>>(sizes, arrays.q + b * T * N * H, arrays.k + at, arrays.v + at, head,
                                                     arrays.positions[b], arrays.count(sizes, b), ahead);
    tasks[i]->run(split * kSplit, (split + 1) * kSplit);
    if (splits == 1) end_row(i);
  });
  WithoutSubnormals scope;
  for (int64_t i = 0; i < int64_t(parts.size()); i += parts[i].splits)
    if (parts[i].splits > 1) end_row(i);
}

ffi::Error AttendCache(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                       ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::S32> first_row,
                       ffi::Buffer<ffi::F32> sinks, ffi::Result<ffi::AnyBuffer> out, float scale, int64_t window) {
  return with_arrays(q, k, v, positions, lengths, first_row, sinks, out, scale, window,
                     [&](const Sizes& sizes, const auto& arrays) { run(pool, sizes, arrays); });
}

}  // namespace
}  // namespace flaxmill

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    attend_cache, flaxmill::AttendCache,
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
        .Attr<float>("scale")
        .Attr<int64_t>("window"));

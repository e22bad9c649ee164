// What the two kernels of attention have in common: how XLA hands them queries, a cache and who sees what.

#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace flaxmill {

// Queries [B, T, N, H] and what of each row is there: from which position on, how many. A cache is [., K, S, H].
struct Sizes {
  int64_t B, T, N, H, K, S;
  float scale;
  int64_t window = 0;  // 0: a query sees all before it
  int64_t G() const { return N / K; }
  int64_t padded(int64_t width) const { return (H + width - 1) / width * width; }
  int64_t low(int64_t position) const { return window ? std::max<int64_t>(0, position - window + 1) : 0; }
};

template <class Query, class Number>
struct Arrays {
  const Query* q;
  const Number *k, *v;  // from the row of the first queries on
  const int32_t *positions, *lengths;
  const float* sinks;  // none: null
  Query* out;

  int64_t count(const Sizes& sizes, int64_t b) const { return std::clamp<int64_t>(lengths[b], 0, sizes.T); }
};

// Calls run(sizes, arrays), with types that fit: a number of the cache is float or bf16, whose bits may come as uint16.
template <class Run>
xla::ffi::Error with_arrays(xla::ffi::AnyBuffer q, xla::ffi::AnyBuffer k, xla::ffi::AnyBuffer v,
                            xla::ffi::Buffer<xla::ffi::S32> positions, xla::ffi::Buffer<xla::ffi::S32> lengths,
                            xla::ffi::Buffer<xla::ffi::S32> first_row, xla::ffi::Buffer<xla::ffi::F32> sinks,
                            xla::ffi::Result<xla::ffi::AnyBuffer> out, float scale, int64_t window, const Run& run) {
  const auto of = q.dimensions(), cache = k.dimensions();
  const Sizes sizes{of[0], of[1], of[2], of[3], cache[1], cache[2], scale, window};
  const int64_t row = std::clamp<int64_t>(first_row.typed_data()[0], 0, std::max<int64_t>(0, cache[0] - of[0])) * sizes.K * sizes.S * sizes.H;
  auto call = [&](auto query, auto number) {
    using Query = decltype(query);
    using Number = decltype(number);
    run(sizes, Arrays<Query, Number>{static_cast<const Query*>(q.untyped_data()), static_cast<const Number*>(k.untyped_data()) + row,
                                     static_cast<const Number*>(v.untyped_data()) + row, positions.typed_data(), lengths.typed_data(),
                                     sinks.element_count() ? sinks.typed_data() : nullptr, static_cast<Query*>(out->untyped_data())});
  };
  const bool narrow_q = q.element_type() == xla::ffi::BF16, narrow_k = k.element_type() != xla::ffi::F32;
  if (narrow_q) narrow_k ? call(bf16{}, bf16{}) : call(bf16{}, float{});
  else narrow_k ? call(float{}, bf16{}) : call(float{}, float{});
  return xla::ffi::Error::Success();
}

}  // namespace flaxmill

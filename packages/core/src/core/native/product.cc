// The product of a few rows and a weight matrix, y_RO = x_RI w, in float32.

#include <algorithm>
#include <cstdint>

#include "simd.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace flaxmill {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kPanel = 64;

// Columns o to o + n of y, of a matrix stored [I, O].
template <class X, class Weight>
void ByColumns(const X* x, const Weight* w, float* y, int64_t R, int64_t I, int64_t O, int64_t o, int64_t n) {
  for (int64_t r = 0; r < R; ++r) {
    std::fill_n(y + r * O + o, n, 0.0f);
    for (int64_t i = 0; i < I; ++i) {
      F scale = set(widen(x[r * I + i]));
      for (int64_t c = 0; c < n; c += W) {
        float* to = y + r * O + o + c;
        const Weight* from = w + i * O + o + c;
        if (n - c >= W) store(to, fma(scale, load(from), load(to)));
        else store(to, fma(scale, load(from, int(n - c)), load(to, int(n - c))), int(n - c));
      }
    }
  }
}

// The same, of a matrix stored [O, I].
template <class X, class Weight>
void ByRows(const X* x, const Weight* w, float* y, int64_t R, int64_t I, int64_t O, int64_t o, int64_t n) {
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t c = o; c < o + n; ++c) {
      F total = zero();
      int64_t i = 0;
      for (; i + W <= I; i += W) total = fma(load(x + r * I + i), load(w + c * I + i), total);
      if (i < I) total = fma(load(x + r * I + i, int(I - i)), load(w + c * I + i, int(I - i)), total);
      y[r * O + c] = sum(total);
    }
  }
}

template <class X, class Weight>
void Run(ffi::ThreadPool& pool, ffi::AnyBuffer x, ffi::AnyBuffer w, float* y, int64_t axis) {
  int64_t R = x.dimensions()[0], I = x.dimensions()[1], O = w.dimensions()[1 - axis];
  const X* rows = static_cast<const X*>(x.untyped_data());
  const Weight* matrix = static_cast<const Weight*>(w.untyped_data());
  parallel(pool, (O + kPanel - 1) / kPanel, [&](int64_t panel) {
    int64_t o = panel * kPanel, n = std::min(kPanel, O - o);
    if (axis == 0) ByColumns(rows, matrix, y, R, I, O, o, n);
    else ByRows(rows, matrix, y, R, I, O, o, n);
  });
}

ffi::Error Product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w,
                   ffi::Result<ffi::AnyBuffer> y, int64_t axis) {
  bool narrow_x = x.element_type() == ffi::BF16, narrow_w = w.element_type() == ffi::BF16;
  auto run = narrow_x ? narrow_w ? Run<bf16, bf16> : Run<bf16, float>
                      : narrow_w ? Run<float, bf16> : Run<float, float>;
  run(pool, x, w, static_cast<float*>(y->untyped_data()), axis);
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

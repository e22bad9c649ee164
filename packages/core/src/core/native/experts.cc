// A mixture of experts for rows that have chosen theirs: y_RD = the weighted sum over each row's C experts of
// down(swiglu(gate_up(x))).
//
// Pairs of a row and an expert are grouped by expert, so that rows of one expert share one reading of its weights. An
// MXFP4 kernel is read as stored, and never written out: a vector of W words holds 8 W codes, of W/4 blocks; each nibble
// in turn, shifted to the front, picks its number out of a table in a register, is multiplied with the input and added
// up; what the blocks give is multiplied by their powers of two, which is exact. The input lies in the order of the
// nibbles for that. An output is one sum in one order, whoever its neighbours are.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "numeric.h"
#include "simd.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace flaxmill {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kChunk = 8 * W;      // numbers of the contracted axis that one vector of words holds
constexpr int kBlocks = W / 4;         // and blocks
constexpr int64_t kPackedTile = 64;    // outputs of one task
constexpr int64_t kDenseTile = 512;
#if defined(__AVX512F__) && !defined(FLAXMILL_PLAIN)
constexpr int kRows = 8;               // rows that meet a decoded vector while it is in a register
#else
constexpr int kRows = 4;
#endif
constexpr int kFew = 4;                // of so many, whole outputs one after another: the weights come from memory in order
constexpr int64_t kSpan = 8;           // chunks of more rows, which stay in the first cache
constexpr int64_t kAhead = 8192;       // bytes; without asking for them, they come at a third of the speed (docs/log.md)

alignas(64) constexpr float kNumbers[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};

// `code<J>` gives the number of nibble J of each word; `powers`, each block's power of two, of the bytes of all, the first
// the lowest.
#if defined(__AVX512F__) && !defined(FLAXMILL_PLAIN)
using Words = __m512i;
INLINE Words words(const uint8_t* p) { return _mm512_loadu_si512(p); }
INLINE Words words(const uint8_t* p, int64_t count) { return _mm512_maskz_loadu_epi32(first(int(count)), p); }
template <int J>
INLINE F code(Words x) { return _mm512_permutexvar_ps(_mm512_srli_epi32(x, 4 * J), _mm512_load_ps(kNumbers)); }
INLINE F powers(uint32_t bytes) {
  // Byte b, to the top of the words of block b.
  const __m512i spread = _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_setr_m128i(_mm_set1_epi32(0x00FFFFFF), _mm_set1_epi32(0x01FFFFFF))),
      _mm256_setr_m128i(_mm_set1_epi32(0x02FFFFFF), _mm_set1_epi32(0x03FFFFFF)), 1);
  return _mm512_castsi512_ps(_mm512_srli_epi32(_mm512_shuffle_epi8(_mm512_set1_epi32(bytes), spread), 1));
}
#elif defined(__AVX2__) && !defined(FLAXMILL_PLAIN)
using Words = __m256i;
INLINE Words words(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
INLINE Words words(const uint8_t* p, int64_t count) {
  return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), first(int(count)));
}
template <int J>
INLINE F code(Words x) {  // three bits choose the magnitude, the fourth is the sign
  F magnitude = _mm256_permutevar8x32_ps(_mm256_load_ps(kNumbers), _mm256_srli_epi32(x, 4 * J));
  __m256i sign = _mm256_and_si256(_mm256_slli_epi32(x, 28 - 4 * J), _mm256_set1_epi32(int(0x80000000u)));
  return _mm256_xor_ps(magnitude, _mm256_castsi256_ps(sign));
}
INLINE F powers(uint32_t bytes) {
  __m256i both = _mm256_setr_m128i(_mm_set1_epi32(bytes & 255), _mm_set1_epi32(bytes >> 8));
  return _mm256_castsi256_ps(_mm256_slli_epi32(both, 23));
}
#else
using Words = I;
INLINE Words words(const uint8_t* p) {
  Words x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
INLINE Words words(const uint8_t* p, int64_t) { return words(p); }  // a vector is one block
template <int J>
INLINE F code(Words x) {
  return F{kNumbers[x[0] >> 4 * J & 15], kNumbers[x[1] >> 4 * J & 15], kNumbers[x[2] >> 4 * J & 15],
           kNumbers[x[3] >> 4 * J & 15]};
}
INLINE F powers(uint32_t bytes) {
  return (F)(U{bytes, bytes, bytes, bytes} << 23);
}
#endif

// How a vector of words meets its 8 W numbers of a row: a step takes one nibble of each word, or of each half word.
struct Singles {  // rows of float32
  using Number = float;
  static constexpr int kSteps = 8;
  static int64_t place(int64_t i) { return i % 8 * W + i / 8; }  // of number i of the 8 W
  template <int J>
  static INLINE F weights(Words x) { return code<J>(x); }
  static INLINE F times(F weights, const float* numbers) { return mul(weights, load(numbers)); }
  static INLINE F times(F weights, const float* numbers, F sum) { return fma(weights, load(numbers), sum); }
};

#if defined(__AVX512BF16__) && !defined(FLAXMILL_PLAIN)
alignas(64) constexpr uint16_t kNarrow[32] = {  // the numbers as bfloat16, twice: the index has five bits
    0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0, 0x8000, 0xBF00, 0xBF80,
    0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0, 0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040,
    0x4080, 0x40C0, 0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0};

struct Pairs {  // rows of bfloat16, of which two at a time are multiplied, exactly, and added up in float32
  using Number = bf16;
  static constexpr int kSteps = 4;
  static int64_t place(int64_t i) { return i % 4 * 2 * W + i / 4; }
  template <int J>
  static INLINE __m512bh weights(Words x) {
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(x, 4 * J), _mm512_load_si512(kNarrow));
  }
  static INLINE F times(__m512bh weights, const bf16* numbers, F sum = zero()) {
    return _mm512_dpbf16_ps(sum, weights, (__m512bh)_mm512_loadu_si512(numbers));
  }
};
#else
using Pairs = Singles;
#endif

// Powers for which the product with a code may be no normal number, and is then rounded as decoded weights are.
INLINE bool is_extreme(uint8_t scale) { return uint8_t(scale - 2) > 250; }

INLINE bool has_extreme(const uint8_t* scales, int64_t count) {
  constexpr int kStep = 64;  // of a number that is known, so that they are looked at in vectors
  uint8_t found = 0;
  for (; count >= kStep; count -= kStep, scales += kStep) {
    uint8_t each[kStep];
    for (int i = 0; i < kStep; ++i) each[i] = is_extreme(scales[i]);
    for (int i = 0; i < kStep; ++i) found |= each[i];
  }
  for (int64_t i = 0; i < count; ++i) found |= is_extreme(scales[i]);
  return found;
}

INLINE float power(uint32_t biased) {
  float x;
  biased <<= 23;
  std::memcpy(&x, &biased, 4);
  return x;
}

// W/4 bytes as a number, the first the lowest.
INLINE uint32_t bytes_of(const uint8_t* p) {
  uint32_t bytes = 0;
  each<kBlocks>([&](auto i) INLINED { bytes |= uint32_t(p[i]) << 8 * i; });
  return bytes;
}

INLINE uint32_t bytes_of(const uint8_t* p, int64_t count) {
  uint8_t whole[kBlocks] = {};
  for (int64_t i = 0; i < count; ++i) whole[i] = p[i];
  return bytes_of(whole);
}

// sums[o][r] += what output o's words, of W/4 blocks, give with those numbers of row r.
template <class By, int R, int O>
INLINE void accumulate(const Words (&packed)[O], const uint32_t (&scales)[O], const typename By::Number* const (&x)[R],
                       F (&sums)[O][R]) {
  F part[O][R];
  each<By::kSteps>([&](auto step) INLINED {
    each<O>([&](auto o) INLINED {
      auto weights = By::template weights<step>(packed[o]);
      each<R>([&](auto r) INLINED {
        const auto* numbers = x[r] + step * (8 / By::kSteps) * W;
        part[o][r] = step ? By::times(weights, numbers, part[o][r]) : By::times(weights, numbers);
      });
    });
  });
  each<O>([&](auto o) INLINED {
    F power = powers(scales[o]);
    each<R>([&](auto r) INLINED { sums[o][r] = fma(part[o][r], power, sums[o][r]); });
  });
}

// The same for the words `from` to `to` of O consecutive outputs' Q blocks; the last of them may be short.
template <class By, int R, int O>
INLINE void accumulate(const uint8_t* blocks, const uint8_t* scales, const typename By::Number* const* rows, int64_t Q,
                       int64_t from, int64_t to, F (&sums)[O][R]) {
  Words packed[O];
  uint32_t bytes[O];
  const typename By::Number* x[R];
  each<R>([&](auto r) INLINED { x[r] = rows[r] + from * kChunk; });
  const uint8_t *block = blocks + from * kBlocks * 16, *scale = scales + from * kBlocks;
  int64_t ahead = R > kFew ? W * Q * 16 : kAhead;  // many rows come by here again and again, for each of W outputs
  for (int64_t i = from; i < std::min(to, Q / kBlocks); ++i, block += kBlocks * 16, scale += kBlocks) {
    each<O>([&](auto o) INLINED {
      packed[o] = words(block + o * Q * 16), bytes[o] = bytes_of(scale + o * Q);
      __builtin_prefetch(block + o * Q * 16 + ahead);
    });
    if (i % 4 == 0) __builtin_prefetch(scale + ahead / 16);
    accumulate<By>(packed, bytes, x, sums);
    each<R>([&](auto r) INLINED { x[r] += kChunk; });
  }
  if (to <= Q / kBlocks) return;
  int64_t left = Q % kBlocks;
  each<O>([&](auto o) INLINED {
    packed[o] = words(block + o * Q * 16, 4 * left), bytes[o] = bytes_of(scale + o * Q, left);
  });
  accumulate<By>(packed, bytes, x, sums);
}

// y[r][0..n) = outputs `first` to first + n of R rows, n <= W.
template <class By, int R>
void packed_outputs(const uint8_t* blocks, const uint8_t* scales, int64_t Q, const typename By::Number* const* rows,
                    int64_t first, int n, float* const* y) {
  F totals[R][W];
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < W; ++o) totals[r][o] = zero();
  int64_t chunks = (Q + kBlocks - 1) / kBlocks, span = R > kFew ? kSpan : chunks;
  for (int64_t from = 0; from < chunks; from += span) {
    auto take = [&](int o, auto outputs) {
      constexpr int O = decltype(outputs)::value;
      F some[O][R];
      each<R>([&](auto r) INLINED { each<O>([&](auto i) INLINED { some[i][r] = totals[r][o + i]; }); });
      accumulate<By>(blocks + (first + o) * Q * 16, scales + (first + o) * Q, rows, Q, from, std::min(from + span, chunks), some);
      each<R>([&](auto r) INLINED { each<O>([&](auto i) INLINED { totals[r][o + i] = some[i][r]; }); });
    };
    int o = 0;
    if constexpr (R > kFew)
      for (; o + 2 <= n; o += 2) take(o, std::integral_constant<int, 2>());
    for (; o < n; ++o) take(o, std::integral_constant<int, 1>());
  }
  for (int r = 0; r < R; ++r) {
    F y_W = sums(totals[r]);
    if (n == W) store(y[r], y_W);
    else store(y[r], y_W, n);
  }
}

// y[r][0..n) = outputs o to o + n of R rows, for a kernel [I, O]: each output is the sum in the order of I.
template <class Number>
void dense_outputs(const Number* w, int64_t I, int64_t O, const float* const* rows, int64_t R, int64_t o, int64_t n,
                   float* const* y) {
  constexpr int kSteps = 8;
  for (int64_t r = 0; r < R; ++r) std::fill_n(y[r], n, 0.0f);
  auto take = [&](int64_t i, auto steps) {
    constexpr int S = decltype(steps)::value;
    for (int64_t c = 0; c < n; c += W) {
      int count = int(std::min<int64_t>(W, n - c));
      F weight[S];
      each<S>([&](auto s) INLINED {
        const Number* at = w + (i + s) * O + o + c;
        weight[s] = count == W ? load(at) : load(at, count);
      });
      for (int64_t r = 0; r < R; ++r) {
        F total = load(y[r] + c);  // y has room for whole vectors
        each<S>([&](auto s) INLINED { total = fma(weight[s], set(rows[r][i + s]), total); });
        store(y[r] + c, total);
      }
    }
  };
  int64_t i = 0;
  for (; i + kSteps <= I; i += kSteps) take(i, std::integral_constant<int, kSteps>());
  for (; i < I; ++i) take(i, std::integral_constant<int, 1>());
}

// The same of a packed kernel, for scales that decoded weights may not be normal numbers with: each weight is decoded,
// as core.quant.MXFP4.decode does, and the products are summed up one by one.
template <class By>
void decoded_outputs(const uint8_t* blocks, const uint8_t* scales, int64_t Q, const typename By::Number* const* rows,
                     int64_t R, int64_t o, int64_t n, float* const* y) {
  for (int64_t c = 0; c < n; ++c) {
    for (int64_t r = 0; r < R; ++r) y[r][c] = 0;
    for (int64_t i = 0; i < 32 * Q; ++i) {
      int64_t at = (o + c) * Q + i / 32;
      int scale = scales[at], half = scale / 2;  // in two steps, because the smallest power is itself no normal number
      float weight = kNumbers[blocks[at * 16 + i % 32 / 2] >> 4 * (i % 2) & 15] * power(half + 64) * power(scale - half + 63);
      for (int64_t r = 0; r < R; ++r) y[r][c] += weight * widen(rows[r][i / kChunk * kChunk + By::place(i % kChunk)]);
    }
  }
}

// The same of a packed kernel.
template <class By>
void packed_tile(const uint8_t* blocks, const uint8_t* scales, int64_t Q, const typename By::Number* const* rows, int64_t R,
                 int64_t o, int64_t n, float* const* y) {
  if (has_extreme(scales + o * Q, n * Q)) return decoded_outputs<By>(blocks, scales, Q, rows, R, o, n, y);
  auto of = [&](auto rows_at_once) {
    constexpr int N = decltype(rows_at_once)::value;
    for (; R >= N; R -= N, rows += N, y += N) {
      for (int64_t c = 0; c < n; c += W) {
        float* to[N];
        for (int r = 0; r < N; ++r) to[r] = y[r] + c;
        packed_outputs<By, N>(blocks, scales, Q, rows, o + c, int(std::min<int64_t>(W, n - c)), to);
      }
    }
  };
  of(std::integral_constant<int, kRows>());
  if constexpr (kRows > 4) of(std::integral_constant<int, 4>());
  of(std::integral_constant<int, 3>());
  of(std::integral_constant<int, 2>());
  of(std::integral_constant<int, 1>());
}

// E matrices, each of [I, O] numbers, or of blocks [O, I / 32, 16] and their scales [O, I / 32].
struct Kernels {
  const void* numbers;
  const uint8_t* scales;  // null where nothing is packed
  bool narrow;            // the numbers are bfloat16, else float32
  bool pairs;             // the input's are, in packed kernels
  int64_t I, O;

  int64_t tile() const { return scales ? kPackedTile : kDenseTile; }
  int64_t tiles() const { return (O + tile() - 1) / tile(); }
  int64_t stride() const { return (I + kChunk - 1) / kChunk * kChunk; }  // of an input row, in numbers

  // Sets number i of an input row.
  INLINE void set(void* row, int64_t i, float x) const {
    int64_t whole = i / kChunk * kChunk;
    if (!scales) static_cast<float*>(row)[i] = x;
    else if (pairs) flaxmill::narrow(x, static_cast<Pairs::Number*>(row) + whole + Pairs::place(i % kChunk));
    else static_cast<float*>(row)[whole + Singles::place(i % kChunk)] = x;
  }

  int64_t row_bytes() const { return stride() * (pairs ? sizeof(Pairs::Number) : sizeof(float)); }

  // y[r][0..n) = tile `tile` of the outputs of expert e for up to kRows rows.
  void multiply(int64_t e, int64_t at, const void* const* rows, int64_t R, float* const* y) const {
    int64_t Q = I / 32, o = at * tile(), n = std::min(tile(), O - o);
    if (scales) {
      const uint8_t *blocks = static_cast<const uint8_t*>(numbers) + e * O * Q * 16, *by = scales + e * O * Q;
      if (pairs) packed_tile<Pairs>(blocks, by, Q, reinterpret_cast<const Pairs::Number* const*>(rows), R, o, n, y);
      else packed_tile<Singles>(blocks, by, Q, reinterpret_cast<const float* const*>(rows), R, o, n, y);
    } else {
      auto whole = reinterpret_cast<const float* const*>(rows);
      if (narrow) dense_outputs(static_cast<const bf16*>(numbers) + e * I * O, I, O, whole, R, o, n, y);
      else dense_outputs(static_cast<const float*>(numbers) + e * I * O, I, O, whole, R, o, n, y);
    }
  }
};

struct Numbers {
  const void* data;
  bool narrow;
  float operator[](int64_t i) const {
    return narrow ? widen(static_cast<const bf16*>(data)[i]) : static_cast<const float*>(data)[i];
  }
};

Numbers numbers(const ffi::AnyBuffer& buffer) { return {buffer.untyped_data(), buffer.element_type() == ffi::BF16}; }

// The pairs that have chosen one expert: `pairs` counts row * C + c.
struct Group {
  int64_t expert;
  std::vector<int64_t> pairs;
};

struct Mixture {
  Kernels gate_up, down;
  Numbers gate_up_bias, down_bias, x;
  const float* weights;
  int64_t R, C, E;
  float alpha, limit;
  std::vector<Group> groups = {};

  // The input of each row and of each pair, as their kernels want them; what pairs make of theirs.
  uint8_t *x_RD = nullptr, *h_PF = nullptr;
  float* y_PD = nullptr;

  void arrange(const int32_t* chosen) {
    std::vector<int64_t> group_of(E, -1);
    for (int64_t p = 0; p < R * C; ++p) {
      int64_t e = chosen[p];
      if (e < 0 || e >= E) continue;  // gives nothing
      if (group_of[e] < 0) {
        group_of[e] = groups.size();
        groups.push_back({e, {}});
      }
      groups[group_of[e]].pairs.push_back(p);
    }
  }

  void lay_out(int64_t r) {
    uint8_t* row = x_RD + r * gate_up.row_bytes();
    std::memset(row, 0, gate_up.row_bytes());
    for (int64_t d = 0; d < gate_up.I; ++d) gate_up.set(row, d, x[r * gate_up.I + d]);
    std::memset(h_PF + r * C * down.row_bytes(), 0, C * down.row_bytes());
  }

  // Calls each(pair, y) with a tile's outputs, bias and all.
  template <class Each>
  void outputs(const Kernels& kernels, Numbers bias, const uint8_t* inputs, int64_t per_input, const Group& group, int64_t tile,
               const Each& each) {
    alignas(64) float y[kRows][kDenseTile];
    const void* rows[kRows];
    float* to[kRows];
    int64_t o = tile * kernels.tile(), n = std::min(kernels.tile(), kernels.O - o);
    for (int64_t first = 0; first < int64_t(group.pairs.size()); first += kRows) {
      int64_t count = std::min<int64_t>(kRows, group.pairs.size() - first);
      for (int64_t r = 0; r < count; ++r) {
        rows[r] = inputs + group.pairs[first + r] / per_input * kernels.row_bytes();
        to[r] = y[r];
      }
      kernels.multiply(group.expert, tile, rows, count, to);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t c = 0; c < n; ++c) y[r][c] += bias[group.expert * kernels.O + o + c];
        each(group.pairs[first + r], o, n, y[r]);
      }
    }
  }

  void raise(const Group& group, int64_t tile) {
    outputs(gate_up, gate_up_bias, x_RD, C, group, tile, [&](int64_t pair, int64_t o, int64_t n, const float* y) {
      uint8_t* h = h_PF + pair * down.row_bytes();
      for (int64_t c = 0; c < n / 2; c += W) {
        float gate[W] = {}, up[W] = {}, lanes[W];
        int count = int(std::min<int64_t>(W, n / 2 - c));
        for (int i = 0; i < count; ++i) gate[i] = y[2 * (c + i)], up[i] = y[2 * (c + i) + 1];
        store(lanes, swiglu(load(gate), load(up)));
        for (int i = 0; i < count; ++i) down.set(h, o / 2 + c + i, x.narrow ? rounded(lanes[i]) : lanes[i]);
      }
    });
  }

  static float rounded(float x) {
    bf16 rounded;
    narrow(x, &rounded);
    return widen(rounded);
  }

  // As core.moe.swiglu; a NaN stays one.
  F swiglu(F gate, F up) const {
    gate = min(set(limit), gate);
    up = max(set(-limit), min(set(limit), up));
    F power = exponential(min(set(88.0f), mul(set(-alpha), gate)));
    return div(mul(add(up, set(1)), gate), add(set(1), power));
  }

  void lower(const Group& group, int64_t tile) {
    outputs(down, down_bias, h_PF, 1, group, tile, [&](int64_t pair, int64_t o, int64_t n, const float* y) {
      std::copy_n(y, n, y_PD + pair * down.O + o);
    });
  }

  void join(int64_t r, const int32_t* chosen, float* out) const {
    int64_t D = down.O;
    std::fill_n(out + r * D, D, 0.0f);
    for (int64_t pair = r * C; pair < (r + 1) * C; ++pair) {
      if (chosen[pair] < 0 || chosen[pair] >= E) continue;
      F weight = set(weights[pair]);
      for (int64_t d = 0; d < D; d += W) {
        int count = int(std::min<int64_t>(W, D - d));
        float *to = out + r * D + d, *from = y_PD + pair * D + d;
        if (count == W) store(to, fma(weight, load(from), load(to)));
        else store(to, fma(weight, load(from, count), load(to, count)), count);
      }
    }
  }
};

Kernels kernels(const ffi::AnyBuffer& buffer, const ffi::Buffer<ffi::U8>& scales, bool narrow_rows, int64_t I, int64_t O) {
  bool packed = scales.element_count(), pairs = packed && narrow_rows && !std::is_same_v<Pairs, Singles>;
  return {buffer.untyped_data(), packed ? scales.typed_data() : nullptr, buffer.element_type() == ffi::BF16, pairs, I, O};
}

ffi::Error Mix(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::F32> weights, ffi::Buffer<ffi::S32> chosen,
               ffi::AnyBuffer gate_up, ffi::Buffer<ffi::U8> gate_up_scales, ffi::AnyBuffer gate_up_bias,
               ffi::AnyBuffer down, ffi::Buffer<ffi::U8> down_scales, ffi::AnyBuffer down_bias,
               ffi::Result<ffi::Buffer<ffi::F32>> y, ffi::Result<ffi::Buffer<ffi::F32>> scratch, float alpha, float limit) {
  int64_t R = x.dimensions()[0], D = x.dimensions()[1], C = chosen.dimensions()[1], E = down_bias.dimensions()[0];
  int64_t F2 = gate_up_bias.dimensions()[1];
  bool narrow = x.element_type() == ffi::BF16;
  Mixture mixture{kernels(gate_up, gate_up_scales, narrow, D, F2), kernels(down, down_scales, narrow, F2 / 2, D),
                  numbers(gate_up_bias), numbers(down_bias), numbers(x), weights.typed_data(), R, C, E, alpha, limit};
  auto* room = static_cast<uint8_t*>(scratch->untyped_data());
  mixture.x_RD = room, room += R * mixture.gate_up.row_bytes();
  mixture.h_PF = room, room += R * C * mixture.down.row_bytes();
  mixture.y_PD = reinterpret_cast<float*>(room), room += R * C * D * sizeof(float);
  if (room > static_cast<uint8_t*>(scratch->untyped_data()) + scratch->size_bytes())
    return ffi::Error::InvalidArgument("the experts' scratch is too small");

  mixture.arrange(chosen.typed_data());
  int64_t groups = mixture.groups.size(), up = mixture.gate_up.tiles(), down_tiles = mixture.down.tiles();
  parallel(pool, R, [&](int64_t r) { mixture.lay_out(r); });
  parallel(pool, groups * up, [&](int64_t i) { mixture.raise(mixture.groups[i / up], i % up); });
  parallel(pool, groups * down_tiles, [&](int64_t i) { mixture.lower(mixture.groups[i / down_tiles], i % down_tiles); });
  parallel(pool, R, [&](int64_t r) { mixture.join(r, chosen.typed_data(), y->typed_data()); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace flaxmill

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    mix_experts, flaxmill::Mix,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
        .Arg<xla::ffi::AnyBuffer>()
        .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
        .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
        .Attr<float>("alpha")
        .Attr<float>("limit"));

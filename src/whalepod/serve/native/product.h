// Products of a few rows with a stored weight: out[m, n] = sum over k of x[m, k] * w[n, k].
//
// Decoding reads every weight once for a few rows, so it is as fast as weights come from memory. Four rows of a
// weight at a time are widened to FP32 in the nearest cache, whatever their type, and multiplied with all rows
// of x. A sum over k has one order, whatever rows are beside it: a token's numbers do not depend on the batch.
#pragma once

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace whale {

enum Kind : int64_t { kF32, kBF16, kInt8, kE4M3 };

struct Weight {  // [rows, cols], contiguous
  const void* data = nullptr;
  const float* scale = nullptr;  // of int8 and E4M3: of each block of `block` x 128
  int64_t kind = kF32, rows = 0, cols = 0, block = 1;
};

#ifdef __AVX512F__
constexpr int64_t kLanes = 16, kMost = 6;  // rows of x at once: as many sums as there are registers for
#else
constexpr int64_t kLanes = 8, kMost = 3;
#endif
constexpr int64_t kFew = 4;     // rows of a weight at once
constexpr int64_t kAhead = 8;   // rows before they are needed, memory is asked for them
constexpr int64_t kChunk = 32;  // rows of a weight that one thread takes
constexpr int64_t kPanel = 66;  // rows of x that stay in the second cache
constexpr int64_t kTile = 128;  // columns that share a scale

using Lanes = float __attribute__((vector_size(4 * kLanes)));

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}

inline uint16_t to_bf16(float value) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// One row in FP32, and zeros up to a whole number of lanes. `out` has room for them.
inline void widen_row(const Weight& w, int64_t row, float* out) {
  const int64_t n = w.cols, bytes = n * (w.kind == kF32 ? 4 : w.kind == kBF16 ? 2 : 1);
  const char* ahead = static_cast<const char*>(w.data) + (row + kAhead) * bytes;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(ahead + i, 0, 2);
  if (w.kind == kF32) {
    std::memcpy(out, static_cast<const float*>(w.data) + row * n, 4 * n);
  } else if (w.kind == kBF16) {
    const uint16_t* in = static_cast<const uint16_t*>(w.data) + row * n;
    for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(in[i]);
  } else {
    const uint8_t* in = static_cast<const uint8_t*>(w.data) + row * n;
    const float* scales = w.scale + row / w.block * ((n + kTile - 1) / kTile);
    for (int64_t first = 0; first < n; first += kTile) {
      const int64_t last = std::min(n, first + kTile);
      const float scale = scales[first / kTile];
      if (w.kind == kInt8) {
        for (int64_t i = first; i < last; ++i) out[i] = static_cast<float>(static_cast<int8_t>(in[i])) * scale;
        continue;
      }
      for (int64_t i = first; i < last; ++i) {
        // The upper bits of an FP32 number but for 2^120, the difference of their exponents' biases.
        const uint32_t bits = (in[i] & 0x80u) << 24 | (in[i] & 0x7fu) << 20;
        float value;
        std::memcpy(&value, &bits, 4);
        out[i] = value * 0x1p120f * scale;
      }
    }
  }
  for (int64_t i = n; i < padded(n); ++i) out[i] = 0;
}

inline float sum_of(Lanes v) {
  float part[kLanes];
  std::memcpy(part, &v, sizeof part);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

inline Lanes lanes(const float* x) {
  Lanes out;
  std::memcpy(&out, x, sizeof out);
  return out;
}

inline Lanes lanes(const uint16_t* x) {  // BF16
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#elif defined(__AVX2__)
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return (Lanes)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#else
  float out[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) out[i] = from_bf16(x[i]);
  return lanes(out);
#endif
}

// Four rows of w, FP32 or BF16, times M rows of x; k is a whole number of lanes.
template <int64_t M, typename T>
inline void rows_times(const T* w, int64_t k, const float* x, int64_t x_step, float* out, int64_t out_step,
                       int64_t n) {
  Lanes sums[kFew][M] = {};
  for (int64_t i = 0; i < k; i += kLanes) {
    Lanes right[M];
#pragma GCC unroll 6
    for (int64_t m = 0; m < M; ++m) right[m] = lanes(x + m * x_step + i);
#pragma GCC unroll 4
    for (int64_t r = 0; r < kFew; ++r) {
      const Lanes left = lanes(w + r * k + i);
      if constexpr (sizeof(T) == 2) __builtin_prefetch(w + (r + kAhead) * k + i);
#pragma GCC unroll 6
      for (int64_t m = 0; m < M; ++m) sums[r][m] += left * right[m];
    }
  }
  float found[kFew][M];
#pragma GCC unroll 4
  for (int64_t r = 0; r < kFew; ++r)
#pragma GCC unroll 6
    for (int64_t m = 0; m < M; ++m) found[r][m] = sum_of(sums[r][m]);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t r = 0; r < n; ++r) out[m * out_step + r] = found[r][m];
}

// `n` (at most four) rows times `count` rows of x.
template <typename T>
inline void times_few(const T* w, int64_t k, const float* x, int64_t x_step, int64_t count, float* out,
                      int64_t out_step, int64_t n) {
  int64_t m = 0;
  for (; m + kMost <= count; m += kMost)
    rows_times<kMost>(w, k, x + m * x_step, x_step, out + m * out_step, out_step, n);
  for (; m + 2 <= count; m += 2) rows_times<2>(w, k, x + m * x_step, x_step, out + m * out_step, out_step, n);
  if (m < count) rows_times<1>(w, k, x + m * x_step, x_step, out + m * out_step, out_step, n);
}

// Rows [first, last) of w times `count` rows of x; the result of row r stands at out[m * out_step + r]. Behind
// each row of x there is readable, finite memory up to a whole number of lanes.
inline void times_rows(const Weight& w, int64_t first, int64_t last, const float* x, int64_t x_step,
                       int64_t count, float* out, int64_t out_step) {
  static thread_local std::vector<float> scratch;
  const int64_t k = padded(w.cols);
  if (w.kind == kBF16 && k == w.cols && (last - first) % kFew == 0 && count <= kMost) {
    // So few that it is not worth a detour through the cache.
    const uint16_t* rows = static_cast<const uint16_t*>(w.data);
    for (int64_t row = first; row < last; row += kFew) {
      times_few(rows + row * k, k, x, x_step, count, out + row, out_step, kFew);
    }
    return;
  }
  if (static_cast<int64_t>(scratch.size()) < kFew * k) scratch.assign(kFew * k, 0);
  for (int64_t m = 0; m < count; m += kPanel) {
    for (int64_t row = first; row < last; row += kFew) {
      const int64_t n = std::min(kFew, last - row);
      for (int64_t i = 0; i < n; ++i) widen_row(w, row + i, scratch.data() + i * k);
      times_few(scratch.data(), k, x + m * x_step, x_step, std::min(kPanel, count - m),
                out + m * out_step + row, out_step, n);
    }
  }
}

// All of it, shared out among the threads of a parallel region, which do not wait for each other.
inline void times(const Weight& w, const float* x, int64_t x_step, int64_t count, float* out,
                  int64_t out_step) {
#pragma omp for schedule(dynamic) nowait
  for (int64_t row = 0; row < w.rows; row += kChunk)
    times_rows(w, row, std::min(w.rows, row + kChunk), x, x_step, count, out, out_step);
}

inline float exponential(float x) {  // to 2 units in the last place, vectorised where loops are
  const float y = std::max(x, -87.0f) * 1.44269504f;
  const float whole = (std::min(y, 127.0f) + 12582912.0f) - 12582912.0f, part = y - whole;
  float out = 1.5403530e-4f;
  for (float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
    out = out * part + c;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return out * power;
}

inline float silu(float x) { return x / (1 + exponential(-x)); }

}  // namespace whale

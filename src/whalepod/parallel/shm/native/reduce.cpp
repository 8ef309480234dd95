#include "reduce.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace whale {
namespace {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
struct Bool {
  uint8_t value;
};

template <class To, class From>
To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}

// What a type is combined in, and the way there and back.
template <class T>
struct Wide {
  using type = T;
  static T load(T value) { return value; }
  static T store(T value) { return value; }
};
template <>
struct Wide<Bool> {
  using type = uint8_t;
  static uint8_t load(Bool value) { return value.value != 0; }
  static Bool store(uint8_t value) { return {static_cast<uint8_t>(value != 0)}; }
};
template <>
struct Wide<BF16> {
  using type = float;
  static float load(BF16 value) { return bits_of<float>(static_cast<uint32_t>(value.bits) << 16); }
  static BF16 store(float value) {  // to nearest, ties to even; any NaN becomes torch's
    const auto bits = bits_of<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
  }
};
template <>
struct Wide<F16> {
  using type = float;
#if defined(__F16C__)
  static float load(F16 value) { return _cvtsh_ss(value.bits); }
  static F16 store(float value) { return {static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))}; }
#else
  static float load(F16 value) { return static_cast<float>(bits_of<_Float16>(value.bits)); }
  static F16 store(float value) { return {bits_of<uint16_t>(static_cast<_Float16>(value))}; }
#endif
};

template <class T>
void widen(typename Wide<T>::type* to, const T* from, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = Wide<T>::load(from[i]);
}
template <class T>
void narrow(T* to, const typename Wide<T>::type* from, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = Wide<T>::store(from[i]);
}
#if defined(__F16C__)
template <>
void widen<F16>(float* to, const F16* from, size_t count) {
  size_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < count; ++i) to[i] = Wide<F16>::load(from[i]);
}
template <>
void narrow<F16>(F16* to, const float* from, size_t count) {
  size_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < count; ++i) to[i] = Wide<F16>::store(from[i]);
}
#endif

template <Combine kHow, class T>
inline T combine(T a, T b) {
  if constexpr (kHow == Combine::kProduct) return static_cast<T>(a * b);
  // A NaN on either side stays, as in torch.minimum and torch.maximum.
  if constexpr (kHow == Combine::kMin) return a < b || a != a ? a : b;
  if constexpr (kHow == Combine::kMax) return a > b || a != a ? a : b;
  if constexpr (std::is_integral_v<T>) {
    if constexpr (kHow == Combine::kAnd) return a & b;
    if constexpr (kHow == Combine::kOr) return a | b;
    if constexpr (kHow == Combine::kXor) return a ^ b;
  }
  return static_cast<T>(a + b);
}

constexpr size_t kBlock = 1024;  // sums of this many elements stay in the first-level cache

template <Combine kHow, class T>
void reduce_as(void* out, const void* const* sources, int num, size_t count, double scale) {
  using W = typename Wide<T>::type;
  W sum[kBlock], next[kBlock];
  const auto factor = static_cast<W>(kHow == Combine::kScaledSum ? scale : 1.0);
  for (size_t start = 0; start < count; start += kBlock) {
    const size_t len = std::min(kBlock, count - start);
    widen<T>(sum, static_cast<const T*>(sources[0]) + start, len);
    if constexpr (kHow == Combine::kScaledSum)
      for (size_t i = 0; i < len; ++i) sum[i] *= factor;
    for (int k = 1; k < num; ++k) {
      const T* from = static_cast<const T*>(sources[k]) + start;
      if constexpr (std::is_same_v<T, F16>) {
        widen<T>(next, from, len);
        for (size_t i = 0; i < len; ++i)
          sum[i] = combine<kHow>(sum[i], kHow == Combine::kScaledSum ? next[i] * factor : next[i]);
      } else {
        for (size_t i = 0; i < len; ++i) {
          W value = Wide<T>::load(from[i]);
          if constexpr (kHow == Combine::kScaledSum) value *= factor;
          sum[i] = combine<kHow>(sum[i], value);
        }
      }
    }
    if constexpr (kHow == Combine::kAvg) {
      const auto divisor = static_cast<std::conditional_t<std::is_integral_v<W>, int, W>>(num);
      for (size_t i = 0; i < len; ++i) sum[i] = static_cast<W>(sum[i] / divisor);
    }
    narrow<T>(static_cast<T*>(out) + start, sum, len);
  }
}

template <class T>
void reduce_type(void* out, const void* const* sources, int num, size_t count, Combine how, double scale) {
  constexpr bool is_float = std::is_floating_point_v<typename Wide<T>::type>;
  switch (how) {
    case Combine::kSum: return reduce_as<Combine::kSum, T>(out, sources, num, count, scale);
    case Combine::kAvg: return reduce_as<Combine::kAvg, T>(out, sources, num, count, scale);
    case Combine::kProduct: return reduce_as<Combine::kProduct, T>(out, sources, num, count, scale);
    case Combine::kMin: return reduce_as<Combine::kMin, T>(out, sources, num, count, scale);
    case Combine::kMax: return reduce_as<Combine::kMax, T>(out, sources, num, count, scale);
    default: break;
  }
  if constexpr (is_float) {
    return reduce_as<Combine::kScaledSum, T>(out, sources, num, count, scale);
  } else {
    switch (how) {
      case Combine::kAnd: return reduce_as<Combine::kAnd, T>(out, sources, num, count, scale);
      case Combine::kOr: return reduce_as<Combine::kOr, T>(out, sources, num, count, scale);
      default: return reduce_as<Combine::kXor, T>(out, sources, num, count, scale);
    }
  }
}

}  // namespace

bool can_reduce(Kind kind, Combine combine) {
  const bool is_float = kind == Kind::kF32 || kind == Kind::kF64 || kind == Kind::kBF16 || kind == Kind::kF16;
  switch (combine) {
    case Combine::kAnd:
    case Combine::kOr:
    case Combine::kXor: return !is_float;
    case Combine::kScaledSum: return is_float;
    case Combine::kAvg: return kind != Kind::kBool;
    default: return true;
  }
}

size_t kind_bytes(Kind kind) {
  switch (kind) {
    case Kind::kF64:
    case Kind::kI64: return 8;
    case Kind::kF32:
    case Kind::kI32: return 4;
    case Kind::kBF16:
    case Kind::kF16:
    case Kind::kI16: return 2;
    default: return 1;
  }
}

void reduce(void* out, const void* const* sources, int num, size_t count, Kind kind, Combine how, double scale) {
  // A sum of truth values is "any of them"; adding the ones themselves would wrap at 256 ranks.
  if (kind == Kind::kBool && how == Combine::kSum) how = Combine::kOr;
  switch (kind) {
    case Kind::kF32: return reduce_type<float>(out, sources, num, count, how, scale);
    case Kind::kF64: return reduce_type<double>(out, sources, num, count, how, scale);
    case Kind::kBF16: return reduce_type<BF16>(out, sources, num, count, how, scale);
    case Kind::kF16: return reduce_type<F16>(out, sources, num, count, how, scale);
    case Kind::kI64: return reduce_type<int64_t>(out, sources, num, count, how, scale);
    case Kind::kI32: return reduce_type<int32_t>(out, sources, num, count, how, scale);
    case Kind::kI16: return reduce_type<int16_t>(out, sources, num, count, how, scale);
    case Kind::kI8: return reduce_type<int8_t>(out, sources, num, count, how, scale);
    case Kind::kU8: return reduce_type<uint8_t>(out, sources, num, count, how, scale);
    case Kind::kBool: return reduce_type<Bool>(out, sources, num, count, how, scale);
  }
}

}  // namespace whale

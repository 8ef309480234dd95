// Copies, past the cache where the copy is large.
//
// An ordinary store first reads the line it is going to overwrite, and pushes the staging area out of the
// cache. Results of many MiB are written with non-temporal stores instead: a third less memory traffic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace whale {

constexpr size_t kStreamBytes = 4 << 20;  // results of this size are not expected to be read from the cache

// `to` and `from` may be the same, but must not overlap otherwise.
inline void copy(char* to, const char* from, size_t bytes, bool stream = false) {
  if (bytes == 0 || to == from) return;
#if defined(__SSE2__)
  if (stream && bytes >= 1024) {
    const size_t head = (64 - reinterpret_cast<uintptr_t>(to) % 64) % 64;
    std::memcpy(to, from, head);
    to += head, from += head, bytes -= head;
    for (; bytes >= 64; to += 64, from += 64, bytes -= 64) {
      const auto* in = reinterpret_cast<const __m128i*>(from);
      auto* out = reinterpret_cast<__m128i*>(to);
      const __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1);
      const __m128i c = _mm_loadu_si128(in + 2), d = _mm_loadu_si128(in + 3);
      _mm_stream_si128(out, a);
      _mm_stream_si128(out + 1, b);
      _mm_stream_si128(out + 2, c);
      _mm_stream_si128(out + 3, d);
    }
    _mm_sfence();  // such stores are not ordered by the atomics that publish them
  }
#endif
  std::memcpy(to, from, bytes);
}

}  // namespace whale

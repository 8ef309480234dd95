// Sums and the other reductions over the ranks' copies of one stretch of memory (no torch).
//
// Bits must not depend on who computes them: every element is combined in rank order. BF16 and FP16 are
// combined in FP32 and rounded once; FP32, FP64 and integers in their own type.
#pragma once

#include <cstddef>
#include <cstdint>

namespace whale {

enum class Kind : uint8_t { kF32, kF64, kBF16, kF16, kI64, kI32, kI16, kI8, kU8, kBool };
enum class Combine : uint8_t { kSum, kAvg, kProduct, kMin, kMax, kAnd, kOr, kXor, kScaledSum };

bool can_reduce(Kind kind, Combine combine);
size_t kind_bytes(Kind kind);

// out[i] = sources[0][i] (+) sources[1][i] (+) ... ; out may be one of the sources. `scale` is for
// kScaledSum: every source times scale, then the sum.
void reduce(void* out, const void* const* sources, int num_sources, size_t count, Kind kind, Combine combine,
            double scale);

}  // namespace whale

// From torch's tensors to the spans of memory that collectives.h speaks of, with the checks on the way.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/distributed/c10d/Types.hpp>

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "collectives.h"

namespace whale {

using at::Tensor;
using Tensors = std::vector<Tensor>;

inline bool is_plain(const Tensor& t) { return t.device().is_cpu() && t.layout() == at::kStrided; }

inline bool is_flat(const Tensor& t) { return t.is_contiguous() && !t.is_conj() && !t.is_neg(); }

inline Tensor flat(const Tensor& t) { return is_flat(t) ? t : t.resolve_conj().resolve_neg().contiguous(); }

inline bool are_plain(const Tensors& tensors) { return std::all_of(tensors.begin(), tensors.end(), is_plain); }

inline std::optional<Kind> kind_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Kind::kF32;
    case at::kDouble: return Kind::kF64;
    case at::kBFloat16: return Kind::kBF16;
    case at::kHalf: return Kind::kF16;
    case at::kLong: return Kind::kI64;
    case at::kInt: return Kind::kI32;
    case at::kShort: return Kind::kI16;
    case at::kChar: return Kind::kI8;
    case at::kByte: return Kind::kU8;
    case at::kBool: return Kind::kBool;
    default: return std::nullopt;
  }
}

inline std::optional<Rule> rule_of(const Tensor& tensor, const c10d::ReduceOp& op) {
  const auto kind = kind_of(tensor.scalar_type());
  if (!kind || !is_plain(tensor)) return std::nullopt;
  Rule rule{*kind, Combine::kSum, 1.0};
  switch (op.op_) {
    case c10d::ReduceOp::SUM: break;
    case c10d::ReduceOp::AVG: rule.combine = Combine::kAvg; break;
    case c10d::ReduceOp::PRODUCT: rule.combine = Combine::kProduct; break;
    case c10d::ReduceOp::MIN: rule.combine = Combine::kMin; break;
    case c10d::ReduceOp::MAX: rule.combine = Combine::kMax; break;
    case c10d::ReduceOp::BAND: rule.combine = Combine::kAnd; break;
    case c10d::ReduceOp::BOR: rule.combine = Combine::kOr; break;
    case c10d::ReduceOp::BXOR: rule.combine = Combine::kXor; break;
    case c10d::ReduceOp::PREMUL_SUM: {
      const auto* factor = dynamic_cast<const c10d::PreMulSumSupplement*>(op.supplement_.get());
      if (factor == nullptr) return std::nullopt;
      rule.combine = Combine::kScaledSum;
      rule.scale = factor->tensor_factor.defined() ? factor->tensor_factor.item<double>() : factor->double_factor;
      break;
    }
    default: return std::nullopt;
  }
  if (!can_reduce(rule.kind, rule.combine)) return std::nullopt;
  return rule;
}

inline Span span(const Tensor& t) { return {static_cast<char*>(t.data_ptr()), t.nbytes()}; }

inline std::vector<Span> spans(const Tensors& tensors) {
  std::vector<Span> out;
  for (const Tensor& t : tensors) out.push_back(span(t));
  return out;
}

// Equal shares of a contiguous tensor, one for each rank.
inline std::vector<Span> shares(const Tensor& t, int size) {
  const size_t bytes = t.nbytes() / static_cast<size_t>(size);
  std::vector<Span> out;
  for (int k = 0; k < size; ++k) out.push_back({static_cast<char*>(t.data_ptr()) + bytes * k, bytes});
  return out;
}

// A tensor that is written: in place where its memory is contiguous, else by way of a copy.
struct Target {
  Tensor user, flat;
  explicit Target(const Tensor& t, bool keeps_value = false) : user(t) {
    flat = keeps_value ? whale::flat(t) : is_flat(t) ? t : at::empty(t.sizes(), t.options());
  }
  void write_back() const {
    if (flat.is_same(user)) return;
    at::AutoDispatchBelowADInplaceOrView guard;
    user.copy_(flat);
  }
};

inline std::vector<Target> targets(const Tensors& tensors) { return {tensors.begin(), tensors.end()}; }

inline Tensors flats(const std::vector<Target>& targets) {
  Tensors out;
  for (const Target& each : targets) out.push_back(each.flat);
  return out;
}

inline void write_back(const std::vector<Target>& targets) {
  for (const Target& each : targets) each.write_back();
}

inline Tensors flat(const Tensors& tensors) {
  Tensors out;
  for (const Tensor& t : tensors) out.push_back(flat(t));
  return out;
}

// Rows of a tensor for each rank, as all_to_all_single splits them.
inline std::vector<Span> rows(const Tensor& t, const std::vector<int64_t>& splits, int size) {
  if (splits.empty()) {
    TORCH_CHECK(t.dim() == 0 || t.size(0) % size == 0, "all_to_all_single: ", t.size(0),
                " rows cannot be split evenly among ", size, " ranks");
    return shares(t, size);
  }
  TORCH_CHECK(static_cast<int>(splits.size()) == size, "all_to_all_single: ", splits.size(), " splits for ", size,
              " ranks");
  const int64_t total = std::accumulate(splits.begin(), splits.end(), int64_t{0});
  const int64_t num_rows = t.dim() == 0 ? 1 : t.size(0);
  TORCH_CHECK(total == num_rows && *std::min_element(splits.begin(), splits.end()) >= 0,
              "all_to_all_single: splits sum to ", total, ", the tensor has ", num_rows, " rows");
  const size_t row = num_rows == 0 ? 0 : t.nbytes() / static_cast<size_t>(num_rows);
  std::vector<Span> out;
  char* at = static_cast<char*>(t.data_ptr());
  for (const int64_t split : splits) {
    out.push_back({at, row * static_cast<size_t>(split)});
    at += out.back().bytes;
  }
  return out;
}

inline void check_same(const Tensors& tensors, const Tensor& like, const char* what) {
  for (const Tensor& t : tensors)
    TORCH_CHECK(t.scalar_type() == like.scalar_type() && t.numel() == like.numel(), what,
                ": tensors differ in type or size: ", t.scalar_type(), " of ", t.numel(), ", ",
                like.scalar_type(), " of ", like.numel());
}

inline void check_times(const Tensor& large, const Tensor& small, int size, const char* what) {
  TORCH_CHECK(large.scalar_type() == small.scalar_type() && large.numel() == small.numel() * size, what, ": ",
              large.numel(), " elements of ", large.scalar_type(), " against ", size, " times ",
              small.numel(), " of ", small.scalar_type());
}

}  // namespace whale

#include "collectives.h"

#include <algorithm>

#include "copy.h"

namespace whale {
namespace {

const char* name(Op op) {
  constexpr std::array<const char*, 9> names = {"barrier", "broadcast",      "all_reduce", "reduce", "all_gather",
                                                "gather",  "scatter", "reduce_scatter", "all_to_all"};
  return names[static_cast<size_t>(op)];
}

uint64_t detail_of(Rule rule, int root = 0) {
  return static_cast<uint64_t>(rule.kind) | static_cast<uint64_t>(rule.combine) << 8 |
         static_cast<uint64_t>(root) << 16;
}

size_t part(size_t bytes, size_t offset, size_t chunk) {
  return offset < bytes ? std::min(chunk, bytes - offset) : 0;
}

uint64_t steps_for(size_t bytes, size_t chunk) { return std::max<uint64_t>(1, (bytes + chunk - 1) / chunk); }

// All-reduces up to this size are read whole by every rank: one exchange instead of two.
constexpr size_t kDirectBytes = 32 << 10;

// A note's words: the step it belongs to, the operation, its detail, the steps its writer needs, then the
// bytes for each rank. A rank that shows nothing in a step leaves an old note, which the step gives away.
constexpr size_t kStep = 0, kOp = 1, kDetail = 2, kSteps = 3, kBytes = 4;

}  // namespace

char* Collectives::begin_slot(const Call& call) {
  const uint64_t oldest = step_ < kNumSlots ? 0 : step_ - kNumSlots + 1;
  Bell& bell = seg_.desk(seg_.rank).steps;
  for_peers([&](int peer) {
    auto& read = seg_.desk(peer).read;
    if (read.load(std::memory_order_acquire) >= oldest) return;
    seg_.await(bell, peer, [&] { return read.load(std::memory_order_acquire) >= oldest; }, call.deadline,
               name(call.op));
  });
  return seg_.slot(seg_.rank, step_);
}

void Collectives::note(const Call& call, uint64_t bytes_each, uint64_t num_steps) {
  uint64_t* words = seg_.note(seg_.rank, step_);
  words[kStep] = step_ + 1;
  words[kOp] = static_cast<uint64_t>(call.op);
  words[kDetail] = call.detail;
  words[kSteps] = num_steps;
  std::fill_n(words + kBytes, seg_.num_ranks, bytes_each);
}

void Collectives::publish() {
  seg_.desk(seg_.rank).wrote.store(step_ + 1, std::memory_order_release);
  for_peers([&](int peer) { seg_.ring(seg_.desk(peer).steps); });
}

const char* Collectives::peer_slot(const Call& call, int peer, uint64_t expected_bytes) {
  auto& wrote = seg_.desk(peer).wrote;
  if (wrote.load(std::memory_order_acquire) <= step_)
    seg_.await(seg_.desk(seg_.rank).steps, peer, [&] { return wrote.load(std::memory_order_acquire) > step_; },
               call.deadline, name(call.op));
  const uint64_t* words = seg_.note(peer, step_);
  const uint64_t bytes = words[kBytes + static_cast<size_t>(seg_.rank)];
  if (words[kStep] != step_ + 1) {
    seg_.give_up(std::string("ranks call different collectives: rank ") + std::to_string(seg_.rank) +
                 " reads in " + name(call.op) + " what rank " + std::to_string(peer) + " does not send");
  }
  if (words[kOp] != static_cast<uint64_t>(call.op) || words[kDetail] != call.detail || bytes != expected_bytes) {
    const auto theirs = static_cast<Op>(std::min<uint64_t>(words[kOp], static_cast<uint64_t>(Op::kAllToAll)));
    seg_.give_up(std::string("ranks call different collectives: rank ") + std::to_string(seg_.rank) + " " +
                 name(call.op) + " of " + std::to_string(expected_bytes) + " bytes, rank " +
                 std::to_string(peer) + " " + name(theirs) + " of " + std::to_string(bytes) + " bytes" +
                 (words[kDetail] != call.detail ? ", with another type, reduction or root" : ""));
  }
  return seg_.slot(peer, step_);
}

void Collectives::end_step() {
  ++step_;
  seg_.desk(seg_.rank).read.store(step_, std::memory_order_release);
  for_peers([&](int peer) { seg_.ring(seg_.desk(peer).steps); });
}

void Collectives::barrier(Deadline deadline) {
  const Call call{Op::kBarrier, 0, deadline};
  begin_slot(call);
  note(call, 0, 1);
  publish();
  for_peers([&](int peer) { peer_slot(call, peer, 0); });
  end_step();
}

void Collectives::broadcast(Span data, int root, Deadline deadline) {
  const Call call{Op::kBroadcast, static_cast<uint64_t>(root), deadline};
  const uint64_t steps = steps_for(data.bytes, seg_.slot_bytes);
  for (uint64_t i = 0; i < steps; ++i) {
    const size_t offset = i * seg_.slot_bytes, len = part(data.bytes, offset, seg_.slot_bytes);
    if (seg_.rank == root) {
      copy(begin_slot(call), data.data + offset, len);
      note(call, data.bytes, steps);
      publish();
    } else {
      publish();
      copy(data.data + offset, peer_slot(call, root, data.bytes), len, data.bytes >= kStreamBytes);
    }
    end_step();
  }
}

// Every rank shows its whole input; those that read copy all of it.
void Collectives::read_all(const Call& call, Span in, const std::vector<Span>& out, bool reads) {
  size_t most = in.bytes;
  for (const Span& span : out) most = std::max(most, span.bytes);
  const uint64_t steps = steps_for(most, seg_.slot_bytes);
  const bool stream = in.bytes * static_cast<size_t>(seg_.num_ranks) >= kStreamBytes;
  for (uint64_t i = 0; i < steps; ++i) {
    const size_t offset = i * seg_.slot_bytes;
    copy(begin_slot(call), in.data + offset, part(in.bytes, offset, seg_.slot_bytes));
    note(call, in.bytes, steps);
    publish();
    if (reads) {
      const Span& own = out[static_cast<size_t>(seg_.rank)];
      copy(own.data + offset, in.data + offset, part(own.bytes, offset, seg_.slot_bytes), stream);
      for_peers([&](int peer) {
        const Span& to = out[static_cast<size_t>(peer)];
        const char* from = peer_slot(call, peer, to.bytes);
        copy(to.data + offset, from, part(to.bytes, offset, seg_.slot_bytes), stream);
      });
    }
    end_step();
  }
}

void Collectives::all_gather(Span in, const std::vector<Span>& out, Deadline deadline) {
  read_all({Op::kAllGather, 0, deadline}, in, out, true);
}

void Collectives::gather(Span in, const std::vector<Span>& out, int root, Deadline deadline) {
  read_all({Op::kGather, static_cast<uint64_t>(root), deadline}, in, out, seg_.rank == root);
}

void Collectives::reduce(Span in, Span out, Rule rule, int root, Deadline deadline) {
  const Call call{Op::kReduce, detail_of(rule, root), deadline};
  const uint64_t steps = steps_for(in.bytes, seg_.slot_bytes);
  for (uint64_t i = 0; i < steps; ++i) {
    const size_t offset = i * seg_.slot_bytes, len = part(in.bytes, offset, seg_.slot_bytes);
    if (seg_.rank != root) {
      copy(begin_slot(call), in.data + offset, len);
      note(call, in.bytes, steps);
      publish();
    } else {
      publish();
      for (int k = 0; k < seg_.num_ranks; ++k)
        sources_[static_cast<size_t>(k)] = k == root ? in.data + offset : peer_slot(call, k, in.bytes);
      whale::reduce(out.data + offset, sources_.data(), seg_.num_ranks, len / kind_bytes(rule.kind), rule.kind,
                    rule.combine, rule.scale);
    }
    end_step();
  }
}

void Collectives::all_reduce(Span in, Span out, Rule rule, Deadline deadline) {
  const Call call{Op::kAllReduce, detail_of(rule), deadline};
  const size_t element = kind_bytes(rule.kind);
  const auto num = static_cast<size_t>(seg_.num_ranks), me = static_cast<size_t>(seg_.rank);
  const bool stream = in.bytes >= kStreamBytes;
  const auto reduce_into = [&](char* to, size_t bytes) {
    whale::reduce(to, sources_.data(), seg_.num_ranks, bytes / element, rule.kind, rule.combine, rule.scale);
  };
  if (in.bytes <= kDirectBytes) {
    char* slot = begin_slot(call);
    copy(slot, in.data, in.bytes);
    note(call, in.bytes, 1);
    publish();
    for_peers([&](int peer) { sources_[static_cast<size_t>(peer)] = peer_slot(call, peer, in.bytes); });
    sources_[me] = in.data;
    reduce_into(out.data, in.bytes);
    end_step();
    return;
  }
  // Rank r reduces the r-th share of every chunk: one step shows the inputs, the next one the results.
  const size_t share = seg_.slot_bytes / num / kLine * kLine;
  const size_t chunk = share * num;
  for (size_t offset = 0; offset < in.bytes; offset += chunk) {
    const size_t left = in.bytes - offset;
    const auto len = [&](size_t k) { return part(left, k * share, share); };
    char* slot = begin_slot(call);
    for (size_t k = 0; k < num; ++k)
      if (k != me) copy(slot + k * share, in.data + offset + k * share, len(k));
    note(call, in.bytes, 0);
    publish();
    for (size_t k = 0; k < num; ++k)
      sources_[k] = k == me ? in.data + offset + me * share
                            : peer_slot(call, static_cast<int>(k), in.bytes) + me * share;
    reduce_into(out.data + offset + me * share, len(me));
    end_step();
    copy(begin_slot(call), out.data + offset + me * share, len(me));
    note(call, in.bytes, 0);
    publish();
    for_peers([&](int peer) {
      const auto k = static_cast<size_t>(peer);
      copy(out.data + offset + k * share, peer_slot(call, peer, in.bytes), len(k), stream);
    });
    end_step();
  }
}

void Collectives::scatter(const std::vector<Span>& in, Span out, int root, Deadline deadline) {
  const Call call{Op::kScatter, static_cast<uint64_t>(root), deadline};
  const auto num = static_cast<size_t>(seg_.num_ranks);
  const size_t share = seg_.slot_bytes / num / kLine * kLine;
  const uint64_t steps = steps_for(out.bytes, share);
  const bool stream = out.bytes >= kStreamBytes;
  for (uint64_t i = 0; i < steps; ++i) {
    const size_t offset = i * share, len = part(out.bytes, offset, share);
    if (seg_.rank == root) {
      char* slot = begin_slot(call);
      for (size_t k = 0; k < num; ++k)
        copy(static_cast<int>(k) == root ? out.data + offset : slot + k * share, in[k].data + offset, len,
             static_cast<int>(k) == root && stream);
      note(call, out.bytes, steps);
      publish();
    } else {
      publish();
      copy(out.data + offset, peer_slot(call, root, out.bytes) + static_cast<size_t>(seg_.rank) * share, len,
           stream);
    }
    end_step();
  }
}

void Collectives::reduce_scatter(const std::vector<Span>& in, Span out, Rule rule, Deadline deadline) {
  const Call call{Op::kReduceScatter, detail_of(rule), deadline};
  const auto num = static_cast<size_t>(seg_.num_ranks), me = static_cast<size_t>(seg_.rank);
  const size_t share = seg_.slot_bytes / num / kLine * kLine;
  const uint64_t steps = steps_for(out.bytes, share);
  for (uint64_t i = 0; i < steps; ++i) {
    const size_t offset = i * share, len = part(out.bytes, offset, share);
    char* slot = begin_slot(call);
    for (size_t k = 0; k < num; ++k)
      if (k != me) copy(slot + k * share, in[k].data + offset, len);
    note(call, out.bytes, steps);
    publish();
    for (size_t k = 0; k < num; ++k)
      sources_[k] =
          k == me ? in[me].data + offset : peer_slot(call, static_cast<int>(k), out.bytes) + me * share;
    whale::reduce(out.data + offset, sources_.data(), seg_.num_ranks, len / kind_bytes(rule.kind), rule.kind,
                  rule.combine, rule.scale);
    end_step();
  }
}

void Collectives::all_to_all(const std::vector<Span>& in, const std::vector<Span>& out, Deadline deadline) {
  const Call call{Op::kAllToAll, 0, deadline};
  const auto num = static_cast<size_t>(seg_.num_ranks), me = static_cast<size_t>(seg_.rank);
  const size_t share = seg_.slot_bytes / num / kLine * kLine;
  uint64_t steps = 1;  // no rank knows the others' sizes: each says how many steps it needs
  size_t total = 0;
  for (const Span& span : out) total += span.bytes;
  const bool stream = total >= kStreamBytes;
  for (const Span& span : in) steps = std::max(steps, steps_for(span.bytes, share));
  for (uint64_t i = 0; i < steps; ++i) {
    const size_t offset = i * share;
    char* slot = begin_slot(call);
    for (size_t k = 0; k < num; ++k)
      if (k != me) copy(slot + k * share, in[k].data + offset, part(in[k].bytes, offset, share));
    note(call, 0, steps);
    for (size_t k = 0; k < num; ++k) seg_.note(seg_.rank, step_)[kBytes + k] = in[k].bytes;
    publish();
    copy(out[me].data + offset, in[me].data + offset, part(in[me].bytes, offset, share), stream);
    for_peers([&](int peer) {
      const Span& to = out[static_cast<size_t>(peer)];
      const char* from = peer_slot(call, peer, to.bytes) + me * share;
      if (i == 0) steps = std::max(steps, seg_.note(peer, step_)[kSteps]);
      copy(to.data + offset, from, part(to.bytes, offset, share), stream);
    });
    end_step();
  }
}

}  // namespace whale

// The collectives of one rank over a Segment, as blocking calls (no torch). One at a time per group.
//
// Everything is made of steps. In a step a rank fills its slot, says so, waits for the slots it needs, reads
// them, and says that it has read. Large messages are many steps, one slot's worth each, so that what one
// rank writes is still in the cache when the others read it: main memory is touched once on the way in and
// once on the way out. Slots form a ring; a rank may run ahead of the slowest reader by the ring's length,
// which is all the back-pressure there is. Every rank of the group takes the same steps in the same order,
// so the step number alone says which slot is meant.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "reduce.h"
#include "segment.h"

namespace whale {

enum class Op : uint8_t {
  kBarrier, kBroadcast, kAllReduce, kReduce, kAllGather, kGather, kScatter, kReduceScatter, kAllToAll
};

struct Span {  // contiguous bytes of one tensor
  char* data = nullptr;
  size_t bytes = 0;
};

struct Rule {  // how elements are combined
  Kind kind = Kind::kU8;
  Combine combine = Combine::kSum;
  double scale = 1.0;
};

class Collectives {
 public:
  explicit Collectives(Segment& segment) : seg_(segment), sources_(static_cast<size_t>(segment.num_ranks)) {}

  // Throw GroupError on a dead peer, a time-out, or ranks that call different things.
  void barrier(Deadline deadline);
  void broadcast(Span data, int root, Deadline deadline);
  void all_reduce(Span in, Span out, Rule rule, Deadline deadline);
  void reduce(Span in, Span out, Rule rule, int root, Deadline deadline);  // out matters on root alone
  // `out` by source rank; on other ranks than a gather's root it is empty.
  void all_gather(Span in, const std::vector<Span>& out, Deadline deadline);
  void gather(Span in, const std::vector<Span>& out, int root, Deadline deadline);
  void scatter(const std::vector<Span>& in, Span out, int root, Deadline deadline);
  void reduce_scatter(const std::vector<Span>& in, Span out, Rule rule, Deadline deadline);
  void all_to_all(const std::vector<Span>& in, const std::vector<Span>& out, Deadline deadline);

 private:
  struct Call {  // what every rank must agree on, and when to give up
    Op op;
    uint64_t detail;  // element type, reduction, root
    Deadline deadline;
  };

  char* begin_slot(const Call& call);  // waits until this step's slot may be overwritten
  void note(const Call& call, uint64_t bytes_each, uint64_t num_steps);
  void publish();
  const char* peer_slot(const Call& call, int peer, uint64_t expected_bytes);
  void end_step();

  void read_all(const Call& call, Span in, const std::vector<Span>& out, bool reads);
  template <class Take>
  void for_peers(Take take) {  // starting behind oneself, so that ranks do not all read the same slot
    for (int i = 1; i < seg_.num_ranks; ++i) take((seg_.rank + i) % seg_.num_ranks);
  }

  Segment& seg_;
  uint64_t step_ = 0;
  std::vector<const void*> sources_;
};

}  // namespace whale

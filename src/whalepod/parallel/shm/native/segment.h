// One process group's shared memory: its layout, how ranks wake each other, how a dead rank is noticed.
//
// Every rank owns a Desk (counters that only it writes, and bells that others ring) and a ring of staging
// slots. There is no lock between processes, so a rank killed at any instant leaves nothing held.
//
// Sleeping needs care. A waiter says "I am asleep", then looks at the condition once more, then sleeps on
// its bell; a notifier changes the condition, then looks for sleepers. A full fence between the two steps on
// either side makes it impossible that each misses the other (Dekker). While nobody sleeps, telling a peer
// costs one load and no system call.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace whale {

using Clock = std::chrono::steady_clock;
using Deadline = Clock::time_point;

constexpr size_t kLine = 128;        // two cache lines: the prefetcher fetches pairs
constexpr uint64_t kNumSlots = 4;    // staging slots of a rank
constexpr uint64_t kMaxRanks = 256;  // of a group; every rank needs a share of each slot

inline size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

struct GroupError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Bell {
  std::atomic<uint32_t> rung;      // the futex word
  std::atomic<uint32_t> sleepers;
};

struct Desk {
  alignas(kLine) std::atomic<uint64_t> wrote;  // steps whose slot this rank has filled
  alignas(kLine) std::atomic<uint64_t> read;   // steps whose slots this rank needs no more
  alignas(kLine) Bell steps;                   // rung for the collectives of this rank
  alignas(kLine) Bell pipes;                   // rung for its sends and receives
  alignas(kLine) std::atomic<uint32_t> left;   // this rank has ended the group in good order
};

struct Pipe {  // bytes from one rank to another; the data lie elsewhere
  alignas(kLine) std::atomic<uint64_t> head;  // written by the sender
  alignas(kLine) std::atomic<uint64_t> tail;  // taken by the receiver
};

struct Header {
  uint64_t nonce[2];
  uint64_t num_ranks;
  uint64_t total_bytes;
  alignas(kLine) std::atomic<uint32_t> broken;  // 0, or 1 + the rank that gave up first
};

static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

class Segment {
 public:
  // Bytes of a group of `num_ranks`; pages are taken only where they are touched.
  static size_t total_bytes(uint64_t num_ranks);
  // Makes an anonymous memory file: it has no name, so nothing stays behind whatever dies.
  static int create(uint64_t num_ranks, uint64_t nonce0, uint64_t nonce1);

  Segment(int fd, int rank, int num_ranks, uint64_t nonce0, uint64_t nonce1, const std::vector<int>& pids);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  Desk& desk(int rank) const;
  char* slot(int rank, uint64_t step) const;    // payload
  uint64_t* note(int rank, uint64_t step) const;  // what the step carries: see collectives.cpp
  Pipe& pipe(int from, int to) const;
  char* pipe_data(int from, int to) const;

  void ring(Bell& bell) const;
  // Sleeps until `ready`, at most until `until`; spins a moment first where cores allow. Throws GroupError
  // when the group is broken or stopped. Returns whether `ready` held.
  bool doze(Bell& bell, const std::function<bool()>& ready, Deadline until) const;
  // Waits for `ready`, which peer must bring about, and says what happened if it never will.
  void await(Bell& bell, int peer, const std::function<bool()>& ready, Deadline deadline, const char* what);

  bool is_gone(int peer) const;  // has ended, or has left the group
  void check() const;            // throws GroupError when the group is broken or stopped
  [[noreturn]] void give_up(const std::string& reason);
  void mark_broken();
  void stop();   // local: whoever waits in this process throws
  void leave();

  const int rank, num_ranks;
  size_t slot_bytes = 0;  // of one staging slot
  size_t pipe_bytes = 0;  // of one pipe's ring, a power of two

 private:
  char* base_ = nullptr;
  size_t bytes_ = 0;
  size_t desks_ = 0, pipes_ = 0, notes_ = 0, slots_ = 0, pipe_data_ = 0;  // offsets
  size_t note_bytes_ = 0;
  static bool every_rank_has_a_core(const std::vector<int>& pids);
  bool may_spin_ = false;
  std::vector<int> pidfds_;
  std::atomic<bool> stopped_{false};
};

}  // namespace whale

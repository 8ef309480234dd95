#include "segment.h"

#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <thread>

namespace whale {
namespace {

using namespace std::chrono_literals;

constexpr auto kSpin = 20us;     // about what going to sleep and being woken costs
constexpr auto kPulse = 250ms;   // how often a sleeper looks whether its peer still lives

struct Layout {
  size_t desks, pipes, notes, note_bytes, slots, slot_bytes, pipe_data, pipe_bytes, total;
  explicit Layout(uint64_t n) {
    const size_t page = 4096;
    // All ranks' slots together should stay in the last-level cache, or staging costs main memory twice.
    slot_bytes = n <= 4 ? size_t{1} << 20 : std::max<size_t>(round_up((4u << 20) / n, page), 64 << 10);
    pipe_bytes = size_t{2} << 20;
    while (pipe_bytes > (64 << 10) && n * n * pipe_bytes > (64u << 20)) pipe_bytes /= 2;
    note_bytes = round_up((8 + n) * sizeof(uint64_t), kLine);
    desks = round_up(sizeof(Header), kLine);
    pipes = desks + n * sizeof(Desk);
    notes = pipes + n * n * sizeof(Pipe);
    slots = round_up(notes + n * kNumSlots * note_bytes, page);
    pipe_data = slots + n * kNumSlots * slot_bytes;
    total = pipe_data + n * n * pipe_bytes;
  }
};

[[noreturn]] void fail(const char* what) { throw GroupError(std::string(what) + ": " + std::strerror(errno)); }

long futex(std::atomic<uint32_t>* word, int op, uint32_t value, const timespec* timeout) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), op, value, timeout, nullptr, 0);
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

size_t Segment::total_bytes(uint64_t num_ranks) { return Layout(num_ranks).total; }

int Segment::create(uint64_t num_ranks, uint64_t nonce0, uint64_t nonce1) {
  if (num_ranks > kMaxRanks) throw GroupError("too many ranks for one host's shared memory");
  const Layout layout(num_ranks);
  int fd = static_cast<int>(syscall(SYS_memfd_create, "whalepod", 1u /* MFD_CLOEXEC */));
  if (fd < 0) fail("memfd_create");
  if (ftruncate(fd, static_cast<off_t>(layout.total)) != 0) fail("ftruncate");
  void* first = mmap(nullptr, sizeof(Header), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (first == MAP_FAILED) fail("mmap");
  auto* header = static_cast<Header*>(first);  // fresh pages are zero, which is every counter's start
  header->nonce[0] = nonce0;
  header->nonce[1] = nonce1;
  header->num_ranks = num_ranks;
  header->total_bytes = layout.total;
  munmap(first, sizeof(Header));
  return fd;
}

Segment::Segment(int fd, int rank, int num_ranks, uint64_t nonce0, uint64_t nonce1, const std::vector<int>& pids)
    : rank(rank), num_ranks(num_ranks) {
  const Layout layout(static_cast<uint64_t>(num_ranks));
  struct stat info {};
  if (fstat(fd, &info) != 0) fail("fstat");
  if (static_cast<size_t>(info.st_size) != layout.total) throw GroupError("another group's memory");
  void* base = mmap(nullptr, layout.total, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) fail("mmap");
  base_ = static_cast<char*>(base);
  bytes_ = layout.total;
  desks_ = layout.desks, pipes_ = layout.pipes, notes_ = layout.notes, slots_ = layout.slots;
  pipe_data_ = layout.pipe_data, note_bytes_ = layout.note_bytes, slot_bytes = layout.slot_bytes;
  pipe_bytes = layout.pipe_bytes;
  const auto* header = reinterpret_cast<const Header*>(base_);
  // Cloned virtual machines share host names, boot ids and process ids; the nonce tells them apart.
  bool mine = header->nonce[0] == nonce0 && header->nonce[1] == nonce1 &&
              header->num_ranks == static_cast<uint64_t>(num_ranks) && header->total_bytes == layout.total;
  for (int pid : pids) pidfds_.push_back(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
  if (!mine || std::any_of(pidfds_.begin(), pidfds_.end(), [](int each) { return each < 0; })) {
    for (int each : pidfds_) close(each);
    munmap(base_, bytes_);
    throw GroupError(mine ? "pidfd_open is not to be had" : "another group's memory");
  }
  may_spin_ = every_rank_has_a_core(pids);
}

// Of all the ranks on this host, of which the group may be a part; each may be bound to cores of its own.
bool Segment::every_rank_has_a_core(const std::vector<int>& pids) {
  cpu_set_t all, own;
  CPU_ZERO(&all);
  for (int pid : pids) {
    if (sched_getaffinity(pid, sizeof own, &own) != 0) return false;
    CPU_OR(&all, &all, &own);
  }
  const char* local = std::getenv("LOCAL_WORLD_SIZE");
  const int neighbours = local == nullptr ? 0 : std::atoi(local);
  if (neighbours <= static_cast<int>(pids.size())) return CPU_COUNT(&all) >= static_cast<int>(pids.size());
  // Ranks outside the group take their share of the same cores.
  return std::thread::hardware_concurrency() >= static_cast<unsigned>(neighbours);
}

Segment::~Segment() {
  for (int fd : pidfds_) close(fd);
  munmap(base_, bytes_);
}

Desk& Segment::desk(int r) const { return reinterpret_cast<Desk*>(base_ + desks_)[r]; }

char* Segment::slot(int r, uint64_t step) const {
  return base_ + slots_ + (static_cast<size_t>(r) * kNumSlots + step % kNumSlots) * slot_bytes;
}

uint64_t* Segment::note(int r, uint64_t step) const {
  const size_t index = static_cast<size_t>(r) * kNumSlots + step % kNumSlots;
  return reinterpret_cast<uint64_t*>(base_ + notes_ + index * note_bytes_);
}

Pipe& Segment::pipe(int from, int to) const {
  return reinterpret_cast<Pipe*>(base_ + pipes_)[static_cast<size_t>(from) * num_ranks + to];
}

char* Segment::pipe_data(int from, int to) const {
  return base_ + pipe_data_ + (static_cast<size_t>(from) * num_ranks + to) * pipe_bytes;
}

void Segment::ring(Bell& bell) const {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (bell.sleepers.load(std::memory_order_relaxed) == 0) return;
  bell.rung.fetch_add(1, std::memory_order_release);
  futex(&bell.rung, FUTEX_WAKE, INT_MAX, nullptr);
}

bool Segment::doze(Bell& bell, const std::function<bool()>& ready, Deadline until) const {
  if (ready()) return true;
  if (may_spin_) {
    const auto stop_spinning = Clock::now() + kSpin;
    do {
      for (int i = 0; i < 32; ++i) relax();
      if (ready()) return true;
    } while (Clock::now() < stop_spinning);
  }
  while (true) {
    const uint32_t seen = bell.rung.load(std::memory_order_acquire);
    bell.sleepers.fetch_add(1, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    bool done = ready();
    const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(until - Clock::now());
    if (!done && left > 0ns && !stopped_.load()) {
      const timespec wait{static_cast<time_t>(left.count() / 1000000000), left.count() % 1000000000};
      futex(&bell.rung, FUTEX_WAIT, seen, &wait);
    }
    bell.sleepers.fetch_sub(1, std::memory_order_relaxed);
    if (done || ready()) return true;
    check();
    if (Clock::now() >= until) return false;
  }
}

void Segment::await(Bell& bell, int peer, const std::function<bool()>& ready, Deadline deadline,
                    const char* what) {
  if (ready()) return;
  while (!doze(bell, ready, std::min<Deadline>(deadline, Clock::now() + kPulse))) {
    // The order matters: a peer's last act may come between our look and its end.
    if (is_gone(peer) && !ready())
      give_up("rank " + std::to_string(peer) + " is gone: it died or left the group, while rank " +
              std::to_string(rank) + " waited for it in " + what);
    if (Clock::now() >= deadline)
      give_up("timed out: rank " + std::to_string(rank) + " waited for rank " + std::to_string(peer) + " in " +
              what);
  }
}

bool Segment::is_gone(int peer) const {
  if (desk(peer).left.load(std::memory_order_acquire)) return true;
  pollfd end{pidfds_[static_cast<size_t>(peer)], POLLIN, 0};
  return poll(&end, 1, 0) == 1;
}

void Segment::check() const {
  if (stopped_.load()) throw GroupError("the process group was destroyed");
  const uint32_t broken = reinterpret_cast<Header*>(base_)->broken.load(std::memory_order_acquire);
  if (broken)
    throw GroupError("the process group is broken: rank " + std::to_string(broken - 1) +
                     " gave up first, its error says why");
}

void Segment::mark_broken() {
  uint32_t none = 0;
  reinterpret_cast<Header*>(base_)->broken.compare_exchange_strong(none, static_cast<uint32_t>(rank) + 1);
  for (int peer = 0; peer < num_ranks; ++peer) {
    ring(desk(peer).steps);
    ring(desk(peer).pipes);
  }
}

void Segment::give_up(const std::string& reason) {
  mark_broken();
  throw GroupError(reason);
}

void Segment::stop() {
  stopped_.store(true);
  ring(desk(rank).steps);
  ring(desk(rank).pipes);
}

void Segment::leave() {
  desk(rank).left.store(1, std::memory_order_release);
  for (int peer = 0; peer < num_ranks; ++peer) {
    ring(desk(peer).steps);
    ring(desk(peer).pipes);
  }
}

}  // namespace whale

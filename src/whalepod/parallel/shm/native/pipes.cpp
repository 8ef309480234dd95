#include "pipes.h"

#include <algorithm>
#include <cstring>

#include "copy.h"

namespace whale {
namespace {

constexpr auto kPulse = std::chrono::milliseconds(250);  // how often deadlines and peers are looked at
constexpr size_t kPiece = 1 << 20;                       // bytes moved before the other side is told
constexpr size_t kUnit = 64;                             // messages start at multiples of it

}  // namespace

Pipes::Pipes(Segment& segment)
    : seg_(segment), in_(static_cast<size_t>(segment.num_ranks)), out_(static_cast<size_t>(segment.num_ranks)) {}

void Pipes::post_send(std::shared_ptr<Message> message) {
  {
    std::lock_guard<std::mutex> guard(posted_lock_);
    posted_sends_.push_back(std::move(message));
    ++num_posted_, ++num_open_, ++num_sends_;
  }
  seg_.ring(seg_.desk(seg_.rank).pipes);
}

void Pipes::post_recv(std::shared_ptr<Message> message) {
  {
    std::lock_guard<std::mutex> guard(posted_lock_);
    posted_recvs_.push_back(std::move(message));
    ++num_posted_, ++num_open_;
  }
  seg_.ring(seg_.desk(seg_.rank).pipes);
}

void Pipes::take_posted() {
  std::deque<std::shared_ptr<Message>> sends, recvs;
  {
    std::lock_guard<std::mutex> guard(posted_lock_);
    sends.swap(posted_sends_);
    recvs.swap(posted_recvs_);
    num_posted_ = 0;
  }
  for (auto& message : sends) out_[static_cast<size_t>(message->peer)].queue.push_back(std::move(message));
  for (auto& message : recvs)
    if (!give_kept(message)) recvs_.push_back(std::move(message));
}

void Pipes::settle(const std::shared_ptr<Message>& message, int peer, uint64_t bytes, const std::string& error) {
  message->peer = peer;
  std::string problem = error;
  if (problem.empty() && bytes != message->bytes)
    problem = "rank " + std::to_string(peer) + " sent " + std::to_string(bytes) + " bytes, rank " +
              std::to_string(seg_.rank) + " expected " + std::to_string(message->bytes);
  --num_open_;
  message->done(problem);
}

bool Pipes::give_kept(const std::shared_ptr<Message>& message) {
  for (int peer = 0; peer < seg_.num_ranks; ++peer) {
    if (message->peer != kAnySource && message->peer != peer) continue;
    auto& kept = in_[static_cast<size_t>(peer)].kept;
    const auto found =
        std::find_if(kept.begin(), kept.end(), [&](const Kept& each) { return each.tag == message->tag; });
    if (found == kept.end()) continue;
    std::copy_n(found->data.data(), std::min(found->data.size(), message->bytes), message->data);
    const uint64_t bytes = found->data.size();
    kept.erase(found);
    settle(message, peer, bytes);
    return true;
  }
  return false;
}

std::shared_ptr<Message> Pipes::match(int peer, int64_t tag) {
  const auto found = std::find_if(recvs_.begin(), recvs_.end(), [&](const auto& message) {
    return message->tag == tag && (message->peer == peer || message->peer == kAnySource);
  });
  if (found == recvs_.end()) return nullptr;
  auto message = *found;
  recvs_.erase(found);
  return message;
}

bool Pipes::wants(int peer) const {
  return std::any_of(recvs_.begin(), recvs_.end(), [&](const auto& message) {
    return message->peer == peer || message->peer == kAnySource;
  });
}

// Bytes that may be written now. One unit is kept back, so that rounding up a message's end always fits.
size_t Pipes::space(int peer) const {
  const Pipe& pipe = seg_.pipe(seg_.rank, peer);
  const size_t used = pipe.head.load(std::memory_order_relaxed) - pipe.tail.load(std::memory_order_acquire);
  return seg_.pipe_bytes - kUnit - std::min(used, seg_.pipe_bytes - kUnit);
}

// Puts what fits into the pipe to `peer`; whether anything moved.
bool Pipes::push(int peer) {
  Outbound& out = out_[static_cast<size_t>(peer)];
  Pipe& pipe = seg_.pipe(seg_.rank, peer);
  char* ring = seg_.pipe_data(seg_.rank, peer);
  bool moved = false;
  while (!out.queue.empty()) {
    auto& message = out.queue.front();
    uint64_t head = pipe.head.load(std::memory_order_relaxed);
    size_t room = space(peer);
    if (!out.head_sent) {
      if (room < kUnit) return moved;
      const Head record{message->bytes, message->tag};
      std::memcpy(ring + head % seg_.pipe_bytes, &record, sizeof record);
      head += kUnit, room -= kUnit;
      out.head_sent = true, out.moved = 0;
    }
    const size_t at = head % seg_.pipe_bytes;
    const size_t len = std::min({message->bytes - out.moved, room, seg_.pipe_bytes - at, kPiece});
    copy(ring + at, message->data + out.moved, len);
    out.moved += len, head += len;
    const bool last = out.moved == message->bytes;
    if (last) head = round_up(head, kUnit);
    if (head == pipe.head.load(std::memory_order_relaxed)) return moved;
    pipe.head.store(head, std::memory_order_release);
    seg_.ring(seg_.desk(peer).pipes);
    moved = true;
    if (last) {
      const auto sent = std::move(message);
      out.queue.pop_front();
      out.head_sent = false;
      --num_sends_;
      settle(sent, peer, sent->bytes);
    }
  }
  return moved;
}

// Takes what is there out of the pipe from `peer`; whether anything moved.
bool Pipes::pull(int peer) {
  Inbound& in = in_[static_cast<size_t>(peer)];
  Pipe& pipe = seg_.pipe(peer, seg_.rank);
  const char* ring = seg_.pipe_data(peer, seg_.rank);
  bool moved = false;
  while (true) {
    uint64_t tail = pipe.tail.load(std::memory_order_relaxed);
    const uint64_t start = tail;
    const size_t there = pipe.head.load(std::memory_order_acquire) - tail;
    if (there == 0) return moved;
    if (!in.open) {
      std::memcpy(&in.head, ring + tail % seg_.pipe_bytes, sizeof in.head);
      in.to = match(peer, in.head.tag);
      if (!in.to) {
        if (!wants(peer)) return moved;
        in.aside = {in.head.tag, std::vector<char>(in.head.bytes)};
      }
      in.open = true, in.moved = 0;
      tail += kUnit;
    }
    const size_t at = tail % seg_.pipe_bytes;
    const size_t len = std::min({in.head.bytes - in.moved, there - (tail - start), seg_.pipe_bytes - at, kPiece});
    char* to = in.to ? in.to->data : in.aside.data.data();
    const size_t room = in.to ? in.to->bytes : in.head.bytes;  // a message too long for its receive is dropped
    if (in.moved < room && len) 
      copy(to + in.moved, ring + at, std::min(len, room - in.moved), in.head.bytes >= kStreamBytes);
    in.moved += len, tail += len;
    const bool last = in.moved == in.head.bytes;
    if (last) tail = round_up(tail, kUnit);
    pipe.tail.store(tail, std::memory_order_release);
    seg_.ring(seg_.desk(peer).pipes);
    moved = true;
    if (last) {
      in.open = false;
      if (in.to) {
        settle(std::exchange(in.to, nullptr), peer, in.head.bytes);
      } else {
        in.kept.push_back(std::move(in.aside));
        if (const auto late = match(peer, in.head.tag)) give_kept(late);  // posted while it was being put aside
      }
    }
  }
}

bool Pipes::outstanding() const {
  return !recvs_.empty() || std::any_of(in_.begin(), in_.end(), [](const Inbound& in) { return in.open; }) ||
         std::any_of(out_.begin(), out_.end(), [](const Outbound& out) { return !out.queue.empty(); });
}

// Ends what can no longer happen: the peer is gone, or the time is up.
void Pipes::expire(const std::vector<bool>& gone) {
  const auto now = Clock::now();
  const auto problem = [&](const Message& message, const char* what) -> std::string {
    const bool any = message.peer == kAnySource;
    const std::string who = any ? "any rank" : "rank " + std::to_string(message.peer);
    if (now >= message.deadline) return std::string("timed out in ") + what + " " + who;
    const bool never = any ? std::count(gone.begin(), gone.end(), false) <= 1  // this rank itself
                           : gone[static_cast<size_t>(message.peer)];
    return never ? who + " is gone: it died or left the group, in " + what : "";
  };
  for (int peer = 0; peer < seg_.num_ranks; ++peer) {
    auto& out = out_[static_cast<size_t>(peer)];
    if (!out.queue.empty()) {
      const auto error = problem(*out.queue.front(), "a send to");
      // What is half sent cannot be taken back, so the pipe is of no use any more.
      if (!error.empty()) seg_.give_up(error);
    }
    auto& in = in_[static_cast<size_t>(peer)];
    if (in.open && in.to) {
      in.to->peer = peer;
      const auto error = problem(*in.to, "a receive from");
      if (!error.empty()) seg_.give_up(error);
    }
  }
  for (auto it = recvs_.begin(); it != recvs_.end();) {
    const auto error = problem(**it, "a receive from");
    if (error.empty()) {
      ++it;
      continue;
    }
    const auto message = *it;
    it = recvs_.erase(it);
    settle(message, message->peer, 0, error);
  }
}

void Pipes::run(const std::function<bool()>& finished) {
  Bell& bell = seg_.desk(seg_.rank).pipes;
  auto next_look = Clock::now() + kPulse;
  seg_.check();
  while (true) {
    take_posted();
    bool moved = false;
    for (int peer = 0; peer < seg_.num_ranks; ++peer) {
      moved |= push(peer);
      moved |= pull(peer);
    }
    if (finished() || (!outstanding() && num_posted_.load() == 0)) return;
    if (!moved) {
      seg_.check();
      const auto ready = [&] {
        if (num_posted_.load() != 0) return true;
        for (int peer = 0; peer < seg_.num_ranks; ++peer) {
          const auto& out = out_[static_cast<size_t>(peer)];
          if (!out.queue.empty() && space(peer) >= kUnit) return true;
          const Inbound& in = in_[static_cast<size_t>(peer)];
          Pipe& from = seg_.pipe(peer, seg_.rank);
          if ((in.open || wants(peer)) &&
              from.head.load(std::memory_order_acquire) != from.tail.load(std::memory_order_relaxed))
            return true;
        }
        return false;
      };
      seg_.doze(bell, ready, next_look);
    }
    if (Clock::now() >= next_look) {
      next_look = Clock::now() + kPulse;
      std::vector<bool> gone;
      for (int peer = 0; peer < seg_.num_ranks; ++peer) gone.push_back(seg_.is_gone(peer));
      // After the look, not before: a peer's last bytes may have come between our last move and its end.
      for (int peer = 0; peer < seg_.num_ranks; ++peer) push(peer), pull(peer);
      expire(gone);
    }
  }
}

void Pipes::fail_all(const std::string& error) {
  take_posted();
  std::vector<std::shared_ptr<Message>> failed(recvs_.begin(), recvs_.end());
  recvs_.clear();
  for (Inbound& in : in_) {
    if (in.to) failed.push_back(std::exchange(in.to, nullptr));
    in.open = false;
  }
  num_sends_ = 0;
  for (Outbound& out : out_) {
    failed.insert(failed.end(), out.queue.begin(), out.queue.end());
    out.queue.clear();
  }
  for (auto& message : failed) settle(message, message->peer, 0, error);
}

}  // namespace whale

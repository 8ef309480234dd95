// Sends and receives of one rank over a Segment (no torch).
//
// Between every ordered pair of ranks lies a pipe: a ring of bytes with one writer and one reader. A message
// is a head (tag, size) and its bytes. A send is over when its last byte is in the pipe, so a small one ends
// at once. The reader matches the message at the mouth of a pipe with the first receive posted for its source
// and tag. If there is none, but another receive waits for that source, the message is put aside in memory,
// so that sends may be received in another order than they were sent; otherwise it stays in the pipe, and
// the pipe's size holds the sender back.
#pragma once

#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "segment.h"

namespace whale {

constexpr int kAnySource = -1;

struct Message {  // a send or a receive that has been posted
  int peer = 0;   // kAnySource for a receive from anyone; then the source, once known
  int64_t tag = 0;
  char* data = nullptr;
  size_t bytes = 0;
  Deadline deadline;
  std::function<void(const std::string& error)> done;  // an empty error is success
};

class Pipes {
 public:
  explicit Pipes(Segment& segment);

  // May be called by any thread at any time.
  void post_send(std::shared_ptr<Message> message);
  void post_recv(std::shared_ptr<Message> message);
  bool idle() const { return num_open_.load() == 0; }
  bool sent_all() const { return num_sends_.load() == 0; }

  // Moves what can be moved until `finished` holds or nothing is posted. One caller at a time.
  void run(const std::function<bool()>& finished);
  void fail_all(const std::string& error);

 private:
  struct Head {
    uint64_t bytes;
    int64_t tag;
  };
  struct Kept {
    int64_t tag;
    std::vector<char> data;
  };
  struct Inbound {  // the message that is coming out of one pipe
    bool open = false;
    Head head{};
    uint64_t moved = 0;
    std::shared_ptr<Message> to;  // empty while it is put aside
    Kept aside;
    std::deque<Kept> kept;  // whole messages put aside, oldest first
  };
  struct Outbound {
    std::deque<std::shared_ptr<Message>> queue;
    bool head_sent = false;
    uint64_t moved = 0;
  };

  void take_posted();
  bool push(int peer);
  bool pull(int peer);
  bool give_kept(const std::shared_ptr<Message>& message);
  std::shared_ptr<Message> match(int peer, int64_t tag);
  bool wants(int peer) const;
  void settle(const std::shared_ptr<Message>& message, int peer, uint64_t bytes, const std::string& error = "");
  void expire(const std::vector<bool>& gone);
  size_t space(int peer) const;
  bool outstanding() const;

  Segment& seg_;
  std::mutex posted_lock_;
  std::deque<std::shared_ptr<Message>> posted_sends_, posted_recvs_;
  std::atomic<uint64_t> num_posted_{0};
  std::atomic<uint64_t> num_open_{0}, num_sends_{0};
  std::vector<Inbound> in_;
  std::vector<Outbound> out_;
  std::list<std::shared_ptr<Message>> recvs_;
};

}  // namespace whale

// Who moves the bytes: the thread that waits for them, else a thread of the group's own.
//
// An asynchronous call returns at once and wakes the group's thread. A caller that comes to wait takes over
// if the thread has not begun: handing work between threads and back costs two wake-ups, which is most of a
// small collective's time. A synchronous call never touches the thread.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "collectives.h"
#include "pipes.h"

namespace whale {

class Driver {
 public:
  virtual ~Driver() = default;
  // Runs until `finished` if nobody else is running, else sees to it that somebody does.
  void drive(const std::function<bool()>& finished);
  void kick();  // there is work: wakes the thread, starts it the first time
  void join();  // ends the thread; the Segment must have been stopped

 protected:
  virtual void run(const std::function<bool()>& finished) = 0;  // until `finished` or idle; must not throw
  virtual bool is_idle() = 0;

 private:
  void loop();
  std::mutex running_;  // held by whoever runs
  std::mutex lock_;
  std::condition_variable wake_;
  bool kicked_ = false, ended_ = false;
  std::thread thread_;
};

struct Job {  // one collective; `done` gets an empty string on success
  std::function<void(Collectives&)> run;
  std::function<void(const std::string& error)> done;
};

class StepDriver final : public Driver {  // collectives, strictly in the order of their calls
 public:
  explicit StepDriver(Segment& segment) : segment_(segment), collectives_(segment) {}
  void push(Job job);
  bool is_idle() override { return num_open_.load() == 0; }

 protected:
  void run(const std::function<bool()>& finished) override;

 private:
  Segment& segment_;
  Collectives collectives_;
  std::mutex queue_lock_;
  std::deque<Job> queue_;
  std::atomic<uint64_t> num_open_{0};
};

class PipeDriver final : public Driver {
 public:
  explicit PipeDriver(Segment& segment) : pipes(segment) {}
  bool is_idle() override { return pipes.idle(); }
  Pipes pipes;

 protected:
  void run(const std::function<bool()>& finished) override;
};

}  // namespace whale

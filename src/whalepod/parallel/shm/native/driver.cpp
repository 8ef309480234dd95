#include "driver.h"

#include <utility>

namespace whale {

void Driver::drive(const std::function<bool()>& finished) {
  if (running_.try_lock()) {
    run(finished);
    running_.unlock();
    if (is_idle()) return;
  }
  kick();
}

void Driver::kick() {
  std::lock_guard<std::mutex> guard(lock_);
  if (ended_) return;
  kicked_ = true;
  if (!thread_.joinable()) thread_ = std::thread([this] { loop(); });
  wake_.notify_one();
}

void Driver::loop() {
  while (true) {
    {
      std::unique_lock<std::mutex> guard(lock_);
      wake_.wait(guard, [this] { return kicked_ || ended_; });
      if (ended_) break;
      kicked_ = false;
    }
    std::lock_guard<std::mutex> guard(running_);
    run([] { return false; });
  }
}

void Driver::join() {
  {
    std::lock_guard<std::mutex> guard(lock_);
    ended_ = true;
    wake_.notify_one();
  }
  if (thread_.joinable()) thread_.join();
  std::lock_guard<std::mutex> guard(running_);
  run([] { return false; });  // the Segment is stopped: what is left fails here
}

void StepDriver::push(Job job) {
  std::lock_guard<std::mutex> guard(queue_lock_);
  queue_.push_back(std::move(job));
  ++num_open_;
}

void StepDriver::run(const std::function<bool()>& finished) {
  while (!finished()) {
    Job job;
    {
      std::lock_guard<std::mutex> guard(queue_lock_);
      if (queue_.empty()) return;
      job = std::move(queue_.front());
      queue_.pop_front();
    }
    std::string error;
    try {
      segment_.check();
      job.run(collectives_);
    } catch (const std::exception& problem) {
      error = problem.what();
    }
    job.done(error);
    --num_open_;
  }
}

void PipeDriver::run(const std::function<bool()>& finished) {
  try {
    pipes.run(finished);
  } catch (const std::exception& problem) {
    pipes.fail_all(problem.what());
  }
}

}  // namespace whale

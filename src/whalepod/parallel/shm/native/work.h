// What c10d hands to the caller of a collective: waits, errors, futures.
#pragma once

#include <torch/csrc/distributed/c10d/Work.hpp>

#include <memory>

#include "driver.h"

namespace whale {

struct Core {  // everything of a group that unfinished work needs
  Core(int fd, int rank, int size, uint64_t nonce0, uint64_t nonce1, const std::vector<int>& pids)
      : segment(fd, rank, size, nonce0, nonce1, pids), steps(segment), pipes(segment) {}
  Segment segment;
  StepDriver steps;
  PipeDriver pipes;
};

class ShmWork final : public c10d::Work {
 public:
  ShmWork(std::shared_ptr<Core> core, Driver& driver, c10d::OpType type, const char* title,
          std::vector<at::Tensor> outputs, const std::optional<std::vector<at::Tensor>>& shown);

  bool wait(std::chrono::milliseconds timeout) override;
  int sourceRank() const override { return source_; }
  std::vector<at::Tensor> result() override { return outputs_; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  uint64_t getSequencenumber() const override { return sequence; }

  void settle(const std::string& error);
  void set_source(int rank) { source_ = rank; }
  uint64_t sequence = 0;

 private:
  void mark(c10::ivalue::Future& future);
  std::shared_ptr<Core> core_;
  Driver& driver_;
  std::vector<at::Tensor> outputs_;
  std::atomic<int> source_{-1};
  std::mutex future_lock_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

}  // namespace whale

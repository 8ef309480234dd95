#include "work.h"

#include <ATen/core/ivalue.h>
#include <c10/util/Exception.h>

namespace whale {

ShmWork::ShmWork(std::shared_ptr<Core> core, Driver& driver, c10d::OpType type, const char* title,
                 std::vector<at::Tensor> outputs, const std::optional<std::vector<at::Tensor>>& shown)
    : Work(core->segment.rank, type, title, shown),
      core_(std::move(core)),
      driver_(driver),
      outputs_(std::move(outputs)) {}

bool ShmWork::wait(std::chrono::milliseconds timeout) {
  if (timeout == kNoTimeout) {
    if (!isCompleted()) driver_.drive([this] { return isCompleted(); });
  } else if (!isCompleted()) {
    driver_.kick();  // whoever runs cannot stop half-way, so a caller in a hurry only looks on
  }
  return Work::wait(timeout);
}

void ShmWork::settle(const std::string& error) {
  std::exception_ptr problem;
  if (!error.empty()) {
    problem = std::make_exception_ptr(
        c10::DistBackendError({__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, "shared memory: " + error));
  }
  finish(problem);
  std::lock_guard<std::mutex> guard(future_lock_);
  if (future_) mark(*future_);
}

void ShmWork::mark(c10::ivalue::Future& future) {
  if (const auto problem = exception()) {
    future.setErrorIfNeeded(problem);
  } else {
    future.markCompleted(c10::IValue(outputs_));
  }
}

c10::intrusive_ptr<c10::ivalue::Future> ShmWork::getFuture() {
  std::lock_guard<std::mutex> guard(future_lock_);
  if (!future_) {
    future_ = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
    if (isCompleted()) mark(*future_);
  }
  return future_;
}

}  // namespace whale

// The c10d face of a group over shared memory: checks arguments, lays out memory, queues the work.
//
// What it does not carry (sparse tensors, odd types or reductions) goes to gloo, made when first needed:
// all ranks see the same types and reductions, so they turn to it together.
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>

#include <pybind11/chrono.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <unistd.h>

#include "tensors.h"
#include "work.h"

namespace whale {
namespace {

using c10d::OpType;
using c10d::Work;
using WorkPtr = c10::intrusive_ptr<Work>;
using Factory = std::function<c10::intrusive_ptr<c10d::Backend>()>;

class ShmBackend final : public c10d::Backend {
 public:
  ShmBackend(int fd, int rank, int size, std::chrono::milliseconds timeout, uint64_t nonce0, uint64_t nonce1,
             const std::vector<int>& pids, Factory make_gloo)
      : Backend(rank, size),
        core_(std::make_shared<Core>(fd, rank, size, nonce0, nonce1, pids)),
        timeout_(timeout),
        make_gloo_(std::move(make_gloo)),
        pid_(getpid()) {
    init();
  }
  ~ShmBackend() override { shutdown(); }

  const std::string getBackendName() const override { return "whale"; }
  void setTimeout(std::chrono::milliseconds timeout) override { timeout_ = timeout; }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return sequence_; }
  c10::intrusive_ptr<Options> getBackendOptions() override {
    return c10::make_intrusive<Options>("whale", timeout_.load());
  }

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& opts) override {
    if (!are_plain(tensors)) return gloo().broadcast(tensors, opts);
    const Target data(tensors.at(static_cast<size_t>(opts.rootTensor)), true);
    return queue(OpType::BROADCAST, "whale:broadcast", tensors, tensors, opts,
                 [data, root = opts.rootRank](Collectives& run, Deadline until) {
                   run.broadcast(span(data.flat), static_cast<int>(root), until);
                   data.write_back();
                 });
  }

  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& opts) override {
    TORCH_CHECK(tensors.size() == 1, "allreduce takes one tensor");
    const auto rule = opts.sparseIndices ? std::nullopt : rule_of(tensors[0], opts.reduceOp);
    if (!rule) return gloo().allreduce(tensors, opts);
    return reduce_each(OpType::ALLREDUCE, "whale:all_reduce", tensors, *rule, opts);
  }

  WorkPtr allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& opts) override {
    return gloo().allreduce_sparse(tensors, opts);
  }

  WorkPtr allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& opts) override {
    TORCH_CHECK(!tensors.empty(), "allreduce_coalesced takes at least one tensor");
    for (const Tensor& t : tensors)
      if (!rule_of(t, opts.reduceOp)) return gloo().allreduce_coalesced(tensors, opts);
    // Types may differ from tensor to tensor; the reduction is one.
    std::vector<std::pair<Target, Rule>> parts;
    for (const Tensor& t : tensors) parts.emplace_back(Target(t, true), *rule_of(t, opts.reduceOp));
    return queue(OpType::ALLREDUCE_COALESCED, "whale:all_reduce", tensors, tensors, opts,
                 [parts](Collectives& run, Deadline until) {
                   for (const auto& [data, rule] : parts) {
                     run.all_reduce(span(data.flat), span(data.flat), rule, until);
                     data.write_back();
                   }
                 });
  }

  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& opts) override {
    const Tensor& tensor = tensors.at(static_cast<size_t>(opts.rootTensor));
    const auto rule = rule_of(tensor, opts.reduceOp);
    if (!rule) return gloo().reduce(tensors, opts);
    const Target data(tensor, true);
    return queue(OpType::REDUCE, "whale:reduce", tensors, tensors, opts,
                 [data, rule, root = opts.rootRank](Collectives& run, Deadline until) {
                   run.reduce(span(data.flat), span(data.flat), *rule, static_cast<int>(root), until);
                   data.write_back();
                 });
  }

  WorkPtr allgather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) override {
    TORCH_CHECK(inputs.size() == 1 && outputs.size() == 1 && static_cast<int>(outputs[0].size()) == size_,
                "allgather takes one tensor and a list of ", size_);
    if (!are_plain(inputs) || !are_plain(outputs[0])) return gloo().allgather(outputs, inputs, opts);
    check_same(outputs[0], inputs[0], "allgather");
    return queue(OpType::ALLGATHER, "whale:all_gather", inputs, outputs[0], opts,
                 [in = flat(inputs[0]), out = targets(outputs[0])](Collectives& run, Deadline until) {
                   run.all_gather(span(in), spans(flats(out)), until);
                   write_back(out);
                 });
  }

  WorkPtr _allgather_base(Tensor& output, Tensor& input, const c10d::AllgatherOptions& opts) override {
    if (!is_plain(output) || !is_plain(input)) return gloo()._allgather_base(output, input, opts);
    Tensors outputs{output}, inputs{input};
    return gather_each(OpType::_ALLGATHER_BASE, outputs, inputs, opts);
  }

  WorkPtr allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::AllgatherOptions& opts) override {
    if (!are_plain(outputs) || !are_plain(inputs))
      return gloo().allgather_into_tensor_coalesced(outputs, inputs, opts);
    return gather_each(OpType::COALESCED, outputs, inputs, opts);
  }

  WorkPtr allgather_coalesced(std::vector<Tensors>& outputs, Tensors& inputs,
                              const c10d::AllgatherOptions& opts) override {
    return gloo().allgather_coalesced(outputs, inputs, opts);
  }

  WorkPtr gather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& opts) override {
    TORCH_CHECK(inputs.size() == 1, "gather takes one tensor");
    const bool is_root = opts.rootRank == rank_;
    TORCH_CHECK(is_root ? outputs.size() == 1 && static_cast<int>(outputs[0].size()) == size_ : outputs.empty(),
                "gather: the root, and only the root, gives a list of ", size_, " tensors");
    if (!are_plain(inputs)) return gloo().gather(outputs, inputs, opts);
    const Tensors list = is_root ? outputs[0] : Tensors{};
    check_same(list, inputs[0], "gather");
    return queue(OpType::GATHER, "whale:gather", inputs, list, opts,
                 [in = flat(inputs[0]), out = targets(list), root = opts.rootRank](Collectives& run,
                                                                                         Deadline until) {
                   run.gather(span(in), spans(flats(out)), static_cast<int>(root), until);
                   write_back(out);
                 });
  }

  WorkPtr scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& opts) override {
    TORCH_CHECK(outputs.size() == 1, "scatter takes one output");
    const bool is_root = opts.rootRank == rank_;
    TORCH_CHECK(is_root ? inputs.size() == 1 && static_cast<int>(inputs[0].size()) == size_ : inputs.empty(),
                "scatter: the root, and only the root, gives a list of ", size_, " tensors");
    if (!are_plain(outputs)) return gloo().scatter(outputs, inputs, opts);
    const Tensors list = is_root ? inputs[0] : Tensors{};
    check_same(list, outputs[0], "scatter");
    return queue(OpType::SCATTER, "whale:scatter", list, outputs, opts,
                 [in = flat(list), out = Target(outputs[0]), root = opts.rootRank](Collectives& run,
                                                                                        Deadline until) {
                   run.scatter(spans(in), span(out.flat), static_cast<int>(root), until);
                   out.write_back();
                 });
  }

  WorkPtr reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                         const c10d::ReduceScatterOptions& opts) override {
    TORCH_CHECK(outputs.size() == 1 && inputs.size() == 1 && static_cast<int>(inputs[0].size()) == size_,
                "reduce_scatter takes one output and a list of ", size_);
    const auto rule = rule_of(outputs[0], opts.reduceOp);
    if (!rule || !are_plain(inputs[0])) return gloo().reduce_scatter(outputs, inputs, opts);
    check_same(inputs[0], outputs[0], "reduce_scatter");
    return queue(OpType::REDUCE_SCATTER, "whale:reduce_scatter", inputs[0], outputs, opts,
                 [in = flat(inputs[0]), out = Target(outputs[0]), rule](Collectives& run, Deadline until) {
                   run.reduce_scatter(spans(in), span(out.flat), *rule, until);
                   out.write_back();
                 });
  }

  WorkPtr _reduce_scatter_base(Tensor& output, Tensor& input, const c10d::ReduceScatterOptions& opts) override {
    if (!rule_of(output, opts.reduceOp) || !is_plain(input))
      return gloo()._reduce_scatter_base(output, input, opts);
    Tensors outputs{output}, inputs{input};
    return reduce_scatter_each(OpType::_REDUCE_SCATTER_BASE, outputs, inputs, opts);
  }

  WorkPtr reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::ReduceScatterOptions& opts) override {
    bool carried = are_plain(inputs);
    for (const Tensor& t : outputs) carried = carried && rule_of(t, opts.reduceOp);
    if (!carried) return gloo().reduce_scatter_tensor_coalesced(outputs, inputs, opts);
    return reduce_scatter_each(OpType::REDUCE_SCATTER_TENSOR_COALESCED, outputs, inputs, opts);
  }

  // Peers compare sizes with each other as they copy; what a rank keeps is compared here.
  void check_own(size_t out, size_t in) const {
    TORCH_CHECK(out == in, "all_to_all: rank ", rank_, " sends itself ", in, " bytes but expects ", out);
  }
  WorkPtr alltoall_base(Tensor& output, Tensor& input, std::vector<int64_t>& output_splits,
                        std::vector<int64_t>& input_splits, const c10d::AllToAllOptions& opts) override {
    if (!is_plain(output) || !is_plain(input))
      return gloo().alltoall_base(output, input, output_splits, input_splits, opts);
    TORCH_CHECK(output.scalar_type() == input.scalar_type(), "all_to_all_single: types differ");
    const Target out(output);
    const Tensor in = flat(input);
    auto to = rows(out.flat, output_splits, size_), from = rows(in, input_splits, size_);
    check_own(to[rank_].bytes, from[rank_].bytes);
    return queue(OpType::ALLTOALL_BASE, "whale:all_to_all", {input}, {output}, opts,
                 [in, out, from = std::move(from), to = std::move(to)](Collectives& run, Deadline until) {
                   run.all_to_all(from, to, until);
                   out.write_back();
                 });
  }

  WorkPtr alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& opts) override {
    TORCH_CHECK(static_cast<int>(outputs.size()) == size_ && static_cast<int>(inputs.size()) == size_,
                "all_to_all takes lists of ", size_, " tensors");
    if (!are_plain(outputs) || !are_plain(inputs)) return gloo().alltoall(outputs, inputs, opts);
    check_own(outputs[rank_].nbytes(), inputs[rank_].nbytes());
    return queue(OpType::ALLTOALL, "whale:all_to_all", inputs, outputs, opts,
                 [in = flat(inputs), out = targets(outputs)](Collectives& run, Deadline until) {
                   run.all_to_all(spans(in), spans(flats(out)), until);
                   write_back(out);
                 });
  }

  WorkPtr barrier(const c10d::BarrierOptions& opts) override {
    return queue(OpType::BARRIER, "whale:barrier", {}, {}, opts,
                 [](Collectives& run, Deadline until) { run.barrier(until); });
  }

  WorkPtr send(Tensors& tensors, int peer, int tag) override {
    const Tensor in = flat(tensors.at(0));
    return post(true, OpType::SEND, "whale:send", tensors, peer, tag, span(in), [in] {});
  }
  WorkPtr recv(Tensors& tensors, int peer, int tag) override {
    const Target out(tensors.at(0));
    return post(false, OpType::RECV, "whale:recv", tensors, peer, tag, span(out.flat),
                [out] { out.write_back(); });
  }
  WorkPtr recvAnysource(Tensors& tensors, int tag) override {
    const Target out(tensors.at(0));
    return post(false, OpType::RECVANYSOURCE, "whale:recv", tensors, kAnySource, tag, span(out.flat),
                [out] { out.write_back(); });
  }

  void abort() override { end(std::chrono::milliseconds(0)); }
  // What was called and not yet waited for still happens, within bounds: the peers count on it.
  void shutdown() override { end(std::min<std::chrono::milliseconds>(timeout_.load(), std::chrono::seconds(5))); }

 private:
  template <class Options, class Run>
  WorkPtr queue(OpType type, const char* title, const Tensors& shown, const Tensors& outputs, const Options& opts,
                Run run) {
    auto work = c10::make_intrusive<ShmWork>(core_, core_->steps, type, title, outputs, shown);
    work->sequence = ++sequence_;
    const auto limit = opts.timeout == c10d::kUnsetTimeout ? timeout_.load() : opts.timeout;
    core_->steps.push({[run = std::move(run), limit](Collectives& collectives) {
                         run(collectives, Clock::now() + limit);
                       },
                       [work](const std::string& error) { work->settle(error); }});
    if (opts.asyncOp) {
      core_->steps.kick();
    } else {
      core_->steps.drive([&] { return work->isCompleted(); });
    }
    return work;
  }

  template <class Options>
  WorkPtr reduce_each(OpType type, const char* title, const Tensors& tensors, Rule rule, const Options& opts) {
    const Target data(tensors[0], true);
    return queue(type, title, tensors, tensors, opts, [data, rule](Collectives& run, Deadline until) {
      run.all_reduce(span(data.flat), span(data.flat), rule, until);
      data.write_back();
    });
  }

  WorkPtr gather_each(OpType type, Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) {
    TORCH_CHECK(outputs.size() == inputs.size(), "all_gather: ", inputs.size(), " inputs, ", outputs.size(),
                " outputs");
    for (size_t i = 0; i < inputs.size(); ++i) check_times(outputs[i], inputs[i], size_, "all_gather");
    return queue(type, "whale:all_gather", inputs, outputs, opts,
                 [in = flat(inputs), out = targets(outputs), size = size_](Collectives& run, Deadline until) {
                   for (size_t i = 0; i < in.size(); ++i) {
                     run.all_gather(span(in[i]), shares(out[i].flat, size), until);
                     out[i].write_back();
                   }
                 });
  }

  WorkPtr reduce_scatter_each(OpType type, Tensors& outputs, Tensors& inputs,
                              const c10d::ReduceScatterOptions& opts) {
    TORCH_CHECK(outputs.size() == inputs.size(), "reduce_scatter: ", inputs.size(), " inputs, ", outputs.size(),
                " outputs");
    std::vector<Rule> rules;
    for (size_t i = 0; i < inputs.size(); ++i) {
      check_times(inputs[i], outputs[i], size_, "reduce_scatter");
      rules.push_back(*rule_of(outputs[i], opts.reduceOp));
    }
    return queue(type, "whale:reduce_scatter", inputs, outputs, opts,
                 [in = flat(inputs), out = targets(outputs), rules, size = size_](Collectives& run,
                                                                                        Deadline until) {
                   for (size_t i = 0; i < in.size(); ++i) {
                     run.reduce_scatter(shares(in[i], size), span(out[i].flat), rules[i], until);
                     out[i].write_back();
                   }
                 });
  }

  WorkPtr post(bool is_send, OpType type, const char* title, Tensors& tensors, int peer, int tag, Span data,
               std::function<void()> after) {
    TORCH_CHECK(tensors.size() == 1 && is_plain(tensors[0]), "send and receive take one dense CPU tensor");
    // What is sent belongs to the message alone, which lets go of it once it has left: pipelines keep the works
    // of a whole step.
    auto work = c10::make_intrusive<ShmWork>(core_, core_->pipes, type, title, is_send ? Tensors() : tensors, tensors);
    auto message = std::make_shared<Message>();
    message->peer = peer, message->tag = tag, message->data = data.data, message->bytes = data.bytes;
    message->deadline = Clock::now() + timeout_.load();
    // The message holds this closure, so the closure must not hold the message.
    message->done = [work, after = std::move(after), raw = message.get()](const std::string& error) {
      work->set_source(raw->peer);
      if (error.empty()) after();
      work->settle(error);
    };
    if (is_send) {
      core_->pipes.pipes.post_send(std::move(message));
    } else {
      core_->pipes.pipes.post_recv(std::move(message));
    }
    core_->pipes.kick();
    return work;
  }

  c10d::Backend& gloo() {
    std::lock_guard<std::mutex> guard(gloo_lock_);
    if (!gloo_) gloo_ = make_gloo_();
    return *gloo_;
  }

  void end(std::chrono::milliseconds patience) {
    if (ended_.exchange(true) || getpid() != pid_) return;  // a forked child owns no thread and speaks for nobody
    // Threads may need the interpreter to let go of tensors.
    std::optional<pybind11::gil_scoped_release> without_gil;
    if (Py_IsInitialized() && PyGILState_Check()) without_gil.emplace();
    const auto until = Clock::now() + patience;
    while (Clock::now() < until && !(core_->steps.is_idle() && core_->pipes.pipes.sent_all())) {
      core_->steps.kick();
      core_->pipes.kick();
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
    core_->segment.stop();
    core_->steps.join();
    core_->pipes.join();
    core_->segment.leave();
    std::lock_guard<std::mutex> guard(gloo_lock_);
    if (gloo_) gloo_->shutdown();
    gloo_.reset();
  }

  std::shared_ptr<Core> core_;
  std::atomic<std::chrono::milliseconds> timeout_;
  Factory make_gloo_;
  std::mutex gloo_lock_;
  c10::intrusive_ptr<c10d::Backend> gloo_;
  const pid_t pid_;
  std::atomic<bool> ended_{false};
  std::atomic<uint64_t> sequence_{0};
};

}  // namespace
}  // namespace whale

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  using whale::ShmBackend;
  py::module_::import("torch._C._distributed_c10d");  // the base class's binding
  m.def("create_segment", &whale::Segment::create, py::arg("num_ranks"), py::arg("nonce0"), py::arg("nonce1"));
  py::class_<ShmBackend, c10d::Backend, c10::intrusive_ptr<ShmBackend>>(m, "ShmBackend")
      .def(py::init<int, int, int, std::chrono::milliseconds, uint64_t, uint64_t, const std::vector<int>&,
                    whale::Factory>(),
           py::arg("fd"), py::arg("rank"), py::arg("size"), py::arg("timeout"), py::arg("nonce0"),
           py::arg("nonce1"), py::arg("pids"), py::arg("make_gloo"))
      .def("shutdown", &ShmBackend::shutdown)
      .def("abort", &ShmBackend::abort);
}

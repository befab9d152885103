// A communicator whose ranks are joined by slow links: for tests of what hides behind computation.
#pragma once

#include <algorithm>
#include <chrono>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "parallel/communicator.h"

namespace shoal {

// What a rank sends passes through its link, one thing after another, at `bandwidth` bytes/s
// (0: as fast as it goes). All groups of the rank share it. Thread-safe.
class ThrottledLink {
 public:
  using Clock = std::chrono::steady_clock;

  void set_bandwidth(double bytes_per_second) {
    const std::lock_guard lock(mutex_);
    bandwidth_ = bytes_per_second;
  }
  // A collective on its way.
  struct Passage {
    Clock::time_point begin, end;
    std::vector<int64_t> elements;  // of each array
  };
  // `bytes` that are ready now: when they have passed.
  Clock::time_point Send(int64_t bytes, std::span<const View> pieces) {
    const std::lock_guard lock(mutex_);
    const auto now = Clock::now();
    if (bandwidth_ == 0) return now;
    const std::chrono::duration<double> time(static_cast<double>(bytes) / bandwidth_);
    Passage passage = {std::max(free_, now), {}, {}};
    free_ = passage.end = passage.begin + std::chrono::duration_cast<Clock::duration>(time);
    for (const View& piece : pieces) passage.elements.push_back(piece.numel());
    passages_.push_back(std::move(passage));
    return free_;
  }
  // Those since the last call.
  std::vector<Passage> TakePassages() {
    const std::lock_guard lock(mutex_);
    return std::exchange(passages_, {});
  }

 private:
  std::mutex mutex_;
  double bandwidth_ = 0;
  Clock::time_point free_;
  std::vector<Passage> passages_;
};

// Over another communicator, which must outlive it and is used by it alone. A call takes from when
// all ranks have come at least as long as its wire bytes by the ring form need on the rank's link;
// it sleeps, so that a core is free for whoever computes.
class ThrottledCommunicator : public Communicator {
 public:
  ThrottledCommunicator(Communicator& inner, std::shared_ptr<ThrottledLink> link)
      : inner_(inner), link_(std::move(link)) {}

  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  std::string host() const override { return inner_.host(); }
  void Barrier() override { inner_.Barrier(); }
  bool concurrent() const override { return inner_.concurrent(); }
  void Abort(int exit_code) override { inner_.Abort(exit_code); }
  std::unique_ptr<Communicator> Subgroup(std::span<const int> members) override {
    return std::make_unique<ThrottledCommunicator>(inner_.Subgroup(members), link_);
  }
  // A group of its own.
  ThrottledCommunicator(std::unique_ptr<Communicator> inner, std::shared_ptr<ThrottledLink> link)
      : owned_(std::move(inner)), inner_(*owned_), link_(std::move(link)) {}

 protected:
  void DoAllReduce(std::span<const View> pieces, ReduceOp op) override {
    Together(pieces, [&] { inner_.AllReduce(pieces, op); });
  }
  void DoReduceScatter(std::span<const View> pieces, std::span<const int64_t> bounds,
                       char* into) override {
    const auto me = static_cast<size_t>(rank());
    const View share(into, pieces[0].dtype, {bounds[me + 1] - bounds[me]});
    Together(pieces, [&] { inner_.ReduceScatter(pieces, bounds, Traffic::kData, share); });
  }
  void DoAllGather(std::span<const View> pieces, std::span<const int64_t> bounds) override {
    Together(pieces, [&] { inner_.AllGather(pieces, bounds); });
  }
  void DoAllToAll(const View& send, std::span<const int64_t> send_counts, const View& receive,
                  std::span<const int64_t> receive_counts) override {
    Together(std::span(&send, 1),
             [&] { inner_.AllToAll(send, send_counts, receive, receive_counts); });
  }
  void DoBroadcast(const View& data, int root) override {
    Together(std::span(&data, 1), [&] { inner_.Broadcast(data, root); });
  }
  void DoSend(const View& data, int to) override {
    const auto done = Pass(std::span(&data, 1));
    inner_.Send(data, to);
    std::this_thread::sleep_until(done);
  }
  void DoReceive(const View& data, int from) override { inner_.Receive(data, from); }
  std::vector<std::string> DoAllGatherStrings(const std::string& mine) override {
    return inner_.AllGatherStrings(mine);
  }

 private:
  template <class F>
  void Together(std::span<const View> pieces, F&& call) {
    inner_.Barrier();
    const auto done = Pass(pieces);
    call();
    std::this_thread::sleep_until(done);
  }
  // What was counted since the last call goes over the link.
  ThrottledLink::Clock::time_point Pass(std::span<const View> pieces) {
    const int64_t all =
        wire_bytes(Traffic::kData) + wire_bytes(Traffic::kControl) + wire_bytes(Traffic::kAhead);
    return link_->Send(all - std::exchange(passed_, all), pieces);
  }

  std::unique_ptr<Communicator> owned_;
  Communicator& inner_;
  std::shared_ptr<ThrottledLink> link_;
  int64_t passed_ = 0;
};

}  // namespace shoal

// Ranks of one process joined by slow links, as the fabrics of parallel/sequence_simulator.h: to
// measure what that only reckons.
#pragma once

#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "parallel/sequence_simulator.h"
#include "tests/parallel/throttled_communicator.h"

namespace shoal {

// A thread for every link: it takes a message, sleeps as long as the message needs at `bandwidth`
// bytes/s, and hands it on to the next link or to its receiver. Nobody waits who sends.
class SlowFabric {
 public:
  using Clock = std::chrono::steady_clock;

  SlowFabric(SequenceFabric kind, int ranks) : kind_(kind), ranks_(ranks) {
    const int links = kind == SequenceFabric::kMesh ? ranks * ranks : 2 * ranks;
    for (int i = 0; i < links; ++i) links_.push_back(std::make_unique<Link>());
    for (int i = 0; i < links; ++i) threads_.emplace_back([this, i] { Serve(i); });
  }
  ~SlowFabric() {
    for (const auto& link : links_) {
      const std::lock_guard lock(link->mutex);
      link->stop = true;
      link->filled.notify_one();
    }
    for (std::thread& thread : threads_) thread.join();
  }
  SlowFabric(const SlowFabric&) = delete;
  SlowFabric& operator=(const SlowFabric&) = delete;

  // 0: as fast as it goes. While nothing is on its way.
  void set_bandwidth(double bytes_per_second) { bandwidth_ = bytes_per_second; }

  void Send(int from, int to, const View& data) {
    Message m{from, to, from, std::vector<char>(static_cast<size_t>(data.bytes())), Clock::now()};
    std::memcpy(m.data.data(), data.data, m.data.size());
    Put(std::move(m));
  }
  void Receive(int from, int to, const View& data) {
    std::unique_lock lock(mutex_);
    auto& queue = arrived_[{from, to}];
    arrived_one_.wait(lock, [&] { return !queue.empty(); });
    std::memcpy(data.data, queue.front().data(), queue.front().size());
    queue.pop_front();
  }

 private:
  struct Message {
    int from, to, at;  // at: the rank where it is
    std::vector<char> data;
    Clock::time_point ready;
    bool in = false;  // of a port: on the way into its receiver
  };
  struct Link {
    std::mutex mutex;
    std::condition_variable filled;
    std::deque<Message> queue;
    bool stop = false;
  };

  bool Upwards(const Message& m) const {
    const int up = (m.to - m.at + ranks_) % ranks_;
    return 2 * up < ranks_ || (2 * up == ranks_ && m.at % 2 == 0);
  }
  int LinkOf(const Message& m) const {
    switch (kind_) {
      case SequenceFabric::kMesh:
        return m.from * ranks_ + m.to;
      case SequenceFabric::kPort:
        return m.in ? ranks_ + m.to : m.from;
      case SequenceFabric::kRing:
        return (Upwards(m) ? 0 : ranks_) + m.at;
    }
    return 0;
  }
  void Put(Message message) {
    Link& link = *links_[static_cast<size_t>(LinkOf(message))];
    const std::lock_guard lock(link.mutex);
    link.queue.push_back(std::move(message));
    link.filled.notify_one();
  }

  void Serve(int number) {
    Link& link = *links_[static_cast<size_t>(number)];
    Clock::time_point free;
    for (;;) {
      std::unique_lock lock(link.mutex);
      link.filled.wait(lock, [&] { return link.stop || !link.queue.empty(); });
      if (link.queue.empty()) return;
      Message m = std::move(link.queue.front());
      link.queue.pop_front();
      lock.unlock();
      const auto begin = std::max(m.ready, free);
      const std::chrono::duration<double> time(
          bandwidth_ == 0 ? 0 : static_cast<double>(m.data.size()) / bandwidth_);
      free = begin + std::chrono::duration_cast<Clock::duration>(time);
      if (kind_ == SequenceFabric::kPort && !m.in) {
        // The switch loses no time: the way in begins with the way out.
        std::this_thread::sleep_until(begin);
        m.ready = begin;
        m.in = true;
        Put(std::move(m));
        std::this_thread::sleep_until(free);
        continue;
      }
      std::this_thread::sleep_until(free);
      m.ready = free;
      if (kind_ == SequenceFabric::kRing) {
        m.at = (m.at + (Upwards(m) ? 1 : ranks_ - 1)) % ranks_;
        if (m.at != m.to) {
          Put(std::move(m));
          continue;
        }
      }
      const std::lock_guard arrived(mutex_);
      arrived_[{m.from, m.to}].push_back(std::move(m.data));
      arrived_one_.notify_all();
    }
  }

  const SequenceFabric kind_;
  const int ranks_;
  double bandwidth_ = 0;
  std::vector<std::unique_ptr<Link>> links_;
  std::mutex mutex_;
  std::condition_variable arrived_one_;
  std::map<std::pair<int, int>, std::deque<std::vector<char>>> arrived_;
  std::vector<std::thread> threads_;
};

// Messages go over the fabric; all else as over the inner communicator. Groups have all ranks.
class FabricCommunicator : public ThrottledCommunicator {
 public:
  FabricCommunicator(std::unique_ptr<Communicator> inner, SlowFabric& fabric)
      : ThrottledCommunicator(std::move(inner), std::make_shared<ThrottledLink>()),
        fabric_(fabric) {}
  std::unique_ptr<Communicator> Subgroup(std::span<const int> members) override {
    return std::make_unique<FabricCommunicator>(ThrottledCommunicator::Subgroup(members), fabric_);
  }

 protected:
  void DoSend(const View& data, int to) override { fabric_.Send(rank(), to, data); }
  void DoReceive(const View& data, int from) override { fabric_.Receive(from, rank(), data); }

 private:
  SlowFabric& fabric_;
};

}  // namespace shoal

#include "parallel/watchdog.h"

#include <fmt/core.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <vector>

namespace shoal {

Watchdog::Watchdog(Beacon* beacons, int rank, int size,
                   std::function<void(int, const std::string&)> report, const Options& options)
    : beacons_(beacons), rank_(rank), size_(size), report_(std::move(report)), options_(options) {
  beacons_[rank_].pid = getpid();
  thread_ = std::thread([this] { Watch(); });
}

Watchdog::~Watchdog() {
  beacons_[rank_].state = RankState::kLeft;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  stop_.notify_all();
  thread_.join();
}

void Watchdog::Enter(Collective collective) {
  beacons_[rank_].collective.store(collective, std::memory_order_relaxed);
  beacons_[rank_].collectives.fetch_add(1, std::memory_order_relaxed);
  beacons_[rank_].state.store(RankState::kCollective, std::memory_order_relaxed);
}

void Watchdog::Leave() {
  beacons_[rank_].state.store(RankState::kComputing, std::memory_order_relaxed);
}

std::string Watchdog::Describe(int rank, const std::string& how) const {
  static constexpr const char* kNames[] = {"all-reduce", "reduce-scatter", "all-gather",
                                           "all-to-all", "broadcast",      "exchange of strings"};
  const auto place = [&](int r) {
    const Beacon& b = beacons_[r];
    return fmt::format("{} {} (collective {})",
                       b.state == RankState::kCollective ? "in" : "computing after",
                       kNames[static_cast<int>(b.collective.load())], b.collectives.load());
  };
  return fmt::format("rank {} (process {}) {}, {}; rank {} is {}", rank, beacons_[rank].pid.load(),
                     how, place(rank), rank_, place(rank_));
}

void Watchdog::Watch() {
  using Clock = std::chrono::steady_clock;
  const auto seconds = [](double s) {
    return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(s));
  };
  struct Seen {
    int64_t beats = -1;
    Clock::time_point at;
  };
  std::vector<Seen> seen(static_cast<size_t>(size_));
  Clock::time_point last = Clock::now(), found;
  bool gone = false;
  for (std::unique_lock lock(mutex_); !stopping_;) {
    ++beacons_[rank_].beats;
    const Clock::time_point now = Clock::now();
    // This process itself was stopped for a while: nothing is known of the others.
    if (now - last > seconds(options_.patience / 2)) seen.assign(seen.size(), Seen());
    last = now;
    int missing = -1, first = rank_;
    std::string how;
    for (int r = size_ - 1; r >= 0; --r) {
      const Beacon& b = beacons_[r];
      Seen& s = seen[static_cast<size_t>(r)];
      if (r == rank_ || b.pid == 0 || b.state == RankState::kLeft) continue;
      const int64_t beats = b.beats;
      if (beats != s.beats) s = {beats, now};
      const bool dead = kill(static_cast<pid_t>(b.pid.load()), 0) != 0 && errno == ESRCH;
      const bool silent = now - s.at > seconds(options_.patience);
      if (!dead && !silent) {
        first = std::min(first, r);
        continue;
      }
      missing = r;
      how = dead ? "has ended" : fmt::format("has not run for {:.0f} s", options_.patience);
    }
    if (missing < 0) {
      gone = false;
    } else {
      if (!gone) found = now;
      gone = true;
      // The first of those that are left tells it.
      if (first == rank_ || now - found > seconds(options_.stand_back)) {
        lock.unlock();
        return report_(missing, Describe(missing, how));
      }
    }
    stop_.wait_for(lock, seconds(options_.period));
  }
}

}  // namespace shoal

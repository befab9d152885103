// Notices a rank of this host that is dead or stopped: the others would wait for it for ever. Every
// process beats in shared memory from a thread of its own and looks at the others' beats.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

namespace shoal {

enum class RankState : int { kComputing, kCollective, kLeft };
enum class Collective : int {
  kAllReduce,
  kReduceScatter,
  kAllGather,
  kAllToAll,
  kBroadcast,
  kAllGatherStrings,
};

// A process's, in zeroed shared memory.
struct Beacon {
  std::atomic<int64_t> beats;
  std::atomic<int64_t> pid;
  std::atomic<int64_t> collectives;  // entered so far
  std::atomic<RankState> state;
  std::atomic<Collective> collective;  // the last one
};

class Watchdog {
 public:
  struct Options {
    double period = 0.2;    // seconds between beats
    double patience = 7;    // without a beat, until a rank counts as stopped
    double stand_back = 3;  // how long the other ranks leave the report to the first of them
  };
  // `beacons`: one per rank. `report(rank, what)` is called once, from the watchdog's thread, when
  // another rank is gone; the program should end there.
  Watchdog(Beacon* beacons, int rank, int size, std::function<void(int, const std::string&)> report,
           const Options& options);
  Watchdog(Beacon* beacons, int rank, int size, std::function<void(int, const std::string&)> report)
      : Watchdog(beacons, rank, size, std::move(report), Options()) {}
  // Says that this rank leaves in order.
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  void Enter(Collective collective);
  void Leave();

 private:
  void Watch();
  std::string Describe(int rank, const std::string& how) const;

  Beacon* beacons_;
  int rank_, size_;
  std::function<void(int, const std::string&)> report_;
  Options options_;
  std::mutex mutex_;
  std::condition_variable stop_;
  bool stopping_ = false;
  std::thread thread_;  // last: it uses the others
};

}  // namespace shoal

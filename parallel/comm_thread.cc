// Ranks as threads of one process. Buffers are read in place: an all-reduce makes no copies.
#include <algorithm>
#include <cstring>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#include "core/base/thread_count.h"
#include "core/context.h"
#include "parallel/communicator.h"
#include "parallel/reduce_arrays.h"
#include "parallel/shared_barrier.h"

namespace shoal {
namespace {

struct Group {
  explicit Group(int ranks)
      : size(ranks), pieces(static_cast<size_t>(ranks)), strings(static_cast<size_t>(ranks)) {}

  int size;
  SharedBarrier barrier = {};
  std::vector<std::span<const View>>
      pieces;  // what each rank brought to the collective in progress
  std::vector<std::string> strings;
};

class ThreadCommunicator : public Communicator {
 public:
  ThreadCommunicator(Group& group, int rank) : group_(group), rank_(rank) {}
  int rank() const override { return rank_; }
  int size() const override { return group_.size; }
  std::string host() const override { return MakeSelfCommunicator()->host(); }
  void Barrier() override { group_.barrier.Wait(group_.size); }
  void Abort(int) override {
    int none = 0;
    group_.barrier.aborted.compare_exchange_strong(none, rank_ + 1);
  }

 protected:
  // Each rank sums its slice over all ranks' buffers and writes the sum into all of them: the
  // slices are disjoint, so nobody reads what another has overwritten. Between the two barriers
  // nothing throws, for the others are reading this rank's buffers.
  void DoAllReduce(std::span<const View> pieces, ReduceOp op) override {
    std::vector<const void*> sources(static_cast<size_t>(group_.size));
    group_.pieces[static_cast<size_t>(rank_)] = pieces;
    Barrier();
    const bool alike = Alike();
    for (size_t p = 0; alike && p < pieces.size(); ++p) {
      const auto width = static_cast<int64_t>(SizeOf(pieces[p].dtype));
      const int64_t n = pieces[p].numel();
      const int64_t begin = n * rank_ / group_.size, end = n * (rank_ + 1) / group_.size;
      if (begin == end) continue;
      const auto at = [&](int r) {
        return group_.pieces[static_cast<size_t>(r)][p].as<char>() + begin * width;
      };
      for (int r = 0; r < group_.size; ++r) sources[static_cast<size_t>(r)] = at(r);
      ReduceArrays(pieces[p].dtype, op, sources, at(rank_), end - begin);
      for (int r = 0; r < group_.size; ++r) {
        if (r != rank_) std::memcpy(at(r), at(rank_), static_cast<size_t>((end - begin) * width));
      }
    }
    group_.barrier.WaitForAll(group_.size);
    SHOAL_CHECK(alike, "all-reduce", "the ranks brought arrays of different sizes or dtypes");
  }

  void DoBroadcast(const View& data, int root) override {
    group_.pieces[static_cast<size_t>(rank_)] = std::span(&data, 1);
    Barrier();
    const bool alike = Alike();
    const View& source = group_.pieces[static_cast<size_t>(root)][0];
    if (alike && rank_ != root) std::memcpy(data.data, source.data, data.bytes());
    group_.barrier.WaitForAll(group_.size);
    SHOAL_CHECK(alike, "broadcast", "the ranks brought arrays of different sizes or dtypes");
  }

  std::vector<std::string> DoAllGatherStrings(const std::string& mine) override {
    group_.strings[static_cast<size_t>(rank_)] = mine;
    Barrier();
    std::vector<std::string> all = group_.strings;
    group_.barrier.WaitForAll(group_.size);
    return all;
  }

 private:
  // Whether all ranks brought the same to this collective: the same answer on every rank.
  bool Alike() const {
    const std::span<const View> first = group_.pieces[0];
    return std::all_of(group_.pieces.begin(), group_.pieces.end(),
                       [&](std::span<const View> other) {
                         return std::equal(first.begin(), first.end(), other.begin(), other.end(),
                                           [](const View& a, const View& b) {
                                             return a.dtype == b.dtype && a.numel() == b.numel();
                                           });
                       });
  }

  Group& group_;
  int rank_;
};

}  // namespace

void RunThreadRanks(int ranks, int threads_per_rank, const std::function<void(Communicator&)>& f) {
  SHOAL_CHECK(ranks >= 1, "thread ranks", "{} ranks", ranks);
  if (threads_per_rank == 0) threads_per_rank = std::max(1, KernelThreads() / ranks);
  Group group(ranks);
  std::mutex mutex;
  std::exception_ptr first, peer;
  std::vector<std::thread> threads;
  const auto run = [&](int rank) {
    SetThreadRank(rank);
    SetKernelThreads(threads_per_rank);
    ThreadCommunicator communicator(group, rank);
    try {
      ExecutionContext context(Device{});
      const ContextScope scope(context);
      f(communicator);
    } catch (const PeerFailed&) {
      // The peer's own error is the one to report, if it has one.
      const std::lock_guard lock(mutex);
      if (peer == nullptr) peer = std::current_exception();
    } catch (...) {
      {
        const std::lock_guard lock(mutex);
        if (first == nullptr) first = std::current_exception();
      }
      communicator.Abort(0);
    }
  };
  try {
    threads.reserve(static_cast<size_t>(ranks));
    for (int rank = 0; rank < ranks; ++rank) threads.emplace_back(run, rank);
  } catch (const std::system_error& e) {
    // Those that started wait for the others and must be let go before they are joined.
    const int missing = static_cast<int>(threads.size());
    ThreadCommunicator(group, missing).Abort(0);
    for (std::thread& thread : threads) thread.join();
    SHOAL_FAIL(ErrorKind::kConfig, "thread ranks",
               "the system starts no more than {} of {} threads ({}); use fewer local ranks",
               missing, ranks, e.what());
  }
  for (std::thread& thread : threads) thread.join();
  if (first != nullptr) std::rethrow_exception(first);
  if (peer != nullptr) std::rethrow_exception(peer);
}

}  // namespace shoal

// Ranks as threads of one process. Buffers are read in place: an all-reduce makes no copies.
#include <algorithm>
#include <cstring>
#include <exception>
#include <mutex>
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
  // slices are disjoint, so nobody reads what another has overwritten.
  void DoAllReduce(std::span<const View> pieces, ReduceOp op) override {
    group_.pieces[static_cast<size_t>(rank_)] = pieces;
    Barrier();
    const size_t width = SizeOf(pieces[0].dtype);
    std::vector<const void*> sources(static_cast<size_t>(group_.size));
    for (size_t p = 0; p < pieces.size(); ++p) {
      const int64_t n = pieces[p].numel();
      for (const auto& other : group_.pieces) {
        SHOAL_CHECK(other.size() == pieces.size() && other[p].numel() == n, "all-reduce",
                    "the ranks brought arrays of different sizes");
      }
      const int64_t begin = n * rank_ / group_.size, end = n * (rank_ + 1) / group_.size;
      if (begin == end) continue;
      const auto at = [&](int r) {
        return group_.pieces[static_cast<size_t>(r)][p].as<char>() +
               static_cast<size_t>(begin) * width;
      };
      for (int r = 0; r < group_.size; ++r) sources[static_cast<size_t>(r)] = at(r);
      ReduceArrays(pieces[p].dtype, op, sources, at(rank_), end - begin);
      for (int r = 0; r < group_.size; ++r) {
        if (r != rank_) std::memcpy(at(r), at(rank_), static_cast<size_t>(end - begin) * width);
      }
    }
    Barrier();
  }

  void DoBroadcast(const View& data, int root) override {
    group_.pieces[static_cast<size_t>(rank_)] = std::span(&data, 1);
    Barrier();
    const View& source = group_.pieces[static_cast<size_t>(root)][0];
    SHOAL_CHECK(source.bytes() == data.bytes(), "broadcast", "{} bytes from rank {}, room for {}",
                source.bytes(), root, data.bytes());
    if (rank_ != root) std::memcpy(data.data, source.data, data.bytes());
    Barrier();
  }

  std::vector<std::string> DoAllGatherStrings(const std::string& mine) override {
    group_.strings[static_cast<size_t>(rank_)] = mine;
    Barrier();
    std::vector<std::string> all = group_.strings;
    Barrier();
    return all;
  }

 private:
  Group& group_;
  int rank_;
};

}  // namespace

void RunThreadRanks(int ranks, int threads_per_rank, const std::function<void(Communicator&)>& f) {
  SHOAL_CHECK(ranks >= 1, "thread ranks", "{} ranks", ranks);
  if (threads_per_rank == 0) threads_per_rank = std::max(1, KernelThreads() / ranks);
  Group group(ranks);
  std::mutex mutex;
  std::exception_ptr first;
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      SetThreadRank(rank);
      SetKernelThreads(threads_per_rank);
      ThreadCommunicator communicator(group, rank);
      try {
        ExecutionContext context(Device{});
        const ContextScope scope(context);
        f(communicator);
      } catch (const PeerFailed&) {
        // The peer's own error is the one to report.
      } catch (...) {
        {
          const std::lock_guard lock(mutex);
          if (first == nullptr) first = std::current_exception();
        }
        communicator.Abort(0);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (first != nullptr) std::rethrow_exception(first);
}

}  // namespace shoal

#include "parallel/communicator.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <numeric>

#include "core/context.h"
#include "kernels/copy.h"
#include "parallel/pieces.h"

namespace shoal {
namespace {

class SelfCommunicator : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::string host() const override {
    char name[256] = {};
    gethostname(name, sizeof(name) - 1);
    return name;
  }
  void Barrier() override {}
  std::unique_ptr<Communicator> Subgroup(std::span<const int>) override {
    return MakeSelfCommunicator();
  }
  void Abort(int) override {}

 protected:
  void DoAllReduce(std::span<const View>, ReduceOp) override {}
  void DoReduceScatter(std::span<const View>, std::span<const int64_t>, char*) override {}
  void DoAllGather(std::span<const View>, std::span<const int64_t>) override {}
  void DoAllToAll(const View&, std::span<const int64_t>, const View&,
                  std::span<const int64_t>) override {}
  void DoBroadcast(const View&, int) override {}
  void DoSend(const View&, int) override {}
  void DoReceive(const View&, int) override {}
  std::vector<std::string> DoAllGatherStrings(const std::string& mine) override { return {mine}; }
  bool Moves(DeviceType) const override { return true; }
};

// Counts what a rank of a group would send, and moves nothing: the planner runs the training step
// over it.
class MetaCommunicator : public SelfCommunicator {
 public:
  MetaCommunicator(int rank, int size) : rank_(rank), size_(size) {}
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::unique_ptr<Communicator> Subgroup(std::span<const int> members) override {
    const auto mine = std::find(members.begin(), members.end(), rank_);
    return MakeMetaCommunicator(static_cast<int>(mine - members.begin()),
                                static_cast<int>(members.size()));
  }

 protected:
  std::vector<std::string> DoAllGatherStrings(const std::string& mine) override {
    return std::vector<std::string>(static_cast<size_t>(size_), mine);
  }

 private:
  int rank_, size_;
};

void CheckFloat(const char* op, DType dtype) {
  SHOAL_CHECK(IsFloat(dtype), op, "no sums of {}", Name(dtype));
}

// For a group of one, whose calls run in the thread that computes.
void CopyHere(const View& to, const View& from) {
  kernels::Copy(ExecutionContext::Current().stream(), Part(to, 0, to.numel()),
                Part(from, 0, from.numel()));
}

std::vector<int64_t> Bounds(const char* op, std::span<const int64_t> given, int64_t elements,
                            int size) {
  if (given.empty()) return ShardBounds(elements, size);
  std::vector<int64_t> bounds(given.begin(), given.end());
  SHOAL_CHECK(static_cast<int>(bounds.size()) == size + 1 && bounds.front() == 0 &&
                  bounds.back() == elements && std::is_sorted(bounds.begin(), bounds.end()),
              op, "bounds of {} elements over {} ranks must rise from 0 to {}", elements, size,
              elements);
  return bounds;
}

// Elements that `rank` sends in the ring form: every share but its own to be summed, and every sum
// but its neighbour's.
int64_t SentToScatter(std::span<const int64_t> bounds, int rank) {
  const auto r = static_cast<size_t>(rank);
  return bounds.back() - (bounds[r + 1] - bounds[r]);
}
int64_t SentToGather(std::span<const int64_t> bounds, int rank) {
  return SentToScatter(bounds, (rank + 1) % static_cast<int>(bounds.size() - 1));
}

}  // namespace

std::vector<int64_t> ShardBounds(int64_t n, int size) {
  std::vector<int64_t> bounds;
  for (int r = 0; r <= size; ++r) bounds.push_back(ShardBegin(n, r, size));
  return bounds;
}

// Elements of contiguous arrays of one dtype where this communicator can move them.
int64_t Communicator::CheckPieces(const char* op, std::span<const View> pieces) const {
  int64_t elements = 0;
  for (const View& piece : pieces) {
    SHOAL_CHECK(
        piece.contiguous() && piece.dtype == pieces[0].dtype && piece.device == pieces[0].device,
        op, "pieces must be contiguous, of one dtype and on one device");
    SHOAL_CHECK(Moves(piece.device.type), op, "this communicator moves host memory, not {}",
                Name(piece.device.type));
    elements += piece.numel();
  }
  return elements;
}

bool Communicator::Count(int64_t bytes, Traffic traffic, const View& like) {
  if (ExecutionContext::Current().idle()) return false;
  wire_bytes_[static_cast<size_t>(traffic)] += bytes;
  return like.device.type != DeviceType::kMeta;
}

void Communicator::AllReduce(std::span<const View> pieces, ReduceOp op, Traffic traffic) {
  if (size() == 1 || pieces.empty()) return;
  const int64_t elements = CheckPieces("all-reduce", pieces);
  CheckFloat("all-reduce", pieces[0].dtype);
  const std::vector<int64_t> b = ShardBounds(elements, size());
  const int64_t sent = SentToScatter(b, rank()) + SentToGather(b, rank());
  const auto width = static_cast<int64_t>(SizeOf(pieces[0].dtype));
  if (!Count(sent * width, traffic, pieces[0]) || elements == 0) return;
  const KernelTimer timer(profile_, "AllReduce");
  DoAllReduce(pieces, op);
}

void Communicator::ReduceScatter(std::span<const View> pieces, std::span<const int64_t> bounds,
                                 Traffic traffic, const View& into) {
  if (pieces.empty() || (size() == 1 && !into)) return;
  const int64_t elements = CheckPieces("reduce-scatter", pieces);
  CheckFloat("reduce-scatter", pieces[0].dtype);
  const std::vector<int64_t> b = Bounds("reduce-scatter", bounds, elements, size());
  const auto me = static_cast<size_t>(rank());
  SHOAL_CHECK(!into || (into.contiguous() && into.dtype == pieces[0].dtype &&
                        into.numel() == b[me + 1] - b[me]),
              "reduce-scatter", "{} {} for a share of {} elements of {}", into.shape.ToString(),
              Name(into.dtype), b[me + 1] - b[me], Name(pieces[0].dtype));
  const int64_t sent = SentToScatter(b, rank());
  const auto width = static_cast<int64_t>(SizeOf(pieces[0].dtype));
  if (!Count(sent * width, traffic, pieces[0]) || elements == 0) return;
  const KernelTimer timer(profile_, "ReduceScatter");
  if (size() == 1) {
    int64_t at = 0;
    for (const View& piece : pieces) {
      CopyHere(Part(into, at, piece.numel()), piece);
      at += piece.numel();
    }
    return;
  }
  DoReduceScatter(pieces, b, into.as<char>());
}

int64_t Communicator::AllGatherBytes(std::span<const View> pieces,
                                     std::span<const int64_t> bounds) const {
  if (size() == 1 || pieces.empty()) return 0;
  const int64_t elements = CheckPieces("all-gather", pieces);
  return SentToGather(Bounds("all-gather", bounds, elements, size()), rank()) *
         static_cast<int64_t>(SizeOf(pieces[0].dtype));
}

void Communicator::AllGather(std::span<const View> pieces, std::span<const int64_t> bounds,
                             Traffic traffic) {
  if (size() == 1 || pieces.empty()) return;
  const int64_t elements = CheckPieces("all-gather", pieces);
  if (!Count(AllGatherBytes(pieces, bounds), traffic, pieces[0]) || elements == 0) return;
  const KernelTimer timer(profile_, "AllGather");
  DoAllGather(pieces, Bounds("all-gather", bounds, elements, size()));
}

void Communicator::AllToAll(const View& send, std::span<const int64_t> send_counts,
                            const View& receive, std::span<const int64_t> receive_counts,
                            Traffic traffic) {
  const auto ranks = static_cast<size_t>(size());
  SHOAL_CHECK(send_counts.size() == ranks && receive_counts.size() == ranks, "all-to-all",
              "{} and {} counts for {} ranks", send_counts.size(), receive_counts.size(), ranks);
  CheckPieces("all-to-all", std::array{send, receive});
  const auto sum = [](std::span<const int64_t> counts) {
    return std::accumulate(counts.begin(), counts.end(), int64_t{0});
  };
  const auto least = [](std::span<const int64_t> counts) {
    return *std::min_element(counts.begin(), counts.end());
  };
  const auto me = static_cast<size_t>(rank());
  SHOAL_CHECK(sum(send_counts) == send.numel() && sum(receive_counts) == receive.numel() &&
                  least(send_counts) >= 0 && least(receive_counts) >= 0 &&
                  send_counts[me] == receive_counts[me],
              "all-to-all", "counts add up to {} and {} of {} and {} elements", sum(send_counts),
              sum(receive_counts), send.numel(), receive.numel());
  const auto width = static_cast<int64_t>(SizeOf(send.dtype));
  if (!Count((send.numel() - send_counts[me]) * width, traffic, send)) return;
  const KernelTimer timer(profile_, "AllToAll");
  if (size() == 1) return CopyHere(receive, send);
  DoAllToAll(send, send_counts, receive, receive_counts);
}

void Communicator::Broadcast(const View& data, int root, Traffic traffic) {
  if (size() == 1 || data.numel() == 0) return;
  CheckPieces("broadcast", std::span(&data, 1));
  // Along a ring: all ranks but the last pass it on.
  const bool last = (rank() - root + size()) % size() == size() - 1;
  if (!Count(last ? 0 : static_cast<int64_t>(data.bytes()), traffic, data)) return;
  const KernelTimer timer(profile_, "Broadcast");
  DoBroadcast(data, root);
}

void Communicator::Send(const View& data, int to, Traffic traffic) {
  SHOAL_CHECK(to >= 0 && to < size() && to != rank(), "send", "rank {} to rank {} of {}", rank(),
              to, size());
  CheckPieces("send", std::span(&data, 1));
  if (!Count(static_cast<int64_t>(data.bytes()), traffic, data)) return;
  const KernelTimer timer(profile_, "Send");
  DoSend(data, to);
}

void Communicator::Receive(const View& data, int from, Traffic traffic) {
  SHOAL_CHECK(from >= 0 && from < size() && from != rank(), "receive", "rank {} from rank {} of {}",
              rank(), from, size());
  CheckPieces("receive", std::span(&data, 1));
  if (!Count(0, traffic, data)) return;
  const KernelTimer timer(profile_, "Receive");
  DoReceive(data, from);
}

std::vector<std::string> Communicator::AllGatherStrings(const std::string& mine) {
  std::vector<std::string> all = DoAllGatherStrings(mine);
  // Along a ring, a rank passes on every piece but its neighbour's.
  for (int r = 0; r < size() && size() > 1; ++r) {
    if (r == (rank() + 1) % size()) continue;
    wire_bytes_[static_cast<size_t>(Traffic::kControl)] +=
        static_cast<int64_t>(all[static_cast<size_t>(r)].size());
  }
  return all;
}

std::unique_ptr<Communicator> Communicator::Duplicate() {
  std::vector<int> all(static_cast<size_t>(size()));
  std::iota(all.begin(), all.end(), 0);
  return Subgroup(all);
}

double Communicator::Scalar(double value, ReduceOp op) {
  const View view(&value, DType::kF64, {1});
  AllReduce(std::span(&view, 1), op, Traffic::kControl);
  return value;
}

double Communicator::Sum(double value) { return Scalar(value, ReduceOp::kSum); }
double Communicator::Max(double value) { return Scalar(value, ReduceOp::kMax); }

std::unique_ptr<Communicator> MakeMetaCommunicator(int rank, int size) {
  return std::make_unique<MetaCommunicator>(rank, size);
}

std::unique_ptr<Communicator> MakeSelfCommunicator() {
  return std::make_unique<SelfCommunicator>();
}

}  // namespace shoal

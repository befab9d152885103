#include "parallel/communicator.h"

#include <unistd.h>

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
  void Abort(int) override {}

 protected:
  void DoAllReduce(std::span<const View>, ReduceOp) override {}
  void DoBroadcast(const View&, int) override {}
  std::vector<std::string> DoAllGatherStrings(const std::string& mine) override { return {mine}; }
};

// Counts what a rank of a group would send, and moves nothing: the planner runs the training step
// over it.
class MetaCommunicator : public SelfCommunicator {
 public:
  MetaCommunicator(int rank, int size) : rank_(rank), size_(size) {}
  int rank() const override { return rank_; }
  int size() const override { return size_; }

 protected:
  std::vector<std::string> DoAllGatherStrings(const std::string& mine) override {
    return std::vector<std::string>(static_cast<size_t>(size_), mine);
  }

 private:
  int rank_, size_;
};

}  // namespace

void Communicator::AllReduce(std::span<const View> pieces, ReduceOp op, Traffic traffic) {
  if (size() == 1 || pieces.empty()) return;
  const bool meta = pieces[0].device.type == DeviceType::kMeta;
  int64_t elements = 0;
  for (const View& piece : pieces) {
    SHOAL_CHECK(piece.contiguous() && IsFloat(piece.dtype) && piece.dtype == pieces[0].dtype,
                "all-reduce", "pieces must be contiguous and of one float dtype");
    SHOAL_CHECK(meta || piece.device.type == DeviceType::kCpu, "all-reduce",
                "this communicator moves host memory, not {}", Name(piece.device.type));
    elements += piece.numel();
  }
  // Ring form: a rank sends every shard but its own to be summed, and then every sum but its
  // neighbour's.
  const auto shard = [&](int r) { return elements * (r + 1) / size() - elements * r / size(); };
  const int64_t sent = 2 * elements - shard(rank()) - shard((rank() + 1) % size());
  wire_bytes_[static_cast<int>(traffic)] += sent * static_cast<int64_t>(SizeOf(pieces[0].dtype));
  if (elements == 0 || meta) return;
  const KernelTimer timer(profile_, "AllReduce");
  DoAllReduce(pieces, op);
}

void Communicator::Broadcast(const View& data, int root, Traffic traffic) {
  if (size() == 1 || data.numel() == 0) return;
  const bool meta = data.device.type == DeviceType::kMeta;
  SHOAL_CHECK(data.contiguous() && (meta || data.device.type == DeviceType::kCpu), "broadcast",
              "this communicator moves contiguous host memory");
  // Along a ring: all ranks but the last pass it on.
  if ((rank() - root + size()) % size() != size() - 1) {
    wire_bytes_[static_cast<int>(traffic)] += static_cast<int64_t>(data.bytes());
  }
  if (meta) return;
  const KernelTimer timer(profile_, "Broadcast");
  DoBroadcast(data, root);
}

std::vector<std::string> Communicator::AllGatherStrings(const std::string& mine) {
  std::vector<std::string> all = DoAllGatherStrings(mine);
  // Along a ring, a rank passes on every piece but its neighbour's.
  for (int r = 0; r < size() && size() > 1; ++r) {
    if (r == (rank() + 1) % size()) continue;
    wire_bytes_[static_cast<int>(Traffic::kControl)] +=
        static_cast<int64_t>(all[static_cast<size_t>(r)].size());
  }
  return all;
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

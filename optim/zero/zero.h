// The sharded optimizer: ZeRO (Rajbhandari et al., arXiv 1910.02054) in four stages. Model states
// are cut over the ranks that share parameters:
//   stage 0  nothing: gradients are all-reduced, every rank updates everything
//   stage 1  optimizer states: gradients are reduce-scattered after the last micro-batch, a rank
//            updates its share, and parameters are all-gathered, each waited for at its next use
//   stage 2  and gradients: reduce-scattered after every micro-batch, only the share is kept
//   stage 3  and parameters: a unit's are gathered before its forward and its backward, one unit
//            ahead, and freed behind it
// Parameters are cut as flat ranges of buckets, so shares are equal but for one element, and some
// may be empty. Collectives run behind backward in the order of the buckets.
//
// The ranks may form several groups that each hold all of the states (hybrid sharding, after MiCS,
// Zhang et al., arXiv 2205.00119): cut within a group, replicated across. Then a rank's share of
// the gradient is also all-reduced over its replicas, once per step; stage 0 is groups of one.
//
// Optimizer states may lie in a file (ZeRO-Infinity, Rajbhandari et al., arXiv 2104.07857): see
// core/mapped_file.h.
//
// The update may happen inside backward (after LOMO, Lv et al., arXiv 2306.09782, with any rule):
// as soon as a bucket's gradient is final it is used and freed, so that no more than a few buckets
// of gradients live at once. The numbers are the same to the bit; what needs the whole gradient
// before the first update, clipping by its norm or leaving a step out, there cannot be.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/mapped_file.h"
#include "core/module.h"
#include "optim/update_rule.h"
#include "parallel/comm_queue.h"
#include "parallel/mesh.h"

namespace shoal {

struct ZeroOptions {
  int stage = 0;
  DType compute = DType::kF32;    // of parameters; narrower ones get an f32 master copy,
  bool split_master = false;      // or what that is beside the parameter (kernels/optimizer.h)
  DType gradients = DType::kF32;  // held and exchanged
  UpdateRuleOptions rule;
  int64_t bucket_bytes = int64_t{8} << 20;  // of gradients, below stage 3
  int shard_ranks = 0;  // that share one copy of the states; 0: all that share parameters
  // Where the optimizer's states are: in host memory, or in a file in this folder, instead of where
  // the rank computes. A device's updates are then made on the host (ZeRO-Offload, arXiv
  // 2101.06840, and ZeRO-Infinity, arXiv 2104.07857). On the CPU host memory is where they are
  // anyhow.
  bool offload_host = false;
  std::string offload_dir;
  bool in_backward = false;  // updates
  // The shares of gradients that stages 2 and 3 keep lie in one array from the start (ZeRO-R's MD,
  // arXiv 1910.02054, section 6.3), instead of between what a backward pass frees. No effect with
  // in_backward, whose shares do not stay.
  bool contiguous_gradients = false;
};

class ZeroOptimizer {
 public:
  static constexpr const char *kMaster = "master", *kSplitMaster = "split_master";

  // Gives the parameters of `model` memory and their values: `initialise` fills one that is whole
  // at the time. `units` are what stage 3 gathers together, in the order of forward; a parameter
  // outside them is a unit of its own. Hooks what it is given, which must outlive it.
  // `pass_of`: in which backward pass over a micro-batch a parameter's gradient comes, from 0;
  // those of a unit agree. kLate: its share is complete only after all passes of a step.
  static constexpr int kLate = -1;
  ZeroOptimizer(
      Module& model, const std::vector<Module*>& units, Mesh& mesh, const ZeroOptions& options,
      const std::function<void(const Parameter&)>& initialise,
      const std::function<int(const Parameter&)>& pass_of = [](const Parameter&) { return 0; });
  ~ZeroOptimizer();
  ZeroOptimizer(const ZeroOptimizer&) = delete;
  ZeroOptimizer& operator=(const ZeroOptimizer&) = delete;

  // Before a step's passes: the rate of its updates, if they happen in backward.
  void BeginStep(double lr);
  // After each backward pass over a micro-batch, `last`: of this step. Exchanges what no hook has:
  // a parameter that was not used has a gradient of zero, and every rank takes part in every
  // collective.
  void FinishPass(int pass, bool last);
  // After all passes.
  void FinishStep();
  // Of the gradient over all ranks, in f64, summed in a fixed order. After the last micro-batch.
  double GradNorm();
  // Consumes the gradients; to be called in any case. What was updated in backward stays so:
  // `gradient_scale` must be 1 there.
  void Step(double lr, double gradient_scale);
  // The same without an update: nothing changes but that they are gone.
  void DropGradients();

  int64_t step() const { return step_; }  // updates made
  void set_step(int64_t step) { step_ = step; }

  // What this rank holds of each parameter and of each state: the elements [begin, begin + n) of
  // the parameter's slice, n >= 1.
  struct Piece {
    std::string state;  // "" for the value, or kMaster, kSplitMaster, "m", ..
    const Parameter* parameter;
    int64_t begin;
    Tensor tensor;  // [n]
  };
  // `owned`: without what a rank that shares the slice holds too.
  std::vector<Piece> Pieces(bool owned = false) const;
  // After values were written into the pieces from outside: all ranks' whole parameters are as
  // their owners have them.
  void ShareValues();
  // The same, where the values are new: masters follow them.
  void TakeValues();
  // All parameters whole, until the next forward. For whoever reads them from outside.
  void GatherParameters();

  // Which of the groups with a copy of all states this rank is in.
  int replica() const { return replicas_->rank(); }
  // Bytes that the data-parallel exchange has sent, without control scalars.
  int64_t wire_bytes() const {
    return shard_->wire_bytes(Traffic::kData) + replicas_->wire_bytes(Traffic::kData) + ahead_;
  }
  void set_profile(KernelProfile* profile) { queue_.set_profile(profile); }

 private:
  // What a rank owns of one parameter: [begin, begin + count) of it, `at` in the bucket's share.
  struct Slice {
    size_t parameter;
    int64_t begin, count, at;
  };
  // Parameters that are exchanged together; the share of a rank is a range of their concatenation.
  struct Bucket {
    std::vector<Parameter*> parameters;
    const std::string* name = nullptr;  // for its memory: "first parameter .. last"
    bool trainable = true;
    int pass = 0;
    int64_t elements = 0, share = 0;
    int64_t place = 0;           // of the share in shares_
    std::vector<Slice> slices;   // this rank's
    Tensor values;               // [share], stage 3
    Tensor gradient;             // [share], stages 2 and 3, while there is one
    bool kept = false;           // the exchange under way writes to it
    Tensor master;               // [share], where parameters are narrower: f32, or i16 if split
    std::vector<Tensor> states;  // [share] each
    int waiting = 0;             // parameters whose gradient is not there yet
    bool final = false;          // the gradient is that of all micro-batches
    CommQueue::Ticket ticket = 0;
  };
  // What stage 3 gathers together.
  struct Unit {
    std::vector<Bucket*> buckets;
    int pass = 0;
    bool requested = false;
    CommQueue::Ticket ticket = 0;
  };

  // Elements [begin, begin + count) of a contiguous tensor.
  static View Flat(const Tensor& t, int64_t begin, int64_t count);
  std::vector<size_t> CutBuckets(const std::vector<std::shared_ptr<Parameter>>& parameters,
                                 int pass, bool whole);
  void CutShare(Bucket& bucket) const;
  static int Awaited(const Bucket& bucket);
  static void DropGradients(Bucket& bucket);
  static std::vector<Slice> Owned(const Bucket& bucket);
  void HookGradients(Bucket& bucket);
  void HookUnits(const std::vector<Module*>& modules);
  void AwaitValues(Bucket& bucket);
  void MakeStates(Bucket& bucket) const;
  void SetMaster(const Bucket& bucket) const;
  static std::vector<View> States(const Bucket& bucket);
  View Value(const Bucket& bucket, const Slice& slice) const;
  View Gradient(const Bucket& bucket, const Slice& slice) const;

  void ReduceReady(int pass);
  void Reduce(Bucket& bucket);
  void Retire(Bucket& bucket);
  void HoldShare(Bucket& bucket) const;
  void TakeShare(Bucket& bucket);
  CommQueue::Ticket SumOverReplicas(const Bucket& bucket);
  void ClearSquares();
  void AddSquares(const Bucket& bucket);
  void Update(Bucket& bucket, double lr, double gradient_scale);
  void UpdateOnHost(const UpdateRule::Shard& shard, double lr, double gradient_scale);
  CommQueue::Ticket Gather(const Bucket& bucket);
  void SendForValues(Bucket& bucket);

  bool Last(size_t unit) const;  // of its pass' modules
  void Request(Unit& unit);
  void Ensure(Unit& unit);
  void Release(Unit& unit);
  void ReleaseAlone();

  ZeroOptions options_;
  Mesh& mesh_;
  std::unique_ptr<Communicator> shard_, replicas_;  // the queue's, while it works
  CommQueue queue_;
  std::unique_ptr<UpdateRule> rule_;
  std::unique_ptr<ExecutionContext> host_;  // null: states are updated where the rank computes
  std::unique_ptr<MappedFile> file_;        // null: states are in memory
  std::vector<std::shared_ptr<Parameter>> parameters_;
  std::unordered_map<const Parameter*, int64_t> number_;  // in parameters_
  std::deque<Bucket> buckets_;  // in the order in which backward completes them, within a pass
  // By pass: its trainable buckets, and which is to be reduced next, the same on every rank.
  struct Order {
    std::vector<Bucket*> buckets;
    size_t next = 0;
  };
  std::map<int, Order> passes_;
  std::deque<Bucket*> in_flight_;
  std::deque<Unit> units_;  // the modules', then those of single parameters
  size_t modules_ = 0;
  int64_t step_ = 0;
  int64_t ahead_ = 0;  // bytes of the gathers that were posted
  double lr_ = 0;      // of updates in backward
  Tensor shares_;      // of gradients, if they are contiguous
  Tensor squares_;     // f64 [parameters], of this rank's gradients, where it is to be known
};

}  // namespace shoal

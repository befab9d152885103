// Sequence (context) parallelism: every rank of a group holds some rows of each sequence, and
// attention is computed by a schedule of tiles and messages (parallel/sequence_schedule.h).
//
//   auto group = ApplySequenceParallel(model, options, mesh.axis(MeshAxis::kCp));
//
// A rank's batch is the rows that its layout says, in that order: ids, labels (the next token of
// the whole sequence, shifted before it is cut), positions and documents alike;
// SequenceLayout::Tokens gives their places. Everything outside attention works on rows as they
// are.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <string>

#include "core/layers.h"
#include "parallel/sequence_pass.h"
#include "parallel/sequence_simulator.h"

namespace shoal {

struct SequenceOptions {
  std::optional<SequenceKind> schedule;  // none: for each pass what takes least time on `machine`
  std::optional<SequenceKind> backward;  // none: as `schedule`; ulysses and hybrid go with
                                         // themselves only
  // Whether a token ring goes both ways by heads, where `schedule` is one; none: for each pass what
  // takes less time on `machine`.
  std::optional<bool> both_ways;
  int ulysses = 0;  // of hybrid: ranks that exchange heads; 0: what takes least time on `machine`
  SequenceLayoutKind layout = SequenceLayoutKind::kZigzag;
  bool causal = true;
  int64_t window = 0;  // > 0: a query sees that many keys, its own included
  // Partial results of bf16 travel in f32. If not, in bf16: half the bytes, and each part's
  // rounding adds to that of the whole, which is 1.2 times the error of O at 8 ranks.
  bool wide_results = true;
  // Of a whole sequence. 0: the ranks tell each other with each new batch, which the meta device
  // cannot.
  int64_t tokens = 0;
  SequenceMachine machine = {};
};

// The sizes of hybrid's groups that a group of `ranks` may have, where `ulysses` asks for one of
// them or, by 0, for any. Throws an Error that says what to do if there is none.
std::vector<int> HybridGroups(int ranks, int64_t ulysses);

// What the attention layers of a rank share: the group's messages, and the plan for a batch.
class SequenceGroup {
 public:
  // Collective; `cp` must outlive it. Options that do not fit are refused before any rank
  // communicates.
  SequenceGroup(const SequenceOptions& options, Communicator& cp);

  struct Plan {
    int64_t tokens, heads, kv_heads, batch, head_dim;
    DType dtype;
    std::vector<int32_t> documents;
    SequenceSchedule forward, backward;
    std::string reason;  // why these
  };
  // For q [B, T, N, H] and k [B, T, K, H] of this rank. The ranks exchange the sequence's length
  // and its documents when info's tensors are others than at the last call; all have documents or
  // none, those without tokens too. What auto chose stays
  // for batches of the same shape.
  std::shared_ptr<const Plan> PlanFor(const Tensor& q, const Tensor& k, const SequenceInfo& info);

  const SequenceOptions& options() const { return options_; }
  int rank() const { return cp_.rank(); }
  SequenceWire& wire() { return wire_; }
  int64_t wire_bytes() const { return wire_.bytes(); }  // that this rank has sent
  void set_profile(KernelProfile* profile) { wire_.set_profile(profile); }
  // The last plan's schedules and the reason; empty before.
  std::string Describe() const;

 private:
  void Learn(const Tensor& q, const SequenceInfo& info);

  SequenceOptions options_;
  Communicator& cp_;
  SequenceWire wire_;
  Tensor positions_, documents_;  // of the batch that is known
  int64_t tokens_ = 0;
  std::vector<int32_t> ids_;  // [B, S] by token
  std::deque<std::shared_ptr<const Plan>> plans_;
};

// Attention over all rows of the group. q, k and v are this rank's rows, and so is the result. Its
// backward communicates, so all ranks must run it, in the same order. No KV cache.
class SequenceAttention : public InnerAttention {
 public:
  explicit SequenceAttention(std::shared_ptr<SequenceGroup> group,
                             const kernels::AttentionDropout& dropout = {})
      : InnerAttention(dropout), group_(std::move(group)) {}
  Tensor Forward(const Tensor& q, const Tensor& k, const Tensor& v,
                 const SequenceInfo& info) override;

 private:
  std::shared_ptr<SequenceGroup> group_;
};

// Replaces every InnerAttention of `root`; after ApplyTensorParallel. Collective. A group of one is
// the same code.
std::shared_ptr<SequenceGroup> ApplySequenceParallel(Module& root, const SequenceOptions& options,
                                                     Communicator& cp);

}  // namespace shoal

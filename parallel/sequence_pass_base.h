// What the parts of a pass share: the loop over their actions, and messages.
#pragma once

#include <span>

#include "parallel/sequence_pass.h"

namespace shoal {

class SequencePassBase {
 public:
  using Actions = std::span<const SequenceAction>;

  // `owner`: whose rows `arrays` has: a group's or, while heads are exchanged, a rank's.
  SequencePassBase(const SequenceSchedule& schedule, const SequencePassOptions& options,
                   SequenceWire& wire, int owner, Actions actions, SequenceArrays& arrays);
  virtual ~SequencePassBase() = default;
  SequencePassBase(const SequencePassBase&) = delete;
  SequencePassBase& operator=(const SequencePassBase&) = delete;

  void Run();

 protected:
  using Tag = SequenceTag;

  virtual void Begin() = 0;
  virtual void End() = 0;
  // Where the part of a message lies here; it is about to be read.
  virtual View ToSend(const SequenceAction& a, Tag tag, const SequenceRows& rows) = 0;
  virtual void Arrived(const SequenceAction& a) = 0;  // as received()
  virtual void Merge(const SequenceAction& /*a*/) {}
  virtual void Tile(const SequenceAction& /*a*/) {}
  virtual void Done() {}  // with actions()[at()]

  bool forward() const { return s_.pass == SequencePass::kForward; }
  Actions actions() const { return list_; }
  size_t at() const { return at_; }  // the action in progress
  const Tensor& received() const { return received_; }
  void DropReceived() { received_ = {}; }

  static bool IsStatistic(Tag tag) { return tag == Tag::kLse || tag == Tag::kDelta; }
  static bool OfKeys(Tag tag) {
    return tag == Tag::kK || tag == Tag::kV || tag == Tag::kDK || tag == Tag::kDV;
  }
  static int TokenDim(Tag tag) { return IsStatistic(tag) ? 2 : 1; }
  static int HeadDim(Tag tag) { return IsStatistic(tag) ? 1 : 2; }
  Tensor Wide(const Dims& shape, double value,
              MemoryClass memory_class = MemoryClass::kWorkspace) const {
    return Tensor::Full(shape, wide_, value, memory_class);
  }
  Tensor Scratch(const Dims& shape, DType dtype) const {
    return Tensor::Empty(shape, dtype, MemoryClass::kWorkspace);
  }
  // Rounded, without a copy where nothing is rounded.
  Tensor Result(const Tensor& wide) const { return dtype_ == wide_ ? wide : wide.To(dtype_); }
  MemoryClass ResultClass() const {
    return dtype_ == wide_ ? MemoryClass::kActivations : MemoryClass::kWorkspace;
  }
  // `view`, or a contiguous copy that `memory` keeps.
  View Contiguous(const View& view, Tensor& memory) const;
  // to += from, [B, tokens, heads, H] of one dtype.
  void AddTo(const View& to, const View& from) const;
  // i32 [B, tokens]; undefined if each sequence is one document.
  Tensor Documents(const TokenRange& range) const;

  // Calls f(tag, rows, part) for each part of a message, in their order.
  template <class F>
  void ForParts(const SequenceAction& a, const Tensor& buffer, F f) const {
    auto* data = buffer.view().as<char>();
    for (const Tag tag : TagsOf(a.payload, s_.pass)) {
      const int64_t heads = RowElements(s_, a, tag, 1);
      for (const SequenceRows& rows : a.rows) {
        const Dims shape = IsStatistic(tag) ? Dims{batch_, heads, rows.count}
                                            : Dims{batch_, rows.count, heads, head_dim_};
        const View part(data, WireType(a.payload, tag), shape, buffer.device());
        data += part.bytes();
        f(tag, rows, part);
      }
    }
  }

  const SequenceSchedule& s_;
  const SequencePassOptions& options_;
  const int owner_;
  SequenceArrays& x_;
  const DType dtype_, wide_;
  const int64_t batch_, head_dim_;
  const Stream& stream_;

 private:
  DType WireType(SequencePayload payload, Tag tag) const;
  Tensor Buffer(const SequenceAction& a) const;
  void Send(const SequenceAction& a);
  void PostReceive(size_t from);
  void Receive(const SequenceAction& a);

  SequenceWire& wire_;
  const Actions list_;
  const SequenceWidths widths_;
  size_t at_ = 0;
  Tensor arriving_, received_;  // the next message, and the one that came last
  CommQueue::Ticket ticket_ = 0;
  Tensor last_sent_;
  const SequenceAction* last_send_ = nullptr;
};

// The tiles, and messages of rows between those who have the same heads. `round`: gradients are
// left as wide as sums if not.
std::unique_ptr<SequencePassBase> MakeRowsPass(const SequenceSchedule& schedule,
                                               const SequencePassOptions& options,
                                               SequenceWire& wire, int rank,
                                               SequencePassBase::Actions actions, bool round,
                                               SequenceArrays& arrays);
// The exchange of heads, there or back: `arrays` are of the rank's rows and all heads, `share` of
// its group's rows and the rank's heads. What the payload holds is made on the side that gets it.
std::unique_ptr<SequencePassBase> MakeHeadsExchange(const SequenceSchedule& schedule,
                                                    const SequencePassOptions& options,
                                                    SequenceWire& wire, int rank,
                                                    SequencePassBase::Actions actions,
                                                    SequencePayload payload, SequenceArrays& arrays,
                                                    SequenceArrays& share);

}  // namespace shoal

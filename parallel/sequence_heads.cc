// The exchange of heads within a group: each rank gets the group's rows of its share of the heads,
// and gives back what comes of them; see parallel/sequence_pass.h.
#include "kernels/copy.h"
#include "parallel/sequence_pass_base.h"

namespace shoal {
namespace {

class HeadsExchange : public SequencePassBase {
 public:
  HeadsExchange(const SequenceSchedule& schedule, const SequencePassOptions& options,
                SequenceWire& wire, int rank, Actions actions, SequencePayload payload,
                SequenceArrays& arrays, SequenceArrays& share)
      : SequencePassBase(schedule, options, wire, rank, actions, arrays),
        back_(payload == SequencePayload::kHeadsResult),
        payload_(payload),
        share_(share) {}

 protected:
  void Begin() override {
    const SequenceSchedule::Heads heads = s_.Share(owner_);
    const int kv_heads = heads.empty() ? 0 : s_.KvEnd(heads.end) - s_.KvBegin(heads.begin);
    for (const Tag tag : TagsOf(payload_, s_.pass)) {
      const bool of_keys = OfKeys(tag);
      if (back_) {
        const Dims shape{batch_, s_.layout.Rows(owner_), of_keys ? s_.kv_heads : s_.heads,
                         head_dim_};
        Of(x_, tag) = Sums(tag) ? Wide(shape, 0, ResultClass()) : Tensor::Empty(shape, dtype_);
      } else {
        const Dims shape{batch_, s_.groups.Rows(s_.GroupOf(owner_)),
                         of_keys ? kv_heads : heads.end - heads.begin, head_dim_};
        Of(share_, tag) = forward() ? Tensor::Empty(shape, dtype_) : Scratch(shape, dtype_);
      }
    }
    if (heads.empty()) return;
    // This rank's rows of its own share.
    SequenceAction own{.op = SequenceOp::kReceive,
                       .payload = payload_,
                       .owner = owner_,
                       .head_begin = heads.begin,
                       .head_end = heads.end};
    const auto ranges = s_.layout.ranges(owner_);
    for (int i = 0; i < std::ssize(ranges); ++i)
      for (const Tag tag : TagsOf(payload_, s_.pass)) {
        const SequenceRows rows{i, 0, ranges[static_cast<size_t>(i)].count};
        Keep(own, tag, rows, ToSend(own, tag, rows));
      }
  }

  void End() override {
    for (const Tag tag : TagsOf(payload_, s_.pass))
      if (back_ && Sums(tag)) Of(x_, tag) = Result(Of(x_, tag));
  }

  View ToSend(const SequenceAction& a, Tag tag, const SequenceRows& rows) override {
    return back_ ? InShare(a, tag, rows) : InRows(a, tag, rows);
  }
  void Arrived(const SequenceAction& a) override {
    ForParts(a, received(), [&](Tag tag, const SequenceRows& rows, const View& part) {
      Keep(a, tag, rows, part);
    });
    DropReceived();
  }

 private:
  static Tensor& Of(SequenceArrays& arrays, Tag tag) {
    switch (tag) {
      case Tag::kQ:
        return arrays.q;
      case Tag::kK:
        return arrays.k;
      case Tag::kV:
        return arrays.v;
      case Tag::kO:
        return arrays.out;
      case Tag::kDO:
        return arrays.dout;
      case Tag::kDQ:
        return arrays.dq;
      case Tag::kDK:
        return arrays.dk;
      default:
        return arrays.dv;
    }
  }
  // Several shares give to it.
  bool Sums(Tag tag) const { return (tag == Tag::kDK || tag == Tag::kDV) && s_.SharesKvHeads(); }

  void Keep(const SequenceAction& a, Tag tag, const SequenceRows& rows, const View& part) {
    if (!back_) return kernels::Copy(stream_, InShare(a, tag, rows), part);
    const View to = InRows(a, tag, rows);
    Sums(tag) ? AddTo(to, part) : kernels::Copy(stream_, to, part);
  }

  // A message's heads of the owner's rows, where all heads are.
  View InRows(const SequenceAction& a, Tag tag, const SequenceRows& rows) const {
    const int first = OfKeys(tag) ? s_.KvBegin(a.head_begin) : a.head_begin;
    const TokenRange range = OwnersRange(a, rows);
    return Of(x_, tag)
        .view()
        .Narrow(1, range.row, range.count)
        .Narrow(2, first, RowElements(s_, a, tag, 1));
  }
  // The same rows among the group's. A rank's range lies in one of its group.
  View InShare(const SequenceAction& a, Tag tag, const SequenceRows& rows) const {
    const TokenRange range = OwnersRange(a, rows);
    const auto row = [&](int64_t i) { return s_.groups.Place(range.Token(i)).second; };
    View view = Of(share_, tag).view().Narrow(1, row(0), range.count);
    if (range.count > 1) view.strides[1] *= row(1) - row(0);
    return view;
  }
  TokenRange OwnersRange(const SequenceAction& a, const SequenceRows& rows) const {
    return s_.layout.ranges(a.owner)[static_cast<size_t>(rows.range)].Part(rows.first, rows.count);
  }

  const bool back_;
  const SequencePayload payload_;
  SequenceArrays& share_;
};

}  // namespace

std::unique_ptr<SequencePassBase> MakeHeadsExchange(const SequenceSchedule& schedule,
                                                    const SequencePassOptions& options,
                                                    SequenceWire& wire, int rank,
                                                    SequencePassBase::Actions actions,
                                                    SequencePayload payload, SequenceArrays& arrays,
                                                    SequenceArrays& share) {
  return std::make_unique<HeadsExchange>(schedule, options, wire, rank, actions, payload, arrays,
                                         share);
}

}  // namespace shoal

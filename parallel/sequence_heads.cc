// Passes in which every rank gets all rows of its share of the heads; see parallel/sequence_pass.h.
#include "kernels/attention.h"
#include "kernels/copy.h"
#include "kernels/elementwise.h"
#include "parallel/sequence_pass_base.h"

namespace shoal {
namespace {

// The rows of a layout's range among all tokens, dimension 1 of [B, S, heads, H].
View TokensOf(const View& all, const TokenRange& range) {
  View rows = all.Narrow(1, range.begin, range.count);
  rows.strides[1] *= range.step;
  return rows;
}

class HeadsPass : public SequencePassBase {
 public:
  using SequencePassBase::SequencePassBase;

 protected:
  void Begin() override {
    for (const SequenceAction& a : actions())
      if (a.op == SequenceOp::kTile) mine_ = &a;
    const int64_t tokens = s_.layout.tokens(), rows = s_.layout.Rows(rank_);
    const Dims q{batch_, tokens, Heads(), head_dim_}, k{batch_, tokens, KvHeads(), head_dim_};
    if (forward()) {
      x_.head_q = Tensor::Empty(q, dtype_);
      x_.head_k = Tensor::Empty(k, dtype_);
      x_.head_v = Tensor::Empty(k, dtype_);
      x_.head_out = Tensor::Empty(q, dtype_);
      x_.head_lse = Tensor::Empty({batch_, Heads(), tokens}, wide_);
      x_.out = Tensor::Empty({batch_, rows, s_.heads, head_dim_}, dtype_);
    } else {
      dout_ = Scratch(q, dtype_);
      dq_ = Wide(q, 0);
      dk_ = Wide(k, 0);
      dv_ = Wide(k, 0);
      x_.dq = Tensor::Empty({batch_, rows, s_.heads, head_dim_}, dtype_);
      x_.dk = Wide({batch_, rows, s_.kv_heads, head_dim_}, 0, ResultClass());
      x_.dv = Wide({batch_, rows, s_.kv_heads, head_dim_}, 0, ResultClass());
    }
    // What this rank has of its own share.
    for (const TokenRange& range : s_.layout.ranges(rank_)) {
      const auto take = [&](Tag tag, const Tensor& from, const Tensor& to) {
        kernels::Copy(stream_, TokensOf(to.view(), range),
                      OfHeads(*mine_, tag, from.view()).Narrow(1, range.row, range.count));
      };
      if (forward()) {
        take(Tag::kQ, x_.q, x_.head_q);
        take(Tag::kK, x_.k, x_.head_k);
        take(Tag::kV, x_.v, x_.head_v);
      } else {
        take(Tag::kDO, x_.dout, dout_);
      }
    }
  }

  void End() override {
    if (forward()) return;
    x_.dk = Result(x_.dk);
    x_.dv = Result(x_.dv);
  }

  View ToSend(const SequenceAction& a, Tag tag, const SequenceRows& rows) override {
    const TokenRange range = s_.Range(a.owner, rows);
    if (a.payload == SequencePayload::kHeadsResult) return TokensOf(OfShare(tag), range);
    return OfHeads(a, tag, OfRows(tag)).Narrow(1, range.row, range.count);
  }

  void Arrived(const SequenceAction& a) override {
    ForParts(a, received(), [&](Tag tag, const SequenceRows& rows, const View& part) {
      Keep(a, tag, s_.Range(a.owner, rows), part);
    });
    DropReceived();
  }

  void Merge(const SequenceAction& /*a*/) override {}

  void Tile(const SequenceAction& a) override {
    if (Heads() > 0) Attend();
    // This rank's rows of its own share.
    SequenceAction own = a;
    own.payload = SequencePayload::kHeadsResult;
    for (const TokenRange& range : s_.layout.ranges(rank_))
      for (const Tag tag : TagsOf(own.payload, s_.pass))
        Keep(own, tag, range, TokensOf(OfShare(tag), range));
  }

 private:
  int Heads() const { return mine_->head_end - mine_->head_begin; }
  int KvHeads() const {
    return Heads() == 0 ? 0 : s_.KvEnd(mine_->head_end) - s_.KvBegin(mine_->head_begin);
  }

  // The heads of a message, or their kv heads.
  View OfHeads(const SequenceAction& a, Tag tag, const View& x) const {
    const int64_t count = RowElements(s_, a, tag, 1);
    const bool of_keys = tag == Tag::kK || tag == Tag::kV || tag == Tag::kDK || tag == Tag::kDV;
    const int first = of_keys ? s_.KvBegin(a.head_begin) : a.head_begin;
    return count == 0 ? x.Narrow(2, 0, 0) : x.Narrow(2, first, count);
  }
  // All heads of this rank's rows, and all rows of this rank's heads.
  View OfRows(Tag tag) const {
    switch (tag) {
      case Tag::kQ:
        return x_.q.view();
      case Tag::kK:
        return x_.k.view();
      case Tag::kV:
        return x_.v.view();
      case Tag::kO:
        return x_.out.view();
      case Tag::kDO:
        return x_.dout.view();
      case Tag::kDQ:
        return x_.dq.view();
      case Tag::kDK:
        return x_.dk.view();
      default:
        return x_.dv.view();
    }
  }
  View OfShare(Tag tag) const {
    switch (tag) {
      case Tag::kQ:
        return x_.head_q.view();
      case Tag::kK:
        return x_.head_k.view();
      case Tag::kV:
        return x_.head_v.view();
      case Tag::kO:
        return x_.head_out.view();
      case Tag::kDO:
        return dout_.view();
      case Tag::kDQ:
        return dq_.view();
      case Tag::kDK:
        return dk_.view();
      default:
        return dv_.view();
    }
  }

  // What has come, or was here.
  void Keep(const SequenceAction& a, Tag tag, const TokenRange& range, const View& part) {
    if (part.numel() == 0) return;
    if (a.payload == SequencePayload::kHeads)
      return kernels::Copy(stream_, TokensOf(OfShare(tag), range), part);
    const View to = OfHeads(a, tag, OfRows(tag)).Narrow(1, range.row, range.count);
    if (tag != Tag::kDK && tag != Tag::kDV) return kernels::Copy(stream_, to, part);
    if (part.dtype == to.dtype) return AddTo(to, part);
    const Tensor wide = Scratch(part.shape, to.dtype);
    kernels::Copy(stream_, wide.view(), part);
    AddTo(to, wide.view());
  }

  // With all the keys, in their order. Where the share cuts a kv head's group of query heads, one
  // kv head at a time.
  void Attend() {
    const SequenceRows all{0, 0, s_.layout.tokens()};
    const TokenRange range{0, all.count, 1, 0};
    const Tensor documents = Documents(range);
    const auto mask = TileMask(range, range, s_.mask);
    if (!mask) return;
    kernels::AttentionOptions options = *mask;
    options.scale = options_.scale;
    const int group = s_.heads / s_.kv_heads;
    const int begin = mine_->head_begin, end = mine_->head_end, kv = s_.KvBegin(begin);
    const bool whole = KvHeads() == 1 || (begin % group == 0 && end % group == 0);
    Tensor delta;
    if (!forward()) {
      delta = Scratch(x_.head_lse.shape(), wide_);
      kernels::AttentionDelta(stream_, delta.view(), dout_.view(), x_.head_out.view());
    }
    for (int h = begin; h < end;) {
      const int next = whole ? end : std::min(end, (h / group + 1) * group);
      const auto of_q = [&](const Tensor& x, int dim) {
        return x.view().Narrow(dim, h - begin, next - h);
      };
      const auto of_k = [&](const Tensor& x) {
        return x.view().Narrow(2, whole ? 0 : h / group - kv, whole ? KvHeads() : 1);
      };
      Tensor lse_memory, delta_memory;
      const View lse = of_q(x_.head_lse, 1);
      if (forward()) {
        const View to = lse.contiguous() ? lse : Contiguous(lse, lse_memory);
        kernels::Attention(stream_, of_q(x_.head_out, 2), to, of_q(x_.head_q, 2), of_k(x_.head_k),
                           of_k(x_.head_v), documents.view(), documents.view(), options);
        if (!lse.contiguous()) kernels::Copy(stream_, lse, to);
      } else {
        kernels::AttentionBackwardTile(
            stream_, of_q(dq_, 2), of_k(dk_), of_k(dv_), of_q(dout_, 2), of_q(x_.head_q, 2),
            of_k(x_.head_k), of_k(x_.head_v), Contiguous(lse, lse_memory),
            Contiguous(of_q(delta, 1), delta_memory), documents.view(), documents.view(), options);
      }
      h = next;
    }
  }

  const SequenceAction* mine_ = nullptr;  // this rank's heads
  Tensor dout_, dq_, dk_, dv_;            // [B, S, heads or kv heads, H]
};

}  // namespace

std::unique_ptr<SequencePassBase> MakeHeadsPass(const SequenceSchedule& schedule,
                                                const SequencePassOptions& options,
                                                SequenceWire& wire, int rank,
                                                SequenceArrays& arrays) {
  return std::make_unique<HeadsPass>(schedule, options, wire, rank, arrays);
}

}  // namespace shoal

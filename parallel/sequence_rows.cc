// Tiles, and rows of queries or keys that move between owners; see parallel/sequence_pass.h.
#include <algorithm>
#include <array>
#include <limits>
#include <map>

#include "core/base/mutation.h"
#include "kernels/attention.h"
#include "kernels/copy.h"
#include "parallel/sequence_pass_base.h"
#include "parallel/sequence_sets.h"

namespace shoal {
namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();

using Views = std::array<View, kSequenceTags>;
View& At(Views& views, SequenceTag tag) { return views[static_cast<size_t>(tag)]; }

// What is held of an owner: its rows of this side.
enum class Store { kQueries, kKeys, kResults, kGradients };

// Rows [first, first + count) of an owner's range, of some heads; views of a tag have these.
struct Block {
  SequenceRows rows;
  SequenceSchedule::Heads heads;
  Views views;
  std::vector<Tensor> memory;
  size_t last_use;     // the index of the last action that touches it
  bool empty = false;  // results that nothing was merged into; their memory is not written yet
};

class RowsPass : public SequencePassBase {
 public:
  RowsPass(const SequenceSchedule& schedule, const SequencePassOptions& options, SequenceWire& wire,
           int rank, Actions actions, bool round, SequenceArrays& arrays)
      : SequencePassBase(schedule, options, wire, schedule.GroupOf(rank), actions, arrays),
        heads_(schedule.Share(rank)),
        round_(round) {}

 protected:
  void Begin() override {
    const int64_t rows = s_.groups.Rows(owner_);
    if (forward()) {
      // One tile gives the results of all keys, already rounded.
      const Dims out = RowShape(Tag::kO, rows, heads_);
      x_.out = Whole() ? Tensor::Empty(out, dtype_) : Wide(out, 0, ResultClass());
      x_.lse = Wide(RowShape(Tag::kLse, rows, heads_), kNothing, MemoryClass::kActivations);
    } else {
      delta_ = Scratch(x_.lse.shape(), wide_);
      kernels::AttentionDelta(stream_, delta_.view(), x_.dout.view(), x_.out.view());
      x_.dq = Wide(RowShape(Tag::kDQ, rows, heads_), 0, ResultClass());
      x_.dk = Wide(RowShape(Tag::kDK, rows, heads_), 0, ResultClass());
      x_.dv = Wide(RowShape(Tag::kDV, rows, heads_), 0, ResultClass());
    }
    const auto ranges = s_.groups.ranges(owner_);
    for (int i = 0; i < std::ssize(ranges); ++i) {
      const TokenRange& range = ranges[static_cast<size_t>(i)];
      const auto own = [&](Store store, std::initializer_list<std::pair<Tag, const Tensor*>> tags) {
        Block block{{i, 0, range.count}, heads_, {}, {}, actions().size()};
        for (const auto& [tag, tensor] : tags)
          At(block.views, tag) = tensor->view().Narrow(TokenDim(tag), range.row, range.count);
        block.empty = store == Store::kResults && Whole();
        held_[{store, owner_}].push_back(std::move(block));
      };
      own(Store::kKeys, {{Tag::kK, &x_.k}, {Tag::kV, &x_.v}});
      if (forward()) {
        own(Store::kQueries, {{Tag::kQ, &x_.q}});
        own(Store::kResults, {{Tag::kO, &x_.out}, {Tag::kLse, &x_.lse}});
      } else {
        own(Store::kQueries,
            {{Tag::kQ, &x_.q}, {Tag::kDO, &x_.dout}, {Tag::kLse, &x_.lse}, {Tag::kDelta, &delta_}});
        own(Store::kResults, {{Tag::kDQ, &x_.dq}});
        own(Store::kGradients, {{Tag::kDK, &x_.dk}, {Tag::kDV, &x_.dv}});
      }
    }
  }

  void End() override {
    if (forward()) {
      if (!Whole()) x_.out = Result(x_.out);
      return;
    }
    if (!round_) return;
    x_.dq = Result(x_.dq);
    x_.dk = Result(x_.dk);
    x_.dv = Result(x_.dv);
  }

  View ToSend(const SequenceAction& a, Tag tag, const SequenceRows& rows) override {
    Block& block = Find(StoreOf(a.payload), a.owner, rows, HeadsOf(a));
    Clear(block);
    return Part(block, tag, rows, HeadsOf(a));
  }

  void Arrived(const SequenceAction& a) override {
    if (a.payload != SequencePayload::kQuery && a.payload != SequencePayload::kKeyValue) return;
    const bool queries = a.payload == SequencePayload::kQuery;
    Tensor kept = received();
    DropReceived();
    if (!queries && Mutated(Mutation::kFirstKeysReused)) {
      if (!first_.defined()) first_ = kept;
      if (first_.numel() == kept.numel()) kept = first_;
    }
    const Store store = StoreOf(a.payload);
    auto& blocks = held_[{store, a.owner}];
    const size_t begin = blocks.size();
    for (const SequenceRows& rows : a.rows)
      blocks.push_back({rows, HeadsOf(a), {}, {kept}, LastUse(store, a.owner, rows, HeadsOf(a))});
    ForParts(a, kept, [&](Tag tag, const SequenceRows& rows, const View& part) {
      for (size_t i = begin; i < blocks.size(); ++i)
        if (blocks[i].rows == rows) At(blocks[i].views, tag) = part;
    });
    for (const SequenceRows& rows : a.rows) {
      if (queries && forward())
        MakeRoom(Store::kResults, {Tag::kO, Tag::kLse}, a, rows);
      else if (queries)
        MakeRoom(Store::kResults, {Tag::kDQ}, a, rows);
      else if (!forward())
        MakeRoom(Store::kGradients, {Tag::kDK, Tag::kDV}, a, rows);
    }
  }

  void Merge(const SequenceAction& a) override {
    const int times = Mutated(Mutation::kPartMergedTwice) ? 2 : 1;
    std::vector<Views> parts(a.rows.size());
    ForParts(a, received(), [&](Tag tag, const SequenceRows& rows, const View& part) {
      At(parts[static_cast<size_t>(std::ranges::find(a.rows, rows) - a.rows.begin())], tag) = part;
    });
    for (size_t i = 0; i < parts.size(); ++i) {
      const SequenceSchedule::Heads heads = HeadsOf(a);
      Block& block = Find(StoreOf(a.payload), a.owner, a.rows[i], heads);
      for (const Tag tag : TagsOf(a.payload, s_.pass)) {
        if (tag == Tag::kLse) continue;
        const View to = Part(block, tag, a.rows[i], heads);
        if (tag != Tag::kO) {
          AddTo(to, At(parts[i], tag));
          continue;
        }
        Clear(block);
        for (int n = 0; n < times; ++n)
          kernels::MergeAttention(stream_, to, Part(block, Tag::kLse, a.rows[i], heads),
                                  At(parts[i], tag), At(parts[i], Tag::kLse));
      }
    }
    DropReceived();
  }

  void Tile(const SequenceAction& a) override { forward() ? ForwardTile(a) : BackwardTile(a); }

  void Done() override {
    for (auto& [key, blocks] : held_)
      std::erase_if(blocks, [&](const Block& b) { return b.last_use <= at(); });
  }

 private:
  bool Whole() const { return forward() && actions().size() == 1; }
  static SequenceSchedule::Heads HeadsOf(const SequenceAction& a) {
    return {a.head_begin, a.head_end};
  }
  // A tag's own heads.
  SequenceSchedule::Heads Of(Tag tag, const SequenceSchedule::Heads& heads) const {
    if (!OfKeys(tag)) return heads;
    return {s_.KvBegin(heads.begin), s_.KvEnd(heads.end)};
  }
  Dims RowShape(Tag tag, int64_t tokens, const SequenceSchedule::Heads& heads) const {
    const SequenceSchedule::Heads own = Of(tag, heads);
    if (IsStatistic(tag)) return {batch_, own.end - own.begin, tokens};
    return {batch_, tokens, own.end - own.begin, head_dim_};
  }

  // Room for what tiles with arrived rows give.
  void MakeRoom(Store store, std::initializer_list<Tag> tags, const SequenceAction& a,
                const SequenceRows& rows) {
    Block block{rows,
                HeadsOf(a),
                {},
                {},
                LastUse(store, a.owner, rows, HeadsOf(a)),
                store == Store::kResults && forward()};
    for (const Tag tag : tags) {
      const Dims shape = RowShape(tag, rows.count, block.heads);
      const Tensor t = block.empty ? Scratch(shape, wide_) : Wide(shape, 0);
      At(block.views, tag) = t.view();
      block.memory.push_back(t);
    }
    held_[{store, a.owner}].push_back(std::move(block));
  }
  // Before anything is merged into a part of it.
  void Clear(Block& block) const {
    if (!block.empty) return;
    block.empty = false;
    kernels::Fill(stream_, At(block.views, Tag::kO), 0);
    kernels::Fill(stream_, At(block.views, Tag::kLse), kNothing);
  }

  Block& Find(Store store, int owner, const SequenceRows& rows,
              const SequenceSchedule::Heads& heads) {
    for (Block& block : held_[{store, owner}])
      if (Inside(rows, block.rows) && heads.begin >= block.heads.begin &&
          heads.end <= block.heads.end)
        return block;
    SHOAL_FAIL(ErrorKind::kBug, "sequence", "rows of rank {} for {} are not here", owner,
               ActionText(actions()[at()]));
  }
  View Part(const Block& block, Tag tag, const SequenceRows& rows,
            const SequenceSchedule::Heads& heads) const {
    const SequenceSchedule::Heads own = Of(tag, heads);
    return block.views[static_cast<size_t>(tag)]
        .Narrow(TokenDim(tag), rows.first - block.rows.first, rows.count)
        .Narrow(HeadDim(tag), own.begin - Of(tag, block.heads).begin, own.end - own.begin);
  }

  static bool Touches(const SequenceAction& a, Store store, int owner, const SequenceRows& rows,
                      const SequenceSchedule::Heads& heads) {
    if (a.head_begin >= heads.end || heads.begin >= a.head_end) return false;
    if (a.op == SequenceOp::kTile) {
      const bool of_keys = store == Store::kKeys || store == Store::kGradients;
      return of_keys ? a.key_owner == owner && Overlap(a.keys, rows)
                     : a.owner == owner && Overlap(a.rows[0], rows);
    }
    return a.op != SequenceOp::kReceive && a.owner == owner && StoreOf(a.payload) == store &&
           std::ranges::any_of(a.rows, [&](const SequenceRows& r) { return Overlap(r, rows); });
  }
  size_t LastUse(Store store, int owner, const SequenceRows& rows,
                 const SequenceSchedule::Heads& heads) const {
    for (size_t i = actions().size(); i > at(); --i)
      if (Touches(actions()[i - 1], store, owner, rows, heads)) return i - 1;
    return at();
  }
  static Store StoreOf(SequencePayload payload) {
    switch (payload) {
      case SequencePayload::kKeyValue:
        return Store::kKeys;
      case SequencePayload::kResult:
        return Store::kResults;
      case SequencePayload::kKeyValueGradient:
        return Store::kGradients;
      default:
        return Store::kQueries;
    }
  }

  struct TileArguments {
    View q, k, v;
    Tensor q_document, k_document;
    kernels::AttentionOptions options;
  };
  TileArguments Arguments(const SequenceAction& a) {
    const SequenceSchedule::Heads heads = HeadsOf(a);
    const Block& queries = Find(Store::kQueries, a.owner, a.rows[0], heads);
    const Block& keys = Find(Store::kKeys, a.key_owner, a.keys, heads);
    const TokenRange q = s_.Range(a.owner, a.rows[0]), k = s_.Range(a.key_owner, a.keys);
    TileArguments t = {Part(queries, Tag::kQ, a.rows[0], heads),
                       Part(keys, Tag::kK, a.keys, heads),
                       Part(keys, Tag::kV, a.keys, heads),
                       Documents(q),
                       Documents(k),
                       *TileMask(q, k, s_.mask)};
    t.options.scale = options_.scale;
    t.options.dropout = options_.dropout;
    t.options.dropout.first_head += heads.begin;
    t.options.dropout.q_begin = q.begin, t.options.dropout.q_step = q.step;
    t.options.dropout.k_begin = k.begin, t.options.dropout.k_step = k.step;
    return t;
  }

  void ForwardTile(const SequenceAction& a) {
    const TileArguments t = Arguments(a);
    const SequenceSchedule::Heads heads = HeadsOf(a);
    Block& block = Find(Store::kResults, a.owner, a.rows[0], heads);
    const View out = Part(block, Tag::kO, a.rows[0], heads),
               lse = Part(block, Tag::kLse, a.rows[0], heads);
    // The first, and all of it.
    if (block.empty && block.rows == a.rows[0] && block.heads == heads) {
      block.empty = false;
      kernels::Attention(stream_, out, lse, t.q, t.k, t.v, t.q_document.view(), t.k_document.view(),
                         t.options);
      return;
    }
    Clear(block);
    const Tensor part = Scratch(out.shape, wide_), part_lse = Scratch(lse.shape, wide_);
    kernels::Attention(stream_, part.view(), part_lse.view(), t.q, t.k, t.v, t.q_document.view(),
                       t.k_document.view(), t.options);
    kernels::MergeAttention(stream_, out, lse, part.view(), part_lse.view());
  }

  void BackwardTile(const SequenceAction& a) {
    const TileArguments t = Arguments(a);
    const SequenceSchedule::Heads heads = HeadsOf(a);
    const Block& queries = Find(Store::kQueries, a.owner, a.rows[0], heads);
    const Block& results = Find(Store::kResults, a.owner, a.rows[0], heads);
    const Block& gradients = Find(Store::kGradients, a.key_owner, a.keys, heads);
    const View dout = Part(queries, Tag::kDO, a.rows[0], heads);
    Tensor lse_memory, delta_memory;
    const View lse = Contiguous(Part(queries, Tag::kLse, a.rows[0], heads), lse_memory);
    const View delta = Contiguous(Part(queries, Tag::kDelta, a.rows[0], heads), delta_memory);
    if (Mutated(Mutation::kStatisticsOfTheTile)) {
      const Tensor out = Tensor::Empty(t.q.shape, dtype_);
      kernels::Attention(stream_, out.view(), lse, t.q, t.k, t.v, t.q_document.view(),
                         t.k_document.view(), t.options);
      kernels::AttentionDelta(stream_, delta, dout, out.view());
    }
    kernels::AttentionBackwardTile(stream_, Part(results, Tag::kDQ, a.rows[0], heads),
                                   Part(gradients, Tag::kDK, a.keys, heads),
                                   Part(gradients, Tag::kDV, a.keys, heads), dout, t.q, t.k, t.v,
                                   lse, delta, t.q_document.view(), t.k_document.view(), t.options);
  }

  std::map<std::pair<Store, int>, std::vector<Block>> held_;
  const SequenceSchedule::Heads heads_;  // this rank's share
  const bool round_;
  Tensor delta_;
  Tensor first_;  // of a mutation
};

}  // namespace

std::unique_ptr<SequencePassBase> MakeRowsPass(const SequenceSchedule& schedule,
                                               const SequencePassOptions& options,
                                               SequenceWire& wire, int rank,
                                               SequencePassBase::Actions actions, bool round,
                                               SequenceArrays& arrays) {
  return std::make_unique<RowsPass>(schedule, options, wire, rank, actions, round, arrays);
}

}  // namespace shoal

#include "parallel/sequence_pass.h"

#include <algorithm>

#include "kernels/copy.h"
#include "kernels/elementwise.h"
#include "parallel/sequence_pass_base.h"

namespace shoal {

SequenceWidths WidthsOf(int64_t batch, int64_t head_dim, DType dtype,
                        const SequencePassOptions& options) {
  const auto element = static_cast<int64_t>(SizeOf(dtype));
  const auto sum = static_cast<int64_t>(SizeOf(AccumulatorDType(dtype)));
  return {batch, head_dim, element, options.wide_results ? sum : element, sum};
}

// Where heads are exchanged a backward has no q, and no forward has dout.
SequencePassBase::SequencePassBase(const SequenceSchedule& schedule,
                                   const SequencePassOptions& options, SequenceWire& wire,
                                   int owner, Actions actions, SequenceArrays& arrays)
    : s_(schedule),
      options_(options),
      owner_(owner),
      x_(arrays),
      dtype_((arrays.dout.defined() ? arrays.dout : arrays.q).dtype()),
      wide_(AccumulatorDType(dtype_)),
      batch_((arrays.dout.defined() ? arrays.dout : arrays.q).dim(0)),
      head_dim_((arrays.dout.defined() ? arrays.dout : arrays.q).dim(3)),
      stream_(ExecutionContext::Current().stream()),
      wire_(wire),
      list_(actions),
      widths_(WidthsOf(batch_, head_dim_, dtype_, options)) {}

void SequencePassBase::Run() {
  Begin();
  PostReceive(0);
  for (at_ = 0; at_ < list_.size(); ++at_) {
    const SequenceAction& a = list_[at_];
    switch (a.op) {
      case SequenceOp::kSend:
        Send(a);
        break;
      case SequenceOp::kReceive:
        Receive(a);
        break;
      case SequenceOp::kMerge:
        Merge(a);
        break;
      case SequenceOp::kTile:
        Tile(a);
        break;
    }
    Done();
  }
  End();
}

DType SequencePassBase::WireType(SequencePayload payload, Tag tag) const {
  return WidthOf(s_, payload, tag, widths_) == static_cast<int64_t>(SizeOf(dtype_)) ? dtype_
                                                                                    : wide_;
}

Tensor SequencePassBase::Buffer(const SequenceAction& a) const {
  return Tensor::Empty({MessageBytes(s_, a, widths_)}, DType::kU8, MemoryClass::kCommunication);
}

void SequencePassBase::Send(const SequenceAction& a) {
  wire_.WaitForRoom(s_.SendsInFlight());
  // Rows that go to several ranks are packed once.
  const bool given =
      a.payload == SequencePayload::kQuery || a.payload == SequencePayload::kKeyValue;
  if (!last_sent_.defined() || !given || a.owner != owner_ || !last_send_->SameMessage(a)) {
    last_sent_ = Buffer(a);
    last_send_ = &a;
    ForParts(a, last_sent_, [&](Tag tag, const SequenceRows& rows, const View& part) {
      kernels::Copy(stream_, part, ToSend(a, tag, rows));
    });
  }
  wire_.Send(last_sent_, a.peer);
}

// The next receive from `from` on: it goes on while this rank computes.
void SequencePassBase::PostReceive(size_t from) {
  for (size_t i = from; i < list_.size(); ++i) {
    if (list_[i].op != SequenceOp::kReceive) continue;
    arriving_ = Buffer(list_[i]);
    ticket_ = wire_.Receive(arriving_, list_[i].peer);
    return;
  }
}

void SequencePassBase::Receive(const SequenceAction& a) {
  wire_.WaitFor(ticket_);
  received_ = std::move(arriving_);
  PostReceive(at_ + 1);
  Arrived(a);
}

View SequencePassBase::Contiguous(const View& view, Tensor& memory) const {
  if (view.contiguous()) return view;
  memory = Scratch(view.shape, view.dtype);
  kernels::Copy(stream_, memory.view(), view);
  return memory.view();
}

void SequencePassBase::AddTo(const View& to, const View& from) const {
  if (to.contiguous() && from.contiguous()) return kernels::Add(stream_, to, to, from, 1, 1);
  if (to.dim(0) > 1) {
    for (int64_t b = 0; b < to.dim(0); ++b) AddTo(to.Narrow(0, b, 1), from.Narrow(0, b, 1));
    return;
  }
  Tensor part;
  const Tensor sum = Scratch(to.shape, to.dtype);
  kernels::Copy(stream_, sum.view(), to);
  kernels::Add(stream_, sum.view(), sum.view(), Contiguous(from, part), 1, 1);
  kernels::Copy(stream_, to, sum.view());
}

Tensor SequencePassBase::Documents(const TokenRange& range) const {
  if (s_.mask.documents.empty()) return {};
  std::vector<int32_t> ids;
  for (int64_t b = 0; b < batch_; ++b)
    for (int64_t i = 0; i < range.count; ++i)
      ids.push_back(
          s_.mask.documents[static_cast<size_t>(b * s_.layout.tokens() + range.Token(i))]);
  return Tensor::From(ids, {batch_, range.count}, MemoryClass::kWorkspace);
}

namespace {

void RunParts(const SequenceSchedule& schedule, const SequencePassOptions& options,
              SequenceWire& wire, int rank, SequenceArrays& x) {
  const SequencePassBase::Actions all = schedule.actions[static_cast<size_t>(rank)];
  if (schedule.per_group() == 1)
    return MakeRowsPass(schedule, options, wire, rank, all, true, x)->Run();

  const auto is = [](SequencePayload payload) {
    return
        [payload](const SequenceAction& a) { return a.ExchangesHeads() && a.payload == payload; };
  };
  const auto rows = std::ranges::find_if_not(all, is(SequencePayload::kHeads));
  const auto back = std::ranges::find_if(rows, all.end(), is(SequencePayload::kHeadsResult));
  SequenceArrays share;
  using A = SequenceArrays;
  constexpr std::pair<Tensor A::*, Tensor A::*> kKept[] = {{&A::q, &A::head_q},
                                                           {&A::k, &A::head_k},
                                                           {&A::v, &A::head_v},
                                                           {&A::out, &A::head_out},
                                                           {&A::lse, &A::head_lse}};
  if (schedule.pass == SequencePass::kBackward)
    for (const auto& [array, head] : kKept) share.*array = x.*head;
  const auto exchange = [&](SequencePayload payload, SequencePassBase::Actions actions) {
    MakeHeadsExchange(schedule, options, wire, rank, actions, payload, x, share)->Run();
  };
  exchange(SequencePayload::kHeads, {all.begin(), rows});
  // dK and dV of several shares are rounded as a sum.
  MakeRowsPass(schedule, options, wire, rank, {rows, back}, false, share)->Run();
  exchange(SequencePayload::kHeadsResult, {back, all.end()});
  if (schedule.pass == SequencePass::kForward)
    for (const auto& [array, head] : kKept) x.*head = share.*array;
}

}  // namespace

void RunSequencePass(const SequenceSchedule& schedule, const SequencePassOptions& options,
                     SequenceWire& wire, int rank, SequenceArrays& arrays) {
  try {
    RunParts(schedule, options, wire, rank, arrays);
    wire.Finish();
  } catch (...) {
    wire.Abandon();  // whom messages are for may wait for one that will not come
    throw;
  }
}

}  // namespace shoal

#include "optim/zero/zero.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <unordered_map>

#include "core/base/mutation.h"
#include "kernels/copy.h"
#include "kernels/elementwise.h"
#include "kernels/reduce.h"

namespace shoal {
namespace {

const Stream& CurrentStream() { return ExecutionContext::Current().stream(); }

// Of `data`'s ranks: those whose number gives the same key as this one's.
template <class F>
std::unique_ptr<Communicator> Group(Communicator& data, F&& key) {
  std::vector<int> members;
  for (int r = 0; r < data.size(); ++r)
    if (key(r) == key(data.rank())) members.push_back(r);
  return data.Subgroup(members);
}

int ShardRanks(const ZeroOptions& options, const Communicator& data) {
  if (options.stage == 0) return 1;
  const int ranks = options.shard_ranks == 0 ? data.size() : options.shard_ranks;
  SHOAL_CHECK(ranks >= 1 && data.size() % ranks == 0, "zero", "{} ranks in groups of {}",
              data.size(), ranks);
  return ranks;
}

std::vector<View> Values(const std::vector<Parameter*>& parameters) {
  std::vector<View> views;
  for (const Parameter* p : parameters) views.push_back(p->value().view());
  return views;
}

}  // namespace

ZeroOptimizer::ZeroOptimizer(Module& model, const std::vector<Module*>& units, Mesh& mesh,
                             const ZeroOptions& options,
                             const std::function<void(const Parameter&)>& initialise,
                             const std::function<int(const Parameter&)>& pass_of)
    : options_(options),
      mesh_(mesh),
      shard_(Group(mesh.data(), [n = ShardRanks(options, mesh.data())](int r) { return r / n; })),
      replicas_(
          Group(mesh.data(), [n = ShardRanks(options, mesh.data())](int r) { return r % n; })),
      queue_(mesh.data()),
      rule_(MakeUpdateRule(options.rule)),
      parameters_(model.Parameters()),
      modules_(units.size()) {
  if (ExecutionContext::Current().device().type == DeviceType::kCuda &&
      (options_.offload_host || !options_.offload_dir.empty()))
    host_ = std::make_unique<ExecutionContext>(Device{});
  if (!options_.offload_dir.empty())
    file_ = std::make_unique<MappedFile>(options_.offload_dir, "the optimizer's states");
  for (const auto& p : parameters_) {
    number_.emplace(p.get(), std::ssize(number_));
    if (!p->requires_grad()) continue;
    for (const MeshAxis axis : {MeshAxis::kDp, MeshAxis::kCp})
      if (mesh.axis(axis).size() > 1) p->Place(axis, {AxisPlacement::kReplicated});
  }
  const bool three = options_.stage == 3;
  // Backward reaches the last unit first; what belongs to no unit stands where the model has it.
  struct Group {
    int unit, pass;  // unit -1: none
    std::vector<std::shared_ptr<Parameter>> parameters;
  };
  std::vector<Group> groups;
  if (three) {
    std::unordered_map<const Parameter*, int> unit_of;
    for (size_t u = 0; u < units.size(); ++u) {
      for (const auto& p : units[u]->Parameters()) {
        const bool fresh = unit_of.emplace(p.get(), static_cast<int>(u)).second;
        SHOAL_CHECK(fresh, p->name(), "is shared by two units that stage 3 gathers apart");
      }
    }
    model.Parameters();  // names from the root again
    for (const auto& p : parameters_) {
      const auto found = unit_of.find(p.get());
      const int unit = found == unit_of.end() ? -1 : found->second;
      if (unit < 0 || groups.empty() || groups.back().unit != unit)
        groups.push_back({unit, pass_of(*p), {}});
      groups.back().parameters.push_back(p);
    }
    units_.resize(units.size());
  } else {
    for (const auto& p : parameters_) {
      const int pass = pass_of(*p);
      auto group = std::find_if(groups.begin(), groups.end(),
                                [&](const Group& g) { return g.pass == pass; });
      if (group == groups.end()) group = groups.insert(group, {-1, pass, {}});
      group->parameters.push_back(p);
    }
  }
  std::reverse(groups.begin(), groups.end());
  for (const Group& group : groups) {
    const std::vector<size_t> made = CutBuckets(group.parameters, group.pass, three);
    if (!three) continue;
    Unit& u = group.unit < 0 ? units_.emplace_back() : units_[static_cast<size_t>(group.unit)];
    u.pass = group.pass;
    for (const size_t b : made) u.buckets.push_back(&buckets_[b]);
  }
  for (Bucket& bucket : buckets_) {
    CutShare(bucket);
    const std::string &last = bucket.parameters.front()->name(),
                      &first = bucket.parameters.back()->name();
    bucket.name = Intern(first == last ? first : first + " .. " + last);
    if (three) {
      const OriginScope here({bucket.name, "share"});
      bucket.values = Tensor::Empty({bucket.share}, options_.compute, MemoryClass::kParameters);
    }
    for (size_t i = 0; i < bucket.parameters.size(); ++i) {
      Parameter& p = *bucket.parameters[i];
      p.Materialize(options_.compute,
                    three ? MemoryClass::kCommunication : MemoryClass::kParameters);
      initialise(p);
      p.leaf().grad_dtype = options_.gradients;
      // What is only passing through is no model state.
      if (options_.stage >= 2) p.leaf().memory_class = MemoryClass::kCommunication;
      if (!three) continue;
      for (const Slice& s : bucket.slices) {
        if (s.parameter == i)
          kernels::Copy(CurrentStream(), Flat(bucket.values, s.at, s.count),
                        Flat(p.value(), s.begin, s.count));
      }
      p.value().storage().Release();
    }
    if (bucket.trainable) {
      MakeStates(bucket);
      HookGradients(bucket);
    }
  }
  if (options_.contiguous_gradients && options_.stage >= 2 && !options_.in_backward) {
    const int64_t step = 64 / static_cast<int64_t>(SizeOf(options_.gradients));  // of alignment
    int64_t all = 0;
    for (Bucket& bucket : buckets_) {
      bucket.place = all;
      if (bucket.trainable) all += (bucket.share + step - 1) / step * step;
    }
    const OriginScope here("shares");
    shares_ = Tensor::Empty({all}, options_.gradients, MemoryClass::kGradients);
  }
  if (three) {
    HookUnits(units);
  } else {
    for (Bucket& bucket : buckets_) AwaitValues(bucket);
  }
}

ZeroOptimizer::~ZeroOptimizer() {
  for (const auto& p : parameters_) p->value().storage().set_restore(nullptr);
}

View ZeroOptimizer::Flat(const Tensor& t, int64_t begin, int64_t count) {
  return t.Reshaped({-1}).Narrowed(0, begin, count).view();
}

// From the last parameter to the first; `whole`: as few as possible. Trainable and frozen ones keep
// apart. Returns the indices of the new buckets.
std::vector<size_t> ZeroOptimizer::CutBuckets(
    const std::vector<std::shared_ptr<Parameter>>& parameters, int pass, bool whole) {
  std::vector<size_t> made;
  for (const bool trainable : {true, false}) {
    int64_t bytes = 0;
    bool open = false;
    for (auto it = parameters.rbegin(); it != parameters.rend(); ++it) {
      Parameter& p = **it;
      if (p.requires_grad() != trainable) continue;
      // One that does not fit begins anew: a table has a bucket of its own.
      const int64_t more = p.shape().numel() * static_cast<int64_t>(SizeOf(options_.gradients));
      if (!open || (!whole && bytes > 0 && bytes + more > options_.bucket_bytes)) {
        made.push_back(buckets_.size());
        buckets_.emplace_back().trainable = trainable;
        buckets_.back().pass = pass;
        if (trainable) passes_[pass].buckets.push_back(&buckets_.back());
        open = true;
        bytes = 0;
      }
      Bucket& bucket = buckets_.back();
      bucket.parameters.push_back(&p);
      bucket.elements += p.shape().numel();
      bytes += more;
    }
  }
  return made;
}

void ZeroOptimizer::CutShare(Bucket& bucket) const {
  const int64_t begin = ShardBegin(bucket.elements, shard_->rank(), shard_->size());
  const int64_t end = ShardBegin(bucket.elements, shard_->rank() + 1, shard_->size());
  bucket.share = end - begin;
  int64_t at = 0;
  for (size_t i = 0; i < bucket.parameters.size(); ++i) {
    const int64_t n = bucket.parameters[i]->shape().numel();
    const int64_t from = std::max(begin, at), to = std::min(end, at + n);
    if (from < to) bucket.slices.push_back({i, from - at, to - from, from - begin});
    at += n;
  }
}

View ZeroOptimizer::Value(const Bucket& bucket, const Slice& s) const {
  if (bucket.values.defined()) return Flat(bucket.values, s.at, s.count);
  return Flat(bucket.parameters[s.parameter]->value(), s.begin, s.count);
}

View ZeroOptimizer::Gradient(const Bucket& bucket, const Slice& s) const {
  if (options_.stage >= 2) return Flat(bucket.gradient, s.at, s.count);
  return Flat(bucket.parameters[s.parameter]->leaf().grad, s.begin, s.count);
}

// A rank whose slice is empty has no gradient to wait for.
int ZeroOptimizer::Awaited(const Bucket& bucket) {
  return static_cast<int>(std::count_if(bucket.parameters.begin(), bucket.parameters.end(),
                                        [](const Parameter* p) { return p->shape().numel() > 0; }));
}

void ZeroOptimizer::HookGradients(Bucket& bucket) {
  const GradEvent event = options_.stage >= 2 ? GradEvent::kShareAdded : GradEvent::kFinal;
  bucket.waiting = Awaited(bucket);
  if (bucket.pass == kLate) return;
  for (Parameter* p : bucket.parameters) {
    if (p->shape().numel() == 0) continue;
    p->leaf().hooks.push_back([this, &bucket, event](GradEvent e) {
      if (e == GradEvent::kFinal) bucket.final = true;
      if (e != event) return;
      // Updates in backward: whether a gradient is final is known when the next one comes.
      if (options_.in_backward) ReduceReady(bucket.pass);
      --bucket.waiting;
      if (!options_.in_backward) ReduceReady(bucket.pass);
    });
  }
}

void ZeroOptimizer::ReduceReady(int pass) {
  Order& order = passes_[pass];
  for (; order.next < order.buckets.size() && order.buckets[order.next]->waiting <= 0; ++order.next)
    Reduce(*order.buckets[order.next]);
}

void ZeroOptimizer::Reduce(Bucket& bucket) {
  if (file_ != nullptr && options_.in_backward) file_->Prefetch(States(bucket));
  std::vector<View> pieces, share;
  for (Parameter* p : bucket.parameters) {
    Leaf& leaf = p->leaf();
    if (!leaf.grad.defined()) {
      const OriginScope here(leaf.interned_name);
      leaf.grad = Tensor::Full(p->shape(), leaf.grad_dtype, 0, leaf.memory_class);
    }
    if (p->gradient_sum() && !Mutated(Mutation::kSharedHeadNotSummed)) p->gradient_sum()(leaf.grad);
    pieces.push_back(leaf.grad.view());
  }
  // What is added up over micro-batches is summed over the replicas at the end.
  if (options_.stage < 2) {
    for (const Slice& s : bucket.slices) share.push_back(Gradient(bucket, s));
  }
  // The first share of a step's gradient goes where it is kept.
  View into;
  if (options_.stage >= 2 && !bucket.gradient.defined() && pieces[0].dtype == options_.gradients) {
    HoldShare(bucket);
    bucket.kept = true;
    into = bucket.gradient.view();
  }
  bucket.ticket = queue_.Post([this, into, pieces = std::move(pieces), share = std::move(share)] {
    shard_->ReduceScatter(pieces, {}, Traffic::kData, into);
    replicas_->AllReduce(share);
  });
  in_flight_.push_back(&bucket);
  // Where gradients are freed as they go, a constant number of buckets is on its way.
  constexpr size_t kInFlight = 2;
  while ((options_.stage >= 2 || options_.in_backward) && in_flight_.size() > kInFlight) {
    Retire(*in_flight_.front());
    in_flight_.pop_front();
  }
}

void ZeroOptimizer::Retire(Bucket& bucket) {
  queue_.Wait(bucket.ticket);
  if (options_.stage >= 2) TakeShare(bucket);
  if (!options_.in_backward || !std::exchange(bucket.final, false)) return;
  if (options_.stage >= 2 && replicas_->size() > 1) queue_.Wait(SumOverReplicas(bucket));
  AddSquares(bucket);
  Update(bucket, lr_, 1);
}

void ZeroOptimizer::HoldShare(Bucket& bucket) const {
  if (bucket.gradient.defined()) return;
  if (shares_.defined()) {
    bucket.gradient = shares_.Narrowed(0, bucket.place, bucket.share);
    return;
  }
  const OriginScope here({bucket.name, "share"});
  bucket.gradient = Tensor::Empty({bucket.share}, options_.gradients, MemoryClass::kGradients);
}

// From the parameters' gradients, which are freed, to where the share is kept.
void ZeroOptimizer::TakeShare(Bucket& bucket) {
  const bool first = !bucket.gradient.defined() || Mutated(Mutation::kLastMicroBatchOnly);
  if (first) HoldShare(bucket);
  const bool there = std::exchange(bucket.kept, false);
  for (const Slice& s : there ? std::span<const Slice>() : std::span(bucket.slices)) {
    const View sum = Flat(bucket.gradient, s.at, s.count);
    const View share = Flat(bucket.parameters[s.parameter]->leaf().grad, s.begin, s.count);
    if (first) {
      kernels::Copy(CurrentStream(), sum, share);
    } else {
      kernels::Add(CurrentStream(), sum, sum, share, 1, 1);
    }
  }
  for (Parameter* p : bucket.parameters) p->leaf().grad = Tensor();
}

CommQueue::Ticket ZeroOptimizer::SumOverReplicas(const Bucket& bucket) {
  return queue_.Post(
      [this, share = bucket.gradient.view()] { replicas_->AllReduce(std::span(&share, 1)); });
}

void ZeroOptimizer::FinishPass(int pass, bool last) {
  if (last || options_.stage >= 2) {
    Order& order = passes_[pass];
    for (Bucket* bucket : order.buckets) bucket->final = bucket->final || last;
    for (; order.next < order.buckets.size(); ++order.next) Reduce(*order.buckets[order.next]);
    for (; !in_flight_.empty(); in_flight_.pop_front()) Retire(*in_flight_.front());
    for (Bucket* bucket : order.buckets) bucket->final = false;
    order.next = 0;
    for (Bucket* bucket : order.buckets) bucket->waiting = Awaited(*bucket);
  }
  for (Unit& unit : units_)
    if (unit.pass == pass || unit.pass == kLate) Release(unit);
}

void ZeroOptimizer::FinishStep() {
  if (passes_.count(kLate) > 0) FinishPass(kLate, true);
  if (options_.stage < 2 || options_.in_backward) return;
  for (const Bucket& bucket : buckets_)
    if (bucket.trainable) SumOverReplicas(bucket);
  queue_.WaitAll();
}

// A slice, or the part of it that counts from here; empty slices are left out.
std::vector<ZeroOptimizer::Slice> ZeroOptimizer::Owned(const Bucket& bucket) {
  std::vector<Slice> owned;
  for (Slice s : bucket.slices) {
    const auto [first, count] = bucket.parameters[s.parameter]->owned();
    const int64_t begin = std::max(s.begin, first);
    const int64_t end = std::min(s.begin + s.count, first + count);
    if (begin >= end) continue;
    owned.push_back({s.parameter, begin, end - begin, s.at + begin - s.begin});
  }
  return owned;
}

// From the ranks' shares to whole parameters on all of them.
CommQueue::Ticket ZeroOptimizer::Gather(const Bucket& bucket) {
  const std::vector<View> values = Values(bucket.parameters);
  ahead_ += shard_->AllGatherBytes(values);
  return queue_.Post([this, values] { shard_->AllGather(values, {}, Traffic::kAhead); });
}

void ZeroOptimizer::SendForValues(Bucket& bucket) {
  if (options_.stage != 1 && options_.stage != 2) return;
  bucket.ticket = Gather(bucket);
  for (Parameter* p : bucket.parameters) p->value().storage().set_pending(true);
}

// Whoever looks at a parameter that is on its way waits for its bucket.
void ZeroOptimizer::AwaitValues(Bucket& bucket) {
  for (Parameter* p : bucket.parameters) {
    p->value().storage().set_restore([this, &bucket] {
      queue_.Wait(bucket.ticket);
      for (Parameter* arrived : bucket.parameters) arrived->value().storage().set_pending(false);
    });
  }
}

std::vector<ZeroOptimizer::Piece> ZeroOptimizer::Pieces(bool owned) const {
  // Whoever has them may read them from another thread: what is on its way arrives here.
  for (const auto& p : parameters_) p->value().storage().Arrive();
  std::vector<Piece> pieces;
  const std::vector<std::string> names = rule_->states();
  for (const Bucket& bucket : buckets_) {
    for (const Slice& s : owned ? Owned(bucket) : bucket.slices) {
      const Parameter* p = bucket.parameters[s.parameter];
      const auto add = [&](const std::string& state, const Tensor& flat, int64_t at) {
        pieces.push_back({state, p, s.begin, flat.Narrowed(0, at, s.count)});
      };
      if (bucket.values.defined()) {
        add("", bucket.values, s.at);
      } else {
        add("", p->value().Reshaped({-1}), s.begin);
      }
      if (bucket.master.defined())
        add(options_.split_master ? kSplitMaster : kMaster, bucket.master, s.at);
      for (size_t i = 0; i < bucket.states.size(); ++i) add(names[i], bucket.states[i], s.at);
    }
  }
  return pieces;
}

void ZeroOptimizer::ShareValues() {
  for (Bucket& bucket : buckets_) SendForValues(bucket);
}

}  // namespace shoal

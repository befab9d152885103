#include "parallel/sequence_attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "core/autograd.h"
#include "core/keep.h"
#include "core/placement_rules.h"

namespace shoal {
namespace {

// Kept by the node: the group's rows of some heads where heads are exchanged, else this rank's
// rows.
enum Kept { kQ, kK, kV, kLse, kOut };

// Schedules that are as a batch's documents say are made anew for each; a few are kept for batches
// that come again.
constexpr size_t kPlans = 8;

bool ExchangesHeads(SequenceKind kind) {
  return kind == SequenceKind::kUlysses || kind == SequenceKind::kHybrid;
}

SequenceOptions Checked(const SequenceOptions& options, int ranks) {
  if (options.backward && (!options.schedule || (*options.schedule != *options.backward &&
                                                 (ExchangesHeads(*options.schedule) ||
                                                  ExchangesHeads(*options.backward)))))
    SHOAL_FAIL(ErrorKind::kConfig, "sequence",
               "a backward by {} needs a forward schedule that keeps what it takes: set both to "
               "ulysses, both to hybrid, or both to others",
               Name(*options.backward));
  if (options.schedule == SequenceKind::kHybrid) HybridGroups(ranks, options.ulysses);
  return options;
}

bool Same(const Tensor& a, const Tensor& b) {
  return a.defined() == b.defined() && (!a.defined() || a.is(b));
}

}  // namespace

std::vector<int> HybridGroups(int ranks, int64_t ulysses) {
  std::vector<int> sizes = SequenceGroupSizes(ranks);
  std::erase_if(sizes, [&](int n) { return n == 1 || n == ranks; });
  if (sizes.empty())
    SHOAL_FAIL(ErrorKind::kConfig, "sequence",
               "sequence.schedule \"hybrid\" needs groups of equal size, and {} rank{} of mesh.cp "
               "cannot be in several of more than one: set mesh.cp to 4, 6, 8 or another product, "
               "or sequence.schedule to \"auto\"",
               ranks, ranks == 1 ? "" : "s");
  if (ulysses == 0) return sizes;
  if (std::ranges::find(sizes, ulysses) == sizes.end())
    SHOAL_FAIL(ErrorKind::kConfig, "sequence",
               "sequence.ulysses {} does not cut mesh.cp {} into groups: set it to one of {}, or "
               "leave it out",
               ulysses, ranks, fmt::join(sizes, ", "));
  return {static_cast<int>(ulysses)};
}

SequenceGroup::SequenceGroup(const SequenceOptions& options, Communicator& cp)
    : options_(Checked(options, cp.size())), cp_(cp), wire_(cp) {}

void SequenceGroup::Learn(const Tensor& q, const SequenceInfo& info) {
  if (info.positions.defined() && Same(positions_, info.positions) &&
      Same(documents_, info.documents))
    return;
  positions_ = info.positions;
  documents_ = info.documents;
  const int64_t batch = q.dim(0), rows = q.dim(1);
  tokens_ =
      options_.tokens > 0 ? options_.tokens : std::llround(cp_.Sum(static_cast<double>(rows)));
  ids_.clear();
  const SequenceLayout layout(options_.layout, tokens_, cp_.size());
  if (rows != layout.Rows(rank()))
    SHOAL_FAIL(
        ErrorKind::kConfig, "sequence",
        "rank {} of {} holds {} of {} tokens, but the {} layout gives it {}: cut the batch by "
        "SequenceLayout",
        rank(), cp_.size(), rows, tokens_, Name(options_.layout), layout.Rows(rank()));
  if (!info.documents.defined()) return;
  SHOAL_CHECK(info.documents.shape() == Dims({batch, rows}), "sequence", "documents {} for q {}",
              info.documents.shape().ToString(), q.shape().ToString());
  // All ranks' ids, in the order of ranks, and from there to their tokens.
  std::vector<int32_t> gathered(static_cast<size_t>(batch * tokens_));
  std::vector<int64_t> bounds = {0};
  for (int r = 0; r < cp_.size(); ++r) bounds.push_back(bounds.back() + batch * layout.Rows(r));
  const std::vector<double> mine = info.documents.ToVector();
  std::transform(mine.begin(), mine.end(), gathered.begin() + bounds[static_cast<size_t>(rank())],
                 [](double id) { return static_cast<int32_t>(id); });
  const View view(gathered.data(), DType::kI32, {batch * tokens_});
  cp_.AllGather(std::span(&view, 1), bounds, Traffic::kControl);
  ids_.resize(gathered.size());
  for (int r = 0; r < cp_.size(); ++r) {
    auto from = gathered.begin() + bounds[static_cast<size_t>(r)];
    const std::vector<int64_t> tokens = layout.Tokens(r);
    for (int64_t b = 0; b < batch; ++b)
      for (const int64_t token : tokens) ids_[static_cast<size_t>(b * tokens_ + token)] = *from++;
  }
}

std::shared_ptr<const SequenceGroup::Plan> SequenceGroup::PlanFor(const Tensor& q, const Tensor& k,
                                                                  const SequenceInfo& info) {
  Learn(q, info);
  const Plan* alike = nullptr;  // but for the documents
  for (const auto& plan : plans_) {
    if (plan->tokens != tokens_ || plan->batch != q.dim(0) || plan->heads != q.dim(2) ||
        plan->kv_heads != k.dim(2) || plan->head_dim != q.dim(3) || plan->dtype != q.dtype())
      continue;
    if (plan->documents == ids_) return plan;
    alike = plan.get();
  }
  const SequenceLayout layout(options_.layout, tokens_, cp_.size());
  const SequenceMask mask{options_.causal, options_.window, ids_};
  const auto heads = static_cast<int>(q.dim(2)), kv_heads = static_cast<int>(k.dim(2));
  const bool hybrid = options_.schedule == SequenceKind::kHybrid;
  const SequenceWidths widths =
      WidthsOf(q.dim(0), q.dim(3), q.dtype(), {.wide_results = options_.wide_results});
  SequenceChoice choice;
  if (alike != nullptr) {
    choice = {alike->forward.method, alike->backward.method, alike->reason};
  } else if (options_.schedule && !hybrid) {
    choice =
        ChooseWays(*options_.schedule, options_.backward.value_or(*options_.schedule),
                   options_.both_ways, layout, mask, heads, kv_heads, widths, options_.machine);
  } else {
    choice = ChooseSequence(
        layout, mask, heads, kv_heads, widths, options_.machine,
        hybrid ? HybridGroups(cp_.size(), options_.ulysses) : SequenceGroupSizes(cp_.size()));
  }
  const auto make = [&](const SequenceMethod& method, SequencePass pass) {
    SequenceSchedule schedule = MakeSequenceSchedule(method, pass, layout, mask, heads, kv_heads);
    // By documents it would take the square of the tokens.
    if (ids_.empty()) CheckSequenceSchedule(schedule);
    return schedule;
  };
  auto plan =
      std::make_shared<Plan>(Plan{tokens_, q.dim(2), k.dim(2), q.dim(0), q.dim(3), q.dtype(), ids_,
                                  make(choice.forward, SequencePass::kForward),
                                  make(choice.backward, SequencePass::kBackward), choice.reason});
  plans_.push_front(plan);
  if (plans_.size() > kPlans) plans_.pop_back();
  return plan;
}

std::string SequenceGroup::Describe() const {
  if (plans_.empty()) return "";
  const Plan& plan = *plans_.front();
  return fmt::format(
      "forward {}, backward {}, layout {}: {}", shoal::Describe(plan.forward.method, cp_.size()),
      shoal::Describe(plan.backward.method, cp_.size()), Name(options_.layout), plan.reason);
}

Tensor SequenceAttention::Forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const SequenceInfo& info) {
  const OriginScope here("sequence_attention");
  SHOAL_CHECK(q.rank() == 4 && k.shape() == v.shape() && k.rank() == 4 && q.dim(0) == k.dim(0) &&
                  q.dim(1) == k.dim(1) && q.dim(3) == k.dim(3) && k.dim(2) > 0 &&
                  q.dim(2) % k.dim(2) == 0,
              "sequence", "q {}, k {} and v {} do not fit", q.shape().ToString(),
              k.shape().ToString(), v.shape().ToString());
  if (info.cache != nullptr)
    SHOAL_FAIL(ErrorKind::kConfig, "sequence",
               "generation keeps a cache of keys, which is not split over ranks: set mesh.cp to 1");
  const auto plan = group_->PlanFor(q, k, info);
  const SequencePassOptions options{1 / std::sqrt(static_cast<double>(q.dim(3))),
                                    group_->options().wide_results, DropoutIn(info)};
  SequenceArrays x;
  x.q = q.Detached();
  x.k = k.Detached();
  x.v = v.Detached();
  // A replay takes what is kept: it communicates nothing.
  const bool heads = plan->forward.per_group() > 1;
  const bool again =
      heads ? TakeKept({&x.head_q, &x.head_k, &x.head_v, &x.head_out, &x.head_lse, &x.out})
            : TakeKept({&x.out, &x.lse});
  if (!again) {
    RunSequencePass(plan->forward, options, group_->wire(), group_->rank(), x);
    const std::array operands = {q, k, v};
    for (const Tensor& t : {x.head_q, x.head_k, x.head_v, x.head_out, x.head_lse, x.out, x.lse})
      if (t.defined()) t.set_placement(VaryingLike(operands));
    if (heads)
      Keep({x.head_q, x.head_k, x.head_v, x.head_out, x.head_lse, x.out});
    else
      Keep({x.out, x.lse});
  }
  const std::vector<Tensor> kept =
      heads ? std::vector{x.head_q, x.head_k, x.head_v, x.head_lse, x.head_out}
            : std::vector{q, k, v, x.lse, x.out};
  RecordOptions record;
  record.split = false;  // it communicates, and must do so once
  record.exact = {kLse};
  return Record(
      "sequence_attention", x.out, {q, k, v}, kept,
      [group = group_, plan, options, heads,
       starts = info.sequence_starts](GradContext& context) {  // options' view is of starts
        SequenceArrays x;
        (heads ? x.head_q : x.q) = context.Saved(kQ);
        (heads ? x.head_k : x.k) = context.Saved(kK);
        (heads ? x.head_v : x.v) = context.Saved(kV);
        (heads ? x.head_out : x.out) = context.Saved(kOut);
        (heads ? x.head_lse : x.lse) = context.Saved(kLse);
        x.dout = context.grad().contiguous() ? context.grad() : context.grad().Clone();
        RunSequencePass(plan->backward, options, group->wire(), group->rank(), x);
        context.Give(0, std::move(x.dq));
        context.Give(1, std::move(x.dk));
        context.Give(2, std::move(x.dv));
      },
      record);
}

std::shared_ptr<SequenceGroup> ApplySequenceParallel(Module& root, const SequenceOptions& options,
                                                     Communicator& cp) {
  const auto group = std::make_shared<SequenceGroup>(options, cp);
  std::vector<std::pair<std::string, kernels::AttentionDropout>> slots;
  root.Walk([&](const std::string& path, Module& module) {
    const auto* attention = dynamic_cast<const InnerAttention*>(&module);
    if (attention == nullptr) return;
    // One that changes its operands hands them to a child that is the attention.
    if (!module.children().empty()) return;
    slots.emplace_back(path, attention->dropout());
  });
  for (const auto& [path, dropout] : slots)
    root.Replace(path, std::make_shared<SequenceAttention>(group, dropout));
  return group;
}

}  // namespace shoal

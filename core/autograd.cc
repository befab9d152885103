#include "core/autograd.h"

#include <algorithm>
#include <atomic>
#include <queue>
#include <unordered_set>

#include "core/keep.h"
#include "core/placement_rules.h"
#include "kernels/elementwise.h"

namespace shoal {
namespace {
thread_local bool grad_enabled = true;
std::atomic<uint64_t> next_sequence = 0;

const Stream& CurrentStream() { return ExecutionContext::Current().stream(); }
}  // namespace

bool GradEnabled() { return grad_enabled; }
NoGrad::NoGrad() : previous_(grad_enabled) { grad_enabled = false; }
NoGrad::~NoGrad() { grad_enabled = previous_; }
EnableGrad::EnableGrad() : previous_(grad_enabled) { grad_enabled = true; }
EnableGrad::~EnableGrad() { grad_enabled = previous_; }

Node::Node(const char* name, const Dims& shape, DType dtype)
    : name_(name),
      sequence_(next_sequence++),
      origin_{CurrentOrigin().module, name, Pass::kBackward},
      shape_(shape),
      dtype_(dtype) {}

// A graph that is dropped without a backward is a chain of owners as long as the model is deep:
// taken apart with a list, so that destruction does not recurse.
Node::~Node() {
  std::vector<std::shared_ptr<Node>> orphans = std::move(inputs_);
  while (!orphans.empty()) {
    const std::shared_ptr<Node> node = std::move(orphans.back());
    orphans.pop_back();
    if (node != nullptr && node.use_count() == 1) {
      for (auto& input : node->inputs_) orphans.push_back(std::move(input));
      node->inputs_.clear();
    }
  }
}

Leaf::Leaf(const Dims& shape, DType value_dtype)
    : Node("leaf", shape, value_dtype), grad_dtype(value_dtype) {}

bool WantsGradient(const std::vector<Tensor>& inputs) {
  return grad_enabled && std::any_of(inputs.begin(), inputs.end(), [](const Tensor& t) {
           return t.defined() && t.node() != nullptr;
         });
}

namespace {

// What an op keeps beside its operands and its result (statistics, say) differs between ranks where
// an operand does.
void PlaceKept(const std::vector<Tensor>& inputs, const Tensor& out,
               const std::vector<Tensor>& kept) {
  for (const Tensor& t : kept) {
    if (!t.defined() || !IsFloat(t.dtype()) || !t.placement().invariant() || t.is(out)) continue;
    if (std::any_of(inputs.begin(), inputs.end(), [&](const Tensor& in) { return in.is(t); }))
      continue;
    t.set_placement(VaryingLike(inputs));
  }
}

}  // namespace

Tensor Record(const char* name, Tensor out, const std::vector<Tensor>& inputs,
              const std::vector<Tensor>& kept, std::function<void(GradContext&)> backward,
              const RecordOptions& options) {
  out.set_placement(options.placement ? *options.placement
                                      : UniformPlacement(name, inputs, options.linear));
  PlaceKept(inputs, out, kept);
  KeepScope::Recorded(name, out, kept);
  if (!WantsGradient(inputs)) return out;
  auto node =
      std::make_shared<Node>(name, out.shape(), options.gradient_dtype.value_or(out.dtype()));
  for (const Tensor& input : inputs)
    node->inputs_.push_back(input.defined() ? input.node() : nullptr);
  for (int i = 0; i < std::ssize(kept); ++i) {
    const bool exact = std::ranges::find(options.exact, i) != options.exact.end();
    node->saved_.emplace_back(kept[static_cast<size_t>(i)], exact);
  }
  node->backward_ = std::move(backward);
  node->split_ = options.split;
  node->identity_ = options.identity;
  if (options.recompute && RematerializeScope::active()) {
    node->recompute_ = std::make_unique<Rematerialized>();
    node->recompute_->compute = options.recompute;
    node->recompute_->origin = {CurrentOrigin().module, name, Pass::kRecompute};
    for (const Tensor& input : inputs) {
      // As it is kept already, so that it is kept once.
      const auto same = std::find_if(kept.begin(), kept.end(), [&](const Tensor& t) {
        return t.defined() && input.defined() && t.is(input);
      });
      node->recompute_->operands.push_back(
          same == kept.end() ? SavedTensor(input)
                             : node->saved_[static_cast<size_t>(same - kept.begin())]);
    }
  }
  out.set_node(std::move(node));
  return out;
}

std::shared_ptr<Rematerialized> RematerializedBy(Node* node) {
  while (node != nullptr && node->identity_) node = node->inputs_[0].get();
  if (node == nullptr || node->recompute_ == nullptr) return nullptr;
  std::shared_ptr<Rematerialized> shared = node->rematerialized_.lock();
  if (shared == nullptr) {
    shared = std::make_shared<Rematerialized>(*node->recompute_);
    node->rematerialized_ = shared;
  }
  return shared;
}

Tensor GradContext::Saved(int i) {
  SavedTensor& saved = node_.saved_[static_cast<size_t>(i)];
  // The first half of a split backward leaves what it read to the second.
  return part_ == Part::kInputs ? SavedTensor(saved).Take() : saved.Take();
}

bool GradContext::Needs(int i) const {
  const auto& input = node_.inputs_[static_cast<size_t>(i)];
  if (input == nullptr) return false;
  return part_ == Part::kAll || input->is_weight() == (part_ == Part::kLeaves);
}

GradContext::Target GradContext::Sink(int i) {
  Node& input = *node_.inputs_[static_cast<size_t>(i)];
  Leaf* leaf = input.is_leaf() ? static_cast<Leaf*>(&input) : nullptr;
  Tensor& slot = leaf ? leaf->grad : input.gradient_;
  if (!slot.defined()) {
    const OriginScope here(leaf ? leaf->interned_name : nullptr);
    slot = leaf ? Tensor::Empty(input.shape_, leaf->grad_dtype, leaf->memory_class)
                : Tensor::Empty(input.shape_, input.dtype_);
    return {slot, false};
  }
  // Another input still reads it (a residual's gradient goes both ways): add into a copy.
  if (!leaf && !slot.exclusive()) slot = slot.Clone();
  return {slot, true};
}

void GradContext::Give(int i, Tensor gradient) {
  if (!Needs(i)) return;
  Node& input = *node_.inputs_[static_cast<size_t>(i)];
  SHOAL_CHECK(gradient.shape() == input.shape_, node_.name_,
              "gradient of shape {} for an input of shape {}", gradient.shape().ToString(),
              input.shape_.ToString());
  if (!input.is_leaf() && !input.gradient_.defined()) {
    input.gradient_ = std::move(gradient);
    return;
  }
  if (input.is_leaf()) {
    // A first share that was computed into a buffer of the right kind becomes the gradient itself.
    auto& leaf = static_cast<Leaf&>(input);
    if (!leaf.grad.defined() && gradient.dtype() == leaf.grad_dtype && gradient.exclusive() &&
        gradient.contiguous() && gradient.storage().memory_class() == leaf.memory_class) {
      leaf.grad = std::move(gradient);
      return;
    }
  }
  const Target target = Sink(i);
  if (target.accumulate) {
    kernels::Add(CurrentStream(), target.tensor.view(), target.tensor.view(), gradient.view(), 1,
                 1);
  } else {
    target.tensor.CopyFrom(gradient);
  }
}

class BackwardPass {
 public:
  explicit BackwardPass(const BackwardOptions& options) : options_(options) {}

  void Run(const Tensor& root, const Tensor& gradient) {
    // A copy: the node must outlive whatever the hooks do to the tensor.
    // NOLINTNEXTLINE(performance-unnecessary-copy-initialization)
    std::shared_ptr<Node> node = root.node();
    SHOAL_CHECK(node != nullptr, "backward", "the result depends on nothing that wants a gradient");
    try {
      Discover(node);
      if (gradient.defined()) {
        SHOAL_CHECK(gradient.shape() == root.shape(), "backward",
                    "gradient of shape {} for a result of shape {}", gradient.shape().ToString(),
                    root.shape().ToString());
        node->gradient_ = gradient;
      } else {
        SHOAL_CHECK(root.numel() == 1, "backward", "a result of shape {} needs a gradient",
                    root.shape().ToString());
        for (const MeshAxis axis : kAllMeshAxes) {
          const AxisPlacement p = root.placement()[axis];
          if (p.kind != AxisPlacement::kInvariant && p.kind != AxisPlacement::kPartial)
            FailPlacement("backward", axis, root, 0,
                          "is no loss: it must be invariant, or one rank's part of a sum");
        }
        node->gradient_ = Tensor::Full(root.shape(), root.dtype(), 1);
      }
      ready_.push(node);
      while (!ready_.empty()) {
        current_ = ready_.top();
        ready_.pop();
        Process(current_);
      }
    } catch (...) {
      Forget(node);
      throw;
    }
    if (options_.deferred != nullptr) options_.deferred->final_ = options_.final_micro_batch;
  }

  // Runs a node's backward for `part` and drops what it kept unless the other half is still to
  // come.
  static void Call(Node& node, Tensor grad, GradContext::Part part,
                   const BackwardOptions& options) {
    const OriginScope here(node.origin_);
    GradContext context(node, std::move(grad), part, options);
    // Nobody keeps the result any more, and what is kept may be the op's alone.
    if (part != GradContext::Part::kInputs) node.recompute_.reset();
    node.backward_(context);
    if (part == GradContext::Part::kInputs) return;
    node.saved_.clear();
    node.backward_ = nullptr;
  }

  static void Fire(Leaf& leaf, bool final) {
    for (const auto& hook : leaf.hooks) hook(GradEvent::kShareAdded);
    if (!final) return;
    for (const auto& hook : leaf.hooks) hook(GradEvent::kFinal);
  }

  static std::vector<Leaf*> Weights(const Node& node) {
    std::vector<Leaf*> weights;
    for (const auto& input : node.inputs_) {
      if (input != nullptr && input->is_weight())
        weights.push_back(static_cast<Leaf*>(input.get()));
    }
    return weights;
  }

 private:
  struct Older {
    bool operator()(const std::shared_ptr<Node>& a, const std::shared_ptr<Node>& b) const {
      return a->sequence_ < b->sequence_;
    }
  };

  // Counts the uses of every node that can be reached.
  void Discover(const std::shared_ptr<Node>& root) {
    std::vector<Node*> stack = {root.get()};
    while (!stack.empty()) {
      Node* node = stack.back();
      stack.pop_back();
      SHOAL_CHECK(node->is_leaf() || node->backward_ != nullptr, "backward",
                  "the graph behind op '{}' was used by an earlier backward", node->name_);
      for (const auto& input : node->inputs_) {
        if (input != nullptr && input->pending_++ == 0) stack.push_back(input.get());
      }
    }
  }

  // After an error: leaves live on, and a use that never arrives would keep their hooks from firing
  // in every later pass. Whatever waits can be reached from the root, from what is ready or from
  // what was being processed: a node drops its inputs only after it has counted them down.
  void Forget(const std::shared_ptr<Node>& root) {
    std::vector<Node*> stack = {root.get()};
    if (current_ != nullptr) stack.push_back(current_.get());
    std::vector<std::shared_ptr<Node>> ready;
    for (; !ready_.empty(); ready_.pop()) {
      ready.push_back(ready_.top());
      stack.push_back(ready.back().get());
    }
    std::unordered_set<Node*> seen;
    while (!stack.empty()) {
      Node* node = stack.back();
      stack.pop_back();
      if (!seen.insert(node).second) continue;
      node->pending_ = 0;
      node->gradient_ = Tensor();
      for (const auto& input : node->inputs_) {
        if (input != nullptr) stack.push_back(input.get());
      }
    }
  }

  void Arrive(Leaf& leaf) const {
    if (leaf.grad.defined()) Fire(leaf, options_.final_micro_batch);
  }

  void Process(const std::shared_ptr<Node>& node) {
    if (node->is_leaf()) return Arrive(static_cast<Leaf&>(*node));  // the root itself
    Tensor grad = std::move(node->gradient_);
    node->gradient_ = Tensor();
    const bool split = options_.deferred != nullptr && node->split_ && !Weights(*node).empty();
    // Without a gradient (a use whose consumer gave none) there is nothing to pass on, but the
    // inputs must still learn that this use is done.
    if (grad.defined()) {
      if (split) {
        const bool passes_on =
            std::any_of(node->inputs_.begin(), node->inputs_.end(),
                        [](const auto& input) { return input != nullptr && !input->is_weight(); });
        if (passes_on) Call(*node, grad, GradContext::Part::kInputs, options_);
        options_.deferred->work_.push_back({node, std::move(grad)});
      } else {
        Call(*node, std::move(grad), GradContext::Part::kAll, options_);
      }
    }
    for (const auto& input : node->inputs_) {
      if (input == nullptr) continue;
      const bool later = options_.deferred != nullptr && input->is_weight();
      if (--input->pending_ == 0 && !later) {
        // A leaf at once: its hooks exchange and free the gradient while the rest is computed.
        if (input->is_leaf())
          Arrive(static_cast<Leaf&>(*input));
        else
          ready_.push(input);
      }
      if (later && !split) options_.deferred->done_.push_back(input);
    }
    if (!split) node->inputs_.clear();
  }

  const BackwardOptions& options_;
  std::shared_ptr<Node> current_;
  // The newest node first: memory is freed in the reverse order of its use, and the order in which
  // gradients become ready is the same on every rank.
  std::priority_queue<std::shared_ptr<Node>, std::vector<std::shared_ptr<Node>>, Older> ready_;
};

void DeferredGradients::Run() {
  const NoGrad no_grad;
  // Taken out first: after an error, what ran cannot run again.
  std::vector<Work> all = std::move(work_);
  work_.clear();
  const std::vector<std::shared_ptr<Node>> done = std::move(done_);
  done_.clear();
  // Uses per leaf, so that each fires once, after its last share.
  std::vector<std::pair<Leaf*, int>> uses;
  const auto count = [&uses](Leaf* leaf) -> int& {
    for (auto& [l, n] : uses)
      if (l == leaf) return n;
    return uses.emplace_back(leaf, 0).second;
  };
  for (const Work& work : all)
    for (Leaf* leaf : BackwardPass::Weights(*work.node)) ++count(leaf);
  for (const auto& leaf : done) ++count(static_cast<Leaf*>(leaf.get()));
  const auto use = [&](Leaf* leaf) {
    if (--count(leaf) == 0 && leaf->grad.defined()) BackwardPass::Fire(*leaf, final_);
  };
  for (Work& work : all) {
    BackwardPass::Call(*work.node, std::move(work.grad), GradContext::Part::kLeaves, {});
    for (Leaf* leaf : BackwardPass::Weights(*work.node)) use(leaf);
    work.node.reset();
  }
  for (const auto& leaf : done) use(static_cast<Leaf*>(leaf.get()));
}

void Backward(const Tensor& root, const Tensor& gradient, const BackwardOptions& options) {
  const NoGrad no_grad;
  BackwardPass(options).Run(root, gradient);
}

}  // namespace shoal

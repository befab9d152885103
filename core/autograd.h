// Reverse-mode differentiation on an eager tape.
//
// Each differentiable op makes one Node with one output. Backward walks the nodes from the newest
// to the oldest with a heap, not by recursion. Gradients of parameters are added into their Leaf,
// in the leaf's own dtype; an op may write or accumulate straight into that buffer (Sink), so a
// weight's gradient GEMM runs with beta = 1 and no temporary.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "core/saved_tensor.h"
#include "core/tensor.h"

namespace shoal {

class GradContext;
struct BackwardOptions;
struct RecordOptions;

class Node {
 public:
  Node(const char* name, const Dims& shape, DType dtype);
  virtual ~Node();
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;

  const char* name() const { return name_; }
  const std::vector<std::shared_ptr<Node>>& inputs() const { return inputs_; }
  virtual bool is_leaf() const { return false; }
  // Its gradient may be left for later; see DeferredGradients.
  virtual bool is_weight() const { return false; }

 private:
  friend class GradContext;
  friend class BackwardPass;
  friend std::shared_ptr<Rematerialized> RematerializedBy(Node*);
  friend Tensor Record(const char*, Tensor, const std::vector<Tensor>&, const std::vector<Tensor>&,
                       std::function<void(GradContext&)>, const RecordOptions&);

  const char* name_;
  uint64_t sequence_;  // creation order
  Origin origin_;      // of its backward: where it was recorded
  Dims shape_;         // of the output, and so of its gradient
  DType dtype_;
  std::vector<std::shared_ptr<Node>> inputs_;  // null where no gradient is wanted
  std::vector<SavedTensor> saved_;
  std::function<void(GradContext&)> backward_;
  bool split_ = true;
  bool identity_ = false;
  std::unique_ptr<Rematerialized> recompute_;     // how, if its result may be rematerialized
  std::weak_ptr<Rematerialized> rematerialized_;  // by those who would keep it
  // For the time of a backward pass:
  int pending_ = 0;  // uses whose gradients have not arrived
  Tensor gradient_;
};

enum class GradEvent {
  kShareAdded,  // a micro-batch's share of the gradient is in
  kFinal,       // the step's gradient is complete (fires after the last kShareAdded)
};

// The end of the graph at a parameter or at a tensor that was received from elsewhere.
class Leaf : public Node {
 public:
  Leaf(const Dims& shape, DType value_dtype);
  bool is_leaf() const override { return true; }
  bool is_weight() const override { return weight; }

  bool weight = true;  // false: a value that was received, whose gradient others wait for
  std::string name;    // of the parameter; for errors
  const std::string* interned_name = nullptr;  // the same, for the memory of its gradient
  Tensor grad;                                 // undefined until the first share
  DType grad_dtype;                            // starts as the value's dtype
  MemoryClass memory_class = MemoryClass::kGradients;
  // Called in the order in which they were added.
  std::vector<std::function<void(GradEvent)>> hooks;
};

// What a node's backward works on.
class GradContext {
 public:
  const Tensor& grad() const { return grad_; }  // of the node's output
  // Gives the gradient up; if exclusive() holds for the result, it may be overwritten.
  Tensor TakeGrad() { return std::move(grad_); }
  Tensor Saved(int i);  // as kept by Record
  // Of the pass that this is part of.
  const BackwardOptions& options() const { return options_; }
  bool Needs(int i) const;

  // The place for input i's gradient: write it, or add to it if `accumulate`.
  struct Target {
    Tensor tensor;
    bool accumulate;
  };
  Target Sink(int i);
  // Hands over a finished gradient of input i; it may be shared with other inputs.
  void Give(int i, Tensor gradient);

 private:
  friend class BackwardPass;
  friend class DeferredGradients;
  enum class Part { kAll, kInputs, kLeaves };
  GradContext(Node& node, Tensor grad, Part part, const BackwardOptions& options)
      : node_(node), grad_(std::move(grad)), part_(part), options_(options) {}

  Node& node_;
  Tensor grad_;
  Part part_;
  const BackwardOptions& options_;
};

// Weight gradients that a backward left for later: the W half of a split backward (zero-bubble
// pipelines). Run() computes them and fires the leaves' hooks.
class DeferredGradients {
 public:
  void Run();
  bool empty() const { return work_.empty() && done_.empty(); }

 private:
  friend class BackwardPass;
  struct Work {
    std::shared_ptr<Node> node;
    Tensor grad;
  };
  std::vector<Work> work_;
  std::vector<std::shared_ptr<Node>> done_;  // leaves whose gradients are here, but not their hooks
  bool final_ = true;
};

struct BackwardOptions {
  bool final_micro_batch = true;          // hooks also see GradEvent::kFinal
  DeferredGradients* deferred = nullptr;  // if set, only activations' gradients are computed now
};

// Differentiates `root`; `gradient` may be left out for a scalar (then it is 1, on every rank: the
// scalar is the same on all, or partial). The graph is used up. If it throws, leaves hold parts of
// gradients: drop them; a later pass over another graph is whole again.
void Backward(const Tensor& root, const Tensor& gradient = {}, const BackwardOptions& options = {});

struct RecordOptions {
  std::optional<DType> gradient_dtype;  // in which gradients of `out` add up; by default its own
  std::optional<Placement> placement;   // of `out`; by default UniformPlacement of the inputs
  bool linear = false;                  // in all inputs together; see UniformPlacement
  bool split = true;  // false: its backward is one pass, also where weights' gradients are deferred
  bool identity = false;  // `out` has the values and the shape of the first input
  // Of `kept`: statistics, one for many values. They are kept as they are where others are rounded.
  std::vector<int> exact = {};
  // `out` again, from `inputs`, which its backward keeps or which are parameters. For what costs
  // little beside the bytes: see RematerializeScope.
  std::function<Tensor(const std::vector<Tensor>&)> recompute;
};
// For ops: attaches `out` to the graph as a function of `inputs`, if any of them wants a gradient.
// `kept` is what backward will ask for by Saved(i).
Tensor Record(const char* name, Tensor out, const std::vector<Tensor>& inputs,
              const std::vector<Tensor>& kept, std::function<void(GradContext&)> backward,
              const RecordOptions& options = {});
bool WantsGradient(const std::vector<Tensor>& inputs);
// The node's result for a SavedTensor that need not hold it; null if it must. `node` may be null.
std::shared_ptr<Rematerialized> RematerializedBy(Node* node);

bool GradEnabled();
class NoGrad {
 public:
  NoGrad();
  ~NoGrad();
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool previous_;
};
// For a forward inside a backward.
class EnableGrad {
 public:
  EnableGrad();
  ~EnableGrad();
  EnableGrad(const EnableGrad&) = delete;
  EnableGrad& operator=(const EnableGrad&) = delete;

 private:
  bool previous_;
};

}  // namespace shoal

#include "memory/chunked_mlp.h"

#include <algorithm>

#include "core/keep.h"
#include "core/placement_rules.h"
#include "kernels/elementwise.h"

namespace shoal {
namespace {

using ForwardFunction = std::function<Tensor(const Tensor&)>;

Tensor AsRows(const Tensor& x) {
  return x.Reshaped({x.numel() / std::max<int64_t>(x.dim(-1), 1), x.dim(-1)});
}

// Rows [begin, begin + count) of this rank, of `all` of all ranks.
struct Chunk {
  int64_t begin, count, all;
};

std::vector<Chunk> ChunksOf(int64_t rows, int64_t all, int64_t at_a_time, const RowShares& shares) {
  std::vector<Chunk> chunks;
  const int64_t step = at_a_time * shares.ranks;
  int64_t begin = 0;
  // One at least: without rows there are gradients too, of zeros.
  for (int64_t done = 0; done < all || chunks.empty(); done += step) {
    const int64_t n = std::min(step, all - done), count = shares.mine ? shares.mine(n) : n;
    chunks.push_back({begin, count, n});
    begin += count;
  }
  SHOAL_CHECK(begin == rows, "chunked_mlp", "{} rows are not this rank's share of {}", rows, all);
  return chunks;
}

// Where ranks have some rows each, they have some of a chunk's.
Tensor RowsOf(const Tensor& x, const Placement& placement, const Chunk& chunk) {
  Tensor rows = AsRows(x).Narrowed(0, chunk.begin, chunk.count);
  rows.set_placement(placement);
  return rows;
}

// Of the whole result, from a chunk's.
Placement ResultPlacement(const Tensor& in, const Tensor& chunk) {
  Placement placement;
  for (const MeshAxis axis : kAllMeshAxes) {
    const AxisPlacement before = in.placement()[axis], after = chunk.placement()[axis];
    if (before.kind == AxisPlacement::kSharded && before.dim + 1 < in.rank())
      placement.Set(axis, before);
    else if (after == AxisPlacement::Sharded(1))
      placement.Set(axis, AxisPlacement::Sharded(in.rank() - 1));
    else
      placement.Set(axis, after);
  }
  return placement;
}

// While it lives, chunks of this pass add to gradients of their own that are as wide as sums, where
// the parameters' are not.
class WideGradients {
 public:
  explicit WideGradients(const std::vector<std::shared_ptr<Parameter>>& parameters) {
    for (const auto& p : parameters) {
      Leaf& leaf = p->leaf();
      own_.push_back({&leaf, leaf.grad, leaf.grad_dtype, leaf.memory_class});
      const DType wide = AccumulatorDType(leaf.grad_dtype);
      if (wide == leaf.grad_dtype) continue;
      leaf.grad = Tensor();
      leaf.grad_dtype = wide;
      leaf.memory_class = MemoryClass::kWorkspace;
    }
  }
  ~WideGradients() {
    for (Own& own : own_) Restore(own);
  }
  WideGradients(const WideGradients&) = delete;
  WideGradients& operator=(const WideGradients&) = delete;

  // The sums, rounded, to the node's inputs from `first` on.
  void Give(GradContext& context, int first) {
    for (Own& own : own_) {
      const int input = first++;
      if (own.leaf->grad_dtype == own.dtype) continue;
      const Tensor sum = own.leaf->grad;
      Restore(own);
      if (!sum.defined() || !context.Needs(input)) continue;
      const auto [to, accumulate] = context.Sink(input);
      if (accumulate)
        kernels::Add(ExecutionContext::Current().stream(), to.view(), to.view(),
                     sum.To(to.dtype()).view(), 1, 1);
      else
        to.CopyFrom(sum);
    }
  }

 private:
  struct Own {
    Leaf* leaf;
    Tensor grad;
    DType dtype;
    MemoryClass memory_class;
  };
  static void Restore(Own& own) {
    if (own.leaf->grad_dtype == own.dtype) return;
    own.leaf->grad = std::move(own.grad);
    own.leaf->grad_dtype = own.dtype;
    own.leaf->memory_class = own.memory_class;
  }

  std::vector<Own> own_;
};

class ChunkedForward {
 public:
  ChunkedForward(std::vector<std::shared_ptr<Parameter>> parameters, int64_t rows, RowShares shares)
      : parameters_(std::move(parameters)), rows_(rows), shares_(std::move(shares)) {}

  Tensor operator()(const Tensor& in, const ForwardFunction& forward) const {
    const int64_t rows = AsRows(in).dim(0), all = shares_.all ? shares_.all() : rows;
    const std::vector<Chunk> chunks = ChunksOf(rows, all, rows_, shares_);
    const Placement placement = ReshapedPlacement("chunked_mlp", in, AsRows(in).shape());
    Tensor out;
    {
      const NoGrad no_grad;
      const KeepScope one_op(nullptr, false);
      for (const Chunk& chunk : chunks) {
        Announce(chunk.all);
        const Tensor part = forward(RowsOf(in.Detached(), placement, chunk));
        if (!out.defined()) {
          Dims shape = in.shape();
          shape[-1] = part.dim(-1);
          out = Tensor::Empty(shape, part.dtype());
          out.set_placement(ResultPlacement(in, part));
        }
        AsRows(out).Narrowed(0, chunk.begin, chunk.count).CopyFrom(part);
      }
      Announce(all);
    }
    // The parameters are inputs, so that the pass which this node is in calls their hooks, once.
    std::vector<Tensor> inputs = {in};
    for (const auto& p : parameters_) inputs.push_back(p->Use());
    RecordOptions options;
    options.placement = out.placement();
    options.split = false;
    const bool wants = in.node() != nullptr;
    return Record(
        "chunked_mlp", out, inputs, {in.Detached()},
        [this, forward, chunks, placement, all, wants](GradContext& context) {
          const Tensor x = context.Saved(0);
          const Tensor dout =
              context.grad().contiguous() ? context.TakeGrad() : context.TakeGrad().Clone();
          const Tensor dx = wants ? Tensor::Full(x.shape(), x.dtype(), 0) : Tensor();
          WideGradients sums(parameters_);
          for (const Chunk& chunk : chunks) {
            Announce(chunk.all);
            Tensor again =
                Again(RowsOf(x, placement, chunk), forward,
                      wants ? AsRows(dx).Narrowed(0, chunk.begin, chunk.count) : Tensor());
            // Its weights' last use is this node's, so no hook of theirs is called in here.
            Backward(std::exchange(again, {}), AsRows(dout).Narrowed(0, chunk.begin, chunk.count));
          }
          Announce(all);
          sums.Give(context, 1);
          if (wants) context.Give(0, dx);
        },
        options);
  }

 private:
  void Announce(int64_t rows) const {
    if (shares_.announce) shares_.announce(rows);
  }
  // The chunk with its graph, whose gradient is added to `dx`, if there is one.
  static Tensor Again(Tensor x, const ForwardFunction& forward, const Tensor& dx) {
    if (dx.defined()) {
      const auto input = std::make_shared<Leaf>(x.shape(), x.dtype());
      input->weight = false;
      input->memory_class = MemoryClass::kActivations;
      input->grad = dx;
      x = x.Detached();
      x.set_node(input);
    }
    const EnableGrad enable;
    const OriginScope here(Pass::kRecompute);
    return forward(x);
  }

  std::vector<std::shared_ptr<Parameter>> parameters_;
  int64_t rows_;
  RowShares shares_;
};

}  // namespace

void ApplyChunkedMlp(Module& root, const std::string& path, int64_t rows, const RowShares& shares) {
  SHOAL_CHECK(rows > 0, "chunked_mlp", "{} rows at a time", rows);
  std::vector<std::shared_ptr<Parameter>> parameters = root.Parameters();
  std::erase_if(parameters, [&](const auto& p) { return !p->name().starts_with(path + "."); });
  Module* module = nullptr;
  root.Walk([&](const std::string& at, Module& m) {
    if (at == path) module = &m;
  });
  SHOAL_CHECK(dynamic_cast<UnaryModule*>(module) != nullptr, "chunked_mlp",
              "there is no module of one tensor at '{}'", path);
  module->hooks().around = ChunkedForward(std::move(parameters), rows, shares);
}

}  // namespace shoal

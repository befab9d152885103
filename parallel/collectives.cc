#include "parallel/collectives.h"

#include <numeric>

#include "core/base/mutation.h"
#include "core/placement_rules.h"

namespace shoal::collectives {
namespace {

std::vector<int64_t> Copy(std::span<const int64_t> values) {
  return {values.begin(), values.end()};
}

// Elements of a row: of everything behind dimension 0.
int64_t RowWidth(const Tensor& x) {
  int64_t width = 1;
  for (int d = 1; d < x.rank(); ++d) width *= x.dim(d);
  return width;
}

Dims WithRows(const Tensor& x, int64_t rows) {
  Dims shape = x.shape();
  shape[0] = rows;
  return shape;
}

std::vector<int64_t> Times(std::span<const int64_t> rows, int64_t width) {
  std::vector<int64_t> elements;
  for (const int64_t r : rows) elements.push_back(r * width);
  return elements;
}

// By value: a caller gives its own up.
// NOLINTNEXTLINE(performance-unnecessary-value-param)
Tensor Overwritable(Tensor x, DType dtype) {
  if (x.exclusive() && x.contiguous() && x.dtype() == dtype) return x;
  return x.To(dtype, MemoryClass::kCommunication);
}

Tensor Rounded(const Tensor& x, DType dtype) { return x.dtype() == dtype ? x : x.To(dtype); }

void Sum(const Tensor& x, Communicator& group) {
  const View view = x.view();
  group.AllReduce(std::span(&view, 1));
}

int64_t Begin(std::span<const int64_t> bounds, const Communicator& group) {
  return bounds[static_cast<size_t>(group.rank())];
}
int64_t Count(std::span<const int64_t> bounds, const Communicator& group) {
  return bounds[static_cast<size_t>(group.rank()) + 1] - Begin(bounds, group);
}

// This rank's rows -> all.
Tensor Gathered(const Tensor& x, std::span<const int64_t> bounds, Communicator& group) {
  const Tensor all = Tensor::Empty(WithRows(x, bounds.back()), x.dtype());
  all.Narrowed(0, Begin(bounds, group), Count(bounds, group)).CopyFrom(x);
  const View view = all.view();
  group.AllGather(std::span(&view, 1), Times(bounds, RowWidth(x)));
  return all;
}

// All rows, partial -> this rank's sums, in at least f32 on the way.
Tensor Scattered(Tensor x, std::span<const int64_t> bounds, Communicator& group, DType dtype) {
  const int64_t width = RowWidth(x);
  const Tensor sums = Overwritable(std::move(x), AccumulatorDType(dtype));
  const View view = sums.view();
  group.ReduceScatter(std::span(&view, 1), Times(bounds, width));
  return sums.Narrowed(0, Begin(bounds, group), Count(bounds, group)).To(dtype);
}

Tensor Exchanged(const Tensor& x, std::span<const int64_t> send_rows,
                 std::span<const int64_t> receive_rows, Communicator& group) {
  const int64_t width = RowWidth(x);
  const Tensor out = Tensor::Empty(
      WithRows(x, std::accumulate(receive_rows.begin(), receive_rows.end(), int64_t{0})),
      x.dtype());
  const Tensor in = x.contiguous() ? x : x.Clone();
  group.AllToAll(in.view(), Times(send_rows, width), out.view(), Times(receive_rows, width));
  return out;
}

Tensor Shifted(const Tensor& x, int by, Communicator& group) {
  const int size = group.size(), rank = group.rank();
  std::vector<int64_t> send(static_cast<size_t>(size)), receive(static_cast<size_t>(size));
  const auto at = [&](int r) { return static_cast<size_t>(((r % size) + size) % size); };
  send[at(rank + by)] = x.dim(0);
  receive[at(rank - by)] = x.dim(0);
  return Exchanged(x, send, receive, group);
}

using Kind = AxisPlacement::Kind;

// Of the result of a collective that takes `in` to `out` on the group's axis; the other axes stay.
Placement Placed(const char* op, const Tensor& x, const Communicator& group, AxisPlacement in,
                 AxisPlacement out) {
  Placement placement = UniformPlacement(op, std::span(&x, 1), true);
  if (!group.axis()) return placement;
  if (placement[*group.axis()] != in)
    FailPlacement(op, *group.axis(), x, 0, fmt::format("is not {}", in.ToString()));
  placement.Set(*group.axis(), out);
  return placement;
}

// Of an exchange of rows, of whatever they are parts.
Placement PlacedApart(const char* op, const Tensor& x, const Communicator& group) {
  Placement placement = UniformPlacement(op, std::span(&x, 1), true);
  if (group.axis()) {
    if (placement[*group.axis()].kind == Kind::kPartial)
      FailPlacement(op, *group.axis(), x, 0, "is a part of a sum");
    placement.Set(*group.axis(), {Kind::kVarying});
  }
  return placement;
}

}  // namespace

Tensor Enter(const Tensor& x, Communicator& group) {
  if (group.size() == 1) return x;
  const DType dtype = x.dtype();
  RecordOptions options;
  options.gradient_dtype = AccumulatorDType(dtype);
  options.placement = Placed("enter", x, group, {Kind::kInvariant}, {Kind::kReplicated});
  options.identity = true;
  return Record(
      "enter", x.Detached(), {x}, {},
      [&group, dtype](GradContext& context) {
        const Tensor sum = Overwritable(context.TakeGrad(), AccumulatorDType(dtype));
        if (!Mutated(Mutation::kPartialTakenForWhole)) Sum(sum, group);
        context.Give(0, Rounded(sum, dtype));
      },
      options);
}

Tensor AllReduce(const Tensor& x, Communicator& group, DType dtype) {
  const OriginScope here("all_reduce");
  if (group.size() == 1 && x.dtype() == dtype) return x;
  const DType wide = AccumulatorDType(dtype);
  RecordOptions options;
  options.placement = Placed("all_reduce", x, group, {Kind::kPartial}, {Kind::kInvariant});
  const Tensor sum =
      x.To(wide, wide == dtype ? MemoryClass::kActivations : MemoryClass::kCommunication);
  Sum(sum, group);
  return Record(
      "all_reduce", Rounded(sum, dtype).Detached(), {x}, {},
      [](GradContext& context) { context.Give(0, context.TakeGrad()); }, options);
}

Tensor AllGather(const Tensor& x, std::span<const int64_t> bounds, Communicator& group) {
  const OriginScope here("all_gather");
  if (group.size() == 1) return x;
  const DType dtype = x.dtype();
  RecordOptions options;
  options.gradient_dtype = AccumulatorDType(dtype);
  options.placement =
      Placed("all_gather", x, group, AxisPlacement::Sharded(0), {Kind::kReplicated});
  return Record(
      "all_gather", Gathered(x, bounds, group), {x}, {},
      [&group, dtype, bounds = Copy(bounds)](GradContext& context) {
        context.Give(0, Scattered(context.TakeGrad(), bounds, group, dtype));
      },
      options);
}

Tensor ReduceScatter(const Tensor& x, std::span<const int64_t> bounds, Communicator& group,
                     DType dtype) {
  const OriginScope here("reduce_scatter");
  if (group.size() == 1 && x.dtype() == dtype) return x;
  RecordOptions options;
  options.placement =
      Placed("reduce_scatter", x, group, {Kind::kPartial}, AxisPlacement::Sharded(0));
  return Record(
      "reduce_scatter", Scattered(x.Detached(), bounds, group, dtype), {x}, {},
      [&group, bounds = Copy(bounds)](GradContext& context) {
        context.Give(0, Gathered(context.TakeGrad(), bounds, group));
      },
      options);
}

Tensor Shard(const Tensor& x, std::span<const int64_t> bounds, Communicator& group) {
  const OriginScope here("shard");
  if (group.size() == 1) return x;
  RecordOptions options;
  options.placement = Placed("shard", x, group, {Kind::kInvariant}, AxisPlacement::Sharded(0));
  const Tensor mine = x.Narrowed(0, Begin(bounds, group), Count(bounds, group)).Clone();
  return Record(
      "shard", mine, {x}, {},
      [&group, bounds = Copy(bounds)](GradContext& context) {
        context.Give(0, Gathered(context.TakeGrad(), bounds, group));
      },
      options);
}

Tensor AllToAll(const Tensor& x, std::span<const int64_t> send_rows,
                std::span<const int64_t> receive_rows, Communicator& group) {
  const OriginScope here("all_to_all");
  if (group.size() == 1) return x;
  RecordOptions options;
  options.placement = PlacedApart("all_to_all", x, group);
  return Record(
      "all_to_all", Exchanged(x, send_rows, receive_rows, group), {x}, {},
      [&group, send = Copy(send_rows), receive = Copy(receive_rows)](GradContext& context) {
        context.Give(0, Exchanged(context.TakeGrad(), receive, send, group));
      },
      options);
}

Tensor Shift(const Tensor& x, int by, Communicator& group) {
  const OriginScope here("shift");
  if (group.size() == 1) return x;
  RecordOptions options;
  options.placement = PlacedApart("shift", x, group);
  return Record(
      "shift", Shifted(x, by, group), {x}, {},
      [&group, by](GradContext& context) {
        context.Give(0, Shifted(context.TakeGrad(), -by, group));
      },
      options);
}

}  // namespace shoal::collectives

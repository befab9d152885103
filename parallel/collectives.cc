#include "parallel/collectives.h"

#include <numeric>

#include "core/base/mutation.h"

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
Tensor Scattered(Tensor x, std::span<const int64_t> bounds, Communicator& group) {
  const DType dtype = x.dtype();
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

}  // namespace

Tensor Enter(const Tensor& x, Communicator& group) {
  if (group.size() == 1) return x;
  const DType dtype = x.dtype();
  return Record(
      "enter", x.Detached(), {x}, {},
      [&group, dtype](GradContext& context) {
        const Tensor sum = Overwritable(context.TakeGrad(), AccumulatorDType(dtype));
        if (!Mutated(Mutation::kPartialTakenForWhole)) Sum(sum, group);
        context.Give(0, Rounded(sum, dtype));
      },
      AccumulatorDType(dtype));
}

Tensor AllReduce(const Tensor& x, Communicator& group, DType dtype) {
  if (group.size() == 1 && x.dtype() == dtype) return x;
  const DType wide = AccumulatorDType(dtype);
  const Tensor sum =
      x.To(wide, wide == dtype ? MemoryClass::kActivations : MemoryClass::kCommunication);
  Sum(sum, group);
  return Record("all_reduce", Rounded(sum, dtype).Detached(), {x}, {},
                [](GradContext& context) { context.Give(0, context.TakeGrad()); });
}

Tensor AllGather(const Tensor& x, std::span<const int64_t> bounds, Communicator& group) {
  if (group.size() == 1) return x;
  return Record("all_gather", Gathered(x, bounds, group), {x}, {},
                [&group, bounds = Copy(bounds)](GradContext& context) {
                  context.Give(0, Scattered(context.TakeGrad(), bounds, group));
                });
}

Tensor ReduceScatter(const Tensor& x, std::span<const int64_t> bounds, Communicator& group) {
  if (group.size() == 1) return x;
  return Record("reduce_scatter", Scattered(x.Detached(), bounds, group), {x}, {},
                [&group, bounds = Copy(bounds)](GradContext& context) {
                  context.Give(0, Gathered(context.TakeGrad(), bounds, group));
                });
}

Tensor Shard(const Tensor& x, std::span<const int64_t> bounds, Communicator& group) {
  if (group.size() == 1) return x;
  const Tensor mine = x.Narrowed(0, Begin(bounds, group), Count(bounds, group)).Clone();
  return Record("shard", mine, {x}, {}, [&group, bounds = Copy(bounds)](GradContext& context) {
    context.Give(0, Gathered(context.TakeGrad(), bounds, group));
  });
}

Tensor AllToAll(const Tensor& x, std::span<const int64_t> send_rows,
                std::span<const int64_t> receive_rows, Communicator& group) {
  if (group.size() == 1) return x;
  return Record(
      "all_to_all", Exchanged(x, send_rows, receive_rows, group), {x}, {},
      [&group, send = Copy(send_rows), receive = Copy(receive_rows)](GradContext& context) {
        context.Give(0, Exchanged(context.TakeGrad(), receive, send, group));
      });
}

Tensor Shift(const Tensor& x, int by, Communicator& group) {
  if (group.size() == 1) return x;
  return Record("shift", Shifted(x, by, group), {x}, {}, [&group, by](GradContext& context) {
    context.Give(0, Shifted(context.TakeGrad(), -by, group));
  });
}

}  // namespace shoal::collectives

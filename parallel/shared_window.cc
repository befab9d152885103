#include "parallel/shared_window.h"

#include <algorithm>
#include <cstring>

#include "kernels/reduce_arrays.h"
#include "parallel/pieces.h"

namespace shoal {
namespace {

// Below, a copy costs less than to say where the arrays are.
constexpr int64_t kLeastDirect = int64_t{64} << 10;

int64_t Width(std::span<const View> pieces) {
  return static_cast<int64_t>(SizeOf(pieces[0].dtype));
}

// One for each share between `bounds`.
std::vector<Cursor> Cursors(std::span<const View> pieces, std::span<const int64_t> bounds) {
  std::vector<Cursor> cursors;
  for (const int64_t begin : bounds.first(bounds.size() - 1)) cursors.emplace_back(pieces, begin);
  return cursors;
}

// Where an array lies in its rank's pool.
struct Place {
  int64_t offset;  // -1: elsewhere
  int64_t bytes;
};

}  // namespace

// Tells the others where this rank's arrays are. True if all ranks' are in pools: then `arrays`
// says where they are in this process.
bool SharedWindow::Publish(const char* op, std::span<const View> pieces, PeerArrays& arrays) {
  auto* mine = reinterpret_cast<Place*>(Staging(rank_));
  const SharedRange& pool = *pools_[static_cast<size_t>(rank_)];
  for (size_t p = 0; p < pieces.size(); ++p) {
    const size_t bytes = pieces[p].bytes();
    const bool here = bytes == 0 || pool.Holds(pieces[p].data, bytes);
    const int64_t offset = bytes > 0 && here ? pieces[p].as<char>() - pool.begin() : 0;
    mine[p] = {here ? offset : -1, static_cast<int64_t>(bytes)};
  }
  Barrier();
  bool alike = true, direct = true;
  const auto* first = reinterpret_cast<const Place*>(Staging(0));
  for (int r = 0; r < size_; ++r) {
    const auto* places = reinterpret_cast<const Place*>(Staging(r));
    std::vector<char*>& of_rank = arrays.emplace_back();
    for (size_t p = 0; p < pieces.size(); ++p) {
      alike = alike && places[p].bytes == first[p].bytes;
      direct = direct && places[p].offset >= 0;
      if (direct) of_rank.push_back(pools_[static_cast<size_t>(r)]->begin() + places[p].offset);
    }
  }
  buffer_ ^= 1;
  SHOAL_CHECK(alike, op, "the ranks brought arrays of different sizes");
  return direct;
}

// Whether `work` could run on the arrays where they are.
template <class F>
bool SharedWindow::Direct(const char* op, std::span<const View> pieces, F&& work) {
  if (pools_.empty() || Elements(pieces) * Width(pieces) < kLeastDirect ||
      pieces.size() > kStagingBytes / sizeof(Place))
    return false;
  PeerArrays arrays;
  if (!Publish(op, pieces, arrays)) return false;
  work(DirectArrays{pieces, arrays, rank_});
  barrier_->WaitForAll(size_);
  return true;
}

// Chunk after chunk: copy the others' slices of mine into my staging buffer, sum my slice of
// everybody's, and a chunk later, when all have, copy the others' sums out.
void SharedWindow::AllReduce(std::span<const View> pieces, ReduceOp op) {
  if (Direct("all-reduce", pieces, [&](const DirectArrays& all) { all.AllReduce(op); })) return;
  const int64_t width = Width(pieces), chunk = kStagingBytes / width;
  const int64_t total = Elements(pieces);
  std::vector<const void*> sources(static_cast<size_t>(size_));
  Cursor in(pieces), sum(pieces), out(pieces);
  const auto copy_out = [&](int64_t n) {
    const int64_t from = ShardBegin(n, rank_, size_), to = ShardBegin(n, rank_ + 1, size_);
    const char* sums = Sums(buffer_ ^ 1);
    out.CopyOut(from, sums);
    out.Skip(to - from);
    out.CopyOut(n - to, sums + to * width);
  };
  for (int64_t begin = 0; begin < total; begin += chunk, buffer_ ^= 1) {
    const int64_t n = std::min(chunk, total - begin);
    const int64_t from = ShardBegin(n, rank_, size_), to = ShardBegin(n, rank_ + 1, size_);
    in.CopyIn(from, Staging(rank_));
    in.Skip(to - from);
    in.CopyIn(n - to, Staging(rank_) + to * width);
    Barrier();
    sum.Skip(from);
    sum.Move(to - from, [&](char* memory, int64_t at, int64_t bytes) {
      const int64_t place = from * width + at;
      for (int r = 0; r < size_; ++r) sources[static_cast<size_t>(r)] = Staging(r) + place;
      sources[static_cast<size_t>(rank_)] = memory;
      void* const outs[] = {memory, Sums(buffer_) + place};
      kernels::cpu::ReduceArrays(pieces[0].dtype, op, sources, outs, bytes / width);
    });
    sum.Skip(n - to);
    if (begin > 0) copy_out(chunk);
  }
  Barrier();
  copy_out(total - (total - 1) / chunk * chunk);
}

// A chunk holds a part of every rank's share, so that all have sums to take in each.
void SharedWindow::ReduceScatter(std::span<const View> pieces, std::span<const int64_t> bounds,
                                 char* into) {
  if (Direct("reduce-scatter", pieces,
             [&](const DirectArrays& all) { all.ReduceScatter(bounds, into); }))
    return;
  const int64_t width = Width(pieces), part = kStagingBytes / width / size_;
  std::vector<Cursor> in = Cursors(pieces, bounds);
  Cursor sum(pieces, bounds[static_cast<size_t>(rank_)]);
  std::vector<const void*> sources(static_cast<size_t>(size_));
  for (int64_t at = 0; at < LongestShare(bounds); at += part, buffer_ ^= 1) {
    for (int r = 0; r < size_; ++r) {
      if (r != rank_)
        in[static_cast<size_t>(r)].CopyIn(PartOf(bounds, r, at, part),
                                          Staging(rank_) + r * part * width);
    }
    Barrier();
    sum.Move(PartOf(bounds, rank_, at, part), [&](char* memory, int64_t offset, int64_t bytes) {
      for (int r = 0; r < size_; ++r)
        sources[static_cast<size_t>(r)] = Staging(r) + rank_ * part * width + offset;
      sources[static_cast<size_t>(rank_)] = memory;
      void* const outs[] = {into != nullptr ? into + at * width + offset : memory};
      kernels::cpu::ReduceArrays(pieces[0].dtype, ReduceOp::kSum, sources, outs, bytes / width);
    });
  }
}

void SharedWindow::AllGather(std::span<const View> pieces, std::span<const int64_t> bounds) {
  if (Direct("all-gather", pieces, [&](const DirectArrays& all) { all.AllGather(bounds); })) return;
  const int64_t part = kStagingBytes / Width(pieces);
  std::vector<Cursor> cursors = Cursors(pieces, bounds);
  for (int64_t at = 0; at < LongestShare(bounds); at += part, buffer_ ^= 1) {
    cursors[static_cast<size_t>(rank_)].CopyIn(PartOf(bounds, rank_, at, part), Staging(rank_));
    Barrier();
    for (int step = 1; step < size_; ++step) {
      const int r = (rank_ + step) % size_;
      cursors[static_cast<size_t>(r)].CopyOut(PartOf(bounds, r, at, part), Staging(r));
    }
  }
}

void SharedWindow::AllToAll(const View& send, std::span<const int64_t> from, const View& receive,
                            std::span<const int64_t> to, int64_t longest) {
  const auto width = static_cast<int64_t>(SizeOf(send.dtype));
  const int64_t part = kStagingBytes / width / size_;
  for (int64_t at = 0; at < longest; at += part, buffer_ ^= 1) {
    for (int r = 0; r < size_; ++r) {
      const int64_t n = PartOf(from, r, at, part);
      if (n > 0)
        std::memcpy(Staging(rank_) + r * part * width,
                    send.as<char>() + (from[static_cast<size_t>(r)] + at) * width,
                    static_cast<size_t>(n * width));
    }
    Barrier();
    for (int r = 0; r < size_; ++r) {
      const int64_t n = PartOf(to, r, at, part);
      if (n > 0)
        std::memcpy(receive.as<char>() + (to[static_cast<size_t>(r)] + at) * width,
                    Staging(r) + rank_ * part * width, static_cast<size_t>(n * width));
    }
  }
}

}  // namespace shoal

// Reads saves: LoadState, VerifySave, CheckSave of store.h.
#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>

#include "checkpoint/manifest.h"
#include "checkpoint/store.h"
#include "core/base/error.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;

// Copies what both have of their tensor; returns how many elements that is. Nothing is written
// where `to_data` is null.
int64_t CopyOverlap(const std::vector<Range>& to, char* to_data, const std::vector<Range>& from,
                    const char* from_data, size_t width) {
  if (from.empty()) return 0;
  int64_t copied = 0;
  auto t = std::partition_point(to.begin(), to.end(), [&](const Range& r) {
    return r.global + r.count <= from.front().global;
  });
  for (size_t f = 0; t != to.end() && f < from.size();) {
    const int64_t to_end = t->global + t->count, from_end = from[f].global + from[f].count;
    const int64_t begin = std::max(t->global, from[f].global);
    const int64_t count = std::min(to_end, from_end) - begin;
    if (count > 0) {
      const auto bytes = [&](const Range& r) {
        return static_cast<size_t>(r.local + begin - r.global) * width;
      };
      if (to_data != nullptr)
        std::memcpy(to_data + bytes(*t), from_data + bytes(from[f]),
                    static_cast<size_t>(count) * width);
      copied += count;
    }
    if (to_end <= from_end) {
      ++t;
    } else {
      ++f;
    }
  }
  return copied;
}

// The files of a save, each opened once and never held as a whole.
class Files {
 public:
  Files(std::string save, const Part& part)
      : save_(std::move(save)), part_(part), extents_(ExtentsOf(part)) {}

  // Chunk `index` of a piece, held against its digest.
  Tensor ReadChunk(const std::string& name, DType dtype, const StoredPiece& stored,
                   const Range& elements, size_t index) {
    const File& file = Open(stored.file);
    const auto width = static_cast<int64_t>(SizeOf(dtype));
    const Tensor chunk = Tensor::Empty({elements.count}, dtype, MemoryClass::kWorkspace);
    char* data = chunk.view().as<char>();
    const int64_t at = stored.at + elements.local * width;
    file.Read(data, elements.count * width, at);
    if (Digest({data, chunk.bytes()}) != stored.digests[index]) {
      FailFile(
          file.path(),
          fmt::format("tensor {} is not as it was written (digests differ in bytes {} to {}): the "
                      "file is damaged",
                      name, at, at + elements.count * width));
    }
    return chunk;
  }

  // What lies between the pieces of a file, which other readers need.
  const File& Open(const std::string& name) {
    const auto found = files_.find(name);
    if (found != files_.end()) return found->second;
    const StoredFile& stored = part_.files.at(name);
    File file = File::Open(save_ + "/" + name);
    if (file.size() != stored.bytes)
      FailFile(file.path(), fmt::format("has {} bytes, the manifest says {}: it is damaged",
                                        file.size(), stored.bytes));
    std::string frame;
    for (const Extent& gap : Gaps(extents_.at(name), stored.bytes)) {
      const size_t end = frame.size();
      frame.resize(end + static_cast<size_t>(gap.bytes));
      file.Read(frame.data() + end, gap.bytes, gap.at);
    }
    if (Digest(frame) != stored.frame)
      FailFile(file.path(),
               "what lies between its tensors is not as it was written: it is damaged");
    return files_.emplace(name, std::move(file)).first->second;
  }

 private:
  std::string save_;
  const Part& part_;
  std::map<std::string, std::vector<Extent>> extents_;
  std::map<std::string, File> files_;
};

// Calls f(index, elements): `elements.local` is where the chunk begins in the piece.
template <class F>
void ForEachChunk(const StoredPiece& stored, DType dtype, const F& f) {
  const int64_t most = kChunkBytes / static_cast<int64_t>(SizeOf(dtype));
  for (size_t i = 0; i < stored.digests.size(); ++i) {
    const int64_t begin = static_cast<int64_t>(i) * most;
    f(i, Range{0, begin, std::min(most, stored.piece.count - begin)});
  }
}

// Fills one tensor, a chunk at a time.
void LoadTensor(const std::string& save, Files& files, const StateEntry& entry,
                const StoredTensor& stored) {
  const std::vector<Range> wanted = RangesOf(PieceOf(entry));
  const DType dtype = entry.tensor.dtype();
  SHOAL_CHECK(entry.tensor.contiguous(), "checkpoint", "{} is not contiguous", entry.name);
  int64_t missing = entry.tensor.numel();
  for (const StoredPiece& p : stored.pieces) {
    ForEachChunk(p, stored.dtype, [&](size_t index, const Range& elements) {
      Piece part = p.piece;
      part.begin += elements.local;
      part.count = elements.count;
      const std::vector<Range> held = RangesOf(part);
      if (CopyOverlap(wanted, nullptr, held, nullptr, 0) == 0) return;
      Tensor chunk = files.ReadChunk(entry.name, stored.dtype, p, elements, index);
      if (stored.dtype != dtype) chunk = chunk.To(dtype, MemoryClass::kWorkspace);
      missing -= CopyOverlap(wanted, entry.tensor.view().as<char>(), held,
                             chunk.view().as<const char>(), SizeOf(dtype));
    });
  }
  if (missing != 0)
    FailFile(save, fmt::format("holds only a part of tensor {}: it is damaged", entry.name));
}

}  // namespace

SaveInfo ReadSaveInfo(const std::string& save) { return ReadManifest(save).info; }

SaveInfo CheckSave(const std::string& save) {
  Manifest manifest = ReadManifest(save);
  for (const auto& [name, file] : manifest.all.files) {
    std::error_code error;
    const std::string path = save + "/" + name;
    const auto bytes = static_cast<int64_t>(fs::file_size(path, error));
    if (error) FailFile(path, fmt::format("cannot be read: {}", error.message()));
    if (bytes != file.bytes)
      FailFile(path,
               fmt::format("has {} bytes, the manifest says {}: it is damaged", bytes, file.bytes));
  }
  return std::move(manifest.info);
}

struct SaveReader::Opened {
  explicit Opened(const std::string& save)
      : save(save), manifest(ReadManifest(save)), files(save, manifest.all) {}
  const std::string save;
  const Manifest manifest;
  Files files;
};

SaveReader::SaveReader(const std::string& save) : opened_(std::make_unique<Opened>(save)) {}
SaveReader::~SaveReader() = default;

const SaveInfo& SaveReader::info() const { return opened_->manifest.info; }

std::optional<DType> SaveReader::dtype(const std::string& tensor) const {
  const auto& tensors = opened_->manifest.all.tensors;
  const auto found = tensors.find(tensor);
  return found == tensors.end() ? std::nullopt : std::optional(found->second.dtype);
}

void SaveReader::Load(const StateDict& state) {
  const std::string& save = opened_->save;
  const auto& tensors = opened_->manifest.all.tensors;
  for (const StateEntry& entry : state) {
    const auto found = tensors.find(entry.name);
    if (found == tensors.end()) FailFile(save, fmt::format("holds no tensor {}", entry.name));
    const StoredTensor& stored = found->second;
    if (!(stored.shape == entry.global_shape)) {
      FailFile(save, fmt::format("tensor {} has shape {}, the model's is {}", entry.name,
                                 stored.shape.ToString(), entry.global_shape.ToString()));
    }
    LoadTensor(save, opened_->files, entry, stored);
  }
}

void LoadState(const std::string& save, const StateDict& state) { SaveReader(save).Load(state); }

void VerifySave(const std::string& save) {
  const Manifest manifest = ReadManifest(save);
  Files files(save, manifest.all);
  for (const auto& [name, file] : manifest.all.files) files.Open(name);
  for (const auto& entry : manifest.all.tensors) {
    const std::string& name = entry.first;
    const StoredTensor& stored = entry.second;
    int64_t missing = stored.shape.numel();
    for (const StoredPiece& p : stored.pieces) {
      missing -= p.piece.count;
      ForEachChunk(p, stored.dtype, [&](size_t index, const Range& elements) {
        files.ReadChunk(name, stored.dtype, p, elements, index);
      });
    }
    if (missing != 0) FailFile(save, fmt::format("holds only a part of tensor {}", name));
  }
}

}  // namespace shoal

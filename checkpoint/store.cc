#include "checkpoint/store.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "checkpoint/hdf5_file.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int kFormat = 2;
constexpr const char* kManifest = "manifest.json";

[[noreturn]] void Fail(const std::string& path, const std::string& what) {
  SHOAL_FAIL(ErrorKind::kStorage, "checkpoint", "{}: {}", path, what);
}

void Flush(const fs::path& path) {
  const int fd = open(path.c_str(), O_RDONLY);
  const bool flushed = fd >= 0 && fsync(fd) == 0;
  const int error = errno;
  if (fd >= 0) close(fd);
  if (!flushed) Fail(path, fmt::format("cannot be flushed to the disk: {}", std::strerror(error)));
}

std::string Digest(const void* data, size_t bytes) {
  const XXH128_hash_t h = XXH3_128bits(data, bytes);
  return fmt::format("{:016x}{:016x}", h.high64, h.low64);
}

std::string Directory(int64_t step) { return fmt::format("step-{:08}", step); }

std::optional<int64_t> StepOf(const std::string& name) {
  if (!name.starts_with("step-") || name.size() < 6) return std::nullopt;
  int64_t step = 0;
  const auto [end, error] = std::from_chars(name.data() + 5, name.data() + name.size(), step);
  if (error != std::errc() || end != name.data() + name.size()) return std::nullopt;
  return step;
}

std::string FileOf(int rank) { return fmt::format("rank-{:04}.h5", rank); }

fs::path Partial(const std::string& directory, int64_t step) {
  return fs::path(directory) / (Directory(step) + ".partial");
}

// Which part of a tensor is meant: elements [begin, begin + count) of a slice of it.
struct Piece {
  Dims global, offset, slice;
  int64_t begin = 0, count = 0;
};

Piece PieceOf(const StateEntry& entry) {
  return {entry.global_shape, entry.offset, entry.share ? entry.share->slice : entry.tensor.shape(),
          entry.share ? entry.share->begin : 0, entry.tensor.numel()};
}

// Elements that follow each other both in the whole tensor and in the piece.
struct Range {
  int64_t global, local, count;
};

// In rising order of both.
std::vector<Range> RangesOf(const Piece& piece) {
  std::vector<Range> ranges;
  const int rank = piece.slice.rank();
  const int64_t width = rank > 0 ? piece.slice[rank - 1] : 1;
  for (int64_t i = piece.begin, end = piece.begin + piece.count; i < end;) {
    int64_t global = rank > 0 ? piece.offset[rank - 1] + i % width : 0;
    int64_t row = i / width, stride = rank > 0 ? piece.global[rank - 1] : 1;
    for (int d = rank - 2; d >= 0; --d) {
      global += (piece.offset[d] + row % piece.slice[d]) * stride;
      row /= piece.slice[d];
      stride *= piece.global[d];
    }
    const int64_t count = std::min(width - i % width, end - i);
    if (!ranges.empty() && ranges.back().global + ranges.back().count == global) {
      ranges.back().count += count;
    } else {
      ranges.push_back({global, i - piece.begin, count});
    }
    i += count;
  }
  return ranges;
}

// Copies what both pieces hold of their tensor; returns how many elements that is.
int64_t CopyOverlap(const std::vector<Range>& to, char* to_data, const std::vector<Range>& from,
                    const char* from_data, size_t width) {
  int64_t copied = 0;
  for (size_t t = 0, f = 0; t < to.size() && f < from.size();) {
    const int64_t to_end = to[t].global + to[t].count, from_end = from[f].global + from[f].count;
    const int64_t begin = std::max(to[t].global, from[f].global);
    const int64_t count = std::min(to_end, from_end) - begin;
    if (count > 0) {
      const auto bytes = [&](const Range& r) {
        return static_cast<size_t>(r.local + begin - r.global) * width;
      };
      std::memcpy(to_data + bytes(to[t]), from_data + bytes(from[f]),
                  static_cast<size_t>(count) * width);
      copied += count;
    }
    ++(to_end <= from_end ? t : f);
  }
  return copied;
}

json ToJson(const Dims& dims) { return std::vector<int64_t>(dims.begin(), dims.end()); }

// Of the manifest without its own digest. What is parsed and written again is the same text.
std::string DigestOf(const json& manifest) {
  const std::string text = manifest.dump();
  return Digest(text.data(), text.size());
}

json ReadManifest(const std::string& save) {
  const fs::path path = fs::path(save) / kManifest;
  std::ifstream in(path);
  if (!in) Fail(path, "cannot be read; this is not a save");
  json manifest = json::parse(in, nullptr, false);
  if (manifest.is_discarded() || !manifest.contains("format")) Fail(path, "is damaged");
  if (manifest["format"] != kFormat) {
    Fail(path,
         fmt::format("has format {}, this version reads {}", manifest["format"].dump(), kFormat));
  }
  const json digest = manifest.value("digest", json());
  manifest.erase("digest");
  if (digest != DigestOf(manifest)) Fail(path, "is not as it was written: it is damaged");
  return manifest;
}

DType DTypeFromName(const std::string& path, const std::string& name) {
  for (int i = 0; i <= static_cast<int>(DType::kU8); ++i) {
    if (name == Name(static_cast<DType>(i))) return static_cast<DType>(i);
  }
  Fail(path, "names an unknown dtype " + name);
}

// Of a manifest that may be damaged: nothing here may ask for memory, or index, beyond reason.
Dims ToDims(const std::string& path, const std::string& name, const json& extents) {
  const auto values = extents.get<std::vector<int64_t>>();
  int64_t most = int64_t{1} << 60;
  bool whole = values.size() <= Dims::kMaxRank;
  Dims dims;
  for (const int64_t v : values) {
    whole = whole && v >= 0 && v <= most;
    if (!whole) Fail(path, fmt::format("tensor {} has an impossible shape in the manifest", name));
    if (v > 0) most /= v;
    dims.push_back(v);
  }
  return dims;
}

Piece ToPiece(const std::string& path, const std::string& name, const Dims& global,
              const json& entry) {
  Piece p = {global, ToDims(path, name, entry.at("offset")), ToDims(path, name, entry.at("slice")),
             entry.at("begin"), entry.at("count")};
  bool inside = p.offset.rank() == global.rank() && p.slice.rank() == global.rank();
  for (int d = 0; inside && d < global.rank(); ++d)
    inside = p.slice[d] <= global[d] && p.offset[d] <= global[d] - p.slice[d];
  inside = inside && p.begin >= 0 && p.count >= 0 && p.count <= p.slice.numel() &&
           p.begin <= p.slice.numel() - p.count;
  if (!inside) Fail(path, fmt::format("tensor {} has an impossible piece in the manifest", name));
  return p;
}

// The files of a save, each opened once.
class PartFiles {
 public:
  explicit PartFiles(std::string save) : save_(std::move(save)) {}

  // Reads one piece as stored and holds it against its digest.
  Tensor Read(const std::string& name, DType dtype, const Piece& piece, const json& entry) {
    const std::string file = entry.at("file");
    const std::string path = save_ + "/" + file;
    // No piece is larger than its file.
    std::error_code error;
    const auto bytes = static_cast<int64_t>(fs::file_size(path, error));
    if (file.find('/') != std::string::npos || error)
      Fail(path, fmt::format("cannot be read, and holds tensor {}", name));
    if (piece.count > bytes)
      Fail(path, fmt::format("tensor {} has an impossible piece in the manifest", name));
    auto found = files_.find(file);
    if (found == files_.end()) found = files_.emplace(file, Hdf5File::Open(path)).first;
    const Tensor stored = Tensor::Empty({piece.count}, dtype, MemoryClass::kWorkspace);
    void* data = stored.view().data;
    found->second.Read(name, dtype, {piece.count}, data);
    if (Digest(data, stored.bytes()) != entry.at("digest")) {
      Fail(path,
           fmt::format("tensor {} is not as it was written (digests differ): the file is damaged",
                       name));
    }
    return stored;
  }

 private:
  std::string save_;
  std::map<std::string, Hdf5File> files_;
};

// Runs f, which uses the file system, and names what fails there.
template <class F>
auto Storing(F&& f) {
  try {
    return f();
  } catch (const fs::filesystem_error& e) {
    Fail(e.path1(), e.code().message());
  }
}

}  // namespace

void BeginSave(const std::string& directory, int64_t step, int64_t bytes) {
  CheckFreeSpace(directory, bytes);
  Storing([&] {
    const fs::path partial = Partial(directory, step);
    fs::remove_all(partial);
    fs::create_directory(partial);
  });
}

std::string WritePart(const std::string& directory, int64_t step, int rank,
                      const StateDict& state) {
  json pieces = json::array();
  if (state.empty()) return pieces.dump();
  const fs::path path = Partial(directory, step) / FileOf(rank);
  Hdf5File file = Hdf5File::Create(path);
  for (const StateEntry& entry : state) {
    const Tensor& t = entry.tensor;
    SHOAL_CHECK(t.contiguous(), "checkpoint", "{} is not contiguous", entry.name);
    const Piece piece = PieceOf(entry);
    const void* data = t.view().data;
    file.Write(entry.name, t.dtype(), {piece.count}, data);
    pieces.push_back({{"name", entry.name},
                      {"dtype", Name(t.dtype())},
                      {"shape", ToJson(piece.global)},
                      {"piece",
                       {{"file", FileOf(rank)},
                        {"offset", ToJson(piece.offset)},
                        {"slice", ToJson(piece.slice)},
                        {"begin", piece.begin},
                        {"count", piece.count},
                        {"digest", Digest(data, t.bytes())}}}});
  }
  file.Close();
  Flush(path);
  return pieces.dump();
}

std::string CommitSave(const std::string& directory, const SaveInfo& info,
                       const std::vector<std::string>& parts) {
  const fs::path final_path = fs::path(directory) / Directory(info.step);
  const fs::path partial = Partial(directory, info.step);
  json tensors = json::object();
  for (const std::string& part : parts) {
    for (const json& p : json::parse(part)) {
      json& tensor = tensors[p.at("name").get<std::string>()];
      if (tensor.is_null()) tensor = {{"dtype", p.at("dtype")}, {"shape", p.at("shape")}};
      SHOAL_CHECK(tensor["dtype"] == p.at("dtype") && tensor["shape"] == p.at("shape"),
                  "checkpoint", "the ranks disagree on {}", p.at("name").dump());
      tensor["pieces"].push_back(p.at("piece"));
    }
  }
  json manifest = {{"format", kFormat},
                   {"step", info.step},
                   {"tokens", info.tokens},
                   {"config", info.config},
                   {"data_fingerprint", info.data_fingerprint},
                   {"tensors", tensors}};
  manifest["digest"] = DigestOf(manifest);
  Storing([&] {
    {
      std::ofstream out(partial / kManifest);
      out << manifest.dump(1) << '\n';
      out.flush();
      if (!out)
        Fail(partial / kManifest, fmt::format("cannot be written: {}", std::strerror(errno)));
    }
    Flush(partial / kManifest);
    Flush(partial);
    // An older save of this step steps aside first, so that the name is never without a whole save
    // for longer than between two renames.
    const fs::path old = final_path.string() + ".old";
    fs::remove_all(old);
    if (fs::exists(final_path)) fs::rename(final_path, old);
    fs::rename(partial, final_path);
    Flush(directory);
    fs::remove_all(old);
  });
  return final_path;
}

void AbandonSave(const std::string& directory, int64_t step) {
  std::error_code ignored;
  fs::remove_all(Partial(directory, step), ignored);
}

std::string SaveState(const std::string& directory, const SaveInfo& info, const StateDict& state) {
  try {
    BeginSave(directory, info.step, SaveBytes(state));
    return CommitSave(directory, info, {WritePart(directory, info.step, 0, state)});
  } catch (...) {
    AbandonSave(directory, info.step);
    throw;
  }
}

std::vector<SaveEntry> ListSaves(const std::string& directory) {
  std::vector<SaveEntry> saves;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(directory, error)) {
    const auto step = StepOf(entry.path().filename());
    if (!step) continue;
    int64_t bytes = 0;
    for (const auto& file : fs::directory_iterator(entry.path(), error)) {
      bytes += static_cast<int64_t>(file.file_size(error));
    }
    saves.push_back({entry.path(), *step, bytes});
  }
  std::sort(saves.begin(), saves.end(),
            [](const auto& a, const auto& b) { return a.step > b.step; });
  return saves;
}

SaveInfo ReadSaveInfo(const std::string& save) {
  const json manifest = ReadManifest(save);
  try {
    return {manifest.at("step"), manifest.at("tokens"), manifest.at("config"),
            manifest.at("data_fingerprint")};
  } catch (const json::exception& e) {
    Fail(save + "/" + kManifest, std::string("is damaged: ") + e.what());
  }
}

void LoadState(const std::string& save, const StateDict& state) {
  const json manifest = ReadManifest(save);
  const std::string path = save + "/" + kManifest;
  PartFiles files(save);
  try {
    const json& tensors = manifest.at("tensors");
    for (const StateEntry& entry : state) {
      if (!tensors.contains(entry.name)) Fail(save, fmt::format("holds no tensor {}", entry.name));
      const json& stored = tensors[entry.name];
      const Dims shape = ToDims(path, entry.name, stored.at("shape"));
      if (!(shape == entry.global_shape)) {
        Fail(save, fmt::format("tensor {} has shape {}, the model's is {}", entry.name,
                               shape.ToString(), entry.global_shape.ToString()));
      }
      const DType dtype = DTypeFromName(path, stored.at("dtype"));
      const std::vector<Range> wanted = RangesOf(PieceOf(entry));
      const Tensor whole = Tensor::Empty(entry.tensor.shape(), dtype, MemoryClass::kWorkspace);
      int64_t missing = whole.numel();
      for (const json& p : stored.at("pieces")) {
        const Piece piece = ToPiece(path, entry.name, shape, p);
        const std::vector<Range> held = RangesOf(piece);
        const bool apart = wanted.empty() || held.empty() ||
                           wanted.front().global >= held.back().global + held.back().count ||
                           held.front().global >= wanted.back().global + wanted.back().count;
        if (apart) continue;
        const Tensor data = files.Read(entry.name, dtype, piece, p);
        missing -= CopyOverlap(wanted, whole.view().as<char>(), held, data.view().as<const char>(),
                               SizeOf(dtype));
      }
      if (missing != 0)
        Fail(save, fmt::format("holds only a part of tensor {}: it is damaged", entry.name));
      entry.tensor.CopyFrom(whole);
    }
  } catch (const json::exception& e) {
    Fail(path, std::string("is damaged: ") + e.what());
  }
}

void VerifySave(const std::string& save) {
  const json manifest = ReadManifest(save);
  const std::string path = save + "/" + kManifest;
  PartFiles files(save);
  try {
    for (const auto& [name, stored] : manifest.at("tensors").items()) {
      const Dims shape = ToDims(path, name, stored.at("shape"));
      int64_t missing = shape.numel();
      for (const json& p : stored.at("pieces")) {
        const Piece piece = ToPiece(path, name, shape, p);
        files.Read(name, DTypeFromName(path, stored.at("dtype")), piece, p);
        missing -= piece.count;
      }
      if (missing != 0) Fail(save, fmt::format("holds only a part of tensor {}", name));
    }
  } catch (const json::exception& e) {
    Fail(path, std::string("is damaged: ") + e.what());
  }
}

std::vector<StoredTensor> ListTensors(const std::string& save) {
  const json manifest = ReadManifest(save);
  const std::string path = save + "/" + kManifest;
  std::vector<StoredTensor> list;
  try {
    for (const auto& [name, stored] : manifest.at("tensors").items())
      list.push_back(
          {name, DTypeFromName(path, stored.at("dtype")), ToDims(path, name, stored.at("shape"))});
  } catch (const json::exception& e) {
    Fail(path, std::string("is damaged: ") + e.what());
  }
  return list;
}

void PruneSaves(const std::string& directory, int64_t keep) {
  const std::vector<SaveEntry> saves = ListSaves(directory);
  for (size_t i = static_cast<size_t>(std::max<int64_t>(keep, 1)); i < saves.size(); ++i) {
    // Out of its name first: a save that is half deleted must not look like a save.
    const std::string doomed = saves[i].path + ".old";
    std::error_code error;
    fs::remove_all(doomed, error);
    fs::rename(saves[i].path, doomed, error);
    if (!error) fs::remove_all(doomed, error);
  }
}

void CheckFreeSpace(const std::string& directory, int64_t bytes) {
  struct statvfs info;
  if (statvfs(directory.c_str(), &info) != 0) Fail(directory, std::strerror(errno));
  rlimit limit;
  if (getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur < static_cast<rlim_t>(bytes)) {
    Fail(directory,
         fmt::format("a save takes {:.1f} MB and this process may write files of {:.1f} "
                     "MB at most; raise the limit (ulimit -f)",
                     static_cast<double>(bytes) / 1e6, static_cast<double>(limit.rlim_cur) / 1e6));
  }
  const auto free_bytes = static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize);
  if (free_bytes < bytes) {
    Fail(directory,
         fmt::format(
             "a save takes {:.1f} MB and {:.1f} MB are free; make room, or set run.dir elsewhere",
             static_cast<double>(bytes) / 1e6, static_cast<double>(free_bytes) / 1e6));
  }
}

int64_t SaveBytes(const StateDict& state) {
  int64_t bytes = 0;
  for (const StateEntry& entry : state) bytes += static_cast<int64_t>(entry.tensor.bytes()) + 512;
  return bytes;
}

}  // namespace shoal

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

constexpr int kFormat = 1;
constexpr const char* kTensors = "state.h5";
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

// A contiguous host copy to write from, or the tensor itself.
Tensor ForWriting(const Tensor& t) { return t.contiguous() ? t : t.Clone(MemoryClass::kWorkspace); }

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

// Reads one tensor as stored and holds it against its digest.
Tensor ReadTensor(const Hdf5File& file, const std::string& path, const std::string& name,
                  const json& entry) {
  const auto extents = entry.at("shape").get<std::vector<int64_t>>();
  // No tensor is larger than its file: a damaged shape must not ask for memory, nor for a bug's
  // exit code.
  std::error_code error;
  const auto file_bytes = static_cast<int64_t>(fs::file_size(path, error));
  bool whole = extents.size() <= Dims::kMaxRank;
  for (int64_t most = file_bytes; const int64_t extent : extents) {
    whole = whole && extent >= 0 && extent <= most;
    if (whole && extent > 0) most /= extent;
  }
  if (!whole) Fail(path, fmt::format("tensor {} has an impossible shape in the manifest", name));
  Dims shape;
  for (const int64_t extent : extents) shape.push_back(extent);
  const Tensor stored =
      Tensor::Empty(shape, DTypeFromName(path, entry.at("dtype")), MemoryClass::kWorkspace);
  void* data = stored.view().data;
  file.Read(name, stored.dtype(), shape, data);
  if (Digest(data, stored.bytes()) != entry.at("digest")) {
    Fail(path,
         fmt::format("tensor {} is not as it was written (digests differ): the file is damaged",
                     name));
  }
  return stored;
}

}  // namespace

std::string SaveState(const std::string& directory, const SaveInfo& info, const StateDict& state) {
  CheckFreeSpace(directory, SaveBytes(state));
  const fs::path final_path = fs::path(directory) / Directory(info.step);
  const fs::path partial = final_path.string() + ".partial";
  try {
    fs::remove_all(partial);
    fs::create_directory(partial);
    json tensors = json::object();
    {
      Hdf5File file = Hdf5File::Create(partial / kTensors);
      for (const StateEntry& entry : state) {
        SHOAL_CHECK(entry.tensor.shape() == entry.global_shape, "checkpoint",
                    "{} is a slice; saves hold whole tensors", entry.name);
        const Tensor t = ForWriting(entry.tensor);
        const void* data = t.view().data;
        file.Write(entry.name, t.dtype(), t.shape(), data);
        const std::vector<int64_t> shape(t.shape().begin(), t.shape().end());
        tensors[entry.name] = {
            {"dtype", Name(t.dtype())}, {"shape", shape}, {"digest", Digest(data, t.bytes())}};
      }
      file.Close();
    }
    Flush(partial / kTensors);
    json manifest = {{"format", kFormat},
                     {"step", info.step},
                     {"tokens", info.tokens},
                     {"config", info.config},
                     {"data_fingerprint", info.data_fingerprint},
                     {"tensors", tensors}};
    manifest["digest"] = DigestOf(manifest);
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
  } catch (const fs::filesystem_error& e) {
    std::error_code ignored;
    fs::remove_all(partial, ignored);
    Fail(e.path1(), e.code().message());
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(partial, ignored);
    throw;
  }
  return final_path;
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
  const std::string path = save + "/" + kTensors;
  const Hdf5File file = Hdf5File::Open(path);
  try {
    const json& tensors = manifest.at("tensors");
    for (const StateEntry& entry : state) {
      if (!tensors.contains(entry.name)) Fail(path, fmt::format("holds no tensor {}", entry.name));
      const Tensor stored = ReadTensor(file, path, entry.name, tensors[entry.name]);
      if (!(stored.shape() == entry.global_shape)) {
        Fail(path, fmt::format("tensor {} has shape {}, the model's is {}", entry.name,
                               stored.shape().ToString(), entry.global_shape.ToString()));
      }
      Tensor slice = stored;
      for (int i = 0; i < entry.offset.rank(); ++i)
        slice = slice.Narrowed(i, entry.offset[i], entry.tensor.dim(i));
      entry.tensor.CopyFrom(slice);
    }
  } catch (const json::exception& e) {
    Fail(save + "/" + kManifest, std::string("is damaged: ") + e.what());
  }
}

void VerifySave(const std::string& save) {
  const json manifest = ReadManifest(save);
  const std::string path = save + "/" + kTensors;
  const Hdf5File file = Hdf5File::Open(path);
  try {
    for (const auto& [name, entry] : manifest.at("tensors").items())
      ReadTensor(file, path, name, entry);
  } catch (const json::exception& e) {
    Fail(save + "/" + kManifest, std::string("is damaged: ") + e.what());
  }
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

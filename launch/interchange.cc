#include "launch/interchange.h"

#include <fmt/format.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>

#include "checkpoint/masters.h"
#include "checkpoint/safetensors.h"
#include "checkpoint/store.h"
#include "data/file.h"
#include "launch/hugging_face.h"
#include "launch/hugging_face_config.h"
#include "launch/session.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;

// A directory in the making, that is taken away again unless it, or one within it, gets its name.
class NewDirectory {
 public:
  explicit NewDirectory(const std::string& path) {
    fs::path normal = fs::absolute(path).lexically_normal();
    if (!normal.has_filename()) normal = normal.parent_path();
    path_ = normal.string();
    CheckFree();
    made_ = path_ + ".partial-XXXXXX";
    if (mkdtemp(made_.data()) == nullptr) {
      const std::string reason = std::strerror(errno);
      made_.clear();
      Fail(fmt::format("cannot be made: {}", reason));
    }
    const mode_t mask = umask(0);
    umask(mask);
    chmod(made_.c_str(), 0777 & ~mask);  // mkdtemp shuts out the group
  }
  ~NewDirectory() {
    std::error_code ignored;
    fs::remove_all(made_, ignored);
  }
  NewDirectory(const NewDirectory&) = delete;
  NewDirectory& operator=(const NewDirectory&) = delete;

  const std::string& made() const { return made_; }
  std::string parent() const { return fs::path(path_).parent_path().string(); }
  std::string Commit(const std::string& finished) {
    SyncDirectory(finished);
    CheckFree();  // another process may have been faster
    std::error_code error;
    fs::rename(finished, path_, error);
    if (error) Fail(fmt::format("cannot be made: {}", error.message()));
    SyncDirectory(parent());
    return path_;
  }

 private:
  void CheckFree() const {
    std::error_code ignored;
    if (fs::exists(fs::symlink_status(path_, ignored)))
      Fail("is there already, and nothing is overwritten: name another, or remove it");
  }
  [[noreturn]] void Fail(const std::string& what) const {
    SHOAL_FAIL(ErrorKind::kStorage, "checkpoint", "{} {}", path_, what);
  }

  std::string path_, made_;
};

void WriteFile(const std::string& path, std::string_view text) {
  AtomicFile file(path);
  file.Write(text.data(), text.size());
  file.Commit();
}

// Reads the tensors of a save as another dtype and in another's order.
class Exporter {
 public:
  Exporter(SaveReader& save, DType dtype) : save_(save), dtype_(dtype) {}

  SafetensorsWriter::Entry EntryOf(const HuggingFaceTensor& tensor) const {
    return {tensor.name, dtype_, tensor.shape()};
  }
  // As it is to be stored.
  Tensor Read(const HuggingFaceTensor& tensor) const {
    Dims shape = tensor.shape();
    if (tensor.transposed) std::swap(shape[0], shape[1]);
    const Tensor ours = Tensor::Empty(shape, dtype_, MemoryClass::kWorkspace);
    StateDict parts;
    int64_t row = 0;
    for (const HuggingFaceTensor::Part& part : tensor.parts) {
      Dims zero = part.shape;
      for (int d = 0; d < zero.rank(); ++d) zero[d] = 0;
      parts.push_back(
          {"model/" + part.name, ours.Narrowed(0, row, part.shape[0]), part.shape, zero});
      row += part.shape[0];
    }
    // What is stored, or what that was rounded from.
    const std::optional<DType> stored = save_.dtype(parts[0].name);
    if (stored && SizeOf(dtype_) > SizeOf(*stored))
      LoadExact(save_, parts);
    else
      save_.Load(parts);
    return tensor.transposed ? ours.Transposed(0, 1).Clone(MemoryClass::kWorkspace) : ours;
  }

 private:
  SaveReader& save_;
  DType dtype_;
};

// What ends a text, where the vocabulary is known to be this tokenizer's.
std::optional<int64_t> EndOfDocument(const std::string& tokenizer, int64_t vocab) {
  const auto made = MakeTokenizer(tokenizer);
  if (tokenizer == "bytes" && vocab != made->vocab_size()) return std::nullopt;
  return made->end_of_document();
}

}  // namespace

Interchange ExportHuggingFace(const std::string& save, const std::string& out,
                              const ExportOptions& options) {
  SaveReader reader(save);
  const Config config = ParseConfig(reader.info().config, save + "/manifest.json");
  const ModelConfig model = ModelShape(config);
  const std::string tokenizer = options.tokenizer.value_or(config.data.tokenizer);
  Interchange result;
  result.dtype = options.dtype.value_or(ComputeDType(config));
  const std::string config_json =
      HuggingFaceConfigJson(model, result.dtype, EndOfDocument(tokenizer, model.vocab));
  const Exporter exporter(reader, result.dtype);
  // Full files in the order of the model.
  std::vector<std::vector<HuggingFaceTensor>> shards(1);
  int64_t filled = 0, largest = 0;
  for (const HuggingFaceTensor& tensor : HuggingFaceTensors(model)) {
    const int64_t bytes = exporter.EntryOf(tensor).bytes();
    if (filled > 0 && filled + bytes > options.shard_bytes) {
      shards.emplace_back();
      filled = 0;
    }
    shards.back().push_back(tensor);
    filled += bytes;
    largest = std::max(largest, filled);
    result.bytes += bytes;
    ++result.tensors;
  }
  NewDirectory directory(out);
  CheckFreeSpace(directory.parent(), result.bytes, largest);
  nlohmann::ordered_json index = {{"metadata", {{"total_size", result.bytes}}}};
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string file =
        shards.size() == 1 ? "model.safetensors"
                           : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
    std::vector<SafetensorsWriter::Entry> entries;
    for (const HuggingFaceTensor& tensor : shards[i]) entries.push_back(exporter.EntryOf(tensor));
    SafetensorsWriter writer(directory.made() + "/" + file, entries);
    for (const HuggingFaceTensor& tensor : shards[i]) {
      writer.Write(tensor.name, exporter.Read(tensor).view().data);
      index["weight_map"][tensor.name] = file;
    }
    writer.Commit();
    result.files.push_back(file);
  }
  if (shards.size() > 1)
    WriteFile(directory.made() + "/model.safetensors.index.json", index.dump(2) + '\n');
  WriteFile(directory.made() + "/config.json", config_json);
  if (tokenizer != "bytes")
    WriteFile(directory.made() + "/tokenizer.model", FileBytes(tokenizer).text());
  result.path = directory.Commit(directory.made());
  return result;
}

Interchange ImportHuggingFace(const std::string& path, const std::string& out) {
  const HuggingFaceModel theirs(path);
  // What a configuration must have besides the model: it is never run.
  Config config = WeightsConfig(theirs.config(), theirs.tokenizer(), theirs.dtype());
  config.run.dir = out;
  config.run.steps = 1;
  config.data.path = fs::absolute(path);
  config.data.sequence_length = 1;
  config.batch.sequences = 1;
  config.optim.name = "adamw";
  Interchange result;
  result.dtype = ComputeDType(config);
  const auto parameters = BuildModel(theirs.config())->Parameters();
  NewDirectory directory(out);
  constexpr int64_t kPartBytes = 512 << 20;  // of tensors that are held at a time
  const auto total = ParameterCount(theirs.config()) * static_cast<int64_t>(SizeOf(result.dtype));
  CheckFreeSpace(directory.made(), total, std::min<int64_t>(total, 2 * kPartBytes));
  BeginSave(directory.made(), 0);
  std::vector<std::string> parts;
  for (size_t next = 0; next < parameters.size();) {
    StateDict part;
    for (int64_t bytes = 0; next < parameters.size() && bytes < kPartBytes; ++next) {
      const Parameter& p = *parameters[next];
      const Tensor value = Tensor::Empty(p.shape(), result.dtype, MemoryClass::kWorkspace);
      part.push_back({"model/" + p.name(), value, p.shape(), p.offset()});
      bytes += static_cast<int64_t>(value.bytes());
    }
    theirs.Load(part);
    for (const StateEntry& entry : part) result.bytes += static_cast<int64_t>(entry.tensor.bytes());
    result.tensors += static_cast<int64_t>(part.size());
    parts.push_back(WritePart(directory.made(), 0, static_cast<int>(parts.size()), part));
  }
  const std::string save = CommitSave(directory.made(), {0, 0, WriteConfig(config), ""}, parts);
  for (const auto& file : fs::directory_iterator(save))
    if (file.path().extension() == ".h5") result.files.push_back(file.path().filename());
  std::ranges::sort(result.files);
  result.path = directory.Commit(save);
  return result;
}

}  // namespace shoal

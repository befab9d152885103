#include "checkpoint/manifest.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "checkpoint/file_io.h"
#include "core/base/error.h"

namespace shoal {
namespace {

using nlohmann::json;

constexpr int kFormat = 3;
constexpr int64_t kMost = int64_t{1} << 60;

json ToJson(const Dims& dims) { return std::vector<int64_t>(dims.begin(), dims.end()); }

json ToJson(const Part& part) {
  json files = json::object(), tensors = json::object();
  for (const auto& [name, file] : part.files)
    files[name] = {{"bytes", file.bytes}, {"frame", file.frame}};
  for (const auto& [name, tensor] : part.tensors) {
    json pieces = json::array();
    for (const StoredPiece& p : tensor.pieces)
      pieces.push_back({{"file", p.file},
                        {"at", p.at},
                        {"offset", ToJson(p.piece.offset)},
                        {"slice", ToJson(p.piece.slice)},
                        {"begin", p.piece.begin},
                        {"count", p.piece.count},
                        {"digests", p.digests}});
    tensors[name] = {
        {"dtype", Name(tensor.dtype)}, {"shape", ToJson(tensor.shape)}, {"pieces", pieces}};
  }
  return {{"files", files}, {"tensors", tensors}};
}

// Reads what may be damaged: nothing here asks for memory, or indexes, beyond reason.
class Reader {
 public:
  explicit Reader(std::string path) : path_(std::move(path)) {}

  Part PartOf(const json& text) const {
    Part part;
    for (const auto& [name, file] : text.at("files").items()) {
      if (name.find('/') != std::string::npos || name.empty() || name[0] == '.')
        FailFile(path_, fmt::format("names an impossible file {}", name));
      part.files[name] = {Count(file.at("bytes")), file.at("frame")};
    }
    for (const auto& [name, tensor] : text.at("tensors").items()) {
      StoredTensor& t = part.tensors[name];
      t.dtype = DTypeOf(tensor.at("dtype"));
      t.shape = DimsOf(name, tensor.at("shape"));
      for (const json& piece : tensor.at("pieces"))
        t.pieces.push_back(PieceOf(name, t, piece, part.files));
    }
    CheckApart(part);
    return part;
  }

 private:
  int64_t Count(const json& value) const {
    const auto n = value.get<int64_t>();
    if (!value.is_number_integer() || n < 0 || n > kMost)
      FailFile(path_, "holds an impossible number");
    return n;
  }

  DType DTypeOf(const std::string& name) const {
    for (int i = 0; i <= static_cast<int>(DType::kI16); ++i) {
      if (name == Name(static_cast<DType>(i))) return static_cast<DType>(i);
    }
    FailFile(path_, "names an unknown dtype " + name);
  }

  Dims DimsOf(const std::string& name, const json& extents) const {
    int64_t most = kMost;
    Dims dims;
    bool whole = extents.is_array() && extents.size() <= Dims::kMaxRank;
    for (size_t i = 0; whole && i < extents.size(); ++i) {
      const auto v = extents[i].get<int64_t>();
      whole = extents[i].is_number_integer() && v >= 0 && v <= most;
      if (v > 0) most /= v;
      if (whole) dims.push_back(v);
    }
    if (!whole)
      FailFile(path_, fmt::format("tensor {} has an impossible shape in the manifest", name));
    return dims;
  }

  StoredPiece PieceOf(const std::string& name, const StoredTensor& tensor, const json& text,
                      const std::map<std::string, StoredFile>& files) const {
    StoredPiece stored;
    Piece& p = stored.piece;
    p = {tensor.shape, DimsOf(name, text.at("offset")), DimsOf(name, text.at("slice")),
         Count(text.at("begin")), Count(text.at("count"))};
    stored.file = text.at("file");
    stored.at = Count(text.at("at"));
    stored.digests = text.at("digests").get<std::vector<std::string>>();
    const Dims& global = tensor.shape;
    bool inside = p.offset.rank() == global.rank() && p.slice.rank() == global.rank();
    for (int d = 0; inside && d < global.rank(); ++d)
      inside = p.slice[d] <= global[d] && p.offset[d] <= global[d] - p.slice[d];
    inside = inside && p.count <= p.slice.numel() && p.begin <= p.slice.numel() - p.count;
    const auto width = static_cast<int64_t>(SizeOf(tensor.dtype));
    const auto file = files.find(stored.file);
    inside = inside && file != files.end() && p.count <= file->second.bytes / width &&
             stored.at <= file->second.bytes - p.count * width &&
             std::ssize(stored.digests) == (p.count * width + kChunkBytes - 1) / kChunkBytes;
    if (!inside)
      FailFile(path_, fmt::format("tensor {} has an impossible piece in the manifest", name));
    return stored;
  }

  void CheckApart(const Part& part) const {
    for (auto [name, extents] : ExtentsOf(part)) {
      std::sort(extents.begin(), extents.end(),
                [](const Extent& a, const Extent& b) { return a.at < b.at; });
      for (size_t i = 1; i < extents.size(); ++i)
        if (extents[i].at < extents[i - 1].at + extents[i - 1].bytes)
          FailFile(path_, fmt::format("two tensors share bytes of {}", name));
    }
  }

  std::string path_;
};

// Puts `part` into `all`.
void Add(Part& all, Part part) {
  all.files.merge(part.files);
  SHOAL_CHECK(part.files.empty(), "checkpoint", "two parts have a file {}",
              part.files.begin()->first);
  for (auto& [name, tensor] : part.tensors) {
    const auto [found, fresh] = all.tensors.try_emplace(name, tensor);
    if (fresh) continue;
    StoredTensor& whole = found->second;
    SHOAL_CHECK(whole.dtype == tensor.dtype && whole.shape == tensor.shape, "checkpoint",
                "the ranks disagree on {}", name);
    whole.pieces.insert(whole.pieces.end(), tensor.pieces.begin(), tensor.pieces.end());
  }
}

SaveInfo InfoOf(const json& text) {
  SaveInfo info;
  info.step = text.at("step");
  info.tokens = text.at("tokens");
  info.config = text.at("config");
  info.data_fingerprint = text.at("data_fingerprint");
  info.updates = text.at("updates");
  info.data_offset = text.at("data_offset");
  info.epoch = text.at("epoch");
  info.mesh = text.at("mesh").get<std::map<std::string, int64_t>>();
  if (text.contains("validation_loss")) info.validation_loss = text.at("validation_loss");
  return info;
}

}  // namespace

std::optional<int64_t> StepOfName(std::string_view name, std::string_view ending) {
  if (!name.starts_with("step-") || !name.ends_with(ending)) return std::nullopt;
  name = name.substr(5, name.size() - std::min(name.size(), 5 + ending.size()));
  int64_t step = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), step);
  if (name.empty() || error != std::errc() || end != name.data() + name.size()) return std::nullopt;
  return step;
}

Piece PieceOf(const StateEntry& entry) {
  return {entry.global_shape, entry.offset, entry.share ? entry.share->slice : entry.tensor.shape(),
          entry.share ? entry.share->begin : 0, entry.tensor.numel()};
}

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

std::string PartToText(const Part& part) { return ToJson(part).dump(); }

std::string ManifestText(const SaveInfo& info, const std::vector<std::string>& parts) {
  Part all;
  for (const std::string& part : parts) Add(all, Reader("a rank's part").PartOf(json::parse(part)));
  json text = ToJson(all);
  text["format"] = kFormat;
  text["step"] = info.step;
  text["tokens"] = info.tokens;
  text["config"] = info.config;
  text["config_digest"] = Digest(info.config);
  text["data_fingerprint"] = info.data_fingerprint;
  text["updates"] = info.updates;
  text["data_offset"] = info.data_offset;
  text["epoch"] = info.epoch;
  text["mesh"] = info.mesh;
  if (info.validation_loss) text["validation_loss"] = *info.validation_loss;
  text["digest"] = Digest(text.dump());
  return text.dump(1) + '\n';
}

Manifest ReadManifest(const std::string& save) {
  const std::string path = save + "/" + kManifest;
  std::ifstream in(path);
  std::stringstream bytes;
  if (in) bytes << in.rdbuf();
  if (!in) FailFile(path, "cannot be read; this is not a save");
  json text = json::parse(bytes.str(), nullptr, false);
  if (text.is_discarded() || !text.is_object() || !text.contains("format"))
    FailFile(path, "is damaged");
  if (text["format"] != kFormat)
    FailFile(path,
             fmt::format("has format {}, this version reads {}", text["format"].dump(), kFormat));
  // Of a text there is one spelling, so that a byte more or less is noticed too.
  const std::string spelt = text.dump(1) + '\n';
  const json digest = text.value("digest", json());
  text.erase("digest");
  if (digest != Digest(text.dump()) || spelt != bytes.str())
    FailFile(path, "is not as it was written: it is damaged");
  try {
    Manifest manifest = {InfoOf(text), Reader(path).PartOf(text)};
    const auto step = StepOfName(std::filesystem::path(save).filename().string());
    if (step && *step != manifest.info.step)
      FailFile(path,
               fmt::format("is of step {}: its files belong to another save", manifest.info.step));
    return manifest;
  } catch (const json::exception& e) {
    FailFile(path, std::string("is damaged: ") + e.what());
  }
}

std::map<std::string, std::vector<Extent>> ExtentsOf(const Part& part) {
  std::map<std::string, std::vector<Extent>> extents;
  for (const auto& [name, file] : part.files) extents[name];
  for (const auto& [name, tensor] : part.tensors)
    for (const StoredPiece& p : tensor.pieces)
      if (p.piece.count > 0)
        extents[p.file].push_back(
            {p.at, p.piece.count * static_cast<int64_t>(SizeOf(tensor.dtype))});
  return extents;
}

}  // namespace shoal

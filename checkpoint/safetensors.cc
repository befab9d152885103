#include "checkpoint/safetensors.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <utility>

#include "checkpoint/file_io.h"

namespace shoal {
namespace {

using nlohmann::json;

constexpr int64_t kMaxHeader = 100'000'000;  // bytes, by the format
constexpr int64_t kAlignment = 8;            // of the tensors' bytes
constexpr const char* kMetadata = "__metadata__";

struct Type {
  const char* name;
  int64_t width;
  std::optional<DType> dtype;
};
constexpr std::array kTypes = {Type{"F64", 8, DType::kF64},     Type{"F32", 4, DType::kF32},
                               Type{"F16", 2, DType::kF16},     Type{"BF16", 2, DType::kBF16},
                               Type{"I64", 8, DType::kI64},     Type{"I32", 4, DType::kI32},
                               Type{"I8", 1, DType::kI8},       Type{"U8", 1, DType::kU8},
                               Type{"BOOL", 1, std::nullopt},   Type{"I16", 2, DType::kI16},
                               Type{"U16", 2, std::nullopt},    Type{"U32", 4, std::nullopt},
                               Type{"U64", 8, std::nullopt},    Type{"F8_E4M3", 1, std::nullopt},
                               Type{"F8_E5M2", 1, std::nullopt}};

const char* TypeName(DType dtype) {
  return std::ranges::find(kTypes, std::optional(dtype), &Type::dtype)->name;
}

// A name that a file made up, as part of a message.
std::string Shown(std::string name) {
  constexpr size_t kLongest = 200;
  if (name.size() > kLongest) name = name.substr(0, kLongest) + "..";
  for (char& c : name)
    if (static_cast<unsigned char>(c) < ' ') c = '?';
  return '"' + name + '"';
}

// Takes the header as it is parsed, so that neither its depth nor what it repeats costs memory:
// {"__metadata__": {text: text}, name: {"dtype": text, "shape": [n, ..], "data_offsets": [n, n]}}
class HeaderReader : public nlohmann::json_sax<json> {
 public:
  explicit HeaderReader(std::map<std::string, SafetensorsFile::Entry>* entries)
      : entries_(entries) {}

  const std::string& problem() const { return problem_; }

  bool null() override { return Value("null"); }
  bool boolean(bool) override { return Value("a truth value"); }
  bool number_float(double, const std::string&) override { return Value("no whole number"); }
  bool binary(binary_t&) override { return Value("binary data"); }
  bool number_integer(number_integer_t) override { return Value("a negative number"); }
  bool number_unsigned(number_unsigned_t n) override {
    if (depth_ != 3) return Value("a number");
    if (n > static_cast<uint64_t>(INT64_MAX)) return Bad("has a number beyond 2^63 in " + field_);
    if (field_ == "data_offsets") {
      if (numbers_ == 2) return Bad("has more than two data_offsets");
      (numbers_++ == 0 ? entry_->begin : entry_->end) = static_cast<int64_t>(n);
    } else {
      if (numbers_++ == Dims::kMaxRank)
        return Bad(fmt::format("has more than {} dimensions", Dims::kMaxRank));
      entry_->shape.push_back(static_cast<int64_t>(n));
    }
    return true;
  }
  bool string(std::string& text) override {
    if (depth_ == 2 && in_metadata_) return true;
    if (depth_ != 2 || field_ != "dtype") return Value("text");
    const auto* type = std::ranges::find(kTypes, text, &Type::name);
    if (type == kTypes.end()) return Bad("has the unknown dtype " + Shown(text));
    entry_->type = text;
    entry_->dtype = type->dtype;
    width_ = type->width;
    return true;
  }

  bool start_object(size_t) override {
    if (depth_ > 1) return Value("an object");
    ++depth_;
    return true;
  }
  bool key(std::string& key) override {
    if (depth_ == 1) {
      name_ = key;
      in_metadata_ = key == kMetadata;
      if (in_metadata_) return !std::exchange(metadata_seen_, true) || Bad("comes twice");
      if (key.empty()) return Header("has a tensor without a name");
      if (std::ranges::any_of(key, [](unsigned char c) { return c < ' '; }))
        return Bad("has a control character in its name");
      const auto [at, fresh] = entries_->try_emplace(key);
      if (!fresh) return Bad("comes twice");
      entry_ = &at->second;
      fields_ = 0;
      return true;
    }
    field_ = key;
    if (in_metadata_) return true;
    const unsigned bit = key == "dtype" ? 1 : key == "shape" ? 2 : key == "data_offsets" ? 4 : 0;
    if (bit == 0) return Bad("has the unknown field " + Shown(key));
    if ((fields_ & bit) != 0) return Bad("has its " + key + " twice");
    fields_ |= bit;
    return true;
  }
  bool end_object() override {
    if (--depth_ != 1 || in_metadata_) return true;
    if (fields_ != 7) return Bad("lacks its dtype, shape or data_offsets");
    int64_t bytes = width_;
    for (const int64_t n : entry_->shape)
      if (__builtin_mul_overflow(bytes, n, &bytes))
        return Bad(fmt::format("has a shape, {}, beyond 2^63 bytes", entry_->shape.ToString()));
    if (entry_->end < entry_->begin || entry_->end - entry_->begin != bytes)
      return Bad(fmt::format("is {} of shape {}, which is {} bytes, but has those from {} to {}",
                             entry_->type, entry_->shape.ToString(), bytes, entry_->begin,
                             entry_->end));
    return true;
  }
  bool start_array(size_t) override {
    if (depth_ != 2 || in_metadata_ || field_ == "dtype") return Value("a list");
    ++depth_;
    numbers_ = 0;
    return true;
  }
  bool end_array() override {
    --depth_;
    return field_ != "data_offsets" || numbers_ == 2 || Bad("has less than two data_offsets");
  }
  bool parse_error(size_t at, const std::string&, const nlohmann::detail::exception&) override {
    return Header(fmt::format("is no JSON from its byte {} on", at));
  }

 private:
  bool Header(const std::string& what) {
    if (problem_.empty()) problem_ = "the header " + what;
    return false;
  }
  bool Bad(const std::string& what) {
    if (problem_.empty()) problem_ = fmt::format("tensor {} {}", Shown(name_), what);
    return false;
  }
  bool Value(const std::string& what) {
    if (depth_ == 0) return Header("is " + what + " and no object");
    if (depth_ == 1) return Bad("is " + what + " and no object");
    return Bad(fmt::format("has {} in {}", what, Shown(field_)));
  }

  std::map<std::string, SafetensorsFile::Entry>* entries_;
  SafetensorsFile::Entry* entry_ = nullptr;
  std::string problem_, name_, field_;
  bool in_metadata_ = false, metadata_seen_ = false;
  unsigned fields_ = 0;
  int depth_ = 0, numbers_ = 0;
  int64_t width_ = 0;
};

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& path) : path_(path) {
  const File file = File::Open(path_);
  size_ = file.size();
  uint64_t length = 0;
  unsigned char prefix[sizeof(length)];
  const int64_t most = size_ - static_cast<int64_t>(sizeof(prefix));
  if (most < 0) FailFile(path, fmt::format("is cut short: {} bytes hold no header", size_));
  file.Read(prefix, sizeof(prefix), 0);
  for (size_t i = 0; i < sizeof(prefix); ++i) length |= uint64_t{prefix[i]} << (8 * i);
  if (length > static_cast<uint64_t>(std::min(most, kMaxHeader)))
    FailFile(path,
             fmt::format("is cut short, or no safetensors file: it says that its header has {} "
                         "bytes, and could have {}",
                         length, std::min(most, kMaxHeader)));
  std::string header(static_cast<size_t>(length), '\0');
  file.Read(header.data(), static_cast<int64_t>(length), sizeof(prefix));
  data_begin_ = static_cast<int64_t>(sizeof(prefix) + length);
  HeaderReader reader(&entries_);
  if (!header.starts_with('{')) FailFile(path, "the header is no JSON object");
  if (!json::sax_parse(header, &reader)) FailFile(path, reader.problem());
  std::vector<const std::pair<const std::string, Entry>*> order;
  for (const auto& named : entries_) order.push_back(&named);
  std::ranges::sort(order, {}, [](const auto* named) {
    return std::pair(named->second.begin, named->second.end);
  });
  int64_t at = 0;
  for (const auto* named : order) {
    const auto& [name, entry] = *named;
    if (entry.begin != at)
      FailFile(path, fmt::format("tensor {} begins at byte {}, {} at {}", Shown(name), entry.begin,
                                 entry.begin < at ? "inside the one before, which ends"
                                                  : "behind a hole that begins",
                                 at));
    at = entry.end;
  }
  const int64_t data = size_ - data_begin_;
  if (at != data)
    FailFile(path,
             fmt::format("{}: its tensors take {} bytes, and it has {}",
                         at > data ? "is cut short" : "goes on behind its tensors", at, data));
}

int64_t SafetensorsFile::Read(const std::string& name, const Dims& offset, const Dims& shape,
                              void* data) const {
  const auto found = entries_.find(name);
  if (found == entries_.end()) FailFile(path_, fmt::format("holds no tensor {}", name));
  const Entry& entry = found->second;
  if (!entry.dtype)
    FailFile(path_, fmt::format("tensor {} is {}, which Shoal does not have", name, entry.type));
  bool inside = offset.rank() == entry.shape.rank() && shape.rank() == entry.shape.rank();
  for (int d = 0; inside && d < shape.rank(); ++d)
    inside = offset[d] >= 0 && shape[d] >= 0 && offset[d] + shape[d] <= entry.shape[d];
  SHOAL_CHECK(inside, "safetensors", "{}: {} from {} on are not in tensor {} of shape {}", path_,
              shape.ToString(), offset.ToString(), name, entry.shape.ToString());
  const auto width = static_cast<int64_t>(SizeOf(*entry.dtype));
  const int64_t bytes = shape.numel() * width;
  if (bytes == 0) return 0;
  const File file = File::Open(path_);
  if (file.size() != size_) FailFile(path_, "has changed since it was opened");
  // Dimensions below `outer` count runs; what is above lies in one piece.
  int outer = shape.rank();
  int64_t run = width;
  while (outer > 0) {
    run *= shape[--outer];
    if (shape[outer] != entry.shape[outer]) break;
  }
  const Dims strides = entry.shape.RowMajorStrides();
  for (int64_t i = 0; i < bytes / run; ++i) {
    int64_t at = 0, left = i;
    for (int d = shape.rank() - 1; d >= 0; --d) {
      int64_t index = offset[d];
      if (d < outer) {
        index += left % shape[d];
        left /= shape[d];
      }
      at += index * strides[d];
    }
    file.Read(static_cast<char*>(data) + i * run, run, data_begin_ + entry.begin + at * width);
  }
  return bytes;
}

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::vector<Entry> entries)
    : file_(path), entries_(std::move(entries)) {
  nlohmann::ordered_json header;
  header[kMetadata] = {{"format", "pt"}};  // as the published loaders demand
  int64_t at = 0;
  for (const Entry& entry : entries_) {
    const int64_t begin = std::exchange(at, at + entry.bytes());
    header[entry.name] = {{"dtype", TypeName(entry.dtype)},
                          {"shape", std::vector<int64_t>(entry.shape.begin(), entry.shape.end())},
                          {"data_offsets", {begin, at}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + kAlignment - 1) / kAlignment * kAlignment, ' ');
  unsigned char prefix[8];
  for (size_t i = 0; i < sizeof(prefix); ++i)
    prefix[i] = static_cast<unsigned char>(text.size() >> (8 * i));
  file_.Write(prefix, sizeof(prefix));
  file_.Write(text.data(), text.size());
}

void SafetensorsWriter::Write(const std::string& name, const void* data) {
  SHOAL_CHECK(next_ < entries_.size() && entries_[next_].name == name, "safetensors",
              "{} is not the tensor to be written now", name);
  file_.Write(data, static_cast<size_t>(entries_[next_++].bytes()));
}

void SafetensorsWriter::Commit() {
  SHOAL_CHECK(next_ == entries_.size(), "safetensors", "{} has not been written",
              entries_[next_].name);
  file_.Commit();
}

}  // namespace shoal

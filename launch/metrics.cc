#include "launch/metrics.h"

#include <fmt/format.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "core/base/error.h"
#include "data/file.h"

namespace shoal {
namespace {

using json = nlohmann::ordered_json;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::string Float(double value) {
  if (std::isnan(value)) return "\"NaN\"";
  if (std::isinf(value)) return value > 0 ? "\"Infinity\"" : "\"-Infinity\"";
  return ExactFloat(value);
}

double FloatOf(const json& value) {
  if (value.is_string()) {
    const std::string& text = value.get_ref<const std::string&>();
    if (text == "NaN") return std::numeric_limits<double>::quiet_NaN();
    if (text == "Infinity") return kInfinity;
    if (text == "-Infinity") return -kInfinity;
  }
  return value.get<double>();
}

std::string Object(const NamedBytes& values) {
  std::string text = "{";
  for (const auto& [name, bytes] : values)
    text += fmt::format("{}\"{}\": {}", text.size() > 1 ? ", " : "", name, bytes);
  return text + "}";
}

NamedBytes BytesOf(const json& object) {
  NamedBytes out;
  for (const auto& [name, bytes] : object.get_ref<const json::object_t&>())
    out.emplace_back(name, bytes.get<int64_t>());
  return out;
}

// Calls f(line, whole) for every line of the file; the last may lack its end.
template <class F>
void ForEachLine(std::string_view text, F&& f) {
  while (!text.empty()) {
    const size_t end = text.find('\n');
    f(text.substr(0, end), end != std::string_view::npos);
    if (end == std::string_view::npos) return;
    text.remove_prefix(end + 1);
  }
}

FileBytes ReadWhole(const std::string& path) {
  try {
    return FileBytes(path);
  } catch (const Error& e) {
    SHOAL_FAIL(ErrorKind::kStorage, "metrics", "{}", e.message());
  }
}

}  // namespace

std::string ExactFloat(double value) {
  std::string text = fmt::format("{}", value);
  if (text.find_first_of(".e") == std::string::npos) text += ".0";
  return text;
}

std::string ToJsonLine(const StepMetrics& m) {
  std::string line = fmt::format(
      "{{\"step\": {}, \"loss\": {}, \"grad_norm\": {}, \"lr\": {}, \"tokens\": {}, \"seconds\": "
      "{}, "
      "\"tokens_per_second\": {}, \"peak_bytes\": {}, \"wire_bytes\": {}, \"host_gap_seconds\": {}",
      m.step, Float(m.loss), Float(m.grad_norm), Float(m.lr), m.tokens, Float(m.seconds),
      Float(m.tokens_per_second), Object(m.peak_bytes), Object(m.wire_bytes),
      Float(m.host_gap_seconds));
  if (m.validation_loss)
    line += fmt::format(", \"validation_loss\": {}", Float(*m.validation_loss));
  if (m.skipped) line += ", \"skipped\": true";
  return line + "}";
}

std::optional<StepMetrics> ParseMetrics(std::string_view line) {
  try {
    const json object = json::parse(line);
    StepMetrics m;
    m.step = object.at("step").get<int64_t>();
    m.loss = FloatOf(object.at("loss"));
    m.grad_norm = FloatOf(object.at("grad_norm"));
    m.lr = FloatOf(object.at("lr"));
    m.tokens = object.at("tokens").get<int64_t>();
    m.seconds = FloatOf(object.at("seconds"));
    m.tokens_per_second = FloatOf(object.at("tokens_per_second"));
    m.peak_bytes = BytesOf(object.at("peak_bytes"));
    m.wire_bytes = BytesOf(object.at("wire_bytes"));
    m.host_gap_seconds = FloatOf(object.at("host_gap_seconds"));
    if (object.contains("validation_loss"))
      m.validation_loss = FloatOf(object.at("validation_loss"));
    m.skipped = object.value("skipped", false);
    return m;
  } catch (const json::exception&) {
    return std::nullopt;
  }
}

MetricsWriter::MetricsWriter(const std::string& path, FullDisk full_disk)
    : file_(File::OpenToAppend(path)), full_disk_(std::move(full_disk)) {}

void MetricsWriter::Write(const StepMetrics& metrics) {
  const std::string line = ToJsonLine(metrics) + "\n";
  file_.Append(line.data(), std::ssize(line), full_disk_);
}

void MetricsWriter::Sync() { file_.Flush(); }

MetricsFile ReadMetrics(const std::string& path) {
  MetricsFile out;
  if (!std::filesystem::exists(path)) return out;
  const FileBytes bytes = ReadWhole(path);
  ForEachLine(bytes.text(), [&](std::string_view line, bool) {
    if (auto metrics = ParseMetrics(line))
      out.steps.push_back(*std::move(metrics));
    else
      ++out.skipped_lines;
  });
  return out;
}

int64_t CutMetrics(const std::string& path, int64_t step) {
  if (!std::filesystem::exists(path)) return 0;
  const FileBytes bytes = ReadWhole(path);
  std::string kept;
  kept.reserve(bytes.text().size());
  int64_t dropped = 0, last = 0;
  ForEachLine(bytes.text(), [&](std::string_view line, bool whole) {
    const auto metrics = whole ? ParseMetrics(line) : std::nullopt;
    if (!metrics || metrics->step > step || metrics->step <= last) {
      ++dropped;
      return;
    }
    last = metrics->step;
    kept.append(line).push_back('\n');
  });
  if (dropped == 0) return 0;
  AtomicFile file(path);
  file.Write(kept.data(), kept.size());
  file.Commit();
  return dropped;
}

}  // namespace shoal

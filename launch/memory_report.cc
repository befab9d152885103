#include "launch/memory_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <map>
#include <nlohmann/json.hpp>

#include "core/base/atomic_file.h"
#include "core/base/html.h"
#include "core/context.h"

namespace shoal {
namespace {

constexpr size_t kLines = 10;

// "blocks.3.mlp.up" -> "blocks.*.mlp.up"
std::string OfAnyBlock(const std::string& path) {
  std::string general;
  for (const char c : path) {
    const bool digit = std::isdigit(static_cast<unsigned char>(c)) != 0;
    if (digit && general.ends_with('*')) continue;
    general += digit && general.ends_with('.') ? '*' : c;
  }
  return general;
}

// "blocks.3.mlp.up" -> "blocks". A bucket may span several: "embed.weight .. blocks.1.norm.weight".
std::string TopLevel(const std::string& path) {
  if (path.empty()) return "elsewhere";
  const std::string first = path.substr(0, path.find('.'));
  const size_t last = path.rfind(' ');
  if (last == std::string::npos || path.substr(last + 1, path.find('.', last) - last - 1) == first)
    return first;
  return "several";
}

std::string What(const BlockLabel& label) {
  if (label.shape.rank() == 0) return "scratch";
  return fmt::format("{} {}", Name(label.dtype), label.shape.ToString());
}

std::span<const MemoryLine> Largest(const MemoryReport& report) {
  return std::span(report.tensors).first(std::min(kLines, report.tensors.size()));
}

std::string Mega(int64_t bytes) { return fmt::format("{:.2f}", static_cast<double>(bytes) / 1e6); }

// Of a table: the heads first.
std::vector<std::vector<std::string>> Rows(const MemoryReport& report) {
  std::vector<std::vector<std::string>> rows = {{"MB", "class", "tensor", "of", "by"}};
  const bool knobs =
      std::ranges::any_of(report.tensors, [](const auto& t) { return !t.knob.empty(); });
  if (knobs) rows[0].emplace_back("smaller with");
  for (const MemoryLine& t : Largest(report)) {
    rows.push_back({Mega(t.bytes), t.memory_class,
                    t.count == 1 ? t.what : fmt::format("{} x {}", t.count, t.what), t.module,
                    t.op + (t.op.empty() || t.pass.empty() ? "" : ", ") + t.pass});
    if (knobs) rows.back().push_back(t.knob.empty() ? "-" : t.knob);
  }
  return rows;
}

}  // namespace

MemoryReport Summarise(std::span<const LiveBlock> live) {
  MemoryReport report;
  std::map<std::string, MemoryLine> lines;
  std::map<std::string, int64_t> modules;
  for (const LiveBlock& block : live) {
    report.bytes += block.bytes;
    const Origin& origin = block.label.origin;
    const std::string path = origin.module ? *origin.module : "";
    modules[TopLevel(path)] += block.bytes;
    MemoryLine line;
    line.memory_class = Name(block.memory_class);
    line.what = What(block.label);
    line.module = OfAnyBlock(path);
    // Parameters are of no op; what a gradient is of says its class.
    line.op = origin.op ? origin.op : "";
    line.pass = Name(origin.pass);
    std::string key = line.Site() + '|' + line.what;
    // Scratch has no shape that would tell sizes apart.
    if (block.label.shape.rank() == 0) key += fmt::format("|{}", block.bytes);
    MemoryLine& same = lines.try_emplace(key, std::move(line)).first->second;
    ++same.count;
    same.bytes += block.bytes;
  }
  for (auto& [key, line] : lines) report.tensors.push_back(std::move(line));
  std::ranges::stable_sort(report.tensors, std::greater{}, &MemoryLine::bytes);
  report.modules.assign(modules.begin(), modules.end());
  std::ranges::stable_sort(report.modules, std::greater{}, [](const auto& m) { return m.second; });
  return report;
}

std::string MemoryText(const MemoryReport& report) {
  if (report.tensors.empty()) return "";
  const auto rows = Rows(report);
  std::string text;
  for (const auto& row : rows) {
    for (size_t c = 0; c < row.size(); ++c) {
      size_t width = 0;
      for (const auto& other : rows) width = std::max(width, other[c].size());
      if (c == 0)
        text += fmt::format("  {:>{}}", row[c], width);
      else
        text += fmt::format("  {:<{}}", row[c], width);
    }
    text.erase(text.find_last_not_of(' ') + 1);
    text += '\n';
  }
  text += "  by module, MB:";
  for (const auto& [module, bytes] : report.modules)
    text += fmt::format("{} {} {}", text.ends_with(':') ? "" : ",", module, Mega(bytes));
  return text + '\n';
}

std::string MemoryHtml(const MemoryReport& report) {
  std::string html = "<table>\n";
  for (const auto& row : Rows(report)) {
    html += "<tr>";
    for (const std::string& cell : row) html += fmt::format("<td>{}</td>", EscapeHtml(cell));
    html += "</tr>\n";
  }
  html += "</table>\n<p class=\"state\">By module, MB:";
  for (const auto& [module, bytes] : report.modules)
    html +=
        fmt::format("{} {} {}", html.ends_with(':') ? "" : ",", EscapeHtml(module), Mega(bytes));
  return html + "</p>\n";
}

void WriteMemoryOfStep(int64_t step, int rank, const std::string& knobs, const std::string& path,
                       const Console& console) {
  Allocator& allocator = *ExecutionContext::Current().allocator();
  const MemoryReport report = Summarise(allocator.AtPeak());
  allocator.WatchPeak(false);
  const std::string text =
      fmt::format("at the peak of rank {} in step {}: {:.1f} MB\n{}{}", rank, step,
                  static_cast<double>(report.bytes) / 1e6, MemoryText(report), knobs);
  try {
    AtomicFile file(path);
    file.Write(text.data(), text.size());
    file.Commit();
    if (rank == 0) console.Alert(fmt::format("memory of step {}: {}", step, path));
  } catch (const Error& e) {
    console.Alert(e.message());
  }
}

void WriteMemory(const MemoryReport& report, nlohmann::ordered_json* plan) {
  (*plan)["peak_rank"] = report.rank;
  auto& tensors = (*plan)["peak_tensors"] = nlohmann::ordered_json::array();
  for (const MemoryLine& t : Largest(report)) {
    tensors.push_back({{"count", t.count},
                       {"bytes", t.bytes},
                       {"class", t.memory_class},
                       {"tensor", t.what},
                       {"module", t.module},
                       {"op", t.op},
                       {"pass", t.pass},
                       {"knob", t.knob}});
  }
  auto& modules = (*plan)["peak_modules"] = nlohmann::ordered_json::object();
  for (const auto& [module, bytes] : report.modules) modules[module] = bytes;
}

MemoryReport ReadMemory(const nlohmann::ordered_json& plan) {
  MemoryReport report;
  try {
    report.rank = plan.at("peak_rank");
    for (const auto& t : plan.at("peak_tensors"))
      report.tensors.push_back({t.at("count"), t.at("bytes"), t.at("class"), t.at("tensor"),
                                t.at("module"), t.at("op"), t.at("pass"), t.at("knob")});
    for (const auto& [module, bytes] : plan.at("peak_modules").items()) {
      report.modules.emplace_back(module, bytes);
      report.bytes += bytes.get<int64_t>();
    }
  } catch (const nlohmann::json::exception&) {
    return {};  // of an older version, or damaged: a report does without
  }
  return report;
}

}  // namespace shoal

#include "launch/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numbers>
#include <sstream>

#include "core/base/error.h"
#include "core/base/html.h"
#include "data/file.h"
#include "launch/chart.h"
#include "launch/config.h"
#include "launch/console.h"
#include "launch/failure.h"
#include "launch/memory_report.h"
#include "launch/metrics.h"
#include "launch/run_directory.h"
#include "launch/timeline.h"

namespace shoal {
namespace {

// Colors are chosen to be told apart by the color-blind and on both backgrounds.
constexpr const char* kStyle = R"(
:root { --page: #ffffff; --card: #f7f7f5; --ink: #1f2328; --quiet: #656d76; --grid: #e4e4e0; --bad: #c4302b;
  --c0: #2563c9; --c1: #d4620a; --c2: #15803d; --c3: #8b46c9; --c4: #b8860b; --c5: #0e8a9c; --c6: #c02672; --c7: #59636e; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --card: #1c2026; --ink: #e7e9ec; --quiet: #98a1ab; --grid: #30363e; --bad: #ff7b72;
    --c0: #6ea8ff; --c1: #f5a15a; --c2: #5fc982; --c3: #c79bf2; --c4: #e3b94f; --c5: #56c7d6; --c6: #f288bb; --c7: #aab3bd; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 24px 48px; max-width: 1180px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 24px; overflow-wrap: anywhere; }
h2 { margin: 32px 0 10px; font-size: 17px; }
.state { margin: 2px 0 18px; color: var(--quiet); }
.state b.bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-bottom: 20px; }
.tile { background: var(--card); border-radius: 8px; padding: 10px 14px; }
.tile span { display: block; color: var(--quiet); font-size: 13px; }
.tile b { display: block; font-size: 22px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 16px; }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: 12px 14px 8px; }
figcaption span { color: var(--quiet); font-size: 13px; margin-left: 6px; }
.legend { min-height: 22px; font-size: 13px; color: var(--quiet); }
.legend span { margin-right: 14px; white-space: nowrap; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 5px; }
.legend em { font-style: normal; color: var(--ink); font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--quiet); font-size: 12px; font-variant-numeric: tabular-nums; }
text.y { text-anchor: end; } text.x { text-anchor: middle; }
line.grid { stroke: var(--grid); } line.axis { stroke: var(--quiet); } line.bad { stroke: var(--bad); stroke-dasharray: 4 3; }
path { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
path.faint { opacity: 0.3; stroke-width: 1; }
path.s0 { stroke: var(--c0); } path.s1 { stroke: var(--c1); } path.s2 { stroke: var(--c2); } path.s3 { stroke: var(--c3); }
path.s4 { stroke: var(--c4); } path.s5 { stroke: var(--c5); } path.s6 { stroke: var(--c6); } path.s7 { stroke: var(--c7); }
i.s0 { background: var(--c0); } i.s1 { background: var(--c1); } i.s2 { background: var(--c2); } i.s3 { background: var(--c3); }
i.s4 { background: var(--c4); } i.s5 { background: var(--c5); } i.s6 { background: var(--c6); } i.s7 { background: var(--c7); }
circle { stroke: var(--card); stroke-width: 1; }
circle.s0 { fill: var(--c0); } circle.s1 { fill: var(--c1); } circle.s2 { fill: var(--c2); } circle.s3 { fill: var(--c3); }
circle.s4 { fill: var(--c4); } circle.s5 { fill: var(--c5); } circle.s6 { fill: var(--c6); } circle.s7 { fill: var(--c7); }
.none { color: var(--quiet); padding: 60px 0; text-align: center; }
table { border-collapse: collapse; width: 100%; }
td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--grid); vertical-align: top; overflow-wrap: anywhere; }
td:first-child { color: var(--quiet); white-space: nowrap; width: 1%; padding-right: 28px; overflow-wrap: normal; }
pre { background: var(--card); border-radius: 8px; padding: 14px 16px; overflow-x: auto; font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
pre.sample { white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--quiet); }
footer { margin-top: 32px; color: var(--quiet); font-size: 13px; }
)";

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

std::string Loss(double value) {
  return std::isfinite(value) ? fmt::format("{:.4f}", value) : "not finite";
}

// 2,457,600
std::string Whole(int64_t value) {
  const std::string digits = fmt::format("{}", value);
  std::string text;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) text += ',';
    text += digits[i];
  }
  return text;
}

// 0.0005, 2e-06: a learning rate without a row of zeros.
std::string Rate(double value) {
  if (value == 0) return "0";
  return std::abs(value) < 1e-4 ? fmt::format("{:.3g}", value) : fmt::format("{:.4g}", value);
}

// A run as its files tell it. Everything may be missing.
struct RunFacts {
  std::string path;
  std::optional<Config> config;
  std::string config_text, config_problem;
  MetricsFile metrics;
  int ranks = 0;
  std::string sample;
  MemoryReport at_peak;  // as planned, of the largest rank

  int64_t steps() const { return metrics.steps.empty() ? 0 : metrics.steps.back().step; }
};

RunFacts ReadRun(const std::string& path) {
  const RunDirectory run = RunDirectory::Attach(path);
  RunFacts facts;
  facts.path = path;
  facts.config_text = ReadFile(run.config_path());
  try {
    facts.config = ParseConfig(facts.config_text, run.config_path());
  } catch (const Error& e) {
    facts.config_problem = e.message();
  }
  facts.metrics = ReadMetrics(run.metrics_path());
  const auto plan = nlohmann::ordered_json::parse(ReadFile(run.plan_path()), nullptr, false);
  if (plan.is_object() && plan.contains("ranks") && plan["ranks"].is_array())
    facts.ranks = static_cast<int>(plan["ranks"].size());
  facts.at_peak = ReadMemory(plan);
  facts.sample = ReadFile(run.sample_path());
  return facts;
}

std::vector<Point> Column(const RunFacts& facts, double StepMetrics::*value) {
  std::vector<Point> points;
  for (const StepMetrics& m : facts.metrics.steps)
    points.push_back({static_cast<double>(m.step), m.*value});
  return points;
}

std::vector<Point> Validations(const RunFacts& facts) {
  std::vector<Point> points;
  for (const StepMetrics& m : facts.metrics.steps)
    if (m.validation_loss) points.push_back({static_cast<double>(m.step), *m.validation_loss});
  return points;
}

// The middle of the measured speeds: the first steps and a stall do not move it.
double MedianSpeed(const RunFacts& facts) {
  std::vector<double> speeds;
  for (const StepMetrics& m : facts.metrics.steps)
    if (std::isfinite(m.tokens_per_second)) speeds.push_back(m.tokens_per_second);
  if (speeds.empty()) return 0;
  std::ranges::nth_element(speeds, speeds.begin() + static_cast<int64_t>(speeds.size() / 2));
  return speeds[speeds.size() / 2];
}

// Of the last twentieth of the steps, as far as they are finite: one step's loss is mostly its
// batch.
double LastLoss(const RunFacts& facts) {
  const auto& steps = facts.metrics.steps;
  double sum = 0, count = 0;
  for (size_t i = steps.size() - std::max<size_t>(1, steps.size() / 20); i < steps.size(); ++i) {
    if (!std::isfinite(steps[i].loss)) continue;
    sum += steps[i].loss;
    ++count;
  }
  return sum / count;
}

double TrainingSeconds(const RunFacts& facts) {
  double sum = 0;
  for (const StepMetrics& m : facts.metrics.steps)
    if (std::isfinite(m.seconds)) sum += m.seconds;
  return sum;
}

int64_t PeakBytes(const StepMetrics& m) {
  for (const auto& [name, bytes] : m.peak_bytes)
    if (name == "peak") return bytes;
  return 0;
}

std::vector<double> BadSteps(const RunFacts& facts) {
  std::vector<double> bad;
  for (const StepMetrics& m : facts.metrics.steps)
    if ((!std::isfinite(m.loss) || !std::isfinite(m.grad_norm)) && bad.size() < 200)
      bad.push_back(static_cast<double>(m.step));
  return bad;
}

// A raw line, behind its own mean where there are enough steps to hide it.
void AddSmoothed(std::vector<Series>* series, const std::string& name, int color,
                 const std::vector<Point>& points) {
  if (points.size() < 60) {
    series->push_back({name, color, Series::kLine, points});
    return;
  }
  series->push_back({name, color, Series::kFaint, points});
  series->push_back({name, color, Series::kLine,
                     Smooth(points, std::max(5, static_cast<int>(points.size() / 60)))});
}

std::string Charts(const RunFacts& facts) {
  const auto planned = facts.config ? static_cast<double>(facts.config->run.steps) : 0.0;
  ChartOptions loss{.title = "Loss",
                    .note = "nats per token",
                    .y_text = Loss,
                    .x_last = planned,
                    .bad = BadSteps(facts)};
  loss.y_text = [](double v) { return fmt::format("{:.3g}", v); };
  std::vector<Series> losses;
  AddSmoothed(&losses, "training", 0, Column(facts, &StepMetrics::loss));
  if (const auto points = Validations(facts); !points.empty())
    losses.push_back({"validation", 1, Series::kDots, points});

  ChartOptions rate{.title = "Learning rate", .y_text = Rate, .from_zero = true, .x_last = planned};
  ChartOptions speed{.title = "Throughput",
                     .note = "tokens per second",
                     .y_text = ShortNumber,
                     .from_zero = true,
                     .x_last = planned};
  std::vector<Series> speeds;
  AddSmoothed(&speeds, "all ranks", 2, Column(facts, &StepMetrics::tokens_per_second));

  ChartOptions memory{.title = "Memory of rank 0",
                      .note = "highest so far",
                      .y_text = ShortBytes,
                      .from_zero = true,
                      .binary = true,
                      .x_last = planned};
  std::vector<Series> classes;
  for (const StepMetrics& m : facts.metrics.steps)
    for (const auto& [name, bytes] : m.peak_bytes) {
      auto it = std::ranges::find(classes, name, &Series::name);
      if (it == classes.end()) {
        // The sum has the color of text; the classes go round the others.
        const int color = name == "peak" ? 7 : static_cast<int>(classes.size() % 7);
        it = classes.insert(it, {name, color, Series::kLine, {}});
      }
      it->points.push_back({static_cast<double>(m.step), static_cast<double>(bytes)});
    }
  std::erase_if(classes, [](const Series& s) {
    return std::ranges::all_of(s.points, [](const Point& p) { return p.y == 0; });
  });
  return "<div class=\"charts\">\n" + DrawChart(loss, losses) +
         DrawChart(rate, {{"", 3, Series::kLine, Column(facts, &StepMetrics::lr)}}) +
         DrawChart(speed, speeds) + DrawChart(memory, classes) + "</div>\n";
}

std::string Tile(const std::string& name, const std::string& value) {
  return fmt::format("<div class=\"tile\"><span>{}</span><b>{}</b></div>\n", EscapeHtml(name),
                     EscapeHtml(value));
}

std::string Tiles(const RunFacts& facts) {
  if (facts.metrics.steps.empty()) return "";
  const StepMetrics& last = facts.metrics.steps.back();
  std::string html = "<div class=\"tiles\">\n" + Tile("training loss", Loss(LastLoss(facts)));
  const std::vector<Point> validations = Validations(facts);
  if (!validations.empty()) {
    html += Tile("validation loss", Loss(validations.back().y));
  }
  html += Tile("tokens seen", ShortNumber(static_cast<double>(last.tokens)));
  html += Tile("tokens per second", ShortNumber(MedianSpeed(facts)));
  html += Tile("peak memory, rank 0", ShortBytes(static_cast<double>(PeakBytes(last))));
  html += Tile("training time", ShortDuration(TrainingSeconds(facts)));
  return html + "</div>\n";
}

std::string State(const RunFacts& facts) {
  const int64_t done = facts.steps();
  const std::string steps = facts.config
                                ? fmt::format("step {} of {}", done, facts.config->run.steps)
                                : fmt::format("step {}", done);
  std::string text;
  if (done == 0)
    text = "No step has been measured yet.";
  else if (!std::isfinite(facts.metrics.steps.back().loss))
    text = fmt::format("<b class=\"bad\">Diverged</b>: the loss is not finite at {}.", steps);
  else if (facts.config && done >= facts.config->run.steps)
    text = fmt::format("Finished: {}.", steps);
  else
    text = fmt::format("Not finished: {}. To go on: shoal resume {}", steps,
                       EscapeHtml(ShellWord(facts.path)));
  if (facts.metrics.skipped_lines > 0)
    text += fmt::format(" {} line{} of metrics.jsonl could not be read.",
                        facts.metrics.skipped_lines, facts.metrics.skipped_lines == 1 ? "" : "s");
  return fmt::format("<p class=\"state\">{}</p>\n", text);
}

std::string Table(const RunFacts& facts) {
  std::string html = "<h2>The run</h2>\n<table>\n";
  const auto row = [&](const std::string& name, const std::string& value) {
    html += fmt::format("<tr><td>{}</td><td>{}</td></tr>\n", EscapeHtml(name), EscapeHtml(value));
  };
  if (facts.config) {
    const Config& c = *facts.config;
    std::string model = c.model.preset.value_or(c.model.family.value_or("model"));
    if (c.model.from) model += " from " + *c.model.from;
    try {
      const ModelConfig shape = ModelShape(c);
      row("Model", fmt::format("{}, {} parameters", model,
                               ShortNumber(static_cast<double>(ParameterCount(shape)))));
      row("Shape", fmt::format("{} layers, d_model {}, {} heads{}, mlp {}, vocabulary {}{}",
                               shape.layers, shape.d_model, shape.heads,
                               shape.kv_heads == shape.heads
                                   ? ""
                                   : fmt::format(" ({} for keys and values)", shape.kv_heads),
                               shape.mlp, shape.vocab, shape.tied ? ", tied head" : ""));
    } catch (const Error&) {
      row("Model", model);
    }
    row("Data", fmt::format("{}, tokenizer {}", c.data.path, c.data.tokenizer));
    row("Batch",
        fmt::format("{} sequences of {} tokens: {} tokens a step", c.batch.sequences,
                    c.data.sequence_length, Whole(c.batch.sequences * c.data.sequence_length)));
    row("Optimizer",
        fmt::format("{}, peak learning rate {}, {} schedule, {} warm-up steps", c.optim.name,
                    Rate(c.optim.lr), c.optim.schedule, c.optim.warmup_steps));
    row("Precision", c.precision.compute);
    row("Seed", fmt::format("{}", c.run.seed));
  }
  if (facts.ranks > 0) row("Ranks", fmt::format("{}", facts.ranks));
  if (!facts.metrics.steps.empty()) {
    const StepMetrics& last = facts.metrics.steps.back();
    row("Steps", fmt::format("{}, on {} tokens, in {}", Whole(last.step), Whole(last.tokens),
                             ShortDuration(TrainingSeconds(facts))));
    row("Training loss", fmt::format("{} (mean of the last twentieth); {} in the last step",
                                     Loss(LastLoss(facts)), Loss(last.loss)));
    const std::vector<Point> validations = Validations(facts);
    if (!validations.empty()) {
      const Point best = *std::ranges::min_element(validations, {}, &Point::y);
      std::string text =
          fmt::format("{} at step {}", Loss(validations.back().y), validations.back().x);
      if (best.x != validations.back().x)
        text += fmt::format("; best {} at step {}", Loss(best.y), best.x);
      if (facts.config && facts.config->data.tokenizer == "bytes")
        text += fmt::format("; {:.3f} bits per byte", validations.back().y / std::numbers::ln2);
      row("Validation loss", text);
    }
    double wire = 0;
    for (const auto& [axis, bytes] : last.wire_bytes) wire += static_cast<double>(bytes);
    row("Sent by rank 0", fmt::format("{} in the last step", ShortBytes(wire)));
  }
  return html + "</table>\n";
}

}  // namespace

std::string RenderReport(const std::string& run) {
  const RunFacts facts = ReadRun(run);
  std::string name = std::filesystem::path(run).lexically_normal().filename().string();
  if (name.empty() || name == ".") name = std::filesystem::absolute(run).parent_path().filename();
  std::string html = fmt::format(
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta "
      "name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{0} - "
      "Shoal</title>\n<style>{1}</style>\n</head>\n<body>\n<h1>{0}</h1>\n",
      EscapeHtml(name), kStyle);
  html += State(facts) + Tiles(facts) + Charts(facts);
  if (!facts.sample.empty())
    html += fmt::format("<h2>A text it wrote</h2>\n<pre class=\"sample\">{}</pre>\n",
                        EscapeHtml(facts.sample));
  html += TimelineHtml(RunDirectory::Attach(run).pipeline_path());
  html += Table(facts);
  if (!facts.at_peak.tensors.empty())
    html += fmt::format("<h2>At the peak of rank {}, as planned: {}</h2>\n{}", facts.at_peak.rank,
                        ShortBytes(static_cast<double>(facts.at_peak.bytes)),
                        MemoryHtml(facts.at_peak));
  if (!facts.config_problem.empty())
    html +=
        fmt::format("<p class=\"state\"><b class=\"bad\">config.toml cannot be read</b>: {}</p>\n",
                    EscapeHtml(facts.config_problem));
  html += fmt::format(
      "<h2>Configuration</h2>\n<details><summary>every key, resolved</summary>\n"
      "<pre>{}</pre></details>\n",
      EscapeHtml(facts.config_text));
  return html +
         "<footer>Made by shoal report from metrics.jsonl and "
         "config.toml.</footer>\n</body>\n</html>\n";
}

int ReportCommand(const std::string& run, const std::string& output, bool json) {
  const std::string page = RenderReport(run);
  const std::string path = output.empty() ? RunDirectory::Attach(run).report_path() : output;
  AtomicFile file(path);
  file.Write(page.data(), page.size());
  file.Commit();
  if (json) {
    const auto steps = ReadMetrics(RunDirectory::Attach(run).metrics_path()).steps;
    const nlohmann::ordered_json object = {{"path", path},
                                           {"steps", steps.empty() ? 0 : steps.back().step}};
    fmt::print("{}\n", object.dump());
  } else {
    fmt::print("{}\n", path);
  }
  return 0;
}

}  // namespace shoal

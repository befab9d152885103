// Pictures of a simulated pipeline; see parallel/pipeline_simulator.h.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/base/html.h"
#include "parallel/pipeline_simulator.h"

namespace shoal {
namespace {

std::string Head(const PipelineSimulation& s) {
  return fmt::format(
      "{}: {} ranks, {} {} each, {} micro-batches; time {:g}, bubble {:.1f} % of {:g}",
      s.schedule.name, s.schedule.ranks, s.schedule.chunks,
      s.schedule.chunks == 1 ? "stage" : "stages", s.schedule.micro_batches, s.makespan,
      100 * s.bubble, *std::ranges::max_element(s.busy));
}

// "3" for a forward pass, "B3", "I3" and "W3" for backward passes and their halves; then a letter
// for the rank's stage if it has several.
std::string Label(const PipelineAction& action, int chunks) {
  std::string label = ActionText({action.op, action.micro_batch, 0}, 1);
  if (action.op == PipelineOp::kForward) label.erase(0, 1);
  if (chunks == 1) return label;
  if (chunks <= 26) return label + static_cast<char>('a' + action.chunk);
  return label + fmt::format(".{}", action.chunk);
}

// Calls f(action, span) for a rank's passes.
template <typename F>
void ForEachPass(const PipelineSimulation& s, size_t rank, const F& f) {
  for (size_t i = 0; i < s.spans[rank].size(); ++i)
    if (!IsMessage(s.schedule.actions[rank][i].op))
      f(s.schedule.actions[rank][i], s.spans[rank][i]);
}

constexpr int kColumns = 1000;  // of text at most

constexpr double kLeft = 60, kTop = 48, kRow = 26, kBar = 22;
constexpr const char* kForwardColor = "#8fb8e8";
constexpr const char* kInputColor = "#f2a65a";
constexpr const char* kWeightColor = "#8fce9b";

std::string Bar(double x, double y, double width, double height, const char* color,
                double opacity) {
  return fmt::format(
      "<rect x=\"{:.2f}\" y=\"{:.0f}\" width=\"{:.2f}\" height=\"{:.0f}\" fill=\"{}\" "
      "fill-opacity=\"{:.2f}\"/>",
      x, y, width, height, color, opacity);
}

// A pass in the row at y: two bars for a whole backward pass.
std::string Pass(const PipelineSimulation& s, int rank, const PipelineAction& action,
                 const PipelineSimulation::Span& span, double y, double scale) {
  // A gap of a pixel tells passes of one kind apart.
  const double x = kLeft + span.start * scale;
  const double width = std::max(0.0, (span.end - span.start) * scale - 1);
  const double opacity = 1 - 0.6 * action.chunk / s.schedule.chunks;
  std::string svg = fmt::format("<g><title>rank {}, {}: {:g} to {:g}</title>", rank,
                                ActionText(action, s.schedule.chunks), span.start, span.end);
  if (action.op == PipelineOp::kBackward) {
    const auto stage = static_cast<size_t>(s.schedule.Stage(rank, action.chunk));
    const double half = std::min(width, s.costs.backward_input[stage] * scale);
    svg += Bar(x, y, half, kBar, kInputColor, opacity) +
           Bar(x + half, y, width - half, kBar, kWeightColor, opacity);
  } else {
    svg += Bar(x, y, width, kBar,
               action.op == PipelineOp::kForward         ? kForwardColor
               : action.op == PipelineOp::kBackwardInput ? kInputColor
                                                         : kWeightColor,
               opacity);
  }
  const std::string label = std::to_string(action.micro_batch);
  if (width > 7 * static_cast<double>(label.size()))
    svg += fmt::format(
        "<text x=\"{:.2f}\" y=\"{:.0f}\" text-anchor=\"middle\" fill=\"#222\">{}</text>",
        x + width / 2, y + 15, label);
  return svg + "</g>\n";
}

}  // namespace

std::string DrawPipelineTimeline(const PipelineSimulation& s) {
  double quantum = std::numeric_limits<double>::infinity();
  size_t width = 0;
  for (size_t r = 0; r < s.spans.size(); ++r)
    ForEachPass(s, r, [&](const PipelineAction& action, const PipelineSimulation::Span& span) {
      if (span.end > span.start) quantum = std::min(quantum, span.end - span.start);
      width = std::max(width, Label(action, s.schedule.chunks).size());
    });
  quantum = std::max(quantum, s.makespan / kColumns);
  const auto column = [&](double time) { return static_cast<size_t>(std::lround(time / quantum)); };

  std::string text = fmt::format("{}; a column is {:g}\n", Head(s), quantum);
  const size_t name_width = std::to_string(s.spans.size() - 1).size();
  for (size_t r = 0; r < s.spans.size(); ++r) {
    std::vector<std::string> cells(column(s.makespan), ".");
    ForEachPass(s, r, [&](const PipelineAction& action, const PipelineSimulation::Span& span) {
      for (size_t c = column(span.start); c < column(span.end); ++c)
        cells[c] = c == column(span.start) ? Label(action, s.schedule.chunks) : "--";
    });
    text += fmt::format("rank {:>{}} |", r, name_width);
    for (const std::string& cell : cells) text += fmt::format(" {:>{}}", cell, width);
    text += fmt::format(" | holds {}\n", s.facts.peak_activations[r]);
  }
  text +=
      "3 forward, B3 backward, I3 and W3 its input and weight halves, -- goes on, . idle;\n"
      "holds: most activations at a time, of one stage and micro-batch";
  if (s.schedule.chunks > 1) text += "; a, b, ...: the rank's stages";
  return text + '\n';
}

std::string DrawPipelineTimelineSvg(const PipelineSimulation& s) {
  // Many micro-batches get a wide picture.
  const double wanted = std::max(1200.0, 24.0 * s.schedule.chunks * s.schedule.micro_batches);
  const double scale = s.makespan > 0 ? wanted / s.makespan : 0;
  std::string svg = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0:.0f} {1:.0f}\" role=\"img\" "
      "font-family=\"sans-serif\" font-size=\"11\" fill=\"currentColor\">\n<title>{2}</title>\n"
      "<text x=\"4\" y=\"16\">{2}</text>\n",
      kLeft + wanted + 10, kTop + kRow * static_cast<double>(s.spans.size()) + 10,
      EscapeHtml(Head(s)));
  double x = kLeft;
  for (const auto& [color, name] :
       {std::pair{kForwardColor, "forward"}, std::pair{kInputColor, "backward: input"},
        std::pair{kWeightColor, "backward: weights"}}) {
    svg += Bar(x, 26, 12, 12, color, 1);
    svg += fmt::format("<text x=\"{:.0f}\" y=\"36\">{}</text>\n", x + 16, name);
    x += 130;
  }
  if (s.schedule.chunks > 1)
    svg += fmt::format("<text x=\"{:.0f}\" y=\"36\">paler: the rank's later stages</text>\n", x);
  for (size_t r = 0; r < s.spans.size(); ++r) {
    const double y = kTop + kRow * static_cast<double>(r);
    svg += fmt::format("<text x=\"4\" y=\"{:.0f}\">rank {}</text>\n", y + 15, r);
    ForEachPass(s, r, [&](const PipelineAction& action, const PipelineSimulation::Span& span) {
      svg += Pass(s, static_cast<int>(r), action, span, y, scale);
    });
  }
  return svg + "</svg>\n";
}

}  // namespace shoal

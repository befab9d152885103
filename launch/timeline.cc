#include "launch/timeline.h"

#include <fstream>
#include <nlohmann/json.hpp>

#include "data/file.h"
#include "launch/plan.h"

namespace shoal {

void WriteTimeline(const TrainingStep& step, const TrainingOptions& options, Communicator& world,
                   const std::string& path) {
  const Mesh& mesh = step.mesh();
  std::string mine;
  if (mesh.data().rank() == 0 && mesh.coordinate(MeshAxis::kTp) == 0) {
    nlohmann::json spans = nlohmann::json::array();
    for (const auto& span : step.pipeline().spans()) spans.push_back({span.start, span.end});
    mine = spans.dump();
  }
  // In the order of the ranks, which is that of the stages.
  const std::vector<std::string> all = world.AllGatherStrings(mine);
  if (world.rank() != 0) return;
  std::vector<std::vector<PipelineSimulation::Span>> spans;
  for (const std::string& text : all) {
    if (text.empty()) continue;
    spans.emplace_back();
    for (const auto& span : nlohmann::json::parse(text)) spans.back().push_back({span[0], span[1]});
  }
  const nlohmann::ordered_json pictures = {
      {"predicted", DrawPipelineTimelineSvg(SimulateStep(options))},
      {"measured",
       DrawPipelineTimelineSvg(MeasuredPipeline(step.pipeline().schedule(), std::move(spans)))}};
  AtomicFile file(path);
  const std::string text = pictures.dump();
  file.Write(text.data(), text.size());
  file.Commit();
}

std::string TimelineHtml(const std::string& path) {
  std::ifstream file(path);
  if (!file) return "";
  const auto pictures = nlohmann::json::parse(file, nullptr, false);
  if (!pictures.is_object() || !pictures.contains("predicted") || !pictures.contains("measured"))
    return "";
  return fmt::format(
      "<h2>The pipeline's last step</h2>\n<p class=\"state\">in seconds</p>\n<figure>{}</figure>\n"
      "<p class=\"state\">as planned, in FLOPs</p>\n<figure>{}</figure>\n",
      pictures["measured"].get<std::string>(), pictures["predicted"].get<std::string>());
}

}  // namespace shoal

// Schedules as text; see parallel/pipeline_schedule.h.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>

#include "core/base/error.h"
#include "parallel/pipeline_schedule.h"

namespace shoal {
namespace {

constexpr std::array<std::string_view, kPipelineOps> kLetters = {"F",  "B",  "I",  "W",
                                                                 "SA", "RA", "SG", "RG"};

std::string_view Trim(std::string_view text) {
  constexpr std::string_view kBlank = " \t\r";
  const size_t begin = text.find_first_not_of(kBlank);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kBlank) - begin + 1);
}

// What comes before the first `separator`, which is taken from `text` with it.
std::string_view Next(std::string_view& text, char separator) {
  const size_t end = text.find(separator);
  const std::string_view head = text.substr(0, end);
  text = end == std::string_view::npos ? std::string_view() : text.substr(end + 1);
  return head;
}

// All of `text` as a count.
std::optional<int> Number(std::string_view text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || text[0] == '-') return {};
  return value;
}

std::optional<PipelineAction> Action(std::string_view text) {
  const size_t digits = std::min(text.find_first_of("0123456789"), text.size());
  const auto letters = std::ranges::find(kLetters, text.substr(0, digits));
  std::string_view rest = text.substr(digits);
  const bool has_chunk = rest.find('.') != std::string_view::npos;
  const std::optional<int> micro_batch = Number(Next(rest, '.'));
  const std::optional<int> chunk = has_chunk ? Number(rest) : 0;
  if (letters == kLetters.end() || !micro_batch || !chunk) return {};
  return PipelineAction{static_cast<PipelineOp>(letters - kLetters.begin()), *micro_batch, *chunk};
}

class Parser {
 public:
  Parser(const std::string& source, int ranks, int chunks, int micro_batches) {
    schedule_.name = source;
    schedule_.ranks = ranks;
    schedule_.chunks = chunks;
    schedule_.micro_batches = micro_batches;
  }

  PipelineSchedule Parse(std::string_view text) {
    while (!text.empty()) {
      std::string_view rest = Next(text, '\n');
      ++line_;
      const std::string_view content = Trim(Next(rest, '#'));
      if (content.find('=') != std::string_view::npos)
        Setting(content);
      else if (!content.empty())
        Rank(content);
    }
    if (std::ssize(schedule_.actions) != schedule_.ranks)
      SHOAL_FAIL(ErrorKind::kConfig, "pipeline",
                 "{} has a line of actions for each of {} ranks, but mesh.pp is {}", schedule_.name,
                 schedule_.actions.size(), schedule_.ranks);
    const auto has_messages = [](const auto& order) {
      return std::ranges::any_of(order, IsMessage, &PipelineAction::op);
    };
    if (std::ranges::none_of(schedule_.actions, has_messages)) InsertMessages(schedule_);
    return std::move(schedule_);
  }

 private:
  using Placement = PipelineSchedule::Placement;

  void Setting(std::string_view content) {
    const std::string_view key = Trim(Next(content, '=')), value = Trim(content);
    if (key != "placement" || (value != "loop" && value != "v"))
      Fail("\"{} = {}\" is no setting; there are \"placement = loop\" and \"placement = v\"", key,
           value);
    if (!schedule_.actions.empty()) Fail("\"placement\" must come before the ranks");
    schedule_.placement = value == "v" ? Placement::kV : Placement::kLoop;
    if (value == "v" && schedule_.chunks != 2)
      Fail(
          "\"placement = v\" needs two stages per rank, but pipeline.virtual_stages is {}: set "
          "that to 2",
          schedule_.chunks);
  }

  void Rank(std::string_view content) {
    std::vector<PipelineAction>& order = schedule_.actions.emplace_back();
    for (bool more = true; more;) {
      more = content.find(',') != std::string_view::npos;
      const std::string_view entry = Trim(Next(content, ','));
      const auto number = order.size() + 1;
      const std::optional<PipelineAction> action = Action(entry);
      if (!action)
        Fail(
            "entry {}, \"{}\", is no action; there are F3 (forward pass of micro-batch 3), B3 "
            "(backward pass), I3 and W3 (its input and weight halves), SA3, RA3, SG3 and RG3 (send "
            "and receive activations and gradients), and F3.1 for the rank's second stage",
            number, entry);
      if (action->micro_batch >= schedule_.micro_batches)
        Fail(
            "entry {}, \"{}\": a step has micro-batches 0 to {}; another batch.micro changes their "
            "number",
            number, entry, schedule_.micro_batches - 1);
      if (action->chunk >= schedule_.chunks)
        Fail("entry {}, \"{}\": a rank has stages 0 to {}; set pipeline.virtual_stages to {}",
             number, entry, schedule_.chunks - 1, action->chunk + 1);
      order.push_back(*action);
    }
  }

  template <typename... Args>
  [[noreturn]] void Fail(fmt::format_string<Args...> format, Args&&... args) const {
    SHOAL_FAIL(ErrorKind::kConfig, "pipeline", "{}, line {}: {}", schedule_.name, line_,
               fmt::format(format, std::forward<Args>(args)...));
  }

  PipelineSchedule schedule_;
  int line_ = 0;
};

}  // namespace

std::string ActionText(const PipelineAction& action, int chunks) {
  const std::string text =
      fmt::format("{}{}", kLetters[static_cast<size_t>(action.op)], action.micro_batch);
  return chunks == 1 ? text : fmt::format("{}.{}", text, action.chunk);
}

std::string WritePipelineSchedule(const PipelineSchedule& schedule, bool messages) {
  // A line end in a file's name must not end the comment.
  std::string name = schedule.name;
  std::ranges::replace(name, '\n', ' ');
  std::string text = fmt::format("# {}: {} ranks of {} stages, {} micro-batches\n", name,
                                 schedule.ranks, schedule.chunks, schedule.micro_batches);
  if (schedule.placement == PipelineSchedule::Placement::kV) text += "placement = v\n";
  for (const auto& order : schedule.actions) {
    std::string line;
    for (const PipelineAction& action : order) {
      if (IsMessage(action.op) && !messages) continue;
      line += (line.empty() ? "" : ", ") + ActionText(action, schedule.chunks);
    }
    text += line + '\n';
  }
  return text;
}

PipelineSchedule ParsePipelineSchedule(std::string_view text, const std::string& source, int ranks,
                                       int chunks, int micro_batches) {
  return Parser(source, ranks, chunks, micro_batches).Parse(text);
}

}  // namespace shoal

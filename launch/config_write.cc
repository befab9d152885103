#include <fmt/format.h>

#include "launch/config_schema.h"
#include "launch/console.h"
#include "launch/metrics.h"

namespace shoal {
namespace {

std::string Quote(const std::string& text) {
  std::string out = "\"";
  for (const unsigned char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c < 0x20 || c == 0x7f) {
      out += fmt::format("\\u{:04X}", c);
    } else {
      out += static_cast<char>(c);
    }
  }
  return out + "\"";
}

std::string Bytes(int64_t bytes) {
  const char* const units[] = {"GiB", "MiB", "KiB"};
  for (int i = 0; i < 3; ++i) {
    const int64_t unit = int64_t{1} << (30 - 10 * i);
    if (bytes % unit == 0) return fmt::format("\"{}{}\"", bytes / unit, units[i]);
  }
  return fmt::format("{}", bytes);
}

// A value as TOML; empty if it has none.
struct ValueText {
  const ConfigKey& key;

  std::string operator()(const std::string* v) const { return Quote(*v); }
  std::string operator()(const int64_t* v) const {
    return key.bytes ? Bytes(*v) : fmt::format("{}", *v);
  }
  std::string operator()(const double* v) const { return ExactFloat(*v); }
  std::string operator()(const bool* v) const { return *v ? "true" : "false"; }
  std::string operator()(const std::array<double, 2>* v) const {
    return fmt::format("[{}, {}]", ExactFloat((*v)[0]), ExactFloat((*v)[1]));
  }
  std::string operator()(const std::vector<int64_t>* v) const {
    return fmt::format("[{}]", fmt::join(*v, ", "));
  }
  template <class T>
  std::string operator()(const std::optional<T>* v) const {
    return *v ? (*this)(&**v) : "";
  }
};

}  // namespace

std::string WriteConfig(const Config& config) {
  Config copy = config;  // the table's fields are mutable
  std::string text = "# The resolved configuration of a run: every key, as given or by default.\n";
  std::string section;
  for (const ConfigKey& key : ConfigSchema()) {
    if (section != key.section) {
      section = key.section;
      text += fmt::format("\n[{}]\n", section);
    }
    const std::string value = std::visit(ValueText{key}, key.field(copy));
    if (value.empty())
      text += fmt::format("{:<32} # {}; left out: {}\n", fmt::format("# {} =", key.name), key.help,
                          key.left_out);
    else
      text += fmt::format("{:<32} # {}\n", fmt::format("{} = {}", key.name, value), key.help);
  }
  return text;
}

std::string ConfigSummary(const Config& config, int64_t ranks, size_t columns) {
  Config copy = config, defaults;
  const ModelConfig shape = ModelShape(config);
  std::string text = fmt::format("{}: {}, {} parameters, {} x {} tokens a step, {}, {} rank{}\n",
                                 config.run.dir, config.model.preset.value_or(shape.family),
                                 ShortNumber(static_cast<double>(ParameterCount(shape))),
                                 config.batch.sequences, config.data.sequence_length,
                                 config.precision.compute, ranks, ranks == 1 ? "" : "s");
  std::string line = "defaults:";
  for (const ConfigKey& key : ConfigSchema()) {
    if (key.required || key.section == std::string_view("model")) continue;
    const std::string value = std::visit(ValueText{key}, key.field(copy));
    if (value != std::visit(ValueText{key}, key.field(defaults))) continue;
    const std::string item =
        fmt::format(" {} {}", key.path(), value.empty() ? key.left_out : value);
    if (line.size() + item.size() >= columns) {
      text += line + "\n";
      line = " ";
    }
    line += item + ",";
  }
  line.back() = '.';
  return text + line;
}

std::string ConfigHelp() {
  Config defaults;
  std::string text;
  std::string section;
  for (const ConfigKey& key : ConfigSchema()) {
    if (section != key.section) {
      section = key.section;
      text += fmt::format("{}[{}]\n", text.empty() ? "" : "\n", section);
    }
    std::string otherwise = "required";
    if (key.left_out)
      otherwise = fmt::format("left out: {}", key.left_out);
    else if (!key.required)
      otherwise = "default " + std::visit(ValueText{key}, key.field(defaults));
    text += fmt::format("  {:<20} {}\n  {:<20}   {}; {}\n", key.name, key.help, "", Allowed(key),
                        otherwise);
  }
  return text;
}

}  // namespace shoal

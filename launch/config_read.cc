// The only file that knows toml++.
#include <fmt/format.h>
#include <toml++/toml.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>

#include "core/base/error.h"
#include "launch/config_schema.h"
#include "launch/suggest.h"

namespace shoal {
std::optional<int64_t> ParseBytes(const std::string& text) {
  static constexpr struct {
    const char* name;
    double factor;
  } kUnits[] = {{"", 1},         {"B", 1},        {"KiB", 0x1p10}, {"MiB", 0x1p20},
                {"GiB", 0x1p30}, {"TiB", 0x1p40}, {"KB", 1e3},     {"kB", 1e3},
                {"MB", 1e6},     {"GB", 1e9},     {"TB", 1e12}};
  size_t digits = 0;
  while (digits < text.size() &&
         (std::isdigit(static_cast<unsigned char>(text[digits])) || text[digits] == '.'))
    ++digits;
  double number = 0;
  try {
    size_t used = 0;
    number = std::stod(text.substr(0, digits), &used);
    if (used != digits) return {};
  } catch (const std::exception&) {
    return {};
  }
  const size_t unit = text.find_first_not_of(' ', digits);
  const std::string name = unit == std::string::npos ? "" : text.substr(unit);
  for (const auto& [unit_name, factor] : kUnits)
    if (name == unit_name) {
      const double bytes = number * factor;
      if (!(bytes >= 1 && bytes <= 0x1p53) || bytes != std::floor(bytes)) return {};
      return static_cast<int64_t>(bytes);
    }
  return {};
}

namespace {

constexpr size_t kMistakesShown = 10;

std::string TypeName(const toml::node& node) {
  switch (node.type()) {
    case toml::node_type::string:
      return "a string";
    case toml::node_type::integer:
      return "an integer";
    case toml::node_type::floating_point:
      return "a number with a point or an exponent";
    case toml::node_type::boolean:
      return "a boolean";
    case toml::node_type::array:
      return "an array";
    case toml::node_type::table:
      return "a table";
    default:
      return "a date or time";
  }
}

// Puts a value into a field. Returns what is wrong with it, as the rest of a sentence that begins
// with the key; empty if nothing is.
class Assign {
 public:
  Assign(const ConfigKey& key, const toml::node& node) : key_(key), node_(node) {}

  std::string operator()(std::string* out) const {
    const auto value = node_.value_exact<std::string>();
    if (!value) return WrongType();
    if (value->empty()) return "is empty";
    if (!key_.choices.empty() && std::ranges::find(key_.choices, *value) == key_.choices.end() &&
        !(key_.suffix && value->ends_with(key_.suffix))) {
      std::string problem = fmt::format("= \"{}\" is not {}", *value, Allowed(key_));
      const std::string near = Nearest(*value, key_.choices);
      return near.empty() ? problem : problem + fmt::format(". Did you mean \"{}\"?", near);
    }
    *out = *value;
    return "";
  }

  std::string operator()(int64_t* out) const {
    std::optional<int64_t> value = node_.value_exact<int64_t>();
    if (!value && key_.bytes && node_.is_string()) {
      value = ParseBytes(*node_.value_exact<std::string>());
      if (!value)
        return fmt::format("= \"{}\" is not {}", *node_.value_exact<std::string>(), Allowed(key_));
    }
    if (!value) {
      const auto number = node_.value_exact<double>();
      if (number && *number == std::floor(*number) && std::abs(*number) < 0x1p53)
        return WrongType() +
               fmt::format(". Write {} without point or exponent", static_cast<int64_t>(*number));
      return WrongType();
    }
    if (const std::string problem = OutOfRange(static_cast<double>(*value)); !problem.empty())
      return problem;
    *out = *value;
    return "";
  }

  std::string operator()(double* out) const { return Number(node_, out); }

  std::string operator()(bool* out) const {
    const auto value = node_.value_exact<bool>();
    if (!value) return WrongType();
    *out = *value;
    return "";
  }

  std::string operator()(std::array<double, 2>* out) const {
    const toml::array* pair = node_.as_array();
    if (!pair) return WrongType();
    if (pair->size() != 2) return fmt::format("has {} values, but takes 2", pair->size());
    std::array<double, 2> values;
    for (size_t i = 0; i < 2; ++i)
      if (const std::string problem = Number(*pair->get(i), &values[i]); !problem.empty())
        return problem;
    *out = values;
    return "";
  }

  std::string operator()(std::vector<int64_t>* out) const {
    const toml::array* list = node_.as_array();
    if (!list) return WrongType();
    for (const toml::node& item : *list) {
      if (!item.is_integer())
        return fmt::format("holds {}, but takes {}", TypeName(item), Allowed(key_));
      out->push_back(*item.value_exact<int64_t>());
      if (std::string problem = OutOfRange(static_cast<double>(out->back())); !problem.empty())
        return problem;
    }
    return out->empty() ? "is empty" : "";
  }

  template <class T>
  std::string operator()(std::optional<T>* out) const {
    T value{};
    std::string problem = (*this)(&value);
    if (problem.empty()) *out = value;
    return problem;
  }

 private:
  std::string WrongType() const {
    return fmt::format("is {}, but takes {}", TypeName(node_), Allowed(key_));
  }

  std::string Number(const toml::node& node, double* out) const {
    if (!node.is_number())
      return fmt::format("{} {}, but takes {}", &node == &node_ ? "is" : "holds", TypeName(node),
                         Allowed(key_));
    const double value = node.is_integer() ? static_cast<double>(*node.value_exact<int64_t>())
                                           : *node.value_exact<double>();
    if (std::string problem = OutOfRange(value); !problem.empty()) return problem;
    *out = value;
    return "";
  }

  // Written so that NaN is out of every range.
  std::string OutOfRange(double value) const {
    if (value >= key_.low && (key_.below ? value < key_.high : value <= key_.high)) return "";
    std::string problem = fmt::format("= {} is out of range: it takes {}", value, Allowed(key_));
    if (value > key_.high) problem += fmt::format(" (at most {})", key_.high);
    return problem;
  }

  const ConfigKey& key_;
  const toml::node& node_;
};

const ConfigKey* FindKey(std::string_view section, std::string_view name) {
  for (const ConfigKey& key : ConfigSchema())
    if (section == key.section && name == key.name) return &key;
  return nullptr;
}

class Reader {
 public:
  explicit Reader(std::string_view source) : source_(source) {}

  void ReadFile(std::string_view text) {
    toml::table root;
    try {
      root = toml::parse(text, std::string(source_));
    } catch (const toml::parse_error& e) {
      mistakes_.push_back(Where(e.source().begin) + std::string(e.description()));
      return;
    }
    for (const auto& [section, node] : root)
      if (const toml::table* table = node.as_table())
        for (const auto& item : *table)
          given_.insert(fmt::format("{}.{}", section.str(), item.first.str()));
    for (const auto& [section, node] : root) {
      if (std::ranges::find(ConfigSections(), section.str()) == ConfigSections().end()) {
        UnknownSection(section, node);
        continue;
      }
      const toml::table* table = node.as_table();
      if (!table) {
        mistakes_.push_back(Where(node.source().begin) +
                            fmt::format("{} is {}, but takes a section [{}] with keys",
                                        section.str(), TypeName(node), section.str()));
        continue;
      }
      for (const auto& [name, value] : *table) {
        const ConfigKey* key = FindKey(section.str(), name.str());
        if (!key) {
          mistakes_.push_back(Where(name.source().begin) + UnknownKey(section.str(), name.str()));
          continue;
        }
        Set(*key, value, Where(value.source().begin));
      }
    }
  }

  void ReadOverride(const std::string& text) {
    const std::string where = fmt::format("command line, {}: ", text);
    const size_t equals = text.find('=');
    std::string path = text.substr(0, equals);
    path.erase(path.find_last_not_of(' ') + 1);
    if (equals == std::string::npos) {
      mistakes_.push_back(where + "an override is written section.key=value");
      return;
    }
    if (!overridden_.insert(path).second) {
      mistakes_.push_back(where + fmt::format("{} is overridden twice", path));
      return;
    }
    const size_t dot = path.find('.');
    const std::string section = path.substr(0, dot);
    const std::string name = dot == std::string::npos ? "" : path.substr(dot + 1);
    const ConfigKey* key = FindKey(section, name);
    if (!key) {
      mistakes_.push_back(where + UnknownKey(section, name));
      return;
    }
    given_.insert(path);
    const std::string value = text.substr(equals + 1);
    const toml::table parsed = ParseValue(value);
    if (const toml::node* node = parsed.get("v"))
      Set(*key, *node, where, !node->is_string());
    else
      Set(*key, toml::value<std::string>(value), where);
  }

  Config Finish() {
    if (mistakes_.empty())
      for (const ConfigKey& key : ConfigSchema())
        if (key.required && !given_.contains(key.path()))
          mistakes_.push_back(fmt::format("{}: {} is required ({}: {}). Add it under [{}]", source_,
                                          key.path(), key.help, Allowed(key), key.section));
    if (mistakes_.empty()) return std::move(config_);
    std::string text;
    for (size_t i = 0; i < std::min(mistakes_.size(), kMistakesShown); ++i)
      text += (i ? "\n" : "") + mistakes_[i];
    if (mistakes_.size() > kMistakesShown)
      text += fmt::format("\nand {} more", mistakes_.size() - kMistakesShown);
    throw Error(ErrorKind::kConfig, "config", text, __FILE__, __LINE__);
  }

 private:
  std::string Where(const toml::source_position& position) const {
    return fmt::format("{}:{}:{}: ", source_, position.line, position.column);
  }

  void Set(const ConfigKey& key, const toml::node& node, const std::string& where,
           bool from_shell = false) {
    std::string problem = std::visit(Assign(key, node), key.field(config_));
    if (problem.empty()) return;
    if (from_shell && std::holds_alternative<std::string*>(key.field(config_)))
      problem += fmt::format(". Quote it twice to make it a string: {}='\"...\"'", key.path());
    mistakes_.push_back(fmt::format("{}{} {}", where, key.path(), problem));
  }

  // The value as {"v": value}; empty if the text is not one TOML value and nothing else.
  static toml::table ParseValue(const std::string& text) {
    static constexpr std::string_view kBefore = "v = ";
    try {
      toml::table table = toml::parse(std::string(kBefore) + text);
      const toml::node* node = table.get("v");
      // A comment or a second line after the value belongs to a bare string.
      const toml::source_position end = node->source().end;
      const std::string_view used(text.data(), text.find_last_not_of(" \t") + 1);
      const auto continues = [](char c) { return (c & 0xc0) == 0x80; };  // columns are code points
      const size_t length = kBefore.size() + used.size() - std::ranges::count_if(used, continues);
      if (table.size() == 1 && end.line == 1 && end.column == length + 1) return table;
    } catch (const toml::parse_error&) {
    }
    return {};
  }

  void UnknownSection(const toml::key& section, const toml::node& node) {
    std::string text = Where(section.source().begin);
    if (node.is_table()) {
      text += fmt::format("unknown section [{}]. ", section.str());
      const std::string near = Nearest(section.str(), ConfigSections());
      if (!near.empty()) text += fmt::format("Did you mean [{}]? ", near);
      text += fmt::format("The sections are {}", fmt::join(ConfigSections(), ", "));
    } else {
      text += UnknownKey("", section.str());
    }
    mistakes_.push_back(text);
  }

  std::string UnknownKey(std::string_view section, std::string_view name) const {
    const std::string path = section.empty()
                                 ? std::string(name)
                                 : fmt::format("{}{}{}", section, name.empty() ? "" : ".", name);
    std::string text = fmt::format("unknown key {}", path);
    if (const ConfigKey* meant = Meant(section, name))
      text +=
          fmt::format(". Did you mean {} ({}: {})?", meant->path(), meant->help, Allowed(*meant));
    else
      text += ". shoal train --help lists all keys";
    return text;
  }

  // The key most likely meant: of the nearest, one that is not given already, and then one that
  // must be given.
  const ConfigKey* Meant(std::string_view section, std::string_view name) const {
    const ConfigKey* best = nullptr;
    int best_score = 0;
    for (const ConfigKey& key : ConfigSchema()) {
      const int away = EditDistance(section, key.section);
      // In another section only the exact name is meant, or all of the path is mistyped a little.
      int distance = EditDistance(name, key.name);
      if (section != key.section && distance > 0) distance += away + 1;
      const std::string_view typed = name.empty() ? section : name;
      if (name.empty()) distance = EditDistance(section, key.name);
      const int longest = static_cast<int>(std::max(typed.size(), std::strlen(key.name)));
      if (distance > std::max(2, longest / 3) || distance >= longest) continue;
      const int score = 8 * distance + 4 * given_.contains(key.path()) +
                        2 * (section != key.section) + !key.required;
      if (!best || score < best_score) {
        best = &key;
        best_score = score;
      }
    }
    return best;
  }

  std::string source_;
  Config config_;
  std::vector<std::string> mistakes_;
  std::set<std::string> given_;
  std::set<std::string> overridden_;
};

void MakeAbsolute(std::string* path) {
  *path = std::filesystem::absolute(*path).lexically_normal().string();
}

}  // namespace

Config ParseConfig(std::string_view toml, std::string_view source_name,
                   const std::vector<std::string>& overrides) {
  Reader reader(source_name);
  reader.ReadFile(toml);
  for (const std::string& text : overrides) reader.ReadOverride(text);
  Config config = reader.Finish();
  ResolveModel(&config, 0);
  MakeAbsolute(&config.data.path);
  if (config.data.tokenizer != "bytes") MakeAbsolute(&config.data.tokenizer);
  if (config.model.from) MakeAbsolute(&*config.model.from);
  if (config.pipeline.schedule.ends_with(".csv")) MakeAbsolute(&config.pipeline.schedule);
  return config;
}

Config LoadConfig(const std::string& path, const std::vector<std::string>& overrides) {
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored))
    SHOAL_FAIL(ErrorKind::kConfig, "config", "{} is a directory, not a configuration file{}", path,
               std::filesystem::exists(path + "/config.toml", ignored)
                   ? fmt::format(". To go on with this run: shoal resume {}", path)
                   : "");
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  if (in) text << in.rdbuf();
  // An empty file sets failbit on `text`; that it lacks the required keys is said later.
  if (!in.is_open() || in.bad())
    SHOAL_FAIL(ErrorKind::kConfig, "config", "cannot read {}: {}", path, std::strerror(errno));
  return ParseConfig(text.str(), path, overrides);
}

bool IsOverride(std::string_view argument) {
  const size_t equals = argument.find('=');
  if (equals == std::string_view::npos || equals == 0) return false;
  return std::ranges::all_of(argument.substr(0, equals), [](unsigned char c) {
    return std::isalnum(c) || c == '_' || c == '.';
  });
}

}  // namespace shoal

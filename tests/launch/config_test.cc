#include "launch/config.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>

#include "core/base/error.h"
#include "launch/config_schema.h"
#include "models/presets.h"
#include "tests/launch/config_mistakes.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TEST(Config, DefaultsAreThoseOfTheContract) {
  const Config c = Minimal();
  EXPECT_EQ(c.zero.stage, 0);
  EXPECT_EQ(c.pipeline.schedule, "1f1b");
  EXPECT_EQ(c.sequence.schedule, "auto");
  EXPECT_EQ(c.run.validate_every, 0);
  EXPECT_EQ(c.checkpoint.every, 0);
  EXPECT_EQ(c.checkpoint.staging, 256 << 20);
  EXPECT_TRUE(c.checkpoint.async);
  EXPECT_EQ(c.mesh.dp, std::nullopt);
  EXPECT_EQ(c.mesh.tp, 1);
  EXPECT_EQ(c.batch.micro, std::nullopt);
  EXPECT_EQ(c.data.tokenizer, "bytes");
  EXPECT_EQ(ModelShape(c), [] {
    ModelConfig shape = *FindPreset("llama-60m");
    shape.context = 2048;
    return shape;
  }());
}

TEST(Config, ShippedConfigsRead) {
  int found = 0;
  for (const auto& entry : std::filesystem::directory_iterator(SHOAL_SOURCE_DIR "/examples")) {
    if (entry.path().extension() != ".toml") continue;
    ++found;
    const Config config = LoadConfig(entry.path());
    EXPECT_EQ(ParseConfig(WriteConfig(config), "resolved"), config) << WriteConfig(config);
  }
  EXPECT_GE(found, 2);
}

TEST(Config, AnyOrderOfOverrides) {
  const Config c = Minimal({"optim.lr=0.25", "run.dir=/tmp/some where", "optim.betas=[0, 0.5]",
                            "run.steps = 7", "memory.budget=6GiB", "checkpoint.async=false",
                            "data.documents=true", "mesh.dp=2", "optim.eps=1"});
  EXPECT_EQ(c.optim.lr, 0.25);
  EXPECT_EQ(c.run.dir, "/tmp/some where");
  EXPECT_EQ(c.optim.betas, (std::array<double, 2>{0, 0.5}));
  EXPECT_EQ(c.run.steps, 7);
  EXPECT_EQ(c.memory.budget, int64_t{6} << 30);
  EXPECT_FALSE(c.checkpoint.async);
  EXPECT_TRUE(c.data.documents);
  EXPECT_EQ(c.mesh.dp, 2);
  EXPECT_EQ(c.optim.eps, 1.0);
}

TEST(Config, OverrideIsTomlOrElseABareString) {
  EXPECT_EQ(Minimal({"run.dir=a#b"}).run.dir, "a#b");
  EXPECT_EQ(Minimal({"run.dir=5#b"}).run.dir, "5#b");
  EXPECT_EQ(Minimal({"run.dir=1\nw = 2"}).run.dir, "1\nw = 2");
  EXPECT_EQ(Minimal({"run.dir='single'"}).run.dir, "single");
  EXPECT_EQ(Minimal({"run.dir=a=b"}).run.dir, "a=b");
  EXPECT_EQ(Minimal({"run.dir=\"2024\""}).run.dir, "2024");
  EXPECT_EQ(Minimal({"run.dir=\"h\u00e9\""}).run.dir, "h\u00e9");
  EXPECT_EQ(Minimal({"run.steps= 12 "}).run.steps, 12);
  EXPECT_THAT(MistakeOf("run.dir=2024"), HasSubstr("Quote it twice"));
  EXPECT_THAT(MistakeOf("run.dir="), HasSubstr("run.dir is empty"));
  EXPECT_THAT(MistakeOf("run.steps="), HasSubstr("run.steps is a string"));
}

TEST(Config, OverrideErrorsNameTheOverride) {
  EXPECT_THAT(MistakeOf("optim.lrr=1"), HasSubstr("command line, optim.lrr=1: unknown key"));
  EXPECT_THAT(MistakeOf("optim.lrr=1"), HasSubstr("Did you mean optim.lr "));
  EXPECT_THAT(MistakeOf("optm.lr=1"), HasSubstr("Did you mean optim.lr "));
  EXPECT_THAT(MistakeOf("lr=1"), HasSubstr("Did you mean optim.lr "));
  EXPECT_THAT(MistakeOf("optim=1"), HasSubstr("unknown key optim"));
  EXPECT_THAT(MistakeOf("run.lr=1"), HasSubstr("Did you mean optim.lr "));
  EXPECT_THAT(MistakeOf("run.steps=ten"), HasSubstr("run.steps is a string"));
  EXPECT_THAT(Mistake([] { Minimal({"run.steps=1", "run.steps=2"}); }), HasSubstr("twice"));
  EXPECT_THAT(MistakeOf("nonsense"), HasSubstr("section.key=value"));
}

TEST(Config, IsOverride) {
  EXPECT_TRUE(IsOverride("a.b=v"));
  EXPECT_TRUE(IsOverride("lr=1"));
  EXPECT_FALSE(IsOverride("config.toml"));
  EXPECT_FALSE(IsOverride("dir/a=b.toml"));
  EXPECT_FALSE(IsOverride("=x"));
}

TEST(Config, ErrorsSayWhere) {
  const std::string text = "[run]\ndir = \"r\"\n  stpes = 10\n";
  EXPECT_THAT(MistakeIn(text), HasSubstr("c.toml:3:3: unknown key run.stpes. Did you mean "
                                         "run.steps (optimizer steps: an integer, 1 or more)?"));
  EXPECT_THAT(MistakeIn("[run]\nsteps = \"x\"\n"),
              HasSubstr("c.toml:2:9: run.steps is a string, but takes an integer, 1 or more"));
  EXPECT_THAT(MistakeIn("[rum]\n"),
              HasSubstr("c.toml:1:2: unknown section [rum]. Did you mean [run]?"));
  EXPECT_THAT(MistakeIn("steps = 5\n"), HasSubstr("Did you mean run.steps"));
  EXPECT_THAT(MistakeIn("run = 5\n"), HasSubstr("takes a section [run]"));
  EXPECT_THAT(MistakeIn("[[run]]\nsteps = 5\n"), HasSubstr("takes a section [run]"));
  EXPECT_THAT(MistakeIn("[run.steps]\na = 5\n"), HasSubstr("run.steps is a table"));
  EXPECT_THAT(MistakeIn("[run]\nsteps = \n"), HasSubstr("c.toml:2:"));
  EXPECT_THAT(MistakeIn("[run]\nsteps = 1\nsteps = 2\n"), HasSubstr("c.toml:3:"));
  EXPECT_THAT(MistakeIn("[run]\nsteps = 1\n[run]\nseed = 2\n"), HasSubstr("c.toml:3:"));
  EXPECT_THAT(MistakeIn("[run]\nsteps = 1e3\n"), HasSubstr("Write 1000 without"));
  EXPECT_THAT(MistakeIn(std::string("\xff\xfe\x00garbage", 10)), HasSubstr("c.toml:1:1"));
}

TEST(Config, AllMistakesAreListedAtOnce) {
  const std::string mistakes = MistakeIn("[run]\nstpes = 1\ndri = 2\n[optim]\nlr = true\n");
  EXPECT_THAT(mistakes, HasSubstr("c.toml:2:1"));
  EXPECT_THAT(mistakes, HasSubstr("c.toml:3:1"));
  EXPECT_THAT(mistakes, HasSubstr("c.toml:5:6"));
}

TEST(Config, RequiredKeys) {
  EXPECT_THAT(MistakeIn(""), HasSubstr("run.dir is required"));
  for (const ConfigKey& key : ConfigSchema()) {
    if (!key.required) continue;
    std::string text = kMinimal;
    size_t line = text.find(std::string("[") + key.section);
    line = text.find(std::string("\n") + key.name + " =", line) + 1;
    text.erase(line, text.find('\n', line) - line);
    EXPECT_THAT(MistakeIn(text), HasSubstr(key.path() + " is required"));
  }
  EXPECT_THAT(MistakeIn(kMinimal + std::string("[model]\n")), HasSubstr("c.toml:"));
}

TEST(Config, ExactlyOneModel) {
  std::string text = kMinimal;
  const std::string preset = "preset = \"llama-60m\"";
  const auto with = [&](const std::string& model) {
    return std::string(text).replace(text.find(preset), preset.size(), model);
  };
  EXPECT_THAT(MistakeIn(with("")), HasSubstr("a model is required"));
  EXPECT_THAT(MistakeIn(with(preset + "\nfamily = \"llama\"")), HasSubstr("exclude each other"));
  EXPECT_THAT(MistakeIn(with(preset + "\nfrom = \"dir\"")), HasSubstr("exclude each other"));
  EXPECT_EQ(MistakeIn(with("from = \"dir\"")), "");
  EXPECT_EQ(MistakeIn(with("family = \"gpt2\"")), "");
}

TEST(Config, WrongTypes) {
  // A value of every TOML type for every key: it is taken or it is a mistake that names the key.
  const std::vector<std::string> values = {"\"text\"",
                                           "3",
                                           "0.5",
                                           "true",
                                           "[1, 2]",
                                           "{a = 1}",
                                           "[]",
                                           "2024-01-01",
                                           "nan",
                                           "-1",
                                           "[true, 2]",
                                           "1e400",
                                           "9223372036854775807"};
  for (const ConfigKey& key : ConfigSchema()) {
    int taken = 0;
    for (const std::string& value : values) {
      const std::string mistake = MistakeOf(key.path() + "=" + value);
      taken += mistake.empty();
      if (!mistake.empty()) {
        EXPECT_THAT(mistake, HasSubstr(key.name)) << key.path() << "=" << value;
      }
    }
    EXPECT_LT(taken, 6) << key.path();
  }
}

TEST(Config, EveryRange) {
  const auto text = [](double v, bool integer) {
    return integer ? fmt::format("{}", static_cast<int64_t>(v)) : fmt::format("{}", v);
  };
  int checked = 0;
  for (const ConfigKey& key : ConfigSchema()) {
    if (key.high == 0 && key.low == 0) continue;
    Config any;
    const ConfigField field = key.field(any);
    const bool list = std::holds_alternative<std::optional<std::vector<int64_t>>*>(field);
    const bool integer = list || std::holds_alternative<int64_t*>(field) ||
                         std::holds_alternative<std::optional<int64_t>*>(field);
    const bool pair = std::holds_alternative<std::array<double, 2>*>(field);
    const auto mistake = [&](double v) {
      std::string value = text(v, integer);
      if (pair) value = fmt::format("[{}, 0.5]", value);
      if (list) value = fmt::format("[{}]", value);
      return MistakeOf(key.path() + "=" + value);
    };
    const auto refused = [&](double v) {
      EXPECT_THAT(mistake(v), HasSubstr("out of range")) << key.path() << " " << v;
    };
    const double less = integer ? 1 : 1e-6, more = integer ? 1 : key.high * 1e-9;
    EXPECT_THAT(mistake(key.low), Not(HasSubstr("out of range"))) << key.path();
    refused(key.low - less);
    EXPECT_THAT(mistake(key.below ? key.high - more : key.high), Not(HasSubstr("out of range")))
        << key.path();
    refused(key.below ? key.high : key.high + more);
    if (!integer) {
      refused(std::numeric_limits<double>::infinity());
      refused(std::nan(""));
    }
    ++checked;
  }
  EXPECT_GT(checked, 35);
}

TEST(Config, Choices) {
  EXPECT_THAT(MistakeOf("optim.name=adam"), HasSubstr("Did you mean \"adamw\"?"));
  EXPECT_THAT(MistakeOf("model.preset=llama-60"), HasSubstr("Did you mean \"llama-60m\"?"));
  EXPECT_THAT(MistakeOf("precision.compute=fp16"),
              HasSubstr("one of \"fp32\", \"bf16\", \"fp64\""));
  EXPECT_EQ(Minimal({"data.tokenizer=/x.model"}).data.tokenizer, "/x.model");
  EXPECT_THAT(MistakeOf("data.tokenizer=byte"), HasSubstr("Did you mean \"bytes\"?"));
  EXPECT_EQ(Minimal({"pipeline.schedule=/a/mine.csv"}).pipeline.schedule, "/a/mine.csv");
  EXPECT_EQ(MistakeOf("optim.warmup_steps=1000"), "");
}

TEST(Config, Bytes) {
  const auto budget = [](const std::string& text) {
    return Minimal({"memory.budget=" + text}).memory.budget;
  };
  EXPECT_EQ(budget("123"), 123);
  EXPECT_EQ(budget("\"123\""), 123);
  EXPECT_EQ(budget("64MiB"), 64 << 20);
  EXPECT_EQ(budget("1.5 GiB"), int64_t{3} << 29);
  EXPECT_EQ(budget("2GB"), 2000000000);
  EXPECT_EQ(budget("10KiB"), 10240);
  for (const char* bad : {"GiB", "6GiBs", "-6GiB", "0", "1.2.3MiB", "1e3", "6 G iB", "0.1B", "1e99",
                          "99999999TiB", ".", "\" 5\"", "inf"})
    EXPECT_THAT(MistakeOf(std::string("memory.budget=") + bad), HasSubstr("memory.budget")) << bad;
}

TEST(Config, ResolvedConfigReadsBackEqual) {
  Config c =
      Minimal({"run.dir=a \"b\" \\ \t", "mesh.dp=3", "batch.micro=2", "memory.budget=1234567",
               "run.validate_sequences=5", "checkpoint.async=false"});
  for (const double lr : {0.1, 1.0 / 3.0, 5e-324, 1e-8, 123456789.123456789, 1e14, 0.0}) {
    c.optim.lr = lr;
    c.optim.betas = {lr < 1 ? lr : 0.5, 0.999999999999};
    EXPECT_EQ(ParseConfig(WriteConfig(c), "resolved"), c) << WriteConfig(c);
  }
  c.run.dir = "\x01\x1f\x7f caf\u00e9 '''\"\"\"\n";
  EXPECT_EQ(ParseConfig(WriteConfig(c), "resolved"), c);
}

TEST(Config, EveryKeyIsWrittenAndHelped) {
  const std::string help = ConfigHelp(), text = WriteConfig(Minimal());
  for (const ConfigKey& key : ConfigSchema()) {
    EXPECT_THAT(help, HasSubstr(std::string("  ") + key.name + " "));
    EXPECT_THAT(text, HasSubstr(std::string(key.name) + " ="));
  }
}

TEST(Config, SummaryTellsTheDefaults) {
  const std::string text = ConfigSummary(Minimal({"run.seed=7", "mesh.tp=2"}), 2);
  EXPECT_THAT(text,
              HasSubstr("r: llama-60m, 58.1M parameters, 8 x 256 tokens a step, fp32, 2 ranks"));
  EXPECT_THAT(text, HasSubstr(" zero.stage 0,"));
  EXPECT_THAT(text, HasSubstr("mesh.dp fills the ranks there are"));
  EXPECT_THAT(text, HasSubstr("checkpoint.staging \"256MiB\","));
  EXPECT_THAT(text, Not(HasSubstr("seed")));
  EXPECT_THAT(text, Not(HasSubstr("mesh.tp")));
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) EXPECT_LE(line.size(), 100);
}

TEST(Config, MissingFile) {
  EXPECT_THAT(Mistake([] { LoadConfig("/nonexistent/c.toml"); }), HasSubstr("No such file"));
  EXPECT_THAT(Mistake([] { LoadConfig("/tmp"); }), HasSubstr("is a directory"));
  EXPECT_THAT(Mistake([] { LoadConfig("/dev/null"); }), HasSubstr("run.dir is required"));
}

// --- every key of every shipped config, mutated

using Edits = std::vector<std::string>;

Edits OneEdit(const std::string& word) {
  static const std::string letters = "abcdefghijklmnopqrstuvwxyz_1";
  Edits out;
  for (size_t i = 0; i <= word.size(); ++i) {
    for (const char c : letters) {
      out.push_back(std::string(word).insert(i, 1, c));
      if (i < word.size() && word[i] != c) {
        std::string changed = word;
        changed[i] = c;
        out.push_back(changed);
      }
    }
    if (i < word.size()) out.push_back(std::string(word).erase(i, 1));
    if (i + 1 < word.size() && word[i] != word[i + 1]) {
      std::string swapped = word;
      std::swap(swapped[i], swapped[i + 1]);
      out.push_back(swapped);
    }
  }
  return out;
}

bool IsKey(const std::string& section, const std::string& name) {
  for (const ConfigKey& key : ConfigSchema())
    if (section == key.section && name == key.name) return true;
  return false;
}

struct Tally {
  int mutants = 0, right = 0;
};

// Puts `mutant` in the place of the word at `begin` and checks the error.
void Check(const std::string& text, size_t begin, const std::string& word,
           const std::string& section, const std::string& mutant, Tally* tally) {
  std::string mutated = std::string(text).replace(begin, word.size(), mutant);
  const std::string mistake = MistakeIn(mutated);
  ++tally->mutants;
  ASSERT_NE(mistake, "") << section << "." << word << " -> " << mutant;
  const std::string meant = section.empty() ? "Did you mean [" + word + "]"
                                            : "Did you mean " + section + "." + word + " ";
  tally->right += mistake.find(meant) != std::string::npos;
}

TEST(Config, MistypedKeysAreCaughtAndExplained) {
  Tally one, two, sections;
  for (const auto& entry : std::filesystem::directory_iterator(SHOAL_SOURCE_DIR "/examples")) {
    if (entry.path().extension() != ".toml") continue;
    std::ifstream in(entry.path());
    std::string text, line, section;
    std::vector<std::array<std::string, 2>> words;  // section and word; an empty section: a header
    std::vector<size_t> begins;
    while (std::getline(in, line)) {
      const size_t equals = line.find(" = ");
      if (line.starts_with("[")) {
        section = line.substr(1, line.find(']') - 1);
        words.push_back({"", section});
        begins.push_back(text.size() + 1);
      } else if (!line.starts_with("#") && equals != std::string::npos) {
        words.push_back({section, line.substr(0, equals)});
        begins.push_back(text.size());
      }
      text += line + "\n";
    }
    for (size_t i = 0; i < words.size(); ++i) {
      const auto& [section, word] = words[i];
      for (const std::string& mutant : OneEdit(word)) {
        if (section.empty()) {
          Check(text, begins[i], word, section, mutant, &sections);
        } else {
          if (IsKey(section, mutant)) continue;  // another key: right by itself
          Check(text, begins[i], word, section, mutant, &one);
        }
        if (HasFatalFailure()) return;
      }
      if (section.empty()) continue;
      // Some of all words at two edits.
      int64_t n = 0;
      for (const std::string& first : OneEdit(word))
        for (const std::string& second : OneEdit(first)) {
          if (++n % 997 != 0 || second == word || IsKey(section, second)) continue;
          Check(text, begins[i], word, section, second, &two);
          if (HasFatalFailure()) return;
        }
    }
  }
  const auto percent = [](const Tally& t) { return 100.0 * t.right / t.mutants; };
  fmt::print(
      "suggested rightly: {:.2f} % of {} keys with one edit, {:.2f} % of {} with two, "
      "{:.2f} % of {} sections with one\n",
      percent(one), one.mutants, percent(two), two.mutants, percent(sections), sections.mutants);
  EXPECT_GT(one.mutants, 5000);
  EXPECT_GE(percent(one), 95);
  EXPECT_GE(percent(two), 95);
  EXPECT_GE(percent(sections), 95);
}

}  // namespace
}  // namespace shoal

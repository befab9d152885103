// The command line of the program. What the commands do is in commands.h.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <iostream>

#include "core/base/build_config.h"
#include "launch/bootstrap.h"
#include "launch/checkpoint_commands.h"
#include "launch/commands.h"
#include "launch/config.h"
#include "launch/console.h"
#include "launch/data_commands.h"
#include "launch/doctor.h"
#include "launch/failure.h"
#include "launch/report.h"
#include "launch/signals.h"
#include "launch/suggest.h"
#include "launch/torture.h"

namespace {

using namespace shoal;  // NOLINT: the program itself

// Splits "CONFIG a.b=v c.d=w" in any order.
ConfigArguments SplitArguments(const std::vector<std::string>& words) {
  ConfigArguments arguments;
  for (const std::string& word : words) {
    if (IsOverride(word)) {
      arguments.overrides.push_back(word);
    } else if (arguments.file.empty()) {
      arguments.file = word;
    } else {
      SHOAL_FAIL(ErrorKind::kConfig, "command line",
                 "two configurations, {} and {}: an override is KEY=VALUE", arguments.file, word);
    }
  }
  if (arguments.file.empty())
    SHOAL_FAIL(ErrorKind::kConfig, "command line", "no configuration file is named");
  return arguments;
}

class Program {
 public:
  Program() {
    app_.require_subcommand(1);
    app_.set_version_flag("--version", std::string("shoal ") + kVersion);
    AddTrain();
    AddResume();
    AddPlan();
    AddVerify();
    AddEval();
    AddGenerate();
    AddCheckpoint();
    AddData();
    AddDoctor();
    AddReport();
    AddTorture();
  }

  int Run(int argc, char** argv) {
    SetFailureContext([&](FailureContext& context) { context.program = argv[0]; });
    ReportFileLimits();
    try {
      app_.parse(argc, argv);
      if (json_) KeepStandardOutputForJson();
      return command_();
    } catch (const CLI::ParseError& e) {
      if (e.get_exit_code() == 0) return DetectLauncher().rank == 0 ? app_.exit(e) : 0;  // --help
      return FailOnAllRanks(Misspelt(e));
    } catch (const Error& e) {
      return FailOnAllRanks(e);
    } catch (const std::exception& e) {
      return PrintError(Error(ErrorKind::kBug, "shoal", e.what(), __FILE__, __LINE__));
    }
  }

 private:
  // What is wrong with the command line, and what may have been meant.
  Error Misspelt(const CLI::ParseError& e) const {
    const CLI::App* command = &app_;
    while (!command->get_subcommands().empty()) command = command->get_subcommands().front();
    std::string text = e.what();
    std::vector<std::string> commands, names;
    for (const CLI::App* sub : command->get_subcommands({})) commands.push_back(sub->get_name());
    for (const CLI::Option* option : command->get_options())
      for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
    names.insert(names.end(), commands.begin(), commands.end());
    if (const std::vector<std::string> words = command->remaining(); !words.empty()) {
      const std::string near = Nearest(words[0].substr(0, words[0].find('=')), names);
      const bool word = !commands.empty() && !words[0].starts_with("-");
      text = word ? "unknown command " + words[0] : words[0] + " is not expected here";
      if (!near.empty()) text += fmt::format(". Did you mean {}?", near);
      if (word) text += fmt::format("\nThe commands are {}", fmt::join(commands, ", "));
    }
    while (text.ends_with('\n')) text.pop_back();
    return Error(ErrorKind::kConfig, "command line",
                 fmt::format("{}\n{} --help says what there is", text, Path(*command)), __FILE__,
                 __LINE__);
  }
  // "shoal data build"
  static std::string Path(const CLI::App& command) {
    const CLI::App* parent = command.get_parent();
    return parent == nullptr ? "shoal" : Path(*parent) + " " + command.get_name();
  }

  // With --json, what train and resume print on standard output.
  int ExitCode(int code) const {
    if (json_ && DetectLauncher().rank == 0)
      std::cout << fmt::format("{{\"exit_code\": {}}}\n", code);
    return code;
  }

  CLI::App* Command(const char* name, const char* what, std::function<int()> run) {
    CLI::App* command = app_.add_subcommand(name, what);
    command->callback([this, run = std::move(run)] { command_ = run; });
    return command;
  }
  void AddRanks(CLI::App* command) {
    command->add_option("--local-ranks", ranks_.local_ranks, "ranks as threads of this process")
        ->capture_default_str();
    command->add_option("--device", ranks_.device, "cpu or cuda")->capture_default_str();
  }
  void AddConfig(CLI::App* command) {
    command->add_option("config", words_, "configuration file (TOML), and overrides a.b=v")
        ->required();
    command->footer("Keys:\n" + ConfigHelp());
  }
  void AddJson(CLI::App* command) {
    command->add_flag("--json", json_, "one JSON object on standard output");
  }

  void AddTrain() {
    CLI::App* c = Command("train", "start a run", [this] {
      const int code = TrainCommand(SplitArguments(words_), ranks_);
      return ExitCode(code);
    });
    AddConfig(c);
    AddRanks(c);
    AddJson(c);
  }
  void AddResume() {
    CLI::App* c = Command("resume", "go on with a run after its newest save", [this] {
      const int code = ResumeCommand(path_, ranks_);
      return ExitCode(code);
    });
    c->add_option("run", path_, "run directory")->required();
    AddRanks(c);
    AddJson(c);
  }
  void AddPlan() {
    CLI::App* c = Command("plan", "what a run would take; starts nothing", [this] {
      return PlanCommand(SplitArguments(words_), plan_ranks_, json_);
    });
    AddConfig(c);
    c->add_option("--ranks", plan_ranks_, "ranks to plan for")->capture_default_str();
    AddJson(c);
  }
  void AddVerify() {
    CLI::App* c = Command("verify", "train many ranks and one side by side, and compare", [this] {
      return VerifyCommand(SplitArguments(words_), plan_ranks_, verify_steps_, json_);
    });
    AddConfig(c);
    c->add_option("--ranks", plan_ranks_, "ranks, as threads")
        ->capture_default_str()
        ->check(CLI::Range(1, 1024));
    c->add_option("--steps", verify_steps_, "steps to compare")
        ->capture_default_str()
        ->check(CLI::PositiveNumber);
    AddJson(c);
  }
  void AddEval() {
    CLI::App* c = Command("eval", "mean loss of a trained model", [this] {
      eval_.json = json_;
      return EvalCommand(eval_, ranks_);
    });
    c->add_option("path", eval_.path, "run directory, save, or Hugging Face directory")->required();
    c->add_option("--data", eval_.data, "text or tokens; left out: what the run held out");
    c->add_option("--tokenizer", eval_.tokenizer, "left out: the run's");
    c->add_option("--sequence-length", eval_.sequence_length, "left out: the run's");
    c->add_option("--precision", eval_.precision, "fp32, bf16 or fp64; left out: the run's");
    c->add_option("--batch", eval_.batch, "sequences per pass")
        ->capture_default_str()
        ->check(CLI::PositiveNumber);
    AddRanks(c);
    AddJson(c);
  }
  void AddGenerate() {
    CLI::App* c = Command("generate", "text from a trained model", [this] {
      generate_.json = json_;
      return GenerateCommand(generate_, ranks_);
    });
    c->add_option("path", generate_.path, "run directory, save, or Hugging Face directory")
        ->required();
    c->add_option("--prompt", generate_.prompt, "the text that it goes on from");
    c->add_option("--tokens", generate_.tokens, "at most so many")
        ->capture_default_str()
        ->check(CLI::NonNegativeNumber);
    c->add_option("--temperature", generate_.temperature, "0: always the likeliest token")
        ->capture_default_str()
        ->check(CLI::NonNegativeNumber);
    c->add_option("--top-k", generate_.top_k, "only of the k likeliest (0: all)")
        ->capture_default_str()
        ->check(CLI::NonNegativeNumber);
    c->add_option("--top-p", generate_.top_p,
                  "only of the likeliest that together have this probability")
        ->capture_default_str()
        ->check(CLI::Range(0.0, 1.0));
    c->add_option("--seed", generate_.seed, "the same seed writes the same text")
        ->capture_default_str();
    c->add_option("--tokenizer", generate_.tokenizer, "left out: the run's");
    c->add_option("--precision", generate_.precision, "fp32, bf16 or fp64; left out: the run's");
    c->add_option("--device", ranks_.device, "cpu or cuda")->capture_default_str();
    AddJson(c);
  }
  void AddCheckpoint() {
    CLI::App* ckpt =
        app_.add_subcommand("ckpt", "look into saves; models from and to Hugging Face directories");
    ckpt->require_subcommand(1);
    const auto add = [&](const char* name, const char* what, std::function<int()> run) {
      CLI::App* command = ckpt->add_subcommand(name, what);
      command->callback([this, run = std::move(run)] { command_ = run; });
      AddJson(command);
      return command;
    };
    CLI::App* c = add("ls", "the saves of a run, newest first, and whether they are whole",
                      [this] { return CkptLsCommand(path_, json_); });
    c->add_option("run", path_, "run directory")->required();
    c = add("verify", "every digest; 73 and the file and tensor if something is damaged",
            [this] { return CkptVerifyCommand(path_, json_); });
    c->add_option("path", path_, "run directory (all of its saves) or save")->required();
    c = add("diff", "two saves tensor by tensor, of any layouts; 1 if they differ",
            [this] { return CkptDiffCommand(path_, output_, json_); });
    c->add_option("a", path_, "run directory (its newest save) or save")->required();
    c->add_option("b", output_, "another")->required();
    c = add("prune", "delete what is older than the newest whole saves, of which two stay",
            [this] { return CkptPruneCommand(path_, keep_, json_); });
    c->add_option("run", path_, "run directory")->required();
    c->add_option("--keep", keep_, "so many whole saves")->required()->check(CLI::PositiveNumber);
    c = add("export", "a Hugging Face directory from a save",
            [this] { return CkptExportCommand(export_, json_); });
    c->add_option("path", export_.path, "run directory (its newest save) or save")->required();
    c->add_option("output", export_.out, "directory to make")->required();
    c->add_option("--dtype", export_.dtype, "bf16, fp32 or fp64; left out: the run's precision")
        ->check(CLI::IsMember({"bf16", "fp32", "fp64"}));
    c->add_option("--tokenizer", export_.tokenizer, "bytes, or x.model; left out: the run's");
    c->add_option("--shard-size", export_.shard_size, "of a file, at most")->capture_default_str();
    c = add("import", "a save of step 0 from a Hugging Face directory",
            [this] { return CkptImportCommand(path_, output_, json_); });
    c->add_option("directory", path_, "Hugging Face directory")->required();
    c->add_option("output", output_, "save to make")->required();
  }
  void AddData() {
    CLI::App* data = app_.add_subcommand("data", "tokenize a corpus, or look into one");
    data->require_subcommand(1);
    CLI::App* build = data->add_subcommand("build", "text to tokens, once for all runs");
    build->add_option("input", build_.input, "text file or directory of text")->required();
    build->add_option("output", build_.output, "x.h5, or the prefix of a pair .bin and .idx")
        ->required();
    build->add_option("--tokenizer", build_.tokenizer, "bytes, or x.model")->capture_default_str();
    build->add_option("--train-vocab", build_.train_vocab,
                      "first train a SentencePiece model of so many pieces");
    build->add_flag("--binary", build_.binary, "take any bytes as text");
    build->add_flag("--overwrite", build_.overwrite, "replace an output that is there");
    AddJson(build);
    build->callback([this] { command_ = [this] { return DataBuildCommand(build_, json_); }; });
    CLI::App* inspect = data->add_subcommand("inspect", "counts and decoded samples of a corpus");
    inspect->add_option("path", path_, "text, x.h5, or the prefix of a pair .bin and .idx")
        ->required();
    inspect->add_option("--tokenizer", tokenizer_, "bytes, or x.model")->capture_default_str();
    AddJson(inspect);
    inspect->callback(
        [this] { command_ = [this] { return DataInspectCommand(path_, tokenizer_, json_); }; });
  }
  void AddDoctor() {
    AddJson(Command("doctor", "what this machine offers, and what would fail later",
                    [this] { return DoctorCommand(json_); }));
  }
  void AddReport() {
    CLI::App* c = Command("report", "a run on one page of HTML",
                          [this] { return ReportCommand(path_, output_, json_); });
    c->add_option("run", path_, "run directory")->required();
    c->add_option("--output", output_, "left out: report.html in the run");
    AddJson(c);
  }
  void AddTorture() {
    CLI::App* c = Command("torture",
                          "kill a copy of a run again and again, fill its disk, flip bits", [this] {
                            torture_.local_ranks = ranks_.local_ranks;
                            torture_.json = json_;
                            return TortureCommand(torture_);
                          });
    c->add_option("run", torture_.run, "run directory; it is only read")->required();
    c->add_option("--kills", torture_.kills, "how often the copy is killed")
        ->capture_default_str()
        ->check(CLI::Range(0, 1000000));
    c->add_option("--flips", torture_.flips, "how many saves are damaged")
        ->capture_default_str()
        ->check(CLI::Range(0, 1000000));
    c->add_option("--seed", torture_.seed, "of when and where")->capture_default_str();
    c->add_option("--local-ranks", ranks_.local_ranks, "ranks as threads of the copy")
        ->capture_default_str()
        ->check(CLI::Range(1, 1024));
    c->add_option("--ranks", torture_.ranks,
                  "ranks as processes under mpirun, of which one or all are killed")
        ->check(CLI::Range(1, 1024));
    AddJson(c);
  }
  CLI::App app_{"Shoal trains large models in little memory, on many ranks."};
  std::function<int()> command_;
  std::vector<std::string> words_;
  std::string path_, output_, tokenizer_ = "bytes";
  RunOptions ranks_;
  EvalOptions eval_;
  GenerateArguments generate_;
  BuildOptions build_;
  CkptExportArguments export_;
  TortureOptions torture_;
  int plan_ranks_ = 1;
  int64_t verify_steps_ = 10, keep_ = 1;
  bool json_ = false;
};

}  // namespace

int main(int argc, char** argv) { return Program().Run(argc, argv); }

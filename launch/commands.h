// The program's commands, behind their parsed options. Each returns an exit code or throws Error.
// Results go to standard output, as text or (json) as one object and nothing else; everything else
// to standard error.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace shoal {

struct RunOptions {
  int local_ranks = 1;         // ranks as threads of this process
  std::string device = "cpu";  // "cpu" or "cuda"
};

struct ConfigArguments {
  std::string file;
  std::vector<std::string> overrides;  // a.b=v
};

int TrainCommand(const ConfigArguments& arguments, const RunOptions& run);
int ResumeCommand(const std::string& run_directory, const RunOptions& run);
int PlanCommand(const ConfigArguments& arguments, int ranks, bool json);
int VerifyCommand(const ConfigArguments& arguments, int ranks, int64_t steps, bool json);

struct EvalOptions {
  std::string path;  // a run, a save or a Hugging Face directory
  std::string data;  // empty: the validation split that the run held out
  std::optional<std::string> tokenizer;
  std::optional<int64_t> sequence_length;
  std::optional<std::string> precision;
  int64_t batch = 8;
  bool json = false;
};
int EvalCommand(const EvalOptions& options, const RunOptions& run);

struct GenerateArguments {
  std::string path;
  std::string prompt;
  int64_t tokens = 200;
  double temperature = 0.8;
  int64_t top_k = 0;
  double top_p = 1;
  uint64_t seed = 0;
  std::optional<std::string> tokenizer, precision;
  bool json = false;
};
int GenerateCommand(const GenerateArguments& arguments, const RunOptions& run);

}  // namespace shoal

#include "launch/commands.h"

#include <fmt/core.h>

#include <algorithm>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>

#include "core/base/thread_count.h"
#include "launch/bootstrap.h"
#include "launch/console.h"
#include "launch/failure.h"
#include "launch/plan.h"
#include "launch/session.h"
#include "launch/signals.h"
#include "launch/trainer.h"
#include "launch/verify.h"
#include "models/generate.h"

namespace shoal {
namespace {

using nlohmann::ordered_json;

// To LoadNewest: one rank speaks for all.
Warn WarnOnce(const Communicator& communicator) {
  return [speaks = communicator.rank() == 0](const std::string& what) {
    if (speaks) WriteToStandardError(fmt::format("shoal: {}\n", what));
  };
}

std::optional<DType> Precision(const std::optional<std::string>& name) {
  if (!name) return std::nullopt;
  if (*name != "fp32" && *name != "bf16" && *name != "fp64") {
    SHOAL_FAIL(ErrorKind::kConfig, "command line", "--precision {} is not fp32, bf16 or fp64",
               *name);
  }
  return ComputeDType(*name);
}

// `wanted`, or what the weights say.
void ChooseTokenizer(const std::optional<std::string>& wanted, const std::string& save,
                     const Communicator& communicator, Config* config) {
  if (wanted) config->data.tokenizer = *wanted;
  std::error_code ignored;
  const bool unread = !wanted && config->data.tokenizer == "bytes" &&
                      std::filesystem::exists(save + "/tokenizer.json", ignored);
  if (unread && communicator.rank() == 0)
    WriteToStandardError(fmt::format(
        "shoal: {}/tokenizer.json is of a kind that this version does not read: text becomes "
        "bytes, unless --tokenizer names a SentencePiece model\n",
        save));
}

double SumLoss(LanguageModel& model, const Batch& batch) {
  const NoGrad no_grad;
  const Dims shape = {batch.count, batch.length};
  SequenceInfo info;
  info.positions = Tensor::From(batch.positions, shape);
  if (!batch.documents.empty()) info.documents = Tensor::From(batch.documents, shape);
  const Tensor hidden = model.Hidden(Tensor::From(batch.tokens, shape), info);
  return model.Loss(hidden, Tensor::From(batch.labels, shape), 1).Item();
}

}  // namespace

int TrainCommand(const ConfigArguments& arguments, const RunOptions& run) {
  InstallSignalHandlers();
  return RunRanks(run, [&](Communicator& communicator) {
    Config config;
    Agree(communicator, [&] { config = LoadConfig(arguments.file, arguments.overrides); });
    return Train(std::move(config), communicator);
  });
}

int ResumeCommand(const std::string& run_directory, const RunOptions& run) {
  InstallSignalHandlers();
  return RunRanks(run,
                  [&](Communicator& communicator) { return Resume(run_directory, communicator); });
}

int PlanCommand(const ConfigArguments& arguments, int ranks, bool json) {
  return RunRanks({}, [&](Communicator& communicator) {
    Config config;
    Plan plan;
    Agree(communicator, [&] {
      if (ranks < 1)
        SHOAL_FAIL(ErrorKind::kConfig, "command line", "--ranks {} is not positive", ranks);
      config = LoadConfig(arguments.file, arguments.overrides);
      CheckSupported(config);
      CheckBatch(config, ranks);
      ResolveFrom(&config);
      // The corpus says how long an epoch is, and the vocabulary where the configuration does not.
      const OpenedData data = OpenData(&config);
      // As ranks share the cores of this machine.
      SetKernelThreads(std::max(1, KernelThreads() / ranks));
      plan = MakePlan(config, MakeTrainingOptions(config, CheckBatch(config, ranks)), ranks);
      plan.steps_per_epoch = data.loader->train_sequences() / config.batch.sequences;
    });
    if (communicator.rank() != 0) return 0;
    if (json) {
      std::cout << PlanJson(plan) << '\n';
    } else {
      std::cout << PlanText(plan, config);
    }
    return 0;
  });
}

int VerifyCommand(const ConfigArguments& arguments, int ranks, int64_t steps, bool json) {
  Config config = LoadConfig(arguments.file, arguments.overrides);
  CheckSupported(config);
  ResolveFrom(&config);
  const Verification result = Verify(config, ranks, steps);
  if (json) {
    std::cout << VerificationJson(result) << '\n';
  } else {
    std::cout << VerificationText(result, config, ranks);
  }
  return result.first ? static_cast<int>(ErrorKind::kBug) : 0;
}

int EvalCommand(const EvalOptions& options, const RunOptions& run) {
  return RunRanks(run, [&](Communicator& communicator) {
    LoadedModel loaded;
    OpenedData data;
    std::optional<DType> precision;
    Agree(communicator, [&] { precision = Precision(options.precision); });
    LimitMemory(MemoryOfRank(communicator));
    SetFailureContext([](FailureContext& context) {
      context.memory = "smaller with: --batch 1, --sequence-length, --precision bf16\n";
    });
    const std::string save =
        LoadNewest(options.path, communicator, WarnOnce(communicator),
                   [&](const std::string& found) { loaded = LoadModel(found, precision); });
    Agree(communicator, [&] {
      Config& config = loaded.config;
      if (options.sequence_length) config.data.sequence_length = *options.sequence_length;
      ChooseTokenizer(options.tokenizer, save, communicator, &config);
      if (!options.data.empty()) {
        config.data.path = options.data;
        config.data.validation_fraction = 0;
      }
      if (config.data.path.empty() || config.data.sequence_length == 0) {
        SHOAL_FAIL(ErrorKind::kConfig, "eval",
                   "{} is weights alone, which say nothing of data: name some with --data PATH, "
                   "and --sequence-length T",
                   save);
      }
      if (*config.model.context < config.data.sequence_length && config.model.family == "gpt2") {
        SHOAL_FAIL(ErrorKind::kConfig, "eval",
                   "--sequence-length {} is longer than the model's context {}",
                   config.data.sequence_length, *config.model.context);
      }
      config.model.context = std::max(*config.model.context, config.data.sequence_length);
      data = OpenData(&config);
      if (options.data.empty() && data.loader->validation_sequences() == 0) {
        SHOAL_FAIL(ErrorKind::kConfig, "eval",
                   "the run held no validation data out: name some with --data PATH");
      }
    });
    const Loader& loader = *data.loader;
    const int64_t all =
        options.data.empty() ? loader.validation_sequences() : loader.train_sequences();
    // All sequences once, in whatever order, is one epoch.
    const auto batch = [&](int64_t first, int64_t count) {
      return options.data.empty() ? loader.Validation(first, count)
                                  : loader.Train(0, all, first, count);
    };
    const Evaluation result = Evaluate(all, options.batch, communicator, batch,
                                       [&](const Batch& b) { return SumLoss(*loaded.model, b); });
    if (communicator.rank() != 0) return 0;
    if (options.json) {
      std::cout << ordered_json({{"loss", result.loss}, {"tokens", result.tokens}}).dump() << '\n';
    } else {
      fmt::print("loss {:.6f} nats per token over {} tokens\n", result.loss, result.tokens);
    }
    return 0;
  });
}

int GenerateCommand(const GenerateArguments& arguments, const RunOptions& run) {
  return RunRanks(run, [&](Communicator& communicator) {
    LoadedModel loaded;
    std::unique_ptr<Tokenizer> tokenizer;
    std::vector<int32_t> prompt;
    std::optional<DType> precision;
    Agree(communicator, [&] { precision = Precision(arguments.precision); });
    LimitMemory(MemoryOfRank(communicator));
    SetFailureContext([](FailureContext& context) {
      context.memory = "smaller with: fewer --tokens, a shorter --prompt, --precision bf16\n";
    });
    const std::string save =
        LoadNewest(arguments.path, communicator, WarnOnce(communicator),
                   [&](const std::string& found) { loaded = LoadModel(found, precision); });
    Agree(communicator, [&] {
      ChooseTokenizer(arguments.tokenizer, save, communicator, &loaded.config);
      tokenizer = MakeTokenizer(loaded.config.data.tokenizer);
      prompt = tokenizer->Encode(arguments.prompt);
      // Without a prompt the text begins where a document ends.
      if (prompt.empty()) prompt.push_back(tokenizer->end_of_document());
      const int64_t vocab = loaded.model->config().vocab;
      for (int32_t id : prompt) {
        if (id < 0 || id >= vocab) {
          SHOAL_FAIL(ErrorKind::kData, "generate",
                     "the prompt has token id {}, the model knows ids below {}", id, vocab);
        }
      }
    });
    GenerateOptions options;
    options.tokens = arguments.tokens;
    options.temperature = arguments.temperature;
    options.top_k = arguments.top_k;
    options.top_p = arguments.top_p;
    options.seed = arguments.seed;
    options.stop = tokenizer->end_of_document();
    options.vocab_limit = tokenizer->vocab_size();
    const std::vector<int32_t> ids = Generate(*loaded.model, prompt, options);
    if (communicator.rank() != 0) return 0;
    const std::string text = arguments.prompt + tokenizer->Decode(ids);
    if (arguments.json) {
      // A byte model may stop in the middle of a character.
      const ordered_json json = {{"text", text}, {"tokens", ids.size()}};
      std::cout << json.dump(-1, ' ', false, ordered_json::error_handler_t::replace) << '\n';
    } else {
      std::cout << text << '\n';
    }
    return 0;
  });
}

}  // namespace shoal

#include "launch/checkpoint_commands.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <iostream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "checkpoint/manifest.h"
#include "checkpoint/masters.h"
#include "checkpoint/store.h"
#include "launch/bootstrap.h"
#include "launch/console.h"
#include "launch/hugging_face.h"
#include "launch/interchange.h"
#include "launch/run_directory.h"
#include "launch/session.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

int OnFirstRank(const std::function<int()>& f) {
  return RunRanks({}, [&](Communicator& communicator) {
    int code = 0;
    Agree(communicator, [&] {
      if (communicator.rank() == 0) code = f();
    });
    return code;
  });
}

void Warn(const std::string& what) { WriteToStandardError(fmt::format("shoal: {}\n", what)); }

std::string FindOurSave(const std::string& path) {
  if (IsHuggingFace(path))
    SHOAL_FAIL(ErrorKind::kConfig, "checkpoint",
               "{} is a Hugging Face directory: shoal ckpt import makes a save of it", path);
  return FindSave(path, Warn);
}

struct CheckedSave {
  SaveEntry save;
  std::string damage;  // empty: it is whole
};

CheckedSave Check(const SaveEntry& save) {
  try {
    VerifySave(save.path);
    return {save, ""};
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::kStorage) throw;
    return {save, e.message()};
  }
}

std::vector<CheckedSave> CheckSaves(const std::string& run) {
  std::vector<CheckedSave> checked;
  for (const SaveEntry& save : ListSaves(RunDirectory::Attach(run).checkpoints_path())) {
    checked.push_back(Check(save));
    // A run that goes on may have deleted it meanwhile.
    std::error_code ignored;
    if (!fs::exists(save.path, ignored)) checked.pop_back();
  }
  return checked;
}

ordered_json ToJson(const CheckedSave& checked) {
  const int64_t step = checked.save.step;
  return {{"step", step < 0 ? ordered_json() : ordered_json(step)},
          {"path", checked.save.path},
          {"valid", checked.damage.empty()},
          {"bytes", checked.save.bytes}};
}

void Print(const std::vector<CheckedSave>& saves) {
  for (const auto& [save, damage] : saves) {
    if (save.step < 0) continue;  // its error says all that is known of it
    fmt::print("step {:<10} {:<8} {:>12}  {}\n", save.step, damage.empty() ? "whole" : "damaged",
               ShortBytes(static_cast<double>(save.bytes)), save.path);
  }
}

// One of two saves' tensors, where they differ.
struct Difference {
  std::string tensor, what;
  double absolute = 0, relative = 0;  // largest
  int64_t elements = 0;               // that differ
  int64_t index = -1;                 // of the first, row-major
  double a = 0, b = 0;                // its values
};

// A number, or as text what JSON has no number for.
ordered_json Figure(double value) {
  return std::isfinite(value) ? ordered_json(value) : ordered_json(fmt::format("{}", value));
}

// Of a split master, as which it is compared: the whole one.
DType ComparedDType(const StoredTensor& stored) {
  return stored.dtype == DType::kI16 ? DType::kF32 : stored.dtype;
}

Tensor ReadTensor(const std::string& save, const std::string& name, const StoredTensor& stored) {
  const Tensor tensor = Tensor::Empty(stored.shape, ComparedDType(stored), MemoryClass::kWorkspace);
  Dims zero = stored.shape;
  for (int d = 0; d < zero.rank(); ++d) zero[d] = 0;
  LoadRunState(save, {{name, tensor, stored.shape, zero}});
  return tensor.Reshaped({-1});
}

void CompareValues(const Tensor& a, const Tensor& b, Difference* difference) {
  constexpr int64_t kBlock = 1 << 20;
  for (int64_t begin = 0; begin < a.numel(); begin += kBlock) {
    const int64_t count = std::min(kBlock, a.numel() - begin);
    const std::vector<double> x = a.Narrowed(0, begin, count).ToVector();
    const std::vector<double> y = b.Narrowed(0, begin, count).ToVector();
    for (size_t i = 0; i < x.size(); ++i) {
      if (x[i] == y[i] || (std::isnan(x[i]) && std::isnan(y[i]))) continue;
      if (difference->elements++ == 0) {
        difference->index = begin + static_cast<int64_t>(i);
        difference->a = x[i];
        difference->b = y[i];
      }
      constexpr double kInfinite = std::numeric_limits<double>::infinity();
      double absolute = std::abs(x[i] - y[i]);
      if (!(absolute < kInfinite)) absolute = kInfinite;
      const double scale = std::max(std::abs(x[i]), std::abs(y[i]));
      const double relative = absolute < kInfinite ? absolute / scale : kInfinite;
      difference->absolute = std::max(difference->absolute, absolute);
      difference->relative = std::max(difference->relative, relative);
    }
  }
}

std::vector<Difference> Compare(const std::string& a, const std::string& b, int64_t* tensors) {
  std::map<std::string, std::pair<const StoredTensor*, const StoredTensor*>> both;
  const Part of_a = ReadManifest(a).all, of_b = ReadManifest(b).all;
  for (const auto& [name, tensor] : of_a.tensors) both[WholeMaster(name)].first = &tensor;
  for (const auto& [name, tensor] : of_b.tensors) both[WholeMaster(name)].second = &tensor;
  *tensors = static_cast<int64_t>(both.size());
  std::vector<Difference> differences;
  for (const auto& [name, pair] : both) {
    const auto [x, y] = pair;
    Difference difference = {name, ""};
    if (x == nullptr || y == nullptr) {
      difference.what = x == nullptr ? "only in the second" : "only in the first";
    } else if (!(x->shape == y->shape)) {
      difference.what = fmt::format("shape {} and {}", x->shape.ToString(), y->shape.ToString());
    } else {
      CompareValues(ReadTensor(a, name, *x), ReadTensor(b, name, *y), &difference);
      if (difference.elements > 0) difference.what = "values";
      if (ComparedDType(*x) != ComparedDType(*y))
        difference.what =
            fmt::format("dtype {} and {}", Name(ComparedDType(*x)), Name(ComparedDType(*y)));
    }
    if (!difference.what.empty()) differences.push_back(std::move(difference));
  }
  return differences;
}

void PrintInterchange(const Interchange& made, bool json) {
  if (json) {
    const ordered_json object = {{"path", made.path},
                                 {"files", made.files},
                                 {"tensors", made.tensors},
                                 {"bytes", made.bytes},
                                 {"dtype", Name(made.dtype)}};
    std::cout << object.dump() << '\n';
    return;
  }
  fmt::print("wrote {} tensors ({}, {}) in {} file{} to {}\n", made.tensors, Name(made.dtype),
             ShortBytes(static_cast<double>(made.bytes)), made.files.size(),
             made.files.size() == 1 ? "" : "s", made.path);
}

}  // namespace

int CkptLsCommand(const std::string& run, bool json) {
  return OnFirstRank([&] {
    const std::vector<CheckedSave> saves = CheckSaves(run);
    ordered_json list = ordered_json::array();
    for (const CheckedSave& save : saves) list.push_back(ToJson(save));
    if (json) {
      std::cout << list.dump() << '\n';
      return 0;
    }
    Print(saves);
    if (saves.empty()) fmt::print("{} has no saves\n", run);
    return 0;
  });
}

int CkptVerifyCommand(const std::string& path, bool json) {
  return OnFirstRank([&] {
    std::error_code error;
    if (!fs::exists(path, error))
      SHOAL_FAIL(ErrorKind::kStorage, "checkpoint", "{} does not exist", path);
    std::vector<CheckedSave> saves;
    if (fs::exists(path + "/config.toml", error)) {
      saves = CheckSaves(path);
    } else {
      // What cannot be read of it is said by the check.
      SaveEntry save = {path, -1, 0};
      for (const auto& file : fs::directory_iterator(path, error))
        save.bytes += static_cast<int64_t>(file.file_size(error));
      saves.push_back(Check(save));
      if (saves[0].damage.empty()) saves[0].save.step = ReadSaveInfo(path).step;
    }
    if (saves.empty())
      SHOAL_FAIL(ErrorKind::kStorage, "checkpoint",
                 "{} holds no save: the run ended before its first", path);
    std::string damage;
    ordered_json list = ordered_json::array();
    for (const CheckedSave& save : saves) {
      list.push_back(ToJson(save));
      if (save.damage.empty()) continue;
      list.back()["error"] = save.damage;
      damage += (damage.empty() ? "" : "\n") + save.damage;
    }
    if (json) {
      std::cout << ordered_json({{"valid", damage.empty()}, {"saves", list}}).dump() << '\n';
    } else {
      Print(saves);
    }
    if (!damage.empty()) SHOAL_FAIL(ErrorKind::kStorage, "checkpoint", "{}", damage);
    return 0;
  });
}

int CkptDiffCommand(const std::string& a, const std::string& b, bool json) {
  return OnFirstRank([&] {
    const std::string first = FindOurSave(a), second = FindOurSave(b);
    int64_t tensors = 0;
    const std::vector<Difference> differences = Compare(first, second, &tensors);
    double absolute = 0, relative = 0;
    ordered_json list = ordered_json::array();
    for (const Difference& d : differences) {
      absolute = std::max(absolute, d.absolute);
      relative = std::max(relative, d.relative);
      list.push_back({{"tensor", d.tensor},
                      {"what", d.what},
                      {"elements", d.elements},
                      {"max_absolute_difference", Figure(d.absolute)},
                      {"max_relative_difference", Figure(d.relative)}});
    }
    if (json) {
      ordered_json object = {{"equal", differences.empty()},
                             {"tensors", tensors},
                             {"max_absolute_difference", Figure(absolute)},
                             {"max_relative_difference", Figure(relative)},
                             {"first_difference", nullptr},
                             {"different", list}};
      if (!differences.empty()) {
        const Difference& d = differences[0];
        object["first_difference"] = {{"tensor", d.tensor}, {"what", d.what}};
        if (d.elements > 0)
          object["first_difference"].update(
              {{"index", d.index}, {"a", Figure(d.a)}, {"b", Figure(d.b)}});
      }
      std::cout << object.dump() << '\n';
      return differences.empty() ? 0 : 1;
    }
    if (differences.empty()) {
      fmt::print("equal: {} tensors of {} and {}\n", tensors, first, second);
      return 0;
    }
    for (const Difference& d : differences) {
      fmt::print("{}: {}", d.tensor, d.what);
      if (d.elements > 0)
        fmt::print(
            ", {} elements, at most {:.3g} (relative {:.3g}), first [{}]: {:.17g} and {:.17g}",
            d.elements, d.absolute, d.relative, d.index, d.a, d.b);
      fmt::print("\n");
    }
    fmt::print(
        "different: {} of {} tensors, the first {}; largest difference {:.3g}, relative "
        "{:.3g}\n",
        differences.size(), tensors, differences[0].tensor, absolute, relative);
    return 1;
  });
}

int CkptPruneCommand(const std::string& run, int64_t keep, bool json) {
  return OnFirstRank([&] {
    const RunDirectory locked = RunDirectory::Open(run);
    const std::vector<SaveEntry> saves = ListSaves(locked.checkpoints_path());
    PruneSaves(locked.checkpoints_path(), {.keep = keep, .verify = true});
    ordered_json object = {{"kept", ordered_json::array()}, {"removed", ordered_json::array()}};
    std::error_code ignored;
    for (const SaveEntry& save : saves)
      object[fs::exists(save.path, ignored) ? "kept" : "removed"].push_back(save.path);
    if (json) {
      std::cout << object.dump() << '\n';
      return 0;
    }
    for (const auto& path : object["removed"]) fmt::print("removed {}\n", path.get<std::string>());
    fmt::print("{} removed, {} kept in {}\n", object["removed"].size(), object["kept"].size(), run);
    return 0;
  });
}

int CkptExportCommand(const CkptExportArguments& arguments, bool json) {
  return OnFirstRank([&] {
    ExportOptions options;
    if (arguments.dtype) options.dtype = ComputeDType(*arguments.dtype);
    options.tokenizer = arguments.tokenizer;
    const auto bytes = ParseBytes(arguments.shard_size);
    if (!bytes)
      SHOAL_FAIL(ErrorKind::kConfig, "command line",
                 "--shard-size {} is no number of bytes: say 5GB, 500MB or 2GiB",
                 arguments.shard_size);
    options.shard_bytes = *bytes;
    PrintInterchange(ExportHuggingFace(FindOurSave(arguments.path), arguments.out, options), json);
    return 0;
  });
}

int CkptImportCommand(const std::string& directory, const std::string& out, bool json) {
  return OnFirstRank([&] {
    if (!IsHuggingFace(directory))
      SHOAL_FAIL(ErrorKind::kStorage, "checkpoint",
                 "{} is no Hugging Face directory: it has no config.json", directory);
    const Interchange made = ImportHuggingFace(directory, out);
    PrintInterchange(made, json);
    if (!json) fmt::print("Next: model.from = \"{0}\", or shoal eval {0}\n", made.path);
    return 0;
  });
}

}  // namespace shoal

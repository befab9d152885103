#include "launch/torture.h"

#include <fmt/format.h>
#include <stdlib.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <thread>

#include "checkpoint/manifest.h"
#include "checkpoint/store.h"
#include "core/base/error.h"
#include "launch/child.h"
#include "launch/config.h"
#include "launch/run_directory.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

double Since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

void Sleep(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

std::string ReadText(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

void WriteText(const std::string& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out << text;
  if (!out.flush())
    SHOAL_FAIL(ErrorKind::kStorage, "torture", "{} cannot be written: {}", path,
               std::strerror(errno));
}

// Why a save is no good; empty if it is.
std::string Damage(const std::string& save) {
  try {
    VerifySave(save);
    return "";
  } catch (const Error& e) {
    return e.message();
  }
}

struct Trial {
  std::string name;
  int64_t tries = 0, passed = 0;
  std::string detail;  // what was met, or of what has failed the first
};

class Torture {
 public:
  explicit Torture(const TortureOptions& options) : options_(options), random_(options.seed) {
    config_ = RunDirectory::Attach(options.run).config_path();
    CheckRanks(LoadConfig(config_));
    std::string scratch = fs::absolute(options.run).lexically_normal().string();
    while (scratch.ends_with('/')) scratch.pop_back();
    scratch += ".torture-XXXXXX";
    if (mkdtemp(scratch.data()) == nullptr)
      SHOAL_FAIL(ErrorKind::kStorage, "torture", "no folder can be made beside {}: {}", options.run,
                 std::strerror(errno));
    scratch_ = scratch;
  }
  ~Torture() {
    std::error_code ignored;
    if (!keep_) fs::remove_all(scratch_, ignored);
  }
  Torture(const Torture&) = delete;
  Torture& operator=(const Torture&) = delete;

  void Unkilled();
  void Kills();
  void FullDisk();
  void Damages();

  std::vector<Trial> trials;
  const std::string& scratch() const { return scratch_; }
  void Keep() { keep_ = true; }
  int64_t steps() const { return steps_; }
  int64_t every() const { return every_; }
  int ranks() const { return std::max(options_.ranks, options_.local_ranks); }

 private:
  std::string Path(const std::string& name) const { return scratch_ + "/" + name; }
  std::string Saves(const std::string& run) const {
    return RunDirectory::CheckpointsPath(Path(run));
  }
  double Uniform(double high) { return std::uniform_real_distribution<>(0, high)(random_); }
  int64_t Below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(random_); }

  void CheckRanks(const Config& config) const;
  Child StartWords(std::vector<std::string> words, const std::string& output) const;
  std::vector<std::string> TrainWords(const std::string& run) const;
  // Goes on with `run`, or begins it if no save of it is there to go on from.
  Child Start(const std::string& run) const;
  void MustTrain(const std::string& run, int code, int expected) const;
  bool InSave(const std::string& run) const;
  void WaitForAMoment(Child& child, bool aimed);
  std::string Compare(const std::string& run) const;
  std::string KillOne(Child& child, int rank);
  std::string CheckAfterKill(int64_t* newest) const;
  std::string DamageOnce(const std::string& victim, const std::string& other, int64_t kind);

  TortureOptions options_;
  std::mt19937_64 random_;
  std::string config_, scratch_;
  bool keep_ = false;
  int64_t steps_ = 16, every_ = 1;
  double seconds_ = 0;       // of the run that nobody kills
  double save_seconds_ = 0;  // from a save's request until it is durable, at most
  double slowest_end_ = 0;   // of ranks after one of them was killed
};

void Torture::CheckRanks(const Config& config) const {
  if (options_.ranks > 0 && options_.local_ranks > 1)
    SHOAL_FAIL(ErrorKind::kConfig, "torture",
               "--ranks are processes and --local-ranks threads: use one of the two");
  try {
    CheckBatch(config, ranks());
  } catch (const Error& e) {
    SHOAL_FAIL(e.kind(), "torture", "{}, with --ranks or --local-ranks", e.message());
  }
}

Child Torture::StartWords(std::vector<std::string> words, const std::string& output) const {
  if (options_.local_ranks > 1)
    words.insert(words.end(), {"--local-ranks", std::to_string(options_.local_ranks)});
  return Child(words, output, options_.ranks);
}

std::vector<std::string> Torture::TrainWords(const std::string& run) const {
  return {"train",
          config_,
          "run.dir=" + Path(run),
          fmt::format("run.steps={}", steps_),
          "run.validate_every=0",
          fmt::format("checkpoint.every={}", every_),
          "checkpoint.keep=2",
          fmt::format("checkpoint.keep_every={}", 5 * every_),
          "checkpoint.keep_best=false"};
}

Child Torture::Start(const std::string& run) const {
  if (!ListSaves(Saves(run)).empty()) return StartWords({"resume", Path(run)}, Path("output"));
  fs::remove_all(Path(run));
  return StartWords(TrainWords(run), Path("output"));
}

void Torture::MustTrain(const std::string& run, int code, int expected) const {
  if (code == expected) return;
  const std::string output = ReadText(Path("output"));
  SHOAL_FAIL(ErrorKind::kStorage, "torture", "the copy {} ended with {} instead of {}:\n{}", run,
             code, expected, output.substr(output.size() - std::min<size_t>(output.size(), 1000)));
}

void Torture::Unkilled() {
  // How many steps take about two seconds, so that moments are spread over steps and saves.
  for (const bool measured : {false, true}) {
    fs::remove_all(Path("whole"));
    const Clock::time_point begin = Clock::now();
    MustTrain("whole", StartWords(TrainWords("whole"), Path("output")).Wait(), 0);
    seconds_ = Since(begin);
    if (measured) break;
    steps_ = std::clamp<int64_t>(static_cast<int64_t>(2 / seconds_ * static_cast<double>(steps_)),
                                 12, 240);
    every_ = std::max<int64_t>(1, steps_ / 24);
    steps_ = steps_ / every_ * every_;
  }
  std::istringstream log(ReadText(Path("whole/log/rank-0.log")));
  for (std::string line; std::getline(log, line);) {
    const std::string words = " durable after ";
    const size_t at = line.find(words);
    if (at != std::string::npos)
      save_seconds_ = std::max(save_seconds_, std::stod(line.substr(at + words.size())));
  }
  const std::string damage = Damage(SavePath(Saves("whole"), steps_));
  trials.push_back(
      {"unkilled", 1, damage.empty() ? 1 : 0,
       damage.empty() ? fmt::format("{} steps, a save each {}, {:.1f} s", steps_, every_, seconds_)
                      : damage});
}

// Whether a save is being written, renamed or deleted.
bool Torture::InSave(const std::string& run) const {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(Saves(run), error))
    if (entry.path().has_extension()) return true;
  return false;
}

// Any moment of the run, or one after a save has begun.
void Torture::WaitForAMoment(Child& child, bool aimed) {
  const Clock::time_point begin = Clock::now();
  const double moment = Uniform(seconds_);
  while (!child.Ended() && Since(begin) < moment) Sleep(0.0005);
  while (aimed && !child.Ended() && !InSave("run")) Sleep(0.0001);
  if (aimed) Sleep(Uniform(save_seconds_ + 0.002));
}

// Only `rank`, once all are there. The others must end: mpirun or their watchdogs see to it.
std::string Torture::KillOne(Child& child, int rank) {
  std::map<int, pid_t> ranks;
  while (!child.Ended() && std::ssize(ranks) < options_.ranks) {
    ranks = child.Ranks();
    Sleep(0.0005);
  }
  if (child.Ended()) return "";
  kill(ranks[rank], SIGKILL);
  const Clock::time_point begin = Clock::now();
  const auto all_ended = [&] {
    return child.Ended() &&
           std::ranges::none_of(ranks, [](const auto& other) { return IsRunning(other.second); });
  };
  constexpr double kPatience = 10;
  while (!all_ended() && Since(begin) < kPatience) Sleep(0.002);
  slowest_end_ = std::max(slowest_end_, Since(begin));
  if (!all_ended()) {
    child.Kill();
    for (const auto& [other, pid] : ranks) kill(pid, SIGKILL);  // mpirun may be gone without them
    return fmt::format("rank {} was killed, and {:.0f} s later others still run", rank, kPatience);
  }
  // It may have been done already.
  if (*child.Ended() != 0 || fs::exists(SavePath(Saves("run"), steps_))) return "";
  return fmt::format("rank {} was killed, and the job ended well", rank);
}

// All saves under their own names are whole, and none that was durable is gone. `newest`: the step
// of the newest save; of the one before this kill, and of the one now.
std::string Torture::CheckAfterKill(int64_t* newest) const {
  const std::vector<SaveEntry> saves = ListSaves(Saves("run"));
  for (const SaveEntry& save : saves)
    if (const std::string damage = Damage(save.path); !damage.empty()) return damage;
  const int64_t step = saves.empty() ? 0 : saves[0].step;
  if (step < *newest) return fmt::format("the save of step {} is gone", *newest);
  if (step >= 2 * every_ && saves.size() < 2) return "fewer than two saves are left";
  *newest = step;
  return "";
}

// The end of a copy is that of the copy that nobody killed.
std::string Torture::Compare(const std::string& run) const {
  const std::string mine = SavePath(Saves(run), steps_), whole = SavePath(Saves("whole"), steps_);
  if (const std::string damage = Damage(mine); !damage.empty()) return damage;
  const bool same = PartToText(ReadManifest(mine).all) == PartToText(ReadManifest(whole).all);
  return same ? "" : fmt::format("{} differs from {}", mine, whole);
}

void Torture::Kills() {
  Trial kills = {"killed", options_.kills, 0, ""}, ends = {"resumed to the end", 0, 0, ""};
  int64_t done = 0, newest = 0, in_save = 0, before_any = 0;
  const auto fail = [](Trial& trial, const std::string& what) {
    if (trial.detail.empty()) trial.detail = what;
  };
  const auto finish = [&](int code) {
    ++ends.tries;
    const std::string wrong =
        code == 0 ? Compare("run") : fmt::format("a copy ended with {}", code);
    if (wrong.empty()) ++ends.passed;
    if (!wrong.empty()) fail(ends, wrong);
    fs::remove_all(Path("run"));
    newest = 0;
  };
  while (done < options_.kills) {
    Child child = Start("run");
    WaitForAMoment(child, done % 2 == 1);
    if (const auto code = child.Ended()) {
      finish(*code);
      if (*code != 0) break;
      continue;
    }
    // Rank 0, any one, all.
    const int64_t victims = options_.ranks > 0 ? done % 3 : 2;
    std::string wrong;
    if (victims == 2)
      child.Kill();
    else
      wrong = KillOne(child, victims == 0 ? 0 : static_cast<int>(Below(options_.ranks)));
    ++done;
    if (InSave("run")) ++in_save;
    if (wrong.empty()) wrong = CheckAfterKill(&newest);
    if (newest == 0) ++before_any;
    if (wrong.empty()) ++kills.passed;
    if (!wrong.empty()) fail(kills, wrong);
  }
  if (done > 0) finish(Start("run").Wait());
  if (kills.detail.empty())
    kills.detail = fmt::format(
        "{} while a save was written, {} before the first{}", in_save, before_any,
        options_.ranks > 0 ? fmt::format("; others ended within {:.1f} s", slowest_end_) : "");
  if (ends.detail.empty()) ends.detail = "bitwise the unkilled copy";
  trials.push_back(kills);
  trials.push_back(ends);
}

void Torture::FullDisk() {
  int64_t largest = 0;
  for (const auto& file : fs::directory_iterator(SavePath(Saves("whole"), steps_)))
    if (file.path().extension() == ".h5")
      largest = std::max(largest, static_cast<int64_t>(file.file_size()));
  for (const bool relieved : {true, false}) {
    Trial trial = {relieved ? "full disk, then room" : "full disk", 1, 0, ""};
    // Other files of a run are limited too.
    if (largest < 1000 * steps_) {
      trial.tries = 0;
      trial.detail = "skipped: the run's metrics are larger than its saves";
      trials.push_back(trial);
      continue;
    }
    std::vector<std::string> words = TrainWords("full");
    words.emplace_back(relieved ? "checkpoint.full_disk_wait=60" : "checkpoint.full_disk_wait=0.2");
    fs::remove_all(Path("full"));
    const std::string output = Path(relieved ? "relieved" : "full-output");
    Child child = StartWords(words, output);
    while (!child.Ended() && ListSaves(Saves("full")).empty()) Sleep(0.001);
    if (!child.Ended()) child.LimitFiles(largest - 1);
    bool waited = false;
    while (relieved && !waited && !child.Ended()) {
      Sleep(0.002);
      waited = ReadText(output).find("no space left") != std::string::npos;
    }
    if (waited && !child.Ended()) child.LimitFiles(-1);
    const int code = child.Wait();
    for (const SaveEntry& save : ListSaves(Saves("full")))
      if (trial.detail.empty()) trial.detail = Damage(save.path);
    if (trial.detail.empty() && relieved) {
      trial.detail = code != 0 ? fmt::format("the copy ended with {}", code)
                     : !waited ? "the disk was never full"
                               : Compare("full");
    } else if (trial.detail.empty()) {
      if (code != static_cast<int>(ErrorKind::kStorage))
        trial.detail = fmt::format("the copy ended with {}", code);
      if (ListSaves(Saves("full")).empty()) trial.detail = "the save before is gone";
    }
    if (trial.detail.empty()) {
      trial.passed = 1;
      trial.detail = relieved ? "waited, went on, bitwise the unkilled copy"
                              : "ended with 73, all saves before are whole";
    }
    trials.push_back(trial);
  }
}

// Damages the save `victim`, looks whether that is noticed, and mends it. Returns what was not.
std::string Torture::DamageOnce(const std::string& victim, const std::string& other, int64_t kind) {
  std::vector<fs::path> files;
  std::vector<double> sizes;
  for (const auto& file : fs::directory_iterator(victim)) files.push_back(file.path());
  std::sort(files.begin(), files.end());
  for (const fs::path& file : files) sizes.push_back(static_cast<double>(fs::file_size(file)));
  const fs::path file =
      files[std::discrete_distribution<size_t>(sizes.begin(), sizes.end())(random_)];
  const std::string good = ReadText(file);
  const int64_t at = Below(std::ssize(good));
  std::string bad = good, what;
  if (kind == 0) {
    bad.resize(static_cast<size_t>(at));
    what = fmt::format("cut to {} bytes", at);
  } else if (kind == 1) {
    bad = ReadText(fs::path(other) / file.filename());
    what = "taken from another save";
  } else {
    const int64_t bit = Below(8);
    bad[static_cast<size_t>(at)] ^= static_cast<char>(1 << bit);
    what = fmt::format("bit {} of byte {} flipped", bit, at);
  }
  WriteText(file, bad);
  const std::string damage = Damage(victim);
  WriteText(file, good);
  const std::string name = file.filename();
  if (damage.find(name) == std::string::npos && (damage.empty() || kind != 1))
    return fmt::format("{}: {}, which was {}", name, what,
                       damage.empty() ? "overlooked" : "told of another file: " + damage);
  return "";
}

void Torture::Damages() {
  Trial trial = {"damaged saves", options_.flips, 0, ""};
  const std::string victim = Path("victim"), other = ListSaves(Saves("whole"))[1].path;
  fs::copy(SavePath(Saves("whole"), steps_), victim);
  for (int64_t i = 0; i < options_.flips; ++i) {
    const std::string wrong = DamageOnce(victim, other, i % 10);
    if (wrong.empty()) ++trial.passed;
    if (!wrong.empty() && trial.detail.empty()) trial.detail = wrong;
  }
  if (trial.detail.empty()) trial.detail = "all found, and the file named";
  trials.push_back(trial);
}

}  // namespace

int TortureCommand(const TortureOptions& options) {
  const Clock::time_point begin = Clock::now();
  Torture torture(options);
  torture.Unkilled();
  torture.Kills();
  torture.FullDisk();
  torture.Damages();
  bool passed = true;
  for (const Trial& trial : torture.trials) passed = passed && trial.passed == trial.tries;
  if (!passed) torture.Keep();
  if (options.json) {
    nlohmann::ordered_json json = {{"passed", passed},
                                   {"steps", torture.steps()},
                                   {"every", torture.every()},
                                   {"ranks", torture.ranks()},
                                   {"seed", options.seed},
                                   {"seconds", Since(begin)},
                                   {"trials", nlohmann::ordered_json::array()}};
    for (const Trial& trial : torture.trials)
      json["trials"].push_back({{"name", trial.name},
                                {"tries", trial.tries},
                                {"passed", trial.passed},
                                {"detail", trial.detail}});
    std::cout << json.dump() << '\n';
  } else {
    std::cout << fmt::format("{:<22} {:>6} {:>7}\n", "", "tries", "passed");
    for (const Trial& trial : torture.trials)
      std::cout << fmt::format("{:<22} {:>6} {:>7}  {}\n", trial.name, trial.tries, trial.passed,
                               trial.detail);
    std::cout << (passed ? fmt::format("Nothing was lost, in {:.0f} s\n", Since(begin))
                         : fmt::format("It failed. What is left of it: {}\n", torture.scratch()));
  }
  return passed ? 0 : static_cast<int>(ErrorKind::kStorage);
}

}  // namespace shoal

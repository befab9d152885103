#include "launch/trainer.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <functional>
#include <optional>

#include "checkpoint/masters.h"
#include "core/context.h"
#include "launch/bootstrap.h"
#include "launch/console.h"
#include "launch/failure.h"
#include "launch/metrics.h"
#include "launch/plan.h"
#include "launch/run_directory.h"
#include "launch/run_saves.h"
#include "launch/session.h"
#include "launch/signals.h"
#include "launch/tensorboard.h"
#include "launch/timeline.h"
#include "optim/lr_schedule.h"

namespace shoal {
namespace {

using Clock = std::chrono::steady_clock;

double Since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// Every rank must have been started with the same configuration, and find the same corpus.
void CheckSame(const Config& config, const std::string& fingerprint, Communicator& communicator) {
  const std::vector<std::string> corpora = communicator.AllGatherStrings(fingerprint);
  const std::vector<std::string> all = communicator.AllGatherStrings(WriteConfig(config));
  for (size_t r = 1; r < all.size(); ++r) {
    if (all[r] == all[0]) continue;
    // The first line that differs says which key: each has its own.
    const auto [a, b] = std::mismatch(all[0].begin(), all[0].end(), all[r].begin(), all[r].end());
    const size_t begin = all[0].rfind('\n', static_cast<size_t>(a - all[0].begin())) + 1;
    const auto line = [begin](const std::string& text) {
      std::string found = text.substr(begin, text.find('\n', begin) - begin);
      found.resize(std::min(found.size(), found.rfind(" # ")));  // the key's help
      found.erase(found.find_last_not_of(' ') + 1);
      return found;
    };
    const size_t section = all[0].rfind("\n[", begin) + 1;
    SHOAL_FAIL(ErrorKind::kConfig, "config",
               "rank {} was started with another configuration than rank 0: {} {} instead of {}. "
               "Start all ranks with one command line",
               r, all[0].substr(section, all[0].find('\n', section) - section), line(all[r]),
               line(all[0]));
  }
  for (size_t r = 1; r < all.size(); ++r) {
    if (corpora[r] == corpora[0]) continue;
    SHOAL_FAIL(ErrorKind::kData, "data",
               "rank {} finds another corpus at {} than rank 0. Copy the same files to every host",
               r, config.data.path);
  }
}

// What backward runs again calls collectives, so ranks must have found the same.
void CheckSameChoice(const TrainingOptions& options, Communicator& communicator) {
  std::string choice;
  for (const auto& [full, selective] : options.recompute)
    choice += fmt::format("{} {};", full, selective);
  const std::vector<std::string> all = communicator.AllGatherStrings(choice);
  const auto other =
      std::find_if(all.begin(), all.end(), [&](const auto& c) { return c != all[0]; });
  if (other == all.end()) return;
  SHOAL_FAIL(
      ErrorKind::kConfig, "memory",
      "ranks 0 and {} do not agree on what memory.recompute = \"auto\" recomputes: start all "
      "ranks with the same number of threads (OMP_NUM_THREADS)",
      other - all.begin());
}

class Run {
 public:
  Run(Config config, Communicator& communicator)
      : config_(std::move(config)), communicator_(communicator) {}

  // Everything that can be wrong is found here, before anything is written.
  void Prepare() {
    Agree(communicator_, [&] {
      CheckSupported(config_);
      plan_ = CheckBatch(config_, communicator_.size());
      // A run that goes on knows its shape, and the weights it began with may be gone.
      if (!directory_) ResolveFrom(&config_);  // a run that goes on has its own weights
      data_ = OpenData(&config_);
      options_ = MakeTrainingOptions(config_, plan_);
    });
    // All ranks see all answers, so all find the same; told once.
    Agree(communicator_, [&] { CheckSame(config_, data_.fingerprint, communicator_); });
    Agree(communicator_, [&] { CheckSameChoice(options_, communicator_); });
    const int64_t share = MemoryOfRank(communicator_);
    Agree(communicator_, [&] {
      if (communicator_.rank() != 0) return;
      forecast_ = MakePlan(config_, options_, communicator_.size());
      forecast_.steps_per_epoch = data_.loader->train_sequences() / config_.batch.sequences;
      forecast_.available = share;
      CheckFits(forecast_, config_);
    });
    knobs_ = KnobText(KnobsOf(config_, options_, plan_));
    SetFailureContext([&](FailureContext& context) { context.memory = knobs_; });
    LimitMemory(config_.memory.overcommit ? MemoryOfRank(1)
                                          : config_.memory.budget.value_or(share));
  }

  void BuildFresh() {
    step_.emplace(options_, communicator_);
    LoadWeights(
        &config_, communicator_, [&](const std::string& what) { console_.Warn(what); }, *step_);
    step_->optimizer().TakeValues();
  }

  // Rank 0 makes the directory; the others use it once it is there. One in which no rank could
  // begin is taken away again.
  void CreateDirectory() {
    PlanSaves();
    Agree(communicator_, [&] {
      if (communicator_.rank() != 0) return;
      directory_.emplace(RunDirectory::Create(config_.run.dir, WriteConfig(config_),
                                              PlanJson(forecast_), saves_->all_bytes(),
                                              saves_->largest_file()));
    });
    try {
      Agree(communicator_, [&] {
        if (communicator_.rank() != 0) directory_.emplace(RunDirectory::Attach(config_.run.dir));
      });
      OpenFiles();
    } catch (...) {
      if (communicator_.rank() == 0) directory_->Remove();
      throw;
    }
  }

  // Takes a run that goes on. True if its last step is saved, and that save is whole: no load will
  // look at it.
  bool OpenFinished(const std::string& run) {
    Agree(communicator_, [&] {
      directory_.emplace(communicator_.rank() == 0 ? RunDirectory::Open(run)
                                                   : RunDirectory::Attach(run));
      if (communicator_.rank() != 0) return;
      RecoverSaves(directory_->checkpoints_path());
      for (const std::string& save : FindSaves(run, Ignore)) {
        if (ReadSaveInfo(save).step < config_.run.steps) return;
        try {
          VerifySave(save);
          finished_ = save;
          return;
        } catch (const Error&) {
          // The load finds it again, and says so.
        }
      }
    });
    finished_ = communicator_.AllGatherStrings(finished_)[0];
    return !finished_.empty();
  }

  void LoadLastSave() {
    step_.emplace(options_, communicator_);
    PlanSaves();
    LoadSave();
    Agree(communicator_, [&] {
      if (communicator_.rank() == 0)
        CheckFreeSpace(directory_->checkpoints_path(), saves_->all_bytes(), saves_->largest_file());
    });
    OpenFiles();
  }

  int Loop();

  const std::string& finished() const { return finished_; }
  Console& console() { return console_; }

 private:
  void PlanSaves() {
    saves_.emplace(config_.checkpoint, communicator_, console_,
                   RunDirectory::CheckpointsPath(config_.run.dir), *step_,
                   [this] { metrics_->Sync(); });
  }
  void OpenFiles();
  void OpenMetrics() {
    const FullDisk full_disk = WaitForRoom(config_.checkpoint, console_);
    metrics_.emplace(directory_->metrics_path(), full_disk);
    tensorboard_.emplace(directory_->path(), full_disk);
  }
  void LoadSave();
  Request Asked() const;
  bool MemoryAsked() const {
    return communicator_.rank() == 0 && TakeMemoryRequestFile(directory_->path());
  }
  bool Step(int64_t step);
  bool NotFinite(int64_t step, const TrainingStep::Result& result);
  void RollBack(int64_t step, const std::string& what);
  bool IsFinite(const std::function<void()>& saving);
  void Save();
  std::optional<double> Validate(int64_t step);

  Config config_;
  Communicator& communicator_;
  Console console_{communicator_.rank(), communicator_.size()};
  BatchPlan plan_;
  Plan forecast_;  // rank 0's
  OpenedData data_;
  TrainingOptions options_;
  std::string knobs_;        // what would take less
  bool watch_next_ = false;  // what is alive at the next step's peak is reported
  std::optional<RunDirectory> directory_;
  std::optional<TrainingStep> step_;
  std::optional<MetricsWriter> metrics_;
  std::optional<TensorBoardWriter> tensorboard_;
  LrSchedule schedule_;
  KernelProfile profile_;
  int64_t done_ = 0, tokens_ = 0;
  int64_t data_offset_ = 0;  // see SaveInfo
  int64_t skipped_in_a_row_ = 0;
  std::string rolled_back_to_;  // the save, and how often
  int64_t rollbacks_ = 0;
  std::optional<double> validation_loss_;  // after step done_
  std::string finished_;                   // the save of the last step, if the run has one
  std::optional<RunSaves> saves_;          // last: it uses the others
};

void Run::OpenFiles() {
  Agree(communicator_, [&] {
    console_.OpenLog(directory_->log_path(communicator_.rank()));
    if (communicator_.rank() == 0) OpenMetrics();
  });
  // From here on a failure leaves a run behind that its message can name.
  console_.SetRun(directory_->path());
  if (done_ == 0) console_.Info(ConfigSummary(config_, communicator_.size()));
  console_.SetLastSave(saves_->last());
}

// The newest save that all ranks find whole becomes the state of the run.
void Run::LoadSave() {
  SaveInfo info;
  saves_->set_last(LoadNewest(
      directory_->path(), communicator_, [&](const std::string& what) { console_.Warn(what); },
      [&](const std::string& save) {
        info = ReadSaveInfo(save);
        if (info.data_fingerprint != data_.fingerprint) {
          SHOAL_FAIL(ErrorKind::kData, "resume",
                     "{} is not the corpus that the run was trained on: it has changed since. "
                     "Restore it, or start a new run with model.from = \"{}\"",
                     config_.data.path, save);
        }
        ReadOnHost(step_->State(), [&](const StateDict& state) { LoadRunState(save, state); });
      }));
  step_->optimizer().set_step(info.updates);
  step_->optimizer().ShareValues();
  done_ = info.step;
  tokens_ = info.tokens;
  data_offset_ = info.data_offset;
  validation_loss_ = info.validation_loss;
  Agree(communicator_, [&] {
    if (communicator_.rank() == 0) CutMetrics(directory_->metrics_path(), done_);
  });
}

int Run::Loop() {
  schedule_ = {config_.optim.schedule,        config_.optim.lr,
               config_.optim.min_lr_fraction, config_.optim.decay_fraction,
               config_.optim.warmup_steps,    config_.run.steps};
  ExecutionContext::Current().set_profile(&profile_);
  step_->set_profile(&profile_);
  const auto begin = Clock::now();
  int64_t taken = 0;
  bool stop = false;
  while (done_ < config_.run.steps && !stop) {
    bool went_on = Step(done_ + 1);
    ++taken;
    // One agreement per step: on what any rank was asked to do, and on what saves wait for.
    std::array<double, 3> any = {static_cast<double>(Asked()), saves_->Busy() ? 1.0 : 0.0,
                                 MemoryAsked() ? 1.0 : 0.0};
    const View view(any.data(), DType::kF64, {std::ssize(any)});
    communicator_.AllReduce(std::span(&view, 1), ReduceOp::kMax, Traffic::kControl);
    const auto asked = static_cast<Request>(any[0]);
    watch_next_ = any[2] > 0;
    went_on = IsFinite([&] { saves_->Advance(any[1] > 0); }) && went_on;
    stop = asked == Request::kStop;
    const bool due =
        went_on && config_.checkpoint.every > 0 && done_ % config_.checkpoint.every == 0;
    const bool last = stop || done_ == config_.run.steps;
    if (due || last || asked != Request::kNone) {
      IsFinite([&] {
        Save();
        if (last) saves_->Finish();
      });
    }
  }
  ExecutionContext::Current().set_profile(nullptr);
  step_->set_profile(nullptr);
  const bool finished = done_ == config_.run.steps;
  console_.EndProgress();
  if (config_.mesh.pp > 1 && taken > 0)
    WriteTimeline(*step_, options_, communicator_, directory_->pipeline_path());
  console_.Info(fmt::format("{} at step {} of {}: {} steps in {:.1f} s. Saved in {}",
                            finished ? "Finished" : "Stopped", done_, config_.run.steps, taken,
                            Since(begin), saves_->last()));
  console_.Info(finished
                    ? fmt::format("Next: shoal generate {0} --prompt \"...\"   shoal report {0}",
                                  directory_->path())
                    : fmt::format("Next: shoal resume {}", directory_->path()));
  return finished ? 0 : static_cast<int>(ErrorKind::kRequeue);
}

// Of this rank.
Request Run::Asked() const {
  Request asked = StopRequested()       ? Request::kStop
                  : TakeSaveRequested() ? Request::kSave
                                        : Request::kNone;
  if (communicator_.rank() == 0) asked = std::max(asked, TakeRequestFile(directory_->path()));
  return asked;
}

// False if it went back to a save instead.
bool Run::Step(int64_t step) {
  SetFailureContext([&](FailureContext& context) { context.step = step; });
  const double busy_before = profile_.total();
  std::array<int64_t, kMeshAxes> sent_before;
  for (int a = 0; a < kMeshAxes; ++a)
    sent_before[static_cast<size_t>(a)] = step_->wire_bytes(static_cast<MeshAxis>(a));
  const int64_t control_before = step_->mesh().control_bytes();
  const auto begin = Clock::now();
  StepMetrics m;
  m.step = step;
  m.lr = schedule_.At(step);
  const std::vector<Batch> batches = StepBatches(config_, plan_, *data_.loader, step + data_offset_,
                                                 step_->mesh().coordinate(MeshAxis::kDp));
  Allocator& allocator = *ExecutionContext::Current().allocator();
  allocator.WatchPeak(watch_next_);
  const TrainingStep::Result result = step_->Run(batches, m.lr);
  ExecutionContext::Current().Synchronize();
  if (watch_next_)
    WriteMemoryOfStep(step, communicator_.rank(), knobs_,
                      directory_->memory_path(step, communicator_.rank()), console_);
  m.seconds = Since(begin);
  m.loss = result.loss;
  m.grad_norm = result.grad_norm;
  tokens_ += result.tokens;
  m.tokens = tokens_;
  m.tokens_per_second = static_cast<double>(result.tokens) / m.seconds;
  m.host_gap_seconds = std::max(0.0, m.seconds - (profile_.total() - busy_before));
  for (int a = 0; a < kMeshAxes; ++a) {
    const auto axis = static_cast<MeshAxis>(a);
    m.wire_bytes.emplace_back(Name(axis),
                              step_->wire_bytes(axis) - sent_before[static_cast<size_t>(a)]);
  }
  m.wire_bytes.emplace_back("control", step_->mesh().control_bytes() - control_before);
  const MemoryStats memory = allocator.stats();
  for (int c = 0; c < kMemoryClasses; ++c) {
    m.peak_bytes.emplace_back(Name(static_cast<MemoryClass>(c)),
                              memory.peak[static_cast<size_t>(c)]);
  }
  m.peak_bytes.emplace_back("peak", memory.peak_total);
  const bool skip = !result.updated && config_.optim.non_finite == "skip";
  m.skipped = skip;
  if (result.updated || skip) m.validation_loss = Validate(step);
  if (metrics_) {
    metrics_->Write(m);
    tensorboard_->Write(m);
  }
  console_.Step(m, config_.run.steps, config_.run.log_every);
  if (!result.updated && !NotFinite(step, result)) return false;
  if (result.updated) skipped_in_a_row_ = 0;
  validation_loss_ = m.validation_loss;
  done_ = step;
  return true;
}

// What optim.non_finite says of a step without an update. True: the run goes on after it.
bool Run::NotFinite(int64_t step, const TrainingStep::Result& result) {
  constexpr int64_t kMostInARow = 10;
  const std::string what =
      fmt::format("the loss or the gradient's norm is not finite at step {} (loss {}, norm {})",
                  step, result.loss, result.grad_norm);
  if (config_.optim.non_finite == "skip" && ++skipped_in_a_row_ < kMostInARow) {
    console_.Warn(what + "; its update is left out");
    return true;
  }
  if (config_.optim.non_finite == "rollback") {
    RollBack(step, what);
    return false;
  }
  console_.EndProgress();
  saves_->Finish();  // what is under way is of before
  Agree(communicator_, [&] {
    Diverged(skipped_in_a_row_ == kMostInARow
                 ? fmt::format("{}, as at the {} steps before", what, kMostInARow - 1)
                 : what);
  });
  return false;
}

// Whether `saving` found the state finite. Where optim.non_finite says so, a run whose state is not
// has gone back to an older save; else that is its end.
bool Run::IsFinite(const std::function<void()>& saving) {
  try {
    saving();
    return true;
  } catch (const Error& e) {
    // Of all ranks, as saves agree.
    if (e.kind() != ErrorKind::kConfig || config_.optim.non_finite != "rollback" ||
        saves_->failed_step() == 0)
      throw;
    RollBack(saves_->failed_step(), e.message());
    return false;
  }
}

// Step `step`, or what its batch led to, is not finite.
void Run::RollBack(int64_t step, const std::string& what) {
  constexpr int64_t kMost = 3;
  try {
    saves_->Finish();
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::kConfig) throw;
    step = saves_->failed_step();  // what went wrong there has shown only now
  }
  const int64_t bad = step + data_offset_;
  Agree(communicator_, [&] {
    if (saves_->last().empty()) Diverged(what + ", and there is no save to go back to");
    if (saves_->last() == rolled_back_to_ && rollbacks_ == kMost)
      Diverged(fmt::format("{}, after {} rollbacks to {}", what, kMost, rolled_back_to_));
  });
  LoadSave();
  rollbacks_ = saves_->last() == rolled_back_to_ ? rollbacks_ + 1 : 1;
  rolled_back_to_ = saves_->last();
  data_offset_ = bad - done_;
  Agree(communicator_, [&] {
    // The file is another one now, and later events are to be forgotten.
    if (communicator_.rank() == 0) OpenMetrics();
  });
  console_.Warn(
      fmt::format("{}; back to {}, and on with the data after that step's", what, rolled_back_to_));
}

std::optional<double> Run::Validate(int64_t step) {
  const int64_t every = config_.run.validate_every;
  if (every == 0 || (step % every != 0 && step != config_.run.steps)) return std::nullopt;
  const int64_t all = data_.loader->validation_sequences();
  if (all == 0) return std::nullopt;
  const int64_t sequences = std::min(all, config_.run.validate_sequences.value_or(all));
  return Evaluate(
             sequences, plan_.micro, step_->mesh().axis(MeshAxis::kDp),
             [&](int64_t first, int64_t count) { return data_.loader->Validation(first, count); },
             [&](const Batch& batch) { return step_->SumLoss(batch); })
      .loss;
}

void Run::Save() {
  SaveInfo info;
  info.step = done_;
  info.tokens = tokens_;
  info.config = WriteConfig(config_);
  info.data_fingerprint = data_.fingerprint;
  info.updates = step_->optimizer().step();
  info.data_offset = data_offset_;
  info.epoch = (done_ + data_offset_) * config_.batch.sequences / data_.loader->train_sequences();
  const MeshShape& mesh = step_->mesh().shape();
  info.mesh = {{"dp", mesh.dp}, {"tp", mesh.tp}, {"pp", mesh.pp}, {"cp", mesh.cp}, {"ep", mesh.ep}};
  info.validation_loss = validation_loss_;
  saves_->Begin(info);
}

}  // namespace

int Train(Config config, Communicator& communicator) {
  Run run(std::move(config), communicator);
  run.Prepare();
  run.BuildFresh();
  run.CreateDirectory();
  return run.Loop();
}

int Resume(const std::string& path, Communicator& communicator) {
  Config config;
  Agree(communicator, [&] { config = LoadConfig(RunDirectory::Attach(path).config_path()); });
  config.run.dir = path;
  const int64_t steps = config.run.steps;
  Run run(std::move(config), communicator);
  if (run.OpenFinished(path)) {
    run.console().Info(fmt::format("{} is finished: step {} is its last. Saved in {}", path, steps,
                                   run.finished()));
    return 0;
  }
  run.Prepare();
  run.LoadLastSave();
  return run.Loop();
}

}  // namespace shoal

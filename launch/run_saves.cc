#include "launch/run_saves.h"

#include <thread>

#include "launch/bootstrap.h"

namespace shoal {

using Clock = std::chrono::steady_clock;

void Diverged(const std::string& what) {
  SHOAL_FAIL(ErrorKind::kConfig, "train",
             "{}: the run has diverged and was not saved. Lower optim.lr, warm up longer, or set "
             "optim.clip",
             what);
}

FullDisk WaitForRoom(const CheckpointConfig& config, const Console& console) {
  return {config.full_disk_wait, [&console](const std::string& what) { console.Alert(what); }, {}};
}

// Adds the time it lives to what training has waited for the save under way.
class RunSaves::Waiting {
 public:
  explicit Waiting(std::optional<UnderWay>& save) : save_(save), begin_(Clock::now()) {}
  ~Waiting() {
    if (save_) save_->waited += Clock::now() - begin_;
  }
  Waiting(const Waiting&) = delete;
  Waiting& operator=(const Waiting&) = delete;

 private:
  std::optional<UnderWay>& save_;
  const Clock::time_point begin_;
};

RunSaves::RunSaves(const CheckpointConfig& config, Communicator& communicator, Console& console,
                   std::string directory, TrainingStep& step, std::function<void()> before_commit)
    : config_(config),
      communicator_(communicator),
      console_(console),
      directory_(std::move(directory)),
      step_(step),
      before_commit_(std::move(before_commit)) {
  Agree(communicator_, [&] {
    SaverOptions options;
    options.staging = config_.staging;
    options.full_disk = WaitForRoom(config_, console_);
    saver_.emplace(directory_, PlanPart(communicator_.rank(), step_.State(true)), options);
    if (config_.async && config_.every > 0) saver_->Warm();
  });
  const auto mine = static_cast<double>(saver_->plan().layout.size);
  all_bytes_ = static_cast<int64_t>(communicator_.Sum(mine));
  largest_file_ = static_cast<int64_t>(communicator_.Max(mine));
  step_.set_before_update([this] {
    const Waiting waiting(under_way_);
    saver_->WaitCopied();
  });
}

RunSaves::~RunSaves() { step_.set_before_update(nullptr); }

void RunSaves::set_last(const std::string& save) {
  last_ = save;
  console_.SetLastSave(save);
}

void RunSaves::Begin(const SaveInfo& info) {
  if (under_way_) {
    console_.Info(
        fmt::format("save of step {} waits for that of step {}", info.step, under_way_->info.step));
    Finish();
  }
  console_.Info(fmt::format("save of step {} requested", info.step));
  failed_step_ = 0;
  under_way_ = UnderWay{info, Clock::now()};
  {
    const Waiting waiting(under_way_);
    Agree(communicator_, [&] { saver_->Begin(info.step, OnHost(step_.State(true))); });
  }
  if (!config_.async) Finish();
}

bool RunSaves::Busy() const {
  if (!under_way_) return false;
  return !(under_way_->committing ? saver_->Committed() : saver_->Written());
}

void RunSaves::Advance(bool any_rank_busy) {
  if (!under_way_ || any_rank_busy) return;
  try {
    if (!under_way_->committing) return CommitParts();
    Agree(communicator_, [&] { saver_->TakeCommit(); });
  } catch (const Error&) {
    failed_step_ = under_way_->info.step;
    if (communicator_.rank() == 0) AbandonSave(directory_, failed_step_);
    under_way_.reset();
    throw;
  }
  const int64_t step = under_way_->info.step;
  if (communicator_.rank() != 0) under_way_->durable = Clock::now();
  const std::chrono::duration<double> took = under_way_->durable - under_way_->requested;
  set_last(SavePath(directory_, step));
  console_.Info(fmt::format("save of step {} durable after {:.2f} s; training waited {:.2f} s",
                            step, took.count(), under_way_->waited.count()));
  under_way_.reset();
}

void RunSaves::CommitParts() {
  std::string part;
  Agree(communicator_, [&] {
    try {
      part = saver_->TakePart();
    } catch (const Error& e) {
      if (e.kind() == ErrorKind::kConfig) Diverged(e.message());
      throw;
    }
  });
  const std::vector<std::string> parts = communicator_.AllGatherStrings(part);
  under_way_->committing = true;
  if (communicator_.rank() != 0) return;
  saver_->Commit([this, parts, info = under_way_->info](const FullDisk& full_disk) {
    before_commit_();
    CommitSave(directory_, info, parts, full_disk);
    under_way_->durable = Clock::now();
    // What cannot be deleted costs room and nothing else.
    try {
      PruneSaves(directory_, {config_.keep, config_.keep_every, config_.keep_best});
    } catch (const std::exception& e) {
      console_.Alert(fmt::format("{}: old saves cannot be deleted: {}", directory_, e.what()));
    }
  });
}

void RunSaves::Finish() {
  while (under_way_) {
    const bool busy = communicator_.Max(Busy() ? 1 : 0) > 0;
    const Waiting waiting(under_way_);
    if (busy)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    else
      Advance(false);
  }
}

}  // namespace shoal

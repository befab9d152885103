// The directory that a run lives in:
//   config.toml (resolved) · plan.json · metrics.jsonl · log/rank-N.log · checkpoints/ ·
//   TensorBoard events · lock
// It appears under its name only when it is complete, so a directory with that name is a run.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace shoal {

class RunDirectory {
 public:
  // Rank 0 of a new run, of which a save takes `save_bytes`, its largest file `largest_file`.
  // Error(kStorage) if there is a run already, or anything that is not an empty directory, or no
  // space; then nothing is left behind.
  static RunDirectory Create(const std::string& path, std::string_view config_toml,
                             std::string_view plan_json, int64_t save_bytes = 0,
                             int64_t largest_file = 0);
  // Rank 0 of a run that goes on.
  static RunDirectory Open(const std::string& path);
  // The other ranks and readers; takes no lock.
  static RunDirectory Attach(const std::string& path);

  // Deletes it with all that is in it: of a run that has not begun.
  void Remove();

  ~RunDirectory();
  RunDirectory(RunDirectory&& other) noexcept;
  RunDirectory& operator=(RunDirectory&&) = delete;

  const std::string& path() const { return path_; }
  std::string config_path() const { return path_ + "/config.toml"; }
  std::string plan_path() const { return path_ + "/plan.json"; }
  // Pictures of a pipeline's last step; only if there is one.
  std::string pipeline_path() const { return path_ + "/pipeline.json"; }
  std::string metrics_path() const { return path_ + "/metrics.jsonl"; }
  std::string checkpoints_path() const { return CheckpointsPath(path_); }
  static std::string CheckpointsPath(const std::string& run) { return run + "/checkpoints"; }
  std::string log_path(int rank) const;
  // What a rank had in memory at the peak of a step, if somebody asked.
  std::string memory_path(int64_t step, int rank) const;
  std::string sample_path() const { return path_ + "/sample.txt"; }
  std::string report_path() const { return path_ + "/report.html"; }

 private:
  RunDirectory(std::string path, int lock) : path_(std::move(path)), lock_(lock) {}

  std::string path_;
  int lock_ = -1;  // holds the lock; the system frees it with the process, however that ends
};

}  // namespace shoal

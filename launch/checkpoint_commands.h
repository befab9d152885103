// `shoal ckpt ...`: what saves hold, whether they are whole, what differs between two, and models
// from and to Hugging Face directories; told to a person or as JSON. One rank does the work.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace shoal {

// A run's saves, newest first, each held against its digests.
int CkptLsCommand(const std::string& run, bool json);
// The same of a run's saves or of one save; 73 if one is damaged.
int CkptVerifyCommand(const std::string& path, bool json);
// Two saves (of a run its newest), tensor by tensor, whatever layouts wrote them; 1 if they differ.
int CkptDiffCommand(const std::string& a, const std::string& b, bool json);
// Deletes what is older than the run's `keep` newest whole saves.
int CkptPruneCommand(const std::string& run, int64_t keep, bool json);

struct CkptExportArguments {
  std::string path;  // a run or a save
  std::string out;
  std::optional<std::string> dtype, tokenizer;
  std::string shard_size = "5GB";
};
int CkptExportCommand(const CkptExportArguments& arguments, bool json);
int CkptImportCommand(const std::string& directory, const std::string& out, bool json);

}  // namespace shoal

#include "checkpoint/store.h"

#include <sys/resource.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>
#include <set>

#include "checkpoint/manifest.h"
#include "checkpoint/part.h"
#include "core/base/atomic_file.h"
#include "core/base/error.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;

constexpr const char *kPartial = ".partial", *kOld = ".old", *kDoomed = ".doomed";

std::string Directory(int64_t step) { return fmt::format("step-{:08}", step); }

// Runs f, which uses the file system, and names what fails there.
template <class F>
auto Storing(F&& f) {
  try {
    return f();
  } catch (const fs::filesystem_error& e) {
    FailFile(e.path1(), e.code().message());
  }
}

bool IsValid(const std::string& save) {
  try {
    CheckSave(save);
    return true;
  } catch (const Error&) {
    return false;
  }
}

// Out of its name first: a save that is half deleted must not look like a save.
void Delete(const std::string& save) {
  const std::string doomed = save + kDoomed;
  std::error_code error;
  fs::remove_all(doomed, error);
  fs::rename(save, doomed, error);
  if (!error) fs::remove_all(doomed, error);
}

}  // namespace

std::string SavePath(const std::string& directory, int64_t step) {
  return fs::path(directory) / Directory(step);
}

std::string PartialSave(const std::string& directory, int64_t step) {
  return SavePath(directory, step) + kPartial;
}

void BeginSave(const std::string& directory, int64_t step) {
  Storing([&] {
    const std::string partial = PartialSave(directory, step);
    fs::remove_all(partial);
    fs::create_directory(partial);
  });
}

std::string WritePart(const std::string& directory, int64_t step, int rank,
                      const StateDict& state) {
  const PartPlan plan = PlanPart(rank, state);
  PartFile file(PartialSave(directory, step), plan, {});
  PartImage image(plan, state);
  struct Free {
    void operator()(char* data) const { std::free(data); }
  };
  const auto size = static_cast<size_t>(kChunkBytes);
  const std::unique_ptr<char, Free> chunk(
      static_cast<char*>(std::aligned_alloc(kDirectBytes, size)));
  while (image.left() > 0) file.Append(chunk.get(), image.Next(chunk.get(), kChunkBytes));
  return file.Finish();
}

std::string CommitSave(const std::string& directory, const SaveInfo& info,
                       const std::vector<std::string>& parts, const FullDisk& full_disk) {
  const fs::path final_path = SavePath(directory, info.step);
  const fs::path partial = PartialSave(directory, info.step);
  const std::string text = ManifestText(info, parts);
  Storing([&] {
    {
      File manifest = File::Create(partial / kManifest);
      manifest.Write(text.data(), std::ssize(text), 0, full_disk);
      manifest.Flush();
    }
    SyncDirectory(partial);
    // An older save of this step steps aside. Between the two renames both are whole, and
    // RecoverSaves finds the older.
    const fs::path old = final_path.string() + kOld;
    fs::remove_all(old);
    if (fs::exists(final_path)) fs::rename(final_path, old);
    fs::rename(partial, final_path);
    SyncDirectory(directory);
    fs::remove_all(old);
  });
  return final_path;
}

void AbandonSave(const std::string& directory, int64_t step) {
  std::error_code ignored;
  fs::remove_all(PartialSave(directory, step), ignored);
}

std::string SaveState(const std::string& directory, const SaveInfo& info, const StateDict& state) {
  try {
    BeginSave(directory, info.step);
    return CommitSave(directory, info, {WritePart(directory, info.step, 0, state)});
  } catch (...) {
    AbandonSave(directory, info.step);
    throw;
  }
}

std::vector<SaveEntry> ListSaves(const std::string& directory) {
  std::map<int64_t, std::string> found;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(directory, error)) {
    const std::string name = entry.path().filename();
    if (const auto step = StepOfName(name)) found[*step] = entry.path();
    // Its successor did not come to its name.
    if (const auto step = StepOfName(name, kOld)) found.emplace(*step, entry.path());
  }
  std::vector<SaveEntry> saves;
  for (auto it = found.rbegin(); it != found.rend(); ++it) {
    int64_t bytes = 0;
    for (const auto& file : fs::directory_iterator(it->second, error))
      bytes += static_cast<int64_t>(file.file_size(error));
    saves.push_back({it->second, it->first, bytes});
  }
  return saves;
}

void PruneSaves(const std::string& directory, const Retention& retention) {
  const std::vector<SaveEntry> saves = ListSaves(directory);
  std::vector<SaveEntry> valid;
  std::set<int64_t> kept;
  std::optional<std::pair<double, int64_t>> best;
  for (const SaveEntry& save : saves) {
    try {
      const SaveInfo info = CheckSave(save.path);
      if (retention.verify) VerifySave(save.path);
      valid.push_back(save);
      if (info.validation_loss && (!best || *info.validation_loss < best->first))
        best = {*info.validation_loss, save.step};
    } catch (const Error&) {
    }
  }
  const auto newest = static_cast<size_t>(std::max<int64_t>(retention.keep, 2));
  if (valid.size() <= newest) return;
  const int64_t oldest_kept = valid[newest - 1].step;
  if (retention.keep_best && best) kept.insert(best->second);
  for (const SaveEntry& save : saves) {
    const bool every = retention.keep_every > 0 && save.step % retention.keep_every == 0;
    if (save.step < oldest_kept && !every && kept.count(save.step) == 0) Delete(save.path);
  }
}

void RecoverSaves(const std::string& directory) {
  std::vector<fs::path> left;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(directory, error)) {
    const std::string name = entry.path().filename();
    if (name.starts_with("step-") && !StepOfName(name)) left.push_back(entry.path());
  }
  for (const fs::path& path : left) {
    const std::string name = path.filename();
    const auto old = StepOfName(name, kOld);
    if (old && !fs::exists(path.parent_path() / Directory(*old), error) && IsValid(path)) {
      Storing([&] { fs::rename(path, path.parent_path() / Directory(*old)); });
    } else if (old || StepOfName(name, kPartial) || name.ends_with(kDoomed)) {
      Storing([&] { fs::remove_all(path); });
    }
  }
}

void CheckFreeSpace(const std::string& directory, int64_t bytes, int64_t largest_file) {
  struct statvfs info;
  if (statvfs(directory.c_str(), &info) != 0) FailFile(directory, std::strerror(errno));
  const auto megabytes = [](auto n) { return static_cast<double>(n) / 1e6; };
  rlimit limit;
  if (getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur < static_cast<rlim_t>(largest_file)) {
    FailFile(
        directory,
        fmt::format("a save takes a file of {:.1f} MB and this process may write files of {:.1f} "
                    "MB at most; raise the limit (ulimit -f)",
                    megabytes(largest_file), megabytes(limit.rlim_cur)));
  }
  const auto free_bytes = static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize);
  if (free_bytes < bytes) {
    FailFile(
        directory,
        fmt::format(
            "a save takes {:.1f} MB and {:.1f} MB are free; make room, or set run.dir elsewhere",
            megabytes(bytes), megabytes(free_bytes)));
  }
}

}  // namespace shoal

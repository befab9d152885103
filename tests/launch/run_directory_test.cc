#include "launch/run_directory.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>

#include "core/base/error.h"
#include "tests/launch/temporary_directory.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

std::string Mistake(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kStorage) << e.what();
    return e.message();
  }
  return "";
}

int Entries(const std::string& path) {
  int n = 0;
  for ([[maybe_unused]] const auto& entry : fs::directory_iterator(path)) ++n;
  return n;
}

TEST(RunDirectory, HoldsWhatARunNeeds) {
  const TemporaryDirectory tmp;
  const std::string path = tmp.path() + "/new/parents/run";
  {
    const RunDirectory run = RunDirectory::Create(path, "a = 1\n", "{}");
    EXPECT_EQ(run.path(), path);
    EXPECT_EQ(ReadText(run.config_path()), "a = 1\n");
    EXPECT_EQ(ReadText(run.plan_path()), "{}");
    EXPECT_EQ(ReadText(run.metrics_path()), "");
    EXPECT_TRUE(fs::is_directory(run.checkpoints_path()));
    EXPECT_EQ(run.log_path(3), path + "/log/rank-3.log");
    EXPECT_TRUE(fs::is_directory(path + "/log"));
    EXPECT_EQ(Entries(tmp.path() + "/new/parents"), 1) << "a temporary name is left";
  }
  EXPECT_EQ(RunDirectory::Open(path).path(), path);
}

TEST(RunDirectory, TakesAnEmptyDirectoryAndATrailingSlash) {
  const TemporaryDirectory tmp;
  fs::create_directory(tmp.path() + "/empty");
  RunDirectory::Create(tmp.path() + "/empty/", "c", "p");
  EXPECT_TRUE(fs::exists(tmp.path() + "/empty/config.toml"));
  EXPECT_EQ(Entries(tmp.path()), 1);
  fs::create_directory(tmp.path() + "/real");
  fs::create_symlink("real", tmp.path() + "/link");
  RunDirectory::Create(tmp.path() + "/link", "c", "p");
  EXPECT_TRUE(fs::exists(tmp.path() + "/real/config.toml"));
}

TEST(RunDirectory, RefusesWhatIsThere) {
  const TemporaryDirectory tmp;
  const std::string run = tmp.path() + "/run";
  RunDirectory::Create(run, "first", "p");
  const auto create = [](const std::string& path) {
    return Mistake([&] { RunDirectory::Create(path, "second", "p"); });
  };
  EXPECT_THAT(create(run), HasSubstr("shoal resume " + run));
  EXPECT_EQ(ReadText(run + "/config.toml"), "first");
  std::ofstream(tmp.path() + "/file") << "x";
  EXPECT_THAT(create(tmp.path() + "/file"), HasSubstr("is a file"));
  EXPECT_THAT(create(tmp.path() + "/file/below"), HasSubstr("cannot create"));
  EXPECT_THAT(create(tmp.path()), HasSubstr("not empty"));
  EXPECT_EQ(Entries(tmp.path()), 2);
}

TEST(RunDirectory, ReadersSayWhatIsMissing) {
  const TemporaryDirectory tmp;
  EXPECT_THAT(Mistake([&] { RunDirectory::Open(tmp.path() + "/none"); }), HasSubstr("not exist"));
  EXPECT_THAT(Mistake([&] { RunDirectory::Open(tmp.path()); }), HasSubstr("no config.toml"));
  EXPECT_FALSE(fs::exists(tmp.path() + "/lock"));
  std::ofstream(tmp.path() + "/file") << "x";
  EXPECT_THAT(Mistake([&] { RunDirectory::Attach(tmp.path() + "/file"); }),
              HasSubstr("not a directory"));
}

TEST(RunDirectory, OneProcessAtATime) {
  const TemporaryDirectory tmp;
  const std::string path = tmp.path() + "/run";
  {
    RunDirectory first = RunDirectory::Create(path, "c", "p");
    const RunDirectory moved = std::move(first);
    EXPECT_THAT(Mistake([&] { RunDirectory::Open(path); }), HasSubstr("is in use by process "));
    EXPECT_EQ(RunDirectory::Attach(path).path(), path);
  }
  const RunDirectory again = RunDirectory::Open(path);
  EXPECT_THAT(Mistake([&] { RunDirectory::Open(path); }), HasSubstr("is in use"));
}

TEST(RunDirectory, LockDiesWithItsProcess) {
  const TemporaryDirectory tmp;
  const std::string path = tmp.path() + "/run";
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  const pid_t child = fork();
  if (child == 0) {
    const RunDirectory run = RunDirectory::Create(path, "c", "p");
    if (write(ready[1], "x", 1) != 1) _exit(1);
    pause();
    _exit(0);
  }
  char byte;
  ASSERT_EQ(read(ready[0], &byte, 1), 1);
  EXPECT_THAT(Mistake([&] { RunDirectory::Open(path); }), HasSubstr("in use"));
  kill(child, SIGKILL);
  EXPECT_EQ(Mistake([&] { RunDirectory::Open(path); }), "");
  waitpid(child, nullptr, 0);
  close(ready[0]);
  close(ready[1]);
}

// Runs f in a child in which no file may be longer than `bytes`; returns its exit status.
int WithFileSizeLimit(rlim_t bytes, const std::function<int()>& f) {
  const pid_t child = fork();
  if (child == 0) {
    signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {bytes, bytes};
    setrlimit(RLIMIT_FSIZE, &limit);
    _exit(f());
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(RunDirectory, NothingIsLeftWhereThereIsNoSpace) {
  const TemporaryDirectory tmp;
  const std::string path = tmp.path() + "/some/where/run";
  const int code = WithFileSizeLimit(4096, [&] {
    try {
      RunDirectory::Create(path, std::string(100000, '#'), "p");
    } catch (const Error& e) {
      return std::string(e.what()).find("run.dir") == std::string::npos
                 ? 1
                 : static_cast<int>(e.kind());
    }
    return 0;
  });
  EXPECT_EQ(code, 73);
  EXPECT_EQ(Entries(tmp.path()), 0);
}

TEST(RunDirectory, NoPlaceForASave) {
  const TemporaryDirectory tmp;
  EXPECT_THAT(
      Mistake([&] { RunDirectory::Create(tmp.path() + "/some/run", "c", "p", int64_t{1} << 60); }),
      HasSubstr("no place for run.dir"));
  EXPECT_EQ(Entries(tmp.path()), 0);
}

TEST(RunDirectory, ReadOnlyPlace) {
  const TemporaryDirectory tmp;
  EXPECT_THAT(Mistake([] { RunDirectory::Create("/proc/shoal/run", "c", "p"); }),
              HasSubstr("cannot create"));
  EXPECT_THAT(
      Mistake([&] { RunDirectory::Create(tmp.path() + "/" + std::string(300, 'x'), "c", "p"); }),
      HasSubstr("cannot create"));
  EXPECT_EQ(Entries(tmp.path()), 0);
}

TEST(RunDirectory, RemovesWhatAKilledCreationLeft) {
  const TemporaryDirectory tmp;
  const std::string stale = tmp.path() + "/run.partial-abc123",
                    other = tmp.path() + "/run2.partial-x";
  for (const std::string& path : {stale, other}) {
    fs::create_directory(path);
    std::ofstream(path + "/config.toml") << "half";
    fs::last_write_time(path, fs::file_time_type::clock::now() - std::chrono::hours(1));
  }
  RunDirectory::Create(tmp.path() + "/run", "c", "p");
  EXPECT_FALSE(fs::exists(stale));
  EXPECT_TRUE(fs::exists(other));
}

}  // namespace
}  // namespace shoal

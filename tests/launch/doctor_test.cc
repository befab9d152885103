#include "launch/doctor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/base/build_config.h"
#include "tests/launch/temporary_directory.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;

const Check& Named(const std::vector<Check>& checks, const std::string& name) {
  for (const Check& check : checks)
    if (check.name == name) return check;
  throw std::out_of_range(name);
}

TEST(Doctor, LooksAtThisMachine) {
  const TemporaryDirectory tmp;
  const std::vector<Check> checks = CheckMachine(tmp.path());
  EXPECT_EQ(Named(checks, "storage").status == Check::kFail, false)
      << Named(checks, "storage").found;
  EXPECT_THAT(Named(checks, "memory").found, HasSubstr("available"));
  EXPECT_THAT(Named(checks, "cores").found, HasSubstr("usable of"));
  EXPECT_TRUE(std::filesystem::is_empty(tmp.path())) << "something is left behind";
}

TEST(Doctor, APlaceThatCannotBeWrittenFails) {
  const Check check = Named(CheckMachine("/proc"), "storage");
  EXPECT_EQ(check.status, Check::kFail);
  EXPECT_THAT(check.found, HasSubstr("/proc: creating a file fails"));
  EXPECT_NE(check.advice, "");
  EXPECT_EQ(Named(CheckMachine("/nonexistent"), "storage").status, Check::kFail);
}

TEST(Doctor, TellsItAsTextAndJson) {
  const std::vector<Check> checks = {{Check::kOk, "a", "good \xff", ""},
                                     {Check::kWarn, "bcd", "middling", "do x"},
                                     {Check::kFail, "e", "bad", "do y"}};
  EXPECT_EQ(CheckText({checks[1], checks[2]}, false),
            "warn  bcd  middling\n           do x\nFAIL  e    bad\n           do y\n");
  const auto json = nlohmann::json::parse(CheckJson(checks));
  EXPECT_EQ(json["ok"], false);
  EXPECT_EQ(json["checks"][1]["status"], "warn");
  EXPECT_EQ(json["checks"][2]["advice"], "do y");
  EXPECT_EQ(nlohmann::json::parse(CheckJson({checks[1]}))["ok"], true);
}

TEST(Doctor, LibrariesWork) {
  const TemporaryDirectory tmp;
  const std::vector<Check> checks = CheckLibraries(tmp.path());
  EXPECT_EQ(Named(checks, "HDF5").status, kHaveHdf5 ? Check::kOk : Check::kFail);
  EXPECT_EQ(Named(checks, "MPI").status, kHaveMpi ? Check::kOk : Check::kWarn)
      << Named(checks, "MPI").found;
  EXPECT_TRUE(std::filesystem::is_empty(tmp.path())) << "something is left behind";
  EXPECT_EQ(Named(CheckLibraries("/proc"), "HDF5").status, Check::kFail);
}

TEST(Doctor, CommandPrintsOneObject) {
  ::testing::internal::CaptureStdout();
  const int code = DoctorCommand(true);
  const auto json = nlohmann::json::parse(::testing::internal::GetCapturedStdout());
  EXPECT_EQ(json["ok"], code == 0);
  EXPECT_GE(json["checks"].size(), 9);
}

}  // namespace
}  // namespace shoal

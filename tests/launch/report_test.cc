#include "launch/report.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>

#include "core/base/error.h"
#include "core/base/html.h"
#include "core/base/philox.h"
#include "launch/chart.h"
#include "launch/config.h"
#include "launch/metrics.h"
#include "launch/run_directory.h"
#include "tests/launch/temporary_directory.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

struct Synthetic {
  int64_t steps = 600;
  int64_t planned = 600;
  int64_t validate_every = 100;
  int64_t bad_step = 0;
  std::string sample = "In the beginning God created the heaven <and> the earth & \xff.\n";
};

// A run directory as training would leave it, with a loss that falls and is noisy.
void WriteRun(const std::string& path, const Synthetic& s) {
  Config config = LoadConfig(SHOAL_SOURCE_DIR "/examples/quickstart.toml");
  config.run.steps = s.planned;
  const RunDirectory run =
      RunDirectory::Create(path, WriteConfig(config), R"({"ranks": [{"rank": 0}, {"rank": 1}]})");
  std::ofstream metrics(run.metrics_path(), std::ios::binary);
  for (int64_t step = 1; step <= s.steps; ++step) {
    const auto noise = [&](uint64_t stream) {
      return UniformFromWord(PhiloxWord({1, stream}, static_cast<uint64_t>(step))) - 0.5;
    };
    const double t = static_cast<double>(step) / static_cast<double>(s.planned);
    StepMetrics m;
    m.step = step;
    m.loss = 1.45 + 4.1 * std::exp(-t * 14) + 0.25 * std::exp(-t * 2) + 0.12 * noise(1);
    m.grad_norm = 0.4 + 0.1 * noise(2);
    m.lr = 2e-3 * std::min(t / 0.07, 0.55 + 0.45 * std::cos(3.1415926 * t));
    m.tokens = step * 4096;
    m.seconds = 0.3 + 0.05 * noise(3) + (step == 1);
    m.tokens_per_second = 4096 / m.seconds;
    m.peak_bytes = {{"parameters", 7 << 20},
                    {"gradients", 7 << 20},
                    {"optimizer", 21 << 20},
                    {"activations", (step < 100 ? 88 : 96) << 20},
                    {"communication", 3 << 20},
                    {"workspace", 12 << 20},
                    {"peak", (step < 100 ? 131 : 140) << 20}};
    m.wire_bytes = {{"dp", 7 << 20}, {"tp", 0}, {"pp", 0}, {"cp", 0}, {"ep", 0}, {"control", 48}};
    if (s.validate_every && step % s.validate_every == 0) m.validation_loss = m.loss + 0.03;
    if (step == s.bad_step) m.loss = m.grad_norm = std::numeric_limits<double>::quiet_NaN();
    metrics << ToJsonLine(m) << '\n';
  }
  if (!s.sample.empty()) std::ofstream(run.sample_path()) << s.sample;
}

std::string Page(const Synthetic& s) {
  const TemporaryDirectory tmp;
  WriteRun(tmp.path() + "/run", s);
  return RenderReport(tmp.path() + "/run");
}

int Count(const std::string& text, const std::string& what) {
  int n = 0;
  for (size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) ++n;
  return n;
}

// Tags that are opened are closed, and nothing is asked for from outside.
void CheckPage(const std::string& page) {
  for (const char* tag : {"html", "head", "body", "style", "figure", "svg", "table", "tr", "td",
                          "pre", "div", "p", "h1", "h2", "details"})
    EXPECT_EQ(Count(page, fmt::format("<{}>", tag)) + Count(page, fmt::format("<{} ", tag)),
              Count(page, fmt::format("</{}>", tag)))
        << tag;
  for (const char* outside : {"http:", "https:", "<script", "src=", "url(", "@import", "<link"})
    EXPECT_THAT(page, Not(HasSubstr(outside)));
  for (const char* spoiled : {"nan", "inf ", "inf\"", "-nan"})
    EXPECT_EQ(Count(page.substr(page.find("<body>")), std::string(" ") + spoiled), 0) << spoiled;
  EXPECT_EQ(Count(page, "<figure>"), 4);
}

TEST(Report, TellsARun) {
  const std::string page = Page({});
  CheckPage(page);
  EXPECT_THAT(page, HasSubstr("Finished: step 600 of 600."));
  EXPECT_THAT(page, HasSubstr("created the heaven &lt;and&gt; the earth &amp; \xef\xbf\xbd."));
  EXPECT_THAT(page, HasSubstr("2.46M"));
  EXPECT_THAT(page, HasSubstr("bits per byte"));
  EXPECT_THAT(page, HasSubstr("140 MiB"));
  EXPECT_THAT(page, HasSubstr("<td>Ranks</td><td>2</td>"));
  std::ofstream(SHOAL_BINARY_DIR "/report-sample.html") << page;
}

TEST(Report, UnusualRuns) {
  const std::string none = Page({.steps = 0, .sample = ""});
  CheckPage(none);
  EXPECT_THAT(none, HasSubstr("No step has been measured yet"));
  EXPECT_THAT(none, Not(HasSubstr("A text it wrote")));
  std::ofstream(SHOAL_BINARY_DIR "/report-none.html") << none;

  const std::string one = Page({.steps = 1, .planned = 1});
  CheckPage(one);
  EXPECT_THAT(one, HasSubstr("Finished: step 1 of 1."));
  std::ofstream(SHOAL_BINARY_DIR "/report-one.html") << one;

  const std::string bad = Page({.steps = 120, .bad_step = 120});
  CheckPage(bad);
  EXPECT_THAT(bad, HasSubstr("Diverged"));
  EXPECT_THAT(bad, HasSubstr("step 120: not finite"));
  std::ofstream(SHOAL_BINARY_DIR "/report-diverged.html") << bad;

  EXPECT_THAT(Page({.steps = 300}),
              HasSubstr("Not finished: step 300 of 600. To go on: shoal resume"));
  CheckPage(Page({.steps = 59, .validate_every = 1}));
}

TEST(Report, AHundredThousandSteps) {
  const std::string page =
      Page({.steps = 100000, .planned = 100000, .validate_every = 50, .bad_step = 4321});
  CheckPage(page);
  EXPECT_LT(page.size(), 400000);
  EXPECT_THAT(page, HasSubstr("step 4321: not finite"));
  std::ofstream(SHOAL_BINARY_DIR "/report-long.html") << page;
}

TEST(Report, DamagedRuns) {
  const TemporaryDirectory tmp;
  const std::string path = tmp.path() + "/run";
  WriteRun(path, {});
  std::ofstream(path + "/metrics.jsonl", std::ios::app) << "{\"step\": 601, \"lo";
  EXPECT_THAT(RenderReport(path), HasSubstr("1 line of metrics.jsonl could not be read"));
  std::ofstream(path + "/plan.json") << "garbage";
  std::ofstream(path + "/config.toml") << "[run]\nstpes = <3>\n";
  const std::string page = RenderReport(path);
  CheckPage(page);
  EXPECT_THAT(page, HasSubstr("config.toml cannot be read"));
  EXPECT_THAT(page, HasSubstr("stpes = &lt;3&gt;"));
  std::filesystem::remove(path + "/metrics.jsonl");
  std::filesystem::remove(path + "/plan.json");
  CheckPage(RenderReport(path));
  std::filesystem::remove(path + "/config.toml");
  EXPECT_THROW(RenderReport(path), Error);
}

TEST(Report, CommandWritesThePage) {
  const TemporaryDirectory tmp;
  const std::string path = tmp.path() + "/run";
  WriteRun(path, {.steps = 3});
  ::testing::internal::CaptureStdout();
  EXPECT_EQ(ReportCommand(path, "", true), 0);
  EXPECT_EQ(::testing::internal::GetCapturedStdout(),
            fmt::format("{{\"path\":\"{}/report.html\",\"steps\":3}}\n", path));
  EXPECT_EQ(ReadText(path + "/report.html"), RenderReport(path));
  EXPECT_THROW(ReportCommand(path, "/nonexistent/report.html", false), Error);
}

// --- charts

std::vector<Point> Noise(int n) {
  std::vector<Point> points;
  for (int i = 0; i < n; ++i)
    points.push_back({static_cast<double>(i + 1), UniformFromWord(PhiloxWord({3, 4}, i))});
  return points;
}

TEST(Chart, ThinningKeepsExtremesAndGaps) {
  for (const int n : {0, 1, 2, 399, 400, 401, 5000, 100000}) {
    std::vector<Point> points = Noise(n);
    if (n > 300) {
      points[200].y = 99;
      points[250].y = -99;
      points[300].y = std::nan("");
    }
    const std::vector<Point> thin = Thin(points, 100);
    EXPECT_LE(thin.size(), std::max<size_t>(500, 0));
    if (n == 0) continue;
    EXPECT_EQ(thin.front().x, points.front().x);
    EXPECT_EQ(thin.back().x, points.back().x);
    for (size_t i = 1; i < thin.size(); ++i) EXPECT_LT(thin[i - 1].x, thin[i].x);
    if (n <= 300) continue;
    const auto has = [&](auto&& f) { return std::ranges::any_of(thin, f); };
    EXPECT_TRUE(has([](const Point& p) { return p.y == 99; }));
    EXPECT_TRUE(has([](const Point& p) { return p.y == -99; }));
    EXPECT_TRUE(has([](const Point& p) { return std::isnan(p.y); }));
  }
}

TEST(Chart, SmoothingIsAMeanOfNeighbours) {
  EXPECT_TRUE(Smooth({}, 5).empty());
  std::vector<Point> points = {{1, 1}, {2, 2}, {3, 6}, {4, 2}, {5, 4}};
  std::vector<Point> smooth = Smooth(points, 2);
  EXPECT_EQ(smooth[0].y, 1);
  EXPECT_EQ(smooth[1].y, 3);
  EXPECT_EQ(smooth[2].y, 10.0 / 3);
  EXPECT_EQ(smooth[4].y, 3);
  points[2].y = std::nan("");
  EXPECT_EQ(Smooth(points, 2)[2].y, 2);
  for (Point& p : points) p.y = std::nan("");
  EXPECT_TRUE(std::isnan(Smooth(points, 2)[2].y));
}

TEST(Chart, TicksAreRound) {
  EXPECT_EQ(Ticks(0, 10, 5, false), (std::vector<double>{0, 2, 4, 6, 8, 10}));
  EXPECT_EQ(Ticks(0, 1, 5, false).size(), 6);
  EXPECT_EQ(Ticks(0, 1024, 4, true), (std::vector<double>{0, 256, 512, 768, 1024}));
  EXPECT_EQ(Ticks(3, 3, 5, false), (std::vector<double>{3}));
  for (double high = 1e-12; high < 1e15; high *= 3.7) {
    const size_t n = Ticks(0, high, 5, false).size();
    EXPECT_GE(n, 2) << high;
    EXPECT_LE(n, 8) << high;
  }
}

TEST(Chart, TextIsEscaped) {
  EXPECT_EQ(EscapeHtml("a<b>&\"c\""), "a&lt;b&gt;&amp;&quot;c&quot;");
  EXPECT_EQ(EscapeHtml("caf\xc3\xa9 \xf0\x9f\x98\x80"), "caf\xc3\xa9 \xf0\x9f\x98\x80");
  EXPECT_EQ(EscapeHtml("\xc3"), "\xef\xbf\xbd");
  EXPECT_EQ(EscapeHtml("\x80"
                       "a"),
            "\xef\xbf\xbd"
            "a");
  EXPECT_EQ(EscapeHtml(std::string("\0", 1)), "\xef\xbf\xbd");
}

}  // namespace
}  // namespace shoal

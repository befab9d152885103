// Line charts as inline SVG, drawn here so that a report needs nothing from outside. Colors come
// from the page's style sheet (classes s0 ... s7), so they follow its light or dark scheme.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace shoal {

struct Point {
  double x, y;
};

struct Series {
  enum Style { kLine, kFaint, kDots };  // kFaint: behind the others, not in the legend
  std::string name;
  int color = 0;
  Style style = kLine;
  std::vector<Point> points;  // x ascending; a y that is not finite breaks the line
};

struct ChartOptions {
  std::string title;
  std::string note;  // beside the title
  std::function<std::string(double)> y_text;
  bool from_zero = false;  // the y axis begins at 0
  bool binary = false;     // ticks at powers of two: bytes
  double x_last = 0;       // the x axis goes at least this far: the steps of a run that is not done
  std::vector<double> bad;  // x to be marked: steps that went wrong
};

std::string DrawChart(const ChartOptions& options, const std::vector<Series>& series);

// At most four points for each of `columns` parts of the x range: the first, lowest, highest and
// last, and one that breaks the line if there was one. No extreme is lost.
std::vector<Point> Thin(const std::vector<Point>& points, int columns);
// Mean over about the given number of neighbours, finite ones only.
std::vector<Point> Smooth(const std::vector<Point>& points, int neighbours);

// Round values from `low` to `high`, about `count` of them.
std::vector<double> Ticks(double low, double high, int count, bool binary);

}  // namespace shoal

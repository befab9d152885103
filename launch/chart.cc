#include "launch/chart.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/base/html.h"
#include "launch/console.h"

namespace shoal {
namespace {

constexpr double kWidth = 640, kHeight = 260;
constexpr double kLeft = 62, kRight = 14, kTop = 10, kBottom = 26;
constexpr size_t kMostDots = 40;  // more hide each other and the line
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Axis {
  double low = 0, high = 1, begin = 0, end = 1;  // values, and where they are drawn
  double operator()(double v) const {
    return begin + (end - begin) * (high > low ? (v - low) / (high - low) : 0.5);
  }
};

// "15.0k" -> "15k": a tick's value is round.
std::string WithoutZeros(std::string text) {
  const size_t point = text.find('.');
  if (point == std::string::npos) return text;
  size_t end = point + 1;
  while (end < text.size() && text[end] >= '0' && text[end] <= '9') ++end;
  size_t keep = end;
  while (text[keep - 1] == '0') --keep;
  if (text[keep - 1] == '.') --keep;
  return text.erase(keep, end - keep);
}

// A point without neighbours is no line.
std::string LonePoints(const Series& series, const Axis& x, const Axis& y) {
  std::string html;
  const auto finite = [&](size_t i) {
    return i < series.points.size() && std::isfinite(series.points[i].y);
  };
  for (size_t i = 0; i < series.points.size(); ++i)
    if (finite(i) && !finite(i + 1) && (i == 0 || !finite(i - 1)))
      html += fmt::format("<circle class=\"s{}\" cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3\"/>\n",
                          series.color, x(series.points[i].x), y(series.points[i].y));
  return html;
}

std::string Path(const std::vector<Point>& points, const Axis& x, const Axis& y) {
  std::string path;
  bool pen_down = false;
  for (const Point& p : points) {
    if (!std::isfinite(p.y)) {
      pen_down = false;
      continue;
    }
    path += fmt::format("{}{:.1f} {:.1f}", pen_down ? 'L' : 'M', x(p.x), y(p.y));
    pen_down = true;
  }
  return path;
}

}  // namespace

std::vector<Point> Thin(const std::vector<Point>& points, int columns) {
  if (points.size() <= static_cast<size_t>(columns) * 4) return points;
  std::vector<Point> out;
  const double low = points.front().x;
  const double scale = columns / std::max(points.back().x - low, 1e-300);
  for (size_t begin = 0; begin < points.size();) {
    const auto column = [&](size_t i) {
      return std::min<int64_t>(columns - 1, static_cast<int64_t>((points[i].x - low) * scale));
    };
    size_t end = begin + 1;
    while (end < points.size() && column(end) == column(begin)) ++end;
    std::vector<size_t> keep = {begin, end - 1};
    size_t least = end, most = end, broken = end;
    for (size_t i = begin; i < end; ++i) {
      if (!std::isfinite(points[i].y)) {
        broken = i;
        continue;
      }
      if (least == end || points[i].y < points[least].y) least = i;
      if (most == end || points[i].y > points[most].y) most = i;
    }
    for (const size_t i : {least, most, broken})
      if (i != end) keep.push_back(i);
    std::ranges::sort(keep);
    keep.erase(std::unique(keep.begin(), keep.end()), keep.end());
    for (const size_t i : keep) out.push_back(points[i]);
    begin = end;
  }
  return out;
}

std::vector<Point> Smooth(const std::vector<Point>& points, int neighbours) {
  const auto n = static_cast<int64_t>(points.size());
  // Prefix sums make the cost independent of the width.
  std::vector<double> sum(points.size() + 1), count(points.size() + 1);
  for (size_t i = 0; i < points.size(); ++i) {
    const bool finite = std::isfinite(points[i].y);
    sum[i + 1] = sum[i] + (finite ? points[i].y : 0);
    count[i + 1] = count[i] + finite;
  }
  std::vector<Point> out(points.size());
  for (int64_t i = 0; i < n; ++i) {
    // At the start, where curves are steep, the window shrinks at both sides alike so that it does
    // not lean; at the end it keeps its left half, or the last value would be one step's.
    const int64_t left = std::min(int64_t{neighbours} / 2, i), right = std::min(left, n - 1 - i);
    const auto begin = static_cast<size_t>(i - left), end = static_cast<size_t>(i + right + 1);
    const double finite = count[end] - count[begin];
    out[static_cast<size_t>(i)] = {points[static_cast<size_t>(i)].x,
                                   finite > 0 ? (sum[end] - sum[begin]) / finite : kNaN};
  }
  return out;
}

std::vector<double> Ticks(double low, double high, int count, bool binary) {
  const double rough = (high - low) / count;
  if (!(rough > 0) || !std::isfinite(rough)) return {low};
  double step;
  if (binary) {
    step = std::exp2(std::ceil(std::log2(rough)));
  } else {
    const double power = std::pow(10, std::floor(std::log10(rough)));
    step = power * 10;
    for (const double factor : {1.0, 2.0, 2.5, 5.0})
      if (factor * power >= rough * 0.999) {
        step = factor * power;
        break;
      }
  }
  std::vector<double> ticks;
  for (double i = std::ceil(low / step - 1e-9); i * step <= high + step * 1e-9; ++i)
    ticks.push_back(i * step + 0.0);  // never -0
  return ticks;
}

std::string DrawChart(const ChartOptions& options, const std::vector<Series>& series) {
  Axis x{kNaN, options.x_last > 0 ? options.x_last : kNaN, kLeft, kWidth - kRight};
  Axis y{options.from_zero ? 0 : kNaN, options.from_zero ? 0 : kNaN, kHeight - kBottom, kTop};
  bool any = false;
  for (const Series& s : series)
    for (const Point& p : s.points) {
      x.low = std::fmin(x.low, p.x);
      x.high = std::fmax(x.high, p.x);
      if (!std::isfinite(p.y)) continue;
      any = true;
      y.low = std::fmin(y.low, p.y);
      y.high = std::fmax(y.high, p.y);
    }
  std::string html = fmt::format("<figure><figcaption><b>{}</b> <span>{}</span></figcaption>\n",
                                 EscapeHtml(options.title), EscapeHtml(options.note));
  if (!any) return html + "<p class=\"none\">not measured</p></figure>\n";

  // A flat line goes through the middle, or stands on zero.
  const double room =
      y.high > y.low ? (y.high - y.low) * 0.05 : std::max(1e-12, std::abs(y.high)) * 0.5;
  y.high += room;
  if (!options.from_zero) y.low = y.low >= 0 ? std::max(0.0, y.low - room) : y.low - room;

  html += "<div class=\"legend\">";
  for (const Series& s : series)
    if (s.style != Series::kFaint && !s.name.empty()) {
      std::string last;
      for (const Point& p : s.points)
        if (std::isfinite(p.y)) last = options.y_text(p.y);
      html += fmt::format("<span><i class=\"s{}\"></i>{} <em>{}</em></span>", s.color,
                          EscapeHtml(s.name), EscapeHtml(last));
    }
  html +=
      fmt::format("</div>\n<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{} over steps\">\n",
                  kWidth, kHeight, EscapeHtml(options.title));
  for (const double tick : Ticks(y.low, y.high, 5, options.binary))
    html += fmt::format(
        "<line class=\"grid\" x1=\"{}\" x2=\"{}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/><text class=\"y\" "
        "x=\"{}\" y=\"{:.1f}\">{}</text>\n",
        kLeft, kWidth - kRight, y(tick), y(tick), kLeft - 7, y(tick) + 4,
        EscapeHtml(WithoutZeros(options.y_text(tick))));
  for (const double tick : Ticks(x.low, x.high, 6, false)) {
    if (tick != std::floor(tick)) continue;  // steps are whole
    html += fmt::format("<text class=\"x\" x=\"{:.1f}\" y=\"{}\">{}</text>\n", x(tick), kHeight - 8,
                        WithoutZeros(ShortNumber(tick)));
  }
  html += fmt::format("<text class=\"y\" x=\"{}\" y=\"{}\">step</text>\n", kLeft - 7, kHeight - 8);
  html += fmt::format("<line class=\"axis\" x1=\"{0}\" x2=\"{1}\" y1=\"{2}\" y2=\"{2}\"/>\n", kLeft,
                      kWidth - kRight, kHeight - kBottom);
  for (const double bad : options.bad)
    html += fmt::format(
        "<line class=\"bad\" x1=\"{0:.1f}\" x2=\"{0:.1f}\" y1=\"{1}\" y2=\"{2}\"><title>step {3}: "
        "not finite</title></line>\n",
        x(bad), kTop, kHeight - kBottom, bad);
  constexpr int kColumns = static_cast<int>(kWidth - kLeft - kRight);
  for (const Series& s : series) {
    html += fmt::format("<path class=\"s{}{}\" d=\"{}\"/>\n", s.color,
                        s.style == Series::kFaint ? " faint" : "",
                        Path(Thin(s.points, kColumns), x, y));
    if (s.style != Series::kDots || s.points.size() > kMostDots) {
      html += LonePoints(s, x, y);
      continue;
    }
    for (const Point& p : s.points)
      if (std::isfinite(p.y))
        html += fmt::format(
            "<circle class=\"s{}\" cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3\"><title>step {}: "
            "{}</title></circle>\n",
            s.color, x(p.x), y(p.y), p.x, EscapeHtml(options.y_text(p.y)));
  }
  return html + "</svg></figure>\n";
}

}  // namespace shoal

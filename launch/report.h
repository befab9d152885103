// `shoal report RUN`: one page about a run, from the files in its directory alone. It holds its
// drawings and its style, and asks for nothing from outside.
#pragma once

#include <string>

namespace shoal {

// The page. Works for any state of a run: no metrics yet, one step, diverged, a hundred thousand
// steps. Error(kStorage) if `run` is no run directory.
std::string RenderReport(const std::string& run);

// Writes the page to `output` (empty: report.html in the run) and says where it is; with json as
// one object {"path", "steps"}.
int ReportCommand(const std::string& run, const std::string& output, bool json);

}  // namespace shoal

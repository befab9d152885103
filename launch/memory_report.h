// What is alive at a moment, in words: the largest tensors, alike ones in one line, and sums by
// module. The one report of `plan`, of report.html, of a run that is asked, and of a run that has
// no more memory.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/allocator.h"
#include "launch/console.h"

namespace shoal {

// Alike: of one class, dtype, shape, op and pass, in the same module of whatever block.
struct MemoryLine {
  int count = 0;
  int64_t bytes = 0;         // of all of them
  std::string memory_class;  // "activations"
  std::string what;          // "f32 [12, 64, 288]", or "scratch"
  std::string module;        // "blocks.*.mlp.up", or a parameter's name; empty: of none
  std::string op, pass;      // "linear", "backward"; may be empty
  std::string knob;          // what shrinks it: `memory.recompute = "full"`; empty: unknown
  // Its place in the code, whatever its size.
  std::string Site() const { return memory_class + '|' + module + '|' + op + '|' + pass; }
};

struct MemoryReport {
  int rank = 0;
  int64_t bytes = 0;
  std::vector<MemoryLine> tensors;                       // most bytes first
  std::vector<std::pair<std::string, int64_t>> modules;  // the same; "blocks" is all of them
};

MemoryReport Summarise(std::span<const LiveBlock> live);

// The ten largest lines, and the modules.
std::string MemoryText(const MemoryReport& report);
std::string MemoryHtml(const MemoryReport& report);

// What was alive at the peak of a step that the current allocator has watched, and `knobs`, to a
// file. If that cannot be, a line says so: no run ends for it.
void WriteMemoryOfStep(int64_t step, int rank, const std::string& knobs, const std::string& path,
                       const Console& console);

// "peak_rank", "peak_tensors" and "peak_modules" of plan.json, of the ten largest lines.
void WriteMemory(const MemoryReport& report, nlohmann::ordered_json* plan);
// What that wrote; empty if there is nothing of the kind.
MemoryReport ReadMemory(const nlohmann::ordered_json& plan);

}  // namespace shoal

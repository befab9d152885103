// "Did you mean": the nearest of a list of names.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace shoal {

// Insertions, deletions, substitutions and swaps of neighbours that lead from a to b.
int EditDistance(std::string_view a, std::string_view b);

// The name nearest to `typed`, the first of equals; empty if none is near enough to be meant.
std::string Nearest(std::string_view typed, const std::vector<std::string>& names);

}  // namespace shoal

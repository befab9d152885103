// Text for HTML and SVG.
#pragma once

#include <string>
#include <string_view>

namespace shoal {

// Bytes that are not UTF-8 become U+FFFD.
std::string EscapeHtml(std::string_view text);

}  // namespace shoal

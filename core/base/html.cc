#include "core/base/html.h"

namespace shoal {

std::string EscapeHtml(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const auto c = static_cast<unsigned char>(text[i]);
    // Length of the UTF-8 sequence here, 0 if it is none. Overlong forms are harmless in text.
    size_t length = c < 0x80                ? 1
                    : c >= 0xf0 && c < 0xf5 ? 4
                    : c >= 0xe0 && c < 0xf0 ? 3
                    : c >= 0xc2 && c < 0xe0 ? 2
                                            : 0;
    for (size_t k = 1; k < length; ++k)
      if (i + k >= text.size() || (static_cast<unsigned char>(text[i + k]) & 0xc0) != 0x80)
        length = 0;
    if (length == 0 || (c < 0x20 && c != '\n' && c != '\t')) {
      out += "\xef\xbf\xbd";
      i += 1;
      continue;
    }
    if (c == '&')
      out += "&amp;";
    else if (c == '<')
      out += "&lt;";
    else if (c == '>')
      out += "&gt;";
    else if (c == '"')
      out += "&quot;";
    else
      out += text.substr(i, length);
    i += length;
  }
  return out;
}

}  // namespace shoal

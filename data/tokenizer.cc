#include "data/tokenizer.h"

#include <algorithm>

#include "data/sentencepiece_tokenizer.h"

namespace shoal {

std::vector<int32_t> Tokenizer::Encode(std::string_view text) const {
  std::vector<int32_t> all;
  EncodeTo(text,
           [&](std::span<const int32_t> ids) { all.insert(all.end(), ids.begin(), ids.end()); });
  return all;
}

void ByteTokenizer::EncodeTo(std::string_view text, const Sink& sink) const {
  constexpr size_t kPart = 1 << 16;
  std::vector<int32_t> ids(std::min(kPart, text.size()));
  for (size_t begin = 0; begin < text.size(); begin += kPart) {
    const std::string_view part = text.substr(begin, kPart);
    for (size_t i = 0; i < part.size(); ++i) ids[i] = static_cast<unsigned char>(part[i]);
    sink(std::span(ids).first(part.size()));
  }
}

std::string ByteTokenizer::Decode(std::span<const int32_t> ids) const {
  std::string text;
  text.reserve(ids.size());
  for (const int32_t id : ids) {
    if (id >= 0 && id < 256)
      text += static_cast<char>(id);
    else if (id != kEndOfDocument)
      text += "\xEF\xBF\xBD";
  }
  return text;
}

std::unique_ptr<Tokenizer> MakeTokenizer(const std::string& name) {
  if (name == "bytes") return std::make_unique<ByteTokenizer>();
  return std::make_unique<SentencePieceTokenizer>(name);
}

}  // namespace shoal

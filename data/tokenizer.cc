#include "data/tokenizer.h"

#include "data/sentencepiece_tokenizer.h"

namespace shoal {

std::vector<int32_t> ByteTokenizer::Encode(std::string_view text) const {
  std::vector<int32_t> ids(text.size());
  for (size_t i = 0; i < text.size(); ++i) ids[i] = static_cast<unsigned char>(text[i]);
  return ids;
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

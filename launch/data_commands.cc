#include "launch/data_commands.h"

#include <fmt/core.h>

#include <iostream>
#include <nlohmann/json.hpp>

namespace shoal {

using nlohmann::ordered_json;

int DataBuildCommand(const BuildOptions& options, bool json) {
  const BuildResult r = BuildDataset(options);
  if (json) {
    std::cout << ordered_json({{"files", r.files},
                               {"tokenizer", r.tokenizer},
                               {"dtype", r.dtype},
                               {"text_bytes", r.text_bytes},
                               {"documents", r.documents},
                               {"tokens", r.tokens},
                               {"vocab", r.vocab}})
                     .dump()
              << '\n';
    return 0;
  }
  for (const std::string& file : r.files) fmt::print("wrote {}\n", file);
  fmt::print("{} tokens ({}) of {} bytes of text in {} documents\n", r.tokens, r.dtype,
             r.text_bytes, r.documents);
  fmt::print("Next: data.path = \"{}\", data.tokenizer = \"{}\", model.vocab = {} or more\n",
             options.output, r.tokenizer, r.vocab);
  return 0;
}

int DataInspectCommand(const std::string& path, const std::string& tokenizer, bool json) {
  const auto decoder = MakeTokenizer(tokenizer);
  CorpusOptions options;
  options.path = path;
  options.tokenizer = decoder.get();
  const DatasetSummary s = InspectDataset(options);
  if (json) {
    const ordered_json object = {
        {"path", s.info.path},          {"format", s.info.format},
        {"dtype", s.info.dtype},        {"stored_bytes", s.info.stored_bytes},
        {"tokens", s.tokens},           {"documents", s.documents},
        {"smallest_id", s.smallest_id}, {"largest_id", s.largest_id},
        {"fingerprint", s.fingerprint}, {"samples", s.samples}};
    std::cout << object.dump(-1, ' ', false, ordered_json::error_handler_t::replace) << '\n';
    return 0;
  }
  fmt::print("{}: {} tokens as {} ({}), {} bytes\n", s.info.path, s.tokens, s.info.dtype,
             s.info.format, s.info.stored_bytes);
  if (s.documents >= 0) fmt::print("{} documents\n", s.documents);
  fmt::print("ids {} to {}, fingerprint {}\n", s.smallest_id, s.largest_id, s.fingerprint);
  for (const std::string& sample : s.samples) fmt::print("---\n{}\n", sample);
  return 0;
}

}  // namespace shoal

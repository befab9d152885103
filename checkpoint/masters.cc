#include "checkpoint/masters.h"

#include <algorithm>

#include "optim/zero/zero.h"

namespace shoal {
namespace {

std::string Named(const char* state, const std::string& parameter) {
  return fmt::format("optim/{}/{}", state, parameter);
}

// The parameter whose `state` it is; empty if it is none's.
std::string ParameterOf(const StateEntry& entry, const char* state) {
  const std::string prefix = Named(state, "");
  return entry.name.starts_with(prefix) ? entry.name.substr(prefix.size()) : "";
}

// The same elements of another tensor of the save.
StateEntry Like(const StateEntry& entry, const std::string& name, DType dtype) {
  StateEntry like = entry;
  like.name = name;
  like.tensor = Tensor::Empty(entry.tensor.shape(), dtype, MemoryClass::kWorkspace);
  return like;
}

// From its halves in the save.
void LoadJoined(SaveReader& save, const StateEntry& master, const std::string& parameter) {
  const StateEntry nearest = Like(master, "model/" + parameter, DType::kBF16);
  const StateEntry rest = Like(master, Named(ZeroOptimizer::kSplitMaster, parameter), DType::kI16);
  save.Load({nearest, rest});
  const Tensor whole = Tensor::Empty(master.tensor.shape(), DType::kF32, MemoryClass::kWorkspace);
  for (int64_t i = 0; i < whole.numel(); ++i)
    whole.data<float>()[i] = Join(nearest.tensor.data<BF16>()[i], rest.tensor.data<int16_t>()[i]);
  master.tensor.CopyFrom(whole);
}

// `rest`, and the weight with the same elements in `state`, from a whole master of the save.
void LoadSplit(SaveReader& save, const StateDict& state, const StateEntry& rest,
               const std::string& parameter) {
  const StateEntry whole = Like(rest, Named(ZeroOptimizer::kMaster, parameter), DType::kF32);
  const auto begin = [](const StateEntry& e) { return e.share ? e.share->begin : 0; };
  const auto weight = std::ranges::find_if(state, [&](const StateEntry& e) {
    return e.name == "model/" + parameter && begin(e) == begin(rest) &&
           e.tensor.numel() == rest.tensor.numel();
  });
  SHOAL_CHECK(weight != state.end(), "checkpoint", "{} has no weight beside it", rest.name);
  save.Load({whole});
  for (int64_t i = 0; i < whole.tensor.numel(); ++i) {
    const SplitFloat split = Split(whole.tensor.data<float>()[i]);
    weight->tensor.data<BF16>()[i] = split.nearest;
    rest.tensor.data<int16_t>()[i] = split.rest;
  }
}

}  // namespace

std::string WholeMaster(const std::string& name) {
  const std::string prefix = Named(ZeroOptimizer::kSplitMaster, "");
  if (!name.starts_with(prefix)) return name;
  return Named(ZeroOptimizer::kMaster, name.substr(prefix.size()));
}

void LoadRunState(const std::string& save, const StateDict& state) {
  SaveReader reader(save);
  const auto has = [&](const char* form, const std::string& parameter) {
    return !parameter.empty() && reader.dtype(Named(form, parameter)).has_value();
  };
  StateDict alike;
  std::vector<const StateEntry*> joined, split;
  for (const StateEntry& entry : state) {
    const bool here = reader.dtype(entry.name).has_value();
    if (!here && has(ZeroOptimizer::kSplitMaster, ParameterOf(entry, ZeroOptimizer::kMaster)))
      joined.push_back(&entry);
    else if (!here && has(ZeroOptimizer::kMaster, ParameterOf(entry, ZeroOptimizer::kSplitMaster)))
      split.push_back(&entry);
    else
      alike.push_back(entry);  // or it says what is missing
  }
  reader.Load(alike);
  for (const StateEntry* entry : joined)
    LoadJoined(reader, *entry, ParameterOf(*entry, ZeroOptimizer::kMaster));
  for (const StateEntry* entry : split)
    LoadSplit(reader, state, *entry, ParameterOf(*entry, ZeroOptimizer::kSplitMaster));
}

void LoadExact(SaveReader& save, const StateDict& weights) {
  for (const StateEntry& weight : weights) {
    const std::string parameter = weight.name.substr(std::string("model/").size());
    StateEntry entry = weight;
    const std::string master = Named(ZeroOptimizer::kMaster, parameter);
    if (save.dtype(master)) entry.name = master;
    if (save.dtype(Named(ZeroOptimizer::kSplitMaster, parameter)))
      LoadJoined(save, entry, parameter);
    else
      save.Load({entry});
  }
}

}  // namespace shoal

// What an op keeps for its backward. Activation memory policies (offload to the host, compression,
// sharding over ranks) enter here and nowhere else: they replace how a kept tensor is stored.
#pragma once

#include <any>
#include <functional>

#include "core/tensor.h"

namespace shoal {

// pack is called when an op keeps a tensor, unpack when its backward asks for it (once).
struct SavedTensorHooks {
  std::function<std::any(const Tensor&)> pack;
  std::function<Tensor(const std::any&)> unpack;
};

// The hooks apply to tensors kept by this thread while in scope; the innermost scope wins.
class SavedTensorScope {
 public:
  explicit SavedTensorScope(SavedTensorHooks hooks);
  ~SavedTensorScope();
  SavedTensorScope(const SavedTensorScope&) = delete;
  SavedTensorScope& operator=(const SavedTensorScope&) = delete;

 private:
  std::shared_ptr<const SavedTensorHooks> previous_;
};

class SavedTensor {
 public:
  SavedTensor() = default;
  // Keeps `t` without its place in the graph (an op that keeps its own output would else keep
  // itself). Parameters are not activations: their memory is the optimizer's affair, and hooks do
  // not see them.
  SavedTensor(const Tensor& t);  // NOLINT: ops list what they keep
  // Gives the tensor up: when nobody else shares its memory, the caller may overwrite it.
  Tensor Take();
  bool defined() const { return tensor_.defined() || packed_.has_value(); }

 private:
  Tensor tensor_;
  std::any packed_;
  std::shared_ptr<const SavedTensorHooks> hooks_;
};

}  // namespace shoal

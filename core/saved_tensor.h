// What an op keeps for its backward. Activation memory policies (offload to the host, compression,
// sharding over ranks) enter here and nowhere else: they replace how a kept tensor is stored.
#pragma once

#include <any>
#include <functional>
#include <memory>
#include <vector>

#include "core/tensor.h"

namespace shoal {

// pack is called when an op keeps a tensor, unpack when its backward asks for it (once).
struct SavedTensorHooks {
  std::function<std::any(const Tensor&)> pack;
  std::function<Tensor(const std::any&)> unpack;
  bool rounds = false;  // what comes back is not exact: see RecordOptions::exact
};

// Ops that read one value keep it each, one after the other and in one shape or another: these
// hooks give them one pack.
SavedTensorHooks PackOnce(SavedTensorHooks hooks);

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

// While in scope, this thread's ops do not keep what is cheap to compute again from tensors that
// are kept anyhow (RecordOptions::recompute): backward computes it when it asks for it.
class RematerializeScope {
 public:
  RematerializeScope();
  ~RematerializeScope();
  RematerializeScope(const RematerializeScope&) = delete;
  RematerializeScope& operator=(const RematerializeScope&) = delete;
  static bool active();

 private:
  bool previous_;
};

struct Rematerialized;

class SavedTensor {
 public:
  SavedTensor() = default;
  // Keeps `t` without its place in the graph (an op that keeps its own output would else keep
  // itself). Parameters are not activations: their memory is the optimizer's affair, and hooks do
  // not see them.
  SavedTensor(const Tensor& t, bool exact = false);  // NOLINT: ops list what they keep
  // Gives the tensor up: when nobody else shares its memory, the caller may overwrite it.
  Tensor Take();
  bool defined() const {
    return tensor_.defined() || packed_.has_value() || rematerialized_ != nullptr;
  }

 private:
  Tensor tensor_;
  std::any packed_;
  std::shared_ptr<const SavedTensorHooks> hooks_;
  std::shared_ptr<Rematerialized> rematerialized_;
  Placement placement_;  // of what is computed again
};

// An op's result that is not kept. All who would keep it share this, and the last one to ask ends
// the value.
struct Rematerialized {
  std::function<Tensor(const std::vector<Tensor>&)> compute;
  std::vector<SavedTensor> operands;
  Origin origin;
  Tensor value;  // between the first use and the last
};

}  // namespace shoal

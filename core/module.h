// A tree of named children with parameters at its nodes. Parallelisms and methods enter a model by
// walking this tree: they replace children (Replace) or hook them (hooks()).
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/parameter.h"

namespace shoal {

class Module;

// Called in the order in which they were added. Backward hooks run while gradients flow: pre when
// the gradient of the module's result has arrived, post when that of its input is done.
struct ModuleHooks {
  using Hook = std::function<void(Module&)>;
  std::vector<Hook> pre_forward, post_forward, pre_backward, post_backward;
  // Runs the forward (of one tensor), inside the other hooks; by default as it is.
  std::function<Tensor(const Tensor&, const std::function<Tensor(const Tensor&)>&)> around;
};

class Module {
 public:
  Module() = default;
  virtual ~Module() = default;
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;

  struct Child {
    std::string name;
    std::shared_ptr<Module> module;
    std::function<bool(const std::shared_ptr<Module>&)> assign;  // false: not of the slot's type
  };
  const std::vector<Child>& children() const { return children_; }
  ModuleHooks& hooks() { return hooks_; }

  // Parameters of the whole tree in the order of declaration, each once (a tied one under its first
  // name), with their dotted names set, and the modules' paths.
  std::vector<std::shared_ptr<Parameter>> Parameters();
  // As of the last call of Parameters at the root; null before. Where memory is asked for in a
  // module's forward, an OriginScope says so.
  const std::string* path() const { return path_; }
  // Calls f(dotted path, module) for this module ("") and all below, parents first.
  void Walk(const std::function<void(const std::string&, Module&)>& f);
  // Puts `module` where the child at the dotted `path` was. It must be of the type that the parent
  // calls (a UnaryModule for a Linear, and so on); anything else is an Error naming the path.
  void Replace(std::string_view path, std::shared_ptr<Module> module);

 protected:
  // In a constructor: slot = child, known as `name`. `slot` must be a member.
  template <class T, class U>
  void AddChild(std::string name, std::shared_ptr<T>& slot, std::shared_ptr<U> child) {
    slot = std::move(child);
    children_.push_back({std::move(name), slot, [&slot](const std::shared_ptr<Module>& m) {
                           auto typed = std::dynamic_pointer_cast<T>(m);
                           if (typed == nullptr) return false;
                           slot = std::move(typed);
                           return true;
                         }});
  }
  // The child is no longer part of the tree, though the member stays.
  void RemoveChild(std::string_view name);
  std::shared_ptr<Parameter> AddParameter(std::string name, std::shared_ptr<Parameter> parameter) {
    parameters_.emplace_back(std::move(name), parameter);
    return parameter;
  }
  // Runs `forward` on x inside this module's hooks.
  Tensor Hooked(const Tensor& x, const std::function<Tensor(const Tensor&)>& forward);

 private:
  std::vector<Child> children_;
  std::vector<std::pair<std::string, std::shared_ptr<Parameter>>> parameters_;
  ModuleHooks hooks_;
  const std::string* path_ = nullptr;
};

// A module from one tensor to one: what a Linear, a norm, or their replacement is.
class UnaryModule : public Module {
 public:
  Tensor operator()(const Tensor& x) {
    return Hooked(x, [this](const Tensor& in) { return Forward(in); });
  }

 protected:
  virtual Tensor Forward(const Tensor& x) = 0;
};

}  // namespace shoal

#include "core/module.h"

#include <algorithm>

namespace shoal {
namespace {

void Visit(const std::string& path, Module& module,
           const std::function<void(const std::string&, Module&)>& f) {
  f(path, module);
  for (const Module::Child& child : module.children()) {
    Visit(path.empty() ? child.name : path + "." + child.name, *child.module, f);
  }
}

// An identity whose backward calls the hooks.
Tensor BackwardHook(const char* name, Module* module, const std::vector<ModuleHooks::Hook>& hooks,
                    const Tensor& x) {
  if (hooks.empty() || !x.defined()) return x;
  return Record(name, x.Detached(), {x}, {},
                [module, &hooks](GradContext& context) {
                  for (const auto& hook : hooks) hook(*module);
                  context.Give(0, context.TakeGrad());
                },
                {.linear = true});
}

}  // namespace

void Module::Walk(const std::function<void(const std::string&, Module&)>& f) {
  Visit("", *this, f);
}

std::vector<std::shared_ptr<Parameter>> Module::Parameters() {
  std::vector<std::shared_ptr<Parameter>> all;
  Walk([&all](const std::string& path, Module& module) {
    module.path_ = path.empty() ? nullptr : Intern(path);
    for (const auto& [name, parameter] : module.parameters_) {
      if (std::find(all.begin(), all.end(), parameter) != all.end()) continue;
      parameter->set_name(path.empty() ? name : path + "." + name);
      all.push_back(parameter);
    }
  });
  return all;
}

void Module::Replace(std::string_view path, std::shared_ptr<Module> module) {
  SHOAL_CHECK(module != nullptr, "replace", "nothing to put at '{}'", path);
  const size_t dot = path.find('.');
  const std::string_view name = path.substr(0, dot);
  const auto child = std::find_if(children_.begin(), children_.end(),
                                  [&](const Child& c) { return c.name == name; });
  SHOAL_CHECK(child != children_.end(), "replace", "no child '{}' here", name);
  if (dot != std::string_view::npos)
    return child->module->Replace(path.substr(dot + 1), std::move(module));
  SHOAL_CHECK(child->assign(module), "replace",
              "the module for '{}' is not of the kind that its parent calls", name);
  child->module = std::move(module);
}

void Module::RemoveChild(std::string_view name) {
  const auto child = std::find_if(children_.begin(), children_.end(),
                                  [&](const Child& c) { return c.name == name; });
  SHOAL_CHECK(child != children_.end(), "remove", "no child '{}' here", name);
  children_.erase(child);
}

Tensor Module::Hooked(const Tensor& x, const std::function<Tensor(const Tensor&)>& forward) {
  const OriginScope here(path_);
  for (const auto& hook : hooks_.pre_forward) hook(*this);
  const Tensor in = BackwardHook("post_backward", this, hooks_.post_backward, x);
  const Tensor out = BackwardHook("pre_backward", this, hooks_.pre_backward,
                                  hooks_.around ? hooks_.around(in, forward) : forward(in));
  for (const auto& hook : hooks_.post_forward) hook(*this);
  return out;
}

}  // namespace shoal

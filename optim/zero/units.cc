// Stage 3: parameters are gathered a unit ahead of their use, and freed behind it.
#include "kernels/copy.h"
#include "optim/zero/zero.h"

namespace shoal {

void ZeroOptimizer::HookUnits(const std::vector<Module*>& modules) {
  for (size_t i = 0; i < modules.size(); ++i) {
    ModuleHooks& hooks = modules[i]->hooks();
    hooks.pre_forward.push_back([this, i](Module&) {
      ReleaseAlone();
      Ensure(units_[i]);
      if (!Last(i)) Request(units_[i + 1]);
    });
    hooks.post_forward.push_back([this, i](Module&) {
      // Backward begins with the last.
      if (!Last(i) || !GradEnabled()) Release(units_[i]);
    });
    hooks.pre_backward.push_back([this, i](Module&) {
      ReleaseAlone();
      Ensure(units_[i]);
      if (i > 0 && !Last(i - 1)) Request(units_[i - 1]);
    });
    hooks.post_backward.push_back([this, i](Module&) { Release(units_[i]); });
  }
  // Whoever looks at a parameter that nobody has announced waits for it here.
  for (Unit& unit : units_) {
    for (const Bucket* bucket : unit.buckets)
      for (Parameter* p : bucket->parameters)
        p->value().storage().set_restore([this, &unit] { Ensure(unit); });
  }
}

bool ZeroOptimizer::Last(size_t unit) const {
  return unit + 1 == modules_ || units_[unit + 1].pass != units_[unit].pass;
}

void ZeroOptimizer::Request(Unit& unit) {
  if (unit.requested) return;
  unit.requested = true;
  for (const Bucket* bucket : unit.buckets) {
    for (Parameter* p : bucket->parameters) p->value().storage().Materialize();
    for (const Slice& s : bucket->slices) {
      kernels::Copy(ExecutionContext::Current().stream(),
                    Flat(bucket->parameters[s.parameter]->value(), s.begin, s.count),
                    Flat(bucket->values, s.at, s.count));
    }
    unit.ticket = Gather(*bucket);
  }
}

void ZeroOptimizer::Ensure(Unit& unit) {
  Request(unit);
  queue_.Wait(unit.ticket);
}

void ZeroOptimizer::Release(Unit& unit) {
  if (!unit.requested) return;
  queue_.Wait(unit.ticket);
  for (const Bucket* bucket : unit.buckets) {
    for (Parameter* p : bucket->parameters) p->value().storage().Release();
  }
  unit.requested = false;
}

// Parameters that are units of their own are used between blocks, and freed at the next.
void ZeroOptimizer::ReleaseAlone() {
  for (size_t u = modules_; u < units_.size(); ++u) Release(units_[u]);
}

void ZeroOptimizer::GatherParameters() {
  for (Unit& unit : units_) Request(unit);
  queue_.WaitAll();
}

}  // namespace shoal

#include "parallel/sequence_wire.h"

#include <numeric>
#include <vector>

#include "parallel/sequence_schedule.h"

namespace shoal {

SequenceWire::SequenceWire(Communicator& ranks) {
  if (ranks.size() > 1 && !ranks.concurrent())
    SHOAL_FAIL(ErrorKind::kConfig, "sequence",
               "the MPI library lets one thread call it at a time (no MPI_THREAD_MULTIPLE), and "
               "sequence parallelism sends while it computes: set mesh.cp to 1, or start with "
               "--local-ranks");
  std::vector<int> all(static_cast<size_t>(ranks.size()));
  std::iota(all.begin(), all.end(), 0);
  group_ = ranks.Subgroup(all);
  sends_ = std::make_unique<CommQueue>(ranks);
  receives_ = std::make_unique<CommQueue>(ranks);
}

void SequenceWire::WaitForRoom() {
  if (last_send_ >= kSequenceSendsInFlight) sends_->Wait(last_send_ - kSequenceSendsInFlight + 1);
}

void SequenceWire::Send(const Tensor& buffer, int to) {
  last_send_ = sends_->Post([group = group_, buffer, to] { group->Send(buffer.view(), to); });
}

CommQueue::Ticket SequenceWire::Receive(const Tensor& buffer, int from) {
  return receives_->Post([group = group_, buffer, from] { group->Receive(buffer.view(), from); });
}

void SequenceWire::Abandon() {
  sends_->Abandon();
  receives_->Abandon();
}

void SequenceWire::set_profile(KernelProfile* profile) {
  sends_->set_profile(profile);
  receives_->set_profile(profile);
}

}  // namespace shoal

#include "parallel/sequence_wire.h"

#include "parallel/sequence_schedule.h"

namespace shoal {

SequenceWire::SequenceWire(Communicator& ranks) {
  CheckConcurrent(ranks, "sequence", "sequence parallelism sends while it computes", "mesh.cp");
  group_ = ranks.Duplicate();
  sends_ = std::make_unique<CommQueue>(ranks);
  receives_ = std::make_unique<CommQueue>(ranks);
}

void SequenceWire::WaitForRoom(size_t most) {
  if (last_send_ >= most) sends_->Wait(last_send_ - most + 1);
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

// Data parallelism: every rank holds the whole model and a share of the batch; gradients are summed
// over the ranks, bucket by bucket, while backward still computes the rest (Li et al., arXiv
// 2006.15704).
#pragma once

#include <memory>
#include <vector>

#include "core/parameter.h"
#include "parallel/communicator.h"

namespace shoal {

struct DataParallelOptions {
  int64_t bucket_bytes = int64_t{32} << 20;
};

// Hooks the parameters' gradients; must outlive every backward. Losses are normalised by the global
// number of tokens, so the sum over ranks is the gradient.
class DataParallel {
 public:
  DataParallel(std::vector<std::shared_ptr<Parameter>> parameters, Communicator& communicator,
               DataParallelOptions options = {});

  // Gives every rank the parameters of rank 0.
  void BroadcastParameters();
  // After the last micro-batch's backward: sums what no hook has (a parameter that this step did
  // not use counts as a gradient of zero), and gets ready for the next step.
  void Finish();

 private:
  struct Bucket {
    std::vector<Parameter*> parameters;
    int waiting = 0;  // parameters whose gradient is not final yet
  };
  void ReduceReady();
  void Reduce(const Bucket& bucket);

  std::vector<std::shared_ptr<Parameter>> parameters_;
  Communicator& communicator_;
  std::vector<Bucket> buckets_;
  size_t next_ = 0;  // buckets are summed in this order on every rank
};

}  // namespace shoal

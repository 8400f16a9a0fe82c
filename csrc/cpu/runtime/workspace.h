// Working memory of an op call: packed weights, partial sums, the workers' scratch.
//
// Kept from call to call, one set a calling thread. Allocated anew each time, these small blocks make the C library's
// allocator hand out a different place for every large output: on a 12.8 MB output of a 0.5 ms kernel that cost 30 to 90 %.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include <new>

namespace dwconv {
namespace {

enum class Workspace {
  kDepthwiseWeight,
  kDepthwiseBias,
  kBlockWeight,
  kPartial,
  kPartialBias,
  kChannelConstants,
  kScratch,
  kShares,
  kCount
};

class WorkspaceBlock {
 public:
  ~WorkspaceBlock() { free(data_); }
  // At least `bytes`, on a cache line; what it held before is lost. Beyond kKept it shrinks again with the next small call.
  void* get(int64_t bytes) {
    if (bytes > size_ || (size_ > kKept && bytes <= kKept)) {
      free(data_);
      size_ = (bytes + kLine) / kLine * kLine;
      data_ = aligned_alloc(kLine, size_);
      if (data_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }

 private:
  static constexpr int64_t kLine = 64, kKept = 16 << 20;
  void* data_ = nullptr;
  int64_t size_ = 0;
};

inline void* workspace(Workspace what, int64_t bytes) {
  static thread_local WorkspaceBlock blocks[static_cast<int>(Workspace::kCount)];
  return blocks[static_cast<int>(what)].get(bytes);
}

}  // namespace
}  // namespace dwconv

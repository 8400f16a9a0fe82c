// Working memory of an op call: packed weights, partial sums, the workers' scratch.
//
// Kept from call to call, one set a calling thread, of 16 MB a block at most. Allocated anew each time, these small blocks make
// the C library's allocator hand out a different place for every large output: on a 12.8 MB output of a 0.5 ms kernel that cost
// 30 to 90 %.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace dwconv {

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

// How often clear_workspaces was called: a block of a thread that did not call it is freed where that thread next asks for it,
// when nothing uses it.
inline std::atomic<uint64_t> workspaces_cleared{0};

class WorkspaceBlock {
 public:
  WorkspaceBlock() = default;
  WorkspaceBlock(const WorkspaceBlock&) = delete;
  WorkspaceBlock& operator=(const WorkspaceBlock&) = delete;
  ~WorkspaceBlock() { free(data_); }
  // At least `bytes`, on a cache line; what it held before is lost. Beyond kKept it shrinks again with the next small call.
  void* get(int64_t bytes) {
    const bool cleared = cleared_ != workspaces_cleared.load(std::memory_order_relaxed);
    if (bytes > size_ || (size_ > kKept && bytes <= kKept) || cleared) {
      clear();
      const int64_t size = (bytes + kLine) / kLine * kLine;
      data_ = aligned_alloc(kLine, size);
      if (data_ == nullptr) {
        throw std::runtime_error("dwconv_ext: DefaultCPUAllocator: can't allocate memory: Tried to allocate " +
                                 std::to_string(size) + " bytes of working memory");
      }
      size_ = size;
    }
    return data_;
  }
  void clear() {
    free(data_);
    data_ = nullptr;
    size_ = 0;
    cleared_ = workspaces_cleared.load(std::memory_order_relaxed);
  }

 private:
  static constexpr int64_t kLine = 64, kKept = 16 << 20;
  void* data_ = nullptr;
  int64_t size_ = 0;
  uint64_t cleared_ = 0;
};

struct Workspaces {
  WorkspaceBlock blocks[static_cast<int>(Workspace::kCount)];
};
inline Workspaces& thread_workspaces() {
  static thread_local Workspaces own;
  return own;
}

inline void* workspace(Workspace what, int64_t bytes) { return thread_workspaces().blocks[static_cast<int>(what)].get(bytes); }

// Not during a call of this thread.
inline void clear_workspaces() {
  workspaces_cleared.fetch_add(1, std::memory_order_relaxed);
  for (WorkspaceBlock& block : thread_workspaces().blocks) block.clear();
}

}  // namespace dwconv

// Memory of what lies between the steps of a network (ops/steps.cpp), kept from call to call: the same bytes each time, in large
// pages, found without the C library's allocator, whose lists have left the caches by the time each layer asks.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/kernels/args.h"

namespace dwconv {

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { unmap(); }

  // Forgets all blocks, and makes room for as much as the call before this one had in use at once; a large arena that no call of
  // many has half filled is made smaller.
  void begin() {
    blocks_.clear();
    const int64_t last = std::exchange(wanted_, 0);
    most_ = std::max(most_, last);
    calls_ = size_ > kKept && last < size_ / 2 ? calls_ + 1 : 0;
    if (last > size_ || calls_ == kCalls) resize(calls_ == kCalls ? most_ : last);
    if (calls_ == 0 || calls_ == kCalls) most_ = calls_ = 0;
  }

  // Gives the memory back; not during a call.
  void clear() { resize(0); }

  // The first gap that holds so many bytes; null where that lies beyond the memory there is, and then the caller's own.
  void* allocate(int64_t bytes) {
    bytes = round_up(bytes, kLine);
    int64_t at = 0;
    auto next = blocks_.begin();
    for (; next != blocks_.end() && next->begin - at < bytes; ++next) at = next->end;
    wanted_ = std::max(wanted_, at + bytes);
    char* const found = at + bytes <= size_ ? data_ + at : nullptr;
    blocks_.insert(next, {at, at + bytes, found});
    return found;
  }
  // The memory that the caller took in the place of the block that allocate() has just had none for.
  void own(const void* data) {
    for (Block& block : blocks_) {
      if (block.data == nullptr) block.data = static_cast<const char*>(data);
    }
  }
  // All blocks but those that are still kept.
  template <class Keeps>  // keeps(begin, end) of the memory
  void release_unless(Keeps keeps) {
    std::erase_if(blocks_, [&](const Block& block) { return !keeps(block.data, block.data + (block.end - block.begin)); });
  }

 private:
  static constexpr int64_t kLine = 128, kPage = 2 << 20, kSmallPage = 4096, kKept = 64 << 20, kCalls = 100;

  // Straight from the system: what the allocator hands out again lies in small pages. The end, less than a large page, does too,
  // lest a small network pays for what it does not use.
  void resize(int64_t bytes) {
    unmap();
    bytes = round_up(bytes, kSmallPage);
    if (bytes == 0) return;
#if defined(__linux__)
    void* const found = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) return;
    mapped_ = static_cast<char*>(found);
    data_ = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(mapped_), uintptr_t{kPage}));
    madvise(data_, bytes / kPage * kPage, MADV_HUGEPAGE);
#else
    mapped_ = data_ = static_cast<char*>(aligned_alloc(kSmallPage, bytes));
    if (data_ == nullptr) return;
#endif
    size_ = bytes;
  }
  void unmap() {
#if defined(__linux__)
    if (mapped_ != nullptr) munmap(mapped_, size_ + kPage);
#else
    free(mapped_);
#endif
    mapped_ = data_ = nullptr;
    size_ = 0;
  }

  struct Block {
    int64_t begin, end;  // offsets
    const char* data;
  };
  std::vector<Block> blocks_;                 // in use, in order
  char *mapped_ = nullptr, *data_ = nullptr;  // the second on a large page
  int64_t size_ = 0, wanted_ = 0;             // wanted: by the call so far
  int64_t most_ = 0, calls_ = 0;              // by the latest calls that wanted little, and how many there were
};

inline Arena& thread_arena() {
  static thread_local Arena arena;
  return arena;
}

// Where this thread's ops take their outputs from at present; null for the allocator of torch.
inline Arena*& active_arena() {
  static thread_local Arena* active = nullptr;
  return active;
}

}  // namespace dwconv

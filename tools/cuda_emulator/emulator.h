// Runs a CUDA kernel on the CPU: a block's threads are fibers (ucontext), which run until they
// reach a barrier, a warp's collective or their end, in an order that the test chooses. What a kernel may observe on a GPU it
// may observe here:
//
//   synchronize            nothing goes on before every thread has come; a thread that has ended or waits elsewhere is an error
//   copy_async             the copy happens in copy_wait, not before: a missing wait finds poison
//   load_matrices, multiply_matrices   collectives of the 32 lanes
//   multiply_group         each thread's sums, computed in complete_products from what shared memory holds then
//   shared_memory          one exact allocation a block, poisoned with NaN before each
//   wait_for_previous      an error where a launch that begins early touches memory before, or a thread ends without
//   load, store, copy_async   counted: requests, and the distinct 32-byte sectors that a block touches
//
// Blocks are independent: two host threads run them side by side.
#pragma once

#include <stdint.h>

#include <functional>
#include <string>
#include <vector>

namespace dwconv::cuda::emulator {

enum class Order { kForwards, kBackwards, kShuffled };

// A range of memory whose loads are counted under a name of its own.
struct Region {
  uintptr_t begin = 0, end = 0;
  bool activation = false;
};

struct Traffic {
  int64_t load_bytes = 0;    // of activations, distinct 32-byte sectors of each block
  int64_t store_bytes = 0;   // distinct sectors of each block
  int64_t weight_bytes = 0;  // loads of anything but activations
  int64_t requests = 0;      // accesses of single threads
  void add(const Traffic& other);
};

struct Options {
  Order order = Order::kForwards;
  uint32_t seed = 0;
  bool count = false;      // collect Traffic
  bool arithmetic = true;  // false: matrix products are skipped, where only the traffic is of interest
  std::vector<Region> regions;
};
Options& options();

// What a launch gives: an empty string, or what went wrong. `body` is called once a thread with the launch's arguments bound.
using Body = void (*)(const void* args);
// begins_early: as a programmatic dependent launch: every thread has to wait_for_previous before it touches global memory.
std::string run(Body body, const void* args, int64_t blocks, int threads, int64_t shared_bytes, Traffic* traffic,
                bool begins_early = false);

template <class Args, void (*kKernel)(Args)>
void call(const void* args) {
  kKernel(*static_cast<const Args*>(args));
}

// The calling fiber's thread, and what it may ask of its block.
struct Thread {
  int index, block_threads;
  int64_t block, grid;
  unsigned char* shared;
};
const Thread& self();
void barrier();
void warp_barrier();
void wait_for_previous();
using Collective = void (*)(void* const* operands);  // of the 32 lanes, in order
void collective(Collective function, void* operands);
void enqueue_copy(void* to, const void* from, bool valid);
void commit_copies();
void complete_copies(int pending);
void enqueue_product(std::function<void()> product);  // of the calling thread's sums
void complete_products();
void note_load(const void* from, int bytes);
void note_store(void* to, int bytes);

}  // namespace dwconv::cuda::emulator

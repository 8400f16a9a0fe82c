#include "emulator.h"

#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <thread>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace dwconv::cuda::emulator {
namespace {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kSectorBytes = 32;

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Fiber {
  ucontext_t context;  // where it begins
  jmp_buf left;        // where it goes on
  bool begun = false;
  bool has_waited = false;  // for the launch before
  void* stack = nullptr;
  State state = State::kDone;
  Thread thread = {};
  void* operands = nullptr;               // of the warp's collective under way
  Collective function = nullptr;          // null: a plain warp barrier
  std::vector<std::vector<Copy>> groups;  // committed copies under way
  std::vector<Copy> open;
  std::vector<std::function<void()>> products;
};

// One host thread's block.
struct Block {
  ucontext_t scheduler;
  jmp_buf left;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* current = nullptr;
  Body body = nullptr;
  const void* args = nullptr;
  std::vector<uint64_t> loads, stores, weights;  // sectors
  Traffic traffic;
  bool begins_early = false;
  std::string wrong;  // of accesses
  ~Block() {
    for (auto& fiber : fibers) munmap(fiber->stack, kStackBytes);
  }
};

thread_local Block* block_of_this_thread = nullptr;
Block& here() { return *block_of_this_thread; }

void complete(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    if (copy.valid) {
      memcpy(copy.to, copy.from, 16);
    } else {
      memset(copy.to, 0, 16);
    }
  }
}

// swapcontext alone would do, but it asks the system for the signal mask twice a switch, half of the emulator's time. It is what
// AddressSanitizer can follow, though.
#if defined(__SANITIZE_ADDRESS__)
void go_on(Block& block, Fiber& fiber) { swapcontext(&block.scheduler, &fiber.context); }
void leave(Block& block, Fiber& fiber) { swapcontext(&fiber.context, &block.scheduler); }
#else
void go_on(Block& block, Fiber& fiber) {
  if (_setjmp(block.left) != 0) return;
  if (fiber.begun) _longjmp(fiber.left, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}
void leave(Block& block, Fiber& fiber) {
  if (_setjmp(fiber.left) == 0) _longjmp(block.left, 1);
}
#endif

void yield(State state) {
  Block& block = here();
  Fiber& fiber = *block.current;
  fiber.state = state;
  leave(block, fiber);
}

std::string where(int64_t block, int thread) { return "block " + std::to_string(block) + ", thread " + std::to_string(thread); }

// In a launch that begins early, the launch before it has to be waited for.
void check_waited(const char* what) {
  Block& block = here();
  const Fiber& fiber = *block.current;
  if (!block.begins_early || fiber.has_waited || !block.wrong.empty()) return;
  block.wrong = where(fiber.thread.block, fiber.thread.index) + ": " + what + " before it has waited for the launch before";
}

// A fiber runs one thread after another, block after block.
void fiber_main() {
  for (;;) {
    Block& block = here();
    block.body(block.args);
    check_waited("a thread ends");
    for (const auto& group : block.current->groups) complete(group);
    complete(block.current->open);
    yield(State::kDone);
  }
}

Fiber& fiber(Block& block, int index) {
  while (static_cast<int>(block.fibers.size()) <= index) {
    auto fresh = std::make_unique<Fiber>();
    fresh->stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fresh->stack == MAP_FAILED) throw std::runtime_error("no memory for a fiber's stack");
    getcontext(&fresh->context);
    fresh->context.uc_stack.ss_sp = fresh->stack;
    fresh->context.uc_stack.ss_size = kStackBytes;
    fresh->context.uc_link = nullptr;
    makecontext(&fresh->context, fiber_main, 0);
    block.fibers.push_back(std::move(fresh));
  }
  return *block.fibers[index];
}

// Lets the lanes of a warp go on once all have come to the same collective. Returns what is wrong.
std::string release_warps(Block& block, int64_t index, int threads, bool& progress) {
  for (int first = 0; first < threads; first += kWarpSize) {
    const int lanes = std::min(kWarpSize, threads - first);
    int waiting = 0;
    for (int lane = 0; lane < lanes; ++lane) waiting += block.fibers[first + lane]->state == State::kAtWarp;
    if (waiting == 0) continue;
    if (waiting < lanes || lanes < kWarpSize) {
      return where(index, first) + ": a warp's collective that only " + std::to_string(waiting) + " of its lanes reach";
    }
    void* operands[kWarpSize];
    const Collective function = block.fibers[first]->function;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      Fiber& fiber = *block.fibers[first + lane];
      if (fiber.function != function) return where(index, first + lane) + ": lanes of a warp in different collectives";
      operands[lane] = fiber.operands;
      fiber.state = State::kReady;
    }
    if (function != nullptr) function(operands);
    progress = true;
  }
  return "";
}

std::string run_block(Block& block, int64_t index, int64_t grid, int threads, std::vector<int>& order, std::mt19937& random,
                      const std::vector<unsigned char>& poison, unsigned char* shared) {
  std::copy(poison.begin(), poison.end(), shared);
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fiber(block, i);
    f.state = State::kReady;
    f.thread = Thread{i, threads, index, grid, shared};
    f.groups.clear();
    f.open.clear();
    f.products.clear();
    f.has_waited = false;
  }
  for (;;) {
    if (options().order == Order::kShuffled) std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    int done = 0, at_barrier = 0;
    for (int i : order) {
      Fiber& f = *block.fibers[i];
      if (f.state != State::kReady) continue;
      block.current = &f;
      go_on(block, f);
      progress = true;
    }
    const std::string wrong = release_warps(block, index, threads, progress);
    if (!wrong.empty()) return wrong;
    for (int i = 0; i < threads; ++i) {
      done += block.fibers[i]->state == State::kDone;
      at_barrier += block.fibers[i]->state == State::kAtBarrier;
    }
    if (done == threads) return block.wrong;
    if (at_barrier == threads) {
      for (int i = 0; i < threads; ++i) block.fibers[i]->state = State::kReady;
    } else if (at_barrier > 0 && at_barrier + done == threads) {
      return where(index, 0) + ": a barrier that only " + std::to_string(at_barrier) + " of the block's " +
             std::to_string(threads) + " threads reach";
    } else if (!progress) {
      return where(index, 0) + ": the block's threads wait for one another";
    }
  }
}

int64_t distinct_bytes(std::vector<uint64_t>& sectors) {
  std::sort(sectors.begin(), sectors.end());
  const int64_t count = std::unique(sectors.begin(), sectors.end()) - sectors.begin();
  sectors.clear();
  return count * static_cast<int64_t>(kSectorBytes);
}

void note(std::vector<uint64_t>& sectors, const void* address, int bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  for (uint64_t sector = begin / kSectorBytes; sector <= (begin + bytes - 1) / kSectorBytes; ++sector) {
    if (sectors.empty() || sectors.back() != sector) sectors.push_back(sector);
  }
  ++here().traffic.requests;
}

}  // namespace

void Traffic::add(const Traffic& other) {
  load_bytes += other.load_bytes;
  store_bytes += other.store_bytes;
  weight_bytes += other.weight_bytes;
  requests += other.requests;
}

Options& options() {
  static Options the_options;
  return the_options;
}

const Thread& self() { return here().current->thread; }
void barrier() { yield(State::kAtBarrier); }
void warp_barrier() { collective(nullptr, nullptr); }
void wait_for_previous() { here().current->has_waited = true; }

void collective(Collective function, void* operands) {
  if (!options().arithmetic && function != nullptr) return;
  Fiber& fiber = *here().current;
  fiber.function = function;
  fiber.operands = operands;
  yield(State::kAtWarp);
}

void enqueue_copy(void* to, const void* from, bool valid) {
  if (valid) note_load(from, 16);
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (valid && reinterpret_cast<uintptr_t>(from) % 16 != 0)) {
    throw std::runtime_error("copy_async: an address that is no multiple of 16");  // ends the process: no kernel may do this
  }
  here().current->open.push_back({to, from, valid});
}
void commit_copies() {
  Fiber& fiber = *here().current;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
void complete_copies(int pending) {
  auto& groups = here().current->groups;
  const int ready = std::max(0, static_cast<int>(groups.size()) - pending);
  for (int i = 0; i < ready; ++i) complete(groups[i]);
  groups.erase(groups.begin(), groups.begin() + ready);
}

void enqueue_product(std::function<void()> product) {
  if (options().arithmetic) here().current->products.push_back(std::move(product));
}
void complete_products() {
  auto& products = here().current->products;
  for (const auto& product : products) product();
  products.clear();
}

void note_load(const void* from, int bytes) {
  check_waited("a thread reads memory");
  if (!options().count) return;
  Block& block = here();
  const uintptr_t address = reinterpret_cast<uintptr_t>(from);
  for (const Region& region : options().regions) {
    if (address >= region.begin && address < region.end && region.activation) return note(block.loads, from, bytes);
  }
  note(block.weights, from, bytes);
}
void note_store(void* to, int bytes) {
  check_waited("a thread writes memory");
  if (options().count) note(here().stores, to, bytes);
}

std::string run(Body body, const void* args, int64_t blocks, int threads, int64_t shared_bytes, Traffic* traffic,
                bool begins_early) {
  // NaN in every float type, and of a sign and payload that no kernel makes.
  std::vector<unsigned char> poison(shared_bytes, 0xff);
  std::atomic<int64_t> next = 0;
  std::mutex mutex;
  std::string wrong;
  const auto work = [&] {
    static thread_local Block block;
    block_of_this_thread = &block;
    block.body = body;
    block.args = args;
    block.traffic = {};
    block.begins_early = begins_early;
    block.wrong.clear();
    std::unique_ptr<unsigned char[]> shared(new (std::align_val_t(1024)) unsigned char[std::max<int64_t>(shared_bytes, 1)]);
    std::vector<int> order(threads);
    for (int i = 0; i < threads; ++i) order[i] = options().order == Order::kBackwards ? threads - 1 - i : i;
    for (int64_t i = next++; i < blocks; i = next++) {
      std::mt19937 random(options().seed + static_cast<uint32_t>(i));
      const std::string problem = run_block(block, i, blocks, threads, order, random, poison, shared.get());
      block.traffic.load_bytes += distinct_bytes(block.loads);
      block.traffic.store_bytes += distinct_bytes(block.stores);
      block.traffic.weight_bytes += distinct_bytes(block.weights);
      if (!problem.empty()) {
        const std::lock_guard<std::mutex> lock(mutex);
        wrong = problem;
        next = blocks;
        for (auto& fiber : block.fibers) munmap(fiber->stack, kStackBytes);
        block.fibers.clear();  // their threads stand in the middle of a kernel
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    traffic->add(block.traffic);
    ::operator delete[](shared.release(), std::align_val_t(1024));
  };
  // A second thread's fibers are made anew each time; nor is it wanted where several processes share the cores (make test).
  static const bool one_thread = getenv("OMP_NUM_THREADS") != nullptr && strcmp(getenv("OMP_NUM_THREADS"), "1") == 0;
  if (blocks > 4 && !one_thread) {
    std::thread other(work);
    work();
    other.join();
  } else {
    work();
  }
  return wrong;
}

}  // namespace dwconv::cuda::emulator

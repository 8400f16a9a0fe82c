// The tiles that a depthwise kernel may have for a problem, by what they are expected to take: plan/depthwise.cpp chooses.
#pragma once

#include "cuda/plan/plan.h"

namespace dwconv::cuda {

constexpr int64_t kChunk = 16;  // bytes

// What a tiled kernel is, as its file says.
struct Shape {
  int patch_h = 1, patch_w = 1;
  int channels = 1;                        // channels_last: a thread's
  int threads = kMostThreads, blocks = 1;  // of a block at most, and how many an SM's registers hold
  int exactly = 0;                         // threads, where a launch's other blocks decide
  double setup = 300;                      // instructions of a thread apart from its outputs
  double instructions = 0;                 // an output, its taps' multiply-adds apart
  bool rows = false;                       // without staging: a thread walks down a strip's rows
  bool filters = false;                    // in shared memory, of accumulate_size
  bool large = false;                      // filters of the input's type behind the tile
  bool transposed = false;
  bool weight = false;  // backward_weight: both tensors are staged, and the sums meet in shared memory
};
Shape shape_of(const KernelRow& row);

struct Candidate {
  Launch launch;
  Tiling tiling;
  int64_t in_rows = 0, in_columns = 0;
  int32_t in_pitch = 0, out_pitch = 0;
  bool in_whole = false, out_whole = false;
  int32_t parts = 1, groups = 1, group_blocks = 1;
  int64_t tiles = 0;
  double seconds = 1e30;
};

// Of the candidates of a row, the cheapest, or that of the forced rank; false where none fits the GPU.
bool best_candidate(const KernelRow& row, const Shape& shape, const Request& request, const Gpu& gpu, Candidate* best);
// The same of the kernels of lines.
bool best_line(const KernelRow& row, const Request& request, const Gpu& gpu, Candidate* best);

// Gives a weight gradient's candidate enough parts to fill the GPU, as long as the partial sums are a small share of the `moved`
// bytes, or one where so wanted: its parts and blocks; what the parts move. `resident`: blocks that an SM holds.
double share_parts(const DepthwiseProblem& problem, bool in_one_part, int64_t resident, double moved, const Gpu& gpu,
                   Candidate* c);
// By how much longer memory takes to move runs of so many bytes.
constexpr double penalty_of_runs(double bytes) { return bytes >= 256 ? 1.0 : bytes >= 128 ? 1.05 : bytes >= 64 ? 1.12 : 1.3; }
constexpr double kWeightSetup = 800;         // instructions of a thread, with the sums over the threads
constexpr double kSumPartsSeconds = 2.5e-6;  // of the second launch, where there are several parts
constexpr double kPartSeconds = 6e-9;        // a part: of loads of 0.4 us 64 are on their way

}  // namespace dwconv::cuda

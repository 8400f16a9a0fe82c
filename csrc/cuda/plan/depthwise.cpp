// Which kernel takes a depthwise convolution or its gradients, and the launch of its cheapest tile.

#include <algorithm>

#include "cuda/plan/depthwise_tiles.h"

namespace dwconv::cuda {
namespace {

int64_t chunks_of(const Tiling& t, int64_t values) { return t.aligned ? ceil_div(t.slab, values) : t.slab; }

std::string describe(const Candidate& c, const Request& request) {
  const Tiling& t = c.tiling;
  const KernelRow& row = *c.launch.row;
  const std::string rows = std::to_string(row.family == Family::kLines ? 1 : row.filter), columns = std::to_string(row.filter);
  return std::string(row.name) + ", " +
         (row.filter > 0 ? rows + "x" + columns + " stride " + std::to_string(row.stride)
                         : std::string("any filter at stride 1")) +
         ": " + std::to_string(t.tile_h) + "x" + std::to_string(t.tile_w) + " outputs of " + std::to_string(t.slab) +
         (request.problem.layout == Layout::kNHWC ? " channels" : " planes") + " a block";
}

// Of the rows that differ from this one, whose tile is `best`, in a thread's channels alone; and where a weight gradient of few
// threads leaves SMs idle, of the staged ones too, which have more.
const KernelRow* cheapest_like(const KernelRow& row, const Request& request, const Gpu& gpu, Candidate* best) {
  const KernelRow* chosen = &row;
  for (const KernelRow* other : kernel_table()) {
    if (other == &row || other->aligned > request.aligned) continue;
    if (misfit(*other, Op::kDepthwise, row.pass, request.problem, request.multiplier, gpu) != nullptr) continue;
    const bool few = row.pass == Pass::kBackwardWeight && best->launch.blocks < gpu.sm_count;
    const bool staged = other->family == Family::kTiles && few;
    if (!staged && (other->family != Family::kRows || row.family != Family::kRows)) continue;
    Candidate c;
    if (!best_candidate(*other, shape_of(*other), request, gpu, &c) || c.seconds >= best->seconds) continue;
    chosen = other;
    *best = c;
  }
  return chosen;
}

// The first row that fits and has a tile for this GPU; the forced one before it. `why` collects what the rows before said.
const KernelRow* choose_row(Pass pass, const Request& request, const Gpu& gpu, Candidate* best, std::string* why) {
  const DepthwiseProblem& p = request.problem;
  std::vector<const KernelRow*> order;
  if (request.forced.row != nullptr) order.push_back(request.forced.row);
  order.insert(order.end(), kernel_table().begin(), kernel_table().end());
  for (const KernelRow* row : order) {
    if (misfit(*row, Op::kDepthwise, pass, p, request.multiplier, gpu) != nullptr) continue;
    if (row->aligned > request.aligned) continue;
    if (row->family == Family::kAny) {
      if (why->empty()) *why = "no tiled kernel for this filter, stride, dilation or multiplier";
      return row;
    }
    if (row->family == Family::kLines ? best_line(*row, request, gpu, best)
                                      : best_candidate(*row, shape_of(*row), request, gpu, best)) {
      const bool alone = row == request.forced.row || p.layout == Layout::kNCHW || row->family == Family::kLines;
      return alone ? row : cheapest_like(*row, request, gpu, best);
    }
    *why =
        std::string(row->name) + " has no tile that fits " + std::to_string(gpu.shared_per_block >> 10) + " KiB of shared memory";
  }
  return nullptr;
}

void set_counts(const DepthwiseProblem& p, int64_t multiplier, LaunchPlan* plan) {
  const int64_t taps = p.kernel_h * p.kernel_w, planes = p.batch * p.channels * multiplier;
  plan->bytes = element_size(p.dtype) *
                (p.batch * p.channels * p.in_h * p.in_w + planes * p.out_h * p.out_w + p.channels * multiplier * taps);
  plan->flops = counted(2.0 * planes * p.out_h * p.out_w * taps);
}

// What the tile of a kernel in channels_last is to it, or to its part of a launch.
void set_tile(const Candidate& c, int channels, DepthwiseTileArgs* args) {
  const Tiling& t = c.tiling;
  args->tiling = t;
  if (args->problem.layout == Layout::kNCHW) return;  // its slabs are of planes, whose number has no bound
  args->slabs = Divisor(t.slabs), args->tiles_w = Divisor(t.tiles_w), args->tiles_h = Divisor(t.tiles_h);
  args->lanes = Divisor(t.slab / channels);
}
void set_tile(const Candidate& c, BackwardWeightTileArgs* args) {
  args->tiling = c.tiling;
  args->parts = c.parts;
  args->tiles = c.tiles;
}

}  // namespace

LaunchPlan plan_depthwise(Pass pass, const Request& request, const Gpu& gpu, DepthwiseTileArgs* args) {
  const DepthwiseProblem& p = request.problem;
  const bool forward = pass == Pass::kForward;
  LaunchPlan plan;
  Candidate best;
  std::string why;
  const KernelRow* const row = choose_row(pass, request, gpu, &best, &why);
  args->problem = p;
  args->multiplier = request.multiplier;
  if (row->family == Family::kAny) {
    const int64_t channels = p.channels * (forward ? request.multiplier : 1);
    const bool vectors = p.layout == Layout::kNHWC && request.aligned == kChunk && request.multiplier == 1;
    const int64_t work = p.batch * channels * p.out_h * p.out_w / (vectors ? kChunk / element_size(p.dtype) : 1);
    args->tiling = {};
    args->tiling.aligned = vectors;
    plan.launch = {row, std::clamp<int64_t>(ceil_div(work, kMostThreads), 1, int64_t{1} << 20), kMostThreads, 0};
    BlockCost cost = {};
    cost.total_bytes = static_cast<double>(element_size(p.dtype) * p.batch * channels * (p.in_h * p.in_w + p.out_h * p.out_w));
    cost.flops = 2.0 * p.batch * channels * p.out_h * p.out_w * p.kernel_h * p.kernel_w / plan.launch.blocks;
    cost.bytes = cost.total_bytes / plan.launch.blocks;
    cost.flop_rate = scalar_rate(p.dtype, gpu) * 0.2;
    plan.seconds = launch_seconds(plan.launch, cost, gpu);
    plan.reason = std::string(row->name) + ": " + why;
  } else {
    set_tile(best, shape_of(*row).channels, args);
    args->in_pitch = best.in_pitch, args->out_pitch = best.out_pitch;
    args->in_whole = best.in_whole, args->out_whole = best.out_whole;
    args->in_columns = Divisor(best.in_columns);
    const int64_t values = kChunk / element_size(p.dtype);
    if (p.layout == Layout::kNHWC) {
      args->in_chunks = Divisor(chunks_of(best.tiling, values));
    } else if (best.in_pitch > 0) {
      args->in_chunks = Divisor(ceil_div(best.in_pitch, values));
      args->out_chunks = Divisor(best.out_pitch / values);
      args->channels = Divisor(std::min(p.channels, kMostDivided));
    }
    plan.launch = best.launch;
    plan.seconds = best.seconds;
    plan.reason = describe(best, request);
  }
  set_counts(p, request.multiplier, &plan);
  return plan;
}

LaunchPlan plan_backward_weight(const Request& request, const Gpu& gpu, BackwardWeightTileArgs* args) {
  const DepthwiseProblem& p = request.problem;
  LaunchPlan plan;
  Candidate best;
  std::string why;
  const KernelRow* const row = choose_row(Pass::kBackwardWeight, request, gpu, &best, &why);
  args->problem = p;
  args->multiplier = request.multiplier;
  if (row->family == Family::kAny) {
    const int64_t outputs = p.channels * request.multiplier, groups = p.kernel_h * ceil_div(p.kernel_w, kAnyTaps);
    args->tiling = {};
    args->tiling.slabs = p.layout == Layout::kNHWC ? ceil_div(outputs, 32) : outputs;
    args->tiles = p.batch * ceil_div(p.out_h * p.out_w, kAnyPixels);
    args->parts = static_cast<int32_t>(
        std::clamp<int64_t>(4 * gpu.sm_count / (args->tiling.slabs * groups), 1, std::max<int64_t>(args->tiles, 1)));
    plan.launch = {row, args->tiling.slabs * groups * args->parts, kMostThreads,
                   kAnyTaps * kMostThreads * accumulate_size(p.dtype)};
    plan.reason = std::string(row->name) + ": " + why;
  } else {
    set_tile(best, args);
    args->groups = best.groups, args->group_blocks = best.group_blocks;
    args->in_pitch = best.in_pitch, args->out_pitch = best.out_pitch;
    args->in_whole = best.in_whole, args->out_whole = best.out_whole;
    args->in_columns = Divisor(best.in_columns), args->out_columns = Divisor(best.tiling.tile_w);
    const int64_t values = kChunk / element_size(p.dtype);
    if (p.layout == Layout::kNHWC) {
      args->in_chunks = args->out_chunks = Divisor(chunks_of(best.tiling, values));
    } else if (best.in_pitch > 0) {
      args->in_chunks = Divisor(best.in_pitch / values), args->out_chunks = Divisor(best.out_pitch / values);
    }
    plan.launch = best.launch;
    plan.seconds = best.seconds;
    plan.reason = describe(best, request);
  }
  plan.reason += args->parts == 1 ? ", in one part" : ", " + std::to_string(args->parts) + " parts";
  set_counts(p, request.multiplier, &plan);
  return plan;
}

LaunchPlan plan_backward(const Request& to_input, const Request& to_weight, const Gpu& gpu, BackwardTileArgs* args) {
  LaunchPlan plan;
  plan.seconds = 1e30;
  const KernelRow* const wanted = to_weight.forced.row;
  if (wanted != nullptr && wanted->pass != Pass::kBackward) return plan;
  for (const KernelRow* row : kernel_table()) {
    const bool fits = misfit(*row, Op::kDepthwise, Pass::kBackward, to_weight.problem, to_weight.multiplier, gpu) == nullptr;
    if (!fits || row->aligned > std::min(to_input.aligned, to_weight.aligned)) continue;
    const bool forced = row == wanted;
    Shape s = shape_of(*row);
    s.threads = kBackwardRowThreads, s.blocks = kBackwardRowBlocks;
    for (s.exactly = 32; s.exactly <= s.threads; s.exactly *= 2) {
      Candidate input, weight;
      Shape summing = s;
      summing.weight = true, summing.setup = kWeightSetup;
      if (!best_candidate(*row, s, to_input, gpu, &input) || !best_candidate(*row, summing, to_weight, gpu, &weight)) continue;
      // As long as the SMs hold all of them the longer decides; with twice as many each fills the GPU for itself.
      const int64_t blocks = input.launch.blocks + weight.launch.blocks, held = gpu.sm_count * weight.launch.blocks_per_sm;
      const double seconds =
          blocks <= held ? std::max(input.seconds, weight.seconds) : input.seconds + weight.seconds - kLaunchSeconds;
      if (seconds >= plan.seconds || (!forced && blocks > 2 * held)) continue;
      plan.launch = weight.launch;
      plan.launch.blocks = blocks;
      plan.seconds = seconds;
      args->weight_blocks = static_cast<int32_t>(weight.launch.blocks);
      args->input.problem = to_input.problem, args->weight.problem = to_weight.problem;
      set_tile(input, s.channels, &args->input);
      set_tile(weight, &args->weight);
      plan.reason = describe(weight, to_weight) + ", " + std::to_string(weight.parts) + " parts; and for the input's gradient " +
                    std::to_string(input.tiling.tile_h) + "x" + std::to_string(input.tiling.tile_w) + " of " +
                    std::to_string(input.tiling.slab) + " channels";
    }
    if (forced) return plan;
  }
  DepthwiseTileArgs input;
  BackwardWeightTileArgs weight;
  if (plan.launch.row != nullptr &&
      plan_depthwise(Pass::kForward, to_input, gpu, &input).seconds + plan_backward_weight(to_weight, gpu, &weight).seconds <=
          plan.seconds) {
    plan.launch.row = nullptr;
  }
  return plan;
}

LaunchPlan plan_sum_parts(DType dtype, int64_t weights, int64_t biases, int32_t parts, const Gpu& gpu, SumPartsArgs* args) {
  LaunchPlan plan;
  plan.launch.row = row_of(Pass::kSumParts, dtype, gpu);
  args->count[0] = weights, args->count[1] = biases;
  args->first_blocks = ceil_div(weights, 32);
  args->parts = parts;
  plan.launch.blocks = args->first_blocks + ceil_div(biases, 32);
  plan.launch.threads = kMostThreads;
  plan.launch.shared_bytes = kMostThreads * accumulate_size(dtype);
  plan.reason = std::string(plan.launch.row->name) + ": " + std::to_string(parts) + " parts in their order";
  return plan;
}

}  // namespace dwconv::cuda

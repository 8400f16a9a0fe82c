// The rows of kernels.inc as data. Each file of kernels/isa/ expands a family of an instruction set.
#pragma once

#include "cpu/kernels/args.h"

namespace dwconv {

enum class Isa : int32_t { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4, kNeon = 5, kNeonBf16 = 6 };

// What a kernel's lanes are.
enum class Family : int32_t {
  kChannels = 0,  // channels_last: channels are lanes
  kFlat,          // channels_last: elements of a row of pixels
  kTransposed,    // NCHW: planes, transposed through scratch
  kRows,          // NCHW: columns, of staged rows
  kDirect,        // NCHW: columns, read in place under masks
};

// Bytes of scratch a worker of a kernel needs.
using ScratchSize = int64_t (*)(const CpuProblem&, int64_t rows_per_tile);

// One row of the kernel table. `filter` is a square filter's side (at dilation 1); 0 in filter or stride stands for "any".
struct KernelRow {
  const char* name;
  Op op;
  Pass pass;
  Family family;
  DType dtype;
  Layout layout;
  int32_t filter, stride;
  Layout weight_order;  // of the packed weights (DepthwiseArgs)
  Isa isa;
  int32_t vector_bytes;
  ScratchSize scratch;
  DepthwiseKernel depthwise;
  BackwardWeightKernel backward_weight;
  SeparableKernel separable;
  BackwardInputKernel backward_input;
  BatchNormKernel batch_norm;
  SqueezeKernel squeeze;
  LayerNormKernel layer_norm;
  StepKernel step;
  PointwiseFormat pointwise;  // of a fused block's kernel
};

struct KernelTable {
  const KernelRow* rows;
  int32_t count;
};

}  // namespace dwconv

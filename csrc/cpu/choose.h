// Which row of the kernel tables a pass gets: a function of the problem, the instruction set and, for tests, the forced row.
// plan.cpp makes tiles of it.
#pragma once

#include <stdint.h>

#include <string_view>

#include "cpu_features.h"

namespace dwconv {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t accumulate_size(DType dtype);
const char* dtype_name(DType dtype);
const char* layout_name(Layout layout);
// The set whose depthwise and BatchNorm kernels a dtype gets: the one given, or the next below that has any.
const IsaKernels& set_of(DType dtype, const IsaKernels& isa);
int64_t lanes_of(DType dtype, const IsaKernels& isa);

int64_t input_bytes(const DepthwiseProblem& p);
int64_t output_bytes(const DepthwiseProblem& p);
// L3 does not keep both operands from call to call.
bool comes_from_memory(const DepthwiseProblem& p, const Machine& machine);

bool is_of(const KernelRow& row, std::string_view family);
inline bool is_transposed(const KernelRow& row) { return is_of(row, "_transposed"); }
inline bool is_direct(const KernelRow& row) { return is_of(row, "_direct"); }
inline bool is_rows(const KernelRow& row) { return is_of(row, "_rows"); }
inline bool is_flat(const KernelRow& row) { return is_of(row, "_flat"); }

// The first row of the family that takes the problem, in the set or those below it; the forced one where that fits.
// std::runtime_error names the rows that came nearest where there is none.
const KernelRow* choose(const IsaKernels& isa, const Machine& machine, std::string_view op, std::string_view pass,
                        const DepthwiseProblem& p, std::string_view family = "");

// NCHW: "_transposed", "_rows" or "_direct". planes: what the transposed family has to fill its vectors with.
const char* nchw_family(const IsaKernels& isa, std::string_view pass, const DepthwiseProblem& p, int64_t planes);

// channels_last's of a forward pass: "_flat", or "" where lanes are channels. The results are the same bits.
const char* nhwc_family(const IsaKernels& isa, const Machine& machine, const DepthwiseProblem& p);

// A fused block's row; in NCHW the kernel that reads and writes planes in place, where there is one, or the one that transposes.
// stage_family: nchw_family of the depthwise stage.
const KernelRow* block_row(const DepthwiseProblem& p, std::string_view stage_family, const IsaKernels& isa,
                           const Machine& machine);
// The depthwise stage within planes: a kernel whose lanes are columns.
const KernelRow* plane_stage_row(const DepthwiseProblem& stage, std::string_view family, const IsaKernels& isa,
                                 const Machine& machine);

}  // namespace dwconv

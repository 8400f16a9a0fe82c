// Which row of the kernel tables a pass gets: a function of the problem, the instruction set and, for tests, the forced row.
// plan.cpp makes tiles of it.
#pragma once

#include <stdint.h>

#include <optional>

#include "cpu/plan/machine.h"

namespace dwconv {

// The set whose depthwise and BatchNorm kernels a dtype gets: the one given, or the next below that has any.
const IsaKernels& set_of(DType dtype, const IsaKernels& isa);
int64_t lanes_of(DType dtype, const IsaKernels& isa);

int64_t input_bytes(const CpuProblem& p);
int64_t output_bytes(const CpuProblem& p);
// L3 does not keep both operands from call to call.
bool comes_from_memory(const CpuProblem& p, const Machine& machine);

// The first row of the family, or of any, that fits the problem, in the set or those below it; the forced one where that fits.
// std::runtime_error names the rows that came nearest where there is none.
const KernelRow* choose_row(const IsaKernels& isa, const Machine& machine, Op op, Pass pass, const CpuProblem& p,
                            std::optional<Family> family = {});

// The first row of each family that fits.
std::vector<const KernelRow*> fitting_rows(const IsaKernels& isa, Op op, Pass pass, const CpuProblem& p);

// kTransposed, kRows or kDirect; kChannels in channels_last. planes: what the transposed family has to fill its vectors with.
Family nchw_family(const IsaKernels& isa, Pass pass, const CpuProblem& p, int64_t planes);

// channels_last's of a forward pass: kFlat or kChannels. The results are the same bits.
Family nhwc_family(const IsaKernels& isa, const Machine& machine, const CpuProblem& p);

// A fused block's row; in NCHW the kernel that reads and writes planes in place, where there is one, or the one that transposes.
// stage_family: nchw_family of the depthwise stage.
const KernelRow* block_row(const CpuProblem& p, Family stage_family, const IsaKernels& isa, const Machine& machine);
// The depthwise stage within planes: a kernel whose lanes are columns.
const KernelRow* plane_stage_row(const CpuProblem& stage, Family family, const IsaKernels& isa, const Machine& machine);

}  // namespace dwconv

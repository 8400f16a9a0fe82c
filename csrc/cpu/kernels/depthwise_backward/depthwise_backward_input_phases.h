// The four phases of an input gradient at stride 2 together, channels last, square filters of 2 to 5 (depthwise_backward_input.h
// says what a phase is).
//
// Samples (2u + a, 2v + b) of grad_input are reached by kTaps[a] x kTaps[b] taps, from a window of grad_output at (u, v):
//
//   3x3, padding 1:  a = 0: g[u]            a = 1: g[u], g[u + 1]          9 FMAs for four samples
//   4x4, padding 1:  a = 0: g[u - 1], g[u]  a = 1: g[u], g[u + 1]         16 FMAs
//   5x5, padding 2:  a = 0: g[u - 1 .. u + 1]    a = 1: g[u], g[u + 1]     25 FMAs
//
// A register tile is one u by kPhaseColumns v's: each loaded vector of grad_output serves all phases that meet it, and the
// two rows of samples leave whole lines. Where columns are left over, the last tile lies over the one before.
#pragma once

#include "cpu/kernels/depthwise_row_pair.h"
#include "cpu/kernels/simd_lanes.h"

namespace dwconv::DWCONV_ISA {

inline constexpr int kPhaseColumns =
    DWCONV_VECTOR_REGISTERS == 32 ? 5 : 2;  // 20 sums, at most 10 taps and an input of 32 registers

// kFirst, kSecond: the taps of phases 0 and 1; shift: by how many samples phase 1's window begins later.
template <int kFirst, int kSecond, int kShift>
struct PhaseTaps {
  static constexpr int shift = kShift;
  static constexpr int window = kFirst > kSecond + shift ? kFirst : kSecond + shift;
  static constexpr int count(int phase) { return phase == 0 ? kFirst : kSecond; }
  // The tap of `phase` that meets sample w of the window, or none: -1.
  static constexpr int tap(int phase, int w) {
    const int tap = w - (phase == 0 ? 0 : shift);
    return tap >= 0 && tap < count(phase) ? tap : -1;
  }
};

// What all tiles have in common. in, out: at row and column 0 of the images, or of what is staged of them.
template <class T, class A>
struct PhasesFrame {
  const T* in;
  T* out;
  const A* weight[2][2];
  const A* bias;  // or null
  Activation activation;
  int64_t weight_pitch;
  int64_t in_h, in_w, in_row, in_step;
  int64_t out_h, out_w, out_row, out_step;
  int64_t pad_h, pad_w;  // of phase 0
  int64_t channels;
};

// Samples of base row u and columns [v, v + kPhaseColumns), one vector of channels. kEdge: columns, samples and lanes are looked
// at one by one. kEpilogue: with bias and activation, whose registers an input gradient would pay for.
template <class Taps, bool kEpilogue, class T, class A, bool kEdge>
DWCONV_INLINE void phases_vector(const PhasesFrame<T, A> f, int64_t u, int64_t v, int64_t c, int lanes) {
  constexpr int kColumns = kPhaseColumns;
  Vec<A> acc[2][2][kColumns];
  const Vec<A> start = kEpilogue && f.bias ? load(f.bias + c) : Vec<A>{};
  DWCONV_UNROLL
  for (int i = 0; i < 4 * kColumns; ++i) acc[i / (2 * kColumns)][i / kColumns % 2][i % kColumns] = start;
  DWCONV_UNROLL
  for (int i = 0; i < Taps::window; ++i) {
    const int64_t row = u - f.pad_h + i;
    if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(f.in_h)) continue;
    const T* const in = f.in + row * f.in_row + (v - f.pad_w) * f.in_step + c;
    DWCONV_UNROLL
    for (int k = 0; k < kColumns + Taps::window - 1; ++k) {
      const T* at = in + k * f.in_step;
      if (kEdge && static_cast<uint64_t>(v - f.pad_w + k) >= static_cast<uint64_t>(f.in_w)) continue;
      const Vec<A> x = load_some<!kEdge>(at, lanes);
      DWCONV_UNROLL
      for (int t = 0; t < kColumns; ++t) {
        DWCONV_UNROLL
        for (int a = 0; a < 2; ++a) {
          DWCONV_UNROLL
          for (int b = 0; b < 2; ++b) {
            if (k - t < 0 || k - t >= Taps::window) continue;
            const int r = Taps::tap(a, i), s = Taps::tap(b, k - t);
            if (r < 0 || s < 0) continue;
            acc[a][b][t] += x * load(f.weight[a][b] + (r * Taps::count(b) + s) * f.weight_pitch + c);
          }
        }
      }
    }
  }
  if constexpr (kEpilogue) {
    DWCONV_UNROLL
    for (int a = 0; a < 2; ++a) activate_all<A>(acc[a], f.activation);
  }
  DWCONV_UNROLL
  for (int a = 0; a < 2; ++a) {
    if (2 * u + a >= f.out_h) break;
    T* const out = f.out + (2 * u + a) * f.out_row + 2 * v * f.out_step + c;
    DWCONV_UNROLL
    for (int t = 0; t < kColumns; ++t) {
      DWCONV_UNROLL
      for (int b = 0; b < 2; ++b) {
        if (kEdge && 2 * (v + t) + b >= f.out_w) continue;
        store_some<!kEdge>(out + (2 * t + b) * f.out_step, acc[a][b][t], lanes);
      }
    }
  }
}

template <class Taps, bool kEpilogue, class T, class A>
DWCONV_NOINLINE void phases_row(const PhasesFrame<T, A>& frame, int64_t u) {
  constexpr int kColumns = kPhaseColumns, kVec = kLanes<A>;
  const PhasesFrame<T, A> f = frame;  // a copy, which no store can be taken to change
  const int64_t columns = (f.out_w + 1) / 2, whole = f.channels - f.channels % kVec;
  for (int64_t v = 0; v < columns; v += kColumns) {
    if (v > 0 && columns - v < kColumns) v = columns - kColumns;
    const bool inside = v >= f.pad_w && v - f.pad_w + kColumns + Taps::window - 1 <= f.in_w && 2 * (v + kColumns) <= f.out_w;
    int64_t c = 0;
    if (inside) {
      for (; c < whole; c += kVec) phases_vector<Taps, kEpilogue, T, A, false>(f, u, v, c, kVec);
    }
    for (; c < f.channels; c += kVec) phases_vector<Taps, kEpilogue, T, A, true>(f, u, v, c, lanes_left(f.channels - c, kVec));
  }
}

// Base rows [row, row + rows) of grad_input, if the problem is one of these. The problem's strides and sizes are those of `input`
// (which begins at row in_begin of grad_output) and `output` (at base row `row`), weights those of channel `first` on.
template <class T>
bool try_all_phases(const BackwardInputArgs& args, const CpuProblem& p, const T* input, int64_t in_begin, T* output, int64_t row,
                    int64_t first) {
  using A = typename AccumulateType<T>::type;
  if constexpr (!kUnrollsFilters<A>) {
    return false;
  } else {
    const CpuProblem& whole = args.problem;
    const bool square = whole.kernel_h == whole.kernel_w && whole.kernel_h >= 2 && whole.kernel_h <= 5;
    if (!square || whole.stride_h != 2 || whole.stride_w != 2 || whole.dilation_h != 1 || whole.dilation_w != 1) return false;
    if (whole.depth != 1 || args.phase_count != 4) return false;
    PhasesFrame<T, A> f;
    const InputPhase* phases[2][2];
    for (int i = 0; i < 4; ++i) {
      const InputPhase& phase = args.phases[i];
      phases[phase.first_h][phase.first_w] = &phase;
      f.weight[phase.first_h][phase.first_w] = static_cast<const A*>(phase.weight) + first;
    }
    const int64_t taps = phases[0][0]->kernel_h, shift = phases[0][0]->pad_h - phases[1][0]->pad_h;
    if (phases[0][0]->kernel_w != taps) return false;  // paddings of different parity
    if (phases[0][0]->pad_w - phases[0][1]->pad_w != shift) return false;
    if (whole.kernel_h == 2 && shift != 0) return false;
    f.in = input, f.out = output;
    f.bias = args.bias ? static_cast<const A*>(args.bias) + first : nullptr;
    f.activation = whole.activation;
    f.weight_pitch = args.weight_pitch;
    f.in_h = p.in_h, f.in_w = p.in_w, f.in_row = p.in_stride_h, f.in_step = p.in_stride_w;
    f.out_h = whole.out_h - 2 * row, f.out_w = p.out_w, f.out_row = p.out_stride_h, f.out_step = p.out_stride_w;
    f.pad_h = phases[0][0]->pad_h - row + in_begin, f.pad_w = phases[0][0]->pad_w;
    f.channels = p.channels;
    const auto run = [&]<class Taps>(Taps) {
      const bool epilogue = f.bias != nullptr || f.activation.kind != ActivationKind::kIdentity;
      const auto row = epilogue ? &phases_row<Taps, true, T, A> : &phases_row<Taps, false, T, A>;
      for (int64_t u = 0; u < args.rows_per_tile && 2 * u < f.out_h; ++u) row(f, u);
    };
    switch (whole.kernel_h) {
      case 2:
        run(PhaseTaps<1, 1, 0>{});
        break;
      case 3:
        taps == 1 ? run(PhaseTaps<1, 2, 0>{}) : run(PhaseTaps<2, 1, 1>{});
        break;
      case 4:
        shift == 0 ? run(PhaseTaps<2, 2, 0>{}) : run(PhaseTaps<2, 2, 1>{});
        break;
      default:
        taps == 3 ? run(PhaseTaps<3, 2, 1>{}) : run(PhaseTaps<2, 3, 0>{});
    }
    return true;
  }
}

}  // namespace dwconv::DWCONV_ISA

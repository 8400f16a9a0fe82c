// Numbers of the kernels' dtypes in memory that ends where nothing may be read, references in float64, and their comparison.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string>
#include <utility>
#include <vector>

#include "cpu/plan/plan.h"
#include "cpu/runtime/with_type.h"

namespace dwconv {
namespace {

// Bytes, NaN at first, right before a page without access: what a kernel reads past them is a crash. Under KERNEL_ROWS_READABLE
// it is NaN: qemu 7.2 reads what AVX's masked loads leave out.
class Memory {
 public:
  explicit Memory(int64_t bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    mapped_ = round_up(bytes, page) + page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0));
    if (base_ == MAP_FAILED) abort();
    memset(base_, 0xff, mapped_);
    const int access = getenv("KERNEL_ROWS_READABLE") != nullptr ? PROT_READ : PROT_NONE;
    if (mprotect(base_ + mapped_ - page, page, access) != 0) abort();
    data_ = base_ + mapped_ - page - bytes;
  }
  ~Memory() { munmap(base_, mapped_); }
  Memory(const Memory&) = delete;
  void operator=(const Memory&) = delete;
  void* data() const { return data_; }

 private:
  char *base_, *data_;
  int64_t mapped_;
};

using Values = std::vector<double>;

Values decoded(DType dtype, const void* data, int64_t count) {
  Values values(count);
  with_type(dtype, [&](auto zero) {
    for (int64_t i = 0; i < count; ++i) values[i] = to_accumulate(static_cast<const decltype(zero)*>(data)[i]);
  });
  return values;
}

// Random ones: in memory as a kernel reads them, and the same in float64.
struct Input {
  DType dtype;
  Memory memory;
  Values values;

  Input(DType type, int64_t count) : dtype(type), memory(count * element_size(type)) {
    static uint32_t state = 1;
    with_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      for (int64_t i = 0; i < count; ++i) {
        state = state * 1664525u + 1013904223u;
        const double value = static_cast<double>(state >> 8) / (1 << 23) - 1;
        from_accumulate(static_cast<typename AccumulateType<T>::type>(value), static_cast<T*>(memory.data()) + i);
      }
    });
    values = decoded(dtype, memory.data(), count);
  }
  const void* data() const { return memory.data(); }
  double operator[](int64_t i) const { return values[i]; }
};

DType accumulate_dtype(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// The unit roundoff; of the sums twice it, since BFDOT rounds to odd.
double roundoff(DType dtype) {
  return dtype == DType::kFloat64 ? 0x1p-53 : dtype == DType::kFloat32 ? 0x1p-24 : dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
}
double sums_roundoff(DType dtype) { return 2 * roundoff(accumulate_dtype(dtype)); }

// A sum in float64, and how far off a kernel's may be.
struct Sum {
  double value = 0, size = 0, inexact = 0;  // size: the sum of absolute values; inexact: by what its terms may be off
  int64_t terms = 0;

  void add(double a, double b, double a_bound = 0) {
    value += a * b, size += fabs(a * b), inexact += a_bound * fabs(b);
    ++terms;
  }
  double bound(DType dtype) const { return (static_cast<double>(terms) + 2) * sums_roundoff(dtype) * size + inexact; }
};

double activated(double x, const Activation& activation) {
  switch (activation.kind) {
    case ActivationKind::kIdentity:
      return x;
    case ActivationKind::kRelu:
      return fmax(x, 0);
    case ActivationKind::kRelu6:
      return fmin(fmax(x, 0), 6);
    case ActivationKind::kSilu:
      return x / (1 + exp(-x));
    case ActivationKind::kHardswish:
      return x * fmin(fmax(x + 3, 0), 6) / 6;
    case ActivationKind::kGelu:
      return x * 0.5 * erfc(-x / sqrt(2.0));
    case ActivationKind::kGeluTanh:
      return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case ActivationKind::kLeakyRelu:
      return x >= 0 ? x : x * activation.slope;
  }
  return NAN;
}
// One for all: an activation's slope is at most 1.5, and those with an exponential are within 1e-6 in float32.
double activated_bound(double x, double bound, DType dtype) {
  return 1.5 * bound + (accumulate_dtype(dtype) == DType::kFloat64 ? 1e-14 : 1e-6) * (1 + fabs(x));
}

struct Check {
  int64_t problems = 0, wrong = 0;
  double worst = 0;  // an error over its bound

  // bounds: without the rounding to the dtype
  void compare(const std::string& what, DType dtype, const void* got, const Values& wanted, const Values& bounds) {
    const Values values = decoded(dtype, got, static_cast<int64_t>(wanted.size()));
    ++problems;
    double most = 0;
    size_t at = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
      const double bound = bounds[i] + roundoff(dtype) * fabs(wanted[i]) + (dtype == DType::kFloat16 ? 0x1p-24 : 1e-37);
      const double error = fabs(values[i] - wanted[i]) / bound;
      if (!(error <= most)) most = error, at = i;
    }
    if (!(most <= worst)) worst = most;
    if (most <= 1) return;
    ++wrong;
    printf("WRONG %s: element %zu is %g, not %g (%.2g of the bound)\n", what.c_str(), at, values[at], wanted[at], most);
  }
};

}  // namespace
}  // namespace dwconv

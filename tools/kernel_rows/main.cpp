// Every row of the CPU's kernel table, forced and run on small problems against float64, without torch (__init__.py).
#include <exception>
#include <tuple>

#include "blocks.h"

namespace dwconv {
namespace {

std::string name_of(const KernelRow& row, const IsaKernels& isa, const Shape& s) {
  char text[300];
  snprintf(text, sizeof text, "%s %s %s f%d s%d on %lldx%lldx%lldx%lld, filter %lldx%lld, stride %lldx%lld", isa.name, row.name,
           dtype_name(row.dtype), row.filter, row.stride, (long long)s.batch, (long long)s.channels, (long long)s.h,
           (long long)s.w, (long long)s.kernel_h, (long long)s.kernel_w, (long long)s.stride_h, (long long)s.stride_w);
  return text;
}

// Whether the row is what the plan of the problem has.
bool check_row(const Case& on, Check* check) {
  switch (on.row.op) {
    case Op::kDepthwise:
      return on.row.pass == Pass::kForward         ? check_forward(on, check)
             : on.row.pass == Pass::kBackwardInput ? check_backward_input(on, check)
                                                   : check_backward_weight(on, check);
    case Op::kSeparable: {
      const bool block = check_separable(on, 21, false, check);
      return check_separable(on, 8, true, check) || block;
    }
    case Op::kBatchNorm:
      return on.row.dtype == DType::kFloat64 ? check_batch_norm<double>(on, check) : check_batch_norm<float>(on, check);
    case Op::kSqueezeExcitation:
      return check_squeeze(on, check);
    case Op::kLayerNorm:
      return check_layer_norm(on, check);
    case Op::kDepthwiseStep:
      return check_step(on, check);
    default:
      return false;
  }
}

int check_all() {
  Check all;
  int64_t idle = 0;
  const bool named = getenv("DWCONV_EXT_ISA") != nullptr && *getenv("DWCONV_EXT_ISA") != '\0';
  for (const IsaKernels& isa : supported_isas()) {
    if (named && &isa != &selected_isa()) continue;
    Check check;
    int64_t rows = 0, kind = 0;
    for (const KernelTable& table : isa.tables) {
      for (const KernelRow* row = table.rows; row < table.rows + table.count; ++row, ++rows) {
        force_row(row->name, row->filter, row->stride);
        bool ran = false;
        for (const Shape& shape : shapes_for(*row)) {
          set_prefetch_threshold(kind % 2 == 0 ? 0 : -1);  // inputs that come from beyond L2, and those that do not
          const Activation activation = {static_cast<ActivationKind>(kind++ % 8), 0.01};
          ran |= check_row({*row, isa, shape, activation, name_of(*row, isa, shape)}, &check);
        }
        if (ran) continue;
        ++idle;
        printf("WRONG %s: no problem's plan has it\n", name_of(*row, isa, {}).c_str());
      }
    }
    printf("%s: %lld rows, %lld results, %lld wrong, worst at %.2f of its bound\n", isa.name, (long long)rows,
           (long long)check.problems, (long long)check.wrong, check.worst);
    all.problems += check.problems, all.wrong += check.wrong;
  }
  printf("%lld passed, %lld failed\n", (long long)(all.problems - all.wrong), (long long)(all.wrong + idle));
  return all.wrong + idle == 0 && all.problems > 0 ? 0 : 1;
}

}  // namespace
}  // namespace dwconv

int main() {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  try {
    return dwconv::check_all();
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}

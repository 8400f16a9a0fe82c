// run_steps: the layers of a network one after the other, without Python or the dispatcher between them.
#define TORCH_TARGET_VERSION 0x020a000000000000
#include <torch/csrc/stable/library.h>

#include "common/packed_checks.h"
#include "common/tensors.h"
#include "cpu/ops/calls.h"
#include "cpu/runtime/arena.h"

namespace dwconv {
namespace {

constexpr const char* kOp = "run_steps";

// The steps as dwconv_ext/nn/steps.py writes them: integers for each, and beside them tensors, numbers and words, which are
// taken in order.
class Reader {
 public:
  Reader(const std::vector<Tensor>& weights, const Tensor& steps, const Tensor& numbers, const std::vector<std::string>& words)
      : weights_(weights), words_(words) {
    const bool right = steps.is_cpu() && steps.scalar_type() == ScalarType::Long && steps.dim() == 1 && steps.is_contiguous() &&
                       numbers.is_cpu() && numbers.scalar_type() == ScalarType::Double && numbers.dim() == 1 &&
                       numbers.is_contiguous();
    DWCONV_CHECK(right, kOp, ": steps must be a dense vector of int64 and numbers one of float64, on the CPU");
    at_ = static_cast<const int64_t*>(steps.const_data_ptr()), end_ = at_ + steps.numel();
    number_ = static_cast<const double*>(numbers.const_data_ptr()), last_number_ = number_ + numbers.numel();
  }

  bool more() const { return at_ < end_; }
  bool used_up() const { return at_ == end_ && number_ == last_number_; }
  int64_t integer() {
    check(at_ < end_);
    return *at_++;
  }
  Ints integers(size_t count) {
    Ints list(count);
    for (int64_t& value : list) value = integer();
    return list;
  }
  double number() {
    check(number_ < last_number_);
    return *number_++;
  }
  std::vector<double> numbers(size_t count) {
    std::vector<double> list(count);
    for (double& value : list) value = number();
    return list;
  }
  const Tensor& tensor() { return pick(weights_); }
  OptionalTensor optional_tensor() {
    check(at_ < end_);
    if (*at_ >= 0) return tensor();
    ++at_;
    return std::nullopt;
  }
  const std::string& word() { return pick(words_); }

  static void check(bool holds) {
    DWCONV_CHECK(holds, kOp, ": steps must be those of dwconv_ext.nn.steps, but they end elsewhere");
  }

 private:
  template <class T>
  const T& pick(const std::vector<T>& from) {
    const int64_t index = integer();
    check(index >= 0 && index < static_cast<int64_t>(from.size()));
    return from[index];
  }

  const std::vector<Tensor>& weights_;
  const std::vector<std::string>& words_;
  const int64_t *at_, *end_;
  const double *number_, *last_number_;
};

// One step of an op, whose arguments come in the schema's order. Arguments of a call are evaluated in any order, hence the names.
using Call = Tensor (*)(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& gate, Reader& read);

struct Op {
  const char* name;
  Call call;
};

constexpr Op kOps[] = {
    {"depthwise_conv2d_packed",
     [](const Tensor& input, const OptionalTensor&, const OptionalTensor&, Reader& read) {
       const Tensor& packed = read.tensor();
       const Ints filter = read.integers(kFilterNumbers);
       const int64_t act = read.integer();
       return depthwise_conv2d_packed(input, packed, filter, act, read.number());
     }},
    {"pointwise_conv2d",
     [](const Tensor& input, const OptionalTensor& residual, const OptionalTensor& gate, Reader& read) {
       const Tensor& packed = read.tensor();
       const int64_t out_channels = read.integer(), stride = read.integer(), act = read.integer();
       return pointwise_conv2d(input, packed, out_channels, stride, act, read.number(), residual, gate, false);
     }},
    {"patch_conv2d",
     [](const Tensor& input, const OptionalTensor&, const OptionalTensor&, Reader& read) {
       const Tensor& packed = read.tensor();
       const Ints filter = read.integers(kFilterNumbers);
       const int64_t act = read.integer();
       const double slope = read.number();
       return patch_conv2d(input, packed, filter, act, slope, read.integer() != 0);
     }},
    {"linear",
     [](const Tensor& input, const OptionalTensor&, const OptionalTensor&, Reader& read) {
       const Tensor& packed = read.tensor();
       const int64_t out_features = read.integer(), act = read.integer();
       return linear(input, packed, out_features, act, read.number());
     }},
    {"separable_conv2d_packed",
     [](const Tensor& input, const OptionalTensor& residual, const OptionalTensor&, Reader& read) {
       const Tensor& packed = read.tensor();
       const Ints block = read.integers(kFilterNumbers + 2);
       return separable_conv2d_packed(input, packed, block, read.numbers(2), residual, false);
     }},
    {"inverted_residual",
     [](const Tensor& input, const OptionalTensor& residual, const OptionalTensor&, Reader& read) {
       const Tensor& expand = read.tensor();
       const int64_t hidden = read.integer(), act = read.integer();
       const double slope = read.number();
       const Tensor& packed = read.tensor();
       const Ints block = read.integers(kFilterNumbers + 2);
       return inverted_residual(input, expand, hidden, act, slope, packed, block, read.numbers(2), residual, false);
     }},
    {"squeeze_excitation",
     [](const Tensor& input, const OptionalTensor&, const OptionalTensor&, Reader& read) {
       const Tensor& reduce = read.tensor();
       const OptionalTensor first = read.optional_tensor();
       const Tensor& expand = read.tensor();
       const OptionalTensor second = read.optional_tensor();
       const std::string &act = read.word(), &gate = read.word();
       return squeeze_excitation(input, reduce, first, expand, second, act, gate, read.number());
     }},
    {"layer_norm2d",
     [](const Tensor& input, const OptionalTensor&, const OptionalTensor&, Reader& read) {
       const OptionalTensor weight = read.optional_tensor(), bias = read.optional_tensor();
       return layer_norm2d(input, weight, bias, read.number());
     }},
    {"max_pool2d",
     [](const Tensor& input, const OptionalTensor&, const OptionalTensor&, Reader& read) {
       const Ints kernel = read.integers(2), stride = read.integers(2), padding = read.integers(2);
       return max_pool2d(input, kernel, stride, padding, read.integers(2));
     }},
    {"interleave_channels",
     [](const Tensor& input, const OptionalTensor& second, const OptionalTensor&, Reader& read) {
       read.check(second.has_value());
       return interleave_channels(input, *second);
     }},
    {"narrow",
     [](const Tensor& input, const OptionalTensor&, const OptionalTensor&, Reader& read) {
       const int64_t dim = read.integer(), start = read.integer(), length = read.integer();
       read.check(dim >= 0 && dim < input.dim() && start >= 0 && length >= 0 && start + length <= input.size(dim));
       Ints size = shape_of(input), strides;
       size[dim] = length;
       for (int64_t d = 0; d < input.dim(); ++d) strides.push_back(input.stride(d));
       return reinterpreted(input, size, strides, start * strides[dim]);
     }},
    {"global_average_pool", [](const Tensor& input, const OptionalTensor&, const OptionalTensor&,
                               Reader& read) { return global_average_pool(input, read.integer() != 0); }},
};

struct ArenaInUse {
  explicit ArenaInUse(Arena& arena) { active_arena() = &arena; }
  ~ArenaInUse() { active_arena() = nullptr; }
};

Call call_of(const std::string& name) {
  for (const Op& op : kOps) {
    if (name == op.name) return op.call;
  }
  refuse(kOp, ": steps must be those of dwconv_ext.nn.steps, but name an op '", name, "'");
}

std::vector<Tensor> run_steps(const std::vector<Tensor> inputs, const std::vector<Tensor> weights, const Tensor& steps,
                              const Tensor& numbers, const std::vector<std::string> words, const Ints outputs) {
  // The inputs, then the results; a value is let go after its last use.
  std::vector<OptionalTensor> values(inputs.begin(), inputs.end());
  const auto value = [&values](int64_t index) -> const OptionalTensor& {
    static const OptionalTensor none;
    Reader::check(index < static_cast<int64_t>(values.size()) && (index < 0 || values[index]));
    return index < 0 ? none : values[index];
  };
  Reader read(weights, steps, numbers, words);
  Arena& arena = thread_arena();
  arena.begin();
  const ArenaInUse in_use(arena);
  while (read.more()) {
    const Call call = call_of(read.word());
    const int64_t input = read.integer(), residual = read.integer(), gate = read.integer();
    Reader::check(input >= 0);
    active_arena() = read.integer() != 0 ? nullptr : &arena;  // what is returned, or has a view returned, is the caller's
    Tensor result = call(*value(input), value(residual), value(gate), read);
    for (int64_t count = read.integer(); count > 0; --count) {
      const int64_t done = read.integer();
      value(done);
      Reader::check(done >= 0);
      values[done].reset();
    }
    values.emplace_back(std::move(result));
    arena.release_unless([&values](const char* begin, const char* end) {
      return std::any_of(values.begin(), values.end(), [&](const OptionalTensor& v) {
        const char* const data = v ? static_cast<const char*>(v->const_data_ptr()) : nullptr;
        return data == begin || (data > begin && data < end);  // a view of the block
      });
    });
  }
  Reader::check(read.used_up());
  std::vector<Tensor> results;
  for (const int64_t index : outputs) {
    Reader::check(index >= 0);
    results.push_back(*value(index));
  }
  return results;
}

}  // namespace
}  // namespace dwconv

STABLE_TORCH_LIBRARY_IMPL(dwconv_ext, CPU, m) { m.impl("run_steps", TORCH_BOX(&dwconv::run_steps)); }

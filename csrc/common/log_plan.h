// DWCONV_EXT_LOG_PLAN=1: each plan once per shape, on stderr.
#pragma once

#include <stdio.h>
#include <stdlib.h>

#include <mutex>
#include <set>
#include <string>

#include "common/tuner.h"

namespace dwconv {

inline bool logs_plans() {
  static const bool wanted = getenv("DWCONV_EXT_LOG_PLAN") != nullptr && *getenv("DWCONV_EXT_LOG_PLAN") == '1';
  return wanted;
}

// out_channels: of a fused block, and of a depthwise convolution with several filters a channel; else 0.
inline std::string problem_text(Op op, Pass pass, const DepthwiseProblem& p, int64_t out_channels) {
  char text[400];
  snprintf(text, sizeof text,
           "%s %s %s %s N=%lld C=%lld%s%s in=%lldx%lld out=%lldx%lld filter=%lldx%lld stride=%lldx%lld padding=%lldx%lld "
           "dilation=%lldx%lld",
           op_name(op), pass_name(pass), dtype_name(p.dtype), layout_name(p.layout), (long long)p.batch, (long long)p.channels,
           out_channels ? " O=" : "", out_channels ? std::to_string(out_channels).c_str() : "", (long long)p.in_h,
           (long long)p.in_w, (long long)p.out_h, (long long)p.out_w, (long long)p.kernel_h, (long long)p.kernel_w,
           (long long)p.stride_h, (long long)p.stride_w, (long long)p.pad_h, (long long)p.pad_w, (long long)p.dilation_h,
           (long long)p.dilation_w);
  return text;
}

// device: "" or "cuda "; plan: what the device says of it.
inline void log_plan(const char* device, Op op, Pass pass, const DepthwiseProblem& p, int64_t out_channels,
                     const std::string& plan) {
  if (!logs_plans() || tuner().is_timing()) return;  // what is being timed is a candidate
  static std::mutex mutex;
  static std::set<std::string> seen;
  const std::string line = std::string("dwconv_ext: ") + device + problem_text(op, pass, p, out_channels) + " -> " + plan;
  const std::lock_guard<std::mutex> lock(mutex);
  if (seen.insert(line).second) fprintf(stderr, "%s\n", line.c_str());
}

}  // namespace dwconv

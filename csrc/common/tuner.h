// Which of several ways through a problem is the fastest on a device, by timing them: dwconv_ext.benchmark(True). Off by default.
// What was chosen is remembered for the process, and in a file where one is given: a line each, to which processes append,
//   versions <tab> device <tab> problem <tab> the chosen way's name <tab> the time of each
// Lines that are not such, or of other versions, stay there unread. Each compiled half has a tuner of its own.
#pragma once

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <fstream>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/activation.h"
#include "common/plan_cache.h"

namespace dwconv {

constexpr const char* kTorchWay = "torch";  // torch's own convolution

struct Choice {
  std::string way;    // its name
  std::string times;  // "73.7 us depthwise_forward_nhwc, ...; 60.2 us torch"
};

class Tuner {
 public:
  using Subject = std::pair<std::string, std::string>;  // device, problem
  using Run = std::function<void()>;
  using Clock = std::function<double(const Run&)>;  // the seconds of one run

  // 0 while it is off, else another number after each change: what threads have looked up before does not count any more.
  uint32_t settings() const { return settings_.load(std::memory_order_relaxed); }

  // An empty file: none; one that is given adds what it has, and gets what was chosen before it, at the first use. Off, it
  // forgets.
  void set(bool on, const std::string& file, const std::string& versions) {
    const std::lock_guard<std::mutex> lock(mutex_);
    file_ = file, versions_ = versions;
    read_ = warned_ = false;
    settings_ = on ? ++changes_ : 0;
    if (!on) choices_.clear();
  }

  // For tests: ways still run, but take the seconds of the first of these texts that is in their name, and 1 where none is.
  // Empty: the clock counts again.
  void fake(std::vector<std::pair<std::string, double>> seconds) {
    const std::lock_guard<std::mutex> lock(mutex_);
    faked_ = std::move(seconds);
  }

  std::map<Subject, Choice> choices() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return choices_;
  }
  bool is_timing() const { return timing_ == getpid(); }
  int64_t timed_runs() const { return timed_runs_; }

  std::optional<Choice> find(const Subject& subject) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!read_) read();
    const auto found = choices_.find(subject);
    return found != choices_.end() ? std::optional(found->second) : std::nullopt;
  }

  // Runs all ways in turns and remembers the one with the least median; the first of those within kTie of it. One that takes
  // kHopeless times as long as another is left out after its first run where that is long, else after the second. None where
  // something is being timed, by this thread or another, and where no way runs without an exception.
  std::optional<Choice> measure(const Subject& subject, const std::vector<std::string>& names,
                                const std::function<void(size_t)>& run, const Clock& clock) {
    constexpr int kWarmUp = 2, kLeastRounds = 3, kRounds = 9;
    constexpr double kMostSeconds = 1, kTie = 1.03, kHopeless = 4;
    pid_t holder = timing_;
    const pid_t self = getpid();  // a process that was forked meanwhile times nothing of what the other does
    if (holder == self || !timing_.compare_exchange_strong(holder, self)) return std::nullopt;
    const struct Done {
      std::atomic<pid_t>& timing;
      ~Done() { timing = 0; }
    } done = {timing_};
    std::vector<std::vector<double>> times(names.size());
    std::vector<char> fails(names.size(), false), hopeless(names.size(), false);
    double spent = 0;
    for (int round = -kWarmUp; round < kLeastRounds || (round < kRounds && spent < kMostSeconds); ++round) {
      double best = 0;  // of this round
      for (size_t turn = 0; turn < names.size(); ++turn) {
        const size_t i = round % 2 == 0 ? turn : names.size() - 1 - turn;
        if (fails[i] || hopeless[i]) continue;
        try {
          const double seconds = seconds_of(names[i], [&] { run(i); }, clock);
          spent += seconds;
          if (best == 0 || seconds < best) best = seconds;
          hopeless[i] = seconds > kHopeless * best && (round >= -1 || seconds > kLongSeconds);
          if (round >= 0 || hopeless[i]) times[i].push_back(seconds);
        } catch (const std::exception&) {  // not enough memory, no such kernel in torch
          fails[i] = true;
        }
      }
    }
    double least = 0;
    Choice choice;
    std::vector<double> medians;
    for (size_t i = 0; i < names.size(); ++i) {
      std::sort(times[i].begin(), times[i].end());
      medians.push_back(fails[i] ? 0 : times[i][times[i].size() / 2]);
      if (fails[i]) continue;
      if (least == 0 || medians[i] < least) least = medians[i];
      char text[32];
      snprintf(text, sizeof text, "%.1f us ", medians[i] * 1e6);
      choice.times += (choice.times.empty() ? "" : "; ") + (text + names[i]);
    }
    for (size_t i = 0; i < names.size() && choice.way.empty(); ++i) {
      if (!fails[i] && medians[i] <= kTie * least) choice.way = names[i];
    }
    if (choice.way.empty()) return std::nullopt;
    const std::lock_guard<std::mutex> lock(mutex_);
    choices_[subject] = choice;
    if (!file_.empty()) append(line_of(subject, choice));
    return choice;
  }

  static constexpr double kLongSeconds = 0.2;  // of a run that is not repeated without need

  // Held while a process forks: the other one finds no lock of a thread that it does not have.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  std::string line_of(const Subject& subject, const Choice& choice) const {
    return versions_ + '\t' + subject.first + '\t' + subject.second + '\t' + choice.way + '\t' + choice.times;
  }

  double seconds_of(const std::string& name, const Run& run, const Clock& clock) {
    ++timed_runs_;
    std::vector<std::pair<std::string, double>> faked;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      faked = faked_;
    }
    if (faked.empty()) return clock(run);
    run();
    for (const auto& [text, seconds] : faked) {
      if (name.find(text) != std::string::npos) return seconds;
    }
    return 1;
  }

  void read() {
    read_ = true;
    if (file_.empty()) return;
    std::ifstream file(file_);
    std::map<Subject, Choice> own = choices_;
    for (std::string line; std::getline(file, line);) {
      std::vector<std::string> fields(1);
      for (const char c : line) {
        if (c == '\t') {
          fields.emplace_back();
        } else {
          fields.back() += c;
        }
      }
      if (fields.size() != 5 || fields[0] != versions_) continue;
      choices_[{fields[1], fields[2]}] = {fields[3], fields[4]};
      own.erase({fields[1], fields[2]});
    }
    for (const auto& [subject, choice] : own) append(line_of(subject, choice));
  }

  // In one piece, under a lock where the file system has locks: other processes append too.
  void append(std::string line) {
    const int file = open(file_.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    bool written = file >= 0;
    if (written) {
      flock(file, LOCK_EX);
      char last = '\n';
      const off_t size = lseek(file, 0, SEEK_END);
      if (size > 0 && pread(file, &last, 1, size - 1) == 1 && last != '\n') line = '\n' + line;  // after a line that was cut off
      line += '\n';
      written = write(file, line.data(), line.size()) == static_cast<ssize_t>(line.size());
    }
    if (!written && !warned_) {
      fprintf(stderr, "dwconv_ext: benchmark: file %s cannot be written (%s): choices are remembered in this process alone\n",
              file_.c_str(), strerror(errno));
      warned_ = true;
    }
    if (file >= 0) close(file);
  }

  std::mutex mutex_;  // of all that follows but the atomics
  std::map<Subject, Choice> choices_;
  std::string file_, versions_;
  std::vector<std::pair<std::string, double>> faked_;
  bool read_ = false, warned_ = false;
  uint32_t changes_ = 0;
  std::atomic<uint32_t> settings_ = 0;
  std::atomic<pid_t> timing_ = 0;  // the process that does
  std::atomic<int64_t> timed_runs_ = 0;
};

// On the CPU: of the second of two runs, since the first may find another's data in the caches and its threads at work, which a
// long one does not notice.
inline Tuner::Clock steady_clock() {
  return [](const Tuner::Run& run) {
    const auto seconds_of_one = [&] {
      const auto begin = std::chrono::steady_clock::now();
      run();
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    };
    const double first = seconds_of_one();
    return first > Tuner::kLongSeconds ? first : seconds_of_one();
  };
}

inline Tuner& tuner() {
  static Tuner the_tuner;
  static const int watched = pthread_atfork([] { the_tuner.lock(); }, [] { the_tuner.unlock(); }, [] { the_tuner.unlock(); });
  static_cast<void>(watched);
  return the_tuner;
}

// What a problem has besides, each a pass of its own where torch's convolution runs.
struct Extras {
  Activation activation, last_activation;  // the last of a fused block
  bool bias = false, last_bias = false, residual = false;
  bool view = false;  // the input is not dense

  bool operator==(const Extras&) const = default;
};

inline std::string extras_text(const Extras& e) {
  std::string text;
  for (const auto& [bias, activation] : {std::make_pair(e.bias, e.activation), std::make_pair(e.last_bias, e.last_activation)}) {
    if (bias) text += " bias";
    if (activation.kind != ActivationKind::kIdentity) text += std::string(" ") + activation_name(activation.kind);
  }
  return text + (e.residual ? " residual" : "") + (e.view ? " view" : "");
}

template <class Way>
struct NamedWay {
  Way way;
  std::string name;
};
template <class Way>
struct FoundWay {
  Way way;
  std::string times;
};

// The fastest way for a key, remembered or timed now; null where that cannot be: then the heuristics decide, and nothing is
// remembered. what() -> Subject; list() -> NamedWays, the heuristics' first; run(way); clock() -> Clock, empty where nothing
// may be timed.
template <class Way, class Key, class What, class List, class Run, class MakeClock>
const FoundWay<Way>* fastest(const Key& key, What what, List list, Run run, MakeClock clock) {
  using Found = FoundWay<Way>;
  if (const Found* const found = remembered<Found>(key)) return found;
  const Tuner::Subject subject = what();
  const std::vector<NamedWay<Way>> ways = list();
  const auto named = [&](const std::optional<Choice>& choice) {
    return std::find_if(ways.begin(), ways.end(), [&](const auto& way) { return choice && way.name == choice->way; });
  };
  std::optional<Choice> choice = tuner().find(subject);
  auto found = named(choice);
  if (found == ways.end()) {  // not chosen yet, or a kernel or tile that the plan does not offer any more
    const Tuner::Clock timer = clock();
    if (!timer) return nullptr;
    std::vector<std::string> names;
    for (const auto& way : ways) names.push_back(way.name);
    choice = tuner().measure(subject, names, [&](size_t i) { run(ways[i].way); }, timer);
    found = named(choice);
    if (found == ways.end()) return nullptr;
  }
  return &remember<Found>(key, {found->way, choice->times});
}

}  // namespace dwconv

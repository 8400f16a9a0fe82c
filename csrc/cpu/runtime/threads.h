// torch's threads; in a process that was forked too.
//
// GNU OpenMP keeps a team of threads for each thread that has run a parallel region. A fork copies the thread that forks and not
// its team, for which the next region of that thread waits for ever (torch's own ops do: pytorch issue 17199). A thread that
// begins after the fork has a team of its own: there such regions run on one. Include after torch's headers.
#pragma once

#include <pthread.h>

#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace dwconv {

class Deputy {
 public:
  // On a thread that lives as long as the process; returns when it is done.
  void run(const std::function<void()>& work) {
    std::unique_lock<std::mutex> lock(mutex_);
    work_ = &work;
    wake_.notify_all();
    wake_.wait(lock, [&] { return work_ == nullptr; });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  // Of the thread that forked, the only one that uses it; never freed, since its thread waits on it at the process's end.
  static Deputy& get() {
    if (existing() == nullptr) existing() = new Deputy;
    return *existing();
  }
  static Deputy*& existing() {
    static Deputy* deputy = nullptr;
    return deputy;
  }

 private:
  Deputy() {
    std::thread([this] {
      std::unique_lock<std::mutex> lock(mutex_);
      for (;;) {
        wake_.wait(lock, [&] { return work_ != nullptr; });
        try {
          (*work_)();
        } catch (...) {
          error_ = std::current_exception();
        }
        work_ = nullptr;
        wake_.notify_all();
      }
    }).detach();
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  const std::function<void()>* work_ = nullptr;
  std::exception_ptr error_;
};

inline bool& is_forked_thread() {
  static thread_local bool forked = false;
  return forked;
}

#if defined(__linux__)
inline const int watches_forks = pthread_atfork(nullptr, nullptr, [] {
  is_forked_thread() = true;
  Deputy::existing() = nullptr;  // its thread is not in this process
});
#endif

// torch::stable::parallel_for.
template <class Body>  // body(begin, end)
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (is_forked_thread() && end - begin > grain && torch::stable::get_num_threads() > 1) {
    Deputy::get().run([&] { torch::stable::parallel_for(begin, end, grain, body); });
  } else {
    torch::stable::parallel_for(begin, end, grain, body);
  }
}

}  // namespace dwconv

// How the threads of a block take turns, where they stop, and what may not be left when they are done.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

#include "emulator/machine.h"

namespace emulator {
namespace {

constexpr size_t kStackBytes = 512 * 1024;
constexpr unsigned kRarely = 512;
constexpr unsigned kMostRounds = 256;

// Under a permuted schedule threads now and then sit out some rounds: a lane may fall far behind its warp.
class Pauses {
 public:
  Pauses(unsigned threads, std::mt19937_64* random) : random_(random), left_(threads, 0) {}

  bool pauses(unsigned thread) {
    if (random_ && left_[thread] == 0 && (*random_)() % kRarely == 0)
      left_[thread] = (*random_)() % kMostRounds;
    if (left_[thread] == 0) return false;
    --left_[thread];
    return true;
  }

 private:
  std::mt19937_64* random_;
  std::vector<uint64_t> left_;
};

}  // namespace

std::vector<unsigned> turns(unsigned count, std::mt19937_64* random) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (random) std::shuffle(order.begin(), order.end(), *random);
  return order;
}

void Machine::start_block() {
  at_barrier_ = done_ = barriers_ = 0;
  shared_->forget();
  clocks_.reset(shape_.block);
  operand_reads_.reset(shape_.shared_bytes, shape_.block);
  mbarriers_.clear();
  tiles_.clear();
  named_barriers_ = {};
  for (Warp& warp : warps_) warp.barriers = 0;
  for (unsigned i = 0; i < shape_.block; ++i) {
    Thread& thread = threads_[i];
    if (!thread.fiber) thread.fiber = std::make_unique<Fiber>(kStackBytes);
    thread.fiber->reset(&thread_body_);
    thread.state = State::kReady;
    thread.committed.clear();
    thread.uncommitted.clear();
    thread.product_groups.clear();
    thread.register_fences = 1;
    thread.products = 0;
  }
}

void Machine::run_block() {
  const unsigned count = shape_.block;
  start_block();
  std::mt19937_64 random(seed_ + block_);
  const std::vector<unsigned> order = turns(count, seed_ ? &random : nullptr);
  Pauses pauses(count, seed_ ? &random : nullptr);
  while (done_ < count) {
    bool progress = false;
    for (unsigned i : order) {
      if (threads_[i].state != State::kReady) continue;
      progress = true;
      if (pauses.pauses(i)) continue;
      current_ = i;
      threads_[i].fiber->resume();
      if (fault_) throw Fault(*fault_);
    }
    // Without a schedule tiles arrive as late as they can.
    if (seed_ ? random() % 2 == 0 || !progress : !progress) progress |= land_tile(seed_ ? &random : nullptr);
    progress |= wake_waiting();
    if (at_barrier_ == count) {
      finish_barrier();
    } else if (!progress) {
      report_deadlock();
    }
  }
  check_end_of_block();
}

void Machine::check_end_of_block() const {
  for (unsigned i = 0; i < shape_.block; ++i) {
    const Thread& thread = threads_[i];
    const std::string ended = "thread " + std::to_string(i) + " ended with ";
    if (!thread.uncommitted.empty() || !thread.committed.empty()) {
      throw Fault(ended + "asynchronous copies that it never waited for");
    }
    const uint32_t known = clocks_.of(i)[products_entry(shape_.block, i / kWarp)];
    if (known < thread.products) throw Fault(ended + "products that it never waited for");
  }
  for (const Mbarrier& barrier : mbarriers_) {
    if (barrier.bytes == 0 && tiles_.empty()) continue;
    throw Fault("the mbarrier at byte " + std::to_string(barrier.offset) + " expects " +
                std::to_string(barrier.bytes) + " bytes more than were copied");
  }
}

void Machine::finish_barrier() {
  const Site& first = threads_[0].waiting_at;
  for (unsigned i = 0; i < shape_.block; ++i) {
    const Site& site = threads_[i].waiting_at;
    if (site.line != first.line || std::strcmp(site.file, first.file) != 0) {
      throw Fault("divergent barrier: thread 0 waits at " + to_string(first) + ", thread " +
                  std::to_string(i) + " at " + to_string(site));
    }
    threads_[i].state = State::kReady;
  }
  at_barrier_ = 0;
  ++barriers_;
  if (clocks_.used()) clocks_.meet(turns(shape_.block, nullptr));
}

void Machine::report_deadlock() const {
  std::string message = "block " + std::to_string(block_) + " cannot go on: ";
  for (unsigned i = 0, shown = 0; i < shape_.block && shown < 4; ++i) {
    const Thread& thread = threads_[i];
    const bool repeats =
        i > 0 && threads_[i - 1].state == thread.state &&
        (thread.state == State::kDone || threads_[i - 1].waiting_at.line == thread.waiting_at.line);
    if (repeats) continue;
    message += (shown++ ? "; thread " : "thread ") + std::to_string(i);
    if (thread.state == State::kDone) message += " has returned";
    if (thread.state == State::kAtBarrier) message += " waits at the barrier " + to_string(thread.waiting_at);
    if (thread.state == State::kAtNamedBarrier) {
      message += " waits at barrier " + std::to_string(thread.meets_at) + ", " + to_string(thread.waiting_at);
    }
    if (thread.state == State::kAtMbarrier) {
      message += " waits for phase " + std::to_string(thread.parity) + " of the mbarrier at byte " +
                 std::to_string(mbarriers_[thread.meets_at].offset) + ", " + to_string(thread.waiting_at);
    }
    if (thread.state == State::kInWarpgroup) {
      message += std::string(" waits for its warpgroup in ") + thread.collective + " " +
                 to_string(thread.waiting_at);
    }
    if (thread.state == State::kInWarp) {
      char mask[16];
      std::snprintf(mask, sizeof mask, "0x%08x", thread.mask);
      message += std::string(" waits for the lanes ") + mask + " in " + thread.collective + " " +
                 to_string(thread.waiting_at);
    }
  }
  throw Fault(message);
}

}  // namespace emulator

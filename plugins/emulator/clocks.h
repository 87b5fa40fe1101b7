// What each thread of a block knows of the others' past, where threads meet in other ways than at barriers of
// the block or a warp. A thread's clock holds the last tick that it knows of: of each thread, of the tile
// copies that each mbarrier counts, of each warp's matrix products, and of each thread's writes that a proxy
// fence made visible to those. Arriving somewhere publishes a clock, waiting there joins it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulator {

constexpr unsigned kMostMbarriers = 64;
constexpr unsigned kMostWarps = 32;

// Entries of a clock.
inline unsigned engine_entry(unsigned threads, unsigned mbarrier) { return threads + mbarrier; }
inline unsigned products_entry(unsigned threads, unsigned warp) { return threads + kMostMbarriers + warp; }
inline unsigned fence_entry(unsigned threads, unsigned thread) {
  return threads + kMostMbarriers + kMostWarps + thread;
}

using Clock = std::vector<uint32_t>;

class Clocks {
 public:
  void reset(unsigned threads);
  // Until the first call in a block nobody looks at clocks.
  void start() { used_ = true; }
  bool used() const { return used_; }

  const Clock& of(unsigned thread) const { return clocks_[thread]; }
  uint32_t tick(unsigned thread) const { return clocks_[thread][thread]; }
  Clock none() const { return Clock(clocks_[0].size()); }

  // What the thread did so far is known to whoever acquires `into`.
  void release(unsigned thread, Clock& into);
  void acquire(unsigned thread, const Clock& from);
  void learn(unsigned thread, unsigned entry, uint32_t tick);
  // All of these threads meet.
  void meet(const std::vector<unsigned>& threads);

 private:
  static void join(Clock& into, const Clock& from);

  unsigned threads_ = 0;
  bool used_ = false;
  std::vector<Clock> clocks_;
};

// Which bytes of shared memory matrix products read, by warp: a later write has to know that they are done.
class OperandReads {
 public:
  static constexpr unsigned kGranule = 16;

  void reset(size_t bytes, unsigned threads);
  void record(size_t offset, unsigned warp, uint32_t product);
  // Whether a thread with this clock knows of all products that read any of the bytes.
  bool known(size_t offset, size_t bytes, const Clock& clock) const;

 private:
  unsigned threads_ = 0;
  unsigned warps_ = 0;
  bool any_ = false;
  std::vector<uint32_t> last_;
};

}  // namespace emulator

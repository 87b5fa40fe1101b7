#include "emulator/clocks.h"

#include <algorithm>

namespace emulator {

void Clocks::reset(unsigned threads) {
  used_ = false;
  threads_ = threads;
  clocks_.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    clocks_[i].assign(fence_entry(threads, threads), 0);
    clocks_[i][i] = 1;
  }
}

void Clocks::join(Clock& into, const Clock& from) {
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void Clocks::release(unsigned thread, Clock& into) {
  join(into, clocks_[thread]);
  ++clocks_[thread][thread];
}

void Clocks::acquire(unsigned thread, const Clock& from) { join(clocks_[thread], from); }

void Clocks::learn(unsigned thread, unsigned entry, uint32_t tick) {
  clocks_[thread][entry] = std::max(clocks_[thread][entry], tick);
}

void Clocks::meet(const std::vector<unsigned>& threads) {
  Clock all = none();
  for (unsigned thread : threads) release(thread, all);
  for (unsigned thread : threads) acquire(thread, all);
}

void OperandReads::reset(size_t bytes, unsigned threads) {
  threads_ = threads;
  warps_ = (threads + 31) / 32;
  any_ = false;
  last_.assign((bytes / kGranule + 1) * warps_, 0);
}

void OperandReads::record(size_t offset, unsigned warp, uint32_t product) {
  any_ = true;
  last_[offset / kGranule * warps_ + warp] = product;
}

bool OperandReads::known(size_t offset, size_t bytes, const Clock& clock) const {
  if (!any_) return true;
  for (size_t granule = offset / kGranule; granule * kGranule < offset + bytes; ++granule) {
    for (unsigned warp = 0; warp < warps_; ++warp) {
      if (last_[granule * warps_ + warp] > clock[products_entry(threads_, warp)]) return false;
    }
  }
  return true;
}

}  // namespace emulator

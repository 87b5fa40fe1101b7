#include "emulator/machine.h"

#include <algorithm>
#include <cstring>
#include <random>

namespace emulator {
namespace {

constexpr unsigned kMaxThreads = 1024;

}  // namespace

Machine& Machine::instance() {
  static Machine machine;
  return machine;
}

void* Machine::allocate(size_t bytes, const std::string& name) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  recent_ = nullptr;
  return global_.allocate(bytes, name);
}

void Machine::release(void* address) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  recent_ = nullptr;
  global_.release(address);
}

void Machine::upload(void* to, const void* from, size_t bytes) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  Region& region = global_.find(to, bytes, "upload", {"host", 0});
  const size_t offset = static_cast<char*>(to) - region.data();
  if (offset + bytes > region.bytes()) throw Fault("upload past the end of " + region.name());
  std::memcpy(to, from, bytes);
  region.mark_written(offset, bytes);
}

void Machine::download(void* to, const void* from, size_t bytes) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  Region& region = global_.find(from, bytes, "download", {"host", 0});
  const size_t offset = static_cast<const char*>(from) - region.data();
  if (offset + bytes > region.bytes()) throw Fault("download past the end of " + region.name());
  region.require_written(offset, bytes);
  std::memcpy(to, from, bytes);
}

void Machine::set_schedule(uint64_t seed) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  seed_ = seed;
}

void Machine::launch(const LaunchShape& shape, const std::function<void()>& kernel) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  if (shape.block == 0 || shape.block > kMaxThreads || shape.grid == 0) {
    throw Fault("launch of " + std::to_string(shape.grid) + " blocks of " + std::to_string(shape.block) +
                " threads: a block has 1 to 1024 threads");
  }
  shape_ = shape;
  first_thread_ = next_thread_id_;
  next_thread_id_ += static_cast<uint64_t>(shape.grid) * shape.block;
  fault_.reset();
  threads_.resize(std::max<size_t>(threads_.size(), shape.block));
  warps_.resize(std::max<size_t>(warps_.size(), (shape.block + kWarp - 1) / kWarp));
  // The 128 bytes on either side count as shared memory too (region_of): global memory must not lie there.
  shared_storage_.reset(new char[shape.shared_bytes + 512]);
  char* guarded = shared_storage_.get() + 128;
  char* aligned = guarded + (256 - reinterpret_cast<uintptr_t>(guarded) % 256);
  shared_ = std::make_unique<Region>("shared memory", aligned, shape.shared_bytes);
  thread_body_ = [this, &kernel] {
    kernel();
    threads_[current_].state = State::kDone;
    ++done_;
    wait();
  };
  std::mt19937_64 random(seed_);
  for (unsigned block : turns(shape.grid, seed_ ? &random : nullptr)) {
    block_ = block;
    run_block();
  }
}

std::string Machine::thread_name(unsigned thread) const {
  return "thread " + std::to_string(thread) + " of block " + std::to_string(block_);
}

// No exception may cross from one stack to another: the fault is kept, and the fiber never resumed.
void Machine::abandon(const Fault& fault) {
  fault_ = std::make_unique<Fault>(thread_name(current_) + ": " + fault.what());
  for (;;) wait();
}

void Machine::wait() { threads_[current_].fiber->yield(); }

Accessor Machine::accessor() const {
  return {first_thread_,
          first_thread_ + static_cast<uint64_t>(block_) * shape_.block + current_,
          shape_.block,
          barriers_,
          warps_[current_ / kWarp].barriers,
          clocks_.tick(current_),
          clocks_.used() ? clocks_.of(current_).data() : nullptr};
}

Region& Machine::region_of(const void* address, size_t bytes, Access kind, const Site& site) {
  const char* at = static_cast<const char*>(address);
  if (at >= shared_->data() - 128 && at < shared_->data() + shared_->bytes() + 128) return *shared_;
  if (!recent_ || !recent_->contains(address)) {
    recent_ = &global_.find(address, bytes, kind == Access::kRead ? "read" : "write", site);
  }
  return *recent_;
}

void Machine::access(const void* address, size_t bytes, Access kind, const Site& site) {
  try {
    Region& region = region_of(address, bytes, kind, site);
    region.access(address, bytes, kind, accessor(), site);
    const bool writes = kind != Access::kRead && kind != Access::kOperandRead;
    const auto offset = static_cast<size_t>(static_cast<const char*>(address) - region.data());
    if (writes && &region == shared_.get() && !operand_reads_.known(offset, bytes, clocks_.of(current_))) {
      throw Fault("write of an operand of a product that is not known to be done, " + to_string(site));
    }
  } catch (const Fault& fault) {
    fault_ = std::make_unique<Fault>(fault);
  }
  if (fault_) abandon(Fault(*fault_));
}

void Machine::barrier(const Site& site) {
  threads_[current_].state = State::kAtBarrier;
  threads_[current_].waiting_at = site;
  ++at_barrier_;
  wait();
}

bool Machine::complete_in_warp(uint32_t mask) const {
  const unsigned first = current_ / kWarp * kWarp;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (first + lane >= shape_.block) return false;
    const Thread& thread = threads_[first + lane];
    if (thread.state != State::kInWarp || thread.mask != mask) return false;
  }
  return true;
}

void Machine::arrive_in_warp(const char* name, uint32_t mask, const Site& site) {
  Thread& self = threads_[current_];
  if (!(mask >> (current_ % kWarp) & 1)) {
    abandon(Fault(std::string("the mask of ") + name + " leaves out the calling lane, " + to_string(site)));
  }
  self.state = State::kInWarp;
  self.collective = name;
  self.mask = mask;
  self.waiting_at = site;
}

Payload Machine::collective(const char* name, uint32_t mask, const Payload& sent, Combine combine,
                            const Site& site) {
  Warp& warp = warps_[current_ / kWarp];
  warp.lanes[current_ % kWarp].sent = sent;
  arrive_in_warp(name, mask, site);
  if (!complete_in_warp(mask)) {
    wait();
    return warp.lanes[current_ % kWarp].received;
  }
  const unsigned first = current_ / kWarp * kWarp;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (std::strcmp(threads_[first + lane].collective, name) != 0) {
      abandon(Fault(std::string("lanes of one warp meet in different operations: ") + name + " and " +
                    threads_[first + lane].collective + ", " + to_string(site)));
    }
    threads_[first + lane].state = State::kReady;
  }
  combine(warp.lanes, mask);
  return warp.lanes[current_ % kWarp].received;
}

void Machine::warp_barrier(uint32_t mask, const Site& site) {
  // Only a barrier of the whole warp orders memory here; a partial one could be ordered lane by lane, no
  // kernel needs it.
  if (mask != kFullMask) abandon(Fault("warp barrier with a partial mask, " + to_string(site)));
  Warp& warp = warps_[current_ / kWarp];
  arrive_in_warp("warp_barrier", mask, site);
  if (!complete_in_warp(mask)) {
    wait();
    return;
  }
  ++warp.barriers;
  const unsigned first = current_ / kWarp * kWarp;
  std::vector<unsigned> lanes;
  for (unsigned lane = first; lane < first + kWarp; ++lane) {
    threads_[lane].state = State::kReady;
    lanes.push_back(lane);
  }
  if (clocks_.used()) clocks_.meet(lanes);
}

void Machine::copy_async(void* to_shared, const void* from_global, size_t bytes, const Site& site) {
  access(from_global, bytes, Access::kRead, site);
  access(to_shared, bytes, Access::kAsyncWrite, site);
  threads_[current_].uncommitted.push_back({to_shared, from_global, bytes});
}

void Machine::copy_async_commit() {
  Thread& self = threads_[current_];
  self.committed.push_back(std::move(self.uncommitted));
  self.uncommitted.clear();
}

void Machine::copy_async_wait(size_t groups_left) {
  Thread& self = threads_[current_];
  while (self.committed.size() > groups_left) {
    for (const Copy& copy : self.committed.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      shared_->land(copy.to, copy.bytes, accessor().stamp());
    }
    self.committed.erase(self.committed.begin());
  }
}

}  // namespace emulator

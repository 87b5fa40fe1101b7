#include "emulator/memory.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "emulator/clocks.h"

namespace emulator {
namespace {

constexpr int kPoison = 0xff;  // a NaN in every floating format
constexpr size_t kAlignment = 256;

bool known(const Stamp& earlier, const Accessor& now) {
  const uint64_t own = (earlier.thread - now.first_thread) % now.threads_per_block;
  return now.clock && now.clock[earlier.engine ? earlier.engine : own] >= earlier.tick;
}

bool ordered_before(const Stamp& earlier, const Accessor& now) {
  if (earlier.thread < now.first_thread) return true;
  if (now.block_of(earlier.thread) != now.block_of(now.thread)) return false;
  if (earlier.engine) return known(earlier, now);
  if (earlier.thread == now.thread || earlier.barrier < now.barrier || known(earlier, now)) return true;
  return now.warp_of(earlier.thread) == now.warp_of(now.thread) && earlier.warp_barrier < now.warp_barrier;
}

// Are all recorded reads ordered before `now`?
bool readers_ordered_before(const Cell& cell, const Accessor& now) {
  switch (cell.readers) {
    case Readers::kNone:
      return true;
    case Readers::kThread:
      return ordered_before(cell.read, now);
    default:
      break;
  }
  if (cell.read.thread < now.first_thread) return true;
  if (cell.readers == Readers::kBlocks || now.block_of(cell.read.thread) != now.block_of(now.thread))
    return false;
  if (cell.read.barrier < now.barrier) return true;
  return cell.readers == Readers::kWarp && now.warp_of(cell.read.thread) == now.warp_of(now.thread) &&
         cell.read.warp_barrier < now.warp_barrier;
}

void record_read(Cell& cell, const Accessor& by) {
  const Stamp stamp = by.stamp();
  if (readers_ordered_before(cell, by)) {
    cell.readers = Readers::kThread;
  } else if (by.block_of(cell.read.thread) != by.block_of(by.thread)) {
    cell.readers = Readers::kBlocks;
  } else if (by.warp_of(cell.read.thread) != by.warp_of(by.thread)) {
    cell.readers = std::max(cell.readers, Readers::kBlock);
  } else if (cell.read.thread != by.thread) {
    cell.readers = std::max(cell.readers, Readers::kWarp);
  }
  cell.read = stamp;
}

std::string describe(const Stamp& stamp, const Accessor& by) {
  return "thread " + std::to_string((stamp.thread - by.first_thread) % by.threads_per_block) + " of block " +
         std::to_string(by.block_of(stamp.thread));
}

}  // namespace

bool Accessor::knows_fence_after(const Stamp& write) const {
  if (write.engine || write.thread < first_thread) return true;
  const auto own = static_cast<unsigned>((write.thread - first_thread) % threads_per_block);
  return clock && clock[fence_entry(threads_per_block, own)] >= write.tick;
}

std::string to_string(const Site& site) {
  const char* name = std::strrchr(site.file, '/');
  return std::string(name ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

Region::Region(std::string name, char* data, size_t bytes)
    : name_(std::move(name)), data_(data), cells_(bytes) {
  std::memset(data, kPoison, bytes);
}

bool Region::contains(const void* address) const {
  const char* at = static_cast<const char*>(address);
  return at >= data_ && at < data_ + cells_.size();
}

void Region::fail(const std::string& what, size_t offset, size_t bytes, const Site& site) const {
  throw Fault(what + " at bytes " + std::to_string(offset) + ".." + std::to_string(offset + bytes - 1) +
              " of " + name_ + " (" + std::to_string(cells_.size()) + " bytes), " + to_string(site));
}

void Region::check(Cell& cell, size_t offset, size_t bytes, Access kind, const Accessor& by,
                   const Site& site) const {
  const bool operand = kind == Access::kOperandRead;
  const bool reads = kind == Access::kRead || kind == Access::kAtomic || operand;
  const bool writes = kind != Access::kRead && !operand;
  if (cell.in_flight) fail("access before the asynchronous copy was waited for", offset, bytes, site);
  if (reads && !cell.written) fail("read of memory that nothing wrote", offset, bytes, site);
  const bool both_atomic = cell.atomic && kind == Access::kAtomic;
  if (cell.written && !both_atomic && !ordered_before(cell.write, by)) {
    fail(std::string("race: ") + (writes ? "write" : "read") + " not ordered after the write of " +
             describe(cell.write, by),
         offset, bytes, site);
  }
  if ((operand || kind == Access::kTileWrite) && cell.written && !by.knows_fence_after(cell.write)) {
    fail("asynchronous access to what " + describe(cell.write, by) + " wrote without a proxy fence", offset,
         bytes, site);
  }
  if (operand) return;  // remembered by OperandReads
  if (writes && !both_atomic && !readers_ordered_before(cell, by)) {
    fail("race: write not ordered after the read of " + describe(cell.read, by), offset, bytes, site);
  }
  if (!writes) {
    record_read(cell, by);
    return;
  }
  cell.write = by.stamp();
  cell.readers = Readers::kNone;
  cell.written = true;
  cell.atomic = kind == Access::kAtomic;
  cell.in_flight = kind == Access::kAsyncWrite || kind == Access::kTileWrite;
}

void Region::access(const void* address, size_t bytes, Access kind, const Accessor& by, const Site& site) {
  const size_t offset = static_cast<const char*>(address) - data_;
  const char* verb = kind == Access::kRead || kind == Access::kOperandRead ? "read" : "write";
  if (offset > cells_.size() || cells_.size() - offset < bytes) {
    fail(std::string("out-of-bounds ") + verb, offset, bytes, site);
  }
  if (bytes > 16 || offset % bytes != 0) fail(std::string("misaligned ") + verb, offset, bytes, site);
  for (size_t i = 0; i < bytes; ++i) check(cells_[offset + i], offset, bytes, kind, by, site);
}

void Region::land(const void* address, size_t bytes, const Stamp& stamp) {
  const size_t offset = static_cast<const char*>(address) - data_;
  for (size_t i = 0; i < bytes; ++i) {
    cells_[offset + i].in_flight = false;
    cells_[offset + i].write = stamp;
  }
}

void Region::mark_written(size_t offset, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    cells_[offset + i] = Cell{};
    cells_[offset + i].written = true;
  }
}

void Region::require_written(size_t offset, size_t bytes) const {
  for (size_t i = 0; i < bytes; ++i) {
    if (!cells_[offset + i].written) {
      throw Fault("byte " + std::to_string(offset + i) + " of " + name_ + " (" +
                  std::to_string(cells_.size()) + " bytes) was never written");
    }
  }
}

void Region::forget() {
  std::memset(data_, kPoison, cells_.size());
  std::fill(cells_.begin(), cells_.end(), Cell{});
}

void* GlobalMemory::allocate(size_t bytes, const std::string& name) {
  std::unique_ptr<char[]> storage(new char[bytes + kAlignment]);
  auto address = reinterpret_cast<uintptr_t>(storage.get());
  char* data = reinterpret_cast<char*>((address + kAlignment - 1) / kAlignment * kAlignment);
  Region region(name, data, bytes);
  allocations_.emplace(data, Allocation{std::move(storage), std::move(region)});
  return data;
}

void GlobalMemory::release(void* address) {
  if (address && allocations_.erase(static_cast<char*>(address)) == 0) {
    throw Fault("release of an address that was not allocated");
  }
}

Region& GlobalMemory::find(const void* address, size_t bytes, const char* verb, const Site& site) {
  auto next = allocations_.upper_bound(static_cast<const char*>(address));
  if (next != allocations_.begin()) {
    Region& region = std::prev(next)->second.region;
    // Up to a page past its end an access is most likely meant for this allocation: the report names it.
    if (static_cast<const char*>(address) < region.data() + region.bytes() + 4096) return region;
  }
  if (next != allocations_.end()) {
    throw Fault(std::string("out-of-bounds ") + verb + " of " + std::to_string(bytes) + " bytes, " +
                std::to_string(next->first - static_cast<const char*>(address)) + " before the start of " +
                next->second.region.name() + ", " + to_string(site));
  }
  throw Fault(std::string("out-of-bounds ") + verb + " of " + std::to_string(bytes) +
              " bytes outside every allocation, " + to_string(site));
}

}  // namespace emulator

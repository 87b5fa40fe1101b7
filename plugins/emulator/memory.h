// Device memory with a shadow: every byte remembers who wrote and read it last and when, so that accesses out
// of bounds, reads of bytes nothing wrote and unordered accesses of two threads are reported where they
// happen.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

// A line of kernel source.
struct Site {
  const char* file;
  int line;

  // As a default argument: the line of the call.
  static constexpr Site current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

std::string to_string(const Site& site);

// What a kernel did wrong. The message names the access, the thread and the line.
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// When a thread touched a byte. `thread` counts through all launches; 0 is the host. What an asynchronous
// tile copy wrote is known to those that know of the `tick` of its `engine`, an entry of their clocks.
struct Stamp {
  uint64_t thread = 0;
  uint32_t barrier = 0;
  uint32_t warp_barrier = 0;
  uint32_t tick = 0;
  uint32_t engine = 0;  // 0: the thread itself
};

// Which threads read a byte since it was last written, as far as a later writer has to know.
enum class Readers : uint8_t { kNone, kThread, kWarp, kBlock, kBlocks };

struct Cell {
  Stamp write;
  Stamp read;
  Readers readers = Readers::kNone;
  bool written = false;
  bool atomic = false;     // the last access was atomic
  bool in_flight = false;  // an asynchronous copy to this byte was started and not waited for
};

// Operand reads and tile writes are those of the asynchronous proxy: matrix products and tile copies.
enum class Access : uint8_t { kRead, kWrite, kAtomic, kAsyncWrite, kOperandRead, kTileWrite };

// The launch, block and thread that an access is made from.
struct Accessor {
  uint64_t first_thread = 0;  // id of thread 0 of block 0 in this launch
  uint64_t thread = 0;
  uint32_t threads_per_block = 1;
  uint32_t barrier = 0;
  uint32_t warp_barrier = 0;
  uint32_t tick = 0;
  const uint32_t* clock = nullptr;  // clocks.h; none in blocks that only use barriers of the block and warps

  uint64_t block_of(uint64_t id) const { return (id - first_thread) / threads_per_block; }
  uint64_t warp_of(uint64_t id) const { return (id - first_thread) % threads_per_block / 32; }
  Stamp stamp() const { return {thread, barrier, warp_barrier, tick, 0}; }
  // Whether the asynchronous proxy sees a write: of its own, the host's, or one that its thread fenced.
  bool knows_fence_after(const Stamp& write) const;
};

class Region {
 public:
  Region(std::string name, char* data, size_t bytes);

  bool contains(const void* address) const;
  size_t bytes() const { return cells_.size(); }
  char* data() const { return data_; }
  const std::string& name() const { return name_; }

  // Checks and records one access by a thread; throws Fault.
  void access(const void* address, size_t bytes, Access kind, const Accessor& by, const Site& site);
  void mark_written(size_t offset, size_t bytes);                    // by the host
  void land(const void* address, size_t bytes, const Stamp& stamp);  // an asynchronous copy arrived
  void require_written(size_t offset, size_t bytes) const;           // the host reads
  void forget();                                                     // as if just allocated

 private:
  [[noreturn]] void fail(const std::string& what, size_t offset, size_t bytes, const Site& site) const;
  void check(Cell& cell, size_t offset, size_t bytes, Access kind, const Accessor& by,
             const Site& site) const;

  std::string name_;
  char* data_;
  std::vector<Cell> cells_;
};

// The global memory of the emulated device.
class GlobalMemory {
 public:
  void* allocate(size_t bytes, const std::string& name);
  void release(void* address);
  Region& find(const void* address, size_t bytes, const char* verb, const Site& site);

 private:
  struct Allocation {
    std::unique_ptr<char[]> storage;
    Region region;
  };
  std::map<const char*, Allocation> allocations_;
};

}  // namespace emulator

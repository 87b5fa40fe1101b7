// The emulated device: runs a kernel's blocks one after another, the threads of a block as fibers that switch
// at barriers and warp collectives, and reports what a GPU would leave undefined.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/memory.h"

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr uint32_t kFullMask = 0xffffffffu;

struct LaunchShape {
  unsigned grid = 1;
  unsigned block = 1;
  size_t shared_bytes = 0;
};

// What a lane brings to a warp collective, and what it takes away from it.
using Payload = std::array<uint32_t, 6>;
struct Lane {
  Payload sent{};
  Payload received{};
};

// Combines the lanes of a collective once all of them have arrived.
using Lanes = std::array<Lane, kWarp>;
using Combine = void (*)(Lanes& lanes, uint32_t mask);

class Machine {
 public:
  static Machine& instance();

  // Host side. Each throws Fault.
  void* allocate(size_t bytes, const std::string& name);
  void release(void* address);
  void upload(void* to, const void* from, size_t bytes);
  void download(void* to, const void* from, size_t bytes);
  void launch(const LaunchShape& shape, const std::function<void()>& kernel);
  // Order in which blocks and threads take turns: 0 is ascending, any other value a permutation of its own.
  void set_schedule(uint64_t seed);

  // Device side, called from inside a running kernel.
  unsigned thread() const { return current_; }
  unsigned block() const { return block_; }
  const LaunchShape& shape() const { return shape_; }
  char* shared() { return shared_->data(); }
  void access(const void* address, size_t bytes, Access kind, const Site& site);
  void barrier(const Site& site);
  void warp_barrier(uint32_t mask, const Site& site);
  // A warp collective: `name` and `mask` must agree in all lanes of the mask.
  Payload collective(const char* name, uint32_t mask, const Payload& sent, Combine combine, const Site& site);
  void copy_async(void* to_shared, const void* from_global, size_t bytes, const Site& site);
  void copy_async_commit();
  void copy_async_wait(size_t groups_left);

 private:
  enum class State : uint8_t { kReady, kAtBarrier, kInWarp, kDone };

  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };

  struct Thread {
    std::unique_ptr<Fiber> fiber;
    State state = State::kReady;
    Site waiting_at{};
    const char* collective = nullptr;
    uint32_t mask = 0;
    std::vector<std::vector<Copy>> committed;
    std::vector<Copy> uncommitted;
  };

  struct Warp {
    Lanes lanes;
    uint32_t barriers = 0;
  };

  void run_block();
  void finish_barrier();
  void arrive_in_warp(const char* name, uint32_t mask, const Site& site);
  bool complete_in_warp(uint32_t mask) const;
  void wait();
  [[noreturn]] void abandon(const Fault& fault);
  [[noreturn]] void report_deadlock() const;
  std::string thread_name(unsigned thread) const;
  Region& region_of(const void* address, size_t bytes, Access kind, const Site& site);
  Accessor accessor() const;

  std::recursive_mutex mutex_;
  GlobalMemory global_;
  Region* recent_ = nullptr;
  uint64_t seed_ = 0;
  uint64_t next_thread_id_ = 1;

  LaunchShape shape_;
  uint64_t first_thread_ = 0;
  unsigned block_ = 0;
  unsigned current_ = 0;
  unsigned at_barrier_ = 0;
  unsigned done_ = 0;
  uint32_t barriers_ = 0;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::unique_ptr<char[]> shared_storage_;
  std::unique_ptr<Region> shared_;
  std::unique_ptr<Fault> fault_;
  std::function<void()> thread_body_;
};

}  // namespace emulator

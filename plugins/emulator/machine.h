// The emulated device: runs a kernel's blocks one after another, the threads of a block as fibers that switch
// at barriers and warp collectives, and reports what a GPU would leave undefined.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "emulator/clocks.h"
#include "emulator/fiber.h"
#include "emulator/memory.h"
#include "emulator/warpgroup.h"

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

// 0 ... count - 1, permuted where there is something to permute by.
std::vector<unsigned> turns(unsigned count, std::mt19937_64* random);

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

  // Asynchronous machinery of warpgroups (machine_async.cpp).
  void named_barrier(unsigned number, unsigned threads, const Site& site);
  void mbarrier_init(void* at, unsigned arrivals, const Site& site);
  void mbarrier_arrive(void* at, unsigned expected_bytes, const Site& site);
  void mbarrier_wait(void* at, unsigned parity, const Site& site);
  void fence_proxy();
  // Copies a box of 64 columns to shared memory in the 128-byte swizzle, zeros for what lies outside the
  // tensor.
  void copy_tile(void* to, const TileMap& map, const TileIndex& index, void* mbarrier, const Site& site);
  // By all launches so far.
  size_t copied_tiles() const { return copied_tiles_; }
  void warpgroup_arrive() { ++threads_[current_].register_fences; }
  void warpgroup_product(const ProductKind& kind, const Product& mine, const Site& site);
  void warpgroup_commit();
  void warpgroup_wait(size_t groups_left, const Site& site);
  // Checks an access to registers that products may use.
  void touch(RegisterGuard& guard, const Site& site);
  void require_done(const RegisterGuard& guard, const Site& site);

 private:
  enum class State : uint8_t {
    kReady,
    kAtBarrier,
    kInWarp,
    kAtNamedBarrier,
    kAtMbarrier,
    kInWarpgroup,
    kDone
  };

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
    unsigned meets_at = 0;  // the named barrier or mbarrier that it waits at
    unsigned parity = 0;
    uint32_t register_fences = 1;
    uint32_t products = 0;
    std::vector<uint32_t> product_groups;
  };

  struct Warp {
    Lanes lanes;
    uint32_t barriers = 0;
  };

  void run_block();
  void start_block();
  void check_end_of_block() const;
  void finish_barrier();
  void arrive_in_warp(const char* name, uint32_t mask, const Site& site);
  bool complete_in_warp(uint32_t mask) const;
  void wait();
  [[noreturn]] void abandon(const Fault& fault);
  [[noreturn]] void report_deadlock() const;
  std::string thread_name(unsigned thread) const;
  Region& region_of(const void* address, size_t bytes, Access kind, const Site& site);
  Accessor accessor() const;
  Mbarrier& mbarrier_at(void* at, const Site& site);
  void complete_phase(Mbarrier& barrier);
  bool wake_waiting();
  bool land_tile(std::mt19937_64* random);
  void issue_product(const ProductKind& kind, unsigned first, const Site& site);
  void read_operand(const SharedMatrix& matrix, unsigned lines, unsigned pieces, unsigned first,
                    uint16_t* content, const Site& site);

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
  Clocks clocks_;
  OperandReads operand_reads_;
  std::vector<Mbarrier> mbarriers_;
  std::vector<PendingTile> tiles_;
  size_t copied_tiles_ = 0;
  std::array<NamedBarrier, 16> named_barriers_;
  std::vector<Product> products_;
  std::unique_ptr<Fault> fault_;
  std::function<void()> thread_body_;
};

}  // namespace emulator

// Hopper's asynchronous instructions on the emulator (kernels/cuda_warpgroup_device.h says what they do).
#pragma once

#include "emulator/device.h"

#define ROTEXPORT_GRID_CONSTANT const

namespace device {

struct TileMap {
  TileTensor tensor{};
  unsigned box_rows = 0;
};
constexpr unsigned kTileColumns = 64;

inline Status make_tile_map(TileMap& map, const TileTensor& tensor, unsigned box_rows) {
  map = {tensor, box_rows};
  return {};
}

class Mbarrier {
 public:
  explicit Mbarrier(unsigned offset) : shared_(offset) {}

  void init(unsigned arrivals, ROTEXPORT_SITE) const {
    machine().mbarrier_init(shared_.at(0), arrivals, site);
  }
  void arrive(ROTEXPORT_SITE) const { machine().mbarrier_arrive(shared_.at(0), 0, site); }
  void arrive_expecting(unsigned bytes, ROTEXPORT_SITE) const {
    machine().mbarrier_arrive(shared_.at(0), bytes, site);
  }
  void wait(unsigned parity, ROTEXPORT_SITE) const { machine().mbarrier_wait(shared_.at(0), parity, site); }
  void* address() const { return shared_.at(0); }

 private:
  static emulator::Machine& machine() { return emulator::Machine::instance(); }

  Shared<uint64_t> shared_;
};

inline void fence_async_proxy() { emulator::Machine::instance().fence_proxy(); }
inline void named_barrier(unsigned number, unsigned threads, ROTEXPORT_SITE) {
  emulator::Machine::instance().named_barrier(number, threads, site);
}

template <class T>
void copy_tile(const Shared<T>& to, unsigned to_index, const TileMap& map, int column, int row, int head,
               const Mbarrier& mbarrier, ROTEXPORT_SITE) {
  const TileTensor& tensor = map.tensor;
  const bool inside = head >= 0 && static_cast<unsigned>(head) < tensor.heads;
  const int64_t before = int64_t{head} * tensor.head_rows * tensor.columns * 2;
  const emulator::TileMap rows_of_head{static_cast<const char*>(tensor.data) + (inside ? before : 0),
                                       tensor.columns, tensor.rows, inside ? 1u : 0u, map.box_rows};
  emulator::Machine::instance().copy_tile(to.at(to_index), rows_of_head, {column, row, 0}, mbarrier.address(),
                                          site);
}

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

template <class T, int N>
class Registers {
  static_assert(sizeof(T) == 4, "a register holds 4 bytes");

 public:
  T& at(int i, ROTEXPORT_SITE) {
    emulator::Machine::instance().touch(guard_, site);
    return values_[i];
  }
  T* values() { return values_; }
  emulator::RegisterGuard& guard() { return guard_; }

 private:
  T values_[N];
  emulator::RegisterGuard guard_;
};

template <class T>
uint64_t describe_matrix(const Shared<T>& from, unsigned index, unsigned leading_bytes) {
  const auto start =
      static_cast<uint64_t>(reinterpret_cast<char*>(from.at(index)) - emulator::Machine::instance().shared());
  return start >> 4 | uint64_t{leading_bytes >> 4} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

inline uint64_t advance(uint64_t matrix, unsigned bytes) { return matrix + (bytes >> 4); }

inline void warpgroup_arrive() { emulator::Machine::instance().warpgroup_arrive(); }
inline void warpgroup_commit() { emulator::Machine::instance().warpgroup_commit(); }
template <int kGroupsLeft, int N>
void warpgroup_wait(Registers<float, N>& sums, ROTEXPORT_SITE) {
  emulator::Machine::instance().warpgroup_wait(kGroupsLeft, site);
  emulator::Machine::instance().require_done(sums.guard(), site);
}

template <class T, bool kAccumulates>
void multiply_shared(Registers<float, 64>& sums, uint64_t a, uint64_t b, ROTEXPORT_SITE) {
  static constexpr emulator::ProductKind kKind{"multiply_shared", 128, false, T::widen};
  emulator::Machine::instance().warpgroup_product(
      kKind, {sums.values(), &sums.guard(), nullptr, nullptr, a, b, kAccumulates}, site);
}

template <class T, int N, int M>
void multiply_registers(Registers<float, N>& sums, Registers<uint32_t, M>& a, int first, uint64_t b,
                        ROTEXPORT_SITE) {
  static constexpr emulator::ProductKind kKind{"multiply_registers", 2 * N, true, T::widen};
  emulator::Machine::instance().warpgroup_product(
      kKind, {sums.values(), &sums.guard(), a.values() + first, &a.guard(), 0, b, true}, site);
}

}  // namespace device

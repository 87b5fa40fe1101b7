// The device vocabulary on the emulator. Every memory access and every meeting of threads goes through the
// Machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "emulator/formats.h"
#include "emulator/machine.h"
#include "kernels/status.h"
#include "kernels/vector.h"

#define ROTEXPORT_DEVICE inline
#define ROTEXPORT_KERNEL
#define ROTEXPORT_UNROLL
#define ROTEXPORT_ROLL
#define ROTEXPORT_UNROLL_BY(COUNT)
#define __launch_bounds__(...)

// The line of kernel source that calls a function declared with this as its last parameter.
#define ROTEXPORT_SITE const emulator::Site& site = emulator::Site::current()

namespace device {

using Half = emulator::Half;
using BFloat16 = emulator::BFloat16;
using Stream = void*;
using emulator::bits_float;
using emulator::float_bits;
using emulator::kFullMask;
using emulator::kWarp;

inline unsigned thread_index() { return emulator::Machine::instance().thread(); }
template <class T>
T opaque(T value) {
  return value;
}
inline unsigned block_index() { return emulator::Machine::instance().block(); }
inline unsigned block_size() { return emulator::Machine::instance().shape().block; }
inline unsigned grid_size() { return emulator::Machine::instance().shape().grid; }

template <class V>
V checked_load(const void* address, const emulator::Site& site) {
  emulator::Machine::instance().access(address, sizeof(V), emulator::Access::kRead, site);
  V value;
  std::memcpy(static_cast<void*>(&value), address, sizeof(V));
  return value;
}

template <class V>
void checked_store(void* address, const V& value, const emulator::Site& site) {
  emulator::Machine::instance().access(address, sizeof(V), emulator::Access::kWrite, site);
  std::memcpy(address, &value, sizeof(V));
}

template <class T>
class Global {
 public:
  Global() = default;
  explicit Global(T* data) : data_(data) {}

  Global from(int64_t start) const {
    return Global(
        reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(data_) + static_cast<uintptr_t>(start) * sizeof(T)));
  }
  template <class V>
  V load(uint32_t index, ROTEXPORT_SITE) const {
    return checked_load<V>(at(index), site);
  }
  template <class V>
  void store(uint32_t index, const V& value, ROTEXPORT_SITE) const {
    checked_store(at(index), value, site);
  }

 private:
  // Addresses are computed as on a GPU, in 32 bits from the start of the view. An index out of bounds must
  // reach the checks, so the address is made without pointer arithmetic.
  T* at(uint32_t index) const {
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(data_) +
                                index * static_cast<uint32_t>(sizeof(T)));
  }

  T* data_ = nullptr;
};

template <class T>
class Shared {
 public:
  explicit Shared(unsigned offset) : offset_(offset) {}

  template <class V>
  V load(unsigned index, ROTEXPORT_SITE) const {
    return checked_load<V>(at(index), site);
  }
  template <class V>
  void store(unsigned index, const V& value, ROTEXPORT_SITE) const {
    checked_store(at(index), value, site);
  }
  void atomic_max(unsigned index, T value, ROTEXPORT_SITE) const {
    update(index, [value](T old) { return old < value ? value : old; }, site);
  }
  void atomic_add(unsigned index, T value, ROTEXPORT_SITE) const {
    update(index, [value](T old) { return static_cast<T>(old + value); }, site);
  }
  T* at(unsigned index) const {
    const auto start = reinterpret_cast<uintptr_t>(emulator::Machine::instance().shared());
    return reinterpret_cast<T*>(start + offset_ + static_cast<uintptr_t>(index) * sizeof(T));
  }

 private:
  template <class Function>
  void update(unsigned index, Function function, const emulator::Site& site) const {
    emulator::Machine::instance().access(at(index), sizeof(T), emulator::Access::kAtomic, site);
    T value;
    std::memcpy(&value, at(index), sizeof(T));
    value = function(value);
    std::memcpy(at(index), &value, sizeof(T));
  }

  unsigned offset_;
};

inline void barrier(ROTEXPORT_SITE) { emulator::Machine::instance().barrier(site); }
inline void warp_barrier(ROTEXPORT_SITE) { emulator::Machine::instance().warp_barrier(kFullMask, site); }

// What each collective does once all lanes have arrived (device.cpp).
void combine_shuffle(emulator::Lanes& lanes, uint32_t mask);
void combine_ballot(emulator::Lanes& lanes, uint32_t mask);
void combine_matrices(emulator::Lanes& lanes, uint32_t mask);
void combine_transposed_matrices(emulator::Lanes& lanes, uint32_t mask);
template <class T>
void combine_products(emulator::Lanes& lanes, uint32_t mask);
void combine_int8_products(emulator::Lanes& lanes, uint32_t mask);

template <class T>
T shuffle(T value, unsigned lane, uint32_t mask = kFullMask, ROTEXPORT_SITE) {
  static_assert(sizeof(T) == 4, "shuffles move 4 bytes");
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits =
      emulator::Machine::instance().collective("shuffle", mask, {bits, lane, 0, 0}, combine_shuffle, site)[0];
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class T>
T shuffle_xor(T value, unsigned lanes, uint32_t mask = kFullMask, ROTEXPORT_SITE) {
  return shuffle(value, (thread_index() % kWarp) ^ lanes, mask, site);
}

inline uint32_t ballot(bool vote, uint32_t mask = kFullMask, ROTEXPORT_SITE) {
  return emulator::Machine::instance().collective("ballot", mask, {vote, 0, 0, 0}, combine_ballot, site)[0];
}
inline bool any(bool vote, uint32_t mask = kFullMask, ROTEXPORT_SITE) {
  return ballot(vote, mask, site) != 0;
}
inline bool all(bool vote, uint32_t mask = kFullMask, ROTEXPORT_SITE) {
  return ballot(vote, mask, site) == mask;
}

inline int round_to_int(float value) {
  // cvt.rni.s32.f32 saturates, and makes 0 of a NaN.
  if (std::isnan(value)) return 0;
  if (value >= 2147483648.0f) return INT32_MAX;
  if (value < -2147483648.0f) return INT32_MIN;
  return static_cast<int>(std::nearbyint(value));
}
inline int population(uint32_t bits) { return __builtin_popcount(bits); }
inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) {
    picked |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return picked;
}

template <class T>
uint32_t pack(float low, float high) {
  return static_cast<uint32_t>(T::round(high)) << 16 | T::round(low);
}

template <class T>
float low_of(uint32_t pair) {
  return T::widen(static_cast<uint16_t>(pair));
}
template <class T>
float high_of(uint32_t pair) {
  return T::widen(static_cast<uint16_t>(pair >> 16));
}
template <class T>
uint32_t multiply_add_pairs(uint32_t a, uint32_t b, uint32_t c) {
  // Exact in double, but for sums of terms that differ by more than 2^30.
  const double low = static_cast<double>(low_of<T>(a)) * low_of<T>(b) + low_of<T>(c);
  const double high = static_cast<double>(high_of<T>(a)) * high_of<T>(b) + high_of<T>(c);
  return pack<T>(static_cast<float>(low), static_cast<float>(high));
}

inline float exp2(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }

template <class T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], ROTEXPORT_SITE) {
  const emulator::Payload products = emulator::Machine::instance().collective(
      "multiply_add", kFullMask, {a[0], a[1], a[2], a[3], b[0], b[1]}, combine_products<T>, site);
  for (int i = 0; i < 4; ++i) sums[i] += bits_float(products[i]);
}

inline void multiply_add_int8(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              ROTEXPORT_SITE) {
  const emulator::Payload products = emulator::Machine::instance().collective(
      "multiply_add_int8", kFullMask, {a[0], a[1], a[2], a[3], b[0], b[1]}, combine_int8_products, site);
  for (int i = 0; i < 4; ++i) sums[i] = static_cast<int32_t>(static_cast<uint32_t>(sums[i]) + products[i]);
}

template <class T>
void load_matrices(uint32_t (&fragment)[4], const Shared<T>& from, unsigned row_index, ROTEXPORT_SITE) {
  static_assert(sizeof(T) == 2, "matrices of 16-bit elements");
  const auto row = checked_load<Vector<uint32_t, 4>>(from.at(row_index), site);
  const emulator::Payload received = emulator::Machine::instance().collective(
      "load_matrices", kFullMask, {row.values[0], row.values[1], row.values[2], row.values[3]},
      combine_matrices, site);
  for (int i = 0; i < 4; ++i) fragment[i] = received[i];
}

template <class T>
void load_matrices_transposed(uint32_t (&fragment)[4], const Shared<T>& from, unsigned row_index,
                              ROTEXPORT_SITE) {
  static_assert(sizeof(T) == 2, "matrices of 16-bit elements");
  const auto row = checked_load<Vector<uint32_t, 4>>(from.at(row_index), site);
  const emulator::Payload received = emulator::Machine::instance().collective(
      "load_matrices_transposed", kFullMask, {row.values[0], row.values[1], row.values[2], row.values[3]},
      combine_transposed_matrices, site);
  for (int i = 0; i < 4; ++i) fragment[i] = received[i];
}

template <int kBytes = 16, class T>
void copy_async(const Shared<T>& to, unsigned to_index, const T* from, ROTEXPORT_SITE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "an asynchronous copy moves 4, 8 or 16 bytes");
  emulator::Machine::instance().copy_async(to.at(to_index), from, kBytes, site);
}
inline void copy_async_commit() { emulator::Machine::instance().copy_async_commit(); }
template <int kGroupsLeft>
void copy_async_wait() {
  emulator::Machine::instance().copy_async_wait(kGroupsLeft);
}

struct LaunchShape {
  unsigned grid = 1;
  unsigned block = 1;
  unsigned shared_bytes = 0;
};

Status remember(const emulator::Fault& fault);

template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchShape& shape, Stream,
              const Arguments&... arguments) {
  try {
    emulator::Machine::instance().launch({shape.grid, shape.block, shape.shared_bytes},
                                         [&] { kernel(arguments...); });
  } catch (const emulator::Fault& fault) {
    return remember(fault);
  }
  return {};
}

inline Status copy(void* to, const void* from, size_t bytes, Stream) {
  try {
    std::vector<char> content(bytes);
    emulator::Machine::instance().download(content.data(), from, bytes);
    emulator::Machine::instance().upload(to, content.data(), bytes);
  } catch (const emulator::Fault& fault) {
    return remember(fault);
  }
  return {};
}

// It has them, but stands for any device: whoever means Hopper says so.
inline bool has_warpgroups() { return false; }
inline unsigned multiprocessors() { return 1; }

}  // namespace device

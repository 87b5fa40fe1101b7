// The device vocabulary on a GPU. Inline PTX and launches live here and nowhere else.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels/status.h"
#include "kernels/vector.h"

#define ROTEXPORT_DEVICE __device__ __forceinline__
#define ROTEXPORT_KERNEL __global__
#define ROTEXPORT_UNROLL _Pragma("unroll")
#define ROTEXPORT_ROLL _Pragma("unroll 1")
#define ROTEXPORT_TEXT(...) #__VA_ARGS__
#define ROTEXPORT_UNROLL_BY(COUNT) _Pragma(ROTEXPORT_TEXT(unroll(COUNT)))

namespace device {

using Half = __half;
using BFloat16 = __nv_bfloat16;
using Stream = cudaStream_t;

constexpr unsigned kWarp = 32;
constexpr uint32_t kFullMask = 0xffffffffu;

ROTEXPORT_DEVICE unsigned thread_index() { return threadIdx.x; }
// The value, of which the compiler no longer knows where it comes from. Addresses derived from a loop's
// counter are then computed in each turn, where otherwise one register each would be kept and advanced.
template <class T>
ROTEXPORT_DEVICE T opaque(T value) {
  static_assert(sizeof(T) == 4, "one register");
  asm volatile("" : "+r"(value));
  return value;
}
ROTEXPORT_DEVICE unsigned block_index() { return blockIdx.x; }
ROTEXPORT_DEVICE unsigned block_size() { return blockDim.x; }
ROTEXPORT_DEVICE unsigned grid_size() { return gridDim.x; }

// A tensor in global memory. A tensor of const elements must not be written by any thread of the launch.
// Indices reach 4 GB from where the view starts: 32-bit offsets spare the registers of 64-bit addresses.
template <class T>
class Global {
 public:
  Global() = default;
  __host__ __device__ explicit Global(T* data) : data_(data) {}

  ROTEXPORT_DEVICE Global from(int64_t start) const {
    Global shifted;
    shifted.data_ = data_ + start;
    return shifted;
  }
  template <class V>
  ROTEXPORT_DEVICE V load(uint32_t index) const {
    if constexpr (std::is_const<T>::value) {
      return load_constant<V>(at(index));
    } else {
      return *reinterpret_cast<const V*>(at(index));
    }
  }
  template <class V>
  ROTEXPORT_DEVICE void store(uint32_t index, const V& value) const {
    *reinterpret_cast<V*>(at(index)) = value;
  }

 private:
  using Byte = std::conditional_t<std::is_const<T>::value, const char, char>;

  ROTEXPORT_DEVICE Byte* at(uint32_t index) const {
    return reinterpret_cast<Byte*>(data_) + index * static_cast<uint32_t>(sizeof(T));
  }

  template <class V>
  static ROTEXPORT_DEVICE V load_constant(const char* address) {
    V value;
    if constexpr (sizeof(V) == 16) {
      *reinterpret_cast<uint4*>(&value) = __ldg(reinterpret_cast<const uint4*>(address));
    } else if constexpr (sizeof(V) == 8) {
      *reinterpret_cast<uint2*>(&value) = __ldg(reinterpret_cast<const uint2*>(address));
    } else if constexpr (sizeof(V) == 4) {
      *reinterpret_cast<uint32_t*>(&value) = __ldg(reinterpret_cast<const uint32_t*>(address));
    } else if constexpr (sizeof(V) == 2) {
      *reinterpret_cast<uint16_t*>(&value) = __ldg(reinterpret_cast<const uint16_t*>(address));
    } else {
      static_assert(sizeof(V) == 1, "no load of this size");
      *reinterpret_cast<uint8_t*>(&value) = __ldg(reinterpret_cast<const uint8_t*>(address));
    }
    return value;
  }

  T* data_ = nullptr;
};

// A part of the block's dynamic shared memory, `offset` bytes from its start.
template <class T>
class Shared {
 public:
  ROTEXPORT_DEVICE explicit Shared(unsigned offset) {
    extern __shared__ __align__(1024) char rotexport_shared[];  // as swizzled tiles need it
    data_ = reinterpret_cast<T*>(rotexport_shared + offset);
  }

  template <class V>
  ROTEXPORT_DEVICE V load(unsigned index) const {
    return *reinterpret_cast<const V*>(data_ + index);
  }
  template <class V>
  ROTEXPORT_DEVICE void store(unsigned index, const V& value) const {
    // Left to itself the compiler stores the elements of a vector one by one.
    if constexpr (sizeof(V) == 16) {
      const uint4 words = *reinterpret_cast<const uint4*>(&value);
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address(index)), "r"(words.x),
                   "r"(words.y), "r"(words.z), "r"(words.w)
                   : "memory");
    } else {
      *reinterpret_cast<V*>(data_ + index) = value;
    }
  }
  ROTEXPORT_DEVICE void atomic_max(unsigned index, T value) const { atomicMax(data_ + index, value); }
  ROTEXPORT_DEVICE void atomic_add(unsigned index, T value) const { atomicAdd(data_ + index, value); }
  ROTEXPORT_DEVICE unsigned address(unsigned index) const {
    return static_cast<unsigned>(__cvta_generic_to_shared(data_ + index));
  }

 private:
  T* data_;
};

ROTEXPORT_DEVICE void barrier() { __syncthreads(); }
ROTEXPORT_DEVICE void warp_barrier() { __syncwarp(); }

template <class T>
ROTEXPORT_DEVICE T shuffle_xor(T value, unsigned lanes, uint32_t mask = kFullMask) {
  return __shfl_xor_sync(mask, value, lanes);
}
template <class T>
ROTEXPORT_DEVICE T shuffle(T value, unsigned lane, uint32_t mask = kFullMask) {
  return __shfl_sync(mask, value, lane);
}
ROTEXPORT_DEVICE uint32_t ballot(bool vote, uint32_t mask = kFullMask) { return __ballot_sync(mask, vote); }
ROTEXPORT_DEVICE bool any(bool vote, uint32_t mask = kFullMask) { return __any_sync(mask, vote); }
ROTEXPORT_DEVICE bool all(bool vote, uint32_t mask = kFullMask) { return __all_sync(mask, vote); }

ROTEXPORT_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
ROTEXPORT_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
ROTEXPORT_DEVICE int round_to_int(float value) { return __float2int_rn(value); }
ROTEXPORT_DEVICE int population(uint32_t bits) { return __popc(bits); }
// Byte i of the result is byte (selector >> 4i & 7) of the eight bytes low, high.
ROTEXPORT_DEVICE uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// Two values rounded to nearest even and packed, `low` in the low half.
template <class T>
ROTEXPORT_DEVICE uint32_t pack(float low, float high);
template <>
ROTEXPORT_DEVICE uint32_t pack<Half>(float low, float high) {
  const __half2 packed = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&packed);
}
template <>
ROTEXPORT_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  const __nv_bfloat162 packed = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&packed);
}

// The two values of a pair, and a * b + c on pairs, rounded once.
template <class T>
ROTEXPORT_DEVICE float low_of(uint32_t pair);
template <class T>
ROTEXPORT_DEVICE float high_of(uint32_t pair);
template <class T>
ROTEXPORT_DEVICE uint32_t multiply_add_pairs(uint32_t a, uint32_t b, uint32_t c);
#define ROTEXPORT_PAIRS(TYPE, PAIR, LOW, HIGH)                                                       \
  template <>                                                                                        \
  ROTEXPORT_DEVICE float low_of<TYPE>(uint32_t pair) {                                               \
    return LOW(*reinterpret_cast<const PAIR*>(&pair));                                               \
  }                                                                                                  \
  template <>                                                                                        \
  ROTEXPORT_DEVICE float high_of<TYPE>(uint32_t pair) {                                              \
    return HIGH(*reinterpret_cast<const PAIR*>(&pair));                                              \
  }                                                                                                  \
  template <>                                                                                        \
  ROTEXPORT_DEVICE uint32_t multiply_add_pairs<TYPE>(uint32_t a, uint32_t b, uint32_t c) {           \
    const PAIR sum = __hfma2(*reinterpret_cast<const PAIR*>(&a), *reinterpret_cast<const PAIR*>(&b), \
                             *reinterpret_cast<const PAIR*>(&c));                                    \
    return *reinterpret_cast<const uint32_t*>(&sum);                                                 \
  }
ROTEXPORT_PAIRS(Half, __half2, __low2float, __high2float)
ROTEXPORT_PAIRS(BFloat16, __nv_bfloat162, __low2float, __high2float)
#undef ROTEXPORT_PAIRS

// 2^x and 1/x, of which the last bit or two may be off.
ROTEXPORT_DEVICE float exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
ROTEXPORT_DEVICE float reciprocal(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}

// sums += a . b, where a is 16x16 and b 16x8 in the fragment layout of mma.m16n8k16.
template <class T>
ROTEXPORT_DEVICE void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
#define ROTEXPORT_MMA(TYPE, NAME)                                                    \
  template <>                                                                        \
  ROTEXPORT_DEVICE void multiply_add<TYPE>(float (&sums)[4], const uint32_t (&a)[4], \
                                           const uint32_t (&b)[2]) {                 \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                       \
        ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                 \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                 \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));         \
  }
ROTEXPORT_MMA(Half, "f16")
ROTEXPORT_MMA(BFloat16, "bf16")
#undef ROTEXPORT_MMA

// The same for 8-bit integers: a is 16x32 and b 32x8, four elements to a register, sums wrap around.
ROTEXPORT_DEVICE void multiply_add_int8(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8"
      ".s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices of 16-bit elements; lane 8i + r gives the index of row r of matrix i.
template <class T>
ROTEXPORT_DEVICE void load_matrices(uint32_t (&fragment)[4], const Shared<T>& from, unsigned row_index) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(from.address(row_index))
               : "memory");
}

// The same, each matrix transposed as it is read.
template <class T>
ROTEXPORT_DEVICE void load_matrices_transposed(uint32_t (&fragment)[4], const Shared<T>& from,
                                               unsigned row_index) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(from.address(row_index))
               : "memory");
}

// Starts a copy of 4, 8 or 16 bytes that goes on while the thread computes; it has landed after
// copy_async_wait.
template <int kBytes = 16, class T>
ROTEXPORT_DEVICE void copy_async(const Shared<T>& to, unsigned to_index, const T* from) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to.address(to_index)), "l"(from)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to.address(to_index)), "l"(from),
                 "n"(kBytes)
                 : "memory");
  }
}
ROTEXPORT_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsLeft>
ROTEXPORT_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

struct LaunchShape {
  unsigned grid = 1;
  unsigned block = 1;
  unsigned shared_bytes = 0;
};

template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchShape& shape, Stream stream,
              const Arguments&... arguments) {
  constexpr unsigned kSharedWithoutAsking = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > kSharedWithoutAsking) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shape.shared_bytes));
  }
  if (error == cudaSuccess) {
    kernel<<<shape.grid, shape.block, shape.shared_bytes, stream>>>(arguments...);
    error = cudaGetLastError();
  }
  return {error == cudaSuccess ? nullptr : cudaGetErrorString(error)};
}

// Copies from one buffer on the device to another, in the order of the stream.
inline Status copy(void* to, const void* from, size_t bytes, Stream stream) {
  const cudaError_t error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
  return {error == cudaSuccess ? nullptr : cudaGetErrorString(error)};
}

// Whether the current device has Hopper's warpgroup instructions, which no other generation has.
inline bool has_warpgroups() {
  constexpr int kHopper = 9;
  int id = 0;
  int major = 0;
  if (cudaGetDevice(&id) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id) != cudaSuccess) return false;
  return major == kHopper;
}

// Number of multiprocessors of the current device, 0 where it cannot be read.
inline unsigned multiprocessors() {
  int id = 0;
  int count = 0;
  if (cudaGetDevice(&id) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, id) != cudaSuccess) return 0;
  return static_cast<unsigned>(count);
}

}  // namespace device

// Hopper's asynchronous instructions on a GPU (sm_90a): mbarriers, tile copies, products of warpgroups.
// Inline PTX beside that of kernels/cuda_device.h.
#pragma once

#include <cuda.h>

#include "kernels/cuda_device.h"

#define ROTEXPORT_GRID_CONSTANT const __grid_constant__

namespace device {

// A tensor of which boxes of kTileColumns columns are copied.
using TileMap = CUtensorMap;
constexpr unsigned kTileColumns = 64;

inline Status make_tile_map(TileMap& map, const TileTensor& tensor, unsigned box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  constexpr unsigned kSince = 12000;  // version of CUDA
  void* found = nullptr;
  cudaDriverEntryPointQueryResult answer = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kSince, cudaEnableDefault, &answer);
  if (error != cudaSuccess) return {cudaGetErrorString(error)};
  if (answer != cudaDriverEntryPointSuccess) return {"the driver has no cuTensorMapEncodeTiled: update it"};
  const cuuint64_t row_bytes = cuuint64_t{tensor.columns} * 2;
  const cuuint64_t sizes[3] = {tensor.columns, tensor.rows, tensor.heads};
  const cuuint64_t strides[2] = {row_bytes, tensor.head_rows * row_bytes};
  const cuuint32_t box[3] = {kTileColumns, box_rows, 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult encoded = reinterpret_cast<Encode>(found)(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(tensor.data), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return {encoded == CUDA_SUCCESS ? nullptr : "the driver refused a tensor as a map of tiles"};
}

// A barrier in shared memory, `offset` bytes from its start, that counts arrivals and copied bytes. Waiting
// for a parity goes on once the phase of that parity is over; phases count from 0.
class Mbarrier {
 public:
  ROTEXPORT_DEVICE explicit Mbarrier(unsigned offset) : address_(Shared<uint64_t>(offset).address(0)) {}

  ROTEXPORT_DEVICE void init(unsigned arrivals) const {
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], %1;\n"
        "fence.mbarrier_init.release.cluster;" ::"r"(address_),
        "r"(arrivals)
        : "memory");
  }
  ROTEXPORT_DEVICE void arrive() const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_) : "memory");
  }
  // The phase also waits for tile copies of so many bytes.
  ROTEXPORT_DEVICE void arrive_expecting(unsigned bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_), "r"(bytes)
                 : "memory");
  }
  ROTEXPORT_DEVICE void wait(unsigned parity) const {
    while (!is_over(parity)) {
    }
  }
  ROTEXPORT_DEVICE unsigned address() const { return address_; }

 private:
  ROTEXPORT_DEVICE bool is_over(unsigned parity) const {
    uint32_t over;
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n"
        "}"
        : "=r"(over)
        : "r"(address_), "r"(parity)
        : "memory");
    return over != 0;
  }

  unsigned address_;
};

// This thread's writes to shared memory, and barriers it initialized, become visible to tile copies and
// warpgroup products that are ordered behind.
ROTEXPORT_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier of the first `threads` that come to it, by number; 0 is that of the whole block.
ROTEXPORT_DEVICE void named_barrier(unsigned number, unsigned threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Starts the copy of a box into shared memory (a multiple of 1,024 bytes from its start): rows of 128 bytes,
// whose 16-byte pieces are exchanged by the row modulo 8; zeros for what lies outside the tensor. The
// mbarrier counts its bytes.
template <class T>
ROTEXPORT_DEVICE void copy_tile(const Shared<T>& to, unsigned to_index, const TileMap& map, int column,
                                int row, int head, const Mbarrier& mbarrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to.address(to_index)),
      "l"(&map), "r"(mbarrier.address()), "r"(column), "r"(row), "r"(head)
      : "memory");
}

// All threads of a warpgroup change how many registers each may use.
template <int kRegisters>
ROTEXPORT_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
ROTEXPORT_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// What warpgroup products read and write. Only at constant indices; not between a product and its wait.
template <class T, int N>
class Registers {
  static_assert(sizeof(T) == 4, "a register holds 4 bytes");

 public:
  ROTEXPORT_DEVICE T& at(int i) { return values_[i]; }
 ROTEXPORT_DEVICE T (&values()) [N] { return values_; }

 private : T values_[N];
};

// Keeps the compiler from moving uses of the sums across.
template <int N>
ROTEXPORT_DEVICE void pin(Registers<float, N>& sums) {
  ROTEXPORT_UNROLL
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(sums.at(i))::"memory");
}

// A matrix of rows of kTileColumns elements in shared memory, as copy_tile leaves them: from a multiple of 8
// rows on. Where it is read along columns, and has more than kTileColumns, the others begin `leading_bytes`
// behind.
template <class T>
ROTEXPORT_DEVICE uint64_t describe_matrix(const Shared<T>& from, unsigned index, unsigned leading_bytes) {
  constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kSwizzled = uint64_t{1} << 62;
  return kSwizzled | kEightRows | uint64_t{leading_bytes >> 4} << 16 | from.address(index) >> 4;
}

// The same matrix from so many bytes on: further along k, or other panels.
ROTEXPORT_DEVICE uint64_t advance(uint64_t matrix, unsigned bytes) { return matrix + (bytes >> 4); }

// Registers that were used since the last product are ready for the next ones.
ROTEXPORT_DEVICE void warpgroup_arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// The products so far, since the last commit, are a group.
ROTEXPORT_DEVICE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All groups but the last ones are done; among them the one that made these sums.
template <int kGroupsLeft, int N>
ROTEXPORT_DEVICE void warpgroup_wait(Registers<float, N>& sums) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
  pin(sums);
}

#define ROTEXPORT_4(R, I) "+f"(R[I]), "+f"(R[I + 1]), "+f"(R[I + 2]), "+f"(R[I + 3])
#define ROTEXPORT_16(R, I) \
  ROTEXPORT_4(R, I), ROTEXPORT_4(R, I + 4), ROTEXPORT_4(R, I + 8), ROTEXPORT_4(R, I + 12)
#define ROTEXPORT_SUMS_32(R) ROTEXPORT_16(R, 0), ROTEXPORT_16(R, 16)
#define ROTEXPORT_SUMS_64(R) ROTEXPORT_SUMS_32(R), ROTEXPORT_16(R, 32), ROTEXPORT_16(R, 48)
#define ROTEXPORT_NAMES_32                                 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define ROTEXPORT_NAMES_64                                           \
  ROTEXPORT_NAMES_32                                                 \
  ","                                                                \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

#define ROTEXPORT_WGMMA(COLUMNS, TYPE, SUMS, OPERANDS, ACCUMULATES, ENDING)                     \
  "{\n.reg .pred accumulates;\nsetp.ne.b32 accumulates, " ACCUMULATES                           \
  ", 0;\n"                                                                                      \
  "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE " {" SUMS "}, " OPERANDS \
  ", accumulates, 1, 1, " ENDING ";\n}"

// sums [64, 128] (+)= a [64, 16] . b^T, of which both are in shared memory, b as [128, 16]. Sums 4 n + 2 h
// and the next are columns 8 n + 2 (lane % 4) and the next of row lane / 4 + 8 h of the warp's 16 rows.
template <class T, bool kAccumulates>
ROTEXPORT_DEVICE void multiply_shared(Registers<float, 64>& sums, uint64_t a, uint64_t b) {
  float (&d)[64] = sums.values();
  if constexpr (std::is_same<T, Half>::value) {
    asm volatile(ROTEXPORT_WGMMA("128", "f16", ROTEXPORT_NAMES_64, "%64, %65", "%66", "0, 0")
                 : ROTEXPORT_SUMS_64(d)
                 : "l"(a), "l"(b), "n"(kAccumulates));
  } else {
    asm volatile(ROTEXPORT_WGMMA("128", "bf16", ROTEXPORT_NAMES_64, "%64, %65", "%66", "0, 0")
                 : ROTEXPORT_SUMS_64(d)
                 : "l"(a), "l"(b), "n"(kAccumulates));
  }
}

// sums [64, 2 N] += a . b, where b [16, 2 N] is in shared memory along its columns, and a [64, 16] in
// registers `first` to `first` + 3, as multiply_add takes it, 16 rows to a warp.
template <class T, int N, int M>
ROTEXPORT_DEVICE void multiply_registers(Registers<float, N>& sums, Registers<uint32_t, M>& a, int first,
                                         uint64_t b) {
  static_assert(N == 32 || N == 64, "64 or 128 columns");
  float (&d)[N] = sums.values();
#define ROTEXPORT_A "r"(a.at(first)), "r"(a.at(first + 1)), "r"(a.at(first + 2)), "r"(a.at(first + 3))
  constexpr bool kHalf = std::is_same<T, Half>::value;
  if constexpr (N == 64 && kHalf) {
    asm volatile(ROTEXPORT_WGMMA("128", "f16", ROTEXPORT_NAMES_64, "{%64, %65, %66, %67}, %68", "1", "1")
                 : ROTEXPORT_SUMS_64(d)
                 : ROTEXPORT_A, "l"(b));
  } else if constexpr (N == 64) {
    asm volatile(ROTEXPORT_WGMMA("128", "bf16", ROTEXPORT_NAMES_64, "{%64, %65, %66, %67}, %68", "1", "1")
                 : ROTEXPORT_SUMS_64(d)
                 : ROTEXPORT_A, "l"(b));
  } else if constexpr (kHalf) {
    asm volatile(ROTEXPORT_WGMMA("64", "f16", ROTEXPORT_NAMES_32, "{%32, %33, %34, %35}, %36", "1", "1")
                 : ROTEXPORT_SUMS_32(d)
                 : ROTEXPORT_A, "l"(b));
  } else {
    asm volatile(ROTEXPORT_WGMMA("64", "bf16", ROTEXPORT_NAMES_32, "{%32, %33, %34, %35}, %36", "1", "1")
                 : ROTEXPORT_SUMS_32(d)
                 : ROTEXPORT_A, "l"(b));
  }
#undef ROTEXPORT_A
}

#undef ROTEXPORT_WGMMA
#undef ROTEXPORT_NAMES_64
#undef ROTEXPORT_NAMES_32
#undef ROTEXPORT_SUMS_64
#undef ROTEXPORT_SUMS_32
#undef ROTEXPORT_16
#undef ROTEXPORT_4

}  // namespace device

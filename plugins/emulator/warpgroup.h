// What the emulator knows of Hopper's asynchronous instructions: mbarriers, tile copies into swizzled shared
// memory, and products of warpgroups whose operands lie there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulator/clocks.h"
#include "emulator/memory.h"

namespace emulator {

constexpr unsigned kWarpgroup = 128;
constexpr unsigned kSwizzledRow = 128;  // bytes

// The 16-byte pieces of each 128-byte row are exchanged by the row's number modulo 8.
inline size_t swizzled(size_t offset) { return offset ^ (offset >> 3 & 0x70); }

// A tensor [heads, rows, columns] of 16-bit elements in global memory, of which boxes of 64 columns are
// copied.
struct TileMap {
  const char* data = nullptr;
  unsigned columns = 0;
  unsigned rows = 0;
  unsigned heads = 0;
  unsigned box_rows = 0;
};

struct TileIndex {
  int column;
  int row;
  int head;
};

struct PendingTile {
  TileMap map;
  TileIndex index;
  char* to;
  unsigned mbarrier;
  uint64_t thread;

  // Address of 8 elements of a row of the box; nullptr outside the tensor.
  const char* source(unsigned row, unsigned piece) const;
};

struct Mbarrier {
  size_t offset;
  unsigned arrivals;
  unsigned missing;
  int64_t bytes;  // expected and not copied yet
  uint32_t phase;
  Clock arriving;   // what those know that arrived in this phase
  Clock completed;  // and in all before
};

struct NamedBarrier {
  unsigned expected = 0;
  std::vector<unsigned> threads;
};

// Registers that products read or write asynchronously.
struct RegisterGuard {
  uint32_t product = 0;  // the last one
  uint32_t touched = 0;  // the thread's count of register fences when it last used them
};

// What a thread brings to a product of 64 rows: sums += a . b, where a is in its registers or shared.
struct Product {
  float* sums = nullptr;
  RegisterGuard* sums_guard = nullptr;
  const uint32_t* a = nullptr;
  RegisterGuard* a_guard = nullptr;
  uint64_t a_matrix = 0;
  uint64_t b_matrix = 0;
  bool accumulates = false;
};

// One instruction: a [64, 16] . b [16, columns].
struct ProductKind {
  const char* name;
  unsigned columns;
  bool b_by_columns;  // b is stored along its columns ("MN-major"), otherwise along k
  float (*widen)(uint16_t bits);
};

// A matrix in 128-byte swizzle that a wgmma descriptor names. Lines are what is contiguous: rows of K-major
// matrices, values of k of MN-major ones.
class SharedMatrix {
 public:
  SharedMatrix(uint64_t descriptor, bool along_columns);

  // Why a GPU would not take it; nullptr if it does.
  const char* complaint() const;
  // Offset in shared memory of 8 elements of a line.
  size_t piece(unsigned line, unsigned index) const;

 private:
  uint64_t descriptor_;
  bool along_columns_;
  size_t start_;
  size_t leading_;
  size_t stride_;
};

// The fragments of a [64, 16] and of sums [64, columns] that a warpgroup's threads hold.
void gather_fragments(const Product* threads, uint16_t* a);
void add_to_fragments(const Product* threads, unsigned columns, const float* products);

}  // namespace emulator

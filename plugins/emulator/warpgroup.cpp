#include "emulator/warpgroup.h"

namespace emulator {

// Fields of 14 bits in units of 16 bytes at bits 0 (start), 16 (leading) and 32 (stride); the offset of the
// pattern at 49; the swizzle at 62, of which 1 is 128 bytes.
SharedMatrix::SharedMatrix(uint64_t descriptor, bool along_columns)
    : descriptor_(descriptor),
      along_columns_(along_columns),
      start_((descriptor & 0x3fff) << 4),
      leading_((descriptor >> 16 & 0x3fff) << 4),
      stride_((descriptor >> 32 & 0x3fff) << 4) {}

const char* SharedMatrix::complaint() const {
  if (descriptor_ >> 62 != 1) return "a matrix that is not in 128-byte swizzle";
  if ((descriptor_ >> 49 & 7) != 0) return "a matrix whose swizzle has an offset";
  if ((start_ >> 7 & 7) != 0) return "a matrix that does not start at a multiple of 8 rows";
  if (stride_ % 1024 != 0 || stride_ == 0)
    return "a matrix whose groups of 8 rows are no multiple of 1024 bytes apart";
  return nullptr;
}

// In units of 16 bytes the canonical layouts are ((8, m), 2) : ((8, stride), 1) along k, and
// ((8, n), (8, 2)) : ((1, leading), (8, stride)) along columns.
size_t SharedMatrix::piece(unsigned line, unsigned index) const {
  const size_t lines = start_ + line / 8 * stride_ + line % 8 * kSwizzledRow;
  const size_t within = along_columns_ ? index / 8 * leading_ + index % 8 * 16 : index * size_t{16};
  return swizzled(lines + within);
}

namespace {

// Row of a warpgroup's matrix that register pair `half` of a thread belongs to, and its first column.
unsigned row_of(unsigned thread, unsigned half) { return thread / 32 * 16 + thread % 32 / 4 + 8 * half; }
unsigned column_of(unsigned thread) { return thread % 4 * 2; }

}  // namespace

// Register i of a holds columns 8 (i / 2) + 2 (lane % 4), and the next, of row lane / 4 + 8 (i % 2) of the
// warp's 16.
void gather_fragments(const Product* threads, uint16_t* a) {
  for (unsigned thread = 0; thread < kWarpgroup; ++thread) {
    for (unsigned i = 0; i < 4; ++i) {
      uint16_t* to = a + row_of(thread, i % 2) * 16 + 8 * (i / 2) + column_of(thread);
      to[0] = static_cast<uint16_t>(threads[thread].a[i]);
      to[1] = static_cast<uint16_t>(threads[thread].a[i] >> 16);
    }
  }
}

// Sums 4 n + 2 h and the next are columns 8 n + 2 (lane % 4) and the next, of row lane / 4 + 8 h.
void add_to_fragments(const Product* threads, unsigned columns, const float* products) {
  for (unsigned thread = 0; thread < kWarpgroup; ++thread) {
    for (unsigned i = 0; i < columns / 2; ++i) {
      const unsigned column = i / 4 * 8 + column_of(thread) + i % 2;
      const float product = products[row_of(thread, i / 2 % 2) * columns + column];
      float& sum = threads[thread].sums[i];
      sum = threads[thread].accumulates ? sum + product : product;
    }
  }
}

}  // namespace emulator

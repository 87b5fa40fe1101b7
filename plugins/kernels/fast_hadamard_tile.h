// What one warp does behind fast_hadamard.h: it transforms tiles in registers.
//
// A warp transforms tiles of 16 rows and 64 columns of the matrix view of a block (fast_hadamard.h:
// Geometry), or two of them. The tensor cores mix rows: y = A x with A a matrix of signs, x straight from
// global memory. Then each lane holds, of rows g and g + 8 (lane = 4 g + q), the columns 8 (q + 4 j) + t for
// j = 0, 1 and t = 0 ... 7, so column bits 0-2 (t) and 5 (j) are mixed in registers, bits 3 and 4 (q) by
// shuffles, bit 6 across the two tiles, and higher bits after an exchange between warps through shared
// memory. A lane loads and stores 16 bytes at a time.
#pragma once

#include <type_traits>

#include "kernels/device.h"
#include "kernels/fast_hadamard.h"
#include "kernels/fast_hadamard_matrix.h"

namespace fast_hadamard {

// kColumnClass: log2 of the number of columns, 3 standing for 3 or more (vectors of 8 lie in one row from
// there). kRowTiles, kColumnTiles: tiles of a warp, side by side. kExchange: warps that share a row of the
// matrix.
template <class Element_, Output kOutput_, int kColumnClass_, int kRowTiles_, int kColumnTiles_,
          int kExchange_>
struct Traits {
  using Element = Element_;
  // What the tensor cores multiply in: float32 is split into three bfloat16 pieces.
  using Factor = std::conditional_t<std::is_same<Element, float>::value, device::BFloat16, Element>;
  using Result = std::conditional_t<kOutput_ == Output::kSame, Element, int8_t>;
  static constexpr Output kOutput = kOutput_;
  static constexpr bool kQuantizes = kOutput != Output::kSame;
  static constexpr int kColumnClass = kColumnClass_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kColumnTiles = kColumnTiles_;
  static constexpr int kExchange = kExchange_;
  static constexpr int kRun =
      kColumnClass == 3 ? 8 : 1 << kColumnClass;  // neighbours in memory that a lane holds
  static constexpr int kMaxThreads = 32 * (kColumnTiles == 2 ? kMaxLongWarps : kMaxWarps);
  static constexpr int kWords = kColumnTiles == 2 ? 8 : 16;
  // A part is rows 4 q ... 4 q + 3 of so many columns: kWords registers.
  static constexpr int kPartColumns = kWords / static_cast<int>(sizeof(Element));

  static_assert(kColumnClass >= 0 && kColumnClass <= 3, "columns come in classes 0 to 3");
  static_assert(kRowTiles * kColumnTiles <= 2, "a warp holds at most two tiles in registers");
  static_assert(kColumnClass == 3 || kPartColumns >= kRun, "a part holds whole runs");
  static_assert(kColumnTiles == 1 || kColumnClass == 3, "only long rows span two tiles");
  static_assert(kExchange == 1 || kColumnTiles == 2,
                "rows are split between warps when two tiles do not hold them");
  static_assert(kExchange <= 16 && (kExchange & (kExchange - 1)) == 0,
                "16 warps of two tiles are the longest row");
};

template <class Traits>
struct KernelOperands {
  device::Global<const typename Traits::Element> x;
  device::Global<const typename Traits::Element> signs;
  device::Global<const int8_t> base;
  device::Global<const uint32_t> packed_signs;  // of the matrix, where it has more than one tile
  device::Global<typename Traits::Result> y;
  device::Global<float> scale;
};

// Where one warp's tile lies.
struct Place {
  int unit_count;      // elements of the unit that exist
  int unit_row_start;  // unit_start modulo the row length
  int first_block;     // offset in the unit of the tile's first block
  int row_group;
  int first_column;
};

template <class Traits>
class Tile {
 public:
  using Element = typename Traits::Element;
  using Factor = typename Traits::Factor;

  ROTEXPORT_DEVICE explicit Tile(const Geometry& geometry)
      : geometry_(geometry), g_(device::thread_index() % 32 / 4), q_(device::thread_index() % 4) {}

  // A matrix of one tile stays in a register: as pack_signs has it, and four bits higher which entries are
  // not zero.
  ROTEXPORT_DEVICE void load_matrix(const device::Global<const int8_t>& base) {
    narrow_matrix_ = 0;
    ROTEXPORT_UNROLL
    for (int bit = 0; bit < 8; ++bit) {
      const int reg = bit % 4;
      const int entry = matrix_entry(geometry_, base, g_ + 8 * (reg & 1), 4 * q_ + 2 * (reg >> 1) + bit / 4);
      const uint32_t bits = (entry < 0 ? 1u : 0u) | (entry != 0 ? 0x10u : 0u);
      narrow_matrix_ |= bits << (reg + bit / 4 * 16);
    }
  }

  // sums = matrix . (x * signs), then the butterflies within the tile.
  ROTEXPORT_DEVICE void transform(const Place& place, const KernelOperands<Traits>& operands) {
    ROTEXPORT_UNROLL
    for (int i = 0; i < kSums; ++i) (&sums_[0][0][0][0])[i] = 0.0f;
    const int row_tiles = (geometry_.order + 15) / 16;
    const Origin origin = origin_of(place);
    ROTEXPORT_UNROLL
    for (int part = 0; part < Traits::kColumnTiles * kParts; ++part) {
      const int columns = part / kParts * 64 + part % kParts * Traits::kPartColumns;
      // One part after the other: loading several at once would take more registers than there are.
      for (int counter = 0; counter < row_tiles; ++counter) {
        const int k = device::opaque(counter);
        uint32_t matrix[Traits::kRowTiles][4];
        uint32_t words[Traits::kWords];
        load_fragments(matrix, place.row_group, k, row_tiles, operands.packed_signs);
        load_part(words, place, origin, k, columns, operands);
        multiply(words, matrix, columns / 64, columns % 64);
      }
    }
    mix_columns();
  }

  // Mixes what lies in the tiles of other warps, through `buffer`: half of the rows at a time, which halves
  // its size.
  ROTEXPORT_DEVICE void exchange(const Place& place, const device::Shared<float>& buffer) {
    constexpr int kLength = 32 / Traits::kExchange;  // neighbouring columns of a thread after the exchange
    constexpr int kVector = kLength < 4 ? kLength : 4;
    using Piece = Vector<float, kVector>;
    const int columns = 1 << geometry_.log_columns;
    const int thread = static_cast<int>(device::thread_index());
    const int read_row = thread / (4 * Traits::kExchange);
    const int first = thread % (4 * Traits::kExchange) * kLength;
    float received[2][Traits::kExchange][kLength];
    ROTEXPORT_UNROLL
    for (int half = 0; half < 2; ++half) {
      write_half(place, buffer, half);
      device::barrier();
      ROTEXPORT_UNROLL
      for (int x = 0; x < Traits::kExchange; ++x) {
        ROTEXPORT_UNROLL
        for (int i = 0; i < kLength; i += kVector) {
          const int column = first + i;
          const int chunk = swizzle(column / 4, read_row) + 32 * x;
          const Piece piece = buffer.template load<Piece>(read_row * columns + 4 * chunk + column % 4);
          ROTEXPORT_UNROLL
          for (int j = 0; j < kVector; ++j) received[half][x][i + j] = piece.values[j];
        }
      }
      device::barrier();
    }
    ROTEXPORT_UNROLL
    for (int stride = 1; stride < Traits::kExchange; stride *= 2) {
      ROTEXPORT_UNROLL
      for (int half = 0; half < 2; ++half) {
        ROTEXPORT_UNROLL
        for (int x = 0; x < Traits::kExchange; ++x) {
          if (x & stride) continue;
          ROTEXPORT_UNROLL
          for (int i = 0; i < kLength; ++i)
            add_and_subtract(received[half][x][i], received[half][x + stride][i]);
        }
      }
    }
    ROTEXPORT_UNROLL
    for (int i = 0; i < 64; ++i) (&sums_[0][0][0][0])[i] = (&received[0][0][0])[i];
  }

  // Calls visit(offset in the unit, exists, values) for every run of neighbours that the lane holds,
  // sqrt(n) times too large; all lanes of a warp make the same calls.
  template <class Visit>
  ROTEXPORT_DEVICE void for_each_run(const Place& place, const Visit& visit) const {
    if constexpr (Traits::kExchange > 1) {
      for_each_exchanged_run(place, visit);
    } else {
      ROTEXPORT_UNROLL
      for (int r = 0; r < Traits::kRowTiles; ++r) {
        ROTEXPORT_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int row = 16 * (place.row_group * Traits::kRowTiles + r) + g_ + 8 * half;
          ROTEXPORT_UNROLL
          for (int cj = 0; cj < 2 * Traits::kColumnTiles; ++cj)
            visit_vector(place, r, cj / 2, half, cj % 2, row, visit);
        }
      }
    }
  }

  static constexpr int kLongestRun = Traits::kExchange > 1 ? 32 / Traits::kExchange : Traits::kRun;

 private:
  static constexpr int kParts = 8 / Traits::kPartColumns;  // of a lane's vector
  static constexpr int kSums = 32 * Traits::kRowTiles * Traits::kColumnTiles;

  static ROTEXPORT_DEVICE void add_and_subtract(float& a, float& b) {
    const float sum = a + b;
    b = a - b;
    a = sum;
  }

  // Index, among the elements of a part, of row 4 q + k of its column t.
  static constexpr ROTEXPORT_DEVICE int element(int k, int t) {
    return Traits::kColumnClass == 3
               ? Traits::kPartColumns * k + t
               : t / Traits::kRun * 4 * Traits::kRun + k * Traits::kRun + t % Traits::kRun;
  }

  // Bits `r` and 16 + `r` of a word of packed signs as two factors.
  static ROTEXPORT_DEVICE uint32_t signed_ones(uint32_t word, int r, uint32_t ones) {
    return ((word << (15 - r)) & 0x80008000u) ^ ones;
  }

  ROTEXPORT_DEVICE void load_fragments(uint32_t (&matrix)[Traits::kRowTiles][4], int row_group, int k,
                                       int row_tiles, const device::Global<const uint32_t>& packed) const {
    constexpr uint32_t kOnes = std::is_same<Factor, device::Half>::value ? 0x3c003c00u : 0x3f803f80u;
    if (row_tiles == 1) {
      ROTEXPORT_UNROLL
      for (int r = 0; r < 4; ++r) {
        const uint32_t present = (narrow_matrix_ >> (4 + r) & 0x00010001u) * 0xffffu;
        matrix[0][r] = signed_ones(narrow_matrix_, r, kOnes) & present;
      }
      return;
    }
    const int quads = (row_tiles + 3) / 4;
    ROTEXPORT_UNROLL
    for (int i = 0; i < Traits::kRowTiles; ++i) {
      const int row_tile = row_group * Traits::kRowTiles + i;
      const uint32_t word = packed.load<uint32_t>((row_tile * quads + k / 4) * 32 +
                                                  static_cast<int>(device::thread_index() % 32)) >>
                            k % 4 * 4;
      ROTEXPORT_UNROLL
      for (int r = 0; r < 4; ++r) matrix[i][r] = signed_ones(word, r, kOnes);
    }
  }

  // The first of the lane's columns, and where its block starts.
  struct Origin {
    int column;
    int block;   // in the unit
    int in_row;  // in a row of x
  };

  ROTEXPORT_DEVICE Origin origin_of(const Place& place) const {
    Origin origin;
    // Lane group 2 q + j brings vector q + 4 j, so that the sums come out as described at the top.
    const int column = place.first_column + 8 * (g_ / 2 + 4 * (g_ % 2));
    origin.column = column & ((1 << geometry_.log_columns) - 1);
    origin.block = place.first_block + (column >> geometry_.log_columns) * geometry_.block;
    origin.in_row = (place.unit_row_start + origin.block) % geometry_.row;
    return origin;
  }

  // The lane's part of row tile k of x that begins `columns` after the origin, with its signs applied; zero
  // where there is nothing.
  ROTEXPORT_DEVICE void load_part(uint32_t (&words)[Traits::kWords], const Place& place, const Origin& origin,
                                  int k, int columns, const KernelOperands<Traits>& operands) const {
    const int row = 16 * k + 4 * q_;
    if constexpr (Traits::kColumnClass == 3) {
      const bool exists = row < geometry_.order && origin.block < place.unit_count;
      const int inside = (row << geometry_.log_columns) + origin.column + columns;
      ROTEXPORT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int step = inside + (i << geometry_.log_columns);
        load_run<Traits::kPartColumns>(words + Traits::kWords / 4 * i, exists, origin.block + step,
                                       origin.in_row + step, operands);
      }
    } else {
      constexpr int kBlocks = Traits::kPartColumns / Traits::kRun;
      ROTEXPORT_UNROLL
      for (int i = 0; i < kBlocks; ++i) {
        const int blocks = (columns / Traits::kRun + i) * geometry_.block;
        const bool exists = row < geometry_.order && origin.block + blocks < place.unit_count;
        const int inside = row * Traits::kRun;
        load_run<4 * Traits::kRun>(words + i * Traits::kWords / kBlocks, exists,
                                   origin.block + blocks + inside,
                                   (origin.in_row + blocks) % geometry_.row + inside, operands);
      }
    }
  }

  template <int kCount>
  ROTEXPORT_DEVICE void load_run(uint32_t* words, bool exists, int index, int in_row,
                                 const KernelOperands<Traits>& operands) const {
    constexpr int kRunWords = kCount * static_cast<int>(sizeof(Element)) / 4;
    constexpr int kVector = kRunWords < 4 ? kRunWords : 4;
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(Element));
    constexpr uint32_t kSignBits = sizeof(Element) == 2 ? 0x80008000u : 0x80000000u;
    using Words = Vector<uint32_t, kVector>;
    ROTEXPORT_UNROLL
    for (int i = 0; i < kRunWords; i += kVector) {
      Words values{};
      Words signs{};
      if (exists) {
        values = operands.x.template load<Words>(index + i * kPerWord);
        signs = operands.signs.template load<Words>(in_row + i * kPerWord);
      }
      ROTEXPORT_UNROLL
      for (int j = 0; j < kVector; ++j) words[i + j] = values.values[j] ^ (signs.values[j] & kSignBits);
    }
  }

  ROTEXPORT_DEVICE void multiply(uint32_t (&words)[Traits::kWords],
                                 const uint32_t (&matrix)[Traits::kRowTiles][4], int c, int first) {
    constexpr int kPieces = sizeof(Element) == 2 ? 1 : 3;
    ROTEXPORT_UNROLL
    for (int piece = 0; piece < kPieces; ++piece) {
      ROTEXPORT_UNROLL
      for (int t = 0; t < Traits::kPartColumns; ++t) {
        const uint32_t column[2] = {take_pair(words, element(0, t), element(1, t)),
                                    take_pair(words, element(2, t), element(3, t))};
        ROTEXPORT_UNROLL
        for (int r = 0; r < Traits::kRowTiles; ++r)
          device::multiply_add<Factor>(sums_[r][c][first + t], matrix[r], column);
      }
    }
  }

  // Two elements as factors. Of a float32 it takes the leading eight bits, and leaves the rest for the next
  // piece.
  static ROTEXPORT_DEVICE uint32_t take_pair(uint32_t (&words)[Traits::kWords], int first, int second) {
    if constexpr (sizeof(Element) == 2) {
      const uint32_t selector = (first % 2 ? 0x32u : 0x10u) | (second % 2 ? 0x7600u : 0x5400u);
      return device::pick_bytes(words[first / 2], words[second / 2], selector);
    } else {
      const uint32_t pair = device::pick_bytes(words[first], words[second], 0x7632u);
      words[first] = remainder(words[first]);
      words[second] = remainder(words[second]);
      return pair;
    }
  }

  static ROTEXPORT_DEVICE uint32_t remainder(uint32_t bits) {
    return device::float_bits(device::bits_float(bits) - device::bits_float(bits & 0xffff0000u));
  }

  ROTEXPORT_DEVICE void mix_columns() {
    constexpr bool kLong = Traits::kColumnTiles == 2;
    const int stages = geometry_.stages;
    ROTEXPORT_UNROLL
    for (int r = 0; r < Traits::kRowTiles; ++r) {
      ROTEXPORT_UNROLL
      for (int c = 0; c < Traits::kColumnTiles; ++c) {
        ROTEXPORT_UNROLL
        for (int bit = 0; bit < 3; ++bit) {
          if (kLong || bit < stages) mix_vectors(sums_[r][c], 1 << bit);
        }
        if (kLong || stages > 3) mix_lanes(sums_[r][c], 1);
        if (kLong || stages > 4) mix_lanes(sums_[r][c], 2);
        if (kLong || stages > 5) mix_halves(sums_[r][c]);
      }
      if constexpr (kLong) {
        ROTEXPORT_UNROLL
        for (int i = 0; i < 32; ++i) add_and_subtract(sums_[r][0][i / 4][i % 4], sums_[r][1][i / 4][i % 4]);
      }
    }
  }

  static ROTEXPORT_DEVICE void mix_vectors(float (&sums)[8][4], int stride) {
    ROTEXPORT_UNROLL
    for (int t = 0; t < 8; ++t) {
      if (t & stride) continue;
      ROTEXPORT_UNROLL
      for (int i = 0; i < 4; ++i) add_and_subtract(sums[t][i], sums[t + stride][i]);
    }
  }

  ROTEXPORT_DEVICE void mix_lanes(float (&sums)[8][4], int lanes) const {
    const float sign = q_ & lanes ? -1.0f : 1.0f;
    ROTEXPORT_UNROLL
    for (int i = 0; i < 32; ++i) {
      const float own = sums[i / 4][i % 4];
      sums[i / 4][i % 4] = sign * own + device::shuffle_xor(own, lanes);
    }
  }

  static ROTEXPORT_DEVICE void mix_halves(float (&sums)[8][4]) {
    ROTEXPORT_UNROLL
    for (int i = 0; i < 16; ++i) add_and_subtract(sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1]);
  }

  // Four columns are a chunk; permuting those of 128 columns spreads a warp's accesses over all banks.
  static ROTEXPORT_DEVICE int swizzle(int chunk, int row) { return chunk ^ (chunk >> 3 & 3) ^ (row & 1); }

  ROTEXPORT_DEVICE void write_half(const Place& place, const device::Shared<float>& buffer, int half) const {
    using Piece = Vector<float, 4>;
    const int row = 8 * place.row_group + g_;
    ROTEXPORT_UNROLL
    for (int i = 0; i < 8; ++i) {
      const int c = i / 4;
      const int j = i / 2 % 2;
      const int t = i % 2 * 4;
      const int chunk = swizzle(16 * c + 2 * (q_ + 4 * j) + t / 4, row) + place.first_column / 4;
      const int sum = 2 * half + j;
      const Piece piece = {sums_[0][c][t][sum], sums_[0][c][t + 1][sum], sums_[0][c][t + 2][sum],
                           sums_[0][c][t + 3][sum]};
      buffer.store((row << geometry_.log_columns) + 4 * chunk, piece);
    }
  }

  template <class Visit>
  ROTEXPORT_DEVICE void visit_vector(const Place& place, int r, int c, int half, int j, int row,
                                     const Visit& visit) const {
    const int column = 64 * c + 8 * (q_ + 4 * j);
    constexpr int kRun = Traits::kRun;
    ROTEXPORT_UNROLL
    for (int first = 0; first < 8; first += kRun) {
      const int at = column + first;
      const int block = place.first_block + (at >> geometry_.log_columns) * geometry_.block;
      const int inside = (row << geometry_.log_columns) + (at & ((1 << geometry_.log_columns) - 1));
      float values[kRun];
      ROTEXPORT_UNROLL
      for (int t = 0; t < kRun; ++t) values[t] = sums_[r][c][first + t][2 * half + j];
      visit(block + inside, row < geometry_.order && block < place.unit_count, values);
    }
  }

  template <class Visit>
  ROTEXPORT_DEVICE void for_each_exchanged_run(const Place& place, const Visit& visit) const {
    constexpr int kLength = kLongestRun;
    const int thread = static_cast<int>(device::thread_index());
    const int read_row = thread / (4 * Traits::kExchange);
    ROTEXPORT_UNROLL
    for (int i = 0; i < 2 * Traits::kExchange; ++i) {
      const int half = i / Traits::kExchange;
      const int row = read_row / 8 * 16 + read_row % 8 + 8 * half;
      const int column = 128 * (i % Traits::kExchange) + thread % (4 * Traits::kExchange) * kLength;
      float values[kLength];
      ROTEXPORT_UNROLL
      for (int j = 0; j < kLength; ++j) values[j] = (&sums_[0][0][0][0])[i * kLength + j];
      visit(place.first_block + (row << geometry_.log_columns) + column, row < geometry_.order, values);
    }
  }

  const Geometry& geometry_;
  int g_;
  int q_;
  uint32_t narrow_matrix_;
  float sums_[Traits::kRowTiles][Traits::kColumnTiles][8][4];
};

}  // namespace fast_hadamard

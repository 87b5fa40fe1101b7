#include "emulator/device.h"

namespace device {

void combine_shuffle(emulator::Lanes& lanes, uint32_t mask) {
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    const unsigned from = lanes[i].sent[1] % kWarp;
    // A GPU returns an undefined value here: a NaN pattern makes it visible.
    lanes[i].received[0] = mask >> from & 1 ? lanes[from].sent[0] : 0xffffffffu;
  }
}

void combine_ballot(emulator::Lanes& lanes, uint32_t mask) {
  uint32_t votes = 0;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) votes |= lanes[i].sent[0] << i;
  }
  for (unsigned i = 0; i < kWarp; ++i) lanes[i].received[0] = votes;
}

void combine_matrices(emulator::Lanes& lanes, uint32_t) {
  for (unsigned i = 0; i < kWarp; ++i) {
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
      lanes[i].received[matrix] = lanes[8 * matrix + i / 4].sent[i % 4];
    }
  }
}

void combine_transposed_matrices(emulator::Lanes& lanes, uint32_t) {
  const auto element = [&lanes](unsigned matrix, unsigned row, unsigned column) {
    return lanes[8 * matrix + row].sent[column / 2] >> 16 * (column % 2) & 0xffff;
  };
  for (unsigned i = 0; i < kWarp; ++i) {
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
      lanes[i].received[matrix] = element(matrix, i % 4 * 2, i / 4) | element(matrix, i % 4 * 2 + 1, i / 4)
                                                                          << 16;
    }
  }
}

// The fragments of mma.m16n8k16. Lane 4g + q holds, in register i of A, elements (g + 8(i & 1), 2q + 8(i >>
// 1)) and its right neighbour; in register i of B, (2q + 8i, g) and the one below; in the sums, rows g, g, g
// + 8, g + 8 of columns 2q, 2q + 1, 2q, 2q + 1.
template <class T>
void combine_products(emulator::Lanes& lanes, uint32_t) {
  float a[16][16];
  float b[16][8];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const unsigned g = lane / 4;
    const unsigned q = lane % 4;
    for (unsigned half = 0; half < 2; ++half) {
      for (unsigned i = 0; i < 4; ++i) {
        const auto bits = static_cast<uint16_t>(lanes[lane].sent[i] >> 16 * half);
        a[g + 8 * (i & 1)][2 * q + 8 * (i >> 1) + half] = T::widen(bits);
      }
      for (unsigned i = 0; i < 2; ++i) {
        const auto bits = static_cast<uint16_t>(lanes[lane].sent[4 + i] >> 16 * half);
        b[2 * q + 8 * i + half][g] = T::widen(bits);
      }
    }
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = lane / 4 + i / 2 * 8;
      const unsigned column = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (unsigned k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      lanes[lane].received[i] = float_bits(sum);
    }
  }
}
template void combine_products<Half>(emulator::Lanes& lanes, uint32_t mask);
template void combine_products<BFloat16>(emulator::Lanes& lanes, uint32_t mask);

// The fragments of mma.m16n8k32 of 8-bit elements: as above with four neighbours of a row of A, or of a
// column of B, to a register.
void combine_int8_products(emulator::Lanes& lanes, uint32_t) {
  int8_t a[16][32];
  int8_t b[8][32];  // by columns
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const unsigned g = lane / 4;
    const unsigned q = lane % 4;
    for (unsigned i = 0; i < 4; ++i)
      std::memcpy(&a[g + 8 * (i & 1)][4 * q + 16 * (i >> 1)], &lanes[lane].sent[i], 4);
    for (unsigned i = 0; i < 2; ++i) std::memcpy(&b[g][4 * q + 16 * i], &lanes[lane].sent[4 + i], 4);
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = lane / 4 + i / 2 * 8;
      const unsigned column = lane % 4 * 2 + i % 2;
      int32_t sum = 0;
      for (unsigned k = 0; k < 32; ++k) sum += a[row][k] * b[column][k];
      lanes[lane].received[i] = static_cast<uint32_t>(sum);
    }
  }
}

Status remember(const emulator::Fault& fault) {
  static thread_local std::string message;
  message = fault.what();
  return {message.c_str()};
}

}  // namespace device

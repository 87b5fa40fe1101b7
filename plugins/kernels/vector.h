// `N` values of type T that are loaded and stored by one instruction.
#pragma once

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  static_assert(sizeof(T) * N <= 16, "the widest memory instruction moves 16 bytes");
  static_assert((N & (N - 1)) == 0, "vectors have a power of two of elements");
  T values[N];
};

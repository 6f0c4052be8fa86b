// Number types of tensors and the arithmetic type of each: float for float/bfloat16/half, double for double.
#pragma once
#include <cstdint>
#include <cstring>

namespace headway {
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class T>
using arithmetic_t = typename Arithmetic<T>::type;

// Rows are read and written 64 bytes at a time, which costs twice as much where those lie in two cache lines. Tensors start with
// a line; so do numbers of our own: `line_start` of a room that has kLine bytes more than it needs, rows `whole_lines` apart.
constexpr int64_t kLine = 64;
template <class C>
C* line_start(C* room) {
  return reinterpret_cast<C*>((reinterpret_cast<uintptr_t>(room) + kLine - 1) / kLine * kLine);
}
template <class C>
constexpr int64_t whole_lines(int64_t n) {
  constexpr int64_t each = kLine / sizeof(C);
  return (n + each - 1) / each * each;
}
}  // namespace headway

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
}  // namespace headway

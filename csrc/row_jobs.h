// What a row kernel is given, apart from the rows it shall do: the same for every instruction set.
#pragma once
#include <cstdint>

#include "numbers.h"

namespace headway {
// compressed: the RMS norm of a vector of zero mean that is kept without its last number
enum class Kind { layer, rms, compressed };

template <class T>
struct Forward {
  using C = arithmetic_t<T>;
  const T *x, *residual;
  T *y, *h;
  const C *w, *b, *first_w, *first_b;
  C* stats;  // (mean, rstd) a row; with first_norm twice, first those of x
  int64_t n;
  double eps;
  Kind kind;
  bool first_norm;   // the residual is added to norm(x) instead of x
  bool past_caches;  // y is written past the caches
  bool at_once;      // y is rounded to bfloat16 by the processor's own instruction
};

template <class T>
struct Backward {
  using C = arithmetic_t<T>;
  const T *gy, *gh, *x;
  T* gx;
  const C *w, *stats;
  int64_t stride;  // numbers between the statistics of one row and the next
  int64_t n;
  Kind kind;
  bool past_caches;
};
}  // namespace headway

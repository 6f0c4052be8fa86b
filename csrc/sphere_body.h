// Sums of squares and scaling of runs of numbers. Sums run in the arithmetic type over blocks, in double over the blocks.
#include "rows.h"

static constexpr int64_t kSumBlock = 2048;

template <class T>
static double squares(const T* x, int64_t n) {
  using C = arithmetic_t<T>;
  constexpr int64_t w = Lane<C>::width;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t end = n - begin < kSumBlock ? n : begin + kSumBlock;
    // four chains, so that additions do not wait for one another
    lane_t<C> sums[4] = {};
    int64_t i = begin;
    for (; i + 4 * w <= end; i += 4 * w)
      for (int64_t k = 0; k < 4; k++) {
        const lane_t<C> v = read(x + i + k * w);
        sums[k] += v * v;
      }
    for (; i < end; i += w) {
      const lane_t<C> v = i + w <= end ? read(x + i) : read_part(x + i, end - i);
      sums[0] += v * v;
    }
    total += across<C>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return total;
}

template <class T>
static void scale(T* x, int64_t n, double factor) {
  using C = arithmetic_t<T>;
  constexpr int64_t w = Lane<C>::width;
  const C f = C(factor);
  int64_t i = 0;
  for (; i + w <= n; i += w) write(x + i, read(x + i) * f);
  if (i < n) write_part(x + i, read_part(x + i, n - i) * f, n - i);
}

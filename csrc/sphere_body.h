// Sums of squares and scaling of runs of numbers, and Adam's step with the sum of squares of what it writes. Sums run in the
// arithmetic type over blocks, in double over the blocks.
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

static inline float root(float x) { return __builtin_sqrtf(x); }
static inline double root(double x) { return __builtin_sqrt(x); }

static constexpr int64_t kStepBlock = 512;

template <class C>
static double moved_squares(C* __restrict p, const C* __restrict g, C* __restrict m, C* __restrict v, int64_t n, const headway::Adam& adam) {
  const C b1 = C(adam.beta1), b2 = C(adam.beta2), c1 = C(1 - adam.beta1), c2 = C(1 - adam.beta2), eps = C(adam.eps);
  const C back = C(adam.back), step = C(adam.step), sign = C(adam.sign);
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kStepBlock) {
    const int64_t end = n - begin < kStepBlock ? n : begin + kStepBlock;
    C sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; i++) {
      const C x = sign * g[i];
      m[i] = b1 * m[i] + c1 * x;
      v[i] = b2 * v[i] + c2 * x * x;
      p[i] -= step * m[i] / (root(v[i]) * back + eps);
      sum += p[i] * p[i];
    }
    total += sum;
  }
  return total;
}

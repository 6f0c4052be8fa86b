// w = a * arctan(v / b) and its gradients, entry by entry; `part` entries of one row share a and b.

using headway::arithmetic_t;

#include "rows.h"

constexpr int64_t kBlock = 512;

static inline double arctan(double x) { return std::atan(x); }
// after S. Moshier's Cephes (atanf): two reductions of the range without a branch, error below 2.5 units in the last place
static inline float arctan(float x) {
  const float s = std::fabs(x);
  const bool large = s > 2.414213562373095f, middle = s > 0.4142135623730950f;
  const float above = large ? -1.0f : middle ? s - 1.0f : s, below = large ? s : middle ? s + 1.0f : 1.0f;
  const float base = large ? 1.5707963267948966f : middle ? 0.7853981633974483f : 0.0f;
  const float rest = large ? -4.37113883e-8f : middle ? -2.18556942e-8f : 0.0f;
  const float t = above / below, z = t * t;
  const float p = ((8.05374449538e-2f * z - 1.38776856032e-1f) * z + 1.99777106478e-1f) * z - 3.33329491539e-1f;
  return std::copysign(base + (p * z * t + (t + rest)), x);
}

template <class A>
static void forward_part(const A* v, A* w, int64_t n, A a, A b) {
  const A inverse = 1 / b;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) w[i] = a * arctan(v[i] * inverse);
}

// gv = g (a / b) q; sums[0] += g arctan(r), sums[1] += g r q, where r = v / b and q = 1 / (1 + r^2)
template <bool sum, class A>
static void backward_part(const A* g, const A* v, A* gv, int64_t n, A a, A b, double* sums) {
  const A inverse = 1 / b, slope = a * inverse;
  double first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
  for (int64_t i = 0; i < n; i++) {
    const A r = v[i] * inverse, q = 1 / (1 + r * r), gq = g[i] * q;
    gv[i] = slope * gq;
    if (sum) {
      first += double(g[i] * arctan(r));
      // r * q tends to 0 where r * r overflows
      second += double(gq * r);
    }
  }
  sums[0] += first, sums[1] += second;
}

// entries first .. last of a tensor of rows of n entries each
template <class T>
static void compand(const T* v, T* w, int64_t first, int64_t last, int64_t n, const double* a, const double* b) {
  using A = arithmetic_t<T>;
  A room[kBlock], out[kBlock];
  while (first < last) {
    const int64_t row = first / n, count = std::min<int64_t>({last - first, (row + 1) * n - first, kBlock});
    const A* from = widen(v + first, room, count);
    if constexpr (std::is_same_v<T, A>) {
      forward_part<A>(from, w + first, count, A(a[row]), A(b[row]));
    } else {
      forward_part<A>(from, out, count, A(a[row]), A(b[row]));
      store_row(out, w + first, count);
    }
    first += count;
  }
}

template <class T>
static void compand_backward(const T* g, const T* v, T* gv, int64_t first, int64_t last, int64_t n, const double* a, const double* b,
                             double* sums, bool want) {
  using A = arithmetic_t<T>;
  A room[kBlock], more[kBlock], out[kBlock];
  while (first < last) {
    const int64_t row = first / n, count = std::min<int64_t>({last - first, (row + 1) * n - first, kBlock});
    const A *gs = widen(g + first, room, count), *vs = widen(v + first, more, count);
    A* to = out;
    if constexpr (std::is_same_v<T, A>) to = gv + first;
    if (want) backward_part<true, A>(gs, vs, to, count, A(a[row]), A(b[row]), sums + 2 * row);
    else backward_part<false, A>(gs, vs, to, count, A(a[row]), A(b[row]), sums + 2 * row);
    if constexpr (!std::is_same_v<T, A>) store_row(out, gv + first, count);
    first += count;
  }
}

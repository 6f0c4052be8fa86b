// EvoNorm over planes (sample, channel) of `space` numbers. Statistics take two passes, so that a large mean costs no digits; the
// gradient is put together in place: what needs no sum is written first, what the sums pull is added after.
#include "exponential.h"
#include "rows.h"

static constexpr int64_t kRun = 2048;  // numbers of half precision that are widened at a time

// mean and sum of squared distances from it
template <class T>
static void evo_moments(const T* x, int64_t n, double* mean, double* squares) {
  using C = arithmetic_t<T>;
  C room[kRun];
  double total = 0, around = 0;
  for (int64_t i = 0; i < n; i += kRun) {
    const int64_t m = std::min(kRun, n - i);
    const C* a = widen(x + i, room, m);
    C sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < m; j++) sum += a[j];
    total += sum;
  }
  const C centre = static_cast<C>(total / static_cast<double>(n));
  for (int64_t i = 0; i < n; i += kRun) {
    const int64_t m = std::min(kRun, n - i);
    const C* a = widen(x + i, room, m);
    C sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < m; j++) sum += (a[j] - centre) * (a[j] - centre);
    around += sum;
  }
  *mean = total / static_cast<double>(n);
  *squares = around;
}

// y = a x / max(L, p x + q) + b
template <class T>
static void evo_batch_plane(const T* x, T* y, int64_t n, arithmetic_t<T> L, arithmetic_t<T> p, arithmetic_t<T> q, arithmetic_t<T> a,
                            arithmetic_t<T> b) {
  using C = arithmetic_t<T>;
  C room[kRun], out[kRun];
  if (L != L) a = L;
  for (int64_t i = 0; i < n; i += kRun) {
    const int64_t m = std::min(kRun, n - i);
    const C* from = widen(x + i, room, m);
    C* to = out;
    if constexpr (std::is_same_v<T, C>) to = y + i;
#pragma omp simd
    for (int64_t j = 0; j < m; j++) {
      const C R = p * from[j] + q;
      to[j] = a * from[j] / (R > L ? R : L) + b;
    }
    if constexpr (!std::is_same_v<T, C>) store_row(out, y + i, m);
  }
}

// sums: [R>L] gD, the same times x, [L>R] gD, gy x / D, gy
template <class T>
static void evo_batch_sums(const T* gy, const T* x, arithmetic_t<T>* place, int64_t n, arithmetic_t<T> L, arithmetic_t<T> p,
                           arithmetic_t<T> q, arithmetic_t<T> a, double* sums) {
  using C = arithmetic_t<T>;
  C xroom[kRun], groom[kRun];
  if (L != L) a = L;
  for (int64_t i = 0; i < n; i += kRun) {
    const int64_t m = std::min(kRun, n - i);
    const C *from = widen(x + i, xroom, m), *g = widen(gy + i, groom, m);
    C* to = place + i;
    C e0 = 0, e1 = 0, f = 0, w = 0, b = 0;
#pragma omp simd reduction(+ : e0, e1, f, w, b)
    for (int64_t j = 0; j < m; j++) {
      const C v = from[j], R = p * v + q, inverse = C(1) / (R > L ? R : L), direct = g[j] * inverse;
      const C all = -a * direct * v * inverse, mine = R > L ? all : R == L ? C(0.5) * all : C(0);
      e0 += mine;
      e1 += mine * v;
      f += all - mine;
      w += direct * v;
      b += g[j];
      to[j] = a * direct + p * mine;
    }
    sums[0] += e0, sums[1] += e1, sums[2] += f, sums[3] += w, sums[4] += b;
  }
}

// gx = s place + (x - c) k + (x - d) l
template <class T>
static void evo_pull(const T* x, const arithmetic_t<T>* place, T* gx, int64_t n, arithmetic_t<T> s, arithmetic_t<T> c,
                     arithmetic_t<T> k, arithmetic_t<T> d, arithmetic_t<T> l) {
  using C = arithmetic_t<T>;
  C room[kRun], out[kRun];
  for (int64_t i = 0; i < n; i += kRun) {
    const int64_t m = std::min(kRun, n - i);
    const C *from = widen(x + i, room, m), *first = place + i;
    C* to = out;
    if constexpr (std::is_same_v<T, C>) to = gx + i;
#pragma omp simd
    for (int64_t j = 0; j < m; j++) to[j] = s * first[j] + (from[j] - c) * k + (from[j] - d) * l;
    if constexpr (!std::is_same_v<T, C>) store_row(out, gx + i, m);
  }
}

// y = a x sigmoid(v x) + b, or a x + b
template <class T>
static void evo_group_plane(const T* x, T* y, int64_t n, bool act, arithmetic_t<T> v, arithmetic_t<T> a, arithmetic_t<T> b) {
  using C = arithmetic_t<T>;
  C room[kRun], out[kRun];
  for (int64_t i = 0; i < n; i += kRun) {
    const int64_t m = std::min(kRun, n - i);
    const C* from = widen(x + i, room, m);
    C* to = out;
    if constexpr (std::is_same_v<T, C>) to = y + i;
    if (act) {
#pragma omp simd
      for (int64_t j = 0; j < m; j++) to[j] = a * from[j] / (C(1) + exponential(-v * from[j])) + b;
    } else {
#pragma omp simd
      for (int64_t j = 0; j < m; j++) to[j] = a * from[j] + b;
    }
    if constexpr (!std::is_same_v<T, C>) store_row(out, y + i, m);
  }
}

// sums: gy x p, gy x^2 p (1 - p), gy; place = gy (p + v x p (1 - p)) with p = sigmoid(v x), or 1
template <class T>
static void evo_group_sums(const T* gy, const T* x, arithmetic_t<T>* place, int64_t n, bool act, arithmetic_t<T> v, double* sums) {
  using C = arithmetic_t<T>;
  C xroom[kRun], groom[kRun];
  for (int64_t i = 0; i < n; i += kRun) {
    const int64_t m = std::min(kRun, n - i);
    const C *from = widen(x + i, xroom, m), *g = widen(gy + i, groom, m);
    C* to = place + i;
    C s0 = 0, s1 = 0, s2 = 0;
    if (act) {
#pragma omp simd reduction(+ : s0, s1, s2)
      for (int64_t j = 0; j < m; j++) {
        const C p = sigmoid(v * from[j]), gx = g[j] * from[j], slope = p * (C(1) - p);
        s0 += gx * p;
        s1 += gx * from[j] * slope;
        s2 += g[j];
        to[j] = g[j] * p + gx * v * slope;
      }
    } else {
#pragma omp simd reduction(+ : s0, s2)
      for (int64_t j = 0; j < m; j++) s0 += g[j] * from[j], s2 += g[j], to[j] = g[j];
    }
    sums[0] += s0, sums[1] += s1, sums[2] += s2;
  }
}

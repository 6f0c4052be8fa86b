// Planes of two regions, told apart by a row of marks (1 inside the hole, 0 outside): moments, normalisation, products with a gradient
// and the gradient itself, each region by itself. What belongs to a region is selected, never multiplied by its mark: NaN and infinity
// stay in the region they lie in. And mean and maximum over the channels. Pairs of numbers are (hole, valid).
#include "rows.h"

static constexpr int64_t kRun = 2048;  // numbers of half precision that are widened at a time; lanes add up that many at most

// mean of each region and the sum of squared distances from it; count: how many pixels it has
template <class T>
static void region_moments(const T* x, const arithmetic_t<T>* hole, int64_t n, const double* count, double* mean, double* squares) {
  using C = arithmetic_t<T>;
  C room[kRun];
  double total[2] = {}, shifted[2] = {}, around[2] = {};
  for (int64_t i = 0; i < n; i += kRun) {
    const int64_t m = std::min(kRun, n - i);
    const C *a = widen(x + i, room, m), *marks = hole + i;
    C in = 0, out = 0;
#pragma omp simd reduction(+ : in, out)
    for (int64_t j = 0; j < m; j++) {
      in += marks[j] != 0 ? a[j] : C(0);
      out += marks[j] != 0 ? C(0) : a[j];
    }
    total[0] += in, total[1] += out;
  }
  const C near_hole = count[0] > 0 ? C(total[0] / count[0]) : C(0), near_valid = count[1] > 0 ? C(total[1] / count[1]) : C(0);
  for (int64_t i = 0; i < n; i += kRun) {
    const int64_t m = std::min(kRun, n - i);
    const C *a = widen(x + i, room, m), *marks = hole + i;
    C in = 0, out = 0, in2 = 0, out2 = 0;
#pragma omp simd reduction(+ : in, out, in2, out2)
    for (int64_t j = 0; j < m; j++) {
      const C d = a[j] - (marks[j] != 0 ? near_hole : near_valid), d2 = d * d;
      in += marks[j] != 0 ? d : C(0);
      out += marks[j] != 0 ? C(0) : d;
      in2 += marks[j] != 0 ? d2 : C(0);
      out2 += marks[j] != 0 ? C(0) : d2;
    }
    shifted[0] += in, shifted[1] += out, around[0] += in2, around[1] += out2;
  }
  for (int r = 0; r < 2; r++) {
    // what the rounded mean leaves over is put right
    const double s = std::max(1.0, count[r]), rest = shifted[r] / s;
    mean[r] = double(r ? near_valid : near_hole) + rest;
    squares[r] = std::isfinite(around[r]) ? std::max(0.0, around[r] - rest * rest * s) : around[r] - around[r];
  }
}

// y = (x - centre) gain + shift by region; with one number a pixel, ((x - centre) gain) pixel_gain + pixel_shift
template <class T>
static void region_scale(const T* x, T* y, const arithmetic_t<T>* hole, int64_t n, const arithmetic_t<T>* centre,
                         const arithmetic_t<T>* gain, const arithmetic_t<T>* shift, const arithmetic_t<T>* pixel_gain,
                         const arithmetic_t<T>* pixel_shift) {
  using C = arithmetic_t<T>;
  constexpr bool in_place = std::is_same_v<T, C>;
  C room[kRun], out[kRun];
  const C m0 = centre[0], m1 = centre[1], a0 = gain[0], a1 = gain[1], b0 = shift[0], b1 = shift[1];
  for (int64_t i = 0; i < n; i += kRun) {
    const int64_t m = std::min(kRun, n - i);
    const C *v = widen(x + i, room, m), *marks = hole + i;
    C* target = in_place ? reinterpret_cast<C*>(y + i) : out;
#pragma omp simd
    for (int64_t j = 0; j < m; j++) {
      const bool in = marks[j] != 0;
      target[j] = (v[j] - (in ? m0 : m1)) * (in ? a0 : a1) + (in ? b0 : b1);
    }
    if (pixel_gain) {
      const C* by = pixel_gain + i;
#pragma omp simd
      for (int64_t j = 0; j < m; j++) target[j] *= by[j];
    }
    if (pixel_shift) {
      const C* by = pixel_shift + i;
#pragma omp simd
      for (int64_t j = 0; j < m; j++) target[j] += by[j];
    }
    if constexpr (!in_place) store_row(out, y + i, m);
  }
}

// sums by region of h and of h (x - centre), where h is gy, or gy pixel_gain; adds gy (x - centre) rstd and gy to the pixels' gradients
template <class T>
static void region_products(const T* gy, const T* x, const arithmetic_t<T>* hole, int64_t n, const arithmetic_t<T>* centre,
                            const arithmetic_t<T>* rstd, const arithmetic_t<T>* pixel_gain, arithmetic_t<T>* grad_gain,
                            arithmetic_t<T>* grad_shift, double* sums) {
  using C = arithmetic_t<T>;
  C room[kRun], other[kRun], with_gain[kRun];
  const C m0 = centre[0], m1 = centre[1], r0 = rstd[0], r1 = rstd[1];
  for (int64_t i = 0; i < n; i += kRun) {
    const int64_t m = std::min(kRun, n - i);
    const C *g = widen(gy + i, room, m), *v = widen(x + i, other, m), *marks = hole + i;
    if (grad_gain) {
      C* to = grad_gain + i;
#pragma omp simd
      for (int64_t j = 0; j < m; j++) {
        const bool in = marks[j] != 0;
        to[j] += g[j] * (v[j] - (in ? m0 : m1)) * (in ? r0 : r1);
      }
    }
    if (grad_shift) {
      C* to = grad_shift + i;
#pragma omp simd
      for (int64_t j = 0; j < m; j++) to[j] += g[j];
    }
    if (pixel_gain) {
      const C* by = pixel_gain + i;
#pragma omp simd
      for (int64_t j = 0; j < m; j++) with_gain[j] = g[j] * by[j];
      g = with_gain;
    }
    C in = 0, out = 0, in2 = 0, out2 = 0;
#pragma omp simd reduction(+ : in, out, in2, out2)
    for (int64_t j = 0; j < m; j++) {
      const C product = g[j] * (v[j] - (marks[j] != 0 ? m0 : m1));
      in += marks[j] != 0 ? g[j] : C(0);
      out += marks[j] != 0 ? C(0) : g[j];
      in2 += marks[j] != 0 ? product : C(0);
      out2 += marks[j] != 0 ? C(0) : product;
    }
    sums[0] += in, sums[1] += out, sums[2] += in2, sums[3] += out2;
  }
}

// gx = along h + pull (x - centre) + shift by region
template <class T>
static void region_gradient(const T* gy, const T* x, T* gx, const arithmetic_t<T>* hole, int64_t n, const arithmetic_t<T>* centre,
                            const arithmetic_t<T>* along, const arithmetic_t<T>* pull, const arithmetic_t<T>* shift,
                            const arithmetic_t<T>* pixel_gain) {
  using C = arithmetic_t<T>;
  constexpr bool in_place = std::is_same_v<T, C>;
  C room[kRun], other[kRun], with_gain[kRun], out[kRun];
  const C m0 = centre[0], m1 = centre[1], a0 = along[0], a1 = along[1], p0 = pull[0], p1 = pull[1], s0 = shift[0], s1 = shift[1];
  for (int64_t i = 0; i < n; i += kRun) {
    const int64_t m = std::min(kRun, n - i);
    const C *g = widen(gy + i, room, m), *v = widen(x + i, other, m), *marks = hole + i;
    if (pixel_gain) {
      const C* by = pixel_gain + i;
#pragma omp simd
      for (int64_t j = 0; j < m; j++) with_gain[j] = g[j] * by[j];
      g = with_gain;
    }
    C* target = in_place ? reinterpret_cast<C*>(gx + i) : out;
#pragma omp simd
    for (int64_t j = 0; j < m; j++) {
      const bool in = marks[j] != 0;
      target[j] = g[j] * (in ? a0 : a1) + (v[j] - (in ? m0 : m1)) * (in ? p0 : p1) + (in ? s0 : s1);
    }
    if constexpr (!in_place) store_row(out, gx + i, m);
  }
}

// sum, maximum and its first channel over `channels` rows that lie `step` apart; NaN is the largest, as torch.max has it
template <class T>
static void pool_rows(const T* x, int64_t n, int64_t step, int64_t channels, arithmetic_t<T>* sum, arithmetic_t<T>* best,
                      int32_t* index) {
  using C = arithmetic_t<T>;
  C room[kRun];
  const C* a = widen(x, room, n);
  for (int64_t j = 0; j < n; j++) sum[j] = best[j] = a[j], index[j] = 0;
  for (int64_t c = 1; c < channels; c++) {
    a = widen(x + c * step, room, n);
    const int32_t now = int32_t(c);
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
      const C v = a[j], b = best[j];
      const bool above = (v > b) | ((v != v) & (b == b));
      sum[j] += v;
      best[j] = above ? v : b;
      index[j] = above ? now : index[j];
    }
  }
}

// gx = mean, plus top where this channel held the maximum; or that much more than gx was
template <class T>
static void unpool_row(T* gx, int64_t n, const arithmetic_t<T>* mean, const arithmetic_t<T>* top, const int32_t* index, int32_t channel,
                       bool onto) {
  using C = arithmetic_t<T>;
  constexpr bool in_place = std::is_same_v<T, C>;
  C room[kRun], out[kRun];
  for (int64_t i = 0; i < n; i += kRun) {
    const int64_t m = std::min(kRun, n - i);
    C* target = in_place ? reinterpret_cast<C*>(gx + i) : out;
    if (onto) {
      const C* before = widen(gx + i, room, m);
#pragma omp simd
      for (int64_t j = 0; j < m; j++) target[j] = before[j] + mean[i + j] + (index[i + j] == channel ? top[i + j] : C(0));
    } else {
#pragma omp simd
      for (int64_t j = 0; j < m; j++) target[j] = mean[i + j] + (index[i + j] == channel ? top[i + j] : C(0));
    }
    if constexpr (!in_place) store_row(out, gx + i, m);
  }
}

// Planes of (samples, channels, space): moments, a multiply-add each, products with a gradient, and the gradient itself.
#include "rows.h"

constexpr int64_t kChunk = 4096;  // lanes add up that many entries before they go into a double

// mean and mean squared distance from it of planes [from, to)
template <class T>
static void plane_moments(const T* x, int64_t from, int64_t to, int64_t space, double* mean, double* var) {
  using C = arithmetic_t<T>;
  C room[kChunk];
  for (int64_t p = from; p < to; p++) {
    const T* plane = x + p * space;
    double sum = 0, shifted = 0, squares = 0;
    for (int64_t i = 0; i < space; i += kChunk) {
      const int64_t width = std::min(kChunk, space - i);
      const C* a = widen(plane + i, room, width);
      C s = 0;
#pragma omp simd reduction(+ : s)
      for (int64_t j = 0; j < width; j++) s += a[j];
      sum += s;
    }
    const C near = C(sum / space);
    for (int64_t i = 0; i < space; i += kChunk) {
      const int64_t width = std::min(kChunk, space - i);
      const C* a = widen(plane + i, room, width);
      C s = 0, q = 0;
#pragma omp simd reduction(+ : s, q)
      for (int64_t j = 0; j < width; j++) {
        const C d = a[j] - near;
        s += d;
        q += d * d;
      }
      shifted += s;
      squares += q;
    }
    // what the rounded mean leaves over is put right
    const double rest = shifted / space;
    mean[p] = double(near) + rest;
    var[p] = std::isfinite(squares) ? std::max(0.0, squares / space - rest * rest) : squares - squares;
  }
}

// y = gain * (x - centre) + shift, plane by plane
template <class T>
static void plane_scale(const T* x, T* y, int64_t from, int64_t to, int64_t space, const double* centre, const double* gain,
                        const double* shift) {
  using C = arithmetic_t<T>;
  constexpr bool in_place = std::is_same_v<T, C>;
  C room[kChunk], out[kChunk];
  for (int64_t p = from; p < to; p++) {
    const C m = C(centre[p]), a = C(gain[p]), b = C(shift[p]);
    for (int64_t i = 0; i < space; i += kChunk) {
      const int64_t width = std::min(kChunk, space - i);
      const C* v = widen(x + p * space + i, room, width);
      T* place = y + p * space + i;
      C* target = in_place ? reinterpret_cast<C*>(place) : out;
#pragma omp simd
      for (int64_t j = 0; j < width; j++) target[j] = (v[j] - m) * a + b;
      if constexpr (!in_place) store_row(out, place, width);
    }
  }
}

// sums of gy and of gy * (x - centre), plane by plane
template <class T>
static void plane_products(const T* gy, const T* x, int64_t from, int64_t to, int64_t space, const double* centre, double* sums,
                           double* products) {
  using C = arithmetic_t<T>;
  C room[kChunk], other[kChunk];
  for (int64_t p = from; p < to; p++) {
    const C m = C(centre[p]);
    double total = 0, product = 0;
    for (int64_t i = 0; i < space; i += kChunk) {
      const int64_t width = std::min(kChunk, space - i);
      const C *g = widen(gy + p * space + i, room, width), *v = widen(x + p * space + i, other, width);
      C s = 0, q = 0;
#pragma omp simd reduction(+ : s, q)
      for (int64_t j = 0; j < width; j++) {
        s += g[j];
        q += g[j] * (v[j] - m);
      }
      total += s;
      product += q;
    }
    sums[p] = total;
    products[p] = product - (centre[p] - double(m)) * total;
  }
}

// gx = along * gy + pull * (x - centre) + shift, plane by plane
template <class T>
static void plane_gradient(const T* gy, const T* x, T* gx, int64_t from, int64_t to, int64_t space, const double* centre,
                           const double* along, const double* pull, const double* shift) {
  using C = arithmetic_t<T>;
  constexpr bool in_place = std::is_same_v<T, C>;
  C room[kChunk], other[kChunk], out[kChunk];
  for (int64_t p = from; p < to; p++) {
    const C m = C(centre[p]), a = C(along[p]), b = C(pull[p]), c = C(shift[p]);
    for (int64_t i = 0; i < space; i += kChunk) {
      const int64_t width = std::min(kChunk, space - i);
      const C *g = widen(gy + p * space + i, room, width), *v = widen(x + p * space + i, other, width);
      T* place = gx + p * space + i;
      C* target = in_place ? reinterpret_cast<C*>(place) : out;
#pragma omp simd
      for (int64_t j = 0; j < width; j++) target[j] = g[j] * a + (v[j] - m) * b + c;
      if constexpr (!in_place) store_row(out, place, width);
    }
  }
}

// One channel of (samples, channels, space) at a time: its statistics, its norm with or without a ReLU, and the way back. A channel
// of a common layer lies in the first or second cache after the first look, so what follows reads it from there.
#include "rows.h"

constexpr int64_t kChunk = 4096;  // lanes add up that many entries before they go into a double
constexpr int64_t kShort = 16;    // entries of a plane below which several are worked off together

// work(x, g, to, width) for every stretch of the channel: x, g where there is one, and room for the results where there is a y, as
// rows of the arithmetic type. Planes too short for a lane are put side by side first.
template <class T, class F>
static inline __attribute__((always_inline)) void each_chunk(const T* x, const T* g, T* y, int64_t samples, int64_t channels,
                                                             int64_t space, int64_t c, F work) {
  using C = arithmetic_t<T>;
  constexpr bool in_place = std::is_same_v<T, C>;
  C room[kChunk], other[kChunk], out[kChunk];
  T tight_x[kChunk], tight_g[kChunk];
  const int64_t step = channels * space, many = space < kShort ? kChunk / space : 1;
  const auto tighten = [&](const T* from, T* to, int64_t count) {
    for (int64_t n = 0; n < count; n++)
      for (int64_t i = 0; i < space; i++) to[n * space + i] = from[n * step + i];
    return to;
  };
  for (int64_t first = 0; first < samples; first += many) {
    const int64_t count = std::min(many, samples - first), entries = count * space;
    for (int64_t i = 0; i < entries; i += kChunk) {
      const int64_t width = std::min(kChunk, entries - i), at = first * step + c * space + i;
      const bool several = many > 1;
      const T* near_x = several ? tighten(x + at, tight_x, count) : x + at;
      const T* near_g = g ? several ? tighten(g + at, tight_g, count) : g + at : nullptr;
      C* to = out;
      if constexpr (in_place)
        if (y && !several) to = y + at;
      work(widen(near_x, room, width), near_g ? widen(near_g, other, width) : nullptr, to, width);
      if (!y || to != out) continue;
      T* result = several ? tight_x : y + at;
      store_row(out, result, width);
      for (int64_t n = 0; n < count && several; n++)
        for (int64_t i = 0; i < space; i++) y[at + n * step + i] = tight_x[n * space + i];
    }
  }
}

// lanes that go into a double before they grow too long, and what fills no lane
template <class C>
struct Sum {
  lane_t<C> lane = {};
  double total = 0;
  void flush() {
    total += across<C>(lane);
    lane = lane_t<C>{};
  }
};

// mean and mean squared distance from it
template <class T>
static void channel_moments(const T* x, int64_t samples, int64_t channels, int64_t space, int64_t c, double* mean, double* var) {
  using C = arithmetic_t<T>;
  constexpr int64_t W = Lane<C>::width;
  const double count = double(samples) * space;
  Sum<C> sum, shifted, squares;
  int64_t added = 0;
  each_chunk<T>(x, nullptr, nullptr, samples, channels, space, c, [&](const C* a, const C*, C*, int64_t width) {
    int64_t j = 0;
    for (; j + W <= width; j += W) sum.lane += get(a + j);
    for (; j < width; j++) sum.total += a[j];
    if ((added += width) >= kChunk) sum.flush(), added = 0;
  });
  sum.flush();
  const C near = C(sum.total / count);
  added = 0;
  each_chunk<T>(x, nullptr, nullptr, samples, channels, space, c, [&](const C* a, const C*, C*, int64_t width) {
    int64_t j = 0;
    for (; j + W <= width; j += W) {
      const lane_t<C> d = get(a + j) - near;
      shifted.lane += d, squares.lane += d * d;
    }
    for (; j < width; j++) {
      const C d = a[j] - near;
      shifted.total += d, squares.total += d * d;
    }
    if ((added += width) >= kChunk) shifted.flush(), squares.flush(), added = 0;
  });
  shifted.flush(), squares.flush();
  // what the rounded mean leaves over is put right
  const double rest = shifted.total / count, square = squares.total / count;
  *mean = double(near) + rest;
  *var = std::isfinite(square) ? std::max(0.0, square - rest * rest) : square - square;
}

// what both directions have to agree about, to the last bit
template <class V, class C>
static inline V place(V x, C m, C a, C b) {
  return (x - m) * a + b;
}

// y = gain * (x - mean) + shift, and 0 below it where `rectified`
template <class T>
static void channel_scale(const T* x, T* y, int64_t samples, int64_t channels, int64_t space, int64_t c, double mean, double gain,
                          double shift, bool rectified) {
  using C = arithmetic_t<T>;
  const C m = C(mean), a = C(gain), b = C(shift);
  each_chunk<T>(x, nullptr, y, samples, channels, space, c, [&](const C* v, const C*, C* to, int64_t width) {
    if (rectified) {
#pragma omp simd
      for (int64_t j = 0; j < width; j++) {
        const C z = place(v[j], m, a, b);
        to[j] = z <= 0 ? C(0) : z;
      }
    } else {
#pragma omp simd
      for (int64_t j = 0; j < width; j++) to[j] = place(v[j], m, a, b);
    }
  });
}

// sums of gz and gz * (x - mean); gz is the gradient below the ReLU
template <class T>
static void channel_products(const T* gy, const T* x, int64_t samples, int64_t channels, int64_t space, int64_t c, double mean,
                             double gain, double shift, bool rectified, double* sums, double* products) {
  using C = arithmetic_t<T>;
  const C m = C(mean), a = C(gain), b = C(shift);
  constexpr int64_t W = Lane<C>::width;
  Sum<C> sum, product;
  int64_t added = 0;
  each_chunk<T>(x, gy, nullptr, samples, channels, space, c, [&](const C* v, const C* g, C*, int64_t width) {
    int64_t j = 0;
    for (; j + W <= width; j += W) {
      const lane_t<C> at = get(v + j);
      lane_t<C> e = get(g + j);
      if (rectified) e = place(at, m, a, b) <= 0 ? lane_t<C>{} : e;
      sum.lane += e, product.lane += e * (at - m);
    }
    for (; j < width; j++) {
      const C e = rectified && place(v[j], m, a, b) <= 0 ? C(0) : g[j];
      sum.total += e, product.total += e * (v[j] - m);
    }
    if ((added += width) >= kChunk) sum.flush(), product.flush(), added = 0;
  });
  sum.flush(), product.flush();
  *sums = sum.total;
  *products = product.total - (mean - double(m)) * sum.total;
}

// gx = gain * (gz - one - (x - mean) * two)
template <class T>
static void channel_gradient(const T* gy, const T* x, T* gx, int64_t samples, int64_t channels, int64_t space, int64_t c, double mean,
                             double gain, double shift, bool rectified, double one, double two) {
  using C = arithmetic_t<T>;
  const C m = C(mean), a = C(gain), b = C(shift), pull = C(-gain * two), rest = C(-gain * one);
  each_chunk<T>(x, gy, gx, samples, channels, space, c, [&](const C* v, const C* g, C* to, int64_t width) {
    if (rectified) {
#pragma omp simd
      for (int64_t j = 0; j < width; j++) {
        const C e = place(v[j], m, a, b) <= 0 ? C(0) : g[j];
        to[j] = e * a + ((v[j] - m) * pull + rest);
      }
    } else {
#pragma omp simd
      for (int64_t j = 0; j < width; j++) to[j] = g[j] * a + ((v[j] - m) * pull + rest);
    }
  });
}

// The norm over the channels of (samples, channels, space): planes are read as they lie, a tile of positions at a time.
#include "rows.h"

// y[n, c, s] = norm over c of x[n, c, s]: planes are read as they lie, a tile of positions at a time
template <class T>
static void channel_rows(const T* x, const arithmetic_t<T>* w, const arithmetic_t<T>* b, T* y, arithmetic_t<T>* stats, int64_t sample,
                         int64_t from, int64_t to, int64_t channels, int64_t space, double eps, bool rms) {
  using C = arithmetic_t<T>;
  constexpr bool in_place = std::is_same_v<T, C>;  // float and double planes are read and written where they lie
  static thread_local std::vector<C> room;
  const int64_t width = to - from;
  if (static_cast<int64_t>(room.size()) < 4 * width) room.resize(4 * width);
  C *mean = room.data(), *rstd = mean + width, *line = rstd + width, *out = line + width;
  const T* base = x + sample * channels * space + from;
  std::fill(mean, mean + width, C(0));
  std::fill(rstd, rstd + width, C(0));
  auto read = [&](int64_t c) { return widen(base + c * space, line, width); };
  if (!rms) {
    // sums of distances from the first channel: a large common mean costs no digits
    std::memcpy(rstd, read(0), width * sizeof(C));
    for (int64_t c = 1; c < channels; c++) {
      const C* a = read(c);
#pragma omp simd
      for (int64_t i = 0; i < width; i++) mean[i] += a[i] - rstd[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < width; i++) mean[i] = rstd[i] + mean[i] / C(channels), rstd[i] = C(0);
  }
  for (int64_t c = 0; c < channels; c++) {
    const C* a = read(c);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
      C d = a[i] - mean[i];
      rstd[i] += d * d;
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < width; i++) rstd[i] = C(1) / std::sqrt(rstd[i] / C(channels) + C(eps));
  for (int64_t c = 0; c < channels; c++) {
    const C* a = read(c);
    C gain = w ? w[c] : C(1), offset = b ? b[c] : C(0);
    T* place = y + (sample * channels + c) * space + from;
    C* target = in_place ? reinterpret_cast<C*>(place) : out;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) target[i] = (a[i] - mean[i]) * rstd[i] * gain + offset;
    if constexpr (!in_place) store_row(out, place, width);
  }
  if (stats) {
    C* kept = stats + 2 * (sample * space + from);
    for (int64_t i = 0; i < width; i++) kept[2 * i] = mean[i], kept[2 * i + 1] = rstd[i];
  }
}

template <class T>
static void channel_backward_rows(const T* gy, const T* x, const arithmetic_t<T>* w, const arithmetic_t<T>* stats, T* gx,
                                  arithmetic_t<T>* gw, arithmetic_t<T>* gb, int64_t sample, int64_t from, int64_t to, int64_t channels,
                                  int64_t space, bool rms) {
  using C = arithmetic_t<T>;
  constexpr bool in_place = std::is_same_v<T, C>;  // float and double planes are read and written where they lie
  static thread_local std::vector<C> room;
  const int64_t width = to - from;
  if (static_cast<int64_t>(room.size()) < 7 * width) room.resize(7 * width);
  C *mean = room.data(), *rstd = mean + width, *s1 = rstd + width, *s2 = s1 + width, *gline = s2 + width, *xline = gline + width,
    *out = xline + width;
  const C* kept = stats + 2 * (sample * space + from);
  for (int64_t i = 0; i < width; i++) mean[i] = kept[2 * i], rstd[i] = kept[2 * i + 1];
  std::fill(s1, s1 + width, C(0));
  std::fill(s2, s2 + width, C(0));
  auto read = [&](const T* tensor, int64_t c, C* room) {
    return widen(tensor + (sample * channels + c) * space + from, room, width);
  };
  for (int64_t c = 0; c < channels; c++) {
    const C *g = read(gy, c, gline), *a = read(x, c, xline);
    C gain = w ? w[c] : C(1), tw = 0, tb = 0;
#pragma omp simd reduction(+ : tw, tb)
    for (int64_t i = 0; i < width; i++) {
      C xh = (a[i] - mean[i]) * rstd[i], h = g[i] * gain;
      tw += g[i] * xh;
      tb += g[i];
      s1[i] += h;
      s2[i] += h * xh;
    }
    if (gw) gw[c] += tw;
    if (gb) gb[c] += tb;
  }
#pragma omp simd
  for (int64_t i = 0; i < width; i++) s1[i] = rms ? C(0) : s1[i] / C(channels), s2[i] /= C(channels);
  for (int64_t c = 0; c < channels; c++) {
    const C *g = read(gy, c, gline), *a = read(x, c, xline);
    C gain = w ? w[c] : C(1);
    T* place = gx + (sample * channels + c) * space + from;
    C* target = in_place ? reinterpret_cast<C*>(place) : out;
#pragma omp simd
    for (int64_t i = 0; i < width; i++)
      target[i] = rstd[i] * (g[i] * gain - s1[i] - (a[i] - mean[i]) * rstd[i] * s2[i]);
    if constexpr (!in_place) store_row(out, place, width);
  }
}

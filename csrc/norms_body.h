// One row at a time: y = g * (a - mean) / sqrt(var + eps) + b (layer norm), y = g * a / sqrt(mean(a^2) + eps) + b (RMS norm).
// A row is read from memory once and then from the nearest cache, mean first, then the spread around it, so that rows with a
// large mean keep their digits. Rows follow one another, never side by side: that is the one stream the prefetcher follows best.
#include "rows.h"

// f(lane, row, number of the accumulator, mask, place) over R rows, 4 / R sums a row side by side so that no addition waits for
// the one before
template <int R, class T, class F>
static inline void over(const T* a, int64_t n, F&& f) {
  using C = arithmetic_t<T>;
  constexpr int64_t W = Lane<C>::width, K = 4 / R;
  const lane_t<C> all = lane_t<C>{} + C(1);
  int64_t i = 0;
  for (; i + K * W <= n; i += K * W)
    for (int k = 0; k < K; k++)
      for (int r = 0; r < R; r++) f(read(a + r * n + i + k * W), r, k, all, i + k * W);
  for (; i + W <= n; i += W)
    for (int r = 0; r < R; r++) f(read(a + r * n + i), r, 0, all, i);
  if (i < n) {
    const lane_t<C> mask = mask_of<C>(n - i);
    for (int r = 0; r < R; r++) f(read_part(a + r * n + i, n - i), r, 1, mask, i);
  }
}

// mean (0 for the RMS norm, the sum for the compressed one) and 1 / sqrt(spread + eps) of R rows
template <int R, class T>
static inline void measure_rows(const T* a, int64_t n, Kind kind, double eps, arithmetic_t<T>* stats) {
  using C = arithmetic_t<T>;
  C mean[R] = {}, shift[R] = {};
  lane_t<C> s[R][4 / R] = {}, q[R][4 / R] = {};
  auto total = [](const lane_t<C>* v) {
    if constexpr (R == 1) return across<C>((v[0] + v[1]) + (v[2] + v[3]));
    else return across<C>(v[0] + v[1]);
  };
  if (kind != Kind::rms) {
    // distances from the first number of the row, so that a large mean costs no digits in long rows
    if (kind == Kind::layer)
      for (int r = 0; r < R; r++) shift[r] = number(a[r * n]);
    over<R>(a, n, [&](lane_t<C> v, int r, int k, lane_t<C> mask, int64_t) { s[r][k] += (v - shift[r]) * mask; });
    for (int r = 0; r < R; r++) mean[r] = shift[r] + total(s[r]) * (C(1) / C(n));
  }
  if (kind == Kind::layer) {
    over<R>(a, n, [&](lane_t<C> v, int r, int k, lane_t<C> mask, int64_t) {
      const lane_t<C> d = (v - mean[r]) * mask;
      q[r][k] += d * d;
    });
  } else {
    over<R>(a, n, [&](lane_t<C> v, int r, int k, lane_t<C>, int64_t) { q[r][k] += v * v; });
  }
  for (int r = 0; r < R; r++) {
    C spread = total(q[r]), share = C(1) / C(n);
    if (kind == Kind::compressed) {
      const C sum = total(s[r]);
      mean[r] = sum, spread += sum * sum, share = C(1) / C(n + 1);
    }
    stats[2 * r] = mean[r];
    stats[2 * r + 1] = C(1) / std::sqrt(spread * share + C(eps));
  }
}

// f(lane of z, place) for the normalised row; `ahead` bytes further on, what comes next is fetched meanwhile
template <bool has_weight, bool has_bias, class S, class F>
static inline void scaled(const S* a, const arithmetic_t<S>* w, const arithmetic_t<S>* b, arithmetic_t<S> mean, arithmetic_t<S> rstd,
                          int64_t n, int64_t ahead, F&& f) {
  using C = arithmetic_t<S>;
  constexpr int64_t W = Lane<C>::width;
  auto affine = [&](lane_t<C> v, lane_t<C> gain, lane_t<C> offset) {
    v = (v - mean) * rstd;
    if constexpr (has_weight) v = v * gain;
    if constexpr (has_bias) v = v + offset;
    return v;
  };
  const lane_t<C> none = {};
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + W <= n; i += W) {
    if (ahead) __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(a + i) + ahead));
    f(affine(read(a + i), has_weight ? get(w + i) : none, has_bias ? get(b + i) : none), i, W);
  }
  if (i < n)
    f(affine(read_part(a + i, n - i), has_weight ? read_part(w + i, n - i) : none, has_bias ? read_part(b + i, n - i) : none), i, n - i);
}

template <class S, class F>
static inline void normalised(const S* a, const arithmetic_t<S>* w, const arithmetic_t<S>* b, const arithmetic_t<S>* stats, Kind kind,
                              int64_t n, int64_t ahead, F&& f) {
  const arithmetic_t<S> mean = kind == Kind::layer ? stats[0] : arithmetic_t<S>(0), rstd = stats[1];
  // a bias without a weight comes with a weight of ones
  if (b) scaled<true, true>(a, w, b, mean, rstd, n, ahead, f);
  else if (w) scaled<true, false>(a, w, b, mean, rstd, n, ahead, f);
  else scaled<false, false>(a, w, b, mean, rstd, n, ahead, f);
}

template <bool past_caches, class S, class T>
static inline void write_row(const Forward<T>& job, const S* a, const arithmetic_t<T>* stats, T* y, int64_t ahead) {
  using C = arithmetic_t<T>;
  normalised(a, job.w, job.b, stats, job.kind, job.n, ahead, [&](lane_t<C> v, int64_t i, int64_t count) {
    if constexpr (past_caches) stream(y + i, v);
    else if (count == Lane<C>::width) write(y + i, v);
    else write_part(y + i, v, count);
  });
}

// the residual sum of a row, rounded to the tensor's type into h and, as the norm reads it, into `sum`
template <class T>
static inline auto keep_sum(const T* residual, T* h, arithmetic_t<T>* sum) {
  using C = arithmetic_t<T>;
  return [=](lane_t<C> v, int64_t i, int64_t count) {
    if (count == Lane<C>::width) {
      write(h + i, v + read(residual + i));
      // rounded, so that forward and backward see the same numbers
      if constexpr (!std::is_same_v<T, C>) put(sum + i, read(h + i));
    } else {
      write_part(h + i, v + read_part(residual + i, count), count);
      if constexpr (!std::is_same_v<T, C>) write_part(sum + i, read_part(h + i, count), count);
    }
  };
}

// Rows of y = norm(x), two by two: the next two are measured before these are written, so that the long chain of their sums
// hides behind the writing.
template <class T>
static void plain_rows(const Forward<T>& job, int64_t first, int64_t last) {
  using C = arithmetic_t<T>;
  const int64_t n = job.n, ahead = 3 * n * static_cast<int64_t>(sizeof(T)) + 4096;
  C spare[8];
  auto stats_of = [&](int64_t row) { return job.stats ? job.stats + 2 * row : spare + 2 * ((row - first) & 3); };
  auto measure = [&](int64_t row) {
    if (row + 1 < last) measure_rows<2>(job.x + row * n, n, job.kind, job.eps, stats_of(row));
    else if (row < last) measure_rows<1>(job.x + row * n, n, job.kind, job.eps, stats_of(row));
  };
  measure(first);
  for (int64_t pair = first; pair < last; pair += 2) {
    measure(pair + 2);
    for (int64_t row = pair; row < std::min(pair + 2, last); row++)
      job.past_caches ? write_row<true>(job, job.x + row * n, stats_of(row), job.y + row * n, ahead)
                      : write_row<false>(job, job.x + row * n, stats_of(row), job.y + row * n, ahead);
  }
}

// rows of the jobs that add a residual: h = x + residual or norm(x) + residual, y = norm(h)
template <class T>
static void adding_rows(const Forward<T>& job, int64_t first, int64_t last) {
  using C = arithmetic_t<T>;
  const int64_t n = job.n, each = job.first_norm ? 4 : 2;
  static thread_local std::vector<C> room;
  if (!std::is_same_v<T, C> && static_cast<int64_t>(room.size()) < n) room.resize(n);
  C spare[4];
  for (int64_t row = first; row < last; row++) {
    const T* x = job.x + row * n;
    T *y = job.y + row * n, *h = job.h + row * n;
    C* stats = job.stats ? job.stats + each * row : spare;
    const C* sum = room.data();
    if constexpr (std::is_same_v<T, C>) sum = h;
    auto keep = keep_sum<T>(job.residual + row * n, h, room.data());
    if (job.first_norm) {
      measure_rows<1>(x, n, job.kind, job.eps, stats);
      normalised(x, job.first_w, job.first_b, stats, job.kind, n, 0, keep);
      stats += 2;
    } else {
      over<1>(x, n, [&](lane_t<C> v, int, int, lane_t<C>, int64_t i) { keep(v, i, std::min(Lane<C>::width, n - i)); });
    }
    measure_rows<1>(sum, n, job.kind, job.eps, stats);
    job.past_caches ? write_row<true>(job, sum, stats, y, 0) : write_row<false>(job, sum, stats, y, 0);
  }
}

// rows [first, last) of a forward job; see Forward
template <class T>
static void forward_rows(const Forward<T>& job, int64_t first, int64_t last) {
  job.residual ? adding_rows(job, first, last) : plain_rows(job, first, last);
  if (job.past_caches) std::atomic_thread_fence(std::memory_order_seq_cst);
}

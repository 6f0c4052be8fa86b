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

template <int R, class C>
static inline C total(const lane_t<C>* v) {
  if constexpr (R == 1) return across<C>((v[0] + v[1]) + (v[2] + v[3]));
  else return across<C>(v[0] + v[1]);
}

// 1 / sqrt(spread + eps) of R rows whose means are there
template <int R, class T>
static inline void spread_rows(const T* a, int64_t n, double eps, arithmetic_t<T>* stats) {
  using C = arithmetic_t<T>;
  lane_t<C> q[R][4 / R] = {};
  C mean[R];
  for (int r = 0; r < R; r++) mean[r] = stats[2 * r];
  over<R>(a, n, [&](lane_t<C> v, int r, int k, lane_t<C> mask, int64_t) {
    const lane_t<C> d = (v - mean[r]) * mask;
    q[r][k] += d * d;
  });
  for (int r = 0; r < R; r++) stats[2 * r + 1] = C(1) / std::sqrt(total<R, C>(q[r]) * (C(1) / C(n)) + C(eps));
}

// mean (0 for the RMS norm, the sum for the compressed one) and 1 / sqrt(spread + eps) of R rows
template <int R, class T>
static inline void measure_rows(const T* a, int64_t n, Kind kind, double eps, arithmetic_t<T>* stats) {
  using C = arithmetic_t<T>;
  C shift[R] = {};
  lane_t<C> s[R][4 / R] = {}, q[R][4 / R] = {};
  if (kind == Kind::layer) {
    // distances from the first number of the row, so that a large mean costs no digits in long rows
    for (int r = 0; r < R; r++) shift[r] = number(a[r * n]);
    over<R>(a, n, [&](lane_t<C> v, int r, int k, lane_t<C> mask, int64_t) { s[r][k] += (v - shift[r]) * mask; });
    for (int r = 0; r < R; r++) stats[2 * r] = shift[r] + total<R, C>(s[r]) * (C(1) / C(n));
    return spread_rows<R>(a, n, eps, stats);
  }
  const bool compressed = kind == Kind::compressed;
  if (compressed) over<R>(a, n, [&](lane_t<C> v, int r, int k, lane_t<C>, int64_t) { s[r][k] += v, q[r][k] += v * v; });
  else over<R>(a, n, [&](lane_t<C> v, int r, int k, lane_t<C>, int64_t) { q[r][k] += v * v; });
  for (int r = 0; r < R; r++) {
    const C sum = compressed ? total<R, C>(s[r]) : C(0);
    stats[2 * r] = sum;
    stats[2 * r + 1] = C(1) / std::sqrt((total<R, C>(q[r]) + sum * sum) * (C(1) / C(n + compressed)) + C(eps));
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

template <class S, class T>
static inline void write_row(const Forward<T>& job, const S* a, const arithmetic_t<T>* stats, T* y, int64_t ahead) {
  using C = arithmetic_t<T>;
  auto go = [&](auto past_caches, auto at_once) {
    normalised(a, job.w, job.b, stats, job.kind, job.n, ahead, [&](lane_t<C> v, int64_t i, int64_t count) {
      if constexpr (past_caches()) stream<at_once()>(y + i, v);
      else if (count == Lane<C>::width) write<at_once()>(y + i, v);
      else write_part(y + i, v, count);
    });
  };
  if constexpr (std::is_same_v<T, BFloat16> && HEADWAY_LEVEL == 2) {
    if (job.at_once) return job.past_caches ? go(std::true_type{}, std::true_type{}) : go(std::false_type{}, std::true_type{});
  }
  job.past_caches ? go(std::true_type{}, std::false_type{}) : go(std::false_type{}, std::false_type{});
}

// h = x + residual or norm(x) + residual of a row, rounded to the tensor's type, and its statistics, whose sums are taken on the
// way; `sum` holds it as the norm reads it, which is what was rounded, so that forward and backward see the same numbers
template <class T>
static inline void add_row(const Forward<T>& job, int64_t row, arithmetic_t<T>* sum, arithmetic_t<T>* stats) {
  using C = arithmetic_t<T>;
  constexpr int64_t W = Lane<C>::width, K = 4;
  constexpr bool own_room = !std::is_same_v<T, C>;
  const int64_t n = job.n;
  const T *x = job.x + row * n, *residual = job.residual + row * n;
  T* h = job.h + row * n;
  const C *w = job.first_w, *b = job.first_b;
  C mean = 0, rstd = 1, shift = 0;
  if (job.first_norm) {
    measure_rows<1>(x, n, job.kind, job.eps, stats);
    mean = stats[0], rstd = stats[1], stats += 2;
  }
  lane_t<C> s[K] = {};
  auto pass = [&](auto normed, auto weight, auto bias, auto centred) {
    auto z = [&](auto v, auto gain, auto offset) {
      if constexpr (normed()) v = (v - mean) * rstd;
      if constexpr (weight()) v = v * gain;
      if constexpr (bias()) v = v + offset;
      return v;
    };
    // any number near those of the row will do
    if constexpr (centred()) shift = z(number(*x), weight() ? *w : C(0), bias() ? *b : C(0)) + number(*residual);
    auto step = [&](int64_t i, int k, auto from, auto keep, auto mask) {
      const lane_t<C> gain = weight() ? from(w + i) : lane_t<C>{}, offset = bias() ? from(b + i) : lane_t<C>{};
      lane_t<C> v = z(from(x + i), gain, offset) + from(residual + i);
      keep(h + i, v);
      if constexpr (own_room) v = from(h + i), keep(sum + i, v);
      if constexpr (centred()) s[k] += mask(v - shift);
      else s[k] += v * v;
    };
    auto whole = [&](int64_t i, int k) {
      step(i, k, [](const auto* a) { return read(a); }, [](auto* a, lane_t<C> v) { write(a, v); }, [](lane_t<C> v) { return v; });
    };
    int64_t i = 0;
    for (; i + K * W <= n; i += K * W)
      for (int k = 0; k < K; k++) whole(i + k * W, k);
    for (; i + W <= n; i += W) whole(i, 0);
    if (const int64_t rest = n - i)
      step(i, 1, [=](const auto* a) { return read_part(a, rest); }, [=](auto* a, lane_t<C> v) { write_part(a, v, rest); },
           [=](lane_t<C> v) { return v * mask_of<C>(rest); });
  };
  auto affine = [&](auto centred) {
    constexpr auto yes = std::true_type{};
    constexpr auto no = std::false_type{};
    // a bias without a weight comes with a weight of ones
    if (!job.first_norm) pass(no, no, no, centred);
    else if (b) pass(yes, yes, yes, centred);
    else if (w) pass(yes, yes, no, centred);
    else pass(yes, no, no, centred);
  };
  if (job.kind == Kind::layer) {
    affine(std::true_type{});
    stats[0] = shift + total<1, C>(s) * (C(1) / C(n));
    if constexpr (own_room) spread_rows<1>(static_cast<const C*>(sum), n, job.eps, stats);
    else spread_rows<1>(static_cast<const C*>(h), n, job.eps, stats);
  } else {
    affine(std::false_type{});
    stats[0] = 0, stats[1] = C(1) / std::sqrt(total<1, C>(s) * (C(1) / C(n)) + C(job.eps));
  }
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
      write_row(job, job.x + row * n, stats_of(row), job.y + row * n, ahead);
  }
}

// Rows of the jobs that add a residual, one by one, each added up before the one ahead of it is written: two at a time would be two
// streams of each of the four tensors, which costs more beyond the nearest cache than it saves in it.
template <class T>
static void adding_rows(const Forward<T>& job, int64_t first, int64_t last) {
  using C = arithmetic_t<T>;
  constexpr bool own_room = !std::is_same_v<T, C>;
  const int64_t n = job.n, pitch = headway::whole_lines<C>(n), wanted = 2 * pitch + headway::kLine / sizeof(C);
  const int64_t each = job.first_norm ? 4 : 2;
  static thread_local std::vector<C> room;
  if (own_room && static_cast<int64_t>(room.size()) < wanted) room.resize(wanted);
  C spare[8], *sums = headway::line_start(room.data());
  auto stats_of = [&](int64_t row) { return job.stats ? job.stats + each * row : spare + each * (row & 1); };
  auto sum_of = [&](int64_t row) { return sums + pitch * (row & 1); };
  auto write = [&](int64_t row, const auto* sum) { write_row(job, sum, stats_of(row) + each - 2, job.y + row * n, 0); };
  add_row(job, first, sum_of(first), stats_of(first));
  for (int64_t row = first; row < last; row++) {
    if (row + 1 < last) add_row(job, row + 1, sum_of(row + 1), stats_of(row + 1));
    if constexpr (own_room) write(row, static_cast<const C*>(sum_of(row)));
    else write(row, static_cast<const C*>(job.h + row * n));
  }
}

// rows [first, last) of a forward job; see Forward
template <class T>
static void forward_rows(const Forward<T>& job, int64_t first, int64_t last) {
  job.residual ? adding_rows(job, first, last) : plain_rows(job, first, last);
  if (job.past_caches) std::atomic_thread_fence(std::memory_order_seq_cst);
}

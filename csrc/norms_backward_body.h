// One row at a time: grad_x = rstd * (h - mean(h) - xh * mean(h * xh)) with h = gy * w, plus gh, the gradient that reaches x
// beside the norm. Without mean(h) it is that of the RMS norm; sums of gy * xh and of gy go to gw and gb.
#include "rows.h"

// rstd * (h - c1 - xh * c2) is written as rstd * h - ((a - mean) * k1 + k0)
template <class T, bool has_weight, bool want_sums>
static inline void backward_row(const T* gy, const T* gh, const T* x, const arithmetic_t<T>* w, const arithmetic_t<T>* stats, T* gx,
                                arithmetic_t<T>* gw, arithmetic_t<T>* gb, int64_t n, Kind kind, bool past_caches) {
  using C = arithmetic_t<T>;
  constexpr int64_t W = Lane<C>::width;
  const int64_t whole = n / W * W, rest = n - whole;
  const lane_t<C> none = {};
  const C rstd = stats[1], mean = kind == Kind::layer ? stats[0] : C(0);
  lane_t<C> p[2] = {}, q[2] = {};
  auto one = [&](int k, lane_t<C> g, lane_t<C> a, lane_t<C> gain, lane_t<C>& tw, lane_t<C>& tb) {
    const lane_t<C> xh = (a - mean) * rstd;
    if constexpr (want_sums) tw += g * xh, tb += g;
    if constexpr (has_weight) g = g * gain;
    p[k] += g, q[k] += g * xh;
  };
  auto step = [&](int64_t i, int k) {
    const lane_t<C> gain = has_weight ? get(w + i) : none;
    lane_t<C> tw = want_sums ? get(gw + i) : none, tb = want_sums ? get(gb + i) : none;
    one(k, read(gy + i), read(x + i), gain, tw, tb);
    if constexpr (want_sums) put(gw + i, tw), put(gb + i, tb);
  };
  int64_t i = 0;
  for (; i + 2 * W <= whole; i += 2 * W) step(i, 0), step(i + W, 1);
  if (i < whole) step(i, 0);
  if (rest) {
    const lane_t<C> gain = has_weight ? read_part(w + whole, rest) : none;
    lane_t<C> tw = want_sums ? read_part(gw + whole, rest) : none, tb = want_sums ? read_part(gb + whole, rest) : none;
    // gradients beyond the row's end are read as zeros, so nothing is added there
    one(1, read_part(gy + whole, rest), read_part(x + whole, rest), gain, tw, tb);
    if constexpr (want_sums) write_part(gw + whole, tw, rest), write_part(gb + whole, tb, rest);
  }
  const C count = kind == Kind::compressed ? C(n + 1) : C(n);
  const C k1 = rstd * rstd * (across<C>(q[0] + q[1]) / count), k0 = kind == Kind::layer ? rstd * (across<C>(p[0] + p[1]) / count) : C(0);
  // of the compressed norm: gz = rstd * g - (z + sum(z)) * rstd^3 * sum(g * z) / (n + 1)
  const C centre = kind == Kind::compressed ? -stats[0] : mean;
  auto result = [&](lane_t<C> g, lane_t<C> a, lane_t<C> gain) {
    if constexpr (has_weight) g = g * gain;
    return g * rstd - ((a - centre) * k1 + k0);
  };
  auto all = [&](auto put_there) {
    for (int64_t i = 0; i < whole; i += W) {
      lane_t<C> v = result(read(gy + i), read(x + i), has_weight ? get(w + i) : none);
      if (gh) v += read(gh + i);
      put_there(gx + i, v);
    }
  };
  if (past_caches) all([](T* to, lane_t<C> v) { stream(to, v); });
  else all([](T* to, lane_t<C> v) { write(to, v); });
  if (rest) {
    lane_t<C> v = result(read_part(gy + whole, rest), read_part(x + whole, rest), has_weight ? read_part(w + whole, rest) : none);
    if (gh) v += read_part(gh + whole, rest);
    write_part(gx + whole, v, rest);
  }
}

template <class T>
static inline void backward_of(const Backward<T>& job, int64_t row, arithmetic_t<T>* gw, arithmetic_t<T>* gb) {
  const int64_t at = row * job.n;
  auto go = [&](auto weight, auto sums) {
    backward_row<T, weight(), sums()>(job.gy + at, job.gh ? job.gh + at : nullptr, job.x + at, job.w, job.stats + job.stride * row,
                                      job.gx + at, gw, gb, job.n, job.kind, job.past_caches);
  };
  // gw and gb are both given or neither
  if (job.w) gw ? go(std::true_type{}, std::true_type{}) : go(std::true_type{}, std::false_type{});
  else gw ? go(std::false_type{}, std::true_type{}) : go(std::false_type{}, std::false_type{});
}

// rows [first, last) of a backward job, and of a second one that goes on from where the first ended, while the row is near;
// sums holds the sums of gy * xh and of gy, whole_lines(n) numbers each, of the first job and then of the second
template <class T>
static void backward_rows(const Backward<T>& job, const Backward<T>* then, arithmetic_t<T>* sums, int64_t first, int64_t last) {
  const int64_t pitch = headway::whole_lines<arithmetic_t<T>>(job.n);
  for (int64_t row = first; row < last; row++) {
    backward_of(job, row, sums, sums ? sums + pitch : nullptr);
    if (then) backward_of(*then, row, sums ? sums + 2 * pitch : nullptr, sums ? sums + 3 * pitch : nullptr);
  }
  if (job.past_caches || (then && then->past_caches)) std::atomic_thread_fence(std::memory_order_seq_cst);
}

// Norms with channel statistics: sums down the columns of (rows, n) in one reading, then one multiply-add an entry.
// Rows come in the arithmetic type (no copy for float and double), if wanted divided group by group by their quadratic mean.
// Eight rows are added at once, so that the sums are loaded and stored once for all of them; sums of 256 rows go into double.

using headway::arithmetic_t;

constexpr int64_t kSquareRows = 8, kProductRows = 4, kFlush = 32;

#include "widen_body.h"

// to = p / quadratic mean, group by group of m channels; `rstd` holds one number a group, written here unless `known`.
// `fixed` is m where it is known while compiling: short loops of a known length become a few instructions.
template <int64_t fixed, class A>
static void scale_groups(const A* p, A* to, A* rstd, bool known, int64_t m, int64_t groups, A eps) {
  if (fixed) m = fixed;
  if (!known) {
    for (int64_t g = 0; g < groups; g++) {
      A q = 0;
#pragma omp simd reduction(+ : q)
      for (int64_t i = 0; i < m; i++) q += p[g * m + i] * p[g * m + i];
      rstd[g] = q;
    }
#pragma omp simd
    for (int64_t g = 0; g < groups; g++) rstd[g] = 1 / std::sqrt(rstd[g] / A(m) + eps);
  }
  for (int64_t g = 0; g < groups; g++) {
    const A s = rstd[g];
#pragma omp simd
    for (int64_t i = 0; i < m; i++) to[g * m + i] = p[g * m + i] * s;
  }
}

// a row in the arithmetic type, group by group divided by its quadratic mean where there are groups
template <class T, class A>
static const A* bring(const T* x, A* room, A* rstd, bool known, int64_t n, int64_t groups, A eps) {
  const A* a = widen(x, room, n);
  if (!groups) return a;
  switch (n / groups) {
    case 8: scale_groups<8>(a, room, rstd, known, 8, groups, eps); break;
    case 16: scale_groups<16>(a, room, rstd, known, 16, groups, eps); break;
    case 32: scale_groups<32>(a, room, rstd, known, 32, groups, eps); break;
    case 64: scale_groups<64>(a, room, rstd, known, 64, groups, eps); break;
    default: scale_groups<0>(a, room, rstd, known, n / groups, groups, eps);
  }
  return room;
}

template <class A>
static void flush(A* from, double* to, int64_t n) {
#pragma omp simd
  for (int64_t c = 0; c < n; c++) to[c] += double(from[c]), from[c] = 0;
}

template <class A>
static void add_squares(const A* const* p, A* __restrict__ sum, int64_t n) {
  const A *a = p[0], *b = p[1], *c = p[2], *d = p[3], *e = p[4], *f = p[5], *g = p[6], *h = p[7];
#pragma omp simd
  for (int64_t i = 0; i < n; i++)
    sum[i] += ((a[i] * a[i] + b[i] * b[i]) + (c[i] * c[i] + d[i] * d[i])) + ((e[i] * e[i] + f[i] * f[i]) + (g[i] * g[i] + h[i] * h[i]));
}

// sums[n] += squares of the rows first..last that are not padding; returns how many those are. room: (kSquareRows + 2) * n
template <class T>
static int64_t column_squares(const T* x, const uint8_t* pad, int64_t first, int64_t last, int64_t n, int64_t groups, double eps,
                              arithmetic_t<T>* rstd, double* sums, arithmetic_t<T>* room) {
  using A = arithmetic_t<T>;
  A *zeros = room + kSquareRows * n, *sum = zeros + n;
  std::fill(zeros, zeros + 2 * n, A(0));
  const A* rows[kSquareRows];
  int64_t count = 0, held = 0, blocks = 0;
  for (int64_t r = first; r < last; r++) {
    if (pad && pad[r]) continue;
    rows[held] = bring(x + r * n, room + held * n, rstd + r * groups, false, n, groups, A(eps));
    count++;
    if (++held < kSquareRows) continue;
    held = 0;
    add_squares(rows, sum, n);
    if (++blocks % kFlush == 0) flush(sum, sums, n);
  }
  if (held) {
    std::fill(rows + held, rows + kSquareRows, zeros);
    add_squares(rows, sum, n);
  }
  flush(sum, sums, n);
  return count;
}

// y = u * scale + shift. `rstd` lies `step` numbers a row apart; its numbers are taken as known, except on the rows that `pad`
// names (column_squares passed those over), or everywhere unless `known`
template <class T>
static void scale_rows(const T* x, T* y, const uint8_t* pad, int64_t first, int64_t last, int64_t n, int64_t groups, double eps,
                       arithmetic_t<T>* rstd, int64_t step, bool known, const arithmetic_t<T>* __restrict__ scale,
                       const arithmetic_t<T>* __restrict__ shift, arithmetic_t<T>* room) {
  using A = arithmetic_t<T>;
  for (int64_t r = first; r < last; r++) {
    const A* u = bring(x + r * n, room, rstd + r * step, known && !(pad && pad[r]), n, groups, A(eps));
    A* out = std::is_same_v<T, A> ? reinterpret_cast<A*>(y + r * n) : room;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = u[i] * scale[i] + shift[i];
    narrow(out, y + r * n, n);
  }
}

// sum[0..n) += g * u, sum[n..2n) += g, and, if wanted, sum[2n..3n) += u * u
template <bool squares, class A>
static void add_products(const A* const* g, const A* const* u, A* __restrict__ sum, int64_t n) {
  const A *ga = g[0], *gb = g[1], *gc = g[2], *gd = g[3], *ua = u[0], *ub = u[1], *uc = u[2], *ud = u[3];
  A *__restrict__ gu = sum, *__restrict__ gs = sum + n, *__restrict__ uu = sum + 2 * n;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    gu[i] += (ga[i] * ua[i] + gb[i] * ub[i]) + (gc[i] * uc[i] + gd[i] * ud[i]);
    gs[i] += (ga[i] + gb[i]) + (gc[i] + gd[i]);
    if (squares) uu[i] += (ua[i] * ua[i] + ub[i] * ub[i]) + (uc[i] * uc[i] + ud[i] * ud[i]);
  }
}

// sums[5n]: g * u and g over real tokens; g * u, g and u * u over padding. Returns the number of real tokens.
// room: (4 * kProductRows + 6) * n
template <class T>
static int64_t column_products(const T* gy, const T* x, const uint8_t* pad, int64_t first, int64_t last, int64_t n, int64_t groups,
                               arithmetic_t<T>* rstd, double* sums, arithmetic_t<T>* room) {
  using A = arithmetic_t<T>;
  A *zeros = room + 4 * kProductRows * n, *own[2] = {zeros + n, zeros + 3 * n};
  std::fill(zeros, zeros + 6 * n, A(0));
  const A *g[2][kProductRows], *u[2][kProductRows];
  int64_t held[2] = {0, 0}, blocks[2] = {0, 0}, count = 0;
  for (int64_t r = first; r < last; r++) {
    const int k = pad && pad[r];
    A* place = room + (2 * k * kProductRows + 2 * held[k]) * n;
    g[k][held[k]] = widen(gy + r * n, place, n);
    u[k][held[k]] = bring(x + r * n, place + n, rstd + r * groups, true, n, groups, A(0));
    count += !k;
    if (++held[k] < kProductRows) continue;
    held[k] = 0;
    k ? add_products<true>(g[k], u[k], own[k], n) : add_products<false>(g[k], u[k], own[k], n);
    if (++blocks[k] % kFlush == 0) flush(own[k], sums + 2 * k * n, (2 + k) * n);
  }
  for (int k = 0; k < 2; k++) {
    if (held[k]) {
      std::fill(g[k] + held[k], g[k] + kProductRows, zeros);
      std::fill(u[k] + held[k], u[k] + kProductRows, zeros);
      k ? add_products<true>(g[k], u[k], own[k], n) : add_products<false>(g[k], u[k], own[k], n);
    }
    if (pad || !k) flush(own[k], sums + 2 * k * n, (2 + k) * n);
  }
  return count;
}

// gx = d = gy * gain - u * pull (no pull on padding that does not count); through the group scaling rstd * (d - u * mean(d * u)).
// room: 3 * n
template <class T>
static void gradient_rows(const T* gy, const T* x, T* gx, const uint8_t* pad, int64_t first, int64_t last, int64_t n, int64_t groups,
                          arithmetic_t<T>* rstd, const arithmetic_t<T>* __restrict__ gain, const arithmetic_t<T>* __restrict__ pull,
                          arithmetic_t<T>* room) {
  using A = arithmetic_t<T>;
  for (int64_t r = first; r < last; r++) {
    const A* g = widen(gy + r * n, room, n);
    const A* u = bring(x + r * n, room + n, rstd + r * groups, true, n, groups, A(0));
    A* out = std::is_same_v<T, A> ? reinterpret_cast<A*>(gx + r * n) : room + 2 * n;
    if (pad && pad[r]) {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) out[i] = g[i] * gain[i];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) out[i] = g[i] * gain[i] - u[i] * pull[i];
    }
    if (groups) {
      const int64_t m = n / groups;
      for (int64_t k = 0; k < groups; k++) {
        const A *v = u + k * m, s = rstd[r * groups + k];
        A *d = out + k * m, dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < m; i++) dot += d[i] * v[i];
        dot /= A(m);
#pragma omp simd
        for (int64_t i = 0; i < m; i++) d[i] = s * (d[i] - v[i] * dot);
      }
    }
    narrow(out, gx + r * n, n);
  }
}

static bool all_finite(const double* p, int64_t n) {
  int64_t bad = 0;
  for (int64_t i = 0; i < n; i++) bad += !(std::fabs(p[i]) <= std::numeric_limits<double>::max());
  return bad == 0;
}

// geometric mean of the `rows` rows of `window`; room: rows * n. A power of two takes square roots alone.
static void geometric_mean(const double* window, int64_t rows, int64_t n, double* __restrict__ room, double* __restrict__ mean) {
  if (rows & (rows - 1)) {
    for (int64_t c = 0; c < n; c++) {
      double sum = 0;
      for (int64_t r = 0; r < rows; r++) sum += std::log(window[r * n + c]);
      mean[c] = std::exp(sum / double(rows));
    }
    return;
  }
  std::copy(window, window + rows * n, room);
  for (int64_t half = rows / 2; half; half /= 2) {
#pragma omp simd
    for (int64_t i = 0; i < half * n; i++) room[i] = std::sqrt(room[i]) * std::sqrt(room[half * n + i]);
  }
  std::copy(room, room + n, mean);
}

// steps 1 to 7 of the training pass: q (n) in, psi and r out; running (n) and window (rows, n) are moved on.
// room: (rows + 1) * n
static void unified_step(headway::UnifiedStep& s, const double* q, double* running, double* window, int64_t rows, int64_t n, double* psi,
                         double* r, double* room) {
  std::copy(q, q + n, psi);
  std::fill(r, r + n, 1.0);
  s.fired = false, s.skip = true;
  if (!s.usable) return;
  double spread = 0;
  const int64_t all = rows * n;
  if (s.filtration && all > 1) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < all; i++) sum += std::sqrt(window[i]);
    const double mean = sum / double(all);
    for (int64_t i = 0; i < all; i++) squares += (std::sqrt(window[i]) - mean) * (std::sqrt(window[i]) - mean);
    spread = squares / double(all - 1);
  }
  double *slot = window + (s.t % rows) * n, *geometric = room + all;
  std::copy(q, q + n, slot);
  s.skip = rows <= 1;
  const bool warm = s.t >= s.warmup;
  if (warm && (s.filtration || !(s.skip || s.t <= rows))) geometric_mean(window, rows, n, room, geometric);
  if (s.filtration && warm) {
    for (int64_t c = 0; c < n && !s.fired; c++) {
      double sum = 0;
      for (int64_t i = 0; i < rows; i++) sum += window[i * n + c];
      s.fired = sum / double(rows) - geometric[c] > double(rows) * spread;
    }
    if (s.fired) std::copy(running, running + n, slot), s.skip = true;
  }
  if (warm && s.t > rows && !s.skip) std::copy(geometric, geometric + n, psi);
  if (!s.skip && s.t > std::max(s.compensation, s.warmup))
    for (int64_t c = 0; c < n; c++) r[c] = std::min(5.0, std::max(0.2, std::sqrt((psi[c] + s.eps) / (running[c] + s.eps))));
  for (int64_t c = 0; c < n; c++) running[c] = s.momentum * running[c] + (1 - s.momentum) * psi[c];
}

static void inverse_root(const double* square, double eps, int64_t n, double* __restrict__ out) {
#pragma omp simd
  for (int64_t c = 0; c < n; c++) out[c] = 1 / std::sqrt(square[c] + eps);
}

// Adam and SGD steps whose radial part is taken out per row or per tensor. A tensor is a run of numbers in memory, cut into rows
// of `width`. Two passes: `gather` writes the moments, recomputes the update u into the nearest cache and adds up
// <g,p>, <g,g>, <p,p>, <p,u> of every row; `apply` computes u once more (reading it back from memory would cost a fourth stream)
// and writes p. Sums run in the arithmetic type over blocks and in double over the blocks of a row.
#include "rows.h"

static constexpr int64_t kBlock = 1024;

static inline float root(float x) { return __builtin_sqrtf(x); }
static inline double root(double x) { return __builtin_sqrt(x); }

// a block of a stream in the arithmetic type: the memory itself, or a copy in `room`
static inline float* block_of(float* from, float*, int64_t) { return from; }
static inline double* block_of(double* from, double*, int64_t) { return from; }
template <class T>
static inline float* block_of(T* from, float* room, int64_t n) {
  load_row(from, room, n);
  return room;
}
// rounded to the stored format, as it will be read again
template <class T>
static inline void keep(float* from, T* to, int64_t n) {
  if constexpr (!std::is_same_v<T, float>) {
    store_row(from, to, n);
    load_row(to, from, n);
  }
}
static inline void keep(double*, double*, int64_t) {}
template <class T>
static inline void put_block(const float* from, T* to, int64_t n) {
  if constexpr (!std::is_same_v<T, float>) store_row(from, to, n);
}
static inline void put_block(const double*, double*, int64_t) {}

// u of one block. `first`: the moments are updated from g; otherwise they are only read.
template <bool first, bool nesterov, class C>
static void adam_update(const C* __restrict g, C* __restrict m, C* __restrict v, C* __restrict u, int64_t n, const headway::Rule& rule) {
  const C b1 = C(rule.beta1), b2 = C(rule.beta2), c1 = C(1 - rule.beta1), c2 = C(1 - rule.beta2), eps = C(rule.eps);
  const C back = C(1 / rule.root), sign = C(rule.sign);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    if (first) {
      const C x = sign * g[i];
      m[i] = b1 * m[i] + c1 * x;
      v[i] = b2 * v[i] + c2 * x * x;
    }
    const C top = nesterov ? b1 * m[i] + c1 * sign * g[i] : m[i];
    u[i] = top / (root(v[i]) * back + eps);
  }
}

template <bool first, bool nesterov, class C>
static void sgd_update(const C* __restrict g, C* __restrict m, C* __restrict u, int64_t n, const headway::Rule& rule) {
  const C momentum = C(rule.beta1), share = C(1 - rule.beta2), sign = C(rule.sign);
  if (m == nullptr) {
    const C factor = nesterov ? sign : share * sign;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) u[i] = factor * g[i];
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    if (first) m[i] = momentum * m[i] + share * sign * g[i];
    u[i] = nesterov ? sign * g[i] + momentum * m[i] : m[i];
  }
}

template <bool first, class T, class C>
static const C* update(T* gradient, T* m, T* v, C* room, int64_t n, const headway::Rule& rule) {
  C *g = nullptr, *a = nullptr, *b = nullptr, *u = room;
  if (first || rule.nesterov || (rule.kind == headway::Kind::sgd && m == nullptr)) g = block_of(gradient, room + kBlock, n);
  if (rule.kind == headway::Kind::given) return block_of(m, room, n);
  if (m) a = block_of(m, room + 2 * kBlock, n);
  if (rule.kind == headway::Kind::adam) {
    b = block_of(v, room + 3 * kBlock, n);
    if (first) {
      // the update is taken from what is stored, so the first call only moves the moments where storing rounds
      rule.nesterov ? adam_update<true, true>(g, a, b, u, n, rule) : adam_update<true, false>(g, a, b, u, n, rule);
      if constexpr (sizeof(T) < sizeof(C)) {
        keep(a, m, n), keep(b, v, n);
        rule.nesterov ? adam_update<false, true>(g, a, b, u, n, rule) : adam_update<false, false>(g, a, b, u, n, rule);
      }
    } else {
      rule.nesterov ? adam_update<false, true>(g, a, b, u, n, rule) : adam_update<false, false>(g, a, b, u, n, rule);
    }
    return u;
  }
  if (first) {
    rule.nesterov ? sgd_update<true, true>(g, a, u, n, rule) : sgd_update<true, false>(g, a, u, n, rule);
    if constexpr (sizeof(T) < sizeof(C)) {
      if (a) {
        keep(a, m, n);
        rule.nesterov ? sgd_update<false, true>(g, a, u, n, rule) : sgd_update<false, false>(g, a, u, n, rule);
      }
    }
  } else {
    rule.nesterov ? sgd_update<false, true>(g, a, u, n, rule) : sgd_update<false, false>(g, a, u, n, rule);
  }
  return u;
}

template <class C>
static inline void four_sums(const C* __restrict p, const C* __restrict g, const C* __restrict u, int64_t n, double* to) {
  C gp = 0, gg = 0, pp = 0, pu = 0;
#pragma omp simd reduction(+ : gp, gg, pp, pu)
  for (int64_t i = 0; i < n; i++) {
    gp += g[i] * p[i], gg += g[i] * g[i], pp += p[i] * p[i], pu += p[i] * u[i];
  }
  to[0] += gp, to[1] += gg, to[2] += pp, to[3] += pu;
}

// numbers begin..end of a tensor; `sums` belongs to the row of `begin` and is followed by those of the next rows
template <class T, class C>
static void gather(T* p, T* g, T* m, T* v, int64_t begin, int64_t end, int64_t width, const headway::Rule& rule, double* sums, C* room) {
  const int64_t row = begin / width;
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = end - i < kBlock ? end - i : kBlock;
    const C* u = update<true>(g + i, m ? m + i : nullptr, v ? v + i : nullptr, room, n, rule);
    C *a = block_of(p + i, room + 4 * kBlock, n), *b = block_of(g + i, room + kBlock, n);
    for (int64_t j = 0; j < n;) {
      const int64_t r = (i + j) / width, stop = (r + 1) * width - i, last = stop < n ? stop : n;
      four_sums(a + j, b + j, u + j, last - j, sums + 4 * (r - row));
      j = last;
    }
  }
}

template <class C>
static inline void move_row(C* __restrict p, const C* __restrict u, int64_t n, C keep_, C step) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) p[i] = keep_ * p[i] - step * u[i];
}
template <class C>
static inline void project_row(const C* __restrict p, const C* __restrict u, C* __restrict to, int64_t n, C coefficient) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) to[i] = u[i] - coefficient * p[i];
}

// p = p (1 - decay) - step (u - coefficient_row p). `first`: nothing was gathered before. `keep_u`: the projected update goes
// to m.
template <bool first, class T, class C>
static void apply(T* p, T* g, T* m, T* v, int64_t begin, int64_t end, int64_t width, const headway::Rule& rule, const C* coefficients,
                  double decay, bool keep_u, C* room) {
  const C step = C(rule.step);
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = end - i < kBlock ? end - i : kBlock;
    const C* u = update<first>(g + i, m ? m + i : nullptr, v ? v + i : nullptr, room, n, rule);
    C* a = block_of(p + i, room + 4 * kBlock, n);
    C* projected = room + 5 * kBlock;
    for (int64_t j = 0; j < n;) {
      const int64_t r = (i + j) / width, stop = (r + 1) * width - i, last = stop < n ? stop : n;
      const C c = coefficients ? coefficients[r] : C(0);
      if (keep_u) project_row(a + j, u + j, projected + j, last - j, c);
      move_row(a + j, u + j, last - j, C(1 - decay + rule.step * double(c)), step);
      j = last;
    }
    put_block(a, p + i, n);
    if (keep_u) store_row(projected, m + i, n);
  }
}

// One direction of one layer-normalised recurrent layer over a slice of the batch: the time loop and back-propagation through it.
// Included once an instruction set (isa.h). Rows of a batch never meet, so a thread walks all steps of its rows without waiting.
// P = x W_ih^T and Z = h W_hh^T; segments of a row of G*H numbers are normalised separately (4H for the LSTM, 2H and H for the
// GRU, H for the plain network, H each with one norm a gate).

#if HEADWAY_LEVEL == 2
#define VECTOR_BYTES 64
#define VECTORS 4
#elif HEADWAY_LEVEL == 1
#define VECTOR_BYTES 32
#define VECTORS 2
#else
#define VECTOR_BYTES 16
#define VECTORS 2
#endif

template <class C>
struct Wide {
  typedef C type __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(C)), may_alias));
  static constexpr int64_t columns = VECTORS * VECTOR_BYTES / sizeof(C);
};

inline int64_t panel_columns(int64_t bytes_each) { return VECTORS * VECTOR_BYTES / bytes_each; }

// packed[panel][k][columns] = w(k, n); `across` says that w is stored as (n, k)
template <class C>
void pack(const C* w, int64_t K, int64_t N, bool across, C* packed) {
  constexpr int64_t W = Wide<C>::columns;
  for (int64_t first = 0; first < N; first += W)
    for (int64_t k = 0; k < K; k++)
      for (int64_t j = 0; j < W; j++) {
        const int64_t n = first + j;
        *packed++ = n >= N ? C(0) : across ? w[n * K + k] : w[k * N + n];
      }
}

template <class C, int ROWS>
inline void block(const C* a, int64_t lda, int64_t K, const C* packed, C* out, int64_t ldc, int64_t columns) {
  using V = typename Wide<C>::type;
  constexpr int64_t W = Wide<C>::columns, L = W / VECTORS;
  V sum[ROWS][VECTORS];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) sum[r][v] = V{};
  for (int64_t k = 0; k < K; k++, packed += W) {
    V w[VECTORS];
    for (int v = 0; v < VECTORS; v++) w[v] = *reinterpret_cast<const V*>(packed + v * L);
    for (int r = 0; r < ROWS; r++) {
      const C value = a[r * lda + k];
      for (int v = 0; v < VECTORS; v++) sum[r][v] += w[v] * value;
    }
  }
  if (columns == W) {
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECTORS; v++) *reinterpret_cast<V*>(out + r * ldc + v * L) = sum[r][v];
  } else {
    for (int r = 0; r < ROWS; r++) {
      C row[W];
      for (int v = 0; v < VECTORS; v++) *reinterpret_cast<V*>(row + v * L) = sum[r][v];
      for (int64_t j = 0; j < columns; j++) out[r * ldc + j] = row[j];
    }
  }
}

// out (M, N) = a (M, K) times the packed matrix
template <class C>
void multiply(const C* a, int64_t M, int64_t K, const C* packed, int64_t N, C* out) {
  constexpr int64_t W = Wide<C>::columns;
  const int64_t blocks = (M + 5) / 6;
  for (int64_t first = 0; first < N; first += W, packed += K * W) {
    const int64_t columns = N - first < W ? N - first : W;
    int64_t row = 0;
    for (int64_t i = 0; i < blocks; i++) {
      const int64_t rows = (M - row) / (blocks - i);
      const C* from = a + row * K;
      C* to = out + row * N + first;
      switch (rows) {
        case 1: block<C, 1>(from, K, K, packed, to, N, columns); break;
        case 2: block<C, 2>(from, K, K, packed, to, N, columns); break;
        case 3: block<C, 3>(from, K, K, packed, to, N, columns); break;
        case 4: block<C, 4>(from, K, K, packed, to, N, columns); break;
        case 5: block<C, 5>(from, K, K, packed, to, N, columns); break;
        default: block<C, 6>(from, K, K, packed, to, N, columns); break;
      }
      row += rows;
    }
  }
}

#include "exponential.h"
inline double hyperbolic(double x) { return std::tanh(x); }
inline float hyperbolic(float x) {
  const float q = x * x;
  const float small = x + x * q * (-0.33333333f + q * (0.13333333f + q * (-0.05396825f + q * 0.021869488f)));
  const float large = 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
  return q < 0.04f ? small : large;
}

template <class C>
inline void statistics(const C* a, int64_t n, C eps, C* stats) {
  C total = 0, square = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; i++) total += a[i];
  const C mean = total / C(n);
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < n; i++) square += (a[i] - mean) * (a[i] - mean);
  stats[0] = mean;
  stats[1] = C(1) / std::sqrt(square / C(n) + eps);
}

// dx = rstd (h - mean(h) - xhat mean(h xhat)), h = gain dy; dx may be the memory of x or of dy
template <class C>
inline void norm_backward(const C* dy, const C* x, int64_t n, const C* gain, const C* stats, C* dgain, C* dx) {
  const C mean = stats[0], rstd = stats[1];
  C first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
  for (int64_t i = 0; i < n; i++) {
    const C xhat = (x[i] - mean) * rstd, h = dy[i] * gain[i];
    dgain[i] += dy[i] * xhat;
    first += h;
    second += h * xhat;
  }
  first /= C(n);
  second /= C(n);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) dx[i] = rstd * (dy[i] * gain[i] - first - (x[i] - mean) * rstd * second);
}

template <class C>
inline void round_to_bfloat16(const C* from, C* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = from[i];
}
template <>
inline void round_to_bfloat16<float>(const float* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, from[i]);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    to[i] = from[i] != from[i] ? from[i] : __builtin_bit_cast(float, rounded);
  }
}

// left = normalised P with gain and offset, right = the same of Z
template <class C>
inline void normalise(const Run<C>& s, const C* p, const C* z, const C* sp, const C* sz, C* left, C* right) {
  const C *gain_in = s.gain_in, *offset_in = s.offset_in, *gain_rec = s.gain_rec, *offset_rec = s.offset_rec;
  const int64_t segments = s.segments;
  for (int64_t k = 0; k < segments; k++) {
    const int64_t from = s.bounds[k], to = s.bounds[k + 1];
    const C mp = sp[2 * k], rp = sp[2 * k + 1], mz = sz[2 * k], rz = sz[2 * k + 1];
#pragma omp simd
    for (int64_t j = from; j < to; j++) {
      left[j] = (p[j] - mp) * rp * gain_in[j] + offset_in[j];
      right[j] = (z[j] - mz) * rz * gain_rec[j] + offset_rec[j];
    }
  }
}

template <class C>
inline void row_statistics(const Run<C>& s, const C* a, C* stats) {
  for (int64_t k = 0; k < s.segments; k++) {
    if (s.norm) {
      statistics(a + s.bounds[k], s.bounds[k + 1] - s.bounds[k], s.eps, stats + 2 * k);
    } else {
      stats[2 * k] = 0;
      stats[2 * k + 1] = 1;
    }
  }
}

template <class C>
void forward(const Run<C>& s, int64_t first, int64_t last, C* room) {
  const int64_t H = s.H, GH = s.G * H, B = s.B, T = s.T, K = 2 * s.segments;
  C *left = room, *right = left + GH, *rounded = right + GH;
  // copies, because a store through a C* might change the pointers inside s and would keep loops from vectorising
  const C *gain_rec = s.gain_rec, *offset_rec = s.offset_rec, *gain_cell = s.gain_cell, *offset_cell = s.offset_cell;
  const bool relu = s.relu, feed_back = s.cell_norm == 2;
  for (int64_t step = 0; step < T; step++) {
    const int64_t t = s.reverse ? T - 1 - step : step, before = s.reverse ? t + 1 : t - 1;
    const C* h_before = step ? s.h + before * B * H : s.h0;
    const C* c_before = step ? s.c + before * B * H : s.c0;
    C* z_step = s.z + (s.keep ? t * B * GH : 0);
    const C* operand = h_before + first * H;
    if (s.low) {
      round_to_bfloat16(operand, rounded, (last - first) * H);
      operand = rounded;
    }
    multiply(operand, last - first, H, s.packed, GH, z_step + first * GH);
    for (int64_t b = first; b < last; b++) {
      const int64_t row = t * B + b;
      const C* hp = h_before + b * H;
      C* h = s.h + row * H;
      const bool lstm = s.kind == 0;
      const C* cp = lstm ? c_before + b * H : nullptr;
      C* c = lstm ? s.c + row * H : nullptr;
      if (s.lengths && t >= s.lengths[b]) {
#pragma omp simd
        for (int64_t j = 0; j < H; j++) h[j] = hp[j];
        if (lstm)
#pragma omp simd
          for (int64_t j = 0; j < H; j++) c[j] = cp[j];
        continue;
      }
      const C* p = s.p + row * GH;
      C* z = z_step + b * GH;
      C *sp = s.stats_in + row * K, *sz = s.stats_rec + row * K;
      if (s.kind == 2) {
#pragma omp simd
        for (int64_t j = 0; j < H; j++) z[j] += p[j];
        row_statistics(s, z, sz);
        const C mean = sz[0], rstd = sz[1];
#pragma omp simd
        for (int64_t j = 0; j < H; j++) {
          const C a = (z[j] - mean) * rstd * gain_rec[j] + offset_rec[j];
          h[j] = relu ? (a < C(0) ? C(0) : a) : hyperbolic(a);
        }
        continue;
      }
      row_statistics(s, p, sp);
      row_statistics(s, z, sz);
      normalise(s, p, z, sp, sz, left, right);
      if (s.kind == 1) {
#pragma omp simd
        for (int64_t j = 0; j < H; j++) {
          const C r = sigmoid(left[j] + right[j]), u = sigmoid(left[H + j] + right[H + j]);
          const C n = hyperbolic(left[2 * H + j] + r * right[2 * H + j]);
          h[j] = u * hp[j] + (C(1) - u) * n;
        }
        continue;
      }
      C* raw = s.cell_norm == 2 ? s.raw + row * H : c;
#pragma omp simd
      for (int64_t j = 0; j < H; j++) {
        const C i = sigmoid(left[j] + right[j]), f = sigmoid(left[H + j] + right[H + j]);
        const C g = hyperbolic(left[2 * H + j] + right[2 * H + j]);
        raw[j] = f * cp[j] + i * g;
      }
      C* sc = s.stats_cell + row * 2;
      sc[0] = 0;
      sc[1] = 1;
      if (s.cell_norm) statistics(raw, H, s.eps, sc);
      const C mean = sc[0], rstd = sc[1];
#pragma omp simd
      for (int64_t j = 0; j < H; j++) {
        const C y = (raw[j] - mean) * rstd * gain_cell[j] + offset_cell[j];
        if (feed_back) c[j] = y;
        h[j] = sigmoid(left[3 * H + j] + right[3 * H + j]) * hyperbolic(y);
      }
    }
  }
}

// s.p is overwritten by the gradient of P, s.dz gets that of Z; dh, dc hold the gradients of the last state and end as those
// of the first; grads = [gain_in, offset_in, gain_rec, offset_rec (GH each), gain_cell, offset_cell (H each)] is added to
template <class C>
void backward(const Run<C>& s, int64_t first, int64_t last, C* grads, C* room) {
  const int64_t H = s.H, GH = s.G * H, B = s.B, T = s.T, K = 2 * s.segments;
  C *left = room, *right = left + GH, *da = right + GH, *db = da + GH, *dy = db + GH, *direct = dy + H;
  C *dgain_in = grads, *doffset_in = grads + GH, *dgain_rec = grads + 2 * GH, *doffset_rec = grads + 3 * GH;
  const C *gain_cell = s.gain_cell, *offset_cell = s.offset_cell;
  const bool relu = s.relu, feed_back = s.cell_norm == 2;
  C *dgain_cell = grads + 4 * GH, *doffset_cell = dgain_cell + H;
  for (int64_t step = T - 1; step >= 0; step--) {
    const int64_t t = s.reverse ? T - 1 - step : step, before = s.reverse ? t + 1 : t - 1;
    const C* h_before = step ? s.h + before * B * H : s.h0;
    const C* c_before = step ? s.c + before * B * H : s.c0;
    for (int64_t b = first; b < last; b++) {
      const int64_t row = t * B + b;
      C *dh = s.dh + b * H, *dc = s.dc + b * H, *keep = direct + (b - first) * H;
      C *p = s.p + row * GH, *dz = s.dz + row * GH;
      const C *gh = s.gh + row * H, *z = s.z + row * GH;
#pragma omp simd
      for (int64_t j = 0; j < H; j++) dh[j] += gh[j];
      if (s.lengths && t >= s.lengths[b]) {
#pragma omp simd
        for (int64_t j = 0; j < H; j++) keep[j] = dh[j];
#pragma omp simd
        for (int64_t j = 0; j < GH; j++) p[j] = dz[j] = 0;
        continue;
      }
      const C *sp = s.stats_in + row * K, *sz = s.stats_rec + row * K;
      if (s.kind == 2) {
        const C* h = s.h + row * H;
#pragma omp simd
        for (int64_t j = 0; j < H; j++) {
          da[j] = relu ? (h[j] > C(0) ? dh[j] : C(0)) : dh[j] * (C(1) - h[j] * h[j]);
          doffset_rec[j] += da[j];
          keep[j] = 0;
        }
        if (s.norm) {
          norm_backward(da, z, H, s.gain_rec, sz, dgain_rec, dz);
        } else {
#pragma omp simd
          for (int64_t j = 0; j < H; j++) dz[j] = da[j];
        }
#pragma omp simd
        for (int64_t j = 0; j < H; j++) p[j] = dz[j];
        continue;
      }
      normalise(s, p, z, sp, sz, left, right);
      if (s.kind == 1) {
        const C* hp = h_before + b * H;
#pragma omp simd
        for (int64_t j = 0; j < H; j++) {
          const C r = sigmoid(left[j] + right[j]), u = sigmoid(left[H + j] + right[H + j]), q = right[2 * H + j];
          const C n = hyperbolic(left[2 * H + j] + r * q);
          const C dn = dh[j] * (C(1) - u) * (C(1) - n * n);
          keep[j] = dh[j] * u;
          da[j] = db[j] = dn * q * r * (C(1) - r);
          da[H + j] = db[H + j] = dh[j] * (hp[j] - n) * u * (C(1) - u);
          da[2 * H + j] = dn;
          db[2 * H + j] = dn * r;
        }
      } else {
        const C *cp = c_before + b * H, *raw = s.cell_norm == 2 ? s.raw + row * H : s.c + row * H;
        const C* sc = s.stats_cell + row * 2;
        const C mean = sc[0], rstd = sc[1];
#pragma omp simd
        for (int64_t j = 0; j < H; j++) {
          const C o = sigmoid(left[3 * H + j] + right[3 * H + j]);
          const C y = hyperbolic((raw[j] - mean) * rstd * gain_cell[j] + offset_cell[j]);
          da[3 * H + j] = dh[j] * y * o * (C(1) - o);
          dy[j] = dh[j] * o * (C(1) - y * y) + (feed_back ? dc[j] : C(0));
          keep[j] = 0;
        }
        if (s.cell_norm) {
#pragma omp simd
          for (int64_t j = 0; j < H; j++) doffset_cell[j] += dy[j];
          norm_backward(dy, raw, H, s.gain_cell, sc, dgain_cell, dy);
        }
#pragma omp simd
        for (int64_t j = 0; j < H; j++) {
          const C i = sigmoid(left[j] + right[j]), f = sigmoid(left[H + j] + right[H + j]);
          const C g = hyperbolic(left[2 * H + j] + right[2 * H + j]);
          const C d = feed_back ? dy[j] : dy[j] + dc[j];
          da[j] = d * g * i * (C(1) - i);
          da[H + j] = d * cp[j] * f * (C(1) - f);
          da[2 * H + j] = d * i * (C(1) - g * g);
          dc[j] = d * f;
        }
      }
      const C* dright = s.kind == 1 ? db : da;
#pragma omp simd
      for (int64_t j = 0; j < GH; j++) doffset_in[j] += da[j];
#pragma omp simd
      for (int64_t j = 0; j < GH; j++) doffset_rec[j] += dright[j];
      if (s.norm) {
        for (int64_t k = 0; k < s.segments; k++) {
          const int64_t from = s.bounds[k], n = s.bounds[k + 1] - from;
          norm_backward(da + from, p + from, n, s.gain_in + from, sp + 2 * k, dgain_in + from, p + from);
          norm_backward(dright + from, z + from, n, s.gain_rec + from, sz + 2 * k, dgain_rec + from, dz + from);
        }
      } else {
#pragma omp simd
        for (int64_t j = 0; j < GH; j++) p[j] = da[j], dz[j] = dright[j];
      }
    }
    C* dh = s.dh + first * H;
    multiply(s.dz + (t * B + first) * GH, last - first, GH, s.packed, H, dh);
#pragma omp simd
    for (int64_t j = 0; j < (last - first) * H; j++) dh[j] += direct[j];
  }
}
#undef VECTOR_BYTES
#undef VECTORS

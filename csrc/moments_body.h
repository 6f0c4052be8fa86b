// Sums of shifted, scaled powers: d = (x - shift) * scale; s1..s4 = sum d, d^2, d^3, d^4. Short runs are summed in the
// arithmetic type (several lanes each), runs are added in double, so that length costs no digits.

#include "rows.h"

static inline float magnitude(float x) { return __builtin_fabsf(x); }
static inline double magnitude(double x) { return __builtin_fabs(x); }

// one channel, n entries side by side; adds to sums[4], bad (nonfinite entries), zeros, largest
template <bool masked, class T>
static void run_of_one_channel(const T* p, int64_t n, arithmetic_t<T> shift, arithmetic_t<T> scale,
                               double* sums, double& bad, double& zeros, double& largest) {
  using A = arithmetic_t<T>;
  const A top = std::numeric_limits<A>::max();
  constexpr int64_t run = 1024;
  A buffer[run];
  for (int64_t start = 0; start < n; start += run) {
    const int64_t m = n - start < run ? n - start : run;
    const A* q = widen(p + start, buffer, m);
    A s1 = 0, s2 = 0, s3 = 0, s4 = 0, high = 0, f = 0, z = 0;
#pragma omp simd reduction(+ : s1, s2, s3, s4, f, z) reduction(max : high)
    for (int64_t i = 0; i < m; i++) {
      A x = q[i], a = magnitude(x);
      const bool finite = a <= top;
      f += finite ? A(0) : A(1);
      z += x == 0 ? A(1) : A(0);
      if (masked) {
        x = finite ? x : shift;
        a = finite ? a : A(0);
      }
      const A d = (x - shift) * scale, d2 = d * d;
      s1 += d;
      s2 += d2;
      s3 += d2 * d;
      s4 += d2 * d2;
      high = a > high ? a : high;
    }
    sums[0] += s1, sums[1] += s2, sums[2] += s3, sums[3] += s4;
    bad += f, zeros += z;
    if (high > largest) largest = high;
  }
}

// w <= W channels from c on, held side by side in vectors of W so that all sums stay in registers
template <bool masked, int W, class T>
static inline void tile_of_channels(const T* p, int64_t rows, int64_t C, int64_t c, int64_t w,
                                    const arithmetic_t<T>* shift, arithmetic_t<T> scale, double* sums,
                                    double* bad, double& zeros, double& largest) {
  using A = arithmetic_t<T>;
  typedef A V __attribute__((vector_size(W * sizeof(A))));
  A buffer[W] = {}, centre_[W] = {};
  for (int64_t j = 0; j < w; j++) centre_[j] = shift[c + j];
  V centre, s1 = {}, s2 = {}, s3 = {}, s4 = {}, f = {}, high = {}, z = {}, one = V{} + A(1), none = {};
  const V top = none + std::numeric_limits<A>::max(), step = none + scale;
  std::memcpy(&centre, centre_, sizeof(V));
  for (int64_t r = 0; r < rows; r++) {
    const T* from = p + r * C + c;
    V x;
    if (w == W) {
      std::memcpy(&x, widen(from, buffer, W), sizeof(V));
    } else {
      A room[W];
      const A* q = widen(from, room, w);
      for (int64_t j = 0; j < w; j++) buffer[j] = q[j];
      std::memcpy(&x, buffer, sizeof(V));
    }
    V a = x < none ? -x : x;
    f += a <= top ? none : one;
    z += x == none ? one : none;
    if (masked) {
      x = a <= top ? x : centre;
      a = a <= top ? a : none;
    }
    const V d = (x - centre) * step, d2 = d * d;
    s1 += d;
    s2 += d2;
    s3 += d2 * d;
    s4 += d2 * d2;
    high = a > high ? a : high;
  }
  for (int64_t j = 0; j < w; j++) {
    sums[c + j] += s1[j], sums[C + c + j] += s2[j], sums[2 * C + c + j] += s3[j], sums[3 * C + c + j] += s4[j];
    bad[c + j] += f[j], zeros += z[j];
    if (high[j] > largest) largest = high[j];
  }
}

// rows of all channels (channels side by side); sums is 4 arrays of C, bad one array of C
template <bool masked, class T>
static void rows_of_all_channels(const T* p, int64_t rows, int64_t C, const arithmetic_t<T>* shift,
                                 arithmetic_t<T> scale, double* sums, double* bad, double& zeros, double& largest) {
  constexpr int width = (HEADWAY_LEVEL == 2 ? 64 : HEADWAY_LEVEL == 1 ? 32 : 16) / sizeof(arithmetic_t<T>);
  constexpr int64_t block = 256;
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t m = rows - first < block ? rows - first : block;
    const T* from = p + first * C;
    for (int64_t c = 0; c < C; c += width) {
      if (C - c >= width)
        tile_of_channels<masked, width>(from, m, C, c, width, shift, scale, sums, bad, zeros, largest);
      else
        tile_of_channels<masked, width>(from, m, C, c, C - c, shift, scale, sums, bad, zeros, largest);
    }
  }
}

// one task's share: rows [begin, end) of the (N, C, S) tensor
template <bool masked, class T>
static void share(const T* x, int64_t begin, int64_t end, int64_t C, int64_t S, const arithmetic_t<T>* shift,
                  arithmetic_t<T> scale, double* sums, double* bad, double* zeros_largest) {
  if (S == 1) {
    rows_of_all_channels<masked>(x + begin * C, end - begin, C, shift, scale, sums, bad, zeros_largest[0], zeros_largest[1]);
    return;
  }
  for (int64_t n = begin; n < end; n++)
    for (int64_t c = 0; c < C; c++) {
      double local[4] = {};
      run_of_one_channel<masked>(x + (n * C + c) * S, S, shift[c], scale, local, bad[c], zeros_largest[0], zeros_largest[1]);
      for (int k = 0; k < 4; k++) sums[k * C + c] += local[k];
    }
}

// One sweep over rows of double: margins m = Z u, how wrong each row is, and the sum of rows weighed by it. Eight rows at a time: their
// dot products bring them from memory, adding them up finds them in the nearest caches.
#include "rows.h"

static constexpr int64_t kTogether = 8;

// dot products of `count` rows with u
template <int64_t count>
static inline void dots(const double* z, const double* u, int64_t d, double* m) {
  constexpr int64_t w = Lane<double>::width;
  lane_t<double> sums[count] = {};
  int64_t j = 0;
  for (; j + w <= d; j += w) {
    const lane_t<double> v = get(u + j);
    for (int64_t r = 0; r < count; r++) sums[r] += get(z + r * d + j) * v;
  }
  for (int64_t r = 0; r < count; r++) {
    double sum = across<double>(sums[r]);
    for (int64_t k = j; k < d; k++) sum += z[r * d + k] * u[k];
    m[r] = sum;
  }
}

// step += sum of rows times their shares
template <int64_t count>
static inline void add_rows(const double* z, const double* share, int64_t d, double* step) {
  constexpr int64_t w = Lane<double>::width;
  int64_t j = 0;
  for (; j + w <= d; j += w) {
    lane_t<double> sum = get(step + j);
    for (int64_t r = 0; r < count; r++) sum += get(z + r * d + j) * share[r];
    put(step + j, sum);
  }
  for (; j < d; j++)
    for (int64_t r = 0; r < count; r++) step[j] += z[r * d + j] * share[r];
}

template <int64_t count>
static inline void rows_together(const double* z, const double* u, int64_t d, double gamma, headway::Weigh way, double* m, double* step,
                                 double& total, double& top) {
  double share[count];
  dots<count>(z, u, d, m);
  if (way == headway::Weigh::sign) {
    for (int64_t r = 0; r < count; r++) share[r] = m[r] <= 0 ? 1.0 : 0.0;
  } else if (way == headway::Weigh::plain) {
    for (int64_t r = 0; r < count; r++) share[r] = 1 / (1 + std::exp(gamma * m[r]));
  } else {
    // log of the probability of being wrong; never overflows
    double high = top;
    for (int64_t r = 0; r < count; r++) {
      const double x = gamma * m[r];
      share[r] = x > 0 ? -x - std::log1p(std::exp(-x)) : -std::log1p(std::exp(x));
      high = share[r] > high ? share[r] : high;
    }
    if (high > top) {
      const double factor = std::exp(top - high);
      for (int64_t j = 0; j < d; j++) step[j] *= factor;
      total *= factor, top = high;
    }
    for (int64_t r = 0; r < count; r++) share[r] = std::exp(share[r] - top);
  }
  double any = 0;
  for (int64_t r = 0; r < count; r++) any += share[r];
  total += any;
  // rows that are all right leave the step alone, and their second reading out; a NaN does not
  if (any != 0) add_rows<count>(z, share, d, step);
}

static void sweep(const double* z, const double* u, int64_t rows, int64_t d, double gamma, headway::Weigh way, double* m, double* step,
                  double& total, double& top) {
  int64_t r = 0;
  for (; r + kTogether <= rows; r += kTogether) rows_together<kTogether>(z + r * d, u, d, gamma, way, m + r, step, total, top);
  for (; r < rows; r++) rows_together<1>(z + r * d, u, d, gamma, way, m + r, step, total, top);
}

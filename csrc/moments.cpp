// CPU body of headway::moments: every statistic of a tensor (N, C, S) from one reading of it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "numbers.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// instantiated for the plain instruction set before any other is switched on
template class std::vector<float>;
template class std::vector<double>;

#define HEADWAY_BODY "moments_body.h"
#include "isa.h"
#include "tensors.h"

namespace {
using headway::ScalarType;
using headway::Tensor;

constexpr int64_t kShare = 32768;  // entries below which a task is not worth starting
constexpr int64_t kTasks = 16;     // fixed, so that the sums do not depend on the number of threads

struct Sums {
  std::vector<double> powers, bad;  // (4, C) and (C)
  double zeros = 0, largest = 0;
};

template <class T>
double value(const T* x, int64_t i) {
  headway::arithmetic_t<T> room;
  return *isa_base::widen(x + i, &room, 1);
}

template <bool masked, class T>
Sums pass(const T* x, int64_t N, int64_t C, int64_t S, const std::vector<headway::arithmetic_t<T>>& shift, double scale) {
  using A = headway::arithmetic_t<T>;
  const int64_t tasks = std::max<int64_t>(1, std::min({kTasks, N, N * C * S / kShare}));
  std::vector<Sums> parts(tasks);
  auto work = [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++) {
      Sums& own = parts[t];
      own.powers.assign(4 * C, 0.0);
      own.bad.assign(C, 0.0);
      double zeros_largest[2] = {0, 0};
      const int64_t begin = t * N / tasks, end = (t + 1) * N / tasks;
      if (headway::isa() == headway::Isa::base)
        isa_base::share<masked>(x, begin, end, C, S, shift.data(), A(scale), own.powers.data(), own.bad.data(), zeros_largest);
#if defined(__x86_64__)
      else if (headway::isa() == headway::Isa::avx2)
        isa_avx2::share<masked>(x, begin, end, C, S, shift.data(), A(scale), own.powers.data(), own.bad.data(), zeros_largest);
      else
        isa_avx512::share<masked>(x, begin, end, C, S, shift.data(), A(scale), own.powers.data(), own.bad.data(), zeros_largest);
#endif
      own.zeros = zeros_largest[0], own.largest = zeros_largest[1];
    }
  };
  if (tasks == 1)
    work(0, 1);
  else
    torch::stable::parallel_for(0, tasks, 1, work);
  Sums total = std::move(parts[0]);
  for (int64_t t = 1; t < tasks; t++) {
    for (int64_t i = 0; i < 4 * C; i++) total.powers[i] += parts[t].powers[i];
    for (int64_t c = 0; c < C; c++) total.bad[c] += parts[t].bad[c];
    total.zeros += parts[t].zeros;
    total.largest = std::max(total.largest, parts[t].largest);
  }
  return total;
}

// power of two that brings `size` near 1
double scale_for(double size) { return size > 0 && std::isfinite(size) ? std::ldexp(1.0, -std::clamp(std::ilogb(size), -120, 120)) : 1.0; }

template <class T>
void run(const T* x, int64_t N, int64_t C, int64_t S, double* scalars, double* channels) {
  using A = headway::arithmetic_t<T>;
  std::vector<A> shift(C);
  double size = 0;
  for (int64_t c = 0; c < C; c++) {
    double sum = 0, count = 0;
    for (int64_t k = 0; k < 8; k++) {
      const double v = value(x, ((k * N / 8) * C + c) * S + (k * S / 8));
      if (!std::isfinite(v)) continue;
      sum += v / 8, count += 1;
      size = std::max(size, std::fabs(v));
    }
    shift[c] = count ? A(sum / count * 8) : A(0);
  }
  double scale = scale_for(size);
  Sums sums = pass<false>(x, N, C, S, shift, scale);
  double bad = 0;
  for (double b : sums.bad) bad += b;
  // the sample missed the real size (or there are nonfinite entries): once more, with what is known now
  const bool finite = std::all_of(sums.powers.begin(), sums.powers.end(), [](double s) { return std::isfinite(s); });
  if (bad > 0) sums = pass<true>(x, N, C, S, shift, scale);
  const double ratio = sums.largest * scale;
  if ((!finite && bad == 0) || ratio > 1e6 || (sums.largest > 0 && ratio < 1e-6)) {
    scale = scale_for(sums.largest);
    sums = bad > 0 ? pass<true>(x, N, C, S, shift, scale) : pass<false>(x, N, C, S, shift, scale);
  }
  double n = 0, mean = 0, m2 = 0, m3 = 0, m4 = 0;
  for (int64_t c = 0; c < C; c++) {
    const double k = double(N) * S - sums.bad[c];
    double *count = channels, *means = channels + C, *spread = channels + 2 * C;
    count[c] = k, means[c] = 0, spread[c] = 0;
    if (k == 0) continue;
    const double s1 = sums.powers[c], s2 = sums.powers[C + c], s3 = sums.powers[2 * C + c], s4 = sums.powers[3 * C + c], u = s1 / k;
    const double c2 = std::max(0.0, s2 - s1 * u);
    const double c3 = s3 - 3 * u * s2 + 2 * k * u * u * u;
    const double c4 = std::max(0.0, s4 - 4 * u * s3 + 6 * u * u * s2 - 3 * k * u * u * u * u);
    const double centre = double(shift[c]) + u / scale;
    means[c] = centre;
    spread[c] = c2 / scale / scale;
    // all channels together, still in the scaled unit (Pebay 2008)
    const double a = n, b = k, t = n + k, d = centre * scale - mean;
    m4 += c4 + d * d * d * d * a * b * (a * a - a * b + b * b) / (t * t * t) + 6 * d * d * (a * a * c2 + b * b * m2) / (t * t) +
          4 * d * (a * c3 - b * m3) / t;
    m3 += c3 + d * d * d * a * b * (a - b) / (t * t) + 3 * d * (a * c2 - b * m2) / t;
    m2 += c2 + d * d * a * b / t;
    mean += d * b / t;
    n = t;
  }
  const double back = 1 / scale;
  const double out[8] = {n, mean * back, m2 * back * back, m3 * back * back * back, m4 * back * back * back * back,
                         sums.largest, sums.zeros, double(N) * C * S - n};
  std::copy(out, out + 8, scalars);
}

std::tuple<Tensor, Tensor> moments(const Tensor& given) {
  const Tensor x = headway::packed(given);
  const int64_t N = x.size(0), C = x.size(1), S = x.size(2);
  Tensor scalars = torch::stable::new_zeros(x, {8}, ScalarType::Double);
  Tensor channels = torch::stable::new_zeros(x, {3, C}, ScalarType::Double);
  if (x.numel() == 0) return {scalars, channels};
  double *a = static_cast<double*>(scalars.data_ptr()), *b = static_cast<double*>(channels.data_ptr());
  headway::dispatch(x, [&](auto zero) { run(headway::data<const decltype(zero)>(x), N, C, S, a, b); });
  return {scalars, channels};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m) { m.impl("moments", TORCH_BOX(&moments)); }

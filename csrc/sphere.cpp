// CPU bodies of headway::to_sphere_ and headway::adam_to_sphere_: whole lists of weights back to their norms in one call, the
// latter while Adam writes them.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "numbers.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headway {
// what a step of Adam moves numbers with: p -= step m / (sqrt(v) back + eps)
struct Adam {
  double beta1, beta2, eps, back, step, sign;
};
}  // namespace headway

// instantiated for the plain instruction set before any other is switched on
template class std::vector<double>;

#define HEADWAY_BODY "sphere_body.h"
#include "isa.h"
#include "tensors.h"

using namespace headway;

namespace {
constexpr int64_t kChunk = 65536;  // numbers of one tensor that a thread takes at a time; fixed, so that threads change no sum
using Tensors = std::vector<Tensor>;

double number_at(const Tensor& t, int64_t i) {
  return t.scalar_type() == ScalarType::Double ? data<double>(t)[i] : double(data<float>(t)[i]);
}

// what brings a norm back to rho; 1 where it has none, is not finite (counted), or is nearer than `near`
double factor_of(double sum, double rho, double near, std::atomic<int64_t>& missed) {
  const double norm = std::sqrt(sum);
  if (!std::isfinite(norm)) return missed++, 1.0;
  const double factor = norm > 0 ? rho / std::max(norm, 1e-12) : 1.0;
  return std::fabs(factor - 1) <= near ? 1.0 : factor;
}

// the numbers of one tensor on their way: read for their norm, or moved by Adam and read in the same breath, then scaled
template <class T>
struct Run {
  T* x;
  const T* g = nullptr;
  T *m = nullptr, *v = nullptr;
  Adam adam{};

  double squares(int64_t from, int64_t n) const {
    if constexpr (std::is_same_v<T, arithmetic_t<T>>) {
      if (g) return HEADWAY_CALL(moved_squares<T>, x + from, g + from, m + from, v + from, n, adam);
    }
    return HEADWAY_CALL(squares<T>, x + from, n);
  }
  void scale(int64_t from, int64_t n, double factor) const { HEADWAY_CALL(scale<T>, x + from, n, factor); }
};

// one tensor as a whole
template <class T>
void whole(const Run<T>& run, int64_t n, const Tensor& rho, double near, std::atomic<int64_t>& missed) {
  const int64_t chunks = std::max<int64_t>(1, (n + kChunk - 1) / kChunk);
  auto size = [&](int64_t c) { return std::min(kChunk, n - c * kChunk); };
  double sum = 0;
  if (chunks == 1) {
    sum = run.squares(0, n);
  } else {
    std::vector<double> parts(chunks);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) {
      for (int64_t c = from; c < to; c++) parts[c] = run.squares(c * kChunk, size(c));
    });
    for (double part : parts) sum += part;
  }
  const double factor = factor_of(sum, number_at(rho, 0), near, missed);
  if (factor == 1 || arithmetic_t<T>(factor) == 1) return;
  if (chunks == 1) return run.scale(0, n, factor);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) {
    // backwards: what was read last is still in the caches
    for (int64_t c = to - 1; c >= from; c--) run.scale(c * kChunk, size(c), factor);
  });
}

// every row by itself
template <class T>
void by_row(const Run<T>& run, int64_t rows, int64_t n, const Tensor& rho, double near, std::atomic<int64_t>& missed) {
  auto some = [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; r++) {
      const double factor = factor_of(run.squares(r * n, n), number_at(rho, r), near, missed);
      if (factor != 1) run.scale(r * n, n, factor);
    }
  };
  if (rows * n <= kChunk) return some(0, rows);
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kChunk / n), some);
}

template <class T>
void back_to_sphere(const Run<T>& run, const Tensor& p, const Tensor& rho, double near, bool rows, std::atomic<int64_t>& missed) {
  const int64_t count = rows ? p.size(0) : 1;
  rows ? by_row(run, count, count ? p.numel() / count : 0, rho, near, missed) : whole(run, p.numel(), rho, near, missed);
}

// run(i) for every tensor: large ones one after another, their chunks shared among the threads, small ones as wholes
template <class F>
void for_all(const Tensors& params, F&& run) {
  std::vector<int64_t> small;
  int64_t total = 0;
  // the last first: an optimiser that has just been through the list has left those in the caches
  for (int64_t i = int64_t(params.size()) - 1; i >= 0; i--) {
    const int64_t n = params[i].numel();
    if (n > kChunk)
      run(i);
    else
      small.push_back(i), total += n;
  }
  const int64_t each = std::max<int64_t>(1, total / std::max<int64_t>(1, small.size()));
  auto some = [&](int64_t from, int64_t to) {
    for (int64_t k = from; k < to; k++) run(small[k]);
  };
  if (total < 2 * kGrain) some(0, small.size());
  else torch::stable::parallel_for(0, small.size(), std::max<int64_t>(1, kGrain / each), some);
}

void to_sphere_(Tensors params, Tensors rho, Tensor missed, double near, bool rows) {
  std::atomic<int64_t> count{0};
  for_all(params, [&](int64_t i) {
    dispatch(params[i], [&](auto zero) {
      using T = decltype(zero);
      back_to_sphere(Run<T>{data<T>(params[i])}, params[i], rho[i], near, rows, count);
    });
  });
  *data<int64_t>(missed) += count;
}

void adam_to_sphere_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps, Tensors rho, Tensor missed,
                     double lr, double beta1, double beta2, double eps, bool maximize, bool rows) {
  std::atomic<int64_t> count{0};
  for_all(params, [&](int64_t i) {
    const double k = *data<float>(steps[i]) += 1;
    const Adam adam{beta1, beta2, eps, 1 / std::sqrt(1 - std::pow(beta2, k)), lr / (1 - std::pow(beta1, k)), maximize ? -1.0 : 1.0};
    dispatch(params[i], [&](auto zero) {
      using T = decltype(zero);
      if constexpr (std::is_same_v<T, arithmetic_t<T>>) {
        const Run<T> run{data<T>(params[i]), data<T>(grads[i]), data<T>(exp_avgs[i]), data<T>(exp_avg_sqs[i]), adam};
        back_to_sphere(run, params[i], rho[i], 0, rows, count);
      } else {
        throw std::runtime_error("the step takes float32 or float64 parameters");
      }
    });
  });
  *data<int64_t>(missed) += count;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m) {
  m.impl("to_sphere_", TORCH_BOX(&to_sphere_));
  m.impl("adam_to_sphere_", TORCH_BOX(&adam_to_sphere_));
}

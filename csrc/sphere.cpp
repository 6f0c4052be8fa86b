// CPU body of headway::to_sphere_: whole lists of weights back to their norms in one call.
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

// one tensor as a whole
template <class T>
void whole(const Tensor& p, const Tensor& rho, double near, std::atomic<int64_t>& missed) {
  T* x = data<T>(p);
  const int64_t n = p.numel(), chunks = std::max<int64_t>(1, (n + kChunk - 1) / kChunk);
  auto size = [&](int64_t c) { return std::min(kChunk, n - c * kChunk); };
  double sum = 0;
  if (chunks == 1) {
    sum = HEADWAY_CALL(squares<T>, x, n);
  } else {
    std::vector<double> parts(chunks);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) {
      for (int64_t c = from; c < to; c++) parts[c] = HEADWAY_CALL(squares<T>, x + c * kChunk, size(c));
    });
    for (double part : parts) sum += part;
  }
  const double factor = factor_of(sum, number_at(rho, 0), near, missed);
  if (factor == 1 || arithmetic_t<T>(factor) == 1) return;
  if (chunks == 1) return HEADWAY_CALL(scale<T>, x, n, factor);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) {
    // backwards: what was read last is still in the caches
    for (int64_t c = to - 1; c >= from; c--) HEADWAY_CALL(scale<T>, x + c * kChunk, size(c), factor);
  });
}

// every row by itself
template <class T>
void by_row(const Tensor& p, const Tensor& rho, double near, std::atomic<int64_t>& missed) {
  T* x = data<T>(p);
  const int64_t rows = p.size(0), n = rows ? p.numel() / rows : 0;
  auto some = [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; r++) {
      const double factor = factor_of(HEADWAY_CALL(squares<T>, x + r * n, n), number_at(rho, r), near, missed);
      if (factor != 1) HEADWAY_CALL(scale<T>, x + r * n, n, factor);
    }
  };
  if (p.numel() <= kChunk) return some(0, rows);
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kChunk / n), some);
}

void to_sphere_(Tensors params, Tensors rho, Tensor missed, double near, bool rows) {
  std::atomic<int64_t> count{0};
  std::vector<int64_t> small;
  auto run = [&](int64_t i) {
    dispatch(params[i], [&](auto zero) {
      rows ? by_row<decltype(zero)>(params[i], rho[i], near, count) : whole<decltype(zero)>(params[i], rho[i], near, count);
    });
  };
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
  *data<int64_t>(missed) += count;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m) { m.impl("to_sphere_", TORCH_BOX(&to_sphere_)); }

// CPU bodies of headway::compand and its backward: one pass over the weights each.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <vector>

#include "numbers.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// instantiated for the plain instruction set before any other is switched on
template class std::vector<double>;

#define HEADWAY_BODY "compander_body.h"
#include "isa.h"
#include "tensors.h"

using namespace headway;

namespace {
const double* doubles(const Tensor& t) {
  if (t.scalar_type() != ScalarType::Double || !t.is_contiguous()) throw std::runtime_error("a and b must be contiguous float64");
  return data<double>(t);
}

Tensor compand(const Tensor& given, const Tensor& a, const Tensor& b) {
  const Tensor v = packed(given);
  Tensor w = like(v);
  const int64_t total = v.numel(), n = total / std::max<int64_t>(1, a.numel());
  const double *as = doubles(a), *bs = doubles(b);
  dispatch(v, [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, total, kGrain, [&](int64_t first, int64_t last) {
      HEADWAY_CALL(compand<T>, data<T>(v), data<T>(w), first, last, n, as, bs);
    });
  });
  return w;
}

std::tuple<Tensor, Tensor> compand_backward(const Tensor& gradient, const Tensor& given, const Tensor& a, const Tensor& b, bool want) {
  const Tensor g = packed(gradient), v = packed(given);
  Tensor gv = like(v);
  const int64_t total = v.numel(), rows = a.numel(), n = total / std::max<int64_t>(1, rows);
  const double *as = doubles(a), *bs = doubles(b);
  const int64_t many = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), total / kGrain));
  std::vector<double> sums(2 * rows * many);
  dispatch(v, [&](auto zero) {
    using T = decltype(zero);
    for_parts(many, [&](int64_t p) {
      HEADWAY_CALL(compand_backward<T>, data<T>(g), data<T>(v), data<T>(gv), p * total / many, (p + 1) * total / many, n, as, bs,
                   sums.data() + 2 * rows * p, want);
    });
  });
  Tensor ab = matrix(2, rows, ScalarType::Double);
  double* to = data<double>(ab);
  for (int64_t row = 0; row < rows; row++) {
    double first = 0, second = 0;
    for (int64_t p = 0; p < many; p++) first += sums[2 * (p * rows + row)], second += sums[2 * (p * rows + row) + 1];
    to[row] = first;
    to[rows + row] = -as[row] / bs[row] * second;
  }
  return {gv, ab};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m) {
  m.impl("compand", TORCH_BOX(&compand));
  m.impl("compand_backward", TORCH_BOX(&compand_backward));
}

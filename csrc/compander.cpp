// CPU bodies of headway::compand and its backward: one pass over the weights each.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

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

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {
constexpr int64_t kGrain = 16384;  // entries below which a task is not worth starting

Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

template <class F>
void dispatch(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(headway::BFloat16{});
    case ScalarType::Half: return f(headway::Half{});
    default: throw std::runtime_error("compand takes float32, float64, bfloat16 or float16");
  }
}

const double* doubles(const Tensor& t) {
  if (t.scalar_type() != ScalarType::Double || !t.is_contiguous()) throw std::runtime_error("a and b must be contiguous float64");
  return static_cast<const double*>(t.data_ptr());
}

Tensor compand(const Tensor& given, const Tensor& a, const Tensor& b) {
  const Tensor v = packed(given);
  Tensor w = torch::stable::empty_like(v);
  const int64_t total = v.numel(), n = total / std::max<int64_t>(1, a.numel());
  const double *as = doubles(a), *bs = doubles(b);
  dispatch(v, [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, total, kGrain, [&](int64_t first, int64_t last) {
      HEADWAY_CALL(compand<T>, static_cast<const T*>(v.data_ptr()), static_cast<T*>(w.data_ptr()), first, last, n, as, bs);
    });
  });
  return w;
}

std::tuple<Tensor, Tensor> compand_backward(const Tensor& gradient, const Tensor& given, const Tensor& a, const Tensor& b, bool want) {
  const Tensor g = packed(gradient), v = packed(given);
  Tensor gv = torch::stable::empty_like(v);
  const int64_t total = v.numel(), rows = a.numel(), n = total / std::max<int64_t>(1, rows);
  const double *as = doubles(a), *bs = doubles(b);
  const int64_t many = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), total / kGrain));
  std::vector<double> sums(2 * rows * many);
  dispatch(v, [&](auto zero) {
    using T = decltype(zero);
    auto part = [&](int64_t p) {
      HEADWAY_CALL(compand_backward<T>, static_cast<const T*>(g.data_ptr()), static_cast<const T*>(v.data_ptr()),
                   static_cast<T*>(gv.data_ptr()), p * total / many, (p + 1) * total / many, n, as, bs,
                   sums.data() + 2 * rows * p, want);
    };
    if (many == 1) return part(0);
    torch::stable::parallel_for(0, many, 1, [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; p++) part(p);
    });
  });
  AtenTensorHandle handle;
  const int64_t sizes[2] = {2, rows}, strides[2] = {rows, 1};
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, static_cast<int32_t>(ScalarType::Double), 0, 0, &handle));
  Tensor ab(handle);
  double* to = static_cast<double*>(ab.data_ptr());
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

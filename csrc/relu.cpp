// CPU bodies of headway::relu_bits, relu_bits_ and keep_bits: a ReLU that leaves one bit an entry behind for its backward.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <type_traits>

#include "numbers.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define HEADWAY_BODY "relu_body.h"
#include "isa.h"
#include "tensors.h"

using namespace headway;

namespace {
constexpr int64_t kBytes = kGrain / 8;  // of bits, eight entries each, below which a task is not worth starting

Tensor relu_into(const Tensor& x, const Tensor& y) {
  const int64_t n = x.numel(), bytes = (n + 7) / 8;
  Tensor bits = allocate(&bytes, 1, ScalarType::Byte);
  uint8_t* to = data<uint8_t>(bits);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, bytes, kBytes, [&](int64_t first, int64_t last) {
      HEADWAY_CALL(relu<T>, data<T>(x), data<T>(y), to, first, last, n);
    });
  });
  return bits;
}

std::tuple<Tensor, Tensor> relu_bits(const Tensor& given) {
  const Tensor x = packed(given);
  Tensor y = torch::stable::empty_like(x);
  return {y, relu_into(x, y)};
}

Tensor relu_bits_(const Tensor& x) {
  if (!x.is_contiguous()) throw std::runtime_error("relu_bits_ takes a contiguous tensor");
  return relu_into(x, x);
}

Tensor keep_bits(const Tensor& given, const Tensor& bits) {
  const Tensor gy = packed(given);
  const int64_t n = gy.numel(), bytes = (n + 7) / 8;
  Tensor gx = torch::stable::empty_like(gy);
  dispatch(gy, [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, bytes, kBytes, [&](int64_t first, int64_t last) {
      HEADWAY_CALL(pass<T>, data<T>(gy), data<T>(gx), data<uint8_t>(bits), first, last, n, 1.0);
    });
  });
  return gx;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m) {
  m.impl("relu_bits", TORCH_BOX(&relu_bits));
  m.impl("relu_bits_", TORCH_BOX(&relu_bits_));
  m.impl("keep_bits", TORCH_BOX(&keep_bits));
}

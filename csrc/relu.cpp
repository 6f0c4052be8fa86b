// CPU bodies of headway::relu_bits, relu_bits_ and keep_bits: a ReLU that leaves one bit an entry behind for its backward.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

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

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {
constexpr int64_t kGrain = 2048;  // bytes of bits (eight entries each) below which a task is not worth starting

Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

template <class F>
void dispatch(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(headway::BFloat16{});
    case ScalarType::Half: return f(headway::Half{});
    default: throw std::runtime_error("relu_bits takes float32, float64, bfloat16 or float16");
  }
}

Tensor relu_into(const Tensor& x, const Tensor& y) {
  const int64_t n = x.numel(), bytes = (n + 7) / 8, one = 1;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &bytes, &one, static_cast<int32_t>(ScalarType::Byte), 0, 0, &handle));
  Tensor bits(handle);
  uint8_t* to = static_cast<uint8_t*>(bits.data_ptr());
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, bytes, kGrain, [&](int64_t first, int64_t last) {
      HEADWAY_CALL(relu<T>, static_cast<const T*>(x.data_ptr()), static_cast<T*>(y.data_ptr()), to, first, last, n);
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
    torch::stable::parallel_for(0, bytes, kGrain, [&](int64_t first, int64_t last) {
      HEADWAY_CALL(pass<T>, static_cast<const T*>(gy.data_ptr()), static_cast<T*>(gx.data_ptr()),
                   static_cast<const uint8_t*>(bits.data_ptr()), first, last, n, 1.0);
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

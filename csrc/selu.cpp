// CPU bodies of headway::alpha_dropout and its backward.
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

#include "numbers.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define HEADWAY_BODY "selu_body.h"
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
    default: throw std::runtime_error("alpha dropout takes float32, float64, bfloat16 or float16");
  }
}

std::tuple<Tensor, Tensor> alpha_dropout(const Tensor& given, int64_t seed, double p, double gain, double shift, double low) {
  const Tensor x = packed(given);
  const int64_t n = x.numel(), bytes = (n + 7) / 8;
  Tensor y = torch::stable::empty_like(x);
  AtenTensorHandle handle;
  const int64_t one = 1;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &bytes, &one, static_cast<int32_t>(ScalarType::Byte), 0, 0, &handle));
  Tensor bits(handle);
  uint8_t* to = static_cast<uint8_t*>(bits.data_ptr());
  const uint64_t below = static_cast<uint64_t>(std::nearbyint(p * 4294967296.0));
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, bytes, kGrain, [&](int64_t first, int64_t last) {
      HEADWAY_CALL(drop<T>, static_cast<const T*>(x.data_ptr()), static_cast<T*>(y.data_ptr()), to, first, last, n,
                   static_cast<uint64_t>(seed), below, gain, shift, gain * low + shift);
    });
  });
  return {y, bits};
}

Tensor alpha_dropout_backward(const Tensor& given, const Tensor& bits, double gain) {
  const Tensor gy = packed(given);
  const int64_t n = gy.numel(), bytes = (n + 7) / 8;
  Tensor gx = torch::stable::empty_like(gy);
  dispatch(gy, [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, bytes, kGrain, [&](int64_t first, int64_t last) {
      HEADWAY_CALL(pass<T>, static_cast<const T*>(gy.data_ptr()), static_cast<T*>(gx.data_ptr()),
                   static_cast<const uint8_t*>(bits.data_ptr()), first, last, n, gain);
    });
  });
  return gx;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m) {
  m.impl("alpha_dropout", TORCH_BOX(&alpha_dropout));
  m.impl("alpha_dropout_backward", TORCH_BOX(&alpha_dropout_backward));
}

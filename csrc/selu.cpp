// CPU bodies of headway::alpha_dropout and its backward.
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
#include "tensors.h"

using namespace headway;

namespace {
constexpr int64_t kBytes = kGrain / 8;  // of bits, eight entries each, below which a task is not worth starting

std::tuple<Tensor, Tensor> alpha_dropout(const Tensor& given, int64_t seed, double p, double gain, double shift, double low) {
  const Tensor x = packed(given);
  const int64_t n = x.numel(), bytes = (n + 7) / 8;
  Tensor y = torch::stable::empty_like(x);
  Tensor bits = allocate(&bytes, 1, ScalarType::Byte);
  uint8_t* to = data<uint8_t>(bits);
  const uint64_t below = static_cast<uint64_t>(std::nearbyint(p * 4294967296.0));
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, bytes, kBytes, [&](int64_t first, int64_t last) {
      HEADWAY_CALL(drop<T>, data<T>(x), data<T>(y), to, first, last, n, static_cast<uint64_t>(seed), below, gain, shift,
                   gain * low + shift);
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
    torch::stable::parallel_for(0, bytes, kBytes, [&](int64_t first, int64_t last) {
      HEADWAY_CALL(pass<T>, data<T>(gy), data<T>(gx), data<uint8_t>(bits), first, last, n, gain);
    });
  });
  return gx;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m) {
  m.impl("alpha_dropout", TORCH_BOX(&alpha_dropout));
  m.impl("alpha_dropout_backward", TORCH_BOX(&alpha_dropout_backward));
}

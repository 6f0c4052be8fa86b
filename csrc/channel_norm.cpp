// CPU bodies of headway::channel_norm and channel_norm_backward: layer or RMS norm over the channels of (samples, channels, space).
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#include "numbers.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// instantiated for the plain instruction set before any other is switched on
template class std::vector<float>;
template class std::vector<double>;

#define HEADWAY_BODY "channel_norm_body.h"
#include "isa.h"
#include "tensors.h"

namespace {
using headway::Maybe;
using headway::Tensor;
using headway::data;
using headway::like;
using headway::packed;

constexpr int64_t kTile = 256;

std::tuple<Tensor, Tensor> channel_norm(const Tensor& given, const Maybe& weight, const Maybe& bias, double eps, bool rms, bool keep) {
  const Tensor x = packed(given);
  const int64_t samples = x.size(0), channels = x.size(1), space = x.size(2), tiles = (space + kTile - 1) / kTile;
  Tensor y = like(x), stats = headway::matrix(keep ? samples * space : 0, 2, headway::wide_type(x));
  if (x.numel() == 0) return {y, stats};
  headway::dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using C = headway::arithmetic_t<T>;
    std::vector<C> wroom, broom;
    const C *w = headway::parameter<C>(weight, wroom), *b = headway::parameter<C>(bias, broom);
    C* kept = stats.numel() ? data<C>(stats) : nullptr;
    const int64_t total = samples * tiles, parts = headway::parts_of(total, x.numel());
    headway::for_parts(parts, [&](int64_t p) {
      for (int64_t t = p * total / parts; t < (p + 1) * total / parts; t++) {
        const int64_t from = (t % tiles) * kTile;
        HEADWAY_CALL(channel_rows<T>, data<T>(x), w, b, data<T>(y), kept, t / tiles, from, std::min(space, from + kTile), channels,
                     space, eps, rms);
      }
    });
  });
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor> channel_norm_backward(const Tensor& grad, const Tensor& given, const Tensor& stats, const Maybe& weight,
                                                         bool rms, bool want_weight, bool want_bias) {
  const Tensor gy = packed(grad), x = packed(given);
  const int64_t samples = x.size(0), channels = x.size(1), space = x.size(2), tiles = (space + kTile - 1) / kTile;
  Tensor gx = like(x), gw = headway::zeros(want_weight ? channels : 0, headway::wide_type(x)),
         gb = headway::zeros(want_bias ? channels : 0, headway::wide_type(x));
  if (x.numel() == 0) return {gx, gw, gb};
  headway::dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using C = headway::arithmetic_t<T>;
    std::vector<C> wroom;
    const C* w = headway::parameter<C>(weight, wroom);
    const int64_t total = samples * tiles, parts = headway::parts_of(total, x.numel());
    std::vector<C> partial(2 * parts * channels);
    headway::for_parts(parts, [&](int64_t p) {
      C* pw = partial.data() + 2 * p * channels;
      for (int64_t t = p * total / parts; t < (p + 1) * total / parts; t++) {
        const int64_t from = (t % tiles) * kTile;
        HEADWAY_CALL(channel_backward_rows<T>, data<T>(gy), data<T>(x), w, data<C>(stats), data<T>(gx), want_weight ? pw : nullptr,
                     want_bias ? pw + channels : nullptr, t / tiles, from, std::min(space, from + kTile), channels, space, rms);
      }
    });
    for (int64_t k = 0; k < 2; k++) {
      if (!(k ? want_bias : want_weight)) continue;
      C* to = data<C>(k ? gb : gw);
      for (int64_t p = 0; p < parts; p++)
        for (int64_t i = 0; i < channels; i++) to[i] += partial[(2 * p + k) * channels + i];
    }
  });
  return {gx, gw, gb};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m) {
  m.impl("channel_norm", TORCH_BOX(&channel_norm));
  m.impl("channel_norm_backward", TORCH_BOX(&channel_norm_backward));
}

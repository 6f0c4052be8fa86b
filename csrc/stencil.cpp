// CPU bodies of headway::stencil and its backward: a 3x3 or 7x7 convolution with one output channel, stride 1 and zeros around the image.
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

#define HEADWAY_BODY "stencil_body.h"
#include "isa.h"
#include "tensors.h"

namespace {
using headway::Maybe;
using headway::ScalarType;
using headway::Tensor;
using headway::data;
using headway::like;
using headway::packed;

// a plane in room that a window may go over: `around` zeros on every side, rows a multiple of two lanes wide
template <class C>
struct Room {
  int64_t height, width, around, wide, step;
  std::vector<C> numbers;
  Room(int64_t height_, int64_t width_, int64_t around_)
      : height(height_), width(width_), around(around_), wide((width + kTwoLanes - 1) / kTwoLanes * kTwoLanes), step(wide + 2 * around),
        numbers((height + 2 * around) * step) {}
  static constexpr int64_t kTwoLanes = 128 / sizeof(C);
  C* row(int64_t h) { return numbers.data() + (h + around) * step + around; }
  template <class T>
  void take(const T* plane) {
    for (int64_t h = 0; h < height; h++) HEADWAY_CALL(load_row, plane + h * width, row(h), width);
  }
  template <class T>
  void give(T* plane) {
    for (int64_t h = 0; h < height; h++) HEADWAY_CALL(store_row, row(h), plane + h * width, width);
  }
};

template <class F>
void by_size(int64_t k, F&& f) {
  if (k == 3) return f(std::integral_constant<int, 3>{});
  if (k == 7) return f(std::integral_constant<int, 7>{});
  throw std::runtime_error("the window is 3x3 or 7x7");
}

struct Shape {
  int64_t samples, channels, height, width, k;
  Shape(const Tensor& x, const Tensor& weight)
      : samples(x.size(0)), channels(x.size(1)), height(x.size(2)), width(x.size(3)), k(weight.size(3)) {
    if (weight.size(0) != 1 || weight.size(1) != channels || weight.size(2) != k)
      throw std::runtime_error("the window must be square, with one output channel and the input's channels");
  }
  int64_t plane() const { return height * width; }
  int64_t parts() const { return headway::parts_of(samples, samples * channels * plane() * k); }
};

Tensor stencil(const Tensor& x_, const Tensor& weight, const Maybe& bias) {
  const Tensor x = packed(x_);
  const Shape s(x, weight);
  const int64_t sizes[4] = {s.samples, 1, s.height, s.width};
  Tensor y = headway::allocate(sizes, 4, x.scalar_type());
  if (y.numel() == 0) return y;
  headway::dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using C = headway::arithmetic_t<T>;
    std::vector<C> wroom, broom;
    const C *w = headway::parameter<C>(weight, wroom), *b = headway::parameter<C>(bias, broom);
    const int64_t parts = s.parts();
    by_size(s.k, [&](auto k) {
      headway::for_parts(parts, [&](int64_t p) {
        Room<C> from(s.height, s.width, s.k / 2), to(s.height, s.width, 0);
        for (int64_t n = p * s.samples / parts; n < (p + 1) * s.samples / parts; n++) {
          std::fill(to.numbers.begin(), to.numbers.end(), b ? b[0] : C(0));
          for (int64_t i = 0; i < s.channels; i++) {
            from.take(data<T>(x) + (n * s.channels + i) * s.plane());
            HEADWAY_CALL(stencil_plane, k, from.numbers.data(), from.step, s.height, to.wide, w + i * s.k * s.k, to.numbers.data());
          }
          to.give(data<T>(y) + n * s.plane());
        }
      });
    });
  });
  return y;
}

// gradients of the input, the window and the offset (empty where there is none)
std::tuple<Tensor, Tensor, Tensor> stencil_backward(const Tensor& gradient, const Tensor& x_, const Tensor& weight, bool has_bias) {
  const Tensor gy = packed(gradient), x = packed(x_);
  const Shape s(x, weight);
  const ScalarType wide = headway::wide_type(x);
  const int64_t taps = s.k * s.k, all = s.channels * taps;
  Tensor gx = like(x), gw = headway::zeros(all, wide), gb = headway::zeros(has_bias, wide);
  if (gy.numel() == 0) return {gx, gw, gb};
  headway::dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using C = headway::arithmetic_t<T>;
    std::vector<C> wroom;
    const C* w = headway::parameter<C>(weight, wroom);
    std::vector<C> turned(all);  // what went through a tap comes back through the opposite one
    for (int64_t i = 0; i < s.channels; i++)
      for (int64_t t = 0; t < taps; t++) turned[i * taps + t] = w[i * taps + taps - 1 - t];
    const int64_t parts = s.parts();
    std::vector<double> sums(parts * (all + 1));
    by_size(s.k, [&](auto k) {
      headway::for_parts(parts, [&](int64_t p) {
        Room<C> from(s.height, s.width, s.k / 2), around(s.height, s.width, s.k / 2), plain(s.height, s.width, 0), to(s.height, s.width, 0);
        double* own = sums.data() + p * (all + 1);
        for (int64_t n = p * s.samples / parts; n < (p + 1) * s.samples / parts; n++) {
          const T* g = data<T>(gy) + n * s.plane();
          around.take(g), plain.take(g);
          for (int64_t h = 0; h < s.height; h++) {
            const C* row = plain.row(h);
            C sum = 0;
            for (int64_t j = 0; j < s.width; j++) sum += row[j];
            own[all] += sum;
          }
          for (int64_t i = 0; i < s.channels; i++) {
            const int64_t at = (n * s.channels + i) * s.plane();
            from.take(data<T>(x) + at);
            HEADWAY_CALL(stencil_sums, k, plain.numbers.data(), from.numbers.data(), from.step, s.height, plain.wide, own + i * taps);
            std::fill(to.numbers.begin(), to.numbers.end(), C(0));
            HEADWAY_CALL(stencil_plane, k, around.numbers.data(), around.step, s.height, to.wide, turned.data() + i * taps,
                         to.numbers.data());
            to.give(data<T>(gx) + at);
          }
        }
      });
    });
    for (int64_t t = 0; t <= all; t++) {
      double sum = 0;
      for (int64_t p = 0; p < parts; p++) sum += sums[p * (all + 1) + t];
      if (t < all) data<C>(gw)[t] = C(sum);
      else if (has_bias) data<C>(gb)[0] = C(sum);
    }
  });
  return {gx, gw, gb};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m) {
  m.impl("stencil", TORCH_BOX(&stencil));
  m.impl("stencil_backward", TORCH_BOX(&stencil_backward));
}

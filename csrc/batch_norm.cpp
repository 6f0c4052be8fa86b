// CPU bodies of headway::batch_norm and its backward: batch norm of a training pass, with the ReLU behind it where there is one.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "numbers.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// instantiated for the plain instruction set before any other is switched on
template class std::vector<float>;
template class std::vector<double>;

#define HEADWAY_BODY "batch_norm_body.h"
#include "isa.h"
#include "tensors.h"

using namespace headway;

namespace {
// (samples, channels, space), and the channel's map y = gain * (x - mean) + shift
struct Channels {
  int64_t samples, channels, space;
  std::vector<double> room_weight, room_bias;
  const double *weight, *bias;
  double eps;
  Channels(const Tensor& x, const Maybe& weight_, const Maybe& bias_, double eps_)
      : samples(x.size(0)), channels(x.size(1)), space(x.size(2)), weight(parameter<double>(weight_, room_weight)),
        bias(parameter<double>(bias_, room_bias)), eps(eps_) {}
  double rstd(double var) const { return 1 / std::sqrt(var + eps); }
  double gain(int64_t c, double var) const { return (weight ? weight[c] : 1) * rstd(var); }
  double shift(int64_t c) const { return bias ? bias[c] : 0; }
  template <class F>
  void each(F&& work) const {
    const int64_t parts = parts_of(channels, samples * channels * space);
    for_parts(parts, [&](int64_t p) {
      for (int64_t c = p * channels / parts; c < (p + 1) * channels / parts; c++) work(c);
    });
  }
};

void move(const Maybe& running, const double* now, int64_t n, double rate, double factor) {
  if (!running || !running->defined()) return;
  if (!running->is_contiguous()) throw std::runtime_error("the statistics of a norm must be contiguous");
  const auto towards = [&](auto* to) {
    for (int64_t c = 0; c < n; c++) to[c] += std::remove_pointer_t<decltype(to)>(rate * (now[c] * factor - double(to[c])));
  };
  if (running->scalar_type() == ScalarType::Double) towards(data<double>(*running));
  else if (running->scalar_type() == ScalarType::Float) towards(data<float>(*running));
  else throw std::runtime_error("the statistics of a norm must be float32 or float64");
}

std::tuple<Tensor, Tensor> batch_norm(const Tensor& given, const Maybe& weight, const Maybe& bias, const Maybe& running_mean,
                                      const Maybe& running_var, double rate, double eps, bool rectified) {
  const Tensor x = packed(given);
  const Channels s(x, weight, bias, eps);
  Tensor y = like(x), statistics = matrix(2, s.channels, ScalarType::Double);
  double *mean = data<double>(statistics), *var = mean + s.channels;
  if (x.numel() == 0) throw std::runtime_error("an empty batch has no statistics");
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    s.each([&](int64_t c) {
      HEADWAY_CALL(channel_moments<T>, data<T>(x), s.samples, s.channels, s.space, c, mean + c, var + c);
      HEADWAY_CALL(channel_scale<T>, data<T>(x), data<T>(y), s.samples, s.channels, s.space, c, mean[c], s.gain(c, var[c]), s.shift(c),
                   rectified);
    });
  });
  const double count = double(s.samples) * s.space;
  move(running_mean, mean, s.channels, rate, 1);
  move(running_var, var, s.channels, rate, count / std::max(1.0, count - 1));
  return {y, statistics};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& gradient, const Tensor& given, const Tensor& statistics,
                                                       const Maybe& weight, const Maybe& bias, double eps, bool rectified) {
  const Tensor gy = packed(gradient), x = packed(given);
  const Channels s(x, weight, bias, eps);
  Tensor gx = like(x), gw = vector(s.channels, wide_type(x)), gb = vector(s.channels, wide_type(x));
  const double *mean = data<double>(statistics), *var = mean + s.channels;
  const double count = double(s.samples) * s.space;
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using C = arithmetic_t<T>;
    s.each([&](int64_t c) {
      const double rstd = s.rstd(var[c]), gain = s.gain(c, var[c]), shift = s.shift(c);
      double sum = 0, product = 0;
      HEADWAY_CALL(channel_products<T>, data<T>(gy), data<T>(x), s.samples, s.channels, s.space, c, mean[c], gain, shift, rectified, &sum,
                   &product);
      HEADWAY_CALL(channel_gradient<T>, data<T>(gy), data<T>(x), data<T>(gx), s.samples, s.channels, s.space, c, mean[c], gain, shift,
                   rectified, sum / count, product * rstd * rstd / count);
      data<C>(gw)[c] = C(product * rstd), data<C>(gb)[c] = C(sum);
    });
  });
  return {gx, gw, gb};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
}

// CPU bodies of the norms with channel statistics: headway::unified_norm, power_norm, their backwards, and what they are made of.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <vector>

#include "memory.h"
#include "numbers.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// instantiated for the plain instruction set before any other is switched on
template class std::vector<float>;
template class std::vector<double>;

namespace headway {
// the settings and the outcome of one training pass of UnifiedNorm
struct UnifiedStep {
  int64_t t, warmup, compensation;
  bool filtration;
  double eps, momentum;
  bool usable, fired, skip;
};
}  // namespace headway

#define HEADWAY_BODY "channels_body.h"
#include "isa.h"

using headway::Maybe;
using headway::ScalarType;
using headway::Tensor;
using headway::data;
using headway::like;
using headway::packed;
using headway::vector;
using headway::wide_type;
using Doubles = std::vector<double>;

namespace {
constexpr int64_t kGrain = 16384;  // entries below which a task is not worth starting

template <class F>
auto dispatch(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(headway::BFloat16{});
    case ScalarType::Half: return f(headway::Half{});
    default: throw std::runtime_error("channel statistics take float32, float64, bfloat16 or float16");
  }
}
// a vector of any floating type, in double; `missing` where there is none
Doubles numbers(const Maybe& given, int64_t n, double missing) {
  Doubles out(n, missing);
  if (!given || !given->defined()) return out;
  const Tensor t = packed(*given);
  dispatch(t, [&](auto zero) {
    using T = decltype(zero);
    std::vector<headway::arithmetic_t<T>> room(n);
    const auto* from = HEADWAY_CALL(widen, data<T>(t), room.data(), n);
    std::copy(from, from + n, out.begin());
  });
  return out;
}

// what the statistics hold (float32 or float64), and back again
Doubles read(const Tensor& t) {
  if (!t.is_contiguous()) throw std::runtime_error("the statistics of a norm must be contiguous");
  return numbers(t, t.numel(), 0);
}
void write(const Doubles& from, const Tensor& t) {
  if (t.scalar_type() == ScalarType::Double) std::copy(from.begin(), from.end(), data<double>(t));
  else if (t.scalar_type() == ScalarType::Float) std::copy(from.begin(), from.end(), data<float>(t));
  else throw std::runtime_error("the statistics of a norm must be float32 or float64");
}
template <class A>
std::vector<A> as(const Doubles& from) {
  return std::vector<A>(from.begin(), from.end());
}

// (rows, n) of a tensor whose last axis holds the channels, and the padding mask over the rows
struct Shape {
  int64_t n, rows, groups, groups_room;
  Tensor mask;
  const uint8_t* pad = nullptr;
  Shape(const Tensor& x, const Maybe& pad_mask, int64_t groups_) : groups(groups_) {
    n = x.size(x.dim() - 1);
    rows = n ? x.numel() / n : 0;
    groups_room = rows * groups;
    if (groups && n % groups) throw std::runtime_error("groups must divide the channels");
    if (pad_mask && pad_mask->defined()) {
      mask = packed(*pad_mask);
      if (mask.numel() != rows || mask.scalar_type() != ScalarType::Bool)
        throw std::runtime_error("the padding mask must be bool with one entry a row");
      pad = data<uint8_t>(mask);
    }
  }
  int64_t parts() const {
    return std::max<int64_t>(1, std::min<int64_t>({int64_t(torch::stable::get_num_threads()), rows, rows * n / kGrain}));
  }
  template <class F>
  void split(F&& work) const {
    const int64_t many = parts();
    if (many == 1) return work(0, 0, rows);
    torch::stable::parallel_for(0, many, 1, [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; p++) work(p, p * rows / many, (p + 1) * rows / many);
    });
  }
};

// sums of the columns that `columns` adds up part by part; the number of rows that counted stands behind them
template <class F>
Doubles add_up(const Shape& shape, int64_t width, F&& columns) {
  const int64_t many = shape.parts();
  std::vector<Doubles> parts(many, Doubles(width + 1));
  shape.split([&](int64_t p, int64_t first, int64_t last) { parts[p][width] = columns(parts[p].data(), first, last); });
  for (int64_t p = 1; p < many; p++)
    for (int64_t i = 0; i <= width; i++) parts[0][i] += parts[p][i];
  return std::move(parts[0]);
}

template <class T>
Doubles squares(const Tensor& x, const Shape& s, double eps, headway::arithmetic_t<T>* rstd) {
  return add_up(s, s.n, [&](double* sums, int64_t first, int64_t last) {
    std::vector<headway::arithmetic_t<T>> room((isa_base::kSquareRows + 2) * s.n);
    return HEADWAY_CALL(column_squares<T>, data<T>(x), s.pad, first, last, s.n, s.groups, eps, rstd, sums, room.data());
  });
}
// five rows of n sums (see column_products), the number of real tokens, the number of padded ones
template <class T>
Doubles products(const Tensor& gy, const Tensor& x, const Shape& s, headway::arithmetic_t<T>* rstd) {
  Doubles sums = add_up(s, 5 * s.n, [&](double* sums, int64_t first, int64_t last) {
    std::vector<headway::arithmetic_t<T>> room((4 * isa_base::kProductRows + 6) * s.n);
    return HEADWAY_CALL(column_products<T>, data<T>(gy), data<T>(x), s.pad, first, last, s.n, s.groups, rstd, sums, room.data());
  });
  sums.push_back(double(s.rows) - sums.back());
  return sums;
}
template <class T>
void scale(const Tensor& x, const Tensor& y, const Shape& s, double eps, headway::arithmetic_t<T>* rstd, bool known,
           const Doubles& gain, const Doubles& shift) {
  using A = headway::arithmetic_t<T>;
  const std::vector<A> a = as<A>(gain), b = as<A>(shift);
  s.split([&](int64_t, int64_t first, int64_t last) {
    std::vector<A> room(s.n), own(s.groups);
    // where nobody keeps the means of the groups, one row's worth of them is written over and over
    HEADWAY_CALL(scale_rows<T>, data<T>(x), data<T>(y), s.pad, first, last, s.n, s.groups, eps, rstd ? rstd : own.data(),
                 rstd ? s.groups : 0, known, a.data(), b.data(), room.data());
  });
}
template <class T>
void gradient(const Tensor& gy, const Tensor& x, const Tensor& gx, const Shape& s, bool pull_padding,
              headway::arithmetic_t<T>* rstd, const Doubles& gain, const Doubles& pull) {
  using A = headway::arithmetic_t<T>;
  const std::vector<A> a = as<A>(gain), b = as<A>(pull);
  s.split([&](int64_t, int64_t first, int64_t last) {
    std::vector<A> room(3 * s.n);
    HEADWAY_CALL(gradient_rows<T>, data<T>(gy), data<T>(x), data<T>(gx), pull_padding ? nullptr : s.pad, first, last, s.n, s.groups,
                 rstd, a.data(), b.data(), room.data());
  });
}

Tensor doubles(const Doubles& from) {
  Tensor t = vector(from.size(), ScalarType::Double);
  std::copy(from.begin(), from.end(), data<double>(t));
  return t;
}

// weight * q^(-1/2) and the like, entry by entry
template <class... V>
Doubles times(const Doubles& a, const V&... more) {
  Doubles out = a;
  for (size_t i = 0; i < out.size(); i++) ((out[i] *= more[i]), ...);
  return out;
}
Doubles inverse_root(const Doubles& square, double eps) {
  Doubles out(square.size());
  HEADWAY_CALL(inverse_root, square.data(), eps, int64_t(square.size()), out.data());
  return out;
}
// vectors and flags one behind the other, in the arithmetic type of x
Tensor keep(const Tensor& x, std::initializer_list<const Doubles*> vectors, std::initializer_list<double> flags) {
  const int64_t n = (*vectors.begin())->size(), width = int64_t(vectors.size()) * n + int64_t(flags.size());
  Tensor kept = vector(width, wide_type(x));
  Doubles all;
  all.reserve(width);
  for (const Doubles* v : vectors) all.insert(all.end(), v->begin(), v->end());
  all.insert(all.end(), flags);
  write(all, kept);
  return kept;
}

template <class A>
A* group_room(const Tensor& rstd) {
  return rstd.numel() ? data<A>(rstd) : nullptr;
}

Tensor column_squares(const Tensor& given, const Maybe& pad_mask, int64_t groups, double eps) {
  const Tensor x = packed(given);
  const Shape s(x, pad_mask, groups);
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    std::vector<headway::arithmetic_t<T>> rstd(s.groups_room);
    return doubles(squares<T>(x, s, eps, s.groups ? rstd.data() : nullptr));
  });
}

Tensor column_products(const Tensor& gradient, const Tensor& given, const Maybe& pad_mask, const Tensor& rstd, int64_t groups) {
  const Tensor gy = packed(gradient), x = packed(given);
  const Shape s(x, pad_mask, groups);
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    return doubles(products<T>(gy, x, s, group_room<headway::arithmetic_t<T>>(rstd)));
  });
}

Tensor channel_scale(const Tensor& given, const Tensor& square, const Maybe& weight, const Maybe& bias, int64_t groups, double eps) {
  const Tensor x = packed(given);
  const Shape s(x, std::nullopt, groups);
  Tensor y = like(x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    scale<T>(x, y, s, eps, nullptr, false, times(numbers(weight, s.n, 1), inverse_root(numbers(square, s.n, 1), eps)),
             numbers(bias, s.n, 0));
  });
  return y;
}

std::tuple<Tensor, Tensor> unified_norm(const Tensor& given, const Maybe& weight, const Maybe& bias, const Maybe& pad_mask,
                                        const Maybe& sums, const Tensor& running_var, const Tensor& window, const Tensor& iters,
                                        const Tensor& skip_counter, int64_t backward_window, int64_t warmup, int64_t compensation,
                                        bool filtration, double eps, double momentum, bool moves) {
  const Tensor x = packed(given);
  const Shape s(x, pad_mask, 0);
  const int64_t n = s.n, rows = window.size(0);
  Tensor y = like(x);
  Tensor kept = dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    Doubles q = sums && sums->defined() ? read(*sums) : squares<T>(x, s, eps, nullptr);
    Doubles running = read(running_var), slots = read(window), psi(n), r(n), room((rows + 1) * n);
    const double count = q[n];
    for (int64_t c = 0; c < n; c++) q[c] = count > 0 ? q[c] / count : running[c];
    int64_t& t = *data<int64_t>(iters);
    headway::UnifiedStep step{t + 1, warmup, compensation, filtration, eps, momentum, false, false, true};
    step.usable = count > 0 && HEADWAY_CALL(all_finite, q.data(), n);
    HEADWAY_CALL(unified_step, step, q.data(), running.data(), slots.data(), rows, n, psi.data(), r.data(), room.data());
    const bool live = step.usable && moves;
    if (live) {
      write(running, running_var);
      write(slots, window);
      t++;
      *data<int64_t>(skip_counter) += step.fired;
    }
    const Doubles inverse = inverse_root(psi, eps);
    scale<T>(x, y, s, eps, nullptr, false, times(numbers(weight, n, 1), inverse), numbers(bias, n, 0));
    // the gradient's own test: its window may have another size than the forward one
    const bool own = step.t <= backward_window || step.t < warmup || step.skip;
    return keep(x, {&inverse, &r}, {double(step.t % backward_window), double(step.skip), double(own), double(live)});
  });
  return {y, kept};
}

std::tuple<Tensor, Tensor, Tensor> unified_norm_backward(const Tensor& gradient_y, const Tensor& given, const Tensor& kept,
                                                         const Maybe& weight, const Maybe& pad_mask, const Maybe& own,
                                                         const Maybe& whole, const Tensor& window, const Tensor& ema_gz,
                                                         double momentum, bool count_padding) {
  const Tensor gy = packed(gradient_y), x = packed(given);
  const Shape s(x, pad_mask, 0);
  const int64_t n = s.n, rows = window.size(0);
  Tensor gx = like(x), gw = vector(n, wide_type(x)), gb = vector(n, wide_type(x));
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const Doubles here = own && own->defined() ? read(*own) : products<T>(gy, x, s, nullptr);
    const Doubles all = whole && whole->defined() ? read(*whole) : here;
    const Doubles saved = read(kept), w = numbers(weight, n, 1);
    Doubles nu = read(ema_gz), slots = read(window);
    const double *inverse = saved.data(), *r = inverse + n, *flags = r + n;
    const bool skip = flags[1] != 0, own_statistic = flags[2] != 0;
    const double count = all[5 * n] + (count_padding ? all[5 * n + 1] : 0);
    double* slot = slots.data() + int64_t(flags[0]) * n;
    Doubles now(n), mean(n), gain(n), pull(n), weight_gradient(n), bias_gradient(n);
    for (int64_t c = 0; c < n; c++) {
      const double sum = all[c] + (count_padding ? all[2 * n + c] : 0);
      now[c] = count > 0 ? w[c] * r[c] * inverse[c] * sum / count : 0;
      slot[c] = skip ? nu[c] : now[c];
    }
    const bool moves = flags[3] != 0 && count > 0 && HEADWAY_CALL(all_finite, now.data(), n);
    if (own_statistic) {
      mean = now;
    } else {
      for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < n; c++) mean[c] += slots[i * n + c] / double(rows);
    }
    for (int64_t c = 0; c < n; c++) {
      nu[c] = momentum * nu[c] + (1 - momentum) * mean[c];
      gain[c] = w[c] * r[c] * inverse[c];
      pull[c] = (skip ? mean[c] : nu[c]) * inverse[c] * inverse[c];
      weight_gradient[c] = r[c] * inverse[c] * (here[c] + here[2 * n + c]);
      bias_gradient[c] = here[n + c] + here[3 * n + c];
    }
    if (moves) write(nu, ema_gz), write(slots, window);
    write(weight_gradient, gw), write(bias_gradient, gb);
    gradient<T>(gy, x, gx, s, count_padding, nullptr, gain, pull);
  });
  return {gx, gw, gb};
}

std::tuple<Tensor, Tensor, Tensor> power_norm(const Tensor& given, const Maybe& weight, const Maybe& bias, const Maybe& pad_mask,
                                              const Maybe& sums, const Tensor& running_phi, const Tensor& iters, int64_t groups,
                                              int64_t warmup, double alpha, double eps, bool batch_forward, bool batch_gradient,
                                              bool moves) {
  const Tensor x = packed(given);
  const Shape s(x, pad_mask, groups);
  const int64_t n = s.n;
  Tensor y = like(x), rstd = vector(s.groups_room, wide_type(x));
  Tensor kept = dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    auto* room = group_room<headway::arithmetic_t<T>>(rstd);
    const bool given_sums = sums && sums->defined();
    Doubles q = given_sums ? read(*sums) : squares<T>(x, s, eps, room), phi = read(running_phi);
    const double count = q[n];
    q.pop_back();
    if (!(count > 0)) q = phi;
    else
      for (double& each : q) each /= count;
    int64_t& counted = *data<int64_t>(iters);
    const double t = double(counted + 1);
    const bool live = count > 0 && HEADWAY_CALL(all_finite, q.data(), n) && moves;
    const Doubles square = batch_forward || t <= double(warmup) ? q : phi;
    if (live) {
      for (int64_t c = 0; c < n; c++) {
        if (t < double(warmup)) phi[c] = phi[c] * (t - 1) / t + q[c] / t;
        phi[c] = alpha * phi[c] + (1 - alpha) * q[c];
      }
      write(phi, running_phi);
      counted++;
    }
    const Doubles inverse = inverse_root(square, eps), back = batch_gradient ? inverse_root(q, eps) : inverse;
    scale<T>(x, y, s, eps, room, !given_sums, times(numbers(weight, n, 1), inverse), numbers(bias, n, 0));
    return keep(x, {&inverse, &back, &q}, {double(live)});
  });
  return {y, kept, rstd};
}

std::tuple<Tensor, Tensor, Tensor> power_norm_backward(const Tensor& gradient_y, const Tensor& given, const Tensor& kept,
                                                       const Tensor& rstd, const Maybe& weight, const Maybe& pad_mask, const Maybe& own,
                                                       const Maybe& whole, const Tensor& ema_gz, int64_t groups, double alpha,
                                                       bool count_padding, bool clamp_gamma, bool exact) {
  const Tensor gy = packed(gradient_y), x = packed(given);
  const Shape s(x, pad_mask, groups);
  const int64_t n = s.n;
  Tensor gx = like(x), gw = vector(n, wide_type(x)), gb = vector(n, wide_type(x));
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    auto* room = group_room<headway::arithmetic_t<T>>(rstd);
    const Doubles here = own && own->defined() ? read(*own) : products<T>(gy, x, s, room);
    const Doubles all = whole && whole->defined() ? read(*whole) : here;
    const Doubles saved = read(kept), w = numbers(weight, n, 1);
    Doubles ema = read(ema_gz);
    const double *inverse = saved.data(), *back = inverse + n, *q = back + n;
    const double real = all[5 * n], count = real + (count_padding ? all[5 * n + 1] : 0);
    Doubles moved(n), gain(n), pull(n), weight_gradient(n), bias_gradient(n);
    for (int64_t c = 0; c < n; c++) {
      gain[c] = w[c] * back[c];
      if (exact) {  // the derivative through q = mean of u^2 over the real tokens
        pull[c] = real > 0 ? w[c] * (all[c] + all[2 * n + c]) / real * inverse[c] * inverse[c] * inverse[c] : 0;
      } else {
        const double nu = (1 - alpha) * ema[c];
        const double products = count > 0 ? (all[c] + (count_padding ? all[2 * n + c] : 0)) / count : 0;
        const double square = count > 0 ? (q[c] * real + (count_padding ? all[4 * n + c] : 0)) / count * inverse[c] * inverse[c] : 0;
        moved[c] = ema[c] + w[c] * inverse[c] * products - nu * square;
        // where the factor exceeds 1, only 1 / factor of what it would take from ema is taken
        if (clamp_gamma) moved[c] += std::max(0.0, (1 - alpha) * square - 1) * ema[c];
        pull[c] = nu * inverse[c] * back[c];
      }
      weight_gradient[c] = inverse[c] * (here[c] + here[2 * n + c]);
      bias_gradient[c] = here[n + c] + here[3 * n + c];
    }
    if (!exact && saved[3 * n] != 0 && count > 0 && HEADWAY_CALL(all_finite, moved.data(), n)) write(moved, ema_gz);
    write(weight_gradient, gw), write(bias_gradient, gb);
    gradient<T>(gy, x, gx, s, count_padding && !exact, room, gain, pull);
  });
  return {gx, gw, gb};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m) {
  m.impl("column_squares", TORCH_BOX(&column_squares));
  m.impl("column_products", TORCH_BOX(&column_products));
  m.impl("channel_scale", TORCH_BOX(&channel_scale));
  m.impl("unified_norm", TORCH_BOX(&unified_norm));
  m.impl("unified_norm_backward", TORCH_BOX(&unified_norm_backward));
  m.impl("power_norm", TORCH_BOX(&power_norm));
  m.impl("power_norm_backward", TORCH_BOX(&power_norm_backward));
}

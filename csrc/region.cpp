// CPU bodies of headway::region_norm, channel_pool and their backwards: norms of (samples, channels, *space) inside and outside a hole.
#include <array>
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

#define HEADWAY_BODY "region_body.h"
#include "isa.h"
#include "tensors.h"

namespace {
using headway::Maybe;
using headway::ScalarType;
using headway::Tensor;
using headway::data;
using headway::like;
using headway::packed;
using Pair = std::array<double, 2>;  // (hole, valid)

template <class C>
std::array<C, 2> narrow(const Pair& p) {
  return {C(p[0]), C(p[1])};
}
bool given(const Maybe& t) { return t && t->defined(); }

// one group of numbers shares its statistics: a plane, or a channel of the whole batch
struct Shape {
  int64_t samples, channels, space, groups;
  bool batch;
  Shape(const Tensor& x, bool batch_)
      : samples(x.size(0)), channels(x.size(1)), space(1), groups(batch_ ? channels : samples * channels), batch(batch_) {
    for (int64_t d = 2; d < x.dim(); d++) space *= x.size(d);
  }
  int64_t numbers() const { return samples * channels * space; }
  int64_t at(int64_t n, int64_t c) const { return (n * channels + c) * space; }
  int64_t channel(int64_t g) const { return batch ? g : g % channels; }
  int64_t first(int64_t g) const { return batch ? 0 : g / channels; }
  int64_t last(int64_t g) const { return batch ? samples : g / channels + 1; }
  int64_t parts() const { return headway::parts_of(groups, numbers()); }
  template <class F>
  void split(int64_t parts, F&& work) const {
    headway::for_parts(parts, [&](int64_t p) { work(p * groups / parts, (p + 1) * groups / parts, p); });
  }
};

// the marks as numbers, and how many pixels of each sample lie inside and outside
template <class C>
struct Holes {
  std::vector<C> marks;
  std::vector<double> count;
  Holes(const Tensor& mask, const Shape& s) : marks(s.samples * s.space), count(2 * s.samples) {
    if (mask.scalar_type() != ScalarType::Bool || mask.numel() != s.samples * s.space)
      throw std::runtime_error("the mask must be bool with one entry a pixel");
    const Tensor dense = packed(mask);
    const uint8_t* from = data<uint8_t>(dense);
    for (int64_t n = 0; n < s.samples; n++) {
      int64_t inside = 0;
      for (int64_t i = n * s.space; i < (n + 1) * s.space; i++) marks[i] = C(from[i]), inside += from[i];
      count[2 * n] = double(inside), count[2 * n + 1] = double(s.space - inside);
    }
  }
  const C* of(int64_t n, const Shape& s) const { return marks.data() + n * s.space; }
};

// gains and offsets, one a channel and region; a weight counts from `unit`
template <class C>
struct Affine {
  std::vector<C> rooms[4];
  const C* weight[2];
  const C* bias[2];
  bool shared;
  Affine(const Maybe& hole_weight, const Maybe& hole_bias, const Maybe& valid_weight, const Maybe& valid_bias, double unit, bool shared_)
      : weight{headway::parameter<C>(hole_weight, rooms[0], unit), headway::parameter<C>(valid_weight, rooms[1], unit)},
        bias{headway::parameter<C>(hole_bias, rooms[2]), headway::parameter<C>(valid_bias, rooms[3])}, shared(shared_) {}
  double gain(int r, int64_t c) const { return weight[r] ? double(weight[r][c]) : 1; }
  double own(int r, int64_t c) const { return bias[r] ? double(bias[r][c]) : 0; }
  double offset(int r, int64_t c) const { return shared ? own(0, c) + own(1, c) : own(r, c); }
};

// statistics hold (mean, rstd, 1 / pixels) of (hole, valid) of every group
struct Statistics {
  double* from;
  int64_t groups;
  double& at(int what, int r, int64_t g) const { return from[(2 * what + r) * groups + g]; }
};
Tensor room_for_statistics(int64_t groups) {
  const int64_t sizes[3] = {3, 2, groups};
  return headway::allocate(sizes, 3, ScalarType::Double);
}

std::tuple<Tensor, Tensor> region_norm(const Tensor& x_, const Tensor& mask, const Maybe& hole_weight, const Maybe& hole_bias,
                                       const Maybe& valid_weight, const Maybe& valid_bias, const Maybe& pixel_weight,
                                       const Maybe& pixel_bias, const Maybe& known, bool batch, double unit, bool shared, double eps,
                                       bool released) {
  const Tensor x = packed(x_);
  const Shape s(x, batch);
  Tensor y = like(x), kept = given(known) ? torch::stable::clone(packed(*known)) : room_for_statistics(s.groups);
  const Statistics to{data<double>(kept), s.groups};
  headway::dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using C = headway::arithmetic_t<T>;
    const Holes<C> holes(mask, s);
    const Affine<C> affine(hole_weight, hole_bias, valid_weight, valid_bias, unit, shared);
    std::vector<C> gain_room, shift_room;
    const C *pixel_gain = headway::parameter<C>(pixel_weight, gain_room, unit), *pixel_shift = headway::parameter<C>(pixel_bias, shift_room);
    s.split(s.parts(), [&](int64_t from, int64_t end, int64_t) {
      for (int64_t g = from; g < end; g++) {
        const int64_t c = s.channel(g);
        Pair pixels{}, mean{}, around{};
        for (int64_t n = s.first(g); n < s.last(g) && !given(known); n++) {
          double m[2], squares[2];
          HEADWAY_CALL(region_moments<T>, data<T>(x) + s.at(n, c), holes.of(n, s), s.space, holes.count.data() + 2 * n, m, squares);
          for (int r = 0; r < 2; r++) {
            const double own = holes.count[2 * n + r], all = pixels[r] + own, apart = m[r] - mean[r];
            if (own == 0) continue;
            mean[r] += apart * own / all;  // Chan's merge
            around[r] += squares[r] + apart * apart * pixels[r] * own / all;
            pixels[r] = all;
          }
        }
        const double whole = std::max(1.0, double(s.last(g) - s.first(g)) * double(s.space));
        Pair gain, shift;
        for (int r = 0; r < 2; r++) {
          if (!given(known)) {
            const double count = std::max(1.0, pixels[r]);
            to.at(0, r, g) = mean[r];
            to.at(1, r, g) = 1 / std::sqrt(around[r] / count + eps * (released ? whole / count : 1));
            to.at(2, r, g) = 1 / count;
          }
          mean[r] = to.at(0, r, g);
          gain[r] = to.at(1, r, g) * affine.gain(r, c);
          shift[r] = affine.offset(r, c) + gain[r] * (double(C(mean[r])) - mean[r]);
        }
        const auto centre = narrow<C>(mean), by = narrow<C>(gain), add = narrow<C>(shift);
        for (int64_t n = s.first(g); n < s.last(g); n++) {
          const int64_t row = n * s.space;
          HEADWAY_CALL(region_scale<T>, data<T>(x) + s.at(n, c), data<T>(y) + s.at(n, c), holes.of(n, s), s.space, centre.data(),
                       by.data(), add.data(), pixel_gain ? pixel_gain + row : nullptr, pixel_shift ? pixel_shift + row : nullptr);
        }
      }
    });
  });
  return {y, kept};
}

// whether a gradient is zero on a whole region of a group
template <class T, class C>
bool silent(const T* gy, const Shape& s, const Holes<C>& holes, int64_t g, int r) {
  for (int64_t n = s.first(g); n < s.last(g); n++) {
    const T* from = gy + s.at(n, s.channel(g));
    for (int64_t i = 0; i < s.space; i++)
      if ((holes.of(n, s)[i] != 0) == (r == 0) && HEADWAY_CALL(number, from[i]) != 0) return false;
  }
  return true;
}
template <class T, class C>
void clear(T* gx, const Shape& s, const Holes<C>& holes, int64_t g, int r) {
  for (int64_t n = s.first(g); n < s.last(g); n++)
    for (int64_t i = 0; i < s.space; i++)
      if ((holes.of(n, s)[i] != 0) == (r == 0)) gx[s.at(n, s.channel(g)) + i] = T{};
}

// gradients of x, of the four vectors and of the pixels' gain and offset, the latter six empty where there is no such thing; `whole`
// holds the sums of h and of h times the normalised value, (2, 2, channels), over all processes where this one sees its part
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> region_norm_backward(
    const Tensor& gradient, const Tensor& x_, const Tensor& mask, const Tensor& kept, const Maybe& hole_weight, const Maybe& hole_bias,
    const Maybe& valid_weight, const Maybe& valid_bias, const Maybe& pixel_weight, const Maybe& pixel_bias, const Maybe& whole, bool batch,
    double unit, bool shared) {
  const Tensor gy = packed(gradient), x = packed(x_);
  const Shape s(x, batch);
  const ScalarType wide = headway::wide_type(x);
  Tensor gx = like(x);
  const Maybe* vectors[4] = {&hole_weight, &valid_weight, &hole_bias, &valid_bias};
  Tensor found[4];
  for (int k = 0; k < 4; k++) found[k] = headway::zeros(given(*vectors[k]) ? s.channels : 0, wide);
  Tensor grad_gain = headway::zeros(given(pixel_weight) ? s.samples * s.space : 0, wide),
         grad_shift = headway::zeros(given(pixel_bias) ? s.samples * s.space : 0, wide);
  const Statistics of{data<double>(kept), s.groups};
  headway::dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using C = headway::arithmetic_t<T>;
    const Holes<C> holes(mask, s);
    const Affine<C> affine(hole_weight, hole_bias, valid_weight, valid_bias, unit, shared);
    std::vector<C> gain_room;
    const C* pixel_gain = headway::parameter<C>(pixel_weight, gain_room, unit);
    const int64_t parts = s.parts(), pixels = s.samples * s.space;
    // sums of a part: what every channel's vectors get, and what the pixels get where several parts add to the same
    std::vector<double> partial(4 * parts * s.channels);
    std::vector<C> shared_pixels(parts > 1 ? parts * (grad_gain.numel() + grad_shift.numel()) : 0);
    s.split(parts, [&](int64_t from, int64_t end, int64_t p) {
      C *to_gain = grad_gain.numel() ? data<C>(grad_gain) : nullptr, *to_shift = grad_shift.numel() ? data<C>(grad_shift) : nullptr;
      if (parts > 1) {
        if (to_gain) to_gain = shared_pixels.data() + p * pixels;
        if (to_shift) to_shift = shared_pixels.data() + parts * grad_gain.numel() + p * pixels;
      }
      double* own = partial.data() + 4 * p * s.channels;
      for (int64_t g = from; g < end; g++) {
        const int64_t c = s.channel(g);
        const Pair mean{of.at(0, 0, g), of.at(0, 1, g)}, rstd{of.at(1, 0, g), of.at(1, 1, g)};
        const auto centre = narrow<C>(mean), scale = narrow<C>(rstd);
        double sums[4] = {};
        for (int64_t n = s.first(g); n < s.last(g); n++) {
          const int64_t row = n * s.space;
          HEADWAY_CALL(region_products<T>, data<T>(gy) + s.at(n, c), data<T>(x) + s.at(n, c), holes.of(n, s), s.space, centre.data(),
                       scale.data(), pixel_gain ? pixel_gain + row : nullptr, to_gain ? to_gain + row : nullptr,
                       to_shift ? to_shift + row : nullptr, sums);
        }
        bool dead[2] = {};
        Pair along, pull, shift;
        for (int r = 0; r < 2; r++) {
          const double rest = mean[r] - double(centre[r]);
          double one = sums[r], two = rstd[r] * (sums[2 + r] - rest * sums[r]);
          // a region without finite statistics gives no gradient where it is given none
          if (!std::isfinite(mean[r]) || !std::isfinite(rstd[r])) {
            dead[r] = silent(data<T>(gy), s, holes, g, r);
            if (dead[r]) one = two = 0;
          }
          own[4 * c + r] += two, own[4 * c + 2 + r] += one;
          const double gain = affine.gain(r, c), share = of.at(2, r, g);
          one *= gain, two *= gain;
          if (given(whole)) {
            const double* all = data<double>(*whole);
            one = all[r * s.channels + c], two = all[(2 + r) * s.channels + c];
          }
          along[r] = rstd[r] * gain, pull[r] = -rstd[r] * rstd[r] * two * share;
          shift[r] = -rstd[r] * one * share - pull[r] * rest;
        }
        const auto a = narrow<C>(along), b = narrow<C>(pull), d = narrow<C>(shift);
        for (int64_t n = s.first(g); n < s.last(g); n++)
          HEADWAY_CALL(region_gradient<T>, data<T>(gy) + s.at(n, c), data<T>(x) + s.at(n, c), data<T>(gx) + s.at(n, c), holes.of(n, s),
                       s.space, centre.data(), a.data(), b.data(), d.data(), pixel_gain ? pixel_gain + n * s.space : nullptr);
        for (int r = 0; r < 2; r++)
          if (dead[r]) clear(data<T>(gx), s, holes, g, r);
      }
    });
    for (int64_t c = 0; c < s.channels; c++) {
      double sum[4] = {};
      for (int64_t p = 0; p < parts; p++)
        for (int k = 0; k < 4; k++) sum[k] += partial[4 * (p * s.channels + c) + k];
      if (shared) sum[2] = sum[3] = sum[2] + sum[3];
      for (int k = 0; k < 4; k++)
        if (found[k].numel()) data<C>(found[k])[c] = C(sum[k]);
    }
    for (int64_t p = 0; p < parts && parts > 1; p++) {
      const C *gains = shared_pixels.data() + p * pixels, *shifts = shared_pixels.data() + parts * grad_gain.numel() + p * pixels;
      for (int64_t i = 0; i < grad_gain.numel(); i++) data<C>(grad_gain)[i] += gains[i];
      for (int64_t i = 0; i < grad_shift.numel(); i++) data<C>(grad_shift)[i] += shifts[i];
    }
  });
  return {gx, found[0], found[2], found[1], found[3], grad_gain, grad_shift};
}

constexpr int64_t kBlock = 512;  // pixels whose channels are gone through together

// (samples, 2, space) of mean and maximum over the channels, and the channel of the maximum
std::tuple<Tensor, Tensor> channel_pool(const Tensor& x_) {
  const Tensor x = packed(x_);
  const Shape s(x, false);
  const int64_t sizes[3] = {s.samples, 2, s.space}, spots[2] = {s.samples, s.space};
  Tensor pooled = headway::allocate(sizes, 3, x.scalar_type()), index = headway::allocate(spots, 2, ScalarType::Int);
  if (s.numbers() == 0) return {pooled, index};
  const int64_t blocks = (s.space + kBlock - 1) / kBlock, tasks = s.samples * blocks, parts = headway::parts_of(tasks, s.numbers());
  headway::dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using C = headway::arithmetic_t<T>;
    headway::for_parts(parts, [&](int64_t p) {
      C sum[kBlock], best[kBlock];
      for (int64_t t = p * tasks / parts; t < (p + 1) * tasks / parts; t++) {
        const int64_t n = t / blocks, i = t % blocks * kBlock, m = std::min(kBlock, s.space - i);
        HEADWAY_CALL(pool_rows<T>, data<T>(x) + s.at(n, 0) + i, m, s.space, s.channels, sum, best, data<int32_t>(index) + n * s.space + i);
        for (int64_t j = 0; j < m; j++) sum[j] /= C(s.channels);
        T* to = data<T>(pooled) + 2 * n * s.space + i;
        HEADWAY_CALL(store_row, sum, to, m);
        HEADWAY_CALL(store_row, best, to + s.space, m);
      }
    });
  });
  return {pooled, index};
}

// the gradient of both (samples, 2, space) back to every channel of gx, or added onto what is there
void unpool(const Tensor& gradient, const Tensor& index, Tensor& gx, int64_t channels, bool onto) {
  const Tensor g = packed(gradient);
  const int64_t samples = g.size(0), space = g.size(2), planes = samples * channels;
  if (planes * space == 0) return;
  const int64_t parts = headway::parts_of(planes, planes * space);
  headway::dispatch(g, [&](auto zero) {
    using T = decltype(zero);
    using C = headway::arithmetic_t<T>;
    std::vector<C> wide(g.numel());
    HEADWAY_CALL(load_row, data<T>(g), wide.data(), g.numel());
    for (int64_t n = 0; n < samples; n++)
      for (int64_t i = 0; i < space; i++) wide[2 * n * space + i] /= C(channels);
    headway::for_parts(parts, [&](int64_t p) {
      for (int64_t r = p * planes / parts; r < (p + 1) * planes / parts; r++) {
        const int64_t n = r / channels;
        const C* from = wide.data() + 2 * n * space;
        HEADWAY_CALL(unpool_row<T>, data<T>(gx) + r * space, space, from, from + space, data<int32_t>(index) + n * space,
                     int32_t(r % channels), onto);
      }
    });
  });
}

Tensor channel_pool_backward(const Tensor& gradient, const Tensor& index, int64_t channels) {
  const int64_t sizes[3] = {gradient.size(0), channels, gradient.size(2)};
  Tensor gx = headway::allocate(sizes, 3, gradient.scalar_type());
  unpool(gradient, index, gx, channels, false);
  return gx;
}

void channel_pool_backward_(Tensor gx, const Tensor& gradient, const Tensor& index) {
  if (!gx.is_contiguous() || gx.scalar_type() != gradient.scalar_type())
    throw std::runtime_error("what is added to must be contiguous and of the gradient's type");
  unpool(gradient, index, gx, gx.size(1), true);
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m) {
  m.impl("region_norm", TORCH_BOX(&region_norm));
  m.impl("region_norm_backward", TORCH_BOX(&region_norm_backward));
  m.impl("channel_pool", TORCH_BOX(&channel_pool));
  m.impl("channel_pool_backward", TORCH_BOX(&channel_pool_backward));
  m.impl("channel_pool_backward_", TORCH_BOX(&channel_pool_backward_));
}

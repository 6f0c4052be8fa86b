// CPU bodies of the EvoNorm layers: headway::evo_moments, evo_batch, evo_group and their backwards, over (samples, channels, space).
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

#define HEADWAY_BODY "evo_body.h"
#include "isa.h"
#include "tensors.h"

namespace {
using headway::Maybe;
using headway::ScalarType;
using headway::Tensor;
using headway::data;
using headway::like;
using headway::packed;

struct Shape {
  int64_t samples, channels, space;
  explicit Shape(const Tensor& x) : samples(x.size(0)), channels(x.size(1)), space(samples * channels ? x.numel() / (samples * channels) : 0) {}
  int64_t numbers() const { return samples * channels * space; }
  int64_t at(int64_t n, int64_t c) const { return (n * channels + c) * space; }
};

// work(first, last, part) over `rows` rows of work
template <class F>
void split(const Shape& s, int64_t rows, int64_t parts, F&& work) {
  headway::for_parts(parts, [&](int64_t p) { work(p * rows / parts, (p + 1) * rows / parts, p); });
}

// mean and biased variance of every channel; those of its planes go to `planes` as (mean, sum of squared distances)
template <class T, class F>
void channel_moments(const Tensor& x, const Shape& s, int64_t c, double* mean, double* variance, F&& plane) {
  double count = 0, centre = 0, around = 0;
  for (int64_t n = 0; n < s.samples; n++) {
    double m, squares;
    HEADWAY_CALL(evo_moments<T>, data<T>(x) + s.at(n, c), s.space, &m, &squares);
    plane(n, m, squares);
    const double total = count + double(s.space), apart = m - centre;  // Chan's merge
    centre += apart * double(s.space) / total;
    around += squares + apart * apart * count * double(s.space) / total;
    count = total;
  }
  *mean = centre, *variance = around / count;
}

Tensor evo_moments(const Tensor& given) {
  const Tensor x = packed(given);
  const Shape s(x);
  Tensor moments = headway::matrix(2, s.channels, ScalarType::Double);
  double* to = data<double>(moments);
  if (s.numbers() == 0) {
    std::fill(to, to + 2 * s.channels, 0.0);
    return moments;
  }
  headway::dispatch(x, [&](auto zero) {
    split(s, s.channels, headway::parts_of(s.channels, s.numbers()), [&](int64_t first, int64_t last, int64_t) {
      for (int64_t c = first; c < last; c++)
        channel_moments<decltype(zero)>(x, s, c, to + c, to + s.channels + c, [](int64_t, double, double) {});
    });
  });
  return moments;
}

// R = p x + q of one plane; planes hold (mean, q)
template <class C>
C slope(int64_t kind, bool act, const C* v, int64_t c, C q) {
  return !act ? C(0) : kind == 0 ? (v ? v[c] : C(1)) : kind == 1 ? q : C(-1);
}
template <class C>
C offset(int64_t, bool act, C q) {
  return act ? q : C(-1);  // below L everywhere: only the batch's variance divides
}

std::tuple<Tensor, Tensor, Tensor> evo_batch(const Tensor& given, const Maybe& weight, const Maybe& bias, const Maybe& v,
                                             const Maybe& variance, int64_t kind, bool act, double eps) {
  const Tensor x = packed(given);
  const Shape s(x);
  const bool known = variance && variance->defined();
  Tensor y = like(x), planes = headway::matrix(s.samples * s.channels, 2, headway::wide_type(x)),
         moments = headway::matrix(2, s.channels, headway::wide_type(x));
  headway::dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using C = headway::arithmetic_t<T>;
    std::vector<C> wroom, broom, vroom, lroom;
    const C *w = headway::parameter<C>(weight, wroom), *b = headway::parameter<C>(bias, broom), *slopes = headway::parameter<C>(v, vroom),
            *fixed = headway::parameter<C>(variance, lroom);
    C *kept = data<C>(planes), *channel = data<C>(moments);
    if (s.numbers() == 0) {
      for (int64_t c = 0; c < 2 * s.channels; c++) channel[c] = fixed && c >= s.channels ? fixed[c - s.channels] : C(0);
      return;
    }
    split(s, s.channels, headway::parts_of(s.channels, s.numbers()), [&](int64_t first, int64_t last, int64_t) {
      for (int64_t c = first; c < last; c++) {
        double mean = 0, var = known ? double(fixed[c]) : 0;
        auto keep = [&](int64_t n, double m, double squares) {
          const double own = squares / double(s.space) + (kind == 0 ? 0 : m * m);
          kept[2 * (n * s.channels + c)] = C(m), kept[2 * (n * s.channels + c) + 1] = C(std::sqrt(own + eps));
        };
        double own;
        channel_moments<T>(x, s, c, &mean, known ? &own : &var, keep);
        channel[c] = C(mean), channel[s.channels + c] = C(var);
        const C L = C(std::sqrt(var + eps));
        for (int64_t n = 0; n < s.samples; n++) {
          const C q = kept[2 * (n * s.channels + c) + 1];
          HEADWAY_CALL(evo_batch_plane<T>, data<T>(x) + s.at(n, c), data<T>(y) + s.at(n, c), s.space, L, slope(kind, act, slopes, c, q),
                       offset(kind, act, q), w ? w[c] : C(1), b ? b[c] : C(0));
        }
      }
    });
  });
  return {y, planes, moments};
}

// where the first part of the gradient of `numbers` numbers lies: the result itself, or wider room for half precision
template <class T>
headway::arithmetic_t<T>* room_for(T* gx, std::vector<headway::arithmetic_t<T>>& room, int64_t numbers) {
  if constexpr (std::is_same_v<T, headway::arithmetic_t<T>>) return gx;
  if (int64_t(room.size()) < numbers) room.resize(numbers);
  return room.data();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> evo_batch_backward(const Tensor& grad, const Tensor& given, const Tensor& planes,
                                                                      const Tensor& moments, const Maybe& weight, const Maybe& v,
                                                                      int64_t kind, bool act, double eps, bool through) {
  const Tensor gy = packed(grad), x = packed(given);
  const Shape s(x);
  const ScalarType wide = headway::wide_type(x);
  Tensor gx = like(x), gw = headway::zeros(s.channels, wide), gb = headway::zeros(s.channels, wide), gv = headway::zeros(s.channels, wide),
         pull = headway::zeros(s.channels, wide);
  if (s.numbers() == 0) return {gx, gw, gb, gv, pull};
  headway::dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using C = headway::arithmetic_t<T>;
    std::vector<C> wroom, vroom;
    const C *w = headway::parameter<C>(weight, wroom), *slopes = headway::parameter<C>(v, vroom);
    const C *kept = data<C>(planes), *channel = data<C>(moments);
    split(s, s.channels, headway::parts_of(s.channels, s.numbers()), [&](int64_t first, int64_t last, int64_t) {
      std::vector<C> room;
      std::vector<double> own(s.samples);
      for (int64_t c = first; c < last; c++) {
        const C a = w ? w[c] : C(1), L = C(std::sqrt(double(channel[s.channels + c]) + eps));
        double sums[5] = {};
        auto place = [&](int64_t n) {
          if constexpr (std::is_same_v<T, C>) return data<T>(gx) + s.at(n, c);
          else return room_for<T>(nullptr, room, s.samples * s.space) + n * s.space;
        };
        for (int64_t n = 0; n < s.samples; n++) {
          const C q = kept[2 * (n * s.channels + c) + 1];
          const double before[2] = {sums[0], sums[1]};
          HEADWAY_CALL(evo_batch_sums<T>, data<T>(gy) + s.at(n, c), data<T>(x) + s.at(n, c), place(n), s.space, L,
                       slope(kind, act, slopes, c, q), offset(kind, act, q), a, sums);
          const double e0 = sums[0] - before[0], e1 = sums[1] - before[1];
          own[n] = act ? (kind == 1 ? e0 + e1 : e0) / (double(s.space) * double(q)) : 0;
        }
        const double batch = through ? sums[2] / (double(s.samples) * double(s.space) * double(L)) : 0;
        data<C>(gw)[c] = C(sums[3]), data<C>(gb)[c] = C(sums[4]), data<C>(gv)[c] = C(sums[1]), data<C>(pull)[c] = C(sums[2]);
        for (int64_t n = 0; n < s.samples; n++) {
          const C centre = kind == 0 ? kept[2 * (n * s.channels + c)] : C(0);
          HEADWAY_CALL(evo_pull<T>, data<T>(x) + s.at(n, c), place(n), data<T>(gx) + s.at(n, c), s.space, C(1), centre, C(own[n]),
                       channel[c], C(batch));
        }
      }
    });
  });
  return {gx, gw, gb, gv, pull};
}

std::tuple<Tensor, Tensor> evo_group(const Tensor& given, const Maybe& weight, const Maybe& bias, const Maybe& v, int64_t groups,
                                     bool centred, bool act, double eps) {
  const Tensor x = packed(given);
  const Shape s(x);
  const int64_t each = s.channels / groups, size = each * s.space, rows = s.samples * groups;
  Tensor y = like(x), stats = headway::matrix(rows, 2, headway::wide_type(x));
  if (s.numbers() == 0) return {y, stats};
  headway::dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using C = headway::arithmetic_t<T>;
    std::vector<C> wroom, broom, vroom;
    const C *w = headway::parameter<C>(weight, wroom), *b = headway::parameter<C>(bias, broom), *slopes = headway::parameter<C>(v, vroom);
    split(s, rows, headway::parts_of(rows, s.numbers()), [&](int64_t first, int64_t last, int64_t) {
      for (int64_t r = first; r < last; r++) {
        double mean, squares;
        HEADWAY_CALL(evo_moments<T>, data<T>(x) + r * size, size, &mean, &squares);
        const double square = squares / double(size) + (centred ? 0 : mean * mean), d = 1 / std::sqrt(square + eps);
        data<C>(stats)[2 * r] = C(centred ? mean : 0), data<C>(stats)[2 * r + 1] = C(d);
        for (int64_t i = 0; i < each; i++) {
          const int64_t c = (r % groups) * each + i, at = r * size + i * s.space;
          HEADWAY_CALL(evo_group_plane<T>, data<T>(x) + at, data<T>(y) + at, s.space, act, slopes ? slopes[c] : C(1),
                       C((w ? double(w[c]) : 1) * d), b ? b[c] : C(0));
        }
      }
    });
  });
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> evo_group_backward(const Tensor& grad, const Tensor& given, const Tensor& stats,
                                                              const Maybe& weight, const Maybe& v, int64_t groups, bool act) {
  const Tensor gy = packed(grad), x = packed(given);
  const Shape s(x);
  const ScalarType wide = headway::wide_type(x);
  const int64_t each = s.channels / groups, size = each * s.space, rows = s.samples * groups;
  Tensor gx = like(x), gw = headway::zeros(s.channels, wide), gb = headway::zeros(s.channels, wide), gv = headway::zeros(s.channels, wide);
  if (s.numbers() == 0) return {gx, gw, gb, gv};
  headway::dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using C = headway::arithmetic_t<T>;
    std::vector<C> wroom, vroom;
    const C *w = headway::parameter<C>(weight, wroom), *slopes = headway::parameter<C>(v, vroom), *kept = data<C>(stats);
    const int64_t parts = headway::parts_of(rows, s.numbers());
    std::vector<double> partial(3 * parts * s.channels);
    split(s, rows, parts, [&](int64_t first, int64_t last, int64_t p) {
      std::vector<C> room;
      double *pw = partial.data() + 3 * p * s.channels, *pb = pw + s.channels, *pv = pb + s.channels;
      for (int64_t r = first; r < last; r++) {
        const double d = double(kept[2 * r + 1]);
        double total = 0;
        C* place = room_for<T>(data<T>(gx) + r * size, room, size);
        for (int64_t i = 0; i < each; i++) {
          const int64_t c = (r % groups) * each + i, at = i * s.space;
          double sums[3] = {};
          HEADWAY_CALL(evo_group_sums<T>, data<T>(gy) + r * size + at, data<T>(x) + r * size + at, place + at, s.space, act,
                       slopes ? slopes[c] : C(1), sums);
          const double a = w ? double(w[c]) : 1;
          total += a * sums[0];
          pw[c] += sums[0] * d, pv[c] += a * d * sums[1], pb[c] += sums[2];
        }
        const C k = C(-d * d * d * total / double(size));
        for (int64_t i = 0; i < each; i++) {
          const int64_t c = (r % groups) * each + i, at = i * s.space;
          HEADWAY_CALL(evo_pull<T>, data<T>(x) + r * size + at, place + at, data<T>(gx) + r * size + at, s.space,
                       C((w ? double(w[c]) : 1) * d), kept[2 * r], k, C(0), C(0));
        }
      }
    });
    for (int64_t p = 0; p < parts; p++)
      for (int64_t c = 0; c < s.channels; c++) {
        const double* from = partial.data() + 3 * p * s.channels + c;
        data<C>(gw)[c] += C(from[0]), data<C>(gb)[c] += C(from[s.channels]), data<C>(gv)[c] += C(from[2 * s.channels]);
      }
  });
  return {gx, gw, gb, gv};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m) {
  m.impl("evo_moments", TORCH_BOX(&evo_moments));
  m.impl("evo_batch", TORCH_BOX(&evo_batch));
  m.impl("evo_batch_backward", TORCH_BOX(&evo_batch_backward));
  m.impl("evo_group", TORCH_BOX(&evo_group));
  m.impl("evo_group_backward", TORCH_BOX(&evo_group_backward));
}

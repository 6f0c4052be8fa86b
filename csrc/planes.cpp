// CPU bodies of headway::plane_step, its backward, and what it is made of: norms by channel statistics, and by groups after them.
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

#define HEADWAY_BODY "planes_body.h"
#include "isa.h"
#include "tensors.h"

namespace {
using headway::Maybe;
using headway::ScalarType;
using headway::Tensor;
using headway::data;
using headway::like;
using headway::packed;
using Doubles = std::vector<double>;

Tensor doubles(std::initializer_list<int64_t> sizes) { return headway::allocate(sizes.begin(), sizes.size(), ScalarType::Double); }

template <class F>
void by_parts(int64_t planes, int64_t numbers, F&& work) {
  const int64_t parts = headway::parts_of(planes, numbers);
  headway::for_parts(parts, [&](int64_t p) { work(p * planes / parts, (p + 1) * planes / parts); });
}

// one number a channel in double, from one a channel or one a group
Doubles spread(const Maybe& given, int64_t channels, double missing) {
  Doubles out(channels, missing), room;
  if (!given || !given->defined() || channels == 0) return out;
  const double* from = headway::parameter<double>(given, room);
  const int64_t each = channels / given->numel();
  for (int64_t c = 0; c < channels; c++) out[c] = from[c / each];
  return out;
}
// sums over channels, put together again as the parameter is: a number a channel or a group, in its arithmetic type
Tensor gather(const Doubles& from, const Maybe& as) {
  const int64_t n = as && as->defined() ? as->numel() : 0;
  Tensor t = headway::zeros(n, n ? headway::wide_type(*as) : ScalarType::Float);
  const int64_t each = n ? int64_t(from.size()) / n : 0;
  for (int64_t k = 0; k < n && each; k++) {
    double sum = 0;
    for (int64_t c = k * each; c < (k + 1) * each; c++) sum += from[c];
    if (t.scalar_type() == ScalarType::Double) data<double>(t)[k] = sum;
    else data<float>(t)[k] = float(sum);
  }
  return t;
}

// what both directions need: the first stage's map z = first * (x - mean) + bias and, with groups, the second stage's t and mu
struct Stages {
  int64_t samples, channels, space, groups;
  const double *plane_mean, *plane_var, *mean, *var;
  Doubles weight, bias, outer, rstd, first, z, t;
  Stages(const Tensor& x, const Tensor& moments, const Tensor& statistics, const Maybe& weight_, const Maybe& bias_,
         const Maybe& group_weight, int64_t groups_, double eps, double group_eps)
      : samples(x.size(0)), channels(x.size(1)), space(x.size(2)), groups(groups_), plane_mean(data<double>(moments)),
        plane_var(plane_mean + samples * channels), mean(data<double>(statistics)), var(mean + channels),
        weight(spread(weight_, channels, 1)), bias(spread(bias_, channels, 0)), outer(spread(group_weight, channels, 1)),
        rstd(channels), first(channels), z(samples * channels), t(samples * groups) {
    for (int64_t c = 0; c < channels; c++) rstd[c] = 1 / std::sqrt(var[c] + eps), first[c] = weight[c] * rstd[c];
    const int64_t each = groups ? channels / groups : 0;
    for (int64_t n = 0; n < samples; n++) {
      const int64_t at = n * channels;
      for (int64_t c = 0; c < channels; c++) z[at + c] = first[c] * (plane_mean[at + c] - mean[c]) + bias[c];
      for (int64_t g = 0; g < groups; g++) {
        double mu = 0, square = 0;
        for (int64_t c = g * each; c < (g + 1) * each; c++) mu += z[at + c];
        mu /= each;
        for (int64_t c = g * each; c < (g + 1) * each; c++) {
          z[at + c] -= mu;
          square += first[c] * first[c] * plane_var[at + c] + z[at + c] * z[at + c];
        }
        t[n * groups + g] = 1 / std::sqrt(square / each + group_eps);
      }
    }
  }
  double scale(int64_t n, int64_t c) const { return groups ? t[n * groups + c * groups / channels] : 1; }
};

Tensor plane_moments(const Tensor& given) {
  const Tensor x = packed(given);
  const int64_t planes = x.size(0) * x.size(1), space = x.size(2);
  Tensor moments = doubles({2, x.size(0), x.size(1)});
  if (x.numel() == 0) {
    std::fill_n(data<double>(moments), 2 * planes, 0.0);
    return moments;
  }
  headway::dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    by_parts(planes, x.numel(), [&](int64_t from, int64_t to) {
      HEADWAY_CALL(plane_moments<T>, data<T>(x), from, to, space, data<double>(moments), data<double>(moments) + planes);
    });
  });
  return moments;
}

Tensor plane_norm(const Tensor& given, const Tensor& moments, const Tensor& statistics, const Maybe& weight, const Maybe& bias,
                  const Maybe& group_weight, const Maybe& group_bias, int64_t groups, double eps, double group_eps) {
  const Tensor x = packed(given);
  Tensor y = like(x);
  if (x.numel() == 0) return y;
  const Stages s(x, moments, statistics, weight, bias, group_weight, groups, eps, group_eps);
  const Doubles offset = spread(group_bias, s.channels, 0);
  Doubles gain(s.z.size()), shift(s.z.size());
  for (int64_t n = 0; n < s.samples; n++)
    for (int64_t c = 0; c < s.channels; c++) {
      const int64_t i = n * s.channels + c;
      const double outer = s.outer[c] * s.scale(n, c);
      gain[i] = outer * s.first[c], shift[i] = outer * s.z[i] + offset[c];
    }
  headway::dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    by_parts(s.samples * s.channels, x.numel(), [&](int64_t from, int64_t to) {
      HEADWAY_CALL(plane_scale<T>, data<T>(x), data<T>(y), from, to, s.space, s.plane_mean, gain.data(), shift.data());
    });
  });
  return y;
}

// gradients of x, weight, bias, group weight, group bias and shares; `whole` holds the sums (of gz and gz * (x - mean) over a
// channel, the gradients of the statistics, and last the sum of the shares) over all processes where this one sees only its part
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> plane_norm_backward(
    const Tensor& gradient, const Tensor& given, const Tensor& moments, const Tensor& statistics, const Maybe& shares,
    const Maybe& weight, const Maybe& bias, const Maybe& group_weight, const Maybe& group_bias, const Maybe& grad_statistics,
    const Maybe& whole, int64_t groups, double eps, double group_eps) {
  const Tensor gy = packed(gradient), x = packed(given);
  Tensor gx = like(x);
  const Stages s(x, moments, statistics, weight, bias, group_weight, groups, eps, group_eps);
  const int64_t N = s.samples, K = s.channels, planes = N * K, each = groups ? K / groups : 1;
  const bool moves = shares && shares->defined();
  Doubles room, P(planes), Q(planes), along(planes), pull(planes), shift(planes), gw(K), gb(K), gh(K), ge(K);
  if (x.numel() == 0 && !(whole && whole->defined()))
    return {gx, gather(gw, weight), gather(gb, bias), gather(gh, group_weight), gather(ge, group_bias),
            headway::zeros(moves ? N : 0, ScalarType::Double)};
  if (x.numel())
    headway::dispatch(x, [&](auto zero) {
      using T = decltype(zero);
      by_parts(planes, x.numel(), [&](int64_t from, int64_t to) {
        HEADWAY_CALL(plane_products<T>, data<T>(gy), data<T>(x), from, to, s.space, s.plane_mean, P.data(), Q.data());
      });
    });
  for (int64_t n = 0; n < N; n++) {
    for (int64_t c = 0; c < K && !groups; c++) along[n * K + c] = 1;
    for (int64_t g = 0; g < groups && s.space; g++) {
      const double t = s.t[n * groups + g];
      double one = 0, two = 0;
      for (int64_t c = g * each; c < (g + 1) * each; c++) {
        const int64_t i = n * K + c;
        const double projected = t * (s.first[c] * Q[i] + s.z[i] * P[i]);
        gh[c] += projected, ge[c] += P[i];
        one += s.outer[c] * P[i], two += s.outer[c] * projected;
      }
      one /= double(each * s.space), two /= double(each * s.space);
      for (int64_t c = g * each; c < (g + 1) * each; c++) {
        const int64_t i = n * K + c;
        along[i] = t * s.outer[c], pull[i] = -t * t * s.first[c] * two, shift[i] = -t * (one + t * s.z[i] * two);
        // from here on the sums of gz rather than gy
        P[i] = along[i] * P[i] + shift[i] * s.space, Q[i] = along[i] * Q[i] + pull[i] * s.space * s.plane_var[i];
      }
    }
    for (int64_t c = 0; c < K; c++) {
      const int64_t i = n * K + c;
      gb[c] += P[i], gw[c] += Q[i] + (s.plane_mean[i] - s.mean[c]) * P[i];
    }
  }
  Doubles sums(4 * K);
  std::copy(gb.begin(), gb.end(), sums.begin());
  std::copy(gw.begin(), gw.end(), sums.begin() + K);
  if (grad_statistics && grad_statistics->defined()) {
    const double* from = headway::parameter<double>(*grad_statistics, room);
    std::copy(from, from + 2 * K, sums.begin() + 2 * K);
  }
  const Tensor own = moves ? packed(*shares) : Tensor();
  const double* share = moves ? data<double>(own) : nullptr;
  double total = 0;
  for (int64_t n = 0; n < N && moves; n++) total += share[n];
  if (whole && whole->defined()) {
    std::copy(data<double>(*whole), data<double>(*whole) + 4 * K, sums.begin());
    total = data<double>(*whole)[4 * K];
  }
  Doubles to_mean(K), to_var(K);
  for (int64_t c = 0; c < K && moves; c++) {
    to_var[c] = sums[3 * K + c] - 0.5 * s.first[c] * s.rstd[c] * s.rstd[c] * sums[K + c];
    to_mean[c] = sums[2 * K + c] - s.first[c] * sums[c] - 2 * to_var[c] * s.mean[c] * (1 - total);
  }
  Tensor gs = headway::zeros(moves ? N : 0, ScalarType::Double);
  for (int64_t n = 0; n < N; n++)
    for (int64_t c = 0; c < K; c++) {
      const int64_t i = n * K + c;
      along[i] *= s.first[c], pull[i] *= s.first[c], shift[i] *= s.first[c];
      if (!moves) continue;
      const double away = s.plane_mean[i] - s.mean[c], part = share[n] / std::max<int64_t>(1, s.space);
      pull[i] += 2 * part * to_var[c], shift[i] += part * (to_mean[c] + 2 * to_var[c] * away);
      data<double>(gs)[n] += to_mean[c] * s.plane_mean[i] + to_var[c] * (s.plane_var[i] + away * away);
    }
  if (x.numel())
    headway::dispatch(x, [&](auto zero) {
      using T = decltype(zero);
      by_parts(planes, x.numel(), [&](int64_t from, int64_t to) {
        HEADWAY_CALL(plane_gradient<T>, data<T>(gy), data<T>(x), data<T>(gx), from, to, s.space, s.plane_mean, along.data(),
                     pull.data(), shift.data());
      });
    });
  for (int64_t c = 0; c < K; c++) gw[c] *= s.rstd[c];
  return {gx, gather(gw, weight), gather(gb, bias), gather(gh, group_weight), gather(ge, group_bias), gs};
}

// mean over the shares of the planes' means, and of their squared distances from it or from a given centre; (2, channels)
Tensor plane_statistics(const Tensor& moments, const Maybe& shares, const Maybe& centre) {
  const int64_t N = moments.size(1), K = moments.size(2);
  const double *m = data<double>(moments), *v = m + N * K;
  Tensor out = doubles({2, K});
  double *mean = data<double>(out), *var = mean + K;
  std::fill_n(mean, 2 * K, 0.0);
  Doubles share(N, N ? 1.0 / N : 0.0), room;
  if (shares && shares->defined()) std::copy_n(data<double>(packed(*shares)), N, share.begin());
  for (int64_t n = 0; n < N; n++)
    for (int64_t c = 0; c < K; c++) mean[c] += share[n] * m[n * K + c];
  const double* from = centre && centre->defined() && K ? headway::parameter<double>(centre, room) : mean;
  for (int64_t n = 0; n < N; n++)
    for (int64_t c = 0; c < K; c++) {
      const double d = m[n * K + c] - from[c];
      var[c] += share[n] * (v[n * K + c] + d * d);
    }
  return out;
}

// running += rate * (statistics - running) where all of it is finite, in place where it moves; returns the new values
// a rate that is kept moves first, to 1 / (1 + decay / rate)
Tensor move_statistics(const Tensor& running_mean, const Tensor& running_var, const Maybe& kept_rate, const Tensor& statistics,
                       double rate, double decay, bool moves) {
  const int64_t K = running_mean.numel();
  const double* now = data<double>(statistics);
  Tensor out = doubles({2, K});
  bool finite = true;
  for (int64_t i = 0; i < 2 * K; i++) finite = finite && std::isfinite(now[i]);
  if (kept_rate && kept_rate->defined()) {
    if (kept_rate->scalar_type() != ScalarType::Double) throw std::runtime_error("a kept rate must be float64");
    double& kept = *data<double>(*kept_rate);
    rate = 1 / (1 + decay / kept);
    if (finite && moves) kept = rate;
  }
  for (int64_t k = 0; k < 2; k++) {
    const Tensor& running = k ? running_var : running_mean;
    if (!running.is_contiguous()) throw std::runtime_error("the statistics of a norm must be contiguous");
    headway::dispatch(running, [&](auto zero) {
      using T = decltype(zero);
      if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
        T* to = data<T>(running);
        for (int64_t c = 0; c < K; c++) {
          const T value = finite ? T(to[c] + rate * (now[k * K + c] - to[c])) : to[c];
          data<double>(out)[k * K + c] = value;
          if (moves) to[c] = value;
        }
      } else {
        throw std::runtime_error("the statistics of a norm must be float32 or float64");
      }
    });
  }
  return out;
}

// what a task of the batch weighs (pi), beside exp(omega) in the same scale; both hold a number for each task seen
struct TaskWeights {
  Doubles omega, pi;
  const int64_t* n;
  double total = 0;
  TaskWeights(const Tensor& task_weight, const Tensor& counts, int64_t seen, bool renormalize) : omega(seen), pi(seen), n(data<int64_t>(counts)) {
    if (seen > task_weight.numel() || seen > counts.numel()) throw std::runtime_error("there are more tasks than weights or counts");
    Doubles room;
    const double* given = headway::parameter<double>(task_weight, room);
    double top = 0;  // weights of any size without overflow
    for (int64_t k = 0; k < seen; k++) top = std::max(top, given[k]);
    for (int64_t k = 0; k < seen; k++) {
      const bool counted = n[k] || !renormalize;
      omega[k] = counted ? std::exp(given[k] - top) : 0;
      pi[k] = counted ? omega[k] + double(n[k]) * std::exp(-top) : 0;
      total += pi[k];
    }
    for (int64_t k = 0; k < seen; k++) pi[k] /= total, omega[k] /= total;
  }
  double each(int64_t task) const {
    if (task < 0 || task >= int64_t(pi.size())) throw std::runtime_error("a task id lies outside the tasks seen");
    return double(std::max<int64_t>(1, n[task]));
  }
};

Tensor task_shares(const Tensor& task_weight, const Tensor& ids, const Tensor& counts, int64_t seen, bool renormalize) {
  const Tensor tasks = packed(ids), of_batch = packed(counts);
  const TaskWeights w(task_weight, of_batch, seen, renormalize);
  const int64_t N = tasks.numel(), *id = data<int64_t>(tasks);
  Tensor shares = doubles({N});
  for (int64_t i = 0; i < N; i++) {
    const double n = w.each(id[i]);
    data<double>(shares)[i] = w.pi[id[i]] / n;
  }
  return shares;
}

Tensor task_shares_backward(const Tensor& gradient, const Tensor& task_weight, const Tensor& ids, const Tensor& counts, int64_t seen,
                            bool renormalize) {
  const Tensor tasks = packed(ids), of_batch = packed(counts), g = packed(gradient);
  const TaskWeights w(task_weight, of_batch, seen, renormalize);
  const int64_t N = tasks.numel(), *id = data<int64_t>(tasks);
  Doubles to_pi(seen), found(task_weight.numel());
  double mean = 0;
  for (int64_t i = 0; i < N; i++) {
    const double part = data<double>(g)[i] / w.each(id[i]);
    to_pi[id[i]] += part, mean += part * w.pi[id[i]];
  }
  for (int64_t k = 0; k < seen; k++) found[k] = w.omega[k] * (to_pi[k] - mean);
  return gather(found, task_weight);
}

// one training step: statistics of the batch by the shares of its tasks (or of all samples alike), running values moved by them, and
// the norm by the batch's statistics or, where they are estimates, by the running values after they have moved; last, how far the two
// are apart, squared and averaged over the channels
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> plane_step(
    const Tensor& given, const Maybe& weight, const Maybe& bias, const Maybe& group_weight, const Maybe& group_bias,
    const Maybe& task_weight, const Maybe& ids, const Maybe& counts, const Maybe& running_mean, const Maybe& running_var,
    const Maybe& kept_rate, double rate, double decay, int64_t seen, bool moves, bool estimate, bool unbiased, bool renormalize,
    int64_t groups, double eps, double group_eps) {
  const Tensor x = packed(given);
  const int64_t N = x.size(0), K = x.size(1), values = N * x.size(2);
  Tensor shares;
  if (task_weight && task_weight->defined()) {
    shares = task_shares(*task_weight, *ids, *counts, seen, renormalize);
  } else {
    shares = doubles({N});
    std::fill_n(data<double>(shares), N, 1.0 / std::max<int64_t>(1, N));
  }
  const Tensor moments = plane_moments(x);
  const bool tracks = running_mean && running_mean->defined();
  Tensor statistics = plane_statistics(moments, shares, estimate ? running_mean : Maybe());
  Tensor running = statistics;
  if (tracks) {
    Tensor target = statistics;
    if (unbiased) {
      target = doubles({2, K});
      std::copy_n(data<double>(statistics), 2 * K, data<double>(target));
      for (int64_t c = 0; c < K; c++) data<double>(target)[K + c] *= double(values) / double(std::max<int64_t>(1, values - 1));
    }
    running = move_statistics(*running_mean, *running_var, kept_rate, target, rate, decay, moves);
  } else {
    running = doubles({2, K});
    std::copy_n(data<double>(statistics), 2 * K, data<double>(running));
  }
  if (estimate) std::copy_n(data<double>(running), 2 * K, data<double>(statistics));
  const Tensor y = plane_norm(x, moments, statistics, weight, bias, group_weight, group_bias, groups, eps, group_eps);
  Tensor distance = doubles({});
  double sum = 0;
  for (int64_t i = 0; i < 2 * K; i++) {
    const double d = data<double>(statistics)[i] - data<double>(running)[i];
    sum += d * d;
  }
  *data<double>(distance) = sum / double(std::max<int64_t>(1, K));
  return {y, moments, shares, statistics, running, distance};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m) {
  m.impl("plane_moments", TORCH_BOX(&plane_moments));
  m.impl("plane_statistics", TORCH_BOX(&plane_statistics));
  m.impl("move_statistics", TORCH_BOX(&move_statistics));
  m.impl("plane_norm", TORCH_BOX(&plane_norm));
  m.impl("plane_norm_backward", TORCH_BOX(&plane_norm_backward));
  m.impl("task_shares", TORCH_BOX(&task_shares));
  m.impl("task_shares_backward", TORCH_BOX(&task_shares_backward));
  m.impl("plane_step", TORCH_BOX(&plane_step));
}

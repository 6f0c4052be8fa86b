// CPU bodies of headway::adamp_, headway::sgdp_ and headway::radial_step_: whole parameter lists in one call.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "numbers.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headway {
enum class Kind { adam, sgd, given };
// what the numbers of one tensor are updated with; for SGD beta1 is the momentum and beta2 the dampening
struct Rule {
  Kind kind;
  double beta1 = 0, beta2 = 0, eps = 0, root = 1, step = 0, sign = 1;
  bool nesterov = false;
};
}  // namespace headway

// instantiated for the plain instruction set before any other is switched on
template class std::vector<float>;
template class std::vector<double>;

#define HEADWAY_BODY "radial_body.h"
#include "isa.h"

using headway::Kind;
using headway::Rule;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

namespace {
constexpr int64_t kChunk = 65536;  // numbers of one tensor that a thread takes at a time; fixed, so that threads change no sum
constexpr int64_t kRoom = 6 * isa_base::kBlock;

struct Settings {
  double weight_decay, delta, wd_ratio, eps, lr;
  bool in_place;  // the projected update replaces the momentum
};

// dimensions of one parameter: a row is the first axis, whatever the order of the others in memory
struct Shape {
  int64_t numel, width, rows;
  bool plain;
};

Shape shape_of(const Tensor& p, double delta) {
  const int64_t numel = p.numel(), dims = p.dim();
  const bool plain = dims < 2 || delta <= 0;
  const int64_t rows = plain || numel == 0 ? 1 : p.size(0);
  return {numel, std::max<int64_t>(1, numel / rows), rows, plain};
}

// 0 none, 1 channel, 2 layer; fills the coefficient of every row. A NaN compares as false, so it is never projected.
template <class C>
int8_t decide(const std::vector<double>& sums, const Shape& shape, double delta, double eps, std::vector<C>& coefficients) {
  auto likeness = [&](double gp, double gg, double pp) {
    return std::fabs(gp) / (std::max(std::sqrt(gg), eps) * std::max(std::sqrt(pp), eps));
  };
  auto coefficient = [&](double pp, double pu) {
    const double length = std::sqrt(pp) + eps;
    return C(pu / (length * length));
  };
  coefficients.assign(shape.rows, C(0));
  const double limit = delta / std::sqrt(double(shape.width));
  bool below = true;
  double whole[4] = {0, 0, 0, 0};
  for (int64_t r = 0; r < shape.rows; r++) {
    const double* s = sums.data() + 4 * r;
    below = below && likeness(s[0], s[1], s[2]) < limit;
    for (int k = 0; k < 4; k++) whole[k] += s[k];
  }
  if (below) {
    for (int64_t r = 0; r < shape.rows; r++) coefficients[r] = coefficient(sums[4 * r + 2], sums[4 * r + 3]);
    return 1;
  }
  if (likeness(whole[0], whole[1], whole[2]) < delta / std::sqrt(double(shape.numel))) {
    std::fill(coefficients.begin(), coefficients.end(), coefficient(whole[2], whole[3]));
    return 2;
  }
  return 0;
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
struct Work {
  using C = headway::arithmetic_t<T>;
  T *p, *g, *m, *v;
  Shape shape;
  Rule rule;

  void gather(int64_t begin, int64_t end, double* sums, C* room) const {
    HEADWAY_CALL(gather, p, g, m, v, begin, end, shape.width, rule, sums, room);
  }
  template <bool first>
  void apply(int64_t begin, int64_t end, const C* coefficients, double decay, bool keep_u, C* room) const {
    HEADWAY_CALL(apply<first>, p, g, m, v, begin, end, shape.width, rule, coefficients, decay, keep_u, room);
  }
};

double decay_of(const Settings& set, const Rule& rule, int8_t kind) {
  if (set.weight_decay <= 0) return 0;
  const double base = set.lr * set.weight_decay * (kind ? set.wd_ratio : 1.0);
  return rule.kind == Kind::sgd ? base / (1 - rule.beta1) : base;
}

// one tensor, its chunks shared among the threads when there is more than one
template <class T>
int8_t one(const Work<T>& work, const Settings& set) {
  using C = headway::arithmetic_t<T>;
  const Shape& shape = work.shape;
  if (shape.numel == 0) return 0;
  const int64_t chunks = (shape.numel + kChunk - 1) / kChunk;
  auto each = [&](auto&& call) {
    if (chunks == 1) {
      C room[kRoom];
      call(0, room);
      return;
    }
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      C room[kRoom];
      for (int64_t c = last - 1; c >= first; c--) call(c, room);
    });
  };
  auto end_of = [&](int64_t c) { return std::min((c + 1) * kChunk, shape.numel); };
  if (shape.plain) {
    const double decay = decay_of(set, work.rule, 0);
    each([&](int64_t c, C* room) { work.template apply<true>(c * kChunk, end_of(c), nullptr, decay, false, room); });
    return 0;
  }
  std::vector<int64_t> place(chunks + 1, 0);
  for (int64_t c = 0; c < chunks; c++) {
    const int64_t rows = (end_of(c) - 1) / shape.width - c * kChunk / shape.width + 1;
    place[c + 1] = place[c] + rows;
  }
  std::vector<double> parts(4 * place[chunks], 0.0), sums;
  if (chunks == 1) {
    C room[kRoom];
    work.gather(0, shape.numel, parts.data(), room);
    sums.swap(parts);
  } else {
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      C room[kRoom];
      for (int64_t c = first; c < last; c++) work.gather(c * kChunk, end_of(c), parts.data() + 4 * place[c], room);
    });
    sums.assign(4 * shape.rows, 0.0);
    for (int64_t c = 0; c < chunks; c++) {
      const int64_t row = c * kChunk / shape.width;
      for (int64_t k = 0; k < 4 * (place[c + 1] - place[c]); k++) sums[4 * row + k] += parts[4 * place[c] + k];
    }
  }
  std::vector<C> coefficients;
  const int8_t kind = decide(sums, shape, set.delta, set.eps, coefficients);
  const bool keep_u = kind && set.in_place;
  const double decay = decay_of(set, work.rule, kind);
  // backwards: what was gathered last is still in the caches
  each([&](int64_t c, C* room) {
    work.template apply<false>(c * kChunk, end_of(c), kind ? coefficients.data() : nullptr, decay, keep_u, room);
  });
  return kind;
}

// all tensors: small ones shared among the threads as wholes, large ones one after another, their chunks shared
template <class T, class F>
void all(const Tensors& params, const Tensors& grads, const Tensors& first, const Tensors& second, const Settings& set, int8_t* kinds,
         F&& rule_of) {
  std::vector<int64_t> small;
  int64_t total = 0;
  auto run = [&](int64_t i) {
    const Work<T> work{data<T>(params[i]), data<T>(grads[i]), first.empty() ? nullptr : data<T>(first[i]),
                       second.empty() ? nullptr : data<T>(second[i]), shape_of(params[i], set.delta), rule_of(i)};
    kinds[i] = one(work, set);
  };
  const int64_t count = params.size();
  for (int64_t i = 0; i < count; i++) {
    const int64_t numel = params[i].numel();
    if (numel > kChunk)
      run(i);
    else
      small.push_back(i), total += numel + 256;
  }
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || total < 2 * 16384) {
    for (int64_t i : small) run(i);
    return;
  }
  std::vector<int64_t> cuts(threads + 1, int64_t(small.size()));
  cuts[0] = 0;
  int64_t next = 1, sum = 0;
  for (size_t k = 0; k < small.size() && next < threads; k++) {
    if (sum * threads >= next * total) cuts[next++] = k;
    sum += params[small[k]].numel() + 256;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t a, int64_t b) {
    for (int64_t t = a; t < b; t++)
      for (int64_t k = cuts[t]; k < cuts[t + 1]; k++) run(small[k]);
  });
}

template <class F>
void dispatch(const Tensors& params, F&& f) {
  switch (params[0].scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(headway::BFloat16{});
    case ScalarType::Half: return f(headway::Half{});
    default: throw std::runtime_error("the step takes float32, float64, bfloat16 or float16 parameters");
  }
}

Tensor kinds_for(const Tensors& params) {
  return torch::stable::new_zeros(params[0], {int64_t(params.size())}, ScalarType::Char);
}

Tensor adamp_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps, double lr, double beta1, double beta2,
              double eps, double weight_decay, double delta, double wd_ratio, bool nesterov, bool maximize) {
  Tensor kinds = kinds_for(params);
  const Settings set{weight_decay, delta, wd_ratio, eps, lr, false};
  dispatch(params, [&](auto zero) {
    all<decltype(zero)>(params, grads, exp_avgs, exp_avg_sqs, set, data<int8_t>(kinds), [&](int64_t i) {
      const double k = *data<float>(steps[i]) += 1;
      return Rule{Kind::adam, beta1, beta2, eps, std::sqrt(1 - std::pow(beta2, k)), lr / (1 - std::pow(beta1, k)),
                  maximize ? -1.0 : 1.0, nesterov};
    });
  });
  return kinds;
}

Tensor sgdp_(Tensors params, Tensors grads, Tensors buffers, double lr, double momentum, double dampening, double eps, double weight_decay,
             double delta, double wd_ratio, bool nesterov, bool maximize, bool official_inplace) {
  Tensor kinds = kinds_for(params);
  const Settings set{weight_decay, delta, wd_ratio, eps, lr, official_inplace && !nesterov && !buffers.empty()};
  const Rule rule{Kind::sgd, momentum, dampening, eps, 1, lr, maximize ? -1.0 : 1.0, nesterov};
  dispatch(params, [&](auto zero) {
    all<decltype(zero)>(params, grads, buffers, {}, set, data<int8_t>(kinds), [&](int64_t) { return rule; });
  });
  return kinds;
}

Tensor radial_step_(Tensors params, Tensors grads, Tensors updates, std::vector<double> steps, double decay, double delta, double wd_ratio,
                    double eps, bool keep) {
  Tensor kinds = kinds_for(params);
  const Settings set{decay, delta, wd_ratio, eps, 1, keep};
  dispatch(params, [&](auto zero) {
    all<decltype(zero)>(params, grads, updates, {}, set, data<int8_t>(kinds),
                        [&](int64_t i) { return Rule{Kind::given, 0, 0, eps, 1, steps[i]}; });
  });
  return kinds;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m) {
  m.impl("adamp_", TORCH_BOX(&adamp_));
  m.impl("sgdp_", TORCH_BOX(&sgdp_));
  m.impl("radial_step_", TORCH_BOX(&radial_step_));
}

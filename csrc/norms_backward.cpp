// CPU bodies of headway::norm_backward (layer, RMS and compressed RMS norm, with or without a residual sum) and
// headway::norm_add_norm_backward. The sums over rows are taken by every thread for itself and then added up.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#include "numbers.h"
#include "row_jobs.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// instantiated for the plain instruction set before any other is switched on
template class std::vector<float>;
template class std::vector<double>;

using headway::Backward;
using headway::Kind;
#define HEADWAY_BODY "norms_backward_body.h"
#include "isa.h"
#include "tensors.h"

namespace {
using headway::Maybe;
using headway::ScalarType;
using headway::Tensor;
using headway::data;
using headway::like;
using headway::packed;

// with what reads the gradients next, writing past the caches is a loss up to here and a gain beyond
constexpr int64_t kStreamBytes = int64_t(20) << 20;

// targets: where the sums of one job go, nullptr for those that nobody wants; two a job
template <class T>
void run(Backward<T> job, const Backward<T>* then, const Tensor* const* targets, int64_t rows) {
  using C = headway::arithmetic_t<T>;
  const int64_t n = job.n, pitch = headway::whole_lines<C>(n), kinds = then ? 4 : 2, parts = headway::parts_of(rows, rows * n);
  const bool wanted = std::any_of(targets, targets + kinds, [](const Tensor* t) { return t != nullptr; });
  std::vector<C> room(wanted ? parts * kinds * pitch + headway::kLine / sizeof(C) : 0);
  C* sums = headway::line_start(room.data());
  headway::for_parts(parts, [&](int64_t p) {
    HEADWAY_CALL(backward_rows<T>, job, then, wanted ? sums + p * kinds * pitch : nullptr, p * rows / parts, (p + 1) * rows / parts);
  });
  for (int64_t k = 0; k < kinds; k++) {
    if (!targets[k]) continue;
    C* to = data<C>(*targets[k]);
    for (int64_t p = 0; p < parts; p++) {
      const C* from = sums + (p * kinds + k) * pitch;
      for (int64_t i = 0; i < n; i++) to[i] = p ? to[i] + from[i] : from[i];
    }
  }
}

template <class T>
bool past_caches(const Tensor& x, const Tensor& gx, int64_t n, int64_t tensors) {
  return x.numel() * int64_t(sizeof(T)) * tensors >= kStreamBytes && n * sizeof(T) % 64 == 0 &&
         reinterpret_cast<uintptr_t>(gx.data_ptr()) % 64 == 0;
}

Tensor sums_for(const Tensor& x, int64_t n, bool wanted) { return headway::zeros(wanted ? n : 0, headway::wide_type(x)); }

// kind: 0 layer norm, 1 RMS norm, 2 compressed RMS norm
std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& grad_y, const Maybe& grad_h, const Tensor& given, const Tensor& stats,
                                                 const Maybe& weight, int64_t n, int64_t kind, double offset, bool want_weight,
                                                 bool want_bias) {
  const Tensor gy = packed(grad_y), x = packed(given);
  const Maybe gh = grad_h && grad_h->defined() ? Maybe(packed(*grad_h)) : std::nullopt;
  Tensor gx = like(x), gw = sums_for(x, n, want_weight), gb = sums_for(x, n, want_bias);
  if (n == 0 || x.numel() == 0) return {gx, gw, gb};
  headway::dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using C = headway::arithmetic_t<T>;
    std::vector<C> room;
    const bool past = past_caches<T>(x, gx, n, gh ? 4 : 3);
    Backward<T> job{data<T>(gy), gh ? data<T>(*gh) : nullptr, data<T>(x), data<T>(gx), headway::parameter<C>(weight, room, offset),
                    data<C>(stats), 2, n, Kind(kind), past};
    const Tensor* targets[2] = {want_weight ? &gw : nullptr, want_bias ? &gb : nullptr};
    run<T>(job, nullptr, targets, x.numel() / n);
  });
  return {gx, gw, gb};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_add_norm_backward(
    const Tensor& grad_sum, const Tensor& grad_u, const Tensor& branch, const Tensor& kept_sum, const Tensor& stats,
    const Maybe& output_weight, const Maybe& input_weight, int64_t n, bool rms, double offset, bool want_output_weight,
    bool want_output_bias, bool want_input_weight, bool want_input_bias) {
  const Tensor gs = packed(grad_sum), gu = packed(grad_u), f = packed(branch), sum = packed(kept_sum);
  Tensor gf = like(f), gx = like(f), gow = sums_for(f, n, want_output_weight), gob = sums_for(f, n, want_output_bias),
         giw = sums_for(f, n, want_input_weight), gib = sums_for(f, n, want_input_bias);
  if (n == 0 || f.numel() == 0) return {gf, gx, gow, gob, giw, gib};
  const Kind kind = rms ? Kind::rms : Kind::layer;
  headway::dispatch(f, [&](auto zero) {
    using T = decltype(zero);
    using C = headway::arithmetic_t<T>;
    std::vector<C> output_room, input_room;
    const C* kept = data<C>(stats);
    Backward<T> input{data<T>(gu), data<T>(gs), data<T>(sum), data<T>(gx), headway::parameter<C>(input_weight, input_room, offset),
                      kept + 2, 4, n, kind, false};
    Backward<T> output{data<T>(gx), nullptr, data<T>(f), data<T>(gf), headway::parameter<C>(output_weight, output_room, offset),
                       kept, 4, n, kind, past_caches<T>(f, gf, n, 6)};
    const Tensor* targets[4] = {want_input_weight ? &giw : nullptr, want_input_bias ? &gib : nullptr, want_output_weight ? &gow : nullptr,
                                want_output_bias ? &gob : nullptr};
    run<T>(input, &output, targets, f.numel() / n);
  });
  return {gf, gx, gow, gob, giw, gib};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m) {
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
  m.impl("norm_add_norm_backward", TORCH_BOX(&norm_add_norm_backward));
}

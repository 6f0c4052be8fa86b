// CPU bodies of headway::norm, layer_norm, rms_norm, crms_norm, add_norm and norm_add_norm over rows of n numbers.
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

using headway::Forward;
using headway::Kind;
#define HEADWAY_BODY "norms_body.h"
#include "isa.h"
#include "tensors.h"

namespace {
using headway::Maybe;
using headway::Tensor;
using headway::data;
using headway::like;
using headway::packed;

// From this many bytes on, read and written together, results go past the caches: they would not stay there anyway.
constexpr int64_t kStreamBytes = int64_t(20) << 20;

struct Affine {
  const Maybe &weight, &bias;
};

// y = norm(x), or with a residual h = x + residual (or norm(x) + residual with `first`), y = norm(h)
void run(const Tensor& x, const Tensor* residual, const Affine* first, const Affine& affine, const Tensor& y, const Tensor* h,
         const Tensor* stats, int64_t n, double eps, Kind kind, double offset) {
  if (n == 0 || x.numel() == 0) return;
  const int64_t rows = x.numel() / n;
  headway::dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using C = headway::arithmetic_t<T>;
    std::vector<C> room[4];
    auto gains = [&](const Affine& given, int at, const C*& w, const C*& b) {
      w = headway::parameter<C>(given.weight, room[at], offset), b = headway::parameter<C>(given.bias, room[at + 1]);
      if (b && !w) room[at].assign(n, C(1)), w = room[at].data();
    };
    Forward<T> job{};
    gains(affine, 0, job.w, job.b);
    job.first_norm = first != nullptr;
    if (first) gains(*first, 2, job.first_w, job.first_b);
    job.x = data<T>(x), job.residual = data<T>(residual), job.y = data<T>(y), job.h = data<T>(h);
    job.stats = stats && stats->numel() ? data<C>(*stats) : nullptr;
    job.n = n, job.eps = eps, job.kind = kind;
    const int64_t bytes = x.numel() * int64_t(sizeof(T)) * (residual ? 4 : 2);
    job.past_caches = bytes >= kStreamBytes && n * sizeof(T) % 64 == 0 && reinterpret_cast<uintptr_t>(job.y) % 64 == 0;
    job.at_once = std::is_same_v<T, headway::BFloat16> && headway::rounds_bfloat16();
    const int64_t parts = headway::parts_of(rows, x.numel());
    headway::for_parts(parts, [&](int64_t p) { HEADWAY_CALL(forward_rows<T>, job, p * rows / parts, (p + 1) * rows / parts); });
  });
}

Tensor stats_for(const Tensor& x, int64_t n, int64_t each, bool keep) {
  return headway::matrix(keep && n ? x.numel() / n : 0, each, headway::wide_type(x));
}

std::tuple<Tensor, Tensor> measured(const Tensor& given, const Maybe& weight, const Maybe& bias, int64_t n, double eps, Kind kind,
                                    double offset) {
  const Tensor x = packed(given);
  Tensor y = like(x), stats = stats_for(x, n, 2, true);
  run(x, nullptr, nullptr, {weight, bias}, y, nullptr, &stats, n, eps, kind, offset);
  return {y, stats};
}

// kind: 0 layer norm, 1 RMS norm, 2 compressed RMS norm
Tensor norm(const Tensor& given, const Maybe& weight, const Maybe& bias, int64_t n, double eps, int64_t kind, double offset) {
  const Tensor x = packed(given);
  Tensor y = like(x);
  run(x, nullptr, nullptr, {weight, bias}, y, nullptr, nullptr, n, eps, Kind(kind), offset);
  return y;
}
std::tuple<Tensor, Tensor> layer_norm(const Tensor& x, const Maybe& weight, const Maybe& bias, int64_t n, double eps) {
  return measured(x, weight, bias, n, eps, Kind::layer, 0);
}
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Maybe& weight, const Maybe& bias, int64_t n, double eps, double offset) {
  return measured(x, weight, bias, n, eps, Kind::rms, offset);
}
std::tuple<Tensor, Tensor> crms_norm(const Tensor& z, double eps) {
  return measured(z, std::nullopt, std::nullopt, z.size(-1), eps, Kind::compressed, 0);
}
void layer_norm_out(const Tensor& x, const Maybe& weight, const Maybe& bias, int64_t n, double eps, Tensor y) {
  run(x, nullptr, nullptr, {weight, bias}, y, nullptr, nullptr, n, eps, Kind::layer, 0);
}
void rms_norm_out(const Tensor& x, const Maybe& weight, const Maybe& bias, int64_t n, double eps, double offset, Tensor y) {
  run(x, nullptr, nullptr, {weight, bias}, y, nullptr, nullptr, n, eps, Kind::rms, offset);
}

std::tuple<Tensor, Tensor, Tensor> add_norm(const Tensor& a, const Tensor& b, const Maybe& weight, const Maybe& bias, int64_t n, double eps,
                                            bool rms, double offset, bool keep) {
  const Tensor x = packed(a), residual = packed(b);
  Tensor y = like(x), h = like(x), stats = stats_for(x, n, 2, keep);
  run(x, &residual, nullptr, {weight, bias}, y, &h, &stats, n, eps, rms ? Kind::rms : Kind::layer, offset);
  return {y, h, stats};
}

std::tuple<Tensor, Tensor, Tensor> norm_add_norm(const Tensor& branch, const Tensor& stream, const Maybe& output_weight,
                                                 const Maybe& output_bias, const Maybe& input_weight, const Maybe& input_bias, int64_t n,
                                                 double eps, bool rms, double offset, bool keep) {
  const Tensor f = packed(branch), x = packed(stream);
  Tensor u = like(f), sum = like(f), stats = stats_for(f, n, 4, keep);
  const Affine first{output_weight, output_bias};
  run(f, &x, &first, {input_weight, input_bias}, u, &sum, &stats, n, eps, rms ? Kind::rms : Kind::layer, offset);
  return {sum, u, stats};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m) {
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("crms_norm", TORCH_BOX(&crms_norm));
  m.impl("layer_norm_out", TORCH_BOX(&layer_norm_out));
  m.impl("rms_norm_out", TORCH_BOX(&rms_norm_out));
  m.impl("add_norm", TORCH_BOX(&add_norm));
  m.impl("norm_add_norm", TORCH_BOX(&norm_add_norm));
}

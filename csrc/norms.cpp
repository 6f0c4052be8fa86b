// CPU bodies of headway::layer_norm, rms_norm and add_norm, forward and backward, over the last n numbers or over channels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <vector>

#include "numbers.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// instantiated for the plain instruction set before any other is switched on
template class std::vector<float>;
template class std::vector<double>;

#define HEADWAY_BODY "norms_body.h"
#include "isa.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

namespace {
// beyond this many bytes of output, stores go past the caches
constexpr int64_t kStreamBytes = int64_t(24) << 20;
constexpr int64_t kGrain = 16384;

template <class C>
constexpr ScalarType scalar_type() {
  return std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float;
}

// weight or bias in the arithmetic type, with the gain offset added; `room` keeps a converted copy alive
template <class C>
const C* parameter(const Maybe& given, std::vector<C>& room, double offset = 0) {
  if (!given || !given->defined()) return nullptr;
  const Tensor& p = *given;
  if (p.scalar_type() == scalar_type<C>() && offset == 0) return static_cast<const C*>(p.data_ptr());
  const int64_t n = p.numel();
  room.resize(n);
  for (int64_t i = 0; i < n; i++) {
    double value;
    switch (p.scalar_type()) {
      case ScalarType::Float: value = static_cast<const float*>(p.data_ptr())[i]; break;
      case ScalarType::Double: value = static_cast<const double*>(p.data_ptr())[i]; break;
      case ScalarType::BFloat16: {
        uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(p.data_ptr())[i]) << 16;
        float f;
        std::memcpy(&f, &bits, 4);
        value = f;
        break;
      }
      case ScalarType::Half: value = isa_base::half_to_float(static_cast<const uint16_t*>(p.data_ptr())[i]); break;
      default: throw std::runtime_error("weight and bias must be floating point");
    }
    room[i] = static_cast<C>(value + offset);
  }
  return room.data();
}

template <class F>
void dispatch(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(headway::BFloat16{});
    case ScalarType::Half: return f(headway::Half{});
    default: throw std::runtime_error("normalisation takes float32, float64, bfloat16 or float16");
  }
}

// memory straight from the allocator: on small tensors the dispatcher's way there would cost more than the norm itself
Tensor allocate(const int64_t* sizes, int64_t dims, ScalarType type) {
  int64_t strides[16], step = 1;
  for (int64_t d = dims - 1; d >= 0; d--) strides[d] = step, step *= std::max<int64_t>(1, sizes[d]);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, static_cast<int32_t>(type), 0, 0, &handle));
  return Tensor(handle);
}
Tensor like(const Tensor& x) {
  auto sizes = x.sizes();
  if (sizes.size() > 16) return torch::stable::empty_like(x);
  return allocate(sizes.data(), sizes.size(), x.scalar_type());
}

Tensor stats_like(const Tensor& x, int64_t rows, bool keep) {
  const int64_t sizes[2] = {keep ? rows : 0, 2};
  return allocate(sizes, 2, x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

void run_forward(const Tensor& x, const Tensor* residual, const Maybe& weight, const Maybe& bias, const Tensor& y, const Tensor* h,
                 const Tensor* stats, int64_t n, double eps, bool rms, double offset) {
  if (n == 0 || x.numel() == 0) return;
  const int64_t rows = x.numel() / n;
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using C = headway::arithmetic_t<T>;
    std::vector<C> wroom, broom;
    const C *w = parameter<C>(weight, wroom, offset), *b = parameter<C>(bias, broom);
    if (b && !w) wroom.assign(n, C(1)), w = wroom.data();
    const bool stream = std::is_same_v<T, float> && n % 16 == 0 && x.numel() * int64_t(sizeof(T)) >= kStreamBytes &&
                        reinterpret_cast<uintptr_t>(y.data_ptr()) % 64 == 0;
    C* kept = stats && stats->numel() ? data<C>(*stats) : nullptr;
    auto work = [&](int64_t first, int64_t last) {
      HEADWAY_CALL(forward_rows<T>, data<T>(x), residual ? data<T>(*residual) : nullptr, w, b, data<T>(y), h ? data<T>(*h) : nullptr,
                   kept, first, last, n, eps, rms, stream);
    };
    if (x.numel() <= kGrain) work(0, rows);
    else torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / n), work);
  });
}

template <class C>
void add_up(std::vector<C>& partial, int64_t parts, int64_t n, C* target, int64_t which) {
  for (int64_t i = 0; i < n; i++) {
    C total = 0;
    for (int64_t p = 0; p < parts; p++) total += partial[(2 * p + which) * n + i];
    target[i] = total;
  }
}

std::tuple<Tensor, Tensor, Tensor> run_backward(const Tensor& gy, const Tensor* gh, const Tensor& x, const Tensor& stats,
                                                const Maybe& weight, int64_t n, bool rms, double offset, bool want_weight,
                                                bool want_bias) {
  Tensor gx = like(x);
  ScalarType type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor gw = torch::stable::new_zeros(x, {want_weight ? n : 0}, type), gb = torch::stable::new_zeros(x, {want_bias ? n : 0}, type);
  if (n == 0 || x.numel() == 0) return {gx, gw, gb};
  const int64_t rows = x.numel() / n;
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using C = headway::arithmetic_t<T>;
    std::vector<C> wroom;
    const C* w = parameter<C>(weight, wroom, offset);
    const bool sums = want_weight || want_bias;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>({threads, rows, x.numel() / kGrain}));
    const bool direct = parts == 1 && want_weight && want_bias;
    std::vector<C> partial(sums && !direct ? 2 * parts * n : 0);
    auto work = [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; p++) {
        C* pw = !sums ? nullptr : direct ? data<C>(gw) : partial.data() + 2 * p * n;
        C* pb = !sums ? nullptr : direct ? data<C>(gb) : pw + n;
        HEADWAY_CALL(backward_rows<T>, data<T>(gy), gh ? data<T>(*gh) : nullptr, data<T>(x), w, data<C>(stats), data<T>(gx), pw, pb,
                     p * rows / parts, (p + 1) * rows / parts, n, rms);
      }
    };
    if (parts == 1) work(0, 1);
    else torch::stable::parallel_for(0, parts, 1, work);
    if (want_weight && !direct) add_up(partial, parts, n, data<C>(gw), 0);
    if (want_bias && !direct) add_up(partial, parts, n, data<C>(gb), 1);
  });
  return {gx, gw, gb};
}

Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

std::tuple<Tensor, Tensor> norm(const Tensor& given, const Maybe& weight, const Maybe& bias, int64_t n, double eps, bool rms, double offset,
                                bool keep) {
  const Tensor x = packed(given);
  Tensor y = like(x), stats = stats_like(x, n ? x.numel() / n : 0, keep);
  run_forward(x, nullptr, weight, bias, y, nullptr, &stats, n, eps, rms, offset);
  return {y, stats};
}

void norm_out(const Tensor& x, const Maybe& weight, const Maybe& bias, int64_t n, double eps, bool rms, double offset, Tensor y) {
  run_forward(x, nullptr, weight, bias, y, nullptr, nullptr, n, eps, rms, offset);
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& gy, const Tensor& x, const Tensor& stats, const Maybe& weight, int64_t n,
                                                 bool rms, double offset, bool want_weight, bool want_bias) {
  return run_backward(packed(gy), nullptr, packed(x), stats, weight, n, rms, offset, want_weight, want_bias);
}

std::tuple<Tensor, Tensor, Tensor> add_norm(const Tensor& a, const Tensor& b, const Maybe& weight, const Maybe& bias, int64_t n, double eps,
                                            bool rms, double offset, bool keep) {
  const Tensor x = packed(a), residual = packed(b);
  Tensor y = like(x), h = like(x), stats = stats_like(x, n ? x.numel() / n : 0, keep);
  run_forward(x, &residual, weight, bias, y, &h, &stats, n, eps, rms, offset);
  return {y, h, stats};
}

std::tuple<Tensor, Tensor, Tensor> add_norm_backward(const Tensor& gy, const Tensor& gh, const Tensor& h, const Tensor& stats,
                                                     const Maybe& weight, int64_t n, bool rms, double offset, bool want_weight,
                                                     bool want_bias) {
  const Tensor kept = packed(gh);
  return run_backward(packed(gy), &kept, packed(h), stats, weight, n, rms, offset, want_weight, want_bias);
}

constexpr int64_t kTile = 256;

std::tuple<Tensor, Tensor> channel_norm(const Tensor& given, const Maybe& weight, const Maybe& bias, double eps, bool rms, bool keep) {
  const Tensor x = packed(given);
  const int64_t samples = x.size(0), channels = x.size(1), space = x.size(2), tiles = (space + kTile - 1) / kTile;
  Tensor y = like(x), stats = stats_like(x, samples * space, keep);
  if (x.numel() == 0) return {y, stats};
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using C = headway::arithmetic_t<T>;
    std::vector<C> wroom, broom;
    const C *w = parameter<C>(weight, wroom), *b = parameter<C>(bias, broom);
    C* kept = stats.numel() ? data<C>(stats) : nullptr;
    torch::stable::parallel_for(0, samples * tiles, std::max<int64_t>(1, kGrain / (channels * kTile)), [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; t++) {
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
  Tensor gx = like(x);
  ScalarType type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor gw = torch::stable::new_zeros(x, {want_weight ? channels : 0}, type);
  Tensor gb = torch::stable::new_zeros(x, {want_bias ? channels : 0}, type);
  if (x.numel() == 0) return {gx, gw, gb};
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using C = headway::arithmetic_t<T>;
    std::vector<C> wroom;
    const C* w = parameter<C>(weight, wroom);
    const int64_t total = samples * tiles;
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>({int64_t(torch::stable::get_num_threads()), total, x.numel() / kGrain}));
    std::vector<C> partial(2 * parts * channels);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; p++)
        for (int64_t t = p * total / parts; t < (p + 1) * total / parts; t++) {
          const int64_t from = (t % tiles) * kTile;
          C* pw = partial.data() + 2 * p * channels;
          HEADWAY_CALL(channel_backward_rows<T>, data<T>(gy), data<T>(x), w, data<C>(stats), data<T>(gx), want_weight ? pw : nullptr,
                       want_bias ? pw + channels : nullptr, t / tiles, from, std::min(space, from + kTile), channels, space, rms);
        }
    });
    if (want_weight) add_up(partial, parts, channels, data<C>(gw), 0);
    if (want_bias) add_up(partial, parts, channels, data<C>(gb), 1);
  });
  return {gx, gw, gb};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m) {
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("norm_out", TORCH_BOX(&norm_out));
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
  m.impl("add_norm", TORCH_BOX(&add_norm));
  m.impl("add_norm_backward", TORCH_BOX(&add_norm_backward));
  m.impl("channel_norm", TORCH_BOX(&channel_norm));
  m.impl("channel_norm_backward", TORCH_BOX(&channel_norm_backward));
}

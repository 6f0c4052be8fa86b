// CPU bodies of headway::recurrent_scan and recurrent_scan_backward: the time loop of a layer-normalised LSTM, GRU or plain
// recurrent layer and back-propagation through it. The batch is split over the threads; the recurrent matrix is packed once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

// instantiated for the plain instruction set before any other is switched on
template class std::vector<float>;
template class std::vector<double>;

namespace {
// kind: 0 LSTM, 1 GRU, 2 plain; cell_norm: 0 none, 1 output, 2 recurrent
template <class C>
struct Run {
  int64_t T, B, H, G, kind, cell_norm, segments;
  int64_t bounds[5];
  bool norm, reverse, relu, keep, low;
  C eps;
  C* p;
  const C *h0, *c0, *packed, *gain_in, *offset_in, *gain_rec, *offset_rec, *gain_cell, *offset_cell;
  const int64_t* lengths;
  C *h, *c, *raw, *z, *stats_in, *stats_rec, *stats_cell;
  const C* gh;
  C *dh, *dc, *dz;
};
}  // namespace

#define HEADWAY_BODY "recurrent_body.h"
#include "isa.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

namespace {
template <class C>
C* data(const Tensor& t) {
  return static_cast<C*>(t.data_ptr());
}

template <class F>
auto dispatch(const Tensor& x, F&& f) {
  if (x.scalar_type() == ScalarType::Float) return f(float{});
  if (x.scalar_type() == ScalarType::Double) return f(double{});
  throw std::runtime_error("the recurrent scan takes float32 or float64");
}

// gate_norm: 0 none, 1 joint, 2 one norm a gate
template <class C>
Run<C> describe(const Tensor& p, const Tensor& h0, const Tensor& gains, const Tensor& cell, const Maybe& lengths, int64_t kind,
                int64_t gate_norm, int64_t cell_norm, double eps, bool reverse, bool relu) {
  Run<C> s{};
  s.T = p.size(0), s.B = p.size(1), s.H = h0.size(1), s.G = kind == 0 ? 4 : kind == 1 ? 3 : 1;
  s.kind = kind, s.cell_norm = cell_norm, s.norm = gate_norm != 0, s.reverse = reverse, s.relu = relu;
  s.eps = static_cast<C>(eps);
  if (gate_norm == 2) {
    s.segments = s.G;
    for (int64_t k = 0; k <= s.G; k++) s.bounds[k] = k * s.H;
  } else if (kind == 1) {
    s.segments = 2, s.bounds[1] = 2 * s.H, s.bounds[2] = 3 * s.H;
  } else {
    s.segments = 1, s.bounds[1] = s.G * s.H;
  }
  const int64_t GH = s.G * s.H;
  s.p = data<C>(p);
  s.gain_in = data<C>(gains), s.offset_in = s.gain_in + GH, s.gain_rec = s.gain_in + 2 * GH, s.offset_rec = s.gain_in + 3 * GH;
  s.gain_cell = data<C>(cell), s.offset_cell = s.gain_cell + s.H;
  s.lengths = lengths && lengths->defined() ? data<int64_t>(*lengths) : nullptr;
  return s;
}

// what is not normalised has no gain (and an unnormalised cell no offset)
template <class C>
void neutral(Run<C>& s, std::vector<C>& room) {
  const int64_t GH = s.G * s.H;
  room.assign(GH + s.H, C(1));
  std::fill(room.begin() + GH, room.end(), C(0));
  if (!s.norm) s.gain_in = s.gain_rec = room.data();
  if (!s.cell_norm) s.gain_cell = room.data(), s.offset_cell = room.data() + GH;
}

int64_t packed_size(int64_t K, int64_t N, int64_t bytes_each) {
  const int64_t columns = HEADWAY_CALL(panel_columns, bytes_each);
  return (N + columns - 1) / columns * columns * K;
}

// rows a thread takes: the batch is cut only where every part has work worth a thread
int64_t rows_a_part(int64_t B, int64_t work_a_row) {
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t least = std::max<int64_t>(1, 200000 / std::max<int64_t>(1, work_a_row));
  return std::max((B + threads - 1) / threads, least);
}

// -> h (T,B,H), c (T,B,H), last c (B,H), z, stats of P and Z (T,B,2*segments), stats of the cell (T,B,2), raw cell
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan(
    const Tensor& p, const Tensor& h0, const Tensor& c0, const Tensor& weight, const Tensor& gains, const Tensor& cell,
    const Maybe& lengths, int64_t kind, int64_t gate_norm, int64_t cell_norm, double eps, bool reverse, bool relu, bool low,
    bool keep) {
  return dispatch(p, [&](auto zero) {
    using C = decltype(zero);
    Run<C> s = describe<C>(p, h0, gains, cell, lengths, kind, gate_norm, cell_norm, eps, reverse, relu);
    const int64_t T = s.T, B = s.B, H = s.H, GH = s.G * H, none = 0, K = 2 * s.segments;
    s.keep = keep, s.low = low;
    std::vector<C> plain;
    neutral(s, plain);
    auto make = [&](int64_t a, int64_t b, int64_t n) { return torch::stable::new_empty(p, {a, b, n}); };
    Tensor h = make(T, B, H), c = kind == 0 ? make(T, B, H) : make(none, B, H), z = make(keep ? T : 1, B, GH);
    Tensor stats_in = make(T, B, K), stats_rec = make(T, B, K), stats_cell = kind == 0 ? make(T, B, 2) : make(none, B, 2);
    Tensor raw = kind == 0 && cell_norm == 2 ? make(T, B, H) : make(none, B, H);
    Tensor last = torch::stable::new_empty(p, {kind == 0 ? B : 0, H});
    s.h0 = data<C>(h0), s.c0 = data<C>(c0);
    s.h = data<C>(h), s.c = data<C>(c), s.z = data<C>(z), s.raw = data<C>(raw);
    s.stats_in = data<C>(stats_in), s.stats_rec = data<C>(stats_rec), s.stats_cell = data<C>(stats_cell);
    // what the loop leaves out (padded steps, the input norm of a plain network) is zero, not whatever the memory held
    if (s.lengths || kind == 2)
      for (const Tensor* kept : {&stats_in, &stats_rec, &stats_cell, &raw})
        std::fill(data<C>(*kept), data<C>(*kept) + kept->numel(), C(0));
    if (B > 0 && H > 0 && T > 0) {
      std::vector<C> packed(packed_size(H, GH, sizeof(C)));
      HEADWAY_CALL(pack<C>, data<C>(weight), H, GH, true, packed.data());
      s.packed = packed.data();
      const int64_t rows = rows_a_part(B, T * H * (GH + 60)), parts = (B + rows - 1) / rows;
      auto work = [&](int64_t from, int64_t to) {
        for (int64_t part = from; part < to; part++) {
          const int64_t first = part * rows, end = std::min(B, first + rows);
          std::vector<C> room(2 * GH + (low ? (end - first) * H : 0));
          HEADWAY_CALL(forward<C>, s, first, end, room.data());
        }
      };
      if (parts == 1) work(0, 1);
      else torch::stable::parallel_for(0, parts, 1, work);
      if (kind == 0) {
        const C* from = s.c + (reverse ? 0 : (T - 1) * B * H);
        std::copy(from, from + B * H, data<C>(last));
      }
    }
    return std::make_tuple(h, c, last, z, stats_in, stats_rec, stats_cell, raw);
  });
}

// p is overwritten by its gradient; -> dz (T,B,GH), dh0, dc0 (B,H), grads of gains (4,GH) and of the cell's (2,H)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward(
    const Tensor& gh, const Tensor& gc, Tensor p, const Tensor& h0, const Tensor& c0, const Tensor& weight, const Tensor& gains,
    const Tensor& cell, const Maybe& lengths, const Tensor& h, const Tensor& c, const Tensor& z, const Tensor& stats_in,
    const Tensor& stats_rec, const Tensor& stats_cell, const Tensor& raw, int64_t kind, int64_t gate_norm, int64_t cell_norm,
    double eps, bool reverse, bool relu) {
  return dispatch(p, [&](auto zero) {
    using C = decltype(zero);
    Run<C> s = describe<C>(p, h0, gains, cell, lengths, kind, gate_norm, cell_norm, eps, reverse, relu);
    const int64_t B = s.B, H = s.H, GH = s.G * H;
    std::vector<C> plain;
    neutral(s, plain);
    Tensor dz = torch::stable::new_empty(p, {s.T, B, GH}), dh = torch::stable::new_empty(p, {B, H});
    Tensor dc = torch::stable::new_empty(p, {B, H});
    Tensor dgains = torch::stable::new_empty(p, {4, GH}), dcell = torch::stable::new_empty(p, {2, H});
    s.h0 = data<C>(h0), s.c0 = data<C>(c0), s.gh = data<C>(gh);
    s.h = data<C>(h), s.c = data<C>(c), s.z = data<C>(z), s.raw = data<C>(raw);
    s.stats_in = data<C>(stats_in), s.stats_rec = data<C>(stats_rec), s.stats_cell = data<C>(stats_cell);
    s.dh = data<C>(dh), s.dc = data<C>(dc), s.dz = data<C>(dz);
    std::fill(s.dh, s.dh + B * H, C(0));
    if (kind == 0 && gc.numel() == B * H) std::copy(data<C>(gc), data<C>(gc) + B * H, s.dc);
    else std::fill(s.dc, s.dc + B * H, C(0));
    const int64_t width = 4 * GH + 2 * H;
    std::fill(data<C>(dgains), data<C>(dgains) + 4 * GH, C(0));
    std::fill(data<C>(dcell), data<C>(dcell) + 2 * H, C(0));
    if (B > 0 && H > 0 && s.T > 0) {
      std::vector<C> packed(packed_size(GH, H, sizeof(C)));
      HEADWAY_CALL(pack<C>, data<C>(weight), GH, H, false, packed.data());
      s.packed = packed.data();
      const int64_t rows = rows_a_part(B, s.T * H * (GH + 90)), parts = (B + rows - 1) / rows;
      std::vector<C> grads(parts * width, C(0));
      auto work = [&](int64_t from, int64_t to) {
        for (int64_t part = from; part < to; part++) {
          const int64_t first = part * rows, end = std::min(B, first + rows);
          std::vector<C> room(4 * GH + H + (end - first) * H);
          HEADWAY_CALL(backward<C>, s, first, end, grads.data() + part * width, room.data());
        }
      };
      if (parts == 1) work(0, 1);
      else torch::stable::parallel_for(0, parts, 1, work);
      for (int64_t part = 0; part < parts; part++) {
        const C* from = grads.data() + part * width;
        for (int64_t j = 0; j < 4 * GH; j++) data<C>(dgains)[j] += from[j];
        for (int64_t j = 0; j < 2 * H; j++) data<C>(dcell)[j] += from[4 * GH + j];
      }
    }
    return std::make_tuple(dz, dh, dc, dgains, dcell);
  });
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m) {
  m.impl("recurrent_scan", TORCH_BOX(&scan));
  m.impl("recurrent_scan_backward", TORCH_BOX(&scan_backward));
}

// What the row kernels share on the way from a Tensor to its memory: number types, parameters, parts for the threads.
// Included after isa.h by a kernel whose body includes rows.h.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "memory.h"
#include "numbers.h"

namespace headway {
// numbers below which a second thread costs more than it saves
constexpr int64_t kGrain = 16384;

template <class F>
void dispatch(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default: throw std::runtime_error("the kernel takes float32, float64, bfloat16 or float16");
  }
}

// weight or bias in the arithmetic type, with the gain offset added; `room` keeps a converted copy alive
template <class C>
const C* parameter(const Maybe& given, std::vector<C>& room, double offset = 0) {
  if (!given || !given->defined()) return nullptr;
  const Tensor& p = *given;
  const bool same = p.scalar_type() == (std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float);
  if (same && offset == 0 && p.is_contiguous()) return data<C>(p);
  const Tensor source = packed(p);
  room.resize(p.numel() + kLine / sizeof(C));
  C* to = line_start(room.data());
  dispatch(source, [&](auto zero) { HEADWAY_CALL(convert, data<decltype(zero)>(source), to, p.numel(), offset); });
  return to;
}

// work(part) for every part, in threads where there are several
template <class F>
void for_parts(int64_t parts, F&& work) {
  if (parts == 1) return work(0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; p++) work(p);
  });
}
inline int64_t parts_of(int64_t rows, int64_t numbers) {
  const int64_t threads = numbers < 2 * kGrain ? 1 : torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min<int64_t>({threads, rows, numbers / kGrain}));
}
}  // namespace headway

// What the kernels share on the way from a Tensor to its memory: number types, contiguous copies, fresh results, parameters.
// Included after isa.h by a kernel whose body includes rows.h.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "numbers.h"

namespace headway {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// numbers below which a second thread costs more than it saves
constexpr int64_t kGrain = 16384;
// results from here on ask the kernel for huge pages: a fresh one is otherwise mapped 4 KiB at a time, which costs several
// times what computing it does
constexpr int64_t kHugeBytes = int64_t(8) << 20;

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

inline ScalarType wide_type(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}
template <class T>
T* data(const Tensor* t) {
  return t ? data<T>(*t) : nullptr;
}

inline Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// memory straight from the allocator: on small tensors the dispatcher's way there would cost more than the norm itself
inline Tensor allocate(const int64_t* sizes, int64_t dims, ScalarType type) {
  int64_t strides[16], step = 1;
  for (int64_t d = dims - 1; d >= 0; d--) strides[d] = step, step *= std::max<int64_t>(1, sizes[d]);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, static_cast<int32_t>(type), 0, 0, &handle));
  return Tensor(handle);
}
inline Tensor like(const Tensor& x) {
  auto sizes = x.sizes();
  Tensor y = sizes.size() > 16 ? torch::stable::empty_like(x) : allocate(sizes.data(), sizes.size(), x.scalar_type());
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const int64_t bytes = y.numel() * (y.scalar_type() == ScalarType::Double ? 8 : y.scalar_type() == ScalarType::Float ? 4 : 2);
  if (bytes >= kHugeBytes) {
    const uintptr_t start = (reinterpret_cast<uintptr_t>(y.data_ptr()) + 4095) & ~uintptr_t(4095);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(y.data_ptr()) + bytes) & ~uintptr_t(4095);
    madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);  // advice: it may be refused
  }
#endif
  return y;
}
inline Tensor matrix(int64_t rows, int64_t columns, ScalarType type) {
  const int64_t sizes[2] = {rows, columns};
  return allocate(sizes, 2, type);
}
inline Tensor zeros(int64_t n, ScalarType type) {
  Tensor t = allocate(&n, 1, type);
  if (n) std::memset(t.data_ptr(), 0, n * (type == ScalarType::Double ? 8 : 4));
  return t;
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

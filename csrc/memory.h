// Contiguous copies of what a kernel reads and room for what it returns.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>

namespace headway {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// results from here on ask the kernel for huge pages: a fresh one is otherwise mapped 4 KiB at a time, which costs several
// times what computing it does
constexpr int64_t kHugeBytes = int64_t(8) << 20;

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
inline Tensor vector(int64_t n, ScalarType type) { return allocate(&n, 1, type); }
inline Tensor zeros(int64_t n, ScalarType type) {
  Tensor t = vector(n, type);
  if (n) std::memset(t.data_ptr(), 0, n * (type == ScalarType::Double ? 8 : 4));
  return t;
}
}  // namespace headway

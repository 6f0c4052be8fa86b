// CPU body of headway::color_blocks_float: group-wise colouring and the Gram matrices of float32 features in one pass.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <vector>

#define HEADWAY_BODY "blocks_body.h"
#include "isa.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {
Tensor packed(const Tensor& t) {
  if (t.scalar_type() != ScalarType::Float) throw std::runtime_error("color_blocks_float takes float32");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

const float* numbers(const Tensor& t) { return static_cast<const float*>(t.data_ptr()); }

// x (K, n, P), mean and shift (K, n), change (K, n, n)
std::tuple<Tensor, Tensor> color_blocks(const Tensor& given, const Tensor& centre, const Tensor& change, const Tensor& more) {
  const Tensor x = packed(given), mean = packed(centre), A = packed(change), shift = packed(more);
  const auto sizes = x.sizes();
  const int64_t blocks = sizes[0], n = sizes[1], count = sizes[2];
  if (mean.numel() != blocks * n || shift.numel() != blocks * n || A.numel() != blocks * n * n)
    throw std::runtime_error("color_blocks_float: the shapes do not fit");
  Tensor y = torch::stable::empty_like(x), products = torch::stable::empty_like(A);
  float *to = static_cast<float*>(y.data_ptr()), *sums = static_cast<float*>(products.data_ptr());
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    std::vector<float> room(HEADWAY_CALL(room_for, n));
    for (int64_t k = first; k < last; k++)
      HEADWAY_CALL(color_block, numbers(x) + k * n * count, numbers(mean) + k * n, numbers(A) + k * n * n, numbers(shift) + k * n,
                   to + k * n * count, sums + k * n * n, n, count, room.data());
  });
  return {y, products};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m) { m.impl("color_blocks_float", TORCH_BOX(&color_blocks)); }

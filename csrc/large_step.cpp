// CPU body of headway::margins_and_step: one iteration of (Normalized) LR+GD in one reading of the data.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <vector>

#include "numbers.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headway {
// how wrong a row is: one or nothing by the sign of its margin, its probability, or that over the sum of all
enum class Weigh { sign, plain, normalised };
}  // namespace headway

// instantiated for the plain instruction set before any other is switched on
template class std::vector<double>;

#define HEADWAY_BODY "large_step_body.h"
#include "isa.h"
#include "tensors.h"

using namespace headway;

namespace {
std::tuple<Tensor, Tensor> margins_and_step(const Tensor& given, const Tensor& direction, double gamma, bool normalized) {
  if (given.scalar_type() != ScalarType::Double || direction.scalar_type() != ScalarType::Double || given.dim() != 2 ||
      direction.dim() != 1 || direction.size(0) != given.size(1))
    throw std::runtime_error("rows (n, d) and a direction (d,) in float64 are wanted");
  const Tensor Z = packed(given), u = packed(direction);
  const int64_t n = Z.size(0), d = Z.size(1);
  const Weigh way = std::isinf(gamma) ? Weigh::sign : normalized ? Weigh::normalised : Weigh::plain;
  const int64_t sizes[2] = {n, d};
  Tensor margins = allocate(sizes, 1, ScalarType::Double), step = zeros(d, ScalarType::Double);
  const int64_t parts = parts_of(n, n * d);
  std::vector<double> steps(parts * d), totals(parts), tops(parts, -std::numeric_limits<double>::infinity());
  for_parts(parts, [&](int64_t p) {
    const int64_t first = p * n / parts, last = (p + 1) * n / parts;
    HEADWAY_CALL(sweep, data<double>(Z) + first * d, data<double>(u), last - first, d, gamma, way, data<double>(margins) + first,
                 steps.data() + p * d, totals[p], tops[p]);
  });
  double top = *std::max_element(tops.begin(), tops.end()), total = 0;
  std::vector<double> factors(parts, 1.0);
  for (int64_t p = 0; p < parts; p++) {
    if (way == Weigh::normalised) factors[p] = tops[p] == top ? 1.0 : std::exp(tops[p] - top);
    total += factors[p] * totals[p];
  }
  const double by = normalized && total != 0 ? total : double(n);
  double* to = data<double>(step);
  for (int64_t p = 0; p < parts; p++)
    for (int64_t j = 0; j < d; j++) to[j] += factors[p] * steps[p * d + j];
  for (int64_t j = 0; j < d; j++) to[j] /= by;
  return {margins, step};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m) { m.impl("margins_and_step", TORCH_BOX(&margins_and_step)); }

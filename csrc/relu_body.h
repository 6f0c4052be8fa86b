// ReLU and the bits of what it lets through. NaN counts as let through, as torch's own ReLU has it.

#include "bits_body.h"

// y[i] = x[i] <= 0 ? 0 : x[i] for up to 64 entries; the bits of those let through
template <class A>
static inline uint64_t positive(const A* x, A* y, int64_t n) {
  uint64_t bits = 0;
  int64_t i = 0;
#if HEADWAY_LEVEL >= 2
  if constexpr (std::is_same_v<A, float>) {
    for (; i + 16 <= n; i += 16) {
      const __m512 v = _mm512_loadu_ps(x + i);
      const __mmask16 up = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ);
      _mm512_storeu_ps(y + i, _mm512_maskz_mov_ps(up, v));
      bits |= static_cast<uint64_t>(up) << i;
    }
  }
#elif HEADWAY_LEVEL >= 1
  if constexpr (std::is_same_v<A, float>) {
    for (; i + 8 <= n; i += 8) {
      const __m256 v = _mm256_loadu_ps(x + i), up = _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ);
      _mm256_storeu_ps(y + i, _mm256_and_ps(v, up));
      bits |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_ps(up))) << i;
    }
  }
#endif
  for (; i < n; i++) {
    const bool up = !(x[i] <= 0);
    bits |= static_cast<uint64_t>(up) << i;
    y[i] = up ? x[i] : A(0);
  }
  return bits;
}

// bytes first .. last of the bits belong to the entries 8 * first .. 8 * last; x and y may be the same memory
template <class T>
static void relu(const T* x, T* y, uint8_t* bits, int64_t first, int64_t last, int64_t n) {
  using A = arithmetic_t<T>;
  A room[kBlock], out[kBlock];
  for (int64_t byte = first; byte < last; byte += 8) {
    const int64_t start = 8 * byte, bytes = std::min<int64_t>(8, last - byte), count = std::min<int64_t>(8 * bytes, n - start);
    const A* from = widen(x + start, room, count);
    uint64_t word;
    if constexpr (std::is_same_v<T, A>) {
      word = positive<A>(from, y + start, count);
    } else {
      word = positive<A>(from, out, count);
      store_row(out, y + start, count);
    }
    std::memcpy(bits + byte, &word, bytes);
  }
}

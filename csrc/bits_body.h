// One bit an entry: sixty-four entries at a time, whose bits are eight bytes, the first entry in the lowest bit.
// Part of a kernel body (see isa.h), so it is included once an instruction set.

#include "rows.h"

constexpr int64_t kBlock = 64;

// to[i] = bit i ? gain * from[i] + shift : low
template <class A>
static inline void choose(const A* from, A* to, uint64_t bits, int64_t n, A gain, A shift, A low) {
#if HEADWAY_LEVEL >= 2
  if constexpr (std::is_same_v<A, float>) {
    if (n == kBlock) {
      const __m512 a = _mm512_set1_ps(gain), b = _mm512_set1_ps(shift), c = _mm512_set1_ps(low);
      for (int64_t i = 0; i < kBlock; i += 16) {
        const __m512 y = _mm512_fmadd_ps(a, _mm512_loadu_ps(from + i), b);
        _mm512_storeu_ps(to + i, _mm512_mask_blend_ps(static_cast<__mmask16>(bits >> i), c, y));
      }
      return;
    }
  }
#endif
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const A y = gain * from[i] + shift;
    to[i] = (bits >> i) & 1 ? y : low;
  }
}

// bytes first .. last of the bits belong to the entries 8 * first .. 8 * last
template <class T, class Bits>
static void each_block(const T* x, T* y, int64_t first, int64_t last, int64_t n, double gain, double shift, double low, Bits&& bits_of) {
  using A = arithmetic_t<T>;
  A room[kBlock], out[kBlock];
  for (int64_t byte = first; byte < last; byte += 8) {
    const int64_t start = 8 * byte, count = std::min<int64_t>({kBlock, 8 * (last - byte), n - start});
    const uint64_t bits = bits_of(byte, std::min<int64_t>(8, last - byte));
    const A* from = widen(x + start, room, count);
    if constexpr (std::is_same_v<T, A>) {
      choose<A>(from, y + start, bits, count, A(gain), A(shift), A(low));
    } else {
      choose<A>(from, out, bits, count, A(gain), A(shift), A(low));
      store_row(out, y + start, count);
    }
  }
}

template <class T>
static void pass(const T* gy, T* gx, const uint8_t* bits, int64_t first, int64_t last, int64_t n, double gain) {
  each_block(gy, gx, first, last, n, gain, 0.0, 0.0, [&](int64_t byte, int64_t bytes) {
    uint64_t word = 0;
    std::memcpy(&word, bits + byte, bytes);
    return word;
  });
}

// Alpha dropout: SplitMix64 of seed and place draws one bit an entry, and the entries that stay get one multiply-add.
// Sixty-four entries at a time: their bits are eight bytes, their random numbers 32 of 64 bits, two entries each.

using headway::arithmetic_t;

#include "widen_body.h"

constexpr int64_t kBlock = 64;

// bits of the entries start .. start + 63, the first in the lowest bit
static inline uint64_t kept_bits(uint64_t seed, int64_t start, uint64_t below) {
  uint32_t half[kBlock];
#pragma omp simd
  for (int64_t i = 0; i < kBlock / 2; i++) {
    uint64_t z = seed + static_cast<uint64_t>(start / 2 + i + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    std::memcpy(half + 2 * i, &z, 8);
  }
  uint64_t bits = 0;
#if HEADWAY_LEVEL >= 2
  if (below <= 0xffffffffull) {
    const __m512i edge = _mm512_set1_epi32(static_cast<int>(below));
    for (int64_t i = 0; i < kBlock; i += 16)
      bits |= static_cast<uint64_t>(_mm512_cmpge_epu32_mask(_mm512_loadu_si512(half + i), edge)) << i;
  }
#else
  for (int64_t i = 0; i < kBlock; i++) bits |= static_cast<uint64_t>(half[i] >= below) << i;
#endif
  return bits;
}

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
      narrow(out, y + start, count);
    }
  }
}

template <class T>
static void drop(const T* x, T* y, uint8_t* bits, int64_t first, int64_t last, int64_t n, uint64_t seed, uint64_t below, double gain,
                 double shift, double low) {
  each_block(x, y, first, last, n, gain, shift, low, [&](int64_t byte, int64_t bytes) {
    uint64_t word = kept_bits(seed, 8 * byte, below);
    // nothing is kept behind the end, so that the bits of equal inputs are equal
    if (8 * byte + kBlock > n) word &= n > 8 * byte ? ~0ull >> (8 * byte + kBlock - n) : 0;
    std::memcpy(bits + byte, &word, bytes);
    return word;
  });
}

template <class T>
static void pass(const T* gy, T* gx, const uint8_t* bits, int64_t first, int64_t last, int64_t n, double gain) {
  each_block(gy, gx, first, last, n, gain, 0.0, 0.0, [&](int64_t byte, int64_t bytes) {
    uint64_t word = 0;
    std::memcpy(&word, bits + byte, bytes);
    return word;
  });
}

// Alpha dropout: SplitMix64 of seed and place draws one bit an entry, and the entries that stay get one multiply-add.
// Sixty-four entries at a time: their bits are eight bytes, their random numbers 32 of 64 bits, two entries each.

#include "bits_body.h"

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

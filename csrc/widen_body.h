// Rows in the arithmetic type and back: part of a kernel body (see isa.h), so it is included once an instruction set.
// `widen` returns its input itself where no conversion is needed, `narrow` then does nothing.

using headway::BFloat16;
using headway::Half;

static inline const float* widen(const float* from, float*, int64_t) { return from; }
static inline const double* widen(const double* from, double*, int64_t) { return from; }
static const float* widen(const BFloat16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t u = static_cast<uint32_t>(from[i].bits) << 16;
    std::memcpy(to + i, &u, 4);
  }
  return to;
}
static const float* widen(const Half* from, float* to, int64_t n) {
  int64_t i = 0;
#if HEADWAY_LEVEL >= 1
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; i++) {
    uint32_t h = from[i].bits, sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu, u;
    if (exponent == 31) {
      u = sign | 0x7f800000u | (mantissa << 13);
    } else if (exponent) {
      u = sign | ((exponent + 112) << 23) | (mantissa << 13);
    } else {
      float small = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
      std::memcpy(&u, &small, 4);
      u |= sign;
    }
    std::memcpy(to + i, &u, 4);
  }
  return to;
}

static inline void narrow(const float*, float*, int64_t) {}
static inline void narrow(const double*, double*, int64_t) {}
static void narrow(const float* from, BFloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t u;
    std::memcpy(&u, from + i, 4);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, quiet = (u >> 16) | 0x40u;
    to[i].bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
  }
}
static void narrow(const float* from, Half* to, int64_t n) {
  int64_t i = 0;
#if HEADWAY_LEVEL >= 1
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
  for (; i < n; i++) {
    uint32_t u;
    std::memcpy(&u, from + i, 4);
    const uint32_t sign = (u >> 16) & 0x8000u, size = u & 0x7fffffffu;
    uint32_t h;
    if (size > 0x7f800000u) {
      h = 0x7e00u;
    } else if (size >= 0x477ff000u) {
      h = 0x7c00u;
    } else if (size < 0x38800000u) {
      float f;
      std::memcpy(&f, &size, 4);
      // adding 2^23 rounds to an integer, ties to even
      volatile float shifted = f * 16777216.0f + 8388608.0f;
      h = static_cast<uint32_t>(shifted - 8388608.0f);
    } else {
      h = (size + 0xfffu + ((size >> 13) & 1u) - 0x38000000u) >> 13;
    }
    to[i].bits = static_cast<uint16_t>(sign | h);
  }
}

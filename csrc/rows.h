// Rows of float, double, bfloat16 or half, read and written as lanes of the arithmetic type. Part of a kernel body: included once
// an instruction set, inside its namespace (see isa.h), therefore without a guard and without headers of its own.

using headway::arithmetic_t;
using headway::BFloat16;
using headway::Half;

static inline void load_row(const float* from, float* to, int64_t n) { std::memcpy(to, from, n * sizeof(float)); }
static inline void load_row(const double* from, double* to, int64_t n) { std::memcpy(to, from, n * sizeof(double)); }
static inline void load_row(const BFloat16* from, float* to, int64_t n) {
  int64_t i = 0;
#if HEADWAY_LEVEL == 2
  for (; i + 16 <= n; i += 16) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
    _mm512_storeu_si512(to + i, _mm512_slli_epi32(wide, 16));
  }
#elif HEADWAY_LEVEL == 1
  for (; i + 8 <= n; i += 8) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_slli_epi32(wide, 16));
  }
#endif
  for (; i < n; i++) {
    uint32_t u = static_cast<uint32_t>(from[i].bits) << 16;
    std::memcpy(to + i, &u, 4);
  }
}
static inline void store_row(const float* from, float* to, int64_t n) { std::memcpy(to, from, n * sizeof(float)); }
static inline void store_row(const double* from, double* to, int64_t n) { std::memcpy(to, from, n * sizeof(double)); }
static inline uint16_t round_to_bfloat16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
#if HEADWAY_LEVEL == 2
// round to nearest, ties to even; a NaN stays one
static inline __m256i to_bfloat16(__m512 f) {
  const __m512i u = _mm512_castps_si512(f), top = _mm512_srli_epi32(u, 16);
  const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  const __m512i chosen = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), quiet);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
}
// the same where headway::rounds_bfloat16(), in one instruction, but numbers below 1.2e-38 become zero
static inline __m256i to_bfloat16_at_once(__m512 f) {
  __m256i rounded;
  asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(f));
  return rounded;
}
// a bfloat16 is the upper half of a float: one instruction puts all of them there, with zeros below
static inline __m512 from_bfloat16(__m256i raw) {
  const __m512i place = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, place, _mm512_castsi256_si512(raw)));
}
#endif
static inline void store_row(const float* from, BFloat16* to, int64_t n) {
  int64_t i = 0;
#if HEADWAY_LEVEL == 2
  for (; i + 16 <= n; i += 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), to_bfloat16(_mm512_loadu_ps(from + i)));
  }
#elif HEADWAY_LEVEL == 1
  for (; i + 8 <= n; i += 8) {
    __m256 f = _mm256_loadu_ps(from + i);
    __m256i u = _mm256_castps_si256(f), top = _mm256_srli_epi32(u, 16);
    __m256i even = _mm256_and_si256(top, _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), even), 16);
    __m256i quiet = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
    __m256i chosen = _mm256_blendv_epi8(rounded, quiet, is_nan);
    __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), packed);
  }
#endif
  for (; i < n; i++) to[i].bits = round_to_bfloat16(from[i]);
}
static inline float half_to_float(uint16_t h) {
  uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu, u;
  if (exponent == 31) {
    u = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent) {
    u = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    float small = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    std::memcpy(&u, &small, 4);
    u |= sign;
  }
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
static inline uint16_t float_to_half(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  uint32_t sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    float scaled = (f < 0 ? -f : f) * 16777216.0f;
    // adding 2^23 rounds to an integer, ties to even
    volatile float shifted = scaled + 8388608.0f;
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(shifted - 8388608.0f));
  }
  uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
static inline void load_row(const Half* from, float* to, int64_t n) {
  int64_t i = 0;
#if HEADWAY_LEVEL == 2
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
#elif HEADWAY_LEVEL == 1
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; i++) to[i] = half_to_float(from[i].bits);
}
static inline void store_row(const float* from, Half* to, int64_t n) {
  int64_t i = 0;
#if HEADWAY_LEVEL == 2
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), 0));
#elif HEADWAY_LEVEL == 1
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
  for (; i < n; i++) to[i].bits = float_to_half(from[i]);
}

// 64 bytes of numbers; the compiler splits them where registers are shorter
template <class C>
struct Lane {
  typedef C type __attribute__((vector_size(64), aligned(alignof(C)), may_alias));
  static constexpr int64_t width = 64 / sizeof(C);
};
template <class C>
using lane_t = typename Lane<C>::type;
template <class C>
static inline lane_t<C> get(const C* from) {
  return *reinterpret_cast<const lane_t<C>*>(from);
}
template <class C>
static inline void put(C* to, lane_t<C> v) {
  *reinterpret_cast<lane_t<C>*>(to) = v;
}
template <class C>
static inline C across(lane_t<C> v) {
#if HEADWAY_LEVEL == 2
  if constexpr (std::is_same_v<C, float>) return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#elif HEADWAY_LEVEL == 1
  if constexpr (std::is_same_v<C, float>) {
    __m256 low, high;
    std::memcpy(&low, &v, 32);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + 32, 32);
    __m256 s8 = _mm256_add_ps(low, high);
    __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
  }
#endif
  // halves added to halves: log2(width) steps instead of a chain of width additions
  alignas(64) C part[Lane<C>::width];
  std::memcpy(part, &v, 64);
  for (int64_t half = Lane<C>::width / 2; half; half /= 2)
    for (int64_t i = 0; i < half; i++) part[i] += part[i + half];
  return part[0];
}

// sixteen (eight, for double) numbers of a row as one lane in the arithmetic type, and back
template <class T>
static inline lane_t<arithmetic_t<T>> read(const T* from) {
  using C = arithmetic_t<T>;
  if constexpr (std::is_same_v<T, C>) {
    return get(from);
  } else {
#if HEADWAY_LEVEL == 2
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if constexpr (std::is_same_v<T, BFloat16>)
      return reinterpret_cast<lane_t<C>>(from_bfloat16(raw));
    else
      return reinterpret_cast<lane_t<C>>(_mm512_cvtph_ps(raw));
#else
    alignas(64) C wide[Lane<C>::width];
    load_row(from, wide, Lane<C>::width);
    return get(wide);
#endif
  }
}
#if HEADWAY_LEVEL == 2
template <class T, bool at_once>
static inline __m256i rounded(__m512 f) {
  if constexpr (std::is_same_v<T, Half>) return _mm512_cvtps_ph(f, 0);
  else if constexpr (at_once) return to_bfloat16_at_once(f);
  else return to_bfloat16(f);
}
#endif
template <bool at_once = false, class T>
static inline void write(T* to, lane_t<arithmetic_t<T>> v) {
  using C = arithmetic_t<T>;
  if constexpr (std::is_same_v<T, C>) {
    put(to, v);
  } else {
#if HEADWAY_LEVEL == 2
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded<T, at_once>(reinterpret_cast<__m512>(v)));
#else
    alignas(64) C wide[Lane<C>::width];
    put(wide, v);
    store_row(wide, to, Lane<C>::width);
#endif
  }
}
// the last numbers of a row: what lies beyond its end is read as zero and not written
template <class T>
static inline lane_t<arithmetic_t<T>> read_part(const T* from, int64_t count) {
  using C = arithmetic_t<T>;
#if HEADWAY_LEVEL == 2
  if constexpr (std::is_same_v<T, float>) {
    return reinterpret_cast<lane_t<C>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from));
  } else if constexpr (std::is_same_v<T, double>) {
    return reinterpret_cast<lane_t<C>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), from));
  } else {
    const __m256i raw = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from);
    if constexpr (std::is_same_v<T, BFloat16>)
      return reinterpret_cast<lane_t<C>>(from_bfloat16(raw));
    else
      return reinterpret_cast<lane_t<C>>(_mm512_cvtph_ps(raw));
  }
#else
  alignas(64) C wide[Lane<C>::width] = {};
  load_row(from, wide, count);
  return get(wide);
#endif
}
template <class T>
static inline void write_part(T* to, lane_t<arithmetic_t<T>> v, int64_t count) {
  using C = arithmetic_t<T>;
  alignas(64) C wide[Lane<C>::width];
  put(wide, v);
  store_row(wide, to, count);
}
template <class T>
static inline arithmetic_t<T> number(T v) {
  if constexpr (std::is_same_v<T, arithmetic_t<T>>) {
    return v;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t u = static_cast<uint32_t>(v.bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  } else {
    return half_to_float(v.bits);
  }
}
// one where a number is among the first `count`, zero elsewhere
template <class C>
static inline lane_t<C> mask_of(int64_t count) {
  struct Table {
    C v[2 * Lane<C>::width] = {};
    constexpr Table() {
      for (int64_t i = 0; i < Lane<C>::width; i++) v[i] = C(1);
    }
  };
  static constexpr Table table;
  return get(table.v + Lane<C>::width - count);
}
// a lane written past the caches; `to` lies on a boundary of the lane's own size
template <bool at_once = false, class T>
static inline void stream(T* to, lane_t<arithmetic_t<T>> v) {
#if HEADWAY_LEVEL == 2
  if constexpr (std::is_same_v<T, float>) {
    _mm512_stream_ps(to, reinterpret_cast<__m512>(v));
  } else if constexpr (std::is_same_v<T, double>) {
    _mm512_stream_pd(to, reinterpret_cast<__m512d>(v));
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), rounded<T, at_once>(reinterpret_cast<__m512>(v)));
  }
#elif HEADWAY_LEVEL == 1
  if constexpr (std::is_same_v<T, float>) {
    __m256 half[2];
    std::memcpy(half, &v, 64);
    _mm256_stream_ps(to, half[0]), _mm256_stream_ps(to + 8, half[1]);
  } else {
    write(to, v);
  }
#else
  write(to, v);
#endif
}
// n numbers in the arithmetic type: where they lie, or converted into `room`
template <class T>
static inline const arithmetic_t<T>* widen(const T* from, arithmetic_t<T>* room, int64_t n) {
  if constexpr (std::is_same_v<T, arithmetic_t<T>>) return from;
  else return load_row(from, room, n), room;
}
// n numbers of any type, plus `offset`, in type C
template <class T, class C>
static void convert(const T* from, C* to, int64_t n, double offset) {
  if constexpr (std::is_same_v<C, arithmetic_t<T>>) {
    load_row(from, to, n);
    for (int64_t i = 0; i < n; i++) to[i] = static_cast<C>(to[i] + offset);
  } else {
    for (int64_t i = 0; i < n; i++) to[i] = static_cast<C>(number(from[i]) + offset);
  }
}

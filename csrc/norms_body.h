// Row-wise normalisation: y = g * (a - mean) / sqrt(var + eps) + b (layer norm) or y = g * a / sqrt(mean(a^2) + eps) + b (RMS).
// A row is brought to the arithmetic type once (a no-op for float), stays in the nearest cache, and is read there again:
// mean first, then the spread around it, so that rows with a large mean keep their digits.

using headway::arithmetic_t;
using headway::BFloat16;
using headway::Half;

// tails and conversions stay out of line: inlined into every variant they would make compiling slow and nothing faster
#define HEADWAY_APART static __attribute__((noinline))
#if HEADWAY_LEVEL == 2
#define HEADWAY_ROW static __attribute__((noinline))
#else
#define HEADWAY_ROW static inline
#endif

static inline void load_row(const float* from, float* to, int64_t n) { std::memcpy(to, from, n * sizeof(float)); }
static inline void load_row(const double* from, double* to, int64_t n) { std::memcpy(to, from, n * sizeof(double)); }
HEADWAY_ROW void load_row(const BFloat16* from, float* to, int64_t n) {
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
#endif
HEADWAY_ROW void store_row(const float* from, BFloat16* to, int64_t n) {
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
HEADWAY_APART uint16_t float_to_half(float f) {
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
HEADWAY_ROW void load_row(const Half* from, float* to, int64_t n) {
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
HEADWAY_ROW void store_row(const float* from, Half* to, int64_t n) {
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
      return reinterpret_cast<lane_t<C>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
    else
      return reinterpret_cast<lane_t<C>>(_mm512_cvtph_ps(raw));
#else
    alignas(64) C wide[Lane<C>::width];
    load_row(from, wide, Lane<C>::width);
    return get(wide);
#endif
  }
}
template <class T>
static inline void write(T* to, lane_t<arithmetic_t<T>> v) {
  using C = arithmetic_t<T>;
  if constexpr (std::is_same_v<T, C>) {
    put(to, v);
  } else {
#if HEADWAY_LEVEL == 2
    const __m512 f = reinterpret_cast<__m512>(v);
    __m256i packed;
    if constexpr (std::is_same_v<T, BFloat16>) packed = to_bfloat16(f);
    else packed = _mm512_cvtps_ph(f, 0);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed);
#else
    alignas(64) C wide[Lane<C>::width];
    put(wide, v);
    store_row(wide, to, Lane<C>::width);
#endif
  }
}
// the last numbers of a row: the lane is filled up with zeros, `mask` is one where a number is
template <class T>
HEADWAY_APART lane_t<arithmetic_t<T>> read_part(const T* from, int64_t count) {
  using C = arithmetic_t<T>;
  alignas(64) C wide[Lane<C>::width] = {};
  load_row(from, wide, count);
  return get(wide);
}
template <class T>
HEADWAY_APART void write_part(T* to, lane_t<arithmetic_t<T>> v, int64_t count) {
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
template <class C>
HEADWAY_APART lane_t<C> mask_of(int64_t count) {
  alignas(64) C ones[Lane<C>::width] = {};
  for (int64_t i = 0; i < count; i++) ones[i] = C(1);
  return get(ones);
}
static inline void stream(float* to, lane_t<float> v) {
#if HEADWAY_LEVEL == 2
  _mm512_stream_ps(to, reinterpret_cast<__m512>(v));
#elif HEADWAY_LEVEL == 1
  __m256 half[2];
  std::memcpy(half, &v, 64);
  _mm256_stream_ps(to, half[0]), _mm256_stream_ps(to + 8, half[1]);
#else
  put(to, v);
#endif
}

// R rows of y = norm(a), a = x or x + residual. One row's statistics are a chain of dependent steps, R chains overlap, and the
// weight and bias are read once for all of them.
template <int R, class T, bool has_weight, bool has_bias, bool adds>
static inline void forward_group(const T* x, const T* residual, const arithmetic_t<T>* w, const arithmetic_t<T>* b, T* y, T* h,
                                 arithmetic_t<T>* stats, int64_t n, double eps, bool rms, bool past_caches) {
  using C = arithmetic_t<T>;
  constexpr int64_t W = Lane<C>::width;
  const int64_t whole = n / W * W, rest = n - whole;
  const lane_t<C> mask = rest ? mask_of<C>(rest) : lane_t<C>{};
  const T* a = adds ? h : x;
  C mean[R] = {}, rstd[R];
  lane_t<C> s[R] = {};
  if (adds || !rms) {
    // distances from the first number of the row, so that a large mean costs no digits in long rows
    C shift[R];
    for (int r = 0; r < R; r++) shift[r] = adds || rms ? C(0) : number(x[r * n]);
    for (int64_t i = 0; i < whole; i += W)
      for (int r = 0; r < R; r++) {
        lane_t<C> v = read(x + r * n + i);
        if constexpr (adds) {
          write(h + r * n + i, v + read(residual + r * n + i));
          // the norm reads the sum as it is kept, rounded, so that forward and backward see the same numbers
          v = read(h + r * n + i);
        }
        s[r] += v - shift[r];
      }
    if (rest)
      for (int r = 0; r < R; r++) {
        lane_t<C> v = read_part(x + r * n + whole, rest);
        if constexpr (adds) {
          write_part(h + r * n + whole, v + read_part(residual + r * n + whole, rest), rest);
          v = read_part(h + r * n + whole, rest);
        }
        s[r] += (v - shift[r]) * mask;
      }
    if (!rms)
      for (int r = 0; r < R; r++) mean[r] = shift[r] + across<C>(s[r]) / C(n);
  }
  for (int r = 0; r < R; r++) s[r] = lane_t<C>{};
  for (int64_t i = 0; i < whole; i += W)
    for (int r = 0; r < R; r++) {
      lane_t<C> d = read(a + r * n + i) - mean[r];
      s[r] += d * d;
    }
  if (rest)
    for (int r = 0; r < R; r++) {
      lane_t<C> d = (read_part(a + r * n + whole, rest) - mean[r]) * mask;
      s[r] += d * d;
    }
  for (int r = 0; r < R; r++) rstd[r] = C(1) / std::sqrt(across<C>(s[r]) / C(n) + C(eps));
  auto affine = [&](lane_t<C> v, int r, lane_t<C> gain, lane_t<C> offset) {
    v = (v - mean[r]) * rstd[r];
    if (has_weight) v = v * gain;
    if (has_bias) v = v + offset;
    return v;
  };
  const lane_t<C> none = {};
  if (std::is_same_v<T, float> && past_caches) {
    for (int r = 0; r < R; r++)
      for (int64_t i = 0; i < whole; i += W) {
        lane_t<C> v = affine(read(a + r * n + i), r, has_weight ? get(w + i) : none, has_bias ? get(b + i) : none);
        if constexpr (std::is_same_v<T, float>) stream(y + r * n + i, v);
      }
  } else {
    for (int64_t i = 0; i < whole; i += W) {
      const lane_t<C> gain = has_weight ? get(w + i) : none, offset = has_bias ? get(b + i) : none;
      for (int r = 0; r < R; r++) write(y + r * n + i, affine(read(a + r * n + i), r, gain, offset));
    }
  }
  if (rest) {
    const lane_t<C> gain = has_weight ? read_part(w + whole, rest) : none, offset = has_bias ? read_part(b + whole, rest) : none;
    for (int r = 0; r < R; r++) write_part(y + r * n + whole, affine(read_part(a + r * n + whole, rest), r, gain, offset), rest);
  }
  if (stats)
    for (int r = 0; r < R; r++) stats[2 * r] = mean[r], stats[2 * r + 1] = rstd[r];
}

template <class T, bool has_weight, bool has_bias, bool adds>
static void forward_loop(const T* x, const T* residual, const arithmetic_t<T>* w, const arithmetic_t<T>* b, T* y, T* h,
                         arithmetic_t<T>* stats, int64_t first, int64_t last, int64_t n, double eps, bool rms, bool past_caches) {
  auto at = [&](int64_t row, auto* p) { return p ? p + row * n : nullptr; };
  int64_t row = first;
  for (; row + 4 <= last; row += 4)
    forward_group<4, T, has_weight, has_bias, adds>(at(row, x), at(row, residual), w, b, at(row, y), at(row, h),
                                                    stats ? stats + 2 * row : nullptr, n, eps, rms, past_caches);
  for (; row < last; row++)
    forward_group<1, T, has_weight, has_bias, adds>(at(row, x), at(row, residual), w, b, at(row, y), at(row, h),
                                                    stats ? stats + 2 * row : nullptr, n, eps, rms, past_caches);
}

// rows [first, last) of y = norm(x + residual); h receives the sum, stats (mean, rstd) per row when kept
template <class T>
static void forward_rows(const T* x, const T* residual, const arithmetic_t<T>* w, const arithmetic_t<T>* b, T* y, T* h,
                         arithmetic_t<T>* stats, int64_t first, int64_t last, int64_t n, double eps, bool rms, bool past_caches) {
  auto go = [&](auto weight, auto bias, auto adds) {
    forward_loop<T, weight(), bias(), adds()>(x, residual, w, b, y, h, stats, first, last, n, eps, rms, past_caches);
  };
  auto with = [&](auto weight, auto bias) {
    residual ? go(weight, bias, std::true_type{}) : go(weight, bias, std::false_type{});
  };
  // a bias without a weight comes with a weight of ones
  if (b) with(std::true_type{}, std::true_type{});
  else if (w) with(std::true_type{}, std::false_type{});
  else with(std::false_type{}, std::false_type{});
  if (past_caches) std::atomic_thread_fence(std::memory_order_seq_cst);
}

// R rows of grad_x = rstd * (h - mean(h) - xh * mean(h * xh)) with h = gy * w, plus gh; sums of gy * xh and gy into gw and gb
template <int R, class T, bool has_weight, bool want_sums>
static inline void backward_group(const T* gy, const T* gh, const T* x, const arithmetic_t<T>* w, const arithmetic_t<T>* stats, T* gx,
                                  arithmetic_t<T>* gw, arithmetic_t<T>* gb, int64_t n, bool rms) {
  using C = arithmetic_t<T>;
  constexpr int64_t W = Lane<C>::width;
  const int64_t whole = n / W * W, rest = n - whole;
  const lane_t<C> none = {};
  lane_t<C> p[R] = {}, q[R] = {};
  C mean[R], rstd[R];
  for (int r = 0; r < R; r++) mean[r] = stats[2 * r], rstd[r] = stats[2 * r + 1];
  auto one = [&](int r, lane_t<C> g, lane_t<C> a, lane_t<C> gain, lane_t<C>& tw, lane_t<C>& tb) {
    const lane_t<C> xh = (a - mean[r]) * rstd[r];
    if (want_sums) tw += g * xh;
    if (want_sums) tb += g;
    if (has_weight) g = g * gain;
    p[r] += g, q[r] += g * xh;
  };
  for (int64_t i = 0; i < whole; i += W) {
    const lane_t<C> gain = has_weight ? get(w + i) : none;
    lane_t<C> tw = want_sums ? get(gw + i) : none, tb = want_sums ? get(gb + i) : none;
    for (int r = 0; r < R; r++) one(r, read(gy + r * n + i), read(x + r * n + i), gain, tw, tb);
    if (want_sums) put(gw + i, tw), put(gb + i, tb);
  }
  if (rest) {
    const lane_t<C> gain = has_weight ? read_part(w + whole, rest) : none;
    lane_t<C> tw = want_sums ? read_part(gw + whole, rest) : none, tb = want_sums ? read_part(gb + whole, rest) : none;
    // gradients beyond the row's end are read as zeros, so nothing is added there
    for (int r = 0; r < R; r++) one(r, read_part(gy + r * n + whole, rest), read_part(x + r * n + whole, rest), gain, tw, tb);
    if (want_sums) write_part(gw + whole, tw, rest), write_part(gb + whole, tb, rest);
  }
  C k0[R], k1[R];
  for (int r = 0; r < R; r++) {
    // rstd * (h - c1 - xh * c2) = rstd * h - ((a - mean) * k1 + k0)
    k1[r] = rstd[r] * rstd[r] * (across<C>(q[r]) / C(n));
    k0[r] = rms ? C(0) : rstd[r] * (across<C>(p[r]) / C(n));
  }
  auto result = [&](int r, lane_t<C> g, lane_t<C> a, lane_t<C> gain) {
    if (has_weight) g = g * gain;
    return g * rstd[r] - ((a - mean[r]) * k1[r] + k0[r]);
  };
  for (int64_t i = 0; i < whole; i += W) {
    const lane_t<C> gain = has_weight ? get(w + i) : none;
    for (int r = 0; r < R; r++) {
      lane_t<C> v = result(r, read(gy + r * n + i), read(x + r * n + i), gain);
      if (gh) v += read(gh + r * n + i);
      write(gx + r * n + i, v);
    }
  }
  if (rest) {
    const lane_t<C> gain = has_weight ? read_part(w + whole, rest) : none;
    for (int r = 0; r < R; r++) {
      lane_t<C> v = result(r, read_part(gy + r * n + whole, rest), read_part(x + r * n + whole, rest), gain);
      if (gh) v += read_part(gh + r * n + whole, rest);
      write_part(gx + r * n + whole, v, rest);
    }
  }
}

template <class T>
static void backward_rows(const T* gy, const T* gh, const T* x, const arithmetic_t<T>* w, const arithmetic_t<T>* stats, T* gx,
                          arithmetic_t<T>* gw, arithmetic_t<T>* gb, int64_t first, int64_t last, int64_t n, bool rms) {
  auto go = [&](auto weight, auto sums) {
    auto rows = [&](auto count, int64_t row) {
      backward_group<count(), T, weight(), sums()>(gy + row * n, gh ? gh + row * n : nullptr, x + row * n, w, stats + 2 * row,
                                                   gx + row * n, gw, gb, n, rms);
    };
    int64_t row = first;
    for (; row + 4 <= last; row += 4) rows(std::integral_constant<int, 4>{}, row);
    for (; row < last; row++) rows(std::integral_constant<int, 1>{}, row);
  };
  // gw and gb are both given or neither
  if (w) gw ? go(std::true_type{}, std::true_type{}) : go(std::true_type{}, std::false_type{});
  else gw ? go(std::false_type{}, std::true_type{}) : go(std::false_type{}, std::false_type{});
}

template <class T>
struct RowView {
  // float and double planes are read in place, the others through a buffer
  static constexpr bool in_place = std::is_same_v<T, arithmetic_t<T>>;
};

// y[n, c, s] = norm over c of x[n, c, s]: planes are read as they lie, a tile of positions at a time
template <class T>
static void channel_rows(const T* x, const arithmetic_t<T>* w, const arithmetic_t<T>* b, T* y, arithmetic_t<T>* stats, int64_t sample,
                         int64_t from, int64_t to, int64_t channels, int64_t space, double eps, bool rms) {
  using C = arithmetic_t<T>;
  static thread_local std::vector<C> room;
  const int64_t width = to - from;
  if (static_cast<int64_t>(room.size()) < 4 * width) room.resize(4 * width);
  C *mean = room.data(), *rstd = mean + width, *line = rstd + width, *out = line + width;
  const T* base = x + sample * channels * space + from;
  std::fill(mean, mean + width, C(0));
  std::fill(rstd, rstd + width, C(0));
  auto read = [&](int64_t c) -> const C* {
    if constexpr (RowView<T>::in_place) return base + c * space;
    load_row(base + c * space, line, width);
    return line;
  };
  if (!rms) {
    // sums of distances from the first channel: a large common mean costs no digits
    std::memcpy(rstd, read(0), width * sizeof(C));
    for (int64_t c = 1; c < channels; c++) {
      const C* a = read(c);
#pragma omp simd
      for (int64_t i = 0; i < width; i++) mean[i] += a[i] - rstd[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < width; i++) mean[i] = rstd[i] + mean[i] / C(channels), rstd[i] = C(0);
  }
  for (int64_t c = 0; c < channels; c++) {
    const C* a = read(c);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
      C d = a[i] - mean[i];
      rstd[i] += d * d;
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < width; i++) rstd[i] = C(1) / std::sqrt(rstd[i] / C(channels) + C(eps));
  for (int64_t c = 0; c < channels; c++) {
    const C* a = read(c);
    C gain = w ? w[c] : C(1), offset = b ? b[c] : C(0);
    T* place = y + (sample * channels + c) * space + from;
    C* target = RowView<T>::in_place ? reinterpret_cast<C*>(place) : out;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) target[i] = (a[i] - mean[i]) * rstd[i] * gain + offset;
    if constexpr (!RowView<T>::in_place) store_row(out, place, width);
  }
  if (stats) {
    C* kept = stats + 2 * (sample * space + from);
    for (int64_t i = 0; i < width; i++) kept[2 * i] = mean[i], kept[2 * i + 1] = rstd[i];
  }
}

template <class T>
static void channel_backward_rows(const T* gy, const T* x, const arithmetic_t<T>* w, const arithmetic_t<T>* stats, T* gx,
                                  arithmetic_t<T>* gw, arithmetic_t<T>* gb, int64_t sample, int64_t from, int64_t to, int64_t channels,
                                  int64_t space, bool rms) {
  using C = arithmetic_t<T>;
  static thread_local std::vector<C> room;
  const int64_t width = to - from;
  if (static_cast<int64_t>(room.size()) < 7 * width) room.resize(7 * width);
  C *mean = room.data(), *rstd = mean + width, *s1 = rstd + width, *s2 = s1 + width, *gline = s2 + width, *xline = gline + width,
    *out = xline + width;
  const C* kept = stats + 2 * (sample * space + from);
  for (int64_t i = 0; i < width; i++) mean[i] = kept[2 * i], rstd[i] = kept[2 * i + 1];
  std::fill(s1, s1 + width, C(0));
  std::fill(s2, s2 + width, C(0));
  auto read = [&](const T* tensor, int64_t c, C* line) -> const C* {
    const T* place = tensor + (sample * channels + c) * space + from;
    if constexpr (RowView<T>::in_place) return place;
    load_row(place, line, width);
    return line;
  };
  for (int64_t c = 0; c < channels; c++) {
    const C *g = read(gy, c, gline), *a = read(x, c, xline);
    C gain = w ? w[c] : C(1), tw = 0, tb = 0;
#pragma omp simd reduction(+ : tw, tb)
    for (int64_t i = 0; i < width; i++) {
      C xh = (a[i] - mean[i]) * rstd[i], h = g[i] * gain;
      tw += g[i] * xh;
      tb += g[i];
      s1[i] += h;
      s2[i] += h * xh;
    }
    if (gw) gw[c] += tw;
    if (gb) gb[c] += tb;
  }
#pragma omp simd
  for (int64_t i = 0; i < width; i++) s1[i] = rms ? C(0) : s1[i] / C(channels), s2[i] /= C(channels);
  for (int64_t c = 0; c < channels; c++) {
    const C *g = read(gy, c, gline), *a = read(x, c, xline);
    C gain = w ? w[c] : C(1);
    T* place = gx + (sample * channels + c) * space + from;
    C* target = RowView<T>::in_place ? reinterpret_cast<C*>(place) : out;
#pragma omp simd
    for (int64_t i = 0; i < width; i++)
      target[i] = rstd[i] * (g[i] * gain - s1[i] - (a[i] - mean[i]) * rstd[i] * s2[i]);
    if constexpr (!RowView<T>::in_place) store_row(out, place, width);
  }
}
#undef HEADWAY_APART
#undef HEADWAY_ROW

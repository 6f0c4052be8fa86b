// Row-wise normalisation: y = g * (a - mean) / sqrt(var + eps) + b (layer norm) or y = g * a / sqrt(mean(a^2) + eps) + b (RMS).
// A row is brought to the arithmetic type once (a no-op for float), stays in the nearest cache, and is read there again:
// mean first, then the spread around it, so that rows with a large mean keep their digits.

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
static inline void store_row(const float* from, BFloat16* to, int64_t n) {
  int64_t i = 0;
#if HEADWAY_LEVEL == 2
  for (; i + 16 <= n; i += 16) {
    __m512 f = _mm512_loadu_ps(from + i);
    __m512i u = _mm512_castps_si512(f), top = _mm512_srli_epi32(u, 16);
    __m512i even = _mm512_and_si512(top, _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), even), 16);
    __m512i quiet = _mm512_or_si512(top, _mm512_set1_epi32(0x40));
    __m512i chosen = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), rounded, quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtepi32_epi16(chosen));
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

// stores past the caches: what will not be read again soon need not push out what will
static inline void stream_row(const float* from, float* to, int64_t n) {
#if HEADWAY_LEVEL == 2
  for (int64_t i = 0; i < n; i += 16) _mm512_stream_ps(to + i, _mm512_loadu_ps(from + i));
#elif HEADWAY_LEVEL == 1
  for (int64_t i = 0; i < n; i += 8) _mm256_stream_ps(to + i, _mm256_loadu_ps(from + i));
#else
  store_row(from, to, n);
#endif
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

// four independent sums hide the latency of an addition
template <class C>
static inline C row_sum(const C* a, int64_t n) {
  constexpr int64_t W = Lane<C>::width;
  lane_t<C> s0 = {}, s1 = {}, s2 = {}, s3 = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    s0 += get(a + i), s1 += get(a + i + W), s2 += get(a + i + 2 * W), s3 += get(a + i + 3 * W);
  }
  for (; i + W <= n; i += W) s0 += get(a + i);
  C total = across<C>((s0 + s1) + (s2 + s3));
  for (; i < n; i++) total += a[i];
  return total;
}
template <class C>
static inline C row_square_sum(const C* a, C mean, int64_t n) {
  constexpr int64_t W = Lane<C>::width;
  lane_t<C> s0 = {}, s1 = {}, s2 = {}, s3 = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    lane_t<C> d0 = get(a + i) - mean, d1 = get(a + i + W) - mean, d2 = get(a + i + 2 * W) - mean, d3 = get(a + i + 3 * W) - mean;
    s0 += d0 * d0, s1 += d1 * d1, s2 += d2 * d2, s3 += d3 * d3;
  }
  for (; i + W <= n; i += W) {
    lane_t<C> d = get(a + i) - mean;
    s0 += d * d;
  }
  C total = across<C>((s0 + s1) + (s2 + s3));
  for (; i < n; i++) total += (a[i] - mean) * (a[i] - mean);
  return total;
}

// s1 = sum h, s2 = sum h * xh with h = g * w; the sums of g * xh and g go to gw and gb
template <class C, bool has_weight, bool want_weight, bool want_bias>
static inline void row_backward_sums(const C* g, const C* a, const C* w, C mean, C rstd, C* gw, C* gb, int64_t n, C& s1, C& s2) {
  constexpr int64_t W = Lane<C>::width;
  lane_t<C> p0 = {}, p1 = {}, q0 = {}, q1 = {};
  auto one = [&](int64_t i, lane_t<C>& p, lane_t<C>& q) {
    lane_t<C> gi = get(g + i), xh = (get(a + i) - mean) * rstd, gx = gi * xh;
    if (want_weight) put(gw + i, get(gw + i) + gx);
    if (want_bias) put(gb + i, get(gb + i) + gi);
    if (has_weight) {
      lane_t<C> wi = get(w + i);
      p += gi * wi, q += gx * wi;
    } else {
      p += gi, q += gx;
    }
  };
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) one(i, p0, q0), one(i + W, p1, q1);
  for (; i + W <= n; i += W) one(i, p0, q0);
  s1 = across<C>(p0 + p1), s2 = across<C>(q0 + q1);
  for (; i < n; i++) {
    C xh = (a[i] - mean) * rstd, h = has_weight ? g[i] * w[i] : g[i];
    if (want_weight) gw[i] += g[i] * xh;
    if (want_bias) gb[i] += g[i];
    s1 += h, s2 += h * xh;
  }
}

template <class C, bool has_weight, bool has_bias>
static inline void row_affine(const C* a, const C* w, const C* b, C mean, C rstd, C* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    C z = (a[i] - mean) * rstd;
    if (has_weight) z = z * w[i];
    if (has_bias) z = z + b[i];
    y[i] = z;
  }
}

template <class T>
struct RowView {
  // float and double rows are read in place, the others through a buffer
  static constexpr bool in_place = std::is_same_v<T, arithmetic_t<T>>;
};

// rows [first, last) of y = norm(x + residual); h receives the sum, stats (mean, rstd) per row when kept.
// Four rows at a time: one row's statistics are a chain of dependent steps, four chains overlap.
constexpr int64_t kTogether = 4;

template <class T>
static void forward_rows(const T* x, const T* residual, const arithmetic_t<T>* w, const arithmetic_t<T>* b, T* y, T* h,
                         arithmetic_t<T>* stats, int64_t first, int64_t last, int64_t n, double eps, bool rms, bool stream) {
  using C = arithmetic_t<T>;
  constexpr bool in_place = RowView<T>::in_place;
  static thread_local std::vector<C> room;
  const int64_t padded = (n + 15) / 16 * 16;
  if (static_cast<int64_t>(room.size()) < (kTogether + 2) * padded) room.resize((kTogether + 2) * padded);
  C *other = room.data() + kTogether * padded, *result = other + padded;
  for (int64_t start = first; start < last; start += kTogether) {
    const int64_t count = std::min(kTogether, last - start);
    const C* a[kTogether];
    C mean[kTogether], rstd[kTogether];
    for (int64_t r = 0; r < count; r++) {
      const int64_t at = (start + r) * n;
      C* buffer = room.data() + r * padded;
      if (residual) {
        const C *p, *q;
        C* sum;
        if constexpr (in_place) {
          p = x + at, q = residual + at, sum = h + at;
        } else {
          load_row(x + at, buffer, n), load_row(residual + at, other, n);
          p = buffer, q = other, sum = buffer;
        }
#pragma omp simd
        for (int64_t i = 0; i < n; i++) sum[i] = p[i] + q[i];
        if constexpr (!in_place) {
          // the norm reads the sum as it is kept, rounded, so that forward and backward see the same numbers
          store_row(buffer, h + at, n);
          load_row(h + at, buffer, n);
        }
        a[r] = sum;
      } else if constexpr (in_place) {
        a[r] = x + at;
      } else {
        load_row(x + at, buffer, n);
        a[r] = buffer;
      }
      mean[r] = rms ? C(0) : row_sum(a[r], n) / C(n);
    }
    for (int64_t r = 0; r < count; r++) rstd[r] = C(1) / std::sqrt(row_square_sum(a[r], mean[r], n) / C(n) + C(eps));
    for (int64_t r = 0; r < count; r++) {
      const int64_t at = (start + r) * n;
      C* target = result;
      if constexpr (in_place) {
        if (!stream) target = y + at;
      }
      if (w && b) row_affine<C, true, true>(a[r], w, b, mean[r], rstd[r], target, n);
      else if (w) row_affine<C, true, false>(a[r], w, b, mean[r], rstd[r], target, n);
      else if (b) row_affine<C, false, true>(a[r], w, b, mean[r], rstd[r], target, n);
      else row_affine<C, false, false>(a[r], w, b, mean[r], rstd[r], target, n);
      if constexpr (std::is_same_v<T, float>) {
        if (stream) stream_row(result, y + at, n);
      } else if constexpr (!in_place) {
        store_row(result, y + at, n);
      }
      if (stats) stats[2 * (start + r)] = mean[r], stats[2 * (start + r) + 1] = rstd[r];
    }
  }
  if (stream) std::atomic_thread_fence(std::memory_order_seq_cst);
}

// rows [first, last) of grad_x = rstd * (h - mean(h) - xh * mean(h * xh)) with h = gy * w, plus gh; weight and bias sums into gw, gb
template <class T>
static void backward_rows(const T* gy, const T* gh, const T* x, const arithmetic_t<T>* w, const arithmetic_t<T>* stats, T* gx,
                          arithmetic_t<T>* gw, arithmetic_t<T>* gb, int64_t first, int64_t last, int64_t n, bool rms) {
  using C = arithmetic_t<T>;
  constexpr bool in_place = RowView<T>::in_place;
  static thread_local std::vector<C> room;
  const int64_t padded = (n + 15) / 16 * 16;
  if (static_cast<int64_t>(room.size()) < (2 * kTogether + 2) * padded) room.resize((2 * kTogether + 2) * padded);
  C *other = room.data() + 2 * kTogether * padded, *result = other + padded;
  for (int64_t start = first; start < last; start += kTogether) {
    const int64_t count = std::min(kTogether, last - start);
    const C *g[kTogether], *a[kTogether];
    C s1[kTogether], s2[kTogether];
    for (int64_t r = 0; r < count; r++) {
      const int64_t at = (start + r) * n;
      if constexpr (in_place) {
        g[r] = gy + at, a[r] = x + at;
      } else {
        C *gbuf = room.data() + 2 * r * padded, *xbuf = gbuf + padded;
        load_row(gy + at, gbuf, n), load_row(x + at, xbuf, n);
        g[r] = gbuf, a[r] = xbuf;
      }
      const C mean = stats[2 * (start + r)], rstd = stats[2 * (start + r) + 1];
      if (w && gw && gb) row_backward_sums<C, true, true, true>(g[r], a[r], w, mean, rstd, gw, gb, n, s1[r], s2[r]);
      else if (w && gw) row_backward_sums<C, true, true, false>(g[r], a[r], w, mean, rstd, gw, gb, n, s1[r], s2[r]);
      else if (w && gb) row_backward_sums<C, true, false, true>(g[r], a[r], w, mean, rstd, gw, gb, n, s1[r], s2[r]);
      else if (w) row_backward_sums<C, true, false, false>(g[r], a[r], w, mean, rstd, gw, gb, n, s1[r], s2[r]);
      else if (gb) row_backward_sums<C, false, false, true>(g[r], a[r], w, mean, rstd, gw, gb, n, s1[r], s2[r]);
      else row_backward_sums<C, false, false, false>(g[r], a[r], w, mean, rstd, gw, gb, n, s1[r], s2[r]);
    }
    for (int64_t r = 0; r < count; r++) {
      const int64_t at = (start + r) * n;
      const C mean = stats[2 * (start + r)], rstd = stats[2 * (start + r) + 1];
      C* target = result;
      if constexpr (in_place) target = gx + at;
      // rstd * (h - c1 - (a - mean) * rstd * c2) = rstd * h - (k1 * a + k0)
      const C k1 = rstd * rstd * (s2[r] / C(n)), k0 = (rms ? C(0) : rstd * (s1[r] / C(n))) - mean * k1;
      const C *gr = g[r], *ar = a[r];
      const C* extra = nullptr;
      if (gh) {
        if constexpr (in_place) {
          extra = gh + at;
        } else {
          load_row(gh + at, other, n);
          extra = other;
        }
      }
      if (w && extra) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) target[i] = rstd * (gr[i] * w[i]) - (k1 * ar[i] + k0) + extra[i];
      } else if (w) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) target[i] = rstd * (gr[i] * w[i]) - (k1 * ar[i] + k0);
      } else if (extra) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) target[i] = rstd * gr[i] - (k1 * ar[i] + k0) + extra[i];
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) target[i] = rstd * gr[i] - (k1 * ar[i] + k0);
      }
      if constexpr (!in_place) store_row(result, gx + at, n);
    }
  }
}

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
    for (int64_t c = 0; c < channels; c++) {
      const C* a = read(c);
#pragma omp simd
      for (int64_t i = 0; i < width; i++) mean[i] += a[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < width; i++) mean[i] /= C(channels);
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

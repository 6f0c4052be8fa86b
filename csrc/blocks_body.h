// One block of n channels by `count` positions: z = x - mean, y = x + A z + shift, and z z^T, a tile of positions at a time.
// A tile of z stays in the caches for both products. Rows are padded to fours and tiles to whole chunks by zeros, so that the inner
// loops have fixed sizes; what lies in the padding is never written out.

#if HEADWAY_LEVEL >= 2
constexpr int64_t kLanes = 16;
#elif HEADWAY_LEVEL == 1
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(kLanes * 4)));
constexpr int64_t kChunk = 4 * kLanes;
constexpr int64_t kTile = 512;
constexpr int64_t kStride = kTile + 16;  // rows a power of two apart would share few sets of the cache

static inline Lanes load(const float* p) {
  Lanes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, Lanes v) { std::memcpy(p, &v, sizeof v); }

// four rows of A, packed by columns, times a chunk of z
static inline void product(const float* a, const float* z, int64_t n, Lanes (&sum)[4][4]) {
  for (auto& row : sum)
    for (auto& part : row) part = Lanes{};
  for (int64_t j = 0; j < n; j++) {
    const float* from = z + j * kStride;
    const Lanes z0 = load(from), z1 = load(from + kLanes), z2 = load(from + 2 * kLanes), z3 = load(from + 3 * kLanes);
    for (int64_t i = 0; i < 4; i++) {
      const float factor = a[4 * j + i];
      sum[i][0] += factor * z0;
      sum[i][1] += factor * z1;
      sum[i][2] += factor * z2;
      sum[i][3] += factor * z3;
    }
  }
}

// the products of four rows of z with four others over a tile, added to a corner of the n x n sums
static inline void gram(const float* first, const float* second, int64_t length, float* to, int64_t width) {
  Lanes sum[4][4] = {};
  for (int64_t t = 0; t < length; t += kLanes) {
    const Lanes b0 = load(second + t), b1 = load(second + kStride + t), b2 = load(second + 2 * kStride + t),
                b3 = load(second + 3 * kStride + t);
    for (int64_t i = 0; i < 4; i++) {
      const Lanes a = load(first + i * kStride + t);
      sum[i][0] += a * b0;
      sum[i][1] += a * b1;
      sum[i][2] += a * b2;
      sum[i][3] += a * b3;
    }
  }
  for (int64_t i = 0; i < 4; i++)
    for (int64_t j = 0; j < 4; j++) {
      float total = 0;
      for (int64_t lane = 0; lane < kLanes; lane++) total += sum[i][j][lane];
      to[i * width + j] += total;
    }
}

// room: (padded rows) * kStride numbers for z, n * padded for A, padded * padded for the sums
static void color_block(const float* x, const float* mean, const float* A, const float* shift, float* y, float* products, int64_t n,
                        int64_t count, float* room) {
  const int64_t rows = (n + 3) / 4 * 4;
  float* z = room;
  float* packed = z + rows * kStride;
  float* sums = packed + rows * n;
  std::memset(sums, 0, rows * rows * sizeof(float));
  for (int64_t i = 0; i < rows; i += 4)
    for (int64_t j = 0; j < n; j++)
      for (int64_t k = 0; k < 4; k++) packed[i * n + 4 * j + k] = i + k < n ? A[(i + k) * n + j] : 0.0f;
  std::memset(z + n * kStride, 0, (rows - n) * kStride * sizeof(float));
  for (int64_t start = 0; start < count; start += kTile) {
    const int64_t length = std::min<int64_t>(kTile, count - start), full = (length + kChunk - 1) / kChunk * kChunk;
    for (int64_t i = 0; i < n; i++) {
      const float* from = x + i * count + start;
      float* to = z + i * kStride;
      const float centre = mean[i];
#pragma omp simd
      for (int64_t t = 0; t < length; t++) to[t] = from[t] - centre;
      std::memset(to + length, 0, (full - length) * sizeof(float));
    }
    for (int64_t i = 0; i < rows; i += 4)
      for (int64_t j = 0; j <= i; j += 4) gram(z + i * kStride, z + j * kStride, full, sums + i * rows + j, rows);
    for (int64_t t = 0; t < full; t += kChunk) {
      const int64_t valid = std::min<int64_t>(kChunk, length - t);
      for (int64_t i = 0; i < rows; i += 4) {
        Lanes sum[4][4];
        product(packed + i * n, z + t, n, sum);
        for (int64_t k = 0; k < std::min<int64_t>(4, n - i); k++) {
          const float* from = x + (i + k) * count + start + t;
          float* to = y + (i + k) * count + start + t;
          const float more = shift[i + k];
          if (valid == kChunk) {
            for (int64_t part = 0; part < 4; part++)
              store(to + part * kLanes, sum[k][part] + (load(from + part * kLanes) + more));
          } else {
            float out[kChunk];
            std::memcpy(out, sum[k], sizeof out);
            for (int64_t c = 0; c < valid; c++) to[c] = out[c] + (from[c] + more);
          }
        }
      }
    }
  }
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < n; j++) products[i * n + j] = j <= i ? sums[i * rows + j] : sums[j * rows + i];
}

static int64_t room_for(int64_t n) {
  const int64_t rows = (n + 3) / 4 * 4;
  return rows * kStride + rows * n + rows * rows;
}

// A plane that is gone over by a K x K window: rows of `step` numbers with room for the window around them, a multiple of two lanes wide.
#include "rows.h"

// out += window applied at every place
template <class C, class K>
static void stencil_plane(K, const C* padded, int64_t step, int64_t height, int64_t width, const C* window, C* out) {
  constexpr int64_t L = Lane<C>::width;
  for (int64_t h = 0; h < height; h++)
    for (int64_t j = 0; j < width; j += 2 * L) {
      C* to = out + h * width + j;
      lane_t<C> a = get(to), b = get(to + L);
      for (int64_t y = 0; y < K::value; y++) {
        const C* from = padded + (h + y) * step + j;
        for (int64_t x = 0; x < K::value; x++) {
          const C t = window[y * K::value + x];
          a += t * get(from + x);
          b += t * get(from + x + L);
        }
      }
      put(to, a), put(to + L, b);
    }
}

// sums of g times what the window saw, for every place of the window; g is 0 beyond its rows
template <class C, class K>
static void stencil_sums(K, const C* g, const C* padded, int64_t step, int64_t height, int64_t width, double* sums) {
  constexpr int64_t L = Lane<C>::width;
  for (int64_t y = 0; y < K::value; y++) {
    for (int64_t top = 0; top < height; top += 64) {  // lanes add up that many rows before they go into a double
      lane_t<C> total[K::value] = {};
      for (int64_t h = top; h < std::min(height, top + 64); h++)
        for (int64_t j = 0; j < width; j += L) {
          const lane_t<C> v = get(g + h * width + j);
          const C* from = padded + (h + y) * step + j;
          for (int64_t x = 0; x < K::value; x++) total[x] += v * get(from + x);
        }
      for (int64_t x = 0; x < K::value; x++) sums[y * K::value + x] += across<C>(total[x]);
    }
  }
}

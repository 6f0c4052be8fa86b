// exp and the logistic function without branches, for loops over lanes. Part of a kernel body (see isa.h), therefore without a guard.

inline double exponential(double x) { return std::exp(x); }
// Cephes-style exp: 2 ulp over the whole range, no branches, NaN stays NaN
inline float exponential(float x) {
  x = x > 88.3f ? 88.3f : x;
  x = x < -87.3f ? -87.3f : x;
  const float n = __builtin_floorf(x * 1.44269504088896341f + 0.5f);
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  return p * __builtin_bit_cast(float, bits);
}
template <class C>
inline C sigmoid(C x) {
  return C(1) / (C(1) + exponential(-x));
}

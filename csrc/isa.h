// Compiles one kernel body several times, each for another instruction set, and picks one at run time.
//
//   #define HEADWAY_BODY "my_kernel_body.h"
//   #include "isa.h"
//
// The body is included once a level inside `namespace isa_base`, `isa_avx2` and `isa_avx512`; it must contain only plain
// functions and must not include headers (include them before this file). `HEADWAY_CALL(f, args...)` then calls the best one.
// The environment variable HEADWAY_ISA=base|avx2|avx512 lowers the choice, for tests and for measuring.
#pragma once
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headway {
enum class Isa { base = 0, avx2 = 1, avx512 = 2 };

inline Isa detect_isa() {
  Isa best = Isa::base;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    best = Isa::avx512;
#endif
  if (const char* asked = std::getenv("HEADWAY_ISA")) {
    Isa wish = !std::strcmp(asked, "base") ? Isa::base : !std::strcmp(asked, "avx2") ? Isa::avx2 : Isa::avx512;
    if (wish < best) best = wish;
  }
  return best;
}

inline Isa isa() {
  static const Isa chosen = detect_isa();
  return chosen;
}

// whether the AVX-512 body may round to bfloat16 by the processor's own instruction, which not every such processor has
inline bool rounds_bfloat16() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  static const bool can = isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
  return can;
#else
  return false;
#endif
}
}  // namespace headway

#define HEADWAY_LEVEL 0
namespace isa_base {
#include HEADWAY_BODY
}
#undef HEADWAY_LEVEL

#if defined(__x86_64__)
#define HEADWAY_LEVEL 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif
namespace isa_avx2 {
#include HEADWAY_BODY
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef HEADWAY_LEVEL

#define HEADWAY_LEVEL 2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#endif
namespace isa_avx512 {
#include HEADWAY_BODY
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef HEADWAY_LEVEL

#define HEADWAY_CALL(function, ...)                                             \
  (::headway::isa() == ::headway::Isa::avx512 ? isa_avx512::function(__VA_ARGS__) \
   : ::headway::isa() == ::headway::Isa::avx2 ? isa_avx2::function(__VA_ARGS__)   \
                                              : isa_base::function(__VA_ARGS__))
#else
#define HEADWAY_CALL(function, ...) isa_base::function(__VA_ARGS__)
#endif

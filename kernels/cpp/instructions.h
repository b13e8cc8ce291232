// Types of vectors, and the few x86 instructions that vector extensions do not express. These are
// written as assembly: one spelling for GCC and Clang, and no <immintrin.h>, of which the parsing
// alone takes half a second for every kernel.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef float vf_in_memory __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * W)));  // W halves of 32 bits

#if defined(__F16C__)
typedef uint16_t h8 __attribute__((vector_size(16)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef float f4 __attribute__((vector_size(16)));
typedef float f8 __attribute__((vector_size(32)));
INLINE float widened_half(uint16_t x) {
  const h8 bits = {x};
  f4 y;
  asm("vcvtph2ps %1, %0" : "=x"(y) : "x"(bits));
  return y[0];
}
INLINE uint16_t narrowed_half(float x) {  // to nearest, ties to even
  const f4 wide = {x};
  h8 y;
  asm("vcvtps2ph $0, %1, %0" : "=x"(y) : "x"(wide));
  return y[0];
}
INLINE f8 widened_halves(h8 x) {
  f8 y;
  asm("vcvtph2ps %1, %0" : "=x"(y) : "x"(x));
  return y;
}
#endif

#if defined(__AVX512F__) && W == 16
#define AVX512 1
INLINE vf widened_halves(h16 x) {
  vf y;
  asm("vcvtph2ps %1, %0" : "=v"(y) : "v"(x));
  return y;
}
INLINE h16 narrowed_halves(vf x) {
  h16 y;
  asm("vcvtps2ph $0, %1, %0" : "=v"(y) : "v"(x));
  return y;
}
INLINE vf larger_of(vf a, vf b) {  // b where one of them is NaN
  vf y;
  asm("vmaxps %2, %1, %0" : "=v"(y) : "v"(a), "v"(b));
  return y;
}
INLINE vf rounded(vf x) {
  vf y;
  asm("vrndscaleps $8, %1, %0" : "=v"(y) : "v"(x));
  return y;
}
INLINE vf times_power_of_2(vf x, vf exponent) {
  vf y;
  asm("vscalefps %2, %1, %0" : "=v"(y) : "v"(x), "v"(exponent));
  return y;
}
INLINE vf selected(vf a, vf b, vi place) {  // lane i is element place[i] of (a, b)
  asm("vpermt2ps %2, %1, %0" : "+v"(a) : "v"(place), "v"(b));
  return a;
}
struct Memory { char bytes[1 << 30]; };  // what a gather may read, for the compiler
INLINE vf gathered(const float* p, vi place) {
  vf y{};
  uint16_t lanes;
  asm("kxnorw %1, %1, %1\n\tvgatherdps (%2,%3,4), %0%{%1%}"
      : "+&v"(y), "=&Yk"(lanes) : "r"(p), "v"(place), "m"(*(const Memory*)p));
  return y;
}
INLINE bool any_negative(vi x) {
  uint16_t lanes;
  asm("vpmovd2m %1, %0" : "=k"(lanes) : "v"(x));
  return lanes != 0;
}
// Lanes 8, 4, 2 and 1 apart in each other's place.
INLINE vf apart_8(vf x) {
  vf y;
  asm("vshuff32x4 $0x4e, %1, %1, %0" : "=v"(y) : "v"(x));
  return y;
}
INLINE vf apart_4(vf x) {
  vf y;
  asm("vshuff32x4 $0xb1, %1, %1, %0" : "=v"(y) : "v"(x));
  return y;
}
INLINE vf apart_2(vf x) {
  vf y;
  asm("vpermilps $0x4e, %1, %0" : "=v"(y) : "v"(x));
  return y;
}
INLINE vf apart_1(vf x) {
  vf y;
  asm("vpermilps $0xb1, %1, %0" : "=v"(y) : "v"(x));
  return y;
}
#if defined(__AVX512BF16__)
INLINE vf plus_dots_of_pairs(vf sum, vf a, vf b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
INLINE h16 narrowed_bf16(vf x) {
  h16 y;
  asm("vcvtneps2bf16 %1, %0" : "=v"(y) : "v"(x));
  return y;
}
#endif

#elif defined(__AVX2__) && W == 8
#define AVX2 1
INLINE bool any_negative(vi x) {
  int32_t lanes;
  asm("vmovmskps %1, %0" : "=r"(lanes) : "x"(x));
  return lanes != 0;
}
INLINE vf permuted(vf x, vi place) {  // lane i is x[place[i] % 8]
  vf y;
  asm("vpermps %1, %2, %0" : "=x"(y) : "x"(x), "x"(place));
  return y;
}
#endif

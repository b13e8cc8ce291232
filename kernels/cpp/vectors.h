// Vectors of W floats or ints for any instruction set, by the vector extensions of GCC and Clang.
// Scalars and vectors mix: every function is overloaded for both. Truth values of lanes are ints,
// all ones or zero, as comparisons give them. NaN goes through everything that torch lets it
// through; nothing here may be compiled with -ffast-math. Mathematical functions are the compiler's
// own, because <cmath> takes 0.2 s to parse.

static const float INF = std::numeric_limits<float>::infinity();
static const float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
static const float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// -- memory --------------------------------------------------------------------------------------
INLINE vf load(const float* p) { return *(const vf_in_memory*)p; }
INLINE void store(float* p, vf x) { *(vf_in_memory*)p = x; }

INLINE float as_float(float x) { return x; }
INLINE float as_float(double x) { return (float)x; }
INLINE float as_float(bool x) { return x; }
INLINE float as_float(int32_t x) { return (float)x; }
INLINE float as_float(int64_t x) { return (float)x; }

// bfloat16 and float16 are the bits of a number in memory.
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
INLINE float as_float(bf16 x) {
  uint32_t wide = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &wide, 4);
  return y;
}
INLINE float as_float(fp16 x) {
#if defined(__F16C__)
  return widened_half(x.bits);
#else
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  uint32_t bits;
  if (rest >= 0x7c00) {
    bits = 0x7f800000 | (rest << 13);
  } else if (rest >= 0x0400) {
    bits = (rest << 13) + (112u << 23);
  } else {
    const float tiny = (float)rest * 5.9604644775390625e-8f;  // 2^-24
    memcpy(&bits, &tiny, 4);
  }
  bits |= sign;
  float y;
  memcpy(&y, &bits, 4);
  return y;
#endif
}
// Rounds to nearest, ties to even; NaN stays NaN.
INLINE void assign(float* p, float x) { *p = x; }
INLINE void assign(bf16* p, float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) { p->bits = 0x7fc0; return; }
  p->bits = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE void assign(fp16* p, float x) {
#if defined(__F16C__)
  p->bits = narrowed_half(x);
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) { p->bits = (uint16_t)(sign | 0x7e00); return; }
  if (bits >= 0x477ff000) { p->bits = (uint16_t)(sign | 0x7c00); return; }
  if (bits < 0x38800000) {
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    p->bits = (uint16_t)(sign | (uint32_t)__builtin_nearbyintf(magnitude * 16777216.0f));
    return;
  }
  bits += 0xc8000fff + ((bits >> 13) & 1);
  p->bits = (uint16_t)(sign | (bits >> 13));
#endif
}

// -- lanes ---------------------------------------------------------------------------------------
INLINE vf vec(float x) { return x - vf{}; }
INLINE vf vec(vf x) { return x; }
INLINE vi vec(int32_t x) { return x - vi{}; }
INLINE vi vec(vi x) { return x; }
INLINE vi lanes() {
  vi x;
  for (int i = 0; i < W; i++) x[i] = i;
  return x;
}
INLINE vi mask(bool x) { return vec(-(int32_t)x); }
INLINE vi mask(vi x) { return x; }

INLINE float pick(bool c, float a, float b) { return c ? a : b; }
INLINE int32_t pick(bool c, int32_t a, int32_t b) { return c ? a : b; }
INLINE bool pick(bool c, bool a, bool b) { return c ? a : b; }
INLINE vf pick(vi c, vf a, vf b) { return c ? a : b; }
INLINE vi pick(vi c, vi a, vi b) { return c ? a : b; }

INLINE bool any(vi x) {
#if defined(AVX512) || defined(AVX2)
  return any_negative(x);
#else
  int32_t y = 0;
  for (int i = 0; i < W; i++) y |= x[i];
  return y != 0;
#endif
}
INLINE float maximum_of_lanes(vf x) {
#if defined(AVX512)
  x = larger_of(x, apart_8(x));
  x = larger_of(x, apart_4(x));
  x = larger_of(x, apart_2(x));
  return larger_of(x, apart_1(x))[0];
#else
  float y = x[0];
  for (int i = 1; i < W; i++) y = x[i] > y ? x[i] : y;
  return y;
#endif
}
INLINE float sum_of_lanes(vf x) {
#if defined(AVX512)
  x += apart_8(x);
  x += apart_4(x);
  x += apart_2(x);
  return x[0] + x[1];
#else
  float y = 0;
  for (int i = 0; i < W; i++) y += x[i];
  return y;
#endif
}

// -- casts ---------------------------------------------------------------------------------------
INLINE float to_float(float x) { return x; }
INLINE float to_float(int32_t x) { return (float)x; }
INLINE float to_float(bool x) { return x; }
INLINE vf to_float(vf x) { return x; }
INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
INLINE int32_t to_int(int32_t x) { return x; }
INLINE int32_t to_int(bool x) { return x; }
INLINE int32_t to_int(float x) { return (int32_t)x; }
INLINE vi to_int(vi x) { return x; }
INLINE vi to_int(vf x) { return __builtin_convertvector(x, vi); }

// -- integers ------------------------------------------------------------------------------------
// Division and remainder floor, as in Python.
INLINE int32_t floor_div(int32_t a, int32_t b) {
  const int32_t q = a / b;
  return q - ((a % b != 0) & ((a < 0) != (b < 0)));
}
INLINE vi floor_div(vi a, int32_t b) {
  if (b > 0 && (b & (b - 1)) == 0) return a >> __builtin_ctz(b);
  if (b > 0) {  // exact in double: |a| < 2^31
    vi q;
    const double inverse = 1.0 / b;
    for (int i = 0; i < W; i++) {
      int32_t guess = (int32_t)__builtin_floor(a[i] * inverse);
      guess += (int64_t)(guess + 1) * b <= a[i];
      guess -= (int64_t)guess * b > a[i];
      q[i] = guess;
    }
    return q;
  }
  vi q;
  for (int i = 0; i < W; i++) q[i] = floor_div((int32_t)a[i], b);
  return q;
}
INLINE vi floor_div(vi a, vi b) {
  vi q;
  for (int i = 0; i < W; i++) q[i] = floor_div((int32_t)a[i], (int32_t)b[i]);
  return q;
}
INLINE vi floor_div(int32_t a, vi b) { return floor_div(vec(a), b); }
template <typename A, typename B> INLINE auto floor_mod(A a, B b) { return a - floor_div(a, b) * b; }

// -- arithmetic ----------------------------------------------------------------------------------
// minimum and maximum give NaN where one side is NaN.
INLINE float minimum(float a, float b) { return a != a || a < b ? a : b; }
INLINE float maximum(float a, float b) { return a != a || a > b ? a : b; }
INLINE int32_t minimum(int32_t a, int32_t b) { return a < b ? a : b; }
INLINE int32_t maximum(int32_t a, int32_t b) { return a > b ? a : b; }
INLINE vf minimum(vf a, vf b) { return (a != a) | (a < b) ? a : b; }
INLINE vf maximum(vf a, vf b) { return (a != a) | (a > b) ? a : b; }
INLINE vi minimum(vi a, vi b) { return a < b ? a : b; }
INLINE vi maximum(vi a, vi b) { return a > b ? a : b; }

INLINE float absolute(float x) { return __builtin_fabsf(x); }
INLINE int32_t absolute(int32_t x) { return x < 0 ? -x : x; }
INLINE vf absolute(vf x) { return (vf)((vi)x & 0x7fffffff); }
INLINE vi absolute(vi x) { return x < 0 ? -x : x; }

INLINE vf larger(vf a, vf b) {  // b where a is NaN
#if defined(AVX512)
  return larger_of(a, b);
#else
  return a > b ? a : b;
#endif
}

INLINE float sign(float x) { return (float)((x > 0) - (x < 0)); }
INLINE vf sign(vf x) { return to_float((x < 0.0f) - (x > 0.0f)); }
INLINE float relu(float x) { return x < 0 ? 0.0f : x; }
INLINE vf relu(vf x) { return x < 0.0f ? vf{} : x; }

template <float (*f)(float)> INLINE vf by_lane(vf x) {
  vf y;
  for (int i = 0; i < W; i++) y[i] = f(x[i]);
  return y;
}
INLINE float nearest(float x) { return __builtin_nearbyintf(x); }
INLINE vf nearest(vf x) {
#if defined(AVX512)
  return rounded(x);
#else
  return by_lane<nearest>(x);
#endif
}
INLINE int32_t floored(float x) { return (int32_t)__builtin_floorf(x); }
INLINE vi floored(vf x) {
  const vi y = to_int(x);
  return y + (to_float(y) > x);
}

// -- elementary functions ------------------------------------------------------------------------
// 2^r on [-1/2, 1/2]: the minimax polynomial of degree 6, below 1 ulp.
INLINE vf exp2_fraction(vf r) {
  vf p = vec(1.5353362e-4f);
  p = p * r + 1.3398874e-3f;
  p = p * r + 9.6184373e-3f;
  p = p * r + 5.5503324e-2f;
  p = p * r + 2.4022648e-1f;
  p = p * r + 6.9314720e-1f;
  return p * r + 1.0f;
}
// 2^x for x <= 127: underflows to 0, keeps NaN.
INLINE vf exp2_of_negative(vf x) {
#if defined(AVX512)
  x = x < -200.0f ? vec(-200.0f) : x;
  const vf n = nearest(x);
  return times_power_of_2(exp2_fraction(x - n), n);
#else
  x = x < -127.0f ? vec(-127.0f) : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = x + magic;
  const vf n = shifted - magic;
  const vi power = ((vi)shifted - (0x4b400000 - 127)) << 23;
  return exp2_fraction(x - n) * (vf)power;
#endif
}
// e^x for x < 88 at the price of 12 instructions: within 1.5 ulp, 1 at 0, NaN kept, 0 for x below
// `least`, which must be -87 or more.
INLINE vf exp_of_weight(vf x, float least) {
  const float magic = 12582912.0f + 127.0f;  // leaves the biased exponent in the low bits
  const vf shifted = x * LOG2E + magic;
  const vf r = x * LOG2E - (shifted - magic);
  vf p = vec(1.32647272e-3f);
  p = p * r + 9.67151264e-3f;
  p = p * r + 5.55073374e-2f;
  p = p * r + 0.240222421f;
  p = p * r + 0.693146978f;
  p = p * r + 1.0f;
  const vf y = p * (vf)((vi)shifted << 23);
  return x < least ? vf{} : y;
}
INLINE vf exp2_any(vf x) {
  const vf half = x * 0.5f;  // in two factors, so that no power overflows before the result does
  const vf low = half > 127.0f ? vec(127.0f) : half;
  const vf y = exp2_of_negative(nearest(low));
  return exp2_of_negative(x - nearest(low)) * y;
}
// x * log2(e) in two parts: the product's rounding error would be |x| ulp of the result.
INLINE vf exp_any(vf x) {
  const vf bounded = x > 100.0f ? vec(100.0f) : x < -120.0f ? vec(-120.0f) : x;
  const vf n = nearest(bounded * LOG2E);
  vf r = bounded - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  const vf half = nearest(n * 0.5f);
  return exp2_fraction(r * LOG2E) * exp2_of_negative(half) * exp2_of_negative(n - half);
}

INLINE float exp_(float x) { return __builtin_expf(x); }
INLINE vf exp_(vf x) { return exp_any(x); }
INLINE float exp2_(float x) { return __builtin_exp2f(x); }
INLINE vf exp2_(vf x) { return exp2_any(x); }
INLINE float log_(float x) { return __builtin_logf(x); }
INLINE vf log_(vf x) { return by_lane<log_>(x); }
INLINE float log1p_(float x) { return __builtin_log1pf(x); }
INLINE vf log1p_(vf x) { return by_lane<log1p_>(x); }
INLINE float sqrt_(float x) { return __builtin_sqrtf(x); }
INLINE vf sqrt_(vf x) {
  vf y;
  for (int i = 0; i < W; i++) y[i] = __builtin_sqrtf(x[i]);
  return y;
}
INLINE float rsqrt_(float x) { return 1.0f / __builtin_sqrtf(x); }
INLINE vf rsqrt_(vf x) { return 1.0f / sqrt_(x); }
INLINE float cos_(float x) { return __builtin_cosf(x); }
INLINE vf cos_(vf x) { return by_lane<cos_>(x); }
INLINE float sin_(float x) { return __builtin_sinf(x); }
INLINE vf sin_(vf x) { return by_lane<sin_>(x); }
INLINE float erf_(float x) { return __builtin_erff(x); }
INLINE vf erf_(vf x) { return by_lane<erf_>(x); }
INLINE float pow_(float x, float y) { return __builtin_powf(x, y); }
INLINE vf pow_(vf x, vf y) {
  vf z;
  for (int i = 0; i < W; i++) z[i] = __builtin_powf(x[i], y[i]);
  return z;
}

INLINE float tanh_(float x) { return __builtin_tanhf(x); }
// Near 0 an odd polynomial, elsewhere 1 - 2 / (exp(2x) + 1), where nothing cancels.
INLINE vf tanh_(vf x) {
  const vf a = absolute(x), y = x * x;
  vf p = vec(-5.70498872745e-3f);
  p = p * y + 2.06390887954e-2f;
  p = p * y + -5.37397155531e-2f;
  p = p * y + 1.33314422036e-1f;
  p = p * y + -3.33332819422e-1f;
  const vf small = x + x * y * p;
  const vf bounded = a > 10.0f ? vec(10.0f) : a;
  const vf large = 1.0f - 2.0f / (exp2_of_negative(bounded * (2.0f * LOG2E)) + 1.0f);
  const vf signed_large = x < 0.0f ? -large : large;
  return a < 0.625f ? small : signed_large;
}
INLINE float sigmoid(float x) { return 1.0f / (1.0f + __builtin_expf(-x)); }
INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp_any(-x)); }
INLINE float softplus(float x) { return x > 40.0f ? x : __builtin_log1pf(__builtin_expf(x)); }
INLINE vf softplus(vf x) { return x > 40.0f ? x : log1p_(exp_any(x)); }

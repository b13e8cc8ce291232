// bf16 products by the CPU's own dot products of pairs (AVX512_BF16): two neighbours along the depth
// of a product share 32 bits, and one instruction multiplies and adds both in fp32.
//
// A pair lies where a float would: packed queries, keys, weights and values are matrices of floats
// of half the depth, of which only `dot_pairs` looks at the bits. Scores are as exact as those of
// widened numbers; weights are rounded to bf16 before they meet the values, as torch's kernels do.
constexpr int PAIR = KEY + 1;  // a product of pairs, beside the scores of `attention.h`

#if defined(__AVX512BF16__) || defined(EMULATE_PAIRS)
constexpr bool PAIRS = W == 16 && std::is_same<T, bf16>::value && SCORE == DOT && !GATHERED;
#else
constexpr bool PAIRS = false;
#endif
constexpr int DEPTH = PAIRS ? (D + 1) / 2 : D;       // of the product of queries and keys
constexpr int VALUE_ROWS = PAIRS ? BK / 2 : BK;      // of a packed tile of values
constexpr int KEY_PRODUCT = PAIRS ? PAIR : SCORE, VALUE_PRODUCT = PAIRS ? PAIR : DOT;
constexpr float SCORE_FACTOR = PAIRS ? ALPHA : 1.0f;  // what packed queries do not hold

INLINE float pair(bf16 low, bf16 high) {
  const uint32_t bits = low.bits | (uint32_t)high.bits << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

// sum + low(a) * low(b) + high(a) * high(b) in every lane.
INLINE vf dot_pairs(vf sum, vf a, float b) {
#if defined(AVX512) && defined(__AVX512BF16__)
  return plus_dots_of_pairs(sum, a, vec(b));
#else
  const vi x = (vi)a, y = (vi)vec(b);
  const vi high = vec((int32_t)0xffff0000);
  return sum + (vf)(x << 16) * (vf)(y << 16) + (vf)(x & high) * (vf)(y & high);
#endif
}

// The lanes of a vector as bf16, two by two.
INLINE void store_pairs(float* p, vf x) {
#if defined(AVX512) && defined(__AVX512BF16__)
  const vh y = narrowed_bf16(x);
  memcpy(p, &y, sizeof y);
#else
  bf16 y[W];
  for (int i = 0; i < W; i++) assign(y + i, x[i]);
  memcpy(p, y, sizeof y);
#endif
}

// Elements 2p and 2p + 1 of a row of `width`; 0 behind its end.
INLINE float pair_of(const bf16* row, int64_t step, int p, int width) {
  const bf16 none{0};
  return pair(row[2 * p * step], 2 * p + 1 < width ? row[(2 * p + 1) * step] : none);
}
template <typename E> INLINE float pair_of(const E*, int64_t, int, int) { return 0; }

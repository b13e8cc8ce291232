// Tokens in the lanes of vectors: selection of lanes, transposition, and packing of token rows as
// channel rows whose neighbours are tokens.
typedef int32_t vi_in_memory __attribute__((vector_size(4 * W), aligned(4), may_alias));

INLINE vi load_int(const int32_t* p) { return *(const vi_in_memory*)p; }
INLINE void store_int(int32_t* p, vi x) { *(vi_in_memory*)p = x; }

INLINE int32_t least_of_lanes(vi x) {
#if defined(AVX512)
  x = minimum(x, (vi)apart_8((vf)x));
  x = minimum(x, (vi)apart_4((vf)x));
  x = minimum(x, (vi)apart_2((vf)x));
  return minimum(x[0], x[1]);
#else
  int32_t y = x[0];
  for (int i = 1; i < W; i++) y = x[i] < y ? x[i] : y;
  return y;
#endif
}
INLINE int32_t largest_of_lanes(vi x) { return -least_of_lanes(-x); }

// Lane i is element place[i] of the 2W elements of two vectors.
INLINE vf select(vf a, vf b, vi place) {
#if defined(AVX512)
  return selected(a, b, place);
#elif defined(AVX2)
  return place < W ? permuted(a, place) : permuted(b, place);
#else
  vf y;
  for (int i = 0; i < W; i++) y[i] = place[i] < W ? a[place[i] & (W - 1)] : b[place[i] & (W - 1)];
  return y;
#endif
}
// Lane i is p[place[i]].
INLINE vf gather(const float* p, vi place) {
#if defined(AVX512)
  return gathered(p, place);
#else
  vf y;
  for (int i = 0; i < W; i++) y[i] = p[place[i]];
  return y;
#endif
}
// An operand of queries and keys in lanes.
template <typename R, typename E>
INLINE typename Wide<R>::type lanes_at(const Operand<E>& op, const Place& place, vi row,
                                       vi column) {
  const E* const x = op.at(place);
  const vi at = row * (int32_t)op.row + column * (int32_t)op.column;
  if constexpr (std::is_same<E, float>::value && std::is_same<R, float>::value)
    return gather(x, at);
  typename Wide<R>::type y;
  for (int i = 0; i < W; i++) Operand<E>::template put<R>(y, i, converted<R>(x[at[i]]));
  return y;
}

// -- transposition -------------------------------------------------------------------------------
template <int H> INLINE void exchange(vf* x) {  // blocks of H x H across the diagonal
  vi low, high;
  for (int l = 0; l < W; l++) {
    low[l] = l & H ? W + l - H : l;
    high[l] = l & H ? W + l : l + H;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) {
    if (i & H) continue;
    const vf a = x[i], b = x[i + H];
    x[i] = select(a, b, low);
    x[i + H] = select(a, b, high);
  }
}
INLINE void transpose(vf* x) {
  exchange<1>(x);
  exchange<2>(x);
  if constexpr (W > 4) exchange<4>(x);
  if constexpr (W > 8) exchange<8>(x);
}

// -- packing -------------------------------------------------------------------------------------
// W neighbours in memory.
INLINE vf widened(const float* p) { return load(p); }
INLINE vf widened(const bf16* p) {
  typedef uint16_t half __attribute__((vector_size(2 * W)));
  half bits;
  memcpy(&bits, p, sizeof bits);
  return (vf)(__builtin_convertvector(bits, vu) << 16);
}
INLINE vf widened(const fp16* p) {
#if defined(AVX512) || defined(AVX2) && defined(__F16C__)
  vh bits;
  memcpy(&bits, p, sizeof bits);
  return widened_halves(bits);
#else
  vf y;
  for (int i = 0; i < W; i++) y[i] = as_float(p[i]);
  return y;
#endif
}

// Brings W token rows that will be read (or written) nearer to the core.
template <bool WRITTEN, typename E>
INLINE void ahead(const Matrix<E>& x, const E* from, const int32_t* token, int width) {
  if (x.column != 1) return;
  for (int l = 0; l < W; l++)
    for (const char *p = (const char*)(from + token[l] * x.row), *end = p + width * sizeof(E);
         p < end; p += 64)
      __builtin_prefetch(p, WRITTEN, 2);
}

// Channels of W tokens of x, times a factor: channel e is a vector at to + e * step.
template <typename E>
static void pack_tokens(const Matrix<E>& x, const E* from, const int32_t* token, int width,
                        float* to, int64_t step, float factor) {
  bool neighbours = x.row == 1;
  for (int l = 1; l < W; l++) neighbours &= token[l] == token[0] + l;
  if (neighbours) {
    const E* row = from + token[0];
    for (int e = 0; e < width; e++) store(to + e * step, widened(row + e * x.column) * factor);
    return;
  }
  const E* rows[W];
  for (int l = 0; l < W; l++) rows[l] = from + token[l] * x.row;
  int e = 0;
  if (x.column == 1)
    for (; e + W <= width; e += W) {
      vf block[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; l++) block[l] = widened(rows[l] + e);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) store(to + (e + i) * step, block[i] * factor);
    }
  for (; e < width; e += W) {
    const int count = width - e < W ? width - e : W;
    vf block[W];
    for (int l = 0; l < W; l++) {
      alignas(64) float own[W] = {};
      for (int i = 0; i < count; i++) own[i] = as_float(rows[l][(e + i) * x.column]);
      block[l] = load(own);
    }
    transpose(block);
    for (int i = 0; i < count; i++) store(to + (e + i) * step, block[i] * factor);
  }
}

INLINE void narrowed(float* p, vf x) { store(p, x); }
template <typename E> INLINE void narrowed(E* p, vf x) {
  for (int i = 0; i < W; i++) assign(p + i, x[i]);
}
INLINE void narrowed(bf16* p, vf x) {  // as `assign` rounds
  typedef uint16_t half __attribute__((vector_size(2 * W)));
  const vu bits = (vu)x;
  const vu even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const half y = __builtin_convertvector((vu)(x != x ? (vi)(vu{} + 0x7fc0) : (vi)even), half);
  memcpy(p, &y, sizeof y);
}
INLINE void narrowed(fp16* p, vf x) {
#if defined(AVX512)
  const vh y = narrowed_halves(x);
  memcpy(p, &y, sizeof y);
#else
  for (int i = 0; i < W; i++) assign(p + i, x[i]);
#endif
}

// The reverse: rows of `count` tokens from channels that lie as vectors, `step` floats apart.
template <typename E>
static void unpack_tokens(const Matrix<E>& x, E* to, const int32_t* token, int count, int width,
                          const float* from, int64_t step) {
  for (int e = 0; e < width; e += W) {
    const int own = width - e < W ? width - e : W;
    vf block[W];
    for (int i = 0; i < W; i++) block[i] = i < own ? load(from + (e + i) * step) : vf{};
    transpose(block);
    for (int l = 0; l < count; l++) {
      E* const row = to + token[l] * x.row + e * x.column;
      if (own == W && x.column == 1) {
        narrowed(row, block[l]);
      } else {
        for (int i = 0; i < own; i++) assign(row + i * x.column, block[l][i]);
      }
    }
  }
}

// -- rows of tokens ------------------------------------------------------------------------------
// Rows of tokens, times a factor, one behind the other; their ends up to WIDTH are 0.
template <int OWN, int WIDTH, typename E>
static void copy_rows(const Matrix<E>& x, const E* from, const int32_t* token, int count,
                      float* to, float factor) {
  constexpr int whole = OWN / W * W;
  for (int i = 0; i < count; i++, to += WIDTH) {
    const E* const row = from + token[i] * x.row;
    if (x.column == 1) {
#pragma GCC unroll 8
      for (int e = 0; e < whole; e += W) store(to + e, widened(row + e) * factor);
      for (int e = whole; e < OWN; e++) to[e] = as_float(row[e]) * factor;
    } else {
      for (int e = 0; e < OWN; e++) to[e] = as_float(row[e * x.column]) * factor;
    }
    for (int e = OWN; e < WIDTH; e++) to[e] = 0;
  }
}

// Brings rows nearer that will be read next.
template <int OWN, typename E>
INLINE void rows_ahead(const Matrix<E>& x, const E* from, const int32_t* token, int first, int end) {
  for (int i = first; i < end; i++) {
    const char* const row = (const char*)(from + token[i] * x.row);
    for (int at = 0; at < (int)(OWN * sizeof(E)); at += 64) __builtin_prefetch(row + at, 0, 2);
  }
}

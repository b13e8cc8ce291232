// The corners of sampled points, listed for many points at once: what the forward and the backward
// pass of deformable attention share.
//
// The generated part above this text defines the element types T of `value` and A of everything
// else, DOUBLE if that is double, LANES of A in a vector, AXES, DEPTH, C, LINEAR, ALIGN, RANGE, PADDING and LOST.
#include <omp.h>

enum { UNIT, SIGNED, TEXELS };
enum { ZEROS, BORDER, REFLECTION };
constexpr int RANK = AXES + DEPTH;
constexpr int SIDES = LINEAR ? 2 : 1;
constexpr int CORNERS = LINEAR ? 1 << AXES : 1;
constexpr int VECTORS = C / LANES, REST = C % LANES;
constexpr int GROUP = 64 / sizeof(A);  // points of which the corners are listed together

typedef A va __attribute__((vector_size(LANES * sizeof(A))));
typedef A va_in_memory __attribute__((vector_size(LANES * sizeof(A)), aligned(sizeof(A)),
                                      may_alias));
INLINE va get(const A* p) { return *(const va_in_memory*)p; }
INLINE void put(A* p, va x) { *(va_in_memory*)p = x; }

typedef A ga __attribute__((vector_size(64)));
typedef int32_t gi __attribute__((vector_size(4 * GROUP)));
typedef int32_t gi_in_memory __attribute__((vector_size(4 * GROUP), aligned(4), may_alias));
typedef decltype(ga{} < ga{}) ga_truth;

INLINE A number(double x) { return (A)x; }
INLINE A number(float x) { return (A)x; }
INLINE A number(bf16 x) { return as_float(x); }
INLINE A number(fp16 x) { return as_float(x); }

// LANES elements of `value`.
INLINE va wide(const A* p) { return get(p); }
#if !DOUBLE
INLINE va wide(const bf16* p) {
  typedef uint16_t half __attribute__((vector_size(2 * LANES)));
  typedef uint32_t whole __attribute__((vector_size(4 * LANES)));
  half bits;
  memcpy(&bits, p, sizeof bits);
  return (va)(__builtin_convertvector(bits, whole) << 16);
}
INLINE va wide(const fp16* p) {
#if LANES == 16 && defined(AVX512) || LANES == 8 && defined(__F16C__)
  typedef uint16_t half __attribute__((vector_size(2 * LANES)));
  half bits;
  memcpy(&bits, p, sizeof bits);
  return (va)widened_halves(bits);
#else
  va y;
  for (int i = 0; i < LANES; i++) y[i] = number(p[i]);
  return y;
#endif
}
#endif

struct Call {
  int64_t threads, batch, queries, heads, points, layers, depth_heads, texels;
  const T* value;
  int64_t value_batch, value_texel, value_head;
  const A *locations, *weights, *depth;
  A* out;
  const int32_t* level;  // rows over the points: RANK sizes, AXES strides, the first texel
  int64_t columns;       // of it, a multiple of GROUP
  // of the backward pass; gradients that nobody asked for are null
  const A* grad;
  A *grad_value, *grad_locations, *grad_weights, *grad_depth;
  int64_t apart;  // each head has a gradient of depth of its own, added up by the caller
};

// GROUP points of a (batch, query, head). Along an axis a point lies between the texels `low` and
// `low` + 1, of which it has the shares share[0] and share[1], 0 outside; the bits of `exists` say
// which of them exist. `slope` is the derivative of a coordinate with respect to its location.
struct alignas(64) List {
  A share[RANK][SIDES][GROUP];
  A slope[RANK][GROUP];
  int32_t low[RANK][GROUP];
  int32_t texel[GROUP];  // the corner with the lowest numbers, whether it exists or not
  int32_t exists[GROUP];
  int32_t lost[GROUP];
};
constexpr int32_t EVERY = (1 << RANK * SIDES) - 1;

INLINE bool corner_exists(int32_t exists, int corner) {
  for (int a = 0; a < AXES; a++)
    if (!(exists >> (a * SIDES + (corner >> a & 1)) & 1)) return false;
  return true;
}
// Whether a point has any corner.
INLINE bool somewhere(int32_t exists) {
  for (int a = 0; a < RANK; a++)
    if (!(exists >> a * SIDES & ((1 << SIDES) - 1))) return false;
  return true;
}

INLINE ga as_numbers(gi x) { return __builtin_convertvector(x, ga); }
INLINE gi as_integers(ga x) { return __builtin_convertvector(x, gi); }
INLINE gi truth(ga_truth x) { return __builtin_convertvector(x, gi); }
template <A (*f)(A)> INLINE ga each(ga x) {
  ga y;
  for (int i = 0; i < GROUP; i++) y[i] = f(x[i]);
  return y;
}
INLINE A floor_of(A x) { return DOUBLE ? (A)__builtin_floor(x) : (A)__builtin_floorf(x); }
INLINE A nearest_of(A x) {
  return DOUBLE ? (A)__builtin_nearbyint(x) : (A)__builtin_nearbyintf(x);
}

template <bool SLOPES>
INLINE void list_axis(const Call& c, ga x, int64_t from, int a, gi& exists, gi& texel, gi& lost,
                      List& l) {
  const gi whole = *(const gi_in_memory*)(c.level + a * c.columns + from);
  const ga zero{}, size = as_numbers(whole), last = size - 1;
  const ga span = RANGE == TEXELS ? zero + 1 : ALIGN ? last : size;
  if (RANGE == SIGNED) x = (x + 1) * (A)0.5;
  if (RANGE != TEXELS) x = ALIGN ? x * span : x * span - (A)0.5;
  if (LOST) lost |= truth(x - x != 0);
  ga slope = RANGE == SIGNED ? span * (A)0.5 : span;
  if (PADDING == REFLECTION) {  // between the centres of the outermost texels, or their edges
    const ga least = zero + (ALIGN ? (A)0 : (A)-0.5), length = ALIGN ? last : size;
    const ga off = x - least, far = off < 0 ? -off : off;
    const ga turns = each<floor_of>(far / length), rest = far - turns * length;
    const ga_truth odd = turns - 2 * each<floor_of>(turns * (A)0.5) > (A)0.5;
    x = (odd ? length - rest : rest) + least;
    slope = (odd ^ (off < 0)) ? -slope : slope;
  }
  if (PADDING != ZEROS) {  // NaN is the first texel; at the ends F.grid_sample has no gradient
    slope = (x > 0) & (x < last) ? slope : zero;
    x = x > 0 ? x : zero;
    x = x < last ? x : last;
  } else {  // far outside nothing is; as whole numbers such places would overflow
    x = x > -2 ? x : zero - 2;
    x = x < size + 1 ? x : size + 1;
  }
  if (!LINEAR) x = each<nearest_of>(x);
  gi low = as_integers(x);
  low += truth(as_numbers(low) > x);
  const ga part = x - as_numbers(low);
  const gi first = (low >= 0) & (low < whole), second = (low >= -1) & (low + 1 < whole);
  *(gi*)l.low[a] = low;
  *(ga*)l.share[a][0] = __builtin_convertvector(first, ga_truth) ? 1 - part : zero;
  exists |= first & 1 << a * SIDES;
  if (LINEAR) {
    *(ga*)l.share[a][SIDES - 1] = __builtin_convertvector(second, ga_truth) ? part : zero;
    exists |= second & 2 << a * SIDES;
  }
  if (SLOPES) *(ga*)l.slope[a] = LINEAR ? slope : zero;
  if (a < AXES) texel += low * *(const gi_in_memory*)(c.level + (RANK + a) * c.columns + from);
}

// The first `n` of GROUP points of the row of locations `at`, which are the points `from` and on.
template <bool SLOPES>
INLINE void list(const Call& c, const A* at, int64_t from, int n, List& l) {
  alignas(64) A apart[RANK][GROUP] = {};
  if (n == GROUP) {
    for (int t = 0; t < GROUP; t++)
      for (int a = 0; a < RANK; a++) apart[a][t] = at[t * RANK + a];
  } else {  // beyond the last point the table has levels without texels
    for (int t = 0; t < n; t++)
      for (int a = 0; a < RANK; a++) apart[a][t] = at[t * RANK + a];
  }
  gi exists{}, lost{}, texel = *(const gi_in_memory*)(c.level + (RANK + AXES) * c.columns + from);
  for (int a = 0; a < RANK; a++)
    list_axis<SLOPES>(c, *(const ga*)apart[a], from, a, exists, texel, lost, l);
  *(gi*)l.exists = exists;
  *(gi*)l.lost = lost;
  *(gi*)l.texel = texel;
}

// How far the texel of a corner is from the lowest one.
INLINE int64_t step(const Call& c, int64_t t, int corner) {
  int64_t texels = 0;
  for (int a = 0; a < AXES; a++)
    if (corner >> a & 1) texels += c.level[(RANK + a) * c.columns + t];
  return texels;
}
// The share of a corner in all axes but `left_out`.
INLINE A shares(const List& l, int t, int corner, int left_out = -1) {
  A part = 1;
  for (int a = 0; a < AXES; a++)
    if (a != left_out) part *= l.share[a][corner >> a & 1][t];
  return part;
}
INLINE int64_t depths(const Call& c, int64_t b, int64_t texel, int64_t h) {
  return ((b * c.texels + texel) * c.depth_heads + (c.depth_heads > 1 ? h : 0)) * c.layers;
}
// The depth of a corner at the point's layers; 0 beyond them.
INLINE A depth_score(const List& l, int t, const A* row) {
  A score = 0;
  for (int i = 0; i < SIDES; i++)
    if (l.exists[t] >> (AXES * SIDES + i) & 1)
      score += l.share[RANK - 1][i][t] * row[l.low[RANK - 1][t] + i];
  return score;
}

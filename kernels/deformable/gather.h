// Deformable attention as a gather: for each (batch, query, head) the corners of its points are
// listed once, then their rows of `value` are summed in registers. Nothing else is held.
//
// The generated part above this text defines W, AXES, LINEAR, BORDER, ALIGN, RANGE, LOST, DEPTH, C
// and the element type T of `value`.
#include <omp.h>

enum { UNIT, SIGNED, TEXELS };
constexpr int RANK = AXES + DEPTH;
constexpr int CORNERS = LINEAR ? 1 << AXES : 1;
constexpr int AT_ONCE = 8;   // vectors of channels that are summed together
constexpr int POINTS = 64;   // of which the corners are listed together
constexpr int AHEAD = 6;     // rows that are asked for before they are needed

INLINE vf wide(const float* p) { return load(p); }
template <typename E> INLINE vf wide(const E* p) {
  vf y;
  for (int i = 0; i < W; i++) y[i] = as_float(p[i]);
  return y;
}
INLINE vf wide(const bf16* p) {
  typedef uint16_t half __attribute__((vector_size(2 * W)));
  half bits;
  memcpy(&bits, p, sizeof bits);
  return (vf)(__builtin_convertvector(bits, vu) << 16);
}

// The texels next to a location along an axis of n: numbers, shares, and how many are inside.
struct Neighbours {
  int32_t at[2];
  float share[2];
  int count;
};
INLINE float coordinate(float x, int32_t n) {
  if (RANGE == TEXELS) return x;
  const float unit = RANGE == SIGNED ? (x + 1) * 0.5f : x;
  return ALIGN ? unit * (float)(n - 1) : unit * (float)n - 0.5f;
}
INLINE Neighbours neighbours(float x, int32_t n) {
  Neighbours found;
  found.count = 0;
  const float size = (float)n;
  if (n == 0) return found;
  if (BORDER) x = x > 0 ? (x < size - 1 ? x : size - 1) : 0;  // NaN is the first texel
  if (!LINEAR) {
    x = std::nearbyint(x);
    if (!(x >= 0 && x < size)) return found;
    found.at[0] = (int32_t)x;
    found.share[0] = 1;
    found.count = 1;
    return found;
  }
  if (!(x > -1 && x < size)) return found;
  const float low = std::floor(x), part = x - low;
  const int32_t i = (int32_t)low;
  if (i >= 0) {
    found.at[0] = i;
    found.share[0] = 1 - part;
    found.count = 1;
  }
  if (i + 1 < n) {
    found.at[found.count] = i + 1;
    found.share[found.count++] = part;
  }
  return found;
}

template <int VECTORS>
INLINE void sum_rows(const T* base, const int64_t* offset, const float* share, int count,
                     float* out) {
  vf total[VECTORS];
#pragma GCC unroll 8
  for (int j = 0; j < VECTORS; j++) total[j] = load(out + j * W);
  for (int i = 0; i < count; i++) {
    const T* const row = base + offset[i];
    if (i + AHEAD < count) {
      const char* const next = (const char*)(base + offset[i + AHEAD]);
      for (int j = 0; j < VECTORS * W * (int)sizeof(T); j += 64) __builtin_prefetch(next + j);
    }
    const vf factor = vf{} + share[i];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; j++) total[j] += factor * wide(row + j * W);
  }
#pragma GCC unroll 8
  for (int j = 0; j < VECTORS; j++) store(out + j * W, total[j]);
}

struct Call {
  int64_t threads, batch, queries, heads, points, layers, depth_heads, texels;
  const T* value;
  int64_t value_batch, value_texel, value_head;
  const float *locations, *weights, *depth;
  float* out;
  const int32_t* level;  // of each point: AXES sizes, AXES strides, first texel
};

// Corners of some points; returns how many there are. `spoil` becomes NaN where a result must be.
static int list(const Call& c, int64_t b, int64_t h, const float* at, const float* weight,
                const int32_t* level, int points, int64_t* offset, float* share, float& spoil) {
  int n = 0;
  for (int t = 0; t < points; t++, at += RANK, level += 2 * AXES + 1) {
    Neighbours near[RANK];
    bool inside = true;
    for (int a = 0; a < RANK; a++) {
      const int32_t size = a < AXES ? level[a] : (int32_t)c.layers;
      const float x = coordinate(at[a], size);
      near[a] = neighbours(x, size);
      inside &= near[a].count > 0;
      if (LOST && !(x - x == 0)) spoil = NOT_A_NUMBER;
    }
    if (!inside) {
      spoil += weight[t] * 0.0f;
      continue;
    }
    for (int corner = 0; corner < CORNERS; corner++) {
      int64_t texel = level[2 * AXES];
      float part = weight[t];
      bool exists = true;
      for (int a = 0; a < AXES; a++) {
        const int side = corner >> a & 1;
        if (side >= near[a].count) { exists = false; break; }
        texel += (int64_t)near[a].at[side] * level[AXES + a];
        part *= near[a].share[side];
      }
      if (!exists) continue;
      if (DEPTH) {
        const Neighbours& z = near[RANK - 1];
        const float* const d = c.depth + ((b * c.texels + texel) * c.depth_heads
                                          + (c.depth_heads > 1 ? h : 0)) * c.layers;
        float score = 0;
        for (int i = 0; i < z.count; i++) score += z.share[i] * d[z.at[i]];
        part *= score;
      }
      offset[n] = texel * c.value_texel;
      share[n++] = part;
    }
  }
  return n;
}

static void one(const Call& c, int64_t b, int64_t q, int64_t h) {
  constexpr int VECTORS = C / W, REST = C % W;
  const int64_t row = (b * c.queries + q) * c.heads + h;
  const T* const base = c.value + b * c.value_batch + h * c.value_head;
  float* const out = c.out + row * C;
  int64_t offset[POINTS * CORNERS];
  float share[POINTS * CORNERS], spoil = 0;
  for (int e = 0; e < C; e++) out[e] = 0;
  for (int64_t t = 0; t < c.points; t += POINTS) {
    const int points = (int)(c.points - t < POINTS ? c.points - t : POINTS);
    const int64_t from = row * c.points + t;
    const int n = list(c, b, h, c.locations + from * RANK, c.weights + from,
                       c.level + t * (2 * AXES + 1), points, offset, share, spoil);
    int v = 0;
    for (; v + AT_ONCE <= VECTORS; v += AT_ONCE)
      sum_rows<AT_ONCE>(base + v * W, offset, share, n, out + v * W);
    if constexpr (VECTORS % AT_ONCE != 0)
      sum_rows<VECTORS % AT_ONCE>(base + v * W, offset, share, n, out + v * W);
    if constexpr (REST != 0)
      for (int i = 0; i < n; i++) {
        const T* const x = base + offset[i] + VECTORS * W;
        for (int e = 0; e < REST; e++) out[VECTORS * W + e] += share[i] * as_float(x[e]);
      }
  }
  if (!(spoil == 0))
    for (int e = 0; e < C; e++) out[e] += spoil;
}

extern "C" void gather(const Call* call) {
  const Call& c = *call;
#pragma omp parallel for collapse(2) schedule(static) num_threads((int)c.threads)
  for (int64_t b = 0; b < c.batch; b++)
    for (int64_t q = 0; q < c.queries; q++)
      for (int64_t h = 0; h < c.heads; h++) one(c, b, q, h);
}

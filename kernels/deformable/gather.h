// Deformable attention as a gather: for each (batch, query, head) the corners of its points are
// listed, then their rows of `value` are summed in registers. Nothing else is held. Follows
// points.h.
constexpr int AT_ONCE = 4;    // vectors of channels that are summed together
constexpr int AHEAD = 3;      // points whose rows are asked for before they are needed

// Adds the rows of all points to out[0 .. COUNT * LANES).
template <int COUNT>
INLINE void sum_rows(const Call& c, int64_t from, int n, const List& l, const A (*share)[GROUP],
                     const T* base, A* out) {
  va even[COUNT], odd[COUNT];  // two chains of additions, so that none waits for the other
  for (int j = 0; j < COUNT; j++) even[j] = get(out + j * LANES), odd[j] = va{};
  for (int t = 0; t < n; t++) {
    const T* const row = base + l.texel[t] * c.value_texel;
    if (t + AHEAD < n) {  // what is outside is asked for in vain
      const T* const later = base + l.texel[t + AHEAD] * c.value_texel;
      for (int k = 0; k < CORNERS; k++) {
        const char* const own = (const char*)(later + step(c, from + t + AHEAD, k) * c.value_texel);
        for (int e = 0; e < COUNT * LANES * (int)sizeof(T); e += 64) __builtin_prefetch(own + e);
      }
    }
    if (__builtin_expect(l.exists[t] == EVERY, 1)) {
#pragma GCC unroll 8
      for (int k = 0; k < CORNERS; k++) {
        const T* const own = row + step(c, from + t, k) * c.value_texel;
        va* const total = k & 1 ? odd : even;
        for (int j = 0; j < COUNT; j++) total[j] += share[k][t] * wide(own + j * LANES);
      }
    } else if (somewhere(l.exists[t])) {
      for (int k = 0; k < CORNERS; k++) {
        if (!corner_exists(l.exists[t], k)) continue;
        const T* const own = row + step(c, from + t, k) * c.value_texel;
        for (int j = 0; j < COUNT; j++) even[j] += share[k][t] * wide(own + j * LANES);
      }
    }
  }
  for (int j = 0; j < COUNT; j++) put(out + j * LANES, even[j] + odd[j]);
}

INLINE void sum_rest(const Call& c, int64_t from, int n, const List& l, const A (*share)[GROUP],
                     const T* base, A* out) {
  for (int t = 0; t < n; t++)
    for (int k = 0; k < CORNERS; k++) {
      if (!somewhere(l.exists[t]) || !corner_exists(l.exists[t], k)) continue;
      const T* const own = base + (l.texel[t] + step(c, from + t, k)) * c.value_texel;
      for (int e = 0; e < REST; e++) out[e] += share[k][t] * number(own[e]);
    }
}

// NaN where the result of these points must be, else 0: a weight that is not finite counts outside
// of the grid, too.
INLINE A spoilt(const List& l, ga weight) {
  const ga nothing = weight * 0;
  gi bad = truth(nothing != 0);
  if (LOST) bad |= *(const gi*)l.lost;
  int64_t words[sizeof bad / 8], any = 0;
  memcpy(words, &bad, sizeof bad);
  for (int64_t word : words) any |= word;
  if (__builtin_expect(!any, 1)) return 0;
  for (int t = 0; t < GROUP; t++)
    if (bad[t] && (LOST && l.lost[t] || !somewhere(l.exists[t]))) return (A)NOT_A_NUMBER;
  return 0;
}

static void one(const Call& c, int64_t b, int64_t q, int64_t h) {
  const int64_t row = (b * c.queries + q) * c.heads + h;
  const T* const base = c.value + b * c.value_batch + h * c.value_head;
  A* const out = c.out + row * C;
  List l;
  alignas(64) A share[CORNERS][GROUP];
  A spoil = 0;
  for (int e = 0; e < C; e++) out[e] = 0;
  for (int64_t from = 0; from < c.points; from += GROUP) {
    const int n = (int)(c.points - from < GROUP ? c.points - from : GROUP);
    const A* const weights = c.weights + row * c.points + from;
    list<false>(c, c.locations + (row * c.points + from) * RANK, from, n, l);
    alignas(64) A weight[GROUP] = {};
    memcpy(weight, weights, (n == GROUP ? GROUP : n) * sizeof(A));
    for (int k = 0; k < CORNERS; k++) {
      ga part = *(const ga*)weight;
      for (int a = 0; a < AXES; a++) part *= *(const ga*)l.share[a][k >> a & 1];
      *(ga*)share[k] = part;
    }
    spoil += spoilt(l, *(const ga*)weight);
    if (DEPTH)
      for (int t = 0; t < n; t++)
        for (int k = 0; k < CORNERS; k++)
          if (somewhere(l.exists[t]) && corner_exists(l.exists[t], k))
            share[k][t] *= depth_score(
                l, t, c.depth + depths(c, b, l.texel[t] + step(c, from + t, k), h));
    int v = 0;
    for (; v + AT_ONCE <= VECTORS; v += AT_ONCE)
      sum_rows<AT_ONCE>(c, from, n, l, share, base + v * LANES, out + v * LANES);
    if constexpr (VECTORS % AT_ONCE != 0)
      sum_rows<VECTORS % AT_ONCE>(c, from, n, l, share, base + v * LANES, out + v * LANES);
    if constexpr (REST != 0)
      sum_rest(c, from, n, l, share, base + VECTORS * LANES, out + VECTORS * LANES);
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

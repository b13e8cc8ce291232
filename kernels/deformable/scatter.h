// The gradients of deformable attention in one pass: for each point the products of its corners'
// rows of `value` with the gradient of the result, g_k, and from them
//
//     d weight    = sum over corners of  share_k * s_k * g_k
//     d location  = weight * slope * sum of  +-(share_k without that axis) * s_k * g_k
//     d depth     = weight * share_k * (share of the layer) * g_k
//     d value     = weight * share_k * s_k * (gradient of the result)
//
// Each (batch, head) has rows of `value` of its own and belongs to one thread, so that no two
// threads write to one place and results do not depend on their number. Where all heads share a
// depth, each writes to a gradient of its own or, where that would be too much, one thread has all
// heads of a batch entry. Follows points.h.

// The products of four rows, or of one, with the gradient.
INLINE A sum_of(va x) {
#if LANES == W && !DOUBLE
  return sum_of_lanes(x);
#else
  A y = 0;
  for (int i = 0; i < LANES; i++) y += x[i];
  return y;
#endif
}
INLINE A product(const T* row, const A* grad) {
  va total{};
  for (int j = 0; j < VECTORS; j++) total += wide(row + j * LANES) * get(grad + j * LANES);
  A sum = VECTORS ? sum_of(total) : (A)0;
  for (int e = VECTORS * LANES; e < C; e++) sum += number(row[e]) * grad[e];
  return sum;
}
INLINE void add_row(A* row, A factor, const A* grad) {
  for (int j = 0; j < VECTORS; j++)
    put(row + j * LANES, get(row + j * LANES) + factor * get(grad + j * LANES));
  for (int e = VECTORS * LANES; e < C; e++) row[e] += factor * grad[e];
}

INLINE void point(const Call& c, int64_t b, int64_t h, int64_t from, int t, const List& l,
                  const A* grad, A weight, int64_t at, bool products) {
  const int32_t exists = l.exists[t];
  const T* const base = c.value + b * c.value_batch + h * c.value_head;
  A of_weight = 0, of_location[RANK] = {};
#pragma GCC unroll 8
  for (int k = 0; k < CORNERS; k++) {
    if (exists != EVERY && !corner_exists(exists, k)) continue;
    const int64_t texel = l.texel[t] + step(c, from + t, k);
    const A part = shares(l, t, k);
    A score = 1;
    const A* deep = nullptr;
    if (DEPTH) {
      deep = c.depth + depths(c, b, texel, h);
      score = depth_score(l, t, deep);
    }
    if (products) {
      const A g = product(base + texel * c.value_texel, grad);
      of_weight += part * score * g;
      if (LINEAR) {
        for (int a = 0; a < AXES; a++) {
          const A rest = shares(l, t, k, a) * score * g;
          of_location[a] += k >> a & 1 ? rest : -rest;
        }
      }
      if (DEPTH) {
        const int64_t whose = c.apart ? (h * c.batch + b) * c.texels * c.layers + texel * c.layers
                                      : depths(c, b, texel, h);
        for (int i = 0; i < SIDES; i++) {
          if (!(exists >> (AXES * SIDES + i) & 1)) continue;
          const int32_t z = l.low[RANK - 1][t] + i;
          if (LINEAR) of_location[RANK - 1] += (i ? part : -part) * deep[z] * g;
          if (c.grad_depth) c.grad_depth[whose + z] += weight * part * l.share[RANK - 1][i][t] * g;
        }
      }
    }
    if (c.grad_value)
      add_row(c.grad_value + ((b * c.texels + texel) * c.heads + h) * C, weight * part * score,
              grad);
  }
  if (c.grad_weights) c.grad_weights[at] = of_weight;
  if (c.grad_locations)
    for (int a = 0; a < RANK; a++)
      c.grad_locations[at * RANK + a] = weight * l.slope[a][t] * of_location[a];
}

static void one(const Call& c, int64_t b, int64_t q, int64_t h) {
  const int64_t row = (b * c.queries + q) * c.heads + h;
  const A* const grad = c.grad + row * C;
  const bool products = c.grad_weights || c.grad_locations || c.grad_depth;
  List l;
  for (int64_t from = 0; from < c.points; from += GROUP) {
    const int n = (int)(c.points - from < GROUP ? c.points - from : GROUP);
    list<true>(c, c.locations + (row * c.points + from) * RANK, from, n, l);
    for (int t = 0; t < n; t++) {
      const int64_t at = row * c.points + from + t;
      if (somewhere(l.exists[t])) {
        point(c, b, h, from, t, l, grad, c.weights[at], at, products);
        continue;
      }
      if (c.grad_weights) c.grad_weights[at] = LOST && l.lost[t] ? (A)NOT_A_NUMBER : (A)0;
      if (c.grad_locations)
        for (int a = 0; a < RANK; a++) c.grad_locations[at * RANK + a] = 0;
    }
  }
}

extern "C" void scatter(const Call* call) {
  const Call& c = *call;
  const bool together = DEPTH && c.grad_depth && c.depth_heads == 1 && !c.apart;
  const int64_t heads = together ? 1 : c.heads;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads((int)c.threads)
  for (int64_t b = 0; b < c.batch; b++)
    for (int64_t first = 0; first < heads; first++)
      for (int64_t h = first; h < (together ? c.heads : first + 1); h++)
        for (int64_t q = 0; q < c.queries; q++) one(c, b, q, h);
}

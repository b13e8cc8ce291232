// Neighbourhood attention: W queries of one grid row in the lanes of a vector. Here are the two
// products; `stencil_cells.h` has what a Spec does between and after them.
//
// Along every axis (z, y, x) a query keeps the positions [start, start + count); a dilation is gone
// by the order in which an axis is walked. Queries of ROWS grid rows share each key vector: it is
// selected from two panels of W tokens, lane by lane, so borders cost nothing. Softmax is lane by
// lane; values are summed CHANNELS_AT_ONCE at a time.
//
// The generated part above defines W, RANK, D, DV, ROWS, TAPS, CHANNELS_AT_ONCE, T, SCORE, ALPHA.
//@operands

constexpr int CHANNELS = (DV + CHANNELS_AT_ONCE - 1) / CHANNELS_AT_ONCE * CHANNELS_AT_ONCE;
enum { Z, Y, X };

struct Axis {
  int32_t length;
  const int32_t *order, *start, *count;  // by place: coordinate, window; X goes on for W more
  bool keeps(int query, int key) const {
    return start[query] <= key && key < start[query] + count[query];
  }
};

struct Call {
  int32_t threads, queries, keys;
  int32_t length[RANK + 1];
  int32_t own[RANK + 1];  // whether keys and values differ along a leading axis
  Matrix<T> q, k, v, out;
  Matrix<float> statistics;  // (*L, Q, 2): shift, inverse sum; null where they are not asked for
  Axis axis[3];
  int32_t lead, panels;           // lanes that are free at the start of a packed row; its panels
  int32_t most_entries, most_taps;  // of a group of grid rows
  Operands operands;
};

struct Entry { int32_t row, token, z, y; };      // a row of keys: its place, its first token
struct Run { int32_t a, b, first, last; };        // entries that rows a to b - 1 keep
struct Segment { int32_t first, last, panel; bool apart; };  // taps within two panels, or anywhere

struct Buffers {  // of one thread
  int z, group, block;  // what is in here
  int first, rows, taps, runs_found, segments_found;
  bool uneven;
  vi count;
  Run runs[ROWS * ROWS + 1];
  Entry* entries;
  Segment* segments;
  int32_t *place, *key_x;       // of taps: where it is in its panels, and its coordinate
  int32_t token[ROWS][W];   // of queries
  float *q, *s, *o;             // [channel][row], [entry][tap][row], [channel][row], of lanes
  vf top[ROWS], sum[ROWS], inverse[ROWS];
  vi some[ROWS];  // lanes that keep a key
};

// Entries of a group of grid rows, those that the same rows keep together.
static void find_entries(const Call& call, Buffers& b, int z, int first, int rows) {
  const Axis &outer = call.axis[Z], &own = call.axis[Y];
  int low = own.start[first], high = 0, found = 0;
  for (int r = first; r < first + rows; r++) {
    if (own.start[r] < low) low = own.start[r];
    if (own.start[r] + own.count[r] > high) high = own.start[r] + own.count[r];
  }
  b.rows = rows;
  b.runs_found = 0;
  for (int a = 0; a < rows; a++)
    for (int e = a + 1; e <= rows; e++) {
      const int before = found;
      for (int y = low; y < high; y++) {
        bool fits = !(a > 0 && own.keeps(first + a - 1, y)) &&
                    !(e < rows && own.keeps(first + e, y));
        for (int r = a; r < e; r++) fits &= own.keeps(first + r, y);
        if (!fits) continue;
        for (int i = 0; i < outer.count[z]; i++) {
          const int row = (outer.start[z] + i) * own.length + y;
          const int32_t own_z = outer.order[outer.start[z] + i], own_y = own.order[y];
          b.entries[found++] = {row, (own_z * own.length + own_y) * call.axis[X].length, own_z,
                                own_y};
        }
      }
      if (found > before) b.runs[b.runs_found++] = {a, e, before, found};
    }
}

// Where the keys of W queries from x on lie.
static void find_taps(const Call& call, Buffers& b, int x) {
  const Axis& own = call.axis[X];
  const vi start = load_int(own.start + x), last = load_int(own.count + x) - 1;
  b.count = last + 1;
  b.taps = largest_of_lanes(b.count);
  b.uneven = least_of_lanes(b.count) != b.taps;
  b.segments_found = 0;
  for (int tap = 0; tap < b.taps; tap++) {
    const vi key = start + minimum(vec(tap), last);  // what is no key of a lane reads its last
    for (int l = 0; l < W; l++) b.key_x[tap * W + l] = own.order[key[l]];
    const vi at = key + call.lead;
    const int low = least_of_lanes(at), high = largest_of_lanes(at), panel = low / W;
    const bool apart = high >= (panel + 2) * W;
    Segment* s = b.segments + b.segments_found - 1;
    if (!b.segments_found || apart || s->apart || low < s->panel * W ||
        high >= (s->panel + 2) * W) {
      *++s = {tap, tap, panel, apart};
      b.segments_found++;
    }
    s->last = tap + 1;
    store_int(b.place + tap * W, apart ? at : at - s->panel * W);
  }
}

// Where lanes that are apart find their elements in a packed row.
INLINE vi across(vi at, int channels) { return at / W * (channels * W) + (at & (W - 1)); }

// Raw scores of TN taps of one row of keys with R grid rows.
template <int TN, int R, bool APART>
static void scores_of(const float* k, const float* next, const int32_t* place, const float* q,
                      float* s, vf* top) {
  vi at[TN];
  vf sum[TN][R];
#pragma GCC unroll 16
  for (int t = 0; t < TN; t++) {
    at[t] = load_int(place + t * W);
    if constexpr (APART) at[t] = across(at[t], D);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) sum[t][r] = vf{};
  }
  for (int e = 0; e < D; e++) {
    vf row[R], low, high;
    if constexpr (!APART) {
      low = load(k + e * W);
      high = load(k + (D + e) * W);
      __builtin_prefetch(next + e * W, 0, 3);
      __builtin_prefetch(next + (D + e) * W, 0, 3);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) row[r] = load(q + (e * ROWS + r) * W);
#pragma GCC unroll 16
    for (int t = 0; t < TN; t++) {
      vf key;
      if constexpr (APART) key = gather(k + e * W, at[t]);
      else key = select(low, high, at[t]);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        if constexpr (SCORE == DISTANCE) {
          const vf gap = key - row[r];
          sum[t][r] += gap * gap;
        } else {
          sum[t][r] += key * row[r];
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    vf highest = sum[0][r];
#pragma GCC unroll 16
    for (int t = 0; t < TN; t++) {
      store(s + (t * ROWS + r) * W, sum[t][r]);
      if (t) highest = larger(sum[t][r], highest);
    }
    if constexpr (PLAIN) top[r] = larger(highest, top[r]);
  }
}
template <int TN, int R>
static void scores(int taps, int rows, bool apart, const float* k, const float* next,
                   const int32_t* place, const float* q, float* s, vf* top) {
  if constexpr (TN > 1)
    if (taps < TN) return scores<TN - 1, R>(taps, rows, apart, k, next, place, q, s, top);
  if constexpr (R > 1)
    if (rows < R) return scores<TN, R - 1>(taps, rows, apart, k, next, place, q, s, top);
  if constexpr (TN == 1)
    if (apart) return scores_of<1, R, true>(k, next, place, q, s, top);
  scores_of<TN, R, false>(k, next, place, q, s, top);
}

static void all_scores(const Call& call, Buffers& b, const float* packed) {
  for (int n = 0; n < b.runs_found; n++) {
    const Run run = b.runs[n];
    for (int i = run.first; i < run.last; i++) {
      const float* const row = packed + (int64_t)b.entries[i].row * call.panels * D * W;
      for (int g = 0; g < b.segments_found; g++) {
        const Segment& segment = b.segments[g];
        const float* const k = row + (segment.apart ? 0 : segment.panel) * D * W;
        for (int tap = segment.first; tap < segment.last; tap += TAPS) {
          const int count = segment.last - tap < TAPS ? segment.last - tap : TAPS;
          const float* const next = k + (i + 1 < run.last && tap == segment.first ?
              (int64_t)(b.entries[i + 1].row - b.entries[i].row) * call.panels * D * W : 0);
          scores<TAPS, ROWS>(count, run.b - run.a, segment.apart, k, next, b.place + tap * W,
                             b.q + run.a * W, b.s + ((i * b.taps + tap) * ROWS + run.a) * W,
                             b.top + run.a);
        }
      }
    }
  }
}

// Adds what the entries of a run give to channels from `e` on of its R rows.
template <int R>
static void values_of(const Call& call, Buffers& b, const Run& run, const float* packed, int e) {
  constexpr int N = CHANNELS_AT_ONCE;
  vf sum[N][R];
  float* const o = b.o + (e * ROWS + run.a) * W;
#pragma GCC unroll 16
  for (int j = 0; j < N; j++)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) sum[j][r] = load(o + (j * ROWS + r) * W);
  for (int i = run.first; i < run.last; i++) {
    const float* const row =
        packed + (int64_t)b.entries[i].row * call.panels * CHANNELS * W + e * W;
    const float* weight = b.s + (i * b.taps * ROWS + run.a) * W;
    if (i + 1 < run.last) {  // the next values come from too many places for the hardware to guess
      const float* next = packed + e * W + (b.segments[0].panel +
          (int64_t)b.entries[i + 1].row * call.panels) * (CHANNELS * W);
      for (int j = 0; j < N; j++) {
        __builtin_prefetch(next + j * W, 0, 3);
        __builtin_prefetch(next + (CHANNELS + j) * W, 0, 3);
      }
    }
    for (int g = 0; g < b.segments_found; g++) {
      const Segment& segment = b.segments[g];
      if (segment.apart) {
        const vi at = across(load_int(b.place + segment.first * W), CHANNELS);
#pragma GCC unroll 16
        for (int j = 0; j < N; j++) {
          const vf value = gather(row + j * W, at);
#pragma GCC unroll 16
          for (int r = 0; r < R; r++) sum[j][r] += value * load(weight + r * W);
        }
        weight += ROWS * W;
        continue;
      }
      const float* const v = row + segment.panel * CHANNELS * W;
      vf low[N], high[N];
#pragma GCC unroll 16
      for (int j = 0; j < N; j++) {
        low[j] = load(v + j * W);
        high[j] = load(v + (CHANNELS + j) * W);
      }
      for (int tap = segment.first; tap < segment.last; tap++, weight += ROWS * W) {
        const vi at = load_int(b.place + tap * W);
        vf p[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) p[r] = load(weight + r * W);
#pragma GCC unroll 16
        for (int j = 0; j < N; j++) {
          const vf value = select(low[j], high[j], at);
#pragma GCC unroll 16
          for (int r = 0; r < R; r++) sum[j][r] += value * p[r];
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < N; j++)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) store(o + (j * ROWS + r) * W, sum[j][r]);
}
template <int R>
static void values(const Call& call, Buffers& b, const Run& run, const float* packed, int e) {
  if constexpr (R > 1)
    if (run.b - run.a < R) return values<R - 1>(call, b, run, packed, e);
  values_of<R>(call, b, run, packed, e);
}

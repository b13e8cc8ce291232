// The forward kernel: one query tile at a time over its key tiles, with an online softmax or
// another normaliser. A comment `//@name` is where the statements of a Spec go (see `template.py`).
//
// Passes: ONLINE computes everything in one sweep. Where the epilogue of the weights needs
// statistics of whole rows, STATISTICS finds those in a first sweep and WEIGHTS uses them.
enum { ONLINE, STATISTICS, WEIGHTS };
constexpr int ROWS = (BQ + MR - 1) / MR * MR;  // that products compute: whole register blocks

//@operands

//@row_fields

struct Call {
  int32_t threads, queries, keys, query_tiles;
  int32_t length[RANK + 1];
  int32_t own[RANK + 1];  // whether keys and values differ along a leading axis
  Matrix<T> q, k, v, out;
  Matrix<float> statistics;  // (*L, Q, 2): shift, inverse sum; null where they are not asked for
  const int32_t* list_rows;  // per query tile: where its key tiles begin; null: every key tile
  const int32_t* list;       // key tile * 2 + (1 where some of it may be hidden)
  int64_t list_lead[RANK + 1];
  // GATHERED: tiles are any tokens. `list` is then the number of keys * 2 + (1 as above), a row that
  // is none is -1, a key that is none is `keys`.
  const int32_t* tokens;  // BK keys of every entry of `list`
  const int32_t* order;   // BQ rows of every query tile
  Operands operands;
};

struct Entry {  // a query tile
  Place place;
  int32_t first, rows;
  const float *packed_k, *packed_v;
  const T* v;  // null: values are packed
  const int32_t* order;

  int32_t row(int i) const { return GATHERED ? order[i] : first + i; }
};

struct Buffers {  // of one thread
  alignas(64) float q[ROWS * DEPTH + W];
  alignas(64) float s[ROWS * BK];
  alignas(64) float o[ROWS * DVP];
  alignas(64) float score_weight[D + 1];
  alignas(64) float k[GATHERED ? BK * D + W : 1];  // gathered keys and values, packed
  alignas(64) float v[GATHERED ? BK * DVP : 1];
  RowValues row_values[BQ];
  float shift[BQ];  // about the row maximum: what exponents are relative to
  float top[BQ];    // the same without sinks
  vf sums[BQ];      // by lane
  float sum[BQ], total[BQ], inverse[BQ];
  int32_t count[BQ];
  float mass[BQ][GROUPS + 1];
};

// Row i, whose exponents have become relative to something higher.
template <int PASS> static void rescale(Buffers& b, int i, float scale) {
  b.sums[i] *= scale;
  b.sum[i] *= scale;
  b.total[i] *= scale;
  for (int g = 0; g < GROUPS; g++) b.mass[i][g] *= scale;
  if constexpr (PASS == ONLINE)
    for (int e = 0; e < DVP; e += W) store(b.o + i * DVP + e, load(b.o + i * DVP + e) * scale);
}

// What depends on the row alone.
static void row_values(const Call& call, const Entry& entry, Buffers& b) {
  const Place& place = entry.place;
  (void)place;
  //@names
  //@head
  for (int i = 0; i < entry.rows; i++) {
    const int32_t index_q = entry.row(i);
    (void)index_q;
    //@row_values
  }
}

// Raw scores of one key tile become what meets the values.
template <int PASS, bool PARTIAL>
static void tile(const Call& call, const Entry& entry, Buffers& b, const int32_t k0,
                 const int32_t* keys) {
  const Place& place = entry.place;
  (void)place, (void)keys, (void)k0;
  //@names
  //@head
  //@columns
  for (int j = 0; j < NB; j++) {
    const auto column = COLUMN(j);
    const vi index_k = keys_at(column);
    (void)index_k;
    //@score_columns
    if constexpr (PARTIAL) {
      //@mask_columns
    }
  }
  for (int i = 0; i < entry.rows; i++) {
    const int32_t index_q = entry.row(i);
    (void)index_q;
    float* const s = b.s + i * BK;
    vf x[NB];
    vi kept[NB];
    vf top = vec(-INF);
    //@row
    //@unrolled
    for (int j = 0; j < NB; j++) {
      const auto column = COLUMN(j);
      const vi index_k = keys_at(column);
      const vf score = SCORE == KEY ? vf{} : load(s + j * W) * SCORE_FACTOR;
      (void)score;
      //@cell
      x[j] = vec(LOGIT);
      kept[j] = vi{} - 1;
      if constexpr (PARTIAL) {
        kept[j] = index_k < size_k;
        //@mask
        x[j] = kept[j] ? x[j] : vec(-INF);
      }
      if constexpr (TOPS) top = larger(x[j], top);
    }
    if constexpr (COUNTS && PASS != WEIGHTS) {
      vi count{};
      for (int j = 0; j < NB; j++) count -= kept[j];
      for (int l = 0; l < W; l++) b.count[i] += count[l];
    }
    float shift = b.shift[i];
    if constexpr (TOPS && PASS != WEIGHTS) {
      // The maximum need not be exact: a lower one is good until a weight grows beyond e^SLACK.
      if (any(top > shift + SLACK)) {
        const float highest = maximum_of_lanes(top);
        if (SOFTMAX && shift != -INF) rescale<PASS>(b, i, __builtin_expf(shift - highest));
        b.shift[i] = shift = highest;
      }
    }
    if (SOFTMAX && shift == -INF) shift = 0.0f;  // no key yet: every weight is 0
    vf sum = b.sums[i], total{};
    vf mass[GROUPS + 1] = {};
    (void)mass;
    //@statistics
    //@weights_row
#pragma GCC unroll 16
    for (int j = 0; j < NB; j++) {
      const auto column = COLUMN(j);
      const vi index_k = keys_at(column);
      (void)index_k;
      vf weight;
      if constexpr (SOFTMAX) {
        weight = exp_of_weight(x[j] - shift, FAINT);
      } else {
        weight = NORMALIZE(x[j]);
        if constexpr (PARTIAL) weight = kept[j] ? weight : vf{};
      }
      if constexpr (PASS != WEIGHTS) {
        sum += weight;
        //@masses
      }
      if constexpr (PASS == WEIGHTS) weight *= b.inverse[i];
      if constexpr (PASS != STATISTICS) {
        //@weights
        weight = vec(EDITED);
        if constexpr (PASS == WEIGHTS) weight = index_k < size_k ? weight : vf{};
        total += weight;
        if constexpr (PAIRS) store_pairs(s + j * W / 2, weight);
        else store(s + j * W, weight);
      }
    }
    if constexpr (PASS != WEIGHTS) {
      b.sums[i] = sum;
      for (int g = 0; g < GROUPS; g++) b.mass[i][g] += sum_of_lanes(mass[g]);
    }
    if constexpr (TOTALS && PASS != STATISTICS) b.total[i] += sum_of_lanes(total);
  }
}

// Sinks join the sum once all keys are in it.
static void add_sinks(const Call& call, const Entry& entry, Buffers& b) {
  const Place& place = entry.place;
  (void)place;
  //@names
  //@sink_head
  for (int i = 0; i < entry.rows; i++) {
    const int32_t index_q = entry.row(i);
    (void)index_q;
    //@sink_row
    b.top[i] = b.shift[i];
    b.sum[i] = sum_of_lanes(b.sums[i]);
    if constexpr (SINKS) {
      if constexpr (SOFTMAX) {
        const float sink = SINK;
        if (sink > b.shift[i]) {
          const float scale = __builtin_expf(b.shift[i] - sink);
          b.shift[i] = sink;
          if (TWO_PASSES) rescale<STATISTICS>(b, i, scale);
          else rescale<ONLINE>(b, i, scale);
        }
        b.sum[i] += sink == -INF ? 0.0f : __builtin_expf(sink - b.shift[i]);
      } else {
        b.sum[i] += NORMALIZE(vec((float)(SINK)))[0];
      }
    }
    b.inverse[i] = SOFTMAX || L1 ? 1.0f / b.sum[i] : 1.0f;
    for (int g = 0; g < GROUPS; g++) b.mass[i][g] *= b.inverse[i];
  }
}

template <int PASS>
static void sweep(const Call& call, const Entry& entry, Buffers& b, const int32_t* rows) {
  const int tiles = (call.keys + BK - 1) / BK;
  const int begin = rows ? rows[0] : 0, end = rows ? rows[1] : tiles;
  for (int n = begin; n < end; n++) {
    const int t = GATHERED ? 0 : rows ? call.list[n] >> 1 : n;
    const int32_t k0 = t * BK;
    const int32_t* const keys = GATHERED ? call.tokens + (int64_t)n * BK : nullptr;
    const int left = GATHERED ? call.list[n] >> 1 : call.keys - k0, count = left < BK ? left : BK;
    const bool partial = count < BK || (rows ? call.list[n] & 1 : MASKED);
    const int value_rows = PAIRS ? (count + 1) / 2 : count;
    const float *k = entry.packed_k + (int64_t)t * DEPTH * BK, *v = entry.packed_v;
    if constexpr (GATHERED) {
      if (SCORE != KEY) gather_columns(call.k, call.k.at(entry.place), keys, count, b.k);
      if (PASS != STATISTICS) gather_panels(call.v, call.v.at(entry.place), keys, count, b.v);
      k = b.k, v = b.v;
    } else {
      v = (entry.v ? (const float*)entry.v : v) + (int64_t)t * VALUE_ROWS * DVP;
    }
    const int blocks = (entry.rows + MR - 1) / MR;
    const bool near = GATHERED || PASS == STATISTICS;
    if constexpr (SCORE != KEY)
      product<KEY_PRODUCT, NB, false>(entry.rows, b.q, DEPTH, k, DEPTH, b.s, BK, DEPTH,
                                      b.score_weight,
                                      Ahead(v, near ? 0 : value_rows * DVP, blocks));
    if (partial) tile<PASS, true>(call, entry, b, k0, keys);
    else tile<PASS, false>(call, entry, b, k0, keys);
    if constexpr (PASS != STATISTICS) {
      const int after = GATHERED || n + 1 >= end ? 0 : rows ? call.list[n + 1] >> 1 : n + 1;
      product<VALUE_PRODUCT, DVP / W, true>(
          entry.rows, b.s, BK, v, VALUE_ROWS, b.o, DVP, value_rows, b.score_weight,
          Ahead(entry.packed_k + (int64_t)after * DEPTH * BK, GATHERED ? 0 : DEPTH * BK, blocks));
    }
  }
}

// What is left once the sums are known: sinks, division, empty rows, epilogue, statistics.
static void finish(const Call& call, const Entry& entry, Buffers& b) {
  const Place& place = entry.place;
  (void)place;
  //@names
  //@output_head
  T* const out = call.out.at(place);
  for (int i = 0; i < entry.rows; i++) {
    const int32_t index_q = entry.row(i);
    float* const o = b.o + i * DVP;
    float scale = TWO_PASSES ? 1.0f : b.inverse[i];
    if constexpr (RENORMALIZE) scale = 1.0f / b.total[i];
    for (int e = 0; e < DVP; e += W) store(o + e, load(o + e) * scale);
    if constexpr (SOFTMAX && !SINKS && EMPTY_ROW != EMPTY_NAN) {
      const bool empty =
          EMPTY_ROW == EMPTY_ZERO ? b.shift[i] == -INF && b.sum[i] == 0 : !b.count[i];
      if (empty) {
        if (EMPTY_ROW == EMPTY_ZERO) b.inverse[i] = 0;
        memset(o, 0, 4 * DVP);
        if constexpr (EMPTY_ROW == EMPTY_UNIFORM) {
          const T* const v = call.v.at(place);
          for (int k = 0; k < call.keys; k++)
            for (int e = 0; e < DV; e++) o[e] += as_float(v[k * call.v.row + e * call.v.column]);
          for (int e = 0; e < DV; e++) o[e] /= (float)call.keys;
        }
      }
    }
    if (call.statistics.data) {
      float* const to = call.statistics.at(place) + index_q * call.statistics.row;
      to[0] = SOFTMAX ? b.shift[i] : 0.0f;
      to[1] = SOFTMAX ? b.inverse[i] : 1.0f / b.sum[i];
    }
    //@output_statistics
    //@output_row
    for (int e = 0; e < DVP; e += W) {
      const int32_t column = e;
      const vi index_d = column + lanes();
      (void)index_d;
      vf x = load(o + e);
      //@output
      store(o + e, vec(RESULT));
    }
    write_row(out + index_q * call.out.row, call.out.column, o, DV);
  }
}

static void query_tile(const Call& call, Entry& entry, Buffers& b, int index) {
  entry.first = index * BQ;
  const T* const q = call.q.at(entry.place);
  if constexpr (GATHERED) {
    entry.order = call.order + entry.first;
    for (entry.rows = 0; entry.rows < BQ && entry.order[entry.rows] >= 0; entry.rows++)
      pack_rows(call.q, q + entry.order[entry.rows] * call.q.row, 1, 1, D, b.q + entry.rows * D, D,
                ALPHA);
    memset(b.q + entry.rows * D, 0, 4 * (size_t)(ROWS - entry.rows) * D);
  } else {
    entry.rows = call.queries - entry.first < BQ ? call.queries - entry.first : BQ;
    const T* const own = q + entry.first * call.q.row;
    if constexpr (PAIRS) pack_pair_rows(call.q, own, entry.rows, ROWS, D, b.q);
    else pack_rows(call.q, own, entry.rows, ROWS, D, b.q, D, ALPHA);
  }
  row_values(call, entry, b);
  for (int i = 0; i < BQ; i++) {
    b.shift[i] = -INF, b.sums[i] = vf{};
    b.sum[i] = b.total[i] = 0, b.count[i] = 0;
    for (int g = 0; g < GROUPS; g++) b.mass[i][g] = 0;
  }
  memset(b.o, 0, sizeof b.o);
  const int32_t* rows = call.list_rows;
  if (rows) {
    rows += index;
    for (int a = 0; a < RANK; a++) rows += entry.place.at[a] * call.list_lead[a];
  }
  if constexpr (TWO_PASSES) {
    sweep<STATISTICS>(call, entry, b, rows);
    add_sinks(call, entry, b);
    sweep<WEIGHTS>(call, entry, b, rows);
  } else {
    sweep<ONLINE>(call, entry, b, rows);
    add_sinks(call, entry, b);
  }
  finish(call, entry, b);
}

static void run(const Call& call) {
  const int key_tiles = GATHERED ? 0 : (call.keys + BK - 1) / BK, query_tiles = call.query_tiles;
  const int64_t owners = combinations(call.length, call.own, 1);
  const int64_t sharers = combinations(call.length, call.own, 0);
  // Values that lie as a panel does are read where they are.
  const bool in_place = !GATHERED && std::is_same<T, float>::value && DV == DVP && DVP <= NV * W &&
                        call.v.column == 1 && call.v.row == DV;
  const int64_t k_size = SCORE == KEY ? 0 : (int64_t)key_tiles * BK * DEPTH;
  const int64_t v_size = in_place ? 0 : (int64_t)key_tiles * VALUE_ROWS * DVP;
  const int64_t size = 4 * (k_size + v_size) + 1, work = sharers * query_tiles;
  const int64_t chunk =
      packed_together(owners, size, 8 << 20, (4 * call.threads + work - 1) / work);
  float* const packed = (float*)aligned_alloc(64, ((size_t)(chunk * size) + 127) / 64 * 64);
  float* const packed_v = packed + chunk * k_size;
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
  {
    Buffers& b = *(Buffers*)aligned_alloc(64, (sizeof(Buffers) + 63) / 64 * 64);
    memset(&b, 0, sizeof b);
    for (int64_t first = 0; first < owners; first += chunk) {
      const int64_t here = owners - first < chunk ? owners - first : chunk;
#pragma omp for schedule(static)
      for (int64_t n = 0; n < here * key_tiles; n++) {
        const int64_t c = n / key_tiles, t = n % key_tiles;
        Place place{};
        place_of(call.length, call.own, 1, first + c, place);
        const int count = call.keys - t * BK < BK ? (int)(call.keys - t * BK) : BK;
        const T* const k = call.k.at(place) + t * BK * call.k.row;
        const T* const v = call.v.at(place) + t * BK * call.v.row;
        float* const to_k = packed + c * k_size + t * BK * DEPTH;
        float* const to_v = packed_v + c * v_size + t * VALUE_ROWS * DVP;
        if constexpr (PAIRS) {
          pack_pair_columns(call.k, k, count, D, to_k, BK);
          pack_pair_panels(call.v, v, count, BK, DV, to_v, DVP);
        } else {
          if constexpr (SCORE != KEY) pack_columns(call.k, k, count, D, to_k, BK);
          if (!in_place) pack_panels(call.v, v, count, BK, DV, to_v, DVP);
        }
      }
      const int64_t tasks = here * sharers * query_tiles;
#pragma omp for schedule(dynamic)
      for (int64_t n = 0; n < tasks; n++) {
        const int64_t c = n / (sharers * query_tiles), rest = n % (sharers * query_tiles);
        Entry entry{};
        place_of(call.length, call.own, 1, first + c, entry.place);
        place_of(call.length, call.own, 0, rest / query_tiles, entry.place);
        entry.packed_k = packed + c * k_size;
        entry.packed_v = packed_v + c * v_size;
        entry.v = in_place ? call.v.at(entry.place) : nullptr;
        //@score_weight
        query_tile(call, entry, b, (int)(rest % query_tiles));
      }
    }
    free(&b);
  }
  free(packed);
}

extern "C" void attention(const int64_t* words) {
  Reader r{words};
  Call call;
  read_head(r, call, call.own);
  call.statistics.read(r);
  call.list_rows = r.pointer<const int32_t>();
  call.list = r.pointer<const int32_t>();
  for (int a = 0; a < RANK; a++) call.list_lead[a] = r.word();
  call.query_tiles = (call.queries + BQ - 1) / BQ;
  if constexpr (GATHERED) {
    call.tokens = r.pointer<const int32_t>(), call.order = r.pointer<const int32_t>();
    call.query_tiles = (int32_t)r.word();
  }
  //@read_operands
  run(call);
}

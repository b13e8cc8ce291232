// The forward kernel for few keys, such as the tokens of a window: all keys are one key tile, so
// that a row of scores is known whole before its softmax and nothing is rescaled. Head by head it
// packs keys, values and queries, and then goes over MR rows at a time: scores, softmax, output.
//
// Terms of the logits that depend on the head, the query and the key alone are computed once per
// head and call (`shared_tile`), whatever they cost, and read by all windows. A comment `//@name`
// is where the statements of a Spec go (see `template_window.py`).
//
// Rows may lie anywhere: window w of a map, row i, is its token places[w][i]. Queries, keys,
// values and results are then read and written in the map itself.
constexpr int ROWS = (BQ + MR - 1) / MR * MR;
constexpr int TILE = ROWS * BK;

//@operands

struct Call {
  int32_t threads, queries, keys;
  int32_t length[RANK + 1], own[RANK + 1];
  Matrix<T> q, k, v, out;
  Matrix<float> statistics;  // (*L, Q, 2): shift, inverse sum; null where they are not asked for
  const int32_t* places;     // (windows, queries), or null: rows lie one after the other
  int32_t along, windows;    // the leading axis that counts maps * windows
  Operands operands;
};

struct Buffers {  // of one thread
  alignas(64) float q[ROWS * D + W];
  alignas(64) float k[BK * D];
  alignas(64) float v[BK * DVP];
  alignas(64) float s[MR * BK];
  alignas(64) float o[MR * DVP];
  alignas(64) int32_t order[(ROWS > BK ? ROWS : BK) + W];
};

// Where the rows of a combination of the leading axes lie.
struct Source {
  const T *q, *k, *v;
  T* out;
  const int32_t* token;
};
static Source source_of(const Call& call, Place place, const int32_t* order) {
  const int32_t* token = order;
  if (call.places) {
    const int32_t n = place.at[call.along];
    place.at[call.along] = n / call.windows;
    token = call.places + (int64_t)(n % call.windows) * call.queries;
  }
  return {call.q.at(place), call.k.at(place), call.v.at(place), call.out.at(place), token};
}

// What the logits add for all windows of a head.
static void shared_tile(const Call& call, const Place& place, float* shared) {
  (void)place, (void)shared;
  //@names
  //@shared_head
  for (int32_t index_q = 0; index_q < call.queries; index_q++) {
    float* const to = shared + index_q * BK;
    (void)to;
    //@shared_row
    for (int j = 0; j < NB; j++) {
      const int32_t column = j * W;
      const vi index_k = column + lanes();
      (void)index_k;
      //@shared_cell
    }
  }
}

// All rows of one combination of the leading axes; `next` is where those after it lie.
static void window(const Call& call, const Place& place, const float* shared, const Source& from,
                   const Source& next, Buffers& b) {
  (void)shared;
  const int32_t* const token = from.token;
  for (int j = 0; j < BK; j += W) {
    int32_t row[W];
    for (int l = 0; l < W; l++) row[l] = token[j + l < call.keys ? j + l : call.keys - 1];
    pack_tokens(call.k, from.k, row, D, b.k + in_panel(0, j, D, BK),
                in_panel(1, j, D, BK) - in_panel(0, j, D, BK), ALPHA);
  }
  copy_rows<DV, DVP>(call.v, from.v, token, call.keys, b.v, 1.0f);
  copy_rows<D, D>(call.q, from.q, token, call.queries, b.q, 1.0f);
  //@names
  //@head
  //@columns
  for (int j = 0; j < NB; j++) {
    const int32_t column = j * W;
    const vi index_k = column + lanes();
    (void)index_k;
    //@score_columns
    //@mask_columns
  }
  for (int32_t first = 0; first < call.queries; first += MR) {
    const int rows = call.queries - first < MR ? call.queries - first : MR;
    const Ahead none(b.v, 0, 1);
    product<DOT, NB, false>(MR, b.q + first * D, D, b.k, D, b.s, BK, D, nullptr, none);
    rows_ahead<D>(call.q, next.q, next.token, first, first + rows);
    rows_ahead<D>(call.k, next.k, next.token, (int)((int64_t)first * call.keys / call.queries),
                  (int)((int64_t)(first + rows) * call.keys / call.queries));
    rows_ahead<DV>(call.v, next.v, next.token, (int)((int64_t)first * call.keys / call.queries),
                   (int)((int64_t)(first + rows) * call.keys / call.queries));
    float highest[MR];
    for (int i = 0; i < rows; i++) {
      const int32_t index_q = first + i;
      float* const s = b.s + i * BK;
      const float* const given = shared + index_q * BK;
      (void)index_q, (void)given;
      vf top = vec(-INF);
      //@row
#pragma GCC unroll 16
      for (int j = 0; j < NB; j++) {
        const int32_t column = j * W;
        const vi index_k = column + lanes();
        const vf score = load(s + j * W);
        (void)score;
        //@cell
        vf x = vec(LOGIT);
        vi kept = vi{} - 1;
        if (j == NB - 1) kept = index_k < size_k;  // no other vector has lanes behind the keys
        //@mask
        if (MASKED || j == NB - 1) x = kept ? x : vec(-INF);
        store(s + j * W, x);
        top = larger(x, top);
      }
      highest[i] = maximum_of_lanes(top);
    }
    // Rows wait for their maximum: all of them first, so that none waits for another.
    vf sums[MR];
    for (int i = 0; i < rows; i++) {
      float* const s = b.s + i * BK;
      const float shift = highest[i] == -INF ? 0.0f : highest[i];
      vf sum{};
#pragma GCC unroll 16
      for (int j = 0; j < NB; j++) {
        const vf weight = exp_of_weight(load(s + j * W) - shift, FAINT);
        sum += weight;
        store(s + j * W, weight);
      }
      sums[i] = sum;
    }
    product<DOT, DVP / W, false>(MR, b.s, BK, b.v, 0, b.o, DVP, call.keys, nullptr, none);
    for (int i = 0; i < rows; i++) {
      const float sum = sum_of_lanes(sums[i]);
      float inverse = 1.0f / sum;
      if (EMPTY_ROW == EMPTY_ZERO && highest[i] == -INF && sum == 0) inverse = 0;
      if (call.statistics.data) {
        float* const to = call.statistics.at(place) + (first + i) * call.statistics.row;
        to[0] = highest[i], to[1] = inverse;
      }
      T* const to = from.out + token[first + i] * call.out.row;
      float* const o = b.o + i * DVP;
      constexpr int whole = DV / W * W;
      if (call.out.column == 1) {
#pragma GCC unroll 8
        for (int e = 0; e < whole; e += W) narrowed(to + e, load(o + e) * inverse);
        for (int e = whole; e < DV; e++) assign(to + e, o[e] * inverse);
      } else {
        for (int e = 0; e < DV; e++) assign(to + e * call.out.column, o[e] * inverse);
      }
    }
  }
}

static void run(const Call& call) {
  const int32_t every[RANK + 1] = {};
  const int64_t tasks = combinations(call.length, every, 0);
  const int heads = SHARED && RANK > 1 ? call.length[RANK - 1] : 1;
  float* const shared = (float*)aligned_alloc(64, (size_t)heads * (SHARED * TILE * 4 + 64));
#pragma omp parallel num_threads(call.threads) if (call.threads > 1 && tasks > 1)
  {
    Buffers& b = *(Buffers*)aligned_alloc(64, (sizeof(Buffers) + 63) / 64 * 64);
    memset(&b, 0, sizeof b);
    for (int i = 0; i < (int)(sizeof b.order / 4); i++) b.order[i] = i;
    if (SHARED) {
#pragma omp for schedule(static)
      for (int h = 0; h < heads; h++) {
        Place place{};
        place.at[RANK - (RANK > 0)] = h;
        shared_tile(call, place, shared + (int64_t)h * SHARED * TILE);
      }
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < tasks; n++) {
      Place place{}, after{};
      place_of(call.length, every, 0, n, place);
      place_of(call.length, every, 0, n + 1 < tasks ? n + 1 : n, after);
      const int h = heads > 1 ? place.at[RANK - 1] : 0;
      window(call, place, shared + (int64_t)h * SHARED * TILE, source_of(call, place, b.order),
             source_of(call, after, b.order), b);
    }
    free(&b);
  }
  free(shared);
}

extern "C" void attention(const int64_t* words) {
  Reader r{words};
  Call call;
  read_head(r, call, call.own);
  call.statistics.read(r);
  call.places = r.pointer<const int32_t>();
  call.along = (int32_t)r.word(), call.windows = (int32_t)r.word();
  //@read_operands
  run(call);
}

// The backward kernel for few keys (see `gradients.h` and `window.h`): all rows and keys of one
// combination of the leading axes are one tile. Everything is packed once, the five products follow
// each other on tiles that the caches hold, and what the next combination reads is brought nearer
// meanwhile. Keys and values differ along all leading axes.
constexpr int ROWS = (BQ + MR - 1) / MR * MR, COLUMNS = (BK + MR - 1) / MR * MR;

struct Buffers {  // of one thread
  alignas(64) float q[ROWS * DP];     // times the factor of the scores
  alignas(64) float grad[ROWS * DVP];  // dO times the inverse sums
  alignas(64) float out[ROWS * DVP];
  alignas(64) float k_columns[D * BK], v_columns[DV * BK], k[BK * DP];
  alignas(64) float s[ROWS * BK + COLUMNS];   // S, then P
  alignas(64) float ds[ROWS * BK + COLUMNS];  // dP, then dS
  alignas(64) float sums[(ROWS > COLUMNS ? ROWS : COLUMNS) * (DP > DVP ? DP : DVP)];
  alignas(64) vf lanes[GRADIENTS + 1][BQ];  // gradients that are summed over keys, by lane
  alignas(64) int32_t order[(ROWS > BK ? ROWS : BK) + W];
  RowValues row_values[BQ];
  float shift[BQ], delta[BQ];
  int64_t block;
};

// Where the rows of a combination of the leading axes lie.
struct Source {
  const T *q, *k, *v, *grad, *out;
};
static Source source_of(const Call& call, const Place& place) {
  return {call.q.at(place), call.k.at(place), call.v.at(place), call.grad.at(place),
          call.out.at(place)};
}

// Packs W keys at a time as columns of panels.
template <typename E>
static void turned(const Matrix<E>& x, const E* from, const int32_t* order, int count, int width,
                   float* to) {
  for (int j = 0; j < BK; j += W) {
    int32_t row[W];
    for (int l = 0; l < W; l++) row[l] = order[j + l < count ? j + l : count - 1];
    pack_tokens(x, from, row, width, to + in_panel(0, j, width, BK),
                in_panel(1, j, width, BK) - in_panel(0, j, width, BK), 1.0f);
  }
}

// Rows of a gradient, times a factor.
template <int OWN, int WIDTH, typename E>
static void write_rows(const Matrix<E>& x, E* to, int count, const float* from, float factor) {
  constexpr int whole = OWN / W * W;
  for (int i = 0; i < count; i++, from += WIDTH, to += x.row) {
    if (x.column == 1) {
#pragma GCC unroll 8
      for (int e = 0; e < whole; e += W) narrowed(to + e, load(from + e) * factor);
      for (int e = whole; e < OWN; e++) assign(to + e, from[e] * factor);
    } else {
      for (int e = 0; e < OWN; e++) assign(to + e * x.column, from[e] * factor);
    }
  }
}

// All gradients of one combination; `next` is where the rows after it lie.
static void window(const Call& call, const Place& place, const Source& from, const Source& next,
                   Buffers& b) {
  const int32_t rows = call.queries, keys = call.keys, first = 0;
  const int32_t* const order = b.order;
  const bool to_q = call.grad_q.data, to_k = call.grad_k.data, to_v = call.grad_v.data;
  turned(call.k, from.k, order, keys, D, b.k_columns);
  turned(call.v, from.v, order, keys, DV, b.v_columns);
  if (to_q) copy_rows<D, DP>(call.k, from.k, order, keys, b.k, 1.0f);
  copy_rows<D, DP>(call.q, from.q, order, rows, b.q, ALPHA);
  copy_rows<DV, DVP>(call.grad, from.grad, order, rows, b.grad, 1.0f);
  copy_rows<DV, DVP>(call.out, from.out, order, rows, b.out, 1.0f);
  const float* statistics = call.statistics.at(place);
  bool spoiled = false;  // a row has NaN for weights
  for (int i = 0; i < rows; i++, statistics += call.statistics.row) {
    const float inverse = statistics[1];
    vf delta{};
    for (int e = 0; e < DVP; e += W) {
      const vf x = load(b.grad + i * DVP + e) * inverse;
      delta += x * load(b.out + i * DVP + e);
      store(b.grad + i * DVP + e, x);
    }
    b.delta[i] = sum_of_lanes(delta);
    b.shift[i] = statistics[0] == -INF ? 0.0f : statistics[0];
    spoiled |= !(inverse <= std::numeric_limits<float>::max());
  }
  for (int n = 0; n < GRADIENTS; n++) memset(b.lanes[n], 0, sizeof(vf) * rows);
  row_values(call, place, b, first, rows);
  const Ahead none(b.q, 0, 1);
  for (int i = 0; i < rows; i += MR) {
    const int end = i + MR < rows ? i + MR : rows;
    product<DOT, NB, false>(MR, b.q + i * DP, DP, b.k_columns, D, b.s + i * BK, BK, D, nullptr,
                            none);
    rows_ahead<D>(call.q, next.q, order, i, end);
    rows_ahead<DV>(call.grad, next.grad, order, i, end);
    product<DOT, NB, false>(MR, b.grad + i * DVP, DVP, b.v_columns, DV, b.ds + i * BK, BK, DV,
                            nullptr, none);
    rows_ahead<DV>(call.out, next.out, order, i, end);
  }
  tile<true>(call, place, b, first, rows, 0);
  for (int j = 0; j < keys; j += MR) {
    const int count = j + MR < keys ? MR : keys - j;
    if (to_v)
      product<DOT, DVP / W, false, true>(MR, b.s + j, BK, b.grad, 0, b.sums + j * DVP, DVP, rows,
                                         nullptr, none);
    rows_ahead<D>(call.k, next.k, order, j, j + count);
    rows_ahead<DV>(call.v, next.v, order, j, j + count);
  }
  if (to_v) {
    if (spoiled)
      for (int i = 0; i < keys * DVP; i++) b.sums[i] = NOT_A_NUMBER;
    write_rows<DV, DVP>(call.grad_v, call.grad_v.at(place), keys, b.sums, 1.0f);
  }
  if (to_k) {
    product<DOT, DP / W, false, true>(keys, b.ds, BK, b.q, 0, b.sums, DP, rows, nullptr, none);
    write_rows<D, DP>(call.grad_k, call.grad_k.at(place), keys, b.sums, 1.0f);
  }
  if (to_q) {
    product<DOT, DP / W, false>(rows, b.ds, BK, b.k, 0, b.sums, DP, keys, nullptr, none);
    write_rows<D, DP>(call.grad_q, call.grad_q.at(place), rows, b.sums, ALPHA);
  }
  //@gradient_rows
}

static void run(const Call& call) {
  const int64_t tasks = combinations(call.length, call.role, SPLIT);
  const int64_t looped = combinations(call.length, call.role, LOOPED);
  const int64_t blocks = call.blocks;
#pragma omp parallel num_threads(call.threads) if (call.threads > 1 && tasks * blocks > 1)
  {
    Buffers& b = *(Buffers*)aligned_alloc(64, (sizeof(Buffers) + 63) / 64 * 64);
    memset(&b, 0, sizeof b);
    for (int i = 0; i < (int)(sizeof b.order / 4); i++) b.order[i] = i;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks * blocks; task++) {
      Place place{};
      place_of(call.length, call.role, SPLIT, task / blocks, place);
      b.block = task % blocks;
      const int64_t end = looped * (b.block + 1) / blocks;
      for (int64_t n = looped * b.block / blocks; n < end; n++) {
        place_of(call.length, call.role, LOOPED, n, place);
        Place after = place;
        if (n + 1 < end) place_of(call.length, call.role, LOOPED, n + 1, after);
        window(call, place, source_of(call, place), source_of(call, after), b);
      }
    }
    free(&b);
  }
}

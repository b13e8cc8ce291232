// The backward kernel: gradients of query, key, value and of operands that broadcast in the logits
// (see `gradients.h`).
//
// One task owns the keys and values of some leading axes, so that nothing is added to by two
// threads: it goes over all query tiles that meet them, and each over its key tiles.

// Of one thread: a query tile, and all keys and values of one owner.
struct Buffers {
  alignas(64) float q[BQ * DP];
  alignas(64) float grad[BQ * DVP];  // dO times the inverse sums
  alignas(64) float grad_q[BQ * DP];
  alignas(64) float out[DVP];     // a row
  alignas(64) float s[BQ * BK];   // S, then P
  alignas(64) float ds[BQ * BK];  // dP, then dS
  alignas(64) vf lanes[GRADIENTS + 1][BQ];  // gradients that are summed over keys, by lane
  RowValues row_values[BQ];
  float shift[BQ], delta[BQ];
  int64_t block;
  bool spoiled;  // a row has NaN for weights
  float *k_columns, *v_columns, *k_rows;  // packed; dS K reads k_rows or k
  float *grad_k, *grad_v;
  const float* k;
};

// C (count x N*W) += A^T (count x rows) * B of a key tile, with register blocks for its keys alone.
template <int N>
static void product_by_keys(int count, const float* a, const float* b, float* c, int ldc,
                            int rows, Ahead ahead) {
  if (count + MR - 1 < BK)
    product<DOT, N, true, true>(count, a, BK, b, 0, c, ldc, rows, nullptr, ahead);
  else
    product<DOT, N, true, true, BK % MR>(BK, a, BK, b, 0, c, ldc, rows, nullptr, ahead);
}

// All key tiles of a query tile.
static void sweep(const Call& call, const Place& place, Buffers& b, int32_t first, int32_t rows,
                  const int32_t* listed) {
  const bool to_q = call.grad_q.data, to_k = call.grad_k.data, to_v = call.grad_v.data;
  const int tiles = (call.keys + BK - 1) / BK, blocks = (rows + MR - 1) / MR;
  const int begin = listed ? listed[0] : 0, end = listed ? listed[1] : tiles;
  for (int n = begin; n < end; n++) {
    const int64_t t = listed ? call.list[n] >> 1 : n;
    const int64_t after = n + 1 < end ? listed ? call.list[n + 1] >> 1 : n + 1 : t;
    const int32_t k0 = (int32_t)t * BK;
    const int count = call.keys - k0 < BK ? call.keys - k0 : BK;
    const bool partial = count < BK || (listed ? call.list[n] & 1 : MASKED);
    float* const grad_k = b.grad_k + t * BK * DP;
    float* const grad_v = b.grad_v + t * BK * DVP;
    const float* const k = (b.k ? b.k : b.k_rows) + t * BK * DP;
    product<DOT, NB, false>(rows, b.q, DP, b.k_columns + t * BK * D, D, b.s, BK, D, nullptr,
                            Ahead(b.v_columns + t * BK * DV, BK * DV, blocks));
    product<DOT, NB, false>(rows, b.grad, DVP, b.v_columns + t * BK * DV, DV, b.ds, BK, DV,
                            nullptr, Ahead(grad_v, BK * DVP, blocks));
    if (partial) tile<true>(call, place, b, first, rows, k0);
    else tile<false>(call, place, b, first, rows, k0);
    const Ahead to_next(grad_k, BK * DP, BK / MR), to_keys(k, count * DP, BK / MR);
    if (to_v) product_by_keys<DVP / W>(count, b.s, b.grad, grad_v, DVP, rows, to_next);
    if (to_k) product_by_keys<DP / W>(count, b.ds, b.q, grad_k, DP, rows, to_keys);
    if (to_q)
      product<DOT, DP / W, true>(rows, b.ds, BK, k, BK, b.grad_q, DP, count, nullptr,
                                 Ahead(b.k_columns + after * BK * D, BK * D, blocks));
  }
}

static void query_tile(const Call& call, const Place& place, Buffers& b, int index) {
  const int32_t first = index * BQ;
  const int32_t rows = call.queries - first < BQ ? call.queries - first : BQ;
  pack_rows(call.q, call.q.at(place) + first * call.q.row, rows, BQ, D, b.q, DP, ALPHA);
  pack_rows(call.grad, call.grad.at(place) + first * call.grad.row, rows, BQ, DV, b.grad, DVP,
            1.0f);
  const T* const out = call.out.at(place);
  const bool in_place = std::is_same<T, float>::value && DV == DVP && call.out.column == 1;
  for (int i = 0; i < rows; i++) {
    const float* const statistics = call.statistics.at(place) + (first + i) * call.statistics.row;
    const float inverse = statistics[1];
    float* const grad = b.grad + i * DVP;
    const T* const own = out + (first + i) * call.out.row;
    if (!in_place) pack_rows(call.out, own, 1, 1, DV, b.out, DVP, 1.0f);
    const float* const result = in_place ? (const float*)own : b.out;
    vf delta{};
    for (int e = 0; e < DVP; e += W) {
      const vf x = load(grad + e) * inverse;
      delta += x * load(result + e);
      store(grad + e, x);
    }
    b.delta[i] = sum_of_lanes(delta);
    b.shift[i] = statistics[0] == -INF ? 0.0f : statistics[0];
    b.spoiled |= !(inverse <= std::numeric_limits<float>::max());
  }
  memset(b.grad_q, 0, 4 * (size_t)((rows + MR - 1) / MR * MR) * DP);
  for (int n = 0; n < GRADIENTS; n++) memset(b.lanes[n], 0, sizeof(vf) * rows);
  row_values(call, place, b, first, rows);
  const int32_t* listed = call.list_rows;
  if (listed) {
    listed += index;
    for (int a = 0; a < RANK; a++) listed += place.at[a] * call.list_lead[a];
  }
  sweep(call, place, b, first, rows, listed);
  if (call.grad_q.data) {
    T* const to = call.grad_q.at(place) + first * call.grad_q.row;
    for (int i = 0; i < rows; i++) {
      float* const from = b.grad_q + i * DP;
      for (int e = 0; e < DP; e += W) store(from + e, load(from + e) * ALPHA);
      write_row(to + i * call.grad_q.row, call.grad_q.column, from, D);
    }
  }
  //@gradient_rows
}

// -- keys and values of one owner ----------------------------------------------------------------
static void owner(const Call& call, Place& place, Buffers& b) {
  const int key_tiles = (call.keys + BK - 1) / BK, query_tiles = (call.queries + BQ - 1) / BQ;
  const T *const k = call.k.at(place), *const v = call.v.at(place);
  // Keys that lie as a panel does are read where they are.
  const bool in_place = std::is_same<T, float>::value && D == DP && DP <= NV * W &&
                        call.k.column == 1 && call.k.row == D;
  b.k = in_place ? (const float*)k : nullptr;
  b.spoiled = false;
  for (int64_t t = 0; t < key_tiles; t++) {
    const int count = call.keys - t * BK < BK ? (int)(call.keys - t * BK) : BK;
    const T* const from = k + t * BK * call.k.row;
    pack_columns(call.k, from, count, D, b.k_columns + t * BK * D, BK);
    pack_columns(call.v, v + t * BK * call.v.row, count, DV, b.v_columns + t * BK * DV, BK);
    if (!in_place) pack_panels(call.k, from, count, BK, D, b.k_rows + t * BK * DP, DP);
  }
  memset(b.grad_k, 0, 4 * (size_t)key_tiles * BK * DP);
  memset(b.grad_v, 0, 4 * (size_t)key_tiles * BK * DVP);
  const int64_t sharers = combinations(call.length, call.role, SHARED);
  for (int64_t n = 0; n < sharers; n++) {
    place_of(call.length, call.role, SHARED, n, place);
    for (int index = 0; index < query_tiles; index++) query_tile(call, place, b, index);
  }
  if (call.grad_k.data)
    for (int64_t i = 0; i < call.keys; i++)
      write_row(call.grad_k.at(place) + i * call.grad_k.row, call.grad_k.column,
                b.grad_k + i * DP, D);
  if (call.grad_v.data)
    for (int64_t i = 0; i < call.keys; i++) {
      float* const from = b.grad_v + i * DVP;
      if (b.spoiled)
        for (int e = 0; e < DV; e++) from[e] = NOT_A_NUMBER;
      write_row(call.grad_v.at(place) + i * call.grad_v.row, call.grad_v.column, from, DV);
    }
}

static void run(const Call& call) {
  const int64_t keys = (call.keys + BK - 1) / BK * (int64_t)BK;
  const int64_t tasks = combinations(call.length, call.role, SPLIT);
  const int64_t looped = combinations(call.length, call.role, LOOPED);
  const int64_t blocks = call.blocks;
#pragma omp parallel num_threads(call.threads) if (call.threads > 1 && tasks * blocks > 1)
  {
    const size_t own = (sizeof(Buffers) + 63) / 64 * 64;
    char* const memory = (char*)aligned_alloc(
        64, own + ((size_t)keys * 4 * (D + DV + 2 * DP + DVP) + 63) / 64 * 64);
    Buffers& b = *(Buffers*)memory;
    memset(&b, 0, sizeof b);
    b.k_columns = (float*)(memory + own);
    b.v_columns = b.k_columns + keys * D;
    b.k_rows = b.v_columns + keys * DV;
    b.grad_k = b.k_rows + keys * DP;
    b.grad_v = b.grad_k + keys * DP;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks * blocks; task++) {
      Place place{};
      place_of(call.length, call.role, SPLIT, task / blocks, place);
      b.block = task % blocks;
      const int64_t end = looped * (b.block + 1) / blocks;
      for (int64_t n = looped * b.block / blocks; n < end; n++) {
        place_of(call.length, call.role, LOOPED, n, place);
        owner(call, place, b);
      }
    }
    free(memory);
  }
}

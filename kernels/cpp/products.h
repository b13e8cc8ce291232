// Matrix products, register-blocked: MR rows of A against NV vectors of B; and packing for them.

// -- matrix products -----------------------------------------------------------------------------
// C (R x N*W) = or += A (R x depth) * B (depth x N*W), by rows; TURNED: A lies as (depth x R).
template <int OP, int R, int N, bool ADD, bool TURNED>
INLINE void block(const float* a, int lda, const float* b, int64_t ldb, float* c, int ldc,
                  int depth, const float* weight) {
  vf sum[R][N];
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) sum[i][j] = vf{};
  for (int k = 0; k < depth; k++) {
    vf row[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) row[j] = load(b + k * ldb + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
      const float x = TURNED ? a[k * lda + i] : a[i * lda + k];
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) {
        if constexpr (OP == DISTANCE) {
          const vf gap = row[j] - x;
          sum[i][j] += gap * gap;
        } else if constexpr (OP == ADDITIVE) {
          sum[i][j] += tanh_(row[j] + x) * weight[k];
        } else if constexpr (OP == PAIR) {
          sum[i][j] = dot_pairs(sum[i][j], row[j], x);
        } else {
          sum[i][j] += row[j] * x;
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
      // A product is summed on its own first, which rounds less than one long sum.
      const vf before = ADD ? load(c + i * ldc + j * W) : vf{};
      store(c + i * ldc + j * W, ADD ? before + sum[i][j] : sum[i][j]);
    }
}

// Memory that will be read next, brought nearer a few lines at a time.
struct Ahead {
  const char *next, *end;
  int lines;  // with every register block
  // What is needed after a product of `blocks` register blocks.
  Ahead(const float* from, int64_t floats, int blocks)
      : next((const char*)from), end((const char*)(from + floats)),
        lines((int)(floats / 16 / (blocks ? blocks : 1)) + 1) {}
  inline __attribute__((always_inline)) void step() {
    for (int i = 0; i < lines && next < end; i++, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

// Register blocks of R rows, of `rows` rows of C of N vectors.
template <int OP, int R, int N, bool ADD, bool TURNED>
INLINE void blocks_of(int rows, const float* a, int lda, const float* b, int64_t ldb, float* c,
                      int ldc, int depth, const float* weight, Ahead& ahead) {
  for (int i = 0; i < rows; i += R) {
    ahead.step();
    block<OP, R, N, ADD, TURNED>(a + (TURNED ? i : i * lda), lda, b, ldb, c + i * ldc, ldc, depth,
                                 weight);
  }
}

// `rows` rows of C of N vectors; B is read in pieces that stay in the cache. The last REST rows are
// a register block of their own.
template <int OP, int N, bool ADD, bool TURNED, int REST>
static void panels(int rows, const float* a, int lda, const float* b, int64_t ldb, float* c,
                   int ldc, int depth, const float* weight, Ahead& ahead) {
  constexpr int most = 4096 / (N * W) / 8 * 8;  // 16 KB of B
  const int whole = rows - REST;
  for (int k = 0; k < depth; k += most) {
    const int count = depth - k < most ? depth - k : most;
    const float* const x = a + (TURNED ? k * lda : k);
    const float* const y = b + k * ldb;
    const float* const last = x + (TURNED ? whole : whole * lda);
    if (ADD || k) {
      blocks_of<OP, MR, N, true, TURNED>(whole, x, lda, y, ldb, c, ldc, count, weight + k, ahead);
      if constexpr (REST > 0)
        block<OP, REST, N, true, TURNED>(last, lda, y, ldb, c + whole * ldc, ldc, count,
                                         weight + k);
    } else {
      blocks_of<OP, MR, N, false, TURNED>(whole, x, lda, y, ldb, c, ldc, count, weight, ahead);
      if constexpr (REST > 0)
        block<OP, REST, N, false, TURNED>(last, lda, y, ldb, c + whole * ldc, ldc, count, weight);
    }
  }
}

// C (rows x TOTAL vectors) = or += A * B; rows - REST is rounded up to whole register blocks.
// B lies in panels of NV vectors (the last one has what is left), each of `height` rows one after
// the other; `height` 0: it is one matrix of rows.
template <int OP, int TOTAL, bool ADD, bool TURNED = false, int REST = 0>
static void product(int rows, const float* a, int lda, const float* b, int height, float* c,
                    int ldc, int depth, const float* weight, Ahead ahead) {
  constexpr int rest = TOTAL % NV, whole = TOTAL - rest;
  const int64_t step = height ? W * height : W;
  for (int j = 0; j < whole; j += NV)
    panels<OP, NV, ADD, TURNED, REST>(rows, a, lda, b + j * step, height ? NV * W : TOTAL * W,
                                      c + j * W, ldc, depth, weight, ahead);
  if constexpr (rest > 0)
    panels<OP, rest, ADD, TURNED, REST>(rows, a, lda, b + whole * step,
                                        height ? rest * W : TOTAL * W, c + whole * W, ldc, depth,
                                        weight, ahead);
}

// -- packing -------------------------------------------------------------------------------------
// Where column j of row i is in panels of `height` rows and `width` columns.
INLINE int64_t in_panel(int i, int j, int height, int width) {
  constexpr int step = NV * W;
  const int first = j / step * step, own = width - first < step ? width - first : step;
  return (int64_t)first * height + i * own + (j - first);
}

// `count` rows of x, of `width` elements, as columns of panels (width x n); behind them the last
// one is repeated.
template <typename E>
static void pack_columns(const Matrix<E>& x, const E* from, int count, int width, float* y, int n) {
  for (int j = 0; j < n; j += W) {
    int32_t row[W];
    for (int l = 0; l < W; l++) row[l] = j + l < count ? j + l : count - 1;
    float* const to = y + in_panel(0, j, width, n);
    pack_tokens(x, from, row, width, to, in_panel(1, j, width, n) - in_panel(0, j, width, n), 1.0f);
  }
}

// `count` rows of x, of `width` elements, times a factor as rows of n; all else up to `total` is 0.
template <typename E>
static __attribute__((noinline)) void pack_rows(const Matrix<E>& x, const E* from, int count,
                                                int total, int width, float* y, int n,
                                                float factor) {
  for (int j = 0; j < count; j++) {
    const E* row = from + j * x.row;
    float* const to = y + j * n;
    int e = 0;
    if (x.column == 1)
      for (; e + W <= width; e += W) store(to + e, widened(row + e) * factor);
    for (; e < width; e++) to[e] = as_float(row[e * x.column]) * factor;
    for (; e < n; e++) to[e] = 0;
  }
  if (count < total) memset(y + count * n, 0, 4 * (size_t)(total - count) * n);
}

// The same in panels.
template <typename E>
static void pack_panels(const Matrix<E>& x, const E* from, int count, int total, int width,
                        float* y, int n) {
  for (int first = 0; first < n; first += NV * W) {
    const int own = n - first < NV * W ? n - first : NV * W;
    const int present = width - first < own ? width - first : own;
    pack_rows(x, from + first * x.column, count, total, present, y + (int64_t)first * total, own,
              1.0f);
  }
}

// The same three as pairs: of neighbours in a row, or of neighbouring rows for the panels.
template <typename E>
static void pack_pair_columns(const Matrix<E>& x, const E* from, int count, int width, float* y,
                              int n) {
  const int depth = (width + 1) / 2;
  for (int j = 0; j < n; j++) {
    float* to = y + in_panel(0, j, depth, n);
    const int64_t step = in_panel(1, j, depth, n) - in_panel(0, j, depth, n);
    for (int p = 0; p < depth; p++)
      to[p * step] = j < count ? pair_of(from + j * x.row, x.column, p, width) : 0.0f;
  }
}

template <typename E>
static void pack_pair_rows(const Matrix<E>& x, const E* from, int count, int total, int width,
                           float* y) {
  const int depth = (width + 1) / 2;
  for (int j = 0; j < count; j++)
    for (int p = 0; p < depth; p++)
      y[j * depth + p] = pair_of(from + j * x.row, x.column, p, width);
  if (count < total) memset(y + count * depth, 0, 4 * (size_t)(total - count) * depth);
}

template <typename E>
static void pack_pair_panels(const Matrix<E>& x, const E* from, int count, int total, int width,
                             float* y, int n) {
  for (int p = 0; p < total / 2; p++)
    for (int e = 0; e < n; e++)
      y[in_panel(p, e, total / 2, n)] =
          e < width && 2 * p < count ? pair_of(from + e * x.column, x.row, p, count) : 0.0f;
}

// A row of an output tensor.
template <typename E>
static __attribute__((noinline)) void write_row(E* to, int64_t step, const float* from, int count) {
  int e = 0;
  if (step == 1)
    for (; e + W <= count; e += W) narrowed(to + e, load(from + e));
  for (; e < count; e++) assign(to + e * step, from[e]);
}

// W channels of row `index` of v, from channel `first` on.
template <typename E>
static vf row_of(const Matrix<E>& v, const Place& place, int32_t index, int32_t first) {
  vf y{};
  const E* x = v.at(place) + index * v.row;
  for (int e = 0; e < W && first + e < DV; e++) y[e] = as_float(x[(first + e) * v.column]);
  return y;
}

// What every generated attention kernel shares: arguments, operands, packing and matrix products.
//
// The generated part above this text defines W, RANK, D, DV, BQ, BK, MR, NV, the element type T and
// SCORE. Matrix products are register-blocked: MR rows of A against NV vectors of B.
#include <omp.h>

#include <type_traits>

enum { DOT, DISTANCE, ADDITIVE, KEY };
constexpr int DVP = (DV + W - 1) / W * W;  // value channels, rounded up to whole vectors
constexpr int NB = BK / W;                 // vectors of a key tile

// -- arguments: one array of 64-bit words, read in the order in which `call.py` writes them --------
struct Reader {
  const int64_t* next;
  int64_t word() { return *next++; }
  template <typename P> P* pointer() { return (P*)(intptr_t)word(); }
};

// Indices of the leading axes, in tensor order.
struct Place { int32_t at[RANK + 1]; };

// A tensor (*L, rows, columns) by strides in elements.
template <typename E> struct Matrix {
  E* data;
  int64_t lead[RANK + 1], row, column;
  void read(Reader& r) {
    data = r.pointer<E>();
    for (int i = 0; i < RANK; i++) lead[i] = r.word();
    row = r.word();
    column = r.word();
  }
  E* at(const Place& p) const {
    E* x = data;
    for (int i = 0; i < RANK; i++) x += p.at[i] * lead[i];
    return x;
  }
};

template <typename R, typename E> INLINE R converted(E x) {
  if constexpr (std::is_same<R, float>::value) return as_float(x);
  else return (R)x;
}
template <typename R> struct Wide { typedef vf type; };
template <> struct Wide<int32_t> { typedef vi type; };
template <> struct Wide<bool> { typedef vi type; };

// An operand that broadcasts against the scores, or against the output in its epilogue.
template <typename E> struct Operand : Matrix<E> {
  int32_t columns;  // of the whole score, where the lanes of the last vector end
  template <typename R> R at_head(const Place& p) const { return converted<R>(*this->at(p)); }
  template <typename R> R at_row(const Place& p, int32_t q) const {
    return converted<R>(this->at(p)[q * this->row]);
  }
  template <typename R> typename Wide<R>::type at_column(const Place& p, int32_t first) const {
    return lanes_from<R>(this->at(p), first);
  }
  template <typename R>
  typename Wide<R>::type at_cell(const Place& p, int32_t q, int32_t first) const {
    return lanes_from<R>(this->at(p) + q * this->row, first);
  }
  template <typename R> typename Wide<R>::type lanes_from(const E* x, int32_t first) const {
    const bool whole = first + W <= columns;
    if (this->column == 0) return lift<R>(converted<R>(*x));
    if constexpr (std::is_same<E, float>::value && std::is_same<R, float>::value) {
      if (whole && this->column == 1) return ::load(x + first);
    }
    typename Wide<R>::type y;
    if (whole && this->column == 1) {
      for (int i = 0; i < W; i++) put<R>(y, i, converted<R>(x[first + i]));
    } else {
      for (int i = 0; i < W; i++) {
        const int32_t k = first + i < columns ? first + i : columns - 1;
        put<R>(y, i, converted<R>(x[k * this->column]));
      }
    }
    return y;
  }
  template <typename R> static typename Wide<R>::type lift(R x) {
    if constexpr (std::is_same<R, bool>::value) return mask(x);
    else return vec(x);
  }
  template <typename R> static void put(typename Wide<R>::type& y, int i, R x) {
    if constexpr (std::is_same<R, bool>::value) y[i] = -(int32_t)x;
    else y[i] = x;
  }
};

// A table that is gathered; a place outside of it means its nearest element.
template <typename E, int N> struct Table {
  E* data;
  int32_t length[N + 1], stride[N + 1];
  void read(Reader& r) {
    data = r.pointer<E>();
    for (int i = 0; i < N; i++) length[i] = (int32_t)r.word();
    for (int i = 0; i < N; i++) stride[i] = (int32_t)r.word();
  }
  template <typename R, typename... I> auto gather(I... places) const {
    int n = 0;
    auto offset = (0 + ... + inside(places, n++));
    return fetch<R>(offset);
  }
  int32_t inside(int32_t x, int n) const {
    return (x < 0 ? 0 : x < length[n] ? x : length[n] - 1) * stride[n];
  }
  vi inside(vi x, int n) const {
    x = x < 0 ? vi{} : x;
    return (x < length[n] ? x : vec(length[n] - 1)) * stride[n];
  }
  template <typename R> R fetch(int32_t offset) const { return converted<R>(data[offset]); }
  template <typename R> typename Wide<R>::type fetch(vi offset) const {
#if defined(__AVX512F__)
    if constexpr (W == 16 && std::is_same<E, float>::value && std::is_same<R, float>::value)
      return (vf)_mm512_i32gather_ps((__m512i)offset, data, 4);
#endif
    typename Wide<R>::type y;
    for (int i = 0; i < W; i++) Operand<E>::template put<R>(y, i, converted<R>(data[offset[i]]));
    return y;
  }
};

// -- matrix products -----------------------------------------------------------------------------
// C (R x N*W) = or += A (R x depth) * B (depth x N*W), by rows.
template <int OP, int R, int N, bool ADD>
INLINE void block(const float* a, int lda, const float* b, int64_t ldb, float* c, int ldc,
                  int depth, const float* weight) {
  vf sum[R][N];
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) sum[i][j] = ADD ? load(c + i * ldc + j * W) : vf{};
  for (int k = 0; k < depth; k++) {
    vf row[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) row[j] = load(b + k * ldb + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
      const float x = a[i * lda + k];
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) {
        if constexpr (OP == DISTANCE) {
          const vf gap = row[j] - x;
          sum[i][j] += gap * gap;
        } else if constexpr (OP == ADDITIVE) {
          sum[i][j] += tanh_(row[j] + x) * weight[k];
        } else {
          sum[i][j] += row[j] * x;
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) store(c + i * ldc + j * W, sum[i][j]);
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

// `rows` rows of C of N vectors, in register blocks; B is read in panels that stay in the cache.
template <int OP, int N, bool ADD>
static void panels(int rows, const float* a, int lda, const float* b, int64_t ldb, float* c, int ldc,
                   int depth, const float* weight, Ahead& ahead) {
  constexpr int most = 4096 / (N * W) / 8 * 8;  // 16 KB of B
  for (int k = 0; k < depth; k += most) {
    const int count = depth - k < most ? depth - k : most;
    for (int i = 0; i < rows; i += MR) {
      ahead.step();
      if (ADD || k)
        block<OP, MR, N, true>(a + i * lda + k, lda, b + k * ldb, ldb, c + i * ldc, ldc, count,
                               weight + k);
      else
        block<OP, MR, N, false>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, count, weight);
    }
  }
}

// C (rows x TOTAL vectors) = or += A * B; `rows` is rounded up to whole register blocks. B lies in
// panels of NV vectors (the last one has what is left), each of `height` rows one after the other.
template <int OP, int TOTAL, bool ADD>
static void product(int rows, const float* a, int lda, const float* b, int height, float* c,
                    int ldc, int depth, const float* weight, Ahead ahead) {
  constexpr int rest = TOTAL % NV, whole = TOTAL - rest;
  for (int j = 0; j < whole; j += NV)
    panels<OP, NV, ADD>(rows, a, lda, b + j * W * height, NV * W, c + j * W, ldc, depth, weight,
                        ahead);
  if constexpr (rest > 0)
    panels<OP, rest, ADD>(rows, a, lda, b + whole * W * height, rest * W, c + whole * W, ldc,
                          depth, weight, ahead);
}

// -- packing -------------------------------------------------------------------------------------
// Where column j of row i is in panels of `height` rows and `width` columns.
INLINE int64_t in_panel(int i, int j, int height, int width) {
  constexpr int step = NV * W;
  const int first = j / step * step, own = width - first < step ? width - first : step;
  return (int64_t)first * height + i * own + (j - first);
}

// `count` rows of x, of `width` elements, as columns of panels (width x n); the rest of them is 0.
template <typename E>
static void pack_columns(const Matrix<E>& x, const E* from, int count, int width, float* y, int n) {
  for (int j = 0; j < n; j++) {
    float* to = y + in_panel(0, j, width, n);
    const int64_t step = in_panel(1, j, width, n) - in_panel(0, j, width, n);
    const E* row = from + j * x.row;
    if (j >= count)
      for (int e = 0; e < width; e++) to[e * step] = 0;
    else if (x.column == 1)
      for (int e = 0; e < width; e++) to[e * step] = as_float(row[e]);
    else
      for (int e = 0; e < width; e++) to[e * step] = as_float(row[e * x.column]);
  }
}

// `count` rows of x, of `width` elements, times a factor as rows of n; all else up to `total` is 0.
template <typename E>
static void pack_rows(const Matrix<E>& x, const E* from, int count, int total, int width, float* y,
                      int n, float factor) {
  for (int j = 0; j < count; j++) {
    const E* row = from + j * x.row;
    if (x.column == 1)
      for (int e = 0; e < width; e++) y[j * n + e] = as_float(row[e]) * factor;
    else
      for (int e = 0; e < width; e++) y[j * n + e] = as_float(row[e * x.column]) * factor;
    for (int e = width; e < n; e++) y[j * n + e] = 0;
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

// A row of an output tensor.
template <typename E> INLINE void write_row(E* to, int64_t step, const float* from, int count) {
  if (step == 1)
    for (int e = 0; e < count; e++) assign(to + e, from[e]);
  else
    for (int e = 0; e < count; e++) assign(to + e * step, from[e]);
}

// W channels of row `index` of v, from channel `first` on.
template <typename E>
static vf row_of(const Matrix<E>& v, const Place& place, int32_t index, int32_t first) {
  vf y{};
  const E* x = v.at(place) + index * v.row;
  for (int e = 0; e < W && first + e < DV; e++) y[e] = as_float(x[(first + e) * v.column]);
  return y;
}

INLINE vf larger(vf a, vf b) {  // b where a is NaN
#if defined(__AVX512F__)
  if constexpr (W == 16) return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#endif
  return a > b ? a : b;
}

// Packing of rows that lie anywhere: the keys and values that a query tile sees, by their numbers.
//
// Keys are turned into columns W x W elements at a time, in registers: log2(W) rounds in which two
// rows that are S apart exchange their blocks of S lanes.
#include <utility>

typedef int32_t vi_in_memory __attribute__((vector_size(4 * W), aligned(4), may_alias));

// -- keys of a tile ------------------------------------------------------------------------------
// Keys of a tile: `COLUMN(j)` is the first one of vector j, or all of them where they are gathered.
#define COLUMN(j) columns_at(std::integral_constant<bool, GATHERED>(), keys, k0 + (j) * W, (j) * W)
INLINE vi columns_at(std::true_type, const int32_t* keys, int32_t, int at) {
  return *(const vi_in_memory*)(keys + at);
}
INLINE int32_t columns_at(std::false_type, const int32_t*, int32_t first, int) { return first; }
INLINE vi keys_at(int32_t column) { return column + lanes(); }
INLINE vi keys_at(vi column) { return column; }

// -- turning W rows of W floats --------------------------------------------------------------------
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define EXCHANGES 1
#endif
#endif
#ifdef EXCHANGES
template <int S, size_t... L>
INLINE void exchange(vf& low, vf& high, std::index_sequence<L...>) {
  const vf a = low, b = high;
  low = __builtin_shufflevector(a, b, (int)((L & S) ? W + L - S : L)...);
  high = __builtin_shufflevector(a, b, (int)((L & S) ? W + L : L + S)...);
}
template <int S> INLINE void turn_by(vf* x) {
#pragma GCC unroll 16
  for (int i = 0; i < W; i++)
    if (!(i & S)) exchange<S>(x[i], x[i + S], std::make_index_sequence<W>());
  if constexpr (2 * S < W) turn_by<2 * S>(x);
}
INLINE void turn(vf* x) { turn_by<1>(x); }
#else
INLINE void turn(vf* x) {
  for (int i = 0; i < W; i++)
    for (int l = 0; l < i; l++) {
      const float kept = x[i][l];
      x[i][l] = x[l][i];
      x[l][i] = kept;
    }
}
#endif

template <typename E> INLINE vf row_lanes(const E* x, int64_t step) {
  if constexpr (std::is_same<E, float>::value)
    if (step == 1) return load(x);
  vf y;
  for (int l = 0; l < W; l++) y[l] = as_float(x[l * step]);
  return y;
}

// `count` rows of keys, by their numbers, as columns of the panels of a key tile (D x BK). Columns
// behind them hold some key, too, which the mask hides.
template <typename E>
static void gather_columns(const Matrix<E>& x, const E* from, const int32_t* rows, int count,
                           float* y) {
  for (int j = 0; j < BK; j += W) {
    float* const to = y + in_panel(0, j, D, BK);
    const int64_t step = in_panel(1, j, D, BK) - in_panel(0, j, D, BK);
    if (j >= count) {
      for (int e = 0; e < D; e++) store(to + e * step, vf{});
      continue;
    }
    const E* row[W];
    for (int l = 0; l < W; l++) row[l] = from + rows[j + l < count ? j + l : j] * x.row;
    constexpr int whole = D / W * W;
    for (int e = 0; e < whole; e += W) {
      vf block[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; l++) block[l] = row_lanes(row[l] + e * x.column, x.column);
      turn(block);
#pragma GCC unroll 16
      for (int l = 0; l < W; l++) store(to + (e + l) * step, block[l]);
    }
    for (int e = whole; e < D; e++)
      for (int l = 0; l < W; l++) to[e * step + l] = as_float(row[l][e * x.column]);
  }
}

// `count` rows of values as panels (BK x DVP); rows behind them are not read.
template <typename E>
static void gather_panels(const Matrix<E>& x, const E* from, const int32_t* rows, int count,
                          float* y) {
  for (int first = 0; first < DVP; first += NV * W) {
    const int own = DVP - first < NV * W ? DVP - first : NV * W;
    const int present = DV - first < own ? DV - first : own;
    float* const to = y + (int64_t)first * BK;
    const E* const part = from + first * x.column;
    if (DV == DVP && own == (DVP < NV * W ? DVP : NV * W)) {
      constexpr int vectors = (DVP < NV * W ? DVP : NV * W) / W;
      for (int j = 0; j < count; j++)
#pragma GCC unroll 8
        for (int e = 0; e < vectors; e++)
          store(to + (j * vectors + e) * W,
                row_lanes(part + rows[j] * x.row + e * W * x.column, x.column));
      continue;
    }
    for (int j = 0; j < count; j++)
      pack_rows(x, part + rows[j] * x.row, 1, 1, present, to + j * own, own, 1.0f);
  }
}

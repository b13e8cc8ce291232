// What every generated attention kernel shares: arguments and operands.
//
// The generated part above this text defines W, RANK, D, DV, BQ, BK, MR, NV, the element type T and
// SCORE.
#include <omp.h>

#include <type_traits>

enum { DOT, DISTANCE, ADDITIVE, KEY };
constexpr int DP = (D + W - 1) / W * W;  // channels, rounded up to whole vectors
constexpr int DVP = (DV + W - 1) / W * W;
constexpr int NB = BK / W;  // vectors of a key tile

// -- arguments: an array of 64-bit words, read in the order in which `call.py` writes them --------
struct Reader {
  const int64_t* next;
  int64_t word() { return *next++; }
  template <typename P> P* pointer() { return (P*)(intptr_t)word(); }
};

// Indices of the leading axes, in tensor order.
struct Place { int32_t at[RANK + 1]; };

// Sets the n-th combination of the leading axes that have this role.
static void place_of(const int32_t* length, const int32_t* roles, int32_t role, int64_t n,
                     Place& place) {
  for (int a = RANK - 1; a >= 0; a--) {
    if (roles[a] != role) continue;
    place.at[a] = (int32_t)(n % length[a]);
    n /= length[a];
  }
}
static int64_t combinations(const int32_t* length, const int32_t* roles, int32_t role) {
  int64_t n = 1;
  for (int a = 0; a < RANK; a++) n *= roles[a] == role ? length[a] : 1;
  return n;
}

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

// What every call begins with: lengths, the role of each leading axis, the four tensors.
template <typename C> static void read_head(Reader& r, C& call, int32_t* roles) {
  call.threads = (int32_t)r.word();
  call.queries = (int32_t)r.word();
  call.keys = (int32_t)r.word();
  for (int a = 0; a < RANK; a++) call.length[a] = (int32_t)r.word();
  for (int a = 0; a < RANK; a++) roles[a] = (int32_t)r.word();
  call.q.read(r);
  call.k.read(r);
  call.v.read(r);
  call.out.read(r);
}

// Heads whose keys and values, of `size` bytes, are packed together: as few as fit `budget`, but
// `wanted` of them to occupy every thread.
INLINE int64_t packed_together(int64_t owners, int64_t size, int64_t budget, int64_t wanted) {
  int64_t chunk = budget / size;
  if (chunk < wanted) chunk = wanted;
  if (chunk > owners) chunk = owners;
  return chunk < 1 ? 1 : chunk;
}

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
  // The same of W columns that are gathered.
  template <typename R> typename Wide<R>::type at_column(const Place& p, vi places) const {
    return gather_from<R>(this->at(p), places);
  }
  template <typename R>
  typename Wide<R>::type at_cell(const Place& p, int32_t q, vi places) const {
    return gather_from<R>(this->at(p) + q * this->row, places);
  }
  template <typename R> typename Wide<R>::type gather_from(const E* x, vi places) const {
    if (this->column == 0) return lift<R>(converted<R>(*x));
    typename Wide<R>::type y;
    for (int i = 0; i < W; i++) {
      const int32_t k = places[i] < columns ? places[i] : columns - 1;
      put<R>(y, i, converted<R>(x[k * this->column]));
    }
    return y;
  }
  template <typename R> typename Wide<R>::type lanes_from(const E* x, int32_t first) const {
    if (this->column == 0) return lift<R>(converted<R>(*x));
    if (this->column != 1 || first + W > columns) return lanes_apart<R>(x, first);
    if constexpr (std::is_same<E, float>::value && std::is_same<R, float>::value)
      return ::load(x + first);
    typename Wide<R>::type y;
    for (int i = 0; i < W; i++) put<R>(y, i, converted<R>(x[first + i]));
    return y;
  }
  // With strides, or at the end of a row: rare, so it need not be compiled in place.
  template <typename R>
  __attribute__((noinline)) typename Wide<R>::type lanes_apart(const E* x, int32_t first) const {
    typename Wide<R>::type y;
    for (int i = 0; i < W; i++) {
      const int32_t k = first + i < columns ? first + i : columns - 1;
      put<R>(y, i, converted<R>(x[k * this->column]));
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
  // W neighbours along the last axis, or one number for all lanes: places are those of lane 0. The
  // first argument tells whether the lanes are neighbouring columns, or any.
  template <typename R, typename... I> auto run(int32_t, I... places) const {
    int n = 0;
    int32_t last = 0;
    const int32_t offset = (0 + ... + along(lane(places), n++, last));
    if (stride[N - 1] == 1 && last >= 0 && last + W <= length[N - 1]) return lanes_at<R>(offset);
    return gather<R>(places...);
  }
  template <typename R, typename... I> auto run(vi, I... places) const {
    return gather<R>(places...);
  }
  template <typename R, typename... I> auto same(int32_t, I... places) const {
    int n = 0;
    return Operand<E>::template lift<R>(fetch<R>((0 + ... + inside(lane(places), n++))));
  }
  template <typename R, typename... I> auto same(vi, I... places) const {
    return gather<R>(places...);
  }
  static int32_t lane(int32_t x) { return x; }
  static int32_t lane(vi x) { return x[0]; }
  int32_t along(int32_t x, int n, int32_t& last) const {
    if (n + 1 < N) return inside(x, n);
    last = x;
    return x;
  }
  template <typename R> typename Wide<R>::type lanes_at(int32_t offset) const {
    if constexpr (std::is_same<E, float>::value && std::is_same<R, float>::value)
      return ::load(data + offset);
    typename Wide<R>::type y;
    for (int i = 0; i < W; i++) Operand<E>::template put<R>(y, i, converted<R>(data[offset + i]));
    return y;
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
#if defined(AVX512)
    if constexpr (std::is_same<E, float>::value && std::is_same<R, float>::value)
      return gathered(data, offset);
#endif
    return apart<R>(data, offset);
  }
  // Lane by lane, which the compiler takes long for wherever it is put in place.
  template <typename R>
  static __attribute__((noinline)) typename Wide<R>::type apart(const E* data, vi offset) {
    typename Wide<R>::type y;
    for (int i = 0; i < W; i++) Operand<E>::template put<R>(y, i, converted<R>(data[offset[i]]));
    return y;
  }
};

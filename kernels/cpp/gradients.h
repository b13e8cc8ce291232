// What kernels of gradients share: the sums of operands' gradients, their call, and what becomes of
// the raw scores of a tile:
//
//     S  = Q K^T                    raw scores, once more
//     P  = exp(logits(S) - shift)   times the inverse sum, which is put into dO and delta instead
//     dP = dO V^T                   delta = rows' sums of dO * O
//     dX = P * (dP - delta)         gradient of the logits
//     dS = dX * d logits / d score
//     dV += P^T dO,  dK += dS^T Q,  dQ += dS K,  d operand += dX * d logits / d operand
//
// Gradients of operands that tasks would share have one copy for each block of tasks, which are
// summed later, so that the result does not depend on threads. A comment `//@name` is where the
// statements of a Spec go (see `template_backward.py`).
enum { SHARED, LOOPED, SPLIT };  // roles of leading axes: keys do not, or do differ along it

// The gradient of an operand that broadcasts; its copies are `part` apart.
struct Sum : Matrix<float> {
  int64_t part;
  void read(Reader& r) {
    Matrix<float>::read(r);
    part = r.word();
  }
  float* at(const Place& place, int64_t block) const {
    return Matrix<float>::at(place) + block * part;
  }
};

// The gradient of a table: W numbers are added where `Table` reads them.
template <int N> struct TableSum : Table<float, N> {
  int64_t part;
  void read(Reader& r) {
    Table<float, N>::read(r);
    part = r.word();
  }
  float* at(const Place&, int64_t block) const { return this->data + block * part; }
  template <typename... I> void add_gather(float* to, vf x, I... places) const {
    int n = 0;
    add(to, (0 + ... + this->inside(places, n++)), x);
  }
  template <typename... I> void add_run(float* to, vf x, I... places) const {
    int n = 0;
    int32_t last = 0;
    const int32_t offset = (0 + ... + this->along(this->lane(places), n++, last));
    if (this->stride[N - 1] == 1 && last >= 0 && last + W <= this->length[N - 1])
      store(to + offset, load(to + offset) + x);
    else
      add_gather(to, x, places...);
  }
  template <typename... I> void add_same(float* to, vf x, I... places) const {
    add_gather(to, x, this->lane(places)...);
  }
  static void add(float* to, int32_t offset, vf x) { to[offset] += sum_of_lanes(x); }
  static void add(float* to, vi offset, vf x) {  // lanes may have one place
    for (int l = 0; l < W; l++) to[offset[l]] += x[l];
  }
};

//@operands

//@gradients

//@row_fields

struct Call {
  int32_t threads, queries, keys;
  int32_t length[RANK + 1];
  int32_t role[RANK + 1];  // tasks differ along SPLIT axes
  int64_t blocks;          // and are that many for all that is LOOPED
  Matrix<T> q, k, v, out, grad;
  Matrix<float> statistics;           // (*L, Q, 2): shift, inverse sum
  Matrix<T> grad_q, grad_k, grad_v;   // data is null where it is not asked for
  const int32_t *list_rows, *list;    // as in the forward kernel
  int64_t list_lead[RANK + 1];
  Operands operands;
  Gradients gradients;
};

// -- gradients of operands -----------------------------------------------------------------------
// Adds to W neighbours of a row of an operand's gradient, as far as there are keys.
static __attribute__((noinline)) void add_first(float* to, int32_t count, vf x) {
  for (int l = 0; l < count; l++) to[l] += x[l];
}
template <bool PARTIAL> INLINE void add_lanes(float* row, int32_t first, int32_t keys, vf x) {
  if (!PARTIAL || first + W <= keys) store(row + first, load(row + first) + x);
  else add_first(row + first, keys - first, x);
}

// Adds the sums over keys of the rows of a query tile.
static void add_rows(float* to, int64_t step, const vf* lanes, int32_t first, int32_t rows) {
  if (step) {
    for (int i = 0; i < rows; i++) to[(first + i) * step] += sum_of_lanes(lanes[i]);
  } else {
    vf sum{};
    for (int i = 0; i < rows; i++) sum += lanes[i];
    *to += sum_of_lanes(sum);
  }
}

// -- one tile ------------------------------------------------------------------------------------
// What depends on the row alone.
template <typename B>
static void row_values(const Call& call, const Place& place, B& b, int32_t first,
                       int32_t rows) {
  //@names
  //@head
  for (int i = 0; i < rows; i++) {
    const int32_t index_q = first + i;
    (void)index_q;
    //@row_values
  }
}

// Raw scores and dP of a tile become P and dS.
template <bool PARTIAL, typename B>
static void tile(const Call& call, const Place& place, B& b, const int32_t first,
                 const int32_t rows, const int32_t k0) {
  //@names
  //@head
  //@gradient_head
  //@columns
  for (int j = 0; j < NB; j++) {
    const int32_t column = k0 + j * W;
    const vi index_k = column + lanes();
    (void)index_k;
    //@score_columns
    if constexpr (PARTIAL) {
      //@mask_columns
    }
  }
  for (int i = 0; i < rows; i++) {
    const int32_t index_q = first + i;
    (void)index_q;
    float *const s = b.s + i * BK, *const ds = b.ds + i * BK;
    const float shift = b.shift[i], delta = b.delta[i];
    vi kept[NB];
    //@row
#pragma GCC unroll 16
    for (int j = 0; j < NB; j++) {
      const int32_t column = k0 + j * W;
      const vi index_k = column + lanes();
      (void)index_k;
      const vf score = load(s + j * W);
      //@cell
      vf weight = exp_of_weight(vec(LOGIT) - shift, FAINT);
      vf change = weight * (load(ds + j * W) - delta);
      if constexpr (PARTIAL) {
        kept[j] = index_k < size_k;
        //@mask
        weight = kept[j] ? weight : vf{};
        change = kept[j] ? change : vf{};
      }
      store(s + j * W, weight);
      //@gradient_cell
      vf slope = change * SLOPE;
      if constexpr (PARTIAL) slope = kept[j] ? slope : vf{};
      store(ds + j * W, slope);
    }
    //@gradient_row
  }
  //@gradient_tile
}

static void run(const Call& call);
extern "C" void gradients(const int64_t* words) {
  Reader r{words};
  Call call;
  read_head(r, call, call.role);
  call.blocks = r.word();
  call.grad.read(r);
  call.statistics.read(r);
  call.grad_q.read(r);
  call.grad_k.read(r);
  call.grad_v.read(r);
  call.list_rows = r.pointer<const int32_t>();
  call.list = r.pointer<const int32_t>();
  for (int a = 0; a < RANK; a++) call.list_lead[a] = r.word();
  //@read_operands
  //@read_gradients
  run(call);
}

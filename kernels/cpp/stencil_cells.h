// The steps of a stencil that depend on the Spec: logits, weights, output. A comment `//@name` is
// where its statements go (see `stencil_source.py`); what depends on a query is a vector.

// Raw scores become logits; without a softmax, weights.
template <bool UNEVEN> static void cells(const Call& call, const Place& place, Buffers& b) {
  (void)place;
  //@names
  //@head
  for (int r = 0; r < b.rows; r++) {
    //@query
    //@row
    vf top = vec(-INF), sum{};
    vi some{};
    for (int n = 0; n < b.runs_found; n++) {
      if (r < b.runs[n].a || r >= b.runs[n].b) continue;
      for (int i = b.runs[n].first; i < b.runs[n].last; i++) {
        const Entry& entry = b.entries[i];
        const vi key_z = vec(entry.z), key_y = vec(entry.y);
        (void)key_z;
        (void)key_y;
        for (int tap = 0; tap < b.taps; tap++) {
          float* const s = b.s + ((i * b.taps + tap) * ROWS + r) * W;
          const vi key_x = load_int(b.key_x + tap * W), index_k = key_x + entry.token;
          (void)index_k;
          const vf score = load(s);
          //@cell
          vf x = vec(LOGIT);
          vi kept = vi{} - 1;
          if constexpr (UNEVEN) kept = b.count > tap;
          if constexpr (MASKED) {
            //@mask
            some |= kept;
          }
          if constexpr (SOFTMAX) {
            if constexpr (UNEVEN || MASKED) x = kept ? x : vec(-INF);
            top = larger(x, top);
          } else {
            x = NORMALIZE(x);
            if constexpr (UNEVEN || MASKED) x = kept ? x : vf{};
            sum += x;
          }
          store(s, x);
        }
      }
    }
    b.top[r] = top;
    b.sum[r] = sum;
    b.some[r] = some;
  }
}

// Logits become weights but for their division; sums with sinks.
static void weights(const Call& call, const Place& place, Buffers& b) {
  (void)place;
  //@names
  //@sink_head
  for (int r = 0; r < b.rows; r++) {
    vf sink{};
    if constexpr (SINKS) {
      //@query
      //@sink_row
      sink = vec(SINK);
    }
    if constexpr (!SOFTMAX) {
      if constexpr (SINKS) b.sum[r] += NORMALIZE(sink);
      b.inverse[r] = L1 ? 1.0f / b.sum[r] : vec(1.0f);
      continue;
    }
    if constexpr (SINKS) b.top[r] = larger(sink, b.top[r]);
    const vf shift = b.top[r] == -INF ? vf{} : b.top[r];  // no key: every weight is 0
    vf sum{};
    for (int n = 0; n < b.runs_found; n++) {
      if (r < b.runs[n].a || r >= b.runs[n].b) continue;
      float* s = b.s + (b.runs[n].first * b.taps * ROWS + r) * W;
      for (int i = b.taps * (b.runs[n].last - b.runs[n].first); i > 0; i--, s += ROWS * W) {
        const vf weight = exp_of_weight(load(s) - shift, FAINT);
        sum += weight;
        store(s, weight);
      }
    }
    if constexpr (SINKS) sum += sink == -INF ? vf{} : exp_(sink - shift);
    b.sum[r] = sum;
    b.inverse[r] = 1.0f / sum;
  }
}

// Division, rows without a key, epilogue, statistics.
static void finish(const Call& call, const Place& place, Buffers& b, int lanes_used) {
  //@names
  //@output_head
  T* const out = call.out.at(place);
  for (int r = 0; r < b.rows; r++) {
    //@query
    //@output_row
    float* const o = b.o + r * W;
    for (int e = 0; e < DV; e++) {
      const vi index_d = vec(e);
      (void)index_d;
      vf x = load(o + e * ROWS * W) * b.inverse[r];
      if constexpr (EMPTY_ZERO && MASKED && !SINKS) x = b.some[r] ? x : vf{};
      //@output
      store(o + e * ROWS * W, vec(RESULT));
    }
    unpack_tokens(call.out, out, b.token[r], lanes_used, DV, o, ROWS * W);
    if (call.statistics.data)
      for (int l = 0; l < lanes_used; l++) {
        float* to = call.statistics.at(place) + b.token[r][l] * call.statistics.row;
        to[0] = SOFTMAX ? b.top[r][l] : 0.0f;
        to[1] = SOFTMAX ? b.inverse[r][l] : 1.0f / b.sum[r][l];
      }
  }
}

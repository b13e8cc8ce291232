// A call of `stencil.h`: packs keys and values, then walks the query blocks with all threads.

// Lanes that stay free at the start of a row, so that whole windows begin at a panel's start.
static int lead_of(const Axis& along) {
  if (along.length <= W) return 0;
  const int low = least_of_lanes(load_int(along.start + W));
  return (W - low % W) % W;
}

static void measure(Call& call, int groups) {
  const Axis* own = call.axis;
  call.lead = lead_of(own[X]);
  call.panels = (own[X].length + call.lead + W - 1) / W + 1;  // the last one only ends a pair
  int outer = 0, rows = 0;
  for (int z = 0; z < own[Z].length; z++)
    if (own[Z].count[z] > outer) outer = own[Z].count[z];
  for (int g = 0; g < groups; g++) {
    const int first = (int)((int64_t)g * own[Y].length / groups);
    const int end = (int)((int64_t)(g + 1) * own[Y].length / groups);
    int found = 0;  // a key row comes once for every run of grid rows that keep it
    for (int r = first; r < end; r++)
      for (int i = 0; i < own[Y].count[r]; i++)
        found += r == first || !own[Y].keeps(r - 1, own[Y].start[r] + i);
    if (found > rows) rows = found;
  }
  call.most_entries = outer * rows;
  call.most_taps = 0;
  for (int x = 0; x < own[X].length; x++)
    if (own[X].count[x] > call.most_taps) call.most_taps = own[X].count[x];
}

static Buffers* new_buffers(const Call& call) {
  const size_t line = W * 4, taps = call.most_taps, entries = call.most_entries;
  const size_t sizes[] = {
      sizeof(Buffers), entries * sizeof(Entry), (taps + 1) * sizeof(Segment), taps * line,
      taps * line, (size_t)D * ROWS * line, entries * taps * ROWS * line, CHANNELS * ROWS * line};
  char* at[8];
  size_t total = 0;
  for (size_t s : sizes) total += (s + 63) / 64 * 64;
  char* next = (char*)aligned_alloc(64, total);
  for (int i = 0; i < 8; i++) {
    at[i] = next;
    next += (sizes[i] + 63) / 64 * 64;
  }
  Buffers& b = *(Buffers*)at[0];
  memset(&b, 0, sizeof b);
  b.z = b.group = b.block = -1;
  b.entries = (Entry*)at[1];
  b.segments = (Segment*)at[2];
  b.place = (int32_t*)at[3];
  b.key_x = (int32_t*)at[4];
  b.q = (float*)at[5];
  b.s = (float*)at[6];
  b.o = (float*)at[7];
  return &b;
}

// Tokens of W queries from x on, by grid row.
static void find_tokens(const Call& call, const Buffers& b, int32_t (*token)[W], int z, int x) {
  const Axis* own = call.axis;
  for (int r = 0; r < b.rows; r++) {
    const int row = own[Z].order[z] * own[Y].length + own[Y].order[b.first + r];
    store_int(token[r], load_int(own[X].order + x) + row * own[X].length);
  }
}

// W queries of a group of grid rows.
static void query_block(const Call& call, const Place& place, Buffers& b, int z, int group,
                        int groups, int block, const float* k, const float* v) {
  const Axis *own = call.axis, &along = own[X];
  const int first = (int)((int64_t)group * own[Y].length / groups), x = block * W;
  if (b.z != z || b.group != group) {
    const int end = (int)((int64_t)(group + 1) * own[Y].length / groups);
    find_entries(call, b, b.z = z, first, end - first);
    b.first = first;
    b.group = group;
    b.block = -1;
  }
  if (b.block != block) {
    find_taps(call, b, x);
    b.block = block;
    find_tokens(call, b, b.token, z, x);
  }
  for (int r = 0; r < b.rows; r++) {
    pack_tokens(call.q, call.q.at(place), b.token[r], D, b.q + r * W, ROWS * W, ALPHA);
    ahead<true>(call.out, call.out.at(place), b.token[r], DV);
    b.top[r] = vec(-INF);
  }
  if (x + W < along.length) {
    int32_t next[ROWS][W];
    find_tokens(call, b, next, z, x + W);
    for (int r = 0; r < b.rows; r++) ahead<false>(call.q, call.q.at(place), next[r], D);
  }
  for (int i = 0; i < CHANNELS * ROWS; i++) store(b.o + i * W, vf{});
  all_scores(call, b, k);
  if (b.uneven) cells<true>(call, place, b);
  else if (!PLAIN) cells<false>(call, place, b);
  weights(call, place, b);
  // Weights of some entries stay in the first-level cache while they meet all channels.
  const int step = 1 + 16384 / (b.taps * ROWS * W * 4);
  for (int n = 0; n < b.runs_found; n++)
    for (Run run = b.runs[n]; run.first < b.runs[n].last; run.first += step) {
      run.last = run.first + step < b.runs[n].last ? run.first + step : b.runs[n].last;
      for (int e = 0; e < CHANNELS; e += CHANNELS_AT_ONCE) values<ROWS>(call, b, run, v, e);
    }
  finish(call, place, b, along.length - x < W ? along.length - x : W);
}

// Tokens of a panel of a row of keys; beyond the row its last.
static void tokens_of(const Call& call, int row, int panel, int32_t* token) {
  const Axis* own = call.axis;
  const int z = row / own[Y].length, y = row % own[Y].length, most = own[X].length - 1;
  const int32_t first = (own[Z].order[z] * own[Y].length + own[Y].order[y]) * own[X].length;
  for (int l = 0; l < W; l++) {
    const int x = panel * W + l - call.lead;
    token[l] = first + own[X].order[x < 0 ? 0 : x > most ? most : x];
  }
}

// One panel of a row of keys and values.
static void pack(const Call& call, const Place& place, int row, int panel, float* k, float* v) {
  const Axis* own = call.axis;
  const T *keys = call.k.at(place), *from = call.v.at(place);
  int32_t token[W];
  const int rows = own[Z].length * own[Y].length, panels = call.panels - 1;
  const int next = row * panels + panel + 1;
  if (next < rows * panels) {
    tokens_of(call, next / panels, next % panels, token);
    ahead<false>(call.k, keys, token, D);
    ahead<false>(call.v, from, token, DV);
  }
  tokens_of(call, row, panel, token);
  const int64_t at = (int64_t)row * call.panels + panel;
  pack_tokens(call.k, keys, token, D, k + at * D * W, W, 1.0f);
  float* const to = v + at * CHANNELS * W;
  pack_tokens(call.v, from, token, DV, to, W, 1.0f);
  for (int e = DV; e < CHANNELS; e++) store(to + e * W, vf{});
}

static void run(Call& call) {
  const Axis* own = call.axis;
  const int groups = (own[Y].length + ROWS - 1) / ROWS, blocks = (own[X].length + W - 1) / W;
  measure(call, groups);
  const int rows = own[Z].length * own[Y].length;
  const int64_t owners = combinations(call.length, call.own, 1);
  const int64_t sharers = combinations(call.length, call.own, 0);
  const int64_t k_size = (int64_t)rows * call.panels * D * W;
  const int64_t v_size = (int64_t)rows * call.panels * CHANNELS * W;
  const int64_t size = 4 * (k_size + v_size), tasks = (int64_t)own[Z].length * groups * blocks;
  const int64_t chunk = packed_together(
      owners, size, BUDGET, (8 * call.threads + tasks * sharers - 1) / (tasks * sharers));
  float* const packed = (float*)aligned_alloc(64, (size_t)(chunk * size + 63) / 64 * 64);
  float* const packed_v = packed + chunk * k_size;
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
  {
    Buffers& b = *new_buffers(call);
    for (int64_t first = 0; first < owners; first += chunk) {
      const int64_t here = owners - first < chunk ? owners - first : chunk;
      const int64_t panels = (int64_t)rows * (call.panels - 1);  // the last one is never selected
#pragma omp for schedule(static)
      for (int64_t n = 0; n < here * panels; n++) {
        const int64_t c = n / panels, rest = n % panels;
        Place place{};
        place_of(call.length, call.own, 1, first + c, place);
        pack(call, place, (int)(rest / (call.panels - 1)),
             (int)(rest % (call.panels - 1)),
             packed + c * k_size, packed_v + c * v_size);
      }
#pragma omp for schedule(dynamic)
      for (int64_t n = 0; n < here * sharers * tasks; n++) {
        const int64_t c = n / (sharers * tasks), head = n / tasks % sharers, rest = n % tasks;
        Place place{};
        place_of(call.length, call.own, 1, first + c, place);
        place_of(call.length, call.own, 0, head, place);
        query_block(call, place, b, (int)(rest / ((int64_t)groups * blocks)),
                    (int)(rest / blocks % groups), groups, (int)(rest % blocks),
                    packed + c * k_size, packed_v + c * v_size);
      }
    }
    free(&b);
  }
  free(packed);
}

extern "C" void stencil(const int64_t* words) {
  Reader r{words};
  Call call;
  read_head(r, call, call.own);
  call.statistics.read(r);
  for (Axis& axis : call.axis) {
    axis.length = (int32_t)r.word();
    axis.order = r.pointer<const int32_t>();
    axis.start = r.pointer<const int32_t>();
    axis.count = r.pointer<const int32_t>();
  }
  //@read_operands
  run(call);
}

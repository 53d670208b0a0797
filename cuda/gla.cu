// Gated linear attention, token by token (ops/gla.py; report, eq. 10-11).
//
//   S_t = diag(g_t) S_{t-1} + k_t^T v_t,   o_t = scale q_t S_t
//
// A column of the state depends on one channel of v only, a row on one channel of k and g only.  So a
// column can be walked by itself, which is what o, dv and the gradient of the first state need (they sum
// over the key axis); and a row by itself, which is what dq, dk and dlog_g need (they sum over the value
// axis).  No sum leaves a warp, and no two blocks write to one place.
//
// Shapes: q, o (B,T,H,D); k, v (B,T,G,D); log_g (B,T,G,D) wide; states wide, key axis first: (B,G,D,D), and
// (B,N,G,D,D) for those before each chunk.  The H/G query heads of a group read one state.
// Grid: x is a state (b, g), y a group of columns or rows of it.  `parts` neighbouring lanes share a column
// (16 rows each) or a row (8 columns each).  A walk waits for memory at every token; so a block first brings
// as many tokens as fit into shared memory.
// Bytes: q, k, v, g, o once a block, from cache after the first; the saved states are T/16 D^2 a state, written
// in forward and read in backward.

constexpr int ROWS = 16;     // of a column, held by one thread
constexpr int COLUMNS = 8;   // of a row, held by one thread
constexpr int CHUNK = 16;    // tokens between two saved states, at most
constexpr int STAGE = 40960 / sizeof(wide);  // numbers in shared memory
constexpr int FLIGHT = 8;    // numbers that a thread asks for before it waits for the first

// decay = e^log_g, so that the walks, which read each of them many times, need no exponential.
extern "C" __global__ void gla_decay(const wide* log_g, wide* decay, i64 N)
{
    for (EACH(i, N)) decay[i] = exp(log_g[i]);
}

// Which state, and which column or row of it, this thread works on; how tokens lie in shared memory.
struct Place {
    int T, H, G, D, R, b, g, parts, part, line, padded, shift;
    __device__ Place(int T, int H, int G, int D, int parts, int per_thread)
        : T(T), H(H), G(G), D(D), R(H / G), b(blockIdx.x / G), g(blockIdx.x % G), parts(parts), part(lane() % parts),
          line((blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32) * (32 / parts) + lane() / parts),
          padded(parts * per_thread), shift(0)
    {
        while (1 << shift < padded) shift++;  // a power of two: to divide by it is to shift
    }
    __device__ bool inside() const { return line < D; }
    // This state's matrix among those of all b, g; and its saved state before chunk n.
    __device__ i64 state() const { return (i64)blockIdx.x * D * D; }
    __device__ i64 saved(i64 n, i64 chunks) const { return ((b * chunks + n) * G + g) * D * D; }
    // Token t in arrays of G heads and of H heads (the first of this group's R).
    __device__ i64 kv(i64 t) const { return ((b * (i64)T + t) * G + g) * D; }
    __device__ i64 qo(i64 t) const { return ((b * (i64)T + t) * H + g * R) * D; }
    // A token in shared memory: g | k | v | R heads of q | R heads of do, each padded with zeros, so that no
    // inner loop asks where D ends.
    __device__ int size() const { return (3 + 2 * R) * padded; }
    __device__ int most() const { return STAGE / size(); }
};

// `count` tokens of `heads` heads come into shared memory; `step` numbers lie between two tokens of `from`.
template <typename number>
__device__ inline void bring(const Place& at, wide* to, const number* from, i64 step, int heads, int count)
{
    const int total = count * heads * at.padded;
    for (int first = threadIdx.x; first < total; first += FLIGHT * blockDim.x) {
        wide held[FLIGHT];
#pragma unroll
        for (int u = 0; u < FLIGHT; u++) {
            const int i = first + u * blockDim.x, c = i & (at.padded - 1), row = i >> at.shift;
            const int token = heads == 1 ? row : row / heads, head = row - token * heads;
            held[u] = i < total && c < at.D ? (wide)from[token * step + head * at.D + c] : 0;
        }
#pragma unroll
        for (int u = 0; u < FLIGHT; u++) {
            const int i = first + u * blockDim.x, row = i >> at.shift, token = heads == 1 ? row : row / heads;
            if (i < total) to[token * at.size() + i - token * heads * at.padded] = held[u];
        }
    }
}

// first is null or the state before the first token; final may be the same array.  states is null (decoding)
// or gets the state before each chunk.
extern "C" __global__ void gla_forward(
    const real* q, const real* k, const real* v, const wide* decay, const wide* first, real* o, wide* final,
    wide* states, int T, int H, int G, int D, wide scale, int chunk, int parts)
{
    __shared__ wide stage[STAGE];
    const Place at(T, H, G, D, parts, ROWS);
    const int e = at.line, P = at.padded;
    const i64 chunks = (T + chunk - 1) / chunk;
    wide S[ROWS];  // rows part, part + parts, ... of column e
    for (int i = 0; i < ROWS; i++) {
        const int d = at.part + i * parts;
        S[i] = first && at.inside() && d < D ? first[at.state() + (i64)d * D + e] : 0;
    }
    for (int t0 = 0; t0 < T; t0 += at.most()) {
        const int count = T - t0 < at.most() ? T - t0 : at.most();
        __syncthreads();
        bring(at, stage, decay + at.kv(t0), G * D, 1, count);
        bring(at, stage + P, k + at.kv(t0), G * D, 1, count);
        bring(at, stage + 2 * P, v + at.kv(t0), G * D, 1, count);
        bring(at, stage + 3 * P, q + at.qo(t0), H * D, at.R, count);
        __syncthreads();
        for (int n = 0; n < count; n++) {
            const int t = t0 + n;
            if (states && t % chunk == 0)
                for (int i = 0; i < ROWS; i++) {
                    const int d = at.part + i * parts;
                    if (at.inside() && d < D) states[at.saved(t / chunk, chunks) + (i64)d * D + e] = S[i];
                }
            const wide *g_t = stage + n * at.size() + at.part, *k_t = g_t + P, *q_t = g_t + 3 * P;
            const wide v_t = at.inside() ? stage[n * at.size() + 2 * P + e] : 0;
            for (int i = 0; i < ROWS; i++) S[i] = g_t[i * parts] * S[i] + k_t[i * parts] * v_t;
            for (int r = 0; r < at.R; r++, q_t += P) {
                wide sum = 0;
                for (int i = 0; i < ROWS; i++) sum += q_t[i * parts] * S[i];
                sum = lanes_sum(sum, parts);
                if (at.part == 0 && at.inside()) o[at.qo(t) + r * D + e] = scale * sum;
            }
        }
    }
    for (int i = 0; i < ROWS; i++) {
        const int d = at.part + i * parts;
        if (at.inside() && d < D) final[at.state() + (i64)d * D + e] = S[i];
    }
}

// The walk backwards, by columns.  With dS the gradient of S_t, summed from the future and from o_t,
//   dS += scale q_t^T do_t,   dv_t = k_t dS,   dS <- g_t dS
// dfinal is null or the gradient of the final state; dfirst is that of the first.
extern "C" __global__ void gla_backward_columns(
    const real* d_o, const real* q, const real* k, const wide* decay, const wide* dfinal, real* dv, wide* dfirst,
    int T, int H, int G, int D, wide scale, int parts)
{
    __shared__ wide stage[STAGE];
    const Place at(T, H, G, D, parts, ROWS);
    const int e = at.line, P = at.padded;
    wide dS[ROWS];
    for (int i = 0; i < ROWS; i++) {
        const int d = at.part + i * parts;
        dS[i] = dfinal && at.inside() && d < D ? dfinal[at.state() + (i64)d * D + e] : 0;
    }
    for (int end = T; end > 0; end -= at.most()) {
        const int t0 = end > at.most() ? end - at.most() : 0;
        __syncthreads();
        bring(at, stage, decay + at.kv(t0), G * D, 1, end - t0);
        bring(at, stage + P, k + at.kv(t0), G * D, 1, end - t0);
        bring(at, stage + 3 * P, q + at.qo(t0), H * D, at.R, end - t0);
        bring(at, stage + (3 + at.R) * P, d_o + at.qo(t0), H * D, at.R, end - t0);
        __syncthreads();
        for (int t = end - 1; t >= t0; t--) {
            const wide *token = stage + (t - t0) * at.size(), *g_t = token + at.part, *k_t = g_t + P;
            for (int r = 0; r < at.R; r++) {
                const wide* q_t = g_t + (3 + r) * P;
                const wide do_t = at.inside() ? scale * token[(3 + at.R + r) * P + e] : 0;
                for (int i = 0; i < ROWS; i++) dS[i] += q_t[i * parts] * do_t;
            }
            wide sum = 0;
            for (int i = 0; i < ROWS; i++) {
                sum += k_t[i * parts] * dS[i];
                dS[i] *= g_t[i * parts];
            }
            sum = lanes_sum(sum, parts);
            if (at.part == 0 && at.inside()) dv[at.kv(t) + e] = sum;
        }
    }
    for (int i = 0; i < ROWS; i++) {
        const int d = at.part + i * parts;
        if (at.inside() && d < D) dfirst[at.state() + (i64)d * D + e] = dS[i];
    }
}

// The walk backwards, by rows.
//   dq_t = scale S_t do_t,   dk_t = dS v_t,   dlog_g_t = sum over v of (g_t S_{t-1}) dS
// A state cannot be won back from its successor (the decay may be 0), so each chunk is first walked forward
// from its saved state, keeping S of every token.
extern "C" __global__ void gla_backward_rows(
    const real* d_o, const real* q, const real* k, const real* v, const wide* decay, const wide* states,
    const wide* dfinal, real* dq, real* dk, wide* dlog_g, int T, int H, int G, int D, wide scale, int chunk, int parts)
{
    __shared__ wide stage[STAGE];
    const Place at(T, H, G, D, parts, COLUMNS);
    const int d = at.line, P = at.padded, most = at.most() < chunk ? at.most() : chunk;
    const bool writes = at.inside() && at.part == 0;
    const i64 chunks = (T + chunk - 1) / chunk;
    wide S[COLUMNS], dS[COLUMNS], before[CHUNK][COLUMNS];  // columns part, part + parts, ... of row d
    for (int j = 0; j < COLUMNS; j++) {
        const int e = at.part + j * parts;
        dS[j] = dfinal && at.inside() && e < D ? dfinal[at.state() + (i64)d * D + e] : 0;
    }
    for (i64 n = chunks - 1; n >= 0; n--) {
        const int start = n * chunk, stop = start + chunk < T ? start + chunk : T;
        for (int j = 0; j < COLUMNS; j++) {
            const int e = at.part + j * parts;
            S[j] = at.inside() && e < D ? states[at.saved(n, chunks) + (i64)d * D + e] : 0;
        }
        for (int t0 = start; t0 < stop; t0 += most) {
            const int count = stop - t0 < most ? stop - t0 : most;
            __syncthreads();
            bring(at, stage, decay + at.kv(t0), G * D, 1, count);
            bring(at, stage + P, k + at.kv(t0), G * D, 1, count);
            bring(at, stage + 2 * P, v + at.kv(t0), G * D, 1, count);
            __syncthreads();
            for (int t = t0; t < t0 + count; t++) {
                const wide *token = stage + (t - t0) * at.size(), *v_t = token + 2 * P + at.part;
                const wide g_t = at.inside() ? token[d] : 0, k_t = at.inside() ? token[P + d] : 0;
                for (int j = 0; j < COLUMNS; j++) {
                    before[t - start][j] = S[j];
                    S[j] = g_t * S[j] + k_t * v_t[j * parts];
                }
            }
        }
        for (int end = stop; end > start; end -= most) {
            const int t0 = end - start > most ? end - most : start;
            __syncthreads();
            if (stop - start > most) {  // else they are still there
                bring(at, stage, decay + at.kv(t0), G * D, 1, end - t0);
                bring(at, stage + P, k + at.kv(t0), G * D, 1, end - t0);
                bring(at, stage + 2 * P, v + at.kv(t0), G * D, 1, end - t0);
            }
            bring(at, stage + 3 * P, q + at.qo(t0), H * D, at.R, end - t0);
            bring(at, stage + (3 + at.R) * P, d_o + at.qo(t0), H * D, at.R, end - t0);
            __syncthreads();
            for (int t = end - 1; t >= t0; t--) {
                const wide *token = stage + (t - t0) * at.size(), *v_t = token + 2 * P + at.part;
                for (int r = 0; r < at.R; r++) {
                    const wide *do_t = token + (3 + at.R + r) * P + at.part;
                    const wide q_t = at.inside() ? scale * token[(3 + r) * P + d] : 0;
                    wide sum = 0;
                    for (int j = 0; j < COLUMNS; j++) {
                        sum += S[j] * do_t[j * parts];
                        dS[j] += q_t * do_t[j * parts];
                    }
                    sum = lanes_sum(sum, parts);
                    if (writes) dq[at.qo(t) + r * D + d] = scale * sum;
                }
                const wide g_t = at.inside() ? token[d] : 0;
                wide key_sum = 0, gate_sum = 0;
                for (int j = 0; j < COLUMNS; j++) {
                    key_sum += dS[j] * v_t[j * parts];
                    dS[j] *= g_t;
                    S[j] = before[t - start][j];
                    gate_sum += S[j] * dS[j];
                }
                key_sum = lanes_sum(key_sum, parts);
                gate_sum = lanes_sum(gate_sum, parts);
                if (writes) {
                    dk[at.kv(t) + d] = key_sum;
                    dlog_g[at.kv(t) + d] = gate_sum;
                }
            }
        }
    }
}

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
// (16 rows each) or a row (8 columns each).
// Bytes: q, k, v, g, o once a block, from cache after the first; the saved states are T/16 D^2 a state, written
// in forward and read in backward.

constexpr int ROWS = 16;     // of a column, held by one thread
constexpr int COLUMNS = 8;   // of a row, held by one thread
constexpr int CHUNK = 16;    // tokens between two saved states, at most

// decay = e^log_g, so that the walks, which read each of them many times, need no exponential.
extern "C" __global__ void gla_decay(const wide* log_g, wide* decay, i64 N)
{
    for (EACH(i, N)) decay[i] = exp(log_g[i]);
}

// Which state, and which column or row of it, this thread works on.
struct Place {
    int b, g, part;
    i64 line;  // the column or row
    __device__ Place(int G, int parts)
    {
        b = blockIdx.x / G;
        g = blockIdx.x % G;
        part = lane() % parts;
        line = ((i64)blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32) * (32 / parts) + lane() / parts;
    }
};

// first is null or the state before the first token; final may be the same array.  states is null (decoding)
// or gets the state before each chunk.
extern "C" __global__ void gla_forward(
    const real* q, const real* k, const real* v, const wide* decay, const wide* first, real* o, wide* final,
    wide* states, int T, int H, int G, int D, wide scale, int chunk, int parts)
{
    const Place at(G, parts);
    const int R = H / G, row = at.part * ROWS, e = at.line;
    const bool inside = e < D;
    const i64 state = (i64)blockIdx.x * D * D, chunks = (T + chunk - 1) / chunk;
    wide S[ROWS];
    for (int i = 0; i < ROWS; i++)
        S[i] = first && inside && row + i < D ? first[state + (row + i) * D + e] : 0;
    for (int t = 0; t < T; t++) {
        if (states && inside && t % chunk == 0) {
            wide* saved = states + ((at.b * chunks + t / chunk) * G + at.g) * D * D;
            for (int i = 0; i < ROWS; i++)
                if (row + i < D) saved[(row + i) * D + e] = S[i];
        }
        const i64 kv = (((i64)at.b * T + t) * G + at.g) * D, qo = (((i64)at.b * T + t) * H + at.g * R) * D;
        const wide value = inside ? (wide)v[kv + e] : 0;
        for (int i = 0; i < ROWS; i++)
            if (row + i < D) S[i] = decay[kv + row + i] * S[i] + (wide)k[kv + row + i] * value;
        for (int r = 0; r < R; r++) {
            wide sum = 0;
            for (int i = 0; i < ROWS; i++)
                if (row + i < D) sum += (wide)q[qo + r * D + row + i] * S[i];
            sum = lanes_sum(sum, parts);
            if (at.part == 0 && inside) o[qo + r * D + e] = scale * sum;
        }
    }
    for (int i = 0; i < ROWS; i++)
        if (inside && row + i < D) final[state + (row + i) * D + e] = S[i];
}

// The walk backwards, by columns.  With dS the gradient of S_t, summed from the future and from o_t,
//   dS += scale q_t^T do_t,   dv_t = k_t dS,   dS <- g_t dS
// dfinal is null or the gradient of the final state; dfirst is that of the first.
extern "C" __global__ void gla_backward_columns(
    const real* o_grad, const real* q, const real* k, const wide* decay, const wide* dfinal, real* dv, wide* dfirst,
    int T, int H, int G, int D, wide scale, int parts)
{
    const Place at(G, parts);
    const int R = H / G, row = at.part * ROWS, e = at.line;
    const bool inside = e < D;
    const i64 state = (i64)blockIdx.x * D * D;
    wide dS[ROWS];
    for (int i = 0; i < ROWS; i++)
        dS[i] = dfinal && inside && row + i < D ? dfinal[state + (row + i) * D + e] : 0;
    for (int t = T - 1; t >= 0; t--) {
        const i64 kv = (((i64)at.b * T + t) * G + at.g) * D, qo = (((i64)at.b * T + t) * H + at.g * R) * D;
        for (int r = 0; r < R; r++) {
            const wide d = inside ? scale * (wide)o_grad[qo + r * D + e] : 0;
            for (int i = 0; i < ROWS; i++)
                if (row + i < D) dS[i] += (wide)q[qo + r * D + row + i] * d;
        }
        wide sum = 0;
        for (int i = 0; i < ROWS; i++)
            if (row + i < D) {
                sum += (wide)k[kv + row + i] * dS[i];
                dS[i] *= decay[kv + row + i];
            }
        sum = lanes_sum(sum, parts);
        if (at.part == 0 && inside) dv[kv + e] = sum;
    }
    for (int i = 0; i < ROWS; i++)
        if (inside && row + i < D) dfirst[state + (row + i) * D + e] = dS[i];
}

// The walk backwards, by rows.
//   dq_t = scale S_t do_t,   dk_t = dS v_t,   dlog_g_t = sum over v of (g_t S_{t-1}) dS
// A state cannot be won back from its successor (the decay may be 0), so each chunk is first walked forward
// from its saved state, keeping S of every token.
extern "C" __global__ void gla_backward_rows(
    const real* o_grad, const real* q, const real* k, const real* v, const wide* decay, const wide* states,
    const wide* dfinal, real* dq, real* dk, wide* dlog_g, int T, int H, int G, int D, wide scale, int chunk, int parts)
{
    const Place at(G, parts);
    const int R = H / G, d = at.line, column = at.part * COLUMNS;
    const bool inside = d < D, writes = inside && at.part == 0;
    const i64 state = (i64)blockIdx.x * D * D, chunks = (T + chunk - 1) / chunk;
    wide S[COLUMNS], dS[COLUMNS], before[CHUNK][COLUMNS];
    for (int j = 0; j < COLUMNS; j++)
        dS[j] = dfinal && inside && column + j < D ? dfinal[state + (i64)d * D + column + j] : 0;

    for (i64 n = chunks - 1; n >= 0; n--) {
        const int start = n * chunk, end = start + chunk < T ? start + chunk : T;
        const wide* saved = states + ((at.b * chunks + n) * G + at.g) * D * D + (i64)d * D + column;
        for (int j = 0; j < COLUMNS; j++) S[j] = inside && column + j < D ? saved[j] : 0;
        for (int t = start; t < end; t++) {
            const i64 kv = (((i64)at.b * T + t) * G + at.g) * D;
            const wide g = inside ? decay[kv + d] : 0, key = inside ? (wide)k[kv + d] : 0;
            for (int j = 0; j < COLUMNS; j++) {
                before[t - start][j] = S[j];
                if (column + j < D) S[j] = g * S[j] + key * (wide)v[kv + column + j];
            }
        }
        for (int t = end - 1; t >= start; t--) {
            const i64 kv = (((i64)at.b * T + t) * G + at.g) * D, qo = (((i64)at.b * T + t) * H + at.g * R) * D;
            for (int r = 0; r < R; r++) {
                const wide query = inside ? scale * (wide)q[qo + r * D + d] : 0;
                wide sum = 0;
                for (int j = 0; j < COLUMNS; j++)
                    if (column + j < D) {
                        const wide d_o = o_grad[qo + r * D + column + j];
                        sum += S[j] * d_o;
                        dS[j] += query * d_o;
                    }
                sum = lanes_sum(sum, parts);
                if (writes) dq[qo + r * D + d] = scale * sum;
            }
            const wide g = inside ? decay[kv + d] : 0;
            wide key_sum = 0, gate_sum = 0;
            for (int j = 0; j < COLUMNS; j++)
                if (column + j < D) {
                    key_sum += dS[j] * (wide)v[kv + column + j];
                    dS[j] *= g;
                    S[j] = before[t - start][j];
                    gate_sum += S[j] * dS[j];
                }
            key_sum = lanes_sum(key_sum, parts);
            gate_sum = lanes_sum(gate_sum, parts);
            if (writes) {
                dk[kv + d] = key_sum;
                dlog_g[kv + d] = gate_sum;
            }
        }
    }
}

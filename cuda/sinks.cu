// Attention sinks: S learned tokens that every token sees, joined to the softmax over the window (ops/sinks.py).
//
// Shapes: q, o, do (B,T,H,D), seen as `rows` rows of D, the head changing fastest; k, v (S,G,D), the same for the whole
// batch; lse (B,T,H) wide: p = exp(score - lse).  D at most 256.
//
//   forward   a running softmax over the sinks that begins with what the window gave: its o weighs exp(lse), as a token
//             whose score is lse and whose value is o
//   backward  p = exp(score - lse),  ds = p (do v^T - delta),  delta = sum over D of do * o
//             dq = scale ds k (added to the window's),  dk = scale ds^T q,  dv = p^T do
//
// Grid: forward and dq: a warp takes a row and walks the sinks.  dk, dv: a block takes a key head and a slice of the
// tokens, a warp of it every WARPS-th sink, which it keeps; sum_slices adds the slices up in order.
// Bytes: q, o (do, dq) once; keys and values from cache; dk and dv read a slice's q and do once a sink, from cache.

constexpr int WARPS = 4, LANE_CHANNELS = 256 / 32;

// One head's D channels, channel lane + 32 i in c[i]; zeros beyond D.
struct Head {
    wide c[LANE_CHANNELS];
    __device__ Head() {}
    __device__ Head(const real* x, int D)
    {
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i++) c[i] = lane() + 32 * i < D ? (wide)x[lane() + 32 * i] : 0;
    }
    __device__ void clear()
    {
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i++) c[i] = 0;
    }
    __device__ void scale(wide by)
    {
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i++) c[i] *= by;
    }
    __device__ void add(wide factor, const Head& x)
    {
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i++) c[i] += factor * x.c[i];
    }
    template <typename number>
    __device__ void store(number* to, int D) const
    {
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i++)
            if (lane() + 32 * i < D) to[lane() + 32 * i] = c[i];
    }
};

__device__ inline wide dot(const Head& a, const Head& b)
{
    wide sum = 0;
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++) sum += a.c[i] * b.c[i];
    return warp_sum(sum);
}

// before, lse_before: over the window, or null if there is none.
extern "C" __global__ void sinks_forward(
    const real* q, const real* k, const real* v, const real* before, const wide* lse_before, real* o, wide* lse, i64 rows,
    int S, int H, int G, int D, wide scale)
{
    const i64 row = warp_number();
    if (row >= rows) return;
    const int g = row % H / (H / G);
    const Head query(q + row * D, D);
    Head sum;
    sum.clear();
    wide top = LOWEST, total = 0;
    if (before) {
        sum = Head(before + row * D, D);
        top = lse_before[row];
        total = 1;
    }
    for (int s = 0; s < S; s++) {
        const i64 at = ((i64)s * G + g) * D;
        const wide score = scale * dot(query, Head(k + at, D));
        const wide highest = score > top ? score : top, shrink = exp(top - highest), p = exp(score - highest);
        top = highest;
        total = total * shrink + p;
        sum.scale(shrink);
        sum.add(p, Head(v + at, D));
    }
    sum.scale(1 / total);
    sum.store(o + row * D, D);
    if (lane() == 0) lse[row] = top + log(total);
}

// dq holds the window's gradient if `add`, else nothing yet.
extern "C" __global__ void sinks_backward_q(
    const real* d_o, const real* q, const real* k, const real* v, const wide* lse, const wide* delta, real* dq, int add,
    i64 rows, int S, int H, int G, int D, wide scale)
{
    const i64 row = warp_number();
    if (row >= rows) return;
    const int g = row % H / (H / G);
    const Head query(q + row * D, D), upstream(d_o + row * D, D);
    Head sum;
    sum.clear();
    for (int s = 0; s < S; s++) {
        const i64 at = ((i64)s * G + g) * D;
        const Head key(k + at, D);
        const wide p = exp(scale * dot(query, key) - lse[row]);
        sum.add(scale * p * (dot(upstream, Head(v + at, D)) - delta[row]), key);
    }
    if (add) sum.add(1, Head(dq + row * D, D));
    sum.store(dq + row * D, D);
}

// partial (slices,2,S,G,D): of dk, then of dv.  Slice blockIdx.y has `a_slice` of the `tokens` tokens (B,T).
extern "C" __global__ void sinks_backward_kv(
    const real* d_o, const real* q, const real* k, const real* v, const wide* lse, const wide* delta, wide* partial,
    int tokens, int a_slice, int S, int H, int G, int D, wide scale)
{
    const int g = blockIdx.x, R = H / G;
    const int first = blockIdx.y * a_slice, end = first + a_slice < tokens ? first + a_slice : tokens;
    for (int s = threadIdx.x / 32; s < S; s += WARPS) {
        const i64 at = ((i64)s * G + g) * D, all = (i64)S * G * D;
        const Head key(k + at, D), value(v + at, D);
        Head dkey, dvalue;
        dkey.clear();
        dvalue.clear();
        for (int t = first; t < end; t++)
            for (int h = g * R; h < (g + 1) * R; h++) {
                const i64 row = (i64)t * H + h;
                const Head query(q + row * D, D), upstream(d_o + row * D, D);
                const wide p = exp(scale * dot(query, key) - lse[row]);
                dkey.add(scale * p * (dot(upstream, value) - delta[row]), query);
                dvalue.add(p, upstream);
            }
        dkey.store(partial + blockIdx.y * 2 * all + at, D);
        dvalue.store(partial + (blockIdx.y * 2 + 1) * all + at, D);
    }
}

// total (J,) = the sum of partial (slices,J) over the slices.  Grid: a thread a column.
extern "C" __global__ void sum_slices(const wide* partial, wide* total, int slices, int J)
{
    for (EACH(j, J)) {
        wide sum = 0;
        for (int s = 0; s < slices; s++) sum += partial[(i64)s * J + j];
        total[j] = sum;
    }
}

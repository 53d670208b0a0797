// From one fused projection to q, k and v of linear attention: split, and relu or sigmoid on q and k (ops/heads.py).
//
// qkv (rows,N) has columns q | k | v | others, N >= (H+2G) D.  Grid: a thread an element.
// Bytes: each of the (H+2G) D columns once in, once out; backward also reads q and k; a tied gate is one more k.

// Where column j of a fused row lies in q, k or v, each (rows, its columns).
template <typename array>
__device__ inline array place_of(array q, array k, array v, i64 row, int j, int q_columns, int kv_columns)
{
    if (j < q_columns) return q + row * q_columns + j;
    if (j < q_columns + kv_columns) return k + row * kv_columns + j - q_columns;
    return v + row * kv_columns + j - q_columns - kv_columns;
}

template <int W>
__device__ void relu_forward(const real* qkv, real* q, real* k, real* v, i64 rows, int N, int q_columns, int kv_columns)
{
    const int used = q_columns + 2 * kv_columns;
    for (EACH(n, rows * used / W)) {
        const i64 row = n * W / used;
        const int j = n * W % used;
        Pack<W> x = load<W>(qkv + row * N + j);
        for (int i = 0; j < q_columns + kv_columns && i < W; i++) x.x[i] = (wide)x.x[i] < 0 ? (wide)0 : (wide)x.x[i];  // NaN stays
        store(place_of(q, k, v, row, j, q_columns, kv_columns), x);
    }
}

template <int W>
__device__ void relu_backward(const real* dq, const real* dk, const real* dv, const real* q, const real* k, real* dqkv,
                              i64 rows, int N, int q_columns, int kv_columns)
{
    const int used = q_columns + 2 * kv_columns;
    for (EACH(n, rows * used / W)) {
        const i64 row = n * W / used;
        const int j = n * W % used;
        Pack<W> d = load<W>(place_of(dq, dk, dv, row, j, q_columns, kv_columns));
        if (j < q_columns + kv_columns) {
            const Pack<W> y = load<W>(place_of(q, k, k, row, j, q_columns, kv_columns));
            for (int i = 0; i < W; i++) d.x[i] = (wide)d.x[i] * ((wide)y.x[i] > 0);
        }
        store(dqkv + row * N + j, d);
    }
}

// Whether no pack reaches from one of q, k, v into the next.
__device__ inline bool packed_heads(int N, int q_columns, int kv_columns)
{
    return packed(N) && packed(q_columns) && packed(kv_columns);
}

extern "C" __global__ void relu_heads_forward(
    const real* qkv, real* q, real* k, real* v, i64 rows, int N, int q_columns, int kv_columns)
{
    if (packed_heads(N, q_columns, kv_columns) && packed(0, qkv, q, k, v))
        relu_forward<PACK>(qkv, q, k, v, rows, N, q_columns, kv_columns);
    else relu_forward<1>(qkv, q, k, v, rows, N, q_columns, kv_columns);
}

// q and k are what forward gave: relu passes a gradient where its result is above 0.
extern "C" __global__ void relu_heads_backward(
    const real* dq, const real* dk, const real* dv, const real* q, const real* k, real* dqkv, i64 rows, int N,
    int q_columns, int kv_columns)
{
    if (packed_heads(N, q_columns, kv_columns) && packed(0, dq, dk, dv, q, k, dqkv))
        relu_backward<PACK>(dq, dk, dv, q, k, dqkv, rows, N, q_columns, kv_columns);
    else relu_backward<1>(dq, dk, dv, q, k, dqkv, rows, N, q_columns, kv_columns);
}

// log_g (rows,G,D): where the gate is tied to the key, g = 1 - k, its logarithm, else null.  From what comes before the
// sigmoid, as in gate.cu.
extern "C" __global__ void sigmoid_heads_forward(
    const real* qkv, real* q, real* k, real* v, wide* log_g, i64 rows, int N, int q_columns, int kv_columns)
{
    const int used = q_columns + 2 * kv_columns;
    for (EACH(i, rows * used)) {
        const i64 row = i / used;
        const int j = i % used;
        const i64 at_k = row * kv_columns + j - q_columns;
        const wide x = qkv[row * N + j];
        if (j < q_columns) q[row * q_columns + j] = sigmoid(x);
        else if (j < q_columns + kv_columns) {
            k[at_k] = sigmoid(x);
            if (log_g) log_g[at_k] = -softplus(x);
        } else v[at_k - kv_columns] = x;
    }
}

// q and k are what forward gave: sigmoid' = y (1 - y).  dlog_g is null where the gate is not tied.
extern "C" __global__ void sigmoid_heads_backward(
    const real* dq, const real* dk, const real* dv, const wide* dlog_g, const real* q, const real* k, real* dqkv,
    i64 rows, int N, int q_columns, int kv_columns)
{
    const int used = q_columns + 2 * kv_columns;
    for (EACH(i, rows * used)) {
        const i64 row = i / used;
        const int j = i % used;
        const i64 at_q = row * q_columns + j, at_k = row * kv_columns + j - q_columns;
        wide d;
        if (j < q_columns) d = (wide)dq[at_q] * (wide)q[at_q] * (1 - (wide)q[at_q]);
        else if (j < q_columns + kv_columns) {
            const wide key = k[at_k];
            d = key * ((wide)dk[at_k] * (1 - key) - (dlog_g ? dlog_g[at_k] : 0));
        } else d = dv[at_k - kv_columns];
        dqkv[row * N + j] = d;
    }
}

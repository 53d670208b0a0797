// The gate of linear attention: log g = logsigmoid(z) / divisor (ops/gate.py).
//
//   logsigmoid(z) = min(z, 0) - log(1 + e^-|z|),  dz = dlog_g sigmoid(-z) / divisor
//
// Grid: a thread a pack, again and again.  Bytes: N in, N out (backward 2 N in).  log_g is wide: a sum of hundreds
// of them becomes an exponent.

template <int W>
__device__ void forward(const real* z, wide* log_g, i64 N, wide share)
{
    for (EACH(n, N / W)) {
        const Pack<W> a = load<W>(z + n * W);
        Wides<W> out;
        for (int i = 0; i < W; i++) {
            const wide x = a.x[i];
            out.x[i] = ((x < 0 ? x : 0) - log1p(quick_exp(-fabs(x)))) * share;
        }
        store(log_g + n * W, out);
    }
}

template <int W>
__device__ void backward(const wide* dlog_g, const real* z, real* dz, i64 N, wide share)
{
    for (EACH(n, N / W)) {
        const Pack<W> a = load<W>(z + n * W);
        const Wides<W> d = load_wides<W>(dlog_g + n * W);
        Pack<W> out;
        for (int i = 0; i < W; i++) out.x[i] = d.x[i] * share * sigmoid(-(wide)a.x[i]);
        store(dz + n * W, out);
    }
}

extern "C" __global__ void log_gate_forward(const real* z, wide* log_g, i64 N, wide divisor)
{
    if (packed(N, z, log_g)) forward<PACK>(z, log_g, N, 1 / divisor);
    else forward<1>(z, log_g, N, 1 / divisor);
}

extern "C" __global__ void log_gate_backward(const wide* dlog_g, const real* z, real* dz, i64 N, wide divisor)
{
    if (packed(N, dlog_g, z, dz)) backward<PACK>(dlog_g, z, dz, N, 1 / divisor);
    else backward<1>(dlog_g, z, dz, N, 1 / divisor);
}

// The gate tied to the key (76B): k = sigmoid(z) and g = 1 - k, so log g = -softplus(z) = -max(z, 0) - log(1 + e^-|z|),
// from z, as 1 - k is 0 in float32 from z = 17 on.  dz = k (dk (1 - k) - dlog_g).  Grid: a thread an element.

extern "C" __global__ void tied_gate_forward(const real* z, real* k, wide* log_g, i64 N)
{
    for (EACH(i, N)) {
        const wide x = z[i];
        k[i] = sigmoid(x);
        log_g[i] = -softplus(x);
    }
}

extern "C" __global__ void tied_gate_backward(const real* dk, const wide* dlog_g, const real* k, real* dz, i64 N)
{
    for (EACH(i, N)) {
        const wide key = k[i];
        dz[i] = key * ((wide)dk[i] * (1 - key) - dlog_g[i]);
    }
}

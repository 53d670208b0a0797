// The gate of linear attention: log g = logsigmoid(z) / divisor (ops/gate.py).
//
//   logsigmoid(z) = min(z, 0) - log(1 + e^-|z|),  dz = dlog_g sigmoid(-z) / divisor
//
// Grid: a thread an element.  Bytes: N in, N out (backward 2 N in).  log_g is wide: a sum of hundreds
// of them becomes an exponent.

extern "C" __global__ void log_gate_forward(const real* z, wide* log_g, i64 N, wide divisor)
{
    for (EACH(i, N)) {
        const wide x = z[i];
        log_g[i] = ((x < 0 ? x : 0) - log1p(exp(-fabs(x)))) / divisor;
    }
}

extern "C" __global__ void log_gate_backward(const wide* dlog_g, const real* z, real* dz, i64 N, wide divisor)
{
    for (EACH(i, N)) dz[i] = dlog_g[i] * sigmoid(-(wide)z[i]) / divisor;
}

// The gate tied to the key (76B): k = sigmoid(z) and g = 1 - k, so log g = -softplus(z) = -max(z, 0) - log(1 + e^-|z|),
// from z, as 1 - k is 0 in float32 from z = 17 on.  dz = k (dk (1 - k) - dlog_g).

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

// SwiGLU: h = gate sigmoid(gate) up (ops/swiglu.py).
//
//   dgate = dh up (s + silu (1 - s)),  dup = dh silu,  where s = sigmoid(gate), silu = gate s
//
// gate_up (N,2F) holds the gate in its first F columns.  Grid: a thread a pack of h.
// Bytes, forward: 3 N F.  Backward: 5 N F.

template <int W>
__device__ void forward(const real* gate_up, real* h, i64 N, int F)
{
    for (EACH(n, N * F / W)) {
        const i64 i = n * W, at = i / F * 2 * F + i % F;
        const Pack<W> gate = load<W>(gate_up + at), up = load<W>(gate_up + at + F);
        Pack<W> out;
        for (int j = 0; j < W; j++) out.x[j] = (wide)gate.x[j] * sigmoid(gate.x[j]) * (wide)up.x[j];
        store(h + i, out);
    }
}

template <int W>
__device__ void backward(const real* dh, const real* gate_up, real* dgate_up, i64 N, int F)
{
    for (EACH(n, N * F / W)) {
        const i64 i = n * W, at = i / F * 2 * F + i % F;
        const Pack<W> gate = load<W>(gate_up + at), up = load<W>(gate_up + at + F), d = load<W>(dh + i);
        Pack<W> dgate, dup;
        for (int j = 0; j < W; j++) {
            const wide x = gate.x[j], s = sigmoid(x), silu = x * s;
            dgate.x[j] = (wide)d.x[j] * (wide)up.x[j] * (s + silu * (1 - s));
            dup.x[j] = (wide)d.x[j] * silu;
        }
        store(dgate_up + at, dgate);
        store(dgate_up + at + F, dup);
    }
}

extern "C" __global__ void swiglu_forward(const real* gate_up, real* h, i64 N, int F)
{
    if (packed(F, gate_up, h)) forward<PACK>(gate_up, h, N, F);
    else forward<1>(gate_up, h, N, F);
}

extern "C" __global__ void swiglu_backward(const real* dh, const real* gate_up, real* dgate_up, i64 N, int F)
{
    if (packed(F, dh, gate_up, dgate_up)) backward<PACK>(dh, gate_up, dgate_up, N, F);
    else backward<1>(dh, gate_up, dgate_up, N, F);
}

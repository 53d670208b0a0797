// SwiGLU: h = gate sigmoid(gate) up (ops/swiglu.py).
//
//   dgate = dh up (s + silu (1 - s)),  dup = dh silu,  where s = sigmoid(gate), silu = gate s
//
// gate_up (N,2F) holds the gate in its first F columns.  Grid: a thread an element of h.
// Bytes, forward: 3 N F.  Backward: 5 N F.

extern "C" __global__ void swiglu_forward(const real* gate_up, real* h, i64 N, int F)
{
    for (EACH(i, N * F)) {
        const i64 at = i / F * 2 * F + i % F;
        const wide gate = gate_up[at], up = gate_up[at + F];
        h[i] = gate * sigmoid(gate) * up;
    }
}

extern "C" __global__ void swiglu_backward(const real* dh, const real* gate_up, real* dgate_up, i64 N, int F)
{
    for (EACH(i, N * F)) {
        const i64 at = i / F * 2 * F + i % F;
        const wide gate = gate_up[at], up = gate_up[at + F], s = sigmoid(gate), silu = gate * s, d = dh[i];
        dgate_up[at] = d * up * (s + silu * (1 - s));
        dgate_up[at + F] = d * silu;
    }
}

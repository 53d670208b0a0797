// Rotary position embedding on q and k, with the split of the fused projection (ops/rope.py).
//
//   (a, b) -> (a cos - b sin, b cos + a sin)      channel i of a head is paired with channel i + D/2
//
// qkv (B,T,N) has columns q | k | v | others; cos, sin (T,D/2).  Grid: a thread a pair; v is copied by
// the same rule with an angle of 0.  Bytes: each of the (H+2G) D columns once in, once out.

// Where pair i of head h of one token lies in q, k or v (heads counted through all three).
template <typename array>
__device__ inline array head_of(array q, array k, array v, i64 token, int h, int H, int G, int D)
{
    if (h < H) return q + (token * H + h) * D;
    if (h < H + G) return k + (token * G + h - H) * D;
    return v + (token * G + h - H - G) * D;
}

extern "C" __global__ void rope_forward(
    const real* qkv, const wide* cos, const wide* sin, real* q, real* k, real* v, i64 tokens, int T, int N, int H,
    int G, int D)
{
    const int half = D / 2, pairs = (H + 2 * G) * half;
    for (EACH(n, tokens * pairs)) {
        const i64 token = n / pairs;
        const int h = n % pairs / half, i = n % half, at = token % T * half + i;
        const bool turned = h < H + G;
        const wide c = turned ? cos[at] : 1, s = turned ? sin[at] : 0;
        const wide a = qkv[token * N + h * D + i], b = qkv[token * N + h * D + i + half];
        real* y = head_of(q, k, v, token, h, H, G, D);
        y[i] = turned ? a * c - b * s : a;
        y[i + half] = turned ? b * c + a * s : b;
    }
}

// The gradient of a rotation is the rotation back.
extern "C" __global__ void rope_backward(
    const real* dq, const real* dk, const real* dv, const wide* cos, const wide* sin, real* dqkv, i64 tokens, int T,
    int N, int H, int G, int D)
{
    const int half = D / 2, pairs = (H + 2 * G) * half;
    for (EACH(n, tokens * pairs)) {
        const i64 token = n / pairs;
        const int h = n % pairs / half, i = n % half, at = token % T * half + i;
        const bool turned = h < H + G;
        const wide c = turned ? cos[at] : 1, s = turned ? sin[at] : 0;
        const real* y = head_of(dq, dk, dv, token, h, H, G, D);
        const wide a = y[i], b = y[i + half];
        dqkv[token * N + h * D + i] = turned ? a * c + b * s : a;
        dqkv[token * N + h * D + i + half] = turned ? b * c - a * s : b;
    }
}

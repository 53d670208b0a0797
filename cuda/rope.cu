// Rotary position embedding on q and k, with the split of the fused projection (ops/rope.py).
//
//   (a, b) -> (a cos - b sin, b cos + a sin)      channel i of a head is paired with channel i + D/2
//
// qkv (B,T,N) has columns q | k | v | others; cos, sin (T,D/2).  Grid: a thread a pack of pairs; v is copied by
// the same rule with an angle of 0.  Bytes: each of the (H+2G) D columns once in, once out.

// Where pair i of head h of one token lies in q, k or v (heads counted through all three).
template <typename array>
__device__ inline array head_of(array q, array k, array v, i64 token, int h, int H, int G, int D)
{
    if (h < H) return q + (token * H + h) * D;
    if (h < H + G) return k + (token * G + h - H) * D;
    return v + (token * G + h - H - G) * D;
}

// direction 1: from the fused projection to q, k, v.  -1: gradients, back; that of a rotation is the rotation back.
template <int W, int direction, typename array, typename fused>
__device__ void rotate(array q, array k, array v, fused qkv, const wide* cos, const wide* sin, i64 tokens, int T, int N,
                       int H, int G, int D)
{
    const int half = D / 2, pairs = (H + 2 * G) * half;
    for (EACH(n, tokens * pairs / W)) {
        const i64 token = n * W / pairs;
        const int h = n * W % pairs / half, i = n * W % half, at = token % T * half + i;
        const bool turned = h < H + G;
        auto split = head_of(q, k, v, token, h, H, G, D) + i;
        auto whole = qkv + token * N + h * D + i;
        Pack<W> a = load<W>(direction > 0 ? whole : split), b = load<W>((direction > 0 ? whole : split) + half);
        for (int j = 0; turned && j < W; j++) {
            const wide c = cos[at + j], s = direction * sin[at + j], x = a.x[j], y = b.x[j];
            a.x[j] = x * c - y * s;
            b.x[j] = y * c + x * s;
        }
        real* to = (real*)(direction > 0 ? split : whole);
        store(to, a);
        store(to + half, b);
    }
}

extern "C" __global__ void rope_forward(
    const real* qkv, const wide* cos, const wide* sin, real* q, real* k, real* v, i64 tokens, int T, int N, int H,
    int G, int D)
{
    if (packed(D / 2, qkv, q, k, v) && packed(N)) rotate<PACK, 1>(q, k, v, qkv, cos, sin, tokens, T, N, H, G, D);
    else rotate<1, 1>(q, k, v, qkv, cos, sin, tokens, T, N, H, G, D);
}

extern "C" __global__ void rope_backward(
    const real* dq, const real* dk, const real* dv, const wide* cos, const wide* sin, real* dqkv, i64 tokens, int T,
    int N, int H, int G, int D)
{
    if (packed(D / 2, dq, dk, dv, dqkv) && packed(N))
        rotate<PACK, -1>(dq, dk, dv, dqkv, cos, sin, tokens, T, N, H, G, D);
    else rotate<1, -1>(dq, dk, dv, dqkv, cos, sin, tokens, T, N, H, G, D);
}

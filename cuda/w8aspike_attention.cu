// W8ASpike's attention: queries as spike counts, keys and values as int8, one unit a token and head (ops/w8aspike.py).
//
// Grid: coding: a warp takes a head of a token.  A decoding step: a block of 4 warps takes a query head, each warp every
// fourth slot of the cache, with a running softmax.  Bytes: what is coded once in and out; the cache once for each query
// head of a group, from L2 after the first.

__device__ inline int nearest(float x, float unit, int most)
{
    const float t = rint(__fdiv_rn(x, unit));
    return t != t ? 0 : t > most ? most : t < -most ? -most : (int)t;
}

// x (rows,D) -> counts, their threshold vth (rows,); the sum of |x| in the order of w8aspike.cu.
extern "C" __global__ void code_queries(
    const float* x, int16* counts, float* vth, int rows, int D, float k, float least, float most)
{
    const i64 row = warp_number();
    if (row >= rows) return;
    float sum = 0;
    for (int d = lane(); d < D; d += 32) sum = __fadd_rn(sum, fabs(x[row * D + d]));
    sum = warp_sum(sum);
    float unit = __fdiv_rn(__fdiv_rn(sum, D), k);
    unit = unit < least ? least : unit > most ? most : unit;
    if (!(sum <= 3.402823466e38f)) unit = __int_as_float(0x7fc00000);
    for (int d = lane(); d < D; d += 32) counts[row * D + d] = nearest(x[row * D + d], unit, 32767);
    if (lane() == 0) vth[row] = unit;
}

// x (rows,D) -> x8, unit = max|x| / 127.  NaN and infinity make the unit NaN.
extern "C" __global__ void code_int8(const float* x, int8* x8, float* units, int rows, int D, float tiny)
{
    const i64 row = warp_number();
    if (row >= rows) return;
    float top = 0, nothing = 0;  // 0, or NaN if a number is not finite
    for (int d = lane(); d < D; d += 32) {
        const float size = fabs(x[row * D + d]);
        top = size > top ? size : top;
        nothing += size * 0;
    }
    float unit = __fdiv_rn(lanes_max(top, 32), 127);
    unit = unit < tiny ? tiny : unit;
    if (warp_sum(nothing) != 0) unit = __int_as_float(0x7fc00000);
    for (int d = lane(); d < D; d += 32) x8[row * D + d] = nearest(x[row * D + d], unit, 127);
    if (lane() == 0) units[row] = unit;
}

constexpr int WARPS = 4, LANE_CHANNELS = 256 / 32;

// q (B,1,H,D), qv (B,1,H) over the first `count` slots of k, v (B,S,G,D), ku, vu (B,S,G) -> o (B,1,H,D).
extern "C" __global__ void attention_step_int8(
    const int16* q, const float* qv, const int8* k, const float* ku, const int8* v, const float* vu, float* o, int count,
    int S, int H, int G, int D, float scale)
{
    __shared__ float tops[WARPS], totals[WARPS], sums[WARPS][256];
    const int b = blockIdx.x / H, h = blockIdx.x % H, g = h / (H / G), warp = threadIdx.x / 32;
    const i64 head = (i64)b * H + h;
    int query[LANE_CHANNELS];
    float sum[LANE_CHANNELS], top = LOWEST, total = 0;
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++) {
        query[i] = lane() + 32 * i < D ? q[head * D + lane() + 32 * i] : 0;
        sum[i] = 0;
    }
    for (int slot = warp; slot < count; slot += WARPS) {
        const i64 unit = ((i64)b * S + slot) * G + g, at = unit * D;
        int product = 0;
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i++)
            if (lane() + 32 * i < D) product += query[i] * k[at + lane() + 32 * i];
        const float score = (float)warp_sum(product) * (qv[head] * scale * ku[unit]);
        const float highest = score > top ? score : top, shrink = exp(top - highest), p = exp(score - highest);
        top = highest;
        total = total * shrink + p;
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i++)
            if (lane() + 32 * i < D) sum[i] = sum[i] * shrink + p * vu[unit] * v[at + lane() + 32 * i];
    }
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++) sums[warp][lane() + 32 * i] = sum[i];
    if (lane() == 0) {
        tops[warp] = top;
        totals[warp] = total;
    }
    __syncthreads();
    float highest = tops[0], whole = 0;
    for (int w = 1; w < WARPS; w++) highest = tops[w] > highest ? tops[w] : highest;
    for (int w = 0; w < WARPS; w++) whole += totals[w] * exp(tops[w] - highest);
    for (int d = threadIdx.x; d < D; d += 32 * WARPS) {
        float found = 0;
        for (int w = 0; w < WARPS; w++) found += sums[w][d] * exp(tops[w] - highest);
        o[head * D + d] = found / whole;
    }
}

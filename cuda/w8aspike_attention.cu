// W8ASpike's attention: queries as spike counts, keys and values as int8, one unit a token and head (ops/w8aspike.py).
//
// Grid: coding: a warp takes a head of a token, of q, then of k, then of v.  A decoding step: a block of 16 warps takes
// a query head, each warp every 16th slot of the cache, with a running softmax.  Bytes: what is coded once in and out; the
// cache once for each query head of a group, from L2 after the first.
//
// A step that is recorded once and replayed finds the count of slots and the slot of its token in memory (counted,
// where); elsewhere these are null, and launches bring the numbers.

__device__ inline int nearest(float x, float unit, int most)
{
    const float t = rint(__fdiv_rn(x, unit));
    return t != t ? 0 : t > most ? most : t < -most ? -most : (int)t;
}

// A head of q, x (D,) -> counts, their threshold; the sum of |x| in the order of w8aspike.cu.
__device__ inline void code_query(const float* x, int16* counts, float* vth, int D, float k, float least, float most)
{
    float sum = 0;
    for (int d = lane(); d < D; d += 32) sum = __fadd_rn(sum, fabs(x[d]));
    sum = warp_sum(sum);
    float unit = __fdiv_rn(__fdiv_rn(sum, D), k);
    unit = unit < least ? least : unit > most ? most : unit;
    if (!(sum <= 3.402823466e38f)) unit = __int_as_float(0x7fc00000);
    for (int d = lane(); d < D; d += 32) counts[d] = nearest(x[d], unit, 32767);
    if (lane() == 0) *vth = unit;
}

// A head of k or v, x (D,) -> x8, unit = max|x| / 127.  NaN and infinity make the unit NaN.
__device__ inline void code_key(const float* x, int8* x8, float* its_unit, int D, float tiny)
{
    float top = 0, nothing = 0;  // 0, or NaN if a number is not finite
    for (int d = lane(); d < D; d += 32) {
        const float size = fabs(x[d]);
        top = size > top ? size : top;
        nothing += size * 0;
    }
    float unit = __fdiv_rn(lanes_max(top, 32), 127);
    unit = unit < tiny ? tiny : unit;
    if (warp_sum(nothing) != 0) unit = __int_as_float(0x7fc00000);
    for (int d = lane(); d < D; d += 32) x8[d] = nearest(x[d], unit, 127);
    if (lane() == 0) *its_unit = unit;
}

// q (queries,D) -> counts, vth (queries,); k, v (keys,D) -> k8, v8, ku, vu (keys,).
extern "C" __global__ void code_heads(
    const float* q, const float* k, const float* v, int16* counts, float* vth, int8* k8, float* ku, int8* v8, float* vu,
    i64 queries, i64 keys, int D, float spike_k, float least, float most, float tiny)
{
    i64 row = warp_number();
    if (row < queries) return code_query(q + row * D, counts + row * D, vth + row, D, spike_k, least, most);
    row -= queries;
    if (row < keys) return code_key(k + row * D, k8 + row * D, ku + row, D, tiny);
    row -= keys;
    if (row < keys) code_key(v + row * D, v8 + row * D, vu + row, D, tiny);
}

// One token's k8, v8 (B,1,G,D), ku, vu (B,1,G) to `slot` of a cache (B,S,G,D), (B,S,G).  Grid: a thread an element of k8.
extern "C" __global__ void store_token_int8(
    const int8* k8, const float* ku, const int8* v8, const float* vu, int8* keys, float* key_units, int8* values,
    float* value_units, int slot, const int* where, int B, int S, int G, int D)
{
    if (where) slot = *where;
    for (EACH(i, (i64)B * G * D)) {
        const i64 head = i / D, unit = (head / G * S + slot) * G + head % G, at = unit * D + i % D;
        keys[at] = k8[i];
        values[at] = v8[i];
        if (i % D) continue;
        key_units[unit] = ku[head];
        value_units[unit] = vu[head];
    }
}

constexpr int WARPS = 16, LANE_CHANNELS = 256 / 32;

// q (B,1,H,D), qv (B,1,H) over the first `count` slots of k, v (B,S,G,D), ku, vu (B,S,G) -> o (B,1,H,D).
extern "C" __global__ void __launch_bounds__(512) attention_step_int8(
    const int16* q, const float* qv, const int8* k, const float* ku, const int8* v, const float* vu, float* o, int count,
    const int* counted, int S, int H, int G, int D, float scale)
{
    __shared__ float tops[WARPS], totals[WARPS], sums[WARPS][256];
    const int b = blockIdx.x / H, h = blockIdx.x % H, g = h / (H / G), warp = threadIdx.x / 32;
    const i64 head = (i64)b * H + h;
    int query[LANE_CHANNELS];
    float sum[LANE_CHANNELS], top = LOWEST, total = 0;
    if (counted) count = *counted;
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++) {
        query[i] = lane() + 32 * i < D ? q[head * D + lane() + 32 * i] : 0;
        sum[i] = 0;
    }
#pragma unroll 4  // several slots are on their way at once
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

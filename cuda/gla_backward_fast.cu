// Gated linear attention backward by chunks of 64 tokens on tensor cores: gla.cu's fast twin for heads of 64 or 128
// channels, stored in bfloat16 or float16 (sm_80 and later).
//
// With b_t the sum of log_g from the chunk's start up to t, m that sum in the middle of the chunk, S the state before
// the chunk (gla_fast.cu saved it) and dS the gradient of the state after it, let
//   q'_t = q_t e^(b_t - m),   k'_s = k_s e^(m - b_s),   S' = e^m S,   dS' = e^(b_end - m) dS
//   P_ts = scale q'_t . k'_s and dP_ts = scale do_t . v_s for s <= t, else 0
// Then, dP without its diagonal in `pairs` and with it in the results,
//   dq'_t = scale S' do_t + sum over s of dP_ts k'_s              dq = e^(b - m) dq'
//   dk'_s = dS' v_s + sum over t, heads of dP_ts q'_t             dk = e^(m - b) dk'
//   dv_s  = k'_s dS' + sum over t, heads of P_ts do_t
//   dlog_g_t = sum over t' >= t of (q'.dq' - k'.dk' of pairs)     readers of the state and of pairs, less writers
//            + sum over s < t of k'_s.(dS' v_s) + sum over v of e^b_end S dS
// Pairs that do not cross a gate cancel in it, all but for the rounding of their float sums, as both products are
// formed from the same rounded factors.  A token's own term crosses no gate, and is left out.
//
// Of a wide chunk (gla_chunks.cuh), the decays of pairs are taken one by one.
//
// dS comes from gla_states_fast.cu.  Grid: x the chunk, y the state (b, g), whose R heads are added up here.  A head:
// P and dP, a barrier, the products with them; the next head is on its way from memory meanwhile.
//
// Bytes, with those for dS: q, do twice, dq once, k, v, dk, dv, S and dlog_g once, the gates twice, dS written and read
// twice: 0.59 GB for B 32 T 1024 H 12 G 4 D 64, 2.2 GB for B 1 T 32768 H 28 G 4 D 128: 0.18 and 0.65 ms at 3.35 TB/s.
// Operations, tiles above the diagonal left out: 19 and 116 GFLOP, 0.04 and 0.23 ms at 500 TFLOP/s.  Memory it is.

#include "gla_chunks.cuh"

constexpr int SCORES = CHUNK + PAD;

#if TENSOR_CORES
// One head of 64 tokens.
template <int D>
struct Head {
    real query[CHUNK][D + PAD];     // q', or q if wide
    real gradient[CHUNK][D + PAD];  // do
};

template <int D>
struct Shared : Gates<D> {
    Head<D> head[2];           // this one and the next; at last, what dlog_g sums
    real key[CHUNK][D + PAD];  // k', or k if wide
    real value[CHUNK][D + PAD];
    real state[D][D + PAD], dstate[D][D + PAD];  // S', dS'
    real P[CHUNK][SCORES], dP[CHUNK][SCORES];    // dP without its diagonal; tiles above it are never read
    float states[D];                             // sum over v of e^b_end S dS
    float own[CHUNK];                            // the diagonal of dP
};

// S' and dS' into shared memory, and their product's sums over v.
template <int D>
__device__ void place_states(Shared<D>& s, const float* S, const float* dS)
{
#pragma unroll 4
    for (int i = threadIdx.x; i < D * D / 4; i += blockDim.x) {
        const int d = i / (D / 4), e = i % (D / 4) * 4;
        const float4 x = *(const float4*)(S + 4 * i), y = *(const float4*)(dS + 4 * i);
        const float sum = lanes_sum(x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w, D / 4);
        const float before = s.before[d], after = s.after[d];
        if (e == 0) s.states[d] = exp(s.end[d]) * sum;
        *(u32*)&s.state[d][e] = pack(before * x.x, before * x.y);
        *(u32*)&s.state[d][e + 2] = pack(before * x.z, before * x.w);
        *(u32*)&s.dstate[d][e] = pack(after * y.x, after * y.y);
        *(u32*)&s.dstate[d][e + 2] = pack(after * y.z, after * y.w);
    }
}

// The ten tiles of P and of dP that are not all zero, half of the warps each; of a wide chunk only dP.
template <int D, int WARPS>
__device__ void place_scores(Shared<D>& s, Head<D>& head, float scale, bool wide)
{
    constexpr int HALF = WARPS / 2;
    const int warp = threadIdx.x / 32, row = lane() / 4, column = lane() % 4 * 2;
    const bool gradient = warp >= HALF;
    if (wide && !gradient) return;
    const real* x = gradient ? head.gradient[0] : head.query[0];
    const real* y = gradient ? s.value[0] : s.key[0];
    real* to = gradient ? s.dP[0] : s.P[0];
    for (int i = warp % HALF; i < 10; i += HALF) {
        const int ti = i < 1 ? 0 : i < 3 ? 1 : i < 6 ? 2 : 3, si = i - ti * (ti + 1) / 2;
        float tile[2][4] = {};
#pragma unroll 2
        for (int d = 0; d < D; d += 16) {
            u32 a[4], b[4];
            left<D + PAD>(a, x, 16 * ti, d);
            right_transposed<D + PAD>(b, y, d, 16 * si);
            multiply(tile[0], a, b[0], b[1]);
            multiply(tile[1], a, b[2], b[3]);
        }
        for (int j = 0; j < 2; j++)
            for (int half = 0; half < 2; half++) {
                const int t = row + 8 * half, at = column + 8 * j;
                float x[2] = {scale * tile[j][2 * half], scale * tile[j][2 * half + 1]};
                if (ti == si)
                    for (int c = 0; c < 2; c++) {
                        if (gradient && at + c == t) s.own[16 * ti + t] = x[c];
                        if (at + c > t || (gradient && at + c == t)) x[c] = 0;
                    }
                *(u32*)(to + (16 * ti + t) * SCORES + 16 * si + at) = pack(x[0], x[1]);
            }
    }
}

// P of a wide chunk, a warp a row.
template <int D, int WARPS>
__device__ void place_wide_scores(Shared<D>& s, Head<D>& head, float scale)
{
    for (int t = threadIdx.x / 32; t < CHUNK; t += WARPS)
        for (int at = 0; at < (t / 16 + 1) * 16; at++) {
            float sum = 0;
            for (int d = lane(); d < D && at <= t; d += 32)
                sum += (float)head.query[t][d] * (float)s.key[at][d] * __expf(s.gate[t][d] - s.gate[at][d]);
            sum = warp_sum(sum);
            if (lane() == 0) s.P[t][at] = scale * sum;
        }
}

// sum[0], sum[1] += over `from` <= at < to of dP[step at] x[at][d] e^(sign (b_t - b_at)), for channels d and d + 1.
template <int PITCH>
__device__ void add_wide_pairs(float* sum, const real* dP, int step, int from, int to, const real (*x)[PITCH],
                               const float (*gate)[PITCH], int t, int d, float sign)
{
    const float2 here = *(const float2*)&gate[t][d];
    float low = 0, high = 0;
#pragma unroll 1
    for (int at = from; at < to; at++) {
        const float2 there = *(const float2*)&gate[at][d], y = unpack(*(const u32*)&x[at][d]);
        const float by = dP[step * at];
        low += by * y.x * __expf(sign * (here.x - there.x));
        high += by * y.y * __expf(sign * (here.y - there.y));
    }
    sum[0] += low;
    sum[1] += high;
}

template <int D, int WARPS>
__device__ void backward(
    const real* d_o, const real* q, const real* k, const real* v, const float* log_g, const float* states,
    const float* dstates, real* dq, real* dk, real* dv, float* dlog_g, int T, int H, int G, float scale)
{
    // Warp w has tokens 16 (w % 4).. of all results, and the (w / 4)-th part of their channels.
    constexpr int PITCH = D + PAD, COLUMNS = D / (WARPS / 4), TILES = COLUMNS / 8;
    SHARED_MEMORY(memory);
    Shared<D>& s = *(Shared<D>*)memory;
    const int b = blockIdx.y / G, g = blockIdx.y % G, R = H / G, start = blockIdx.x * CHUNK, inside = T - start;
    const int warp = threadIdx.x / 32, first = warp % 4 * 16, left_column = warp / 4 * COLUMNS;
    // A thread's sums are rows row (+ 8), columns column + 8 j (+ 1).
    const int row = first + lane() / 4, column = left_column + lane() % 4 * 2;
    const i64 kv_step = (i64)G * D, kv = ((i64)b * T + start) * kv_step + g * D;
    const i64 qo_step = (i64)H * D, qo = ((i64)b * T + start) * qo_step + g * R * D;
    const i64 state = (((i64)b * gridDim.x + blockIdx.x) * G + g) * D * D;

    fetch<D>(s.key, k + kv, kv_step, inside);
    fetch<D>(s.value, v + kv, kv_step, inside);
    fetch<D>(s.head[0].query, q + qo, qo_step, inside);
    fetch<D>(s.head[0].gradient, d_o + qo, qo_step, inside);
    copies_issued();
    const bool wide = place_gates<D, WARPS>(s, log_g + kv, kv_step, inside);
    __syncthreads();
    place_states<D>(s, states + state, dstates + state);
    copies_arrived();
    if (!wide) weigh<D>(s.key, [&](int t, int c) { return writer<D>(s, wide, t, c); });

    float d_k[TILES][4] = {}, d_v[TILES][4] = {}, net[TILES][4] = {};  // net: readers less writers of pairs
    for (int r = 0; r < R; r++) {
        Head<D>&head = s.head[r % 2], &next = s.head[(r + 1) % 2];
        copies_arrived();
        if (!wide) weigh<D>(head.query, [&](int t, int c) { return *(float2*)&s.gate[t][c]; });
        __syncthreads();
        if (r + 1 < R) {
            fetch<D>(next.query, q + qo + (r + 1) * D, qo_step, inside);
            fetch<D>(next.gradient, d_o + qo + (r + 1) * D, qo_step, inside);
        }
        copies_issued();

        place_scores<D, WARPS>(s, head, scale, wide);
        if (wide) place_wide_scores<D, WARPS>(s, head, scale);
        float sums[TILES][4] = {};
#pragma unroll 2
        for (int e = 0; e < D; e += 16) {
            u32 gradient[4];
            left<PITCH>(gradient, head.gradient[0], first, e);
            add_transposed_products<PITCH>(sums, gradient, s.state[0], e, left_column);
        }
        for (int j = 0; j < TILES; j++)
            for (int c = 0; c < 4; c++) {
                sums[j][c] *= scale;
                if (wide) sums[j][c] *= __expf(s.gate[row + c / 2 * 8][column + 8 * j + c % 2]);
            }
        __syncthreads();

        // dq, from pairs with earlier tokens
        if (wide) {
            for (int j = 0; j < TILES; j++)
                for (int t = row; t <= row + 8; t += 8)
                    add_wide_pairs(&sums[j][(t - row) / 4], s.dP[t], 1, 0, t, s.key, s.gate, t, column + 8 * j, 1);
        } else
#pragma unroll 2
            for (int at = 0; at <= first; at += 16) {
                u32 scores[4];
                left<SCORES>(scores, s.dP[0], first, at);
                add_products<PITCH>(sums, scores, s.key[0], at, left_column);
            }
        for (int half = 0; half < 2; half++) {
            const int t = row + 8 * half;
            const float own = s.own[t];
            for (int j = 0; j < TILES; j++) {
                const int d = column + 8 * j;
                const float2 query = unpack(*(u32*)&head.query[t][d]), key = unpack(*(u32*)&s.key[t][d]);
                const float2 by = wide ? make_float2(1, 1) : *(float2*)&s.gate[t][d];
                const float low = sums[j][2 * half], high = sums[j][2 * half + 1];
                net[j][2 * half] += query.x * low;
                net[j][2 * half + 1] += query.y * high;
                if (t < inside)
                    *(u32*)(dq + qo + t * qo_step + r * D + d) =
                        pack(by.x * (low + own * key.x), by.y * (high + own * key.y));
                sums[j][2 * half] = sums[j][2 * half + 1] = 0;
            }
        }

        // dk and dv, from pairs with later tokens
        if (wide)
            for (int j = 0; j < TILES; j++)
                for (int t = row; t <= row + 8; t += 8)
                    add_wide_pairs(&sums[j][(t - row) / 4], &s.dP[0][t], SCORES, t + 1, CHUNK, head.query, s.gate, t,
                                   column + 8 * j, -1);
#pragma unroll 2
        for (int at = first; at < CHUNK; at += 16) {
            u32 scores[4];
            left_transposed<SCORES>(scores, s.P[0], first, at);
            add_products<PITCH>(d_v, scores, head.gradient[0], at, left_column);
            if (wide) continue;
            left_transposed<SCORES>(scores, s.dP[0], first, at);
            add_products<PITCH>(sums, scores, head.query[0], at, left_column);
        }
        for (int half = 0; half < 2; half++) {
            const int t = row + 8 * half;
            const float own = s.own[t];
            for (int j = 0; j < TILES; j++) {
                const int d = column + 8 * j;
                const float2 query = unpack(*(u32*)&head.query[t][d]), key = unpack(*(u32*)&s.key[t][d]);
                const float low = sums[j][2 * half], high = sums[j][2 * half + 1];
                net[j][2 * half] -= key.x * low;
                net[j][2 * half + 1] -= key.y * high;
                d_k[j][2 * half] += low + own * query.x;
                d_k[j][2 * half + 1] += high + own * query.y;
            }
        }
    }
    __syncthreads();

    // Through the state after the chunk.
    if (wide) {
        weigh<D>(s.key, [&](int t, int c) { return writer<D>(s, wide, t, c); });
        __syncthreads();
    }
    float sums[TILES][4] = {};
    for (int d = 0; d < D; d += 16) {
        u32 value[4], key[4];
        left<PITCH>(value, s.value[0], first, d);
        left<PITCH>(key, s.key[0], first, d);
        add_transposed_products<PITCH>(sums, value, s.dstate[0], d, left_column);
        add_products<PITCH>(d_v, key, s.dstate[0], d, left_column);
    }
    float(*readers)[PITCH] = (float(*)[PITCH])s.head, (*writers)[PITCH] = readers + CHUNK;
    for (int half = 0; half < 2; half++) {
        const int t = row + 8 * half;
        for (int j = 0; j < TILES; j++) {
            const int d = column + 8 * j;
            const float2 by = writer<D>(s, wide, t, d);
            float2 key = unpack(*(u32*)&s.key[t][d]);
            if (wide && t < inside) {  // k' of the last tokens counts, however small
                key = unpack(*(const u32*)(k + kv + t * kv_step + d));
                key = make_float2(key.x * by.x, key.y * by.y);
            }
            const float low = sums[j][2 * half], high = sums[j][2 * half + 1];
            float2 d_key = make_float2(d_k[j][2 * half], d_k[j][2 * half + 1]);  // of k if wide, else of k'
            d_key = wide ? make_float2(d_key.x + by.x * low, d_key.y + by.y * high)
                         : make_float2(by.x * (d_key.x + low), by.y * (d_key.y + high));
            *(float2*)&readers[t][d] = make_float2(net[j][2 * half], net[j][2 * half + 1]);
            *(float2*)&writers[t][d] = make_float2(key.x * low, key.y * high);
            if (t < inside) {
                *(u32*)(dk + kv + t * kv_step + d) = pack(d_key.x, d_key.y);
                *(u32*)(dv + kv + t * kv_step + d) = pack(d_v[j][2 * half], d_v[j][2 * half + 1]);
            }
        }
    }
    __syncthreads();
    float sum = 0;
    if (threadIdx.x < D)  // over t' >= t
#pragma unroll 16
        for (int t = CHUNK - 1; t >= 0; t--) readers[t][threadIdx.x] = sum += readers[t][threadIdx.x];
    else if (threadIdx.x < 2 * D)  // over s < t
#pragma unroll 16
        for (int t = 0; t < CHUNK; t++) {
            const float here = writers[t][threadIdx.x - D];
            writers[t][threadIdx.x - D] = sum;
            sum += here;
        }
    __syncthreads();
    for (int i = threadIdx.x; i < CHUNK * D; i += blockDim.x) {
        const int t = i / D, d = i % D;
        if (t < inside) dlog_g[kv + t * kv_step + d] = readers[t][d] + writers[t][d] + s.states[d];
    }
}
#endif

// D 64: 8 warps, two blocks a multiprocessor.  D 128: 16 warps, one block (8 warps took a tenth longer).
extern "C" __global__ void __launch_bounds__(256) gla_fast_backward_64(
    const real* d_o, const real* q, const real* k, const real* v, const wide* log_g, const wide* states,
    const wide* dstates, real* dq, real* dk, real* dv, wide* dlog_g, int T, int H, int G, wide scale)
{
#if TENSOR_CORES
    backward<64, 8>(d_o, q, k, v, log_g, states, dstates, dq, dk, dv, dlog_g, T, H, G, scale);
#endif
}

extern "C" __global__ void __launch_bounds__(512) gla_fast_backward_128(
    const real* d_o, const real* q, const real* k, const real* v, const wide* log_g, const wide* states,
    const wide* dstates, real* dq, real* dk, real* dv, wide* dlog_g, int T, int H, int G, wide scale)
{
#if TENSOR_CORES
    backward<128, 16>(d_o, q, k, v, log_g, states, dstates, dq, dk, dv, dlog_g, T, H, G, scale);
#endif
}

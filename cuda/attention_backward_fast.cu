// The gradient of attention_fast.cu, on tensor cores too (the same heads, types and GPUs).
//
// A warp holds 16 M rows, queries (dq) or keys (dk, dv), and walks the other side in chunks:
//   p = 2^(c s - lse2),  ds = p (do v^T - delta),  delta = sum over D of do o,  lse2 = lse log2(e),  c = scale log2(e)
//   dq = scale ds k,   dk = scale ds^T q,   dv = p^T do
// Keys are the rows of s where dk and dv are summed, queries where dq is: so p and ds never pass through shared memory.
// A gradient is written by one warp, in one order: nothing is added across warps, equal inputs give equal bits.
//
// Shapes: q, o (B,T,H,D); k, v (B,S,G,D), S >= T; lse (B,T,H); lse2, delta (B,H,P), P is T rounded up to STAGE.
// Grid of dq: as attention_fast.cu's.  Of dk, dv: x a tile of keys, y (b, g); the group's heads one by one.
// The next STAGE rows of the other side are on their way while these are computed.
//
// Operations: 14 D for each visible pair of query and key (s and do v^T are computed twice).
// Bytes from memory: q, do twice, the rest once.  From L2: the other side's rows once a block.

#include "attention_fast.cuh"

constexpr float LOG2E = 1.44269504f;

#if TENSOR_CORES
// What belongs to the queries of a Stage.
struct Statistics {
    float lse2[STAGE], delta[STAGE];
};

// Sixteen M rows with both sides of a stage's rows from `chunk` on: s = a x^T, dp = b y^T.
template <int D, int M, int TILES>
__device__ __forceinline__ void both_products(float (&s)[M][TILES][4], float (&dp)[M][TILES][4],
                                              const u32 (&a)[M][D / 16][4], const u32 (&b)[M][D / 16][4],
                                              const Stage<D>& stage, int chunk)
{
    constexpr int PITCH = D + PAD;
#pragma unroll
    for (int d = 0; d < D; d += 16)
#pragma unroll
        for (int j = 0; j < TILES; j += 2) {
            u32 x[4], y[4];
            right_transposed<PITCH>(x, stage.x[0], d, chunk + 8 * j);
            right_transposed<PITCH>(y, stage.y[0], d, chunk + 8 * j);
#pragma unroll
            for (int m = 0; m < M; m++) {
                multiply(s[m][j], a[m][d / 16], x[0], x[1]);
                multiply(s[m][j + 1], a[m][d / 16], x[2], x[3]);
                multiply(dp[m][j], b[m][d / 16], y[0], y[1]);
                multiply(dp[m][j + 1], b[m][d / 16], y[2], y[3]);
            }
        }
}

// dq; also lse2 and delta, for the other kernel.
template <int D, int M, int CHUNK>
__device__ __forceinline__ void backward_q(const real* d_o, const real* q, const real* k, const real* v, const real* o,
                                           const float* lse, real* dq, float* lse2, float* delta, int T, int S, int H,
                                           int G, int window, float scale, int tiles)
{
    constexpr int PITCH = D + PAD, ROWS = 16 * M;
    SHARED_MEMORY(memory);
    Stage<D>* stage = (Stage<D>*)memory;
    const int row = lane() / 4, column = lane() % 4 * 2, padded = (T + STAGE - 1) / STAGE * STAGE;
    Walk w(ROWS, tiles, T, S, H, G, window);
    const int stride = H * D;
    fetch<D>(stage[w.key / STAGE % 2], k + (i64)w.from * D, v + (i64)w.from * D, G * D, w.key, S);
    copies_issued();

    u32 query[M][D / 16][4], upstream[M][D / 16][4];
    float shift[M][2], minus[M][2];  // lse2 and delta
#pragma unroll
    for (int m = 0; m < M; m++) {
        const int inside = S - w.position - 16 * m;
        const i64 from = (i64)w.at * D + 16 * m * stride;
        left_from_memory<D>(query[m], q + from, stride, inside);
        left_from_memory<D>(upstream[m], d_o + from, stride, inside);
        float sum[2] = {};
#pragma unroll
        for (int d = 0; d < D / 16; d++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int r = row + i % 2 * 8;
                if (r >= inside) continue;
                const float2 x = unpack(upstream[m][d][i]);
                const float2 y = unpack(*(const u32*)(o + from + r * stride + 16 * d + column + i / 2 * 8));
                sum[i % 2] += x.x * y.x + x.y * y.y;
            }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = row + 8 * half, t = T - inside + r;
            minus[m][half] = lanes_sum(sum[half], 4);
            shift[m][half] = r < inside ? LOG2E * lse[w.at + (16 * m + r) * H] : 0;
            if (lane() % 4 == 0 && t < padded) {
                lse2[(i64)w.head * padded + t] = shift[m][half];
                delta[(i64)w.head * padded + t] = minus[m][half];
            }
        }
    }

    const float c = scale * LOG2E;
    float out[M][D / 8][4] = {};
    for (; w.key < w.end; w.key += STAGE) {
        const int n = w.key / STAGE % 2;
        copies_arrived();
        __syncthreads();
        if (w.key + STAGE < w.end) {
            const i64 from = (i64)anew(w.from) * D;
            fetch<D>(stage[n ^ 1], k + from, v + from, G * D, w.key + STAGE, S);
        }
        copies_issued();
#pragma unroll
        for (int chunk = 0; chunk < STAGE; chunk += CHUNK) {
            const int key = w.key + chunk;
            if (none_visible(key, CHUNK, w.position, ROWS, window)) continue;
            float s[M][CHUNK / 8][4] = {}, dp[M][CHUNK / 8][4] = {};
            both_products<D>(s, dp, query, upstream, stage[n], chunk);
            if (!all_visible(key, CHUNK, w.position, ROWS, window))
#pragma unroll
                for (int m = 0; m < M; m++)
                    hide<true>(s[m], w.position + 16 * m - key, window);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int j = 0; j < CHUNK / 8; j++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        s[m][j][i] = power_of_two(c * s[m][j][i] - shift[m][i / 2]) * (dp[m][j][i] - minus[m][i / 2]);
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j += 2) {
                u32 ds[M][4];
#pragma unroll
                for (int m = 0; m < M; m++) as_left(ds[m], s[m][j], s[m][j + 1]);
#pragma unroll
                for (int e = 0; e < D / 8; e += 2) {
                    u32 x[4];
                    right<PITCH>(x, stage[n].x[0], chunk + 8 * j, 8 * e);
#pragma unroll
                    for (int m = 0; m < M; m++) {
                        multiply(out[m][e], ds[m], x[0], x[1]);
                        multiply(out[m][e + 1], ds[m], x[2], x[3]);
                    }
                }
            }
        }
    }
    const Walk to(ROWS, anew(tiles), T, S, H, G, window);
#pragma unroll
    for (int m = 0; m < M; m++)
        store<D>(dq + (i64)to.at * D + 16 * m * stride, stride, S - to.position - 16 * m, out[m],
                 make_float2(scale, scale));
}

template <int D, int M, int CHUNK>
__device__ __forceinline__ void backward_kv(const real* d_o, const real* q, const real* k, const real* v,
                                            const float* lse2, const float* delta, real* dk, real* dv, int T, int S,
                                            int H, int G, int window, float scale)
{
    constexpr int PITCH = D + PAD, ROWS = 16 * M;
    SHARED_MEMORY(memory);
    Stage<D>* stage = (Stage<D>*)memory;
    Statistics* statistics = (Statistics*)(stage + 2);
    const int row = lane() / 4, column = lane() % 4 * 2, padded = (T + STAGE - 1) / STAGE * STAGE, past = S - T;
    const int R = H / G, b = blockIdx.y / G, g = blockIdx.y % G;
    const int of_block = blockDim.x / 32 * ROWS, block = blockIdx.x * of_block, first = block + threadIdx.x / 32 * ROWS;
    const int stride = H * D, key_stride = G * D;
    i64 at = (((i64)b * S + first) * G + g) * D;
    // Queries at positions block .. block + of_block - 1 + window - 1 may see a key of this block.
    const int begin = block > past ? (block - past) / STAGE * STAGE : 0;
    const int reach = block + of_block - 1 + window - past, end = reach < T ? reach : T;

    auto bring = [&](int n, int head, int query0) {
        const int text = anew(b);
        const i64 from = ((i64)text * T * H + head) * D, row_from = ((i64)text * H + head) * padded + query0;
        fetch<D>(stage[n], q + from, d_o + from, stride, query0, T);
        for (int i = threadIdx.x; i < STAGE / 4; i += blockDim.x) {
            copy_async(&statistics[n].lse2[4 * i], lse2 + row_from + 4 * i, true);
            copy_async(&statistics[n].delta[4 * i], delta + row_from + 4 * i, true);
        }
    };
    int head = begin < end ? g * R : (g + 1) * R, query0 = begin, n = 0;  // without a query in reach there is nothing
    if (begin < end) bring(0, head, query0);
    copies_issued();

    u32 key[M][D / 16][4], value[M][D / 16][4];
#pragma unroll
    for (int m = 0; m < M; m++) {
        left_from_memory<D>(key[m], k + at + 16 * m * key_stride, key_stride, S - first - 16 * m);
        left_from_memory<D>(value[m], v + at + 16 * m * key_stride, key_stride, S - first - 16 * m);
    }
    const float c = scale * LOG2E;
    float of_key[M][D / 8][4] = {}, of_value[M][D / 8][4] = {};
    for (; head < (g + 1) * R; n ^= 1) {
        copies_arrived();
        __syncthreads();
        const int now = query0;
        query0 += STAGE;
        if (query0 >= end) {
            query0 = begin;
            head++;
        }
        if (head < (g + 1) * R) bring(n ^ 1, head, query0);
        copies_issued();
#pragma unroll
        for (int chunk = 0; chunk < STAGE; chunk += CHUNK) {
            const int position = past + now + chunk;
            if (none_visible(first, ROWS, position, CHUNK, window)) continue;
            float s[M][CHUNK / 8][4] = {}, dp[M][CHUNK / 8][4] = {};
            both_products<D>(s, dp, key, value, stage[n], chunk);
            if (!all_visible(first, ROWS, position, CHUNK, window))
#pragma unroll
                for (int m = 0; m < M; m++)
                    hide<false>(s[m], position - first - 16 * m, window);
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j++) {
                const float2 shift = *(float2*)&statistics[n].lse2[chunk + 8 * j + column];
                const float2 minus = *(float2*)&statistics[n].delta[chunk + 8 * j + column];
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        s[m][j][i] = power_of_two(c * s[m][j][i] - (i % 2 ? shift.y : shift.x));
                        dp[m][j][i] = s[m][j][i] * (dp[m][j][i] - (i % 2 ? minus.y : minus.x));
                    }
            }
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j += 2) {
                u32 p[M][4], ds[M][4];
#pragma unroll
                for (int m = 0; m < M; m++) {
                    as_left(p[m], s[m][j], s[m][j + 1]);
                    as_left(ds[m], dp[m][j], dp[m][j + 1]);
                }
#pragma unroll
                for (int e = 0; e < D / 8; e += 2) {
                    u32 x[4], y[4];
                    right<PITCH>(x, stage[n].x[0], chunk + 8 * j, 8 * e);
                    right<PITCH>(y, stage[n].y[0], chunk + 8 * j, 8 * e);
#pragma unroll
                    for (int m = 0; m < M; m++) {
                        multiply(of_key[m][e], ds[m], x[0], x[1]);
                        multiply(of_key[m][e + 1], ds[m], x[2], x[3]);
                        multiply(of_value[m][e], p[m], y[0], y[1]);
                        multiply(of_value[m][e + 1], p[m], y[2], y[3]);
                    }
                }
            }
        }
    }
    const int y = anew(blockIdx.y);
    at = (((i64)(y / G) * S + first) * G + y % G) * D;
#pragma unroll
    for (int m = 0; m < M; m++) {
        store<D>(dk + at + 16 * m * key_stride, key_stride, S - first - 16 * m, of_key[m], make_float2(scale, scale));
        store<D>(dv + at + 16 * m * key_stride, key_stride, S - first - 16 * m, of_value[m], make_float2(1, 1));
    }
}
#endif

// The bounds below are how many threads' registers fit twice or thrice, not how many threads there are.
extern "C" __global__ void __launch_bounds__(512) attention_fast_backward_q_64(
    const real* d_o, const real* q, const real* k, const real* v, const real* o, const wide* lse, real* dq, wide* lse2,
    wide* delta, int T, int S, int H, int G, int window, wide scale, int tiles)
{
#if TENSOR_CORES
    backward_q<64, 1, 32>(d_o, q, k, v, o, lse, dq, lse2, delta, T, S, H, G, window, scale, tiles);
#endif
}

extern "C" __global__ void __launch_bounds__(256) attention_fast_backward_q_128(
    const real* d_o, const real* q, const real* k, const real* v, const real* o, const wide* lse, real* dq, wide* lse2,
    wide* delta, int T, int S, int H, int G, int window, wide scale, int tiles)
{
#if TENSOR_CORES
    backward_q<128, 1, 32>(d_o, q, k, v, o, lse, dq, lse2, delta, T, S, H, G, window, scale, tiles);
#endif
}

extern "C" __global__ void __launch_bounds__(384) attention_fast_backward_kv_64(
    const real* d_o, const real* q, const real* k, const real* v, const wide* lse2, const wide* delta, real* dk,
    real* dv, int T, int S, int H, int G, int window, wide scale)
{
#if TENSOR_CORES
    backward_kv<64, 1, 32>(d_o, q, k, v, lse2, delta, dk, dv, T, S, H, G, window, scale);
#endif
}

extern "C" __global__ void __launch_bounds__(256) attention_fast_backward_kv_128(
    const real* d_o, const real* q, const real* k, const real* v, const wide* lse2, const wide* delta, real* dk,
    real* dv, int T, int S, int H, int G, int window, wide scale)
{
#if TENSOR_CORES
    backward_kv<128, 1, 16>(d_o, q, k, v, lse2, delta, dk, dv, T, S, H, G, window, scale);
#endif
}

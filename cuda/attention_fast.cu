// Softmax attention through a sliding window on tensor cores: attention.cu's fast twin for heads of 64 or 128
// channels, stored in bfloat16 or float16 (sm_80 and later); attention_backward_fast.cu is its gradient.
//
// A warp holds 16 M queries and walks the keys in chunks:
//   s = q k^T,  p = 2^(c s - top),  o = p v / sum of p             c = scale log2(e)
// A product leaves its result in the registers where the next one wants its first operand, so p never passes through
// shared memory.
//
// Shapes: q, o (B,T,H,D); k, v (B,S,G,D), S >= T; lse (B,T,H).
// Grid: x a tile of queries, y (b, some heads of a group): `tiles` warps a head, so that all heads of a block use what
// was brought of the keys.  The next STAGE keys and values are on their way while these are computed.
//
// Operations: 4 D for each visible pair of query and key.
// Bytes from memory: q, k, v, o once.  From L2: keys and values once a block, e.g. at W 256, 64 queries of 3 heads:
// 5 stages for 192 rows, 430 bytes a row at D 64.

#include "attention_fast.cuh"

constexpr float SLACK = 8;  // the softmax's shift follows the maximum when that has grown by more than 2^8
constexpr float LN2 = 0.693147181f;

#if TENSOR_CORES
// c = scale log2(e).  HELD: the queries stay in registers, else in shared memory behind the stages.
template <int D, int M, int CHUNK, bool HELD>
__device__ __forceinline__ void forward(const real* q, const real* k, const real* v, real* o, float* lse, int T, int S,
                                        int H, int G, int window, float c, int tiles)
{
    constexpr int PITCH = D + PAD, ROWS = 16 * M;
    SHARED_MEMORY(memory);
    Stage<D>* stage = (Stage<D>*)memory;
    Walk w(ROWS, tiles, T, S, H, G, window);
    const int stride = H * D;
    real (*own)[PITCH] = (real(*)[PITCH])(stage + 2) + threadIdx.x / 32 * ROWS;

    fetch<D>(stage[w.key / STAGE % 2], k + (i64)w.from * D, v + (i64)w.from * D, G * D, w.key, S);
    u32 held[HELD ? M : 1][D / 16][4];
    if constexpr (HELD)
        for (int m = 0; m < M; m++)
            left_from_memory<D>(held[m], q + (i64)w.at * D + 16 * m * stride, stride, S - w.position - 16 * m);
    else
        for (int i = lane(); i < ROWS * D / 8; i += 32) {
            const int r = i / (D / 8), c = i % (D / 8) * 8;
            copy_async(&own[r][c], r < S - w.position ? q + (i64)w.at * D + r * stride + c : q, r < S - w.position);
        }
    copies_issued();

    float out[M][D / 8][4] = {}, top[M][2], total[M][2] = {};
    for (int m = 0; m < M; m++) top[m][0] = top[m][1] = LOWEST / 8;  // finite, as -inf - -inf is no number
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
            float s[M][CHUNK / 8][4] = {};
#pragma unroll
            for (int d = 0; d < D; d += 16) {
                u32 query[M][4];
#pragma unroll
                for (int m = 0; m < M; m++)
                    if constexpr (HELD)
                        for (int i = 0; i < 4; i++) query[m][i] = held[m][d / 16][i];
                    else
                        left<PITCH>(query[m], own[0], 16 * m, d);
#pragma unroll
                for (int j = 0; j < CHUNK / 8; j += 2) {
                    u32 other[4];
                    right_transposed<PITCH>(other, stage[n].x[0], d, chunk + 8 * j);
#pragma unroll
                    for (int m = 0; m < M; m++) {
                        multiply(s[m][j], query[m], other[0], other[1]);
                        multiply(s[m][j + 1], query[m], other[2], other[3]);
                    }
                }
            }
            if (!all_visible(key, CHUNK, w.position, ROWS, window))
#pragma unroll
                for (int m = 0; m < M; m++)
                    hide<true>(s[m], w.position + 16 * m - key, window);

            // Where a row's maximum has grown too far above what is subtracted, that follows, and old sums shrink.
            float highest[M][2];
            bool grown = false;
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float& x = highest[m][half];
                    x = s[m][0][2 * half];
#pragma unroll
                    for (int j = 0; j < CHUNK / 8; j++) x = fmaxf(x, fmaxf(s[m][j][2 * half], s[m][j][2 * half + 1]));
                    grown |= c * x > top[m][half] + SLACK;
                }
            if (__ballot_sync(FULL_WARP, grown))
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const float now = fmaxf(c * lanes_max(highest[m][half], 4), top[m][half]);
                        const float shrink = power_of_two(top[m][half] - now);
                        top[m][half] = now;
                        total[m][half] *= shrink;
#pragma unroll
                        for (int e = 0; e < D / 8; e++) {
                            out[m][e][2 * half] *= shrink;
                            out[m][e][2 * half + 1] *= shrink;
                        }
                    }
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int j = 0; j < CHUNK / 8; j++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        s[m][j][i] = power_of_two(c * s[m][j][i] - top[m][i / 2]);
                        total[m][i / 2] += s[m][j][i];
                    }
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j += 2) {
                u32 p[M][4];
#pragma unroll
                for (int m = 0; m < M; m++) as_left(p[m], s[m][j], s[m][j + 1]);
#pragma unroll
                for (int e = 0; e < D / 8; e += 2) {
                    u32 other[4];
                    right<PITCH>(other, stage[n].y[0], chunk + 8 * j, 8 * e);
#pragma unroll
                    for (int m = 0; m < M; m++) {
                        multiply(out[m][e], p[m], other[0], other[1]);
                        multiply(out[m][e + 1], p[m], other[2], other[3]);
                    }
                }
            }
        }
    }
    const Walk to(ROWS, anew(tiles), T, S, H, G, window);
    const int row = lane() / 4;
#pragma unroll
    for (int m = 0; m < M; m++) {
        const int inside = S - to.position - 16 * m;
        const float2 sum = make_float2(lanes_sum(total[m][0], 4), lanes_sum(total[m][1], 4));
        store<D>(o + (i64)to.at * D + 16 * m * stride, stride, inside, out[m], make_float2(1 / sum.x, 1 / sum.y));
        float* of_row = lse + to.at + (16 * m + row) * H;
        if (lane() % 4 == 0 && row < inside) of_row[0] = LN2 * top[m][0] + log(sum.x);
        if (lane() % 4 == 0 && row + 8 < inside) of_row[8 * H] = LN2 * top[m][1] + log(sum.y);
    }
}
#endif

// The bounds below are how many threads' registers fit twice or thrice, not how many threads there are.
extern "C" __global__ void __launch_bounds__(384) attention_fast_forward_64(
    const real* q, const real* k, const real* v, real* o, wide* lse, int T, int S, int H, int G, int window, wide c,
    int tiles)
{
#if TENSOR_CORES
    forward<64, 2, 32, true>(q, k, v, o, lse, T, S, H, G, window, c, tiles);
#endif
}

extern "C" __global__ void __launch_bounds__(256) attention_fast_forward_128(
    const real* q, const real* k, const real* v, real* o, wide* lse, int T, int S, int H, int G, int window, wide c,
    int tiles)
{
#if TENSOR_CORES
    forward<128, 2, 64, false>(q, k, v, o, lse, T, S, H, G, window, c, tiles);
#endif
}

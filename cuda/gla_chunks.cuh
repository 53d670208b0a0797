// What the kernels of linear attention share that take a chunk of 64 tokens on tensor cores: rows on their way into
// shared memory, the chunk's gates, products of tiles.  gla_*_fast.cu include it.
//
// With b_t the sum of log_g from the chunk's start up to t, and m that sum in the middle of the chunk, a reader is
// multiplied by e^(b_t - m) and a writer by e^(m - b_s), so that one matrix product has all decays from s to t.  An
// exponent can be positive, but spans half a chunk at most; a chunk where that would exceed SPAN is called wide.
// There readers have e^b_t and writers e^(b_end - b_s), which is for the states before and after the chunk, and
// the decays between two tokens are taken one by one.
#pragma once

constexpr int CHUNK = 64;          // tokens
constexpr float STRONGEST = -100;  // a stronger gate leaves as little; sums of 64 such stay exact to 5e-4
#ifdef REAL_float16
constexpr float SPAN = 8;  // e^8 times an activation of 20 is still a float16
#else
constexpr float SPAN = 40;
#endif

#if TENSOR_CORES
// Rows of D come into shared memory 16 bytes at a time, those not inside the text as zeros.  `many` threads share
// them, this one is `me`.
template <int D, int ROWS = CHUNK>
__device__ void fetch(real (*to)[D + PAD], const real* from, i64 step, int inside, int me, int many)
{
    for (int i = me; i < ROWS * D / 8; i += many) {
        const int t = i / (D / 8), c = i % (D / 8) * 8;
        copy_async(&to[t][c], from + (t < inside ? t : 0) * step + c, t < inside);
    }
}

// x *= factor(t, c), for channels c and c + 1; each thread what it fetched itself, so that no barrier is between.
template <int D, int ROWS = CHUNK, typename Factor>
__device__ void weigh(real (*x)[D + PAD], Factor factor, int me, int many)
{
    for (int i = me; i < ROWS * D / 8; i += many) {
        const int t = i / (D / 8), c = i % (D / 8) * 8;
        float4& eight = *(float4*)&x[t][c];
        const float old[4] = {eight.x, eight.y, eight.z, eight.w};
        float fresh[4];
#pragma unroll
        for (int p = 0; p < 4; p++) {
            const float2 pair = unpack(__float_as_uint(old[p])), by = factor(t, c + 2 * p);
            fresh[p] = __uint_as_float(pack(pair.x * by.x, pair.y * by.y));
        }
        eight = make_float4(fresh[0], fresh[1], fresh[2], fresh[3]);
    }
}

// By all threads of the block.
template <int D>
__device__ void fetch(real (*to)[D + PAD], const real* from, i64 step, int inside)
{
    fetch<D>(to, from, step, inside, threadIdx.x, blockDim.x);
}

template <int D, typename Factor>
__device__ void weigh(real (*x)[D + PAD], Factor factor)
{
    weigh<D>(x, factor, threadIdx.x, blockDim.x);
}

// A thread's share of the gates: channel threadIdx.x % D, COUNT tokens from `first`.
template <int COUNT>
__device__ void read_gates(float (&gate)[COUNT], const float* log_g, i64 step, int first, int inside)
{
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const float x = first + i < inside ? log_g[(first + i) * step] : 0;
        gate[i] = x < STRONGEST ? STRONGEST : x;  // NaN stays
    }
}

// --- the gates of a chunk -----------------------------------------------------------------------------

template <int D>
struct Gates {
    float gate[CHUNK][D + PAD];           // e^(b_t - m), or b_t if wide
    float total[4][D];                    // sums of log_g over neighbouring tokens
    float before[D], after[D], end[D];    // e^m, e^(b_end - m), or 1 and 1 if wide; b_end
};

// Fills gate, before, after and end; -> whether the chunk is wide.  No barrier after the last write.
template <int D, int WARPS>
__device__ bool place_gates(Gates<D>& s, const float* log_g, i64 step, int inside)
{
    constexpr int PARTS = 32 * WARPS / D, COUNT = CHUNK / PARTS;
    const int d = threadIdx.x % D, part = threadIdx.x / D;
    float gate[COUNT], sum = 0, middle = 0, rest = 0;
    read_gates(gate, log_g + d, step, part * COUNT, inside);
    for (int i = 0; i < COUNT; i++) sum += gate[i];
    s.total[part][d] = sum;
    __syncthreads();
    for (int p = 0; p < PARTS / 2; p++) {
        middle += s.total[p][d];
        rest += s.total[p + PARTS / 2][d];
    }
    const bool wide = __syncthreads_or(!(middle > -SPAN && rest > -SPAN));  // NaN is wide
    sum = 0;  // b_t, less m if not wide, of the token before the thread's first
    for (int p = wide ? 0 : PARTS / 2; p < part; p++) sum += s.total[p][d];
    for (int p = part; p < PARTS / 2 && !wide; p++) sum -= s.total[p][d];
    for (int i = 0; i < COUNT; i++) {
        sum += gate[i];
        s.gate[part * COUNT + i][d] = wide ? sum : __expf(sum);
    }
    if (part == 0) {
        s.before[d] = wide ? 1 : __expf(middle);
        s.after[d] = wide ? 1 : __expf(rest);
        s.end[d] = middle + rest;
    }
    return wide;
}

// What the keys of token t, channels d and d + 1, are multiplied by: e^(m - b_t), or e^(b_end - b_t) if wide.
template <int D>
__device__ float2 writer(const Gates<D>& s, bool wide, int t, int d)
{
    const float2 gate = *(const float2*)&s.gate[t][d], end = *(const float2*)&s.end[d];
    return wide ? make_float2(__expf(end.x - gate.x), __expf(end.y - gate.y)) : make_float2(1 / gate.x, 1 / gate.y);
}

// --- products ---------------------------------------------------------------------------------------------

// sums (16 x COLUMNS) += a (16 x 16) b (16 x COLUMNS), b stored by rows
template <int PITCH, int TILES>
__device__ inline void add_products(float (&sums)[TILES][4], const u32 (&a)[4], const real* b, int k, int n)
{
    for (int j = 0; j < TILES; j += 2) {
        u32 two[4];
        right<PITCH>(two, b, k, n + 8 * j);
        multiply(sums[j], a, two[0], two[1]);
        multiply(sums[j + 1], a, two[2], two[3]);
    }
}

// The same, b stored by columns.
template <int PITCH, int TILES>
__device__ inline void add_transposed_products(float (&sums)[TILES][4], const u32 (&a)[4], const real* b, int k, int n)
{
    for (int j = 0; j < TILES; j += 2) {
        u32 two[4];
        right_transposed<PITCH>(two, b, k, n + 8 * j);
        multiply(sums[j], a, two[0], two[1]);
        multiply(sums[j + 1], a, two[2], two[3]);
    }
}

// --- what 16 tokens from `own` on read of their chunk -----------------------------------------------------------

// scores += a (16 x 16) of the queries times the keys from channel d on; later keys are not seen.
template <int PITCH>
__device__ inline void add_scores(float (&scores)[8][4], const u32 (&a)[4], const real* key, int d, int own)
{
    for (int j = 0; j < 4; j++)
        if (16 * j <= own) {
            u32 two[4];
            right_transposed<PITCH>(two, key, d, 16 * j);
            multiply(scores[2 * j], a, two[0], two[1]);
            multiply(scores[2 * j + 1], a, two[2], two[3]);
        }
}

// sums += scores times the values, once the scores with later keys are zeros.
template <int PITCH, int TILES>
__device__ inline void add_seen(float (&sums)[TILES][4], float (&scores)[8][4], const real* value, int own)
{
    const int row = lane() / 4, column = lane() % 4 * 2;
    for (int j = 0; j < 4; j++)
        if (16 * j <= own) {
            float(&low)[4] = scores[2 * j], (&high)[4] = scores[2 * j + 1];
            if (16 * j == own)
                for (int c = 0; c < 4; c++) {
                    const int t = row + c / 2 * 8, at = column + c % 2;
                    if (at > t) low[c] = 0;
                    if (at + 8 > t) high[c] = 0;
                }
            u32 score[4];
            as_left(score, low, high);
            add_products<PITCH>(sums, score, value, 16 * j, 0);
        }
}

// scale times the sums go to the tokens' rows of o, `step` numbers apart.
template <int TILES>
__device__ inline void store_tokens(real* o, i64 step, const float (&sums)[TILES][4], int own, int inside, float scale)
{
    for (int half = 0; half < 2; half++) {
        const int t = own + lane() / 4 + 8 * half;
        if (t < inside)
            for (int j = 0; j < TILES; j++)
                *(u32*)(o + t * step + 8 * j + lane() % 4 * 2) =
                    pack(scale * sums[j][2 * half], scale * sums[j][2 * half + 1]);
    }
}
#endif

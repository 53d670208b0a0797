// Gated linear attention by chunks of 64 tokens on tensor cores: gla.cu's fast twin for heads of 64 or 128
// channels, stored in bfloat16 or float16 (sm_80 and later).
//
// With b_t the sum of log_g from the chunk's start up to t, and m that sum in the middle of the chunk, let
//   q'_t = q_t e^(b_t - m),   k'_s = k_s e^(m - b_s),   S' = e^m S      (S: the state before the chunk)
// Then, with e^(b_end - m) the decay from the middle to the end,
//   o_t   = scale ( sum over s <= t of (q'_t . k'_s) v_s  +  q'_t S' )
//   S_end = e^(b_end - m) (S' + sum over s of k'_s^T v_s)
// so k', v and S' serve all four products.  An exponent can be positive here, but spans half a chunk at most;
// a chunk where that would exceed SPAN is walked token by token instead, exactly (`walk`).
//
// A block walks a whole text: the schedule for many states.  For few see gla_outputs_fast.cu.
//
// Shapes: as in gla.cu; states (B,N,G,D,D) for the N chunks of 64.
// Grid: x is a state (b, g); 8 warps.  The next chunk is on its way from memory while this one is computed.
// Bytes: every input once, o once, the saved states once.

#include "gla_chunks.cuh"

#if TENSOR_CORES
// How the 8 warps share the state (D x D): a tile of 16 rows each, and where there are fewer tiles than warps,
// part of the columns.  In the products of a head, warps 0-3 take the even heads and 4-7 the odd ones, and
// warp w of four has tokens 16w.. of the chunk.
constexpr int WARPS = 8;

template <int D>
struct Layout {
    static constexpr int row_tiles = D / 16, column_parts = WARPS / row_tiles, columns = D / column_parts;
    static constexpr int pitch = D + PAD;
};

// One chunk's inputs as they come from memory.
template <int D>
struct Stage {
    float gate[CHUNK][D];  // log_g, later e^(b_t - m)
    real key[CHUNK][D];
    real value[CHUNK][D + PAD];
};

template <int D>
struct Shared {
    Stage<D> stage[2];
    real key[CHUNK][D + PAD];       // k'
    real query[2][CHUNK][D + PAD];  // q' of two heads; a warp's rows are its own
    real state[D][D + PAD];         // S'
    float total[WARPS][D];          // of log_g over 8 tokens
};

template <int D>
__device__ void fetch(Stage<D>& stage, const real* k, const real* v, const float* log_g, i64 row, i64 stride, int inside)
{
    // row: of the chunk's first token in k, in elements; `inside` tokens are inside the text
    for (int i = threadIdx.x; i < CHUNK * D / 4; i += blockDim.x) {
        const int t = i / (D / 4), c = i % (D / 4) * 4;
        copy_async(&stage.gate[t][c], log_g + row + (t < inside ? t : 0) * stride + c, t < inside);
    }
    for (int i = threadIdx.x; i < CHUNK * D / 8; i += blockDim.x) {
        const int t = i / (D / 8), c = i % (D / 8) * 8;
        const i64 at = row + (t < inside ? t : 0) * stride + c;
        copy_async(&stage.key[t][c], k + at, t < inside);
        copy_async(&stage.value[t][c], v + at, t < inside);
    }
}

// A chunk token by token, where a gate is too strong for the products.  q, o: of the chunk's first token and the
// group's first head; the partial sums of o over a tile's rows meet in the memory of q', which is free here.
template <int D>
__device__ __forceinline__ void walk(Shared<D>& s, Stage<D>& stage, float (&S)[Layout<D>::columns / 8][4], const real* q, real* o,
                                  int inside, int R, i64 step, float scale)
{
    typedef Layout<D> L;
    const int warp = threadIdx.x / 32, row = lane() / 4, column = lane() % 4 * 2;
    const int state_row = warp % L::row_tiles * 16, state_column = warp / L::row_tiles * L::columns;
    float (*sums)[D] = (float(*)[D])s.query;  // (row_tiles, D)
    for (int t = 0; t < CHUNK && t < inside; t++) {
        for (int half = 0; half < 2; half++) {
            const int d = state_row + row + 8 * half;
            const float decay = exp(stage.gate[t][d]), key = stage.key[t][d];
            for (int j = 0; j < L::columns / 8; j++)
                for (int c = 0; c < 2; c++) {
                    float& x = S[j][2 * half + c];
                    x = decay * x + key * (float)stage.value[t][state_column + 8 * j + column + c];
                }
        }
        for (int r = 0; r < R; r++) {
            const real* query = q + t * step + r * D + state_row + row;
            for (int j = 0; j < L::columns / 8; j++)
                for (int c = 0; c < 2; c++) {
                    float sum = (float)query[0] * S[j][c] + (float)query[8] * S[j][2 + c];
                    for (int lanes = 16; lanes >= 4; lanes /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, lanes);
                    if (row == 0) sums[warp % L::row_tiles][state_column + 8 * j + column + c] = sum;
                }
            __syncthreads();
            if (threadIdx.x < D) {
                float sum = 0;
                for (int tile = 0; tile < L::row_tiles; tile++) sum += sums[tile][threadIdx.x];
                o[t * step + r * D + threadIdx.x] = scale * sum;
            }
            __syncthreads();
        }
    }
}

template <int D>
__device__ void forward(const real* q, const real* k, const real* v, const float* log_g, const float* first, real* o,
                        float* final, float* states, int T, int H, int G, float scale)
{
    typedef Layout<D> L;
    constexpr int PITCH = L::pitch, COLUMN_TILES = L::columns / 8;
    SHARED_MEMORY(memory);
    Shared<D>& s = *(Shared<D>*)memory;
    const int b = blockIdx.x / G, g = blockIdx.x % G, R = H / G;
    const int warp = threadIdx.x / 32, row = lane() / 4, column = lane() % 4 * 2, own = warp % 4 * 16;
    const int state_row = warp % L::row_tiles * 16, state_column = warp / L::row_tiles * L::columns;
    const i64 kv = ((i64)b * T * G + g) * D, kv_step = (i64)G * D, qo_step = (i64)H * D;
    const i64 qo = ((i64)b * T * H + g * R) * D;
    const int chunks = (T + CHUNK - 1) / CHUNK;
    const i64 before = (i64)blockIdx.x * D;  // rows of first and final before ours

    // S: rows state_row + row (+ 8), columns state_column + 8 j + column (+ 1), as the products leave them
    float S[COLUMN_TILES][4];
    for (int j = 0; j < COLUMN_TILES; j++)
        for (int c = 0; c < 4; c++)
            S[j][c] = first ? first[(before + state_row + row + c / 2 * 8) * D + state_column + 8 * j + column + c % 2] : 0;

    fetch<D>(s.stage[0], k, v, log_g, kv, kv_step, T);
    copies_issued();
    for (int n = 0; n < chunks; n++) {
        Stage<D>& stage = s.stage[n % 2];
        const int start = n * CHUNK, inside = T - start;
        copies_arrived();
        __syncthreads();
        if (n + 1 < chunks)
            fetch<D>(s.stage[(n + 1) % 2], k, v, log_g, kv + (start + CHUNK) * kv_step, kv_step, inside - CHUNK);
        copies_issued();

        if (states) {
            float* saved = states + (((i64)b * chunks + n) * G + g) * D * D + state_column + column;
            for (int j = 0; j < COLUMN_TILES; j++)
                for (int half = 0; half < 2; half++)
                    *(float2*)(saved + (state_row + row + 8 * half) * D + 8 * j) = make_float2(S[j][2 * half], S[j][2 * half + 1]);
        }

        // The gates: sums over 8 tokens, a warp each; then every token's distance from the middle.
        for (int d = lane(); d < D; d += 32) {
            float sum = 0;
            for (int t = 0; t < 8; t++) sum += stage.gate[8 * warp + t][d];
            s.total[warp][d] = sum;
        }
        __syncthreads();
        bool too_wide = false;
        float to_middle = 0, to_end = 0;  // of thread d's channel
        if (threadIdx.x < D) {
            for (int w = 0; w < 4; w++) to_middle += s.total[w][threadIdx.x], to_end += s.total[w + 4][threadIdx.x];
            too_wide = !(to_middle > -SPAN && to_end > -SPAN);  // so that NaN is walked too
        }
        if (__syncthreads_or(too_wide)) {
            walk<D>(s, stage, S, q + qo + start * qo_step, o + qo + start * qo_step, inside, R, qo_step, scale);
            continue;
        }

        for (int d = 2 * lane(); d < D; d += 64) {
            float2 x = make_float2(0, 0);  // b_t - m of the token before the warp's first
            for (int w = warp; w < 4; w++) x.x -= s.total[w][d], x.y -= s.total[w][d + 1];
            for (int w = 4; w < warp; w++) x.x += s.total[w][d], x.y += s.total[w][d + 1];
            for (int t = 8 * warp; t < 8 * warp + 8; t++) {
                const float2 gate = *(float2*)&stage.gate[t][d], key = unpack(*(u32*)&stage.key[t][d]);
                x.x += gate.x;
                x.y += gate.y;
                *(float2*)&stage.gate[t][d] = make_float2(__expf(x.x), __expf(x.y));
                *(u32*)&s.key[t][d] = pack(key.x * __expf(-x.x), key.y * __expf(-x.y));
            }
        }
        // S <- S' = e^m S, also into shared memory
        float ending[2];
        for (int half = 0; half < 2; half++) {
            const int d = state_row + row + 8 * half;
            const float decay = __expf(s.total[0][d] + s.total[1][d] + s.total[2][d] + s.total[3][d]);
            ending[half] = __expf(s.total[4][d] + s.total[5][d] + s.total[6][d] + s.total[7][d]);
            for (int j = 0; j < COLUMN_TILES; j++) {
                S[j][2 * half] *= decay;
                S[j][2 * half + 1] *= decay;
                *(u32*)&s.state[d][state_column + 8 * j + column] = pack(S[j][2 * half], S[j][2 * half + 1]);
            }
        }
        __syncthreads();

        // S <- e^(b_end - m) (S' + k'^T v)
        for (int t = 0; t < CHUNK; t += 16) {
            u32 key[4];
            left_transposed<PITCH>(key, s.key[0], state_row, t);
            add_products<PITCH>(S, key, stage.value[0], t, state_column);
        }
        for (int j = 0; j < COLUMN_TILES; j++)
            for (int c = 0; c < 4; c++) S[j][c] *= ending[c / 2];

        for (int r = warp / 4; r < R; r += 2) {
            real (&query)[CHUNK][D + PAD] = s.query[warp / 4];
            for (int t = 0; t < 16; t++)  // q' of the warp's own 16 tokens
                for (int d = 2 * lane(); d < D; d += 64) {
                    const u32 raw = own + t < inside ? *(const u32*)(q + qo + (start + own + t) * qo_step + r * D + d) : 0;
                    const float2 e = *(float2*)&stage.gate[own + t][d], x = unpack(raw);
                    *(u32*)&query[own + t][d] = pack(x.x * e.x, x.y * e.y);
                }
            __syncwarp();
            float P[8][4] = {}, out[D / 8][4] = {};
            for (int d = 0; d < D; d += 16) {
                u32 tile[4];
                left<PITCH>(tile, query[0], own, d);
                add_scores<PITCH>(P, tile, s.key[0], d, own);
                add_products<PITCH>(out, tile, s.state[0], d, 0);
            }
            add_seen<PITCH>(out, P, stage.value[0], own);
            store_tokens(o + qo + start * qo_step + r * D, qo_step, out, own, inside, scale);
            __syncwarp();
        }
    }
    for (int j = 0; j < COLUMN_TILES; j++)
        for (int c = 0; c < 4; c++)
            final[(before + state_row + row + c / 2 * 8) * D + state_column + 8 * j + column + c % 2] = S[j][c];
}
#endif

// first may be null.
extern "C" __global__ void __launch_bounds__(256) gla_fast_forward_64(
    const real* q, const real* k, const real* v, const wide* log_g, const wide* first, real* o, wide* final,
    wide* states, int T, int H, int G, wide scale)
{
#if TENSOR_CORES
    forward<64>(q, k, v, log_g, first, o, final, states, T, H, G, scale);
#endif
}

extern "C" __global__ void __launch_bounds__(256) gla_fast_forward_128(
    const real* q, const real* k, const real* v, const wide* log_g, const wide* first, real* o, wide* final,
    wide* states, int T, int H, int G, wide scale)
{
#if TENSOR_CORES
    forward<128>(q, k, v, log_g, first, o, final, states, T, H, G, scale);
#endif
}

// Gated linear attention forward, every chunk of 64 tokens by itself, once gla_states_fast.cu has found the state
// before each: for few states and long texts, where gla_fast.cu leaves multiprocessors waiting (heads of 64 or 128
// channels, bfloat16 or float16; the letters are those of gla_chunks.cuh).
//
//   o_t = scale ( sum over s <= t of (q'_t . k'_s) v_s  +  q'_t S' ),    S' = e^m S  (S if wide)
//
// Grid: x the chunk, y the state (b, g); 8 warps.  Warps 0-3 take the even heads of the group and 4-7 the odd ones,
// warp w of four has tokens 16 w..  A warp's queries are its own, so that no barrier stands between heads; those of
// the next are on their way from memory while these are computed.
// Bytes, with those for the states: q, o once, k, v, the gates twice, the states written and read twice: 0.37 GB for
// B 32 T 1024 H 12 G 4 D 64, 1.3 GB for B 1 T 32768 H 28 G 4 D 128 (walks: 0.20 and 0.74).

#include "gla_chunks.cuh"

#if TENSOR_CORES
constexpr int WARPS = 8;

template <int D>
struct Shared : Gates<D> {
    real key[CHUNK][D + PAD];  // k', or k if wide
    real value[CHUNK][D + PAD];
    real state[D][D + PAD];  // S'
    real query[WARPS][2][16][D + PAD];  // q' of a head and the next
};

// Scores of a wide chunk: sum over d of q_t k_s e^(b_t - b_s), here for one t and s <= t.
template <int D>
__device__ float wide_score(const Shared<D>& s, const real* q, int t, int at)
{
    float sum = 0;
#pragma unroll 1
    for (int d = 0; d < D; d++) sum += (float)q[d] * (float)s.key[at][d] * __expf(s.gate[t][d] - s.gate[at][d]);
    return sum;
}

template <int D>
__device__ void outputs(const real* q, const real* k, const real* v, const float* log_g, const float* states, real* o,
                        int T, int H, int G, float scale)
{
    constexpr int PITCH = D + PAD;
    SHARED_MEMORY(memory);
    Shared<D>& s = *(Shared<D>*)memory;
    const int b = blockIdx.y / G, g = blockIdx.y % G, R = H / G, start = blockIdx.x * CHUNK, inside = T - start;
    const int warp = threadIdx.x / 32, own = warp % 4 * 16, row = lane() / 4, column = lane() % 4 * 2;
    const i64 kv_step = (i64)G * D, kv = ((i64)b * T + start) * kv_step + g * D;
    const i64 qo_step = (i64)H * D, qo = ((i64)b * T + start) * qo_step + g * R * D;
    const float* S = states + (((i64)b * gridDim.x + blockIdx.x) * G + g) * D * D;
    // The warp's own tokens, of the group's first head; none of them need be inside the text.
    const real* queries = q + qo + (own < inside ? own : 0) * qo_step;

    fetch<D>(s.key, k + kv, kv_step, inside);
    fetch<D>(s.value, v + kv, kv_step, inside);
    if (warp / 4 < R) fetch<D, 16>(s.query[warp][0], queries + warp / 4 * D, qo_step, inside - own, lane(), 32);
    copies_issued();
    const bool wide = place_gates<D, WARPS>(s, log_g + kv, kv_step, inside);
    __syncthreads();
#pragma unroll 8
    for (int i = threadIdx.x; i < D * D / 4; i += blockDim.x) {
        const int d = i / (D / 4), e = i % (D / 4) * 4;
        const float4 x = *(const float4*)(S + 4 * i);
        const float before = s.before[d];
        *(u32*)&s.state[d][e] = pack(before * x.x, before * x.y);
        *(u32*)&s.state[d][e + 2] = pack(before * x.z, before * x.w);
    }
    copies_arrived();
    if (!wide) weigh<D>(s.key, [&](int t, int c) { return writer<D>(s, wide, t, c); });
    __syncthreads();

    for (int r = warp / 4; r < R; r += 2) {
        real(*query)[PITCH] = s.query[warp][r / 2 % 2];
        copies_arrived();
        if (!wide) weigh<D, 16>(query, [&](int t, int c) { return *(float2*)&s.gate[own + t][c]; }, lane(), 32);
        __syncwarp();
        if (r + 2 < R)
            fetch<D, 16>(s.query[warp][(r / 2 + 1) % 2], queries + (r + 2) * D, qo_step, inside - own, lane(), 32);
        copies_issued();

        float P[8][4] = {}, out[D / 8][4] = {};
        if (wide) {
            for (int j = 0; j < 8; j++)
                for (int c = 0; c < 4; c++) {
                    const int t = row + c / 2 * 8, at = 8 * j + column + c % 2;
                    if (at <= own + t) P[j][c] = wide_score<D>(s, query[t], own + t, at);
                }
            __syncwarp();  // now the queries can be weighed
            weigh<D, 16>(query, [&](int t, int c) {
                const float2 gate = *(float2*)&s.gate[own + t][c];
                return make_float2(__expf(gate.x), __expf(gate.y));
            }, lane(), 32);
            __syncwarp();
        }
        for (int d = 0; d < D; d += 16) {
            u32 tile[4];
            left<PITCH>(tile, query[0], 0, d);
            if (!wide) add_scores<PITCH>(P, tile, s.key[0], d, own);
            add_products<PITCH>(out, tile, s.state[0], d, 0);
        }
        add_seen<PITCH>(out, P, s.value[0], own);
        store_tokens(o + qo + r * D, qo_step, out, own, inside, scale);
        __syncwarp();
    }
}
#endif

extern "C" __global__ void __launch_bounds__(256) gla_fast_outputs_64(
    const real* q, const real* k, const real* v, const wide* log_g, const wide* states, real* o, int T, int H, int G,
    wide scale)
{
#if TENSOR_CORES
    outputs<64>(q, k, v, log_g, states, o, T, H, G, scale);
#endif
}

extern "C" __global__ void __launch_bounds__(256) gla_fast_outputs_128(
    const real* q, const real* k, const real* v, const wide* log_g, const wide* states, real* o, int T, int H, int G,
    wide scale)
{
#if TENSOR_CORES
    outputs<128>(q, k, v, log_g, states, o, T, H, G, scale);
#endif
}

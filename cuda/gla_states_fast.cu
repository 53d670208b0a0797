// How states of linear attention go from chunk to chunk, for the kernels that then take every chunk by itself
// (heads of 64 or 128 channels, bfloat16 or float16; the letters are those of gla_chunks.cuh).
//
//   forwards    S  <- e^b_end S  + sum over s of (e^(b_end - b_s) k_s)^T v_s            S: the state before a chunk
//   backwards   dS <- e^b_end dS + scale sum over t, heads of (e^b_t q_t)^T do_t        dS: of the state after it
//
// What a chunk adds needs no other chunk (gla_fast_added: a block a chunk and group); then a thread an entry walks
// through the chunks (gla_fast_scan).  No exponent is positive.
// Grid of gla_fast_added: x the chunk, y the state (b, g); D / 16 warps, a tile of 16 rows of the state each.
// Bytes: k, v or q, do once, the gates once, states written twice and read once.

#include "gla_chunks.cuh"

constexpr int FLIGHT = 16;  // numbers that a thread asks for before it waits for the first

#if TENSOR_CORES
template <int D>
struct Shared {
    real x[2][CHUNK][D + PAD], y[2][CHUNK][D + PAD];  // of this head and the next
    float weight[CHUNK][D + PAD];
    float total[2][D], lead[D];
};

// Backwards: added = scale sum over t, heads of e^b_t x_t^T y_t.  Forwards, for x = k and y = v: of e^(b_end - b_t).
// Weights are at most 1; the first gate, common to all b_t, is kept apart, so that float16 does not lose it.
template <int D>
__device__ void add_up(const real* x, const real* y, const float* log_g, float* added, float* decays, int T, int H,
                       int G, float scale, bool forwards)
{
    constexpr int PITCH = D + PAD, HALF = CHUNK / 2;
    SHARED_MEMORY(memory);
    Shared<D>& s = *(Shared<D>*)memory;
    const int b = blockIdx.y / G, g = blockIdx.y % G, R = H / G, start = blockIdx.x * CHUNK, inside = T - start;
    const int warp = threadIdx.x / 32, d = threadIdx.x % D, part = threadIdx.x / D;
    const i64 step = (i64)H * D, from = ((i64)b * T + start) * step + g * R * D;
    const i64 chunk = ((i64)b * gridDim.x + blockIdx.x) * G + g;  // among the saved states

    fetch<D>(s.x[0], x + from, step, inside);
    fetch<D>(s.y[0], y + from, step, inside);
    copies_issued();
    float gate[HALF], sum = 0, lead = 0;
    read_gates(gate, log_g + (((i64)b * T + start) * G + g) * D + d, (i64)G * D, part * HALF, inside);
    if (part == 0 && !forwards) {
        lead = gate[0];
        gate[0] = 0;
    }
    for (int i = 0; i < HALF; i++) sum += gate[i];
    s.total[part][d] = sum;
    if (part == 0) s.lead[d] = lead;
    __syncthreads();
    sum = part == forwards ? 0 : s.total[forwards][d];  // of the tokens before, or after, those of the thread
    if (forwards)
        for (int i = HALF - 1; i >= 0; i--) {
            s.weight[part * HALF + i][d] = __expf(sum);
            sum += gate[i];
        }
    else
        for (int i = 0; i < HALF; i++) {
            sum += gate[i];
            s.weight[part * HALF + i][d] = __expf(sum);
        }
    if (part == 0) decays[chunk * D + d] = exp(s.total[0][d] + s.total[1][d] + lead);
    __syncthreads();

    float sums[D / 8][4] = {};  // rows 16 warp + lane / 4 (+ 8)
    for (int r = 0; r < R; r++) {
        copies_arrived();
        weigh<D>(s.x[r % 2], [&](int t, int c) { return *(float2*)&s.weight[t][c]; });
        __syncthreads();
        if (r + 1 < R) {
            fetch<D>(s.x[(r + 1) % 2], x + from + (r + 1) * D, step, inside);
            fetch<D>(s.y[(r + 1) % 2], y + from + (r + 1) * D, step, inside);
        }
        copies_issued();
        for (int t = 0; t < CHUNK; t += 16) {
            u32 tile[4];
            left_transposed<PITCH>(tile, s.x[r % 2][0], 16 * warp, t);
            add_products<PITCH>(sums, tile, s.y[r % 2][0], t, 0);
        }
    }
    for (int half = 0; half < 2; half++) {
        const int row = 16 * warp + lane() / 4 + 8 * half;
        const float by = scale * __expf(s.lead[row]);
        float* to = added + (chunk * D + row) * D + lane() % 4 * 2;
        for (int j = 0; j < D / 8; j++)
            *(float2*)(to + 8 * j) = make_float2(by * sums[j][2 * half], by * sums[j][2 * half + 1]);
    }
}
#endif

extern "C" __global__ void __launch_bounds__(128) gla_fast_added_64(
    const real* x, const real* y, const wide* log_g, wide* added, wide* decays, int T, int H, int G, wide scale,
    int forwards)
{
#if TENSOR_CORES
    add_up<64>(x, y, log_g, added, decays, T, H, G, scale, forwards);
#endif
}

extern "C" __global__ void __launch_bounds__(256) gla_fast_added_128(
    const real* x, const real* y, const wide* log_g, wide* added, wide* decays, int T, int H, int G, wide scale,
    int forwards)
{
#if TENSOR_CORES
    add_up<128>(x, y, log_g, added, decays, T, H, G, scale, forwards);
#endif
}

// S (B, chunks, size), what each chunk adds, becomes the state before it (forwards), or the gradient of the state
// after it (backwards); first (B, size) or null comes in at one end, last (B, size) out at the other.  size: G D D;
// decays (B, chunks, G D).
extern "C" __global__ void gla_fast_scan(
    const wide* first, wide* S, const wide* decays, wide* last, int B, int chunks, i64 size, int D, int forwards)
{
    for (EACH(i, B * size)) {
        const i64 step = forwards ? size : -size;
        i64 at = i / size * chunks * size + i % size + (forwards ? 0 : (chunks - 1) * size);
        wide state = first ? first[i] : 0;
        for (int n = 0; n < chunks; n += FLIGHT) {
            wide added[FLIGHT], decay[FLIGHT];
#pragma unroll
            for (int u = 0; u < FLIGHT; u++)
                if (n + u < chunks) {
                    added[u] = S[at + u * step];
                    decay[u] = decays[(at + u * step) / D];
                }
#pragma unroll
            for (int u = 0; u < FLIGHT; u++)
                if (n + u < chunks) {
                    S[at + u * step] = state;
                    state = decay[u] * state + added[u];
                }
            at += FLIGHT * step;
        }
        last[i] = state;
    }
}

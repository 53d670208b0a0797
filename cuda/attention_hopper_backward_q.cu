// Softmax attention backward on Hopper (sm_90a): backward_q of attention_backward_fast.cu with warpgroup products, for
// heads of 64 or 128 channels stored in bfloat16 or float16.  Also lse2 and delta, for the gradients of keys and values.
//
//   p = 2^(c s - lse2),  ds = p (do v^T - delta),  dq = scale ds k                         c = scale log2(e)
//   lse2 = lse log2(e),  delta = sum over D of do o
//
// Shapes: q, do, o, dq (B,T,H,D); k, v (B,S,G,D), S >= T; lse (B,T,H); lse2, delta (B,H,P), P is T rounded up to PADDED.
// Blocks and tiles are those of attention_hopper.cu; the third warpgroup brings keys (two warps) and values (two).
// Queries and upstream gradients stay in the registers of the warpgroup that has them: the tensor cores read two
// operands of 64 rows from shared memory at just the rate of that memory, so that nothing else could be read.
//
// Operations: 6 D for each visible pair of query and key, 4 D of them needed.  B 1 T 32768 H 28 G 4 D 128 W 4096: 2.7e12
// operations, 3.5 ms at 772 TFLOP/s.  Bytes from L2: the keys and values in reach once a tile, 15.5 GB.

#include "tensor_cores.cuh"
#include "hopper.cuh"
#include "attention_hopper.cuh"

constexpr int KEYS = 64;    // of a stage
constexpr int PADDED = 64;  // lse2 and delta go on, with zeros, to a multiple of this
constexpr float LOG2E = 1.44269504f;

#if HOPPER
// Shared memory: STAGES tiles of keys, STAGES tiles of values, barriers.
template <int D, int STAGES>
struct Memory {
    static constexpr int STAGE = KEYS * D * 2;                                      // bytes
    static constexpr int BYTES = 1024 + 2 * STAGES * STAGE + 8 * 3 * STAGES;        // 1024: to align
    char *keys, *values;
    u64 *key_here, *value_here, *free;
    __device__ Memory(char* memory)
    {
        keys = memory + (-shared_address(memory) & 1023);
        values = keys + STAGES * STAGE;
        key_here = (u64*)(values + STAGES * STAGE);
        value_here = key_here + STAGES;
        free = value_here + STAGES;
    }
    __device__ void begin() const
    {
        for (int i = 0; i < STAGES; i++) {
            barrier_begin(key_here + i, 64);
            barrier_begin(value_here + i, 64);
            barrier_begin(free + i, 8);
        }
    }
};

template <int D, int STAGES>
__device__ __forceinline__ void producer(const Memory<D, STAGES>& memory, const real* k, const real* v, int T, int S,
                                         int R, int G, int window, int row_tiles, int tiles)
{
    const bool of_values = __shfl_sync(FULL_WARP, threadIdx.x / 64 % 2, 0);
    const real* x = of_values ? v : k;
    char* stages = of_values ? memory.values : memory.keys;
    u64* here = of_values ? memory.value_here : memory.key_here;
    Turn<STAGES> turn;
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
        const Tile tile(index, row_tiles, T, S, R, G, window);
        const real* rows = x + ((i64)tile.b * S * G + tile.g) * D;
        for (int key = tile.key; key < tile.end; key += KEYS, turn.next()) {
            barrier_wait(memory.free + turn.stage, turn.parity ^ 1);
            bring<D, KEYS>(stages + turn.stage * Memory<D, STAGES>::STAGE, rows, G * D, key, S);
            copies_issued();
            copies_arrived();
            show_products();
            barrier_arrive(here + turn.stage);
        }
    }
}

// Two words of a row's sixteen channels as first operands: those of the lane's first row or of its second.
template <int D>
__device__ __forceinline__ void row_from_memory(u32 (&a)[D / 16][4], const real* row, int half, bool inside)
{
#pragma unroll
    for (int d = 0; d < D / 16; d++)
#pragma unroll
        for (int i = half; i < 4; i += 2)
            a[d][i] = inside ? *(const u32*)(row + 16 * d + lane() % 4 * 2 + i / 2 * 8) : 0;
}

template <int D, int STAGES>
__device__ __forceinline__ void consumer(const Memory<D, STAGES>& memory, int half, const real* d_o, const real* q,
                                         const real* o, const float* lse, real* dq, float* lse2, float* delta, int T,
                                         int S, int H, int G, int window, float scale, int row_tiles, int tiles)
{
    constexpr int BYTES = Memory<D, STAGES>::STAGE;
    const int R = H / G, padded = (T + PADDED - 1) / PADDED * PADDED;
    const float c = scale * LOG2E;
    Turn<STAGES> turn;
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
        const Tile tile(index, row_tiles, T, S, R, G, window);
        const int first = tile.row + half * ROWS, row = first + threadIdx.x / 32 % 4 * 16 + lane() / 4;
        const int low = S - T + first / R, high = S - T + (first + ROWS - 1) / R;
        const int position[2] = {S - T + row / R, S - T + (row + 8) / R};
        u32 query[D / 16][4], upstream[D / 16][4], ds[KEYS / 16][4];
        float out[D / 8][4] = {}, s[KEYS / 8][4], dp[KEYS / 8][4], shift[2], minus[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int r = row + 8 * i, t = r / R, head = tile.g * R + r % R;
            const bool inside = r < T * R;
            const i64 at = ((i64)tile.b * T + t) * H + head;
            row_from_memory<D>(query, q + at * D, i, inside);
            row_from_memory<D>(upstream, d_o + at * D, i, inside);
            float sum = 0;
#pragma unroll
            for (int d = 0; d < D / 16; d++)
#pragma unroll
                for (int j = i; j < 4; j += 2) {
                    const float2 x = unpack(upstream[d][j]);
                    const float2 y = unpack(inside ? *(const u32*)(o + at * D + 16 * d + lane() % 4 * 2 + j / 2 * 8) : 0);
                    sum += x.x * y.x + x.y * y.y;
                }
            minus[i] = lanes_sum(sum, 4);
            shift[i] = inside ? LOG2E * lse[at] : 0;
            if (inside && lane() % 4 == 0) {
                const i64 to = ((i64)tile.b * H + head) * padded + t;
                lse2[to] = shift[i];
                delta[to] = minus[i];
            }
        }
        if (tile.row + 2 * ROWS >= T * R)  // the last rows: the zeros behind each head's statistics
            for (int i = threadIdx.x; i < (padded - T) * R; i += 2 * 128) {
                const i64 to = ((i64)tile.b * H + tile.g * R + i % R) * padded + T + i / R;
                lse2[to] = delta[to] = 0;
            }

#pragma unroll 1
        for (int key = tile.key; key < tile.end; key += KEYS, turn.next()) {
            const char* keys = memory.keys + turn.stage * BYTES;
            barrier_wait(memory.key_here + turn.stage, turn.parity);
            order();
            product_of_rows<D>(s, query, keys, KEYS);
            issued();
            barrier_wait(memory.value_here + turn.stage, turn.parity);
            product_of_rows<D>(dp, upstream, memory.values + turn.stage * BYTES, KEYS);
            issued();
            finished<1>();
            hold(s);
            if (key + KEYS > low + 1 || key <= high - window) {
                const int distance[2] = {position[0] - key, position[1] - key};
                hide(s, distance, window);
            }
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) s[j][i] = power_of_two(c * s[j][i] - shift[i / 2]);
            // Already here the next keys are waited for, as the compiler moves exponentials behind the wait that follows,
            // but not past this loop.
            Turn<STAGES> next = turn;
            next.next();
            if (key + KEYS < tile.end) barrier_wait(memory.key_here + next.stage, next.parity);
            finished();
            hold(dp);
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) s[j][i] *= dp[j][i] - minus[i / 2];
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) as_left(ds[n], s[2 * n], s[2 * n + 1]);
            hold(out);
            order();
            product_into(out, ds, keys);
            issued();
            finished();
            hold(out);
            if (lane() == 0) barrier_arrive(memory.free + turn.stage);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int r = row + 8 * i;
            const i64 at = ((i64)tile.b * T + r / R) * H + tile.g * R + r % R;
            store_row(dq + at * D, r < T * R, out, i, scale);
        }
    }
}

template <int D, int STAGES>
__device__ __forceinline__ void backward_q(const real* d_o, const real* q, const real* k, const real* v, const real* o,
                                           const float* lse, real* dq, float* lse2, float* delta, int T, int S, int H,
                                           int G, int window, float scale, int tiles)
{
    SHARED_MEMORY(dynamic);
    const Memory<D, STAGES> memory(dynamic);
    if (threadIdx.x == 0) memory.begin();
    __syncthreads();
    const int role = __shfl_sync(FULL_WARP, threadIdx.x / 128, 0), row_tiles = (T * (H / G) + 2 * ROWS - 1) / (2 * ROWS);
    if (role == 2) {
        fewer_registers<24>();
        producer(memory, k, v, T, S, H / G, G, window, row_tiles, tiles);
    } else {
        more_registers<240>();
        consumer(memory, role, d_o, q, o, lse, dq, lse2, delta, T, S, H, G, window, scale, row_tiles, tiles);
    }
}
#endif

// 384 threads, one block to a multiprocessor.
extern "C" __global__ void __launch_bounds__(384, 1) attention_hopper_backward_q_64(
    const real* d_o, const real* q, const real* k, const real* v, const real* o, const wide* lse, real* dq, wide* lse2,
    wide* delta, int T, int S, int H, int G, int window, wide scale, int tiles)
{
#if HOPPER
    backward_q<64, 4>(d_o, q, k, v, o, lse, dq, lse2, delta, T, S, H, G, window, scale, tiles);
#endif
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_hopper_backward_q_128(
    const real* d_o, const real* q, const real* k, const real* v, const real* o, const wide* lse, real* dq, wide* lse2,
    wide* delta, int T, int S, int H, int G, int window, wide scale, int tiles)
{
#if HOPPER
    backward_q<128, 6>(d_o, q, k, v, o, lse, dq, lse2, delta, T, S, H, G, window, scale, tiles);
#endif
}

// Softmax attention through a sliding window on Hopper (sm_90a): attention_fast.cu's forward with warpgroup products,
// for heads of 64 or 128 channels stored in bfloat16 or float16.  Same results and same saved lse.
//
//   s = q k^T,  p = 2^(c s - top),  o = p v / sum of p,  lse = ln 2 (top + log2 of the sum)        c = scale log2(e)
//
// Shapes: q, o (B,T,H,D); k, v (B,S,G,D), S >= T; lse (B,T,H).
// A tile is 128 rows: a row is a query of one of the R = H / G heads of a group, in the order of memory, so that a tile
// is 128 / R neighbouring queries of all heads that share keys.  Blocks walk the B G (T R / 128) tiles by the grid's
// size.  Of a block's three warpgroups two have 64 rows each; the third brings queries, keys (two warps) and values (two)
// into shared memory and runs ahead, into the next tile too.  s of the next keys and p v of the last run on
// the tensor cores while the softmax of s in between is computed, and the two warpgroups take turns at issuing them.
//
// Operations: 4 D for each visible pair of query and key.  Bytes from memory: q, k, v, o once; from L2 the keys and
// values in reach once a tile.  B 1 T 32768 H 28 G 4 D 128 W 4096, bfloat16: 1.8e12 operations, 2.3 ms at 772 TFLOP/s;
// 0.54 GB from memory, 0.16 ms at 3.35 TB/s; 15.5 GB from L2.

#include "tensor_cores.cuh"
#include "hopper.cuh"
#include "attention_hopper.cuh"

constexpr float SLACK = 8;          // the softmax's shift follows the maximum when that has grown by more than 2^8
constexpr float LN2 = 0.693147181f;

#if HOPPER
// Shared memory: queries, STAGES tiles of keys, STAGES tiles of values, barriers.
template <int D, int KEYS, int STAGES>
struct Memory {
    static constexpr int QUERIES = 2 * ROWS * D * 2, TILE_BYTES = KEYS * D * 2;  // bytes
    static constexpr int BYTES = 1024 + QUERIES + 2 * STAGES * TILE_BYTES + 8 * (2 + 4 * STAGES);  // 1024: to align
    char *queries, *keys, *values;
    // Tile of the queries, and of each stage of keys and values: has arrived, is no longer needed.
    u64 *query_here, *query_free, *key_here, *key_free, *value_here, *value_free;
    __device__ Memory(char* memory)
    {
        queries = memory + (-shared_address(memory) & 1023);
        keys = queries + QUERIES;
        values = keys + STAGES * TILE_BYTES;
        query_here = (u64*)(values + STAGES * TILE_BYTES);
        query_free = query_here + 1;
        key_here = query_here + 2;
        key_free = key_here + STAGES;
        value_here = key_free + STAGES;
        value_free = value_here + STAGES;
    }
    __device__ void begin() const
    {
        barrier_begin(query_here, 128);
        barrier_begin(query_free, 8);
        for (int i = 0; i < STAGES; i++) {
            barrier_begin(key_here + i, 64);
            barrier_begin(value_here + i, 64);
            barrier_begin(key_free + i, 8);
            barrier_begin(value_free + i, 8);
        }
    }
};

template <int D, int KEYS, int STAGES>
__device__ __forceinline__ void producer(const Memory<D, KEYS, STAGES>& memory, const real* q, const real* k,
                                         const real* v, int T, int S, int H, int G, int window, int row_tiles, int tiles)
{
    constexpr int PIECES = D / 8;
    const int R = H / G, thread = threadIdx.x % 128, piece = thread % PIECES;
    const bool of_values = __shfl_sync(FULL_WARP, thread / 64, 0);
    const real* x = of_values ? v : k;
    char* stages = of_values ? memory.values : memory.keys;
    u64 *here = of_values ? memory.value_here : memory.key_here, *free = of_values ? memory.value_free : memory.key_free;
    Turn<STAGES> turn;
    int round = 1;
    for (int index = blockIdx.x; index < tiles; index += gridDim.x, round ^= 1) {
        const Tile tile(index, row_tiles, T, S, R, G, window);
        barrier_wait(memory.query_free, round);
        const real* queries = q + ((i64)tile.b * T * H + tile.g * R) * D;
#pragma unroll 4
        for (int i = 0; i < 2 * ROWS * PIECES / 128; i++) {
            const int r = thread / PIECES + i * (128 / PIECES), row = tile.row + r;
            const bool there = row < T * R;
            const i64 at = there ? (i64)(row / R) * H + row % R : 0;
            copy_async(memory.queries + swizzled(2 * ROWS, r, piece), queries + at * D + piece * 8, there);
        }
        const real* rows = x + ((i64)tile.b * S * G + tile.g) * D;
        for (int key = tile.key; key < tile.end; key += KEYS, turn.next()) {
            barrier_wait(free + turn.stage, turn.parity ^ 1);
            bring<D, KEYS>(stages + turn.stage * Memory<D, KEYS, STAGES>::TILE_BYTES, rows, G * D, key, S);
            copies_issued();
            copies_arrived();
            show_products();
            barrier_arrive(here + turn.stage);
            if (key == tile.key) barrier_arrive(memory.query_here);
        }
    }
}

// What a thread knows of its two rows, l / 4 and l / 4 + 8 of its warp's sixteen.
struct Softmax {
    float top[2], total[2];
    __device__ Softmax() : top{LOWEST / 8, LOWEST / 8}, total{0, 0} {}  // finite, as -inf - -inf is no number

    // s becomes p.  Where a row's maximum has grown too far above what is subtracted, that follows: -> whether, and what
    // older sums shrink by.
    template <int TILES>
    __device__ __forceinline__ bool step(float (&s)[TILES][4], float c, float (&shrink)[2])
    {
        float highest[2];
        bool grown = false;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float a = s[0][2 * half], b = s[0][2 * half + 1];
#pragma unroll
            for (int j = 1; j < TILES; j++) {
                a = fmaxf(a, s[j][2 * half]);
                b = fmaxf(b, s[j][2 * half + 1]);
            }
            highest[half] = fmaxf(a, b);
            grown |= c * highest[half] > top[half] + SLACK;
        }
        grown = __ballot_sync(FULL_WARP, grown) != 0;
        if (grown)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float now = fmaxf(c * lanes_max(highest[half], 4), top[half]);
                shrink[half] = power_of_two(top[half] - now);
                top[half] = now;
                total[half] *= shrink[half];
            }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum[2] = {};
#pragma unroll
            for (int j = 0; j < TILES; j++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float& x = s[j][2 * half + i];
                    x = power_of_two(c * x - top[half]);
                    sum[i] += x;
                }
            total[half] += sum[0] + sum[1];
        }
        return grown;
    }
};

template <int TILES>
__device__ __forceinline__ void multiply_rows(float (&x)[TILES][4], const float (&factor)[2])
{
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) x[j][i] *= factor[i / 2];
}

// TURNS: the two warpgroups issue products by turns, so that one's softmax runs beside the other's products.
template <int D, int KEYS, int STAGES, bool TURNS>
__device__ __forceinline__ void consumer(const Memory<D, KEYS, STAGES>& memory, int half, real* o, float* lse, int T,
                                         int S, int H, int G, int window, float c, int row_tiles, int tiles)
{
    constexpr int BYTES = Memory<D, KEYS, STAGES>::TILE_BYTES;
    const int R = H / G;
    const char* queries = memory.queries + half * ROWS * 128;
    Turn<STAGES> key_turn, value_turn;
    int round = 0;
    if (TURNS && half) turn_pass(1, 256);

    for (int index = blockIdx.x; index < tiles; index += gridDim.x, round ^= 1) {
        const Tile tile(index, row_tiles, T, S, R, G, window);
        // Of the warpgroup's rows: the first and the last position, and those of this thread.
        const int first = tile.row + half * ROWS, row = first + threadIdx.x / 32 % 4 * 16 + lane() / 4;
        const int low = S - T + first / R, high = S - T + (first + ROWS - 1) / R;
        const int position[2] = {S - T + row / R, S - T + (row + 8) / R};
        Softmax softmax;
        float s[KEYS / 8][4], out[D / 8][4] = {}, shrink[2];
        u32 p[KEYS / 16][4];

        auto scores = [&] {
            product_of_rows<D>(s, queries, 2 * ROWS, memory.keys + key_turn.stage * BYTES, KEYS);
            issued();
        };
        auto scores_here = [&](int key) {
            hold(s);
            if (lane() == 0) barrier_arrive(memory.key_free + key_turn.stage);
            key_turn.next();
            if (key + KEYS > low + 1 || key <= high - window) {
                const int distance[2] = {position[0] - key, position[1] - key};
                hide(s, distance, window);
            }
        };
        auto next_keys = [&](int key) {
            if (key + KEYS < tile.end) barrier_wait(memory.key_here + key_turn.stage, key_turn.parity);
        };
        auto weights = [&] {
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) as_left(p[n], s[2 * n], s[2 * n + 1]);
        };
        auto sums = [&] {
            product_into(out, p, memory.values + value_turn.stage * BYTES);
            issued();
        };
        auto sums_here = [&] {
            hold(out);
            if (lane() == 0) barrier_arrive(memory.value_free + value_turn.stage);
            value_turn.next();
        };

        int key = tile.key;
        barrier_wait(memory.query_here, round);
        barrier_wait(memory.key_here + key_turn.stage, key_turn.parity);
        order();
        scores();
        finished();
        scores_here(key);
        softmax.step(s, c, shrink);
        weights();
        next_keys(key);
#pragma unroll 1
        for (key += KEYS; key < tile.end; key += KEYS) {
            if (TURNS) turn_wait(1 + half, 256);
            hold(s);
            hold(out);
            order();
            scores();
            barrier_wait(memory.value_here + value_turn.stage, value_turn.parity);
            sums();
            if (TURNS) turn_pass(2 - half, 256);
            finished<1>();
            scores_here(key);
            const bool grown = softmax.step(s, c, shrink);
            // The next keys are waited for here, as the compiler moves exponentials behind the wait that follows, but
            // not past this loop.
            next_keys(key);
            finished();
            sums_here();
            if (grown) multiply_rows(out, shrink);
            weights();
        }
        if (lane() == 0) barrier_arrive(memory.query_free);
        barrier_wait(memory.value_here + value_turn.stage, value_turn.parity);
        hold(out);
        order();
        sums();
        finished();
        sums_here();

        const float total[2] = {lanes_sum(softmax.total[0], 4), lanes_sum(softmax.total[1], 4)};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int r = row + 8 * i;
            const bool inside = r < T * R;
            const i64 at = ((i64)tile.b * T + r / R) * H + tile.g * R + r % R;
            store_row(o + at * D, inside, out, i, 1 / total[i]);
            if (inside && lane() % 4 == 0) lse[at] = LN2 * softmax.top[i] + log(total[i]);
        }
    }
}

template <int D, int KEYS, int STAGES, bool TURNS>
__device__ __forceinline__ void forward(const real* q, const real* k, const real* v, real* o, float* lse, int T, int S,
                                        int H, int G, int window, float c, int tiles)
{
    SHARED_MEMORY(dynamic);
    const Memory<D, KEYS, STAGES> memory(dynamic);
    if (threadIdx.x == 0) memory.begin();
    __syncthreads();
    const int role = __shfl_sync(FULL_WARP, threadIdx.x / 128, 0), row_tiles = (T * (H / G) + 2 * ROWS - 1) / (2 * ROWS);
    if (role == 2) {
        fewer_registers<40>();
        producer<D, KEYS, STAGES>(memory, q, k, v, T, S, H, G, window, row_tiles, tiles);
    } else {
        more_registers<232>();
        consumer<D, KEYS, STAGES, TURNS>(memory, role, o, lse, T, S, H, G, window, c, row_tiles, tiles);
    }
}
#endif

// 384 threads, one block to a multiprocessor.
extern "C" __global__ void __launch_bounds__(384, 1) attention_hopper_forward_64(
    const real* q, const real* k, const real* v, real* o, wide* lse, int T, int S, int H, int G, int window, wide c,
    int tiles)
{
#if HOPPER
    forward<64, 128, 2, true>(q, k, v, o, lse, T, S, H, G, window, c, tiles);
#endif
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_hopper_forward_128(
    const real* q, const real* k, const real* v, real* o, wide* lse, int T, int S, int H, int G, int window, wide c,
    int tiles)
{
#if HOPPER
    forward<128, 128, 2, true>(q, k, v, o, lse, T, S, H, G, window, c, tiles);
#endif
}

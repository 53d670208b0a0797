// Softmax attention backward on Hopper (sm_90a): backward_kv of attention_backward_fast.cu with warpgroup products, for
// heads of 64 or 128 channels stored in bfloat16 or float16.
//
//   p = 2^(c s - lse2),  ds = p (do v^T - delta),  dk = scale ds^T q,  dv = p^T do              c = scale log2(e)
//
// Shapes: q, do (B,T,H,D); k, v, dk, dv (B,S,G,D), S >= T; lse2, delta (B,H,P), P is T rounded up to QUERIES.
// Grid: x 128 keys, y (b, g).  A block walks the queries that may see its keys, 64 at a time, one head of the group after
// the other.  Of its three warpgroups two have 64 keys each; the third brings queries (two warps) and upstream gradients
// (two) into shared memory.  Keys are rows of s and do v^T, so that p and ds lie in registers as the sums take them.
// do v^T runs while p is computed, p^T do while ds is, and the other warpgroup's products beside both.
//
// Operations: 8 D for each visible pair of query and key, 6 D of them needed.  B 1 T 32768 H 28 G 4 D 128 W 4096: 3.6e12
// operations, 4.7 ms at 772 TFLOP/s.  Bytes from L2: queries and their gradients in reach once a block, 15.5 GB; from
// memory each array once or twice.  Nothing is added across blocks: equal inputs give equal bits.

#include "tensor_cores.cuh"
#include "hopper.cuh"

constexpr int ROWS = 64;     // keys of a warpgroup
constexpr int QUERIES = 64;  // of a stage
constexpr float LOG2E = 1.44269504f;

#if HOPPER
// Shared memory: keys and values of the block, STAGES times queries, upstream gradients and their statistics, barriers.
template <int D, int STAGES>
struct Memory {
    static constexpr int OWN = 2 * ROWS * D * 2, STAGE = QUERIES * D * 2;  // bytes
    static constexpr int BYTES = 1024 + 2 * OWN + STAGES * (2 * STAGE + 8 * QUERIES) + 8 * (1 + 3 * STAGES);
    char *keys, *values, *queries, *upstream;
    float *lse2, *delta;
    u64 *own_here, *query_here, *upstream_here, *free;
    __device__ Memory(char* memory)
    {
        keys = memory + (-shared_address(memory) & 1023);
        values = keys + OWN;
        queries = values + OWN;
        upstream = queries + STAGES * STAGE;
        lse2 = (float*)(upstream + STAGES * STAGE);
        delta = lse2 + STAGES * QUERIES;
        own_here = (u64*)(delta + STAGES * QUERIES);
        query_here = own_here + 1;
        upstream_here = query_here + STAGES;
        free = upstream_here + STAGES;
    }
    __device__ void begin() const
    {
        barrier_begin(own_here, 128);
        for (int i = 0; i < STAGES; i++) {
            barrier_begin(query_here + i, 64);
            barrier_begin(upstream_here + i, 64);
            barrier_begin(free + i, 8);
        }
    }
};

// What a block sees: its first key, and for every head the queries from begin to end.
struct Reach {
    int b, g, key, begin, end;
    __device__ Reach(int T, int S, int G, int window) : b(blockIdx.y / G), g(blockIdx.y % G), key(blockIdx.x * 2 * ROWS)
    {
        const int past = S - T, last = key + 2 * ROWS - 1 + window - past;
        begin = key > past ? (key - past) / QUERIES * QUERIES : 0;
        end = last < T ? last : T;
    }
};

template <int D, int STAGES>
__device__ __forceinline__ void producer(const Memory<D, STAGES>& memory, const real* d_o, const real* q, const real* k,
                                         const real* v, const float* lse2, const float* delta, int T, int S, int H,
                                         int G, int window)
{
    const Reach reach(T, S, G, window);
    const int R = H / G, thread = threadIdx.x % 64, padded = (T + QUERIES - 1) / QUERIES * QUERIES;
    const bool second = __shfl_sync(FULL_WARP, threadIdx.x / 64 % 2, 0);
    const real *own = second ? v : k, *x = second ? d_o : q;
    const float* statistics = second ? delta : lse2;
    char* stages = second ? memory.upstream : memory.queries;
    float* numbers = second ? memory.delta : memory.lse2;
    u64* here = second ? memory.upstream_here : memory.query_here;

    bring<D, 2 * ROWS>(second ? memory.values : memory.keys, own + ((i64)reach.b * S * G + reach.g) * D, G * D,
                       reach.key, S);
    copies_issued();
    copies_arrived();
    show_products();
    barrier_arrive(memory.own_here);
    Turn<STAGES> turn;
    for (int head = reach.g * R; head < (reach.g + 1) * R; head++)
        for (int query = reach.begin; query < reach.end; query += QUERIES, turn.next()) {
            barrier_wait(memory.free + turn.stage, turn.parity ^ 1);
            bring<D, QUERIES>(stages + turn.stage * Memory<D, STAGES>::STAGE, x + ((i64)reach.b * T * H + head) * D,
                              H * D, query, T);
            if (thread < QUERIES / 4)
                copy_async(numbers + turn.stage * QUERIES + 4 * thread,
                           statistics + ((i64)reach.b * H + head) * padded + query + 4 * thread, true);
            copies_issued();
            copies_arrived();
            show_products();
            barrier_arrive(here + turn.stage);
        }
}

template <int D, int STAGES>
__device__ __forceinline__ void consumer(const Memory<D, STAGES>& memory, int half, real* dk, real* dv, int T, int S,
                                         int H, int G, int window, float scale)
{
    constexpr int BYTES = Memory<D, STAGES>::STAGE;
    const Reach reach(T, S, G, window);
    const int R = H / G, column = lane() % 4 * 2, first = reach.key + half * ROWS;
    const int row = first + threadIdx.x / 32 % 4 * 16;  // the warp's first key
    const char *keys = memory.keys + half * ROWS * 128, *values = memory.values + half * ROWS * 128;
    const float c = scale * LOG2E;
    float of_key[D / 8][4] = {}, of_value[D / 8][4] = {}, s[QUERIES / 8][4], dp[QUERIES / 8][4];
    u32 p[QUERIES / 16][4], ds[QUERIES / 16][4];
    Turn<STAGES> turn;
    int query = reach.begin;
    const int rounds = reach.begin < reach.end ? R * ((reach.end - reach.begin + QUERIES - 1) / QUERIES) : 0;
    barrier_wait(memory.own_here, 0);
#pragma unroll 1
    for (int n = 0; n < rounds; n++, turn.next()) {
        const char *queries = memory.queries + turn.stage * BYTES, *upstream = memory.upstream + turn.stage * BYTES;
        const float* lse2 = memory.lse2 + turn.stage * QUERIES + column;
        const float* delta = memory.delta + turn.stage * QUERIES + column;
        barrier_wait(memory.query_here + turn.stage, turn.parity);
        order();
        product_of_rows<D>(s, keys, 2 * ROWS, queries, QUERIES);
        issued();
        barrier_wait(memory.upstream_here + turn.stage, turn.parity);
        product_of_rows<D>(dp, values, 2 * ROWS, upstream, QUERIES);
        issued();
        finished<1>();
        hold(s);
        const int position = S - T + query;
        if (first + ROWS > position + 1 || first < position + QUERIES - window) {
            const int behind = position - row - lane() / 4;
#pragma unroll
            for (int j = 0; j < QUERIES / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int distance = behind + 8 * j + column + i % 2 - i / 2 * 8;
                    if ((unsigned)distance >= (unsigned)window) s[j][i] = -INFINITE;
                }
        }
#pragma unroll
        for (int j = 0; j < QUERIES / 8; j++) {
            const float2 shift = *(float2*)(lse2 + 8 * j);
#pragma unroll
            for (int i = 0; i < 4; i++) s[j][i] = power_of_two(c * s[j][i] - (i % 2 ? shift.y : shift.x));
        }
#pragma unroll
        for (int m = 0; m < QUERIES / 16; m++) as_left(p[m], s[2 * m], s[2 * m + 1]);
        hold(of_value);
        order();
        product_into(of_value, p, upstream);
        issued();
        finished<1>();
        hold(dp);
#pragma unroll
        for (int j = 0; j < QUERIES / 8; j++) {
            const float2 minus = *(float2*)(delta + 8 * j);
#pragma unroll
            for (int i = 0; i < 4; i++) s[j][i] *= dp[j][i] - (i % 2 ? minus.y : minus.x);
        }
#pragma unroll
        for (int m = 0; m < QUERIES / 16; m++) as_left(ds[m], s[2 * m], s[2 * m + 1]);
        hold(of_key);
        order();
        product_into(of_key, ds, queries);
        issued();
        finished();
        hold(of_value);
        hold(of_key);
        if (lane() == 0) barrier_arrive(memory.free + turn.stage);
        query += QUERIES;
        if (query >= reach.end) query = reach.begin;
    }
    const i64 at = (((i64)reach.b * S + row) * G + reach.g) * D;
    store<D>(dk + at, G * D, S - row, of_key, make_float2(scale, scale));
    store<D>(dv + at, G * D, S - row, of_value, make_float2(1, 1));
}

template <int D, int STAGES>
__device__ __forceinline__ void backward_kv(const real* d_o, const real* q, const real* k, const real* v,
                                            const float* lse2, const float* delta, real* dk, real* dv, int T, int S,
                                            int H, int G, int window, float scale)
{
    SHARED_MEMORY(dynamic);
    const Memory<D, STAGES> memory(dynamic);
    if (threadIdx.x == 0) memory.begin();
    __syncthreads();
    const int role = __shfl_sync(FULL_WARP, threadIdx.x / 128, 0);
    if (role == 2) {
        fewer_registers<24>();
        producer(memory, d_o, q, k, v, lse2, delta, T, S, H, G, window);
    } else {
        more_registers<240>();
        consumer(memory, role, dk, dv, T, S, H, G, window, scale);
    }
}
#endif

// 384 threads, one block to a multiprocessor.
extern "C" __global__ void __launch_bounds__(384, 1) attention_hopper_backward_kv_64(
    const real* d_o, const real* q, const real* k, const real* v, const wide* lse2, const wide* delta, real* dk,
    real* dv, int T, int S, int H, int G, int window, wide scale)
{
#if HOPPER
    backward_kv<64, 4>(d_o, q, k, v, lse2, delta, dk, dv, T, S, H, G, window, scale);
#endif
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_hopper_backward_kv_128(
    const real* d_o, const real* q, const real* k, const real* v, const wide* lse2, const wide* delta, real* dk,
    real* dv, int T, int S, int H, int G, int window, wide scale)
{
#if HOPPER
    backward_kv<128, 4>(d_o, q, k, v, lse2, delta, dk, dv, T, S, H, G, window, scale);
#endif
}

// One matrix product per expert on Hopper (sm_90a): moe_fast.cu's three with warpgroup products, in bfloat16 or float16
// with sums in float (as moe_products.cu; ops/moe.py).
//
//   forward   y_e  = x_e w_e^T             rows times (O,I): both sides' depth runs along memory
//   backward  dx_e = dy_e w_e              the right side's depth runs across memory
//             dw_e += dy_e^T x_e, float    both sides' depth, the expert's rows, runs across memory
//
// A tile is 128 x 256 results.  Two of a block's three warpgroups have 64 rows each in registers; the third walks the
// depth in slices of 64, brings both sides of a slice into shared memory and runs ahead, into the next tile too: its
// copies report their arrival by themselves.  Nothing is transposed: the tensor cores are told how a side lies.  Rows
// of a neighbouring expert are neither read nor written.  I, O and all steps from row to row are multiples of 8, all
// addresses of 16 bytes (launchers/experts.py).
//
// Grid: a block of 384 threads for each multiprocessor, or each tile if there are fewer.  Blocks walk the tiles of all
// experts, forward and back by turns: first, last, last, first, ...  Tiles next to each other share columns.  Of dw the
// largest experts come first, for a tile takes as long as its expert has rows.  Last tiles of forward and dx are cut.
//
// At 16,384 rows, C 1024 and F 2816 over 16 experts a product is 94 GFLOP: 0.14 ms at 690 TFLOP/s.  Bytes from memory:
// 34 + 92 + 92 MB (0.07 ms at 3.3 TB/s), for dw 34 + 92 and twice 185 MB (0.15 ms).  From L2 a tile takes 48 kB for
// each 4.2 MFLOP: 5.8 TB/s at 500 TFLOP/s.  H100: forward 0.175 ms (541 TFLOP/s), dx 0.188 (503), dw 0.248 (381); one
// cuBLAS product of as many operations 0.134 (703); moe_fast.cu 0.461, 0.595 and 0.530.  More in NOTES.md.

#include "tensor_cores.cuh"
#include "hopper.cuh"

constexpr int ROWS = 128, COLUMNS = 256, DEPTH = 64, STAGES = 4;
constexpr int CONSUMERS = 256, PRODUCERS = 128;  // threads
constexpr int SUMS = COLUMNS / 8;                // fours of sums in a thread

#if HOPPER
// One side of a product from its tile's first row (or column) on: `count` of them are there, `step` numbers lie between
// two lines of memory.
struct Side {
    const real* x;
    i64 step;
    int count;
};

// How a slice of a side lies in shared memory: lines of DEPTH numbers, one for each of SIZE rows, or, `across`, DEPTH
// lines of SIZE numbers.
template <int SIZE, bool across>
struct Slice {
    static constexpr bool ACROSS = across;
    static constexpr int BYTES = SIZE * DEPTH * 2;

    // All producers bring it from depth `at` on, of which `depth` are there; zeros beyond.
    static __device__ __forceinline__ void bring(char* to, const Side& side, int at, int depth)
    {
        constexpr int LINES = across ? DEPTH : SIZE, PIECES = (across ? SIZE : DEPTH) / 8;
        constexpr int LINES_A_ROUND = PRODUCERS / PIECES;
        const int thread = threadIdx.x % PRODUCERS, piece = thread % PIECES, first = thread / PIECES;
        const bool any = across ? 8 * piece < side.count : at + 8 * piece < depth;
        const int lines = any ? (across ? depth - at : side.count) : 0;
        const real* from = side.x + (across ? at * side.step : at) + first * side.step + 8 * piece;
        const i64 further = LINES_A_ROUND * side.step;
#pragma unroll 4
        for (int i = 0; i < LINES / LINES_A_ROUND; i++, from += further) {
            const int line = first + i * LINES_A_ROUND;
            copy_async(to + swizzled(LINES, line, piece), from, line < lines);  // what is not there is not read
        }
    }

    // What the tensor cores are told of rows from `row` on and 16 depths from k on.
    static __device__ __forceinline__ u64 at(const char* slice, int row, int k)
    {
        return across ? described(slice + row / PANEL * DEPTH * 128 + k * 128, DEPTH * 128)
                      : described(slice + row * 128 + 2 * k, 16);
    }
};

// A tile: its sides, the depth that they share, and where its results go; left.count rows, right.count columns of them.
template <typename number>
struct Tile {
    Side left, right;
    int depth;
    number* to;
    i64 step;
    bool add;
};

__device__ inline int tiles_in(int count, int size) { return (count + size - 1) / size; }

// y (R,O) = x (R,I) times the expert's matrix, (E,O,I), or (E,I,O) if `across`, whose I is what forward calls O.
template <bool across>
struct RowsTimesMatrix {
    typedef real number;
    static constexpr bool EVEN = true;  // tiles take equally long
    typedef Slice<ROWS, false> Left;
    typedef Slice<COLUMNS, across> Right;
    const real *x, *w;
    const int* offsets;
    real* y;
    int add, E, R, I, O;
    i64 x_step, y_step;

    __device__ void begin(int*) const {}
    // Behind the experts comes nobody, whose rows become zeros.
    __device__ int experts() const { return add ? E : E + 1; }
    __device__ int expert(int n, const int*) const { return n; }
    __device__ int count(int e) const { return (e < E ? offsets[e + 1] : R) - offsets[e]; }
    __device__ int tiles(int e) const { return tiles_in(count(e), ROWS) * tiles_in(O, COLUMNS); }
    __device__ Tile<real> tile(int e, int index) const
    {
        const int down = tiles_in(count(e), ROWS), first = index % down * ROWS, column = index / down * COLUMNS;
        const int rows = count(e) - first;
        const i64 row = offsets[e] + first;
        const real* matrix = w + (i64)(e < E ? e : 0) * O * I;
        return {{x + row * x_step, x_step, rows < ROWS ? rows : ROWS},
                {across ? matrix + column : matrix + (i64)column * I, across ? O : I, O - column},
                e < E ? I : 0, y + row * y_step + column, y_step, add != 0};
    }
};

// dw (E,O,I) += dy^T x of each expert's rows.
struct Matrices {
    typedef wide number;
    static constexpr bool EVEN = false;
    typedef Slice<ROWS, true> Left;
    typedef Slice<COLUMNS, true> Right;
    const real *dy, *x;
    const int* offsets;
    wide* dw;
    int E, I, O;
    i64 dy_step, x_step;

    // order (E,): experts by their rows, most first.
    __device__ void begin(int* order) const
    {
        for (int e = threadIdx.x; e < E; e += blockDim.x) {
            const int mine = count(e);
            int rank = 0;
            for (int other = 0; other < E; other++) {
                const int its = count(other);
                rank += its > mine || (its == mine && other < e);
            }
            order[rank] = e;
        }
    }
    __device__ int experts() const { return E; }
    __device__ int expert(int n, const int* order) const { return order[n]; }
    __device__ int count(int e) const { return offsets[e + 1] - offsets[e]; }
    __device__ int tiles(int e) const { return count(e) ? tiles_in(O, ROWS) * tiles_in(I, COLUMNS) : 0; }
    __device__ Tile<wide> tile(int e, int index) const
    {
        const int down = tiles_in(O, ROWS), row = index % down * ROWS, column = index / down * COLUMNS;
        const i64 first = offsets[e];
        return {{dy + first * dy_step + row, dy_step, O - row < ROWS ? O - row : ROWS},
                {x + first * x_step + column, x_step, I - column},
                count(e), dw + ((i64)e * O + row) * I + column, I, true};
    }
};

// A block's way through all tiles.  Those left for the last round, if they are few, are cut in two, 64 rows each: a
// tile of one warpgroup takes little more than half the time.
template <class Products>
struct Walk {
    const Products& products;
    const int* order;
    Tile<typename Products::number> tile;
    int n = 0, before = 0, round = 0, whole;  // which expert in turn, the tiles before its own; tiles before cut ones
    __device__ Walk(const Products& p, const int* o) : products(p), order(o)
    {
        if constexpr (Products::EVEN) {
            int all = 0;
#pragma unroll 1
            for (int e = 0; e < products.experts(); e++) all += products.tiles(e);
            const int left = all % gridDim.x;
            whole = 2 * left <= gridDim.x ? all - left : all;
        }
    }
    __device__ bool next()
    {
        int index = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        const bool cut = Products::EVEN && index >= whole;
        const int half = cut ? (index - whole) % 2 * 64 : 0;
        if (cut) index = whole + (index - whole) / 2;
        round++;
#pragma unroll 1
        for (; n < products.experts(); n++) {
            const int e = products.expert(n, order), tiles = products.tiles(e);
            if (index < before + tiles) {
                tile = products.tile(e, index - before);
                if (cut) {
                    const int rows = tile.left.count - half;
                    if (rows <= 0) tile.depth = 0;
                    tile.left.count = rows < 64 ? rows : 64;
                    tile.left.x += half * tile.left.step;
                    tile.to += half * tile.step;
                }
                return true;
            }
            before += tiles;
        }
        return false;
    }
};

// Shared memory: STAGES slices of both sides, barriers, and behind them the order of E experts.
struct Memory {
    static constexpr int STAGE = (ROWS + COLUMNS) * DEPTH * 2;
    static constexpr int BYTES = 1024 + STAGES * STAGE + 16 * STAGES;  // 1024: to align
    char* stages;
    u64 *here, *free;  // of each stage: has arrived, is no longer needed
    int* order;
    __device__ Memory(char* memory)
    {
        stages = memory + (-shared_address(memory) & 1023);
        here = (u64*)(stages + STAGES * STAGE);
        free = here + STAGES;
        order = (int*)(free + STAGES);
        for (int i = 0; i < STAGES && threadIdx.x == 0; i++) {
            barrier_begin(here + i, PRODUCERS);
            barrier_begin(free + i, CONSUMERS / 32);
        }
    }
};

template <class Products>
__device__ __forceinline__ void producer(const Products& products, const Memory& memory)
{
    Turn<STAGES> turn;
    for (Walk<Products> walk(products, memory.order); walk.next();) {
        const auto& tile = walk.tile;
        for (int at = 0; at < tile.depth; at += DEPTH, turn.next()) {
            char* stage = memory.stages + turn.stage * Memory::STAGE;
            barrier_wait(memory.free + turn.stage, turn.parity ^ 1);
            Products::Left::bring(stage, tile.left, at, tile.depth);
            Products::Right::bring(stage + Products::Left::BYTES, tile.right, at, tile.depth);
            barrier_arrive_behind_copies(memory.here + turn.stage);
        }
    }
    copies_issued();
    copies_arrived();  // a block must not end before them
}

// A warp's sixteen rows from `row` on, rounded, 16 bytes a lane and 64 bytes of a row at once.
__device__ __forceinline__ void store_sums(const Tile<real>& tile, int row, float (&sum)[SUMS][4])
{
    const int q = lane() % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = row + lane() / 4 + 8 * half;
        const int columns = r < tile.left.count ? tile.right.count : 0;
        real* to = tile.to + r * tile.step;
        if (tile.add)
#pragma unroll
            for (int j = 0; j < SUMS; j++)
                if (8 * j < columns) {
                    const float2 before = unpack(*(const u32*)(to + 8 * j + 2 * q));
                    sum[j][2 * half] += before.x;
                    sum[j][2 * half + 1] += before.y;
                }
#pragma unroll
        for (int j = 0; j < SUMS; j += 4) {
            u32 word[4];
#pragma unroll
            for (int i = 0; i < 4; i++) word[i] = pack(sum[j + i][2 * half], sum[j + i][2 * half + 1]);
            exchange(word);
            store_words(to + 8 * (j + q), word, 8 * (j + q) < columns);
        }
    }
}

// The same added to numbers in float: those of several columns are asked for before the first is awaited.
__device__ __forceinline__ void store_sums(const Tile<wide>& tile, int row, float (&sum)[SUMS][4])
{
    constexpr int AT_ONCE = SUMS / 4;
    const int odd = lane() % 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = row + lane() / 4 + 8 * half, column = 8 * odd + lane() % 4 / 2 * 4;
        const int columns = r < tile.left.count ? tile.right.count : 0;
        wide* to = tile.to + r * tile.step + column;
#pragma unroll
        for (int first = 0; first < SUMS; first += 2 * AT_ONCE) {
            float4 x[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int c = 8 * (first + 2 * i);
                x[i] = column + c < columns ? *(const float4*)(to + c) : make_float4(0, 0, 0, 0);
            }
            __syncwarp();  // else the compiler moves each behind the store before
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int j = first + 2 * i, c = 8 * j, h = 2 * half;
                const float a = __shfl_xor_sync(FULL_WARP, odd ? sum[j][h] : sum[j + 1][h], 1);
                const float b = __shfl_xor_sync(FULL_WARP, odd ? sum[j][h + 1] : sum[j + 1][h + 1], 1);
                x[i].x += odd ? a : sum[j][h];
                x[i].y += odd ? b : sum[j][h + 1];
                x[i].z += odd ? sum[j + 1][h] : a;
                x[i].w += odd ? sum[j + 1][h + 1] : b;
                if (column + c < columns) *(float4*)(to + c) = x[i];
            }
        }
    }
}

// Nobody's rows become zeros, sixteen of them from `row` on.
template <typename number>
__device__ inline void clear(const Tile<number>& tile, int row)
{
    constexpr int PIECE = 16 / sizeof(number);
#pragma unroll 1
    for (int r = row + lane() / 4; r < row + 16 && r < tile.left.count; r += 8)
        for (int c = lane() % 4 * PIECE; c < COLUMNS && c < tile.right.count; c += 4 * PIECE)
            *(int4*)(tile.to + r * tile.step + c) = int4{};
}

template <class Products>
__device__ __forceinline__ void consumer(const Products& products, const Memory& memory, int half)
{
    typedef typename Products::Left Left;
    typedef typename Products::Right Right;
    const int first = half * 64, row = first + threadIdx.x / 32 % 4 * 16;
    Turn<STAGES> turn;
    for (Walk<Products> walk(products, memory.order); walk.next();) {
        const int slices = tiles_in(walk.tile.depth, DEPTH);
        if (!slices) clear(walk.tile, row);
        if (!slices || first >= walk.tile.left.count) {  // no products here: only say so
#pragma unroll 1
            for (int s = 0; s < slices; s++, turn.next()) {
                barrier_wait(memory.here + turn.stage, turn.parity);
                __syncwarp();
                if (lane() == 0) barrier_arrive(memory.free + turn.stage);
            }
            continue;
        }
        float sum[SUMS][4];
        auto slice = [&](bool begun) {
            const char *left = memory.stages + turn.stage * Memory::STAGE, *right = left + Left::BYTES;
            barrier_wait(memory.here + turn.stage, turn.parity);
            show_products();
            hold(sum);
            order();
#pragma unroll
            for (int k = 0; k < DEPTH; k += 16)
                products_of<Left::ACROSS, Right::ACROSS>(
                    sum, Left::at(left, first, k), Right::at(right, 0, k), begun || k > 0);
            issued();
        };
        slice(false);
        int last = turn.stage;
        turn.next();
#pragma unroll 1
        for (int s = 1; s < slices; s++, turn.next()) {
            slice(true);
            finished<1>();
            if (lane() == 0) barrier_arrive(memory.free + last);
            last = turn.stage;
        }
        finished();
        hold(sum);
        if (lane() == 0) barrier_arrive(memory.free + last);
        store_sums(walk.tile, row, sum);
    }
}

template <class Products>
__device__ __forceinline__ void all_experts(const Products& products)
{
    SHARED_MEMORY(dynamic);
    const Memory memory(dynamic);
    products.begin(memory.order);
    __syncthreads();
    const int role = __shfl_sync(FULL_WARP, threadIdx.x / 128, 0);
    if (role == CONSUMERS / 128) {
        fewer_registers<56>();
        producer(products, memory);
    } else {
        more_registers<224>();
        consumer(products, memory, role);
    }
}
#endif

extern "C" __global__ void __launch_bounds__(384, 1) grouped_hopper_forward(
    const real* x, const real* w, const int* offsets, real* y, int E, int R, int I, int O, i64 x_step, i64 y_step)
{
#if HOPPER
    all_experts(RowsTimesMatrix<false>{x, w, offsets, y, 0, E, R, I, O, x_step, y_step});
#endif
}

extern "C" __global__ void __launch_bounds__(384, 1) grouped_hopper_backward_x(
    const real* dy, const real* w, const int* offsets, real* dx, int add, int E, int R, int I, int O, i64 dy_step,
    i64 dx_step)
{
#if HOPPER
    all_experts(RowsTimesMatrix<true>{dy, w, offsets, dx, add, E, R, O, I, dy_step, dx_step});
#endif
}

extern "C" __global__ void __launch_bounds__(384, 1) grouped_hopper_backward_w(
    const real* dy, const real* x, const int* offsets, wide* dw, int E, int I, int O, i64 dy_step, i64 x_step)
{
#if HOPPER
    all_experts(Matrices{dy, x, offsets, dw, E, I, O, dy_step, x_step});
#endif
}

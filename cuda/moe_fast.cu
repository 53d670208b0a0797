// One matrix product per expert on tensor cores, in bfloat16 or float16 with sums in float (as moe_products.cu; ops/moe.py;
// on Hopper moe_hopper.cu).
//
//   forward   y_e  = x_e w_e^T             rows times (O,I): both sides' depth runs along memory
//   backward  dx_e = dy_e w_e              the right side's depth runs across memory
//             dw_e += dy_e^T x_e, float    both sides' depth, the expert's rows, runs across memory
//
// A block has a tile of ROWS x COLUMNS results and walks the depth in slices of DEPTH; copies of the next STAGES - 1 slices
// are under way while one is multiplied.  Each warp has WARP_ROWS x WARP_COLUMNS of the tile in registers.
//
// Grid: as in moe_products.cu: forward and dx have blocks for as many tiles as there could be, each finds its own; dw has
// a block for each tile of each expert's matrix.
// Bytes: an operand once for each tile of the other side, mostly from cache: at 16,384 rows, C 1024 and F 2816 over 16
// experts (94 GFLOP: 0.16 ms at 600 TFLOP/s) 34 + 92 + 92 MB from memory (0.07 ms at 3.3 TB/s).
//
// I, O and all steps from row to row are multiples of 8, all addresses of 16 bytes (launchers/experts.py).

#ifndef MOE_COLUMNS  // bench/gpu_moe.py times others
#define MOE_COLUMNS 128
#define MOE_DEPTH 32
#define MOE_STAGES 4
#define MOE_WARP_COLUMNS 32
#endif
constexpr int ROWS = 128, COLUMNS = MOE_COLUMNS, DEPTH = MOE_DEPTH, STAGES = MOE_STAGES;
constexpr int WARP_ROWS = 64, WARP_COLUMNS = MOE_WARP_COLUMNS;
constexpr int WARPS_DOWN = ROWS / WARP_ROWS, THREADS = 32 * WARPS_DOWN * (COLUMNS / WARP_COLUMNS);

#if TENSOR_CORES
// One side of a product from its tile's first row (or column) on: `count` of them are there, `step` numbers lie between
// two lines of memory.
struct Side {
    const real* x;
    i64 step;
    int count;
};

// How a slice of a side lies in shared memory: a line is a row with DEPTH numbers, or, `across`, a depth with `size` rows.
template <int size, bool across>
struct Slice {
    static constexpr int lines = across ? DEPTH : size, line = across ? size : DEPTH, pitch = line + PAD;
    static constexpr int numbers = lines * pitch;

    // From depth `at` on, of which `depth` are there; zeros beyond.
    static __device__ inline void fetch(real* to, const Side& side, int at, int depth)
    {
        const real* from = side.x + (across ? at * side.step : at);
        const int lines_there = across ? depth - at : side.count, there_in_line = across ? side.count : depth - at;
#pragma unroll
        for (int n = threadIdx.x; n < lines * line / 8; n += THREADS) {
            const int l = n / (line / 8), c = n % (line / 8) * 8;
            const bool there = l < lines_there && c < there_in_line;
            copy_async(to + l * pitch + c, there ? from + l * side.step + c : side.x, there);
        }
    }
};

typedef float Sums[WARP_ROWS / 16][WARP_COLUMNS / 8][4];

// sums = this warp's part of the tile left right, over `depth`.
template <bool left_across, bool right_across>
__device__ __forceinline__ void product(Sums& sums, const Side& l, const Side& r, int depth)
{
    typedef Slice<ROWS, left_across> Left;
    typedef Slice<COLUMNS, right_across> Right;
    SHARED_MEMORY(memory);
    real* stages = (real*)memory;
    const int warp = threadIdx.x / 32, row = warp % WARPS_DOWN * WARP_ROWS, column = warp / WARPS_DOWN * WARP_COLUMNS;
    const int slices = (depth + DEPTH - 1) / DEPTH;
    for (int s = 0; s < STAGES - 1; s++) {
        real* stage = stages + s * (Left::numbers + Right::numbers);
        if (s < slices) {
            Left::fetch(stage, l, s * DEPTH, depth);
            Right::fetch(stage + Left::numbers, r, s * DEPTH, depth);
        }
        copies_issued();
    }
    for (int s = 0; s < slices; s++) {
        copies_arrived<STAGES - 2>();
        __syncthreads();  // slice s is here for all, and nobody reads slice s - 1 any more
        const int next = s + STAGES - 1;
        if (next < slices) {
            real* stage = stages + next % STAGES * (Left::numbers + Right::numbers);
            Left::fetch(stage, l, next * DEPTH, depth);
            Right::fetch(stage + Left::numbers, r, next * DEPTH, depth);
        }
        copies_issued();
        const real *x = stages + s % STAGES * (Left::numbers + Right::numbers), *y = x + Left::numbers;
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            u32 a[WARP_ROWS / 16][4], b[WARP_COLUMNS / 16][4];
#pragma unroll
            for (int i = 0; i < WARP_ROWS / 16; i++)
                if constexpr (left_across) left_transposed<Left::pitch>(a[i], x, row + 16 * i, k);
                else left<Left::pitch>(a[i], x, row + 16 * i, k);
#pragma unroll
            for (int j = 0; j < WARP_COLUMNS / 16; j++)
                if constexpr (right_across) right<Right::pitch>(b[j], y, k, column + 16 * j);
                else right_transposed<Right::pitch>(b[j], y, k, column + 16 * j);
#pragma unroll
            for (int i = 0; i < WARP_ROWS / 16; i++)
#pragma unroll
                for (int j = 0; j < WARP_COLUMNS / 16; j++) {
                    multiply(sums[i][2 * j], a[i], b[j][0], b[j][1]);
                    multiply(sums[i][2 * j + 1], a[i], b[j][2], b[j][3]);
                }
        }
    }
}

// store(row, column, first, second) for each pair of neighbours that this thread has, places counted in the block's tile.
template <typename function>
__device__ __forceinline__ void each_pair(const Sums& sums, function store)
{
    const int warp = threadIdx.x / 32;
    const int row = warp % WARPS_DOWN * WARP_ROWS + lane() / 4, column = warp / WARPS_DOWN * WARP_COLUMNS + lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < WARP_ROWS / 16; i++)
#pragma unroll
        for (int j = 0; j < WARP_COLUMNS / 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                store(row + 16 * i + 8 * half, column + 8 * j, sums[i][j][2 * half], sums[i][j][2 * half + 1]);
}

// Rows first .. end - 1, at most ROWS, are expert e's, or nobody's if e is E; none if there are fewer tiles.
struct Piece {
    int e, first, end;
    __device__ Piece(const int* offsets, int E, int R) : e(0), first(0), end(0)
    {
        for (int before = 0; e <= E; e++) {
            const int start = offsets[e], stop = e < E ? offsets[e + 1] : R, tiles = (stop - start + ROWS - 1) / ROWS;
            if ((int)blockIdx.y < before + tiles) {
                first = start + (blockIdx.y - before) * ROWS;
                end = first + ROWS < stop ? first + ROWS : stop;
                return;
            }
            before += tiles;
        }
    }
};

// y (R,O) = x (R,I) times the expert's matrix, (E,O,I), or (E,I,O) if `across`, whose I is what forward calls O.
template <bool across>
__device__ __forceinline__ void rows_times_matrix(const real* x, const real* w, const int* offsets, real* y, int E, int R,
                                                  int I, int O, i64 x_step, i64 y_step, int add)
{
    const Piece piece(offsets, E, R);
    if (piece.first == piece.end || (piece.e == E && add)) return;
    const int column = blockIdx.x * COLUMNS;
    Sums sums = {};
    if (piece.e < E) {
        const Side rows = {x + piece.first * x_step, x_step, piece.end - piece.first};
        const real* matrix = w + (i64)piece.e * O * I;
        const Side columns = {across ? matrix + column : matrix + (i64)column * I, across ? O : I, O - column};
        product<false, across>(sums, rows, columns, I);
    }
    each_pair(sums, [&](int r, int c, float low, float high) {
        r += piece.first;
        c += column;
        if (r >= piece.end || c >= O) return;
        u32* to = (u32*)(y + r * y_step + c);
        const float2 before = add ? unpack(*to) : make_float2(0, 0);
        *to = pack(before.x + low, before.y + high);
    });
}
#endif

extern "C" __global__ void __launch_bounds__(256) grouped_fast_forward(
    const real* x, const real* w, const int* offsets, real* y, int E, int R, int I, int O, i64 x_step, i64 y_step)
{
#if TENSOR_CORES
    rows_times_matrix<false>(x, w, offsets, y, E, R, I, O, x_step, y_step, 0);
#endif
}

extern "C" __global__ void __launch_bounds__(256) grouped_fast_backward_x(
    const real* dy, const real* w, const int* offsets, real* dx, int add, int E, int R, int I, int O, i64 dy_step,
    i64 dx_step)
{
#if TENSOR_CORES
    rows_times_matrix<true>(dy, w, offsets, dx, E, R, O, I, dy_step, dx_step, add);
#endif
}

extern "C" __global__ void __launch_bounds__(256) grouped_fast_backward_w(
    const real* dy, const real* x, const int* offsets, wide* dw, int I, int O, i64 dy_step, i64 x_step)
{
#if TENSOR_CORES
    const int e = blockIdx.z, first = offsets[e], count = offsets[e + 1] - first;
    if (!count) return;  // nothing to add
    const int row = blockIdx.y * ROWS, column = blockIdx.x * COLUMNS;
    const Side left = {dy + first * dy_step + row, dy_step, O - row}, right = {x + first * x_step + column, x_step, I - column};
    Sums sums = {};
    product<true, true>(sums, left, right, count);
    each_pair(sums, [&](int r, int c, float low, float high) {
        r += row;
        c += column;
        if (r >= O || c >= I) return;
        float2* to = (float2*)(dw + ((i64)e * O + r) * I + c);
        *to = make_float2(to->x + low, to->y + high);
    });
#endif
}

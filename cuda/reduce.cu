// Sums over rows that several operations share, in a fixed order and without atomics.
//
// A large sum is cut into slices, as many as the shape says; each slice is summed by one block and the
// slices are then added one after the other.  Bytes: the input once; the partial sums are small.

constexpr int AT_ONCE = 8;  // rows that a thread asks for before it adds the first

// A block has 16 threads side by side, each a pack of W columns (W = 1: 16 columns, and then the next), and 16 below
// each other, each every 16th row of the slice.  Their sums are added by one thread a column.
template <int W>
__device__ inline void sum_columns(const real* x, wide* partial, i64 rows, int J, i64 stride)
{
    __shared__ wide sums[16][16 * W + 16];  // number i of a thread's pack at 16 i + its x: all banks at once
    const int first = blockIdx.x * 16 * PACK, last = first + 16 * PACK < J ? first + 16 * PACK : J;
    for (int columns = first; columns < last; columns += 16 * W) {
        const int j = columns + threadIdx.x * W, thread = threadIdx.y * 16 + threadIdx.x;
        wide sum[W];
        for (int i = 0; i < W; i++) sum[i] = 0;
        for (i64 row = threadIdx.y; j < last && row < rows; row += AT_ONCE * 16) {
            Pack<W> some[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++)
                if (row + 16 * k < rows) some[k] = load<W>(x + (row + 16 * k) * stride + j);
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++)
                for (int i = 0; row + 16 * k < rows && i < W; i++) sum[i] += (wide)some[k].x[i];
        }
        for (int i = 0; i < W; i++) sums[threadIdx.y][16 * i + threadIdx.x] = sum[i];
        __syncthreads();
        const int column = columns + thread % 16 * W + thread / 16;
        if (thread < 16 * W && column < last) {
            wide all = sums[0][thread];
            for (int i = 1; i < 16; i++) all += sums[i][thread];
            partial[column] = all;
        }
        __syncthreads();
    }
}

// partial (slices,J): sums over each slice's rows of the first J columns of x (rows, ...), a row every
// `stride` elements.  Grid: 16 packs of columns and one slice a block.
extern "C" __global__ void __launch_bounds__(256) column_sums(
    const real* x, wide* partial, int rows, int J, i64 stride, int rows_a_slice)
{
    const i64 slice = gridDim.y - 1 - blockIdx.y;  // the last first: if x was just written, its end is in the cache
    const i64 first = slice * rows_a_slice, left = rows - first;
    x += first * stride;
    partial += slice * J;
    if (packed(J, x) && packed(stride)) sum_columns<PACK>(x, partial, left < rows_a_slice ? left : rows_a_slice, J, stride);
    else sum_columns<1>(x, partial, left < rows_a_slice ? left : rows_a_slice, J, stride);
}

// total[j] += the sum of partial[:, j], j < J, and second[j - J] += that of j >= J.  Grid: a block has 32 of all C columns,
// a thread every 32nd slice of one; it asks for 16 at once, as there is little to add and much to wait for.  Then a warp
// adds a column's 32 sums.
extern "C" __global__ void __launch_bounds__(1024) add_slices(
    const wide* partial, wide* total, wide* second, int slices, int J, int C)
{
    __shared__ wide sums[32][33];
    const int j = blockIdx.x * 32 + threadIdx.x, column = blockIdx.x * 32 + threadIdx.y;
    wide sum = 0;
    for (int start = threadIdx.y; start < slices; start += 16 * 32) {
        wide some[16];
#pragma unroll
        for (int i = 0; i < 16; i++)
            some[i] = j < C && start + 32 * i < slices ? partial[(i64)(start + 32 * i) * C + j] : 0;
#pragma unroll
        for (int i = 0; i < 16; i++) sum += some[i];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    sum = warp_sum(sums[threadIdx.x][threadIdx.y]);
    if (threadIdx.x == 0 && column < C) *(column < J ? total + column : second + column - J) += sum;
}

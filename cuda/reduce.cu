// Sums over rows that several operations share, in a fixed order and without atomics.
//
// A large sum is cut into slices, as many as the shape says; each slice is summed by one block and the
// slices are then added one after the other.  Bytes: the input once; the partial sums are small.

// partial (slices,J): sums over each slice's rows of the first J columns of x (rows, ...), a row every
// `stride` elements.  Grid: 32 columns and one slice a block.
extern "C" __global__ void column_sums(
    const real* x, wide* partial, int rows, int J, i64 stride, int rows_a_slice)
{
    __shared__ wide sums[8][32];
    const int j = blockIdx.x * 32 + threadIdx.x;
    const i64 first = (i64)blockIdx.y * rows_a_slice;
    const i64 end = first + rows_a_slice < rows ? first + rows_a_slice : rows;
    wide sum = 0;
    if (j < J)
        for (i64 row = first + threadIdx.y; row < end; row += 8) sum += (wide)x[row * stride + j];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && j < J) {
        for (int i = 1; i < 8; i++) sum += sums[i][threadIdx.x];
        partial[(i64)blockIdx.y * J + j] = sum;
    }
}

// total[j] += the sum of partial[:, j].  Grid: a block has 32 columns, a thread every 32nd slice of one; it asks for 16
// at once, as there is little to add and much to wait for.  Then a warp adds a column's 32 sums.
extern "C" __global__ void __launch_bounds__(1024) add_slices(const wide* partial, wide* total, int slices, int J)
{
    __shared__ wide sums[32][33];
    const int j = blockIdx.x * 32 + threadIdx.x, column = blockIdx.x * 32 + threadIdx.y;
    wide sum = 0;
    for (int start = threadIdx.y; start < slices; start += 16 * 32) {
        wide some[16];
#pragma unroll
        for (int i = 0; i < 16; i++)
            some[i] = j < J && start + 32 * i < slices ? partial[(i64)(start + 32 * i) * J + j] : 0;
#pragma unroll
        for (int i = 0; i < 16; i++) sum += some[i];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    sum = warp_sum(sums[threadIdx.x][threadIdx.y]);
    if (threadIdx.x == 0 && column < J) total[column] += sum;
}

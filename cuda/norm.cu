// RMSNorm, alone and with the residual sum before it (ops/norm.py).
//
//   y = x rstd w,  rstd = (mean(x^2) + eps)^-1/2
//   dx = rstd (dn - n mean(dn n)),  dw += sum over rows of dy n,  where n = x rstd, dn = dy w
//
// Grid: a warp takes a row (forward, dx).  dw: a block takes 32 columns and a slice of the rows; its
// partial sums are added slice by slice by add_slices (reduce.cu).
// Bytes: forward reads x (and delta), writes y (and z): the second look at a row comes from cache.
// Backward reads dy, x (and dz), writes dx, and reads dy and x once more for dw.

extern "C" __global__ void rmsnorm_forward(
    const real* x, const real* w, real* y, wide* rstd, int rows, int C, wide eps)
{
    const i64 row = warp_number();
    if (row >= rows) return;
    x += row * C;
    y += row * C;
    wide squares = 0;
    for (int c = lane(); c < C; c += 32) squares += (wide)x[c] * (wide)x[c];
    const wide r = 1 / sqrt(warp_sum(squares) / C + eps);
    for (int c = lane(); c < C; c += 32) y[c] = (wide)x[c] * r * (wide)w[c];
    if (lane() == 0) rstd[row] = r;
}

extern "C" __global__ void add_rmsnorm_forward(
    const real* x, const real* delta, const real* w, real* z, real* y, wide* rstd, int rows, int C, wide eps)
{
    const i64 row = warp_number();
    if (row >= rows) return;
    x += row * C;
    delta += row * C;
    z += row * C;
    y += row * C;
    wide squares = 0;
    for (int c = lane(); c < C; c += 32) {
        z[c] = (wide)x[c] + (wide)delta[c];
        squares += (wide)z[c] * (wide)z[c];  // what backward will read: rounded if z is
    }
    const wide r = 1 / sqrt(warp_sum(squares) / C + eps);
    for (int c = lane(); c < C; c += 32) y[c] = (wide)z[c] * r * (wide)w[c];
    if (lane() == 0) rstd[row] = r;
}

// dz is null, or the gradient that reaches z along the residual stream and is added.
extern "C" __global__ void rmsnorm_backward(
    const real* dz, const real* dy, const real* x, const real* w, const wide* rstd, real* dx, int rows, int C)
{
    const i64 row = warp_number();
    if (row >= rows) return;
    dy += row * C;
    x += row * C;
    dx += row * C;
    const wide r = rstd[row];
    wide along = 0;
    for (int c = lane(); c < C; c += 32) along += (wide)dy[c] * (wide)w[c] * ((wide)x[c] * r);
    along = warp_sum(along) / C;
    for (int c = lane(); c < C; c += 32) {
        const wide d = r * ((wide)dy[c] * (wide)w[c] - (wide)x[c] * r * along);
        dx[c] = dz ? (wide)dz[row * C + c] + d : d;
    }
}

// partial (slices,C): slice blockIdx.y has rows_a_slice rows, which 8 rows of threads share.
extern "C" __global__ void rmsnorm_backward_w(
    const real* dy, const real* x, const wide* rstd, wide* partial, int rows, int C, int rows_a_slice)
{
    __shared__ wide sums[8][32];
    const int c = blockIdx.x * 32 + threadIdx.x;
    const i64 first = (i64)blockIdx.y * rows_a_slice;
    const i64 end = first + rows_a_slice < rows ? first + rows_a_slice : rows;
    wide sum = 0;
    if (c < C)
        for (i64 row = first + threadIdx.y; row < end; row += 8)
            sum += (wide)dy[row * C + c] * ((wide)x[row * C + c] * rstd[row]);
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < C) {
        for (int i = 1; i < 8; i++) sum += sums[i][threadIdx.x];
        partial[(i64)blockIdx.y * C + c] = sum;
    }
}

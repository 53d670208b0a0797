// One token's product, y = W x + b (ops/linear.py), as decoding has it: cuBLAS is made for more rows.
//
// w (O,I), x (I,), b (J,) with J <= O, null for none, y (O,).  Sums in wide.
// Grid: `sharing` warps, 1, 2 or 4, take an output, 16 bytes a lane at a time; a block is 4 warps.
// Bytes: w once; x from cache.

constexpr int WARPS = 4;

// The sum of w x over every `step`-th pack from element `first` on.
template <int W>
__device__ inline wide products(const real* w, const real* x, int first, int step, int I)
{
    wide sum = 0;
#pragma unroll 4
    for (int i = first * W; i < I; i += step * W) {
        const Pack<W> a = load<W>(w + i), b = load<W>(x + i);
#pragma unroll
        for (int j = 0; j < W; j++) sum += (wide)a.x[j] * (wide)b.x[j];
    }
    return sum;
}

extern "C" __global__ void matvec(
    const real* x, const real* w, const real* b, real* y, int O, int I, int J, int sharing)
{
    __shared__ wide sums[WARPS];
    const int warp = threadIdx.x / 32, part = warp % sharing;
    const i64 o = (i64)blockIdx.x * (WARPS / sharing) + warp / sharing;
    wide sum = 0;
    if (o < O) {
        const int first = part * 32 + lane(), step = 32 * sharing;
        if (packed(I, x, w)) sum = products<PACK>(w + o * I, x, first, step, I);
        else sum = products<1>(w + o * I, x, first, step, I);
    }
    sum = warp_sum(sum);
    if (lane() == 0) sums[warp] = sum;
    __syncthreads();
    if (o >= O || part || lane()) return;
    for (int i = 1; i < sharing; i++) sum += sums[warp + i];
    y[o] = b && o < J ? sum + (wide)b[o] : sum;
}

// What is left of y = x W^T + b when cuBLAS has done the product, and the sum of two results (ops/linear.py).
//
// Grid: a thread a pack, again and again.  Bytes: the biased columns of y once in, once out; a sum two in, one out.
// The bias gradient is column_sums and add_slices (reduce.cu).

template <int W>
__device__ void add(real* y, const real* b, int rows, int J, i64 stride)
{
    for (EACH(n, (i64)rows * J / W)) {
        const i64 row = n * W / J, j = n * W % J;
        Pack<W> a = load<W>(y + row * stride + j);
        const Pack<W> bias = load<W>(b + j);
        for (int i = 0; i < W; i++) a.x[i] = (wide)a.x[i] + (wide)bias.x[i];
        store(y + row * stride + j, a);
    }
}

// b (J,) is added to the first J columns of y (rows, ...), a row every `stride` elements.
extern "C" __global__ void add_bias(real* y, const real* b, int rows, int J, i64 stride)
{
    if (packed(J, y, b) && packed(stride)) add<PACK>(y, b, rows, J, stride);
    else add<1>(y, b, rows, J, stride);
}

template <int W>
__device__ void add(const real* x, const real* y, real* total, i64 N)
{
    for (EACH(n, N / W)) {
        const Pack<W> a = load<W>(x + n * W), b = load<W>(y + n * W);
        Pack<W> sum;
        for (int i = 0; i < W; i++) sum.x[i] = (wide)a.x[i] + (wide)b.x[i];
        store(total + n * W, sum);
    }
}

extern "C" __global__ void add_arrays(const real* x, const real* y, real* total, i64 N)
{
    if (packed(N, x, y, total)) add<PACK>(x, y, total, N);
    else add<1>(x, y, total, N);
}

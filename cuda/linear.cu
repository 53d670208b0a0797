// What is left of y = x W^T + b when cuBLAS has done the product (ops/linear.py).
//
// Grid: a thread a pack, again and again.  Bytes: the biased columns of y once in, once out.
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

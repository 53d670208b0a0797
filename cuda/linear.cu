// What is left of y = x W^T + b when cuBLAS has done the product (ops/linear.py).
//
// Grid: a thread an element, again and again.  Bytes: the biased columns of y once in, once out.
// The bias gradient is column_sums and add_slices (reduce.cu).

// b (J,) is added to the first J columns of y (rows, ...), a row every `stride` elements.
extern "C" __global__ void add_bias(real* y, const real* b, int rows, int J, i64 stride)
{
    for (EACH(i, (i64)rows * J)) {
        const i64 row = i / J, j = i % J;
        y[row * stride + j] = (wide)y[row * stride + j] + (wide)b[j];
    }
}

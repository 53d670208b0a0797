// AdamW over flat buffers, and the norm of a gradient (ops/adamw.py).
//
//   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
//   p = p (1 - lr weight_decay) for the first `decayed`,  p = p - lr m' / (sqrt(v') + eps)
//
// Parameters, moments and gradients are wide whatever the activations are; `shadow`, where it is not
// null, gets the new parameters rounded to real, which is what the products then read.
// Grid: a thread an element, again and again.  Bytes: 4 N in, 3 N out (and the shadow).

// The gradient is scaled by *g_scale, a number on the device, so that clipping needs no host read.
// Where that is not above 0 (the norm was NaN or infinite) nothing is changed at all.
extern "C" __global__ void adamw(
    wide* p, const wide* g, wide* m, wide* v, real* shadow, i64 N, i64 decayed, double lr, double beta1, double beta2,
    double eps, double weight_decay, double correction1, double correction2, const double* g_scale)
{
    const wide scale = *g_scale;
    if (!(scale > 0)) return;
    const wide rest1 = 1 - beta1, rest2 = 1 - beta2, keep = 1 - lr * weight_decay, rate = lr / correction1;
    const wide c2 = correction2, least = eps;
    for (EACH(i, N)) {
        const wide gi = g[i] * scale;
        const wide mi = m[i] + rest1 * (gi - m[i]), vi = v[i] + rest2 * (gi * gi - v[i]);
        const wide kept = i < decayed ? p[i] * keep : p[i];
        m[i] = mi;
        v[i] = vi;
        p[i] = kept - rate * mi / (sqrt(vi / c2) + least);
        if (shadow) shadow[i] = p[i];
    }
}

// partial[b] = sum of squares of block b's slice, in double.
extern "C" __global__ void square_sums(const wide* g, double* partial, i64 N, i64 slice)
{
    const i64 first = blockIdx.x * slice, end = first + slice < N ? first + slice : N;
    double sum = 0;
    for (i64 i = first + threadIdx.x; i < end; i += blockDim.x) sum += (double)g[i] * (double)g[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// *norm = square root of the sum of `slices` partial sums.  Grid: one block.
extern "C" __global__ void norm_of_sums(const double* partial, double* norm, int slices)
{
    double sum = 0;
    for (int s = threadIdx.x; s < slices; s += blockDim.x) sum += partial[s];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *norm = sqrt(sum);
}

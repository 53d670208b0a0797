// AdamW over flat buffers, and the norm of a gradient (ops/adamw.py).
//
//   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
//   p = p (1 - lr weight_decay) for the first `decayed`,  p = p - lr m' / (sqrt(v') + eps)
//
// Parameters, moments and gradients are wide whatever the activations are; `shadow`, where it is not
// null, gets the new parameters rounded to real, which is what the products then read.
// Grid: a thread four elements, again and again.  Bytes: 4 N in, 3 N out (and the shadow).

struct alignas(4 * sizeof(wide)) Four {
    wide x[4];
};

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
    auto change = [&](i64 i, wide& p, wide g, wide& m, wide& v) {
        g *= scale;
        m += rest1 * (g - m);
        v += rest2 * (g * g - v);
        p = (i < decayed ? p * keep : p) - rate * m / (sqrt(v / c2) + least);
    };
    const i64 fours = N / 4;  // flat buffers begin where four fit
    for (EACH(n, fours)) {
        Four p4 = ((Four*)p)[n], m4 = ((Four*)m)[n], v4 = ((Four*)v)[n];
        const Four g4 = ((const Four*)g)[n];
        Pack<4> rounded;
        for (int j = 0; j < 4; j++) {
            change(4 * n + j, p4.x[j], g4.x[j], m4.x[j], v4.x[j]);
            rounded.x[j] = p4.x[j];
        }
        ((Four*)p)[n] = p4;
        ((Four*)m)[n] = m4;
        ((Four*)v)[n] = v4;
        if (shadow) store(shadow + 4 * n, rounded);
    }
    for (EACH(n, N - 4 * fours)) {
        const i64 i = 4 * fours + n;
        change(i, p[i], g[i], m[i], v[i]);
        if (shadow) shadow[i] = p[i];
    }
}

// partial[b] = sum of squares of what block b takes, in double.
extern "C" __global__ void square_sums(const wide* g, double* partial, i64 N)
{
    const i64 fours = (unsigned long long)g % sizeof(Four) ? 0 : N / 4;
    double sum = 0;
    auto add = [&](double x) { sum += x * x; };
#pragma unroll 4
    for (EACH(n, fours)) {
        const Four g4 = ((const Four*)g)[n];
        for (int j = 0; j < 4; j++) add(g4.x[j]);
    }
    for (EACH(n, N - 4 * fours)) add(g[4 * fours + n]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// *norm = square root of the sum of `slices` partial sums.  Grid: one block.
extern "C" __global__ void __launch_bounds__(1024) norm_of_sums(const double* partial, double* norm, int slices)
{
    double sum = 0;
    for (int s = threadIdx.x; s < slices; s += blockDim.x) sum += partial[s];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *norm = sqrt(sum);
}

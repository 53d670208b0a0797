// Adaptive-threshold spike counts (ops/spike.py; report, eq. 19 and 21).
//
//   vth = clamp(mean|x| / k) over a token's channels,  x_hat = rint(x / vth) vth
//
// Grid: lanes of a warp share a token (Row in common.cuh).  Bytes: x once in (the second look comes from cache),
// x_hat once out.

template <int W>
__device__ void forward(const real* x, real* x_hat, wide* vth, int rows, int C, wide k, wide vth_min, wide vth_max)
{
    for (Row r(rows, C, W); r.more(); r.next()) {
        const i64 row = r.at * C;
        wide sum = 0;
        for (int c = r.first; r.inside() && c < C; c += r.hop) {
            const Pack<W> a = load<W>(x + row + c);
            for (int i = 0; i < W; i++) sum += fabs((wide)a.x[i]);
        }
        wide threshold = lanes_sum(sum, r.lanes) / C / k;
        threshold = threshold < vth_min ? vth_min : threshold > vth_max ? vth_max : threshold;  // NaN stays NaN
        for (int c = r.first; r.inside() && c < C; c += r.hop) {
            Pack<W> a = load<W>(x + row + c);
            for (int i = 0; i < W; i++) a.x[i] = rint((wide)a.x[i] / threshold) * threshold;
            store(x_hat + row + c, a);
        }
        if (r.inside() && r.first == 0) vth[r.at] = threshold;
    }
}

extern "C" __global__ void spike_forward(
    const real* x, real* x_hat, wide* vth, int rows, int C, wide k, wide vth_min, wide vth_max)
{
    if (packed(C, x, x_hat)) forward<PACK>(x, x_hat, vth, rows, C, k, vth_min, vth_max);
    else forward<1>(x, x_hat, vth, rows, C, k, vth_min, vth_max);
}

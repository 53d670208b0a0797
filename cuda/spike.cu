// Adaptive-threshold spike counts (ops/spike.py; report, eq. 19 and 21).
//
//   vth = clamp(mean|x| / k) over a token's channels,  x_hat = rint(x / vth) vth
//
// Grid: a warp takes a token.  Bytes: x once in (the second look comes from cache), x_hat once out.

extern "C" __global__ void spike_forward(
    const real* x, real* x_hat, wide* vth, int rows, int C, wide k, wide vth_min, wide vth_max)
{
    const i64 row = warp_number();
    if (row >= rows) return;
    x += row * C;
    x_hat += row * C;
    wide sum = 0;
    for (int c = lane(); c < C; c += 32) sum += fabs((wide)x[c]);
    wide threshold = warp_sum(sum) / C / k;
    threshold = threshold < vth_min ? vth_min : threshold > vth_max ? vth_max : threshold;  // NaN stays NaN
    for (int c = lane(); c < C; c += 32) x_hat[c] = rint((wide)x[c] / threshold) * threshold;
    if (lane() == 0) vth[row] = threshold;
}

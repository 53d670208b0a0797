// RMSNorm, alone and with the residual sum before it (ops/norm.py).
//
//   y = x rstd w,  rstd = (mean(x^2) + eps)^-1/2
//   dx = rstd (dn - n mean(dn n)),  dw += sum over rows of dy n,  where n = x rstd, dn = dy w
//
// Grid: lanes of a warp share a row (Row in common.cuh) and then take another.  dw: every warp sums its own rows
// in shared memory; the sums of a block are one line of `partial`, and add_slices (reduce.cu) adds the lines.
// Bytes: forward reads x (and delta), writes y (and z): the second look at a row comes from cache.
// Backward reads dy, x (and dz) and writes dx.

// Packs of a row that a lane keeps in registers from the first look to the second, and asks for all at once;
// where a row is longer, the rest is looked at twice.
constexpr int KEPT = 4;

template <int W>
__device__ void forward(const real* x, const real* delta, const real* w, real* z, real* y, wide* rstd, int rows, int C,
                        wide eps)
{
    for (Row r(rows, C, W); r.more(); r.next()) {
        const i64 row = r.at * C;
        const int end = r.inside() ? C : 0;
        Pack<W> kept[KEPT], added[KEPT];
#pragma unroll
        for (int i = 0; i < KEPT; i++)
            if (r.first + i * r.hop < end) kept[i] = load<W>(x + row + r.first + i * r.hop);
#pragma unroll
        for (int i = 0; delta && i < KEPT; i++)
            if (r.first + i * r.hop < end) added[i] = load<W>(delta + row + r.first + i * r.hop);
        wide squares = 0;
        auto look = [&](Pack<W>& a, const Pack<W>& b, int c) {
            for (int i = 0; delta && i < W; i++) a.x[i] = (wide)a.x[i] + (wide)b.x[i];
            if (delta) store(z + row + c, a);
            for (int i = 0; i < W; i++) squares += (wide)a.x[i] * (wide)a.x[i];  // of what backward will read
        };
#pragma unroll
        for (int i = 0; i < KEPT; i++)
            if (r.first + i * r.hop < end) look(kept[i], added[i], r.first + i * r.hop);
        for (int c = r.first + KEPT * r.hop; c < end; c += r.hop) {
            Pack<W> a = load<W>(x + row + c), b;
            if (delta) b = load<W>(delta + row + c);
            look(a, b, c);
        }
        const wide scale = 1 / sqrt(lanes_sum(squares, r.lanes) / C + eps);
        auto scaled = [&](Pack<W> a, int c) {
            const Pack<W> b = load<W>(w + c);
            for (int i = 0; i < W; i++) a.x[i] = (wide)a.x[i] * scale * (wide)b.x[i];
            store(y + row + c, a);
        };
#pragma unroll
        for (int i = 0; i < KEPT; i++)
            if (r.first + i * r.hop < end) scaled(kept[i], r.first + i * r.hop);
        for (int c = r.first + KEPT * r.hop; c < end; c += r.hop) scaled(load<W>((delta ? z : x) + row + c), c);
        if (r.inside() && r.first == 0) rstd[r.at] = scale;
    }
}

// delta and z are null, or the sum z = x + delta is what is normed.
extern "C" __global__ void rmsnorm_forward(
    const real* x, const real* delta, const real* w, real* z, real* y, wide* rstd, int rows, int C, wide eps)
{
    if (packed(C, x, delta, w, z, y)) forward<PACK>(x, delta, w, z, y, rstd, rows, C, eps);
    else forward<1>(x, delta, w, z, y, rstd, rows, C, eps);
}

template <int W>
__device__ void backward(const real* dz, const real* dy, const real* x, const real* w, const wide* rstd, real* dx,
                         wide* sums, int rows, int C)
{
    for (Row r(rows, C, W); r.more(); r.next()) {
        const i64 row = r.at * C;
        const int end = r.inside() ? C : 0;
        const wide scale = r.inside() ? rstd[r.at] : 0;
        Pack<W> d[KEPT], a[KEPT], stream[KEPT];
#pragma unroll
        for (int i = 0; i < KEPT; i++)
            if (r.first + i * r.hop < end) {
                d[i] = load<W>(dy + row + r.first + i * r.hop);
                a[i] = load<W>(x + row + r.first + i * r.hop);
            }
#pragma unroll
        for (int i = 0; dz && i < KEPT; i++)
            if (r.first + i * r.hop < end) stream[i] = load<W>(dz + row + r.first + i * r.hop);
        wide along = 0;
        auto look = [&](const Pack<W>& d, const Pack<W>& a, int c) {
            const Pack<W> b = load<W>(w + c);
            for (int i = 0; i < W; i++) along += (wide)d.x[i] * (wide)b.x[i] * ((wide)a.x[i] * scale);
        };
#pragma unroll
        for (int i = 0; i < KEPT; i++)
            if (r.first + i * r.hop < end) look(d[i], a[i], r.first + i * r.hop);
        for (int c = r.first + KEPT * r.hop; c < end; c += r.hop)
            look(load<W>(dy + row + c), load<W>(x + row + c), c);
        along = lanes_sum(along, r.lanes) / C;
        auto found = [&](const Pack<W>& d, const Pack<W>& a, Pack<W> stream, int c) {
            const Pack<W> b = load<W>(w + c);
            for (int i = 0; i < W; i++) {
                const wide n = (wide)a.x[i] * scale, dn = scale * ((wide)d.x[i] * (wide)b.x[i] - n * along);
                stream.x[i] = dz ? (wide)stream.x[i] + dn : dn;
                sums[i * (C / W) + c / W] += (wide)d.x[i] * n;  // so that lanes next to each other meet no bank twice
            }
            store(dx + row + c, stream);
        };
#pragma unroll
        for (int i = 0; i < KEPT; i++)
            if (r.first + i * r.hop < end) found(d[i], a[i], stream[i], r.first + i * r.hop);
        for (int c = r.first + KEPT * r.hop; c < end; c += r.hop) {
            Pack<W> stream;
            if (dz) stream = load<W>(dz + row + c);
            found(load<W>(dy + row + c), load<W>(x + row + c), stream, c);
        }
    }
}

// dz is null, or the gradient that reaches z along the residual stream and is added.  partial (blocks,C).
// Where several rows share a warp each has its own line of sums.  Shared memory: a line of C for each of those.
extern "C" __global__ void rmsnorm_backward(
    const real* dz, const real* dy, const real* x, const real* w, const wide* rstd, real* dx, wide* partial, int rows,
    int C)
{
    SHARED_MEMORY(memory);
    wide* sums = (wide*)memory;
    const int W = packed(C, dz, dy, x, w, dx) ? PACK : 1;
    const int lanes = Row(rows, C, W).lanes, lines = blockDim.x / lanes;
    for (int i = threadIdx.x; i < lines * C; i += blockDim.x) sums[i] = 0;
    __syncthreads();
    wide* own = sums + threadIdx.x / lanes * C;
    if (W > 1) backward<PACK>(dz, dy, x, w, rstd, dx, own, rows, C);
    else backward<1>(dz, dy, x, w, rstd, dx, own, rows, C);
    __syncthreads();
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        wide sum = 0;
        for (int line = 0; line < lines; line++) sum += sums[line * C + c % W * (C / W) + c / W];
        partial[(i64)blockIdx.x * C + c] = sum;
    }
}

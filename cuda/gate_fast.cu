// The low-rank gate of linear attention on tensor cores: log g = logsigmoid(z) / divisor, z = x w^T + b (ops/gate.py).
//
// x (rows,R), a row every `stride` elements, of any alignment, R <= 16 or R <= 32; w (J,R), b (J,), log_g (rows,J) wide.
// backward:  dz = dlog_g sigmoid(-z) / divisor,  dx = dz w,  dw = dz^T x,  db = the sums of dz.  z is computed again, 16
// products an element: that is cheaper than to read it.  dz is rounded where products read it, not in db.
//
// A warp has 32 columns (its group) of 16 rows (its team's); the warps of a block are teams of ceil(J / 32) groups.
// Everything stays in registers: a result of one product, rounded, lies as an operand of the next, dx, and with its 8 x 8
// tiles transposed as that of dw.  Only dx is summed over the groups in shared memory.
// Grid: so many blocks as there is room for, each takes teams x 16 rows again and again.
// Bytes, N = 32,768 rows, R 16, J 128 in bfloat16: 1.0 MB of x, 16.8 MB of log_g or dlog_g, backward 1.0 MB of dx; so 6 us
// at 3 TB/s.  Operations: 0.13 GFLOP forward, 0.4 backward, nothing to tensor cores; the rest is 20 instructions an element.

#if TENSOR_CORES
// Column n of a warp's tile t, of 4.  Tiles come in pairs: what a lane has of both, columns 2 (l % 4) and one more of
// each, are four neighbours in a row, 16 bytes.
__device__ inline int column(int first, int t, int n) { return first + t / 2 * 16 + n / 2 * 4 + t % 2 * 2 + n % 2; }

// What a warp is in its block.
struct Place {
    int groups, group, team, teams, first;  // first: its first column
    __device__ Place(int J)
    {
        groups = (J + 31) / 32;
        group = threadIdx.x / 32 % groups;
        team = threadIdx.x / 32 / groups;
        teams = blockDim.x / 32 / groups;
        first = 32 * group;
    }
};

__device__ inline u32 word(unsigned short low, unsigned short high) { return low | (u32)high << 16; }

// x[0] and x[1], as far as there are `left`; zeros beyond.
__device__ inline u32 two(const real* x, int left)
{
    return word(left > 0 ? x[0].bits : 0, left > 1 ? x[1].bits : 0);
}

// Sixteen rows of x as first operands, zeros from row `inside` on.
template <int K>
__device__ inline void read_rows(u32 (&a)[K][4], const real* x, i64 stride, int inside, int R)
{
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = lane() / 4 + i % 2 * 8, c = 16 * k + lane() % 4 * 2 + i / 2 * 8;
            a[k][i] = two(x + r * stride + c, r < inside ? R - c : 0);
        }
}

// A warp's 32 columns of the gate, as operands: zeros from column J on.
template <int K>
struct Columns {
    u32 w[4][K][2];
    float b[4][2];
    __device__ Columns(const real* weights, const real* bias, int first, int J, int R)
    {
#pragma unroll
        for (int t = 0; t < 4; t++) {
            const int j = column(first, t, lane() / 4);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int biased = column(first, t, lane() % 4 * 2 + i);
                b[t][i] = biased < J ? (float)bias[biased] : 0;
#pragma unroll
                for (int k = 0; k < K; k++) {
                    const int r = 16 * k + 8 * i + lane() % 4 * 2;
                    w[t][k][i] = two(weights + (i64)j * R + r, j < J ? R - r : 0);
                }
            }
        }
    }
    // z of sixteen rows
    __device__ void product(float (&z)[4][4], const u32 (&a)[K][4]) const
    {
#pragma unroll
        for (int t = 0; t < 4; t++) {
#pragma unroll
            for (int i = 0; i < 4; i++) z[t][i] = b[t][i % 2];
#pragma unroll
            for (int k = 0; k < K; k++) multiply(z[t], a[k], w[t][k][0], w[t][k][1]);
        }
    }
};

// log(1 + e), 0 <= e <= 1, to 1.3e-7 of itself: a polynomial through Chebyshev's points.
__device__ inline float log_of_one_and(float e)
{
    constexpr float c[] = {-0.00317605705f, 0.0195425274f, -0.0563736132f, 0.105436238f, -0.152696671f,
                           0.196632743f,    -0.249516163f, 0.333297105f,   -0.499998926f};
    float sum = c[0];
#pragma unroll
    for (int i = 1; i < 9; i++) sum = sum * e + c[i];
    return e * (sum * e + 1);
}

__device__ inline float log_sigmoid(float z) { return (z < 0 ? z : 0) - log_of_one_and(quick_exp(-fabs(z))); }

// Four neighbours of a row, as far as there are `left`.  `quads`: every four of them lie on 16 bytes.
__device__ inline void write_four(float* to, const float (&x)[4], int left, bool quads)
{
    if (quads && left > 0) *(float4*)to = make_float4(x[0], x[1], x[2], x[3]);
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (!quads && i < left) to[i] = x[i];
}

__device__ inline void read_four(float (&x)[4], const float* from, int left, bool quads)
{
    float4 all = make_float4(0, 0, 0, 0);
    if (quads && left > 0) all = *(const float4*)from;
    if (!quads) {
        if (left > 0) all.x = from[0];
        if (left > 1) all.y = from[1];
        if (left > 2) all.z = from[2];
        if (left > 3) all.w = from[3];
    }
    x[0] = all.x;
    x[1] = all.y;
    x[2] = all.z;
    x[3] = all.w;
}

template <int K>
__device__ inline void forward(const real* x, i64 stride, const real* w, const real* b, float* log_g, int rows, int J,
                               int R, float share)
{
    const Place at(J);
    const Columns<K> gate(w, b, at.first, J, R);
    const bool quads = packed(J, log_g);
    const int step = 16 * at.teams * gridDim.x;
    for (int row = 16 * (blockIdx.x * at.teams + at.team); row < rows; row += step) {
        u32 a[K][4];
        float z[4][4];
        read_rows<K>(a, x + row * stride, stride, rows - row, R);
        gate.product(z, a);
#pragma unroll
        for (int pair = 0; pair < 2; pair++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = row + lane() / 4 + 8 * half, j = column(at.first, 2 * pair, lane() % 4 * 2);
                float out[4];
#pragma unroll
                for (int i = 0; i < 4; i++) out[i] = share * log_sigmoid(z[2 * pair + i / 2][2 * half + i % 2]);
                if (r < rows) write_four(log_g + (i64)r * J + j, out, J - j, quads);
            }
    }
}

// dlog_g of a warp's sixteen rows, in the places that z has; zeros outside.
__device__ inline void read_gradient(float (&d)[4][4], const float* dlog_g, int row, int rows, int first, int J)
{
    const bool quads = packed(J, dlog_g);
#pragma unroll
    for (int pair = 0; pair < 2; pair++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = row + lane() / 4 + 8 * half, j = column(first, 2 * pair, lane() % 4 * 2);
            float four[4];
            read_four(four, dlog_g + (i64)r * J + j, r < rows ? J - j : 0, quads);
#pragma unroll
            for (int i = 0; i < 4; i++) d[2 * pair + i / 2][2 * half + i % 2] = four[i];
        }
}

// partial (blocks, J R + J): dw and then db over a block's rows.  WARPS: of a block, at most.
template <int K, int WARPS>
__device__ inline void backward(const float* dlog_g, const real* x, i64 stride, const real* w, const real* b, real* dx,
                                i64 dx_stride, float* partial, int rows, int J, int R, float share)
{
    constexpr int WIDTH = 16 * K, KEPT = 16 * K + 8;  // numbers a lane keeps of dw and db
    __shared__ float sums[WARPS * (16 * WIDTH + 128)];
    const Place at(J);
    const Columns<K> gate(w, b, at.first, J, R);
    u32 w_back[2][2 * K][2];  // w as the second operand of dx: its columns are summed over
#pragma unroll
    for (int t = 0; t < 4; t++)
#pragma unroll
        for (int u = 0; u < 2 * K; u++) {
            const int j = column(at.first, t, lane() % 4 * 2), r = 8 * u + lane() / 4;
            w_back[t / 2][u][t % 2] = word(j < J && r < R ? w[(i64)j * R + r].bits : 0,
                                           j + 1 < J && r < R ? w[(i64)(j + 1) * R + r].bits : 0);
        }
    float kept[KEPT];  // dw [2][2 K][4], db [4][2]
#pragma unroll
    for (int i = 0; i < KEPT; i++) kept[i] = 0;

    const int a_round = 16 * at.teams, step = a_round * gridDim.x;
    int row = a_round * blockIdx.x + 16 * at.team;
    float d[4][4];
    u32 a[K][4];
    read_gradient(d, dlog_g, row, rows, at.first, J);
    read_rows<K>(a, x + row * stride, stride, rows - row, R);
    for (int start = a_round * blockIdx.x; start < rows; start += step) {
        float z[4][4];
        u32 dz[4][2];  // rows l / 4, and l / 4 + 8
        gate.product(z, a);
#pragma unroll
        for (int t = 0; t < 4; t++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                z[t][i] = share * d[t][i] * __fdividef(1, 1 + quick_exp(z[t][i]));
                kept[16 * K + 2 * t + i % 2] += z[t][i];
            }
            dz[t][0] = pack(z[t][0], z[t][1]);
            dz[t][1] = pack(z[t][2], z[t][3]);
        }
        row += step;
        read_gradient(d, dlog_g, row, rows, at.first, J);  // of the next round: it comes while this one goes on

        u32 rows_summed[K][4];  // x, its rows to be summed over
#pragma unroll
        for (int k = 0; k < K; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) rows_summed[k][i] = transposed(a[k][i]);
        read_rows<K>(a, x + row * stride, stride, rows - row, R);
        float part[2 * K][4];
#pragma unroll
        for (int u = 0; u < 2 * K; u++)
#pragma unroll
            for (int i = 0; i < 4; i++) part[u][i] = 0;
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            const u32(&one)[2] = dz[2 * pair], (&other)[2] = dz[2 * pair + 1];
            const u32 by_row[4] = {one[0], one[1], other[0], other[1]};
            const u32 by_column[4] = {transposed(one[0]), transposed(other[0]), transposed(one[1]), transposed(other[1])};
#pragma unroll
            for (int u = 0; u < 2 * K; u++) {
                multiply(part[u], by_row, w_back[pair][u][0], w_back[pair][u][1]);
                float(&dw)[4] = *(float(*)[4])(kept + 4 * (2 * K * pair + u));
                multiply(dw, by_column, rows_summed[u / 2][u % 2 * 2], rows_summed[u / 2][u % 2 * 2 + 1]);
            }
        }

        float* own = sums + threadIdx.x / 32 * 16 * WIDTH;
#pragma unroll
        for (int u = 0; u < 2 * K; u++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                own[(lane() / 4 + i / 2 * 8) * WIDTH + 8 * u + lane() % 4 * 2 + i % 2] = part[u][i];
        __syncthreads();
        for (int n = threadIdx.x; n < a_round * WIDTH; n += blockDim.x) {
            const int r = n / WIDTH, c = n % WIDTH;
            const float* parts = sums + r / 16 * at.groups * 16 * WIDTH + n % (16 * WIDTH);
            float sum = 0;
            for (int g = 0; g < at.groups; g++) sum += parts[g * 16 * WIDTH];
            if (c < R && start + r < rows) dx[(start + r) * dx_stride + c] = sum;
        }
        __syncthreads();
    }

    for (int team = 1; team < at.teams; team++) {  // one after the other: equal bits in every run
        float* theirs = sums + at.group * KEPT * 32 + lane();
        if (at.team == team)
#pragma unroll
            for (int i = 0; i < KEPT; i++) theirs[32 * i] = kept[i];
        __syncthreads();
        if (at.team == 0)
#pragma unroll
            for (int i = 0; i < KEPT; i++) kept[i] += theirs[32 * i];
        __syncthreads();
    }
    if (at.team > 0) return;
    float *dw = partial + blockIdx.x * (i64)(J * R + J), *db = dw + J * R;
#pragma unroll
    for (int pair = 0; pair < 2; pair++)
#pragma unroll
        for (int u = 0; u < 2 * K; u++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int j = column(at.first, 2 * pair + i / 2, lane() / 4), r = 8 * u + lane() % 4 * 2 + i % 2;
                if (j < J && r < R) dw[j * R + r] = kept[4 * (2 * K * pair + u) + i];
            }
#pragma unroll
    for (int t = 0; t < 4; t++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float sum = kept[16 * K + 2 * t + i];
            for (int far = 16; far >= 4; far /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, far);
            const int j = column(at.first, t, lane() % 4 * 2 + i);
            if (lane() < 4 && j < J) db[j] = sum;
        }
}
#endif

extern "C" __global__ void __launch_bounds__(512) low_rank_gate_forward_16(
    const real* x, i64 stride, const real* w, const real* b, wide* log_g, int rows, int J, int R, wide divisor)
{
#if TENSOR_CORES
    forward<1>(x, stride, w, b, log_g, rows, J, R, 1 / divisor);
#endif
}

extern "C" __global__ void __launch_bounds__(512) low_rank_gate_forward_32(
    const real* x, i64 stride, const real* w, const real* b, wide* log_g, int rows, int J, int R, wide divisor)
{
#if TENSOR_CORES
    forward<2>(x, stride, w, b, log_g, rows, J, R, 1 / divisor);
#endif
}

extern "C" __global__ void __launch_bounds__(512) low_rank_gate_backward_16(
    const wide* dlog_g, const real* x, i64 stride, const real* w, const real* b, real* dx, i64 dx_stride, wide* partial,
    int rows, int J, int R, wide divisor)
{
#if TENSOR_CORES
    backward<1, 16>(dlog_g, x, stride, w, b, dx, dx_stride, partial, rows, J, R, 1 / divisor);
#endif
}

extern "C" __global__ void __launch_bounds__(256) low_rank_gate_backward_32(
    const wide* dlog_g, const real* x, i64 stride, const real* w, const real* b, real* dx, i64 dx_stride, wide* partial,
    int rows, int J, int R, wide divisor)
{
#if TENSOR_CORES
    backward<2, 8>(dlog_g, x, stride, w, b, dx, dx_stride, partial, rows, J, R, 1 / divisor);
#endif
}

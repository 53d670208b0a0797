// W8ASpike: int8 weights times spike counts (ops/w8aspike.py; report, section 3.3 and appendix A.8), all in float32.
//
//   y = vth sum over groups of scale (sum over the group of w8 count) + b        the inner sum in int32, exact
//
// Equal bits with the CPU: |x| is summed in 32 lanes, groups are added in order, and no product is fused with its sum.
// Counts travel as int8: four products and their sum are one instruction (__dp4a).  The few counts beyond int8 are known
// by their blocks of 128 channels (`beyond`), where what is missing is worked out from x once more.
//
// Shapes: x (N,I), s (N,B 128) int8 filled up with zeros, beyond (N,B), B blocks of 128; w8 (O,I); scales (groups,O), one
// group a block or one in all; y (N,O).  With experts (E,O,I), (E,groups,O), and rows of x sorted by expert: expert e's
// begin at offsets[e].
// Grid: counts: a warp takes a token.  Few tokens: a warp takes a row of the weights, 512 bytes at once, for up to MANY
// tokens.  Many: a block takes 64 tokens and 64 rows, a thread 4 x 4 of them.
// Bytes: few tokens read the weights once for every MANY of them; many tokens read a tile once for each of the other side.

constexpr int BLOCK = 128, MANY = 4, TILE = 64, PER = 4;
constexpr int COUNT_MAX = 1 << 17, INT8_MAX = 127, WORDS = BLOCK / 4;

__device__ inline int clip(int t, int most) { return t > most ? most : t < -most ? -most : t; }

// rint(x / unit), 0 where that is no number.
__device__ inline int count_of(float x, float unit)
{
    const float t = rint(__fdiv_rn(x, unit));
    return t != t ? 0 : t > COUNT_MAX ? COUNT_MAX : t < -COUNT_MAX ? -COUNT_MAX : (int)t;
}

// The threshold of x (C), to all lanes of a warp; NaN if x is not finite.
__device__ inline float threshold(const float* x, int C, float k, float least, float most)
{
    float sum = 0;
    for (int c = lane(); c < C; c += 32) sum = __fadd_rn(sum, fabs(x[c]));
    sum = warp_sum(sum);
    const float vth = __fdiv_rn(__fdiv_rn(sum, C), k);
    if (!(sum <= 3.402823466e38f)) return __int_as_float(0x7fc00000);
    return vth < least ? least : vth > most ? most : vth;
}

// counts (N,C) may be null.
extern "C" __global__ void spike_int8(
    const float* x, int8* s, int* beyond, float* vth, int* counts, int N, int C, int blocks, float k, float least,
    float most)
{
    const i64 n = warp_number();
    if (n >= N) return;
    x += n * C;
    const float unit = threshold(x, C, k, least, most);
    for (int block = 0; block < blocks; block++) {
        bool outside = false;
        for (int c = block * BLOCK + lane(); c < (block + 1) * BLOCK; c += 32) {
            const int count = c < C ? count_of(x[c], unit) : 0;
            s[n * blocks * BLOCK + c] = clip(count, INT8_MAX);
            outside |= count > INT8_MAX || count < -INT8_MAX;
            if (counts && c < C) counts[n * C + c] = count;
        }
        const unsigned any = __ballot_sync(FULL_WARP, outside);
        if (lane() == 0) beyond[n * blocks + block] = any != 0;
    }
    if (lane() == 0) vth[n] = unit;
}

// --- the product ----------------------------------------------------------------------------------

// 16 weights from channel `at` on of a row of I; zeros beyond its end.
__device__ inline int4 weights(const int8* row, int at, int I, bool aligned)
{
    if (aligned && at + 16 <= I) return *(const int4*)(row + at);
    int words[4] = {};
    for (int i = 0; i < 16; i++)
        if (at + i < I) words[i / 4] |= (int)(unsigned char)row[at + i] << 8 * (i % 4);
    return {words[0], words[1], words[2], words[3]};
}

__device__ inline bool aligned_16(const int8* w, int I) { return I % 16 == 0 && (unsigned long long)w % 16 == 0; }

// What int8 left out, of the channels [at, end): sum of w8 (count - s).
__device__ inline int missing(const int8* row, const float* x, float vth, int at, int end)
{
    int sum = 0;
    for (int c = at; c < end; c++) {
        const int count = count_of(x[c], vth);
        sum += row[c] * (count - clip(count, INT8_MAX));
    }
    return sum;
}

__device__ inline float finished(float total, float vth, const float* b, int o)
{
    total = __fmul_rn(total, vth);
    return b ? __fadd_rn(total, b[o]) : total;
}

// Whose row n is: an expert, or E where it is nobody's.
__device__ inline int expert_of(const int* offsets, int E, int n)
{
    int e = 0;
    while (e < E && n >= offsets[e + 1]) e++;
    return e;
}

// offsets and b may be null.  `many` tokens a block: with experts one, as the next may be another's.
extern "C" __global__ void w8aspike_few(
    const float* x, const int8* s, const int* beyond, const float* vth, const int8* w, const float* scales, const float* b,
    const int* offsets, float* y, int E, int N, int I, int O, int groups, int many)
{
    const int o = warp_number(), blocks = (I + BLOCK - 1) / BLOCK, first = blockIdx.y * many, part = lane() / 8;
    if (o >= O) return;
    if (offsets) {
        const int e = expert_of(offsets, E, first);
        if (e == E) {
            if (lane() == 0) y[(i64)first * O + o] = 0;
            return;
        }
        w += (i64)e * O * I;
        scales += (i64)e * groups * O;
    }
    const bool aligned = aligned_16(w, I);
    w += (i64)o * I;
    float total[MANY] = {};
    int whole[MANY] = {};
    for (int at = 0; at < blocks; at += 4) {  // four blocks: eight lanes have one, each 16 channels
        const int block = at + part, channel = block * BLOCK + lane() % 8 * 16;
        const int4 weight = weights(w, channel, I, aligned);
#pragma unroll
        for (int t = 0; t < MANY; t++) {
            const i64 n = first + t;
            if (t >= many || n >= N) break;
            int sum = 0;
            if (block < blocks) {
                const int4 count = *(const int4*)(s + n * blocks * BLOCK + channel);
                sum = __dp4a(weight.x, count.x, __dp4a(weight.y, count.y, __dp4a(weight.z, count.z, __dp4a(weight.w, count.w, 0))));
                if (beyond[n * blocks + block]) sum += missing(w, x + n * I, vth[n], channel, channel + 16 < I ? channel + 16 : I);
            }
            sum = lanes_sum(sum, 8);
            for (int j = 0; j < 4; j++) {
                const int of_block = __shfl_sync(FULL_WARP, sum, 8 * j);
                if (groups == 1) whole[t] += of_block;
                else if (at + j < blocks)
                    total[t] = __fadd_rn(total[t], __fmul_rn(of_block, scales[(i64)(at + j) * O + o]));
            }
        }
    }
#pragma unroll
    for (int t = 0; t < MANY; t++)
        if (t < many && first + t < N && lane() == 0) {
            if (groups == 1) total[t] = __fadd_rn(0, __fmul_rn(whole[t], scales[o]));
            y[(i64)(first + t) * O + o] = finished(total[t], vth[first + t], b, o);
        }
}

// The rows [first, end) of x that this block takes: a tile of one expert's, as in moe_products.cu, or of all.
struct Piece {
    int e, first, end;
    __device__ Piece(const int* offsets, int E, int N) : e(0), first(blockIdx.y * TILE), end(N)
    {
        for (int before = 0; offsets && e <= E; e++) {
            const int start = offsets[e], stop = e < E ? offsets[e + 1] : N, tiles = (stop - start + TILE - 1) / TILE;
            first = start + (blockIdx.y - before) * TILE;
            end = stop;
            if ((int)blockIdx.y < before + tiles) break;
            before += tiles;
        }
        end = first + TILE < end ? first + TILE : end;
    }
};

extern "C" __global__ void __launch_bounds__(256) w8aspike_many(
    const float* x, const int8* s, const int* beyond, const float* vth, const int8* w, const float* scales, const float* b,
    const int* offsets, float* y, int E, int N, int I, int O, int groups)
{
    __shared__ int counts[TILE][WORDS + 1], weight[TILE][WORDS + 1];  // + 1: no bank conflicts
    const Piece piece(offsets, E, N);
    const int blocks = (I + BLOCK - 1) / BLOCK, row0 = blockIdx.x * TILE, thread = threadIdx.y * 16 + threadIdx.x;
    if (piece.first >= piece.end) return;
    if (offsets) {
        w += (i64)piece.e * O * I;
        scales += (i64)piece.e * groups * O;
    }
    const bool aligned = aligned_16(w, I), nobodys = offsets && piece.e == E;
    float total[PER][PER] = {};
    int sum[PER][PER] = {};
    for (int block = 0; block < blocks && !nobodys; block++) {
        __syncthreads();
        for (int i = thread; i < TILE * 8; i += 256) {
            const int r = i / 8, at = block * BLOCK + i % 8 * 16, n = piece.first + r;
            const int4 from = n < piece.end ? *(const int4*)(s + (i64)n * blocks * BLOCK + at) : int4{0, 0, 0, 0};
            const int4 of = row0 + r < O ? weights(w + (i64)(row0 + r) * I, at, I, aligned) : int4{0, 0, 0, 0};
            int *to = &counts[r][i % 8 * 4], *beside = &weight[r][i % 8 * 4];
            to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
            beside[0] = of.x, beside[1] = of.y, beside[2] = of.z, beside[3] = of.w;
        }
        __syncthreads();
#pragma unroll 8
        for (int c = 0; c < WORDS; c++)
#pragma unroll
            for (int i = 0; i < PER; i++)
#pragma unroll
                for (int j = 0; j < PER; j++)
                    sum[i][j] = __dp4a(counts[threadIdx.y + 16 * i][c], weight[threadIdx.x + 16 * j][c], sum[i][j]);
        const int end = (block + 1) * BLOCK < I ? (block + 1) * BLOCK : I;
#pragma unroll
        for (int i = 0; i < PER; i++) {
            const i64 n = piece.first + threadIdx.y + 16 * i;
            const bool more = n < piece.end && beyond[n * blocks + block];
#pragma unroll
            for (int j = 0; j < PER; j++) {
                const int o = row0 + threadIdx.x + 16 * j;
                if (more && o < O) sum[i][j] += missing(w + (i64)o * I, x + n * I, vth[n], block * BLOCK, end);
                if (groups > 1 || block == blocks - 1) {
                    const float scale = o < O ? scales[(i64)(groups > 1 ? block : 0) * O + o] : 0;
                    total[i][j] = __fadd_rn(total[i][j], __fmul_rn(sum[i][j], scale));
                    sum[i][j] = 0;
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < PER; i++)
#pragma unroll
        for (int j = 0; j < PER; j++) {
            const int n = piece.first + threadIdx.y + 16 * i, o = row0 + threadIdx.x + 16 * j;
            if (n < piece.end && o < O) y[(i64)n * O + o] = nobodys ? 0 : finished(total[i][j], vth[n], b, o);
        }
}

// x (N,I) = rows of w (V,I) times their scales (V).  Grid: a thread an element.
extern "C" __global__ void embedding_int8(
    const int* tokens, const int8* w, const float* scales, float* x, int N, int V, int I)
{
    for (EACH(i, (i64)N * I)) {
        const int token = tokens[i / I];
        const bool there = token >= 0 && token < V;
        x[i] = there ? __fmul_rn(w[(i64)token * I + i % I], scales[token]) : __int_as_float(0x7fc00000);
    }
}

// Softmax attention through a sliding window, in tiles (ops/attention.py; report, eq. 1-2).
//
// Shapes: q, o (B,T,H,D); k, v (B,S,G,D), S >= T: query t stands at position S - T + t and sees the keys
// at position - window + 1 .. position.  lse (B,T,H) wide: p = exp(score - lse).  D at most 256.
//
// The scores never exist at once.  A block takes a tile of queries of one head (o, dq) or a tile of keys of
// one key/value head (dk, dv) and walks the tiles of the other side that it can see:
//   forward   o  = p v,          with the softmax's maximum and sum kept up to date
//   backward  dq = scale ds k,   dk = scale ds^T q,   dv = p^T do,   ds = p (do v^T - delta)
// with p rebuilt from lse, and delta = sum over D of do * o.  Each gradient is written by one block, so
// nothing is added across blocks.
//
// Grid: x is (b, h) or (b, g), y a tile; 16 x 16 threads, each with PER x PER products of a tile.
// Bytes: a tile of one side is read once for each tile of the other that sees it, a slice of 32 channels
// at a time, mostly from cache.

constexpr int TILE = sizeof(wide) == 8 ? 32 : 64;  // queries or keys
constexpr int SLICE = 32;                          // channels of a head that are in shared memory at once
constexpr int PER = TILE / 16, WIDE_PER = SLICE / 16;
constexpr int SLICES = 256 / SLICE;

struct Tiles {
    wide left[TILE][SLICE + 1], right[TILE][SLICE + 1], weights[TILE][TILE + 1];  // + 1: no bank conflicts
};

// Rows of D channels, `stride` elements apart: one head of a (B,T,H,D) array.
struct Rows {
    const real* x;
    i64 stride;
    int count, D;
    __device__ Rows(const real* array, int b, int head, int count, int heads, int D)
        : x(array + ((i64)b * count * heads + head) * D), stride((i64)heads * D), count(count), D(D)
    {
    }
};

// A slice of TILE rows from row `first`; zeros beyond the array.
__device__ inline void load(wide (&to)[TILE][SLICE + 1], const Rows& rows, int first, int channel)
{
    for (int i = threadIdx.y * 16 + threadIdx.x; i < TILE * SLICE; i += 256) {
        const int r = first + i / SLICE, c = channel + i % SLICE;
        to[i / SLICE][i % SLICE] = r < rows.count && c < rows.D ? (wide)rows.x[r * rows.stride + c] : 0;
    }
}

// found[i][j] = sum over the channels of a's row and b's row: this thread's part of the tile a b^T.
__device__ inline void products(Tiles& tiles, wide (&found)[PER][PER], const Rows& a, int a0, const Rows& b, int b0)
{
    for (int i = 0; i < PER; i++)
        for (int j = 0; j < PER; j++) found[i][j] = 0;
    for (int channel = 0; channel < a.D; channel += SLICE) {
        __syncthreads();
        load(tiles.left, a, a0, channel);
        load(tiles.right, b, b0, channel);
        __syncthreads();
#pragma unroll 4
        for (int c = 0; c < SLICE; c++)
            for (int i = 0; i < PER; i++)
                for (int j = 0; j < PER; j++)
                    found[i][j] += tiles.left[threadIdx.y + 16 * i][c] * tiles.right[threadIdx.x + 16 * j][c];
    }
}

typedef wide Sum[SLICES][PER][WIDE_PER];  // this thread's part of TILE rows of D channels

// sum += weights x, over the TILE rows of x from row `first`.
__device__ inline void add_weighted(Tiles& tiles, Sum& sum, const Rows& x, int first)
{
#pragma unroll
    for (int s = 0; s < SLICES; s++) {
        if (s * SLICE >= x.D) break;
        __syncthreads();
        load(tiles.right, x, first, s * SLICE);
        __syncthreads();
#pragma unroll 4
        for (int n = 0; n < TILE; n++)
            for (int i = 0; i < PER; i++)
                for (int j = 0; j < WIDE_PER; j++)
                    sum[s][i][j] += tiles.weights[threadIdx.y + 16 * i][n] * tiles.right[n][threadIdx.x + 16 * j];
    }
}

__device__ inline void clear(Sum& sum)
{
#pragma unroll
    for (int s = 0; s < SLICES; s++)
        for (int i = 0; i < PER; i++)
            for (int j = 0; j < WIDE_PER; j++) sum[s][i][j] = 0;
}

// The tile of sums goes to `to`, rows laid out as in `like`; row i is multiplied by factor[i].
__device__ inline void store(const Sum& sum, real* to, const Rows& like, int first, const wide (&factor)[PER])
{
#pragma unroll
    for (int s = 0; s < SLICES; s++)
        for (int i = 0; i < PER; i++)
            for (int j = 0; j < WIDE_PER; j++) {
                const int r = first + threadIdx.y + 16 * i, c = s * SLICE + threadIdx.x + 16 * j;
                if (r < like.count && c < like.D) to[r * like.stride + c] = sum[s][i][j] * factor[i];
            }
}

__device__ inline bool visible(int query, int key, int T, int S, int window)
{
    const int position = S - T + query;
    return query < T && key <= position && key > position - window;
}

// The first tile of keys that the queries from `first` on see, and the end of the last one.
__device__ inline int first_key(int first, int T, int S, int window)
{
    const int key = S - T + first - window + 1;
    return key > 0 ? key / TILE * TILE : 0;
}

__device__ inline int end_of_keys(int first, int T, int S)
{
    const int end = S - T + first + TILE;
    return end < S ? end : S;
}

extern "C" __global__ void attention_forward(
    const real* q, const real* k, const real* v, real* o, wide* lse, int T, int S, int H, int G, int D, int window,
    wide scale)
{
    __shared__ Tiles tiles;
    const int b = blockIdx.x / H, h = blockIdx.x % H, g = h / (H / G), first = blockIdx.y * TILE;
    const Rows queries(q, b, h, T, H, D), keys(k, b, g, S, G, D), values(v, b, g, S, G, D);
    wide top[PER], total[PER], score[PER][PER];
    Sum sum;
    clear(sum);
    for (int i = 0; i < PER; i++) {
        top[i] = LOWEST;
        total[i] = 0;
    }
    const int end = end_of_keys(first, T, S);
    for (int key0 = first_key(first, T, S, window); key0 < end; key0 += TILE) {
        products(tiles, score, queries, first, keys, key0);
        wide shrink[PER];
        for (int i = 0; i < PER; i++) {
            const int query = first + threadIdx.y + 16 * i;
            wide highest = top[i], added = 0;
            for (int j = 0; j < PER; j++) {
                const int key = key0 + threadIdx.x + 16 * j;
                score[i][j] = visible(query, key, T, S, window) ? scale * score[i][j] : -INFINITE;
                highest = score[i][j] > highest ? score[i][j] : highest;
            }
            highest = lanes_max(highest, 16);
            for (int j = 0; j < PER; j++) {
                const wide p = exp(score[i][j] - highest);
                added += p;
                tiles.weights[threadIdx.y + 16 * i][threadIdx.x + 16 * j] = p;
            }
            shrink[i] = exp(top[i] - highest);
            total[i] = total[i] * shrink[i] + lanes_sum(added, 16);
            top[i] = highest;
        }
#pragma unroll
        for (int s = 0; s < SLICES; s++)
            for (int i = 0; i < PER; i++)
                for (int j = 0; j < WIDE_PER; j++) sum[s][i][j] *= shrink[i];
        add_weighted(tiles, sum, values, key0);
    }
    wide factor[PER];
    for (int i = 0; i < PER; i++) {
        const int query = first + threadIdx.y + 16 * i;
        factor[i] = 1 / total[i];
        if (threadIdx.x == 0 && query < T) lse[((i64)b * T + query) * H + h] = top[i] + log(total[i]);
    }
    store(sum, o + (queries.x - q), queries, first, factor);
}

// delta (B,T,H) = sum over D of do * o.  Grid: a warp takes a row.
extern "C" __global__ void attention_delta(const real* d_o, const real* o, wide* delta, i64 rows, int D)
{
    const i64 row = warp_number();
    if (row >= rows) return;
    wide sum = 0;
    for (int c = lane(); c < D; c += 32) sum += (wide)d_o[row * D + c] * (wide)o[row * D + c];
    sum = warp_sum(sum);
    if (lane() == 0) delta[row] = sum;
}

extern "C" __global__ void attention_backward_q(
    const real* d_o, const real* q, const real* k, const real* v, const wide* lse, const wide* delta, real* dq, int T,
    int S, int H, int G, int D, int window, wide scale)
{
    __shared__ Tiles tiles;
    const int b = blockIdx.x / H, h = blockIdx.x % H, g = h / (H / G), first = blockIdx.y * TILE;
    const Rows queries(q, b, h, T, H, D), upstream(d_o, b, h, T, H, D);
    const Rows keys(k, b, g, S, G, D), values(v, b, g, S, G, D);
    wide score[PER][PER], dp[PER][PER], factor[PER];
    Sum sum;
    clear(sum);
    const int end = end_of_keys(first, T, S);
    for (int key0 = first_key(first, T, S, window); key0 < end; key0 += TILE) {
        products(tiles, score, queries, first, keys, key0);
        products(tiles, dp, upstream, first, values, key0);
        for (int i = 0; i < PER; i++)
            for (int j = 0; j < PER; j++) {
                const int query = first + threadIdx.y + 16 * i, key = key0 + threadIdx.x + 16 * j;
                const i64 row = ((i64)b * T + query) * H + h;
                tiles.weights[threadIdx.y + 16 * i][threadIdx.x + 16 * j] =
                    visible(query, key, T, S, window) ? exp(scale * score[i][j] - lse[row]) * (dp[i][j] - delta[row]) : 0;
            }
        add_weighted(tiles, sum, keys, key0);
    }
    for (int i = 0; i < PER; i++) factor[i] = scale;
    store(sum, dq + (queries.x - q), queries, first, factor);
}

// dk (of_values 0) or dv (1): two launches of one walk, so that one tile of sums fits into registers.
// The R query heads of the group are walked one after the other.
extern "C" __global__ void attention_backward_kv(
    const real* d_o, const real* q, const real* k, const real* v, const wide* lse, const wide* delta, real* dkv,
    int of_values, int T, int S, int H, int G, int D, int window, wide scale)
{
    __shared__ Tiles tiles;
    const int b = blockIdx.x / G, g = blockIdx.x % G, R = H / G, first = blockIdx.y * TILE;
    const Rows keys(k, b, g, S, G, D), values(v, b, g, S, G, D);
    wide score[PER][PER], dp[PER][PER], factor[PER];
    Sum sum;
    clear(sum);
    // Queries at positions first .. first + TILE - 1 + window - 1 may see a key of this tile.
    const int past = S - T, from = first > past ? (first - past) / TILE * TILE : 0;
    const int reach = first + TILE - 1 + window - past, end = reach < T ? reach : T;
    for (int h = g * R; h < (g + 1) * R; h++) {
        const Rows queries(q, b, h, T, H, D), upstream(d_o, b, h, T, H, D);
        for (int query0 = from; query0 < end; query0 += TILE) {
            products(tiles, score, keys, first, queries, query0);
            if (!of_values) products(tiles, dp, values, first, upstream, query0);
            for (int i = 0; i < PER; i++)
                for (int j = 0; j < PER; j++) {
                    const int key = first + threadIdx.y + 16 * i, query = query0 + threadIdx.x + 16 * j;
                    const i64 row = ((i64)b * T + query) * H + h;
                    const bool seen = visible(query, key, T, S, window);
                    const wide p = seen ? exp(scale * score[i][j] - lse[row]) : 0;
                    tiles.weights[threadIdx.y + 16 * i][threadIdx.x + 16 * j] =
                        of_values ? p : seen ? p * (dp[i][j] - delta[row]) : 0;
                }
            add_weighted(tiles, sum, of_values ? upstream : queries, query0);
        }
    }
    for (int i = 0; i < PER; i++) factor[i] = of_values ? 1 : scale;
    store(sum, dkv + (keys.x - k), keys, first, factor);
}

// Decoding: q, o (B,1,H,D) over the first `count` slots of a cache k, v (B,S,G,D).  counted: where the count lies, for a
// step that is recorded once and replayed; null: it is `count`.
// Grid: a block of 16 warps takes a head; each warp walks every 16th slot with a running softmax.
// Bytes: the cache once for each query head of a group, from L2 after the first.
constexpr int WARPS = 16, LANE_CHANNELS = 256 / 32;

extern "C" __global__ void __launch_bounds__(512) attention_step(
    const real* q, const real* k, const real* v, real* o, int count, const int* counted, int S, int H, int G, int D,
    wide scale)
{
    __shared__ wide tops[WARPS], totals[WARPS], sums[WARPS][256];
    const int b = blockIdx.x / H, h = blockIdx.x % H, g = h / (H / G), warp = threadIdx.x / 32;
    wide query[LANE_CHANNELS], sum[LANE_CHANNELS], top = LOWEST, total = 0;
    if (counted) count = *counted;
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++) {
        const int c = lane() + 32 * i;
        query[i] = c < D ? (wide)q[((i64)b * H + h) * D + c] : 0;
        sum[i] = 0;
    }
#pragma unroll 4  // several slots are on their way at once
    for (int slot = warp; slot < count; slot += WARPS) {
        const i64 at = (((i64)b * S + slot) * G + g) * D;
        wide score = 0;
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i++)
            if (lane() + 32 * i < D) score += query[i] * (wide)k[at + lane() + 32 * i];
        score = scale * warp_sum(score);
        const wide highest = score > top ? score : top, shrink = exp(top - highest), p = exp(score - highest);
        top = highest;
        total = total * shrink + p;
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i++)
            if (lane() + 32 * i < D) sum[i] = sum[i] * shrink + p * (wide)v[at + lane() + 32 * i];
    }
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++) sums[warp][lane() + 32 * i] = sum[i];
    if (lane() == 0) {
        tops[warp] = top;
        totals[warp] = total;
    }
    __syncthreads();
    wide highest = tops[0], whole = 0;
    for (int w = 1; w < WARPS; w++) highest = tops[w] > highest ? tops[w] : highest;
    for (int w = 0; w < WARPS; w++) whole += totals[w] * exp(tops[w] - highest);
    for (int c = threadIdx.x; c < D; c += 32 * WARPS) {
        wide found = 0;
        for (int w = 0; w < WARPS; w++) found += sums[w][c] * exp(tops[w] - highest);
        o[((i64)b * H + h) * D + c] = found / whole;
    }
}

// One token's keys and values k, v (B,1,G,D), rows of G D, to `slot` of a cache (B,S,G,D).  where: as counted above.
// Grid: a thread an element of k.  Bytes: both once in and once out.
extern "C" __global__ void store_token(
    const real* k, const real* v, real* keys, real* values, int slot, const int* where, int B, int S, int row)
{
    if (where) slot = *where;
    for (EACH(i, (i64)B * row)) {
        const i64 at = (i / row * S + slot) * row + i % row;
        keys[at] = k[i];
        values[at] = v[i];
    }
}

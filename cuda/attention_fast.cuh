// What the kernels of attention on tensor cores share: how the other side's rows come into shared memory, which pairs of
// query and key are visible, and which queries and keys a warp has.  attention_fast.cu and attention_backward_fast.cu
// include it.
#pragma once

constexpr int STAGE = 64;  // rows of the other side that are brought at once

#if TENSOR_CORES
// Keys and values, or queries and their upstream gradients.
template <int D>
struct Stage {
    real x[STAGE][D + PAD], y[STAGE][D + PAD];
};

template <int D>
__device__ inline void fetch(Stage<D>& to, const real* x, const real* y, int stride, int first, int count)
{
#pragma unroll 1
    for (int i = threadIdx.x; i < STAGE * D / 8; i += blockDim.x) {
        const int r = i / (D / 8), c = i % (D / 8) * 8;
        const bool there = first + r < count;
        const i64 at = (i64)(there ? first + r : 0) * stride + c;
        copy_async(&to.x[r][c], x + at, there);
        copy_async(&to.y[r][c], y + at, there);
    }
}

// Of the pairs of `keys` keys from `key` and `queries` queries from `position`: is none visible, are all?
__device__ inline bool none_visible(int key, int keys, int position, int queries, int window)
{
    return key >= position + queries || key + keys <= position - window + 1;
}
__device__ inline bool all_visible(int key, int keys, int position, int queries, int window)
{
    return key + keys <= position + 1 && key >= position + queries - window;
}

// Products of pairs that are not visible become -inf.  behind: how far the first query is behind the first key.
// BY_QUERIES: rows are queries and columns keys, else the other way round.
template <bool BY_QUERIES, int TILES>
__device__ __forceinline__ void hide(float (&s)[TILES][4], int behind, int window)
{
    const int l = lane();
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + 8 * j + i % 2;
            const int distance = BY_QUERIES ? behind + row - column : behind + column - row;
            if ((unsigned)distance >= (unsigned)window) s[j][i] = -INFINITE;
        }
}

// The queries of a warp, and the keys that its block walks.  Few numbers, as they stay in registers.
struct Walk {
    int at, head, from;  // row of the first query in q (B T H), its head (B H), row of its group's first key in k
    int position;        // of the first query; beyond the text from S on
    int key, end;        // what the block sees
    __device__ Walk(int rows, int tiles, int T, int S, int H, int G, int window)
    {
        const int warp = threadIdx.x / 32, heads = blockDim.x / 32 / tiles, parts = H / heads;
        const int block = (gridDim.x - 1 - blockIdx.x) * tiles * rows;  // the last queries see most: they come first
        const int b = blockIdx.y / parts, h0 = blockIdx.y % parts * heads, h = h0 + warp / tiles;
        const int first = block + warp % tiles * rows;
        at = (b * T + first) * H + h;
        head = b * H + h;
        from = b * S * G + h0 / (H / G);
        position = S - T + first;
        const int seen = S - T + block - window + 1, last = S - T + block + tiles * rows;
        key = seen > 0 ? seen / STAGE * STAGE : 0;
        end = last < S ? last : S;
    }
};
#endif

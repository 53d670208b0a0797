// What Hopper's attention kernels share whose rows are queries: which rows a block has, which keys they see.
//
// A tile is 128 rows, 64 to a warpgroup.  A row is a query of one of the R = H / G heads of a group, in the order of
// memory, so that a tile is 128 / R neighbouring queries of all heads that share keys.
#pragma once

constexpr int ROWS = 64;  // of a warpgroup

#if HOPPER
// One tile: where its rows begin, and the keys in its reach.
struct Tile {
    int b, g, row, key, end;
    __device__ Tile(int index, int row_tiles, int T, int S, int R, int G, int window)
    {
        const int group = index / row_tiles, rows = T * R;
        b = group / G;
        g = group % G;
        row = (row_tiles - 1 - index % row_tiles) * 2 * ROWS;  // the last rows see most: they come first
        const int last = row + 2 * ROWS < rows ? row + 2 * ROWS - 1 : rows - 1, seen = S - T + row / R - window + 1;
        key = seen > 0 ? seen : 0;
        end = S - T + last / R + 1;
    }
};

// Products of pairs that are not visible become -inf.  distance: of each row's position from the key of column 0.
template <int TILES>
__device__ __forceinline__ void hide(float (&s)[TILES][4], const int (&distance)[2], int window)
{
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int column = lane() % 4 * 2 + 8 * j + i % 2;
            if ((unsigned)(distance[i / 2] - column) >= (unsigned)window) s[j][i] = -INFINITE;
        }
}

// A row of the sums, the lane's first or second (half), times `factor`.  Neighbouring lanes exchange words, so that each
// writes 8 bytes and a row's lanes 32.
template <int TILES>
__device__ __forceinline__ void store_row(real* row, bool inside, const float (&sum)[TILES][4], int half, float factor)
{
    const int odd = lane() % 2;
    real* to = row + lane() % 4 / 2 * 4;
#pragma unroll
    for (int e = 0; e < TILES; e += 2) {
        const u32 a = pack(factor * sum[e][2 * half], factor * sum[e][2 * half + 1]);
        const u32 b = pack(factor * sum[e + 1][2 * half], factor * sum[e + 1][2 * half + 1]);
        const u32 got = __shfl_xor_sync(FULL_WARP, odd ? a : b, 1);
        if (inside) *(Words*)(to + 8 * (e + odd)) = odd ? Words{got, b} : Words{a, got};
    }
}
#endif

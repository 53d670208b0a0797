/* Matrix product for the sizes of a training step, by strips of tile.h.

   C = op(A) op(B) (+ C).  B is packed once, by all threads, into panels as wide as a tile; then each
   thread takes a range of strips of C.  A panel of BLOCK_K rows stays in the first cache while a
   block of strips passes over it, and the block's part of A stays in the second.  Every value of C
   is summed by one thread in one order: bits depend neither on threads nor on a row's neighbours.
   Included twice, with REAL float and double; NAME(x) appends the type. */

#define COLUMNS (TILE_BYTES / (int64_t)sizeof(REAL))

/* Panels first .. last-1 of op(B) (k x n).  Block of K starting at p0: panels one after the other,
   each (block, COLUMNS), columns past n are zeros. */
static void NAME(gemm_pack)(int tb, int64_t k, int64_t n, const REAL *b, int64_t ldb, REAL *packed, int64_t first,
                            int64_t last) {
    const int64_t padded = (n + COLUMNS - 1) / COLUMNS * COLUMNS;
    for (int64_t p0 = 0; p0 < k; p0 += BLOCK_K) {
        const int64_t depth = k - p0 < BLOCK_K ? k - p0 : BLOCK_K;
        for (int64_t panel = first; panel < last; panel++) {
            REAL *to = packed + p0 * padded + panel * depth * COLUMNS;
            const int64_t j0 = panel * COLUMNS, width = n - j0 < COLUMNS ? n - j0 : COLUMNS;
            if (width < COLUMNS)
                for (int64_t i = 0; i < depth * COLUMNS; i++) to[i] = 0;
            if (tb) {
                for (int64_t j = 0; j < width; j++) {
                    const REAL *from = b + (j0 + j) * ldb + p0;
                    for (int64_t p = 0; p < depth; p++) to[p * COLUMNS + j] = from[p];
                }
            } else if (width == COLUMNS) {
                for (int64_t p = 0; p < depth; p++) {
                    const REAL *from = b + (p0 + p) * ldb + j0;
                    for (int64_t j = 0; j < COLUMNS; j++) to[p * COLUMNS + j] = from[j];
                }
            } else {
                for (int64_t p = 0; p < depth; p++)
                    for (int64_t j = 0; j < width; j++) to[p * COLUMNS + j] = b[(p0 + p) * ldb + j0 + j];
            }
        }
    }
}

/* Lay a strip of op(A) out as (depth, TILE_ROWS); rows past the last are zeros.  `left` rows of op(A)
   begin here: where there are 8 or more, a row of A is copied 8 wide, which is one vector, and the
   next copy covers what is too much. */
static void NAME(gemm_pack_strip)(int ta, int64_t left, int64_t depth, const REAL *a, int64_t lda, REAL *to) {
    const int64_t rows = left < TILE_ROWS ? left : TILE_ROWS;
    if (ta && left >= 8) {
        for (int64_t p = 0; p < depth; p++) memcpy(to + p * TILE_ROWS, a + p * lda, 8 * sizeof(REAL));
        return;
    }
    for (int64_t p = 0; p < depth; p++)
        for (int64_t i = 0; i < TILE_ROWS; i++)
            to[p * TILE_ROWS + i] = i >= rows ? 0 : ta ? a[p * lda + i] : a[i * lda + p];
}

/* One tile of C or TILES of them (columns: of C), from a packed strip of A and from rows of A where they
   stand.  Two functions, so that the compiler knows the steps through A: with steps in variables the same
   loop is a third slower. */
FLATTEN static void NAME(tile_packed)(int64_t columns, int64_t depth, const REAL *a, const REAL *panel, REAL *c,
                                      int64_t ldc, int add) {
    NAME(strip)(columns, depth, a, 1, TILE_ROWS, panel, COLUMNS, depth * COLUMNS, c, ldc, add);
}

FLATTEN static void NAME(tile_rows)(int64_t columns, int64_t depth, const REAL *a, int64_t lda, const REAL *panel,
                                    REAL *c, int64_t ldc, int add) {
    NAME(strip)(columns, depth, a, lda, 1, panel, COLUMNS, depth * COLUMNS, c, ldc, add);
}

/* Where C ends inside: rows x width of what is computed are wanted. */
static void NAME(tile_edge)(int64_t rows, int64_t width, int64_t columns, int64_t depth, const REAL *packed_strip,
                            const REAL *panel, REAL *c, int64_t ldc, int add) {
    REAL edge[TILE_ROWS * TILES * COLUMNS];
    NAME(tile_packed)(columns, depth, packed_strip, panel, edge, columns, 0);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < width; j++) c[i * ldc + j] = edge[i * columns + j] + (add ? c[i * ldc + j] : 0);
}

/* Strips first .. last-1 of C (m x n), TILE_ROWS rows each.  own: room for BLOCK_STRIPS packed
   strips and 2 values, used where A is transposed or C ends inside a tile. */
static void NAME(gemm_strips)(int ta, int64_t m, int64_t n, int64_t k, const REAL *a, int64_t lda, const REAL *packed,
                              int accumulate, REAL *c, int64_t ldc, int64_t first, int64_t last, REAL *own) {
    const int64_t padded = (n + COLUMNS - 1) / COLUMNS * COLUMNS;
    for (int64_t p0 = 0; p0 < k; p0 += BLOCK_K) {
        const int64_t depth = k - p0 < BLOCK_K ? k - p0 : BLOCK_K;
        const int add = accumulate || p0 > 0;
        for (int64_t low = first; low < last; low += BLOCK_STRIPS) {
            const int64_t high = low + BLOCK_STRIPS < last ? low + BLOCK_STRIPS : last;
            const int packing = ta || high * TILE_ROWS > m || n < padded;
            for (int64_t strip = low; packing && strip < high; strip++) {
                const int64_t i0 = strip * TILE_ROWS;
                NAME(gemm_pack_strip)(ta, m - i0, depth, ta ? a + p0 * lda + i0 : a + i0 * lda + p0, lda,
                                      own + (strip - low) * depth * TILE_ROWS);
            }
            for (int64_t j = 0, columns; j < n; j += columns) {
                const REAL *panel = packed + p0 * padded + j * depth;
                columns = padded - j < TILES * COLUMNS ? COLUMNS : TILES * COLUMNS;
                const int64_t width = n - j < columns ? n - j : columns;
                for (int64_t strip = low; strip < high; strip++) {
                    const int64_t i0 = strip * TILE_ROWS, rows = m - i0 < TILE_ROWS ? m - i0 : TILE_ROWS;
                    const REAL *mine = own + (strip - low) * depth * TILE_ROWS;
                    REAL *to = c + i0 * ldc + j;
                    if (rows < TILE_ROWS || width < columns)
                        NAME(tile_edge)(rows, width, columns, depth, mine, panel, to, ldc, add);
                    else if (packing)
                        NAME(tile_packed)(columns, depth, mine, panel, to, ldc, add);
                    else
                        NAME(tile_rows)(columns, depth, a + i0 * lda + p0, lda, panel, to, ldc, add);
                }
            }
        }
    }
}
#undef COLUMNS

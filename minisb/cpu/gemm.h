/* Matrix product for the sizes of a training step, by strips of tile.h.

   C = op(A) op(B) (+ C).  B is packed once, by all threads, into panels as wide as a tile; then each
   thread takes a range of strips of C.  A panel of BLOCK_K rows stays in the first cache while a
   block of strips passes over it, and the block's part of A stays in the second.  Every value of C
   is summed by one thread in one order: bits depend neither on threads nor on a row's neighbours.
   Included twice, with REAL float and double; NAME(x) appends the type. */

#define COLUMNS (TILE_BYTES / (int64_t)sizeof(REAL))

/* Rows of x (rows x n) in slices of `unit` columns, first .. last-1: each is (depth, unit), a column past
   n zeros.  to: where the first row of slice `first` goes; slices are depth * unit values apart.  Eight slices
   at a time: where a slice ends inside a cache line, the next takes the rest while it is at hand. */
static inline void NAME(slices_of)(const int64_t unit, int64_t n, int64_t rows, const REAL *x, int64_t ldx,
                                   int64_t depth, REAL *to, int64_t first, int64_t last) {
    const int64_t whole = n / unit < last ? n / unit : last, width = n - whole * unit;
    for (int64_t low = first; low < whole; low += 8)
        for (int64_t p = 0; p < rows; p++)
            for (int64_t slice = low; slice < whole && slice < low + 8; slice++)
                memcpy(to + ((slice - first) * depth + p) * unit, x + p * ldx + slice * unit, unit * sizeof(REAL));
    for (int64_t p = 0; whole < last && p < rows; p++)
        for (int64_t j = 0; j < unit; j++)
            to[((whole - first) * depth + p) * unit + j] = j < width ? x[p * ldx + whole * unit + j] : 0;
}

/* Slices as wide as a strip is high, for x^T on the left of a product, and as wide as a tile, for x on its right. */
FLATTEN static void NAME(slice_strips)(int64_t n, int64_t rows, const REAL *x, int64_t ldx, int64_t depth, REAL *to,
                                       int64_t first, int64_t last) {
    NAME(slices_of)(TALL_ROWS, n, rows, x, ldx, depth, to, first, last);
}

FLATTEN static void NAME(slice_panels)(int64_t n, int64_t rows, const REAL *x, int64_t ldx, int64_t depth, REAL *to,
                                       int64_t first, int64_t last) {
    NAME(slices_of)(COLUMNS, n, rows, x, ldx, depth, to, first, last);
}

/* The same of x^T: columns of slices are rows of x (n x depth). */
static void NAME(slices_of_rows)(const int64_t unit, int64_t n, int64_t depth, const REAL *x, int64_t ldx, REAL *to,
                                 int64_t first, int64_t last) {
    for (int64_t slice = first; slice < last; slice++, to += depth * unit) {
        const int64_t j0 = slice * unit, width = n - j0 < unit ? n - j0 : unit;
        for (int64_t i = 0; width < unit && i < depth * unit; i++) to[i] = 0;
        for (int64_t j = 0; j < width; j++)
            for (int64_t p = 0; p < depth; p++) to[p * unit + j] = x[(j0 + j) * ldx + p];
    }
}

/* Panels first .. last-1 of op(B) (k x n), block of K after block: in each, panels one after the other. */
static void NAME(gemm_pack)(int tb, int64_t k, int64_t n, const REAL *b, int64_t ldb, REAL *packed, int64_t first,
                            int64_t last) {
    const int64_t padded = (n + COLUMNS - 1) / COLUMNS * COLUMNS;
    for (int64_t p0 = 0; p0 < k; p0 += BLOCK_K) {
        const int64_t depth = k - p0 < BLOCK_K ? k - p0 : BLOCK_K;
        REAL *to = packed + p0 * padded + first * depth * COLUMNS;
        if (tb)
            NAME(slices_of_rows)(COLUMNS, n, depth, b + p0, ldb, to, first, last);
        else
            NAME(slice_panels)(n, depth, b + p0 * ldb, ldb, depth, to, first, last);
    }
}

/* One tile of C or TILES of them (columns: of C), from a packed strip of A and from rows of A where they
   stand.  Two functions, so that the compiler knows the steps through A: with steps in variables the same
   loop is a third slower. */
FLATTEN static void NAME(tile_packed)(int64_t columns, int64_t depth, const REAL *a, const REAL *panel, REAL *c,
                                      int64_t ldc, int add) {
    NAME(strip_tall)(columns, depth, a, 1, TALL_ROWS, panel, COLUMNS, depth * COLUMNS, c, ldc, add);
}

FLATTEN static void NAME(tile_rows)(int64_t columns, int64_t depth, const REAL *a, int64_t lda, const REAL *panel,
                                    REAL *c, int64_t ldc, int add) {
    NAME(strip_tall)(columns, depth, a, lda, 1, panel, COLUMNS, depth * COLUMNS, c, ldc, add);
}

/* Where C ends inside: rows x width of what is computed are wanted. */
static void NAME(tile_edge)(int64_t rows, int64_t width, int64_t columns, int64_t depth, const REAL *packed_strip,
                            const REAL *panel, REAL *c, int64_t ldc, int add) {
    REAL edge[TALL_ROWS * TILES * COLUMNS];
    NAME(tile_packed)(columns, depth, packed_strip, panel, edge, columns, 0);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < width; j++) c[i * ldc + j] = edge[i * columns + j] + (add ? c[i * ldc + j] : 0);
}

/* Strips first .. last-1 of C (m x n) (+)= A B, depth at most BLOCK_K.  strips: A's, packed, from the first
   on; without them rows of A are read where they stand, which C must have TALL_ROWS and whole tiles for. */
static void NAME(gemm_block)(int64_t m, int64_t n, int64_t depth, const REAL *strips, const REAL *a, int64_t lda,
                             const REAL *panels, int add, REAL *c, int64_t ldc, int64_t first, int64_t last) {
    const int64_t padded = (n + COLUMNS - 1) / COLUMNS * COLUMNS;
    for (int64_t j = 0, columns; j < n; j += columns) {
        const REAL *panel = panels + j * depth;
        columns = padded - j < TILES * COLUMNS ? COLUMNS : TILES * COLUMNS;
        const int64_t width = n - j < columns ? n - j : columns;
        for (int64_t strip = first; strip < last; strip++) {
            const int64_t i0 = strip * TALL_ROWS, rows = m - i0 < TALL_ROWS ? m - i0 : TALL_ROWS;
            const REAL *packed = strips ? strips + (strip - first) * depth * TALL_ROWS : NULL;
            REAL *to = c + i0 * ldc + j;
            if (rows < TALL_ROWS || width < columns)
                NAME(tile_edge)(rows, width, columns, depth, packed, panel, to, ldc, add);
            else if (strips)
                NAME(tile_packed)(columns, depth, packed, panel, to, ldc, add);
            else
                NAME(tile_rows)(columns, depth, a + i0 * lda, lda, panel, to, ldc, add);
        }
    }
}

/* Strips first .. last-1 of C (m x n) (+)= op(A) B.  own: room for BLOCK_STRIPS packed strips, used where
   A is transposed or C ends inside a tile. */
static void NAME(gemm_strips)(int ta, int64_t m, int64_t n, int64_t k, const REAL *a, int64_t lda, const REAL *packed,
                              int accumulate, REAL *c, int64_t ldc, int64_t first, int64_t last, REAL *own) {
    const int64_t padded = (n + COLUMNS - 1) / COLUMNS * COLUMNS;
    for (int64_t p0 = 0; p0 < k; p0 += BLOCK_K) {
        const int64_t depth = k - p0 < BLOCK_K ? k - p0 : BLOCK_K;
        const REAL *from = a + (ta ? p0 * lda : p0);
        for (int64_t low = first; low < last; low += BLOCK_STRIPS) {
            const int64_t high = low + BLOCK_STRIPS < last ? low + BLOCK_STRIPS : last;
            const int packing = ta || high * TALL_ROWS > m || n < padded;
            if (ta)
                NAME(slice_strips)(m, depth, from, lda, depth, own, low, high);
            else if (packing)
                NAME(slices_of_rows)(TALL_ROWS, m, depth, from, lda, own, low, high);
            NAME(gemm_block)(m, n, depth, packing ? own : NULL, from, lda, packed + p0 * padded, accumulate || p0 > 0,
                             c, ldc, low, high);
        }
    }
}
#undef COLUMNS

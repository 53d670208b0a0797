// One matrix product per expert, all in one launch (ops/moe.py, grouped_forward and grouped_backward).
//
// x (R,I) and y (R,O) have rows sorted by expert, rows offsets[e] .. offsets[e+1] - 1 are expert e's; w (E,O,I):
//   forward   y_e  = x_e w_e^T
//   backward  dx_e = dy_e w_e,   dw_e += dy_e^T x_e
// The rows of x, y, dy and dx may be apart; those past the last expert's are set to zero.
//
// Grid: forward and dx: y is a tile of one expert's rows, x one of the columns.  Only the GPU knows how many tiles an
// expert has, so there are as many blocks as there could be at most, R / TILE + E + 1, and each finds its tile by walking
// the offsets; those beyond the last tile return.  dw: x and y are a tile of one expert's matrix, z the expert.
// 16 x 16 threads with 4 x 4 results each.  Bytes: each operand once for each tile of the other side, mostly from cache.

constexpr int TILE = 64, DEPTH = 16, PER = TILE / 16;

// A matrix whose element (i, j) lies at x[i * step + j], or of its transposed.
struct Matrix {
    const real* x;
    i64 step;
    int rows, columns;
    bool transposed;  // x is stored (columns x rows)
    __device__ wide at(int i, int j) const
    {
        return i < rows && j < columns ? (wide)x[transposed ? j * step + i : i * step + j] : 0;
    }
};

struct Tiles {
    wide left[DEPTH][TILE + 4], right[DEPTH][TILE + 4];  // + 4: rows of a tile in different banks, and still aligned
};

// found = this thread's part of the TILE x TILE tile at (row, column) of a b: rows row + 4 threadIdx.y .., columns alike.
__device__ inline void product(Tiles& tiles, wide (&found)[PER][PER], const Matrix& a, const Matrix& b, int row, int column)
{
    const int thread = threadIdx.y * 16 + threadIdx.x;
    for (int i = 0; i < PER; i++)
        for (int j = 0; j < PER; j++) found[i][j] = 0;
    for (int depth = 0; depth < a.columns; depth += DEPTH) {
        __syncthreads();
        for (int n = thread; n < TILE * DEPTH; n += 256) {  // neighbours in memory go to neighbouring threads
            const int i = a.transposed ? n % TILE : n / DEPTH, k = a.transposed ? n / TILE : n % DEPTH;
            tiles.left[k][i] = a.at(row + i, depth + k);
        }
        for (int n = thread; n < TILE * DEPTH; n += 256) {
            const int j = b.transposed ? n / DEPTH : n % TILE, k = b.transposed ? n % DEPTH : n / TILE;
            tiles.right[k][j] = b.at(depth + k, column + j);
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH; k++)
            for (int i = 0; i < PER; i++)
                for (int j = 0; j < PER; j++)
                    found[i][j] += tiles.left[k][PER * threadIdx.y + i] * tiles.right[k][PER * threadIdx.x + j];
    }
}

// Rows first .. end - 1, at most TILE, are expert e's, or nobody's if e is E; none if there are fewer tiles.
struct Piece {
    int e, first, end;
    __device__ Piece(const int* offsets, int E, int R) : e(0), first(0), end(0)
    {
        for (int before = 0; e <= E; e++) {
            const int start = offsets[e], stop = e < E ? offsets[e + 1] : R, tiles = (stop - start + TILE - 1) / TILE;
            if ((int)blockIdx.y < before + tiles) {
                first = start + (blockIdx.y - before) * TILE;
                end = first + TILE < stop ? first + TILE : stop;
                return;
            }
            before += tiles;
        }
    }
};

// What forward and dx share: y (R,O) = x (R,I) times the expert's matrix, added to what is there if `add`.
// w (E,O,I) if `transposed`, as in forward, else (E,I,O), as in backward, whose I is what forward calls O.
__device__ inline void rows_times_matrix(
    const real* x, const real* w, const int* offsets, real* y, int E, int R, int I, int O, i64 x_step, i64 y_step,
    bool transposed, int add)
{
    __shared__ Tiles tiles;
    const Piece piece(offsets, E, R);
    if (piece.first == piece.end) return;
    const int column = blockIdx.x * TILE;
    wide found[PER][PER] = {};
    if (piece.e < E) {
        const Matrix left = {x + piece.first * x_step, x_step, piece.end - piece.first, I, false};
        const Matrix right = {w + (i64)piece.e * O * I, transposed ? I : O, I, O, transposed};
        product(tiles, found, left, right, 0, column);
    } else if (add) return;
    for (int i = 0; i < PER; i++)
        for (int j = 0; j < PER; j++) {
            const int r = piece.first + PER * threadIdx.y + i, c = column + PER * threadIdx.x + j;
            if (r < piece.end && c < O) {
                real& to = y[r * y_step + c];
                to = add ? (wide)to + found[i][j] : found[i][j];
            }
        }
}

extern "C" __global__ void __launch_bounds__(256) grouped_forward(
    const real* x, const real* w, const int* offsets, real* y, int E, int R, int I, int O, i64 x_step, i64 y_step)
{
    rows_times_matrix(x, w, offsets, y, E, R, I, O, x_step, y_step, true, 0);
}

extern "C" __global__ void __launch_bounds__(256) grouped_backward_x(
    const real* dy, const real* w, const int* offsets, real* dx, int add, int E, int R, int I, int O, i64 dy_step,
    i64 dx_step)
{
    rows_times_matrix(dy, w, offsets, dx, E, R, O, I, dy_step, dx_step, false, add);
}

extern "C" __global__ void __launch_bounds__(256) grouped_backward_w(
    const real* dy, const real* x, const int* offsets, wide* dw, int I, int O, i64 dy_step, i64 x_step)
{
    __shared__ Tiles tiles;
    const int e = blockIdx.z, first = offsets[e], count = offsets[e + 1] - first;
    if (!count) return;  // nothing to add
    const int row = blockIdx.y * TILE, column = blockIdx.x * TILE;
    wide found[PER][PER];
    const Matrix left = {dy + first * dy_step, dy_step, O, count, true}, right = {x + first * x_step, x_step, count, I, false};
    product(tiles, found, left, right, row, column);
    for (int i = 0; i < PER; i++)
        for (int j = 0; j < PER; j++) {
            const int o = row + PER * threadIdx.y + i, c = column + PER * threadIdx.x + j;
            if (o < O && c < I) dw[((i64)e * O + o) * I + c] += found[i][j];
        }
}

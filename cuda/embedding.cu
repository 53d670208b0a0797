// Token embedding: a row of the table for each token (ops/embedding.py).
//
// Forward.  Grid: a thread a pack.  Bytes: N C in, N C out, N tokens.
//
// Backward adds up the rows of dx that belong to one token.  Which rows these are, atomics find (of integers: whoever
// comes first, the set is the same); they are then added in the order of the text, so that two runs give equal bits.
//   embedding_places    links the places of each token.  Grid: a thread a place.
//   embedding_backward  Grid: a warp a place.  One of each token's places does the work for all, if they are few: it
//                       follows the links, sorts what it found, adds.
//   embedding_frequent  Grid: a block a token that is not rare, and then another; beside it blocks for further columns.
//                       Each warp reads its part of the text, and the warps' sums are added one after the other.
// Bytes: dx once, a row of dtable in and out for each token that occurs, the text once for each that is not rare.

template <int W>
__device__ void rows_of(const int* tokens, const real* table, real* y, int N, int V, int C)
{
    for (EACH(n, (i64)N * C / W)) {
        const i64 i = n * W;
        const int token = tokens[i / C];
        Pack<W> row;
        // A token outside the table is an error that only the host could report: it shows as NaN.
        for (int j = 0; j < W; j++) row.x[j] = NO_NUMBER;
        if (token >= 0 && token < V) row = load<W>(table + (i64)token * C + i % C);
        store(y + i, row);
    }
}

extern "C" __global__ void embedding_forward(
    const int* tokens, const real* table, real* y, int N, int V, int C)
{
    if (packed(C, table, y)) rows_of<PACK>(tokens, table, y, N, V, C);
    else rows_of<1>(tokens, table, y, N, V, C);
}

constexpr int RARE = 32;      // places at most: one for each lane of a warp
constexpr int TILE = 256;     // places that a warp looks at before it adds those that it found
constexpr int WARPS = 16;     // of a block of embedding_frequent

// last (V,), zero at first: 1 + the place of each token that came last.  before (N,): 1 + the place that came before
// it, 0 if none did.  The order in which they come is anyone's.
extern "C" __global__ void embedding_places(const int* tokens, int* last, int* before, int N, int V)
{
    for (EACH(i, N)) {
        const int token = tokens[i];
        if (token >= 0 && token < V) before[i] = atomicExch(&last[token], (int)i + 1);
    }
}

// sum += columns of the rows of dx at `count` places, one after the other.
template <int W>
__device__ void add_rows(Wides<W>& sum, const real* dx, const int* places, int count, i64 C)
{
#pragma unroll 4
    for (int n = 0; n < count; n++) {
        const Pack<W> d = load<W>(dx + places[n] * C);
        for (int i = 0; i < W; i++) sum.x[i] += (wide)d.x[i];
    }
}

template <int W>
__device__ void add_to_row(wide* row, const real* dx, const int* places, int count, int C)
{
    for (int c = lane() * W; c < C; c += 32 * W) {
        Wides<W> sum = load_wides<W>(row + c);
        add_rows(sum, dx + c, places, count, C);
        store(row + c, sum);
    }
}

// frequent (1 + ...), zero at first: how many tokens are not rare, and which.
extern "C" __global__ void embedding_backward(
    const real* dx, const int* tokens, const int* last, const int* before, int* frequent, wide* dtable, int N, int V,
    int C)
{
    __shared__ int sorted[8][RARE];
    const i64 here = warp_number();
    const int token = here < N ? tokens[here] : -1;
    if (token < 0 || token >= V || last[token] != here + 1) return;
    int count = 0, mine = N;
    for (int next = here + 1; next && count <= RARE; next = before[next - 1], count++)
        if (count == lane()) mine = next - 1;
    if (count > RARE) {
        if (lane() == 0) frequent[1 + atomicAdd(frequent, 1)] = token;
        return;
    }
    int* places = sorted[threadIdx.x / 32];
    int smaller = 0;
    for (int n = 0; n < count; n++) smaller += __shfl_sync(FULL_WARP, mine, n) < mine;
    if (lane() < count) places[smaller] = mine;
    __syncwarp();
    wide* row = dtable + (i64)token * C;
    if (packed(C, dx, dtable)) add_to_row<PACK>(row, dx, places, count, C);
    else add_to_row<1>(row, dx, places, count, C);
}

template <int W>
__device__ void add_frequent(const real* dx, const int* tokens, int token, wide* row, int N, int C, int* places,
                             wide (&sums)[WARPS][32 * PACK])
{
    const int warp = threadIdx.x / 32, part = (N + WARPS - 1) / WARPS;
    const int end = (warp + 1) * part < N ? (warp + 1) * part : N;
    for (int first = blockIdx.y * 32 * W; first < C; first += gridDim.y * 32 * W) {
        const int c = first + lane() * W;
        Wides<W> sum = {};
        for (int start = warp * part; start < end; start += TILE) {
            int seen[TILE / 32];  // all are asked for before the first is looked at
#pragma unroll
            for (int i = 0; i < TILE / 32; i++)
                seen[i] = start + 32 * i + lane() < end ? tokens[start + 32 * i + lane()] : -1;
            int count = 0;
            __syncwarp();  // the last tile's places have been read
#pragma unroll
            for (int i = 0; i < TILE / 32; i++) {
                const unsigned all = __ballot_sync(FULL_WARP, seen[i] == token);
                if (seen[i] == token) places[count + __popc(all & ((1u << lane()) - 1))] = start + 32 * i + lane();
                count += __popc(all);
            }
            __syncwarp();
            if (c < C) add_rows(sum, dx + c, places, count, C);
        }
        for (int i = 0; i < W; i++) sums[warp][32 * i + lane()] = sum.x[i];
        __syncthreads();
        if (warp == 0 && c < C) {
            Wides<W> all = load_wides<W>(row + c);
            for (int w = 0; w < WARPS; w++)
                for (int i = 0; i < W; i++) all.x[i] += sums[w][32 * i + lane()];
            store(row + c, all);
        }
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(512) embedding_frequent(
    const real* dx, const int* tokens, const int* frequent, wide* dtable, int N, int C)
{
    __shared__ int places[WARPS][TILE];
    __shared__ wide sums[WARPS][32 * PACK];
    int* mine = places[threadIdx.x / 32];
    for (int n = blockIdx.x; n < frequent[0]; n += gridDim.x) {
        const int token = frequent[1 + n];
        wide* row = dtable + (i64)token * C;
        if (packed(C, dx, dtable)) add_frequent<PACK>(dx, tokens, token, row, N, C, mine, sums);
        else add_frequent<1>(dx, tokens, token, row, N, C, mine, sums);
    }
}

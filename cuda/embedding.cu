// Token embedding: a row of the table for each token (ops/embedding.py).
//
// Forward.  Grid: a thread an element.  Bytes: N C in, N C out, N tokens.
//
// Backward adds up the rows of dx that belong to one token, in the order of the text, so that two runs give equal
// bits.  First each token learns its first place and how many there are (atomics of integers: no order matters).
// Grid: a block a place in the text.  The block of a token's first place does the work for all of them, and
// looks on until it has found the last; the other blocks leave.
// Bytes: dx once, a row of dtable in and out for each tile of text that holds its token, and the tokens between a
// token's first place and its last, from cache.

extern "C" __global__ void embedding_forward(
    const int* tokens, const real* table, real* y, int N, int V, int C)
{
    for (EACH(i, (i64)N * C)) {
        const int token = tokens[i / C];
        // A token outside the table is an error that only the host could report: it shows as NaN.
        y[i] = token >= 0 && token < V ? (wide)table[(i64)token * C + i % C] : NO_NUMBER;
    }
}

constexpr int TILE = 256;  // threads of a block, and places looked at at once

// found (2,V), zero at first: how many places before the end a token's first one lies (at least 1), and how many it has.
extern "C" __global__ void embedding_places(const int* tokens, int* found, int N, int V)
{
    for (EACH(i, N)) {
        const int token = tokens[i];
        if (token < 0 || token >= V) continue;
        atomicMax(&found[token], N - (int)i);
        atomicAdd(&found[V + token], 1);
    }
}

extern "C" __global__ void embedding_backward(
    const real* dx, const int* tokens, const int* found, wide* dtable, int N, int V, int C)
{
    __shared__ int places[TILE], of_warp[TILE / 32];
    const int here = blockIdx.x, token = tokens[here];
    if (token < 0 || token >= V || found[token] != N - here) return;
    int left = found[V + token];
    for (int start = here; left > 0; start += TILE) {
        const int place = start + threadIdx.x;
        const bool same = place < N && tokens[place] == token;
        const unsigned in_warp = __ballot_sync(FULL_WARP, same);
        if (lane() == 0) of_warp[threadIdx.x / 32] = __popc(in_warp);
        __syncthreads();
        int before = 0, some = 0;
        for (int w = 0; w < TILE / 32; w++) {
            if (w < threadIdx.x / 32) before += of_warp[w];
            some += of_warp[w];
        }
        if (same) places[before + __popc(in_warp & ((1u << lane()) - 1))] = place;
        __syncthreads();
        left -= some;
        for (int c = threadIdx.x; some && c < C; c += TILE) {
            wide sum = dtable[(i64)token * C + c];
            for (int i = 0; i < some; i++) sum += (wide)dx[(i64)places[i] * C + c];
            dtable[(i64)token * C + c] = sum;
        }
    }
}

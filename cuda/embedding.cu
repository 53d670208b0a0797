// Token embedding: a row of the table for each token (ops/embedding.py).
//
// Forward.  Grid: a thread an element.  Bytes: N C in, N C out, N tokens.
//
// Backward adds up the rows of dx that belong to one token, in the order of the text and without
// atomics, so that two runs give equal bits.  Grid: a block a place in the text.  The block of a token's
// first place does the work for all its places; the others look back, find an earlier one, and leave.
// Bytes: dx once, a row of dtable in and out for each tile of text that holds its token, and N tokens
// read by each block, from cache.

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

extern "C" __global__ void embedding_backward(
    const real* dx, const int* tokens, wide* dtable, int N, int V, int C)
{
    __shared__ int places[TILE], of_warp[TILE / 32];
    const int here = blockIdx.x, token = tokens[here];
    if (token < 0 || token >= V) return;
    for (int end = here; end > 0; end -= TILE) {
        const int place = end - 1 - (int)threadIdx.x;
        if (__syncthreads_or(place >= 0 && tokens[place] == token)) return;
    }
    for (int start = here; start < N; start += TILE) {
        const int place = start + threadIdx.x;
        const bool same = place < N && tokens[place] == token;
        const unsigned in_warp = __ballot_sync(FULL_WARP, same);
        if (lane() == 0) of_warp[threadIdx.x / 32] = __popc(in_warp);
        __syncthreads();
        int before = 0, found = 0;
        for (int w = 0; w < TILE / 32; w++) {
            if (w < threadIdx.x / 32) before += of_warp[w];
            found += of_warp[w];
        }
        if (same) places[before + __popc(in_warp & ((1u << lane()) - 1))] = place;
        __syncthreads();
        for (int c = threadIdx.x; found && c < C; c += TILE) {
            wide sum = dtable[(i64)token * C + c];
            for (int i = 0; i < found; i++) sum += (wide)dx[(i64)places[i] * C + c];
            dtable[(i64)token * C + c] = sum;
        }
    }
}

// Mixture of experts: the router, rows to experts and back (ops/moe.py; report, eq. 7-8).
//
// N tokens choose K of E experts: N K slots, slot n K + k.  Their rows stand in a buffer of R rows, sorted by expert
// (moe_plan.cu): row (N,K) is the row of each slot, -1 if it was dropped; token (R,) the token in each row, -1 in padding.
// Probabilities, gates and their gradients are wide.  Which row goes where is known to the GPU alone.
//
// Grid: a warp takes a token, a slot or a row.
// Bytes: logits and p once; dispatch N K rows of C in and out; combine K rows and one shared row a token in, one out;
// its backward dy and the experts' outputs in, their gradients out.

// to (C) = from (C), by all lanes of a warp: 16 bytes at once where both allow it.
__device__ inline void copy_row(real* to, const real* from, int C)
{
    if ((C * sizeof(real) | (unsigned long long)to | (unsigned long long)from) % sizeof(float4) == 0) {
        for (int c = lane(); c < C * sizeof(real) / sizeof(float4); c += 32) ((float4*)to)[c] = ((const float4*)from)[c];
    } else {
        for (int c = lane(); c < C; c += 32) to[c] = from[c];
    }
}

// --- the router -----------------------------------------------------------------------------------

// What the top K are taken by: NaN comes last.
__device__ inline wide rank(real logit)
{
    const wide x = logit;
    return x == x ? x : -INFINITE;
}

// The K largest logits one after the other: each the largest of what comes after the last one in the order of falling
// logits and, among equals, of rising experts.
extern "C" __global__ void router_forward(
    const real* logits, wide* gates, int* experts, wide* p, wide* lse, int N, int E, int K)
{
    const i64 n = warp_number();
    if (n >= N) return;
    logits += n * E;
    p += n * E;
    wide top = LOWEST, total = 0;
    for (int e = lane(); e < E; e += 32) top = (wide)logits[e] > top ? (wide)logits[e] : top;
    top = lanes_max(top, 32);
    for (int e = lane(); e < E; e += 32) total += exp((wide)logits[e] - top);
    total = warp_sum(total);
    for (int e = lane(); e < E; e += 32) p[e] = exp((wide)logits[e] - top) / total;
    if (lane() == 0) lse[n] = top + log(total);

    wide last = INFINITE;
    int last_expert = -1;
    for (int k = 0; k < K; k++) {
        wide best = -INFINITE;
        int expert = E;
        for (int e = lane(); e < E; e += 32) {
            const wide x = rank(logits[e]);
            const bool later = x < last || (x == last && e > last_expert);
            if (later && (expert == E || x > best)) {
                best = x;
                expert = e;
            }
        }
        last = lanes_max(best, 32);
        last_expert = -lanes_max(best == last ? -expert : -E, 32);
        if (lane() == last_expert % 32) {  // who wrote it reads it
            experts[n * K + k] = last_expert;
            gates[n * K + k] = p[last_expert];
        }
    }
}

// dp (E,) where dp_step is 0, or (N,E) where it is E.
extern "C" __global__ void router_backward(
    const wide* dgates, const wide* dp, const wide* dlse, const int* experts, const wide* p, real* dlogits, int N, int E,
    int K, int dp_step)
{
    const i64 n = warp_number();
    if (n >= N) return;
    wide along = 0;
    for (int e = lane(); e < E; e += 32) {
        wide d = dp[n * dp_step + e];
        for (int k = 0; k < K; k++)
            if (experts[n * K + k] == e) d += dgates[n * K + k];
        along += p[n * E + e] * d;
    }
    along = warp_sum(along);
    for (int e = lane(); e < E; e += 32) {
        wide d = dp[n * dp_step + e];
        for (int k = 0; k < K; k++)
            if (experts[n * K + k] == e) d += dgates[n * K + k];
        dlogits[n * E + e] = p[n * E + e] * (d - along + dlse[n]);
    }
}

// loss = E sum f_i P_i and dp_i = weight E f_i / N, with f_i = counts_i / sum and P_i = sums_i / N, sums (E,) those of p
// over the tokens.  Grid: one block.
extern "C" __global__ void balance_loss(
    const wide* sums, const int* counts, wide* loss, wide* dp, const double* weight, int N, int E)
{
    wide all = 0, found = 0;
    for (int e = threadIdx.x; e < E; e += blockDim.x) all += counts[e];
    all = block_sum(all);
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        const wide f = counts[e] / all;
        dp[e] = (wide)*weight * E * f / N;
        found += f * (sums[e] / N);
    }
    found = block_sum(found);
    if (threadIdx.x == 0) loss[0] = E * found;
}

// loss = mean(lse^2), dlse = 2 weight / N lse.  Grid: one block, as the numbers are one a token.
extern "C" __global__ void z_loss(const wide* lse, wide* loss, wide* dlse, const double* weight, int N)
{
    wide sum = 0;
    for (int n = threadIdx.x; n < N; n += blockDim.x) {
        sum += lse[n] * lse[n];
        dlse[n] = 2 * (wide)*weight / N * lse[n];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) loss[0] = sum / N;
}

// --- rows to experts and back ---------------------------------------------------------------------

extern "C" __global__ void dispatch_forward(const real* x, const int* token, real* rows, int R, int C)
{
    const i64 r = warp_number();
    if (r >= R) return;
    rows += r * C;
    if (token[r] >= 0) copy_row(rows, x + (i64)token[r] * C, C);
    else
        for (int c = lane(); c < C; c += 32) rows[c] = (wide)0;
}

// dx (N,C) = the sum of a token's rows.
extern "C" __global__ void dispatch_backward(const real* drows, const int* row, real* dx, int N, int K, int C)
{
    const i64 n = warp_number();
    if (n >= N) return;
    for (int c = lane(); c < C; c += 32) {
        wide sum = 0;
        for (int k = 0; k < K; k++)
            if (row[n * K + k] >= 0) sum += (wide)drows[(i64)row[n * K + k] * C + c];
        dx[n * C + c] = sum;
    }
}

// shared (N,C) may be null.
extern "C" __global__ void combine_forward(
    const real* rows, const wide* gates, const int* row, const real* shared, real* y, int N, int K, int C)
{
    const i64 n = warp_number();
    if (n >= N) return;
    for (int c = lane(); c < C; c += 32) {
        wide sum = shared ? (wide)shared[n * C + c] : 0;
        for (int k = 0; k < K; k++)
            if (row[n * K + k] >= 0) sum += gates[n * K + k] * (wide)rows[(i64)row[n * K + k] * C + c];
        y[n * C + c] = sum;
    }
}

// Warp i has slot i, if there is one, and row i, if that is padding: there are at least as many rows as slots.
extern "C" __global__ void combine_backward(
    const real* dy, const real* rows, const wide* gates, const int* row, const int* token, real* drows, wide* dgates,
    int N, int K, int R, int C)
{
    const i64 i = warp_number();
    if (i < R && token[i] < 0)
        for (int c = lane(); c < C; c += 32) drows[i * C + c] = (wide)0;
    if (i >= (i64)N * K) return;
    wide along = 0;
    if (row[i] >= 0) {
        const i64 at = (i64)row[i] * C, from = i / K * C;
        for (int c = lane(); c < C; c += 32) {
            drows[at + c] = gates[i] * (wide)dy[from + c];
            along += (wide)rows[at + c] * (wide)dy[from + c];
        }
    }
    along = warp_sum(along);
    if (lane() == 0) dgates[i] = along;
}

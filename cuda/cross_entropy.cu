// Softmax cross-entropy, its gradient written over the logits (ops/cross_entropy.py).
//
//   loss = log(sum of e^x) - x[target],  dlogits = (softmax(x) - onehot(target)) dloss
//
// Grid: a block takes a row of V logits.  Each thread keeps a running maximum and a sum of exponentials
// relative to it, so one pass gives both.  Bytes: the logits once in, with a gradient once out: the second look
// at a row is at what shared memory has kept of it, the first `keep` logits.

constexpr int AT_ONCE = 4;  // packs that a thread asks for before it looks at the first

template <int W>
__device__ void row_of(real* x, real* kept, int keep, int target, bool counted, wide* loss, const wide* dloss, int V)
{
    const int first = threadIdx.x * W, hop = blockDim.x * W;
    const bool known = target >= 0 && target < V;
    wide at_target = NO_NUMBER;
    if (threadIdx.x == 0 && known) at_target = x[target];
    wide top = LOWEST, sum = 0;
    for (int start = first; start < V; start += AT_ONCE * hop) {
        Pack<W> a[AT_ONCE];
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++)
            if (start + n * hop < V) a[n] = load<W>(x + start + n * hop);
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) {
            const int j = start + n * hop;
            if (j >= V) break;
            if (j < keep) store(kept + j, a[n]);
            wide above = top;
            for (int i = 0; i < W; i++) above = fmax(above, (wide)a[n].x[i]);
            sum *= quick_exp(top - above);
            top = above;
            for (int i = 0; i < W; i++) sum += quick_exp((wide)a[n].x[i] - top);
        }
    }
    const wide top_of_row = block_max(top);
    const wide total = block_sum(sum * quick_exp(top - top_of_row));
    if (threadIdx.x == 0) *loss = counted ? log(total) - (at_target - top_of_row) : 0;
    if (!dloss) return;
    const wide d = counted ? *dloss : 0, share = d / total;
    for (int j = first; j < V; j += hop) {
        Pack<W> a = j < keep ? load<W>(kept + j) : load<W>(x + j);
        for (int i = 0; i < W; i++) a.x[i] = quick_exp((wide)a.x[i] - top_of_row) * share;
        store(x + j, a);
    }
    __syncthreads();  // the softmax is written
    if (threadIdx.x == 0 && known) x[target] = quick_exp(at_target - top_of_row) * share - d;
}

// dloss: one number a row (dloss_stride 1) or one for all (0); not read unless write_gradient.
// A target of `ignore` is not counted; one outside the vocabulary cannot be reported from here: its loss is NaN.
// keep: whole packs.  Shared memory: so many reals.
extern "C" __global__ void cross_entropy(
    real* logits, const int* targets, wide* losses, const wide* dloss, int dloss_stride, int write_gradient, int V,
    i64 row_stride, int ignore, int keep)
{
    SHARED_MEMORY(memory);
    const i64 row = blockIdx.x;
    real *x = logits + row * row_stride, *kept = (real*)memory;
    const int target = targets[row];
    const wide* d = write_gradient ? dloss + row * dloss_stride : nullptr;
    if (packed(V, logits) && packed(row_stride))
        row_of<PACK>(x, kept, keep, target, target != ignore, losses + row, d, V);
    else row_of<1>(x, kept, keep, target, target != ignore, losses + row, d, V);
}

constexpr int ALONE = 1024;  // threads of a block that adds up everything

// Most of the time such a block waits for memory, so a thread asks for 16 numbers at once.  none: what counts for nothing.
template <typename number, typename function>
__device__ double sum_of(const number* x, i64 N, number none, function value)
{
    double sum = 0;
    for (i64 start = threadIdx.x; start < N; start += 16 * ALONE) {
        const i64 left = N - start;
        number some[16];
#pragma unroll
        for (int i = 0; i < 16; i++) some[i] = i * ALONE < left ? x[start + i * ALONE] : none;
#pragma unroll
        for (int i = 0; i < 16; i++) sum += value(some[i]);
    }
    return block_sum(sum);
}

// *count = how many of the N targets are not `ignore`, at least 1.  Grid: one block.
extern "C" __global__ void __launch_bounds__(1024) counted(const int* targets, double* count, i64 N, int ignore)
{
    const double found = sum_of(targets, N, ignore, [=](int target) { return target != ignore; });
    if (threadIdx.x == 0) *count = found > 1 ? found : 1;
}

// *total = the sum of N losses.  Grid: one block.
extern "C" __global__ void __launch_bounds__(1024) total_loss(const wide* losses, double* total, i64 N)
{
    const double sum = sum_of(losses, N, (wide)0, [](wide loss) { return loss; });
    if (threadIdx.x == 0) *total = sum;
}

// Softmax cross-entropy, its gradient written over the logits (ops/cross_entropy.py).
//
//   loss = log(sum of e^x) - x[target],  dlogits = (softmax(x) - onehot(target)) dloss
//
// Grid: a block takes a row of V logits.  Each thread keeps a running maximum and a sum of exponentials
// relative to it, so one pass gives both.  Bytes: the logits once in; with a gradient once more in, once out.

template <int W>
__device__ void row_of(real* x, int target, bool counted, wide* loss, const wide* dloss, int V)
{
    wide top = LOWEST, sum = 0;
    for (int j = threadIdx.x * W; j < V; j += blockDim.x * W) {
        const Pack<W> a = load<W>(x + j);
        wide above = top;
        for (int i = 0; i < W; i++) above = (wide)a.x[i] > above ? (wide)a.x[i] : above;
        sum *= exp(top - above);
        top = above;
        for (int i = 0; i < W; i++) sum += exp((wide)a.x[i] - top);
    }
    const wide top_of_row = block_max(top);
    const wide total = block_sum(sum * exp(top - top_of_row));
    if (threadIdx.x == 0) {
        const bool known = target >= 0 && target < V;
        const wide found = known ? log(total) - ((wide)x[target] - top_of_row) : NO_NUMBER;
        *loss = counted ? found : 0;
    }
    if (!dloss) return;
    __syncthreads();  // the target's logit has been read
    const wide d = counted ? *dloss : 0, share = d / total;
    for (int j = threadIdx.x * W; j < V; j += blockDim.x * W) {
        Pack<W> a = load<W>(x + j);
        for (int i = 0; i < W; i++) a.x[i] = exp((wide)a.x[i] - top_of_row) * share - (j + i == target ? d : 0);
        store(x + j, a);
    }
}

// dloss: one number a row (dloss_stride 1) or one for all (0); not read unless write_gradient.
// A target of `ignore` is not counted; one outside the vocabulary cannot be reported from here: its loss is NaN.
extern "C" __global__ void cross_entropy(
    real* logits, const int* targets, wide* losses, const wide* dloss, int dloss_stride, int write_gradient, int V,
    i64 row_stride, int ignore)
{
    const i64 row = blockIdx.x;
    real* x = logits + row * row_stride;
    const int target = targets[row];
    const wide* d = write_gradient ? dloss + row * dloss_stride : nullptr;
    if (packed(V, logits) && packed(row_stride)) row_of<PACK>(x, target, target != ignore, losses + row, d, V);
    else row_of<1>(x, target, target != ignore, losses + row, d, V);
}

// *count = how many of the N targets are not `ignore`, at least 1.  Grid: one block.
extern "C" __global__ void counted(const int* targets, double* count, i64 N, int ignore)
{
    double found = 0;
    for (i64 i = threadIdx.x; i < N; i += blockDim.x) found += targets[i] != ignore;
    found = block_sum(found);
    if (threadIdx.x == 0) *count = found > 1 ? found : 1;
}

// *total = the sum of N losses.  Grid: one block.
extern "C" __global__ void total_loss(const wide* losses, double* total, i64 N)
{
    double sum = 0;
    for (i64 i = threadIdx.x; i < N; i += blockDim.x) sum += losses[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *total = sum;
}

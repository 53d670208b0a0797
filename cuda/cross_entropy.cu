// Softmax cross-entropy, its gradient written over the logits (ops/cross_entropy.py).
//
//   loss = log(sum of e^x) - x[target],  dlogits = (softmax(x) - onehot(target)) dloss
//
// Grid: a block takes a row of V logits.  Each thread keeps a running maximum and a sum of exponentials
// relative to it, so one pass gives both.  Bytes: the logits once in; with a gradient once more in, once out.

// dloss: one number a row (dloss_stride 1) or one for all (0); not read unless write_gradient.
// A target of `ignore` is not counted; one outside the vocabulary cannot be reported from here: its loss is NaN.
extern "C" __global__ void cross_entropy(
    real* logits, const int* targets, wide* losses, const wide* dloss, int dloss_stride, int write_gradient, int V,
    i64 row_stride, int ignore)
{
    const i64 row = blockIdx.x;
    real* x = logits + row * row_stride;
    const int target = targets[row];
    const bool counted = target != ignore;

    wide top = LOWEST, sum = 0;
    for (int j = threadIdx.x; j < V; j += blockDim.x) {
        const wide value = x[j];
        if (value > top) {
            sum *= exp(top - value);
            top = value;
        }
        sum += exp(value - top);
    }
    const wide top_of_row = block_max(top);
    const wide total = block_sum(sum * exp(top - top_of_row));
    if (threadIdx.x == 0) {
        const bool known = target >= 0 && target < V;
        const wide loss = known ? log(total) - ((wide)x[target] - top_of_row) : NO_NUMBER;
        losses[row] = counted ? loss : 0;
    }
    if (!write_gradient) return;
    __syncthreads();  // the target's logit has been read
    const wide d = counted ? dloss[row * dloss_stride] : 0;
    for (int j = threadIdx.x; j < V; j += blockDim.x)
        x[j] = (exp((wide)x[j] - top_of_row) / total - (j == target ? 1 : 0)) * d;
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

// Which slot goes to which row: a stable counting sort of N K chosen experts (ops/moe.py, dispatch_plan).
//
// Grid: a block takes an expert; each of its threads a piece of the slots, which it walks twice: to count those of its
// expert, and, knowing how many come before, to place them.  Each slot is read by every block, from cache.
// No number here is a real: any element type's version will do.

constexpr int THREADS = 256;

// How many of the slots [first, end) chose expert e.
__device__ inline int count(const int* experts, int first, int end, int e)
{
    int found = 0;
    for (int i = first; i < end; i++) found += experts[i] == e;
    return found;
}

// Rows of an expert that `wanted` slots chose.
__device__ inline int padded(int wanted, int tile, int capacity)
{
    const int taken = wanted < capacity ? wanted : capacity;
    return (taken + tile - 1) / tile * tile;
}

// load (E,): slots of each expert.
extern "C" __global__ void expert_load(const int* experts, int* load, int slots)
{
    int found = 0;
    for (int i = threadIdx.x; i < slots; i += blockDim.x) found += experts[i] == blockIdx.x;
    found = block_sum(found);
    if (threadIdx.x == 0) load[blockIdx.x] = found;
}

// row (slots,), token (R,), offsets (E+1,), as in ops/moe.py.
extern "C" __global__ void dispatch_plan(
    const int* experts, const int* load, int* row, int* token, int* offsets, int slots, int K, int E, int R, int tile,
    int capacity)
{
    __shared__ int of_thread[THREADS];
    const int e = blockIdx.x, a_thread = (slots + THREADS - 1) / THREADS;
    const int first = threadIdx.x * a_thread < slots ? threadIdx.x * a_thread : slots;
    const int end = first + a_thread < slots ? first + a_thread : slots;
    int start = 0;
    for (int other = 0; other < e; other++) start += padded(load[other], tile, capacity);
    const int stop = start + padded(load[e], tile, capacity);
    const int taken = load[e] < capacity ? load[e] : capacity;

    of_thread[threadIdx.x] = count(experts, first, end, e);
    __syncthreads();
    int rank = 0;
    for (int t = 0; t < threadIdx.x; t++) rank += of_thread[t];
    for (int i = first; i < end; i++)
        if (experts[i] == e) {
            row[i] = rank < taken ? start + rank : -1;
            if (rank < taken) token[start + rank] = i / K;
            rank++;
        }

    const int last = e == E - 1 ? R : stop;  // what no expert has is padding too
    for (int r = start + taken + threadIdx.x; r < last; r += THREADS) token[r] = -1;
    if (threadIdx.x == 0) {
        offsets[e] = start;
        if (e == E - 1) offsets[E] = stop;
    }
}

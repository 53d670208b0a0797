// What every kernel of minisb shares.  minisb/gpu.py puts this text before each .cu file and compiles
// the two once for every element type, with -DREAL_float32, _float64, _bfloat16 or _float16.
//
//   real   how activations and weights are stored
//   wide   how we compute, and how statistics, states and parameter gradients are stored: float, or
//          double where real is double
//
// A real turns into a wide wherever it is read in an expression, and is rounded where it is written.
// No header is included: NVRTC needs none, and half the compile time would go into them.
#pragma once

#ifndef EMULATED  // tests/emulator.h has its own
#define FULL_WARP 0xffffffffu
// Dynamic shared memory as `char* name`.
#define SHARED_MEMORY(name) extern __shared__ __align__(16) char name[]
#endif

typedef long long i64;
typedef signed char int8;
typedef short int16;

// bfloat16 is the upper half of a float: stored so on every architecture, also where no instruction knows it.
struct bf16 {
    unsigned short bits;
    bf16() = default;
    __device__ bf16(float x)
    {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#else
        const unsigned u = __float_as_uint(x);
        const unsigned rounded = u + 0x7fff + ((u >> 16) & 1);  // to nearest, ties to even
        bits = x != x ? 0x7fff : rounded >> 16;
#endif
    }
    __device__ operator float() const { return __uint_as_float((unsigned)bits << 16); }
};

#ifdef REAL_float16
#ifndef EMULATED
__device__ inline unsigned short narrowed(float x)
{
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
__device__ inline float widened(unsigned short bits)
{
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
#endif
struct fp16 {
    unsigned short bits;
    fp16() = default;
    __device__ fp16(float x) { bits = narrowed(x); }
    __device__ operator float() const { return widened(bits); }
};
typedef fp16 real;
typedef float wide;
#elif defined(REAL_bfloat16)
typedef bf16 real;
typedef float wide;
#elif defined(REAL_float64)
typedef double real;
typedef double wide;
#else
typedef float real;
typedef float wide;
#endif

// --- who am I -------------------------------------------------------------------------------------

__device__ inline int lane() { return threadIdx.x % 32; }

// The number of this warp in the whole grid; blocks are one-dimensional where this is used.
__device__ inline i64 warp_number() { return (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; }

// for (EACH(i, n)): every i < n once, shared out over the whole grid; neighbours go to neighbouring threads.
#define EACH(i, n) \
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += (i64)gridDim.x * blockDim.x

// --- neighbours at once ---------------------------------------------------------------------------
// Memory is read fastest 16 bytes a thread.  A kernel that can is written for packs of W neighbours, and runs
// with W = PACK where rows and addresses allow it, else with W = 1.

template <int W>
struct alignas(W * sizeof(real)) Pack {
    real x[W];
};

constexpr int PACK = 16 / sizeof(real);

template <int W>
__device__ inline Pack<W> load(const real* x)
{
    return *(const Pack<W>*)x;
}

template <int W>
__device__ inline void store(real* x, const Pack<W>& pack)
{
    *(Pack<W>*)x = pack;
}

// As many wides as a pack has reals.
template <int W>
struct alignas(W == 1 ? sizeof(wide) : 16) Wides {
    wide x[W];
};

template <int W>
__device__ inline Wides<W> load_wides(const wide* x)
{
    return *(const Wides<W>*)x;
}

template <int W>
__device__ inline void store(wide* x, const Wides<W>& wides)
{
    *(Wides<W>*)x = wides;
}

// Whether rows of C elements from these addresses on are whole packs; a null pointer is.
__device__ inline bool packed(i64 C) { return C % PACK == 0; }

template <typename number, typename... more>
__device__ inline bool packed(i64 C, const number* x, const more*... others)
{
    return (unsigned long long)x % 16 == 0 && packed(C, others...);
}

// How the lanes of a warp share rows of C elements: `lanes` of them (a power of two) have one row, and take W
// neighbours at a time.  All lanes go round as often: whose row is beyond the last is not `inside`.
// for (Row r(rows, C, W); r.more(); r.next()) ...
struct Row {
    i64 at, rows, step;
    int lanes, first, hop;
    __device__ Row(i64 rows, int C, int W) : rows(rows), lanes(1)
    {
        while (lanes < 32 && lanes * W < C) lanes *= 2;
        const int a_warp = 32 / lanes;
        at = warp_number() * a_warp + lane() / lanes;
        step = (i64)gridDim.x * (blockDim.x / 32) * a_warp;
        first = lane() % lanes * W;
        hop = lanes * W;
    }
    __device__ bool more() const { return at - lane() / lanes < rows; }
    __device__ bool inside() const { return at < rows; }
    __device__ void next() { at += step; }
};

// --- sums in a fixed order ------------------------------------------------------------------------
// Every thread gets the result.  Two runs give equal bits: the tree depends on nothing but the shape.

// Over groups of `width` neighbouring lanes, width a power of two.
template <typename number>
__device__ inline number lanes_sum(number x, int width)
{
    for (int step = width / 2; step > 0; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
    return x;
}

template <typename number>
__device__ inline number warp_sum(number x)
{
    return lanes_sum(x, 32);
}

template <typename number>
__device__ inline number lanes_max(number x, int width)
{
    for (int step = width / 2; step > 0; step /= 2) {
        const number other = __shfl_xor_sync(FULL_WARP, x, step);
        x = other > x ? other : x;
    }
    return x;
}

// Over a one-dimensional block of whole warps.  Calls may follow each other: the first barrier keeps a
// warp that is ahead from writing over what the last call still reads.
template <typename number>
__device__ inline number block_sum(number x)
{
    __shared__ number of_warp[32];
    x = warp_sum(x);
    __syncthreads();
    if (lane() == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    number total = 0;
    for (int w = 0; w < blockDim.x / 32; w++) total += of_warp[w];
    return total;
}

template <typename number>
__device__ inline number block_max(number x)
{
    __shared__ number of_warp[32];
    x = lanes_max(x, 32);
    __syncthreads();
    if (lane() == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    number top = of_warp[0];
    for (int w = 1; w < blockDim.x / 32; w++) top = of_warp[w] > top ? of_warp[w] : top;
    return top;
}

// --- numbers --------------------------------------------------------------------------------------

#define INFINITE ((wide)__int_as_float(0x7f800000))
#define NO_NUMBER ((wide)__int_as_float(0x7fc00000))
// Where a running maximum starts: below every number we meet, and finite, as -inf - -inf is no number.
#define LOWEST ((wide)-3e38f)

// --- functions ------------------------------------------------------------------------------------

// e^x by the unit for it, where wide is float: off by 1e-7 (2 + |x|), and 0 below 1e-38.
__device__ inline double quick_exp(double x) { return exp(x); }
__device__ inline float quick_exp(float x)
{
#ifdef EMULATED
    return exp(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
    return y;
#endif
}

// 1 / (1 + e^-x) without overflow on either side: e^-|x| never exceeds 1.
__device__ inline wide sigmoid(wide x)
{
    const wide e = exp(-fabs(x));
    return (x >= 0 ? 1 : e) / (1 + e);
}

// log(1 + e^x), nearly x for a large x.
__device__ inline wide softplus(wide x) { return (x > 0 ? x : 0) + log1p(exp(-fabs(x))); }

// Hopper's own instructions (sm_90a), for kernels that include this after tensor_cores.cuh: products of a warpgroup,
// four warps together (PTX, wgmma), and barriers in shared memory (mbarrier).
//
// A warpgroup multiplies 64 x 16 by 16 x N and adds to 64 x N floats in its registers: warp w has the rows from 16 w on,
// and in its lanes they lie as results of `multiply` lie, sum[j] the columns from 8 j on.  It runs while the warps go on:
// order() before products whose registers were touched, issued() behind them, finished() before results are read or
// what was multiplied is written over.
//
// Operands in shared memory are rows of 64 channels, a panel: 128 bytes a row, from a multiple of 1024 bytes on.  Its
// eight pieces of 16 bytes are permuted within each row (piece ^ row % 8), so that neither eight rows of one piece nor
// eight pieces of one row share a bank.  A matrix of 128 channels is two panels, one behind the other.
#pragma once

#if TENSOR_CORES && (!defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL))
#define HOPPER 1
#else
#define HOPPER 0
#endif

#if HOPPER
typedef unsigned long long u64;

constexpr int PANEL = 64;       // channels
constexpr int GROUP = 8 * 128;  // bytes of eight rows of a panel

// Where 16 bytes of a row lie, in bytes; `rows` to a panel, `piece` counts through all panels.
__device__ inline int swizzled(int rows, int row, int piece)
{
    return (piece / 8 * rows + row) * 128 + ((piece % 8 ^ row % 8) * 16);
}

// What the tensor cores are told of an operand in shared memory: its start, the bytes to the next panel (where channels
// are summed over a product lies within one panel, and 16 is said by custom) and to the next eight rows, and the
// permutation.
__device__ inline u64 described(const void* start, int next_panel)
{
    return (u64)(shared_address(start) >> 4 & 0x3fff) | (u64)(next_panel >> 4) << 16 | (u64)(GROUP >> 4) << 32 |
           (u64)1 << 62;
}

#ifndef EMULATED
// The registers of a product that runs must not be moved about: the compiler is told that they change here.
template <int TILES>
__device__ __forceinline__ void hold(float (&sum)[TILES][4])
{
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+f"(sum[j][i])::"memory");
}

__device__ __forceinline__ void order() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void issued() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `last` groups of products run.
template <int last = 0>
__device__ __forceinline__ void finished()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(last) : "memory");
}

#ifdef REAL_float16
#define WGMMA(N) "wgmma.mma_async.sync.aligned.m64n" N "k16.f32.f16.f16 "
#else
#define WGMMA(N) "wgmma.mma_async.sync.aligned.m64n" N "k16.f32.bf16.bf16 "
#endif
#define TO_31                                                                                                    \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TO_63                                                                                                         \
    TO_31 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
          "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TO_127                                                                                                        \
    TO_63 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "    \
          "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, "  \
          "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, "    \
          "%121, %122, %123, %124, %125, %126, %127"
#define TILE(s, j) "+f"(s[j][0]), "+f"(s[j][1]), "+f"(s[j][2]), "+f"(s[j][3])
#define TILES_8(s, j) \
    TILE(s, j), TILE(s, j + 1), TILE(s, j + 2), TILE(s, j + 3), TILE(s, j + 4), TILE(s, j + 5), TILE(s, j + 6), TILE(s, j + 7)

// sum (64 x N) = a (64 x 16) b^T (16 x N) (+ sum); a, b described as rows of channels.
__device__ __forceinline__ void products(float (&sum)[8][4], u64 a, u64 b, bool add)
{
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; " WGMMA("64") "{" TO_31 "}, %32, %33, p, 1, 1, 0, 0;}"
                 : TILES_8(sum, 0) : "l"(a), "l"(b), "r"((int)add));
}
__device__ __forceinline__ void products(float (&sum)[16][4], u64 a, u64 b, bool add)
{
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0; " WGMMA("128") "{" TO_63 "}, %64, %65, p, 1, 1, 0, 0;}"
                 : TILES_8(sum, 0), TILES_8(sum, 8) : "l"(a), "l"(b), "r"((int)add));
}

// sum (64 x N) += a (64 x 16) b (16 x N); a in registers as `multiply` takes it, b described: 16 rows of N channels.
__device__ __forceinline__ void products(float (&sum)[8][4], const u32 (&a)[4], u64 b)
{
    asm volatile(WGMMA("64") "{" TO_31 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : TILES_8(sum, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void products(float (&sum)[16][4], const u32 (&a)[4], u64 b)
{
    asm volatile(WGMMA("128") "{" TO_63 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : TILES_8(sum, 0), TILES_8(sum, 8) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// sum (64 x N) = a (64 x 16) b^T (16 x N) (+ sum); a in registers, b described as N rows of channels.
__device__ __forceinline__ void products(float (&sum)[8][4], const u32 (&a)[4], u64 b, bool add)
{
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; " WGMMA("64") "{" TO_31 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;}"
                 : TILES_8(sum, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
}

// sum (64 x N) = a (64 x 16) b (16 x N) (+ sum), both described; a side that lies `across` is 16 rows of channels, of
// which each is summed by itself, else it is described as rows of channels that are summed over.
template <bool a_across, bool b_across>
__device__ __forceinline__ void products_of(float (&sum)[32][4], u64 a, u64 b, bool add)
{
    asm volatile("{.reg .pred p; setp.ne.b32 p, %130, 0; " WGMMA("256") "{" TO_127 "}, %128, %129, p, 1, 1, %131, %132;}"
                 : TILES_8(sum, 0), TILES_8(sum, 8), TILES_8(sum, 16), TILES_8(sum, 24)
                 : "l"(a), "l"(b), "r"((int)add), "n"((int)a_across), "n"((int)b_across));
}

// What this thread wrote into shared memory is seen by products that start later.
__device__ __forceinline__ void show_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier in shared memory opens whenever `count` threads have arrived; its phases are counted by their parity.
__device__ __forceinline__ void barrier_begin(u64* barrier, int count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u64* barrier)
{
    asm volatile("{.reg .b64 s; mbarrier.arrive.shared::cta.b64 s, [%0];}" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives as soon as all copies that this thread has issued have; the thread goes on.
__device__ __forceinline__ void barrier_arrive_behind_copies(u64* barrier)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Waits until the phase of this parity is over; of a new barrier the phase before the first, 1, is.
__device__ __forceinline__ void barrier_wait(u64* barrier, int parity)
{
    asm volatile("{.reg .pred p;\nAGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra AGAIN;\n}"
                 ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

// Named barriers: `threads` arrive, some of them to wait.
__device__ __forceinline__ void turn_wait(int name, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}
__device__ __forceinline__ void turn_pass(int name, int threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// Sixteen bytes go to memory if they shall, without a branch.
__device__ __forceinline__ void store_words(void* to, const u32 (&word)[4], bool shall)
{
    asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0; @p st.global.v4.b32 [%0], {%1, %2, %3, %4};}"
                 ::"l"(to), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]), "r"((int)shall) : "memory");
}

// All warps of a warpgroup give registers back or take them.
template <int count>
__device__ __forceinline__ void fewer_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void more_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
#endif

// sum (64 x 8 TILES) = a b^T over D channels; a: 64 rows in panels of `rows_a`, b: 8 TILES rows in panels of `rows_b`.
template <int D, int TILES>
__device__ __forceinline__ void product_of_rows(float (&sum)[TILES][4], const char* a, int rows_a, const char* b, int rows_b)
{
#pragma unroll
    for (int d = 0; d < D; d += 16) {
        const int panel = d / PANEL, within = d % PANEL * 2;
        products(sum, described(a + panel * rows_a * 128 + within, 16),
                 described(b + panel * rows_b * 128 + within, 16),
                 d > 0);
    }
}

// The same with a in registers.
template <int D, int TILES>
__device__ __forceinline__ void product_of_rows(float (&sum)[TILES][4], const u32 (&a)[D / 16][4], const char* b, int rows_b)
{
#pragma unroll
    for (int d = 0; d < D; d += 16)
        products(sum, a[d / 16], described(b + d / PANEL * rows_b * 128 + d % PANEL * 2, 16), d > 0);
}

// sum (64 x D) += a (64 x 16 STEPS, in registers) b (16 STEPS x D)
template <int STEPS, int TILES>
__device__ __forceinline__ void product_into(float (&sum)[TILES][4], const u32 (&a)[STEPS][4], const char* b)
{
#pragma unroll
    for (int n = 0; n < STEPS; n++) products(sum, a[n], described(b + n * 2 * GROUP, 16 * STEPS * 128));
}

// Four neighbouring lanes exchange words: lane l gets word l of each.
__device__ __forceinline__ void exchange(u32 (&word)[4])
{
#pragma unroll
    for (int step = 1; step <= 2; step *= 2) {
        const bool upper = lane() & step;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            u32 &low = word[step == 1 ? 2 * n : n], &high = word[step == 1 ? 2 * n + 1 : n + 2];
            const u32 got = __shfl_xor_sync(FULL_WARP, upper ? low : high, step);
            (upper ? low : high) = got;
        }
    }
}

// Which of the stages is used next, and in which parity of its rounds.
template <int STAGES>
struct Turn {
    int stage = 0, parity = 0;
    __device__ void next()
    {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// 64 threads bring ROWS rows from `first` on into panels; zeros from `count` on.
template <int D, int ROWS>
__device__ __forceinline__ void bring(char* to, const real* x, int stride, int first, int count)
{
    constexpr int PIECES = D / 8;
    const int thread = threadIdx.x % 64, piece = thread % PIECES;
#pragma unroll 8
    for (int i = 0; i < ROWS * PIECES / 64; i++) {
        const int r = thread / PIECES + i * (64 / PIECES);
        const bool there = first + r < count;
        copy_async(to + swizzled(ROWS, r, piece), x + (i64)(there ? first + r : 0) * stride + piece * 8, there);
    }
}
#endif

// What the kernels on tensor cores share: minisb/kernels.py puts this text before every NAME_fast.cu.
//
// A warp multiplies tiles of 16 x 16 by 16 x 8, stored as bfloat16 or float16 and summed as float.  How a tile lies in
// the registers of the 32 lanes is NVIDIA's (PTX, mma.m16n8k16): lane l holds of a result the rows l / 4 and l / 4 + 8, in
// each the columns 2 (l % 4) and 2 (l % 4) + 1.  `left` and `right` bring operands from shared memory into that order.
// Everything in assembler stands in this file, and tests/emulator.h says the same in C++.
#pragma once

#if (defined(REAL_bfloat16) || defined(REAL_float16)) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800)
#define TENSOR_CORES 1
#else
#define TENSOR_CORES 0
#endif

constexpr int PAD = 8;  // of a row in shared memory: the rows of a tile lie in different banks

#if TENSOR_CORES
typedef unsigned u32;

#ifndef EMULATED
__device__ inline u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Four 8 x 8 tiles; lanes 0-7 give the rows of the first, 8-15 of the second, ...
__device__ inline void load_tiles(u32 (&to)[4], const real* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}

// The same four tiles, each transposed.
__device__ inline void load_tiles_transposed(u32 (&to)[4], const real* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}

// c (16 x 8) += a (16 x 16) b (16 x 8)
__device__ inline void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1)
{
#ifdef REAL_float16
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif
    asm(MMA " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// An 8 x 8 tile, a word of two neighbours a lane as results have them, rounded -> its transposed, the same way.
__device__ inline u32 transposed(u32 tile)
{
    u32 to;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(tile));
    return to;
}

// Two neighbours as one word, the first in the low half.
__device__ inline u32 pack(float low, float high)
{
    u32 both;
#ifdef REAL_float16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}

__device__ inline float2 unpack(u32 both)
{
#ifdef REAL_float16
    float2 x;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(x.x), "=f"(x.y) : "r"(both));
    return x;
#else
    return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000));
#endif
}

// 2^x to about 22 bits; 0 for -inf
__device__ inline float power_of_two(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// x, of which the compiler must not know that it is x: what is computed from it is computed again, not kept in registers.
__device__ inline int anew(int x)
{
    asm volatile("" : "+r"(x));
    return x;
}

// 16 bytes from global to shared memory without passing a register; zeros if not `there`.
__device__ inline void copy_async(void* to, const void* from, bool there)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ inline void copies_issued() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `last` groups of copies are under way.
template <int last = 0>
__device__ inline void copies_arrived()
{
    asm volatile("cp.async.wait_group %0;" :: "n"(last) : "memory");
}
#endif

// A tile of a (rows x 16), stored by rows, as the first operand: 16 rows from `row`, columns from `column`.
template <int PITCH>
__device__ inline void left(u32 (&a)[4], const real* x, int row, int column)
{
    load_tiles(a, x + (row + lane() % 16) * PITCH + column + lane() / 16 * 8);
}

// The same of the transposed: x is stored (16 x rows).
template <int PITCH>
__device__ inline void left_transposed(u32 (&a)[4], const real* x, int row, int column)
{
    load_tiles_transposed(a, x + (column + lane() % 8 + lane() / 16 * 8) * PITCH + row + lane() / 8 % 2 * 8);
}

// Second operands for two tiles of 8 columns: b[0], b[1] for the first, b[2], b[3] for the second.
// x stored (k x n), as v is:
template <int PITCH>
__device__ inline void right(u32 (&b)[4], const real* x, int k, int n)
{
    load_tiles_transposed(b, x + (k + lane() % 16) * PITCH + n + lane() / 16 * 8);
}

// x stored (n x k), as the keys of scores are:
template <int PITCH>
__device__ inline void right_transposed(u32 (&b)[4], const real* x, int k, int n)
{
    load_tiles(b, x + (n + lane() % 8 + lane() / 16 * 8) * PITCH + k + lane() / 8 % 2 * 8);
}

// Sixteen rows of D channels as first operands, straight from memory; zeros from row `inside` on.
template <int D>
__device__ inline void left_from_memory(u32 (&a)[D / 16][4], const real* rows, int stride, int inside)
{
#pragma unroll
    for (int d = 0; d < D / 16; d++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = lane() / 4 + i % 2 * 8, c = 16 * d + lane() % 4 * 2 + i / 2 * 8;
            a[d][i] = r < inside ? *(const u32*)(rows + r * stride + c) : 0;
        }
}

struct alignas(8) Words {
    u32 low, high;
};

// Sixteen rows of D sums go to memory; rows l / 4 times factor[0], rows l / 4 + 8 times factor[1].  Neighbouring lanes
// exchange words, so that each writes 8 bytes and a row's lanes 32.
template <int D>
__device__ inline void store(real* rows, int stride, int inside, const float (&sum)[D / 8][4], float2 factor)
{
    const int odd = lane() % 2;
#pragma unroll
    for (int e = 0; e < D / 8; e += 2)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float f = half ? factor.y : factor.x;
            const u32 a = pack(f * sum[e][2 * half], f * sum[e][2 * half + 1]);
            const u32 b = pack(f * sum[e + 1][2 * half], f * sum[e + 1][2 * half + 1]);
            const u32 got = __shfl_xor_sync(FULL_WARP, odd ? a : b, 1);
            const int r = lane() / 4 + 8 * half, c = 8 * (e + odd) + lane() % 4 / 2 * 4;
            if (r < inside) *(Words*)(rows + r * stride + c) = odd ? Words{got, b} : Words{a, got};
        }
}

// A 16 x 16 tile of results, rounded, as a first operand.
__device__ inline void as_left(u32 (&a)[4], const float (&low)[4], const float (&high)[4])
{
    a[0] = pack(low[0], low[1]);
    a[1] = pack(low[2], low[3]);
    a[2] = pack(high[0], high[1]);
    a[3] = pack(high[2], high[3]);
}
#endif

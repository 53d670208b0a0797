// CUDA's language on a CPU, as far as our kernels use it, so that their logic is tested without a GPU.
//
// A block's threads are fibers: each runs until it must wait for others (a barrier, a shuffle, a vote), then the
// next one runs.  Blocks follow one another.  Half of the launches run the threads backwards, so that a
// missing barrier changes results.  Speed, memory order between warps and alignment are not emulated.
#pragma once
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <ucontext.h>
#include <vector>

#define EMULATED
#define FULL_WARP 0xffffffffu
#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define SHARED_MEMORY(name) char* name = emulator::shared

using std::exp;
using std::fabs;
using std::fmax;
using std::log;
using std::log1p;
using std::rint;
using std::sqrt;

struct dim3 {
    unsigned x, y, z;
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;

inline unsigned __float_as_uint(float x)
{
    unsigned u;
    std::memcpy(&u, &x, 4);
    return u;
}
inline float __uint_as_float(unsigned u)
{
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}
inline float __int_as_float(int u) { return __uint_as_float((unsigned)u); }
inline float __expf(float x) { return std::exp(x); }
inline float exp2f(float x) { return std::exp2(x); }
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int atomicMax(int* x, int y)
{
    const int old = *x;
    *x = std::max(old, y);
    return old;
}
inline int atomicExch(int* x, int y)
{
    const int old = *x;
    *x = y;
    return old;
}
inline int atomicAdd(int* x, int y) { return (*x += y) - y; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
struct int4 {
    int x, y, z, w;
};
inline int __dp4a(int a, int b, int sum)
{
    for (int i = 0; i < 32; i += 8) sum += (int)(signed char)(a >> i) * (signed char)(b >> i);
    return sum;
}
// This compiler fuses no product with its sum, so that these are no more than they say.
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fdividef(float x, float y) { return x / y; }

namespace emulator {

constexpr int STACK = 1 << 16;  // bytes

struct Fiber {
    ucontext_t context;  // how it begins; afterwards jumps are used, which need no system call
    jmp_buf place;
    char* stack = (char*)std::malloc(STACK);  // not zeroed: what is never touched takes no memory
    dim3 index;
    bool begun = false, done;
};

// Threads that wait for each other: all of a block, or those of a warp.  The last to arrive opens the gate.
struct Group {
    int members = 0, arrived = 0, round = 0, vote = 0, result = 0;
    double slots[32], answers[32];  // what lanes offer; eight bytes hold any number that travels
    unsigned ballot = 0, ballots = 0;
    alignas(8) char shown[2][32][48];  // what lanes show each other at tensor cores; two, as some may be a round ahead
    void open()
    {
        arrived = 0;
        round++;
        result = vote;
        ballots = ballot;
        vote = 0;
        ballot = 0;
        std::memcpy(answers, slots, sizeof slots);
    }
    void leave()
    {
        if (--members > 0 && arrived == members) open();
    }
};

static std::deque<Fiber> fibers;  // a deque: fibers must not move
static std::vector<Group> warps;
static Group block, named[16];
static ucontext_t unused;
static jmp_buf scheduler;
static int current;
static void (*body)(void**);
static void** arguments;
static bool backwards;
alignas(1024) static char shared[1 << 18];  // dynamic shared memory
static long moves;  // how often a thread has arrived anywhere

inline int number() { return current; }
inline Group& warp() { return warps[current / 32]; }

inline void yield()
{
    if (!_setjmp(fibers[current].place)) _longjmp(scheduler, 1);
}

inline void resume(Fiber& fiber)
{
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    swapcontext(&unused, &fiber.context);
}

inline void wait(Group& group)
{
    const int round = group.round;
    moves++;
    if (++group.arrived == group.members) group.open();
    while (group.round == round) yield();
}

inline void start()
{
    for (;;) {  // a fiber serves one thread after the other
        body(arguments);
        fibers[current].done = true;
        block.leave();
        warp().leave();
        yield();
    }
}

inline void add_fiber()
{
    fibers.emplace_back();
    Fiber& fiber = fibers.back();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
}

inline void run_block()
{
    const int count = blockDim.x * blockDim.y * blockDim.z;
    while ((int)fibers.size() < count) add_fiber();
    for (Group& group : named) group = Group();
    block = Group();
    block.members = count;
    warps.assign((count + 31) / 32, Group());
    for (int i = 0; i < count; i++) {
        warps[i / 32].members++;
        fibers[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
        fibers[i].done = false;
    }
    for (int left = count; left > 0;) {
        const int before = left;
        const long moved = moves;
        for (int n = 0; n < count; n++) {
            current = backwards ? count - 1 - n : n;
            if (fibers[current].done) continue;
            threadIdx = fibers[current].index;
            resume(fibers[current]);
            left -= fibers[current].done;
        }
        if (before == left && moved == moves) {
            std::fprintf(stderr, "emulator: the threads of a block wait for each other for ever\n");
            std::abort();
        }
    }
}

inline void launch(void (*kernel)(void**), void** args, dim3 grid, dim3 threads)
{
    body = kernel;
    arguments = args;
    std::memset(shared, 0xff, sizeof shared);  // NaN in every format
    gridDim = grid;
    blockDim = threads;
    backwards = !backwards;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                run_block();
            }
}

// Each lane of a warp shows `mine`; -> what all lanes showed, until this warp's next exchange but one.
template <typename thing>
auto exchange(const thing& mine)
{
    static_assert(sizeof(thing) <= 48 && alignof(thing) <= 8);
    Group& group = warp();
    char(*shown)[48] = group.shown[group.round % 2];
    std::memcpy(shown[number() % 32], &mine, sizeof mine);
    wait(group);
    return [shown](int lane) -> const thing& { return *(const thing*)shown[lane]; };
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block); }

inline int __syncthreads_or(int x)
{
    emulator::block.vote |= x != 0;
    emulator::wait(emulator::block);
    return emulator::block.result;
}

template <typename number>
number __shfl_xor_sync(unsigned, number x, int step)
{
    emulator::Group& warp = emulator::warp();
    const int lane = emulator::number() % 32;
    std::memcpy(&warp.slots[lane], &x, sizeof x);
    emulator::wait(warp);
    number other;
    std::memcpy(&other, &warp.answers[lane ^ step], sizeof other);
    return other;
}

inline unsigned __ballot_sync(unsigned, bool x)
{
    emulator::Group& warp = emulator::warp();
    warp.ballot |= (unsigned)x << emulator::number() % 32;
    emulator::wait(warp);
    return warp.ballots;
}

inline void __syncwarp(unsigned = FULL_WARP) { emulator::wait(emulator::warp()); }

template <typename number>
number __shfl_sync(unsigned, number x, int lane)
{
    return emulator::exchange(x)(lane % 32);
}

// --- tensor cores: the same names and the same places of numbers as in cuda/tensor_cores.cuh ------------

#if defined(REAL_float16) || defined(REAL_bfloat16)
#ifdef REAL_float16
inline float widened(unsigned short bits)
{
    // Not through _Float16: that is a call, and here most of the time would be spent.
    const unsigned sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
    if (rest >= 0x7c00u << 13) return __uint_as_float(sign | 0x7f800000 | rest);
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest) * 0x1p112f));  // the exponents' zeros: 127 - 15
}
inline unsigned short narrowed(float wide)
{
    const _Float16 x = wide;
    unsigned short bits;
    std::memcpy(&bits, &x, 2);
    return bits;
}
#else
inline float widened(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }
inline unsigned short narrowed(float x)
{
    const unsigned u = __float_as_uint(x);
    return x != x ? 0x7fff : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
#endif

inline unsigned pack(float low, float high) { return narrowed(low) | (unsigned)narrowed(high) << 16; }
inline float2 unpack(unsigned both) { return {widened(both & 0xffff), widened(both >> 16)}; }

inline void load_tiles(unsigned (&to)[4], const void* row)
{
    auto rows = emulator::exchange((const unsigned*)row);
    const int lane = emulator::number() % 32;
    for (int i = 0; i < 4; i++) to[i] = rows(8 * i + lane / 4)[lane % 4];
}

inline void load_tiles_transposed(unsigned (&to)[4], const void* row)
{
    auto rows = emulator::exchange((const unsigned short*)row);
    const int lane = emulator::number() % 32;
    for (int i = 0; i < 4; i++) {
        const unsigned short *low = rows(8 * i + lane % 4 * 2), *high = rows(8 * i + lane % 4 * 2 + 1);
        to[i] = low[lane / 4] | (unsigned)high[lane / 4] << 16;
    }
}

inline unsigned transposed(unsigned tile)
{
    auto tiles = emulator::exchange(tile);
    const int row = emulator::number() % 32 / 4, column = emulator::number() % 4 * 2;  // of the transposed
    auto at = [&](int r, int c) { return tiles(4 * r + c / 2) >> c % 2 * 16 & 0xffff; };
    return at(column, row) | at(column + 1, row) << 16;
}

inline void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1)
{
    struct Operands {
        float2 a[4], b[2];
    };
    const Operands mine = {{unpack(a[0]), unpack(a[1]), unpack(a[2]), unpack(a[3])}, {unpack(b0), unpack(b1)}};
    auto operands = emulator::exchange(mine);
    const int lane = emulator::number() % 32;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k += 2) {  // row lane / 4 (+ 8), column lane % 4 * 2 (+ 1) of the result
            const float2& x = operands(lane / 4 * 4 + k % 8 / 2).a[i / 2 + k / 8 * 2];
            const float2& y = operands((lane % 4 * 2 + i % 2) * 4 + k % 8 / 2).b[k / 8];
            c[i] += x.x * y.x + x.y * y.y;
        }
}

inline int anew(int x) { return x; }
inline float power_of_two(float x) { return std::exp2(x); }

// Arrives at once: what reads too early is not found out here.
inline void copy_async(void* to, const void* from, bool there)
{
    there ? (void)std::memcpy(to, from, 16) : (void)std::memset(to, 0, 16);
}
inline void copies_issued() {}
template <int last = 0>
void copies_arrived()
{
}

// --- Hopper: the same names as in cuda/hopper.cuh ----------------------------------------------------------

inline unsigned shared_address(const void* p) { return (const char*)p - emulator::shared; }

namespace emulator {

// Products run when they are waited for, as late as they may: who reads results or frees operands too early is found out.
struct Products {
    std::vector<std::function<void()>> open;
    std::deque<std::vector<std::function<void()>>> issued;
};
static Products products_of[1024];

// One number of an operand in shared memory.  `by_k`: rows of 16 channels, which are summed over, else 16 rows of
// channels.  Which of the four warps' sixty-four rows, or which column: n.
inline float operand(unsigned long long described, bool by_k, int n, int k)
{
    const int start = (described & 0x3fff) << 4, leading = (described >> 16 & 0x3fff) << 4;
    const int stride = (described >> 32 & 0x3fff) << 4;
    if (described >> 62 != 1) std::abort();  // the only permutation that we use
    const int at = by_k ? start + n / 8 * stride + n % 8 * 128 + 2 * k
                        : start + n / 64 * leading + n % 64 * 2 + k / 8 * stride + k % 8 * 128;
    unsigned short bits;
    std::memcpy(&bits, shared + (at ^ (at >> 7 & 7) << 4), 2);
    return widened(bits);
}

template <int TILES, typename function>
void add_products(float (&sum)[TILES][4], const float (&a)[2][16], function b)
{
    for (int j = 0; j < TILES; j++)
        for (int i = 0; i < 2; i++)
            for (int k = 0; k < 16; k++) {
                const float x = b(8 * j + number() % 4 * 2 + i, k);
                sum[j][i] += a[0][k] * x;
                sum[j][2 + i] += a[1][k] * x;
            }
}

}  // namespace emulator

template <int TILES>
void hold(float (&)[TILES][4])
{
}
inline void order() {}
inline void show_products() {}
inline void issued()
{
    auto& mine = emulator::products_of[emulator::number()];
    mine.issued.push_back(std::move(mine.open));
    mine.open.clear();
}

template <int last = 0>
void finished()
{
    auto& mine = emulator::products_of[emulator::number()];
    __syncwarp();  // all lanes come here together, and go on together
    for (; (int)mine.issued.size() > last; mine.issued.pop_front())
        for (auto& product : mine.issued.front()) product();
    __syncwarp();
}

template <bool a_across, bool b_across, int TILES>
void products_of(float (&sum)[TILES][4], unsigned long long a, unsigned long long b, bool add)
{
    emulator::products_of[emulator::number()].open.push_back([&sum, a, b, add] {
        const int row = emulator::number() % 128 / 32 * 16 + emulator::number() % 32 / 4;
        float left[2][16];
        for (int i = 0; i < 2; i++)
            for (int k = 0; k < 16; k++) left[i][k] = emulator::operand(a, !a_across, row + 8 * i, k);
        if (!add) std::memset(sum, 0, sizeof sum);
        emulator::add_products(sum, left, [b](int n, int k) { return emulator::operand(b, !b_across, n, k); });
    });
}

template <int TILES>
void products(float (&sum)[TILES][4], unsigned long long a, unsigned long long b, bool add)
{
    products_of<false, false>(sum, a, b, add);
}

namespace emulator {
template <int TILES>
void products_from_registers(float (&sum)[TILES][4], const unsigned (&a)[4], unsigned long long b, bool by_k, bool add)
{
    products_of[number()].open.push_back([&sum, &a, b, by_k, add] {
        struct Operand {
            unsigned a[4];
        };
        auto operands = exchange(Operand{{a[0], a[1], a[2], a[3]}});
        float left[2][16];
        for (int i = 0; i < 2; i++)
            for (int k = 0; k < 16; k += 2) {
                const float2 x = unpack(operands(number() % 32 / 4 * 4 + k % 8 / 2).a[i + k / 8 * 2]);
                left[i][k] = x.x;
                left[i][k + 1] = x.y;
            }
        if (!add) std::memset(sum, 0, sizeof sum);
        add_products(sum, left, [=](int n, int k) { return operand(b, by_k, n, k); });
    });
}
}  // namespace emulator

template <int TILES>
void products(float (&sum)[TILES][4], const unsigned (&a)[4], unsigned long long b)
{
    emulator::products_from_registers(sum, a, b, false, true);
}
template <int TILES>
void products(float (&sum)[TILES][4], const unsigned (&a)[4], unsigned long long b, bool add)
{
    emulator::products_from_registers(sum, a, b, true, add);
}

namespace emulator {
struct Barrier {
    short count, pending;
    int phase;
};
}  // namespace emulator

inline void barrier_begin(unsigned long long* barrier, int count)
{
    *(emulator::Barrier*)barrier = {(short)count, (short)count, 0};
}
inline void barrier_arrive(unsigned long long* barrier)
{
    auto& b = *(emulator::Barrier*)barrier;
    emulator::moves++;
    if (--b.pending == 0) {
        b.pending = b.count;
        b.phase++;
    }
}
inline void barrier_arrive_behind_copies(unsigned long long* barrier) { barrier_arrive(barrier); }
inline void barrier_wait(unsigned long long* barrier, int parity)
{
    while ((((emulator::Barrier*)barrier)->phase & 1) == parity) emulator::yield();
}

inline void store_words(void* to, const unsigned (&word)[4], bool shall)
{
    if (shall) std::memcpy(to, word, sizeof word);
}

inline void turn_wait(int name, int threads)
{
    emulator::named[name].members = threads;
    emulator::wait(emulator::named[name]);
}
inline void turn_pass(int name, int threads)
{
    emulator::Group& group = emulator::named[name];
    group.members = threads;
    emulator::moves++;
    if (++group.arrived == threads) group.open();
}

template <int count>
void fewer_registers()
{
}
template <int count>
void more_registers()
{
}
#endif

// CUDA's language on a CPU, as far as our kernels use it, so that their logic is tested without a GPU.
//
// A block's threads are fibers: each runs until it must wait for others (a barrier, a shuffle, a vote), then the
// next one runs.  Blocks follow one another.  Half of the launches run the threads backwards, so that a
// missing barrier changes results.  Speed, memory order between warps and alignment are not emulated.
#pragma once
#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <ucontext.h>
#include <vector>

#define EMULATED
#define FULL_WARP 0xffffffffu
#define __global__
#define __device__
#define __shared__ static

using std::exp;
using std::fabs;
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
inline int __popc(unsigned x) { return __builtin_popcount(x); }

namespace emulator {

struct Fiber {
    ucontext_t context;  // how it begins; afterwards jumps are used, which need no system call
    jmp_buf place;
    std::vector<char> stack = std::vector<char>(1 << 16);
    dim3 index;
    bool begun = false, done;
};

// Threads that wait for each other: all of a block, or those of a warp.  The last to arrive opens the gate.
struct Group {
    int members = 0, arrived = 0, round = 0, vote = 0, result = 0;
    double slots[32], answers[32];  // what lanes offer; eight bytes hold any number that travels
    unsigned ballot = 0, ballots = 0;
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
static Group block;
static ucontext_t unused;
static jmp_buf scheduler;
static int current;
static void (*body)(void**);
static void** arguments;
static bool backwards;

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
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
}

inline void run_block()
{
    const int count = blockDim.x * blockDim.y * blockDim.z;
    while ((int)fibers.size() < count) add_fiber();
    block = Group();
    block.members = count;
    warps.assign((count + 31) / 32, Group());
    for (int i = 0; i < count; i++) {
        warps[i / 32].members++;
        fibers[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
        fibers[i].done = false;
    }
    for (int left = count; left > 0;) {
        const int before = left, rounds = block.round;
        int moved = 0;
        for (int n = 0; n < count; n++) {
            current = backwards ? count - 1 - n : n;
            if (fibers[current].done) continue;
            threadIdx = fibers[current].index;
            const int arrived = block.arrived + warp().arrived + warp().round;
            resume(fibers[current]);
            moved += arrived != block.arrived + warp().arrived + warp().round;
            left -= fibers[current].done;
        }
        if (before == left && !moved && rounds == block.round) {
            std::fprintf(stderr, "emulator: the threads of a block wait for each other for ever\n");
            std::abort();
        }
    }
}

inline void launch(void (*kernel)(void**), void** args, dim3 grid, dim3 threads)
{
    body = kernel;
    arguments = args;
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

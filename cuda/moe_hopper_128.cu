// Products by expert on Hopper (moe_hopper.cuh) in tiles of 128 x 128: 320 threads, two blocks to a multiprocessor.

#include "tensor_cores.cuh"
#include "hopper.cuh"
#include "moe_hopper.cuh"

extern "C" __global__ void __launch_bounds__(320, 2) grouped_hopper_forward_128(
    const real* x, const real* w, const int* offsets, real* y, int E, int R, int I, int O, i64 x_step, i64 y_step)
{
#if HOPPER
    all_experts<128, 3>(RowsTimesMatrix<128, false>{x, w, offsets, y, 0, E, R, I, O, x_step, y_step});
#endif
}

extern "C" __global__ void __launch_bounds__(320, 2) grouped_hopper_backward_x_128(
    const real* dy, const real* w, const int* offsets, real* dx, int add, int E, int R, int I, int O, i64 dy_step,
    i64 dx_step)
{
#if HOPPER
    all_experts<128, 3>(RowsTimesMatrix<128, true>{dy, w, offsets, dx, add, E, R, O, I, dy_step, dx_step});
#endif
}

extern "C" __global__ void __launch_bounds__(320, 2) grouped_hopper_backward_w_128(
    const real* dy, const real* x, const int* offsets, wide* dw, int E, int I, int O, i64 dy_step, i64 x_step)
{
#if HOPPER
    all_experts<128, 3>(Matrices<128>{dy, x, offsets, dw, E, I, O, dy_step, x_step});
#endif
}

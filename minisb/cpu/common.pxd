# What every native shares: the matrix product and the elementary functions, by C type.
from libc.stdint cimport int64_t

ctypedef fused real:
    float
    double

cdef extern from "blas.h" nogil:
    void gemm_init(size_t single, size_t twice, int wide)
    void gemm_float(int ta, int tb, int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
                    const float* b, int64_t ldb, float beta, float* c, int64_t ldc)
    void gemm_double(int ta, int tb, int64_t m, int64_t n, int64_t k, double alpha, const double* a, int64_t lda,
                     const double* b, int64_t ldb, double beta, double* c, int64_t ldc)

cdef extern from "vmath.h" nogil:
    float exp_float(float x)
    double exp_double(double x)
    float log1p_float(float x)
    double log1p_double(double x)
    float row_max_float(const float* x, int64_t n)
    double row_max_double(const double* x, int64_t n)


cdef inline void gemm_real(int ta, int tb, int64_t m, int64_t n, int64_t k, real alpha, const real* a, int64_t lda,
                           const real* b, int64_t ldb, real beta, real* c, int64_t ldc) noexcept nogil:
    if real is float:
        gemm_float(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc)
    else:
        gemm_double(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc)


cdef inline real exp_real(real x) noexcept nogil:
    if real is float:
        return exp_float(x)
    else:
        return exp_double(x)


cdef inline real log1p_real(real x) noexcept nogil:
    if real is float:
        return log1p_float(x)
    else:
        return log1p_double(x)


cdef inline real sigmoid_real(real x) noexcept nogil:
    """1 / (1 + e^-x): where e^-x is infinite, 0.  <real>1, here and elsewhere: beside a float Cython writes a
    plain 1 as a double, and the whole loop is then computed in double, half as many values at a time."""
    return <real>1 / (<real>1 + exp_real(-x))


cdef inline real row_max(const real* x, int64_t n) noexcept nogil:
    if real is float:
        return row_max_float(x, n)
    else:
        return row_max_double(x, n)


cdef inline real* aligned(real* x) noexcept nogil:
    """The first value from x on that starts a cache line."""
    return <real*>((<size_t>x + 63) // 64 * 64)


cdef inline int team(int threads, int64_t values) noexcept nogil:
    """How many threads to wake for so many values: waking one costs more than a few thousand."""
    return threads if values > 16384 else 1

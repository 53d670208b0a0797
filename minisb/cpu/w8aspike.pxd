# W8ASpike's integers (w8aspike.h), for its own operations and for decode.pyx, which joins them with others.
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t

cdef extern from "w8aspike.h" nogil:
    ctypedef struct Rest:
        int32_t channel, value

    ctypedef struct Spikes:
        int8_t* s
        Rest* rest
        float vth

    ctypedef struct Matrix:
        const int8_t* w
        const float* scales
        float* b  # or NULL
        int64_t O, I, groups

    ctypedef void (*Spike)(const float*, Spikes*, int64_t, float, float, float) noexcept nogil
    ctypedef float (*Query)(const float*, int16_t*, int64_t, float, float, float) noexcept nogil
    ctypedef float (*ToInt8)(const float*, int8_t*, int64_t) noexcept nogil
    ctypedef void (*Attend)(const int16_t*, const float*, const int8_t*, const float*, const int8_t*, const float*,
                            int64_t, int64_t, int64_t, int64_t, float, float*, float*) noexcept nogil

    ctypedef struct Path:
        const char* name
        Spike spike
        Query query
        ToInt8 to_int8
        Attend attend

    int64_t spike_room(int64_t I)
    Spikes spikes_in(int8_t* room, int64_t I)
    void product(const Path* path, const Matrix* m, int64_t first, int64_t last, int64_t N, const Spikes* x, float* y)

# the one that use_path chose
cdef const Path* chosen_path() noexcept nogil

# N tokens x -> y (N,O)
cdef void multiply(int threads, const Matrix* m, int64_t N, const Spikes* x, float* y) noexcept nogil

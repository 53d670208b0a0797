/* W8ASpike in integers: spike counts, the product with int8 weights, attention on int8 keys and values.

   Everything is written once per path, a set of instructions, and a path is chosen when the module is
   loaded: the best that the processor has of "avx512vnni", "avxvnni", "avx2" and "portable".  All paths give equal
   bits, because

   - integer sums are exact in any order.  AVX2 multiplies unsigned by signed bytes and adds two products in
     16 bits.  Small counts are multiplied by w + 128, less 128 times their own sum, which is known
     beforehand: one instruction less than the other way, |s| by w with the sign of s moved over, which fits for
     all of [-127, 127] (32,258).  VNNI adds four such products in 32 bits, in one instruction instead of three.
   - fp32 sums are written in one order: |x| in 32 lanes, groups of a row in index order.
     Compile with -ffp-contract=off and without -fassociative-math, as setup.py does.

   A product reads its weights once, four rows side by side, and nothing else of any size: with one token it
   runs at the speed of memory.  With many tokens the four rows stay in the first cache.  Asking for weights
   AHEAD bytes early, in the order of memory, is what makes it so: alone, the processor does not follow four rows. */
#ifndef MINISB_W8ASPIKE_H
#define MINISB_W8ASPIKE_H
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 128, FOUR = 4, LANES = 32, COUNT_MAX = 1 << 17, SMALL = 31, AHEAD = 10240 };

/* What the counts beyond int8 exceed it by: channels in order, ended by one at INT32_MAX. */
typedef struct {
    int32_t channel, value;
} Rest;

/* One token's counts, as a product reads them. */
typedef struct {
    int8_t *s;      /* counts in [-127, 127], filled up with zeros to whole blocks */
    int8_t *small;  /* for each block of 128: is it whole, with nothing above SMALL or below -SMALL? */
    int32_t *extra; /* for each block: what w + 128 instead of w adds, 128 times the sum of s; 0 if not small */
    Rest *rest;     /* (I + 1) */
    float vth;
} Spikes;

typedef struct {
    const int8_t *w;     /* (O, I) */
    const float *scales; /* (groups, O): those of neighbouring rows lie side by side */
    const float *b;      /* (O) or NULL */
    int64_t O, I, groups; /* groups: I / 128, rounded up, or 1 */
} Matrix;

/* ---- one token's threshold and counts ------------------------------------------------------------ */

/* vth of x (n); NaN if x is not finite.  least and most: where it is clamped. */
static inline __attribute__((always_inline)) float threshold(const float *x, int64_t n, float k, float least,
                                                             float most) {
    float lane[LANES] = {0};
    int64_t c = 0;
    for (; c + LANES <= n; c += LANES)
        for (int j = 0; j < LANES; j++) lane[j] += fabsf(x[c + j]);
    for (int j = 0; c + j < n; j++) lane[j] += fabsf(x[c + j]);
    for (int half = LANES / 2; half; half /= 2)
        for (int j = 0; j < half; j++) lane[j] += lane[j + half];
    float vth = lane[0] / (float)n / k;
    vth = vth < least ? least : vth;
    vth = vth > most ? most : vth;
    return lane[0] <= 3.402823466e38f ? vth : NAN;
}

static inline __attribute__((always_inline)) int32_t count_of(float x, float vth) {
    float t = rintf(x / vth);
    t = t > COUNT_MAX ? COUNT_MAX : t;
    t = t < -COUNT_MAX ? -COUNT_MAX : t;
    return (int32_t)(t == t ? t : 0);
}

static inline __attribute__((always_inline)) int32_t clip(int32_t t, int32_t most) {
    t = t > most ? most : t;
    return t < -most ? -most : t;
}

static inline int32_t bits_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* x (n) -> everything in `to`. */
static inline __attribute__((always_inline)) void spike_body(const float *restrict x, Spikes *to, int64_t n, float k,
                                                             float least, float most) {
    float vth = threshold(x, n, k, least, most);
    int8_t *restrict s = to->s;
    float finite = vth == vth ? vth : INFINITY; /* no spikes at all */
    int32_t beyond = 0, most_int8 = bits_of(127), small = bits_of(SMALL);
    for (int64_t block = 0; block * BLOCK < n; block++, s += BLOCK) {
        /* Loops so short and plain that each becomes vector instructions. */
        const int64_t inside = n - block * BLOCK < BLOCK ? n - block * BLOCK : BLOCK;
        const float *from = x + block * BLOCK;
        float t[BLOCK] = {0};
        int32_t bits[BLOCK], total = 0, top = 0; /* of |t|: numbers of one sign are ordered as their bits are */
        for (int64_t i = 0; i < inside; i++) t[i] = rintf(from[i] / finite);
        if (vth != vth) memset(t, 0, sizeof t);
        memcpy(bits, t, sizeof t);
        for (int i = 0; i < BLOCK; i++) {
            int32_t size = bits[i] & INT32_MAX;
            top = size > top ? size : top;
        }
        for (int i = 0; i < BLOCK; i++) t[i] = t[i] > 127 ? 127 : t[i];
        for (int i = 0; i < BLOCK; i++) t[i] = t[i] < -127 ? -127 : t[i];
        for (int i = 0; i < BLOCK; i++) s[i] = (int8_t)(int32_t)t[i];
        for (int i = 0; i < BLOCK; i++) total += s[i];
        to->small[block] = inside == BLOCK && top <= small;
        to->extra[block] = to->small[block] ? 128 * total : 0;
        beyond |= top > most_int8;
    }
    s = to->s;
    Rest *rest = to->rest;
    for (int64_t c = 0; beyond && c < n; c++)
        if (s[c] == 127 || s[c] == -127) {
            int32_t t = count_of(x[c], vth) - s[c];
            if (t) *rest++ = (Rest){(int32_t)c, t};
        }
    rest->channel = INT32_MAX;
    to->vth = vth;
}

/* One head's query: counts as int16. */
static inline __attribute__((always_inline)) float query_body(const float *restrict x, int16_t *restrict s, int64_t n,
                                                              float k, float least, float most) {
    float vth = threshold(x, n, k, least, most);
    for (int64_t c = 0; c < n; c++) s[c] = (int16_t)clip(count_of(x[c], vth), 32767);
    return vth;
}

/* One head's key or value: int8, returns its unit max|x| / 127. */
static inline __attribute__((always_inline)) float to_int8_body(const float *restrict x, int8_t *restrict to,
                                                                int64_t n) {
    float top = 0, unit, nan = 0;
    for (int64_t c = 0; c < n; c++) {
        float a = fabsf(x[c]);
        nan += a * 0;
        top = a > top ? a : top;
    }
    unit = top / 127.0f;
    unit = unit < 0x1p-126f ? 0x1p-126f : unit;
    unit = nan == 0 ? unit : NAN;
    for (int64_t c = 0; c < n; c++) to[c] = (int8_t)clip(count_of(x[c], unit), 127);
    return unit;
}

/* ---- the product --------------------------------------------------------------------------------- */

/* `rows` <= 4 rows of y = vth * sum over groups of scale * (w s) + b, for one token. */
static void rows_portable(const Matrix *m, int64_t row, int rows, const Spikes *x, float *y) {
    for (int r = 0; r < rows; r++) {
        const int8_t *w = m->w + (row + r) * m->I;
        const float *scale = m->scales + row + r;
        const Rest *rest = x->rest;
        float total = 0;
        int32_t whole = 0; /* of the row, where it has one scale */
        for (int64_t at = 0; at < m->I; at += BLOCK) {
            const int size = (int)(m->I - at < BLOCK ? m->I - at : BLOCK);
            int32_t sum = 0;
            for (int i = 0; i < size; i++) sum += (int32_t)w[at + i] * x->s[at + i];
            for (; rest->channel < at + size; rest++) sum += w[rest->channel] * rest->value;
            if (m->groups == 1) {
                whole += sum;
            } else {
                total += (float)sum * *scale;
                scale += m->O;
            }
        }
        if (m->groups == 1) total += (float)whole * *scale;
        total *= x->vth;
        y[row + r] = m->b ? total + m->b[row + r] : total;
    }
}

/* ---- attention of one query over an int8 cache --------------------------------------------------- */

/* The R query heads of one key head: q (R, D) counts, qv (R); k, v (count, ..ld) int8, ku, vu (count, ..G).
   p: room for count values.  o (R, D). */
#define DEFINE_ATTEND(PATH, TARGET)                                                                              \
    TARGET static void attend_##PATH(const int16_t *q, const float *qv, const int8_t *k, const float *ku,        \
                                     const int8_t *v, const float *vu, int64_t R, int64_t D, int64_t G,          \
                                     int64_t count, float scale, float *p, float *o) {                           \
        for (int64_t r = 0; r < R; r++, q += D, o += D) {                                                        \
            float top = -INFINITY, total = 0, unit = qv[r] * scale;                                              \
            for (int64_t j = 0; j < count; j++) {                                                                \
                const int8_t *key = k + j * G * D;                                                               \
                int32_t sum = 0;                                                                                 \
                for (int64_t d = 0; d < D; d++) sum += (int32_t)q[d] * key[d];                                   \
                p[j] = (float)sum * (unit * ku[j * G]);                                                          \
                top = p[j] > top ? p[j] : top;                                                                   \
            }                                                                                                    \
            for (int64_t j = 0; j < count; j++) p[j] = exp_float(p[j] - top);                                    \
            for (int64_t j = 0; j < count; j++) total += p[j];                                                   \
            for (int64_t d = 0; d < D; d++) o[d] = 0;                                                            \
            for (int64_t j = 0; j < count; j++) {                                                                \
                const int8_t *value = v + j * G * D;                                                             \
                float share = p[j] / total * vu[j * G];                                                          \
                for (int64_t d = 0; d < D; d++) o[d] += share * (float)value[d];                                 \
            }                                                                                                    \
        }                                                                                                        \
    }

/* ---- the paths ----------------------------------------------------------------------------------- */

#include "vmath.h"

#define DEFINE_PATH(PATH, TARGET)                                                                                \
    TARGET static void spike_##PATH(const float *x, Spikes *to, int64_t n, float k, float least, float most) {   \
        spike_body(x, to, n, k, least, most);                                                                    \
    }                                                                                                            \
    TARGET static float query_##PATH(const float *x, int16_t *s, int64_t n, float k, float least, float most) {  \
        return query_body(x, s, n, k, least, most);                                                              \
    }                                                                                                            \
    TARGET static float to_int8_##PATH(const float *x, int8_t *to, int64_t n) { return to_int8_body(x, to, n); } \
    DEFINE_ATTEND(PATH, TARGET)

DEFINE_PATH(portable, )

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma")))

AVX2 static inline __m256i load32(const int8_t *x) { return _mm256_loadu_si256((const __m256i *)x); }

/* 32 products in 16 sums of two: w + 128 times small counts s, or |s| times w with the sign of s. */
AVX2 static inline __m256i small_pairs(__m256i w, __m256i s) {
    return _mm256_maddubs_epi16(_mm256_xor_si256(w, _mm256_set1_epi8(-128)), s);
}

AVX2 static inline __m256i any_pairs(__m256i w, __m256i s) {
    return _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(w, s));
}

/* 16 sums of 16 bits in 8 of 32 bits. */
AVX2 static inline __m256i widen(__m256i x) { return _mm256_madd_epi16(x, _mm256_set1_epi16(1)); }

/* The sums of four vectors. */
AVX2 static inline __m128i across(const __m256i *sum) {
    __m256i both = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[0], sum[1]), _mm256_hadd_epi32(sum[2], sum[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
}

/* A block of small counts with four rows that lie I apart, and what w + 128 adds to each.
   2 * 2 * 255 * 31 still fits in 16 bits, so pairs are widened two by two. */
AVX2 static inline __m128i small_block(const int8_t *w, int64_t I, const int8_t *s) {
    __m256i sum[FOUR];
    _Pragma("GCC unroll 4") for (int r = 0; r < FOUR; r++, w += I) {
        __m256i a = _mm256_add_epi16(small_pairs(load32(w), load32(s)), small_pairs(load32(w + 32), load32(s + 32)));
        __m256i b = _mm256_add_epi16(small_pairs(load32(w + 64), load32(s + 64)),
                                     small_pairs(load32(w + 96), load32(s + 96)));
        sum[r] = _mm256_add_epi32(widen(a), widen(b));
    }
    return across(sum);
}

/* n <= 128 counts of any size with four rows. */
AVX2 static __attribute__((noinline)) __m128i any_block(const int8_t *w, int64_t I, const int8_t *s, int64_t n) {
    __m256i sum[FOUR];
    for (int r = 0; r < FOUR; r++) sum[r] = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        _Pragma("GCC unroll 4") for (int r = 0; r < FOUR; r++)
            sum[r] = _mm256_add_epi32(sum[r], widen(any_pairs(load32(w + r * I + i), load32(s + i))));
    for (int r = 0; i < n && r < FOUR; r++) {
        int8_t tail[32] = {0};
        memcpy(tail, w + r * I + i, n - i);
        sum[r] = _mm256_add_epi32(sum[r], widen(any_pairs(load32(tail), load32(s + i))));
    }
    return across(sum);
}

typedef __m128i Block(const int8_t *w, int64_t I, const int8_t *s);

/* As rows_portable, four rows in the lanes of a vector.  small: of this path, known when this is compiled. */
AVX2 static inline __attribute__((always_inline)) void rows_of(const Matrix *m, int64_t row, int rows, const Spikes *x,
                                                               float *y, Block *small) {
    const int64_t I = m->I, O = m->O, by_group = m->groups > 1;
    const int8_t *w = m->w + row * I, *s = x->s;
    const float *scale = m->scales + row;
    const Rest *rest = x->rest;
    __m128 total = _mm_setzero_ps();
    __m128i whole = _mm_setzero_si128();
    if (rows < FOUR) {
        rows_portable(m, row, rows, x, y);
        return;
    }
    for (int64_t at = 0; at < I; at += BLOCK) {
        /* The four rows are one stretch of memory, to be asked for from its beginning to its end. */
        _Pragma("GCC unroll 8") for (int line = 0; line < FOUR * BLOCK; line += 64)
            _mm_prefetch((const char *)w + FOUR * at + AHEAD + line, _MM_HINT_T0);
        __m128i sum = x->small[at / BLOCK] ? small(w + at, I, s + at)
                                           : any_block(w + at, I, s + at, I - at < BLOCK ? I - at : BLOCK);
        sum = _mm_sub_epi32(sum, _mm_set1_epi32(x->extra[at / BLOCK]));
        for (; rest->channel < at + BLOCK; rest++) {
            const int8_t *c = w + rest->channel;
            __m128i four = _mm_setr_epi32(c[0], c[I], c[2 * I], c[3 * I]);
            sum = _mm_add_epi32(sum, _mm_mullo_epi32(four, _mm_set1_epi32(rest->value)));
        }
        if (by_group) {
            total = _mm_add_ps(total, _mm_mul_ps(_mm_cvtepi32_ps(sum), _mm_loadu_ps(scale)));
            scale += O;
        } else {
            whole = _mm_add_epi32(whole, sum);
        }
    }
    if (!by_group) total = _mm_mul_ps(_mm_cvtepi32_ps(whole), _mm_loadu_ps(scale));
    total = _mm_mul_ps(total, _mm_set1_ps(x->vth));
    if (m->b) total = _mm_add_ps(total, _mm_loadu_ps(m->b + row));
    _mm_storeu_ps(y + row, total);
}

AVX2 static void rows_avx2(const Matrix *m, int64_t row, int rows, const Spikes *x, float *y) {
    rows_of(m, row, rows, x, y, small_block);
}

DEFINE_PATH(avx2, AVX2)

/* The same with VNNI, which comes in two encodings. */
#define DEFINE_VNNI(PATH, TARGET, DOT)                                                                         \
    TARGET static inline __m128i small_block_##PATH(const int8_t *w, int64_t I, const int8_t *s) {             \
        const __m256i up = _mm256_set1_epi8(-128);                                                             \
        __m256i sum[FOUR];                                                                                     \
        _Pragma("GCC unroll 4") for (int r = 0; r < FOUR; r++, w += I) {                                       \
            sum[r] = _mm256_setzero_si256();                                                                   \
            _Pragma("GCC unroll 4") for (int i = 0; i < BLOCK; i += 32)                                        \
                sum[r] = DOT(sum[r], _mm256_xor_si256(load32(w + i), up), load32(s + i));                      \
        }                                                                                                      \
        return across(sum);                                                                                    \
    }                                                                                                          \
    TARGET static void rows_##PATH(const Matrix *m, int64_t row, int rows, const Spikes *x, float *y) {        \
        rows_of(m, row, rows, x, y, small_block_##PATH);                                                       \
    }                                                                                                          \
    DEFINE_PATH(PATH, TARGET)

#if __GNUC__ >= 11
DEFINE_VNNI(avxvnni, __attribute__((target("avx2,fma,avxvnni"))), _mm256_dpbusd_avx_epi32)
DEFINE_VNNI(avx512vnni, __attribute__((target("avx2,fma,avx512vl,avx512vnni"))), _mm256_dpbusd_epi32)
#endif
#endif

typedef struct {
    const char *name;
    void (*spike)(const float *, Spikes *, int64_t, float, float, float);
    float (*query)(const float *, int16_t *, int64_t, float, float, float);
    float (*to_int8)(const float *, int8_t *, int64_t);
    void (*rows)(const Matrix *, int64_t, int, const Spikes *, float *);
    void (*attend)(const int16_t *, const float *, const int8_t *, const float *, const int8_t *, const float *,
                   int64_t, int64_t, int64_t, int64_t, float, float *, float *);
} Path;

#define PATH_OF(NAME) {#NAME, spike_##NAME, query_##NAME, to_int8_##NAME, rows_##NAME, attend_##NAME}

/* The paths that this processor can run, the best first. */
static int find_paths(Path *found) {
    int n = 0;
#if defined(__GNUC__) && defined(__x86_64__)
#if __GNUC__ >= 11
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl"))
        found[n++] = (Path)PATH_OF(avx512vnni);
    if (__builtin_cpu_supports("avxvnni")) found[n++] = (Path)PATH_OF(avxvnni);
#endif
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[n++] = (Path)PATH_OF(avx2);
#endif
    found[n++] = (Path)PATH_OF(portable);
    return n;
}

/* Where a token's counts lie in `room`, of spike_room(I) bytes that start on a cache line. */
static Spikes spikes_in(int8_t *room, int64_t I) {
    int64_t blocks = (I + BLOCK - 1) / BLOCK, wide = blocks * BLOCK;
    int32_t *extra = (int32_t *)(room + wide);
    Rest *rest = (Rest *)(extra + blocks);
    return (Spikes){room, (int8_t *)(rest + I + 1), extra, rest, 0};
}

static int64_t spike_room(int64_t I) {
    int64_t blocks = (I + BLOCK - 1) / BLOCK;
    return (spikes_in(0, I).small + blocks - (int8_t *)0 + 63) / 64 * 64;
}

/* Rows first to last of the product for all N tokens x -> y (N, O). */
static void product(const Path *path, const Matrix *m, int64_t first, int64_t last, int64_t N, const Spikes *x,
                    float *y) {
    for (int64_t row = first; row < last; row += FOUR)
        for (int64_t t = 0; t < N; t++)
            path->rows(m, row, (int)(last - row < FOUR ? last - row : FOUR), x + t, y + t * m->O);
}

/* Reads n bytes and does next to nothing with them: the speed limit of a product.  n a multiple of 256. */
static uint64_t read_bytes(const uint64_t *x, int64_t n) {
    uint64_t sum[32] = {0}, all = 0;
    for (int64_t i = 0; i < n / 8; i += 32)
        for (int j = 0; j < 32; j++) sum[j] += x[i + j];
    for (int j = 0; j < 32; j++) all += sum[j];
    return all;
}
#endif

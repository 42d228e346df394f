/* Block-sparse attention on a CPU: one job is one row of blocks of one head.

   Blocks of keys are visited in turn with the running maximum and sum of an online softmax
   (Milakov and Gimelshein, 2018, arXiv:1805.02867), as FlashAttention does: a tile of scores, a
   tile of weights, a sum of values, all within the second-level cache. Jobs are taken from a
   shared counter, so that any number of threads may run the same problem. All is float32;
   `block_sparse.py` says what the numbers mean. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define WIDE 4 /* 6 x 4 sums + 4 + 1 of 32 registers */
#elif defined(__AVX__)
#define LANES 8
#define WIDE 2 /* 6 x 2 sums + 2 + 1 of 16 registers */
#else
#define LANES 4
#define WIDE 2
#endif
#define TALL 6

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

typedef struct {
    const float *q;         /* [heads, rows * block_q, d], times scale * log2(e) */
    const float *k;         /* [kv_heads, columns, d, block_k] */
    const float *v;         /* [kv_heads, columns, block_k, d] */
    const int32_t *counts;  /* [heads, rows] */
    const int32_t *indices; /* [heads, rows, columns] */
    const int32_t *kv_head; /* [heads] */
    const float *bias;      /* [batch, columns * block_k], -inf: a key nobody sees; or NULL */
    float *out;             /* [heads, rows * block_q, d] */
    float *lse;             /* [heads, rows * block_q], or NULL */
    int64_t heads, rows, columns, block_q, block_k, d; /* block_k and d: multiples of 16 */
    int64_t m;              /* keys from here on do not exist */
    int64_t causal;         /* key j is seen by queries i >= j only */
    int64_t batch;
    int64_t next;           /* the next job */
    int64_t failed;         /* set to 1 where there is no memory */
} Problem;

static inline floats load(const float *p) {
    floats x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline void store(float *p, floats x) { memcpy(p, &x, sizeof x); }

static inline floats fill(float x) { return x - (floats){0}; }

static inline floats choose(ints mask, floats yes, floats no) {
    return (floats)(((ints)yes & mask) | ((ints)no & ~mask));
}

/* 2^x for x <= 0, to 2 ulp; 0 below 2^-126; NaN stays. */
static inline floats power_of_two(floats x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to the nearest integer */
    floats rounded = x + shift;
    ints exponent = (ints)rounded - 0x4B400000;
    floats f = x - (rounded - shift);
    floats p = fill(1.5403530e-4f); /* Taylor's series of 2^f on [-1/2, 1/2] */
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    p *= (floats)((exponent + 127) << 23);
    return choose(x < -126.0f, fill(0.0f), p);
}

/* c[tall, wide * LANES] = a[tall, depth] b[depth, wide * LANES], added to what c holds or not. */
static inline __attribute__((always_inline)) void tile(
    int tall, int wide, const float *a, int64_t lda, const float *b, int64_t ldb,
    float *c, int64_t ldc, int64_t depth, int add) {
    floats sum[TALL][WIDE];
    for (int i = 0; i < tall; i++)
        for (int j = 0; j < wide; j++)
            sum[i][j] = add ? load(c + i * ldc + j * LANES) : fill(0.0f);
    for (int64_t p = 0; p < depth; p++) {
        floats row[WIDE];
        for (int j = 0; j < wide; j++) row[j] = load(b + p * ldb + j * LANES);
        for (int i = 0; i < tall; i++) {
            floats x = fill(a[i * lda + p]);
            for (int j = 0; j < wide; j++) sum[i][j] += x * row[j];
        }
    }
    for (int i = 0; i < tall; i++)
        for (int j = 0; j < wide; j++) store(c + i * ldc + j * LANES, sum[i][j]);
}

static inline __attribute__((always_inline)) void strip(
    int wide, const float *a, int64_t lda, const float *b, int64_t ldb,
    float *c, int64_t ldc, int64_t tall, int64_t depth, int add) {
    int64_t i = 0;
    for (; i + TALL <= tall; i += TALL)
        tile(TALL, wide, a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, add);
    for (; i < tall; i++) tile(1, wide, a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, add);
}

static void product(const float *a, const float *b, float *c,
                    int64_t tall, int64_t wide, int64_t depth, int add) {
    int64_t j = 0;
    for (; j + WIDE * LANES <= wide; j += WIDE * LANES)
        strip(WIDE, a, depth, b + j, wide, c + j, wide, tall, depth, add);
    for (; j < wide; j += LANES) strip(1, a, depth, b + j, wide, c + j, wide, tall, depth, add);
}

static float largest(const float *row, int64_t count, float top) {
    floats most = load(row);
    for (int64_t j = LANES; j < count; j += LANES) {
        floats x = load(row + j);
        most = choose(x > most, x, most);
    }
    for (int j = 0; j < LANES; j++) top = most[j] > top ? most[j] : top;
    return top;
}

static float exponentials(float *row, int64_t count, float base) {
    floats total = fill(0.0f);
    for (int64_t j = 0; j < count; j += LANES) {
        floats weight = power_of_two(load(row + j) - base);
        store(row + j, weight);
        total += weight;
    }
    float sum = 0.0f;
    for (int j = 0; j < LANES; j++) sum += total[j];
    return sum;
}

static void attend(const Problem *t, int64_t job, float *scores, float *acc, float *top,
                   float *sum) {
    int64_t bq = t->block_q, bk = t->block_k, d = t->d, row = job % t->rows;
    int64_t first_block = t->kv_head[job / t->rows] * t->columns;
    const float *q = t->q + job * bq * d, *bias = t->bias;
    if (bias) bias += job / (t->heads / t->batch * t->rows) * t->columns * bk;
    memset(acc, 0, sizeof(float) * bq * d);
    memset(sum, 0, sizeof(float) * bq);
    for (int64_t i = 0; i < bq; i++) top[i] = -INFINITY;
    for (int32_t c = 0; c < t->counts[job]; c++) {
        int64_t block = t->indices[job * t->columns + c], j0 = block * bk;
        if (t->causal && j0 > row * bq + bq - 1) continue;
        product(q, t->k + (first_block + block) * d * bk, scores, bq, bk, d, 0);
        int edge = j0 + bk > t->m || (t->causal && j0 + bk - 1 > row * bq);
        for (int64_t i = 0; i < bq; i++) {
            float *mine = scores + i * bk;
            if (bias)
                for (int64_t j = 0; j < bk; j += LANES)
                    store(mine + j, choose(load(bias + j0 + j) < 0.0f, fill(-INFINITY),
                                           load(mine + j))); /* not a sum: NaN stays hidden */
            if (edge) {
                int64_t seen = t->m - j0;
                if (t->causal && row * bq + i + 1 - j0 < seen) seen = row * bq + i + 1 - j0;
                for (int64_t j = seen > 0 ? seen : 0; j < bk; j++) mine[j] = -INFINITY;
            }
            float now = largest(mine, bk, top[i]);
            if (now != top[i]) {
                float shrink = exp2f(top[i] - now);
                sum[i] *= shrink;
                for (int64_t j = 0; j < d; j += LANES)
                    store(acc + i * d + j, load(acc + i * d + j) * shrink);
                top[i] = now;
            }
            sum[i] += exponentials(mine, bk, now == -INFINITY ? 0.0f : now);
        }
        product(scores, t->v + (first_block + block) * bk * d, acc, bq, d, bk, 1);
    }
    for (int64_t i = 0; i < bq; i++) {
        float share = sum[i] == 0.0f ? 0.0f : 1.0f / sum[i];
        for (int64_t j = 0; j < d; j += LANES)
            store(t->out + (job * bq + i) * d + j, load(acc + i * d + j) * share);
        if (t->lse) t->lse[job * bq + i] = (top[i] + log2f(sum[i])) * 0.6931471805599453f;
    }
}

/* Do jobs until none is left. */
void block_sparse_attention(Problem *t) {
    int64_t bq = t->block_q;
    float *room = malloc(sizeof(float) * bq * (t->block_k + t->d + 2));
    if (!room) {
        t->failed = 1;
        return;
    }
    float *acc = room + bq * t->block_k, *top = acc + bq * t->d;
    for (;;) {
        int64_t job = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED);
        if (job >= t->heads * t->rows) break;
        attend(t, job, room, acc, top, top + bq);
    }
    free(room);
}

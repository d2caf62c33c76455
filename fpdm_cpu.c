// fpdm_cpu.c: fixed-point diffusion models (arXiv:2401.08741) on CPUs, the whole program in one file: model, forward
// and backward pass, training, sampling. C11 with the extensions of gcc and clang, libm, Linux; OpenMP where the
// compiler has it.
//
//   make train_cpu && ./train_cpu       trains on pictures that it draws itself, writes weights and samples to out/
//   make sample_cpu && ./sample_cpu     draws pictures from trained weights
//   make bench_cpu && ./bench_cpu       measures speed and memory;      make test: tests;      --help: every option
//
// Search for    What you learn there
// "Interface"   the few functions of Part 5 that the model asks for
// "Part 1."     the model: its equations, its parameters, each layer above its gradient, the fixed point, the whole
// "Part 2."     diffusion: noise schedule, training loss, samplers, how a budget of iterations is spent
// "Part 3."     learning: AdamW, Muon, the moving average of the weights, the training loop
// "Part 4."     speed and memory: the matrix product that everything runs on, exp, where activations lie
// "Part 5."     plumbing: ranks, random numbers, files, options, pictures, data, programs; nothing new about the model
//
// "Shared block" marks what fpdm_cpu.c and fpdm.cu have in common, byte for byte.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <assert.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef MPI
#include <mpi.h>
#include <sched.h>
#endif
#if defined __AVX512F__ && defined __AMX_BF16__ && defined __linux__ && !defined AMX_PLAIN
#define AMX // Intel's tiles, for bf16: Part 4
#include <sys/syscall.h>
#endif
#if defined __AVX512BF16__ || defined AMX
#include <immintrin.h>
#endif

#define TARGET "cpu" // what this program's name ends in
#ifndef REAL
#define REAL float // tests also build with -DREAL=double, for a numerical check of the gradients
#endif
typedef REAL real;

// =====================================================================================================================
// Shared block 1 of 4. Interface: what stands in Part 5, as far as the parts before it use it
// =====================================================================================================================

// Every mistake of the user ends in die: one line on standard error, exit status 1.
__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *fmt, ...);
static void *xcalloc(size_t count, size_t size, const char *what); // zeroed and aligned, or the program ends
static void xfree(void *p);
static double now_ms(void);
__attribute__((unused)) static double memory_limit(void); // bytes that this process may use
static void progress(int64_t more);                       // more units of the task at hand are done

// Random numbers have no state: a draw is a function of (seed, index, step, stream).
enum Streams {
    STREAM_INIT,    // initial weights
    STREAM_DATA,    // which samples make a batch; the pictures of `shapes`
    STREAM_T,       // timesteps
    STREAM_NOISE,   // noise added in training
    STREAM_DROP,    // labels dropped for guidance
    STREAM_NM,      // numbers of iterations without and with gradient
    STREAM_XT,      // noise that sampling starts from
    STREAM_Z,       // noise added during sampling
    STREAM_AUGMENT, // flips
};
static void philox(uint32_t out[4], uint64_t seed, uint32_t index, uint32_t step, uint32_t stream);
static double rng_uniform(uint32_t word);             // 0..1
static uint32_t rng_below(uint32_t word, uint32_t n); // 0..n-1
static void rng_normal(float *out, size_t count, size_t first, uint64_t seed, uint32_t step, uint32_t stream);

typedef struct Dataset Dataset; // pictures and labels: a file's, or those of `shapes`
// x (count,C,S,S), y (count): pictures first..first+count-1 of a step's batch
static void dataset_batch(Dataset *d, float *x, int *y, int64_t step, int batch, int first, int count, int hflip,
                          double label_drop);

// =====================================================================================================================
// Part 1. The model
//
//   tokens = patches of x_t · patch + pos                        pos is fixed: sines and cosines of row and column
//   cond   = time2·silu(time0·[cos(t·f), sin(t·f)]) + label_table[y],  f_i = 10000^(-i/128), i = 0..127
//   cond_pp = cond, or as in the paper (timestep_in_pre_post 0) label_table[y] alone
//   h      = pre blocks (tokens, cond_pp)
//   inj    = inject·h                                            the input injection: z may forget x_t, inj does not
//   z_0    = h, or in sampling the solution of the timestep before
//   z_k    = block( fp2·gelu(fp1·[z_{k-1}; inj]), cond )         the same weights for every k, until z settles
//   out    = unpatch( final·modulate(post blocks (z_K + skip·h, cond_pp)) )    skip: 0 in the paper, 1 by our default;
//                                        this modulate has a shift and scale of its own, final_ada·silu(cond_pp)
//
//   block(x, c):   shift1, scale1, gate1, shift2, scale2, gate2 = ada·silu(c);   modulate(x) = LN(x)·(1+scale)+shift
//       x <- x + gate1·proj(attention(qkv(modulate1(x))))
//       x <- x + gate2·fc2(gelu(fc1(modulate2(x))))
//
// Every layer but LN has a bias, left out above; gelu is the tanh form, a softmax's scale 1/sqrt(head size), the MLP's
// width 4D. With fixed_point 0 the model is plain DiT (arXiv:2212.09748): `depth` blocks in a row that all see cond.
// =====================================================================================================================

// What the network gives: the noise; v = sqrt(ab)·noise - sqrt(1-ab)·x0, ab = alpha_bar; the velocity x0 - noise; x0
enum Prediction { PREDICT_EPS, PREDICT_V, PREDICT_FLOW, PREDICT_X };
enum TimeEmbedding { TIME_DIT, TIME_SIT, TIME_DIFFUSERS };
enum VWeight { V_WEIGHT_1, V_WEIGHT_P2 };
enum { DIFFUSION_STEPS = 1000 };
enum Arithmetic { COMPUTE_AUTO, COMPUTE_FP32, COMPUTE_BF16 }; // of --dtype

typedef struct {     // what a weight file's metadata says: the model and the diffusion that it was trained for
    int image_size;  // H = W of the input, pixels (or latent pixels)
    int channels;    // C
    int patch;       // p: tokens T = (image_size / p)^2
    int width;       // D
    int heads;       // H: head size hd = D / H
    int mlp_ratio;   // always 4
    int classes;     // label `classes` is the "no label" token; 0 for unlabelled data
    int learn_sigma; // 2C output channels: prediction, then variance
    int fixed_point; // 0: plain DiT
    int depth;       // DiT: blocks; fixed point: sets the default iterations, depth - pre - post
    int pre_depth, post_depth;
    int timestep_in_pre_post;
    int skip;       // the post blocks get z + h, not z alone: a skip connection around the loop
    int prediction; // enum Prediction
    int zero_terminal_snr;
    int v_weight;        // enum VWeight
    int diffusion_steps; // always 1000
    int time_embedding;  // enum TimeEmbedding
} Config;

static size_t config_pixels(const Config *c) { return (size_t)c->channels * c->image_size * c->image_size; }
// Angle i of timestep t's embedding: t·f_i in DiT; SiT's time is 1 - t/1000, and diffusers' f_i is 10000^(-i/127).
static double time_angle(const Config *c, int t, int i) {
    double time = c->time_embedding == TIME_SIT ? 1 - t / 1000. : t;
    return time * exp(-log(10000) * i / (c->time_embedding == TIME_DIFFUSERS ? 127 : 128));
}

static int config_tokens(const Config *c) { return (c->image_size / c->patch) * (c->image_size / c->patch); }
static int config_out_channels(const Config *c) { return c->learn_sigma ? 2 * c->channels : c->channels; }
static int config_blocks(const Config *c) { return c->fixed_point ? c->pre_depth + 1 + c->post_depth : c->depth; }
static int config_straight(const Config *c) { // whether x_t is on the line (1-tau)·x0 + tau·noise, tau = t/1000
    return c->prediction == PREDICT_FLOW || c->prediction == PREDICT_X;
}
static int config_iterations(const Config *c) { // default iterations per timestep
    int k = c->depth - c->pre_depth - c->post_depth;
    return k < 1 ? 1 : k;
}

// ---------------------------------------------------------------------------------------------------------------------
// Parameters: one allocation each for weights, gradients, the two Adam moments and the EMA, all laid out alike. One
// walk makes both the list of tensors, with their names in the published PyTorch state dict, and the pointers into an
// allocation.

typedef struct {
    real *qkv_w, *qkv_b;   // (3D,D), (3D)
    real *proj_w, *proj_b; // (D,D), (D)
    real *fc1_w, *fc1_b;   // (4D,D), (4D)
    real *fc2_w, *fc2_b;   // (D,4D), (D)
    real *ada_w, *ada_b;   // (6D,D), (6D): shift1, scale1, gate1, shift2, scale2, gate2
} BlockParams;

enum { MAX_BLOCKS = 65 }; // pre, the fixed-point block and post; or DiT's
typedef struct {
    real *patch_w, *patch_b;         // (D,C·p·p), (D)
    real *time0_w, *time0_b;         // (D,256), (D)
    real *time2_w, *time2_b;         // (D,D), (D)
    real *label_table;               // (classes+1,D)
    BlockParams block[MAX_BLOCKS];   // pre blocks, [fixed-point block], post blocks
    real *inject_w, *inject_b;       // (D,D), (D)     block_pre_projection
    real *fp1_w, *fp1_b;             // (2D,2D), (2D)  block_fixed_point_projection_fc1: columns of z, then of inj
    real *fp2_w, *fp2_b;             // (D,2D), (D)    block_fixed_point_projection_fc2
    real *final_w, *final_b;         // (p·p·Cout,D), (p·p·Cout)
    real *final_ada_w, *final_ada_b; // (2D,D), (2D): shift, scale
} Params;

enum { INIT_ZERO, INIT_XAVIER, INIT_NORMAL };
typedef struct {
    char name[80];
    int init, ndim;
    int64_t shape[4];
    int64_t offset, count; // in elements of the allocation
} ParamTensor;

typedef struct {
    real *memory;      // NULL: the sizes alone
    ParamTensor *list; // may be NULL
    int count;
    int64_t size;
} ParamWalk;

// The next tensor, GROUP + NAME; pass 1 for the dimensions beyond ndim.
static real *param(ParamWalk *w, const char *group, const char *name, int init, int ndim, int64_t n0, int64_t n1,
                   int64_t n2, int64_t n3) {
    ParamTensor t = {"", init, ndim, {n0, n1, n2, n3}, w->size, n0 * n1 * n2 * n3};
    snprintf(t.name, sizeof t.name, "%s%s", group, name);
    if (w->list) w->list[w->count] = t;
    w->count++;
    w->size += t.count;
    return w->memory ? w->memory + t.offset : NULL;
}

// weight (N,K) and bias (N) of the layer GROUP + NAME
static void param_linear(ParamWalk *w, const char *group, const char *name, int init, int64_t N, int64_t K,
                         real **weight, real **bias) {
    char layer[64];
    snprintf(layer, sizeof layer, "%s%s", group, name);
    *weight = param(w, layer, ".weight", init, 2, N, K, 1, 1);
    *bias = param(w, layer, ".bias", INIT_ZERO, 1, N, 1, 1, 1);
}

// `format` is the block's name, with a place for its index.
static void param_block(ParamWalk *w, const char *format, int index, BlockParams *p, int64_t D) {
    char block[40];
    snprintf(block, sizeof block, format, index);
    param_linear(w, block, ".attn.qkv", INIT_XAVIER, 3 * D, D, &p->qkv_w, &p->qkv_b);
    param_linear(w, block, ".attn.proj", INIT_XAVIER, D, D, &p->proj_w, &p->proj_b);
    param_linear(w, block, ".mlp.fc1", INIT_XAVIER, 4 * D, D, &p->fc1_w, &p->fc1_b);
    param_linear(w, block, ".mlp.fc2", INIT_XAVIER, D, 4 * D, &p->fc2_w, &p->fc2_b);
    param_linear(w, block, ".adaLN_modulation.1", INIT_ZERO, 6 * D, D, &p->ada_w, &p->ada_b);
}

// Points *p into `memory` and fills `list`; either may be NULL. The walk that comes back says how many tensors `list`
// needs room for, and how many elements `memory`.
static ParamWalk params_point(Params *p, const Config *c, real *memory, ParamTensor *list) {
    ParamWalk walk = {memory, list, 0, 0}, *w = &walk;
    int64_t D = c->width, outputs = (int64_t)c->patch * c->patch * config_out_channels(c);
    p->patch_w = param(w, "x_embedder.proj", ".weight", INIT_XAVIER, 4, D, c->channels, c->patch, c->patch);
    p->patch_b = param(w, "x_embedder.proj", ".bias", INIT_ZERO, 1, D, 1, 1, 1);
    param_linear(w, "t_embedder", ".mlp.0", INIT_NORMAL, D, 256, &p->time0_w, &p->time0_b);
    param_linear(w, "t_embedder", ".mlp.2", INIT_NORMAL, D, D, &p->time2_w, &p->time2_b);
    p->label_table = param(w, "y_embedder", ".embedding_table.weight", INIT_NORMAL, 2, c->classes + 1, D, 1, 1);
    for (int i = 0; !c->fixed_point && i < c->depth; i++) param_block(w, "blocks.%d", i, &p->block[i], D);
    if (c->fixed_point) {
        const char *fp = "block_fixed_point";
        int pre = c->pre_depth;
        for (int i = 0; i < pre; i++) param_block(w, "blocks_pre.%d", i, &p->block[i], D);
        param_linear(w, "block_pre", "_projection", INIT_XAVIER, D, D, &p->inject_w, &p->inject_b);
        param_linear(w, fp, "_projection_fc1", INIT_XAVIER, 2 * D, 2 * D, &p->fp1_w, &p->fp1_b);
        param_linear(w, fp, "_projection_fc2", INIT_XAVIER, D, 2 * D, &p->fp2_w, &p->fp2_b);
        param_block(w, fp, 0, &p->block[pre], D);
        for (int i = 0; i < c->post_depth; i++) param_block(w, "blocks_post.%d", i, &p->block[pre + 1 + i], D);
    }
    param_linear(w, "final_layer", ".linear", INIT_ZERO, outputs, D, &p->final_w, &p->final_b);
    param_linear(w, "final_layer", ".adaLN_modulation.1", INIT_ZERO, 2 * D, D, &p->final_ada_w, &p->final_ada_b);
    return walk;
}

// Initial weights: Xavier uniform, normal 0.02, or zero; tensor number k of the list draws with step k.
static void params_init(float *memory, const ParamTensor *list, int count, uint64_t seed) {
    for (int k = 0; k < count; k++) {
        const ParamTensor *t = &list[k];
        float *w = memory + t->offset;
        memset(w, 0, (size_t)t->count * sizeof *w);
        if (t->init == INIT_NORMAL) {
            rng_normal(w, (size_t)t->count, 0, seed, (uint32_t)k, STREAM_INIT);
            for (int64_t e = 0; e < t->count; e++) w[e] = (float)(0.02 * w[e]);
        }
        if (t->init != INIT_XAVIER) continue;
        double range = sqrt(6.0 / (double)(t->shape[0] + t->count / t->shape[0])); // fan-out and fan-in
#pragma omp parallel for schedule(static)
        for (int64_t first = 0; first < t->count; first += 4) {
            uint32_t word[4];
            philox(word, seed, (uint32_t)(first / 4), (uint32_t)k, STREAM_INIT);
            for (int64_t e = first; e < t->count && e < first + 4; e++)
                w[e] = (float)((2 * rng_uniform(word[e % 4]) - 1) * range);
        }
    }
}

enum Training { TRAIN_NOT, TRAIN_ADAMW, TRAIN_MUON }; // what a model is for: sampling, or training by this optimiser
// Whether --optimizer muon has this tensor: the matrices that tokens go through. AdamW has the others: biases, first
// and last layer, labels, timestep, modulation.
static int muon_has(const ParamTensor *t) { return t->init == INIT_XAVIER && t->ndim == 2; }
// Newton and Schulz's iteration of fifth order, X <- (a + b·XX^T + c·(XX^T)^2)·X, with numbers that trade exactness for
// speed: MUON_STEPS of it take singular values of 0.0015..1 to 0.68..1.2 (0.001 to 0.47), not to 1
#define MUON_A 3.4445
#define MUON_B -4.7750
#define MUON_C 2.0315
#define MUON_MOMENTUM 0.95
enum { MUON_STEPS = 5 };

// The largest tensor: weights come and go between model and files one tensor at a time.
static int64_t params_largest(const ParamTensor *list, int count) {
    int64_t largest = 0;
    for (int k = 0; k < count; k++) largest = list[k].count > largest ? list[k].count : largest;
    return largest;
}

// How sampling watches and steers the fixed point; training passes NULL. The residual of an iteration is the mean over
// the pictures of ||z_k - z_{k-1}|| / ||z_k||.
typedef struct {
    int reuse, reuse_ready;    // start from the solution of the timestep before, once there is one
    int want_residual, window; // window: of Anderson acceleration, 0 for plain iteration
    double tol;                // a timestep ends when the residual is below
    double mixing;             // of Anderson acceleration: how far it goes along the residual
    double residuals[1000];    // of the iterations that ran, when wanted
    int ran;                   // iterations of this timestep
} Solve;
enum { MAX_WINDOW = 8, HISTORY = MAX_WINDOW + 1 }; // Anderson acceleration: earlier results, and with the newest

// End of shared block 1

// ---------------------------------------------------------------------------------------------------------------------
// Layers: each forward above its backward. B pictures, T tokens, D width, H heads, hd head size. Matrices are
// row-major. Outputs come first. A backward adds (+=) to weight and modulation gradients, and says whether it adds to
// its input's.

// An operand of a matmul that --dtype concerns: its elements are bf16 where `half` says so, else real. `put` does not
// look for NaN: those that arithmetic makes (0x7fc00000, 0xffc00000) stay what they are, and files are checked.
typedef void Act;
typedef uint16_t bf16;
static float bf16_to_float(uint16_t h); // from Part 5
static inline real get(int half, const Act *p, size_t i) {
    return half ? (real)bf16_to_float(((const bf16 *)p)[i]) : ((const real *)p)[i];
}
static inline void put(int half, Act *p, size_t i, real x) {
    union {
        float f;
        uint32_t i;
    } bits = {(float)x};
    if (half)
        ((bf16 *)p)[i] = (bf16)((bits.i + 0x7fff + (bits.i >> 16 & 1)) >> 16); // to nearest even
    else
        ((real *)p)[i] = x;
}
static inline const Act *act_at(int half, const Act *p, size_t i) {
    return (const char *)p + i * (half ? sizeof(bf16) : sizeof(real));
}
// A loop over elements once for each type: its `HALF` is a constant, so that it becomes vector instructions.
#define TYPED(half, ...)   \
    if (half) {            \
        enum { HALF = 1 }; \
        __VA_ARGS__;       \
    } else {               \
        enum { HALF = 0 }; \
        __VA_ARGS__;       \
    }
#define SIMD _Pragma("omp simd")
#define SIMD_SUM _Pragma("omp simd reduction(+ : sum)")
#define SIMD_DOT _Pragma("omp simd reduction(+ : dot)")

// From Part 4: C (M,N; row stride ldc) = A.B + from; element (i,k) of A is A[i*ars + k*acs], (k,j) of B is B[k*brs +
// j*bcs]. `from` is NULL, a bias (N) with ldf 0, or (M,N) with row stride ldf: C itself for C += A.B. Uses all threads,
// but inside a parallel region only the one that calls.
static void gemm(int half, real *C, size_t ldc, const Act *A, size_t ars, size_t acs, const Act *B, size_t brs,
                 size_t bcs, const real *from, size_t ldf, int M, int N, int K);
static inline real exp2_real(real x); // 2^x in arithmetic that becomes vector instructions

#ifdef _OPENMP
static int max_threads(void) { return omp_get_max_threads(); }
static int thread_index(void) { return omp_get_thread_num(); }
#else
static int max_threads(void) { return 1; }
static int thread_index(void) { return 0; }
#endif

// out (M,N) = in (M,K)·w^T + b; w (N,K), b (N)
static void linear_forward(int half, real *out, const Act *in, const Act *w, const real *b, int M, int K, int N) {
    gemm(half, out, N, in, K, 1, w, 1, K, b, 0, M, N, K);
}

// db (N) += sum over the rows of dout (M,N). Columns are shared out, so each sum has one order for any number of
// threads.
static void bias_backward(int half, real *db, const Act *dout, int M, int N) {
#pragma omp parallel for schedule(static)
    for (int first = 0; first < N; first += 64) {
        int last = first + 64 < N ? first + 64 : N;
        for (int i = 0; i < M; i++)
            TYPED(half, SIMD for (int j = first; j < last; j++) db[j] += get(HALF, dout, (size_t)i * N + j));
    }
}

// dw (N,K) += dout^T·in,  db += column sums of dout
static void linear_weight_backward(int half, real *dw, real *db, const Act *dout, const Act *in, int M, int K, int N) {
    gemm(half, dw, K, dout, 1, N, in, K, 1, dw, K, N, K, M);
    bias_backward(half, db, dout, M, N);
}

// din (M,K) = dout·w
static void linear_input_backward(int half, real *din, const Act *dout, const Act *w, int M, int K, int N) {
    gemm(half, din, K, dout, N, 1, w, K, 1, NULL, 0, M, K, N);
}

static void linear_backward(int half, real *din, real *dw, real *db, const Act *dout, const Act *in, const Act *w,
                            int M, int K, int N) {
    linear_weight_backward(half, dw, db, dout, in, M, K, N);
    linear_input_backward(half, din, dout, w, M, K, N);
}

// mean and 1/sigma of a row x (D), eps 1e-6
static inline void row_statistics(real *mean, real *rstd, const real *x, int D) {
    real sum = 0, var = 0;
#pragma omp simd reduction(+ : sum)
    for (int d = 0; d < D; d++) sum += x[d];
    sum /= D;
#pragma omp simd reduction(+ : var)
    for (int d = 0; d < D; d++) var += (x[d] - sum) * (x[d] - sum);
    *mean = sum;
    *rstd = 1 / (real)sqrt((double)(var / D) + 1e-6);
}

// out (B,T,D) = LN(x)·(1+scale)+shift; LN without weights. mod points at picture 0's shift (D) and, after it,
// scale (D); `stride` is the distance to the next picture's.
static void layernorm_modulate_forward(int half, Act *out, const real *x, const real *mod, int stride, int B, int T,
                                       int D) {
#pragma omp parallel for schedule(static)
    for (int i = 0; i < B * T; i++) {
        const real *xi = x + (size_t)i * D, *shift = mod + (size_t)(i / T) * stride, *scale = shift + D;
        real mean, rstd;
        row_statistics(&mean, &rstd, xi, D);
        TYPED(half, SIMD for (int d = 0; d < D; d++)
                        put(HALF, out, (size_t)i * D + d, (xi[d] - mean) * rstd * (1 + scale[d]) + shift[d]));
    }
}

// dx += (g - mean g - y·mean(g·y))/sigma with g = dout·(1 + scale), y = LN(x), means over channels; dmod (as mod) +=
// sums over the picture's tokens: dshift = sum dout, dscale = sum dout·y. stats (B·T,2) is scratch for mean and
// 1/sigma, which are cheaper to compute again than to keep.
static void layernorm_modulate_backward(real *dx, real *dmod, real *stats, const real *dout, const real *x,
                                        const real *mod, int stride, int B, int T, int D) {
#pragma omp parallel for schedule(static)
    for (int i = 0; i < B * T; i++) {
        const real *xi = x + (size_t)i * D, *gi = dout + (size_t)i * D, *scale = mod + (size_t)(i / T) * stride + D;
        real *di = dx + (size_t)i * D, mean, rstd, g_mean = 0, gx_mean = 0;
        row_statistics(&mean, &rstd, xi, D);
#pragma omp simd reduction(+ : g_mean, gx_mean)
        for (int d = 0; d < D; d++) {
            real g = gi[d] * (1 + scale[d]);
            g_mean += g;
            gx_mean += g * (xi[d] - mean);
        }
        g_mean /= D;
        gx_mean *= rstd * rstd / D;
#pragma omp simd
        for (int d = 0; d < D; d++) di[d] += rstd * (gi[d] * (1 + scale[d]) - g_mean - (xi[d] - mean) * gx_mean);
        stats[2 * i] = mean;
        stats[2 * i + 1] = rstd;
    }
#pragma omp parallel for collapse(2) schedule(static)
    for (int b = 0; b < B; b++)
        for (int first = 0; first < D; first += 64) {
            int last = first + 64 < D ? first + 64 : D;
            real *dshift = dmod + (size_t)b * stride, *dscale = dshift + D;
            for (int i = b * T; i < (b + 1) * T; i++) {
                real mean = stats[2 * i], rstd = stats[2 * i + 1];
#pragma omp simd
                for (int d = first; d < last; d++) {
                    real g = dout[(size_t)i * D + d];
                    dshift[d] += g;
                    dscale[d] += g * (x[(size_t)i * D + d] - mean) * rstd;
                }
            }
        }
}

// (rows,n) of out, from element `at` on and with row stride ld, = in (rows,n)·factor (rows; NULL: 1)
static void put_rows(int half, Act *out, size_t at, size_t ld, const real *in, const real *factor, int rows, int n) {
    for (int i = 0; i < rows; i++, at += ld) {
        real f = factor ? factor[i] : 1;
        TYPED(half, SIMD for (int j = 0; j < n; j++) put(HALF, out, at + j, in[i * n + j] * f));
    }
}

// Multi-head attention without mask. qkv (B,T,3D): per token q|k|v, head, channel; out (B,T,D). One task is a block of
// query rows of one head, so the T×T matrix never exists; lse (B,H,T) keeps log2 sum exp of each row for the backward
// pass. All is in powers of two: exp(x) = 2^(x·log2 e).
enum { QUERY_ROWS = 128 };
#define LOG2_E ((real)1.4426950408889634)
// A thread's scratch: three blocks of (rows,T), and (rows + 2T,hd)
static size_t attention_scratch(int T, int hd) {
    size_t rows = T < QUERY_ROWS ? T : QUERY_ROWS;
    return 3 * rows * T + (rows + 2 * T) * hd;
}

static void attention_forward(int half, Act *out, real *lse, const Act *qkv, real *scratch, int B, int T, int D,
                              int H) {
    int hd = D / H, most = T < QUERY_ROWS ? T : QUERY_ROWS, row_blocks = (T + most - 1) / most;
    real scale = LOG2_E / (real)sqrt((double)hd);
#pragma omp parallel for schedule(static)
    for (int task = 0; task < B * H * row_blocks; task++) {
        int b = task / (H * row_blocks), h = task / row_blocks % H, first = task % row_blocks * most;
        int rows = T - first < most ? T - first : most;
        size_t at = (size_t)b * T * 3 * D + h * hd;
        real *s = scratch + thread_index() * attention_scratch(T, hd), *o = s + 3 * most * T,
             *row_lse = lse + ((size_t)b * H + h) * T + first, inverse[QUERY_ROWS];
        Act *p = half ? s + most * T : s;
        gemm(half, s, T, act_at(half, qkv, at + (size_t)first * 3 * D), 3 * D, 1, act_at(half, qkv, at + D), 1, 3 * D,
             NULL, 0, rows, T, hd);
        for (int i = 0; i < rows; i++) {
            const real *si = s + (size_t)i * T;
            real max = si[0];
#pragma omp simd reduction(max : max)
            for (int j = 0; j < T; j++) max = si[j] > max ? si[j] : max;
            row_lse[i] = max;
        }
        for (int i = 0; i < rows; i++) { // unnormalised: the sum divides the output
            const real *si = s + (size_t)i * T, max = row_lse[i] * scale;
            real sum = 0;
            TYPED(
                half, SIMD_SUM for (int j = 0; j < T; j++) {
                    real e = exp2_real(si[j] * scale - max);
                    put(HALF, p, (size_t)i * T + j, e);
                    sum += e;
                });
            inverse[i] = 1 / sum;
            row_lse[i] = max + (real)log2((double)sum);
        }
        gemm(half, o, hd, p, T, 1, act_at(half, qkv, at + 2 * D), 3 * D, 1, NULL, 0, rows, hd, T);
        put_rows(half, out, ((size_t)b * T + first) * D + h * hd, D, o, inverse, rows, hd);
    }
}

// dqkv (B,T,3D) is overwritten. Row block by row block, with P recomputed from q, k and lse:
// dv += P^T·dout;  dP = dout·v^T;  dS = P·(dP - sum(dout·out))·scale;  dq = dS·k;  dk += dS^T·q
static void attention_backward(int half, Act *dqkv, const Act *dout, const Act *out, const real *lse, const Act *qkv,
                               real *scratch, int B, int T, int D, int H) {
    int hd = D / H, most = T < QUERY_ROWS ? T : QUERY_ROWS;
    real scale = 1 / (real)sqrt((double)hd), log2_scale = LOG2_E * scale;
#pragma omp parallel for schedule(static)
    for (int task = 0; task < B * H; task++) {
        int b = task / H, h = task % H;
        size_t at = (size_t)b * T * 3 * D + h * hd;
        const Act *k = act_at(half, qkv, at + D), *v = act_at(half, qkv, at + 2 * D);
        real *s = scratch + thread_index() * attention_scratch(T, hd), *ds = s + most * T;
        real *dq = s + 3 * most * T, *dk = dq + most * hd, *dv = dk + T * hd;
        Act *p = half ? ds + most * T : s, *dp = half ? (bf16 *)p + most * T : (Act *)ds;
        for (int first = 0; first < T; first += most) {
            int rows = T - first < most ? T - first : most;
            size_t q_at = at + (size_t)first * 3 * D, out_at = ((size_t)b * T + first) * D + h * hd;
            const Act *q = act_at(half, qkv, q_at), *go = act_at(half, dout, out_at), *o = act_at(half, out, out_at);
            gemm(half, s, T, q, 3 * D, 1, k, 1, 3 * D, NULL, 0, rows, T, hd);
            gemm(half, ds, T, go, D, 1, v, 1, 3 * D, NULL, 0, rows, T, hd);
            for (int i = 0; i < rows; i++) {
                const real *si = s + (size_t)i * T, *di = ds + (size_t)i * T;
                real row_lse = lse[((size_t)b * H + h) * T + first + i], dot = 0;
                TYPED(half, {
                    SIMD_DOT for (size_t d = (size_t)i * D; d < (size_t)i * D + hd; d++) dot +=
                        get(HALF, go, d) * get(HALF, o, d);
                    SIMD for (int j = 0; j < T; j++) {
                        real e = exp2_real(si[j] * log2_scale - row_lse);
                        put(HALF, p, (size_t)i * T + j, e);
                        put(HALF, dp, (size_t)i * T + j, e * (di[j] - dot) * scale);
                    }
                });
            }
            gemm(half, dv, hd, p, 1, T, go, D, 1, first ? dv : NULL, hd, T, hd, rows);
            gemm(half, dq, hd, dp, T, 1, k, 3 * D, 1, NULL, 0, rows, hd, T);
            put_rows(half, dqkv, q_at, 3 * D, dq, NULL, rows, hd);
            gemm(half, dk, hd, dp, 1, T, q, 3 * D, 1, first ? dk : NULL, hd, T, hd, rows);
        }
        put_rows(half, dqkv, at + D, 3 * D, dk, NULL, T, hd);
        put_rows(half, dqkv, at + 2 * D, 3 * D, dv, NULL, T, hd);
    }
}

// Element by element; pieces of fixed size, because the last elements of a loop may be rounded otherwise than those
// that fill a vector, and where a loop ends must not depend on the number of threads.
enum { PIECE = 1 << 12 };
#define FOR_EACH_PIECE \
    _Pragma("omp parallel for schedule(static)") for (size_t piece = 0; piece < count; piece += PIECE)
#define PIECE_END (piece + PIECE < count ? piece + PIECE : count)

// gelu in its tanh form: with u = 2·sqrt(2/pi)·(x + 0.044715·x^3), gelu(x) = x/2·(1 + tanh(u/2)) = x·sigmoid(u)
#define GELU_SLOPE ((real)1.5957691216057308)
#define GELU_CUBIC ((real)0.044715)
// x, or 16 and -16 beyond them, where sigmoid is 0 or 1 and x³ might be more than any float. Limits set to the bits,
// which are in order as signed integers where x > 0 and as unsigned where x < 0: see exp2_real.
static inline real gelu_clip(real x) {
    if (sizeof(real) == 8) return x < -16 ? -16 : x < 16 ? x : 16;
    union {
        float f;
        uint32_t u;
        int32_t i;
    } bits = {(float)x};
    bits.i = bits.i < 0x41800000 ? bits.i : 0x41800000; // 16
    bits.u = bits.u < 0xc1800000 ? bits.u : 0xc1800000; // -16
    return bits.f;
}
static inline real gelu_exp(real x) { // exp(-u)
    return exp2_real(-LOG2_E * GELU_SLOPE * x * (1 + GELU_CUBIC * x * x));
}

static void gelu_forward(int half, Act *out, const real *in, size_t count) {
    FOR_EACH_PIECE TYPED(half, SIMD for (size_t i = piece; i < PIECE_END; i++)
                                   put(HALF, out, i, in[i] / (1 + gelu_exp(gelu_clip(in[i])))));
}

// dx = dout·gelu'(x), and out = gelu(x) once more: the exponential is shared. dx may be dout. 0·x keeps NaN.
static void gelu_backward(int half, Act *dx, Act *out, const real *dout, const real *x, size_t count) {
    FOR_EACH_PIECE TYPED(half, {
        SIMD for (size_t i = piece; i < PIECE_END; i++) {
            real xi = gelu_clip(x[i]), e = gelu_exp(xi), s = 1 / (1 + e);
            put(HALF, out, i, x[i] * s);
            put(HALF, dx, i,
                dout[i] * (s * (1 + xi * (e * s) * GELU_SLOPE * (1 + 3 * GELU_CUBIC * xi * xi)) + 0 * x[i]));
        }
    });
}

static void add(int half, real *x, const Act *y, size_t count) {
    FOR_EACH_PIECE TYPED(half, SIMD for (size_t i = piece; i < PIECE_END; i++) x[i] += get(HALF, y, i));
}

// in (count) as an operand: in fp32 simply `in`, else a copy
static const Act *as_act(int half, Act *copy, const real *in, size_t count) {
    if (!half) return in;
    FOR_EACH_PIECE SIMD for (size_t i = piece; i < PIECE_END; i++) put(1, copy, i, in[i]);
    return copy;
}

// silu(x) = x·sigmoid(x), only ever applied to (B,D)
static void silu_forward(real *out, const real *x, size_t count) {
    for (size_t i = 0; i < count; i++) out[i] = x[i] / (1 + (real)exp((double)-x[i]));
}

// dx = dout·silu'(x)
static void silu_backward(real *dx, const real *dout, const real *x, size_t count) {
    for (size_t i = 0; i < count; i++) {
        real sigmoid = 1 / (1 + (real)exp((double)-x[i]));
        dx[i] = dout[i] * sigmoid * (1 + x[i] * (1 - sigmoid));
    }
}

// out (B,T,D) = x + gate·branch, gate (D) of picture b at gate + b·stride. out may be x.
static void gated_residual_forward(real *out, const real *x, const real *gate, int stride, const real *branch, int B,
                                   int T, int D) {
#pragma omp parallel for schedule(static)
    for (int i = 0; i < B * T; i++) {
        const real *g = gate + (size_t)(i / T) * stride;
#pragma omp simd
        for (int d = 0; d < D; d++) out[(size_t)i * D + d] = x[(size_t)i * D + d] + g[d] * branch[(size_t)i * D + d];
    }
}

// dbranch = dout·gate, dgate += sum over tokens of dout·branch; the gradient of x is dout itself.
static void gated_residual_backward(int half, Act *dbranch, real *dgate, const real *dout, const real *gate, int stride,
                                    const real *branch, int B, int T, int D) {
#pragma omp parallel for collapse(2) schedule(static)
    for (int b = 0; b < B; b++)
        for (int first = 0; first < D; first += 64) {
            int last = first + 64 < D ? first + 64 : D;
            real *dg = dgate + (size_t)b * stride;
            const real *g = gate + (size_t)b * stride;
            for (size_t i = (size_t)b * T; i < (size_t)(b + 1) * T; i++)
                TYPED(half, {
                    SIMD for (int d = first; d < last; d++) {
                        dg[d] += dout[i * D + d] * branch[i * D + d];
                        put(HALF, dbranch, i * D + d, dout[i * D + d] * g[d]);
                    }
                });
        }
}

// patches (B,T,C·p·p) from x (B,C,S,S), each flattened as (channel, row, column)
static void unfold(real *patches, const real *x, int B, int C, int S, int p) {
    int side = S / p;
#pragma omp parallel for schedule(static)
    for (int b = 0; b < B; b++)
        for (int c = 0; c < C; c++)
            for (int i = 0; i < S; i++)
                for (int j = 0; j < S; j++)
                    patches[((((size_t)b * side + i / p) * side + j / p) * C + c) * p * p + i % p * p + j % p] =
                        x[(((size_t)b * C + c) * S + i) * S + j];
}

// Between tokens (B,T,p·p·C), a patch as (row, column, channel), and pictures (B,C,S,S): to_picture gives the
// direction.
static void unpatch(real *pictures, real *tokens, int to_picture, int B, int C, int S, int p) {
    int side = S / p;
#pragma omp parallel for schedule(static)
    for (int b = 0; b < B; b++)
        for (int c = 0; c < C; c++)
            for (int i = 0; i < S; i++)
                for (int j = 0; j < S; j++) {
                    real *token =
                        tokens + ((((size_t)b * side + i / p) * side + j / p) * p * p + i % p * p + j % p) * C + c;
                    real *pixel = pictures + (((size_t)b * C + c) * S + i) * S + j;
                    if (to_picture)
                        *pixel = *token;
                    else
                        *token = *pixel;
                }
}

// pos (T,D): with w_i = 10000^(-i/(D/4)), the token at (row, column) gets [sin(column·w), cos(column·w), sin(row·w),
// cos(row·w)]
static void position_embedding(real *pos, int side, int D) {
    int quarter = D / 4;
    for (int t = 0; t < side * side; t++)
        for (int i = 0; i < quarter; i++) {
            double w = pow(10000, -(double)i / quarter), column = t % side * w, row = t / side * w;
            real *at = pos + (size_t)t * D + i;
            at[0] = (real)sin(column);
            at[quarter] = (real)cos(column);
            at[2 * quarter] = (real)sin(row);
            at[3 * quarter] = (real)cos(row);
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// Activations: one allocation. The layers of the path that gets a gradient stand in a row, layer[l].x being the input
// of number l and the output of the one before:
//
//   pre blocks | the injection: x is h | m iterations: x is z_n, z_{n+1}, ... | post blocks | x alone: the last output
//   DiT: all blocks                                                                         | x alone: the last output
//
// The n iterations without gradient happen in place, in the x of the first iteration with gradient. With `recompute`
// all layers share the rest of a Layer, which the backward pass fills again from x. A model that only samples has one
// rest and one x, with skip a second, as h must outlast the loop.

typedef struct {
    real *x;    // (B,T,D) input
    real *u;    // (B,T,2D) iterations only: the projection before its gelu
    real *in;   // (B,T,D)  iterations only: the block's input; elsewhere it is x
    Act *qkv;   // (B,T,3D)
    real *lse;  // (B,H,T)  log2 sum exp of the scores
    Act *att;   // (B,T,D)
    real *proj; // (B,T,D)
    real *fc1;  // (B,T,4D) before its gelu
    real *fc2;  // (B,T,D)
} Layer;

typedef struct {
    Layer *layer;
    real *pos;         // (T,D)
    real *x_t;         // (B,C,S,S) input of the model
    real *out;         // (B,Cout,S,S) its output
    real *patches;     // (B,T,C·p·p)
    real *time_freq;   // (B,256)
    real *time_hidden; // (B,D) before silu
    real *time_silu;   // (B,D)
    real *cond;        // (B,D) the embeddings of timestep and label, added
    real *cond_pp;     // (B,D) what pre, post and final layers see: cond, or the label's alone
    real *cond_silu, *cond_pp_silu;
    real *mod;       // (blocks,B,6D), computed once per timestep
    real *final_mod; // (B,2D)
    real *inj;       // (B,T,D) injection
    real *inj_part;  // (B,T,2D) the half of the projection that does not change while z iterates
    Act *normed;     // (B,T,D) scratch: LN output, and other operands
    Act *gelu;       // (B,T,4D) scratch: gelu output, and other operands
    real *patch_out; // (B,T,p·p·Cout)
    real *scratch;   // (threads,attention_scratch)
    real *z_before;  // (B,T,D) z_{k-1} where it is needed (sampling)
    real *reused;    // (B,T,D) the solution of the timestep before (sampling)
    real *history;   // (B,window+1,2,T,D) Anderson acceleration: of each iteration in the window f, then g
    double *gram;    // (B,HISTORY,HISTORY) the products of its f
    // backward
    real *dx, *dnormed;      // (B,T,D)
    real *dwide;             // (B,T,4D) scratch: the gradient of fc1, qkv or u, whichever is at hand
    Act *dwide_act;          // (B,T,4D) the same as an operand; in fp32 dwide itself
    real *mid;               // (B,T,D) scratch: between a block's two branches
    real *du_sum;            // (B,T,2D) gradient of inj_part, summed over the iterations
    real *dmod, *dfinal_mod; // (blocks,B,6D), (B,2D)
    real *dcond, *dcond_pp, *dcond_silu, *dcond_pp_silu, *dtime; // (B,D); dtime: scratch, then of time_hidden
    real *stats;                                                 // (B,T,2)
    real *dout;                                                  // (B,Cout,S,S)
    real *muon;                                                  // (24D,D) scratch of the optimiser Muon
} Activations;

enum Kind { MODEL_WEIGHTS, MODEL_GRADS, MODEL_ADAM_M, MODEL_ADAM_V, MODEL_EMA };
typedef struct {
    Config config;
    int batch, max_m, recompute, training, window; // what the activations have room for
    int half;                                      // operands of the matmuls are bf16 (never fp16)
    int n_tensors;
    ParamTensor *tensors;
    int64_t n_params;
    real *memory[5];    // by enum Kind; only weights unless training
    bf16 *half_weights; // of the weights in use, as operands; laid out alike
    Params p, g;
    Activations a;
    real *activations; // what `a` points into
    size_t activation_bytes;
    int *labels;                                                      // of the current batch, for the backward pass
    int B, grad_iters;                                                // of the current forward pass
    void (*probe)(const char *name, const real *data, int64_t count); // tests look at activations through this
} Model;

static void show_probe(Model *m, const char *name, int k, const real *data, int64_t count) {
    char text[32];
    if (!m->probe) return;
    snprintf(text, sizeof text, k ? "%s.%d" : "%s", name, k);
    m->probe(text, data, count);
}

// A weight as an operand
static const Act *act_weight(const Model *m, const real *w) {
    const real *first = m->p.patch_w; // the first of all
    return m->half ? m->half_weights + (w - first) : (const Act *)w;
}

// shift1, scale1, gate1, shift2, scale2, gate2 (6D) of block `index` and picture 0, in a->mod or a->dmod; the next
// picture's follow.
static real *block_mod(const Model *m, real *mod, int index) {
    return mod + (size_t)index * m->batch * 6 * m->config.width;
}

// out = Block(x, c): adaLN-Zero transformer block; l keeps what the backward pass needs. out may be x.
//   mid = x + gate1·proj(attention(LN(x)·(1+scale1)+shift1))
//   out = mid + gate2·fc2(gelu(fc1(LN(mid)·(1+scale2)+shift2)))
static void block_forward(Model *m, real *out, const real *x, Layer *l, int index) {
    Activations *a = &m->a;
    const BlockParams *p = &m->p.block[index];
    const real *mod = block_mod(m, a->mod, index);
    int B = m->B, T = config_tokens(&m->config), D = m->config.width, M = B * T, stride = 6 * D, half = m->half;
    size_t N = (size_t)M * D;
    real *qkv = half ? l->fc1 : l->qkv; // before rounding
    layernorm_modulate_forward(half, a->normed, x, mod, stride, B, T, D);
    linear_forward(half, qkv, a->normed, act_weight(m, p->qkv_w), p->qkv_b, M, D, 3 * D);
    attention_forward(half, l->att, l->lse, as_act(half, l->qkv, qkv, 3 * N), a->scratch, B, T, D, m->config.heads);
    linear_forward(half, l->proj, l->att, act_weight(m, p->proj_w), p->proj_b, M, D, D);
    gated_residual_forward(out, x, mod + 2 * D, stride, l->proj, B, T, D);
    layernorm_modulate_forward(half, a->normed, out, mod + 3 * D, stride, B, T, D);
    linear_forward(half, l->fc1, a->normed, act_weight(m, p->fc1_w), p->fc1_b, M, D, 4 * D);
    gelu_forward(half, a->gelu, l->fc1, 4 * N);
    linear_forward(half, l->fc2, a->gelu, act_weight(m, p->fc2_w), p->fc2_b, M, 4 * D, D);
    gated_residual_forward(out, out, mod + 5 * D, stride, l->fc2, B, T, D);
}

// dx (B,T,D): the gradient of the output on entry, of the input on return. x is the input.
static void block_backward(Model *m, real *dx, const real *x, Layer *l, int index) {
    Activations *a = &m->a;
    const BlockParams *p = &m->p.block[index], *g = &m->g.block[index];
    const real *mod = block_mod(m, a->mod, index);
    real *dmod = block_mod(m, a->dmod, index), *dfc1 = a->dwide;
    Act *dfc2 = a->normed, *dproj = a->normed, *dqkv = a->dwide_act;
    int B = m->B, T = config_tokens(&m->config), D = m->config.width, M = B * T, stride = 6 * D, half = m->half;
    size_t N = (size_t)M * D;
    // MLP branch
    gated_residual_backward(half, dfc2, dmod + 5 * D, dx, mod + 5 * D, stride, l->fc2, B, T, D);
    linear_input_backward(half, dfc1, dfc2, act_weight(m, p->fc2_w), M, 4 * D, D);
    gelu_backward(half, a->dwide_act, a->gelu, dfc1, l->fc1, 4 * N);
    linear_weight_backward(half, g->fc2_w, g->fc2_b, dfc2, a->gelu, M, 4 * D, D);
    gated_residual_forward(a->mid, x, mod + 2 * D, stride, l->proj, B, T, D);
    layernorm_modulate_forward(half, a->normed, a->mid, mod + 3 * D, stride, B, T, D);
    linear_backward(half, a->dnormed, g->fc1_w, g->fc1_b, a->dwide_act, a->normed, act_weight(m, p->fc1_w), M, D,
                    4 * D);
    layernorm_modulate_backward(dx, dmod + 3 * D, a->stats, a->dnormed, a->mid, mod + 3 * D, stride, B, T, D);
    // Attention branch
    gated_residual_backward(half, dproj, dmod + 2 * D, dx, mod + 2 * D, stride, l->proj, B, T, D);
    linear_backward(half, a->dnormed, g->proj_w, g->proj_b, dproj, l->att, act_weight(m, p->proj_w), M, D, D);
    attention_backward(half, dqkv, as_act(half, a->normed, a->dnormed, N), l->att, l->lse, l->qkv, a->scratch, B, T, D,
                       m->config.heads);
    layernorm_modulate_forward(half, a->normed, x, mod, stride, B, T, D);
    linear_backward(half, a->dnormed, g->qkv_w, g->qkv_b, dqkv, a->normed, act_weight(m, p->qkv_w), M, D, 3 * D);
    layernorm_modulate_backward(dx, dmod, a->stats, a->dnormed, x, mod, stride, B, T, D);
}

// ---------------------------------------------------------------------------------------------------------------------
// The fixed point, and its gradient: Stochastic Jacobian-Free Backpropagation (S-JFB, arXiv:2401.08741).
//
// A training step draws n and m. n iterations bring z near its fixed point; they store nothing, and z_n is a constant
// for the gradient. Then m iterations store a Layer each, and backpropagation goes through exactly those, from z_{n+m}
// back to z_n, where it stops. (The exact gradient of a fixed point would need the inverse of a Jacobian; going through
// a few iterations is a descent direction (arXiv:2103.12803) and as cheap as a network of m layers.)
//
// The product [z_{k-1}; inj]·fp1 + bias splits into z_{k-1}·(fp1's left half) and inj_part = inj·(fp1's right half) +
// bias, which no iteration changes: it is computed once. Its gradient is the sum over the m iterations of du, the
// gradient of u = fp1's output. All that follows from it (fp1's right half and bias, inject, h and with it the pre
// blocks) is linear in du, so one matmul with du_sum after the last iteration does the work of m.

// out = Block(fp2·gelu(z·fp1_z + inj_part), c), where z is l->x; l keeps what the backward pass needs. out may be z.
static void iteration_forward(Model *m, real *out, Layer *l) {
    Activations *a = &m->a;
    int D = m->config.width, M = m->B * config_tokens(&m->config), half = m->half;
    size_t N = (size_t)M * D;
    gemm(half, l->u, 2 * D, as_act(half, a->normed, l->x, N), D, 1, act_weight(m, m->p.fp1_w), 1, 2 * D, a->inj_part,
         2 * D, M, 2 * D, D);
    gelu_forward(half, a->gelu, l->u, 2 * N);
    linear_forward(half, l->in, a->gelu, act_weight(m, m->p.fp2_w), m->p.fp2_b, M, 2 * D, D);
    block_forward(m, out, l->in, l, m->config.pre_depth);
}

// dz (B,T,D): the gradient of the output on entry; on return, unless `first`, of z. Nothing flows into the first z.
static void iteration_backward(Model *m, real *dz, Layer *l, int first) {
    Activations *a = &m->a;
    int D = m->config.width, M = m->B * config_tokens(&m->config), half = m->half;
    size_t N = (size_t)M * D;
    Act *du = a->dwide_act;
    block_backward(m, dz, l->in, l, m->config.pre_depth);
    const Act *dz_act = as_act(half, a->dnormed, dz, N);
    linear_input_backward(half, a->dwide, dz_act, act_weight(m, m->p.fp2_w), M, 2 * D, D);
    gelu_backward(half, du, a->gelu, a->dwide, l->u, 2 * N);
    linear_weight_backward(half, m->g.fp2_w, m->g.fp2_b, dz_act, a->gelu, M, 2 * D, D);
    add(half, a->du_sum, du, 2 * N);
    gemm(half, m->g.fp1_w, 2 * D, du, 1, 2 * D, as_act(half, a->normed, l->x, N), D, 1, m->g.fp1_w, 2 * D, 2 * D, D, M);
    if (!first) gemm(half, dz, D, du, 2 * D, 1, act_weight(m, m->p.fp1_w), 2 * D, 1, NULL, 0, M, D, 2 * D);
}

// inj = inject·h and its share of fp1, where h is l->x
static void injection_forward(Model *m, const Layer *l) {
    Activations *a = &m->a;
    int D = m->config.width, M = m->B * config_tokens(&m->config), half = m->half;
    size_t N = (size_t)M * D;
    linear_forward(half, a->inj, as_act(half, a->normed, l->x, N), act_weight(m, m->p.inject_w), m->p.inject_b, M, D,
                   D);
    gemm(half, a->inj_part, 2 * D, as_act(half, a->normed, a->inj, N), D, 1, act_weight(m, m->p.fp1_w + D), 1, 2 * D,
         m->p.fp1_b, 0, M, 2 * D, D);
}

// dh (B,T,D) = the gradient of h by way of inj; h is the first z too, but as a constant
static void injection_backward(Model *m, real *dh, const Layer *l) {
    Activations *a = &m->a;
    int D = m->config.width, M = m->B * config_tokens(&m->config), half = m->half;
    size_t N = (size_t)M * D;
    real *dinj = a->dnormed;
    const Act *du = as_act(half, a->dwide_act, a->du_sum, 2 * N);
    gemm(half, m->g.fp1_w + D, 2 * D, du, 1, 2 * D, as_act(half, a->normed, a->inj, N), D, 1, m->g.fp1_w + D, 2 * D,
         2 * D, D, M);
    bias_backward(half, m->g.fp1_b, du, M, 2 * D);
    gemm(half, dinj, D, du, 2 * D, 1, act_weight(m, m->p.fp1_w + D), 2 * D, 1, NULL, 0, M, D, 2 * D);
    linear_backward(half, dh, m->g.inject_w, m->g.inject_b, as_act(half, a->gelu, dinj, N),
                    as_act(half, a->normed, l->x, N), act_weight(m, m->p.inject_w), M, D, D);
}

// From Part 2: how sampling measures and speeds up the iteration
static double residual_of(const real *z, const real *before, int B, size_t count);
static void anderson_forward(real *z, const real *before, real *history, double *gram, int k, int window, double mixing,
                             int B, size_t count);

// From z in l->x, n iterations in place, then grad_iters (the m of S-JFB) that keep a Layer each. Returns the layer
// behind the last.
static Layer *fixed_point_forward(Model *m, Layer *l, int n, int grad_iters, Solve *solve) {
    Activations *a = &m->a;
    size_t count = (size_t)config_tokens(&m->config) * m->config.width, bytes = m->B * count * sizeof(real);
    for (int k = 1; k <= n + grad_iters; k++) {
        Layer *next = k <= n ? l : l + 1;
        real *z = next->x;
        if (solve && (solve->want_residual || solve->window)) memcpy(a->z_before, l->x, bytes);
        iteration_forward(m, z, l);
        l = next;
        show_probe(m, "act.z", k, z, (int64_t)(m->B * count));
        if (!solve) continue;
        solve->ran = k;
        if (solve->want_residual) solve->residuals[k - 1] = residual_of(z, a->z_before, m->B, count);
        int last = k == n + grad_iters || (solve->want_residual && solve->residuals[k - 1] < solve->tol);
        if (solve->window) // the last z is mixed of results of the block alone
            anderson_forward(z, a->z_before, a->history, a->gram, k, solve->window, last ? 1 : solve->mixing, m->B,
                             count);
        if (last) break;
    }
    return l;
}

// ---------------------------------------------------------------------------------------------------------------------
// Conditioning: cond and cond_pp from t (B) and y (B), and with them the modulation of every block, constant while z
// iterates

static void condition_forward(Model *m, const int *t, const int *y) {
    const Config *c = &m->config;
    Activations *a = &m->a;
    int B = m->B, D = c->width, blocks = config_blocks(c), pp = c->timestep_in_pre_post || !c->fixed_point;
    for (int b = 0; b < B; b++) {
        for (int i = 0; i < 128; i++) {
            double angle = time_angle(c, t[b], i);
            a->time_freq[b * 256 + i] = (real)cos(angle);
            a->time_freq[b * 256 + 128 + i] = (real)sin(angle);
        }
        m->labels[b] = y[b];
    }
    linear_forward(0, a->time_hidden, a->time_freq, m->p.time0_w, m->p.time0_b, B, 256, D);
    silu_forward(a->time_silu, a->time_hidden, (size_t)B * D);
    linear_forward(0, a->cond, a->time_silu, m->p.time2_w, m->p.time2_b, B, D, D);
    for (int b = 0; b < B; b++)
        for (int d = 0; d < D; d++) {
            real label = m->p.label_table[(size_t)y[b] * D + d], *cond = &a->cond[b * D + d];
            *cond += label;
            a->cond_pp[b * D + d] = pp ? *cond : label;
        }
    silu_forward(a->cond_silu, a->cond, (size_t)B * D);
    silu_forward(a->cond_pp_silu, a->cond_pp, (size_t)B * D);
    for (int i = 0; i < blocks; i++) {
        const real *cond = c->fixed_point && i == c->pre_depth ? a->cond_silu : a->cond_pp_silu;
        linear_forward(0, block_mod(m, a->mod, i), cond, m->p.block[i].ada_w, m->p.block[i].ada_b, B, D, 6 * D);
    }
    linear_forward(0, a->final_mod, a->cond_pp_silu, m->p.final_ada_w, m->p.final_ada_b, B, D, 2 * D);
}

static void condition_backward(Model *m) {
    const Config *c = &m->config;
    Activations *a = &m->a;
    int B = m->B, D = c->width, blocks = config_blocks(c), pp = c->timestep_in_pre_post || !c->fixed_point;
    size_t bytes = (size_t)B * D * sizeof(real);
    memset(a->dcond_silu, 0, bytes);
    memset(a->dcond_pp_silu, 0, bytes);
    for (int i = -1; i < blocks; i++) { // -1: the final layer
        int fixed = c->fixed_point && i == c->pre_depth, N = i < 0 ? 2 * D : 6 * D;
        const real *dmod = i < 0 ? a->dfinal_mod : block_mod(m, a->dmod, i);
        const real *w = i < 0 ? m->p.final_ada_w : m->p.block[i].ada_w;
        real *dw = i < 0 ? m->g.final_ada_w : m->g.block[i].ada_w, *db = i < 0 ? m->g.final_ada_b : m->g.block[i].ada_b;
        linear_backward(0, a->dtime, dw, db, dmod, fixed ? a->cond_silu : a->cond_pp_silu, w, B, D, N);
        add(0, fixed ? a->dcond_silu : a->dcond_pp_silu, a->dtime, (size_t)B * D);
    }
    silu_backward(a->dcond, a->dcond_silu, a->cond, (size_t)B * D);
    silu_backward(a->dcond_pp, a->dcond_pp_silu, a->cond_pp, (size_t)B * D);
    if (pp) add(0, a->dcond, a->dcond_pp, (size_t)B * D);
    for (int b = 0; b < B; b++)
        for (int d = 0; d < D; d++)
            m->g.label_table[(size_t)m->labels[b] * D + d] += a->dcond[b * D + d] + (pp ? 0 : a->dcond_pp[b * D + d]);
    real *dtime_silu = a->dcond_silu; // which is done with
    linear_backward(0, dtime_silu, m->g.time2_w, m->g.time2_b, a->dcond, a->time_silu, m->p.time2_w, B, D, D);
    silu_backward(a->dtime, dtime_silu, a->time_hidden, (size_t)B * D);
    linear_weight_backward(0, m->g.time0_w, m->g.time0_b, a->dtime, a->time_freq, B, 256, D);
}

// ---------------------------------------------------------------------------------------------------------------------
// The whole model

#ifdef FORWARD
#include FORWARD // another device's model_forward: test/port_example/opencl.c
#else
// a.out (B,Cout,S,S) from a.x_t (B,C,S,S), timesteps t (B) and labels y (B): n iterations that keep nothing, then
// grad_iters, elsewhere called m, that keep what backpropagation needs (none in a model that only samples). In DiT both
// mean nothing.
static void model_forward(Model *m, const int *t, const int *y, int B, int n, int grad_iters, Solve *solve) {
    const Config *c = &m->config;
    Activations *a = &m->a;
    int T = config_tokens(c), D = c->width, M = B * T, p = c->patch, Cout = config_out_channels(c), i = 0;
    int64_t N = (int64_t)M * D;
    Layer *l = a->layer;
    assert(B <= m->batch && grad_iters <= (m->training ? m->max_m : 0));
    m->B = B;
    m->grad_iters = c->fixed_point ? grad_iters : 0;
    condition_forward(m, t, y);
    unfold(a->patches, a->x_t, B, c->channels, c->image_size, p);
    linear_forward(0, l->x, a->patches, m->p.patch_w, m->p.patch_b, M, c->channels * p * p, D);
    for (int b = 0; b < B; b++) add(0, l->x + (size_t)b * T * D, a->pos, (size_t)T * D);
    show_probe(m, "act.tokens", 0, l->x, N);
    for (; i < (c->fixed_point ? c->pre_depth : c->depth); i++, l++) block_forward(m, l[1].x, l->x, l, i);
    if (c->fixed_point) {
        show_probe(m, "act.pre", 0, l->x, N);
        injection_forward(m, l);
        show_probe(m, "act.inj", 0, a->inj, N);
        const real *start = solve && solve->reuse && solve->reuse_ready ? a->reused : l->x;
        l++;
        if (l->x != start) memcpy(l->x, start, (size_t)N * sizeof(real));
        l = fixed_point_forward(m, l, n, grad_iters, solve);
        if (solve && solve->reuse) {
            memcpy(a->reused, l->x, (size_t)N * sizeof(real));
            solve->reuse_ready = 1;
        }
        if (c->skip) add(0, l->x, a->layer[c->pre_depth].x, (size_t)N);
        for (i++; i < config_blocks(c); i++, l++) block_forward(m, l[1].x, l->x, l, i);
    }
    show_probe(m, "act.post", 0, l->x, N);
    layernorm_modulate_forward(0, a->normed, l->x, a->final_mod, 2 * D, B, T, D);
    linear_forward(0, a->patch_out, a->normed, m->p.final_w, m->p.final_b, M, D, p * p * Cout);
    unpatch(a->out, a->patch_out, 1, B, Cout, c->image_size, p);
    show_probe(m, "output", 0, a->out, (int64_t)B * Cout * c->image_size * c->image_size);
}
#endif

// Gradient of block i from that of its output in a.dx
static void block_backward_at(Model *m, Layer *l, int i) {
    if (m->recompute) block_forward(m, m->a.dnormed, l->x, l, i);
    block_backward(m, m->a.dx, l->x, l, i);
}

// Adds to the gradients those of the loss whose gradient with respect to the output is a.dout.
static void model_backward(Model *m) {
    const Config *c = &m->config;
    Activations *a = &m->a;
    int B = m->B, T = config_tokens(c), D = c->width, M = B * T, p = c->patch, Cout = config_out_channels(c);
    int i = config_blocks(c) - 1;
    size_t bytes = (size_t)M * D * sizeof(real);
    Layer *l = a->layer + i + 1 + m->grad_iters; // the last output: blocks, iterations and the injection have a layer
    memset(a->dx, 0, bytes);
    memset(a->dfinal_mod, 0, (size_t)B * 2 * D * sizeof(real));
    memset(a->dmod, 0, (size_t)config_blocks(c) * m->batch * 6 * D * sizeof(real));
    unpatch(a->dout, a->patch_out, 0, B, Cout, c->image_size, p);
    layernorm_modulate_forward(0, a->normed, l->x, a->final_mod, 2 * D, B, T, D);
    linear_backward(0, a->dnormed, m->g.final_w, m->g.final_b, a->patch_out, a->normed, m->p.final_w, M, D,
                    p * p * Cout);
    layernorm_modulate_backward(a->dx, a->dfinal_mod, a->stats, a->dnormed, l->x, a->final_mod, 2 * D, B, T, D);
    if (c->fixed_point) {
        for (; i > c->pre_depth; i--) block_backward_at(m, --l, i);
        real *dskip = l->x; // which is not needed any more
        if (c->skip) memcpy(dskip, a->dx, bytes);
        memset(a->du_sum, 0, 2 * bytes);
        for (int k = m->grad_iters; k > 0; k--) {
            l--;
            if (m->recompute) iteration_forward(m, a->dnormed, l);
            iteration_backward(m, a->dx, l, k == 1);
        }
        injection_backward(m, a->dx, --l);
        if (c->skip) add(0, a->dx, dskip, (size_t)M * D);
        i--;
    }
    for (; i >= 0; i--) block_backward_at(m, --l, i);
    linear_weight_backward(0, m->g.patch_w, m->g.patch_b, a->dx, a->patches, M, c->channels * p * p, D);
    condition_backward(m);
}

// =====================================================================================================================
// Shared block 2 of 4. Part 2. Diffusion: noise schedule, training loss, samplers
// =====================================================================================================================

enum Sampler { SAMPLER_AUTO, SAMPLER_DDPM, SAMPLER_DDIM, SAMPLER_FLOW };
enum TimestepSampling { T_UNIFORM, T_LOGIT_NORMAL };
enum LearningRate { LR_CONSTANT, LR_LINEAR, LR_COSINE };
enum Optimizer { OPTIMIZER_ADAMW, OPTIMIZER_MUON }; // in the order of enum Training
enum Allocation { ALLOC_CONST, ALLOC_INC, ALLOC_DEC };
enum Solver { SOLVER_PLAIN, SOLVER_ANDERSON };

// What the user asks for: the values of the options, which option_table in Part 5 describes
typedef struct {
    Config model;
    // training
    const char *data, *export_to, *model_name, *out, *resume, *init;
    int no_grad_iters[2], grad_iters[2];
    int batch, micro_batch, steps, warmup, ema_warmup, hflip, recompute, dtype, weights_dtype;
    int save_every, sample_every, log_every, step, t_sampling, lr_schedule, optimizer;
    double lr, weight_decay, grad_clip, ema, label_drop, t_mean, t_std;
    uint64_t seed;
    // sampling
    const char *weights, *labels, *iters, *latents, *trace, *strip;
    int n, sampler, order, sample_steps, budget, alloc, reuse, solver, window, cfg_channels, show, zoom;
    int cfg_interval[2];
    double eta, tol, mixing, cfg, t_shift;
    // benchmark
    int bench_n, bench_m, rounds, bench_gemm;
} Options;

// Beta is linear from 1e-4 to 0.02 over 1000 timesteps. Sampling takes `steps` of them, with betas recomputed from
// alpha_bar. Tables in double; index i runs over the chosen timesteps.
typedef struct {
    int n;
    int t[DIFFUSION_STEPS];                                             // the model's timestep at position i
    double alpha_bar[DIFFUSION_STEPS], alpha_bar_prev[DIFFUSION_STEPS]; // product of 1 - beta; prev is 1 at i = 0
    double log_beta[DIFFUSION_STEPS], log_var[DIFFUSION_STEPS]; // the variances between which the model interpolates
    double c1[DIFFUSION_STEPS], c2[DIFFUSION_STEPS];            // posterior mean = c1·x0 + c2·x_t
    double tau[DIFFUSION_STEPS]; // flow: share of noise that the model is told; x: what x0_hat - x_t is divided by
    double dt[DIFFUSION_STEPS];  // flow, x: the step's length
} Schedule;

// A model of x gives x0_hat; its velocity, what a model of flow gives, is (x0_hat - x_t)/max(tau, 0.05)
// (arXiv:2511.13720); at the timesteps of schedule_shift (x0_hat - x_t)/tau, by which the last step ends at x0_hat.
static double clamped_tau(int t) { return fmax(t / (double)DIFFUSION_STEPS, 0.05); }

static void schedule_make(Schedule *s, const Config *c, int steps) {
    double alpha_bar[DIFFUSION_STEPS], product = 1;
    for (int t = 0; t < DIFFUSION_STEPS; t++)
        alpha_bar[t] = product *= 1 - (1e-4 + (0.02 - 1e-4) * t / (DIFFUSION_STEPS - 1));
    if (c->zero_terminal_snr) { // sqrt(alpha_bar) moved and stretched: the first stays, the last is 0; arXiv:2305.08891
        double first = sqrt(alpha_bar[0]), last = sqrt(alpha_bar[DIFFUSION_STEPS - 1]);
        for (int t = 0; t < DIFFUSION_STEPS; t++) {
            double root = (sqrt(alpha_bar[t]) - last) * first / (first - last);
            alpha_bar[t] = root * root;
        }
    }
    s->n = steps;
    for (int i = 0; i < steps; i++) {
        s->t[i] = steps == DIFFUSION_STEPS ? i : (int)nearbyint((double)i * (DIFFUSION_STEPS - 1) / (steps - 1));
        double ab = alpha_bar[s->t[i]], prev = i ? s->alpha_bar[i - 1] : 1, beta = 1 - ab / prev;
        s->alpha_bar[i] = ab;
        s->alpha_bar_prev[i] = prev;
        s->log_beta[i] = log(beta);
        s->log_var[i] = log(beta * (1 - prev) / (1 - ab));
        s->c1[i] = beta * sqrt(prev) / (1 - ab);
        s->c2[i] = (1 - prev) * sqrt(1 - beta) / (1 - ab);
        s->tau[i] = c->prediction == PREDICT_X ? clamped_tau(s->t[i]) : s->t[i] / (double)DIFFUSION_STEPS;
        s->dt[i] = 1.0 / steps;
    }
    s->log_var[0] = s->log_var[1]; // at i = 0 it would be log 0
}

// Other timesteps for models of flow and x. With those above the model is told t = 0 at the last step, when x_t still
// holds 1/S of noise. Here it is told the noise that there is: step i goes from tau_i to tau_{i-1} and the last to 0,
// tau = shift·u/(1-u+shift·u) at u = (i+1)/S (arXiv:2403.03206); a shift above 1 gives more of them to large t.
static void schedule_shift(Schedule *s, double shift) {
    double before = 0;
    for (int i = 0; i < s->n; i++) {
        double u = (i + 1.0) / s->n, tau = shift * u / (1 - u + shift * u);
        s->t[i] = (int)fmin(nearbyint(tau * DIFFUSION_STEPS), DIFFUSION_STEPS - 1);
        s->tau[i] = tau;
        s->dt[i] = tau - before;
        before = tau;
    }
}

// The flow sampler's second order (Adams and Bashforth's method of two steps): a step goes by the velocity that a
// straight line through the one before and this one gives for its middle, v + ahead·(v - before). ahead is half of this
// step over the length of the one before; in the first step 0, which is Euler's method.
static double ahead_of(const Schedule *s, int order, int i) {
    return order > 1 && i < s->n - 1 ? s->dt[i] / s->dt[i + 1] / 2 : 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// What sampling spends: iterations can be moved between timesteps, and traded for more of them

enum { STRIP = 4 }; // pictures that --strip shows

typedef struct {
    int sampler, order, cfg_channels, reuse;
    double eta, cfg, tol;
    const int *iters; // per timestep, in sampling order
    FILE *trace;      // CSV of residuals, or NULL
    int64_t passes;   // Transformer-block passes per picture that were spent, counted up
    int64_t guidance; // and those for guidance
    int window;       // of Anderson acceleration; 0: plain iteration
    double mixing;    // its beta
    float *path;      // (steps+1,STRIP,C,S,S) of the first pictures, x before each timestep and at the end; or NULL
    int interval[2];  // timesteps t that are guided, first and last (arXiv:2404.07724)
} SampleSettings;

static int is_guided(const SampleSettings *set, int t) {
    return set->cfg != 1 && t >= set->interval[0] && t <= set->interval[1];
}

// Iterations of each timestep in sampling order (large t first), iters[0..S-1]. A real-valued share of
// 1 + (total - S)·ratio/S is rounded through its running sum: each is then at least 1 and the sum is `total`.
static void allocate_iterations(int *iters, int S, int total, int alloc) {
    double running = 0;
    int spent = 0;
    for (int s = 0; s < S; s++) {
        double position = S > 1 ? (double)s / (S - 1) : 0.5; // 0 at the largest t
        double ratio = alloc == ALLOC_INC ? 1.5 - position : alloc == ALLOC_DEC ? 0.5 + position : 1; // in all: S
        running += 1 + (total - S) * ratio / S;
        iters[s] = (int)floor(running + 1e-6) - spent;
        spent += iters[s];
    }
}

// Keeps x (B,C,S,S) of the first pictures, as it is before timestep `step`.
static void path_keep(const SampleSettings *set, int step, const float *x, int first, int B, size_t count) {
    if (set->path && first == 0)
        memcpy(set->path + step * STRIP * count, x, (B < STRIP ? B : STRIP) * count * sizeof *x);
}

// End of shared block 2

// ---------------------------------------------------------------------------------------------------------------------
// The training loss

// x_t = sqrt(alpha_bar)·x0 + sqrt(1-alpha_bar)·noise, or for flow and x (1-tau)·x0 + tau·noise with tau = t/1000. All
// (B,C,S,S).
static void diffuse(real *x_t, const float *x0, const float *noise, const int *t, const Schedule *s, int straight,
                    int B, size_t count) {
#pragma omp parallel for schedule(static)
    for (int b = 0; b < B; b++) {
        double tau = t[b] / (double)DIFFUSION_STEPS, ab = s->alpha_bar[t[b]];
        double keep = straight ? 1 - tau : sqrt(ab), add_noise = straight ? tau : sqrt(1 - ab);
        for (size_t i = b * count; i < (b + 1) * count; i++) x_t[i] = (real)(keep * x0[i] + add_noise * noise[i]);
    }
}

// cdf of the standard normal by its tanh form, and its derivative
static double normal_cdf(double u, double *slope) {
    double th = tanh(0.7978845608028654 * (u + 0.044715 * u * u * u));
    *slope = 0.5 * (1 - th * th) * 0.7978845608028654 * (1 + 0.134145 * u * u);
    return 0.5 * (1 + th);
}

// One element's variational term in nats: KL(q || p) of two Gaussians for t > 0, minus log p(x0) of the discretised
// Gaussian at t = 0. *slope = its derivative with respect to log_var, the log variance of p.
static double variational_term(double *slope, int t, double x0, double mean, double log_var, double true_mean,
                               double true_log_var) {
    if (t > 0) {
        double ratio = exp(true_log_var - log_var), square = (true_mean - mean) * (true_mean - mean) * exp(-log_var);
        *slope = 0.5 * (1 - ratio - square);
        return 0.5 * (-1 + log_var - true_log_var + ratio + square);
    }
    double inverse = exp(-0.5 * log_var), upper = inverse * (x0 - mean + 1 / 255.0),
           lower = inverse * (x0 - mean - 1 / 255.0);
    double upper_slope, lower_slope, upper_cdf = normal_cdf(upper, &upper_slope),
                                     lower_cdf = normal_cdf(lower, &lower_slope);
    if (x0 < -0.999) lower_cdf = lower_slope = 0;
    if (x0 > 0.999) upper_cdf = 1, upper_slope = 0;
    double mass = upper_cdf - lower_cdf; // probability of the bin; d u / d log_var = -u/2
    *slope = mass < 1e-12 ? 0 : 0.5 * (upper * upper_slope - lower * lower_slope) / mass;
    return -log(mass < 1e-12 ? 1e-12 : mass);
}

// x0 and eps that a prediction stands for (eps and v)
static void predicted(double *x0, double *eps, int prediction, double out, double x_t, double ab) {
    *x0 = prediction == PREDICT_EPS ? (x_t - sqrt(1 - ab) * out) / sqrt(ab) : sqrt(ab) * x_t - sqrt(1 - ab) * out;
    *eps = prediction == PREDICT_EPS ? out : sqrt(ab) * out + sqrt(1 - ab) * x_t;
}

// Per picture: mse[b] the (weighted) squared error, vb[b] the variational term in bits. dout (B,Cout,S,S), unless NULL,
// becomes the gradient of `scale` times the sum of both over the pictures; the variational term's stops at the
// prediction and goes into the variance alone (arXiv:2102.09672). In double: this is 1e-4 of a step's work.
static void loss_forward_backward(double *mse, double *vb, real *dout, const real *out, const float *x0,
                                  const float *noise, const real *x_t, const int *t, const Schedule *s, const Config *c,
                                  double scale, int B) {
    size_t count = config_pixels(c);
#pragma omp parallel for schedule(static)
    for (int b = 0; b < B; b++) {
        int time = t[b];
        double ab = s->alpha_bar[time], a = sqrt(ab), n = sqrt(1 - ab), weight = 1, square = 0, bits = 0;
        if (c->prediction == PREDICT_V && c->v_weight == V_WEIGHT_P2)
            weight = ab / n * (1 - ab); // ab/sqrt(1-ab)·(x0-x0_hat)^2, which is (1-ab)·(v-out)^2
        if (c->prediction == PREDICT_X) // the velocity's error
            weight = 1 / (clamped_tau(time) * clamped_tau(time));
        for (size_t i = 0; i < count; i++) {
            size_t at = b * count + i, out_at = b * count * (c->learn_sigma ? 2 : 1) + i;
            double target = c->prediction == PREDICT_EPS ? noise[at]
                            : c->prediction == PREDICT_V ? a * noise[at] - n * x0[at]
                            : c->prediction == PREDICT_X ? x0[at]
                                                         : (double)x0[at] - noise[at];
            double error = out[out_at] - target;
            square += weight * error * error;
            if (dout) dout[out_at] = (real)(scale * 2 * weight * error / count);
            if (!c->learn_sigma) continue;
            double x0_hat, eps_hat, slope, share = (out[out_at + count] + 1) / 2;
            predicted(&x0_hat, &eps_hat, c->prediction, out[out_at], x_t[at], ab);
            double log_var = share * s->log_beta[time] + (1 - share) * s->log_var[time];
            double mean = s->c1[time] * x0_hat + s->c2[time] * x_t[at],
                   true_mean = s->c1[time] * x0[at] + s->c2[time] * x_t[at];
            bits += variational_term(&slope, time, x0[at], mean, log_var, true_mean, s->log_var[time]) / log(2);
            if (dout)
                dout[out_at + count] =
                    (real)(scale * slope * 0.5 * (s->log_beta[time] - s->log_var[time]) / log(2) / count);
        }
        mse[b] = square / count;
        vb[b] = bits / count;
    }
}

// Forward, loss and backward of B pictures; the gradient of `scale`·(sum of their losses) is added to the model's
// gradients. x0, noise (B,C,S,S); t, y (B); n and m iterations without and with gradient. Fills mse and vb (B). All of
// these belong to the model until model_wait.
static void model_loss(Model *model, const Schedule *s, const float *x0, const float *noise, const int *t, const int *y,
                       int B, int n, int m, double scale, double *mse, double *vb) {
    const Config *c = &model->config;
    Activations *a = &model->a;
    diffuse(a->x_t, x0, noise, t, s, config_straight(c), B, config_pixels(c));
    model_forward(model, t, y, B, n, m, NULL);
    loss_forward_backward(mse, vb, a->dout, a->out, x0, noise, a->x_t, t, s, c, scale, B);
    model_backward(model);
}

// Waits for model_loss: here it is done when it returns, a GPU may still be at work.
static void model_wait(Model *m) { (void)m; }

// ---------------------------------------------------------------------------------------------------------------------
// Sampling

// Draws B pictures: x (B,C,S,S) holds x_T on entry and the pictures on return. z (steps,B,C,S,S), the noise of each
// step, is given by tests; when NULL it is drawn: picture b is number first+b of the seed. The model needs room for 2B
// with guidance, out = uncond + cfg·(cond - uncond) (arXiv:2207.12598). A step, with prev = alpha_bar behind it:
//   flow, x  x + dt·(v + ahead·(v - v of the timestep before))
//   ddpm     c1·x0_hat + c2·x + sigma·z (arXiv:2006.11239)
//   ddim     sqrt(prev)·x0_hat + sqrt(1-prev-sigma^2)·eps_hat + sigma·z (arXiv:2010.02502)
static void sample_batch(Model *model, const Schedule *s, SampleSettings *set, float *x, const int *y, int B,
                         const float *z, uint64_t seed, int first) {
    const Config *c = &model->config;
    Activations *a = &model->a;
    int most = set->cfg != 1 ? 2 * B : B, rows = 0, S = s->n;
    size_t count = config_pixels(c), out_count = count * (c->learn_sigma ? 2 : 1);
    size_t guided_count = count / c->channels * (set->cfg_channels < c->channels ? set->cfg_channels : c->channels);
    int *t = (int *)xcalloc((size_t)most, sizeof *t, "sampling"),
        *labels = (int *)xcalloc((size_t)most, sizeof *labels, "sampling");
    float *noise = (float *)xcalloc(B * count, sizeof *noise, "sampling");
    float *before = (float *)xcalloc(B * count, sizeof *before, "sampling"); // the velocity at the last timestep
    Solve solve = {.reuse = set->reuse,
                   .want_residual = set->trace || set->tol > 0,
                   .window = set->window,
                   .tol = set->tol,
                   .mixing = set->mixing};
    assert(set->window <= model->window);
    for (int b = 0; b < most; b++) labels[b] = b < B ? y[b] : c->classes;
    for (int step = 0; step < S; step++) {
        int i = S - 1 - step, guided = is_guided(set, s->t[i]);
        if (guided && rows == B) solve.reuse_ready = 0; // the rows without label have no solution to start from
        rows = guided ? 2 * B : B;
        path_keep(set, step, x, first, B, count);
        for (int b = 0; b < rows; b++) {
            t[b] = s->t[i];
            for (size_t e = 0; e < count; e++) a->x_t[b * count + e] = x[b % B * count + e];
        }
        model_forward(model, t, labels, rows, set->iters[step], 0, &solve);
        progress(B);
        int passes = c->fixed_point ? c->pre_depth + solve.ran + c->post_depth : c->depth;
        set->passes += passes;
        set->guidance += guided ? passes : 0;
        for (int k = 0; set->trace && first == 0 && k < solve.ran; k++)
            fprintf(set->trace, "%d,%d,%d,%.6g\n", step, s->t[i], k + 1, solve.residuals[k]);
        if (!z && i > 0 && (set->sampler == SAMPLER_DDPM || (set->sampler == SAMPLER_DDIM && set->eta > 0)))
            for (int b = 0; b < B; b++)
                rng_normal(noise + b * count, count, 0, seed, (uint32_t)((first + b) * DIFFUSION_STEPS + i), STREAM_Z);
        double ab = s->alpha_bar[i], prev = s->alpha_bar_prev[i];
        double ahead = ahead_of(s, set->order, i);
#pragma omp parallel for schedule(static)
        for (int b = 0; b < B; b++)
            for (size_t e = 0; e < count; e++) {
                size_t at = b * count + e;
                const real *cond = a->out + b * out_count + e,
                           *uncond = guided && e < guided_count ? a->out + (B + b) * out_count + e : cond;
                double out = *uncond + set->cfg * ((double)*cond - *uncond), x0_hat, eps_hat, xi = x[at];
                double zi = i == 0 ? 0 : z ? z[step * B * count + at] : noise[at];
                if (set->sampler == SAMPLER_FLOW) {
                    if (c->prediction == PREDICT_X) out = (out - xi) / s->tau[i];
                    x[at] = (float)(xi + (out + ahead * (out - before[at])) * s->dt[i]);
                    before[at] = (float)out;
                    continue;
                }
                predicted(&x0_hat, &eps_hat, c->prediction, out, xi, ab);
                if (set->sampler == SAMPLER_DDPM) {
                    double share = c->learn_sigma ? (cond[count] + 1) / 2 : 1;
                    double log_var = share * s->log_beta[i] + (1 - share) * s->log_var[i];
                    x[at] = (float)(s->c1[i] * x0_hat + s->c2[i] * xi + exp(0.5 * log_var) * zi);
                } else {
                    double sigma = set->eta * sqrt((1 - prev) / (1 - ab)) * sqrt(1 - ab / prev),
                           rest = 1 - prev - sigma * sigma;
                    x[at] = (float)(sqrt(prev) * x0_hat + sqrt(rest > 0 ? rest : 0) * eps_hat + sigma * zi);
                }
            }
    }
    path_keep(set, S, x, first, B, count);
    xfree(t);
    xfree(labels);
    xfree(noise);
    xfree(before);
}

// ---------------------------------------------------------------------------------------------------------------------
// Solvers: how far the iteration is, and how it gets there in fewer steps

// Mean over the pictures of ||z - before|| / ||z||
static double residual_of(const real *z, const real *before, int B, size_t count) {
    double sum = 0;
    for (int b = 0; b < B; b++) {
        double change = 0, norm = 0;
        for (size_t i = b * count; i < (b + 1) * count; i++) {
            change += (double)(z[i] - before[i]) * (z[i] - before[i]);
            norm += (double)z[i] * z[i];
        }
        sum += sqrt(change / (norm > 0 ? norm : 1));
    }
    return sum / B;
}

// a (m) minimises ||sum a_i f_i||^2 + R sum (a_i ||f_i||)^2 where sum a_i = 1, given the products f_i·f_j: all rows of
// (gram + R diag)·a are the same number. R keeps the weights of nearly parallel f_i small. Where no unique a exists
// because an f_i is zero, the newest counts alone.
static void anderson_weights(double a[HISTORY], const double *gram, int m, int newest) {
    const double R = 1e-8;
    double A[HISTORY][HISTORY], sum = 0;
    int positive = 1;
    for (int i = 0; i < m; i++) {
        a[i] = 1;
        for (int j = 0; j < m; j++) A[i][j] = gram[i * HISTORY + j] * (i == j ? 1 + R : 1);
    }
    for (int i = 0; i < m; i++) { // Gaussian elimination, which needs no pivoting as the matrix is positive definite
        positive &= A[i][i] > 0;
        for (int r = i + 1; r < m; r++) {
            double factor = A[r][i] / A[i][i];
            for (int j = i; j < m; j++) A[r][j] -= factor * A[i][j];
            a[r] -= factor * a[i];
        }
    }
    for (int i = m - 1; i >= 0; i--) {
        for (int j = i + 1; j < m; j++) a[i] -= A[i][j] * a[j];
        a[i] /= A[i][i];
        sum += a[i];
    }
    for (int i = 0; i < m; i++) a[i] = positive ? a[i] / sum : i == newest;
}

// Anderson acceleration (Walker and Ni 2011, type II; in equilibrium models arXiv:1909.01377) after iteration k = 1...
// of a timestep, for each of B pictures alone. z (B,count) holds g(z_{k-1}) on entry, before (B,count) z_{k-1}. With
// f_i = g(z_i) - z_i of the last min(k, window+1) iterations, which `history` and `gram` (see Activations) keep:
//   z_k = sum a_i·(z_i + mixing·f_i),   a = argmin ||sum a_i f_i||, sum a_i = 1
static void anderson_forward(real *z, const real *before, real *history, double *gram, int k, int window, double mixing,
                             int B, size_t count) {
    int slots = window + 1, m = k < slots ? k : slots, newest = (k - 1) % slots;
    real undo = (real)(1 - mixing); // z_i + mixing·f_i = g_i - undo·f_i
#pragma omp parallel for schedule(static)
    for (int b = 0; b < B; b++) {
        real *first = history + 2 * slots * b * count, *f = first + 2 * newest * count, *out = z + b * count;
        double *products = gram + b * HISTORY * HISTORY, a[HISTORY];
        for (size_t e = 0; e < count; e++) f[e] = out[e] - before[b * count + e];
        memcpy(f + count, out, count * sizeof(real));
        for (int i = 0; i < m; i++) {
            const real *fi = first + 2 * i * count;
            double dot = 0;
#pragma omp simd reduction(+ : dot)
            for (size_t e = 0; e < count; e++) dot += (double)f[e] * fi[e];
            products[i * HISTORY + newest] = products[newest * HISTORY + i] = dot;
        }
        anderson_weights(a, products, m, newest);
        memset(out, 0, count * sizeof(real));
        for (int i = 0; i < m; i++) {
            const real *fi = first + 2 * i * count, *gi = fi + count, weight = (real)a[i];
            for (size_t e = 0; e < count; e++) out[e] += weight * (gi[e] - undo * fi[e]);
        }
    }
}

// =====================================================================================================================
// Part 3. Learning
// =====================================================================================================================

static void model_zero_gradients(Model *m) { memset(m->memory[MODEL_GRADS], 0, (size_t)m->n_params * sizeof(real)); }

// The L2 norm of all gradients, in double: partial sums of fixed pieces, added in order, so that no number of threads
// changes it.
static double model_gradient_norm(const Model *m) {
    const real *grads = m->memory[MODEL_GRADS];
    int64_t count = m->n_params;
    int64_t pieces = (count + PIECE - 1) / PIECE;
    double *partial = (double *)xcalloc((size_t)pieces, sizeof *partial, "the gradient norm"), sum = 0;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < pieces; p++) {
        int64_t last = (p + 1) * PIECE < count ? (p + 1) * PIECE : count;
        double squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = p * PIECE; i < last; i++) squares += (double)grads[i] * grads[i];
        partial[p] = squares;
    }
    for (int64_t p = 0; p < pieces; p++) sum += partial[p];
    xfree(partial);
    return sqrt(sum);
}

static real sqrt_real(real x) { return sizeof x == 4 ? (real)sqrtf((float)x) : (real)sqrt((double)x); }

// AdamW (arXiv:1711.05101); gradients g are multiplied by grad_scale first. m, v: moving averages of g and g^2.
//   w <- w·keep - size·m/(sqrt(v)·correct + eps)          size, correct, keep: model_update
static void adamw_update(Model *model, const ParamTensor *t, real size, real correct, double beta1, double beta2,
                         real eps, real keep, real grad_scale) {
    real b1 = (real)beta1, b2 = (real)beta2, new1 = (real)(1 - beta1), new2 = (real)(1 - beta2);
    real *weights = model->memory[MODEL_WEIGHTS] + t->offset, *first = model->memory[MODEL_ADAM_M] + t->offset,
         *second = model->memory[MODEL_ADAM_V] + t->offset, *grads = model->memory[MODEL_GRADS] + t->offset;
    size_t count = (size_t)t->count;
    FOR_EACH_PIECE SIMD for (size_t i = piece; i < PIECE_END; i++) {
        real g = grads[i] * grad_scale, m = b1 * first[i] + new1 * g, v = b2 * second[i] + new2 * g * g;
        weights[i] = weights[i] * keep - size * m / (sqrt_real(v) * correct + eps);
        first[i] = m;
        second[i] = v;
    }
}

// Muon (Jordan and others 2024; its size as in arXiv:2502.16982) for a matrix (n,k), or for each of qkv's three:
//   m <- mu·m + g,   u = g + mu·m,   w <- w·keep - lr·0.2·sqrt(max(n,k))·O
// where O is about U·V^T of u = U·S·V^T: MUON_STEPS times X <- (a + b·XX^T + c·(XX^T)^2)·X, from X = u/||u||.
static void muon_update(Model *model, const ParamTensor *t, double lr, real keep, real grad_scale) {
    int half = model->half, k = (int)t->shape[1], parts = t->shape[0] == 3 * k ? 3 : 1, n = (int)t->shape[0] / parts;
    int r = n < k ? n : k, c = n < k ? k : n; // X (r,c) is u, or where n is larger u^T
    size_t count = (size_t)n * k, square = (size_t)r * r, rs = n < k ? k : 1, cs = n < k ? 1 : k;
    real *x = model->a.muon, *y = x + count, *a = y + count, *p = a + square;
    Act *x_copy = p + square, *square_copy = (real *)x_copy + count;
    real mu = (real)MUON_MOMENTUM;
    for (int part = 0; part < parts; part++) {
        int64_t at = t->offset + (int64_t)(part * count);
        real *w = model->memory[MODEL_WEIGHTS] + at, *m = model->memory[MODEL_ADAM_M] + at,
             *g = model->memory[MODEL_GRADS] + at;
        double dot = 0;
        SIMD_DOT for (size_t i = 0; i < count; i++) {
            m[i] = mu * m[i] + g[i] * grad_scale;
            x[i] = g[i] * grad_scale + mu * m[i];
            dot += (double)x[i] * x[i];
        }
        real norm = (real)(dot > 0 ? 1 / sqrt(dot) : 0), size = (real)(lr * 0.2 * sqrt((double)c));
        for (size_t i = 0; i < count; i++) x[i] *= norm;
        for (int i = 0; i < MUON_STEPS; i++) {
            const Act *X = as_act(half, x_copy, x, count);
            gemm(half, a, r, X, rs, cs, X, cs, rs, NULL, 0, r, r, c);
            const Act *A = as_act(half, square_copy, a, square);
            gemm(half, p, r, A, r, 1, A, r, 1, NULL, 0, r, r, r);
            SIMD for (size_t e = 0; e < square; e++) p[e] = (real)MUON_B * a[e] + (real)MUON_C * p[e];
            for (size_t e = 0; e < square; e += r + 1) p[e] += (real)MUON_A;
            const Act *P = as_act(half, square_copy, p, square);
            if (n < k)
                gemm(half, y, k, P, r, 1, X, k, 1, NULL, 0, n, k, r);
            else
                gemm(half, y, k, X, k, 1, P, r, 1, NULL, 0, n, k, r);
            real *next = y;
            y = x, x = next;
        }
        for (size_t i = 0; i < count; i++) w[i] = w[i] * keep - size * x[i];
    }
}

// Update number `step` (from 1) of the weights, by AdamW or Muon, then of their moving average (EMA) and their copy as
// operands. AdamW's moving averages start at 0, which size and correct make up for.
static void model_update(Model *model, int64_t step, double lr, double beta1, double beta2, double eps, double decay,
                         double grad_scale, double ema_decay) {
    real size = (real)(lr / (1 - pow(beta1, (double)step))), correct = (real)(1 / sqrt(1 - pow(beta2, (double)step)));
    real keep = (real)(1 - lr * decay), scale = (real)grad_scale;
    for (int k = 0; k < model->n_tensors; k++) {
        const ParamTensor *t = &model->tensors[k];
        if (model->training == TRAIN_MUON && muon_has(t))
            muon_update(model, t, lr, keep, scale);
        else
            adamw_update(model, t, size, correct, beta1, beta2, (real)eps, keep, scale);
    }
    real *weights = model->memory[MODEL_WEIGHTS], *ema = model->memory[MODEL_EMA], toward = (real)(1 - ema_decay);
    bf16 *half = model->half_weights;
    size_t count = (size_t)model->n_params;
    FOR_EACH_PIECE SIMD for (size_t i = piece; i < PIECE_END; i++) {
        ema[i] += toward * (weights[i] - ema[i]);
        if (half) put(1, half, i, weights[i]);
    }
}

// =====================================================================================================================
// Shared block 3 of 4. The training loop
// =====================================================================================================================

// What a step draws, B pictures at a time, and the losses that come of it
typedef struct {
    float *x0, *noise; // (B,C,S,S)
    int *t, *y;        // (B) timesteps, labels
    double *mse, *vb;  // (B) the two parts of the loss
} Batch;

static Batch batch_create(int B, size_t pixels) {
    const char *what = "a batch";
    Batch b = {(float *)xcalloc(B * pixels, sizeof(float), what),
               (float *)xcalloc(B * pixels, sizeof(float), what),
               (int *)xcalloc(B, sizeof(int), what),
               (int *)xcalloc(B, sizeof(int), what),
               (double *)xcalloc(B, sizeof(double), what),
               (double *)xcalloc(B, sizeof(double), what)};
    return b;
}

// A timestep from two random words: uniform, or t/1000 = sigmoid(t_mean + t_std·g) with g normal (arXiv:2403.03206)
static int draw_timestep(const uint32_t word[2], const Options *o) {
    if (o->t_sampling == T_UNIFORM) return (int)rng_below(word[0], DIFFUSION_STEPS);
    double g = sqrt(-2 * log(rng_uniform(word[0]))) * cos(6.283185307179586 * rng_uniform(word[1]));
    return (int)fmin(floor(DIFFUSION_STEPS / (1 + exp(-(o->t_mean + o->t_std * g)))), DIFFUSION_STEPS - 1);
}

// The learning rate of a step: linear warm-up, then constant or falling to zero at o->steps
static double learning_rate(const Options *o, int step) {
    if (step < o->warmup) return o->lr * (step + 1) / o->warmup;
    double done = (double)(step - o->warmup) / (o->steps - o->warmup);
    return o->lr * (o->lr_schedule == LR_LINEAR   ? 1 - done
                    : o->lr_schedule == LR_COSINE ? 0.5 * (1 + cos(3.141592653589793 * done))
                                                  : 1);
}

// Pictures first..first+B-1 of a step: data, noise, and a timestep for each
static void batch_draw(Batch *b, Dataset *data, const Options *o, int step, int first, int B) {
    size_t count = config_pixels(&o->model);
    dataset_batch(data, b->x0, b->y, step, o->batch, first, B, o->hflip, o->label_drop);
    rng_normal(b->noise, B * count, first * count, o->seed, (uint32_t)step, STREAM_NOISE);
    for (int i = 0; i < B; i++) {
        uint32_t word[4];
        philox(word, o->seed, (uint32_t)(first + i), (uint32_t)step, STREAM_T);
        b->t[i] = draw_timestep(word, o);
    }
}

typedef struct { // what a step did: a row of the log
    int n, m;    // iterations without and with gradient
    double mse, vb, norm, lr;
} Step;

// Who this process is among those that train together, see "Data parallel". It has some rows of each batch.
static struct {
    int rank, count, local, here; // here: ranks on this machine, local: this one's number among them
    int speaker;                  // the rank that tells what is wrong
} ranks = {0, 1, 0, 1, 0};
static int ranks_row(const Options *o, int rank) { return (int)((int64_t)rank * o->batch / ranks.count); }
static void ranks_reduce(Model *m, Step *did); // gradient and losses become the sum over all ranks
static int ranks_any(int yes);                 // whether any rank says so

// Step number `step` (from 0): draws n and m, sums the gradient over the batch, `micro` pictures at a time, and updates
// the weights. *b holds the step's first pictures; while a GPU works on some, the next are drawn, and in the end those
// that the next step begins with. `spare` is the room for that.
static Step train_step(Model *model, const Schedule *s, Dataset *data, Batch *b, Batch *spare, const Options *o,
                       int step, int micro) {
    Step did = {0, 0, 0, 0, 0, 0};
    uint32_t word[4];
    int begin = ranks_row(o, ranks.rank), end = ranks_row(o, ranks.rank + 1);
    philox(word, o->seed, 0, (uint32_t)step, STREAM_NM);
    did.n = o->no_grad_iters[0] + (int)rng_below(word[0], o->no_grad_iters[1] - o->no_grad_iters[0] + 1);
    did.m = o->grad_iters[0] + (int)rng_below(word[1], o->grad_iters[1] - o->grad_iters[0] + 1);
    model_zero_gradients(model);
    for (int first = begin; first < end; first += micro) {
        int B = end - first < micro ? end - first : micro, left = end - first - B;
        model_loss(model, s, b->x0, b->noise, b->t, b->y, B, did.n, did.m, 1.0 / o->batch, b->mse, b->vb);
        if (left)
            batch_draw(spare, data, o, step, first + B, left < micro ? left : micro);
        else if (step + 1 < o->steps)
            batch_draw(spare, data, o, step + 1, begin, micro);
        model_wait(model);
        for (int i = 0; i < B; i++) did.mse += b->mse[i] / o->batch, did.vb += b->vb[i] / o->batch;
        Batch done = *b;
        *b = *spare, *spare = done;
    }
    ranks_reduce(model, &did);
    did.norm = model_gradient_norm(model);
    did.lr = learning_rate(o, step);
    double ema = o->ema_warmup ? fmin(o->ema, (1.0 + step) / (10.0 + step)) : o->ema;
    double clip = o->grad_clip > 0 && did.norm > o->grad_clip ? o->grad_clip / (did.norm + 1e-6) : 1;
    model_update(model, step + 1, did.lr, 0.9, 0.999, 1e-8, o->weight_decay, clip, ema);
    return did;
}

typedef struct {
    Options *o;
    Dataset *data;
    Model *model;
    int micro; // pictures at a time
    // of its folder and its reports
    FILE *log;
    float *tensor;           // room for the largest one, on its way into a file
    int begun, shown, saved; // steps that were done at the start, at the last progress line, at the last save (or -1)
    double ms, shown_ms;     // of all steps; when the last progress line was shown
    double sum_ms, sum_flops, sum_loss; // of the steps since then
} Run;
static volatile sig_atomic_t interrupted; // the user wants to stop
// From Part 5:
static void run_report(Run *run, const Step *did, double ms); // a row of the log, now and then a line on the terminal
static void run_save(Run *run);                               // weights and state
static void run_pictures(Run *run);                           // a grid of samples

// Goes on from step o->step until o->steps are done or the user stops. Begins with what a run that was killed may have
// left out after its last step.
static void train(Run *run) {
    Options *o = run->o;
    size_t pixels = config_pixels(&o->model);
    Batch batch = batch_create(run->micro, pixels), spare = batch_create(run->micro, pixels);
    Schedule schedule;
    schedule_make(&schedule, &o->model, DIFFUSION_STEPS);
    batch_draw(&batch, run->data, o, o->step, ranks_row(o, ranks.rank), run->micro);
    for (;;) {
        int last = o->step == o->steps;
        if ((o->step > run->begun && o->step % o->save_every == 0) || last) run_save(run);
        if ((o->step && o->sample_every && o->step % o->sample_every == 0 && !interrupted) || last) run_pictures(run);
        if (ranks_any(last || interrupted)) break;
        double begin = now_ms();
        Step did = train_step(run->model, &schedule, run->data, &batch, &spare, o, o->step, run->micro);
        o->step++;
        run_report(run, &did, now_ms() - begin);
    }
}

// End of shared block 3

#ifdef MPI
// The gradient becomes the sum over all ranks, see "Data parallel".
static void model_reduce(Model *m) {
    for (int64_t i = 0, most = 1 << 30; i < m->n_params; i += most)
        MPI_Allreduce(MPI_IN_PLACE, m->memory[MODEL_GRADS] + i, (int)(m->n_params - i < most ? m->n_params - i : most),
                      sizeof(real) == 8 ? MPI_DOUBLE : MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
}
#endif

// =====================================================================================================================
// Part 4. Speed and memory
// =====================================================================================================================

// Matrix multiplication: C = A.B (+ bias) or C += A.B, for matrices of any strides, so that one function does the
// products of forward (x.W^T), backward (dy.W and dy^T.x) and attention. The scheme is that of Goto and of BLIS (Van
// Zee and van de Geijn 2015): a tile of C, MR rows by two vectors, is summed in registers over at most KC steps of k;
// the block of B that it runs along is first packed into panels two vectors wide, in the order of reading, and stays in
// the second-level cache. A is read where it stands when its rows are contiguous, else MC of its rows are packed too.
// In % of the peak of a Zen 5 core with AVX-512: plain loops for x.W^T 2, with `omp simd` 19; these tiles with A and B
// packed 83; A read in place 88; the next rows of A prefetched 91. Prefetching them in one burst before a tile stalls
// it: one line at each k instead. dy^T.x, where A is packed, is the slowest. No gain: tiles of 12 x 2 and 14 x 2
// vectors, the loop over panels outside that over rows, huge pages.
// Where rows of A lie a multiple of 2048 bytes apart, they share the few places of a cache set, and at 4096 the rate
// halves: such rows are copied. More k at once and narrower blocks of B: 2 to 4 % more.
// With bf16's instruction the peak is twice as high on a Zen 5, half as high on a Xeon, which has tiles (AMX) for that:
// 17 times as high; these loops reach 15 to 35 % of it. ./bench_cpu measures each shape of a model.

// Vectors as wide as the machine's registers; plain C operators act on all lanes, so instructions are named only in
// pair_multiply and where AMX is. A tile has 2 MR sums in registers, with room for two vectors of B and one of A: there
// are 32 registers, or 16.
#if defined __AVX512F__
enum { VEC_BYTES = 64, MR = 8 };
#elif defined __AVX__
enum { VEC_BYTES = 32, MR = 6 };
#elif defined __aarch64__
enum { VEC_BYTES = 16, MR = 8 };
#else
enum { VEC_BYTES = 16, MR = 6 };
#endif
enum {
    VL = VEC_BYTES / sizeof(real),
    NR = 2 * VL,
    // Blocks of B: at most KC of k each, as many columns as fit BLOCK, of a second-level cache of 1 MB. Where A must be
    // packed again for each block, that costs more than reading B from the next cache: fewer k, more columns.
    KC = 896,
    BLOCK = 600 * 1024 / sizeof(real),
    PACKED_KC = 384,
    PACKED_BLOCK = 1600 * 1024 / sizeof(real),
    MC = 8 * MR,
    PITCH = KC + 64 / sizeof(real),  // between rows of A that are copied: an odd number of cache lines
    GEMM_B = PACKED_BLOCK + NR * KC, // a block is whole panels
};
#define VECTOR(bytes) __attribute__((vector_size(bytes), aligned(sizeof(real)), may_alias)) // may stand anywhere
typedef real vec VECTOR(VEC_BYTES);
typedef real vec4 VECTOR(4 * sizeof(real));
typedef float vec_float VECTOR(VEC_BYTES); // what real is when there are pairs of bf16
typedef uint32_t vec_bf16x2 VECTOR(VEC_BYTES);
typedef uint32_t __attribute__((may_alias, aligned(2))) bf16x2;
typedef real __attribute__((may_alias)) real_bits; // may be two bf16
#if defined __clang__ || __GNUC__ >= 12
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define LANE(x, y, i) ((i) < 4 ? (x)[(i)&3] : (y)[(i)&3])
#define SHUFFLE(x, y, i, j, k, l) ((vec4){LANE(x, y, i), LANE(x, y, j), LANE(x, y, k), LANE(x, y, l)})
#endif
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

static int imin(int a, int b) { return a < b ? a : b; }

// Packs n columns of kc values, w columns to a panel: p[(i/w*kc + k)*w + i%w] = src[i*is + k*ks]. Columns that the last
// panel lacks keep what stood there; what comes of it is not stored. With ks 1, w is a multiple of 4, or there is one
// panel.
INLINE void gemm_pack(real *p, const int w, int n, int kc, const real_bits *src, size_t is, size_t ks) {
    int i = 0;
    if (is == 1) { // a panel's row is contiguous; the next k may be on another page, where no hardware prefetches
        for (int k = 0; k < kc; k++) {
            for (i = 0; i + w <= n; i += w) {
                if (k + 16 < kc) __builtin_prefetch(src + i + (k + 16) * ks);
                memcpy(p + i * kc + k * w, src + i + k * ks, w * sizeof(real));
            }
            for (; i + 4 <= n; i += 4) memcpy(p + i / w * w * kc + k * w + i % w, src + i + k * ks, 4 * sizeof(real));
        }
    } else if (ks == 1) { // transposed, in blocks of 4 x 4: a cache line of all rows of a panel, then the next line
        enum { LINE = 64 / sizeof(real) };
        for (int first = 0; first < n; first += w)
            for (int k0 = 0; k0 < kc; k0 += LINE)
                for (i = first; i + 4 <= imin(first + w, n); i += 4) {
                    const real_bits *s = src + i * is;
                    real *d = p + first * kc + i - first;
                    int k = k0, last = imin(k0 + LINE, kc);
                    for (; k + 4 <= last; k += 4) {
                        vec4 s0 = *(const vec4 *)(s + k), s1 = *(const vec4 *)(s + is + k);
                        vec4 s2 = *(const vec4 *)(s + 2 * is + k), s3 = *(const vec4 *)(s + 3 * is + k);
                        vec4 a = SHUFFLE(s0, s1, 0, 4, 1, 5), b = SHUFFLE(s2, s3, 0, 4, 1, 5);
                        vec4 c = SHUFFLE(s0, s1, 2, 6, 3, 7), e = SHUFFLE(s2, s3, 2, 6, 3, 7);
                        *(vec4 *)(d + k * w) = SHUFFLE(a, b, 0, 1, 4, 5);
                        *(vec4 *)(d + (k + 1) * w) = SHUFFLE(a, b, 2, 3, 6, 7);
                        *(vec4 *)(d + (k + 2) * w) = SHUFFLE(c, e, 0, 1, 4, 5);
                        *(vec4 *)(d + (k + 3) * w) = SHUFFLE(c, e, 2, 3, 6, 7);
                        __builtin_prefetch(s + (k - k0) / 4 * is + k0 + 2 * LINE);
                    }
                    for (; k < last; k++)
                        for (int r = 0; r < 4; r++) d[k * w + r] = s[r * is + k];
                }
    }
    for (; i < n; i++)
        for (int k = 0; k < kc; k++) p[(i / w * kc + k) * w + i % w] = src[i * is + k * ks];
}

// Two bf16, neighbours in k, fill the place of one float, the first in the low half, so that what holds, moves and
// reads floats serves pairs as well, with half the k. Rows contiguous in k are rows of pairs as they stand, if these
// begin on whole floats.
static int rows_of_pairs(const bf16 *rows, size_t stride, int K) {
    return (uintptr_t)rows % sizeof(bf16x2) == 0 && (stride | K) % 2 == 0;
}

// gemm_pack of kc bf16 as (kc+1)/2 pairs; what the last one lacks is 0
INLINE void pair_pack(real *p, const int w, int n, int kc, const bf16 *src, size_t is, size_t ks) {
    int pairs = (kc + 1) / 2;
    if (ks == 1 && w % 4 == 0 && rows_of_pairs(src, is, kc)) {
        gemm_pack(p, w, n, pairs, (const real_bits *)src, is / 2, 1);
        return;
    }
    for (int k = 0; k < pairs; k++)
        for (int i = 0; i < n; i += w) {
            const bf16 *x = src + i * is + 2 * k * ks, *y = x + ks;
            bf16x2 *out = (bf16x2 *)(p + i * pairs + k * w);
            if (is == 1 && 2 * k + 1 < kc && i + w <= n) {
                if (2 * k + 16 < kc) __builtin_prefetch(x + 16 * ks), __builtin_prefetch(y + 16 * ks);
                SIMD for (int j = 0; j < w; j++) out[j] = x[j] | (bf16x2)y[j] << 16;
            } else
                for (int j = 0; j < imin(w, n - i); j++)
                    out[j] = x[j * is] | (2 * k + 1 < kc ? (bf16x2)y[j * is] << 16 : 0);
        }
}

// Either, into panels of MR or NR columns; not inline, for the compiler has registers for one alone
static __attribute__((noinline)) void pack(int half, real *p, int w, int n, int kc, const Act *src, size_t is,
                                           size_t ks) {
    if (half && w == NR)
        pair_pack(p, NR, n, kc, src, is, ks);
    else if (half)
        pair_pack(p, MR, n, kc, src, is, ks);
    else if (w == NR)
        gemm_pack(p, NR, n, kc, src, is, ks);
    else
        gemm_pack(p, MR, n, kc, src, is, ks);
}

// sum + the products of two pairs in every lane, first of their high halves, then of the low ones. The product of two
// bf16 is exact in fp32: a fused multiply-add gives the same.
__attribute__((unused)) INLINE vec_float pair_multiply_plain(vec_float sum, bf16x2 a, vec_bf16x2 b) {
    vec_bf16x2 both = (vec_bf16x2){0} + a, high = (vec_bf16x2){0} + 0xffff0000u;
    sum += (vec_float)(both & high) * (vec_float)(b & high);
    return sum + (vec_float)(both << 16) * (vec_float)(b << 16);
}

// The same as one instruction, where there is one: to the bit, but for denormals, which it takes and gives as zeros
INLINE vec_float pair_multiply(vec_float sum, bf16x2 a, vec_bf16x2 b) {
#ifdef __AVX512BF16__
    return (vec_float)_mm512_dpbf16_ps((__m512)sum, (__m512bh)((vec_bf16x2){0} + a), (__m512bh)b);
#else
    return pair_multiply_plain(sum, a, b);
#endif
}

// What a tile prefetches, as much as it reads itself: of the next `rows` rows of A, a power of two
typedef struct {
    const real *at;
    size_t stride;
    int rows;
} Ahead;

// Intel's tiles (AMX): registers of 16 rows of 64 bytes, and one instruction for 16 rows of A by 16 pairs of B by 16
// columns. Four hold a tile of AMX_ROWS x NR of C, two are for A, two for B. B's panels are as for pairs, but A stands
// in rows in any case. They serve where K is a multiple of AMX_K and this process is allowed to use them.
enum { AMX_ROWS = 32, AMX_PAIRS = 16, AMX_K = 2 * AMX_PAIRS };
static atomic_int amx = -1; // not asked yet

static int amx_allowed(void) {
#ifdef AMX
    enum { REQUEST = 0x1023, TILE_DATA = 18 }; // ARCH_REQ_XCOMP_PERM: a larger state to be kept for each thread
    if (atomic_load(&amx) < 0) atomic_store(&amx, !syscall(SYS_arch_prctl, REQUEST, TILE_DATA));
#endif
    return atomic_load(&amx) > 0;
}

// Before and after a thread's use of tiles
static void amx_begin(void) {
#ifdef AMX
    static const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&shape);
#endif
}
static void amx_end(void) {
#ifdef AMX
    _tile_release();
#endif
}

// c (AMX_ROWS,NR; row stride ldc) = a.b + from (row stride ldf), if any, of kc pairs: a multiple of AMX_PAIRS; a has
// row stride ars, b is a panel. Prefetches `next`, too. Without tiles the same in plain C, for tests.
static void amx_kernel(real *c, size_t ldc, const real *a, size_t ars, const real *b, const real *from, size_t ldf,
                       int kc, Ahead next) {
#ifdef AMX
    size_t row = 4 * ars, c_row = 4 * ldc, from_row = 4 * ldf; // in bytes
    if (from) {
        _tile_loadd(0, from, from_row);
        _tile_loadd(1, from + 16, from_row);
        _tile_loadd(2, from + 16 * ldf, from_row);
        _tile_loadd(3, from + 16 * ldf + 16, from_row);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int k = 0; k < kc; k += AMX_PAIRS, a += AMX_PAIRS, b += AMX_PAIRS * NR) {
        for (int i = 0; i < next.rows; i++) __builtin_prefetch(next.at + i * next.stride + k);
        for (int i = k / 4; i < imin(k / 4 + 4, AMX_ROWS); i++) // of the tile of C to the right
            __builtin_prefetch(c + i * ldc + NR, 1), __builtin_prefetch(c + i * ldc + NR + 16, 1);
        _tile_loadd(6, b, 4 * NR);
        _tile_loadd(4, a, row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + 16, 4 * NR);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + 16 * ars, row);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_row);
    _tile_stored(1, c + 16, c_row);
    _tile_stored(2, c + 16 * ldc, c_row);
    _tile_stored(3, c + 16 * ldc + 16, c_row);
#else
    (void)next;
    for (int i = 0; i < AMX_ROWS; i++)
        for (int j = 0; j < NR; j++) {
            float sum = from ? (float)from[i * ldf + j] : 0;
            for (int k = 0; k < kc; k++) {
                const bf16 *x = (const bf16 *)(a + i * ars + k), *y = (const bf16 *)(b + k * NR + j);
                sum += bf16_to_float(x[0]) * bf16_to_float(y[0]) + bf16_to_float(x[1]) * bf16_to_float(y[1]);
            }
            c[i * ldc + j] = sum;
        }
#endif
}

// n rows of kc bf16, a multiple of AMX_K, that do not stand in place: p[i*PITCH + k/2] = pairs of src[i*is + k*ks]
static __attribute__((noinline)) void amx_pack(real *p, int n, int kc, const bf16 *src, size_t is, size_t ks) {
    real columns[AMX_PAIRS * NR] = {0};
    for (int i = 0; i < n; i += NR)
        for (int k = 0; k < kc; k += AMX_K) {
            int rows = imin(NR, n - i);
            pair_pack(columns, NR, rows, AMX_K, src + i * is + k * ks, is, ks);
            gemm_pack(p + i * PITCH + k / 2, PITCH, imin(AMX_K, kc - k) / 2, rows, columns, NR, 1);
        }
}

typedef struct {
    int half, tiles; // tiles: Intel's
    real *C;
    const Act *A, *B;
    const real *from;
    size_t ldc, ars, acs, brs, bcs, ldf;
    int M, N, K, flip; // flip: C and `from` are transposed
    real *panels;      // two blocks of packed B, shared by the threads: while one is in use the next is packed
    atomic_int next;   // how many rows of tiles are taken, over all blocks
} Gemm;

// One tile: c (MR,NR; row stride ldc) = a.b + from (row stride ldf), if any, with a (MR,kc; strides ars, acs) and b a
// panel; not `wide` computes its left half alone.
INLINE void gemm_kernel(const int half, const int wide, real *c, size_t ldc, const real *a, size_t ars, size_t acs,
                        const real *b, const real *from, size_t ldf, int kc, Ahead next) {
    vec s[MR] = {0}, t[MR] = {0};
    for (int i = 0; i < MR; i++) __builtin_prefetch(c + i * ldc, 1), __builtin_prefetch(c + i * ldc + NR - 1, 1);
    for (int i = 0; i < MR && from && ldf; i++)
        __builtin_prefetch(from + i * ldf), __builtin_prefetch(from + i * ldf + NR - 1);
    const real *low = a, *high = a + MR / 2 * ars; // halves of the rows: fewer distances to keep in registers
    for (int k = 0; k < kc; k++, low += acs, high += acs, b += NR) {
        vec b0 = *(const vec *)b, b1 = *(const vec *)(b + VL);
        __builtin_prefetch(next.at + k / 16 * 16 + (k & (next.rows - 1)) * next.stride);
        UNROLL
        for (int i = 0; i < MR; i++) {
            const real *row = i < MR / 2 ? low + i * ars : high + (i - MR / 2) * ars;
            if (half) {
                bf16x2 ai = *(const bf16x2 *)row;
                s[i] = (vec)pair_multiply((vec_float)s[i], ai, (vec_bf16x2)b0);
                if (wide) t[i] = (vec)pair_multiply((vec_float)t[i], ai, (vec_bf16x2)b1);
            } else {
                s[i] += *row * b0;
                if (wide) t[i] += *row * b1;
            }
        }
    }
    UNROLL
    for (int i = 0; i < MR; i++) {
        if (from) s[i] += *(const vec *)(from + i * ldf), t[i] += *(const vec *)(from + i * ldf + VL);
        *(vec *)(c + i * ldc) = s[i], *(vec *)(c + i * ldc + VL) = t[i];
    }
}

// The tile at row i0, column j0 of C; `first`: over the first of the blocks of k. Tiles at the lower and right edge of
// C, and those of a transposed C, take a detour.
INLINE void gemm_tile(const int half, const int tiles, const Gemm *g, int i0, int j0, const real *a, size_t ars,
                      size_t acs, const real *b, int first, int kc, Ahead next) {
    const int all = tiles ? AMX_ROWS : MR;
    int m = imin(all, g->M - i0), n = imin(NR, g->N - j0), row = g->flip ? j0 : i0, column = g->flip ? i0 : j0, ld = NR;
    size_t ldf = first ? g->ldf : g->ldc;
    real *c = g->C + row * g->ldc + column, t[AMX_ROWS * NR], turned[MR * NR], *tile = t;
    const real *from = !first ? c : g->from ? g->from + row * ldf + column : NULL;
    int whole = m == all && n == NR && !g->flip;
    if (tiles)
        amx_kernel(whole ? c : t, whole ? g->ldc : NR, a, ars, b, whole ? from : NULL, ldf, kc, next);
    else if (whole)
        gemm_kernel(half, 1, c, g->ldc, a, ars, acs, b, from, ldf, kc, next);
    else if (n > VL)
        gemm_kernel(half, 1, t, NR, a, ars, acs, b, NULL, 0, kc, next);
    else
        gemm_kernel(half, 0, t, NR, a, ars, acs, b, NULL, 0, kc, next);
    if (whole) return;
    if (g->flip) {
        pack(0, turned, MR, MR, n, t, NR, 1);
        int rows = n;
        n = m, m = rows, tile = turned, ld = MR;
    }
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) c[i * g->ldc + j] = tile[i * ld + j] + (from ? from[i * ldf + j] : 0);
}
static void float_tile(const Gemm *g, int i0, int j0, const real *a, size_t ars, size_t acs, const real *b, int first,
                       int kc, Ahead next) {
    gemm_tile(0, 0, g, i0, j0, a, ars, acs, b, first, kc, next);
}
static void pair_tile(const Gemm *g, int i0, int j0, const real *a, size_t ars, size_t acs, const real *b, int first,
                      int kc, Ahead next) {
    gemm_tile(1, 0, g, i0, j0, a, ars, acs, b, first, kc, next);
}
static void amx_tile(const Gemm *g, int i0, int j0, const real *a, size_t ars, size_t acs, const real *b, int first,
                     int kc, Ahead next) {
    gemm_tile(1, 1, g, i0, j0, a, ars, acs, b, first, kc, next);
}

static _Thread_local real gemm_a[MC * PITCH] __attribute__((aligned(64))),
    gemm_b[2 * GEMM_B] __attribute__((aligned(64)));

// What one of `threads` threads does. Each takes rows of tiles from those left, at first MC / MR, at the end one, so
// that fast threads do more and all finish together. Who computes a tile changes nothing in it: no sum is split among
// threads.
static void gemm_thread(Gemm *g, int thread, int threads) {
    int step = g->half ? 2 : 1, K = (g->K + step - 1) / step;                    // k counts floats, or pairs
    int stands = g->acs == 1 && (!g->half || rows_of_pairs(g->A, g->ars, g->K)); // A needs no packing
    // Rows a multiple of 2048 bytes apart fall into the same few sets of the first-level cache: they are copied.
    int crowded = stands && g->ars / step * sizeof(real) % 2048 == 0;
    int unit = g->tiles ? AMX_PAIRS : 1, high = g->tiles ? AMX_ROWS : MR;
    int most = stands ? KC : PACKED_KC, nk = (K + most - 1) / most, done = 0, rows = (g->M + high - 1) / high;
    int longest = (K / unit + nk - 1) / nk * unit;
    int columns = (stands && !crowded ? BLOCK : PACKED_BLOCK) / longest, nn = (g->N + columns - 1) / columns;
    int width = ((g->N + nn - 1) / nn + NR - 1) / NR * NR;
    assert((size_t)width * longest <= GEMM_B);
    if (g->tiles) amx_begin();
    real *panel = g->panels; // this block's; the other one may still be read by a slower thread
    size_t ars = crowded ? PITCH : g->ars / step, packed_ars = g->tiles ? PITCH : 1;
    for (int kb = 0; kb < nk; kb++) {
        int k0 = (int)((long)K / unit * kb / nk) * unit, kc = (int)((long)K / unit * (kb + 1) / nk) * unit - k0;
        int values = imin(kc * step, g->K - k0 * step);
        for (int n0 = 0; n0 < g->N; n0 += width, done += rows, panel = g->panels + (panel == g->panels) * GEMM_B) {
            int n = imin(width, g->N - n0), panels = (n + NR - 1) / NR;
            int share = 1; // rows of A that a tile prefetches
            while (share * panels < high) share *= 2;
            int p0 = panels * thread / threads * NR, p1 = imin(n, panels * (thread + 1) / threads * NR);
            const Act *B = act_at(g->half, g->B, (n0 + p0) * g->bcs + k0 * step * g->brs);
            pack(g->half, panel + p0 * kc, NR, p1 - p0, values, B, g->bcs, g->brs);
            if (threads > 1) {
#pragma omp barrier
            }
            for (;;) {
                int row = atomic_load(&g->next), left, len;
                do {
                    left = done + rows - row;
                    len = imin(threads > 1 ? (left + 2 * threads - 1) / (2 * threads) : left, MC / high);
                } while (len > 0 && !atomic_compare_exchange_weak(&g->next, &row, row + len));
                if (len <= 0) break;
                int m0 = (row - done) * high, m = imin(g->M - m0, len * high), inside = stands ? m / high * high : 0;
                const Act *A = act_at(g->half, g->A, m0 * g->ars + k0 * step * g->acs);
                const Act *rest = act_at(g->half, A, inside * g->ars); // goes into panels, or rows for tiles
                real *edge = gemm_a + inside * PITCH * crowded;
                if (g->tiles)
                    amx_pack(edge, m - inside, values, (const bf16 *)rest, g->ars, g->acs);
                else
                    pack(g->half, edge, MR, m - inside, values, rest, g->ars, g->acs);
                for (int i = 0; i < inside && crowded; i++)
                    memcpy(gemm_a + i * PITCH, act_at(g->half, A, i * g->ars), kc * sizeof(real));
                if (crowded) A = gemm_a;
                for (int i = 0; i < m; i += high)
                    for (int j = 0; j < n; j += NR) {
                        int in = i < inside, next_row = j / NR * share;
                        const real *a = in ? (const real *)A + i * ars : edge + (i - inside) * (g->tiles ? PITCH : kc);
                        Ahead next = {a, 0, 1};
                        if (next_row < high && i + high < inside)
                            next = (Ahead){a + (high + next_row) * ars, ars, share};
                        (g->tiles  ? amx_tile
                         : g->half ? pair_tile
                                   : float_tile)(g, m0 + i, n0 + j, a, in ? ars : packed_ars, in ? 1 : MR,
                                                 panel + j * kc, !kb, kc, next);
                    }
            }
        }
    }
    if (g->tiles) amx_end();
}

static void gemm(int half, real *C, size_t ldc, const Act *A, size_t ars, size_t acs, const Act *B, size_t brs,
                 size_t bcs, const real *from, size_t ldf, int M, int N, int K) {
    Gemm g = {half, 0, C, A, B, from, ldc, ars, acs, brs, bcs, ldf, M, N, K, 0, gemm_b, 0};
    // Few rows: C^T = B^T.A^T packs those few instead of all of B, which is read in place.
    if (acs == 1 && brs == 1 && M <= 128 && 2 * M < N && 2 * M < K)
        g.flip = 1, g.A = B, g.B = A, g.ars = bcs, g.bcs = ars, g.M = N, g.N = M;
    g.tiles = half && !g.flip && K % AMX_K == 0 && amx_allowed();
#ifdef _OPENMP
    if ((double)M * N * K > 5e5 && !omp_in_parallel()) { // else starting the threads costs more
#pragma omp parallel
        gemm_thread(&g, omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    gemm_thread(&g, 0, 1);
}

// 2^x in arithmetic that an `omp simd` loop turns into vector instructions: x = n + r, 2^x = 2^n * polynomial(r), the
// one of least relative error for |r| <= 1/2. To 0.7 ulp from -126 to 127, 0.9 without fused multiply-adds; at most
// 2^-125 below, at least 2^126 above; NaN stays. The limits are set to integers, which takes one instruction: floats,
// where NaN must be thought of, take three. Beyond 1e9 the remainder r is off, and with it the value. Double
// precision, for the gradient checks, calls libm.
static inline real exp2_real(real x) {
    if (sizeof(real) == 8) return (real)exp2((double)x);
    enum { ZERO = 0x4b400000 }; // the bits of 1.5 * 2^23: no room for a fraction, n stands in the last bits
    union {
        float f;
        int32_t i;
    } n = {(float)x + 12582912.0f};
    float r = (float)x - (n.f - 12582912.0f), p = 1.535336190e-4f;
    n.i = n.i > ZERO - 126 ? n.i : ZERO - 126;
    n.i = n.i < ZERO + 127 ? n.i : ZERO + 127;
    n.i = (n.i - ZERO + 127) * (1 << 23); // 2^n, by its exponent bits
    p = p * r + 1.339887441e-3f;
    p = p * r + 9.618437358e-3f;
    p = p * r + 5.550332471e-2f;
    p = p * r + 2.402264791e-1f;
    p = p * r + 6.931472029e-1f;
    return (p * r + 1) * n.f;
}

// ---------------------------------------------------------------------------------------------------------------------
// The model's memory

typedef struct {
    real *memory;
    size_t count;
} Arena;
static real *take(Arena *a, size_t count) {
    real *at = a->memory ? a->memory + a->count : NULL;
    a->count += (count + 15) & ~(size_t)15;
    return at;
}

// Points the activations into `memory` (NULL: counts only). Returns the number of reals.
static size_t activations_point(Model *m, real *memory) {
    const Config *c = &m->config;
    Activations *a = &m->a;
    Arena arena = {memory, 0}, *r = &arena;
    size_t B = m->batch, T = config_tokens(c), D = c->width, N = B * T * D, pixels = B * c->image_size * c->image_size;
    int blocks = config_blocks(c), last = blocks + (c->fixed_point ? m->max_m : 0);
    Layer shared = {0};
    int one = m->recompute || !m->training, made = 0; // one rest for all layers
    for (int l = 0; l <= last; l++) {
        Layer *at = &a->layer[l];
        int keeps_h = c->fixed_point && c->skip && l == c->pre_depth + 1; // z must not overwrite it
        real *x = at->x = m->training || !l || keeps_h ? take(r, N) : a->layer[l - 1].x;
        if (l == last || (c->fixed_point && l == c->pre_depth)) continue; // the last output, the injection: x alone
        if (one && made++) {
            *at = shared;
            at->x = x;
            continue;
        }
        // m varies from step to step, so most layers behind the injection serve an iteration or a post block.
        int within = l > c->pre_depth && l <= c->pre_depth + m->max_m, iteration = c->fixed_point && (within || one);
        at->u = iteration ? take(r, 2 * N) : NULL;
        at->in = iteration ? take(r, N) : NULL;
        at->qkv = take(r, m->half ? 3 * N / 2 : 3 * N);
        at->lse = take(r, B * c->heads * T);
        at->att = take(r, m->half ? N / 2 : N);
        at->proj = take(r, N);
        at->fc1 = take(r, 4 * N);
        at->fc2 = take(r, N);
        shared = *at;
    }
    a->pos = take(r, T * D);
    a->x_t = take(r, pixels * c->channels);
    a->out = take(r, pixels * config_out_channels(c));
    a->patches = take(r, pixels * c->channels);
    a->patch_out = take(r, pixels * config_out_channels(c));
    a->time_freq = take(r, B * 256);
    real **conditions[] = {&a->time_hidden, &a->time_silu, &a->cond, &a->cond_pp, &a->cond_silu, &a->cond_pp_silu};
    for (int i = 0; i < 6; i++) *conditions[i] = take(r, B * D);
    a->mod = take(r, blocks * B * 6 * D);
    a->final_mod = take(r, B * 2 * D);
    a->inj = c->fixed_point ? take(r, N) : NULL;
    a->inj_part = c->fixed_point ? take(r, 2 * N) : NULL;
    a->normed = take(r, N);
    a->gelu = take(r, m->half ? 2 * N : 4 * N);
    a->scratch = take(r, max_threads() * attention_scratch((int)T, (int)(D / c->heads)));
    a->z_before = a->mid = take(r, N);
    a->reused = c->fixed_point ? take(r, N) : NULL;
    size_t solver = c->fixed_point && m->window; // needs memory
    a->history = take(r, solver * 2 * (m->window + 1) * N);
    a->gram = (double *)take(r, solver * B * HISTORY * HISTORY * sizeof(double) / sizeof(real));
    if (!m->training) return arena.count;
    a->dx = take(r, N);
    a->dnormed = take(r, N);
    a->dwide = take(r, 4 * N);
    a->dwide_act = m->half ? take(r, 2 * N) : a->dwide;
    a->du_sum = c->fixed_point ? take(r, 2 * N) : NULL;
    a->dmod = take(r, blocks * B * 6 * D);
    a->dfinal_mod = take(r, B * 2 * D);
    real **gradients[] = {&a->dcond, &a->dcond_pp, &a->dcond_silu, &a->dcond_pp_silu, &a->dtime};
    for (int i = 0; i < 5; i++) *gradients[i] = take(r, B * D);
    a->stats = take(r, B * T * 2);
    a->dout = take(r, pixels * config_out_channels(c));
    a->muon = take(r, m->training == TRAIN_MUON ? 24 * D * D : 0);
    return arena.count;
}

// The arithmetic that --dtype asks for
static int compute_dtype(int dtype) { return dtype == COMPUTE_BF16 ? COMPUTE_BF16 : COMPUTE_FP32; }

// A model with room for `batch` pictures and, for training, `max_m` gradient iterations, for sampling Anderson
// acceleration over `window` (0: none). Its weights are zero. Refuses sizes beyond the machine's memory, naming the
// options that lower it.
static Model *model_create(const Config *config, int batch, int max_m, int recompute, int training, int window,
                           int dtype) {
    Model *m = (Model *)xcalloc(1, sizeof *m, "the model");
    m->config = *config;
    m->batch = batch;
    m->max_m = training ? max_m : 1;
    m->recompute = recompute;
    m->training = training;
    m->window = window;
    m->half = dtype == COMPUTE_BF16;
    int layers = config_blocks(config) + m->max_m;
    m->a.layer = (Layer *)xcalloc((size_t)layers + 1, sizeof *m->a.layer, "the model");
    m->labels = (int *)xcalloc((size_t)batch, sizeof *m->labels, "the model");
    ParamWalk w = params_point(&m->p, config, NULL, NULL);
    m->n_tensors = w.count;
    m->n_params = w.size;
    m->tensors = (ParamTensor *)xcalloc((size_t)w.count, sizeof *m->tensors, "the model");
    params_point(&m->p, config, NULL, m->tensors);
    size_t reals = activations_point(m, NULL);
    m->activation_bytes = reals * sizeof(real);
    double need = (double)m->activation_bytes +
                  (double)w.size * (sizeof(real) * (training ? 5 : 1) + (m->half ? sizeof(bf16) : 0));
    need += (double)params_largest(m->tensors, w.count) * sizeof(float);
    double fixed = need - (double)m->activation_bytes;
    const char *fewer = fixed > memory_limit() ? "take a smaller model"
                        : training             ? "lower --batch, set --micro_batch, or set --recompute 1"
                                               : "lower --batch";
    if ((double)batch * config_tokens(config) > 1 << 28) // ints count tokens
        die("%d pictures at a time have more than 268 million tokens: %s", batch, fewer);
    if (need > memory_limit())
        die("this model with %d pictures at a time needs %.0f MB, of which %.0f for weights%s; this process may use "
            "%.0f MB: %s",
            batch, need / 1e6, fixed / 1e6, training ? " and what training keeps of them" : "", memory_limit() / 1e6,
            fewer);
    for (int kind = 0; kind < (training ? 5 : 1); kind++)
        m->memory[kind] = xcalloc((size_t)w.size, sizeof(real), "weights, gradients and optimiser");
    if (m->half) m->half_weights = (bf16 *)xcalloc((size_t)w.size, sizeof(bf16), "weights");
    params_point(&m->p, config, m->memory[MODEL_WEIGHTS], NULL);
    if (training) params_point(&m->g, config, m->memory[MODEL_GRADS], NULL);
    m->activations = xcalloc(reals, sizeof(real), "activations");
    activations_point(m, m->activations);
    position_embedding(m->a.pos, config->image_size / config->patch, config->width);
    return m;
}

static void model_free(Model *m) {
    for (int kind = 0; kind < 5; kind++) xfree(m->memory[kind]);
    xfree(m->half_weights);
    xfree(m->activations);
    xfree(m->a.layer);
    xfree(m->labels);
    xfree(m->tensors);
    xfree(m);
}

// Copies parameters first..first+count-1 of one kind from or to the host's float memory. After new weights: model_use.
static void model_upload(Model *m, int kind, int64_t first, int64_t count, const float *host) {
    for (int64_t i = 0; i < count; i++) m->memory[kind][first + i] = (real)host[i];
}

static void model_download(const Model *m, int kind, int64_t first, int64_t count, float *host) {
    for (int64_t i = 0; i < count; i++) host[i] = (float)m->memory[kind][first + i];
}

// The weights that the forward pass uses: MODEL_WEIGHTS or, for pictures during training, MODEL_EMA
static void model_use(Model *m, int kind) {
    params_point(&m->p, &m->config, m->memory[kind], NULL);
    as_act(m->half, m->half_weights, m->memory[kind], (size_t)m->n_params);
}

// =====================================================================================================================
// Shared block 4 of 4. Part 5. Plumbing
// =====================================================================================================================

// ---------------------------------------------------------------------------------------------------------------------
// Data parallel, for many processors or GPUs: `mpirun -np R` starts R ranks, each with the whole model.
//
// Rank r has rows r·batch/R to (r+1)·batch/R - 1 of each batch. As every draw follows from (seed, index, step), they
// are the rows that one process would see, and n and m are the same on all ranks; once the gradients are summed, so is
// the update. Rank 0 alone prints, samples and writes. The loss differs from one process's by the rounding of one sum.

#ifndef MPI // one rank
static void ranks_open(void) {}
static void ranks_die(const char *line) { (void)line; }
static void ranks_reduce(Model *m, Step *did) { (void)m, (void)did; }
static int ranks_any(int yes) { return yes; }
static void ranks_same(const char *what, uint64_t hash) { (void)what, (void)hash; }
#else
static void ranks_close(void) { MPI_Finalize(); }

// Joins the other ranks. Those of a machine share its cores, unless mpirun gave each its own or OMP_NUM_THREADS is set.
static void ranks_open(void) {
    int level;
    MPI_Comm machine;
    MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &level);
    atexit(ranks_close);
    MPI_Comm_rank(MPI_COMM_WORLD, &ranks.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks.count);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine);
    MPI_Comm_rank(machine, &ranks.local);
    MPI_Comm_size(machine, &ranks.here);
    if (ranks.rank && !freopen("/dev/null", "w", stdout)) die("/dev/null: cannot open: %s", strerror(errno));
#ifdef _OPENMP
    cpu_set_t mine, all;
    sched_getaffinity(0, sizeof mine, &mine);
    MPI_Allreduce(&mine, &all, sizeof mine, MPI_BYTE, MPI_BOR, machine);
    int own = CPU_COUNT(&mine), share = CPU_COUNT(&all) / ranks.here;
    if (!getenv("OMP_NUM_THREADS")) omp_set_num_threads(share < 1 ? 1 : share < own ? share : own);
#endif
}

// How die ends: the first message ends all ranks, by a SIGTERM. What several find wrong at once only `speaker` tells:
// the others wait for that.
static void ranks_die(const char *line) {
    if (ranks.count == 1) return;
    if (ranks.rank != ranks.speaker && sleep(2 + 2 * (ranks.rank < 3 ? ranks.rank : 3))) _exit(1);
    fprintf(stderr, "error: rank %d of %d: %s\n", ranks.rank, ranks.count, line);
    MPI_Abort(MPI_COMM_WORLD, 1);
}

// Whether any rank says yes. Should that be the end, the first that does is to tell why.
static int ranks_any(int yes) {
    int first = yes ? ranks.rank : ranks.count;
    MPI_Allreduce(MPI_IN_PLACE, &first, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    ranks.speaker = first % ranks.count;
    return first < ranks.count;
}

static void ranks_reduce(Model *m, Step *did) {
    double loss[2] = {did->mse, did->vb};
    ranks_any(!isfinite(did->mse + did->vb + model_gradient_norm(m)));
    MPI_Allreduce(MPI_IN_PLACE, loss, 2, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
    did->mse = loss[0];
    did->vb = loss[1];
    model_reduce(m);
}

// Ends all ranks if one has another `what` than rank 0.
static void ranks_same(const char *what, uint64_t hash) {
    uint64_t wanted = hash;
    MPI_Bcast(&wanted, 1, MPI_UINT64_T, 0, MPI_COMM_WORLD);
    if (ranks_any(hash != wanted)) die("this rank has %s than rank 0; all need the same", what);
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Errors, memory, time, files that appear whole or not at all

static char temp_path[PATH_MAX], temp_target[PATH_MAX]; // of the file that is being written; "" when there is none
static int passing_line;                                // the terminal shows a line that the next one goes over
static int terminal;                                    // whether standard output is one

static void end_passing(void) {
    if (passing_line) fputs("\r\x1b[K", stdout);
    passing_line = 0;
    fflush(stdout);
}

// A line on standard output. On a terminal the next one goes over it if it is `passing`.
__attribute__((format(printf, 2, 3))) static void say(int passing, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    end_passing();
    vprintf(fmt, args);
    va_end(args);
    passing_line = passing && terminal;
    if (!passing_line) putchar('\n');
    fflush(stdout);
}

// Masked, because names that come out of files are printed and a message must stay one line: control characters, also
// those beyond ASCII, and U+2000 to U+207F, some of which turn the text around.
static void die(const char *fmt, ...) {
    char line[2048], masked = 1;
    va_list args;
    va_start(args, fmt);
    vsnprintf(line, sizeof line, fmt, args);
    va_end(args);
    for (unsigned char *c = (unsigned char *)line; *c; c++) {
        if (*c >> 6 != 2) masked = *c < 0x80 || (*c == 0xC2 && c[1] < 0xA0) || (*c == 0xE2 && c[1] < 0x82);
        if (iscntrl(*c) || (*c >= 0x80 && masked)) *c = '?';
    }
    if (*temp_path) unlink(temp_path);
    end_passing();
#pragma omp critical(die) // one line, even when several threads find something wrong
    {
        ranks_die(line);
        fprintf(stderr, "error: %s\n", line);
        exit(1);
    }
}

// Zeroed memory, aligned to 64 bytes (a cache line, the widest vector). calloc gets large blocks as pages that are zero
// when first touched, so clearing them takes no time. xfree finds calloc's own pointer in the word before.
static void *xcalloc(size_t count, size_t size, const char *what) {
    char *block = size == 0 || count <= (SIZE_MAX - 128) / size ? (char *)calloc(1, count * size + 128) : NULL;
    if (!block)
        die("no memory for %s: %.0f MB; ask for less, or close other programs", what,
            (double)count * (double)size / 1e6);
    void **p = (void **)(((uintptr_t)block + 127) & ~(uintptr_t)63);
    p[-1] = block;
    return p;
}

static void xfree(void *p) {
    if (p) free(((void **)p)[-1]);
}

static char *xstrdup(const char *text) {
    char *copy = strdup(text);
    if (!copy) die("no memory for %zu bytes of text; close other programs", strlen(text));
    return copy;
}

// Makes room for element n of an array that grows one by one from NULL; the capacity is the power of two above n.
static void *grow(void *array, size_t n, size_t size) {
    if (n & (n - 1)) return array;
    void *p = n <= SIZE_MAX / 2 / size ? realloc(array, (n ? 2 * n : 1) * size) : NULL;
    if (!p) die("no memory for a list of %zu entries; close other programs", n);
    return p;
}

// Milliseconds since some moment in the past, unaffected by changes of the clock.
static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

// The least of the machine's memory and what the process's limits and control groups, both versions, leave of it
static double memory_limit(void) {
    double have = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGE_SIZE), limit;
    char line[PATH_MAX], path[PATH_MAX + 64];
    struct rlimit space;
    if (getrlimit(RLIMIT_AS, &space) == 0) have = fmin(have, (double)space.rlim_cur);
    FILE *groups = fopen("/proc/self/cgroup", "r");
    while (groups && fgets(line, sizeof line, groups)) { // number:controllers:/path
        char *group = strchr(line, '/'), *memory = strstr(line, ":memory:");
        if (!group || !(memory || strstr(line, "::"))) continue;
        *strchrnul(line, '\n') = 0;
        for (;; *strrchr(group, '/') = 0) { // the group, and those that it is in
            snprintf(path, sizeof path, "/sys/fs/cgroup%s%s/memory.%s", memory ? "/memory" : "", group,
                     memory ? "limit_in_bytes" : "max");
            FILE *file = fopen(path, "r");
            if (file && fscanf(file, "%lf", &limit) == 1) have = fmin(have, limit); // or it says "max"
            if (file) fclose(file);
            if (!*group) break;
        }
    }
    if (groups) fclose(groups);
    return have / ranks.here;
}

static double pause_ms(void) { return terminal ? 2000 : 10000; } // between two lines about how far the program is

static const char *minutes(double ms) {
    static char text[32];
    snprintf(text, sizeof text, "%.0f:%02.0f", floor(ms / 60000), floor(fmod(ms / 1000, 60)));
    return text;
}

// How far the task in hand is; what is quick stays silent.
static struct {
    const char *what;
    int64_t done, total;
    double begun, shown;
} task;
static void progress_begin(const char *what, int64_t total) {
    task.what = what;
    task.done = 0;
    task.total = total;
    task.begun = task.shown = now_ms();
}
static void progress(int64_t more) {
    double now = now_ms();
    task.done += more;
    if (task.done >= task.total || now - task.shown < pause_ms()) return;
    task.shown = now;
    say(1, "%s: %.0f %%, %s left", task.what, 100.0 * (double)task.done / (double)task.total,
        minutes((now - task.begun) * (double)(task.total - task.done) / (double)task.done));
}

// A full disk behind standard output must not pass unnoticed.
static void check_output(void) {
    if (fflush(stdout) || ferror(stdout)) die("standard output: cannot write");
}

// A file is written under a temporary name beside its target, synced, then renamed: whoever opens the target finds the
// old file or the new one, never half of one, and a full disk or a crash costs nothing that existed before.

// Ends the program after a failed write; errno says why.
__attribute__((noreturn)) static void fail_temp(const char *path) {
    die("%s: cannot write: %s; check the folder, its permissions and the free space", path, strerror(errno));
}

// Starts the file, one at a time, that commit_temp puts in place, with the permissions of the one before. A link is
// followed; a device or a folder is refused: the rename would replace it.
static FILE *open_temp(const char *path) {
    struct stat info;
    mode_t mask = umask(0), mode = 0666 & ~mask;
    umask(mask);
    if (stat(path, &info) == 0) {
        if (!S_ISREG(info.st_mode)) die("%s: is not a regular file; use another name", path);
        if (access(path, W_OK)) fail_temp(path);
        mode = info.st_mode & 0777;
    } else if (lstat(path, &info) == 0) {
        die("%s: is a link that leads to no file: %s; make that file, or remove the link", path, strerror(errno));
    }
    if (!realpath(path, temp_target)) snprintf(temp_target, sizeof temp_target, "%s", path);
    char name[2 * PATH_MAX];
    unsigned number = (unsigned)getpid() + (unsigned)(uint64_t)(1e3 * now_ms());
    int fd;
    do {
        snprintf(name, sizeof name, "%s.%06x.tmp", temp_target, number++ & 0xFFFFFF);
        if (strlen(path) >= PATH_MAX || strlen(name) >= PATH_MAX)
            die("%.200s...: this path is too long; use a shorter one", path);
        memcpy(temp_path + 1, name + 1, sizeof temp_path - 1);
        __asm__ volatile("" ::: "memory");
        *temp_path = *name; // last, and before there is a file: on_kill may look at any moment
        if ((fd = open(name, O_RDWR | O_CREAT | O_EXCL, 0600)) < 0) *temp_path = 0;
    } while (fd < 0 && errno == EEXIST);
    if (fd < 0) fail_temp(path);
    fchmod(fd, mode);
    FILE *file = fdopen(fd, "wb");
    if (!file) fail_temp(path);
    return file;
}

// Closes the file and gives it its name, unless anything went wrong since it was opened.
static void commit_temp(FILE *file, const char *path) {
    if (ferror(file) || fflush(file) || fsync(fileno(file)) || fclose(file) || rename(temp_path, temp_target))
        fail_temp(path);
    *temp_path = 0;
}

// Ends the program, before its work rather than after it, if this file cannot be written, or would replace `input`.
static void check_writable(const char *path, const char *input) {
    struct stat a, b;
    if (stat(path, &a) == 0 && stat(input, &b) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino)
        die("%s: is what the program reads; give another name to what it writes", path);
    fclose(open_temp(path));
    unlink(temp_path);
    *temp_path = 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). There is no
// generator state, so any number of threads, either program and a resumed run see the same numbers.

// Ten rounds over the counter; the key advances by the golden ratio and sqrt(3)-1 between rounds.
static void philox4x32(uint32_t counter[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)counter[0] * 0xD2511F53u, b = (uint64_t)counter[2] * 0xCD9E8D57u;
        counter[0] = (uint32_t)(b >> 32) ^ counter[1] ^ key0;
        counter[2] = (uint32_t)(a >> 32) ^ counter[3] ^ key1;
        counter[1] = (uint32_t)b;
        counter[3] = (uint32_t)a;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// Four random words. `step` is the training step, but in STREAM_INIT the tensor's number, in STREAM_DATA
// the epoch (of `shapes` the picture), in STREAM_XT the picture, in STREAM_Z picture·1000 + position in the schedule.
static void philox(uint32_t out[4], uint64_t seed, uint32_t index, uint32_t step, uint32_t stream) {
    out[0] = index;
    out[1] = step;
    out[2] = stream;
    out[3] = 0;
    philox4x32(out, (uint32_t)seed, (uint32_t)(seed >> 32));
}

// A word as a number in the open interval (0, 1): log(u) is finite.
static double rng_uniform(uint32_t word) { return (word + 0.5) / 4294967296; }

// A word as an integer 0..n-1.
static uint32_t rng_below(uint32_t word, uint32_t n) { return (uint32_t)(((uint64_t)word * n) >> 32); }

// out[i] = standard normal number `first + i` of a draw; one Philox call gives four, by Box-Muller in double precision.
static void rng_normal(float *out, size_t count, size_t first, uint64_t seed, uint32_t step, uint32_t stream) {
    if (count == 0) return;
#pragma omp parallel for schedule(static)
    for (size_t call = first / 4; call <= (first + count - 1) / 4; call++) {
        uint32_t word[4];
        philox(word, seed, (uint32_t)call, step, stream);
        for (size_t pair = 0; pair < 4; pair += 2) {
            double r = sqrt(-2 * log(rng_uniform(word[pair])));
            double angle = 6.283185307179586477 * rng_uniform(word[pair + 1]);
            size_t e = 4 * call + pair;
            if (e >= first && e < first + count) out[e - first] = (float)(r * cos(angle));
            if (e + 1 >= first && e + 1 < first + count) out[e + 1 - first] = (float)(r * sin(angle));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// safetensors: 8-byte little-endian header length, JSON header, raw little-endian tensors
//
// {"__metadata__": {"key": "value", ...}, "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
// Offsets count from the end of the header; the tensors must cover the rest of the file without holes or overlap.
// https://github.com/huggingface/safetensors#format. A file may come from anywhere: nothing in it is trusted.

enum Dtype { F32, F16, BF16, I64, U8, N_DTYPES }; // those that this program reads or writes
static const char *const dtype_names[N_DTYPES] = {"F32", "F16", "BF16", "I64", "U8"};
static const size_t dtype_sizes[N_DTYPES] = {4, 2, 2, 8, 1};

enum { MAX_DIMS = 8, MAX_HEADER = 100000000 };
#define ST_DAMAGED "damaged: make or copy it again"

typedef struct {
    const char *name;
    int dtype, ndim;
    int64_t shape[MAX_DIMS];
    int64_t count;    // elements
    size_t bytes;     // count * element size
    const void *data; // row-major; in an opened file it points into the read-only map and may be unaligned
} Tensor;

typedef struct {
    const char *key, *value;
} Meta;

typedef struct SafeTensors {
    struct SafeTensors *next; // of those that are open
    char *path, *header;      // header: a copy, into which names, keys and values point
    unsigned char *map;
    size_t size;
    Tensor *tensors; // sorted by name
    int n_tensors;
    Meta *meta; // sorted by key
    int n_meta;
} SafeTensors;
static SafeTensors *open_files;

// A bf16 is the upper half of a float.
static float bf16_to_float(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// Rounds to nearest, ties to even; a NaN stays a NaN (rounding its bits could carry into an infinity).
static uint16_t float_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// IEEE half precision: 5 bits of exponent (bias 15), 10 of mantissa.
static float f16_to_float(uint16_t h) {
    int exponent = h >> 10 & 31, mantissa = h & 0x3ff;
    float x = exponent ? ldexpf((float)(1024 + mantissa), exponent - 25) : ldexpf((float)mantissa, -24);
    if (exponent == 31) x = mantissa ? NAN : INFINITY;
    return h >> 15 ? -x : x;
}

// The place of a word in a list like "eps|v|flow", which may be followed by a colon and more text; else -1.
static int choice_index(const char *choices, const char *word) {
    size_t length = strlen(word);
    for (int index = 0;; index++) {
        if (strcspn(choices, "|:") == length && !strncmp(choices, word, length)) return index;
        choices += strcspn(choices, "|:");
        if (*choices++ != '|') return -1;
    }
}

// The part of JSON that the format uses: objects, lists, strings and whole numbers, read by position without recursion.
// The text is writable and ends with a 0: strings are decoded where they stand.
typedef struct {
    const char *path, *tensor; // named in errors; tensor is NULL outside of a tensor's entry
    char *start, *p, *end;
} Json;

__attribute__((noreturn)) static void json_fail(const Json *j, const char *why) {
    char name[250] = "";
    if (j->tensor) snprintf(name, sizeof name, "tensor %.200s: ", j->tensor);
    die("%s: %s%s (byte %td of the JSON text); the file is damaged, or has JSON that this program does not read",
        j->path, name, why, j->p - j->start);
}

// Skips white space, then takes `c` if it comes next.
static int json_accept(Json *j, char c) {
    j->p += strspn(j->p, " \n\t\r");
    if (*j->p != c) return 0;
    j->p++;
    return 1;
}

// Takes `c`, which must come next.
static void json_expect(Json *j, char c) {
    char why[] = "expected 'c'";
    why[10] = c;
    if (!json_accept(j, c)) json_fail(j, why);
}

// Whether element n of a list or object follows, or `close`, which ends it. Takes the comma, or `close`.
static int json_more(Json *j, int n, char close) {
    if (n ? json_accept(j, ',') : !json_accept(j, close)) return 1;
    if (n) json_expect(j, close);
    return 0;
}

// The four hexadecimal digits after \u, of which j->p is at the u
static unsigned json_hex(Json *j) {
    char digits[5] = "";
    if (strspn(++j->p, "0123456789abcdefABCDEF") < 4) json_fail(j, "\\u needs four hexadecimal digits");
    memcpy(digits, j->p, 4);
    j->p += 4;
    return (unsigned)strtoul(digits, NULL, 16);
}

// Reads a string; bytes beyond ASCII pass as they are. Decoding its escapes never makes it longer, and its end takes
// the place of the closing quote or stands before it.
static char *json_string(Json *j) {
    json_expect(j, '"');
    char *text = j->p, *out = text;
    while (*j->p != '"') {
        unsigned code = (unsigned char)*j->p++;
        if (code < ' ') json_fail(j, j->p > j->end ? "a string does not end" : "a control character in a string");
        if (code == '\\' && *j->p == 'u') {
            code = json_hex(j);
            if (code >> 10 == 0xD800 >> 10 && j->p[0] == '\\' && j->p[1] == 'u') { // one character in two halves
                j->p++;
                unsigned low = json_hex(j);
                code = low >> 10 == 0xDC00 >> 10 ? 0x10000 + ((code & 0x3ff) << 10 | (low & 0x3ff)) : 0;
            }
            if (code == 0 || code >> 11 == 0xD800 >> 11) json_fail(j, "\\u0000 or half a surrogate pair in a string");
            if (code > 0xffff) *out++ = (char)(0xF0 | code >> 18);
            if (code > 0x7ff) *out++ = (char)(code > 0xffff ? 0x80 | (code >> 12 & 0x3f) : 0xE0 | code >> 12);
            if (code > 0x7f) *out++ = (char)(code > 0x7ff ? 0x80 | (code >> 6 & 0x3f) : 0xC0 | code >> 6);
            if (code > 0x7f) code = 0x80 | (code & 0x3f);
        } else if (code == '\\') {
            static const char names[] = "\"\\/bfnrt", mean[] = "\"\\/\b\f\n\r\t";
            const char *at = *j->p ? strchr(names, *j->p++) : NULL;
            if (!at) json_fail(j, "unknown escape in a string");
            code = (unsigned char)mean[at - names];
        }
        *out++ = (char)code;
    }
    j->p++;
    *out = 0;
    return text;
}

// Reads a list of at most `room` whole numbers from 0 to 2^63 - 1; returns how many there are.
static int json_integers(Json *j, int64_t *values, int room) {
    int n = 0;
    json_expect(j, '[');
    for (; json_more(j, n, ']'); n++) {
        if (n == room) json_fail(j, "a list is too long");
        j->p += strspn(j->p, " \n\t\r");
        if (!isdigit((unsigned char)*j->p)) json_fail(j, "expected a whole number from 0");
        errno = 0;
        values[n] = strtoll(j->p, &j->p, 10);
        if (errno) json_fail(j, "a number is too large");
    }
    return n;
}

// Reads one {"dtype", "shape", "data_offsets"} and checks it against itself and against the `room` bytes of data.
static void json_tensor(Json *j, Tensor *t, const unsigned char *data, size_t room) {
    int64_t offsets[2] = {0, 0};
    int seen = 0;
    json_expect(j, '{');
    do {
        int field = choice_index("dtype|shape|data_offsets", json_string(j));
        if (field < 0 || seen >> field & 1) json_fail(j, "a key is unknown or stands there twice");
        seen |= 1 << field;
        json_expect(j, ':');
        if (field == 0) {
            const char *dtype = json_string(j);
            for (t->dtype = 0; t->dtype < N_DTYPES && strcmp(dtype, dtype_names[t->dtype]);) t->dtype++;
            if (t->dtype == N_DTYPES)
                die("%s: tensor %.200s: unknown dtype %.40s; convert it to F32, F16, BF16, I64 or U8", j->path, t->name,
                    dtype);
        } else if (field == 1) {
            t->ndim = json_integers(j, t->shape, MAX_DIMS);
        } else if (json_integers(j, offsets, 2) != 2) {
            json_fail(j, "data_offsets must be two numbers");
        }
    } while (json_accept(j, ','));
    json_expect(j, '}');
    if (seen != 7) json_fail(j, "dtype, shape or data_offsets is missing");
    t->count = 1;
    for (int i = 0; i < t->ndim; i++) {
        if (t->shape[i] && t->count > INT64_MAX / 8 / t->shape[i]) json_fail(j, "its shape is too large");
        t->count *= t->shape[i];
    }
    t->bytes = (size_t)t->count * dtype_sizes[t->dtype];
    if (offsets[0] > offsets[1]) json_fail(j, "its data ends before it begins");
    if ((size_t)offsets[1] > room) json_fail(j, "its data lies beyond the end of the file");
    if (t->bytes != (size_t)(offsets[1] - offsets[0]))
        json_fail(j, "its shape and dtype do not fit its number of bytes");
    t->data = data + offsets[0];
}

// Orders both lists: a Tensor and a Meta begin with their name.
static int by_name(const void *a, const void *b) { return strcmp(*(const char *const *)a, *(const char *const *)b); }

// By place in the file; an empty tensor comes before the one that begins where it stands.
static int by_place(const void *a, const void *b) {
    const Tensor *s = (const Tensor *)a, *t = (const Tensor *)b;
    if (s->data != t->data) return (const char *)s->data < (const char *)t->data ? -1 : 1;
    return (s->bytes > t->bytes) - (s->bytes < t->bytes);
}

// A tensor by name, NULL if the file does not have it.
static const Tensor *st_find(const SafeTensors *f, const char *name) {
    return (const Tensor *)bsearch(&name, f->tensors, (size_t)f->n_tensors, sizeof *f->tensors, by_name);
}

// The value of a metadata key, NULL if the file does not have it.
static const char *st_meta(const SafeTensors *f, const char *key) {
    const Meta *m = (const Meta *)bsearch(&key, f->meta, (size_t)f->n_meta, sizeof *f->meta, by_name);
    return m ? m->value : NULL;
}

// Sorts tensors or metadata by name for bsearch, which also brings a name that stands there twice to light.
static void sort_by_name(const SafeTensors *f, void *list, int n, size_t size) {
    qsort(list, (size_t)n, size, by_name);
    for (const char *entry = (const char *)list; n > 1; n--, entry += size)
        if (!by_name(entry, entry + size))
            die("%s: the name %.200s stands there twice; the file is " ST_DAMAGED, f->path,
                *(const char *const *)entry);
}

// The tensors must cover the bytes from `data` to the end of the file, each byte once.
static void check_cover(const SafeTensors *f, const unsigned char *data) {
    qsort(f->tensors, (size_t)f->n_tensors, sizeof *f->tensors, by_place);
    for (int i = 0; i < f->n_tensors; i++) {
        const Tensor *t = &f->tensors[i];
        const char *why = t->data < (const void *)data ? "shares bytes with another tensor" : "a gap lies before it";
        if (t->data != data) die("%s: tensor %.200s: %s; the file is " ST_DAMAGED, f->path, t->name, why);
        data += t->bytes;
    }
    if (data != f->map + f->size) die("%s: bytes follow the last tensor; the file is " ST_DAMAGED, f->path);
}

// Maps a file and reads its header. Whatever is wrong with it ends the program with the reason.
static void st_open(SafeTensors *f, const char *path) {
    memset(f, 0, sizeof *f);
    struct stat info;
    int fd = open(path, O_RDONLY | O_NONBLOCK), metadata = 0; // a FIFO must not make the program wait
    if (fd < 0 || fstat(fd, &info)) die("%s: cannot open: %s; check the path", path, strerror(errno));
    if (S_ISDIR(info.st_mode))
        die("%s: is not a file but a folder; of a run give its weights.safetensors; pictures become a dataset by: "
            "python3 tools/data.py folder %s --out FILE.safetensors",
            path, path);
    if (!S_ISREG(info.st_mode)) die("%s: is not a file; give the path of a .safetensors file", path);
    f->size = (size_t)info.st_size;
    if (f->size < 8) die("%s: is only %zu bytes long; the file is " ST_DAMAGED, path, f->size);
    f->map = (unsigned char *)mmap(NULL, f->size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (f->map == MAP_FAILED) die("%s: cannot map: %s; copy it to a local disk", path, strerror(errno));
    close(fd);
    f->path = xstrdup(path);
    f->next = open_files;
    open_files = f;
    f->tensors = (Tensor *)grow(NULL, 0, sizeof *f->tensors);
    f->meta = (Meta *)grow(NULL, 0, sizeof *f->meta);

    uint64_t length;
    memcpy(&length, f->map, 8);
    if (length > MAX_HEADER || length > f->size - 8)
        die("%s: no header can be %.0f bytes long; this is no safetensors file, or it is " ST_DAMAGED, path,
            (double)length);
    f->header = (char *)xcalloc(length + 1, 1, "a header");
    memcpy(f->header, f->map + 8, length);
    const unsigned char *data = f->map + 8 + length;
    Json j = {path, NULL, f->header, f->header, f->header + length};
    if (*f->header != '{') json_fail(&j, "no header");
    json_expect(&j, '{');
    for (int n = 0; json_more(&j, n, '}'); n++) {
        char *name = json_string(&j);
        json_expect(&j, ':');
        if (strcmp(name, "__metadata__")) {
            f->tensors = (Tensor *)grow(f->tensors, (size_t)f->n_tensors, sizeof *f->tensors);
            Tensor *t = &f->tensors[f->n_tensors++];
            t->name = j.tensor = name;
            json_tensor(&j, t, data, f->size - 8 - length);
            j.tensor = NULL;
            continue;
        }
        if (metadata++) json_fail(&j, "__metadata__ is there twice");
        json_expect(&j, '{');
        for (; json_more(&j, f->n_meta, '}'); f->n_meta++) {
            f->meta = (Meta *)grow(f->meta, (size_t)f->n_meta, sizeof *f->meta);
            f->meta[f->n_meta].key = json_string(&j);
            json_expect(&j, ':');
            f->meta[f->n_meta].value = json_string(&j);
        }
    }
    if (!json_accept(&j, 0) || j.p <= j.end) json_fail(&j, "text follows the header");
    check_cover(f, data);
    sort_by_name(f, f->tensors, f->n_tensors, sizeof *f->tensors);
    sort_by_name(f, f->meta, f->n_meta, sizeof *f->meta);
}

// SIGBUS: a file that is mapped became shorter. It comes out of an ordinary read, so die is safe here.
static void on_bus(int number, siginfo_t *info, void *context) {
    (void)context;
    for (const SafeTensors *f = open_files; f; f = f->next)
        if ((size_t)((unsigned char *)info->si_addr - f->map) < f->size)
            die("%s: became shorter while it was read; it is " ST_DAMAGED, f->path);
    signal(number, SIG_DFL);
}

// Releases everything; tensors and strings of the file must not be used any more.
static void st_close(SafeTensors *f) {
    SafeTensors **link = &open_files;
    while (*link != f) link = &(*link)->next;
    *link = f->next;
    xfree(f->header);
    free(f->tensors);
    free(f->meta);
    free(f->path);
    munmap(f->map, f->size);
    memset(f, 0, sizeof *f);
}

// out[0..count-1] = the tensor as floats.
static void st_to_float(const SafeTensors *f, const Tensor *t, float *out) {
    const unsigned char *data = (const unsigned char *)t->data;
    if (t->dtype != F32 && t->dtype != F16 && t->dtype != BF16)
        die("%s: tensor %.200s: is %s; convert it to F32, F16 or BF16", f->path, t->name, dtype_names[t->dtype]);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < t->count; i++) {
        uint16_t half;
        if (t->dtype == F32) {
            memcpy(out + i, data + 4 * i, 4);
        } else {
            memcpy(&half, data + 2 * i, 2);
            out[i] = t->dtype == F16 ? f16_to_float(half) : bf16_to_float(half);
        }
    }
}

// A tensor to be saved; pass 1 for the dimensions beyond ndim.
static Tensor st_tensor(const char *name, int dtype, const void *data, int ndim, int64_t a, int64_t b, int64_t c,
                        int64_t d) {
    int64_t count = a * b * c * d;
    Tensor t = {name, dtype, ndim, {a, b, c, d}, count, (size_t)count * dtype_sizes[dtype], data};
    return t;
}

// Appends text as a JSON string; returns the end.
static char *json_append(char *out, const char *text) {
    *out++ = '"';
    for (const unsigned char *c = (const unsigned char *)text; *c; c++)
        out += sprintf(out, *c < 32 ? "\\u%04x" : *c == '"' || *c == '\\' ? "\\%c" : "%c", *c);
    *out++ = '"';
    return out;
}

// Starts a file: its header. The data of the tensors must follow, in their order; if those of larger elements come
// first, every one is aligned to its element when mapped. Metadata whose value is NULL is left out.
static FILE *st_begin(const char *path, const Tensor *tensors, int n, const Meta *meta, int n_meta) {
    size_t room = 64, offset = 0; // of text, where each byte may take six
    for (int i = 0; i < n_meta; i++)
        room += 6 * strlen(meta[i].key) + (meta[i].value ? 6 * strlen(meta[i].value) : 0) + 8;
    for (int i = 0; i < n; i++) room += 6 * strlen(tensors[i].name) + 24 * MAX_DIMS + 128;
    char *header = (char *)xcalloc(room, 1, "a header"), *end = header + sprintf(header, "{\"__metadata__\":{");
    for (int i = 0; i < n_meta; i++) {
        if (!meta[i].value) continue;
        if (end[-1] != '{') *end++ = ',';
        end = json_append(end, meta[i].key);
        *end++ = ':';
        end = json_append(end, meta[i].value);
    }
    *end++ = '}';
    for (const Tensor *t = tensors; t < tensors + n; t++) {
        *end++ = ',';
        end = json_append(end, t->name);
        end += sprintf(end, ":{\"dtype\":\"%s\",\"shape\":[", dtype_names[t->dtype]);
        for (int d = 0; d < t->ndim; d++) end += sprintf(end, "%s%lld", d ? "," : "", (long long)t->shape[d]);
        end += sprintf(end, "],\"data_offsets\":[%zu,%zu]}", offset, offset + t->bytes);
        offset += t->bytes;
    }
    *end++ = '}';
    while ((end - header) % 8) *end++ = ' ';
    uint64_t length = (uint64_t)(end - header);
    FILE *file = open_temp(path);
    fwrite(&length, 8, 1, file);
    fwrite(header, 1, length, file);
    xfree(header);
    return file;
}

static void st_save(const char *path, const Tensor *tensors, int n, const Meta *meta, int n_meta) {
    FILE *file = st_begin(path, tensors, n, meta, n_meta);
    for (int i = 0; i < n; i++) fwrite(tensors[i].data, 1, tensors[i].bytes, file);
    commit_temp(file, path);
}

// The metadata value `class_names` of a file, a JSON list of strings, as an array; NULL if json is NULL or the list is
// empty.
static const char **parse_class_names(const char *path, const char *json, int *count) {
    const char **names = NULL;
    *count = 0;
    if (!json) return NULL;
    char *text = xstrdup(json), where[PATH_MAX + 32];
    snprintf(where, sizeof where, "%s: metadata class_names", path);
    Json j = {where, NULL, text, text, text + strlen(text)};
    json_expect(&j, '[');
    for (; json_more(&j, *count, ']'); ++*count) {
        names = (const char **)grow(names, (size_t)*count, sizeof *names);
        names[*count] = xstrdup(json_string(&j));
    }
    if (!json_accept(&j, 0)) json_fail(&j, "text follows the list");
    free(text);
    return names;
}

// ---------------------------------------------------------------------------------------------------------------------
// Options: one table describes every option once. The command line, --help, the metadata of weight files and the
// settings of a training state are all read and written through it.

enum { OPT_INT, OPT_SEED, OPT_REAL, OPT_TEXT, OPT_FLAG, OPT_RANGE, OPT_CHOICE };
// Where an option is used. WEIGHTS: metadata of weight files; STATE: only in a training state; ONCE: never there.
// ADDED: newer than the first files; a file without it means the default, but of a flag 0, of optimizer adamw.
enum { TRAIN = 1, SAMPLE = 2, BENCH = 4, WEIGHTS = 8, STATE = 16, ONCE = 32, ADDED = 64 };
enum { MODEL = TRAIN | BENCH | WEIGHTS };

typedef struct {
    const char *name;
    int use, type;
    size_t offset;       // of the value inside Options
    const char *initial; // default, as text
    double lo, hi;       // smallest and largest value accepted
    const char *help;    // of an OPT_CHOICE: the words in the order of its enum, between '|', then a colon and the rest
} Option;

#define AT(field) offsetof(Options, field)

static const Option option_table[] = {
    {"", 0, 0, 0, "", 0, 0, "Model"},
    {"image_size", MODEL, OPT_INT, AT(model.image_size), "24", 1, 4096, "height and width of the pictures of 'shapes'"},
    {"model", TRAIN | BENCH, OPT_TEXT, AT(model_name), "", 0, 0,
     "S/2 to XL/8: sets width, heads, depth, patch and the paper's training: n, m, timestep_in_pre_post, t_sampling, "
     "AdamW, lr, lr_schedule, ema; no skip, warm-up of lr or ema, clip; it wants many more --steps"},
    {"width", MODEL, OPT_INT, AT(model.width), "128", 8, 16384,
     "D, channels of a token; a multiple of 4, on a GPU of 8"},
    {"heads", MODEL, OPT_INT, AT(model.heads), "4", 1, 1024, "attention heads; width / heads is the head size"},
    {"depth", MODEL, OPT_INT, AT(model.depth), "8", 1, 64, "DiT: blocks; fixed point: default iterations + pre + post"},
    {"patch", MODEL, OPT_INT, AT(model.patch), "4", 1, 64, "side of a patch in pixels"},
    {"fixed_point", MODEL, OPT_FLAG, AT(model.fixed_point), "1", 0, 1, "1: one block is iterated; 0: plain DiT"},
    {"pre_depth", MODEL, OPT_INT, AT(model.pre_depth), "1", 0, 32, "blocks before the fixed point"},
    {"post_depth", MODEL, OPT_INT, AT(model.post_depth), "1", 0, 32, "blocks after it"},
    {"timestep_in_pre_post", MODEL, OPT_FLAG, AT(model.timestep_in_pre_post), "1", 0, 1,
     "1: pre, post and final layers see the timestep too"},
    {"skip", MODEL | ADDED, OPT_FLAG, AT(model.skip), "1", 0, 1,
     "1: a skip connection around the fixed point; 0: none, as in the paper"},
    {"learn_sigma", MODEL, OPT_FLAG, AT(model.learn_sigma), "0", 0, 1, "1: predict the variance too (eps and v)"},
    {"channels", BENCH | WEIGHTS, OPT_INT, AT(model.channels), "3", 1, 1024, "channels of a picture"},
    {"classes", BENCH | WEIGHTS, OPT_INT, AT(model.classes), "10", 0, 1e6, "number of labels"},
    {"mlp_ratio", WEIGHTS, OPT_INT, AT(model.mlp_ratio), "4", 4, 4, ""},
    {"diffusion_steps", WEIGHTS, OPT_INT, AT(model.diffusion_steps), "1000", 1000, 1000, ""},
    {"", 0, 0, 0, "", 0, 0, "Data"},
    {"data", TRAIN, OPT_TEXT, AT(data), "shapes", 0, 0, "dataset (safetensors), or 'shapes': drawn by the program"},
    {"export", TRAIN | ONCE, OPT_TEXT, AT(export_to), "", 0, 0,
     "only write the pictures of all batches into this dataset file"},
    {"hflip", TRAIN, OPT_FLAG, AT(hflip), "0", 0, 1, "1: mirror half of the pictures"},
    {"label_drop", TRAIN, OPT_REAL, AT(label_drop), "0.1", 0, 1, "probability that a label becomes 'no label'"},
    {"", 0, 0, 0, "", 0, 0, "Diffusion and training"},
    {"prediction", TRAIN | WEIGHTS, OPT_CHOICE, AT(model.prediction), "flow", 0, 0,
     "eps|v|flow|x: what is predicted; x: the picture, trained and sampled as flow"},
    {"zero_terminal_snr", TRAIN | WEIGHTS, OPT_FLAG, AT(model.zero_terminal_snr), "0", 0, 1,
     "1: with v, the last timestep is pure noise; for flow and x it is anyway: flow ignores this"},
    {"v_weight", TRAIN | WEIGHTS, OPT_CHOICE, AT(model.v_weight), "1", 0, 0,
     "1|p2: weight of the v loss; p2: alpha_bar·sqrt(1 - alpha_bar)"},
    {"time_embedding", TRAIN | WEIGHTS | ADDED, OPT_CHOICE, AT(model.time_embedding), "dit", 0, 0,
     "dit|sit|diffusers: what the network sees of t, as those models have it"},
    {"no_grad_iters", TRAIN, OPT_RANGE, AT(no_grad_iters), "0,1", 0, 1000, "range of n: iterations without gradient"},
    {"grad_iters", TRAIN, OPT_RANGE, AT(grad_iters), "1,2", 1, 1000, "range of m: iterations with gradient"},
    {"steps", TRAIN, OPT_INT, AT(steps), "6300", 1, 2e9, "training steps"},
    {"batch", TRAIN, OPT_INT, AT(batch), "32", 1, 1 << 20, "pictures per step"},
    {"batch", BENCH, OPT_INT, AT(batch), "64", 1, 1 << 20, "pictures per step"},
    {"micro_batch", TRAIN, OPT_INT, AT(micro_batch), "0", 0, 1 << 20, "pictures at a time; gradients add up; 0: all"},
    {"optimizer", TRAIN | ADDED, OPT_CHOICE, AT(optimizer), "muon", 0, 0,
     "adamw|muon: muon makes the updates of the blocks' matrices orthogonal: as far in half the steps"},
    {"lr", TRAIN, OPT_REAL, AT(lr), "4e-3", 0, 10, "learning rate"},
    {"warmup", TRAIN, OPT_INT, AT(warmup), "200", 0, 2e9, "steps of linear warm-up"},
    {"lr_schedule", TRAIN, OPT_CHOICE, AT(lr_schedule), "linear", 0, 0,
     "constant|linear|cosine: the fall of lr after the warm-up, to zero at steps"},
    {"t_sampling", TRAIN, OPT_CHOICE, AT(t_sampling), "logit_normal", 0, 0,
     "uniform|logit_normal: timesteps trained on; logit_normal: t/1000 = sigmoid(t_mean + t_std g), g normal"},
    {"t_mean", TRAIN, OPT_REAL, AT(t_mean), "0", -20, 20, "logit_normal: mean; above 0: more noise"},
    {"t_std", TRAIN, OPT_REAL, AT(t_std), "1", 0, 20, "logit_normal: standard deviation"},
    {"weight_decay", TRAIN, OPT_REAL, AT(weight_decay), "0", 0, 10, "decay of the weights, times lr at each step"},
    {"grad_clip", TRAIN, OPT_REAL, AT(grad_clip), "1", 0, 1e9, "largest norm of the gradient; 0: any"},
    {"ema", TRAIN, OPT_REAL, AT(ema), "0.995", 0, 1, "decay of the moving average of the weights"},
    {"ema_warmup", TRAIN, OPT_FLAG, AT(ema_warmup), "1", 0, 1, "1: decay = min(ema, (1+step)/(10+step))"},
    {"recompute", TRAIN | BENCH, OPT_FLAG, AT(recompute), "0", 0, 1, "1: keep only layer inputs: less memory, slower"},
    {"", 0, 0, 0, "", 0, 0, "Sampling"},
    {"sampler", TRAIN | SAMPLE, OPT_CHOICE, AT(sampler), "auto", 0, 0,
     "auto|ddpm|ddim|flow: auto: flow for models of flow or x, ddim otherwise"},
    {"order", TRAIN | SAMPLE | ADDED, OPT_INT, AT(order), "1", 1, 2,
     "flow, x: 2 extrapolates the velocity from the timestep before: for few timesteps, with t_shift 1 or 2"},
    {"steps", SAMPLE, OPT_INT, AT(sample_steps), "20", 2, 1000, "timesteps S"},
    {"t_shift", TRAIN | SAMPLE, OPT_REAL, AT(t_shift), "0", 0, 100,
     "flow, x: timesteps that match the noise left, more of them at large t above 1; 0: 0 to 999 evenly"},
    {"sample_steps", TRAIN, OPT_INT, AT(sample_steps), "20", 2, 1000, "timesteps of the sample grids"},
    {"eta", SAMPLE, OPT_REAL, AT(eta), "0", 0, 1, "noise of ddim: 0 none, 1 as much as ddpm"},
    {"iters", SAMPLE, OPT_TEXT, AT(iters), "", 0, 0,
     "iterations per timestep: a number, or one for each, first sampled first; none: depth - pre - post"},
    {"budget", SAMPLE, OPT_INT, AT(budget), "0", 0, 1e8,
     "Transformer-block passes per picture, instead of iters; guidance takes as many again; 0: no budget"},
    {"alloc", SAMPLE, OPT_CHOICE, AT(alloc), "const", 0, 0, "const|inc|dec: share of iterations; inc: more at large t"},
    {"reuse", TRAIN | SAMPLE, OPT_FLAG, AT(reuse), "1", 0, 1, "1: start from the solution of the timestep before"},
    {"tol", SAMPLE, OPT_REAL, AT(tol), "0", 0, 1, "stop a timestep once the mean residual of its batch is below this"},
    {"solver", SAMPLE, OPT_CHOICE, AT(solver), "plain", 0, 0,
     "plain|anderson: z_k is the last iteration's result, or mixed with earlier ones"},
    {"window", SAMPLE, OPT_INT, AT(window), "3", 1, MAX_WINDOW, "anderson: number of earlier results"},
    {"mixing", SAMPLE, OPT_REAL, AT(mixing), "1", 0.01, 2, "anderson: beta, the step along the mixed residual"},
    {"cfg", TRAIN | SAMPLE, OPT_REAL, AT(cfg), "3", -100, 100, "scale of classifier-free guidance; 1: none"},
    {"cfg_channels", SAMPLE, OPT_INT, AT(cfg_channels), "3", 1, 1024,
     "the first so many prediction channels are guided; all of latents: 4"},
    {"cfg_interval", SAMPLE, OPT_RANGE, AT(cfg_interval), "0,999", 0, 999,
     "timesteps of 0..999 that are guided; the others take half the time, and 0,800 may be nearer to the data"},
    {"n", SAMPLE, OPT_INT, AT(n), "40", 1, 1e6, "number of pictures"},
    {"labels", SAMPLE, OPT_TEXT, AT(labels), "", 0, 0,
     "names of classes, what some have before a '-', or numbers: heart,animal,3; default: each in turn"},
    {"batch", SAMPLE, OPT_INT, AT(batch), "40", 1, 1 << 20, "pictures at a time"},
    {"", 0, 0, 0, "", 0, 0, "Files and progress, precision and chance"},
    {"weights", SAMPLE, OPT_TEXT, AT(weights), "weights/shapes.safetensors", 0, 0, "weight file"},
    {"out", TRAIN | ONCE, OPT_TEXT, AT(out), "out", 0, 0, "folder for weights, state, log and pictures"},
    {"out", SAMPLE, OPT_TEXT, AT(out), "samples.png", 0, 0, "PNG file; DIR/: a PNG for each picture, with its class"},
    {"resume", TRAIN | ONCE, OPT_TEXT, AT(resume), "", 0, 0, "folder of a run to go on with"},
    {"init", TRAIN | ONCE, OPT_TEXT, AT(init), "", 0, 0,
     "weight file to start from, which also says the model; a DiT may start a fixed point: --fixed_point 1"},
    {"save_every", TRAIN, OPT_INT, AT(save_every), "1500", 1, 2e9, "steps between saves of weights and state"},
    {"sample_every", TRAIN, OPT_INT, AT(sample_every), "1500", 0, 2e9, "steps between sample grids; 0: at the end"},
    {"log_every", TRAIN, OPT_INT, AT(log_every), "0", 0, 2e9, "steps between progress lines; 0: every few seconds"},
    {"weights_dtype", TRAIN, OPT_CHOICE, AT(weights_dtype), "f32", 0, 0, "f32|bf16: tensors in weights.safetensors"},
    {"latents", SAMPLE, OPT_TEXT, AT(latents), "", 0, 0, "also write pictures or latents as a safetensors file"},
    {"trace", SAMPLE, OPT_TEXT, AT(trace), "", 0, 0,
     "write the residual of every iteration as CSV, a mean over the first batch"},
    {"strip", SAMPLE, OPT_TEXT, AT(strip), "", 0, 0,
     "draw x_t and the predicted x0 of a few pictures into this PNG, a column a timestep"},
    {"show", TRAIN | SAMPLE, OPT_FLAG, AT(show), "0", 0, 1, "1: draw the pictures in the terminal"},
    {"zoom", SAMPLE, OPT_INT, AT(zoom), "0", 0, 64, "side of a pixel in --out; 0: 4, 2 or 1 by their size, in DIR/ 1"},
    {"dtype", TRAIN | SAMPLE | BENCH, OPT_CHOICE, AT(dtype), "auto", 0, 0,
     "auto|fp32|bf16: arithmetic; auto: fp32 on a CPU, bf16 on a GPU"},
    {"seed", TRAIN | SAMPLE | BENCH, OPT_SEED, AT(seed), "1", 0, 0, "every random draw follows from it"},
    {"", 0, 0, 0, "", 0, 0, "Benchmark"},
    {"n", BENCH, OPT_INT, AT(bench_n), "5", 0, 1000, "iterations without gradient"},
    {"m", BENCH, OPT_INT, AT(bench_m), "6", 1, 1000, "iterations with gradient"},
    {"rounds", BENCH, OPT_INT, AT(rounds), "5", 1, 10000, "timed runs; the median counts"},
    {"gemm", BENCH, OPT_FLAG, AT(bench_gemm), "1", 0, 1, "0: leave out the matmul shapes"},
    {"step", STATE, OPT_INT, AT(step), "0", 0, 2e9, ""},
};
enum { N_OPTIONS = sizeof option_table / sizeof *option_table };

// Sets one option from text; `where` names the source in error messages ("option --" or a file).
static void option_set(Options *o, const Option *opt, const char *text, const char *where) {
    char *field = (char *)o + opt->offset, *end;
    if (opt->type == OPT_TEXT) {
        *(const char **)field = text;
    } else if (opt->type == OPT_CHOICE || opt->type == OPT_FLAG) {
        const char *choices = opt->type == OPT_FLAG ? "0|1|false|true|False|True" : opt->help;
        int index = choice_index(choices, text);
        if (index < 0)
            die("%s%s: '%s' is not one of %.*s", where, opt->name, text, (int)strcspn(choices, ":"), choices);
        *(int *)field = opt->type == OPT_FLAG ? index % 2 : index;
    } else if (opt->type == OPT_SEED) {
        errno = 0;
        *(uint64_t *)field = strtoull(text, &end, 10);
        if (!isdigit((unsigned char)*text) || *end || errno)
            die("%s%s: '%s' is not a whole number from 0", where, opt->name, text);
    } else {
        double a = strtod(text, &end), b = a;
        const char *second = end + 1, *kind = opt->type == OPT_REAL ? "number" : "whole number";
        if (opt->type == OPT_RANGE) kind = "range like 1,4,";
        if (opt->type == OPT_RANGE && *end == ',') b = strtod(second, &end);
        if (end == text || end == second || *end || !(opt->lo <= a && a <= b && b <= opt->hi) ||
            (opt->type != OPT_REAL && (a != floor(a) || b != floor(b))))
            die("%s%s: '%s' is not a %s from %.10g to %.10g", where, opt->name, text, kind, opt->lo, opt->hi);
        if (opt->type == OPT_RANGE) ((int *)field)[1] = (int)b;
        if (opt->type == OPT_REAL)
            *(double *)field = a;
        else
            *(int *)field = (int)a;
    }
}

// The value of an option as text, such that option_set gives the same value back.
static void option_text(char *text, size_t size, const Options *o, const Option *opt) {
    const char *field = (const char *)o + opt->offset, *word = opt->help;
    const int *number = (const int *)field;
    if (opt->type == OPT_TEXT) snprintf(text, size, "%s", *(const char *const *)field);
    if (opt->type == OPT_SEED) snprintf(text, size, "%llu", (unsigned long long)*(const uint64_t *)field);
    if (opt->type == OPT_REAL) snprintf(text, size, "%.17g", *(const double *)field);
    if (opt->type == OPT_RANGE) snprintf(text, size, "%d,%d", number[0], number[1]);
    if (opt->type == OPT_INT || opt->type == OPT_FLAG) snprintf(text, size, "%d", *number);
    if (opt->type != OPT_CHOICE) return;
    for (int i = 0; i < *number; i++) word = strchr(word, '|') + 1;
    snprintf(text, size, "%.*s", (int)strcspn(word, "|:"), word);
}

// Every field gets a value; where options of two programs share one, that of a program in `use`.
static void options_default(Options *o, int use) {
    memset(o, 0, sizeof *o);
    for (int pass = 0; pass < 2; pass++)
        for (const Option *opt = option_table; opt < option_table + N_OPTIONS; opt++)
            if (opt->use & (pass ? use : ~0)) option_set(o, opt, opt->initial, "default of ");
}

// Levenshtein distance up to `most`, to name the option that was probably meant
static int edit_distance(const char *a, const char *b, int most) {
    while (*a && *a == *b) a++, b++;
    if (!*a && !*b) return 0;
    if (most == 0) return 1;
    int change = *a && *b ? edit_distance(a + 1, b + 1, most - 1) : most;
    int drop = *a ? edit_distance(a + 1, b, most - 1) : most, add = *b ? edit_distance(a, b + 1, most - 1) : most;
    return 1 + (change < drop ? change < add ? change : add : drop < add ? drop : add);
}

// The option of a program that has this name.
static const Option *option_find(const char *name, int use) {
    const Option *nearest = NULL;
    int distance = INT_MAX;
    for (const Option *opt = option_table; opt < option_table + N_OPTIONS; opt++) {
        int d = opt->use & use ? edit_distance(name, opt->name, 6) : INT_MAX;
        if (d < distance) distance = d, nearest = opt;
    }
    if (distance) die("unknown option --%s; did you mean --%s? (--help lists them)", name, nearest->name);
    return nearest;
}

static void print_help(const char *program, int use, const char *about) {
    const char *title = NULL;
    printf("%s\n\nUsage: %s [--name value | --name=value] ...\n", about, program);
    for (const Option *opt = option_table; opt < option_table + N_OPTIONS; opt++) {
        if (!opt->use) title = opt->help;
        if (!(opt->use & use)) continue;
        if (title) printf("\n%s:\n", title);
        title = NULL;
        printf("  --%-21s %s [%s]\n", opt->name, opt->help, *opt->initial ? opt->initial : "none");
    }
    check_output();
}

// --model XL/2 stands for width, heads, depth, patch, and the paper's settings of training.
static void options_model(Options *o) {
    static const struct {
        int depth, width, heads;
    } sizes[] = {{12, 384, 6}, {12, 768, 12}, {24, 1024, 16}, {28, 1152, 16}};
    char name[8];
    const char *slash = strchr(o->model_name, '/');
    snprintf(name, sizeof name, "%.*s", slash ? (int)(slash - o->model_name) : 0, o->model_name);
    int size = choice_index("S|B|L|XL", name);
    if (size < 0) die("option --model: '%s' is not S, B, L or XL with a patch size, such as S/2", o->model_name);
    option_set(o, option_find("patch", TRAIN), slash + 1, "option --model: ");
    o->model.depth = sizes[size].depth;
    o->model.width = sizes[size].width;
    o->model.heads = sizes[size].heads;
    o->no_grad_iters[0] = 0, o->no_grad_iters[1] = 10;
    o->grad_iters[0] = 1, o->grad_iters[1] = 12;
    o->model.timestep_in_pre_post = o->model.skip = 0;
    o->optimizer = OPTIMIZER_ADAMW;
    o->lr = 1e-4;
    o->lr_schedule = LR_CONSTANT;
    o->t_sampling = T_UNIFORM;
    o->ema = 0.9999;
    o->grad_clip = o->warmup = o->ema_warmup = 0;
}

// Applies the command line to `o`: twice, as what it says itself goes over what --model stands for.
static void options_parse(Options *o, int use, int argc, char **argv, const char *about) {
    for (int pass = 0; pass < 2; pass++) {
        for (int a = 1; a < argc; a++) {
            char name[64];
            const char *value = strchr(argv[a], '=');
            if (!strcmp(argv[a], "--help") || !strcmp(argv[a], "-h")) {
                print_help(argv[0], use, about);
                exit(0);
            }
            if (strncmp(argv[a], "--", 2))
                die("'%s' is not an option: options are --name value; --help lists them", argv[a]);
            snprintf(name, sizeof name, "%.*s", (int)strcspn(argv[a] + 2, "="), argv[a] + 2);
            const Option *opt = option_find(name, use);
            if (value)
                value++;
            else if (a + 1 < argc && strncmp(argv[a + 1], "--", 2))
                value = argv[++a];
            else if (opt->type == OPT_FLAG)
                value = "1";
            else
                die("option --%s needs a value", name);
            option_set(o, opt, value, "option --");
        }
        if (pass == 0 && *o->model_name) options_model(o);
    }
}

// Dies with one line when the sizes do not fit together; `where` is what the user should change.
static void config_check(const Config *c, const char *where) {
    if (c->image_size % c->patch)
        die("%s: image_size %d is not a multiple of patch %d; choose a --patch that divides it", where, c->image_size,
            c->patch);
    if (c->width % c->heads) die("%s: width %d is not a multiple of heads %d", where, c->width, c->heads);
    if (c->width % 4) die("%s: width %d is not a multiple of 4", where, c->width);
    if (c->learn_sigma && config_straight(c)) die("%s: learn_sigma 1 needs prediction eps or v, not flow or x", where);
    if (c->zero_terminal_snr && c->prediction == PREDICT_X)
        die("%s: zero_terminal_snr 1 needs prediction v, not x", where);
    double tokens = (double)c->image_size / c->patch * c->image_size / c->patch;
    if (tokens > 65536) die("%s: %g tokens per picture; at most 65536: use a larger patch", where, tokens);
    Options o;
    memset(&o, 0, sizeof o);
    o.model = *c;
    for (const Option *opt = option_table; opt < option_table + N_OPTIONS; opt++) { // whatever trains must load
        char text[64], name[PATH_MAX + 32];
        if (!(opt->use & WEIGHTS)) continue;
        snprintf(name, sizeof name, "%s: ", where);
        option_text(text, sizeof text, &o, opt);
        option_set(&o, opt, text, name);
    }
}

// Metadata: every option with one of the bits in `use`, as text; returns how many. The values are to be freed.
static int options_to_meta(Meta *meta, const Options *o, int use) {
    int count = 0;
    for (const Option *opt = option_table; opt < option_table + N_OPTIONS; opt++) {
        char text[4096];
        if (!(opt->use & use) || opt->use & ONCE) continue;
        option_text(text, sizeof text, o, opt);
        meta[count].key = opt->name;
        meta[count++].value = xstrdup(text);
    }
    return count;
}

static void options_from_meta(Options *o, const SafeTensors *f, int use) {
    char where[PATH_MAX + 16];
    snprintf(where, sizeof where, "%s: metadata ", f->path);
    for (const Option *opt = option_table; opt < option_table + N_OPTIONS; opt++) {
        if (!(opt->use & use) || opt->use & ONCE) continue;
        const char *text = st_meta(f, opt->name);
        if (!text && opt->use & ADDED) {
            text = opt->type == OPT_FLAG ? "0" : opt->initial;
            if (!strcmp(opt->name, "optimizer")) text = "adamw"; // the only one before
        }
        if (!text) die("%s'%s' is missing: is this a file of this project?", where, opt->name);
        option_set(o, opt, opt->type == OPT_TEXT ? xstrdup(text) : text, where);
    }
    where[strlen(where) - 1] = 0; // the space
    config_check(&o->model, where);
}

// ---------------------------------------------------------------------------------------------------------------------
// Pictures: PNG files, the terminal, and shapes drawn by the program itself

// A pixel of a model's picture, -1..1, as a byte; NaN gives 0.
static uint8_t to_byte(float x) {
    float v = 127.5f * x + 128;
    return (uint8_t)(v > 0 ? v < 255 ? v : 255 : 0);
}

// Four bytes, the highest first.
static void put32(uint8_t *out, uint32_t x) {
    for (int i = 0; i < 4; i++) out[i] = (uint8_t)(x >> (24 - 8 * i));
}

// A PNG file in the making. Its pixels are a zlib stream (RFC 1950) of one block that deflate (RFC 1951) compresses
// with its fixed codes.
typedef struct {
    FILE *file;
    uint32_t bits; // that do not fill a byte yet
    int n_bits;
    size_t size; // of the chunk so far: type and data
    uint8_t chunk[1 << 16];
} Png;

// Ends a chunk: writes the length of its data, type and data, CRC-32 of both. The next one is of the same type.
static void png_chunk(Png *p) {
    uint8_t length[4], check[4];
    uint32_t crc = ~0u;
    for (size_t i = 0; i < p->size; i++) {
        crc ^= p->chunk[i];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
    }
    put32(length, (uint32_t)p->size - 4);
    put32(check, ~crc);
    fwrite(length, 4, 1, p->file);
    fwrite(p->chunk, p->size, 1, p->file);
    fwrite(check, 4, 1, p->file);
    p->size = 4;
}

// Appends `count` bits of value, the lowest first; those of a Huffman `code` the highest first.
static void png_bits(Png *p, uint32_t value, int count, int code) {
    for (int i = 0; i < count; i++) p->bits |= (value >> (code ? count - 1 - i : i) & 1) << p->n_bits++;
    for (; p->n_bits >= 8; p->n_bits -= 8, p->bits >>= 8) {
        if (p->size == sizeof p->chunk) png_chunk(p);
        p->chunk[p->size++] = (uint8_t)p->bits;
    }
}

// A byte, 256 for the end, or from 257 on a length
static void png_symbol(Png *p, uint32_t s) {
    if (s < 144)
        png_bits(p, 0x30 + s, 8, 1);
    else if (s < 256)
        png_bits(p, 0x190 + s - 144, 9, 1);
    else
        png_bits(p, s < 280 ? s - 256 : 0xC0 + s - 280, s < 280 ? 7 : 8, 1);
}

// A copy of `length` (3 to 257) bytes that stand `distance` bytes before
static void png_copy(Png *p, size_t length, size_t distance) {
    uint32_t a = (uint32_t)length - 3, b = (uint32_t)distance - 1;
    int more = 0, far = 0; // bits behind the symbols: what they say is a range
    while (a >> more > 7) more++;
    while (b >> far > 3) far++;
    png_symbol(p, 257 + 4 * more + (a >> more));
    png_bits(p, a, more, 0);
    png_bits(p, 2 * far + (b >> far), 5, 1);
    png_bits(p, b, far, 0);
}

// rgb (h,w,3). An enlarged picture repeats the pixel to the left and the row above: copies are sought only there.
static void png_write(const char *path, const uint8_t *rgb, int w, int h) {
    const size_t row = 3 * (size_t)w + 1, size = row * (size_t)h, from[] = {row, 3};
    uint8_t *data = (uint8_t *)xcalloc(size, 1, "a picture"); // a row begins with its filter: 0, none
    for (int y = 0; y < h; y++) memcpy(data + y * row + 1, rgb + y * (row - 1), row - 1);
    Png *p = (Png *)xcalloc(1, sizeof *p, "a picture");
    p->file = open_temp(path);
    fwrite("\x89PNG\r\n\x1a\n", 8, 1, p->file);
    memcpy(p->chunk, "IHDR........\10\2\0\0\0", p->size = 17); // width, height, 8 bits, RGB
    put32(p->chunk + 4, (uint32_t)w);
    put32(p->chunk + 8, (uint32_t)h);
    png_chunk(p);
    memcpy(p->chunk, "IDAT\x78\x01", p->size = 6);
    png_bits(p, 3, 3, 0);  // the last block, with the fixed codes
    uint32_t a = 1, b = 0; // Adler-32
    for (size_t i = 0, length; i < size; i += length) {
        size_t distance = 0;
        length = 1;
        for (int k = 0; k < 2; k++) {
            size_t n = 0;
            while (from[k] <= i && from[k] <= 32768 && n < 257 && i + n < size && data[i + n] == data[i + n - from[k]])
                n++;
            if (n > 2 && n > length) length = n, distance = from[k];
        }
        if (distance)
            png_copy(p, length, distance);
        else
            png_symbol(p, data[i]);
        for (size_t n = i; n < i + length; n++) a = (a + data[n]) % 65521, b = (b + a) % 65521;
    }
    png_symbol(p, 256);
    png_bits(p, 0, -p->n_bits & 7, 0); // to the next byte
    for (int shift = 24; shift >= 0; shift -= 8) png_bits(p, (b << 16 | a) >> shift, 8, 0);
    png_chunk(p);
    memcpy(p->chunk, "IEND", 4);
    png_chunk(p);
    commit_temp(p->file, path);
    xfree(data);
    xfree(p);
}

// Prints every step-th pixel of rgb (h,w,3) to a terminal: a character is an upper half block, two pixels high.
static void show_picture(const uint8_t *rgb, int w, int h, int step) {
    for (int y = 0; y < h; y += 2 * step) {
        for (int x = 0; x < w; x += step) {
            const uint8_t *top = rgb + 3 * ((size_t)y * w + x), *low = top + (size_t)3 * w * step;
            printf("\x1b[38;2;%d;%d;%dm", top[0], top[1], top[2]);
            if (y + step < h) printf("\x1b[48;2;%d;%d;%dm", low[0], low[1], low[2]);
            fputs("\xe2\x96\x80", stdout);
        }
        puts("\x1b[0m");
    }
}

// images (n,C,S,S) in -1..1, side by side in `columns`, a pixel enlarged to zoom x zoom, `gap` light pixels between
// them. Of latents (C=4) the first three channels show. Returns rgb (*out_h,*out_w,3), to be released with xfree.
static uint8_t *picture_grid(const float *images, int n, int C, int S, int columns, int zoom, int gap, int *out_w,
                             int *out_h) {
    if (columns > n) columns = n;
    *out_w = columns * (S * zoom + gap) + gap;
    *out_h = (n + columns - 1) / columns * (S * zoom + gap) + gap;
    size_t size = 3 * (size_t)*out_w * *out_h;
    uint8_t *rgb = (uint8_t *)xcalloc(size, 1, "a picture");
    memset(rgb, 230, size);
    for (int i = 0; i < n; i++) {
        for (int y = 0; y < S * zoom; y++) {
            int Y = gap + i / columns * (S * zoom + gap) + y, X = gap + i % columns * (S * zoom + gap);
            uint8_t *out = rgb + 3 * ((size_t)Y * *out_w + X);
            for (int x = 0; x < S * zoom * 3; x++) {
                size_t plane = (size_t)i * C + (C < 3 ? 0 : x % 3);
                out[x] = to_byte(images[(plane * S + y / zoom) * S + x / 3 / zoom]);
            }
        }
    }
    return rgb;
}

static void save_png(const char *path, const float *images, int n, int C, int S, int columns, int zoom, int gap) {
    int width, height;
    uint8_t *rgb = picture_grid(images, n, C, S, columns, zoom, gap, &width, &height);
    png_write(path, rgb, width, height);
    xfree(rgb);
}

// `shapes`, the data that needs no file: ten kinds of coloured shape on a light background, as many as anyone wants.
// Place, size, angle and both colours vary, little enough for a small model to learn them in minutes. The kinds can be
// told apart at 8x8 pixels, and remain what they are when flipped left to right.
enum Shapes { CIRCLE, RING, SQUARE, TRIANGLE, STAR, HEART, CROSS, CRESCENT, ARROW, DIAMOND, N_SHAPES };
static const char shape_names[] =
    "[\"circle\", \"ring\", \"square\", \"triangle\", \"star\", "
    "\"heart\", \"cross\", \"crescent\", \"arrow\", \"diamond\"]";

// Corners x, y of the shapes that are polygons, y pointing down, all of about the same area.
static const int shape_corners[N_SHAPES] = {0, 0, 4, 3, 10, 0, 12, 0, 7, 4};
static const float shape_xy[N_SHAPES][24] = {
    {0},
    {0},
    {-.8f, -.8f, .8f, -.8f, .8f, .8f, -.8f, .8f},
    {0, -1.1f, 1.05f, .75f, -1.05f, .75f},
    {0, -1.15f, .31f,  -.43f, 1.09f, -.36f, .5f,    .16f,  .68f,  .93f,
     0, .53f,   -.68f, .93f,  -.5f,  .16f,  -1.09f, -.36f, -.31f, -.43f},
    {0},
    {-.36f, -1, .36f,  -1, .36f,  -.36f, 1,  -.36f, 1,  .36f,  .36f,  .36f,
     .36f,  1,  -.36f, 1,  -.36f, .36f,  -1, .36f,  -1, -.36f, -.36f, -.36f},
    {0},
    {1.1f, 0, .15f, -.9f, .15f, -.35f, -1, -.35f, -1, .35f, .15f, .35f, .15f, .9f},
    {0, -1.15f, .75f, 0, 0, 1.15f, -.75f, 0},
};

// Signed distance to a circle around the origin.
static float circle_distance(float x, float y, float r) { return sqrtf(x * x + y * y) - r; }

// Signed distance from a point to the outline of a shape of about unit size, negative inside
// (https://iquilezles.org/articles/distfunctions2d).
static float shape_distance(int shape, float x, float y) {
    if (shape == CIRCLE) return circle_distance(x, y, .95f);
    if (shape == RING) return fabsf(circle_distance(x, y, .75f)) - .25f;
    if (shape == CRESCENT) return fmaxf(circle_distance(x, y, 1), -circle_distance(x - .5f, y, .75f));
    if (shape == HEART) { // a square that stands on a corner, with a circle on each of its upper sides
        float square = (fabsf(x) + fabsf(y - .05f) - .9f) * .7071f;
        return fminf(square, circle_distance(fabsf(x) - .46f, y + .36f, .6f));
    }
    const float *corner = shape_xy[shape], *last = corner + 2 * (shape_corners[shape] - 1);
    float nearest = 1e9f, sign = 1;
    for (const float *a = corner, *b = last; a <= last; b = a, a += 2) { // the side from a to b
        float ex = b[0] - a[0], ey = b[1] - a[1], px = x - a[0], py = y - a[1];
        float along = fminf(fmaxf((px * ex + py * ey) / (ex * ex + ey * ey), 0), 1);
        float dx = px - along * ex, dy = py - along * ey;
        nearest = fminf(nearest, dx * dx + dy * dy);
        int below = py >= 0, above = (y < b[1]), left = (ex * py > ey * px);
        if (below == above && above == left) sign = -sign; // a ray to one side crosses it
    }
    return sign * sqrtf(nearest);
}

// x (3,size,size) in -1..1 and its label: picture `number` of the endless sequence that belongs to `seed`.
static void shapes_draw(float *x, int *label, int size, uint64_t seed, uint32_t number) {
    uint32_t word[8];
    float u[8], color[3], background[3];
    philox(word, seed, 0, number, STREAM_DATA);
    philox(word + 4, seed, 1, number, STREAM_DATA);
    for (int i = 0; i < 8; i++) u[i] = (float)rng_uniform(word[i]);
    *label = (int)rng_below(word[0], N_SHAPES);
    float radius = (.33f + .06f * u[1]) * (float)size, angle = .5f * (u[2] - .5f);
    float center_x = (.45f + .1f * u[3]) * (float)size, center_y = (.45f + .1f * u[4]) * (float)size;
    float co = cosf(angle) / radius, si = sinf(angle) / radius;
    for (int c = 0; c < 3; c++) { // any hue; a hint of another one in the background
        color[c] = .95f * cosf(6.2831853f * (u[5] - (float)c / 3));
        background[c] = .82f + .12f * u[6] + .06f * cosf(6.2831853f * (u[7] - (float)c / 3));
    }
    for (int i = 0; i < size * size; i++) {
        float px = (float)(i % size) + .5f - center_x, py = (float)(i / size) + .5f - center_y;
        float distance = radius * shape_distance(*label, px * co + py * si, py * co - px * si);
        float inside = fminf(fmaxf(.5f - distance, 0), 1); // the edge is one pixel wide
        for (int c = 0; c < 3; c++) x[c * size * size + i] = background[c] + inside * (color[c] - background[c]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Data: a memory-mapped dataset file, or the endless pictures of `shapes`. Which sample stands at which place of which
// batch follows from (seed, step) alone.

struct Dataset {
    SafeTensors file;    // unused for shapes
    const Tensor *x, *y; // y NULL: unlabelled
    int64_t count;       // samples; 0: endless
    int channels, size, classes;
    const char **class_names;              // `classes` of them, or NULL
    const char *class_json, *latent_scale; // metadata that is passed on to the weights, or NULL
    int32_t *order;                        // permutation of the current epoch
    int64_t order_epoch;
    uint64_t seed;
};

// The label of a sample; checked whenever it is read, as the file may change.
static int dataset_label(const Dataset *d, int64_t index, int64_t limit) {
    int64_t label;
    memcpy(&label, (const char *)d->y->data + 8 * index, 8); // may be unaligned
    if (label < 0 || label > limit)
        die("%s: tensor y: label %lld of sample %lld is out of range 0..%lld", d->file.path, (long long)label,
            (long long)index, (long long)limit);
    return (int)label;
}

static void dataset_open(Dataset *d, const char *path, int shapes_size, uint64_t seed) {
    memset(d, 0, sizeof *d);
    d->seed = seed;
    d->order_epoch = -1;
    if (!strcmp(path, "shapes")) {
        d->channels = 3;
        d->size = shapes_size;
        d->class_json = shape_names;
        d->class_names = parse_class_names(path, d->class_json, &d->classes);
        return;
    }
    st_open(&d->file, path);
    const Tensor *x = d->x = st_find(&d->file, "x"), *y = d->y = st_find(&d->file, "y");
    if (!x) die("%s: no tensor 'x': is this a dataset? tools/data.py makes them", path);
    int bytes = x->dtype == U8;
    if (x->ndim != 4 || (!bytes && x->dtype != F32 && x->dtype != F16 && x->dtype != BF16))
        die("%s: tensor x: want U8 (N,H,W,C), or F32, F16 or BF16 (N,C,H,W)", path);
    int64_t n = x->shape[0], C = x->shape[bytes ? 3 : 1], H = x->shape[bytes ? 1 : 2], W = x->shape[bytes ? 2 : 3];
    if (n < 1 || n > INT32_MAX) die("%s: tensor x: %lld samples; want 1 to 2^31-1", path, (long long)n);
    if (H != W) die("%s: tensor x: pictures must be square", path);
    if (H < 1 || H > 4096 || C < 1 || C > 1024)
        die("%s: tensor x: want sides from 1 to 4096 and 1 to 1024 channels", path);
    if (y && (y->dtype != I64 || y->ndim != 1 || y->shape[0] != n))
        die("%s: tensor y: want I64 with one label for each of the %lld samples", path, (long long)n);
    d->count = n;
    d->size = (int)H;
    d->channels = (int)C;
    d->latent_scale = st_meta(&d->file, "latent_scale");
    d->class_json = y ? st_meta(&d->file, "class_names") : NULL;
    d->class_names = parse_class_names(path, d->class_json, &d->classes);
    for (int64_t i = 0; y && i < n; i++) {
        int label = dataset_label(d, i, d->class_names ? d->classes : 999999); // the number of classes: no label
        if (label >= d->classes && !d->class_names) d->classes = label + 1;
    }
    d->order = (int32_t *)xcalloc((size_t)n, sizeof *d->order, "the order of the samples");
}

// Which sample is number g = step·batch + b of the run: position g mod N in epoch g / N, each epoch a Fisher-Yates
// shuffle.
static int64_t dataset_index(Dataset *d, int64_t g) {
    int64_t epoch = g / d->count;
    if (epoch != d->order_epoch) {
        for (int64_t i = 0; i < d->count; i++) d->order[i] = (int32_t)i;
        for (int64_t i = d->count - 1; i > 0; i--) {
            uint32_t word[4];
            philox(word, d->seed, (uint32_t)i, (uint32_t)epoch, STREAM_DATA);
            uint32_t j = rng_below(word[0], (uint32_t)i + 1);
            int32_t swap = d->order[i];
            d->order[i] = d->order[j];
            d->order[j] = swap;
        }
        d->order_epoch = epoch;
    }
    return d->order[g % d->count];
}

// x (C,H,W) in -1..1 and the label of sample `index` (of the file, or of the endless shapes).
static void dataset_sample(const Dataset *d, float *x, int *label, int64_t index) {
    int64_t hw = (int64_t)d->size * d->size, C = d->channels;
    if (!d->count) {
        shapes_draw(x, label, d->size, d->seed, (uint32_t)index);
        return;
    }
    Tensor one = *d->x;
    one.count = C * hw;
    const unsigned char *source = (const unsigned char *)one.data + (size_t)index * one.count * dtype_sizes[one.dtype];
    one.data = source;
    if (one.dtype == U8) {
        for (int64_t c = 0; c < C; c++)
            for (int64_t i = 0; i < hw; i++) x[c * hw + i] = source[i * C + c] / 127.5f - 1;
    } else {
        st_to_float(&d->file, &one, x);
    }
    for (int64_t i = 0; i < C * hw; i++)
        if (!isfinite(x[i])) die("%s: tensor x: sample %lld holds %g; remove it", d->file.path, (long long)index, x[i]);
    *label = d->y ? dataset_label(d, index, d->classes) : 0;
}

// Samples first..first+count-1 of the batch of a step: x (count,C,H,W), labels y (count) with some dropped.
static void dataset_batch(Dataset *d, float *x, int *y, int64_t step, int batch, int first, int count, int hflip,
                          double label_drop) {
    size_t chw = (size_t)d->channels * d->size * d->size;
    int64_t *index = (int64_t *)xcalloc((size_t)count, sizeof *index, "a batch");
    for (int b = 0; b < count; b++) {
        int64_t g = step * batch + first + b;
        index[b] = d->count ? dataset_index(d, g) : g;
    }
#pragma omp parallel for schedule(static)
    for (int b = 0; b < count; b++) {
        uint32_t drop[4], flip[4];
        float *picture = x + b * chw;
        dataset_sample(d, picture, &y[b], index[b]);
        philox(drop, d->seed, (uint32_t)(first + b), (uint32_t)step, STREAM_DROP);
        philox(flip, d->seed, (uint32_t)(first + b), (uint32_t)step, STREAM_AUGMENT);
        if (rng_uniform(drop[0]) < label_drop) y[b] = d->classes;
        for (float *row = picture; hflip && flip[0] & 1 && row < picture + chw; row += d->size)
            for (int i = 0, j = d->size - 1; i < j; i++, j--) {
                float swap = row[i];
                row[i] = row[j];
                row[j] = swap;
            }
    }
    xfree(index);
}

// ---------------------------------------------------------------------------------------------------------------------
// Weights in files

static void shape_text(char *text, size_t size, const int64_t *shape, int ndim) {
    *text = 0;
    for (int d = 0; d < ndim; d++) {
        size_t used = strlen(text);
        snprintf(text + used, size - used, "%s%lld", d ? "," : "", (long long)shape[d]);
    }
}

// What no tensor may hold, when it is read or saved: its first such element, or -1
static int64_t first_bad(const float *value, int64_t count, int kind) {
    for (int64_t e = 0; e < count; e++)
        if (!isfinite(value[e]) || (kind == MODEL_ADAM_V && value[e] < 0)) return e;
    return -1;
}

// value = the tensor PREFIX + name of a file; dies with the names of file and tensor when it is missing or unfit.
static void tensor_read(float *value, const SafeTensors *f, const char *prefix, const ParamTensor *p, int kind) {
    char name[160], want[200], got[200];
    snprintf(name, sizeof name, "%s%s", prefix, p->name);
    const Tensor *t = st_find(f, name);
    if (!t) die("%s: tensor %s is missing: this is not a file of this model", f->path, name);
    shape_text(want, sizeof want, p->shape, p->ndim);
    shape_text(got, sizeof got, t->shape, t->ndim);
    if (strcmp(want, got))
        die("%s: tensor %s has the shape (%s), but the metadata asks for (%s)", f->path, name, got, want);
    st_to_float(f, t, value);
    int64_t bad = first_bad(value, p->count, kind);
    if (bad >= 0)
        die("%s: tensor %s holds %g at element %lld; take an earlier copy", f->path, name, value[bad], (long long)bad);
}

// Reads the tensors PREFIX + name of a file into the model, one at a time, as they may be as large as its memory.
static void model_load(Model *m, int kind, const SafeTensors *f, const char *prefix) {
    float *value = (float *)xcalloc(params_largest(m->tensors, m->n_tensors), sizeof *value, "loading");
    progress_begin("loading", m->n_tensors);
    for (const ParamTensor *p = m->tensors; p < m->tensors + m->n_tensors; p++) {
        tensor_read(value, f, prefix, p, kind);
        model_upload(m, kind, p->offset, p->count, value);
        progress(1);
    }
    xfree(value);
    if (kind == MODEL_WEIGHTS) model_use(m, kind);
}

// What a training step needs: multiply-adds count two; what stays constant while z iterates once, no recomputation.
// n: iterations without gradient; m: with gradient, which costs three times the forward pass.
static double model_flops(const Config *c, int B, int n, int m) {
    double D = c->width, T = config_tokens(c), M = B * T, pixels = (double)c->patch * c->patch;
    double block = M * (24 * D * D + 4 * T * D), projection = M * 8 * D * D, inject = M * 6 * D * D;
    double ends = M * 2 * D * pixels * (c->channels + config_out_channels(c));
    double modulation = B * (2.0 * D * (6 * D * config_blocks(c) + 2 * D) + 2 * (256 * D + D * D));
    double pixel_gradient = M * 2 * D * pixels * c->channels, z_gradient = M * 4 * D * D; // of the first: not computed
    if (!c->fixed_point) return 3 * (ends + modulation + c->depth * block) - pixel_gradient;
    double layers = (c->pre_depth + c->post_depth + m) * block + m * projection + inject;
    return 3 * (ends + modulation + layers) - pixel_gradient - z_gradient + n * (block + projection);
}

// ---------------------------------------------------------------------------------------------------------------------
// What sampling is told: sampler, iterations, labels

// Which sampler suits the model; dies on one that does not, or does not have that order.
static int resolve_sampler(const Options *o, const Config *c) {
    int flow = config_straight(c), sampler = o->sampler;
    if (c->prediction == PREDICT_EPS && c->zero_terminal_snr)
        die("zero_terminal_snr 1: at the last timestep eps says nothing of the picture; train with --prediction v");
    if (o->order > 1 && !flow) die("option --order: %d is for models that predict flow or x", o->order);
    if (o->t_shift > 0 && !flow) die("option --t_shift: is for models that predict flow or x; leave it out");
    if (sampler == SAMPLER_AUTO) sampler = flow ? SAMPLER_FLOW : SAMPLER_DDIM;
    if ((sampler == SAMPLER_FLOW) != flow)
        die("option --sampler: this model predicts %s; use --sampler auto",
            flow ? "flow or x and needs the flow sampler" : "noise or v: ddpm or ddim");
    if (o->eta > 0 && sampler != SAMPLER_DDIM) die("option --eta: is for the sampler ddim; leave it out");
    return sampler;
}

// Iterations of each timestep from --iters, --budget and --alloc
static void plan_iterations(int iters[DIFFUSION_STEPS], const Options *o, const Config *c) {
    int S = o->sample_steps, per_step = c->pre_depth + c->post_depth, total = config_iterations(c) * S, listed = 0;
    for (int i = 0; i < S; i++) iters[i] = 0;
    if (o->budget && *o->iters) die("option --budget: give either iters or budget");
    if (!c->fixed_point) {
        const char *iterates = *o->iters    ? "iters"
                               : o->alloc   ? "alloc"
                               : o->tol > 0 ? "tol"
                               : o->solver  ? "solver"
                               : *o->trace  ? "trace"
                                            : NULL;
        if (iterates) die("option --%s: this model is a DiT, which does not iterate; leave it out", iterates);
        if (o->budget && S * c->depth > o->budget)
            die("option --budget: %d passes allow %d steps of this DiT with %d blocks: lower --steps", o->budget,
                o->budget / c->depth, c->depth);
        return;
    }
    char *copy = xstrdup(o->iters), *rest = copy;
    for (char *word; *o->iters && (word = strsep(&rest, ",")); listed++) {
        char *end;
        long value = strtol(word, &end, 10);
        if (!*word || *end || value < 1 || value > 1000)
            die("option --iters: '%s' is not a whole number from 1 to 1000", word);
        if (listed < S) iters[listed] = (int)value;
    }
    free(copy);
    if (listed > 1 && listed != S) die("option --iters: %d numbers for %d timesteps; give one, or one each", listed, S);
    if (listed > 1 && o->alloc) die("option --alloc: a list of iters is an allocation already");
    if (listed > 1) return;
    if (listed == 1) total = iters[0] * S;
    if (o->budget) total = o->budget - per_step * S;
    if (total < S)
        die("option --budget: %d passes are too few for %d timesteps of at least %d: lower --steps or raise it",
            o->budget, S, per_step + 1);
    allocate_iterations(iters, S, total, o->alloc);
    for (int i = 0; i < S; i++)
        if (iters[i] > 1000)
            die("option --%s: more than 1000 iterations in a timestep; lower it%s", o->budget ? "budget" : "iters",
                o->budget ? " or raise --steps" : "");
}

// All that sampling is told; `iters` is where its plan of iterations goes.
static SampleSettings sample_settings(int iters[DIFFUSION_STEPS], const Options *o) {
    int window = o->solver == SOLVER_ANDERSON ? o->window : 0;
    plan_iterations(iters, o, &o->model);
    SampleSettings set;
    memset(&set, 0, sizeof set);
    set.sampler = resolve_sampler(o, &o->model);
    set.order = o->order;
    set.cfg_channels = o->cfg_channels;
    set.reuse = o->reuse;
    set.eta = o->eta;
    set.cfg = o->model.classes ? o->cfg : 1; // without labels there is nothing to guide
    set.tol = o->tol;
    set.iters = iters;
    set.window = window;
    set.mixing = o->mixing;
    memcpy(set.interval, o->cfg_interval, sizeof set.interval);
    if (*o->strip && (set.sampler == SAMPLER_DDPM || (set.sampler == SAMPLER_DDIM && o->eta > 0)))
        die("option --strip: the noise that a step adds hides the predicted x0: use --sampler ddim and --eta 0");
    return set;
}

// Whether `name` is the word, a '-' and more
static int in_group(const char *name, const char *word) {
    size_t length = strlen(word);
    return !strncmp(name, word, length) && name[length] == '-';
}

// The label of the picture that is the use-th of a word of --labels: a class, a number, or what names have before a
// '-', which stands for all of those, in turn: "animal" for animal-bird, animal-bug, ... -1: nothing is called so
static int word_label(const char *word, int use, int classes, const char *const *names) {
    char *end;
    int named = names ? classes : 0, members = 0;
    for (int i = 0; i < named; i++)
        if (!strcmp(names[i], word)) return i;
    long value = strtol(word, &end, 10);
    if (*word && !*end && value >= 0 && value <= classes) return (int)value;
    for (int i = 0; i < named; i++) members += in_group(names[i], word);
    for (int i = 0, left = members ? use % members : 0; i < named; i++)
        if (in_group(names[i], word) && !left--) return i;
    return -1;
}

// Labels of n pictures from "3,heart,7", in turn; without a list, each class in turn
static void parse_labels(int *y, int n, const char *list, int classes, const char *const *names) {
    const char **words = (const char **)xcalloc(strlen(list) + 2, sizeof *words, "labels");
    char *copy = xstrdup(list), *rest = copy, known[1500] = "";
    int count = 0;
    while (*list && (words[count] = strsep(&rest, ","))) count++;
    for (int i = 0; names && i < classes && strlen(known) < sizeof known - 1; i++)
        snprintf(known + strlen(known), sizeof known - strlen(known), "%s%s", i ? ", " : ": ", names[i]);
    for (int i = 0; i < count; i++)
        if (word_label(words[i], 0, classes, names) < 0)
            die("option --labels: '%s' is neither a class name nor a number from 0 to %d (%d: no label); a name that "
                "holds a comma needs its number%s%s",
                words[i], classes, classes, known, strlen(known) < sizeof known - 1 ? "" : "...");
    for (int i = 0; i < n; i++)
        y[i] = count ? word_label(words[i % count], i / count, classes, names) : classes ? i % classes : 0;
    free(copy);
    xfree(words);
}

// ---------------------------------------------------------------------------------------------------------------------
// What the programs write

// Pictures x (n,C,S,S) for the labels y (n), in batches that the model has room for.
static void sample_pictures(Model *model, const Schedule *s, SampleSettings *set, float *x, const int *y, int n,
                            uint64_t seed) {
    size_t count = config_pixels(&model->config);
    int at_a_time = set->cfg != 1 ? model->batch / 2 : model->batch;
    int64_t passes = 0, guidance = 0;
    progress_begin("sampling", (int64_t)n * s->n);
    for (int first = 0; first < n && !interrupted; first += at_a_time) {
        int B = n - first < at_a_time ? n - first : at_a_time;
        for (int b = first; b < first + B; b++) rng_normal(x + b * count, count, 0, seed, (uint32_t)b, STREAM_XT);
        set->passes = set->guidance = 0;
        sample_batch(model, s, set, x + first * count, y + first, B, NULL, seed, first);
        passes += set->passes * B;
        guidance += set->guidance * B;
    }
    set->passes = (passes + n - 1) / n; // the mean: with `tol` batches may differ
    set->guidance = (guidance + n - 1) / n;
}

// Pictures x (n,C,S,S) and their labels as a dataset file; the metadata are NULL where there are none.
static void save_pictures(const char *path, const float *x, const int *y, int n, const Config *c,
                          const char *class_names, const char *latent_scale) {
    int64_t *label = (int64_t *)xcalloc(n, sizeof *label, "labels");
    for (int i = 0; i < n; i++) label[i] = y[i];
    Tensor tensors[2] = {st_tensor("y", I64, label, 1, n, 1, 1, 1),
                         st_tensor("x", F32, x, 4, n, c->channels, c->image_size, c->image_size)};
    const Meta meta[] = {{"class_names", class_names}, {"latent_scale", latent_scale}};
    st_save(path, tensors + !c->classes, c->classes ? 2 : 1, meta, 2); // unlabelled data have no y
    xfree(label);
}

static int grid_zoom(const Options *o, int S) { return o->zoom ? o->zoom : S >= 64 ? 1 : S >= 32 ? 2 : 4; }

// A grid of pictures (n,C,S,S) as PNG, a column for each label where those are few, and with --show in the terminal, as
// many side by side as there is room for.
static void save_grid(const char *path, const float *x, int n, const Options *o) {
    const Config *c = &o->model;
    int S = c->image_size, zoom = grid_zoom(o, S), width, height;
    int side = (int)ceil(sqrt(n)), labels = *o->labels ? 1 : c->classes;
    for (const char *p = o->labels; *p; p++) labels += *p == ',';
    int few = labels > 1 && labels <= 20 && n > labels;
    int columns = !few ? side : side < labels ? labels : side - side % labels;
    save_png(path, x, n, c->channels, S, columns, zoom, 2);
    if (!o->show) return;
    struct winsize window = {0, 0, 0, 0};
    ioctl(1, TIOCGWINSZ, &window); // a file has none
    int room = window.ws_col ? window.ws_col : INT_MAX, fit = (room - 1) / (S + 1);
    uint8_t *rgb = picture_grid(x, n, c->channels, S,
                                fit < 1         ? 1
                                : fit < columns ? fit
                                                : columns,
                                1, 1, &width, &height);
    end_passing();
    show_picture(rgb, width, height, fit < 1 ? (width + room - 1) / room : 1);
    xfree(rgb);
}

// The path (steps+1,STRIP,C,S,S) of `shown` pictures as PNG: of each a row of x_t and under it one of the x0 that the
// model saw in it, a column for each timestep, 24 at most. A step is linear in x and x0, so that x0 follows from x
// before and after it: flow gives x + dt·(x0 - x)/tau, ddim sqrt(prev)·x0 + sqrt(1-prev)·(x - sqrt(ab)·x0)/sqrt(1-ab).
// With --order 2 it is the x0 that the extrapolated velocity leads to.
static void save_strip(const char *path, const float *x, const Schedule *s, const Config *c, int shown) {
    size_t count = config_pixels(c);
    int S = c->image_size, columns = s->n < 24 ? s->n : 24, zoom = S >= 64 ? 1 : S >= 32 ? 2 : 3;
    float *tiles = (float *)xcalloc(2 * shown * columns * count, sizeof *tiles, "the strip");
    for (int column = 0; column < columns; column++) {
        int step = columns > 1 ? column * (s->n - 1) / (columns - 1) : 0, i = s->n - 1 - step;
        double ab = s->alpha_bar[i], prev = s->alpha_bar_prev[i], of_x = sqrt((1 - prev) / (1 - ab));
        double of_after = 1 / (sqrt(prev) - of_x * sqrt(ab)), of_before = -of_x * of_after; // ddim
        if (config_straight(c)) of_after = s->tau[i] / s->dt[i], of_before = 1 - of_after;
        for (int p = 0; p < shown; p++) {
            const float *before = x + (step * STRIP + p) * count, *after = before + STRIP * count;
            float *x_t = tiles + (2 * p * columns + column) * count, *x0 = x_t + columns * count;
            for (size_t e = 0; e < count; e++) {
                x_t[e] = before[e];
                x0[e] = (float)(of_after * after[e] + of_before * before[e]);
            }
        }
    }
    save_png(path, tiles, 2 * shown * columns, c->channels, S, columns, zoom, 2);
    xfree(tiles);
}

// A PNG for each picture in the folder that --out names: NUMBER_CLASS.png
static void save_singles(const Options *o, const float *x, const int *y, const char *const *class_names) {
    const Config *c = &o->model;
    for (int i = 0; i < o->n; i++) {
        char path[PATH_MAX], class_name[64] = "";
        if (y[i] < c->classes && class_names) snprintf(class_name, sizeof class_name, "_%s", class_names[y[i]]);
        for (char *slash; (slash = strchr(class_name, '/')) != NULL;) *slash = '-';
        snprintf(path, sizeof path, "%s%06d%s.png", o->out, i, class_name);
        save_png(path, x + i * config_pixels(c), 1, c->channels, c->image_size, 1, o->zoom ? o->zoom : 1, 0);
    }
}

// What a training state and a file of weights consist of
typedef struct {
    const char *prefix;
    int kind;
} ModelPart;
static const ModelPart state_parts[4] = {
    {"ema.", MODEL_EMA}, {"model.", MODEL_WEIGHTS}, {"adam_m.", MODEL_ADAM_M}, {"adam_v.", MODEL_ADAM_V}};
static const ModelPart weights_part = {"", MODEL_EMA};

// Writes OUT/NAME, `parts` of the model one tensor at a time, with the options of `use` as metadata, then class names
// and the scale of latents if there are any. What is no number is not saved: the file that was there stays.
static void save_parts(const Run *run, const char *name, const ModelPart *parts, int n_parts, int dtype, int use) {
    const Options *o = run->o;
    const Model *m = run->model;
    char path[PATH_MAX], (*names)[100] = (char(*)[100])xcalloc(n_parts * m->n_tensors, sizeof *names, "saving");
    Tensor *tensors = (Tensor *)xcalloc(n_parts * m->n_tensors, sizeof *tensors, "saving");
    Meta meta[N_OPTIONS + 2];
    int n_meta = options_to_meta(meta, o, use), n_options = n_meta, n = n_parts * m->n_tensors;
    const Meta more[] = {{"class_names", run->data->class_json}, {"latent_scale", run->data->latent_scale}};
    for (int i = 0; i < 2; i++) meta[n_meta++] = more[i];
    for (int i = 0; i < n; i++) {
        const ParamTensor *p = &m->tensors[i % m->n_tensors];
        snprintf(names[i], sizeof names[i], "%s%s", parts[i / m->n_tensors].prefix, p->name);
        tensors[i] = st_tensor(names[i], dtype, NULL, p->ndim, p->shape[0], p->shape[1], p->shape[2], p->shape[3]);
    }
    snprintf(path, sizeof path, "%s/%s.safetensors", o->out, name);
    FILE *file = st_begin(path, tensors, n, meta, n_meta);
    progress_begin("saving", n);
    for (int i = 0; i < n; i++) {
        const ParamTensor *p = &m->tensors[i % m->n_tensors];
        int kind = parts[i / m->n_tensors].kind;
        progress(1);
        model_download(m, kind, p->offset, p->count, run->tensor);
        int64_t bad = first_bad(run->tensor, p->count, kind);
        if (bad >= 0)
            die("step %d: tensor %s became %g and is not saved; what %s has stays: lower --lr", o->step, names[i],
                run->tensor[bad], o->out);
        for (int64_t e = 0; dtype == BF16 && e < p->count; e++) { // in place: it is half as large
            uint16_t half = float_to_bf16(run->tensor[e]);
            memcpy((char *)run->tensor + 2 * e, &half, 2);
        }
        fwrite(run->tensor, 1, tensors[i].bytes, file);
    }
    commit_temp(file, path);
    for (int i = 0; i < n_options; i++) free((char *)meta[i].value);
    xfree(tensors);
    xfree(names);
}

static uint64_t hash_bytes(uint64_t hash, const void *data, size_t bytes) { // FNV-1a
    for (size_t i = 0; i < bytes; i++) hash = (hash ^ ((const unsigned char *)data)[i]) * 0x100000001b3u;
    return hash;
}

// Whether all ranks run the same with the same. Of a dataset, which may be large, some bytes must do.
static void ranks_same_start(const Options *o, const SafeTensors *data) {
    uint64_t program = 0, options = 0, some = 0;
    if (ranks.count == 1) return;
    FILE *file = fopen("/proc/self/exe", "rb");
    for (int c; file && (c = getc(file)) != EOF;) program = hash_bytes(program, &c, 1);
    if (file) fclose(file);
    Meta meta[N_OPTIONS];
    for (int i = options_to_meta(meta, o, WEIGHTS | TRAIN | STATE); i--; free((char *)meta[i].value))
        options = hash_bytes(options, meta[i].value, strlen(meta[i].value) + 1);
    for (size_t i = 0; i < data->size; i += i < 1 << 20 ? 1 : 1 + data->size / 1024)
        some = hash_bytes(some, data->map + i, 1);
    ranks_same("another program", program);
    ranks_same("other options", options);
    ranks_same("other data", some);
}

static void ranks_same_weights(const Run *run) {
    uint64_t hash = 0;
    if (ranks.count == 1) return;
    for (const ParamTensor *t = run->model->tensors; t < run->model->tensors + run->model->n_tensors; t++) {
        model_download(run->model, MODEL_WEIGHTS, t->offset, t->count, run->tensor);
        hash = hash_bytes(hash, run->tensor, (size_t)t->count * sizeof *run->tensor);
    }
    ranks_same("other weights", hash);
}

// OUT/state.safetensors, all that is needed to go on as if the run had never stopped, and then OUT/weights.safetensors,
// the EMA weights, ready to sample. The log comes before: after a loss of power it must not be older than the state.
static void run_save(Run *run) {
    ranks_same_weights(run);
    run->saved = run->o->step;
    if (ranks.rank) return;
    if (fsync(fileno(run->log))) die("%s/log.csv: cannot write: %s", run->o->out, strerror(errno));
    save_parts(run, "state", state_parts, 4, F32, WEIGHTS | TRAIN | STATE);
    save_parts(run, "weights", &weights_part, 1, run->o->weights_dtype ? BF16 : F32, WEIGHTS);
}

// Ends the program, before its work rather than after it, if `n` pictures and picture_file bytes do not fit in
// memory.
static void check_memory(const char *option, int64_t n, const Config *c, double picture_file) {
    double need = 4.0 * (double)n * (double)config_pixels(c) + picture_file, have = memory_limit();
    if (need > have)
        die("option --%s: %lld pictures take %.0f MB; this process may use %.0f MB", option, (long long)n, need / 1e6,
            have / 1e6);
}

// Pictures x (n,C,S,S) of the labels y (n) from the weights in use; to be released with xfree. Writes --trace.
static float *draw_pictures(const Options *o, Model *m, SampleSettings *set, const int *y, int n) {
    float *x = (float *)xcalloc(n * config_pixels(&m->config), sizeof *x, "pictures");
    Schedule s;
    schedule_make(&s, &m->config, o->sample_steps);
    if (o->t_shift > 0 && config_straight(&m->config)) schedule_shift(&s, o->t_shift);
    if (*o->strip) set->path = (float *)xcalloc((s.n + 1) * STRIP * config_pixels(&m->config), sizeof *x, "the strip");
    if (*o->trace) {
        set->trace = open_temp(o->trace);
        fprintf(set->trace, "step,t,iteration,residual\n");
    }
    sample_pictures(m, &s, set, x, y, n, o->seed);
    if (set->trace) commit_temp(set->trace, o->trace);
    int at_a_time = set->cfg != 1 ? m->batch / 2 : m->batch, shown = n < at_a_time ? n : at_a_time;
    if (set->path) save_strip(o->strip, set->path, &s, &m->config, shown < STRIP ? shown : STRIP);
    xfree(set->path);
    return x;
}

// OUT/samples_STEP.png: pictures from the EMA weights, with the options of sampling that train_* has
static void run_pictures(Run *run) {
    if (ranks.rank) return;
    Options o = *run->o; // what only sample_* asks for has its default there
    const Config *c = &o.model;
    char path[PATH_MAX];
    int n = c->classes > 1 && c->classes <= 20 ? 4 * c->classes : 36, iters[DIFFUSION_STEPS];
    snprintf(path, sizeof path, "%s/samples_%06d.png", o.out, o.step);
    if (o.step == run->begun && access(path, F_OK) == 0) return;
    if (run->model->batch < 2 && c->classes) o.cfg = 1;
    int *y = (int *)xcalloc(n, sizeof *y, "samples");
    SampleSettings set = sample_settings(iters, &o);
    parse_labels(y, n, o.labels, c->classes, NULL);
    model_use(run->model, MODEL_EMA);
    float *x = draw_pictures(&o, run->model, &set, y, n);
    model_use(run->model, MODEL_WEIGHTS);
    if (!interrupted) { // else --resume draws them
        save_grid(path, x, n, &o);
        say(0, "pictures: %s%s", path,
            o.cfg != run->o->cfg ? " (without guidance, which needs room for two pictures)" : "");
    }
    xfree(x);
    xfree(y);
}

// Opens OUT/log.csv for appending; rows of steps from `step` on, which will be made again, are dropped, and what has no
// end.
static FILE *open_log(const char *folder, int step) {
    char path[PATH_MAX], line[512];
    snprintf(path, sizeof path, "%s/log.csv", folder);
    static const char head[] = "step,loss,mse,vb,grad_norm,lr,n,m,ms,images_per_s\n";
    FILE *file = open_temp(path), *old = fopen(path, "r");
    if (!old && errno != ENOENT) die("%s: cannot read: %s; its rows would be lost", path, strerror(errno));
    if (old && fgets(line, sizeof line, old) && strcmp(line, head))
        die("%s: is no log of this program; give another --out", path);
    fputs(head, file);
    while (old && fgets(line, sizeof line, old))
        if (isdigit((unsigned char)*line) && atoi(line) < step && strchr(line, '\n')) fputs(line, file);
    if (old && ferror(old)) die("%s: cannot read; its rows would be lost", path);
    if (old) fclose(old);
    commit_temp(file, path);
    file = fopen(path, "a");
    if (!file) die("%s: cannot write: %s", path, strerror(errno));
    return file;
}

// The row of step o->step - 1, and every log_every steps, or after the first and then every few seconds, a line on the
// terminal. Ends the program when the loss is no number.
static void run_report(Run *run, const Step *did, double ms) {
    const Options *o = run->o;
    double loss = did->mse + did->vb;
    if (!isfinite(loss) || !isfinite(did->norm)) {
        char kept[PATH_MAX + 64] = "nothing was saved yet";
        if (run->saved >= 0) snprintf(kept, sizeof kept, "%s keeps the state of step %d", o->out, run->saved);
        fclose(run->log);
        die("step %d: the loss is %g and the gradient's norm %g; %s: lower --lr, or set --grad_clip and --warmup",
            o->step - 1, loss, did->norm, kept);
    }
    if (fprintf(run->log, "%d,%.9g,%.9g,%.9g,%.6g,%.6g,%d,%d,%.3f,%.1f\n", o->step - 1, loss, did->mse, did->vb,
                did->norm, did->lr, did->n, did->m, ms, o->batch / ms * 1e3) < 0 ||
        fflush(run->log))
        die("%s/log.csv: cannot write: %s", o->out, strerror(errno));
    run->ms += ms;
    run->sum_ms += ms;
    run->sum_flops += model_flops(&o->model, o->batch, did->n, did->m);
    run->sum_loss += loss;
    int first = o->step == run->begun + 1, last = o->step == o->steps, steps = o->step - run->shown;
    if (!(o->log_every ? o->step % o->log_every == 0 : first || now_ms() - run->shown_ms > pause_ms()) && !last) return;
    say(!o->log_every && !last, "step %d/%d  loss %.4f  %.0f images/s  %.1f GFLOP/s  %s left", o->step, o->steps,
        run->sum_loss / steps, (double)steps * o->batch / run->sum_ms * 1e3, run->sum_flops / run->sum_ms * 1e-6,
        minutes(run->ms / (o->step - run->begun) * (o->steps - o->step)));
    run->shown = o->step;
    run->shown_ms = now_ms();
    run->sum_ms = run->sum_flops = run->sum_loss = 0;
}

enum { N_STOP = 4 };
static const int stop_signals[N_STOP] = {SIGINT, SIGTERM, SIGPIPE, SIGHUP};

static void on_kill(int number) { // no half-written file stays
    if (*temp_path) unlink(temp_path);
    signal(number, SIG_DFL);
    raise(number);
}

static void on_interrupt(int number) {
    interrupted = 1;
    if (number == SIGINT) signal(number, on_kill); // a second time it ends the program at once
}

// Takes the folder of a run for this process alone, until it ends, and removes what a killed one left there.
static void run_folder(const char *folder) {
    if (ranks.rank) return;
    DIR *files = opendir(folder); // never closed: it holds the lock
    if (!files) die("%s: cannot open this folder: %s", folder, strerror(errno));
    if (flock(dirfd(files), LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK)
        die("%s: another program is training in this folder; wait for it, or give another --out", folder);
    for (struct dirent *entry; (entry = readdir(files)) != NULL;)
        if (!fnmatch("*.??????.tmp", entry->d_name, 0) &&
            (!strncmp(entry->d_name, "weights.safetensors.", 20) || !strncmp(entry->d_name, "state.safetensors.", 18) ||
             !strncmp(entry->d_name, "log.csv.", 8) || !fnmatch("samples_*.png.*", entry->d_name, 0)))
            unlinkat(dirfd(files), entry->d_name, 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// The programs: training

// Writes what training would see, without label dropping, as a dataset file: real pictures to compare samples with.
static int export_data(const Options *o, Dataset *d) {
    int64_t n = (int64_t)o->steps * o->batch;
    if (n > 1000000) die("option --export: %lld pictures; at most a million: lower --steps", (long long)n);
    check_writable(o->export_to, o->data);
    check_memory("steps", n, &o->model, 0);
    float *x = (float *)xcalloc(n * config_pixels(&o->model), sizeof *x, "pictures");
    int *y = (int *)xcalloc(n, sizeof *y, "labels");
    for (int step = 0, B = o->batch; step < o->steps; step++)
        dataset_batch(d, x + step * B * config_pixels(&o->model), y + step * B, step, B, 0, B, o->hflip, 0);
    save_pictures(o->export_to, x, y, (int)n, &o->model, d->class_json, d->latent_scale);
    say(0, "%lld pictures of %s: %s", (long long)n, o->data, o->export_to);
    return 0;
}

// Dies unless the run's model is the one that a file stands for.
static void same_model(const char *option, const char *path, const Config *have, const Options *o) {
    Options file = *o;
    file.model = *have;
    for (const Option *opt = option_table; opt < option_table + N_OPTIONS; opt++) {
        char there[4096], here[4096];
        if (!(opt->use & WEIGHTS)) continue;
        option_text(there, sizeof there, &file, opt);
        option_text(here, sizeof here, o, opt);
        if (strcmp(there, here))
            die("option --%s: %s has %s %s, this run %s; they must be the same", option, path, opt->name, there, here);
    }
}

// The settings of the run in --resume, then the command line over them; opens the run's state.
static void resume_settings(Options *o, SafeTensors *state, int argc, char **argv, const char *about) {
    char path[PATH_MAX];
    const char *folder = o->resume;
    snprintf(path, sizeof path, "%s/state.safetensors", folder);
    st_open(state, path);
    options_from_meta(o, state, TRAIN | WEIGHTS | STATE);
    Config before = o->model;
    int optimizer = o->optimizer; // each has its own moments
    o->out = folder;
    o->model_name = ""; // what it stood for is in the settings
    options_parse(o, TRAIN, argc, argv, about);
    if (*o->model_name) die("option --model: the run in %s has its model and settings; leave it out", folder);
    same_model("resume", path, &before, o);
    if (o->optimizer != optimizer) die("option --optimizer: the run in %s began with the other; leave it out", folder);
    if (strcmp(o->out, folder))
        die("option --out: a run goes on in its folder %s; to branch off, copy the folder and --resume the copy",
            folder);
    if (o->step > o->steps) die("option --steps: %s is at step %d already; ask for more", path, o->step);
}

// The model of --init, then the command line over it, which may only set --skip or make a fixed point of a DiT; opens
// the file and returns its model.
static Config init_settings(Options *o, SafeTensors *f, int argc, char **argv, const char *about) {
    Config asked = o->model; // by the command line, or else by default
    if (*o->resume) die("option --init: a run that goes on has weights; leave out --init or --resume");
    st_open(f, o->init);
    options_from_meta(o, f, WEIGHTS);
    Config from = o->model;
    options_parse(o, TRAIN, argc, argv, about);
    if (from.fixed_point || !o->model.fixed_point) return from;
    o->model.pre_depth = asked.pre_depth;
    o->model.post_depth = asked.post_depth;
    o->model.timestep_in_pre_post = asked.timestep_in_pre_post;
    o->model.skip = asked.skip;
    if (asked.pre_depth + asked.post_depth > from.depth)
        die("option --init: %s has %d blocks; lower --pre_depth or --post_depth", o->init, from.depth);
    return from;
}

// Dies unless the run's model, which by now knows its data, can start from the model `from` of --init: only labels may
// differ, the skip connection, which has no parameters, and what makes a fixed point of a DiT.
static void init_check(const Options *o, Config from) {
    const Config *c = &o->model;
    from.classes = c->classes;
    from.skip = c->skip;
    if (c->fixed_point && !from.fixed_point) {
        from.fixed_point = 1;
        from.pre_depth = c->pre_depth;
        from.post_depth = c->post_depth;
        from.timestep_in_pre_post = c->timestep_in_pre_post;
    }
    same_model("init", o->init, &from, o);
}

// Where the file of --init has a tensor: under its name, or a fixed point's in a DiT, whose first blocks become pre,
// its last post, and a middle one the one that is iterated. Renames it; 0 if there is none.
static int init_source(ParamTensor *t, const Config *from, const Config *c) {
    int block = 0, used = 0, post = !strncmp(t->name, "blocks_post.", 12);
    char inside[sizeof t->name];
    if (from->fixed_point == c->fixed_point) return 1;
    if (!strncmp(t->name, "block_fixed_point.", 18))
        block = from->depth / 2, used = 17;
    else if (post || !strncmp(t->name, "blocks_pre.", 11))
        sscanf(t->name, "%*[a-z_].%d%n", &block, &used);
    else
        return strncmp(t->name, "block_", 6) != 0;
    if (post) block += from->depth - c->post_depth;
    snprintf(inside, sizeof inside, "%s", t->name + used);
    snprintf(t->name, sizeof t->name, "blocks.%d%.60s", block, inside);
    return 1;
}

// Puts the weights of --init over `values`, which are drawn as for a fresh start. Of a label table for other classes
// the row "no label" is kept.
static void init_read(float *values, const Model *m, const SafeTensors *f, const Config *from) {
    const Config *c = &m->config;
    int relabelled = from->classes != c->classes, D = c->width;
    for (int i = 0; i < m->n_tensors; i++) {
        ParamTensor t = m->tensors[i];
        float *value = values + t.offset;
        if (relabelled && !strcmp(t.name, "y_embedder.embedding_table.weight")) {
            t.shape[0] = from->classes + 1;
            t.count = t.shape[0] * D;
            float *table = (float *)xcalloc(t.count, sizeof *table, "the label table");
            tensor_read(table, f, "", &t, MODEL_WEIGHTS);
            memcpy(value + (int64_t)c->classes * D, table + t.count - D, D * sizeof *table);
            xfree(table);
        } else if (init_source(&t, from, c)) {
            tensor_read(value, f, "", &t, MODEL_WEIGHTS);
        }
    }
    printf("init: %s", f->path);
    if (from->fixed_point != c->fixed_point)
        printf(", a DiT of %d blocks: the first %d, the last %d, and number %d as the fixed point's", from->depth,
               c->pre_depth, c->post_depth, from->depth / 2);
    if (relabelled)
        printf("; labels: %d there, %d here: their rows are drawn anew, that of no label is kept", from->classes,
               c->classes);
    if (from->fixed_point && from->skip != c->skip) printf("; skip %d there, %d here", from->skip, c->skip);
    printf("\n");
}

static int train_main(int argc, char **argv) {
    static const char about[] =
        "Trains a fixed-point diffusion model (or DiT) on pictures; writes weights, state, log and samples into "
        "--out.\n\n"
        "  ./train_" TARGET
        " --data my.safetensors --out my_run     # tools/data.py makes the dataset of a folder\n"
        "  ./train_" TARGET
        " --resume my_run                        # goes on with a run\n"
        "  mpirun -q -np 4 ./train_" TARGET "                        # 4 ranks share each batch; needs make MPI=1";
    Options options, *o = &options;
    Config *c = &o->model, from;
    char path[PATH_MAX];
    SafeTensors state, start;
    Dataset data;
    options_default(o, TRAIN);
    ranks_open();
    options_parse(o, TRAIN, argc, argv, about);
    if (*o->init) from = init_settings(o, &start, argc, argv, about);
    if (*o->resume) {
        run_folder(o->resume);
        resume_settings(o, &state, argc, argv, about);
    }
    int dtype = compute_dtype(o->dtype), rows = ranks_row(o, ranks.rank + 1) - ranks_row(o, ranks.rank),
        micro = o->micro_batch && o->micro_batch < rows ? o->micro_batch : rows;
    if (o->batch < ranks.count)
        die("option --batch: %d pictures are too few for %d ranks; start fewer ranks", o->batch, ranks.count);
    dataset_open(&data, o->data, c->image_size, o->seed);
    if (*o->resume && (data.size != c->image_size || data.channels != c->channels || data.classes != c->classes))
        die("%s: other sizes or classes than the run in %s was started with", o->data, o->resume);
    c->image_size = data.size;
    c->channels = data.channels;
    c->classes = data.classes;
    if (*o->init) init_check(o, from);
    config_check(c, *o->resume ? state.path : "options");
    if (*o->export_to) return ranks.rank ? 0 : export_data(o, &data);
    resolve_sampler(o, c);
    ranks_same_start(o, &data.file);

    Model *m = model_create(c, micro, o->grad_iters[1], o->recompute, TRAIN_ADAMW + o->optimizer, 0, dtype);
    if (!*o->resume) {
        float *values = (float *)xcalloc(m->n_params, sizeof *values, "initial weights");
        params_init(values, m->tensors, m->n_tensors, o->seed);
        if (*o->init) {
            init_read(values, m, &start, &from);
            st_close(&start);
        }
        model_upload(m, MODEL_WEIGHTS, 0, m->n_params, values);
        model_upload(m, MODEL_EMA, 0, m->n_params, values);
        model_use(m, MODEL_WEIGHTS);
        xfree(values);
    }
    if (!*o->resume && !ranks.rank) {
        if (mkdir(o->out, 0777) && errno != EEXIST) die("%s: cannot make this folder: %s", o->out, strerror(errno));
        run_folder(o->out);
    }
    for (int i = 0; i < 2 && !ranks.rank; i++) {
        snprintf(path, sizeof path, "%s/%s.safetensors", o->out, i ? "weights" : "state");
        if (!*o->resume && !access(path, F_OK))
            die("%s: a run is stored here; give another --out, or go on with it: --resume %s", path, o->out);
        check_writable(path, "");
    }
    float *tensor = (float *)xcalloc(params_largest(m->tensors, m->n_tensors), sizeof *tensor, "saving");
    double mb = 4e-6 * (double)m->n_params, copy = m->half ? mb / 2 : 0,
           activations = 1e-6 * (double)m->activation_bytes;
    double saving = 4e-6 * (double)params_largest(m->tensors, m->n_tensors);
    for (int i = 0; i < N_STOP; i++) // from here on there is something to save
        if (signal(stop_signals[i], on_interrupt) == SIG_IGN && stop_signals[i] == SIGHUP) signal(SIGHUP, SIG_IGN);
    say(0, "data: %s, %dx%d, %d channels, %d classes%s", o->data, c->image_size, c->image_size, c->channels, c->classes,
        data.count ? "" : ", endless");
    if (ranks.count > 1) say(0, "ranks: %d, each with its %d or so of %d pictures", ranks.count, rows, o->batch);
    say(0, "model: %s, width %d, %d heads, patch %d, %.2f million parameters", c->fixed_point ? "fixed point" : "DiT",
        c->width, c->heads, c->patch, 1e-6 * (double)m->n_params);
    say(0,
        "memory: parameters %.1f MB, gradients %.1f, Adam %.1f, EMA %.1f, activations %.1f, saving %.1f; in all %.1f "
        "MB",
        mb + copy, mb, 2 * mb, mb, activations, saving, 5 * mb + copy + activations + saving);
    double start_left = o->ema_warmup ? 0 : pow(o->ema, o->steps);
    if (start_left > 0.01)
        say(0,
            "EMA: after %d steps %.0f %% of the average in weights.safetensors is still the start: raise --steps or "
            "lower --ema",
            o->steps, 100 * start_left);
    for (int i = 0; i < 4 && *o->resume; i++) model_load(m, state_parts[i].kind, &state, state_parts[i].prefix);
    if (*o->resume) st_close(&state);
    Run run = {o, &data, m, micro, NULL, tensor, o->step, o->step, *o->resume ? o->step : -1, 0, now_ms(), 0, 0, 0};
    ranks_same_weights(&run);
    run.log = ranks.rank ? fopen("/dev/null", "w") : open_log(o->out, o->step);
    train(&run);
    if (o->step < o->steps || (interrupted && !ranks.rank)) { // or its last pictures were not drawn
        if (run.saved != o->step) run_save(&run);
        say(0, "stopped after step %d; go on with: %s --resume %s", o->step, argv[0], o->out);
        return 130;
    }
    model_free(m);
    say(0, "weights: %s/weights.safetensors; draw more with: ./sample_" TARGET " --weights %s/weights.safetensors",
        o->out, o->out);
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Sampling from a file of weights

static int sample_main(int argc, char **argv) {
    Options options, *o = &options;
    Config *c = &o->model;
    SafeTensors f;
    options_default(o, SAMPLE);
    options_parse(o, SAMPLE, argc, argv,
                  "Draws pictures from trained weights.\n\n"
                  "  ./sample_" TARGET
                  " --weights out/weights.safetensors --show 1     # also in the terminal\n"
                  "  ./sample_" TARGET " --labels star,heart --n 8 --out stars/         # a PNG for each picture");
    int dtype = compute_dtype(o->dtype), iters[DIFFUSION_STEPS], n = o->n, B = n < o->batch ? n : o->batch, named;
    st_open(&f, o->weights);
    options_from_meta(o, &f, WEIGHTS);
    const char *class_json = st_meta(&f, "class_names"), **names = parse_class_names(o->weights, class_json, &named);
    const char *latent_scale = st_meta(&f, "latent_scale");
    if (names && named != c->classes)
        die("%s: metadata class_names has %d names for %d classes", o->weights, named, c->classes);
    int *y = (int *)xcalloc(n, sizeof *y, "labels"), folder = *o->out && o->out[strlen(o->out) - 1] == '/';
    char first[PATH_MAX + 16]; // a file that --out stands for
    snprintf(first, sizeof first, "%s%s", o->out, folder ? "000000.png" : "");
    const char *outputs[] = {first, o->latents, o->trace, o->strip}, *dot = strrchr(o->out, '.');
    SampleSettings set = sample_settings(iters, o);
    parse_labels(y, n, o->labels, c->classes, names);
    if (dot && choice_index("jpg|jpeg|gif|webp|bmp|tif|tiff|ppm|safetensors", dot + 1) >= 0)
        die("option --out: '%s': pictures are written as PNG; give a name that ends in .png, or a folder: DIR/",
            o->out);
    if (!*o->out) die("option --out: needs the name of a PNG file, or of a folder: DIR/");
    if (folder && o->show) die("option --show: draws a grid; give a PNG file as --out");
    if (folder && mkdir(o->out, 0777) && errno != EEXIST)
        die("%s: cannot make this folder: %s", o->out, strerror(errno));
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < i; j++)
            if (*outputs[i] && !strcmp(outputs[i], outputs[j])) die("%s: two outputs have this name", outputs[i]);
        if (*outputs[i]) check_writable(outputs[i], o->weights);
    }
    int zoom = !folder ? grid_zoom(o, c->image_size) : o->zoom ? o->zoom : 1;
    check_memory("n", n, c, 6 * pow(c->image_size * zoom + 2, 2) * (folder ? 1 : n)); // pixels, and rows to pack
    Model *m = model_create(c, set.cfg != 1 ? 2 * B : B, 0, 0, 0, set.window, dtype);
    model_load(m, MODEL_WEIGHTS, &f, "");
    double begin = now_ms();
    float *x = draw_pictures(o, m, &set, y, n);
    double seconds = (now_ms() - begin) / 1000;
    int64_t bad = first_bad(x, (int64_t)(n * config_pixels(c)), MODEL_WEIGHTS);
    if (bad >= 0)
        die("%s: picture %lld became %g, and none is written: lower --cfg or --mixing, or take other weights",
            o->weights, (long long)(bad / (int64_t)config_pixels(c)), (double)x[bad]);
    if (*o->latents) save_pictures(o->latents, x, y, n, c, class_json, latent_scale);
    if (folder)
        save_singles(o, x, y, names);
    else
        save_grid(o->out, x, n, o);
    char guidance[50] = "";
    if (set.guidance == set.passes)
        snprintf(guidance, sizeof guidance, " (and as many for guidance)");
    else if (set.guidance)
        snprintf(guidance, sizeof guidance, " (and %lld for guidance)", (long long)set.guidance);
    say(0, "%d pictures in %.1f s, %d timesteps, %lld block passes per picture%s: %s", n, seconds, o->sample_steps,
        (long long)set.passes, guidance, o->out);
    if (latent_scale)
        say(0,
            "%s shows three channels of latents; pictures: %spython3 tools/latents.py decode %s --vae FOLDER --out "
            "FILE.png",
            o->out, *o->latents ? "" : "--latents FILE, then ", *o->latents ? o->latents : "FILE");
    return 0;
}

// What must be set before anything else, the waiting of OpenMP's threads before OpenMP itself: the program starts anew.
// They spin for some microseconds, which is as fast as spinning for good where they are alone, and as polite as
// sleeping at once where they are not.
__attribute__((unused)) static void program_begin(char **argv) {
    int fd = open("/dev/null", O_RDWR); // where standard output is closed, a file would take its place
    while (fd >= 0 && fd < 3) fd = dup(fd);
    close(fd);
    terminal = isatty(1);
    struct rlimit stack;
    if (getrlimit(RLIMIT_STACK, &stack) == 0 && (stack.rlim_cur < 8 << 20 || stack.rlim_cur == RLIM_INFINITY)) {
        stack.rlim_cur = stack.rlim_max < 8 << 20 ? stack.rlim_max : 8 << 20;
        setrlimit(RLIMIT_STACK, &stack);
    }
#ifdef _OPENMP
    char self[PATH_MAX] = ""; // its path, after which the system then calls the process, too
    if (!getenv("OMP_WAIT_POLICY") && !getenv("GOMP_SPINCOUNT") && !setenv("KMP_BLOCKTIME", "0", 0) &&
        !setenv("GOMP_SPINCOUNT", "1000", 0) && readlink("/proc/self/exe", self, sizeof self - 1) > 0)
        execv(self, argv);
    int most = 4 * omp_get_num_procs(); // more would wait for one another all the time
    if (omp_get_max_threads() > most) omp_set_num_threads(most);
#endif
    (void)argv;
    struct sigaction bus;
    memset(&bus, 0, sizeof bus);
    bus.sa_sigaction = on_bus;
    bus.sa_flags = SA_SIGINFO;
    sigaction(SIGBUS, &bus, NULL);
    signal(SIGXFSZ, SIG_IGN); // the write fails instead
    for (int i = 0; i < N_STOP; i++)
        if (signal(stop_signals[i], on_kill) == SIG_IGN) signal(stop_signals[i], SIG_IGN);
}

#ifdef PROGRAM // TRAIN or SAMPLE; the tests and the benchmark include this file and have a main of their own
int main(int argc, char **argv) {
    program_begin(argv);
    int status = PROGRAM == TRAIN ? train_main(argc, argv) : sample_main(argc, argv);
    check_output();
    return status;
}
#endif

// End of shared block 4

// fpdm.cu: fixed-point diffusion models (arXiv:2401.08741) on NVIDIA GPUs, the whole program in one file, with its own
// kernels for everything: nvcc is all it needs. It does what fpdm_cpu.c does, with the same options, files and draws.
//
//   make train_gpu && ./train_gpu     trains on pictures that it draws itself, writes weights and samples to out/
//   make sample_gpu && ./sample_gpu   draws pictures from trained weights
//   make bench_gpu && ./bench_gpu     measures speed and memory;   make test_gpu: tests;   --help: every option
//   make test_emu && ./test_emu       the same tests without a GPU: g++ and test/cuda_emu.h stand in for it
//
// Search for    What you learn there
// "Interface"   the few functions of Part 5 that the model asks for
// "Kernels"     how this file starts work on the GPU, in two types of numbers
// "Part 1."     the model: its equations, its parameters, each layer above its gradient, the fixed point, the whole
// "Part 2."     diffusion: noise schedule, training loss, samplers, how a budget of iterations is spent
// "Part 3."     learning: AdamW, Muon, the moving average of the weights, the training loop
// "Part 4."     speed and memory: instructions of the GPU, the matrix product, attention, where activations lie
// "Part 5."     plumbing: ranks, random numbers, files, options, pictures, data, programs; nothing new about the model
//
// "Shared block" marks what fpdm_cpu.c and fpdm.cu have in common, byte for byte.
//
// --dtype bf16, the default: what goes into a matmul is bf16, but for the patch, conditioning and final layers, and
// stored activations are too (fpdm_cpu.c rounds operands alone), and so is Muon's iteration; weights, their gradients,
// the optimiser's moments, the EMA, the residual stream x, LayerNorm's statistics and every accumulator are fp32.
// --dtype fp32: all fp32. No atomic adds: every sum has one order, so the same seed gives the same bits on the same
// kind of GPU.

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
#include <type_traits>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef MPI
#include <mpi.h>
#include <sched.h>
#endif

#if defined(__HIP__)
#include "test/hip.h" // gives all of this a meaning on AMD's GPUs
#elif defined(__CUDACC__)
#include <cuda.h> // its types alone: nothing of it is linked
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#define NVIDIA
#define HOPPER (CUDART_VERSION >= 12000) // whether this compiler knows wgmma
#else
#include "test/cuda_emu.h" // and on a CPU
#endif
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define ON_HOPPER 1 // code that fits in registers there, and elsewhere takes a detour to do so
#else
#define ON_HOPPER 0
#endif
#ifdef NCCL
#include <nccl.h>
#endif

#define TARGET "gpu" // what this program's name ends in
typedef float real;  // of parameters; activations that feed matmuls have a type of their own, see Act
typedef __nv_bfloat16 bf16;

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
// Kernels: what it takes to write and to start them. A port to another accelerator gives a meaning to what stands here
// and under "Instructions" and "Fragments" in Part 4; test/README.md lists it, README.md has a guide.

#ifndef WARP
#define WARP 32 // lanes of a warp
#endif
#ifdef NVIDIA
#define SHARED_DYNAMIC(type, name)                                  \
    extern __shared__ __align__(1024) unsigned char shared_bytes[]; \
    type *name = reinterpret_cast<type *>(shared_bytes)
#define LAUNCH(kernel, grid, block, smem, stream, ...) kernel<<<grid, block, smem, stream>>>(__VA_ARGS__)
#endif

// The GPU, as gpu_open finds it
static struct {
    int ready, sms;      // sms: streaming multiprocessors
    int wgmma;           // on Hopper: whether large products go through matmul_wgmma; 2: all in bf16
    cudaStream_t stream; // everything happens in this one, in order
    size_t shared;       // bytes of shared memory that a block may have
    size_t allocated;    // bytes of device memory that this program holds
    int unsplit;         // in sampling: no sum over k is split: its order is that of k, whatever the batch
} gpu;

// From Part 4
static void check(cudaError_t error, const char *what); // of CUDA: ends the program if there is one
static void gpu_open(void);
static void gpu_wait(void);
static void *gpu_malloc(size_t bytes, const char *what); // device memory; what is in it is left as it is
static void gpu_free(void *p, size_t bytes);
static void gpu_zero(void *p, size_t bytes);
static void gpu_copy(void *to, const void *from, size_t bytes);
static void gpu_upload(void *device, const void *host, size_t bytes);
static void gpu_download(void *host, const void *device, size_t bytes); // waits for all that comes before it
static void graph_begin(void); // what follows is recorded instead of done, until
static cudaGraphExec_t graph_end(void);

#define CHECK(call) check(call, #call)

// Starts a kernel; more than 48 KB of shared memory have to be asked for.
#define RUN(kernel, grid, block, smem, ...)                                                                \
    do {                                                                                                   \
        if ((smem) > 48 * 1024)                                                                            \
            CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(smem))); \
        LAUNCH((kernel), grid, block, smem, gpu.stream, __VA_ARGS__);                                      \
        check(cudaGetLastError(), #kernel);                                                                \
    } while (0)

static int imin(int a, int b) { return a < b ? a : b; }
static size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

// An activation that feeds a matmul: its elements are bf16 or float as --dtype says, and kernels are templates of the
// element type A. TYPED(half, ...) runs a statement with A standing for that type.
typedef struct Act Act;
#define TYPED(half, ...)     \
    do {                     \
        if (half) {          \
            typedef bf16 A;  \
            __VA_ARGS__;     \
        } else {             \
            typedef float A; \
            __VA_ARGS__;     \
        }                    \
    } while (0)

// An unrolled loop: what is indexed by i can stay in registers.
#define EACH(i, n) _Pragma("unroll") for (int i = 0; i < (n); i++)

// From Part 4: 2^x; 16 bytes from global to shared memory in the background, in groups; V neighbours as one access of
// up to 16 bytes, converted to float and back
#ifdef NVIDIA
__device__ inline float fast_exp2(float x);
__device__ inline void cp_async16(void *smem, const void *gmem, bool valid);
__device__ inline void cp_async_commit();
template <int N>
__device__ inline void cp_async_wait();
#endif
template <int V, typename T>
__device__ inline void load(float (&x)[V], const T *p);
template <int V, typename T>
__device__ inline void store(T *p, const float (&x)[V]);
// The sum over the lanes of a warp, or over the threads of a block (shared: an element for each warp), in all of them
enum { MAX_WARPS = 1024 / WARP };
template <typename T>
__device__ inline T warp_sum(T x);
template <typename T>
__device__ inline T block_sum(T x, T *shared);

// ---------------------------------------------------------------------------------------------------------------------
// Layers: each forward above its backward. B pictures, T tokens, D width, H heads, hd head size. Matrices are
// row-major. Outputs come first. A backward adds (+=) to weight and modulation gradients, and says whether it adds to
// its input's.

// The linear layer, y = x·w^T + b. One description serves its three products:
//   forward           y (M,N)  = x (M,K)·w (N,K)^T        both operands have k as their fast dimension
//   input gradient    dx (M,N) = dy (M,K)·w (K,N)         TB: the second operand has k as its slow dimension
//   weight gradient   dw (M,N) += dy (K,M)^T·x (K,N)      TA and TB: both have; db (M) += the column sums of dy
// and what follows a product happens in its epilogue, while the result is in registers.

enum Epilogue {
    EPI_STORE,  // out = product + bias
    EPI_FLOAT,  // the same, but out is fp32 whatever the type of activations; in fp32, add too, unless NULL, or else it
                // may be split as EPI_WEIGHT is
    EPI_GELU,   // out = gelu(v), pre = v, v = product + add; pre may be NULL
    EPI_GATED,  // out = residual + gate·v, copy = out, pre = v, v = product + bias; out is fp32; pre, copy may be NULL
    EPI_DGELU,  // out = product·gelu'(pre), copy = gelu(pre), sum += out; sum may be NULL
    EPI_WEIGHT, // out += product, fp32; or the product alone into a workspace, when the sum over k is split
};

typedef struct {
    const void *a, *b;
    int lda, ldb, M, N, K;
    int k_chunk; // each split of the sum over k has this many
    int batch;   // EPI_STORE without bias: that many products, whose matrices stand right behind each other
    void *out;   // (M,N), row stride ldc
    int ldc;
    const float *bias, *add;      // (N), NULL: none; (add_rows,N): row i takes row i % add_rows
    int add_rows;                 // in bf16, 1 or M
    void *pre, *copy;             // (M,N)
    const float *residual, *gate; // (M,N); (N) of picture i at gate + i·gate_stride, a picture has `tokens` rows
    int gate_stride, tokens;
    float *sum, *db; // (M,N); (M)
    int overwrite;   // EPI_WEIGHT: = instead of +=
} Matmul;

// From Part 4: starts the product; `half` says whether the operands are bf16
template <bool TA, bool TB, int EPI>
static void matmul(int half, Matmul g);

// y (M,N) of EPI from x (M,K) and w (N,K), row stride ldw
static Matmul linear(void *y, const void *x, const void *w, int ldw, const float *b, int M, int K, int N) {
    Matmul g = {};
    g.a = x, g.b = w, g.lda = K, g.ldb = ldw;
    g.M = M, g.N = N, g.K = K, g.batch = 1;
    g.out = y, g.ldc = N, g.bias = b;
    return g;
}

// dx (M,K) of EPI = dy (M,N)·w (N,K), row stride ldw
static Matmul linear_input(void *dx, const void *dy, const void *w, int ldw, int M, int K, int N) {
    return linear(dx, dy, w, ldw, NULL, M, N, K);
}

// dw (N,K; row stride ldw) += dy (M,N)^T·x (M,K), db (N) += column sums of dy
static void linear_weight(int half, float *dw, int ldw, float *db, const void *dy, const void *x, int M, int K, int N) {
    Matmul g = linear(dw, dy, x, K, NULL, N, M, K);
    g.lda = N, g.ldc = ldw, g.db = db;
    matmul<true, true, EPI_WEIGHT>(half, g);
}

// out (B,T,D) = LN(x)·(1+scale)+shift; LN without weights, eps 1e-6. mod points at picture 0's shift (D) and, after it,
// scale (D); `stride` is the distance to the next picture's. stats (B,T,2), unless NULL, keeps mean and 1/sigma. A warp
// a row, which is read three times; from the second time on it is in the cache.
enum { ROW_THREADS = 256, ROWS_PER_BLOCK = ROW_THREADS / WARP };
template <typename A>
__global__ void layernorm_modulate_kernel(A *out, float *stats, const float *x, const float *mod, int stride, int rows,
                                          int T, int D) {
    int row = blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / WARP;
    if (row >= rows) return;
    const float *shift = mod + (size_t)(row / T) * stride, *scale = shift + D;
    float v[4], s[4], b[4], sum = 0, var = 0;
    x += (size_t)row * D;
    for (int d = threadIdx.x % WARP * 4; d < D; d += 4 * WARP) {
        load(v, x + d);
        sum += v[0] + v[1] + v[2] + v[3];
    }
    float mean = warp_sum(sum) / D;
    for (int d = threadIdx.x % WARP * 4; d < D; d += 4 * WARP) {
        load(v, x + d);
        EACH(i, 4) var += (v[i] - mean) * (v[i] - mean);
    }
    float rstd = rsqrtf(warp_sum(var) / D + 1e-6f), both[2] = {mean, rstd};
    if (stats && threadIdx.x % WARP == 0) store(stats + 2 * row, both);
    for (int d = threadIdx.x % WARP * 4; d < D; d += 4 * WARP) {
        load(v, x + d);
        load(s, scale + d);
        load(b, shift + d);
        EACH(i, 4) v[i] = (v[i] - mean) * rstd * (1 + s[i]) + b[i];
        store(out + (size_t)row * D + d, v);
    }
}

// The gradient through LN and on into the residual below it, in one pass over dx (B,T,D), the gradient of the stream:
//   dx += the gradient through LN, with dout (B,T,D) that of its modulated output; copy = dx for a matmul, unless NULL
//   normed, unless NULL, = that output once more, which nobody kept: the weight gradient of what follows needs it
//   dbranch = dx·gate: what dx means to the branch of out = x + gate·branch, whose forward is EPI_GATED
// Without x the first is left out, without branch the last; `add`: LN's input was x + gate·branch, not x. A block has
// `chunk` tokens of one picture. They come in through a ring of LN_STAGES buffers in shared memory, `group` tokens
// each, so that memory always has work: first each warp finds what one row has in common, then each thread goes down
// its own columns. parts (B,gridDim.x,3,D) = the block's sums over tokens of dout, dout·LN(x) and dx·branch: its shares
// of dshift, dscale and dgate.
enum { LN_THREADS = 512, LN_CHUNK = 8, LN_GROUP = 8, LN_STAGES = 2 }; // at most, at least, at most
template <typename A>
__global__ void __launch_bounds__(LN_THREADS, !ON_HOPPER)
    layernorm_backward_kernel(float *dx, A *copy, A *normed, float *parts, const A *dout, const float *x,
                              const float *stats, int add, const float *mod, A *dbranch, const A *branch,
                              const float *gate, int stride, int chunk, int group, int T, int D) {
    SHARED_DYNAMIC(float, common);    // of each row: mean, 1/sigma, and of g = dout·(1+scale) the mean and of g·LN(x)
    float *ring = common + 4 * group; // of each row: dx, x, dout, branch
    const int first = blockIdx.x * chunk, end = min(T, first + chunk), acts = D * sizeof(A) / sizeof(float);
    size_t picture = (size_t)blockIdx.y * T;
    const float *shift = x ? mod + (size_t)blockIdx.y * stride : NULL, *scale = x ? shift + D : NULL;
    parts += ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * 3 * D;
    if (branch) gate += (size_t)blockIdx.y * stride;
    auto place = [&](int r) { return ring + (r - first) % (LN_STAGES * group) * (2 * D + 2 * acts); };
    auto load_group = [&](int r0) {
        for (int r = r0; r < min(end, r0 + group); r++) {
            size_t at = (picture + r) * D;
            auto copy_row = [&](float *to, const void *from, int size) {
                for (int i = 4 * threadIdx.x; i < size; i += 4 * blockDim.x)
                    cp_async16(to + i, (const float *)from + i, true);
            };
            copy_row(place(r), dx + at, D);
            if (x) copy_row(place(r) + D, x + at, D);
            if (x) copy_row(place(r) + 2 * D, dout + at, acts);
            if (branch) copy_row(place(r) + 2 * D + acts, branch + at, acts);
        }
        cp_async_commit();
    };
    for (int d = 4 * threadIdx.x; d - 4 * (int)threadIdx.x < D; d += 4 * blockDim.x) { // once for D up to 2048
        float sums[3][4] = {}, s[4] = {}, b[4] = {}, a[4] = {};                        // scale, shift, gate
        if (d < D && x) load(s, scale + d), load(b, shift + d);
        if (d < D && branch) load(a, gate + d);
        EACH(i, LN_STAGES - 1) load_group(first + i * group);
        for (int r0 = first; r0 < end; r0 += group) {
            int stop = min(end, r0 + group);
            cp_async_wait<LN_STAGES - 2>();
            __syncthreads(); // these have come, and nobody needs those before
            load_group(r0 + (LN_STAGES - 1) * group);
            for (int r = r0 + threadIdx.x / WARP; x && r < stop; r += blockDim.x / WARP) {
                float *row = place(r), all[4] = {}, v[4], g[4], factor[4], branched[4], by[4];
                load(*(float(*)[2])all, stats + 2 * (picture + r));
                for (int e = threadIdx.x % WARP * 4; e < D; e += 4 * WARP) {
                    load(v, row + D + e);
                    load(g, (const A *)(row + 2 * D) + e);
                    load(factor, scale + e);
                    if (add) load(branched, (const A *)(row + 2 * D + acts) + e), load(by, gate + e);
                    EACH(i, 4) {
                        g[i] *= 1 + factor[i];
                        all[2] += g[i];
                        all[3] += g[i] * (v[i] + (add ? by[i] * branched[i] : 0) - all[0]);
                    }
                }
                all[2] = warp_sum(all[2]) / D, all[3] = warp_sum(all[3]) * all[1] / D;
                if (threadIdx.x % WARP == 0) store(common + 4 * (r - r0), all);
            }
            __syncthreads();
            for (int r = r0; d < D && r < stop; r++) {
                size_t at = (picture + r) * D + d;
                float *row = place(r), out[4], v[4], g[4], branched[4] = {}, all[4];
                load(out, row + d);
                if (branch) load(branched, (const A *)(row + 2 * D + acts) + d);
                if (x) {
                    load(v, row + D + d);
                    load(g, (const A *)(row + 2 * D) + d);
                    load(all, common + 4 * (r - r0));
                    EACH(i, 4) {
                        v[i] = (v[i] + (add ? a[i] * branched[i] : 0) - all[0]) * all[1];
                        sums[0][i] += g[i];
                        sums[1][i] += g[i] * v[i];
                        out[i] += all[1] * (g[i] * (1 + s[i]) - all[2] - v[i] * all[3]);
                        v[i] = v[i] * (1 + s[i]) + b[i];
                    }
                    store(dx + at, out);
                    if (copy) store(copy + at, out);
                    if (normed) store(normed + at, v);
                }
                if (branch) {
                    EACH(i, 4) {
                        sums[2][i] += out[i] * branched[i];
                        out[i] *= a[i];
                    }
                    store(dbranch + at, out);
                }
            }
        }
        EACH(k, 3) {
            if (d < D) store(parts + (size_t)k * D + d, sums[k]);
        }
        __syncthreads(); // before the next columns' rows take the place of these
    }
}

// dmod (as mod: dshift, dscale) and dgate += the sums over a picture's `chunks` parts, in order; NULL: not that one
__global__ void column_sums_kernel(float *dmod, float *dgate, const float *parts, int stride, int chunks, int D) {
    int d = blockIdx.x * blockDim.x + threadIdx.x, k = blockIdx.z;
    float *out = k < 2 ? dmod : dgate, sum = 0;
    if (!out || d >= D) return;
    for (int c = 0; c < chunks; c++) sum += parts[(((size_t)blockIdx.y * chunks + c) * 3 + k) * D + d];
    out[(size_t)blockIdx.y * stride + (k == 1 ? D : 0) + d] += sum;
}

// From Part 4: multi-head attention without mask. qkv (B,T,3D): per token q|k|v, head, channel; out (B,T,D). lse
// (B,H,T), unless NULL, keeps log2 of the sum of each row's exponentials for the backward pass.
static void attention_forward(int half, Act *out, float *lse, const Act *qkv, int B, int T, int D, int H);
// dqkv (B,T,3D) is overwritten; sums (B,T,D) is scratch.
static void attention_backward(int half, Act *dqkv, float *sums, const Act *dout, const Act *out, const float *lse,
                               const Act *qkv, int B, int T, int D, int H);

// gelu in the tanh form, as x·sigmoid(2·sqrt(2/pi)·(x + 0.044715·x^3)), which is the same function, and its slope.
// fmaf: where a compiler may choose, whole tiles and the last rows of a batch came to differ in the last bit.
__device__ inline float gelu(float x, float *slope) {
    float square = x * x, e = fast_exp2(x * fmaf(-0.102943240f, square, -2.302208198f)); // 2·sqrt(2/pi)·log2(e)
    float sigmoid = __fdividef(1, 1 + e), y = x * sigmoid;
    *slope = sigmoid + (y - y * sigmoid) * (1.5957691216f + 0.2140644488f * fminf(square, 1e4f)); // not inf
    return y;
}

// silu(x) = x·sigmoid(x), only ever applied to (B,D)
__device__ inline float silu(float x) { return x / (1 + expf(-x)); }
__device__ inline float silu_slope(float x) {
    float sigmoid = 1 / (1 + expf(-x));
    return sigmoid * (1 + x * (1 - sigmoid));
}

// out = silu(x), or with dout its gradient, dout·silu'(x)
__global__ void silu_kernel(float *out, const float *x, const float *dout, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = dout ? dout[i] * silu_slope(x[i]) : silu(x[i]);
}

// Between pictures (B,C,S,S) and tokens (B,T,C·p·p). A patch is (channel, row, column), as the patch layer wants it, or
// with channel_last (row, column, channel), as the final layer gives it. A block moves W tokens that lie side by side,
// by way of shared memory: on both sides, neighbouring threads have neighbouring addresses.
enum { PATCH_FLOATS = 4096 }; // the most that a block moves, or else one token
__global__ void patches_kernel(float *tokens, float *pictures, int to_picture, int channel_last, int C, int S, int p,
                               int W) {
    SHARED_DYNAMIC(float, strip);
    int side = S / p, strips = (side + W - 1) / W, row = blockIdx.x / strips, first = blockIdx.x % strips * W;
    int columns = min(W, side - first) * p, count = columns * C * p; // row: of tokens, counted over all pictures
    tokens += ((size_t)row * side + first) * C * p * p;
    pictures += ((size_t)row / side * C * S + row % side * p) * S + first * p;
    for (int i = threadIdx.x; i < count && to_picture; i += blockDim.x) strip[i] = tokens[i];
    if (to_picture) __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        int column = i % columns, r = i / columns % p, c = i / columns / p, within = r * p + column % p;
        float *there = strip + column / p * C * p * p + (channel_last ? within * C + c : c * p * p + within);
        float *here = pictures + ((size_t)c * S + r) * S + column;
        if (to_picture)
            *here = *there;
        else
            *there = *here;
    }
    if (to_picture) return;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) tokens[i] = strip[i];
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

// table (1000,256): row t is the cosines, then the sines, of the timestep's angles
static void time_embeddings(float *table, const Config *c) {
    for (int t = 0; t < DIFFUSION_STEPS; t++)
        for (int i = 0; i < 128; i++) {
            double angle = time_angle(c, t, i);
            table[t * 256 + i] = (float)cos(angle);
            table[t * 256 + 128 + i] = (float)sin(angle);
        }
}

// freq (B,256) = rows t of the table of embeddings of all timesteps
__global__ void time_kernel(float *freq, const float *table, const int *t) {
    freq[blockIdx.x * 256 + threadIdx.x] = table[t[blockIdx.x] * 256 + threadIdx.x];
}

// cond (B,D) comes in as the timestep's embedding, the label's is added; cond_pp = cond or, with label_only, the
// label's alone; and silu of both
__global__ void condition_kernel(float *cond, float *cond_pp, float *cond_silu, float *cond_pp_silu,
                                 const float *label_table, const int *y, int label_only, int B, int D) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= B * D) return;
    float label = label_table[(size_t)y[i / D] * D + i % D], c = cond[i] + label, pp = label_only ? label : c;
    cond[i] = c;
    cond_pp[i] = pp;
    cond_silu[i] = silu(c);
    cond_pp_silu[i] = silu(pp);
}

// dcond and dcond_pp (B,D) come in as gradients of silu(cond) and silu(cond_pp). dtable row y[b] += its own, picture by
// picture, since labels repeat; dcond becomes that of t_emb.
__global__ void condition_backward_kernel(float *dcond, const float *dcond_pp, float *dtable, const float *cond,
                                          const float *cond_pp, const int *y, int label_only, int B, int D) {
    int d = blockIdx.x * blockDim.x + threadIdx.x;
    if (d >= D) return;
    for (int b0 = 0; b0 < B; b0 += 8) { // eight at a time, for their loads
        float c[8], pp[8];
        EACH(j, 8) {
            int i = min(b0 + j, B - 1) * D + d;
            c[j] = dcond[i] * silu_slope(cond[i]), pp[j] = dcond_pp[i] * silu_slope(cond_pp[i]);
        }
        for (int j = 0; j < 8 && b0 + j < B; j++) {
            dtable[(size_t)y[b0 + j] * D + d] += c[j] + pp[j];
            dcond[(b0 + j) * D + d] = label_only ? c[j] : c[j] + pp[j];
        }
    }
}

// out = in as the type of activations
template <typename A>
__global__ void convert_kernel(A *out, const float *in, size_t count) {
    size_t i = 4 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    float v[4];
    if (i >= count) return; // counts are multiples of 4
    load(v, in + i);
    store(out + i, v);
}

// x += y, a multiple of 4 of them
__global__ void add_kernel(float *x, const float *y, size_t count) {
    size_t i = 4 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    float v[4], w[4];
    if (i >= count) return;
    load(v, x + i);
    load(w, y + i);
    EACH(j, 4) v[j] += w[j];
    store(x + i, v);
}

// ---------------------------------------------------------------------------------------------------------------------
// Activations: one allocation. The layers of the path that gets a gradient stand in a row, layer[l].x being the input
// of number l and the output of the one before:
//
//   pre blocks | the injection: x is h | m iterations: x is z_n, z_{n+1}, ... | post blocks | x alone: the last output
//   DiT: all blocks                                                                         | x alone: the last output
//
// The n iterations without gradient happen in place, in the x of the first iteration with gradient. In bf16 training x
// is z in bf16 there: the fp32 result of an iteration goes to `reused`, where nobody reads it once the copy is made.
// With `recompute` all layers share the rest of a Layer, which the backward pass fills again from x. A model that only
// samples has one rest and one x, with skip a second, as h must outlast the loop.

typedef struct {
    float *x;     // (B,T,D) input: the residual stream; of iterations in bf16 training: z in bf16
    Act *u;       // (B,T,2D) iterations only: the projection before its gelu
    float *in;    // (B,T,D)  iterations only: the block's input; elsewhere it is x
    Act *qkv;     // (B,T,3D)
    float *lse;   // (B,H,T)  log2 sum exp of the scores
    float *stats; // (2,B,T,2) mean and 1/sigma of both LayerNorms
    Act *att;     // (B,T,D)
    Act *proj;    // (B,T,D)
    Act *fc1;     // (B,T,4D) before its gelu
    Act *fc2;     // (B,T,D)
} Layer;

typedef struct {
    Layer *layer;
    float *pos, *time_table;         // (T,D); (1000,256) embeddings of all timesteps
    int *t, *y;                      // (B)
    float *x_t, *out;                // (B,C,S,S), (B,Cout,S,S) input and output of the model
    float *patches, *patch_out;      // (B,T,C·p·p), (B,T,p·p·Cout)
    float *time_freq;                // (B,256)
    float *time_hidden, *time_silu;  // (B,D) before and after silu
    float *cond, *cond_pp;           // (B,D) timestep + label; what pre, post and final layers see
    float *cond_silu, *cond_pp_silu; // (B,D)
    float *mod, *final_mod;          // (blocks,B,6D), (B,2D), computed once per timestep
    Act *inj;                        // (B,T,D) injection
    float *inj_part;                 // (B,T,2D) the half of the projection that does not change while z iterates
    Act *z;                          // (B,T,D) bf16 only: z for the matmul (sampling)
    Act *normed;                     // (B,T,D) scratch: LN output
    Act *gelu;                       // (B,T,4D) scratch: gelu output
    float *final_normed;             // (B,T,D) the final LN's output, for its backward pass too
    float *final_stats;              // (B,T,2)
    float *z_before;                 // (B,T,D) z_{k-1} where it is needed (sampling)
    float *reused;                   // (B,T,D) the solution of the timestep before; in bf16 training: z
    float *history;                  // (B,window+1,2,T,D) Anderson acceleration: f, then g of the latest iterations
    double *gram;                    // (B,HISTORY,HISTORY) the products of its f
    // backward
    float *dx;              // (B,T,D)
    Act *dx_act;            // (B,T,D) bf16 only: the same for a matmul
    Act *dnormed, *dbranch; // (B,T,D) gradients of an LN's output, of proj and fc2
    Act *dwide;             // (B,T,4D) scratch: the gradient of fc1, qkv or u, whichever is at hand
    float *dq;              // (B,T,D) scratch: sums of attention's backward pass
    float *recomputed;      // (B,T,D) scratch: the stream of a block that recompute runs again; its end nobody needs
    float *du_sum;          // (B,T,2D) gradient of inj_part, summed over the iterations
    float *dmod, *dfinal_mod, *dcond, *dcond_pp, *dtime;
    float *parts; // (B,ceil(T/8),3,D) at most: sums over some tokens, see layernorm_backward_kernel
    float *dout;  // (B,Cout,S,S)
    Act *muon[4]; // (MUON_ROOM,D,D) scratch of the optimiser Muon: twice its matrices, twice their squares
    // of Part 2 and Part 3
    float *picture, *noise;   // (B,C,S,S) x0 in training, x in sampling
    float *before;            // (B,C,S,S) sampling: the velocity of the timestep before
    struct LossPlace *places; // (B)
    struct SampleStep *steps; // (1000) in sampling order
    int *step;                // the place in them
    double *sums;             // (B,2) or partial sums of the gradient norm
} Activations;

typedef struct { // a recording of what model_loss has the GPU do for B pictures
    int B, n, m;
    double scale;
    cudaGraphExec_t exec;
} StepGraph;
#ifndef MAX_GRAPHS
#define MAX_GRAPHS 512 // 0, for a device that cannot record: every kernel is launched each time
#endif

enum Kind { MODEL_WEIGHTS, MODEL_GRADS, MODEL_ADAM_M, MODEL_ADAM_V, MODEL_EMA };
typedef struct {
    Config config;
    int batch, max_m, recompute, training, window; // what the activations have room for
    int half;                                      // activations are bf16
    int n_tensors;
    ParamTensor *tensors;
    int64_t n_params;
    real *memory[5];    // by enum Kind; only weights unless training
    bf16 *half_weights; // of the weights in use, for matmuls; laid out alike
    Params p, g;
    Activations a;
    char *activations;                // what `a` points into
    size_t activation_bytes, scratch; // from byte `scratch` on, nothing lasts longer than a forward and backward pass
    int B, grad_iters;                // of the current forward pass
    void (*probe)(const char *name, const real *data, int64_t count); // tests look at activations through this
    struct LossPlace *places;                                         // (batch), the host's
    double *mse, *vb;                                                 // where model_wait puts the losses
    StepGraph *graphs;                                                // MAX_GRAPHS of them
    int n_graphs;
} Model;

// ---------------------------------------------------------------------------------------------------------------------
// The layers at work on a model: its sizes, its type of activations

// A weight as what the matmuls take
static const Act *act_weight(const Model *m, const real *w) {
    if (!m->half) return (const Act *)w;
    const real *first = m->p.patch_w; // the first of all
    return (const Act *)(m->half_weights + (w - first));
}

// out = in, as activations; in fp32 simply `in`
static const Act *as_act(const Model *m, Act *out, const float *in, size_t count) {
    if (!m->half) return (const Act *)in;
    RUN((convert_kernel<bf16>), (unsigned)ceil_div(count, 4 * 256), 256, 0, (bf16 *)out, in, count);
    return out;
}

static void add(float *x, const float *y, size_t count) {
    RUN(add_kernel, (unsigned)ceil_div(count, 4 * 256), 256, 0, x, y, count);
}

// normed = LN(x)·(1+scale)+shift, mod pointing at shift, of which a picture has `vectors` (6; 2 in the final layer).
// stats: what the backward pass needs, unless NULL
static void layernorm_forward(Model *m, int half, Act *normed, float *stats, const float *x, const float *mod,
                              int vectors) {
    int T = config_tokens(&m->config), D = m->config.width, rows = m->B * T;
    TYPED(half, RUN((layernorm_modulate_kernel<A>), (unsigned)ceil_div(rows, ROWS_PER_BLOCK), ROW_THREADS, 0,
                    (A *)normed, stats, x, mod, vectors * D, rows, T, D));
}

// dx += the gradient through that layer, dmod += that of shift and scale; copy, normed, and the gated residual that dx
// goes on to, with dgate += its gate's gradient: see the kernel
static void layernorm_backward(Model *m, int half, float *dx, Act *copy, Act *normed, float *dmod, const Act *dout,
                               const float *x, const float *stats, const float *mod, int vectors, Act *dbranch = NULL,
                               float *dgate = NULL, const float *gate = NULL, const Act *branch = NULL, int add = 0) {
    int T = config_tokens(&m->config), D = m->config.width, stride = vectors * D;
    size_t row = D * 2 * (sizeof(float) + (half ? sizeof(bf16) : sizeof(float)));
    int chunk = (size_t)m->B * T >= (size_t)64 * gpu.sms ? 4 * LN_CHUNK : LN_CHUNK, chunks = (int)ceil_div(T, chunk);
    size_t fits = (gpu.shared - 1024) / 2 / (LN_STAGES * row + 4 * sizeof(float)); // two blocks a multiprocessor
    int group = fits < 1 ? 1 : fits < LN_GROUP ? (int)fits : LN_GROUP;
    int threads = imin(LN_THREADS / WARP, (int)ceil_div(D, 4 * WARP)) * WARP;
    TYPED(half,
          RUN((layernorm_backward_kernel<A>), dim3(chunks, m->B), threads,
              group * (LN_STAGES * row + 4 * sizeof(float)), dx, (A *)copy, (A *)normed, m->a.parts, (const A *)dout, x,
              stats, add, mod, (A *)dbranch, (const A *)branch, gate, stride, chunk, group, T, D));
    RUN(column_sums_kernel, dim3((unsigned)ceil_div(D, 128), m->B, 3), 128, 0, dmod, dgate, m->a.parts, stride, chunks,
        D);
}

// dbranch and dgate from dx alone
static void gate_backward(Model *m, Act *dbranch, float *dgate, float *dx, const float *gate, const Act *branch) {
    layernorm_backward(m, m->half, dx, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 6, dbranch, dgate, gate, branch);
}

// y = x·w^T + b, activations
static void linear_forward(Model *m, Act *y, const Act *x, const real *w, const real *b, int M, int K, int N) {
    matmul<false, false, EPI_STORE>(m->half, linear(y, x, act_weight(m, w), K, b, M, K, N));
}

// out = x + gate·(in·w^T + b). branch, unless NULL, keeps what gate multiplies; copy, unless NULL, is out as
// activations.
static void gated_linear_forward(Model *m, float *out, Act *copy, Act *branch, const float *x, const float *gate,
                                 const Act *in, const real *w, const real *b, int K) {
    int T = config_tokens(&m->config), D = m->config.width;
    Matmul g = linear(out, in, act_weight(m, w), K, b, m->B * T, K, D);
    g.residual = x, g.gate = gate, g.gate_stride = 6 * D, g.tokens = T;
    g.pre = branch, g.copy = copy;
    matmul<false, false, EPI_GATED>(m->half, g);
}

// out = gelu(x·w^T + add), w with row stride ldw; add (N), a bias, or with add_each (M,N); pre, unless NULL, keeps what
// gelu is applied to
static void gelu_linear_forward(Model *m, Act *out, Act *pre, const Act *x, const real *w, int ldw, const float *add,
                                int add_each, int K, int N) {
    int M = m->B * config_tokens(&m->config);
    Matmul g = linear(out, x, act_weight(m, w), ldw, NULL, M, K, N);
    g.add = add, g.add_rows = add_each ? M : 1, g.pre = pre;
    matmul<false, false, EPI_GELU>(m->half, g);
}

// dpre = (dy·w)·gelu'(pre), act = gelu(pre) for w's own gradient, sum += dpre unless NULL. w (N,K): pre (M,K)
static void gelu_linear_backward(Model *m, Act *dpre, Act *act, float *sum, const Act *dy, const real *w,
                                 const Act *pre, int K, int N) {
    Matmul g = linear_input(dpre, dy, act_weight(m, w), K, m->B * config_tokens(&m->config), K, N);
    g.pre = (void *)pre, g.copy = act, g.sum = sum;
    matmul<false, true, EPI_DGELU>(m->half, g);
}

// dx of a linear layer between activations
static void linear_input_backward(Model *m, Act *dx, const Act *dy, const real *w, int M, int K, int N) {
    matmul<false, true, EPI_STORE>(m->half, linear_input(dx, dy, act_weight(m, w), K, M, K, N));
}

// Between pictures and tokens in patches: see the kernel
static void move_patches(Model *m, float *tokens, float *pictures, int to_picture, int channel_last, int C) {
    int S = m->config.image_size, p = m->config.patch, side = S / p;
    int W = imin(side, PATCH_FLOATS / (C * p * p) > 1 ? PATCH_FLOATS / (C * p * p) : 1);
    RUN(patches_kernel, (unsigned)(m->B * side * ceil_div(side, W)), 256, W * C * p * p * sizeof(float), tokens,
        pictures, to_picture, channel_last, C, S, p, W);
}

static float bf16_to_float(uint16_t h); // from Part 5

// Shows floats, or with `act` activations, to whoever tests.
static void show_probe(Model *m, const char *name, int k, const void *data, int act, int64_t count) {
    char text[32];
    if (!m->probe) return;
    snprintf(text, sizeof text, k ? "%s.%d" : "%s", name, k);
    int half = act && m->half;
    float *host = (float *)xcalloc((size_t)count, sizeof *host, "a probe");
    uint16_t *bits = (uint16_t *)host;
    gpu_download(host, data, (size_t)count * (half ? sizeof(bf16) : sizeof(float)));
    for (int64_t i = count - 1; half && i >= 0; i--) host[i] = bf16_to_float(bits[i]);
    m->probe(text, host, count);
    xfree(host);
}

// shift1, scale1, gate1, shift2, scale2, gate2 (6D) of block `index` and picture 0, in a->mod or a->dmod; the next
// picture's follow.
static float *block_mod(const Model *m, float *mod, int index) {
    return mod + (size_t)index * m->batch * 6 * m->config.width;
}

// out = Block(x, c): adaLN-Zero transformer block; with `keep`, l keeps what the backward pass needs. out may be x.
//   mid = x + gate1·proj(attention(LN(x)·(1+scale1)+shift1))
//   out = mid + gate2·fc2(gelu(fc1(LN(mid)·(1+scale2)+shift2)))
// copy, unless NULL, is out as activations.
static void block_forward(Model *m, float *out, Act *copy, const float *x, Layer *l, int index, int keep) {
    Activations *a = &m->a;
    const BlockParams *p = &m->p.block[index];
    const float *mod = block_mod(m, a->mod, index);
    int B = m->B, T = config_tokens(&m->config), D = m->config.width, M = B * T;
    layernorm_forward(m, m->half, a->normed, keep ? l->stats : NULL, x, mod, 6);
    linear_forward(m, l->qkv, a->normed, p->qkv_w, p->qkv_b, M, D, 3 * D);
    attention_forward(m->half, l->att, keep ? l->lse : NULL, l->qkv, B, T, D, m->config.heads);
    gated_linear_forward(m, out, NULL, keep ? l->proj : NULL, x, mod + 2 * D, l->att, p->proj_w, p->proj_b, D);
    layernorm_forward(m, m->half, a->normed, keep ? l->stats + 2 * M : NULL, out, mod + 3 * D, 6);
    gelu_linear_forward(m, a->gelu, keep ? l->fc1 : NULL, a->normed, p->fc1_w, D, p->fc1_b, 0, D, 4 * D);
    gated_linear_forward(m, out, copy, keep ? l->fc2 : NULL, out, mod + 5 * D, a->gelu, p->fc2_w, p->fc2_b, 4 * D);
}

// dx (B,T,D): the gradient of the output on entry, of the input on return, then also in copy (unless NULL). x is the
// input. above: x is the output of block index - 1, whose Layer is l[-1]; the last pass over dx then also makes that
// block's first gradients, those of its gate2 and fc2. below: the block after this one has done so for this.
static void block_backward(Model *m, float *dx, Act *copy, const float *x, Layer *l, int index, int below, int above) {
    Activations *a = &m->a;
    const BlockParams *p = &m->p.block[index], *g = &m->g.block[index];
    const float *mod = block_mod(m, a->mod, index);
    float *dmod = block_mod(m, a->dmod, index);
    Act *dfc2 = a->dbranch, *dproj = a->dbranch, *dfc1 = a->dwide, *dqkv = a->dwide;
    int B = m->B, T = config_tokens(&m->config), D = m->config.width, M = B * T;
    // MLP branch
    if (!below) gate_backward(m, dfc2, dmod + 5 * D, dx, mod + 5 * D, l->fc2);
    gelu_linear_backward(m, dfc1, a->gelu, NULL, dfc2, p->fc2_w, l->fc1, 4 * D, D);
    linear_weight(m->half, g->fc2_w, 4 * D, g->fc2_b, dfc2, a->gelu, M, 4 * D, D);
    linear_input_backward(m, a->dnormed, dfc1, p->fc1_w, M, D, 4 * D);
    layernorm_backward(m, m->half, dx, NULL, a->normed, dmod + 3 * D, a->dnormed, x, l->stats + 2 * M, mod + 3 * D, 6,
                       dproj, dmod + 2 * D, mod + 2 * D, l->proj, 1);
    linear_weight(m->half, g->fc1_w, D, g->fc1_b, dfc1, a->normed, M, D, 4 * D);
    // Attention branch
    linear_input_backward(m, a->dnormed, dproj, p->proj_w, M, D, D);
    linear_weight(m->half, g->proj_w, D, g->proj_b, dproj, l->att, M, D, D);
    attention_backward(m->half, dqkv, a->dq, a->dnormed, l->att, l->lse, l->qkv, B, T, D, m->config.heads);
    linear_input_backward(m, a->dnormed, dqkv, p->qkv_w, M, D, 3 * D);
    size_t next = (size_t)m->batch * 6 * D; // from the modulation of the block below
    layernorm_backward(m, m->half, dx, copy, a->normed, dmod, a->dnormed, x, l->stats, mod, 6, a->dbranch,
                       above ? dmod - next + 5 * D : NULL, above ? mod - next + 5 * D : NULL, above ? l[-1].fc2 : NULL);
    linear_weight(m->half, g->qkv_w, D, g->qkv_b, dqkv, a->normed, M, D, 3 * D);
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

// out = Block(fp2·gelu(z·fp1_z + inj_part), c); with `keep`, l keeps what the backward pass needs. copy, unless NULL,
// is out as activations, for the next iteration; out or copy may be z.
static void iteration_forward(Model *m, float *out, Act *copy, const Act *z, Layer *l, int keep) {
    Activations *a = &m->a;
    int D = m->config.width, M = m->B * config_tokens(&m->config);
    gelu_linear_forward(m, a->gelu, keep ? l->u : NULL, z, m->p.fp1_w, 2 * D, a->inj_part, 1, D, 2 * D);
    matmul<false, false, EPI_FLOAT>(m->half,
                                    linear(l->in, a->gelu, act_weight(m, m->p.fp2_w), 2 * D, m->p.fp2_b, M, 2 * D, D));
    block_forward(m, out, copy, l->in, l, m->config.pre_depth, keep);
}

// dz (B,T,D): the gradient of the output on entry; on return, unless `first`, of z. Nothing flows into the first z.
// below: see block_backward
static void iteration_backward(Model *m, float *dz, Layer *l, int first, int below) {
    Activations *a = &m->a;
    int D = m->config.width, M = m->B * config_tokens(&m->config);
    Act *du = a->dwide;
    block_backward(m, dz, a->dx_act, l->in, l, m->config.pre_depth, below, 0);
    const Act *dz_act = m->half ? a->dx_act : (const Act *)dz;
    gelu_linear_backward(m, du, a->gelu, a->du_sum, dz_act, m->p.fp2_w, l->u, 2 * D, D);
    linear_weight(m->half, m->g.fp2_w, 2 * D, m->g.fp2_b, dz_act, a->gelu, M, 2 * D, D);
    linear_weight(m->half, m->g.fp1_w, 2 * D, NULL, du, (const Act *)l->x, M, D, 2 * D);
    if (!first)
        matmul<false, true, EPI_FLOAT>(m->half, linear_input(dz, du, act_weight(m, m->p.fp1_w), 2 * D, M, D, 2 * D));
}

// inj = inject·h and its share of fp1, where h is l->x
static void injection_forward(Model *m, const Layer *l) {
    Activations *a = &m->a;
    int D = m->config.width, M = m->B * config_tokens(&m->config);
    linear_forward(m, a->inj, as_act(m, a->normed, l->x, (size_t)M * D), m->p.inject_w, m->p.inject_b, M, D, D);
    matmul<false, false, EPI_FLOAT>(
        m->half, linear(a->inj_part, a->inj, act_weight(m, m->p.fp1_w + D), 2 * D, m->p.fp1_b, M, D, 2 * D));
}

// dh (B,T,D) = the gradient of h by way of inj; h is the first z too, but as a constant
static void injection_backward(Model *m, float *dh, const Layer *l) {
    Activations *a = &m->a;
    int D = m->config.width, M = m->B * config_tokens(&m->config);
    size_t N = (size_t)M * D;
    const Act *du = as_act(m, a->dwide, a->du_sum, 2 * N);
    Act *dinj = a->dnormed;
    linear_weight(m->half, m->g.fp1_w + D, 2 * D, m->g.fp1_b, du, a->inj, M, D, 2 * D);
    matmul<false, true, EPI_STORE>(m->half, linear_input(dinj, du, act_weight(m, m->p.fp1_w + D), 2 * D, M, D, 2 * D));
    linear_weight(m->half, m->g.inject_w, D, m->g.inject_b, dinj, as_act(m, a->normed, l->x, N), M, D, D);
    matmul<false, true, EPI_FLOAT>(m->half, linear_input(dh, dinj, act_weight(m, m->p.inject_w), D, M, D, D));
}

// From Part 2: how sampling measures and speeds up the iteration
static double residual_of(Model *m, const float *z, size_t count);
static void anderson_forward(Model *m, float *z, int k, int window, double mixing);

// From z = start, n iterations in place, then grad_iters that keep a Layer each. Returns the layer behind the last.
// In training, of a z that only the next iteration reads, bf16 is enough: that is what l->x is then.
static Layer *fixed_point_forward(Model *m, Layer *l, const float *start, int n, int grad_iters, Solve *solve) {
    Activations *a = &m->a;
    size_t count = (size_t)config_tokens(&m->config) * m->config.width, N = m->B * count;
    int alone = m->half && !solve;
    assert(solve || n + grad_iters > 0); // without iterations l->x would stay in bf16
    auto z_act = [&](Layer *at) { return m->half && solve ? a->z : (Act *)at->x; };
    if (l->x != start && !alone) gpu_copy(l->x, start, N * sizeof(float));
    as_act(m, z_act(l), start, N);
    for (int k = 1; k <= n + grad_iters; k++) {
        Layer *next = k <= n ? l : l + 1;
        int between = alone && k < n + grad_iters;
        float *z = between ? a->reused : next->x;
        if (solve && (solve->want_residual || solve->window)) gpu_copy(a->z_before, l->x, N * sizeof(float));
        iteration_forward(m, z, between || (m->half && solve) ? z_act(next) : NULL, z_act(l), l,
                          k > n && !solve && !m->recompute);
        l = next;
        show_probe(m, "act.z", k, z, 0, N);
        if (!solve) continue;
        solve->ran = k;
        if (solve->want_residual) solve->residuals[k - 1] = residual_of(m, z, count);
        int last = k == n + grad_iters || (solve->want_residual && solve->residuals[k - 1] < solve->tol);
        if (solve->window) anderson_forward(m, z, k, solve->window, last ? 1 : solve->mixing);
        if (last) break;
    }
    return l;
}

// ---------------------------------------------------------------------------------------------------------------------
// Conditioning: cond and cond_pp from a.t (B) and a.y (B), and with them the modulation of every block, constant while
// z iterates. All of this is fp32: it is one row a picture.

static void condition_forward(Model *m) {
    const Config *c = &m->config;
    Activations *a = &m->a;
    int B = m->B, D = c->width, blocks = config_blocks(c), label_only = !c->timestep_in_pre_post && c->fixed_point;
    unsigned wide = (unsigned)ceil_div((size_t)B * D, 256);
    RUN(time_kernel, B, 256, 0, a->time_freq, a->time_table, a->t);
    matmul<false, false, EPI_FLOAT>(0,
                                    linear(a->time_hidden, a->time_freq, m->p.time0_w, 256, m->p.time0_b, B, 256, D));
    RUN(silu_kernel, wide, 256, 0, a->time_silu, a->time_hidden, (const float *)NULL, B * D);
    matmul<false, false, EPI_FLOAT>(0, linear(a->cond, a->time_silu, m->p.time2_w, D, m->p.time2_b, B, D, D));
    RUN(condition_kernel, wide, 256, 0, a->cond, a->cond_pp, a->cond_silu, a->cond_pp_silu, m->p.label_table, a->y,
        label_only, B, D);
    for (int i = 0; i < blocks; i++) {
        const float *cond = c->fixed_point && i == c->pre_depth ? a->cond_silu : a->cond_pp_silu;
        matmul<false, false, EPI_FLOAT>(
            0, linear(block_mod(m, a->mod, i), cond, m->p.block[i].ada_w, D, m->p.block[i].ada_b, B, D, 6 * D));
    }
    matmul<false, false, EPI_FLOAT>(
        0, linear(a->final_mod, a->cond_pp_silu, m->p.final_ada_w, D, m->p.final_ada_b, B, D, 2 * D));
}

static void condition_backward(Model *m) {
    const Config *c = &m->config;
    Activations *a = &m->a;
    int B = m->B, D = c->width, blocks = config_blocks(c), label_only = !c->timestep_in_pre_post && c->fixed_point;
    gpu_zero(a->dcond, (size_t)B * D * sizeof(float));
    gpu_zero(a->dcond_pp, (size_t)B * D * sizeof(float));
    for (int i = -1; i < blocks; i++) { // -1: the final layer
        int fixed = c->fixed_point && i == c->pre_depth, N = i < 0 ? 2 * D : 6 * D;
        const float *dmod = i < 0 ? a->dfinal_mod : block_mod(m, a->dmod, i);
        const real *w = i < 0 ? m->p.final_ada_w : m->p.block[i].ada_w;
        real *dw = i < 0 ? m->g.final_ada_w : m->g.block[i].ada_w, *db = i < 0 ? m->g.final_ada_b : m->g.block[i].ada_b;
        linear_weight(0, dw, D, db, dmod, fixed ? a->cond_silu : a->cond_pp_silu, B, D, N);
        matmul<false, true, EPI_WEIGHT>(0, linear_input(fixed ? a->dcond : a->dcond_pp, dmod, w, D, B, D, N));
    }
    RUN(condition_backward_kernel, (unsigned)ceil_div(D, 128), 128, 0, a->dcond, a->dcond_pp, m->g.label_table, a->cond,
        a->cond_pp, a->y, label_only, B, D);
    linear_weight(0, m->g.time2_w, D, m->g.time2_b, a->dcond, a->time_silu, B, D, D);
    float *dtime_silu = a->dcond_pp; // which is done with
    matmul<false, true, EPI_FLOAT>(0, linear_input(dtime_silu, a->dcond, m->p.time2_w, D, B, D, D));
    RUN(silu_kernel, (unsigned)ceil_div((size_t)B * D, 256), 256, 0, a->dtime, a->time_hidden, dtime_silu, B * D);
    linear_weight(0, m->g.time0_w, 256, m->g.time0_b, a->dtime, a->time_freq, B, 256, D);
}

// ---------------------------------------------------------------------------------------------------------------------
// The whole model

// a.out (B,Cout,S,S) from a.x_t (B,C,S,S), timesteps a.t (B) and labels a.y (B): n iterations that keep nothing, then
// grad_iters, elsewhere called m, that keep what backpropagation needs (none when sampling). In DiT both mean nothing.
static void model_forward(Model *m, int B, int n, int grad_iters, Solve *solve) {
    const Config *c = &m->config;
    Activations *a = &m->a;
    int T = config_tokens(c), D = c->width, M = B * T, p = c->patch, Cout = config_out_channels(c), i = 0;
    int keep = !solve && !m->recompute;
    size_t N = (size_t)M * D;
    Layer *l = a->layer;
    assert(B <= m->batch && grad_iters <= (m->training ? m->max_m : 0));
    m->B = B;
    m->grad_iters = c->fixed_point ? grad_iters : 0;
    gpu.unsplit = solve != NULL;
    condition_forward(m);
    move_patches(m, a->patches, a->x_t, 0, 0, c->channels);
    Matmul embed = linear(l->x, a->patches, m->p.patch_w, c->channels * p * p, m->p.patch_b, M, c->channels * p * p, D);
    embed.add = a->pos;
    embed.add_rows = T;
    matmul<false, false, EPI_FLOAT>(0, embed);
    show_probe(m, "act.tokens", 0, l->x, 0, N);
    for (; i < (c->fixed_point ? c->pre_depth : c->depth); i++, l++) block_forward(m, l[1].x, NULL, l->x, l, i, keep);
    if (c->fixed_point) {
        show_probe(m, "act.pre", 0, l->x, 0, N);
        injection_forward(m, l);
        show_probe(m, "act.inj", 0, a->inj, 1, N);
        const float *start = solve && solve->reuse && solve->reuse_ready ? a->reused : l->x;
        l++;
        l = fixed_point_forward(m, l, start, n, grad_iters, solve);
        if (solve && solve->reuse) {
            gpu_copy(a->reused, l->x, N * sizeof(float));
            solve->reuse_ready = 1;
        }
        if (c->skip) add(l->x, a->layer[c->pre_depth].x, N);
        for (i++; i < config_blocks(c); i++, l++) block_forward(m, l[1].x, NULL, l->x, l, i, keep);
    }
    show_probe(m, "act.post", 0, l->x, 0, N);
    layernorm_forward(m, 0, (Act *)a->final_normed, a->final_stats, l->x, a->final_mod, 2); // the final layer is fp32
    matmul<false, false, EPI_FLOAT>(
        0, linear(a->patch_out, a->final_normed, m->p.final_w, D, m->p.final_b, M, D, p * p * Cout));
    move_patches(m, a->patch_out, a->out, 1, 1, Cout);
    show_probe(m, "output", 0, a->out, 0, (int64_t)B * Cout * c->image_size * c->image_size);
}

// Gradient of block i, of which `last` has the gradient of its output in a.dx alone
static void block_backward_at(Model *m, Layer *l, int i, int last) {
    int chain = !m->recompute; // otherwise the branch of the block below is not there yet
    if (m->recompute) block_forward(m, m->a.recomputed, NULL, l->x, l, i, 1);
    block_backward(m, m->a.dx, NULL, l->x, l, i, chain && !last, chain && i > 0);
}

// Adds to the gradients those of the loss whose gradient with respect to the output is a.dout.
static void model_backward(Model *m) {
    const Config *c = &m->config;
    Activations *a = &m->a;
    int B = m->B, T = config_tokens(c), D = c->width, M = B * T, p = c->patch, Cout = config_out_channels(c);
    int i = config_blocks(c) - 1;
    size_t N = (size_t)M * D;
    Layer *l = a->layer + i + 1 + m->grad_iters; // the last output: blocks, iterations and the injection have a layer
    Act *dfinal_normed = a->dwide;               // in fp32; it has room for that
    gpu_zero(a->dx, N * sizeof(float));
    gpu_zero(a->dfinal_mod, (size_t)B * 2 * D * sizeof(float));
    gpu_zero(a->dmod, (size_t)config_blocks(c) * m->batch * 6 * D * sizeof(float));
    move_patches(m, a->patch_out, a->dout, 0, 1, Cout);
    linear_weight(0, m->g.final_w, D, m->g.final_b, a->patch_out, a->final_normed, M, D, p * p * Cout);
    matmul<false, true, EPI_FLOAT>(0, linear_input(dfinal_normed, a->patch_out, m->p.final_w, D, M, D, p * p * Cout));
    layernorm_backward(m, 0, a->dx, NULL, NULL, a->dfinal_mod, dfinal_normed, l->x, a->final_stats, a->final_mod, 2);
    if (c->fixed_point) {
        for (; i > c->pre_depth; i--) block_backward_at(m, --l, i, i == config_blocks(c) - 1);
        float *dskip = l->x; // which is not needed any more
        if (c->skip) gpu_copy(dskip, a->dx, N * sizeof(float));
        gpu_zero(a->du_sum, 2 * N * sizeof(float));
        for (int k = m->grad_iters; k > 0; k--) {
            l--;
            if (m->recompute) iteration_forward(m, a->recomputed, NULL, (const Act *)l->x, l, 1);
            iteration_backward(m, a->dx, l, k == 1, k == m->grad_iters && c->post_depth && !m->recompute);
        }
        injection_backward(m, a->dx, --l);
        if (c->skip) add(a->dx, dskip, N);
        i--;
    }
    for (int last = i; i >= 0; i--) block_backward_at(m, --l, i, i == last);
    linear_weight(0, m->g.patch_w, c->channels * p * p, m->g.patch_b, a->dx, a->patches, M, c->channels * p * p, D);
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

typedef struct LossPlace {          // of one picture: its place in the schedule
    double keep, noise;             // x_t = keep·x0 + noise·eps
    double target_x0, target_noise; // what the model should give is target_x0·x0 + target_noise·eps
    double weight;                  // of the squared error
    double slip;                    // x0_hat - x0 = slip·(target - out)
    double c1, log_beta, log_var;
    int t;
} LossPlace;

// Where each picture stands in the schedule
static void loss_places(LossPlace *places, const Schedule *s, const Config *c, const int *t, int B) {
    for (int b = 0; b < B; b++) {
        double ab = s->alpha_bar[t[b]], a = sqrt(ab), n = sqrt(1 - ab), tau = t[b] / (double)DIFFUSION_STEPS;
        LossPlace *p = &places[b];
        int straight = config_straight(c), v = c->prediction == PREDICT_V, x = c->prediction == PREDICT_X;
        p->t = t[b];
        p->keep = straight ? 1 - tau : a;
        p->noise = straight ? tau : n;
        p->target_x0 = straight ? 1 : v ? -n : 0;
        p->target_noise = x ? 0 : straight ? -1 : v ? a : 1;
        p->weight = v && c->v_weight == V_WEIGHT_P2 ? ab / n * (1 - ab) : 1; // (x0-x0_hat)^2 = (1-ab)(v-out)^2
        if (x) p->weight = 1 / (clamped_tau(t[b]) * clamped_tau(t[b]));      // the velocity's error
        p->slip = v ? n : n / a;
        p->c1 = s->c1[t[b]];
        p->log_beta = s->log_beta[t[b]];
        p->log_var = s->log_var[t[b]];
    }
}

// x_t = sqrt(alpha_bar)·x0 + sqrt(1-alpha_bar)·noise, or for flow and x (1-tau)·x0 + tau·noise with tau = t/1000. All
// (B,C,S,S), `count` a picture.
__global__ void diffuse_kernel(float *x_t, int *t, const float *x0, const float *noise, const LossPlace *places,
                               size_t count) {
    const LossPlace p = places[blockIdx.y];
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, at = blockIdx.y * count + i;
    if (i < count) x_t[at] = (float)(p.keep * x0[at] + p.noise * noise[at]);
    if (i == 0) t[blockIdx.y] = p.t;
}

// cdf of the standard normal by its tanh form, and its derivative
__device__ inline double normal_cdf(double u, double *slope) {
    double th = tanh(0.7978845608028654 * (u + 0.044715 * u * u * u));
    *slope = 0.5 * (1 - th * th) * 0.7978845608028654 * (1 + 0.134145 * u * u);
    return 0.5 * (1 + th);
}

// One element's variational term in nats: KL(q || p) of two Gaussians for t > 0, minus log p(x0) of the discretised
// Gaussian at t = 0, where the true mean is x0. miss = mean of p - true mean. *slope = its derivative with respect to
// log_var, the log variance of p.
__device__ inline double variational_term(double *slope, int t, double x0, double miss, double log_var,
                                          double true_log_var) {
    if (t > 0) {
        double ratio = exp(true_log_var - log_var), square = miss * miss * exp(-log_var);
        *slope = 0.5 * (1 - ratio - square);
        return 0.5 * (-1 + log_var - true_log_var + ratio + square);
    }
    double inverse = exp(-0.5 * log_var), upper = inverse * (1 / 255.0 - miss), lower = inverse * (-1 / 255.0 - miss);
    double upper_slope, lower_slope, upper_cdf = normal_cdf(upper, &upper_slope),
                                     lower_cdf = normal_cdf(lower, &lower_slope);
    if (x0 < -0.999) lower_cdf = lower_slope = 0;
    if (x0 > 0.999) upper_cdf = 1, upper_slope = 0;
    double mass = upper_cdf - lower_cdf; // probability of the bin; d u / d log_var = -u/2
    *slope = mass < 1e-12 ? 0 : 0.5 * (upper * upper_slope - lower * lower_slope) / mass;
    return -log(mass < 1e-12 ? 1e-12 : mass);
}

// sums (B,2): the (weighted) squared error and the variational term in bits, means over each picture's `count`
// elements. dout (B,Cout,S,S) becomes the gradient of `scale` times the sum of both over the pictures; the variational
// term's stops at the prediction and goes into the variance alone (arXiv:2102.09672). In double: this is 1e-4 of a
// step's work. A block a picture.
__global__ void loss_kernel(double *sums, float *dout, const float *out, const float *x0, const float *noise,
                            const LossPlace *places, int learn_sigma, double scale, size_t count) {
    SHARED_DYNAMIC(double, shared);
    const LossPlace p = places[blockIdx.x];
    double square = 0, bits = 0;
    for (size_t i = threadIdx.x; i < count; i += blockDim.x) {
        size_t at = blockIdx.x * count + i, out_at = blockIdx.x * count * (learn_sigma ? 2 : 1) + i;
        double error = p.target_x0 * x0[at] + p.target_noise * noise[at] - out[out_at];
        square += p.weight * error * error;
        dout[out_at] = (float)(-2 * scale * p.weight * error / count);
        if (!learn_sigma) continue;
        double slope, share = (out[out_at + count] + 1.0) / 2;
        double log_var = share * p.log_beta + (1 - share) * p.log_var;
        bits += variational_term(&slope, p.t, x0[at], p.c1 * p.slip * error, log_var, p.log_var);
        dout[out_at + count] = (float)(scale * slope * 0.5 * (p.log_beta - p.log_var) / log(2.0) / count);
    }
    square = block_sum(square, shared);
    bits = block_sum(bits, shared);
    if (threadIdx.x == 0) sums[2 * blockIdx.x] = square / count;
    if (threadIdx.x == 0) sums[2 * blockIdx.x + 1] = bits / log(2.0) / count;
}

// Forward, loss and backward of B pictures; the gradient of `scale`·(sum of their losses) is added to the model's
// gradients. x0, noise (B,C,S,S); t, y (B); n and m iterations without and with gradient. Fills mse and vb (B). All of
// these belong to the model until model_wait. What the GPU does is hundreds of kernels, and in small models they would
// take longer to launch than to run: the first time that sizes, n and m occur, they are recorded as a CUDA graph.
static void model_loss(Model *model, const Schedule *s, const float *x0, const float *noise, const int *t, const int *y,
                       int B, int n, int m, double scale, double *mse, double *vb) {
    const Config *c = &model->config;
    Activations *a = &model->a;
    size_t count = config_pixels(c);
    loss_places(model->places, s, c, t, B);
    gpu_upload(a->places, model->places, (size_t)B * sizeof *model->places);
    gpu_upload(a->picture, x0, B * count * sizeof *x0);
    gpu_upload(a->noise, noise, B * count * sizeof *noise);
    gpu_upload(a->y, y, (size_t)B * sizeof *y);
    model->mse = mse, model->vb = vb;
    if (!c->fixed_point) n = m = 0; // they mean nothing there: one graph for all
    StepGraph *graph = model->graphs, *end = graph + model->n_graphs;
    while (graph < end && (graph->B != B || graph->n != n || graph->m != m || graph->scale != scale)) graph++;
    int record = graph == end && model->n_graphs < MAX_GRAPHS && !model->probe; // a probe waits for the GPU
    if (graph == end) {
        if (record) graph_begin();
        RUN(diffuse_kernel, dim3((unsigned)ceil_div(count, 256), B), 256, 0, a->x_t, a->t, a->picture, a->noise,
            a->places, count);
        model_forward(model, B, n, m, NULL);
        RUN(loss_kernel, B, 512, MAX_WARPS * sizeof(double), a->sums, a->dout, a->out, a->picture, a->noise, a->places,
            c->learn_sigma, scale, count);
        model_backward(model);
        if (!record) return;
        *graph = {B, n, m, scale, graph_end()};
        model->n_graphs++;
    }
    model->B = B;
    CHECK(cudaGraphLaunch(graph->exec, gpu.stream));
}

// Waits until model_loss is done, and fills its mse and vb.
static void model_wait(Model *m) {
    double *sums = (double *)xcalloc(2 * (size_t)m->B, sizeof *sums, "a batch");
    gpu_download(sums, m->a.sums, 2 * (size_t)m->B * sizeof *sums);
    for (int b = 0; b < m->B; b++) m->mse[b] = sums[2 * b], m->vb[b] = sums[2 * b + 1];
    xfree(sums);
}

// ---------------------------------------------------------------------------------------------------------------------
// Sampling

// A sampler's step is linear: x <- of_x·x + of_out·out + sigma·z; the second order of flow adds of_change·(v - v of
// the timestep before), with v = v_x·x + v_out·out.
typedef struct SampleStep {
    int t, noisy;
    int learned; // sigma is exp(0.5 log var), with log var between these two as the model says
    double of_x, of_out, sigma, log_beta, log_var;
    double of_change, v_x, v_out;
} SampleStep;

// One timestep of the sampler: x (B,C,S,S) from itself, the model's output and the noise z; and the model's next input
// x_t, `copies` of it. `guided` elements of a picture follow out = uncond + cfg·(cond - uncond); 0: no guidance.
// before (B,C,S,S): the velocity of the timestep before, then of this one.
__global__ void sample_step_kernel(float *x, float *x_t, float *before, const float *out, const float *z,
                                   const SampleStep *steps, const int *step, double cfg, size_t guided, int copies,
                                   size_t count, size_t out_count, int B) {
    const SampleStep s = steps[*step];
    size_t e = (size_t)blockIdx.x * blockDim.x + threadIdx.x, b = blockIdx.y, at = b * count + e;
    if (e >= count) return;
    double v = out[b * out_count + e], sigma = s.sigma;
    if (e < guided) {
        double uncond = out[(B + b) * out_count + e];
        v = uncond + cfg * (v - uncond);
    }
    if (s.learned) {
        double share = (out[b * out_count + e + count] + 1.0) / 2;
        sigma = exp(0.5 * (share * s.log_beta + (1 - share) * s.log_var));
    }
    double velocity = s.v_x * x[at] + s.v_out * v, change = s.of_change ? s.of_change * (velocity - before[at]) : 0;
    float next = (float)(s.of_x * x[at] + s.of_out * v + change + (s.noisy ? sigma * z[at] : 0));
    before[at] = (float)velocity;
    x[at] = x_t[at] = next;
    if (copies > 1) x_t[B * count + at] = next;
}

// The timestep of every row, at the start (advance 0) and after each step (1)
__global__ void next_step_kernel(int *t, int *step, const SampleStep *steps, int advance, int count, int rows) {
    int next = *step + advance;
    __syncthreads();
    if (next < count)
        for (int i = threadIdx.x; i < rows; i += blockDim.x) t[i] = steps[next].t;
    if (threadIdx.x == 0) *step = next;
}

// The coefficients of each timestep, in sampling order: with x0_hat and eps_hat both linear in x and out, so is the
// step.
static void sample_steps(SampleStep *steps, const Schedule *s, const SampleSettings *set, const Config *c) {
    for (int k = 0; k < s->n; k++) {
        int i = s->n - 1 - k, v = c->prediction == PREDICT_V;
        SampleStep *p = &steps[k];
        double ab = s->alpha_bar[i], prev = s->alpha_bar_prev[i], a = sqrt(ab), n = sqrt(1 - ab);
        double x0_x = v ? a : 1 / a, x0_out = v ? -n : -n / a, eps_x = v ? n : 0, eps_out = v ? a : 1;
        p->t = s->t[i];
        if (set->sampler == SAMPLER_FLOW) {
            int picture = c->prediction == PREDICT_X; // is what the model gives; the velocity is (out - x)/tau
            p->of_out = picture ? s->dt[i] / s->tau[i] : s->dt[i];
            p->of_x = picture ? 1 - p->of_out : 1;
            p->v_x = picture ? -1 / s->tau[i] : 0;
            p->v_out = picture ? 1 / s->tau[i] : 1;
            p->of_change = s->dt[i] * ahead_of(s, set->order, i);
        } else if (set->sampler == SAMPLER_DDPM) {
            p->of_x = s->c1[i] * x0_x + s->c2[i];
            p->of_out = s->c1[i] * x0_out;
            p->learned = c->learn_sigma;
            p->log_beta = s->log_beta[i];
            p->log_var = s->log_var[i];
            p->sigma = exp(0.5 * s->log_beta[i]);
            p->noisy = i > 0;
        } else {
            p->sigma = set->eta * sqrt((1 - prev) / (1 - ab)) * sqrt(1 - ab / prev);
            double rest = 1 - prev - p->sigma * p->sigma, keep = sqrt(rest > 0 ? rest : 0);
            p->of_x = sqrt(prev) * x0_x + keep * eps_x;
            p->of_out = sqrt(prev) * x0_out + keep * eps_out;
            p->noisy = i > 0 && set->eta > 0;
        }
    }
}

// Draws B pictures: x (B,C,S,S) holds x_T on entry and the pictures on return. z (steps,B,C,S,S), the noise of each
// step, is given by tests; when NULL it is drawn: picture b is number first+b of the seed. The model needs room for 2B
// with guidance. A timestep is a few hundred short kernels, which would take longer to launch than to run: they are
// recorded as CUDA graphs, one for each number of iterations (timesteps that reuse nothing, or are not guided, have
// their own), and replayed. All that differs between timesteps is read from device memory.
static void sample_batch(Model *model, const Schedule *s, SampleSettings *set, float *x, const int *y, int B,
                         const float *z, uint64_t seed, int first) {
    const Config *c = &model->config;
    Activations *a = &model->a;
    int copies = set->cfg != 1 ? 2 : 1, most = copies * B, rows = 0, S = s->n, n_graphs = 0, zero = 0;
    size_t count = config_pixels(c), out_count = count * (c->learn_sigma ? 2 : 1);
    size_t guided_count = count / c->channels * imin(set->cfg_channels, c->channels);
    struct Graph {
        int iters, reuse_ready, rows;
        cudaGraphExec_t exec;
    } *graphs = (struct Graph *)xcalloc((size_t)S, sizeof *graphs, "sampling");
    SampleStep *steps = (SampleStep *)xcalloc((size_t)S, sizeof *steps, "sampling");
    int *labels = (int *)xcalloc((size_t)most, sizeof *labels, "sampling");
    float *noise = (float *)xcalloc(B * count, sizeof *noise, "sampling");
    Solve *solve = (Solve *)xcalloc(1, sizeof *solve, "sampling");
    solve->reuse = set->reuse && c->fixed_point;
    solve->want_residual = set->trace || set->tol > 0;
    solve->tol = set->tol;
    solve->window = set->window;
    solve->mixing = set->mixing;
    assert(set->window <= model->window);
    for (int b = 0; b < most; b++) labels[b] = b < B ? y[b] : c->classes;
    sample_steps(steps, s, set, c);
    gpu_upload(a->steps, steps, (size_t)S * sizeof *steps);
    gpu_upload(a->step, &zero, sizeof zero);
    gpu_upload(a->y, labels, (size_t)most * sizeof *labels);
    gpu_upload(a->picture, x, B * count * sizeof *x);
    for (int k = 0; k < copies; k++) gpu_copy(a->x_t + k * B * count, a->picture, B * count * sizeof *x);
    RUN(next_step_kernel, 1, 256, 0, a->t, a->step, a->steps, 0, S, most);
    for (int step = 0; step < S; step++) {
        if (set->path) gpu_download(x, a->picture, B * count * sizeof *x);
        path_keep(set, step, x, first, B, count);
        int i = S - 1 - step, iters = c->fixed_point ? set->iters[step] : 0, guided = is_guided(set, s->t[i]);
        if (guided && rows == B) solve->reuse_ready = 0; // the rows without label have no solution to start from
        rows = guided ? 2 * B : B;
        if (!z && steps[step].noisy)
            for (int b = 0; b < B; b++)
                rng_normal(noise + b * count, count, 0, seed, (uint32_t)((first + b) * DIFFUSION_STEPS + i), STREAM_Z);
        if (steps[step].noisy) {
            gpu_upload(a->noise, z ? z + step * B * count : noise, B * count * sizeof *noise);
            gpu_wait(); // the host draws the next step's into the same place
        }

        struct Graph *graph = graphs;
        while (graph < graphs + n_graphs &&
               (graph->iters != iters || graph->reuse_ready != solve->reuse_ready || graph->rows != rows))
            graph++;
        int plain = !MAX_GRAPHS || (solve->want_residual && c->fixed_point); // the residuals come to the host: no graph
        if (graph == graphs + n_graphs) {
            graph->iters = iters;
            graph->reuse_ready = solve->reuse_ready;
            graph->rows = rows;
            if (!plain) graph_begin();
            model_forward(model, rows, iters, 0, solve);
            RUN(sample_step_kernel, dim3((unsigned)ceil_div(count, 256), B), 256, 0, a->picture, a->x_t, a->before,
                a->out, a->noise, a->steps, a->step, set->cfg, guided ? guided_count : 0, copies, count, out_count, B);
            RUN(next_step_kernel, 1, 256, 0, a->t, a->step, a->steps, 1, S, most);
            if (!plain) {
                graph->exec = graph_end();
                n_graphs++;
            }
        }
        if (!plain) {
            CHECK(cudaGraphLaunch(graph->exec, gpu.stream));
            solve->ran = iters;
            solve->reuse_ready = solve->reuse;
        }
        if (step % 16 == 15) gpu_wait(); // so that progress tells of work, not of launches
        progress(B);
        int passes = c->fixed_point ? c->pre_depth + solve->ran + c->post_depth : c->depth;
        set->passes += passes;
        set->guidance += guided ? passes : 0;
        for (int k = 0; set->trace && first == 0 && k < solve->ran && c->fixed_point; k++)
            fprintf(set->trace, "%d,%d,%d,%.6g\n", step, s->t[i], k + 1, solve->residuals[k]);
    }
    gpu_download(x, a->picture, B * count * sizeof *x);
    path_keep(set, S, x, first, B, count);
    for (int i = 0; i < n_graphs; i++) CHECK(cudaGraphExecDestroy(graphs[i].exec));
    xfree(graphs);
    xfree(steps);
    xfree(labels);
    xfree(noise);
    xfree(solve);
}

// ---------------------------------------------------------------------------------------------------------------------
// Solvers: how far the iteration is, and how it gets there in fewer steps

// sums (B,2) = ||z - before||^2 and ||z||^2 of each picture, in double; a block a picture
__global__ void residual_kernel(double *sums, const float *z, const float *before, size_t count) {
    SHARED_DYNAMIC(double, shared);
    double change = 0, norm = 0;
#pragma unroll 4
    for (size_t i = threadIdx.x; i < count; i += blockDim.x) {
        size_t at = blockIdx.x * count + i;
        double difference = (double)z[at] - before[at];
        change += difference * difference;
        norm += (double)z[at] * z[at];
    }
    change = block_sum(change, shared);
    norm = block_sum(norm, shared);
    if (threadIdx.x == 0) sums[2 * blockIdx.x] = change;
    if (threadIdx.x == 0) sums[2 * blockIdx.x + 1] = norm;
}

// Mean over the pictures of ||z - z_before|| / ||z||
static double residual_of(Model *m, const float *z, size_t count) {
    double *sums = (double *)xcalloc(2 * (size_t)m->B, sizeof *sums, "residuals"), sum = 0;
    RUN(residual_kernel, m->B, 1024, MAX_WARPS * sizeof(double), m->a.sums, z, m->a.z_before, count);
    gpu_download(sums, m->a.sums, 2 * (size_t)m->B * sizeof *sums);
    for (int b = 0; b < m->B; b++) sum += sqrt(sums[2 * b] / (sums[2 * b + 1] > 0 ? sums[2 * b + 1] : 1));
    xfree(sums);
    return sum / m->B;
}

// a (m) minimises ||sum a_i f_i||^2 + R sum (a_i ||f_i||)^2 where sum a_i = 1, given the products f_i·f_j: all rows of
// (gram + R diag)·a are the same number. R keeps the weights of nearly parallel residuals small. Where no unique a
// exists because a residual is zero, the newest counts alone. One thread of a block calls this.
__device__ inline void anderson_weights(double a[HISTORY], const double *gram, int m, int newest) {
    __shared__ double A[HISTORY][HISTORY]; // in local memory it would be reserved for every thread of the GPU
    const double R = 1e-8;
    double sum = 0;
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

// The newest f and g of each picture into its history, and f's product with that of place blockIdx.x of m into gram
__global__ void anderson_products_kernel(double *gram, float *history, const float *z, const float *before, int newest,
                                         int slots, size_t count) {
    SHARED_DYNAMIC(double, shared);
    int i = blockIdx.x, b = blockIdx.y;
    float *f = history + 2 * ((size_t)b * slots + i) * count;
    double *products = gram + b * HISTORY * HISTORY, dot = 0;
    for (size_t e = threadIdx.x; e < count; e += blockDim.x) {
        float g = z[b * count + e], change = g - before[b * count + e];
        if (i == newest) f[e] = change;
        if (i == newest) f[count + e] = g;
        dot += (double)change * f[e];
    }
    dot = block_sum(dot, shared);
    if (threadIdx.x == 0) products[i * HISTORY + newest] = products[newest * HISTORY + i] = dot;
}

// z (B,count) = sum a_i·(g_i - undo·f_i), and in bf16 the same to copy. Every block solves for a again, so there are no
// more of them than fill the GPU.
template <typename A>
__global__ void anderson_mix_kernel(float *z, A *copy, const double *gram, const float *history, int m, int newest,
                                    int slots, float undo, size_t count) {
    __shared__ double a[HISTORY];
    size_t b = blockIdx.y, e = 4 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    if (threadIdx.x == 0) anderson_weights(a, gram + b * HISTORY * HISTORY, m, newest);
    __syncthreads();
    for (; e < count; e += 4 * (size_t)gridDim.x * blockDim.x) {
        float mixed[4] = {0, 0, 0, 0};
        for (int i = 0; i < m; i++) {
            float f[4], g[4];
            load(f, history + 2 * (b * slots + i) * count + e);
            load(g, history + (2 * (b * slots + i) + 1) * count + e);
            EACH(j, 4) mixed[j] += (float)a[i] * (g[j] - undo * f[j]);
        }
        store(z + b * count + e, mixed);
        if (copy) store(copy + b * count + e, mixed);
    }
}

// Anderson acceleration (Walker and Ni 2011, type II; in equilibrium models arXiv:1909.01377) after iteration k = 1...
// of a timestep, for each picture alone. z (B,T,D) holds g(z_{k-1}) on entry, a.z_before z_{k-1}. With f_i = g(z_i) -
// z_i of the last min(k, window+1) iterations, which a.history and a.gram keep:
//   z_k = sum a_i·(z_i + mixing·f_i),   a = argmin ||sum a_i f_i||, sum a_i = 1;   in bf16 also in a.z
static void anderson_forward(Model *m, float *z, int k, int window, double mixing) {
    size_t count = (size_t)config_tokens(&m->config) * m->config.width;
    int slots = window + 1, used = imin(k, slots), newest = (k - 1) % slots;
    RUN(anderson_products_kernel, dim3(used, m->B), 512, MAX_WARPS * sizeof(double), m->a.gram, m->a.history, z,
        m->a.z_before, newest, slots, count);
    unsigned blocks = imin((int)ceil_div(count, 4 * 256), (int)ceil_div(8 * gpu.sms, m->B));
    TYPED(m->half, RUN((anderson_mix_kernel<A>), dim3(blocks, m->B), 256, 0, z, (A *)m->a.z, m->a.gram, m->a.history,
                       used, newest, slots, (float)(1 - mixing), count));
}

// =====================================================================================================================
// Part 3. Learning
// =====================================================================================================================

static void model_zero_gradients(Model *m) { gpu_zero(m->memory[MODEL_GRADS], (size_t)m->n_params * sizeof(real)); }

// Sum of squares in double: each block sums every NORM_BLOCKS-th piece, and the host adds what the blocks have, in
// order.
enum { NORM_BLOCKS = 1024 };
__global__ void norm_kernel(double *partial, const float *grads, size_t count) {
    SHARED_DYNAMIC(double, shared);
    double sum = 0;
#pragma unroll 4
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x)
        sum += (double)grads[i] * grads[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

static double model_gradient_norm(const Model *m) {
    double partial[NORM_BLOCKS], sum = 0;
    RUN(norm_kernel, NORM_BLOCKS, 256, MAX_WARPS * sizeof(double), m->a.sums, m->memory[MODEL_GRADS],
        (size_t)m->n_params);
    gpu_download(partial, m->a.sums, sizeof partial);
    for (int i = 0; i < NORM_BLOCKS; i++) sum += partial[i];
    return sqrt(sum);
}

// A new weight w of number i: ema += toward·(w - ema), and the bf16 copy that the matmuls take
__device__ static void weight_store(float *weights, float *ema, bf16 *half, size_t i, float w, float toward) {
    weights[i] = w;
    ema[i] += toward * (w - ema[i]);
    if (half) half[i] = __float2bfloat16_rn(w);
}

// g = scale·grad; m += new1·(g - m); v += new2·(g^2 - v); w = keep·w - size·m/(sqrt(v)·correct + epsilon). A thread a
// parameter.
__global__ void adamw_kernel(float *weights, float *adam_m, float *adam_v, float *ema, bf16 *half, const float *grads,
                             size_t count, float b1, float b2, float new1, float new2, float size, float correct,
                             float epsilon, float keep, float scale, float toward) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float g = grads[i] * scale, m = b1 * adam_m[i] + new1 * g, v = b2 * adam_v[i] + new2 * g * g;
    float w = weights[i] * keep - size * m / (sqrtf(v) * correct + epsilon);
    adam_m[i] = m;
    adam_v[i] = v;
    weight_store(weights, ema, half, i, w, toward);
}

// AdamW (arXiv:1711.05101) of parameters first..last-1; the kernel's numbers
static void adamw_update(Model *model, int64_t first, int64_t last, float size, float correct, double beta1,
                         double beta2, float eps, float keep, float grad_scale, float toward) {
    real *const *memory = model->memory;
    if (first == last) return;
    RUN(adamw_kernel, (unsigned)ceil_div(last - first, 256), 256, 0, memory[MODEL_WEIGHTS] + first,
        memory[MODEL_ADAM_M] + first, memory[MODEL_ADAM_V] + first, memory[MODEL_EMA] + first,
        model->half_weights ? model->half_weights + first : NULL, memory[MODEL_GRADS] + first, (size_t)(last - first),
        (float)beta1, (float)beta2, (float)(1 - beta1), (float)(1 - beta2), size, correct, eps, keep, grad_scale,
        toward);
}

// Muon updates matrices of one shape together, for one alone does not fill a GPU: as many as have MUON_ROOM·D^2
// numbers, which are 4 of the largest, (4D,D). Kernels have a row of blocks, blockIdx.y, for each.
enum { MUON_ROOM = 16, MUON_SUMS = NORM_BLOCKS / MUON_ROOM };
typedef struct {
    size_t at[MUON_ROOM]; // where they begin, in weights, gradients and momentum alike
    int n, k, count;
} MuonGroup;

// u of Muon from the gradient and the momentum, which holds the gradient already
__device__ static float muon_wanted(float momentum, float grad, float scale) {
    return grad * scale + (float)MUON_MOMENTUM * momentum;
}

// m = mu·m + scale·grad, and of each block sum u^2. A thread an element of (n,k), in rounds.
__global__ void muon_momentum_kernel(double *partial, float *m, const float *grads, MuonGroup group, float scale) {
    SHARED_DYNAMIC(double, shared);
    double sum = 0;
    size_t count = (size_t)group.n * group.k, at = group.at[blockIdx.y];
    m += at, grads += at;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
        m[i] = (float)MUON_MOMENTUM * m[i] + grads[i] * scale;
        float u = muon_wanted(m[i], grads[i], scale);
        sum += (double)u * u;
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

// x = u/||u|| of the matrix (n,k), or where n is larger its transpose; the norm from the sums of as many blocks as
// these. A thread an element, in rounds.
template <typename A>
__global__ void muon_start_kernel(A *x, const double *partial, const float *m, const float *grads, MuonGroup group,
                                  float scale) {
    SHARED_DYNAMIC(double, shared);
    double sum = 0;
    int n = group.n, k = group.k;
    size_t count = (size_t)n * k, at = group.at[blockIdx.y];
    m += at, grads += at, x += blockIdx.y * count;
    for (int i = threadIdx.x; i < (int)gridDim.x; i += blockDim.x) sum += partial[blockIdx.y * gridDim.x + i];
    sum = block_sum(sum, shared);
    float norm = (float)sum > 0 ? rsqrtf((float)sum) : 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
        float u[] = {muon_wanted(m[i], grads[i], scale) * norm};
        store(x + (n > k ? i % k * n + i / k : i), u);
    }
}

// p (r,r) = a·1 + b·square + c·p, where p is the square's own square. A thread four elements.
template <typename A>
__global__ void muon_polynomial_kernel(A *p, const A *square, int r) {
    size_t i = 4 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x), count = (size_t)r * r;
    float x[4], xx[4];
    if (i >= count) return;
    p += blockIdx.y * count, square += blockIdx.y * count;
    load(x, square + i);
    load(xx, p + i);
    EACH(j, 4) x[j] = (float)MUON_B * x[j] + (float)MUON_C * xx[j] + ((i + j) % (r + 1) ? 0 : (float)MUON_A);
    store(p + i, x);
}

// w (n,k) = keep·w - size·x, where x is as muon_start_kernel lays it out. A thread an element.
template <typename A>
__global__ void muon_finish_kernel(float *weights, float *ema, bf16 *half, const A *x, MuonGroup group, float keep,
                                   float size, float toward) {
    int n = group.n, k = group.k;
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, count = (size_t)n * k, at = group.at[blockIdx.y] + i;
    if (i >= count) return;
    float o[1];
    load(o, x + blockIdx.y * count + (n > k ? i % k * n + i / k : i));
    weight_store(weights, ema, half, at, weights[at] * keep - size * o[0], toward);
}

// Muon (Jordan and others 2024; its size as in arXiv:2502.16982) for matrices (n,k):
//   m <- mu·m + g,   u = g + mu·m,   w <- w·keep - lr·0.2·sqrt(max(n,k))·O
// where O is about U·V^T of u = U·S·V^T: MUON_STEPS times X <- (a + b·XX^T + c·(XX^T)^2)·X, from X = u/||u||.
static void muon_update(Model *model, MuonGroup group, double lr, float keep, float scale, float toward) {
    int half = model->half, n = group.n, k = group.k, r = imin(n, k), c = n + k - r; // X (r,c)
    size_t count = (size_t)n * k, square = (size_t)r * r, room = MAX_WARPS * sizeof(double);
    dim3 sums(imin((int)ceil_div(count, 1024), MUON_SUMS * (MUON_ROOM / group.count)), group.count);
    dim3 fours((unsigned)ceil_div(square, 4 * 256), group.count), elements((unsigned)ceil_div(count, 256), group.count);
    float *const *memory = model->memory, *m = memory[MODEL_ADAM_M], *grads = memory[MODEL_GRADS];
    float size = (float)(lr * 0.2 * sqrt((double)c));
    Act *const *scratch = model->a.muon, *x = scratch[0], *y = scratch[1], *a = scratch[2], *p = scratch[3];
    RUN(muon_momentum_kernel, sums, 256, room, model->a.sums, m, grads, group, scale);
    TYPED(half, RUN((muon_start_kernel<A>), sums, 256, room, (A *)x, model->a.sums, m, grads, group, scale));
    for (int i = 0; i < MUON_STEPS; i++) {
        Matmul xx = linear(a, x, x, c, NULL, r, c, r), aa = linear(p, a, a, r, NULL, r, r, r),
               px = linear_input(y, p, x, c, r, c, r);
        xx.batch = aa.batch = px.batch = group.count;
        matmul<false, false, EPI_STORE>(half, xx);
        matmul<false, false, EPI_STORE>(half, aa);
        TYPED(half, RUN((muon_polynomial_kernel<A>), fours, 256, 0, (A *)p, (const A *)a, r));
        matmul<false, true, EPI_STORE>(half, px);
        Act *next = y;
        y = x, x = next;
    }
    TYPED(half, RUN((muon_finish_kernel<A>), elements, 256, 0, memory[MODEL_WEIGHTS], memory[MODEL_EMA],
                    model->half_weights, (const A *)x, group, keep, size, toward));
}

// The shape of the matrix that Muon sees in a tensor: qkv is three
static void muon_shape(const ParamTensor *t, int *n, int *k) {
    *k = (int)t->shape[1];
    *n = t->shape[0] == 3 * *k ? *k : (int)t->shape[0];
}

// muon_update of all matrices that have the shape of tensor number `like`, unless an earlier tensor has it, too
static void muon_update_like(Model *model, int like, double lr, float keep, float scale, float toward) {
    MuonGroup group = {};
    int n, k, D = model->config.width;
    muon_shape(&model->tensors[like], &group.n, &group.k);
    size_t count = (size_t)group.n * group.k;
    int most = (int)(MUON_ROOM * (size_t)D * D / count);
    for (int i = 0; i < model->n_tensors; i++) {
        const ParamTensor *t = &model->tensors[i];
        if (!muon_has(t)) continue;
        muon_shape(t, &n, &k);
        if (n != group.n || k != group.k) continue;
        if (i < like) return;
        for (size_t part = 0; part < (size_t)t->count; part += count) {
            group.at[group.count++] = t->offset + part;
            if (group.count < most) continue;
            muon_update(model, group, lr, keep, scale, toward);
            group.count = 0;
        }
    }
    if (group.count) muon_update(model, group, lr, keep, scale, toward);
}

// The weights' update number `step` (from 1), by AdamW or Muon, with their moving average (EMA) and their bf16 copy.
// Gradients are multiplied by grad_scale first.
static void model_update(Model *model, int64_t step, double lr, double beta1, double beta2, double eps, double decay,
                         double grad_scale, double ema_decay) {
    float size = (float)(lr / (1 - pow(beta1, (double)step))),
          correct = (float)(1 / sqrt(1 - pow(beta2, (double)step)));
    float keep = (float)(1 - lr * decay), scale = (float)grad_scale, toward = (float)(1 - ema_decay);
    int64_t first = 0;
    for (int k = 0; k < model->n_tensors && model->training == TRAIN_MUON; k++) {
        const ParamTensor *t = &model->tensors[k];
        if (!muon_has(t)) continue;
        adamw_update(model, first, t->offset, size, correct, beta1, beta2, (float)eps, keep, scale, toward);
        muon_update_like(model, k, lr, keep, scale, toward);
        first = t->offset + t->count;
    }
    adamw_update(model, first, model->n_params, size, correct, beta1, beta2, (float)eps, keep, scale, toward);
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
// The gradient becomes the sum over all ranks: between GPUs by NCCL, else by MPI through the host's memory.
#ifdef NCCL
static void nccl_check(ncclResult_t result) {
    if (result != ncclSuccess) die("NCCL: %s; has every rank a GPU of its own?", ncclGetErrorString(result));
}

static void model_reduce(Model *m) {
    static ncclComm_t comm;
    if (!comm) {
        ncclUniqueId id;
        if (ranks.rank == 0) nccl_check(ncclGetUniqueId(&id));
        MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
        nccl_check(ncclCommInitRank(&comm, ranks.count, id, ranks.rank));
    }
    real *grads = m->memory[MODEL_GRADS];
    nccl_check(ncclAllReduce(grads, grads, (size_t)m->n_params, ncclFloat, ncclSum, comm, gpu.stream));
}
#else
static void model_reduce(Model *m) {
    size_t bytes = (size_t)m->n_params * sizeof(real);
    real *grads = (real *)xcalloc(m->n_params, sizeof *grads, "gradients on their way between the ranks");
    gpu_download(grads, m->memory[MODEL_GRADS], bytes);
    for (int64_t i = 0, most = 1 << 30; i < m->n_params; i += most)
        MPI_Allreduce(MPI_IN_PLACE, grads + i, (int)(m->n_params - i < most ? m->n_params - i : most), MPI_FLOAT,
                      MPI_SUM, MPI_COMM_WORLD);
    gpu_upload(m->memory[MODEL_GRADS], grads, bytes);
    gpu_wait();
    xfree(grads);
}
#endif
#endif

// =====================================================================================================================
// Part 4. Speed and memory
// =====================================================================================================================

// ---------------------------------------------------------------------------------------------------------------------
// Instructions of the GPU, and vectors

#ifdef NVIDIA

__device__ inline uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Four 8x8 tiles of 16-bit values from shared memory. Lanes 8i..8i+7 give the addresses of tile i's rows; r[i] becomes
// the two values of row lane/4 at columns 2·(lane%4) and the next one; _trans: of the transposed tile.
__device__ inline void ldmatrix_x4(uint32_t *r, const void *smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(smem))
                 : "memory");
}
__device__ inline void ldmatrix_x4_trans(uint32_t *r, const void *smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(smem))
                 : "memory");
}

// d (16,8) += a (16,16)·b (16,8), by a warp. Lane l holds of d: rows l/4 and l/4+8, columns 2·(l%4) and the next one;
// a: the four 8x8 quarters, upper left, lower left, upper right, lower right; b: upper and lower half, transposed.
__device__ inline void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same for the first 8 of these k alone: a[0], a[1] and b[0]
__device__ inline void mma_bf16_half(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

// 16 bytes from global to shared memory, or zeros unless `valid`. The copy runs on while the thread does: commit closes
// a group of them, wait<N> waits until at most the N newest groups are under way.
__device__ inline void cp_async16(void *smem, const void *gmem, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(smem)), "l"(gmem),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ inline float fast_exp2(float x) { // exp2f without care for results below 2^-126: one instruction for four
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

// x; but what the compiler makes of it is made anew in every round of a loop, and waits in no register.
__device__ inline unsigned anew(unsigned x) {
    asm volatile("" : "+r"(x));
    return x;
}

#if HOPPER
static decltype(&cuTensorMapEncodeTiled) box_map_encode; // of the driver, which nothing is linked to
// What only Hopper has, compute capability 9.0: see matmul_wgmma.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define IN_PAIRS __cluster_dims__(2, 1, 1)
static __device__ int has_wgmma = 1;

// A barrier in shared memory is passed once in a phase: when `count` arrivals have happened, and all bytes have come
// that barrier_expect announced. Phases are told apart by their parity; waiting for the phase before the first returns
// at once.
__device__ inline void barrier_init(uint64_t *barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ inline void barrier_expect(uint64_t *barrier, int bytes) { // which is an arrival as well
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
__device__ inline void barrier_arrive(uint64_t *barrier, int block) { // at the one in that block of the cluster
    asm volatile(
        "{ .reg .b32 at; mapa.shared::cluster.u32 at, %0, %1;"
        "mbarrier.arrive.shared::cluster.b64 _, [at]; }" ::"r"(shared_address(barrier)),
        "r"(block)
        : "memory");
}
__device__ inline void barrier_wait(uint64_t *barrier, int parity) {
    for (int passed = 0; !passed;)
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                     : "=r"(passed)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
}
__device__ inline void cluster_sync() { // all threads of both blocks
    asm volatile("barrier.cluster.arrive; barrier.cluster.wait;" ::: "memory");
}
__device__ inline void fence_async() { // barriers and shared memory as this thread has written them, before others look
    asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}
// A warpgroup's registers a thread from here on: what one gives up, others may take.
template <int N>
__device__ inline void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ inline void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// One thread starts a copy of the box at (row, col) of a matrix to shared memory, which counts its bytes at the
// barrier; _pair: to the same place in both blocks of a cluster, at the same barrier of each.
__device__ inline void box_load(bf16 *tile, const CUtensorMap *map, int row, int col, uint64_t *barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(shared_address(tile)),
        "l"(map), "r"(col), "r"(row), "r"(shared_address(barrier))
        : "memory");
}
__device__ inline void box_load_pair(bf16 *tile, const CUtensorMap *map, int row, int col, uint64_t *barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(tile)),
        "l"(map), "r"(col), "r"(row), "r"(shared_address(barrier)), "h"((uint16_t)3)
        : "memory");
}

// d += a·b for the four warps of a warpgroup, a (64,16) and b (16,192) in shared memory; a warp holds 16 rows of d, as
// fragments. TA, TB: k is the slow dimension there. It runs on: wgmma_commit closes a group, wgmma_wait<N>
// waits until at most the N newest are under way, and wgmma_fence stands between other use of d and the next product.
#define FOUR(d) "+f"((d)[0][0][0]), "+f"((d)[0][0][1]), "+f"((d)[1][0][0]), "+f"((d)[1][0][1])
#define SIXTEEN(d) FOUR((d)[0]), FOUR((d)[1]), FOUR((d)[2]), FOUR((d)[3])
template <bool TA, bool TB>
__device__ inline void wgmma(float (&d)[24][2][1][2], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
        "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
        "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, %96, %97, 1, 1, 1, %98, %99;"
        : SIXTEEN(d), SIXTEEN(d + 4), SIXTEEN(d + 8), SIXTEEN(d + 12), SIXTEEN(d + 16), SIXTEEN(d + 20)
        : "l"(a), "l"(b), "n"(TA), "n"(TB));
}
template <bool TA>
__device__ inline void wgmma(float (&d)[2][1][2], uint64_t a, uint64_t b) { // the same with b (16,8)
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, %6, 0;"
                 : FOUR(d)
                 : "l"(a), "l"(b), "n"(TA));
}
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// How wgmma is told of a tile: its address, and how far apart its parts lie, in units of 16 bytes. Rows of a tile are
// 128 bytes, 64 elements, whose 16-byte pieces are permuted by the row number: swizzled<64> in rows that start at a
// multiple of 1024 bytes. Eight of them are a part, 1024 bytes. Where rows run along k, those follow each other and are
// all there is; where they run across it, a tile of more than 64 columns is panels of 64, 8192 bytes apart.
__device__ inline uint64_t wgmma_tile(const bf16 *tile) {
    return (shared_address(tile) & 0x3FFFF) >> 4 | (uint64_t)(8192 / 16) << 16 | (uint64_t)(1024 / 16) << 32 |
           (uint64_t)1 << 62; // 1: 128-byte swizzle
}
#else
#define IN_PAIRS
static __device__ int has_wgmma = 0;
#endif
#endif

#endif

// V neighbours as one access of up to 16 bytes, converted to float and back
template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Vec {
    T v[V];
};
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline void from_float(float *to, float x) { *to = x; }
__device__ inline void from_float(bf16 *to, float x) { *to = __float2bfloat16_rn(x); }
template <int V, typename T>
__device__ inline void load(float (&x)[V], const T *p) {
    Vec<T, V> vec = *static_cast<const Vec<T, V> *>(__builtin_assume_aligned(p, alignof(decltype(vec))));
    EACH(i, V) x[i] = to_float(vec.v[i]);
}
// The same without conversion, which waits for the load: many can be under way. Whole registers, as halves would be
// taken apart at once.
template <typename T, int V>
struct Raw {
    Vec<uint32_t, V * sizeof(T) / 4> bits;
    __device__ inline float operator[](int i) const {
        uint32_t x = sizeof(T) == 4 ? bits.v[i] : i % 2 ? bits.v[i / 2] & 0xFFFF0000u : bits.v[i / 2] << 16;
        float value;
        memcpy(&value, &x, sizeof value);
        return value;
    }
};
template <int V, typename T>
__device__ inline void fetch(Raw<T, V> *x, const T *p) {
    x->bits = *static_cast<const decltype(x->bits) *>(__builtin_assume_aligned((const void *)p, alignof(Raw<T, V>)));
}
// Two floats as the two bf16 of a register, x in the low half
__device__ inline uint32_t pack_bf16(float x, float y) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}
template <int V, typename T>
__device__ inline void store(T *p, const float (&x)[V]) {
    Vec<T, V> vec;
    if constexpr (sizeof(T) == 2 && V % 2 == 0) { // one instruction converts two
        uint32_t pairs[V / 2];
        EACH(i, V / 2) pairs[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
        memcpy(&vec, pairs, sizeof vec);
    } else
        EACH(i, V) from_float(&vec.v[i], x[i]);
    *static_cast<Vec<T, V> *>(__builtin_assume_aligned(p, alignof(decltype(vec)))) = vec;
}

// ---------------------------------------------------------------------------------------------------------------------
// Fragments: how a warp holds pieces of matrices. Of a result, 16 rows and FRAG_COLS columns, a lane has FRAG_ROWS rows
// and of each FRAG_RUNS runs of neighbours: of Frag f, f[r][j] is in row frag_row(r), from column frag_col(j) on. The
// lanes that share a row are FRAG_STEP apart. What is multiplied is in bf16: a Left is 16 rows of 16 k, a Right
// FRAG_COLS columns of 16 k. This is all that knows which lane has what; test/hip.h says the same for AMD.

#ifndef OWN_FRAGMENTS
enum { FRAG_ROWS = 2, FRAG_COLS = 8, FRAG_RUNS = 1, FRAG_RUN = 2, FRAG_STEP = 1 };
typedef float FragRun[FRAG_RUN];
typedef FragRun Frag[FRAG_ROWS][FRAG_RUNS];
typedef uint32_t Left[4], Right[2];
__device__ inline int frag_row(int r) {
    int lane = threadIdx.x % WARP;
    return lane / 4 + 8 * r;
}
__device__ inline int frag_col(int j) {
    int lane = threadIdx.x % WARP;
    return 8 * j + lane % 4 * 2;
}

// From shared memory, where at(i, j) is number j of the eights of neighbours in row i. SLOW: such a row is one k, not
// the k of one row. HALF: there are 8 k.
template <bool SLOW, bool HALF, typename F>
__device__ inline void left_load(Left a, F at) {
    int lane = threadIdx.x % WARP;
    if (SLOW)
        ldmatrix_x4_trans(a, at(lane % 8 + lane / 16 * 8, lane / 8 % 2));
    else
        ldmatrix_x4(a, at(lane % 16, HALF ? 0 : lane / 16));
}

// Two at once: the next one to the right, or with DEEP the next 16 k
enum RightForm { RIGHT_FAST, RIGHT_SLOW, RIGHT_SLOW_DEEP };
template <int FORM, bool HALF, typename F>
__device__ inline void right_load(Right (&b)[2], F at) {
    int lane = threadIdx.x % WARP;
    if (FORM == RIGHT_FAST)
        ldmatrix_x4(b[0], at(lane % 8 + lane / 16 * 8, HALF ? 0 : lane / 8 % 2));
    else if (FORM == RIGHT_SLOW)
        ldmatrix_x4_trans(b[0], at(lane % 16, lane / 16));
    else
        ldmatrix_x4_trans(b[0], at(lane, 0));
}

// d += a·b
template <bool HALF = false>
__device__ inline void frag_multiply(Frag d, const Left a, const Right b) {
    if (HALF)
        mma_bf16_half(d[0][0], a, b);
    else
        mma_bf16(d[0][0], a, b);
}

// Columns of p, 16 in all, as what the next product has on its left: a lane holds what it needs
__device__ inline void left_from(Left a, const Frag *p) {
    EACH(i, 4) a[i] = pack_bf16(p[i / 2][i % 2][0][0], p[i / 2][i % 2][0][1]);
}

// The value in row frag_row(r), column k, of whichever lane has it
__device__ inline float frag_value(const Frag p, int r, int k) {
    return __shfl_sync(0xffffffffu, p[r][0][k % 2], k / 2, 4);
}

// x of lane number (this one's ^ i)
template <typename T>
__device__ inline T lane_xor(T x, int i) {
    return __shfl_xor_sync(0xffffffffu, x, i);
}
#endif

// Run j of a row of fragments side by side, from column frag_col(j) on
__device__ inline FragRun &frag_run(Frag *f, int r, int j) { return f[j / FRAG_RUNS][r][j % FRAG_RUNS]; }
__device__ inline const FragRun &frag_run(const Frag *f, int r, int j) { return f[j / FRAG_RUNS][r][j % FRAG_RUNS]; }

// Over the lanes that share a row
__device__ inline float row_sum(float x) {
#pragma unroll
    for (int i = FRAG_STEP; i < FRAG_STEP * FRAG_COLS / (FRAG_RUNS * FRAG_RUN); i *= 2) x += lane_xor(x, i);
    return x;
}
__device__ inline float row_max(float x) {
#pragma unroll
    for (int i = FRAG_STEP; i < FRAG_STEP * FRAG_COLS / (FRAG_RUNS * FRAG_RUN); i *= 2) x = fmaxf(x, lane_xor(x, i));
    return x;
}

// Over all lanes of a warp
template <typename T>
__device__ inline T warp_sum(T x) {
#pragma unroll
    for (int i = WARP / 2; i > 0; i /= 2) x += lane_xor(x, i);
    return x;
}

template <typename T>
__device__ inline T block_sum(T x, T *shared) {
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    x = 0;
    for (int w = 0; w < (int)blockDim.x / WARP; w++) x += shared[w];
    __syncthreads();
    return x;
}

// ---------------------------------------------------------------------------------------------------------------------
// The matrix product

// What an epilogue adds, stores and reads: see Epilogue. A: type of activations
template <int EPI, typename A>
struct EpilogueOf {
    static constexpr bool BIAS = EPI == EPI_STORE || EPI == EPI_FLOAT || EPI == EPI_GATED, DGELU = EPI == EPI_DGELU;
    static constexpr bool ADD = EPI == EPI_GELU || (EPI == EPI_FLOAT && sizeof(A) == 4);
    typedef typename std::conditional<EPI == EPI_STORE || EPI == EPI_GELU || DGELU, A, float>::type Out;
    typedef typename std::conditional<DGELU, A, float>::type First; // of add, residual, pre or out
};

// The same product for a lane whose results begin at (row, col): pointers are moved there, those of bias, add and gate
// by col alone; operands and db stay.
template <int EPI, typename A>
__device__ inline Matmul moved(Matmul g, int row, int col) {
    size_t at = (size_t)row * g.ldc + col;
    g.out = (typename EpilogueOf<EPI, A>::Out *)g.out + at;
    if (EPI == EPI_GATED) g.residual += at, g.gate += col;
    if (g.pre) g.pre = (A *)g.pre + at;
    if (g.copy) g.copy = (A *)g.copy + at;
    if (g.sum) g.sum += at;
    if (g.bias) g.bias += col;
    if (g.add) g.add += col;
    return g;
}

// Where the row of add, or of gate, begins that goes with a row of the result
template <int EPI, typename A>
__device__ inline unsigned place_of_other(const Matmul &g, unsigned row) {
    if (EPI == EPI_GATED) return row / g.tokens * g.gate_stride;
    if (!EpilogueOf<EPI, A>::ADD || !g.add) return 0;
    return (sizeof(A) == 4 ? row % g.add_rows : g.add_rows == 1 ? 0 : row) * g.N;
}

// What an epilogue reads of one row beside V neighbours of the product: fetched for several rows before the first is
// used. at: their place, counted from where g begins; other: likewise, that of add. What is not fetched must be zero:
// it is added all the same.
template <int EPI, typename A, int V>
struct Others {
    Raw<typename EpilogueOf<EPI, A>::First, V> first;
    Raw<float, V> second; // of sum
};
template <int EPI, typename A, int V>
__device__ inline void epilogue_fetch(Others<EPI, A, V> *o, const Matmul &g, int at, unsigned other) {
    if constexpr (EpilogueOf<EPI, A>::ADD) {
        if (EPI == EPI_GELU || g.add) fetch(&o->first, g.add + other);
    }
    if constexpr (EPI == EPI_GATED) fetch(&o->first, g.residual + at);
    if constexpr (EPI == EPI_DGELU) {
        fetch(&o->first, (const A *)g.pre + at);
        if (g.sum) fetch(&o->second, g.sum + at);
    }
    if constexpr (EPI == EPI_WEIGHT) {
        if (!g.overwrite) fetch(&o->first, (const float *)g.out + at);
    }
}

// Takes V neighbours v of the product in each of ROWS rows, `step` apart, to where they belong. at: the first row's
// place; other: where each row's gates begin, c: the column there. The rows are computed side by side, without a branch
// between them.
template <int EPI, typename A, int V, int ROWS>
__device__ inline void epilogue_store(const Matmul &g, int at, int step, const unsigned *other, int c,
                                      const Raw<float, V> &bias, const Others<EPI, A, V> *o, float (*v)[V]) {
    typedef EpilogueOf<EPI, A> Of;
    float gate[ROWS][V] = {}, pre[ROWS][V], copy[ROWS][V], sum[ROWS][V], slope;
    if (EPI == EPI_GATED) // from the cache, so late; before the first store, which the compiler lets no load pass
        EACH(i, ROWS) load(gate[i], g.gate + other[i] + c);
    EACH(i, ROWS) {
        EACH(j, V) {
            float x = o[i].first[j], &y = v[i][j];
            if (EPI == EPI_WEIGHT || Of::ADD) y += x;
            if (Of::BIAS) y += bias[j];
            pre[i][j] = y;
            if (EPI == EPI_GELU) y = gelu(y, &slope);
            if (EPI == EPI_GATED) y = x + gate[i][j] * y;
            if (EPI == EPI_DGELU) copy[i][j] = gelu(x, &slope), y *= slope, sum[i][j] = o[i].second[j] + y;
        }
        store((typename Of::Out *)g.out + at + i * step, v[i]);
        if (EPI == EPI_DGELU) store((A *)g.copy + at + i * step, copy[i]);
    }
    if (EPI == EPI_DGELU && g.sum)
        EACH(i, ROWS) store(g.sum + at + i * step, sum[i]);
    if ((EPI == EPI_GELU || EPI == EPI_GATED) && g.pre)
        EACH(i, ROWS) store((A *)g.pre + at + i * step, pre[i]);
    if (EPI == EPI_GATED && g.copy)
        EACH(i, ROWS) store((A *)g.copy + at + i * step, v[i]);
}

// The epilogue of 16 rows and 32·CHUNKS columns that a warp holds as fragments, acc[j] at column FRAG_COLS·j. They go
// through shared memory, `stage`, so that a lane gets neighbours and the warp's accesses to memory fill sectors of 32
// bytes: 8 to a lane for STORE and GELU, which store bf16 alone, else 4. What a lane writes and reads there lies in
// banks of its own: rows are 8 banks apart, and in every second four rows, every two fours of columns change places.
// Everything is unrolled, so that a place is a row's pointer and a constant. ROOM is what registers allow: a row at a
// time, where 4 go to a lane; all rows of 32 columns at once; or these, with what they read fetched 32 columns ahead.
enum Room { ROW_BY_ROW, SIDE_BY_SIDE, AHEAD };
template <int EPI, int CHUNKS, int ROOM>
__device__ inline void warp_epilogue(const Matmul &whole, float *stage, int row0, int col0, const Frag *acc) {
    constexpr int V = EPI == EPI_STORE || EPI == EPI_GELU ? 8 : 4, HOP = WARP / 32 * V, ROWS = 16 / HOP,
                  STRIDE = 32 * CHUNKS + 8, SIDE = ROOM == ROW_BY_ROW && V == 4 ? 1 : ROWS;
    int lane = threadIdx.x % WARP, col = lane % (32 / V) * V, end = min(32 * CHUNKS, whole.N - col0) - col;
    int row = V == 8 ? lane / 4 % 2 * 4 + lane / 8 % 4 + lane / 32 * 8 : lane / 8, step = HOP * whole.ldc;
    Matmul g = moved<EPI, bf16>(whole, row0 + row, col0 + col);
    unsigned other[ROWS];
    Others<EPI, bf16, V> o[2][ROWS] = {};
    Raw<float, V> bias[2] = {};
    auto get = [&](int c) {
        if (EpilogueOf<EPI, bf16>::BIAS && g.bias) fetch(bias + c / 32 % 2, g.bias + c);
        EACH(i, ROWS) epilogue_fetch(o[c / 32 % 2] + i, g, i * step + c, other[i] + c);
    };
    auto product = [&](float(&v)[V], int r, int c) {
        EACH(part, V / 4) {
            float four[4];
            load(four, stage + r * STRIDE + c + ((col + 4 * part) ^ (r & 4)));
            EACH(j, 4) v[4 * part + j] = four[j];
        }
    };
    stage += threadIdx.x / WARP * 16 * STRIDE;
    EACH(i, ROWS) other[i] = place_of_other<EPI, bf16>(g, row0 + row + i * HOP);
    bool inside = row0 + 16 <= g.M;
    if (ROOM == AHEAD && inside && 0 < end) get(0);
    EACH(j, 32 * CHUNKS / FRAG_COLS * FRAG_RUNS) {
        EACH(i, FRAG_ROWS) {
            int r = frag_row(i), c = frag_col(j);
            Vec<float, FRAG_RUN> run;
            EACH(e, FRAG_RUN) run.v[e] = frag_run(acc, i, j)[e];
            *(Vec<float, FRAG_RUN> *)(stage + r * STRIDE + c / 8 * 8 + (c % 8 ^ (r & 4))) = run;
        }
    }
    __syncwarp();
    EACH(chunk, CHUNKS) {
        int c = 32 * chunk;
        if (!inside || c >= end) break;
        if (ROOM < AHEAD || c + 32 < end) get(ROOM < AHEAD ? c : c + 32);
        EACH(part, ROWS / SIDE) {
            int first = part * SIDE;
            float v[SIDE][V];
            EACH(i, SIDE) product(v[i], row + (first + i) * HOP, c);
            epilogue_store<EPI, bf16, V, SIDE>(g, first * step + c, step, other + first, c, bias[chunk % 2],
                                               o[chunk % 2] + first, v);
        }
    }
#pragma unroll 1
    for (int i = 0; !inside && i < ROWS * CHUNKS; i++) { // the last rows, one by one
        int r = i % ROWS * HOP, c = i / ROWS * 32, at = i % ROWS * step + c;
        float v[1][V];
        if (row0 + row + r >= g.M || c >= end) continue;
        unsigned one = place_of_other<EPI, bf16>(g, row0 + row + r);
        if (EpilogueOf<EPI, bf16>::BIAS && g.bias) fetch(bias, g.bias + c);
        epilogue_fetch(o[0], g, at, one + c);
        product(v[0], row + r, c);
        epilogue_store<EPI, bf16, V, 1>(g, at, 0, &one, c, bias[0], o[0], v);
    }
    __syncwarp(); // before the next results take the place of these
}

// Room for the parts of sums that are split
static struct {
    float *memory;
    size_t count; // floats
} workspace;

// What is worth having for a model of width D: 16 D^2 with column sums, and for small D a tile for each of two blocks a
// multiprocessor
static size_t workspace_floats(int D) {
    size_t floats = 16 * (size_t)D * (D + 1), tiles = 2 * (size_t)gpu.sms * 128 * 130; // 130: column sums too
    return floats > tiles ? floats : tiles;
}

// Before any model's first step: what is recorded holds the pointer.
static void workspace_reserve(size_t count) {
    if (count <= workspace.count) return;
    gpu_free(workspace.memory, workspace.count * sizeof(float));
    workspace.count = count;
    workspace.memory = (float *)gpu_malloc(count * sizeof(float), "partial sums");
}

// A split of the sum over k has its own place in the workspace: all products first, then all column sums.
__device__ inline void own_place(Matmul *g, float *parts, int split, int splits) {
    g->bias = NULL;
    g->out = parts + (size_t)split * g->M * g->N;
    if (g->db) g->db = parts + (size_t)splits * g->M * g->N + (size_t)split * g->M;
    g->ldc = g->N, g->overwrite = 1;
}

// Product number z of a batch
template <typename A>
__host__ __device__ inline void own_product(Matmul *g, unsigned z) {
    g->a = (const A *)g->a + z * ((size_t)g->M * g->K);
    g->b = (const A *)g->b + z * ((size_t)g->N * g->K);
    g->out = (A *)g->out + z * ((size_t)g->M * g->N);
}

// bf16 operands on the tensor cores. A block computes TILE x TILE of the product with four warps, each a quarter. Tiles
// of both operands, BK deep, come in through cp.async into a ring of STAGES buffers, so that loads run STAGES - 1 steps
// ahead of the arithmetic. A warp of the large tile makes 64x64 out of 64+64 rows of fragments: 32 mma for 8 ldmatrix.
//
// Shared memory has 32 banks of 4 bytes: eight rows of 16 bytes, what a tile of ldmatrix reads, must lie in different
// ones. Rows are therefore stored with their 16-byte pieces permuted by the row number (a swizzle).
enum { BK = 32, STAGES = 3, MATMUL_THREADS = 4 * WARP, WG_M = 128, WG_N = 192 }; // WG: of matmul_wgmma's tile

template <int COLS>
__device__ inline int swizzled(int row, int piece) {
    return row * COLS + 8 * (COLS == 32 ? piece ^ (row >> 1 & 3) : piece ^ (row & 7));
}

// tile (ROWS,COLS) = the part of matrix p (rows,cols; row stride ld) at row0, col0; zero outside of it. A thread's
// pieces are HOP rows apart, a multiple of 8, so that they are permuted alike.
template <int ROWS, int COLS>
__device__ inline void load_tile(bf16 *tile, const bf16 *p, int ld, int row0, int col0, int rows, int cols) {
    constexpr int PIECES = COLS / 8, HOP = MATMUL_THREADS / PIECES;
    int row = row0 + threadIdx.x / PIECES, col = col0 + threadIdx.x % PIECES * 8;
    tile += swizzled<COLS>(threadIdx.x / PIECES, threadIdx.x % PIECES);
    p += (ptrdiff_t)row * ld + col;
#pragma unroll
    for (int i = 0; i < ROWS / HOP; i++, p += (ptrdiff_t)HOP * ld)
        cp_async16(tile + i * HOP * COLS, p, row + i * HOP < rows && col < cols);
}

template <int TILE, bool TA, bool TB, int EPI>
__global__ void __launch_bounds__(MATMUL_THREADS, 2) matmul_bf16(Matmul g, float *parts) {
    constexpr int OPERAND = TILE * BK, W = TILE / 2, MI = W / 16,
                  NI = W / FRAG_COLS; // a warp: W x W, MI x NI fragments
    SHARED_DYNAMIC(bf16, shared);
    if (EPI == EPI_STORE) own_product<bf16>(&g, blockIdx.z);
    const bf16 *a = (const bf16 *)g.a, *b = (const bf16 *)g.b;
    int warp = threadIdx.x / WARP, wm = warp / 2 * W, wn = warp % 2 * W;
    int n_tiles = (g.N + TILE - 1) / TILE, m0 = blockIdx.x / n_tiles * TILE, n0 = blockIdx.x % n_tiles * TILE;
    int k_begin = blockIdx.y * g.k_chunk;
    int k_end = min(g.K, k_begin + g.k_chunk), steps = (k_end - k_begin + BK - 1) / BK;
    if (EPI == EPI_WEIGHT && gridDim.y > 1) own_place(&g, parts, blockIdx.y, gridDim.y);
    bool sum_rows = EPI == EPI_WEIGHT && g.db && n0 + wn == 0;
    Frag acc[MI][NI] = {}, row_sums[EPI == EPI_WEIGHT ? MI : 1] = {};

    auto load_step = [&](int step) {
        bf16 *ta = shared + step % STAGES * 2 * OPERAND, *tb = ta + OPERAND;
        int k = k_begin + step * BK;
        if (TA)
            load_tile<BK, TILE>(ta, a, g.lda, k, m0, k_end, g.M);
        else
            load_tile<TILE, BK>(ta, a, g.lda, m0, k, g.M, k_end);
        if (TB)
            load_tile<BK, TILE>(tb, b, g.ldb, k, n0, k_end, g.N);
        else
            load_tile<TILE, BK>(tb, b, g.ldb, n0, k, g.N, k_end);
    };
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < steps) load_step(step);
        cp_async_commit();
    }
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads(); // the step has arrived for everyone, and everyone is done with the buffer that is filled next
        if (step + STAGES - 1 < steps) load_step(step + STAGES - 1);
        cp_async_commit();
        const bf16 *ta = shared + step % STAGES * 2 * OPERAND, *tb = ta + OPERAND;
#pragma unroll
        for (int k = 0; k < BK; k += 16) {
            Left fa[MI];
            Right fb[NI / 2][2];
            EACH(i, MI) {
                int m = wm + 16 * i;
                left_load<TA, false>(fa[i], [&](int row, int piece) {
                    return ta + (TA ? swizzled<TILE>(k + row, m / 8 + piece) : swizzled<BK>(m + row, k / 8 + piece));
                });
            }
            EACH(j, NI / 2) {
                int n = wn + 2 * FRAG_COLS * j;
                right_load<TB ? RIGHT_SLOW : RIGHT_FAST, false>(fb[j], [&](int row, int piece) {
                    return tb + (TB ? swizzled<TILE>(k + row, n / 8 + piece) : swizzled<BK>(n + row, k / 8 + piece));
                });
            }
            EACH(i, MI) {
                EACH(j, NI) frag_multiply(acc[i][j], fa[i], fb[j / 2][j % 2]);
            }
            if (sum_rows) { // the bias gradient is dy^T times a matrix of ones
                Right ones;
                EACH(i, (int)(sizeof ones / 4)) ones[i] = 0x3F803F80u;
                EACH(i, MI) frag_multiply(row_sums[EPI == EPI_WEIGHT ? i : 0], fa[i], ones);
            }
        }
    }
    __syncthreads(); // the ring is free: warps stage their results there
    static_assert(4 * 16 * (W + 8) * sizeof(float) <= 2 * STAGES * OPERAND * sizeof(bf16), "the results' place");
    EACH(i, MI) {
        int row = m0 + wm + 16 * i;
        warp_epilogue<EPI, W / 32, SIDE_BY_SIDE>(g, (float *)shared, row, n0 + wn, acc[i]);
        EACH(h, FRAG_ROWS) {
            int r = row + frag_row(h);
            if (sum_rows && frag_col(0) == 0 && r < g.M)
                g.db[r] = row_sums[EPI == EPI_WEIGHT ? i : 0][h][0][0] + (g.overwrite ? 0 : g.db[r]);
        }
    }
}

static int pairs_at_once(void) { return gpu.sms > 1 ? gpu.sms / 2 : 1; } // a block of Hopper's takes a multiprocessor

#if HOPPER
// The same product on Hopper, whose tensor cores are half as fast again as mma.sync can drive them, by wgmma: the four
// warps of a warpgroup start a product of 64 rows together; the tensor cores fetch both operands from shared memory by
// themselves, and the warps hold the sums and nothing else. Three things follow from that speed.
//   - Copying must cost the multiplying warps nothing. One thread of a third warpgroup, the producer, asks the copy
//     engine (TMA) for boxes of a matrix, which it swizzles, and fills with zeros outside of the matrix. Two barriers
//     for each buffer of the ring pass it to and fro: `full` when its bytes have come, `empty` when they have been
//     multiplied.
//   - Nor must the epilogue: at K = 1152 the tensor cores need 8 us for a tile, about what its results take to memory.
//     So two warpgroups have tiles in turn, and one multiplies while the other stores (`order` passes the turn). Their
//     192 sums a thread are why the producer gives registers away. Blocks stay for many tiles; the copies run on into
//     the next.
//   - At full speed a tile of 128x192 takes in 53 bytes a cycle, and the L2 cache gives a multiprocessor about 35. So
//     blocks come in pairs, clusters, with tiles above each other: each copies half of the tile of b into both, 37
//     bytes a cycle.
// 192 divides the widths of S, B and XL. Of L's 1024 it wastes a ninth; a tile of 128 would need 48 bytes a cycle. A
// last row of tiles without one below it, as 1152 has, is shared out as pairs side by side, which copy nothing for each
// other.
enum { WG_K = 64, WG_STAGES = 4, WG_THREADS = 3 * 128 };
enum { WG_A = WG_M * WG_K, WG_B = WG_N * WG_K, WG_PANEL = 64 * WG_K, WG_ONES = 8 * WG_K };
enum { WG_STAGED = 8 * 16 * (96 + 8) }; // of warp_epilogue: floats
enum { WG_SHARED = 2 * (WG_STAGES * (WG_A + WG_B) + WG_ONES) + 4 * WG_STAGED + 8 * (2 * WG_STAGES + 2) };

template <bool TA, bool TB, int EPI>
__global__ void IN_PAIRS __launch_bounds__(WG_THREADS, 1)
    matmul_wgmma(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b, Matmul g,
                 float *parts, int across, int upright, int whole, int rest, int splits) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    SHARED_DYNAMIC(bf16, shared);
    bf16 *ones = shared + WG_STAGES * (WG_A + WG_B);
    float *stage = (float *)(ones + WG_ONES);
    uint64_t *full = (uint64_t *)(stage + WG_STAGED), *empty = full + WG_STAGES, *order = empty + WG_STAGES;
    int group = threadIdx.x / 128, lane = threadIdx.x % WARP, rank = blockIdx.x % 2;
    int m0, n0, k0, steps, split, beside, at = 0; // at: the step's place in the ring, counted on over all tiles
    auto go_to = [&](int unit) { // a tile of `whole`, or a split of the rest; neighbours share rows of a in the cache
        int tile = unit < whole ? unit : whole + (unit - whole) % rest;
        split = unit < whole ? -1 : (unit - whole) / rest;
        beside = tile - upright;
        m0 = (beside < 0 ? tile / across * 2 + rank : (g.M - 1) / WG_M) * WG_M;
        n0 = (beside < 0 ? tile % across : 2 * beside + rank) * WG_N;
        k0 = max(split, 0) * g.k_chunk;
        steps = (max(min(g.K - k0, split < 0 ? g.K : g.k_chunk), 0) + WG_K - 1) / WG_K;
    };
    for (int i = threadIdx.x; i < WG_ONES / 2; i += WG_THREADS) ((uint32_t *)ones)[i] = 0x3F803F80u;
    for (int i = 0; i < WG_STAGES && threadIdx.x == 0; i++) {
        barrier_init(full + i, 1);
        barrier_init(empty + i, 2 * 4); // a warpgroup's warps, in both blocks
        if (i < 2) barrier_init(order + i, 4);
    }
    fence_async(); // the copy engine and the tensor cores see what has been written here
    cluster_sync();
    if (group == 2) {
        registers_down<24>();
        for (int unit = blockIdx.x / 2; threadIdx.x % 128 == 0 && unit < whole + rest * splits; unit += gridDim.x / 2) {
            go_to(unit);
            for (int k = k0; k < k0 + steps * WG_K; k += WG_K, at++) {
                int i = at % WG_STAGES;
                bf16 *a = shared + i * (WG_A + WG_B), *b = a + WG_A;
                barrier_wait(empty + i, at / WG_STAGES % 2 ^ 1);
                barrier_expect(full + i, 2 * (WG_A + WG_B));
                if (!TA) box_load(a, &map_a, m0, k, full + i);
                for (int j = 0; TA && j < WG_M / 64; j++) box_load(a + j * WG_PANEL, &map_a, k, m0 + 64 * j, full + i);
                auto copy = [&](bf16 *tile, int row, int col) {
                    if (beside < 0)
                        box_load_pair(tile, &map_b, row, col, full + i);
                    else
                        box_load(tile, &map_b, row, col, full + i);
                };
                for (int half = 0; half < 2; half++) {
                    if (beside < 0 && half != rank) continue; // the other block copies it
                    if (!TB) copy(b + half * WG_B / 2, n0 + half * WG_N / 2, k);
                    for (int j = 0; TB && j < WG_N / 64; j++)
                        copy(b + j * WG_PANEL + half * WG_PANEL / 2, k + half * WG_K / 2, n0 + 64 * j);
                }
            }
        }
    } else {
        registers_up<240>();
        for (int unit = blockIdx.x / 2, turn = 0; unit < whole + rest * splits; unit += gridDim.x / 2, turn++) {
            go_to(unit);
            if (turn % 2 != group) { // the other warpgroup's
                at += steps;
                continue;
            }
            Frag acc[2][WG_N / 8] = {};
            Matmul part = g;
            if (EPI == EPI_WEIGHT && split >= 0) own_place(&part, parts, split, splits);
            auto multiply = [&](auto with_sums) {
                constexpr bool SUMS = decltype(with_sums)::value;
                Frag row_sums[2] = {};
                auto release = [&](int i) { // both blocks' next copies to this place wait for it
                    if (lane < 2) barrier_arrive(empty + i % WG_STAGES, lane);
                };
                for (int step = 0; step < steps; step++, at++) {
                    const bf16 *here = shared + at % WG_STAGES * (WG_A + WG_B);
                    uint64_t a = wgmma_tile(here), b = wgmma_tile(here + WG_A);
                    barrier_wait(full + at % WG_STAGES, at / WG_STAGES % 2);
                    wgmma_fence();
                    EACH(j, WG_K / 16) { // 16 k on are 32 bytes, or 16 rows; 64 m on are 64 rows, or a panel
                        EACH(half, 2) {
                            uint64_t aj = a + half * (2 * WG_PANEL / 16) + j * (TA ? 128 : 2);
                            wgmma<TA, TB>(acc[half], aj, b + j * (TB ? 128 : 2));
                            if (SUMS) wgmma<TA>(row_sums[half], aj, wgmma_tile(ones));
                        }
                    }
                    wgmma_commit();
                    wgmma_wait<1>(); // the step before has been multiplied
                    if (step > 0) release(at - 1);
                }
                if (lane == 0) barrier_arrive(order + (group ^ 1), rank);
                wgmma_wait<0>();
                if (steps > 0) release(at - 1); // the last splits may be empty
                EACH(i, 4) {
                    int row = m0 + i / 2 * 64 + threadIdx.x % 128 / WARP * 16 + frag_row(i % 2);
                    if (SUMS && frag_col(0) == 0 && row < g.M)
                        part.db[row] = row_sums[i / 2][i % 2][0][0] + (part.overwrite ? 0 : part.db[row]);
                }
            };
            barrier_wait(order + group, (turn + 1) / 2 % 2 ^ 1); // the other's products have been started
            if (EPI == EPI_WEIGHT && g.db && n0 == 0)            // two loops: wgmma does not overlap around a branch
                multiply(std::true_type());
            else
                multiply(std::false_type());
            int row = m0 + threadIdx.x % 128 / WARP * 16;
            warp_epilogue<EPI, 3, ROW_BY_ROW>(part, stage, row, n0, acc[0]);
            warp_epilogue<EPI, 3, AHEAD>(part, stage, row, n0 + 96, acc[0] + 12);
            warp_epilogue<EPI, 3, AHEAD>(part, stage, row + 64, n0, acc[1]);
            warp_epilogue<EPI, 3, AHEAD>(part, stage, row + 64, n0 + 96, acc[1] + 12);
        }
    }
    cluster_sync(); // the other block may still arrive at barriers here
#endif
}

// What the copy engine must know of a matrix (rows,cols; row stride ld) to copy boxes of (box,64) from it
static CUtensorMap box_map(const void *p, int rows, int cols, int ld, int box) {
    CUtensorMap map;
    cuuint64_t sizes[2] = {(cuuint64_t)cols, (cuuint64_t)rows}, stride = 2 * (cuuint64_t)ld;
    cuuint32_t boxes[2] = {64, (cuuint32_t)box}, steps[2] = {1, 1};
    if (box_map_encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)p, sizes, &stride, boxes, steps,
                       CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
        die("CUDA: no tensor map for a matrix %dx%d; set FPDM_WGMMA=0 in the environment", rows, cols);
    return map;
}

template <bool TA, bool TB, int EPI>
static void launch_wgmma(const Matmul &g, int across, int upright, int whole, int rest, int splits) {
    CUtensorMap a = TA ? box_map(g.a, g.K, g.M, g.lda, WG_K) : box_map(g.a, g.M, g.K, g.lda, WG_M);
    CUtensorMap b = TB ? box_map(g.b, g.K, g.N, g.ldb, WG_K / 2) : box_map(g.b, g.N, g.K, g.ldb, WG_N / 2);
    int pairs = imin(whole + rest * splits, pairs_at_once());
    RUN((matmul_wgmma<TA, TB, EPI>), 2 * pairs, WG_THREADS, WG_SHARED, a, b, g, workspace.memory, across, upright,
        whole, rest, splits);
}
#else
template <bool TA, bool TB, int EPI>
static void launch_wgmma(const Matmul &, int, int, int, int, int) {}
#endif

// The same product in fp32 with plain multiply-adds (tensor cores would round to tf32, which misses 1e-5). A block
// computes 64x64 with 128 threads, each 8x4; the next 16 k wait in registers while these are in use. It takes any size
// and stride, so it also serves where bf16 cannot, or where rounding costs more than time: pixels, conditioning, the
// final layer.
enum { F32_TILE = 64, F32_BK = 16, F32_ROW = F32_TILE + 4 };

template <bool TA, bool TB, int EPI>
__global__ void __launch_bounds__(128, TB || EPI == EPI_GATED || (EPI == EPI_FLOAT && !ON_HOPPER) ? 3 : 4)
    matmul_fp32(Matmul g, float *parts) {
    SHARED_DYNAMIC(float, ta);
    float *tb = ta + F32_BK * F32_ROW;
    const float *a = (const float *)g.a, *b = (const float *)g.b;
    int n_tiles = (g.N + F32_TILE - 1) / F32_TILE, k_begin = blockIdx.y * g.k_chunk;
    int m0 = blockIdx.x / n_tiles * F32_TILE, n0 = blockIdx.x % n_tiles * F32_TILE;
    int k_end = min(g.K, k_begin + g.k_chunk), ty = threadIdx.x / 16 * 8, tx = threadIdx.x % 16 * 4;
    float acc[2][4][4] = {}, row_sums[8] = {}, next_a[8], next_b[8];
    if ((EPI == EPI_WEIGHT || EPI == EPI_FLOAT) && gridDim.y > 1) own_place(&g, parts, blockIdx.y, gridDim.y);

    // Element i of this thread: neighbouring threads read neighbouring addresses. In shared memory, pairs change places
    // in the second half of the k, for their banks.
    auto k_of = [](bool slow, int e) { return slow ? e / F32_TILE : e % F32_BK; };
    auto m_of = [](bool slow, int e) { return slow ? e % F32_TILE : e / F32_BK; };
    auto place = [](int k, int m) { return k * F32_ROW + (m ^ k / 8 * 2); };
    auto load_next = [&](int k0) {
        EACH(i, 8) {
            int e = i * 128 + threadIdx.x, k = k0 + k_of(TA, e), m = m0 + m_of(TA, e);
            next_a[i] = k < k_end && m < g.M ? a[TA ? (size_t)k * g.lda + m : (size_t)m * g.lda + k] : 0;
            k = k0 + k_of(TB, e);
            int n = n0 + m_of(TB, e);
            next_b[i] = k < k_end && n < g.N ? b[TB ? (size_t)k * g.ldb + n : (size_t)n * g.ldb + k] : 0;
        }
    };
    load_next(k_begin);
    for (int k0 = k_begin; k0 < k_end; k0 += F32_BK) {
        EACH(i, 8) {
            int e = i * 128 + threadIdx.x;
            ta[place(k_of(TA, e), m_of(TA, e))] = next_a[i];
            tb[place(k_of(TB, e), m_of(TB, e))] = next_b[i];
        }
        __syncthreads();
        load_next(k0 + F32_BK);
        EACH(k, F32_BK) {
            float x[2][4], y[4];
            load(x[0], ta + k * F32_ROW + ty);
            load(x[1], ta + k * F32_ROW + ty + 4);
            load(y, tb + k * F32_ROW + tx);
            EACH(i, 8) {
                float xi = x[i / 4][i % 4 ^ k / 8 * 2];
                if (EPI == EPI_WEIGHT && TA) row_sums[i] += xi;
                EACH(j, 4) acc[i / 4][i % 4][j] += xi * y[j ^ k / 8 * 2];
            }
        }
        __syncthreads();
    }
    bool fours = !((g.N | g.ldc) % 4 || ((uintptr_t)g.out | (uintptr_t)g.bias) % 16); // all else lies at such places
    int col = n0 + tx;
    Matmul here = moved<EPI, float>(g, m0 + ty, col);
    EACH(half, 2) {
        int row = m0 + ty + 4 * half, down = 4 * half * g.ldc;
        unsigned other[4];
        EACH(i, 4) other[i] = place_of_other<EPI, float>(here, row + i);
        if (fours && col < g.N && row + 4 <= g.M) {
            Others<EPI, float, 4> o[4] = {};
            Raw<float, 4> bias = {};
            if (EpilogueOf<EPI, float>::BIAS && g.bias) fetch(&bias, here.bias);
            EACH(i, 4) epilogue_fetch(o + i, here, down + i * g.ldc, other[i]);
            epilogue_store<EPI, float, 4, 4>(here, down, g.ldc, other, 0, bias, o, acc[half]);
            continue;
        }
        EACH(i, 16) { // numbers one by one
            float v[1][1] = {{acc[half][i / 4][i % 4]}};
            int c = i % 4, at = down + i / 4 * g.ldc + c;
            Others<EPI, float, 1> o = {};
            Raw<float, 1> bias = {};
            if (row + i / 4 >= g.M || col + c >= g.N) continue;
            if (EpilogueOf<EPI, float>::BIAS && g.bias) fetch(&bias, here.bias + c);
            epilogue_fetch(&o, here, at, other[i / 4] + c);
            epilogue_store<EPI, float, 1, 1>(here, at, 0, other + i / 4, c, bias, &o, v);
        }
    }
    EACH(i, 8) {
        int row = m0 + ty + i;
        if (EPI == EPI_WEIGHT && TA && g.db && n0 + tx == 0 && row < g.M)
            g.db[row] = g.overwrite ? row_sums[i] : g.db[row] + row_sums[i];
    }
}

// out (M,N; row stride ldc) += the sum over `splits` of the partial products (M,N) in `part`, in order, or with `set` =
// bias (N), unless NULL, and that sum; db (M) += likewise from the partial sums behind them. What comes before row0,
// and col0 in the first `high` rows, was not split.
__global__ void split_sum_kernel(float *out, int ldc, float *db, int set, const float *bias, const float *part, int M,
                                 int N, int splits, int row0, int high, int col0) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x + (size_t)row0 * N, count = (size_t)M * N;
    unsigned here = (unsigned)i; // 64 bits divide slowly
    int row = i < count ? (int)(here / N) : (int)(i - count), col = i < count ? (int)(here % N) : 0;
    float sum = 0;
    if (row >= M || row < row0 || (row < row0 + high && col < col0)) return;
    if (i < count) {
        for (int s = 0; s < splits; s++) sum += part[s * count + i];
        out += (size_t)row * ldc + col;
        *out = sum + (set ? bias ? bias[col] : 0 : *out);
    } else if (db) {
        for (int s = 0; s < splits; s++) sum += part[splits * count + (size_t)s * M + row];
        db[row] += sum;
    }
}

// Starts the product; `half` says whether the operands are bf16. The sum over k of a weight gradient is as long as the
// batch has tokens, and its result small: it is split where that fills the GPU better, as far as the workspace reaches;
// so are products of conditioning and the final layer, whose rows or columns are few. Sampling splits nothing
// (gpu.unsplit), not by a model that trains either.
// On Hopper, whose tiles are large, only those are split that do not fill it once more.
template <bool TA, bool TB, int EPI>
static void matmul(int half, Matmul g) {
    assert(EPI != EPI_GELU || (g.add && (!half || g.add_rows == 1 || g.add_rows == g.M)));
    int across = (int)ceil_div(g.N, WG_N), down = (int)ceil_div(g.M, WG_M); // tiles of Hopper's, in pairs
    int upright = down / 2 * across, pairs = upright + down % 2 * (across + 1) / 2;
    int large = half && (EPI == EPI_WEIGHT ? g.M >= 128 && g.N >= 128
                                           : ceil_div(g.M, 128) * ceil_div(g.N, 128) * g.batch >= (size_t)gpu.sms);
    int wgmma = half && (gpu.wgmma > 1 || (gpu.wgmma && large && (EPI == EPI_WEIGHT || 2 * pairs >= gpu.sms)));
    int tile = large ? 128 : 64, step = wgmma ? 64 : half ? (int)BK : (int)F32_BK, splits = 1;
    int slots = wgmma ? pairs_at_once() : gpu.sms * (large ? 2 : 4); // tiles that the GPU works on at once
    int tiles = wgmma ? pairs : (int)(ceil_div(g.N, tile) * ceil_div(g.M, tile)),
        whole = wgmma ? tiles / slots * slots : 0;
    int may_split = EPI == EPI_WEIGHT || (EPI == EPI_FLOAT && !half && !g.add);
    if (may_split && !gpu.unsplit) { // more splits only where they save 5 % of the time; in times of a tile
        // Partial sums come and go, 8 bytes a number; meanwhile a GPU does about 200 operations a byte, 20 in fp32.
        double best = INFINITY, area = wgmma ? 2 * WG_M * WG_N : tile * tile;
        double sums = 4.0 * (half ? 200 : 20) * g.M * g.N * (tiles - whole) / (g.K * area * tiles * slots);
        for (int s = 1; s <= 32 && s * ((size_t)g.M * g.N + g.M) <= workspace.count && s * 256 <= g.K; s++) {
            double time = whole / slots + (double)ceil_div((size_t)(tiles - whole) * s, slots) / s + (s > 1) * s * sums;
            if (time < best / 1.05) best = time, splits = s;
        }
    }
    if (splits == 1) whole = tiles;
    g.k_chunk = (int)ceil_div(ceil_div(g.K, splits), step) * step;
    bool together = half && !wgmma; // all products of a batch at once
    for (int z = 0; z < (together ? 1 : g.batch); z++) {
        Matmul one = g;
        dim3 grid(tiles, splits, together ? g.batch : 1); // neighbours share rows of a
        if (EPI == EPI_STORE) half ? own_product<bf16>(&one, z) : own_product<float>(&one, z);
        if (!half)
            RUN((matmul_fp32<TA, TB, EPI>), grid, 128, 2 * F32_BK * F32_ROW * sizeof(float), one, workspace.memory);
        else if constexpr (TA || EPI != EPI_WEIGHT) { // conditioning alone adds to an input's gradient, in fp32
            if (wgmma)
                launch_wgmma<TA, TB, EPI>(one, across, upright, whole, tiles - whole, splits);
            else if (large)
                RUN((matmul_bf16<128, TA, TB, EPI>), grid, MATMUL_THREADS, 2 * STAGES * 128 * BK * sizeof(bf16), one,
                    workspace.memory);
            else
                RUN((matmul_bf16<64, TA, TB, EPI>), grid, MATMUL_THREADS, 2 * STAGES * 64 * BK * sizeof(bf16), one,
                    workspace.memory);
        }
    }
    if (splits == 1) return;
    int beside = whole - upright, high = beside < 0 ? 2 * WG_M : WG_M; // of the first tile that is split
    int row0 = wgmma ? (beside < 0 ? whole / across : down / 2) * 2 * WG_M : 0;
    int col0 = wgmma ? (beside < 0 ? whole % across : 2 * beside) * WG_N : 0;
    RUN(split_sum_kernel, (unsigned)ceil_div((size_t)(g.M - row0) * g.N + g.M, 256), 256, 0, (float *)g.out, g.ldc,
        g.db, EPI != EPI_WEIGHT, g.bias, workspace.memory, g.M, g.N, splits, row0, high, col0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention

// Multi-head attention without mask (FlashAttention, arXiv:2205.14135 and 2307.08691). A block has some rows of one
// head of one picture and walks over the columns, a tile at a time; each warp makes its rows of S = q·k^T in registers,
// as fragments, and turns them into its part of the result: the T x T matrix exists nowhere. HD is the head
// size rounded up to what the kernels are made for; channels beyond it are zeros. In fp32 the same steps run on plain
// multiply-adds. A row of a tile, LD, is an odd number of 16-byte pieces: no bank conflicts. The copies of the next
// tile run while a tile is used: what takes time here is waiting, for memory and for the result of the last mma.
template <typename A, int HD>
struct Tiles {
    enum { PIECE = 16 / sizeof(A), LD = HD + (HD / PIECE % 2 ? 0 : PIECE) }; // PIECE: elements in 16 bytes
    enum { SMALL = sizeof(A) == 2 && HD <= 72 };                             // what registers allow
    // Forward: warps of a block, each with 16 rows; columns of a tile. SMALL: 16 warps a multiprocessor,
    // of 100 KB of shared memory 8
    enum { WARPS = SMALL ? 8 : 4, ROWS = 16 * WARPS, COLS = SMALL ? 64 : 32 };
    // Backward: warps of a block, at most; keys of a warp; queries of a tile, and how many tiles there is room for; for
    // how many queries lse and delta; a group of 32 keys: k, v and dS
    enum { BACK_MI = SMALL ? 2 : 1, BACK_WARPS = 8, KEYS = 16 * BACK_MI }; // 2: a fragment of queries serves two mma
    enum { QUERIES = sizeof(A) == 2 ? 64 : 32, QUERIES_LD = QUERIES + 8, TILES = SMALL ? 2 : 1, STATS = 256 };
    enum { GROUP = 32 * (2 * LD + QUERIES_LD) };
};

// tile (rows,HD) = rows first.. of one head: p (T,hd), row stride ld; zero beyond both sizes. N: as many, `apart` in p
// and right behind each other in `tile`. By `threads` threads, each the same piece of every so many rows: no division,
// and 32 bits do within a picture.
template <typename A, int HD, int N = 1>
__device__ inline void load_head(A *tile, int rows, const A *p, int ld, int first, int T, int hd, int threads,
                                 int apart = 0) {
    enum { PIECE = Tiles<A, HD>::PIECE, PIECES = HD / PIECE, LD = Tiles<A, HD>::LD };
    unsigned thread = anew(threads == WARP ? threadIdx.x % WARP : threadIdx.x), step = (unsigned)threads / PIECES;
    unsigned c = thread % PIECES * PIECE, r = thread / PIECES;
#pragma unroll 1
    for (int n = 0; n < rows; n += step, r += step) {
        bool inside = c < (unsigned)hd && first + r < (unsigned)T;
        const A *from = p + (inside ? (first + r) * ld + c : 0);
        EACH(i, N)
            if (thread < step * PIECES && r < (unsigned)rows)
                cp_async16(tile + (i * rows + r) * LD + c, from + i * apart, inside);
    }
}

// s (16·MI,NT fragments) = rows (16·MI,HD)·cols (..,HD)^T
template <int HD, int MI, int NT>
__device__ inline void tile_scores(Frag (&s)[MI][NT], const bf16 *rows, const bf16 *cols) {
    enum { LD = Tiles<bf16, HD>::LD, STEPS = HD > 72 ? 2 : MI == 1 ? 8 : HD == 72 && !ON_HOPPER ? 1 : 2 };
    memset(s, 0, sizeof s);
    auto add = [&](auto half, int k) { // 16 channels; half: 8
        constexpr bool HALF = decltype(half)::value;
        Left a[MI];
        Right b[2];
        EACH(i, MI)
            left_load<false, HALF>(a[i], [&](int r, int piece) { return rows + (16 * i + r) * LD + k + 8 * piece; });
#pragma unroll
        for (int j = 0; j < NT; j += 2) {
            right_load<RIGHT_FAST, HALF>(
                b, [&](int r, int piece) { return cols + (FRAG_COLS * j + r) * LD + k + 8 * piece; });
            EACH(i, 2 * MI) frag_multiply<HALF>(s[i / 2][j + i % 2], a[i / 2], b[i % 2]);
        }
    };
#pragma unroll STEPS // more would take registers
    for (int k = 0; k + 16 <= HD; k += 16) add(std::false_type(), k);
    if constexpr (HD % 16 != 0) add(std::true_type(), HD - 8);
}

template <int HD, int NT>
__device__ inline void tile_scores(Frag (&s)[1][NT], const float *rows, const float *cols) {
    enum { LD = Tiles<float, HD>::LD };
    memset(s, 0, sizeof s);
    for (int k = 0; k < HD; k += 4) {
        float row[FRAG_ROWS][4], col[FRAG_RUN][4];
        EACH(r, FRAG_ROWS) load(row[r], rows + frag_row(r) * LD + k);
        EACH(j, NT * FRAG_RUNS) {
            EACH(c, FRAG_RUN) load(col[c], cols + (frag_col(j) + c) * LD + k);
            EACH(r, FRAG_ROWS) {
                EACH(i, 4 * FRAG_RUN) frag_run(s[0], r, j)[i / 4] += row[r][i % 4] * col[i / 4][i % 4];
            }
        }
    }
}

// out (16·MI,HD) += p (16·MI,NT fragments)·cols (..,HD); p goes from registers to registers.
template <int HD, int MI, int NT>
__device__ inline void tile_apply(Frag (&out)[MI][HD / FRAG_COLS], const Frag (&p)[MI][NT], const bf16 *cols) {
    enum { N16 = 16 / FRAG_COLS };
#pragma unroll
    for (int k = 0; k < NT; k += 2 * N16) { // 32 columns at a time
        Left a[2][MI];
        Right b[2];
        EACH(i, 2 * MI) left_from(a[i / MI][i % MI], p[i % MI] + k + i / MI * N16);
        EACH(j, HD / FRAG_COLS) {
            right_load<RIGHT_SLOW_DEEP, false>(b, [&](int r, int piece) {
                return cols + (FRAG_COLS * k + r) * Tiles<bf16, HD>::LD + FRAG_COLS * j + 8 * piece;
            });
            EACH(i, 2 * MI) frag_multiply(out[i % MI][j], a[i / MI][i % MI], b[i / MI]);
        }
    }
}

template <int HD, int NT>
__device__ inline void tile_apply(Frag (&out)[1][HD / FRAG_COLS], const Frag (&p)[1][NT], const float *cols) {
    EACH(k, FRAG_COLS * NT) {
        float x[FRAG_ROWS], y[FRAG_RUN];
        EACH(r, FRAG_ROWS) x[r] = frag_value(p[0][k / FRAG_COLS], r, k % FRAG_COLS);
        EACH(j, HD / FRAG_COLS * FRAG_RUNS) {
            load(y, cols + k * Tiles<float, HD>::LD + frag_col(j));
            EACH(r, FRAG_ROWS) {
                EACH(i, FRAG_RUN) frag_run(out[0], r, j)[i] += x[r] * y[i];
            }
        }
    }
}

// out (16,N fragments) += p^T·cols for 16 columns of p (rows,..) and as many as out has of `cols` (rows,..), or without
// `all` one fragment fewer; rows: groups of 32, GROUP apart
template <int HD, int N>
__device__ inline void tile_apply_groups(Frag (&out)[N], const bf16 *p, const bf16 *cols, int rows, bool all) {
    typedef Tiles<bf16, HD> S;
#pragma unroll 1
    for (int k = 0; k < rows; k += 32, p += S::GROUP, cols += S::GROUP) {
        Left a[2];
        Right b[2];
        EACH(i, 2)
            left_load<true, false>(a[i],
                                   [&](int r, int piece) { return p + (16 * i + r) * S::QUERIES_LD + 8 * piece; });
        EACH(j, N) {
            if (j == N - 1 && !all) break;
            right_load<RIGHT_SLOW_DEEP, false>(
                b, [&](int r, int piece) { return cols + r * S::LD + FRAG_COLS * j + 8 * piece; });
            EACH(i, 2) frag_multiply(out[j], a[i], b[i]);
        }
    }
}

template <int HD, int N>
__device__ inline void tile_apply_groups(Frag (&out)[N], const float *p, const float *cols, int rows, bool all) {
    typedef Tiles<float, HD> S;
    for (int k = 0; k < rows; k++) {
        int row = k / 32 * S::GROUP + k % 32 * S::LD, weight = k / 32 * S::GROUP + k % 32 * S::QUERIES_LD;
        EACH(j, N * FRAG_RUNS) {
            float c[FRAG_RUN];
            if (j / FRAG_RUNS == N - 1 && !all) break;
            load(c, cols + row + frag_col(j));
            EACH(r, FRAG_ROWS) {
                EACH(i, FRAG_RUN) frag_run(out, r, j)[i] += p[weight + frag_row(r)] * c[i];
            }
        }
    }
}

// Does something with each run of neighbours of a result (16,..), rows from `first` on, that is inside (T,cols):
// at(row, column, run)
template <int N, typename F>
__device__ inline void each_run(Frag (&x)[N], int first, int T, int cols, F at) {
    EACH(r, FRAG_ROWS) {
        int row = first + frag_row(r);
        EACH(j, N * FRAG_RUNS) {
            if (row < T && frag_col(j) / 8 * 8 < cols) at(row, frag_col(j), frag_run(x, r, j));
        }
    }
}

// Such a result times `by` to rows first.. of p (T,cols), row stride ld
template <int N, typename A>
__device__ inline void store_head(A *p, int ld, int first, int T, int cols, Frag (&x)[N], float by) {
    each_run(x, first, T, cols, [&](int row, int col, FragRun &run) {
        float v[FRAG_RUN];
        EACH(i, FRAG_RUN) v[i] = by * run[i];
        store(p + (size_t)row * ld + col, v);
    });
}

#if __CUDA_ARCH__ >= 1200 // where registers are short, its shared memory has room for one block
#define FORWARD_BLOCKS 1
#else
#define FORWARD_BLOCKS 2
#endif

// qkv (B,T,3D): per token q|k|v, head, channel; out (B,T,D). lse (B,H,T), unless NULL, = log2 of the sum of a row's
// exponentials, for the backward pass. `scale` is log2(e)/sqrt(hd): everything is in powers of two. The running maximum
// and sum of a row are corrected as larger scores turn up (the online softmax).
template <typename A, int HD>
__global__ void __launch_bounds__((Tiles<A, HD>::WARPS * WARP), FORWARD_BLOCKS)
    attention_kernel(A *out, float *lse, const A *qkv, int T, int D, int hd, float scale) {
    typedef Tiles<A, HD> S;
    enum { ROWS = S::ROWS, COLS = S::COLS, NT = COLS / FRAG_COLS, NO = HD / FRAG_COLS, PAIR = 2 * COLS * S::LD };
    enum { THREADS = S::WARPS * WARP };
    SHARED_DYNAMIC(A, pairs); // two of k and v, then q
    A *tq = pairs + 2 * PAIR;
    int warp = threadIdx.x / WARP, first = blockIdx.x * ROWS + warp * 16;
    auto head = [&](int ld) {
        return (size_t)anew(blockIdx.z * T) * ld + (ON_HOPPER ? blockIdx.y * hd : anew(blockIdx.y * hd));
    };
    auto load_columns = [&](int c0) {
        load_head<A, HD, 2>(pairs + c0 / COLS % 2 * PAIR, COLS, qkv + head(3 * D) + D, 3 * D, c0, T, hd, THREADS, D);
        cp_async_commit();
    };
    Frag o[1][NO] = {};
    float largest[FRAG_ROWS], sum[FRAG_ROWS] = {}; // the largest times scale
    EACH(r, FRAG_ROWS) largest[r] = -INFINITY;
    load_head<A, HD>(tq, ROWS, qkv + head(3 * D), 3 * D, blockIdx.x * ROWS, T, hd, THREADS);
    load_columns(0);
    for (int c0 = 0; c0 < T; c0 += COLS) {
        Frag s[1][NT];
        const A *tk = pairs + c0 / COLS % 2 * PAIR, *tv = tk + COLS * S::LD;
        cp_async_wait<0>();
        __syncthreads(); // these columns are there, and nobody needs those before them any more
        if (c0 + COLS < T) load_columns(c0 + COLS);
        if (first >= T) continue; // no rows
        tile_scores<HD>(s, tq + 16 * warp * S::LD, tk);
        if (c0 + COLS > T)
            EACH(i, FRAG_ROWS * NT * FRAG_RUNS * FRAG_RUN) {
                int j = i / FRAG_RUN % (NT * FRAG_RUNS), r = i / (FRAG_RUN * NT * FRAG_RUNS);
                if (c0 + frag_col(j) + i % FRAG_RUN >= T) frag_run(s[0], r, j)[i % FRAG_RUN] = -INFINITY;
            }
        EACH(r, FRAG_ROWS) {
            float top = -INFINITY;
            EACH(i, NT * FRAG_RUNS * FRAG_RUN) top = fmaxf(top, frag_run(s[0], r, i / FRAG_RUN)[i % FRAG_RUN]);
            top = fmaxf(largest[r], row_max(top) * scale);
            float correct = fast_exp2(largest[r] - top);
            largest[r] = top;
            sum[r] *= correct;
            EACH(i, NO * FRAG_RUNS * FRAG_RUN) frag_run(o[0], r, i / FRAG_RUN)[i % FRAG_RUN] *= correct;
            EACH(i, NT * FRAG_RUNS * FRAG_RUN) {
                float *x = &frag_run(s[0], r, i / FRAG_RUN)[i % FRAG_RUN];
                *x = fast_exp2(*x * scale - top);
                sum[r] += *x;
            }
        }
        tile_apply<HD>(o, s, tv);
    }
    EACH(r, FRAG_ROWS) {
        float all = row_sum(sum[r]);
        int row = first + frag_row(r);
        if (lse && frag_col(0) == 0 && row < T)
            lse[((size_t)blockIdx.z * gridDim.y + blockIdx.y) * T + row] = largest[r] + log2f(all);
        all = __fdividef(1, all);
        EACH(i, NO * FRAG_RUNS * FRAG_RUN) frag_run(o[0], r, i / FRAG_RUN)[i % FRAG_RUN] *= all;
    }
    store_head(out + head(D), D, first, T, hd, o[0], 1);
}

// The backward pass of one head of one picture, with P recomputed from q, k and lse: dv = P^T·dout, dP = dout·v^T,
// dS = P·(dP - delta)/sqrt(hd), dk = dS^T·q, dq = dS·k, where delta, what softmax's backward subtracts from each row,
// is the sum over the head's channels of dout·out. A warp has KEYS keys: it makes rows of P^T and dS^T, whose products
// it keeps. The block leaves dS of QUERIES queries in shared memory, and each warp makes dq of some of them, 16 and
// half of the channels at a time. A launch does up to 256 keys (of fp32 or large heads 128), fewer where shared memory
// is small; if T is more, dq waits in `sums` (B,T,D) for the rest.
template <typename A, int HD>
__global__ void __launch_bounds__((Tiles<A, HD>::BACK_WARPS * WARP), 1)
    attention_backward_kernel(A *dqkv, float *sums, const A *dout, const A *out, const float *lse, const A *qkv,
                              int first, int T, int D, int hd, float scale) {
    typedef Tiles<A, HD> S;
    enum { MI = S::BACK_MI, QUERIES = S::QUERIES, TILE = 2 * QUERIES * S::LD, NT = 32 / FRAG_COLS };
    enum { NO = HD / FRAG_COLS, HALF = (NO + 1) / 2 };
    SHARED_DYNAMIC(float, q_lse);
    float *q_delta = q_lse + S::STATS;
    int warp = threadIdx.x / WARP, warps = blockDim.x / WARP, keys = warps * S::KEYS, mine = warp * S::KEYS;
    A *tiles = (A *)(q_delta + S::STATS), *groups = tiles + S::TILES * TILE; // tile: q and dout
    A *tk = groups + mine / 32 * S::GROUP + mine % 32 * S::LD, *tv = tk + 32 * S::LD;
    A *ds = groups + mine / 32 * S::GROUP + 64 * S::LD + mine % 32 * S::QUERIES_LD;
    auto head = [&](int ld) {
        return (size_t)anew(blockIdx.y * T) * ld + (ON_HOPPER ? blockIdx.x * hd : anew(blockIdx.x * hd));
    };
    auto load_queries = [&](int q0) {
        A *tq = tiles + q0 / QUERIES % S::TILES * TILE;
        if (q0 < T) {
            load_head<A, HD>(tq, QUERIES, qkv + head(3 * D), 3 * D, q0, T, hd, blockDim.x);
            load_head<A, HD>(tq + QUERIES * S::LD, QUERIES, dout + head(D), D, q0, T, hd, blockDim.x);
        }
        cp_async_commit();
    };
    auto load_stats = [&](int q0) { // of the next queries, four threads each; all loads before anything waits for one
        typedef Vec<A, S::PIECE> Piece;
        enum { PIECES = (HD / S::PIECE + 3) / 4 };
        int count = min((int)S::STATS, (T - q0 + QUERIES - 1) / QUERIES * QUERIES);
        size_t from = head(D), row0 = ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * T;
        for (int i = threadIdx.x; i < 4 * count; i += blockDim.x) {
            int row = q0 + i / 4, c = i % 4 * S::PIECE;
            Piece g[PIECES], o[PIECES];
            float delta = 0, l = row < T ? lse[row0 + row] : INFINITY; // beyond T: without weight
            EACH(n, PIECES) {
                size_t at = from + (row < T && c + 4 * n * S::PIECE < hd ? row * D + c + 4 * n * S::PIECE : 0);
                g[n] = *(const Piece *)(dout + at), o[n] = *(const Piece *)(out + at);
            }
            EACH(n, PIECES) {
                EACH(j, S::PIECE)
                    if (c + 4 * n * S::PIECE < hd) delta += to_float(g[n].v[j]) * to_float(o[n].v[j]);
            }
            delta += lane_xor(delta, 1);
            delta += lane_xor(delta, 2);
            if (i % 4 == 0) q_delta[i / 4] = delta, q_lse[i / 4] = l;
        }
    };
    load_head<A, HD>(tk, S::KEYS, qkv + head(3 * D) + D, 3 * D, first + mine, T, hd, WARP);
    load_head<A, HD>(tv, S::KEYS, qkv + head(3 * D) + 2 * D, 3 * D, first + mine, T, hd, WARP);
    EACH(i, S::TILES) load_queries(i * QUERIES);
    Frag dk[MI][NO] = {}, dv[MI][NO] = {};
    for (int q0 = 0; q0 < T; q0 += 32) {
        int in_tile = q0 % QUERIES;
        const A *tq = tiles + q0 / QUERIES % S::TILES * TILE + in_tile * S::LD, *tg = tq + QUERIES * S::LD;
        if (q0 % S::STATS == 0) load_stats(q0);
        if (!in_tile) {
            cp_async_wait<S::TILES - 1>();
            __syncthreads(); // these queries are there, and nobody needs dS of those before any more
        }
        Frag p[MI][NT], g[MI][NT];
        float of[FRAG_RUN]; // these queries
        tile_scores<HD>(p, tk, tq);
        EACH(j, NT * FRAG_RUNS) { // a key beyond T meets a row of zeros in k: all its weight must be is finite
            load(of, q_lse + q0 % S::STATS + frag_col(j));
            EACH(r, MI * FRAG_ROWS) {
                FragRun &x = frag_run(p[r / FRAG_ROWS], r % FRAG_ROWS, j);
                EACH(i, FRAG_RUN) x[i] = fast_exp2(fminf(x[i] * scale - of[i], 0));
            }
        }
        tile_apply<HD>(dv, p, tg);
        tile_scores<HD>(g, tv, tg);
        EACH(j, NT * FRAG_RUNS) {
            load(of, q_delta + q0 % S::STATS + frag_col(j));
            EACH(r, MI * FRAG_ROWS) {
                FragRun &x = frag_run(g[r / FRAG_ROWS], r % FRAG_ROWS, j);
                EACH(i, FRAG_RUN) x[i] = frag_run(p[r / FRAG_ROWS], r % FRAG_ROWS, j)[i] * (x[i] - of[i]);
                int row = r / FRAG_ROWS * 16 + frag_row(r % FRAG_ROWS);
                store(ds + row * S::QUERIES_LD + in_tile + frag_col(j), x);
            }
        }
        tile_apply<HD>(dk, g, tq);
        if (in_tile + 32 < QUERIES && q0 + 32 < T) continue;
        __syncthreads(); // dS is whole, and nobody needs these queries any more
        int tile = anew(q0) / QUERIES * QUERIES;
        load_queries(tile + S::TILES * QUERIES);
#pragma unroll 1
        for (int unit = anew(threadIdx.x) / WARP; unit < QUERIES / 8; unit += warps) {
            Frag dq[HALF] = {};
            int query = unit / 2 * 16, row = tile + query, col = unit % 2 * HALF * FRAG_COLS;
            if (row >= T) break;
            if (first)
                each_run(dq, row, T, hd - col,
                         [&](int r, int c, FragRun &run) { load(run, sums + head(D) + (size_t)r * D + col + c); });
            tile_apply_groups<HD>(dq, groups + 64 * S::LD + query, groups + col, keys, col + FRAG_COLS * HALF <= HD);
            if (first + keys < T)
                store_head(sums + head(D) + col, D, row, T, hd - col, dq, 1);
            else
                store_head(dqkv + head(3 * D) + col, 3 * D, row, T, hd - col, dq, scale * 0.6931471806f);
        }
    }
    EACH(i, MI) {
        int row = first + mine + 16 * i;
        store_head(dqkv + head(3 * D) + D, 3 * D, row, T, hd, dk[i], scale * 0.6931471806f);
        store_head(dqkv + head(3 * D) + 2 * D, 3 * D, row, T, hd, dv[i], 1);
    }
}

// Runs a statement with HD standing for the smallest size that the kernels are made for and that holds head size hd.
#define HEAD_SIZE(hd, ...)                                              \
    do {                                                                \
        if ((hd) <= 32) {                                               \
            enum { HD = 32 };                                           \
            __VA_ARGS__;                                                \
        } else if ((hd) <= 64) {                                        \
            enum { HD = 64 };                                           \
            __VA_ARGS__;                                                \
        } else if ((hd) <= 72) {                                        \
            enum { HD = (72 + FRAG_COLS - 1) / FRAG_COLS * FRAG_COLS }; \
            __VA_ARGS__;                                                \
        } else {                                                        \
            enum { HD = 128 };                                          \
            __VA_ARGS__;                                                \
        }                                                               \
    } while (0)

static void attention_forward(int half, Act *out, float *lse, const Act *qkv, int B, int T, int D, int H) {
    int hd = D / H;
    float scale = (float)(1.4426950408889634 / sqrt((double)hd));
    TYPED(half, HEAD_SIZE(hd, {
              typedef Tiles<A, HD> S;
              dim3 grid((unsigned)ceil_div(T, S::ROWS), H, B);
              RUN((attention_kernel<A, HD>), grid, WARP * S::WARPS, S::LD * (S::ROWS + 4 * S::COLS) * sizeof(A),
                  (A *)out, lse, (const A *)qkv, T, D, hd, scale);
          }));
}

// dqkv (B,T,3D) is overwritten; sums (B,T,D) is scratch.
static void attention_backward(int half, Act *dqkv, float *sums, const Act *dout, const Act *out, const float *lse,
                               const Act *qkv, int B, int T, int D, int H) {
    int hd = D / H;
    float scale = (float)(1.4426950408889634 / sqrt((double)hd));
    TYPED(half, HEAD_SIZE(hd, {
              typedef Tiles<A, HD> S;
              auto shared = [](int keys) {
                  int elements = S::TILES * 2 * S::QUERIES * S::LD + keys / 32 * S::GROUP;
                  return 2 * S::STATS * sizeof(float) + elements * sizeof(A);
              };
              int most = S::BACK_WARPS; // keys are a multiple of 32
              while (shared(most * S::KEYS) > gpu.shared) most /= 2;
              int parts = (int)ceil_div(T, most * S::KEYS), keys = (int)ceil_div(ceil_div(T, parts), 32) * 32;
              for (int first = 0; first < T; first += keys)
                  RUN((attention_backward_kernel<A, HD>), dim3(H, B), WARP * keys / S::KEYS, shared(keys), (A *)dqkv,
                      sums, (const A *)dout, (const A *)out, lse, (const A *)qkv, first, T, D, hd, scale);
          }));
}

// ---------------------------------------------------------------------------------------------------------------------
// The model's memory

typedef struct {
    char *memory;
    size_t bytes;
} Arena;

// Every array starts at a multiple of 256 bytes. In the harness a gap lies between them: see redzone in
// test/cuda_emu.h.
static char *take(Arena *a, size_t bytes) {
    char *at = a->memory ? a->memory + a->bytes : NULL;
    a->bytes += ceil_div(bytes, 256) * 256;
#ifdef CUDA_EMU_H
    if (a->memory) emu::redzone(at + bytes, a->memory + a->bytes + 256 - at - bytes);
    a->bytes += 256;
#endif
    return at;
}
// Gives each of these pointers its own `bytes`.
template <typename... P>
static void take_all(Arena *a, size_t bytes, P **...p) {
    ((*p = (P *)take(a, bytes)), ...);
}

// Points the activations into `memory` (NULL: counts only). Returns the number of bytes.
static size_t activations_point(Model *m, char *memory) {
    const Config *c = &m->config;
    Activations *a = &m->a;
    Arena arena = {memory, 0}, *r = &arena;
    size_t B = m->batch, T = config_tokens(c), D = c->width, N = B * T * D, pixels = B * c->image_size * c->image_size;
    size_t F = sizeof(float), A = m->half ? sizeof(bf16) : F;
    int blocks = config_blocks(c), last = blocks + (c->fixed_point ? m->max_m : 0);
    const Layer *shared = NULL;
    take_all(r, T * D * F, &a->pos);
    take_all(r, DIFFUSION_STEPS * 256 * F, &a->time_table);
    take_all(r, B * sizeof(int), &a->t, &a->y);
    take_all(r, pixels * c->channels * F, &a->picture, &a->noise, &a->x_t, &a->before);
    take_all(r, B * sizeof(LossPlace), &a->places);
    take_all(r, DIFFUSION_STEPS * sizeof(SampleStep), &a->steps);
    take_all(r, sizeof(int), &a->step);
    if (c->fixed_point) take_all(r, N * F, &a->reused);
    if (c->fixed_point && m->window) {
        take_all(r, 2 * (m->window + 1) * N * F, &a->history);
        take_all(r, B * HISTORY * HISTORY * sizeof(double), &a->gram);
    }
    m->scratch = r->bytes;
    for (int l = 0; l <= last; l++) {
        Layer *at = &a->layer[l];
        int keeps_h = c->fixed_point && c->skip && l == c->pre_depth + 1; // z must not overwrite it
        float *x = l ? a->layer[l - 1].x : NULL;
        if (m->training || !l || keeps_h) take_all(r, N * F, &x);
        at->x = x;
        if (l == last || (c->fixed_point && l == c->pre_depth)) continue; // the last output, the injection: x alone
        if (shared && (m->recompute || !m->training)) {
            *at = *shared;
            at->x = x;
            continue;
        }
        shared = at;
        take_all(r, 3 * N * A, &at->qkv);
        take_all(r, N * A, &at->att);
        // m varies from step to step, so most layers behind the injection serve an iteration or a post block.
        int within = l > c->pre_depth && l <= c->pre_depth + m->max_m;
        int iteration = c->fixed_point && (within || m->recompute || !m->training);
        if (iteration) take_all(r, N * F, &at->in);
        if (!m->training) continue;
        if (iteration) take_all(r, 2 * N * A, &at->u);
        take_all(r, B * c->heads * T * F, &at->lse);
        take_all(r, 4 * B * T * F, &at->stats);
        take_all(r, N * A, &at->proj, &at->fc2);
        take_all(r, 4 * N * A, &at->fc1);
    }
    take_all(r, pixels * c->channels * F, &a->patches);
    take_all(r, pixels * config_out_channels(c) * F, &a->out, &a->patch_out);
    take_all(r, B * 256 * F, &a->time_freq);
    take_all(r, B * D * F, &a->time_hidden, &a->time_silu, &a->cond, &a->cond_pp, &a->cond_silu, &a->cond_pp_silu);
    take_all(r, blocks * B * 6 * D * F, &a->mod);
    take_all(r, B * 2 * D * F, &a->final_mod);
    take_all(r, N * A, &a->normed);
    take_all(r, 4 * N * A, &a->gelu);
    take_all(r, N * F, &a->dq);
    take_all(r, 2 * B * T * F, &a->final_stats);
    a->z_before = a->final_normed = a->recomputed = a->dq; // no two of them are needed at a time
    if (c->fixed_point) {
        take_all(r, N * A, &a->inj);
        take_all(r, 2 * N * F, &a->inj_part);
        if (m->half) take_all(r, N * A, &a->z);
    }
    take_all(r, (2 * B + NORM_BLOCKS) * sizeof(double), &a->sums);
    if (!m->training) return arena.bytes;
    take_all(r, N * F, &a->dx);
    take_all(r, N * A, &a->dnormed, &a->dbranch);
    if (m->half) take_all(r, N * A, &a->dx_act);
    take_all(r, 4 * N * A, &a->dwide);
    if (c->fixed_point) take_all(r, 2 * N * F, &a->du_sum);
    take_all(r, blocks * B * 6 * D * F, &a->dmod);
    take_all(r, B * 2 * D * F, &a->dfinal_mod);
    take_all(r, B * D * F, &a->dcond, &a->dcond_pp, &a->dtime);
    take_all(r, 3 * B * ceil_div(T, LN_CHUNK) * D * F, &a->parts);
    take_all(r, pixels * config_out_channels(c) * F, &a->dout);
    if (m->training == TRAIN_MUON)
        take_all(r, MUON_ROOM * D * D * A, &a->muon[0], &a->muon[1], &a->muon[2], &a->muon[3]);
    return arena.bytes;
}

// The arithmetic that --dtype asks for; dies when there is no GPU for it.
static int compute_dtype(int dtype) {
    gpu_open();
    return dtype == COMPUTE_FP32 ? COMPUTE_FP32 : COMPUTE_BF16;
}

// Bytes of device memory for parameters of all kinds
static size_t params_bytes(const Model *m) {
    return (size_t)m->n_params * ((m->training ? 5 : 1) * sizeof(real) + (m->half ? sizeof(bf16) : 0));
}

// What is made once, in double: positions and timesteps
static void model_tables(Model *m) {
    int side = m->config.image_size / m->config.patch, D = m->config.width;
    float *pos = (float *)xcalloc((size_t)side * side * D, sizeof *pos, "tables");
    float *time = (float *)xcalloc(DIFFUSION_STEPS * 256, sizeof *time, "tables");
    position_embedding(pos, side, D);
    time_embeddings(time, &m->config);
    gpu_upload(m->a.pos, pos, (size_t)side * side * D * sizeof(float));
    gpu_upload(m->a.time_table, time, DIFFUSION_STEPS * 256 * sizeof(float));
    gpu_wait();
    xfree(pos);
    xfree(time);
}

// A model with room for `batch` pictures and, for training, `max_m` gradient iterations, for sampling Anderson
// acceleration over `window` (0: none). Its weights are zero. Refuses sizes that the kernels do not serve, or beyond
// the GPU's memory, naming the options that lower it.
static Model *model_create(const Config *config, int batch, int max_m, int recompute, int training, int window,
                           int dtype) {
    gpu_open();
    int hd = config->width / config->heads;
    if (gpu.shared < 64 << 10)
        die("this GPU gives a block %zu KB of shared memory; the program needs 64", gpu.shared >> 10);
    if (config->width % 8)
        die("width %d: the GPU program needs a multiple of 8; or use the CPU program", config->width);
    if (hd % 8 || hd > 128)
        die("heads %d: head size %d; the GPU program needs a multiple of 8, at most 128; or use the CPU program",
            config->heads, hd);
    if (dtype == COMPUTE_FP32 && hd > 72 && gpu.shared < 99 << 10)
        die("heads %d: head size %d in fp32 needs more shared memory than this GPU has: --dtype bf16", config->heads,
            hd);
    size_t patch = (size_t)config->patch * config->patch * config_out_channels(config), floats = gpu.shared / 4;
    if (patch > floats) // patches_kernel's shared memory
        die("patch %d: this GPU takes at most %zu numbers in a patch; or use the CPU program", config->patch, floats);
    size_t widest = (floats - 4) / (4 * LN_STAGES) / 8 * 8; // layernorm_backward_kernel holds a token of each stage
    if (training && (size_t)config->width > widest)
        die("width %d: on this GPU training takes at most %zu; or use the CPU program", config->width, widest);
    if (batch > 65535) die("%d pictures at a time; the GPU program takes at most 65535: lower --batch", batch);
    double tokens = (double)batch * config_tokens(config); // ints count them; 32 bits count what is in inj_part and mod
    if (tokens > 1 << 28 || 2 * tokens * config->width > UINT32_MAX || 6.0 * batch * config->width > UINT32_MAX)
        die("%d pictures of %d tokens at a time are too many: lower --batch", batch, config_tokens(config));
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
    ParamWalk w = params_point(&m->p, config, NULL, NULL);
    m->n_tensors = w.count;
    m->n_params = w.size;
    m->tensors = (ParamTensor *)xcalloc((size_t)w.count, sizeof *m->tensors, "the model");
    m->activation_bytes = activations_point(m, NULL);
    size_t workspace_size = training ? workspace_floats(config->width) : 0, have, all;
    size_t need = m->activation_bytes + params_bytes(m) + workspace_size * sizeof(float);
    CHECK(cudaMemGetInfo(&have, &all));
    if (need > have)
        die("this model with %d pictures at a time needs %.0f MB and the GPU has %.0f MB free: lower --batch%s%s",
            batch, (double)need / 1e6, (double)have / 1e6, training ? ", set --micro_batch, or set --recompute 1" : "",
            m->half ? "" : ", or set --dtype bf16");
    for (int kind = 0; kind < (training ? 5 : 1); kind++) {
        m->memory[kind] = (real *)gpu_malloc((size_t)w.size * sizeof(real), "weights, gradients and optimiser");
        gpu_zero(m->memory[kind], (size_t)w.size * sizeof(real));
    }
    if (m->half) m->half_weights = (bf16 *)gpu_malloc((size_t)w.size * sizeof(bf16), "weights");
    params_point(&m->p, config, m->memory[MODEL_WEIGHTS], m->tensors);
    if (training) params_point(&m->g, config, m->memory[MODEL_GRADS], NULL);
    m->activations = (char *)gpu_malloc(m->activation_bytes, "activations");
    activations_point(m, m->activations);
    m->places = (LossPlace *)xcalloc((size_t)batch, sizeof *m->places, "the model");
    m->graphs = (StepGraph *)xcalloc(MAX_GRAPHS, sizeof *m->graphs, "the model");
    workspace_reserve(workspace_size);
    model_tables(m);
    return m;
}

static void model_free(Model *m) {
    gpu_wait();
    for (int kind = 0; kind < 5; kind++) gpu_free(m->memory[kind], (size_t)m->n_params * sizeof(real));
    gpu_free(m->half_weights, (size_t)m->n_params * sizeof(bf16));
    gpu_free(m->activations, m->activation_bytes);
    for (int i = 0; i < m->n_graphs; i++) CHECK(cudaGraphExecDestroy(m->graphs[i].exec));
    xfree(m->graphs);
    xfree(m->places);
    xfree(m->a.layer);
    xfree(m->tensors);
    xfree(m);
}

// Copies parameters first..first+count-1 of one kind from or to the host's memory. After new weights: model_use.
static void model_download(const Model *m, int kind, int64_t first, int64_t count, float *host) {
    gpu_download(host, m->memory[kind] + first, (size_t)count * sizeof(real));
}

// The weights that the forward pass uses: MODEL_WEIGHTS or, for pictures during training, MODEL_EMA
static void model_use(Model *m, int kind) {
    size_t even = (size_t)m->n_params / 4 * 4; // behind it stand biases of layers that compute in fp32
    params_point(&m->p, &m->config, m->memory[kind], NULL);
    as_act(m, (Act *)m->half_weights, m->memory[kind], even);
}

static void model_upload(Model *m, int kind, int64_t first, int64_t count, const float *host) {
    gpu_upload(m->memory[kind] + first, host, (size_t)count * sizeof(real));
    gpu_wait();
}

// ---------------------------------------------------------------------------------------------------------------------
// The GPU: errors, memory, copies

static void check(cudaError_t error, const char *what) {
    if (error != cudaSuccess)
        die("CUDA: %s: %s%s", what, cudaGetErrorString(error),
            error == cudaErrorNoKernelImageForDevice ? "; build the program on this machine" : "");
}

// Old drivers cannot load a kernel while a graph is recorded. Before main, for MPI may start CUDA.
__attribute__((constructor)) static void load_eagerly(void) { setenv("CUDA_MODULE_LOADING", "EAGER", 0); }

static void ranks_same(const char *what, uint64_t hash); // from Part 5

static void gpu_open(void) {
    if (gpu.ready) return;
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0)
        die("no GPU that this program can use: %s; install a current NVIDIA driver, or use the CPU program",
            error != cudaSuccess ? cudaGetErrorString(error) : "none was found");
    cudaDeviceProp info;
#ifdef NCCL
    if (count > 1 && ranks.here > count) // one: it may be this rank's own
        die("%d ranks on a machine with %d GPUs: start as many as GPUs", ranks.here, count);
#endif
    CHECK(cudaSetDevice(ranks.local % count));
    CHECK(cudaGetDeviceProperties(&info, ranks.local % count));
#ifdef NVIDIA
    if (info.major < 8)
        die("the GPU %s has compute capability %d.%d; this program needs 8.0 (Ampere) or newer", info.name, info.major,
            info.minor);
#endif
    gpu.sms = info.multiProcessorCount;
    gpu.shared = info.sharedMemPerBlockOptin;
#if HOPPER
    const char *wanted = getenv("FPDM_WGMMA"); // as gpu.wgmma; 0: what other GPUs do
    CHECK(cudaMemcpyFromSymbol(&gpu.wgmma, has_wgmma, sizeof gpu.wgmma));
    if (gpu.wgmma && wanted) gpu.wgmma = atoi(wanted);
    cudaDriverEntryPointQueryResult found;
    void **encode = (void **)&box_map_encode;
#if CUDART_VERSION >= 12050
    if (gpu.wgmma)
        CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", encode, 12000, cudaEnableDefault, &found));
#else
    if (gpu.wgmma) CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", encode, cudaEnableDefault, &found));
#endif
    if (!box_map_encode) gpu.wgmma = 0;
#endif
    CHECK(cudaStreamCreateWithFlags(&gpu.stream, cudaStreamNonBlocking));
    gpu.ready = 1;
    // Each rank makes the update itself, and only one kind of GPU makes the same bits of it.
    if (ranks.count > 1)
        ranks_same("another kind of GPU",
                   (uint64_t)(10 * info.major + info.minor) << 32 | (uint64_t)(gpu.sms << 2 | gpu.wgmma));
}

static void gpu_wait(void) { CHECK(cudaStreamSynchronize(gpu.stream)); }

// Device memory; what is in it is left as it is.
static void *gpu_malloc(size_t bytes, const char *what) {
    void *p = NULL;
    cudaError_t error = cudaMalloc(&p, bytes ? bytes : 1);
    if (error == cudaErrorMemoryAllocation)
        die("no GPU memory for %s: %.0f MB; use a smaller batch or model", what, (double)bytes / 1e6);
    check(error, "cudaMalloc");
    gpu.allocated += bytes;
    return p;
}

static void gpu_zero(void *p, size_t bytes) { CHECK(cudaMemsetAsync(p, 0, bytes, gpu.stream)); }

static void gpu_free(void *p, size_t bytes) {
    CHECK(cudaFree(p));
    gpu.allocated -= p ? bytes : 0;
}

static void gpu_upload(void *device, const void *host, size_t bytes) {
    CHECK(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, gpu.stream));
}

static void gpu_download(void *host, const void *device, size_t bytes) {
    CHECK(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, gpu.stream));
    gpu_wait();
}

static void graph_begin(void) { CHECK(cudaStreamBeginCapture(gpu.stream, cudaStreamCaptureModeRelaxed)); }

static cudaGraphExec_t graph_end(void) {
    cudaGraph_t recorded;
    cudaGraphExec_t exec;
    CHECK(cudaStreamEndCapture(gpu.stream, &recorded));
    CHECK(cudaGraphInstantiate(&exec, recorded, NULL, NULL, 0)); // in the form that CUDA 11.4 to 13 share
    CHECK(cudaGraphDestroy(recorded));
    return exec;
}

static void gpu_copy(void *to, const void *from, size_t bytes) {
    CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, gpu.stream));
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

// Benchmark of fpdm_cpu.c, or with -DGPU of fpdm.cu, which is included whole: one figure a line, `name value unit`.
//
//   bench_cpu [--name value ...]      --help lists the options
//
// peak_gflops (fused multiply-adds, measured), gemm_gflops_FORM_MxNxK for every matmul of the model, then a training
// step and sampling. On a CPU also time_KIND_ms, what each kind of layer takes of the step (one call of it alone, times
// the calls in a step), and time_sum_ms, their sum.

#ifdef GPU
#include "../fpdm.cu"
#else
#include "../fpdm_cpu.c"
#endif
#include <sys/resource.h>

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int count) {
    qsort(values, (size_t)count, sizeof *values, by_value);
    return values[count / 2];
}

#ifndef GPU

// Peak resident memory of the process so far, in MB
static double peak_memory(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_maxrss * 1024.0 / 1e6;
}

// Independent chains of multiply-adds in registers; volatile, so that nothing about them is known at compile time.
enum { CHAINS = 16 };
static void peak_chains(int half, int reps) {
    volatile real scale = 0.5, shift = 1, sink;
    volatile bf16x2 ones = 0x3f803f80u;
    vec x[CHAINS], a = (vec){0} + scale, b = (vec){0} + shift;
    bf16x2 pair = ones;
    vec_bf16x2 pairs = (vec_bf16x2){0} + pair;
    for (int i = 0; i < CHAINS; i++) x[i] = a + (real)i;
    for (int r = 0; r < reps; r++) {
        UNROLL
        for (int i = 0; i < CHAINS; i++) {
            if (half)
                x[i] = (vec)pair_multiply((vec_float)x[i], pair, pairs);
            else
                x[i] = x[i] * a + b;
        }
    }
    for (int i = 1; i < CHAINS; i++) x[0] += x[i];
    for (int i = 0; i < VL; i++) sink = x[0][i];
    (void)sink;
}

// As many multiply-adds in Intel's tiles: four products of 16x32 by 32x16 for 64 rounds of chains of pairs
static void peak_tiles(int reps) {
    amx_begin();
    for (int r = 0; r < reps; r += 4 * 16 * 16 * 32 / (2 * VL * CHAINS)) {
#ifdef AMX
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
#endif
    }
    amx_end();
}

static double peak_once(int half, int reps) {
    double t0 = now_ms();
#pragma omp parallel
    {
        if (half && amx_allowed())
            peak_tiles(reps);
        else if (half)
            peak_chains(1, reps);
        else
            peak_chains(0, reps);
    }
    return 2e-9 * max_threads() * VL * CHAINS * (half ? 2 : 1) * reps / (1e-3 * (now_ms() - t0));
}

// How often a training step calls each kind of layer
typedef struct {
    int forward, backward;     // blocks
    int z_forward, z_backward; // iterations
} Calls;

static Calls step_calls(const Config *c, int n, int m) {
    int once = c->fixed_point ? c->pre_depth + c->post_depth : c->depth;
    if (!c->fixed_point) return (Calls){once, once, 0, 0};
    return (Calls){once + n + m, once + m, n + m, m};
}

static double matmul_ms; // in a training step

// Peak rate of fused multiply-adds, then every matmul of the model in its three forms.
static void bench_matmul(const Config *c, int B, int rounds, int dtype, Calls calls) {
    int half = dtype == COMPUTE_BF16, fixed = c->fixed_point;
    double peak = 0;
    for (int i = 0; i < 20; i++) peak = fmax(peak, peak_once(half, 1000000));
    printf("peak_gflops %.1f GFLOP/s\n", peak);
    int D = c->width, M = B * config_tokens(c),
        shapes[][2] = {{3 * D, D}, {D, D}, {4 * D, D}, {D, 4 * D}, {2 * D, D}, {D, 2 * D}}, f = calls.forward,
        b = calls.backward, zf = calls.z_forward, zb = calls.z_backward;
    // in a step, forward, dx and dw of each; inject and fp1's share of inj come once
    int times_called[][3] = {{f, b, b}, {f + fixed, b + fixed, b + fixed}, {f, b, b},
                             {f, b, b}, {zf + fixed, zb, zb + fixed},      {zf, zb, zb}};
    size_t wide = (size_t)M * 4 * D, square = (size_t)4 * D * D;
    Act *in = xcalloc(wide, sizeof(real), "matmul"), *dout = xcalloc(wide, sizeof(real), "matmul"),
        *w = xcalloc(square, sizeof(real), "matmul");
    real *out = xcalloc(wide, sizeof(real), "matmul"), *dw = xcalloc(square, sizeof(real), "matmul");
    double *times = (double *)xcalloc((size_t)rounds + 1, sizeof *times, "times");
    for (int i = 0; i < 6; i++)
        for (int form = 0; form < 3; form++) {
            int N = shapes[i][0], K = shapes[i][1];
            for (int r = -1; r < rounds; r++) {
                double begin = now_ms();
                if (form == 0) linear_forward(half, out, in, w, NULL, M, K, N);
                if (form == 1) linear_input_backward(half, out, dout, w, M, K, N);
                if (form == 2) gemm(half, dw, K, dout, 1, N, in, K, 1, dw, K, N, K, M);
                if (r >= 0) times[r] = now_ms() - begin;
            }
            static const char *const forms[] = {"forward", "dx", "dw"};
            if (!rounds) continue;
            double ms = median(times, rounds);
            matmul_ms += times_called[i][form] * ms;
            printf("gemm_gflops_%s_%dx%dx%d %.1f GFLOP/s\n", forms[form], M, N, K, 2e-6 * M * N * K / ms);
        }
    xfree(times);
    xfree(in);
    xfree(dout);
    xfree(w);
    xfree(out);
    xfree(dw);
}

// Where the time of a training step goes
static void bench_layers(Model *m, int rounds, Calls calls) {
    Activations *a = &m->a;
    Layer *l = a->layer + m->config.pre_depth + m->config.fixed_point;
    int B = m->B, T = config_tokens(&m->config), D = m->config.width, M = B * T, half = m->half,
        heads = m->config.heads;
    double *times = (double *)xcalloc((size_t)rounds, sizeof *times, "times"), sum = matmul_ms, ms;
    size_t N = (size_t)M * D;
    int f = calls.forward, b = calls.backward;
    printf("time_matmul_ms %.2f ms\n", matmul_ms);
#define SHARE(name, ...)               \
    for (int r = 0; r < rounds; r++) { \
        double begin = now_ms();       \
        __VA_ARGS__;                   \
        times[r] = now_ms() - begin;   \
    }                                  \
    ms = median(times, rounds);        \
    sum += ms *= name##_calls;         \
    printf("time_" #name "_ms %.2f ms\n", ms)
    double attention_calls = f, attention_gradient_calls = b, layernorm_calls = 2 * (f + b),
           layernorm_gradient_calls = 2 * b;
    double gate_calls = 2 * f + b, gate_gradient_calls = 2 * b,
           bias_gradient_calls = 2.25 * b + 0.25 * calls.z_backward;
    double gelu_calls = f + calls.z_forward / 2.0, gelu_gradient_calls = b + calls.z_backward / 2.0,
           optimiser_calls = 1;
    SHARE(attention, attention_forward(half, a->dx, l->lse, l->qkv, a->scratch, B, T, D, heads));
    SHARE(attention_gradient,
          attention_backward(half, a->dwide, a->normed, l->att, l->lse, l->qkv, a->scratch, B, T, D, heads));
    SHARE(gelu, gelu_forward(half, a->gelu, l->fc1, 4 * N));
    SHARE(gelu_gradient, gelu_backward(half, a->dwide_act, a->gelu, a->dwide, l->fc1, 4 * N));
    SHARE(layernorm, layernorm_modulate_forward(half, a->normed, l->x, a->mod, 6 * D, B, T, D));
    SHARE(layernorm_gradient,
          layernorm_modulate_backward(a->dx, a->dmod, a->stats, a->dnormed, l->x, a->mod, 6 * D, B, T, D));
    SHARE(gate, gated_residual_forward(a->mid, l->x, a->mod, 6 * D, l->proj, B, T, D));
    SHARE(gate_gradient, gated_residual_backward(half, a->normed, a->dmod, a->dx, a->mod, 6 * D, l->proj, B, T, D));
    SHARE(bias_gradient, bias_backward(half, m->g.block[0].fc1_b, a->dwide_act, M, 4 * D));
    SHARE(optimiser, model_zero_gradients(m); model_gradient_norm(m);
          model_update(m, 1, 0, 0.9, 0.999, 1e-8, 0, 1, 0.9999));
#undef SHARE
    printf("time_sum_ms %.2f ms\n", sum);
    xfree(times);
}

#else

// Peak device memory, in MB: all is allocated up front and held
static double peak_memory(void) { return (double)gpu.allocated / 1e6; }

// Bits that look random: multiplying zeros would take less power, and so less time.
__device__ inline uint32_t hashed(uint32_t x) {
    x = (x ^ x >> 16) * 0x85EBCA6Bu;
    x = (x ^ x >> 13) * 0xC2B2AE35u;
    return x ^ x >> 16;
}

// Independent chains of multiply-adds in registers: what the arithmetic units can do without memory
enum { PEAK_CHAINS = 8, PEAK_WARPS = 8 };
template <typename A>
__global__ void peak_kernel(float *out, int reps) {
    float x[PEAK_CHAINS][4] = {};
    uint32_t a[4], b[2]; // two bf16 each, +-1..2
    EACH(i, 4) a[i] = 0x3F803F80u | (hashed(6 * threadIdx.x + i) & 0x807F807Fu);
    EACH(i, 2) b[i] = 0x3F803F80u | (hashed(6 * threadIdx.x + 4 + i) & 0x807F807Fu);
    for (int r = 0; r < reps; r++) {
        EACH(i, PEAK_CHAINS) {
            if (sizeof(A) == 2)
                mma_bf16(x[i], a, b);
            else
                for (int j = 0; j < 4; j++) x[i][j] = x[i][j] * 0.5f + 1;
        }
    }
    float sum = 0;
    for (int i = 0; i < 4 * PEAK_CHAINS; i++) sum += x[i / 4][i % 4];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

#if HOPPER
// The same by wgmma, whose rate is half as high again, on two tiles in shared memory, 16 k at a time
enum { PEAK_WGMMA_ROWS = 128 + 192 };
__global__ void __launch_bounds__(128) peak_wgmma_kernel(float *out, int reps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    SHARED_DYNAMIC(bf16, tiles);
    float acc[2][24][2][1][2] = {}, sum = 0;
    for (int i = threadIdx.x; i < PEAK_WGMMA_ROWS * 64 / 2; i += 128)
        ((uint32_t *)tiles)[i] = 0x3F803F80u | (hashed(i) & 0x807F807Fu);
    fence_async();
    __syncthreads();
    uint64_t a = wgmma_tile(tiles), b = wgmma_tile(tiles + 128 * 64);
    for (int r = 0; r < reps; r++) {
        wgmma_fence();
        EACH(i, 8) wgmma<false, false>(acc[i % 2], a + i % 2 * (64 * 128 / 16) + i / 2 * 2, b + i / 2 * 2);
        wgmma_commit();
        wgmma_wait<1>();
    }
    wgmma_wait<0>();
    EACH(i, 2 * 24 * 4) sum += acc[i / 96][i / 4 % 24][i / 2 % 2][0][i % 2];
    out[blockIdx.x * 128 + threadIdx.x] = sum;
#endif
}
#endif

// Starts the chains: with as many blocks as run at once, on Hopper of what its matmul uses. Returns the operations.
static double peak_start(int half, float *out, int reps) {
#if HOPPER
    if (half && gpu.wgmma) {
        RUN(peak_wgmma_kernel, 2 * gpu.sms, 128, PEAK_WGMMA_ROWS * 64 * sizeof(bf16), out, reps);
        return 2.0 * 128 * 192 * 64 * reps * 2 * gpu.sms;
    }
#endif
    TYPED(half, RUN((peak_kernel<A>), 4 * gpu.sms, 32 * PEAK_WARPS, 0, out, reps));
    return (half ? 2.0 * 16 * 16 * 8 : 2.0 * 4 * 32) * PEAK_CHAINS * reps * PEAK_WARPS * 4 * gpu.sms;
}

// Device memory with `count` numbers -1..1; a thread an element
template <typename A>
__global__ void random_kernel(A *out, size_t count) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) from_float(out + i, (float)(int32_t)hashed((uint32_t)i) / 2147483648.0f);
}
static void *random_act(int half, size_t count) {
    void *p = gpu_malloc(count * (half ? sizeof(bf16) : sizeof(float)), "matmul");
    TYPED(half, RUN((random_kernel<A>), (unsigned)ceil_div(count, 256), 256, 0, (A *)p, count));
    return p;
}

// Peak rate of fused multiply-adds, then every matmul of the model in its three forms
static void bench_matmul(const Config *c, int B, int rounds, int dtype) {
    enum { REPEAT = 10 };
    int half = dtype == COMPUTE_BF16, D = c->width, M = B * config_tokens(c), reps = 100;
    int shapes[][2] = {{3 * D, D}, {D, D}, {4 * D, D}, {D, 4 * D}, {2 * D, D}, {D, 2 * D}};
    size_t size = half ? sizeof(bf16) : sizeof(float), x_count = (size_t)M * 4 * D, w_count = 4 * (size_t)D * D;
    void *x = random_act(half, x_count), *y = random_act(half, x_count), *w = random_act(half, w_count);
    void *result = gpu_malloc(x_count * size, "matmul");
    float *dw = (float *)gpu_malloc(w_count * sizeof(float), "matmul");
    size_t out_bytes = (size_t)4 * gpu.sms * PEAK_WARPS * 32 * sizeof(float);
    float *out = (float *)gpu_malloc(out_bytes, "matmul");
    double *times = (double *)xcalloc((size_t)rounds + 1, sizeof *times, "times"), begin = 0, flops = 0;
    gpu_zero(dw, w_count * sizeof(float));
    workspace_reserve(workspace_floats(D));
    for (int run = 0; run < 3; run++) { // a warm-up, then to see how many fill 20 ms
        if (run == 2) reps *= 1 + (int)(20 / (now_ms() - begin));
        begin = now_ms();
        flops = peak_start(half, out, reps);
        gpu_wait();
    }
    printf("peak_gflops %.1f GFLOP/s\n", 1e-6 * flops / (now_ms() - begin));
    for (int i = 0; i < 6; i++)
        for (int form = 0; form < 3; form++) {
            static const char *const forms[] = {"forward", "dx", "dw"};
            int N = shapes[i][0], K = shapes[i][1];
            for (int r = -1; r < rounds; r++) {
                gpu_wait();
                begin = now_ms();
                for (int repeat = 0; repeat < REPEAT; repeat++) {
                    if (form == 0) matmul<false, false, EPI_STORE>(half, linear(result, x, w, K, NULL, M, K, N));
                    if (form == 1) matmul<false, true, EPI_STORE>(half, linear_input(result, y, w, K, M, K, N));
                    if (form == 2) linear_weight(half, dw, K, NULL, y, x, M, K, N);
                }
                gpu_wait();
                if (r >= 0) times[r] = (now_ms() - begin) / REPEAT;
            }
            if (rounds)
                printf("gemm_gflops_%s_%dx%dx%d %.1f GFLOP/s\n", forms[form], M, N, K,
                       2e-6 * M * N * K / median(times, rounds));
        }
    xfree(times);
    for (void *p : {x, y, result}) gpu_free(p, x_count * size);
    gpu_free(w, w_count * size);
    gpu_free(dw, w_count * sizeof(float));
    gpu_free(out, out_bytes);
}

#endif

int main(int argc, char **argv) {
    static const char about[] = "Measures matmuls, a training step and sampling; prints `name value unit` lines.";
    Options options, *o = &options;
    Config *c = &o->model;
    options_default(o, BENCH);
    options_parse(o, BENCH, argc, argv, about);
    if (c->learn_sigma) c->prediction = PREDICT_EPS;
    config_check(c, "options");
    int B = o->batch, n = o->bench_n, iterations = o->bench_m;
    double *times = (double *)xcalloc(o->rounds, sizeof *times, "times");
#ifdef GPU
    bench_matmul(c, B, o->bench_gemm ? o->rounds : 0, compute_dtype(o->dtype));
    Model *m = model_create(c, B, iterations, o->recompute, 1, 0, compute_dtype(o->dtype));
#else
    Model *m = model_create(c, B, iterations, o->recompute, 1, 0, compute_dtype(o->dtype)); // refuses before the work
    Calls calls = step_calls(c, n, iterations);
    bench_matmul(c, B, o->bench_gemm ? o->rounds : 0, compute_dtype(o->dtype), calls);
#endif
    float *values = (float *)xcalloc(m->n_params, sizeof *values, "weights");
    rng_normal(values, m->n_params, 0, o->seed, 0, STREAM_INIT);
    for (int64_t i = 0; i < m->n_params; i++) values[i] *= 0.02f;
    model_upload(m, MODEL_WEIGHTS, 0, m->n_params, values);
    model_use(m, MODEL_WEIGHTS);
    xfree(values);
    size_t count = B * config_pixels(c);
    Batch b = batch_create(B, config_pixels(c));
    Schedule s;
    schedule_make(&s, c, DIFFUSION_STEPS);
    rng_normal(b.x0, count, 0, o->seed, 0, STREAM_DATA);
    rng_normal(b.noise, count, 0, o->seed, 0, STREAM_NOISE);
    for (int i = 0; i < B; i++) b.t[i] = i * 997 % DIFFUSION_STEPS, b.y[i] = c->classes ? i % c->classes : 0;
    for (int round = -1; round < o->rounds; round++) { // the first is a warm-up
        double begin = now_ms();
        model_zero_gradients(m);
        model_loss(m, &s, b.x0, b.noise, b.t, b.y, B, n, iterations, 1.0 / B, b.mse, b.vb);
        model_wait(m);
        double norm = model_gradient_norm(m);
        model_update(m, round + 2, 1e-4, 0.9, 0.999, 1e-8, 0, norm > 1 ? 1 / norm : 1, 0.9999);
        if (round >= 0) times[round] = now_ms() - begin;
    }
    double step_ms = median(times, o->rounds);
    printf("train_step_ms %.2f ms\n", step_ms);
    printf("train_gflops %.2f GFLOP/s\n", model_flops(c, B, n, iterations) / step_ms * 1e-6);
    printf("train_images_per_s %.2f images/s\n", B / step_ms * 1e3);
    printf("train_peak_mb %.1f MB\n", peak_memory());
#ifndef GPU
    if (o->bench_gemm) bench_layers(m, o->rounds, calls);
#endif

    int iters[] = {n + 1, n + 1, n + 1, n + 1};
    SampleSettings set;
    memset(&set, 0, sizeof set);
    set.sampler = resolve_sampler(o, c);
    set.order = set.reuse = 1;
    set.cfg = set.mixing = 1;
    set.cfg_channels = 3;
    set.iters = iters;
    schedule_make(&s, c, 4);
    for (int round = 0; round < o->rounds; round++) {
        double begin = now_ms();
        set.passes = 0;
        sample_batch(m, &s, &set, b.x0, b.y, B, NULL, o->seed, 0);
        times[round] = (now_ms() - begin) / (double)(set.passes * B);
    }
    printf("sample_passes_per_s %.1f passes/s\n", 1e3 / median(times, o->rounds));
    return 0;
}

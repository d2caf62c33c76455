// Times the matmuls of a model and its attention in bf16, on random data. With -DCUBLAS it also gives every product to
// cuBLAS, on the same operands and in turn with ours, and compares the results. `make report_gpu` builds and runs it.
//
//   test_report_gpu WIDTH HEADS TOKENS BATCH ROUNDS     HEADS 0: the product of two square matrices of WIDTH alone
//
// A line each, the median of the rounds; without cuBLAS a - stands for its figures:
//   matmul FORM MxNxK OURS CUBLAS DIFFERENCE        GFLOP/s, GFLOP/s, relative L2; MxNxK as the layer y (M,N) has them
//   matmul gated, gelu, dgelu ...                   with what the model does to the result; cuBLAS: the product alone
//   attention FORM BxTxDxH OURS                     GFLOP/s, a multiply-add counted as two, nothing recomputed

#include "../fpdm.cu"
#include <algorithm>
#ifdef CUBLAS
#include <cublas_v2.h>
static cublasHandle_t cublas;
static void check_cublas(cublasStatus_t status) {
    if (status != CUBLAS_STATUS_SUCCESS) die("cuBLAS: %s", cublasGetStatusString(status));
}
#endif

enum { FORWARD, INPUT, WEIGHT };
static const char *const forms[] = {"forward", "dx", "dw"};
static int rounds;

// Device memory with normal numbers as bf16: a table of them over and over, whose odd length keeps rows apart
static void *random_bf16(size_t count, uint32_t step) {
    enum { TABLE = 1000003 };
    float *normal = (float *)xcalloc(TABLE, sizeof *normal, "random numbers");
    uint16_t *bits = (uint16_t *)xcalloc(count, sizeof *bits, "random numbers");
    rng_normal(normal, TABLE, 0, 7, step, 0);
    for (size_t i = 0; i < count; i++) bits[i] = float_to_bf16(normal[i % TABLE]);
    void *p = gpu_malloc(count * sizeof *bits, "random numbers");
    gpu_upload(p, bits, count * sizeof *bits);
    gpu_wait();
    xfree(normal);
    xfree(bits);
    return p;
}

template <typename F>
static double time_ms(F work, int repeat) {
    gpu_wait();
    double begin = now_ms();
    for (int i = 0; i < repeat; i++) work();
    gpu_wait();
    return (now_ms() - begin) / repeat;
}

// Milliseconds of `ours` and of `theirs`, which take turns of about 20 ms each
template <typename F, typename G>
static void race(double *ms, F ours, G theirs) {
    double times[2][100];
    ours(), theirs();
    int count = imin(rounds, 100), repeat = imin(200, 1 + (int)(20 / time_ms(ours, 1)));
    for (int r = 0; r < count; r++) {
        times[0][r] = time_ms(ours, repeat);
        times[1][r] = time_ms(theirs, repeat);
    }
    for (int i = 0; i < 2; i++) {
        std::sort(times[i], times[i] + count);
        ms[i] = times[i][count / 2];
    }
}

// The layer y (M,N) = x (M,K)·w (N,K)^T: its forward, dx (M,K) = dy·w, or dw (N,K) += dy^T·x, the last in fp32
static void product(int form, void *out, const void *x, const void *w, const void *dy, int M, int N, int K) {
    if (form == FORWARD) matmul<false, false, EPI_STORE>(1, linear(out, x, w, K, NULL, M, K, N));
    if (form == INPUT) matmul<false, true, EPI_STORE>(1, linear_input(out, dy, w, K, M, K, N));
    if (form == WEIGHT) linear_weight(1, (float *)out, K, NULL, dy, x, M, K, N);
}

// The same by cuBLAS, whose matrices are column-major: every product is its own transpose there.
static void product_cublas(int form, void *out, const void *x, const void *w, const void *dy, int M, int N, int K) {
#ifdef CUBLAS
    float one = 1, beta = form == WEIGHT;
    int m = form == FORWARD ? N : K, n = form == WEIGHT ? N : M, k = form == FORWARD ? K : form == INPUT ? N : M;
    check_cublas(cublasGemmEx(
        cublas, form == FORWARD ? CUBLAS_OP_T : CUBLAS_OP_N, form == WEIGHT ? CUBLAS_OP_T : CUBLAS_OP_N, m, n, k, &one,
        form == WEIGHT ? x : w, CUDA_R_16BF, K, form == FORWARD ? x : dy, CUDA_R_16BF, form == FORWARD ? K : N, &beta,
        out, form == WEIGHT ? CUDA_R_32F : CUDA_R_16BF, m, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
#else
    (void)form, (void)out, (void)x, (void)w, (void)dy, (void)M, (void)N, (void)K;
#endif
}

// The last elements of a result, at most 4 million, as floats; bf16 unless `single`
static float *tail(const void *p, size_t count, int single, size_t *n) {
    *n = count < 4000000 ? count : 4000000;
    float *values = (float *)xcalloc(*n, sizeof *values, "a result");
    uint16_t *bits = (uint16_t *)xcalloc(*n, sizeof *bits, "a result");
    if (single)
        gpu_download(values, (const float *)p + (count - *n), *n * sizeof *values);
    else
        gpu_download(bits, (const uint16_t *)p + (count - *n), *n * sizeof *bits);
    for (size_t i = 0; !single && i < *n; i++) values[i] = bf16_to_float(bits[i]);
    xfree(bits);
    return values;
}

// Buffers: x (M,K), w (N,K), dy (M,N), and room for the largest result in two places
static void race_product(int form, void *const *out, const void *x, const void *w, const void *dy, int M, int N,
                         int K) {
    size_t count = form == FORWARD ? (size_t)M * N : form == INPUT ? (size_t)M * K : (size_t)N * K, n;
    int single = form == WEIGHT;
    double ms[2], error = 0, norm = 0;
    for (int i = 0; i < 2; i++) // dw is added to; of the others, what is not written stays NaN
        CHECK(cudaMemsetAsync(out[i], single ? 0 : 0xff, count * (single ? 4 : 2), gpu.stream));
    product(form, out[0], x, w, dy, M, N, K);
    product_cublas(form, out[1], x, w, dy, M, N, K);
    float *got = tail(out[0], count, single, &n), *want = tail(out[1], count, single, &n);
    for (size_t i = 0; i < n; i++) {
        error += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        norm += (double)want[i] * want[i];
    }
    xfree(got);
    xfree(want);
    race(
        ms, [&] { product(form, out[0], x, w, dy, M, N, K); },
        [&] { product_cublas(form, out[1], x, w, dy, M, N, K); });
    double flops = 2e-6 * M * N * K;
    printf("matmul %s %dx%dx%d %.1f", forms[form], M, N, K, flops / ms[0]);
#ifdef CUBLAS
    printf(" %.1f %.1e\n", flops / ms[1], sqrt(error / norm));
#else
    printf(" - -\n");
#endif
}

static void race_products(int M, const int (*shapes)[2], int count) {
    size_t x_size = 0, w_size = 0, dy_size = 0, bytes = 0;
    for (int i = 0; i < count; i++) {
        size_t N = shapes[i][0], K = shapes[i][1];
        if (M * K > x_size) x_size = M * K;
        if (M * N > dy_size) dy_size = M * N;
        if (N * K > w_size) w_size = N * K;
    }
    bytes = 4 * w_size;
    if (2 * x_size > bytes) bytes = 2 * x_size;
    if (2 * dy_size > bytes) bytes = 2 * dy_size;
    void *x = random_bf16(x_size, 1), *w = random_bf16(w_size, 2), *dy = random_bf16(dy_size, 3);
    void *out[2] = {gpu_malloc(bytes, "results"), gpu_malloc(bytes, "results")};
    for (int i = 0; i < count; i++)
        for (int form = 0; form < 3; form++) race_product(form, out, x, w, dy, M, shapes[i][0], shapes[i][1]);
    gpu_free(x, 2 * x_size);
    gpu_free(w, 2 * w_size);
    gpu_free(dy, 2 * dy_size);
    for (int i = 0; i < 2; i++) gpu_free(out[i], bytes);
}

// Products with what the model does to their results, beside the same product alone by cuBLAS, whose result would have
// to be read and written again. Forward layers, then gradients dx.
static void race_epilogues(int M, int D, int T) {
    const struct {
        const char *form;
        int epilogue, N, K, more; // more: gelu adds the injection's part, not a bias; dgelu sums its gradient
    } list[] = {{"gated", EPI_GATED, D, D, 0},     {"gated", EPI_GATED, D, 4 * D, 0},
                {"gelu", EPI_GELU, 4 * D, D, 0},   {"gelu+add", EPI_GELU, 2 * D, D, 1},
                {"dgelu", EPI_DGELU, D, 4 * D, 0}, {"dgelu+sum", EPI_DGELU, D, 2 * D, 1}};
    size_t wide = (size_t)M * 4 * D, gates = (size_t)ceil_div(M, T) * D;
    void *x = random_bf16(wide, 1), *w = random_bf16(4 * (size_t)D * D, 2), *pre = random_bf16(wide, 3);
    void *copy = gpu_malloc(2 * wide, "results"), *out = gpu_malloc(2 * wide, "results");
    float *other = (float *)gpu_malloc(2 * wide, "sums"), *bias = (float *)gpu_malloc(16 * (size_t)D, "a bias");
    float *gate = (float *)gpu_malloc(4 * gates, "gates");
    gpu_zero(other, 2 * wide), gpu_zero(bias, 16 * (size_t)D), gpu_zero(gate, 4 * gates);
    for (auto &l : list) {
        double ms[2], flops = 2e-6 * M * l.N * l.K;
        int gradient = l.epilogue == EPI_DGELU;
        Matmul g = gradient ? linear_input(out, x, w, l.K, M, l.K, l.N) : linear(out, x, w, l.K, bias, M, l.K, l.N);
        g.pre = pre, g.copy = copy, g.gate = gate, g.gate_stride = D, g.tokens = T, g.residual = other;
        g.add = l.more ? other : bias, g.add_rows = l.more ? M : 1;
        if (l.more && gradient) g.sum = other;
        race(
            ms,
            [&] {
                if (l.epilogue == EPI_GATED) matmul<false, false, EPI_GATED>(1, g);
                if (l.epilogue == EPI_GELU) matmul<false, false, EPI_GELU>(1, g);
                if (l.epilogue == EPI_DGELU) matmul<false, true, EPI_DGELU>(1, g);
            },
            [&] { product_cublas(gradient ? INPUT : FORWARD, out, x, w, x, M, l.N, l.K); });
        printf("matmul %s %dx%dx%d %.1f", l.form, M, l.N, l.K, flops / ms[0]);
#ifdef CUBLAS
        printf(" %.1f -\n", flops / ms[1]);
#else
        printf(" - -\n");
#endif
    }
    for (void *p : {x, pre, copy, out, (void *)other}) gpu_free(p, 2 * wide);
    gpu_free(w, 8 * (size_t)D * D), gpu_free(bias, 16 * (size_t)D), gpu_free(gate, 4 * gates);
}

static void time_attention(int B, int T, int D, int H) {
    size_t size = (size_t)B * T * D, rows = (size_t)B * T * H * sizeof(float);
    Act *qkv = (Act *)random_bf16(3 * size, 4), *dout = (Act *)random_bf16(size, 5);
    Act *out = (Act *)gpu_malloc(2 * size, "attention"), *dqkv = (Act *)gpu_malloc(6 * size, "attention");
    float *lse = (float *)gpu_malloc(rows, "attention"), *sums = (float *)gpu_malloc(4 * size, "attention");
    double ms[2], flops = 4e-6 * (double)size * T;
    race(
        ms, [&] { attention_forward(1, out, lse, qkv, B, T, D, H); },
        [&] { attention_backward(1, dqkv, sums, dout, out, lse, qkv, B, T, D, H); });
    printf("attention forward %dx%dx%dx%d %.1f\n", B, T, D, H, flops / ms[0]);
    printf("attention backward %dx%dx%dx%d %.1f\n", B, T, D, H, 2 * flops / ms[1]);
    gpu_free(qkv, 6 * size);
    gpu_free(dout, 2 * size);
    gpu_free(out, 2 * size);
    gpu_free(dqkv, 6 * size);
    gpu_free(lse, rows);
    gpu_free(sums, 4 * size);
}

int main(int argc, char **argv) {
    if (argc != 6) die("usage: %s WIDTH HEADS TOKENS BATCH ROUNDS", argv[0]);
    int D = atoi(argv[1]), heads = atoi(argv[2]), T = atoi(argv[3]), B = atoi(argv[4]);
    rounds = atoi(argv[5]);
    if (D < 8 || D % 8 || heads < 0 || T < 1 || B < 1 || rounds < 1) die("%s: sizes out of range", argv[0]);
    setvbuf(stdout, NULL, _IOLBF, 0);
    gpu_open();
#ifdef CUBLAS
    check_cublas(cublasCreate(&cublas));
    check_cublas(cublasSetStream(cublas, gpu.stream));
    printf("cublas %d\n", CUBLAS_VERSION);
#endif
    workspace_reserve(workspace_floats(D)); // as the model has
    const int square[1][2] = {{D, D}};
    const int model[6][2] = {{3 * D, D}, {D, D}, {4 * D, D}, {D, 4 * D}, {2 * D, D}, {D, 2 * D}};
    if (!heads) {
        race_products(D, square, 1);
        return 0;
    }
    race_products(B * T, model, 6);
    race_epilogues(B * T, D, T);
    time_attention(B, T, D, heads);
    return 0;
}

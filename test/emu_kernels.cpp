// Tests the kernels of fpdm.cu one by one at sizes that the cases of test/cases do not reach: large tiles, every number
// of splits, several waves, ragged edges, every head size, many tokens; as if on 3 multiprocessors and on an H100's
// 132, by which kernels and splits are chosen. Expected values are computed here, in double, from the same rounded
// inputs.
//
//   make test_kernels_emu     without a GPU;  make test_kernels_gpu: on one;  make kernels: which kernels tests launch
//   EMU_QUICK=1 ./test_kernels_emu    without the three largest products and sampling, for builds that are slow

#include "../fpdm.cu"
#include <sys/wait.h>
#include <vector>

typedef std::vector<float> Floats;
static int passed, failed;

static Floats random_floats(size_t count, uint32_t step, int half, float scale = 1) {
    Floats x(count);
    rng_normal(x.data(), count, 0, 7, step, 0);
    for (float &v : x) v = half ? bf16_to_float(float_to_bf16(scale * v)) : scale * v;
    return x;
}

// Device memory with these values, as bf16 or float
static void *on_gpu(const Floats &x, int half) {
    std::vector<uint16_t> bits(x.size());
    for (size_t i = 0; i < x.size(); i++) bits[i] = float_to_bf16(x[i]);
    size_t bytes = x.size() * (half ? 2 : 4);
    void *p = gpu_malloc(bytes, "a test");
    gpu_upload(p, half ? (const void *)bits.data() : (const void *)x.data(), bytes);
    gpu_wait();
    return p;
}

static Floats from_gpu(const void *p, size_t count, int half) {
    Floats x(count);
    std::vector<uint16_t> bits(count);
    gpu_download(half ? (void *)bits.data() : (void *)x.data(), p, count * (half ? 2 : 4));
    for (size_t i = 0; half && i < count; i++) x[i] = bf16_to_float(bits[i]);
    return x;
}

// Whether the relative L2 error is within `limit`
static void expect(const char *what, const Floats &got, const std::vector<double> &want, double limit) {
    double error = 0, norm = 0;
    for (size_t i = 0; i < want.size(); i++) error += pow(got[i] - want[i], 2), norm += want[i] * want[i];
    double relative = sqrt(error / norm);
    int ok = relative <= limit; // false for NaN
    printf("%-60s %.1e  limit %.0e  %s\n", what, relative, limit, ok ? "ok" : "FAIL");
    if (getenv("EMU_ORDER")) printf("    bits %llx\n", (unsigned long long)hash_bytes(0, got.data(), 4 * got.size()));
    (ok ? passed : failed)++;
}

static double gelu_double(double x, double *slope) {
    double u = 0.7978845608028654 * (x + 0.044715 * x * x * x), th = tanh(u);
    *slope = 0.5 * (1 + th) + 0.5 * x * (1 - th * th) * 0.7978845608028654 * (1 + 0.134145 * x * x);
    return 0.5 * x * (1 + th);
}

// All epilogues of the three products of y (M,N) = x (M,K)·w (N,K)^T, where w is the right half of a matrix (N,2K)
static void test_matmul(int half, int M, int N, int K) {
    char text[100];
    double output = half ? 3e-3 : 1e-6, exact = half ? 2e-6 : 1e-6; // results in bf16; in fp32
    Floats x = random_floats((size_t)M * K, 1, half), w = random_floats((size_t)N * 2 * K, 2, half, 0.1f);
    Floats dy = random_floats((size_t)M * N, 3, half), b = random_floats(N, 4, 0),
           add = random_floats((size_t)M * N, 5, 0);
    Floats gate = random_floats((size_t)M * N, 6, 0), pre = random_floats((size_t)M * K, 8, half);
    Floats dw0 = random_floats((size_t)N * 2 * K, 9, 0), db0 = random_floats(N, 10, 0),
           sum0 = random_floats((size_t)M * K, 11, 0);
    void *gx = on_gpu(x, half), *gw = on_gpu(w, half), *gdy = on_gpu(dy, half), *gb = on_gpu(b, 0),
         *gadd = on_gpu(add, 0);
    void *ggate = on_gpu(gate, 0), *gpre = on_gpu(pre, half), *gdw = on_gpu(dw0, 0), *gdb = on_gpu(db0, 0);
    void *gsum = on_gpu(sum0, 0), *y = gpu_malloc((size_t)M * N * 4, ""), *y2 = gpu_malloc((size_t)M * N * 4, "");
    void *y3 = gpu_malloc((size_t)M * N * 4, ""), *dx = gpu_malloc((size_t)M * K * 4, ""),
         *dx2 = gpu_malloc((size_t)M * K * 4, "");
    const void *right = (const char *)gw + K * (half ? 2 : 4);
    int add_rows = M / 2, tokens = M / 2;

    std::vector<double> v((size_t)M * N), sums = v, act = v, gated = v, product((size_t)M * K), dpre = product,
                                          inner = product;
    std::vector<double> sum = product, dw((size_t)N * 2 * K), db(N);
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            double s = 0;
            for (int k = 0; k < K; k++) s += (double)x[(size_t)i * K + k] * w[(size_t)j * 2 * K + K + k];
            size_t at = (size_t)i * N + j;
            sums[at] = s, v[at] = s + b[j];
            gated[at] = add[at] + gate[(size_t)(i / tokens) * 3 * N + j] * (s + b[j]);
        }
    for (int i = 0; i < M; i++)
        for (int k = 0; k < K; k++) {
            double s = 0, slope;
            for (int j = 0; j < N; j++) s += (double)dy[(size_t)i * N + j] * w[(size_t)j * 2 * K + K + k];
            size_t at = (size_t)i * K + k;
            product[at] = s;
            inner[at] = gelu_double(pre[at], &slope);
            dpre[at] = s * slope;
            sum[at] = sum0[at] + dpre[at];
        }
    for (int j = 0; j < N; j++) {
        db[j] = db0[j];
        for (int i = 0; i < M; i++) db[j] += dy[(size_t)i * N + j];
        for (int k = 0; k < 2 * K; k++) {
            double s = dw0[(size_t)j * 2 * K + k];
            for (int i = 0; i < M && k >= K; i++) s += (double)dy[(size_t)i * N + j] * x[(size_t)i * K + k - K];
            dw[(size_t)j * 2 * K + k] = s;
        }
    }
    auto name = [&](const char *what) {
        snprintf(text, sizeof text, "%s %s %dx%dx%d on %d", half ? "bf16" : "fp32", what, M, N, K, gpu.sms);
        return text;
    };
    Matmul g = linear(y, gx, right, 2 * K, (float *)gb, M, K, N);
    matmul<false, false, EPI_STORE>(half, g);
    expect(name("forward"), from_gpu(y, (size_t)M * N, half), v, output);
    matmul<false, false, EPI_FLOAT>(half, g); // the sum may be split
    expect(name("forward, fp32 result"), from_gpu(y, (size_t)M * N, 0), v, exact);
    g.add = (float *)gadd;
    g.add_rows = add_rows;
    for (size_t i = 0; !half && i < v.size(); i++) v[i] += add[i % ((size_t)add_rows * N)];
    if (!half) matmul<false, false, EPI_FLOAT>(half, g);
    if (!half) expect(name("forward, added to"), from_gpu(y, (size_t)M * N, 0), v, exact);
    g.pre = y2;
    for (int rows : {1, half ? M : add_rows}) { // a bias; what every row, or every token, has of its own
        double slope;
        for (size_t i = 0; i < v.size(); i++) {
            v[i] = sums[i] + add[i % ((size_t)rows * N)];
            act[i] = gelu_double(v[i], &slope);
        }
        g.add_rows = rows;
        matmul<false, false, EPI_GELU>(half, g);
        expect(name("gelu"), from_gpu(y, (size_t)M * N, half), act, output);
        expect(name("gelu, its input"), from_gpu(y2, (size_t)M * N, half), v, output);
    }
    g.residual = (float *)gadd;
    g.gate = (float *)ggate;
    g.gate_stride = 3 * N;
    g.tokens = tokens;
    g.copy = y3;
    matmul<false, false, EPI_GATED>(half, g);
    expect(name("gated"), from_gpu(y, (size_t)M * N, 0), gated, exact);
    expect(name("gated, copy"), from_gpu(y3, (size_t)M * N, half), gated, output);
    for (size_t i = 0; i < v.size(); i++) v[i] = sums[i] + b[i % N];
    expect(name("gated, its branch"), from_gpu(y2, (size_t)M * N, half), v, output);
    g.pre = g.copy = NULL;
    gpu_zero(y, (size_t)M * N * 4);
    matmul<false, false, EPI_GATED>(half, g);
    expect(name("gated alone"), from_gpu(y, (size_t)M * N, 0), gated, exact);
    matmul<false, true, EPI_STORE>(half, linear_input(dx, gdy, right, 2 * K, M, K, N));
    expect(name("input gradient"), from_gpu(dx, (size_t)M * K, half), product, output);
    matmul<false, true, EPI_FLOAT>(half, linear_input(dx, gdy, right, 2 * K, M, K, N));
    expect(name("input gradient, fp32 result"), from_gpu(dx, (size_t)M * K, 0), product, exact);
    if (!half) { // conditioning's way
        matmul<false, true, EPI_WEIGHT>(half, linear_input(dx, gdy, right, 2 * K, M, K, N));
        for (double &p : product) p *= 2;
        expect(name("input gradient, added"), from_gpu(dx, (size_t)M * K, 0), product, exact);
    }
    g = linear_input(dx, gdy, right, 2 * K, M, K, N);
    g.pre = gpre;
    g.copy = dx2;
    g.sum = (float *)gsum;
    matmul<false, true, EPI_DGELU>(half, g);
    expect(name("gelu gradient"), from_gpu(dx, (size_t)M * K, half), dpre, output);
    expect(name("gelu gradient, gelu"), from_gpu(dx2, (size_t)M * K, half), inner, output);
    expect(name("gelu gradient, sum"), from_gpu(gsum, (size_t)M * K, 0), sum, exact);
    g.sum = NULL;
    gpu_zero(dx, (size_t)M * K * 4);
    matmul<false, true, EPI_DGELU>(half, g);
    expect(name("gelu gradient alone"), from_gpu(dx, (size_t)M * K, half), dpre, output);
    linear_weight(half, (float *)gdw + K, 2 * K, (float *)gdb, gdy, gx, M, K, N);
    expect(name("weight gradient"), from_gpu(gdw, (size_t)N * 2 * K, 0), dw, exact);
    expect(name("bias gradient"), from_gpu(gdb, N, 0), db, exact);
    void *all[] = {gx, gw, gdy, gb, gadd, ggate, gpre, gdw, gdb, gsum, y, y2, y3, dx, dx2};
    for (void *p : all) gpu_free(p, 0);
}

// A weight gradient dw (N,K) and bias gradient over M rows, and the number of parts that its sums were split into: each
// is a piece of the workspace, which holds nothing else. alone: elements of dw and db that are in tiles of one part
static void test_splits(int half, int M, int N, int K, int splits, size_t alone = 0) {
    char text[100];
    Floats x = random_floats((size_t)M * K, 1, half), dy = random_floats((size_t)M * N, 3, half);
    void *gx = on_gpu(x, half), *gdy = on_gpu(dy, half);
    float *dw = (float *)gpu_malloc((size_t)N * K * 4, ""), *db = (float *)gpu_malloc((size_t)N * 4, "");
    std::vector<double> want((size_t)N * K), want_db(N);
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            double g = dy[(size_t)i * N + j];
            want_db[j] += g;
            for (int k = 0; k < K; k++) want[(size_t)j * K + k] += g * x[(size_t)i * K + k];
        }
    gpu_zero(dw, (size_t)N * K * 4), gpu_zero(db, (size_t)N * 4);
    CHECK(cudaMemsetAsync(workspace.memory, 0xff, workspace.count * sizeof(float), gpu.stream));
    linear_weight(half, dw, K, db, gdy, gx, M, K, N);
    size_t written = 0, part = (size_t)N * K + N - alone;
    for (float f : from_gpu(workspace.memory, workspace.count, 0)) written += !isnan(f);
    snprintf(text, sizeof text, "%s weight gradient %dx%d of %d rows, %zu splits", half ? "bf16" : "fp32", N, K, M,
             written ? written / part : 1);
    // Tensor cores cut their sums off, at every 16 k, by half a unit of the last place on average: on an H100 4.4e-6 of
    // 4104 rows in one split.
    double cut = half ? 3e-8 * ceil_div(ceil_div(M, splits), 16) : 0;
    double limit = written == (splits > 1 ? splits * part : 0) ? fmax(2e-6, cut) : -1; // no error is that small
    expect(text, from_gpu(dw, (size_t)N * K, 0), want, limit);
    expect("  bias gradient", from_gpu(db, N, 0), want_db, limit);
    linear_weight(half, dw, K, NULL, gdy, gx, M, K, N);
    for (double &w : want) w *= 2;
    expect("  once more, without a bias", from_gpu(dw, (size_t)N * K, 0), want, fmax(2e-6, cut));
    expect("  whose gradient stays", from_gpu(db, N, 0), want_db, fmax(2e-6, cut));
    void *all[] = {gx, gdy, dw, db};
    for (void *p : all) gpu_free(p, 0);
}

// `apart` moves every score down by about apart/2/sqrt(hd).
static void test_attention(int half, int B, int T, int H, int hd, float apart = 0) {
    char text[100];
    int D = H * hd;
    double limit = half ? 1e-2 : 2e-6;
    Floats qkv = random_floats((size_t)B * T * 3 * D, 21, half), dout = random_floats((size_t)B * T * D, 22, half);
    for (size_t i = 0; i < (size_t)B * T * H; i++) { // the first channel of each q and k
        float *q = &qkv[i / H * 3 * D + i % H * hd];
        q[0] = apart ? apart : q[0], q[D] = apart ? -0.5f : q[D];
    }
    std::vector<double> out((size_t)B * T * D), dqkv((size_t)B * T * 3 * D), p((size_t)T * T);
    for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++) {
            const float *q = &qkv[(size_t)b * T * 3 * D + h * hd], *k = q + D, *v = k + D;
            const float *go = &dout[(size_t)b * T * D + h * hd];
            double *o = &out[(size_t)b * T * D + h * hd], *dq = &dqkv[(size_t)b * T * 3 * D + h * hd], *dk = dq + D,
                   *dv = dk + D;
            for (int i = 0; i < T; i++) {
                double sum = 0, dot = 0;
                for (int j = 0; j < T; j++) {
                    double s = 0;
                    for (int d = 0; d < hd; d++) s += (double)q[(size_t)i * 3 * D + d] * k[(size_t)j * 3 * D + d];
                    sum += p[(size_t)i * T + j] = exp(s / sqrt((double)hd));
                }
                for (int j = 0; j < T; j++) p[(size_t)i * T + j] /= sum;
                for (int j = 0; j < T; j++)
                    for (int d = 0; d < hd; d++)
                        o[(size_t)i * D + d] += p[(size_t)i * T + j] * v[(size_t)j * 3 * D + d];
                for (int d = 0; d < hd; d++) dot += o[(size_t)i * D + d] * go[(size_t)i * D + d];
                for (int j = 0; j < T; j++) {
                    double dp = 0;
                    for (int d = 0; d < hd; d++) dp += (double)go[(size_t)i * D + d] * v[(size_t)j * 3 * D + d];
                    double ds = p[(size_t)i * T + j] * (dp - dot) / sqrt((double)hd);
                    for (int d = 0; d < hd; d++) {
                        dq[(size_t)i * 3 * D + d] += ds * k[(size_t)j * 3 * D + d];
                        dk[(size_t)j * 3 * D + d] += ds * q[(size_t)i * 3 * D + d];
                        dv[(size_t)j * 3 * D + d] += p[(size_t)i * T + j] * go[(size_t)i * D + d];
                    }
                }
            }
        }
    Act *gqkv = (Act *)on_gpu(qkv, half), *gdout = (Act *)on_gpu(dout, half),
        *gout = (Act *)gpu_malloc((size_t)B * T * D * 4, "");
    Act *gdqkv = (Act *)gpu_malloc((size_t)B * T * 3 * D * 4, "");
    float *lse = (float *)gpu_malloc((size_t)B * H * T * 4, ""), *sums = (float *)gpu_malloc((size_t)B * T * D * 4, "");
    attention_forward(half, gout, lse, gqkv, B, T, D, H);
    attention_backward(half, gdqkv, sums, gdout, gout, lse, gqkv, B, T, D, H);
    Floats got = from_gpu(gdqkv, (size_t)B * T * 3 * D, half);
    snprintf(text, sizeof text, "%s attention, %d tokens, %d heads of %d", half ? "bf16" : "fp32", T, H, hd);
    expect(text, from_gpu(gout, (size_t)B * T * D, half), out, limit);
    for (int part = 0; part < 3 && (T > 1 || part == 2); part++) { // with one token, only v gets a gradient
        Floats some;
        std::vector<double> want;
        for (size_t i = 0; i < got.size(); i++)
            if (i / D % 3 == (size_t)part) some.push_back(got[i]), want.push_back(dqkv[i]);
        snprintf(text, sizeof text, "%s attention, %d tokens, %d heads of %d, d%c", half ? "bf16" : "fp32", T, H, hd,
                 "qkv"[part]);
        expect(text, some, want, limit);
    }
    void *all[] = {gqkv, gdout, gout, gdqkv, lse, sums};
    for (void *q : all) gpu_free(q, 0);
}

// Anderson acceleration over random z_{k-1} and g(z_{k-1}), against weights from pivoted elimination of the system with
// the constraint as its last row; in round 6 the residual is zero
static void test_anderson(int half, int B, int side, int D, int window) {
    char text[100];
    Model m = {};
    m.config.image_size = side, m.config.patch = 1, m.config.width = D;
    m.B = B, m.half = half;
    size_t count = (size_t)side * side * D, N = B * count;
    m.a.history = (float *)gpu_malloc(2 * (window + 1) * N * 4, ""),
    m.a.gram = (double *)gpu_malloc((size_t)B * HISTORY * HISTORY * 8, "");
    std::vector<Floats> z, g;
    for (int k = 1; k <= 6; k++) {
        z.push_back(random_floats(N, 30 + k, 0)), g.push_back(k == 6 ? z.back() : random_floats(N, 40 + k, 0));
        for (size_t i = 0; i < N && k > 1 && k < 6; i++)
            g[k - 1][i] += 0.7f * (g[k - 2][i] - z[k - 2][i]); // not orthogonal
        int first = k > window + 1 ? k - window - 1 : 0, n = k - first, last = k == 5;
        std::vector<double> want(N);
        for (int b = 0; b < B; b++) {
            double A[10][11] = {};
            for (int i = 0; i < n; i++) {
                A[i][n] = A[n][i] = 1;
                for (int j = 0; j < n; j++)
                    for (size_t e = b * count; e < (b + 1) * count; e++)
                        A[i][j] +=
                            ((double)g[first + i][e] - z[first + i][e]) * ((double)g[first + j][e] - z[first + j][e]);
            }
            A[n][n + 1] = 1; // column n+1: the right side
            for (int c = 0; c <= n; c++) {
                int best = c;
                for (int r = c; r <= n; r++) best = fabs(A[r][c]) > fabs(A[best][c]) ? r : best;
                std::swap(A[c], A[best]);
                for (int r = 0; r <= n; r++)
                    for (int j = n + 1; r != c && j >= c; j--) A[r][j] -= A[r][c] / A[c][c] * A[c][j];
            }
            for (int i = 0; i < n; i++)
                for (size_t e = b * count; e < (b + 1) * count; e++) {
                    double zi = z[first + i][e], a = k == 6 ? i == n - 1 : A[i][n + 1] / A[i][i];
                    want[e] += a * (zi + (last ? 1 : 0.7) * (g[first + i][e] - zi));
                }
        }
        float *x = (float *)on_gpu(g.back(), 0);
        m.a.z_before = (float *)on_gpu(z.back(), 0), m.a.z = half ? (Act *)gpu_malloc(N * 2, "") : NULL;
        anderson_forward(&m, x, k, window, last ? 1 : 0.7);
        snprintf(text, sizeof text, "%s anderson, %d of %zu, window %d, iteration %d", half ? "bf16" : "fp32", B, count,
                 window, k);
        expect(text, from_gpu(x, N, 0), want, 1e-6);
        if (half) expect("  its copy", from_gpu(m.a.z, N, 1), want, 3e-3);
        gpu_free(x, 0), gpu_free(m.a.z_before, 0), gpu_free(m.a.z, 0);
    }
    gpu_free(m.a.history, 0), gpu_free(m.a.gram, 0);
}

// The gradient through LN, its modulation's, and that of the gated residual below; `parts` of that: 1 LN, 2 residual;
// 4: LN's input is the residual's output
static void test_layernorm_backward(int half, int B, int side, int D, int parts) {
    char text[100];
    int T = side * side;
    size_t N = (size_t)B * T * D;
    double output = half ? 3e-3 : 1e-6;
    Model m = {};
    m.config.image_size = side, m.config.patch = 1, m.config.width = D;
    m.B = B, m.half = half;
    m.a.parts = (float *)gpu_malloc((size_t)3 * B * ceil_div(T, LN_CHUNK) * D * 4, "");
    Floats x = random_floats(N, 51, 0), dout = random_floats(N, 52, half), dx = random_floats(N, 53, 0);
    Floats branch = random_floats(N, 54, half), mod = random_floats((size_t)B * 6 * D, 55, 0),
           dmod0 = random_floats(mod.size(), 56, 0);
    std::vector<double> want(dx.begin(), dx.end()), down(N), dmod(dmod0.begin(), dmod0.end()), row(D), output_again(N);
    Floats input = x;
    for (size_t r = 0; r < (size_t)B * T; r++) {
        double mean = 0, var = 0, g_sum = 0, gn_sum = 0;
        const float *go = &dout[r * D], *scale = &mod[r / T * 6 * D + D], *gate = scale + 4 * D;
        for (int d = 0; d < D; d++) row[d] = input[r * D + d] += parts & 4 ? gate[d] * branch[r * D + d] : 0;
        double *sums = &dmod[r / T * 6 * D];
        for (int d = 0; d < D; d++) mean += (double)row[d] / D;
        for (int d = 0; d < D; d++) var += pow(row[d] - mean, 2) / D;
        double rstd = 1 / sqrt(var + 1e-6);
        for (int d = 0; d < D; d++) {
            double g = go[d] * (1.0 + scale[d]);
            g_sum += g / D, gn_sum += g * (row[d] - mean) * rstd / D;
        }
        for (int d = 0; d < D; d++) {
            double normed = (row[d] - mean) * rstd, &out = want[r * D + d];
            output_again[r * D + d] = normed * (1 + scale[d]) + scale[d - D];
            if (parts & 1) {
                out += rstd * (go[d] * (1.0 + scale[d]) - g_sum - normed * gn_sum);
                sums[d] += go[d], sums[D + d] += go[d] * normed;
            }
            down[r * D + d] = out * gate[d];
            if (parts & 2) sums[5 * D + d] += out * branch[r * D + d];
        }
    }
    float *gdx = (float *)on_gpu(dx, 0), *gx = (float *)on_gpu(x, 0), *gmod = (float *)on_gpu(mod, 0),
          *gdmod = (float *)on_gpu(dmod0, 0);
    Act *gdout = (Act *)on_gpu(dout, half), *gbranch = (Act *)on_gpu(branch, half),
        *copy = (Act *)gpu_malloc(N * 4, "");
    Act *dbranch = (Act *)gpu_malloc(N * 4, ""), *normed = (Act *)gpu_malloc(N * 4, "");
    float *stats = (float *)gpu_malloc((size_t)B * T * 2 * 4, ""), *ginput = (float *)on_gpu(input, 0);
    layernorm_forward(&m, half, normed, stats, ginput, gmod, 6);
    Floats forward = from_gpu(normed, N, half);
    CHECK(cudaMemsetAsync(normed, 0xff, N * 4, gpu.stream));
    if (parts == 1)
        layernorm_backward(&m, half, gdx, copy, normed, gdmod, gdout, gx, stats, gmod, 6);
    else if (parts == 2)
        gate_backward(&m, dbranch, gdmod + 5 * D, gdx, gmod + 5 * D, gbranch);
    else
        layernorm_backward(&m, half, gdx, copy, normed, gdmod, gdout, gx, stats, gmod, 6, dbranch, gdmod + 5 * D,
                           gmod + 5 * D, gbranch, parts >> 2);
    auto name = [&](const char *what) {
        snprintf(text, sizeof text, "%s LN backward %d, %dx%dx%d on %d, %s", half ? "bf16" : "fp32", parts, B, T, D,
                 gpu.sms, what);
        return text;
    };
    expect(name("dx"), from_gpu(gdx, N, 0), want, 1e-6);
    if (parts & 1) expect(name("copy"), from_gpu(copy, N, half), want, output);
    if (parts & 1) expect(name("LN"), forward, output_again, output);
    if (parts & 1) expect(name("LN again"), from_gpu(normed, N, half), output_again, output);
    if (parts & 2) expect(name("dbranch"), from_gpu(dbranch, N, half), down, output);
    expect(name("dmod"), from_gpu(gdmod, dmod.size(), 0), dmod, 1e-6);
    void *all[] = {gdx, gx, gmod, gdmod, gdout, gbranch, copy, dbranch, normed, stats, ginput, m.a.parts};
    for (void *p : all) gpu_free(p, 0);
}

static void test_residual(int B, int side, int D) {
    Model m = {};
    m.B = B;
    size_t count = (size_t)side * side * D;
    Floats z = random_floats(B * count, 61, 0), before = random_floats(B * count, 62, 0);
    float *gz = (float *)on_gpu(z, 0);
    m.a.z_before = (float *)on_gpu(before, 0), m.a.sums = (double *)gpu_malloc(2 * B * sizeof(double), "");
    double want = 0;
    for (int b = 0; b < B; b++) {
        double change = 0, norm = 0;
        for (size_t i = b * count; i < (b + 1) * count; i++)
            change += pow((double)z[i] - before[i], 2), norm += pow(z[i], 2);
        want += sqrt(change / norm) / B;
    }
    expect("residual", {(float)residual_of(&m, gz, count)}, {want}, 1e-7);
    gpu_free(gz, 0), gpu_free(m.a.z_before, 0), gpu_free(m.a.sums, 0);
}

// Pictures to tokens and back, in several strips of patches a row of them
static void test_patches(int S, int p, int C, int B, int channel_last) {
    char text[100];
    Model m = {};
    m.config.image_size = S, m.config.patch = p, m.B = B;
    size_t count = (size_t)B * C * S * S, side = S / p;
    Floats x = random_floats(count, 71, 0);
    std::vector<double> want(count), back(x.begin(), x.end());
    for (int b = 0; b < B; b++)
        for (int c = 0; c < C; c++)
            for (int i = 0; i < S; i++)
                for (int j = 0; j < S; j++) {
                    size_t token = ((b * side + i / p) * side + j / p) * C * p * p, within = i % p * p + j % p;
                    want[token + (channel_last ? within * C + c : (size_t)c * p * p + within)] =
                        x[(((size_t)b * C + c) * S + i) * S + j];
                }
    float *pictures = (float *)on_gpu(x, 0), *tokens = (float *)gpu_malloc(count * 4, "");
    snprintf(text, sizeof text, "patches %d of %dx%dx%d%s", p, C, S, S, channel_last ? ", channel last" : "");
    move_patches(&m, tokens, pictures, 0, channel_last, C);
    expect(text, from_gpu(tokens, count, 0), want, 0);
    CHECK(cudaMemsetAsync(pictures, 0xff, count * 4, gpu.stream));
    move_patches(&m, tokens, pictures, 1, channel_last, C);
    expect("  and back", from_gpu(pictures, count, 0), back, 0);
    gpu_free(pictures, 0), gpu_free(tokens, 0);
}

static void test_norm(size_t count) {
    char text[100];
    Model m = {};
    Floats g = random_floats(count, 63, 0);
    double want = 0;
    for (float v : g) want += (double)v * v;
    m.n_params = count, m.memory[MODEL_GRADS] = (float *)on_gpu(g, 0);
    m.a.sums = (double *)gpu_malloc(NORM_BLOCKS * sizeof(double), "");
    snprintf(text, sizeof text, "gradient norm of %zu", count);
    expect(text, {(float)model_gradient_norm(&m)}, {sqrt(want)}, 1e-7);
    gpu_free(m.memory[MODEL_GRADS], 0), gpu_free(m.a.sums, 0);
}

// Sizes that the kernels do not serve end the program with one line and exit status 1: in a child, before this process
// opens the GPU.
static void test_refusals(void) {
    struct {
        const char *words;
        int image_size, channels, patch, width, heads, batch, shared_kb = 0;
    } tests[] = {
        {"needs a multiple of 8", 8, 3, 2, 36, 3, 2},
        {"head size 136", 8, 3, 2, 272, 2, 2},
        {"numbers in a patch", 256, 4, 256, 64, 2, 2},
        {"on this GPU training takes at most", 8, 3, 2, 16384, 128, 2},
        {"at most 65535", 8, 3, 2, 64, 2, 65536},
        {"65000 pictures of 4225 tokens", 130, 3, 2, 64, 2, 65000}, // an int counts tokens
        {"8000 pictures of 256 tokens", 32, 3, 2, 1152, 16, 8000},  // 32 bits count the numbers of inj_part
        {"a block 48 KB of shared memory", 8, 3, 2, 64, 2, 2, 48},
    };
    for (auto &test : tests) {
        char said[300] = "";
        int ends[2], status = 0;
        if (pipe(ends)) die("no pipe");
        fflush(NULL);
        pid_t child = fork();
        if (child == 0) {
            Config c = {};
            c.image_size = test.image_size, c.channels = test.channels, c.patch = test.patch;
            c.width = test.width, c.heads = test.heads, c.mlp_ratio = 4, c.classes = 10;
            c.fixed_point = c.pre_depth = c.post_depth = 1, c.depth = 8;
            dup2(ends[1], 2);
            gpu_open();
            if (test.shared_kb) gpu.shared = (size_t)test.shared_kb << 10;
            model_create(&c, test.batch, 1, 0, test.batch < 8000, 0, COMPUTE_BF16);
            exit(0);
        }
        close(ends[1]);
        FILE *error = fdopen(ends[0], "r");
        size_t length = fread(said, 1, sizeof said - 1, error);
        fclose(error);
        waitpid(child, &status, 0);
        int lines = 0, ok = WIFEXITED(status) && WEXITSTATUS(status) == 1 && strstr(said, test.words);
        for (size_t i = 0; i < length; i++) lines += said[i] == '\n';
        ok &= lines == 1;
        printf("refused: %-60s %s\n", test.words, ok ? "ok" : "FAIL");
        if (!ok) printf("    %s\n", said);
        (ok ? passed : failed)++;
    }
}

// A picture has the same bits alone and beside others, and from a model that trains, which has room to split sums
// (where K is 512 and more).
static void test_sampling(int half, int last) {
    enum { PICTURES = 70, STEPS = 2 };
    Config c = {};
    c.image_size = c.patch = 2, c.channels = 3, c.width = 512, c.heads = 8, c.mlp_ratio = 4, c.classes = 10;
    c.fixed_point = c.pre_depth = c.timestep_in_pre_post = c.skip = 1, c.prediction = PREDICT_FLOW, c.depth = 3;
    size_t count = config_pixels(&c);
    int y[PICTURES] = {3}, iters[STEPS] = {1, 2};
    Schedule *s = (Schedule *)xcalloc(1, sizeof *s, "a test");
    Floats alone;
    schedule_make(s, &c, STEPS);
    gpu.sms = 4; // of two batches one would be split
    for (int training = TRAIN_NOT; training <= last; training++)
        for (int batch : {1, (int)PICTURES}) {
            Model *m = model_create(&c, batch, 1, 0, training, 0, half ? COMPUTE_BF16 : COMPUTE_FP32);
            Floats weights = random_floats((size_t)m->n_params, 1, 0, 0.05f), x = random_floats(batch * count, 2, 0);
            model_upload(m, MODEL_WEIGHTS, 0, m->n_params, weights.data());
            model_use(m, MODEL_WEIGHTS);
            SampleSettings set;
            memset(&set, 0, sizeof set);
            set.sampler = SAMPLER_FLOW;
            set.order = set.reuse = 1;
            set.cfg = set.mixing = 1;
            set.iters = iters;
            sample_batch(m, s, &set, x.data(), y, batch, NULL, 1, 0);
            if (alone.empty()) alone = x;
            int ok = !memcmp(x.data(), alone.data(), count * sizeof(float)) && std::isfinite(x[0]);
            printf("sampling: %s, picture 1 of %-2d%-29s %s\n", half ? "bf16" : "fp32", batch,
                   training ? ", by a model that trains" : "", ok ? "ok" : "FAIL");
            (ok ? passed : failed)++;
            model_free(m);
        }
    xfree(s);
}

int main(void) {
    test_refusals();
    gpu_open();
    int hopper = gpu.wgmma;
    gpu.wgmma = 0; // first what every GPU does
    for (int sms : {3, 132}) {
        gpu.sms = sms;
        workspace_reserve(1 << 20);
        for (int half = 0; half < 2; half++) {
            test_matmul(half, 300, 136, 200);
            test_matmul(half, 130, 264, 128);
            test_matmul(half, 1030, 136, 144);
            test_matmul(half, 24, 8, 16);
            if (!half) test_matmul(half, 10, 3, 12);
            if (!half) test_matmul(half, 24, 40, 1160); // conditioning: both sums over k are split
            if (!half) test_matmul(half, 24, 1160, 40);
            for (int parts : {1, 2, 3, 7}) test_layernorm_backward(half, 4, 7, 72, parts);
            test_layernorm_backward(half, 2, 10, 1160, 7);
            test_layernorm_backward(half, 1, 3, 2064, 7);
            if (sms == 3 && gpu.shared >= 99 << 10) // the widest that model_create allows in so much
                test_layernorm_backward(half, 1, 2, 3160, 7);
            test_anderson(half, 3, 2, 8, 3);
            test_anderson(half, 2, 7, 40, 1);
            test_anderson(half, 1, 5, 64, 8);
            if (sms == 3) test_splits(half, 4104, 64, 64, half ? 6 : 12);
            for (int s = 1; sms == 132 && s <= 16; s++) test_splits(half, 256 * s + 8, 24, 16, s);
        }
    }
    if (!getenv("EMU_QUICK")) {         // what takes most: for the tiles of 1030x136 on 3 multiprocessors, at full size
        test_matmul(1, 1536, 1408, 40); // 132 large tiles of y, of dx; 276, which is more than a wave
        test_matmul(1, 1536, 40, 1408);
        test_matmul(1, 2944, 1536, 24);
    }
    for (int s : {1, 2, 7, 16}) test_splits(1, 256 * s + 8, 136, 144, s);
    for (int half = 0; half < 2; half++) {
        int sizes[][3] = {{1, 1, 8},   {100, 2, 24},  {65, 1, 40},  {64, 1, 64},  {130, 1, 72},
                          {70, 1, 96}, {200, 1, 128}, {1024, 1, 8}, {256, 2, 72}, {200, 2, 64}};
        for (auto &s : sizes) test_attention(half, 2, s[0], s[1], s[2]);
        if (half) test_attention(half, 2, 20, 1, 16, 1024); // weights of columns beyond the last would overflow
    }
    for (int side : {5, 6}) test_residual(3, side, 40);
    gpu.sms = 1; // the mixture goes over a picture in several rounds
    for (int half : {0, 1}) test_anderson(half, 8, 5, 64, 2);
    for (size_t count : {300001, 1100001}) test_norm(count);
    for (int last : {0, 1})
        test_patches(96, 16, 3, 2, last), test_patches(80, 40, 3, 1, last), test_patches(128, 64, 4, 1, last);
    for (int sms : {1, 6, 132}) { // then Hopper's product: less than a tile, ragged ones, several a block, split sums
        if (!hopper) break;
        gpu.wgmma = 2, gpu.sms = sms;
        test_matmul(1, 24, 8, 16);
        test_matmul(1, 520, 392, 328);
        test_matmul(1, 1536, 200, 72);
        test_splits(1, 4104, 136, 144, sms == 132 ? 15 : sms == 6 ? 3 : 1); // the last of 15 are empty
        if (sms != 6) continue; // three pairs of tiles at a time: of 5 or 8, the last 2 are split, wherever they begin
        test_splits(1, 7000, 384, 400, 3, 256 * 400 + 256);
        test_splits(1, 7000, 640, 400, 3, 512 * 400 + 512);
        test_splits(1, 7000, 256, 904, 3, 256 * 576 + 256);
        test_splits(1, 7000, 128, 1544, 3, 128 * 1152 + 128);
    }
    gpu.wgmma = hopper;
    int quick = !!getenv("EMU_QUICK");
    // The simulator, which runs what nvcc made of the code, sees the first of them in any case.
    for (int half = 0; half < 2 && (!quick || getenv("PTXSIM_SMS")); half++)
        test_sampling(half, quick ? TRAIN_NOT : TRAIN_ADAMW);
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}

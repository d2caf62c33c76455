// Tests of the parts of fpdm_cpu.c, which is included whole. Built twice: test_unit (float), and test_gradient
// (-DREAL=double), which compares every kind of gradient with finite differences of the training loss.
//
//   test_unit                  one line for each test, `name ok` or `name FAIL`; last `N passed, N failed`
//   test_unit png FILE...      decodes pictures that png_write made and prints width, height and checksum of the pixels
//   test_unit tensors FILE...  lists what is in a safetensors file: name, dtype, shape

#include "../fpdm_cpu.c"
#include <dirent.h>
#include <float.h>
#include <sys/resource.h>
#include <sys/wait.h>

static int tests_passed, tests_failed;
__attribute__((format(printf, 2, 3))) static void check(int ok, const char *fmt, ...) {
    char name[200];
    va_list args;
    va_start(args, fmt);
    vsnprintf(name, sizeof name, fmt, args);
    va_end(args);
    printf("%-70s %s\n", name, ok ? "ok" : "FAIL");
    if (ok)
        tests_passed++;
    else
        tests_failed++;
}
#define CHECK(name, condition) check((condition) != 0, "%s", name)
#include "test_files.h"

static void set_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

// Word number `index` of a stream of the tests' own
static uint32_t random_word(uint32_t index, uint32_t step) {
    uint32_t word[4];
    philox(word, 12345, index, step, 99);
    return word[0];
}

// ---------------------------------------------------------------------------------------------------------------------
// Models to test with: small, every setting once, sizes that do not divide by anything

typedef struct {
    const char *name;
    int fixed_point, pre, post, pre_post_time, skip, prediction, v_weight, learn_sigma, zero_snr;
    int image_size, patch, channels, width, heads, classes;
    int B, n, m;
    int t[4], y[4];
} Case;

// clang-format off
static const Case cases[] = { // model: fixed point, pre, post, time in both, skip; loss; sizes; B, n, m; t; y
    {"eps", 1, 1, 1, 0, 0, PREDICT_EPS, 0, 0, 0, 6, 2, 3, 16, 2, 3, 2, 0, 1, {700, 20}, {0, 3}},
    {"eps, variance", 1, 1, 1, 0, 1, PREDICT_EPS, 0, 1, 0, 6, 2, 2, 16, 4, 3, 4, 2, 2, {0, 400, 999, 1}, {1, 3, 0, 1}},
    {"v p2, variance", 1, 2, 0, 1, 0, PREDICT_V, V_WEIGHT_P2, 1, 0, 4, 2, 1, 12, 4, 5, 3, 1, 3, {0, 0, 600}, {5, 2, 2}},
    {"v", 1, 0, 2, 1, 1, PREDICT_V, V_WEIGHT_1, 0, 0, 6, 2, 3, 16, 1, 3, 2, 3, 1, {500, 3}, {2, 1}},
    {"v p2", 1, 1, 2, 0, 0, PREDICT_V, V_WEIGHT_P2, 0, 0, 15, 3, 1, 20, 4, 3, 3, 2, 2, {999, 0, 300}, {0, 1, 3}},
    {"v, zero SNR", 1, 0, 1, 0, 0, PREDICT_V, V_WEIGHT_1, 1, 1, 4, 2, 3, 8, 2, 2, 3, 0, 2, {999, 998, 0}, {2, 0, 1}},
    {"flow, no pre, no post", 1, 0, 0, 0, 1, PREDICT_FLOW, 0, 0, 0, 6, 2, 3, 24, 3, 3, 2, 0, 3, {999, 111}, {1, 0}},
    {"flow, no labels, one token", 1, 2, 1, 1, 0, PREDICT_FLOW, 0, 0, 0, 3, 3, 4, 12, 1, 0, 1, 4, 1, {250}, {0}},
    {"x, 9 tokens", 1, 1, 1, 1, 0, PREDICT_X, 0, 0, 0, 9, 3, 3, 16, 2, 3, 3, 1, 2, {999, 0, 120}, {1, 3, 2}},
    {"144 tokens", 1, 0, 1, 0, 0, PREDICT_EPS, 0, 0, 0, 12, 1, 1, 8, 1, 1, 1, 1, 1, {800}, {1}},
    {"DiT eps, variance", 0, 2, 0, 0, 0, PREDICT_EPS, 0, 1, 0, 6, 2, 3, 16, 2, 3, 3, 1, 1, {0, 300, 800}, {1, 3, 3}},
    {"DiT flow", 0, 3, 0, 0, 0, PREDICT_FLOW, 0, 0, 0, 5, 1, 1, 8, 2, 2, 2, 0, 1, {1, 900}, {0, 2}},
    {"DiT x", 0, 2, 0, 0, 0, PREDICT_X, 0, 0, 0, 4, 2, 1, 12, 3, 2, 2, 0, 1, {49, 400}, {2, 1}},
};
// clang-format on
enum { N_CASES = sizeof cases / sizeof *cases };

static double larger(double a, double b) { return a != a || b <= a ? a : b; } // unlike fmax, NaN stays

static Config case_config(const Case *k) {
    Options o;
    options_default(&o, TRAIN);
    Config c = o.model;
    c.fixed_point = k->fixed_point;
    c.depth = k->fixed_point ? 8 : k->pre;
    c.pre_depth = k->pre;
    c.post_depth = k->post;
    c.timestep_in_pre_post = k->pre_post_time;
    c.skip = k->skip;
    c.prediction = k->prediction;
    c.v_weight = k->v_weight;
    c.learn_sigma = k->learn_sigma;
    c.zero_terminal_snr = k->zero_snr;
    c.image_size = k->image_size;
    c.patch = k->patch;
    c.channels = k->channels;
    c.width = k->width;
    c.heads = k->heads;
    c.classes = k->classes;
    config_check(&c, k->name);
    return c;
}

static int arithmetic = COMPUTE_FP32; // of the models that are tested
static const char *in_arithmetic(void) { return arithmetic == COMPUTE_BF16 ? " in bf16" : ""; }

static Model *make_model(const Config *c, int batch, int max_m, int recompute, int training) {
    return model_create(c, batch, max_m, recompute, training, 0, arithmetic);
}

// Weights of which no gradient vanishes: the initial ones are zero in many places.
static void random_weights(Model *m) {
    float *values = (float *)xcalloc((size_t)m->n_params, sizeof *values, "weights");
    for (int i = 0; i < m->n_tensors; i++) {
        const ParamTensor *p = &m->tensors[i];
        double scale = p->ndim == 1 ? 0.2 : 0.7 / sqrt((double)(p->count / p->shape[0]));
        if (strstr(p->name, "embedding_table")) scale = 0.5;
        rng_normal(values + p->offset, (size_t)p->count, 0, 7, (uint32_t)i, 99);
        for (int64_t e = 0; e < p->count; e++) values[p->offset + e] *= (float)scale;
    }
    model_upload(m, MODEL_WEIGHTS, 0, m->n_params, values);
    if (m->training) model_upload(m, MODEL_EMA, 0, m->n_params, values);
    model_use(m, MODEL_WEIGHTS);
    xfree(values);
}

typedef struct {
    Schedule s;
    size_t count; // per picture
    float *x0, *noise;
    double mse[16], vb[16];
} TestBatch;

static TestBatch *batch_make(const Config *c, int B) {
    TestBatch *b = (TestBatch *)xcalloc(1, sizeof *b, "a batch");
    schedule_make(&b->s, c, DIFFUSION_STEPS);
    b->count = (size_t)c->channels * c->image_size * c->image_size;
    b->x0 = (float *)xcalloc((size_t)B * b->count, sizeof(float), "a batch");
    b->noise = (float *)xcalloc((size_t)B * b->count, sizeof(float), "a batch");
    rng_normal(b->x0, (size_t)B * b->count, 0, 5, 0, 99);
    rng_normal(b->noise, (size_t)B * b->count, 0, 5, 1, 99);
    for (size_t i = 0; i < (size_t)B * b->count; i++) {
        b->x0[i] = fmaxf(-1, fminf(1, 0.8f * b->x0[i])); // a fifth of the pixels is saturated
        if (i == 2) b->noise[i] = 40;                    // at t = 0, a probability that is clamped
    }
    return b;
}

static void batch_free(TestBatch *b) {
    xfree(b->x0);
    xfree(b->noise);
    xfree(b);
}

static void case_loss(Model *m, TestBatch *b, const Case *k, int first, int B, double scale) {
    model_loss(m, &b->s, b->x0 + (size_t)first * b->count, b->noise + (size_t)first * b->count, k->t + first,
               k->y + first, B, k->n, k->m, scale, b->mse + first, b->vb + first);
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradients against finite differences. S-JFB's gradient is that of the last m iterations with z_n held, so the loss to
// differentiate starts from the z_n of the unchanged weights (through the door that `reuse` opens for sampling) while
// everything else, pre blocks and injection too, follows the weights. The variational term trains the variance channels
// alone: there the prediction is held as well.

static char held_name[32];
static real *held_z;
static void hold(const char *name, const real *data, int64_t count) {
    if (!strcmp(name, held_name)) memcpy(held_z, data, (size_t)count * sizeof *data);
}

static double held_loss(Model *m, TestBatch *b, const Case *k, const real *base_out) {
    const Config *c = &m->config;
    Activations *a = &m->a;
    Solve solve = {.reuse = 1, .reuse_ready = 1};
    double mse[4], vb[4], sum = 0;
    if (c->fixed_point) memcpy(a->reused, held_z, (size_t)k->B * (size_t)(config_tokens(c) * c->width) * sizeof(real));
    model_forward(m, k->t, k->y, k->B, 0, k->m, &solve);
    loss_forward_backward(mse, vb, NULL, a->out, b->x0, b->noise, a->x_t, k->t, &b->s, c, 1, k->B);
    for (int i = 0; i < k->B; i++) sum += mse[i];
    if (c->learn_sigma) {
        for (int i = 0; i < k->B; i++)
            memcpy(a->out + 2 * (size_t)i * b->count, base_out + 2 * (size_t)i * b->count, b->count * sizeof(real));
        loss_forward_backward(mse, vb, NULL, a->out, b->x0, b->noise, a->x_t, k->t, &b->s, c, 1, k->B);
        for (int i = 0; i < k->B; i++) sum += vb[i];
    }
    return sum / k->B;
}

static void test_gradient(const Case *k) {
    enum { PER_TENSOR = 4 };
    const double h = 1e-5, limit = 1e-6;
    Config c = case_config(k);
    Model *m = make_model(&c, k->B, k->m, 0, 1);
    TestBatch *b = batch_make(&c, k->B);
    size_t out_count = (size_t)k->B * b->count * (c.learn_sigma ? 2 : 1);
    real *base_out = (real *)xcalloc(out_count, sizeof *base_out, "a test"), *w = m->memory[MODEL_WEIGHTS];
    held_z = (real *)xcalloc((size_t)k->B * (size_t)(config_tokens(&c) * c.width), sizeof *held_z, "a test");
    snprintf(held_name, sizeof held_name, k->n ? "act.z.%d" : "act.pre", k->n);
    random_weights(m);
    m->probe = hold;
    model_zero_gradients(m);
    case_loss(m, b, k, 0, k->B, 1.0 / k->B);
    m->probe = NULL;
    memcpy(base_out, m->a.out, out_count * sizeof *base_out);
    double loss = 0, worst = 0;
    const char *worst_name = "";
    for (int i = 0; i < k->B; i++) loss += b->mse[i];
    for (int i = 0; i < k->B && c.learn_sigma; i++) loss += b->vb[i];
    int same_loss = fabs(held_loss(m, b, k, base_out) - loss / k->B) <= 1e-12 * fabs(loss), dead = 0, bad = 0;
    for (int i = 0; i < m->n_tensors; i++) {
        const ParamTensor *p = &m->tensors[i];
        const real *g = m->memory[MODEL_GRADS] + p->offset;
        int64_t largest = 0;
        double tensor_worst = 0;
        for (int64_t e = 1; e < p->count; e++)
            if (fabs(g[e]) > fabs(g[largest])) largest = e;
        if (g[largest] == 0) dead++, printf("    %s has no gradient\n", p->name);
        for (uint32_t j = 0; j < PER_TENSOR; j++) {
            int64_t e = j ? rng_below(random_word(j, (uint32_t)i), (uint32_t)p->count) : largest;
            real before = w[p->offset + e];
            w[p->offset + e] = (real)(before + h);
            double above = held_loss(m, b, k, base_out);
            w[p->offset + e] = (real)(before - h);
            double error = fabs((above - held_loss(m, b, k, base_out)) / (2 * h) - g[e]) / fabs(g[largest]);
            w[p->offset + e] = before;
            tensor_worst = larger(tensor_worst, error);
        }
        if (!(tensor_worst <= limit)) bad++, printf("    %s: error %.1e\n", p->name, tensor_worst);
        if (isnan(tensor_worst) || tensor_worst > worst) worst = tensor_worst, worst_name = p->name;
    }
    check(same_loss, "gradient: %s: the loss with z_n held is the loss", k->name);
    check(!dead && !bad, "gradient: %s: %d tensors", k->name, m->n_tensors);
    printf("    worst relative error %.1e, limit %.0e, %s\n", worst, limit, worst_name);
    model_free(m);
    batch_free(b);
    xfree(base_out);
    xfree(held_z);
}

// ---------------------------------------------------------------------------------------------------------------------
// Training: the same bits whatever the memory plan and the number of threads; micro-batches add up

static int same_reals(const Model *a, const Model *b, int kind) {
    return !memcmp(a->memory[kind], b->memory[kind], (size_t)a->n_params * sizeof(real));
}

// ||a - b|| / ||b||
static double relative_error(const real *a, const real *b, int64_t count) {
    double error = 0, norm = 0;
    for (int64_t i = 0; i < count; i++) {
        error += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += (double)b[i] * b[i];
    }
    return sqrt(error / norm);
}

static void test_memory_plans(const Case *k) {
    Config c = case_config(k);
    TestBatch *b = batch_make(&c, k->B);
    Model *m[4] = {make_model(&c, k->B, k->m, 0, 1), make_model(&c, k->B, k->m, 1, 1),
                   make_model(&c, k->B + 1, k->m + 2, 0, 1), make_model(&c, 1, k->m, 1, 1)};
    for (int i = 0; i < 4; i++) {
        random_weights(m[i]);
        for (int repeat = 0; repeat < 2; repeat++) { // nothing may be left over from the step before
            model_zero_gradients(m[i]);
            int at_a_time = i == 3 ? 1 : k->B;
            for (int first = 0; first < k->B; first += at_a_time) case_loss(m[i], b, k, first, at_a_time, 1.0 / k->B);
        }
    }
    check(same_reals(m[1], m[0], MODEL_GRADS), "recompute: %s%s: same bits", k->name, in_arithmetic());
    check(same_reals(m[2], m[0], MODEL_GRADS), "room for more pictures and iterations: %s%s: same bits", k->name,
          in_arithmetic());
    double error = relative_error(m[3]->memory[MODEL_GRADS], m[0]->memory[MODEL_GRADS], m[0]->n_params);
    check(error <= 2e-6, "micro-batches: %s%s: error %.1e, limit 2e-6", k->name, in_arithmetic(), error);
    if (k->fixed_point && k->m > 1) {
        check(m[1]->activation_bytes < m[0]->activation_bytes, "recompute: %s: less memory", k->name);
    }
    for (int i = 0; i < 4; i++) model_free(m[i]);
    batch_free(b);
}

static void test_threads(const Case *k) {
    Config c = case_config(k);
    TestBatch *b = batch_make(&c, k->B);
    Model *first = NULL;
    for (int threads = 1; threads <= 4; threads++) {
        set_threads(threads);
        Model *m = make_model(&c, k->B, k->m, 0, 1);
        random_weights(m);
        for (int step = 1; step <= 3; step++) {
            model_zero_gradients(m);
            case_loss(m, b, k, 0, k->B, 1.0 / k->B);
            double norm = model_gradient_norm(m);
            model_update(m, step, 1e-3, 0.9, 0.999, 1e-8, 0.01, norm > 1 ? 1 / norm : 1, 0.9);
        }
        if (!first) {
            first = m;
            continue;
        }
        int same = 1;
        for (int kind = 0; kind < 5; kind++) same &= same_reals(m, first, kind);
        check(same, "threads: %s%s: %d and 1: same bits", k->name, in_arithmetic(), threads);
        model_free(m);
    }
    model_free(first);
    batch_free(b);
}

// ---------------------------------------------------------------------------------------------------------------------
// Sampling: a picture depends on the seed and its number, not on how many are drawn at a time

static void test_sampling_batches(const Case *k, int sampler, double eta, double cfg, int window) {
    enum { PICTURES = 7, STEPS = 3 };
    Config c = case_config(k);
    Schedule *s = (Schedule *)xcalloc(1, sizeof *s, "a test");
    size_t count = (size_t)(c.channels * c.image_size * c.image_size), bytes = PICTURES * count * sizeof(float);
    float *want = (float *)xcalloc(bytes, 1, "a test"), *got = (float *)xcalloc(bytes, 1, "a test");
    int y[PICTURES], iters[STEPS] = {3, 1, 2};
    schedule_make(s, &c, STEPS);
    for (int b = 0; b < PICTURES; b++) y[b] = b % (c.classes + 1);
    for (int batch = 1; batch <= PICTURES; batch += batch < 3 ? 1 : 2) {
        SampleSettings set;
        memset(&set, 0, sizeof set);
        set.sampler = sampler;
        set.order = sampler == SAMPLER_FLOW ? 2 : 1;
        set.cfg_channels = 2;
        set.reuse = 1;
        set.eta = eta;
        set.cfg = cfg;
        set.iters = iters;
        set.window = window;
        set.mixing = 0.8;
        set.interval[1] = DIFFUSION_STEPS - 1;
        Model *m = model_create(&c, cfg != 1 ? 2 * batch : batch, 0, 0, 0, window, arithmetic);
        random_weights(m);
        sample_pictures(m, s, &set, batch == 1 ? want : got, y, PICTURES, 3);
        int64_t passes = c.fixed_point ? (c.pre_depth + c.post_depth) * STEPS + 6 : c.depth * STEPS;
        if (batch == 1) {
            check(set.passes == passes, "sampling: %s: passes are counted", k->name);
            int finite = 1;
            for (size_t i = 0; i < PICTURES * count; i++) finite &= isfinite(want[i]) != 0;
            check(finite && memcmp(want, want + count, count * sizeof *want),
                  "sampling: %s: pictures differ and are finite", k->name);
        } else if (batch == PICTURES) { // with the noise handed over, each step's a draw of its own
            float *z = (float *)xcalloc(STEPS * bytes, 1, "a test");
            for (uint32_t b = 0; b < PICTURES; b++) {
                rng_normal(got + b * count, count, 0, 3, b, STREAM_XT);
                for (uint32_t step = 0; step < STEPS; step++)
                    rng_normal(z + (step * PICTURES + b) * count, count, 0, 3, b * 1000 + STEPS - 1 - step, STREAM_Z);
            }
            sample_batch(m, s, &set, got, y, PICTURES, z, 0, 0);
            check(!memcmp(want, got, bytes), "sampling: %s%s: draws the noise of each step", k->name, in_arithmetic());
            xfree(z);
        } else {
            check(!memcmp(want, got, bytes) && set.passes == passes, "sampling: %s%s: %d at a time and one: same bits",
                  k->name, in_arithmetic(), batch);
        }
        model_free(m);
    }
    xfree(s);
    xfree(want);
    xfree(got);
}

// ---------------------------------------------------------------------------------------------------------------------
// Anderson acceleration of affine maps z <- R·z + c, one for each picture: R turns every pair of elements by some angle
// and shrinks it, so that plain iteration converges slowly and no two pictures alike.

enum { AFFINE_MOST = 3000 };
static void affine_map(real *out, const real *z, int picture, int count) {
    for (int e = 0; e < count; e += 2) {
        double angle = 0.5 + 0.3 * (e % 6) + 0.1 * picture, shrink = 0.95 - 0.02 * (e % 6), x = z[e], y = z[e + 1];
        out[e] = (real)(shrink * (cos(angle) * x - sin(angle) * y) + 1 + 0.1 * e / count);
        out[e + 1] = (real)(shrink * (sin(angle) * x + cos(angle) * y) - 2);
    }
}

// `steps` iterations from 0 for pictures first..first+B-1; window 0: plain. Returns the largest ||g(z) - z||/||g(z)||.
static double affine_solve(real *z, int first, int B, int count, int steps, int window, double mixing) {
    size_t N = (size_t)(B * count), room = 2 * (size_t)(window + 1) * N;
    real *before = (real *)xcalloc(N, sizeof *z, "a test"), *history = (real *)xcalloc(room, sizeof *z, "a test");
    double *gram = (double *)xcalloc((size_t)B * HISTORY * HISTORY, sizeof *gram, "a test"), worst = 0;
    memset(z, 0, N * sizeof *z);
    for (size_t i = 0; i < room; i++) history[i] = NAN; // only what was written may be read
    for (int k = 1; k <= steps; k++) {
        memcpy(before, z, N * sizeof *z);
        for (int b = 0; b < B; b++) affine_map(z + b * count, before + b * count, first + b, count);
        if (window) anderson_forward(z, before, history, gram, k, window, mixing, B, (size_t)count);
    }
    for (int b = 0; b < B; b++) {
        affine_map(before, z + b * count, first + b, count);
        double error = relative_error(z + b * count, before, count);
        worst = larger(worst, error);
    }
    xfree(before);
    xfree(history);
    xfree(gram);
    return worst;
}

static void test_anderson(void) {
    int threads = max_threads();
    static real z[4 * AFFINE_MOST], other[4 * AFFINE_MOST], before[6], history[2 * 9 * 6], start[6];
    double gram[HISTORY * HISTORY], plain = affine_solve(z, 0, 4, 6, 7, 0, 1),
                                    error = affine_solve(z, 0, 4, 6, 7, 6, 1);
    check(plain > 0.1 && error < 1e-5, "anderson: 6 elements, solved after 7 iterations: %.1e, plain %.1e", error,
          plain);
    error = affine_solve(z, 0, 4, 6, 7, 8, 0.7);
    check(error < 1e-5, "anderson: a larger window, mixing 0.7: %.1e", error);
    plain = affine_solve(z, 0, 4, AFFINE_MOST, 30, 0, 1);
    for (int window = 3; window <= 8; window += 5) { // six different eigenvalues
        error = affine_solve(z, 0, 4, AFFINE_MOST, 30, window, 1);
        check(error < 0.2 * plain, "anderson: 30 iterations, window %d: %.1e, plain %.1e", window, error, plain);
    }

    // Window 2 and mixing 0.6 against z - sum gamma_j dz_j + 0.6·(f - sum gamma_j df_j), with the differences of the
    // iterates and gamma from the normal equations
    double x[4][6], f[4][6], worst = 0;
    memset(start, 0, sizeof start);
    for (int k = 1; k <= 9; k++) {
        real g[6];
        double a[3] = {0}, d[2] = {0}, gamma[2] = {0};
        affine_map(g, start, 1, 6);
        memmove(x[1], x[0], 3 * sizeof *x);
        memmove(f[1], f[0], 3 * sizeof *f);
        for (int e = 0; e < 6; e++) x[0][e] = start[e], f[0][e] = (double)g[e] - start[e];
        for (int e = 0; e < 6 && k > 1; e++) {
            double first = f[0][e] - f[1][e], second = k > 2 ? f[1][e] - f[2][e] : 0;
            a[0] += first * first, a[1] += first * second, a[2] += second * second;
            d[0] += first * f[0][e], d[1] += second * f[0][e];
        }
        if (k == 2) gamma[0] = d[0] / a[0];
        if (k > 2) gamma[0] = (d[0] * a[2] - d[1] * a[1]) / (a[0] * a[2] - a[1] * a[1]);
        if (k > 2) gamma[1] = (d[1] * a[0] - d[0] * a[1]) / (a[0] * a[2] - a[1] * a[1]);
        memcpy(before, start, sizeof start);
        memcpy(start, g, sizeof start);
        anderson_forward(start, before, history, gram, k, 2, 0.6, 1, 6);
        for (int e = 0; e < 6; e++) {
            double want = x[0][e] + 0.6 * f[0][e];
            for (int j = 0; j < 2 && j < k - 1; j++)
                want -= gamma[j] * (x[j][e] - x[j + 1][e] + 0.6 * (f[j][e] - f[j + 1][e]));
            worst = larger(worst, fabs(start[e] - want));
        }
    }
    check(worst < 2e-5, "anderson: window 2 against differences: error %.1e", worst);

    int same = 1, unharmed = 1;
    for (int window = 1; window <= MAX_WINDOW; window++) {
        affine_solve(z, 2, 1, 6, 1, window, 1);
        affine_solve(other, 2, 1, 6, 1, 0, 1);
        same &= !memcmp(z, other, 6 * sizeof *z);
        for (int k = 1; k <= 12; k++) { // the same residual over and over, then none at all
            for (int e = 0; e < 6; e++) before[e] = (real)(e + 1), start[e] = (real)(k < 10 ? 2 * e + 1 : e + 1);
            memcpy(other, start, sizeof start);
            anderson_forward(start, before, history, gram, k, window, 1, 1, 6);
            double changed = relative_error(start, other, 6);
            unharmed &= changed <= (k < 10 ? 1e-6 : 0);
        }
    }
    CHECK("anderson: the first iteration is plain", same);
    CHECK("anderson: equal or no residuals: the newest iterate", unharmed);

    affine_solve(z, 0, 4, AFFINE_MOST, 12, 3, 0.9);
    same = 1;
    for (int b = 0; b < 4; b++) {
        affine_solve(other, b, 1, AFFINE_MOST, 12, 3, 0.9);
        same &= !memcmp(other, z + b * AFFINE_MOST, AFFINE_MOST * sizeof *z);
    }
    CHECK("anderson: a picture alone: same bits", same);
    for (int n = 1; n <= 4; n++) {
        set_threads(n);
        affine_solve(other, 0, 4, AFFINE_MOST, 12, 3, 0.9);
        check(!memcmp(other, z, sizeof z), "anderson: %d threads: same bits", n);
    }
    set_threads(threads);
}

static void test_residual(void) {
    enum { B = 3, COUNT = 50 };
    real z[B * COUNT], before[B * COUNT];
    double want = 0;
    for (int b = 0; b < B; b++) {
        double change = 0, norm = 0;
        for (int i = b * COUNT; i < (b + 1) * COUNT; i++) {
            before[i] = (real)rng_uniform(random_word((uint32_t)i, 8));
            z[i] = b == 1 ? 0 : (real)rng_uniform(random_word((uint32_t)i, 9)); // a picture of zeros
            change += pow((double)z[i] - (double)before[i], 2), norm += pow((double)z[i], 2);
        }
        want += sqrt(change / (b == 1 ? 1 : norm)) / B;
    }
    CHECK("residual: the mean over the pictures", fabs(residual_of(z, before, B, COUNT) / want - 1) < 1e-6);
}

static void test_exp2(void) { // against the C library's in double precision
    double worst = 0, small = 0, large = INFINITY;
    for (uint32_t i = 0; i < 200000; i++) {
        real x = (real)(-300 + 600 * rng_uniform(random_word(i, 7)));
        double want = exp2((double)x), got = exp2_real(x);
        if (x > -126 && x < 127)
            worst = larger(worst, fabs(got - want) / want);
        else if (x < 0)
            small = larger(small, fabs(got));
        else
            large = -larger(-large, -got);
    }
    CHECK("exp2: to one unit in the last place", worst < 1.0 / (1 << 23));
    CHECK("exp2: very small, down to -300: at most 2^-125", small <= exp2(-125));
    CHECK("exp2: very large, up to 300: at least 2^126", large >= exp2(126));
    CHECK("exp2: millions", exp2_real((real)-1e9) <= exp2(-100) && exp2_real((real)-5e6) <= exp2(-125) &&
                                exp2_real((real)1e9) >= exp2(126) && exp2_real((real)5e6) >= exp2(126));
    CHECK("exp2: NaN stays", exp2_real((real)NAN) != exp2_real((real)NAN));
}

static void test_gelu(void) { // against the formula in double precision, also where a cube is larger than any float
    real x[] = {0, 1, -1, 3, -5, 30, -30, 1e5f, -1e5f, 1e13f, -1e13f, 1e30f, -1e30f, NAN}, out[14];
    double worst = 0;
    int count = 14;
    real slope[14];
    for (int i = 0; i < count; i++) slope[i] = 1;
    gelu_backward(0, slope, out, slope, x, (size_t)count);
    for (int i = 0; i < 13; i++) {
        double v = (double)x[i], u = 0.7978845608028654 * (v + 0.044715 * v * v * v), t = tanh(u), rest = 1 - t * t;
        double want = 0.5 * (1 + t) + (rest > 0 ? 0.5 * v * rest * 0.7978845608028654 * (1 + 3 * 0.044715 * v * v) : 0);
        double value = t > -1 ? 0.5 * v * (1 + t) : 0;
        worst = larger(worst, larger(fabs((double)slope[i] - want), fabs((double)out[i] - value) / (1 + fabs(value))));
    }
    CHECK("gelu and its slope, at any size", worst < 1e-6);
    CHECK("gelu: NaN stays", slope[13] != slope[13] && out[13] != out[13]);
    real again[14];
    gelu_forward(0, again, x, (size_t)count);
    worst = 0;
    for (int i = 0; i < 13; i++) worst = larger(worst, fabs((double)(again[i] - out[i])) / (1 + fabs((double)out[i])));
    CHECK("gelu: the forward pass gives the same", worst < 1e-6 && again[13] != again[13]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Training steps against the sum over the whole batch, and AdamW and EMA in double precision

static void test_step(void) {
    enum { B = 5, STEPS = 4 };
    static const double clips[STEPS] = {0.5, 1e9, 0, 0.5}; // 0: none
    static Options o;
    static Schedule schedule;
    options_default(&o, TRAIN);
    o.batch = B, o.steps = STEPS, o.warmup = 2, o.lr = 1e-3, o.lr_schedule = LR_CONSTANT, o.weight_decay = 0.1;
    o.ema = 0.3, o.hflip = 1, o.label_drop = 0.5;
    o.no_grad_iters[0] = 0, o.no_grad_iters[1] = 2, o.grad_iters[0] = 1, o.grad_iters[1] = 3;
    for (int micro = 2; micro <= B; micro += 3) {
        Case k = cases[micro == 2 ? 6 : 1]; // of flow; with variance
        Dataset data;
        k.channels = 3, k.classes = 10; // of shapes
        o.model = case_config(&k);
        o.ema_warmup = micro == 2;
        dataset_open(&data, "shapes", o.model.image_size, o.seed);
        schedule_make(&schedule, &o.model, DIFFUSION_STEPS);
        size_t pixels = config_pixels(&o.model);
        Model *m = make_model(&o.model, micro, 3, 0, 1), *whole = make_model(&o.model, B, 3, 0, 1);
        Batch batch = batch_create(micro, pixels), spare = batch_create(micro, pixels), all = batch_create(B, pixels);
        size_t n = (size_t)m->n_params;
        double *w = (double *)xcalloc(4 * n, sizeof *w, "a test"), *ema = w + n, *first = ema + n, *second = first + n;
        double gradient = 0, said = 0, off = 0, ema_off = 0;
        random_weights(m);
        for (size_t i = 0; i < n; i++) w[i] = ema[i] = m->memory[MODEL_WEIGHTS][i];
        batch_draw(&batch, &data, &o, 0, 0, micro);
        for (int step = 0; step < STEPS; step++) {
            uint32_t word[4];
            double loss = 0, vb = 0, lr = step < 2 ? 5e-4 * (step + 1) : 1e-3;
            double decay = o.ema_warmup ? fmin(0.3, (1.0 + step) / (10 + step)) : 0.3;
            o.grad_clip = clips[step];
            memcpy(whole->memory[MODEL_WEIGHTS], m->memory[MODEL_WEIGHTS], n * sizeof(real));
            philox(word, o.seed, 0, (uint32_t)step, STREAM_NM);
            model_zero_gradients(whole);
            dataset_batch(&data, all.x0, all.y, step, B, 0, B, 1, 0.5);
            rng_normal(all.noise, B * pixels, 0, o.seed, (uint32_t)step, STREAM_NOISE);
            for (uint32_t i = 0; i < B; i++) {
                uint32_t random[4];
                philox(random, o.seed, i, (uint32_t)step, STREAM_T);
                all.t[i] = draw_timestep(random, &o);
            }
            model_loss(whole, &schedule, all.x0, all.noise, all.t, all.y, B, (int)rng_below(word[0], 3),
                       1 + (int)rng_below(word[1], 3), 1.0 / B, all.mse, all.vb);
            for (int i = 0; i < B; i++) loss += all.mse[i] / B, vb += all.vb[i] / B;
            Step did = train_step(m, &schedule, &data, &batch, &spare, &o, step, micro);
            double norm = model_gradient_norm(whole);
            double clip = clips[step] > 0 && norm > clips[step] ? clips[step] / (norm + 1e-6) : 1;
            gradient = larger(gradient, relative_error(m->memory[MODEL_GRADS], whole->memory[MODEL_GRADS], (int64_t)n));
            said = larger(said, larger(fabs(did.mse / loss - 1), fabs(did.norm / norm - 1)));
            said = larger(said, vb > 0 ? fabs(did.vb / vb - 1) : fabs(did.vb));
            for (size_t i = 0; i < n; i++) {
                double g = clip * m->memory[MODEL_GRADS][i];
                first[i] = 0.9 * first[i] + 0.1 * g, second[i] = 0.999 * second[i] + 0.001 * g * g;
                w[i] = w[i] * (1 - lr * 0.1) - lr * (first[i] / (1 - pow(0.9, step + 1))) /
                                                   (sqrt(second[i] / (1 - pow(0.999, step + 1))) + 1e-8);
                ema[i] += (1 - decay) * (w[i] - ema[i]);
                off = larger(off, fabs((double)m->memory[MODEL_WEIGHTS][i] - w[i]));
                ema_off = larger(ema_off, fabs((double)m->memory[MODEL_EMA][i] - ema[i]));
            }
        }
        check(gradient < 2e-6 && said < 2e-6, "step: %d at a time: gradient, norm and loss of the batch", micro);
        check(off < 2e-6 && ema_off < 2e-6, "step: %d at a time: clip, AdamW, decay, EMA with warm-up", micro);
        if (!(gradient < 2e-6 && said < 2e-6 && off < 2e-6 && ema_off < 2e-6))
            printf("    gradient %.1e, loss and norm %.1e, weights %.1e, EMA %.1e\n", gradient, said, off, ema_off);
        model_free(m);
        model_free(whole);
        xfree(w);
    }
}

// With gates of zero a DiT is its patch, conditioning and final layers, which are fp32 whatever --dtype says: nothing
// outside of its blocks depends on it.
static void test_fp32_ends(void) {
    const Case *k = &cases[10];
    Config c = case_config(k);
    TestBatch *b = batch_make(&c, k->B);
    Model *m[2];
    int same = 1;
    for (int half = 0; half < 2; half++) {
        m[half] = model_create(&c, k->B, 1, 0, 1, 0, half ? COMPUTE_BF16 : COMPUTE_FP32);
        random_weights(m[half]);
        for (int i = 0; i < m[half]->n_tensors; i++) {
            ParamTensor *p = &m[half]->tensors[i];
            if (!strncmp(p->name, "blocks.", 7) && strstr(p->name, "adaLN"))
                memset(m[half]->memory[MODEL_WEIGHTS] + p->offset, 0, (size_t)p->count * sizeof(real));
        }
        model_use(m[half], MODEL_WEIGHTS);
        model_zero_gradients(m[half]);
        case_loss(m[half], b, k, 0, k->B, 1.0 / k->B);
    }
    size_t outputs = (size_t)k->B * config_pixels(&c) / (size_t)c.channels * (size_t)config_out_channels(&c);
    same &= !memcmp(m[0]->a.out, m[1]->a.out, outputs * sizeof(real));
    for (int i = 0; i < m[0]->n_tensors; i++) {
        ParamTensor *p = &m[0]->tensors[i];
        if (strncmp(p->name, "blocks.", 7))
            same &= !memcmp(m[0]->memory[MODEL_GRADS] + p->offset, m[1]->memory[MODEL_GRADS] + p->offset,
                            (size_t)p->count * sizeof(real));
    }
    CHECK("bf16: patch, conditioning and final layers are fp32 to the bit", same);
    model_free(m[0]);
    model_free(m[1]);
    batch_free(b);
}

// ---------------------------------------------------------------------------------------------------------------------
// Matmul against the sum that it stands for; in bf16, of operands rounded to nearest even

static double rounded(real x, int half) {
    int exponent;
    double fraction = frexp(x, &exponent);
    return half ? ldexp(rint(fraction * 256), exponent - 8) : x;
}

static void test_gemm(int half, int rounds, int largest) {
    enum { NOTHING, BIAS, ITSELF, MATRIX }; // what is added
    static const struct {
        int M, N, K, a_transposed, b_transposed, adds, crowd_a, crowd_b;
    } shapes[] = {
        // of real models, as small as shows; K is doubled in bf16
        {160, 310, 1000, 0, 1, BIAS, 0, 0},   // x.w^T in place: blocks of k and of B
        {70, 600, 1800, 0, 0, NOTHING, 0, 0}, // dy.w
        {70, 480, 2600, 0, 0, MATRIX, 1, 0},  // copied rows, more than MC of them, two blocks
        {20, 1300, 1150, 1, 0, ITSELF, 0, 0}, // dy^T.x
        {75, 100, 64, 0, 1, BIAS, 0, 0},      // of a K that suits Intel's tiles: edges in M and N; packed, too
        {130, 45, 912, 1, 0, MATRIX, 0, 0},   // blocks of k
        {68, 64, 1024, 0, 0, ITSELF, 1, 0},   // copied rows
        {20, 300, 1800, 0, 1, MATRIX, 0, 0},  // turned, blocks of k
        {20, 300, 1024, 0, 1, BIAS, 0, 1},    // turned, copied rows
        {9, 300, 2050, 0, 1, ITSELF, 0, 1},
    };
    int n_shapes = (int)(sizeof shapes / sizeof *shapes), bad = 0, outside = 0;
    double worst = 0;
    for (int round = 0; round < rounds + 2 * n_shapes; round++) {
        int shape = round < rounds ? -1 : (round - rounds) / 2, crowd_a = round % 8 == 3, crowd_b = 0;
        uint32_t r[16];
        for (uint32_t i = 0; i < 16; i++) r[i] = random_word(i, (uint32_t)(1000 + round));
        int big = round % 8 == 7, M = 1 + (int)rng_below(r[0], big ? (uint32_t)largest : 40);
        int N = 1 + (int)rng_below(r[1], big ? (uint32_t)largest : 70),
            K = 1 + (int)rng_below(r[2], big ? (uint32_t)largest : 50);
        if (round % 16 == 15) M = 1 + M / 32; // few rows
        int a_transposed = r[3] & 1, b_transposed = r[4] & 1, adds = r[5] & 3;
        if (round == 11) // copied rows, and a block of B that is full, with its last panel beyond
            M = 20, N = PACKED_BLOCK / KC, K = 4 * KC * (half ? 2 : 1), a_transposed = 0;
        if (round == 19) M = 200, K = 1001, a_transposed = 0; // packed, as pairs, but for the last k
        if (shape >= 0) {
            M = shapes[shape].M, N = shapes[shape].N, K = shapes[shape].K * (half ? 2 : 1), adds = shapes[shape].adds;
            a_transposed = shapes[shape].a_transposed, b_transposed = shapes[shape].b_transposed;
            crowd_a = shapes[shape].crowd_a, crowd_b = shapes[shape].crowd_b;
        }
        int even = half && shape >= 0 ? ~1 : ~0; // without it, rows of bf16 do not stand in place
        size_t lda = (size_t)(a_transposed ? M : K) + (size_t)((int)rng_below(r[7], 5) & even),
               ldb = (size_t)(b_transposed ? K : N) + (size_t)((int)rng_below(r[8], 5) & even);
        size_t crowd = 2048 / (half ? sizeof(bf16) : sizeof(real)); // rows so far apart are copied
        if (crowd_a) lda = (lda + crowd - 1) / crowd * crowd;
        if (crowd_b) ldb = (ldb + crowd - 1) / crowd * crowd;
        size_t ldc = (size_t)N + rng_below(r[9], 5), a_count = lda * (size_t)(a_transposed ? K : M),
               b_count = ldb * (size_t)(b_transposed ? N : K), c_count = ldc * (size_t)M,
               all = a_count + b_count + 2 * c_count;
        float *values = (float *)xcalloc(all, sizeof *values, "a test");
        real *A = (real *)xcalloc(all, sizeof *A, "a test"), *B = A + a_count, *C = B + b_count, *old = C + c_count;
        const real *from = adds == NOTHING ? NULL : adds == ITSELF ? C : old;
        size_t ars = a_transposed ? 1 : lda, acs = a_transposed ? lda : 1, brs = b_transposed ? 1 : ldb,
               bcs = b_transposed ? ldb : 1, ldf = adds == BIAS ? 0 : ldc;
        rng_normal(values, all, 0, 1, (uint32_t)round, 99);
        for (size_t i = 0; i < all; i++) A[i] = (real)values[i];
        memcpy(old, C, c_count * sizeof *C);
        set_threads(1 + round % 3);
        bf16 *halves = (bf16 *)xcalloc(a_count + b_count, sizeof *halves, "a test");
        const Act *left = as_act(half, halves, A, a_count + b_count), *right = act_at(half, left, a_count);
        gemm(half, C, ldc, left, ars, acs, right, brs, bcs, from, ldf, M, N, K);
        xfree(halves);
        // in double, of A and B in order, a row at a time
        double *a = (double *)xcalloc(((size_t)M + (size_t)N) * (size_t)K + 2 * (size_t)N, sizeof *a, "a test");
        double *b = a + (size_t)M * (size_t)K, *want = b + (size_t)K * (size_t)N, *size = want + N;
        for (size_t i = 0; i < (size_t)M; i++)
            for (size_t l = 0; l < (size_t)K; l++) a[i * (size_t)K + l] = rounded(A[i * ars + l * acs], half);
        for (size_t l = 0; l < (size_t)K; l++)
            for (size_t j = 0; j < (size_t)N; j++) b[l * (size_t)N + j] = rounded(B[l * brs + j * bcs], half);
        for (size_t i = 0; i < (size_t)M; i++) {
            for (int j = 0; j < N; j++) {
                want[j] = adds == NOTHING ? 0 : old[i * ldf + (size_t)j];
                size[j] = 1 + fabs(want[j]);
            }
            for (size_t l = 0; l < (size_t)K; l++)
                for (int j = 0; j < N; j++) {
                    double product = a[i * (size_t)K + l] * b[l * (size_t)N + (size_t)j];
                    want[j] += product;
                    size[j] += fabs(product);
                }
            for (size_t j = 0; j < ldc; j++) {
                real got = C[i * ldc + j];
                if (j >= (size_t)N) {
                    outside += got != old[i * ldc + j];
                    continue;
                }
                double error = fabs(got - want[j]) / size[j];
                if (isnan(error) || error > worst) worst = error;
                bad += !(error <= (sizeof(real) == 4 ? 1e-6 : 1e-14));
            }
        }
        xfree(a);
        xfree(values);
        xfree(A);
    }
    printf("    worst error %.1e of the sum of sizes\n", worst);
    check(!bad, "gemm%s: equals the sum of products", half ? " in bf16" : "");
    check(!outside, "gemm%s: writes nothing beside its result", half ? " in bf16" : "");
}

// A bf16 with an exponent from `least` to `most`
static bf16x2 random_bf16(uint32_t index, uint32_t least, uint32_t most) {
    uint32_t word = random_word(index, 5);
    return (word & 0x807f) | (least + rng_below(word * 2654435761u, most - least + 1)) << 7;
}

// The product of pairs, as built here and in plain C, against the C library's fused multiply-adds
static void test_pairs(void) {
    int differs = 0, wrong = 0, far = 0;
    for (uint32_t i = 0; i < 200000; i++) {
        int tiny = i % 2; // where products and sums are denormal
        uint32_t least = tiny ? 0 : 90, most = tiny ? 70 : 160;
        bf16x2 a = random_bf16(5 * i, least, most) | random_bf16(5 * i + 1, least, most) << 16;
        bf16x2 b = random_bf16(5 * i + 2, least, most) | random_bf16(5 * i + 3, least, most) << 16;
        float sum = bf16_to_float((uint16_t)random_bf16(5 * i + 4, tiny ? 0 : 110, tiny ? 10 : 150));
        vec_float start = (vec_float){0} + sum;
        vec_bf16x2 all = (vec_bf16x2){0} + b;
        vec_float got = pair_multiply(start, a, all), plain = pair_multiply_plain(start, a, all);
        float want = fmaf(bf16_to_float((uint16_t)(a >> 16)), bf16_to_float((uint16_t)(b >> 16)), sum);
        want = fmaf(bf16_to_float((uint16_t)a), bf16_to_float((uint16_t)b), want);
        if (tiny) {
            far += !(fabsf(got[0] - want) <= 4 * FLT_MIN) || !(fabsf(plain[0] - want) <= 4 * FLT_MIN);
            continue;
        }
        for (size_t lane = 0; lane < VEC_BYTES / sizeof(float); lane++) {
            differs += got[lane] != plain[lane];
            wrong += plain[lane] != want;
        }
    }
    CHECK("bf16 pairs: plain C and what stands for it here: same bits", !differs);
    CHECK("bf16 pairs: equal two fused multiply-adds", !wrong);
    CHECK("bf16 pairs: where there are denormals, within four of the smallest normal number", !far);
}

// ---------------------------------------------------------------------------------------------------------------------
// Random numbers

static void test_f16(void) {
    static const uint16_t half[] = {0x3c00, 0xc000, 0x0001, 0x7bff, 0x03ff, 0x3555};
    static const float want[] = {1, -2, 0x1p-24f, 65504, 0x3ffp-24f, 0x1.554p-2f};
    int right = 1;
    for (int i = 0; i < 6; i++) right &= f16_to_float(half[i]) == want[i];
    CHECK("F16", right && isinf(f16_to_float(0x7c00)) && isnan(f16_to_float(0x7e00)));
}

// --model against the tables of the DiT and FPDM papers; and of XL/2 on latents of 1000 classes (DiT's paper, table 4)
static void test_sizes(void) {
    static const struct {
        const char *name;
        int depth, width, heads, patch;
    } sizes[] = {{"S/8", 12, 384, 6, 8}, {"B/4", 12, 768, 12, 4}, {"L/2", 24, 1024, 16, 2}, {"XL/2", 28, 1152, 16, 2}};
    static Options o;
    int right = 1;
    for (int i = 0; i < 4; i++) {
        options_default(&o, TRAIN);
        o.model_name = sizes[i].name;
        options_model(&o);
        const Config *c = &o.model;
        right &= c->depth == sizes[i].depth && c->width == sizes[i].width && c->heads == sizes[i].heads;
        right &= c->patch == sizes[i].patch && o.no_grad_iters[0] == 0 && o.no_grad_iters[1] == 10;
        right &= o.grad_iters[0] == 1 && o.grad_iters[1] == 12 && o.lr == 1e-4 && o.ema == 0.9999;
    }
    CHECK("--model: the papers' sizes, n, m, rate", right);
    o.model.image_size = 32, o.model.channels = 4, o.model.classes = 1000, o.model.learn_sigma = 1;
    Params p;
    double fixed = (double)params_point(&p, &o.model, NULL, NULL).size;
    o.model.fixed_point = 0;
    double dit = (double)params_point(&p, &o.model, NULL, NULL).size,
           multiply_adds = model_flops(&o.model, 1, 0, 1) / 6;
    check(fabs(fixed / 85e6 - 1) < 0.02 && fabs(dit / 675e6 - 1) < 1e-3,
          "XL/2: 85 and 675 million parameters, here %.1f and %.1f", fixed / 1e6, dit / 1e6);
    check(fabs(multiply_adds / 118.6e9 - 1) < 1e-3, "DiT-XL/2: 118.6 G multiply-adds, here %.2f", multiply_adds / 1e9);
}

static void test_random(void) {
    static const uint32_t known[3][10] = {
        // Random123's kat_vectors: counter, key, result
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420,
         0x24126ea1},
    };
    for (int i = 0; i < 3; i++) {
        uint32_t counter[4];
        memcpy(counter, known[i], sizeof counter);
        philox4x32(counter, known[i][4], known[i][5]);
        CHECK("philox: known answer", !memcmp(counter, known[i] + 6, sizeof counter));
    }
    uint32_t a[4], b[4] = {17, 4, STREAM_T, 0};
    philox(a, 0x123456789abcdef0, 17, 4, STREAM_T);
    philox4x32(b, 0x9abcdef0, 0x12345678);
    CHECK("philox: counter and key", !memcmp(a, b, sizeof a));
    CHECK("uniform numbers lie inside (0, 1)", rng_uniform(0) > 0 && rng_uniform(~0u) < 1);
    CHECK("whole numbers reach both ends", rng_below(0, 7) == 0 && rng_below(~0u, 7) == 6 && rng_below(~0u, 1) == 0);

    enum { COUNT = 1 << 20 };
    float *x = (float *)xcalloc(COUNT, sizeof *x, "a test"), part[50];
    double moment[5] = {0}, product = 0;
    rng_normal(x, COUNT, 0, 1, 2, 99);
    for (int i = 0; i < COUNT; i++) {
        for (int k = 1; k <= 4; k++) moment[k] += pow(x[i], k) / COUNT;
        if (i) product += (double)x[i] * x[i - 1] / COUNT;
    }
    printf("    moments %.4f %.4f %.4f %.4f, neighbours %.4f\n", moment[1], moment[2], moment[3], moment[4], product);
    CHECK("normal numbers: moments 0, 1, 0, 3", fabs(moment[1]) < 0.005 && fabs(moment[2] - 1) < 0.007 &&
                                                    fabs(moment[3]) < 0.015 && fabs(moment[4] - 3) < 0.05);
    CHECK("normal numbers: neighbours are independent", fabs(product) < 0.005);
    int same = 1;
    for (size_t first = 0; first < 9; first++)
        for (size_t count = 0; count < 12; count++) {
            memset(part, 0, sizeof part);
            rng_normal(part, count, first, 1, 2, 99);
            same &= !memcmp(part, x + first, count * sizeof *part) && part[count] == 0;
        }
    CHECK("normal numbers: a part is a part of the whole", same);
    set_threads(3);
    float *again = (float *)xcalloc(COUNT, sizeof *again, "a test");
    rng_normal(again, COUNT, 0, 1, 2, 99);
    CHECK("normal numbers: threads", !memcmp(x, again, COUNT * sizeof *x));
    rng_normal(again, COUNT, 0, 2, 2, 99);
    CHECK("normal numbers: another seed", memcmp(x, again, COUNT * sizeof *x));
    xfree(x);
    xfree(again);
}

// ---------------------------------------------------------------------------------------------------------------------
// Noise schedule

static void test_schedule(void) {
    Config c = case_config(&cases[0]);
    Schedule *s = (Schedule *)xcalloc(1, sizeof *s, "a test");
    long double product = 1, full[DIFFUSION_STEPS];
    for (int t = 0; t < DIFFUSION_STEPS; t++) full[t] = product *= 1 - (1e-4L + (0.02L - 1e-4L) * t / 999);
    int positions = 1, tables = 1;
    for (int S = 2; S <= DIFFUSION_STEPS; S += S < 60 || S > 990 ? 1 : 37) {
        schedule_make(s, &c, S);
        positions &= s->n == S && s->t[0] == 0 && s->t[S - 1] == 999;
        for (int i = 0; i < S; i++) {
            int quotient = i * 999 / (S - 1), rest = 2 * (i * 999 % (S - 1)); // half to even in whole numbers
            positions &= s->t[i] == quotient + (rest > S - 1 || (rest == S - 1 && quotient % 2));
            long double ab = full[s->t[i]], prev = i ? full[s->t[i - 1]] : 1, beta = 1 - ab / prev;
            tables &= fabsl(s->alpha_bar[i] - ab) < 1e-12L && fabsl(s->alpha_bar_prev[i] - prev) < 1e-12L;
            tables &= fabsl(s->log_beta[i] - logl(beta)) < 1e-9L;
            // the posterior's mean and variance, from the product of two Gaussians
            long double alpha = 1 - beta, precision = alpha / beta + 1 / (1 - prev);
            if (i) tables &= fabsl(s->log_var[i] + logl(precision)) < 1e-8L;
            if (i) tables &= fabsl(s->c1[i] - sqrtl(prev) / (1 - prev) / precision) < 1e-9L;
            if (i) tables &= fabsl(s->c2[i] - sqrtl(alpha) / beta / precision) < 1e-9L;
        }
        tables &= fabs(s->c1[0] - 1) < 1e-9 && s->c2[0] == 0 && s->log_var[0] == s->log_var[1];
    }
    CHECK("schedule: positions are rounded half to even", positions);
    CHECK("schedule: tables", tables);
    c.zero_terminal_snr = 1;
    c.prediction = PREDICT_V;
    schedule_make(s, &c, DIFFUSION_STEPS);
    int falls = fabs(s->alpha_bar[0] - (double)full[0]) < 1e-12 && s->alpha_bar[999] == 0;
    for (int i = 1; i < DIFFUSION_STEPS; i++)
        falls &= s->alpha_bar[i] < s->alpha_bar[i - 1] && !isnan(s->log_var[i]) && !isnan(s->log_beta[i]);
    CHECK("schedule: zero terminal SNR", falls);
    for (double shift = 0.25; shift < 9;
         shift *= 2) { // the ratio of noise to picture is `shift` times that of even steps
        double sum = 0;
        int ratio = 1, matches = 1;
        schedule_make(s, &c, 7);
        schedule_shift(s, shift);
        for (int i = 0; i < 7; i++) {
            double tau = s->tau[i], expected = shift * (i + 1) / (6 - i);
            ratio &= i == 6 ? tau == 1 : fabs(tau / (1 - tau) / expected - 1) < 1e-9;
            sum += s->dt[i];
            matches &= fabs(sum - tau) < 1e-12 && (s->t[i] == 999 || fabs(s->t[i] - 1000 * tau) <= 0.5);
        }
        check(ratio && matches && s->t[6] == 999, "schedule: shifted by %g", shift);
    }
    xfree(s);
}

// ---------------------------------------------------------------------------------------------------------------------
// The budget

static void test_allocation(void) {
    int iters[DIFFUSION_STEPS], exact = 1, within = 1, grows = 1;
    for (int S = 1; S <= DIFFUSION_STEPS; S += S < 40 ? 1 : 97)
        for (int extra = 0; extra < 3000; extra += extra < 50 ? 1 : 491)
            for (int alloc = ALLOC_CONST; alloc <= ALLOC_DEC; alloc++) {
                int64_t total = S + extra, sum = 0, before = 0, spread = 2 * (int64_t)S * (S > 1 ? S - 1 : 1);
                allocate_iterations(iters, S, (int)total, alloc);
                for (int64_t i = 0; i < S; i++) {
                    sum += iters[i];
                    within &= iters[i] >= 1;
                    // shares up to step i: i+1 + extra·(sum of ratios)/S, ratio_j = (3(S-1) - 2j)/(2(S-1)) or mirrored
                    int64_t ratios = 2 * (S - 1) * (i + 1), share;
                    if (alloc == ALLOC_INC) ratios = 3 * (S - 1) * (i + 1) - i * (i + 1);
                    if (alloc == ALLOC_DEC) ratios = (S - 1) * (i + 1) + i * (i + 1);
                    share = i + 1 + (S > 1 ? extra * ratios / spread : extra);
                    if (S < 400) exact &= iters[i] == share - before; // beyond, 1/spread is as small as the tolerance
                    before = share;
                    if (i && alloc == ALLOC_INC) grows &= iters[i] <= iters[i - 1] + 1;
                    if (i && alloc == ALLOC_DEC) grows &= iters[i] >= iters[i - 1] - 1;
                }
                within &= sum == total;
            }
    CHECK("allocation: the sum is the total, each at least 1", within);
    CHECK("allocation: the formula, in whole numbers", exact);
    CHECK("allocation: inc gives more to large t, dec less", grows);
    allocate_iterations(iters, 3, 3 + 12, ALLOC_INC);
    CHECK("allocation: an example, inc", iters[0] == 7 && iters[1] == 5 && iters[2] == 3);
    allocate_iterations(iters, 3, 3 + 12, ALLOC_DEC);
    CHECK("allocation: an example, dec", iters[0] == 3 && iters[1] == 5 && iters[2] == 7);
}

// What plan_iterations makes of --steps --budget --iters --alloc for sizes like S/2; `text`: "steps budget alloc iters"
static int plan(int iters[DIFFUSION_STEPS], const char *text, int fixed_point) {
    Options o;
    char list[1000] = "";
    options_default(&o, SAMPLE);
    if (sscanf(text, "%d %d %d %999s", &o.sample_steps, &o.budget, &o.alloc, list) < 3) abort();
    o.iters = list;
    o.model.fixed_point = fixed_point;
    o.model.depth = 28; // XL
    plan_iterations(iters, &o, &o.model);
    int sum = 0;
    for (int i = 0; i < o.sample_steps; i++) sum += iters[i];
    return sum;
}

static void plan_fixed_point(const char *text) {
    int iters[DIFFUSION_STEPS];
    plan(iters, text, 1);
}

static void plan_dit(const char *text) {
    int iters[DIFFUSION_STEPS];
    plan(iters, text, 0);
}

static void test_plan(void) {
    int iters[DIFFUSION_STEPS], within = 1;
    char text[64];
    CHECK("budget: 560 passes are 20 steps of 26 iterations, pre and post",
          plan(iters, "20 560 0", 1) == 520 && iters[0] == 26 && iters[19] == 26);
    CHECK("budget: smoothing to 80 steps of 5", plan(iters, "80 560 0", 1) == 400 && iters[0] == 5 && iters[79] == 5);
    CHECK("budget: none: depth - pre - post", plan(iters, "20 0 0", 1) == 520 && iters[7] == 26);
    for (int S = 2; S < 50; S += 3)
        for (int budget = 3 * S; budget < 1000; budget += 7)
            for (int alloc = 0; alloc < 3; alloc++) {
                snprintf(text, sizeof text, "%d %d %d", S, budget, alloc);
                within &= plan(iters, text, 1) + 2 * S == budget;
                for (int i = 0; i < S; i++) within &= iters[i] >= 1;
            }
    CHECK("budget: spent to the last pass, never exceeded", within);
    CHECK("iters: one number", plan(iters, "4 0 0 5", 1) == 20 && iters[3] == 5);
    CHECK("iters: one number, allocated", plan(iters, "3 0 1 5", 1) == 15 && iters[0] == 7 && iters[2] == 3);
    CHECK("iters: a list", plan(iters, "3 0 0 5,1,9", 1) == 15 && iters[0] == 5 && iters[1] == 1 && iters[2] == 9);
    CHECK("budget: DiT", plan(iters, "20 560 0", 0) == 0);
    CHECK("budget: too small", test_refuses(plan_fixed_point, "20 59 0", "--budget: 59 passes are too few"));
    CHECK("budget: too small for DiT", test_refuses(plan_dit, "20 559 0", "--budget"));
    CHECK("budget: and iters", test_refuses(plan_fixed_point, "2 60 0 5", "--budget: give either"));
    CHECK("budget: over 1000 iterations", test_refuses(plan_fixed_point, "2 5000 0", "--budget: more than 1000"));
    CHECK("iters: too many", test_refuses(plan_fixed_point, "2 0 0 1,2,3", "--iters: 3 numbers for 2 timesteps"));
    CHECK("iters: too few", test_refuses(plan_fixed_point, "3 0 0 1,2", "--iters: 2 numbers for 3 timesteps"));
    CHECK("iters: zero", test_refuses(plan_fixed_point, "2 0 0 0", "--iters: '0'"));
    CHECK("iters: empty item", test_refuses(plan_fixed_point, "2 0 0 1,", "--iters: ''"));
    CHECK("iters: no number", test_refuses(plan_fixed_point, "2 0 0 1,x", "--iters: 'x'"));
    CHECK("iters: over 1000", test_refuses(plan_fixed_point, "2 0 0 1001", "--iters: '1001'"));
    CHECK("iters: a list and alloc", test_refuses(plan_fixed_point, "2 0 1 1,2", "--alloc"));
}

// ---------------------------------------------------------------------------------------------------------------------
// Options and labels

static void labels_of_two(const char *list) {
    static const char *const names[] = {"cat", "dog"};
    int y[8];
    parse_labels(y, 8, list, 2, names);
}

// Timesteps drawn from a logit-normal distribution, and the learning rate of a step
static void test_timesteps_and_rates(void) {
    enum { DRAWS = 100000 };
    static Options o;
    double worst = 0, below[9] = {0};
    options_default(&o, TRAIN);
    o.t_sampling = T_LOGIT_NORMAL;
    o.t_mean = 0.4;
    o.t_std = 1.3;
    for (uint32_t i = 0; i < DRAWS; i++) {
        uint32_t word[4];
        philox(word, 3, i, 0, STREAM_T);
        int t = draw_timestep(word, &o);
        for (int k = 0; k < 9; k++) below[k] += t < 100 * (k + 1);
    }
    for (int k = 0; k < 9; k++) { // P(t < 1000 p) = Phi((logit p - mean)/std)
        double p = 0.1 * (k + 1), normal = 0.5 * erfc((0.4 - log(p / (1 - p))) / 1.3 / sqrt(2));
        worst = larger(worst, fabs(below[k] / DRAWS - normal));
    }
    check(worst < 0.006, "timesteps: logit-normal: distribution function, error %.4f", worst);
    uint32_t low[4] = {0, 0, 0, 0}, high[4] = {0, 0x80000000u, 0, 0};
    o.t_std = 20;
    CHECK("timesteps: logit-normal: both ends", draw_timestep(low, &o) == 999 && draw_timestep(high, &o) == 0);
    o.t_std = 0;
    o.t_mean = 1;
    CHECK("timesteps: logit-normal: no deviation", draw_timestep(low, &o) == 731);
    o.t_mean = 0.4; // 598.7: down
    CHECK("timesteps: logit-normal: whole numbers", draw_timestep(low, &o) == 598);
    o.t_sampling = T_UNIFORM;
    uint32_t third[4] = {0x55555556, 0, 0, 0}, last[4] = {~0u, 0, 0, 0};
    CHECK("timesteps: uniform",
          draw_timestep(low, &o) == 0 && draw_timestep(third, &o) == 333 && draw_timestep(last, &o) == 999);

    o.lr = 2, o.warmup = 10, o.steps = 110;
    int rises = 1, same = 1, line = 1, wave = 1;
    for (int schedule = LR_CONSTANT; schedule <= LR_COSINE; schedule++) {
        o.lr_schedule = schedule;
        for (int step = 0; step < 10; step++) rises &= fabs(learning_rate(&o, step) - 0.2 * (step + 1)) < 1e-12;
        for (int step = 10; step < 110; step++) {
            double lr = learning_rate(&o, step), done = (step - 10) / 100.0;
            if (schedule == LR_CONSTANT) same &= lr == 2;
            if (schedule == LR_LINEAR) line &= fabs(lr - 2 * (1 - done)) < 1e-12;
            if (schedule == LR_COSINE) wave &= fabs(lr - 2 * pow(cos(done * 1.5707963267948966), 2)) < 1e-12;
        }
    }
    check(rises && same && line && wave, "learning rate: warm-up, constant, linear, cosine");
    o.warmup = 200; // longer than the run
    CHECK("learning rate: a warm-up that never ends", learning_rate(&o, 109) == 2 * 110 / 200.0);
}

static void test_options(void) {
    static Options a, b; // static: no padding in doubt
    int same = 1;
    options_default(&a, TRAIN | SAMPLE | BENCH);
    a.lr = 0.1 + 0.2;
    a.seed = ~0ull;
    a.grad_iters[1] = 17;
    a.model.prediction = PREDICT_V;
    a.labels = "x=y, \"z\"";
    options_default(&b, TRAIN | SAMPLE | BENCH);
    for (int i = 0; i < N_OPTIONS; i++) {
        char text[4096];
        if (!option_table[i].use) continue; // a title of --help
        option_text(text, sizeof text, &a, &option_table[i]);
        option_set(&b, &option_table[i], strdup(text), "");
        char again[4096];
        option_text(again, sizeof again, &b, &option_table[i]);
        same &= !strcmp(text, again);
        for (int j = 0; j < i; j++)
            same &= strcmp(option_table[i].name, option_table[j].name) || !(option_table[i].use & option_table[j].use);
    }
    CHECK("options: text and back",
          same && a.lr == b.lr && a.seed == b.seed && b.grad_iters[1] == 17 && b.model.prediction == PREDICT_V);
    CHECK("options: distance", edit_distance("", "abc", 6) == 3 && edit_distance("steps", "stesp", 6) == 2 &&
                                   !edit_distance("lr", "lr", 6) && edit_distance("kitten", "sitting", 6) == 3);
    static const char *const names[] = {"cat", "dog"};
    int y[5];
    parse_labels(y, 5, "", 3, NULL);
    CHECK("labels: none: each class in turn", y[0] == 0 && y[1] == 1 && y[2] == 2 && y[3] == 0);
    parse_labels(y, 5, "", 0, NULL);
    CHECK("labels: unlabelled", y[0] == 0 && y[4] == 0);
    parse_labels(y, 5, "dog,0,2", 2, names);
    CHECK("labels: names and numbers", y[0] == 1 && y[1] == 0 && y[2] == 2 && y[3] == 1);
    CHECK("labels: out of range", test_refuses(labels_of_two, "1,3", "--labels: '3'"));
    CHECK("labels: negative", test_refuses(labels_of_two, "-1", "--labels: '-1'"));
    CHECK("labels: unknown name", test_refuses(labels_of_two, "cow", "--labels: 'cow'"));
    CHECK("labels: empty item", test_refuses(labels_of_two, "cat,", "--labels: ''"));
}

// ---------------------------------------------------------------------------------------------------------------------
// Files of weights and datasets

static void weights_open(const char *path) { // as sample_main does
    Options o;
    SafeTensors f;
    options_default(&o, SAMPLE);
    st_open(&f, path);
    options_from_meta(&o, &f, WEIGHTS);
    Model *m = make_model(&o.model, 1, 0, 0, 0);
    model_load(m, MODEL_WEIGHTS, &f, "");
}

// Saves a model after changing one thing of its file: a metadata value (NULL: leaves it out), or a tensor.
static const char *weights_save(Model *m, const char *key, const char *value, void (*change)(Tensor *t, int *count)) {
    Options o;
    Meta meta[N_OPTIONS];
    Tensor *tensors = (Tensor *)xcalloc((size_t)m->n_tensors, sizeof *tensors, "a test");
    float *values = (float *)xcalloc((size_t)m->n_params, sizeof *values, "a test");
    int count = m->n_tensors;
    const char *path = test_path("weights.safetensors");
    options_default(&o, TRAIN);
    o.model = m->config;
    model_download(m, MODEL_WEIGHTS, 0, m->n_params, values);
    for (int i = 0; i < count; i++) {
        const ParamTensor *p = &m->tensors[i];
        tensors[i] =
            st_tensor(p->name, F32, values + p->offset, p->ndim, p->shape[0], p->shape[1], p->shape[2], p->shape[3]);
    }
    int n_meta = options_to_meta(meta, &o, WEIGHTS), kept = 0;
    for (int i = 0; i < n_meta; i++) {
        if (key && !strcmp(meta[i].key, key) && !value) continue;
        if (key && !strcmp(meta[i].key, key)) meta[i].value = value;
        meta[kept++] = meta[i];
    }
    if (change) change(tensors, &count);
    st_save(path, tensors, count, meta, kept);
    xfree(tensors);
    xfree(values);
    return path;
}

static float changed[4096];
static void set_element(Tensor *t, float value) {
    memcpy(changed, t->data, t->bytes);
    changed[t->count - 1] = value;
    t->data = changed;
}
static void put_nan(Tensor *t, int *count) { set_element(&t[*count - 1], NAN); }
static void put_infinity(Tensor *t, int *count) { set_element(&t[*count - 1], -INFINITY); }
static void leave_one_out(Tensor *t, int *count) { memmove(t + 1, t + 2, (size_t)(--*count - 1) * sizeof *t); }
static void make_whole(Tensor *t, int *count) {
    Tensor *last = &t[*count - 1];
    last->dtype = I64, last->bytes *= 2, last->data = changed;
}
static void turn(Tensor *t, int *count) { // (a,b) becomes (b,a)
    for (int i = 0; i < *count; i++)
        if (!strcmp(t[i].name, "final_layer.linear.weight")) {
            int64_t rows = t[i].shape[0];
            t[i].shape[0] = t[i].shape[1];
            t[i].shape[1] = rows;
        }
}
static void test_weights(void) {
    static const struct {
        const char *name, *key, *value, *reason;
        void (*change)(Tensor *t, int *count);
    } broken[] = {
        {"a value is missing", "width", NULL, "metadata 'width' is missing", NULL},
        {"a negative width", "width", "-8", "metadata width: '-8'", NULL},
        {"a huge width", "width", "1e300", "metadata width: '1e300'", NULL},
        {"no number", "heads", "many", "metadata heads: 'many'", NULL},
        {"an unknown prediction", "prediction", "x0", "metadata prediction: 'x0' is not one of eps|v|flow|x", NULL},
        {"too many blocks", "pre_depth", "33", "metadata pre_depth: '33'", NULL},
        {"heads do not divide the width", "heads", "3", "metadata: width 16 is not a multiple of heads 3", NULL},
        {"too many tokens", "image_size", "4096", "tokens per picture", NULL},
        {"another width", "width", "32",
         "tensor x_embedder.proj.weight has the shape (16,3,2,2), but the metadata asks for (32,3,2,2)", NULL},
        {"more blocks", "post_depth", "2", "tensor blocks_post.1.attn.qkv.weight is missing", NULL},
        {"other classes", "classes", "1000", "y_embedder.embedding_table.weight has the shape (4,16)", NULL},
        {"plain DiT", "fixed_point", "0", "tensor blocks.0.attn.qkv.weight is missing", NULL},
        {"NaN", NULL, NULL, "tensor final_layer.adaLN_modulation.1.bias holds nan at element 31", put_nan},
        {"infinity", NULL, NULL, "tensor final_layer.adaLN_modulation.1.bias holds -inf", put_infinity},
        {"a tensor is missing", NULL, NULL, "tensor x_embedder.proj.bias is missing", leave_one_out},
        {"whole numbers", NULL, NULL, "tensor final_layer.adaLN_modulation.1.bias: is I64", make_whole},
        {"a shape is turned", NULL, NULL, "tensor final_layer.linear.weight has the shape (16,12)", turn},
    };
    Case k = cases[0];
    Config c = case_config(&k);
    Model *m = make_model(&c, 1, 1, 0, 1);
    char said[8192];
    random_weights(m);
    CHECK("weights: right", !test_child(weights_open, weights_save(m, NULL, NULL, NULL), said, sizeof said) && !*said);
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        const char *path = weights_save(m, broken[i].key, broken[i].value, broken[i].change);
        check(test_refuses(weights_open, path, broken[i].reason) && test_refuses(weights_open, path, path),
              "weights: %s", broken[i].name);
    }
    SafeTensors f;
    Options o;
    float *values = (float *)xcalloc((size_t)m->n_params, sizeof *values, "a test");
    options_default(&o, SAMPLE);
    st_open(&f, weights_save(m, NULL, NULL, NULL));
    options_from_meta(&o, &f, WEIGHTS);
    Model *loaded = make_model(&c, 1, 0, 0, 0);
    model_load(loaded, MODEL_WEIGHTS, &f, "");
    model_download(loaded, MODEL_WEIGHTS, 0, m->n_params, values);
    model_free(loaded);
    st_close(&f);
    int same = !memcmp(&o.model, &c, sizeof c);
    for (int64_t i = 0; i < m->n_params; i++) same &= values[i] == (float)m->memory[MODEL_WEIGHTS][i];
    CHECK("weights: come back bit for bit, with their settings", same);
    params_init(values, m->tensors, m->n_tensors, 1);
    int right = 1;
    for (int i = 0; i < m->n_tensors; i++) {
        const ParamTensor *p = &m->tensors[i];
        double fan = (double)(p->shape[0] + p->count / p->shape[0]), want = 0, square = 0, largest = 0;
        if (p->ndim > 1 && !strstr(p->name, "adaLN") && !strstr(p->name, "final_layer")) want = 2 / fan; // (6/fan)/3
        if (p->ndim > 1 && (strstr(p->name, "t_embedder") || strstr(p->name, "y_embedder"))) want = 0.02 * 0.02;
        for (int64_t e = 0; e < p->count; e++) {
            double x = values[p->offset + e];
            square += x * x / (double)p->count;
            largest = larger(largest, fabs(x));
        }
        right &= fabs(square - want) <= want * 6 / sqrt((double)p->count);
        if (want == 2 / fan) right &= largest <= sqrt(6 / fan) + 1e-7;
        if (!right) printf("    %s: variance %g, wanted %g\n", p->name, square, want);
    }
    CHECK("weights: initial distribution", right);
    xfree(values);
    model_free(m);
    remove(test_path("weights.safetensors"));
}

static void dataset_read(const char *path) { // opens a dataset and reads a batch of 3
    Dataset d;
    float x[3 * 48];
    int y[3];
    dataset_open(&d, path, 0, 1);
    dataset_batch(&d, x, y, 0, 3, 0, 3, 0, 0);
}

static const char *dataset_save(Tensor x, const Tensor *y, const char *names) {
    const char *path = test_path("data.safetensors");
    Tensor both[2] = {x, y ? *y : x};
    Meta meta = {"class_names", names};
    st_save(path, both, y ? 2 : 1, &meta, names ? 1 : 0);
    return path;
}

static void test_datasets(void) {
    enum { N = 10, SIDE = 4, COUNT = 3 * SIDE * SIDE };
    uint8_t u[N * COUNT];
    float f[N * COUNT], x[6 * COUNT], part[6 * COUNT], shape[COUNT];
    int64_t label[N + 1];
    int y[6], part_y[6], right = 1;
    for (int i = 0; i < N * COUNT; i++) u[i] = (uint8_t)(random_word((uint32_t)i, 500) >> 24), f[i] = (float)u[i] / 255;
    for (int i = 0; i <= N; i++) label[i] = i % 3;
    Tensor bytes = st_tensor("x", U8, u, 4, N, SIDE, SIDE, 3), floats = st_tensor("x", F32, f, 4, N, 3, SIDE, SIDE);
    Tensor labels = st_tensor("y", I64, label, 1, N, 1, 1, 1);
    const char *names = "[\"a\",\"b\",\"c\"]", *path = dataset_save(bytes, &labels, names);
    Dataset d;
    dataset_open(&d, path, 0, 1);
    CHECK("data: sizes",
          d.count == N && d.channels == 3 && d.size == SIDE && d.classes == 3 && !strcmp(d.class_names[2], "c"));
    CHECK("data: class names are passed on as they stand", !strcmp(d.class_json, names));
    for (int i = 0; i < N; i++) {
        dataset_sample(&d, x, y, i);
        for (int c = 0; c < 3; c++)
            for (int p = 0; p < SIDE * SIDE; p++)
                right &= x[c * SIDE * SIDE + p] == (float)(u[(i * SIDE * SIDE + p) * 3 + c] / 127.5f - 1);
        right &= y[0] == i % 3;
    }
    CHECK("data: bytes become -1..1, channels first", right);
    int seen[3][N] = {{0}}, epochs = 1, moved = 0;
    for (int64_t g = 0; g < 3 * N; g++) seen[g / N][dataset_index(&d, g)]++;
    for (int e = 0; e < 3; e++)
        for (int i = 0; i < N; i++) epochs &= seen[e][i] == 1;
    for (int64_t g = 0; g < N; g++) moved += dataset_index(&d, g) != dataset_index(&d, g + N);
    CHECK("data: each sample once an epoch, in another order", epochs && moved);
    dataset_batch(&d, x, y, 3, 6, 0, 6, 1, 0.5);
    for (int first = 0; first < 6; first += 2)
        dataset_batch(&d, part + first * COUNT, part_y + first, 3, 6, first, 2, 1, 0.5);
    CHECK("data: a batch is the same in parts", !memcmp(x, part, sizeof x) && !memcmp(y, part_y, sizeof y));
    int dropped = 0, flipped = 0, straight = 0;
    for (int64_t step = 0; step < 500; step++) {
        dataset_batch(&d, x, y, step, 6, 0, 6, 1, 0.1);
        for (int b = 0; b < 6; b++) {
            int nothing;
            dataset_sample(&d, part, &nothing, dataset_index(&d, step * 6 + b));
            dropped += y[b] == 3;
            straight += !memcmp(part, x + b * COUNT, sizeof(float) * COUNT);
            int mirrored = 1;
            for (int i = 0; i < COUNT; i++) mirrored &= x[b * COUNT + i] == part[i / SIDE * SIDE + SIDE - 1 - i % SIDE];
            flipped += mirrored;
        }
    }
    printf("    of 3000: %d labels dropped, %d flipped\n", dropped, flipped);
    CHECK("data: a tenth of the labels is dropped", dropped > 220 && dropped < 380);
    CHECK("data: half is flipped, nothing else happens",
          flipped + straight == 3000 && flipped > 1350 && flipped < 1650);
    st_close(&d.file);
    dataset_open(&d, dataset_save(floats, NULL, NULL), 0, 1);
    dataset_sample(&d, x, y, 4);
    CHECK("data: floats, unlabelled",
          d.classes == 0 && d.channels == 3 && y[0] == 0 && !memcmp(x, f + 4 * COUNT, sizeof(float) * COUNT));
    st_close(&d.file);
    dataset_open(&d, "shapes", SIDE, 1);
    int kinds[N_SHAPES] = {0}, in_range = 1;
    for (int64_t i = 0; i < 500; i++) {
        dataset_sample(&d, shape, y, i);
        kinds[y[0]]++;
        for (int e = 0; e < COUNT; e++) in_range &= shape[e] >= -1 && shape[e] <= 1;
    }
    for (int i = 0; i < N_SHAPES; i++) in_range &= kinds[i] > 20;
    CHECK("data: shapes: every kind, pixels in -1..1", in_range);
    CHECK("data: shapes: a name for every kind", d.classes == N_SHAPES && !strcmp(d.class_names[DIAMOND], "diamond"));
    shapes_draw(x, y, SIDE, 1, 499);
    CHECK("data: shapes: a picture follows from its number", !memcmp(x, shape, sizeof shape));

    CHECK("to bytes and back", to_byte(-1) == 0 && to_byte(1) == 255 && to_byte(0) == 128 && to_byte(-9) == 0 &&
                                   to_byte(9) == 255 && to_byte(NAN) == 0);
    for (int v = 0; v < 256; v++) right &= to_byte((float)v / 127.5f - 1) == v;
    CHECK("to bytes: every value survives", right);

    Tensor t = labels;
    label[7] = 4;
    CHECK("data: label beyond the names",
          test_refuses(dataset_read, dataset_save(bytes, &labels, names), "tensor y: label 4 of sample 7"));
    label[7] = 3;
    char said[99];
    CHECK("data: the number of names is no label",
          !test_child(dataset_read, dataset_save(bytes, &labels, names), said, sizeof said));
    label[7] = -1;
    CHECK("data: negative label",
          test_refuses(dataset_read, dataset_save(bytes, &labels, NULL), "tensor y: label -1 of sample 7"));
    label[7] = 1;
    t.shape[0]++, t.count++, t.bytes += 8;
    CHECK("data: one label too many", test_refuses(dataset_read, dataset_save(bytes, &t, NULL), "tensor y: want I64"));
    t = st_tensor("y", F32, f, 1, N, 1, 1, 1);
    CHECK("data: labels are no whole numbers",
          test_refuses(dataset_read, dataset_save(bytes, &t, NULL), "tensor y: want I64"));
    t = bytes;
    t.name = "pictures";
    CHECK("data: no pictures", test_refuses(dataset_read, dataset_save(t, NULL, NULL), "no tensor 'x'"));
    t = st_tensor("x", U8, u, 4, N, 2, 8, 3);
    CHECK("data: not square", test_refuses(dataset_read, dataset_save(t, NULL, NULL), "must be square"));
    t = st_tensor("x", U8, u, 3, N, SIDE, SIDE * 3, 1);
    CHECK("data: three dimensions",
          test_refuses(dataset_read, dataset_save(t, NULL, NULL), "tensor x: want U8 (N,H,W,C)"));
    t = st_tensor("x", I64, u, 4, N / 8, SIDE, SIDE, 3);
    CHECK("data: a type that no picture has",
          test_refuses(dataset_read, dataset_save(t, NULL, NULL), "tensor x: want U8 (N,H,W,C)"));
    t = st_tensor("x", U8, u, 4, 0, SIDE, SIDE, 3);
    CHECK("data: empty", test_refuses(dataset_read, dataset_save(t, NULL, NULL), "tensor x: 0 samples"));
    t = st_tensor("x", U8, u, 4, N, 0, 0, 3);
    CHECK("data: pictures without pixels",
          test_refuses(dataset_read, dataset_save(t, NULL, NULL), "want sides from 1"));
    for (int i = 0; i < N; i++) f[i * COUNT + i] = NAN;
    CHECK("data: NaN",
          test_refuses(dataset_read, dataset_save(floats, NULL, NULL), "data.safetensors: tensor x: sample "));
    CHECK("data: names that are no list",
          test_refuses(dataset_read, dataset_save(bytes, &labels, "a,b,c"), "class_names"));
    remove(test_path("data.safetensors"));
}

// ---------------------------------------------------------------------------------------------------------------------
// PNG, read back by a decoder that shares no code with the writer

static uint32_t big_endian(const uint8_t *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

typedef struct {
    const uint8_t *in;
    size_t size, at; // in bits
} BitReader;
static uint32_t read_bits(BitReader *r, int count) {
    uint32_t value = 0;
    for (int i = 0; i < count; i++, r->at++)
        if (r->at / 8 < r->size) value |= (uint32_t)(r->in[r->at / 8] >> r->at % 8 & 1) << i;
    return value;
}

// The next symbol of the fixed code (RFC 1951, 3.2.6), by its ranges of code words
static int read_symbol(BitReader *r) {
    uint32_t code = 0;
    for (int length = 1; length <= 9; length++) {
        code = code << 1 | read_bits(r, 1);
        if (length == 7 && code <= 23) return 256 + (int)code;
        if (length == 8 && code >= 48 && code <= 191) return (int)code - 48;
        if (length == 8 && code >= 192 && code <= 199) return 280 + (int)code - 192;
        if (length == 9 && code >= 400) return 144 + (int)code - 400;
    }
    return -1;
}

// Unpacks a zlib stream of one block with the fixed codes into `out`; returns the number of bytes, or -1 if anything is
// wrong.
static int64_t inflate_fixed(uint8_t *out, size_t room, const uint8_t *in, size_t size) {
    // RFC 1951, 3.2.5: the tables of lengths and distances, and of their extra bits
    static const int base[] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                               31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
    static const int extra[] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
    static const int far_base[] = {1,    2,    3,    4,    5,    7,    9,    13,    17,    25,
                                   33,   49,   65,   97,   129,  193,  257,  385,   513,   769,
                                   1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
    BitReader r = {in, size, 16};
    size_t n = 0;
    uint32_t a = 1, b = 0;
    if (size < 6 || (in[0] & 15) != 8 || (in[0] * 256 + in[1]) % 31 || (in[1] & 32)) return -1;
    if (read_bits(&r, 3) != 3) return -1; // the last block, fixed codes
    for (int symbol; (symbol = read_symbol(&r)) != 256;) {
        if (symbol < 0 || symbol > 285 || n == room || r.at / 8 >= size) return -1;
        if (symbol < 256) {
            out[n++] = (uint8_t)symbol;
            continue;
        }
        size_t length = (size_t)base[symbol - 257] + read_bits(&r, extra[symbol - 257]), code = 0;
        for (int bit = 0; bit < 5; bit++) code = code << 1 | read_bits(&r, 1);
        if (code > 29) return -1;
        size_t distance = (size_t)far_base[code] + read_bits(&r, code < 2 ? 0 : (int)code / 2 - 1);
        if (distance > n || length > room - n) return -1;
        for (; length; length--, n++) out[n] = out[n - distance];
    }
    for (size_t i = 0; i < n; i++) a = (a + out[i]) % 65521, b = (b + a) % 65521;
    size_t at = (r.at + 7) / 8;
    if (at + 4 != size) return -1;
    return big_endian(in + at) == (b << 16 | a) ? (int64_t)n : -1;
}

// The pixels (h,w,3) of an 8-bit RGB picture; NULL, with the reason printed, if the file is not right in every byte.
static uint8_t *png_read(const char *path, int *w, int *h) {
    uint8_t *file = NULL, *rgb = NULL, *raw = NULL, *packed = NULL;
    size_t size = 0, packed_size = 0, room = 0;
    const char *why = "cannot be read";
    FILE *in = fopen(path, "rb");
    for (int c; in && (c = fgetc(in)) != EOF;) {
        file = (uint8_t *)grow(file, size, 1);
        file[size++] = (uint8_t)c;
    }
    if (in) fclose(in);
    if (size < 8 + 25 + 12 || memcmp(file, "\x89PNG\r\n\x1a\n", 8)) goto end;
    packed = (uint8_t *)xcalloc(size, 1, "a test");
    for (size_t at = 8, chunk = 0;; chunk++) {
        why = "its chunks are broken";
        if (size - at < 12) goto end;
        size_t length = big_endian(file + at);
        const uint8_t *type = file + at + 4, *data = type + 4;
        if (length > size - at - 12) goto end;
        uint32_t crc = ~0u;
        for (size_t i = 0; i < length + 4; i++)
            for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (((crc ^ type[i] >> bit) & 1) * 0xEDB88320u);
        why = "a checksum is wrong";
        if (big_endian(data + length) != ~crc) goto end;
        at += 12 + length;
        why = "its header is wrong";
        if (chunk == 0) {
            if (memcmp(type, "IHDR", 4) || length != 13 || memcmp(data + 8, "\x8\x2\0\0", 5)) goto end;
            *w = (int)big_endian(data);
            *h = (int)big_endian(data + 4);
        } else if (!memcmp(type, "IDAT", 4)) {
            memcpy(packed + packed_size, data, length);
            packed_size += length;
        } else if (!memcmp(type, "IEND", 4)) {
            why = "bytes follow its end";
            if (at != size || length) goto end;
            break;
        }
    }
    why = "its pixels are broken";
    size_t row = 3 * (size_t)*w + 1;
    room = row * (size_t)*h;
    raw = (uint8_t *)xcalloc(room, 1, "a test");
    if (inflate_fixed(raw, room, packed, packed_size) != (int64_t)room) goto end;
    rgb = (uint8_t *)xcalloc(room, 1, "a test");
    for (size_t y = 0; y < (size_t)*h; y++) {
        if (raw[y * row]) goto end; // a filter
        memcpy(rgb + y * (row - 1), raw + y * row + 1, row - 1);
    }
    why = NULL;
end:
    free(file);
    xfree(raw);
    xfree(packed);
    if (!why) return rgb;
    printf("%s: %s\n", path, why);
    xfree(rgb);
    return NULL;
}

static void test_png(void) {
    static const int sizes[][2] = {{1, 1},    {1, 7},    {7, 1},     {3, 5},    {64, 64},
                                   {33, 100}, {5000, 9}, {11000, 3}, {300, 200}};
    const char *path = test_path("test.png");
    int same[4] = {1, 1, 1, 1};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (uint32_t kind = 0; kind < 4; kind++) {
            int w = sizes[s][0], h = sizes[s][1], got_w = 0, got_h = 0;
            size_t count = 3 * (size_t)w * (size_t)h;
            uint8_t *rgb = (uint8_t *)xcalloc(count, 1, "a test");
            for (size_t i = 0; i < count; i++) { // constant, noise, runs, an enlarged picture
                uint32_t x = (uint32_t)(i / 3 % (size_t)w), y = (uint32_t)(i / 3 / (size_t)w), c = (uint32_t)(i % 3);
                rgb[i] = 200;
                if (kind == 1) rgb[i] = (uint8_t)random_word((uint32_t)i, 600);
                if (kind == 2)
                    rgb[i] = (uint8_t)(random_word((uint32_t)i / 700, 601) % 3 ? 230 : random_word((uint32_t)i, 602));
                if (kind == 3) rgb[i] = (uint8_t)random_word((y / 4 * 5000 + x / 4) * 3 + c, 603);
            }
            png_write(path, rgb, w, h);
            uint8_t *got = png_read(path, &got_w, &got_h);
            same[kind] &= got && got_w == w && got_h == h && !memcmp(rgb, got, count);
            xfree(rgb);
            xfree(got);
        }
    CHECK("png: one colour", same[0]);
    CHECK("png: noise", same[1]);
    CHECK("png: runs", same[2]);
    CHECK("png: an enlarged picture", same[3]);
    float images[5 * 1 * 2 * 2];
    for (int i = 0; i < 20; i++) images[i] = (float)i / 10 - 1;
    int w, h;
    uint8_t *grid = picture_grid(images, 5, 1, 2, 3, 2, 1, &w, &h); // 5 grey pictures in two rows
    CHECK("grid: size", w == 3 * 5 + 1 && h == 2 * 5 + 1);
    CHECK("grid: pixels", grid[0] == 230 && grid[3 * (w + 1)] == to_byte(-1) &&
                              grid[3 * (w * 9 + 8) + 2] == to_byte(images[19]) && grid[3 * (w * 9 + 14)] == 230);
    xfree(grid);
    const float rgb[3] = {-1, 0, 1};
    grid = picture_grid(rgb, 1, 3, 1, 1, 1, 0, &w, &h);
    CHECK("grid: colours", w == 1 && h == 1 && grid[0] == 0 && grid[1] == 128 && grid[2] == 255);
    xfree(grid);
    remove(path);
}

// ---------------------------------------------------------------------------------------------------------------------

static int list_files(int count, char **paths, int png) {
    for (int i = 0; i < count; i++) {
        int w = 0, h = 0;
        SafeTensors f;
        if (png) {
            uint8_t *rgb = png_read(paths[i], &w, &h);
            uint64_t sum = 14695981039346656037u; // FNV-1a
            if (!rgb) return 1;
            for (size_t e = 0; e < 3 * (size_t)w * (size_t)h; e++) sum = (sum ^ rgb[e]) * 1099511628211u;
            printf("%d %d %016llx\n", w, h, (unsigned long long)sum);
            xfree(rgb);
            continue;
        }
        st_open(&f, paths[i]);
        for (int t = 0; t < f.n_tensors; t++) {
            char shape[200];
            shape_text(shape, sizeof shape, f.tensors[t].shape, f.tensors[t].ndim);
            printf("%s %s (%s)\n", f.tensors[t].name, dtype_names[f.tensors[t].dtype], shape);
        }
        st_close(&f);
    }
    return 0;
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc > 1) return list_files(argc - 2, argv + 2, !strcmp(argv[1], "png"));
    int threads = max_threads();
    set_threads(1); // a forked child cannot use threads that its parent started: what forks comes first, with one
    if (sizeof(real) == sizeof(float)) {
        test_files();
        if (!mkdtemp(strcpy(test_folder, "/tmp/fpdm_test_XXXXXX"))) die("/tmp: %s", strerror(errno));
        test_weights();
        test_datasets();
        test_plan();
        test_timesteps_and_rates();
        test_options();
        test_png();
        rmdir(test_folder);
        test_random();
        test_f16();
        test_sizes();
        test_schedule();
        test_allocation();
        test_gemm(0, 400, 900);
        test_gemm(1, 200, 1000);
#ifdef AMX
        if (amx_allowed()) {
            atomic_store(&amx, 0); // without Intel's tiles, too
            test_gemm(1, 200, 1000);
            atomic_store(&amx, 1);
        }
#else
        atomic_store(&amx, 1); // what stands for the tiles here
        test_gemm(1, 200, 1000);
        atomic_store(&amx, 0);
#endif
        test_pairs();
        set_threads(threads);
        test_exp2();
        test_gelu();
        test_anderson();
        test_residual();
        test_step();
        test_fp32_ends();
        Case wide = cases[1], alone = cases[7]; // large enough for the matmuls to use threads
        wide.name = "width 72, 25 tokens, B = 3";
        wide.image_size = 10, wide.width = 72, wide.heads = 3, wide.B = 3;
        alone.name = "width 132, 49 tokens, B = 1";
        alone.image_size = 21, alone.width = 132, alone.heads = 11;
        for (arithmetic = COMPUTE_FP32; arithmetic <= COMPUTE_BF16; arithmetic++) {
            for (int i = 0; i < N_CASES; i++) test_memory_plans(&cases[i]);
            test_sampling_batches(&cases[1], SAMPLER_DDPM, 0, 1, 0);
            test_sampling_batches(&cases[4], SAMPLER_DDIM, 0.5, 1.5, 0);
            test_sampling_batches(&cases[6], SAMPLER_FLOW, 0, 2, 0);
            test_sampling_batches(&cases[3], SAMPLER_DDIM, 0, 2, 1);
            test_sampling_batches(&cases[9], SAMPLER_DDIM, 0, 3, 2);
            test_threads(&wide);
            test_threads(&alone);
            test_threads(&cases[8]);
            test_threads(&cases[10]);
        }
    } else {
        test_gemm(0, 100, 500);
        set_threads(threads);
        for (int i = 0; i < N_CASES; i++) test_gradient(&cases[i]);
    }
    printf("%d passed, %d failed\n", tests_passed, tests_failed);
    return tests_failed > 0;
}

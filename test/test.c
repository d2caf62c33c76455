// Runs test cases: safetensors files that hold a model and what must come out of it, computed in float64.
//
//   test_cpu [--dtype=fp32|bf16] [FILE ...]      without a file: all of test/cases; without --dtype: all that there are
//
// One line for each expected tensor: name, relative L2 error, limit, ok or FAIL; last `N passed, N failed` over the
// cases. The program under test is included whole: fpdm_cpu.c, or with -DGPU fpdm.cu, whose interface is the same.

#ifdef GPU
#include "../fpdm.cu"
enum { LAST_DTYPE = COMPUTE_BF16 };
#else
#include "../fpdm_cpu.c"
enum { LAST_DTYPE = COMPUTE_FP32 };
#endif
#include <dirent.h>
#ifndef RECOMPUTE
#define RECOMPUTE 0
#endif

enum { OUTPUT, LOSS, GRADIENT, ACTIVATION, SAMPLED };
static int dtype, case_failed, compared; // dtype: of the arithmetic, COMPUTE_FP32 or COMPUTE_BF16
static double loosest(int what, int half) {
    if (half) return what == GRADIENT || what == ACTIVATION ? 6e-2 : 3e-2;
    return what == GRADIENT || what == ACTIVATION ? 1e-4 : 1e-5;
}

// Prints and counts one comparison. `scale` is the norm to divide by when it is larger than want's own.
static void compare(const char *name, const float *got, const float *want, int64_t count, int what, double scale) {
    double error = 0, norm = 0, limit = loosest(what, dtype == COMPUTE_BF16);
    for (int64_t i = 0; i < count; i++) {
        error += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        norm += (double)want[i] * want[i];
    }
    norm = sqrt(norm) > scale ? sqrt(norm) : scale;
    double relative = sqrt(error) / (norm > 0 ? norm : 1);
    int ok = relative <= limit; // false for NaN
    printf("  %-50s %.2e  limit %.0e  %s\n", name, relative, limit, ok ? "ok" : "FAIL");
    case_failed |= !ok;
    compared++;
}

static SafeTensors file; // the case being run
static float *tensor_floats(const char *name, int64_t *count) {
    const Tensor *t = st_find(&file, name);
    if (!t) die("%s: tensor %s is missing", file.path, name);
    float *values = (float *)xcalloc((size_t)t->count, sizeof *values, name);
    st_to_float(&file, t, values);
    if (count) *count = t->count;
    return values;
}

static int *tensor_ints(const char *name) {
    const Tensor *t = st_find(&file, name);
    if (!t || t->dtype != I64) die("%s: tensor %s is missing or not I64", file.path, name);
    int *values = (int *)xcalloc((size_t)t->count, sizeof *values, name);
    for (int64_t i = 0; i < t->count; i++) {
        int64_t v;
        memcpy(&v, (const char *)t->data + 8 * i, 8);
        values[i] = (int)v;
    }
    return values;
}

static const char *meta_text(const char *key) {
    const char *text = st_meta(&file, key);
    if (!text) die("%s: metadata '%s' is missing", file.path, key);
    return text;
}

// Compares what the model has of `kind` with the tensors PREFIX + name. The key bias gets no gradient in exact
// arithmetic, so a tensor of that kind is measured against the norm of its layer's weight gradient.
static void compare_params(Model *m, int kind, const char *prefix) {
    float *values = (float *)xcalloc((size_t)m->n_params, sizeof *values, "parameters");
    model_download(m, kind, values);
    for (int i = 0; i < m->n_tensors; i++) {
        const ParamTensor *p = &m->tensors[i];
        char name[120], weight[120];
        snprintf(name, sizeof name, "%s%s", prefix, p->name);
        if (!st_find(&file, name)) die("%s: tensor %s is missing", file.path, name);
        float *want = tensor_floats(name, NULL);
        double norm = 0, scale = 0;
        for (int64_t e = 0; e < p->count; e++) norm += (double)want[e] * want[e];
        snprintf(weight, sizeof weight, "%s", name);
        char *bias = strstr(weight, ".bias");
        if (kind == MODEL_GRADS && bias && norm < 1e-18) {
            memcpy(bias, ".weight", 8);
            int64_t count;
            float *w = tensor_floats(weight, &count);
            for (int64_t e = 0; e < count; e++) scale += (double)w[e] * w[e];
            xfree(w);
        }
        compare(name, values + p->offset, want, p->count, GRADIENT, sqrt(scale));
        xfree(want);
    }
    xfree(values);
}

// The model shows its activations and its output through this.
static void compare_activation(const char *name, const real *data, int64_t count) {
    int output = !strcmp(name, "output");
    if (output)
        name = "expect.output";
    else if (!st_find(&file, name))
        return;
    int64_t expected;
    float *want = tensor_floats(name, &expected), *got = (float *)xcalloc((size_t)count, sizeof *got, name);
    if (expected != count) die("%s: tensor %s has the wrong size", file.path, name);
    for (int64_t i = 0; i < count; i++) got[i] = (float)data[i];
    compare(name, got, want, count, output ? OUTPUT : ACTIVATION, 0);
    xfree(want);
    xfree(got);
}

static Model *case_model(const Options *o, int batch, int max_m, int training, int window) {
    Model *m = model_create(&o->model, batch, max_m, RECOMPUTE, training, window, dtype);
    float *values = (float *)xcalloc((size_t)m->n_params, sizeof *values, "weights");
    tensors_read(&file, m->tensors, m->n_tensors, "", values);
    model_upload(m, MODEL_WEIGHTS, values);
    if (training) model_upload(m, MODEL_EMA, values);
    xfree(values);
    return m;
}

static void compare_losses(const double *loss, int count) {
    float *want = tensor_floats("expect.loss", NULL), *got = (float *)xcalloc((size_t)count, sizeof *got, "losses");
    for (int i = 0; i < count; i++) got[i] = (float)loss[i];
    compare("expect.loss", got, want, count, LOSS, 0);
    xfree(want);
    xfree(got);
}

static void forward_case(const Options *o) {
    int B = (int)st_find(&file, "x0")->shape[0], n = atoi(meta_text("n")), iterations = atoi(meta_text("m"));
    float *x0 = tensor_floats("x0", NULL), *noise = tensor_floats("noise", NULL);
    int *t = tensor_ints("t"), *y = tensor_ints("y");
    Schedule *s = (Schedule *)xcalloc(1, sizeof *s, "schedule");
    double *mse = (double *)xcalloc((size_t)B, sizeof *mse, "losses"),
           *vb = (double *)xcalloc((size_t)B, sizeof *vb, "losses");
    schedule_make(s, &o->model, DIFFUSION_STEPS);
    Model *m = case_model(o, B, iterations, 1, 0);
    m->probe = compare_activation;
    model_zero_gradients(m);
    model_loss(m, s, x0, noise, t, y, B, n, iterations, 1.0 / B, mse, vb);
    for (int b = 0; b < B; b++) mse[b] += vb[b];
    compare_losses(mse, B);
    compare_params(m, MODEL_GRADS, "grad.");
    model_free(m);
    void *all[] = {x0, noise, t, y, s, mse, vb};
    for (int i = 0; i < 7; i++) xfree(all[i]);
}

static void train_case(const Options *o) {
    int steps = atoi(meta_text("steps")), B = (int)st_find(&file, "x0")->shape[1], largest = 1;
    double lr = atof(meta_text("lr")), beta1 = atof(meta_text("beta1")), beta2 = atof(meta_text("beta2"));
    double eps = atof(meta_text("adam_eps")), decay = atof(meta_text("weight_decay")),
           clip = atof(meta_text("grad_clip"));
    double ema = atof(meta_text("ema_decay"));
    int64_t count;
    float *x0 = tensor_floats("x0", &count), *noise = tensor_floats("noise", NULL);
    int *t = tensor_ints("t"), *y = tensor_ints("y");
    Schedule *s = (Schedule *)xcalloc(1, sizeof *s, "schedule");
    double *mse = (double *)xcalloc((size_t)B, sizeof *mse, "losses"),
           *vb = (double *)xcalloc((size_t)B, sizeof *vb, "losses");
    double *loss = (double *)xcalloc((size_t)steps, sizeof *loss, "losses");
    char key[32];
    schedule_make(s, &o->model, DIFFUSION_STEPS);
    int base = st_meta(&file, "n.0") ? 0 : 1; // whether K counts from 0 or from 1
    for (int k = 0; k < steps; k++) {
        snprintf(key, sizeof key, "m.%d", k + base);
        if (atoi(meta_text(key)) > largest) largest = atoi(meta_text(key));
    }
    Model *m = case_model(o, B, largest, 1, 0);
    for (int k = 0; k < steps; k++) {
        snprintf(key, sizeof key, "n.%d", k + base);
        int n = atoi(meta_text(key));
        snprintf(key, sizeof key, "m.%d", k + base);
        int iterations = atoi(meta_text(key));
        int64_t at = count / steps * k;
        model_zero_gradients(m);
        model_loss(m, s, x0 + at, noise + at, t + k * B, y + k * B, B, n, iterations, 1.0 / B, mse, vb);
        for (int b = 0; b < B; b++) loss[k] += (mse[b] + vb[b]) / B;
        double norm = model_gradient_norm(m);
        model_update(m, k + 1, lr, beta1, beta2, eps, decay, clip > 0 && norm > clip ? clip / (norm + 1e-6) : 1, ema);
    }
    compare_losses(loss, steps);
    compare_params(m, MODEL_WEIGHTS, "final.");
    compare_params(m, MODEL_EMA, "ema.");
    model_free(m);
    void *all[] = {x0, noise, t, y, s, mse, vb, loss};
    for (int i = 0; i < 8; i++) xfree(all[i]);
}

static void sample_case(const Options *o) {
    int steps = atoi(meta_text("steps")), iters[DIFFUSION_STEPS], B = (int)st_find(&file, "x_T")->shape[0];
    const char *list = o->model.fixed_point ? meta_text("iters") : "1";
    for (int i = 0; i < steps; i++) {
        iters[i] = atoi(list);
        if (strchr(list, ',')) list = strchr(list, ',') + 1;
    }
    int window = st_meta(&file, "window") ? atoi(meta_text("window")) : 0; // of Anderson acceleration
    SampleSettings set = {choice_index("auto|ddpm|ddim|flow", meta_text("sampler")),
                          atoi(meta_text("cfg_channels")),
                          atoi(meta_text("reuse")),
                          atof(meta_text("eta")),
                          atof(meta_text("cfg_scale")),
                          0,
                          iters,
                          NULL,
                          0,
                          window,
                          window ? atof(meta_text("mixing")) : 1,
                          NULL};
    int64_t count;
    float *x = tensor_floats("x_T", &count), *z = tensor_floats("z", NULL),
          *want = tensor_floats("expect.sample", NULL);
    int *y = tensor_ints("y");
    Schedule *s = (Schedule *)xcalloc(1, sizeof *s, "schedule");
    schedule_make(s, &o->model, steps);
    if (st_meta(&file, "t_shift")) schedule_shift(s, atof(meta_text("t_shift")));
    Model *m = case_model(o, set.cfg != 1 ? 2 * B : B, 0, 0, set.window);
    sample_batch(m, s, &set, x, y, B, z, 0, 0);
    compare("expect.sample", x, want, count, SAMPLED, 0);
    model_free(m);
    void *all[] = {x, z, want, y, s};
    for (int i = 0; i < 5; i++) xfree(all[i]);
}

// 1 when the case passed
static int run_case(const char *path) {
    Options o;
    options_default(&o, TRAIN);
    st_open(&file, path);
    options_from_meta(&o, &file, WEIGHTS);
    printf("%s%s\n", path, dtype == COMPUTE_BF16 ? " in bf16" : "");
    case_failed = compared = 0;
    const char *kind = meta_text("case");
    if (!strcmp(kind, "forward"))
        forward_case(&o);
    else if (!strcmp(kind, "train"))
        train_case(&o);
    else if (!strcmp(kind, "sample"))
        sample_case(&o);
    else
        die("%s: metadata 'case': '%s' is not forward, train or sample", path, kind);
    st_close(&file);
    return !case_failed && compared;
}

static int by_string(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

int main(int argc, char **argv) {
    int passed = 0, failed = 0, count = 0, only = 0;
    char **paths = NULL;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc > 1 && !strncmp(argv[1], "--dtype=", 8)) {
        int choice = choice_index("auto|fp32|bf16", argv[1] + 8);
        if (choice < 0) die("option --dtype: '%s' is not fp32 or bf16", argv[1] + 8);
        only = compute_dtype(choice);
        argv++, argc--;
    }
    for (int i = 1; i < argc; i++) {
        paths = (char **)grow(paths, (size_t)count, sizeof *paths);
        paths[count++] = argv[i];
    }
    DIR *folder = argc > 1 ? NULL : opendir("test/cases");
    if (argc == 1 && !folder) die("test/cases: %s; run this in the project's folder, or name files", strerror(errno));
    for (struct dirent *entry; folder && (entry = readdir(folder));) {
        char path[300];
        if (!strstr(entry->d_name, ".safetensors")) continue;
        snprintf(path, sizeof path, "test/cases/%s", entry->d_name);
        paths = (char **)grow(paths, (size_t)count, sizeof *paths);
        paths[count++] = strdup(path);
    }
    if (folder) closedir(folder);
    if (argc == 1) qsort(paths, (size_t)count, sizeof *paths, by_string);
    for (int i = 0; i < count; i++)
        for (dtype = only ? only : COMPUTE_FP32; dtype <= (only ? only : LAST_DTYPE); dtype++) {
            if (run_case(paths[i]))
                passed++;
            else
                failed++;
        }
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0 || !passed;
}

// Runs test cases: safetensors files that hold a model and what must come out of it, computed in float64.
//
//   test_cpu [--dtype=fp32|bf16] [FILE ...]      without a file: all of test/cases; without --dtype: all that there are
//
// One line for each expected tensor: name, relative L2 error, limit, ok or FAIL; last `N passed, N failed` over the
// cases in each type. A case runs with and without recomputation, and in fpdm.cu, which chooses its kernels by the
// number of multiprocessors, with several numbers of those. It fails when its file has a tensor that was not used, and
// when anything ends the program: cases run in a child process, and the next one follows.
// EMU_QUICK=1 leaves out the first of those, for builds that are slow.
// The program under test is included whole: fpdm_cpu.c, or with -DGPU fpdm.cu, whose interface is the same.

#ifdef GPU
#include "../fpdm.cu"
#else
#include "../fpdm_cpu.c"
#endif
#include <dirent.h>
#include <sys/wait.h>

static const struct {
    int recompute;
    int sms; // multiprocessors: few; an H100's; 1, which takes the largest tiles for everything
} runs[] = {{0, 3},
#ifdef GPU
            {0, 132},
#endif
            {1, 1}};
enum { RUNS = sizeof runs / sizeof *runs };

enum { OUTPUT, LOSS, GRADIENT, ACTIVATION, SAMPLED };
static int dtype, recompute, case_failed; // dtype: of the arithmetic, COMPUTE_FP32 or COMPUTE_BF16
static SafeTensors file;                  // the case being run
static char *used;                        // which of its tensors were read as inputs, or compared
static double loosest(int what, int half) {
    if (half) return what == GRADIENT || what == ACTIVATION ? 6e-2 : 3e-2;
    return what == GRADIENT || what == ACTIVATION ? 1e-4 : 1e-5;
}

static const Tensor *find_tensor(const char *name) {
    const Tensor *t = st_find(&file, name);
    if (!t) die("%s: tensor %s is missing", file.path, name);
    return t;
}

static int is_expected(const char *name) {
    static const char *const prefixes[] = {"expect.", "grad.", "final.", "ema.", "act."};
    for (int i = 0; i < 5; i++)
        if (!strncmp(name, prefixes[i], strlen(prefixes[i]))) return 1;
    return 0;
}

// The values of a tensor, which must have `count` elements. Inputs count as used; what is expected does once compared.
static float *tensor_floats(const char *name, size_t count) {
    const Tensor *t = find_tensor(name);
    if ((size_t)t->count != count)
        die("%s: tensor %s has %lld elements; want %zu", file.path, name, (long long)t->count, count);
    float *values = (float *)xcalloc(count, sizeof *values, name);
    st_to_float(&file, t, values);
    if (!is_expected(name)) used[t - file.tensors] = 1;
    return values;
}

// The same of whole numbers 0..last
static int *tensor_ints(const char *name, size_t count, int last) {
    const Tensor *t = find_tensor(name);
    if (t->dtype != I64 || (size_t)t->count != count)
        die("%s: tensor %s: want %zu elements of type I64", file.path, name, count);
    int *values = (int *)xcalloc(count, sizeof *values, name);
    for (size_t i = 0; i < count; i++) {
        int64_t v;
        memcpy(&v, (const char *)t->data + 8 * i, 8);
        if (v < 0 || v > last) die("%s: tensor %s: %lld is not in 0..%d", file.path, name, (long long)v, last);
        values[i] = (int)v;
    }
    used[t - file.tensors] = 1;
    return values;
}

// Compares `got` with the tensor of that name. `scale` is the norm to divide by when larger than the tensor's own.
static void compare(const char *name, const float *got, size_t count, int what, double scale) {
    float *want = tensor_floats(name, count);
    double error = 0, norm = 0, limit = loosest(what, dtype == COMPUTE_BF16);
    for (size_t i = 0; i < count; i++) {
        error += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        norm += (double)want[i] * want[i];
    }
    norm = sqrt(norm) > scale ? sqrt(norm) : scale;
    double relative = sqrt(error) / (norm > 0 ? norm : 1);
    int ok = relative <= limit; // false for NaN
    printf("  %-50s %.2e  limit %.0e  %s\n", name, relative, limit, ok ? "ok" : "FAIL");
    if (getenv("EMU_ORDER")) printf("    bits %llx\n", (unsigned long long)hash_bytes(0, got, count * sizeof *got));
    case_failed |= !ok;
    used[find_tensor(name) - file.tensors] = 1;
    xfree(want);
}

static const char *meta_text(const char *key) {
    const char *text = st_meta(&file, key);
    if (!text) die("%s: metadata '%s' is missing", file.path, key);
    return text;
}

static double tensor_norm(const char *name) {
    size_t count = (size_t)find_tensor(name)->count;
    float *values = tensor_floats(name, count);
    double norm = 0;
    for (size_t i = 0; i < count; i++) norm += (double)values[i] * values[i];
    xfree(values);
    return sqrt(norm);
}

// Compares what training did to all weights, now `values`, with what it did to the tensors PREFIX + name. In bf16 the
// limit for a tensor may be more than it changed by.
static void compare_change(Model *m, const float *values, const char *prefix) {
    double error = 0, change = 0;
    for (int i = 0; i < m->n_tensors; i++) {
        const ParamTensor *p = &m->tensors[i];
        char name[120];
        snprintf(name, sizeof name, "%s%s", prefix, p->name);
        float *before = tensor_floats(p->name, (size_t)p->count), *want = tensor_floats(name, (size_t)p->count);
        for (int64_t e = 0; e < p->count; e++) {
            error += pow((double)values[p->offset + e] - want[e], 2);
            change += pow((double)want[e] - before[e], 2);
        }
        xfree(before);
        xfree(want);
    }
    double relative = change > 0 ? sqrt(error / change) : error, limit = 0.15;
    int ok = relative <= limit; // false for NaN
    printf("  %s%-*s %.2e  limit %.2f  %s\n", prefix, 50 - (int)strlen(prefix), "* - before", relative, limit,
           ok ? "ok" : "FAIL");
    case_failed |= !ok;
}

// Compares what the model has of `kind` with the tensors PREFIX + name. The key bias gets no gradient in exact
// arithmetic, so a tensor of that kind is measured against the norm of its layer's weight gradient.
static void compare_params(Model *m, int kind, const char *prefix) {
    float *values = (float *)xcalloc((size_t)m->n_params, sizeof *values, "parameters");
    model_download(m, kind, 0, m->n_params, values);
    for (int i = 0; i < m->n_tensors; i++) {
        const ParamTensor *p = &m->tensors[i];
        char name[120], weight[120];
        snprintf(name, sizeof name, "%s%s", prefix, p->name);
        snprintf(weight, sizeof weight, "%s", name);
        char *bias = strstr(weight, ".bias");
        double scale = 0;
        if (kind == MODEL_GRADS && bias && tensor_norm(name) < 1e-9) {
            memcpy(bias, ".weight", 8);
            scale = tensor_norm(weight);
        }
        compare(name, values + p->offset, (size_t)p->count, GRADIENT, scale);
    }
    if (kind != MODEL_GRADS) compare_change(m, values, prefix);
    xfree(values);
}

// The model shows its activations and its output through this.
static void compare_activation(const char *name, const real *data, int64_t count) {
    int output = !strcmp(name, "output");
    if (output)
        name = "expect.output";
    else if (!st_find(&file, name))
        return;
    float *got = (float *)xcalloc((size_t)count, sizeof *got, name);
    for (int64_t i = 0; i < count; i++) got[i] = (float)data[i];
    compare(name, got, (size_t)count, output ? OUTPUT : ACTIVATION, 0);
    xfree(got);
}

#ifdef CUDA_EMU_H
// At the start of every forward pass, where time_kernel stands, nothing of the one before may still be of use.
static Model *spoiled;
static void spoil_scratch(const char *kernel) {
    if (strstr(kernel, "time_kernel"))
        emu::spoil(spoiled->activations + spoiled->scratch, spoiled->activation_bytes - spoiled->scratch);
}
#endif

static Model *case_model(const Options *o, int batch, int max_m, int training, int window) {
    Model *m = model_create(&o->model, batch, max_m, recompute, training, window, dtype);
    model_load(m, MODEL_WEIGHTS, &file, "");
    if (training) model_load(m, MODEL_EMA, &file, "");
    for (int i = 0; i < m->n_tensors; i++) used[find_tensor(m->tensors[i].name) - file.tensors] = 1;
#ifdef CUDA_EMU_H
    spoiled = m;
    emu::before_kernel = spoil_scratch;
#endif
    return m;
}

static void compare_losses(const double *loss, int count) {
    float *got = (float *)xcalloc((size_t)count, sizeof *got, "losses");
    for (int i = 0; i < count; i++) got[i] = (float)loss[i];
    compare("expect.loss", got, (size_t)count, LOSS, 0);
    xfree(got);
}

// Metadata n or m, which mean nothing in a DiT and may be missing there
static int iterations_of(const Options *o, const char *key, int missing) {
    return o->model.fixed_point || st_meta(&file, key) ? atoi(meta_text(key)) : missing;
}

static void forward_case(const Options *o) {
    int B = (int)find_tensor("x0")->shape[0], n = iterations_of(o, "n", 0), iterations = iterations_of(o, "m", 1);
    size_t count = (size_t)B * config_pixels(&o->model);
    float *x0 = tensor_floats("x0", count), *noise = tensor_floats("noise", count);
    int *t = tensor_ints("t", (size_t)B, DIFFUSION_STEPS - 1), *y = tensor_ints("y", (size_t)B, o->model.classes);
    Schedule *s = (Schedule *)xcalloc(1, sizeof *s, "schedule");
    double *mse = (double *)xcalloc((size_t)B, sizeof *mse, "losses"),
           *vb = (double *)xcalloc((size_t)B, sizeof *vb, "losses");
    schedule_make(s, &o->model, DIFFUSION_STEPS);
    Model *m = case_model(o, B, iterations, 1, 0);
    m->probe = compare_activation;
    model_zero_gradients(m);
    model_loss(m, s, x0, noise, t, y, B, n, iterations, 1.0 / B, mse, vb);
    model_wait(m);
    for (int b = 0; b < B; b++) mse[b] += vb[b];
    compare_losses(mse, B);
    compare_params(m, MODEL_GRADS, "grad.");
    model_free(m);
    void *all[] = {x0, noise, t, y, s, mse, vb};
    for (int i = 0; i < 7; i++) xfree(all[i]);
}

static void train_case(const Options *o) {
    int steps = atoi(meta_text("steps")), B = (int)find_tensor("x0")->shape[1], largest = 1;
    double lr = atof(meta_text("lr")), beta1 = atof(meta_text("beta1")), beta2 = atof(meta_text("beta2"));
    double eps = atof(meta_text("adam_eps")), decay = atof(meta_text("weight_decay")),
           clip = atof(meta_text("grad_clip"));
    double ema = atof(meta_text("ema_decay"));
    size_t rows = (size_t)steps * (size_t)B, count = (size_t)B * config_pixels(&o->model);
    float *x0 = tensor_floats("x0", steps * count), *noise = tensor_floats("noise", steps * count);
    int *t = tensor_ints("t", rows, DIFFUSION_STEPS - 1), *y = tensor_ints("y", rows, o->model.classes);
    Schedule *s = (Schedule *)xcalloc(1, sizeof *s, "schedule");
    double *mse = (double *)xcalloc((size_t)B, sizeof *mse, "losses"),
           *vb = (double *)xcalloc((size_t)B, sizeof *vb, "losses");
    double *loss = (double *)xcalloc((size_t)steps, sizeof *loss, "losses");
    char key[32];
    schedule_make(s, &o->model, DIFFUSION_STEPS);
    int base = st_meta(&file, "n.0") ? 0 : 1; // whether K counts from 0 or from 1
    for (int k = 0; k < steps; k++) {
        snprintf(key, sizeof key, "m.%d", k + base);
        if (iterations_of(o, key, 1) > largest) largest = iterations_of(o, key, 1);
    }
    const char *optimizer = st_meta(&file, "optimizer");
    Model *m = case_model(o, B, largest, optimizer && !strcmp(optimizer, "muon") ? TRAIN_MUON : TRAIN_ADAMW, 0);
    for (int k = 0; k < steps; k++) {
        snprintf(key, sizeof key, "n.%d", k + base);
        int n = iterations_of(o, key, 0);
        snprintf(key, sizeof key, "m.%d", k + base);
        int iterations = iterations_of(o, key, 1);
        size_t at = count * (size_t)k;
        model_zero_gradients(m);
        model_loss(m, s, x0 + at, noise + at, t + k * B, y + k * B, B, n, iterations, 1.0 / B, mse, vb);
        model_wait(m);
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

// A flag, as any writer may spell it
static int meta_flag(const char *key) {
    int place = choice_index("0|1|false|true|False|True", meta_text(key));
    if (place < 0) die("%s: metadata '%s': '%s' is not 0 or 1", file.path, key, meta_text(key));
    return place % 2;
}

static void sample_case(const Options *o) {
    int steps = atoi(meta_text("steps")), iters[DIFFUSION_STEPS], B = (int)find_tensor("x_T")->shape[0];
    int sampler = choice_index("auto|ddpm|ddim|flow", meta_text("sampler"));
    if (sampler < 0) die("%s: metadata 'sampler': '%s' is unknown", file.path, meta_text("sampler"));
    if (steps < 2 || steps > DIFFUSION_STEPS) die("%s: metadata 'steps': %d, want 2 to 1000", file.path, steps);
    const char *list = o->model.fixed_point ? meta_text("iters") : "1";
    for (int i = 0; i < steps; i++) {
        iters[i] = atoi(list);
        if (strchr(list, ',')) list = strchr(list, ',') + 1;
    }
    int window = st_meta(&file, "window") ? atoi(meta_text("window")) : 0; // of Anderson acceleration
    int order = st_meta(&file, "order") ? atoi(meta_text("order")) : 1;
    Options settings = *o;
    settings.sampler = sampler, settings.order = order;
    SampleSettings set;
    memset(&set, 0, sizeof set);
    set.sampler = resolve_sampler(&settings, &o->model);
    set.order = order;
    set.cfg_channels = atoi(meta_text("cfg_channels"));
    set.reuse = meta_flag("reuse");
    set.eta = atof(meta_text("eta"));
    set.cfg = atof(meta_text("cfg_scale"));
    set.iters = iters;
    set.window = window;
    set.mixing = window ? atof(meta_text("mixing")) : 1;
    set.interval[1] = DIFFUSION_STEPS - 1; // every timestep
    if (st_meta(&file, "cfg_interval") &&
        sscanf(meta_text("cfg_interval"), "%d,%d", &set.interval[0], &set.interval[1]) != 2)
        die("%s: metadata 'cfg_interval': '%s' is not a range", file.path, meta_text("cfg_interval"));
    size_t count = (size_t)B * config_pixels(&o->model);
    float *x = tensor_floats("x_T", count), *z = tensor_floats("z", (size_t)steps * count);
    int *y = tensor_ints("y", (size_t)B, o->model.classes);
    Schedule *s = (Schedule *)xcalloc(1, sizeof *s, "schedule");
    schedule_make(s, &o->model, steps);
    if (st_meta(&file, "t_shift")) schedule_shift(s, atof(meta_text("t_shift")));
    Model *m = case_model(o, set.cfg != 1 ? 2 * B : B, 0, 0, set.window);
    sample_batch(m, s, &set, x, y, B, z, 0, 0);
    compare("expect.sample", x, count, SAMPLED, 0);
    model_free(m);
    void *all[] = {x, z, y, s};
    for (int i = 0; i < 4; i++) xfree(all[i]);
}

// 1 when the case passed
static int run_case(const char *path) {
    Options o;
    options_default(&o, TRAIN);
    st_open(&file, path);
    options_from_meta(&o, &file, WEIGHTS);
    used = (char *)xcalloc((size_t)file.n_tensors, 1, "a case");
    case_failed = 0;
    const char *kind = meta_text("case");
    if (!strcmp(kind, "forward"))
        forward_case(&o);
    else if (!strcmp(kind, "train"))
        train_case(&o);
    else if (!strcmp(kind, "sample"))
        sample_case(&o);
    else
        die("%s: metadata 'case': '%s' is not forward, train or sample", path, kind);
    for (int i = 0; i < file.n_tensors; i++) {
        const char *name = file.tensors[i].name;
        if (used[i] || !strcmp(name, "pos_embed")) continue;
        printf("  %-50s %s  FAIL\n", name, is_expected(name) ? "not compared" : "unknown in a case of this kind");
        case_failed = 1;
    }
    xfree(used);
    st_close(&file);
    return !case_failed;
}

static int by_string(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

// What the child process with the runs and its parent both see
typedef struct {
    int ready, next;  // the program has what it needs; the run that is under way
    int good, passed; // runs of this case in this type; all cases in all types
} Progress;

int main(int argc, char **argv) {
    int only = 0, count = 0, first = COMPUTE_FP32, last = COMPUTE_BF16;
    char **paths = NULL;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc > 1 && !strncmp(argv[1], "--dtype=", 8)) {
        only = choice_index("auto|fp32|bf16", argv[1] + 8);
        if (only < COMPUTE_FP32) die("option --dtype: '%s' is not fp32 or bf16", argv[1] + 8);
        first = last = only;
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

    int leave = getenv("EMU_QUICK") && RUNS > 2, n_runs = RUNS - leave; // runs of a case in a type
    int per_case = n_runs * (last - first + 1), total = count * per_case;
    Progress *p = (Progress *)mmap(NULL, sizeof *p, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) die("no memory: %s", strerror(errno));
    while (p->next < total) { // a child does as many runs as it survives
        fflush(NULL);
        pid_t child = fork();
        if (child < 0) die("cannot start a process: %s", strerror(errno));
        if (child == 0) {
            compute_dtype(first);
            p->ready = 1;
            dup2(1, 2); // why a run ended stands among its lines
            for (; p->next < total; p->next++) {
                int run = p->next % n_runs;
                dtype = first + p->next % per_case / n_runs;
                recompute = runs[leave + run].recompute;
                printf("%s%s%s", paths[p->next / per_case], dtype == COMPUTE_BF16 ? " in bf16" : "",
                       recompute ? ", recompute" : "");
#ifdef GPU
                gpu.sms = runs[leave + run].sms;
                printf(", multiprocessors: %d", gpu.sms);
#endif
                printf("\n");
                p->good = (run ? p->good : 0) + run_case(paths[p->next / per_case]);
                p->passed += p->good == n_runs;
            }
            exit(0);
        }
        int status;
        while (waitpid(child, &status, 0) < 0 && errno == EINTR) continue;
        if (!p->ready) return 1;
        if (p->next == total) break;
        printf("  ended the program with %s %d  FAIL\n", WIFSIGNALED(status) ? "signal" : "exit status",
               WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
        p->good = -n_runs;
        p->next++;
    }
    printf("%d passed, %d failed\n", p->passed, total / n_runs - p->passed);
    return p->passed < total / n_runs || !total;
}

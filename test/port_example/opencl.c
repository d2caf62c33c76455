// A port of the forward pass to OpenCL 1.2: fpdm_cpu.c includes this file in the place of its model_forward. Training
// and sampling around it, and for the time being the backward pass, stay the CPU's.
//
//   make port_example      builds and runs test_opencl: all cases of test/cases (Debian: pocl-opencl-icd,
//                          opencl-headers, ocl-icd-opencl-dev)
//   make sample_opencl && ./sample_opencl
//   oclgrind --data-races ./test_opencl --dtype=fp32 FILE      finds missing barriers, which pocl hides
//
// Activations and weights are one allocation each, so the device gets two buffers, and a pointer of fpdm_cpu.c becomes
// a place in one of them: no list of tensors. Both buffers use the host's memory. Between to_host and to_device that
// memory is the host's: there, any function of fpdm_cpu.c can do the work of a kernel that is not written yet, and all
// tests pass from the first kernel on. A device with memory of its own then copies both buffers each time, which is
// right but slow. A full port makes them in model_create, fills them in model_upload, and never needs to_host in a
// step.

#define CL_TARGET_OPENCL_VERSION 120
#include <CL/cl.h>

enum { GROUP = 64, TILE = 16 }; // work-items of a group; in `linear`, TILE x TILE

static struct {
    cl_context context;
    cl_command_queue queue;
    cl_program program;
    cl_mem activations, weights; // of the forward pass under way
} opencl;

static void check(cl_int error, const char *what) {
    if (error) die("OpenCL: %s: error %d", what, error);
}

static void opencl_open(void) {
    static char text[1 << 16];
    const char *source = text, *path = "test/port_example/kernels.cl";
    char options[64];
    cl_platform_id platform;
    cl_device_id device;
    cl_int error;
    if (clGetPlatformIDs(1, &platform, NULL) || clGetDeviceIDs(platform, CL_DEVICE_TYPE_ALL, 1, &device, NULL))
        die("OpenCL: no device; Debian's pocl-opencl-icd makes one of the CPU");
    opencl.context = clCreateContext(NULL, 1, &device, NULL, NULL, &error);
    check(error, "clCreateContext");
    opencl.queue = clCreateCommandQueue(opencl.context, device, 0, &error);
    check(error, "clCreateCommandQueue");
    FILE *f = fopen(path, "r");
    if (!f || !fread(text, 1, sizeof text - 1, f))
        die("%s: %s; run this in the project's folder", path, strerror(errno));
    fclose(f);
    opencl.program = clCreateProgramWithSource(opencl.context, 1, &source, NULL, &error);
    check(error, path);
    snprintf(options, sizeof options, "-DGROUP=%d -DTILE=%d", GROUP, TILE);
    if (clBuildProgram(opencl.program, 1, &device, options, NULL, NULL)) {
        clGetProgramBuildInfo(opencl.program, device, CL_PROGRAM_BUILD_LOG, sizeof text - 1, text, NULL);
        die("%s: %s", path, text);
    }
}

// The host sees and may change activations: after to_host, until to_device.
static void to_host(Model *m) {
    cl_int error;
    clEnqueueMapBuffer(opencl.queue, opencl.activations, CL_TRUE, CL_MAP_READ | CL_MAP_WRITE, 0, m->activation_bytes, 0,
                       NULL, NULL, &error);
    check(error, "clEnqueueMapBuffer");
}
static void to_device(Model *m) {
    check(clEnqueueUnmapMemObject(opencl.queue, opencl.activations, m->activations, 0, NULL, NULL), "unmap");
}

// Where a pointer is in its buffer, as kernels count: -1 for NULL
static cl_long act(const Model *m, const real *p) { return p ? p - m->activations : -1; }
static cl_long weight(const Model *m, const real *p) { return p ? p - m->p.patch_w : -1; } // the first of all weights

// Starts a kernel with `groups` groups of `size` work-items and scratch for GROUP + `scratch` floats.
#define RUN(name, groups, size, scratch, ...) \
    run(name, groups, size, scratch, (cl_long[]){__VA_ARGS__}, sizeof((cl_long[]){__VA_ARGS__}) / sizeof(cl_long))
static void run(const char *name, size_t groups, size_t size, size_t scratch, const cl_long *numbers, size_t count) {
    cl_int error;
    size_t items = groups * size;
    cl_kernel kernel = clCreateKernel(opencl.program, name, &error);
    check(error, name);
    check(clSetKernelArg(kernel, 0, sizeof(cl_mem), &opencl.activations), name);
    check(clSetKernelArg(kernel, 1, sizeof(cl_mem), &opencl.weights), name);
    check(clSetKernelArg(kernel, 2, (GROUP + scratch) * sizeof(float), NULL), name);
    for (size_t i = 0; i < count; i++)
        check(clSetKernelArg(kernel, (cl_uint)(3 + i), sizeof(cl_long), &numbers[i]), name);
    check(clEnqueueNDRangeKernel(opencl.queue, kernel, 1, NULL, &items, &size, 0, NULL, NULL), name);
    check(clReleaseKernel(kernel), name);
}

static size_t groups_of(size_t count, size_t size) { return (count + size - 1) / size; }

// out (M,N) = x (M,K)·w^T + b + add, see the kernel; M is B·T.
static void device_linear(Model *m, real *out, const real *x, const real *w, int ldw, const real *b, const real *add,
                          int add_rows, int K, int N) {
    int M = m->B * config_tokens(&m->config);
    RUN("linear", groups_of(M, TILE) * groups_of(N, TILE), TILE * TILE, 0, act(m, out), act(m, x), weight(m, w), ldw,
        weight(m, b), act(m, add), add_rows, M, N, K);
}

static void device_layernorm(Model *m, real *out, const real *x, const real *mod, int stride) {
    int T = config_tokens(&m->config), D = m->config.width;
    RUN("layernorm_modulate", m->B * T, GROUP, 0, act(m, out), act(m, x), act(m, mod), stride, T, D);
}

static void device_gelu(Model *m, real *out, const real *x, int columns) {
    size_t count = (size_t)m->B * config_tokens(&m->config) * columns;
    RUN("gelu", groups_of(count, GROUP), GROUP, 0, act(m, out), act(m, x), count);
}

static void device_gated_residual(Model *m, real *out, const real *x, const real *gate, const real *branch) {
    int T = config_tokens(&m->config), D = m->config.width;
    size_t count = (size_t)m->B * T * D;
    RUN("gated_residual", groups_of(count, GROUP), GROUP, 0, act(m, out), act(m, x), act(m, gate), 6 * D,
        act(m, branch), T, D, count);
}

static void device_patches(Model *m, real *tokens, real *pictures, int to_picture, int C) {
    int S = m->config.image_size;
    size_t count = (size_t)m->B * C * S * S;
    RUN("patches", groups_of(count, GROUP), GROUP, 0, act(m, tokens), act(m, pictures), to_picture, C, S,
        m->config.patch, count);
}

static void device_copy(Model *m, real *out, const real *x) {
    size_t to = (size_t)act(m, out) * sizeof(real), from = (size_t)act(m, x) * sizeof(real);
    size_t bytes = (size_t)m->B * config_tokens(&m->config) * m->config.width * sizeof(real);
    cl_mem a = opencl.activations;
    if (out != x) check(clEnqueueCopyBuffer(opencl.queue, a, a, from, to, bytes, 0, NULL, NULL), "a copy");
}

// From here on as in fpdm_cpu.c, call by call.

static void device_block(Model *m, real *out, const real *x, Layer *l, int index) {
    Activations *a = &m->a;
    const BlockParams *p = &m->p.block[index];
    const real *mod = block_mod(m, a->mod, index);
    int T = config_tokens(&m->config), D = m->config.width, H = m->config.heads;
    device_layernorm(m, a->normed, x, mod, 6 * D);
    device_linear(m, l->qkv, a->normed, p->qkv_w, D, p->qkv_b, NULL, 1, D, 3 * D);
    RUN("attention", m->B * H * T, GROUP, T, act(m, l->att), act(m, l->lse), act(m, l->qkv), T, D, H);
    device_linear(m, l->proj, l->att, p->proj_w, D, p->proj_b, NULL, 1, D, D);
    device_gated_residual(m, out, x, mod + 2 * D, l->proj);
    device_layernorm(m, a->normed, out, mod + 3 * D, 6 * D);
    device_linear(m, l->fc1, a->normed, p->fc1_w, D, p->fc1_b, NULL, 1, D, 4 * D);
    device_gelu(m, a->gelu, l->fc1, 4 * D);
    device_linear(m, l->fc2, a->gelu, p->fc2_w, 4 * D, p->fc2_b, NULL, 1, 4 * D, D);
    device_gated_residual(m, out, out, mod + 5 * D, l->fc2);
}

static void device_iteration(Model *m, real *out, Layer *l) {
    Activations *a = &m->a;
    int D = m->config.width, M = m->B * config_tokens(&m->config);
    device_linear(m, l->u, l->x, m->p.fp1_w, 2 * D, NULL, a->inj_part, M, D, 2 * D);
    device_gelu(m, a->gelu, l->u, 2 * D);
    device_linear(m, l->in, a->gelu, m->p.fp2_w, 2 * D, m->p.fp2_b, NULL, 1, 2 * D, D);
    device_block(m, out, l->in, l, m->config.pre_depth);
}

static void show(Model *m, const char *name, int k, const real *data, int64_t count) {
    if (!m->probe) return;
    to_host(m);
    show_probe(m, name, k, data, count);
    to_device(m);
}

// From z in l->x, as fixed_point_forward. What sampling asks of an iteration is the CPU's.
static Layer *device_fixed_point(Model *m, Layer *l, int n, int grad_iters, Solve *solve) {
    Activations *a = &m->a;
    size_t count = (size_t)config_tokens(&m->config) * m->config.width;
    int watched = solve && (solve->want_residual || solve->window);
    for (int k = 1; k <= n + grad_iters; k++) {
        Layer *next = k <= n ? l : l + 1;
        real *z = next->x;
        if (watched) device_copy(m, a->z_before, l->x);
        device_iteration(m, z, l);
        l = next;
        show(m, "act.z", k, z, (int64_t)(m->B * count));
        if (!solve) continue;
        solve->ran = k;
        if (watched) to_host(m);
        if (solve->want_residual) solve->residuals[k - 1] = residual_of(z, a->z_before, m->B, count);
        int last = k == n + grad_iters || (solve->want_residual && solve->residuals[k - 1] < solve->tol);
        if (solve->window)
            anderson_forward(z, a->z_before, a->history, a->gram, k, solve->window, last ? 1 : solve->mixing, m->B,
                             count);
        if (watched) to_device(m);
        if (last) break;
    }
    return l;
}

static void model_forward(Model *m, const int *t, const int *y, int B, int n, int grad_iters, Solve *solve) {
    const Config *c = &m->config;
    Activations *a = &m->a;
    int T = config_tokens(c), D = c->width, p = c->patch, Cout = config_out_channels(c), i = 0, error = 0;
    int64_t N = (int64_t)B * T * D;
    Layer *l = a->layer;
    if (m->half) die("the OpenCL port computes in fp32: say --dtype fp32");
    m->B = B;
    m->grad_iters = c->fixed_point ? grad_iters : 0;
    condition_forward(m, t, y); // one row a picture
    if (!opencl.program) opencl_open();
    opencl.activations = clCreateBuffer(opencl.context, CL_MEM_READ_WRITE | CL_MEM_USE_HOST_PTR, m->activation_bytes,
                                        m->activations, &error);
    check(error, "activations");
    opencl.weights = clCreateBuffer(opencl.context, CL_MEM_READ_ONLY | CL_MEM_USE_HOST_PTR,
                                    (size_t)m->n_params * sizeof(real), m->p.patch_w, &error);
    check(error, "weights");
    device_patches(m, a->patches, a->x_t, 0, c->channels);
    device_linear(m, l->x, a->patches, m->p.patch_w, c->channels * p * p, m->p.patch_b, a->pos, T, c->channels * p * p,
                  D);
    show(m, "act.tokens", 0, l->x, N);
    for (; i < (c->fixed_point ? c->pre_depth : c->depth); i++, l++) device_block(m, l[1].x, l->x, l, i);
    if (c->fixed_point) {
        show(m, "act.pre", 0, l->x, N);
        device_linear(m, a->inj, l->x, m->p.inject_w, D, m->p.inject_b, NULL, 1, D, D);
        device_linear(m, a->inj_part, a->inj, m->p.fp1_w + D, 2 * D, m->p.fp1_b, NULL, 1, D, 2 * D);
        show(m, "act.inj", 0, a->inj, N);
        const real *start = solve && solve->reuse && solve->reuse_ready ? a->reused : l->x;
        l++;
        device_copy(m, l->x, start);
        l = device_fixed_point(m, l, n, grad_iters, solve);
        if (solve && solve->reuse) {
            device_copy(m, a->reused, l->x);
            solve->reuse_ready = 1;
        }
        if (c->skip)
            RUN("add", groups_of((size_t)N, GROUP), GROUP, 0, act(m, l->x), act(m, a->layer[c->pre_depth].x), N);
        for (i++; i < config_blocks(c); i++, l++) device_block(m, l[1].x, l->x, l, i);
    }
    show(m, "act.post", 0, l->x, N);
    device_layernorm(m, a->normed, l->x, a->final_mod, 2 * D);
    device_linear(m, a->patch_out, a->normed, m->p.final_w, D, m->p.final_b, NULL, 1, D, p * p * Cout);
    device_patches(m, a->patch_out, a->out, 1, Cout);
    show(m, "output", 0, a->out, (int64_t)B * Cout * c->image_size * c->image_size);
    to_host(m);
    to_device(m); // a buffer that is mapped may not go
    check(clFinish(opencl.queue), "clFinish");
    check(clReleaseMemObject(opencl.activations), "clReleaseMemObject");
    check(clReleaseMemObject(opencl.weights), "clReleaseMemObject");
}

// test_harness.cu: tests cuda_emu, and is an example of what it can run. The same tests pass on a GPU, where they check
// that the harness and the hardware agree; those for what only the harness reports are left out there. What the
// language lacks, LAUNCH, ldmatrix_x4, mma_bf16, cp_async16 ..., comes from fpdm.cu.
//
//     make test_harness && ./test_harness       make test_harness_gpu: on a GPU
//     ./test_harness           prints a line a test, last "N passed, N failed"; exit status 1 if any failed
//     ./test_harness bench     what the harness costs

#include "../fpdm.cu"
#include <cmath>
#include <ctime>
#include <string>
#include <sys/wait.h>
#include <vector>

// ---------------------------------------------------------------------------------------------------------------------
// Utilities

static int passed = 0, failed = 0;

static void expect(bool ok, const char *what) {
    ++(ok ? passed : failed);
    printf("%-70s %s\n", what, ok ? "ok" : "FAIL");
}

// Device memory that holds a copy of `host`, or n elements.
template <typename T>
struct Device {
    T *p = nullptr;
    size_t n;
    explicit Device(size_t n_) : n(n_) { CHECK(cudaMalloc(&p, n * sizeof(T))); }
    explicit Device(const std::vector<T> &host) : Device(host.size()) {
        CHECK(cudaMemcpy(p, host.data(), n * sizeof(T), cudaMemcpyHostToDevice));
    }
    Device(const Device &) = delete;
    ~Device() { CHECK(cudaFree(p)); }
    std::vector<T> get() const {
        std::vector<T> host(n);
        CHECK(cudaMemcpy(host.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
        return host;
    }
};

static float random_float() { return float(rand()) / float(RAND_MAX) * 2 - 1; }

static std::vector<float> random_floats(size_t n) {
    std::vector<float> v(n);
    for (float &x : v) x = random_float();
    return v;
}

static float max_difference(const std::vector<float> &a, const std::vector<float> &b) {
    float worst = a.size() == b.size() ? 0 : INFINITY;
    for (size_t i = 0; i < a.size() && i < b.size(); i++)
        if (std::isnan(a[i] - b[i]) || std::fabs(a[i] - b[i]) > worst) worst = std::fabs(a[i] - b[i]); // NaN stays
    return worst;
}

// ---------------------------------------------------------------------------------------------------------------------
// Matrix products

constexpr int M = 32, N = 16, K = 64, STEP = 16, PAD = 8; // PAD: rows of a tile 48 bytes apart, still 16-byte aligned

// c (M,N) = a (M,K) · b in bf16; b is (N,K), or (K,N) if b_rows. Rows of a from `rows` on count as zero. Each of two
// warps computes 16×16; tiles of STEP columns come by cp.async, the next while this one is multiplied.
template <bool b_rows>
__global__ void __launch_bounds__(64)
    product_kernel(float *c, const __nv_bfloat16 *a, const __nv_bfloat16 *b, int rows) {
    __shared__ __align__(16) __nv_bfloat16 tile_a[2][M][STEP + PAD];
    __shared__ __align__(16) __nv_bfloat16 tile_b[2][16][16 + PAD];
    int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    auto fetch = [&](int buffer, int k) {
        int row = int(threadIdx.x) / 2, column = int(threadIdx.x) % 2 * 8;
        cp_async16(&tile_a[buffer][row][column], a + (row < rows ? row * K + k + column : 0), row < rows);
        if (row < 16)
            cp_async16(&tile_b[buffer][row][column], b_rows ? b + (k + row) * N + column : b + row * K + k + column,
                       true);
        cp_async_commit();
    };
    float d[2][4] = {};
    fetch(0, 0);
    for (int k = 0; k < K; k += STEP) {
        int buffer = k / STEP % 2;
        if (k + STEP < K)
            fetch(1 - buffer, k + STEP);
        else
            cp_async_commit(); // an empty group, so that the wait below means the same in every round
        cp_async_wait<1>();
        __syncthreads();
        uint32_t fragment_a[4], fragment_b[4];
        ldmatrix_x4(fragment_a, &tile_a[buffer][warp * 16 + lane % 16][lane / 16 * 8]);
        if (b_rows)
            ldmatrix_x4_trans(fragment_b, &tile_b[buffer][lane % 16][lane / 16 * 8]);
        else
            ldmatrix_x4(fragment_b, &tile_b[buffer][lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
#pragma unroll
        for (int half = 0; half < 2; half++) mma_bf16(d[half], fragment_a, fragment_b + 2 * half);
        __syncthreads();
    }
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 4; i++)
            c[(warp * 16 + lane / 4 + i / 2 * 8) * N + half * 8 + lane % 4 * 2 + i % 2] = d[half][i];
}

static std::vector<float> product(const std::vector<float> &a, const std::vector<float> &b, int m, int n, int k) {
    std::vector<float> c(size_t(m * n));
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            double sum = 0;
            for (int l = 0; l < k; l++) sum += double(a[size_t(i * k + l)]) * double(b[size_t(l * n + j)]);
            c[size_t(i * n + j)] = float(sum);
        }
    return c;
}

static void test_matmul() {
    std::vector<float> a = random_floats(M * K), b = random_floats(K * N);
    std::vector<__nv_bfloat16> a16(M * K), b_rows(K * N), b_columns(K * N);
    const int rows = 29;
    for (int i = 0; i < M * K; i++) {
        a16[size_t(i)] = __float2bfloat16(a[size_t(i)]);
        a[size_t(i)] = i < rows * K ? __bfloat162float(a16[size_t(i)]) : 0;
    }
    for (int k = 0; k < K; k++)
        for (int n = 0; n < N; n++) {
            float &x = b[size_t(k * N + n)];
            b_rows[size_t(k * N + n)] = b_columns[size_t(n * K + k)] = __float2bfloat16(x);
            x = __bfloat162float(b_rows[size_t(k * N + n)]);
        }
    std::vector<float> want = product(a, b, M, N, K);
    Device<__nv_bfloat16> da(a16), db_rows(b_rows), db_columns(b_columns);
    Device<float> c(M * N);
    LAUNCH((product_kernel<false>), 1, 64, 0, 0, c.p, da.p, db_columns.p, rows);
    expect(max_difference(c.get(), want) < 1e-5f, "mma bf16: cp.async, ldmatrix, zero-filled rows");
    LAUNCH((product_kernel<true>), 1, 64, 0, 0, c.p, da.p, db_rows.p, rows);
    expect(max_difference(c.get(), want) < 1e-5f, "mma bf16: ldmatrix.trans");
}

// out[i][lane][r]: what the two forms of ldmatrix give for a tile of 32 rows of 8 numbers 0..255.
__global__ void ldmatrix_forms(uint32_t *out) {
    SHARED_DYNAMIC(unsigned short, tile);
    int lane = int(threadIdx.x);
    for (int i = 0; i < 8; i++) tile[lane * 8 + i] = (unsigned short)(lane * 8 + i);
    __syncwarp();
    uint32_t r[2][4] = {};
    ldmatrix_x4(r[0], tile + lane * 8);
    ldmatrix_x4_trans(r[1], tile + lane * 8);
    for (int i = 0; i < 8; i++) out[(i / 4 * 32 + lane) * 4 + i % 4] = r[i / 4][i % 4];
}

static void test_ldmatrix() {
    Device<uint32_t> out(2 * 32 * 4);
    LAUNCH(ldmatrix_forms, 1, 32, 32 * 8 * 2, 0, out.p);
    std::vector<uint32_t> got = out.get();
    bool ok = true;
    for (int form = 0; form < 2; form++)
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                int g = lane / 4, q = lane % 4 * 2;
                int low = form ? q * 8 + g : g * 8 + q, high = form ? low + 8 : low + 1;
                uint32_t want = uint32_t((i * 64 + low) | (i * 64 + high) << 16);
                ok = ok && got[size_t((form * 32 + lane) * 4 + i)] == want;
            }
    expect(ok, "ldmatrix and its transpose");
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads together

// out[block] = sum of the block's part of x; out[blocks + block] = its greatest element.
__global__ void reduce(float *out, const float *x) {
    __shared__ float sums[32], tops[32];
    unsigned i = threadIdx.x, warps = (blockDim.x + 31) / 32;
    float sum = x[blockIdx.x * blockDim.x + i], top = sum;
    for (int s = 16; s > 0; s /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, s);
        top = fmaxf(top, __shfl_down_sync(0xffffffffu, top, unsigned(s)));
    }
    if (i % 32 == 0) {
        sums[i / 32] = sum;
        tops[i / 32] = top;
    }
    __syncthreads();
    if (i < 32) {
        sum = i < warps ? sums[i] : 0;
        top = i < warps ? tops[i] : -INFINITY;
        for (int s = 16; s > 0; s /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, s);
            top = fmaxf(top, __shfl_down_sync(0xffffffffu, top, unsigned(s)));
        }
        if (i == 0) {
            out[blockIdx.x] = sum;
            out[gridDim.x + blockIdx.x] = top;
        }
    }
}

static void test_reduce() {
    bool ok = true;
    for (unsigned threads = 32; threads <= 1024; threads += 32) {
        const unsigned blocks = 5;
        std::vector<float> x(blocks * threads), want(2 * blocks);
        for (unsigned b = 0; b < blocks; b++) {
            want[blocks + b] = -INFINITY;
            for (unsigned i = 0; i < threads; i++) {
                float v = x[b * threads + i] = float(rand() % 1000 - 500); // whole numbers: sums are exact
                want[b] += v;
                want[blocks + b] = fmaxf(want[blocks + b], v);
            }
        }
        Device<float> dx(x), out(2 * blocks);
        LAUNCH(reduce, blocks, threads, 0, 0, out.p, dx.p);
        ok = ok && max_difference(out.get(), want) == 0;
    }
    expect(ok, "sum and maximum by shuffles in blocks of 32 to 1024 threads");
}

// All kinds of shuffles; whole and half warps.
__global__ void lanes(double *out) {
    int lane = int(threadIdx.x), half = lane / 16;
    unsigned all = 0xffffffffu, mine = half ? 0xffff0000u : 0x0000ffffu;
    double v = lane + 0.25, *o = out + lane * 6;
    o[0] = __shfl_sync(all, v, 3);
    o[1] = __shfl_sync(all, lane, lane + 1, 8);
    o[2] = __shfl_up_sync(all, float(v), 5, 16);
    o[3] = __shfl_down_sync(all, unsigned(lane), 3, 8);
    o[4] = __shfl_xor_sync(all, v, 9, 8);
    if (half)
        o[5] = __shfl_xor_sync(mine, lane, 1);
    else
        o[5] = __shfl_xor_sync(mine, lane, 2);
    __syncwarp();
}

static void test_lanes() {
    Device<double> out(32 * 6);
    LAUNCH(lanes, 1, 32, 0, 0, out.p);
    std::vector<double> got = out.get();
    bool ok = true;
    for (int l = 0; l < 32; l++) {
        double want[6] = {3.25,
                          double(l / 8 * 8 + (l + 1) % 8),
                          l % 16 >= 5 ? l - 4.75 : l + 0.25,
                          double(l % 8 < 5 ? l + 3 : l),
                          (l ^ 9) <= (l | 7) ? (l ^ 9) + 0.25 : l + 0.25,
                          double(l < 16 ? l ^ 2 : l ^ 1)};
        for (int i = 0; i < 6; i++) ok = ok && got[size_t(l * 6 + i)] == want[i];
    }
    expect(ok, "shuffles of all kinds, half warps");
}

struct Sizes {
    int x, y, z;
};
__device__ inline int cell(Sizes s, int x, int y, int z) { return (z * s.y + y) * s.x + x; }

// out[cell] = a number that tells the cell
__global__ void fill_3d(int *out, Sizes s) {
    int x = int(blockIdx.x * blockDim.x + threadIdx.x);
    int y = int(blockIdx.y * blockDim.y + threadIdx.y);
    if (x >= s.x || y >= s.y) return;
    for (int z = int(blockIdx.z * blockDim.z + threadIdx.z); z < s.z; z += int(gridDim.z * blockDim.z))
        out[cell(s, x, y, z)] = x + 100 * y + 10000 * z;
}

static void test_grid() {
    const Sizes s = {37, 11, 23};
    Device<int> out(size_t(s.x * s.y * s.z));
    LAUNCH(fill_3d, dim3(5, 3, 2), dim3(8, 4, 5), 0, 0, out.p, s);
    std::vector<int> got = out.get();
    bool ok = true;
    for (int z = 0; z < s.z; z++)
        for (int y = 0; y < s.y; y++)
            for (int x = 0; x < s.x; x++) ok = ok && got[size_t((z * s.y + y) * s.x + x)] == x + 100 * y + 10000 * z;
    expect(ok, "grids and blocks of three dimensions, strides");
}

// ---------------------------------------------------------------------------------------------------------------------
// Asynchronous copies, numbers, runtime

// Copies of 16 bytes in two groups, of which every third is not valid
__global__ void copies(uint32_t *out, const uint32_t *in) {
    SHARED_DYNAMIC(uint32_t, s);
    unsigned i = threadIdx.x, n = blockDim.x;
    for (unsigned group = 0; group < 2; group++) {
        cp_async16(s + (group * n + i) * 4, in + (group * n + i) * 4, i % 3 != 2);
        cp_async_commit();
    }
    cp_async_wait<1>();
    __syncthreads();
    for (unsigned j = i; j < n * 4; j += n) out[j] = s[n * 4 - 1 - j]; // another thread's
    cp_async_wait<0>();
    __syncthreads();
    for (unsigned j = n * 4 + i; j < n * 8; j += n) out[j] = s[j];
}

static void test_copies() {
    const unsigned n = 96;
    std::vector<uint32_t> in(n * 8);
    for (uint32_t &x : in) x = uint32_t(rand());
    Device<uint32_t> din(in), out(n * 8);
    LAUNCH(copies, 1, n, n * 32, 0, out.p, din.p);
    std::vector<uint32_t> got = out.get();
    bool ok = true;
    for (unsigned j = 0; j < n * 4; j++) ok = ok && got[n * 4 - 1 - j] == (j / 4 % 3 != 2 ? in[j] : 0);
    for (unsigned j = n * 4; j < n * 8; j++) ok = ok && got[j] == (j / 4 % n % 3 != 2 ? in[j] : 0);
    expect(ok, "cp.async, zero fill");
}

__global__ void numbers(float *out, float x, float y) {
    uint32_t pair = pack_bf16(x, y);
    float slope, result[8] = {__uint_as_float(pair << 16),
                              __uint_as_float(pair & 0xffff0000u),
                              exp2f(x),
                              rsqrtf(y),
                              min(x, y),
                              __fdividef(x, y),
                              float(max(3, 4)),
                              gelu(x, &slope)};
    for (int i = 0; i < 8; i++) out[i] = result[i];
}

static void test_numbers() {
    auto bits_of = [](bf16 x) {
        uint16_t bits;
        memcpy(&bits, &x, 2);
        return bits;
    };
    bool ok = true;
    for (uint32_t i = 0; i < 65536; i++) { // a bf16, and what lies below, at and above halfway to the next
        uint32_t exponent = i >> 7 & 255;
        if (exponent == 255) continue;
        const uint32_t low[5] = {0, 0x7fff, 0x8000, 0x8001, 0xffff};
        for (int j = 0; j < 5; j++) {
            uint32_t word = i << 16 | low[j];
            float x;
            memcpy(&x, &word, 4);
            uint32_t want = j < 2 || (j == 2 && i % 2 == 0) ? i : i + 1;
            ok = ok && bits_of(__float2bfloat16_rn(x)) == want;
        }
    }
    ok = ok && bits_of(__float2bfloat16_rn(NAN)) == 0x7fff;
    expect(ok, "bf16 rounds to nearest, ties to even");

    const float x = 1.2345f, y = 7.891f;
    Device<float> out(8);
    LAUNCH(numbers, 1, 1, 0, 0, out.p, x, y);
    float bx = bf16_to_float(float_to_bf16(x)), by = bf16_to_float(float_to_bf16(y));
    float g = 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    std::vector<float> want = {bx, by, exp2f(x), 1 / sqrtf(y), x, x / y, 4, g};
    expect(max_difference(out.get(), want) < 1e-5f, "intrinsics and conversions");
}

__global__ void add_number(float *x, int n, float a) {
    int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) x[i] += a;
}

static void test_graph() {
    const int n = 100;
    float a = 1;
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    Device<float> x(n), y(n);
    CHECK(cudaMemset(y.p, 0, n * sizeof(float)));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    CHECK(cudaMemsetAsync(x.p, 0, n * sizeof(float), stream));
    LAUNCH(add_number, 2, 64, 0, stream, x.p, n, a);
    a = 2; // the graph keeps the value that it was given
    LAUNCH(add_number, 2, 64, 0, stream, x.p, n, a);
    LAUNCH(add_number, 2, 64, 0, stream, y.p, n, 1.0f);
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, nullptr, nullptr, 0));
    CHECK(cudaGraphDestroy(graph));
    bool nothing_yet = y.get() == std::vector<float>(n, 0.0f);
    for (int i = 0; i < 3; i++) CHECK(cudaGraphLaunch(exec, stream));
    CHECK(cudaStreamSynchronize(stream));
    expect(nothing_yet && x.get() == std::vector<float>(n, 3.0f) && y.get() == std::vector<float>(n, 3.0f),
           "a graph does nothing when captured, and all at each launch");
    CHECK(cudaGraphExecDestroy(exec));

    CHECK(cudaStreamDestroy(stream));

    cudaDeviceProp device;
    size_t before, after, total;
    CHECK(cudaGetDeviceProperties(&device, 0));
    CHECK(cudaMemGetInfo(&before, &total));
    void *none = nullptr;
    bool refused = cudaMalloc(&none, total * 2) == cudaErrorMemoryAllocation;
    refused = refused && cudaGetLastError() == cudaErrorMemoryAllocation && cudaGetLastError() == cudaSuccess;
    CHECK(cudaMemGetInfo(&after, &total));
    expect(device.warpSize == 32 && device.major >= 8 && refused && before == after && before <= total,
           "properties, a refused allocation");
}

// Dynamic shared memory beyond 48 KiB must be asked for.
__global__ void large_shared(float *out, int n) {
    SHARED_DYNAMIC(float, s);
    for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) s[i] = float(i);
    __syncthreads();
    if (threadIdx.x == 0) out[0] = s[n - 1] + s[n / 2];
}

static void test_large_shared() {
    const int n = 80 * 256;
    Device<float> out(1);
    CHECK(cudaFuncSetAttribute(large_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, n * 4));
    LAUNCH(large_shared, 1, 128, n * 4, 0, out.p, n);
    expect(out.get()[0] == float(n - 1 + n / 2), "80 KiB of shared memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// What only the harness does: make mistakes visible, or report them

#ifndef __CUDACC__

// A sum over neighbours within the block; `sync` says which barrier is there: 0 none, 1 __syncwarp, 2 __syncthreads.
__global__ void neighbours(float *out, int distance, int sync, float a) {
    __shared__ float s[128];
    int i = int(threadIdx.x), n = int(blockDim.x);
    s[i] = float(i) + a; // a differs from launch to launch, so that what the last one left is not right by chance
    if (sync == 1) __syncwarp();
    if (sync == 2) __syncthreads();
    out[i] = s[(i + distance) % n] + s[(i + n - distance) % n] - 2 * a;
}

__global__ void who_is_last(int *out) { out[threadIdx.x] = int(blockIdx.x); }

static void test_races() {
    Device<float> out(128);
    Device<int> last(1);
    // Whether the orders forward, backward and shuffled agree on the result.
    auto agree = [&](int distance, int sync) {
        std::vector<float> results[3];
        for (unsigned i = 0; i < 3; i++) {
            emu::order = i;
            LAUNCH(neighbours, 1, 128, 0, 0, out.p, distance, sync, float(i));
            results[i] = out.get();
        }
        return max_difference(results[0], results[1]) == 0 && max_difference(results[0], results[2]) == 0;
    };
    expect(!agree(32, 0) && !agree(32, 1) && agree(32, 2), "a race between warps shows, and a barrier ends it");
    expect(!agree(1, 0) && !agree(1, 1), "a race between lanes shows");
    emu::order = 0;
    LAUNCH(who_is_last, 4, 1, 0, 0, last.p);
    int forward = last.get()[0];
    emu::order = 1;
    LAUNCH(who_is_last, 4, 1, 0, 0, last.p);
    expect(forward == 3 && last.get()[0] == 0, "a race between blocks shows");
}

// Reads what nobody wrote, and a copy in flight.
__global__ void unwritten(float *out, const float *in) {
    SHARED_DYNAMIC(float, dynamic);
    __shared__ float fixed[32];
    out[1] = dynamic[0];
    out[2] = fixed[blockIdx.x];
    dynamic[0] = fixed[blockIdx.x] = 1; // the next block must not see this
    dynamic[4] = 1;
    cp_async16(dynamic + 4, in, true);
    cp_async_commit();
    out[3] = dynamic[4];
    cp_async_wait<0>();
    out[4] = dynamic[4];
}

static void test_unwritten() {
    std::vector<float> in = {5, 6, 7, 8};
    Device<float> out(5), din(in);
    LAUNCH(unwritten, 2, 1, 32, 0, out.p, din.p);
    std::vector<float> got = out.get();
    bool fixed_too = std::isnan(got[2]);
    expect(std::isnan(got[0]) && std::isnan(got[1]) && (fixed_too || !EMU_FILLS_STATIC_SHARED),
           "unwritten memory is NaN");
    expect(std::isnan(got[3]) && got[4] == 5, "a copy in flight is NaN until waited for");
}

// Each of these makes the mistake `what`.
enum Mistake {
    RETURN_BEFORE_BARRIER,
    TWO_BARRIERS,
    HALF_WARP_MMA,
    WRONG_MASK,
    OTHER_LINE,
    LANE_NOT_IN_MASK,
    MISALIGNED_COPY,
    FORGOTTEN_COPY,
    WRITE_TARGET,
    WRITE_SOURCE,
    NOT_SHARED,
    PAST_SHARED,
    PAST_DYNAMIC,
    PAST_STATIC,
    PAST_GLOBAL,
    BEFORE_GLOBAL,
    MISALIGNED_VECTOR
};

__global__ void mistake(float *x, int n, Mistake what) {
    SHARED_DYNAMIC(float, dynamic);
    __shared__ __align__(16) float fixed[24];
    int i = int(threadIdx.x), j = i + n; // n elements of everything, so j is past the end
    uint32_t r[4] = {};
    float d[4] = {}, *start = what == PAST_STATIC ? fixed : dynamic;
    fixed[i % 24] = dynamic[i] = x[i] = 0;
    __syncthreads();
    switch (what) {
        case RETURN_BEFORE_BARRIER:
            if (i >= 40) return;
            __syncthreads();
            break;
        case TWO_BARRIERS:
            if (i < 32)
                __syncthreads();
            else
                __syncthreads();
            break;
        case HALF_WARP_MMA:
            if (i % 32 < 16) mma_bf16(d, r, r);
            break;
        case WRONG_MASK:
            x[i] = __shfl_xor_sync(i < 7 ? 0x0000ffffu : 0xffffffffu, x[i], 1);
            break;
        case OTHER_LINE:
            if (i % 2)
                x[i] = __shfl_xor_sync(0xffffffffu, x[i], 1);
            else
                x[i] = __shfl_xor_sync(0xffffffffu, x[i], 1);
            break;
        case LANE_NOT_IN_MASK:
            if (i % 32 < 4) x[i] = __shfl_down_sync(0x0000000fu, x[i], 1);
            break;
        case MISALIGNED_COPY:
            cp_async16(dynamic + 1, x, true);
            break;
        case FORGOTTEN_COPY:
            if (i % 4 == 0) cp_async16(dynamic + i, x + i, true);
            cp_async_commit();
            cp_async_wait<1>();
            break;
        case WRITE_TARGET:
        case WRITE_SOURCE:
            if (i % 4 == 0) cp_async16(dynamic + i, x + i, true);
            cp_async_commit();
            (what == WRITE_TARGET ? dynamic : x)[i] = 1;
            cp_async_wait<0>();
            break;
        case NOT_SHARED:
            ldmatrix_x4(r, x + i % 32 * 4);
            break;
        case PAST_SHARED:
            ldmatrix_x4(r, dynamic + i / 32 * 32 + i % 32 * 4);
            break;
        case PAST_DYNAMIC:
            dynamic[j] = 1;
            break;
        case PAST_STATIC:
            start[i == 5 ? 24 : 0] = 1;
            break;
        case PAST_GLOBAL:
            x[j] = 1;
            break;
        case BEFORE_GLOBAL:
            x[i - 1] = 1;
            break;
        case MISALIGNED_VECTOR:
            load(d, x + 1);
            break;
    }
    x[i] = d[0] + float(r[0]) + fixed[i % 24];
}

// Runs f in another process; whether it ended badly and printed `text`.
template <typename F>
static bool reports(const char *text, F &&f) {
    int ends[2];
    if (pipe(ends)) return false;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        f();
        fflush(stderr);
        _exit(0);
    }
    close(ends[1]);
    std::string output;
    char part[4096];
    for (ssize_t n; (n = read(ends[0], part, sizeof part)) > 0;) output.append(part, size_t(n));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    bool ok = status != 0 && output.find(text) != std::string::npos;
    if (!ok) printf("     expected: %s\n     got:      %.600s\n", text, output.c_str());
    return ok;
}

static void test_reports() {
    const int n = 64;
    auto try_kernel = [&](Mistake what, const char *text, const char *name) {
        bool ok = reports(text, [&] {
            Device<float> x(n);
            LAUNCH(mistake, 1, n, n * sizeof(float), 0, x.p, n, what);
            CHECK(cudaDeviceSynchronize());
        });
        expect(ok, name);
    };
    try_kernel(RETURN_BEFORE_BARRIER, "24 returned\n    40 wait at __syncthreads",
               "reported: a barrier after some returned");
    try_kernel(TWO_BARRIERS, "but others at that of line", "reported: two barriers at once");
    try_kernel(HALF_WARP_MMA, "32 wait at mma_bf16", "reported: mma by half a warp");
    try_kernel(WRONG_MASK, "but lane", "reported: masks that differ");
    try_kernel(OTHER_LINE, "but lane", "reported: shuffles on two lines");
    try_kernel(LANE_NOT_IN_MASK, "reads lane 4, which is not in the mask", "reported: a shuffle from outside the mask");
    try_kernel(MISALIGNED_VECTOR, "is not aligned to 16 bytes", "reported: a vector load not aligned");
    try_kernel(MISALIGNED_COPY, "is not aligned to 16 bytes", "reported: cp.async not aligned");
    try_kernel(FORGOTTEN_COPY, "never waits for its last 1 cp_async", "reported: cp.async without wait");
    try_kernel(WRITE_TARGET, "a target was written while", "reported: the target of a cp.async written");
    try_kernel(WRITE_SOURCE, "a source was written while", "reported: the source of a cp.async written");
    auto report = [](const char *text, const char *name, auto &&f) { expect(reports(text, f), name); };
    std::vector<float> host(n);
    report("argument 0 is not device memory", "reported: a host pointer given to a kernel",
           [&] { LAUNCH(add_number, 1, n, 0, 0, host.data(), n, 1.0f); });
    report("not device memory", "reported: cudaMemcpy past the end", [&] {
        Device<float> x(n - 1);
        CHECK(cudaMemcpy(x.p, host.data(), n * sizeof(float), cudaMemcpyHostToDevice));
    });
    report("not device memory", "reported: cudaMemcpy in the wrong direction", [&] {
        Device<float> x(n);
        CHECK(cudaMemcpy(host.data(), x.p, n * sizeof(float), cudaMemcpyHostToDevice));
    });
    report("a block of 1025", "reported: a block too large", [&] {
        Device<float> x(n);
        LAUNCH(add_number, 1, 1025, 0, 0, x.p, n, 1.0f);
    });
    report("need cudaFuncSetAttribute", "reported: shared memory beyond the limit", [&] {
        Device<float> x(n);
        LAUNCH(add_number, 1, n, 49153, 0, x.p, n, 1.0f);
    });
    report("not permitted when stream is capturing", "reported: synchronising during a capture", [] {
        cudaStream_t stream;
        CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
        CHECK(cudaDeviceSynchronize());
    });
    report("the host in a graph", "reported: a host buffer in a graph", [&] {
        cudaStream_t stream;
        Device<float> x(n);
        CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
        CHECK(cudaMemcpyAsync(x.p, host.data(), n * sizeof(float), cudaMemcpyHostToDevice, stream));
    });
    report("changed before the stream was waited for", "reported: a host buffer changed too early", [&] {
        Device<float> x(n);
        CHECK(cudaMemcpyAsync(x.p, host.data(), n * sizeof(float), cudaMemcpyHostToDevice));
        host[n / 2] = 7;
        CHECK(cudaDeviceSynchronize());
    });
#ifdef __SANITIZE_ADDRESS__
    try_kernel(PAST_SHARED, "AddressSanitizer", "reported: ldmatrix past shared memory");
    try_kernel(PAST_DYNAMIC, "AddressSanitizer", "reported: past dynamic shared memory");
    try_kernel(PAST_STATIC, "AddressSanitizer", "reported: past static shared memory");
    try_kernel(PAST_GLOBAL, "AddressSanitizer", "reported: past device memory");
    try_kernel(BEFORE_GLOBAL, "AddressSanitizer", "reported: before device memory");
    report("AddressSanitizer", "reported: device memory read by the host", [&] {
        Device<float> x(n);
        printf("%f\n", double(x.p[n / 2]));
    });
    report("AddressSanitizer", "reported: a gap between two tensors", [&] {
        Device<float> x(n);
        emu::redzone(x.p + n / 2, 16);
        LAUNCH(add_number, 1, n / 2 + 1, 0, 0, x.p, n, 1.0f);
        CHECK(cudaDeviceSynchronize());
    });
    report("AddressSanitizer", "reported: a host buffer freed too early", [&] {
        Device<float> x(n);
        float *buffer = new float[n]();
        CHECK(cudaMemcpyAsync(x.p, buffer, n * sizeof(float), cudaMemcpyHostToDevice));
        delete[] buffer;
        CHECK(cudaDeviceSynchronize());
    });
#elif EMU_FILLS_STATIC_SHARED
    try_kernel(NOT_SHARED, "is not this block's shared memory", "reported: ldmatrix of device memory");
    try_kernel(PAST_SHARED, "is not this block's shared memory", "reported: ldmatrix past shared memory");
#endif
}

// A stream does nothing before the host waits for it, nor because it waits for another one.
static void test_streams() {
    cudaStream_t a, b;
    Device<float> x(1);
    float early = -1, late = -1;
    CHECK(cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking));
    CHECK(cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking));
    CHECK(cudaMemsetAsync(x.p, 0, sizeof(float), a));
    LAUNCH(add_number, 1, 1, 0, a, x.p, 1, 1.0f);
    CHECK(cudaMemcpyAsync(&late, x.p, sizeof late, cudaMemcpyDeviceToHost, a));
    CHECK(cudaMemcpyAsync(&early, x.p, sizeof early, cudaMemcpyDeviceToHost, b));
    CHECK(cudaStreamSynchronize(b));
    bool waits = std::isnan(early) && late == -1;
    CHECK(cudaStreamSynchronize(a));
    expect(waits && late == 1, "a stream's work is done when the host waits for it");
    CHECK(cudaStreamDestroy(a));
    CHECK(cudaStreamDestroy(b));
}

// 1 + 8 products of 2^-24 in one mma, twice: truncated, they vanish; exact, they are 2^-20
__global__ void small_terms(float *out) {
    float d[4] = {1, 1, 1, 1};
    const uint32_t a[4] = {0x39803980u, 0x39803980u, 0x39803980u, 0x39803980u}, b[2] = {a[0], a[0]}; // 2^-12
    mma_bf16(d, a, b);
    out[threadIdx.x] = d[0];
}

static void test_rough() {
    Device<float> out(32);
    LAUNCH(small_terms, 1, 32, 0, 0, out.p);
    expect(out.get()[5] == (emu::roughly ? 1 : 1 + 0x1p-20f), "sums of tensor cores, truncated if asked for");
    int differ = 0;
    float worst = 0;
    for (float x = 0.1f; x < 10; x += 0.1f) {
        differ += emu::rough(x) != x;
        worst = fmaxf(worst, fabsf(emu::rough(x) - x) / x);
    }
    expect(emu::roughly ? differ > 50 && worst < 3e-7f : !differ, "fast functions, off by 2 ulp if asked for");
}

// ---------------------------------------------------------------------------------------------------------------------
// What it costs

__global__ void many_syncwarps(int n) {
    for (int i = 0; i < n; i++) __syncwarp();
}
__global__ void many_barriers(int n) {
    for (int i = 0; i < n; i++) __syncthreads();
}
__global__ void many_shuffles(float *out, int n) {
    float x = float(threadIdx.x);
    for (int i = 0; i < n; i++) x += __shfl_xor_sync(0xffffffffu, x, 1 << i % 5);
    out[threadIdx.x] = x;
}
__global__ void many_mmas(float *out, int n) {
    float d[4] = {};
    uint32_t a[4] = {threadIdx.x, 1, 2, 3}, b[2] = {4, 5};
    for (int i = 0; i < n; i++) mma_bf16(d, a, b);
    out[threadIdx.x] = d[0];
}
__global__ void many_ldmatrices(uint32_t *out, int n) {
    SHARED_DYNAMIC(uint32_t, s);
    uint32_t r[4], sum = 0;
    for (int i = 0; i < 4; i++) s[threadIdx.x * 4 + unsigned(i)] = threadIdx.x;
    for (int i = 0; i < n; i++) {
        ldmatrix_x4(r, s + threadIdx.x * 4);
        sum += r[0] + r[3];
    }
    out[threadIdx.x] = sum;
}

template <typename F>
static void measure(const char *name, double operations, F &&f) {
    double best = 1e9;
    for (int i = 0; i < 10; i++) {
        timespec start, end;
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &start);
        f();
        CHECK(cudaDeviceSynchronize());
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &end);
        best = std::fmin(best, double(end.tv_sec - start.tv_sec) + 1e-9 * double(end.tv_nsec - start.tv_nsec));
    }
    printf("%-32s %8.1f ns\n", name, best / operations * 1e9);
}

static void run_benchmarks() {
    const int n = 20000;
    Device<float> out(1 << 16);
    Device<uint32_t> words(32);
    measure("switch (by __syncwarp)", n * 32.0, [&] { LAUNCH(many_syncwarps, 1, 32, 0, 0, n); });
    measure("__syncthreads, a thread of 256", n / 8 * 256.0, [&] { LAUNCH(many_barriers, 1, 256, 0, 0, n / 8); });
    measure("shuffle, a warp", n, [&] { LAUNCH(many_shuffles, 1, 32, 0, 0, out.p, n); });
    measure("mma_bf16, a warp", n, [&] { LAUNCH(many_mmas, 1, 32, 0, 0, out.p, n); });
    measure("ldmatrix_x4, a warp", n, [&] { LAUNCH(many_ldmatrices, 1, 32, 512, 0, words.p, n); });
    measure("a thread that does not wait", 65536, [&] { LAUNCH(add_number, 256, 256, 0, 0, out.p, 65536, 1.0f); });
    measure("launch of one block of 256", 1000, [&] {
        for (int i = 0; i < 1000; i++) LAUNCH(add_number, 1, 256, 0, 0, out.p, 0, 1.0f);
    });
}

#endif

int main(int argc, char **argv) {
    if (argc > 2 || (argc == 2 && strcmp(argv[1], "bench") != 0)) {
        fprintf(stderr, "usage: %s [bench]\n", argv[0]);
        return 1;
    }
    void (*tests[])() = {test_matmul, test_ldmatrix, test_reduce, test_lanes,       test_grid,
                         test_copies, test_numbers,  test_graph,  test_large_shared};
#ifdef __CUDACC__
    for (auto test : tests) test();
#else
    if (argc == 2) return run_benchmarks(), 0;
    for (unsigned order : {0u, 1u, 12345u}) {
        emu::order = order;
        printf("order %u\n", order);
        for (auto test : tests) test();
        test_unwritten();
        test_reports();
        test_streams();
        test_rough();
    }
    test_races();
#endif
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}

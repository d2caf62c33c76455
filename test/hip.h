// hip.h: what fpdm.cu needs to run on AMD's GPUs, from HIP or, to see that it compiles, from clang alone:
//
//     hipcc -x hip -std=c++17 -O3 --offload-arch=gfx90a -DPROGRAM=TRAIN fpdm.cu -o train_hip    with ROCm, and
//     hipcc -x hip -std=c++17 -O3 --offload-arch=gfx90a -DGPU test/test.c -o test_hip
//     clang++ -x hip -std=c++17 -O3 --offload-arch=gfx90a -nogpuinc -nogpulib --cuda-device-only -S fpdm.cu
//
// -DWARP=64 for CDNA (gfx90a, gfx942), whose matrix cores have MFMA, -DWARP=32 for RDNA 3 (gfx1100), which has WMMA.
// `make hip` does the last for all of them. Nobody has run it on such a GPU: the fragments, where a port goes wrong
// first, are tested on a CPU, in the layouts of AMD's documents: `make test_cdna test_rdna` builds
// these tests.

#ifndef FPDM_HIP_H
#define FPDM_HIP_H
#ifndef OWN_FRAGMENTS
#define OWN_FRAGMENTS // the harness is told so on the command line
#endif

#ifndef WARP
#define WARP 64
#endif

#ifdef __HIP__

// ---------------------------------------------------------------------------------------------------------------------
// The language and the runtime

#ifdef __CLANG_HIP_RUNTIME_WRAPPER_H__ // ROCm is there
#include <hip/hip_runtime.h>
#undef __launch_bounds__ // its second number means something else there
#undef __align__
#else
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __host__ __attribute__((host))
#define __shared__ __attribute__((shared))
struct dim3 {
    unsigned x, y, z;
    __host__ __device__ constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
#define BUILTIN(name, read)                                    \
    struct {                                                   \
        __device__ unsigned read_x() const { return read(x); } \
        __device__ unsigned read_y() const { return read(y); } \
        __device__ unsigned read_z() const { return read(z); } \
        __declspec(property(get = read_x)) unsigned x;         \
        __declspec(property(get = read_y)) unsigned y;         \
        __declspec(property(get = read_z)) unsigned z;         \
    } static const __device__ name __attribute__((unused)) = {}
#define THREAD(d) __builtin_amdgcn_workitem_id_##d()
#define BLOCK(d) __builtin_amdgcn_workgroup_id_##d()
#define THREADS(d) __builtin_amdgcn_workgroup_size_##d()
#define BLOCKS(d) (__builtin_amdgcn_grid_size_##d() / __builtin_amdgcn_workgroup_size_##d())
BUILTIN(threadIdx, THREAD);
BUILTIN(blockIdx, BLOCK);
BUILTIN(blockDim, THREADS);
BUILTIN(gridDim, BLOCKS);
#undef BUILTIN
#undef THREAD
#undef BLOCK
#undef THREADS
#undef BLOCKS

__device__ inline void __syncthreads() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

// fp64 has no instructions for these: calls that ROCm's device library would answer
extern "C" __device__ __attribute__((const)) double __ocml_exp_f64(double);
extern "C" __device__ __attribute__((const)) double __ocml_log_f64(double);
extern "C" __device__ __attribute__((const)) double __ocml_tanh_f64(double);
static __device__ inline double exp(double x) { return __ocml_exp_f64(x); }
static __device__ inline double log(double x) { return __ocml_log_f64(x); }
static __device__ inline double tanh(double x) { return __ocml_tanh_f64(x); }
static __device__ inline float sqrtf(float x) { return __builtin_sqrtf(x); }
static __device__ inline float fminf(float x, float y) { return __builtin_fminf(x, y); }
static __device__ inline float fmaxf(float x, float y) { return __builtin_fmaxf(x, y); }
static __device__ inline float exp2f(float x) { return __builtin_exp2f(x); }
static __device__ inline float log2f(float x) { return __builtin_log2f(x); }
static __device__ inline float fmaf(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
static __device__ inline float expf(float x) { return __builtin_exp2f(1.4426950408889634f * x); }
static __device__ inline float __fdividef(float x, float y) { return x * __builtin_amdgcn_rcpf(y); }
static __device__ inline float rsqrtf(float x) { return 1 / __builtin_sqrtf(x); }
static __device__ inline void *memcpy(void *to, const void *from, size_t n) { return __builtin_memcpy(to, from, n); }
static __device__ inline void *memset(void *to, int byte, size_t n) { return __builtin_memset(to, byte, n); }
static __device__ inline int min(int a, int b) { return a < b ? a : b; }
static __device__ inline int max(int a, int b) { return a > b ? a : b; }

// The runtime, for the sake of the host's code, which is read but not compiled here
typedef int hipError_t;
typedef struct Unknown *hipStream_t, *hipGraph_t, *hipGraphExec_t;
enum Error {
    hipSuccess,
    hipErrorOutOfMemory,
    hipErrorNoBinaryForGpu,
    hipMemcpyHostToDevice,
    hipMemcpyDeviceToHost,
    hipMemcpyDeviceToDevice
};
enum Flags { hipStreamNonBlocking, hipStreamCaptureModeRelaxed, hipFuncAttributeMaxDynamicSharedMemorySize };
struct hipDeviceProp_t {
    char name[256];
    int major, minor, multiProcessorCount, warpSize, sharedMemPerBlock;
};
extern "C" unsigned __hipPushCallConfiguration(dim3 grid, dim3 block, size_t shared, hipStream_t stream);
extern "C" const char *hipGetErrorString(hipError_t error);
#define DECLARE(name)        \
    template <typename... P> \
    hipError_t name(P...)
DECLARE(hipMalloc);
DECLARE(hipFree);
DECLARE(hipMemcpyAsync);
DECLARE(hipMemsetAsync);
DECLARE(hipMemGetInfo);
DECLARE(hipGetLastError);
DECLARE(hipGetDeviceCount);
DECLARE(hipSetDevice);
DECLARE(hipGetDeviceProperties);
DECLARE(hipStreamCreateWithFlags);
DECLARE(hipStreamSynchronize);
DECLARE(hipStreamBeginCapture);
DECLARE(hipStreamEndCapture);
DECLARE(hipGraphInstantiate);
DECLARE(hipGraphLaunch);
DECLARE(hipGraphDestroy);
DECLARE(hipGraphExecDestroy);
DECLARE(hipFuncSetAttribute);
#undef DECLARE
#endif

#if defined(__HIP_DEVICE_COMPILE__) && defined(__AMDGCN_WAVEFRONT_SIZE)
static_assert(WARP == __AMDGCN_WAVEFRONT_SIZE, "say -DWARP=32 for RDNA, -DWARP=64 for CDNA");
#endif
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(threads, ...) __attribute__((amdgpu_flat_work_group_size(1, threads)))
#define LAUNCH(kernel, grid, block, smem, stream, ...) kernel<<<grid, block, smem, stream>>>(__VA_ARGS__)
#define SHARED_DYNAMIC(type, name)                                  \
    extern __shared__ __align__(1024) unsigned char shared_bytes[]; \
    type *name = reinterpret_cast<type *>(shared_bytes)

#define cudaError_t hipError_t
#define cudaSuccess hipSuccess
#define cudaErrorMemoryAllocation hipErrorOutOfMemory
#define cudaErrorNoKernelImageForDevice hipErrorNoBinaryForGpu
#define cudaGetErrorString hipGetErrorString
#define cudaGetLastError hipGetLastError
#define cudaGetDeviceCount hipGetDeviceCount
#define cudaSetDevice hipSetDevice
#define cudaDeviceProp hipDeviceProp_t
#define cudaGetDeviceProperties hipGetDeviceProperties
#define sharedMemPerBlockOptin sharedMemPerBlock // there is no more to ask for
#define cudaMemGetInfo hipMemGetInfo
#define cudaMalloc hipMalloc
#define cudaFree hipFree
#define cudaMemcpyAsync hipMemcpyAsync
#define cudaMemsetAsync hipMemsetAsync
#define cudaMemcpyHostToDevice hipMemcpyHostToDevice
#define cudaMemcpyDeviceToHost hipMemcpyDeviceToHost
#define cudaMemcpyDeviceToDevice hipMemcpyDeviceToDevice
#define cudaStream_t hipStream_t
#define cudaStreamNonBlocking hipStreamNonBlocking
#define cudaStreamCreateWithFlags hipStreamCreateWithFlags
#define cudaStreamSynchronize hipStreamSynchronize
#define cudaStreamCaptureModeRelaxed hipStreamCaptureModeRelaxed
#define cudaStreamBeginCapture hipStreamBeginCapture
#define cudaStreamEndCapture hipStreamEndCapture
#define cudaGraph_t hipGraph_t
#define cudaGraphExec_t hipGraphExec_t
#define cudaGraphInstantiate hipGraphInstantiate
#define cudaGraphLaunch hipGraphLaunch
#define cudaGraphDestroy hipGraphDestroy
#define cudaGraphExecDestroy hipGraphExecDestroy
#define cudaFuncAttributeMaxDynamicSharedMemorySize hipFuncAttributeMaxDynamicSharedMemorySize
#define cudaFuncSetAttribute(kernel, what, value) hipFuncSetAttribute((const void *)(kernel), what, value)

// bf16 only converts, to nearest, ties to even
struct __nv_bfloat16 {
    uint16_t bits;
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
__device__ inline float __bfloat162float(__nv_bfloat16 a) { return __builtin_bit_cast(float, (uint32_t)a.bits << 16); }
__device__ inline __nv_bfloat16 __float2bfloat16_rn(float a) {
    uint32_t u = __builtin_bit_cast(uint32_t, a);
    return {a != a ? (uint16_t)0x7fff : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
__device__ inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

// The lanes of a wave go in step: what they write to shared memory must only not be moved.
#if !defined(HIP_VERSION) || HIP_VERSION < 70000000 // later ones have it
__device__ inline void __syncwarp() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
    __builtin_amdgcn_wave_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}
#endif

// Copies that are done when they are asked for
__device__ inline void cp_async16(void *smem, const void *gmem, bool valid) {
    typedef uint32_t Sixteen __attribute__((ext_vector_type(4))); // bytes
    *(Sixteen *)smem = valid ? *(const Sixteen *)gmem : (Sixteen)(0);
}
__device__ inline void cp_async_commit() {}
template <int N>
__device__ inline void cp_async_wait() {}

__device__ inline float fast_exp2(float x) { return exp2f(x); }
__device__ inline unsigned anew(unsigned x) { return x; }

// x of another lane: of 4 or 8 bytes
template <typename T>
__device__ inline T lane_get(T x, int lane) {
    int word[sizeof(T) / 4];
    memcpy(word, &x, sizeof x);
    for (int &w : word) w = __builtin_amdgcn_ds_bpermute(4 * lane, w);
    memcpy(&x, word, sizeof x);
    return x;
}

// d += a·b, all 16x16, one instruction
__device__ inline void matrix_bf16(float *d, const uint32_t *a, const uint32_t *b) {
    enum { HALVES = WARP == 64 ? 4 : 16 };
    typedef short Halves __attribute__((ext_vector_type(HALVES)));
    typedef float Floats __attribute__((ext_vector_type(256 / WARP)));
    Halves x, y;
    Floats z;
    memcpy(&x, a, sizeof x);
    memcpy(&y, b, sizeof y);
    memcpy(&z, d, sizeof z);
#ifdef __HIP_DEVICE_COMPILE__
#if WARP == 64
    z = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(x, y, z, 0, 0, 0);
#else
    z = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(x, y, z);
#endif
#endif
    memcpy(d, &z, sizeof z);
}

#else // through cuda_emu.h
template <typename T>
inline T lane_get(T x, int lane) {
    return __shfl_sync(emu::ALL_LANES, x, lane);
}
#endif

template <typename T>
__device__ inline T lane_xor(T x, int i) {
    return lane_get(x, (int)(threadIdx.x % WARP) ^ i);
}

// ---------------------------------------------------------------------------------------------------------------------
// Fragments, as under that word in fpdm.cu. Of d = a·b, lane l of matrix_bf16 has in place i
//   a: CDNA row l%16, column 4·(l/16) + i (4 places); RDNA row l%16, column i (16, the same in both halves of the warp)
//   b: the same, transposed
//   d: CDNA row 4·(l/16) + i, column l%16 (4 places); RDNA row 2·i + l/16, column l%16 (8)
// (AMD's "CDNA3 ISA" and "RDNA3 ISA" guides, V_MFMA and V_WMMA.) Products are therefore made transposed, as b^T·a^T: a
// lane then has one row of the result, and on CDNA neighbours in it, as on RDNA too when b's rows come in the order 0,
// 8, 1, 9, ... And a result is laid out as the next product's operand, but that RDNA wants both halves.

enum { FRAG_ROWS = 1, FRAG_COLS = 16, FRAG_RUNS = 64 / WARP, FRAG_RUN = 4, FRAG_STEP = 16 };
typedef float FragRun[FRAG_RUN];
typedef FragRun Frag[FRAG_ROWS][FRAG_RUNS];
typedef uint32_t Left[WARP == 64 ? 2 : 8], Right[WARP == 64 ? 2 : 8];
__device__ inline int frag_row(int) { return threadIdx.x % 16; }
__device__ inline int frag_col(int j) {
    return threadIdx.x % WARP / 16 * (4 * FRAG_RUNS) + j / FRAG_RUNS * 16 + j % FRAG_RUNS * 4;
}

// `row` of a Left or a Right
template <bool SLOW, typename F>
__device__ inline void operand_load(Left r, int row, F at) {
    int k = WARP == 64 ? threadIdx.x % WARP / 16 * 4 : 0;
    if (SLOW) {
        uint16_t v[sizeof(Left) / 2];
        for (int i = 0; i < (int)sizeof v / 2; i++) memcpy(&v[i], at(k + i, row / 8) + row % 8, 2);
        memcpy(r, v, sizeof v);
    } else if (WARP == 64) {
        memcpy(r, __builtin_assume_aligned(at(row, k / 8) + k % 8, 8), 8);
    } else {
        memcpy(r, __builtin_assume_aligned(at(row, 0), 16), 16);
        memcpy(r + WARP / 8, __builtin_assume_aligned(at(row, 1), 16), 16);
    }
}

template <bool SLOW, bool HALF, typename F>
__device__ inline void left_load(Left a, F at) {
    static_assert(!HALF, "a head's channels are a multiple of 16 here");
    operand_load<SLOW>(a, threadIdx.x % 16, at);
}

enum RightForm { RIGHT_FAST, RIGHT_SLOW, RIGHT_SLOW_DEEP };
template <int FORM, bool HALF, typename F>
__device__ inline void right_load(Right (&b)[2], F at) {
    static_assert(!HALF, "");
    int col = threadIdx.x % 16;
    if (WARP == 32) col = col / 2 + col % 2 * 8;
    for (int i = 0; i < 2; i++)
        operand_load<FORM != RIGHT_FAST>(b[i], col, [&](int row, int piece) {
            return FORM == RIGHT_SLOW ? at(row, 2 * i + piece) : at(16 * i + row, piece);
        });
}

template <bool HALF = false>
__device__ inline void frag_multiply(Frag d, const Left a, const Right b) { matrix_bf16(d[0][0], b, a); }

__device__ inline void left_from(Left a, const Frag *p) {
    __nv_bfloat162 pair[2 * FRAG_RUNS];
    for (int i = 0; i < 2 * FRAG_RUNS; i++)
        pair[i] = __floats2bfloat162_rn((*p)[0][i / 2][i % 2 * 2], (*p)[0][i / 2][i % 2 * 2 + 1]);
    memcpy(a, pair, sizeof pair);
    for (int i = 0; WARP == 32 && i < 4; i++) {
        bool upper = threadIdx.x % 32 >= 16; // k from 8 on
        uint32_t own = a[i], other = lane_xor(own, 16);
        a[i] = upper ? other : own;
        a[WARP / 8 + i] = upper ? own : other;
    }
}

__device__ inline float frag_value(const Frag p, int, int k) {
    return lane_get(p[0][k / 4 % FRAG_RUNS][k % 4], (int)(threadIdx.x % 16) + k / (4 * FRAG_RUNS) * 16);
}

#endif

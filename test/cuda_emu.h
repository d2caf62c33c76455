// cuda_emu: runs CUDA source on a CPU, to test it where there is no GPU, and to see what a GPU would forgive.
//
//     g++ -x c++ -std=c++17 -O3 -Wall -Wextra -Wshadow -Wno-unknown-pragmas -DPROGRAM=TRAIN
//         fpdm.cu test/cuda_emu.cpp    (or clang++)
//     ... -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined    to check every access
//     EMU_ORDER=0|1|N ./program      blocks, warps and lanes run forward, backward, or shuffled with seed N, and then
//                                    whoever waits makes room for a random one that need not
//     EMU_ROUGH=1 ./program          tensor cores truncate their sums and fast functions err by up to 2 ulp
//     g++ ... -DOWN_FRAGMENTS -DWARP=64    as on AMD's GPUs: test/hip.h's fragments, waves of 64 lanes (CDNA), or 32
//                                    (RDNA)
//     EMU_KERNELS=FILE ./program     appends to FILE each kernel that the program can launch, and how often it did
//
// It is also the first port of fpdm.cu: a new accelerator has to give a meaning to the same names.
//   1. the language: __global__ __device__ __shared__ ..., threadIdx, __nv_bfloat16, exp2f
//   2. what the threads of a block do together: __syncthreads, __syncwarp, shuffles
//   3. what stands in fpdm.cu as PTX under #ifdef NVIDIA, here under the same names:
//        ldmatrix_x4, ldmatrix_x4_trans (uint32_t *r, const void *smem)            8x8 tiles of 16 bits to registers
//        mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2])            d += a b, 16x8 += 16x16 * 16x8
//        mma_bf16_half(float d[4], const uint32_t a[4], const uint32_t b[2])       += 16x8 * 8x8: a[0], a[1], b[0]
//      (a matrix unit that holds its operands otherwise replaces these four by what stands under "Fragments": hip.h)
//        cp_async16(void *smem, const void *gmem, bool valid)                      zeros if not valid
//        cp_async_commit(), cp_async_wait<N>()                                     all but the N newest groups landed
//        fast_exp2(float x)                                                        2^x, within 2 ulp
//        anew(unsigned x)                                                          x
//   4. two macros, for what is not C++:
//        LAUNCH(kernel, grid, block, smem_bytes, stream, arguments...)             LAUNCH((kernel<A, B>), ...)
//        SHARED_DYNAMIC(type, name);                                               type *name = dynamic shared memory
//   5. the runtime: cudaMalloc, cudaMemcpyAsync, streams, graphs: the last section of this file
// test/test_harness.cu shows all of them, and checks them here and on a GPU.
//
// Each thread of a block is a fiber: a stack of its own and a switch of a dozen instructions. A fiber runs until it has
// to wait; the last lane to arrive at an operation of its warp does it for all. A thread that never waits needs no
// switch: a kernel without synchronisation is a loop. Blocks run one after another: for two cores, run two processes.
// What goes into a stream runs as late as it may: when the host waits for that stream.
//
// Reported, with kernel, block, thread and line, then abort():
//   - a barrier, shuffle, ldmatrix or mma that part of the threads do not reach, or reach on another line or with
//     another mask; a shuffle from a lane outside the mask
//   - cp.async and ldmatrix out of shared or device memory or misaligned; a copy nobody waits for; a source or target
//     that is written while the copy is in flight
//   - a pointer that __builtin_assume_aligned is wrong about
//   - a kernel's pointer argument, or a cudaMemcpy, that is not of the right memory or too long; launch limits
//   - a host buffer that changes before the stream of its copy is waited for; one that goes into a graph
//   - with AddressSanitizer: accesses outside of an allocation, of dynamic or static __shared__ memory, host code that
//     touches device memory, host buffers that are freed while a copy needs them. Tensors that share an allocation need
//     emu::redzone(p, bytes) in gaps between them
// Made visible: fresh device and shared memory and the target of a copy in flight are NaN (all bits set; static
// __shared__ only without sanitizers); a race between threads of a kernel makes results differ between orders.
// Not seen: host pointers inside a struct argument; lack of __threadfence; bank conflicts, and speed.
// Not there: what fpdm.cu does not use, among it waiting on another block or warp through memory, atomics, events,
// textures, `extern __shared__` (use SHARED_DYNAMIC), launches from several host threads, thread_local variables.

#ifndef CUDA_EMU_H
#define CUDA_EMU_H

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

// ---------------------------------------------------------------------------------------------------------------------
// The language

// Static __shared__ variables are thread-local, which puts them together where they can be found, so that each block
// can start with NaN in them. AddressSanitizer does not guard that place, and sanitizers keep variables of their own
// there: with them they are plain statics.
#if defined(__has_feature) // how clang tells; gcc defines __SANITIZE_ADDRESS__
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1
#endif
#if __has_feature(undefined_behavior_sanitizer)
#define __SANITIZE_UNDEFINED__ 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_UNDEFINED__) || !defined(__linux__)
#define EMU_FILLS_STATIC_SHARED 0
#define __shared__ static
#else
#define EMU_FILLS_STATIC_SHARED 1
#define __shared__ static thread_local
#endif
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define SHARED_DYNAMIC(type, name) type *name = reinterpret_cast<type *>(emu::dynamic_shared)
#define LAUNCH(kernel, grid, block, smem, stream, ...) \
    emu::launch<(kernel)>(kernel, grid, block, smem, stream)(__VA_ARGS__)
#define __builtin_assume_aligned(p, bytes) emu::aligned(p, bytes)

#define EMU_VECTORS(T, name2, name4)                       \
    struct alignas(8) name2 {                              \
        T x, y;                                            \
    };                                                     \
    struct alignas(16) name4 {                             \
        T x, y, z, w;                                      \
    };                                                     \
    inline name2 make_##name2(T x, T y) { return {x, y}; } \
    inline name4 make_##name4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTORS(float, float2, float4)
EMU_VECTORS(int, int2, int4)
EMU_VECTORS(unsigned, uint2, uint4)
struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern uint3 threadIdx, blockIdx; // of the thread that runs: set at every switch
extern dim3 blockDim, gridDim;
#ifndef WARP
#define WARP 32
#endif
constexpr int warpSize = WARP;

#define EMU_MIN_MAX(name, floats, order)                \
    template <typename T, typename U>                   \
    constexpr std::common_type_t<T, U> name(T a, U b) { \
        using V = std::common_type_t<T, U>;             \
        if constexpr (std::is_floating_point_v<V>)      \
            return floats(V(a), V(b));                  \
        else                                            \
            return V(a) order V(b) ? V(a) : V(b);       \
    }
EMU_MIN_MAX(min, std::fmin, <)
EMU_MIN_MAX(max, std::fmax, >)

// Macros, because the C library declares some of these names itself.
#define expf(x) emu::rough(expf(x))
#define exp2f(x) emu::rough(exp2f(x))
#define log2f(x) emu::rough(log2f(x))
#define __expf(x) expf(x)
#define __fdividef(x, y) emu::rough((x) / (y))
#define rsqrtf(x) emu::rough(1.0f / sqrtf(x))

namespace emu {
template <typename To, typename From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
extern const bool roughly; // EMU_ROUGH
// x, or a number within 2 units in its last place that follows from it
inline float rough(float x) {
    if (!roughly || !(std::fabs(x) > 1e-30f && std::fabs(x) < 1e30f)) return x;
    uint32_t u = bits<uint32_t>(x);
    return bits<float>(u + (u * 2654435769u >> 16) % 5 - 2);
}
[[noreturn]] __attribute__((format(printf, 1, 2), cold)) void fail(const char *format, ...); // what and where; aborts
inline void *aligned(const void *p, size_t bytes, int line = __builtin_LINE()) {
    if (uintptr_t(p) % bytes) fail("line %d: %p is not aligned to %zu bytes", line, p, bytes);
    return const_cast<void *>(p);
}
} // namespace emu

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline int __float_as_int(float a) { return emu::bits<int>(a); }
inline unsigned __float_as_uint(float a) { return emu::bits<unsigned>(a); }
inline float __int_as_float(int a) { return emu::bits<float>(a); }
inline float __uint_as_float(unsigned a) { return emu::bits<float>(a); }
// Hints for caches: plain loads and stores.
template <typename T>
inline T __ldg(const T *p) {
    return *p;
}
template <typename T>
inline T __ldcs(const T *p) {
    return *p;
}
template <typename T>
inline void __stcs(T *p, T value) {
    *p = value;
}

// bfloat16 only converts here: CUDA's operators would round after each operation, which is never what we want.
struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    explicit __nv_bfloat16(float a) { // to nearest, ties to even; any NaN becomes 0x7fff, as on the GPU
        uint32_t u = emu::bits<uint32_t>(a);
        bits = a != a ? uint16_t(0x7fff) : uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16);
    }
    explicit operator float() const { return emu::bits<float>(uint32_t(bits) << 16); }
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
    __nv_bfloat162() = default;
    __nv_bfloat162(__nv_bfloat16 x_, __nv_bfloat16 y_) : x(x_), y(y_) {}
};
inline __nv_bfloat16 __float2bfloat16(float a) { return __nv_bfloat16(a); }
inline __nv_bfloat16 __float2bfloat16_rn(float a) { return __nv_bfloat16(a); }
inline float __bfloat162float(__nv_bfloat16 a) { return float(a); }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__nv_bfloat16(a), __nv_bfloat16(b)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 a) { return __floats2bfloat162_rn(a.x, a.y); }
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {float(a.x), float(a.y)}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline float __low2float(__nv_bfloat162 a) { return float(a.x); }
inline float __high2float(__nv_bfloat162 a) { return float(a.y); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short a) { return emu::bits<__nv_bfloat16>(a); }

// ---------------------------------------------------------------------------------------------------------------------
// What threads do together. Each of these knows the line that it was called from: threads that meet must be on one.

namespace emu {

extern unsigned order;                            // EMU_ORDER; a test may set it between launches
extern unsigned char *dynamic_shared;             // of the block that runs
extern void (*before_kernel)(const char *kernel); // unless null, called before each kernel runs
typedef uint64_t Lanes;                           // a bit for each lane of a warp
constexpr Lanes ALL_LANES = ~Lanes(0) >> (64 - WARP);
enum Source { INDEX, UP, DOWN, XOR }; // how a shuffle finds the lane to read

void barrier(int line);
void sync_warp(Lanes mask, int line);
uint64_t shuffle(Lanes mask, uint64_t value, Source source, int x, int width, int line);
void ldmatrix(uint32_t *r, const void *smem, bool trans, int line);
void mma(float *d, const uint32_t *a, const uint32_t *b, int line);
void matrix(float *d, const uint32_t *a, const uint32_t *b, int line);
void cp_async(void *smem, const void *gmem, bool valid, int line);
void cp_async_commit();
void cp_async_wait(int keep, int line);

template <typename T>
inline T shuffle_bits(Lanes mask, T value, Source source, int x, int width, int line) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 32 or 64 bits");
    uint64_t word = 0;
    memcpy(&word, &value, sizeof value);
    word = shuffle(mask, word, source, x, width, line);
    memcpy(&value, &word, sizeof value);
    return value;
}
} // namespace emu

#define EMU_LINE int line = __builtin_LINE()
inline void __syncthreads(EMU_LINE) { emu::barrier(line); }
inline void __syncwarp(emu::Lanes mask = emu::ALL_LANES, EMU_LINE) { emu::sync_warp(mask, line); }
#define EMU_SHUFFLE(name, source)                                                \
    template <typename T>                                                        \
    inline T name(emu::Lanes mask, T value, int x, int width = WARP, EMU_LINE) { \
        return emu::shuffle_bits(mask, value, source, x, width, line);           \
    }
EMU_SHUFFLE(__shfl_sync, emu::INDEX)
EMU_SHUFFLE(__shfl_up_sync, emu::UP)
EMU_SHUFFLE(__shfl_down_sync, emu::DOWN)
EMU_SHUFFLE(__shfl_xor_sync, emu::XOR)

inline void ldmatrix_x4(uint32_t *r, const void *smem, EMU_LINE) { emu::ldmatrix(r, smem, false, line); }
inline void ldmatrix_x4_trans(uint32_t *r, const void *smem, EMU_LINE) { emu::ldmatrix(r, smem, true, line); }
inline void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2], EMU_LINE) { emu::mma(d, a, b, line); }
inline void mma_bf16_half(float d[4], const uint32_t a[4], const uint32_t b[2], EMU_LINE) {
    uint32_t left[4] = {a[0], a[1]}, right[2] = {b[0]};
    emu::mma(d, left, right, line);
}
inline void cp_async16(void *smem, const void *gmem, bool valid, EMU_LINE) { emu::cp_async(smem, gmem, valid, line); }
inline float fast_exp2(float x) { return exp2f(x); }
inline unsigned anew(unsigned x) { return x; }
inline void cp_async_commit() { emu::cp_async_commit(); }
template <int N>
inline void cp_async_wait(EMU_LINE) {
    emu::cp_async_wait(N, line);
}
#ifdef OWN_FRAGMENTS
inline void matrix_bf16(float *d, const uint32_t *a, const uint32_t *b, EMU_LINE) { emu::matrix(d, a, b, line); }
#include "hip.h" // the fragments that stand on it
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The runtime: streams keep their work until the host waits for it

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorStreamCaptureUnsupported = 900
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost = 0,
    cudaMemcpyHostToDevice = 1,
    cudaMemcpyDeviceToHost = 2,
    cudaMemcpyDeviceToDevice = 3
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal,
    cudaStreamCaptureModeThreadLocal,
    cudaStreamCaptureModeRelaxed
};
enum { cudaStreamNonBlocking = 1 };

struct cudaDeviceProp { // what exists of it
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock, maxThreadsPerMultiProcessor, regsPerBlock;
    int l2CacheSize;
};
struct EmuStream;
struct EmuGraph;
using cudaStream_t = EmuStream *;
using cudaGraph_t = EmuGraph *;
using cudaGraphExec_t = EmuGraph *;

cudaError_t cudaGetLastError();
const char *cudaGetErrorString(cudaError_t error);

cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device);
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaMemGetInfo(size_t *available, size_t *total);

cudaError_t cudaFree(void *p);
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemset(void *p, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream = nullptr);

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, void *, char *, size_t);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);

namespace emu {

struct Grid {
    const char *name; // the kernel's
    dim3 blocks, threads;
    size_t shared;
};

void redzone(const void *p, size_t bytes); // forbids a part of an allocation (with AddressSanitizer)
void spoil(void *p, size_t bytes);         // makes device memory NaN, now
bool is_device(const void *p, size_t bytes);
cudaError_t allocate(void **p, size_t bytes);
cudaError_t set_attribute(const void *kernel, cudaFuncAttribute attribute, int value);
void check_launch(const Grid &grid, const void *kernel);
void submit(cudaStream_t stream, std::function<void()> work); // to the stream, or to what it captures
void run(const Grid &grid, const std::function<void()> &thread);
long *register_kernel(const char *name); // a place to count the launches of a kernel that the program has

// A kernel with its template arguments. Every one that the program's text can launch registers at the start.
template <auto K>
struct Kernel {
    static const char *name() { return __PRETTY_FUNCTION__; }
    static inline long *launches = register_kernel(name());
};

template <typename... P>
struct Launch {
    static_assert((std::is_trivially_copyable_v<P> && ...), "a kernel's arguments are copied byte by byte");
    void (*kernel)(P...);
    Grid grid;
    cudaStream_t stream;

    void operator()(P... arguments) const {
        int i = 0;
        (check(i++, arguments), ...);
        submit(stream, [k = kernel, g = grid, copied = std::tuple<P...>(arguments...)] {
            run(g, [&] { std::apply(k, copied); });
        });
    }
    template <typename T>
    void check([[maybe_unused]] int i, [[maybe_unused]] T argument) const {
        if constexpr (std::is_pointer_v<T>)
            if (argument && !is_device(argument, 0)) fail("%s: argument %d is not device memory", grid.name, i);
    }
};

template <auto K, typename... P>
inline Launch<P...> launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t s) {
    Grid g{Kernel<K>::name(), grid, block, shared};
    check_launch(g, reinterpret_cast<const void *>(kernel));
    ++*Kernel<K>::launches;
    return {kernel, g, s};
}

} // namespace emu

template <typename T>
inline cudaError_t cudaMalloc(T **p, size_t bytes) {
    return emu::allocate(reinterpret_cast<void **>(p), bytes);
}
template <typename... P>
inline cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
    return emu::set_attribute(reinterpret_cast<const void *>(kernel), attribute, value);
}

#endif

// cuda_emu.h: runs CUDA source on a CPU, to test it where there is no GPU, and to see what a GPU would forgive.
//
//     g++ -x c++ -std=c++17 -O2 -Wall -Wextra -Wshadow -Wno-unknown-pragmas fpdm.cu        clang++ does as well
//     g++ ... -fsanitize=address,undefined                                                 to check every access
//     EMU_ORDER=0|1|N  ./program             blocks, warps and lanes run forward, backward, or shuffled with seed N
//
// It is also the first port of fpdm.cu: a new accelerator has to give a meaning to the same names.
//   1. the language: __global__ __device__ __shared__ ..., threadIdx, float4, __nv_bfloat16, __expf, integer atomics
//   2. what the threads of a block do together: __syncthreads, __syncwarp, shuffles, votes
//   3. what stands in fpdm.cu as PTX under #ifdef __CUDACC__, here under the same names:
//        ldmatrix_x1 _x2 _x4, ldmatrix_x1_trans ... (uint32_t *r, const void *smem)    8×8 tiles of 16 bits to registers
//        mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2])                d += a·b, 16×8 += 16×16 · 16×8
//        mma_tf32(float d[4], const uint32_t a[4], const uint32_t b[2])                d += a·b, 16×8 += 16×8 · 8×8
//        uint32_t to_tf32(float)                                                       rounded to tf32
//        cp_async4 _8 _16 (void *smem, const void *gmem, bool valid)                   zeros if not valid
//        cp_async_commit(), cp_async_wait<N>()                                         all but the N newest groups landed
//   4. two macros, for what is not C++:
//        LAUNCH(kernel, grid, block, smem_bytes, stream, arguments...)                 LAUNCH((kernel<A, B>), ...)
//        SHARED_DYNAMIC(type, name);                                                   type *name = the dynamic shared memory
//   5. the runtime: cudaMalloc, cudaMemcpyAsync, streams, events, graphs: the last section of this file
// test/test_harness.cu shows all of them, with the PTX, and checks them here and on a GPU.
//
// Each thread of a block is a fiber: a stack of its own and a switch of a dozen instructions. A fiber runs until it has
// to wait; the last lane to arrive at an operation of its warp does it for all 32. A thread that never waits needs no
// switch: a kernel without synchronisation is a loop. Blocks run one after another: for two cores, run two processes.
//
// Reported, with kernel, block, thread and line, then abort():
//   - a barrier, shuffle, vote, ldmatrix or mma which part of the threads do not reach, or reach on another line or with
//     another mask; a shuffle from a lane outside the mask
//   - cp.async and ldmatrix out of shared or device memory or misaligned; a copy nobody waits for; a source or target
//     touched while the copy is in flight
//   - a kernel's pointer argument, or a cudaMemcpy, that is not of the right memory or too long; launch limits
//   - with AddressSanitizer: accesses outside of an allocation, of dynamic or of static __shared__ memory, and host code
//     that touches device memory. Tensors that share one allocation need emu::redzone(p, bytes) in gaps between them
//   - with UndefinedBehaviorSanitizer: misaligned vector loads
// Made visible: fresh device and shared memory and the target of a copy in flight are NaN (all bits set; static
// __shared__ only without AddressSanitizer); a race between threads of one kernel makes results differ between orders.
// Not seen: host pointers inside a struct argument; missing waits between streams (every call finishes at once);
// lack of __threadfence; bank conflicts, and speed. Fast intrinsics are exact here: a GPU's __expf errs by some 1e-6.
// Not there: waiting on another block or warp through memory, float atomics, cooperative groups, textures, __half.

#ifndef CUDA_EMU_H
#define CUDA_EMU_H

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include <sys/mman.h>

#if defined(__has_feature) // clang's way to tell; gcc's is __SANITIZE_ADDRESS__
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(EMU_UCONTEXT)
#define EMU_UCONTEXT // any other processor: correct, but a switch takes two system calls
#endif
#ifdef EMU_UCONTEXT
#include <ucontext.h>
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The language

// Static __shared__ variables are collected in a section, so that each block can start with NaN in them. AddressSanitizer
// leaves such sections alone, so under it they are plain statics, with red zones. A "section type conflict" means that a
// __shared__ variable stands in a __device__ function that is inline or a template: give that function a pointer instead.
#if defined(__SANITIZE_ADDRESS__) || !defined(__ELF__)
#define __shared__ static
#else
#define __shared__ static __attribute__((section("emu_shared")))
#endif
#define __global__ static
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define SHARED_DYNAMIC(type, name) type *name = reinterpret_cast<type *>(emu::dynamic_shared)
#define LAUNCH(kernel, grid, block, smem, stream, ...) \
    emu::launch(#kernel, kernel, grid, block, smem, stream)(__VA_ARGS__)

#define EMU_VECTORS(T, name2, name4) \
    struct alignas(8) name2 { \
        T x, y; \
    }; \
    struct alignas(16) name4 { \
        T x, y, z, w; \
    }; \
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

inline uint3 threadIdx, blockIdx; // of the thread that runs: set at every switch
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define EMU_MIN_MAX(name, floats, order) \
    template <typename T, typename U> constexpr std::common_type_t<T, U> name(T a, U b) { \
        using V = std::common_type_t<T, U>; \
        if constexpr (std::is_floating_point_v<V>) return floats(V(a), V(b)); \
        else return V(a) order V(b) ? V(a) : V(b); \
    }
EMU_MIN_MAX(min, std::fmin, <)
EMU_MIN_MAX(max, std::fmax, >)

// Macros, because the C library declares some of these names itself.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanhf(x) tanhf(x)
#define rsqrtf(x) (1.0f / sqrtf(x))

namespace emu {
template <typename To, typename From> inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
} // namespace emu

inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
// No compiler may fuse these two into a multiply-add: volatile keeps ours from it.
inline float __fmul_rn(float a, float b) { return *static_cast<const volatile float *>(&(const float &)(a * b)); }
inline float __fadd_rn(float a, float b) { return *static_cast<const volatile float *>(&(const float &)(a + b)); }
inline float __saturatef(float a) { return fminf(fmaxf(a, 0.0f), 1.0f); }
inline int __float2int_rn(float a) { return int(lrintf(a)); }
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __clz(int a) { return a ? __builtin_clz(unsigned(a)) : 32; }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __float_as_int(float a) { return emu::bits<int>(a); }
inline unsigned __float_as_uint(float a) { return emu::bits<unsigned>(a); }
inline float __int_as_float(int a) { return emu::bits<float>(a); }
inline float __uint_as_float(unsigned a) { return emu::bits<float>(a); }
template <typename T> inline T __ldg(const T *p) { return *p; } // hints for caches: plain loads and stores
template <typename T> inline T __ldcs(const T *p) { return *p; }
template <typename T> inline void __stcs(T *p, T value) { *p = value; }

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
// Fibers

namespace emu {

struct Fiber {
    void *sp = nullptr;          // where it was suspended
    const void *stack = nullptr; // lowest address and size, for AddressSanitizer
    size_t size = 0;
    void *fake_stack = nullptr; // AddressSanitizer's own
#ifdef EMU_UCONTEXT
    ucontext_t context;
#endif
};

inline Fiber main_fiber, *running = &main_fiber;
inline std::vector<Fiber *> idle_fibers;

#ifndef EMU_UCONTEXT
// Saves what a call must preserve on this stack and its pointer in *save, and goes on where `load` was saved. `ret` and
// not a jump, since the processor predicts it: lanes mostly wait at the same place. The symbol is local to this file.
extern "C" void emu_switch(void **save, void *load) asm("emu_switch");
#ifdef __x86_64__
asm(R"(
    .pushsection .text
    .p2align 4
emu_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
    .popsection
)");
constexpr int FRAME = 8, ENTRY = 6; // words that a new stack starts with, and which of them is the return address
#else
asm(R"(
    .pushsection .text
    .p2align 4
emu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp];       stp x21, x22, [sp, #16];  stp x23, x24, [sp, #32]; stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64];  stp x29, x30, [sp, #80];  stp d8, d9, [sp, #96];   stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]; mov x9, sp;              str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp];       ldp x21, x22, [sp, #16];  ldp x23, x24, [sp, #32]; ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64];  ldp x29, x30, [sp, #80];  ldp d8, d9, [sp, #96];   ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]; add sp, sp, #160
    ret
    .popsection
)");
constexpr int FRAME = 20, ENTRY = 11;
#endif
#endif

inline void switch_to(Fiber *to) {
    Fiber *from = running;
    running = to;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, to->size);
#endif
#ifdef EMU_UCONTEXT
    swapcontext(&from->context, &to->context);
#else
    emu_switch(&from->sp, to->sp);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

// An idle fiber, or a new one that starts in `entry`. The memory below each stack is closed: overflow is a fault.
inline Fiber *take_fiber(void (*entry)()) {
    if (!idle_fibers.empty()) {
        Fiber *fiber = idle_fibers.back();
        idle_fibers.pop_back();
        return fiber;
    }
    constexpr size_t guard = 65536, size = 262144; // address space, of which little is ever touched
    void *map = mmap(nullptr, guard + size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *stack = static_cast<char *>(map) + guard;
    if (map == MAP_FAILED || mprotect(stack, size, PROT_READ | PROT_WRITE) != 0) {
        perror("cuda_emu: no memory for the stacks of a block's threads");
        exit(1);
    }
    Fiber *fiber = new Fiber;
    fiber->stack = stack;
    fiber->size = size;
#ifdef EMU_UCONTEXT
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = stack;
    fiber->context.uc_stack.ss_size = size;
    makecontext(&fiber->context, entry, 0);
#else
    void **frame = reinterpret_cast<void **>(stack + size) - FRAME; // fresh pages: the rest is zero
    frame[ENTRY] = reinterpret_cast<void *>(entry);
    fiber->sp = frame;
#endif
    return fiber;
}

// ---------------------------------------------------------------------------------------------------------------------
// Scheduling

constexpr unsigned ALL_LANES = 0xffffffffu, MAX_THREADS = 1024;

struct Thread;
struct Operation { // what a thread can wait for
    const char *name;
    void (*complete)(Thread *lanes, unsigned mask); // does it for the lanes of the mask; null if there is nothing to do
};

struct Copy { // a cp.async in flight
    unsigned char *to;
    const unsigned char *from; // null: zeros
    int bytes, group;
    unsigned char data[16]; // the source when the copy was issued
};

struct Thread {
    uint3 index;
    unsigned number, place;   // in the block; in the order of execution, where the threads of a warp stay together
    Fiber *fiber;             // null: not started, or returned
    const Operation *waits;   // null: can run
    unsigned mask;            // the lanes that it waits for
    int line;                 // and where in the source
    const void *in[2];        // the operation's arguments and result
    void *out;                //
    uint64_t value;           //
    unsigned source;          //
    std::vector<Copy> copies; // in flight, oldest first
    int group;                // what cp_async_commit closes next
};

inline Thread threads[MAX_THREADS], *in_place[MAX_THREADS], *current = nullptr;
inline unsigned waiting[MAX_THREADS / 32];            // by warp, a bit per lane: waits for an operation of the warp
inline unsigned ready[MAX_THREADS / 32], ready_warps; // a bit per place: can run
inline unsigned thread_count, barrier_count;
inline unsigned char *dynamic_shared = nullptr;
inline size_t dynamic_bytes = 0;
inline const char *kernel_name = nullptr; // null between launches
inline const std::function<void()> *kernel_body = nullptr;
inline unsigned order = getenv("EMU_ORDER") ? unsigned(strtoul(getenv("EMU_ORDER"), nullptr, 10)) : 0;

inline constexpr Operation BARRIER{"__syncthreads", nullptr}, RETURNED{"return", nullptr};

// Only a bug comes here, so it ends like an assert.
[[noreturn]] __attribute__((format(printf, 1, 2), cold)) inline void fail(const char *format, ...) {
    fprintf(stderr, "cuda_emu: ");
    if (kernel_name) fprintf(stderr, "kernel %s, block (%u,%u,%u), ", kernel_name, blockIdx.x, blockIdx.y, blockIdx.z);
    if (current) fprintf(stderr, "thread (%u,%u,%u): ", current->index.x, current->index.y, current->index.z);
    va_list list;
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fputc('\n', stderr);
    abort();
}

// Nothing can run and not all have returned: tells how many threads wait where.
[[noreturn]] __attribute__((cold)) inline void fail_stuck() {
    std::map<std::string, unsigned> where;
    for (unsigned i = 0; i < thread_count; i++) {
        char text[100] = "returned";
        const Thread &t = threads[i];
        if (t.waits == &BARRIER) snprintf(text, sizeof text, "wait at __syncthreads, line %d", t.line);
        else if (t.waits != &RETURNED)
            snprintf(text, sizeof text, "wait at %s, line %d, mask %08x", t.waits->name, t.line, t.mask);
        where[text]++;
    }
    std::string report;
    for (auto &[text, count] : where) report += "\n    " + std::to_string(count) + " " + text;
    current = nullptr;
    fail("of %u threads some wait for others that never come:%s", thread_count, report.c_str());
}

inline void set_ready(const Thread &t, bool can_run) {
    unsigned &warp = ready[t.place / 32], lane_bit = 1u << t.place % 32, warp_bit = 1u << t.place / 32;
    warp = can_run ? warp | lane_bit : warp & ~lane_bit;
    ready_warps = warp ? ready_warps | warp_bit : ready_warps & ~warp_bit;
}

// The first bit of a mask (not zero) after position p, or around its end.
inline unsigned next_bit(unsigned mask, unsigned p) {
    unsigned after = mask & ~1u << p;
    return unsigned(__builtin_ctz(after ? after : mask));
}

// The thread that runs after t: of the same warp as long as any can run, so that a warp gets as far ahead of the others
// as it can, and races show. Null when all have returned.
inline Thread *next_thread(const Thread &t) {
    unsigned warp = t.place / 32;
    if (ready[warp]) return in_place[warp * 32 + next_bit(ready[warp], t.place % 32)];
    if (ready_warps) {
        warp = next_bit(ready_warps, warp);
        return in_place[warp * 32 + unsigned(__builtin_ctz(ready[warp]))];
    }
    for (unsigned i = 0; i < thread_count; i++)
        if (threads[i].waits != &RETURNED) fail_stuck();
    return nullptr;
}

inline void set_current(Thread *t) {
    current = t;
    threadIdx = t->index;
}

// Every fiber runs this for ever: thread after thread that has not started, until one is next that has its own fiber.
inline void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
    const void *bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (!main_fiber.stack) main_fiber.stack = bottom, main_fiber.size = size; // the first fiber comes from main
#endif
    Fiber *self = running;
    for (;;) {
        Thread &t = *current;
        (*kernel_body)();
        if (!t.copies.empty()) fail("returns and never waits for its last %zu cp_async", t.copies.size());
        t.waits = &RETURNED;
        t.fiber = nullptr;
        set_ready(t, false);
        Thread *next = next_thread(t);
        if (next) set_current(next);
        if (next && !next->fiber) {
            next->fiber = self;
            continue;
        }
        idle_fibers.push_back(self);
        switch_to(next ? next->fiber : &main_fiber);
    }
}

inline void run_thread(Thread *t) {
    if (t == current) return;
    set_current(t);
    if (!t->fiber) t->fiber = take_fiber(fiber_main);
    switch_to(t->fiber);
}

// Waits until all lanes of the mask are here; the last one completes the operation. Arguments stand in *current.
inline void warp_operation(const Operation &operation, unsigned mask, int line) {
    Thread &t = *current, *lanes = &t - t.number % 32;
    unsigned &here = waiting[t.number / 32];
    t.waits = &operation;
    t.mask = mask;
    t.line = line;
    here |= 1u << t.number % 32;
    if (!(mask >> t.number % 32 & 1)) fail("%s, line %d: not in its own mask %08x", operation.name, line, mask);
    if ((here & mask) != mask) {
        set_ready(t, false);
    } else {
        for (unsigned m = mask; m; m &= m - 1) {
            const Thread &other = lanes[__builtin_ctz(m)];
            if (other.waits != &operation || other.mask != mask || other.line != line)
                fail("%s, line %d, mask %08x, but lane %u waits at %s, line %d, mask %08x", operation.name, line, mask,
                     other.number % 32, other.waits->name, other.line, other.mask);
        }
        if (operation.complete) operation.complete(lanes, mask);
        for (unsigned m = mask; m; m &= m - 1) {
            lanes[__builtin_ctz(m)].waits = nullptr;
            set_ready(lanes[__builtin_ctz(m)], true);
        }
        here &= ~mask;
    }
    run_thread(next_thread(t));
}

inline void barrier(int line) {
    Thread &t = *current;
    t.waits = &BARRIER;
    t.line = line;
    if (++barrier_count < thread_count) {
        set_ready(t, false);
        run_thread(next_thread(t));
        return;
    }
    barrier_count = 0;
    for (unsigned i = 0; i < thread_count; i++)
        if (threads[i].line != line)
            fail("waits at the __syncthreads of line %d, but others at that of line %d", line, threads[i].line);
    for (unsigned i = 0; i < thread_count; i++) {
        threads[i].waits = nullptr;
        set_ready(threads[i], true);
    }
    run_thread(in_place[0]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Synchronisation, votes, shuffles, atomics

inline void complete_ballot(Thread *lanes, unsigned mask) {
    unsigned votes = 0;
    for (unsigned m = mask; m; m &= m - 1) votes |= unsigned(lanes[__builtin_ctz(m)].value) << __builtin_ctz(m);
    for (unsigned m = mask; m; m &= m - 1) lanes[__builtin_ctz(m)].value = votes;
}

inline void complete_shuffle(Thread *lanes, unsigned mask) {
    uint64_t values[32];
    for (unsigned m = mask; m; m &= m - 1) {
        const Thread &t = lanes[__builtin_ctz(m)];
        values[__builtin_ctz(m)] = t.value;
        if (!(mask >> t.source & 1))
            fail("a shuffle, line %d: a lane reads lane %u, which is not in the mask %08x", t.line, t.source, mask);
    }
    for (unsigned m = mask; m; m &= m - 1) lanes[__builtin_ctz(m)].value = values[lanes[__builtin_ctz(m)].source];
}

inline constexpr Operation SYNCWARP{"__syncwarp", nullptr}, VOTE{"a vote", complete_ballot},
    SHUFFLE{"a shuffle", complete_shuffle};

inline unsigned ballot(unsigned mask, bool vote, int line) {
    current->value = vote;
    warp_operation(VOTE, mask, line);
    return unsigned(current->value);
}

// `source`: from the lane and the first and last lane of its group to the lane whose value it gets.
template <typename T, typename F> inline T shuffle(unsigned mask, T value, int width, int line, F &&source) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 32 or 64 bits");
    if (width < 1 || width > 32 || (width & (width - 1))) fail("a shuffle's width is %d, line %d", width, line);
    int lane = int(current->number % 32);
    current->source = unsigned(source(lane, lane & ~(width - 1), lane | (width - 1)));
    memcpy(&current->value, &value, sizeof value);
    warp_operation(SHUFFLE, mask, line);
    memcpy(&value, &current->value, sizeof value);
    return value;
}

template <typename T> struct Identity { using type = T; }; // a parameter that does not take part in deduction

} // namespace emu

inline void __syncthreads(int line = __builtin_LINE()) { emu::barrier(line); }
inline void __syncwarp(unsigned mask = emu::ALL_LANES, int line = __builtin_LINE()) {
    emu::warp_operation(emu::SYNCWARP, mask, line);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { emu::fail("__trap()"); }

inline unsigned __ballot_sync(unsigned m, int vote, int line = __builtin_LINE()) { return emu::ballot(m, vote, line); }
inline int __any_sync(unsigned m, int vote, int line = __builtin_LINE()) { return emu::ballot(m, vote, line) != 0; }
inline int __all_sync(unsigned m, int vote, int line = __builtin_LINE()) { return emu::ballot(m, vote, line) == m; }

// A lane whose source is outside of its group gets its own value.
#define EMU_SHUFFLE(name, source) \
    template <typename T> inline T name(unsigned mask, T value, int x, int width = 32, int line = __builtin_LINE()) { \
        auto f = [x](int lane, [[maybe_unused]] int first, [[maybe_unused]] int last) { return source; }; \
        return emu::shuffle(mask, value, width, line, f); \
    }
EMU_SHUFFLE(__shfl_sync, first | (x & (last - first)) | (lane & 0))
EMU_SHUFFLE(__shfl_up_sync, lane - x >= first ? lane - x : lane)
EMU_SHUFFLE(__shfl_down_sync, lane + x <= last ? lane + x : lane)
EMU_SHUFFLE(__shfl_xor_sync, (lane ^ x) <= last ? lane ^ x : lane)

// On integers alone: sums of floats in the order of arrival do not repeat.
#define EMU_ATOMIC(name, change) \
    template <typename T> inline T name(T *p, typename emu::Identity<T>::type v) { \
        static_assert(std::is_integral_v<T>, "atomics are for integers"); \
        T old = *p; \
        *p = T(change); \
        return old; \
    }
EMU_ATOMIC(atomicAdd, old + v)
EMU_ATOMIC(atomicSub, old - v)
EMU_ATOMIC(atomicMin, old < v ? old : v)
EMU_ATOMIC(atomicMax, old > v ? old : v)
EMU_ATOMIC(atomicOr, old | v)
EMU_ATOMIC(atomicAnd, old & v)
EMU_ATOMIC(atomicExch, v)
inline unsigned atomicCAS(unsigned *p, unsigned compare, unsigned v) { return atomicExch(p, *p == compare ? v : *p); }

// ---------------------------------------------------------------------------------------------------------------------
// Memory: what belongs to the device, and what a block shares

extern "C" {
extern char __start_emu_shared[] __attribute__((weak)); // the linker's names for the ends of the section
extern char __stop_emu_shared[] __attribute__((weak));
}

namespace emu {

struct Allocation {
    size_t bytes;
    std::vector<std::pair<const char *, size_t>> redzones;
};
inline std::map<const char *, Allocation> allocations; // by address
inline size_t allocated = 0;
constexpr size_t TOTAL_MEMORY = size_t(8) << 30, DEFAULT_SHARED = 48 << 10, MAX_SHARED = 99 << 10; // the least of sm_8x

// The allocation which the range [p, p + bytes) lies in; null if it is not in device memory.
inline Allocation *find_allocation(const void *p, size_t bytes) {
    auto next = allocations.upper_bound(static_cast<const char *>(p));
    if (next == allocations.begin()) return nullptr;
    auto &[start, found] = *--next;
    size_t offset = size_t(static_cast<const char *>(p) - start);
    return offset <= found.bytes && bytes <= found.bytes - offset ? &found : nullptr;
}

// While one of these exists device memory may be accessed. AddressSanitizer reports any access at another time.
struct DeviceAccess {
    static inline int depth = 0;
    DeviceAccess() { set(depth++ == 0, true); }
    ~DeviceAccess() { set(--depth == 0, false); }
    static void set([[maybe_unused]] bool change, [[maybe_unused]] bool open) {
#ifdef __SANITIZE_ADDRESS__
        for (auto &[start, allocation] : allocations) {
            if (!change) break;
            (open ? __asan_unpoison_memory_region : __asan_poison_memory_region)(start, allocation.bytes);
            for (auto &[zone, bytes] : allocation.redzones) __asan_poison_memory_region(zone, bytes);
        }
#endif
    }
};

// Makes a part of an allocation forbidden, for instance the gap between two tensors (with AddressSanitizer).
inline void redzone(const void *p, size_t bytes) {
    Allocation *found = find_allocation(p, bytes);
    if (!found) fail("redzone: %p, %zu bytes, is not device memory", p, bytes);
    found->redzones.push_back({static_cast<const char *>(p), bytes});
}

inline void check_shared(const char *what, const void *p, size_t bytes, int line) {
    auto inside = [&](const void *start, const void *end) { return p >= start && (const char *)p + bytes <= end; };
    bool shared = inside(dynamic_shared, dynamic_shared + dynamic_bytes) || inside(__start_emu_shared, __stop_emu_shared);
#ifdef __SANITIZE_ADDRESS__
    shared = true; // static variables are not in the section
#endif
    if (!shared) fail("%s, line %d: %p is not this block's shared memory", what, line, p);
    if (uintptr_t(p) % bytes) fail("%s, line %d: %p is not aligned to %zu bytes", what, line, p, bytes);
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores. Layouts: PTX ISA, "Matrix fragments for mma.m16n8k16" and "m16n8k8", "ldmatrix". With g = lane / 4 and
// q = lane % 4, the register of a tile of 8×8 16-bit numbers holds elements (g, 2q), low half, and (g, 2q + 1).

// The eight rows of tile i are at the addresses that lanes 8i to 8i + 7 give; .trans hands out the transposed tile.
template <int TILES, bool TRANS> inline void complete_ldmatrix(Thread *lanes, unsigned) {
    uint16_t tile[TILES][8][8];
    for (int i = 0; i < TILES * 8; i++) memcpy(tile[i / 8][i % 8], lanes[i].in[0], 16);
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0, g = lane / 4, q = lane % 4 * 2; i < TILES; i++) {
            uint32_t low = TRANS ? tile[i][q][g] : tile[i][g][q], high = TRANS ? tile[i][q + 1][g] : tile[i][g][q + 1];
            static_cast<uint32_t *>(lanes[lane].out)[i] = low | high << 16;
        }
}

template <int TILES, bool TRANS> inline void ldmatrix(uint32_t *r, const void *smem, int line) {
    static constexpr Operation LDMATRIX{"ldmatrix", complete_ldmatrix<TILES, TRANS>};
    if (current->number % 32 < TILES * 8) check_shared("ldmatrix", smem, 16, line);
    current->in[0] = smem;
    current->out = r;
    warp_operation(LDMATRIX, ALL_LANES, line);
}

// A register of A or B holds PER numbers: two bf16 or one tf32. A's registers are its quarters: upper left, lower left,
// upper right, lower right; B's are its upper and lower half, and there g is the column; D's are two rows g and g + 8.
template <int PER> inline void complete_mma(Thread *lanes, unsigned) {
    typedef float Row __attribute__((vector_size(32)));
    constexpr int K = 8 * PER;
    auto number = [](uint32_t r, int i) { return bits<float>(PER == 1 ? r & ~0x1fffu : i ? r & ~0xffffu : r << 16); };
    float a[16][K];
    Row b[K], d[16];
    for (int lane = 0; lane < 32; lane++) {
        const uint32_t *ra = static_cast<const uint32_t *>(lanes[lane].in[0]);
        const uint32_t *rb = static_cast<const uint32_t *>(lanes[lane].in[1]);
        for (int i = 0, g = lane / 4, q = lane % 4 * PER; i < PER; i++) {
            for (int r = 0; r < 4; r++) a[g + r % 2 * 8][q + i + r / 2 * (K / 2)] = number(ra[r], i);
            for (int r = 0; r < 2; r++) b[q + i + r * (K / 2)][g] = number(rb[r], i);
        }
    }
    for (int row = 0; row < 16; row++) {
        d[row] = a[row][0] * b[0];
        for (int k = 1; k < K; k++) d[row] += a[row][k] * b[k];
    }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++)
            static_cast<float *>(lanes[lane].out)[i] += d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

template <int PER> inline void mma(float *d, const uint32_t *a, const uint32_t *b, int line) {
    static constexpr Operation MMA{PER == 2 ? "mma_bf16" : "mma_tf32", complete_mma<PER>};
    current->in[0] = a;
    current->in[1] = b;
    current->out = d;
    warp_operation(MMA, ALL_LANES, line);
}

// Until cp_async_wait brings the data the target is NaN: neither what was there nor what will be there can be used.
template <int BYTES> inline void cp_async(void *smem, const void *gmem, bool valid, int line) {
    check_shared("cp_async", smem, BYTES, line);
    if (uintptr_t(gmem) % BYTES) fail("cp_async, line %d: source %p is not aligned to %d bytes", line, gmem, BYTES);
    if (valid && !find_allocation(gmem, BYTES)) fail("cp_async, line %d: source %p is not device memory", line, gmem);
    Copy copy{static_cast<unsigned char *>(smem), nullptr, BYTES, current->group, {}};
    if (valid) {
        copy.from = static_cast<const unsigned char *>(gmem);
        memcpy(copy.data, gmem, BYTES);
    }
    memset(smem, 0xff, BYTES);
    current->copies.push_back(copy);
}

inline void cp_async_land(int keep, int line) {
    auto &copies = current->copies;
    size_t landed = 0;
    for (; landed < copies.size() && copies[landed].group < current->group - keep; landed++) {
        const Copy &copy = copies[landed];
        if (std::any_of(copy.to, copy.to + copy.bytes, [](unsigned char c) { return c != 0xff; }))
            fail("cp_async_wait, line %d: target %p was written while a copy was in flight", line, (void *)copy.to);
        if (copy.from && memcmp(copy.from, copy.data, size_t(copy.bytes)))
            fail("cp_async_wait, line %d: source %p was written while its copy was in flight", line, (void *)copy.from);
        memcpy(copy.to, copy.data, size_t(copy.bytes));
    }
    copies.erase(copies.begin(), copies.begin() + long(landed));
}

} // namespace emu

#define EMU_LDMATRIX(name, tiles, trans) \
    inline void name(uint32_t *r, const void *smem, int line = __builtin_LINE()) { \
        emu::ldmatrix<tiles, trans>(r, smem, line); \
    }
EMU_LDMATRIX(ldmatrix_x1, 1, false)
EMU_LDMATRIX(ldmatrix_x2, 2, false)
EMU_LDMATRIX(ldmatrix_x4, 4, false)
EMU_LDMATRIX(ldmatrix_x1_trans, 1, true)
EMU_LDMATRIX(ldmatrix_x2_trans, 2, true)
EMU_LDMATRIX(ldmatrix_x4_trans, 4, true)
inline void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2], int line = __builtin_LINE()) {
    emu::mma<2>(d, a, b, line);
}
inline void mma_tf32(float d[4], const uint32_t a[4], const uint32_t b[2], int line = __builtin_LINE()) {
    emu::mma<1>(d, a, b, line);
}
inline uint32_t to_tf32(float a) { // to nearest, ties away from zero
    uint32_t u = emu::bits<uint32_t>(a);
    return std::isfinite(a) ? (u + 0x1000u) & ~0x1fffu : u;
}
#define EMU_CP_ASYNC(bytes) \
    inline void cp_async##bytes(void *smem, const void *gmem, bool valid, int line = __builtin_LINE()) { \
        emu::cp_async<bytes>(smem, gmem, valid, line); \
    }
EMU_CP_ASYNC(4)
EMU_CP_ASYNC(8)
EMU_CP_ASYNC(16)
inline void cp_async_commit() { emu::current->group++; }
template <int N> inline void cp_async_wait(int line = __builtin_LINE()) { emu::cp_async_land(N, line); }

// ---------------------------------------------------------------------------------------------------------------------
// The runtime: every call is done when it returns, except what a stream captures into a graph

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorStreamCaptureUnsupported = 900
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost = 0,
    cudaMemcpyHostToDevice = 1,
    cudaMemcpyDeviceToHost = 2,
    cudaMemcpyDeviceToDevice = 3
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed };
enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventDisableTiming = 2 };
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock, maxThreadsPerMultiProcessor, regsPerBlock;
    int l2CacheSize;
};

namespace emu {

struct Graph {
    std::vector<std::function<void()>> nodes;
};
struct Stream {
    Graph *capture; // null: runs at once
};
struct Event {
    double seconds;
};
inline int captures = 0; // streams that capture
inline cudaError_t last_error = cudaSuccess;
inline std::map<const void *, size_t> shared_limits; // of kernels whose limit cudaFuncSetAttribute raised

inline cudaError_t result(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

// Does the work, or puts it into the graph that the stream captures.
template <typename F> inline cudaError_t submit(Stream *stream, F &&work) {
    if (stream && stream->capture) {
        stream->capture->nodes.push_back(work);
    } else {
        if (captures && !stream) return result(cudaErrorStreamCaptureUnsupported);
        DeviceAccess access;
        work();
    }
    return cudaSuccess;
}

// What may not happen during a capture.
inline cudaError_t synchronous() { return result(captures ? cudaErrorStreamCaptureUnsupported : cudaSuccess); }

inline void check_range(const char *what, const void *p, size_t bytes, bool device) {
    if (device && !find_allocation(p, bytes)) fail("%s %p, %zu bytes: not device memory", what, p, bytes);
    if (!device && find_allocation(p, 0)) fail("%s %p, %zu bytes: not host memory", what, p, bytes);
}

// Runs a kernel for all threads of all blocks, in the order that is asked for.
inline void run_grid(const char *name, const std::function<void()> &body, dim3 grid, dim3 block, size_t shared) {
    uint64_t random = order;
    auto ordered = [&](unsigned n) { // 0..n-1 in that order
        std::vector<unsigned> list(n);
        for (unsigned i = 0; i < n; i++) list[i] = order == 1 ? n - 1 - i : i;
        for (unsigned i = n; order > 1 && i > 1; i--) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            std::swap(list[i - 1], list[(random >> 33) % i]);
        }
        return list;
    };
    if (kernel_name) fail("launches another kernel, %s", name);
    void *memory = nullptr;
    if (posix_memalign(&memory, 128, shared)) fail("no memory");
    dynamic_shared = static_cast<unsigned char *>(memory);
    dynamic_bytes = shared;
    kernel_name = name;
    kernel_body = &body;
    gridDim = grid;
    blockDim = block;
    thread_count = block.x * block.y * block.z;
    unsigned place = 0;
    for (unsigned warp : ordered((thread_count + 31) / 32)) {
        for (unsigned lane : ordered(std::min(32u, thread_count - warp * 32))) {
            unsigned i = warp * 32 + lane;
            threads[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
            threads[i].number = i;
            threads[i].place = place;
            in_place[place++] = &threads[i];
        }
        place = (place + 31) / 32 * 32; // after a warp that is not full
    }
    for (unsigned b : ordered(grid.x * grid.y * grid.z)) {
        blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
        memset(dynamic_shared, 0xff, shared);
        memset(__start_emu_shared, 0xff, size_t(__stop_emu_shared - __start_emu_shared));
        for (unsigned i = 0; i < thread_count; i++) {
            threads[i].waits = nullptr;
            set_ready(threads[i], true);
        }
        run_thread(in_place[0]); // comes back when all have returned
        current = nullptr;
    }
    kernel_name = nullptr;
    free(memory);
    dynamic_bytes = 0;
}

template <typename... P> struct Launch {
    static_assert((std::is_trivially_copyable_v<P> && ...), "a kernel's arguments are copied byte by byte");
    const char *name;
    void (*kernel)(P...);
    dim3 grid, block;
    size_t shared;
    Stream *stream;

    void operator()(P... arguments) const {
        int i = 0;
        (check(i++, arguments), ...);
        submit(stream, [self = *this, copied = std::tuple<P...>(arguments...)] {
            run_grid(self.name, [&] { std::apply(self.kernel, copied); }, self.grid, self.block, self.shared);
        });
    }
    template <typename T> void check([[maybe_unused]] int i, [[maybe_unused]] T argument) const {
        if constexpr (std::is_pointer_v<T>)
            if (argument && !find_allocation(argument, 0))
                fail("kernel %s: argument %d, %p, is not device memory", name, i, (const void *)argument);
    }
};

template <typename... P>
inline Launch<P...> launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, Stream *stream) {
    auto limit = shared_limits.find(reinterpret_cast<const void *>(kernel));
    if (shared > (limit == shared_limits.end() ? DEFAULT_SHARED : limit->second))
        fail("kernel %s: %zu bytes of dynamic shared memory, see cudaFuncSetAttribute", name, shared);
    uint64_t count = uint64_t(block.x) * block.y * block.z;
    if (!count || count > MAX_THREADS || block.z > 64) fail("kernel %s: block %u×%u×%u", name, block.x, block.y, block.z);
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
        fail("kernel %s: grid %u×%u×%u", name, grid.x, grid.y, grid.z);
    return {name, kernel, grid, block, shared, stream};
}

} // namespace emu

using cudaStream_t = emu::Stream *;
using cudaEvent_t = emu::Event *;
using cudaGraph_t = emu::Graph *;
using cudaGraphExec_t = emu::Graph *;

inline cudaError_t cudaPeekAtLastError() { return emu::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(emu::last_error, cudaSuccess); }
inline const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess                 ? "no error"
           : error == cudaErrorInvalidValue     ? "invalid argument"
           : error == cudaErrorMemoryAllocation ? "out of memory"
                                                : "operation not permitted when stream is capturing";
}

// Device memory: a malloc each, so that AddressSanitizer sees its ends.
template <typename T> inline cudaError_t cudaMalloc(T **p, size_t bytes) {
    if (emu::captures) return emu::result(cudaErrorStreamCaptureUnsupported);
    void *memory = nullptr;
    if (bytes > emu::TOTAL_MEMORY - emu::allocated || (bytes && posix_memalign(&memory, 256, bytes)))
        return emu::result(cudaErrorMemoryAllocation);
    *p = static_cast<T *>(memory);
    if (!bytes) return cudaSuccess;
    emu::DeviceAccess access;
    memset(memory, 0xff, bytes);
    emu::allocations[static_cast<char *>(memory)] = {bytes, {}};
    emu::allocated += bytes;
    return cudaSuccess;
}
inline cudaError_t cudaFree(void *p) {
    auto found = emu::allocations.find(static_cast<char *>(p));
    if (p && found == emu::allocations.end()) return emu::result(cudaErrorInvalidValue);
    if (!p) return cudaSuccess;
    emu::allocated -= found->second.bytes;
    found->second.redzones.clear();
    emu::DeviceAccess access;
    emu::allocations.erase(found);
    free(p);
    return cudaSuccess;
}
template <typename T> inline cudaError_t cudaMallocHost(T **p, size_t bytes) {
    *p = static_cast<T *>(malloc(bytes));
    return emu::result(*p || !bytes ? cudaSuccess : cudaErrorMemoryAllocation);
}
inline cudaError_t cudaFreeHost(void *p) { return free(p), cudaSuccess; }
inline cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
    *total = emu::TOTAL_MEMORY;
    *unused = emu::TOTAL_MEMORY - emu::allocated;
    return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t s = {}) {
    if (bytes) emu::check_range("cudaMemcpy to", to, bytes, kind & 1);
    if (bytes) emu::check_range("cudaMemcpy from", from, bytes, kind & 2);
    return emu::submit(s, [=] { memmove(to, from, bytes); });
}
inline cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t s = {}) {
    if (bytes) emu::check_range("cudaMemset", p, bytes, true);
    return emu::submit(s, [=] { memset(p, value, bytes); });
}
inline cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    return cudaMemcpyAsync(to, from, bytes, kind);
}
inline cudaError_t cudaMemset(void *p, int value, size_t bytes) { return cudaMemsetAsync(p, value, bytes); }
template <typename T> inline cudaError_t cudaMemcpyToSymbol(T &symbol, const void *from, size_t bytes) {
    if (bytes > sizeof symbol) return emu::result(cudaErrorInvalidValue);
    return emu::submit(cudaStream_t{}, [&symbol, from, bytes] { memcpy(&symbol, from, bytes); });
}

inline cudaError_t cudaSetDevice(int device) { return emu::result(device ? cudaErrorInvalidValue : cudaSuccess); }
inline cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return emu::synchronous(); }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    *p = {"CPU (cuda_emu)", emu::TOTAL_MEMORY, emu::DEFAULT_SHARED, emu::MAX_SHARED, emu::MAX_SHARED + 1024, 8, 0, 3, 32,
          int(emu::MAX_THREADS), 1536, 65536, 1 << 20}; // 3 multiprocessors, so that strides and remainders occur
    return cudaSuccess;
}
template <typename... P>
inline cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || size_t(value) > emu::MAX_SHARED) return emu::result(cudaErrorInvalidValue);
    emu::shared_limits[reinterpret_cast<const void *>(kernel)] = size_t(value);
    return cudaSuccess;
}
template <typename... P>
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, void (*)(P...), int block, size_t shared) {
    *n = std::min(1536 / block, int((emu::MAX_SHARED + 1024) / (shared + 1024)));
    return cudaSuccess;
}

inline cudaError_t cudaStreamCreate(cudaStream_t *s) { return *s = new emu::Stream{nullptr}, cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) { return cudaStreamCreate(s); }
inline cudaError_t cudaStreamDestroy(cudaStream_t s) { return delete s, cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return emu::synchronous(); }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned = 0) { return cudaSuccess; }
inline cudaError_t cudaEventCreate(cudaEvent_t *e) { return *e = new emu::Event{0}, cudaSuccess; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) { return cudaEventCreate(e); }
inline cudaError_t cudaEventDestroy(cudaEvent_t e) { return delete e, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s = {}) {
    return emu::submit(s, [e] {
        timespec now;
        timespec_get(&now, TIME_UTC);
        e->seconds = double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
    });
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return emu::synchronous(); }
inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
    return *ms = float(1e3 * (end->seconds - start->seconds)), cudaSuccess;
}

// A graph is the list of what its stream was given, arguments copied.
inline cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
    if (!s || s->capture) return emu::result(cudaErrorStreamCaptureUnsupported);
    s->capture = new emu::Graph;
    emu::captures++;
    return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
    if (!s || !s->capture) return emu::result(cudaErrorInvalidValue);
    emu::captures--;
    return *graph = std::exchange(s->capture, nullptr), cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long = 0) {
    return *exec = new emu::Graph(*graph), cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) {
    return emu::submit(s, [exec] {
        for (auto &node : exec->nodes) node();
    });
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete exec, cudaSuccess; }

#endif

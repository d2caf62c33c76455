// cuda_emu.cpp: what stands behind cuda_emu.h: fibers, their scheduling, the operations of a warp, and the runtime.

#include "cuda_emu.h"

#include <algorithm>
#include <cstdarg>
#include <list>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include <sys/mman.h>
#if EMU_FILLS_STATIC_SHARED
#include <link.h>
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

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
unsigned emu::order = getenv("EMU_ORDER") ? unsigned(strtoul(getenv("EMU_ORDER"), nullptr, 10)) : 0;
unsigned char *emu::dynamic_shared = nullptr;
void (*emu::before_kernel)(const char *kernel) = nullptr;
const bool emu::roughly = getenv("EMU_ROUGH") && atoi(getenv("EMU_ROUGH"));

// ---------------------------------------------------------------------------------------------------------------------
// Fibers

namespace {

struct Fiber {
    void *sp = nullptr;          // where it was suspended
    const void *stack = nullptr; // lowest address and size, for AddressSanitizer
    size_t size = 0;
    void *fake_stack = nullptr; // AddressSanitizer's own
#ifdef EMU_UCONTEXT
    ucontext_t context;
#endif
};

Fiber main_fiber, *running = &main_fiber;
std::vector<Fiber *> idle_fibers;

#ifndef EMU_UCONTEXT
// Saves what a call must preserve on this stack and its pointer in *save, and goes on where `load` was saved. `ret` and
// not a jump, since the processor predicts it: lanes mostly wait at the same place.
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

void switch_to(Fiber *to) {
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

// Lets the first switch to the fiber call `entry`.
void prepare(Fiber *fiber, char *stack, void (*entry)()) {
#ifdef EMU_UCONTEXT
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = stack;
    fiber->context.uc_stack.ss_size = fiber->size;
    makecontext(&fiber->context, entry, 0);
#else
    void **frame = reinterpret_cast<void **>(stack + fiber->size) - FRAME; // fresh pages: the rest is zero
    frame[ENTRY] = reinterpret_cast<void *>(entry);
    fiber->sp = frame;
#endif
}

// An idle fiber, or a new one that starts in `entry`. The memory below each stack is closed: overflow is a fault.
Fiber *take_fiber(void (*entry)()) {
    if (!idle_fibers.empty()) {
        Fiber *fiber = idle_fibers.back();
        idle_fibers.pop_back();
        return fiber;
    }
    constexpr size_t head = 8192, guard = 65536, total = 327680; // address space: little of it is ever touched
    static_assert(sizeof(Fiber) <= head, "");
    void *map = mmap(nullptr, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *stack = static_cast<char *>(map) + guard;
    if (map == MAP_FAILED || mprotect(stack, total - guard, PROT_READ | PROT_WRITE) != 0) {
        perror("cuda_emu: no memory for the stacks of a block's threads");
        exit(1);
    }
    Fiber *fiber = new (stack + total - guard - head) Fiber; // above its stack
    fiber->stack = stack;
    fiber->size = total - guard - head;
    prepare(fiber, stack, entry);
    return fiber;
}

// ---------------------------------------------------------------------------------------------------------------------
// Scheduling

using emu::Lanes;
constexpr unsigned MAX_THREADS = 1024;

struct Thread;
struct Operation { // what a thread can wait for
    const char *name;
    void (*complete)(Thread *lanes, Lanes mask); // does it for the lanes of the mask; null if there is nothing to do
};

struct Copy { // a cp.async in flight
    unsigned char *to;
    const unsigned char *from; // null: zeros
    int group;
    unsigned char data[16]; // the source when the copy was issued
};

struct Thread {
    uint3 index;
    unsigned number, place;   // in the block; in the order of execution, where the threads of a warp stay together
    Fiber *fiber;             // null: not started, or returned
    const Operation *waits;   // for this, unless it is ready
    Lanes mask;               // the lanes that it waits for
    int line;                 // and where in the source
    const void *in[2];        // an ldmatrix's address or mma's a and b
    void *out;                // and where the result goes
    uint64_t value;           // what a shuffle gives and gets
    unsigned source;          // and from which lane
    std::vector<Copy> copies; // in flight, oldest first
    int group;                // what cp_async_commit closes next
};

Thread threads[MAX_THREADS], *in_place[MAX_THREADS], *current = nullptr;
Lanes waiting[MAX_THREADS / WARP];            // by warp, a bit per lane: waits for an operation of the warp
Lanes ready[MAX_THREADS / WARP], ready_warps; // a bit per place, and per warp: can run
unsigned thread_count, barrier_count;
uint64_t random_state; // of everything that EMU_ORDER shuffles in a launch
size_t dynamic_bytes = 0;
const char *kernel_name = nullptr; // null between launches
const std::function<void()> *kernel_body = nullptr;

const Operation BARRIER{"__syncthreads", nullptr}, RETURNED{"return", nullptr};

} // namespace

void emu::fail(const char *format, ...) {
    fflush(stdout);
    fprintf(stderr, "cuda_emu: ");
    if (kernel_name) fprintf(stderr, "kernel %s, block (%u,%u,%u): ", kernel_name, blockIdx.x, blockIdx.y, blockIdx.z);
    if (current) fprintf(stderr, "thread (%u,%u,%u): ", current->index.x, current->index.y, current->index.z);
    va_list list;
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fputc('\n', stderr);
    abort();
}

namespace {

using emu::fail;

// Nothing can run and not all have returned: tells how many threads wait where.
[[noreturn]] void fail_stuck() {
    std::map<std::string, unsigned> where;
    for (unsigned i = 0; i < thread_count; i++) {
        const Thread &t = threads[i];
        char text[100] = "returned";
        if (t.waits == &BARRIER)
            snprintf(text, sizeof text, "wait at __syncthreads, line %d", t.line);
        else if (t.waits != &RETURNED)
            snprintf(text, sizeof text, "wait at %s, line %d, mask %08llx", t.waits->name, t.line,
                     (unsigned long long)t.mask);
        where[text]++;
    }
    std::string report;
    for (auto &[text, count] : where) report += "\n    " + std::to_string(count) + " " + text;
    current = nullptr;
    fail("of its %u threads some wait for others that never come:%s", thread_count, report.c_str());
}

void set_ready(const Thread &t, bool can_run) {
    Lanes &warp = ready[t.place / WARP], lane_bit = Lanes(1) << t.place % WARP, warp_bit = Lanes(1) << t.place / WARP;
    warp = can_run ? warp | lane_bit : warp & ~lane_bit;
    ready_warps = warp ? ready_warps | warp_bit : ready_warps & ~warp_bit;
}

// The first bit of a mask (not zero) after position p, or around its end.
unsigned next_bit(Lanes mask, unsigned p) {
    Lanes after = mask & ~Lanes(1) << p;
    return unsigned(__builtin_ctzll(after ? after : mask));
}

unsigned random_below(unsigned n) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return unsigned(random_state >> 33) % n;
}

unsigned random_bit(Lanes mask) {
    for (unsigned skip = random_below(unsigned(__builtin_popcountll(mask))); skip > 0; skip--) mask &= mask - 1;
    return unsigned(__builtin_ctzll(mask));
}

// The thread that runs after t: of the same warp as long as any can run, so that a warp gets as far ahead of the others
// as it can, and races show; in shuffled order, after a wait, of any warp. Null when all have returned.
Thread *next_thread(const Thread &t) {
    unsigned warp = t.place / WARP;
    if (emu::order > 1 && ready_warps && t.waits != &RETURNED) {
        warp = random_bit(ready_warps);
        return in_place[warp * WARP + random_bit(ready[warp])];
    }
    if (ready[warp]) return in_place[warp * WARP + next_bit(ready[warp], t.place % WARP)];
    if (ready_warps) {
        warp = next_bit(ready_warps, warp);
        return in_place[warp * WARP + unsigned(__builtin_ctzll(ready[warp]))];
    }
    for (unsigned i = 0; i < thread_count; i++)
        if (threads[i].waits != &RETURNED) fail_stuck();
    return nullptr;
}

void set_current(Thread *t) {
    current = t;
    threadIdx = t->index;
}

// Every fiber runs this for ever: thread after thread that has not started, until one is next that has its own fiber.
void fiber_main() {
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

void run_thread(Thread *t) {
    if (t == current) return;
    set_current(t);
    if (!t->fiber) t->fiber = take_fiber(fiber_main);
    switch_to(t->fiber);
}

// Waits until all lanes of the mask are here; the last one completes the operation. Arguments stand in *current.
void warp_operation(const Operation &operation, Lanes mask, int line) {
    Thread &t = *current, *lanes = &t - t.number % WARP;
    Lanes &here = waiting[t.number / WARP];
    if (!(mask >> t.number % WARP & 1))
        fail("%s, line %d: not in its own mask %08llx", operation.name, line, (unsigned long long)mask);
    t.waits = &operation;
    t.mask = mask;
    t.line = line;
    here |= Lanes(1) << t.number % WARP;
    if ((here & mask) != mask) {
        set_ready(t, false);
    } else {
        for (Lanes m = mask; m; m &= m - 1) {
            const Thread &other = lanes[__builtin_ctzll(m)];
            if (other.waits != &operation || other.mask != mask || other.line != line)
                fail("%s, line %d, mask %08llx, but lane %u waits at %s, line %d, mask %08llx", operation.name, line,
                     (unsigned long long)mask, other.number % WARP, other.waits->name, other.line,
                     (unsigned long long)other.mask);
        }
        if (operation.complete) operation.complete(lanes, mask);
        for (Lanes m = mask; m; m &= m - 1) set_ready(lanes[__builtin_ctzll(m)], true);
        here &= ~mask;
    }
    run_thread(next_thread(t));
}

} // namespace

void emu::barrier(int line) {
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
    for (unsigned i = 0; i < thread_count; i++) set_ready(threads[i], true);
    run_thread(emu::order > 1 ? next_thread(t) : in_place[0]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Shuffles

namespace {

void complete_shuffle(Thread *lanes, Lanes mask) {
    uint64_t values[WARP];
    for (Lanes m = mask; m; m &= m - 1) {
        const Thread &t = lanes[__builtin_ctzll(m)];
        values[__builtin_ctzll(m)] = t.value;
        if (!(mask >> t.source & 1))
            fail("a shuffle, line %d: lane %u reads lane %u, which is not in the mask %08llx", t.line, t.number % WARP,
                 t.source, (unsigned long long)mask);
    }
    for (Lanes m = mask; m; m &= m - 1) lanes[__builtin_ctzll(m)].value = values[lanes[__builtin_ctzll(m)].source];
}

const Operation SYNC_WARP{"__syncwarp", nullptr}, SHUFFLE{"a shuffle", complete_shuffle};

} // namespace

void emu::sync_warp(Lanes mask, int line) { warp_operation(SYNC_WARP, mask, line); }

// A lane whose source is outside of its group gets its own value; XOR may read from an earlier group.
uint64_t emu::shuffle(Lanes mask, uint64_t value, Source source, int x, int width, int line) {
    if (width < 1 || width > WARP || (width & (width - 1))) fail("a shuffle's width is %d, line %d", width, line);
    int lane = int(current->number % WARP), first = lane & ~(width - 1), last = lane | (width - 1);
    int from = lane ^ x;
    if (source == INDEX) from = first | (x & (width - 1));
    if (source == UP) from = lane - x < first ? lane : lane - x;
    if (source == DOWN) from = lane + x;
    current->source = unsigned(from > last ? lane : from);
    current->value = value;
    warp_operation(SHUFFLE, mask, line);
    return current->value;
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory: what belongs to the device, and what a block shares

namespace {

constexpr size_t TOTAL_MEMORY = size_t(8) << 30, DEFAULT_SHARED = 48 << 10, MAX_SHARED = 99 << 10; // the least of sm_8x

struct Allocation {
    size_t bytes;
    std::vector<std::pair<const char *, size_t>> redzones;
};
std::map<const char *, Allocation> allocations; // by address
size_t allocated = 0;

// The allocation which the range [p, p + bytes) lies in; null if it is not in device memory.
Allocation *find_allocation(const void *p, size_t bytes) {
    auto next = allocations.upper_bound(static_cast<const char *>(p));
    if (next == allocations.begin()) return nullptr;
    auto &[start, found] = *--next;
    size_t offset = size_t(static_cast<const char *>(p) - start);
    return offset <= found.bytes && bytes <= found.bytes - offset ? &found : nullptr;
}

// While one of these exists device memory may be accessed. AddressSanitizer reports any access at another time.
struct DeviceAccess {
    static inline int depth = 0;
    DeviceAccess() {
        if (depth++ == 0) set(true);
    }
    ~DeviceAccess() {
        if (--depth == 0) set(false);
    }
    static void set([[maybe_unused]] bool open) {
#ifdef __SANITIZE_ADDRESS__
        for (auto &[start, allocation] : allocations) {
            (open ? __asan_unpoison_memory_region : __asan_poison_memory_region)(start, allocation.bytes);
            for (auto &[zone, bytes] : allocation.redzones) __asan_poison_memory_region(zone, bytes);
        }
#endif
    }
};

// Where the static __shared__ variables are: all that is thread-local in the program, as long as nothing else is.
unsigned char *static_shared = nullptr;
size_t static_bytes = 0;

#if EMU_FILLS_STATIC_SHARED
int find_static_shared(dl_phdr_info *program, size_t, void *) {
    bool has_libraries = false;
    for (int i = 0; i < program->dlpi_phnum; i++) {
        has_libraries |= program->dlpi_phdr[i].p_type == PT_INTERP;
        if (program->dlpi_phdr[i].p_type == PT_TLS) static_bytes = program->dlpi_phdr[i].p_memsz;
    }
    if (!has_libraries) fail("needs a program linked dynamically: the C library's variables must not be among ours");
    static_shared = static_cast<unsigned char *>(program->dlpi_tls_data);
    return 1; // the program comes first: ask for no other
}
#endif

void check_shared(const char *what, const void *p, size_t bytes, int line) {
    auto inside = [&](const void *start, size_t size) {
        size_t offset = uintptr_t(p) - uintptr_t(start); // wraps to something large below the start
        return offset <= size && bytes <= size - offset;
    };
    if (!inside(emu::dynamic_shared, dynamic_bytes) && !inside(static_shared, static_bytes) && EMU_FILLS_STATIC_SHARED)
        fail("%s, line %d: %p is not this block's shared memory", what, line, p);
    if (uintptr_t(p) % bytes) fail("%s, line %d: %p is not aligned to %zu bytes", what, line, p, bytes);
}

} // namespace

bool emu::is_device(const void *p, size_t bytes) { return find_allocation(p, bytes); }

void emu::redzone(const void *p, size_t bytes) {
    Allocation *found = find_allocation(p, bytes);
    if (!found) fail("redzone: %p, %zu bytes, is not device memory", p, bytes);
    found->redzones.push_back({static_cast<const char *>(p), bytes});
}

void emu::spoil(void *p, size_t bytes) {
    if (!is_device(p, bytes)) fail("spoil: %p, %zu bytes, is not device memory", p, bytes);
    DeviceAccess access;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(p, bytes);
#endif
    memset(p, 0xff, bytes);
    DeviceAccess::set(true); // the gaps are closed again
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores and asynchronous copies. Layouts: PTX ISA, "Matrix fragments for mma.m16n8k16" and "ldmatrix". With
// g = lane / 4 and q = lane % 4, a register for an 8x8 tile of 16-bit numbers holds elements (g, 2q), in its low half,
// and (g, 2q + 1).

namespace {

// The eight rows of tile i are at the addresses that lanes 8i to 8i + 7 give; .trans hands out the transposed tile.
template <bool TRANS>
void complete_ldmatrix(Thread *lanes, Lanes) {
    uint16_t tile[4][8][8];
    for (int i = 0; i < 32; i++) memcpy(tile[i / 8][i % 8], lanes[i].in[0], 16);
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0, g = lane / 4, q = lane % 4 * 2; i < 4; i++) {
            uint32_t low = TRANS ? tile[i][q][g] : tile[i][g][q], high = TRANS ? tile[i][q + 1][g] : tile[i][g][q + 1];
            static_cast<uint32_t *>(lanes[lane].out)[i] = low | high << 16;
        }
}

// sum + the dot product of eight numbers as tensor cores do it at their roughest (Fasi, Higham, Mikaitis and Pranesh
// 2021): every term is cut off where the last bit of the largest stands, and so is their sum.
float truncated_sum(float sum, const float *a, const float (*b)[8], int column) {
    double terms[9] = {sum}, largest = std::fabs(sum), total = 0;
    for (int k = 0; k < 8; k++) terms[k + 1] = double(a[k]) * b[k][column];
    for (double t : terms) largest = std::max(largest, std::fabs(t));
    if (!(largest > 1e-30 && largest < 1e30)) { // nothing to align, or nothing that makes sense
        for (double t : terms) total += t;
        return float(total);
    }
    auto cut = [](double x, double like) {
        double unit = std::ldexp(1.0, std::ilogb(like) - 23);
        return std::trunc(x / unit) * unit;
    };
    for (double t : terms) total += cut(t, largest);
    return total == 0 ? 0 : float(cut(total, total));
}

// Half i of a register
float number(uint32_t r, int i) { return emu::bits<float>(i ? r & ~0xffffu : r << 16); }

// A's registers are its quarters: upper left, lower left, upper right, lower right; B's are its upper and lower half,
// and there g is the column; D's are in rows g and g + 8.
void complete_mma(Thread *lanes, Lanes) {
    typedef float Row __attribute__((vector_size(32)));
    alignas(32) float a[16][16], b[16][8], d[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const uint32_t *ra = static_cast<const uint32_t *>(lanes[lane].in[0]);
        const uint32_t *rb = static_cast<const uint32_t *>(lanes[lane].in[1]);
        for (int i = 0, g = lane / 4, q = lane % 4 * 2; i < 2; i++) {
            for (int r = 0; r < 4; r++) a[g + r % 2 * 8][q + i + r / 2 * 8] = number(ra[r], i);
            for (int r = 0; r < 2; r++) b[q + i + r * 8][g] = number(rb[r], i);
        }
    }
    for (int row = 0; row < 16 && !emu::roughly; row++) {
        Row sum = {};
        for (int k = 0; k < 16; k++) sum += a[row][k] * *reinterpret_cast<const Row *>(b[k]);
        memcpy(d[row], &sum, sizeof sum);
    }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            float &out = static_cast<float *>(lanes[lane].out)[i];
            int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            if (emu::roughly)
                for (int k = 0; k < 16; k += 8) out = truncated_sum(out, a[row] + k, b + k, column);
            else
                out += d[row][column];
        }
}

const Operation LDMATRIX[2] = {{"ldmatrix_x4", complete_ldmatrix<false>},
                               {"ldmatrix_x4_trans", complete_ldmatrix<true>}};
const Operation MMA{"mma_bf16", complete_mma};

// AMD's d (16,16) += a·b: of 64 lanes V_MFMA_F32_16X16X16_BF16, where lane l has places i = 0..3 of row l%16 of a,
// column l%16 of b, at k = 4·(l/16) + i, and of d in row 4·(l/16) + i, column l%16; of 32 lanes
// V_WMMA_F32_16X16X16_BF16, where both halves have all k, and lane l of d rows 2·i + l/16, i = 0..7. ("CDNA3 ISA",
// chapter 7; "RDNA3 ISA", 7.9.)
void complete_matrix(Thread *lanes, Lanes) {
    float a[16][16], b[16][16];
    for (int lane = 0; lane < WARP; lane++)
        for (int i = 0; i < (WARP == 64 ? 4 : 16); i++) {
            int k = WARP == 64 ? lane / 16 * 4 + i : i;
            float x = number(static_cast<const uint32_t *>(lanes[lane].in[0])[i / 2], i % 2), &there = a[lane % 16][k];
            float y = number(static_cast<const uint32_t *>(lanes[lane].in[1])[i / 2], i % 2),
                  &there_b = b[k][lane % 16];
            if (WARP == 32 && lane >= 16 && (memcmp(&x, &there, 4) || memcmp(&y, &there_b, 4)))
                fail("matrix_bf16, line %d: the halves of the warp differ at k = %d", lanes[lane].line, k);
            there = x, there_b = y;
        }
    for (int lane = 0; lane < WARP; lane++)
        for (int i = 0; i < 256 / WARP; i++) {
            int row = WARP == 64 ? lane / 16 * 4 + i : 2 * i + lane / 16;
            for (int k = 0; k < 16; k++) static_cast<float *>(lanes[lane].out)[i] += a[row][k] * b[k][lane % 16];
        }
}

const Operation MATRIX{"matrix_bf16", complete_matrix};

} // namespace

void emu::ldmatrix(uint32_t *r, const void *smem, bool trans, int line) {
    check_shared(LDMATRIX[trans].name, smem, 16, line);
    current->in[0] = smem;
    current->out = r;
    warp_operation(LDMATRIX[trans], ALL_LANES, line);
}

void emu::mma(float *d, const uint32_t *a, const uint32_t *b, int line) {
    current->in[0] = a;
    current->in[1] = b;
    current->out = d;
    warp_operation(MMA, ALL_LANES, line);
}

void emu::matrix(float *d, const uint32_t *a, const uint32_t *b, int line) {
    current->in[0] = a;
    current->in[1] = b;
    current->out = d;
    warp_operation(MATRIX, ALL_LANES, line);
}

// Until cp_async_wait brings the data the target is NaN: neither what was there nor what will be there can be used.
void emu::cp_async(void *smem, const void *gmem, bool valid, int line) {
    check_shared("cp_async", smem, 16, line);
    if (uintptr_t(gmem) % 16) fail("cp_async, line %d: source %p is not aligned to 16 bytes", line, gmem);
    if (valid && !is_device(gmem, 16)) fail("cp_async, line %d: source %p is not device memory", line, gmem);
    Copy copy{static_cast<unsigned char *>(smem), nullptr, current->group, {}};
    if (valid) {
        copy.from = static_cast<const unsigned char *>(gmem);
        memcpy(copy.data, gmem, 16);
    }
    memset(smem, 0xff, 16);
    current->copies.push_back(copy);
}

void emu::cp_async_commit() { current->group++; }

void emu::cp_async_wait(int keep, int line) {
    auto &copies = current->copies;
    size_t landed = 0;
    for (; landed < copies.size() && copies[landed].group < current->group - keep; landed++) {
        const Copy &copy = copies[landed];
        if (std::any_of(copy.to, copy.to + 16, [](unsigned char c) { return c != 0xff; }))
            fail("cp_async_wait, line %d: a target was written while its copy was in flight", line);
        if (copy.from && memcmp(copy.from, copy.data, 16))
            fail("cp_async_wait, line %d: a source was written while its copy was in flight", line);
        memcpy(copy.to, copy.data, 16);
    }
    copies.erase(copies.begin(), copies.begin() + long(landed));
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches

typedef std::list<std::function<void()>> Work;
struct EmuGraph {
    Work work;
};
struct EmuStream {
    std::unique_ptr<EmuGraph> capture; // null unless the stream captures
    Work work;                         // not done yet
};

namespace {

EmuStream default_stream;
std::vector<EmuStream *> streams = {&default_stream};
cudaError_t last_error = cudaSuccess;
std::map<const void *, size_t> shared_limits; // of kernels, as set by cudaFuncSetAttribute

cudaError_t result(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

bool capturing() {
    return std::any_of(streams.begin(), streams.end(), [](EmuStream *s) { return s->capture != nullptr; });
}

// Does what the stream has to do; null: what all have. Refused during a capture.
cudaError_t finish(EmuStream *only) {
    if (capturing()) return result(cudaErrorStreamCaptureUnsupported);
    DeviceAccess access;
    for (EmuStream *stream : streams)
        for (; (!only || stream == only) && !stream->work.empty(); stream->work.pop_front()) stream->work.front()();
    return cudaSuccess;
}

// The numbers below n in the order that is asked for.
std::vector<unsigned> ordered(unsigned n) {
    std::vector<unsigned> list(n);
    for (unsigned i = 0; i < n; i++) list[i] = emu::order == 1 ? n - 1 - i : i;
    for (unsigned i = n; emu::order > 1 && i > 1; i--) std::swap(list[i - 1], list[random_below(i)]);
    return list;
}

// Kernels by name, with the number of their launches
std::map<std::string, long> &kernels() {
    static std::map<std::string, long> map;
    return map;
}

void write_kernels() {
    FILE *file = fopen(getenv("EMU_KERNELS"), "a");
    if (!file) return perror(getenv("EMU_KERNELS"));
    for (auto &[name, launches] : kernels()) fprintf(file, "%s: %ld\n", name.c_str(), launches);
    fclose(file);
}

} // namespace

// `name` is a compiler's name of a function with the kernel as argument: it ends in "K = NAME]".
long *emu::register_kernel(const char *name) {
    if (kernels().empty() && getenv("EMU_KERNELS")) atexit(write_kernels);
    std::string text = strstr(name, "K = ") + 4;
    return &kernels()[text.substr(0, text.size() - 1)];
}

void emu::submit(cudaStream_t stream, std::function<void()> work) {
    if (!stream && capturing()) fail("work for the default stream while another stream is captured");
    if (!stream) stream = &default_stream;
    (stream->capture ? stream->capture->work : stream->work).push_back(std::move(work));
}

void emu::check_launch(const Grid &grid, const void *kernel) {
    dim3 b = grid.blocks, t = grid.threads;
    auto limit = shared_limits.find(kernel);
    if (grid.shared > (limit == shared_limits.end() ? DEFAULT_SHARED : limit->second))
        fail("%s: %zu bytes of dynamic shared memory need cudaFuncSetAttribute", grid.name, grid.shared);
    if (!t.x || !t.y || !t.z || t.z > 64 || uint64_t(t.x) * t.y * t.z > MAX_THREADS)
        fail("%s: a block of %u x %u x %u threads", grid.name, t.x, t.y, t.z);
    if (!b.x || !b.y || !b.z || b.x > 0x7fffffff || b.y > 65535 || b.z > 65535)
        fail("%s: a grid of %u x %u x %u blocks", grid.name, b.x, b.y, b.z);
}

void emu::run(const Grid &grid, const std::function<void()> &thread) {
    if (kernel_name) fail("launches another kernel, %s", grid.name);
    void *memory = nullptr;
    if (posix_memalign(&memory, 128, grid.shared)) fail("%s: no memory", grid.name);
#if EMU_FILLS_STATIC_SHARED
    if (!static_shared) dl_iterate_phdr(find_static_shared, nullptr);
#endif
    if (before_kernel) before_kernel(grid.name);
    random_state = order;
    gridDim = grid.blocks;
    blockDim = grid.threads;
    kernel_name = grid.name;
    kernel_body = &thread;
    dynamic_shared = static_cast<unsigned char *>(memory);
    dynamic_bytes = grid.shared;
    thread_count = blockDim.x * blockDim.y * blockDim.z;
    unsigned place = 0;
    for (unsigned warp : ordered((thread_count + WARP - 1) / WARP)) {
        for (unsigned lane : ordered(std::min<unsigned>(WARP, thread_count - warp * WARP))) {
            Thread &t = threads[warp * WARP + lane];
            t.number = warp * WARP + lane;
            t.index = {t.number % blockDim.x, t.number / blockDim.x % blockDim.y, t.number / blockDim.x / blockDim.y};
            t.place = place;
            in_place[place++] = &t;
        }
        place = (place + WARP - 1) / WARP *
                WARP; // the last warp of the block may be short, and stand anywhere in the order
    }
    for (unsigned block : ordered(gridDim.x * gridDim.y * gridDim.z)) {
        blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y};
        std::fill(dynamic_shared, dynamic_shared + dynamic_bytes, 0xff);
        std::fill(static_shared, static_shared + static_bytes, 0xff);
        for (unsigned i = 0; i < thread_count; i++) set_ready(threads[i], true);
        run_thread(in_place[0]); // comes back when all have returned
        current = nullptr;
    }
    kernel_name = nullptr;
    dynamic_bytes = 0;
    free(memory);
}

// ---------------------------------------------------------------------------------------------------------------------
// The runtime

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
const char *cudaGetErrorString(cudaError_t error) {
    if (error == cudaSuccess) return "no error";
    if (error == cudaErrorInvalidValue) return "invalid argument";
    if (error == cudaErrorMemoryAllocation) return "out of memory";
    if (error == cudaErrorStreamCaptureUnsupported) return "operation not permitted when stream is capturing";
    return "unknown error";
}

cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return finish(nullptr); }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device) {
    *properties = {};
    snprintf(properties->name, sizeof properties->name, "CPU (cuda_emu)");
    properties->totalGlobalMem = TOTAL_MEMORY;
    properties->sharedMemPerBlock = DEFAULT_SHARED;
    properties->sharedMemPerBlockOptin = MAX_SHARED;
    properties->sharedMemPerMultiprocessor = MAX_SHARED + 1024;
    properties->major = 8;
    properties->multiProcessorCount = 3; // few and odd, so that strides and remainders occur
    properties->warpSize = warpSize;
    properties->maxThreadsPerBlock = MAX_THREADS;
    properties->maxThreadsPerMultiProcessor = 1536;
    properties->regsPerBlock = 65536;
    properties->l2CacheSize = 1 << 20;
    return result(device ? cudaErrorInvalidValue : cudaSuccess);
}
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = TOTAL_MEMORY;
    *available = TOTAL_MEMORY - allocated;
    return cudaSuccess;
}
cudaError_t emu::set_attribute(const void *kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || size_t(value) > MAX_SHARED) return result(cudaErrorInvalidValue);
    shared_limits[kernel] = std::max(DEFAULT_SHARED, size_t(value));
    return cudaSuccess;
}
// Each allocation is one of malloc's, so that AddressSanitizer sees its ends.
cudaError_t emu::allocate(void **p, size_t bytes) {
    *p = nullptr;
    if (capturing()) return result(cudaErrorStreamCaptureUnsupported);
    if (!bytes) return cudaSuccess;
    if (bytes > TOTAL_MEMORY - allocated || posix_memalign(p, 256, bytes)) return result(cudaErrorMemoryAllocation);
    memset(*p, 0xff, bytes);
    DeviceAccess access;
    allocations[static_cast<char *>(*p)] = {bytes, {}};
    allocated += bytes;
    return cudaSuccess;
}
cudaError_t cudaFree(void *p) {
    auto found = allocations.find(static_cast<char *>(p));
    if (p && found == allocations.end()) return result(cudaErrorInvalidValue);
    cudaError_t error = finish(nullptr);
    if (!p || error != cudaSuccess) return error;
    found->second.redzones.clear();
    allocated -= found->second.bytes;
    DeviceAccess access; // opened with it, and closed without
    allocations.erase(found);
    free(p);
    return cudaSuccess;
}

// A host buffer that is copied from must stay as it is until the stream is waited for. (Drivers copy what is not pinned
// at once, but the documentation does not promise it.)
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    auto check = [&](const char *what, const void *p, bool device) {
        if (device ? !emu::is_device(p, bytes) : emu::is_device(p, 0))
            fail("cudaMemcpy %s %p, %zu bytes: not %s memory", what, p, bytes, device ? "device" : "host");
        if (!device && stream && stream->capture) fail("cudaMemcpyAsync %s the host in a graph", what);
    };
    if (!bytes) return cudaSuccess;
    check("to", to, kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice);
    check("from", from, kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice);
    std::string before;
    if (kind == cudaMemcpyHostToDevice) before.assign(static_cast<const char *>(from), bytes);
    emu::submit(stream, [=] {
        if (kind == cudaMemcpyHostToDevice && memcmp(from, before.data(), bytes))
            fail("cudaMemcpyAsync from %p, %zu bytes: changed before the stream was waited for", from, bytes);
        memmove(to, from, bytes);
    });
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream) {
    if (!bytes) return cudaSuccess;
    if (!emu::is_device(p, bytes)) fail("cudaMemset %p, %zu bytes: not device memory", p, bytes);
    emu::submit(stream, [=] { memset(p, value, bytes); });
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    if (capturing()) return result(cudaErrorStreamCaptureUnsupported);
    cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, nullptr);
    return error == cudaSuccess ? finish(&default_stream) : error;
}
cudaError_t cudaMemset(void *p, int value, size_t bytes) { return cudaMemsetAsync(p, value, bytes, nullptr); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    streams.push_back(*stream = new EmuStream);
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    cudaError_t error = finish(stream);
    streams.erase(std::find(streams.begin(), streams.end(), stream));
    delete stream;
    return error;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return finish(stream ? stream : &default_stream); }

// A graph is the list of the work that its stream was given, with the arguments as they were then.
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (!stream || stream->capture) return result(cudaErrorStreamCaptureUnsupported);
    stream->capture = std::make_unique<EmuGraph>();
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    if (!stream || !stream->capture) return result(cudaErrorInvalidValue);
    *graph = stream->capture.release();
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, void *, char *, size_t) {
    return *exec = new EmuGraph(*graph), cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    for (auto &work : exec->work) emu::submit(stream, work);
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete exec, cudaSuccess; }

// The emulated GPU: blocks run one after another, the threads of a block as fibers that switch only where they wait.
//
// Every launch turns around the order in which blocks and threads run, and every other one whether an asynchronous copy
// happens at once or as late as its wait allows. A missing barrier or wait so shows in one of four launches; a correct
// kernel gives the same bits. A thread that waits for ever, or touches memory that is not there, ends the launch with a
// message.

#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <string>
#include <sys/mman.h>
#include <sys/time.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace {

constexpr unsigned MAX_THREADS = 1024, MAX_SHARED = 227 << 10, MAX_STATIC = 48 << 10, CANARY = 4096, BARRIERS = 16;
constexpr size_t PAGE = 4096, STACK = 128 << 10;  // a stack, its lowest page not accessible
constexpr int TIME_LIMIT = 60;                    // seconds of processor time for a launch

enum class State { READY, BARRIER, COLLECTIVE, DONE };

using Combine = void (*)(void**, unsigned);

struct Copy {
    void* shared;
    const void* global;
    unsigned size, group;
    bool valid;
};

struct Slot {
    unsigned block, offset;
};

struct Index {
    unsigned x, y, z;
};

struct Fiber {
#if defined(__x86_64__)
    void* stack_pointer;
#else
    ucontext_t context;
#endif
    State state;
    Index index;
    unsigned barrier, mask;
    Combine combine;
    void* operands;
    std::deque<Copy> copies;
    unsigned groups;
    bool waited, launched;
};

Fiber fibers[MAX_THREADS];
Fiber scheduler;
Fiber* current;
unsigned threads, arrivals[BARRIERS];
unsigned waiting, waiting_blocks;  // threads of the block that have waited, and blocks
char* stacks;
void (*kernel)(void**);
void** kernel_args;
const char* kernel_name;
unsigned shared_size, static_size, static_used, block_number;
alignas(1024) unsigned char static_memory[MAX_STATIC + CANARY];
bool backward, late_copies, programmatic_launch;
std::string error;
sigjmp_buf abandoned;

}  // namespace

#define HIDDEN __attribute__((visibility("hidden")))
extern "C" {
HIDDEN Index threadIdx, blockIdx, blockDim, gridDim;
HIDDEN alignas(1024) unsigned char emulator_dynamic[MAX_SHARED + CANARY];
HIDDEN void emulator_switch(void** from, void* to);
[[noreturn]] HIDDEN void emulator_fail(const char* message);
}

// ---- fibers ------------------------------------------------------------------------------------------------------

namespace {

[[noreturn]] void fiber_main();

#if defined(__x86_64__)
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
emulator_switch:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
)");

void start(Fiber& fiber, char* stack) {
    uintptr_t* top = (uintptr_t*)(stack + STACK) - 8;  // six registers, the return address, nothing to return to
    memset(top, 0, 8 * sizeof *top);
    top[6] = (uintptr_t)fiber_main;
    fiber.stack_pointer = top;
}

void switch_to(Fiber& from, Fiber& to) { emulator_switch(&from.stack_pointer, to.stack_pointer); }
#else
void start(Fiber& fiber, char* stack) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack + PAGE;
    fiber.context.uc_stack.ss_size = STACK - PAGE;
    makecontext(&fiber.context, (void (*)())fiber_main, 0);
}

void switch_to(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
#endif

void suspend() { switch_to(*current, scheduler); }

void fiber_main() {
    kernel(kernel_args);
    if (programmatic_launch && !current->launched) emulator_fail("a thread ends without launch_next()");
    current->state = State::DONE;
    suspend();
    __builtin_unreachable();
}

void resume(unsigned thread) {
    current = &fibers[thread];
    threadIdx = current->index;
    switch_to(scheduler, *current);
}

std::string where() {
    char text[200];
    snprintf(text, sizeof text, "kernel %s, block (%u, %u, %u)", kernel_name, blockIdx.x, blockIdx.y, blockIdx.z);
    return text;
}

std::string thread_name() {
    char text[80];
    snprintf(text, sizeof text, ", thread (%u, %u, %u)", current->index.x, current->index.y, current->index.z);
    return text;
}

// All threads that have not ended wait for one that will not come.
std::string deadlock() {
    unsigned counts[4] = {}, barrier = threads, collective = threads;
    for (unsigned i = 0; i < threads; i++) {
        State state = fibers[i].state;
        counts[(int)state]++;
        if (state == State::BARRIER && barrier == threads) barrier = i;
        if (state == State::COLLECTIVE && collective == threads) collective = i;
    }
    std::string text = ": deadlock, every thread waits: ";
    text += std::to_string(counts[(int)State::BARRIER]) + " at a barrier, ";
    text += std::to_string(counts[(int)State::COLLECTIVE]) + " for lanes of their warp, ";
    text += std::to_string(counts[(int)State::DONE]) + " have ended";
    if (barrier < threads) text += "; the first at a barrier is thread " + std::to_string(barrier);
    if (collective < threads) {
        unsigned mask = fibers[collective].mask, missing = 0;
        for (unsigned lane = 0; lane < 32; lane++) {
            unsigned other = (collective & ~31u) + lane;
            bool there = other < threads && fibers[other].state == State::COLLECTIVE && fibers[other].mask == mask;
            if ((mask >> lane & 1) && !there) missing |= 1u << lane;
        }
        char detail[120];
        snprintf(detail, sizeof detail, "; thread %u waits with the mask 0x%08x for the lanes 0x%08x", collective, mask,
                 missing);
        text += detail;
    }
    return text;
}

void poison_shared() {
    memset(emulator_dynamic, 0xff, shared_size + CANARY);
    memset(static_memory, 0xff, sizeof static_memory);
    static_size = static_used = 0;
    block_number++;
}

[[noreturn]] void abandon(const std::string& message) {
    error = message;
    siglongjmp(abandoned, 1);
}

void run_block() {
    poison_shared();
    waiting = 0;
    memset(arrivals, 0, sizeof arrivals);
    for (unsigned i = 0; i < threads; i++) {
        Fiber& fiber = fibers[i];
        fiber.state = State::READY;
        fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        fiber.copies.clear();
        fiber.groups = 0;
        fiber.waited = fiber.launched = false;
        start(fiber, stacks + i * STACK);
    }
    for (unsigned ended = 0; ended < threads;) {
        bool ran = false;
        for (unsigned i = 0; i < threads; i++) {
            unsigned thread = backward ? threads - 1 - i : i;
            if (fibers[thread].state != State::READY) continue;
            resume(thread);
            ran = true;
            ended += fibers[thread].state == State::DONE;
        }
        if (!ran) abandon(where() + deadlock());
    }
    if (programmatic_launch && waiting && waiting < threads)  // a block may leave at once, if another one waits
        abandon(where() + ": " + std::to_string(threads - waiting) + " threads end without wait_for_previous()");
    waiting_blocks += waiting > 0;
    for (unsigned i = 0; i < CANARY; i++)
        if (emulator_dynamic[shared_size + i] != 0xff) abandon(where() + ": a write past the dynamic shared memory");
}

// ---- signals -----------------------------------------------------------------------------------------------------

const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGVTALRM};

void on_signal(int number, siginfo_t* info, void*) {
    char text[120], *address = (char*)info->si_addr;
    if (number == SIGVTALRM)
        snprintf(text, sizeof text, ": still running after %d s", TIME_LIMIT);
    else if (number == SIGSEGV && info->si_code == SI_KERNEL)
        snprintf(text, sizeof text, ": a vector at an address that is not a multiple of its size");
    else if (address >= stacks && address < stacks + MAX_THREADS * STACK)
        snprintf(text, sizeof text, ": more than %zu KB of local memory", STACK >> 10);
    else
        snprintf(text, sizeof text, ": %s at the address %p", strsignal(number), info->si_addr);
    abandon(where() + thread_name() + text);
}

void arm(bool on) {
    static struct sigaction before[4];
    static stack_t stack_before;
    static char signal_stack[64 << 10];
    itimerval timer = {};
    if (on) {
        stack_t stack = {};
        stack.ss_sp = signal_stack;
        stack.ss_size = sizeof signal_stack;
        sigaltstack(&stack, &stack_before);
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 4; i++) sigaction(SIGNALS[i], &action, &before[i]);
        timer.it_value.tv_sec = TIME_LIMIT;
        setitimer(ITIMER_VIRTUAL, &timer, nullptr);
    } else {
        setitimer(ITIMER_VIRTUAL, &timer, nullptr);
        for (int i = 0; i < 4; i++) sigaction(SIGNALS[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
}

void finish_copy(const Copy& copy) {
    if (copy.valid)
        memcpy(copy.shared, copy.global, copy.size);
    else
        memset(copy.shared, 0, copy.size);
}

void check_shared(const void* pointer, unsigned size) {
    const unsigned char* address = (const unsigned char*)pointer;
    if (address >= emulator_dynamic && address + size <= emulator_dynamic + shared_size) return;
    if (address >= static_memory && address + size <= static_memory + static_size) return;
    emulator_fail("an address that is not in shared memory");
}

}  // namespace

// ---- what runtime.h declares -------------------------------------------------------------------------------------

#pragma GCC visibility push(hidden)
extern "C" {

void emulator_fail(const char* message) { abandon(where() + thread_name() + ": " + message); }

unsigned emulator_lane() { return (unsigned)(current - fibers) % 32; }

void emulator_yield() { suspend(); }

void emulator_wait_for_previous() {
    if (!current->waited) waiting++;
    current->waited = true;
}

void emulator_launch_next() { current->launched = true; }

void emulator_barrier(unsigned barrier, unsigned count) {
    if (barrier >= BARRIERS) emulator_fail("a block has 16 barriers");
    if (++arrivals[barrier] < (count ? count : threads)) {
        current->state = State::BARRIER;
        current->barrier = barrier;
        return suspend();
    }
    for (unsigned i = 0; i < threads; i++)
        if (fibers[i].state == State::BARRIER && fibers[i].barrier == barrier) fibers[i].state = State::READY;
    arrivals[barrier] = 0;
}

void emulator_collective(unsigned mask, Combine combine, void* operands) {
    unsigned own = (unsigned)(current - fibers), lane = own % 32, arrived = 1u << lane;
    if (!(mask & arrived)) emulator_fail("a lane calls a collective whose mask does not name it");
    Fiber* warp = &fibers[own - lane];
    void* all[32] = {};
    all[lane] = operands;
    for (unsigned i = 0; i < 32 && own - lane + i < threads; i++) {
        const Fiber& other = warp[i];
        if (other.state != State::COLLECTIVE || other.mask != mask) continue;
        if (other.combine != combine) emulator_fail("the lanes of a warp meet in different collectives");
        all[i] = other.operands;
        arrived |= 1u << i;
    }
    if (arrived != mask) {
        current->state = State::COLLECTIVE;
        current->mask = mask;
        current->combine = combine;
        current->operands = operands;
        return suspend();
    }
    combine(all, mask);
    for (unsigned i = 0; i < 32; i++)
        if (i != lane && (mask >> i & 1)) warp[i].state = State::READY;
}

void emulator_copy(void* shared, const void* global, unsigned size, bool valid) {
    check_shared(shared, size);
    if ((uintptr_t)shared % size || (uintptr_t)global % size) emulator_fail("an asynchronous copy that is not aligned");
    Copy copy{shared, global, size, current->groups, valid};
    if (late_copies)
        current->copies.push_back(copy);
    else
        finish_copy(copy);
}

void emulator_copy_commit() { current->groups++; }

void emulator_copy_wait(unsigned pending) {
    std::deque<Copy>& copies = current->copies;
    for (; !copies.empty() && copies.front().group + pending < current->groups; copies.pop_front())
        finish_copy(copies.front());
}

// At an odd multiple of the alignment, so that one which is declared too small shows.
void* emulator_static(Slot* slot, unsigned size, unsigned align) {
    if (slot->block != block_number) {
        *slot = {block_number, static_size / (2 * align) * 2 * align + align};
        if (slot->offset < static_size) slot->offset += 2 * align;
        static_size = slot->offset + size;
        static_used += size;
        if (static_used > MAX_STATIC || static_size > sizeof static_memory)
            emulator_fail("more than 48 KB of static shared memory");
        if (static_used + shared_size > MAX_SHARED)
            emulator_fail("more than 227 KB of shared memory, static and dynamic together");
    }
    return static_memory + slot->offset;
}

unsigned long long emulator_shared_offset(const void* pointer) {
    check_shared(pointer, 1);
    return (uint32_t)((const unsigned char*)pointer - emulator_dynamic);
}

void* emulator_shared_pointer(unsigned offset) {
    void* pointer = emulator_dynamic + (int32_t)offset;
    check_shared(pointer, 1);
    return pointer;
}

// The stacks of all threads: `given`, or new ones. A process has one set for all its kernels, since guarded pages are
// scarce. Null: no memory.
__attribute__((visibility("default"))) void* emulator_stacks(void* given) {
    if (!given) {
        given = mmap(nullptr, MAX_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (given == MAP_FAILED) return nullptr;
        for (unsigned i = 0; i < MAX_THREADS; i++) mprotect((char*)given + i * STACK, PAGE, PROT_NONE);
    }
    return stacks = (char*)given;
}

// Null, or what went wrong. geometry: the grid's and the block's extents.
__attribute__((visibility("default"))) const char* emulator_launch(
    const char* name, void (*run)(void**), void** args, const unsigned* geometry, unsigned shared, bool programmatic) {
    static unsigned launches;
    kernel_name = name, kernel = run, kernel_args = args, shared_size = shared, programmatic_launch = programmatic;
    gridDim = {geometry[0], geometry[1], geometry[2]};
    blockDim = {geometry[3], geometry[4], geometry[5]};
    blockIdx = {0, 0, 0};
    threads = blockDim.x * blockDim.y * blockDim.z;
    if (!threads || threads > MAX_THREADS) return "a block of no threads, or of more than 1024";
    if (!gridDim.x || !gridDim.y || !gridDim.z) return "a grid of no blocks";
    if (shared > MAX_SHARED) return "more than 227 KB of dynamic shared memory";
    waiting_blocks = 0;
    backward = launches & 1, late_copies = launches >> 1 & 1, launches++;
    current = &fibers[0];
    arm(true);
    volatile bool failed = true;
    if (!sigsetjmp(abandoned, 1)) {
        unsigned long long blocks = (unsigned long long)gridDim.x * gridDim.y * gridDim.z;
        for (unsigned long long i = 0; i < blocks; i++) {
            unsigned long long block = backward ? blocks - 1 - i : i, row = block / gridDim.x;
            blockIdx = {(unsigned)(block % gridDim.x), (unsigned)(row % gridDim.y), (unsigned)(row / gridDim.y)};
            run_block();
        }
        if (programmatic && !waiting_blocks) emulator_fail("no thread calls wait_for_previous()");
        failed = false;
    }
    arm(false);
    return failed ? error.c_str() : nullptr;
}

}  // extern "C"
#pragma GCC visibility pop

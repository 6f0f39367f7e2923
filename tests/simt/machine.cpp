// The emulated machine (include/simt/machine.h): fibers, scheduler, shared memory, asynchronous
// copies, and the operations of whole warps. Compiled without ThreadSanitizer in its build, so
// that the machine's own bookkeeping is no race and orders nothing.
#include "internals.h"

#include <cxxabi.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>

namespace qlora_ext::simt {

Thread* current = nullptr;
uint64_t register_poison = 0;
bool tracing = false;

void* SyncObjects::at(int64_t generation) { return &objects[machine().set][generation & 1]; }

namespace {

// ---------------------------------------------------------------- fibers

#if defined(__x86_64__)
// Saves the callee-saved registers on the stack, swaps stacks, restores.
extern "C" void qlora_ext_simt_switch(void** save_stack, void* load_stack);
asm(R"(
.text
.p2align 4
.type qlora_ext_simt_switch,@function
qlora_ext_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size qlora_ext_simt_switch,.-qlora_ext_simt_switch
)");
#endif

std::mutex& machine_mutex() {
  static std::mutex* mutex = new std::mutex;
  return *mutex;
}

#if SIMT_ASAN
// Completes a switch, on the stack that was switched to.
void after_switch(Fiber& self) {
  Machine& m = machine();
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(self.fake_stack, &bottom, &size);
  if (!m.main_stack_known) {  // the first switch of a block is from main
    m.main.stack_bottom = bottom;
    m.main.stack_size = size;
    m.main_stack_known = true;
  }
}
#endif

void switch_fibers(Fiber& from, Fiber& to) {
  Machine& m = machine();
  m.running = &to;
  current = &to.thread;
#if SIMT_TSAN
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_size);
#endif
#if defined(__x86_64__)
  qlora_ext_simt_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if SIMT_ASAN
  after_switch(from);
#endif
}

Fiber* pick() {
  Machine& m = machine();
  if (m.reverse) {
    for (int i = 0; i < m.num_warps; ++i) {
      const int w = (m.warp_at - i + m.num_warps) % m.num_warps;
      Warp& warp = m.warps[w];
      if (warp.ready == 0) continue;
      m.warp_at = w;
      const int lane = 31 - __builtin_clz(warp.ready);
      warp.ready &= ~(1u << lane);
      return warp.lanes[lane];
    }
    return nullptr;
  }
  for (int i = 0; i < m.num_warps; ++i) {
    int w = m.warp_at + i;
    if (w >= m.num_warps) w -= m.num_warps;
    Warp& warp = m.warps[w];
    if (warp.ready == 0) continue;
    m.warp_at = w;
    const int lane = __builtin_ctz(warp.ready);
    warp.ready &= warp.ready - 1;
    return warp.lanes[lane];
  }
  return nullptr;
}

}  // namespace

std::string thread_name(const Fiber& f) {
  const uint3& t = f.thread.thread_index;
  char text[64];
  std::snprintf(text, sizeof text, "(%u,%u,%u)", t.x, t.y, t.z);
  return text;
}

std::string block_name(const Fiber& f) {
  const uint3& b = f.thread.block_index;
  char text[64];
  std::snprintf(text, sizeof text, "block (%u,%u,%u)", b.x, b.y, b.z);
  return text;
}

const char* base_name(const char* file) {
  const char* slash = std::strrchr(file, '/');
  return slash ? slash + 1 : file;
}

namespace {

// Who waits where, as runs of threads: "threads (0,0,0)..(15,0,0) wait in __syncthreads at f.cu:3".
std::string stuck_threads() {
  Machine& m = machine();
  std::vector<Fiber*> all;
  for (int w = 0; w < m.num_warps; ++w) {
    for (Fiber* f : m.warps[w].lanes) {
      if (f != nullptr) all.push_back(f);
    }
  }
  auto same = [](const Fiber& a, const Fiber& b) {
    return a.state == b.state &&
           (a.state == State::kFinished ||
            (a.site.line == b.site.line && std::strcmp(a.waits_in, b.waits_in) == 0));
  };
  std::string text;
  int runs = 0;
  for (size_t i = 0; i < all.size();) {
    size_t j = i;
    while (j + 1 < all.size() && same(*all[i], *all[j + 1])) ++j;
    if (++runs > 12) return text + "; ...";
    if (!text.empty()) text += "; ";
    text += i == j ? "thread " + thread_name(*all[i])
                   : "threads " + thread_name(*all[i]) + ".." + thread_name(*all[j]);
    if (all[i]->state == State::kFinished) {
      text += " returned";
    } else {
      text += std::string(" wait in ") + all[i]->waits_in + " at " + base_name(all[i]->site.file) +
              ":" + std::to_string(all[i]->site.line);
    }
    i = j + 1;
  }
  return text;
}

// Leaves the running fiber for the next one that can run, or for run() if none can.
void leave(Fiber& self) {
  Machine& m = machine();
  Fiber* next = pick();
  if (next == nullptr && !m.late.empty()) {
    next = m.late.front();
    m.late.erase(m.late.begin());
  }
  if (next == &self) {
    self.state = State::kReady;
    return;
  }
  if (next == nullptr) {
    if (m.finished < m.num_threads) {
      const Quiet quiet;
      m.error = block_name(self) + ": deadlock: " + stuck_threads() + stuck_mbarriers();
    }
    switch_fibers(self, m.main);
    return;
  }
  next->state = State::kReady;
  switch_fibers(self, *next);
}

}  // namespace

void wait(Fiber& self, const char* what, Site site) {
  self.state = State::kWaiting;
  self.waits_in = what;
  self.site = site;
  leave(self);
}

void make_ready(Fiber& f) {
  f.state = State::kReady;
  f.warp->ready |= 1u << f.thread.lane;
}

void let_others_run(const char* what, Site site) {
  Machine& m = machine();
  {
    const Quiet quiet;
    m.late.push_back(&self());
  }
  wait(self(), what, site);
}

namespace {

// What the kernel's local variables will find: its frames are to lie where this one does.
__attribute__((noinline)) void poison_stack() {
  unsigned char bytes[2048];
  std::memset(bytes, machine().poison, sizeof bytes);
  asm volatile("" : : "r"(bytes) : "memory");  // or the dead store would be removed
}

void fiber_entry() {
  Machine& m = machine();
#if SIMT_ASAN
  after_switch(*m.running);
#endif
  for (;;) {
    Fiber& self = *m.running;
    tsan_acquire(&m.begin_sync);
    if (m.poison_stacks) poison_stack();
    m.call(m.closure);
    hopper_end_thread();
    tsan_release(&m.end_sync);
    self.state = State::kFinished;
    self.warp->alive &= ~(1u << self.thread.lane);
    ++m.finished;
    leave(self);
  }
}

void reset_stack(Fiber& f, int index) {
  // Tops of stacks are staggered, or the hot frames of all fibers would share cache sets.
  char* top = f.stack + kStackBytes - 256 - (index % 29) * 128;
#if SIMT_ASAN
  __asan_unpoison_memory_region(f.stack, kStackBytes);
  f.stack_bottom = f.stack;
  f.stack_size = kStackBytes;
  f.fake_stack = nullptr;
#endif
#if defined(__x86_64__)
  void** frame = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
  frame -= 8;
  std::fill(frame, frame + 8, nullptr);
  frame[6] = reinterpret_cast<void*>(&fiber_entry);  // what the switch returns to
  f.stack_pointer = frame;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = static_cast<size_t>(top - f.stack);
  f.context.uc_link = nullptr;
  makecontext(&f.context, &fiber_entry, 0);
#endif
#if SIMT_TSAN
  if (f.tsan != nullptr) __tsan_destroy_fiber(f.tsan);
  f.tsan = __tsan_create_fiber(0);
  char name[32];
  std::snprintf(name, sizeof name, "CUDA thread %d", index);
  __tsan_set_fiber_name(f.tsan, name);
#endif
  f.state = State::kParked;
}

Fiber& fiber_at(int set, int index) {
  auto& fibers = machine().fibers[set];
  while (static_cast<int>(fibers.size()) <= index) {
    auto fiber = std::make_unique<Fiber>();
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) {
      std::fprintf(stderr, "simt: no memory for the stacks of fibers\n");
      std::abort();
    }
    fiber->stack = static_cast<char*>(stack);
    reset_stack(*fiber, static_cast<int>(fibers.size()));
    fibers.push_back(std::move(fiber));
  }
  return *fibers[index];
}

// ---------------------------------------------------------------- shared memory

void prepare_arena(uint32_t shared_bytes) {
  Machine& m = machine();
  constexpr size_t total = kArenaBytes + 2 * kRedZone;
  // Under ThreadSanitizer every block gets fresh pages, at the same address: what another block
  // did to its shared memory is no race with what this one does.
  if (m.arena == nullptr || SIMT_TSAN) {
    void* at = mmap(m.arena, total, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | (m.arena ? MAP_FIXED : 0), -1, 0);
    if (at == MAP_FAILED) {
      std::fprintf(stderr, "simt: no memory for shared memory\n");
      std::abort();
    }
    m.arena = static_cast<unsigned char*>(at);
  }
#if SIMT_ASAN
  __asan_unpoison_memory_region(m.arena, total);
  std::memset(m.arena, m.poison, total);
  __asan_poison_memory_region(m.arena, kRedZone);
  // AddressSanitizer marks whole 8-byte granules beyond the end.
  __asan_poison_memory_region(m.arena + kRedZone + shared_bytes, total - kRedZone - shared_bytes);
#else
  std::memset(m.arena, kCanary, kRedZone);
  std::memset(shared_begin(), m.poison, shared_bytes);
  std::memset(shared_begin() + shared_bytes, kCanary, kRedZone);
#endif
  m.shared_bytes = shared_bytes;
}

// Without AddressSanitizer the red zones at least show that something was written to them.
void check_canaries(const Fiber& any) {
#if SIMT_ASAN
  (void)any;
#else
  Machine& m = machine();
  auto report = [&](int64_t offset) {
    m.error = block_name(any) + ": a write outside shared memory, at byte " +
              std::to_string(offset) + " of " + std::to_string(m.shared_bytes);
  };
  for (uint32_t i = 0; i < kRedZone; ++i) {
    if (m.arena[i] != kCanary) return report(static_cast<int64_t>(i) - kRedZone);
    if (shared_begin()[m.shared_bytes + i] != kCanary) return report(m.shared_bytes + i);
  }
#endif
}

}  // namespace

bool overwritten(const Copy& copy) {
  const Quiet quiet;
  const auto poison = static_cast<unsigned char>(machine().poison);
  return std::any_of(copy.destination, copy.destination + copy.bytes,
                     [&](unsigned char byte) { return byte != poison; });
}

std::string overwritten_sentence(const Copy& copy) {
  return "byte " + std::to_string(copy.destination - shared_begin()) +
         " of shared memory was written while an asynchronous copy to it was under way";
}

void land(const Copy& copy) {
  std::memcpy(copy.destination, copy.source, copy.valid_bytes);
  std::memset(copy.destination + copy.valid_bytes, 0, copy.bytes - copy.valid_bytes);
}

namespace {

// ---------------------------------------------------------------- registry, settings

std::vector<std::unique_ptr<Kernel>>& kernels() {
  static auto* list = new std::vector<std::unique_ptr<Kernel>>;
  return *list;
}

struct TranslatedKernel {
  int arch;
  std::string function;
  Translation run;
  std::vector<size_t> parameters;
  int64_t max_threads;
};

std::vector<TranslatedKernel>& translations() {
  static auto* list = new std::vector<TranslatedKernel>;
  return *list;
}

// "ns::kernel<4, (bool)1>" of "void ns::kernel<4, (bool)1>(ns::Params)", however it is enclosed in
// "Launcher<&...>".
std::string function_name(const char* mangled) {
  int status = 0;
  char* text = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string name = status == 0 ? text : mangled;
  std::free(text);
  auto drop = [&](const char* start, size_t end) {
    const std::string s = start;
    if (name.compare(0, s.size(), s) != 0) return;
    name = name.substr(s.size(), name.size() - s.size() - end);
  };
  drop("qlora_ext::Launcher<&", 1);
  drop("(", 1);
  drop("void ", 0);
  if (name.back() != ')') return name;
  int depth = 0;
  size_t at = name.size();
  do {
    --at;
    depth += (name[at] == ')') - (name[at] == '(');
  } while (depth > 0 && at > 0);
  return name.substr(0, at);
}

// The binary that a driver takes for this device, of those for 7.5, 8.0 and 9.0a.
int binary_for(int arch) { return arch >= 90 ? 90 : arch >= 80 ? 80 : arch; }

const TranslatedKernel* find_translation(const Kernel& kernel, int arch) {
  for (const TranslatedKernel& t : translations()) {
    if (t.arch == arch && t.function == kernel.function) return &t;
  }
  return nullptr;
}

int shared_limit(int arch) {
  if (arch >= 90 && arch < 120) return 227 * 1024;
  if (arch == 80 || arch == 87) return 163 * 1024;
  if (arch >= 86) return 99 * 1024;
  return 64 * 1024;
}

int environment(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? std::atoi(value) : otherwise;
}

void read_environment() {
  static const bool once = [] {
    Machine& m = machine();
    m.poison = environment("SIMT_POISON", m.poison) & 0xff;
    m.poison_stacks = environment("SIMT_POISON", -1) >= 0;
    m.reverse = environment("SIMT_REVERSE", 0) != 0;
    m.ptx = environment("SIMT_PTX", 0) != 0;
    m.device.arch = environment("SIMT_ARCH", m.device.arch);
    m.device.sm_count = environment("SIMT_SM_COUNT", m.device.sm_count);
    return true;
  }();
  (void)once;
}

// SIMT_SKIP=name, or several separated by ';': these kernels do nothing. A name without its
// template arguments names every instantiation.
bool skipped(const std::string& name) {
  const char* value = std::getenv("SIMT_SKIP");
  if (value == nullptr || *value == '\0') return false;
  const std::string list = value;
  const std::string base = name.substr(0, name.find('<'));
  for (size_t begin = 0; begin <= list.size();) {
    const size_t end = std::min(list.find(';', begin), list.size());
    const std::string entry = list.substr(begin, end - begin);
    if (!entry.empty() && (entry == name || entry == base)) return true;
    begin = end + 1;
  }
  return false;
}

}  // namespace

// ---------------------------------------------------------------- failing

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Machine& m = machine();
  Fiber& f = self();
  if (&f == &m.main) {
    std::fprintf(stderr, "simt: outside a kernel: %s\n", text);
    std::abort();
  }
  {
    const Quiet quiet;
    if (m.error.empty()) m.error = block_name(f) + ", thread " + thread_name(f) + ": " + text;
  }
  switch_fibers(f, m.main);  // run() resets every fiber of the block
  std::abort();
}

// ---------------------------------------------------------------- warps

void meet(const Meeting& meeting, uint32_t mask, void* operand, Site site) {
  Fiber& f = self();
  Warp& warp = *f.warp;
  const uint32_t bit = 1u << f.thread.lane;
  if ((mask & bit) == 0) {
    fail("%s at %s:%d: lane %u is not in its own mask %08x", meeting.what, base_name(site.file),
         site.line, f.thread.lane, mask);
  }
  Gathering* g = nullptr;
  for (int i = 0; i < warp.num_gatherings && g == nullptr; ++i) {
    if (warp.gatherings[i].mask == mask) g = &warp.gatherings[i];
  }
  if (g == nullptr) {
    if (warp.num_gatherings == kMaxMasks) fail("a warp used more than %d masks", kMaxMasks);
    g = &warp.gatherings[warp.num_gatherings++];
    g->mask = mask;
    g->arrived = 0;
  }
  if (g->arrived == 0) {
    g->meeting = &meeting;
    g->site = site;
  } else if (g->meeting != &meeting || (meeting.aligned && g->site.line != site.line)) {
    fail("lane %u calls %s at %s:%d, other lanes of mask %08x are in %s at %s:%d", f.thread.lane,
         meeting.what, base_name(site.file), site.line, mask, g->meeting->what,
         base_name(g->site.file), g->site.line);
  }
  g->operands[f.thread.lane] = operand;
  g->arrived |= bit;
  void* const sync = g->sync.at(g->generation);
  if (meeting.orders) tsan_release(sync);
  if (g->arrived == mask) {
    g->arrived = 0;
    ++g->generation;
    if (meeting.run != nullptr) meeting.run(g->operands, mask);
    uint32_t others = mask & ~bit;
    warp.ready |= others;
  } else {
    wait(f, meeting.what, site);
  }
  if (meeting.orders) tsan_acquire(sync);
}

namespace {

template <class F>
void each_lane(uint32_t mask, F&& f) {
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) f(__builtin_ctz(rest));
}

void run_shuffle(void* const* operands, uint32_t mask) {
  each_lane(mask, [&](int lane) {
    auto& mine = *static_cast<ShuffleOperand*>(operands[lane]);
    if ((mask & (1u << mine.source)) == 0) {
      fail("a shuffle reads lane %u, which is not in mask %08x", mine.source, mask);
    }
    mine.result = static_cast<ShuffleOperand*>(operands[mine.source])->value;
  });
}

template <class F>
void run_vote(void* const* operands, uint32_t mask, F&& combine) {
  bool first = true;
  uint32_t result = 0;
  each_lane(mask, [&](int lane) {
    const uint32_t value = static_cast<VoteOperand*>(operands[lane])->value;
    result = first ? value : combine(result, value);
    first = false;
  });
  each_lane(mask, [&](int lane) { static_cast<VoteOperand*>(operands[lane])->result = result; });
}

template <class T, bool max>
void run_extreme(void* const* operands, uint32_t mask) {
  run_vote(operands, mask, [](uint32_t a, uint32_t b) {
    const T x = static_cast<T>(a), y = static_cast<T>(b);
    return static_cast<uint32_t>(max ? std::max(x, y) : std::min(x, y));
  });
}

void run_and(void* const* operands, uint32_t mask) {
  run_vote(operands, mask, [](uint32_t a, uint32_t b) { return a & b; });
}
void run_or(void* const* operands, uint32_t mask) {
  run_vote(operands, mask, [](uint32_t a, uint32_t b) { return a | b; });
}
void run_xor(void* const* operands, uint32_t mask) {
  run_vote(operands, mask, [](uint32_t a, uint32_t b) { return a ^ b; });
}
void run_add(void* const* operands, uint32_t mask) {
  run_vote(operands, mask, [](uint32_t a, uint32_t b) { return a + b; });
}
void run_ballot(void* const* operands, uint32_t mask) {
  uint32_t result = 0;
  each_lane(mask, [&](int lane) {
    if (static_cast<VoteOperand*>(operands[lane])->value != 0) result |= 1u << lane;
  });
  each_lane(mask, [&](int lane) { static_cast<VoteOperand*>(operands[lane])->result = result; });
}

// PTX ISA, ldmatrix and stmatrix: row r of matrix i is at the address of lane 8 * i + r.
template <class Operand>
std::array<unsigned char*, 32> matrix_rows(void* const* operands, const char* what) {
  std::array<unsigned char*, 32> rows;
  for (int i = 0; i < 32; ++i) {
    rows[i] = shared_pointer(static_cast<Operand*>(operands[i])->address, 16, 16, what);
  }
  return rows;
}

// With .trans lane l receives elements 2 * (l % 4) and + 1 of column l / 4 of each stored matrix.
void run_ldmatrix_x4_trans(void* const* operands, uint32_t) {
  const auto rows = matrix_rows<LdmatrixOperand>(operands, "ldmatrix");
  for (int lane = 0; lane < 32; ++lane) {
    auto& mine = *static_cast<LdmatrixOperand*>(operands[lane]);
    for (int i = 0; i < 4; ++i) {
      uint16_t element[2];
      for (int e = 0; e < 2; ++e) {
        const unsigned char* at = rows[8 * i + 2 * (lane % 4) + e] + 2 * (lane / 4);
        std::memcpy(&element[e], at, 2);
        mine.read[2 * i + e] = at;
      }
      mine.d[i] = element[0] | (static_cast<uint32_t>(element[1]) << 16);
    }
  }
}

// The same places, stored to.
void run_stmatrix_x4_trans(void* const* operands, uint32_t) {
  const auto rows = matrix_rows<StmatrixOperand>(operands, "stmatrix");
  for (int lane = 0; lane < 32; ++lane) {
    auto& mine = *static_cast<StmatrixOperand*>(operands[lane]);
    for (int e = 0; e < 8; ++e) {
      unsigned char* at = rows[8 * (e / 2) + 2 * (lane % 4) + e % 2] + 2 * (lane / 4);
      const auto element = static_cast<uint16_t>(mine.d[e / 2] >> 16 * (e % 2));
      std::memcpy(at, &element, 2);
      mine.written[e] = at;
    }
  }
}

// PTX ISA, mma.m16n8k16 and .m16n8k8 for 16-bit types. With group = lane / 4 and pair = lane % 4:
// A register r holds row group + 8 * (r % 2), columns 2 * pair + 8 * (r / 2) and the next; B
// register r holds rows 2 * pair + 8 * r and the next, column group; D element e holds row
// group + 8 * (e / 2), column 2 * pair + e % 2.
template <class T, int k>
void run_mma(void* const* operands, uint32_t) {
  float a[16][k];
  float b[k][8];
  float d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<MmaOperand*>(operands[lane]);
    const int group = lane / 4;
    const int pair = lane % 4;
    for (int r = 0; r < k / 4; ++r) {
      float* at = &a[group + 8 * (r % 2)][2 * pair + 8 * (r / 2)];
      at[0] = to_float<T>(static_cast<uint16_t>(mine.a[r]));
      at[1] = to_float<T>(static_cast<uint16_t>(mine.a[r] >> 16));
    }
    for (int r = 0; r < k / 8; ++r) {
      b[2 * pair + 8 * r][group] = to_float<T>(static_cast<uint16_t>(mine.b[r]));
      b[2 * pair + 8 * r + 1][group] = to_float<T>(static_cast<uint16_t>(mine.b[r] >> 16));
    }
    for (int e = 0; e < 4; ++e) d[group + 8 * (e / 2)][2 * pair + e % 2] = mine.d[e];
  }
  // Products of 16-bit values are exact in fp32; the sum's order is k ascending.
  for (int i = 0; i < 16; ++i) {
    for (int kk = 0; kk < k; ++kk) {
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][kk] * b[kk][j];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<MmaOperand*>(operands[lane]);
    const int group = lane / 4;
    const int pair = lane % 4;
    for (int e = 0; e < 4; ++e) mine.d[e] = d[group + 8 * (e / 2)][2 * pair + e % 2];
  }
}

}  // namespace

const Meeting kSyncWarp{"__syncwarp", false, true, nullptr};
const Meeting kShuffle{"__shfl_sync", false, false, run_shuffle};
const Meeting kShuffleUp{"__shfl_up_sync", false, false, run_shuffle};
const Meeting kShuffleDown{"__shfl_down_sync", false, false, run_shuffle};
const Meeting kShuffleXor{"__shfl_xor_sync", false, false, run_shuffle};
const Meeting kAny{"__any_sync", false, false, run_or};
const Meeting kAll{"__all_sync", false, false, run_and};
const Meeting kBallot{"__ballot_sync", false, false, run_ballot};
const Meeting kReduceAdd{"__reduce_add_sync", false, false, run_add};
const Meeting kReduceMinSigned{"__reduce_min_sync", false, false, run_extreme<int32_t, false>};
const Meeting kReduceMaxSigned{"__reduce_max_sync", false, false, run_extreme<int32_t, true>};
const Meeting kReduceMinUnsigned{"__reduce_min_sync", false, false, run_extreme<uint32_t, false>};
const Meeting kReduceMaxUnsigned{"__reduce_max_sync", false, false, run_extreme<uint32_t, true>};
const Meeting kReduceAnd{"__reduce_and_sync", false, false, run_and};
const Meeting kReduceOr{"__reduce_or_sync", false, false, run_or};
const Meeting kReduceXor{"__reduce_xor_sync", false, false, run_xor};
const Meeting kLdmatrixX4Trans{"ldmatrix_x4_trans", true, false, run_ldmatrix_x4_trans};
const Meeting kStmatrixX4Trans{"stmatrix_x4_trans", true, false, run_stmatrix_x4_trans};
const Meeting kMma16816F16{"mma_m16n8k16 (f16)", true, false, run_mma<__half, 16>};
const Meeting kMma16816Bf16{"mma_m16n8k16 (bf16)", true, false, run_mma<__nv_bfloat16, 16>};
const Meeting kMma1688F16{"mma_m16n8k8 (f16)", true, false, run_mma<__half, 8>};

// ---------------------------------------------------------------- block barriers

namespace {

// Counts one arrival; true for the one that completes the barrier.
bool arrive(Barrier& b, int id, int threads, const char* what, Site site) {
  Fiber& f = self();
  if (id < 0 || id > 15) fail("%s: barrier %d, want 0 to 15", what, id);
  if (threads <= 0 || threads % 32 != 0 || threads > kMaxThreads) {
    fail("%s: barrier %d is for %d threads, want a positive multiple of 32", what, id, threads);
  }
  if (b.arrived == 0) {
    b.expected = threads;
    b.count = 0;
  } else if (b.expected != threads) {
    fail("%s at %s:%d: barrier %d expects %d threads, other threads came with %d", what,
         base_name(site.file), site.line, id, threads, b.expected);
  }
  // bar.sync is .aligned: all lanes of a warp execute the same one.
  Warp::Arrival& arrival = f.warp->arrival[id];
  const uint32_t lane = 1u << f.thread.lane;
  if (arrival.generation != b.generation) {
    arrival.generation = b.generation;
    arrival.site = site;
    arrival.lanes = lane;
  } else if ((arrival.lanes & lane) != 0) {
    fail("%s at %s:%d: this thread has arrived at barrier %d, which still misses %d threads", what,
         base_name(site.file), site.line, id, b.expected - b.arrived);
  } else if (arrival.site.line != site.line || std::strcmp(arrival.site.file, site.file) != 0) {
    fail("divergent barrier: %s at %s:%d, other lanes of the warp are at %s:%d", what,
         base_name(site.file), site.line, base_name(arrival.site.file), arrival.site.line);
  }
  arrival.lanes |= lane;
  return ++b.arrived == b.expected;
}

void release_all(Barrier& b) {
  b.arrived = 0;
  ++b.generation;
  for (Fiber* waiter : b.waiting) {
    switch (b.reduce) {
      case Reduce::kCount: waiter->reduced = b.count; break;
      case Reduce::kAnd: waiter->reduced = b.count == b.expected; break;
      case Reduce::kOr: waiter->reduced = b.count != 0; break;
      case Reduce::kNone: break;
    }
    make_ready(*waiter);
  }
  b.waiting.clear();
}

}  // namespace

int barrier_sync(int id, int threads, bool whole_block, Reduce reduce, int predicate,
                 const char* what, Site site) {
  Machine& m = machine();
  Fiber& f = self();
  // A last warp that is not full counts as a full one.
  if (whole_block) threads = m.num_threads;
  if (whole_block && threads % 32 != 0) {
    fail("%s: the block has %d threads, want a multiple of 32", what, threads);
  }
  if (!whole_block && id == 0) fail("%s: barrier 0 is __syncthreads", what);
  Barrier& b = m.barriers[id & 15];
  const bool last = arrive(b, id, threads, what, site);
  b.count += predicate != 0;
  b.reduce = reduce;
  void* const sync = b.sync.at(b.generation);
  tsan_release(sync);
  {
    const Quiet quiet;
    b.waiting.push_back(&f);
  }
  if (last) {
    release_all(b);
    // This fiber just runs on.
    f.warp->ready &= ~(1u << f.thread.lane);
  } else {
    wait(f, what, site);
  }
  tsan_acquire(sync);
  return f.reduced;
}

void barrier_arrive(int id, int threads, Site site) {
  if (id == 0) fail("barrier_arrive: barrier 0 is __syncthreads");
  Barrier& b = machine().barriers[id & 15];
  const bool last = arrive(b, id, threads, "barrier_arrive", site);
  tsan_release(b.sync.at(b.generation));
  if (last) release_all(b);
}

void thread_fence() {
  Machine& m = machine();
  tsan_acquire(&m.fence_sync);
  tsan_release(&m.fence_sync);
}

void yield() {
  Fiber& f = self();
  make_ready(f);
  leave(f);
}

// ---------------------------------------------------------------- shared memory

void* shared_memory(size_t bytes, const char* type) {
  Machine& m = machine();
  if (bytes > m.shared_bytes) {
    fail("shared memory: the kernel was launched with %u bytes, its struct has %zu (%s)",
         m.shared_bytes, bytes, type);
  }
  return shared_begin();
}

uint32_t shared_address(const void* pointer) {
  Machine& m = machine();
  const auto* p = static_cast<const unsigned char*>(pointer);
  // One past the end is an address that may be formed.
  if (p < shared_begin() || p > shared_begin() + m.shared_bytes) {
    fail("shared_address: %p is not in shared memory", pointer);
  }
  return static_cast<uint32_t>(p - m.arena);
}

unsigned char* shared_pointer(uint32_t address, size_t bytes, size_t alignment, const char* what) {
  Machine& m = machine();
  if (address < kRedZone || address + bytes > kRedZone + m.shared_bytes) {
    fail("%s: %zu bytes at byte %lld are outside shared memory of %u bytes", what, bytes,
         static_cast<long long>(address) - kRedZone, m.shared_bytes);
  }
  if (address % alignment != 0) {
    fail("%s: byte %u of shared memory is misaligned, want a multiple of %zu", what,
         address - kRedZone, alignment);
  }
  return m.arena + address;
}

void note_shared(uint32_t address, uint32_t bytes, int line) {
  Machine& m = machine();
  m.trace.push_back({line, m.running->linear, address - kRedZone, bytes});
}

void copy_async(uint32_t address, const void* global, int bytes, int valid_bytes,
                const char* what) {
  Fiber& f = self();
  unsigned char* destination = shared_pointer(address, bytes, bytes, what);
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    fail("%s: source %p is misaligned, want a multiple of %d", what, global, bytes);
  }
  note_write(destination, bytes);
  std::memset(destination, machine().poison, bytes);
  f.copies.push_back({destination, global, bytes, valid_bytes});
  ++f.uncommitted;
}

void copy_async_commit() {
  Fiber& f = self();
  f.groups.push_back(f.uncommitted);
  f.uncommitted = 0;
}

void copy_async_wait(int pending) {
  Fiber& f = self();
  land_copies_of_arrivals(f);
  size_t landed = 0;
  size_t groups_done = 0;
  while (f.groups.size() - groups_done > static_cast<size_t>(pending)) {
    for (size_t i = 0; i < f.groups[groups_done]; ++i, ++landed) {
      if (overwritten(f.copies[landed])) {
        fail("cp_async_wait: %s", overwritten_sentence(f.copies[landed]).c_str());
      }
      note_write(f.copies[landed].destination, f.copies[landed].bytes);
      note_read(f.copies[landed].source, f.copies[landed].valid_bytes);
      land(f.copies[landed]);
      note_store(f.copies[landed].destination, f.copies[landed].bytes);
    }
    ++groups_done;
  }
  f.copies.erase(f.copies.begin(), f.copies.begin() + landed);
  f.groups.erase(f.groups.begin(), f.groups.begin() + groups_done);
}

// ---------------------------------------------------------------- launching

Kernel& register_kernel(const char* name, const char* launcher) {
  for (auto& kernel : kernels()) {
    if (std::strcmp(kernel->name, name) == 0) return *kernel;
  }
  kernels().push_back(std::make_unique<Kernel>(Kernel{strdup(name), function_name(launcher), 0}));
  return *kernels().back();
}

bool register_translation(int arch, const char* mangled, Translation run,
                          std::vector<size_t> parameters, int64_t max_threads) {
  translations().push_back({arch, function_name(mangled), run, std::move(parameters), max_threads});
  return true;
}

const Device& device() {
  read_environment();
  Machine& m = machine();
  m.device.shared_bytes = shared_limit(m.device.arch);
  return m.device;
}

Stream& stream() { return machine().stream; }

namespace {

const char* sentence(const std::string& text) {
  static thread_local std::string kept;
  kept = text;
  return kept.c_str();
}

// Runs one block; false after an error.
bool run_block(int set, uint3 block_index, dim3 grid, dim3 block, size_t shared_bytes) {
  Machine& m = machine();
  m.set = set;
  prepare_arena(static_cast<uint32_t>(shared_bytes));
  m.num_threads = static_cast<int>(block.x * block.y * block.z);
  m.num_warps = (m.num_threads + 31) / 32;
  m.finished = 0;
  m.warp_at = m.reverse ? m.num_warps - 1 : 0;
  m.late.clear();
  for (Barrier& b : m.barriers) {
    b.arrived = 0;
    ++b.generation;  // an aborted block may have left arrivals of this one
    b.waiting.clear();
  }
  for (int w = 0; w < m.num_warps; ++w) {
    Warp& warp = m.warps[w];
    warp.ready = 0;
    std::fill(std::begin(warp.lanes), std::end(warp.lanes), nullptr);
    warp.num_gatherings = 0;
  }
  for (int i = 0; i < m.num_threads; ++i) {
    Fiber& f = fiber_at(set, i);
    const auto u = static_cast<unsigned>(i);
    f.thread.thread_index = uint3{u % block.x, u / block.x % block.y, u / (block.x * block.y)};
    f.thread.block_index = block_index;
    f.thread.block_dim = block;
    f.thread.grid_dim = grid;
    f.thread.lane = u % 32;
    f.linear = u;
    f.warp = &m.warps[i / 32];
    f.warp->lanes[i % 32] = &f;
    f.warp->alive |= 1u << (i % 32);
    f.copies.clear();
    f.groups.clear();
    f.uncommitted = 0;
    make_ready(f);
  }
  hopper_begin_block();
  tsan_release(&m.begin_sync);
  Fiber* first = pick();
  switch_fibers(m.main, *first);
  if (m.error.empty()) check_canaries(*first);
  for (int i = 0; i < m.num_threads && m.error.empty(); ++i) {
    Fiber& f = fiber_at(set, i);
    for (const Copy& copy : f.copies) {  // never waited for, and allowed to land until now
      if (overwritten(copy)) {
        m.error = block_name(f) + ", thread " + thread_name(f) + ": " + overwritten_sentence(copy);
        break;
      }
    }
  }
  if (m.error.empty()) return true;
  for (int i = 0; i < m.num_threads; ++i) reset_stack(fiber_at(set, i), i);
  return false;
}

}  // namespace

const char* run(Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes, const Launch& launch) {
  const std::lock_guard<std::mutex> lock(machine_mutex());
  Machine& m = machine();
  const std::string name = kernel.name;
  const int64_t threads = int64_t{block.x} * block.y * block.z;
  auto refuse = [&](const std::string& what) {
    return sentence(name + ": launch failed: " + what);
  };
  if (threads < 1 || threads > kMaxThreads || block.z > 64) {
    return refuse("a block has 1 to 1024 threads, got " + std::to_string(threads));
  }
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return refuse("a grid has at most 2^31 - 1, 65535 and 65535 blocks");
  }
  if (shared_bytes > static_cast<size_t>(device().shared_bytes)) {
    return refuse(std::to_string(shared_bytes) + " bytes of shared memory, the device has " +
                  std::to_string(device().shared_bytes));
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  ++kernel.launches;
  if (skipped(name)) return nullptr;

  struct Translated {
    Translation run;
    void* const* arguments;
  } translated{nullptr, launch.arguments};
  if (m.ptx) {
    const int arch = binary_for(device().arch);
    const TranslatedKernel* found = find_translation(kernel, arch);
    if (found == nullptr) {
      return refuse("no PTX for sm_" + std::to_string(arch) + " of " + kernel.function);
    }
    if (found->parameters != launch.parameters) {
      return refuse("its parameters have other sizes on the device than on the host");
    }
    if (threads > found->max_threads) {
      return refuse(std::to_string(threads) + " threads, its __launch_bounds__ allow " +
                    std::to_string(found->max_threads));
    }
    register_poison = 0x0101010101010101u * static_cast<unsigned>(m.poison);
    translated.run = found->run;
    m.call = [](void* closure) {
      auto* kernel = static_cast<Translated*>(closure);
      kernel->run(kernel->arguments);
    };
    m.closure = &translated;
  } else {
    m.call = launch.call;
    m.closure = launch.closure;
  }
  m.kernel = &kernel;
  m.error.clear();
  m.running = &m.main;
#if SIMT_TSAN
  m.main.tsan = __tsan_get_current_fiber();
#endif
#if SIMT_ASAN
  m.main_stack_known = false;  // another thread's may have been
#endif
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  const int64_t begin = m.last_blocks > 0 ? std::max<int64_t>(0, blocks - m.last_blocks) : 0;
  for (int64_t i = begin; i < blocks; ++i) {
    const int64_t b = m.reverse ? blocks - 1 - (i - begin) : i;
    const uint3 index{static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                      static_cast<unsigned>(b / grid.x / grid.y)};
    tracing = b == 0 && m.traced == name;
    if (!run_block(static_cast<int>(i % kFiberSets), index, grid, block, shared_bytes)) break;
  }
  tracing = false;
  tsan_acquire(&m.end_sync);
  current = nullptr;
  if (!m.error.empty()) return sentence(name + ": run failed: " + m.error);
  return nullptr;
}

}  // namespace qlora_ext::simt

// ---------------------------------------------------------------- for tests, through ctypes

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

using namespace qlora_ext::simt;

// Every registered kernel: "launches\tname\n".
SIMT_EXPORT const char* simt_kernels() {
  std::string text;
  for (const auto& kernel : kernels()) {
    text += std::to_string(kernel->launches) + "\t" + kernel->name + "\n";
  }
  return sentence(text);
}
SIMT_EXPORT void simt_reset_launches() {
  for (const auto& kernel : kernels()) kernel->launches = 0;
}
SIMT_EXPORT void simt_set_poison(int byte) {
  read_environment();
  machine().poison = byte & 0xff;
}
// Local variables start with the pattern as well: slower.
SIMT_EXPORT void simt_set_poison_stacks(int poison) { machine().poison_stacks = poison != 0; }
// Highest lanes, warps and blocks first, asynchronous work late.
SIMT_EXPORT void simt_set_reverse(int reverse) {
  read_environment();
  machine().reverse = reverse != 0;
}
SIMT_EXPORT void simt_set_device(int arch, int sm_count) {
  read_environment();
  machine().device.arch = arch;
  machine().device.sm_count = sm_count;
}
SIMT_EXPORT int simt_arch() { return device().arch; }
SIMT_EXPORT int simt_sm_count() { return device().sm_count; }
SIMT_EXPORT void simt_set_capturing(int capturing) { stream().capturing = capturing != 0; }
SIMT_EXPORT int64_t simt_synchronizations() { return stream().synchronizations; }
// Kernels run as nvcc compiled them, where the library holds that.
SIMT_EXPORT void simt_set_ptx(int ptx) {
  read_environment();
  machine().ptx = ptx != 0;
}
SIMT_EXPORT int simt_ptx() {
  read_environment();
  return machine().ptx;
}
// Every kernel that is there as nvcc compiled it: "architecture\tname\n".
SIMT_EXPORT const char* simt_translations() {
  std::string text;
  for (const int arch : {75, 80, 90}) {
    for (const auto& kernel : kernels()) {
      if (find_translation(*kernel, arch) == nullptr) continue;
      text += std::to_string(arch) + "\t" + kernel->name + "\n";
    }
  }
  return sentence(text);
}
// Runs only the last n blocks of every grid; 0 is all.
SIMT_EXPORT void simt_set_last_blocks(int64_t n) { machine().last_blocks = n; }
// Notes the accesses to shared memory of this kernel's first block, in every launch, until another
// (or "") is named.
SIMT_EXPORT void simt_trace(const char* kernel) {
  machine().traced = kernel;
  machine().trace.clear();
}
SIMT_EXPORT int64_t simt_traced(const SharedAccess** accesses) {
  *accesses = machine().trace.data();
  return static_cast<int64_t>(machine().trace.size());
}

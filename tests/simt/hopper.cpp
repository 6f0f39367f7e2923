// What the emulated machine (machine.cpp) has of Hopper: mbarriers, bulk and tensor copies, what
// the async proxy sees of shared memory, and warpgroups, their products and their registers.
//
// Asynchronous work runs at one of two times. Forwards, when it is issued; in reverse
// (simt_set_reverse) as late as its wait allows, after everything else that can run. Tests ask for
// the same bytes. In both its operands must be the same at the wait as they were at the issue.
#include "internals.h"

#include <algorithm>
#include <deque>

#include "cuda/wgmma_layout.cuh"

namespace qlora_ext::simt {

uintptr_t shared_memory_begin = 0;
size_t shared_memory_bytes = 0;

namespace {

constexpr int kMaxWarpgroups = kMaxThreads / 128;
constexpr uint32_t kBlockRegisters = 65536;

// ---------------------------------------------------------------- state of a block

// Registers that a thread's products take, with what they held at its last wgmma_fence.
struct Registers {
  std::vector<uint32_t*> at;
  std::vector<uint32_t> fenced;
  bool in_flight = false;
};

struct BulkStore {
  struct Piece {
    unsigned char* global;
    unsigned char* shared;
    uint32_t bytes;
  };
  std::vector<Piece> pieces;
  std::vector<unsigned char> bytes;  // of all pieces, as they were at the issue
};

struct BulkGroup {
  std::vector<BulkStore> stores;
  bool read = false;  // their shared memory
};

struct ThreadState {
  uint32_t proxy_fences = 0;
  bool wgmma_fenced = false;
  bool committed_wgmma = false;  // ever
  std::vector<Registers> registers;
  std::vector<BulkStore> uncommitted;
  std::vector<BulkGroup> groups;
};

// The accumulators of a product in flight: their registers hold poison.
struct Accumulators {
  int n;
  int products = 0;                // in flight
  std::vector<uint32_t*> at[128];  // by thread
  std::vector<float> values;       // [64, n]
};

struct Product {
  WgmmaOperand operand;
  Site site;
  Accumulators* d;
  uint32_t* a_at[128][4];
  uint32_t a[128][4];
  std::vector<unsigned char> b;  // [n, 16] of 16-bit values, as they were at the issue
};

struct Warpgroup {
  int arrived = 0;
  void* operands[128];
  Fiber* threads[128];
  const char* what;
  Site site{"", 0};

  std::vector<std::unique_ptr<Accumulators>> accumulators;
  std::vector<Product> uncommitted;
  std::deque<std::vector<Product>> groups;
  int64_t generation = 0;  // of committed groups

  uint32_t registers = 0;
  SyncObjects sync;
};

struct Hopper {
  std::vector<std::unique_ptr<Mbarrier>> mbarriers;
  // Who last stored to each word of shared memory by itself: the thread and one more than the
  // number of its proxy fences before that. 0 is nobody.
  std::vector<uint32_t> writers;
  std::vector<ThreadState> threads;
  Warpgroup warpgroups[kMaxWarpgroups];
  uint32_t free_registers = 0;
  std::vector<Fiber*> wait_for_registers;
};

Hopper& hopper() {
  static Hopper* h = new Hopper;
  return *h;
}

ThreadState& my_state() { return hopper().threads[self().linear]; }

Fiber& thread_of(uint32_t linear) { return *machine().warps[linear / 32].lanes[linear % 32]; }

// ---------------------------------------------------------------- the async proxy

constexpr uint32_t kThreadBits = 10;

void note_stores_of(const Fiber& f, uint32_t offset, size_t bytes) {
  if (bytes == 0) return;
  Hopper& h = hopper();
  const uint32_t entry = (h.threads[f.linear].proxy_fences + 1) << kThreadBits | f.linear;
  for (size_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) h.writers[word] = entry;
}

void forget_stores(const unsigned char* at, size_t bytes) {
  const size_t offset = static_cast<size_t>(at - shared_begin());
  const auto words = hopper().writers.begin();
  std::fill(words + offset / 4, words + (offset + bytes + 3) / 4, 0u);
}

// The async proxy is about to use these bytes.
void check_fenced(const unsigned char* at, size_t bytes, const char* what, const char* does) {
  Hopper& h = hopper();
  const size_t offset = static_cast<size_t>(at - shared_begin());
  for (size_t word = offset / 4; word < (offset + bytes + 3) / 4; ++word) {
    const uint32_t entry = h.writers[word];
    if (entry == 0) continue;
    const uint32_t linear = entry & ((1u << kThreadBits) - 1);
    if ((entry >> kThreadBits) != h.threads[linear].proxy_fences + 1) continue;
    fail(
        "%s %s byte %zu of shared memory, which thread %s wrote, and it made no "
        "fence_proxy_async since",
        what, does, std::max(offset, 4 * word), thread_name(thread_of(linear)).c_str());
  }
}

// ---------------------------------------------------------------- mbarriers

Mbarrier& mbarrier_at(uint32_t address, const char* what) {
  shared_pointer(address, 8, 8, what);
  for (auto& b : hopper().mbarriers) {
    if (b->address == address) return *b;
  }
  fail("%s: byte %u of shared memory holds no initialized mbarrier", what, address - kRedZone);
}

// The same for a copy, which the async proxy counts.
Mbarrier& mbarrier_of_copy(uint32_t address, const char* what) {
  Mbarrier& b = mbarrier_at(address, what);
  if (b.unfenced != nullptr) {
    fail("%s: thread %s made no fence_mbarrier_init since it initialized the mbarrier at byte %u",
         what, thread_name(*b.unfenced).c_str(), address - kRedZone);
  }
  return b;
}

int pending_of(const Mbarrier& b) { return b.pending - static_cast<int>(b.copy_arrivals.size()); }

void wake(Mbarrier& b) {
  for (Fiber* waiter : b.waiting) make_ready(*waiter);
  b.waiting.clear();
}

void complete_if_done(Mbarrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  ++b.phase;
  b.pending = b.arrivals;
  wake(b);
}

// The copy engine is a thread of its own to ThreadSanitizer: ordered after what issued the copies,
// and before those who wait for the mbarrier.
void note_bulk_writes(Mbarrier& b) {
#if SIMT_TSAN
  Machine& m = machine();
  void*& engine = m.copy_engine[m.set];
  if (engine == nullptr) {
    engine = __tsan_create_fiber(0);
    __tsan_set_fiber_name(engine, "bulk copies");
  }
  void* const thread = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(engine, __tsan_switch_to_fiber_no_sync);
  tsan_acquire(&m.bulk_sync[m.set]);
  for (const Copy& copy : b.copies) {
    note_write(copy.destination, copy.bytes);
    note_read(copy.source, copy.valid_bytes);
  }
  tsan_release(b.sync.at(b.phase));
  __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync);
#else
  (void)b;
#endif
}

void land_copies(CopyArrival& arrival) {
  for (const Copy& copy : arrival.copies) {
    if (overwritten(copy)) fail("mbarrier: %s", overwritten_sentence(copy).c_str());
    const Quiet quiet;
    land(copy);
    note_stores_of(*arrival.thread, static_cast<uint32_t>(copy.destination - shared_begin()),
                   copy.bytes);
  }
  const Quiet quiet;
  arrival.copies.clear();
}

// Lands the copies if nothing else keeps the phase from completing.
void land_if_last(Mbarrier& b) {
  if (pending_of(b) != 0 || (b.copies.empty() && b.copy_arrivals.empty())) return;
  for (CopyArrival& arrival : b.copy_arrivals) land_copies(arrival);
  for (const Copy& copy : b.copies) {
    if (overwritten(copy)) fail("mbarrier: %s", overwritten_sentence(copy).c_str());
  }
  note_bulk_writes(b);
  {
    const Quiet quiet;
    b.pending -= static_cast<int>(b.copy_arrivals.size());
    b.copy_arrivals.clear();
    for (const Copy& copy : b.copies) {
      land(copy);
      b.bytes -= copy.bytes;
    }
    b.copies.clear();
  }
  if (b.bytes < 0) {
    fail("mbarrier at byte %u: %lld bytes more landed than this phase expects",
         b.address - kRedZone, -static_cast<long long>(b.bytes));
  }
  complete_if_done(b);
}

void arrived(Mbarrier& b) {
  complete_if_done(b);
  if (pending_of(b) == 0) wake(b);  // to land the copies
}

void check_arrival(Mbarrier& b, const char* what) {
  land_if_last(b);  // nobody waited for the phase before, but it is complete
  if (pending_of(b) == 0) fail("%s: more arrivals than the %d of this phase", what, b.arrivals);
  tsan_release(b.sync.at(b.phase));
}

}  // namespace

void mbarrier_init(uint32_t address, int arrivals) {
  const unsigned char* at = shared_pointer(address, 8, 8, "mbarrier_init");
  if (arrivals < 1) fail("mbarrier_init: %d arrivals, want at least 1", arrivals);
  const Quiet quiet;
  auto& all = hopper().mbarriers;
  all.erase(
      std::remove_if(all.begin(), all.end(), [&](const auto& b) { return b->address == address; }),
      all.end());
  all.push_back(std::make_unique<Mbarrier>());
  all.back()->address = address;
  all.back()->arrivals = all.back()->pending = arrivals;
  all.back()->unfenced = &self();
  forget_stores(at, 8);
}

void fence_mbarrier_init() {
  for (auto& b : hopper().mbarriers) {
    if (b->unfenced == &self()) b->unfenced = nullptr;
  }
}

void fence_proxy_async() {
  ++my_state().proxy_fences;
  fence_mbarrier_init();
}

void mbarrier_arrive(uint32_t address, uint32_t expected_bytes) {
  Mbarrier& b = mbarrier_at(address, "mbarrier_arrive");
  check_arrival(b, "mbarrier_arrive");
  b.bytes += expected_bytes;
  --b.pending;
  arrived(b);
}

void copy_async_arrive(uint32_t address) {
  Fiber& f = self();
  Mbarrier& b = mbarrier_at(address, "cp_async_mbarrier_arrive");
  check_arrival(b, "cp_async_mbarrier_arrive");
  const Quiet quiet;
  b.copy_arrivals.push_back({&f, std::move(f.copies)});
  f.copies.clear();
  f.groups.assign(f.groups.size(), 0);
  f.uncommitted = 0;
  arrived(b);
}

void land_copies_of_arrivals(Fiber& f) {
  for (auto& b : hopper().mbarriers) {
    for (CopyArrival& arrival : b->copy_arrivals) {
      if (arrival.thread == &f) land_copies(arrival);
    }
  }
}

void mbarrier_wait(uint32_t address, uint32_t parity, Site site) {
  Fiber& f = self();
  if (parity > 1) fail("mbarrier_wait: parity %u, want 0 or 1", parity);
  // The phase under way has parity phase & 1; waiting for the other one, which is complete (or,
  // at first, counts as complete), returns at once.
  for (;;) {
    Mbarrier& b = mbarrier_at(address, "mbarrier_wait");
    if ((b.phase & 1) == parity) land_if_last(b);
    if ((b.phase & 1) != parity) {
      tsan_acquire(b.sync.at(parity));
      return;
    }
    {
      const Quiet quiet;
      b.waiting.push_back(&f);
    }
    wait(f, "mbarrier_wait", site);
  }
}

std::string stuck_mbarriers() {
  std::string text;
  for (const auto& b : hopper().mbarriers) {
    if (b->waiting.empty()) continue;
    text += "; phase " + std::to_string(b->phase) + " of the mbarrier at byte " +
            std::to_string(b->address - kRedZone) + " misses " + std::to_string(pending_of(*b)) +
            " arrivals and " + std::to_string(b->bytes) + " bytes";
  }
  return text;
}

// ---------------------------------------------------------------- bulk and tensor copies

namespace {

void begin_copy(Mbarrier& b, unsigned char* destination, const void* source, uint32_t bytes,
                uint32_t valid_bytes) {
  std::memset(destination, machine().poison, bytes);
  forget_stores(destination, bytes);
  b.copies.push_back({destination, source, static_cast<int>(bytes), static_cast<int>(valid_bytes)});
}

// The box of a tensor map at some coordinates, in pieces of at most 16 bytes, as f(offset of the
// piece in shared memory, its global bytes, how many, of these how many are in the tensor).
template <class F>
void each_piece(const TensorMap& map, const int32_t* at, uint32_t shared, F&& f) {
  constexpr uint32_t kChunk = 16;
  const uint32_t row_bytes = map.box[0] * map.element_bytes;
  const uint32_t rows = map.box[1] * (map.rank > 2 ? map.box[2] : 1);
  const int64_t width = static_cast<int64_t>(map.size[0]) * map.element_bytes;
  for (uint32_t row = 0; row < rows; ++row) {
    const int64_t y = at[1] + static_cast<int64_t>(row % map.box[1]);
    const int64_t z = map.rank > 2 ? at[2] + static_cast<int64_t>(row / map.box[1]) : 0;
    const bool inside = y >= 0 && y < static_cast<int64_t>(map.size[1]) && z >= 0 &&
                        (map.rank < 3 || z < static_cast<int64_t>(map.size[2]));
    for (uint32_t begin = 0; begin < row_bytes; begin += kChunk) {
      // TMA swizzles addresses: the number of a 16-byte chunk by that of its 128-byte line.
      uint32_t address = shared + row * row_bytes + begin;
      if (map.swizzle > 16) address ^= (address >> 7 & (map.swizzle / kChunk - 1)) * kChunk;
      const int64_t x = static_cast<int64_t>(at[0]) * map.element_bytes + begin;
      unsigned char* const line =
          map.base + y * static_cast<int64_t>(map.stride[0]) +
          (map.rank > 2 ? z * static_cast<int64_t>(map.stride[1]) : int64_t{0});
      const uint32_t before = static_cast<uint32_t>(std::clamp<int64_t>(-x, 0, kChunk));
      const uint32_t until = static_cast<uint32_t>(std::clamp<int64_t>(width - x, before, kChunk));
      if (before > 0) f(address, map.base, before, 0u);
      if (before < kChunk) {
        f(address + before, inside ? line + x + before : map.base, kChunk - before,
          inside ? until - before : 0u);
      }
    }
  }
}

const TensorMap& check_map(const TensorMap& map, int rank, uint32_t shared, const char* what) {
  if (map.magic != TensorMap::kMagic) fail("%s: this is no tensor map", what);
  if (map.rank != static_cast<uint32_t>(rank)) {
    fail("%s: %d coordinates for a tensor map of %u dimensions", what, rank, map.rank);
  }
  shared_pointer(shared, map.box_bytes(), 128, what);
  return map;
}

void issue_store(BulkStore store, const char* what) {
  for (const auto& piece : store.pieces) {
    check_fenced(piece.shared, piece.bytes, what, "reads");
    note_read(piece.shared, piece.bytes);
    const Quiet quiet;
    store.bytes.insert(store.bytes.end(), piece.shared, piece.shared + piece.bytes);
  }
  const Quiet quiet;
  my_state().uncommitted.push_back(std::move(store));
}

void write_group(const BulkGroup& group) {
  for (const BulkStore& store : group.stores) {
    size_t at = 0;
    for (const auto& piece : store.pieces) {
      note_write(piece.global, piece.bytes);
      std::memcpy(piece.global, store.bytes.data() + at, piece.bytes);
      at += piece.bytes;
    }
  }
}

void read_group(BulkGroup& group) {
  for (const BulkStore& store : group.stores) {
    size_t at = 0;
    for (const auto& piece : store.pieces) {
      note_read(piece.shared, piece.bytes);
      if (std::memcmp(piece.shared, store.bytes.data() + at, piece.bytes) != 0) {
        fail("byte %td of shared memory was written while a bulk store was reading it",
             piece.shared - shared_begin());
      }
      at += piece.bytes;
    }
  }
  group.read = true;
}

}  // namespace

void bulk_copy(uint32_t address, const void* global, uint32_t bytes, uint32_t mbarrier) {
  if (bytes == 0 || bytes % 16 != 0) {
    fail("bulk_copy: %u bytes, want a positive multiple of 16", bytes);
  }
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail("bulk_copy: source %p is misaligned, want a multiple of 16", global);
  }
  unsigned char* destination = shared_pointer(address, bytes, 16, "bulk_copy");
  Mbarrier& b = mbarrier_of_copy(mbarrier, "bulk_copy");
  check_fenced(destination, bytes, "bulk_copy", "overwrites");
  note_write(destination, bytes);
  tsan_release(&machine().bulk_sync[machine().set]);
  const Quiet quiet;
  begin_copy(b, destination, global, bytes, bytes);
  wake(b);
}

void tensor_load(uint32_t address, const TensorMap& tensor, const int32_t* at, int rank,
                 uint32_t mbarrier) {
  const TensorMap& map = check_map(tensor, rank, address, "tensor_load");
  Mbarrier& b = mbarrier_of_copy(mbarrier, "tensor_load");
  unsigned char* destination = machine().arena + address;
  check_fenced(destination, map.box_bytes(), "tensor_load", "overwrites");
  note_write(destination, map.box_bytes());
  tsan_release(&machine().bulk_sync[machine().set]);
  const Quiet quiet;
  each_piece(map, at, address,
             [&](uint32_t shared, unsigned char* global, uint32_t bytes, uint32_t valid) {
               begin_copy(b, machine().arena + shared, global, bytes, valid);
             });
  wake(b);
}

void tensor_store(const TensorMap& tensor, const int32_t* at, int rank, uint32_t address) {
  const TensorMap& map = check_map(tensor, rank, address, "tensor_store");
  BulkStore store;
  {
    const Quiet quiet;
    each_piece(map, at, address,
               [&](uint32_t shared, unsigned char* global, uint32_t, uint32_t valid) {
                 if (valid > 0) store.pieces.push_back({global, machine().arena + shared, valid});
               });
  }
  issue_store(std::move(store), "tensor_store");
}

void bulk_store(void* global, uint32_t address, uint32_t bytes) {
  if (bytes == 0 || bytes % 16 != 0) {
    fail("bulk_store: %u bytes, want a positive multiple of 16", bytes);
  }
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail("bulk_store: destination %p is misaligned, want a multiple of 16", global);
  }
  unsigned char* source = shared_pointer(address, bytes, 16, "bulk_store");
  BulkStore store;
  {
    const Quiet quiet;
    store.pieces.push_back({static_cast<unsigned char*>(global), source, bytes});
  }
  issue_store(std::move(store), "bulk_store");
}

void bulk_commit() {
  const Quiet quiet;
  ThreadState& t = my_state();
  t.groups.push_back({std::move(t.uncommitted), false});
  t.uncommitted.clear();
}

void bulk_wait(int pending, bool only_read, Site site) {
  ThreadState& t = my_state();
  const int done = static_cast<int>(t.groups.size()) - pending;
  if (done <= 0) return;
  const bool unread = std::any_of(t.groups.begin(), t.groups.begin() + done,
                                  [](const BulkGroup& g) { return !g.read; });
  if (unread && machine().reverse) let_others_run("bulk_wait", site);
  for (int i = 0; i < done; ++i) {
    if (!t.groups[i].read) read_group(t.groups[i]);
  }
  if (only_read) return;
  for (int i = 0; i < done; ++i) write_group(t.groups[i]);
  const Quiet quiet;
  t.groups.erase(t.groups.begin(), t.groups.begin() + done);
}

const char* TensorMap::encode(TensorMap& map, void* base, int element_bytes, int rank,
                              const uint64_t* size, const uint64_t* stride_bytes,
                              const uint32_t* box, int swizzle_bytes) {
  if (rank < 2 || rank > 3) return "want 2 or 3 dimensions";
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0) return "want an address that 16 divides";
  map = TensorMap{};
  map.magic = kMagic;
  map.rank = static_cast<uint32_t>(rank);
  map.element_bytes = static_cast<uint32_t>(element_bytes);
  map.swizzle = static_cast<uint32_t>(swizzle_bytes);
  map.base = static_cast<unsigned char*>(base);
  for (int i = 0; i < rank; ++i) {
    if (size[i] < 1 || size[i] > uint64_t{1} << 32) return "want sizes of 1 to 2^32";
    if (box[i] < 1 || box[i] > 256) return "want boxes of 1 to 256";
    map.size[i] = size[i];
    map.box[i] = box[i];
    if (i + 1 == rank) break;
    if (stride_bytes[i] % 16 != 0) return "want strides that 16 bytes divide";
    if (stride_bytes[i] >= uint64_t{1} << 40) return "want strides of less than 2^40 bytes";
    map.stride[i] = stride_bytes[i];
  }
  const uint32_t row_bytes = box[0] * map.element_bytes;
  if (row_bytes % 16 != 0) return "want rows of a box that 16 bytes divide";
  // A driver also takes narrower boxes.
  if (swizzle_bytes != 0 && swizzle_bytes != 32 && swizzle_bytes != 64 && swizzle_bytes != 128) {
    return "want a swizzle of 0, 32, 64 or 128 bytes";
  }
  if (swizzle_bytes != 0 && row_bytes != map.swizzle) return "want boxes as wide as the swizzle";
  return nullptr;
}

// ---------------------------------------------------------------- warpgroups

namespace {

// All 128 threads of a warpgroup call; the last one runs `run(warpgroup)`.
template <class F>
void meet_warpgroup(const char* what, void* operand, Site site, F&& run) {
  Machine& m = machine();
  Fiber& f = self();
  const uint32_t number = f.linear / 128;
  if (static_cast<int>(number + 1) * 128 > m.num_threads) {
    fail("%s: warpgroup %u has only %d threads, want 128", what, number,
         m.num_threads - static_cast<int>(number) * 128);
  }
  Warpgroup& w = hopper().warpgroups[number];
  if (w.arrived == 0) {
    w.what = what;
    w.site = site;
  } else if (std::strcmp(w.what, what) != 0 || w.site.line != site.line) {
    fail("%s at %s:%d: other threads of the warpgroup are in %s at %s:%d", what,
         base_name(site.file), site.line, w.what, base_name(w.site.file), w.site.line);
  }
  w.operands[f.linear % 128] = operand;
  w.threads[f.linear % 128] = &f;
  if (++w.arrived < 128) return wait(f, what, site);
  run(w);
  w.arrived = 0;
  for (Fiber* other : w.threads) {
    if (other != &f) make_ready(*other);
  }
}

// PTX ISA, wgmma: with group = lane / 4 and pair = lane % 4, 16-bit element e of A is in row
// 16 * warp + group + 8 * (e / 2 % 2), column 2 * pair + e % 2 + 8 * (e / 4); accumulator e in row
// 16 * warp + group + 8 * (e / 2 % 2), column 8 * (e / 4) + 2 * pair + e % 2.
int row_of(int thread, int e) { return thread / 32 * 16 + thread % 32 / 4 + e / 2 % 2 * 8; }
int column_of(int thread, int e) { return e / 4 * 8 + thread % 4 * 2 + e % 2; }

// The shared address of 16-byte chunk `chunk` (0, 1: k 0 to 7, 8 to 15) of row n of B.
uint32_t address_of(uint64_t descriptor, uint32_t row, uint32_t chunk) {
  const auto field = [&](int bit) {
    return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4;
  };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const uint32_t layout = static_cast<uint32_t>(descriptor >> 62);
  if (layout == 0) return start + row % 8 * 16 + row / 8 * stride + chunk * leading;
  const uint32_t span = 256u >> layout;  // 128, 64, 32 bytes of a row
  const uint32_t address = start + row % 8 * span + row / 8 * stride + chunk * 16;
  return address ^ (address >> 7 & (span / 16 - 1)) << 4;
}

void check_descriptor(uint64_t descriptor) {
  if ((descriptor >> 49 & 7) != 0) {
    fail(
        "wgmma: the descriptor has base offset %u; the machine knows only tiles whose swizzle "
        "begins at a multiple of its period",
        static_cast<uint32_t>(descriptor >> 49 & 7));
  }
  constexpr uint64_t kReserved =
      uint64_t{0x3} << 14 | uint64_t{0x3} << 30 | uint64_t{0x7} << 46 | uint64_t{0x3ff} << 52;
  if ((descriptor & kReserved) != 0)
    fail("wgmma: descriptor %#llx has reserved bits set",
         static_cast<unsigned long long>(descriptor));
}

const unsigned char* chunk_of(const WgmmaOperand& operand, uint32_t row, uint32_t chunk) {
  return shared_pointer(address_of(operand.descriptor, row, chunk), 16, 16, "wgmma");
}

std::vector<unsigned char> read_b(const WgmmaOperand& operand) {
  std::vector<unsigned char> bytes(static_cast<size_t>(operand.n) * 32);
  for (int row = 0; row < operand.n; ++row) {
    for (uint32_t chunk = 0; chunk < 2; ++chunk) {
      std::memcpy(&bytes[row * 32 + chunk * 16], chunk_of(operand, row, chunk), 16);
    }
  }
  return bytes;
}

template <class T>
void multiply(const Product& p) {
  const int n = p.operand.n;
  std::vector<float> b(16 * n);
  float a[64][16];
  for (int row = 0; row < n; ++row) {
    for (int k = 0; k < 16; ++k) {
      uint16_t bits;
      std::memcpy(&bits, &p.b[row * 32 + k * 2], 2);
      b[k * n + row] = to_float<T>(bits);
    }
  }
  for (int thread = 0; thread < 128; ++thread) {
    for (int e = 0; e < 8; ++e) {
      const auto bits = static_cast<uint16_t>(p.a[thread][e / 2] >> 16 * (e % 2));
      a[row_of(thread, e)][column_of(thread, e)] = to_float<T>(bits);
    }
  }
  if (!p.operand.accumulate) std::fill(p.d->values.begin(), p.d->values.end(), 0.0f);
  // Products of 16-bit values are exact in fp32; the sum's order is k ascending.
  for (int i = 0; i < 64; ++i) {
    float* const d = &p.d->values[i * n];
    for (int k = 0; k < 16; ++k) {
      const float* const row = &b[k * n];
      for (int j = 0; j < n; ++j) d[j] += a[i][k] * row[j];
    }
  }
}

void run_product(const Product& p) {
  p.operand.bf16 ? multiply<__nv_bfloat16>(p) : multiply<__half>(p);
}

// What accumulators hold in flight: a number from 1 to 2, since sums with a NaN leave it as it is.
uint32_t poison_word() { return 0x3f800055u | static_cast<uint32_t>(machine().poison) << 8; }

void check_untouched(const Warpgroup& w, const Accumulators& d) {
  for (int thread = 0; thread < 128; ++thread) {
    for (size_t e = 0; e < d.at[thread].size(); ++e) {
      if (*d.at[thread][e] == poison_word()) continue;
      fail("accumulator %zu of thread %s was written while wgmma was using it", e,
           thread_name(*w.threads[thread]).c_str());
    }
  }
}

Registers* find_registers(ThreadState& t, uint32_t* const* at, size_t count) {
  for (Registers& r : t.registers) {
    if (r.at.size() == count && std::equal(r.at.begin(), r.at.end(), at)) return &r;
  }
  return nullptr;
}

// Registers of the running thread that a product takes: unchanged since the thread's last fence,
// as far as this machine knew them then.
Registers& check_registers(ThreadState& t, uint32_t* const* at, size_t count, const char* what,
                           Site site) {
  Registers* r = find_registers(t, at, count);
  if (r == nullptr) {
    const Quiet quiet;
    t.registers.push_back({{at, at + count}, std::vector<uint32_t>(count), false});
    return t.registers.back();
  }
#if !SIMT_ASAN  // registers that a kernel used once may be gone: they're not looked at
  for (size_t i = 0; i < count && !r->in_flight; ++i) {
    if (*at[i] == r->fenced[i]) continue;
    fail("wgmma at %s:%d: register %zu of %s was written after the last wgmma_fence",
         base_name(site.file), site.line, i, what);
  }
#endif
  return *r;
}

Accumulators& accumulators_of(Warpgroup& w, const WgmmaOperand& operand) {
  for (auto& d : w.accumulators) {
    if (d->n == operand.n && d->at[0][0] == operand.d[0]) {
      check_untouched(w, *d);
      return *d;
    }
    for (uint32_t* at : d->at[0]) {
      if (std::find(operand.d, operand.d + operand.n / 2, at) != operand.d + operand.n / 2) {
        fail("wgmma: accumulators that a product of another shape is using");
      }
    }
  }
  w.accumulators.push_back(std::make_unique<Accumulators>());
  Accumulators& d = *w.accumulators.back();
  d.n = operand.n;
  d.values.resize(64 * operand.n);
  for (int thread = 0; thread < 128; ++thread) {
    const auto& theirs = *static_cast<const WgmmaOperand*>(w.operands[thread]);
    d.at[thread].assign(theirs.d, theirs.d + operand.n / 2);
    for (int e = 0; e < operand.n / 2; ++e) {
      uint32_t* const at = theirs.d[e];
      std::memcpy(&d.values[row_of(thread, e) * operand.n + column_of(thread, e)], at, 4);
      *at = poison_word();
    }
    ThreadState& t = hopper().threads[w.threads[thread]->linear];
    find_registers(t, theirs.d, operand.n / 2)->in_flight = true;
  }
  return d;
}

void issue_product(Warpgroup& w, Site site) {
  const WgmmaOperand& operand = *static_cast<const WgmmaOperand*>(w.operands[0]);
  for (void* other : w.operands) {
    const auto& theirs = *static_cast<const WgmmaOperand*>(other);
    if (theirs.descriptor != operand.descriptor || theirs.accumulate != operand.accumulate) {
      fail("wgmma at %s:%d: the threads of a warpgroup have different descriptors",
           base_name(site.file), site.line);
    }
  }
  for (int row = 0; row < operand.n; ++row) {
    for (uint32_t chunk = 0; chunk < 2; ++chunk) {
      check_fenced(chunk_of(operand, row, chunk), 16, "wgmma", "reads");
    }
  }
  const Quiet quiet;
  Product p;
  p.operand = operand;
  p.site = site;
  p.d = &accumulators_of(w, operand);
  ++p.d->products;
  p.b = read_b(operand);
  for (int thread = 0; thread < 128; ++thread) {
    const auto& theirs = *static_cast<const WgmmaOperand*>(w.operands[thread]);
    std::copy_n(theirs.a, 4, p.a_at[thread]);
    for (int i = 0; i < 4; ++i) p.a[thread][i] = *theirs.a[i];
  }
  if (!machine().reverse) run_product(p);
  w.uncommitted.push_back(std::move(p));
}

void retire(Warpgroup& w, const Product& p) {
  const std::vector<unsigned char> now = read_b(p.operand);
  for (size_t i = 0; i < now.size(); ++i) {
    if (now[i] == p.b[i]) continue;
    fail("byte %td of shared memory was written while wgmma at %s:%d was reading it",
         chunk_of(p.operand, i / 32, i / 16 % 2) + i % 16 - shared_begin(), base_name(p.site.file),
         p.site.line);
  }
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < 4; ++i) {
      if (*p.a_at[thread][i] == p.a[thread][i]) continue;
      fail("register %d of A of thread %s was written while wgmma at %s:%d was reading it", i,
           thread_name(*w.threads[thread]).c_str(), base_name(p.site.file), p.site.line);
    }
  }
  if (machine().reverse) run_product(p);
  if (--p.d->products > 0) return;
  check_untouched(w, *p.d);
  for (int thread = 0; thread < 128; ++thread) {
    for (size_t e = 0; e < p.d->at[thread].size(); ++e) {
      const int at = row_of(thread, e) * p.d->n + column_of(thread, e);
      std::memcpy(p.d->at[thread][e], &p.d->values[at], 4);
    }
    ThreadState& t = hopper().threads[w.threads[thread]->linear];
    find_registers(t, p.d->at[thread].data(), p.d->at[thread].size())->in_flight = false;
  }
  const auto gone = std::find_if(w.accumulators.begin(), w.accumulators.end(),
                                 [&](const auto& d) { return d.get() == p.d; });
  w.accumulators.erase(gone);
}

Warpgroup& my_warpgroup() { return hopper().warpgroups[self().linear / 128]; }

}  // namespace

void wgmma(const WgmmaOperand& operand, Site site) {
  ThreadState& t = my_state();
  if (!t.wgmma_fenced) {
    fail("wgmma at %s:%d: no wgmma_fence since %s", base_name(site.file), site.line,
         t.committed_wgmma ? "the last wgmma_commit" : "the kernel began");
  }
  check_descriptor(operand.descriptor);
  check_registers(t, operand.a, 4, "A", site);
  check_registers(t, operand.d, operand.n / 2, "the accumulators", site);
  // For ThreadSanitizer each thread reads its share of B.
  for (int row = self().linear % 128; row < operand.n; row += 128) {
    for (uint32_t chunk = 0; chunk < 2; ++chunk) note_read(chunk_of(operand, row, chunk), 16);
  }
  tsan_release(my_warpgroup().sync.at(my_warpgroup().generation));
  meet_warpgroup("wgmma", const_cast<WgmmaOperand*>(&operand), site,
                 [&](Warpgroup& w) { issue_product(w, site); });
}

void wgmma_fence() {
  ThreadState& t = my_state();
  t.wgmma_fenced = true;
#if !SIMT_ASAN
  for (Registers& r : t.registers) {
    for (size_t i = 0; i < r.at.size() && !r.in_flight; ++i) r.fenced[i] = *r.at[i];
  }
#endif
}

void wgmma_commit(Site site) {
  ThreadState& t = my_state();
  t.wgmma_fenced = false;
  t.committed_wgmma = true;
  meet_warpgroup("wgmma_commit", nullptr, site, [](Warpgroup& w) {
    const Quiet quiet;
    w.groups.push_back(std::move(w.uncommitted));
    w.uncommitted.clear();
    ++w.generation;
  });
}

void wgmma_wait(int pending, Site site) {
  meet_warpgroup("wgmma_wait", nullptr, site, [&](Warpgroup& w) {
    if (static_cast<int>(w.groups.size()) <= pending) return;
    if (machine().reverse) let_others_run("wgmma_wait", site);
    while (static_cast<int>(w.groups.size()) > pending) {
      for (const Product& p : w.groups.front()) retire(w, p);
      const Quiet quiet;
      w.groups.pop_front();
    }
  });
  // What these threads do next comes after the products' reads, also those of other threads.
  for (int generation = 0; generation < 2; ++generation) {
    tsan_acquire(my_warpgroup().sync.at(generation));
  }
}

void setmaxnreg(uint32_t registers, bool increase, Site site) {
  const char* const what = increase ? "setmaxnreg_increase" : "setmaxnreg_decrease";
  if (registers < 24 || registers > 256 || registers % 8 != 0) {
    fail("%s: %u registers, want a multiple of 8 from 24 to 256", what, registers);
  }
  meet_warpgroup(what, &registers, site, [&](Warpgroup& w) {
    Hopper& h = hopper();
    if (increase ? registers < w.registers : registers > w.registers) {
      fail("%s: to %u registers, a thread has %u", what, registers, w.registers);
    }
    if (!increase) {
      h.free_registers += w.registers - registers;
      for (Fiber* f : h.wait_for_registers) make_ready(*f);
      const Quiet quiet;
      h.wait_for_registers.clear();
    }
    while (increase && h.free_registers < registers - w.registers) {
      {
        const Quiet quiet;
        h.wait_for_registers.push_back(&self());
      }
      wait(self(), what, site);
    }
    if (increase) h.free_registers -= registers - w.registers;
    w.registers = registers;
  });
}

// ---------------------------------------------------------------- stores

void note_store_at(const void* at, size_t bytes) {
  const auto offset = static_cast<uint32_t>(static_cast<const unsigned char*>(at) - shared_begin());
  note_stores_of(self(), offset, std::min<size_t>(bytes, shared_memory_bytes - offset));
}

// ---------------------------------------------------------------- blocks

void hopper_begin_block() {
  const Quiet quiet;
  Machine& m = machine();
  Hopper& h = hopper();
  h.mbarriers.clear();
  h.writers.assign(m.shared_bytes / 4 + 1, 0);
  h.threads.resize(kMaxThreads);
  for (int i = 0; i < m.num_threads; ++i) {
    ThreadState& t = h.threads[i];
    t.proxy_fences = 0;
    t.wgmma_fenced = t.committed_wgmma = false;
    t.registers.clear();
    t.uncommitted.clear();
    t.groups.clear();
  }
  // A kernel with setmaxnreg has as many registers as its block's size allows.
  const uint32_t registers = std::min(256u, kBlockRegisters / m.num_threads / 8 * 8);
  for (Warpgroup& w : h.warpgroups) {
    w.arrived = 0;
    w.accumulators.clear();
    w.uncommitted.clear();
    w.groups.clear();
    w.registers = registers;
  }
  h.free_registers = 0;
  h.wait_for_registers.clear();
  shared_memory_begin = reinterpret_cast<uintptr_t>(shared_begin());
  shared_memory_bytes = m.shared_bytes;
}

void hopper_end_thread() {
  const Warpgroup& w = my_warpgroup();
  if (!w.uncommitted.empty() || !w.groups.empty()) fail("returned while wgmma was under way");
  ThreadState& t = my_state();
  const bool unread =
      std::any_of(t.groups.begin(), t.groups.end(), [](const BulkGroup& g) { return !g.read; });
  if (unread || !t.uncommitted.empty()) {
    fail("returned before a bulk store had read its shared memory: wait with bulk_wait_read<0>");
  }
  for (const BulkGroup& group : t.groups) write_group(group);
}

}  // namespace qlora_ext::simt

// ---------------------------------------------------------------- for the compiler, and for tests

// In builds without a sanitizer g++ calls these for each store of a kernel (build.py: STORES).
#if !SIMT_ASAN && !SIMT_TSAN
#define SIMT_STORE(n)                                            \
  extern "C" void __asan_store##n##_noabort(unsigned long at) {  \
    qlora_ext::simt::note_store(reinterpret_cast<void*>(at), n); \
  }
SIMT_STORE(1)
SIMT_STORE(2)
SIMT_STORE(4)
SIMT_STORE(8)
SIMT_STORE(16)
#undef SIMT_STORE
extern "C" void __asan_storeN_noabort(unsigned long at, unsigned long bytes) {
  qlora_ext::simt::note_store(reinterpret_cast<void*>(at), bytes);
}
extern "C" void __asan_loadN_noabort(unsigned long, unsigned long) {}
extern "C" void __asan_handle_no_return() {}
extern "C" void __asan_before_dynamic_init(const char*) {}
extern "C" void __asan_after_dynamic_init() {}
#endif

// The layouts of wgmma, for a test that has them from elsewhere, also those of wgmma_layout.cuh.
#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))
SIMT_EXPORT int simt_wgmma_row(int thread, int e) { return qlora_ext::simt::row_of(thread, e); }
SIMT_EXPORT int simt_wgmma_column(int thread, int e) {
  return qlora_ext::simt::column_of(thread, e);
}
SIMT_EXPORT uint32_t simt_wgmma_address(uint64_t descriptor, uint32_t row, uint32_t chunk) {
  return qlora_ext::simt::address_of(descriptor, row, chunk);
}
SIMT_EXPORT uint64_t simt_wgmma_descriptor(uint32_t address, uint32_t stride, int swizzle) {
  return qlora_ext::wgmma_descriptor(address, stride, static_cast<qlora_ext::Swizzle>(swizzle));
}
SIMT_EXPORT uint32_t simt_swizzled(uint32_t offset, int swizzle) {
  return qlora_ext::swizzled(offset, static_cast<qlora_ext::Swizzle>(swizzle));
}

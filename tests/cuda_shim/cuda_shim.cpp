// The scheduler behind cuda_shim.h, and a module with the entry points of tnt_kernels._C's CUDA part.
#include "cuda_shim.h"

#include <pybind11/pybind11.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <exception>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "bind.h"

// Switches stacks: callee-saved registers go to the old one. swapcontext would make a system call each time.
#if !defined(__x86_64__)
#error "the model switches fibers in x86-64 assembly"
#endif
extern "C" void tnt_switch(void** from, void* to);
asm(R"(
.globl tnt_switch
.type tnt_switch, @function
tnt_switch:
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
.size tnt_switch, .-tnt_switch
)");

namespace tnt::device::model {

Machine machine{true, 16, 1 << 16, 90};
Mutation mutation = Mutation::NONE;

namespace {

enum class Schedule { FORWARD, REVERSE, SHUFFLED };
Schedule schedule = Schedule::FORWARD;
constexpr size_t STACK = 64 << 10;

struct Meeting {  // of the threads of a warp, a block or a cluster
  int members = 0, arrived = 0, left = 0;
  uint64_t phase = 0;
  void arrive() {
    if (++arrived + left < members) return;
    arrived = 0;
    ++phase;
  }
  // A barrier counts those that are still there, as the hardware does for a block.
  void leave() {
    ++left;
    if (arrived && arrived + left >= members) {
      arrived = 0;
      ++phase;
    }
  }
};

struct Arrival {  // bytes may come before they are expected
  int expected = 0, arrived = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
  void settle() {
    if (arrived < expected || bytes != 0) return;
    arrived = 0;
    ++phase;
  }
};

struct Copy {  // from memory, or a message of another block
  char* to;
  const char* from;
  uint32_t bytes;
  Arrival* arrival;
  int block;
  device::Vector message;
};

struct Memory {  // a block's shared memory, flush with a page that may not be touched
  size_t bytes, mapped;
  char *base, *begin;
  explicit Memory(size_t size) : bytes((size + 127) / 128 * 128) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    mapped = (bytes + page - 1) / page * page + page;
    base = static_cast<char*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    begin = base + mapped - page - bytes;
    mprotect(base + mapped - page, page, PROT_NONE);
    memset(begin, 0xff, bytes);  // NaN in every type
  }
  ~Memory() { munmap(base, mapped); }
};

struct Block {
  std::unique_ptr<Memory> memory;
  Meeting meeting;
  std::map<uint64_t*, Arrival> arrivals;
  int running = 0;
};

struct Fiber {
  void* stack_pointer = nullptr;
  int thread = 0, block = 0;
  bool done = false;
  std::function<bool()> ready;  // empty: it is
  uint64_t cluster_phase = 0;   // of its last arrival
  bool arrived = false;
  uint32_t offered = 0;
};

struct Warp {
  Meeting meeting;
};

struct World {
  const std::function<void()>* kernel;
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  std::vector<Warp> warps;
  Meeting cluster;
  std::vector<Copy> copies;
  int threads, size;
  int64_t first_block, all_blocks;
  int current = 0;
  void* scheduler = nullptr;
  std::exception_ptr error;
  bool lost = false;              // a message, by a mutation
  ptrdiff_t first_exchange = -1;  // where in shared memory the barrier of the first message is
};
World* world = nullptr;

Fiber& me() { return world->fibers[size_t(world->current)]; }
Warp& my_warp() { return world->warps[size_t(world->current / WARP)]; }
Block& my_block() { return world->blocks[size_t(me().block)]; }

void give_way(std::function<bool()> ready) {
  Fiber& fiber = me();
  if (ready && ready()) ready = nullptr;
  fiber.ready = std::move(ready);
  tnt_switch(&fiber.stack_pointer, world->scheduler);
}
// An exception may not cross stacks: it is kept, and the fiber never runs again.
[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("CUDA model: " + what); }

struct Exit {};  // of a thread, by a mutation

void enter() {
  try {
    const bool exits = mutation == Mutation::EARLY_EXIT && me().block == world->size - 1 && world->size > 1;
    if (!exits) (*world->kernel)();
    if (me().arrived && world->size > 1)
      fail("a thread leaves between arriving at a cluster barrier and waiting there");
  } catch (const Exit&) {
  } catch (...) {
    if (!world->error) world->error = std::current_exception();
  }
  Fiber& fiber = me();
  fiber.done = true;
  Block& block = my_block();
  my_warp().meeting.leave();
  block.meeting.leave();
  world->cluster.leave();
  if (--block.running == 0) {
    // What is still on its way here, or was not expected, would meet the memory of the next block.
    bool settled = true;
    for (const Copy& copy : world->copies) settled = settled && copy.block != fiber.block;
    for (const auto& [at, arrival] : block.arrivals) settled = settled && arrival.bytes == 0;
    if (!settled && !world->error)
      world->error = std::make_exception_ptr(std::runtime_error("CUDA model: a block leaves before its copies came"));
    block.memory.reset();
  }
  void* ignored;
  tnt_switch(&ignored, world->scheduler);
  __builtin_unreachable();
}

// Until it completes, its destination holds NaN: who still wants what was there before, or does not wait, reads that.
void begin(const Copy& copy) {
  for (const Copy& other : world->copies)
    if (copy.to < other.to + other.bytes && other.to < copy.to + copy.bytes)
      fail("a copy to where another one is on its way");
  memset(copy.to, 0xff, copy.bytes);
  world->copies.push_back(copy);
}

// Whether that ends a phase, for which someone may have waited.
bool complete(size_t index) {
  const Copy copy = world->copies[index];
  world->copies.erase(world->copies.begin() + long(index));
  memcpy(copy.to, copy.from ? copy.from : reinterpret_cast<const char*>(&copy.message), copy.bytes);
  copy.arrival->bytes -= copy.bytes;
  const uint64_t before = copy.arrival->phase;
  copy.arrival->settle();
  return copy.arrival->phase != before;
}

void run_cluster(std::vector<char>& stacks) {
  World& w = *world;
  std::mt19937 random(static_cast<unsigned>(w.first_block));
  const auto one_of = [&](size_t n) { return size_t(random()) % n; };
  const size_t nobody = w.warps.size();
  // A warp that runs only when the others cannot.
  size_t resting = schedule == Schedule::SHUFFLED ? one_of(nobody + 1) : nobody;
  std::vector<size_t> order(w.fibers.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = schedule == Schedule::REVERSE ? order.size() - 1 - i : i;
  for (size_t i = 0; i < w.fibers.size(); ++i) {
    void** top = reinterpret_cast<void**>(stacks.data() + (i + 1) * STACK);
    top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) / 16 * 16);
    *--top = nullptr;  // as after a call
    *--top = reinterpret_cast<void*>(&enter);
    for (int k = 0; k < 6; ++k) *--top = nullptr;
    w.fibers[i].stack_pointer = top;
  }
  for (size_t left = w.fibers.size(); left > 0;) {
    if (schedule == Schedule::SHUFFLED) std::shuffle(order.begin(), order.end(), random);
    bool progress = false, rested = false;
    for (const size_t i : order) {
      Fiber& fiber = w.fibers[i];
      if (fiber.done || (fiber.ready && !fiber.ready())) continue;
      if (i / WARP == resting) {
        rested = true;
        continue;
      }
      fiber.ready = nullptr;
      progress = true;
      w.current = int(i);
      tnt_switch(&w.scheduler, fiber.stack_pointer);
      if (w.error) std::rethrow_exception(w.error);
      left -= fiber.done;
    }
    if (schedule == Schedule::SHUFFLED) {
      if (!w.copies.empty() && one_of(2)) {
        for (size_t n = one_of(w.copies.size()) + 1; n > 0; --n) complete(one_of(w.copies.size()));
        continue;
      }
      if (!progress) resting = one_of(nobody + 1);
      if (rested) continue;
    }
    if (progress) continue;
    if (w.copies.empty()) fail("deadlock");
    while (!complete(schedule == Schedule::FORWARD ? 0 : w.copies.size() - 1) && !w.copies.empty()) continue;
  }
  for (const Warp& warp : w.warps)
    if (warp.meeting.arrived) fail("a thread left before others of its warp met it");
}

}  // namespace

int thread() { return me().thread; }
int64_t block() { return world->first_block + me().block; }
int64_t blocks() { return world->all_blocks; }
char* shared() { return my_block().memory->begin; }
int cluster() { return world->size; }
int rank() { return me().block; }

void meet(Barrier which, bool arrive, bool wait) {
  Fiber& fiber = me();
  Meeting& meeting = which == Barrier::WARP    ? my_warp().meeting
                     : which == Barrier::BLOCK ? my_block().meeting
                                               : world->cluster;
  const bool split = which == Barrier::CLUSTER;
  if (arrive) {
    if (meeting.left) fail("a barrier after threads have left");
    if (split && fiber.arrived) fail("a second arrival at a cluster barrier without waiting");
    fiber.cluster_phase = split ? meeting.phase : fiber.cluster_phase;
    fiber.arrived = split || fiber.arrived;
    const uint64_t phase = meeting.phase;
    meeting.arrive();
    if (!split) return give_way([&meeting, phase] { return meeting.phase != phase; });
  }
  if (wait) {
    if (!fiber.arrived) fail("waiting at a cluster barrier without arriving");
    const uint64_t phase = fiber.cluster_phase;
    fiber.arrived = false;
    if (mutation == Mutation::DROPPED_CLUSTER_BARRIER) return;
    give_way([&meeting, phase] { return meeting.phase != phase; });
  }
}

uint32_t exchange(uint32_t x, int from_lane) {
  const int first = world->current / WARP * WARP;
  me().offered = x;
  meet(Barrier::WARP, true, true);
  const uint32_t got = world->fibers[size_t(first + from_lane)].offered;
  meet(Barrier::WARP, true, true);
  return got;
}

void write_remote(float* to, int rank, float x) {
  if (rank < 0 || rank >= world->size) fail("shared memory of a block that is not in the cluster");
  Block& other = world->blocks[size_t(rank)];
  if (!other.memory) fail("shared memory of a block that has left");
  const ptrdiff_t offset = reinterpret_cast<char*>(to) - shared();
  if (offset < 0 || offset + 4 > ptrdiff_t(other.memory->bytes)) fail("outside of a block's shared memory");
  memcpy(other.memory->begin + offset, &x, sizeof x);
}

Arrival& arrival_at(uint64_t* at) {
  const auto found = my_block().arrivals.find(at);
  if (found == my_block().arrivals.end()) fail("a barrier that is not initialised");
  return found->second;
}
void barrier_init(uint64_t* at, int count) {
  Arrival& arrival = my_block().arrivals[at];
  arrival = {};
  arrival.expected = count;
}
void barrier_expect(uint64_t* at, uint32_t bytes) {
  Arrival& arrival = arrival_at(at);
  if (++arrival.arrived > arrival.expected) fail("too many arrivals");
  arrival.bytes += bytes;
  arrival.settle();
}
void barrier_wait(uint64_t* at, int parity) {
  const Arrival* arrival = &arrival_at(at);
  give_way([arrival, parity] { return int(arrival->phase & 1) != parity; });
}
void await_messages(uint64_t* at, int parity) {
  if (mutation == Mutation::UNAWAITED_MESSAGE) return;
  if (mutation == Mutation::EARLY_LEAVE && rank() == cluster() - 1) throw Exit{};
  if (mutation == Mutation::STUCK_EXCHANGE) at = reinterpret_cast<uint64_t*>(shared() + world->first_exchange);
  if (mutation == Mutation::SHORT_EXPECT && thread() == 0) {
    Arrival& arrival = arrival_at(at);
    arrival.bytes -= sizeof(Vector);
    arrival.settle();
  }
  barrier_wait(at, parity);
}
void send(void* to, const Vector& x, uint64_t* barrier, int rank) {
  if (rank < 0 || rank >= world->size) fail("shared memory of a block that is not in the cluster");
  // An H200 has an illegal instruction there, if clusters ran before.
  if (world->size == 1) fail("a message of a block that was not launched in a cluster");
  Block& other = world->blocks[size_t(rank)];
  if (!other.memory) fail("shared memory of a block that has left");
  const auto offset = [](const void* at) { return static_cast<const char*>(at) - shared(); };
  if (offset(to) < 0 || size_t(offset(to)) + sizeof x > other.memory->bytes) fail("outside of a block's shared memory");
  if (offset(to) % 16) fail("a message that is not aligned to 16 bytes");
  if (world->first_exchange < 0) world->first_exchange = offset(barrier);
  const ptrdiff_t counter = mutation == Mutation::STUCK_EXCHANGE ? world->first_exchange : offset(barrier);
  const auto found = other.arrivals.find(reinterpret_cast<uint64_t*>(other.memory->begin + counter));
  if (found == other.arrivals.end()) fail("a message for a barrier that is not initialised");
  if (mutation == Mutation::LOST_MESSAGE && rank == world->size - 1 && !world->lost) {
    world->lost = true;
    return;
  }
  begin({other.memory->begin + offset(to), nullptr, sizeof x, &found->second, rank, x});
}
void copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  if (bytes == 0 || bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    fail("a bulk copy that is not aligned to 16 bytes");
  char* const at = static_cast<char*>(to);
  const Memory& memory = *my_block().memory;
  if (at < memory.begin || at + bytes > memory.begin + memory.bytes) fail("a bulk copy beyond shared memory");
  begin({at, static_cast<const char*>(from), bytes, &arrival_at(barrier), me().block, {}});
}

void run(const std::function<void()>& kernel, int64_t blocks, int cluster, int threads, int shared_bytes) {
  static std::vector<char> stacks;
  const size_t fibers = size_t(cluster) * size_t(threads);
  if (stacks.size() < fibers * STACK) stacks.resize(fibers * STACK);
  for (int64_t first = 0; first < blocks; first += cluster) {
    World w{};
    world = &w;
    w.kernel = &kernel;
    w.threads = threads;
    w.size = cluster;
    w.first_block = first;
    w.all_blocks = blocks;
    w.fibers.resize(fibers);
    w.warps.resize(fibers / WARP);
    w.blocks.resize(size_t(cluster));
    w.cluster.members = int(fibers);
    for (Warp& warp : w.warps) warp.meeting.members = WARP;
    for (Block& block : w.blocks) {
      block.memory = std::make_unique<Memory>(size_t(std::max(shared_bytes, 128)));
      block.meeting.members = block.running = threads;
    }
    for (size_t i = 0; i < fibers; ++i) {
      w.fibers[i].thread = int(i) % threads;
      w.fibers[i].block = int(i) / threads;
    }
    run_cluster(stacks);
  }
  world = nullptr;
}

}  // namespace tnt::device::model

PYBIND11_MODULE(TNT_MODULE, m) {
  namespace model = tnt::device::model;
  tnt::bind_cuda(m);
  m.def("machine",
        [](bool clusters, int largest_cluster, int shared_per_block, int architecture, int schedule, int mutation) {
          model::mutation = static_cast<model::Mutation>(mutation);
          model::machine = {clusters, largest_cluster, shared_per_block, architecture};
          model::schedule = static_cast<model::Schedule>(schedule);
          tnt::forget_plans();
        });
}

// The launch, and everything that it has to tell.
#include <algorithm>
#include <csignal>
#include <map>

#include "machine.h"

namespace simt {

namespace {

// Turns a fault in a kernel into an error of its launch. On a stack of its own, since the fiber's may be what is full.
class FaultHandler {
 public:
  FaultHandler() : stack_(kStack) {
    stack_t own = {};
    own.ss_sp = stack_.data(), own.ss_size = stack_.size();
    sigaltstack(&own, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = &FaultHandler::handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int k = 0; k < kSignals; ++k) sigaction(kSignal[k], &action, &old_[k]);
  }
  ~FaultHandler() {
    for (int k = 0; k < kSignals; ++k) sigaction(kSignal[k], &old_[k], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr size_t kStack = 64 << 10;
  static constexpr int kSignals = 4;
  static constexpr int kSignal[kSignals] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};

  static void handle(int signal, siginfo_t* info, void*) {
    if (machine && machine->at_fault(info->si_addr)) return;
    std::signal(signal, SIG_DFL);  // not ours: the instruction runs again, and ends the process
  }

  std::vector<char> stack_;
  stack_t old_stack_ = {};
  struct sigaction old_[kSignals];
};

std::string wrong_with(const Config& config) {
  const auto is = [](const char* name, int64_t value, const std::string& allowed) {
    return std::string(name) + " is " + std::to_string(value) + "; allowed: " + allowed;
  };
  if (config.threads < kWarpLanes || config.threads > kMaxThreads || config.threads % kWarpLanes) {
    return is("threads", config.threads, "multiples of 32 up to 1024");
  }
  if (config.cluster < 1 || config.cluster > kMaxCluster) return is("cluster", config.cluster, "1 to 16");
  if (config.grid < 1 || config.grid > INT32_MAX) return is("grid", config.grid, "1 to 2147483647");
  if (config.grid % config.cluster) {
    return is("grid", config.grid, "multiples of the cluster, " + std::to_string(config.cluster));
  }
  if (config.shared_bytes > kMaxSharedBytes) {
    return is("shared_bytes", static_cast<int64_t>(config.shared_bytes), "0 to " + std::to_string(kMaxSharedBytes));
  }
  return "";
}

}  // namespace

bool Report::found(const std::string& check) const {
  return std::any_of(errors.begin(), errors.end(), [&](const Error& e) { return e.check == check; });
}

std::string Report::text() const {
  std::string all;
  for (const Error& error : errors) all += error.check + ": " + error.text + "\n";
  return all;
}

Report launch(const Config& config, Memory& memory, const std::function<void()>& kernel) {
  Report report;
  const std::string wrong = machine ? "a kernel launches a kernel" : wrong_with(config);
  if (!wrong.empty()) {
    report.errors.push_back({"bad-launch", wrong});
    return report;
  }
  for (const auto& buffer : memory.buffers()) {
    buffer->counters = {};
    buffer->shadow.forget_launch();
  }
  {
    FaultHandler handler;
    Machine(config, memory, kernel, report).run();
  }
  for (const auto& buffer : memory.buffers()) {
    report.total.add(buffer->counters);
    if (buffer->pages.margins_intact()) continue;
    report.errors.push_back({"margin", "bytes beside '" + buffer->name + "' were written, not by a word of the port"});
  }
  return report;
}

std::string Machine::name_of(const Thread& thread) const {
  return "thread " + std::to_string(thread.index) + " of block " + std::to_string(thread.block->index);
}

std::string Machine::name_of(int actor_thread) const {
  const Block& block = blocks_[static_cast<size_t>(actor_thread / kMaxThreads)];
  return "thread " + std::to_string(actor_thread % kMaxThreads) + " of block " + std::to_string(block.index);
}

void Machine::note(const std::string& check, const std::string& text) {
  if (!noted_.emplace(check, self->site.bits()).second) return;
  report.errors.push_back({check, text});
  if (report.errors.size() >= config.max_errors) abandon();
}

void Machine::fail(const std::string& check, const std::string& text) {
  report.errors.push_back({check, text});
  abandon();
}

// Leaves all threads where they are; their stacks hold nothing that must be given back.
void Machine::abandon() {
  stopped_ = true;
  switch_context(self->context, main_);
  __builtin_unreachable();
}

void Machine::note_race(const Conflict& conflict, bool writes, const std::string& where) {
  Site earlier;
  earlier.set_bits(conflict.earlier.site);
  const std::string other = conflict.other_cluster ? "a block of another cluster" : name_of(conflict.earlier.thread);
  note(conflict.other_cluster ? "race-between-clusters" : "race",
       "word " + std::to_string(conflict.word) + " of " + where + ": " + (writes ? "written" : "read") + " by " +
           name_of(*self) + " at " + self->site.text() + " and " + (conflict.earlier_writes ? "written" : "read") +
           " by " + other + " at " + earlier.text() + " with no barrier between");
}

std::string Machine::who_waits() const {
  std::map<std::string, std::pair<int, const Thread*>> places;
  const char* const words[] = {"", "a meeting of its warp", "block_sync", "cluster_sync", "phases_wait", "named_sync"};
  for (const Thread& thread : threads_) {
    if (thread.returned) continue;
    auto& place = places[std::string(words[static_cast<int>(thread.waiting)]) + " at " + thread.site.text()];
    if (!place.first++) place.second = &thread;
  }
  std::string text;
  for (const auto& place : places) {
    if (!text.empty()) text += "; ";
    text += name_of(*place.second.second) + " waits in " + place.first;
    if (place.second.first > 1) text += ", like " + std::to_string(place.second.first - 1) + " others";
  }
  return text;
}

bool Machine::at_fault(void* address) {
  if (!self) return false;
  fault_ = address;
  siglongjmp(landing_, 1);
}

void Machine::describe_fault() {
  void* const address = fault_;
  stopped_ = true;
  std::string where = "at no address that the launch knows";
  if (stacks_.guard_of(address) >= 0) {
    where = "behind the end of its stack";
  } else if (memory.near(address)) {
    where = memory.describe(address);
  }
  for (const Block& block : blocks_) {
    if (!block.shared->holds(address)) continue;
    where = place_of(address, block.shared->data(), config.shared_bytes) + " the shared memory of block " +
            std::to_string(block.index);
  }
  report.errors.push_back({"fault", name_of(*self) + ": fault, " + where + ", after " + self->site.text()});
}

}  // namespace simt

/* Two simulated CUDA devices: to torch their tensors are CUDA's, while their memory is the host's.
 *
 * Code written for a GPU runs on them on any machine. Every operation is the CPU's on the same memory, and finishes at
 * once; the order that a real device would guarantee is tracked, and errors that could happen there are found here:
 *
 *   - tensors of the host and of a device, or of both devices, in one operation: an error, as on a GPU;
 *   - streams that use the same memory in an order that no event determines, memory freed while another stream may use
 *     it, pinned memory changed before its copy was waited for: a hazard, listed by `take_hazards`;
 *   - pinned memory read before its copy was waited for, uninitialised memory, a graph's results before its first
 *     replay: bytes 0x7f, which are 3e38 or 9e18;
 *   - waiting for the device while a stream is captured: an error, as on a GPU.
 *
 * A captured graph repeats the operations launched on its stream, on the same memory, with the sizes and scalars of the
 * capture. Not simulated: Triton's kernels, NCCL, speed.
 */

#include <ATen/ATen.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceType;
using c10::IValue;
using c10::SymIntArrayRef;
using std::string;
using torch::jit::Stack;

const int DEVICES = 2, UNINITIALISED = 0x7f;

using Clock = std::map<int64_t, int64_t>; /* by stream, how many of its launches are known to be done */

struct Memory;

struct Call {
    c10::OperatorHandle op;
    Stack given, made;
};

struct Graph {
    std::vector<Call> calls;
    std::vector<std::shared_ptr<Memory>> own;
    std::map<Memory *, std::pair<Tensor, string>> before; /* what was there of others', while it is captured */
};

struct Crossing { /* a copy that the host has not waited for */
    int64_t stream, launch;
    Tensor host;
    string bytes;
    bool to_host;
};

/* State shared by all threads; never destroyed, because tensors may outlive the end of the program. */
struct Shared {
    std::recursive_mutex mutex;
    std::map<int64_t, Clock> seen; /* by stream, what it has waited for; seen[s][s]: its own launches */
    Clock host;                    /* what the host has waited for */
    int64_t streams = DEVICES, events = 0, graphs = 0; /* the first streams are the devices' default ones */
    std::map<int64_t, Clock> event;
    std::map<int64_t, std::shared_ptr<Graph>> graph;
    std::map<int64_t, Graph *> captured; /* by stream: the backward pass launches from threads of its own */
    std::deque<Crossing> crossings;
    std::unordered_map<void *, std::shared_ptr<Memory>> memory; /* by the context of its DataPtr */
    std::map<char *, size_t> pinned;
    std::vector<string> hazards;
    std::map<string, int64_t> counts;
    int64_t debug_mode = 0; /* as torch.cuda.set_sync_debug_mode's: 1 warns where something waits, 2 raises */
};

Shared &shared = *new Shared;
thread_local int here_now = 0;                   /* this thread's device */
thread_local int64_t current[DEVICES] = {0, 1}; /* its stream on each of them */
thread_local Graph *replayed = nullptr;         /* takes what a replay allocates; its launches count as one */

Device gpu(int number) { return Device(DeviceType::CUDA, static_cast<c10::DeviceIndex>(number)); }

int number_of(const Device &device) { return device.has_index() ? device.index() : here_now; }

struct Lock : std::lock_guard<std::recursive_mutex> {
    Lock() : std::lock_guard<std::recursive_mutex>(shared.mutex) {}
};

Graph *captured_on(int device) {
    Lock lock;
    if (replayed) return replayed;
    auto found = shared.captured.find(current[device]);
    return found == shared.captured.end() ? nullptr : found->second;
}

bool recording(int device) { return !replayed && captured_on(device); }

void check_not_capturing(const string &what, int device) {
    TORCH_CHECK(!captured_on(device), "operation not permitted when stream is capturing: ", what);
}

void check_nowhere_capturing(const string &what) {
    for (int device = 0; device < DEVICES; device++) check_not_capturing(what, device);
}

/* Waiting for a device is forbidden while a stream of it is captured. */
void check_no_capture(const string &what) {
    Lock lock;
    TORCH_CHECK(shared.captured.empty(), "operation not permitted when stream is capturing: ", what);
}

/* ---- memory ---- */

struct Memory {
    int device = 0;
    int64_t stream = 0; /* where it was allocated */
    void *at = nullptr, *block = nullptr;
    size_t size = 0;
    Tensor keeps; /* the CPU's result whose memory this is, if it is not `block` */
    std::pair<int64_t, int64_t> written{-1, 0}; /* stream and launch */
    Clock read;
    std::set<int64_t> recorded; /* streams passed to `record_stream` */
    bool of_graph = false;
    ~Memory() { free(block); }
};

void hazard(const string &what) {
    Lock lock;
    shared.hazards.push_back(what);
}

bool waited(int64_t stream, int64_t other, int64_t launch) {
    return other < 0 || other == stream || shared.seen[stream][other] >= launch || shared.host[other] >= launch;
}

void let_go(void *context) {
    Lock lock;
    auto found = shared.memory.find(context);
    if (found == shared.memory.end()) return;
    auto memory = found->second;
    shared.memory.erase(found);
    if (memory->of_graph) return; /* which goes on writing there */
    Clock used = memory->read;
    if (memory->written.first >= 0) {
        int64_t &launch = used[memory->written.first];
        launch = std::max(launch, memory->written.second);
    }
    for (auto &[stream, launch] : used)
        if (!memory->recorded.count(stream) && !waited(memory->stream, stream, launch))
            hazard("memory of stream " + std::to_string(memory->stream) + " let go while stream " +
                   std::to_string(stream) + " may be using it");
    if (memory->block) memset(memory->block, UNINITIALISED, memory->size);
}

c10::DataPtr owned(std::shared_ptr<Memory> memory) {
    Lock lock;
    memory->stream = current[memory->device];
    if (Graph *graph = captured_on(memory->device)) {
        memory->of_graph = !replayed;
        graph->own.push_back(memory);
    }
    shared.memory[memory.get()] = memory;
    return {memory->at, memory.get(), &let_go, gpu(memory->device)};
}

void *block_of(size_t size) { return aligned_alloc(64, (std::max<size_t>(size, 1) + 63) / 64 * 64); }

struct OnDevice final : c10::Allocator {
    c10::DataPtr allocate(size_t size) override {
        auto memory = std::make_shared<Memory>();
        memory->device = here_now;
        memory->at = memory->block = block_of(size);
        memory->size = size;
        memset(memory->block, UNINITIALISED, size);
        return owned(memory);
    }
    c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
    void copy_data(void *to, const void *from, size_t size) const override { memcpy(to, from, size); }
} on_device;

void unpin(void *block) {
    Lock lock;
    shared.pinned.erase(static_cast<char *>(block));
    std::deque<Crossing> others; /* torch's own allocator keeps pinned memory until what it is copied to has it */
    for (auto &each : shared.crossings)
        if (each.to_host || each.host.storage().data() != block) others.push_back(std::move(each));
    shared.crossings.swap(others);
    free(block);
}

struct Pinned final : c10::Allocator {
    c10::DataPtr allocate(size_t size) override {
        Lock lock;
        void *block = block_of(size);
        shared.pinned[static_cast<char *>(block)] = std::max<size_t>(size, 1);
        return {block, block, &unpin, Device(DeviceType::CPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
    void copy_data(void *to, const void *from, size_t size) const override { memcpy(to, from, size); }
} pinned;

bool is_pinned(const void *address) {
    Lock lock;
    char *at = static_cast<char *>(const_cast<void *>(address));
    auto after = shared.pinned.upper_bound(at);
    if (after == shared.pinned.begin()) return false;
    --after;
    return at < after->first + after->second;
}

Memory *memory_of(const Tensor &tensor) {
    auto found = shared.memory.find(tensor.storage().data_ptr().get_context());
    return found == shared.memory.end() ? nullptr : found->second.get();
}

/* ---- order ---- */

void join(Clock &clock, const Clock &other) {
    for (auto &[stream, launch] : other) clock[stream] = std::max(clock[stream], launch);
}

void host_waits(const Clock &clock) {
    Lock lock;
    join(shared.host, clock);
    std::deque<Crossing> others;
    for (auto &each : shared.crossings) {
        if (each.launch > shared.host[each.stream]) {
            others.push_back(std::move(each));
        } else if (each.to_host) {
            memcpy(each.host.data_ptr(), each.bytes.data(), each.bytes.size());
        } else if (memcmp(each.host.data_ptr(), each.bytes.data(), each.bytes.size())) {
            hazard("pinned memory changed before its copy to the device was waited for");
        }
    }
    shared.crossings.swap(others);
}

/* Synchronise the host with the current stream, as an operation that reads results does. */
void wait_on(int device, const string &what) {
    check_not_capturing(what, device);
    Clock clock;
    {
        Lock lock;
        if (shared.debug_mode == 1) TORCH_WARN("called a synchronizing CUDA operation: ", what);
        TORCH_CHECK(shared.debug_mode < 2, "called a synchronizing CUDA operation: ", what);
        shared.counts["waits: " + what]++;
        clock = shared.seen[current[device]];
    }
    host_waits(clock);
}

void launch(int device, const string &what, const std::vector<Tensor> &reads, const std::vector<Tensor> &writes) {
    Lock lock;
    if (captured_on(device)) return; /* its replays are launched */
    const int64_t stream = current[device], number = ++shared.seen[stream][stream];
    shared.counts["launches"]++;
    auto check = [&](const char *order, int64_t other, int64_t launch) {
        if (!waited(stream, other, launch))
            hazard(string(order) + " in " + what + ": stream " + std::to_string(stream) +
                   " does not wait for stream " + std::to_string(other));
    };
    for (auto &tensor : reads)
        if (Memory *memory = memory_of(tensor)) {
            check("a read after a write", memory->written.first, memory->written.second);
            memory->read[stream] = number;
        }
    for (auto &tensor : writes)
        if (Memory *memory = memory_of(tensor)) {
            check("a write after a write", memory->written.first, memory->written.second);
            for (auto &[other, launch] : memory->read) check("a write after a read", other, launch);
            memory->written = {stream, number};
            memory->read.clear();
        }
}

/* ---- operations ---- */

bool here(const Tensor &tensor) { return tensor.defined() && tensor.device().is_cuda(); }

template <class Do> void each_tensor(const IValue &value, Do what) {
    if (value.isTensor()) {
        what(value.toTensor());
    } else if (value.isTensorList()) {
        for (const Tensor &each : value.toTensorVector()) what(each);
    } else if (value.isOptionalTensorList()) {
        for (const std::optional<Tensor> &each : value.toOptionalTensorList())
            if (each) what(*each);
    }
}

template <class Change> IValue changed(const IValue &value, Change what) {
    if (value.isTensor()) return what(value.toTensor());
    if (value.isTensorList()) {
        c10::List<Tensor> list;
        for (const Tensor &each : value.toTensorVector()) list.push_back(what(each));
        return list;
    }
    if (value.isOptionalTensorList()) {
        c10::List<std::optional<Tensor>> list;
        for (const std::optional<Tensor> &each : value.toOptionalTensorList())
            list.push_back(each ? std::optional<Tensor>(what(*each)) : std::nullopt);
        return list;
    }
    return value;
}

/* The same memory as a tensor of the CPU. */
Tensor lent(const Tensor &tensor) {
    if (!here(tensor)) return tensor;
    void *at = tensor.numel() ? tensor.data_ptr() : nullptr;
    return at::from_blob(at, tensor.sizes(), tensor.strides(), at::TensorOptions(tensor.dtype()));
}

/* A result of the CPU as a tensor of a device. */
Tensor taken(const Tensor &made, int device) {
    if (!made.defined()) return made;
    auto memory = std::make_shared<Memory>();
    memory->device = device;
    memory->keeps = made;
    memory->at = const_cast<void *>(made.storage().data());
    memory->size = made.storage().nbytes();
    c10::Storage storage(c10::Storage::use_byte_size_t(), memory->size, owned(memory), &on_device, true);
    auto tensor = at::detail::make_tensor<c10::TensorImpl>(
        std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), made.dtype());
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(made.sizes(), made.strides(), made.storage_offset());
    return tensor;
}

bool writes_to(const c10::OperatorHandle &op, size_t argument) {
    auto *alias = op.schema().arguments()[argument].alias_info();
    return alias && alias->isWrite();
}

string name_of(const c10::OperatorHandle &op) { return c10::toString(op.operator_name()); }

/* Save memory that a graph writes but did not allocate: capturing does not execute. */
void remember(Graph *graph, const std::vector<Tensor> &writes) {
    Lock lock;
    for (auto &tensor : writes)
        if (Memory *memory = memory_of(tensor))
            if (!memory->of_graph && !graph->before.count(memory))
                graph->before[memory] = {tensor, string(static_cast<char *>(memory->at), memory->size)};
}

const std::set<string> TAKES_BOTH = {"aten::index.Tensor", "aten::index.Tensor_out", "aten::index_put",
                                     "aten::index_put_", "aten::_index_put_impl_"};
const std::set<string> WAITS = {"aten::equal",  "aten::is_nonzero",   "aten::masked_select",
                                "aten::nonzero", "aten::unique_dim",   "aten::repeat_interleave.Tensor",
                                "aten::_unique2", "aten::unique_consecutive"};

/* Run the operation; return its device and its results. */
std::pair<int, Stack> done(const c10::OperatorHandle &op, const Stack &given) {
    const string name = name_of(op);
    std::vector<Tensor> reads, writes;
    std::vector<std::pair<Tensor, Tensor>> pairs; /* of the device and of the CPU */
    bool on_host = false;
    int device = -1;
    auto note = [&](const Tensor &tensor) {
        TORCH_CHECK(device < 0 || device == tensor.get_device(),
                    "Expected all tensors to be on the same device, but ", name, " got some of both GPUs");
        device = tensor.get_device();
    };
    for (const IValue &value : given)
        each_tensor(value, [&](const Tensor &tensor) {
            if (here(tensor)) note(tensor);
        });
    if (device < 0) device = here_now;
    Stack stack;
    for (size_t i = 0; i < given.size(); i++) {
        const bool written = writes_to(op, i);
        if (TAKES_BOTH.count(name) && given[i].isOptionalTensorList())
            each_tensor(given[i], [&](const Tensor &mask) {
                if (here(mask) && mask.scalar_type() == at::kBool) wait_on(device, name + " by a mask");
            });
        if (given[i].isDevice() && given[i].toDevice().is_cuda()) {
            stack.emplace_back(Device(DeviceType::CPU));
            continue;
        }
        stack.push_back(changed(given[i], [&](const Tensor &tensor) {
            if (!here(tensor)) {
                on_host |= tensor.defined() && tensor.dim() > 0;
                return tensor;
            }
            (written ? writes : reads).push_back(tensor);
            const bool grows = written && !tensor.numel(); /* as what `out=` is given */
            pairs.emplace_back(tensor, grows ? at::empty({0}, at::TensorOptions(tensor.dtype())) : lent(tensor));
            return pairs.back().second;
        }));
    }
    TORCH_CHECK(!on_host || pairs.empty() || TAKES_BOTH.count(name),
                "Expected all tensors to be on the same device, but ", name, " got some of the CPU's");
    if (WAITS.count(name)) wait_on(device, name);
    launch(device, name, reads, writes);
    if (recording(device)) remember(captured_on(device), writes);
    {
        at::AutoDispatchBelowAutograd below;
        op.callBoxed(&stack);
    }
    Stack made;
    for (const IValue &value : stack)
        made.push_back(changed(value, [&](const Tensor &result) {
            for (auto &[mine, cpus] : pairs)
                if (cpus.is_same(result)) return mine;
            for (auto &[mine, cpus] : pairs)
                TORCH_CHECK(!result.defined() || !result.numel() || !cpus.numel() ||
                                result.storage().data() != cpus.storage().data(),
                            name, " makes a view: simulated CUDA needs a kernel of its own for it");
            return taken(result, device);
        }));
    for (auto &[mine, cpus] : pairs)
        if (!mine.numel() && cpus.numel()) {
            Tensor grown = taken(cpus, device);
            mine.unsafeGetTensorImpl()->set_storage_keep_dtype(grown.storage());
            mine.unsafeGetTensorImpl()->set_sizes_and_strides(grown.sizes(), grown.strides(), 0);
        }
    Lock lock;
    const int64_t stream = current[device];
    if (!captured_on(device))
        for (const IValue &value : made)
            each_tensor(value, [&](const Tensor &tensor) {
                Memory *memory = here(tensor) ? memory_of(tensor) : nullptr;
                if (memory) memory->written = {stream, shared.seen[stream][stream]};
            });
    return {device, std::move(made)};
}

/* Add the call to the graph being captured; the graph must not keep autograd's nodes. */
void record(Graph *graph, const c10::OperatorHandle &op, const Stack &given, const Stack &made) {
    auto bare = [](const Stack &stack) {
        Stack found;
        for (const IValue &value : stack)
            found.push_back(changed(value, [](const Tensor &tensor) {
                if (!tensor.defined()) return tensor;
                return Tensor(tensor.unsafeGetTensorImpl()->shallow_copy_and_detach(c10::VariableVersion(0), false));
            }));
        return found;
    };
    graph->calls.push_back({op, bare(given), bare(made)});
}

void operation(const c10::OperatorHandle &op, Stack *stack) {
    const size_t count = op.schema().arguments().size();
    const Stack given(stack->end() - count, stack->end());
    const auto [device, made] = done(op, given);
    if (recording(device)) record(captured_on(device), op, given, made);
    stack->erase(stack->end() - count, stack->end());
    stack->insert(stack->end(), made.begin(), made.end());
}

/* The allocator of a device. */
struct On {
    const int before = here_now;
    explicit On(const std::optional<Device> &device) {
        if (device) here_now = number_of(*device);
    }
    ~On() { here_now = before; }
};

Tensor empty(SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
    On on(device);
    return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &on_device,
                                     c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(SymIntArrayRef size, SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
    On on(device);
    return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &on_device,
                                             c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

int64_t number(const c10::SymInt &of) { return of.guard_int(__FILE__, __LINE__); }

Tensor as_strided(const Tensor &self, SymIntArrayRef size, SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
    return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                             offset ? std::optional<int64_t>(number(*offset)) : std::nullopt);
}

Tensor view(const Tensor &self, SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor view_dtype(const Tensor &self, at::ScalarType dtype) { return at::native::view_dtype(self, dtype); }

Tensor reshape_alias(const Tensor &self, SymIntArrayRef size, SymIntArrayRef stride) {
    return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor unfold(const Tensor &self, int64_t dim, int64_t size, int64_t step) {
    return at::native::unfold(self, dim, size, step);
}

Tensor &set_storage(Tensor &self, at::Storage source, c10::SymInt offset, SymIntArrayRef size, SymIntArrayRef stride) {
    auto *impl = self.unsafeGetTensorImpl();
    impl->set_storage_keep_dtype(source);
    impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), number(offset));
    return self;
}

const Tensor &resize(const Tensor &self, SymIntArrayRef size, std::optional<at::MemoryFormat>) {
    Tensor room = empty(size, self.scalar_type(), {}, self.device(), {}, {});
    auto *impl = self.unsafeGetTensorImpl();
    if (room.nbytes() > self.storage().nbytes()) impl->set_storage_keep_dtype(room.storage());
    impl->set_sizes_contiguous(room.sizes());
    return self;
}

c10::Scalar item(const Tensor &self) {
    check_not_capturing("item", self.get_device());
    launch(self.get_device(), "item", {self}, {});
    wait_on(self.get_device(), "item");
    return lent(self).item();
}

/* The two devices' streams wait for each other, as in torch around a copy between devices. */
void meet(int one, int other) {
    Lock lock;
    join(shared.seen[current[one]], shared.seen[current[other]]);
    join(shared.seen[current[other]], shared.seen[current[one]]);
}

Tensor &copy_on_devices(Tensor &to, const Tensor &from, bool non_blocking) {
    const int device = from.get_device(), other = to.get_device();
    if (device != other) {
        check_nowhere_capturing("a copy between devices");
        meet(device, other);
    }
    launch(device, "aten::copy_", {from}, {to});
    if (recording(device)) {
        remember(captured_on(device), {to});
        static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
        record(captured_on(device), op, {to, from, non_blocking}, {to});
    }
    if (device != other) meet(device, other);
    at::AutoDispatchBelowAutograd below;
    lent(to).copy_(lent(from));
    return to;
}

Tensor &copy(Tensor &to, const Tensor &from, bool non_blocking) {
    if (here(to) && here(from)) return copy_on_devices(to, from, non_blocking);
    const bool to_host = here(from);
    const string what = to_host ? "a copy to the host" : "a copy to the device";
    const Tensor &host = to_host ? to : from, &there = to_host ? from : to;
    const int device = there.get_device();
    check_not_capturing(what, device);
    const bool as_it_is = host.is_contiguous() && there.is_contiguous() && host.dtype() == there.dtype() &&
                          host.sizes() == there.sizes() && host.numel();
    launch(device, what, to_host ? std::vector<Tensor>{from} : std::vector<Tensor>{},
           to_host ? std::vector<Tensor>{} : std::vector<Tensor>{to});
    const bool later = non_blocking && as_it_is && is_pinned(host.data_ptr());
    if (!later) wait_on(device, what);
    at::AutoDispatchBelowAutograd below;
    lent(to).copy_(lent(from));
    if (later) {
        Lock lock;
        const int64_t stream = current[device];
        shared.counts[what + ", not waiting"]++;
        string bytes(static_cast<char *>(host.data_ptr()), host.nbytes());
        if (to_host) memset(host.data_ptr(), UNINITIALISED, host.nbytes());
        shared.crossings.push_back({stream, shared.seen[stream][stream], host, std::move(bytes), to_host});
    }
    return to;
}

void record_stream(Tensor &self, c10::Stream stream) {
    Lock lock;
    if (Memory *memory = memory_of(self)) memory->recorded.insert(stream.id());
}

/* torch has these fused cells for GPUs only; autograd goes through their parts. */
Tensor biased(const Tensor &gates, const std::optional<Tensor> &bias) {
    return bias && bias->defined() ? gates + *bias : gates;
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor &from_input, const Tensor &from_state, const Tensor &cell,
                                             const std::optional<Tensor> &bias, const std::optional<Tensor> &other) {
    Tensor all = biased(biased(from_input + from_state, bias), other);
    auto gates = all.chunk(4, 1);
    Tensor next = gates[1].sigmoid() * cell + gates[0].sigmoid() * gates[2].tanh();
    return {gates[3].sigmoid() * next.tanh(), next, all};
}

std::tuple<Tensor, Tensor> gru_cell(const Tensor &from_input, const Tensor &from_state, const Tensor &state,
                                    const std::optional<Tensor> &bias, const std::optional<Tensor> &other) {
    auto x = biased(from_input, bias).chunk(3, 1), h = biased(from_state, other).chunk(3, 1);
    Tensor keep = (x[1] + h[1]).sigmoid(), made = (x[2] + (x[0] + h[0]).sigmoid() * h[2]).tanh();
    return {made + keep * (state - made), made};
}

/* ---- the device, to torch ---- */

c10::Stream stream_of(Device device, int64_t number) { return c10::Stream(c10::Stream::UNSAFE, device, number); }

struct NanGuard final : c10::impl::DeviceGuardImplInterface {
    DeviceType type() const override { return DeviceType::CUDA; }
    Device exchangeDevice(Device device) const override { return gpu(std::exchange(here_now, number_of(device))); }
    Device getDevice() const override { return gpu(here_now); }
    void setDevice(Device device) const override { here_now = number_of(device); }
    void uncheckedSetDevice(Device device) const noexcept override { here_now = number_of(device); }
    c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
    c10::Stream getStream(Device device) const override {
        return stream_of(gpu(number_of(device)), current[number_of(device)]);
    }
    c10::Stream getDefaultStream(Device device) const override {
        return stream_of(gpu(number_of(device)), number_of(device));
    }
    c10::Stream exchangeStream(c10::Stream stream) const override {
        return stream_of(stream.device(), std::exchange(current[stream.device_index()], stream.id()));
    }
    void record(void **event, const c10::Stream &stream, const c10::DeviceIndex, const c10::EventFlag) const override {
        Lock lock;
        if (!*event) *event = new Clock;
        *static_cast<Clock *>(*event) = shared.seen[stream.id()];
    }
    void block(void *event, const c10::Stream &stream) const override {
        Lock lock;
        if (event) join(shared.seen[stream.id()], *static_cast<Clock *>(event));
    }
    void destroyEvent(void *event, const c10::DeviceIndex) const noexcept override {
        delete static_cast<Clock *>(event);
    }
    bool queryEvent(void *) const override { return true; }
    bool queryStream(const c10::Stream &) const override { return true; }
    void recordDataPtrOnStream(const c10::DataPtr &data, const c10::Stream &stream) const override {
        Lock lock;
        auto found = shared.memory.find(data.get_context());
        if (found != shared.memory.end()) found->second->recorded.insert(stream.id());
    }
};

/* torch looks up this name. */
struct CUDAHooks final : at::CUDAHooksInterface {
    explicit CUDAHooks(at::CUDAHooksArgs) {}
    void init() const override {}
    bool hasCUDA() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    Device getDeviceFromPtr(void *) const override { return gpu(here_now); }
    bool isPinnedPtr(const void *address) const override { return is_pinned(address); }
    c10::Allocator *getPinnedMemoryAllocator() const override { return &pinned; }
    c10::Allocator *getCUDADeviceAllocator() const override { return &on_device; }
    int getNumGPUs() const override { return DEVICES; }
    c10::DeviceIndex deviceCount() const override { return DEVICES; }
    c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(here_now); }
    c10::DeviceIndex current_device() const override { return static_cast<c10::DeviceIndex>(here_now); }
};

/* ---- the device, to Python: streams, events and graphs by their numbers ---- */

int64_t new_stream() {
    Lock lock;
    return shared.streams++;
}

int64_t current_stream(int64_t device) { return current[device]; }

int64_t swap_stream(int64_t device, int64_t stream) { return std::exchange(current[device], stream); }

int64_t current_device() { return here_now; }

int64_t swap_device(int64_t device) { return std::exchange(here_now, static_cast<int>(device)); }

int64_t new_event(int64_t stream) {
    Lock lock;
    shared.event[++shared.events] = shared.seen[stream];
    return shared.events;
}

void stream_waits(int64_t stream, int64_t event) {
    Lock lock;
    join(shared.seen[stream], shared.event[event]);
}

bool is_done(int64_t event) {
    Lock lock;
    for (auto &[stream, launch] : shared.event[event])
        if (shared.host[stream] < launch) return false;
    return true;
}

void wait_for(const char *what, const Clock &clock) {
    check_nowhere_capturing(what);
    {
        Lock lock;
        shared.counts[string("waits for ") + what]++;
    }
    host_waits(clock);
}

void wait_for_event(int64_t event) {
    Lock lock;
    wait_for("events", shared.event[event]);
}

void wait_for_stream(int64_t stream) {
    Lock lock;
    wait_for("streams", shared.seen[stream]);
}

void wait_for_device() {
    Lock lock;
    check_no_capture("a wait for the device");
    Clock all;
    for (auto &[stream, clock] : shared.seen) join(all, clock);
    wait_for("the device", all);
}

void begin_capture() {
    check_not_capturing("a capture", here_now);
    Lock lock;
    shared.graph[++shared.graphs] = std::make_shared<Graph>();
    shared.captured[current[here_now]] = shared.graph[shared.graphs].get();
}

bool is_capturing() { return captured_on(here_now); }

int64_t end_capture(bool failed) {
    Lock lock;
    Graph *graph = captured_on(here_now);
    shared.captured.erase(current[here_now]);
    for (auto &[memory, before] : graph->before) memcpy(memory->at, before.second.data(), memory->size);
    graph->before.clear();
    for (auto &memory : graph->own) memset(memory->at, UNINITIALISED, memory->size);
    auto found = std::find_if(shared.graph.begin(), shared.graph.end(),
                              [&](auto &each) { return each.second.get() == graph; });
    if (!failed) return found->first;
    for (auto &memory : graph->own) memory->of_graph = false;
    shared.graph.erase(found);
    return 0;
}

void replay(int64_t number, int64_t device) {
    check_not_capturing("a replay", static_cast<int>(device));
    Lock lock;
    shared.counts["replays"]++;
    auto graph = shared.graph[number];
    std::unordered_set<Memory *> own;
    for (auto &memory : graph->own) own.insert(memory.get());
    std::vector<Tensor> reads, writes;
    for (auto &call : graph->calls) {
        for (size_t i = 0; i < call.given.size(); i++)
            each_tensor(call.given[i], [&](const Tensor &tensor) {
                if (here(tensor) && !own.count(memory_of(tensor)))
                    (writes_to(call.op, i) ? writes : reads).push_back(tensor);
            });
        for (auto &value : call.made)
            each_tensor(value, [&](const Tensor &tensor) {
                if (here(tensor)) writes.push_back(tensor);
            });
    }
    launch(static_cast<int>(device), "a graph", reads, writes);
    Graph spare;
    struct Replaying {
        explicit Replaying(Graph *graph) { replayed = graph; }
        ~Replaying() { replayed = nullptr; }
    } replaying(&spare);
    for (auto &call : graph->calls) {
        std::vector<Tensor> made, kept;
        const bool copies = name_of(call.op) == "aten::copy_"; /* which is no fallback's */
        Tensor to = copies ? call.given[0].toTensor() : Tensor();
        const Stack found = copies ? Stack{copy(to, call.given[1].toTensor(), true)} : done(call.op, call.given).second;
        for (auto &value : found) each_tensor(value, [&](const Tensor &tensor) { made.push_back(tensor); });
        for (auto &value : call.made) each_tensor(value, [&](const Tensor &tensor) { kept.push_back(tensor); });
        for (size_t i = 0; i < made.size(); i++)
            if (here(kept[i]) && kept[i].numel() && kept[i].data_ptr() != made[i].data_ptr()) {
                at::AutoDispatchBelowAutograd below;
                lent(kept[i]).copy_(lent(made[i]));
            }
    }
}

void forget(int64_t graph) {
    Lock lock;
    shared.graph.erase(graph);
}

void set_debug_mode(int64_t mode) { shared.debug_mode = mode; }

std::vector<string> take_hazards() {
    Lock lock;
    return std::exchange(shared.hazards, {});
}

/* Bytes of the device's tensors and of what its graphs keep. */
int64_t memory_allocated(int64_t device) {
    Lock lock;
    int64_t bytes = 0;
    for (auto &[context, memory] : shared.memory)
        if (memory->device == device) bytes += int64_t(memory->size);
    return bytes;
}

c10::Dict<string, int64_t> take_counts() {
    Lock lock;
    c10::Dict<string, int64_t> found;
    for (auto &[what, count] : std::exchange(shared.counts, {})) found.insert(what, count);
    return found;
}

const bool allocates = (c10::SetAllocator(DeviceType::CUDA, &on_device, 100), true);

} // namespace

C10_REGISTER_GUARD_IMPL(CUDA, NanGuard)

namespace at {
using ::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks)
} // namespace at

/* torch's CPU build reports no accelerator, whatever is registered. The loader finds these symbols first. */
namespace at::accelerator {
std::optional<DeviceType> getAccelerator(bool) { return DeviceType::CUDA; }
bool isAccelerator(DeviceType type) { return type == DeviceType::CUDA; }
} // namespace at::accelerator

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&operation>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
    library.impl("empty.memory_format", TORCH_FN(empty));
    library.impl("empty_strided", TORCH_FN(empty_strided));
    library.impl("as_strided", TORCH_FN(as_strided));
    library.impl("view", TORCH_FN(view));
    library.impl("view.dtype", TORCH_FN(view_dtype));
    library.impl("_reshape_alias", TORCH_FN(reshape_alias));
    library.impl("unfold", TORCH_FN(unfold));
    library.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
    library.impl("resize_", TORCH_FN(resize));
    library.impl("_local_scalar_dense", TORCH_FN(item));
    library.impl("copy_", TORCH_FN(copy));
    library.impl("record_stream", TORCH_FN(record_stream));
    /* torch would look for a GPU's library for these. */
    library.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&operation>());
    library.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&operation>());
}

TORCH_LIBRARY_IMPL(aten, AutogradCUDA, library) {
    library.impl("_thnn_fused_lstm_cell", TORCH_FN(lstm_cell));
    library.impl("_thnn_fused_gru_cell", TORCH_FN(gru_cell));
}

TORCH_LIBRARY(simulated_cuda, library) {
    library.def("new_stream", &new_stream);
    library.def("current_stream", &current_stream);
    library.def("swap_stream", &swap_stream);
    library.def("current_device", &current_device);
    library.def("swap_device", &swap_device);
    library.def("new_event", &new_event);
    library.def("stream_waits", &stream_waits);
    library.def("is_done", &is_done);
    library.def("wait_for_event", &wait_for_event);
    library.def("wait_for_stream", &wait_for_stream);
    library.def("wait_for_device", &wait_for_device);
    library.def("begin_capture", &begin_capture);
    library.def("is_capturing", &is_capturing);
    library.def("end_capture", &end_capture);
    library.def("replay", &replay);
    library.def("forget", &forget);
    library.def("set_debug_mode", &set_debug_mode);
    library.def("take_hazards", &take_hazards);
    library.def("take_counts", &take_counts);
    library.def("memory_allocated", &memory_allocated);
}

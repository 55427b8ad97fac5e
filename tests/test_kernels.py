"""What runs on a GPU, tested without one: which kernels are chosen, what is compiled, and where
layer inputs and page-locked memory go. Stand-ins play the GPU."""

import contextlib
import functools
import gc
import os
import subprocess
import sys
import types

import pytest
import torch
from smollm2 import ROOT

import eval_needle
import model as model_py
from model import KVCache, Llama, LlamaConfig, linear_cross_entropy, prefill
from support.memory import activations, kernels
from support.memory.activations import LayerInputsOnHost
from support.needles import cost

CUDNN, FLASH, EFFICIENT = kernels.CUDA_BACKENDS
A100, H100 = (8, 0), (9, 0)
CONFIG = LlamaConfig(97, 32, 48, 3, 4, 2, 8, 64)


# ---- which attention kernel --------------------------------------------------------------------


class OnGpu:
    """What the choice asks of a tensor on a GPU."""

    def __init__(self, T, d=128, dtype=torch.bfloat16, requires_grad=False):
        self.shape, self.dtype, self.requires_grad = (1, 8, T, d), dtype, requires_grad
        self.is_cuda, self.device = True, torch.device("cuda")


@pytest.mark.parametrize(
    ("T", "S", "gpu", "first"),
    [
        (39_424, 39_424, H100, CUDNN),
        (39_424, 39_424, (10, 0), CUDNN),
        (39_424, 39_424, A100, FLASH),
        (1, 131_072, H100, FLASH),  # a new token
        (16_384, 131_072, H100, FLASH),
    ],
)
def test_cudnn_is_for_whole_sequences_on_hopper_and_newer(T, S, gpu, first, monkeypatch):
    monkeypatch.setattr(kernels, "capability", lambda _: gpu)
    monkeypatch.setattr(kernels, "sdpa_kernel", lambda backends, set_priority: backends)
    backends = kernels.chosen(OnGpu(T), OnGpu(S))
    assert backends == [CUDNN, FLASH, EFFICIENT][first == FLASH :]


@pytest.mark.parametrize(("gpu", "kernel"), [(H100, "cudnn"), (A100, "flash")])
def test_a_past_is_joined_on_a_gpu_where_it_pays(gpu, kernel, monkeypatch):
    monkeypatch.setattr(kernels, "capability", lambda _: gpu)
    past = OnGpu(9000)
    chosen = kernels.joining(OnGpu(2048), past)
    kernel = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention")
    assert getattr(chosen, "func", chosen) is kernel
    for q, k in (
        (OnGpu(1), past),  # a new token
        (OnGpu(100), past),  # a question behind a text
        (OnGpu(9000), past),  # nothing past
        (OnGpu(2048, requires_grad=True), past),
        (OnGpu(2048), OnGpu(9000, requires_grad=True)),
        (OnGpu(2048, dtype=torch.float32), past),
        (OnGpu(2048, d=20), past),
    ):
        assert kernels.joining(q, k) is None
    cpu = torch.zeros(1, 8, 2, 16), torch.zeros(1, 8, 9, 16)
    assert isinstance(kernels.chosen(*cpu), contextlib.nullcontext)
    assert kernels.joining(*cpu) is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@pytest.mark.parametrize("gpu", [A100, H100])
def test_the_kernels_of_a_gpu_take_what_is_given_and_their_logsumexp_fits(gpu):
    """On tensors without memory, which know the kernels' shapes."""
    q = torch.empty(1, 8, 2048, 64, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, 2, 5000, 64, dtype=torch.bfloat16, device="meta")
    out = kernels.past_and_own(q, k, k, kernels.kernel_with_lse("cuda", gpu))
    assert (out.shape, out.dtype) == (q.shape, q.dtype)


def test_an_installed_flash_package_is_handed_to_torch_and_preferred(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: H100)
    assert kernels.in_words() == "cuDNN for whole sequences, torch's flash kernel after a past"
    with pytest.raises(ValueError, match="flash-attn-4 .*flash_attn_interface"):
        kernels.use_flash_package()
    active = []

    def activate(name):
        if name == "FA4":
            raise ImportError("not here")
        active.append(name)

    monkeypatch.setattr(kernels.torch_attention, "activate_flash_attention_impl", activate)
    current = lambda: active[0] if active else None  # noqa: E731
    monkeypatch.setattr(kernels.torch_attention, "current_flash_attention_impl", current)
    assert kernels.use_flash_package() == kernels.in_words() == "FA3"
    assert kernels.cuda_backends(64, 64, H100) == [FLASH, EFFICIENT]


def test_an_evaluation_takes_the_flash_package_and_says_what_runs(toy_dir, monkeypatch, capsys):
    argv = ["--model", str(toy_dir), "--attention", "flash"]
    with pytest.raises(SystemExit) as stop:
        eval_needle.main(argv)
    assert stop.value.code == 2 and "flash-attn-4" in capsys.readouterr().err  # none is here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**30))
    monkeypatch.setattr(cost, "in_words", lambda: "FA4")
    stack = types.SimpleNamespace(ids=range(9), starts=range(3), at="sentences")
    settings = types.SimpleNamespace(lengths=(8,), dtype="torch.bfloat16")
    candidate = types.SimpleNamespace(config=CONFIG)
    cost.announce("text", stack, [candidate], [{"length": 8}], settings)
    assert "; attention: FA4" in capsys.readouterr().err


# ---- what is compiled --------------------------------------------------------------------------


def compile_by(monkeypatch, compiled) -> list[str]:
    """Let `compiled` play torch.compile wherever a gradient is needed -> the names of the functions
    that it is given."""
    names = []

    def compile(function):
        names.append(function.__name__)
        return compiled(function)

    monkeypatch.setattr(kernels, "trains_on_gpu", lambda x: x.requires_grad)
    monkeypatch.setattr(torch, "compile", compile)
    for name in ("rotate", "gated"):
        plain = getattr(model_py, name).__wrapped__
        monkeypatch.setattr(model_py, name, kernels.compiled_in_training(plain))
    return names


def gradients(layer_inputs=None) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Llama(CONFIG)
    model.activation_checkpointing = model.keep_attention = True
    model.layer_inputs = layer_inputs
    h = model.hidden(torch.arange(40)[None])
    loss, n = linear_cross_entropy(h, model.lm_head.weight, torch.arange(1, 41)[None])
    (loss / n).backward()
    return [p.grad for p in model.parameters()]


def test_only_training_is_compiled_and_its_gradients_are_the_same(monkeypatch):
    compiled = compile_by(monkeypatch, functools.partial(torch.compile, backend="aot_eager"))
    model = Llama(CONFIG)
    for T in (3, 5, 7, 11):  # evaluation: each length would be compiled again
        prefill(model, torch.arange(T))
    monkeypatch.setenv(kernels.COMPILE, "0")
    expected = gradients()
    assert not compiled
    monkeypatch.delenv(kernels.COMPILE)
    found = gradients()
    torch.compiler.reset()
    assert compiled == ["rotate", "gated"]  # once each, for all layers
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(found, expected, strict=True))


def test_where_compilation_fails_one_line_is_logged_and_training_goes_on(monkeypatch, capsys):
    def compiled(function):
        def fail(*tensors):
            raise torch._dynamo.exc.TorchDynamoException("no C compiler\nand much more")

        return fail

    expected = gradients()
    compile_by(monkeypatch, compiled)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))
    assert capsys.readouterr().err.splitlines() == [
        "rotate runs without torch.compile: no C compiler",
        "gated runs without torch.compile: no C compiler",
    ]


def test_a_fault_of_the_function_itself_is_not_taken_for_a_failed_compilation(monkeypatch):
    monkeypatch.setattr(kernels, "trains_on_gpu", lambda x: True)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    with pytest.raises(RuntimeError, match="must match"):
        kernels.compiled_in_training(lambda a, b: a + b)(torch.zeros(2), torch.zeros(3))


# ---- the allocator -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "given"),
    [("train", {}), ("eval_needle", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"})],
)
def test_every_command_expands_segments_unless_the_user_says_otherwise(command, given):
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    env = {k: v for k, v in os.environ.items() if k not in names} | given
    code = f"import {command}, os, torch; print(os.environ['PYTORCH_CUDA_ALLOC_CONF'])"
    argv = [sys.executable, "-c", f"{code}; assert not torch.cuda.is_initialized()"]
    done = subprocess.run(argv, check=True, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == given.get(names[0], "expandable_segments:True")


# ---- page-locked memory ------------------------------------------------------------------------


@pytest.fixture()
def cuda_runtime(monkeypatch):
    """A stand-in that refuses what CUDA refuses: memory that is registered already."""
    registered = {}

    def register(address, size, flags):
        overlaps = any(a < address + size and address < a + n for a, n in registered.items())
        registered[address] = size
        return 712 if overlaps else 0

    def unregister(address):
        return 0 if registered.pop(address, None) else 713

    runtime = types.SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)

    def check_error(code):
        assert code == 0, code

    monkeypatch.setattr(torch.cuda, "check_error", check_error)
    return registered


def test_page_locked_memory_is_unregistered_when_its_last_tensor_goes(cuda_runtime):
    for _ in range(5):  # the same addresses again and again
        memory = activations.host_memory(10_000, locked=True)
        assert cuda_runtime == {memory.data_ptr(): 10_000} and memory.data_ptr() % 4096 == 0
        view = memory[:400].view(torch.float32).view(10, 10)
        del memory
        assert len(cuda_runtime) == 1 and view.fill_(2).sum() == 200  # still there
        del view
        assert not cuda_runtime
    activations.host_memory(10_000, locked=False)
    assert not cuda_runtime


class Streams:
    """Stand-ins for torch.cuda's streams that write down who waits for what."""

    def __init__(self, monkeypatch):
        self.log, self.now = [], "computing"
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.stream("copying"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream(self.now))
        monkeypatch.setattr(torch.cuda, "stream", self.inside)
        monkeypatch.setattr(activations, "on_gpu", lambda device: True)
        monkeypatch.setattr(torch.Tensor, "record_stream", None)  # holds memory for too long

    def stream(self, name: str):
        return types.SimpleNamespace(
            wait_stream=lambda other: self.log.append((name, "waits for", other.name)),
            wait_event=lambda event: self.log.append((name, "waits for", event)),
            record_event=functools.partial(self.event, name),
            name=name,
        )

    def event(self, name: str) -> str:
        n = sum("event" in line for line in self.log)
        self.log.append((name, "event", n))
        return f"event {n}"

    @contextlib.contextmanager
    def inside(self, stream):
        self.now, before = stream.name, self.now
        yield
        self.now = before


def test_offloaded_inputs_leave_and_return_on_a_stream_of_their_own(monkeypatch, cuda_runtime):
    expected = gradients()
    streams, inputs = Streams(monkeypatch), LayerInputsOnHost()
    found = gradients(inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    log = []  # layers 0, 1 and 2 leave; 2, 1 and 0 come back
    for i in range(6):
        log.append(
            ("copying", "waits for", "computing")
        )  # until the input, or its memory, is there
        log.append(("copying", "event", i))
        log.append(("computing", "waits for", f"event {i}"))
    assert streams.log == log
    assert inputs.leaving is None and not inputs.ahead and len(cuda_runtime) == 3
    del inputs
    gc.collect()
    assert not cuda_runtime


# ---- the MLP in pieces -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_mlp_in_pieces_changes_no_bit(dtype, checkpointing, monkeypatch):
    monkeypatch.setattr(activations, "PIECE_TOKENS", 64)
    config = LlamaConfig(97, 64, 192, 2, 4, 2, 16, 64)
    kept, grads = [], []
    for split in (False, True):
        torch.manual_seed(0)
        model = Llama(config).to(dtype)
        model.activation_checkpointing = checkpointing
        for block in model.model["layers"]:
            block.mlp.split = split
        model.model["embed_tokens"].weight.requires_grad_(False)
        widths = []

        def pack(x, widths=widths):
            widths.append(x.shape[-1] if x.ndim == 3 else 0)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            h = model.hidden((torch.arange(300) % 97)[None])
        kept.append(sum(width == 192 for width in widths))
        (h.float().square().mean()).backward()
        grads.append([h.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(grads[0]) > 15
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    if not checkpointing:
        assert kept[0] >= 6 and kept[1] == 0  # nothing as wide as the MLP is kept


# ---- the cache ---------------------------------------------------------------------------------


def test_the_cache_doubles_its_room_instead_of_copying_at_each_token():
    model, cache, rooms = Llama(CONFIG), KVCache(), []
    with torch.no_grad():
        for i in range(40):
            model.hidden(torch.tensor([[i]]), cache=cache)
            rooms.append(cache._layers[0].shape[3])
    assert cache.length == 40 and sorted(set(rooms)) == [1, 2, 4, 8, 16, 32, 64]

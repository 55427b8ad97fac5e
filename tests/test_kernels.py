"""What runs on a GPU, tested without one: which kernels are chosen, what is compiled, and where
layer inputs and page-locked memory go. Stand-ins play the GPU."""

import contextlib
import gc
import os
import runpy
import types

import pytest
import torch
import torch.nn.functional as F

import eval_needle
import model as model_py
import train
from model import Llama, LlamaConfig, linear_cross_entropy, prefill
from support.memory import activations, kernels
from support.memory.activations import LayerInputsOnHost, host_memory
from support.needles import cost
from support.system import console

CUDNN, FLASH, EFFICIENT = kernels.CUDA_BACKENDS
A100, H100 = (8, 0), (9, 0)
CONFIG = LlamaConfig(97, 32, 48, 3, 4, 2, 8, 64)


# ---- which attention kernel --------------------------------------------------------------------


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def on_gpu(T, d=64, dtype=torch.bfloat16, heads=8, **options) -> torch.Tensor:
    """Without memory: it knows its shape only."""
    options |= {"dtype": dtype, "device": "meta"}
    return torch.empty(1, heads, T, d, **options).as_subclass(OnGpu)


@pytest.mark.parametrize(
    ("gpu", "whole", "kernel"),
    [
        (A100, [FLASH, EFFICIENT], "flash"),
        (H100, [CUDNN, FLASH, EFFICIENT], "cudnn"),
        ((10, 0), [CUDNN, FLASH, EFFICIENT], "cudnn"),
    ],
)
def test_the_kernels_of_a_gpu(gpu, whole, kernel, monkeypatch):
    """cuDNN's is for whole sequences, on Hopper and newer. A past is joined where that pays, and
    the kernels take what they are given: their logsumexp fits."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: gpu)
    past = on_gpu(5000, heads=2)
    assert kernels.backends(on_gpu(5000), past) == whole
    assert kernels.backends(on_gpu(1), past) == [FLASH, EFFICIENT]  # a new token
    found = kernels.joining(q := on_gpu(2048), past)
    out = kernels.past_and_own(q, past, past, found)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    aten = torch.ops.aten
    assert getattr(found, "func", found) is getattr(aten, f"_scaled_dot_product_{kernel}_attention")
    for q, k in (
        (on_gpu(1), past),
        (on_gpu(100), past),  # a question behind a text
        (on_gpu(5000), past),  # nothing past
        (on_gpu(2048, requires_grad=True), past),
        (on_gpu(2048), on_gpu(5000, requires_grad=True)),
        (on_gpu(2048, dtype=torch.float32), past),
        (on_gpu(2048, d=20), past),
    ):
        assert kernels.joining(q, k) is None
    cpu = torch.zeros(1, 8, 2, 16), torch.zeros(1, 8, 9, 16)
    assert kernels.joining(*cpu) is aten._scaled_dot_product_flash_attention_for_cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_runs_on_the_chosen_kernels(dtype, monkeypatch):
    """In fp32 with a key and value head for each query head: no kernel of CUDA groups them."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: H100)
    asked, original = [], kernels.sdpa_kernel
    monkeypatch.setattr(
        kernels, "sdpa_kernel", lambda kinds, **options: asked.append(kinds) or original(kinds)
    )
    q, k, v = (torch.randn(1, n, 9, 16, dtype=dtype).as_subclass(OnGpu) for n in (4, 2, 2))
    out = kernels.scaled_dot_product_attention(q, k, v, None, is_causal=True, enable_gqa=True)
    plain = (x.as_subclass(torch.Tensor) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*plain, is_causal=True, enable_gqa=True)
    assert torch.equal(out.as_subclass(torch.Tensor), expected)
    assert asked == [[CUDNN, FLASH, EFFICIENT]]


def test_an_installed_flash_package_is_handed_to_torch_and_preferred(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: H100)
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
    assert kernels.backends(on_gpu(64), on_gpu(64)) == [FLASH, EFFICIENT]


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


def gradients(around_layers=contextlib.nullcontext) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Llama(CONFIG)
    model.activation_checkpointing, model.around_layers = True, around_layers
    h = model.hidden(torch.arange(40)[None])
    loss, n = linear_cross_entropy(h, model.lm_head.weight, torch.arange(1, 41)[None])
    (loss / n).backward()
    return [p.grad for p in model.parameters()]


def test_only_training_is_compiled_and_its_gradients_are_the_same(monkeypatch):
    compiled, original = [], torch.compile

    def compile(function):
        compiled.append(function.__name__)
        return original(function, backend="aot_eager")

    monkeypatch.setattr(kernels, "trains_on_gpu", lambda x: x.requires_grad)
    monkeypatch.setattr(torch, "compile", compile)
    for name in ("rotate", "gated"):
        plain = getattr(model_py, name).__wrapped__
        monkeypatch.setattr(model_py, name, kernels.compiled_in_training(plain))
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


def test_a_failed_compilation_is_one_line_and_a_fault_of_the_function_none(monkeypatch, capsys):
    def compile(function):
        def fail(*tensors):
            raise torch._dynamo.exc.TorchDynamoException("no C compiler\nand much more")

        return fail

    monkeypatch.setattr(kernels, "trains_on_gpu", lambda x: True)
    monkeypatch.setattr(torch, "compile", compile)
    run, x = kernels.compiled_in_training(torch.add), torch.ones(3)
    for _ in range(2):  # uncompiled from then on
        assert torch.equal(run(x, x), x + x)
    assert capsys.readouterr().err == "add runs without torch.compile: no C compiler\n"
    monkeypatch.setattr(torch, "compile", lambda function: function)
    with pytest.raises(RuntimeError, match="must match"):
        kernels.compiled_in_training(torch.add)(x, torch.ones(2))


# ---- the allocator -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "x:y"}]
)
def test_every_command_expands_segments_unless_the_user_says_otherwise(given, monkeypatch):
    assert train.report_errors is eval_needle.report_errors is console.report_errors
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(console.__file__)  # as the first import of it
    found = {name: os.environ[name] for name in names if name in os.environ}
    assert found == (given or {names[0]: "expandable_segments:True"})


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


def test_offloaded_inputs_leave_and_return_on_a_stream_of_their_own(monkeypatch, cuda_runtime):
    """Each copy begins when the computing stream has its source, and that stream goes on to the
    next copy when this one is done."""
    expected, log, now = gradients(), [], ["computing"]

    def stream(name: str):
        def wait_stream(other) -> None:
            log.append(f"{name} waits for {other.name}")

        return types.SimpleNamespace(name=name, wait_stream=wait_stream)

    @contextlib.contextmanager
    def inside(stream):
        now.append(stream.name)
        yield
        now.pop()

    def copy(self, other, non_blocking=False, copy=torch.Tensor.copy_):
        if non_blocking:
            log.append(f"copied while {now[-1]}")
        return copy(self, other)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(torch.cpu, "Stream", lambda device: stream("copying"))
    monkeypatch.setattr(torch.cpu, "current_stream", lambda: stream(now[-1]))
    monkeypatch.setattr(torch.cpu, "stream", inside)
    monkeypatch.setattr(activations, "host_memory", lambda size, locked: host_memory(size, True))
    found = gradients(inputs := LayerInputsOnHost())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # layers 0, 1 and 2 leave; 1 and 0 come back, 2 is still there
    one = ["copying waits for computing", "copied while copying", "computing waits for copying"]
    assert log == 5 * one and not inputs.moving and len(cuda_runtime) == 3
    del inputs
    gc.collect()
    assert not cuda_runtime

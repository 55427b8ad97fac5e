"""What is kept between the forward and the backward pass, and where.

The plain way keeps every intermediate result: for Llama-3-8B at 39,424 tokens some 10 GB a layer.
Activation checkpointing keeps each layer's input and computes the rest of the layer again in the
backward pass: 0.32 GB a layer, a third more arithmetic. Three levers on top of it:

--keep_attention: attention's output and logsumexp are kept too. They are small (D + H numbers a
token and layer), and attention is the part of a layer that grows with the square of the length, so
it is not computed a second time: 10 % less arithmetic for 10 GB.

--offload_inputs: the layer inputs wait on the host. Each is needed twice, when its layer runs and
when that layer's backward pass begins, half a sequence apart on average. A layer computes for some
200 ms of the 7.2 s that a sequence takes on an H200, and its copy of 0.32 GB takes 6 ms at 55 GB/s
(assets/results/gpu.json), so the copies hide behind the arithmetic, on a stream of their own.

--split_mlp: the MLP runs in pieces of tokens and keeps its input alone, so that three tensors of
its width are alive in the backward pass instead of six. It is computed once more for that.

None changes a bit of the gradients (tested on a CPU), with one exception: products of very few rows
may be rounded otherwise, so --split_mlp may where the last piece has a few tokens only. Sample
lengths that are multiples of 128, as by default, have no such piece."""

import mmap
import weakref
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import create_selective_checkpoint_contexts, noop_context_fn

PIECE_TOKENS = 4096  # of the MLP at a time, with --split_mlp


def set_levers(model, settings) -> None:
    """Activation checkpointing on, and the three levers as the settings say."""
    model.activation_checkpointing = True
    kept = keep_attention if settings.keep_attention else noop_context_fn
    model.checkpoint_options = {"use_reentrant": False, "context_fn": kept}
    model.around_layers = LayerInputsOnHost() if settings.offload_inputs else nullcontext
    for block in model.model["layers"]:
        block.mlp.split = settings.split_mlp


def keep_attention():
    """For checkpoint(context_fn=): keep what the attention kernels return."""
    # subtle: the policy compares overloads (`.default`); with the bare names nothing would be kept
    names = ("flash_attention_for_cpu", "cudnn_attention", "flash_attention", "efficient_attention")
    kernels = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in names]
    return create_selective_checkpoint_contexts(kernels)


# ---- the MLP in pieces -------------------------------------------------------------------------


def split_mlp(x: Tensor, mlp: nn.Module, gated) -> Tensor:
    """down @ gated(gate @ x, up @ x) for x (..., D), PIECE_TOKENS tokens at a time."""
    weights = (layer.weight for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    return _SplitMLP.apply(x.flatten(0, -2), *weights, gated).view_as(x)


class _SplitMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, up, down, gated):
        ctx.save_for_backward(x, gate, up, down)
        ctx.gated = gated
        out = torch.empty_like(x)
        for piece, piece_out in zip(x.split(PIECE_TOKENS), out.split(PIECE_TOKENS), strict=True):
            piece_out.copy_(F.linear(gated(F.linear(piece, gate), F.linear(piece, up)), down))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        """The weights' gradients are products over all tokens at once, as without pieces: a sum of
        the pieces' gradients would be rounded to bf16 after each."""
        x, gate, up, down = ctx.saved_tensors
        inner, grad_gate, grad_up = (x.new_empty(len(x), len(gate)) for _ in range(3))
        for i in range(0, len(x), PIECE_TOKENS):
            piece = slice(i, i + PIECE_TOKENS)
            with torch.enable_grad():
                a, b = (F.linear(x[piece], w).detach().requires_grad_() for w in (gate, up))
                product = ctx.gated(a, b)
            inner[piece] = product.detach()
            grads = torch.autograd.grad(product, (a, b), grad_out[piece] @ down)
            grad_gate[piece], grad_up[piece] = grads
        grad_down = grad_out.T @ inner
        del inner
        return grad_gate @ gate + grad_up @ up, grad_gate.T @ x, grad_up.T @ x, grad_down, None


# ---- layer inputs on the host ------------------------------------------------------------------


class LayerInputsOnHost:
    """A context for the loop over checkpointed layers, `with inputs():`. Whatever autograd saves
    inside (the layer inputs and nothing else, see model.hidden) goes to the host and comes back
    when the backward pass asks for it, layer by layer from the last.

    One host buffer a layer, made once and used again for every sequence. So one forward pass must
    be followed by its backward pass before the next begins: RuntimeError otherwise. The device
    holds two layer inputs at a time: the one in use, and one on its way."""

    def __init__(self):
        self.buffers: list[Tensor] = []  # uint8, one a layer
        self.inputs: list[Tensor] = []  # of this pass, on the host
        self.passes = 0
        self.moving: dict[int, Tensor] = {}  # layer: its input on the device, which is being copied
        self.stream = None  # of the copies

    def __call__(self) -> saved_tensors_hooks:
        self.wait()
        self.passes, self.inputs = self.passes + 1, []
        return saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, x: Tensor):
        if x.numel() == 0:  # a dummy of torch.utils.checkpoint
            return x
        i = len(self.inputs)
        if i == len(self.buffers) or self.buffers[i].nbytes < x.nbytes:
            self.buffers[i : i + 1] = [host_memory(x.nbytes, locked=x.is_cuda)]
        self.inputs.append(self.buffers[i][: x.nbytes].view(x.dtype).view(x.shape))
        self.start_copy(i, x, self.inputs[i], x)
        return self.passes, i, x.device

    def unpack(self, packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        passes, i, device = packed
        if passes != self.passes:
            raise RuntimeError("a second forward pass has overwritten the layer inputs of this one")
        if i not in self.moving:
            self.fetch(i, device)
        x = self.moving[i]
        self.wait()
        if i > 0:  # for the next layer of the backward pass
            self.fetch(i - 1, device)
        return x

    def fetch(self, i: int, device: torch.device) -> None:
        x = torch.empty_like(self.inputs[i], device=device)
        self.start_copy(i, x, x, self.inputs[i])

    def start_copy(self, i: int, x: Tensor, to: Tensor, source: Tensor) -> None:
        """subtle: the copying stream first waits for what the computing stream was told so far: it
        may still compute `source`, or use the memory that `to` was given from its pool. That also
        keeps the copies from running more than one layer ahead."""
        self.wait()
        device = torch.get_device_module(x.device)  # torch.cuda; on a CPU, streams do nothing
        self.stream = self.stream or device.Stream(x.device)
        self.stream.wait_stream(device.current_stream())
        with device.stream(self.stream):
            to.copy_(source, non_blocking=True)
        self.moving[i] = x

    def wait(self) -> None:
        """Let the computing stream wait for the copy under way. Then the host has the input, and
        its memory on the device may be used again; or the device has it."""
        for x in self.moving.values():
            torch.get_device_module(x.device).current_stream().wait_stream(self.stream)
        self.moving.clear()


def host_memory(size: int, locked: bool) -> Tensor:
    """uint8 (size,) in whole pages of its own, page-locked on request until the last tensor on it
    goes.

    subtle: pages that are freed while CUDA still has them registered make the next registration at
    that address fail, and CUDA reports this error from then on. So the finalizer unregisters them
    and only then lets go of them. (pin_memory() would round each size up to a power of two: 17 GB
    instead of 10 for Llama-3-8B.)"""
    pages = mmap.mmap(-1, size)
    array = np.frombuffer(pages, dtype=np.uint8)
    memory = torch.from_numpy(array)  # holds `array`, which holds `pages`
    if locked:
        address, cuda = memory.data_ptr(), torch.cuda.cudart()
        torch.cuda.check_error(int(cuda.cudaHostRegister(address, size, 0)))

        def unlock(pages: mmap.mmap) -> None:
            torch.cuda.check_error(int(cuda.cudaHostUnregister(address)))

        weakref.finalize(array, unlock, pages).atexit = False
    return memory

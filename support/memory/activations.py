"""What is kept between the forward and the backward pass, and where.

The plain way keeps every intermediate result: for Llama-3-8B at 39,424 tokens some 10 GB a layer.
Activation checkpointing keeps each layer's input and computes the rest of the layer again in the
backward pass: 0.32 GB a layer, a third more arithmetic. Two levers on top of it:

--keep_attention: attention's output and logsumexp are kept too. They are small (D + H numbers a
token and layer), and attention is the part of a layer that grows with the square of the length, so
it is not computed a second time: 10 % less arithmetic for 10 GB.

--offload_inputs: the layer inputs wait on the host. Each is needed twice, when its layer runs and
when that layer's backward pass begins, half a sequence apart on average. A layer computes for some
40 ms forward and 80 ms backward on an H100 (estimated), its copy takes some 10 ms at 30 GB/s, so
the copies hide behind the arithmetic, on a stream of their own: 10 GB of the device for no time.

Neither changes a bit of the gradients."""

import torch
from torch import Tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts


def keep_attention():
    """For checkpoint(context_fn=): keep what the attention kernels return."""
    # subtle: the policy compares overloads (`.default`); with the bare names nothing would be kept
    names = ("flash_attention_for_cpu", "cudnn_attention", "flash_attention", "efficient_attention")
    kernels = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in names]
    return create_selective_checkpoint_contexts(kernels)


class LayerInputsOnHost:
    """`with self.forward_pass():` around the loop over checkpointed layers; whatever autograd saves
    inside (the layer inputs and nothing else, see model.hidden) goes to the host and comes back
    when the backward pass asks for it, layer by layer from the last.

    One host buffer a layer, made once and used again for every sequence. So one forward pass must
    be followed by its backward pass before the next begins: RuntimeError otherwise."""

    def __init__(self):
        self.buffers: list[Tensor] = []
        self.stream: torch.cuda.Stream | None = None
        self.saved = self.passes = 0
        self.ahead: dict[int, tuple[Tensor, torch.cuda.Event]] = {}  # on their way back

    def forward_pass(self) -> torch.autograd.graph.saved_tensors_hooks:
        self.saved, self.passes = 0, self.passes + 1
        self.ahead.clear()
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def close(self) -> None:
        """Give the host memory back (a run ends with its process and need not)."""
        for buffer in self.buffers:
            if buffer.is_pinned():
                unlock(buffer)
        self.buffers.clear()

    def buffer(self, i: int, like: Tensor) -> Tensor:
        """The host memory of layer i, shaped as `like`; page-locked where the device is CUDA."""
        size = like.numel() * like.element_size()
        if i == len(self.buffers):
            self.buffers.append(torch.empty(0, dtype=torch.uint8))
        if self.buffers[i].numel() < size:
            if self.buffers[i].is_pinned():
                unlock(self.buffers[i])
            self.buffers[i] = torch.empty(size, dtype=torch.uint8)
            if like.is_cuda:
                lock(self.buffers[i])
        return self.buffers[i][:size].view(like.dtype).view(like.shape)

    def pack(self, x: Tensor):
        if x.numel() == 0:  # a dummy of torch.utils.checkpoint
            return x
        i, self.saved = self.saved, self.saved + 1
        host = self.buffer(i, x)
        if x.is_cuda:
            self.stream = self.stream or torch.cuda.Stream(x.device)
            self.stream.wait_stream(torch.cuda.current_stream())  # x must be there
            with torch.cuda.stream(self.stream):
                host.copy_(x, non_blocking=True)
            x.record_stream(self.stream)  # nobody gets this memory before the copy has read it
        else:
            host.copy_(x)
        return self.passes, i, host, x.device

    def unpack(self, packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        passes, i, host, device = packed
        if passes != self.passes:
            raise RuntimeError("a second forward pass has overwritten the layer inputs of this one")
        if device.type != "cuda":
            return host.clone()
        x, arrived = self.ahead.pop(i, None) or self.fetch(i, host, device)
        torch.cuda.current_stream().wait_event(arrived)
        if i > 0:  # the layer that is next in the backward pass, while this one computes
            before = self.buffer(i - 1, x)
            self.ahead[i - 1] = self.fetch(i - 1, before, device)
        return x

    def fetch(self, i: int, host: Tensor, device: torch.device):
        """Start the copy back. subtle: the memory comes from the computing stream's pool, so the
        copy first waits for what that stream was told before: it may still use this memory. That
        also keeps the copies from running more than one layer ahead."""
        x = torch.empty(host.shape, dtype=host.dtype, device=device)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            x.copy_(host, non_blocking=True)
        return x, self.stream.record_event()


def lock(buffer: Tensor) -> None:
    """Page-lock memory where it is. pin_memory() would round each buffer up to a power of two: 17
    GB instead of 10 for Llama-3-8B."""
    code = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)
    torch.cuda.check_error(int(code))


def unlock(buffer: Tensor) -> None:
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())))

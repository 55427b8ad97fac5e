"""Which kernels a GPU runs for attention, and which functions are compiled there.

On a CPU nothing here changes anything, except that attention to a past is joined from two calls
(see `joining`). model.py works without this file; torch then chooses its kernels itself."""

import os
from contextlib import nullcontext
from functools import partial, wraps

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend as Backend
from torch.nn.attention import sdpa_kernel

from support.system.bad_input import BadInput
from support.system.console import log

# Kernels that need memory for T tokens, not for T x S scores. The one that holds the scores is left
# out: where none of these fits, torch says so at once instead of running out of memory later.
CUDA_BACKENDS = [Backend.CUDNN_ATTENTION, Backend.FLASH_ATTENTION, Backend.EFFICIENT_ATTENTION]
JOIN_FROM_TOKENS = 1024  # on a GPU; fewer queries take one call of the flash kernel
COMPILE = "LONGRECIPE_COMPILE"  # environment variable; 0: nothing is compiled
PACKAGES = {"FA4": "flash-attn-4", "FA3": "flash_attn_interface, built from source"}


# ---- attention ---------------------------------------------------------------------------------


def cuda_backends(T: int, S: int, capability: tuple[int, int]) -> list[Backend]:
    """Kernels for T queries and S keys on a GPU of this compute capability, the preferred one
    first.

    cuDNN's takes half the time of torch's flash kernel on Hopper (9.0) and newer. It is left out on
    older GPUs, where it is slower; where T < S, because it prepares itself anew for each S; and
    where a flash attention package is active."""
    if T == S and capability >= (9, 0) and torch_attention.current_flash_attention_impl() is None:
        return CUDA_BACKENDS
    return CUDA_BACKENDS[1:]


def capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device)


def chosen(q: Tensor, k: Tensor):
    """A context in which scaled_dot_product_attention(q, k, ...) runs on cuda_backends."""
    if not q.is_cuda:
        return nullcontext()
    return sdpa_kernel(cuda_backends(q.shape[2], k.shape[2], capability(q)), set_priority=True)


def kernel_with_lse(device: str, capability: tuple[int, int] = (0, 0)):
    """The fastest kernel(q, k, v, is_causal=...) -> (output, logsumexp of the scaled scores, ...)
    on a device of this type. The logsumexp has no gradient."""
    aten = torch.ops.aten
    if device == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu
    if Backend.CUDNN_ATTENTION in cuda_backends(1, 1, capability):
        options = {"attn_bias": None, "compute_log_sumexp": True}
        return partial(aten._scaled_dot_product_cudnn_attention, **options)
    return aten._scaled_dot_product_flash_attention


def joining(q: Tensor, k: Tensor):
    """kernel_with_lse where attention to the past and to the T tokens themselves should be computed
    apart and joined by past_and_own; None where one call is better, or a gradient is needed.

    On a CPU the two calls take half the time of one with a (T, S) mask. On a GPU they run on the
    kernel that is fastest for whole sequences; for few queries one flash call does as well."""
    T, S = q.shape[2], k.shape[2]
    if not 1 < T < S or q.requires_grad or k.requires_grad:
        return None
    if q.device.type == "cpu":
        return kernel_with_lse("cpu")
    half = q.dtype in (torch.bfloat16, torch.float16)
    if q.is_cuda and half and q.shape[3] % 8 == 0 and T >= JOIN_FROM_TOKENS:
        return kernel_with_lse("cuda", capability(q))
    return None


def past_and_own(q: Tensor, k: Tensor, v: Tensor, kernel) -> Tensor:
    """Attention of the last T of S tokens in two calls without a (T, S) mask: to the S - T tokens
    of the past, which all queries see, and causally to the T tokens themselves."""
    past = k.shape[2] - q.shape[2]
    a, lse_a = kernel(q, k[:, :, :past], v[:, :, :past], is_causal=False)[:2]
    b, lse_b = kernel(q, k[:, :, past:], v[:, :, past:], is_causal=True)[:2]
    # [E12] out = share * past + (1 - share) * own,  share = e^lse_a / (e^lse_a + e^lse_b)
    share = torch.sigmoid(lse_a - lse_b).view(*q.shape[:3], 1)  # (B, H, T, 1) fp32
    return (share * a + (1 - share) * b).to(q.dtype)


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask, **options) -> Tensor:
    """torch's function of this name, on the fastest kernels for these shapes and this device."""
    if kernel := joining(q, k):  # for T < S without gradients
        return past_and_own(q, k, v, kernel)
    if q.is_cuda and q.dtype == torch.float32:
        # CUDA's only memory-linear fp32 kernel does not support grouped heads
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    with chosen(q, k):
        return F.scaled_dot_product_attention(q, k, v, mask, **options)


def use_flash_package() -> str:
    """--attention flash: let torch's flash attention run on FlashAttention 4 or 3. Returns the name
    of the one that is installed; BadInput where none is."""
    missing = []
    for name, package in PACKAGES.items():
        try:
            torch_attention.activate_flash_attention_impl(name)
            return name
        except ImportError as error:
            missing.append(f"{package} ({error})")
    raise BadInput(f"--attention flash needs one of these packages: {'; '.join(missing)}")


def in_words() -> str:
    """The kernels of attention, for the log; empty if there is no GPU."""
    if not torch.cuda.is_available():
        return ""
    flash = torch_attention.current_flash_attention_impl() or "torch's flash kernel"
    cudnn = Backend.CUDNN_ATTENTION in cuda_backends(1, 1, torch.cuda.get_device_capability())
    return f"cuDNN for whole sequences, {flash} after a past" if cudnn else flash


# ---- compilation -------------------------------------------------------------------------------


def trains_on_gpu(x: Tensor) -> bool:
    return x.is_cuda and x.requires_grad


def compiled_in_training(function):
    """Compile a chain of element-wise operations, for training on a GPU only.

    There each operation reads and writes a whole tensor, which takes longer than its arithmetic;
    torch.compile makes one kernel of the chain. Evaluation calls the function as it is, because
    each prompt has another length and would be compiled again; so does a CPU. LONGRECIPE_COMPILE=0
    switches compilation off. If it fails, for example because there is no C compiler, one line is
    logged and the function runs uncompiled from then on."""
    compiled, works = None, True

    @wraps(function)
    def run(*tensors: Tensor) -> Tensor:
        nonlocal compiled, works
        if not (works and trains_on_gpu(tensors[0]) and os.environ.get(COMPILE) != "0"):
            return function(*tensors)
        compiled = compiled or torch.compile(function)
        try:
            return compiled(*tensors)
        except torch._dynamo.exc.TorchDynamoException as error:
            works = False
            reason = str(error).strip().split("\n")[0]
            log(f"{function.__name__} runs without torch.compile: {reason}")
            return function(*tensors)

    return run

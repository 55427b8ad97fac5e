"""Which kernels a GPU runs for attention, and which functions are compiled there.

On a CPU nothing here changes anything, except that attention to a past is joined from two calls
(see `joining`). model.py works without this file; torch then chooses its kernels itself."""

import os
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


def cudnn_is_fastest(device: torch.device | None = None) -> bool:
    """For whole sequences: cuDNN's kernel takes half the time of torch's flash kernel on Hopper
    (compute capability 9.0) and newer. Not on older GPUs, nor beside a flash attention package."""
    newer = torch.cuda.get_device_capability(device) >= (9, 0)
    return newer and torch_attention.current_flash_attention_impl() is None


def backends(q: Tensor, k: Tensor) -> list[Backend]:
    """Kernels for these shapes on a GPU, the preferred one first. For T < S without cuDNN's, which
    prepares itself anew for each S."""
    whole = q.shape[2] == k.shape[2]
    return CUDA_BACKENDS if whole and cudnn_is_fastest(q.device) else CUDA_BACKENDS[1:]


def joining(q: Tensor, k: Tensor):
    """The kernel(q, k, v, is_causal=...) -> (output, logsumexp of the scaled scores, ...) by which
    attention to the past and to the T tokens themselves should be computed apart and joined by
    past_and_own; None where one call is better, or a gradient is needed: the logsumexp has none.

    On a CPU the two calls take half the time of one with a (T, S) mask. On a GPU they run on the
    kernel that is fastest for whole sequences; for few queries one flash call does as well."""
    T, S, aten = q.shape[2], k.shape[2], torch.ops.aten
    if not 1 < T < S or q.requires_grad or k.requires_grad:
        return None
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu
    half = q.dtype in (torch.bfloat16, torch.float16)
    if not (q.is_cuda and half and q.shape[3] % 8 == 0 and T >= JOIN_FROM_TOKENS):
        return None
    if cudnn_is_fastest(q.device):
        options = {"attn_bias": None, "compute_log_sumexp": True}
        return partial(aten._scaled_dot_product_cudnn_attention, **options)
    return aten._scaled_dot_product_flash_attention


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
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, mask, **options)
    if q.dtype == torch.float32:  # CUDA's only memory-linear kernel has no grouped heads there
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    with sdpa_kernel(backends(q, k), set_priority=True):
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
    return f"cuDNN for whole sequences, {flash} after a past" if cudnn_is_fastest() else flash


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
    compiled = None

    @wraps(function)
    def run(*tensors: Tensor) -> Tensor:
        nonlocal compiled
        if not trains_on_gpu(tensors[0]) or os.environ.get(COMPILE) == "0":
            return function(*tensors)
        compiled = compiled or torch.compile(function)
        try:
            return compiled(*tensors)
        except torch._dynamo.exc.TorchDynamoException as error:
            compiled = function
            reason = str(error).strip().split("\n")[0]
            log(f"{function.__name__} runs without torch.compile: {reason}")
            return function(*tensors)

    return run

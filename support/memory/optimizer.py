"""AdamW three times over: where do the 12 bytes of state a parameter live? (--optimizer)

    adamw        fp32 masters, m and v on the model's device. Small models.
    adamw-host   the same three on the host, stepped there tensor by tensor: the device holds
                 weights and gradients only. A step takes seconds instead of milliseconds, but
                 there is one in 96 sequences. Bit for bit the same weights as `adamw`.
    adamw-8bit   m and v in 8 bits on the device (torchao), no masters: bf16 weights are rounded
                 up or down at random, so that small updates survive on average. Its results are
                 close to those of `adamw`, not equal. For hosts with little memory.

All three sum gradients in fp32, clip by the global norm and decay matrices only."""

import logging
import warnings

import torch
from torch import Tensor, nn

from support.system.bad_input import BadInput

NAMES = ("adamw", "adamw-host", "adamw-8bit")
NEEDS_TORCHAO = "--optimizer adamw-8bit needs torchao: pip install torchao"
BETAS, EPS = (0.9, 0.999), 1e-8


def make_optimizer(name: str, model: nn.Module, lr: float, weight_decay: float) -> "MasterAdamW":
    """The optimizer called `name` (one of NAMES). Raises BadInput if adamw-8bit needs torchao and
    it is not installed."""
    if name == "adamw-8bit":
        return EightBitAdamW(model, lr, weight_decay)
    return MasterAdamW(model, lr, weight_decay, on_host=name == "adamw-host")


class MasterAdamW:
    """torch.optim.AdamW on fp32 master weights, on the model's device or on the host.

    bf16 keeps 8 bits: near 1.0 its step is 0.0078, so an update of 1e-5 would vanish. So the fp32
    masters take the update, and the weights are rounded from them after each step. fp32 weights on
    the model's device are their own masters.

    A step walks through the tensors, so that the host needs room for one gradient only. With
    on_host, gradients and weights are copied through two buffers of the size of the largest tensor,
    page-locked if the model is on a GPU: from ordinary memory the driver copies several times
    slower."""

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, on_host: bool = False):
        self.params = [p for p in model.parameters() if p.requires_grad]
        for p in self.params:
            # subtle: otherwise bf16 gradients of 96 sequences are summed in bf16 (1 % off).
            # deepcopy and load_state_dict(assign=True) reset it
            p.grad_dtype = torch.float32
        self.mastered = [p for p in self.params if self.has_master(p)]
        self.masters, self.on_host = [p.detach() for p in self.mastered], on_host
        if on_host:
            self.masters = [p.to("cpu", torch.float32, copy=True) for p in self.masters]
            largest, pin = max(p.numel() for p in self.mastered), self.params[0].is_cuda
            self.gradient = torch.empty(largest, dtype=torch.float32, pin_memory=pin)
            self.rounded = torch.empty(largest, dtype=self.params[0].dtype, pin_memory=pin)
        self.masters = [m.float() for m in self.masters]
        groups = [
            {"params": [m for m in self.masters if m.ndim > 1], "weight_decay": weight_decay},
            {"params": [m for m in self.masters if m.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS, fused=True)

    def has_master(self, p: Tensor) -> bool:
        return True

    @torch.no_grad()
    def step(self, lr: float, max_norm: float, usable: bool = True) -> float:
        """Clip to max_norm, update, round back, drop the gradients -> the global norm before
        clipping. Gradients that are not finite, or not usable, are only dropped."""
        norm = nn.utils.clip_grad_norm_(self.params, max_norm)  # fp32 gradients, in place
        for group in self.adamw.param_groups:
            group["lr"] = lr
        if usable and norm.isfinite():
            self.update()
        for p in self.params:
            p.grad = None
        return float(norm)

    def update(self) -> None:
        for p, master in zip(self.mastered, self.masters, strict=True):
            if p.grad is None:
                continue
            n = p.numel()
            master.grad = self.gradient[:n].view_as(p).copy_(p.grad) if self.on_host else p.grad
            p.grad = None  # frees 4 bytes a parameter of the device
            self.adamw.step()  # of this tensor only: the other masters have no gradient
            master.grad = None
            p.copy_(self.rounded[:n].view_as(p).copy_(master) if self.on_host else master)

    def state_dict(self) -> dict:
        return {"masters": [m.detach() for m in self.masters], "adamw": self.adamw.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """BadInput for the state of another model."""
        shapes = [
            [tensor.shape for name in ("masters", "weights") for tensor in part.get(name, ())]
            for part in (state, self.state_dict())
        ]
        if shapes[0] != shapes[1]:
            way_out = "put the run's own back, or begin again in another --out"
            raise BadInput(f"the saved state (state.pt) is of another model: {way_out}")
        for p, master, saved in zip(self.mastered, self.masters, state["masters"], strict=True):
            master.copy_(saved)
            p.copy_(saved)
        # subtle: AdamW keeps the tensors it is given. Tensors of a file mapped into memory
        # (RunFolder.load) would keep that file, 96 GB for an 8B, alive after the next save.
        saved = state["adamw"]
        own = {i: {k: v.clone() for k, v in x.items()} for i, x in saved["state"].items()}
        self.adamw.load_state_dict(saved | {"state": own})


class EightBitAdamW(MasterAdamW):
    """torchao's AdamW8bit (Dettmers et al., 2021: blocks of 256 share a scale) for the matrices;
    norms and biases, a few thousandths of a percent, keep fp32 masters.

    subtle: torchao would keep m and v of a bf16 norm in bf16. v changes by at most 0.1 % a step and
    the last bit of bf16 is worth 0.4 %: rounded to nearest, v would never change."""

    def __init__(self, model: nn.Module, lr: float, weight_decay: float):
        self.matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
        options = {"betas": BETAS, "eps": EPS, "weight_decay": weight_decay}
        kind = import_adamw8bit()
        self.eight_bit = kind(self.matrices, lr, bf16_stochastic_round=True, **options)
        self.steps = 0
        super().__init__(model, lr, weight_decay)

    def has_master(self, p: Tensor) -> bool:
        return p.ndim < 2

    def update(self) -> None:
        super().update()
        for group in self.eight_bit.param_groups:
            group["lr"].fill_(self.adamw.param_groups[0]["lr"])  # in place: no new compilation
        torch.manual_seed(self.steps)  # rounds at random, yet --resume rounds the same way
        self.eight_bit.step()
        self.steps += 1

    def state_dict(self) -> dict:
        weights = [p.detach() for p in self.matrices]
        own = {"weights": weights, "8bit": self.eight_bit.state_dict(), "steps": self.steps}
        return super().state_dict() | own

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        for p, saved in zip(self.matrices, state["weights"], strict=True):
            p.copy_(saved)
        self.eight_bit.load_state_dict(state["8bit"])
        self.steps = state["steps"]


def import_adamw8bit():
    """torchao's AdamW8bit. BadInput if it cannot be imported. The warnings of that import, of
    kernels for other GPUs and Pythons which nothing here calls, are not shown; errors are."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            from torchao.optim import AdamW8bit
    except ImportError as error:
        raise BadInput(f"{NEEDS_TORCHAO} ({error})") from None
    finally:
        logging.disable(before)
    return AdamW8bit

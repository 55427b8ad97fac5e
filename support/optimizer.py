"""AdamW in fp32 for weights in fp32 or bf16, global-norm clipping, gradients accumulated in
fp32."""

import torch


class MasterAdamW:
    """torch.optim.AdamW on fp32 master weights.

    bf16 keeps 8 bits: near 1.0 its step is 0.0078, so an update of 1e-5 would vanish. For bf16
    models the fp32 masters take the update and the bf16 weights are rounded from them after each
    step; for fp32 models the weights are their own masters. Decay applies to matrices only."""

    def __init__(self, model: torch.nn.Module, lr: float, weight_decay: float):
        self.params = [p for p in model.parameters() if p.requires_grad]
        for p in self.params:
            p.grad_dtype = torch.float32  # else bf16 gradients would be summed in bf16
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.params]
        groups = [
            {"params": [m for m in self.masters if m.ndim > 1], "weight_decay": weight_decay},
            {"params": [m for m in self.masters if m.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=True)

    def step(self, lr: float, max_norm: float, usable: bool = True) -> float:
        """Clip to max_norm, update, round back, drop the gradients -> the global norm before
        clipping. Gradients that are not finite, or not usable, are only dropped."""
        for p, master in zip(self.params, self.masters, strict=True):
            master.grad = p.grad
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_norm)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        if usable and norm.isfinite():
            self.adamw.step()
        with torch.no_grad():
            for p, master in zip(self.params, self.masters, strict=True):
                if p is not master:
                    p.copy_(master)
                p.grad = master.grad = None
        return float(norm)

    def state_dict(self) -> dict:
        return {"masters": [m.detach() for m in self.masters], "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        with torch.no_grad():
            for p, master, saved in zip(self.params, self.masters, state["masters"], strict=True):
                master.copy_(saved)
                p.copy_(saved)
        self.adamw.load_state_dict(state["adamw"])

"""What a run says of each step: a line of out/metrics.jsonl, and the progress bar."""

from support.memory import count
from support.system.console import peak_gib, progress


class Metrics:
    """run: the RunFolder; stages: of the whole run, in their order."""

    def __init__(self, run, model, settings, stages: list):
        self.run, self.config, self.batch = run, model.config, settings.batch_sequences
        self.device = model.lm_head.weight.device.type
        self.tokens = [s.tokens * self.batch for s in stages for _ in range(s.steps)]
        self.bar = progress(None, "train", total=sum(self.tokens), unit="tok", unit_scale=True)

    def resume_at(self, step: int) -> None:
        # tokens of earlier runs must not count towards the bar's speed and ETA
        self.bar.initial = self.bar.n = self.bar.last_print_n = sum(self.tokens[:step])

    def add(self, row: dict, tokens: int, seconds: float, waited: float) -> None:
        """row: stage, step, loss, lr, grad_norm of a step; tokens: of a sample; seconds: of the
        whole step; waited: of these, for samples that were not drawn yet."""
        speed = count.speed(self.config, tokens, self.batch, seconds, self.device)
        more = speed | {"waited_s": round(waited, 4), "peak_GiB": round(peak_gib(), 2)}
        self.run.append_metrics(row | more)
        loss, lr, norm = row["loss"], row["lr"], row["grad_norm"]
        shown = {"loss": f"{loss:.3f}", "lr": f"{lr:.1e}", "norm": f"{norm:.2f}"}
        if speed["causal_mfu"]:  # share of the GPU's peak
            shown["MFU"] = speed["causal_mfu"]
        self.bar.set_postfix(shown | {"GiB": f"{peak_gib():.1f}"})

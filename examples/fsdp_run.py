"""Past one GPU: does another engine learn from exported samples what train.py learns? transformers'
Trainer with FSDP in two processes, each holding half of the weights, against train.py in one.

    python examples/fsdp_run.py     # the toy on 2 cores, gloo -> assets/results/fsdp.json

In turn: train.py; the same with each batch in reverse order, to see how much rounding alone
changes these losses; `train.py --export`; and then

    torchrun --nproc_per_node 2 examples/fsdp_run.py --samples DIR --losses FILE

which is all that your own machines need: `worker` below. Needs transformers 5.24 and
accelerate. FSDP comes from transformers' DistributedConfig: TrainingArguments(fsdp=True) goes by
accelerate, which has none for a CPU and quietly runs DDP there (accelerate 1.15, state.py)."""

import argparse
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import train  # noqa: E402
from support.data.sources import standard_library_topics  # noqa: E402
from support.explain.command import OF_THE_TOY  # noqa: E402
from support.runs.flags import settings_of  # noqa: E402
from support.system.bad_input import BadInput  # noqa: E402
from support.system.console import provenance, report_errors  # noqa: E402

OUT = ROOT / "assets" / "results" / "fsdp.json"
# The tiny model, extended to 16 times a window of 256; every stage and a batch for each process.
FLAGS = (
    "--base_len 256 --target_len 4096 --train_len 512 --steps 8 --probe_steps 2 --replay_steps 4"
    " --batch_sequences 4 --lr 1e-3 --replay_lr 2e-4 --warmup_steps 3 --seed 1"
)


# ---- the engine --------------------------------------------------------------------------------


class Samples(torch.utils.data.Dataset):
    """The samples of an export in their order: see support/runs/export.py."""

    def __init__(self, folder: Path, mask: bool = True):
        self.index = json.loads((folder / "samples.json").read_text())
        if self.index["status"] != "done":
            raise BadInput(f"{folder} is not complete: give the same --export again")
        steps = self.index["steps"]
        self.rows = [(folder / s["file"], i) for s in steps for i in range(s["samples"])]
        self.mask = mask

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> dict:
        file, i = self.rows[n]
        with safe_open(file, "pt") as step:
            ids = step.get_slice("input_ids")[i].long()
            positions = step.get_slice("position_ids")[i].long()
        sample = {"input_ids": ids, "labels": ids, "position_ids": positions}
        # subtle: without a mask transformers takes each gap of the positions for the border of two
        # packed documents, and cuts attention there
        return sample | ({"attention_mask": torch.ones_like(ids)} if self.mask else {})


def extended(config, settings: dict):
    """transformers' config with train.py's changes: window and theta. A RoPE scaling stays, unless
    the run has a new one."""
    config.max_position_embeddings = settings["target_len"]
    rope = config.rope_parameters | (settings.get("rope_scaling") or {})
    config.rope_parameters = rope | {"rope_theta": settings["rope_base"]}
    return config


def worker(folder: Path, losses: Path | None, mask: bool) -> None:
    """One of the processes that torchrun starts."""
    if "WORLD_SIZE" not in os.environ or losses is None:
        raise BadInput(
            "--samples is for a process of torchrun: torchrun --nproc_per_node 2"
            " examples/fsdp_run.py --samples DIR --losses FILE"
        )
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
    from transformers.distributed import DistributedConfig

    samples, rows = Samples(folder, mask), []
    steps, settings = samples.index["steps"], settings_of(folder, "samples.json")
    processes = int(os.environ["WORLD_SIZE"])
    if settings["batch_sequences"] % processes:
        n = settings["batch_sequences"]
        raise BadInput(f"{processes} processes cannot share the {n} samples of a step evenly")

    class OurSchedule(Trainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            rates = [step["lr"] / settings["lr"] for step in steps] + [0.0]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rates.__getitem__)
            return self.lr_scheduler

        def log(self, logs, start_time=None):
            if "loss" in logs:
                rows.append(logs)

    args = TrainingArguments(
        output_dir=str(losses.parent / "unused"),
        use_cpu=not torch.cuda.is_available(),
        max_steps=len(steps),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings["batch_sequences"] // processes,
        learning_rate=settings["lr"],
        weight_decay=settings["weight_decay"],  # not of norms; betas and eps are train.py's, too
        max_grad_norm=settings["clip"],
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    config = extended(AutoConfig.from_pretrained(settings["model"]), settings)
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"],
        config=config,
        dtype=torch.float32,
        distributed_config=DistributedConfig(fsdp_size=processes),
    )
    whole = sum(p.numel() for p in model.parameters())
    mine = sum(p.to_local().numel() for p in model.parameters())  # DTensors: sharded indeed
    OurSchedule(model=model, args=args, train_dataset=samples).train()
    weights = {k: p.full_tensor().detach().clone() for k, p in model.named_parameters()}
    if torch.distributed.get_rank() == 0:
        save_file(weights, losses.with_suffix(".safetensors"))
        losses.write_text(json.dumps({"rows": rows, "share": mine / whole}))
    torch.distributed.destroy_process_group()


def torchrun(folder: Path, losses: Path, *more: str) -> dict:
    """worker in two processes -> what it found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [__file__, "--samples", str(folder), "--losses", str(losses), *more]
    env = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | env)
    return json.loads(losses.read_text())


# ---- against train.py --------------------------------------------------------------------------


def tolerance(loss: float, tokens: int) -> float:
    """How far rounding may move a mean loss: each of n additions, one after the other in fp32,
    rounds by up to u = 2^-24 of the sum so far, evenly both ways; together that is sqrt(n) u / 3 of
    the sum at most (one standard deviation): sqrt(n) u is three. Kernels add by blocks, round less;
    weights that differ by rounding, in no direction, move the loss by less still."""
    return math.sqrt(tokens) * 2.0**-24 * loss


def ours(flags: list[str], out: Path) -> list[dict]:
    """The metrics of a run of train.py in this process."""
    train.main([*flags, "--out", str(out), "--keep_stages"])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def measure(work: Path) -> dict:
    """Train in every way in the empty folder `work`, and compare."""
    torch.set_num_threads(1)
    started, text, draw = time.time(), work / "text.txt", train.draw
    text.write_text(standard_library_topics())
    flags = [*FLAGS.split(), "--data", str(text), "--impactful", str(ROOT / OF_THE_TOY)]
    runs = {"train.py": ours(flags, work / "out")}
    # the samples of a step the other way round: the same loss, another rounding
    with mock.patch.object(train, "draw", lambda *args: reversed(list(draw(*args)))):
        runs["train.py, batch reversed"] = ours(flags, work / "backwards")
    train.main(["--export", str(work / "samples"), *flags])
    found = torchrun(work / "samples", work / "fsdp.json")
    blind = torchrun(work / "samples", work / "blind.json", "--no_mask")
    runs |= {"FSDP": found["rows"], "FSDP without a mask": blind["rows"]}
    loss = {name: [step["loss"] for step in run] for name, run in runs.items()}
    off = {
        name: [abs(a - b) for a, b in zip(loss["train.py"], losses, strict=True)]
        for name, losses in loss.items()
    }
    rows, theirs = runs["train.py"], load_file(work / "fsdp.safetensors")
    weights = load_file(work / "out" / "replayed" / "model.safetensors")
    if theirs.keys() != weights.keys():
        raise BadInput("the two engines trained other tensors")
    norms = ([step["grad_norm"] for step in run] for run in (rows, found["rows"]))
    allowed = [tolerance(r["loss"], r["tokens"]) for r in rows]
    return {
        "command": "python examples/fsdp_run.py",
        "flags": FLAGS,
        "processes": 2,
        "share_of_the_weights_per_process": found["share"],
        "loss": loss,
        "largest_difference_nats": {k: max(gaps) for k, gaps in off.items() if k != "train.py"},
        "tokens_of_a_step": [r["tokens"] for r in rows],
        "tolerance_nats": [min(allowed), max(allowed)],
        "within": all(gap <= most for gap, most in zip(off["FSDP"], allowed, strict=True)),
        "largest_difference_of_a_weight": max(
            float((weights[k] - theirs[k]).abs().max()) for k in weights
        ),
        "largest_relative_difference_of_a_gradient_norm": max(
            abs(a / b - 1) for a, b in zip(*norms, strict=True)
        ),
        **{name: importlib.metadata.version(name) for name in ("transformers", "accelerate")},
        **provenance(started),
    }


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, default=OUT)
    p.add_argument("--samples", type=Path, help="of an export: be one of torchrun's processes")
    p.add_argument("--losses", type=Path, help="where those processes write what they found")
    p.add_argument("--no_mask", action="store_true", help="show what happens then")
    args = p.parse_args(argv)
    with report_errors(), tempfile.TemporaryDirectory() as work:
        if args.samples:
            return worker(args.samples, args.losses, not args.no_mask)
        found = measure(Path(work))
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps({k: v for k, v in found.items() if k != "loss"}, indent=1))


if __name__ == "__main__":
    main()

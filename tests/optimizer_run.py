"""Does adamw-8bit learn what adamw learns? Both train SmolLM2 in bf16 on the same samples.

    python tests/optimizer_run.py        # ~15 minutes on 2 cores with AMX; about as slow without

Each is a run of train.py (probe, extension, replay), resumable as such; the loss curves and their
differences go to assets/results/adamw_8bit.json. The band was stated before the run.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from support.cli import provenance, report_errors  # noqa: E402

OUT = ROOT / "assets" / "results" / "adamw_8bit.json"
BAND = {"any_step": 0.05, "mean_of_last_10": 0.02}  # nats, adamw-8bit minus adamw, absolute
FLAGS = (
    "--target_len 16384 --train_len 1024 --select random --method longrecipe --steps 40"
    " --probe_steps 0 --replay_steps 0 --batch_sequences 2 --lr 1e-4 --warmup_steps 5"
    " --dtype bfloat16 --save_minutes 5"
)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def outside_the_band(found: dict) -> list[str]:
    """What is not within BAND, in words."""
    a, b = (found["loss"][name] for name in ("adamw", "adamw-8bit"))
    gaps = [y - x for x, y in zip(a, b, strict=True)]
    seen = {"any_step": max(map(abs, gaps)), "mean_of_last_10": abs(sum(gaps[-10:]) / 10)}
    return [f"{k}: {v:.4f} > {BAND[k]}" for k, v in seen.items() if v > BAND[k]]


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", default=str(ROOT / "models" / "smollm2"))
    p.add_argument("--work", type=Path, help="folder for the two runs (None: a temporary one)")
    p.add_argument("--out", type=Path, default=OUT)
    args, started = p.parse_args(argv), time.time()
    curves = {}
    with report_errors(), tempfile.TemporaryDirectory() as scratch:
        for name in ("adamw", "adamw-8bit"):
            run = (args.work or Path(scratch)) / name
            again = ["--resume"] if (run / "run.json").is_file() else []
            flags = ["--model", args.model, "--optimizer", name, "--out", str(run), *again]
            train.main([*FLAGS.split(), *flags])
            curves[name] = losses(run)
        gaps = [b - a for a, b in zip(*curves.values(), strict=True)]
        found = {
            "flags": FLAGS,
            "band": BAND,
            "loss": curves,
            "largest_gap": max(map(abs, gaps)),
            "mean_gap_of_last_10": sum(gaps[-10:]) / 10,
            "fell": {k: sum(v[:5]) / 5 - sum(v[-10:]) / 10 for k, v in curves.items()},
            **provenance(started),
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=2) + "\n")
        print(json.dumps({k: v for k, v in found.items() if k != "loss"}, indent=2))


if __name__ == "__main__":
    main()

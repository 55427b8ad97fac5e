"""The commands that README shows, run as printed in a fresh copy of the repository, and kept.

    python studies/readme_runs.py first       # the pair that shows the effect, and plain positions
    python studies/readme_runs.py smallest    # the smallest run of SmolLM2
    python studies/readme_runs.py default --methods none pose rpes    # the paper's geometry with
                                # the toy, other methods on the same tokens; --target for others

first and smallest leave assets/results/{first,smallest}_run.json: each command with its seconds and
peak memory, the disk it took, and what the last evaluation found. Measure on idle cores.
default leaves assets/results/tiny_128k (or _64k, ...), and goes on where it was stopped.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import RESULTS, ROOT, copy_record, read_json, run, train_into, write_json
from fresh_copy import environment, fresh_copy
from tiny_study import ORIGINAL, selected

from support.system.console import log, provenance, report_errors

TO_32K = "train.py --target_len 32768 --rope_base 40000 --steps 40"
TELL = "eval_needle.py --model out_32k --lengths 8192 32768 --n 8"
SETS = {  # name -> the commands in their order, as README prints them after `python`
    "first": {
        "train": f"{TO_32K} --out out_32k",
        "eval": TELL,
        "train_none": f"{TO_32K} --method none --impactful out_32k/impactful.json --probe_steps 5"
        " --out out_none",
        "eval_none": f"{TELL} --compare {ORIGINAL} out_none",
    },
    "smallest": {
        "train": "train.py --model models/smollm2 --target_len 16384 --train_len 1024 --steps 4"
        " --probe_steps 1 --replay_steps 1 --batch_sequences 2 --analysis_samples 2 --lr 1e-4",
        "eval": "eval_needle.py --lengths 1024 2048 --depths 0.5 --n 2",
    },
}


def gigabytes(path: Path) -> float:
    """Size of a file or folder in GB; what disappears meanwhile counts nothing."""
    total = 0
    for file in [path, *path.rglob("*")]:
        with contextlib.suppress(FileNotFoundError):
            total += file.lstat().st_size if not file.is_dir() else 0
    return total / 1e9


def folder_of(command: str) -> str:
    """Where a command leaves its results: --out, or for eval_needle.py the model it judges."""
    words = command.split()
    flags = ["--out"] + ["--model"] * (words[0] == "eval_needle.py")
    return next((words[words.index(flag) + 1] for flag in flags if flag in words), "out")


def measure(command: str, copy: Path, disk: dict[str, float]) -> dict:
    """Run one command in the copy; `disk` learns the most that its folder and state took, GB."""
    log(f"$ python {command}")
    out, started = copy / folder_of(command), time.time()
    process = subprocess.Popen([sys.executable, *command.split()], cwd=copy, env=environment())
    while process.poll() is None:
        for name, path in (("out_at_most", out), ("state_pt", out / "state.pt")):
            disk[name] = max(disk.get(name, 0.0), gigabytes(path))
        time.sleep(0.5)
    if process.returncode:
        sys.exit(f"error: exit code {process.returncode} of python {command}")
    trained = command.startswith("train.py")
    record = read_json(out / ("run.json" if trained else "needle_results.json"))
    return {
        "command": command,
        "seconds": record["seconds"],
        "peak_GiB": record["peak_GiB"],
        "wall_seconds": round(time.time() - started, 1),
    }


def measure_all(commands: dict[str, str]) -> dict:
    """All commands of a set, one after the other in one fresh copy."""
    disk: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as tmp:
        copy = fresh_copy(Path(tmp) / "copy", models=True)
        found = {name: measure(command, copy, disk) for name, command in commands.items()}
        out = copy / folder_of(commands["train"])
        disk |= {"environment": gigabytes(Path(sys.prefix)), "out": gigabytes(out)}
        disk["model_and_essays"] = gigabytes(ROOT / "models/smollm2") + gigabytes(
            ROOT / "data/essays"
        )
        trained = read_json(out / "run.json")
        found["results"] = read_json(out / "needle_results.json")
    found["disk_GB"] = {name: round(size, 2) for name, size in disk.items()}
    found["dtype"] = trained["settings"]["dtype"]
    keep = (
        "torch",
        "python",
        "hardware",
        "threads",
    )  # the copy has no git: the commit is this checkout's
    return found | {k: trained[k] for k in keep} | {"commit": provenance(0)["commit"]}


def default_run(target: int, methods: list[str]) -> None:
    """The commands of README's paper geometry, other --methods on the same tokens beside them, and
    the loss by position."""
    name = f"tiny_{target // 1024}k"
    out, kept = Path("runs") / name, RESULTS / name
    others = {method: Path(f"{out}_{method}") for method in methods}
    probe = train_into(out, f"--target_len {target}")["settings"]["probe_steps"]
    for method, other in others.items():
        same = f"--impactful {out}/impactful.json --probe_steps {probe}"
        train_into(other, f"--target_len {target} --method {method} {same}")
    kept.mkdir(parents=True, exist_ok=True)
    compared = " ".join(map(str, (ORIGINAL, *others.values())))
    run(f"eval_needle.py --model {out} --compare {compared}")
    for method, other in others.items():
        copy_record(other, kept / f"run_{method}.json")
    copy_record(out, kept / "run.json")
    for name in ("needle_results.json", "metrics.jsonl", "impactful.json"):
        shutil.copyfile(out / name, kept / name)
    (kept / "selection.json").write_text(json.dumps(selected(out), indent=1) + "\n")
    run(f"eval_needle.py --model {out} --loss --n 1 --n_beyond 1 --lengths 8192 {target}")
    for name in ("needle.png", "curves.png", "needle.jsonl"):
        shutil.copyfile(out / name, kept / name)
    shutil.copyfile(out / "needle_results.json", kept / "loss_results.json")


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", choices=(*SETS, "default"))
    p.add_argument(
        "--target", type=int, default=131_072, help="of default: window to reach, tokens"
    )
    also = "of default: the same with these"
    p.add_argument("--methods", nargs="+", choices=("none", "pose", "rpes"), default=[], help=also)
    with report_errors():
        args = p.parse_args(argv)
        os.chdir(ROOT)
        if args.what == "default":
            default_run(args.target, args.methods)
        else:
            write_json(RESULTS / f"{args.what}_run.json", measure_all(SETS[args.what]), indent=2)


if __name__ == "__main__":
    main()

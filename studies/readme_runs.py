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
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import RESULTS, ROOT, naming_no_machine, read_json, run, train_into, write_json
from fresh_copy import environment, fresh_copy
from tiny_study import ORIGINAL, OTHERS, selected

from support.system.console import log, provenance, report_errors

TO_32K = "train.py --target_len 32768 --rope_base 40000 --steps 40"
TELL = "eval_needle.py --model out_32k --lengths 8192 32768 --n 8"
SETS = {  # name -> in their order: (folder of the result, command as README prints it)
    "first": {
        "train": ("out_32k", f"{TO_32K} --out out_32k"),
        "eval": ("out_32k", TELL),
        "train_none": (
            "out_none",
            f"{TO_32K} --method none --impactful out_32k/impactful.json --probe_steps 5"
            " --out out_none",
        ),
        "eval_none": ("out_32k", f"{TELL} --compare {ORIGINAL} out_none"),
    },
    "smallest": {
        "train": (
            "out",
            "train.py --model models/smollm2 --target_len 16384 --train_len 1024 --steps 4"
            " --probe_steps 1 --replay_steps 1 --batch_sequences 2 --analysis_samples 2 --lr 1e-4",
        ),
        "eval": ("out", "eval_needle.py --lengths 1024 2048 --depths 0.5 --n 2"),
    },
}


def gigabytes(*paths: Path) -> float:
    """Size of files and folders in GB; what disappears meanwhile counts nothing."""
    total = 0
    for file in (file for path in paths for file in (path, *path.rglob("*"))):
        with contextlib.suppress(FileNotFoundError):
            total += file.lstat().st_size if not file.is_dir() else 0
    return total / 1e9


def measure_all(commands: dict[str, tuple[str, str]], copy: Path) -> dict:
    """All commands of a set, one after the other in a fresh copy: what each cost, the most disk
    that a result (and the training state in it) took, and what the last evaluation found."""
    found, largest = {}, {"out_at_most": 0.0, "state_pt": 0.0}
    for name, (folder, command) in commands.items():
        log(f"$ python {command}")
        out, words = copy / folder, [sys.executable, *command.split()]
        process = subprocess.Popen(words, cwd=copy, env=environment())
        while process.poll() is None:
            for part, path in (("out_at_most", out), ("state_pt", out / "state.pt")):
                largest[part] = max(largest[part], gigabytes(path))
            time.sleep(0.5)
        if process.returncode:
            sys.exit(f"error: exit code {process.returncode} of python {command}")
        trained = command.startswith("train.py")
        record = read_json(out / ("run.json" if trained else "needle_results.json"))
        found[name] = {"command": command, **{k: record[k] for k in ("seconds", "peak_GiB")}}
    out = copy / commands["train"][0]
    disk = largest | {"environment": gigabytes(Path(sys.prefix)), "out": gigabytes(out)}
    disk["model_and_essays"] = gigabytes(ROOT / "models/smollm2", ROOT / "data/essays")
    run_json, made_by = read_json(out / "run.json"), ("torch", "python", "hardware", "threads")
    found |= {"results": read_json(out / "needle_results.json"), "disk_GB": disk}
    found |= {"dtype": run_json["settings"]["dtype"], **{k: run_json[k] for k in made_by}}
    return found | {"commit": provenance(0)["commit"]}  # this checkout's: the copy has no git


def default_run(target: int, methods: list[str]) -> None:
    """The commands of README's paper geometry, other --methods on the same tokens beside them, and
    the loss by position."""
    name = f"tiny_{target // 1024}k"
    out, kept = Path("runs") / name, RESULTS / name
    flags = f"--target_len {target}"
    made = {"run": train_into(out, flags)}
    flags += f" --impactful {out}/impactful.json"
    flags += f" --probe_steps {made['run']['settings']['probe_steps']}"
    for method in methods:
        made[f"run_{method}"] = train_into(Path(f"{out}_{method}"), f"{flags} --method {method}")
    others = " ".join([ORIGINAL, *(f"{out}_{method}" for method in methods)])
    run(f"eval_needle.py --model {out} --compare {others}")
    for record, about in made.items():
        write_json(kept / f"{record}.json", naming_no_machine(about), indent=2)
    for name in ("needle_results.json", "metrics.jsonl", "impactful.json"):
        shutil.copyfile(out / name, kept / name)
    write_json(kept / "selection.json", selected(out), indent=1)
    run(f"eval_needle.py --model {out} --loss --n 1 --n_beyond 1 --lengths 8192 {target}")
    for name in ("needle.png", "curves.png", "needle.jsonl"):
        shutil.copyfile(out / name, kept / name)
    shutil.copyfile(out / "needle_results.json", kept / "loss_results.json")


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", choices=(*SETS, "default"))
    p.add_argument("--target", type=int, default=131_072, help="of default: the window, tokens")
    also = "of default: the same with these"
    p.add_argument("--methods", nargs="+", choices=OTHERS, default=[], help=also)
    with report_errors(), tempfile.TemporaryDirectory() as folder:
        args = p.parse_args(argv)
        os.chdir(ROOT)
        if args.what == "default":
            default_run(args.target, args.methods)
        else:
            found = measure_all(SETS[args.what], fresh_copy(Path(folder) / "copy", models=True))
            write_json(RESULTS / f"{args.what}_run.json", found, indent=2)


if __name__ == "__main__":
    main()

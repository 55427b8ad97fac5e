"""README's first pair of commands, as printed there, and what it took and found.

python studies/first_run.py     # minutes on two idle cores -> assets/results/first_run.json
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]
from fresh_copy import environment, fresh_copy  # noqa: E402

from support.system.console import provenance  # noqa: E402
from support.system.whole_files import write_atomically  # noqa: E402


def commands(readme: str) -> list[str]:
    """The first train.py and the first eval_needle.py of README.

    >>> commands("pip install\\npython train.py --a 1  # note\\npython eval_needle.py\\n")
    ['python train.py --a 1', 'python eval_needle.py']
    """
    lines = [line.partition("#")[0].strip() for line in readme.splitlines()]
    names = ("python train.py", "python eval_needle.py")
    return [next(line for line in lines if line.startswith(name)) for name in names]


def main() -> None:
    pair = commands((ROOT / "README.md").read_text())
    with tempfile.TemporaryDirectory() as folder:
        copy = fresh_copy(Path(folder) / "copy")
        for command in pair:
            print(f"$ {command}", flush=True)
            subprocess.run(command, shell=True, check=True, cwd=copy, env=environment())
        (out,) = (file.parent for file in copy.glob("*/run.json"))
        trained, judged = (
            json.loads((out / name).read_text()) for name in ("run.json", "needle_results.json")
        )
    keep = ("seconds", "peak_GiB", "hardware", "threads")
    found = {"commands": pair, "train": {k: trained[k] for k in keep}}
    found["eval"] = {k: judged[k] for k in (*keep, "models", "table")}
    found["commit"] = provenance(0)["commit"]  # of this checkout: the copy has no history
    write_atomically(ROOT / "assets/results/first_run.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

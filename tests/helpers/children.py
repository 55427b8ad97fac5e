"""train.py and eval_needle.py in processes of their own, for tests that kill them, fill their disk
or cap their memory. torch is imported once: the children are forked from a server."""

import multiprocessing
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
PLENTY = "plenty"  # the disk seems to have room, as one that others fill during the run


def start(name: str, argv: list[str], log: Path, cwd: Path, event=None):
    """A running child of main(argv) in the folder cwd. event: (part of a path, n, signal or "cap"),
    what happens to it at the n-th file operation on such a path; or PLENTY."""
    paths = [str(ROOT), str(ROOT / "tests/helpers"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(p for p in paths if p))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "eval_needle"])
    main = sys.modules["__main__"]  # pytest's: the child need not import it
    kept = {k: main.__dict__.pop(k) for k in ("__file__", "__spec__") if k in main.__dict__}
    main.__spec__ = None
    try:
        child = context.Process(target=run, args=(name, argv, str(log), str(cwd), event))
        child.start()
    finally:
        main.__dict__.update(kept)
    return child


def run(name: str, argv: list[str], log: str, cwd: str, event) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import importlib

    import torch

    torch.set_num_threads(1)
    command = importlib.import_module(name)
    os.chdir(cwd)
    if event == PLENTY:
        os.statvfs = lambda path: SimpleNamespace(f_bavail=2**30, f_frsize=4096)
    elif event:
        at_event(*event)
    command.main(argv)


def at_event(part: str, number: int, what) -> None:
    """Python reports opening, renaming, removing, making folders before it does them."""
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if event.split(".")[0] in ("open", "os", "shutil") and args and part in str(args[0]):
            seen += 1
            if seen != number:
                return
            if what == "cap":
                size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (size + 2**20, resource.RLIM_INFINITY))
            else:
                os.kill(os.getpid(), what)

    sys.addaudithook(hook)

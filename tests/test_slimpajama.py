"""The paper's data set, fetched by examples/slimpajama.py."""

import sys
from unittest.mock import Mock

import slimpajama
from smollm2 import ROOT

from model import load_tokenizer
from support.data.sources import load_tokens

TINY = str(ROOT / "assets" / "tiny")


def test_the_papers_data_is_written_as_train_py_reads_it(tmp_path, monkeypatch):
    """Stand-ins for the two packages that need a network; the text must survive the way."""
    datasets, transformers = Mock(), Mock()
    rows, llama2 = datasets.load_dataset, transformers.AutoTokenizer.from_pretrained
    rows.return_value.take = lambda n: [{"input_ids": [i, i + 1]} for i in range(n)]
    llama2.return_value.decode = lambda ids: f"Row {ids}. " * 20
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    slimpajama.main([TINY, "--out", str(tmp_path / "data"), "--samples", "3"])
    llama2.assert_called_once_with("meta-llama/Llama-2-7b-hf")
    name = "yaofu/slimpajama-per-source-length-upsample"
    rows.assert_called_once_with(name, split="train", streaming=True)
    tokens = load_tokens([str(tmp_path / "data")], load_tokenizer(TINY))
    assert len(tokens.documents) == 3
    assert load_tokenizer(TINY).decode(tokens.parts[0].tolist()) == "Row [0, 1]. " * 20

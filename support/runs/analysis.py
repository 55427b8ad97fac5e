"""What the analysis found, as a file of the run: impactful.json, for people, `python recipe.py` and
--impactful FILE of a later run. It holds token id -> [text, mean shift in logits, or nats] of the
impactful types, largest first."""

import json
from pathlib import Path

import torch
from torch import Tensor

from support.huggingface.config import read_json
from support.system.bad_input import BadInput
from support.system.console import log
from support.system.whole_files import write_atomically

IMPACTFUL = "impactful.json"


def write_analysis(
    folder: Path, tokenizer, per_type_sum: Tensor, count: Tensor, impactful: Tensor
) -> None:
    """per_type_sum (V,) fp64, count (V,) int64: of recipe.logit_shift; impactful: bool (V,)."""
    mean = (per_type_sum / count.clamp(min=1)).masked_fill(~impactful, -torch.inf)
    ranked = mean.argsort(descending=True)[: int(impactful.sum())].tolist()
    rows = {v: [tokenizer.decode([v]), round(float(mean[v]), 4)] for v in ranked}
    text = json.dumps(rows, ensure_ascii=False, indent=0)
    write_atomically(folder / IMPACTFUL, text + "\n")
    first = " ".join(repr(tokenizer.decode([v])) for v in ranked[:12])
    seen = int((count > 0).sum())
    log(f"analysis: {len(ranked):,} impactful types of {seen:,} seen, first: {first}")


def read_impactful(path: str | Path | None, tokenizer, vocab_size: int) -> Tensor | None:
    """The impactful types of an earlier analysis, bool (V,); None where no file is given. BadInput
    if it holds something else, or types of another tokenizer."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise BadInput(f"--impactful {path} does not exist (an {IMPACTFUL} of a run)")
    rows = read_json(Path(path))
    if not all(name.isdecimal() and len(name) < 10 for name in rows):
        raise BadInput(f"{path} is not an {IMPACTFUL} of a run (--impactful)")
    types = torch.tensor([int(name) for name in rows])
    if len(types) == 0 or types.min() < 0 or types.max() >= vocab_size:
        raise BadInput(f"{path} names no token types of this vocabulary (--impactful)")
    for name, row in rows.items():
        own = tokenizer.decode([int(name)])
        if isinstance(row, list) and len(row) == 2 and row[0] != own:  # as write_analysis has it
            there = f"type {name} is {row[0]!r} there and {own!r} here"
            raise BadInput(f"{path} is of another tokenizer: {there} (--impactful)")
    return torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, types, True)

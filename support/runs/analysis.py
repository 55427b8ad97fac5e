"""What the analysis found, as files of the run: for people and `python recipe.py` impactful.json,
for --weigh shifts.json; --impactful FILE reads them in a later run.

    impactful.json   token id -> [text, mean shift in logits, or nats] of the impactful types,
                     largest first
    shifts.json      log_softmax; types: token id -> [sum of shifts, times counted], all that were
                     seen
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from support.huggingface.config import read_json
from support.system.bad_input import BadInput
from support.system.console import log
from support.system.whole_files import write_atomically

IMPACTFUL, SHIFTS = "impactful.json", "shifts.json"


def write_analysis(
    folder: Path, tokenizer, per_type_sum: Tensor, count: Tensor, impactful: Tensor, settings
) -> None:
    """per_type_sum (V,) fp64, count (V,) int64: of recipe.logit_shift; impactful: bool (V,)."""
    seen = count.nonzero()[:, 0].tolist()
    shifts = {v: [float(per_type_sum[v]), int(count[v])] for v in seen}
    found = {"log_softmax": settings.log_softmax, "types": shifts}
    write_atomically(folder / SHIFTS, json.dumps(found) + "\n")
    mean = (per_type_sum / count.clamp(min=1)).masked_fill(~impactful, -torch.inf)
    ranked = mean.argsort(descending=True)[: int(impactful.sum())].tolist()
    rows = {v: [tokenizer.decode([v]), round(float(mean[v]), 4)] for v in ranked}
    text = json.dumps(rows, ensure_ascii=False, indent=0)
    write_atomically(folder / IMPACTFUL, text + "\n")
    first = " ".join(repr(tokenizer.decode([v])) for v in ranked[:12])
    log(f"analysis: {len(ranked):,} impactful types of {len(seen):,} seen, first: {first}")


def token_ids(table: dict, vocab_size: int, path: Path, flag: str) -> Tensor:
    """The keys of a table, int64. BadInput if they are not token ids of the vocabulary."""
    if not all(name.isdecimal() and len(name) < 10 for name in table):
        raise BadInput(f"{path} is not an {IMPACTFUL} of a run ({flag})")
    types = torch.tensor([int(name) for name in table])
    if len(types) == 0 or types.min() < 0 or types.max() >= vocab_size:
        raise BadInput(f"{path} names no token types of this vocabulary ({flag})")
    return types


def read_impactful(path: str | Path, vocab_size: int) -> Tensor:
    """The impactful types of an earlier analysis, bool (V,)."""
    if not Path(path).is_file():
        raise BadInput(f"--impactful {path} does not exist (an {IMPACTFUL} of a run)")
    types = token_ids(read_json(Path(path)), vocab_size, Path(path), "--impactful")
    return torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, types, True)


def read_shifts(impactful: str | Path, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The shifts beside an impactful.json, for --weigh: (per_type_sum (V,) fp64, count (V,) int64),
    as recipe.logit_shift gives them."""
    path = Path(impactful).with_name(SHIFTS)
    if not path.is_file():
        raise BadInput(
            f"--weigh needs {path}, which train.py writes beside {IMPACTFUL}; without --impactful"
            " the run makes its own analysis"
        )
    found = read_json(path)
    if found.get("log_softmax") is not True:
        raise BadInput(f"{path} is not of an analysis with --log_softmax, which --weigh needs")
    table = found.get("types")
    if not isinstance(table, dict) or not all(map(is_shift, table.values())):
        raise BadInput(f"{path} is not a {SHIFTS} of a run (--weigh)")
    types = token_ids(table, vocab_size, path, "--weigh")
    sums, counts = zip(*table.values(), strict=True)
    per_type_sum = torch.zeros(vocab_size, dtype=torch.float64)
    per_type_sum[types] = torch.tensor(sums, dtype=torch.float64)
    count = torch.zeros(vocab_size, dtype=torch.int64)
    count[types] = torch.tensor(counts)
    return per_type_sum, count


def read_types(
    settings, vocab_size: int, loss_weights: Callable[..., Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Of an earlier analysis (--impactful FILE): its impactful types, bool (V,), and for --weigh
    what recipe.loss_weights makes of its shifts, fp32 (V,). None for what is not asked for."""
    if not settings.impactful:
        return None, None
    impactful = read_impactful(settings.impactful, vocab_size)
    if not settings.weigh:
        return impactful, None
    shifts = read_shifts(settings.impactful, vocab_size)
    return impactful, loss_weights(*shifts, settings.min_count)


def is_shift(row) -> bool:
    """[a finite sum, a number of times]"""
    return (
        isinstance(row, list)
        and [type(x) for x in row] == [float, int]
        and math.isfinite(row[0])
        and 0 < row[1] < 2**62
    )

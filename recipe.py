"""LongRecipe (Hu et al., ACL 2025, arXiv 2409.00509) in plain torch, in the paper's order.

    1. token analysis   which token TYPES gain most from a longer context             (paper 4.1)
    2. segments         cut a text into sentences, decided on decoded text            (algorithm 1)
    3. selection        keep those with the largest share of such tokens, in order    (paper 4.1)
    4. positions        spread the sample's position ids over the whole target window (paper 4.2)
    5. sample           chapters 2 to 4 in one go; its length; its targets
    6. rope_theta       slower rotation for a longer window                           (NTK, paper 5)
    7. merge            average the tuned weights with the original ones              (paper 4.3)

    python recipe.py                        # explains one sample, in words and as a figure
    python recipe.py --positions where.png  # draws where each method puts the tokens of a sample

Everything here works on one sample of token ids (T,); nothing trains or needs a GPU. Copied beside
model.py it works without support/, except `split_segments`, `make_example`, `merge`, the command
and the other methods. examples/longrecipe.ipynb extends a model with these functions.

Does NOT do: content jumps of the published PoSE (all methods get the same tokens), parts of speech
(the paper groups impactful types by them), RoPE types other than `default`. Glossary: see model.py.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import model as model_py
from model import BadInput, Llama, support

try:
    from support.data.other_methods import OTHERS  # pose, endprompt, cream, rpes
except ModuleNotFoundError:  # copied without support/
    OTHERS = {}


# ---- 1. Token analysis (paper 4.1) -------------------------------------------------------------


@torch.no_grad()
def logit_shift(
    base: Llama,
    extended: Llama,
    ids: Tensor,
    position_ids: Tensor | None = None,
    *,
    first_position: int = 0,
    log_softmax: bool = False,
    chunk_tokens: int = 512,
) -> tuple[Tensor, Tensor, Tensor]:
    """By how much does the extended model raise the logit of each actual next token? (eq. 2 and 3)

    base: the original model H; extended: H'. ids, position_ids (T,) int64 -> delta (T,) fp32 in
    logits, per_type_sum (V,) fp64, count (V,) int64. delta[0] = 0: nothing predicts the first
    token. It is not counted, nor are tokens at positions below first_position (inside the old
    window there is nothing to gain). Raw logits as in the paper carry an arbitrary offset per
    position; log_softmax=True takes it out (the shift in log-probability, in nats).
    Raises ValueError if ids are empty or position_ids have another length."""
    V = base.config.vocab_size
    positions = torch.arange(len(ids)) if position_ids is None else position_ids
    if len(ids) == 0 or len(positions) != len(ids):
        raise ValueError(f"{len(ids)} token ids need as many position ids (not {len(positions)})")
    delta = torch.zeros(len(ids))
    for sign, model in ((1.0, extended), (-1.0, base)):
        head = model.lm_head.weight
        hidden = model.hidden(ids[None].to(head.device), positions[None].to(head.device))[0]
        for i in range(0, len(ids) - 1, chunk_tokens):
            h, y = hidden[:-1][i : i + chunk_tokens], ids[1:][i : i + chunk_tokens].to(head.device)
            # Only the logit of the token that came is needed: a dot product, no (T, V) matrix.
            score = (h.float() * head[y].float()).sum(-1)
            if log_softmax:
                score = score - (h @ head.T).float().logsumexp(-1)
            # [E2] delta_t = S_H'(x_t | x_<t) - S_H(x_t | x_<t)     S: logits of the models H, H'
            delta[i + 1 : i + 1 + len(y)] += sign * score.float().cpu()
    counted = positions >= first_position
    counted[0] = False
    # [E3] Delta(v) = sum over the t with x_t = v of delta_t     (signed)
    per_type_sum = torch.zeros(V, dtype=torch.float64)
    per_type_sum.index_add_(0, ids[counted], delta[counted].double())
    return delta, per_type_sum, torch.bincount(ids[counted], minlength=V)


def impactful_types(
    per_type_sum: Tensor, count: Tensor, top: float = 0.2, min_count: int = 1
) -> Tensor:
    """Token types with the largest mean shift that make up `top` of all occurrences, bool (V,).

    per_type_sum, count (V,): those of `logit_shift`, added up over samples. The sums themselves
    would favour frequent types, and a type never seen would have 0, more than every negative one.
    The mean of a type seen once or twice is mostly noise: types seen less than min_count times are
    left out (default 1: none, as in the paper). Raises BadInput if top is outside (0, 1] or no
    type is left.

    >>> shift, count = torch.tensor([9.0, 2.0, -4.0, 0.0]), torch.tensor([9, 1, 10, 0])
    >>> impactful_types(shift, count, top=0.2).tolist()
    [True, True, False, False]
    """
    if not 0 < top <= 1:
        raise BadInput(f"top must be in (0, 1], got {top}")
    if int(count.sum()) == 0:
        raise BadInput("no token was counted: the analysis saw nothing past the old window")
    often = count >= max(1, min_count)
    if not often.any():
        most = f"the most frequent one {int(count.max())} times"
        raise BadInput(
            f"no token type was seen {min_count} times in the analysis, {most}: a lower --min_count"
        )
    mean = torch.where(often, per_type_sum / count.clamp(min=1), -torch.inf)
    order = mean.argsort(descending=True, stable=True)
    # [E4] take types v by Delta(v) / count(v), largest first, while sum of count < top * total;
    #      none with count(v) < min_count
    covered_before = count[order].cumsum(0) - count[order]
    chosen = (covered_before < top * count.sum()) & often[order]
    return torch.zeros(len(count), dtype=torch.bool).index_fill_(0, order[chosen], True)


# ---- 2. Segments (paper algorithm 1) -----------------------------------------------------------


def split_segments(ids: Tensor, tokenizer, at_spaces: bool | None = None) -> Tensor:
    """Where sentences begin: ids (T,) -> starts (N,) int64, increasing, starts[0] = 0.

    A segment ends after a newline; after . ! ? … if white space follows; and after the stops of
    other scripts always (support/data/segments.py has the tables). Further stops and closing quotes
    or brackets belong to it. Decided on the DECODED text, so 3.14 and os.path stay whole with any
    tokenizer (the released code lists token ids of Llama 3 and misses ".\\n\\n"). A token in which
    a sentence ends belongs to the earlier segment. at_spaces: whether to split at spaces as well,
    for a text with hardly any end (Thai, say); None: decide by these ids. Raises ValueError if ids
    are empty."""
    return support("data.segments").split_segments(ids, tokenizer, at_spaces)


def join_short_segments(starts: Tensor, total_tokens: int, min_tokens: int = 1) -> Tensor:
    """Starts (N,) of segments -> those of fewer segments, each of at least min_tokens tokens.

    A short segment is joined with those that follow it until they are long enough together; a
    short rest at the end, with the segment before it. This keeps more context in source code and
    tables, where each line is a segment. min_tokens = 1, as in the paper, joins none.

    >>> join_short_segments(torch.tensor([0, 2, 3, 9, 11]), 12, min_tokens=3).tolist()
    [0, 3, 9]
    """
    kept = [0]
    for start in starts[1:].tolist():
        # [E29] a start stays if n tokens or more lie between it and the start kept before it, and
        #       between it and the end of the text;   n = min_tokens
        if start - kept[-1] >= min_tokens and total_tokens - start >= min_tokens:
            kept.append(start)
    return torch.tensor(kept)


# ---- 3. Selection (paper 4.1) ------------------------------------------------------------------

STRATEGIES = (  # --select: which segments of a text are taken first
    "impact",  # those with the largest share of impactful tokens
    "digits",  # those that hold a token with a digit, as in the released code
    "random",
    "first",  # the beginning of the text
)


def segment_lengths(starts: Tensor, total_tokens: int) -> Tensor:
    """Tokens of each segment, (N,) int64. Raises ValueError unless starts (N,) increase from 0 and
    stay below total_tokens."""
    size = torch.diff(starts, append=torch.tensor([total_tokens]))
    if len(starts) == 0 or starts[0] != 0 or (size <= 0).any():
        raise ValueError(f"segment starts must increase from 0 and stay below {total_tokens}")
    return size


def impactful_share(ids: Tensor, starts: Tensor, impactful: Tensor) -> Tensor:
    """Share of impactful tokens of each segment, (N,) fp64. The paper drops segments with none."""
    size = segment_lengths(starts, len(ids))
    hits = torch.cat((torch.zeros(1, dtype=torch.int64), impactful[ids].long().cumsum(0)))
    return (hits[starts + size] - hits[starts]).double() / size  # [E13] (impactful in s) / |s|


def select_segments(
    ids: Tensor,
    starts: Tensor,
    train_len: int,
    strategy: str,
    generator: torch.Generator,
    impactful: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take whole segments until they hold train_len tokens, keep their order, cut the end to fit.

    ids (T,), starts (N,) -> kept (train_len,) increasing indices into ids, and the starts (M,) of
    the kept segments within `kept`, so that positions and selection use the same segments (the
    released code makes its positions from the unfiltered text). strategy: one of STRATEGIES; ties
    fall at random. impactful, bool (V,): the types that the analysis found; for digits, those with
    a digit. Raises BadInput if ids are too short or the strategy is unknown; ValueError if starts
    are not those of ids, or impactful is missing where it is needed.

    >>> ids, impactful = torch.tensor([0, 0, 1, 0, 1, 1]), torch.tensor([False, True])
    >>> starts = torch.tensor([0, 2, 3])  # shares of impactful tokens: 0, 1 and 2/3
    >>> kept, starts = select_segments(ids, starts, 3, "impact", torch.Generator(), impactful)
    >>> kept.tolist(), starts.tolist()  # the second segment, and the third cut to fit
    ([2, 3, 4], [0, 1])
    """
    if strategy not in STRATEGIES:
        raise BadInput(f"unknown selection {strategy!r}: {', '.join(STRATEGIES)} (--select)")
    if train_len < 1:
        raise BadInput(f"a sample of --train_len {train_len} must have at least one token")
    if len(ids) < train_len:
        raise BadInput(f"{len(ids)} tokens are shorter than a sample of --train_len {train_len}")
    if strategy in ("impact", "digits") and impactful is None:
        raise ValueError(f"selection {strategy!r} needs `impactful`, a bool table of token types")
    N, size = len(starts), segment_lengths(starts, len(ids))
    order = torch.arange(N) if strategy == "first" else torch.randperm(N, generator=generator)
    if strategy in ("impact", "digits"):
        # The paper drops segments without an impactful token and takes "a fixed number of tokens"
        # of the rest. If more qualify than fit, those with the largest share win; if too few do,
        # others fill the sample ("fill" in the output of `python recipe.py`).
        share = impactful_share(ids, starts, impactful)
        rank = (share > 0).double() if strategy == "digits" else share
        order = order[rank[order].argsort(descending=True, stable=True)]
    taken_before = size[order].cumsum(0) - size[order]
    chosen = order[taken_before < train_len].sort().values  # enough of the best, in text order
    starts, size = starts[chosen], size[chosen]
    new_starts = size.cumsum(0) - size
    # index in the text = index in the sample + how far the segment has moved
    kept = torch.arange(int(size.sum())) + (starts - new_starts).repeat_interleave(size)
    return kept[:train_len], new_starts[new_starts < train_len]


# ---- 4. Position index transformation (paper 4.2, algorithm 1) ---------------------------------
# A function for each method: sample length L, target T (T* in equations), starts (N,) of the
# sample's segments, generator -> position ids (L,). A new method takes a function here and a row of
# METHODS. The methods that LongRecipe is compared with are in support/data/other_methods.py.


class TooFewSegments(BadInput):
    """With one segment there is no border at which positions could jump. train.sample then draws
    another text."""


def spread_segments(L: int, T: int, starts: Tensor | None, generator) -> Tensor:
    """longrecipe, algorithm 1: the T* - L skipped positions are split uniformly at random over the
    borders between segments and the end of the sample; inside a segment positions step by 1."""
    if starts is None or len(starts) < 2:
        raise TooFewSegments("longrecipe needs at least two segments in a sample (--train_len)")
    N, size = len(starts), segment_lengths(starts, L)
    # [E6] Segments i = 0..N-1 go in order into the slots 0..T*-L+N-1: segment 0 into slot 0, the
    #      others into distinct random slots. Each empty slot is one skipped position, so that
    #          pos(s_i) = start(s_i) + slot_i - i
    #      L = 5, T* = 8, segments of 2 and 3 tokens: slots 0..4. With segment 1 in slot 3, two
    #      positions are skipped before it and one after it: 0 1 4 5 6.
    #      (The paper's equation 6 adds one too many at each border; its algorithm 1 does not.)
    slots = 1 + torch.randperm(T - L + N - 1, generator=generator)[: N - 1].sort().values
    skipped = torch.cat((torch.zeros(1, dtype=torch.int64), slots)) - torch.arange(N)
    return torch.arange(L) + skipped.repeat_interleave(size)


def plain_positions(L: int, T: int, starts: Tensor | None, generator) -> Tensor:
    return torch.arange(L)


# --method: what the figures call it, and its function
METHODS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "none": ("plain positions", plain_positions),
    **OTHERS,
    "longrecipe": ("jumps between sentences", spread_segments),
    "full": ("the full length", plain_positions),
}


def sample_position_ids(
    method: str,
    train_len: int,
    target_len: int,
    starts: Tensor | None = None,
    generator: torch.Generator | None = None,
    prefix: bool = False,
) -> Tensor:
    """Position ids (train_len,) int64 of one sample: strictly increasing, 0 <= p < target_len.

    Each call draws them afresh. method: one of METHODS; full is none, but insists on train_len ==
    target_len. starts (N,): where the sample's segments begin. prefix=True (longrecipe only) keeps
    the first r positions contiguous, as the released code does. Raises BadInput for an unknown
    method and for a sample that does not fit; with longrecipe, TooFewSegments for one segment and
    ValueError for starts that are not those of a sample of train_len tokens."""
    L, T = train_len, target_len
    if not 1 <= L <= T:
        raise BadInput(f"--train_len {L} tokens do not fit into --target_len {T}")
    if method not in METHODS:
        raise BadInput(f"unknown method {method!r}, choose from {', '.join(METHODS)} (--method)")
    if prefix and method != "longrecipe":
        raise BadInput(f"a contiguous prefix belongs to method longrecipe, not to {method!r}")
    if method == "full" and L != T:
        raise BadInput(f"method full needs --train_len {L} to equal --target_len {T}")
    _, draw = METHODS[method]
    positions = draw(L, T, starts, generator)
    if prefix:
        # [E14] pos(i) = i for i < r;   r ~ U{1..(L+1)//2}   (released code, not the paper)
        r = int(torch.randint(1, (L + 1) // 2 + 1, (1,), generator=generator))
        positions[:r] = torch.arange(r)
    return positions


# ---- 5. One training sample --------------------------------------------------------------------


def make_example(
    ids: Tensor,
    tokenizer,
    train_len: int,
    target_len: int,
    *,
    method: str,
    select: str,
    impactful: Tensor | None = None,
    prefix: bool = False,
    generator: torch.Generator,
    two_segments: bool = False,
    at_spaces: bool | None = None,
    min_segment_tokens: int = 1,
) -> tuple[Tensor, Tensor]:
    """One training sample of a long text (T,) -> (input_ids, position_ids), each (train_len,).

    Segments, selection and positions in one go; of a text longer than target_len, a random window.
    at_spaces: see split_segments; min_segment_tokens: see join_short_segments. two_segments=True
    refuses a sample of one segment for every method, so that all of them use the same texts.
    Raises BadInput if the text is shorter than train_len; TooFewSegments."""
    if len(ids) > target_len:
        begin = int(torch.randint(len(ids) - target_len + 1, (1,), generator=generator))
        ids = ids[begin : begin + target_len]
    starts = split_segments(ids, tokenizer, at_spaces)
    starts = join_short_segments(starts, len(ids), min_segment_tokens)
    if select == "digits":
        impactful = support("data.segments").digit_types(tokenizer)
    kept, starts = select_segments(ids, starts, train_len, select, generator, impactful)
    if two_segments and len(starts) < 2:
        raise TooFewSegments("a sample needs at least two segments (--train_len)")
    positions = sample_position_ids(method, train_len, target_len, starts, generator, prefix)
    return ids[kept], positions


def next_token_targets(input_ids: Tensor) -> Tensor:
    """(B, T) -> (B, T): for each token the one that follows; the last has none (-100, ignored).

    >>> next_token_targets(torch.tensor([[5, 6, 7]])).tolist()
    [[6, 7, -100]]
    """
    return torch.cat((input_ids[:, 1:], torch.full_like(input_ids[:, :1], -100)), dim=1)


def train_length(target_len: int) -> int:
    """Tokens of a sample: 30 % of the target as in the paper, rounded up to a multiple of 128,
    which suits GPU kernels. Raises BadInput if there is no target.

    >>> train_length(131072)
    39424
    """
    if target_len < 1:
        raise BadInput(f"--target_len {target_len} must have at least one token")
    return min(target_len, -(-target_len * 3 // 1280) * 128)  # [E16] 128 * ceil(0.3 T* / 128)


# ---- 6. rope_theta (paper 5; NTK-aware scaling) ------------------------------------------------


def ntk_rope_base(
    theta: float, head_dim: int, old_len: int, new_len: int, factor: float | None = None
) -> float:
    """rope_theta for a window of new_len tokens; factor defaults to new_len / old_len.

    Raises BadInput if the window does not grow or a head has only one pair of dimensions.

    >>> round(ntk_rope_base(5e5, 128, 8192, 131072) / 1e6, 1)  # Llama 3 in the paper's table 4
    131.5
    """
    if head_dim <= 2:
        raise BadInput(f"head_dim {head_dim} has a single frequency, which no theta changes")
    if new_len <= old_len:
        raise BadInput(f"the new window {new_len} must be longer than the old one {old_len}")
    f = new_len / old_len if factor is None else factor
    # [E8] theta' = theta * (f * T* / L0 - (f - 1)) ^ (d / (d - 2))
    return theta * (f * new_len / old_len - (f - 1)) ** (head_dim / (head_dim - 2))


# ---- 7. Merge (paper 4.3) ----------------------------------------------------------------------


def average(original: Tensor, tuned: Tensor, weight: float) -> Tensor:
    """One tensor of the merged model: computed in fp32, returned in the dtype of the tuned one.
    Raises BadInput if weight is outside 0..1."""
    if not 0 <= weight <= 1:
        raise BadInput(f"merge weight {weight} must be between 0 and 1 (--merge_weight)")
    # [E10] merged = (1 - w) * original + w * tuned     w: --merge_weight; each tensor by itself
    return ((1 - weight) * original.float() + weight * tuned.float()).to(tuned.dtype)


def merge_weights(
    original: dict[str, Tensor], tuned: dict[str, Tensor], weight: float = 0.5
) -> dict[str, Tensor]:
    """State dict with weight * tuned + (1 - weight) * original, for models in memory. Raises
    BadInput if names or shapes differ."""
    shapes = [{name: x.shape for name, x in weights.items()} for weights in (original, tuned)]
    if odd := sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()}):
        raise BadInput(f"cannot merge: {odd[0]} is not in both models, or has another shape")
    return {name: average(original[name], tuned[name], weight) for name in tuned}


def merge(
    original_dir: str | Path, tuned_dir: str | Path, out_dir: str | Path, weight: float = 0.5
) -> None:
    """Write out_dir with weight * tuned + (1 - weight) * original, tensor by tensor.

    The config (RoPE, window) and the dtype are the tuned model's. Raises BadInput if the two
    differ in shape or vocabulary, or weight is outside 0..1."""
    merge_folders = support("huggingface.folders").merge
    merge_folders(original_dir, tuned_dir, out_dir, lambda a, b: average(a, b, weight))


# ---- `python recipe.py` ------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    # support/ imports none of the four files: these two are handed to it
    support("explain.command").run(argv, model_py, sys.modules[__name__])


if __name__ == "__main__":
    main()

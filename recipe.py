"""LongRecipe (Hu et al., ACL 2025, arXiv 2409.00509) in plain torch, in the paper's order.

    1. token analysis   which token TYPES gain most from a longer context             (paper 4.1)
    2. segments         cut a text into sentences, decided on decoded text            (algorithm 1)
    3. selection        keep those with the largest share of such tokens, in order    (paper 4.1)
    4. positions        spread the sample's position ids over the whole target window (paper 4.2)
    5. RoPE base        slower rotation for a longer window                           (NTK, paper 5)
    6. merge            average the tuned weights with the original ones              (paper 4.3)

    python recipe.py                  # explains one sample, in words and as a figure

Everything here works on one sample of token ids (T,); nothing trains, nothing needs a GPU. Does NOT
do: content jumps of the published PoSE (all methods get the same tokens), parts of speech (the
paper groups impactful types by them), RoPE types other than `default`. Glossary: see model.py.
"""

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import BadInput, Llama, inverse_frequencies, load_tokenizer
from support.data.text import Corpus, load_reference, load_tokens
from support.data.toy import TINY
from support.explain import distances as coverage
from support.explain import figure as explain_figure
from support.explain import words
from support.huggingface import checkpoint as checkpoint_files
from support.huggingface import folders
from support.huggingface.hub import SMALL, local_folder
from support.runs.flags import Parser, read_impactful
from support.system.console import check_ranges, report_errors

METHODS = ("longrecipe", "pose", "rpes", "full", "none")  # of drawing positions, 4
STRATEGIES = ("impact", "digits", "random", "first")


class TooFewSegments(BadInput):
    """A sample of one segment has no gap to put positions into; another text will do."""


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
    """How much more does the extended model expect each token that really comes? (eq. 2 and 3)

    ids, position_ids (T,) int64 -> delta (T,) fp32 in logits, per_type_sum (V,) fp64, count (V,)
    int64. delta[0] = 0: nothing predicts the first token. It is not counted, nor are tokens at
    positions below first_position (inside the old window there is nothing to gain). Raw logits as
    in the paper carry an arbitrary offset per position; log_softmax=True takes it out (the shift
    in log-probability, in nats)."""
    V = base.config.vocab_size
    positions = torch.arange(len(ids)) if position_ids is None else position_ids
    delta = torch.zeros(len(ids))
    for sign, model in ((1.0, extended), (-1.0, base)):
        head = model.lm_head.weight
        hidden = model.hidden(ids[None].to(head.device), positions[None].to(head.device))[0]
        for i in range(0, len(ids) - 1, chunk_tokens):
            h, y = hidden[:-1][i : i + chunk_tokens], ids[1:][i : i + chunk_tokens].to(head.device)
            # The logit of the realised token alone is one dot product, no (T, V) matrix is needed.
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


def impactful_types(per_type_sum: Tensor, count: Tensor, top: float = 0.2) -> Tensor:
    """Token types with the largest mean shift that cover `top` of all occurrences, bool (V,).

    Why not the sums themselves: they favour frequent types, and types never seen would sit at 0,
    above every negative one.

    >>> shift, count = torch.tensor([9.0, 2.0, -4.0, 0.0]), torch.tensor([9, 1, 10, 0])
    >>> impactful_types(shift, count, top=0.2).tolist()
    [True, True, False, False]
    """
    if not 0 < top <= 1:
        raise BadInput(f"top must be in (0, 1], got {top}")
    if int(count.sum()) == 0:
        raise BadInput("no token was counted: the analysis saw nothing past the old window")
    mean = torch.where(count > 0, per_type_sum / count.clamp(min=1), -torch.inf)
    order = mean.argsort(descending=True, stable=True)
    # [E4] take types v by Delta(v) / count(v), largest first, while sum of count < top * total
    covered_before = count[order].cumsum(0) - count[order]
    chosen = (covered_before < top * count.sum()) & (count[order] > 0)
    return torch.zeros(len(count), dtype=torch.bool).index_fill_(0, order[chosen], True)


# ---- 2. Segments (paper algorithm 1) -----------------------------------------------------------

STOPS = ".!?"
WIDE_STOPS = "。！？"
CLOSERS = "\"')]}”’»」』）】》"
SPACES = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


@functools.lru_cache(maxsize=4)
def _vocabulary_bytes(tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """All tokens' bytes in one array, and where each token begins in it: made once."""
    table = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    begin = np.cumsum([0] + [len(t) for t in table])
    return np.frombuffer(b"".join(table), dtype=np.uint8), begin


def split_segments(ids: Tensor, tokenizer) -> Tensor:
    """Where sentences begin: ids (T,) -> starts (N,) int64, increasing, starts[0] = 0.

    A segment ends after a newline; after . ! ? and any closing quotes or brackets if white space
    follows; and after 。 ！ ？ (closers included) always. Decided on the DECODED text, so 3.14 and
    os.path stay whole with any tokenizer (the released code lists token ids of Llama 3 and misses
    ".\\n\\n"). A token that holds an end in its middle belongs to the segment before."""
    if len(ids) == 0:
        raise BadInput("cannot split an empty sample into segments")
    flat, begin = _vocabulary_bytes(tokenizer)
    token = ids.numpy()
    size = begin[token + 1] - begin[token]  # bytes of each token
    token_begin = np.cumsum(size) - size  # byte offset of each token in this text
    raw = flat[np.repeat(begin[token] - token_begin, size) + np.arange(size.sum())]
    # subtle: bytes that are no UTF-8 (a sample may begin inside a character) become one code
    # point each, so that code points can still be mapped back to bytes.
    text = raw.tobytes().decode("utf-8", errors="surrogateescape")
    char = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
    escaped = (char >= 0xDC80) & (char <= 0xDCFF)
    width = np.where(escaped, 1, 1 + (char >= 0x80) + (char >= 0x800) + (char >= 0x10000))

    def one_of(characters: str) -> np.ndarray:
        return np.isin(char, [ord(c) for c in characters])

    closer, index = one_of(CLOSERS), np.arange(len(char))
    # the last character up to each one that is no closer
    before_closers = np.maximum.accumulate(np.where(closer, 0, index))
    space_next = np.append(one_of(SPACES)[1:], False)
    closer_next = np.append(closer[1:], False)
    # [E5] seg(S): disjoint runs whose union is S, in order; an end is after character i where
    ends = (char == ord("\n")) | (one_of(STOPS)[before_closers] & space_next)
    ends |= one_of(WIDE_STOPS)[before_closers] & ~closer_next
    end_byte = np.cumsum(width)[ends]
    starts = np.unique(np.append(0, np.searchsorted(token_begin, end_byte)))
    return torch.from_numpy(starts[starts < len(token)])


# ---- 3. Selection (paper 4.1) ------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def digit_types(tokenizer) -> Tensor:
    """Token types that hold a digit, bool (V,): what the released code selects by."""
    return torch.tensor(
        [any(48 <= b <= 57 for b in tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    )


def segment_lengths(starts: Tensor, total_tokens: int) -> Tensor:
    return torch.diff(starts, append=torch.tensor([total_tokens]))


def impactful_share(ids: Tensor, starts: Tensor, impactful: Tensor) -> Tensor:
    """Share of impactful tokens of each segment, (N,) fp64. The paper's rule drops those at 0."""
    hits = torch.cat((torch.zeros(1, dtype=torch.int64), impactful[ids].long().cumsum(0)))
    size = segment_lengths(starts, len(ids))
    return (hits[starts + size] - hits[starts]).double() / size  # [E13] (impactful in s) / |s|


def select_segments(
    ids: Tensor,
    starts: Tensor,
    train_len: int,
    strategy: str,
    generator: torch.Generator,
    impactful: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose whole segments until they hold train_len tokens, keep their order, cut the end to fit.

    ids (T,), starts (N,) -> kept (train_len,) increasing indices into ids, and the starts (M,) of
    the kept segments within `kept`: positions and selection speak of the same segments (the
    released code makes its positions from the unfiltered text). Strategies: impact: by the share
    of impactful tokens; digits: those that hold a token of `impactful` (make_example passes
    digit_types) before the others; random; first. Ties fall at random. ValueError if ids are too
    short, or impactful is missing where it is needed."""
    if strategy not in STRATEGIES:
        raise BadInput(f"unknown selection {strategy!r}: {', '.join(STRATEGIES)} (--select)")
    if len(ids) < train_len:
        raise BadInput(f"{len(ids)} tokens are shorter than a sample of --train_len {train_len}")
    if strategy in ("impact", "digits") and impactful is None:
        raise BadInput(f"selection {strategy!r} needs `impactful`, a bool table of token types")
    N = len(starts)
    order = torch.arange(N) if strategy == "first" else torch.randperm(N, generator=generator)
    if strategy in ("impact", "digits"):
        # The paper drops segments without an impactful token, then takes "a fixed number of
        # tokens". Where that drops too little the share decides; where too much, share 0 fills.
        rank = impactful_share(ids, starts, impactful)
        rank = (rank > 0).double() if strategy == "digits" else rank
        order = order[rank[order].argsort(descending=True, stable=True)]
    size = segment_lengths(starts, len(ids))
    taken_before = size[order].cumsum(0) - size[order]
    chosen = order[taken_before < train_len].sort().values  # enough of the best, in text order
    starts, size = starts[chosen], size[chosen]
    new_starts = size.cumsum(0) - size
    kept = torch.arange(int(size.sum())) + (starts - new_starts).repeat_interleave(size)
    return kept[:train_len], new_starts[new_starts < train_len]


# ---- 4. Position index transformation (paper 4.2, algorithm 1) ---------------------------------


def spread_segments(starts: Tensor | None, L: int, T: int, generator) -> Tensor:
    """Algorithm 1: position ids (L,) below T that jump only at the segment starts (N,)."""
    if starts is None or len(starts) < 2:
        raise TooFewSegments("longrecipe needs at least two segments in a sample (--train_len)")
    if starts[0] != 0 or starts[-1] >= L or (starts.diff() <= 0).any():
        raise BadInput(f"segment starts must increase from 0 and stay below the length {L}")
    N = len(starts)
    # [E6] T* - L + N slots: segment 1 in slot 0, the other N - 1 in distinct random slots, in
    #      order; each empty slot is one skipped position:   pos(s_i) = start(s_i) + slot_i - i
    #      (the paper's equation 6 adds one too many at each border; its algorithm 1 does not)
    slots = 1 + torch.randperm(T - L + N - 1, generator=generator)[: N - 1].sort().values
    skipped = torch.cat((torch.zeros(1, dtype=torch.int64), slots)) - torch.arange(N)
    return torch.arange(L) + skipped.repeat_interleave(segment_lengths(starts, L))


def sample_position_ids(
    method: str,
    train_len: int,
    target_len: int,
    starts: Tensor | None = None,
    generator: torch.Generator | None = None,
    prefix: bool = False,
) -> Tensor:
    """Position ids (train_len,) int64 of one sample: strictly increasing, 0 <= p < target_len.

    longrecipe: jumps only at segment starts, the total skip split uniformly over all gaps
                (algorithm 1); prefix=True keeps the first r ~ U{1..(L+1)//2} positions
                contiguous, as the released code does
    pose:       one jump of U{0..T*-L} at r ~ U{1..(L+1)//2} (Zhu et al., 2309.10400)
    rpes:       a uniformly random subset of positions (Ruoss et al., 2305.16843)
    full, none: 0..L-1; full insists on train_len == target_len
    Drawn afresh each call. ValueError: unknown method, sample that does not fit, one segment."""
    L, T = train_len, target_len
    if not 1 <= L <= T:
        raise BadInput(f"--train_len {L} tokens do not fit into --target_len {T}")
    if method not in METHODS:
        raise BadInput(f"unknown method {method!r}, choose from {', '.join(METHODS)} (--method)")
    if prefix and method != "longrecipe":
        raise BadInput(f"a contiguous prefix belongs to method longrecipe, not to {method!r}")
    plain = torch.arange(L)

    def uniform(low: int, high: int) -> int:  # both ends included
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    if method == "longrecipe":
        positions = spread_segments(starts, L, T, generator)
        if prefix:
            # [E14] pos(i) = i for i < r;   r ~ U{1..(L+1)//2}   (released code, not the paper)
            r = uniform(1, (L + 1) // 2)
            positions[:r] = plain[:r]
        return positions
    if method == "pose":
        # [E7] pos(i) = i for i < r, i + u for i >= r;   r ~ U{1..(L+1)//2}, u ~ U{0..T*-L}
        r, u = uniform(1, (L + 1) // 2), uniform(0, T - L)
        return torch.cat((plain[:r], plain[r:] + u))
    if method == "rpes":
        return torch.randperm(T, generator=generator)[:L].sort().values  # [E15] any L of T*, alike
    if method == "full" and L != T:
        raise BadInput(f"method full wants --train_len {L} to equal --target_len {T}")
    return plain


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
) -> tuple[Tensor, Tensor]:
    """One training sample of a long text (T,) -> (input_ids, position_ids), each (train_len,).

    Segments, selection and positions in one go. A text longer than target_len gives a random
    window of it. ValueError if the text is shorter than train_len."""
    if len(ids) > target_len:
        begin = int(torch.randint(len(ids) - target_len + 1, (1,), generator=generator))
        ids = ids[begin : begin + target_len]
    starts = split_segments(ids, tokenizer)
    if select == "digits":
        impactful = digit_types(tokenizer)
    kept, starts = select_segments(ids, starts, train_len, select, generator, impactful)
    positions = sample_position_ids(method, train_len, target_len, starts, generator, prefix)
    return ids[kept], positions


def train_length(target_len: int) -> int:
    """The paper's 30 % of the target, rounded up to a multiple of 128 (what GPU kernels like).

    >>> train_length(131072)
    39424
    """
    return min(target_len, -(-target_len * 3 // 1280) * 128)  # [E16] 128 * ceil(0.3 T* / 128)


# ---- 5. RoPE base (paper 5; NTK-aware scaling) -------------------------------------------------


def ntk_rope_base(
    theta: float, head_dim: int, old_len: int, new_len: int, factor: float | None = None
) -> float:
    """RoPE base for a window of new_len tokens; factor defaults to new_len / old_len.

    >>> round(ntk_rope_base(5e5, 128, 8192, 131072) / 1e6, 1)  # Llama 3 in the paper's table 4
    131.5
    """
    if head_dim <= 2:
        raise BadInput(f"head_dim {head_dim} has a single frequency: no base to change")
    if new_len <= old_len:
        raise BadInput(f"the new window {new_len} must be longer than the old one {old_len}")
    f = new_len / old_len if factor is None else factor
    # [E8] theta' = theta * (f * T* / L0 - (f - 1)) ^ (d / (d - 2))
    return theta * (f * new_len / old_len - (f - 1)) ** (head_dim / (head_dim - 2))


# ---- 6. Merge (paper 4.3) ----------------------------------------------------------------------


def merge(
    original_dir: str | Path, tuned_dir: str | Path, out_dir: str | Path, weight: float = 0.5
) -> None:
    """Write out_dir with weight * tuned + (1 - weight) * original, tensor by tensor, in fp32.

    The config (RoPE base, window) and the dtype are the tuned model's. ValueError if the two
    differ in shape or vocabulary, or weight is outside 0..1."""
    if not 0 <= weight <= 1:
        raise BadInput(f"merge weight {weight} must be between 0 and 1 (--merge_weight)")
    original_dir, tuned_dir = Path(original_dir), Path(tuned_dir)
    original, tuned = (folders.read_config(d) for d in (original_dir, tuned_dir))
    for config in (original, tuned):
        config["model_type"] = config["raw"]["model_type"]
    for field in sorted(set(original) - {"raw", "rope_theta", "max_position_embeddings"}):
        if original[field] != tuned[field]:
            raise BadInput(f"cannot merge: {field} is {original[field]} and {tuned[field]}")

    tied = tuned["tie_word_embeddings"]

    def averaged():
        for name, (a, b) in checkpoint_files.iter_pairs(original_dir, tuned_dir, tied):
            # [E10] theta = (1 - w) * theta_original + w * theta_tuned
            yield name, ((1 - weight) * a.float() + weight * b.float()).to(b.dtype)

    folders.write(out_dir, tuned["raw"] | {"tie_word_embeddings": tied}, averaged(), tuned_dir)


# ---- 7. `python recipe.py`: one sample explained -------------------------------------------


def explain(args, folder: str) -> None:
    """Print and draw what chapters 2 to 5 do to one text."""
    tokenizer, train_len, target_len = load_tokenizer(folder), args.train_len, args.target_len
    tokens = load_tokens([args.text], tokenizer) if args.text else load_reference(tokenizer)
    remedy = "give a longer --text, or lower --train_len or --target_len"
    generator = torch.Generator().manual_seed(args.seed)
    ids = Corpus(tokens, train_len, remedy).window(target_len, generator)
    starts = split_segments(ids, tokenizer)

    file = args.impactful or words.known_analysis(folder)
    select = "impact" if file else "digits"
    impactful = read_impactful(file, tokenizer.vocab_size) if file else digit_types(tokenizer)
    words.tell_types(file, impactful, ids, starts, tokenizer)

    share, sizes = impactful_share(ids, starts, impactful), segment_lengths(starts, len(ids))
    kept, new_starts = select_segments(ids, starts, train_len, select, generator, impactful)
    held = torch.bincount(torch.searchsorted(starts, kept, right=True) - 1, minlength=len(starts))
    words.tell_selection(ids, starts, share, held > 0, len(kept), tokenizer, select)

    lengths = (train_len, target_len, new_starts, generator)
    methods = [m for m in METHODS if m != "full"]
    draws = {m: [sample_position_ids(m, *lengths) for _ in range(coverage.DRAWS)] for m in methods}
    draws[coverage.FULL] = [torch.arange(target_len)]
    distances = {m: coverage.Distances.of(each, target_len) for m, each in draws.items()}
    words.tell_positions(distances)

    angles = coverage.angles(folder, target_len, inverse_frequencies, ntk_rope_base)
    words.tell_angles(angles)
    selection = (share, sizes, held, "impactful" if file else "digits")
    explain_figure.draw(args.figure, folder, selection, distances, angles)
    print(f"\nfigure: {args.figure}")


def main(argv: list[str] | None = None) -> None:
    p = Parser("recipe.py", "What LongRecipe does to one text.")
    add = p.add_argument
    add("--model", default=TINY, metavar="DIR", help="its tokenizer and RoPE are used")
    add("--text", metavar="FILE", help="(None: Python's language reference)")
    add("--target_len", type=int, default=131_072, help="tokens")
    add("--train_len", type=int, help="tokens (None: 30 %% of the target)")
    add("--impactful", metavar="FILE", help="impactful.json (None: the model's own, else digits)")
    add("--figure", default="recipe.png", metavar="PNG", help="where the figure goes")
    add("--seed", type=int, default=0)
    with report_errors():
        args = p.parse_args(argv)
        check_ranges(args, above_1=("target_len",), seed=("seed",))
        args.train_len = train_length(args.target_len) if args.train_len is None else args.train_len
        if not 2 <= args.train_len <= args.target_len:
            raise BadInput(
                f"--train_len {args.train_len} must be between 2 and --target_len {args.target_len}"
            )
        explain_figure.check_path(args.figure)
        explain(args, local_folder(args.model, SMALL))


if __name__ == "__main__":
    main()

"""`python recipe.py`: what chapters 2 to 6 of recipe.py do to one text, in words; figure.py draws
the same numbers. recipe.py passes itself and model.py, because support/ imports none of the four
files."""

import math
from pathlib import Path
from types import ModuleType

import torch
from matplotlib.backend_bases import FigureCanvasBase
from torch import Tensor

from support.data.segments import digit_types
from support.data.sources import load_reference, load_tokens
from support.data.text import Corpus
from support.data.toy import TINY
from support.explain import figure
from support.explain.distances import DRAWS, Angles, Distances, Samples, angles_of
from support.huggingface.config import read_json, read_window
from support.huggingface.hub import SMALL, local_folder
from support.huggingface.tokenizer import load_tokenizer
from support.runs.analysis import IMPACTFUL, read_impactful
from support.runs.flags import Parser
from support.system.bad_input import BadInput
from support.system.console import check_ranges, report_errors

# the recorded analyses of SmolLM2 and of the embedded model
EXAMPLE = "assets/results/smollm2_16k/longrecipe/impactful.json"
OF_THE_TOY = Path(TINY).parent / "results" / "tiny_128k" / IMPACTFUL
NO_ANALYSIS = f"""\
no --impactful FILE: tokens with a digit count as impactful here, as in the released
code; train.py finds them by its analysis. What it found for SmolLM2:
    --model models/smollm2 --impactful {EXAMPLE}
"""


def run(argv: list[str] | None, model: ModuleType, recipe: ModuleType) -> None:
    p = Parser("recipe.py", "What LongRecipe does to one text.")
    add = p.add_argument
    add("--model", default=TINY, metavar="DIR", help="model whose tokenizer and RoPE are used")
    add("--text", metavar="FILE", help="a text file (default: Python's language reference)")
    add("--target_len", type=int, default=131_072, metavar="N", help="the new window, tokens")
    length = "length of a sample, tokens (default: 30 %% of --target_len)"
    add("--train_len", type=int, metavar="N", help=length)
    impactful = "impactful.json (default: the model's own; without one, digits are taken)"
    add("--impactful", metavar="FILE", help=impactful)
    add("--figure", default="recipe.png", metavar="PNG", help="file for the figure")
    only = "draw only where each method puts the tokens of a sample"
    add("--positions", metavar="PNG", help=only)
    add("--seed", type=int, default=0, metavar="N", help="seed of the sample")
    with report_errors():
        args = p.parse_args(argv)
        check_ranges(args, above_1=("target_len", "train_len"), seed=("seed",))
        if args.train_len is None:
            args.train_len = recipe.train_length(args.target_len)
        if args.train_len > args.target_len:
            both = f"--train_len {args.train_len} must be at most --target_len {args.target_len}"
            raise BadInput(both)
        check_path("--positions" if args.positions else "--figure", args.positions or args.figure)
        args.model = local_folder(args.model, SMALL)
        if args.positions:
            draw_positions(args, recipe)
        else:
            explain(args, model, recipe)


def check_path(flag: str, path: str) -> None:
    """BadInput, before any work, if no figure can be written to `path`."""
    formats, folder = FigureCanvasBase.get_supported_filetypes(), Path(path).parent
    if not folder.is_dir():
        raise BadInput(f"{flag} {path}: folder {folder} does not exist")
    if Path(path).suffix[1:].lower() not in formats:
        raise BadInput(f"{flag} {path} must end in one of .{', .'.join(sorted(formats))}")


def text_of(args, recipe: ModuleType):
    """The tokenizer, the generator of everything random, ids (T,) of --text or of the default text,
    at most --target_len, and the starts (N,) of their segments."""
    tokenizer = load_tokenizer(args.model)
    generator = torch.Generator().manual_seed(args.seed)
    tokens = load_tokens([args.text], tokenizer) if args.text else load_reference(tokenizer)
    remedy = "give a longer --text, or lower --train_len or --target_len"
    ids = Corpus(tokens, args.train_len, remedy).window(args.target_len, generator)
    return tokenizer, generator, ids, recipe.split_segments(ids, tokenizer)


def samples_of(args, recipe: ModuleType, starts: Tensor, generator) -> Samples:
    """Method -> a few words, and position ids of a sample whose segments begin at `starts`."""
    samples = {}
    for name, (label, _) in recipe.METHODS.items():
        length = args.target_len if name == "full" else args.train_len
        drawn = recipe.sample_position_ids(name, length, args.target_len, starts, generator)
        samples[name] = label, drawn
    return samples


def draw_positions(args, recipe: ModuleType) -> None:
    """Draw where each method puts a sample of randomly selected segments."""
    _, generator, ids, starts = text_of(args, recipe)
    _, starts = recipe.select_segments(ids, starts, args.train_len, "random", generator)
    samples = samples_of(args, recipe, starts, generator)
    drawn = figure.draw_positions(samples, starts, args.target_len, read_window(args.model))
    drawn.savefig(args.positions, dpi=120, metadata={"Software": None})
    print(f"figure: {args.positions}")


def explain(args, model: ModuleType, recipe: ModuleType) -> None:
    """Print and draw which sentences are selected, their positions, and the angles of RoPE."""
    tokenizer, generator, ids, starts = text_of(args, recipe)
    file = args.impactful or known_analysis(args.model)
    select = "impact" if file else "digits"
    impactful = read_impactful(file, tokenizer, tokenizer.vocab_size)
    impactful = digit_types(tokenizer) if impactful is None else impactful
    tell_types(file, impactful, ids, tokenizer)

    share = recipe.impactful_share(ids, starts, impactful)
    sizes = recipe.segment_lengths(starts, len(ids))
    kept, new_starts = recipe.select_segments(
        ids, starts, args.train_len, select, generator, impactful
    )
    held = torch.bincount(torch.searchsorted(starts, kept, right=True) - 1, minlength=len(starts))
    tell_selection(ids.tensor_split(starts[1:]), share, held, select, tokenizer)

    draws = [samples_of(args, recipe, new_starts, generator) for _ in range(DRAWS)]
    found = {
        name: Distances.of([draw[name][1] for draw in draws], args.target_len)
        for name in recipe.METHODS
    }
    tell_positions(draws[0], found)

    formulas = model.inverse_frequencies, recipe.ntk_rope_base
    try:
        angles = angles_of(args.model, args.target_len, *formulas)
        tell_angles(angles)
    except BadInput as why_not:
        angles = f"nothing to say of the RoPE: {why_not}"
        print(f"\n{angles}")
    selection, window = (share, sizes, held), read_window(args.model)
    drawn = figure.draw(draws[0], new_starts, window, selection, found, angles)
    drawn.savefig(args.figure, dpi=90)
    print(f"\nfigure: {args.figure}")


# ---- its words ---------------------------------------------------------------------------------


def known_analysis(folder: str) -> Path | None:
    """The impactful.json beside a model that train.py made, or of a kept run of the toy."""
    if (Path(folder) / IMPACTFUL).is_file():
        return Path(folder) / IMPACTFUL
    return OF_THE_TOY if Path(folder).resolve() == Path(TINY).resolve() else None


def mean_shifts(file: str | Path) -> dict[int, str]:
    """token id -> mean shift of an impactful.json, in its order: largest first. A table made by
    hand may have no shifts."""
    shifts = {}
    for name, row in read_json(Path(file)).items():
        shift = row[1] if isinstance(row, list) and len(row) == 2 else None
        shifts[int(name)] = f"{shift:+.1f}" if isinstance(shift, int | float) else ""
    return shifts


def tell_types(file: str | Path | None, impactful: Tensor, ids: Tensor, tokenizer) -> None:
    """Print the first impactful types, bool (V,), that occur in the text, with what is around them.
    file: where they are from, in order of mean shift; None: types with a digit, by count."""
    count = torch.bincount(ids, minlength=len(impactful))
    if file is None:
        print(NO_ANALYSIS)
        shifts = dict.fromkeys(count.argsort(descending=True).tolist(), "")
    else:
        shifts = mean_shifts(file)
    print(
        f"impactful types: {int(impactful.sum()):,} of {len(impactful):,}"
        f" ({file or 'those with a digit'}); {impactful[ids].double().mean():.1%} of this text's"
        " tokens are of them\n"
        "   shift  times  type, in [] where the text has it first (shift: mean, in logits, or in"
        " nats after --log_softmax)"
    )
    for v in [v for v in shifts if count[v] and impactful[v]][:8]:
        first = int((ids == v).nonzero()[0])
        parts = ids[max(0, first - 8) : first], ids[first : first + 1], ids[first + 1 : first + 9]
        before, own, after = (tokenizer.decode(part.tolist()) for part in parts)
        print(f"{shifts[v]:>8}  {count[v]:>5,}  {' '.join(f'{before}[{own}]{after}'.split())}")


def tell_selection(segments, share: Tensor, held: Tensor, select: str, tokenizer) -> None:
    """Print what selection keeps of the N segments (ids of each) of a text. share, held (N,): share
    of impactful tokens of each, and how many of its tokens the sample holds."""
    hit, taken = share > 0, held > 0
    of_kept, of_dropped = (
        f"{share[some].mean():.0%} on average" if some.any() else "none"
        for some in (taken & hit, ~taken)
    )
    print(
        f"\ntext: {sum(map(len, segments)):,} tokens in {len(segments):,} segments;"
        f" {(~hit).double().mean():.1%} hold no impactful token (the paper drops those)\n"
        f"sample: {held.sum():,} tokens in {taken.sum():,} segments, chosen by {select}\n"
        f"   keep: {(taken & hit).sum():,} that hold impactful tokens; their share of such"
        f" tokens is {of_kept}\n"
        f"   fill: {(taken & ~hit).sum():,} that hold none, where the others are too few\n"
        f"   drop: {(~taken).sum():,}; their share of impactful tokens is {of_dropped}\n\n"
        "verdict  impactful  segment (the first 12; impactful: share of its tokens)"
    )
    for i, segment in enumerate(segments[:12]):
        verdict = ("keep" if hit[i] else "fill") if taken[i] else "drop"
        print(f"{verdict:>7}  {share[i]:>9.0%}  {tokenizer.decode(segment.tolist())!r}")


def tell_positions(samples: Samples, found: dict[str, Distances]) -> None:
    """Print where each method puts the tokens of the sample, and which distances it trains."""
    print(
        f"\n{'':>54}share of all distances that are trained\n"
        f"{'method':>12}  {'position ids':<12}  {'jumps':>8}  {'mean distance':>13}"
        f"  {'by one sample':>13}  {f'by {DRAWS}':>6}"
    )
    for method, d in found.items():
        _, positions = samples[method]
        last, jumps = int(positions[-1]), int((positions.diff() > 1).sum())
        print(
            f"{method:>12}  {f'0..{last:,}':<12}  {jumps:>8,}  {d.mean:>13,.0f}"
            f"  {d.covered_by_one:>13.1%}  {d.covered:>6.1%}"
        )


def tell_angles(a: Angles) -> None:
    """Print how many pairs of dimensions meet angles that the original model never met."""
    pairs, part = len(a.old), int((a.old * a.old_len < 2 * math.pi).sum())
    longest = 2 * math.pi / float(a.old[-1])
    print(
        f"\nRoPE: {pairs} pairs of dimensions turn with the position. Within the old window of"
        f" {a.old_len:,} tokens, {pairs - part} of\nthem went round the whole circle; {part} did"
        f" not (the slowest takes {longest:,.0f} tokens for a turn).\n"
        f"pairs that meet angles at {a.target_len:,} tokens which the original model never saw:\n"
        f"   before: {int(a.before.sum())} of {pairs}, with the old theta {a.thetas[0]:,.0f}\n"
        f"   after:  {int(a.after.sum())} of {pairs}, with the new theta {a.thetas[1]:,.0f}"
    )

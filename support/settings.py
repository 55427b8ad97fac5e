"""The flags of train.py: numbers that cannot be meant, and flags that do not go together."""

from support.cli import check_ranges


def check_given(args) -> None:
    """What can be said before defaults are filled in: flags not given (None) pass."""
    check_ranges(
        args,
        at_least_1=("base_len", "steps", "batch_sequences", "analysis_samples"),
        above_1=("rope_base",),
        positive=("lr", "clip", "top"),
        not_negative=("replay_steps", "replay_lr", "weight_decay", "warmup_steps", "save_minutes"),
        within_0_1=("merge_weight", "top"),
        seed=("seed",),
    )


def check_lengths(args) -> None:
    """With every length filled in: do they go together?"""
    target = f"--target_len {args.target_len}"
    if args.target_len <= args.base_len:
        raise ValueError(f"{target} must exceed the window {args.base_len} (--base_len)")
    if not 2 <= args.train_len <= args.target_len:
        raise ValueError(f"--train_len {args.train_len} must be between 2 and {target}")
    if args.method == "full" and args.train_len != args.target_len:
        raise ValueError(
            f"--method full needs --train_len {args.target_len}, the whole --target_len"
        )
    if args.prefix and args.method != "longrecipe":
        raise ValueError(f"--prefix belongs to --method longrecipe, not to {args.method}")
    if not 2 <= args.replay_len <= args.target_len:
        raise ValueError(f"--replay_len {args.replay_len} must be between 2 and --target_len")


def check_probe(args, needs_probe: bool) -> None:
    if needs_probe and args.method == "none" and args.train_len <= args.base_len:
        raise ValueError(
            "--method none never leaves the old window, so it has no impactful types of its own:"
            " --impactful FILE of another run, or --select random"
        )
    if not 0 <= args.probe_steps <= args.steps or (needs_probe and args.probe_steps == 0):
        raise ValueError(
            f"--probe_steps {args.probe_steps} must be between 1 and --steps {args.steps}"
        )

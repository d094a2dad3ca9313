"""Which images are kept for validation, and which few stand for many."""

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tissue.files import InputError, some
from tissue.pairs import Pair, matches, same_name

VAL_PATTERN = "*03.tif"  # where it tells some images from others, and the user says nothing
VAL_FRACTION = 0.2  # where it does not
FAR = 0.1  # of a draw in groups from the fraction that is wanted, so that a line says so


class Wanted(NamedTuple):
    """What the user says of it; None where nothing. `seed` is that of the draw."""

    val_pattern: str | None
    val_fraction: float | None
    group_pattern: str | None
    seed: int | None


def choose(
    root: Path, pairs: Sequence[Pair], wanted: Wanted
) -> tuple[dict[str, str], dict, list[str]]:
    """Return {name: "train" or "val"}, the values of Wanted that decided it, and lines that tell
    what was drawn: by the pattern, or where none was given and the default matches all or less than
    half of what is drawn, as of images with running numbers, a draw.

    Raises InputError where that leaves no image for training or none for validation.
    """
    if len(pairs) < 2:
        raise InputError(
            f"{pairs[0].image}: found one image, expected at least two images, one to train on and "
            f"one to validate"
        )
    chosen_by, lines = dict.fromkeys(Wanted._fields), []
    names = [pair.name for pair in pairs]
    groups = groups_of(names, wanted.group_pattern)
    if wanted.group_pattern:
        lines += said_of_single(groups, wanted.group_pattern)
    if wanted.val_pattern is not None or (wanted.val_fraction or wanted.group_pattern) is None:
        pattern = VAL_PATTERN if wanted.val_pattern is None else wanted.val_pattern
        split_of = by_pattern(pairs, pattern)
        kept = list(split_of.values()).count("val")
        enough = VAL_FRACTION / 2 * len(names) if wanted.val_pattern is None else 1
        if enough <= kept < len(names):
            if wanted.group_pattern:
                lines += said_of_both(groups, split_of)
            if wanted.val_pattern is None:
                lines.append(said_of_default(split_of))
            if wanted.seed is not None:
                lines.append(f"--seed {wanted.seed}: nothing is drawn where {pattern} chooses")
            return split_of, chosen_by | {"val_pattern": pattern}, lines
        missing = "training" if kept else "validation"
        if wanted.val_pattern is not None:
            raise InputError(
                f"--val_pattern: found no {missing} image among the {len(pairs)} in {root} "
                f"with {pattern!r}, expected at least one; --val_fraction {VAL_FRACTION} in "
                f"its place draws some"
            )
        which = {0: "none", len(names): "each"}.get(kept, kept)
        lines.append(
            f"{pattern} matches {which} of the {len(pairs)} images: --val_fraction "
            f"{VAL_FRACTION} is taken instead"
        )
    fraction, seed = wanted.val_fraction or VAL_FRACTION, wanted.seed or 0
    split_of, groups = by_groups(names, fraction, wanted.group_pattern, seed)
    count = list(split_of.values()).count("val")
    lines.append(
        f"{count} of {len(pairs)} images are for validation (--seed {seed}): {', '.join(groups)}"
    )
    if wanted.group_pattern and abs(count / len(names) - fraction) > FAR:
        lines.append(
            f"that is {count / len(names):.0%} of the images in place of {fraction:.0%}: groups "
            f"stay whole; --seed draws others, --val_pattern chooses"
        )
    return split_of, wanted._replace(val_fraction=fraction, seed=seed)._asdict(), lines


def said_of_default(split_of: dict[str, str]) -> str:
    """A line that tells which images the default pattern keeps, and of names that begin alike, as
    those of one patient may, how they are kept together.
    """
    kept, others = (
        [name for name, split in split_of.items() if split == part] for part in ("val", "train")
    )
    begin = re.compile(r"(.*[^\W_])[\W_]+\d+$")  # what comes before a last number
    starts = [
        {same_name(match[1]) for match in map(begin.match, names) if match}
        for names in (kept, others)
    ]
    several = len(starts[0] | starts[1]) > 1  # one start of all tells no patients apart
    alike = sorted(starts[0] & starts[1]) if several else []
    return (
        f"{len(kept)} of {len(split_of)} images are for validation ({VAL_PATTERN}): {some(kept)}"
        + f"; if images of one start ({some(alike)}) are of one patient, --group_pattern keeps "
        f"them together" * bool(alike)
    )


def said_of_single(groups: dict[str, str], pattern: str) -> list[str]:
    """A line where no two of the images {name: group} are of one group, so that none is kept."""
    if len(set(groups.values())) < len(groups):
        return []
    return [f"--group_pattern {pattern!r}: each of the {len(groups)} images is a group of its own"]


def said_of_both(
    groups: Mapping, split_of: Mapping, instead: str = "without --val_pattern groups stay together"
) -> list[str]:
    """A line with the groups that have images for training and for validation, if there are any,
    and what to do `instead`. Both are by image: its group, and "train" or "val".
    """
    train, val = (
        {group for name, group in groups.items() if split_of[name] == split}
        for split in ("train", "val")
    )
    if not train & val:
        return []
    return [
        f"for training and for validation, so that scores may be too good: "
        f"{', '.join(sorted(train & val))}; {instead}"
    ]


def by_pattern(pairs: Sequence[Pair], pattern: str) -> dict[str, str]:
    """Return {name: "val" or "train"}: the images that `pattern` matches are for validation."""
    return {p.name: "val" if matches(p.image, pattern) else "train" for p in pairs}


def by_groups(
    names: Sequence[str], fraction: float, group_pattern: str | None, seed: int
) -> tuple[dict[str, str], list[str]]:
    """Return {name: "val" or "train"} and the groups that are for validation, sorted.

    A group is what the regular expression `group_pattern` finds in a name, its first capture group
    if it has one, in upper or lower case; without an expression each name is a group. Groups are
    drawn by `seed`, one at least, until they hold `fraction` of the images; one at least is left
    for training. One with which they would hold more than that by a group of mean size is passed
    over: where all are alike there is none, where one is large it does not take most images.
    Raises InputError for an expression that is none, names without a match, or a single group.
    """
    groups = groups_of(names, group_pattern)
    drawn = sorted(set(groups.values()))
    if len(drawn) < 2:
        raise InputError(
            f"--group_pattern: found one group ({drawn[0]}) of all {len(names)} images with "
            f"{group_pattern!r}, expected two or more, one to train on and one to validate"
        )
    random.Random(seed).shuffle(drawn)
    chosen, count = [], 0
    wanted, sizes = max(1, fraction * len(names) - 1e-9), Counter(groups.values())
    for group in drawn:
        fits = count + sizes[group] <= wanted + len(names) / len(drawn)
        if fits and count < wanted and len(chosen) < len(drawn) - 1:
            chosen.append(group)
            count += sizes[group]
    splits = {name: "val" if group in chosen else "train" for name, group in groups.items()}
    return splits, sorted(chosen)


def groups_of(names, pattern):
    """{name: its group}, as --group_pattern finds it; InputError where that is not possible."""
    if pattern is None:
        return {name: name for name in names}
    try:
        expression = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(
            f"--group_pattern: found {pattern!r}, expected a regular expression ({error})"
        ) from error
    groups = {}
    for name in names:
        match = expression.search(name)
        groups[name] = match and match[1 if expression.groups else 0]
    if without := [name for name, group in groups.items() if not group]:
        raise InputError(
            f"--group_pattern: found nothing of {pattern!r} in {', '.join(without)}, expected a "
            f"group in the name of every image"
        )
    spelled = {}  # the first spelling of each: one patient must not be in both splits
    return {name: spelled.setdefault(same_name(group), group) for name, group in groups.items()}


def spread(items: Sequence, most: int) -> list:
    """At most so many of the items, the first and then evenly spread over the rest, in order."""
    few = min(len(items), most)
    return [items[len(items) * k // few] for k in range(few)]

"""Making a patch set: what is to be cut and how, what is wrong with it, and the cutting itself.

preprocess.py makes a Plan for each root folder, has all of them checked, and cuts one after the
other. Nothing here prints; what a person should know comes back as lines.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median_low

import numpy as np

from tissue import annotated, manifest, masks, patches, pictures, windows
from tissue.bits import bit_lines
from tissue.depth import UNKNOWN, depth_of
from tissue.files import InputError, file_hash, some
from tissue.given_sizes import read_sizes
from tissue.images import bits_of, read_image, said_of_turned
from tissue.nuclei import reference_labels
from tissue.pairs import LABEL_FOLDER, Files, Pair, PairFacts, check_pair, said_of_darker, same_name
from tissue.pixel_size import (
    pixel_size_um,
    resampling_lines,
    said_of_other,
    scale_of,
    size_by_nuclei,
)
from tissue.splits import spread
from tissue.stain import Stain, stain_of

PREVIEW_PATCHES = 48
MOST_MAPS = 64  # label maps of a set that tell how large its nuclei are
# Of a pair: rows of patches.csv, the image's stain, its tile of annotations_preview.png if any.
Written = tuple[list[dict], Stain | None, np.ndarray | None]


@dataclass
class Plan:
    """A set that is to be cut: what there is, and how. What has a default is filled in later.

    `settings` has what `manifest` stores of them: patch_dim and patch_stride in pixels, how the
    split was chosen, pixel_size_given_um, and from `settle_pixel_size` and `check` on also
    pixel_size_um and bits.
    """

    root: Path
    pairs: list[Pair]
    labels: Files  # label maps and annotations by the names of images
    split_of: dict[str, str]  # "train" or "val" by name
    settings: dict
    told: dict[str, float | None]  # micrometres a pixel, as each image tells them
    sizes: dict[str, float | None]  # the same, as they are taken
    sources: list[dict] = field(default_factory=list)  # what the manifest says of each pair
    facts: list[PairFacts] = field(default_factory=list)  # of each pair
    bit_lines: list[str] = field(default_factory=list)  # on its 16-bit images

    @property
    def known_sizes(self) -> list[float]:
        """Micrometres a pixel of the training images that tell it."""
        return [um for name, um in self.sizes.items() if um and self.split_of[name] == "train"]

    @property
    def pictures(self) -> list[tuple[str, str]]:
        """Name and hash of the pixels of each pair, as far as it is known."""
        if self.facts:
            both = zip(self.pairs, self.facts, strict=True)
            return [(pair.name, facts.pixels_sha256) for pair, facts in both]
        images = manifest.read_manifest(self.root)["images"]
        return [(i["name"], i["pixels_sha256"]) for i in images if "pixels_sha256" in i]

    @cached_property
    def shown(self) -> list[str]:
        """The images on the contact sheet of annotations."""
        return [pair.name for pair in self.pairs if pair.is_annotated][: annotated.SHOWN]

    def scale(self, pair: Pair) -> float:
        """How many of an image's pixels make one of the set's (`pixel_size.scale_of`)."""
        return scale_of(self.sizes[pair.name], self.settings["pixel_size_um"], pair.image)


# --- plan ---------------------------------------------------------------------------------------


def told_size(pair: Pair) -> float | None:
    """Micrometres per pixel as the image tells them; None also where it cannot be read."""
    try:
        return pixel_size_um(pair.image)
    except (InputError, OSError):
        return None  # `check_pair` says why


def size_of_set(
    root: Path, pairs: Sequence[Pair], labels: Files, pool: Executor
) -> tuple[float, str]:
    """Micrometres a pixel, by the nuclei of a set's label maps, and the line that says so.

    Raises InputError where no label map has nuclei.
    """
    maps = [pair for pair in pairs if pair.name in labels]
    areas = pool.map(lambda pair: nucleus_areas(pair, labels[pair.name]), spread(maps, MOST_MAPS))
    areas = np.concatenate([np.zeros(0), *areas])
    size = size_by_nuclei(areas)
    if not size:
        raise InputError(
            f"{root}: found no label map with nuclei in {LABEL_FOLDER}, expected some to tell the "
            f"pixel size by; give it in micrometres with --pixel_size"
        )
    size = float(f"{size:.2g}")
    return size, (
        f"{root}: taken as {size:g} um a pixel, by its median nucleus of {np.median(areas):.0f} "
        f"pixels; --pixel_size tells it"
    )


def nucleus_areas(pair: Pair, label_map: Path) -> np.ndarray:
    """The pixels of each nucleus of a pair's label map that does not meet the image's edge, or of
    an annotation that of a block, (n,); none where the file is no label map or cannot be read.
    """
    try:
        if pair.is_annotated:
            with annotated.opened(pair) as (_, annotation):
                parts = [annotation.numbers(*block) for block in annotated.blocks(annotation)]
        else:
            parts = [masks.read_label_map(label_map)]
    except (InputError, OSError):
        return np.zeros(0)  # `check_pair` says why
    return np.concatenate([np.zeros(0), *(_areas(p) for p in parts if p is not None)])


def _areas(labels):
    labels = reference_labels(labels)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        areas[edge] = 0
    return areas[areas > 0]


def take_sizes(plans: Sequence[Plan], table: str | None) -> list[str]:
    """Put the pixel sizes of a table of the user's, if any, into the plans; in lines, what was
    taken, and which images tell another. Raises InputError as `given_sizes.read_sizes` does.
    """
    lines = []
    if table:
        sizes, line = read_sizes(table, [name for plan in plans for name in plan.sizes])
        lines.append(line)
        roots_of = Counter(same_name(name) for plan in plans for name in plan.sizes)
        if several := [name for name in sizes if roots_of[same_name(name)] > 1]:
            raise InputError(
                f"{table}: found {some(several)}, of which several roots have an image, expected "
                f"names of one image; rename those of one root"
            )
        for plan in plans:
            plan.sizes.update({name: um for name, um in sizes.items() if name in plan.sizes})
    for plan in plans:
        both = {p.image.name: (plan.told[p.name], plan.sizes[p.name]) for p in plan.pairs}
        lines += said_of_other(both)
    return lines


def settle_pixel_size(plans: Sequence[Plan], wanted: float | None, pool: Executor) -> list[str]:
    """Put the one pixel size of all patches into the settings: the `wanted` one, micrometres, or
    the median of the training images'. A set that tells none goes by its nuclei if there is a size
    to come to, and else is taken as it is. Returns lines that say what was taken for what.
    """
    lines = []
    known = [size for plan in plans for size in plan.known_sizes]
    wanted = wanted or (median_low(known) if known else None)
    for plan in plans:
        plan.settings["pixel_size_um"] = wanted
        if wanted and not any(plan.sizes.values()) and plan.labels:
            size, line = size_of_set(plan.root, plan.pairs, plan.labels, pool)
            plan.sizes.update(dict.fromkeys(plan.sizes, size))
            lines.append(line)
    return lines


def describe(plan: Plan, pool: Executor) -> list[dict]:
    """What the manifest says of each pair before it is decoded: pixel size, files, their hashes."""
    paths = {
        "image": [pair.image for pair in plan.pairs],
        "mask": [pair.mask for pair in plan.pairs],
        "labels": [plan.labels.get(pair.name) for pair in plan.pairs],
    }
    sources = [
        {"name": name, "split": plan.split_of[name], "pixel_size_um": plan.sizes[name]}
        for name in (pair.name for pair in plan.pairs)
    ]
    for kind, its in paths.items():
        hashes = pool.map(lambda path: path and file_hash(path), its)
        for source, path, digest in zip(sources, its, hashes, strict=True):
            source[kind] = path and path.relative_to(plan.root).as_posix()
            source[f"{kind}_sha256"] = digest
    return sources


def reason_to_cut(plan: Plan) -> str | None:
    """Why the set below the root has to be cut anew, in a few words, which are none where there is
    no set; None if it is whole, and cut from these sources in this way.
    """
    root, sources = plan.root, plan.sources
    try:
        found = manifest.read_manifest(root)
        if others := [key for key, value in plan.settings.items() if found[key] != value]:
            return f"other settings ({', '.join(others)})"
        if [{key: image[key] for key in sources[0]} for image in found["images"]] != sources:
            return "other images, masks or annotations, or others of them for validation"
        if file_hash(root / manifest.TABLE) != found["table_sha256"]:
            return f"{manifest.TABLE} is not as it was written"
        if manifest.size_on_disk(root) != (found["patches"], found["bytes"]):
            return "patches are not as they were written"
    except FileNotFoundError:
        return "files are missing" if (root / manifest.MANIFEST).exists() else ""
    except (InputError, OSError):
        return f"{manifest.MANIFEST} is missing, damaged or of another version"
    return None


# --- check --------------------------------------------------------------------------------------


def facts_or_fault(plan: Plan, pair: Pair) -> PairFacts | str:
    """What `check_pair` says of a pair of the plan; of one with faults these, as text."""
    try:
        if pair.is_annotated:
            dim, size = plan.settings["patch_dim"], plan.sizes[pair.name]
            return annotated.check(pair, dim, plan.scale(pair), size)
        label_map = plan.labels.get(pair.name)
        return check_pair(pair, plan.settings["patch_dim"], plan.scale(pair), label_map)
    except (InputError, OSError) as error:
        return str(error)


def check_pictures(plans: Sequence[Plan]) -> None:
    """Raise InputError where one picture is in training and in validation, of one set or of two.

    Pictures are told by their files, and by their pixels where these are known: sets of earlier
    versions that are up to date, which are not decoded, do not have them.
    """
    places_of_picture = defaultdict(list)  # (plan, name) by hash
    for plan in plans:
        digests = [(source["name"], source["image_sha256"]) for source in plan.sources]
        digests += plan.pictures
        for name, digest in digests:
            places_of_picture[digest].append((plan, name))
    shared = {
        " = ".join(name if len(plans) == 1 else str(plan.root / name) for plan, name in places)
        for places in places_of_picture.values()
        if len({plan.split_of[name] for plan, name in places}) > 1
    }
    if shared:
        raise InputError(
            f"{', '.join(str(plan.root) for plan in plans)}: found the same picture in training and"
            f" validation ({', '.join(sorted(shared))}), expected different ones; remove one of "
            f"each, or choose other images for validation"
        )


def settle_bits(plans: Sequence[Plan], pool: Executor) -> None:
    """Put into the plans how many bits the 16-bit images of all sets use, the most of all; None in
    a set without any.

    One number for all, so that they are as bright as they are to each other.
    """
    found = []
    for plan in plans:
        its = zip(plan.pairs, pool.map(_bits, plan.pairs), strict=True)
        found.append({pair.name: bits for pair, bits in its if bits})
    most = max((bits.used for its in found for bits in its.values()), default=None)
    for plan, its in zip(plans, found, strict=True):
        plan.settings["bits"] = most if its else None
        plan.bit_lines = bit_lines(its, most) if its else []


def _bits(pair):
    try:
        return bits_of(pair.image)
    except (InputError, OSError):
        return None  # `check_pair` says why


def assumptions(plan: Plan) -> list[str]:
    """Lines that say what is assumed of a set's images and masks."""
    lines = plan.bit_lines + resampling_lines(plan.sizes, plan.settings["pixel_size_um"])
    lines += sorted({note for facts in plan.facts for note in facts.notes})
    lines += said_of_turned(pair.image for pair in plan.pairs)
    return lines + annotated_nuclei(plan) + doubtful_masks(plan)


def doubtful_masks(plan: Plan) -> list[str]:
    """A line that names the images whose nuclei are no darker than what is beside them."""
    darker = {p.name: facts.darker for p, facts in zip(plan.pairs, plan.facts, strict=True)}
    return said_of_darker(darker, patches.PREVIEW)


def annotated_nuclei(plan: Plan) -> list[str]:
    """A line for each annotated image of a set: its nuclei by class, and its regions."""
    lines = []
    for pair, facts in zip(plan.pairs, plan.facts, strict=True):
        if pair.is_annotated:
            classes = ", ".join(f"{name} {count}" for name, count in facts.classes.items())
            count = sum(facts.classes.values())
            nuclei = f"{count} annotated nuclei" + f" ({classes})" * bool(classes)
            where = "" if facts.regions is None else f", regions: {facts.regions}"
            lines.append(f"{pair.name}: {nuclei}{where}")
    return lines


# --- cut ----------------------------------------------------------------------------------------


def cut_pair(new: Path, plan: Plan, pair: Pair) -> Written:
    """Write the patches of one pair below `new`; their rows of patches.csv, and the image's stain.

    Raises OSError where a file cannot be written.
    """
    settings, split = plan.settings, plan.split_of[pair.name]
    grid = patches.Grid(settings["patch_dim"], settings["patch_stride"])
    if pair.is_annotated:
        with annotated.opened(pair, plan.scale(pair), settings["bits"]) as found:
            rows = annotated.cut(new, split, pair.name, found, grid)
            tile = annotated.picture(found, rows, grid.dim) if pair.name in plan.shown else None
            return rows, stain_of(found.image), tile
    whole = read_image(pair.image, settings["bits"]), masks.read_mask(pair.mask)
    image, mask = patches.resample(*whole, plan.scale(pair))
    if label_map := plan.labels.get(pair.name):
        mask = with_depth(mask, label_map)
    rows = patches.write_patches(new, split, pair.name, image, mask, grid)
    return rows, stain_of(windows.from_array(image)), None


def with_depth(mask: np.ndarray, label_map: Path) -> np.ndarray:
    """A mask bool (H, W) as uint8 with the depth in the nuclei of its label map, which is brought
    to the mask's size; UNKNOWN where only the mask has a nucleus.
    """
    labels = masks.read_label_map(label_map)
    places = windows.nearest((0, 0, *mask.shape), labels.shape, mask.shape)
    depth = depth_of(reference_labels(labels)[np.ix_(*places)])
    return np.where(mask, np.maximum(depth, UNKNOWN), 0).astype(np.uint8)


def complete_set(new: Path, plan: Plan, written: Sequence[Written]) -> dict:
    """Write the previews, the table and the manifest of a set whose patches are `written`, that is
    what `cut_pair` returned for each pair in turn; what the manifest says.
    """
    table = [row for rows, *_ in written for row in rows]
    write_preview(new, table)
    if tiles := [tile for *_, tile in written if tile is not None]:
        pictures.write_image(new / patches.ANNOTATIONS, annotated.sheet(tiles))
    images = []
    for source, facts, (_, stain, _) in zip(plan.sources, plan.facts, written, strict=True):
        images.append(
            source
            | {
                "height": facts.height,
                "width": facts.width,
                "pixels_sha256": facts.pixels_sha256,
                "foreground": round(facts.foreground, 4),
                "stain": stain._asdict() if stain else None,
            }
        )
    return manifest.write_manifest(new, {**plan.settings, "images": images}, table)


def write_preview(root: Path, table: Sequence[dict]) -> None:
    """Write patches_preview.png: patches spread over the whole set, nuclei outlined, and dark where
    they are not annotated."""
    shown = [table[len(table) * i // PREVIEW_PATCHES] for i in range(PREVIEW_PATCHES)]
    outlined = []
    for row in shown:
        image, mask = patches.read_patch(root, row["split"], row["file"])
        image[mask == patches.NO_MASK] //= 3
        outlined.append(pictures.overlay(image, mask > 0))
    pictures.write_image(root / patches.PREVIEW, pictures.contact_sheet(outlined, columns=8))

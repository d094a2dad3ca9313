"""Nuclei of an image as tables: CSV, Parquet and AnnData, and reading them back.

Every table has the same numbers: whole ones, or floats of four decimals at most.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, parquet

from tissue.files import InputError

DIGITS = 4  # decimals kept of a measure
ROW_GROUP = 50_000  # nuclei of a Parquet file that are read and held together
LARGEST_PLAIN = 1e9  # arrow writes larger floats with an exponent, Python does not

UNITS = {"y": "px", "x": "px", "area_px": "px^2", "area_um2": "um^2", "perimeter": "px"}
UNITS |= {"perimeter_um": "um", "equivalent_diameter": "px", "equivalent_diameter_um": "um"}
UNITS |= {"orientation": "rad", "haematoxylin_od": "optical density"}
NO_MEASURES = "id", "y", "x", "touches_border"  # what AnnData has beside its matrix


class Image(NamedTuple):
    """Whose nuclei they are."""

    name: str
    height: int  # pixels
    width: int
    made_with: dict  # record.MadeWith, as far as it is known
    picture: str | None = None  # the file in whose pixels they are, if not <name>_image.png

    @property
    def pixel_size_um(self) -> float | None:
        return self.made_with.get("pixel_size")


class Batch:
    """Some nuclei: their measures, and their outlines one after the other.

    `table` has a column of each measure, int64 or float64, null where it is not known. The outline
    of nucleus i, closed, is `points[first[i] : first[i + 1]]`, int64 (m, 2) of x, y.
    """

    def __init__(self, columns: dict[str, np.ndarray], rings: Sequence[np.ndarray]):
        arrays = {key: _known(np.asarray(column)) for key, column in columns.items()}
        self.table = pa.table(arrays)
        points = np.concatenate([np.empty((0, 2), np.int64), *rings])
        self.points = points.astype(np.int64)
        if (self.points != points).any():
            raise ValueError("found an outline between pixels, expected whole coordinates")
        self.first = np.cumsum([0, *map(len, rings)], dtype=np.int32)

    def __len__(self):
        return len(self.table)

    @cached_property
    def texts(self) -> dict[str, pa.Array]:
        """The columns as Python writes numbers, null where they are not known."""
        return {key: _text(self.table[key].combine_chunks()) for key in self.table.column_names}

    @cached_property
    def corners(self) -> pa.Array:
        """All points as "x,y"."""
        x, y = (pa.array(side).cast(pa.string()) for side in self.points.T)
        return joined([x, y], ",")


def joined(texts: Sequence, separator: str = "", **options) -> pa.Array:
    """Columns of texts, or a text for all rows, as one column."""
    return pc.binary_join_element_wise(*texts, separator, **options)


def lines(texts: pa.Array, separator: str) -> bytes:
    """The texts of a column as one."""
    whole = pa.ListArray.from_arrays(pa.array([0, len(texts)], pa.int32()), texts)
    return pc.binary_join(whole, separator)[0].as_buffer()


def _known(column):
    """A measure as int64, or float64 of DIGITS decimals, null where it is not finite."""
    if column.dtype.kind in "bui":
        return pa.array(column.astype(np.int64))
    rounded = np.round(column.astype(float), DIGITS) + 0.0  # turns -0.0 into 0.0
    return pa.array(rounded, mask=~np.isfinite(rounded))


def _text(column):
    """Numbers as Python's `repr` has them."""
    text = column.cast(pa.string())
    if pa.types.is_integer(column.type):
        return text
    values = column.fill_null(0).to_numpy()
    if np.abs(values).max(initial=0) >= LARGEST_PLAIN:
        return pa.array([None if v is None else repr(v) for v in column.to_pylist()], pa.string())
    return pc.if_else(pa.array(values == np.trunc(values)), joined([text, ".0"]), text)


# --- one format each: a context that gives what writes a batch


@contextmanager
def write_csv(path: Path, image: Image) -> Iterator[Callable[[Batch], None]]:
    """Lines as Python's csv module writes them, empty where a measure is not known."""
    with path.open("wb") as file:

        def write(batch):
            if not file.tell():
                file.write(",".join(batch.texts).encode() + b"\r\n")
            if len(batch):
                unknown = {"null_handling": "replace", "null_replacement": ""}
                rows = joined(list(batch.texts.values()), ",", **unknown)
                file.write(lines(joined([rows, "\r\n"]), ""))

        yield write
        if not file.tell():
            file.write(b"id\r\n")


@contextmanager
def write_parquet(path: Path, image: Image) -> Iterator[Callable[[Batch], None]]:
    """The table with `unit` in the metadata of its columns, and in its own metadata what the image
    is and the nuclei were made with; in groups of about ROW_GROUP rows, each as it is full."""
    held, writer = [], None

    def flush():
        nonlocal writer
        table = pa.concat_tables(held) if held else pa.table({"id": pa.array([], pa.int64())})
        held.clear()
        if writer is None:
            facts = {key: str(value) for key, value in _facts(image).items()}
            schema = pa.schema([_with_unit(field) for field in table.schema], facts)
            # Rounded floats: 38 bytes a nucleus, with dictionaries 42, with byte streams split 69.
            options = {"compression": "zstd", "use_dictionary": False}
            writer = parquet.ParquetWriter(path, schema, **options)
        writer.write_table(table.cast(writer.schema), row_group_size=max(1, len(table)))

    def write(batch):
        held.append(batch.table)
        if sum(map(len, held)) >= ROW_GROUP:
            flush()

    try:
        yield write
        if held or writer is None:
            flush()
    finally:
        if writer is not None:
            writer.close()


def _with_unit(field):
    unit = UNITS.get(field.name)
    return field.with_metadata({"unit": unit}) if unit else field


def _facts(image):
    """What a table says of its image."""
    facts = {"image": image.name.encode("utf-8", "backslashreplace").decode()}
    facts |= {"height": image.height, "width": image.width}
    if image.pixel_size_um:
        facts["pixel_size_um"] = float(image.pixel_size_um)
    return facts | {"made_with": json.dumps(image.made_with)}


@contextmanager
def write_anndata(path: Path, image: Image) -> Iterator[Callable[[Batch], None]]:
    """A row per nucleus: `X` float32 has the measures that are known of any, `obs_names` the ids,
    `obs` the centroids in pixels and `touches_border`, `obsm["spatial"]` x and y from the top left
    corner of the image in `uns["spatial_unit"]`. All is held until the end, 0.7 kB a nucleus."""
    check_packages(["anndata"])
    held = []
    yield lambda batch: held.append(batch.table)

    import anndata
    import pandas as pd

    empty = pa.table({key: pa.array([], pa.int64()) for key in ("id", "y", "x", "touches_border")})
    table = pa.concat_tables(held) if held else empty
    known = [
        key for key in table.column_names
        if key not in NO_MEASURES and table[key].null_count < max(1, len(table))
    ]  # fmt: skip
    x = np.empty((len(table), len(known)), np.float32)
    for number, key in enumerate(known):
        x[:, number] = table[key].to_numpy()
    obs = pd.DataFrame(
        {key: table[key].to_numpy() for key in ("y", "x")}
        | {"touches_border": table["touches_border"].to_numpy().astype(bool)},
        index=table["id"].cast(pa.string()).to_pandas(),
    )
    um = image.pixel_size_um
    units = pd.DataFrame({"unit": [UNITS.get(key, "") for key in known]}, index=known)
    facts = _facts(image) | {"spatial_unit": "um" if um else "px"}
    place = (obs[["x", "y"]].to_numpy() + 0.5) * (um or 1)
    made = anndata.AnnData(x, obs, units, facts, obsm={"spatial": place})
    made.write_h5ad(path, compression="gzip", compression_opts=1)  # which R reads too


# --- read back


def read_columns(path: Path, columns: Sequence[str]) -> list[np.ndarray]:
    """Columns of a table of nuclei, float64 (n,) each, NaN where they are not known."""
    if path.suffix == ".parquet":
        with path.open("rb") as file:  # Arrow itself opens no name that is not UTF-8
            table = parquet.ParquetFile(file).read(list(columns))
    else:
        types = dict.fromkeys(columns, pa.float64())
        options = csv.ConvertOptions(include_columns=columns, column_types=types)
        with path.open("rb") as file:
            if file.readline().rstrip() == b"id":
                return [np.empty(0) for _ in columns]
            file.seek(0)
            table = csv.read_csv(file, convert_options=options)
    if not len(table):
        return [np.empty(0) for _ in columns]
    return [table[column].cast(pa.float64()).to_numpy() for column in columns]


def read_ids(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 (n,) and areas in pixels float64 (n,) of a table of nuclei."""
    if path.suffix == ".h5ad":
        check_packages(["anndata"])
        import anndata

        table = anndata.read_h5ad(path)
        areas = table[:, "area_px"].X.ravel() if len(table) else np.empty(0)
        return table.obs_names.to_numpy().astype(np.int64), areas.astype(float)
    ids, areas = read_columns(path, ("id", "area_px"))
    return ids.astype(np.int64), areas


def check_packages(formats: Sequence[str]) -> None:
    """Raise InputError if a format needs a package that is not installed."""
    if "anndata" in formats and not find_spec("anndata"):
        raise InputError(
            "--export anndata: found no package anndata, expected it to write and read .h5ad; "
            "pip install -r requirements-anndata.txt (or -e '.[anndata]'), or export without it"
        )

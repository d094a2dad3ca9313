"""What is recorded of a finished image: its files, and the schema of `rows/<name>.json`."""

from typing import Annotated, Literal, NotRequired

from pydantic import Field, InstanceOf, with_config
from typing_extensions import TypedDict

from tissue.schema import CLOSED

# Every file of an image, by kind. None of the endings is the end of another, so that no two images
# share a file.
ENDINGS = {
    "prediction": "_prediction.png",
    "big_prediction": "_prediction.tif",
    "image": "_image.png",
    "overlay": "_overlay.png",
    "gt": "_gt.png",
    "errors": "_errors.png",
    "labels": "_labels.tif",
    "csv": "_nuclei.csv",
    "parquet": "_nuclei.parquet",
    "geojson": "_nuclei.geojson",
    "geojson_gz": "_nuclei.geojson.gz",
    "rois": "_rois.zip",
    "coco": "_coco.json",
    "anndata": "_nuclei.h5ad",
    "distance": "_distance.png",
    "big_distance": "_distance.tif",
    "density": "_density.tif",
    "density_picture": "_density.png",
    "tissue": "_tissue.png",
    "tissue_geojson": "_tissue.geojson",
    "review": "_review.csv",
    "review_geojson": "_review.geojson",
    "review_pictures": "_review.jpg",
}

# Those that people correct in their place.
EDITED = "csv", "geojson", "geojson_gz", "rois", "coco", "tissue_geojson"

Count = Annotated[int, Field(ge=0, le=10**12)]
Share = Annotated[float, Field(ge=0, le=1 + 1e-6)]  # sums of shares are rounded
Amount = Annotated[float, Field(ge=0, le=1e15)]


@with_config(CLOSED)
class ErrorCounts(TypedDict):
    """`counts` of `agreement.errors`."""

    matched: Count
    missed: Count
    spurious: Count
    merged_reference: Count
    merged_prediction: Count
    split_reference: Count
    split_prediction: Count


@with_config(CLOSED)
class Region(TypedDict):
    """What is counted in a region of an image, or in all of a class."""

    region: InstanceOf[str]  # its name, "" of all regions of a class together
    label: InstanceOf[str]  # its class, "" without
    area_px: Annotated[int, Field(ge=0, le=10**15)]
    nuclei: Count
    tissue_px: NotRequired[Annotated[int, Field(ge=0, le=10**15)]]  # of later versions
    nuclear_area_px: NotRequired[Amount]  # means, where there are nuclei
    haematoxylin_od: NotRequired[Annotated[float, Field(ge=-100, le=100)]]


@with_config(CLOSED)
class Row(TypedDict):
    """What is counted, measured and scored of an image; docs/counting.md has the columns."""

    image: InstanceOf[str]  # pydantic's own str would refuse a file name that is no UTF-8
    height: Annotated[int, Field(ge=1, le=10**11)]  # pixels
    width: Annotated[int, Field(ge=1, le=10**11)]
    contours: Count
    nuclei: Count
    nuclei_in_frame: Count
    tissue: Share
    seconds: Amount
    skipped: NotRequired[Share]
    expected_count_error: NotRequired[Amount]  # mean relative one of images that were not learned
    dropped: NotRequired[Count]  # nuclei without enough confidence
    tissue_mm2: NotRequired[Amount]
    nuclei_per_mm2: NotRequired[Amount]
    gt_contours: NotRequired[Count]
    gt_nuclei: NotRequired[Count]
    accuracy: NotRequired[Share]
    dice: NotRequired[Share]
    iou: NotRequired[Share]
    aji: NotRequired[Share]
    pq: NotRequired[Share]
    dq: NotRequired[Share]
    sq: NotRequired[Share]
    errors: NotRequired[ErrorCounts]
    excluded: NotRequired[dict[str, Amount]]  # area, by artefact and unit, such as pen_mm2
    outside: NotRequired[Share]  # of all regions, which are not looked at
    regions: NotRequired[list[Region]]
    regions_file: NotRequired[list[int]]  # its `inputs.file_mark`
    source: NotRequired[InstanceOf[str]]  # of the image, seen from the results; of later versions


@with_config(CLOSED)
class MadeWith(TypedDict):
    """All that an image's results depend on: where it is the same, they are."""

    checkpoint: str  # its SHA-256
    threshold: Annotated[float, Field(gt=0, lt=1)]
    tta: bool
    sizes: list[Amount]
    overlap: Count  # pixels
    split: dict[str, Amount]
    version: str
    # The image's own:
    pixel_size: Annotated[float, Field(gt=0)] | None  # micrometres
    bits: Annotated[int, Field(ge=8, le=16)] | None  # in use, of an image of 16
    files: list[list[int] | None]  # `inputs.file_mark` of image, mask, label map, regions, tissue
    tissue: NotRequired[Literal["found"]]  # where artefacts are looked for


@with_config(CLOSED)
class Mark(TypedDict):
    """By what a file is known again: where its time is another, by its bytes."""

    time: Annotated[int, Field(ge=0, le=10**20)]  # nanoseconds
    sha256: str


@with_config(CLOSED)
class Record(TypedDict):
    """`rows/<name>.json`."""

    row: Row
    made_with: MadeWith
    shown: dict[str, str]  # the settings as the page shows them
    files: dict[Literal[tuple(ENDINGS)], Annotated[int, Field(ge=1)]]  # bytes, by kind
    marks: NotRequired[dict[Literal[EDITED], Mark]]  # of later versions
    sha256: str  # of all the rest as JSON with sorted keys

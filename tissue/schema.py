"""What a file of ours must hold, said as a pydantic schema, a line where it does not; its seal."""

import hashlib
import json
import reprlib
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from tissue.files import InputError

# No text for a number, no 1 for true. CLOSED takes no keys but those it names.
OPEN = ConfigDict(strict=True, extra="allow")
CLOSED = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[Finite, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


def seal(content: dict) -> str:
    """SHA-256 of all that a JSON object says, whatever its order, but the seal in its "sha256"."""
    said = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode("ascii")).hexdigest()


def is_newer(version: Any, known: int) -> bool:
    """Whether the format's version in a file is one that only a later version of this writes."""
    return type(version) is int and version > known


def check_content(schema: TypeAdapter, content: Any, path: Path | str, advice: str) -> Any:
    """`content`, read from `path`, as `schema` has it.

    Raises InputError with the first fault: the key, what was found there and what was expected,
    then `advice`, what to do.
    """
    try:
        return schema.validate_python(content)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
    key = repr(".".join(map(str, fault["loc"])))[1:-1] or "its content"
    found = " ".join(reprlib.repr(fault["input"]).split())
    if fault["type"] == "missing":
        raise InputError(f"{path}: found no {key:.80}, expected it; {advice}")
    if fault["type"] == "extra_forbidden":
        raise InputError(f"{path}: found {key:.80}, expected no such key; {advice}")
    expected = fault["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    raise InputError(f"{path}: found {key:.80} {found:.80}, expected {expected}; {advice}")

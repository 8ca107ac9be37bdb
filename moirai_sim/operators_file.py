"""Operators files: one JSON object a line, the input of ``predict``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from moirai_sim.errors import InputError, did_you_mean
from moirai_sim.files import refuse_constant
from moirai_sim.graphs.operator import DTYPE_BITS

if TYPE_CHECKING:
    from moirai_sim.graphs.operator import Operator

MOST = 1e30
"""Operations or bytes of one operator; more is a mistake, and would not be a floating-point number for long."""
Shape = list[Annotated[int, Field(ge=0, le=2**40)]]


class OperatorLine(BaseModel):
    """One operator. Further keys are repeated in the output."""

    model_config = ConfigDict(extra="allow", strict=True, use_attribute_docstrings=True)

    name: str = ""
    op_type: Annotated[str, Field(min_length=1)]
    """ONNX operator type."""
    dtype: str = "float32"
    """Spelt as in a device's ``peak_flops``."""
    input_shapes: list[Shape]
    """A scalar has the shape []."""
    output_shapes: list[Shape]
    attributes: dict[str, Any] = {}
    """ONNX attributes."""

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str) -> str:
        if dtype not in DTYPE_BITS:
            raise ValueError(f"unknown data type '{dtype}'; {did_you_mean(dtype, list(DTYPE_BITS))}")
        return dtype


def read_operators(path: Path) -> list[tuple[dict[str, Any], Operator]]:
    """Return every line of an operators file as it stands, with the operator that it describes.

    Raises
    ------
    InputError
        With every line that is wrong, by file:line.
    """
    from moirai_sim.graphs.work import make_operator

    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # other separators may stand in a text
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read it ({error})") from error
    problems: list[str] = []
    found = []
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        place = f"{path}:{number}"
        try:
            line = json.loads(text, parse_constant=refuse_constant)
            form = OperatorLine.model_validate(line)
            operator = make_operator(
                form.name, form.op_type, form.input_shapes, form.output_shapes, form.attributes, form.dtype
            )
            if max(operator.flops, operator.read_bytes, operator.write_bytes) > MOST:
                problems.append(f"{place}: takes more than {MOST:.0e} operations or bytes; check its shapes")
            found.append((line, operator))
        except json.JSONDecodeError as error:
            problems.append(f"{place}:{error.colno}: not JSON ({error.msg}); write one object a line")
        except RecursionError:
            problems.append(f"{place}: nested too deeply; write one flat object a line")
        except ValidationError as error:
            for problem in error.errors():
                key = ".".join(map(str, problem["loc"]))
                problems.append(
                    f"{place}: {key}: {problem['msg'].removeprefix('Value error, ')}; see 'schema operators'"
                )
        except InputError as error:
            problems += [f"{place}: {problem}" for problem in error.problems]
        except ValueError as error:
            problems.append(f"{place}: not JSON ({error}); write finite numbers")
    if not found and not problems:
        problems.append(f"{path}: there is no operator in it; write one JSON object a line")
    if problems:
        raise InputError(problems)
    return found

"""YAML read safely into pydantic models, with every mistake reported at once and each with file:line:column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from moirai_sim.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import BaseModel

    Model = TypeVar("Model", bound=BaseModel)

Location = tuple[int | str, ...]
_MOST_VALUES = 1_000_000


class YamlDocument:
    """A parsed YAML file that knows the line and column of each of its values."""

    def __init__(self, path: Path) -> None:
        """Parse a file with the safe YAML 1.2 rules: no tag runs code, 1e6 is a number, duplicate keys are errors.

        Raises
        ------
        InputError
            If the file cannot be read or is no YAML mapping.
        """
        from ruamel.yaml import YAML
        from ruamel.yaml.error import MarkedYAMLError, YAMLError

        self.path = path
        self._repeated: list[str] = []
        """One line a repeated key; reported by `validate` together with everything else."""
        try:
            text = path.read_text(encoding="utf-8")
            yaml = YAML(typ="rt", pure=True)  # round trip: safe, and it keeps positions
            yaml.allow_duplicate_keys = True  # they are found here, all of them
            self._walk(yaml.compose(text), {})
            self.data = yaml.load(text)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot read it ({error})") from error
        except RecursionError as error:
            raise InputError(f"{path}: nested too deeply; write a flatter file") from error
        except MarkedYAMLError as error:
            mark = error.problem_mark
            where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
            what = (error.problem or "not YAML").splitlines()[0]
            raise InputError(f"{where}: {what}; repair the YAML here") from error
        except YAMLError as error:
            raise InputError(f"{path}: not YAML ({error})") from error
        except ValueError as error:  # a date that is none, or a number of thousands of digits
            raise InputError(f"{path}: a value cannot be read ({error}); put quotes around it") from error
        if not isinstance(self.data, Mapping):
            raise InputError(f"{path}:1:1: must be a mapping of keys to values, read {type(self.data).__name__}")

    def _walk(self, node: Any, sizes: dict[int, int]) -> int:  # noqa: ANN401 - a node of ruamel.yaml, untyped
        """Note repeated keys, and return how many values a node has once its aliases are written out.

        Raises
        ------
        InputError
            If they are too many: a few lines of aliases of aliases can stand for billions of values.
        """
        if node is None:
            return 0
        if id(node) in sizes:
            if not sizes[id(node)]:
                line = node.start_mark.line + 1
                raise InputError(f"{self.path}:{line}: an alias stands inside of what it names; write it out")
            return sizes[id(node)]
        sizes[id(node)], size = 0, 1
        children = node.value if isinstance(node.value, list) else []
        seen: dict[str, int] = {}
        for child in children:
            key, value = child if isinstance(child, tuple) else (None, child)
            if key is not None:
                line, column = key.start_mark.line + 1, key.start_mark.column + 1
                if (text := str(key.value)) in seen:
                    what = f"key '{text}' is given in line {seen[text]} already; keep one of the two"
                    self._repeated.append(f"{self.path}:{line}:{column}: {what}")
                seen.setdefault(text, line)
            size += self._walk(value, sizes)
            if size > _MOST_VALUES:
                raise InputError(f"{self.path}: more than {_MOST_VALUES} values with its aliases; write a smaller file")
        sizes[id(node)] = size
        return size

    def place(self, location: Location) -> str:
        """Return ``file:line:column`` of the value at a path of keys and indices, or of its nearest parent."""
        line, column = 0, 0
        node: Any = self.data
        for key in location:
            try:
                if isinstance(node, Mapping) and key in node:
                    line, column = node.lc.key(key)  # type: ignore[attr-defined]
                elif isinstance(node, Sequence) and not isinstance(node, str) and isinstance(key, int):
                    line, column = node.lc.item(key)  # type: ignore[attr-defined]
                else:
                    break
                node = node[key]
            except (AttributeError, KeyError, IndexError, TypeError):
                break
        return f"{self.path}:{line + 1}:{column + 1}"

    def validate(self, model: type[Model]) -> Model:
        """Return the document as a pydantic model.

        Raises
        ------
        InputError
            With one line for every problem that pydantic finds.
        """
        from pydantic import ValidationError

        try:
            form = model.model_validate(plain(self.data))
        except ValidationError as error:
            raise InputError(self._repeated + [self._line(problem, model) for problem in error.errors()]) from error
        if self._repeated:
            raise InputError(self._repeated)
        return form

    def _line(self, problem: Mapping[str, Any], model: type[BaseModel]) -> str:
        location: Location = tuple(problem["loc"])
        dotted = ".".join(map(str, location))
        message = str(problem["msg"]).removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"unknown key '{location[-1]}'; {did_you_mean(str(location[-1]), _fields(model, location[:-1]))}"
        elif problem["type"] == "missing":
            message = f"missing key '{location[-1]}'; add it"
        elif problem["type"] != "value_error":
            message = f"{message}, read {problem.get('input')!r}"
        return f"{self.place(location)}: {dotted}: {message}" if dotted else f"{self.place(location)}: {message}"


def plain(node: Any) -> Any:  # noqa: ANN401 - any YAML value
    """Return a YAML value as plain dicts, lists and scalars."""
    if isinstance(node, Mapping):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, Sequence) and not isinstance(node, str):
        return [plain(value) for value in node]
    for scalar in (bool, int, float, str):  # ruamel wraps scalars to keep their spelling
        if isinstance(node, scalar):
            return scalar(node)
    return node


def _fields(model: type[BaseModel], location: Location) -> list[str]:
    """Return the keys that are known at a place of a nested model; all of the top model where it is not found."""
    from typing import get_args

    from pydantic import BaseModel as Base

    def models(annotation: Any) -> list[type[BaseModel]]:  # noqa: ANN401 - a type annotation
        if isinstance(annotation, type) and issubclass(annotation, Base):
            return [annotation]
        return [found for argument in get_args(annotation) for found in models(argument)]

    current = [model]
    for key in location:
        if isinstance(key, str):
            inner = [m for c in current if key in c.model_fields for m in models(c.model_fields[key].annotation)]
            current = inner or current
    return sorted({field.alias or name for c in current for name, field in c.model_fields.items()})

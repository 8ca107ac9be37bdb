"""Instances released with Moirai (arXiv 2312.04025): one spreadsheet of tasks, communication nodes and their times.

A row is a task: its successors (``dir_succ``), a communication node for each edge that carries data (``c_task``, in
the order of the successors), a time on each device (``p0``, ``p1``, ...), and for each communication node a time for
each ordered pair of devices (``pc01``: from device 0 to device 1). Cells with several values are comma lists. Times are
milliseconds. Memory (``mi`` of a task, ``m0``, ``m1``, ... of the devices) is in bits, and kept in bits, because
only the comparison of the two matters.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moirai_sim.errors import InputError
from moirai_sim.files import sha256
from moirai_sim.problem import UNLIMITED, PlacementProblem


def read_moirai_xls(path: Path) -> PlacementProblem:
    """Read a Moirai instance: operators named by their task ids, devices ``d0``, ``d1``, ...

    Rows without a numeric ``task`` end the table. Every edge with a communication node carries a tensor of its own;
    where ``c_task`` lists fewer nodes than there are successors, the last successors only wait. An empty memory cell
    is 0; a device without a memory column is unlimited.

    Raises
    ------
    InputError
        With every cell that cannot be read, by sheet, row and column.
    """
    sheet = _open(path)
    tasks = [sheet.task(row) for row in sheet.task_rows()]
    index: dict[str, int] = {}
    for i, task in enumerate(tasks):
        if task.name in index:
            sheet.problem(task.row, "task", f"task '{task.name}' stands in two rows; give it one")
        index.setdefault(task.name, i)
    edges: list[tuple[int, int, int]] = []
    transfers: list[list[int]] = []
    for i, task in enumerate(tasks):
        for position, successor in enumerate(task.successors):
            j = index.get(successor)
            if j is None:
                sheet.problem(task.row, "dir_succ", f"there is no task '{successor}'; name one of the column 'task'")
                continue
            carries = position < len(task.transfers_ns)
            edges.append((i, j, len(transfers) if carries else -1))
            if carries:
                transfers.append(task.transfers_ns[position])
    if not tasks:
        sheet.problem(sheet.header_row + 1, "task", "there is no task; the first row without a number ends the table")
    memory = [sheet.device_memory(k, tasks[0].row if tasks else 0) for k in range(sheet.n_devices)]
    if sheet.problems:
        raise InputError(sheet.problems)

    k = sheet.n_devices
    route_class = np.full((k, k), -1, dtype=np.int64)
    for c, (source, target) in enumerate(itertools.permutations(range(k), 2)):
        route_class[source, target] = c
    edges.sort()
    table = np.array(edges, dtype=np.int64).reshape(-1, 3)
    return PlacementProblem(
        name=path.stem,
        operators=tuple(index),
        operator_ns=np.array([task.times_ns for task in tasks], dtype=np.int64),
        weight_bytes=np.array([task.memory for task in tasks], dtype=np.int64),
        devices=tuple(f"d{i}" for i in range(k)),
        device_type=np.arange(k, dtype=np.int64),
        memory_bytes=np.array(memory, dtype=np.int64),
        edges=np.ascontiguousarray(table[:, :2]),
        edge_tensor=np.ascontiguousarray(table[:, 2]),
        tensor_bytes=np.full(len(transfers), -1, dtype=np.int64),
        route_class=route_class,
        transfer_ns=np.array(transfers, dtype=np.int64).reshape(len(transfers), k * (k - 1)),
        network="one-port",
        provenance={"format": "Moirai table", "file": path.name, "sha256": sha256(path), "memory_unit": "bits"},
    )


@dataclass
class _Task:
    row: int
    name: str
    successors: list[str]
    times_ns: list[int]
    """[k] on each device."""
    transfers_ns: list[list[int]]
    """[communication nodes][k * (k - 1)] in the order of ``itertools.permutations``."""
    memory: int


@dataclass
class _Sheet:
    """Cells of the sheet that holds the instance, by row number and column name."""

    path: Path
    name: str
    rows: Sequence[Sequence[object]]
    header_row: int
    columns: dict[str, int] = field(default_factory=dict)
    n_devices: int = 0
    problems: list[str] = field(default_factory=list)

    def problem(self, row: int, column: str, text: str) -> None:
        self.problems.append(f"{self.path}: sheet '{self.name}', row {row + 1}, column '{column}': {text}")

    def cell(self, row: int, column: str) -> object:
        position = self.columns.get(column, -1)
        return self.rows[row][position] if 0 <= position < len(self.rows[row]) else ""

    def task_rows(self) -> list[int]:
        following = range(self.header_row + 1, len(self.rows))
        return list(itertools.takewhile(lambda row: _number(self.cell(row, "task")) is not None, following))

    def task(self, row: int) -> _Task:
        successors = self._ids(row, "dir_succ")
        nodes = self._ids(row, "c_task")
        if len(nodes) > len(successors):
            self.problem(row, "c_task", f"{len(nodes)} communication nodes for {len(successors)} successors")
        transfers: list[list[int]] = [[] for _ in nodes]
        for source, target in itertools.permutations(range(self.n_devices), 2):
            for node, time in zip(transfers, self._times(row, _pair(source, target), len(nodes)), strict=True):
                node.append(time)
        return _Task(
            row=row,
            name=self._id(row, "task", self.cell(row, "task")),
            successors=successors,
            times_ns=[self._times(row, f"p{k}", 1)[0] for k in range(self.n_devices)],
            transfers_ns=transfers,
            memory=self._memory(row, "mi"),
        )

    def device_memory(self, device: int, first_row: int) -> int:
        column = f"m{device}"
        return self._memory(first_row, column) if column in self.columns else UNLIMITED

    def _times(self, row: int, column: str, expected: int) -> list[int]:
        """Return the milliseconds of a cell as whole nanoseconds; always ``expected`` many."""
        parts = _split(self.cell(row, column))
        if len(parts) != expected:
            what = f"{len(parts)} values for {expected}" if expected != 1 else f"needs one time in ms, read {parts}"
            self.problem(row, column, f"{what}; give one for each" if expected != 1 else what)
            return [0] * expected
        times = []
        for part in parts:
            value = _number(part)
            if value is None or value < 0 or value > 1e9:
                self.problem(row, column, f"needs a time in ms, at least 0, read {part!r}")
                value = 0.0
            times.append(round(value * 1e6))
        return times

    def _memory(self, row: int, column: str) -> int:
        cell = self.cell(row, column)
        value = 0.0 if _is_empty(cell) else _number(cell)
        if value is None or value < 0 or value > 2**62:
            self.problem(row, column, f"needs a size, at least 0, read {cell!r}")
            return 0
        return round(value)

    def _ids(self, row: int, column: str) -> list[str]:
        return [self._id(row, column, part) for part in _split(self.cell(row, column))]

    def _id(self, row: int, column: str, value: object) -> str:
        number = _number(value)
        if number is None or number != int(number):
            self.problem(row, column, f"needs whole numbers of tasks, read {value!r}; separate several by commas")
            return ""
        return str(int(number))


def _open(path: Path) -> _Sheet:
    """Find the sheet with the columns ``task`` and ``p0``, and the number of devices from its columns."""
    import python_calamine

    try:
        # From bytes, so that the content and not the suffix of the file says what it is.
        workbook = python_calamine.CalamineWorkbook.from_filelike(io.BytesIO(path.read_bytes()))
        sheets = {
            name: workbook.get_sheet_by_name(name).to_python(skip_empty_area=False) for name in workbook.sheet_names
        }
    except (OSError, python_calamine.CalamineError) as error:
        raise InputError(f"{path}: not a spreadsheet that can be read ({error}); save it again as .xls") from error
    for name, rows in sheets.items():
        for number, row in enumerate(rows[:32]):
            titles = [str(cell).strip() for cell in row]
            if "task" not in titles or "p0" not in titles:
                continue
            sheet = _Sheet(path, name, rows, number, {title: i for i, title in enumerate(titles) if title})
            sheet.n_devices = next(k for k in itertools.count(1) if f"p{k}" not in sheet.columns)
            needed = ["dir_succ", "c_task", "mi"]
            needed += [_pair(*pair) for pair in itertools.permutations(range(sheet.n_devices), 2)]
            missing = [title for title in needed if title not in sheet.columns]
            if missing:
                shown = ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
                raise InputError(f"{path}: sheet '{name}', row {number + 1}: missing columns {shown}; add them")
            return sheet
    raise InputError(f"{path}: no sheet has the columns 'task' and 'p0' of a Moirai instance; check the file")


def _pair(source: int, target: int) -> str:
    """Return the title of the transfer times between two devices; 10 or more devices need a separator."""
    return f"pc{source}{target}" if max(source, target) < 10 else f"pc{source}_{target}"


def _is_empty(cell: object) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _split(cell: object) -> list[object]:
    """Return the values of a cell: none, one number, or the parts of a comma list."""
    if isinstance(cell, str):
        return [part.strip() for part in re.split(r"[,，;；、]", cell) if part.strip()]
    return [] if cell is None else [cell]


def _number(cell: object) -> float | None:
    """Return a finite number, whether the cell holds it as a number or as text; None for anything else."""
    if isinstance(cell, bool) or not isinstance(cell, str | int | float):
        return None
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None

"""Cost models as folders: ``card.json`` for people, ``model.json`` and one ``.onnx.gz`` an ensemble for the machine.

Nothing in such a folder can run code: JSON is read as data, and ensembles are ONNX tree operators run by onnxruntime.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.clusters.cluster import DeviceType
from moirai_sim.costs import tiles
from moirai_sim.costs.card import known_errors
from moirai_sim.costs.families import describe
from moirai_sim.costs.features import KERNEL
from moirai_sim.costs.kernels import DOMAIN, Booster, FamilyModel, Rows, arithmetic, predict_rows
from moirai_sim.costs.model import CostModel, Prediction
from moirai_sim.errors import InputError
from moirai_sim.files import write_whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.costs.estimator import TimeEstimator
    from moirai_sim.graphs.operator import Operator

FORMAT = "moirai-sim/cost-model@2"
_READ = (FORMAT, "moirai-sim/cost-model@1")
"""Formats that can be read; in the first one sharp ensembles corrected shared ones, so a model of it must have none."""
_RENAMED = {"tile_points": "points", "tile_widths": "point_widths"}
"""Fields that models of an earlier version have by another name."""
_BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading a file of a model raises that does not hold what it should."""
_KEY = re.compile(r"[a-z-]+")
_CHUNK = 4096


def load_cost_model(name_or_dir: str | Path) -> CostModel:
    """Return a cost model of the catalog (``roofline`` among them) or of a folder.

    Raises
    ------
    InputError
        If there is no such model, or the folder does not hold a whole one.
    """
    if name_or_dir == "roofline":
        from moirai_sim.costs.roofline import Roofline

        return Roofline()
    from moirai_sim.catalog import find
    from moirai_sim.costs.measured import FILE, MeasuredModel

    folder = find("cost-models", name_or_dir)
    learned = LearnedModel(folder)
    return MeasuredModel(learned, folder, learned.devices) if (folder / FILE).is_file() else learned


def own_devices(name_or_dir: str | Path) -> tuple[dict[str, DeviceType], frozenset[str]]:
    """Return the devices that a stored model was fitted to, by name, and the names of those that its user profiled.

    Those of published measurements carry the catalog's data sheets. A model of links alone has no devices.

    Raises
    ------
    InputError
        If there is no such model, or it is broken.
    """
    from moirai_sim.catalog import find
    from moirai_sim.costs.measured import FILE

    if name_or_dir == "roofline":
        return {}, frozenset()
    folder = find("cost-models", name_or_dir)
    try:
        model, table = (
            json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"devices": {}}
            for path in (folder / "model.json", folder / FILE)
        )
        return _devices(model), frozenset(table["devices"])
    except _BROKEN as error:
        raise _broken(folder, error) from error


def _devices(content: Mapping[str, Any]) -> dict[str, DeviceType]:
    return {name: DeviceType(**sheet) for name, sheet in content["devices"].items()}


def _broken(folder: Path, error: Exception) -> InputError:
    return InputError(f"{folder}: does not hold a whole cost model ({error!r}); calibrate it again")


def save_cost_model(estimator: TimeEstimator, folder: Path, card: Mapping[str, Any]) -> None:
    """Write a fitted estimator, or one of a stored model, and its card into a folder.

    Raises
    ------
    InputError
        If the folder cannot be written.
    """
    families = {}
    for key, model in estimator.models_.items():
        plain = {k: v for k, v in vars(model).items() if k not in ("shared", "sharp", "kernels")}
        for part, booster in {"shared": model.shared, "sharp": model.sharp, **model.kernels}.items():
            plain[part] = None
            if booster is not None:
                plain[part], ensemble = _stored(f"{key}.{part}.onnx", booster)
                write_whole(folder / plain[part], ensemble)
        plain["kernels"] = {name: plain.pop(name) for name in model.kernels}
        families[key] = plain
    devices = {name: dataclasses.asdict(device) for name, device in estimator.devices_.items()}
    content = {"format": FORMAT, "devices": devices, "families": families}
    write_whole(folder / "model.json", json.dumps(content, indent=1, sort_keys=True) + "\n")
    write_whole(folder / "card.json", json.dumps(dict(card), indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def _stored(name: str, booster: Booster) -> tuple[str, bytes]:
    """Return the name and content of the file of an ensemble: as it is stored already, or converted to ONNX."""
    if isinstance(booster, Ensemble):
        return booster.path.name, booster.path.read_bytes()
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import FloatTensorType

    fitted = booster.__self__  # type: ignore[attr-defined]  # the bound method of a scikit-learn ensemble
    kind = [("x", FloatTensorType([None, fitted.n_features_in_]))]
    with warnings.catch_warnings():  # skl2onnx hands NumPy's integers to protobuf, which objects
        warnings.simplefilter("ignore")
        proto = convert_sklearn(fitted, name, initial_types=kind, target_opset={"": 21, "ai.onnx.ml": 3})
    return f"{name}.gz", gzip.compress(proto.SerializeToString(), mtime=0)


class LearnedModel:
    """A stored model. Ensembles are loaded when the first operator of their family is priced.

    Parameters
    ----------
    folder
        As `save_cost_model` writes it.
    stack
        Software stack to price for, where the model knows several for a device: as in its card. By default the one
        with most measurements.

    Raises
    ------
    InputError
        If the folder does not hold a whole model of a known format.
    """

    def __init__(self, folder: Path, *, stack: str = "") -> None:
        self.folder = folder
        self.name = folder.name
        self.stack = stack
        try:
            content = json.loads((folder / "model.json").read_text(encoding="utf-8"))
            sharp = any(plain["sharp"] for plain in content.get("families", {}).values())
            if content["format"] not in _READ[: 1 if sharp else 2]:
                raise InputError(f"{folder}: format is {content['format']!r}, not '{FORMAT}'; calibrate it again")
            self.devices = _devices(content)
            self.families = {key: self._family(key, plain) for key, plain in content["families"].items()}
        except _BROKEN as error:
            raise _broken(folder, error) from error

    def _family(self, key: str, plain: dict[str, Any]) -> FamilyModel:
        def stored(part: str, file: str) -> Ensemble:
            if not _KEY.fullmatch(key) or file not in (f"{key}.{part}.onnx", f"{key}.{part}.onnx.gz"):
                raise ValueError(f"impossible file name {file!r}")
            return Ensemble(self.folder / file)

        known = plain.get("kernels", {})
        kernels = {name: stored(name, known[name]) for name in KERNEL if name in known}
        if len(kernels) < len(known):
            raise ValueError(f"{key}.kernels: knows more than {', '.join(KERNEL)}")
        boosters = {
            "shared": stored("shared", plain["shared"]),
            "sharp": None if plain["sharp"] is None else stored("sharp", plain["sharp"]),
            "kernels": kernels,
        }
        renamed = {_RENAMED.get(name, name): value for name, value in plain.items()}
        model = FamilyModel(**{**renamed, **boosters})
        _check(key, model)
        return model

    @cached_property
    def card(self) -> Mapping[str, object]:
        """Return data, licence, hardware, stack, held-out errors and limits of use."""
        try:
            card: Mapping[str, object] = json.loads((self.folder / "card.json").read_text(encoding="utf-8"))
            known_errors(card)
        except _BROKEN as error:
            raise InputError(f"{self.folder / 'card.json'}: cannot be read ({error!r}); calibrate it again") from error
        return card

    def predict(self, operators: Sequence[Operator], device: DeviceType) -> Prediction:
        """Return the times of ``operators`` on ``device``; operators that do and move nothing cost 0."""
        out = np.zeros((3, len(operators)))
        flag = np.zeros(len(operators), dtype=bool)
        families, table = describe(operators)
        groups: dict[tuple[str, str], list[int]] = {}
        for i, (family, op) in enumerate(zip(families, operators, strict=True)):
            if op.read_bytes or op.write_bytes or op.flops:
                groups.setdefault((family, op.dtype), []).append(i)
        for (family, dtype), members in sorted(groups.items()):
            index = np.array(members)
            op_types = np.array([operators[i].op_type for i in members], dtype=np.object_)  # quicker than text
            rows = Rows(table[index], op_types, device, dtype, self.stack, index)
            found = predict_rows(self.families, self.devices, arithmetic(family, dtype, device.kind), rows)
            out[:, index], flag[index] = np.stack(found[:3]), found[3]
        return Prediction(out[0], out[1], out[2], flag)


def _check(key: str, model: FamilyModel) -> None:
    """Raise `ValueError` where a number or a name of a stored family is none; `LookupError` where one is missing."""
    bins = len(model.bins)
    numbers: dict[str, tuple[Any, tuple[int, ...]]] = {
        "bins": (model.bins, (bins,)),
        "domain": (model.domain, (2, len(DOMAIN))),
        "parts": (model.parts, ()),
        "alignment": (model.alignment, ()),
        **{f"widths.{kind}": (model.widths[kind], (bins + 1,)) for kind in ("random", "larger", "device")},
        **{f"launch_s.{name}": (model.launch_s[name], ()) for name in model.groups},
        **{f"ops.{name}": (ratio, ()) for name, ratio in model.ops.items()},
        **{f"corrections.{name}": (each, (len(each),)) for name, each in model.corrections.items()},
        **{f"tiles.{name}": (each, (len(tiles.PARAMETERS),)) for name, each in model.tiles.items()},
        **{f"point_widths.{name}": (width, ()) for name, width in model.point_widths.items()},
    }
    for name, points in model.points.items():
        count = len(points["stack"])
        at, missed = (f"points.{name}.{what}" for what in ("at", "missed"))
        numbers |= {at: (points["at"], (count, 4)), missed: (points["missed"], (count,))}
    for what, (value, shape) in numbers.items():
        found = np.asarray(value, dtype=np.float64)
        if found.shape != shape or not np.isfinite(found).all():
            raise ValueError(f"{key}.{what} is not {shape or 'a'} finite numbers")
    if not all(second > 0 for second in model.launch_s.values()):
        raise ValueError(f"{key}.launch_s: a kernel cannot start in no time")
    names = [*model.groups, *model.dtypes, *model.defaults.values(), *itertools.chain(*model.types.values())]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{key}: a group or data type is no text")


class Ensemble:
    """A tree ensemble in an ONNX file, loaded at its first use."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(str(path))
        self.path = path

    @cached_property
    def _session(self) -> Any:  # noqa: ANN401
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # starts sooner, and adds in one order whatever the batch and the machine
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it is a single node
        try:  # from bytes, so that no external data can be named
            content = self.path.read_bytes()
            if self.path.suffix == ".gz":
                content = gzip.decompress(content)
            return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises exceptions of its own, without a common base
            raise InputError(f"{self.path}: cannot be loaded ({error}); calibrate the model again") from error

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the log ratio of each row of ``x``, [n]; many rows are shared out among threads.

        Raises
        ------
        InputError
            If the ensemble was fitted to other features than those of this version.
        """
        session = self._session
        inputs = session.get_inputs()[0].shape[-1]
        if inputs != x.shape[1]:
            raise InputError(
                f"{self.path.parent}: takes {inputs} features of an operator where this version of moirai-sim has "
                f"{x.shape[1]}; fit it again with 'calibrate' from its profiles"
            )

        def price(start: int) -> NDArray[np.float64]:
            rows = x[start : start + _CHUNK]
            try:
                found = np.asarray(session.run(None, {"x": rows})[0], dtype=np.float64).reshape(len(rows))
            except Exception as error:  # of onnxruntime, or of what its answer is
                raise InputError(f"{self.path}: is no ensemble of ours ({error}); calibrate the model again") from error
            return found

        starts = range(0, max(len(x), 1), _CHUNK)
        if len(starts) == 1:
            return price(0)
        with ThreadPoolExecutor(min(os.cpu_count() or 1, len(starts))) as pool:
            return np.concatenate(list(pool.map(price, starts)))

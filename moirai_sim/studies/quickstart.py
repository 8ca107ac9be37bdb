"""The whole loop on this machine in a few minutes: profile, calibrate, place, simulate, measure, compare.

It is a small ``validate`` study over models that ship with the ``onnx`` package, followed by its report.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from moirai_sim.errors import InputError
from moirai_sim.files import write_whole
from moirai_sim.graphs.light import light_models
from moirai_sim.studies.report import report
from moirai_sim.studies.store import Store

MODELS = ("light_squeezenet", "light_bvlc_alexnet", "light_resnet50", "light_inception_v1")
"""Four architectures of different shape: fire modules, a chain, residual blocks, inception branches."""

STUDY = """\
# The study that `moirai-sim quickstart` runs; change it and run it again with: moirai-sim validate study.yaml -o DIR
kind: validate
name: quickstart
description: Four networks, a few placements each, predicted and measured on this machine.
models: {models}
clusters: [local-cpu]
policies: [single, heft, auto]
random_placements: 2
bad_placements: 1
calibrate: 30 s
repeats: 3
budget: 20 s
time_limit: 3 s
"""


def quickstart(out: Path) -> dict[str, Any]:
    """Run the quickstart study in a folder and write its report.

    Returns
    -------
    dict
        The summary of the validate study, with ``report``: the path of the HTML file, and ``study``: of the study file.

    Raises
    ------
    InputError
        If the folder holds another study.
    """
    from moirai_sim.studies.validate import validate

    known = light_models()
    study = out / "study.yaml"
    text = STUDY.format(models=json.dumps([str(known[name]) for name in MODELS]))
    Store(out).check("validate")
    if study.is_file() and _anywhere(study.read_text(encoding="utf-8")) != _anywhere(text):
        raise InputError(
            f"{study}: is another study; run it with 'moirai-sim validate', or name another folder with -o"
        )
    write_whole(study, text)
    summary = validate(study, out)
    page = out / "report.html"
    report(out, page)
    return summary | {"report": str(page), "study": str(study)}


def _anywhere(study: str) -> str:
    """Return a study file with the bare names of its models, which lie elsewhere in another environment."""
    return re.sub(r"[^\s\"',\[]*[/\\\\]", "", study)

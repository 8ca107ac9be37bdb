"""What names a run: everything that its result depends on."""

from pathlib import Path

import pytest

from moirai_sim.studies.runs import cluster_digest, model_files, source_digest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A cost model as ``validate`` leaves it, with times of whole models in a folder of its own."""
    folder = tmp_path / "model"
    (folder / "in-place").mkdir(parents=True)
    (folder / "card.json").write_text("{}")
    (folder / "in-place" / "net.json").write_text("1")
    (tmp_path / "two.yaml").write_text(
        "name: two\ndevices:\n"
        + "".join(f"  - {{name: c{i}, device: local-core, cost_model: {folder}}}\n" for i in range(2))
        + "links:\n  - {ends: [c0, c1], bandwidth: 4 GB/s, latency: 20 us}\n"
    )
    return folder


def test_all_files_of_a_cost_model_count_those_in_folders_too(model: Path):
    name, found = str(model.parent / "two.yaml"), []
    for content in "112":
        (model / "in-place" / "net.json").write_text(content)
        cluster_digest.cache_clear()
        model_files.cache_clear()
        found.append(cluster_digest(name))
    assert found[0] == found[1] != found[2]


def test_a_file_counts_by_its_content_and_the_sizes_behind_it(tmp_path: Path):
    for name in ("one.onnx", "other.onnx"):
        (tmp_path / name).write_bytes(b"x")
    plain, other, small, large = (
        source_digest(f"{tmp_path}/{name}")
        for name in ("one.onnx", "other.onnx", "one.onnx?batch=1", "one.onnx?batch=8")
    )
    assert plain == other
    assert len({plain, small, large}) == 3
    assert str(tmp_path) not in small

"""Reports: right figures, self-contained, and alive in a real browser."""

import html.parser
import json
import shutil
import subprocess
import sys

import pytest

from moirai_sim.studies import evaluate_report
from moirai_sim.studies.report import report
from moirai_sim.studies.store import Store
from moirai_sim.studies.tables import policies_table, runs_table

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def _outcome(ns, bound, status="feasible"):
    return {
        "status": status, "objective_ns": ns, "makespan_ns": ns, "lower_bound_ns": bound, "gap": 1 - bound / ns,
        "devices_used": 2, "operators": 30, "transfers": 4, "network": "one-port",
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """An evaluate folder: two problems, three policies, one failure."""
    store = Store(tmp_path / "results-folder")
    store.open({"kind": "evaluate", "name": "pair </script><script>alert(1)</script>", "description": ""})
    times = {("a", "single"): 40, ("a", "heft"): 30, ("a", "milp"): 20, ("b", "single"): 10, ("b", "heft"): 15}
    for model in "ab":
        for policy in ("single", "heft", "milp"):
            key = {
                "model": model, "cluster": None, "policy": policy, "network": None, "objective": "latency",
                "memory_scale": None, "seed": 0,
            }  # fmt: skip
            ms = times.get((model, policy))
            outcome = _outcome(ms * 10**6, 5 * 10**6) if ms else {"status": "error", "error": "stopped: <no answer>"}
            store.write(f"{model}-{policy}", key, outcome, 0.01)
    return store.folder


def test_tables_compare_answers_to_the_same_problem(folder):
    runs = runs_table(Store(folder)).set_index(["model", "policy"])
    assert runs.loc[("a", "heft"), "versus_best"] == pytest.approx(1.5)
    assert runs.loc[("b", "heft"), "versus_single"] == pytest.approx(1.5)
    policies = policies_table(runs.reset_index()).set_index("policy")
    assert policies.loc["heft", "versus_best"] == pytest.approx(1.5)
    assert policies.loc["single", "versus_best"] == pytest.approx(2**0.5)
    assert policies.loc["milp", "answered"] == 1


def test_report_is_one_file_without_outside_links(folder, tmp_path):
    page = tmp_path / "report.html"
    report(folder, page)

    class Links(html.parser.HTMLParser):
        outside = ()

        def handle_starttag(self, tag, attrs):
            self.outside += tuple(v for k, v in attrs if k in ("src", "href") and not v.startswith("data:"))

    text = page.read_text()
    links = Links()
    links.feed(text)
    assert links.outside == ()
    assert text.count("plotly.js v") == 1
    assert "<script>alert(1)</script>" not in text
    assert "&lt;no answer&gt;" in text
    assert page.stat().st_size < 6_000_000


PROBE = """
<script>
window.addEventListener("load", () => {
  const rows = () => [...document.querySelectorAll("table")].at(-1).tBodies[0].rows;
  const head = [...[...document.querySelectorAll("table")].at(-1).tHead.rows[0].cells];
  const column = head.findIndex(cell => cell.textContent === "objective ms");
  head[column].click();
  const found = [...rows()].map(row => row.cells[column].textContent);
  const drawn = document.querySelectorAll(".picture .main-svg").length;
  document.title = JSON.stringify({ found, drawn, pictures: document.querySelectorAll(".picture").length,
    errors: window.failures || [] });
});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")
def test_report_is_alive_in_a_browser(folder, tmp_path):
    page = tmp_path / "report.html"
    report(folder, page)
    text = page.read_text().replace(
        "<head>", "<head><script>window.failures=[];onerror=m=>{window.failures.push(String(m))};</script>", 1
    )
    page.write_text(text.replace("</body>", PROBE))
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=10000", "--dump-dom",
    ]  # fmt: skip
    done = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    title = done.stdout.split("<title>")[1].split("</title>")[0]
    found = json.loads(title)
    assert found["errors"] == []
    assert found["found"] == ["10", "15", "20", "30", "40", "–"]
    assert found["drawn"] >= found["pictures"] == 2


def test_a_folder_without_a_study_is_refused(tmp_path):
    from moirai_sim.errors import InputError

    with pytest.raises(InputError, match=r"no study\.json"):
        report(tmp_path, tmp_path / "report.html")
    assert sorted(tmp_path.iterdir()) == []


def test_reading_results_does_not_import_plotly(folder):
    code = "import sys; from pathlib import Path; from moirai_sim.studies.store import Store; "
    code += f"list(Store(Path({str(folder)!r})).read()); sys.exit('plotly' in sys.modules or 'pandas' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_models_of_one_file_name_have_a_row_each_in_the_picture(folder):
    store = Store(folder)
    for result in list(store.read()):
        key = result["key"] | {"model": f"/somewhere/{result['key']['model']}/net.onnx", "cluster": "/there/pair.yaml"}
        store.write(result["name"], key, result["outcome"], 0.01)
    built = evaluate_report.build({"kind": "evaluate", "name": "pair"}, store)
    (picture,) = (section.picture for section in built.sections if section.title == "Policy by problem")
    assert {label.partition(" · ")[0] for label in picture.data[0].y} == {"a/net", "b/net"}
    assert set(built.sections[-1].rows["cluster"]) == {"pair.yaml"}

"""Published formats, on small files of the same form whose right reading is worked out by hand."""

import json

import pytest
import xlwt

from moirai_sim.errors import InputError
from moirai_sim.instances.dnn_partitioning import read_dnn_partitioning
from moirai_sim.instances.moirai_xls import read_moirai_xls
from moirai_sim.instances.pipedream import read_pipedream
from moirai_sim.policies.run import place
from moirai_sim.problem import UNLIMITED, UNSUPPORTED
from moirai_sim.sources import load_problem, recognise
from moirai_sim.summary import summarise
from moirai_sim.verify import verify

HEADER = ["task", "c_task", "dir_succ", "dir_succ_add", "p0", "p1", "pc00", "pc01", "pc10", "pc11", "mi", "m0", "m1"]
ROWS = [
    [0, "", "1,2", "1,2", 0, 0, "", "", "", "", 0, 14, 16],  # edges without nodes only order
    [1, "4,5", "3,6", "4,5,3,6", 2.5, 0.0015, "0,0", "1.5, 0.25926", "2，3", "0,0", "", "", ""],
    ["2", 7, 3, "7,3", 1, 2, "0.0", "0.5", "1e-3", "0.0", 5.0, "", ""],  # numbers as text
    [3, "", "", "", 4, 4, "", "", "", "", 2, "", ""],
    [6, "", "", "", 1, 1, "", "", "", "", 0, "", ""],
    ["", "", "", "", "", "", "", "", "", "", "", "", ""],
    ["a remark", "", "", "", 9, 9, "", "", "", "", 9, "", ""],
    [8, "", "", "", 9, 9, "", "", "", "", 9, "", ""],  # after the end of the table
]


def write_xls(path, rows=ROWS, header=HEADER):
    book = xlwt.Workbook()
    book.add_sheet("notes").write(0, 0, "nothing here")
    sheet = book.add_sheet("instances")
    for r, row in enumerate([header, *rows]):
        for c, value in enumerate(row):
            if value != "":
                sheet.write(r, c, value)
    book.save(str(path))
    return path


def test_moirai_table(tmp_path):
    problem = read_moirai_xls(write_xls(tmp_path / "tiny.xls"))
    assert problem.operators == ("0", "1", "2", "3", "6")
    assert problem.devices == ("d0", "d1")
    assert problem.operator_ns.tolist() == [
        [0, 0],
        [2_500_000, 1500],
        [1_000_000, 2_000_000],
        [4_000_000, 4_000_000],
        [1_000_000, 1_000_000],
    ]
    assert problem.weight_bytes.tolist() == [0, 0, 5, 2, 0]
    assert problem.memory_bytes.tolist() == [14, 16]
    assert problem.edges.tolist() == [[0, 1], [0, 2], [1, 3], [1, 4], [2, 3]]
    assert problem.edge_tensor.tolist() == [-1, -1, 0, 1, 2]
    assert problem.tensor_bytes.tolist() == [-1, -1, -1]
    times = [[problem.transfer_time_ns(q, 0, 1), problem.transfer_time_ns(q, 1, 0)] for q in range(3)]
    assert times == [[1_500_000, 2_000_000], [259_260, 3_000_000], [500_000, 1000]]
    assert (problem.network, problem.evidence) == ("one-port", None)


def test_memory_of_a_moirai_table_is_in_bits(tmp_path):
    rows = [[0, "", "", "", 1, 1, "", "", "", "", 8_000_000, 9_000_000, 0]]
    path = write_xls(tmp_path / "one.xls", rows)
    assert summarise(str(path))["weight_bytes"] == 1_000_000
    problem = load_problem(path)
    wrong = verify(problem.with_memory_scale(0.5), place(problem, "single"))
    assert wrong == ["device 'd0' holds 8000000 bits of weights but has 4000000"]


def test_moirai_table_is_recognised_by_content(tmp_path):
    assert recognise(write_xls(tmp_path / "instance.onnx")) == "moirai"
    assert load_problem(tmp_path / "instance.onnx").n_operators == 5


@pytest.mark.parametrize(
    ("row", "column", "value", "expected"),
    [
        (1, "c_task", "4,5,9", "row 3, column 'c_task': 3 communication nodes for 2 successors"),
        (1, "dir_succ", "3,77", "row 3, column 'dir_succ': there is no task '77'"),
        (1, "dir_succ", "3,x", "row 3, column 'dir_succ': needs whole numbers of tasks, read 'x'"),
        (1, "pc01", "1.5", "row 3, column 'pc01': 1 values for 2"),
        (2, "pc10", "-1", "row 4, column 'pc10': needs a time in ms"),
        (2, "p1", "", "row 4, column 'p1': needs one time in ms"),
        (2, "p1", "fast", "row 4, column 'p1': needs a time in ms"),
        (3, "mi", "big", "row 5, column 'mi': needs a size"),
        (3, "task", 2, "row 5, column 'task': task '2' stands in two rows"),
        (3, "dir_succ", 1, "form a cycle"),
    ],
)
def test_moirai_table_names_the_cell_of_a_mistake(tmp_path, row, column, value, expected):
    rows = [list(r) for r in ROWS]
    rows[row][HEADER.index(column)] = value
    with pytest.raises(InputError) as caught:
        read_moirai_xls(write_xls(tmp_path / "bad.xls", rows))
    assert expected in str(caught.value)


def test_moirai_table_without_its_columns(tmp_path):
    with pytest.raises(InputError, match=r"missing columns pc01, pc10"):
        header = [title.replace("pc", "qc") for title in HEADER]
        read_moirai_xls(write_xls(tmp_path / "bad.xls", header=header))
    with pytest.raises(InputError, match="no sheet has the columns"):
        read_moirai_xls(write_xls(tmp_path / "bad.xls", header=["x"] * len(HEADER)))


def partitioning():
    def node(i, name, acc, cpu, size, **more):
        return {
            "id": i,
            "name": name,
            "supportedOnFpga": 1,
            "fpgaLatency": acc,
            "cpuLatency": cpu,
            "size": size,
            **more,
        }

    return {
        "maxFPGAs": 2,
        "maxCPUs": 1,
        "maxSizePerFPGA": 100.0,
        "nodes": [
            node(5, "a", 0.5, 5, 10.0, colorClass=7),
            node(7, "b", 1, 10.0, 20, colorClass=7),
            node(6, "c", 0, 0, 0, supportedOnFpga=False),
        ],
        "edges": [
            {"sourceId": 5, "destId": 7, "cost": 0.25, "size": 64},
            {"sourceId": 5, "destId": 6, "cost": 0.25, "size": 64.0},
        ],
    }


def write_json(tmp_path, document):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(document))
    return path


def test_dnn_partitioning(tmp_path):
    path = write_json(tmp_path, partitioning())
    instance = read_dnn_partitioning(path)
    assert instance.producer_cost_ns.tolist() == [250_000, 0, 0]
    problem = load_problem(path)
    assert problem.operators == ("a", "b", "c")
    assert problem.devices == ("acc0", "acc1", "cpu0")
    assert problem.device_type.tolist() == [0, 0, 1]
    assert problem.operator_ns.tolist() == [[500_000, 5_000_000], [1_000_000, 10_000_000], [UNSUPPORTED, 0]]
    assert problem.memory_bytes.tolist() == [100, 100, UNLIMITED]
    assert problem.colocation.tolist() == [0, 0, -1]
    assert problem.edges.tolist() == [[0, 1], [0, 2]]
    assert problem.edge_tensor.tolist() == [0, 0]
    assert problem.tensor_bytes.tolist() == [64]
    pairs = [(0, 1), (0, 2), (2, 0)]
    assert [problem.transfer_time_ns(0, a, b) for a, b in pairs] == [500_000, 250_000, 250_000]


def test_dnn_partitioning_with_repeated_names_stays_unique(tmp_path):
    document = partitioning()
    document["nodes"][1]["name"] = "a"
    assert read_dnn_partitioning(write_json(tmp_path, document)).operators == ("a#5", "a#7", "c#6")


def test_dnn_partitioning_reports_every_field(tmp_path):
    document = partitioning()
    document["nodes"][0]["fpgaLatency"] = -1
    del document["nodes"][1]["size"]
    document["edges"][0]["destId"] = 99
    document["maxCPUs"] = "1"
    with pytest.raises(InputError) as caught:
        read_dnn_partitioning(write_json(tmp_path, document))
    text = "\n".join(caught.value.problems)
    for expected in ('nodes[0]: "fpgaLatency"', 'nodes[1]: "size"', "edges[0]: names a node", '"maxCPUs"'):
        assert expected in text
    assert len(caught.value.problems) == 4


def test_dnn_partitioning_refuses_training_graphs(tmp_path):
    document = partitioning()
    document["nodes"][0]["isBackwardNode"] = 1
    with pytest.raises(InputError, match="isBackwardNode"):
        read_dnn_partitioning(write_json(tmp_path, document))


PIPEDREAM = """\
node2 -- ReLU(inplace) -- forward_compute_time=0.5, backward_compute_time=1.0, activation_size=16.0, parameter_size=0.0
node10 -- Linear(4, 2) -- forward_compute_time=0.000, backward_compute_time=0, activation_size=8.0, parameter_size=40.0
node1 -- LSTM(  (a): LSTM(1, 1) -- x) -- forward_compute_time=1.25, backward_compute_time=1.0, \
activation_size=[8.0; 4.0], parameter_size=12.0
\tnode1 -- node2
\tnode2 -- node10
\tnode1 -- node10
"""


def test_pipedream(tmp_path):
    path = tmp_path / "graph.txt"
    path.write_text(PIPEDREAM)
    graph = read_pipedream(path)
    assert graph.layers == ("node1", "node2", "node10")
    assert graph.descriptions[0] == "LSTM(  (a): LSTM(1, 1) -- x)"
    from moirai_sim.clusters.reader import read_cluster

    problem = load_problem(path, read_cluster("moirai-one-server"))
    assert problem.operator_ns.tolist() == [[1_250_000], [500_000], [0]]
    assert problem.weight_bytes.tolist() == [12, 0, 40]
    assert problem.edges.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert problem.edge_tensor.tolist() == [0, 0, 1]
    assert problem.tensor_bytes.tolist() == [12, 16]
    assert problem.network == "fair"


def test_pipedream_reports_every_line(tmp_path):
    path = tmp_path / "graph.txt"
    path.write_text(PIPEDREAM.replace("=0.5,", "=-1,") + "\tnode1 -- node77\nnonsense\n")
    with pytest.raises(InputError) as caught:
        read_pipedream(path)
    places = [problem.removeprefix(f"{path}:").partition(":")[0] for problem in caught.value.problems]
    assert places == ["1", "8", "7"]

"""Tables against results made by hand."""

import json

import pandas as pd
import pytest
from conftest import cell

from mixprec import tables
from mixprec.store import Store, write_json


def put(store: Store, one, acc: float, kl: float = 0.5, bits: float = 5.0) -> None:
    metrics = {task: {"acc": acc, "stderr": 0.02, "n": 50} for task in ("piqa", "mmlu")}
    write_json(
        store.folder(one) / "result.json",
        {
            "hash": one.hash, "config": one.settings, "metrics": metrics,
            "mean": {"acc": acc, "stderr": 0.0141, "n": 100},
            "recovery": {"reference": one.reference_path},
            "kl": {"mean": kl, "stderr": 0.03, "tokens": 4096, "top1": 0.9, "top1_stderr": 0.01},
            "realised_bits": bits, "realised_bits_with_scales": bits + 0.25,
        },
    )  # fmt: skip


@pytest.fixture
def results(tmp_path):
    store = Store(tmp_path)
    cells = {n: cell(f"baseline={n}") for n in ("bf16", "low", "ours", "head8", "tail8")}
    store.add_to_plan("demo", list(cells.values()))
    put(store, cells["bf16"], 0.5, 0.0, 16)
    put(store, cells["low"], 0.4, 1.4, 4)
    put(store, cells["ours"], 0.48125)
    store.start(cells["head8"])
    store.fail(cells["head8"], "ValueError: no luck")
    return tmp_path, store, cells


def test_accuracy_and_percent_of_bf16_as_the_report_prints_them(results, capsys):
    root, _, _ = results
    made = tables.render(root)["demo"]
    printed = tables.report_table(made)
    assert printed["smollm2_135m"].to_dict() == {
        "BF16": "0.5000 (100.0%)",
        "low (mxfp4)": "0.4000 (80.0%)",
        "tail8 5-bit": "—",
        "head8 5-bit": "—",
        "ours 5-bit": "0.4813 (96.2%)",
    }
    text = (root / "tables/demo.md").read_text()
    assert text in capsys.readouterr().out
    assert "0.4813 ± 0.0141" in text and "0.5000 ± 0.0300" in text and "5.250" in text
    assert "n: piqa 50, mmlu 50 documents; KL in nats per token over 4096 tokens" in text
    assert "- — smollm2_135m, head8 5-bit: failed: ValueError: no luck" in text
    assert "- — smollm2_135m, tail8 5-bit: not run" in text
    assert "de-quantized from a Q4_1 GGUF" in text and "head: the layers near lm_head" in text


def test_the_csv_holds_the_numbers(results):
    root, _, _ = results
    tables.render(root)
    table = pd.read_csv(root / "tables/demo.csv").set_index("row")
    assert table.loc["ours 5-bit", "acc"] == 0.48125
    assert table.loc["ours 5-bit", "percent_of_bf16"] == pytest.approx(96.25)
    assert table.loc["low (mxfp4)", "kl_mean"] == 1.4
    assert table.loc["tail8 5-bit", "reason"] == "not run"


def test_a_result_of_another_configuration_is_a_dash(results):
    root, store, _ = results
    store.add_to_plan("demo", [cell("baseline=ours", "calibration.seed=1")])
    text = tables.markdown("demo", tables.render(root)["demo"])
    assert "ours 5-bit: stored with another configuration" in text
    assert "0.4813" not in text


def test_no_bf16_no_percent(results):
    root, store, cells = results
    (store.folder(cells["bf16"]) / "result.json").unlink()
    printed = tables.report_table(tables.render(root)["demo"])["smollm2_135m"]
    assert printed["BF16"] == "—" and printed["ours 5-bit"] == "0.4813 (—)"


def test_models_are_columns_and_evaluations_are_sections(results, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "x")
    root, store, _ = results
    for name, acc in (("bf16", 0.7), ("ours", 0.63)):
        put(store, cell(f"baseline={name}", "model=llama31_8b"), acc)
        put(
            store,
            cell(f"baseline={name}", "model=llama31_8b", "options=w2g128_w4g128", "budget=3"),
            acc,
        )
    text = tables.markdown("all", tables.render(root)["all"])
    assert "## five-50, mxfp4_mxfp8" in text and "## five-all, mxfp4_mxfp8" in text
    assert "## five-all, w2g128_w4g128" in text
    assert text.count("0.6300 (90.0%)") == 2


def test_a_damaged_result_is_named_and_costs_no_table(results, capsys):
    root, store, cells = results
    (store.folder(cells["low"]) / "result.json").write_text("{")
    tables.render(root)
    assert "low: result.json cannot be read" in capsys.readouterr().err
    assert "ours 5-bit" in (root / "tables/demo.md").read_text()


def test_nothing_to_show_says_what_to_run(tmp_path, capsys):
    assert tables.main(["--results", str(tmp_path)]) == 1
    assert "make demo" in capsys.readouterr().err


def test_rows_stand_in_the_reports_order(results):
    root, store, _ = results
    for budget in ("6", "4.5"):
        put(store, cell("baseline=ours", f"budget={budget}"), 0.45)
    rows = list(tables.render(root)["all"].row)
    assert rows == ["BF16", "low (mxfp4)", "ours 4.5-bit", "ours 5-bit", "ours 6-bit"]
    assert json.loads((root / "plans/demo.json").read_text())["experiment"] == "demo"

"""Tables against results made by hand."""

import json
import shutil

import pandas as pd
import pytest
from conftest import ROOT, cell

from mixprec import published, tables
from mixprec.cell import ConfigError
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
    put(store, cells["bf16"], 0.5, -1e-9, 16)  # as rounding leaves it
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
        "BF16": "0.5000 ± 0.0141 (100.0 %)",
        "low (mxfp4)": "0.4000 ± 0.0141 (80.0 %)",
        "tail8 5-bit": "—",
        "head8 5-bit": "—",
        "ours 5-bit": "0.4813 ± 0.0141 (96.2 %)",
    }
    text = (root / "tables/demo.md").read_text()
    assert text in capsys.readouterr().out
    assert "-0.0000" not in text
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
    store.add_to_plan("table2", [cell("baseline=ours", "calibration.seed=1")])
    tables.render(root)
    text = (root / "tables/table2.md").read_text()
    assert "Ours: stored with another configuration" in text and "0.4813" not in text


def test_one_table_is_printed_alone_and_all_are_written(results, capsys):
    root, _, _ = results
    assert tables.main(["--results", str(root), "--only", "demo"]) == 0
    printed = capsys.readouterr().out
    assert "0.4813 ± 0.0141" in printed and "Audit" not in printed and "Table 2" not in printed
    assert (root / "tables/audit.md").is_file() and (root / "tables/table2.md").is_file()
    assert tables.main(["--results", str(root), "--only", "nope"]) == 2
    assert "only=nope: accepted: table1" in capsys.readouterr().err


def test_no_bf16_no_percent(results):
    root, store, cells = results
    (store.folder(cells["bf16"]) / "result.json").unlink()
    printed = tables.report_table(tables.render(root)["demo"])["smollm2_135m"]
    assert printed["BF16"] == "—" and printed["ours 5-bit"] == "0.4813 ± 0.0141 (—)"


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
    assert text.count("0.6300 ± 0.0141 (90.0 %)") == 4


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


# --- the report's tables -----------------------------------------------------------------------


def rows_of(text: str) -> list[list[str]]:
    """The cells of every line of every Markdown table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[part.strip() for part in line.strip("|").split("|")] for line in lines]


def one_section(root, name):
    return (root / f"tables/{name}.md").read_text()


def test_a_table_of_the_report_needs_results_and_nothing_else(results):
    """No plan of it: cells are found by the printed rows, the options and the budget."""
    root, _, _ = results
    tables.render(root)
    text = one_section(root, "table2")
    header, _, *lines = rows_of(text)
    assert header == ["", "llama31_8b", "qwen25_7b", "qwen3_8b", "smollm2_135m"]
    assert lines[:6] == [
        ["Tail layers 8-bit", "—", "—", "—", "—"],
        ["· published", "0.6671 (94.3 %)", "0.6616 (93.5 %)", "0.6410 (94.8 %)", "—"],
        ["Head layers 8-bit", "—", "—", "—", "—"],
        ["· published", "0.6657 (94.1 %)", "0.6686 (94.5 %)", "0.6356 (94.0 %)", "—"],
        ["Ours", "—", "—", "—", "0.4813 ± 0.0141 (96.2 %)"],
        ["· published", "0.6857 (96.9 %)", "0.6823 (96.4 %)", "0.6594 (97.5 %)", "—"],
    ]
    assert "Not run here: llama31_8b, qwen25_7b, qwen3_8b." in text
    assert "- — smollm2_135m, Tail layers 8-bit: not run" in text
    assert "n: piqa 50, mmlu 50 documents" in text and "5.250" in text and "0.5000 ± 0.0300" in text
    table = one_section(root, "table1")
    assert "Pure 4-bit   | —" in table and "0.4000 ± 0.0141 (80.0 %)" in table


def test_every_published_number_is_shown(results):
    root, _, _ = results
    tables.render(root)
    for name, printed in published.read().items():
        text = one_section(root, name) if printed.numbers else ""
        for number in printed.numbers:
            assert f"{number.accuracy} (" in text or f"{number.accuracy} " in text
            if number.percent is not None:
                assert f"{number.accuracy} ({number.percent:.1f} %)" in text


def test_a_difference_is_of_the_same_model_and_has_its_uncertainty(results, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "x")
    root, store, _ = results
    for name, acc in (("bf16", 0.7), ("ours", 0.68), ("tail8", 0.6571)):
        put(store, cell(f"baseline={name}", "model=llama31_8b"), acc)
    made = tables.render(root)["table2"].set_index(["eval", "model", "row"])
    ours = made.loc["five-all", "llama31_8b", "Ours"]
    assert ours.difference == pytest.approx(0.68 - 0.6857)
    assert ours.difference_stderr == ours.stderr == 0.0141
    assert ours.published_percent == 96.9
    assert pd.isna(made.loc["five-50", "smollm2_135m", "Ours"].difference)
    text = one_section(root, "table2")
    assert ["· difference", "-0.57 ± 1.41", "—", "—"] in rows_of(text)
    assert ["· difference", "-1.00 ± 1.41", "—", "—"] in rows_of(text)
    first, second = text.split("## five-all")
    assert "smollm2_135m" in first and "smollm2_135m" not in second
    assert "Not run here: qwen25_7b, qwen3_8b." in second


def test_no_difference_without_a_standard_error(results, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "x")
    root, store, _ = results
    one = cell("baseline=ours", "model=llama31_8b")
    put(store, one, 0.68)
    file = store.folder(one) / "result.json"
    result = json.loads(file.read_text())
    result["mean"]["stderr"] = None
    write_json(file, result)
    tables.render(root)
    assert "· difference" not in one_section(root, "table2")


def test_table_4_takes_the_group_size_that_fits_and_says_so(results):
    root, store, _ = results
    for name in ("tail4", "ours"):
        put(store, cell(f"baseline={name}", "options=w2_w4", "budget=3"), 0.3, 5.0, 3.0)
    tables.render(root)
    text = one_section(root, "table4")
    assert "0.3000 ± 0.0141 (60.0 %)" in text and "BF16 " in text
    assert "smollm2_135m: options w2g64_w4g64 where the report has w2g128_w4g128" in text
    assert "Printed under 4.5 average bits; run at 3" in text
    assert "w2g64_w4g64 where" not in one_section(root, "table2")


def test_percent_of_bf16_only_of_the_same_documents(results):
    root, store, cells = results
    file = store.folder(cells["bf16"]) / "result.json"
    result = json.loads(file.read_text())
    result["config"]["eval"]["seed"] = 7
    write_json(file, result)
    tables.render(root)
    assert "0.4813 ± 0.0141 (—)" in one_section(root, "table2")


def test_nothing_stored_goes_unseen(results, capsys):
    root, store, _ = results
    put(store, cell("baseline=random", "budget=7"), 0.44)
    tables.render(root)
    out = capsys.readouterr().out
    assert "Cells of no table above" in out and "random 7-bit" in out


def test_the_terminal_is_120_columns_wide_with_every_model(results, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "x")
    root, store, _ = results
    for model in ("llama31_8b", "qwen25_7b", "qwen3_8b", "qwen3_32b", "smollm2_135m"):
        for name in ("bf16", "low", "tail8", "head8", "ours"):
            put(store, cell(f"baseline={name}", f"model={model}", "eval.limit=50"), 0.6)
    capsys.readouterr()
    assert tables.main(["--results", str(root)]) == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if str(root) not in line) <= 120
    assert sum(line.count("0.6000 ± 0.0141 (100.0 %)") for line in out.splitlines()) >= 5 * 3


def test_make_tables_shows_the_audit(results, capsys):
    root, _, _ = results
    assert tables.main(["--results", str(root)]) == 0
    out = capsys.readouterr().out
    assert "4 findings:" in out and one_section(root, "audit") in out


def test_a_bad_table_file_ends_in_one_line(results, monkeypatch, tmp_path_factory, capsys):
    root, _, _ = results
    copy = tmp_path_factory.mktemp("copy") / "experiments"
    shutil.copytree(published.EXPERIMENTS, copy)
    (copy / "table2/table.yaml").write_text("title: [")
    with pytest.raises(ConfigError, match=r"^table2/table\.yaml: .*accepted keys"):
        tables.render(root, copy)


# --- between the markers of the README files ----------------------------------------------------


def test_a_readme_gets_the_table_between_its_markers(results):
    root, _, _ = results
    before = "a\n<!-- reproduced: table2 five-50 -->\nold\n<!-- /reproduced -->\nb\n"
    after = tables.with_reproduced(before, root)
    assert after.startswith("a\n<!--") and after.endswith("<!-- /reproduced -->\nb\n")
    assert "0.4813 ± 0.0141 (96.2 %)" in after and "old" not in after
    assert tables.with_reproduced(after, root) == after
    other = tables.with_reproduced(before.replace("five-50", "five-all"), root)
    assert "0.4813" not in other and "0.6857 (96.9 %)" in other and "Not run here:" in other
    assert tables.with_reproduced("no markers", root) == "no markers"
    summary = tables.with_reproduced(before.replace("table2", "all"), root)
    assert "| ours 5-bit" in summary and "| mxfp4_mxfp8 | 0.4813 ± 0.0141 (96.2 %)" in summary
    with pytest.raises(ConfigError, match="reproduced: table9: accepted: all, table1"):
        tables.with_reproduced(before.replace("table2", "table9"), root)


@pytest.mark.parametrize("file", tables.readmes(), ids=lambda file: file.parent.name)
def test_readmes_are_up_to_date(file):
    """After new results: `python -m mixprec.tables --readme`."""
    text = file.read_text(encoding="utf-8")
    assert tables.with_reproduced(text, ROOT / "results") == text


def test_every_table_has_its_place_in_its_readme():
    for name in published.read():
        text = (published.EXPERIMENTS / name / "README.md").read_text(encoding="utf-8")
        assert f"<!-- reproduced: {name} " in text and text.count("<!-- /reproduced -->") == 1

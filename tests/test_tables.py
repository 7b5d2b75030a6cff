"""Tables against results made by hand."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, cell

from mixprec import markup, paired, published, statistics, tables
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


# --- what is best, what differs, and LaTeX --------------------------------------------------------


def answered(store: Store, one, wrong: range, kl: float) -> None:
    """A cell that answers 250 documents of two tasks, all right but `wrong`; KL of 16 sequences."""
    right = ~np.isin(np.arange(250), wrong)
    put(store, one, float(right.mean()), kl)
    folder = store.folder(one)
    result = json.loads((folder / "result.json").read_text())
    result["provenance"] = {"documents": {"piqa": "a", "mmlu": "b"}, "heldout_text": "c"}
    result["kl"]["per_sequence"] = (kl * (1 + np.linspace(-0.1, 0.1, 16))).tolist()
    bits = {"n": 250, "correct": np.packbits(right).tobytes().hex()}
    for metric in result["metrics"].values():
        metric["n"] = 250
    write_json(folder / "result.json", result)
    write_json(folder / "correct.json", {"hash": one.hash, "tasks": {"piqa": bits, "mmlu": bits}})
    assert paired.read(folder, result) is not None


RULES = {"ours": range(60), "head8": range(30, 87), "tail8": range(100)}


@pytest.fixture
def compared(tmp_path):
    """ours, head8 a little better, tail8 much worse, at 5 bits; ours alone at 6."""
    store = Store(tmp_path)
    answered(store, cell("baseline=bf16"), range(50), 0.0)
    for name, wrong in RULES.items():
        answered(store, cell(f"baseline={name}"), wrong, 0.5 + (name == "tail8"))
    answered(store, cell("baseline=ours", "budget=6"), range(55), 0.3)
    return tmp_path


def test_the_best_of_a_budget_is_bold_and_what_differs_from_ours_has_a_sign(compared):
    tables.render(compared)
    rows = {row[0]: row[1:] for row in rows_of((compared / "tables/all.md").read_text())[:8]}
    assert rows["head8 5-bit"][0].startswith("**0.7720 ± 0.0141 (96.5 %, ")
    assert rows["head8 5-bit"][0].endswith(")**")  # 30 against 27 documents tell nothing
    assert rows["tail8 5-bit"][0].startswith("0.6000") and rows["tail8 5-bit"][0].endswith(") *")
    for alone in ("BF16", "ours 5-bit", "ours 6-bit"):
        assert "*" not in rows[alone][0]
    text = " ".join((compared / "tables/all.md").read_text().split())
    assert "Bold: the best of its options and budget." in text
    assert "1 of 2 in accuracy and 1 of 2 in KL" in text


def test_the_sign_is_that_of_holms_correction_and_the_csv_has_the_numbers(compared):
    made = tables.render(compared)["all"].set_index("row")
    stored, _ = tables.read(compared)
    of = {row.label: row.answers for row in stored.values()}
    names = ["tail8 5-bit", "head8 5-bit"]
    p = [statistics.p_value(of[name], of["ours 5-bit"]) for name in names]
    assert made.loc[names, "minus_ours_p"].tolist() == pytest.approx(statistics.holm(p))
    found = statistics.difference(of["head8 5-bit"], of["ours 5-bit"])
    columns = ["minus_ours", "minus_ours_low", "minus_ours_high"]
    expected = [found.value, found.low, found.high]
    assert made.loc["head8 5-bit", columns].tolist() == pytest.approx(expected)
    needed = statistics.documents_needed(of["head8 5-bit"], of["ours 5-bit"])
    assert made.loc["head8 5-bit", "documents_needed"] == needed > 250
    assert made.loc[["BF16", "ours 5-bit", "ours 6-bit"], "minus_ours_p"].isna().all()
    low, high = made.loc["ours 5-bit", ["percent_low", "percent_high"]]
    assert low < made.loc["ours 5-bit", "percent_of_bf16"] < high < 100


def test_a_paired_table_has_intervals_and_the_documents_that_are_needed(compared):
    tables.render(compared)
    text = (compared / "tables/table2.md").read_text()
    rows: dict[str, list[str]] = {}
    for row in rows_of(text):  # a wide table is broken into several
        rows.setdefault(row[0], []).extend(row[1:])
    accuracy, p, needed, kl = rows["Ours − Head layers 8-bit"]
    assert re.fullmatch(r"-1\.20 \(-\d\.\d\d to \+\d\.\d\d\)", accuracy) and float(p) >= 0.05
    assert int(needed.replace(",", "")) > 1000 and " to " in kl
    accuracy, p, needed, kl = rows["Ours − Tail layers 8-bit"]
    assert accuracy.startswith("+16.00 (+") and accuracy.endswith("*") and p == "<0.001"
    assert int(needed) < 50 and kl.startswith("-1.000 (-") and kl.endswith("*")
    assert "n needed: documents a task" in text


def test_where_nothing_can_be_told_the_legend_says_so(compared):
    store = Store(compared)
    answered(store, cell("baseline=tail8"), range(61), 0.5)
    tables.render(compared)
    for name in ("all", "table2"):
        text = " ".join((compared / f"tables/{name}.md").read_text().split())
        assert "0 of 2 in accuracy and 0 of 2 in KL" in text
        assert "no rule can be told from `ours` by its accuracy or KL" in text
    text = " ".join((compared / "tables/table1.md").read_text().split())
    assert "Nothing is compared with `ours`" in text and "Bold" not in text


def test_the_best_is_marked_in_each_budget_of_each_model_and_option_set(compared):
    """Against a group of its own: no cell is bold that another of its budget beats."""
    made = tables.render(compared)["all"]
    for _, cells in made[made.budget.notna()].groupby(["eval", "model", "options", "budget"]):
        best = cells.acc == cells.acc.max()
        assert cells.best.tolist() == (best if len(cells) > 1 else ~best & False).tolist()


def test_latex_is_balanced_escaped_and_has_booktabs_rules(compared):
    tables.render(compared)
    files = sorted((compared / "tables").glob("*.tex"))
    assert [f.stem for f in files] == [f.stem for f in sorted((compared / "tables").glob("*.md")) if f.stem != "audit"]  # fmt: skip
    for file in files:
        text = file.read_text()
        assert text.isascii()
        for environment in ("table", "tabular"):
            count = text.count(f"\\begin{{{environment}}}")
            assert count == text.count(f"\\end{{{environment}}}") > 0
        assert text.count(r"\toprule") == text.count(r"\bottomrule") == text.count(r"\midrule") > 0
        body = text.removeprefix("% needs \\usepackage{booktabs}\n")
        bare = re.sub(r"\\[\\&%$#_{}]", "", body)  # without what is escaped, and line ends
        assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
        labels = re.sub(r"\\label\{[^}]*\}", "", bare)
        assert not re.search(r"[%#_~^]", labels)
        for tabular in re.findall(
            r"\\begin\{tabular\}\{(l+)\}(.*?)\\end\{tabular\}", text, re.DOTALL
        ):
            lines = [line for line in tabular[1].splitlines() if line.endswith(r"\\")]
            assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(tabular[0]) - 1}
    text = (compared / "tables/table2.tex").read_text()
    assert r"\textbf{0.7720 $\pm$ 0.0141 (96.5 \%, 9" in text and r"smollm2\_135m" in text


def test_text_in_latex():
    assert (
        markup.in_latex("**0.1 ± 0.2 (97.9 %, 95–101)** *")
        == r"\textbf{0.1 $\pm$ 0.2 (97.9 \%, 95--101)} *"
    )
    assert (
        markup.in_latex("-1.2 to +0.3, KL ≤ 0.3, a_b & c")
        == r"$-$1.2 to +0.3, KL $\leq$ 0.3, a\_b \& c"
    )
    assert markup.in_latex("`x_y` — 4-bit − low") == r"\texttt{x\_y} --- 4-bit $-$ low"
    assert (
        markup.in_latex("\\{}$#~^")
        == r"\textbackslash{}\{\}\$\#\textasciitilde{}\textasciicircum{}"
    )


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

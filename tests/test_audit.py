"""The audit: what it finds in the printed tables, and that it finds what is planted in a copy."""

import csv
import re
import shutil
from itertools import product

import pytest
import yaml
from conftest import ROOT, cell
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixprec import audit, published
from mixprec.cell import ConfigError

PRINTED = published.read()
WITH_PERCENT = [
    (table.name, number.row, number.model)
    for table in PRINTED.values()
    for number in table.numbers
    if number.percent is not None
]


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(published.EXPERIMENTS, tmp_path / "experiments")
    return tmp_path / "experiments"


def change(folder, table, edit):
    """Apply `edit` to the lines of a table's CSV, a list of dictionaries."""
    file = folder / table / "published.csv"
    with file.open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    lines = edit(lines) or lines
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def line(lines, row, model):
    return next(one for one in lines if (one["row"], one["model"]) == (row, model))


def found(folder):
    return set(audit.findings(published.read(folder)))


def test_three_percentages_and_one_header():
    findings = audit.findings(PRINTED)
    assert {(f.kind, f.table, f.row, f.model) for f in findings} == {
        ("percent", "table1", "Ours 5-bit", "qwen3_32b"),
        ("percent", "table3", "Ours", "qwen25_7b"),
        ("percent", "table3", "Ours", "qwen3_8b"),
        ("average", "table4", "", ""),
    }
    text = audit.markdown(PRINTED)
    for number in ("98.36%", "95.77%", "96.84%", "can average 2 to 4", "4 findings"):
        assert number in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_percentage_wrong_in_two_ways_is_one_finding_with_both_reasons():
    (one,) = (f for f in audit.findings(PRINTED) if f.model == "qwen25_7b")
    assert len(one.reasons) == 2 and "table1, Ours 4.5-bit, prints 95.8%" in one.reasons[1]


def test_corrected_tables_have_no_findings(copy):
    for table, row, model, percent in (
        ("table1", "Ours 5-bit", "qwen3_32b", "98.4"),
        ("table3", "Ours", "qwen25_7b", "95.8"),
        ("table3", "Ours", "qwen3_8b", "96.8"),
    ):
        change(
            copy,
            table,
            lambda lines, row=row, model=model, percent=percent: line(lines, row, model).update(
                percent_of_bf16=percent
            ),
        )
    file = copy / "table4/table.yaml"
    file.write_text(re.sub(r"average_bits: 4\.5", "average_bits: 3", file.read_text()))
    assert not found(copy)
    assert "0 findings." in audit.markdown(published.read(copy))


on_a_copy = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@on_a_copy
@given(
    where=st.sampled_from(WITH_PERCENT),
    units=st.integers(10, 300).flatmap(lambda n: st.sampled_from([n, -n])),
)
def test_a_changed_accuracy_is_found(tmp_path_factory, where, units):
    """By a tenth of a point or more; in a BF16 row every percentage of that column tells."""
    table, row, model = where
    folder = tmp_path_factory.mktemp("copy") / "experiments"
    shutil.copytree(published.EXPERIMENTS, folder)

    def edit(lines):
        one = line(lines, row, model)
        one["accuracy"] = f"{float(one['accuracy']) + units / 10_000:.4f}"

    change(folder, table, edit)
    new = found(folder) - set(audit.findings(PRINTED))
    assert any(finding.model == model for finding in new)


@on_a_copy
@given(
    where=st.sampled_from(WITH_PERCENT),
    tenths=st.integers(1, 50).flatmap(lambda n: st.sampled_from([n, -n])),
)
def test_a_changed_percentage_is_found(tmp_path_factory, where, tenths):
    """Any change at all, unless it puts right what was wrong."""
    table, row, model = where
    folder = tmp_path_factory.mktemp("copy") / "experiments"
    shutil.copytree(published.EXPERIMENTS, folder)

    def edit(lines):
        one = line(lines, row, model)
        one["percent_of_bf16"] = f"{float(one['percent_of_bf16']) + tenths / 10:.1f}"

    change(folder, table, edit)
    assert found(folder) != set(audit.findings(PRINTED))


def test_a_changed_last_digit_is_found_where_two_tables_print_the_cell(copy):
    change(copy, "table2", lambda lines: line(lines, "Ours", "qwen3_8b").update(accuracy="0.6593"))
    (new,) = found(copy) - set(audit.findings(PRINTED))
    assert new.kind == "accuracy" and "table1, Ours 5-bit, prints 0.6594" in str(new)


def test_swapped_rows_are_found(copy):
    swap = {"Ours 5-bit": "Ours 6-bit", "Ours 6-bit": "Ours 5-bit"}

    def edit(lines):
        for one in lines:
            one["row"] = swap.get(one["row"], one["row"])

    change(copy, "table1", edit)
    new = found(copy) - set(audit.findings(PRINTED))
    assert {f.model for f in new if f.kind == "accuracy"} == {"llama31_8b", "qwen25_7b", "qwen3_8b"}


@pytest.mark.parametrize(
    ("table", "before", "after", "row", "says"),
    [
        ("table2", "average_bits: 5", "average_bits: 9", "", "can average 4 to 8"),
        ("table2", "average_bits: 5", "average_bits: 3.5", "", "can average 4 to 8"),
        ("table1", "average_bits: 6", "average_bits: 8.5", "Ours 6-bit", "can average 4 to 8"),
        ("table1", "low, average_bits: 4", "low, average_bits: 5", "Pure 4-bit", "only 4"),
    ],
)
def test_an_impossible_average_is_found(copy, table, before, after, row, says):
    file = copy / table / "table.yaml"
    file.write_text(file.read_text().replace(before, after))
    new = found(copy) - set(audit.findings(PRINTED))
    assert any((f.kind, f.table, f.row) == ("average", table, row) and says in str(f) for f in new)


def test_a_missing_model_a_missing_number_and_a_stranger_are_found(copy):
    change(copy, "table2", lambda lines: [one for one in lines if one["model"] != "qwen25_7b"])
    change(copy, "table4", lambda lines: [*lines[1:], lines[1] | {"model": "someone"}])
    new = found(copy) - set(audit.findings(PRINTED))
    assert {(f.table, f.model) for f in new} == {
        ("table2", "qwen25_7b"),
        ("table4", "llama31_8b"),
        ("table4", "someone"),
    }
    assert {f.kind for f in new} == {"layout"}


def test_a_percentage_without_a_bf16_accuracy_is_found(copy):
    change(copy, "table1", lambda lines: [one for one in lines if one["row"] != "BF16"])
    text = audit.markdown(published.read(copy))
    assert "of a BF16 accuracy that table1 does not print" in text


@pytest.mark.parametrize(
    ("file", "before", "after", "says"),
    [
        ("table2/published.csv", "0.6671", "0,6671", "accuracy=0: accepted: a number"),
        ("table2/published.csv", "0.6671", "nan", "line 2: accuracy=nan: accepted: a number"),
        ("table2/published.csv", "94.3", "-1", "percent_of_bf16=-1: accepted: a number"),
        ("table2/published.csv", "row,", "rows,", "accepted: the columns row, model"),
        ("table2/table.yaml", "tail8", "tial8", "accepted: bf16, "),
        ("table2/table.yaml", "mxfp4_mxfp8", "mxfp4_mxfp9", "accepted: schemes joined by _"),
        ("table2/table.yaml", "bf16: table1", "bf16: table9", "accepted: table1, table2"),
        ("table2/table.yaml", "models:", "modles:", "accepted keys: title, options"),
        ("table2/table.yaml", "average_bits: 5", "", "no average_bits; accepted: in the row"),
        ("table2/table.yaml", "title:", "#", "title: no value"),
        ("table2/table.yaml", "rows:", "rows: [", "accepted keys"),
    ],
)
def test_a_bad_file_ends_in_one_line(copy, file, before, after, says, capsys):
    path = copy / file
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(ConfigError) as error:
        published.read(copy)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert audit.main([str(copy)]) == 2
    assert capsys.readouterr().err.startswith("error: table2/")


@pytest.mark.parametrize("name", sorted(PRINTED))
def test_a_table_shows_the_cells_of_its_sweep(name):
    """What conf/experiment/ runs is what experiments/ lays out, BF16 aside."""
    sweep = yaml.safe_load((ROOT / f"conf/experiment/{name}.yaml").read_text())
    parameters = {k: str(v).split(",") for k, v in sweep["hydra"]["sweeper"]["params"].items()}
    assert parameters.pop("model") == (PRINTED[name].models or ["smollm2_135m"])
    for model in ("qwen3_8b", "smollm2_135m"):
        paths = {
            cell(
                f"experiment={name}",
                f"model={model}",
                *(f"{k}={v}" for k, v in zip(parameters, values, strict=True)),
            ).path
            for values in product(*parameters.values())
        }
        cells = {tuple(path.split("/")[2:]) for path in paths if not path.endswith("/bf16")}
        table = PRINTED[name]
        assert {options for options, _ in cells} <= set(table.options)
        assert {folder for _, folder in cells} == {
            row.folder for row in table.rows if row.baseline != "bf16"
        }

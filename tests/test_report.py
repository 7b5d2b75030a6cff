"""The report page and its figures: what stands in them, and what must not. No browser; tests/browser/ has one."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, cell, reseal

from mixprec import charts, figures, frontier, published, report, sections, statistics
from mixprec.store import Store

COMMITTED = ROOT / "results/five-250/smollm2_135m"
VOID = {"meta", "br", "input", "link", "img"}


class Page(HTMLParser):
    """Its elements as (tag, attributes), the text of every table cell, and what was never closed."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.open, self.rows, self.bad = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if self.open[-1] == tag:
            self.open.pop()
        else:
            self.bad.append(tag)

    def handle_data(self, data):
        if {"td", "th"} & set(self.open) and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def rows_of(self, name: str) -> list[list[str]]:
        rows = [[" ".join(text.split()) for text in row] for row in self.rows]
        return [row for row in rows if row and row[0] == name]


def html_of(results) -> str:
    return report.page(results)[0]


def copy(source, target, model: str, options: str | None = None, blocks: int = 30):
    """A committed cell as if it were another model's, of as many blocks, under five-all."""
    shutil.copytree(source, target)
    result = json.loads((target / "result.json").read_text())
    result["config"]["model"]["name"] = model
    result["config"]["eval"]["limit"] = None
    if options:
        result["config"]["options"] = {"name": options, "schemes": options.split("_")}
    parts = target.parts[-4:]
    result["recovery"]["reference"] = f"{parts[0]}/{model}/none/bf16"
    (target / "result.json").write_text(json.dumps(result))
    allocation = json.loads((target / "allocation.json").read_text())
    text = json.dumps(allocation["layers"])
    for old, new in zip((["w2g64", "w4g64", "w8g64"]), ["w2g128", "w4g128", "w8g128"], strict=True):
        text = text.replace(f'"{old}"', f'"{new}"') if options and "g128" in options else text
    layers = json.loads(text)
    allocation["layers"] = {
        re.sub(r"layers\.\d+", f"layers.{block}", name): scheme
        for block in range(blocks)
        for name, scheme in layers.items()
        if f".{block % 30}." in name
    }
    (target / "allocation.json").write_text(json.dumps(allocation))
    reseal(target)


def four_tables(root, models: dict[str, int]) -> None:
    """Results of `models` (name -> blocks) for all of the report's tables, and scores of each."""
    for model, blocks in models.items():
        place = root / "five-all" / model
        for options, new in (
            ("none", "none"), ("mxfp4_mxfp8", "mxfp4_mxfp8"),
            ("w2g64_w4g64", "w2g128_w4g128"), ("w4g64_w8g64", "w4g128_w8g128"),
        ):  # fmt: skip
            for source in sorted((COMMITTED / options).iterdir()):
                named = None if new == "none" else new
                copy(source, place / new / source.name, model, named, blocks)
        scores(root, model, blocks)


def scores(root, model: str, blocks: int) -> None:
    kept = json.loads((COMMITTED / "none/bf16/result.json").read_text())["provenance"]
    names = json.loads((COMMITTED / "mxfp4_mxfp8/ours-5/allocation.json").read_text())["layers"]
    modules = [name.split(".", 3)[3] for name in names if name.startswith("model.layers.0.")]
    layers = [f"model.layers.{b}.{module}" for b in range(blocks) for module in modules]
    random = np.random.default_rng(0)
    each = np.exp(random.normal(-6, 1, (len(layers), 2, 4))) * np.array([1, 0.05])[None, :, None]
    table = pd.DataFrame([(layer, f"mxfp{b}", b) for layer in layers for b in (4, 8)],
                         columns=["layer", "option", "bits"])  # fmt: skip
    samples = each.reshape(-1, 4)
    table["score"], table["stderr"] = samples.mean(1), samples.std(1, ddof=1) / 2
    table["per_sequence"] = list(samples)
    folder = root / "scores" / f"{model}-x"
    folder.mkdir(parents=True)
    table.to_parquet(folder / "scores.parquet")
    about = {"signal": "fisher", "model": model, "model_hash": kept["model_hash"],
             "options": ["mxfp4", "mxfp8"], "calibration": [4, 256],
             "lowest_kl": [1.4, 1.5], "seconds": {},
             "layers": {layer: [64, 64] for layer in layers}}  # fmt: skip
    (folder / "about.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """(page, sections) of the committed results, without anything that a run has left beside them."""
    root = tmp_path_factory.mktemp("committed")
    for name in ("five-250", "five-500"):
        shutil.copytree(ROOT / "results" / name, root / name,
                        ignore=shutil.ignore_patterns("status.json", "samples.parquet"))  # fmt: skip
    return report.page(root)


# --- the page ---------------------------------------------------------------------------------


def test_the_summary_is_what_the_statistics_say(committed):
    html, made = committed
    text = re.sub(r"<[^>]+>", "", re.search(r'<p class="lead">(.*?)</p>', html, re.DOTALL)[1])
    lines = {line.row.label: line for line in made[0].done}
    assert made[0].name == "smollm2_135m · mxfp4_mxfp8 · five-250"
    for budget in ("4.5", "5", "6"):
        fisher, own = (lines[f"{rule} {budget}-bit"].row for rule in ("fisher", "ours"))
        ratio = fisher.result["kl"]["mean"] / own.result["kl"]["mean"]
        points = statistics.difference(fisher.answers, own.answers)
        expected = f"At {budget} bits, fisher has {ratio:.2f} ("
        assert expected in text
        sentence = text.partition(expected)[2].partition(":")[0]
        ends = [f"{100 * end:.1f}".replace("-", "−") for end in (points.low, points.high)]
        assert f"{100 * points.value:+.1f} (" in sentence and all(e in sentence for e in ends)
        told = "not the accuracy" not in text.partition(expected)[2].partition(". At")[0]
        (p,) = [c.p for c in made[0].comparisons[f"{budget} bits"] if c.line.rule == "fisher"]
        assert told == (points.low > 0 and p <= statistics.ALPHA)
    assert "lambada_openai 250" in text and "mmlu 337" in text and "4096 tokens" in text


def test_a_ratio_of_kl_leaves_out_one_where_the_difference_leaves_out_zero(committed):
    _, made = committed
    compared = 0
    for section in made:
        for c in (c for each in section.comparisons.values() for c in each if c.ratio):
            compared += 1
            assert c.ratio.low < c.ratio.value < c.ratio.high
            assert sections.excludes(c.ratio, 1) == c.kl_clear
            by_hand = c.line.row.result["kl"]["mean"] / c.own.row.result["kl"]["mean"]
            assert c.ratio.value == pytest.approx(by_hand, rel=1e-6)
    assert compared > 10


def test_every_cell_and_every_printed_number_is_in_a_table_without_scripts(committed):
    html, made = committed
    page = Page(re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL))
    assert not page.bad and page.open == []
    assert not re.search(r"<[^>]* hidden[ >]", html.replace('class="readout" hidden', ""))
    fisher = next(line for line in made[0].done if line.row.label == "fisher 5-bit")
    differences, numbers, seconds = page.rows_of("fisher 5-bit")
    assert numbers[1:4] == [
        "5.000", report.with_span(fisher.accuracy, 4), report.with_span(fisher.recovery, 1, 100),
    ]  # fmt: skip
    assert numbers[2].startswith(f"{fisher.row.result['mean']['acc']:.4f} (0.")
    (own,) = (c for c in made[0].comparisons["5 bits"] if c.line is fisher)
    assert differences[1] == report.with_span(own.accuracy, 1, 100, True)
    assert seconds[-1] == f"{sum(fisher.row.result['seconds'].values()):.1f}"
    text = " ".join(" ".join(row) for row in page.rows)
    for table in published.read().values():
        for number in table.numbers:
            assert f"published {number.accuracy}" in text
    assert "not run" in text and "qwen3_32b" in text
    assert "98.3% printed, but 0.7201 / 0.7321" in html  # the audit
    assert "no predicted frontier behind them" in html  # no scores were copied


def test_it_asks_for_nothing_and_its_policy_lets_nothing_in(committed):
    html, _ = committed
    page = Page(html)
    fetching = {"src", "href", "srcset", "data", "action", "poster", "xlink:href"}
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "img", "base", "form"), tag
        for name in fetching & attributes.keys():
            assert attributes[name].startswith("#"), (tag, name, attributes[name])
        assert "style" not in attributes and not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttp|innerHTML", html)
    (policy,) = [a["content"] for t, a in page.elements if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'")
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert report._hash(text) in policy


def test_ids_are_unique_and_every_reference_has_its_target(committed):
    html, _ = committed
    page = Page(html)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids
        for name in ("href", "fill"):
            if match := re.fullmatch(r"(?:url\()?#([^)]+)\)?", attributes.get(name, "")):
                assert match[1] in ids


def test_what_comes_from_models_and_errors_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    store = Store(tmp_path)
    for name in ("ours-5", "fisher-5"):
        copy(COMMITTED / "mxfp4_mxfp8" / name, tmp_path / "five-all/m/mxfp4_mxfp8" / name, evil)
    for file in tmp_path.glob("*/*/*/*/result.json"):
        result = json.loads(file.read_text())
        result["provenance"]["hardware"]["cpu"] = result["config"]["eval"]["name"] = f'">{evil}'
        result["seconds"][evil] = 3.0
        file.write_text(json.dumps(result))
        reseal(file.parent)
    allocation = tmp_path / "five-all/m/mxfp4_mxfp8/ours-5/allocation.json"
    allocation.write_text(json.dumps({"layers": {f'model.layers.0.x" {evil}': f"mxfp4{evil}"}}))
    failed = cell("baseline=head8", "budget=5")
    store.start(failed)
    store.fail(failed, f"ValueError: {evil}'\" onload=x")
    html = html_of(tmp_path)
    assert evil not in html and html.count("<script>") == 1
    assert "&lt;script&gt;alert(1)" in html and "failed: ValueError: &lt;script&gt;" in html
    page = Page(html)
    assert not page.bad and not any(k.startswith("on") for _, a in page.elements for k in a)


def test_failures_what_was_not_run_and_half_results_are_said_and_break_nothing(tmp_path):
    store = Store(tmp_path)
    cells = [cell(f"baseline={n}", "budget=5") for n in ("bf16", "ours", "head8", "tail8", "low")]
    store.add_to_plan("demo", cells)
    bf16, ours, head8, tail8, low = cells
    for one, acc in ((bf16, 0.5), (ours, float("nan"))):
        folder = store.folder(one)
        folder.mkdir(parents=True)
        metrics = {"piqa": {"acc": acc, "stderr": None, "n": 1}}
        (folder / "result.json").write_text(json.dumps({
            "hash": one.hash, "config": one.settings, "metrics": metrics,
            "mean": {"acc": acc, "stderr": float("nan"), "n": 1}, "kl": None,
            "recovery": {"reference": bf16.path},
            "realised_bits": 5.0, "realised_bits_with_scales": 5.25,
        }))  # fmt: skip
    store.start(head8)
    store.fail(head8, "MemoryError: no luck")
    folder = store.folder(low)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{")
    html = html_of(tmp_path)
    page = Page(html)
    (head,), (tail,), (own,) = (page.rows_of(f"{n} 5-bit") for n in ("head8", "tail8", "ours"))
    assert "failed: MemoryError: no luck" in head and "not run" in tail and own[2] == "—"
    assert not re.search(r"\b(nan|None)\b", re.sub(r"<script>.*", "", html, flags=re.DOTALL))
    assert f"<code>{head8.path}</code> failed: MemoryError: no luck" in html
    assert f"<code>{low.path}</code> result.json cannot be read" in html
    assert f"<code>{tail8.path}</code> not run" in html


def test_results_of_two_models_and_four_tables_stay_small_and_have_their_frontier(tmp_path, monkeypatch):  # fmt: skip
    monkeypatch.setattr(frontier, "STEP", 0.5)
    four_tables(tmp_path, {"qwen3_8b": 36, "qwen3_32b": 64})
    html, made = report.page(tmp_path)
    assert len(html.encode()) < 3_000_000
    page = Page(html)
    assert not page.bad and "no predicted frontier" in html  # of the weight-only options alone
    assert html.count('class="curve curve-0 r-fisher"') == 4  # two models: the line and its key
    text = " ".join(" ".join(row) for row in page.rows)
    assert "published 0.7303; 99.8 %" in " ".join(text.split())
    assert len(made) == 6
    assert {line.published[0] for s in made for line in s.lines if line.published} >= {
        "table1, BF16", "table1, Ours 5-bit", "table2, Head layers 8-bit", "table3, Tail layers 8-bit",
        "table4, Tail layers 4-bit",
    }  # fmt: skip


def test_an_empty_folder_is_one_clear_line(tmp_path, capsys):
    assert report.main(["--results", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"no results in {tmp_path}/ yet" in err
    assert not list(tmp_path.iterdir())


def test_it_is_made_without_torch_from_stored_scores(tmp_path, monkeypatch):
    """As on a machine that has the results and nothing else."""
    for name in ("ours-5", "fisher-5"):
        copy(COMMITTED / "mxfp4_mxfp8" / name, tmp_path / "five-all/qwen3_8b/mxfp4_mxfp8" / name, "qwen3_8b", blocks=2)  # fmt: skip
    scores(tmp_path, "qwen3_8b", 2)
    code = (
        f"import sys; from mixprec import report; code = report.main(['--results', {str(tmp_path)!r}]);"
        "assert not {'torch', 'transformers', 'auto_round', 'lm_eval', 'wandb'} & set(sys.modules);"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    html = (tmp_path / "report.html").read_text()
    assert 'class="curve curve-0 r-fisher"' in html and "Score per layer" in html
    files = {file.name for file in (tmp_path / "figures").iterdir()}
    kinds = ("kl", "accuracy", "predicted", "seconds", "differences-5", "allocation-5", "scores")
    assert files == {
        f"five-all-qwen3_8b-mxfp4_mxfp8-{kind}.{of}" for kind in kinds for of in ("svg", "png")
    }
    assert html == html_of(tmp_path)  # another process, the same page


def test_figures_are_the_same_for_the_same_numbers(committed, tmp_path):
    _, made = committed
    one = [section for section in made if section.evaluation == "five-500"]
    first, second = (figures.draw(one, tmp_path / name) for name in "ab")
    assert len(first) == 12 and [f.name for f in first] == [f.name for f in second]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name


# --- parts ------------------------------------------------------------------------------------


def test_blocks_and_modules_of_a_name():
    assert charts.place("model.layers.12.mlp.up_proj") == (12, "mlp.up_proj")
    assert charts.place("transformer.h.3.attn.c_attn") == (3, "attn.c_attn")
    expert = "model.layers.4.mlp.experts.17.down_proj"
    assert charts.place(expert) == (4, "mlp.experts.*.down_proj")
    assert charts.short("mlp.experts.*.down_proj") == "experts.down"
    assert charts.place("classifier") == (0, "classifier")


def test_a_heat_map_shows_every_layer_once_and_experts_by_their_share():
    experts = {f"model.layers.0.mlp.experts.{i}.up_proj": "mxfp8" if i else "mxfp4" for i in range(4)}  # fmt: skip
    layers = experts | {"model.layers.0.self_attn.q_proj": "mxfp8", "model.layers.2.self_attn.q_proj": "mxfp4"}  # fmt: skip
    grid = charts.Grid.of(list(layers))
    assert grid.blocks == [0, 2] and grid.modules == ["mlp.experts.*.up_proj", "self_attn.q_proj"]
    shares = grid.shares(layers, ["mxfp4", "mxfp8"])
    assert shares == [[[0.25, 0.75], [0.0, 1.0]], [[], [1.0, 0.0]]]
    assert charts.runs(shares) == [(0, 0, 0, 0.25), (0, 1, 0.25, 2), (1, 0, 1, 2)]
    assert [[charts._code(c) for c in row] for row in shares] == [["m", "1"], ["-", "0"]]


@pytest.mark.parametrize(("low", "high", "log"), [
    (0.31, 0.43, False), (-12.4, 3.0, False), (0.06, 4.2, True), (1e-6, 0.2, True), (0.30, 0.31, True),
    (4, 4, False), (0.5, 0.5, True), (0, 700, False),
])  # fmt: skip
def test_an_axis_holds_its_values_and_has_a_few_round_ticks(low, high, log):
    axis = charts.axis([low, high], 300, 10, log=log)
    assert 10 <= axis.at(high) <= axis.at(low) <= 300
    ticks = axis.ticks
    assert 2 <= len(ticks) <= 9 and all(10 <= at <= 300 for at, _ in ticks)
    assert (
        len({text for _, text in ticks}) == len(ticks) and max(len(text) for _, text in ticks) < 8
    )


def test_no_two_rules_of_one_table_look_alike():
    seen = [charts.look(rule) for rule in charts.LOOK if not rule.endswith("4")]
    assert len(set(seen)) == len(seen)
    colours = [{place: look[place] for place in (0, 1)} for look in charts.LOOK.values()]
    for look in colours:
        assert contrast(look[0], "#f6f8fa") >= 3 and contrast(look[1], "#171d24") >= 3
    assert charts.look("a_new_rule")[0] == "r-other"
    assert charts.look("fisher, fused") == charts.look("fisher")  # it is drawn hollow


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_numbers_as_text():
    interval = statistics.Interval
    assert report.with_span(interval(0.038, 0.014, 0.061, 0.01), 1, 100, True) == "+3.8 (1.4–6.1)"
    assert report.with_span(interval(-0.004, -0.021, 0.013, 0.01), 1, 100, True) == "−0.4 (−2.1 to 1.3)"  # fmt: skip
    assert report.with_span(interval(-1e-9, -2e-9, 1e-9, 0), 3) == "0.000"
    assert report.with_span(interval(0.5, None, None, None)) == "0.500"
    assert report.with_span(None) == report.number(float("nan")) == "—"
    assert report.roughly(9067) == "9,100" and report.roughly(12) == "12"

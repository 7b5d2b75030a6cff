"""What a sweep shows: plain lines without control characters, or live lines; and the accuracy so far."""

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys

import pytest
import tqdm
import tqdm.auto
from conftest import CACHE, ROOT, cell, configuration, run, tiny_overrides

from mixprec import terminal
from mixprec.evaluate import so_far
from mixprec.store import Outcome


@pytest.fixture
def cells(tmp_path):
    """Three cells that are shown, of which none was measured before."""
    cfg = configuration(f"results='{tmp_path}'")
    shown = [cell(f"baseline={name}") for name in ("bf16", "low", "high")]
    terminal.start(shown, cfg)
    yield shown
    terminal.stop()


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def lines():
    return list(terminal._sweep.lines.values())


def test_bars_draw_nothing_while_a_sweep_runs_and_are_as_before_after_it(cells, capfd):
    terminal.begin(cells[0])
    for bar in (tqdm.tqdm, tqdm.auto.tqdm):
        for _ in bar(range(3), desc="of a library", mininterval=0):
            pass
    assert lines()[0].fraction == 1
    assert capfd.readouterr() == ("", "")
    terminal.stop()
    list(tqdm.tqdm(range(3), desc="of a library", mininterval=0))
    assert "of a library" in capfd.readouterr().err


def test_a_plain_line_says_how_far_a_cell_is_but_seldom(cells, clock, caplog):
    terminal.begin(cells[0])
    terminal.stage("evaluate")
    with caplog.at_level(logging.INFO, "mixprec"), tqdm.tqdm(total=100, mininterval=0) as bar:
        for _ in range(100):
            clock[0] += 1
            bar.update()
            terminal.so_far({"piqa": (40, 30), "winogrande": (10, 5)})
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 100 // (terminal.PLAIN_SECONDS + 1)
    assert said[0].startswith("  evaluate 31 %, accuracy so far 0.6250 ± ")
    assert "(n=50, 2 of 5 tasks), 1:0" in said[0] and "0 of 3 cells are over" in said[0]
    assert all("\r" not in line and "\x1b" not in line for line in said)


def test_what_is_left_comes_from_finished_cells_and_their_estimates(cells, clock):
    first, second, third = lines()
    assert [terminal._remaining(line) for line in lines()] == [None, None, None]
    terminal.begin(cells[0])
    clock[0] += 100
    terminal.end(Outcome(cells[0], "done"))
    assert terminal._remaining(second) == terminal._remaining(third) == 100
    terminal.begin(cells[1])
    clock[0] += 30
    assert terminal._remaining(second) == 70 and terminal._total().endswith("about 2:50 left")
    first.expected, second.expected, third.expected = 50, 80, 20  # this machine takes twice that
    assert terminal._remaining(second) == 130 and terminal._remaining(third) == 40


def test_a_bar_says_nothing_of_the_stage_after_its_own(cells):
    terminal.begin(cells[0])
    terminal.stage("allocate")
    list(tqdm.tqdm(range(3), mininterval=0))
    terminal.stage("quantize")
    assert lines()[0].fraction is None


def test_the_last_accuracy_so_far_is_the_result(tiny, tmp_path, monkeypatch):
    """Both engines answer in an order of their own; every document is counted once, by its own metric."""
    monkeypatch.setattr(so_far, "REPORT_SECONDS", 0)
    for engine in ("shared_prefix", "hf"):
        seen = []
        monkeypatch.setattr(terminal, "so_far", seen.append)
        done = run(
            tmp_path / engine, *tiny_overrides(tiny["qwen3"]), "baseline=bf16", "model.limit=6",
            "eval.tasks=[lambada_openai,piqa,winogrande]", "eval.kl.sequences=0",
            f"eval.engine={engine}",
        )  # fmt: skip
        result = json.loads((tmp_path / engine / done.cell.path / "result.json").read_text())
        expected = {task: (m["n"], m["acc"] * m["n"]) for task, m in result["metrics"].items()}
        assert {task: pytest.approx(counts) for task, counts in seen[-1].items()} == expected
        totals = [sum(n for n, _ in counts.values()) for counts in seen]
        assert totals == sorted(totals) and totals[0] < totals[-1] == 18
        assert terminal._mean(seen[-1])["acc"] == pytest.approx(result["mean"]["acc"])
        assert terminal._mean(seen[-1])["stderr"] == pytest.approx(result["mean"]["stderr"])


def test_the_table_at_the_end_has_every_cell_and_only_finished_ones_have_numbers(tiny, tmp_path):
    overrides = tiny_overrides(tiny["llama"])
    outcomes = [run(tmp_path, *overrides, "baseline=low")]
    assert outcomes[0].state == "done"
    outcomes.append(Outcome(cell(*overrides, "baseline=high"), "failed", "no memory"))
    text = terminal.table(outcomes, tmp_path)
    low, high = (
        next(x for x in text.splitlines() if x.startswith(f"| {name} ")) for name in ("low", "high")
    )
    assert re.search(r"\d\.\d{4}", low) and not re.search(r"\d\.\d", high)
    assert terminal.table(outcomes[1:], tmp_path) == ""


def command(tiny, results, *more: str) -> list[str]:
    folder = tiny["llama"]
    return [
        sys.executable, "run.py", "-m", *tiny_overrides(folder), "baseline=low,high", "tracking=off",
        f"results='{results}'", f"cache='{CACHE}'", *more,
    ]  # fmt: skip


def test_on_a_terminal_the_lines_are_live_and_the_table_is_printed_once(tiny, tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(tiny, tmp_path), cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "30"},
    )  # fmt: skip
    os.close(theirs)
    output = io.BytesIO()
    while True:
        try:
            if not (piece := os.read(ours, 65536)):
                break
        except OSError:  # the other end is closed
            break
        output.write(piece)
    assert process.wait() == 0
    text = output.getvalue().decode()
    assert "accuracy so far" in text and "cells are over" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
    end = text[text.rindex("\x1b[?25h") :]
    assert end.count("low (mxfp4)") == 1 and end.count("2 cells run") == 1
    assert text.count("low (mxfp4)") == 1
    assert "it/s]" not in text and "tok/s" not in text  # no bar of a library
    assert not re.search(r"\d\d:\d\d:\d\d   evaluate", text)  # what the lines say is not logged too

    piped = subprocess.run(command(tiny, tmp_path), cwd=ROOT, capture_output=True, text=True)
    assert piped.returncode == 0 and "0 cells run, 2 were stored" in piped.stdout
    assert "\x1b" not in piped.stdout + piped.stderr and "\r" not in piped.stdout + piped.stderr
    assert "[1/2] five-2/" in piped.stdout and piped.stdout.count("low (mxfp4)") == 1

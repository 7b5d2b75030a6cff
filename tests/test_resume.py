"""A cell that was stopped goes on where it was, and ends as if it had not been."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run, tiny_overrides

from mixprec import partial, runner
from mixprec.evaluate import kl, shared_prefix
from tests.faults.common import comparable

STOP_AFTER = 3  # batches


@pytest.fixture
def overrides(tiny):
    return [*tiny_overrides(tiny["llama"]), "model.limit=8", "baseline=tail8", "budget=5"]


def result_of(results, done):
    return json.loads((results / done.cell.path / "result.json").read_text())


class Stop(KeyboardInterrupt):
    pass


def stop_after(monkeypatch, batches):
    """Let the evaluation end after so many batches; the list of those that were computed."""
    original, computed = shared_prefix.SharedPrefixLM._scores, []

    def scores(self, *arguments):
        if len(computed) == batches:
            raise Stop
        computed.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(shared_prefix.SharedPrefixLM, "_scores", scores)
    return computed


@pytest.fixture
def stopped(overrides, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, STOP_AFTER)
        with pytest.raises(Stop):
            run(tmp_path / "stopped", *overrides)
    (place,) = (tmp_path / "stopped").rglob("partial")
    return tmp_path / "stopped", place


def test_finished_stages_are_taken_over_and_the_result_is_the_same(
    stopped, overrides, tmp_path, monkeypatch, caplog
):
    results, place = stopped
    with monkeypatch.context() as patch:
        patch.setattr(runner, "allocate", lambda *_: pytest.fail("allocated again"))
        patch.setattr(kl, "divergence", lambda *_: pytest.fail("KL again"))
        computed = stop_after(patch, None)
        with caplog.at_level("INFO", "mixprec"):
            resumed = run(results, *overrides)
    undisturbed = run(tmp_path / "whole", *overrides)
    ours, theirs = result_of(results, resumed), result_of(tmp_path / "whole", undisturbed)
    assert ours["resumed"] == ["allocate", "kl", f"{STOP_AFTER} batches of evaluate"]
    assert "resumed" not in theirs and len(computed) > STOP_AFTER
    assert comparable(ours) == comparable(theirs)  # the hashes of the other files are in it
    assert "allocate: taken from before" in caplog.text
    assert f"evaluate: {STOP_AFTER} batches are taken from before" in caplog.text
    assert not place.exists()


def test_batches_that_are_there_are_not_computed(stopped, overrides, tmp_path, monkeypatch):
    computed = stop_after(monkeypatch, None)
    run(stopped[0], *overrides)
    rest = len(computed)
    run(tmp_path / "whole", *overrides)
    assert len(computed) - rest == rest + STOP_AFTER


@pytest.mark.parametrize("key", ["code", "hardware"])
def test_stages_of_another_code_or_machine_do_not_count(stopped, overrides, key):
    results, place = stopped
    about = json.loads((place / "about.json").read_text())
    assert key in about
    (place / "about.json").write_text(json.dumps({**about, key: "another"}))
    assert "resumed" not in result_of(results, run(results, *overrides))


@pytest.mark.parametrize("damage", ["torn", "flipped", "another call"])
def test_answers_that_are_not_whole_are_computed_again(stopped, overrides, tmp_path, damage):
    results, place = stopped
    log = place / "answers-1.log"
    whole = log.read_bytes()
    assert whole.count(b"\n") == 1 + STOP_AFTER
    lines = whole.splitlines(keepends=True)
    kept, changed = {
        "torn": (STOP_AFTER - 1, whole[:-7]),
        "flipped": (1, b"".join([*lines[:2], lines[2].replace(b"-", b"+", 1), *lines[3:]])),
        "another call": (
            0,
            b"".join([partial._signed({"requests": "x", "size": 512}), *lines[1:]]),
        ),
    }[damage]
    log.write_bytes(changed)
    ours = result_of(results, run(results, *overrides))
    taken = [f"{kept} batches of evaluate"] if kept else []
    assert ours["resumed"] == ["allocate", "kl", *taken]
    assert comparable(ours) == comparable(
        result_of(tmp_path / "whole", run(tmp_path / "whole", *overrides))
    )


def test_an_answer_that_is_not_finite_is_not_kept(tmp_path):
    answers = partial.Answers(tmp_path / "log", "requests", 4)
    for number, value in enumerate((-1.5, float("nan"), -2.5)):
        answers.get(number)
        answers.add(number, [(value, True)])
    answers.close()
    again = partial.Answers(tmp_path / "log", "requests", 8)
    assert set(again.finished) == {0, 2} and again.get(2) == [(-2.5, True)]
    assert again.size == 4  # of the batches that are there, whatever the memory allows now
    again.close()


def test_lm_evals_own_engine_goes_on_too(tiny, tmp_path, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(partial, "CHUNK", 5)
    overrides = [*tiny_overrides(tiny["llama"]), "baseline=low", "eval.engine=hf"]
    original, calls = HFLM._loglikelihood_tokens, []

    def once(self, requests, **how):
        calls.append(len(requests))
        if len(calls) == 2:
            raise Stop
        return original(self, requests, **how)

    with monkeypatch.context() as patch:
        patch.setattr(HFLM, "_loglikelihood_tokens", once)
        with pytest.raises(Stop):
            run(tmp_path / "stopped", *overrides)
    ours = result_of(tmp_path / "stopped", run(tmp_path / "stopped", *overrides))
    assert ours["resumed"][-1] == "1 batches of evaluate"
    theirs = result_of(tmp_path / "whole", run(tmp_path / "whole", *overrides))
    assert comparable(ours) == comparable(theirs)


def test_a_few_of_each_fault(tmp_path):
    """Kills, runners side by side, a full disk, damaged files: tests/faults, in a process of its own."""
    log = tmp_path / "log"
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.few", "--log", str(log)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) >= 4 and sum(row.get("SIGKILL", 0) for row in rows)
    shutil.rmtree(tmp_path)

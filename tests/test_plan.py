"""What is said before a long run: sizes as published, states, times from stored results, problems."""

import dataclasses
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from conftest import CACHE, ROOT, cell, configuration, tiny_overrides

from mixprec import models, plan, provenance, runner
from mixprec.architecture import config_of
from mixprec.cell import SCHEMA, Model
from mixprec.estimate import GB, TOKENS, Machine, memory, seconds, size_of
from mixprec.store import Store, sealed, write_json

MODELS = ["llama31_8b", "qwen25_7b", "qwen3_8b", "qwen3_32b"]


@pytest.fixture(autouse=True)
def empty_hub(monkeypatch, tmp_path):
    """A hub's cache with nothing in it, no token, no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


def machine(memory_gb=64, gpus_gb=()):
    return Machine(int(memory_gb * GB), tuple(int(g * GB) for g in gpus_gb), provenance.hardware())


# --- sizes ------------------------------------------------------------------------------------

# As printed on the models' own pages, to the parameter (their model.safetensors.index.json / 2 bytes).
PUBLISHED = {
    "llama31_8b": 8_030_261_248,
    "qwen25_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
    "qwen3_32b": 32_762_123_264,
}


@pytest.mark.parametrize("name", MODELS)
def test_shipped_configurations_have_the_published_size(name):
    size = size_of(cell(f"model={name}").model)
    assert size.parameters == pytest.approx(PUBLISHED[name], rel=1e-3)
    assert size.parameters * 0.8 < size.quantized < size.parameters
    assert size.download == 2 * size.parameters


def test_the_shipped_configuration_is_that_of_the_packaged_weights():
    one = cell()
    loaded = models.load(models.checkpoint(one.model, CACHE), one.model)
    size = size_of(one.model)
    assert size.parameters == sum(p.numel() for p in loaded.parameters())
    assert size.quantized == sum(layer.weights for layer in models.quantized_layers(loaded))
    assert size.download == 0


def test_a_checkpoints_own_configuration_counts(tiny, monkeypatch, tmp_path):
    assert config_of(str(tiny["qwen3"]))["hidden_size"] == 64
    assert config_of("org/unknown") is None and size_of(Model(path="org/unknown")) is None
    downloaded = tmp_path / "hub/models--Qwen--Qwen3-8B/snapshots/abc"
    downloaded.mkdir(parents=True)
    (downloaded.parent.parent / "refs").mkdir()
    (downloaded.parent.parent / "refs/main").write_text("abc")
    for file in tiny["qwen3"].iterdir():
        if file.suffix != ".safetensors":
            (downloaded / file.name).write_bytes(file.read_bytes())
    model = cell("model=qwen3_8b").model
    assert models.in_hub_cache(model) is None  # its weights are not there
    (downloaded / "model.safetensors").write_bytes(b"")
    assert models.in_hub_cache(model) == downloaded
    size = size_of(model)
    assert size.hidden == 64 and size.download == 0


# --- memory -----------------------------------------------------------------------------------


def test_two_copies_of_32b_do_not_fit_one_gpu_and_one_does():
    one = cell("model=qwen3_32b", "baseline=ours")
    size, gpu = size_of(one.model), machine(128, [85])
    assert one.model.low_memory
    alone = memory(one, size, gpu, [])
    assert max(g for _, g in alone.values()) < 80 * GB
    assert max(c for c, _ in alone.values()) < 96 * GB
    both = dataclasses.replace(one, model=dataclasses.replace(one.model, low_memory=False))
    assert memory(both, size, gpu, [])["score"][1] > 85 * GB
    sizes = {"qwen3_32b": size}
    found = plan.problems([both], sizes, gpu, [], CACHE)
    assert any("GPU memory" in line and "model.low_memory=true" in line for line in found)
    assert not any("memory" in line for line in plan.problems([one], sizes, gpu, [], CACHE))
    elsewhere = plan.problems([both], sizes, machine(1), [], CACHE, here=False)
    assert not any("memory" in line for line in elsewhere)


def test_scoring_by_block_needs_a_block_and_not_the_model():
    overrides = ["model=qwen3_8b", "baseline=fisher", "budget=5"]
    size = size_of(cell(*overrides).model)
    for where, which, width in ((machine(500), 0, 4), (machine(500, [80]), 1, 2)):
        whole, by_block = (
            memory(cell(*overrides, f"model.low_memory={low}"), size, where, [])["score"]
            for low in (False, True)
        )
        assert whole[which] > width * size.parameters
        assert by_block[which] < 0.3 * width * size.parameters


def test_low_memory_is_not_part_of_a_cells_identity():
    assert cell("model.low_memory=true").hash == cell().hash == cell("plan=true").hash


# --- time -------------------------------------------------------------------------------------


def stored(root, one, weights):
    """A result as the runner writes it, of a machine on which every token of a weight takes as long."""
    limit = one.eval.limit
    counts = {task: 57 if task == "mmlu" and limit < 57 else limit for task in one.eval.tasks}
    tokens = sum(TOKENS[task] * n for task, n in counts.items())
    result = {
        "schema": SCHEMA,
        "config": one.settings,
        "hash": one.hash,
        "metrics": {task: {"n": n} for task, n in counts.items()},
        "quantized": {"weights": weights},
        "notes": {"autoscheme_scores_stored": False} if one.calibration else {},
        "seconds": {
            "load": 2.0, "reference": 7.0, "allocate": 50.0 if one.calibration else 0.0,
            "quantize": 1.0, "kl": 10.0, "evaluate": weights * tokens * 1e-11,
        },
        "peak_memory_bytes": {"cpu": int(2 * GB)},
        "provenance": {"hardware": provenance.hardware(), "arithmetic": "float32"},
    }  # fmt: skip
    write_json(root / one.path / "result.json", sealed(result, {}))
    return result


def test_time_is_measured_time_in_proportion_to_the_work(tmp_path):
    low, size = cell("baseline=low", "eval.limit=10"), size_of(cell().model)
    asked = cell("baseline=low", "eval.limit=30")
    assert seconds(asked, size, [], [], torch.float32) is None
    result = stored(tmp_path, low, size.quantized)

    def of(one, before=(), results=(result,)):
        return seconds(one, size, list(results), list(before), torch.float32)

    tokens = [30 * (77 + 164 + 44 + 25) + 57 * 106, 10 * (77 + 164 + 44 + 25) + 57 * 106]
    evaluate = result["seconds"]["evaluate"] * tokens[0] / tokens[1]
    assert of(asked) == pytest.approx(2 + 1 + 10 + evaluate)  # the reference is there
    assert of(asked, before=[low]) == pytest.approx(1 + 10 + evaluate)  # and the model is loaded
    other = cell("baseline=low", "eval.limit=30", "eval.kl.sequences=32")
    assert of(other) == pytest.approx(2 + 1 + 20 + 14 + evaluate)
    # Not measured: scoring, another arithmetic, another engine, an export.
    ours = cell("baseline=ours", "eval.limit=10")
    assert of(ours) is None
    assert seconds(asked, size, [result], [], torch.bfloat16) is None
    assert of(cell("baseline=low", "eval.limit=30", "eval.engine=hf")) is None
    assert of(cell("baseline=low", "eval.limit=30", "options=w4g64_w8g64")) is None
    # Scored once for all budgets; a model ten times as large takes ten times as long.
    scoring = stored(tmp_path, ours, size.quantized)
    first, second = cell("baseline=ours", "seed=1", "calibration.samples=32"), cell("budget=6")
    assert of(first, results=[result, scoring]) > 100
    assert of(second, results=[result, scoring]) < 50
    large = dataclasses.replace(size, quantized=10 * size.quantized)
    ten = seconds(other, large, [result], [], torch.float32)
    assert ten == pytest.approx(10 * of(other))


# --- the plan ---------------------------------------------------------------------------------


def test_a_plan_shows_states_times_and_problems(tmp_path, monkeypatch):
    results = tmp_path / "results"
    names = ["high", "low", "tail8", "head8"]
    cells = [cell(f"baseline={name}") for name in names]
    size = size_of(cells[0].model)
    stored(results, cells[0], size.quantized)
    write_json(results / cells[1].path / "result.json", {})
    Store(results).fail(cells[2], "ZeroDivisionError: division by zero")
    cfg = configuration(f"results='{results}'", f"cache='{CACHE}'", "plan=true")
    before = sorted(results.rglob("*"))
    shown = plan.text(cells, cfg)
    assert sorted(results.rglob("*")) == before
    states = {
        line.split()[0]: line.split()[1] for line in shown.splitlines()[1:6] if "five" in line
    }
    assert states == {
        cells[0].path: "stored", cells[1].path: "other",
        cells[2].path: "failed", cells[3].path: "missing",
    }  # fmt: skip
    assert "ZeroDivisionError: division by zero" in shown
    assert f"problem: {cells[1].path}: another result is stored there" in shown
    assert "0.13 B" in shown and "measured, 1 cells" in shown
    assert "2 of 4 cells to run: about" in shown and "from 1 cells measured" in shown
    assert max(map(len, shown.splitlines()[:15])) <= 100


def command(tmp_path, *arguments):
    done = subprocess.run(
        [sys.executable, "run.py", *arguments, f"results='{tmp_path}/here/results'",
         f"cache='{tmp_path}/here/cache'"],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_table1_is_planned_without_network_token_or_gpu(tmp_path):
    code, out, err = command(tmp_path, "-m", "experiment=table1", "plan=true")
    assert code == 0 and err == ""
    assert sum(line.startswith("five-all/") for line in out.splitlines()) == 20
    for size in ("8.03 B", "7.62 B", "8.19 B", "32.76 B", "65.5 GB"):
        assert size in out
    assert "problem: llama31_8b: meta-llama/Llama-3.1-8B-Instruct is gated" in out
    assert out.count("is not in the hub's cache, and HF_HUB_OFFLINE is set") == 4
    assert out.rstrip().endswith("20 of 20 cells to run; 20 not yet measured")
    assert not (tmp_path / "here").exists()


def test_a_run_refuses_what_the_plan_found(tmp_path):
    code, out, err = command(tmp_path, "model=llama31_8b", "baseline=low")
    assert code == 2 and out == ""
    lines = err.splitlines()
    assert all(line.startswith("error: llama31_8b: ") for line in lines) and len(lines) >= 2
    assert "gated on the hub and no token found" in lines[0]
    assert not (tmp_path / "here").exists()


def test_a_stored_sweep_asks_neither_hub_nor_machine(tmp_path, monkeypatch):
    from mixprec import sweep

    cfg = configuration("model=llama31_8b", "baseline=low", f"results='{tmp_path}'")
    one = cell("model=llama31_8b", "baseline=low")
    write_json(tmp_path / one.path / "result.json", {"config": one.settings, "hash": one.hash})
    monkeypatch.setattr(plan, "problems", lambda *_, **__: pytest.fail("asked"))
    sweep._check_machine([one], cfg, True)


@pytest.mark.parametrize("answer, said", [
    ("down", "the hub cannot be reached (ConnectionError)"),
    ("gated", "is gated and the token has no access to it"),
    ("fine", None),
])  # fmt: skip
def test_the_hub_is_asked_once(answer, said, monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub import constants, errors

    asked = []

    def model_info(self, path, **_):
        asked.append(path)
        if answer == "down":
            raise ConnectionError

    def auth_check(self, path):
        if answer == "gated":
            raise errors.GatedRepoError("no", response=no_access)

    no_access = types.SimpleNamespace(headers={}, request=None, status_code=403)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", auth_check)
    cells = [cell(f"model={name}", "baseline=low") for name in ("llama31_8b", "qwen3_8b")]
    sizes = plan.sizes_of(cells)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1e15))
    found = plan.problems(cells, sizes, machine(500), [], CACHE)
    assert len(asked) == (1 if answer == "down" else 2)
    assert len(found) == {"down": 2, "gated": 1, "fine": 0}[answer]
    assert all(said in line for line in found)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1e9))
    assert any(
        line.startswith("disk: 32.4 GB")
        for line in plan.problems(cells, sizes, machine(500), [], CACHE)
    )


# --- one copy at a time -----------------------------------------------------------------------


def test_low_memory_never_has_two_copies_and_changes_nothing(tiny, tmp_path, monkeypatch):
    import gc
    import weakref

    from conftest import run

    alive, most = [], []
    for name in ("load", "load_for_auto_round"):
        original = getattr(models, name)

        def counted(*arguments, original=original):
            model = original(*arguments)
            alive.append(weakref.ref(model))
            gc.collect()
            most.append(sum(ref() is not None for ref in alive))
            return model

        monkeypatch.setattr(models, name, counted)
    monkeypatch.chdir(tmp_path)
    found = {}
    for low_memory in (True, False):
        cache = tmp_path / f"cache-{low_memory}"  # its own: with stored scores nothing is loaded
        cache.mkdir()
        for name in ("documents", "datasets"):
            (cache / name).symlink_to(CACHE / name)
        runner.forget()
        alive.clear(), most.clear()
        results = tmp_path / f"results-{low_memory}"
        overrides = [*tiny_overrides(tiny["llama"]), "budget=5", f"model.low_memory={low_memory}"]
        done = run(results, *overrides, "baseline=ours", f"cache='{cache}'")
        result = json.loads((results / done.cell.path / "result.json").read_text())
        found[low_memory] = result["metrics"], result["kl"], result["realised_bits"]
        assert len(most) == (3 if low_memory else 2)
        assert max(most) == (1 if low_memory else 2)
    assert found[True] == found[False]

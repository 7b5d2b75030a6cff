"""Faults of models and services: each costs its own cell, in one line, and no result is stored of it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import CACHE, ROOT, run, tiny_overrides
from hub_server import Hub
from safetensors.torch import load_file, save_file

from mixprec import models
from mixprec.evaluate import harness, kl


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of its own: what a broken model leaves there must not meet another."""
    place = tmp_path_factory.mktemp("cache")
    for name in ("documents", "datasets"):
        (place / name).symlink_to(CACHE / name)
    return place


def sweep(*arguments: str, results, cache, before=None, **environment: str):
    """`python run.py -m ARGUMENTS`; before: called in the process before it begins."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "WANDB_"))}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "run.py", "-m", "tracking=off", *arguments, f"results='{results}'",
         f"cache='{cache}'"],
        cwd=ROOT, env=clean | {"OMP_NUM_THREADS": "1"} | environment, preexec_fn=before,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    done.seconds = time.perf_counter() - start
    done.failed = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    done.stored = sorted(str(f.parent.relative_to(results)) for f in results.rglob("result.json"))
    return done


def assert_only_one_failed(done, *, of: int, because: str):
    assert done.returncode == 1, done.stderr
    (line,) = done.failed
    assert because in line, line
    assert f"{of - 1} cells run, 0 were stored, 1 failed" in done.stdout
    assert len(done.stored) == of - 1 and "Traceback" not in done.stdout + done.stderr


# --- numbers that are none --------------------------------------------------------------------


def broken(folder, place, name: str, value: float):
    """A copy of the model whose weight `name` has one element `value`."""
    shutil.copytree(folder, place)
    weights = load_file(place / "model.safetensors")
    weights[name].view(-1)[5] = value
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    return place


FIRST, HEAD = "model.layers.0.input_layernorm.weight", "lm_head.weight"


@pytest.mark.parametrize(("weight", "value", "overrides", "says"), [
    (FIRST, float("nan"), [], "BF16 model's hidden states are not finite"),
    (FIRST, float("inf"), [], "BF16 model's hidden states are not finite"),
    (HEAD, float("nan"), [], "KL to BF16 is not finite: the model's logits are not"),
    (HEAD, float("inf"), ["eval.kl.sequences=0"], "log-likelihoods"),
    (FIRST, float("nan"), ["eval.kl.sequences=0"], "are not finite"),
    (FIRST, float("nan"), ["eval.kl.sequences=0", "eval.engine=hf"], "are not finite"),
    (FIRST, float("nan"), ["eval.kl.sequences=0", "baseline=fisher"], "score in mxfp4 is not finite"),
])  # fmt: skip
def test_what_is_not_finite_is_never_a_result(
    tiny, tmp_path, cache, weight, value, overrides, says
):
    folder = broken(tiny["llama"], tmp_path / "model", weight, value)
    results = tmp_path / "results"
    settings = [*tiny_overrides(folder), "baseline=low", f"cache='{cache}'", *overrides]
    outcome = run(results, *settings)
    assert outcome.failed and says in outcome.message
    assert outcome.message.startswith("FloatingPointError") and "\n" not in outcome.message
    assert not list(results.rglob("result.json"))
    status = json.loads((results / outcome.cell.path / "status.json").read_text())
    assert status["state"] == "failed" and status["error"] == outcome.message


def test_a_reference_that_is_not_finite_is_not_kept(tiny, tmp_path):
    class Broken(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(4, 8)

        def get_output_embeddings(self):
            return self.head

        def forward(self, row, use_cache):
            hidden = torch.full((1, row.shape[1], 4), float("inf"))
            return type("Output", (), {"logits": self.head(hidden)})

    file = tmp_path / "reference.safetensors"
    with pytest.raises(FloatingPointError, match="not finite"):
        kl.Reference.of(Broken(), torch.zeros(2, 3, dtype=torch.long), file)
    assert not file.exists()


# --- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "place"), [
    (torch.OutOfMemoryError("CUDA out of memory"), (models, "load")),
    (MemoryError(), (kl, "divergence")),
    (torch.OutOfMemoryError("CUDA out of memory"), (harness, "accuracy")),
])  # fmt: skip
def test_out_of_memory_costs_one_cell(tiny, tmp_path, monkeypatch, error, place):
    def fail(*_):
        raise error

    overrides = tiny_overrides(tiny["llama"])
    with monkeypatch.context() as patch:
        patch.setattr(*place, fail)
        outcome = run(tmp_path, *overrides, "baseline=low")
    assert outcome.failed and outcome.message.startswith(type(error).__name__)
    assert not list(tmp_path.rglob("result.json"))
    assert run(tmp_path, *overrides, "baseline=low").state == "done"


# --- documents and the hub --------------------------------------------------------------------


def test_a_broken_document_costs_one_cell(tiny, tmp_path):
    """A choice of piqa that is no text: lm-eval raises on it."""
    import pandas as pd

    own = tmp_path / "cache"
    shutil.copytree(CACHE / "documents", own / "documents")
    file = own / "documents/piqa/default/validation.parquet"
    documents = pd.read_parquet(file)
    documents["label"] = 7  # of two choices
    documents.to_parquet(file)
    done = sweep(
        *tiny_overrides(tiny["llama"]), "baseline=low", "eval.tasks=[piqa],[winogrande]",
        results=tmp_path / "results", cache=own,
    )  # fmt: skip
    assert_only_one_failed(done, of=2, because="IndexError")


def hub_of(folder, *names: str) -> Hub:
    hub = Hub()
    for name in names:
        hub.repositories[f"org/{name}"].commit(folder, "main")
    return hub


def sweep_from(hub: Hub, path: str, tmp_path, cache):
    return sweep(
        *tiny_overrides(path)[:1], f"model.path={path}", *tiny_overrides(path)[2:], "baseline=low",
        results=tmp_path / "results", cache=cache, HF_ENDPOINT=hub.endpoint,
        HF_HOME=str(tmp_path / "hf"), NO_PROXY="127.0.0.1,localhost",
        HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1",
    )  # fmt: skip


def test_a_hub_that_stops_answering_costs_one_cell(tiny, tmp_path, cache):
    """It says that the model is there, and then nothing: huggingface_hub's own client would wait on."""
    hub = hub_of(tiny["qwen3"], "stuck", "tiny")
    hub.answers["org/stuck"] = 1
    done = sweep_from(hub, "org/stuck,org/tiny", tmp_path, cache)
    hub.close()
    assert_only_one_failed(done, of=2, because="model.path=org/stuck: the hub at 127.0.0.1:")
    assert "did not answer in 1 s (HF_HUB_DOWNLOAD_TIMEOUT)" in done.failed[0]
    assert done.seconds < 60


def test_a_hub_that_accepts_and_never_answers_is_refused_before_a_cell_begins(tmp_path, cache):
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []
        threading.Thread(
            target=lambda: [held.append(server.accept()) for _ in range(20)], daemon=True
        ).start()
        done = sweep(
            *tiny_overrides("org/x"), "baseline=low", results=tmp_path / "results", cache=cache,
            HF_ENDPOINT=f"http://127.0.0.1:{server.getsockname()[1]}",
            HF_HOME=str(tmp_path / "hf"), NO_PROXY="127.0.0.1",
        )  # fmt: skip
    assert done.returncode == 2 and done.seconds < 30
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "ReadTimeout" in line
    assert not (tmp_path / "results").exists()

"""eval.engine=vllm: refused in one line where it cannot be; called as lm-eval's own class wants it."""

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CACHE, cell, configuration, tiny_overrides

from mixprec import sweep
from mixprec.cell import ConfigError, cell_of
from mixprec.evaluate import vllm

WEIGHT_ONLY = ("options=w2_w4", "budget=3", "eval.engine=vllm")


def pretend(patch, *, package: bool, gpu: bool) -> None:
    import torch

    find, here = importlib.util.find_spec, SimpleNamespace() if package else None
    patch.setattr(importlib.util, "find_spec", lambda name: here if name == "vllm" else find(name))
    patch.setattr(torch.cuda, "is_available", lambda: gpu)


def test_it_is_refused_where_it_cannot_be(monkeypatch):
    pretend(monkeypatch, package=False, gpu=True)
    with pytest.raises(
        ConfigError, match="vllm is not installed; accepted here: shared_prefix, hf"
    ):
        cell(*WEIGHT_ONLY)
    pretend(monkeypatch, package=True, gpu=False)
    with pytest.raises(ConfigError, match="no CUDA GPU is seen; accepted here: shared_prefix, hf"):
        cell(*WEIGHT_ONLY)
    pretend(monkeypatch, package=True, gpu=True)
    with pytest.raises(ConfigError, match="mxfp4_mxfp8 are rounded in memory and not exported"):
        cell("eval.engine=vllm")


def test_it_is_accepted_where_it_can_be(monkeypatch):
    pretend(monkeypatch, package=True, gpu=True)
    assert cell(*WEIGHT_ONLY).eval.engine == "vllm"
    assert cell("baseline=bf16", "eval.engine=vllm").options is None


def test_a_mix_within_what_vllm_fuses_is_refused():
    layers = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
              "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    allocation = {f"model.layers.{i}.{name}": "w2g64" for i in (0, 1) for name in layers}
    assert vllm.refusal(allocation) is None
    for alone in ("self_attn.o_proj", "mlp.down_proj"):
        assert vllm.refusal({**allocation, f"model.layers.1.{alone}": "w4g64"}) is None
    for fused in ("self_attn.v_proj", "mlp.up_proj"):
        why_not = vllm.refusal({**allocation, f"model.layers.1.{fused}": "w4g64"})
        assert "as one layer, and model.layers.1." in why_not and "\n" not in why_not
    together = {f"model.layers.1.self_attn.{p}_proj": "w4g64" for p in "qkv"}
    assert vllm.refusal({**allocation, **together}) is None


def test_lm_evals_class_accepts_what_it_is_given(tiny):
    """By its source: the module cannot be imported without vLLM."""
    one = cell("model=custom", f"model.path='{tiny['llama']}'", "model.bos=true")
    given = vllm.arguments(tiny["llama"], one.model, "bfloat16")
    file = Path(importlib.util.find_spec("lm_eval").origin).parent / "models/vllm_causallms.py"
    assert "lm_eval.models.vllm_causallms" not in sys.modules
    (of_class,) = (
        node
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef) and node.name == "VLLM"
    )
    init = next(n for n in of_class.body if getattr(n, "name", "") == "__init__")
    assert given.keys() <= {argument.arg for argument in init.args.args}
    assert given["add_bos_token"] is True and given["max_model_len"] == 4096
    assert given["trust_remote_code"] is False


def test_a_cell_hands_its_exported_folder_over(tiny, tmp_path, monkeypatch):
    """lm-eval's `hf` model in the place of vLLM, loading the folder by itself as vLLM would."""
    import torch
    from lm_eval.models.huggingface import HFLM

    loaded = []

    def stand_in(folder, model, dtype):
        loaded.append(Path(folder))
        return HFLM(str(folder), dtype=torch.float32, device="cpu", add_bos_token=model.bos)

    monkeypatch.setattr(vllm, "language_model", stand_in)
    where = [f"results='{tmp_path}'", f"cache='{CACHE}'", "tracking=off"]
    common = [*where, *tiny_overrides(tiny["llama"]), "budget=6",
              "options.name=w4g32_w8g32", "options.schemes=[w4g32,w8g32]"]  # fmt: skip

    def run(*overrides):
        cfg = configuration(*common, *overrides)
        with monkeypatch.context() as patch:
            pretend(patch, package=True, gpu=True)
            one = cell_of(cfg)
        return sweep.run_cell(one, cfg), tmp_path / one.path / "result.json"

    done, file = run("baseline=low", "eval.engine=vllm")
    assert done.state == "done" and not loaded[0].exists()  # it was there, and is gone
    by_vllm = json.loads(file.read_text())
    _, file = run("baseline=low", "force=true")
    ours = json.loads(file.read_text())
    assert by_vllm["metrics"] == ours["metrics"] and by_vllm["kl"] == ours["kl"]
    assert by_vllm["notes"] == ours["notes"] and not by_vllm["evaluated_tokens"]

    bf16, _ = run("baseline=bf16", "eval.engine=vllm")
    assert bf16.state == "done" and loaded[1] == Path(tiny["llama"])
    split, _ = run("baseline=random", "eval.engine=vllm")
    assert split.failed and "as one layer" in split.message and len(loaded) == 2

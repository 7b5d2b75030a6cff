"""eval.engine=vllm: refused in one line where it cannot be; called as lm-eval's own class wants it."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import cell

from mixprec.cell import ConfigError
from mixprec.evaluate import vllm

WEIGHT_ONLY = ("options=w2_w4", "budget=3", "eval.engine=vllm")


@pytest.fixture
def installed(monkeypatch):
    """As if the package were there; whether a GPU is, is another question."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: SimpleNamespace() if name == "vllm" else find(name),
    )


def test_it_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else True)
    with pytest.raises(
        ConfigError, match=r"vllm is not installed; accepted here: shared_prefix, hf"
    ):
        cell(*WEIGHT_ONLY)


def test_it_is_refused_without_a_gpu_and_accepted_with_one(installed, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA GPU is seen; accepted here: shared_prefix, hf"):
        cell(*WEIGHT_ONLY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cell(*WEIGHT_ONLY).eval.engine == "vllm"
    assert cell("baseline=bf16", "eval.engine=vllm").eval.engine == "vllm"
    with pytest.raises(ConfigError, match="mxfp4_mxfp8 are rounded in memory and not exported"):
        cell("eval.engine=vllm")


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

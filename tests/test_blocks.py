"""Scores of a checkpoint that is read block by block are those of the model in memory."""

import gc
import json
import weakref

import numpy as np
import pytest
import torch
from conftest import CACHE, _tiny_model, cell, run, tiny_overrides
from transformers import AutoModelForCausalLM

from mixprec import models
from mixprec.allocate import backward, fisher, modelopt, output_error, weight_error
from mixprec.allocate.blocks import Blocks
from mixprec.cell import ConfigError
from mixprec.quantize import InMemory
from mixprec.schemes import SCHEMES

MX = [SCHEMES["mxfp4"], SCHEMES["mxfp8"]]
INT = [SCHEMES["w2g32"], SCHEMES["w8g32"]]
SIGNALS = (fisher, modelopt, output_error, weight_error)
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
# Tied and untied heads, rotary embeddings that are scaled, biases, blocks with masks of their own,
# norms of queries and keys, experts.
VARIANTS = {
    "llama": {"rope_parameters": LLAMA_3},
    "llama tied": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {},
    "qwen3_moe": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
        "norm_topk_prob": True, "mlp_only_layers": [1],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """name -> folder of a tiny model whose biases and norms are random too, in several files."""
    folders = {}
    for name, more in VARIANTS.items():
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        _tiny_model(name.split()[0], folder, **more)
        model = AutoModelForCausalLM.from_pretrained(folder)
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="150KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
        folders[name] = folder
    return folders


def loaded(folder):
    one = cell(*tiny_overrides(folder))
    model = models.load(models.checkpoint(one.model, CACHE), one.model)
    layers = models.quantized_layers(model)
    InMemory(model)  # linears packed, as the runner has them
    return model, layers


def blocks_of(folder):
    return Blocks(folder, torch.float32, torch.device("cpu"))


def some_tokens(sequences=5, length=24):
    return torch.randint(3, 250, (sequences, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", VARIANTS)
def test_both_paths_give_the_same_scores(variants, name, monkeypatch):
    monkeypatch.setattr(backward, "TOKENS_AT_ONCE", 50)  # two sequences at a time, and one
    (model, layers), blocks, tokens = (
        loaded(variants[name]),
        blocks_of(variants[name]),
        some_tokens(),
    )
    for rule, schemes in [*((rule, MX) for rule in SIGNALS), (fisher, INT)]:
        ours = rule.score(blocks, tokens, layers, schemes)
        theirs = rule.score(model, tokens, layers, schemes)
        assert ours.shape == theirs.shape and np.isfinite(ours).all() and (ours > 0).any()
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6 * theirs.max())
    ours, theirs = (backward.divergences(of, tokens, layers, MX[0]) for of in (blocks, model))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_one_block_at_a_time_is_in_memory(variants, monkeypatch):
    blocks, _ = blocks_of(variants["qwen3"]), gc.collect()
    _, layers = loaded(variants["qwen3"])
    alive, most = [], []
    original = Blocks._filled

    def counted(self, module):
        gc.collect()
        most.append(sum(ref() is not None for ref in alive))
        filled = original(self, module)
        if module is not self._base.norm:
            alive.append(weakref.ref(filled))
        return filled

    monkeypatch.setattr(Blocks, "_filled", counted)
    for rule in (fisher, output_error):
        rule.score(blocks, some_tokens(), layers, MX)
    assert len(alive) == 3 + 3 + 3 and max(most) == 0
    assert all(parameter.is_meta for parameter in blocks._skeleton.parameters())


@pytest.mark.parametrize("baseline", ["fisher", "output_error", "weight_error"])
def test_with_low_memory_the_reference_is_gone_and_the_result_the_same(
    variants, tmp_path, monkeypatch, baseline
):
    references, seen = [], []
    load, score = models.load, fisher.score

    def counted(*arguments):
        model = load(*arguments)
        references.append(weakref.ref(model))
        return model

    rule = {"fisher": fisher, "output_error": output_error, "weight_error": weight_error}[baseline]
    score = rule.score

    def watched(model, *arguments):
        gc.collect()
        seen.append((type(model), sum(ref() is not None for ref in references)))
        return score(model, *arguments)

    monkeypatch.setattr(models, "load", counted)
    monkeypatch.setattr(rule, "score", watched)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/documents").symlink_to(CACHE / "documents")
    overrides = [*tiny_overrides(variants["qwen2"]), f"baseline={baseline}", "budget=5"]
    overrides += [f"cache='{tmp_path}/cache'", "eval.tasks=[piqa]"]
    found = {}
    for low_memory in (True, False):
        results = tmp_path / str(low_memory)
        outcome = run(results, *overrides, f"model.low_memory={low_memory}")
        assert outcome.state == "done", outcome.message
        place = results / outcome.cell.path
        found[low_memory] = json.loads((place / "allocation.json").read_text())["layers"]
        notes = json.loads((place / "result.json").read_text())["notes"]
        assert notes["scores_stored"] is not low_memory  # one key for both
    assert found[True] == found[False]
    assert seen == [(Blocks, 0)]


def test_another_architecture_is_refused_in_one_line(tiny, tmp_path):
    for file in tiny["llama"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tiny["llama"] / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    message = (
        "for llama, qwen2, qwen3, qwen3_moe, not for mistral; accepted: model.low_memory=false"
    )
    with pytest.raises(ConfigError, match=message):
        blocks_of(tmp_path)
    overrides = [*tiny_overrides(tmp_path), "baseline=fisher", "budget=5"]
    with pytest.raises(ConfigError, match=message):
        cell(*overrides, "model.low_memory=true")
    assert cell(*overrides).hash
    assert cell(*tiny_overrides(tmp_path), "baseline=tail8", "model.low_memory=true").hash
    with pytest.raises(ConfigError, match="not for a model's own code"):
        cell(
            *tiny_overrides(tiny["llama"]), "baseline=fisher", "budget=5", "model.low_memory=true",
            "model.trust_remote_code=true", "model.reason=a test",
        )  # fmt: skip


def test_a_weight_that_is_missing_is_named(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in tiny["qwen3"].iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).symlink_to(file)
    weights = load_file(tiny["qwen3"] / "model.safetensors")
    name = "model.layers.1.self_attn.q_norm.weight"
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=f"{name}: no such weight"):
        blocks_of(tmp_path).block(1)
    with pytest.raises(ConfigError, match=f"1 weights are missing, such as {name}"):
        loaded(tmp_path)


def test_a_layer_that_no_token_reaches_is_named(variants, monkeypatch):
    _, layers = loaded(variants["qwen3"])
    filled = Blocks._filled

    def skipped(self, module):
        block = filled(self, module)
        if module is self._base.layers[1]:
            block.mlp.forward = lambda x: x
        return block

    monkeypatch.setattr(Blocks, "_filled", skipped)
    for rule in (fisher, output_error):
        with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.gate_proj: no calibration token"):
            rule.score(blocks_of(variants["qwen3"]), some_tokens(), layers, MX)

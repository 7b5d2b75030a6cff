"""Experts are layers of their own: scored over the tokens that reach them, counted, quantized."""

import json

import numpy as np
import pytest
import torch
from conftest import CACHE, cell, run, tiny_overrides
from safetensors.torch import load_file
from test_fisher import MX, loaded, some_tokens
from test_quantize import by_auto_round, mixed
from transformers import AutoModelForCausalLM

from mixprec import experts, models, quantize
from mixprec.allocate import Request, allocate, backward, fisher
from mixprec.cell import ConfigError
from mixprec.schemes import SCHEMES, realised_bits

EVERY = 2 * 6  # experts of `tiny_moe`


def test_separate_experts_are_the_fused_ones(tiny_moe):
    """The same function, the same weights once, and the names that the checkpoint has."""
    fused = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)
    expected = fused(some_tokens()).logits
    storage = fused.model.layers[0].mlp.experts.gate_up_proj.untyped_storage().data_ptr()
    model = experts.separate(fused)
    torch.testing.assert_close(model(some_tokens()).logits, expected, rtol=1e-4, atol=1e-5)
    weight = model.model.layers[0].mlp.experts[5].up_proj.weight
    assert weight.untyped_storage().data_ptr() == storage
    layers = [layer.name for layer in models.quantized_layers(model)]
    stored = load_file(tiny_moe / "model.safetensors")
    assert set(layers) == {name.removesuffix(".weight") for name in stored if "_proj." in name}
    assert sum(experts.expert_of(name) is not None for name in layers) == 3 * EVERY
    assert experts.expert_of("model.layers.2.mlp.experts.11.up_proj") == (
        "model.layers.2.mlp.experts",
        11,
    )
    assert experts.expert_of("model.layers.1.mlp.gate_proj") is None


def test_an_experts_score_is_over_its_tokens_and_divided_by_all(tiny_moe):
    """½ Σ over the tokens that reach it of (g_t · (Q(W) Q(x_t) − W x_t))², in float64, ÷ all tokens."""
    model, layers = loaded(tiny_moe)
    tokens = some_tokens()
    found = fisher.score(model, tokens, layers, MX)
    exact, _ = loaded(tiny_moe)
    exact.double()
    reached = 0
    for place, layer in enumerate(layers):
        expert = experts.expert_of(layer.name)
        if expert is None or place % 2:
            continue
        module, seen = exact.get_submodule(layer.name), {}

        def note(_, inputs, output, seen=seen):
            seen["x"], seen["y"] = inputs[0].detach(), output.requires_grad_()

        hook = module.register_forward_hook(note)
        for sequence, row in enumerate(tokens):
            seen.clear()
            logits = exact(row[None]).logits
            if not seen:  # no token of this sequence reaches it
                assert (found[sequence, place] == 0).all()
                continue
            reached += len(seen["x"])
            signs = fisher.signs(logits[0].shape, [fisher.SEED, sequence, 0]).double()
            root = torch.softmax(logits[0].detach(), -1).sqrt()
            sent = root * signs - root**2 * (root * signs).sum(-1, keepdim=True)
            (g,) = torch.autograd.grad(logits, seen["y"], sent[None])
            for option, scheme in enumerate(MX):
                x = backward.round_mx(seen["x"].float(), scheme.bits).double()
                rounded = backward.round_weight(module.weight.float(), scheme).double()
                error = x @ rounded.T - seen["x"] @ module.weight.T
                expected = 0.5 * (g * error).sum(-1).square().sum().item() / tokens.shape[1]
                np.testing.assert_allclose(found[sequence, place, option], expected, rtol=3e-3)
        hook.remove()
    assert reached > 100


@pytest.mark.parametrize("baseline", ["fisher", "ours"])
def test_a_cell_counts_and_quantizes_every_expert(tiny_moe, tmp_path, baseline):
    overrides = [*tiny_overrides(tiny_moe), f"baseline={baseline}", "budget=5"]
    outcome = run(tmp_path, *overrides, "eval.tasks=[piqa]")
    assert outcome.state == "done", outcome.message
    place = tmp_path / outcome.cell.path
    allocation = json.loads((place / "allocation.json").read_text())["layers"]
    result = json.loads((place / "result.json").read_text())
    model, layers = loaded(tiny_moe)
    assert list(allocation) == [layer.name for layer in layers]
    assert set(allocation.values()) == {"mxfp4", "mxfp8"}
    assert result["realised_bits"] == realised_bits(layers, allocation) <= 5
    assert result["kl"]["mean"] > 0
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    quantize.InMemory(model, packed=False).apply(allocation)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) != (name.removesuffix(".weight") in allocation)


def test_rounded_experts_are_auto_rounds(tiny_moe, monkeypatch, tmp_path):
    model, _ = loaded(tiny_moe)
    allocation = mixed(model, "mxfp4", "mxfp8")
    reference = by_auto_round(tiny_moe, allocation, monkeypatch, tmp_path)
    quantize.InMemory(model).apply(allocation)
    for name in allocation:
        theirs = reference.get_submodule(name).orig_layer.weight.float()
        module = model.get_submodule(name)
        ours = module.packed if hasattr(module, "packed") else module.weight
        assert torch.equal(ours, theirs), name
    expected = reference.float()(some_tokens()).logits
    torch.testing.assert_close(model(some_tokens()).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_exported_model_comes_back_and_the_next_reference_is_whole(tiny_moe, tmp_path):
    """auto-round's reader switches off what transformers needs to read the unquantized experts."""
    model, layers = loaded(tiny_moe)
    expected = model(some_tokens()).logits
    allocation = {la.name: ("w8g32", "w4g32")[i % 2] for i, la in enumerate(layers)}
    one = cell(*tiny_overrides(tiny_moe)).model
    checkpoint = models.checkpoint(one, CACHE)
    folder = quantize.export(
        models.load_for_auto_round(checkpoint, one),
        models.load_tokenizer(checkpoint, one), allocation, tmp_path,
    )  # fmt: skip
    back = quantize.reload(folder, torch.device("cpu"), torch.float32)
    quantize.came_back(back, allocation)
    rounded, _ = loaded(tiny_moe)
    for layer, scheme in allocation.items():
        weight = rounded.get_submodule(layer).weight
        weight.copy_(backward.round_weight(weight, SCHEMES[scheme]))
    difference = back(some_tokens()).logits - rounded(some_tokens()).logits
    assert difference.abs().mean() < 0.1 * expected.abs().mean()
    again, _ = loaded(tiny_moe)
    assert torch.equal(again(some_tokens()).logits, expected)


def asked(folder, cache, notes, unreached):
    """Two tokens of two experts each cannot reach six experts."""
    one = cell(
        *tiny_overrides(folder), "baseline=fisher", "budget=5", "calibration.samples=1",
        "calibration.tokens=2", f"calibration.unreached={unreached}",
    )  # fmt: skip
    reference, layers = loaded(folder)
    note = notes.__setitem__
    request = Request(one.baseline, None, one.model, one.calibration, cache, note, reference)
    return layers, one.schemes, request


@pytest.mark.parametrize("low_memory", [False, True])
def test_experts_without_tokens_are_refused_or_lowest_by_an_explicit_rule(
    tiny_moe, tmp_path, caplog, low_memory
):
    (tmp_path / "documents").symlink_to(CACHE / "documents")
    layers, schemes, request = asked(tiny_moe, tmp_path, {}, "refuse")
    if low_memory:
        request = Request(**{**vars(request), "reference": None})
    with pytest.raises(ConfigError, match=rf"unreached=refuse: .* \d of {EVERY} experts .*lowest"):
        allocate(layers, schemes, 8.0, request)
    notes = {}
    layers, schemes, request = asked(tiny_moe, tmp_path, notes, "lowest")
    allocation = allocate(layers, schemes, 8.0, request)
    assert notes["scores_stored"]  # the rule decides about scores, and not what they are
    unreached = notes["experts_unreached"]
    assert EVERY - 2 * 2 * 2 <= len(unreached) < EVERY
    assert str(len(unreached)) in caplog.text and unreached[-1] in caplog.text
    lowest = {name for name, scheme in allocation.items() if scheme == "mxfp4"}  # 8 bits allow none
    without = {name for name in allocation if name.rpartition(".")[0] in unreached}
    assert len(without) == 3 * len(unreached) and without <= lowest
    assert len(lowest - without) < len(set(allocation) - lowest)
    assert notes["predicted_kl"] > 0
    assert cell("calibration.unreached=refuse").hash == cell().hash
    assert cell("calibration.unreached=lowest").hash != cell().hash


def test_a_score_that_is_not_finite_is_not_taken_for_one_without_tokens(tiny_moe, tmp_path):
    (tmp_path / "documents").symlink_to(CACHE / "documents")
    layers, schemes, request = asked(tiny_moe, tmp_path, {}, "lowest")
    for expert in request.reference.model.layers[2].mlp.experts:
        expert.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"^model\.layers\.\S+: its score in mxfp4 is not"):
        allocate(layers, schemes, 5.0, request)
    assert not list(tmp_path.glob("scores/*/*.parquet"))


def test_other_mixtures_of_experts_are_refused_before_anything_is_loaded(tiny, tmp_path):
    config = json.loads((tiny["llama"] / "config.json").read_text())
    config |= {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=r"mixtral is a mixture of experts; accepted: .*qwen3_moe"
    ):
        cell(*tiny_overrides(tmp_path), "baseline=low")
    from transformers import AutoConfig

    with torch.device("meta"):
        mixtral = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    with pytest.raises(ConfigError, match="MixtralExperts holds experts that are no linears"):
        experts.separate(mixtral)

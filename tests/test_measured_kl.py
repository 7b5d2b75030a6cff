"""measured_kl is what one layer in one option does to the model, and the model does not notice."""

import json

import numpy as np
import pytest
import torch
from conftest import run, tiny_overrides
from scipy.stats import spearmanr
from test_fisher import INT, MX, loaded, some_tokens

from mixprec.allocate import backward, fisher, measured_kl
from mixprec.evaluate import kl
from mixprec.quantize import InMemory
from mixprec.schemes import BF16


def by_hand(model, other, tokens):
    """KL of each sequence in float64, straight from its definition."""
    p, q = (torch.log_softmax(m(tokens).logits.double(), -1) for m in (model, other))
    return (p.exp() * (p - q)).sum(-1).mean(-1).numpy()


@pytest.mark.parametrize("packed", [False, True])
def test_a_score_is_the_kl_of_one_layer_in_one_option(tiny, packed):
    """MX by what evaluates cells, weight-only by its rounded weight."""
    tokens, (model, layers) = some_tokens(), loaded(tiny["qwen2"])
    reference, _ = loaded(tiny["qwen2"])
    if packed:
        InMemory(model)
    some = [layers[place] for place in (0, 9, 13)]
    found = {
        schemes[0].name: measured_kl.score(model, tokens, some, schemes) for schemes in (MX, INT)
    }
    assert found["mxfp4"].shape == (2, 3, 2)
    for place, layer in enumerate(some):
        for option in range(2):
            quantized, _ = loaded(tiny["qwen2"])
            InMemory(quantized, packed=False).apply({layer.name: MX[option].name})
            expected = by_hand(reference, quantized, tokens)
            np.testing.assert_allclose(
                found["mxfp4"][:, place, option], expected, rtol=0.02, atol=1e-6
            )
            quantized, _ = loaded(tiny["qwen2"])
            weight = quantized.get_submodule(layer.name).weight
            weight.data.copy_(backward.round_weight(weight, INT[option]))
            expected = by_hand(reference, quantized, tokens)
            np.testing.assert_allclose(
                found["w2g32"][:, place, option], expected, rtol=0.02, atol=1e-6
            )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(tiny, monkeypatch, packed, fails):
    model, layers = loaded(tiny["llama"])
    in_memory = InMemory(model, packed=packed)
    tokens = some_tokens()
    before = model(tokens).logits
    if fails:
        calls = []
        real = kl.divergence

        def second_fails(*arguments):
            calls.append(arguments)
            if len(calls) == 2:
                raise FloatingPointError("not finite")
            return real(*arguments)

        monkeypatch.setattr(kl, "divergence", second_fails)
        with pytest.raises(FloatingPointError):
            measured_kl.score(model, tokens, layers[:2], MX)
    else:
        measured_kl.score(model, tokens, layers[:2], MX)
    assert torch.equal(model(tokens).logits, before)
    # and whoever rounds it next finds the reference
    in_memory.apply({layers[0].name: "mxfp4"})
    in_memory.apply({layers[0].name: BF16.name})
    assert torch.equal(model(tokens).logits, before)


def test_fisher_ranks_layers_as_the_measured_kl_does(tiny):
    model, layers = loaded(tiny["llama"])
    tokens = some_tokens(8, 48)
    measured = measured_kl.score(model, tokens, layers, MX[:1]).mean(0).ravel()
    predicted = fisher.score(model, tokens, layers, MX[:1]).mean(0).ravel()
    assert spearmanr(measured, predicted).statistic > 0.8


def test_a_cell_stores_what_was_predicted(tiny, tmp_path):
    outcome = run(tmp_path, *tiny_overrides(tiny["qwen3"]), "baseline=measured_kl", "budget=5")
    assert outcome.state == "done", outcome.message
    result = json.loads((tmp_path / outcome.cell.path / "result.json").read_text())
    assert result["realised_bits"] <= 5
    assert 0.3 < result["notes"]["predicted_kl"] / result["kl"]["mean"] < 3

"""Scores are the formula's numbers, the formula is the Fisher quadratic form, and that predicts KL."""

import itertools
import json
import multiprocessing

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, CACHE, cell, run, tiny_overrides

from mixprec import models, tables
from mixprec.allocate import Request, allocate, backward, fisher, modelopt, output_error, scores
from mixprec.allocate import weight_error as weight_error_rule
from mixprec.cell import ConfigError
from mixprec.evaluate import kl, vllm
from mixprec.quantize import InMemory
from mixprec.schemes import BF16, SCHEMES, realised_bits

MX = [SCHEMES["mxfp4"], SCHEMES["mxfp8"]]
SIGNALS = (modelopt, output_error, weight_error_rule)
INT = [SCHEMES["w2g32"], SCHEMES["w8g32"]]


def loaded(folder):
    one = cell(*tiny_overrides(folder))
    model = models.load(models.checkpoint(one.model, CACHE), one.model)
    return model, models.quantized_layers(model)


def some_tokens(sequences=2, length=24):
    return torch.randint(3, 250, (sequences, length), generator=torch.Generator().manual_seed(7))


def by_the_formula(model, tokens, name, scheme):
    """½ (g_t · (Q(W) Q(x_t) − W x_t))² of each token in float64, by torch's own backward pass."""
    model = model.double()
    module, seen = model.get_submodule(name), {}

    def note(_, inputs, output):
        seen["x"], seen["y"] = inputs[0].detach(), output.requires_grad_()

    values = []
    hook = module.register_forward_hook(note)
    for sequence, row in enumerate(tokens):
        logits = model(row[None]).logits
        signs = fisher.signs(logits[0].shape, [fisher.SEED, sequence, 0]).double()
        root = torch.softmax(logits[0].detach(), -1).sqrt()
        sent = root * signs - root**2 * (root * signs).sum(-1, keepdim=True)
        (g,) = torch.autograd.grad(logits, seen["y"], sent[None])
        error = the_error(module, scheme, seen["x"])
        values.append(0.5 * (g * error).sum(-1).square()[0].numpy())
    hook.remove()
    model.float()
    return np.array(values)


def the_error(module, scheme, x):
    """Q(W) Q(x) − W x in float64."""
    inputs = backward.round_mx(x.float(), scheme.bits).double() if scheme.activations else x
    rounded = backward.round_weight(module.weight.float(), scheme).double()
    return inputs @ rounded.T - x @ module.weight.double().T


def test_other_signals_are_their_formulas(tiny):
    """ModelOpt's with the text's labels, the error of outputs, that of weights; one layer, float64."""
    tokens, (model, layers) = some_tokens(), loaded(tiny["llama"])
    packed, _ = loaded(tiny["llama"])
    InMemory(packed)
    place, module = 11, model.double().get_submodule(layers[11].name)
    seen = {}
    module.register_forward_hook(
        lambda _, inputs, output: seen.update(x=inputs[0].detach(), y=output.requires_grad_())
    )
    logits = model(tokens).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )
    (g,) = torch.autograd.grad(loss, seen["y"])
    for schemes in (MX, INT):
        found = {rule: rule.score(packed, tokens, layers, schemes) for rule in SIGNALS}
        for option, scheme in enumerate(schemes):
            error = the_error(module, scheme, seen["x"])
            weight_error = backward.round_weight(module.weight.float(), scheme) - module.weight
            for rule, expected in (
                (modelopt, (g * error).square().sum(-1).mean(-1)),
                (output_error, error.square().sum(-1).mean(-1)),
                (weight_error_rule, weight_error.square().sum()[None]),
            ):
                np.testing.assert_allclose(found[rule][:, place, option], expected, rtol=2e-3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)  # biases, q and k norms, tied weights
def test_a_score_is_the_formula(tiny, architecture, packed):
    tokens = some_tokens()
    model, layers = loaded(tiny[architecture])
    reference, _ = loaded(tiny[architecture])
    if packed:
        InMemory(model)
    for schemes in (MX, INT):
        values = fisher.score(model, tokens, layers, schemes)
        assert values.shape == (2, len(layers), 2)
        for place in (0, 5, 13, len(layers) - 1):
            for option, scheme in enumerate(schemes):
                expected = by_the_formula(reference, tokens, layers[place].name, scheme).mean(1)
                np.testing.assert_allclose(values[:, place, option], expected, rtol=2e-3)


def test_options_but_the_first_are_scored_on_one_token_of_four(tiny):
    """Of several sequences; over four of them each place counts once, with four times its weight."""
    tokens = some_tokens(4)
    model, layers = loaded(tiny["llama"])
    reference, _ = loaded(tiny["llama"])
    values = fisher.score(model, tokens, layers, MX)
    place = np.arange(tokens.shape[1])
    counted = (place + np.arange(4)[:, None]) % backward.EVERY == 0
    assert (counted.sum(0) == 1).all()
    for option, weight in enumerate((np.ones_like(counted), backward.EVERY * counted)):
        each = by_the_formula(reference, tokens, layers[5].name, MX[option])
        np.testing.assert_allclose(values[:, 5, option], (weight * each).mean(1), rtol=2e-3)


def test_the_model_is_left_as_it_was(tiny):
    model, layers = loaded(tiny["qwen2"])
    InMemory(model)
    tokens = some_tokens()
    before = model(tokens).logits
    first = fisher.score(model, tokens, layers, MX)
    assert torch.equal(model(tokens).logits, before) and not before.requires_grad
    assert not any("forward" in vars(module) for module in model.modules())
    assert np.array_equal(first, fisher.score(model, tokens, layers, MX))


def test_batches_change_nothing(tiny, monkeypatch):
    model, layers = loaded(tiny["llama"])
    tokens = some_tokens(4)
    whole = fisher.score(model, tokens, layers, MX)
    monkeypatch.setattr(backward, "TOKENS_AT_ONCE", 30)
    np.testing.assert_allclose(fisher.score(model, tokens, layers, MX), whole, rtol=1e-3)


def test_signs_have_the_fisher_covariance():
    """The mean of v vᵀ over many signs is diag(p) − p pᵀ, and v sums to nothing."""
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)).mul_(2)
    n = 40_000
    sent = fisher.signed(logits.expand(n, -1), fisher.signs((n, 12), [3]))
    p = torch.softmax(logits[0], -1)
    covariance = torch.diag(p) - torch.outer(p, p)
    assert (sent.T @ sent / n - covariance).abs().max() < 5 * 0.25 / n**0.5
    assert sent.sum(-1).abs().max() < 1e-5


def test_with_many_signs_it_is_the_fisher_quadratic_form(tiny, monkeypatch):
    """Of the exact F at one layer's output: Σ over all positions of Jᵀ (diag(p) − p pᵀ) J."""
    model, layers = loaded(tiny["llama"])
    tokens, place = some_tokens(1, 12), 9
    model_64, _ = loaded(tiny["llama"])
    model_64.double()
    module = model_64.get_submodule(layers[place].name)
    seen = {}
    hook = module.register_forward_hook(
        lambda _, inputs, output: seen.update(x=inputs[0].detach()) or output + seen["shift"]
    )
    out = layers[place].out_features
    seen["shift"] = torch.zeros(1, 12, out, dtype=torch.float64)

    def logits(shift):
        seen["shift"] = shift
        return model_64(tokens).logits[0]

    p = torch.softmax(logits(seen["shift"]), -1)
    error = the_error(module, MX[0], seen["x"])
    exact = 0.0
    for token in range(12):  # the change of all logits for the error at one token alone
        shift = torch.zeros_like(error)
        shift[0, token] = error[0, token]
        change = (logits(1e-4 * shift) - logits(-1e-4 * shift)) / 2e-4
        exact += 0.5 * ((p * change**2).sum(-1) - (p * change).sum(-1) ** 2).sum().item() / 12
    hook.remove()
    drawn = []
    for seed in range(150):
        monkeypatch.setattr(fisher, "SEED", seed)
        drawn.append(fisher.score(model, tokens, layers[place : place + 1], MX[:1]).item())
    stderr = np.std(drawn, ddof=1) / len(drawn) ** 0.5
    assert abs(np.mean(drawn) - exact) < 4 * stderr and stderr < 0.1 * exact


def test_it_predicts_the_kl_of_a_small_error(tiny, tmp_path):
    """One layer in mxfp8: KL on the same tokens.

    The typical layer, because an error that tokens share adds up, and the score leaves that out.
    """
    model, layers = loaded(tiny["llama"])
    tokens = some_tokens(16, 64)
    predicted = fisher.score(model, tokens, layers, MX[1:]).mean(0)[:, 0]
    reference = kl.Reference.of(model, tokens, tmp_path / "reference.safetensors")
    in_memory = InMemory(model)
    ratios = []
    for place in range(0, len(layers), 2):
        in_memory.apply({la.name: BF16.name for la in layers} | {layers[place].name: "mxfp8"})
        ratios.append(kl.divergence(model, tokens, reference)["mean"] / predicted[place])
    assert 0.7 < np.median(ratios) < 1.4 and min(ratios) > 0.5


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_cell_stores_what_was_predicted(tiny, tmp_path, low_memory):
    overrides = [*tiny_overrides(tiny["qwen3"]), "baseline=fisher", "budget=5"]
    outcome = run(tmp_path, *overrides, f"model.low_memory={low_memory}")
    assert outcome.state == "done", outcome.message
    result = json.loads((tmp_path / outcome.cell.path / "result.json").read_text())
    assert result["realised_bits"] <= 5
    assert 0.3 < result["notes"]["predicted_kl"] / result["kl"]["mean"] < 3


def asked(folder, cache, notes, baseline="fisher", **more):
    one = cell(*tiny_overrides(folder), f"baseline={baseline}", "budget=5")
    reference, layers = loaded(folder)
    note = notes.__setitem__
    request = Request(
        one.baseline, None, one.model, one.calibration, cache, note, reference, **more
    )
    return layers, one.schemes, request


@pytest.fixture
def cache(tmp_path):
    """A cache of its own, documents shared."""
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "documents").symlink_to(CACHE / "documents")
    return folder


def test_scores_are_made_once_and_serve_every_budget(tiny, cache, monkeypatch):
    notes, predicted = {}, []
    layers, schemes, request = asked(tiny["qwen3"], cache, notes)
    for budget in (4.0, 4.5, 5.0, 6.0, 8.0):
        allocation = allocate(layers, schemes, budget, request)
        assert realised_bits(layers, allocation) <= budget
        assert notes["scores_stored"] is bool(predicted)
        predicted.append(notes["predicted_kl"])
        monkeypatch.setattr(fisher, "score", None)  # not called again
    assert predicted == sorted(predicted, reverse=True) and predicted[-1] > 0
    (file,) = cache.glob("scores/*/scores.parquet")
    table = scores.pd.read_parquet(file)
    assert list(table.columns) == [
        "layer", "option", "bits", "score", "stderr", "per_sequence",
    ]  # fmt: skip
    assert list(table.layer) == [layer.name for layer in layers for _ in schemes]
    assert (table.stderr > 0).all() and (table.score > 0).all()
    assert notes["predicted_kl_stderr"] > 0
    lowest = table[table.option == "mxfp4"].per_sequence.sum().mean()
    (about,) = cache.glob("scores/*/about.json")
    measured = np.mean(json.loads(about.read_text())["lowest_kl"])
    assert measured > 0 and predicted[0] == pytest.approx(measured)
    assert lowest == pytest.approx(table.score[table.option == "mxfp4"].sum())


def test_the_lowest_options_kl_is_measured_as_everywhere(tiny):
    """Against the judge of cells, packed and not; the model is left as it was."""
    tokens = some_tokens()
    for scheme in MX:
        quantized, layers = loaded(tiny["qwen3"])
        reference = kl.Reference(kl_inputs(quantized, tokens))
        InMemory(quantized).apply({layer.name: scheme.name for layer in layers})
        expected = kl.divergence(quantized, tokens, reference)["per_sequence"]
        for packed in (False, True):
            model, _ = loaded(tiny["qwen3"])
            if packed:
                InMemory(model)
            before = model(tokens).logits
            found = backward.divergences(model, tokens, layers, scheme)
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-7)
            assert torch.equal(model(tokens).logits, before)


def kl_inputs(model, tokens):
    return torch.stack([kl._forward(model, row)[0] for row in tokens])


@pytest.mark.parametrize("measured", [3.0, 1.3, 1.0, 0.7, 0.01])
def test_a_correction_rises_is_undone_and_hits_what_was_measured(measured):
    lowest = np.array([0.8, 1.2, 1.1, 0.9])
    more = scores.excess(lowest, [measured * of for of in lowest])
    assert scores.corrected(1.0, more) == pytest.approx(measured)
    sums = np.linspace(0, 4, 50)
    kl_of = np.array([scores.corrected(s, more) for s in sums])
    assert kl_of[0] == 0 and (np.diff(kl_of) > 0).all()
    assert [scores.uncorrected(k, more) for k in kl_of] == pytest.approx(sums)
    small = scores.corrected(1e-6, more) / 1e-6
    assert small == pytest.approx(1, abs=1e-3)
    if measured < 1:
        assert scores.uncorrected(1e9, more) == np.inf


def test_a_target_is_reached_with_the_fewest_bits(tiny, cache):
    notes, bits = {}, []
    for target in (10.0, 0.08, 0.05, 0.02):
        layers, schemes, request = asked(tiny["qwen3"], cache, notes, target_kl=target)
        allocation = allocate(layers, schemes, None, request)
        bits.append(realised_bits(layers, allocation))
        predicted = notes["predicted_kl"]
        assert predicted <= target * (1 + 1e-9)
        # The best that fewer bits can do misses the target.
        _, _, budgeted = asked(tiny["qwen3"], cache, notes)
        if bits[-1] > 4:
            allocate(layers, schemes, bits[-1] - 1e-3, budgeted)
            assert notes["predicted_kl"] > target
    assert bits == sorted(bits) and bits[0] == 4 < bits[1] < bits[-1]


def test_a_target_out_of_reach_names_what_is_within(tiny, cache):
    notes = {}
    layers, schemes, request = asked(tiny["qwen3"], cache, notes, target_kl=1e-9)
    with pytest.raises(ConfigError, match=r"^target\.kl=1e-09: accepted .* or more") as raised:
        allocate(layers, schemes, None, request)
    smallest = float(str(raised.value).split(": ")[2].split()[0])
    _, _, request = asked(tiny["qwen3"], cache, notes, target_kl=smallest)
    assert realised_bits(layers, allocate(layers, schemes, None, request)) <= 8
    assert notes["predicted_kl"] == pytest.approx(smallest, rel=1e-4)


def test_a_cell_with_a_target_is_stored_and_tabulated(tiny, tmp_path):
    overrides = [*tiny_overrides(tiny["qwen3"]), "baseline=fisher", "budget=null", "target.kl=0.05"]
    outcome = run(tmp_path, *overrides)
    assert outcome.state == "done", outcome.message
    result = json.loads((tmp_path / outcome.cell.path / "result.json").read_text())
    assert result["config"]["budget"] is None and result["config"]["target"] == {"kl": 0.05}
    assert result["notes"]["predicted_kl"] <= 0.05 and 4 < result["realised_bits"] < 8
    assert run(tmp_path, *overrides).state == "stored"
    stored, _ = tables.read(tmp_path)
    table = tables.frame(list(stored.values()), stored)
    assert list(table.row) == ["fisher, predicted KL ≤ 0.05"] and list(table.target_kl) == [0.05]
    assert "predicted KL ≤ 0.05" in tables.markdown("all", table, stored)


def test_fused_linears_share_a_scheme_and_it_is_the_best_such_allocation(tiny, cache, tmp_path):
    """Of a whole model against untied; of one block against every allocation that is tied so."""
    (apart := tmp_path / "apart").mkdir()
    (apart / "documents").symlink_to(CACHE / "documents")
    notes = {}
    layers, schemes, request = asked(tiny["llama"], cache, notes, fused=True)
    _, _, free = asked(tiny["llama"], cache, notes)
    block = [layer for layer in layers if ".layers.1." in layer.name]
    groups = ["qkv", "o", "gu", "down"]
    group_of = {
        "q": "qkv",
        "k": "qkv",
        "v": "qkv",
        "o": "o",
        "gate": "gu",
        "up": "gu",
        "down": "down",
    }
    for budget in (4.3, 5.0, 6.0):
        tied = allocate(layers, schemes, budget, request)
        predicted = notes["predicted_kl"]
        assert vllm.refusal(tied) is None and realised_bits(layers, tied) <= budget
        untied = allocate(layers, schemes, budget, free)
        assert predicted >= notes["predicted_kl"]
        assert vllm.refusal(untied) is not None  # or the test would show nothing

        _, _, of_block = asked(tiny["llama"], apart, notes, fused=True)
        found = allocate(block, schemes, budget, of_block)
        (file,) = apart.glob("scores/*/scores.parquet")
        score = scores.pd.read_parquet(file).set_index(["layer", "option"]).score
        sums = []
        for options in itertools.product(["mxfp4", "mxfp8"], repeat=len(groups)):
            of_group = dict(zip(groups, options, strict=True))
            each = {la.name: of_group[group_of[la.name.split(".")[-1][:-5]]] for la in block}
            if realised_bits(block, each) <= budget:
                sums.append(sum(score[item] for item in each.items()))
        assert sum(score[item] for item in found.items()) == pytest.approx(min(sums))


def _allocate_apart(folder, cache, results):
    notes = {}
    layers, schemes, request = asked(folder, cache, notes)
    allocation = allocate(layers, schemes, 5.0, request)
    results.put((notes["scores_stored"], notes["predicted_kl"], sorted(allocation.items())))


def test_two_that_want_scores_at_once_make_them_once(tiny, cache):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    both = [
        context.Process(target=_allocate_apart, args=(tiny["llama"], cache, results))
        for _ in range(2)
    ]
    for process in both:
        process.start()
    (one, other) = sorted(results.get(timeout=120) for _ in both)
    for process in both:
        process.join()
    assert (one[0], other[0]) == (False, True) and one[1:] == other[1:]


def test_a_layer_that_no_token_reaches_is_named(tiny):
    model, layers = loaded(tiny["llama"])
    skipped = model.model.layers[1]
    skipped.mlp.forward = lambda x: x
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.gate_proj: no calibration token"):
        fisher.score(model, some_tokens(), layers, MX)


def test_scores_that_are_not_finite_are_not_stored(tiny, cache):
    layers, schemes, request = asked(tiny["llama"], cache, {})
    request.reference.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"^model\.layers\.\S+: its score in mxfp4 is not"):
        allocate(layers, schemes, 5.0, request)
    assert not list(cache.glob("scores/*/*.parquet"))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_only_rounding_is_what_the_export_stores(bits):
    """To bfloat16 it is auto-round's own function; before that, whole multiples of the scale."""
    from auto_round.data_type.int import quant_tensor_sym

    scheme = SCHEMES[f"w{bits}g32"]
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    nearest, scale, _ = quant_tensor_sym(weight.clone(), bits=bits, group_size=32)
    rounded = backward.round_weight(weight, scheme)
    assert torch.equal(rounded.bfloat16(), nearest)
    steps = rounded.view(-1, 32) / scale.float().view(-1, 1)
    assert (steps - steps.round()).abs().max() < 1e-4

"""AutoRound's tuning: a cell of its own, other weights on the same grid, and nothing left behind."""

import json

import pytest
import torch
from conftest import CACHE, cell, configuration, run, tiny_overrides
from test_quantize import loaded, mixed

from mixprec import data, models, quantize
from mixprec.rounding import round_mx
from mixprec.schemes import SCHEMES
from mixprec.tables import Row

# Of two or three steps none may be better than rounding to nearest, and then AutoRound keeps that.
SMALL = ["tuning.iters=20", "tuning.samples=4", "tuning.tokens=64", "tuning.batch_size=2"]
WEIGHT_ONLY = ["options.name=w2g32_w4g32", "options.schemes=[w2g32,w4g32]"]


def result_of(results, one):
    return json.loads((results / one.cell.path / "result.json").read_text())


def tuning(folder) -> quantize.Tuned:
    one = cell(*tiny_overrides(folder), *SMALL)
    tokenizer = models.load_tokenizer(models.checkpoint(one.model, CACHE), one.model)
    texts = data.calibration_texts(one.tuning_text, tokenizer, CACHE)
    return quantize.Tuned(one.tuning.iters, one.tuning.batch_size, one.tuning_text.tokens, texts)


# --- identity ---------------------------------------------------------------------------------


def test_without_tuning_a_cell_is_the_one_that_it_was():
    plain = cell("tuning.samples=3", "tuning.batch_size=2", "tuning.tokens=7")
    assert plain.hash == cell().hash and "tuning" not in plain.settings


def test_a_tuned_cell_is_another_cell_beside_the_first():
    tuned = cell("tuning.iters=200")
    assert tuned.path == f"{cell().path}-tuned200" and tuned.hash != cell().hash
    assert tuned.settings["tuning"] == {
        "iters": 200,
        "batch_size": 8,
        "text": {"samples": 128, "tokens": 1024, "seed": 42, "source": "packaged"},
    }
    for other in ("samples=64", "tokens=512", "batch_size=4", "iters=100"):
        assert cell("tuning.iters=200", f"tuning.{other}").hash != tuned.hash
    low = cell("baseline=low", "tuning.iters=200")  # needs no calibration for its allocation
    assert low.calibration is None and low.settings["tuning"] == tuned.settings["tuning"]
    real = cell("model=qwen3_8b", "tuning.iters=200")
    assert real.tuning_text.tokens == 2048 and "dataset" in real.settings["tuning"]["text"]


def test_a_table_tells_them_apart():
    labels = [
        Row(one.path, one.settings, None).label
        for one in (cell(), cell("tuning.iters=200"), cell("baseline=low", "tuning.iters=9"))
    ]
    assert labels == ["ours 5-bit", "ours 5-bit, tuned 200", "low (mxfp4), tuned 9"]


def test_bf16_is_not_tuned():
    assert cell("baseline=bf16", "tuning.iters=200").hash == cell("baseline=bf16").hash


# --- MX, in memory ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mx(tiny):
    """(allocation, auto-round's own tuned model, the weights that are taken from it)."""
    model = configuration(*tiny_overrides(tiny["llama"])).model
    checkpoint = models.checkpoint(model, CACHE)
    tokenizer = models.load_tokenizer(checkpoint, model)
    source = models.load_for_auto_round(checkpoint, model)
    allocation = mixed(source, "mxfp4", "mxfp8")
    settings = tuning(tiny["llama"])
    with quantize._auto_round(source, tokenizer, allocation, settings, False) as compressor:
        theirs, _ = compressor.quantize()
    again = models.load_for_auto_round(checkpoint, model)
    weights = quantize.tuned_weights(again, tokenizer, allocation, tuning(tiny["llama"]))
    return allocation, theirs, weights


def test_tuned_weights_are_on_the_grid_and_not_the_nearest(mx, tiny):
    allocation, _, weights = mx
    model, _ = loaded(tiny["llama"])
    differ = 0
    for name, scheme in allocation.items():
        bits, weight = SCHEMES[scheme].bits, weights[name]
        assert torch.equal(round_mx(weight, bits), weight), name
        reference = model.get_submodule(name).weight.data.bfloat16()
        nearest = round_mx(reference, bits)
        differ += not torch.equal(nearest, weight)
        # A tuned weight may be rounded to the farther neighbour, not to anywhere.
        assert (weight - reference).float().norm() < 0.25 * reference.float().norm(), name
    assert differ > len(allocation) / 2


def test_in_memory_it_is_auto_rounds_own_tuned_model(mx, tiny):
    """Tuned a second time from the same seed: the same weights, and with the hooks the same logits."""
    allocation, theirs, weights = mx
    model, _ = loaded(tiny["llama"])
    tokens = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    exact = model(tokens).logits
    in_memory = quantize.InMemory(model, packed=False)
    in_memory.apply(allocation)
    nearest = model(tokens).logits
    in_memory.apply(allocation, weights)
    tuned = model(tokens).logits
    with torch.no_grad():
        assert torch.equal(tuned, theirs.float()(tokens).logits)
    assert not torch.equal(tuned, nearest)

    in_memory.apply(allocation)
    assert torch.equal(model(tokens).logits, nearest)
    in_memory.apply(allocation, weights)
    in_memory.apply(dict.fromkeys(allocation, "bf16"))
    assert torch.equal(model(tokens).logits, exact)


# --- cells ------------------------------------------------------------------------------------


def test_tuned_and_nearest_cells_stand_side_by_side(tiny, tmp_path):
    overrides = [*tiny_overrides(tiny["llama"]), "baseline=tail8", "budget=5"]
    nearest = result_of(tmp_path, run(tmp_path, *overrides))
    done = run(tmp_path, *overrides, *SMALL)
    tuned = result_of(tmp_path, done)
    assert done.cell.path.endswith("tail8-5-tuned20")
    assert tuned["realised_bits"] == nearest["realised_bits"]
    assert tuned["kl"]["mean"] != nearest["kl"]["mean"]
    assert 0.5 < tuned["kl"]["mean"] / nearest["kl"]["mean"] < 2
    # The kept model is the reference again: the same cell as before, in the same process.
    again = result_of(tmp_path, run(tmp_path, *overrides, "force=true"))
    assert (again["kl"], again["metrics"]) == (nearest["kl"], nearest["metrics"])


def test_a_tuned_weight_only_model_is_exported_for_real(tiny, tmp_path):
    overrides = [
        *tiny_overrides(tiny["llama"]), *WEIGHT_ONLY, "baseline=tail4", "budget=3",
    ]  # fmt: skip
    nearest = result_of(tmp_path, run(tmp_path, *overrides))
    tuned = result_of(tmp_path, run(tmp_path, *overrides, *SMALL))
    for result in (nearest, tuned):
        assert result["notes"]["backend"] == "ark" and result["notes"]["exported_bytes"] > 0
    assert tuned["quantized"] == nearest["quantized"]
    assert tuned["kl"]["mean"] != nearest["kl"]["mean"]
    assert 0.5 < tuned["kl"]["mean"] / nearest["kl"]["mean"] < 2


def test_too_little_text_is_said_in_one_line(tiny, tmp_path):
    done = run(
        tmp_path, *tiny_overrides(tiny["llama"]), "baseline=low", "tuning.iters=1",
        "tuning.samples=9", "tuning.tokens=100000",
    )  # fmt: skip
    assert done.failed and done.message.startswith("ConfigError: tuning: the text gives ")
    assert "accepted: fewer samples or fewer tokens" in done.message

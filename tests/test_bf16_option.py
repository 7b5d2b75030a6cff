"""BF16 as the last option: it costs 16 bits, loses nothing, and is not scored."""

import json

import pytest
import torch
from conftest import ROOT, cell, run, tiny_overrides
from test_fisher import asked, cache, loaded  # noqa: F401

from mixprec import quantize, tables
from mixprec.allocate import allocate, fisher
from mixprec.estimate import exported_bytes
from mixprec.schemes import SCHEMES, realised_bits

MX = "options=mxfp4_mxfp8_bf16"
INT = ["options.name=w4g32_w8g32_bf16", "options.schemes=[w4g32,w8g32,bf16]"]


def stored(root, outcome):
    assert outcome.state == "done", outcome.message
    return json.loads((root / outcome.cell.path / "result.json").read_text())


def test_every_option_set_composes_and_ends_within_its_bits():
    for file in sorted((ROOT / "conf/options").glob("mxfp4_*bf16.yaml")):
        one = cell(f"options={file.stem}", "budget=16", "baseline=fisher")
        assert [scheme.bits for scheme in one.schemes][-1] == 16 and not one.exports
        assert "_".join(scheme.name for scheme in one.schemes) == file.stem == one.options.name


def test_it_shares_its_scores_with_the_options_without_it(tiny, cache, monkeypatch):  # noqa: F811
    notes, predicted = {}, {}
    layers, schemes, request = asked(tiny["qwen3"], cache, notes)
    allocate(layers, schemes, 8.0, request)
    predicted["mxfp8"] = notes["predicted_kl"]
    monkeypatch.setattr(fisher, "score", None)
    more = cell(MX, "budget=5").schemes
    for budget in (4.0, 8.0, 12.0, 16.0):
        allocation = allocate(layers, more, budget, request)
        assert realised_bits(layers, allocation) <= budget and notes["scores_stored"]
        predicted[budget] = notes["predicted_kl"]
    assert predicted[4.0] > predicted["mxfp8"] >= predicted[8.0] > predicted[12.0]
    assert predicted[16.0] == 0 and set(allocation.values()) == {"bf16"}


@pytest.mark.parametrize("baseline", ["fisher", "ours", "head8"])
def test_an_mx_cell_with_it(tiny, tmp_path, baseline):
    """Head and tail fill with 8 bits, so they end at 8 of the 9 that they may use."""
    overrides = [*tiny_overrides(tiny["llama"]), MX, f"baseline={baseline}", "budget=9"]
    result = stored(tmp_path, run(tmp_path, *overrides))
    schemes, bits = result["quantized"]["layers_by_scheme"], result["realised_bits"]
    if baseline == "head8":
        assert schemes == {"mxfp8": 21} and bits == 8
    else:
        assert "bf16" in schemes and 8 < bits <= 9
        # Only what is rounded has scales, 8 bits for 32 weights.
        assert bits + 0.2 < result["realised_bits_with_scales"] < bits + 0.25


def test_high_is_bf16_itself(tiny, tmp_path):
    overrides = tiny_overrides(tiny["qwen2"])
    result = stored(tmp_path, run(tmp_path, *overrides, MX, "baseline=high"))
    assert result["realised_bits"] == result["realised_bits_with_scales"] == 16
    assert abs(result["kl"]["mean"]) < 1e-6
    rows, _ = tables.read(tmp_path)
    assert [row.label for row in rows.values()] == ["high (bf16)"]


def test_a_weight_only_export_leaves_it_as_it_was(tiny, tmp_path):
    overrides = [*tiny_overrides(tiny["llama"]), *INT, "baseline=fisher", "budget=9"]
    result = stored(tmp_path, run(tmp_path, *overrides))
    assert set(result["quantized"]["layers_by_scheme"]) == {"w8g32", "bf16"}
    assert 8 < result["realised_bits"] <= 9 and result["kl"]["mean"] < 0.01
    assert result["notes"]["backend"] == "ark"


def test_a_bf16_layer_that_came_back_quantized_is_an_error(tiny):
    model, layers = loaded(tiny["llama"])
    name = layers[0].name
    assert quantize.came_back(model, {name: "bf16"}) == ""
    with pytest.raises(RuntimeError, match="allocated: 4 bits in groups of 32"):
        quantize.came_back(model, {name: "w4g32"})
    model.get_submodule(name).bits, model.get_submodule(name).group_size = 4, 32
    fake = type("Quantized", (torch.nn.Linear,), {})
    model.get_submodule(name).__class__ = fake
    with pytest.raises(RuntimeError, match="of 4 bits in groups of 32; allocated: 16 bits"):
        quantize.came_back(model, {name: "bf16"})


def test_tuning_leaves_a_bf16_layer_as_it_was(tiny, tmp_path):
    overrides = [
        *tiny_overrides(tiny["llama"]), MX, "baseline=fisher", "budget=9", "tuning.iters=2",
        "tuning.samples=2", "tuning.batch_size=2", "tuning.tokens=32",
    ]  # fmt: skip
    result = stored(tmp_path, run(tmp_path, *overrides))
    assert "bf16" in result["quantized"]["layers_by_scheme"]


def test_it_has_no_scales_to_count_on_disk():
    from mixprec.estimate import Size

    size = Size(10**6, 10**6, 1, 1, 1, 1, 0)
    one = cell(*INT, "budget=9", "baseline=fisher")
    assert exported_bytes(one, size) == 2 * 10**6
    assert SCHEMES["w8g32"].bits + 32 / 32 < 16

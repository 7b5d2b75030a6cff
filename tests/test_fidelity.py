"""`ours` is what the `auto_round` command line allocates, under the report's conditions."""

import json
import sys

import pytest
import torch
from conftest import CACHE, ROOT, cell
from safetensors.torch import save_file

from mixprec import data, models
from mixprec.allocate import Request, allocate
from mixprec.rounding import round_mx
from mixprec.schemes import SCHEMES, Layer

sys.path.insert(0, str(ROOT / "experiments" / "fidelity"))
import compare


@pytest.fixture
def cache(tmp_path):
    """A cache without scores, so that both sides score; the packaged texts are shared."""
    data.packaged_documents(CACHE)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "documents").symlink_to((CACHE / "documents").resolve())
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("architecture", "budget"),
    [("llama", 5), ("qwen3", 4.5)],  # the text begins with BOS; tied embeddings
)
def test_ours_allocates_as_the_command_line_does(tiny, cache, tmp_path, architecture, budget):
    overrides = ["model=custom", f"model.path='{tiny[architecture]}'", "model.source=packaged"]
    row = compare.compare(compare.cell(budget, overrides), cache, tmp_path / "command")
    assert (row["layers"], row["equal"], row["differences"]) == (21, 21, {})
    assert 0 < row["layers_in_highest"] < 21  # neither side could be right by doing nothing
    assert row["calibration_begins_with_bos"] is (architecture == "llama")
    assert not row["scores_stored"] and not row["command_scores_stored"]


def test_scores_come_from_the_configured_calibration_whatever_the_environment_says(
    tiny, cache, monkeypatch
):
    for variable in ("NSAMPLES", "SEQLEN", "BATCH_SIZE"):
        monkeypatch.setenv(f"AR_AUTO_SCHEME_{variable}", "1")
    used = [
        [score["cache_config"][key] for key in ("nsamples", "seqlen", "batch_size")]
        for score in scores(tiny["llama"], cache)
    ]
    assert used == [[2, 64, 8]] * 2


def test_mx_options_are_scored_by_their_weights_alone(tiny, cache, monkeypatch):
    """What docs/fidelity.md says of the installed version: without the weights' part nothing is left."""
    from auto_round.auto_scheme.delta_loss import AutoSchemeWrapperLinear

    nothing = property(lambda self: 0.0, lambda self, value: None)
    monkeypatch.setattr(AutoSchemeWrapperLinear, "weight_score", nothing, raising=False)
    for score in scores(tiny["llama"], cache):
        assert {loss for _, loss in score["layer_scores"].values()} == {0.0}


def scores(folder, cache) -> list[dict]:
    """The files of scores that `ours` leaves for a tiny model on two short texts."""
    asked = cell(
        "model=custom", f"model.path='{folder}'", "model.source=packaged",
        "calibration.samples=2", "calibration.tokens=64",
    )  # fmt: skip
    checkpoint = models.checkpoint(asked.model, cache)
    layers = models.quantized_layers(models.load_for_auto_round(checkpoint, asked.model))
    request = Request(asked.baseline, None, asked.model, asked.calibration, cache)
    allocate(layers, asked.schemes, asked.budget, request)
    return [json.loads(file.read_text()) for file in cache.glob("autoscheme/*/scheme_*.json")]


def test_hub_kernels_are_off_and_stop_a_run_if_on(tiny, monkeypatch):
    from transformers.integrations import hub_kernels

    asked = cell("model=custom", f"model.path='{tiny['llama']}'", "model.source=packaged")
    checkpoint = models.checkpoint(asked.model, CACHE)
    models.load(checkpoint, asked.model)
    monkeypatch.setattr(hub_kernels, "_kernels_enabled", True)
    with pytest.raises(RuntimeError, match="hub kernels are on"):
        models.load(checkpoint, asked.model)


def test_heldout_tokens_begin_with_bos_where_the_model_wants_it(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny["qwen3"])  # adds none of its own
    overrides = ["eval.kl.sequences=2", "eval.kl.tokens=16"]
    plain, begun = (
        data.heldout_tokens(cell(*overrides).eval, tokenizer, bos, CACHE) for bos in (False, True)
    )
    assert (begun[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(begun[:, 1:], plain[:, :-1])


def test_the_printed_table_is_read_layer_by_layer():
    names = [
        f"model.layers.{block}.{column}"
        for block in (1, 11)
        for column in ("mlp.up_proj", "self_attn.k_proj", "self_attn.q_proj")
    ]
    lines = [
        "\x1b[38;20m2026-01-01 00:00:00 INFO utils.py L1: " + text + "\x1b[0m\n"
        for text in (
            "  block    |mlp    |self_attn|      ",
            "           |up_proj|k_proj   |q_proj",
            "  ---------|-------|---------|------",
            "  layers.1 |MXFP4  |MXFP8    |MXFP4 ",
            "  layers.11|MXFP8  |MXFP4    |MXFP4 ",
        )
    ]
    found = compare.as_printed(lines, names)
    assert [found[name] for name in names] == [
        *("mxfp4", "mxfp8", "mxfp4"), *("mxfp8", "mxfp4", "mxfp4"),
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="no scheme of 3 layers"):
        compare.as_printed(lines[:-1], names)


def test_written_weights_show_their_scheme(tmp_path):
    torch.manual_seed(0)
    weight = torch.randn(16, 64).bfloat16()
    few = weight.sign() * (1 + (weight.abs() * 4).round() / 8).clamp(max=3)  # as from a 4-bit file
    weights = {
        "any.4": round_mx(weight, 4),
        "any.8": round_mx(weight, 8),
        "few.4": round_mx(few, 4),
        "few.8": round_mx(few, 8),
        "coarse.4": round_mx(weight / 2, 4).clamp(-1.5, 1.5)
        * 2,  # another scale than round_mx takes
    }
    save_file(
        {f"{name}.weight": value for name, value in weights.items()}, tmp_path / "m.safetensors"
    )
    layers = [Layer(name, 16, 64) for name in weights]
    found = compare.as_written(tmp_path, SCHEMES["mxfp4"], layers)
    assert found == {name: name.endswith(".4") for name in weights}
    with pytest.raises(RuntimeError, match="wrote 5 of 6 layers"):
        compare.as_written(tmp_path, SCHEMES["mxfp4"], [*layers, Layer("missing", 16, 64)])

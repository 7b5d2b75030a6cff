"""The numbers are auto-round's own: weights bit for bit, and what comes out of the model."""

import pytest
import torch
from conftest import ARCHITECTURES, CACHE, configuration, tiny_overrides

from mixprec import models, quantize
from mixprec.schemes import SCHEMES


def loaded(folder):
    model = configuration(*tiny_overrides(folder)).model
    checkpoint = models.checkpoint(model, CACHE)
    return models.load(checkpoint, model), models.load_tokenizer(checkpoint, model)


def mixed(model, low: str, high: str) -> dict[str, str]:
    return {
        layer.name: high if i % 3 == 0 else low
        for i, layer in enumerate(models.quantized_layers(model))
    }


def by_auto_round(folder, allocation, monkeypatch, tmp_path):
    """The model that auto-round quantizes by itself for the same allocation."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)  # it leaves a folder where it runs
    others = {
        k: quantize._layer_settings(SCHEMES[v]) for k, v in allocation.items() if v != "mxfp4"
    }
    compressor = AutoRound(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
        AutoTokenizer.from_pretrained(folder),
        scheme="MXFP4", layer_config=others, iters=0, disable_opt_rtn=True,
        device_map="cpu", enable_torch_compile=False,
    )  # fmt: skip
    return compressor.quantize()[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_and_logits_are_auto_rounds(architecture, tiny, monkeypatch, tmp_path):
    model, _ = loaded(tiny[architecture])
    allocation = mixed(model, "mxfp4", "mxfp8")
    reference = by_auto_round(tiny[architecture], allocation, monkeypatch, tmp_path)
    quantize.InMemory(model, packed=False).apply(allocation)
    packed, _ = loaded(tiny[architecture])
    quantize.InMemory(packed).apply(allocation)

    theirs, ours = dict(reference.named_modules()), dict(model.named_modules())
    for name in allocation:
        weight = theirs[name].orig_layer.weight
        assert torch.equal(ours[name].weight, weight.float()), name
        assert torch.equal(packed.get_submodule(name).packed, weight.float()), name
    assert torch.equal(ours["lm_head"].weight, theirs["lm_head"].weight.float())

    tokens = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference.float()(tokens).logits
        actual = model(tokens).logits
        torch.testing.assert_close(packed(tokens).logits, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(actual, expected)


def test_rounding_changes_something(tiny):
    model, _ = loaded(tiny["llama"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    layers = [layer.name for layer in models.quantized_layers(model)]
    quantize.InMemory(model, packed=False).apply(dict.fromkeys(layers, "mxfp4"))
    for name, after in model.state_dict().items():
        quantized = name.removesuffix(".weight") in layers
        assert torch.equal(after, before[name]) != quantized, name


def test_bf16_layers_are_left_alone(tiny):
    model, _ = loaded(tiny["llama"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    layers = [layer.name for layer in models.quantized_layers(model)]
    quantize.InMemory(model, packed=False).apply(dict.fromkeys(layers, "bf16"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_one_allocation_after_another_is_as_good_as_a_fresh_model(tiny):
    tokens = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    model, _ = loaded(tiny["qwen3"])
    in_memory = quantize.InMemory(model)
    exact = model(tokens).logits
    for schemes in (("mxfp4", "mxfp8"), ("bf16", "mxfp4"), ("mxfp8", "bf16")):
        in_memory.apply(mixed(model, *schemes))
        fresh, _ = loaded(tiny["qwen3"])
        quantize.InMemory(fresh).apply(mixed(fresh, *schemes))
        assert torch.equal(model(tokens).logits, fresh(tokens).logits)
    in_memory.apply({layer.name: "bf16" for layer in models.quantized_layers(model)})
    assert torch.equal(model(tokens).logits, exact)


def test_only_layers_whose_scheme_changes_are_rounded_again(tiny, monkeypatch):
    model, _ = loaded(tiny["qwen3"])
    in_memory = quantize.InMemory(model)
    allocation = mixed(model, "mxfp4", "mxfp8")
    in_memory.apply(allocation)
    rounded = []
    original = in_memory._set
    monkeypatch.setattr(
        in_memory, "_set", lambda name, s: rounded.append(name) or original(name, s)
    )
    name = next(iter(allocation))
    in_memory.apply({**allocation, name: "mxfp4"})
    assert rounded == [name]


def test_the_head_and_embeddings_are_never_quantized(tiny):
    for folder in tiny.values():
        model, _ = loaded(folder)
        names = [layer.name for layer in models.quantized_layers(model)]
        assert len(names) == 21 and all(name.startswith("model.layers.") for name in names)
        assert names[:7] == [
            *(f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"),
            *(f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up", "down")),
        ]


def test_a_mixed_weight_only_model_is_exported_and_reloaded(tiny, monkeypatch, tmp_path):
    """Real files, real kernels: each layer comes back with its own bits and nearly its values."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = loaded(tiny["llama"])
    allocation = mixed(model, "w4g32", "w8g32")
    tokens = torch.randint(3, 200, (1, 40), generator=torch.Generator().manual_seed(0))
    exact = model(tokens).logits
    folder = quantize.export(model.bfloat16(), tokenizer, allocation, tmp_path / "export")
    assert list(folder.glob("*.safetensors")) and not list(folder.glob("*.bin"))

    reloaded = quantize.reload(folder, torch.device("cpu"), torch.float32)
    modules = dict(reloaded.named_modules())
    for name, scheme in allocation.items():
        assert modules[name].bits == SCHEMES[scheme].bits, name
    close = torch.nn.functional.cosine_similarity(reloaded(tokens).logits, exact, dim=-1)
    assert close.min() > 0.9

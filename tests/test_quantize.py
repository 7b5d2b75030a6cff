"""The numbers are auto-round's own: weights bit for bit, and what comes out of the model."""

import pytest
import torch
from conftest import ARCHITECTURES, CACHE, configuration, tiny_overrides
from safetensors.torch import load_file

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


@pytest.fixture(scope="module")
def round_trip(tiny, tmp_path_factory):
    """(options) -> (allocation, reference weights, what is on disk, the reloaded model), made once."""
    made = {}

    def get(architecture: str, low: str, high: str):
        if (architecture, low) not in made:
            model, tokenizer = loaded(tiny[architecture])
            allocation = mixed(model, low, high)
            reference = {n: model.get_submodule(n).weight.data.bfloat16() for n in allocation}
            folder = quantize.export(
                model.bfloat16(), tokenizer, allocation, tmp_path_factory.mktemp("export")
            )
            assert not list(folder.glob("*.bin")), "a pickle"
            stored = {}
            for file in folder.glob("*.safetensors"):
                stored |= load_file(file)
            reloaded = quantize.reload(folder, torch.device("cpu"), torch.float32)
            made[architecture, low] = allocation, reference, stored, reloaded
        return made[architecture, low]

    return get


def dequantized(stored: dict, name: str, bits: int, group_size: int) -> torch.Tensor:
    """A layer's weight as its integers and scales on disk say, float32 [out, in]."""
    packed, scales = stored[f"{name}.qweight"], stored[f"{name}.scales"]
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)[None, :, None]
    integers = (packed[:, None, :] >> shifts & 2**bits - 1).reshape(-1, packed.shape[1])
    return ((integers - 2 ** (bits - 1)) * scales.float().repeat_interleave(group_size, 0)).T


MIXES = [("llama", "w2g32", "w4g32"), ("qwen2", "w4g32", "w8g32")]  # qwen2 has biases


@pytest.mark.parametrize("mix", MIXES)
def test_every_layer_comes_back_as_it_was_allocated(mix, round_trip):
    """Its bits, its groups, and bit for bit the weight that auto-round's own function rounds to."""
    from auto_round.data_type.int import quant_tensor_sym

    allocation, reference, stored, reloaded = round_trip(*mix)
    assert quantize.came_back(reloaded, allocation) == "ark"
    for name, scheme_name in allocation.items():
        scheme = SCHEMES[scheme_name]
        rows, columns = reference[name].shape
        assert stored[f"{name}.qweight"].shape == (columns * scheme.bits // 32, rows)
        assert stored[f"{name}.scales"].shape == (columns // scheme.group_size, rows)
        assert stored[f"{name}.scales"].dtype == torch.float16
        weight = dequantized(stored, name, scheme.bits, scheme.group_size)
        nearest, _, _ = quant_tensor_sym(
            reference[name].clone(), bits=scheme.bits, group_size=scheme.group_size
        )
        # The function multiplies and then rounds to bfloat16; what is stored is not rounded so.
        assert torch.equal(weight.bfloat16(), nearest), name


@pytest.mark.parametrize("mix", MIXES)
def test_the_kernel_multiplies_by_what_is_stored(mix, round_trip):
    """Against float64. Here the kernel computes in float32; with AMX it may take bfloat16."""
    allocation, _, stored, reloaded = round_trip(*mix)
    for name, scheme_name in allocation.items():
        module, scheme = reloaded.get_submodule(name), SCHEMES[scheme_name]
        weight = dequantized(stored, name, scheme.bits, scheme.group_size).double()
        x = torch.randn(50, weight.shape[1], generator=torch.Generator().manual_seed(1))
        exact = x.double() @ weight.T
        if f"{name}.bias" in stored:
            exact += stored[f"{name}.bias"]
        assert (module(x) - exact).norm() < 2**-8 * exact.norm(), name


@pytest.mark.parametrize("mix", MIXES)
def test_the_reloaded_models_logits_are_the_in_memory_ones(mix, tiny, round_trip):
    allocation, _, stored, reloaded = round_trip(*mix)
    model, _ = loaded(tiny[mix[0]])
    for name, scheme_name in allocation.items():
        scheme = SCHEMES[scheme_name]
        weight = dequantized(stored, name, scheme.bits, scheme.group_size)
        model.get_submodule(name).weight.data.copy_(weight)
    tokens = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    exact, actual = model(tokens).logits, reloaded(tokens).logits
    assert (actual - exact).norm() < 2**-6 * exact.norm()


def test_a_layer_that_came_back_otherwise_is_named(round_trip):
    allocation, _, _, reloaded = round_trip(*MIXES[0])
    name = next(name for name, scheme in allocation.items() if scheme == "w2g32")
    with pytest.raises(RuntimeError) as raised:
        quantize.came_back(reloaded, {**allocation, name: "w4g32"})
    assert str(raised.value) == (
        f"{name} was reloaded as QuantLinearGPTQ of 2 bits in groups of 32; "
        "allocated: 4 bits in groups of 32"
    )
    with pytest.raises(RuntimeError, match="lm_head was reloaded as Linear of None bits"):
        quantize.came_back(reloaded, {"lm_head": "w4g32"})

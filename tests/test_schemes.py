import pytest
import torch

from mixprec.schemes import BF16, SCHEMES, Layer, layer_bits, realised_bits


@pytest.mark.parametrize("scheme", [*SCHEMES.values(), BF16], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("count_scales", [False, True])
def test_bits_are_counted_as_auto_round_counts_them(scheme, count_scales):
    from auto_round.auto_scheme.utils import compute_layer_bits
    from auto_round.schemes import preset_name_to_scheme

    linear = torch.nn.Linear(576, 192, bias=False)
    for key, value in preset_name_to_scheme(scheme.preset).items():
        setattr(linear, key, value)
    expected, _ = compute_layer_bits(linear, ignore_scale_zp_bits=not count_scales)
    assert layer_bits(Layer("x", 192, 576), scheme, count_scales=count_scales) == expected


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_a_scheme_is_auto_rounds_preset(scheme):
    from auto_round.schemes import preset_name_to_scheme

    preset = preset_name_to_scheme(scheme.preset)
    assert (scheme.bits, scheme.group_size) == (preset.bits, preset.group_size)
    assert scheme.activations == (preset.act_bits is not None and preset.act_bits < 16)
    if scheme.activations:
        assert (preset.act_bits, preset.act_group_size) == (scheme.bits, scheme.group_size)


def test_average_is_weighted_by_parameters():
    layers = [Layer("a", 10, 32), Layer("b", 30, 32)]
    allocation = {"a": "mxfp8", "b": "mxfp4"}
    assert realised_bits(layers, allocation) == 5.0
    assert realised_bits(layers, allocation, count_scales=True) == 5.25

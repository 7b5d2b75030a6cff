"""Packed linears are as exact as torch's own, and only stand where they compute the same."""

import pytest
import torch

from mixprec.linear import PackedLinear, can_pack


def linear(out=96, into=160, bias=False):
    layer = torch.nn.Linear(into, out, bias=bias)
    layer.weight.data = layer.weight.data.bfloat16().float()
    return layer.requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(160,), (1, 160), (7, 160), (2, 3, 160), (0, 160)])
def test_products_are_as_exact_as_torchs(shape, bias):
    torch.manual_seed(0)
    layer = linear(bias=bias)
    x = torch.randn(shape)
    exact = torch.nn.functional.linear(
        x.double(), layer.weight.double(), layer.bias.double() if bias else None
    )
    theirs, ours = layer(x), PackedLinear(layer)(x)
    assert ours.dtype == torch.float32 and ours.shape == theirs.shape
    error, allowed = (ours - exact).abs(), 2e-6 * (1 + exact.abs())
    assert (error <= allowed).all() and ((theirs - exact).abs() <= allowed).all()


def test_infinity_and_nan_come_through():
    layer = linear()
    x = torch.zeros(2, 160)
    x[0, 3], x[1, 5] = float("inf"), float("nan")
    assert not PackedLinear(layer)(x).isfinite().any()


def test_another_weight_takes_its_place_and_leaves_its_own():
    packed, x = PackedLinear(linear()), torch.ones(1, 160)
    own = packed.weight.clone()
    assert torch.equal(packed.packed, own.float()) and packed(x).any()
    packed.pack(torch.zeros(96, 160))
    assert not packed(x).any() and not packed.packed.any()
    assert torch.equal(packed.weight, own)


def test_a_weight_is_held_beside_what_is_packed_only_while_that_is_anothers():
    layer = linear()
    tied, packed = PackedLinear(layer, tied=True), PackedLinear(layer)
    assert tied.weight.data_ptr() == layer.weight.data_ptr()
    tied.weight = layer.weight  # as lm-eval ties it once more
    assert packed._own is None and packed.weight.dtype == torch.bfloat16
    for each in (tied, packed):
        each.pack(torch.zeros(96, 160))
        assert torch.equal(each.weight.float(), layer.weight)
        each.pack(torch.ones(96, 160))  # another one, and then its own again
        each.pack(None)
        assert torch.equal(each.packed, layer.weight) and each._own is None


def test_only_float32_linears_of_bfloat16_values_on_a_cpu_are_packed():
    assert can_pack(linear())
    assert not can_pack(torch.nn.Linear(160, 96))  # its weights have more bits
    assert not can_pack(linear().bfloat16())
    assert not can_pack(linear().to("meta"))
    assert not can_pack(torch.nn.Embedding(4, 4))

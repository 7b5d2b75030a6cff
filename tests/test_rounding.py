"""`round_mx` against auto-round's own `quant_mx`: equal in every bit."""

import math

import pytest
import torch
from auto_round.data_type.mxfp import MXFP_FORMAT_CACHE, quant_mx

from mixprec import rounding
from mixprec.rounding import round_mx

BITS = (4, 6, 8)
SHORT = (torch.bfloat16, torch.float16)
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.fixture(autouse=True)
def one_thread():
    """auto-round's many small operations in two threads wait long on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference(tensor: torch.Tensor, bits: int) -> torch.Tensor:
    return quant_mx(tensor, bits=bits, group_size=32, data_type=f"mx_fp{bits}")[0]


def assert_same(tensor: torch.Tensor, *formats: int) -> None:
    """The same bits from both in all `formats` (or these); any NaN equals any other."""
    pattern = INTEGERS[tensor.dtype]
    before = tensor.clone().view(pattern)
    for bits in formats or BITS:
        got, expected = round_mx(tensor, bits), reference(tensor, bits)
        assert torch.equal(tensor.view(pattern), before), "the input was modified"
        assert got.dtype == expected.dtype == tensor.dtype and got.shape == expected.shape
        differ = got.view(pattern) != expected.view(pattern)
        wrong = (differ & ~(got.isnan() & expected.isnan())).nonzero()
        if len(wrong):
            at = tuple(wrong[0].tolist())
            value, ours, theirs = (t[at].item().hex() for t in (tensor, got, expected))
            group = tensor[at[:-1]].view(-1, 32)[at[-1] // 32].tolist()
            raise AssertionError(
                f"MXFP{bits}: {len(wrong)} differ; the first is {value}, which became {ours}, "
                f"not {theirs}, in {group}"
            )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_values(dtype: torch.dtype) -> torch.Tensor:
    """All 65536 values of a 16-bit dtype: zeros, denormals, infinities and NaN too."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def finite_values(dtype: torch.dtype) -> torch.Tensor:
    values = all_values(dtype)
    return values[values.isfinite()]


def powers(low: int, high: int) -> torch.Tensor:
    """2**low ... 2**high in float32; the smallest, 2**-149, is a denormal."""
    return torch.tensor([math.ldexp(1.0, k) for k in range(low, high + 1)])


def steps(bits: int) -> tuple[int, int, float]:
    """Mantissa bits, exponent of the smallest normal number and largest number, from auto-round."""
    exponent_bits, mantissa_and_two, _, largest, _ = MXFP_FORMAT_CACHE[f"mx_fp{bits}"]
    return mantissa_and_two - 2, 2 - 2 ** (exponent_bits - 1), largest


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_every_short_value_among_zeros(dtype):
    groups = torch.zeros(2**16, 32, dtype=dtype)
    slots = torch.randint(32, (2**16,), generator=generator())
    groups[torch.arange(2**16), slots] = all_values(dtype)
    assert_same(groups)
    assert_same(groups.masked_fill(groups == 0, -0.0))


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_every_short_value_among_others(dtype):
    values = finite_values(dtype)
    values = torch.cat((values, values.new_zeros(-len(values) % 32)))
    assert_same(values.view(-1, 32))  # neighbours in size
    for seed in range(8):  # any neighbours
        order = torch.randperm(len(values), generator=generator(seed))
        assert_same(values[order].view(-1, 32))


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_every_short_value_below_a_larger_one(dtype):
    """Next to a maximum of 0 to 20 binades more: each of the format's steps comes to each value."""
    values = finite_values(dtype)
    values = torch.cat((values, values.new_zeros(-len(values) % 16))).view(-1, 16).float()
    largest = values.abs().amax(-1, keepdim=True)
    for binades in range(21):
        group = torch.cat((values, (largest * 2**binades).expand(-1, 16)), dim=-1).to(dtype)
        assert_same(group[group.isfinite().all(-1)])


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_every_short_value_next_to_infinity_or_nan(dtype, special):
    groups = all_values(dtype).view(-1, 16).repeat_interleave(2, dim=-1).clone()
    groups[:, 7] = special
    assert_same(groups)
    # A group is spoilt as a whole, and no other one is.
    row = torch.tensor([1.0] * 31 + [special] + [1.0] * 32, dtype=dtype)
    for bits in BITS:
        rounded = round_mx(row, bits)
        assert rounded[:32].isnan().all() and (rounded[32:] == 1).all()


def test_random_patterns_of_float32():
    """Any exponents in one group: most values are rounded to zero or are a group's maximum."""
    patterns = torch.randint(
        -(2**31), 2**31, (20_000, 32), generator=generator(), dtype=torch.int64
    )
    groups = patterns.to(torch.int32).view(torch.float32)
    assert_same(groups)
    assert_same(groups.masked_fill(~groups.isfinite(), 1.0))
    assert_same(groups.nan_to_num().float() * 2.0**-120)  # many denormals


def test_float32_groups_of_every_exponent():
    """Normal and heavy-tailed numbers at each scale from denormals to overflow."""
    scales = powers(-149, 127).view(-1, 1, 1)
    normal = torch.randn(1, 40, 32, generator=generator())
    wide = normal * 2.0 ** torch.randint(-14, 1, (1, 40, 32), generator=generator(1))
    for groups in (normal, wide):
        groups = groups * scales
        assert_same(groups.masked_fill(groups.isinf(), 1.0))
    denormals = torch.randint(0, 2**23, (4000, 32), generator=generator(), dtype=torch.int32)
    shift = torch.randint(0, 24, (4000, 1), generator=generator(1), dtype=torch.int32)
    assert_same((denormals >> shift).view(torch.float32))
    assert_same(-(denormals >> shift).view(torch.float32))


@pytest.mark.parametrize("bits", BITS)
def test_ties_and_their_neighbours(bits):
    """Each number halfway between two of the format, two floats on each side, at every scale."""
    mantissa, low, largest = steps(bits)
    smallest = 2.0 ** (low - mantissa)
    binades = int(math.log2(largest)) - low
    numbers = {n * smallest / 2 for n in range(2 ** (mantissa + 1) + 1)}  # denormal ones
    for binade in range(binades + 2):
        numbers |= {
            (2 ** (mantissa + 1) + n) * smallest / 2 * 2**binade
            for n in range(2 ** (mantissa + 1) + 1)
        }
    ties = torch.tensor(sorted(n for n in numbers if n < 2 * largest), dtype=torch.float32)
    near = [ties]
    for end in (0.0, math.inf):
        near.append(torch.nextafter(ties, torch.tensor(end)))
        near.append(torch.nextafter(near[-1], torch.tensor(end)))
    values = torch.cat((*near, *(-n for n in near)))
    values = torch.cat((values, values.new_zeros(-len(values) % 31))).view(-1, 31)
    # One more value sets the group's scale to 1.
    maximum = torch.full((len(values), 1), 2.0 ** math.floor(math.log2(largest)))
    groups = torch.cat((values.masked_fill(values.abs() >= 2 * maximum, 0.0), maximum), dim=-1)
    for scale in powers(-149, 127 - int(math.log2(largest))):
        assert_same(groups * scale, bits)


def test_maxima_around_powers_of_two():
    """log2 rounds up to k for up to 44 floats below 2**k: the scale of the larger binade."""
    centre = powers(-126, 127).view(torch.int32).view(-1, 1)
    maxima = (centre + torch.arange(-64, 65, dtype=torch.int32)).view(torch.float32).reshape(-1, 1)
    others = torch.rand(1, 31, generator=generator()) * 2 - 1
    groups = torch.cat((others * maxima, maxima), dim=-1)
    assert_same(groups)
    assert_same(-groups)
    # One at a time, and a few: whatever path torch.log2 takes for the remainder of a vector.
    for count in (1, 3, 17):
        assert_same(groups[64 * 129 + 60 :][:count])
    below = torch.nextafter(torch.tensor(2.0**100), torch.tensor(0.0))
    assert torch.log2(below) == 100


@pytest.mark.parametrize("bits", BITS)
def test_signs_of_zero(bits):
    """-0 becomes +0, and a negative number that is rounded to zero -0."""
    group = torch.zeros(1, 32)
    group[0, :4] = torch.tensor([1.0, -0.0, 1e-9, -1e-9])
    assert_same(group, bits)
    assert torch.signbit(round_mx(group, bits))[0, :4].tolist() == [False, False, False, True]
    assert_same(torch.full((1, 32), -0.0), bits)


@pytest.mark.parametrize("bits", BITS)
def test_the_value_that_auto_round_rounds_away(bits):
    """Half of the smallest number less an ulp becomes that number; half itself becomes zero."""
    mantissa, low, largest = steps(bits)
    smallest = 2.0 ** (low - mantissa)
    half = torch.tensor(smallest / 2)
    below = torch.nextafter(half, torch.tensor(0.0)).item()
    lower = torch.nextafter(torch.tensor(below), torch.tensor(0.0)).item()
    group = torch.zeros(1, 32)
    group[0, :6] = torch.tensor(
        [2.0 ** int(math.log2(largest)), below, -below, lower, half, -lower]
    )
    assert_same(group, bits)
    assert round_mx(group, bits)[0, 1:6].tolist() == [smallest, -smallest, 0, 0, 0]
    for scale in powers(-100, 100):
        assert_same(group * scale, bits)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_shapes(dtype, monkeypatch):
    """Any number of dimensions, more groups than one chunk holds, other strides, nothing at all."""
    monkeypatch.setattr(rounding, "CHUNK", 7)
    tensor = torch.randn(5, 3, 96, generator=generator()).to(dtype)
    for view in (tensor, tensor[0], tensor[:, 1], tensor.transpose(0, 1), tensor[:0]):
        assert_same(view, 4)
    assert torch.equal(round_mx(tensor[0, 0], 4), reference(tensor[0, :1], 4)[0])
    columns = torch.randn(64, 3, generator=generator()).to(dtype).t()
    assert torch.equal(round_mx(columns, 4), reference(columns.contiguous(), 4))
    assert torch.equal(round_mx(tensor.expand(2, 5, 3, 96), 4)[1], reference(tensor, 4))


def test_a_weight_that_needs_a_gradient():
    weight = torch.nn.Parameter(torch.randn(4, 64, generator=generator()))
    assert torch.equal(round_mx(weight, 8), reference(weight.detach(), 8))
    assert not round_mx(weight, 8).requires_grad


def test_refusals():
    for shape in ((), (33,), (32, 16)):
        with pytest.raises(ValueError, match="no multiple of 32"):
            round_mx(torch.zeros(shape), 4)
    with pytest.raises(ValueError, match="not 5"):
        round_mx(torch.zeros(32), 5)
    with pytest.raises(ValueError, match="not torch"):
        round_mx(torch.zeros(32, dtype=torch.float64), 4)

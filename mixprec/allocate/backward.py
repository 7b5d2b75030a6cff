"""One forward and backward pass over calibration text that shows every linear what it needs to be scored.

Only activations get gradients. The model's blocks are computed again on the way back (activation
checkpointing), so what is kept does not grow with depth and thousands of tokens fit in one pass: each
weight is then rounded and packed once. Logits exist for LOGITS_AT_ONCE tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from mixprec.cell import ConfigError
from mixprec.linear import Seen, multiply, pack
from mixprec.rounding import round_mx
from mixprec.schemes import Layer, Scheme

TOKENS_AT_ONCE = 2048
LOGITS_AT_ONCE = 256


def totals(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    layers: list[Layer],
    schemes: list[Scheme],
    gradient: Callable[[torch.Tensor, int, int], torch.Tensor],
    score: Callable,
) -> np.ndarray:
    """Sums over each sequence's tokens of what `score` returns: float64 [sequences, layers, options].

    tokens:   ids [sequences, tokens]
    gradient: (logits [n, words], sequence, start) -> what is sent back from them, [n, words], where
              they are those of n tokens of that sequence from `start` on; it may change logits
    score:    (error, x, g, back) -> one number for each token, [tokens], of an option's `Error`

    Logits are taken to be the output head's own, as in `evaluate.kl`. Raises ConfigError for a layer
    that not every token reaches.
    """
    sums = np.zeros((len(tokens), len(layers), len(schemes)))
    reached, rounded = set(), Inputs()

    def seer(place: int, layer: Layer, rows: slice):
        module = model.get_submodule(layer.name)

        def see(x, g, back):
            x, g, back = (t.reshape(-1, t.shape[-1]) for t in (x, g, back))
            count = rows.stop - rows.start
            if len(x) != count * tokens.shape[1]:
                raise ConfigError(f"{layer.name}: not every token reaches it; it cannot be scored")
            reached.add(layer)
            for option, scheme in enumerate(schemes):
                error = Error(module.weight, scheme, rounded, x)
                each = score(error, x, g, back).double().reshape(count, -1)
                sums[rows, place, option] += each.sum(1).cpu().numpy()

        return see

    for rows in batches(tokens):
        with _seen(model, {la.name: seer(i, la, rows) for i, la in enumerate(layers)}):
            hidden = _hidden(model, tokens[rows])
            hidden.backward(_from_head(model, hidden.detach(), rows, gradient))
    for layer in layers:
        if layer not in reached:
            raise ConfigError(f"{layer.name}: no calibration token reaches it; it cannot be scored")
    return sums


def batches(tokens: torch.Tensor) -> Iterator[slice]:
    """Rows of `tokens` [sequences, tokens] that go through the model together."""
    at_once = max(1, TOKENS_AT_ONCE // tokens.shape[1])
    for start in tqdm(range(0, len(tokens), at_once), desc="scores", leave=False):
        yield slice(start, min(start + at_once, len(tokens)))


class Error:
    """What one option does to a linear: y' − y = x' ΔWᵀ + (x' − x) Wᵀ with x' = Q(x), ΔW = Q(W) − W.

    In this form nothing large cancels, so bfloat16 arithmetic will do too.
    """

    def __init__(self, weight: torch.Tensor, scheme: Scheme, inputs: Inputs, x: torch.Tensor):
        self.weight = weight
        self.weight_error = (round_weight(weight, scheme) - weight.float()).to(x.dtype)
        self.x, self.x_error = inputs.rounded(x, scheme) if scheme.activations else (x, None)

    def along(self, g: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        """g · (y' − y) for each token; back: g W."""
        along = _dot(multiply(g.contiguous(), pack(self.weight_error.T)), self.x)
        return along if self.x_error is None else along + _dot(back, self.x_error)

    def output(self) -> torch.Tensor:
        """y' − y itself, [tokens, out_features]."""
        output = multiply(self.x, pack(self.weight_error))
        if self.x_error is None:
            return output
        return output + multiply(self.x_error, pack(self.weight.to(self.x.dtype)))


class Inputs:
    """Rounded inputs of the linears; q, k and v, or gate and up, have the same and share it."""

    def __init__(self):
        self._input: torch.Tensor | None = None  # held, so that its memory cannot become another's
        self._by_scheme: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def rounded(self, x: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
        """(Q(x), Q(x) − x)."""
        held = self._input
        if held is None or held.data_ptr() != x.data_ptr() or held.shape != x.shape:
            self._input, self._by_scheme = x, {}
        if scheme.name not in self._by_scheme:
            quantized = round_mx(x, scheme.bits)
            self._by_scheme[scheme.name] = quantized, quantized - x
        return self._by_scheme[scheme.name]


@torch.no_grad()
def round_weight(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """`weight` [out, in] rounded to nearest and de-quantized, as `quantize` does it; float32."""
    if scheme.family == "mx":
        return round_mx(weight.bfloat16(), scheme.bits).float()
    from auto_round.data_type.int import quant_tensor_sym

    rounded, scale, _ = quant_tensor_sym(
        weight.bfloat16(), bits=scheme.bits, group_size=scheme.group_size
    )
    # It returns bfloat16, where an 8-bit integer times its scale does not fit; kernels do not round.
    groups, scale = rounded.float().view(-1, scheme.group_size), scale.float().view(-1, 1)
    return ((groups / scale).round() * scale).view(weight.shape)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vecdot(a.float(), b.float())


@contextmanager
def _seen(model: torch.nn.Module, seers: dict[str, Callable]):
    """`model` with its linears as `Seen` and its blocks checkpointed; afterwards as it was."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    with ExitStack() as stack:
        for name, see in seers.items():
            module = model.get_submodule(name)
            _replace(stack, module, _seen_forward(module, see))
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                _replace(stack, module, _checkpointed(module.forward))
        hook = model.get_input_embeddings().register_forward_hook(
            lambda _, inputs, output: output.requires_grad_()
        )
        stack.callback(hook.remove)
        yield


def _seen_forward(module: torch.nn.Module, see: Callable) -> Callable:
    forward, weight = module.forward, module.weight
    return lambda x: Seen.apply(x, forward, weight, see)


def _checkpointed(forward: Callable) -> Callable:
    def checkpointed(*args, **kwargs):
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return checkpointed


def _replace(stack: ExitStack, module: torch.nn.Module, forward: Callable) -> None:
    before = module.__dict__.get("forward")  # None where it is the class's own
    module.forward = forward
    if before is None:
        stack.callback(lambda: delattr(module, "forward"))
    else:
        stack.callback(lambda: setattr(module, "forward", before))


@torch.enable_grad()
def _hidden(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The output head's inputs, [sequences, tokens, hidden size], with a graph."""
    return model.base_model(input_ids=tokens.to(model.device), use_cache=False).last_hidden_state


@torch.no_grad()
def _from_head(
    model: torch.nn.Module, hidden: torch.Tensor, rows: slice, gradient: Callable
) -> torch.Tensor:
    """`gradient` of the logits, taken back through the output head; like `hidden`."""
    head = model.get_output_embeddings()
    packed = pack(head.weight.to(hidden.dtype).T)
    result = torch.empty_like(hidden)
    for place, sequence in enumerate(range(rows.start, rows.stop)):
        for start in range(0, hidden.shape[1], LOGITS_AT_ONCE):
            part = slice(start, start + LOGITS_AT_ONCE)
            logits = head(hidden[place, part].to(head.weight.device)).float()
            sent = gradient(logits, sequence, start).to(hidden.dtype)
            result[place, part] = multiply(sent, packed).to(hidden.device)
    return result

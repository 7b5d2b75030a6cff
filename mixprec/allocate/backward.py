"""One forward and backward pass over calibration text that shows every linear what it needs to be scored.

Only activations get gradients. The model's blocks are computed again on the way back, so nothing of
their insides is kept. A model in memory does this by activation checkpointing, TOKENS_AT_ONCE at a
time; a checkpoint's `Blocks` are loaded once on the way there and once on the way back, each for all
tokens. Logits exist for LOGITS_AT_ONCE tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from mixprec.allocate.blocks import Blocks
from mixprec.cell import ConfigError
from mixprec.experts import expert_of
from mixprec.linear import Seen, multiply, pack
from mixprec.rounding import round_mx
from mixprec.schemes import Layer, Scheme

TOKENS_AT_ONCE = 4096
LOGITS_AT_ONCE = 256
# An option above the lowest loses little, and so does its score by resting on fewer tokens.
EVERY = 4  # of its tokens, one is scored


def totals(
    model: torch.nn.Module | Blocks,
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
    score:    (error, g, back) -> one number for each token, [tokens], of an option's `Error`

    For options but the first, one token of EVERY stands for all: in sequence s those at −s modulo EVERY,
    so that over EVERY sequences each place counts once. All count where there are fewer sequences, and
    for an expert, whose tokens are few.
    NaN for an expert that no token reaches. Logits are taken to be the output head's own, as in
    `evaluate.kl`. Raises ConfigError for any other layer that not every token reaches.
    """
    sums, rounded = Sums(tokens, layers, len(schemes)), Inputs()

    def see(name, weight, sequences, x, g, back):
        x, g, back = (t.reshape(-1, t.shape[-1]) for t in (x, g, back))
        few = expert_of(name) is not None or len(tokens) < EVERY
        some = None if few else _one_of_every(sequences, tokens.shape[1])
        for option, scheme in enumerate(schemes):
            if option == 0 or some is None:
                each = score(Error(weight, scheme, rounded, x), g, back)
                sums.add(name, option, sequences, each)
            else:
                error = Error(weight, scheme, rounded, x, some)
                each = EVERY * score(error, g[some], back[some])
                sums.add(name, option, sequences[some], each)

    backward = _through_blocks if isinstance(model, Blocks) else _through_model
    backward(model, tokens, [layer.name for layer in layers], gradient, see)
    return sums.of_all()


def _one_of_every(sequences: torch.Tensor, length: int) -> torch.Tensor:
    """Rows of the tokens that options but the first are scored on, of whole sequences of that length."""
    places = torch.arange(len(sequences)) % length
    return ((places + sequences) % EVERY == 0).nonzero()[:, 0]


class Sums:
    """What tokens add up to: by sequence, layer and option."""

    def __init__(self, tokens: torch.Tensor, layers: list[Layer], options: int):
        self._places = {layer.name: place for place, layer in enumerate(layers)}
        self._sums = np.zeros((len(tokens), len(layers), options))
        self._reached: set[str] = set()

    def add(self, layer: str, option: int, sequences: torch.Tensor, each: torch.Tensor) -> None:
        """each: one number for each token that reached `layer`; sequences: whose token it is.

        Raises ConfigError if they are not as many, as where a layer is skipped for some tokens.
        """
        if len(each) != len(sequences):
            raise ConfigError(f"{layer}: not every token reaches it; it cannot be scored")
        np.add.at(
            self._sums[:, self._places[layer], option],
            sequences.numpy(),
            each.double().cpu().numpy(),
        )
        self._reached.add(layer)

    def of_all(self) -> np.ndarray:
        """float64 [sequences, layers, options]; NaN for a layer of an expert that no token reached.

        Raises ConfigError for any other layer that none reached.
        """
        for layer, place in self._places.items():
            if layer not in self._reached:
                if expert_of(layer) is None:
                    raise ConfigError(
                        f"{layer}: no calibration token reaches it; it cannot be scored"
                    )
                self._sums[:, place] = np.nan
        return self._sums


def batches(tokens: torch.Tensor) -> list[slice]:
    """Rows of `tokens` [sequences, tokens] that go through the model together."""
    at_once = max(1, TOKENS_AT_ONCE // tokens.shape[1])
    return [
        slice(start, min(start + at_once, len(tokens))) for start in range(0, len(tokens), at_once)
    ]


class Error:
    """What one option does to a linear: y' − y = x' ΔWᵀ + (x' − x) Wᵀ with x' = Q(x), ΔW = Q(W) − W.

    In this form nothing large cancels, so bfloat16 arithmetic will do too.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scheme: Scheme,
        inputs: Inputs,
        x: torch.Tensor,
        rows: torch.Tensor | None = None,
    ):
        """rows: of x, those that it is for; None: all."""
        self.weight = weight
        self.weight_error = (round_weight(weight, scheme) - weight.float()).to(x.dtype)
        self.x, self.x_error = inputs.rounded(x, scheme, rows)

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
        self._by_scheme: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def rounded(
        self, x: torch.Tensor, scheme: Scheme, rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(Q(x), Q(x) − x) of those rows of x; (x, None) if the scheme does not round activations.

        A scheme always has the same rows of one x.
        """
        held = self._input
        if held is None or held.data_ptr() != x.data_ptr() or held.shape != x.shape:
            self._input, self._by_scheme = x, {}
        if scheme.name not in self._by_scheme:
            x = x if rows is None else x[rows]
            quantized = round_mx(x, scheme.bits) if scheme.activations else x
            error = quantized - x if scheme.activations else None
            self._by_scheme[scheme.name] = quantized, error
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


# --- a forward pass alone -----------------------------------------------------------------------


@torch.no_grad()
def forward(
    model: torch.nn.Module | Blocks, tokens: torch.Tensor, names: list[str], see: Callable
) -> None:
    """Run `tokens` up to the output head; see(name, weight, sequences, x) at each linear of `names`.

    x: the linear's input [..., in_features]; sequences: for each row of it, whose token it is.
    """

    def watch(stack: ExitStack, root, prefix, rows):
        for name, module in _within(root, prefix, names):

            def hook(module, inputs, name=name):
                see(name, module.weight, _sequences(root, prefix, name, rows, tokens), *inputs)

            stack.callback(module.register_forward_pre_hook(hook).remove)

    _last_hidden(model, tokens, watch)


@torch.no_grad()
def divergences(
    model: torch.nn.Module | Blocks, tokens: torch.Tensor, layers: list[Layer], scheme: Scheme
) -> np.ndarray:
    """Measured KL(BF16 ‖ every layer in `scheme`) in nats per token, float64 [sequences].

    Raises FloatingPointError if it is not finite.
    Weights and inputs are rounded as each linear multiplies, so `model` stays as it is.
    """
    names = [layer.name for layer in layers]

    def watch(stack: ExitStack, root, prefix, rows):
        for _, module in _within(root, prefix, names):
            _replace(stack, module, lambda x, module=module: _rounded(module, x, scheme))

    plain, rounded = (_last_hidden(model, tokens, w) for w in (None, watch))
    head = model.head() if isinstance(model, Blocks) else model.get_output_embeddings()
    kl = np.zeros(len(tokens))
    for sequence in range(len(tokens)):
        for start in range(0, tokens.shape[1], LOGITS_AT_ONCE):
            expected, actual = (
                torch.log_softmax(
                    head(hidden[sequence, start : start + LOGITS_AT_ONCE].to(head.weight.device)).float(),
                    -1,
                )
                for hidden in (plain, rounded)
            )  # fmt: skip
            kl[sequence] += (expected.exp() * (expected - actual)).sum().item()
    if not np.isfinite(kl).all():
        raise FloatingPointError(f"KL of every layer in {scheme.name} is not finite")
    return kl / tokens.shape[1]


def _rounded(module: torch.nn.Module, x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """What the linear would make of x in `scheme`."""
    weight = pack(round_weight(module.weight, scheme).to(x.dtype))
    return multiply(round_mx(x, scheme.bits) if scheme.activations else x, weight, module.bias)


def _last_hidden(model, tokens: torch.Tensor, watch: Callable | None) -> torch.Tensor:
    """Inputs of the output head, [sequences, tokens, hidden size]; watch(stack, root, prefix, rows)
    prepares what runs next: `rows` of tokens through `root`, whose names in the model begin so."""
    if isinstance(model, Blocks):
        for hidden in _boundaries(model, tokens, watch):  # noqa: B007 - the last one counts
            pass
        return model.norm()(hidden.to(model.device))
    hidden = []
    for rows in tqdm(batches(tokens), desc="scores", leave=False):
        with ExitStack() as stack:
            if watch is not None:
                watch(stack, model, "", rows)
            ids = tokens[rows].to(model.device)
            hidden.append(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    return torch.cat(hidden)


# --- backward through a model in memory ---------------------------------------------------------


def _through_model(model, tokens, names, gradient, see) -> None:
    """Afterwards the model is as it was."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    head = model.get_output_embeddings()
    for rows in tqdm(batches(tokens), desc="scores", leave=False):
        with ExitStack() as stack:
            _show(stack, model, "", names, rows, tokens, see)
            for module in model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    _replace(stack, module, _checkpointed(module.forward))
            hook = model.get_input_embeddings().register_forward_hook(
                lambda _, inputs, output: output.requires_grad_()
            )
            stack.callback(hook.remove)
            with torch.enable_grad():
                ids = tokens[rows].to(model.device)
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            back = pack(head.weight.to(hidden.dtype).T)
            hidden.backward(_from_head(head, back, hidden.detach(), rows, gradient))


def _checkpointed(forward: Callable) -> Callable:
    def checkpointed(*args, **kwargs):
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return checkpointed


# --- backward through a checkpoint, one block at a time in memory -------------------------------


def _through_blocks(blocks, tokens, names, gradient, see) -> None:
    with torch.no_grad():
        inputs = list(_boundaries(blocks, tokens))
    back = _into_last(blocks, inputs.pop(), tokens, gradient)
    for place in tqdm(reversed(range(len(blocks))), desc="scores", total=len(blocks), leave=False):
        _into_block(blocks, place, inputs.pop(), back, tokens, names, see)


def _boundaries(blocks, tokens, watch: Callable | None = None) -> Iterator[torch.Tensor]:
    """Every block's inputs and the last one's output, [sequences, tokens, hidden size], on the CPU."""
    hidden = blocks.embedded(tokens)
    for place in tqdm(range(len(blocks)), desc="forward", leave=False):
        yield hidden
        hidden = _through_block(blocks, place, hidden, tokens, watch)
    yield hidden


def _through_block(blocks, place, hidden, tokens, watch) -> torch.Tensor:
    block, output = blocks.block(place), torch.empty_like(hidden)
    for rows in batches(tokens):
        with ExitStack() as stack:
            if watch is not None:
                watch(stack, block, f"{blocks.name(place)}.", rows)
            output[rows] = blocks.run(place, block, hidden[rows].to(blocks.device)).cpu()
    return output


def _into_last(blocks, output, tokens, gradient) -> torch.Tensor:
    """The gradient at the last block's output; it takes its place in memory."""
    norm, head = blocks.norm(), blocks.head()
    for rows in batches(tokens):
        x = output[rows].to(blocks.device).requires_grad_()
        with torch.enable_grad():
            normed = norm(x)
        normed.backward(_from_head(head, head.weight.T, normed.detach(), rows, gradient))
        output[rows] = x.grad.cpu()
    return output


def _into_block(blocks, place, inputs, back, tokens, names, see) -> None:
    """back: the gradient at the block's output, which becomes the one at its input."""
    block = blocks.block(place)
    for rows in batches(tokens):
        x = inputs[rows].to(blocks.device).requires_grad_()
        with ExitStack() as stack, torch.enable_grad():
            _show(stack, block, f"{blocks.name(place)}.", names, rows, tokens, see)
            blocks.run(place, block, x).backward(back[rows].to(blocks.device))
        back[rows] = x.grad.cpu()


# --- both -------------------------------------------------------------------------------------------


def _show(stack: ExitStack, root, prefix, names, rows, tokens, see) -> None:
    """While `stack` is open, show `see` what the linears `names` in `root` have on the way back."""

    def shown(module, forward, name):
        def show(weight, x, g, back):
            see(name, weight, _sequences(root, prefix, name, rows, tokens), x, g, back)

        return lambda x: Seen.apply(x, module, forward, show)

    for name, module in _within(root, prefix, names):
        _replace(stack, module, shown(module, module.forward, name))


def _within(root, prefix: str, names: list[str]) -> Iterator[tuple[str, torch.nn.Module]]:
    """Those of the modules `names` of the model that are in `root`, whose names begin with `prefix`."""
    for name in names:
        if name.startswith(prefix):
            yield name, root.get_submodule(name.removeprefix(prefix))


def _sequences(root, prefix: str, name: str, rows: slice, tokens: torch.Tensor) -> torch.Tensor:
    """The sequence of each token that reaches the linear `name`, if `rows` have just gone through."""
    length = tokens.shape[1]
    if (expert := expert_of(name)) is None:
        return torch.arange(rows.start, rows.stop).repeat_interleave(length)
    experts, which = expert
    reached = root.get_submodule(experts.removeprefix(prefix)).tokens[which]
    return rows.start + reached.cpu() // length


def _replace(stack: ExitStack, module: torch.nn.Module, forward: Callable) -> None:
    before = module.__dict__.get("forward")  # None where it is the class's own
    module.forward = forward
    if before is None:
        stack.callback(lambda: delattr(module, "forward"))
    else:
        stack.callback(lambda: setattr(module, "forward", before))


@torch.no_grad()
def _from_head(
    head: torch.nn.Module, back: torch.Tensor, hidden: torch.Tensor, rows: slice, gradient: Callable
) -> torch.Tensor:
    """`gradient` of the logits, taken back through the output head; like `hidden`.

    back: the head's weight, transposed, as `multiply` takes it.
    """
    result = torch.empty_like(hidden)
    for place, sequence in enumerate(range(rows.start, rows.stop)):
        for start in range(0, hidden.shape[1], LOGITS_AT_ONCE):
            part = slice(start, start + LOGITS_AT_ONCE)
            logits = head(hidden[place, part].to(head.weight.device)).float()
            sent = gradient(logits, sequence, start).to(hidden.dtype)
            result[place, part] = multiply(sent, back).to(hidden.device)
    return result

"""KL(BF16 || quantized) on held-out text: it sees differences that a hundred documents cannot."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tqdm import tqdm


class Reference:
    """BF16's next-token distributions on some tokens, as the inputs of its output head.

    Log-probabilities of 4,096 tokens over 150,000 words are gigabytes; the hidden states they are a
    function of are megabytes, and the head is never quantized, so it gives them back exactly.
    """

    def __init__(self, hidden: torch.Tensor):
        self.hidden = hidden  # [sequences, tokens, hidden size], in the arithmetic's dtype

    @classmethod
    def of(cls, model: torch.nn.Module, tokens: torch.Tensor, file: Path) -> Reference:
        """Read from `file`, or computed by the unquantized `model` and stored there.

        Raises FloatingPointError, and stores nothing, if they are not finite.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not file.is_file():
                rows = [
                    _forward(model, row)[0].cpu()
                    for row in tqdm(tokens, desc="BF16 distributions", leave=False)
                ]
                hidden = torch.stack(rows)
                if not torch.isfinite(hidden).all():
                    raise FloatingPointError("the BF16 model's hidden states are not finite")
                aside = file.with_suffix(".tmp")
                save_file({"hidden": hidden}, aside)
                aside.replace(file)
        return cls(load_file(file)["hidden"])


@torch.no_grad()
def divergence(model: torch.nn.Module, tokens: torch.Tensor, reference: Reference) -> dict:
    """Mean KL(reference || model) in nats per token, top-1 agreement, and their standard errors.

    tokens: ids [sequences, tokens]. Tokens of a sequence are not independent, so standard errors
    are those of the mean over sequences (None for one sequence). Raises FloatingPointError if a
    distribution is not finite.
    """
    head = model.get_output_embeddings()
    kls, agreements = [], []
    for row, hidden in tqdm(
        zip(tokens, reference.hidden, strict=True),
        total=len(tokens),
        desc="KL to BF16",
        leave=False,
    ):
        expected = _log_probabilities(head(hidden.to(head.weight.device)))
        actual = _log_probabilities(_forward(model, row)[1])
        kl = (expected.exp() * (expected - actual)).sum(-1).mean().item()
        if not math.isfinite(kl):
            raise FloatingPointError("KL to BF16 is not finite: the model's logits are not")
        kls.append(kl)
        agreements.append((expected.argmax(-1) == actual.argmax(-1)).float().mean().item())
    return {
        "mean": _mean(kls),
        "stderr": stderr(kls),
        "top1": _mean(agreements),
        "top1_stderr": stderr(agreements),
        "sequences": len(kls),
        "tokens": tokens.numel(),
        "per_sequence": kls,
    }


@torch.no_grad()
def _forward(model: torch.nn.Module, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs of the output head, logits) for one sequence: [tokens, hidden size], [tokens, words]."""
    seen = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        logits = model(row[None].to(model.device), use_cache=False).logits
    finally:
        hook.remove()
    return seen[0][0], logits[0]


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), dim=-1)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def stderr(values: list[float]) -> float | None:
    """Of the mean; None of one value."""
    n = len(values)
    if n < 2:
        return None
    center = _mean(values)
    return math.sqrt(sum((v - center) ** 2 for v in values) / (n - 1) / n)

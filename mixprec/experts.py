"""A mixture of experts with linears of their own, so that each can be scored, rounded and counted.

transformers holds all experts of a Qwen3-MoE block as two 3-D parameters; its checkpoints, and
auto-round when it quantizes, have three linears an expert, `mlp.experts.7.gate_proj` and so on. Their
names are taken here, so an allocation means the same to all three.
"""

from __future__ import annotations

import re

import torch

from mixprec.cell import ConfigError

_NAME = re.compile(r"(.+\.experts)\.(\d+)\.[^.]+")


class Experts(torch.nn.ModuleList):
    """Takes the place of transformers' Qwen3MoeExperts; one MLP an expert.

    tokens: expert -> the places, in [0, tokens), of those it was given in the last call; an expert
            that got none is absent
    """

    tokens: dict[int, torch.Tensor]

    def forward(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden: [tokens, hidden size]; each token's experts and their weights: [tokens, k]."""
        result = torch.zeros_like(hidden)
        self.tokens = {}
        for expert in top_k_index.unique().tolist():
            # Noted first: where a block is computed again for its backward pass, torch stops once it
            # has what that needs.
            token, place = torch.where(top_k_index == expert)
            self.tokens[expert] = token
            output = self[expert](hidden[token]) * top_k_weights[token, place, None]
            result.index_add_(0, token, output.to(result.dtype))
        return result


def separate(model: torch.nn.Module) -> torch.nn.Module:
    """`model` with `Experts` instead of fused ones; the weights' memory is the same.

    Raises ConfigError for fused experts of another architecture.
    """
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    for name, module in list(model.named_modules()):
        if isinstance(module, Qwen3MoeExperts):
            model.set_submodule(name, _separate(module))
        elif any(p.ndim == 3 for p in module.parameters(recurse=False)):
            raise ConfigError(
                f"{name}: {type(module).__name__} holds experts that are no linears; accepted: "
                "models without experts, and qwen3_moe"
            )
    return model


def _separate(fused: torch.nn.Module) -> Experts:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

    inner = fused.intermediate_dim
    with torch.device("meta"):
        experts = Experts(
            Qwen3MoeMLP(fused.config, intermediate_size=inner) for _ in range(fused.num_experts)
        )
    for expert, gate_up, down in zip(
        experts, fused.gate_up_proj.data, fused.down_proj.data, strict=True
    ):
        for linear, weight in (
            (expert.gate_proj, gate_up[:inner]),
            (expert.up_proj, gate_up[inner:]),
            (expert.down_proj, down),
        ):
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return experts.train(fused.training)


def expert_of(layer: str) -> tuple[str, int] | None:
    """(name of the `Experts`, which of them) that a layer belongs to; None for any other layer."""
    found = _NAME.fullmatch(layer)
    return (found[1], int(found[2])) if found else None

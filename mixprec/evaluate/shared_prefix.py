"""lm-eval's HFLM with every distinct token prefix run once: the same log-likelihoods, sooner.

The choices of a multiple-choice document repeat its context, and documents may share a few-shot
head. Such sequences are run as one sequence, a trie in depth-first order: a node is a distinct
prefix, has the position that its depth gives it and attends to its ancestors and itself. The output
head runs only where a continuation's token is predicted. Importing this module registers it with
lm-eval as `shared_prefix`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from mixprec import partial

log = logging.getLogger(__name__)

MODEL_TYPES = ("llama", "qwen2", "qwen3")  # transformers' own: logits are head(base model)
TRIE_NODES = 4096  # at most, unless one request alone is longer: a mask has nodes^2 bytes
PADDING = 0.05  # of a batch's tokens, at most
CPU_TOKENS = 512  # a forward; SmolLM2-135M, 2 cores: 256 tokens are 8% slower, 2048 no faster
GPU_TOKENS = (1024, 16384)  # a forward: at least, at most; between them by free memory
HEAD_ELEMENTS = 1 << 22  # rows x words of one softmax: 16 MB in float32


@register_model("shared_prefix")
class SharedPrefixLM(HFLM):
    """HFLM with softmax_dtype=float32, up to rounding; where that is not sure, HFLM and a warning.

    tokens_per_forward: a batch's size (None: by device and free memory). HFLM's batch_size is for
    the fallback and for generation. Counts, over all calls so far:

    tokens_run:    through the model, without padding
    tokens_padded: through the model on top of these
    tokens_rows:   through the output head
    tokens_asked:  of all requests one by one (HFLM runs these, but for one-token continuations of
                   the same context, which it runs once)

    kept: where answers are kept as they are finished (None: nowhere). A call goes on after the batches
    that are there, in the same batches, and counts them as run.
    """

    def __init__(
        self,
        *args,
        tokens_per_forward: int | None = None,
        kept: partial.Partial | None = None,
        **kwargs,
    ):
        super().__init__(*args, **{"softmax_dtype": "float32", **kwargs})
        self.tokens_per_forward, self.kept = tokens_per_forward, kept
        self.tokens_run = self.tokens_padded = self.tokens_rows = self.tokens_asked = 0
        self._head_is_plain: bool | None = None  # None: not looked at yet
        self._warned = False

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        """[(log-likelihood in nats, whether greedy)] of requests (texts, context, continuation)."""
        if not requests:
            return []
        max_length = self.max_length
        asked: dict[tuple[int, ...], list[int]] = {}  # what is read -> the requests that read it
        for index, (_, context, continuation) in enumerate(requests):
            assert context and 0 < len(continuation) <= max_length
            path = tuple((context + continuation)[-(max_length + 1) :][:-1])
            asked.setdefault(path, []).append(index)
        why_not = self._why_not(next(iter(asked)))
        if why_not:
            if not self._warned:
                log.warning("prefixes are not shared, lm-eval's own way is used: %s", why_not)
            self._warned = True
            plain = super()._loglikelihood_tokens
            return partial.by_chunks(
                lambda some: plain(some, disable_tqdm, override_bs), requests, self.kept
            )
        too_long = sum(len(c) + len(d) > max_length + 1 for _, c, d in requests)
        if too_long:
            log.warning("%d requests truncated from the left to %d tokens", too_long, max_length)

        paths = sorted(asked)
        shared = common_prefixes(paths)
        tries = cut(paths, shared, attention_parity(self.model.config))
        self.tokens_asked += sum(len(path) * len(indices) for path, indices in asked.items())
        answers: list = [None] * len(requests)
        progress = tqdm(
            total=sum(trie.nodes for trie in tries),
            unit="tok",
            desc="log-likelihoods",
            disable=disable_tqdm or self.rank != 0,
        )
        tokens = self.tokens_per_forward or tokens_that_fit(self.model.config, self.device)
        known = self.kept.answers(requests, tokens) if self.kept else None
        for number, batch in enumerate(batches(tries, known.size if known else tokens)):
            layout, ways = lay_out(batch, paths, shared)
            indices, predictions = [], []
            for path, way in ways:
                for index in asked[path]:
                    continuation = requests[index][2]
                    indices.append(index)
                    predictions += zip(way[-len(continuation) :], continuation, strict=True)
            found = known.get(number) if known else None
            if found is None:
                scores, found = self._scores(layout, batch[0].branched, predictions), []
                for index in indices:
                    values, greedy = zip(*islice(scores, len(requests[index][2])), strict=True)
                    found.append((sum(values), all(greedy)))
                if known:
                    known.add(number, found)
            self.tokens_rows += len({node for node, _ in predictions})
            for index, answer in zip(indices, found, strict=True):
                texts, answers[index] = requests[index][0], answer
                if texts is not None:  # None: a window of a rolling log-likelihood
                    self.cache_hook.add_partial("loglikelihood", texts, answers[index])
            nodes = sum(trie.nodes for trie in batch)
            self.tokens_run += nodes
            self.tokens_padded += layout[0].numel() - nodes
            progress.update(nodes)
        progress.close()
        if known:
            known.close()
        return answers

    @torch.no_grad()
    def _scores(self, layout: torch.Tensor, branched: bool, predictions: list[tuple[int, int]]):
        """(log-probability in float32, whether it is the greatest) of each prediction (node, word).

        layout: as of lay_out; nodes are indices into its flattened [batch, nodes] and may repeat.
        """
        ids, positions, ends = layout.to(self.device)
        inputs = {"input_ids": ids}
        if branched:  # otherwise padding on the right needs no mask: attention is causal
            mask = attention_mask(ends)
            if self.model.config._attn_implementation == "eager":  # it adds the mask
                lowest = torch.finfo(self.model.dtype).min
                mask = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, lowest)
            inputs |= {"attention_mask": mask, "position_ids": positions}
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        nodes, words = torch.tensor(predictions, device=hidden.device).T
        nodes, which = nodes.unique(return_inverse=True)
        hidden = hidden.flatten(0, 1)[nodes]  # [distinct nodes, hidden]
        head = self.model.get_output_embeddings()
        values = torch.empty(len(words), device=hidden.device)
        greedy = torch.empty(len(words), device=hidden.device, dtype=torch.bool)
        step = max(1, HEAD_ELEMENTS // self.model.config.vocab_size)
        for begin in range(0, len(nodes), step):
            block = head(hidden[begin : begin + step]).log_softmax(-1, dtype=torch.float32)
            here = ((which >= begin) & (which < begin + step)).nonzero()[:, 0]
            row, word = which[here] - begin, words[here]
            values[here] = block[row, word]
            greedy[here] = block.argmax(-1)[row] == word
        return zip(values.tolist(), greedy.tolist(), strict=True)

    @torch.no_grad()
    def _why_not(self, sample: tuple[int, ...]) -> str | None:
        """Why this model's answers might not be HFLM's, or None. sample: some input of it."""
        if self.backend != "causal":
            return f"backend {self.backend}; only causal models"
        if self.mixed_precision_dtype is not None:
            return "mixed_precision_dtype is set"
        why_not = refusal(self.model)
        if why_not:
            return why_not
        if self._head_is_plain is None:
            ids = torch.tensor([sample[:16]], device=self.device)
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            logits = self.model(input_ids=ids, use_cache=False).logits.float().to(hidden.device)
            error = (self.model.get_output_embeddings()(hidden) - logits).norm() / logits.norm()
            # Logits that are not finite are for the caller to notice, here as with HFLM.
            self._head_is_plain = not error > 1e-3
        return None if self._head_is_plain else "logits are not output head(base model)"


def refusal(model: torch.nn.Module) -> str | None:
    """Why a token's logits might depend on more than its prefix here, in one line; or None."""
    config = model.config
    if config.model_type not in MODEL_TYPES or not type(model).__module__.startswith(
        "transformers.models."
    ):
        return f"{type(model).__name__}; only transformers' own {', '.join(MODEL_TYPES)}"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attention by {config._attn_implementation}; only sdpa and eager take a 4-D mask"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "layers whose attention does not reach the whole prefix"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope in ("dynamic", "longrope"):
        return f"rotary embedding {rope}, which depends on the longest sequence of a batch"
    if getattr(model, "mixprec_activation_scale", None) == "tensor":
        return "activations scaled per tensor, so that a token's value depends on its batch"
    return None


def tokens_that_fit(config, device: torch.device) -> int:
    """Tokens a forward: on a GPU those whose activations take half of the free memory."""
    if device.type != "cuda":
        return CPU_TOKENS
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # Eight float32 copies of the widest activations: rounding them takes several.
    a_token = 8 * 4 * (4 * config.hidden_size + 2 * config.intermediate_size)
    return max(GPU_TOKENS[0], min(GPU_TOKENS[1], free // 2 // a_token))


# --- tries: pure functions over sorted paths, each a tuple of token ids -------------------------


@dataclass(frozen=True)
class Trie:
    """paths[begin:end] as `nodes` distinct prefixes; not branched: they are one sequence's."""

    begin: int
    end: int
    nodes: int
    branched: bool


def common_prefixes(paths: list[tuple[int, ...]]) -> list[int]:
    """Tokens that each path has in common with the one before it; 0 for the first."""
    shared = [0] * min(1, len(paths))
    for before, path in pairwise(paths):
        differ = (i for i, (a, b) in enumerate(zip(before, path, strict=False)) if a != b)
        shared.append(next(differ, min(len(before), len(path))))
    return shared


def attention_parity(config) -> float:
    """The length of a sequence for which attention to all of it costs what the linears cost.

    A layer's linears take W multiplications a token, attention to n keys takes 2 n q, where q is
    the width of the queries. SmolLM2-135M: 3072; its time on a CPU fits 3000.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    return config.hidden_size * (2 * q + 2 * kv + 3 * config.intermediate_size) / (2 * q)


def cut(paths: list[tuple[int, ...]], shared: list[int], parity: float) -> list[Trie]:
    """The paths in consecutive tries, such that the sum of their costs is least.

    A trie of n nodes costs n tokens and n^2 / parity for attention (half of it if causal), so paths
    join only where the prefix they share outweighs attention between unrelated branches.
    """
    added = [0]  # added[j]: nodes of paths[:j] in one trie
    for path, common in zip(paths, shared, strict=True):
        added.append(added[-1] + len(path) - common)
    best: list = [(0.0, None)]  # best[j]: least cost of paths[:j], and the last of its tries
    for end in range(1, len(paths) + 1):
        options = []
        for begin in range(end - 1, -1, -1):
            nodes = len(paths[begin]) + added[end] - added[begin + 1]
            if nodes > TRIE_NODES and options:
                break
            branched = nodes > len(paths[end - 1])
            cost = nodes + nodes * nodes / parity * (1 if branched else 0.5)
            options.append((best[begin][0] + cost, Trie(begin, end, nodes, branched)))
            if shared[begin] == 0:
                break
        best.append(min(options, key=lambda option: option[0]))
    tries, end = [], len(paths)
    while end:
        tries.append(best[end][1])
        end = tries[-1].begin
    return tries


def batches(tries: list[Trie], tokens: int) -> list[list[Trie]]:
    """Tries of one kind and nearly one size, `tokens` a batch at most where a trie is not larger.

    Largest first, so that what does not fit into memory fails early.
    """
    batches: list[list[Trie]] = []
    for trie in sorted(tries, key=lambda trie: (trie.branched, -trie.nodes)):
        batch = [*batches[-1], trie] if batches else [trie]
        padded = len(batch) * batch[0].nodes
        if (
            len(batch) > 1
            and batch[0].branched == trie.branched
            and (1 - PADDING) * padded <= sum(t.nodes for t in batch)
            and padded <= tokens
        ):
            batches[-1] = batch
        else:
            batches.append([trie])
    return sorted(batches, key=lambda batch: -batch[0].nodes)


def spell(paths: list[tuple[int, ...]], shared: list[int]):
    """One trie, depth-first: its nodes' tokens, depths and ends, and each path's nodes from the root.

    The subtree of node k is k .. ends[k] - 1. shared: as of common_prefixes(paths).
    """
    tokens, depths, ends, ways, way = [], [], [], [], []
    for path, common in zip(paths, shared, strict=True):
        for node in way[common:]:
            ends[node] = len(tokens)
        way = way[:common] + list(range(len(tokens), len(tokens) + len(path) - common))
        ways.append(way)
        tokens += path[common:]
        depths += range(common, len(path))
        ends += [0] * (len(path) - common)
    for node in way:
        ends[node] = len(tokens)
    return tokens, depths, ends, ways


def lay_out(batch: list[Trie], paths: list[tuple[int, ...]], shared: list[int]):
    """Tries as rows of a batch, padded on the right: (layout, ways).

    layout: tokens, positions and ends of the nodes, int64 [3, batch, nodes]
    ways:   [(path, its nodes from the root, as indices into the flattened [batch, nodes])]
    """
    width = max(trie.nodes for trie in batch)
    rows, ways = [], []
    for row, trie in enumerate(batch):
        chosen = paths[trie.begin : trie.end]
        *columns, nodes = spell(chosen, [0, *shared[trie.begin + 1 : trie.end]])
        # A padded node attends to itself alone: attention to nothing would be NaN.
        padding = [(0, 0, node + 1) for node in range(trie.nodes, width)]
        rows.append([*zip(*columns, strict=True), *padding])
        for path, way in zip(chosen, nodes, strict=True):
            ways.append((path, [row * width + node for node in way]))
    return torch.tensor(rows).movedim(-1, 0).contiguous(), ways


def attention_mask(ends: torch.Tensor) -> torch.Tensor:
    """Which nodes attend to which: bool [batch, 1, query, key] from ends [batch, nodes].

    Depth-first, the queries that have key k as an ancestor (or are k) are k .. ends[k] - 1.
    """
    node = torch.arange(ends.shape[1], device=ends.device)
    return ((node[:, None] >= node) & (node[:, None] < ends[:, None, :]))[:, None]

"""The function by which LMCache's SDK edits a stored cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...adapters.shared import Shared
from ...core import checks
from ...core.errors import ArgumentError
from ...core.eviction import evict_layers
from ...core.needs import name_of
from ...core.policy import Policy
from ..transformers.rotary import Rotation, rotate
from ..transformers.skeleton import rotations
from .versions import check_version

__all__ = ["editor"]

Edit = Callable[[Mapping[Any, torch.Tensor], Sequence[int]], tuple[torch.Tensor, list[int]]]


def editor(policy: Policy, config: Any, /, *, chunk_size: int = 256) -> Edit:
    """Make a function that shortens a stored cache, for ``modify_kv`` of LMCache's SDK.

    LMCache finds the edited cache as an ordinary prefix of the kept token ids. So all layers and heads keep the same
    tokens, `Shared` over layers, as many as whole chunks have room for, and the keys are turned to the positions 0, 1,
    2 and so on. Values are not changed.

    Parameters
    ----------
    policy : Policy
        Such as ``GraphKV(SnapKV(budget=1024), Degree())``. What the budget leaves of a last, partial chunk is not used.
    config : transformers.PreTrainedConfig
        Of the model: its heads, its layers, and how it turns its keys.
    chunk_size : int
        That of the server (``--chunk-size``), which a context of the SDK knows as ``chunk_size``.

    Returns
    -------
    callable
        From a mapping with the tensor of kind ``"kv"``, shape (2, layers, T, kv_heads * D), and for policies that need
        queries that of kind ``"query"``, shape (1, layers, T, query_heads * D), and T token ids, to the shorter tensor
        of the first kind and its ids. What is given is not written to; it is returned as it is where all of it fits.

    Raises
    ------
    ArgumentError
        If the policy gives heads or layers different numbers of tokens, finds budgets by itself, merges or demotes
        tokens, its budget is below one chunk or below what it protects, or the model's keys cannot be turned. When
        editing: if a tensor is missing or is not of this model's shape, which is also that of one of several workers or
        of one of several groups of layers, or LMCache is of a version that was not tested. Nothing is edited then.
    ArgumentTypeError
        If `policy` is not a Policy or `chunk_size` not an integer.

    Examples
    --------
    With a request of LMCache's SDK and a server of chunks of 256 tokens::

        context = lmcache.sdk.kvcache.connect(url=..., http_url=..., model_name=...)
        queries = lmcache.sdk.qcache.connect(url=..., http_url=..., model_name=...)
        request = lmcache.sdk.request.create_request([context, queries], post_completion, prompt_ids)
        request.modify_kv(editor(SnapKV(budget=1024), config, chunk_size=context.chunk_size))
        request.generate({"max_tokens": 100})
    """
    return _Editor(policy, config, chunk_size=chunk_size)


class _Editor:
    """See `editor`."""

    def __init__(self, policy: Policy, config: Any, /, *, chunk_size: int) -> None:
        checks.instance("policy", policy, Policy)
        self.chunk_size = checks.count("chunk_size", chunk_size, minimum=1)
        if not isinstance(policy, Shared) or policy.over != "layers":
            policy = Shared(policy, over="layers")
        self.policy = policy
        self._refuse(policy)
        text = config.get_text_config(decoder=True)
        self.num_layers = int(text.num_hidden_layers)
        self.query_heads = int(text.num_attention_heads)
        self.kv_heads = int(getattr(text, "num_key_value_heads", None) or self.query_heads)
        self.head_size = int(getattr(text, "head_dim", None) or text.hidden_size // self.query_heads)
        self.rotations = rotations(config)
        if len(self.rotations) != self.num_layers:
            raise ArgumentError(
                f"config must be of a model all of whose layers cache keys alike; of {self.num_layers} layers "
                f"{len(self.rotations)} do"
            )
        if not checks.is_whole(policy.budget):
            return
        self._tokens(int(policy.budget))

    def _refuse(self, policy: Policy) -> None:
        """Refuse what one kept set, without masses, cannot express."""
        found = {policy.layer_budget(4096, layer, 32) for layer in range(32)}
        if len(found) > 1:
            raise ArgumentError(
                f"policy must give all layers one budget in LMCache, which stores one kept set; {name_of(policy)} "
                f"gives {min(found)} to {max(found)} of 4096 tokens"
            )
        needs = policy.needs()
        if needs.merges:
            raise ArgumentError(f"policy must drop tokens in LMCache, which stores no masses; {name_of(policy)} merges")
        if needs.answers:
            raise ArgumentError(
                "policy must not answer for dropped tokens in LMCache, whose engine would not ask; "
                f"{name_of(policy)} does"
            )
        if needs.demotes:
            raise ArgumentError(
                f"policy must keep tokens as they are in LMCache; {name_of(policy)} keeps some in fewer bits"
            )
        if needs.state:
            raise ArgumentError(
                f"policy must not need the attention of all positions in LMCache; {name_of(policy)} adds it up"
            )

    def _tokens(self, budget: int) -> int:
        """Return how many tokens of a budget are whole chunks."""
        whole = budget // self.chunk_size * self.chunk_size
        if not whole:
            raise ArgumentError(
                f"budget must be at least one chunk of {self.chunk_size} tokens in LMCache, which stores whole chunks; "
                f"got {budget}"
            )
        protected = self.policy.protection(whole).count
        if protected > whole:
            raise ArgumentError(
                f"budget must have room for the {protected} protected tokens (window, sinks, recents); got {whole} in "
                f"whole chunks of {self.chunk_size}"
            )
        return whole

    def __call__(self, tensors: Mapping[Any, torch.Tensor], token_ids: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """Edit one cache."""
        check_version()
        given = {getattr(kind, "value", kind): tensor for kind, tensor in tensors.items()}
        cache = self._checked(given, "kv", 2, self.kv_heads)
        num_tokens, ids = cache.shape[2], list(token_ids)
        if len(ids) < num_tokens:
            raise ArgumentError(f"token_ids must hold one id for each of {num_tokens} tokens; got {len(ids)}")
        budget = self._tokens(self.policy.layer_budget(num_tokens, 0, self.num_layers))
        if num_tokens <= budget:
            return cache, ids
        keys = _per_head(cache[0], self.kv_heads).transpose(1, 2)
        kept = self._kept(keys, cache, given, budget)
        edited = cache[:, :, kept]
        places = torch.arange(num_tokens)
        turned = [
            _moved(keys[layer][:, kept], rotation, places[kept], places[: len(kept)])
            for layer, rotation in enumerate(self.rotations)
        ]
        edited[0] = torch.stack(turned).transpose(1, 2).flatten(-2)
        return edited, [ids[place] for place in kept.tolist()]

    def _kept(
        self, keys: torch.Tensor, cache: torch.Tensor, given: Mapping[str, torch.Tensor], budget: int
    ) -> torch.Tensor:
        """Let the policy choose the tokens, shape (kept,), ascending."""
        needs, num_tokens = self.policy.needs(), keys.shape[2]
        queries = None
        if needs.queries != "none":
            name = name_of(self.policy.base)
            if "query" not in given:
                raise ArgumentError(
                    f"tensors must hold the queries for {name}: connect lmcache.sdk.qcache too, to a server with "
                    "--enable transfer_query"
                )
            asked = self._checked(given, "query", 1, self.query_heads)
            if asked.shape[2] != num_tokens:
                raise ArgumentError(
                    f"the query tensor must have the {num_tokens} tokens of the cache; got {asked.shape[2]}"
                )
            wanted = min(num_tokens, self.policy.num_queries(num_tokens))
            queries = _per_head(asked[0, :, num_tokens - wanted :], self.query_heads)
            queries = queries.transpose(1, 2)
        layers = []
        for layer, rotation in enumerate(self.rotations):
            facts: dict[str, Any] = {"keys": keys[layer][None]}
            if needs.values:
                facts["values"] = _per_head(cache[1, layer], self.kv_heads).transpose(0, 1)[None]
            if queries is not None:
                facts["queries"] = queries[layer][None]
            if needs.unrotated_keys:
                facts["unrotated_keys"] = _moved(keys[layer], rotation, torch.arange(num_tokens), None)[None]
            layers.append(facts)
        found = evict_layers(self.policy, layers, budget=budget, backend="torch")
        kept: torch.Tensor = found[0].kept[0, 0]
        kept = kept[kept >= 0]
        # A row of whole blocks may end below the budget, and below a chunk.
        whole = len(kept) // self.chunk_size * self.chunk_size
        if whole < len(kept):
            raise ArgumentError(
                f"policy must keep whole chunks of {self.chunk_size} tokens; {name_of(self.policy)} keeps {len(kept)}"
            )
        return kept

    def _checked(self, given: Mapping[str, torch.Tensor], kind: str, number: int, heads: int) -> torch.Tensor:
        """Return a tensor if it is one of this model's."""
        if kind not in given:
            raise ArgumentError(f"tensors must hold one of kind {kind!r}; got {sorted(given)}")
        tensor = given[kind]
        if kind == "query" and getattr(tensor, "ndim", 0) == 3:
            # One tensor per token, so that some of LMCache's transports leave the first axis out.
            tensor = tensor[None]
        expected = f"({number}, {self.num_layers}, T, {heads * self.head_size})"
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise ArgumentError(f"the {kind} tensor must be a tensor of floats; got {type(tensor).__name__}")
        shape = tuple(tensor.shape)
        if len(shape) == 4 and (shape[0], shape[3]) == (number, heads * self.head_size) and shape[1] < self.num_layers:
            raise ArgumentError(
                f"the {kind} tensor must have all {self.num_layers} layers, of one kernel group; got {shape[1]} layers"
            )
        if len(shape) == 4 and shape[:2] == (number, self.num_layers) and 0 < shape[3] < heads * self.head_size:
            raise ArgumentError(
                f"the {kind} tensor must hold all heads, {heads * self.head_size} numbers per token, from a world size "
                f"of 1; got {shape[3]}"
            )
        if len(shape) != 4 or (*shape[:2], shape[3]) != (number, self.num_layers, heads * self.head_size):
            raise ArgumentError(f"the {kind} tensor must have shape {expected} for this model; got {shape}")
        return tensor


def _per_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Split the last axis into heads."""
    return x.reshape(*x.shape[:-1], heads, -1)


def _moved(keys: torch.Tensor, rotation: Rotation, places: torch.Tensor, to: torch.Tensor | None) -> torch.Tensor:
    """Turn keys (kv_heads, N, D) from their places to others, or back; those that stay in place are not touched."""
    axes = len(rotation.frequencies)

    def shaped(at: torch.Tensor) -> torch.Tensor:
        return at[None, None, :, None].expand(1, keys.shape[0], -1, max(axes, 1))

    turned = rotate(keys[None], rotation, shaped(places), None if to is None else shaped(to))[0]
    return turned if to is None else torch.where((places == to)[None, :, None], keys, turned)

"""LMCache's experimental form: one object per request, asked while the engine runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...core import checks
from ...core.errors import ArgumentError
from ...core.eviction import evict
from ...core.layer import Memory
from ...core.needs import name_of
from ...naming.policies import make_policy

__all__ = ["TokenDrop"]

OPTIONS = ("policy", "budget", "every", "sinks", "seed")


class TokenDrop:
    """A policy in the form of LMCache's entry points ``lmcache.token_drop_algorithms``: experimental, as that is.

    LMCache makes one of these for each request that names it, and asks it before and after each step of the engine.
    Layers and KV heads may keep different tokens, but equally many; positions stay true, so no key is turned. Written
    against the protocol of 0.5.7rc2 and its development branches; nothing in those releases calls it yet.

    Parameters
    ----------
    config : mapping
        From the request, as JSON gives it: ``policy``, a name as on the command line, such as ``"snapkv+degree"``;
        ``budget``, tokens to keep per KV head; ``every``, evict again after so many tokens (default: the budget's
        quarter, at least 1); ``sinks`` and ``seed``, as on the command line.

    Raises
    ------
    ArgumentError
        If an option is unknown or missing, or the policy cannot be met: one that gives layers or heads budgets of their
        own, or that shares what it keeps between layers.

    Examples
    --------
    In a request to the engine::

        config = {"policy": "snapkv+degree", "budget": 512, "every": 128}
        extra_args = {"kv_transfer_params": {"lmcache.token_drop": {"algorithm": "graphkv", "config": config}}}
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        unknown = sorted(set(config) - set(OPTIONS))
        if unknown:
            raise ArgumentError(f"config must hold {', '.join(OPTIONS)}; got {unknown[0]!r}")
        for name in ("policy", "budget"):
            if name not in config:
                raise ArgumentError(f"config must hold {name!r}; got {sorted(config)}")
        budget = checks.count("budget", config["budget"], minimum=1)
        self.every = checks.count("every", config.get("every", max(1, budget // 4)), minimum=1)
        policy = make_policy(config["policy"], budget, sinks=config.get("sinks"), seed=config.get("seed", 0))
        if policy is None:
            raise ArgumentError("policy must evict tokens; got 'full'")
        shares = {policy.layer_budget(4 * budget, layer, 8) for layer in range(8)}
        needs = policy.needs()
        are_uneven = len(shares) > 1 or needs.wants or needs.head_counts or needs.automatic
        if are_uneven or needs.couples_layers or needs.merges:
            raise ArgumentError(
                f"policy must keep equally many tokens in every layer and head, each by itself; {name_of(policy)} "
                "does not"
            )
        if needs.answers:
            raise ArgumentError(
                f"policy must not answer for dropped tokens, which an engine would not ask; {name_of(policy)} does"
            )
        if needs.demotes:
            raise ArgumentError(f"policy must keep tokens as they are; {name_of(policy)} keeps some in fewer bits")
        if needs.unrotated_keys:
            raise ArgumentError(f"policy must go by keys as they are cached; {name_of(policy)} needs unrotated ones")
        protected = policy.protection(budget).count
        if protected > budget:
            raise ArgumentError(f"budget must have room for the {protected} protected tokens; got {budget}")
        self.policy, self.budget = policy, budget
        self._queries: dict[str, torch.Tensor] = {}
        self._states: dict[str, Memory] = {}
        self._resident = 0
        self._kept = 0

    def should_observe_token_queries(self, phase: str, decoded_tokens_before_step: int) -> int:
        """Return how many of the last queries of this step are wanted."""
        needs = self.policy.needs()
        if needs.queries == "none":
            return 0
        if needs.queries == "window":
            return self.policy.num_queries(2**31 - 1)
        # Sums go over every new position, and a distribution over all of them.
        return 2**31 - 1

    def observe_token_queries(self, queries_by_layer: Mapping[str, torch.Tensor]) -> None:
        """Keep queries (tokens, query_heads, D), after the rotary embedding, until tokens are dropped."""
        limit = self.should_observe_token_queries("decode", 0)
        for layer, queries in queries_by_layer.items():
            held = self._queries.get(layer)
            joined = queries if held is None else torch.cat([held, queries])
            self._queries[layer] = joined[max(0, len(joined) - limit) :]

    def should_compact_kv(self, phase: str, resident_kv_tokens: int, decoded_tokens_before_step: int) -> bool:
        """Return whether tokens are to be dropped now: first after the prompt, then every so many tokens."""
        new = resident_kv_tokens - self._kept
        is_due = phase == "prefill" or new >= self.every
        return resident_kv_tokens > self.budget and is_due

    def select_kept_token_positions(self, kv_by_layer: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Choose the tokens of every layer that stay.

        Parameters
        ----------
        kv_by_layer : mapping of str to KVView
            With ``get_keys()`` and ``get_values()``, (1, kv_heads, tokens, D).

        Returns
        -------
        dict of str to torch.Tensor, shape (kv_heads, kept), int64
            Places in the sequence as it is now, ascending; equally many in every layer.
        """
        kept, states = {}, {}
        for number, (layer, view) in enumerate(kv_by_layer.items()):
            keys, queries = view.get_keys(), self._queries.get(layer)
            if queries is not None:
                queries = queries[max(0, len(queries) - keys.shape[2]) :].transpose(0, 1)[None]
            found = evict(
                self.policy,
                keys,
                values=view.get_values() if self.policy.needs().values else None,
                queries=queries,
                layer=number,
                num_layers=len(kv_by_layer),
                budget=min(self.budget, keys.shape[2]),
                state=self._states.get(layer),
                backend="torch",
            )
            kept[layer] = found.kept[0]
            if found.state is not None:
                states[layer] = found.state
        # Only now, so that an error leaves everything as it was.
        self._states = states
        if self.policy.needs().state:
            self._queries = {}
        self._kept = next((each.shape[-1] for each in kept.values()), 0)
        return kept

"""NVIDIA kvpress: any of its scorer presses gains the graph, and any of our policies becomes a press.

Three things that kvpress leaves open are settled here:

* Kept tokens stay in the order of the prompt, so a later step that goes by position finds a window where it looks.
* Tokens a press forces are distinguished from high-scoring ones, and protected: they take no part in the graph.
* What kvpress would get wrong in silence, padding for instance, is an error.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Any

from ..adapters.given import Given
from ..core import checks
from ..core.errors import ArgumentError
from ..core.eviction import Eviction, evict
from ..core.extras import needs
from ..core.graphkv import GraphKV
from ..core.needs import name_of
from ..core.policy import Policy
from ..core.signals import Decay, Signal

with needs("graphkv.integrations.kvpress", "kvpress", "torch", "kvpress"):
    import torch
    from kvpress import BasePress, PyramidKVPress, ScorerPress
    from kvpress.utils import compute_n_kept
    from torch.nn.functional import scaled_dot_product_attention
    from torch.overrides import TorchFunctionMode
    from transformers import DynamicCache, QuantizedCache

__all__ = ["GraphKVPress", "PolicyPress"]


@dataclass
class PolicyPress(BasePress):  # type: ignore[misc]
    """A graphkv policy as a press: evicts each layer once, right after it has read the prompt.

    Budgets are those of the policy: tokens or a share of them, per layer where the policy says so, and exact.

    Parameters
    ----------
    policy : Policy
        For example ``GraphKV(SnapKV(budget=512))``.

    Raises
    ------
    ArgumentTypeError
        If `policy` is no Policy.
    ArgumentError
        If the policy's budgets depend on what is in all layers, as those of `CAKE` do; wrap it in `LayerBudgets`. If
        layers share what they keep. If its merges change what slots count as, as those of `Absorb` do: kvpress's caches
        and attention have no place for masses; or if it merges and its heads keep different numbers of tokens. If it
        answers for dropped tokens, as `LESS` does, which kvpress's attention would not ask.
        While the model runs: if the prompt has padding, or the model attends eagerly and the policy gives layers or
        heads different budgets, or the cache does not hold exactly the tokens of the prompt, or it cannot be seen that
        the model's heads attend to the keys and values that it caches under them.

    Notes
    -----
    Queries are the model's own: each layer's attention runs a second time over the prompt, as far as its projections,
    and must come to the keys and values that are in the cache. That costs about a tenth of the prefill.

    Sliding layers of a model that has full ones too are left alone, as `evicting` does.

    Policies whose heads keep different numbers of tokens, such as `AdaKV`, work as in kvpress's own ``AdaKVPress``:
    keys are masked and not removed, so no memory is freed, and the mask stays with the model until its next prompt.

    Layers of different lengths decode one token at a time only, unless the model uses flash attention.

    Examples
    --------
    ::

        with PolicyPress(GraphKV(PyramidKV(budget=512)))(model):
            output = model.generate(**inputs, max_new_tokens=64)
    """

    policy: Policy

    def __post_init__(self) -> None:
        checks.instance("policy", self.policy, Policy)
        if self.policy.needs().wants:
            raise ArgumentError(
                "policy must know each layer's budget beforehand: kvpress evicts a layer before the next one has read "
                f"anything; {type(self.policy).__name__} does not, so wrap it in LayerBudgets"
            )
        found = self.policy.needs()
        if found.merges and found.masses:
            self._refuse_masses()
        if found.merges and found.head_counts:
            self._refuse_uneven_merges()
        if found.answers:
            raise ArgumentError(
                "policy must not answer for dropped tokens in kvpress, whose attention would not ask it; "
                f"{name_of(self.policy)} does. graphkv.integrations.transformers asks"
            )
        if self.policy.needs().couples_layers:
            raise ArgumentError(
                "policy must choose for each layer alone, because kvpress evicts a layer before the next one has read "
                f"anything; got {self.policy}"
            )
        self._evicted: dict[int, float] = {}

    @property
    def compression_ratio(self) -> float:
        """Share of the last prompt that was evicted, averaged over the layers that have read it; 0 before."""
        return sum(self._evicted.values()) / max(1, len(self._evicted))

    def post_init_from_model(self, model: Any) -> None:
        """Refuse a model that kvpress cannot find its way in; kvpress calls this."""
        _check_model(model)

    def forward_hook(self, module: torch.nn.Module, input: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Refuse a call that kvpress cannot follow, and let it go on with any other; kvpress calls this."""
        _check_call(module, kwargs)
        return super().forward_hook(module, input, kwargs, output)

    def compress(
        self,
        module: torch.nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values that stay; kvpress calls this.

        Parameters
        ----------
        module : torch.nn.Module
            The attention of one layer.
        hidden_states : torch.Tensor, shape (batch, N, hidden)
            What it read.
        keys, values : torch.Tensor, shape (batch, kv_heads, N, D)
            What it cached.
        attentions : torch.Tensor or None
            Not used.
        kwargs : dict
            What it was called with.

        Returns
        -------
        keys, values : torch.Tensor, shape (batch, kv_heads, budget, D)
            In the order of the prompt. All of them under a policy with head budgets.
        """
        layer: Any = module
        if _slides_beside_full_layers(layer, kwargs["past_key_values"]):
            return keys, values
        num_tokens, num_layers = keys.shape[2], int(layer.config.num_hidden_layers)
        if hidden_states.shape[1] != num_tokens:
            raise ArgumentError(
                f"the cache must hold exactly the {hidden_states.shape[1]} tokens of the prompt when PolicyPress comes "
                f"to it; it holds {num_tokens} (in a ComposedPress, PolicyPress comes first)"
            )
        _refuse_hidden_tokens(kwargs)
        is_eager = layer.config._attn_implementation == "eager"
        budgets = {min(num_tokens, self.policy.layer_budget(num_tokens, i, num_layers)) for i in range(num_layers)}
        if is_eager and len(budgets) > 1:
            raise ArgumentError(
                "policy must keep equally many tokens in every layer under attn_implementation 'eager', which has one "
                f"mask for all; {type(self.policy).__name__} keeps {min(budgets)} to {max(budgets)}"
            )
        queries, wanted = _queries_of(layer, keys, values, kwargs), self.policy.num_queries(num_tokens)
        decision = evict(
            self.policy,
            keys.detach(),
            values=values.detach(),
            queries=queries[:, :, -wanted:] if wanted else None,
            layer=layer.layer_idx,
            num_layers=num_layers,
            backend="torch",
        )
        num_kept: float = min(decision.budget, num_tokens)
        if self.policy.needs().automatic and decision.counts is not None:
            num_kept = float(decision.counts.double().mean())
        self._evicted[layer.layer_idx] = 1 - num_kept / num_tokens
        if decision.merge is not None and decision.counts is not None:
            self._refuse_uneven_merges()
        if decision.merge is not None and not bool((decision.merge.mass == 1).all()):
            self._refuse_masses()
        if decision.levels is not None:
            raise ArgumentError(
                f"policy must keep tokens as they are in kvpress; {type(self.policy).__name__} demotes them"
            )
        if decision.counts is None:
            return decision.compress(keys, values)
        if is_eager:
            raise ArgumentError(
                "policy must keep equally many tokens in every head under attn_implementation 'eager', where kvpress "
                f"cannot mask keys; {type(self.policy).__name__} does not"
            )
        layer.masked_key_indices = _evicted_places(decision)
        return keys, values

    def _refuse_masses(self) -> None:
        """Raise for a policy whose slots count as several tokens, when it is made or as soon as one does undeclared."""
        raise ArgumentError(
            "policy must leave slots counting as one token each in kvpress, whose attention would count a merged slot "
            f"once and not by its mass; {name_of(self.policy)} does not (graphkv.integrations.transformers does)"
        )

    def _refuse_uneven_merges(self) -> None:
        """Raise for a policy that merges and whose heads keep different numbers of tokens."""
        raise ArgumentError(
            "policy must keep equally many tokens in every head where it merges, because kvpress masks keys of heads "
            f"that keep less and stores no merged ones; {name_of(self.policy)} does not"
        )


_PAPER = Decay()


@dataclass(init=False)
class GraphKVPress(ScorerPress):  # type: ignore[misc]
    """A scorer press of kvpress, with near-duplicates of its most important tokens ranked down.

    The press scores the tokens; from there on everything is as in `GraphKV`. It is a scorer press itself, so kvpress's
    wrappers take it: ``AdaKVPress(GraphKVPress(SnapKVPress(0.5)))``.

    Parameters
    ----------
    base_press : kvpress.ScorerPress
        Where scores and the compression ratio come from; of ``PyramidKVPress`` also the budgets of the layers.
    compression_ratio : float, optional
        Share of the tokens to evict, in [0, 1], set on `base_press`. Default: what it has.
    signal : Signal
        What changes the scores, see `GraphKV`. Default: the paper's, `Decay`.

    Raises
    ------
    ArgumentTypeError
        If `base_press` is no scorer press, `signal` no Signal or `compression_ratio` no number.
    ArgumentError
        If `compression_ratio` is out of range, or if `base_press` evicts in a way of its own. While the model runs: if
        the prompt has padding.

    Notes
    -----
    A share r of N tokens leaves (1 - r) N, rounded down as kvpress does, but of the decimal number: 0.9 of 100 leaves
    10, and not 9.

    kvpress forces tokens (observation windows, sinks) by a score: the same one in every row, above all others. Such
    tokens are protected: they stand outside the graph, and a budget that does not cover them keeps the newest. Where
    all rows are alike, as with a single KV head, a best token looks the same; there only kvpress's usual mark counts,
    which is one more than the next best score.

    How many tokens are forced is read on the host, once per layer and prompt.

    Examples
    --------
    ::

        with GraphKVPress(SnapKVPress(compression_ratio=0.5))(model):
            output = model.generate(**inputs, max_new_tokens=64)
    """

    base_press: ScorerPress
    signal: Signal

    def __init__(
        self, base_press: ScorerPress, *, compression_ratio: float | None = None, signal: Signal = _PAPER
    ) -> None:
        checks.instance("base_press", base_press, ScorerPress)
        if type(base_press).compress not in (ScorerPress.compress, PyramidKVPress.compress):
            raise ArgumentError(
                f"base_press must evict by its scores alone; {type(base_press).__name__} has a compress of its own"
            )
        self.base_press = base_press
        checks.instance("signal", signal, Signal)
        self.signal = signal
        if compression_ratio is not None:
            self.compression_ratio = checks.fraction("compression_ratio", compression_ratio)

    @property
    def compression_ratio(self) -> float:
        """Share of the tokens to evict: the base's."""
        return float(self.base_press.compression_ratio)

    @compression_ratio.setter
    def compression_ratio(self, value: float) -> None:
        self.base_press.compression_ratio = value

    def post_init_from_model(self, model: Any) -> None:
        """Refuse a model that kvpress cannot find its way in, and let the base look at any other."""
        _check_model(model)
        self.base_press.post_init_from_model(model)

    def forward_hook(self, module: torch.nn.Module, input: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Refuse a call that kvpress cannot follow, and let it go on with any other; kvpress calls this."""
        _check_call(module, kwargs)
        return super().forward_hook(module, input, kwargs, output)

    def score(
        self,
        module: torch.nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Compute the base's scores after propagation; kvpress's wrappers call this.

        Parameters
        ----------
        module, hidden_states, keys, values, attentions, kwargs
            As for the base.

        Returns
        -------
        torch.Tensor, shape (batch, kv_heads, N), float32 or wider
            What the base forces has one more than the best of all others.
        """
        scores, is_forced, decision = self._decide(module, hidden_states, keys, values, attentions, kwargs)
        if decision.scores is None:
            return scores
        best = decision.scores.masked_fill(is_forced, -torch.inf).amax()
        # kvpress's own mark, or the next number where adding 1 is lost in rounding.
        mark = torch.maximum(best + 1, torch.nextafter(best, torch.full_like(best, torch.inf)))
        return torch.where(is_forced, mark, decision.scores)

    def compress(
        self,
        module: torch.nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values that stay; kvpress calls this.

        Parameters
        ----------
        module, hidden_states, keys, values, attentions, kwargs
            As for the base.

        Returns
        -------
        keys, values : torch.Tensor, shape (batch, kv_heads, kept, D)
            In the order of the prompt.
        """
        if self.compression_ratio == 0:
            return keys, values
        _, _, decision = self._decide(module, hidden_states, keys, values, attentions, kwargs)
        return decision.apply(keys), decision.apply(values)

    def _decide(
        self, module: Any, hidden_states: Any, keys: torch.Tensor, values: Any, attentions: Any, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, Eviction]:
        """Compute the base's scores, which tokens it forces (N), and the decision."""
        _refuse_hidden_tokens(kwargs)
        scores = self.base_press.score(module, hidden_states, keys, values, attentions, kwargs).detach()
        is_forced = _forced(scores)
        # Forced tokens stand outside the graph; their importance only says who stays if the budget is too small.
        importance = scores.to(torch.promote_types(scores.dtype, torch.float32))
        place = torch.arange(scores.shape[-1], dtype=importance.dtype, device=scores.device)
        base = Given(
            budget=self._num_kept(module, keys.shape[2]),
            importance=torch.where(is_forced, place, importance),
            protected=is_forced.expand(scores.shape),
            num_protected=int(is_forced.sum()),
        )
        decision = evict(GraphKV(base, self.signal), keys.detach(), backend="torch")
        return scores, is_forced, decision

    def _num_kept(self, module: Any, num_tokens: int) -> int:
        ratio = self.compression_ratio
        if isinstance(self.base_press, PyramidKVPress):
            return int(self.base_press.get_layer_budget(module, num_tokens))
        # kvpress multiplies floats, which may lose a token; it is never one too many.
        exact = floor((1 - Fraction(repr(ratio))) * num_tokens)
        return max(exact, int(compute_n_kept(num_tokens, ratio)))


def _forced(scores: torch.Tensor) -> torch.Tensor:
    """Mark the tokens (N) that a press forces: they have the highest score of the layer, in every row."""
    is_forced = (scores == scores.amax()).flatten(0, 1).all(dim=0)
    next_best = scores.masked_fill(is_forced, -torch.inf).amax()
    rows_are_alike = (scores == scores[:1, :1]).all()
    has_mark = scores.amax() == next_best + 1
    return is_forced & (next_best > -torch.inf) & (has_mark | ~rows_are_alike)


class _Attended(Exception):  # noqa: N818 - no error: the end of a second run that has told what it was for
    """What a layer's attention reads."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> None:
        self.query, self.key, self.value = query, key, value
        self.scale: float | None = options.get("scale")


class _UntilItAttends(TorchFunctionMode):
    """Runs PyTorch as it is, up to the first attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raise `_Attended` in place of attention."""
        if func is scaled_dot_product_attention:
            raise _Attended(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _WithSDPA:
    """A layer's configuration, but for the attention implementation."""

    _attn_implementation = "sdpa"

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _queries_of(layer: Any, keys: torch.Tensor, values: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Compute the queries (batch, query_heads, N, D) once more, scaled such that q k / sqrt(D) is the attention logit.

    The layer itself computes them, whatever it does to them, and must come to the keys and values of the cache.
    """
    kind = type(layer)
    # A copy that shares all weights: neither the layer nor the model's configuration changes.
    again = copy.copy(layer)
    again.config = _WithSDPA(layer.config)
    # As it was called before, with nothing in the cache. Only eager attention gives its weights.
    arguments = {name: value for name, value in kwargs.items() if name != "output_attentions"}
    arguments["past_key_values"] = DynamicCache()
    try:
        with torch.no_grad(), _UntilItAttends():
            kind.forward(again, **arguments)
    except _Attended as attended:
        seen = attended
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"model must let PolicyPress run an attention a second time, to see its queries; {kind.__name__} of layer "
            f"{layer.layer_idx} stops with {type(error).__name__}: {error}"
        ) from error
    else:
        raise ArgumentError(
            "model must attend by transformers' attention interface or PyTorch's scaled_dot_product_attention, for "
            f"PolicyPress to see what its heads read; {kind.__name__} of layer {layer.layer_idx} does not (some do "
            "when loaded with attn_implementation='sdpa')"
        )
    # A quantized cache gives back other numbers than it was given.
    is_rounded = isinstance(kwargs["past_key_values"], QuantizedCache)
    for name, cached, read in (("keys", keys, seen.key), ("values", values, seen.value)):
        if not _are_heads_of(cached, read, is_rounded):
            raise ArgumentError(
                f"model must attend to the very keys and values that it caches, head by head; {kind.__name__} of layer "
                f"{layer.layer_idx}, run a second time, reads other {name} than it cached (in a ComposedPress, "
                "PolicyPress comes first)"
            )
    scale = 1.0 if seen.scale is None else seen.scale * seen.query.shape[-1] ** 0.5
    return seen.query if abs(scale - 1) < 1e-6 else seen.query * scale


def _are_heads_of(cached: torch.Tensor, read: torch.Tensor, is_rounded: bool) -> bool:
    """Whether what attention reads is what was cached, each head as often as there are queries to it."""
    batch, heads, *rest = cached.shape
    if read.shape[0] != batch or read.shape[1] % heads or list(read.shape[2:]) != rest:
        return False
    if is_rounded:
        return True
    cached = cached.detach()[:, :, None]
    difference = read.reshape(batch, heads, -1, *rest) - cached
    # The same sums in the same order give the same bits; more is allowed where a device does not repeat itself. What is
    # not a number differs from nothing.
    differs: torch.Tensor = difference.norm(dim=-1) > 0.02 * cached.norm(dim=-1)
    return not bool(differs.any())


def _check_model(model: Any) -> None:
    """Refuse a model in which kvpress finds no attention, or one that is never called."""
    decoder = getattr(model, "model", None)
    decoder = getattr(decoder, "language_model", decoder)
    attentions = [getattr(layer, "self_attn", None) for layer in getattr(decoder, "layers", None) or [None]]
    if not hasattr(decoder, "rotary_emb") or not all(hasattr(attention, "layer_idx") for attention in attentions):
        raise ArgumentError(
            "model must have what kvpress looks for: model.model.layers with one attention each, self_attn, and "
            f"model.model.rotary_emb; {type(model).__name__} has not"
        )


def _check_call(layer: Any, kwargs: dict[str, Any]) -> None:
    """Refuse a call in which kvpress finds no cache, or whose layer no longer sees all that is left in it."""
    name = type(layer).__name__
    lacking = [each for each in ("hidden_states", "past_key_values", "cache_position") if kwargs.get(each) is None]
    if lacking:
        raise ArgumentError(
            "model must run with a cache, and hand hidden_states, past_key_values and cache_position to its attention "
            f"by name, where kvpress looks for them; {name} got no {' and no '.join(lacking)}"
        )
    cache = kwargs["past_key_values"]
    if not hasattr(cache, "layers"):
        raise ArgumentError(f"past_key_values must be a Cache with layers; {name} got {type(cache).__name__}")
    kinds = set(getattr(layer.config, "layer_types", None) or ["sliding_attention"])
    window = getattr(layer.config, "sliding_window", None) if kinds == {"sliding_attention"} else None
    if window is None:
        return
    seen = int(kwargs["cache_position"][-1]) + 1
    # One more token comes out of this step. From the window's length on, masks are cut to it, whatever is still stored.
    if seen + 1 >= window:
        raise ArgumentError(
            "prompt and answer must be shorter than the sliding window where all layers slide: kvpress knows no "
            f"sliding windows; {name} has read {seen} tokens, and its window is {window}"
        )


def _slides_beside_full_layers(layer: Any, cache: Any) -> bool:
    """Whether a layer slides in a model that has full layers too; the cache must know which do."""
    kinds: list[str] = list(getattr(layer.config, "layer_types", None) or [])
    name = type(layer).__name__
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ArgumentError(
            f"model must have full or sliding attention in every layer; {name} has {sorted(set(kinds))}"
        )
    if len(set(kinds)) < 2:
        return False
    # Masks of both kinds are made from the sizes of the first layer of each, as the cache has them.
    slides: list[bool] = [kind == "sliding_attention" for kind in kinds]
    if [bool(each.is_sliding) for each in cache.layers] != slides:
        raise ArgumentError(
            "past_key_values must know which layers slide, as DynamicCache(config=model.config) does, or a later step "
            f"would get masks of the wrong size; {name}'s model mixes sliding and full layers"
        )
    return slides[int(layer.layer_idx)]


def _refuse_hidden_tokens(kwargs: dict[str, Any]) -> None:
    """Refuse prompts of which the last token may not see everything: kvpress keeps no account of padding."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        return
    if mask.ndim == 2:
        is_visible = mask.bool()
    else:
        last = mask[:, :, -1]
        is_visible = last if last.dtype == torch.bool else last == 0
    if not bool(is_visible.all()):
        raise ArgumentError(
            "attention_mask must let the last token see all others: kvpress knows neither padding nor sliding windows; "
            "got hidden tokens"
        )


def _evicted_places(decision: Eviction) -> tuple[torch.Tensor, ...]:
    """Return (row, head, position) of every evicted token, as kvpress wants them."""
    kept, num_tokens = decision.kept, decision.num_tokens
    stays = torch.zeros((*kept.shape[:-1], num_tokens + 1), dtype=torch.bool, device=kept.device)
    # Rows of heads that keep less than the widest are filled up with -1: those go to the place that is cut off.
    stays.scatter_(-1, torch.where(kept >= 0, kept, num_tokens), True)
    return (~stays[..., :num_tokens]).nonzero(as_tuple=True)

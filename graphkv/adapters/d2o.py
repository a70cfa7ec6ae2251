"""D2O: dropped tokens go into similar kept ones past a moving threshold, and layers with even attention keep more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import e, exp
from typing import ClassVar

from ..core import budgets, checks, primitives
from ..core.errors import ArgumentError
from ..core.layer import Cost, Layer, LayerShape, Memory
from ..core.merging import Merge, add_up, chunk_for, nearest, shares, slots
from ..core.policy import Assessment, Requirements, Wrapper
from ..core.protection import Protection
from ..core.selection import Choice
from ..core.types import Array, Namespace
from . import attention, running
from .h2o import H2O
from .merging import masses, of_kept
from .weightedkv import remembers_attention

__all__ = ["D2O", "moved_threshold", "spread"]


def moved_threshold(
    old: Array, similarity: Array, is_open: Array, /, *, statistic: str, momentum: float, xp: Namespace
) -> Array:
    """Return the threshold of each row after some tokens were dropped.

    Parameters
    ----------
    old : array, shape (..., 1)
        Infinity before the first tokens were dropped.
    similarity : array, shape (..., N)
    is_open : array, shape (..., N), bool
        The dropped tokens that have found a kept one.
    statistic : str
        ``"max"`` or ``"mean"``.
    momentum : float
        Weight of the new statistic, in [0, 1].

    Returns
    -------
    array, shape (..., 1)
        At first the mean; the old one where nothing was dropped.
    """
    number = xp.sum(xp.astype(is_open, similarity.dtype), axis=-1, keepdims=True)
    highest = xp.max(xp.where(is_open, similarity, xp.full_like(similarity, -xp.inf)), axis=-1, keepdims=True)
    total = xp.sum(xp.where(is_open, similarity, xp.zeros_like(similarity)), axis=-1, keepdims=True)
    # Equal similarities must not be below their own mean for a rounding.
    mean = xp.minimum(total / xp.maximum(number, xp.ones_like(number)), highest)
    new = highest if statistic == "max" else mean
    known = xp.where(xp.isfinite(old), old, mean)
    moved = xp.where(xp.isfinite(old), momentum * new + (1 - momentum) * known, mean)
    return xp.where(number > 0, moved, old)


def spread(received: Array, valid: Array, /, *, normalized: bool, xp: Namespace) -> Array:
    """Return how unevenly the tokens of a layer are attended to.

    Parameters
    ----------
    received : array, shape (batch, kv_heads, groups, N)
        Attention summed over the queries, per query head.
    valid : array, shape (batch, kv_heads, N), bool
    normalized : bool
        Scale the heads' variances to [0, 1] within the layer, as the official code does.

    Returns
    -------
    array, shape (batch,)
        The mean over the heads of the variance over the tokens, which divides by their number less one.
    """
    valid, nothing = valid[:, :, None, :], xp.zeros_like(received)
    number = xp.sum(xp.astype(valid, received.dtype), axis=-1, keepdims=True)
    mean = xp.sum(xp.where(valid, received, nothing), axis=-1, keepdims=True) / xp.maximum(number, xp.ones_like(number))
    away = xp.where(valid, received - mean, nothing)
    variance = xp.sum(away * away, axis=-1) / xp.maximum(number - 1, xp.ones_like(number))[..., 0]
    if normalized:
        least = xp.min(variance, axis=(1, 2), keepdims=True)
        variance = (variance - least) / (xp.max(variance, axis=(1, 2), keepdims=True) - least + 1e-6)
    return xp.mean(variance, axis=(1, 2))


@dataclass(frozen=True)
class D2O(Wrapper):
    r"""Any policy, with dropped tokens merged into their nearest kept ones past a moving threshold, and layer budgets.

    With :math:`u_i` the highest cosine of the key of a dropped token with those of kept tokens, the threshold of a head
    is at first the mean of its :math:`u`, and then, at every later call that drops tokens,
    :math:`\beta \max_i u_i + (1 - \beta)\,\tau`. What reaches it goes into its nearest kept token, key and value:

    .. math:: k_j \leftarrow \frac{\epsilon k_j + \sum_i e^{u_i} k_i}{\epsilon + \sum_i e^{u_i}},

    and likewise the value. The rest is gone. Who stays is the base's choice.

    Layers share their common budget in proportion to :math:`\operatorname{softmax}_l(-F_l)`, with :math:`F` how
    unevenly the tokens of the layer are attended to: even attention keeps more.

    Parameters
    ----------
    base : Policy
    weights : str
        ``"exponential"``: as above. ``"mean"``: :math:`(k_j + \sum u_i k_i) / (1 + n)` over n merged tokens, as in the
        official code: no average, so that lengths shrink.
    own_weight : float
        :math:`\epsilon`, for exponential weights: e is that of a cosine of 1.
    statistic : str
        ``"max"`` or ``"mean"``: what moves the threshold.
    momentum : float
        :math:`\beta`, in [0, 1].
    targets : str
        Kept tokens that others go into: ``"open"``, those that are not protected; ``"not_sinks"``, recents as well, as
        in the paper; ``"all"``.
    mass : str
        ``"count"``: a slot counts as the tokens in it. ``"one"``: as what its kept token counted, as in paper and code.
    layer_budgets : str
        ``"exact"``: shared out as above, with an exact sum. ``"code"``: rounded as in the official code, which keeps
        the first two layers and the last one whole. ``"base"``: those of the base.
    variance : str
        ``"normalized"`` or ``"raw"``, see `spread`. Raw variances of sums over many queries are large, so that the
        layer with the least takes nearly all.
    window : int
        Queries whose attention is summed over a base that remembers none.

    Raises
    ------
    ArgumentError
        If an option is out of range, or the budgets of the base are settled and `layer_budgets` is not ``"base"``;
        when evicting, if queries are missing.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    State: the threshold ``"threshold"``, one per KV head, infinite before the first merge. The official code keeps its
    threshold from one text to the next, and averages similarities over heads by their place in each head's own list;
    the paper matches tokens once for all heads. Here every head matches on its own and starts anew with each state.

    The paper's :math:`\epsilon` is not certain; 0.1, which circulates, leaves a kept token with three near ones a share
    of .015. Of equal cosines the lower token wins. Padding neither goes anywhere nor moves the threshold.

    References
    ----------
    .. [1] Wan et al., "D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large Language
       Models", arXiv:2406.13035.

    Examples
    --------
    The cosines of the two dropped tokens are 1 and .6, their mean is .8: one is merged, half and half, the other gone.

    >>> import numpy as np
    >>> from graphkv import D2O, Given, evict
    >>> keys = np.asarray([[[[1.0, 0.0], [2.0, 0.0], [0.6, 0.8]]]])
    >>> base = Given(budget=1, importance=np.asarray([[[3.0, 1.0, 0.0]]]))
    >>> done = evict(D2O(base, layer_budgets="base"), keys)
    >>> done.merge.into, done.mass, done.state.layer["threshold"].round(3)
    (array([[[ 0,  0, -1]]]), array([[[2.]]]), array([[0.8]]))
    >>> done.compress(keys, keys)[0].round(6)
    array([[[[1.5, 0. ]]]])
    """

    requirements: ClassVar[Requirements] = Requirements(merges=True, state=("threshold",))

    weights: str = "exponential"
    own_weight: float = e
    statistic: str = "max"
    momentum: float = 0.7
    targets: str = "not_sinks"
    mass: str = "count"
    layer_budgets: str = "exact"
    variance: str = "normalized"
    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("weights", self.weights, ("exponential", "mean"))
        if checks.finite_weight("own_weight", self.own_weight) == 0:
            raise ArgumentError(f"own_weight must be above 0; got {self.own_weight}")
        checks.choice("statistic", self.statistic, ("max", "mean"))
        checks.fraction("momentum", self.momentum)
        checks.choice("targets", self.targets, ("all", "not_sinks", "open"))
        checks.choice("mass", self.mass, ("count", "one"))
        checks.choice("layer_budgets", self.layer_budgets, ("base", "code", "exact"))
        checks.choice("variance", self.variance, ("normalized", "raw"))
        checks.count("window", self.window, minimum=1)
        if self.weights == "mean":
            checks.unused("own_weight", self.own_weight, e, "weights", self.weights)
        if self.layer_budgets != "base" and self.base.needs().settled:
            raise ArgumentError(
                f"layer_budgets must be 'base' over a {type(self.base).__name__}, whose budgets are settled; "
                f"got {self.layer_budgets!r}"
            )

    @classmethod
    def paper(cls, budget: int, /) -> D2O:
        """Return the paper's choices: three important tokens to one recent, 4 sinks, raw variances, no masses.

        Parameters
        ----------
        budget : int
            Tokens to keep per KV head in the average layer.

        Returns
        -------
        D2O
        """
        recents = checks.count("budget", budget) // 4
        base = H2O(budget=budget, num_sinks=4, num_recent=recents, group_reduction="sum")
        return cls(base, mass="one", variance="raw")

    @classmethod
    def official(cls, budget: int | float = 0.2, /) -> D2O:
        """Return the official code's choices: half recents, 4 sinks, weights that are no average, its layer budgets.

        Its selection per query head, and a threshold that outlives the text, are not expressed.

        Parameters
        ----------
        budget : int or float
            Tokens to keep per KV head in the average layer, or their share.

        Returns
        -------
        D2O
        """
        base = H2O(budget=budget, num_sinks=4, group_reduction="sum")
        return cls(
            base, weights="mean", statistic="mean", momentum=0.5, targets="all", mass="one", layer_budgets="code"
        )

    def needs(self) -> Requirements:
        """Return the needs of the base; for layer budgets the window's queries where it remembers no attention."""
        needs = replace(self.requirements, masses=self.mass == "count").joined(self.base.needs())
        if self.layer_budgets == "base":
            return needs
        needs = replace(needs, wants=True)
        return needs if remembers_attention(self.base) else replace(needs, queries="window").joined(needs)

    def num_queries(self, num_tokens: int, /) -> int:
        """Return how many queries the base and the layer budgets use."""
        number = self.base.num_queries(num_tokens)
        if self.layer_budgets == "base" or remembers_attention(self.base):
            return number
        return max(number, min(self.window, num_tokens))

    def observe(self, layer: Layer, memory: Memory | None, /) -> Memory:
        """Keep the threshold beside what the base remembers."""
        found = self.base.observe(layer, memory) or Memory()
        return Memory(tokens=found.tokens, layer={**found.layer, "threshold": _threshold(memory, layer)})

    def merge(self, choice: Choice, found: Assessment, layer: Layer, memory: Memory | None, /) -> Merge:
        """Move the threshold, and merge what reaches it."""
        xp, backend, num_slots = layer.xp, layer.backend, choice.kept.shape[-1]
        own = slots(choice.kept, layer.num_tokens, backend=backend)
        target, similarity = nearest(layer.keys, choice.kept, self._targets(found, layer), backend=backend)
        is_open = layer.valid & xp.isfinite(similarity)
        threshold = moved_threshold(
            _threshold(memory, layer)[..., None],
            similarity,
            is_open,
            statistic=self.statistic,
            momentum=self.momentum,
            xp=xp,
        )
        goes = is_open & (similarity >= threshold)
        into = xp.where((own >= 0) | goes, target, xp.full_like(target, -1))

        count = masses(layer)
        cosine = xp.where(goes, similarity, xp.zeros_like(similarity))
        if self.weights == "exponential":
            weights = count * xp.where(goes, xp.exp(cosine), xp.full_like(cosine, self.own_weight))
            part = shares(weights, into, num_slots, backend=backend)
        else:
            part = shares(count, into, num_slots, backend=backend)
            part = part * xp.where(goes, cosine, xp.ones_like(cosine))
        return Merge(
            into=into,
            key_weights=part,
            value_weights=part,
            mass=add_up(count, into, num_slots, backend=backend)
            if self.mass == "count"
            else of_kept(count, own, num_slots, layer),
            memory={"threshold": threshold[..., 0]},
        )

    def wants(self, layer: Layer, memory: Memory | None, /) -> Array | None:
        """Return how unevenly the layer's tokens are attended to, one number per row of the batch; see `spread`."""
        if self.layer_budgets == "base":
            return self.base.wants(layer, memory)
        if not remembers_attention(self.base):
            rows = layer.attention if layer.attention is not None else layer.queries
            received = attention.received(layer, min(self.window, rows.shape[2]))  # type: ignore[union-attr]
        else:
            sums = running.sums_of(memory)["attention"]
            received = layer.xp.matrix_transpose(sums) if sums.ndim == 4 else sums[:, :, None, :]
        return spread(received, layer.valid, normalized=self.variance == "normalized", xp=layer.xp)

    def share_out(self, wants: Sequence[float], num_tokens: int, /) -> list[int]:
        """Share the budgets of all layers out: more to even attention.

        Parameters
        ----------
        wants : sequence of float
            One number per layer.
        num_tokens : int
            N, tokens in the cache.

        Returns
        -------
        list of int
            With exact budgets, of the sum of the base's; each at least a hundredth of the tokens and what is protected
            at any budget, at most all tokens.

        Raises
        ------
        ArgumentError
            If a number is negative or not finite.

        Examples
        --------
        The softmax of 0, -1 is .731, .269:

        >>> from graphkv import H2O
        >>> D2O(H2O(budget=10)).share_out([0.0, 1.0], 100)
        [15, 5]
        """
        if self.layer_budgets == "base":
            return self.base.share_out(wants, num_tokens)
        numbers = [checks.finite_weight(f"wants[{layer}]", value) for layer, value in enumerate(wants)]
        own = [self.base.layer_budget(num_tokens, layer, len(numbers)) for layer in range(len(numbers))]
        if not numbers or max(own) >= num_tokens:
            return own
        powers = [exp(min(numbers) - number) for number in numbers]
        if self.layer_budgets == "exact":
            least = min(*own, max(num_tokens // 100, self.protection(0).count)) if len(own) > 1 else own[0]
            return budgets.allocate(powers, sum(own), num_tokens, least)
        ratios = [min(1.0, max(0.01, power / sum(powers) * sum(own) / num_tokens)) for power in powers]
        # Important tokens and recents are cut down each.
        result = [2 * int(num_tokens * ratio / 2) for ratio in ratios]
        whole = {0, 1, len(numbers) - 1}
        return [num_tokens if layer in whole else tokens for layer, tokens in enumerate(result)]

    def cost(self, shape: LayerShape, /) -> Cost:
        """Compare every token with every kept one: 2 D. In memory: the cosines of one chunk of tokens."""
        rows, kept = shape.batch * shape.kv_heads, min(shape.budget, shape.num_tokens)
        flops = 2 * rows * shape.num_tokens * kept * shape.head_size
        return self.base.cost(shape).then(Cost(flops, 4 * rows * min(chunk_for(rows, kept), shape.num_tokens) * kept))

    def _targets(self, found: Assessment, layer: Layer, /) -> Array:
        """Mark the tokens that others may go into."""
        barred = found.protected if self.targets == "open" else None
        if self.targets == "not_sinks":
            barred = Protection(first=self.protection(0).first).mask(layer)
        return layer.valid if barred is None else layer.valid & ~barred


def _threshold(memory: Memory | None, layer: Layer, /) -> Array:
    """Return the thresholds so far, (batch, kv_heads), or infinity."""
    if memory is not None and "threshold" in memory.layer:
        return memory.layer["threshold"]
    xp = layer.xp
    return xp.full(layer.valid.shape[:2], xp.inf, dtype=layer.keys.dtype, device=primitives.device_of(layer.keys))

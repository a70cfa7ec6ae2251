"""Absorb: dropped tokens go into the kept ones that they nearly equal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..core import checks
from ..core.layer import Cost, Layer, LayerShape, Memory
from ..core.merging import Merge, add_up, chunk_for, nearest, shares, slots
from ..core.policy import Assessment, Requirements, Wrapper
from ..core.selection import Choice
from . import attention
from .merging import at_slots, masses, of_kept

__all__ = ["Absorb"]


@dataclass(frozen=True)
class Absorb(Wrapper):
    r"""Any policy, with dropped tokens absorbed by kept ones whose keys are nearly the same.

    A dropped token whose best cosine with a kept, unprotected token of its head reaches the threshold goes into that
    one; all others are gone. The kept token's key stays as it is, its position with it. With weights :math:`a`, a slot
    that stands for the set :math:`S` with the kept token :math:`j` has

    .. math:: v = \frac{\sum_{i \in S} a_i v_i}{\sum_{i \in S} a_i}, \qquad
              m = m_j \frac{\sum_{i \in S} a_i}{a_j},

    and attention adds :math:`\log m` to its logit. Who stays is the base's choice.

    Parameters
    ----------
    base : Policy
    threshold : float
        Least cosine, in [-1, 1].
    weights : str
        ``"attention"``: the mean attention that a token receives from those of the last `window` queries that can see
        it. ``"count"``: the number of tokens that it stands for, so that masses count tokens; no queries are needed.
    window : int
        Queries that weights by attention are taken from, fewer where fewer are given.

    Raises
    ------
    ArgumentError
        If an option is out of range; when evicting, if weights by attention have no queries.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    From no paper. Exact duplicates are absorbed without any error: :math:`e^{q k}` counts once for each of them.
    Of equal cosines the lower token absorbs. Where the kept token has received no attention, the slot's weights are
    counts.

    Near-duplicates are safe to absorb; tokens that are only similar drown what a slot stood for, so thresholds much
    below 0.95 lose more than they save.

    Examples
    --------
    Token 1 points where token 0 points, and is dropped into it; token 2 is not similar to any, and is gone:

    >>> import numpy as np
    >>> from graphkv import Absorb, Given, evict
    >>> keys = np.asarray([[[[2.0, 0.0], [3.0, 0.0], [-1.0, 1.0], [0.0, 1.0]]]])
    >>> values = np.asarray([[[[1.0], [4.0], [8.0], [8.0]]]])
    >>> base = Given(budget=2, importance=np.asarray([[[3.0, 1.0, 0.0, 2.0]]]))
    >>> done = evict(Absorb(base, weights="count"), keys)
    >>> done.kept, done.merge.into, done.mass
    (array([[[0, 3]]]), array([[[ 0,  0, -1,  1]]]), array([[[2., 1.]]]))
    >>> done.compress(keys, values)[1].tolist()
    [[[[2.5], [8.0]]]]
    """

    requirements: ClassVar[Requirements] = Requirements(merges=True)

    threshold: float = 0.95
    weights: str = "attention"
    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.cosine("threshold", self.threshold)
        checks.choice("weights", self.weights, ("attention", "count"))
        checks.count("window", self.window, minimum=1)

    def needs(self) -> Requirements:
        """Return the needs of the base; weights by attention need some queries, fewer than the window too."""
        needs = super().needs()
        return needs if self.weights == "count" else replace(needs, queries="all")

    def num_queries(self, num_tokens: int, /) -> int:
        """Return how many queries the base and the weights use."""
        number = self.base.num_queries(num_tokens)
        return number if self.weights == "count" else max(number, min(self.window, num_tokens))

    def merge(self, choice: Choice, found: Assessment, layer: Layer, memory: Memory | None, /) -> Merge:
        """Send each dropped token to its nearest kept one, or nowhere."""
        xp, backend, kept = layer.xp, layer.backend, choice.kept
        is_target = layer.valid if found.protected is None else layer.valid & ~found.protected
        target, similarity = nearest(layer.keys, kept, is_target, backend=backend)
        own = slots(kept, layer.num_tokens, backend=backend)
        goes = layer.valid & (similarity >= self.threshold)
        into = xp.where((own >= 0) | goes, target, xp.full_like(target, -1))

        count, num_slots = masses(layer), kept.shape[-1]
        weights = count
        if self.weights == "attention":
            received = attention.mean_received(layer, self.window)
            of_slot = at_slots(of_kept(received, own, num_slots, layer), into, layer)
            weights = xp.where(of_slot > 0, received, count)
        alone = of_kept(weights, own, num_slots, layer)
        ratio = add_up(weights, into, num_slots, backend=backend) / xp.where(alone > 0, alone, xp.ones_like(alone))
        return Merge(
            into=into,
            key_weights=xp.astype(own >= 0, layer.keys.dtype),
            value_weights=shares(weights, into, num_slots, backend=backend),
            mass=of_kept(count, own, num_slots, layer) * ratio,
        )

    def cost(self, shape: LayerShape, /) -> Cost:
        """Compare every token with every kept one: 2 D. In memory: the cosines of one chunk of tokens."""
        rows, kept = shape.batch * shape.kv_heads, min(shape.budget, shape.num_tokens)
        flops = 2 * rows * shape.num_tokens * kept * shape.head_size
        cost = self.base.cost(shape).then(Cost(flops, 4 * rows * min(chunk_for(rows, kept), shape.num_tokens) * kept))
        return cost if self.weights == "count" else cost.then(attention.window_cost(shape, self.window))

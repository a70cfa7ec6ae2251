"""The policy that this library exists for: `GraphKV` over any other."""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import checks
from .layer import Cost, Layer, LayerShape
from .policy import Assessment, Requirements, Wrapper
from .signals import Decay, Signal

__all__ = ["GraphKV"]


@dataclass(frozen=True)
class GraphKV(Wrapper):
    """Any policy, with tokens that resemble others ranked down; ``GraphKV(base)`` is the paper's method.

    The base policy scores the tokens, the signal makes new scores of these and of the similarities of the keys, and the
    budget is filled from the result. Only tokens that the base may still choose get new scores: neither padding nor
    protected ones (observation window, sinks, recents).

    Parameters
    ----------
    base : Policy
        Where importance, protection and budget come from.
    signal : Signal
        `Decay`, the paper's; `Enhance` or `Bar`, its ablations; or `Degree` or `PageRank`, over the complete graph.
    unrotated : bool
        Compare the keys as they were before the rotary embedding, which `evict` must be given. Then the distance
        between two tokens in the text does not make them less alike.

    Raises
    ------
    ArgumentError
        When evicting, if there are no keys to compare.
    ArgumentTypeError
        If `base` is no Policy, `signal` no Signal or `unrotated` no bool.

    Notes
    -----
    `Degree` was better than the paper's setting on a tuning split, with every base.

    That the number of sources counts only the tokens that are still open, that protected tokens stand outside the graph
    and that the number of neighbors may be a share of the open tokens are our reading of the paper, which gives the
    ratio 0.3 of the budget and says "adaptive" of the rest.

    References
    ----------
    .. [1] Li, Jin, Zhang, "GraphKV", arXiv:2509.00388.

    Examples
    --------
    >>> from graphkv import Decay, Degree, GraphKV, SnapKV
    >>> GraphKV(SnapKV(budget=512)).budget
    512
    >>> GraphKV(SnapKV(budget=512)).signal == Decay(source_ratio=0.3, neighbors=2)
    True
    >>> GraphKV(SnapKV(budget=512), Degree(exponent=4)).signal
    Degree(exponent=4, fusion='power')
    """

    signal: Signal = Decay()  # noqa: RUF009 - an immutable value
    unrotated: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.instance("signal", self.signal, Signal)
        checks.flag("unrotated", self.unrotated)

    def needs(self) -> Requirements:
        """Return the needs of the base, and the keys that are compared."""
        needs = super().needs()
        return replace(needs, unrotated_keys=self.unrotated or needs.unrotated_keys)

    def rescore(self, found: Assessment, layer: Layer, budget: int, /) -> Assessment:
        """Send the signal over the base's scores."""
        found = self.base.rescore(found, layer, budget)
        candidates = layer.valid if found.protected is None else layer.valid & ~found.protected
        scores, graph = self.signal.rescore(
            found.scores,
            layer.unrotated_keys if self.unrotated else layer.keys,
            valid=layer.valid,
            candidates=candidates,
            open_tokens=self._open_tokens(budget),
            backend=layer.backend,
        )
        return replace(found, scores=scores, graph=found.graph if graph is None else graph)

    def cost(self, shape: LayerShape, /) -> Cost:
        """Return the cost of the base and of the signal."""
        return self.base.cost(shape).then(self.signal.cost(shape, self._open_tokens(shape.budget)))

    def _open_tokens(self, budget: int, /) -> int:
        """Count the tokens that the base may still choose at a layer budget."""
        return max(0, budget - self.protection(budget).count)

"""The policy that this library exists for: `GraphKV` over any other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from . import checks
from .errors import ArgumentError
from .policy import Assessment, LayerInputs, LayerShape, Requirements, Wrapper
from .signals import Decay, Signal

__all__ = ["GraphKV"]


def _open_tokens(policy: GraphKV, budget: int, /) -> int:
    """Count the tokens that the base may still choose at a layer budget."""
    return max(0, budget - policy.num_protected(budget))


def _flops(policy: GraphKV, shape: LayerShape, /) -> int:
    return policy.signal.flops(shape, _open_tokens(policy, shape.budget))


def _bytes(policy: GraphKV, shape: LayerShape, /) -> int:
    return policy.signal.bytes(shape, _open_tokens(policy, shape.budget))


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

    requirements: ClassVar[Requirements] = Requirements(flops=_flops, bytes=_bytes)

    signal: Signal = Decay()  # noqa: RUF009 - an immutable value
    unrotated: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.instance("signal", self.signal, Signal)
        checks.flag("unrotated", self.unrotated)

    def needs(self) -> Requirements:
        """Need what the base needs, and the keys that are compared."""
        needs = super().needs()
        return replace(needs, unrotated_keys=self.unrotated or needs.unrotated_keys)

    def assess(self, inputs: LayerInputs, /) -> Assessment:
        """Let the base score, then the signal."""
        keys = inputs.unrotated_keys if self.unrotated else inputs.keys
        if keys is None:
            raise ArgumentError("unrotated_keys must be given for GraphKV with unrotated=True; got None")
        found = self.base.assess(inputs)
        candidates = inputs.valid if found.protected is None else inputs.valid & ~found.protected
        scores, graph = self.signal.rescore(
            found.scores,
            keys,
            valid=inputs.valid,
            candidates=candidates,
            open_tokens=_open_tokens(self, inputs.budget),
            backend=inputs.backend,
        )
        return replace(found, scores=scores, graph=found.graph if graph is None else graph)

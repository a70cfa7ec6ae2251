"""The signals of `GraphKV`, as values: what makes new scores of a base's scores and the keys.

A signal is a frozen dataclass that defines `Signal.rescore`; `GraphKV` takes any of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from . import budgets, checks
from .backend import Backend
from .fusion import EXPONENT, FUSIONS, distance, fuse
from .graph import build_graph, default_chunk_size
from .layer import Cost, LayerShape
from .pagerank import DAMPING, ROUNDS, pagerank
from .propagation import propagate
from .types import Array, Graph
from .values import Value

__all__ = ["Bar", "Decay", "Degree", "Enhance", "PageRank", "Signal"]


@dataclass(frozen=True, kw_only=True)
class Signal(Value, ABC):
    """How `GraphKV` makes new scores of a base's scores and the keys: an immutable value.

    A new signal is a frozen dataclass that defines `rescore`; the other methods have defaults.
    """

    @abstractmethod
    def rescore(
        self, scores: Array, keys: Array, /, *, valid: Array, candidates: Array, open_tokens: int, backend: Backend
    ) -> tuple[Array, Graph | None]:
        """Compute the new scores of one layer.

        Parameters
        ----------
        scores : array, shape (batch, kv_heads, N)
            Of the base, float32 or wider.
        keys : array, shape (batch, kv_heads, N, D)
            To compare, float32 or wider.
        valid : array, shape (batch, kv_heads, N), bool
            False for padding.
        candidates : array, shape (batch, kv_heads, N), bool
            The valid tokens that are not protected. Only these may get new scores.
        open_tokens : int
            P, the layer budget less the protected tokens.
        backend : Backend

        Returns
        -------
        scores : array, shape (batch, kv_heads, N)
        graph : Graph or None
            The last graph that changed the scores.
        """

    def cost(self, shape: LayerShape, open_tokens: int, /) -> Cost:
        """Return the cost of one layer. Default: the normalized keys in memory."""
        return Cost(bytes=4 * _entries(shape))


def _entries(shape: LayerShape, /) -> int:
    """Return the number of entries of the keys."""
    return shape.batch * shape.kv_heads * shape.num_tokens * shape.head_size


@dataclass(frozen=True, kw_only=True)
class _Edges(Signal):
    """A signal that `build_graph` and `propagate` send along edges."""

    # As `propagate` calls it.
    direction: ClassVar[str]

    source_ratio: float = 0.3
    neighbors: int | float = 2

    def __post_init__(self) -> None:
        checks.fraction("source_ratio", self.source_ratio)
        checks.ratio_or_count("neighbors", self.neighbors)

    def rescore(
        self, scores: Array, keys: Array, /, *, valid: Array, candidates: Array, open_tokens: int, backend: Backend
    ) -> tuple[Array, Graph | None]:
        """Link the best candidates to those that resemble them most, and send the signal once."""
        return self._send(scores, keys, candidates, open_tokens, backend)

    def cost(self, shape: LayerShape, open_tokens: int, /) -> Cost:
        """Compare every source with every token, 2 K N D, and normalize, 3 N D.

        In memory: the normalized keys, or the places of a chunk of similarities where those are more, as in the
        portable form.
        """
        num_sources, num_neighbors = self._counts(open_tokens)
        width = min(shape.num_tokens, default_chunk_size(shape.num_tokens))
        chunk = 8 * shape.batch * shape.kv_heads * num_sources * (width + num_neighbors)
        flops = _entries(shape) * (2 * min(num_sources, shape.num_tokens) + 3)
        return Cost(flops, max(chunk, super().cost(shape, open_tokens).bytes))

    def _counts(self, open_tokens: int) -> tuple[int, int]:
        """Return K and M."""
        if not open_tokens:
            return 0, 0
        return budgets.count_of(float(self.source_ratio), open_tokens), budgets.count_of(self.neighbors, open_tokens)

    def _send(
        self, scores: Array, keys: Array, candidates: Array, open_tokens: int, backend: Backend, **options: Any
    ) -> tuple[Array, Graph]:
        num_sources, num_neighbors = self._counts(open_tokens)
        graph = build_graph(
            keys, scores, num_sources=num_sources, num_neighbors=num_neighbors, valid=candidates, backend=backend
        )
        return propagate(scores, graph, signal=self.direction, backend=backend, **options), graph


@dataclass(frozen=True, kw_only=True)
class _Factors(_Edges):
    """A signal that multiplies scores by factors."""

    rounds: int = 1
    accumulation: str = "product"
    strength: float = 1.0
    recompute_sources: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.count("rounds", self.rounds)
        checks.choice("accumulation", self.accumulation, ("product", "sum"))
        checks.single_round(self.accumulation, self.rounds)
        checks.fraction("strength", self.strength)
        checks.flag("recompute_sources", self.recompute_sources)

    def rescore(
        self, scores: Array, keys: Array, /, *, valid: Array, candidates: Array, open_tokens: int, backend: Backend
    ) -> tuple[Array, Graph | None]:
        """Build a graph and send the signal over it for all rounds, or build one for every round."""
        passes, rounds = (self.rounds, 1) if self.recompute_sources else (1, self.rounds)
        graph = None
        for _ in range(passes):
            scores, graph = self._send(
                scores,
                keys,
                candidates,
                open_tokens,
                backend,
                rounds=rounds,
                accumulation=self.accumulation,
                strength=self.strength,
            )
        return scores, graph

    def cost(self, shape: LayerShape, open_tokens: int, /) -> Cost:
        """Count the operations once for every graph that is built."""
        once = super().cost(shape, open_tokens)
        return replace(once, flops=once.flops * (self.rounds if self.recompute_sources else 1))


@dataclass(frozen=True, kw_only=True)
class Decay(_Factors):
    """The paper's signal: `build_graph` links the best tokens to their most similar ones, `propagate` lowers these.

    Parameters
    ----------
    source_ratio : float
        K, the number of sources, as a share of P, the layer budget less the protected tokens. Rounded down, at least 1
        when above 0.
    neighbors : int or float
        M, the number of neighbors per source, or its share of P, rounded likewise.
    rounds : int
        T, the number of rounds.
    accumulation : str
        ``"product"`` or ``"sum"``, see `propagate`.
    strength : float
        g, in [0, 1].
    recompute_sources : bool
        Choose sources and edges anew before each round. Default: fixed, as in the paper's formula.

    Raises
    ------
    ArgumentError
        If an option is unknown or out of range, or the sum is iterated.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    The paper gives no number of neighbors; 2 is what both of its method figures draw.

    Examples
    --------
    >>> from graphkv import Decay
    >>> Decay(neighbors=4).source_ratio
    0.3
    """

    direction: ClassVar[str] = "decay"


@dataclass(frozen=True, kw_only=True)
class Enhance(_Factors):
    """The paper's ablation that raises what `Decay` lowers. Options and errors are those of `Decay`."""

    direction: ClassVar[str] = "enhance"


@dataclass(frozen=True, kw_only=True)
class Bar(_Edges):
    """The paper's ablation that bars every neighbor of a source: it is kept only when nothing else is left.

    Parameters
    ----------
    source_ratio : float
        As of `Decay`.
    neighbors : int or float
        As of `Decay`. Rounds and strength would change nothing.

    Raises
    ------
    ArgumentError
        If an option is out of range.
    ArgumentTypeError
        If an option has the wrong type.
    """

    direction: ClassVar[str] = "evict"


@dataclass(frozen=True, kw_only=True)
class Degree(Signal):
    """Fuse the importance with the distance from all other tokens, without edges; not in the paper.

    `distance` compares every key with the mean of all that are no padding, and `fuse` puts that together with the
    importance. It is the limit of `Decay` when every token is a weak source of all: the product of many factors 1 - g w
    tends to exp(-p c), c the mean of the weights, and so does the power (1 - c)^p for small c.

    Parameters
    ----------
    exponent : int
        For ``fusion="power"``: p, at least 1. Ranks have no use for it.
    fusion : str
        ``"power"``, ``"max_rank"`` or ``"mean_rank"``, see `fuse`.

    Raises
    ------
    ArgumentError
        If `fusion` is unknown or `exponent` below 1, or given for ranks.
    ArgumentTypeError
        If `exponent` is not an integer.

    Examples
    --------
    >>> from graphkv import Degree
    >>> Degree().exponent
    8
    """

    exponent: int = EXPONENT
    fusion: str = "power"

    def __post_init__(self) -> None:
        checks.choice("fusion", self.fusion, FUSIONS)
        checks.count("exponent", self.exponent, minimum=1)
        if self.fusion != "power":
            checks.unused("exponent", self.exponent, EXPONENT, "fusion", self.fusion)

    def rescore(
        self, scores: Array, keys: Array, /, *, valid: Array, candidates: Array, open_tokens: int, backend: Backend
    ) -> tuple[Array, Graph | None]:
        """Compare with the mean of all tokens, and fuse among the candidates."""
        apart = distance(keys, valid=valid, backend=backend)
        fused = fuse(
            scores, distance=apart, fusion=self.fusion, exponent=self.exponent, valid=candidates, backend=backend
        )
        return fused, None

    def cost(self, shape: LayerShape, open_tokens: int, /) -> Cost:
        """Normalize (3), sum up (1) and compare with the mean (3)."""
        return replace(super().cost(shape, open_tokens), flops=7 * _entries(shape))


@dataclass(frozen=True, kw_only=True)
class PageRank(Signal):
    """Rank by personalized PageRank among the candidates, with teleports to the base's importance; not in the paper.

    See `pagerank`. It raises what resembles important tokens, as `Enhance` does, but over the complete graph.

    Parameters
    ----------
    damping : float
        d, in [0, 1]: how much comes from the other tokens. 0 is the base alone.
    rounds : int
        The number of rounds. 0 is the base alone.

    Raises
    ------
    ArgumentError
        If an option is out of range.
    ArgumentTypeError
        If an option has the wrong type.
    """

    damping: float = DAMPING
    rounds: int = ROUNDS

    def __post_init__(self) -> None:
        checks.fraction("damping", self.damping)
        checks.count("rounds", self.rounds)

    def rescore(
        self, scores: Array, keys: Array, /, *, valid: Array, candidates: Array, open_tokens: int, backend: Backend
    ) -> tuple[Array, Graph | None]:
        """Let importance flow between the candidates."""
        flowed = pagerank(scores, keys, damping=self.damping, rounds=self.rounds, valid=candidates, backend=backend)
        return flowed, None

    def cost(self, shape: LayerShape, open_tokens: int, /) -> Cost:
        """Normalize (3), then sum up (2) and compare (2) every round."""
        return replace(super().cost(shape, open_tokens), flops=(3 + 4 * self.rounds) * _entries(shape))

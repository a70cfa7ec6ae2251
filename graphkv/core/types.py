"""The types that every part of graphkv uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from . import checks

__all__ = ["Array", "Graph", "Namespace"]

# The array API has no static type that NumPy, torch and CuPy all satisfy; shapes and dtypes are given in docstrings. A
# type variable would be wrong: NumPy's types have a dtype, and what is kept of float32 keys are int64 positions.
Array: TypeAlias = Any
Namespace: TypeAlias = Any


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Graph:
    """The edges from source tokens to their neighbors, in regular (ELL) form.

    Every source has the same number of edges, so three dense arrays hold the graph in every array library. An edge of
    weight 0 has no effect anywhere; such edges fill rows that have fewer than M eligible tokens.

    Attributes
    ----------
    sources : array, shape (..., K), int64
        Positions of the source tokens, ascending.
    neighbors : array, shape (..., K, M), int64
        Positions of each source's neighbors, highest weight first, equal weights by position. Never a source, unless
        the weight is 0.
    weights : array, shape (..., K, M), float32 or wider
        Edge weights in [0, 1].
    num_tokens : int
        N, the number of tokens that the graph connects.

    Raises
    ------
    ArgumentError
        If the shapes disagree or `num_tokens` is negative.
    ArgumentTypeError
        If a field has the wrong type or dtype.
    BackendError
        If the arrays belong to different libraries.
    """

    sources: Array
    neighbors: Array
    weights: Array
    num_tokens: int

    def __post_init__(self) -> None:
        checks.graph_fields(self)

    @property
    def num_sources(self) -> int:
        """K, the number of sources per row."""
        return int(self.sources.shape[-1])

    @property
    def num_neighbors(self) -> int:
        """M, the number of neighbors per source."""
        return int(self.neighbors.shape[-1])

    def __repr__(self) -> str:
        shape = tuple(self.weights.shape)
        return f"Graph(num_tokens={self.num_tokens}, weights of shape (..., K, M)={shape}, {self.weights.dtype})"

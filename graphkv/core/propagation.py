"""Step 2: let the sources send their signal to their neighbors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from . import checks, primitives
from .backend import Backend, PropagateStep, resolve
from .graph import clip_weights
from .types import Array, Graph, Namespace

__all__ = ["SIGNALS", "portable_propagate", "propagate"]

# The lower bound of a factor of the product: an exact duplicate keeps a positive score and its place among duplicates.
SMALLEST_FACTOR = 1e-6


def propagate(
    importance: Array,
    graph: Graph,
    /,
    *,
    signal: str = "decay",
    rounds: int = 1,
    accumulation: str = "product",
    strength: float = 1.0,
    backend: Backend | str | None = None,
) -> Array:
    r"""Lower the importance of tokens that resemble more important ones.

    With the strength :math:`g`, the factor of token :math:`j` is, over all sources :math:`i` that have :math:`j` as a
    neighbor,

    .. math::

        F_j = \prod_i (1 - g\,w_{ij}) \quad\text{(product)}, \qquad
        F_j = 1 - g \sum_i w_{ij} \quad\text{(sum)},

    where each factor of the product is at least 1e-6. After :math:`T` rounds with fixed sources:

    ``"decay"``
        :math:`s_j^{\prime} = s_j - |s_j|\,(1 - F_j^T)`, which is :math:`s_j F_j^T` for :math:`s_j \ge 0`; never raises
        a score.
    ``"enhance"``
        the same with factors :math:`1 + g\,w_{ij}`; never lowers a score.
    ``"evict"``
        :math:`-\infty` for every token with an incoming weight above 0.

    Parameters
    ----------
    importance : array, shape (..., N)
        Score per token. Half precision and integers are widened to float32. Infinite and NaN scores stay as they are
        under ``"decay"`` and ``"enhance"``.
    graph : Graph
        Edges of the same rows, from `build_graph`. A weight outside [0, 1] is clipped, and NaN counts as 0.
    signal : str
        ``"decay"``, ``"enhance"`` or ``"evict"``.
    rounds : int
        T; 0 returns the importance.
    accumulation : str
        ``"product"`` or ``"sum"``; the sum allows `rounds` = 1 only, because iterating it flips signs.
    strength : float
        g, in [0, 1]. 0 returns the importance.
    backend : Backend or str, optional
        Default: inferred from the arrays.

    Returns
    -------
    array, shape (..., N)
        float32 or wider. Tokens without edges, sources among them, keep their importance bit for bit.

    Raises
    ------
    ArgumentError
        If shapes disagree, an option is unknown or out of range, or the sum is iterated.
    ArgumentTypeError
        If `graph` is not a Graph, `rounds` not an integer, `strength` not a number or an array not real.
    BackendError
        If the arrays are not all of the backend's library and on one device.

    Notes
    -----
    The paper's text multiplies, its method figure adds; without negative scores both keep the same tokens there. The
    paper does not cover negative importance (KNorm returns minus the norm): a plain product would raise it.

    References
    ----------
    .. [1] Li, Jin, Zhang, "GraphKV", arXiv:2509.00388, section on decay-signal propagation and method figure.

    Examples
    --------
    >>> import numpy as np
    >>> from graphkv import Graph, propagate
    >>> edge = Graph(sources=np.asarray([0]), neighbors=np.asarray([[1]]), weights=np.asarray([[0.75]]), num_tokens=3)
    >>> propagate(np.asarray([4.0, 2.0, 1.0]), edge)
    array([4. , 0.5, 1. ])
    """
    checks.instance("graph", graph, Graph)
    backend = resolve(
        backend, importance=importance, sources=graph.sources, neighbors=graph.neighbors, weights=graph.weights
    )
    shape = checks.numeric("importance", importance, "(..., N)", backend=backend)
    checks.numeric("weights", graph.weights, "(..., K, M)", backend=backend)
    checks.integers("neighbors", graph.neighbors, backend=backend)
    checks.same_leading("importance", shape, (*graph.sources.shape[:-1], graph.num_tokens), "the graph")
    signal = checks.choice("signal", signal, SIGNALS)
    accumulation = checks.choice("accumulation", accumulation, ("product", "sum"))
    rounds = checks.count("rounds", rounds)
    strength = checks.fraction("strength", strength)
    checks.single_round(accumulation, rounds)
    importance = primitives.widen(importance, xp=backend.xp)
    if rounds == 0 or strength == 0 or graph.num_sources == 0 or graph.num_neighbors == 0:
        return importance
    # Indices may have any integer dtype, and not every library can gather by all of them.
    graph = replace(graph, neighbors=backend.xp.astype(graph.neighbors, backend.xp.int64))
    step: PropagateStep = backend.propagate or portable_propagate
    with backend.guarded(importance):
        return step(
            importance,
            graph,
            signal=signal,
            rounds=rounds,
            accumulation=accumulation,
            strength=strength,
            backend=backend,
        )


def portable_propagate(
    importance: Array,
    graph: Graph,
    /,
    *,
    signal: str,
    rounds: int,
    accumulation: str,
    strength: float,
    backend: Backend,
) -> Array:
    """Send a signal: the specification of `propagate`, with arguments checked, and at least one edge and one round."""
    xp = backend.xp
    # Factors are computed in the wider dtype of the two inputs.
    dtype = xp.result_type(importance.dtype, primitives.widen(graph.weights, xp=xp).dtype)
    weights = clip_weights(xp.astype(graph.weights, dtype), xp=xp)
    graph = Graph(sources=graph.sources, neighbors=graph.neighbors, weights=weights, num_tokens=graph.num_tokens)
    return SIGNALS[signal](
        importance, graph, rounds=rounds, accumulation=accumulation, strength=strength, backend=backend
    )


def decay(
    importance: Array, graph: Graph, /, *, rounds: int, accumulation: str, strength: float, backend: Backend
) -> Array:
    """Lower every neighbor: the closer it is to the sources, the more."""
    return _scale(importance, _factor(graph, -strength, accumulation, backend), rounds, xp=backend.xp)


def enhance(
    importance: Array, graph: Graph, /, *, rounds: int, accumulation: str, strength: float, backend: Backend
) -> Array:
    """Raise every neighbor: the closer it is to the sources, the more."""
    return _scale(importance, _factor(graph, +strength, accumulation, backend), rounds, xp=backend.xp)


def bar(
    importance: Array, graph: Graph, /, *, rounds: int, accumulation: str, strength: float, backend: Backend
) -> Array:
    """Send every neighbor to minus infinity."""
    xp = backend.xp
    is_edge = xp.astype(graph.weights > 0, importance.dtype)
    reached = _accumulate(is_edge, graph, "sum", backend) > 0
    return xp.where(reached, xp.full_like(importance, -xp.inf), importance)


SIGNALS: dict[str, Callable[..., Array]] = {"decay": decay, "enhance": enhance, "evict": bar}


def _factor(graph: Graph, signed_strength: float, accumulation: str, backend: Backend) -> Array:
    """Compute F, by which one round multiplies each token, from the edges that reach it."""
    if accumulation == "sum":
        return 1 + signed_strength * _accumulate(graph.weights, graph, "sum", backend)
    factors = 1 + signed_strength * graph.weights
    smallest = backend.xp.full_like(factors, SMALLEST_FACTOR)
    return _accumulate(backend.xp.maximum(factors, smallest), graph, "product", backend)


def _accumulate(values: Array, graph: Graph, how: str, backend: Backend) -> Array:
    """Multiply or add the values (..., K, M) of all edges that reach each token: (..., N)."""
    xp = backend.xp
    edges = (*graph.sources.shape[:-1], graph.num_sources * graph.num_neighbors)
    reduce = primitives.segment_product if how == "product" else primitives.segment_sum
    return reduce(xp.reshape(values, edges), xp.reshape(graph.neighbors, edges), graph.num_tokens, backend=backend)


def _scale(importance: Array, factor: Array, rounds: int, /, *, xp: Namespace) -> Array:
    """Multiply by the factor `rounds` times, such that negative scores move in the direction of positive ones."""
    power = factor
    for _ in range(rounds - 1):
        power = power * factor
    score = xp.astype(importance, power.dtype)
    # 0 and infinity absorb every finite factor. Leave them unchanged: infinity times a factor that rounds to 0, and 0
    # times one that overflows, are NaN (and NumPy would warn). Tokens that no edge reaches too: a library may flush a
    # subnormal number to 0 when it multiplies.
    fixed = (score == 0) | xp.isinf(score) | (power == 1)
    number = xp.where(fixed, xp.ones_like(score), score)
    scaled = xp.where(number >= 0, number * power, number - xp.abs(number) * (1 - power))
    return xp.where(fixed, score, scaled)

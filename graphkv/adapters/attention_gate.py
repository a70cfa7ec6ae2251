"""Attention-Gate: a small trained attention block per layer says which tokens stay."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from typing import ClassVar

from ..core import checks, primitives
from ..core.attention import masked_softmax
from ..core.errors import ArgumentError
from ..core.layer import Cost, Layer, LayerShape, Memory
from ..core.policy import Assessment, Requirements
from ..core.selection import Choice, select_in_tiers, tiers_of
from ..core.types import Array, Namespace
from . import weights
from .protection import SinkPolicy

__all__ = ["AttentionGate", "Gate", "gate_logits"]

# Queries of a gate whose attention is held at once.
BLOCK = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class Gate:
    """The gate of one layer: for each KV head, an attention block of H heads of width A over F features per token.

    Attributes
    ----------
    query, key, value : array, shape (kv_heads, H, F, A), real
        The features of a token are its key before the rotary embedding, then its value: F = D + Dv.
    out : array, shape (kv_heads, H, A), real
        What makes a logit of what the H heads found.
    bias : array, shape (kv_heads,), real
    """

    query: Array
    key: Array
    value: Array
    out: Array
    bias: Array

    AXES: ClassVar = {
        "query": ("kv_heads", "H", "F", "A"),
        "key": ("kv_heads", "H", "F", "A"),
        "value": ("kv_heads", "H", "F", "A"),
        "out": ("kv_heads", "H", "A"),
        "bias": ("kv_heads",),
    }


def gate_logits(features: Array, gate: Gate, valid: Array, /, *, block_size: int = BLOCK, xp: Namespace) -> Array:
    r"""Compute the logits of a gate, which looks at all tokens to judge each.

    .. math:: g_t = b + \sum_h o_h \cdot \operatorname{softmax}_j\bigl(x_t Q_h (x_j K_h)^\top / \sqrt A\bigr)\, x_j V_h

    Parameters
    ----------
    features : array, shape (batch, kv_heads, N, F), float32 or wider
        N at least 1.
    gate : Gate
        Of arrays of the library, dtype and device of `features`.
    valid : array, shape (batch, kv_heads, N), bool
        False for what no token is to look at. Features that hold an infinity or NaN count as such.
    block_size : int
        Tokens that look at once. Affects rounding only.

    Returns
    -------
    array, shape (batch, kv_heads, N)

    Examples
    --------
    With queries of zero every token finds the mean of the values, here twice the mean of 1, 2 and 6:

    >>> import numpy as np
    >>> from graphkv.adapters.attention_gate import Gate, gate_logits
    >>> zero, one = np.zeros((1, 1, 1, 1)), np.ones((1, 1, 1, 1))
    >>> gate = Gate(query=zero, key=one, value=one, out=np.full((1, 1, 1), 2.0), bias=np.ones(1))
    >>> features = np.asarray([[[[1.0], [2.0], [6.0]]]])
    >>> gate_logits(features, gate, np.ones((1, 1, 3), dtype=bool), xp=np)
    array([[[7., 7., 7.]]])
    """
    features, is_finite = primitives.finite_rows(features, xp=xp)
    seen = (valid & is_finite)[:, :, None, None, :]
    queries, keys, values = (features[:, :, None, :, :] @ each for each in (gate.query, gate.key, gate.value))
    transposed, scale = xp.matrix_transpose(keys), sqrt(max(keys.shape[-1], 1))
    found = []
    num_tokens = features.shape[2]
    for start in range(0, num_tokens, block_size):
        logits = queries[:, :, :, start : min(start + block_size, num_tokens), :] @ transposed / scale
        found.append(masked_softmax(logits, xp.broadcast_to(seen, logits.shape), xp=xp) @ values)
    mixed = xp.concat(found, axis=-2)
    return xp.sum(mixed * gate.out[:, :, None, :], axis=(2, 4)) + gate.bias[:, None]


@dataclass(frozen=True, kw_only=True)
class AttentionGate(SinkPolicy):
    r"""Keep the tokens that a trained gate lets pass.

    Each KV head of each layer has a small attention block of its own, which reads the text as the head has it cached
    and gives every token a logit, see `gate_logits`. The importance is :math:`\sigma(g) \in (0, 1)`.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head, sinks included; a float is a share of the tokens.
    gates : sequence of Gate
        One per layer of the model. Of the library of the keys that they are used with, or as `load` reads them.
    threshold : float, optional
        In [0, 1): the paper's own rule. Only tokens of a higher importance, and sinks, stay, the best of them where
        they are more than the budget. Every head and row finds a number of its own, and a budget of 1.0, a share, is
        no bound. None: the budget is filled.
    num_sinks : int
        First tokens, padding not counted, that are kept before all others.

    Raises
    ------
    ArgumentError
        If an option is out of range or the shapes of the gates disagree; when evicting, if the gates are those of a
        model with other layers, KV heads or head sizes.
    ArgumentTypeError
        If an option has the wrong type.
    BackendError
        When evicting, if the gates are arrays of another library than the keys.

    Notes
    -----
    A gate needs training, for one model: ``docs/examples/train_learned.py`` does it, and no weights come with this
    library. There is no public code, and this is written from public notes of the paper. There, the gate of a layer
    reads the layer's input, all heads at once, and evicts once, after the prompt. A cache does not keep those inputs,
    which are more numbers than the keys and values that an eviction saves. Here the gate of a head reads the key before
    the rotary embedding and the value, two images of that input, which are at hand at every later eviction too.

    References
    ----------
    .. [1] Zeng et al., "In-context KV-Cache Eviction for LLMs via Attention-Gate", arXiv:2410.12876.

    Examples
    --------
    A gate that looks for the largest value: a token with a key of 1 looks at such tokens only, and finds a value of 8;
    all others find the mean of all, which is 2. From both the gate takes 2:

    >>> import numpy as np
    >>> from graphkv import AttentionGate, evict
    >>> from graphkv.adapters.attention_gate import Gate
    >>> query = np.asarray([[1.0], [0.0]])[None, None]  # features: key, value
    >>> value = np.asarray([[0.0], [1.0]])[None, None]
    >>> gate = Gate(query=query, key=9 * query, value=value, out=np.ones((1, 1, 1)), bias=np.asarray([-2.0]))
    >>> keys = np.asarray([[[[0.0], [1.0], [0.0], [0.0]]]])
    >>> values = np.asarray([[[[0.0], [8.0], [0.0], [0.0]]]])
    >>> policy = AttentionGate(budget=1, gates=[gate])
    >>> done = evict(policy, keys, values=values, unrotated_keys=keys)
    >>> done.kept, done.importance.round(3)  # sigmoid(6) and sigmoid(0)
    (array([[[1]]]), array([[[0.5  , 0.998, 0.5  , 0.5  ]]]))
    """

    requirements: ClassVar[Requirements] = Requirements(values=True, unrotated_keys=True, couples_heads=True)

    gates: Sequence[Gate] = field(repr=False)
    threshold: float | None = None

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        budget: int | float,
        threshold: float | None = None,
        num_sinks: int = 0,
    ) -> AttentionGate:
        """Make the policy of trained gates.

        Parameters
        ----------
        path : str or path-like
            A file in the safetensors format, of float32 arrays ``layers.0.query``, ``.key``, ``.value``, ``.out``,
            ``.bias``, then ``layers.1.query`` and so on; see `Gate`.
        budget, threshold, num_sinks
            As for the class.

        Returns
        -------
        AttentionGate
            For keys of any library.

        Raises
        ------
        ArgumentError
            If the file cannot be read, an array is missing, surplus or not float32, or shapes disagree.
        BackendUnavailableError
            If safetensors is not installed: ``pip install 'graphkv[learned]'``.
        """
        found = weights.load_layers(Path(path), "path", Gate)
        return cls(budget=budget, gates=found, threshold=threshold, num_sinks=num_sinks)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "gates", weights.check_layers("gates", self.gates, Gate))
        if self.threshold is not None and checks.fraction("threshold", self.threshold) == 1:
            raise ArgumentError("threshold must be below 1, which no importance exceeds; got 1.0")

    def needs(self) -> Requirements:
        """Return the needs; with a threshold, heads find their budgets."""
        finds = self.threshold is not None
        return replace(self.requirements, automatic=finds, head_counts=finds)

    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Return how likely the gate lets each token pass."""
        xp = layer.xp
        keys: Array = layer.unrotated_keys
        features = xp.concat([keys, layer.values], axis=-1)
        sizes = {"kv_heads": int(keys.shape[1]), "F": int(features.shape[-1])}
        gate = weights.of_layer(
            "gates", self.gates, layer.layer, layer.num_layers, sizes, like=keys, backend=layer.backend
        )
        logits = gate_logits(features, gate, layer.valid, xp=xp)
        # Of the negative magnitude, so that nothing overflows.
        small = xp.exp(-xp.abs(logits))
        return xp.where(logits >= 0, xp.ones_like(small), small) / (1 + small)

    def chooses(self) -> bool:
        """Return whether there is a threshold."""
        return self.threshold is not None

    def choose(self, found: Assessment, layer: Layer, budget: int, /) -> Choice:
        """Fill the budget, with a threshold by nothing below it."""
        if self.threshold is None:
            return super().choose(found, layer, budget)
        xp = layer.xp
        stays = found.importance > self.threshold
        if found.protected is not None:
            stays = stays | found.protected
        stays = stays & layer.valid
        counts = xp.sum(xp.astype(stays, xp.int64), axis=-1)
        counts = xp.minimum(counts, xp.full_like(counts, budget))
        tiers = tiers_of(found.scores, found.protected, stays, xp=xp)
        return Choice(kept=select_in_tiers(found.scores, counts, budget, tiers, backend=layer.backend), counts=counts)

    def cost(self, shape: LayerShape, /) -> Cost:
        """Return the cost of the gates: three projections, and attention of which a block is held at a time."""
        _, heads, features, width = (int(x) for x in self.gates[0].query.shape)
        rows = shape.batch * shape.kv_heads * heads * shape.num_tokens
        block = min(BLOCK, shape.num_tokens)
        held = shape.batch * shape.kv_heads * heads * block * shape.num_tokens
        return Cost(rows * (6 * features * width + shape.num_tokens * (4 * width + 5)), 4 * held)

"""LESS: what is evicted goes into a small state of constant size, which answers later queries in its place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import pi, sqrt
from pathlib import Path
from typing import ClassVar

from ..core import primitives
from ..core.answer import Answer
from ..core.backend import Backend, resolve
from ..core.errors import ArgumentError
from ..core.layer import Cost, Layer, LayerShape, Memory
from ..core.merging import Merge, slots
from ..core.policy import Policy, Requirements, Wrapper
from ..core.selection import Choice
from ..core.types import Array, Namespace
from . import weights

__all__ = ["LESS", "Kernel", "absorbed", "answer_of", "key_features", "query_features"]

# The state of a layer: sums of values, shape (batch, kv_heads, R, Dv), and of weights, shape (batch, kv_heads, R).
VALUES, WEIGHTS = "less_values", "less_weights"


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernel:
    """The feature maps of one layer, from D channels over W hidden ones to R features.

    Attributes
    ----------
    query_in : array, shape (query_heads, D, W), real
    query_out : array, shape (query_heads, W, R), real
    key_in : array, shape (kv_heads, D, W), real
    key_out : array, shape (kv_heads, W, R), real
    key_scale, mix_scale : array, shape (kv_heads, R), real
    mix : array, shape (kv_heads, R, R), real
    """

    query_in: Array
    query_out: Array
    key_in: Array
    key_out: Array
    key_scale: Array
    mix: Array
    mix_scale: Array

    AXES: ClassVar = {
        "query_in": ("query_heads", "D", "W"),
        "query_out": ("query_heads", "W", "R"),
        "key_in": ("kv_heads", "D", "W"),
        "key_out": ("kv_heads", "W", "R"),
        "key_scale": ("kv_heads", "R"),
        "mix": ("kv_heads", "R", "R"),
        "mix_scale": ("kv_heads", "R"),
    }


def query_features(queries: Array, kernel: Kernel, /, *, xp: Namespace) -> Array:
    r"""Compute the features of queries, :math:`\phi(q) = \lvert g(g(q W_1) W_2) \rvert` with g the tanh form of GELU.

    Parameters
    ----------
    queries : array, shape (batch, query_heads, Q, D), float32 or wider
    kernel : Kernel

    Returns
    -------
    array, shape (batch, query_heads, Q, R)
        At least 0.
    """
    return xp.abs(_gelu(_gelu(queries @ kernel.query_in, xp=xp) @ kernel.query_out, xp=xp))


def key_features(keys: Array, kernel: Kernel, /, *, xp: Namespace) -> Array:
    r"""Compute the features of keys.

    .. math:: \psi(k) = \lvert u + d_2 \odot (u M) \rvert, \qquad u = \lvert d \rvert \odot g(g(k W_1) W_2)

    Parameters
    ----------
    keys : array, shape (batch, kv_heads, N, D), float32 or wider
        As they are cached.
    kernel : Kernel

    Returns
    -------
    array, shape (batch, kv_heads, N, R)
        At least 0.
    """
    inner = _gelu(_gelu(keys @ kernel.key_in, xp=xp) @ kernel.key_out, xp=xp)
    inner = xp.abs(kernel.key_scale)[:, None, :] * inner
    return xp.abs(inner + kernel.mix_scale[:, None, :] * (inner @ kernel.mix))


def absorbed(
    values_sum: Array, weights_sum: Array, features: Array, values: Array, weight: Array, /, *, xp: Namespace
) -> tuple[Array, Array]:
    r"""Put tokens into the state: :math:`\psi(k)^\top v` is added to :math:`H`, and :math:`\psi(k)^\top` to :math:`z`.

    Parameters
    ----------
    values_sum, weights_sum : array, shapes (batch, kv_heads, R, Dv) and (batch, kv_heads, R)
        H and z.
    features : array, shape (batch, kv_heads, N, R)
    values : array, shape (batch, kv_heads, N, Dv)
    weight : array, shape (batch, kv_heads, N)
        How often each token counts: 0 for what does not go into the state.

    Returns
    -------
    tuple of array
        The new H and z.

    Examples
    --------
    >>> import numpy as np
    >>> from graphkv.adapters.less import absorbed
    >>> features, values = np.asarray([[[[1.0], [2.0], [5.0]]]]), np.asarray([[[[10.0], [20.0], [30.0]]]])
    >>> absorbed(np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1)), features, values, np.asarray([[[1.0, 1.0, 0.0]]]), xp=np)
    (array([[[[50.]]]]), array([[[3.]]]))
    """
    goes = (weight > 0)[..., None]
    # What stays is not read: an infinity times 0 would be none.
    features = xp.where(goes, features * weight[..., None], xp.zeros_like(features))
    values = xp.where(goes, values, xp.zeros_like(values))
    return values_sum + xp.matrix_transpose(features) @ values, weights_sum + xp.sum(features, axis=-2)


def answer_of(features: Array, values_sum: Array, weights_sum: Array, /, *, xp: Namespace) -> Answer:
    r"""Compute what a state answers, one slot per feature.

    Its logit is :math:`\log(\phi_r z_r)` and its value :math:`H_r / z_r`. Attention to these beside the kept tokens is
    LESS's, a weighted mean of both computed in log space.

    Parameters
    ----------
    features : array, shape (batch, query_heads, Q, R)
        Of the queries.
    values_sum, weights_sum : array, shapes (batch, kv_heads, R, Dv) and (batch, kv_heads, R)
        H and z.

    Returns
    -------
    Answer
    """
    (batch, query_heads, number, size), kv_heads = features.shape, weights_sum.shape[1]
    grouped = xp.reshape(features, (batch, kv_heads, query_heads // kv_heads, number, size))
    weight = xp.reshape(grouped * weights_sum[:, :, None, None, :], features.shape)
    is_known, has_weight = weights_sum > 0, weight > 0
    logits = xp.log(xp.where(has_weight, weight, xp.ones_like(weight)))
    divisor = xp.where(is_known, weights_sum, xp.ones_like(weights_sum))
    return Answer(
        logits=xp.where(has_weight, logits, xp.full_like(logits, -xp.inf)), values=values_sum / divisor[..., None]
    )


@dataclass(frozen=True)
class LESS(Wrapper):
    r"""Any policy; what it drops goes into a state of constant size, which answers later queries in its place.

    Each KV head has R features, which a trained kernel makes of queries and keys. What goes adds to two sums, and
    attention is over the kept tokens and the state together:

    .. math:: o = \frac{\phi(q) H + \sum_j e^{q k_j / \sqrt D} v_j}{\phi(q) z + \sum_j e^{q k_j / \sqrt D}}, \qquad
              H = \sum_{\text{gone}} \psi(k)^\top v, \quad z = \sum_{\text{gone}} \psi(k)^\top

    Parameters
    ----------
    base : Policy
        Says what stays.
    kernels : sequence of Kernel
        One per layer of the model. Of the library of the keys that they are used with, or as `load` reads them.

    Raises
    ------
    ArgumentError
        If the shapes of the kernels disagree; when evicting, if they are those of a model with other layers, heads or
        head sizes.
    ArgumentTypeError
        If an option has the wrong type.
    BackendError
        When evicting, if the kernels are arrays of another library than the keys.

    Notes
    -----
    The state is R more slots per KV head in size, whatever was dropped, and the budget is that of the base. Attention
    has to ask for it: `graphkv.integrations.transformers` does, with any attention kernel; other integrations refuse.
    `Eviction.state` carries it from call to call.

    Kernels need training, for one model and one base: ``docs/examples/train_learned.py`` does it, and none come with
    this library. The public code trains one per query head of a model without grouped heads, with 8 features and 512
    hidden channels. With grouped query heads, the keys' features are per KV head here and the queries' per query head.
    GELU is the tanh form, because the array standard has no error function.

    References
    ----------
    .. [1] Dong et al., "Get More with LESS: Synthesizing Recurrence with KV Cache Compression for Efficient LLM
       Inference", arXiv:2402.09398.

    Examples
    --------
    One feature, which is GELU(GELU(1)) = 0.67 for every key and query. Two tokens go, so z is twice that and H / z
    their mean, which counts as 2 * 0.67 * 0.67 = 0.91 tokens with a logit of 0:

    >>> import numpy as np
    >>> from graphkv import LESS, StreamingLLM, evict
    >>> from graphkv.adapters.less import Kernel
    >>> one, zero = np.ones((1, 1, 1)), np.zeros((1, 1))
    >>> maps = {name: one for name in ("query_in", "query_out", "key_in", "key_out", "mix")}
    >>> kernel = Kernel(**maps, key_scale=zero + 1, mix_scale=zero)
    >>> values = np.asarray([[[[2.0], [4.0], [6.0]]]])
    >>> policy = LESS(StreamingLLM(budget=1, num_sinks=0), kernels=[kernel])
    >>> done = evict(policy, np.ones((1, 1, 3, 1)), values=values)
    >>> done.kept, done.state.layer["less_weights"].round(2)
    (array([[[2]]]), array([[[1.35]]]))
    >>> answer = policy.answer(np.ones((1, 1, 1, 1)), done.state, layer=0, num_layers=1)
    >>> np.exp(answer.logits).round(2), answer.values
    (array([[[[0.91]]]]), array([[[[3.]]]]))
    """

    requirements: ClassVar[Requirements] = Requirements(
        values=True, state=(VALUES, WEIGHTS), couples_heads=True, answers=True
    )

    kernels: Sequence[Kernel] = field(repr=False)

    @classmethod
    def load(cls, base: Policy, /, path: str | os.PathLike[str]) -> LESS:
        """Make the policy of trained kernels.

        Parameters
        ----------
        base : Policy
        path : str or path-like
            A file in the safetensors format, of float32 arrays ``layers.0.query_in`` and so on; see `Kernel`.

        Returns
        -------
        LESS
            For keys of any library.

        Raises
        ------
        ArgumentError
            If the file cannot be read, an array is missing, surplus or not float32, or shapes disagree.
        BackendUnavailableError
            If safetensors is not installed: ``pip install 'graphkv[learned]'``.
        """
        return cls(base, weights.load_layers(Path(path), "path", Kernel))

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "kernels", weights.check_layers("kernels", self.kernels, Kernel))

    def observe(self, layer: Layer, memory: Memory | None, /) -> Memory:
        """Keep the state beside what the base remembers; at first there is nothing in it."""
        if layer.values is None:
            # Also where everything fits and nothing is scored, because the sizes of the state are those of the values.
            raise ArgumentError("values must be given for LESS; got None")
        found = self.base.observe(layer, memory) or Memory()
        return Memory(tokens=found.tokens, layer={**found.layer, **self._state(layer, memory)})

    def remains(
        self, choice: Choice, merge: Merge | None, layer: Layer, memory: Memory | None, /
    ) -> Mapping[str, Array]:
        """Put into the state what is neither kept nor merged."""
        xp, state = layer.xp, self._state(layer, memory)
        sizes = {"kv_heads": int(layer.keys.shape[1]), "D": int(layer.keys.shape[-1])}
        kernel = weights.of_layer(
            "kernels", self.kernels, layer.layer, layer.num_layers, sizes, like=layer.keys, backend=layer.backend
        )
        own = slots(choice.kept, layer.num_tokens, backend=layer.backend) if merge is None else merge.into
        goes = layer.valid & (own < 0)
        weight = xp.ones_like(layer.keys[..., 0]) if layer.mass is None else xp.astype(layer.mass, layer.keys.dtype)
        values_sum, weights_sum = absorbed(
            state[VALUES],
            state[WEIGHTS],
            key_features(layer.keys, kernel, xp=xp),
            xp.astype(layer.values, layer.keys.dtype),
            xp.where(goes, weight, xp.zeros_like(weight)),
            xp=xp,
        )
        below = self.base.remains(choice, merge, layer, memory)
        return {**below, VALUES: values_sum, WEIGHTS: weights_sum}

    def answer(
        self,
        queries: Array,
        memory: Memory,
        /,
        *,
        layer: int,
        num_layers: int,
        backend: Backend | str | None = None,
    ) -> Answer:
        """Return what the state answers."""
        backend = resolve(backend, queries=queries, **memory.layer)
        queries = primitives.widen(queries, xp=backend.xp)
        sums = {name: backend.xp.astype(memory.layer[name], queries.dtype) for name in (VALUES, WEIGHTS)}
        sizes = {
            "query_heads": int(queries.shape[1]),
            "kv_heads": int(sums[WEIGHTS].shape[1]),
            "D": int(queries.shape[-1]),
        }
        kernel = weights.of_layer("kernels", self.kernels, layer, num_layers, sizes, like=queries, backend=backend)
        features = query_features(queries, kernel, xp=backend.xp)
        return answer_of(features, sums[VALUES], sums[WEIGHTS], xp=backend.xp)

    def cost(self, shape: LayerShape, /) -> Cost:
        """Return the cost of the base, and of the features of the keys."""
        _, size, width = (int(x) for x in self.kernels[0].key_in.shape)
        number = int(self.kernels[0].key_scale.shape[1])
        tokens = shape.batch * shape.kv_heads * shape.num_tokens
        return self.base.cost(shape).then(Cost(tokens * 2 * width * (size + number), 4 * tokens * width))

    def _state(self, layer: Layer, memory: Memory | None, /) -> dict[str, Array]:
        """Return the state, empty where nothing has gone yet."""
        if memory is not None and VALUES in memory.layer:
            return {name: memory.layer[name] for name in (VALUES, WEIGHTS)}
        (batch, kv_heads, _), number = layer.valid.shape, int(self.kernels[0].key_scale.shape[1])
        values: Array = layer.values
        kind = {"dtype": layer.keys.dtype, "device": primitives.device_of(layer.keys)}
        size = int(values.shape[-1])
        shapes = {VALUES: (batch, kv_heads, number, size), WEIGHTS: (batch, kv_heads, number)}
        return {name: layer.xp.zeros(shape, **kind) for name, shape in shapes.items()}


def _gelu(x: Array, /, *, xp: Namespace) -> Array:
    """Compute GELU in its tanh form."""
    return 0.5 * x * (1 + xp.tanh(sqrt(2 / pi) * (x + 0.044715 * x * x * x)))

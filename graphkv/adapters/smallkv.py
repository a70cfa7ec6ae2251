"""SmallKV: a smaller model of the same family reads all, and says what the larger one keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..core import checks, primitives
from ..core.backend import Backend, resolve
from ..core.errors import ArgumentError, ArgumentTypeError
from ..core.layer import Layer, Memory
from ..core.policy import Policy
from ..core.protection import Protection
from ..core.types import Array

__all__ = ["SmallKV", "match_heads"]


def match_heads(
    large: Array,
    small: Array,
    /,
    *,
    num_tokens: int,
    valid: Array | None = None,
    backend: Backend | str | None = None,
) -> Array:
    r"""Find, for each head of a large model, the head of a small one that looks at the same tokens.

    .. math:: f(i) = \operatorname{argmax}_j \operatorname{Jaccard}
              \bigl(\operatorname{top}_k F(A_i), \operatorname{top}_k F(A'_j)\bigr)

    with :math:`F(A)` the attention that each token of a text receives in all, the columns of a causal attention summed.
    The paper matches once, on 100 to 200 tokens.

    Parameters
    ----------
    large : array, shape (batch, heads, N)
        Attention received in the large model. Heads of several layers go below each other.
    small : array, shape (batch, other heads, N)
        That of the small model, for the same texts.
    num_tokens : int
        k, the tokens compared: at least 1.
    valid : array, shape (batch, N), bool, optional
        False for padding, which is no token. Default: all True.
    backend : Backend or str, optional
        Default: inferred from the arrays.

    Returns
    -------
    array, shape (heads,), int64
        Index of a head of the small model: the highest mean over the batch, of equals the lowest index.

    Raises
    ------
    ArgumentError
        If shapes disagree, `num_tokens` is out of range or the small model has no heads.
    ArgumentTypeError
        If an array is not real, `valid` not bool or `num_tokens` no integer.
    BackendError
        If the arrays are not all of the backend's library and on one device.

    References
    ----------
    .. [1] Zhao et al., "SmallKV: Small Model Assisted Compensation of KV Cache Compression for Efficient LLM
       Inference", arXiv:2508.02751.

    Examples
    --------
    The first head looks at tokens 0 and 1, like head 1 of the small model; the second at 2 and 3, like its head 0:

    >>> import numpy as np
    >>> from graphkv.adapters.smallkv import match_heads
    >>> large = np.asarray([[[4.0, 3.0, 1.0, 0.0], [0.0, 1.0, 2.0, 2.0]]])
    >>> small = np.asarray([[[1.0, 0.0, 3.0, 4.0], [9.0, 8.0, 0.0, 0.0]]])
    >>> match_heads(large, small, num_tokens=2)
    array([1, 0])
    """
    backend = resolve(backend, large=large, small=small, valid=valid)
    xp, axes = backend.xp, "(batch, heads, N)"
    batch, heads, number = checks.numeric("large", large, axes, ndim=3, backend=backend)
    shape = checks.numeric("small", small, axes, ndim=3, backend=backend)
    checks.same_leading("small", (shape[0], shape[2]), (batch, number), "batch and N of large")
    if not shape[1] or not number:
        raise ArgumentError(f"small must have a head and a token; got shape {shape}")
    k = min(checks.count("num_tokens", num_tokens, minimum=1), number)
    if valid is None:
        valid = xp.ones((batch, number), dtype=xp.bool, device=primitives.device_of(large))
    checks.mask("valid", valid, (batch, number), "(batch, N)", backend=backend)

    def best(scores: Array, rows: int) -> Array:
        real = xp.broadcast_to(valid[:, None, :], (batch, rows, number))
        order = primitives.top_k(primitives.widen(scores, xp=xp), number, ~real, backend=backend)
        return xp.astype((xp.argsort(order, axis=-1) < k) & real, xp.float32)

    ours, theirs = best(large, heads), best(small, shape[1])
    both = ours @ xp.matrix_transpose(theirs)
    # Both hold the same number of tokens, so one of them tells how many there are in all.
    either = 2 * xp.sum(ours, axis=-1)[:, :, None] - both
    mean = xp.sum(both / xp.where(either > 0, either, xp.ones_like(either)), axis=0) / max(batch, 1)
    # Not argmax, which leaves ties to the library.
    return primitives.top_k(mean, 1, backend=backend)[:, 0]


@dataclass(frozen=True, kw_only=True)
class SmallKV(Policy):
    """Keep the newest tokens, and those that the matching heads of a smaller model attend to.

    `graphkv.integrations.transformers.SmallerModel` makes this policy for a prompt.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head, recents included; a float is a share of the tokens.
    importance : sequence of array, shape (batch, kv_heads, N), or None
        One for each layer of the large model: what every token has received in the small one. None for a layer that is
        never evicted.
    num_recent : int, optional
        Newest tokens that are kept before all others. Default: a third of the budget, the paper's 2 : 1.

    Raises
    ------
    ArgumentError
        If an option is out of range; when evicting, if there is no importance for the layer, or its shape is not that
        of the tokens.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    The paper keeps a third kind, marginal tokens of which only the values stay, read with the small model's attention:
    that needs an attention of its own and is not expressed, so critical and recent tokens share the budget. It lets the
    small model go on reading while the large one writes; here the scores are those of the prompt, so this policy evicts
    after the prompt only. Two values of this policy are equal if their arrays are the same objects.

    References
    ----------
    .. [1] Zhao et al., "SmallKV: Small Model Assisted Compensation of KV Cache Compression for Efficient LLM
       Inference", arXiv:2508.02751.

    Examples
    --------
    A third of the budget of 3 is recent, the rest goes by the scores of the layer:

    >>> import numpy as np
    >>> from graphkv import SmallKV, evict
    >>> scores = [np.asarray([[[3.0, 1.0, 2.0, 0.0]]]), np.asarray([[[0.0, 1.0, 2.0, 0.0]]])]
    >>> keys = np.ones((1, 1, 4, 2))
    >>> evict(SmallKV(budget=3, importance=scores), keys, layer=1, num_layers=2).kept
    array([[[1, 2, 3]]])
    """

    importance: Sequence[Array | None] = field(repr=False)
    num_recent: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.importance, Sequence):
            raise ArgumentTypeError(
                f"importance must be a sequence with one array per layer; got {type(self.importance).__name__}"
            )
        object.__setattr__(self, "importance", tuple(self.importance))
        if self.num_recent is not None:
            checks.count("num_recent", self.num_recent)

    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Return the scores of the layer."""
        if len(self.importance) != layer.num_layers:
            raise ArgumentError(
                f"importance must have one array for each of {layer.num_layers} layers; got {len(self.importance)}"
            )
        found = self.importance[layer.layer]
        if found is None:
            raise ArgumentError(f"importance must be given for layer {layer.layer}; got None")
        resolve(layer.backend, keys=layer.keys, importance=found)
        checks.same_leading("importance", tuple(found.shape), tuple(layer.valid.shape), "keys")
        return found

    def protection(self, budget: int, /) -> Protection:
        """Protect the newest tokens."""
        return Protection(last=budget // 3 if self.num_recent is None else self.num_recent)

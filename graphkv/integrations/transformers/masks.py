"""Masks for a cache whose layers store different tokens.

transformers makes one mask for all layers, over all tokens that the cache has seen. Each layer stores some of them, so
it takes the columns of those. A mask over all tokens is large, and most layers only need the rule that it follows:
so what travels to the layers is a tensor that knows its rule and is written out only if somebody looks into it.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, ClassVar

import torch
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from ...core.errors import ArgumentError
from . import versions
from .handout import Handout

__all__ = ["Mask", "columns", "layer_mask", "mask_maker", "new_tokens_shown"]


class Mask(torch.Tensor):
    """A mask of shape (batch, 1, Q, tokens) that knows its rule; used as a tensor, it is what transformers makes of it.

    An `EvictingCache` asks for masks over all tokens seen, as if it had dropped nothing.
    """

    _make: Callable[..., Any]
    arguments: dict[str, Any]
    padding: torch.Tensor | None
    _written: torch.Tensor | None
    # Whether anybody has had the written mask in hand, and so may have changed it in place.
    was_used: bool

    # The results of operations are plain tensors.
    __torch_function__: ClassVar[Any] = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls, make: Callable[..., Any], arguments: dict[str, Any], dtype: torch.dtype, written: torch.Tensor | None
    ) -> Mask:
        """Wrap the arguments of a mask function; `written` is its result where it is known already."""
        queries = versions.number_of_queries(arguments)
        shape = (int(arguments["batch_size"]), 1, queries, int(arguments["kv_length"]))
        device = arguments["device"] if "device" in arguments else arguments["cache_position"].device
        made: Any = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made._make, made.arguments, made._written, made.was_used = make, arguments, written, False
        # The caller's mask of shape (batch, tokens), where it hides anything.
        shown = arguments.get("attention_mask")
        made.padding = None if shown is None or bool(shown.all()) else shown.bool()
        return made  # type: ignore[no-any-return]

    @property
    def written(self) -> torch.Tensor:
        """The mask as transformers makes it."""
        if self._written is None:
            self._written = self._make(**self.arguments)
        return self._written

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Mask({self.written!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Write the mask out for whatever is done with it."""
        args, kwargs = torch.utils._pytree.tree_map_only(cls, cls._in_use, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _in_use(self) -> torch.Tensor:
        self.was_used = True
        return self.written

    # What PyTorch refuses for subclasses.
    def numpy(self, *, force: bool = False) -> Any:
        """Return the written mask as an array."""
        return self._in_use().numpy(force=force)

    def tolist(self) -> Any:
        """Return the written mask in lists."""
        return self.written.tolist()

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        """Copy the written mask; a copy has no rule."""
        return deepcopy(self.written, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the written mask."""
        return self.written.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def mask_maker(implementation: str) -> Callable[..., Any]:
    """Return the mask function for one attention implementation, see AttentionMaskInterface."""
    make = AttentionMaskInterface()[implementation]

    def make_mask(**arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return make(**arguments)
        queries, keys = versions.number_of_queries(arguments), arguments["kv_length"]
        written = None
        # Only these may need no mask at all, and they are no larger than for any cache.
        if queries in (1, keys) or arguments.get("allow_is_bidirectional_skip"):
            written = make(**arguments)
            if written is None:
                return None
        # Static caches count on in place, and the mask may be written out later.
        arguments = {name: each.clone() if isinstance(each, torch.Tensor) else each for name, each in arguments.items()}
        return Mask(make, arguments, torch.bool if implementation == "sdpa" else arguments["dtype"], written)

    return make_mask


def layer_mask(mask: Any, handout: Handout, query: torch.Tensor, *, is_causal: bool, as_numbers: bool) -> Any:
    """Compute the mask of one layer from that of all tokens.

    Parameters
    ----------
    mask : torch.Tensor or None
        As it comes to the attention, over all tokens seen.
    handout : Handout
        What the layer stores.
    query : torch.Tensor, shape (batch, query_heads, Q, D)
    is_causal : bool
        What the absence of a mask means: the past and oneself, or everything.
    as_numbers : bool
        Whether the attention adds the mask, so that it is needed in numbers and cannot be left out.

    Returns
    -------
    torch.Tensor or None
        Of shape (batch or 1, query_heads or 1, Q, stored); exactly `mask` where nothing was dropped. In numbers where
        slots count as several tokens: the logarithms of their masses are in it.
    """
    if handout.mass is not None:
        visible = _visible(mask, handout, query, is_causal=is_causal, as_numbers=True)
        return _with_mass(visible, handout.mass, query)
    return _visible(mask, handout, query, is_causal=is_causal, as_numbers=as_numbers)


def _visible(mask: Any, handout: Handout, query: torch.Tensor, *, is_causal: bool, as_numbers: bool) -> Any:
    """Compute which stored tokens each query sees, see `layer_mask`."""
    padding = mask.padding if isinstance(mask, Mask) else None
    if handout.is_whole and (padding is None or padding.shape[1] == handout.num_seen):
        return mask.written if isinstance(mask, Mask) else mask
    if isinstance(mask, Mask) and not mask.arguments.get("use_vmap"):
        rule = mask.arguments["mask_function"]
    elif mask is not None:
        return _shown_columns(mask.written if isinstance(mask, Mask) else mask, handout, query)
    else:
        rule = causal_mask_function if is_causal else _see_everything
    visible = _by_rule(rule, handout, query, as_numbers=as_numbers)
    return _lowered(visible, query.dtype) if as_numbers and visible is not None else visible


def _with_mass(mask: torch.Tensor | None, mass: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Add the logarithm of what each slot counts as: exp(q k) then counts once for every token in it."""
    groups, lowest = query.shape[1] // mass.shape[1], torch.finfo(query.dtype).min
    # In the queries' precision, as attention kernels ask for.
    bias = mass.log().to(query.dtype).repeat_interleave(groups, dim=1)[:, :, None, :]
    if mask is None:
        return bias.expand(-1, -1, query.shape[2], -1)
    return torch.where(mask, bias, lowest) if mask.dtype == torch.bool else mask + bias


def _see_everything(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return (query >= 0) | (key >= 0)


def _by_rule(rule: Callable[..., Any], handout: Handout, query: torch.Tensor, *, as_numbers: bool) -> Any:
    """Ask the rule for the stored tokens only; bool, or None where attention needs no mask."""
    num_new, device, valid = query.shape[2], query.device, handout.valid
    first, first_key = handout.num_seen - num_new, handout.num_seen - handout.num_stored
    is_plain = valid is None and rule is causal_mask_function
    if is_plain and (num_new == 1 or (num_new == handout.num_stored and not as_numbers)):
        return None
    query_at = torch.arange(first, first + num_new, device=device)[None, None, :, None]
    if handout.positions is None or is_plain:
        # New tokens come last and see all that is stored before them, wherever it was.
        key_at = torch.arange(first_key, handout.num_seen, device=device)[None, None, None, :]
    else:
        key_at = handout.positions[:, :, None, :]
    row = torch.arange(query.shape[0], device=device)[:, None, None, None]
    visible = rule(row, torch.zeros_like(row), query_at, key_at)
    if valid is not None:
        # A padded query sees nothing; let it see itself, so that softmax has something to share out.
        visible = (visible & valid[:, :, None, :]) | (key_at == query_at)
    if visible.shape[1] > 1:
        visible = visible.repeat_interleave(query.shape[1] // visible.shape[1], dim=1)
    return visible


def columns(rows: torch.Tensor, handout: Handout, query: torch.Tensor) -> torch.Tensor:
    """Take the columns of the stored tokens.

    Parameters
    ----------
    rows : torch.Tensor, shape (batch or 1, query_heads or 1, Q, seen)
        Something about every query and every token seen.
    handout : Handout
    query : torch.Tensor, shape (batch, query_heads, Q, D)

    Returns
    -------
    torch.Tensor, shape (batch or 1, query_heads or 1, Q, stored)
    """
    if handout.positions is None:
        return rows[..., handout.num_seen - handout.num_stored :]
    where = handout.positions.clamp(min=0)
    kv_heads = where.shape[1]
    rows = rows.expand(where.shape[0], -1, -1, -1)
    # (batch, kv_heads, query heads of each or 1, Q, seen)
    rows = rows.reshape(len(rows), kv_heads if rows.shape[1] > 1 else 1, -1, *rows.shape[2:])
    rows = rows.expand(-1, kv_heads, -1, -1, -1)
    taken = rows.gather(-1, where[:, :, None, None, :].expand(*rows.shape[:-1], -1))
    return taken.expand(-1, -1, query.shape[1] // kv_heads, -1, -1).flatten(1, 2)


def _shown_columns(mask: torch.Tensor, handout: Handout, query: torch.Tensor) -> torch.Tensor:
    """Take the columns of the stored tokens from a mask that the model or the caller wrote."""
    if mask.ndim != 4 or mask.shape[-1] != handout.num_seen:
        raise ArgumentError(
            "attention_mask, the caller's or one that the model makes itself, must have four axes and a column for "
            f"each of the {handout.num_seen} tokens seen once some were evicted; got one of shape {tuple(mask.shape)}"
        )
    taken = columns(mask, handout, query)
    if handout.valid is None:
        return taken
    shown = handout.valid.repeat_interleave(query.shape[1] // handout.valid.shape[1], dim=1)[:, :, None, :]
    return taken & shown if mask.dtype == torch.bool else taken.masked_fill(~shown, torch.finfo(mask.dtype).min)


def _lowered(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn a bool mask into numbers that are added to the logits."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def new_tokens_shown(mask: Any, num_new: int) -> torch.Tensor | None:
    """Find which new tokens (batch, num_new) are not padding, in a mask that somebody else wrote; None if all are.

    A token that no query may see, not even itself, is padding.
    """
    if mask is None or isinstance(mask, Mask) or mask.ndim != 4 or mask.shape[-1] < num_new:
        return None
    new = mask[..., -num_new:]
    visible = new if new.dtype == torch.bool else new > torch.finfo(new.dtype).min / 2
    shown: torch.Tensor = visible.any(dim=-2).any(dim=1)
    return None if bool(shown.all()) else shown

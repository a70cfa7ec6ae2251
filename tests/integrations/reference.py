"""A slow reference for any model: no cache, and attention spelled out over the positions that are left.

The whole text goes through the model in one forward call. In every layer, `SlowReference` replays the calls in which a
cache would have read it: what was stored before each call, what was evicted after it. Each query then attends, in
float64 and head by head, to exactly the positions that were left for it; where an eviction merges, to what their slots
held then, each as often as its mass says.
"""

from contextlib import contextmanager

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from graphkv import LayerBudgets, Memory, evict, wants

NAME = "slow_reference"


class Merged:
    """What the slots of one head hold in place of their own tokens: keys, values and masses by position."""

    def __init__(self):
        self.keys, self.values, self.masses = {}, {}, {}

    @classmethod
    def of(cls, merge, head, positions, keys, values):
        """Sum slot by slot what goes into the slots of a head, which stand at these positions."""
        made, into = cls(), merge.into[0, head].tolist()
        for slot, position in enumerate(positions):
            mine = [token for token, where in enumerate(into) if where == slot]
            key_weights, value_weights = (x[0, head].tolist() for x in (merge.key_weights, merge.value_weights))
            made.keys[position] = sum(key_weights[token] * keys[token] for token in mine)
            made.values[position] = sum(value_weights[token] * values[token] for token in mine)
            made.masses[position] = float(merge.mass[0, head, slot])
        return made

    def over(self, key, value):
        """Return keys, values and masses of all positions, those of the slots over a head's own."""
        key, value, mass = key.clone(), value.clone(), torch.ones(len(key), dtype=torch.float64)
        for where, mine in ((key, self.keys), (value, self.values), (mass, self.masses)):
            for position, held in mine.items():
                where[position] = held
        return key, value, mass


class SlowReference:
    """Attention over what `policy` leaves, for one row of tokens read in calls of the given lengths."""

    def __init__(self, policy, calls, *, every=None, num_pads=0, turned_keys=None):
        self.policy, self.calls, self.every, self.num_pads = policy, list(calls), every, num_pads
        # What gives the keys of a layer at other positions, for keys that are turned when they are kept.
        self.turned_keys = turned_keys
        self.kept = {}
        # Per layer: per head, the mass by position after the last call.
        self.masses = {}
        self.layer_budgets = None
        self.wants = {}

    def __call__(self, module, query, key, value, attention_mask=None, scaling=None, sliding_window=None, **kwargs):
        config, layer = module.config, module.layer_idx
        query, key, value = query[0].double(), key[0].double(), value[0].double()
        heads, count, size = query.shape
        groups = heads // key.shape[0]
        scaling = size**-0.5 if scaling is None else scaling
        is_mixed = len(set(getattr(config, "layer_types", None) or [])) > 1
        evicts = not (is_mixed and sliding_window is not None)
        policy = self._policy_of(layer, query * scaling * size**0.5, key, value, config) if evicts else None
        before, places, held = self._replay(
            policy, layer, config.num_hidden_layers, query * scaling * size**0.5, key, value, sliding_window
        )
        left = self._left(before, count, sliding_window)
        out = torch.zeros(heads, count, value.shape[-1], dtype=torch.float64)
        for head in range(heads):
            mine, start = head // groups, 0
            turned = self._turned_logits if self.turned_keys is not None else None
            if turned is not None:
                logits = turned(query[head], layer, mine, before, places) * scaling
            # What the slots hold changes from call to call.
            for slots, length in zip(held, self.calls, strict=True):
                keys, values, mass = slots[mine].over(key[mine], value[mine])
                now = slice(start, start + length)
                if turned is None:
                    seen = query[head, now] @ keys.T * scaling
                else:
                    assert not slots[mine].masses
                    seen = logits[now]
                seen = (seen + mass.log()).masked_fill(~left[mine, now], -torch.inf)
                out[head, now] = seen.softmax(-1) @ values
                start += length
        return out.transpose(0, 1)[None].to(kwargs.get("dtype", torch.float32)), None

    def _left(self, before, count, sliding_window):
        """Return which positions are left for which query, bool (kv_heads, queries, positions)."""
        kv_heads = len(before[0])
        left = torch.zeros(kv_heads, count, count, dtype=torch.bool)
        start = 0
        for stored, length in zip(before, self.calls, strict=True):
            for at in range(start, start + length):
                for head in range(kv_heads):
                    left[head, at, [p for p in stored[head] if p >= self.num_pads]] = True
                    left[head, at, max(start, self.num_pads) : at + 1] = True
                if sliding_window is not None:
                    left[:, at, : max(0, at - sliding_window + 1)] = False
                # A padded query has nothing to see; its result is of no consequence.
                left[:, at, at] = True
            start += length
        return left

    def _turned_logits(self, query, layer, head, before, places):
        """Compare queries with keys that stand where each call found them."""
        rows, start = [], 0
        for stored, stands, length in zip(before, places, self.calls, strict=True):
            at = torch.arange(len(query))
            at[stored[head]] = torch.tensor(stands[head], dtype=torch.int64)
            keys = self.turned_keys(layer, head, list(range(len(query))), at.tolist())
            rows.append(query[start : start + length] @ keys.T)
            start += length
        return torch.cat(rows)

    def _policy_of(self, layer, query, key, value, config):
        """Return the policy; where budgets depend on all layers, read the preferences of a first run."""
        if not self.policy.needs().wants:
            return self.policy
        first = self.calls[0]
        self.wants[layer] = float(
            wants(
                self.policy,
                key[None, :, :first].float().numpy(),
                queries=query[None, :, :first].float().numpy(),
                valid=self._valid(key.shape[0], list(range(first))),
            )[0]
        )
        if self.layer_budgets is None:
            return LayerBudgets(self.policy, (first,) * config.num_hidden_layers)
        return LayerBudgets(self.policy, self.layer_budgets)

    def settle_budgets(self):
        """After a first run over the prompt alone, fix the layers' budgets."""
        wants = [self.wants[layer] for layer in sorted(self.wants)]
        self.layer_budgets = tuple(self.policy.share_out(wants, self.calls[0]))

    def _valid(self, kv_heads, positions):
        rows = [positions] * kv_heads if not positions or isinstance(positions[0], int) else positions
        return (torch.tensor(rows) >= self.num_pads)[None].numpy()

    def _replay(self, policy, layer, num_layers, query, key, value, sliding_window):
        """Return what is left before each call: lists of positions, one per head, where keys stand, what slots hold."""
        kv_heads = key.shape[0]
        merged, held = [Merged() for _ in range(kv_heads)], []
        stored = [[] for _ in range(kv_heads)]
        stands = [[] for _ in range(kv_heads)]
        before, places, state = [], [], None
        seen = since = carried = number = 0
        evicted = False
        for length in self.calls:
            before.append([list(row) for row in stored])
            places.append([list(row) for row in stands])
            held.append(list(merged))
            new = list(range(seen, seen + length))
            stored = [row + new for row in stored]
            stands = [row + new for row in stands]
            seen, since = seen + length, since + length
            if policy is None or (evicted and (self.every is None or since < self.every)):
                continue
            width = max(map(len, stored))
            index = torch.tensor([[-1] * (width - len(row)) + row for row in stored])
            valid = index >= self.num_pads
            if sliding_window is not None:
                valid &= index > seen - sliding_window
            rows = torch.arange(kv_heads)[:, None]
            where = index.clamp(min=0)
            # Queries reach back across an eviction as far as tokens are kept for sure.
            wanted = min(policy.num_queries(width), carried + since, width)
            over = [each.over(key[head], value[head]) for head, each in enumerate(merged)]
            keys, values, mass = (torch.stack([each[part] for each in over])[rows, where] for part in range(3))
            has_mass = any(each.masses for each in merged)
            if self.turned_keys is not None:
                keys = torch.zeros_like(keys)
                for head, row in enumerate(stored):
                    keys[head, width - len(row) :] = self.turned_keys(layer, head, row, stands[head])
            decision = evict(
                policy.with_base(lambda base, number=number: base.renewed(number)),
                keys[None].float().numpy(),
                values=values[None].float().numpy(),
                mass=mass[None].float().numpy() if has_mass else None,
                queries=query[None, :, seen - wanted : seen].float().numpy() if wanted else None,
                layer=layer,
                num_layers=num_layers,
                valid=valid[None].numpy(),
                state=state,
                tokens_seen=seen,
            )
            evicted, since, number = True, 0, number + 1
            protection = policy.protection(decision.budget)
            sums_up = policy.needs().state and policy.needs().queries != "window"
            carried = protection.newest if protection.room <= decision.budget and not sums_up else 0
            kept = [[i for i in row if i >= 0] for row in decision.kept[0].tolist()]
            state = _at_the_end(decision.state, kept)
            if decision.merge is not None:
                merged = [
                    Merged.of(decision.merge, head, index[head, row].tolist(), keys[head], values[head])
                    for head, row in enumerate(kept)
                ]
            if any(len(row) < width for row in kept):
                stored = [[int(index[h, i]) for i in row] for h, row in enumerate(kept)]
                if self.turned_keys is not None:
                    stands = [list(range(seen - len(row), seen)) for row in stored]
                else:
                    stands = [list(row) for row in stored]
        self.kept[layer] = stored
        self.masses[layer] = [dict(each.masses) for each in merged]
        return before, places, held


def _at_the_end(state, kept):
    """Move what is remembered of heads that keep less than the widest to the end, where their tokens are."""
    if state is None:
        return None
    widest = max(map(len, kept))
    tokens = {name: np.zeros_like(sums[:, :, :widest]) for name, sums in state.tokens.items()}
    for name, sums in state.tokens.items():
        for head, row in enumerate(kept):
            tokens[name][0, head, widest - len(row) :] = sums[0, head, : len(row)]
    return Memory(tokens, state.layer)


@torch.inference_mode()
def reference_logits(model, ids, policy, calls, *, every=None, num_pads=0, **options):
    """Logits of all tokens of one row, and per layer the positions that are left at the end, one list per head."""
    assert sum(calls) == len(ids)
    slow = SlowReference(policy, calls, every=every, num_pads=num_pads, **options)
    positions = (torch.arange(len(ids)) - num_pads).clamp(min=0)[None]
    mask = (torch.arange(len(ids)) >= num_pads).long()[None]
    with attending(model, slow):
        if policy.needs().wants:
            model(ids[None], attention_mask=mask, position_ids=positions, use_cache=False)
            slow.settle_budgets()
        logits = model(ids[None], attention_mask=mask, position_ids=positions, use_cache=False).logits[0]
    return logits, slow.kept


def reference_generate(model, prompt, policy, num_new, **options):
    """Greedy decoding by recomputing everything for every token."""
    ids = prompt
    for step in range(num_new):
        logits, _ = reference_logits(model, ids, policy, [len(prompt)] + [1] * step, **options)
        ids = torch.cat([ids, logits[-1].argmax()[None]])
    return ids


def assert_close(logits, expected):
    """As far apart as float32 allows."""
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@contextmanager
def attending(model, function):
    """Run a model under another attention function, without masks."""
    AttentionInterface.register(NAME, function)
    AttentionMaskInterface.register(NAME, lambda **_: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)

"""A stand-in for an engine that drops tokens by LMCache's experimental protocol: random keys, several requests."""

from dataclasses import dataclass, field

import numpy as np
import torch

LAYERS, KV_HEADS, QUERY_HEADS, D = 3, 2, 4, 8


@dataclass
class View:
    """The keys and values of a layer that are resident."""

    keys: torch.Tensor
    values: torch.Tensor

    def get_keys(self):
        return self.keys

    def get_values(self):
        return self.values


@dataclass
class Request:
    """One request: its algorithm, what is resident of it, and what was kept at each compaction."""

    algorithm: object
    seed: int
    decoded: int = 0
    views: dict = field(default_factory=dict)
    kept: list = field(default_factory=list)
    seen: list = field(default_factory=list)

    def __post_init__(self):
        self.random = np.random.default_rng(self.seed)

    def draw(self, *shape):
        return torch.as_tensor(self.random.normal(size=shape).astype(np.float32))

    def step(self, num_new):
        """Let the engine compute some tokens: the prompt first, then one at a time."""
        phase = "decode" if self.views else "prefill"
        new = {
            f"layer.{i}": (self.draw(num_new, QUERY_HEADS, D), *self.draw(2, 1, KV_HEADS, num_new, D))
            for i in range(LAYERS)
        }
        self.seen.append(new)
        for name, (_, keys, values) in new.items():
            old = self.views.get(name)
            if old is not None:
                keys, values = torch.cat([old.keys, keys], 2), torch.cat([old.values, values], 2)  # noqa: PLW2901
            self.views[name] = View(keys, values)
        wanted = self.algorithm.should_observe_token_queries(phase, self.decoded)
        if wanted:
            self.algorithm.observe_token_queries({name: queries[-wanted:] for name, (queries, _, _) in new.items()})
        resident = self.views["layer.0"].keys.shape[2]
        if self.algorithm.should_compact_kv(phase, resident, self.decoded):
            kept = self.algorithm.select_kept_token_positions(dict(self.views))
            self.kept.append({name: each.clone() for name, each in kept.items()})
            for name, view in self.views.items():
                index = kept[name][None, :, :, None].expand(-1, -1, -1, D)
                self.views[name] = View(view.keys.gather(2, index), view.values.gather(2, index))
        self.decoded += phase == "decode"

"""Keys as they were before the rotary embedding: what the model's projection gave, for every stored token."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

from graphkv import ArgumentError, Degree, GraphKV, KNorm, Policy, SnapKV
from graphkv.core import Requirements
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.releases import cache_of
from tests.integrations.tiny import FAMILIES, tiny_llama

N = 40
DEGREE = GraphKV(SnapKV(budget=14, window=6, kernel_size=3), Degree(), unrotated=True)


@dataclass(frozen=True, kw_only=True)
class Watching(Policy):
    """Keep what KNorm keeps, and remember the keys that came."""

    requirements: ClassVar[Requirements] = Requirements(unrotated_keys=True)
    seen: list = field(default_factory=list, compare=False)

    def score(self, layer, memory):
        self.seen.append(layer.unrotated_keys)
        return KNorm(budget=self.budget).score(layer, memory)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (N + 9,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("rerotate", [False, True])
@pytest.mark.parametrize("scaling", [None, {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}])
def test_they_are_what_the_projection_gave(ids, rerotate, scaling):
    model = tiny_llama(**{} if scaling is None else {"rope_parameters": scaling})
    given, policy = [], Watching(budget=30)
    attention = model.model.layers[0].self_attn
    hook = attention.k_proj.register_forward_hook(lambda module, args, out: given.append(out))
    with observing(model), torch.inference_mode():
        cache = EvictingCache(policy, every=9, rerotate=rerotate)
        model(ids[None, :N], **with_cache(model, cache))
        kept = cache.layers[0].positions
        model(ids[None, N:], **with_cache(model, cache))
    hook.remove()

    projected = torch.cat(given, dim=1).reshape(1, N + 9, 2, 8).transpose(1, 2)
    first, second = policy.seen[0], policy.seen[3]
    # YaRN makes rotated keys longer, which no cosine sees.
    length = first.norm() / projected[:, :, :N].norm()
    torch.testing.assert_close(first, projected[:, :, :N] * length, rtol=1e-4, atol=1e-4)
    stored = torch.cat([kept, torch.arange(N, N + 9).expand(1, 2, 9)], dim=-1)
    wanted = projected.gather(2, stored[..., None].expand(-1, -1, -1, 8)) * length
    torch.testing.assert_close(second, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3-mixed", "gpt-neox"])
def test_a_left_padded_row_keeps_what_it_keeps_alone(family, ids):
    model, pad = FAMILIES[family](), 9
    mask = torch.stack([torch.ones(N), (torch.arange(N) >= pad)]).long()
    prompts = ids[:N].repeat(2, 1) * mask
    with evicting(model, DEGREE), torch.inference_mode():
        together = cache_of(model(prompts, attention_mask=mask, position_ids=mask.cumsum(-1) - 1))
        alone = cache_of(model(ids[None, pad:N]))
    with evicting(model, GraphKV(DEGREE.base, Degree())), torch.inference_mode():
        rotated = cache_of(model(ids[None, pad:N]))

    moved = False
    for mine, theirs, other in zip(together.layers, alone.layers, rotated.layers, strict=True):
        if mine.evicts:
            assert mine.positions[1].tolist() == (theirs.positions[0] + pad).tolist()
            moved |= theirs.positions.tolist() != other.positions.tolist()
    assert moved, "rotation decides nothing here, so nothing was tested"


def test_a_model_without_rotary_embedding_says_so(ids):
    model = FAMILIES["gpt2"]()

    with evicting(model, DEGREE), pytest.raises(ArgumentError, match="takes no rotary embedding"):
        model(ids[None, :N])

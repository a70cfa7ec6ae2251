"""What differs between the releases of transformers is read from their functions."""

import functools

import pytest
import torch
from transformers import DynamicCache

from graphkv.integrations.transformers.versions import cache_argument
from tests.integrations.tiny import FAMILIES


def before(input_ids, past_key_values=None, **kwargs):
    """Take the cache as forwards did before 5.24."""


def since(input_ids, cache=None, **kwargs):
    """Take the cache as forwards do since 5.24."""


@functools.wraps(since)
def renaming(*args, **kwargs):
    """Take the old name too, as 5.24 does."""


def wrapper(*args, **kwargs):
    """Hand on everything."""


@pytest.mark.parametrize(
    ("forward", "name"),
    [(before, "past_key_values"), (since, "cache"), (renaming, "cache"), (functools.partial(since, 0), "cache")],
)
def test_the_cache_has_the_name_that_forward_gives_it(forward, name):
    assert cache_argument(forward) == name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_stores_into_the_cache_of_that_name(family):
    model, cache = FAMILIES[family](), DynamicCache()
    # A wrapper's own names say nothing: it hands on the name that this release uses.
    assert cache_argument(wrapper) == cache_argument(model.forward)

    with torch.inference_mode():
        model(torch.arange(1, 8)[None], **{cache_argument(model.forward): cache})

    assert cache.get_seq_length() == 7

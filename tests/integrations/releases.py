"""What differs between the releases of transformers that the tests run on."""


def cache_of(output):
    """The cache that a model's output has: `cache` since 5.24, `past_key_values` before."""
    return output.cache if hasattr(output, "cache") else output.past_key_values

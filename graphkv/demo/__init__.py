"""``graphkv demo``: one real model, one prompt, several policies."""

"""``graphkv demo``: one real model, two prompts, several policies; and ``graphkv inspect``."""

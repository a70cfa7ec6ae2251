"""LMCache, over vLLM and SGLang: stored caches become shorter by a policy.

`editor` makes the function that LMCache's SDK takes to edit a stored cache. `TokenDrop` is the experimental per-request
form, which LMCache finds through an entry point. Neither needs LMCache to be imported here.
"""

from .editor import editor
from .token_drop import TokenDrop

__all__ = ["TokenDrop", "editor"]

"""What the papers say importance and budgets are: one file per method, pure functions under an immutable policy."""

from .random import Random
from .snapkv import SnapKV
from .streaming_llm import StreamingLLM

__all__ = ["Random", "SnapKV", "StreamingLLM"]

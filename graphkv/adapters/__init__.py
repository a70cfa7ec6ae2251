"""What the papers say importance and budgets are: one file per method, pure functions under an immutable policy."""

from .caote import CAOTE
from .expected_attention import ExpectedAttention
from .h2o import H2O
from .random import Random
from .roco import RoCo
from .sagekv import SAGEKV
from .snapkv import SnapKV
from .streaming_llm import StreamingLLM

__all__ = ["CAOTE", "H2O", "SAGEKV", "ExpectedAttention", "Random", "RoCo", "SnapKV", "StreamingLLM"]

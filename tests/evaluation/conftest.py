"""A tiny model with tokens of one byte, and text to read."""

import pytest
import torch

from graphkv.evaluation.prompts.haystack import prompt_text
from graphkv.evaluation.prompts.prompts import PromptMaker
from tests.integrations.tiny import byte_tokenizer, save_tiny_llama, tiny_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A saved model of 2048 positions."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), max_position_embeddings=2048)


@pytest.fixture(scope="session")
def model():
    return tiny_llama(vocab_size=256, max_position_embeddings=2048)


@pytest.fixture(scope="session")
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "User: {% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    return tokenizer


@pytest.fixture(scope="session")
def maker(tokenizer):
    return PromptMaker(tokenizer, prompt_text())


@pytest.fixture(autouse=True)
def threads():
    """The command sets the threads of this process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)

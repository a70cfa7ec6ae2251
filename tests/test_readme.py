"""The README's blocks run as they stand; its array quickstart is collected as a doctest."""

import re
from pathlib import Path

import torch

from tests.integrations.tiny import tiny_llama

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_transformers_quickstart_runs():
    _, block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    ids = torch.randint(1, 97, (1, 600), generator=torch.Generator().manual_seed(0))
    model = tiny_llama(max_position_embeddings=1024)
    names = {"model": model, "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}

    exec(block.replace("max_new_tokens=64", "max_new_tokens=4, return_dict_in_generate=True"), names)

    assert [layer.num_stored for layer in names["output"].cache.layers] == [512 + 3] * 3


def test_the_array_quickstart_is_short():
    block, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert block.count(">>>") < 10
    assert block.count("...") == 0


def test_every_make_target_that_the_readme_names_exists():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"^make (\w+)", README, re.MULTILINE))

    assert named == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named)

"""The README's blocks run as they stand; its array quickstart is collected as a doctest."""

import re
from pathlib import Path

import torch

from tests.integrations.tiny import tiny_llama

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_transformers_quickstart_runs():
    block, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    ids = torch.randint(1, 97, (1, 600), generator=torch.Generator().manual_seed(0))
    model = tiny_llama(max_position_embeddings=1024)
    names = {"model": model, "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}

    exec(block.replace("max_new_tokens=64", "max_new_tokens=4, return_dict_in_generate=True"), names)

    assert [layer.num_stored for layer in names["output"].cache.layers] == [512 + 3] * 3


def test_the_array_quickstart_is_short():
    _, block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert block.count(">>>") < 10
    assert block.count("...") == 0


def test_every_make_target_that_the_readme_names_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"^make (\w+)", README, re.MULTILINE))

    assert named == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named)


def test_the_releases_of_transformers_that_pip_may_take_are_those_that_are_run():
    def found(pattern, name):
        (one,) = re.findall(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        return one

    oldest, newest = (
        found(r"^transformers==5\.(\d+)\.\d+$", name) for name in ("constraints-kvpress.txt", "constraints.txt")
    )
    between = found(r"install --quiet transformers==5\.(\d+)\.\d+$", "Makefile")

    assert found(r"\"transformers>=5\.(\d+),<5\.(\d+)\"", "pyproject.toml") == (oldest, str(int(newest) + 1))
    assert found(r"transformers 5\.(\d+) to 5\.(\d+) ", "README.md") == (oldest, newest)
    run = found(r"transformers 5\.(\d+)\.\d+, 5\.(\d+)\.\d+ and 5\.(\d+)\.\d+", "docs/transformers.md")
    assert run == (oldest, between, newest)

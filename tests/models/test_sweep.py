"""Every model that generates text does what docs/models.md says of it."""

import pytest
import transformers

from tests.models.sweep import names
from tests.models.table import cells, read, release

MUST_NOT_BE = ("WRONG", "CRASH", "NOTHING", "NO REFERENCE")
TABLE = read()


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


@pytest.mark.parametrize("model", [" ".join(pair) for pair in names()])
def test_a_model_does_what_the_table_says(model):
    found = cells(*model.split(" "))

    assert not [cell for cell in found.values() if cell.startswith(MUST_NOT_BE)]
    # A release that nobody has swept over yet is only to be right.
    if release() in TABLE:
        assert found == TABLE[release()][model], "if that is meant: python -m tests.models.table, then docs/models.py"


def test_the_table_has_all_models_of_this_release():
    if release() not in TABLE:
        pytest.skip(f"nobody has swept over transformers {release()} yet")
    assert {model for model, row in TABLE[release()].items() if row} == {" ".join(pair) for pair in names()}


def test_no_release_has_a_row_that_must_not_be():
    bad = {
        (number, model): row
        for number, rows in TABLE.items()
        for model, row in rows.items()
        if row and any(cell.startswith(MUST_NOT_BE) for cell in row.values())
    }
    assert not bad

"""Metrics against examples that were worked out by hand."""

import pytest

from graphkv.evaluation.prompts import metrics


@pytest.mark.parametrize(
    ("metric", "text", "references", "expected"),
    [
        ("exact", "The Cat!", ["a cat"], 1.0),
        ("exact", "the cat sat", ["a cat"], 0.0),
        ("exact", "two", ["one", "two"], 1.0),
        ("substring_all", "it is 12 and 34.", ["12", "34", "56", "78"], 0.5),
        ("substring_all", "Hello WORLD", ["world"], 1.0),
        ("substring_any", "it is 12", ["34", "12"], 1.0),
        ("substring_any", "it is 12", ["34"], 0.0),
        # 3 words against 4, articles dropped: 2 against 3, both of the 2 are right.
        ("f1", "the red house", ["a red brick house"], 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("f1", "no", ["yes"], 0.0),
        ("f1", "red red", ["red"], 2 * 0.5 * 1 / 1.5),
        ("f1", "b", ["a b c", "b"], 1.0),
        # Lin's example: police _ the gunman, 3 of 4 words.
        ("rouge_l", "police kill the gunman", ["police killed the gunman"], 0.75),
        # Order matters: only 2 in a row.
        ("rouge_l", "the gunman kill police", ["police killed the gunman"], 0.5),
        ("rouge_l", "x", ["y"], 0.0),
        ("rouge_l", "a b", ["a b c d"], 2 * 1 * 0.5 / 1.5),
        ("edit_similarity", "abcd", ["abed"], 0.75),
        ("edit_similarity", "", ["abc"], 0.0),
        ("edit_similarity", "same", ["other", "same"], 1.0),
    ],
)
def test_metric(metric, text, references, expected):
    assert metrics.score(metric, text, references) == pytest.approx(expected, abs=1e-6)

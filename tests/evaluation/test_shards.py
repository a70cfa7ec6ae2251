"""A run dealt out to several machines, and put together again."""

import json
from dataclasses import replace
from itertools import chain

import pytest

from graphkv import ArgumentError
from graphkv.__main__ import main
from graphkv.evaluation.records import Run, read_records
from graphkv.evaluation.shards import Shard, merge_runs
from tests.evaluation.test_statistics import record

IDENTITY = {"config": {"budgets": [8]}, "threads": 1}
LETTERS = "abcdefghijk"


def write(folder, prompts, shard=None, identity=IDENTITY, nll=1.0):
    """A run of one record per prompt."""
    if shard is not None:
        identity = {**identity, "shard": {"number": shard.number, "of": shard.of}}
    Run(folder, identity, {"started": folder.name}).append(record(prompt, "x", nll) for prompt in prompts)
    return folder


@pytest.mark.parametrize("of", [1, 2, 3, 4, 11, 16])
def test_every_prompt_is_dealt_once_and_finds_its_place_again(of):
    hands = {number: Shard(number, of).deal(LETTERS) for number in range(1, of + 1)}

    assert sorted(chain(*hands.values())) == list(LETTERS)
    assert max(map(len, hands.values())) - min(map(len, hands.values())) <= 1
    placed = {Shard(number, of).place(turn): x for number, hand in hands.items() for turn, x in enumerate(hand)}
    assert "".join(placed[place] for place in sorted(placed)) == LETTERS


def test_no_shard_gets_all_the_long_prompts():
    lengths = [1024, 2048, 4096] * 9

    assert {sum(Shard(number, 3).deal(lengths)) for number in (1, 2, 3)} == {sum(lengths) // 3}


@pytest.mark.parametrize("text", ["", "3", "3/", "/3", "a/3", "1.5/3", "-1/3", "1/0", "1/-3", "1/2/3"])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(ArgumentError, match="--shard must be a number and how many there are, such as 3/16; got"):
        Shard.parse(text)


@pytest.mark.parametrize("text", ["0/3", "4/3"])
def test_a_shard_outside_its_range_is_refused(text):
    with pytest.raises(ArgumentError, match=f"--shard must be between 1/3 and 3/3; got {text}"):
        Shard.parse(text)


def test_shards_give_the_records_of_one_run_in_its_order(tmp_path):
    whole = write(tmp_path / "whole", LETTERS)
    folders = [write(tmp_path / str(n), Shard(n, 3).deal(LETTERS), Shard(n, 3)) for n in (2, 3, 1)]

    records, header = merge_runs(folders)

    assert records == read_records(whole)
    assert header.keys() == json.loads((whole / "run.json").read_text()).keys()
    assert [session["started"] for session in header["sessions"]] == ["2", "3", "1"]


def test_a_shard_that_is_missing_is_named(tmp_path):
    folders = [write(tmp_path / str(n), Shard(n, 4).deal(LETTERS), Shard(n, 4)) for n in (3, 1)]

    records, header = merge_runs(folders)

    assert [each.prompt for each in records] == [
        x for x in LETTERS if x in Shard(1, 4).deal(LETTERS) + Shard(3, 4).deal(LETTERS)
    ]
    assert header["shards"] == {"of": 4, "missing": [2, 4]}


def test_a_shard_that_was_run_twice_counts_once(tmp_path):
    shard = Shard(2, 3)
    folders = [write(tmp_path / name, shard.deal(LETTERS), shard) for name in ("here", "there")]

    assert merge_runs(folders)[0] == read_records(folders[0])


def test_a_folder_of_another_shard_is_not_continued(tmp_path):
    write(tmp_path, "ab", Shard(1, 3))
    before = (tmp_path / "run.json").read_bytes(), (tmp_path / "records.jsonl").read_bytes()

    for shard in (Shard(2, 3), None):
        with pytest.raises(ArgumentError, match="holds another run"):
            write(tmp_path, "c", shard)
    assert ((tmp_path / "run.json").read_bytes(), (tmp_path / "records.jsonl").read_bytes()) == before


def test_runs_that_do_not_belong_together_are_refused(tmp_path):
    one = write(tmp_path / "one", "abc")
    other = write(tmp_path / "other", "abc", identity={**IDENTITY, "threads": 2})
    third = write(tmp_path / "third", "abc", Shard(1, 3))
    fourth = write(tmp_path / "fourth", "abc", Shard(1, 4))
    changed = write(tmp_path / "changed", "ab", nll=1.5)

    with pytest.raises(
        ArgumentError, match=r"other must be a run of the settings of .*one; threads is 2 in it, 1 there"
    ):
        merge_runs([one, other])
    with pytest.raises(ArgumentError, match=r"one division; .*third is 1/3, .*fourth is 1/4"):
        merge_runs([third, fourth])
    with pytest.raises(ArgumentError, match=r"one division; .*one is a whole run, .*third is 1/3"):
        merge_runs([one, third])
    with pytest.raises(ArgumentError, match=r"one and .*changed must agree; they have different records of a\|0"):
        merge_runs([one, changed])


@pytest.fixture(scope="module")
def shards(tiny, tmp_path_factory):
    """One run in one piece and in two shards, the first of which was interrupted and resumed."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "text.txt").write_text("\n\n".join(f"Paragraph {number} of some text." for number in range(60)))
    options = ["eval", "--model", str(tiny), "--text", str(folder / "text.txt"), "--task", "continuation"]
    options += ["--length", "60", "--length", "90", "--budget", "40", "--prompts", "2", "--policy", "snapkv"]
    options += ["--policy", "snapkv+degree", "--threads", "1"]
    assert main([*options, "--output", str(folder / "whole")]) == 0
    for shard in ("1/2", "2/2"):
        assert main([*options, "--shard", shard, "--output", str(folder / shard[0])]) == 0
    records = folder / "1" / "records.jsonl"
    records.write_bytes(records.read_bytes()[: records.stat().st_size // 2])
    assert main([*options, "--shard", "1/2", "--output", str(folder / "1")]) == 0
    return folder


def test_shards_resume_and_combine_to_the_same_bytes_as_one_run(shards, tmp_path):
    assert len(read_records(shards / "1")) == len(read_records(shards / "2")) == len(read_records(shards / "whole")) / 2
    assert main(["report", str(shards / "2"), str(shards / "1"), "--output", str(tmp_path)]) == 0

    assert (tmp_path / "records.jsonl").read_bytes() == (shards / "whole" / "records.jsonl").read_bytes()
    here, there = (json.loads((folder / "run.json").read_text()) for folder in (tmp_path, shards / "whole"))
    assert here.pop("sessions") != there.pop("sessions")
    assert here == there
    assert "not finished" not in (tmp_path / "report.md").read_text()
    # Once more, into the same folder; and from it, like any run.
    assert main(["report", str(shards / "2"), str(shards / "1"), "--output", str(tmp_path)]) == 0
    assert main(["report", str(tmp_path)]) == 0


def test_a_report_of_some_shards_says_what_is_missing(shards, tmp_path):
    assert main(["report", str(shards / "2"), "--output", str(tmp_path)]) == 0

    assert "Shards that are missing, of 2: 1." in (tmp_path / "report.md").read_text()


def test_a_report_of_several_runs_needs_a_folder_and_overwrites_no_run(shards, tmp_path, capsys):
    assert main(["report", str(shards / "1"), str(shards / "2")]) == 2
    assert "--output must be given for a report of several runs" in capsys.readouterr().err
    other = write(tmp_path / "other", "ab")
    before = (other / "records.jsonl").read_bytes()
    assert main(["report", str(shards / "1"), str(shards / "2"), "--output", str(other)]) == 2
    assert "records that are in none of these" in capsys.readouterr().err
    assert (other / "records.jsonl").read_bytes() == before
    assert main(["eval", "--shard", "4/3", "--output", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()


def test_records_of_one_prompt_are_compared_whole(tmp_path):
    one = write(tmp_path / "one", "a")
    other = tmp_path / "other"
    Run(other, IDENTITY, {}).append([replace(record("a", "x", 1.0), text="said")])

    with pytest.raises(ArgumentError, match="must agree"):
        merge_runs([one, other])

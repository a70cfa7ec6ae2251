"""`graphkv inspect`: its picture, and its page, read back without and with a browser."""

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib import image

from graphkv import CAKE, AdaKV, Bar, Decay, Enhance, GraphKV, KNorm, SnapKV
from graphkv.__main__ import main
from graphkv.core import ArgumentError
from graphkv.demo.findings import Findings, find
from graphkv.demo.page import write_page
from graphkv.demo.picture import draw_findings
from graphkv.integrations.transformers import EvictingCache, Fate, LayerStats, Suppressions, fates, observing
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.folding import Folded
from tests.integrations.tiny import FAMILIES, save_tiny_llama, tiny_llama

N = 61  # no multiple of 4: the last byte of the fates is not full
POLICIES = {
    "snapkv+graphkv": GraphKV(SnapKV(budget=24, window=6), Decay(source_ratio=0.5, neighbors=4)),
    "adakv+graphkv": GraphKV(AdaKV(SnapKV(budget=24, window=6)), Decay(source_ratio=0.5, neighbors=4)),
    "cake+graphkv": GraphKV(CAKE(budget=24, window=6), Decay(source_ratio=0.5, neighbors=4)),
    # Negative importance; "evict" gives scores of minus infinity.
    "knorm+graphkv": GraphKV(KNorm(budget=24), Bar(neighbors=1)),
    # Nobody's neighbor is lowered: what is suppressed has no source.
    "snapkv+enhance": GraphKV(SnapKV(budget=24, window=6), Enhance(neighbors=8)),
    "everything fits": SnapKV(budget=N),
}
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
HOSTILE = ["</script><b>", "<!--<script>", "&lt;", "\"'\\", "\u2028", "naïve\n\n", "", "🙂", "]]>", "${x}`", "__DATA__"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("First </script><b>paragraph</b>.\n\nSecond one, naïve &amp; short.\n", encoding="utf-8")
    return path


def read(policy, model=None, **options):
    ids = torch.randint(1, 97, (2, N), generator=torch.Generator().manual_seed(1))
    model = model or tiny_llama()
    cache = EvictingCache(policy, record=True, **options)
    with observing(model), torch.inference_mode():
        model(ids, **with_cache(model, cache))
    return cache


def words():
    return [HOSTILE[i % len(HOSTILE)] for i in range(N)]


class Reader(HTMLParser):
    """Collect tags, attributes, and what stands between <script> and </script>."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script" and self.lasttag == "script":
            self.scripts[-1] += data


def content(path):
    """Return the data of a page."""
    page = Reader(path.read_text(encoding="utf-8"))
    assert [attributes.get("id") for tag, attributes in page.tags if tag == "script"] == ["data", None]
    return json.loads(page.scripts[0])


def unpacked(packed):
    """Read little-endian numbers one by one."""
    raw = base64.b64decode(packed["base64"], validate=True)
    if packed["type"] == "float32":
        return np.frombuffer(raw, "<f4").tolist()
    size = {"uint8": 1, "uint16": 2, "uint32": 4}[packed["type"]]
    return [int.from_bytes(raw[i : i + size], "little") for i in range(0, len(raw), size)]


def ranks(scores, competes):
    """Count, one by one, who comes before; 0 for who does not compete."""
    found = np.zeros(scores.shape, dtype=int)
    for layer, head, token in np.argwhere(competes).tolist():
        row = scores[layer, head]
        before = (row > row[token]) | ((row == row[token]) & (np.arange(len(row)) < token))
        found[layer, head, token] = 1 + (before & competes[layer, head]).sum()
    return found


@each_policy
@pytest.mark.parametrize("row", [0, 1])
def test_the_page_holds_what_the_cache_says(policy, row, tmp_path):
    cache = read(policy)
    findings = find(cache, words(), row=row)
    write_page(tmp_path / "page.html", findings)

    data = content(tmp_path / "page.html")
    layers, heads = 3, 2
    assert (data["layers"], data["heads"], data["tokens"]) == (layers, heads, N)
    assert data["words"] == words()
    assert data["policy"] == str(policy)
    quarters = unpacked(data["fates"])
    told = [quarters[i // 4] >> 2 * (i % 4) & 3 for i in range(layers * heads * N)]
    true = np.stack([fates(layer)[row] for layer in cache.layers])
    assert told == true.ravel().tolist()
    assert len(quarters) == -(-layers * heads * N // 4)

    for name, scores in (("importance", findings.importance), ("scores", findings.scores)):
        expected = ranks(scores, ~np.isnan(findings.importance) & (true != Fate.PROTECTED))
        assert unpacked(data["ranks"][name]) == expected.ravel().tolist()
    # Whoever is among the first `places` after the graph was kept, and nobody else.
    after = np.reshape(unpacked(data["ranks"]["scores"]), true.shape)
    places = np.reshape([each["places"] for each in data["rows"]], (layers, heads, 1))
    assert ((true == Fate.KEPT) == ((after > 0) & (after <= places)))[~np.isnan(findings.importance)].all()
    assert [each["ranked"] for each in data["rows"]] == (after > 0).sum(axis=-1).ravel().tolist()

    start, *columns = (unpacked(data["edges"][name]) for name in ("start", "token", "source", "weight"))
    edges = list(zip(*columns, strict=True))
    for place, (layer, head) in enumerate(np.ndindex(layers, heads)):
        found = cache.stats()[layer].suppressions
        here = (found.row == row) & (found.head == head) & (found.source >= 0)
        expected = zip(found.token[here], found.source[here], found.weight[here], strict=True)
        assert edges[start[place] : start[place + 1]] == [(int(t), int(s), float(w)) for t, s, w in expected]
    assert start[-1] == len(edges)
    assert bool(edges) == (isinstance(policy, GraphKV) and not isinstance(policy.signal, Enhance))
    assert (Fate.SUPPRESSED in true) == isinstance(policy, GraphKV)


def test_the_page_is_safe_and_loads_nothing(tmp_path):
    cache = read(POLICIES["snapkv+graphkv"])
    write_page(tmp_path / "page.html", find(cache, words(), title="</title></script><b>"))

    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Reader(html)
    assert "b" not in {tag for tag, _ in page.tags}
    assert content(tmp_path / "page.html")["title"] == "</title></script><b>"
    assert html.count("</script>") == 2
    for _, attributes in page.tags:
        assert not {"src", "href", "srcset", "onclick", "onload"} & set(attributes)
    policies = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]
    assert not re.search(r"https?://|@import|url\(|fetch\(|innerHTML|eval\(", html)


def test_a_long_text_in_a_deep_model_stays_small(tmp_path):
    layers, heads, tokens, suppressed = 30, 3, 2000, 100
    rng = np.random.default_rng(0)
    shape = (layers, heads, tokens)
    columns = {name: rng.integers(0, tokens, heads * suppressed) for name in ("token", "source")}
    found = Suppressions(
        row=np.zeros(heads * suppressed, dtype=int),
        head=np.repeat(np.arange(heads), suppressed),
        weight=rng.random(heads * suppressed, dtype=np.float32),
        **columns,
    )
    stats = [
        LayerStats(
            layer=layer, evicts=True, num_seen=tokens, num_stored=500, num_kept=np.full((1, heads), 500),
            num_evictions=1, num_dropped=1500, budget=500, budgets_found=None, nbytes=1, bytes_freed=3, seconds=0.1,
            redundancy_before=np.full((1, heads), 0.5), redundancy_after=np.full((1, heads), 0.4),
            num_suppressed=np.full((1, heads), suppressed), suppressions=found,
            num_demoted=np.zeros((1, heads), dtype=np.int64),
        )
        for layer in range(layers)
    ]  # fmt: skip
    findings = Findings(
        title="", policy="", words=["a word, "] * tokens, fates=rng.integers(0, 4, shape, dtype=np.uint8),
        importance=rng.random(shape), scores=rng.random(shape), absorbers=np.full(shape, -1),
        masses=np.ones(shape, dtype=np.float32), stats=tuple(stats), row=0, chosen=(0, 0), fact=None,
    )  # fmt: skip
    write_page(tmp_path / "page.html", findings)

    assert (tmp_path / "page.html").stat().st_size < 3e6
    assert len(unpacked(content(tmp_path / "page.html")["edges"]["token"])) == layers * heads * suppressed


def test_the_page_shows_what_went_into_what(tmp_path):
    findings = find(read(Folded(POLICIES["snapkv+graphkv"])), words(), row=1)
    write_page(tmp_path / "page.html", findings)

    found, total = content(tmp_path / "page.html"), int((findings.absorbers >= 0).sum())
    assert ["absorbed", f"{total:,}"] in found["numbers"]
    assert f"{total:,} times a token went into one like it, which counts for both." in found["lead"]
    merges = {name: unpacked(packed) for name, packed in found["merges"].items()}
    for layer, head in np.ndindex(findings.fates.shape[:2]):
        first, last = merges["start"][2 * layer + head : 2 * layer + head + 2]
        pairs = list(zip(merges["token"][first:last], merges["into"][first:last], strict=True))
        assert pairs == [(i, into) for i, into in enumerate(findings.absorbers[layer, head].tolist()) if into >= 0]
        # Each token counts for itself and for all that went into it.
        assert pairs
        for token, mass in enumerate(findings.masses[layer, head].tolist()):
            is_there = findings.fates[layer, head, token] >= Fate.KEPT
            assert mass == is_there + sum(into == token for _, into in pairs)
    flat = findings.masses.ravel()
    assert merges["place"] == [place for place, mass in enumerate(flat) if mass not in (0, 1)]
    assert merges["mass"] == flat[merges["place"]].tolist()
    assert re.search(r"\d+ dropped tokens are in kept ones, which count as up to \d+\.0 tokens", found["stats"][0])


def test_a_page_without_merges_does_not_speak_of_them(tmp_path):
    write_page(tmp_path / "page.html", find(read(POLICIES["snapkv+graphkv"]), words()))

    found = content(tmp_path / "page.html")
    assert "absorbed" not in dict(found["numbers"])
    assert not any("went into" in said or "in kept ones" in said for said in (found["lead"], *found["stats"]))
    assert unpacked(found["merges"]["place"]) == unpacked(found["merges"]["token"]) == []


@pytest.mark.parametrize("row", [0, 1])
def test_the_page_compares_with_the_base_alone(row, tmp_path):
    policy = POLICIES["snapkv+graphkv"]
    alone = np.stack([fates(layer)[row] >= Fate.KEPT for layer in read(policy.base).layers])
    findings = find(read(policy), words(), row=row, fact=(5, 25))
    write_page(tmp_path / "page.html", findings)

    assert findings.kept_by_importance.tolist() == alone.tolist()
    now, before = ((findings.fates >= Fate.KEPT)[..., 5:25].mean(), alone[..., 5:25].mean())
    assert now != before
    said = f"Of the sentence that is asked for {now:.0%} is kept; by importance alone it would be {before:.0%}."
    assert content(tmp_path / "page.html")["lead"].endswith(said)


def test_what_is_looked_at_first():
    cache = read(POLICIES["snapkv+graphkv"])
    counts = np.stack([stats.num_suppressed[0] for stats in cache.stats()])

    assert find(cache, words()).chosen == np.unravel_index(counts.argmax(), counts.shape)
    assert find(cache, words(), layer=2).chosen == (2, counts[2].argmax())
    assert find(cache, words(), layer=1, head=1).chosen == (1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": ["a"]}, f"words must be one for each of {N} tokens; got 1"),
        ({"layer": 3}, r"layer must lie in \[0, 2\]; got 3"),
        ({"head": -1}, r"head must lie in \[0, 1\]; got -1"),
        ({"row": 2}, r"row must lie in \[0, 1\]; got 2"),
    ],
)
def test_what_find_refuses(options, message):
    with pytest.raises(ArgumentError, match=message):
        find(read(POLICIES["snapkv+graphkv"]), **{"words": words()} | options)


def test_an_empty_cache_cannot_be_inspected():
    with pytest.raises(ArgumentError, match="must have read a prompt; it is empty"):
        find(EvictingCache(SnapKV(budget=3)), [])


def check_picture(path):
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = image.imread(path)
    assert pixels.shape[:2] == (1500, 1800)
    return pixels


@each_policy
def test_the_picture_shows_what_was_suppressed(policy, tmp_path):
    findings = find(read(policy), words(), fact=(10, 12))
    without = np.where(findings.fates == Fate.SUPPRESSED, Fate.DROPPED, findings.fates).astype(np.uint8)
    draw_findings(tmp_path / "with.png", findings)
    draw_findings(tmp_path / "without.png", replace(findings, fates=without))

    differs = (check_picture(tmp_path / "with.png") != check_picture(tmp_path / "without.png")).any(axis=(1, 2))
    is_graph = isinstance(policy, GraphKV)
    # The map of what was kept, that of what was suppressed, and the plots below.
    assert [bool(differs[rows].any()) for rows in (slice(60, 450), slice(560, 880), slice(1000, 1500))] == [
        False,
        is_graph,
        is_graph,
    ]


def test_sliding_layers_are_shown_as_they_are(tmp_path):
    model = FAMILIES["gemma3-mixed"]()
    findings = find(read(POLICIES["snapkv+graphkv"], model), words())
    write_page(tmp_path / "a.html", findings)
    draw_findings(tmp_path / "a.png", findings)

    check_picture(tmp_path / "a.png")
    assert (findings.fates[0, 0] == Fate.KEPT).nonzero()[0].tolist() == list(range(N - 11, N))
    assert ["sliding" in said for said in content(tmp_path / "a.html")["stats"]] == [True, False, True, False]
    assert np.isnan(findings.redundancy).any(axis=-1).tolist() == [True, False, True, False]


def inspect(*arguments):
    return main(["inspect", *map(str, arguments)])


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_inspect_prints_the_report_and_writes_picture_and_page(tiny, text, tmp_path, capsys, backend):
    out = tmp_path / "out"
    options = ("--budget", 60, "--output", out, "--backend", backend, "--layer", 1, "--head", 0)

    assert inspect("--model", tiny, "--text", text, *options) == 0

    assert sorted(path.name for path in out.iterdir()) == ["inspect.html", "inspect.png"]
    check_picture(out / "inspect.png")
    data = content(out / "inspect.html")
    shown = "".join(data["words"])
    assert all(paragraph in shown for paragraph in text.read_text(encoding="utf-8").strip().split("\n\n"))
    assert "Where does the author of this chapter live?" in shown
    # A byte each: the second byte of a character shows nothing of its own.
    assert data["tokens"] == len(shown.encode()) == len(data["words"])
    assert data["words"][shown.index("ï") + 1] == ""
    assert (data["layer"], data["head"]) == (1, 0)
    printed = capsys.readouterr().out
    assert f"3 evictions ran in 3 of 3 layers, over {data['tokens']} tokens." in printed
    assert str(out / "inspect.png") in printed
    assert str(out / "inspect.html") in printed


def test_a_policy_that_asks_can_be_inspected(tiny, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("A word, and another.", encoding="utf-8")

    options = ("--budget", 30, "--output", out)
    assert inspect("--model", tiny, "--text", text, "--policy", "kvzip+adakv", *options) == 0
    assert "3 evictions ran in 3 of 3 layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "full"], "--policy must evict something; got 'full'"),
        (["--policy", "best"], "--policy must be one of"),
        (["--budget", "0"], "--budget must be at least 1 token"),
        (["--question", " "], "--question must not be empty"),
        (["--layer", "3"], "--layer must lie in [0, 2]; got 3"),
        (["--head", "2"], "--head must lie in [0, 1]; got 2"),
        (["--layer", "-1"], "Invalid value for '--layer'"),
        (["--text", "missing.txt"], "missing.txt cannot be read"),
        (["--backend", "fortran"], "backend must be one of"),
    ],
)
def test_bad_options_are_one_line(tiny, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)

    assert inspect("--model", tiny, "--output", tmp_path / "out", *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(tiny, text, tmp_path, capsys):
    out = tmp_path / "out"
    out.write_text("mine")

    assert inspect("--model", tiny, "--text", text, "--output", out) == 2
    assert "--output must be a folder" in capsys.readouterr().err
    assert out.read_text() == "mine"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page")
def test_a_browser_shows_every_token_with_its_fate(tmp_path):
    findings = find(read(POLICIES["snapkv+graphkv"]), words(), layer=1, head=1)
    write_page(tmp_path / "page.html", findings)
    browser = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [*browser, "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "page.html").as_uri()]

    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)

    tokens = [attributes for _, attributes in Reader(done.stdout).tags if "data-token" in attributes]
    assert [int(attributes["data-token"]) for attributes in tokens] == list(range(N))
    names = {Fate.DROPPED: "dropped", Fate.SUPPRESSED: "suppressed", Fate.KEPT: "kept", Fate.PROTECTED: "protected"}
    assert [attributes["class"].split() for attributes in tokens] == [["t", names[x]] for x in findings.fates[1, 1]]
    shown = re.findall(r'<span [^>]*data-token="\d+"[^>]*>(.*?)</span>', done.stdout, re.DOTALL)
    assert [unescape(word) for word in shown] == [word.replace("\n", "↵\n") or "·" for word in words()]

"""A real LMCache server on loopback, and a stand-in for the one thing that only an engine with a GPU announces."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest

CHUNK = 64
TOKENS_PER_BLOCK = 16
# The cache of SmolLM2-135M.
NUM_LAYERS, KV_HEADS, QUERY_HEADS, HEAD_SIZE = 30, 3, 9, 64
MODEL = "tests/smollm2"


def pytest_configure(config):
    """LMCache's own: it leaves sockets open, and asks for a logging handler that is going away."""
    for warning in ("ResourceWarning", "DeprecationWarning", "pytest.PytestUnraisableExceptionWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{warning}")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def group(layout, shape):
    return {
        "dtype": "torch.float32",
        "tokens_per_block": TOKENS_PER_BLOCK,
        "engine_kv_concrete_shape": f"NL x {shape}",
        "engine_kv_format": layout,
    }


def announcement(groups, world_size=1):
    layout = {"num_layers": NUM_LAYERS, "kernel_groups": groups}
    return {"1": {"model_name": MODEL, "world_size": world_size, "kv_cache_layout": layout}}


KV = group("NL_X_NB_TWO_NH_BS_HS", f"[4, 2, {KV_HEADS}, {TOKENS_PER_BLOCK}, {HEAD_SIZE}]")
QUERY = group("NL_X_NB_BS_HS", f"[4, {TOKENS_PER_BLOCK}, {QUERY_HEADS * HEAD_SIZE}]")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Start and stop `lmcache server`; whoever cannot start it fails."""
    port, http_port = free_port(), free_port()
    log = tmp_path_factory.mktemp("server") / "log.txt"
    # What stores queries was an option of 0.5.6 and has become a module.
    with_queries = ["--enable", "transfer_query"]
    if not version("lmcache").startswith("0.5.6"):
        with_queries = ["--server-module", json.dumps({"module_path": "lmcache.v1.multiprocess.plugin_modules.qstore"})]
    command = [
        Path(sys.executable).parent / "lmcache", "server", "--host", "127.0.0.1", "--port", port,
        "--http-host", "127.0.0.1", "--http-port", http_port, "--l1-size-gb", "0.5", "--chunk-size", CHUNK,
        "--eviction-policy", "LRU", "--supported-transfer-mode", "auto", *with_queries,
        "--disable-observability", "--max-workers", "2",
    ]  # fmt: skip
    quiet = {"LMCACHE_DISABLE_BANNER": "1", "LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, env=os.environ | quiet)
    url = f"http://127.0.0.1:{http_port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/status", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None:
                    pytest.fail(f"lmcache server ended with {process.returncode}:\n{log.read_text()[-3000:]}")
                time.sleep(0.5)
        else:
            pytest.fail(f"lmcache server does not answer:\n{log.read_text()[-3000:]}")
        yield f"tcp://127.0.0.1:{port}", url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="session")
def announced(server):
    """The server's pages, with the layout of a cache that an engine would have announced: ``/kv`` and ``/query``."""
    layouts = {
        "kv": announcement([KV]),
        "query": announcement([QUERY]),
        "hybrid": announcement([KV, KV]),
    }

    class Pages(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            _, layout, page = self.path.split("/", 2)
            with urllib.request.urlopen(f"{server[1]}/{page}", timeout=20) as answer:
                body = json.load(answer)
            if page == "status":
                body["cache_context_meta"] = layouts[layout]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

    pages = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=pages.serve_forever, daemon=True).start()
    yield server[0], f"http://127.0.0.1:{pages.server_port}"
    pages.shutdown()
    pages.server_close()


@pytest.fixture
def contexts(announced):
    """Real contexts of the SDK, for keys and values and for queries."""
    from lmcache import sdk

    url, pages = announced
    made = [
        sdk.kvcache.connect(url=url, http_url=f"{pages}/kv", model_name=MODEL, timeout=60),
        sdk.qcache.connect(url=url, http_url=f"{pages}/query", model_name=MODEL, timeout=60),
    ]
    yield made
    for each in made:
        each.close()

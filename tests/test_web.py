"""The browser example in a real browser: the page's logits against Python's, its decoded slots against ours."""

from __future__ import annotations

import functools
import hashlib
import http.server
import importlib.util
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

WEB = Path(__file__).parents[1] / "examples/web"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
    pytest.mark.skipif(not (WEB / "node_modules").is_dir(), reason="examples/web has no node_modules (npm install)"),
]


def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare", WEB / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxscript")
    out = tmp_path_factory.mktemp("web") / "site"
    subprocess.run([sys.executable, str(WEB / "prepare.py"), "--out", str(out)], check=True, timeout=400)
    return out


class Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript",  # noqa: RUF012
                      ".wasm": "application/wasm"}
    result: dict[str, Any] | None = None
    done = threading.Event()

    def do_POST(self) -> None:
        Handler.result = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        Handler.done.set()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def seen(site: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Run the page with ?check until it has posted what it computed; return that and the browser's log."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    log = tmp_path_factory.mktemp("log") / "chromium.log"
    with log.open("wb") as err:
        browser = subprocess.Popen(
            [CHROMIUM or "", "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
             f"--user-data-dir={log.parent / 'profile'}", "--remote-debugging-port=0",
             f"http://127.0.0.1:{server.server_address[1]}/index.html?check"], stderr=err, stdout=err)
        try:
            arrived = Handler.done.wait(180)
        finally:
            browser.terminate()
            browser.wait(30)
            server.shutdown()
    text = log.read_text(errors="replace")
    assert arrived, text[-2000:]
    assert Handler.result is not None
    return Handler.result, text


def test_logits_in_the_browser_are_those_of_python(site: Path, seen: tuple[dict[str, Any], str]) -> None:
    rows = json.loads((site / "expected.json").read_text())["rows"]
    found = seen[0]["results"]
    assert len(found) == len(rows) == 3
    for row, got in zip(rows, found, strict=True):
        assert set(got) == {"none", "forward", "backward"}
        for name, values in row["expected"].items():
            np.testing.assert_allclose(got[name], values, rtol=0, atol=1e-5)
        change = np.abs(np.subtract(got["forward"], got["none"])).max()
        assert change > 1e-2  # an adapter that loads and does nothing is the failure to fear
        assert np.abs(np.subtract(got["forward"], got["backward"])).max() > 1e-2


def test_the_browser_decodes_to_the_same_bits(site: Path, seen: tuple[dict[str, Any], str]) -> None:
    module = prepare()
    for name, hashes in seen[0]["decoded"].items():
        ours = module.expand(site / f"{name}.onnx")
        assert hashes == {k: hashlib.sha256(np.ascontiguousarray(v).tobytes()).hexdigest() for k, v in ours.items()}


def test_the_console_stays_silent(seen: tuple[dict[str, Any], str]) -> None:
    assert not [line for line in seen[1].splitlines() if "CONSOLE" in line and "warn" not in line.lower()]


def test_nothing_comes_from_elsewhere() -> None:
    for name in ("index.html", "app.mjs"):
        text = (WEB / name).read_text()
        assert "http" not in text.replace('http-equiv', '')

"""moe-serve as its clients meet it: limits, errors, a full queue, 500 requests at once, and how it ends."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import moe_train
from moe_train.config.serving import ServeConfig
from moe_train.data.folder import DataFolder
from moe_train.errors import LaunchError
from moe_train.evaluation.serving.request_guard import host_name
from moe_train.evaluation.serving.server import serve
from tests.evaluation.runs import make_run

PAIR = {"source": "de", "target": "en"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""
SEARCH = ["search.beam=1", "search.max_length_ratio=0", "search.max_length_offset=4"]


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory, tiny_data: DataFolder) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), tiny_data, directions=("de-en", "en-de"))


@contextmanager
def serving(run: Path, *words: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server process and its address."""
    command = [sys.executable, "-m", "moe_train.commands.serve", f"run={run}", "port=0", "threads=1", *SEARCH, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = re.fullmatch(r"serving (http://127\.0\.0\.1:\d+)\n", line)
            assert found, line + process.stderr.read()
            yield found[1], process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def address(run_path: Path) -> Iterator[str]:
    with serving(run_path, "max_sentences=4", "max_characters=50") as (url, _):
        yield url


def post(address: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{address}/translate", content=content, headers={"content-type": "application/json", **headers})


@pytest.mark.processes
@pytest.mark.warm_start
def test_translations_and_experts_are_those_of_python(address: str, run_path: Path) -> None:
    lines = ["Das Kind mag frisches Brot.", "", "ja\nnein"]
    answer = post(address, {"sentences": lines, **PAIR, "experts": True})
    assert answer.status_code == 200
    found = answer.json()["translations"]
    model = moe_train.load(run_path, device="cpu", beam=1, max_length_ratio=0, max_length_offset=4)
    for own, wanted in zip(found, model.translate(lines, "de", "en", return_experts=True), strict=True):
        assert own["text"] == wanted.text and own["score"] == pytest.approx(wanted.score, abs=1e-5)
        if wanted.experts is not None:
            assert own["experts"]["source"] == list(wanted.experts.source)
            assert own["experts"]["decoder"][0]["experts"] == [list(t) for t in wanted.experts.decoder[0].experts]
    assert [one["experts"] is None for one in found] == [False, True, False]
    health = httpx.get(f"{address}/health").json()
    assert health["status"] == "ok" and health["languages"] == list(model.languages) and health["waiting"] == 0


@pytest.mark.processes
@pytest.mark.warm_start
@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"sentences": ["x"], "source": "xx", "target": "en"}, 422, r"source.*no language 'xx'"),
        ({"sentences": ["x"] * 5, **PAIR}, 422, "5 sentences are more than 4"),
        ({"sentences": ["ok", "x" * 51], **PAIR}, 422, r"sentences\[1\].*51 characters are more than 50"),
        ({"sentences": [], **PAIR}, 422, "sentences.*at least 1"),
        ({"sentences": "x", **PAIR}, 422, "valid list"),
        ({"sentences": [1], **PAIR}, 422, r"sentences\[0\].*valid string"),
        ({"sentences": ["x"], **PAIR, "beam": 9}, 422, "beam.*not permitted"),
        ({"sentences": ["\ud800"], **PAIR}, 422, r"sentences\[0\].*surrogate"),
        ({"sentences": ["x"], "source": "\ud800", "target": "en"}, 422, "no language"),
        ({"\ud800": 1}, 422, ""),
        (b"no JSON", 422, "JSON decode error"),
        (b"\xff\xfe", 422, ""),
        (b"[" * 15_000, 400, "parsing"),
        (b" " * 50_000, 413, "more than"),
    ],
)
def test_what_cannot_be_translated_is_one_clear_4xx(address: str, body: Any, status: int, said: str) -> None:
    answer = post(address, body)
    content = answer.json()
    assert answer.status_code == status and content.keys() == {"error", "where", "remedy"}
    assert re.search(said, f"{content['where']} {content['error']}"), content


@pytest.mark.processes
@pytest.mark.warm_start
def test_other_paths_methods_types_and_hosts_are_refused(address: str) -> None:
    good = {"sentences": ["ja"], **PAIR}
    assert httpx.get(f"{address}/translate").status_code == 405
    assert httpx.get(f"{address}/docs").status_code == httpx.get(f"{address}/../etc/passwd").status_code == 404
    assert post(address, good, **{"content-type": "text/plain"}).status_code == 422  # which other sites may send
    port = address.rpartition(":")[2]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost:80@evil.example", ""):
        answer = post(address, good, host=host)
        assert answer.status_code in (400, 403) and "translations" not in answer.text
        assert httpx.get(f"{address}/", headers={"host": host}).status_code in (400, 403)
    for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "LOCALHOST"):
        assert post(address, good, host=host).status_code == 200


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("Localhost:80", "localhost"),
        ("[::1]:8000", "::1"),
        ("[::1]", "::1"),
        ("example.org.", "example.org"),
        ("", ""),
        ("a:b", ""),
        ("localhost:80@evil.example", ""),
        ("[::1]evil.example", ""),
    ],
)
def test_a_host_header_is_a_name_and_perhaps_a_port(header: str, name: str) -> None:
    assert host_name(header) == name


@pytest.mark.processes
@pytest.mark.warm_start
def test_the_page_loads_nothing_from_elsewhere(address: str) -> None:
    page, script = httpx.get(f"{address}/"), httpx.get(f"{address}/page.js")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["content-type"].startswith("text/html") and "text/javascript" in script.headers["content-type"]
    assert not re.search(r"https?://|//[a-z]|<script>|\son\w+=|style=", page.text)
    assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script.text)


@pytest.mark.processes
@pytest.mark.warm_start
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed: the page's script was not run")
def test_a_browser_opens_the_page(address: str, tmp_path: Path) -> None:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--virtual-time-budget=8000", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, address], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, "no error in its script, and nothing that the policy refused"
    assert done.stdout.count('<option value="ja">') == 2 and "trained: de-en, en-de" in done.stdout


async def ask(url: str, requests: int, sentences: int) -> list[httpx.Response]:
    """Answers to requests that are sent at once."""

    async def one(client: httpx.AsyncClient, number: int) -> httpx.Response:
        source, target = ("de", "en") if number % 2 else ("en", "de")
        lines = [f"ja {number}"] * sentences
        body = {"sentences": lines, "source": source, "target": target, "experts": number % 20 == 0}
        return await client.post("/translate", json=body)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        return await asyncio.gather(*(one(client, number) for number in range(requests)))


@pytest.mark.processes
@pytest.mark.warm_start
def test_500_requests_at_once_each_get_a_translation(address: str) -> None:
    answers = asyncio.run(ask(address, 500, 1))
    assert Counter(answer.status_code for answer in answers) == {200: 500}
    assert all(len(answer.json()["translations"]) == 1 for answer in answers)


@pytest.mark.processes
@pytest.mark.warm_start
def test_a_full_queue_refuses_and_a_signal_leaves_none_without_an_answer(run_path: Path) -> None:
    async def stopped(url: str, process: subprocess.Popen[str]) -> list[httpx.Response]:
        asked = asyncio.create_task(ask(url, 24, 4))
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            while (await client.get("/health")).json()["waiting"] == 0:
                assert not asked.done()
                await asyncio.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        return await asked

    with serving(run_path, "queue=100", "batch_sentences=4") as (url, process):
        answers = asyncio.run(ask(url, 500, 2))
        found = Counter(answer.status_code for answer in answers)
        assert found.keys() == {200, 429} and found[200] >= 50
        for answer in answers:
            if answer.status_code == 429:
                assert 1 <= int(answer.headers["retry-after"]) <= 60 and "wait" in answer.json()["error"]
        answers = asyncio.run(stopped(url, process))
        assert [answer.status_code for answer in answers] == [200] * 24
        assert [len(answer.json()["translations"]) for answer in answers] == [4] * 24
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0 and not said


@pytest.mark.processes
def test_an_address_in_use_is_one_error(run_path: Path, address: str) -> None:
    port = int(address.rpartition(":")[2])
    with pytest.raises(LaunchError, match=rf"^127\.0\.0\.1:{port}: moe-serve cannot listen there"):
        serve(ServeConfig(str(run_path), port=port))

"""The hub when it fails: one request, one line, nothing on standard error, and the cache in place of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from peft_gauge.errors import GaugeError
from peft_gauge.training import models
from tests.support.facts import lacking

if TYPE_CHECKING:
    from peft_gauge.training.models import ModelRecord

NAME = "some/model"
TOY = models.resolve("toy-llama", weights="random")


class Unavailable(BaseHTTPRequestHandler):
    """Responds 503 to each request, and keeps those for the model."""

    paths: list[str]

    def do_HEAD(self) -> None:
        if NAME in self.path:
            self.paths.append(f"{self.command} {self.path}")
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """The requests to a hub that is not available; its cache is in ``tmp_path``."""
    from huggingface_hub import constants

    paths: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Unavailable,), {"paths": paths}))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield paths
    server.shutdown()
    server.server_close()


@pytest.fixture
def record() -> ModelRecord:
    return replace(TOY, name=NAME, source="hub", location=NAME, weights="real")


@pytest.mark.parametrize("what", ["weights", "tokenizer"])
def test_without_the_hub_a_load_is_one_request_and_one_line(
    what: str, requests: list[str], record: ModelRecord, capfd: pytest.CaptureFixture[str]
) -> None:
    load: Any = models.build if what == "weights" else models.tokenizer.__wrapped__
    with pytest.raises(GaugeError) as caught:
        load(record)
    assert lacking(str(caught.value), f"cannot reach {NAME} on the hub", "503", what, "cache") == []
    assert "\n" not in str(caught.value)
    assert requests == [f"HEAD /{NAME}/resolve/main/config.json"]
    assert capfd.readouterr() == ("", "")


def test_without_the_hub_the_cache_is_used(
    requests: list[str], record: ModelRecord, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    commit = "a" * 40
    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    model = models.build(TOY)
    model.save_pretrained(repository / "snapshots" / commit)
    capfd.readouterr()

    assert models.resolve(NAME).config["hidden_size"] == TOY.config["hidden_size"]
    loaded = models.build(record)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert set(requests) == {f"HEAD /{NAME}/resolve/main/config.json"}
    assert len(requests) == 2
    assert capfd.readouterr() == ("", "")

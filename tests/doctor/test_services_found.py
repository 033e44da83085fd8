"""What an agent's run asks: GBox with its key, and the servers that answer for the policy."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fake_gbox import TOKEN, gbox_in_thread
from jsonargparse import Namespace

from lit_rl.doctor.boxes import boxes
from lit_rl.doctor.inference import servers


def run(worlds: str, **options: object) -> Namespace:
    named = Namespace(class_path=worlds, init_args=Namespace(**options))
    return Namespace(model=Namespace(init_args=Namespace(episodes=Namespace(worlds=named))))


def test_the_key_of_boxes_and_the_service_are_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(boxes(run("lit_rl.envs.tiny_desktop.TinyDesktops"))) == []
    assert list(boxes(Namespace(model=Namespace(init_args=Namespace())))) == []
    with gbox_in_thread() as fake:
        told = {}
        for key in (TOKEN, "bad", "your_gbox_api_key_here", ""):
            monkeypatch.setenv("GBOX_API_KEY", key)
            (told[key],) = boxes(run("lit_rl.envs.gbox.GBoxes", base_url=fake.url))
        assert (told[TOKEN].status, told[TOKEN].text) == ("ok", f"{fake.url} takes the key; boxes of runs that are up or were left: 0")
        assert told["bad"].status == "problem" and f"GBOX_API_KEY was rejected by {fake.url} (401)" in told["bad"].text
        assert "GBOX_API_KEY is not set: it holds the template's placeholder" in told["your_gbox_api_key_here"].text
        assert f"GBOX_API_KEY is not set: it is not in the environment, and {tmp_path}/.env is not there" in told[""].text


class Health(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *args: object) -> None: ...


def test_the_servers_that_answer_are_asked() -> None:
    def told(urls: str) -> list[tuple[str, str]]:
        engine = Namespace(class_path="lit_rl.rollouts.http.HTTPEngine", init_args=Namespace(urls=urls))
        found = servers(Namespace(model=Namespace(init_args=Namespace(answers=Namespace(engine=engine)))))
        return [(finding.status, finding.text) for finding in found]

    assert list(servers(Namespace(model=Namespace(init_args=Namespace(answers=None))))) == []
    with ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"127.0.0.1:{server.server_port}"
        assert told(f"http://{url}/v1") == [("ok", "ready")]
        Health.status = 503
        (loading,) = told(url)
        server.shutdown()
    assert loading[0] == "problem" and "GET /health answers 503; it is still loading" in loading[1]
    (gone,) = told(url)
    assert gone[0] == "problem" and all(
        word in gone[1] for word in ("nvidia-smi", "docker logs vllm-cua-areal", "VLLM_API_BASE", "refused")
    )

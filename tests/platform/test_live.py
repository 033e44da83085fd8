"""Events reach those who listen, in order; slow listeners hold up nobody; nobody who listens holds up the end."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from socket import IPPROTO_TCP, TCP_NODELAY

import pytest
import requests
from fastapi.testclient import TestClient
from served_platform import GUIDE_JOB, listening
from starlette.websockets import WebSocketDisconnect
from test_reports import report, service
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from lit_rl.platform.hub import WAITING, Hub
from lit_rl.platform.patience import PatientProtocol
from lit_rl.platform.routes.live import joined


def test_a_job_tells_what_happens_from_where_one_was(platform: TestClient) -> None:
    report(platform, "j", {"step": 1, "metrics": {"x": 1.0}})
    with platform.websocket_connect("ws://localhost:8000/ws/jobs/j") as socket:
        hello = socket.receive_json()
        assert hello["type"] == "hello" and hello["job"]["uuid"] == "j"
        socket.send_json({"type": "ping"})
        report(platform, "other", {"step": 1, "metrics": {"x": 1.0}})
        report(platform, "j", {"step": 2, "metrics": {"x": None}})
        kinds = [socket.receive_json() for _ in range(2)]
        assert {frame["type"] for frame in kinds} == {"alert", "metrics"} and {frame["job"] for frame in kinds} == {"j"}
        (metrics,) = (frame for frame in kinds if frame["type"] == "metrics")
        assert metrics["points"][0]["metrics"] == {"x": None}
    with platform.websocket_connect(f"ws://localhost:8000/ws/jobs/j?since={hello['seq']}") as socket:
        frames = [socket.receive_json() for _ in range(3)]
        assert [frame["type"] for frame in frames[1:]] == ["alert", "metrics"]
    with platform.websocket_connect("ws://localhost:8000/ws/jobs/j?since=99999") as socket:
        assert [socket.receive_json()["type"] for _ in range(2)] == ["hello", "resync"]


@pytest.mark.parametrize("word", ["no json", '{"type": "ping", "x": 1}', '{"type": "subscribe", "topics": ["secrets"]}', "[]", "{}"])
def test_a_word_that_is_none_ends_the_connection(platform: TestClient, word: str) -> None:
    with platform.websocket_connect("ws://localhost:8000/ws") as socket:
        socket.receive_json()
        socket.send_text(word)
        with pytest.raises(WebSocketDisconnect) as ended:
            socket.receive_json()
        assert ended.value.code == 1008


def test_topics_are_those_that_were_asked_for(platform: TestClient) -> None:
    report(platform, "j", {"step": 1, "metrics": {"x": 1.0}})
    with platform.websocket_connect("ws://localhost:8000/ws/jobs/j") as socket:
        socket.receive_json()
        socket.send_json({"type": "subscribe", "topics": ["alert"]})
        hub = service(platform).hub
        while not any(listener.topics for listener in hub._listeners):
            time.sleep(0.01)
        report(platform, "j", {"step": 2, "metrics": {"kl_divergence": 1.0}})
        assert socket.receive_json()["type"] == "alert"


def test_a_slow_listener_is_told_to_look_again() -> None:
    async def run() -> tuple[list[object], bool, list[object], bool]:
        hub = Hub()
        listener, _, _ = hub.listen("j", since=None)
        for number in range(WAITING + 10):
            hub.publish("metrics", "j", points=[number])
        first = await listener.take()
        hub.publish("metrics", "j", points=["new"])
        second = await listener.take()
        return [*first[0]], first[1], [event["points"] for event in second[0]], second[1]

    events, lost, later, again = asyncio.run(run())
    assert lost and len(events) == 0 and later == [["new"]] and not again


def test_metrics_that_follow_each_other_are_one_frame() -> None:
    def of(job: str, seq: int) -> dict[str, object]:
        return {"type": "metrics", "job": job, "seq": seq, "points": [seq]}

    frames = joined([of("a", 1), of("a", 2), of("b", 3), {"type": "state", "seq": 4}, of("b", 5)])
    assert [(frame.get("points"), frame["seq"]) for frame in frames] == [([1, 2], 2), ([3], 3), (None, 4), ([5], 5)]


def test_answers_do_not_wait_for_more_to_send(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TCP_NODELAY the body of an answer waits 40 ms for the other side to acknowledge its head."""
    seen = list[int]()
    made = PatientProtocol.connection_made

    def noted(self: PatientProtocol, transport: asyncio.Transport) -> None:
        seen.append(transport.get_extra_info("socket").getsockopt(IPPROTO_TCP, TCP_NODELAY))
        made(self, transport)

    monkeypatch.setattr(PatientProtocol, "connection_made", noted)
    with listening(tmp_path) as url:
        assert requests.get(f"{url}/healthz", timeout=60).ok
    assert seen and all(seen)


def test_open_sockets_do_not_hold_up_the_end_and_a_frozen_one_nobody(tmp_path: Path) -> None:
    """Fifty listeners, one of which never reads; all are closed with 1001."""
    with listening(tmp_path) as url:
        uuid = requests.post(f"{url}/api/jobs", json=GUIDE_JOB, timeout=60).json()["uuid"]
        address = f"{url.replace('http', 'ws')}/ws/jobs/{uuid}"
        sockets = [connect(address, open_timeout=60) for _ in range(50)]
        assert all(json.loads(socket.recv(60))["type"] == "hello" for socket in sockets[1:])
        requests.post(f"{url}/api/jobs/{uuid}/metrics", json={"points": [{"step": 1, "metrics": {"x": 1.0}}]}, timeout=60)
        assert all(json.loads(socket.recv(60))["type"] in ("metrics", "state") for socket in sockets[1:])
        codes: list[int] = []

        def drain() -> None:
            try:
                while True:
                    sockets[1].recv(60)
            except ConnectionClosed as closed:
                codes.append(closed.rcvd.code if closed.rcvd else 0)

        reader = threading.Thread(target=drain)
        reader.start()
    reader.join(60)  # the end of `listening` has waited for the server's thread
    assert codes == [1001] or codes == [1012]
    for socket in sockets:
        socket.close()

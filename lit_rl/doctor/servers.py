"""Reward servers: where they should be, whether they answer, and what they say about a picture of a word."""

from __future__ import annotations

import base64
import copy
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from lit_rl.doctor.report import Finding, ok, problem, warning
from lit_rl.errors import ConfigError
from lit_rl.net.addresses import check_health, check_outputs, parse_urls, servers_of_rank, urls_from_environment
from lit_rl.net.gpus import Gpu, check_ids
from lit_rl.net.sockets import bind

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from lit_rl.rewards.client import HTTPReward

WORD, SIDE = "HELLO", 512
INFO = {"prompt": f'The text is "{WORD}".', "target": WORD}
LOADING_SECONDS, SCORE_SECONDS = 2.0, 60.0
NAMES = ("REWARD_SERVER_URLS", "REWARD_SERVER_HOST", "REWARD_SERVER_PORT")


def picture() -> Picture:
    """The word on a sign in a scene, where OCR finds it only if it looks for lines of text."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.linear_gradient("L").rotate(180).resize((SIDE, SIDE)).convert("RGB")
    draw = ImageDraw.Draw(image)
    draw.ellipse((360, 30, 480, 150), fill=(200, 40, 40))
    draw.rectangle((60, 280, 320, 380), fill="white", outline="black", width=4)
    draw.text((190, 330), WORD, fill="black", font=ImageFont.load_default(56), anchor="mm")
    return image


def of_environment(urls: Sequence[str], *, processes: int, token: str | None) -> list[Finding]:
    """The servers that processes without a word about them in their YAML would ask, by the guide's route; torch is not needed."""
    asked_for = bool(urls) or any(os.environ.get(name) for name in NAMES)
    try:
        found = parse_urls(list(urls) or urls_from_environment(processes))
    except ConfigError as error:
        return [problem("reward servers", str(error))]
    headers = {"Authorization": f"Bearer {token}"} if token else {}

    def check(url: str) -> Finding:
        try:
            health = check_health(url, headers=headers, patience_s=LOADING_SECONDS)
            return _of_texts(url, health) or _judge(url, _score(url, headers))
        except ConfigError as error:
            return (problem if asked_for else warning)(f"reward server {url}", str(error))

    return _all(check, found)


def of_reward(reward: HTTPReward, label: str, *, processes: int) -> list[Finding]:
    """The servers that the run's processes will ask, with the run's own client, route and outputs."""
    try:
        urls = parse_urls(urls_from_environment(processes) if reward.given_urls is None else reward.given_urls)
        own = [servers_of_rank(urls, rank=rank, world_size=processes, mapping=reward.mapping) for rank in range(processes)]
    except ConfigError as error:
        return [problem(f"reward {label}", str(error))]
    used = list(dict.fromkeys(url for servers in own for url in servers))
    line = f"{processes} process{'es ask' if processes > 1 else ' asks'} {len(used)} server{'s' if len(used) > 1 else ''}: " + ", ".join(
        f"rank {rank} {' '.join(servers)}" for rank, servers in enumerate(own[:8])
    )
    if len(urls) < processes and reward.mapping != "round_robin":
        counts = warning(f"reward {label}", f"{line}; they share: start {processes} servers, one for each, if scoring is slow")
    else:
        counts = ok(f"reward {label}", line)

    def check(url: str) -> Finding:
        probe = copy.copy(reward)
        probe.urls = probe.own = [url]
        probe.deadline_s, probe.spill = min(reward.deadline_s, SCORE_SECONDS), False
        try:
            health = check_health(url, headers=reward._headers(), patience_s=LOADING_SECONDS)
            check_outputs(url, list(reward.fields.values()), health)
            return _of_texts(url, health) or _judge(url, _score_with(probe), why=probe.last_error)
        except (ConfigError, RuntimeError) as error:  # RewardError too
            return problem(f"reward server {url}", str(error))

    return [counts, *_all(check, used)]


def ports(ids: Sequence[str], *, first: int) -> Iterator[Finding]:
    """Findings about the ports of `python -m lit_rl.rewards.launch --gpu-ids IDS --port FIRST`: free, taken by it, or taken by others."""
    for gpu, port in zip(ids, range(first, first + len(ids))):
        about = f"port {port} (GPU {gpu})"
        try:
            bind("0.0.0.0", port).close()
            yield ok(about, "free for the launcher")
        except ValueError as error:
            try:
                check_health(f"http://127.0.0.1:{port}", headers={}, patience_s=0.0)
                yield ok(about, "a reward server answers there already")
            except ConfigError:
                yield problem(about, str(error))


def shared(train: Sequence[str], launch: Sequence[str], *, found: Sequence[Gpu]) -> Iterator[Finding]:
    """Findings about the GPUs of training and of reward servers: they exist, and none is given to both."""
    for ids, option in ((train, "--train-gpu-ids"), (launch, "--gpu-ids")):
        try:
            check_ids(ids, found, option=option)
        except ValueError as error:
            yield problem("GPU ids", str(error))
    both = [gpu for gpu in train if gpu in launch]
    names = f"training {','.join(train)}, reward servers {','.join(launch)}"
    if both:
        cure = "memory will run out: give --gpu-ids of the launcher, or CUDA_VISIBLE_DEVICES of training, others"
        yield problem("GPU ids", f"{names}: {', '.join(both)} {'are' if len(both) > 1 else 'is'} given to both; {cure}")
    elif not train or not launch:
        return
    elif len(launch) < len(train):
        yield warning("GPU ids", f"{names}: {len(launch)} servers for {len(train)} processes, which will share them")
    else:
        yield ok("GPU ids", names)


def _all(check: Callable[[str], Finding], urls: Sequence[str]) -> list[Finding]:
    with ThreadPoolExecutor(max_workers=16) as pool:
        return list(pool.map(check, urls))


def _of_texts(url: str, health: Mapping[str, object]) -> Finding | None:
    """The finding about a server that scores texts alone: which texts it can score depends on their rows, so none is sent."""
    if health.get("media") != ["texts"]:
        return None
    outputs = health.get("outputs")
    names = outputs if isinstance(outputs, list) and outputs else ["names known after the first text"]
    return ok(f"reward server {url}", f"ready, scores texts: {', '.join(map(str, names))}")


def _judge(url: str, scores: dict[str, float], *, why: str = "") -> Finding:
    about = f"reward server {url}"
    said = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
    missing = [name for name, value in scores.items() if math.isnan(value)]
    if missing or not scores:
        return problem(about, f"gave no {' and no '.join(missing) or 'score'} for a picture of {WORD!r}: {why or 'see its log'}")
    if scores.get("ocr_similarity", 1.0) < 0.5:
        cure = "with `detect: false` it reads pictures and masks of one line only, which is right for nothing else; or see its log"
        return warning(about, f"{said} for a sign with {WORD!r} in a scene, which its OCR does not find: {cure}")
    return ok(about, f"{said} for a picture of {WORD!r}")


def _score_with(reward: HTTPReward) -> dict[str, float]:
    import numpy as np
    import torch

    media = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None]
    return {name: float(values[0]) for name, values in reward.score(media, [INFO]).items()}


def _score(url: str, headers: dict[str, str]) -> dict[str, float]:
    """The numbers that `POST /score` answers. Raises ConfigError."""
    import urllib.error
    import urllib.request

    file = io.BytesIO()
    picture().save(file, "PNG")
    body = json.dumps({"image": base64.b64encode(file.getvalue()).decode(), **INFO}).encode()
    request = urllib.request.Request(f"{url}/score", data=body, headers={**headers, "Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=SCORE_SECONDS) as response:
            answer = json.loads(response.read(1 << 20))
    except urllib.error.HTTPError as error:
        hint = "; set REWARD_TOKEN to its token" if error.code == 401 else ""
        raise ConfigError(f"POST /score answers status {error.code}: {error.read(300).decode(errors='replace')}{hint}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"POST /score gives no answer: {error}; see the server's log") from error
    return {k: float(v) for k, v in answer.items() if isinstance(v, int | float)} if isinstance(answer, dict) else {}

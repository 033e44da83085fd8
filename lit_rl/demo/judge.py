"""A scripted judge that speaks the OpenAI chat protocol: it reads pictures of numbers by OCR in the place of a vision-language model.

    python -m lit_rl.demo.judge --port 0 --ready-file FILE

Two pictures: it says which one reads more like the number in quotes of the prompt, as UnifiedReward-Think answers. One: for each testpoint
whether the number is read exactly, as UniGenBench's model answers.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from lit_rl.rewards.lettering import similarity

if TYPE_CHECKING:
    from aiohttp import web

MODELS = ("UnifiedReward", "UniGenBench-EvalModel-qwen3vl-32b-v1")


class ReadingJudge:
    """Answers questions about pictures."""

    def __init__(self) -> None:
        from lit_rl.rewards.ocr import OCRReward

        self.reader = OCRReward(detect=False)
        self.reader.setup()
        self.read = lru_cache(maxsize=4096)(self._read)

    def _read(self, url: str) -> tuple[str, float]:
        """Text and confidence of a picture, a data URL."""
        import numpy as np
        from PIL import Image

        data = base64.b64decode(url.partition(",")[2])
        return self.reader.read([np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))])[0]

    def answer(self, text: str, pictures: list[str]) -> str:
        """The answer to a question about one picture or two."""
        wanted = re.findall(r'"([^"]*)"', text)[0]
        marks = [(similarity(read, wanted), sure) for read, sure in map(self.read, pictures)]
        if len(marks) == 2:
            if marks[0] == marks[1]:
                return "<think>Both read alike.</think><answer>They are equally good</answer>"
            better = 1 if marks[0] > marks[1] else 2
            return f"<think>I read {[self.read(url)[0] for url in pictures]}.</think><answer>Image {better} is better</answer>"
        asked = re.findall(r"Testpoints: \[(.*)\]", text)[0].count("'") // 2
        scores = [int(marks[0][0] == 1.0)] * asked
        return f"<description><analysis>{[f'It reads {self.read(pictures[0])[0]}'] * asked}</analysis><score>{scores}</score></description>"


async def _serve(port: int, ready: Path) -> None:
    from aiohttp import web

    judge, reading = ReadingJudge(), asyncio.Lock()

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in MODELS]})

    async def chat(request: web.Request) -> web.Response:
        body = await request.json()
        parts = body["messages"][-1]["content"]
        pictures = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        async with reading:
            text = await asyncio.to_thread(judge.answer, parts[-1]["text"], pictures)
        message = {"role": "assistant", "content": text}
        return web.json_response({"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application(client_max_size=1 << 26)
    app.add_routes([web.get("/health", health), web.get("/v1/models", models), web.post("/v1/chat/completions", chat)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    address: tuple[str, int] = runner.addresses[0]
    ready.write_text(f"http://{address[0]}:{address[1]}\n")
    await asyncio.Event().wait()


def main() -> int:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(prog="python -m lit_rl.demo.judge", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="0: any free one (default)")
    parser.add_argument("--ready-file", type=Path, required=True, help="gets the address once it answers")
    args = parser.parse_args()
    asyncio.run(_serve(args.port, args.ready_file))
    return 0


if __name__ == "__main__":
    sys.exit(main())

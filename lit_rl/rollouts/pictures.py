"""Pictures in requests to inference servers."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from io import BytesIO

from torch import Tensor

from lit_rl.policies.base import TokenPolicy
from lit_rl.rollouts.base import Request
from lit_rl.rollouts.dialects import Asked, Body, Unusable


def asked_of(request: Request, policy: TokenPolicy) -> Asked:
    """A request as dialects send it."""
    if not request.media:
        return Asked(request.prompt, banned=policy.banned_ids)
    urls = [data_url(picture) for picture in request.media]
    return Asked(policy.one_place_each(request.prompt), urls, policy.banned_ids, chat_of(request.row, urls, policy))


@lru_cache(maxsize=64)  # siblings share their pictures
def data_url(picture: Tensor) -> str:
    """A picture uint8 "3 H W" as a `data:` URL that loses nothing."""
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def chat_of(row: Mapping[str, object], urls: Sequence[str], policy: TokenPolicy) -> Body:
    """The conversation of a row as a chat request has it, with the pictures as content parts; empty where the row has none.

    A conversation that ends in a message of the assistant's is continued there, as `policies.chat.prompt_ids` does it.
    """
    turns = row.get("prompt")
    if not isinstance(turns, list) or not turns:
        return {}
    left = iter(urls)
    messages = [{**turn, "content": _parts(turn["content"], left)} if isinstance(turn.get("content"), list) else turn for turn in turns]
    continued = turns[-1]["role"] == "assistant"
    how = {"add_generation_prompt": not continued, "continue_final_message": continued}
    tools = {"tools": row["tools"], "tool_choice": "none"} if row.get("tools") else {}
    template = getattr(policy, "chat_template_kwargs", None)
    return {"messages": messages, **how, **tools} | ({"chat_template_kwargs": dict(template)} if template else {})


def _parts(content: Sequence[Body], urls: Iterator[str]) -> list[Body]:
    return [{"type": "image_url", "image_url": {"url": next(urls)}} if part["type"] == "image" else part for part in content]


def check_prompt(request: Request, told: Sequence[int] | None, policy: TokenPolicy) -> None:
    """Raise Unusable where a server reads a prompt with images otherwise than the trainer."""
    if not request.media:
        return
    if told is None:
        raise Unusable(
            "it does not tell the tokens of a prompt with images (vLLM: return_token_ids; SGLang from 0.5.13 on: return_prompt_token_ids), "
            "to compare them: update it"
        )
    if list(told) == list(request.prompt):
        return
    sizes = ", ".join(f"{picture.shape[2]} x {picture.shape[1]}" for picture in request.media)
    read = f"it reads a prompt with images of {sizes} pixels as {len(told)} tokens, and the trainer as {len(request.prompt)}"
    if list(policy.one_place_each(told)) == list(policy.one_place_each(request.prompt)):
        raise Unusable(
            f"{read}, which differ in the images alone: serve the trainer's model folder with its preprocessor_config.json, and without "
            "--mm-processor-kwargs; set model.policy.min_pixels and max_pixels to what the server has, max_pixels at least three times as "
            "many (nearer limits resize a picture anew each time)"
        )
    at = next((i for i, (a, b) in enumerate(zip(told, request.prompt)) if a != b), min(len(told), len(request.prompt)))
    raise Unusable(
        f"{read}, which differ from token {at} on: serve the trainer's model folder with its chat template, and leave "
        "model.policy.chat_template out; or set engine.dialect to vllm (with --enable-scale-out), which takes tokens"
    )

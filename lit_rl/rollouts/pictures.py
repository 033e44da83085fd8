"""Pictures in requests to inference servers."""

from __future__ import annotations

import base64
from functools import lru_cache
from io import BytesIO

from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.policies.base import TokenPolicy
from lit_rl.rollouts.base import Request
from lit_rl.rollouts.dialects import Answer, Asked, Dialect, Unusable


def asked_of(request: Request, policy: TokenPolicy, dialect: Dialect) -> Asked:
    """A request as a dialect sends it. Raises ConfigError for images where it sends none."""
    if request.media and not dialect.sends_pictures:
        raise ConfigError("engine.dialect sends no images: start vLLM with --enable-scale-out, and set engine.dialect to vllm")
    return Asked(policy.one_place_each(request.prompt), [data_url(picture) for picture in request.media], policy.banned_ids)


@lru_cache(maxsize=64)  # siblings share their pictures
def data_url(picture: Tensor) -> str:
    """A picture uint8 "3 H W" as a `data:` URL that loses nothing."""
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def check_prompt(request: Request, answer: Answer) -> None:
    """Raise Unusable where a server reads a prompt with images otherwise than the trainer."""
    if not request.media or answer.finish == "abort":
        return
    if answer.prompt is None:
        raise Unusable("it does not tell the tokens of a prompt with images (return_token_ids), to compare them: update vLLM")
    if list(answer.prompt) != list(request.prompt):
        sizes = ", ".join(f"{picture.shape[2]} x {picture.shape[1]}" for picture in request.media)
        raise Unusable(
            f"it reads a prompt with images of {sizes} pixels as {len(answer.prompt)} tokens, and the trainer as {len(request.prompt)}: "
            "serve the trainer's model folder with its preprocessor_config.json, and without --mm-processor-kwargs"
        )

"""The page that Prometheus reads."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from lit_rl.platform.prometheus import text
from lit_rl.platform.service import Here

router = APIRouter(tags=["system"])


@router.get("/metrics")
def metrics(here: Here) -> Response:
    """Jobs, their newest numbers and the machine's GPUs in Prometheus' text format."""
    return Response(text(here.store), media_type=CONTENT_TYPE_LATEST)

"""The service as an application of ASGI."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from lit_rl.net.guards import ApiError
from lit_rl.platform.answers import answer_error
from lit_rl.platform.guard import Guard
from lit_rl.platform.routes import jobs, live, models, reports, samples, scraping, system
from lit_rl.platform.service import Service
from lit_rl.platform.settings import Settings, token_of

PAGE = Path(__file__).parent / "page"
ROUTERS = (system.router, scraping.router, models.router, jobs.router, reports.router, samples.router, live.router)


def create_app(settings: Settings, *, page: Path = PAGE) -> FastAPI:
    """The service on a data folder, with its page where `page` has one. Raises ValueError where another server works in the folder."""
    settings.data.mkdir(parents=True, exist_ok=True)
    settings = settings if settings.token else replace(settings, token=token_of(settings.data))
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.close()

    app = FastAPI(  # without their pages, which load scripts from elsewhere
        title="lit-rl platform", version=system.VERSION, openapi_url="/api/openapi.json", docs_url=None, redoc_url=None, lifespan=lifespan
    )
    app.state.service = service
    for router in ROUTERS:
        app.include_router(router)
    for kind in (ApiError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer_error)
    _show(app, page)
    app.add_middleware(Guard, settings=settings)
    return app


def _show(app: FastAPI, page: Path) -> None:
    """Serve the built page: its first file at /, the rest below /assets."""

    def first(_: object) -> Response:
        index = page / "index.html"
        return (
            FileResponse(index, headers={"cache-control": "no-cache"}) if index.is_file() else PlainTextResponse("The page is not built.")
        )

    app.router.routes.append(Route("/", first))
    if (page / "assets").is_dir():
        app.router.routes.append(Mount("/assets", StaticFiles(directory=page / "assets")))

"""Loggers that show a run on a page: Weights & Biases, SwanLab and trackio, all offline unless asked. Several can log one run."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_rl.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from swanlab.sdk.internal.run import Run
    from trackio.run import Run as TrackioRun

Mode = Literal["online", "offline", "disabled"]
PROJECT = "lit-rl"


class WandB(WandbLogger):
    """Weights & Biases, through Lightning's own logger. `wandb sync FOLDER` uploads what was logged offline.

    Args:
        project: by default the environment's WANDB_PROJECT, else lit-rl.
        name: of the run; by default the environment's WANDB_RUN_NAME, else the run's name here.
        mode: online, offline or disabled; by default the environment's WANDB_MODE, else offline. Online it needs WANDB_API_KEY.
        save_dir: Folder that gets a folder `wandb`; the command line fills in the run's.
        entity: Team or user whose project it is.
        id: of a run of theirs that this one continues.
        tags: of the run.
    """

    def __init__(
        self,
        *,
        project: str | None = None,
        name: str | None = None,
        mode: Mode | None = None,
        save_dir: str | None = None,
        entity: str | None = None,
        id: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        _check("wandb", mode)
        super().__init__(
            name=name, save_dir=save_dir or ".", id=id, project=project or PROJECT, entity=entity, tags=list(tags), mode=mode or "offline"
        )


class SwanLab(Logger):
    """SwanLab, through its own logger for Lightning. `swanlab sync FOLDER` uploads what was logged offline.

    Args:
        project: by default the environment's SWANLAB_PROJ_NAME, else lit-rl.
        name: of the run; by default the environment's SWANLAB_EXP_NAME, else the run's name here.
        mode: online, offline or disabled; by default the environment's SWANLAB_MODE, else offline. Online it needs SWANLAB_API_KEY.
        save_dir: Folder that gets a folder `swanlog`; the command line fills in the run's.
        workspace: Organization or user whose project it is.
        id: of a run of theirs that this one continues.
        tags: of the run.
    """

    def __init__(
        self,
        *,
        project: str | None = None,
        name: str | None = None,
        mode: Mode | None = None,
        save_dir: str | None = None,
        workspace: str | None = None,
        id: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        super().__init__()
        _check("swanlab", mode)
        from swanlab.integration.pytorch_lightning import SwanLabLogger

        folder = save_dir or "."
        self._theirs = SwanLabLogger(
            project=project or PROJECT, workspace=workspace, mode=mode or "offline", log_dir=f"{folder}/swanlog", save_dir=folder, id=id,
            tags=list(tags), resume="allow" if id else None, **({"name": name} if name else {}),
        )  # fmt: skip

    @property
    def name(self) -> str:
        """Their name of loggers for Lightning."""
        return self._theirs.name

    @property
    def version(self) -> str | None:
        """The run's id, as soon as there is one."""
        return self._theirs.version

    @property
    def save_dir(self) -> str | None:
        """The folder that gets a folder `swanlog`."""
        return self._theirs.save_dir

    @property
    def experiment(self) -> Run:
        """The run; on the first process it begins here."""
        return self._theirs.experiment

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, object] | Namespace) -> None:
        """Show options of the run as its configuration."""
        self._theirs.log_hyperparams(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Show numbers under a step."""
        self._theirs.log_metrics(metrics, step)

    @rank_zero_only
    def log_image(self, key: str, images: list[Picture], step: int | None = None, *, caption: Sequence[str]) -> None:
        """Show pictures under a step, each with its caption."""
        self._theirs.log_image(key, images, step, caption=list(caption))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Tell a failed end."""
        self._theirs.finalize(status)


class Trackio(Logger):
    """trackio: a database on this machine, in $TRACKIO_DIR or the cache of Hugging Face. `trackio show --project PROJECT` serves its page.

    A run that continues goes on under the same name.

    Args:
        project: The project, whose runs the page compares.
        name: of the run; the command line fills in the run's name here.
        space_id: A Space of Hugging Face that gets the run in place of this machine, as user/name; it wants a login.
        group: Runs of one group are shown and hidden together.
    """

    def __init__(self, *, project: str = PROJECT, name: str | None = None, space_id: str | None = None, group: str | None = None) -> None:
        super().__init__()
        _check("trackio", None)
        self._options: dict[str, Any] = {"project": project, "name": name, "space_id": space_id, "group": group}
        self._config: dict[str, object] = {}
        self._run: TrackioRun | None = None

    @property
    def name(self) -> str | None:
        """The project."""
        return str(self._options["project"])

    @property
    def version(self) -> str | None:
        """The run's name."""
        return self._options["name"] if self._run is None else self._run.name

    @property
    def experiment(self) -> TrackioRun:
        """The run; it begins here."""
        if self._run is None:
            import trackio

            self._run = trackio.init(**self._options, config=self._config, resume="allow", embed=False, auto_log_cpu=False)
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, object] | Namespace) -> None:
        """Keep options of the run as its configuration, with which it begins."""
        self._config |= vars(params) if isinstance(params, Namespace) else params

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Show numbers under a step."""
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def log_image(self, key: str, images: list[Picture], step: int | None = None, *, caption: Sequence[str]) -> None:
        """Show pictures under a step, each with its caption."""
        import trackio

        shown = {f"{key}/{i}": trackio.Image(image, caption=said) for i, (image, said) in enumerate(zip(images, caption, strict=True))}
        self.experiment.log(shown, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what waits."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def _check(package: str, mode: str | None) -> None:
    if mode not in (None, *get_args(Mode)):
        raise ConfigError(f"mode: {mode!r} of {package} is none of {', '.join(get_args(Mode))}")
    if find_spec(package) is None:
        raise ConfigError(f"{package} is not installed: run `make setup`, or `pip install '.[trackers]'`, or leave its logger out")

"""Whether the weights in a checkpoint are those that a run needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lit_rl.errors import ConfigError, listed


def check_layout(stored: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> None:
    """Every wanted weight is stored, in its shape. Arguments: shape by name; more may be stored, e.g. the base weights of a LoRA run.

    Raises ConfigError that names the first weights which are missing or have another shape.
    """
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise ConfigError(
            f"the checkpoint lacks {len(missing)} of the {len(wanted)} weights of this run: {listed(missing)}; "
            "continue with the model.init_args.policy it was written with (pretrained, lora, keep_reference)"
        )
    other = [name for name, shape in wanted.items() if list(stored[name]) != list(shape)]
    if other:
        shapes = [f"{name} is {list(stored[name])} there and {list(wanted[name])} here" for name in other]
        raise ConfigError(
            f"{len(other)} of {len(wanted)} weights have another shape in the checkpoint: {listed(shapes)}; "
            "continue with the model.init_args.policy it was written with (pretrained, lora.rank, lora.targets)"
        )

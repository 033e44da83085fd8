"""Makes the file of an RL run that DeepGen's supervised trainer and inference load: `torch.save` of tensors by name, nothing renamed.

    python -m lit_rl.checkpoints.rl_to_sft --rl_checkpoint checkpoint-50 --output rl.pth [--base PRE_RL.pth] [--folder FOLDER]

RL leaves the language model's adapter out of what it saves. --base lays the result over the file from before RL, so that it stands alone;
without it `load_state_dict(..., strict=False)` belongs behind the loading of that file, as DeepGen's guide has it. --folder also writes a
folder whose transformer, vae and scheduler diffusers loads, and which a run takes as `pretrained` and as `checkpoint` of its policy.
Weights are copied from file to file, in memory is one tensor, or one shard of the folder, at a time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_rl.errors import ConfigError
from lit_rl.net.environment import DEEPGEN, variable_of

if TYPE_CHECKING:
    from torch import Tensor

SHARD = "2GB"
WITHOUT_ADAPTER = (
    "it has no adapter of the language model, which RL does not save: load it over the file from before RL with strict=False, or convert "
    "with --base $CHECKPOINT"
)


def convert(rl_checkpoint: Path, output: Path, *, base: Path | None = None) -> tuple[Path, dict[str, int]]:
    """Write `output`, which gets `.pth` at its end, and return it with the number of tensors by part. Raises ConfigError."""
    import torch

    from lit_rl.checkpoints.deepgen_tensors import rl_tensors
    from lit_rl.checkpoints.replacing import atomic_file, naming

    output = output if output.suffix == ".pth" else output.with_name(f"{output.name}.pth")
    for source in (rl_checkpoint, base):
        if source is not None and output.exists() and source.exists() and output.samefile(source):
            raise ConfigError(f"--output {output} is what is read: name another file")
    tensors = rl_tensors(rl_checkpoint)
    if base is not None:
        tensors = laid_over(tensors, rl_tensors(base), what=f"--base {base}")
    with naming(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(output) as file:
            torch.save(OrderedDict(tensors), file)
    return output, parts(tensors)


def laid_over(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], *, what: str) -> dict[str, Tensor]:
    """The base's tensors under its names, those of RL in their places, and behind them those of RL that it lacks.

    Names are compared as DeepGen's loader reads them. Raises ConfigError for a shape that differs.
    """
    from lit_rl.checkpoints.deepgen import old_name

    trained = {old_name(name): tensor for name, tensor in tensors.items()}
    if len(trained) < len(tensors):
        raise ConfigError("the RL checkpoint names a weight twice, with and without a wrapper's name: one of them would be lost")
    found: dict[str, Tensor] = {}
    for name, tensor in base.items():
        new = trained.pop(old_name(name), tensor)
        if new.shape != tensor.shape:
            raise ConfigError(f"{what}: {name} is {list(tensor.shape)} there and {list(new.shape)} after RL: it is of another model")
        found[name] = new
    return found | trained


def write_folder(file: Path, sd3: Path, folder: Path) -> None:
    """Write a folder with `transformer`, `vae` and `scheduler`, and the other weights beside them. Raises ConfigError.

    file: what `convert` has written. sd3: where the transformer's configuration and the other two come from.
    """
    from huggingface_hub import save_torch_state_dict

    from lit_rl.checkpoints.deepgen import split_parts
    from lit_rl.checkpoints.deepgen_tensors import rl_tensors

    if missing := [name for name in ("transformer/config.json", "vae", "scheduler") if not (sd3 / name).exists()]:
        raise ConfigError(f"--sd3 {sd3} has no {', '.join(missing)}: give the folder that the run had as `pretrained`")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--folder {folder} is there already: name a new folder")
    state = rl_tensors(file)
    transformer = split_parts(state).transformer
    if not transformer:
        raise ConfigError(f"{file} holds no transformer: give --base a file that does, or convert a run that trained it")
    for part in ("vae", "scheduler"):
        shutil.copytree(sd3 / part, folder / part)
    (folder / "transformer").mkdir()
    shutil.copy(sd3 / "transformer" / "config.json", folder / "transformer")
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    save_torch_state_dict(transformer, folder / "transformer", filename_pattern=pattern, max_shard_size=SHARD)
    rest = {name: tensor for name, tensor in state.items() if "transformer." not in name}
    save_torch_state_dict(rest, folder, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD)


def parts(names: Mapping[str, object]) -> dict[str, int]:
    """Number of tensors by the first word of their names, as DeepGen's loader reads them."""
    from lit_rl.checkpoints.deepgen import old_name

    found: dict[str, int] = {}
    for name in names:
        first = old_name(name).split(".")[0]
        found[first] = found.get(first, 0) + 1
    return found


def parser() -> argparse.ArgumentParser:
    """The options, the guide's own and three more."""
    p = argparse.ArgumentParser(
        prog="python -m lit_rl.checkpoints.rl_to_sft", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--rl_checkpoint", "-i", required=True, type=Path, help="checkpoint of a run, or export of one: a folder or a file")
    p.add_argument("--output", "-o", required=True, type=Path, help="the file to write; .pth is added")
    p.add_argument("--quiet", "-q", action="store_true", help="print nothing but errors")
    p.add_argument("--base", type=Path, help="DeepGen's file from before RL, whose other weights the output then has too")
    p.add_argument("--folder", type=Path, help="also write a new folder for diffusers and for `cli.py predict`")
    p.add_argument(
        "--sd3", type=Path, help="folder that --folder takes configuration, vae and scheduler from; default: $SD3_5_MODEL_NAME_OR_PATH"
    )
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, and say what is in the file."""
    args = parser().parse_args(argv)
    sd3 = str(args.sd3 or os.environ.get(variable_of(DEEPGEN, "pretrained"), ""))
    try:
        if args.folder and not sd3:
            raise ConfigError(f"--folder needs --sd3, or {variable_of(DEEPGEN, 'pretrained')} in the environment")
        output, found = convert(args.rl_checkpoint.expanduser(), args.output.expanduser(), base=args.base and args.base.expanduser())
        if args.folder:
            write_folder(output, Path(sd3).expanduser(), args.folder.expanduser())
    except (ConfigError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
    if not args.quiet:
        print(f"{output}: " + ", ".join(f"{number} of {part}" for part, number in sorted(found.items())))
        if "lmm" not in found:
            print(WITHOUT_ADAPTER)


if __name__ == "__main__":
    main()

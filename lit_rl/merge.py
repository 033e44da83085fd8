"""Makes one model of a LoRA adapter and its base, or of several models or adapters, or of the best checkpoint of a run.

python -m lit_rl.merge ADAPTER --out FOLDER [--base MODEL] [--dtype bfloat16]
python -m lit_rl.merge INPUT INPUT ... --method linear|slerp|task_arithmetic|ties|dare_linear|dare_ties|lora --out FOLDER [--weights 7 3]
python -m lit_rl.merge RUN --best val/reward [--mode min] [--top 3] --out FOLDER [--base MODEL]

ADAPTER: a folder in PEFT's format, or a LoRA file (or its folder) that diffusers reads. The base is the one that the adapter names, unless
--base gives another. Weights keep the precision of the base's files; one layer after the other is merged in place, so the memory taken is
that of the base. Large models are written in several files.

INPUT: checkpoints of runs (.ckpt, folders of FSDP2 or DeepSpeed), exports, folders of transformers, diffusers or PEFT; models or adapters.
Tensors are read and written one after the other. --base: what task_arithmetic, ties and DARE take differences from, and whose
configuration and tokenizer checkpoints get. RUN: a folder of checkpoints, or checkpoints, of which the best by a logged metric becomes a
model, or the average of the --top best ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def merge(adapter: Path, out: Path, *, base: str | None = None, dtype: str | None = None) -> Path:
    """Write `out`, which must not hold anything yet, and return it. Raises ConfigError for what cannot be read or does not fit."""
    from lit_rl.errors import ConfigError

    if not adapter.exists():
        raise ConfigError(f"no such adapter {str(adapter)!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is there already: name a new folder")
    if (adapter / "adapter_config.json").is_file():
        _merge_language(adapter, out, base, dtype)
    else:
        _merge_pipeline(adapter, out, base, dtype)
    return out


def _merge_language(adapter: Path, out: Path, base: str | None, dtype: str | None) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    from lit_rl.policies.language_model import check_folder, read_lm, save_lm, save_processors
    from lit_rl.policies.weights.language_lora import adapter_fields, merged

    base = check_folder(_base(base, adapter_fields(adapter), adapter))
    lm = merged(read_lm(base, dtype=dtype or "auto", attention=None), adapter)
    if (adapter / "generation_config.json").is_file():  # the ends of text that it was trained with
        lm.generation_config = GenerationConfig.from_pretrained(adapter)
        lm.config.eos_token_id = lm.generation_config.eos_token_id
    save_lm(lm, out)
    save_processors(base, out)
    source = adapter if (adapter / "tokenizer_config.json").is_file() else Path(base)
    if not source.is_dir() or any(source.glob("tokenizer*")):
        AutoTokenizer.from_pretrained(str(source)).save_pretrained(out)


def _merge_pipeline(adapter: Path, out: Path, base: str | None, dtype: str | None) -> None:
    import diffusers

    import lit_rl.miniatures.pixel_vae  # noqa: F401  (diffusers looks it up among the imported modules)
    from lit_rl.errors import ConfigError
    from lit_rl.policies.weights.adapters import tuner_layers
    from lit_rl.policies.weights.pipeline_lora import adapter_file, adapter_metadata

    file = adapter_file(adapter)
    base = _base(base, adapter_metadata(file), adapter)
    folder = Path(base).expanduser()
    where = str(folder) if folder.exists() else base
    try:
        index = diffusers.DiffusionPipeline.load_config(where)
        absent = {name: None for name, part in index.items() if isinstance(part, list | tuple) and part[0] is None}
        precise = {"default": dtype} if dtype else {**{name: _stored(folder / name) for name in index if (folder / name).is_dir()}}
        dtypes = {name: kind for name, kind in precise.items() if kind}
        pipe = diffusers.DiffusionPipeline.from_pretrained(where, dtype=_torch(dtypes), **absent)
        pipe.load_lora_weights(str(file))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"{str(file)!r} cannot be added to {where}: {error}") from error
    adapted = [name for name, part in pipe.components.items() if hasattr(part, "named_modules") and tuner_layers(part)]
    if not adapted:
        raise ConfigError(f"{str(file)!r} holds nothing that diffusers adds to the {type(pipe).__name__} of {where}")
    pipe.fuse_lora(components=adapted, safe_fusing=True)
    pipe.unload_lora_weights()
    pipe.save_pretrained(out)


def _base(given: str | None, fields: dict[str, object], adapter: Path) -> str:
    from lit_rl.errors import ConfigError

    base = given or fields.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{str(adapter)!r} names no base: give --base MODEL")
    return str(base)


def _stored(component: Path) -> str | None:
    """Precision of the weights in the folder of a pipeline's part, or None where it has none."""
    from lit_rl.checkpoints.tensors import of_safetensors

    for file in sorted(component.glob("*.safetensors")):
        for _, dtype in of_safetensors(component, {"": [file]}).facts.values():
            name = str(dtype).removeprefix("torch.")
            return name if name in DTYPES else None
    return None


def _torch(dtypes: dict[str, str]) -> dict[str, torch.dtype] | None:
    import torch

    return {name: getattr(torch, kind) for name, kind in dtypes.items()} or None


def parser() -> argparse.ArgumentParser:
    """The options of all three forms."""
    p = argparse.ArgumentParser(prog="python -m lit_rl.merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "inputs", type=Path, nargs="+", help="an adapter; or several models, adapters or checkpoints; or a folder of checkpoints"
    )
    p.add_argument("--base", help="folder or hub id; default: the one that the adapter names")
    p.add_argument("--out", required=True, type=Path, help="a new folder")
    p.add_argument("--dtype", choices=DTYPES, help="precision of what is written; default: that of the files")
    p.add_argument("--method", help="linear, slerp, task_arithmetic, ties, dare_linear, dare_ties or lora; needed for several inputs")
    p.add_argument("--weights", type=float, nargs="+", help="one for each input; default: 1")
    p.add_argument("--density", type=float, default=0.5, help="share that ties and DARE keep of each difference")
    p.add_argument("--seed", type=int, default=0, help="of DARE's draws")
    p.add_argument("--best", metavar="METRIC", help="choose among the checkpoints by this metric")
    p.add_argument("--mode", choices=("max", "min"), default="max", help="whether --best is the highest or the lowest value")
    p.add_argument("--whole", action="store_true", help="with --method linear: adapters are added to their base, as by --method lora")
    p.add_argument("--progress", action="store_true", help="print a line for each tensor, for programs that wait")
    p.add_argument("--top", type=int, default=1, help="how many of the best are averaged")
    return p


def run(args: argparse.Namespace) -> Path:
    """Do what the options say. Raises ConfigError."""
    from lit_rl.errors import ConfigError

    places, out = [place.expanduser() for place in args.inputs], args.out.expanduser()
    if args.method is None and args.best is None:
        if len(places) > 1:
            raise ConfigError(f"{len(places)} inputs: say by --method how they become one, e.g. --method linear")
        return merge(places[0], out, base=args.base, dtype=args.dtype)
    from lit_rl.surgery.choosing import best_checkpoints
    from lit_rl.surgery.formulas import Method
    from lit_rl.surgery.inputs import Adapter, open_input
    from lit_rl.surgery.merging import merge as merge_all

    if args.best is not None:
        chosen = best_checkpoints(places, args.best, mode=args.mode, top=args.top)
        for place, value in chosen.items():
            print(f"{place}: {args.best}={value:.6g}")
        places = list(chosen)
    method: Method = args.method or "linear"
    if args.whole and method == "linear" and isinstance(open_input(places[0]), Adapter):
        method = "lora"
    how = {"base": args.base, "density": args.density, "dtype": args.dtype, "seed": args.seed}
    return merge_all(places, out, method=method, weights=args.weights, progress=_print if args.progress else _tell, **how)


def _print(done: int, total: int, name: str) -> None:
    """One line for each tensor."""
    print(f"progress {done}/{total} {name}", flush=True)


def _tell(done: int, total: int, name: str) -> None:
    """One line on a terminal, which is written over."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done}/{total} {name}\033[K" + ("\n" if done == total else ""))


def main(argv: Sequence[str] | None = None) -> None:
    """Merge, and print the folder."""
    from lit_rl.errors import ConfigError

    try:
        print(run(parser().parse_args(argv)))
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()

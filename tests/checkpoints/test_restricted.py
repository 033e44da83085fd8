"""No checkpoint executes anything: each way in which a file can name a function is tried, and what is good is read as before."""

from __future__ import annotations

import io
import os
import pickle
import threading
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lit_rl.checkpoints.files import AtomicCheckpointIO
from lit_rl.checkpoints.restricted import deepspeed_reads_plain_files, load_file, load_shards, read_metadata, stored_shapes
from lit_rl.errors import ConfigError


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


STATE: dict[str, Any] = {
    "state_dict": {"a": torch.arange(6.0).view(2, 3), "half": torch.ones(4, dtype=torch.bfloat16), "empty": torch.zeros(0)},
    "optimizer_0": {"state": {"a": {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "fused": None}]},
}


def folder(path: Path, state: dict[str, Any] = STATE) -> Path:
    dcp.save(state, checkpoint_id=path, no_dist=True)
    return path


def blank() -> dict[str, Any]:
    return {
        "state_dict": {name: torch.zeros_like(value) for name, value in STATE["state_dict"].items()},
        "optimizer_0": {"state": {"a": {"step": torch.tensor(0.0)}}, "param_groups": [{"lr": 1.0, "betas": (0.0, 0.0), "fused": True}]},
    }


# ---------------------------------------------------------------------- FSDP2
def test_a_folder_is_read_as_the_stock_reader_reads_it(tmp_path: Path) -> None:
    good = folder(tmp_path / "good")
    mine, stock = blank(), blank()
    load_shards(mine, good)
    dcp.load(stock, checkpoint_id=good, no_dist=True)
    for name, value in STATE["state_dict"].items():
        assert torch.equal(mine["state_dict"][name], value) and torch.equal(stock["state_dict"][name], value)
    assert mine["optimizer_0"]["param_groups"] == stock["optimizer_0"]["param_groups"] == STATE["optimizer_0"]["param_groups"]
    assert mine["optimizer_0"]["state"]["a"]["step"] == 3
    assert stored_shapes(good) == {"a": [2, 3], "half": [4], "empty": [0]}


def text(value: str) -> bytes:
    """A short string as pickle's protocol 4 writes it."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


def dotted(mark: Path) -> bytes:
    """Python's own `find_class` walks the attributes of what a dotted name begins with."""
    return b"\x80\x04" + text("torch") + text("serialization.os.mkdir") + b"\x93" + text(str(mark)) + b"\x85R."


METADATA_BOMBS: dict[str, Callable[[Path], bytes]] = {
    "os.mkdir": lambda mark: pickle.dumps(Bomb(mark)),
    "protocol 0": lambda mark: f"cos\nmkdir\n(V{mark}\ntR.".encode(),
    "dotted": dotted,
    "eval": lambda mark: f"c__builtin__\neval\n(V__import__('os').mkdir('{mark}')\ntR.".encode(),
    "inst": lambda mark: f"(V{mark}\nios\nmkdir\n.".encode(),
    "torch.load": lambda mark: f"ctorch\nload\n(V{mark}\ntR.".encode(),
}


@pytest.mark.parametrize("kind", METADATA_BOMBS)
def test_metadata_cannot_name_functions(tmp_path: Path, kind: str) -> None:
    mark, place = tmp_path / "executed", folder(tmp_path / "evil")
    content = METADATA_BOMBS[kind](mark)
    (place / ".metadata").write_bytes(content)
    for read in (read_metadata, stored_shapes, lambda f: load_shards(blank(), f)):
        with pytest.raises(ConfigError, match=r"\.metadata names [\w.]+, which would be executed"):
            read(place)
    assert not mark.exists()
    if kind != "torch.load":
        pickle.loads(content)
        assert mark.is_dir()  # it would have been


def test_values_that_are_no_tensors_cannot_name_functions(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    evil = folder(tmp_path / "evil", {"optimizer_0": {"lr": Bomb(mark)}, "w": torch.ones(3)})
    with pytest.raises(ConfigError, match=r"names posix\.mkdir.*--weights_only false"):
        load_shards({"optimizer_0": {"lr": 0.1}, "w": torch.zeros(3)}, evil)
    assert not mark.exists()
    load_shards({"optimizer_0": {"lr": 0.1}, "w": torch.zeros(3)}, evil, trusted=True)
    assert mark.is_dir()


@pytest.mark.parametrize("place", ["../other.distcp", "/etc/passwd", "sub/0.distcp"])
def test_shards_are_beside_their_metadata(tmp_path: Path, place: str) -> None:
    evil = folder(tmp_path / "evil")
    metadata = read_metadata(evil)
    for entry in metadata.storage_data.values():
        entry.relative_path = place
    (evil / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError, match="outside of the folder"):
        read_metadata(evil)


@pytest.mark.parametrize(
    "content", [b"", b"x", os.urandom(300), pickle.dumps({"a": 1}), pickle.dumps(None), b"\x80\x04\x95" + b"\xff" * 30]
)
def test_damaged_metadata_is_told_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    place = folder(tmp_path / "torn")
    (place / ".metadata").write_bytes(content)
    with pytest.raises(ConfigError, match=r"torn/\.metadata cannot be read"):
        read_metadata(place)


def test_a_truncated_or_missing_shard_is_told_in_a_sentence(tmp_path: Path) -> None:
    place = folder(tmp_path / "torn")
    (shard,) = place.glob("*.distcp")
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(ConfigError, match="torn cannot be read"):
        load_shards(blank(), place)
    shard.unlink()
    with pytest.raises(ConfigError, match="torn cannot be read.*No such file"):
        load_shards(blank(), place)


# ---------------------------------------------------------------------- files
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_files_cannot_name_functions(tmp_path: Path, new: bool) -> None:
    mark, file = tmp_path / "executed", tmp_path / "meta.pt"
    torch.save({"epoch": 1, "bomb": Bomb(mark)}, file, _use_new_zipfile_serialization=new)
    for read in (load_file, AtomicCheckpointIO().load_checkpoint) if new else (load_file,):
        with pytest.raises(ConfigError, match=r"meta\.pt names posix\.mkdir"):
            read(file)
    assert not mark.exists()
    load_file(file, trusted=True)
    assert mark.is_dir()


def test_nor_can_a_checkpoint_from_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning reads those with `weights_only=False` unless it is told."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    mark = tmp_path / "executed"
    torch.save({"bomb": Bomb(mark)}, tmp_path / "evil.ckpt")

    class Files(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args: Any) -> None:
            """Nothing on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        io_of_run = AtomicCheckpointIO()
        monkeypatch.setattr("lightning.fabric.plugins.io.torch_io.get_filesystem", lambda path: _There())
        with pytest.raises(ConfigError, match="names posix"):
            io_of_run.load_checkpoint(f"http://127.0.0.1:{server.server_port}/evil.ckpt")  # type: ignore[arg-type]
        server.shutdown()
    assert not mark.exists()


class _There:
    """Stands in for the file system for http, which needs another package: Lightning calls only this method."""

    def exists(self, path: str) -> bool:
        return True


# ---------------------------------------------------------------------- DeepSpeed
def test_deepspeeds_own_reading_is_restricted_too(tmp_path: Path) -> None:
    """Its loaders call `torch.load(..., weights_only=False)`; inside the block they cannot."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    mark, evil, good = tmp_path / "executed", tmp_path / "evil.pt", tmp_path / "good.pt"
    torch.save({"optimizer_state_dict": {"loss_scaler": Bomb(mark)}}, evil)
    torch.save({"loss_scaler": LossScaler(4.0), "zero_stage": ZeroStageEnum(2), "w": torch.ones(2)}, good)
    before = torch.load
    with deepspeed_reads_plain_files():
        read = torch.load(good, weights_only=False)
        assert read["loss_scaler"].cur_scale == 4.0 and read["zero_stage"] == 2 and torch.equal(read["w"], torch.ones(2))
        with pytest.raises(ConfigError, match=r"evil\.pt names posix\.mkdir"):
            torch.load(evil, map_location="cpu", weights_only=False)
        with pytest.raises(ConfigError, match="cannot be read"):
            torch.load(io.BytesIO(b"garbage"), weights_only=False)
    assert not mark.exists() and torch.load is before

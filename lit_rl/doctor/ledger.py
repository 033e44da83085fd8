"""Memory of computations that are only imagined: torch's fake tensors have sizes, and a ledger adds up those that are there at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lit_rl.losses.token_logprobs import CHUNK_ELEMENTS


class Ledger(TorchDispatchMode):
    """Bytes of the tensors that were made inside it and are still there (`now`), and the most at any time (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., object], types: Sequence[type], args: tuple[object, ...] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        for storage in _storages((args, kwargs)):  # what is not known yet was there before
            self._note(storage, 0)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], Tensor) and args[0].is_meta:
            return 1.0  # there is no number in it
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._note(storage, storage.nbytes())
        return result

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(values: object) -> Iterator[torch.UntypedStorage]:
    return (value.untyped_storage() for value in tree_iter(values) if isinstance(value, Tensor))


def _in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A norm as autocast has it computed on a GPU: in float32, where a CPU keeps the lower precision."""

    def computed(*args: object, **kwargs: object) -> Tensor:
        mixed = torch.is_autocast_enabled("cpu")
        return norm(*[a.float() if mixed and isinstance(a, Tensor) else a for a in args], **kwargs)

    return computed


@contextmanager
def imagined(*, gpu: bool) -> Iterator[None]:
    """Inside it new tensors have no memory, and what is computed is computed as on a GPU, or on a CPU: precisions and chunks."""
    chunks = {"cpu": CHUNK_ELEMENTS["other"]} if gpu else {}
    norms = {name: _in_float32(getattr(F, name)) for name in ("layer_norm", "group_norm")} if gpu else {}
    with patch.dict(CHUNK_ELEMENTS, chunks), patch.dict(vars(F), norms), FakeTensorMode():
        yield


def mixed(lower: torch.dtype | None) -> AbstractContextManager[object]:
    """The context of a forward in mixed precision of which `lower` is the lower one; no change for None."""
    return nullcontext() if lower is None else torch.autocast("cpu", dtype=lower)


def imagine(modules: Iterable[nn.Module], *, dtype: torch.dtype | None = None) -> None:
    """Give modules of the meta device fake tensors in place of theirs, for `imagined`. dtype: of all that is floating point, if given."""
    tied: dict[int, nn.Parameter] = {}

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)

    for module in (part for network in modules for part in network.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in tied:
                tied[id(parameter)] = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
            module.register_parameter(name, tied[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, fake(buffer), persistent=name not in module._non_persistent_buffers_set)

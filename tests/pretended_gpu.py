"""What a GPU would wait for, counted in a computation on the CPU.

Tensors made for a device (``device=``) or from such a tensor are pretended to lie on a GPU, here
``cpu:0``; those made without, and copies by ``cpu()``, lie on the host, which is ``cpu``.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import codetr

GPU, HOST = torch.device("cpu", 0), torch.device("cpu")
PACKAGE = Path(codetr.__file__).parent
UPLOADS = ("tensor", "as_tensor", "asarray", "new_tensor")
"""They copy numbers of Python's to the device; Python waits for that."""
READS = ("tolist", "numpy", "__array__")
LOOKS = (
    "aten::nonzero",
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::masked_select",
    "aten::repeat_interleave.Tensor",
    "aten::bincount",
    "aten::equal",
    "torchvision::nms",
)
"""Operators whose result, or its shape, Python waits for."""


class _Looks(TorchDispatchMode):
    """How often these operators ran, also behind indices by masks, and in a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in LOOKS or _by_mask(func.name(), args)
        return func(*args, **(kwargs or {}))


def _by_mask(name: str, args: Any) -> bool:
    """Whether an index is a mask, whose places are to be found; not so to fill with one number."""
    if not name.startswith(("aten::index.Tensor", "aten::index_put")):
        return False
    filled = name.startswith("aten::index_put") and args[2].numel() == 1
    return not filled and any(i is not None and i.dtype == torch.bool for i in args[1])


class PretendedGpu(TorchFunctionMode):
    """Counts in ``waits`` what Python would wait for, by the module and function that asked.

    Only of the package, and not within ``codetr/transfer.py``, whose copies are pinned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self._looks = _Looks()

    def __enter__(self) -> PretendedGpu:
        self._looks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._looks.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        hosts = [_on_host(t) for t in tensors]
        before = self._looks.count
        result = func(*args, **kwargs)
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return HOST if hosts[0] else GPU
        waits, host = self._looks.count - before, bool(hosts) and all(hosts)
        if name in {"cpu", "to"} and (target := _target(name, args, kwargs)):
            host = target == HOST
            waits, result = int(host != hosts[0]), result.clone()
        elif name in UPLOADS:
            host = all(hosts) if hosts else _target(name, args, kwargs) in {None, HOST}
            waits = int(not host)
        elif not tensors:  # filled on the device, if it is to be there
            host = _target(name, args, kwargs) in {None, HOST}
        elif host:
            waits = 0
        elif name in READS or (name in {"__getitem__", "__setitem__"} and any(hosts)):
            waits += 1
        if waits and (place := _place()):
            self.waits[place] += waits
        return iter(_marked([*result], host)) if name == "__iter__" else _marked(result, host)


def _on_host(tensor: Tensor) -> bool:
    return getattr(tensor, "pretended_on_host", False)


def _marked(result: Any, host: bool) -> Any:
    for tensor in result if isinstance(result, (tuple, list)) else (result,):
        if isinstance(tensor, Tensor):
            tensor.pretended_on_host = host  # type: ignore[attr-defined]
    return result


def _target(name: str, args: Any, kwargs: Any) -> torch.device | None:
    """The device that the call names, itself or by a tensor that lies there."""
    if name == "cpu":
        return HOST
    for named in (*args[1:], kwargs.get("device"), kwargs.get("other")):
        if isinstance(named, torch.device):
            return named
        if isinstance(named, Tensor):
            return HOST if _on_host(named) else GPU
    return None


def _place() -> str:
    """``module.function`` of the package that calls; empty where waiting is not its doing."""
    for file, function in _callers():
        if PACKAGE in file.parents:
            return "" if file.stem == "transfer" else f"{file.stem}.{function}"
    return ""


def _callers() -> Iterator[tuple[Path, str]]:
    frame = sys._getframe(2)
    while frame is not None:
        yield Path(frame.f_code.co_filename), frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]

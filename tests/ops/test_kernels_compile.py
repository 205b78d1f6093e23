"""The kernels compile for an H100, to machine code, on machines without one.

A driver stands in for the GPU's: it names the target, and launches nothing.
"""

# ruff: noqa: ARG002, ARG005 - what stands in for a driver ignores what it is told

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_cases import Case, fused, fused_inputs, plain, plain_inputs, with_gradients

from codetr.ops import implementation

triton = pytest.importorskip("triton")
FOUR = ((4, 6), (2, 3), (1, 2), (1, 1))


class AbsentGPU:
    """What Triton asks a driver for, from compiling to launching."""

    def __init__(self) -> None:
        self.launched: list[Any] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            load_binary=lambda *arguments: (1, 1, 64, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: self.launched.append(source.fn.fn.__name__)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AbsentGPU]:
    from codetr.ops import triton_kernels

    if not hasattr(triton_kernels._forward, "device_caches"):
        pytest.skip("kernels are interpreted in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    gpu = AbsentGPU()
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(gpu)
    for kernel in (triton_kernels._forward, triton_kernels._backward):
        kernel.device_caches.clear()
    with implementation("triton"):
        yield gpu
    for kernel in (triton_kernels._forward, triton_kernels._backward):
        kernel.device_caches.clear()
    triton.runtime.driver._active = before


@pytest.mark.parametrize(
    "case",
    [
        Case(FOUR, points=4, heads=8, dtype=torch.bfloat16),
        Case(FOUR[:1], points=1, heads=8, channels=20, dtype=torch.float32),
        Case(FOUR[:1], points=1, heads=1, dtype=torch.float64),
    ],
    ids=str,
)
def test_kernels_compile(gpu: AbsentGPU, case: Case) -> None:
    with_gradients(plain(case), plain_inputs(case), "cpu")
    with_gradients(fused(case), fused_inputs(case), "cpu")
    assert gpu.launched == ["_forward", "_backward"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("levels", [4, 5])
def test_threads_exchange_nothing(gpu: AbsentGPU, levels: int, dtype: torch.dtype) -> None:
    """A tile that changes its layout goes through shared memory, and all threads wait for it."""
    from codetr.ops import triton_kernels

    case = Case((*FOUR, (1, 1))[:levels], points=4, heads=8, dtype=dtype)
    with_gradients(fused(case), fused_inputs(case), "cpu")
    for kernel in (triton_kernels._forward, triton_kernels._backward):
        (compiled,) = kernel.device_caches[0][0].values()
        assert "convert_layout" not in compiled.asm["ttgir"], kernel.fn.__name__


def test_other_sizes_compile_nothing_new(gpu: AbsentGPU) -> None:
    """Every batch of a multi-scale training has maps of its own size."""
    from codetr.ops import triton_kernels

    for width, queries in ((1, 1), (16, 16), (7, 5), (32, 64)):
        case = Case(((2, width),), points=1, heads=1, queries=queries, dtype=torch.float32)
        with implementation("triton"), torch.no_grad():
            fused(case)(*fused_inputs(case))
    assert len(gpu.launched) == 4
    kernels, *_ = triton_kernels._forward.device_caches[0]
    assert len(kernels) == 1


def test_a_kernel_that_does_not_compile_names_the_switch(
    gpu: AbsentGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("ptxas is missing")

    monkeypatch.setattr(gpu.utils, "load_binary", fail)
    case = Case(((2, 3),), points=1, heads=1, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"ptxas.*CODETR_DEFORMABLE_ATTENTION=reference"):
        plain(case)(*plain_inputs(case))

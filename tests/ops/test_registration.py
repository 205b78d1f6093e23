"""What torch.library knows of the operator: tracing, autograd, autocast; and the switch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from attention_cases import (
    SMALL,
    TOLERANCES,
    fused,
    fused_inputs,
    plain,
    plain_inputs,
    with_gradients,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from codetr.ops import deformable_attention, implementation
from codetr.ops.switch import uses_triton
from codetr.structures import Memory
from codetr.transformer.attention import DeformableAttention, SamplingFrame

SHAPES = [(3, 4), (2, 2)]


class Layer(nn.Module):
    """Deformable attention of an encoder, as a module of tensors alone."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = DeformableAttention(channels=16, heads=2, levels=2, points=2)

    def forward(
        self, query: torch.Tensor, points: torch.Tensor, tokens: torch.Tensor, ratios: torch.Tensor
    ) -> torch.Tensor:
        padding = torch.zeros_like(tokens[..., 0], dtype=torch.bool)
        memory = Memory(tokens, SHAPES, padding, ratios)
        return self.attention(query, SamplingFrame.of_points(points, memory), memory)


def layer_inputs() -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    query, tokens = torch.randn(2, 5, 16, generator=draw), torch.randn(2, 16, 16, generator=draw)
    return query, torch.rand(2, 5, 2, generator=draw), tokens, torch.ones(2, 2, 2)


@pytest.mark.parametrize("case", [SMALL[1], SMALL[6], SMALL[8]], ids=str)
def test_operator_is_as_pytorch_demands(case) -> None:
    value, locations, weights = (t.requires_grad_() for t in plain_inputs(case, odd=False))
    sizes = [side for shape in case.shapes for side in shape]
    torch.library.opcheck(
        torch.ops.codetr.deformable_attention.default, (value, sizes, locations, weights)
    )
    grad = value.new_zeros(case.batch, case.queries, case.heads * case.channels)
    torch.library.opcheck(
        torch.ops.codetr.deformable_attention_backward.default,
        (grad, value.detach(), sizes, locations.detach(), weights.detach(), True),
    )


@pytest.mark.parametrize("case", [SMALL[1], SMALL[6], SMALL[8]], ids=str)
def test_fused_operator_is_as_pytorch_demands(case) -> None:
    """Without kernels, too: programs traced on a GPU have it."""
    inputs = tuple(t.nan_to_num().requires_grad_() for t in fused_inputs(case))
    value, *others = inputs
    sizes = [side for shape in case.shapes for side in shape]
    operators = torch.ops.codetr
    torch.library.opcheck(operators.deformable_attention_fused.default, (value, sizes, *others))
    grad = value.new_zeros(case.batch, case.queries, case.heads * case.channels)
    for wanted in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            operators.deformable_attention_fused_backward.default,
            (grad, value.detach(), sizes, *(t.detach() for t in others), *wanted),
        )


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_fused_operator_without_kernels(case) -> None:
    """It computes what the function does, which calls the plain operator where no kernels are."""
    sizes = [side for shape in case.shapes for side in shape]

    def operator(value: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return torch.ops.codetr.deformable_attention_fused(value, sizes, *others)

    inputs = fused_inputs(case)
    with implementation("reference"):
        expected = with_gradients(fused(case), inputs, "cpu")
        actual = with_gradients(operator, inputs, "cpu")
    tolerance = TOLERANCES[case.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


class Calls(TorchDispatchMode):
    """The last argument of every call of an operator's backward."""

    def __init__(self) -> None:
        self.wanted: dict[str, bool] = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.name().endswith("_backward") and "codetr" in function.name():
            name = "fused" if "fused" in function.name() else "plain"
            self.wanted[name] = arguments[7 if name == "fused" else 5]
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("trained", [True, False])
def test_no_gradient_of_a_frozen_value(trained: bool) -> None:
    case = SMALL[1]
    with Calls() as calls:
        for name, (value, *others) in (
            ("plain", plain_inputs(case, odd=False)),
            ("fused", fused_inputs(case)),
        ):
            value.requires_grad_(trained)
            others[-1].requires_grad_()
            sizes = [side for shape in case.shapes for side in shape]
            operators = {
                "plain": torch.ops.codetr.deformable_attention,
                "fused": torch.ops.codetr.deformable_attention_fused,
            }
            operators[name](value, sizes, *others).sum().backward()
            assert (value.grad is not None) == trained
    assert calls.wanted == {"plain": trained, "fused": trained}


def test_compiles_to_one_graph() -> None:
    layer, inputs = Layer(), layer_inputs()
    expected = layer(*inputs)
    gradients = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(compiled, expected)
    actual = torch.autograd.grad(compiled.square().sum(), list(layer.parameters()))
    torch.testing.assert_close(actual, gradients)


def test_export_keeps_it_as_one_node() -> None:
    layer, inputs = Layer(), layer_inputs()
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(
        layer, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs), strict=False
    )
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("codetr.deformable_attention.default") == 1
    others = tuple(torch.cat((t, t)) for t in inputs)
    torch.testing.assert_close(program.module()(*others), layer(*others))


def test_a_program_with_the_fused_operator_runs_without_kernels() -> None:
    """Exported, or compiled, where kernels compute it: no kernel runs while tracing."""
    pytest.importorskip("triton")
    layer, inputs = Layer(), layer_inputs()
    with implementation("triton"):
        program = torch.export.export(layer, inputs, strict=False)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("codetr.deformable_attention_fused.default") == 1
    torch.testing.assert_close(program.module()(*inputs), layer(*inputs))


def test_the_fused_operator_compiles_to_one_graph() -> None:
    case = SMALL[1]
    sizes = [side for shape in case.shapes for side in shape]

    def operator(value: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return torch.ops.codetr.deformable_attention_fused(value, sizes, *others)

    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    inputs = fused_inputs(case)
    torch.testing.assert_close(
        with_gradients(compiled, inputs, "cpu"),
        with_gradients(operator, inputs, "cpu"),
        equal_nan=True,
    )


def test_autocast_leaves_types_alone() -> None:
    """Locations in bf16 would be wrong by whole cells on a large map."""
    case = SMALL[5]
    inputs = plain_inputs(case)
    expected = with_gradients(plain(case), inputs, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        actual = with_gradients(plain(case), inputs, "cpu")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_a_layer_under_autocast_is_close_to_float32() -> None:
    layer, inputs = Layer(), layer_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        result = layer(*inputs)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), layer(*inputs), rtol=0.05, atol=0.05)


def test_choice() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with implementation("reference"):
        assert not uses_triton(cuda)
        with implementation("auto"):
            assert not uses_triton(cpu)
        assert not uses_triton(cuda)
    with pytest.raises(ValueError, match=r"'cuda' is none of auto, reference, triton"):
        implementation("cuda").__enter__()


def test_kernels_are_chosen_on_a_gpu_or_their_absence_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr("codetr.ops.switch.HAS_TRITON", True)
    with implementation("auto"):
        assert uses_triton(cuda)
        monkeypatch.setattr("codetr.ops.switch.HAS_TRITON", False)
        with pytest.warns(UserWarning, match="CODETR_DEFORMABLE_ATTENTION=reference"):
            assert not uses_triton(cuda)
    with implementation("triton"), pytest.raises(RuntimeError, match="pip install triton"):
        uses_triton(cuda)


@pytest.mark.parametrize(
    ("choice", "error"),
    [
        ("fast", "CODETR_DEFORMABLE_ATTENTION: 'fast' is none of auto, reference, triton"),
        ("triton", "CODETR_DEFORMABLE_ATTENTION=reference computes it in plain PyTorch"),
        ("reference", ""),
    ],
)
def test_environment(choice: str, error: str) -> None:
    """A choice that cannot be followed is an error, not another choice: here is no GPU."""
    if choice == "triton":
        pytest.importorskip("triton")
    program = (
        "import torch; from codetr.ops import deformable_attention;"
        "deformable_attention(torch.zeros(1, 1, 1, 4), [(1, 1)], torch.zeros(1, 1, 1, 1, 1, 2),"
        " torch.zeros(1, 1, 1, 1, 1))"
    )
    environment = {**os.environ, "CODETR_DEFORMABLE_ATTENTION": choice, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert error in done.stderr
    assert (done.returncode != 0) == bool(error), done.stderr


def test_plain_import_is_without_triton() -> None:
    program = "import sys, codetr.ops; sys.exit('triton.language' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_neither_gradient_asked_for_nor_computed() -> None:
    case = SMALL[1]
    with torch.inference_mode():
        result = deformable_attention(*_with_shapes(case))
    assert not result.requires_grad


def _with_shapes(case):
    value, *others = plain_inputs(case, odd=False)
    return (value, list(case.shapes), *others)

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from codetr import losses
from codetr.boxes import generalised_iou


@given(st.floats(-20, 20), st.integers(0, 2))
def test_focal_loss_is_the_papers_formula(logit: float, label: int) -> None:
    """Two classes, label 2 is background; in double precision from the definition."""
    logits = torch.tensor([[logit, -logit]])
    p = [1 / (1 + math.exp(-x)) for x in (logit, -logit)]
    expected = 0.0
    for cls in range(2):
        likely, alpha = (p[cls], 0.25) if label == cls else (1 - p[cls], 0.75)
        expected -= alpha * (1 - likely) ** 2 * math.log(max(likely, 1e-45))
    loss = losses.sigmoid_focal_loss(logits, torch.tensor([label]))
    assert loss.item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_focal_loss_counts_rows_by_weight() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 3, 2, 3])
    weighted = losses.sigmoid_focal_loss(logits, labels, torch.tensor([1.0, 0.0, 2.0, 0.0]))
    rows = [losses.sigmoid_focal_loss(logits[i : i + 1], labels[i : i + 1]) for i in (0, 2)]
    torch.testing.assert_close(weighted, rows[0] + 2 * rows[1])


@given(st.floats(-20, 20), st.floats(0, 1), st.integers(0, 2))
def test_quality_focal_loss_is_the_papers_formula(logit: float, quality: float, label: int) -> None:
    """Equation 2 of GFL in double precision: -|y - p|^2 ((1 - y) log(1 - p) + y log p)."""
    logits = torch.tensor([[logit, -logit]])
    expected = 0.0
    for cls, x in enumerate((logit, -logit)):
        y, log_p, log_not_p = quality * (cls == label), -softplus(-x), -softplus(x)
        expected -= (y - math.exp(log_p)) ** 2 * ((1 - y) * log_not_p + y * log_p)
    loss = losses.quality_focal_loss(logits, torch.tensor([label]), torch.tensor([quality]))
    assert loss.item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def test_quality_focal_loss_vanishes_only_at_the_quality() -> None:
    """Its minimum is where the probability is the quality, and background wants none."""
    logits = torch.tensor([[0.4, 1e-9], [1e-9, 1e-9]]).logit()
    labels, quality = torch.tensor([0, 2]), torch.tensor([0.4, 0.7])
    assert losses.quality_focal_loss(logits, labels, quality).item() == pytest.approx(0, abs=1e-9)
    assert losses.quality_focal_loss(logits, labels, quality + 0.1).item() > 1e-3
    weighted = losses.quality_focal_loss(logits + 1, labels, quality, torch.tensor([0.0, 3.0]))
    alone = losses.quality_focal_loss(logits[1:] + 1, labels[1:], quality[1:])
    torch.testing.assert_close(weighted, 3 * alone)


def test_giou_loss_is_torchvisions_but_for_eps() -> None:
    a = torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 9.0, 8.0], [30.0, 30.0, 40.0, 35.0]])
    b = torch.tensor([[2.0, 1.0, 12.0, 9.0], [5.0, 5.0, 9.0, 8.0], [0.0, 0.0, 4.0, 4.0]])
    expected = torchvision.ops.generalized_box_iou_loss(a, b, reduction="sum")
    torch.testing.assert_close(losses.giou_loss(a, b), expected)
    one = losses.giou_loss(a, b, torch.tensor([0.0, 0.0, 0.5]))
    torch.testing.assert_close(one, 0.5 * (1 - generalised_iou(a[2], b[2])))


def test_l1_loss_sums_coordinates() -> None:
    loss = losses.l1_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]]))
    assert loss.item() == 3


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, n: losses.sigmoid_focal_loss(x, torch.full((n,), 4)),
        lambda x, n: losses.quality_focal_loss(x, torch.zeros(n).long(), torch.ones(n)),
        lambda x, n: losses.cross_entropy(x, torch.zeros(n, dtype=torch.int64)),
        lambda x, n: losses.binary_cross_entropy(x[:, 0], torch.ones(n)),
        lambda x, n: losses.l1_loss(x, torch.zeros(n, 4)),
        lambda x, n: losses.giou_loss(x, torch.zeros(n, 4)),
    ],
)
@pytest.mark.parametrize("rows", [0, 3])
def test_losses_are_float32_and_connected(loss, rows: int) -> None:
    """Of low precision inputs, and of none: the gradient exists and is finite."""
    x = torch.randn(rows, 4, dtype=torch.bfloat16, requires_grad=True)
    value = loss(x, rows)
    assert value.dtype == torch.float32
    assert value.isfinite()
    value.backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_distribution_focal_loss_is_the_papers_formula() -> None:
    """-((y_{i+1} - y) log S_i + (y - y_i) log S_{i+1}), equation 6 of GFL."""
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0.0, 1.25, 3.5, 4.9])
    s = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
    rows = []
    for row, y in zip(s, targets.tolist(), strict=True):
        i = math.floor(y)
        rows.append(-((i + 1 - y) * math.log(row[i]) + (y - i) * math.log(row[i + 1])))
    loss = losses.distribution_focal_loss(logits, targets)
    assert loss.item() == pytest.approx(sum(rows), rel=1e-5)
    weights = torch.tensor([2.0, 0.0, 0.5, 1.0])
    weighted = losses.distribution_focal_loss(logits, targets, weights)
    assert weighted.item() == pytest.approx(2 * rows[0] + 0.5 * rows[2] + rows[3], rel=1e-5)


def test_distribution_focal_loss_is_least_at_the_target() -> None:
    """Its minimum is the distribution whose mean is the target (GFL, section 3.2)."""
    logits = torch.zeros(1, 5, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.2)
    for _ in range(400):
        optimizer.zero_grad()
        losses.distribution_focal_loss(logits, torch.tensor([2.3])).backward()
        optimizer.step()
    mean = logits.softmax(1)[0] @ torch.arange(5.0)
    assert mean.item() == pytest.approx(2.3, abs=0.02)


@pytest.mark.parametrize("rows", [0, 2])
def test_gfl_losses_of_no_rows_are_connected(rows: int) -> None:
    x = torch.randn(rows, 4, dtype=torch.bfloat16, requires_grad=True)
    quality = losses.quality_focal_loss(x, torch.full((rows,), 4), torch.zeros(rows))
    distribution = losses.distribution_focal_loss(x, torch.full((rows,), 1.5))
    assert quality.dtype == distribution.dtype == torch.float32
    (quality + distribution).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_quality_focal_loss_without_quality_is_focal_on_the_background() -> None:
    """With quality 0 every logit is told 0, weighted by its own probability (GFL, equation 2)."""
    logits = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    p = logits.sigmoid()
    expected = -(p**2 * (1 - p).log()).sum()
    ours = losses.quality_focal_loss(logits, torch.tensor([0, 2, 1]), torch.zeros(3))
    torch.testing.assert_close(ours, expected)
    q = torch.tensor([0.3])
    one = losses.quality_focal_loss(logits[:1, :1], torch.tensor([0]), q)
    y, s = 0.3, p[0, 0].item()
    formula = -(abs(y - s) ** 2) * ((1 - y) * math.log(1 - s) + y * math.log(s))
    assert one.item() == pytest.approx(formula, rel=1e-5)

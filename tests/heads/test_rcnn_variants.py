"""The second stage with convolutions, one layer and class-agnostic boxes, as the record model's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from codetr.boxes import decode_deltas
from codetr.config import RcnnConfig
from codetr.heads.rcnn import Rcnn
from codetr.structures import Targets

SETTINGS = {"fc_dim": 16, "roi_size": 3, "samples": 16, "finest_scale": 28}
STDS = (0.05, 0.05, 0.1, 0.1)


def rcnn(**settings: object) -> Rcnn:
    torch.manual_seed(0)
    config = RcnnConfig.model_validate({**SETTINGS, **settings})
    made = Rcnn(config, 8, 3, (8, 16), groups=4)
    torch.nn.init.normal_(made.reg.weight, std=0.3)
    return made


def test_convolutions_group_norm_and_one_layer() -> None:
    head = rcnn(convs=2, fcs=1, class_agnostic=True)
    names = {name for name, _ in head.named_parameters()}
    assert names == {
        *(f"convs.{n}.{part}" for n in (0, 1) for part in ("conv.weight", "norm.weight")),
        *(f"convs.{n}.norm.bias" for n in (0, 1)),
        *(f"{layer}.{part}" for layer in ("fc1", "cls", "reg") for part in ("weight", "bias")),
    }
    features = torch.randn(5, 8, 3, 3)
    hidden = features
    for n in range(2):
        conv, norm = head.convs[n].conv, head.convs[n].norm
        hidden = functional.conv2d(hidden, conv.weight, padding=1)
        hidden = functional.group_norm(hidden, 4, norm.weight, norm.bias).relu()
    hidden = functional.linear(hidden.flatten(1), head.fc1.weight, head.fc1.bias).relu()
    logits, deltas = head.predict(features)
    torch.testing.assert_close(logits, functional.linear(hidden, head.cls.weight, head.cls.bias))
    boxes = functional.linear(hidden, head.reg.weight, head.reg.bias)
    torch.testing.assert_close(deltas, boxes[:, None].expand(5, 3, 4))


def test_one_box_for_all_classes_is_the_same_box_for_each() -> None:
    """Losses, gradients and detections of a head that says the same box for every class."""
    one = rcnn(class_agnostic=True, stds=STDS)
    each = rcnn(stds=STDS)
    state = one.state_dict()
    state |= {f"reg.{kind}": torch.cat([state[f"reg.{kind}"]] * 3) for kind in ("weight", "bias")}
    each.load_state_dict(state)
    pyramid = [torch.randn(1, 8, 8, 8), torch.randn(1, 8, 4, 4)]
    proposals = [torch.tensor([[2.0, 2, 30, 30], [10, 10, 50, 40], [0, 0, 9, 9]])]
    targets = [Targets(torch.tensor([[4.0, 4, 32, 30]]), torch.tensor([1]), seed=3)]
    losses = [head(pyramid, proposals, targets).losses for head in (one, each)]
    for name, value in losses[0].items():
        torch.testing.assert_close(value, losses[1][name])
        assert value.item() > 0
    for head, of_head in zip((one, each), losses, strict=True):
        sum(of_head.values()).backward()  # type: ignore[union-attr]
        assert all(p.grad is not None for p in head.parameters())
    split = each.reg.weight.grad.unflatten(0, (3, 4)).sum(0)  # type: ignore[union-attr]
    torch.testing.assert_close(one.reg.weight.grad, split)
    found = [head.detect(pyramid, proposals, [(64, 64)])[0] for head in (one, each)]
    torch.testing.assert_close(found[0].boxes, found[1].boxes)
    assert torch.equal(found[0].labels, found[1].labels)


def test_deltas_are_in_the_configured_units() -> None:
    head = rcnn(stds=STDS, test_nms=1.0)
    pyramid = [torch.randn(1, 8, 8, 8), torch.randn(1, 8, 4, 4)]
    proposals = [torch.tensor([[20.0, 20, 40, 36]])]
    _, deltas = head.predict(head.roi_features(pyramid, proposals).cells)
    expected = decode_deltas(proposals[0][:, None], deltas, STDS)[0]
    found = head.detect(pyramid, proposals, [(64, 64)])[0]
    torch.testing.assert_close(found.boxes[found.labels.argsort()], expected.clamp(0, 64))


@pytest.mark.parametrize("fcs", [0, 3])
def test_other_numbers_of_layers_are_refused(fcs: int) -> None:
    with pytest.raises(ValueError, match="fcs"):
        RcnnConfig(fcs=fcs)

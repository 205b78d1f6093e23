"""COCO's and LVIS's metrics of detections."""

from codetr.metrics.evaluation import Metrics, evaluate
from codetr.metrics.results import to_coco_results

__all__ = ["Metrics", "evaluate", "to_coco_results"]

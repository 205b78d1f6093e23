"""The experiment that faults befall, and what must come of it all the same."""

from __future__ import annotations

import hashlib
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from laboratory import PATIENCE, Laboratory, descendants

from codetr.checkpoint import load_checkpoint
from orchestrator.plan import slug

EPOCHS = 12
EXPERIMENT = f"""
question: What does a fault change?
detector:
  backbone: {{name: tiny, pretrained: false, frozen_stages: -1, frozen_norm: true}}
  transformer: {{embed_dim: 32, ffn_dim: 32, attention_heads: 4, sampling_points: 2,
                encoder_layers: 1, decoder_layers: 2, levels: 3, group_norm_groups: 8}}
  queries: {{count: 20, two_stage: false, box_refinement: false}}
  positive_queries: {{max: 20}}
training: {{epochs: {EPOCHS}, batch_size: 4, learning_rate: 1.0e-3, drop_epochs: [9]}}
data: {{short_sides: [], crop: false}}
arms:
  "K=0": {{detector: {{heads: []}}}}
  "K=1": {{detector: {{heads: [atss]}}}}
profiles:
  laptop: {{about: as small as can be}}
"""
"""Both arms train at the same time, each with one worker."""

LONG_STEPS = 200
LONG = re.sub(r"epochs: \d+", "epochs: 2", EXPERIMENT).replace("epochs: [9]", "epochs: [1]")
"""Epochs of so many steps take many times as long as to leave one."""

SAME = ("arm", "seed", "AP", "AP50", "AP75", "epochs", "status", "trial_id")
"""Columns of the table that a fault must not change; seconds are another matter."""


@dataclass(frozen=True)
class Outcome:
    """What must come out the same: the table, and each arm's final weights."""

    table: list[dict[str, str]]
    weights: dict[str, str]


@dataclass
class FaultLaboratory(Laboratory):
    """Knows what to compare."""

    def last_checkpoint(self, arm: str, name: str = "tiny") -> Path:
        """The last one that the arm's trial has reported; the disk may have a newer one that was
        cut off on its way."""
        import ray.train

        (folder,) = (self.output / name / "trials").glob(f"{arm}.*")
        return Path(ray.train.Result.from_path(str(folder)).checkpoint.path)

    def outcome(self, name: str = "tiny") -> Outcome:
        table = [{column: row[column] for column in SAME} for row in self.rows(name)]
        arms = {path.name.split(".")[0] for path in (self.output / name / "trials").iterdir()}
        return Outcome(table, {arm: fingerprint(self.last_checkpoint(arm, name)) for arm in arms})

    def losses(self) -> dict[str, list[float]]:
        """The mean loss of every epoch, of each arm."""
        client, (_, runs) = self.client(), self.runs()
        return {
            run.data.tags["arm"]: [
                point.value for point in client.get_metric_history(run.info.run_id, "train/total")
            ]
            for run in runs
        }

    def log(self, arm: str, name: str = "tiny") -> str:
        """What the workers of an arm's trial have said."""
        files = [*(self.output / name / "trials").glob(f"{slug(arm)}.*/log.txt")]
        return "".join(file.read_text() for file in files)

    def wait_for(self, arm: str, said: str, name: str = "tiny") -> None:
        """Until the workers of the arm's trial have said that."""
        deadline = time.monotonic() + PATIENCE
        while said not in self.log(arm, name):
            assert time.monotonic() < deadline, self.log(arm, name)
            time.sleep(0.2)

    def require_gone_on(self, before: list[str]) -> None:
        """Trials were started again, and none has trained again what was in safety: whoever starts
        afresh comes to the same end.

        Args:
            before: what the command has printed until the fault.
        """
        told = re.findall(r"(K=\d), seed 0: epoch (\d+)/", "".join(before))
        safe = {arm: int(epoch) for arm, epoch in told}
        assert safe, before
        logs = {arm: self.log(arm) for arm in safe}
        assert any(log.count(" worker(s)\n") > 1 for log in logs.values()), logs
        for arm, log in logs.items():
            trained = [int(epoch) for epoch in re.findall(rf"epoch (\d+)/{EPOCHS}, step", log)]
            assert [n for n in trained if n <= safe[arm]] == [*range(1, safe[arm] + 1)], log

    def require_each_epoch_once(self, uri: str | None = None, epochs: int = EPOCHS) -> None:
        """Two runs, finished, with every epoch once and in order."""
        client, (_, runs) = self.client(uri), self.runs(uri=uri)
        assert sorted(run.data.tags["arm"] for run in runs) == ["K=0", "K=1"]
        assert {run.info.status for run in runs} == {"FINISHED"}
        for run in runs:
            for metric in ("train/total", "val/AP"):
                points = client.get_metric_history(run.info.run_id, metric)
                assert [point.step for point in points] == [*range(1, epochs + 1)]


def fingerprint(folder: Path) -> str:
    """A hash of every bit of a checkpoint's weights."""
    digest = hashlib.sha256()
    for name, value in load_checkpoint(folder).model.items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def actors(process: subprocess.Popen, kind: str) -> list[psutil.Process]:
    """Ray's processes of the command that are actors of this kind."""
    found = []
    for one in descendants(process):
        try:
            if kind in " ".join(one.cmdline()):
                found.append(one)
        except psutil.Error:  # gone meanwhile
            continue
    return found

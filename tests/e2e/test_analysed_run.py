"""``codetr run --analyze`` as its users run it: pages, metrics, and what a second time does."""

import re

import pytest
from laboratory import PATIENCE, Laboratory, read_until
from test_run import EXPERIMENT, interrupt

pytestmark = pytest.mark.e2e

SHORT = EXPERIMENT.replace("epochs: 3", "epochs: 2").replace("drop_epochs: [2]", "drop_epochs: [1]")


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysed")
    laboratory = Laboratory(folder, folder / "runs").prepare(SHORT)
    yield laboratory
    laboratory.clean()


def test_interrupted_while_analysing_and_gone_on_with(laboratory):
    asked = ("--analyze", "all", "--concurrency", "1")
    process = laboratory.start(*asked)
    read_until(process, "^analysing")
    out, survivors = interrupt(process)
    assert process.returncode == 130, out
    assert not survivors
    pages = laboratory.output / "tiny" / "analysis"
    assert not pages.exists()

    code, out = laboratory.run(*asked)
    assert code == 0, out
    assert "epoch 1/2" not in out  # nothing is trained again
    assert "analysis failed" not in out
    for name in ("analysis", "discriminability", "iof-iob", "conflicts", "instability", "queries"):
        assert str(pages / f"{name}.md") in out
        pictures = re.findall(r"\]\((\S+\.png)\)", (pages / f"{name}.md").read_text())
        assert pictures, name
        assert all((pages / picture).stat().st_size > 1000 for picture in pictures)
    overview = (pages / "analysis.md").read_text()
    assert "](by_k.png)" in overview
    assert re.search(r"\| K=2 \| 2 \| [\d.]+ \|( [^|]+ \|)? [\d.]+ \| [\d.]+ \|", overview)

    parents, children = laboratory.runs()
    files = {file.path for file in laboratory.client().list_artifacts(parents[0].info.run_id)}
    assert {"analysis.md", "by_k.png", "conflicts.md", "conflicts_k2.png"} <= files
    k0, k2 = sorted(children, key=lambda run: run.data.tags["arm"])
    for run in (k0, k2):
        assert 0 <= run.data.metrics["analysis/iof-iob/encoder_area"] <= 1
        assert 0 <= run.data.metrics["matching/changed"] <= 1
    assert "analysis/conflicts/kl/query/atss" not in k0.data.metrics
    assert k2.data.metrics["analysis/conflicts/kl/query/atss"] > 0
    assert k2.data.metrics["analysis/queries/positives_per_object/atss"] > 0
    artifacts = {file.path for file in laboratory.client().list_artifacts(k2.info.run_id)}
    assert {"conflicts.npz", "conflicts.json"} <= artifacts

    process = laboratory.start(*asked)
    lines = read_until(process, "MLflow: ")
    assert process.wait(PATIENCE) == 0
    assert not any("starting Ray" in line for line in lines)
    history = laboratory.client().get_metric_history(
        k2.info.run_id, "analysis/conflicts/kl/query/atss"
    )
    assert [point.step for point in history] == [2]

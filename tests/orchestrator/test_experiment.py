from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codetr.config import ConfigError
from orchestrator.experiment import (
    load_experiment,
    merge,
    paper_ap,
    paper_tables,
)
from orchestrator.plan import Options, make_plan

MINIMAL = """
question: Does it work?
arms:
  a: {}
profiles:
  laptop:
    about: small
    data: {dataset: digits}
"""


def write(folder: Path, text: str) -> str:
    path = folder / "own.yaml"
    path.write_text(text)
    return str(path)


def test_ablation_k_stands_beside_table_7():
    experiment = load_experiment("ablation-k")
    assert [paper_ap(experiment, arm) for arm in experiment.arms] == [47.1, 48.7, 49.5]


def test_a_row_of_any_kind_of_table(tmp_path):
    """Rows by name (table 8), columns (12), a cell for each K (3) that may be empty (11)."""

    def ap(table: str, row: str) -> float | None:
        text = f"paper: {{table: {table}}}\n" + MINIMAL.replace("a: {}", f"a: {{paper: {row}}}")
        return paper_ap(load_experiment(write(tmp_path, text)), "a")

    assert ap("table8_single_head", "{row: gfl}") == 46.5
    assert ap("table12_head_convs", "{convs: 4}") == 42.3
    assert ap("table3_strong_baselines", "{detector: dino, backbone: r50, k: 1}") == 51.0
    with pytest.raises(ConfigError, match="has no number"):
        ap("table11_every_branch", "{branch: faster_rcnn, k: 1}")
    with pytest.raises(ConfigError, match="3 rows"):
        ap("table11_every_branch", "{branch: atss}")


def test_the_paper_is_complete():
    tables = paper_tables()
    assert {f"table{n}" for n in range(1, 14)} <= {name.partition("_")[0] for name in tables}


def test_unknown_names_and_keys_name_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'ablation-k'"):
        load_experiment("ablation_k")
    with pytest.raises(ConfigError, match=r"own\.yaml: unknown key 'arm'; did you mean 'arms'"):
        load_experiment(write(tmp_path, MINIMAL.replace("arms:", "arm:")))
    with pytest.raises(ConfigError, match=r"own\.yaml: profiles.*unknown key 'abuot'"):
        load_experiment(write(tmp_path, MINIMAL.replace("about:", "abuot:")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "an experiment is a mapping"),
        ("a: [", "not YAML"),
        (MINIMAL + "    arms: [b]\n", "no arm 'b'"),
        (MINIMAL + "reference: b\n", "reference: no arm 'b' in profile"),
        (MINIMAL + "    seeds: []\n", "seeds"),
        (MINIMAL.replace("a: {}", "a: {paper: {k: 0}}"), "paper: table"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, text, message):
    with pytest.raises(ConfigError, match=r"own\.yaml") as caught:
        load_experiment(write(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        load_experiment("nowhere.yaml")


@pytest.mark.parametrize(
    ("paper", "message"),
    [
        ("{table: table99}", "no table 'table99'"),
        ("{table: table7_number_of_heads}", "2 rows"),
        ("{table: table7_number_of_heads, row: {k: 9}}", "0 rows"),
        ("{table: table7_number_of_heads, row: {k: 1}, column: mAP}", "no column 'mAP'"),
    ],
)
def test_rows_that_the_paper_does_not_have(tmp_path, paper, message):
    row = "{k: 2}" if "2 rows" in message else "{}"
    text = f"paper: {paper}\n" + MINIMAL.replace("a: {}", f"a: {{paper: {row}}}")
    with pytest.raises(ConfigError, match=message):
        paper_ap(load_experiment(write(tmp_path, text)), "a")


def test_own_experiments_come_before_the_shipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "ablation-k.yaml").write_text(MINIMAL)
    (folder / "mine.yaml").write_text(MINIMAL)
    assert load_experiment("ablation-k").question == "Does it work?"
    assert load_experiment("mine").name == "mine"


def test_an_experiment_inherits_sizes_but_not_arms(tmp_path):
    text = "extends: ablation-k\nquestion: Mine?\narms: {a: {}}\ntraining: {clip_norm: 7}\n"
    mine, parent = load_experiment(write(tmp_path, text)), load_experiment("ablation-k")
    assert mine.profiles == parent.profiles
    assert [*mine.arms] == ["a"]
    assert mine.paper is None
    assert mine.training == {"clip_norm": 7}


def test_what_cannot_be_extended(tmp_path):
    path = write(tmp_path, "extends: ablation-q\n" + MINIMAL)
    with pytest.raises(ConfigError, match=r"own\.yaml: extends: no experiment 'ablation-q'"):
        load_experiment(path)
    Path(path).write_text(f"extends: {path}\n" + MINIMAL)
    with pytest.raises(ConfigError, match="extends itself"):
        load_experiment(path)


def test_the_example_of_the_documentation_can_be_planned(tmp_path):
    text = Path(__file__).parents[2].joinpath("docs", "experiments.md").read_text()
    example = text.split("```yaml\n")[1].split("```")[0]
    experiment = load_experiment(write(tmp_path, example))
    plan = make_plan(experiment, Options(profile="laptop"))
    assert [trial.paper_ap for trial in plan.trials[:1]] == [48.7]
    assert plan.trials[-1].detector.heads[0].convs == 0


keys = st.sampled_from("abc")
trees = st.recursive(
    st.dictionaries(keys, st.integers()),
    lambda inner: st.dictionaries(keys, st.integers() | inner),
    max_leaves=8,
)


@given(trees, trees, trees)
def test_merge_is_associative_and_the_upper_layer_wins(a, b, c):
    def leaves(tree, prefix=()):
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {k: v for key, sub in tree.items() for k, v in leaves(sub, (*prefix, key)).items()}

    assert merge(a, {}) == a
    assert merge({}, a) == a
    assert merge(a, a) == a
    assert leaves(b).items() <= leaves(merge(a, b)).items()
    assert merge(merge(a, b), b) == merge(a, b)

import pytest
import yaml

from codetr.config import ConfigError
from orchestrator import clusters
from orchestrator.cli import app
from orchestrator.clusters import open_cluster_file
from orchestrator.share import share


@pytest.fixture
def filled(tmp_path):
    """A function that fills in a shipped file."""

    def fill(name, **changes):
        text = (share("cluster") / f"{name}.yaml").read_text()
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(text.replace("YOUR-", "my-")), **changes}))
        return path

    return fill


@pytest.fixture
def codetr(capsys):
    def call(*words):
        code = app([str(word) for word in words], standalone_mode=False)
        return code, capsys.readouterr().out.strip()

    return call


@pytest.mark.parametrize("name", ["aws", "gcp", "on-premise"])
def test_dry_runs_print_rays_commands(name, filled, codetr):
    path = filled(name)
    assert codetr("cluster", "up", path, "--yes", "--dry-run")[1] == f"ray up --yes {path}"
    assert codetr("cluster", "down", path, "--dry-run")[1] == f"ray down {path}"
    assert codetr("cluster", "ssh", path, "--dry-run")[1] == f"ray attach {path}"
    forwarding = codetr("cluster", "ssh", path, "--forward", "--dry-run")[1]
    assert forwarding == f"ray attach --port-forward 8265 {path}"
    status = codetr("cluster", "status", path, "--dry-run")[1]
    assert status.startswith(f"ray exec {path} ")
    assert "ray status" in status


def test_the_command_runs_and_gives_its_exit_code(filled, codetr, monkeypatch, tmp_path):
    ray = tmp_path / "ray"
    ray.write_text("#!/bin/sh\nexit 7\n")
    ray.chmod(0o755)
    monkeypatch.setattr(clusters.sys, "executable", str(tmp_path / "python"))
    assert codetr("cluster", "up", filled("aws"))[0] == 7
    ray.unlink()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="not installed"):
        codetr("cluster", "up", filled("aws"))


@pytest.mark.parametrize("name", ["aws", "gcp", "on-premise"])
def test_what_is_to_be_filled_in_is_told(name):
    with pytest.raises(ConfigError, match=r"fill in .*YOUR-[A-Z-]+"):
        open_cluster_file(name)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"idle_timeout_minutes": "ten"}, r"idle_timeout_minutes: 'ten' is not of type"),
        ({"max_worker": 3}, "max_worker"),
        ({"head_node_type": "gpus"}, "head_node_type"),
        ({"provider": {"type": "awss"}}, "awss"),
        ({"provider": None}, "Ray refuses it"),
    ],
)
def test_what_ray_refuses_is_one_line(filled, changes, told):
    path = filled("aws", **changes)
    with pytest.raises(ConfigError, match=told) as error:
        open_cluster_file(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_other_files_are_told(tmp_path):
    with pytest.raises(ConfigError, match="no such file or shipped cluster; did you mean"):
        open_cluster_file("on-premises")
    with pytest.raises(ConfigError, match="kubectl apply -f"):
        open_cluster_file("kuberay")
    with pytest.raises(ConfigError, match="kubectl apply -f"):
        open_cluster_file(str(share("cluster") / "kuberay.yaml"))
    with pytest.raises(ConfigError, match="sbatch"):
        open_cluster_file("slurm")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="not a mapping"):
        open_cluster_file(str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        open_cluster_file(str(tmp_path / "broken.yaml"))

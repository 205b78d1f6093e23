"""The cluster files: by Ray's own preparation and schema, by Kubernetes' schema, by shellcheck."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from typer.testing import CliRunner

from orchestrator.cli import app

CLUSTER = Path(__file__).parents[1] / "cluster"
FILES = sorted(CLUSTER.iterdir())
FOR_RAY = [CLUSTER / f"{name}.yaml" for name in ("aws", "gcp", "on-premise")]
KUBERAY, SLURM = CLUSTER / "kuberay.yaml", CLUSTER / "slurm.sbatch"
DOCS = (CLUSTER.parent / "docs" / "clusters.md").read_text()
COMMANDS = re.findall(r"^    (codetr .*?)(?:\s+#.*)?$", DOCS, re.MULTILINE)
STOP = {KUBERAY: "kubectl delete", SLURM: "scancel"}


def name(file: Path) -> str:
    return file.name


def test_all_are_here() -> None:
    assert sorted([*FOR_RAY, KUBERAY, SLURM]) == FILES


@pytest.mark.parametrize("file", FILES, ids=name)
def test_says_what_forgetting_costs_and_how_to_stop(file: Path) -> None:
    header = [line for line in file.read_text().splitlines() if line.startswith("# ")]
    assert any(line.startswith("# Forgotten, it") for line in header)
    (stop,) = [line for line in header if line.startswith("#   stop")]
    assert STOP.get(file, "codetr cluster down") in stop
    assert any(line.startswith("#   start") for line in header)


@pytest.mark.parametrize("file", FOR_RAY, ids=name)
def test_ray_accepts(file: Path) -> None:
    config = prepare_config(yaml.safe_load(file.read_text()))
    validate_config(config)
    assert config["max_workers"] > 0
    assert config["idle_timeout_minutes"] == 10


@pytest.mark.parametrize("file", FOR_RAY, ids=name)
def test_every_port_that_ray_opens_wants_the_token(file: Path) -> None:
    config = yaml.safe_load(file.read_text())
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    assert all(command.startswith("RAY_AUTH_MODE=token ") for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_cloud_workers_are_spot_and_the_head_is_not() -> None:
    aws, gcp = (yaml.safe_load(file.read_text())["available_node_types"] for file in FOR_RAY[:2])
    assert aws["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in aws["head"]["node_config"]
    assert gcp["gpu"]["node_config"]["scheduling"][0]["preemptible"]
    assert "scheduling" not in gcp["head"]["node_config"]


def test_spot_workers_pass_the_notice_on(raycluster: dict) -> None:
    for file, cloud in zip(FOR_RAY[:2], ("aws", "gcp"), strict=True):
        config = yaml.safe_load(file.read_text())
        (watch,) = [c for c in config["worker_start_ray_commands"] if "drain" in c]
        assert f"codetr cluster drain --after-notice {cloud} " in watch
        assert not [c for c in config["head_start_ray_commands"] if "drain" in c]
        shellcheck = Path(sys.executable).with_name("shellcheck")
        done = subprocess.run(
            [shellcheck, "--shell=bash", "-"], input=watch, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
    pod = raycluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    hook = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert hook[:3] == ["codetr", "cluster", "drain"]
    assert int(hook[hook.index("--within") + 1]) < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_exist(command: str, tmp_path: Path, monkeypatch) -> None:
    words = shlex.split(command)[1:]
    length = 1 if words[0] == "run" else 2
    helped = CliRunner().invoke(app, [*words[:length], "--help"], env={"COLUMNS": "200"})
    assert helped.exit_code == 0
    assert all(word in helped.output for word in words if word.startswith("--"))
    if words[0] == "run":
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["codetr", *words, "--dry-run"])
        done = CliRunner().invoke(app, [*words, "--dry-run"], catch_exceptions=False)
        assert "codetr run ablation-k" in done.output


def test_ray_would_refuse_a_mistake() -> None:
    config = yaml.safe_load(FOR_RAY[0].read_text())
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**config, "idle_timeout_minutes": "ten"}))


# ---------------------------------------------------------------------------------- Kubernetes


@pytest.fixture
def raycluster() -> dict:
    return yaml.safe_load(KUBERAY.read_text())


@pytest.fixture(scope="module")
def schema() -> dict:
    return yaml.safe_load((Path(__file__).parent / "raycluster_schema.yaml").read_text())


def test_kuberay_fits_the_raycluster_schema(raycluster: dict, schema: dict) -> None:
    jsonschema.validate(raycluster, schema)
    raycluster["spec"]["workerGroupSpecs"][0]["maxReplica"] = 4
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(raycluster, schema)


def as_pod(group: dict) -> dict:
    template = group["template"]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}


def test_kuberay_pods_fit_kubernetes_schema(raycluster: dict) -> None:
    spec = raycluster["spec"]
    pods = [as_pod(group) for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    for pod in pods:
        kubernetes_validate.validate(pod, "1.33", strict=True)
    pods[0]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pods[0], "1.33", strict=True)


def test_kuberay_volumes_are_mounted_and_the_token_is_wanted(raycluster: dict) -> None:
    spec = raycluster["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        mounted = {mount["name"] for c in pod["containers"] for mount in c["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


# --------------------------------------------------------------------------------------- Slurm

FAKE = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0") $*" >> "$CALLS"
case "$(basename "$0") $1" in
    "scontrol show") printf 'n1\\nn2\\nn3\\n' ;;
    "srun --nodes=1") [[ $* == *hostname* ]] && echo '10.0.0.1 fe80::1' ;;
    "ray status") [[ -z ${NO_RAY:-} ]] || { echo >> "$NO_RAY"; exit 1; } ;;
    "codetr run") if [[ -n ${SLOW:-} ]]; then
        trap 'exit 143' TERM; echo >> "$SLOW"; while :; do sleep 0.1; done
    fi; exit "${CODE:-0}" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path: Path):
    """The script with stand-ins for Slurm, Ray and codetr that write down how they are called."""
    for program in ("scontrol", "srun", "ray", "codetr"):
        (tmp_path / program).write_text(FAKE)
        (tmp_path / program).chmod(0o755)
    (tmp_path / "token").write_text("token")
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "CALLS": str(tmp_path / "calls"),
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_CPUS_PER_TASK": "64",
        "SLURM_GPUS_ON_NODE": "8",
    }

    def start(*arguments: str, **more: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(SLURM), *arguments], env={**environment, **more}, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    return start


def test_slurm_passes_shellcheck() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, SLURM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_slurm_starts_ray_on_every_node_and_runs(slurm, tmp_path: Path) -> None:
    process = slurm("ablation-k", "--seeds", "0,1", CODE="3")
    assert process.wait(60) == 3
    while (written := (tmp_path / "calls").read_text()).count("ray start") < 3:
        time.sleep(0.1)  # they run in the background
    calls = written.splitlines()
    assert "codetr run ablation-k --seeds 0,1 --address 10.0.0.1:23456" in calls
    starts = sorted(call for call in calls if "ray start" in call)
    assert [re.search(r"--nodelist=(\S+)", start)[1] for start in starts] == ["n1", "n2", "n3"]
    assert "--head --node-ip-address=10.0.0.1 --port=23456" in starts[0]
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert all("--address=10.0.0.1:23456" in start for start in starts[1:])
    assert all("--num-cpus=64 --num-gpus=8 --block" in start for start in starts)


def test_slurm_queues_a_preempted_job_again(slurm, tmp_path: Path) -> None:
    process = slurm("ablation-k", SLOW=str(tmp_path / "running"))
    while not (tmp_path / "running").exists():
        assert process.poll() is None
    process.terminate()
    assert process.wait(60) == 143
    assert "scontrol requeue 123456" in (tmp_path / "calls").read_text().splitlines()


def test_slurm_queues_a_job_again_that_is_preempted_while_ray_starts(slurm, tmp_path: Path) -> None:
    process = slurm("ablation-k", NO_RAY=str(tmp_path / "starting"))
    while not (tmp_path / "starting").exists():
        assert process.poll() is None
    process.terminate()
    assert process.wait(60) == 143
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "scontrol requeue 123456" in calls
    assert not [call for call in calls if call.startswith("codetr")]


def test_slurm_wants_an_experiment(slurm) -> None:
    process = slurm()
    assert process.wait(60) == 2
    assert "usage" in process.stderr.read()

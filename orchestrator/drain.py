"""A node that is about to be taken away leaves its Ray cluster in order.

Ray hears nothing of a cloud's notice to a spot machine, nor of a pod's end, before its processes
are killed. Told so with ``ray drain-node``, it has the trials on the node save where they are.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from urllib.error import HTTPError

from codetr.config import ConfigError
from orchestrator.clusters import run_ray
from orchestrator.wording import one_line

_POLL_SECONDS = 2.0
_PATIENCE_SECONDS = 5.0
"""For an answer of the metadata server, which is within the machine's host."""

_AWS, _GCP = "http://169.254.169.254", "http://metadata.google.internal"


def leave(seconds: int, why: str) -> int:
    """Tell Ray that this node goes away in so many seconds, again and again until it has taken note
    or they are over; returns the exit code of its command."""
    end = time.monotonic() + seconds
    while True:
        code = run_ray(
            [
                "ray", "drain-node", "--reason=DRAIN_NODE_REASON_PREEMPTION",
                f"--reason-message={why}",
                f"--deadline-remaining-seconds={max(0, round(end - time.monotonic()))}",
            ]
        )  # fmt: skip
        if code == 0 or time.monotonic() + _POLL_SECONDS >= end:
            return code
        print("Ray has taken no note of it; trying again", flush=True)
        time.sleep(_POLL_SECONDS)


def leave_and_stay(seconds: int) -> int:
    """The same, and keep the caller waiting until then: a pod's processes are ended when this
    returns. With nothing left to do, Ray ends by itself, and so the pod, before that."""
    end = time.monotonic() + seconds
    code = leave(seconds, "the pod ends")
    if code == 0:
        time.sleep(max(0.0, end - time.monotonic()))
    return code


def wait_for_notice(cloud: str) -> int:
    """Wait until the cloud takes this machine away; returns the seconds that are left then.

    Args:
        cloud: ``aws`` or ``gcp``.

    Raises:
        ConfigError: no such cloud.
    """
    clouds: dict[str, tuple[Callable[[str], bool], str, int]] = {
        "aws": (_aws_takes_it, _AWS, 120),
        "gcp": (_gcp_takes_it, _GCP, 30),
    }
    if cloud not in clouds:
        raise ConfigError(f"--after-notice {cloud}: give one of {', '.join(clouds)}")
    is_taken, server, seconds = clouds[cloud]
    told = ""
    while True:
        try:
            if is_taken(server):
                return seconds
        # It is away for a moment, or this is no machine of that cloud.
        except (OSError, HTTPException) as error:
            if (text := one_line(error)) != told:
                print(f"metadata of {cloud}: {text}; trying again", flush=True)
            told = text
        time.sleep(_POLL_SECONDS)


def _aws_takes_it(server: str) -> bool:
    """IMDSv2: what is to be done to a spot instance; there is no such page before that."""
    age = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _ask(f"{server}/latest/api/token", age, method="PUT")
    try:
        _ask(f"{server}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except HTTPError as error:
        if error.code == 404:
            return False
        raise
    return True


def _gcp_takes_it(server: str) -> bool:
    path = "computeMetadata/v1/instance/preempted"
    return _ask(f"{server}/{path}", {"Metadata-Flavor": "Google"}) == "TRUE"


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=_PATIENCE_SECONDS) as answer:
        return str(answer.read().decode().strip())

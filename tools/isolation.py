"""A ROS domain of one's own on this machine only, so that no robot in the building hears a demo or a test."""

from __future__ import annotations

import atexit
import fcntl
import os
import tempfile
from pathlib import Path

DOMAINS = range(20, 100)  # what is left of 0..101 on Linux, without the low ones that people use


def isolate(env: dict[str, str] | os._Environ = os.environ) -> int:
    """Sets the domain and the discovery range in ``env``; call it before rclpy is initialised.

    The domain is locked until this process ends, so that runs side by side do not meet. Returns it. One that
    EDGELLM_TEST_DOMAIN names is taken as it is.
    """
    if (given := env.get("EDGELLM_TEST_DOMAIN")) is not None:
        domain = int(given)
    else:
        domain = _lock_domain()
        env["EDGELLM_TEST_DOMAIN"] = str(domain)  # children belong to this run
    env["ROS_DOMAIN_ID"] = str(domain)
    if env.get("ROS_DISTRO", "jazzy") in ("humble", "iron"):
        env["ROS_LOCALHOST_ONLY"] = "1"
    else:
        env.pop("ROS_LOCALHOST_ONLY", None)
        env["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    return domain


def _lock_domain() -> int:
    for offset in range(len(DOMAINS)):
        domain = DOMAINS[(os.getpid() + offset) % len(DOMAINS)]
        path = Path(tempfile.gettempdir()) / f"edgellm-domain-{os.getuid()}-{domain}.lock"
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            continue
        atexit.register(os.close, file)
        return domain
    raise RuntimeError(f"All ROS domains from {DOMAINS[0]} to {DOMAINS[-1]} are taken by other tests.")

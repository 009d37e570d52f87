"""The doctor's checks of Ray: its token, the upload of a job, and storage from a worker."""

from __future__ import annotations

import os
from pathlib import Path

import ray
from upath import UPath

from qresafe.dist.preflight import Check, Status
from qresafe.dist.upload import LIMIT, measure_upload


def authentication() -> Check:
    """Whether strangers on the network can run code on the cluster."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    has_token = bool(os.environ.get("RAY_AUTH_TOKEN")) or path.is_file()
    if mode and mode != "token":
        remedy = "unset RAY_AUTH_MODE, unless the network is yours alone"
        return Check("ray token", "warn", f"authentication is off (RAY_AUTH_MODE={mode})", remedy)
    if not has_token:
        # Joining a cluster needs its token; a new local cluster makes one of its own.
        remedy = "ray get-auth-token --generate, before `ray start` and `ray job submit`"
        status: Status = "fail" if mode == "token" else "ok"
        return Check("ray token", status, f"no token at {path}", remedy)
    if not os.environ.get("RAY_AUTH_TOKEN") and path.stat().st_mode & 0o077:
        return Check("ray token", "warn", f"{path} is readable by others", f"chmod 600 {path}")
    how = "on" if mode == "token" else "on for local clusters (Ray's default)"
    return Check("ray token", "ok", f"token present, authentication {how}")


def upload_size(working_dir: Path) -> Check:
    """The package that `ray job submit --working-dir` would send, against Ray's limit."""
    upload = measure_upload(working_dir)
    if upload.bytes < LIMIT / 2:
        return Check("job upload", "ok", f"{upload}")
    status: Status = "warn" if upload.fits else "fail"
    detail = f"{upload}; largest: {upload.largest}"
    return Check("job upload", status, detail, "list them in .rayignore")


def storage_from_worker(storage: str, address: str | None) -> Check:
    """A Ray worker writes a file that this process can read: the storage is a shared one.

    Args:
        storage: The experiment's storage.
        address: The cluster's address; None starts a local one (or takes RAY_ADDRESS).
    """
    name = "storage from a worker"
    started = not ray.is_initialized()
    try:
        if started:
            ray.init(address=address, log_to_driver=False, logging_level="error", num_cpus=None)
        folder = UPath(storage).absolute() if "://" not in storage else UPath(storage)
        probe = folder / f".qresafe-worker-probe-{os.getpid()}"
        node = ray.get(ray.remote(_write).remote(str(probe)), timeout=120)
        found = probe.exists() and probe.read_text() == node
        if probe.exists():
            probe.unlink()
    except Exception as error:  # Ray and every file system have errors of their own
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return Check(name, "fail", text, "see the logs that `ray logs` lists, or run --no-ray")
    finally:
        if started and ray.is_initialized():
            ray.shutdown()
    if found:
        return Check(name, "ok", f"a worker on {node} wrote to {storage}")
    remedy = "give a --storage that all nodes share: NFS, s3://, gs://"
    return Check(name, "fail", f"what a worker on {node} wrote is not seen here", remedy)


def _write(path: str) -> str:
    node: str = ray.util.get_node_ip_address()
    target = UPath(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(node)
    return node

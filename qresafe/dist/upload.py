"""What a job sends to the cluster: measured as Ray itself would pack it, before it is sent."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Private, but the only way to ask what Ray itself would pack; the lock pins its version.
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

MIB = 2**20
LIMIT = int(DASHBOARD_CLIENT_MAX_SIZE)  # bytes


@dataclass(frozen=True)
class Upload:
    """The files of a working directory that Ray would send; its archive does not compress.

    Attributes:
        sizes: Path relative to the working directory -> bytes.
    """

    sizes: dict[Path, int]

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())

    @property
    def largest(self) -> str:
        """The three largest files."""
        names = sorted(self.sizes, key=lambda path: -self.sizes[path])[:3]
        return ", ".join(str(path) for path in names)

    @property
    def fits(self) -> bool:
        return self.bytes < LIMIT

    def __str__(self) -> str:
        return f"{self.bytes / MIB:.1f} of {LIMIT / MIB:.0f} MiB, {len(self.sizes)} files"


def measure_upload(working_dir: Path, excludes: Sequence[str] = ()) -> Upload:
    """Weigh what `working_dir` would send, less .gitignore, .rayignore and `excludes`.

    Args:
        working_dir: The folder that the job will run in a copy of.
        excludes: Patterns as in .gitignore.
    """
    root, sizes = working_dir.absolute(), dict[Path, int]()

    def weigh(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(root)] = path.stat().st_size

    quiet = logging.getLogger(f"{__name__}.quiet")
    quiet.disabled = True  # Ray names every ignore file that it finds
    skip = [_get_excludes(root, list(excludes))] if excludes else []
    _dir_travel(root, skip, weigh, include_gitignore=True, logger=quiet)
    return Upload(sizes)

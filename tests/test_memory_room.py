"""Free memory within a container, by files such as the kernel's."""

from __future__ import annotations

from pathlib import Path

from qresafe.memory import container_room, free_memory


def test_a_container_leaves_what_is_not_in_use(tmp_path: Path) -> None:
    assert container_room(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\nfile 300\ninactive_file 250\n")
    assert container_room(tmp_path) == 550  # 1000 - (700 - 250)
    (tmp_path / "memory.current").write_text("1300\n")
    assert container_room(tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert container_room(tmp_path) is None


def test_the_first_version_of_cgroups(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("1000")
    (folder / "memory.usage_in_bytes").write_text("100")
    (folder / "memory.stat").write_text("cache 90\ninactive_file 10")
    assert container_room(tmp_path) == 910


def test_some_memory_is_free_here() -> None:
    assert free_memory() > 0

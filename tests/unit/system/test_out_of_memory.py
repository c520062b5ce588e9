"""Tests of the number of processes that Linux has killed when memory ran out."""

from __future__ import annotations

from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from bfaas.system.out_of_memory import count_kills

EVENTS = "low 0\nhigh 0\nmax 113\noom 9\noom_kill {}\noom_group_kill 8\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"


class CountTests(SynchronousTestCase):
    def count(self, files: dict[str, str]) -> int | None:
        """Return the number that is found among these files of /proc and /sys/fs/cgroup."""
        root = Path(self.mktemp())
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return count_kills(root / "proc", root / "cgroup")

    def test_the_group_of_version_2(self) -> None:
        files = {"proc/self/cgroup": "0::/a/b\n", "cgroup/a/b/memory.events": EVENTS.format(3)}
        self.assertEqual(3, self.count(files))
        self.assertEqual(
            3, self.count(files | {"cgroup/memory.events": EVENTS.format(7), "proc/vmstat": "oom_kill 9\n"})
        )

    def test_the_group_of_version_1_beside_an_empty_one_of_version_2(self) -> None:
        lines = "9:name=systemd:/x\n4:cpu,memory:/a:b/c\n0::/x\n"
        files = {"proc/self/cgroup": lines, "cgroup/memory/a:b/c/memory.oom_control": CONTROL.format(2)}
        self.assertEqual(2, self.count(files))

    def test_in_a_container_the_groups_root_is_its_own(self) -> None:
        for lines, name, text in (
            ("0::/\n", "memory.events", EVENTS),
            ("0::/docker/0a\n", "memory.events", EVENTS),
            ("4:memory:/docker/0a\n0::/docker/0a\n", "memory/memory.oom_control", CONTROL),
        ):
            self.assertEqual(1, self.count({"proc/self/cgroup": lines, f"cgroup/{name}": text.format(1)}))

    def test_in_a_virtual_machine_it_is_the_systems(self) -> None:
        vmstat = "oom_kill_x 4\noom_kill 5\npgpgin 1\n"
        self.assertEqual(5, self.count({"proc/self/cgroup": "0::/\n", "proc/vmstat": vmstat}))
        self.assertEqual(5, self.count({"proc/vmstat": vmstat}))

    def test_without_any_source_it_is_unknown(self) -> None:
        self.assertIsNone(self.count({}))
        self.assertIsNone(
            self.count({"proc/self/cgroup": "0::/a\n", "cgroup/a/memory.events": "oom_kill x\n"})
        )

    def test_this_system_has_a_number(self) -> None:
        kills = count_kills()
        assert kills is not None
        self.assertGreaterEqual(kills, 0)

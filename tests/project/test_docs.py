"""Check the documents against the source: links, names, messages, settings, and the files they mention."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

from twisted.trial.unittest import SynchronousTestCase

from bfaas.basher import Options as BasherOptions
from bfaas.coord import Options as CoordOptions
from bfaas.coordinator.outcome import OutcomeKind
from bfaas.pooling.slot import Phase
from bfaas.settings import CoordSettings
from bfaas.units import parse_duration, parse_size
from tests.support.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATHS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
DOCS = {path.name: path.read_text() for path in PATHS}
MAX_README_LINES = 150


def without_code(text: str) -> str:
    return re.sub(r"(?ms)^```.*?^```$", "", text)


def sections(text: str) -> list[str]:
    return re.findall(r"(?m)^## (.*)$", without_code(text))


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"(?m)^#+ (.*)$", without_code(text))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def column(text: str, number: int = 0) -> Iterator[str]:
    """Return one column of all tables in a text, without headings."""
    for line in re.findall(r"(?m)^\|(?! ---)(.*)\|$", text):
        yield line.split("|")[number].strip()


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def words(text: str) -> str:
    """Return the words of a text alone, for comparison of names that are written in several ways."""
    return " ".join(
        word for word in re.findall(r"[a-z0-9]+", text.lower().replace("'", "")) if word not in ("a", "the")
    )


def section(name: str, title: str) -> str:
    return DOCS[name].partition(f"\n## {title}\n")[2].partition("\n## ")[0]


class LinkTests(SynchronousTestCase):
    def test_links_lead_to_files_and_headings(self) -> None:
        for path in PATHS:
            for target in re.findall(r"\]\((?!http)([^)\s]+)\)", path.read_text()):
                name, _, anchor = target.partition("#")
                file = (path.parent / name).resolve() if name else path
                self.assertTrue(file.exists(), f"{path.name}: {target}")
                if anchor:
                    self.assertIn(anchor, anchors(file.read_text()), f"{path.name}: {target}")

    def test_documents_have_a_table_of_contents(self) -> None:
        for path in (ROOT / "docs").glob("*.md"):
            text = path.read_text()
            listed = re.findall(r"(?m)^\* \[(.*)\]\(#", text.partition("\n## ")[0])
            self.assertEqual(sections(text), listed, path.name)

    def test_readme_is_short_and_links_every_document(self) -> None:
        readme = DOCS["README.md"]
        self.assertLessEqual(len(readme.splitlines()), MAX_README_LINES)
        for path in (ROOT / "docs").iterdir():
            if path.suffix == ".svg":
                self.assertTrue(any(f"({path.name})" in text for text in DOCS.values()), path.name)
            else:
                self.assertIn(f"docs/{path.name}", readme)


class MentionedFileTests(SynchronousTestCase):
    def test_paths_exist(self) -> None:
        for name, text in DOCS.items():
            for path in re.findall(r"`((?:bfaas|tests|docs|benchmarks|twisted)/[\w./-]*)`", text):
                self.assertTrue((ROOT / path).exists(), f"{name}: {path}")

    def test_tests_exist(self) -> None:
        known = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
        for name, text in DOCS.items():
            self.assertEqual(set(), set(re.findall(r"`(test_\w+)`", text)) - known, name)

    def test_modules_exist(self) -> None:
        for name, text in DOCS.items():
            for module in re.findall(r"python -m ((?:bfaas|tests|benchmarks)\.[a-z_.]+)", text):
                self.assertTrue(
                    (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), f"{name}: {module}"
                )

    def test_make_targets_exist(self) -> None:
        targets = set(re.findall(r"(?m)^([a-z0-9-]+):", (ROOT / "Makefile").read_text()))
        for name, text in DOCS.items():
            self.assertEqual(set(), set(re.findall(r"`make ([a-z0-9-]+)", text)) - targets, name)

    def test_every_make_target_is_documented(self) -> None:
        [targets] = re.findall(r"(?m)^\.PHONY: (.*)$", (ROOT / "Makefile").read_text())
        documented = {word for text in code(DOCS["CONTRIBUTING.md"]) for word in text.split()}
        self.assertEqual(set(), set(targets.split()) - documented)

    def test_cases_of_the_threat_model_exist(self) -> None:
        files = [
            "e2e/test_hostile_workers.py",
            "e2e/test_hostile_clients.py",
            "integration/test_hostile_scripts.py",
        ]
        files += ["support/hostile_scripts.py", "support/hostile_worker.py", "e2e/hostile.py"]
        cases = words("".join((ROOT / "tests" / name).read_text() for name in files))
        tables = "\n".join(line for line in DOCS["security.md"].splitlines() if line.startswith("|"))
        tables = re.sub(r"`[^`]*`", "", tables)
        names = re.findall(r"(?<![\\*])\*([^*]+(?:\\\*\\\*[^*]+)?)\*(?![\\*])", tables)
        self.assertGreater(len(names), 60)
        self.assertEqual([], [name for name in names if words(name) not in cases])


class ArchitectureTests(SynchronousTestCase):
    def test_every_package_is_listed(self) -> None:
        table = section("architecture.md", "Packages")
        for path in (ROOT / "bfaas").iterdir():
            if path.suffix == ".py" or (path / "__init__.py").exists():
                self.assertTrue(path.name == "__init__.py" or path.name in table, path.name)

    def test_every_phase_is_explained(self) -> None:
        table = section("architecture.md", "Lifecycle of a machine")
        explained = {word for cell in column(table) for word in cell.split(", ")}
        self.assertEqual({phase.value for phase in Phase}, explained - {"phase"})

    def test_hacks_are_in_the_named_modules(self) -> None:
        rows = re.findall(r"(?m)^\| (`.*?) \| (.*?) \|", section("architecture.md", "Deliberate hacks"))
        self.assertGreater(len(rows), 15)
        for modules, hack in rows:
            paths = [ROOT / "bfaas" / path for path in code(modules)]
            files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])]
            source = "".join(file.read_text() for file in files)
            for text in code(hack):
                self.assertIn(text.removesuffix("()").rpartition(".")[2], source, modules)


class GuaranteeTests(SynchronousTestCase):
    def test_numbers_are_those_of_the_simulation(self) -> None:
        rows = re.findall(r"(?m)^\| (\d+) \|.*\|(.*)\|$", section("guarantees.md", "The guarantees"))
        self.assertEqual(list(range(1, len(rows) + 1)), [int(number) for number, _ in rows])
        source = "".join(path.read_text() for path in (ROOT / "tests" / "simulation").glob("*.py"))
        reported = set(re.findall(r'report\(\s*(?:f?"(\d+):|(\d+),)', source))
        numbers = {first or second for first, second in reported}
        self.assertEqual(numbers, {number for number, tests in rows if "simulation" in tests})


class OperationsTests(SynchronousTestCase):
    def test_every_outcome_and_reason_is_explained(self) -> None:
        table = section("operations.md", "Runs")
        for kind in OutcomeKind:
            self.assertRegex(table, rf"(?m)^\| `{kind.value}( N)?` \|")

    def test_every_metric_is_explained(self) -> None:
        source = (ROOT / "bfaas" / "coordinator" / "metrics.py").read_text()
        names = set(re.findall(r'"(bfaas_\w+)"', source))
        documented = re.findall(r"`(bfaas_\w+)(?:\{([\w,]+)\})?`", section("operations.md", "Metrics"))
        self.assertEqual(names, {name for name, _ in documented})
        for _, labels in documented:
            for label in filter(None, labels.split(",")):
                self.assertIn(f'"{label}"', source)

    def test_every_reason_of_readyz_is_explained(self) -> None:
        source = "".join(path.read_text() for path in (ROOT / "bfaas").rglob("*.py"))
        reasons = re.findall(
            r"(?m)^\| (?:`GET /readyz` )?\| `([a-zA-Z ]+)` \|", section("operations.md", "Health")
        )
        self.assertEqual(6, len(reasons), reasons)
        for reason in reasons:
            self.assertIn(f'"{reason}"', source)


def log_messages() -> set[str]:
    """Return the messages that the program logs, each value in them as a star."""
    found = set()
    for path in (ROOT / "bfaas").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("debug", "info", "warn", "error", "failure")
                and ast.unparse(node.func.value).rpartition(".")[2] in ("_log", "log")
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                found.add(re.sub(r"\{[^}]+\}", "*", str(node.args[0].value)))
    return found


def documented_messages() -> set[str]:
    """Return the messages in the documents, each value in them (`N`, `ERROR`, `…`) as a star."""
    cells = column(section("operations.md", "Log messages"))
    messages = (text for cell in cells if " in an error" not in cell for text in code(cell))
    return {re.sub(r"\b(?:[A-Z]|ID|ERROR|WHY|REASON)\b|…", "*", text) for text in messages}


def matches(documented: str, logged: str) -> bool:
    """Return whether a documented message, in which stars are values or left out, is one that is logged."""
    parts = [part for part in documented.split("*") if part.strip(" :,")]
    pattern = ".*".join(re.escape(part.strip(" :,")) for part in parts)
    return bool(parts) and re.search(pattern, logged) is not None


class LogMessageTests(SynchronousTestCase):
    def test_documented_messages_are_logged(self) -> None:
        logged = log_messages()
        source = "".join(path.read_text() for path in (ROOT / "bfaas").rglob("*.py"))
        for message in documented_messages() - {"MAXREQTIME is * s: *", "MAXWAIT is * s: *"}:
            known = any(matches(message, text) for text in logged)
            literal = max((part.strip(" :,") for part in message.split("*")), key=len)
            self.assertTrue(known or literal in source, message)

    def test_warnings_of_the_roles_are_documented(self) -> None:
        documented = documented_messages()
        for folder in ("coordinator", "pooling", "worker"):
            for path in (ROOT / "bfaas" / folder).rglob("*.py"):
                for message in re.findall(r'log\.(?:warn|error)\(\s*"([^"]+)"', path.read_text()):
                    logged = re.sub(r"\{[^}]+\}", "*", message)
                    if logged.strip("* :"):
                        self.assertTrue(any(matches(text, logged) for text in documented), message)


class ConfigurationTests(SynchronousTestCase):
    def test_every_setting_is_explained(self) -> None:
        source = (ROOT / "bfaas" / "settings.py").read_text()
        names = set(re.findall(r'\.(?:required|optional)\(\s*"([A-Z_]+)"', source))
        self.assertGreater(len(names), 20)
        documented = {name for cell in column(DOCS["configuration.md"]) for name in code(cell)}
        self.assertEqual(set(), names - documented)

    def test_defaults_are_those_of_the_coordinator(self) -> None:
        settings = CoordSettings.from_environment({"WORKER_APP": "mock", "MAXREQTIME": "10s"})
        table = section("configuration.md", "Coordinator")
        documented = dict(re.findall(r"(?m)^\| `([A-Z]+(?:_[A-Z]+)?)` \| `?(\w+)`? \|", table))
        for name, value in {
            "POOLSIZE": settings.pool_size,
            "POOL_STANDBY": settings.standby,
            "MAXWAIT": settings.max_wait,
            "MAXQUEUE": settings.max_queue,
            "MAXPERCLIENT": settings.max_per_client,
            "MAXBODY": settings.max_body,
            "MAXOUTPUT": settings.max_output,
        }.items():
            text = documented[name]
            parse = parse_duration if name == "MAXWAIT" else parse_size
            self.assertEqual(value, parse(text), name)

    def test_every_option_of_the_roles_is_explained(self) -> None:
        documented = {
            name.split()[0]
            for cell in column(section("configuration.md", "Command-line options"))
            for name in code(cell)
        }
        for options in (CoordOptions, BasherOptions):
            names = {
                f"--{parameter[0]}"
                for parameter in (*options.optParameters, *getattr(options, "optFlags", []))
            }
            self.assertEqual(set(), names - documented)

    def test_paths_of_the_api_are_explained(self) -> None:
        described = set(re.findall(r"(?m)^  (/\w*):$", (ROOT / "docs" / "openapi.yaml").read_text()))
        for path in described:
            self.assertIn(f"`{path}`" if path != "/run" else "`POST /run`", DOCS["http-api.md"])


def readable(path: Path) -> str:
    return str(path.relative_to(ROOT))


class LanguageTests(SynchronousTestCase):
    def test_documents_use_plain_english(self) -> None:
        pattern = re.compile(
            r"\b(told|asked|whoever|nobody|somebody|in vain|speaks against|stand-in|ticket)\b"
        )
        for path in PATHS:
            for line in without_code(path.read_text()).splitlines():
                if "`" not in line:
                    self.assertNotRegex(line, pattern, readable(path))

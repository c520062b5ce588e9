"""The mutants, and the exemptions of the coverage search, match the source. `make proof` runs both."""

from __future__ import annotations

import ast

from twisted.trial.unittest import SynchronousTestCase

from tests.simulation.coverage_search import EXEMPT, find_exempt_lines
from tests.simulation.mutants import MUTANTS
from tests.simulation.mutation import AnchorError, mutate

SOURCE = """
class Machine:
    def start(self, name):
        log("start", name)  # logged first
        if self.ready and (
            name is None
        ):
            return call(name, retries=3)
        else:
            self.wait()

    def stop(self):
        self.wait()
        self.wait()
"""


class MutantTests(SynchronousTestCase):
    def test_every_mutant_matches_the_source_exactly_once(self) -> None:
        lost = []
        for mutant in MUTANTS:
            try:
                code = compile(mutant.apply(), str(mutant.path), "exec")
            except (AnchorError, OSError) as error:
                lost.append(f"{mutant.defect}: {mutant.anchor}: {error}")
            else:
                self.assertNotEqual(compile(mutant.path.read_text(), str(mutant.path), "exec"), code)

        self.assertEqual([], lost, "\n".join(["no longer match:", *lost]))

    def test_every_exemption_of_the_coverage_search_matches_the_source(self) -> None:
        self.assertGreaterEqual(len(find_exempt_lines()), len(EXEMPT))

    def test_mutants_are_many_and_differ(self) -> None:
        self.assertGreaterEqual(len({(mutant.anchor, mutant.old, mutant.new) for mutant in MUTANTS}), 70)
        self.assertEqual(len(MUTANTS), len({mutant.defect for mutant in MUTANTS}))


class MutateTests(SynchronousTestCase):
    def assert_mutated(self, expected: str, old: str, new: str, function: str = "Machine.start") -> None:
        tree = mutate(SOURCE, function, old, new)
        self.assertIn(expected, ast.unparse(tree))

    def test_expressions_match_regardless_of_format(self) -> None:
        self.assert_mutated("if True:", "self.ready and name is None", "True")

    def test_placeholders_stand_for_expressions_and_statements(self) -> None:
        self.assert_mutated("if name is None:", "self.ready and _1", "_1")
        self.assert_mutated(
            "if not done:\n            self.wait()",
            "if _1:\n    _2\nelse:\n    _3",
            "if not done:\n    _3",
        )

    def test_statements_can_be_removed(self) -> None:
        self.assert_mutated("else:\n            pass", "self.wait()", "")

    def test_assignments_match_keyword_arguments(self) -> None:
        self.assert_mutated("call(name, retries=0)", "retries = 3", "retries = 0")

    def test_ambiguous_and_missing_code_is_an_error(self) -> None:
        for function, old in (
            ("Machine.stop", "self.wait()"),
            ("Machine.start", "self.stop()"),
            ("Machine.resume", "self.wait()"),
            ("Machine.start", "_1: int = 3"),
        ):
            self.assertRaises(AnchorError, mutate, SOURCE, function, old, "pass")

"""Tests of outcomes: their kinds, and how they are displayed."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from bfaas.coordinator.outcome import REJECTIONS, RUN_OUTCOMES, Outcome, OutcomeKind
from bfaas.protocol.formats import Exit, Reason


class OutcomeTests(SynchronousTestCase):
    def test_exit_code_is_displayed(self) -> None:
        for exit_ in (Exit(0), Exit(3), Exit(137, signal="SIGKILL")):
            outcome = Outcome.from_exit(exit_)
            self.assertEqual(
                (OutcomeKind.EXIT, f"exit {exit_.code}"), (outcome.kind, f"{outcome}"), f"{exit_}"
            )

    def test_each_reason_of_a_forced_exit_is_an_outcome(self) -> None:
        for reason in Reason:
            outcome = Outcome.from_exit(Exit.forced(reason))
            self.assertEqual(reason.value, f"{outcome}")
            self.assertIn(outcome.kind, RUN_OUTCOMES)

    def test_unknown_reason_of_a_worker_is_a_plain_exit(self) -> None:
        for reason in ("queue-full", "internal-error", "nonsense", ""):
            self.assertEqual("exit 5", f"{Outcome.from_exit(Exit(5, reason=reason))}")

    def test_each_kind_is_a_run_outcome_or_a_rejection(self) -> None:
        self.assertEqual(set(OutcomeKind), {*RUN_OUTCOMES, *REJECTIONS})
        self.assertEqual({OutcomeKind.NOT_STARTED}, set(RUN_OUTCOMES) & set(REJECTIONS))

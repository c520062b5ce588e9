from __future__ import annotations

from dataclasses import replace
from random import Random

from twisted.trial.unittest import SynchronousTestCase

from bfaas.machines.api import Machine, MachineConfig, State
from bfaas.pooling.config import PoolConfig, lease_ttl, machine_name, pool_of

CONFIG = PoolConfig(
    name="p",
    size=2,
    region="r",
    template=MachineConfig("i", {"PUBLIC": "key"}, {"team": "t"}),
    max_req_time=10.0,
    lease_ttl=300,
)


def machine(name: str = "worker-p-1", config: PoolConfig = CONFIG, **metadata: str) -> Machine:
    return Machine(
        id="1",
        name=name,
        state=State.STOPPED,
        region="r",
        image="i",
        metadata={**config.machine_config.metadata, **metadata},
        instance_id="",
        created_at=0.0,
    )


class PoolConfigTests(SynchronousTestCase):
    def test_machine_config_is_the_template_with_the_pools_metadata(self) -> None:
        created = CONFIG.machine_config

        self.assertEqual(CONFIG.template, replace(created, metadata=CONFIG.template.metadata))
        self.assertEqual(("t", "p//i"), (created.metadata["team"], created.metadata["pool_id"]))
        self.assertRegex(created.metadata["spec_hash"], "^[0-9a-f]{16}$")

    def test_machines_with_unchanged_metadata_match(self) -> None:
        self.assertTrue(CONFIG.metadata_matches(machine()))
        self.assertTrue(CONFIG.metadata_matches(machine(more="than that")))
        self.assertFalse(CONFIG.metadata_matches(machine(pool_id="q//i")))
        self.assertFalse(CONFIG.metadata_matches(machine(spec_hash="0" * 16)))
        self.assertFalse(CONFIG.metadata_matches(replace(machine(), metadata={})))

    def test_machines_from_another_template_do_not_match(self) -> None:
        for change in (
            {"image": "j"},
            {"env": {"PUBLIC": "other"}},
            {"cpus": 2},
            {"memory_mb": 512},
            {"idle_timeout": 61},
        ):
            other = replace(CONFIG, template=replace(CONFIG.template, **change))

            self.assertFalse(CONFIG.metadata_matches(machine(config=other)), change)

    def test_order_of_the_environment_does_not_matter(self) -> None:
        one, other = (
            replace(CONFIG, template=MachineConfig("i", dict(pairs)))
            for pairs in ([("A", "1"), ("B", "2")], [("B", "2"), ("A", "1")])
        )

        self.assertEqual(one.metadata, other.metadata)

    def test_pool_owns_machines_with_its_name_whatever_their_metadata(self) -> None:
        self.assertTrue(CONFIG.owns(machine("worker-p-1", pool_id="q//i")))
        self.assertFalse(CONFIG.owns(machine("worker-q-1")))
        self.assertFalse(CONFIG.owns(machine("worker-p-q-1")))

    def test_leases_are_relied_on_for_less_than_they_last(self) -> None:
        self.assertTrue(0.9 * 300 < CONFIG.safe_lease_ttl < 300)


class NameTests(SynchronousTestCase):
    def test_pool_of_a_name(self) -> None:
        for name, pool in {
            "worker-p-0123456789abcdef": "p",
            "worker-a-b-c-1": "a-b-c",
            "worker-p": None,
            "worker-p-": None,
            "worker--1": None,
            "worker-": None,
            "postgres-1": None,
            "": None,
        }.items():
            self.assertEqual(pool, pool_of(name), name)

    def test_names_are_unique_and_name_their_pool(self) -> None:
        random = Random(1)
        names = {machine_name("a-b", random) for _ in range(1000)}

        self.assertEqual((1000, {"a-b"}), (len(names), {pool_of(name) for name in names}))


class LeaseTests(SynchronousTestCase):
    def test_lease_covers_four_requests_and_at_least_five_minutes(self) -> None:
        self.assertEqual([300, 300, 401], [lease_ttl(seconds) for seconds in (1.0, 60.0, 100.0)])

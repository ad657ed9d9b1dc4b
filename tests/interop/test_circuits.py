"""Circuits, as clients that others wrote meet them: opened together, probed by few, watched, forced."""

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Barrier
from unittest import TestCase

import grpc
from fusebox import PATIENCE_SECONDS, ROOT, TOOLS, Client, Server, environment, name, names

CLIENTS = ["a", "b", "c"]
PROBES = 2
# As the `payments` of the demo, but for waits that no person looks at.
BREAKER = {
    "window": "1m",
    "min_calls": 3,
    "open_for": "1s",
    "backoff": {"jitter": "0%"},
    "half_open": {"probes": PROBES, "probe_timeout": "30s"},
    "ramp": {"steps": []},
}
POLICIES = {
    "payments": {"breaker": BREAKER},
    # Open for longer than any test takes.
    "mail": {"breaker": BREAKER | {"open_for": "5m"}},
    "signup": {"token_bucket": {"limit": 3, "per": "1m"}},
}


def start(**more) -> Server:
    """A server with these policies."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "fusebox.yaml"
        file.write_text(json.dumps({"namespaces": {"demo": {"policies": POLICIES}}}))
        return Server("--config", str(file), **more)


class Fleet:
    """Clients of one server, each told apart by its id."""

    def __init__(self, server: Server):
        self.client = Client(server.channel)
        self.admin = Client(server.channel, "fusebox.v1.Admin")

    def acquire(self, who: str, policy: str, key: str):
        request = {"namespace": "demo", "client": {"id": who}}
        return self.client.call("Acquire", request | {"asks": [{"policy": policy, "key": key}]})

    def tell(self, who: str, grant_id: str, outcome: str):
        outcomes = [{"grant_id": grant_id, "outcome": outcome}]
        return self.client.call(
            "Report", {"namespace": "demo", "client": {"id": who}, "outcomes": outcomes}
        )

    def tell_delta(self, who: str, policy: str, key: str, generation: int, **more):
        delta = {"policy": policy, "key": key, "generation": generation, "failures": 1}
        request = {"namespace": "demo", "client": {"id": who}, "deltas": [delta]}
        return self.client.call("Report", request | more)

    def generation(self, policy: str, key: str) -> int:
        """The generation of a circuit; a look."""
        asks = [{"policy": policy, "key": key, "cost": 0}]
        (verdict,) = self.client.call("Acquire", {"namespace": "demo", "asks": asks}).verdicts
        return verdict.generation

    def open(self, policy: str, key: str):
        """Opens a circuit by one failure of each; its status."""
        for who in CLIENTS:
            answer = self.acquire(who, policy, key)
            assert name(answer, "decision") == "DECISION_ALLOW", answer
            (status,) = self.tell(who, answer.grant_id, "OUTCOME_FAILURE").circuits
        assert name(status, "state") == "CIRCUIT_STATE_OPEN", status
        return status

    def force(self, policy: str, key: str, mode: str, **more):
        request = {"namespace": "demo", "policy": policy, "key": key, "mode": mode}
        return self.admin.call("SetCircuitMode", request | {"reason": "INC-4711"} | more)

    def watch(self, **more):
        return self.client.stream("Watch", {"namespace": "demo", **more})


def news(stream, key: str):
    """The next message that tells of a circuit, and what it tells."""
    for message in stream:
        for status in message.circuits:
            if status.key == key:
                return message, status
    raise AssertionError(f"the stream ended without a word of `{key}`")


def whole(stream) -> tuple[dict, object]:
    """All circuits by key, and the last message that it takes to tell them."""
    told = {}
    for message in stream:
        told |= {status.key: status for status in message.circuits}
        if message.complete:
            return told, message
    raise AssertionError("the stream ended before it was complete")


class Shared(TestCase):
    """Tests of one server; each has circuits of its own."""

    @classmethod
    def setUpClass(cls):
        cls.server = start()
        cls.addClassCleanup(cls.server.stop)
        cls.fleet = Fleet(cls.server)

    def printed(self, method: str, request: dict, status: int = 0) -> str:
        """What grpcurl prints of a call; on its standard error if that fails."""
        done = subprocess.run(
            [TOOLS / "grpcurl", "-plaintext", "-d", json.dumps(request), self.server.grpc, method],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        self.assertEqual(bool(done.returncode), bool(status), done.stderr)
        return done.stderr if status else done.stdout

    def grpcurl(self, method: str, **request) -> dict:
        return json.loads(self.printed(f"fusebox.v1.{method}", {"namespace": "demo", **request}))


class Together(Shared):
    def test_three_with_grpcurl_open_it_are_told_why_and_close_it_by_two_probes(self):
        asks = [{"policy": "payments", "key": "grpcurl"}]

        def acquire(who: str) -> dict:
            return self.grpcurl("Resilience/Acquire", client={"id": who}, asks=asks)

        def tell(who: str, answer: dict, outcome: str) -> dict:
            outcomes = [{"grant_id": answer["grantId"], "outcome": outcome, "error_kind": "timeout"}]
            told = self.grpcurl("Resilience/Report", client={"id": who}, outcomes=outcomes)
            self.assertEqual(told["results"], ["REPORT_RESULT_APPLIED"])
            return told["circuits"][0]

        states = [tell(who, acquire(who), "OUTCOME_FAILURE")["state"] for who in CLIENTS]
        closed, open_, half = (f"CIRCUIT_STATE_{state}" for state in ["CLOSED", "OPEN", "HALF_OPEN"])
        self.assertEqual(states, [closed, closed, open_])

        refused = acquire("d")
        self.assertEqual(refused["decision"], "DECISION_DENY")
        (verdict,) = refused["verdicts"]
        self.assertEqual(verdict["reason"], "REASON_CIRCUIT_OPEN")
        evidence = verdict["evidence"]
        self.assertEqual((evidence["calls"], evidence["reporters"]), ("3", 3))
        self.assertEqual(evidence["failureRateBasisPoints"], 10_000)
        self.assertEqual(evidence["errorKinds"], ["timeout"])

        # What it says to wait is enough.
        time.sleep(float(verdict["retryAfter"].removesuffix("s")))
        probes = [acquire(who) for who in CLIENTS]
        self.assertEqual([one["decision"] for one in probes][:PROBES], ["DECISION_ALLOW"] * PROBES)
        self.assertTrue(all(one["verdicts"][0]["probe"] for one in probes[:PROBES]))
        self.assertEqual(probes[PROBES]["verdicts"][0]["reason"], "REASON_PROBES_IN_USE")
        ends = [tell(who, one, "OUTCOME_SUCCESS")["state"] for who, one in zip("ab", probes)]
        self.assertEqual(ends, [half, closed])

        told = self.grpcurl("Admin/InspectCircuit", policy="payments", key="grpcurl")
        causes = [one["cause"].removeprefix("CIRCUIT_CAUSE_") for one in told["history"]]
        self.assertEqual(causes, ["PROBES_PASSED", "ASKED", "TRIPPED"])

    def test_of_many_that_ask_at_once_exactly_the_probes_are_let_through(self):
        opened = self.fleet.open("payments", "crowd")
        crowd = 24
        ready = Barrier(crowd)

        def ask(number: int):
            with grpc.insecure_channel(self.server.grpc, [("grpc.enable_http_proxy", 0)]) as channel:
                client = Client(channel)
                asks = [{"policy": "payments", "key": "crowd"}]
                request = {"namespace": "demo", "client": {"id": str(number)}, "asks": asks}
                ready.wait(PATIENCE_SECONDS)
                answers = [client.call("Acquire", request) for _ in range(5)]
            return [(name(one, "decision"), name(one.verdicts[0], "reason")) for one in answers]

        time.sleep(opened.open_for.ToNanoseconds() / 1e9)
        with ThreadPoolExecutor(crowd) as pool:
            answers = [answer for some in pool.map(ask, range(crowd)) for answer in some]
        let_through = [decision for decision, _ in answers if decision == "DECISION_ALLOW"]
        self.assertEqual(len(let_through), PROBES)
        reasons = {reason for decision, reason in answers if decision == "DECISION_DENY"}
        self.assertEqual(reasons, {"REASON_PROBES_IN_USE"})

    def test_three_processes_of_the_example_share_the_probes(self):
        example = [sys.executable, "-B", ROOT / "tests" / "interop" / "circuit.py", "payments"]
        example += ["--address", self.server.grpc, "--key", "example", "--fail", "1"]
        example += ["--every", "0.1", "--takes", "0.4", "--calls", "24"]
        processes = [
            subprocess.Popen(
                [*example, "--client", who], env=environment(), stdout=subprocess.PIPE, text=True
            )
            for who in CLIENTS
        ]
        for process in processes:
            self.addCleanup(process.kill)
        printed = [process.communicate(timeout=PATIENCE_SECONDS)[0] for process in processes]
        self.assertEqual([process.returncode for process in processes], [0, 0, 0], printed)
        lines = "".join(printed).splitlines()
        self.assertEqual(len(lines), 3 * 24)
        self.assertEqual(sum("let through: failed" in line for line in lines), 3, printed)
        self.assertEqual(sum("let through as a probe: succeeded" in line for line in lines), PROBES)
        for words in [
            "100% of 3 calls failed, told by 3 clients (timeout)",
            "refused: circuit open, again in 0.",
            "let through: succeeded; the circuit is closed",
        ]:
            self.assertTrue(any(words in line for line in lines), f"{words} is not in {printed}")


class Told(Shared):
    def test_deltas_open_it_and_those_of_another_generation_change_nothing(self):
        def tell(who: str, generation: int, **more):
            return self.fleet.tell_delta(who, "mail", "deltas", generation, **more)

        # Who does not know the generation yet is told it.
        first = tell("a", 0)
        self.assertEqual(names(first, "delta_results"), ["REPORT_RESULT_STALE_GENERATION"])
        generation = first.circuits[0].generation
        self.assertEqual(generation, self.fleet.generation("mail", "deltas"))

        for who in CLIENTS:
            answer = tell(who, generation, sequence=1)
            self.assertEqual(names(answer, "delta_results"), ["REPORT_RESULT_APPLIED"])
            again = tell(who, generation, sequence=1)
            self.assertTrue(again.duplicate)
        (status,) = answer.circuits
        self.assertEqual(name(status, "state"), "CIRCUIT_STATE_OPEN")
        # A report that comes twice counts once.
        self.assertEqual(status.evidence.calls, 3)
        self.assertGreater(status.generation, generation)

        late = tell("a", generation, sequence=2)
        self.assertEqual(names(late, "delta_results"), ["REPORT_RESULT_STALE_GENERATION"])
        self.assertEqual(late.circuits[0].generation, status.generation)

    def test_a_grant_of_before_it_opened_tells_nothing(self):
        late = self.fleet.acquire("d", "mail", "late").grant_id
        self.fleet.open("mail", "late")
        answer = self.fleet.tell("d", late, "OUTCOME_SUCCESS")
        self.assertEqual(names(answer, "results"), ["REPORT_RESULT_STALE_GENERATION"])

    def test_what_is_wrong_is_named_where_a_person_reads_it(self):
        order = {"namespace": "demo", "policy": "payments", "mode": "CIRCUIT_MODE_FORCED_OPEN"}
        for method, request, field in [
            ("Admin/SetCircuitMode", order | {"ttl": "60s"}, "reason"),
            ("Admin/SetCircuitMode", order | {"reason": "INC-4711"}, "ttl"),
            ("Admin/InspectCircuit", {"namespace": "demo", "policy": "signup"}, "policy"),
            ("Admin/TopKeys", {"namespace": "demo", "policy": "payments"}, "policy"),
            ("Resilience/Watch", {"namespace": "demo", "policies": ["signup"]}, "policies[0]"),
            ("Resilience/Report", {"namespace": "demo", "goodbye": True}, "client.id"),
        ]:
            with self.subTest(method, field=field):
                error = self.printed(f"fusebox.v1.{method}", request, status=1)
                self.assertIn("Code: InvalidArgument\n", error)
                self.assertIn(f"Message: {field}: ", error)
                self.assertIn(f'"field": "{field}"', error)
        request = {"namespace": "demo", "policy": "nope"}
        error = self.printed("fusebox.v1.Admin/InspectCircuit", request, status=1)
        self.assertIn("Code: NotFound\n", error)
        self.assertIn('"resourceName": "nope"', error)


class Watch(Shared):
    def test_a_watcher_has_a_snapshot_then_what_changes_and_a_heartbeat(self):
        self.fleet.open("mail", "before")
        stream = self.fleet.watch(policies=["mail"])
        self.addCleanup(stream.cancel)
        first = next(stream)
        self.assertTrue(first.snapshot)
        self.assertEqual(first.valid_for.ToSeconds(), 5)
        while not first.complete:
            first = next(stream)
        opened = self.fleet.open("mail", "meanwhile")
        message, status = news(stream, "meanwhile")
        self.assertFalse(message.snapshot)
        self.assertEqual(name(status, "state"), "CIRCUIT_STATE_OPEN")
        self.assertEqual(status.generation, opened.generation)
        begun = time.monotonic()
        heartbeat = next(stream)
        self.assertEqual(list(heartbeat.circuits), [])
        self.assertEqual(heartbeat.version, message.version)
        self.assertLess(time.monotonic() - begun, message.valid_for.ToSeconds())

    def test_who_comes_back_is_told_what_it_missed_and_no_more(self):
        self.fleet.open("mail", "known")
        stream = self.fleet.watch()
        told, last = whole(stream)
        stream.cancel()
        self.assertIn("known", told)

        self.fleet.open("mail", "missed")
        stream = self.fleet.watch(epoch=last.epoch, version=last.version)
        self.addCleanup(stream.cancel)
        told, message = whole(stream)
        self.assertFalse(message.snapshot)
        self.assertEqual((list(told), message.epoch), (["missed"], last.epoch))


class Life(TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.data = Path(directory.name) / "data"

    def start(self, listen: str = "127.0.0.1:0") -> tuple[Server, Fleet]:
        server = start(data=self.data, listen=listen)
        self.addCleanup(server.kill)
        self.addCleanup(server.channel.close)
        return server, Fleet(server)

    def test_a_drain_ends_a_watch_and_the_next_server_begins_it_anew(self):
        server, fleet = self.start()
        opened = fleet.open("mail", "")
        stream = fleet.watch()
        told, last = whole(stream)
        self.assertEqual(name(told[""], "state"), "CIRCUIT_STATE_OPEN")

        server.terminate()
        with self.assertRaises(grpc.RpcError) as raised:
            for _ in stream:
                pass
        self.assertEqual(raised.exception.code(), grpc.StatusCode.UNAVAILABLE)
        server.assert_exits_cleanly()
        server.channel.close()

        _, fleet = self.start(listen=server.grpc)
        stream = fleet.watch(epoch=last.epoch, version=last.version)
        self.addCleanup(stream.cancel)
        told, message = whole(stream)
        self.assertTrue(message.snapshot)
        self.assertNotEqual(message.epoch, last.epoch)
        self.assertEqual(name(told[""], "state"), "CIRCUIT_STATE_OPEN")
        self.assertGreater(told[""].generation, opened.generation)
        self.assertEqual(told[""].evidence.calls, 3)

    def test_a_forced_circuit_is_pushed_and_outlives_a_kill(self):
        server, fleet = self.start()
        stream = fleet.watch()
        whole(stream)
        answer = fleet.force("payments", "bank", "CIRCUIT_MODE_FORCED_OPEN", ttl=timedelta(minutes=30))
        self.assertTrue(answer.changed)
        _, status = news(stream, "bank")
        self.assertEqual(name(status, "mode"), "CIRCUIT_MODE_FORCED_OPEN")
        self.assertEqual(status.evidence.forced_reason, "INC-4711")
        stream.cancel()
        server.channel.close()
        server.kill()

        _, fleet = self.start()
        stream = fleet.watch()
        told, _ = whole(stream)
        self.assertEqual(name(told["bank"], "mode"), "CIRCUIT_MODE_FORCED_OPEN")
        self.assertLessEqual(told["bank"].mode_expires_in.ToSeconds(), 1_800)
        (verdict,) = fleet.acquire("a", "payments", "bank").verdicts
        self.assertEqual(name(verdict, "reason"), "REASON_CIRCUIT_FORCED_OPEN")
        self.assertEqual(verdict.evidence.forced_reason, "INC-4711")

        fleet.force("payments", "bank", "CIRCUIT_MODE_NORMAL")
        _, status = news(stream, "bank")
        self.assertEqual(name(status, "state"), "CIRCUIT_STATE_CLOSED")
        stream.cancel()
        events = fleet.admin.call("ListEvents", {"namespace": "demo", "policy": "payments"}).events
        self.assertEqual([event.reason for event in events], ["INC-4711"] * 2)
        (verdict,) = fleet.acquire("a", "payments", "bank").verdicts
        self.assertEqual(name(verdict, "decision"), "DECISION_ALLOW")

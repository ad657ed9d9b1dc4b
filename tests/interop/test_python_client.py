"""A client in another language, without generated code: what it is told, and what it can read of it."""

import time
from unittest import TestCase

import grpc
from fusebox import PATIENCE_SECONDS, ROOT, SERVICE, Client, Server, ServerCase, name, names
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

MESSAGE_BYTES_MAX = 1024 * 1024
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Acquire(ServerCase):
    def test_a_second_signup_is_denied_and_told_when_to_retry(self):
        ask = {"policy": "signup", "key": "alice", "cost": 2}
        first, second = self.acquire(ask), self.acquire(ask)

        self.assertEqual(name(first, "decision"), "DECISION_ALLOW")
        (verdict,) = first.verdicts
        self.assertEqual(name(verdict, "reason"), "REASON_UNSPECIFIED")
        self.assertEqual((verdict.limit, verdict.remaining), (3, 1))
        self.assertFalse(verdict.HasField("retry_after"))
        self.assertEqual(first.grant_id, "")

        self.assertEqual(name(second, "decision"), "DECISION_DENY")
        (verdict,) = second.verdicts
        self.assertEqual(name(verdict, "reason"), "REASON_RATE_LIMITED")
        self.assertEqual(verdict.remaining, 1)
        # One token is missing, and one comes every 20 s.
        self.assertGreater(verdict.retry_after.ToNanoseconds(), 0)
        self.assertLessEqual(verdict.retry_after.ToNanoseconds(), 20 * 10**9)

    def test_nothing_left_is_a_number_not_an_absence(self):
        (verdict,) = self.acquire({"policy": "signup", "key": "zero", "cost": 3}).verdicts
        self.assertTrue(verdict.HasField("remaining"))
        self.assertEqual(verdict.remaining, 0)

    def test_an_explicit_cost_of_0_peeks_and_an_unset_one_is_1(self):
        for _ in range(3):
            self.assertEqual(self.remaining("peek"), 3)
        (verdict,) = self.acquire({"policy": "signup", "key": "peek"}).verdicts
        self.assertEqual(verdict.remaining, 2)

    def test_all_asks_are_charged_or_none(self):
        self.acquire({"policy": "signup", "key": "empty", "cost": 3})
        both = self.acquire(
            {"policy": "signup", "key": "full"}, {"policy": "signup", "key": "empty"}
        )
        self.assertEqual(name(both, "decision"), "DECISION_DENY")
        decisions = [name(verdict, "decision") for verdict in both.verdicts]
        self.assertEqual(decisions, ["DECISION_ALLOW", "DECISION_DENY"])
        self.assertEqual(self.remaining("full"), 3)

    def test_a_batch_is_decided_in_order(self):
        costs = [2, 2, 1]
        requests = [
            {"asks": [{"policy": "signup", "key": "batch", "cost": cost}]} for cost in costs
        ]
        batch = self.client.call("AcquireBatch", {"namespace": "demo", "requests": requests})
        decisions = [name(response, "decision") for response in batch.responses]
        self.assertEqual(decisions, ["DECISION_ALLOW", "DECISION_DENY", "DECISION_ALLOW"])
        self.assertEqual([r.verdicts[0].remaining for r in batch.responses], [1, 1, 0])


class Kinds(TestCase):
    """The policies that operators copy, one of each kind."""

    def setUp(self):
        self.server = Server("--config", str(ROOT / "deploy" / "fusebox.yaml"))
        self.addCleanup(self.server.stop)
        self.client = Client(self.server.channel)

    def acquire(self, policy: str, **more):
        asks = [{"policy": policy, "key": "alice"}]
        return self.client.call("Acquire", {"namespace": "partner", "asks": asks, **more})

    def test_each_kind_answers(self):
        for policy, limit in [
            ("quota", 400),  # 500, of which 20% are kept for critical calls
            ("search", 20),
            ("exports", 100),
            ("invoices", 1000),
            ("database", 64),
            ("signup", 5),
        ]:
            with self.subTest(policy):
                answer = self.acquire(policy)
                self.assertEqual(name(answer, "decision"), "DECISION_ALLOW")
                (verdict,) = answer.verdicts
                self.assertEqual((verdict.limit, verdict.remaining), (limit, limit - 1))
        self.assertEqual(name(self.acquire("retries", attempt=1), "decision"), "DECISION_ALLOW")

    def test_a_permit_is_renewed_and_released_once(self):
        permit = self.acquire("database")
        self.assertEqual(permit.verdicts[0].expires_in.ToSeconds(), 10)
        self.assertLessEqual(len(permit.grant_id), 128)
        report = {"namespace": "partner", "renew_grant_ids": [permit.grant_id]}
        (renewal,) = self.client.call("Report", report).renewals
        self.assertEqual(renewal.grant_id, permit.grant_id)
        self.assertEqual(renewal.expires_in.ToSeconds(), 10)
        report = {"namespace": "partner", "outcomes": [{"grant_id": permit.grant_id}] * 2}
        answer = self.client.call("Report", report)
        self.assertEqual(
            names(answer, "results"), ["REPORT_RESULT_APPLIED", "REPORT_RESULT_DUPLICATE"]
        )


class Report(ServerCase):
    def results(self, *outcomes: dict) -> list[str]:
        return names(self.client.call("Report", {"namespace": "demo", "outcomes": outcomes}), "results")

    def test_an_estimate_is_settled_once(self):
        ask = {"policy": "signup", "key": "estimate", "cost": 3, "estimated": True}
        estimate = self.acquire(ask)
        self.assertEqual(name(estimate, "decision"), "DECISION_ALLOW")
        self.assertNotEqual(estimate.grant_id, "")
        self.assertLessEqual(len(estimate.grant_id), 128)
        self.assertGreater(estimate.verdicts[0].expires_in.ToNanoseconds(), 0)
        self.assertEqual(self.remaining("estimate"), 0)

        outcome = {"grant_id": estimate.grant_id, "actual_cost": 1}
        self.assertEqual(self.results(outcome), ["REPORT_RESULT_APPLIED"])
        self.assertEqual(self.remaining("estimate"), 2)
        self.assertEqual(self.results(outcome), ["REPORT_RESULT_DUPLICATE"])
        self.assertEqual(self.remaining("estimate"), 2)

    def test_a_denied_estimate_grants_nothing(self):
        ask = {"policy": "signup", "key": "denied", "cost": 3, "estimated": True}
        self.acquire(ask)
        self.assertEqual(self.acquire(ask).grant_id, "")

    def test_an_unknown_grant_is_a_result_not_an_error(self):
        ask = {"policy": "signup", "key": "unknown", "cost": 1, "estimated": True}
        grant_id = self.acquire(ask).grant_id
        like_ours = grant_id[:-1] + ("0" if grant_id[-1] != "0" else "1")
        self.assertEqual(
            self.results({"grant_id": "x"}, {"grant_id": like_ours}, {"grant_id": grant_id}),
            ["REPORT_RESULT_UNKNOWN_GRANT", "REPORT_RESULT_UNKNOWN_GRANT", "REPORT_RESULT_APPLIED"],
        )


class Errors(ServerCase):
    def test_an_invalid_request_names_each_of_its_fields(self):
        asks = [{"key": "no policy"}, {"policy": "signup", "key": "k" * 257}]
        refusal = self.client.refused("Acquire", {"asks": asks})
        self.assertEqual(refusal.code, "INVALID_ARGUMENT")
        self.assertEqual(refusal.fields(), ["namespace", "asks[0].policy", "asks[1].key"])
        first = refusal.details[0].field_violations[0]
        self.assertEqual(refusal.message, f"{first.field}: {first.description} (and 2 more)")

    def test_a_cost_that_is_never_possible_is_invalid_and_charges_nothing(self):
        asks = [
            {"policy": "api", "key": "never"},
            {"policy": "signup", "key": "never", "cost": 4},
        ]
        refusal = self.client.refused("Acquire", {"namespace": "demo", "asks": asks})
        self.assertEqual(refusal.code, "INVALID_ARGUMENT")
        self.assertEqual(refusal.fields(), ["asks[1].cost"])
        (verdict,) = self.acquire({"policy": "api", "key": "never", "cost": 0}).verdicts
        self.assertEqual(verdict.remaining, verdict.limit)

    def test_one_invalid_entry_fails_the_batch_before_anything_is_charged(self):
        def refused(second: dict):
            first = {"asks": [{"policy": "signup", "key": "batch"}]}
            request = {"namespace": "demo", "requests": [first, second]}
            return self.client.refused("AcquireBatch", request)

        named_twice = refused({"namespace": "demo", "asks": [{"policy": "signup"}]})
        self.assertEqual(named_twice.code, "INVALID_ARGUMENT")
        self.assertEqual(named_twice.fields(), ["requests[1].namespace"])
        never = refused({"asks": [{"policy": "signup", "cost": 4}]})
        self.assertEqual(never.code, "INVALID_ARGUMENT")
        self.assertEqual(never.fields(), ["requests[1].asks[0].cost"])
        self.assertEqual(refused({"asks": [{"policy": "nope"}]}).code, "NOT_FOUND")
        self.assertEqual(self.remaining("batch"), 3)

    def test_what_is_not_found_is_named(self):
        for namespace, policy, kind in [("nope", "api", "namespace"), ("demo", "nope", "policy")]:
            with self.subTest(kind):
                request = {"namespace": namespace, "asks": [{"policy": policy}]}
                refusal = self.client.refused("Acquire", request)
                self.assertEqual(refusal.code, "NOT_FOUND")
                (info,) = refusal.details
                self.assertEqual(info.DESCRIPTOR.full_name, "google.rpc.ResourceInfo")
                self.assertEqual((info.resource_type, info.resource_name), (kind, "nope"))

    def test_a_message_over_1_mib_is_refused_whole(self):
        def request(size: int):
            message = self.client.request("Acquire", {"asks": [{"key": "k" * (size - 64)}]})
            message.asks[0].key += "k" * (size - message.ByteSize())
            self.assertEqual(message.ByteSize(), size)
            return message

        # The largest message is read: what is wrong with it is its content.
        largest = self.client.refused("Acquire", request(MESSAGE_BYTES_MAX))
        self.assertEqual(largest.code, "INVALID_ARGUMENT")
        too_large = self.client.refused("Acquire", request(MESSAGE_BYTES_MAX + 1))
        self.assertEqual(too_large.code, "RESOURCE_EXHAUSTED")
        # The connection outlives it.
        self.assertEqual(self.remaining("after"), 3)

    def test_an_unknown_method_is_unimplemented(self):
        call = self.server.channel.unary_unary(f"/{SERVICE}/Nope")
        with self.assertRaises(grpc.RpcError) as raised:
            call(b"", timeout=PATIENCE_SECONDS)
        self.assertEqual(raised.exception.code(), grpc.StatusCode.UNIMPLEMENTED)


class Health(ServerCase):
    def setUp(self):
        self.health = health_pb2_grpc.HealthStub(self.server.channel)

    def test_the_server_and_its_service_serve(self):
        for service in ["", SERVICE]:
            with self.subTest(service):
                request = health_pb2.HealthCheckRequest(service=service)
                answer = self.health.Check(request, timeout=PATIENCE_SECONDS)
                self.assertEqual(answer.status, SERVING)
                watch = self.health.Watch(request, timeout=PATIENCE_SECONDS)
                self.assertEqual(next(watch).status, SERVING)
                watch.cancel()

    def test_a_service_that_is_not_there_is_not_found(self):
        request = health_pb2.HealthCheckRequest(service="nope")
        with self.assertRaises(grpc.RpcError) as raised:
            self.health.Check(request, timeout=PATIENCE_SECONDS)
        self.assertEqual(raised.exception.code(), grpc.StatusCode.NOT_FOUND)


class Shutdown(TestCase):
    # Half of the default drain_timeout: what ends later was cut, not drained.
    WELL_WITHIN_SECONDS = 5

    def setUp(self):
        self.server = Server()
        self.addCleanup(self.server.kill)
        self.addCleanup(self.server.channel.close)

    def assert_ends(self, stream):
        with self.assertRaises(grpc.RpcError) as raised:
            next(stream)
        self.assertEqual(raised.exception.code(), grpc.StatusCode.UNAVAILABLE)

    def test_a_health_watch_turns_and_ends_and_does_not_hold_up_the_exit(self):
        health = health_pb2_grpc.HealthStub(self.server.channel)
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        watch = health.Watch(request, timeout=PATIENCE_SECONDS)
        self.assertEqual(next(watch).status, SERVING)
        self.server.terminate()
        self.server.assert_exits_cleanly(self.WELL_WITHIN_SECONDS)
        self.assertEqual(next(watch).status, NOT_SERVING)
        self.assert_ends(watch)

    def test_an_open_reflection_stream_does_not_hold_up_the_exit(self):
        def one_and_silence():
            yield reflection_pb2.ServerReflectionRequest(list_services="")
            time.sleep(PATIENCE_SECONDS)

        reflection = reflection_pb2_grpc.ServerReflectionStub(self.server.channel)
        answers = reflection.ServerReflectionInfo(one_and_silence(), timeout=PATIENCE_SECONDS)
        next(answers)
        self.server.terminate()
        self.server.assert_exits_cleanly(self.WELL_WITHIN_SECONDS)
        self.assert_ends(answers)

    def test_a_client_that_is_idle_does_not_hold_up_the_exit(self):
        Client(self.server.channel)
        self.server.terminate()
        self.server.assert_exits_cleanly(self.WELL_WITHIN_SECONDS)

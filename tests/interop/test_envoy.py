"""What clients get of an Envoy that asks Fusebox, by rules that are files of envoyproxy/ratelimit."""

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import TestCase

from envoy import REMOTE_ADDRESS, Envoy, Response, Upstream, described_by, generic, header
from fusebox import (
    BEFORE_MIDNIGHT_SECONDS,
    DAY_SECONDS,
    PATIENCE_SECONDS,
    TOOLS,
    Client,
    Server,
    environment,
    name,
    wait_past_midnight,
    wait_until,
)

USER = described_by(header("x-user", "user"))
TOOL = described_by(header("x-tool", "tool"))

# Windows of a day, which end at midnight (UTC) and at no other time.
RULES = """
domain: shop
descriptors:
  - key: user
    rate_limit: {unit: day, requests_per_unit: 10}
  - key: tool
    rate_limit: {unit: day, requests_per_unit: 3}
"""

# More of it: a rule for one user.
ANN = """
  - key: user
    value: ann
    rate_limit: {unit: day, requests_per_unit: 2}
"""


class EnvoyCase(TestCase):
    """Tests with a Fusebox, an Envoy and an upstream of their own."""

    fusebox: Server | None = None
    envoy: Envoy
    upstream: Upstream

    def setUp(self):
        wait_past_midnight()
        self.logs: list[str] = []
        directory = tempfile.TemporaryDirectory(prefix="fusebox-envoy-")
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)
        self.rules = self.directory / "rules"
        self.rules.mkdir()

    def run(self, result=None):
        result = result or self.defaultTestResult()
        before = len(result.failures) + len(result.errors)
        super().run(result)
        if len(result.failures) + len(result.errors) > before:
            print("\n".join(self.logs))
        return result

    def start(
        self,
        rules: str | None = RULES,
        rate_limits: Sequence[dict] = (USER,),
        namespaces: dict | None = None,
        **settings,
    ) -> None:
        """Starts all three; without `rules` they are there already.

        `settings` are what Fusebox's own file says of them, beside `namespaces`.
        """
        if rules is not None:
            self.write(rules)
        configuration = {
            "namespaces": namespaces or {},
            "envoy_ratelimit": {"config_dir": str(self.rules), **settings},
        }
        (self.directory / "fusebox.yaml").write_text(json.dumps(configuration))
        self.start_fusebox()
        self.addCleanup(self.end_fusebox)
        self.upstream = Upstream()
        self.addCleanup(self.upstream.stop)
        self.start_envoy(rate_limits)

    def start_fusebox(self, listen: str = "127.0.0.1:0") -> None:
        config, data = self.directory / "fusebox.yaml", self.directory / "data"
        self.fusebox = Server("--config", str(config), data=data, listen=listen)

    def end_fusebox(self, end: Callable[[Server], None] = Server.kill) -> None:
        fusebox, self.fusebox = self.fusebox, None
        if fusebox:
            self.logs.append(f"Fusebox:\n{fusebox.log()}")
            fusebox.channel.close()
            end(fusebox)

    def start_envoy(self, rate_limits: Sequence[dict] = (USER,), **settings) -> None:
        """Starts one, beside those that run; `settings` are those of its filter."""
        settings["rate_limits"] = rate_limits
        envoy = self.envoy = Envoy(self.fusebox.grpc, self.upstream.address, **settings)
        self.addCleanup(envoy.stop)
        self.addCleanup(lambda: self.logs.append(f"Envoy:\n{envoy.log()}"))

    def write(self, rules: str) -> None:
        """Puts the file of rules in its place, all of it at once."""
        new = self.directory / "new.yaml"
        new.write_text(rules)
        new.rename(self.rules / "rules.yaml")

    def statuses(self, count: int, **headers: str) -> list[int]:
        """What so many requests get, one after the other."""
        return [self.envoy.get(**headers).status for _ in range(count)]

    def spent(self, policy: str, key: str) -> int:
        """What Fusebox has counted, as an operator sees it."""
        request = {"namespace": "envoy", "policy": policy, "key": key}
        done = subprocess.run(
            [TOOLS / "grpcurl", "-plaintext", "-d", json.dumps(request), self.fusebox.grpc]
            + ["fusebox.v1.Admin/InspectBucket"],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        (limit,) = json.loads(done.stdout)["bucket"]["limits"]
        return int(limit.get("spent", 0))

    def assert_limit(self, response: Response, limit: str, remaining: int) -> None:
        """The response tells this limit, and when it is all there again: at midnight."""
        self.assertEqual(response.headers["x-ratelimit-limit"], limit)
        self.assertEqual(response.headers["x-ratelimit-remaining"], str(remaining))
        until_midnight = DAY_SECONDS - time.time() % DAY_SECONDS
        reset = int(response.headers["x-ratelimit-reset"])
        self.assertAlmostEqual(reset, until_midnight, delta=BEFORE_MIDNIGHT_SECONDS)


class Limits(EnvoyCase):
    def test_requests_pass_up_to_the_limit_and_not_one_more(self):
        self.start()
        for number in range(1, 13):
            with self.subTest(request=number):
                response = self.envoy.get(x_user="ann")
                passes = number <= 10
                self.assertEqual(response.status, 200 if passes else 429)
                self.assert_limit(response, "10, 10;w=86400", max(0, 10 - number))
                ratelimited = response.headers["x-envoy-ratelimited"]
                self.assertEqual(ratelimited, None if passes else "true")
        self.assertEqual(len(self.upstream.served), 10)

    def test_the_window_of_each_unit_and_the_name_of_a_rule_are_told(self):
        seconds = {"second": 1, "minute": 60, "hour": 3_600, "day": 86_400}
        seconds |= {"week": 604_800, "month": 2_592_000, "year": 31_536_000}
        rules = "domain: shop\ndescriptors:\n" + "".join(
            f"- key: user\n  value: {unit}\n"
            f"  rate_limit: {{unit: {unit}, requests_per_unit: 7, name: each {unit}}}\n"
            for unit in seconds
        )
        self.start(rules)
        for unit, window in seconds.items():
            with self.subTest(unit):
                headers = self.envoy.get(x_user=unit).headers
                limit = f'7, 7;w={window};name="each {unit}"'
                self.assertEqual(headers["x-ratelimit-limit"], limit)
                self.assertEqual(headers["x-ratelimit-remaining"], "6")
                self.assertIn(int(headers["x-ratelimit-reset"]), range(window + 1))

    def test_each_value_of_a_header_has_a_count_of_its_own(self):
        self.start(rate_limits=[TOOL])
        self.assertEqual(self.statuses(4, x_tool="hammer"), [200, 200, 200, 429])
        self.assertEqual(self.statuses(4, x_tool="saw"), [200, 200, 200, 429])

    def test_each_address_of_clients_has_a_count_of_its_own(self):
        rules = """
domain: shop
descriptors:
  - key: path
    value: login
    descriptors:
      - key: remote_address
        rate_limit: {unit: day, requests_per_unit: 2}
      - key: remote_address
        value: 127.0.0.3
        rate_limit: {unit: day, requests_per_unit: 1}
"""
        self.start(rules, [described_by(generic("path", "login"), REMOTE_ADDRESS)])
        for source, expected in [
            ("127.0.0.1", [200, 200, 429]),
            ("127.0.0.2", [200, 200, 429]),
            ("127.0.0.3", [200, 429, 429]),
        ]:
            with self.subTest(source):
                self.assertEqual(self.statuses(3, source=source), expected)

    def test_values_that_are_asked_for_together_share_no_count_with_others(self):
        rules = """
domain: shop
descriptors:
  - key: user
    descriptors:
      - key: tool
        rate_limit: {unit: day, requests_per_unit: 2}
"""
        self.start(rules, [described_by(header("x-user", "user"), header("x-tool", "tool"))])
        for user, tool in [("ann", "saw"), ("ann", "hammer"), ("ann|saw", ""), ("ann", "|saw")]:
            with self.subTest(user=user, tool=tool):
                statuses = self.statuses(3, x_user=user, x_tool=tool)
                self.assertEqual(statuses, [200, 200, 429])
        self.assertEqual(self.spent("shop|user|tool", "ann|%7Csaw"), 3)

    def test_no_header_is_a_way_past_the_limits_of_others(self):
        rules = RULES.replace("key: tool", "key: remote_address").replace("10", "1000")
        # The header eight times over, to make the question as long as the answer is short.
        limits = [described_by(REMOTE_ADDRESS), *[USER] * 8]
        self.start(rules, limits)
        # By default, and so here, what Fusebox gives no answer to passes.
        self.start_envoy(limits, failure_mode_deny=False)
        self.assertEqual(self.statuses(4, x_user="ann"), [200, 200, 200, 429])
        for value in ["m" * 4097, "m" * 50_000, "m\xff", "m\xff" * 9000, "|%" * 9000]:
            with self.subTest(value[:8], length=len(value)):
                self.assertEqual(self.envoy.get(x_user=value).status, 429)

    def test_what_no_rule_limits_passes(self):
        self.start(rate_limits=[USER, described_by(header("x-other", "other"))])
        for headers in [{}, {"x_other": "thing"}]:
            with self.subTest(headers):
                response = self.envoy.get(**headers)
                self.assertEqual(response.status, 200)
                self.assertIsNone(response.headers["x-ratelimit-limit"])
        self.start_envoy(domain="unknown")
        self.assertEqual(set(self.statuses(12, x_user="ann")), {200})

    def test_a_limit_of_nothing_lets_nobody_through(self):
        self.start(RULES + ANN.replace("2", "0"))
        self.assertEqual(self.statuses(2, x_user="ann"), [429, 429])
        self.assertEqual(self.statuses(2, x_user="ben"), [200, 200])
        self.assertEqual(len(self.upstream.served), 2)

    def test_a_request_may_count_for_several_for_none_or_back(self):
        def hits(of: str, **addend) -> dict:
            return described_by(header(of, "user")) | {"hits_addend": addend}

        self.start(
            rate_limits=[
                hits("x-take", number=4),
                hits("x-look", number=0),
                hits("x-return", number=3, is_negative_hits=True),
            ]
        )
        for headers, status, remaining in [
            ({"x_look": "ann"}, 200, 10),
            ({"x_return": "ann"}, 200, 10),
            ({"x_take": "ann"}, 200, 6),
            ({"x_take": "ann"}, 200, 2),
            ({"x_look": "ann"}, 200, 2),
            ({"x_return": "ann"}, 200, 5),
            ({"x_take": "ann"}, 200, 1),
            ({"x_take": "ann"}, 429, 0),
            ({"x_look": "ann"}, 429, 0),
        ]:
            with self.subTest(headers, remaining=remaining):
                response = self.envoy.get(**headers)
                self.assertEqual(response.status, status)
                self.assert_limit(response, "10, 10;w=86400", remaining)

    def test_of_many_that_come_at_once_no_more_pass_than_may(self):
        self.start()
        with ThreadPoolExecutor(20) as clients:
            asked = [clients.submit(self.envoy.get, x_user="ann") for _ in range(60)]
        statuses = [one.result().status for one in asked]
        self.assertEqual([statuses.count(status) for status in (200, 429)], [10, 50])
        self.assertEqual(len(self.upstream.served), 10)

    def test_headers_of_fusebox_reach_the_client(self):
        self.start(rate_limits=[TOOL], response_headers={})
        for remaining, status in [("2", 200), ("1", 200), ("0", 200), ("0", 429)]:
            with self.subTest(remaining=remaining, status=status):
                response = self.envoy.get(x_tool="hammer")
                self.assertEqual(response.status, status)
                self.assertEqual(response.headers["RateLimit-Limit"], "3")
                self.assertEqual(response.headers["RateLimit-Remaining"], remaining)
                until_midnight = DAY_SECONDS - time.time() % DAY_SECONDS
                reset = int(response.headers["RateLimit-Reset"])
                self.assertAlmostEqual(reset, until_midnight, delta=BEFORE_MIDNIGHT_SECONDS)

    def test_metadata_of_fusebox_reaches_what_envoy_does_next(self):
        self.start(RULES + ANN + "    metadata: {plan: gold}\n", response_dynamic_metadata=True)
        metadata = json.loads(self.envoy.get(x_user="ann").headers["x-metadata"])
        self.assertEqual(metadata["domain"], "shop")
        self.assertEqual(metadata["descriptors"], [{"entries": ["user=ann"]}])
        self.assertEqual(metadata["metadata"], {"plan": "gold"})


class Native(EnvoyCase):
    """What Fusebox has besides, for rules that stay as they are."""

    def test_a_domain_may_count_by_another_algorithm(self):
        for algorithm in ["token_bucket", "sliding_window"]:
            with self.subTest(algorithm):
                self.start(rate_limits=[TOOL], domains={"shop": {"algorithm": algorithm}})
                self.assertEqual(self.statuses(3, x_tool=algorithm), [200, 200, 200])
                response = self.envoy.get(x_tool=algorithm)
                self.assertEqual(response.status, 429)
                self.assertEqual(response.headers["x-ratelimit-limit"], "3, 3;w=86400")
                self.end_fusebox()

    def test_a_policy_may_judge_instead_of_a_rule(self):
        quota = {"token_bucket": {"limit": 2, "per": "1h"}}
        self.start(
            namespaces={"partner": {"policies": {"quota": quota}}},
            domains={"shop": {"policies": {"user": "partner/quota"}}},
        )
        self.assertEqual(self.statuses(3, x_user="ann"), [200, 200, 429])
        response = self.envoy.get(x_user="ben")
        self.assertEqual(response.headers["x-ratelimit-limit"], "2, 2;w=3600")
        self.assertEqual(response.headers["x-ratelimit-remaining"], "1")
        # Calls of services are judged by the same bucket.
        client = Client(self.fusebox.channel)
        asks = [{"policy": "quota", "key": "ben"}]
        answer = client.call("Acquire", {"namespace": "partner", "asks": asks})
        self.assertEqual(name(answer, "decision"), "DECISION_ALLOW")
        self.assertEqual(self.statuses(1, x_user="ben"), [429])


class Two(EnvoyCase):
    """Requests that two rules limit: 10 a day for a user, 3 for a tool."""

    def test_the_tighter_rule_denies_and_both_count(self):
        self.start(rate_limits=[USER, TOOL])
        statuses = self.statuses(5, x_user="ann", x_tool="hammer")
        self.assertEqual(statuses, [200, 200, 200, 429, 429])
        response = self.envoy.get(x_user="ann", x_tool="hammer")
        self.assert_limit(response, "3, 10;w=86400, 3;w=86400", 0)
        # Those that were denied too.
        self.assert_limit(self.envoy.get(x_user="ann"), "10, 10;w=86400", 10 - 6 - 1)

    def test_with_all_or_nothing_a_denial_costs_nothing(self):
        self.start(rate_limits=[USER, TOOL], domains={"shop": {"charge": "all_or_nothing"}})
        statuses = self.statuses(6, x_user="ann", x_tool="hammer")
        self.assertEqual(statuses, [200, 200, 200, 429, 429, 429])
        self.assert_limit(self.envoy.get(x_user="ann"), "10, 10;w=86400", 10 - 3 - 1)


class Shadow(EnvoyCase):
    def test_a_rule_in_the_shadow_counts_and_never_denies(self):
        self.start(RULES + ANN + "    shadow_mode: true\n")
        self.assertEqual(set(self.statuses(5, x_user="ann")), {200})
        self.assertEqual(self.spent("shop|user=ann", ""), 5)

    def test_a_service_in_the_shadow_tells_what_it_would_do(self):
        self.start(rate_limits=[TOOL], shadow_mode=True)
        responses = [self.envoy.get(x_tool="hammer") for _ in range(5)]
        self.assertEqual({response.status for response in responses}, {200})
        remaining = [response.headers["x-ratelimit-remaining"] for response in responses]
        self.assertEqual(remaining, ["2", "1", "0", "0", "0"])
        self.assertEqual(self.spent("shop|tool", "hammer"), 5)


class Failure(EnvoyCase):
    def test_without_a_fusebox_envoy_does_what_it_is_told(self):
        self.start(rate_limits=[TOOL])
        envoys = []
        for settings, status in [
            ({"failure_mode_deny": False}, 200),
            ({"failure_mode_deny": True}, 500),
            ({"failure_mode_deny": True, "status_on_error": {"code": "ServiceUnavailable"}}, 503),
        ]:
            self.start_envoy([TOOL], **settings)
            self.assertEqual(self.statuses(4, x_tool=str(status)), [200, 200, 200, 429])
            envoys.append((self.envoy, status))
        self.end_fusebox(Server.stop)
        for envoy, status in envoys:
            with self.subTest(status):
                self.assertEqual(envoy.get(x_tool=str(status)).status, status)


class Restart(EnvoyCase):
    def restart(self, end: Callable[[Server], None]) -> None:
        listen = self.fusebox.grpc
        self.end_fusebox(end)
        self.start_fusebox(listen)

    def test_a_clean_restart_forgets_nothing(self):
        self.start()
        self.assertEqual(set(self.statuses(4, x_user="ann")), {200})
        self.restart(Server.stop)
        self.assertEqual(self.statuses(7, x_user="ann"), [200] * 6 + [429])

    def test_a_crash_admits_nothing_again(self):
        self.start()
        self.assertEqual(set(self.statuses(4, x_user="ann")), {200})
        self.restart(Server.kill)
        passed = self.statuses(7, x_user="ann").count(200)
        # A mark runs ahead of what is spent, by a hundredth of the limit, or by one.
        self.assertIn(passed, [5, 6])


class Reload(EnvoyCase):
    """Rules that change while they are asked for; a user who is new tells what they are now."""

    def setUp(self):
        super().setUp()
        self.strangers = 0

    def limit(self) -> str:
        """The limit that a user has now."""
        self.strangers += 1
        headers = self.envoy.get(x_user=f"stranger {self.strangers}").headers
        return headers["x-ratelimit-limit"]

    def wait_for(self, requests: int) -> None:
        told = f"{requests}, {requests};w=86400"
        wait_until(lambda: self.limit() == told, f"the limit to be {requests}")

    @staticmethod
    def rules_of(requests: int) -> str:
        return RULES.replace("requests_per_unit: 10", f"requests_per_unit: {requests}")

    def test_a_file_that_is_replaced_is_read_and_what_was_spent_stays_spent(self):
        self.start()
        self.assertEqual(set(self.statuses(3, x_user="ann")), {200})
        self.write(self.rules_of(5))
        self.wait_for(5)
        self.assertEqual(self.statuses(3, x_user="ann"), [200, 200, 429])
        self.write(self.rules_of(8))
        self.wait_for(8)
        # Six are counted, the one that was denied too.
        self.assertEqual(self.statuses(3, x_user="ann"), [200, 200, 429])

    def test_a_file_that_comes_or_goes_is_seen(self):
        self.start()
        wholesale = RULES.replace("domain: shop", "domain: wholesale")
        self.start_envoy(domain="wholesale")
        self.assertIsNone(self.limit())
        new = self.directory / "wholesale.yaml"
        new.write_text(wholesale)
        new.rename(self.rules / "wholesale.yaml")
        self.wait_for(10)
        (self.rules / "wholesale.yaml").unlink()
        wait_until(lambda: self.limit() is None, "the domain to go")

    def test_a_config_map_of_kubernetes_is_read_when_its_link_changes(self):
        # As kubelet does it: the file is a link through `..data`, and only that is replaced.
        def publish(version: str, requests: int) -> None:
            (self.rules / version).mkdir()
            (self.rules / version / "rules.yaml").write_text(self.rules_of(requests))
            (self.rules / "..data_tmp").symlink_to(version)
            (self.rules / "..data_tmp").rename(self.rules / "..data")

        publish("..2026_01_01", 10)
        (self.rules / "rules.yaml").symlink_to("..data/rules.yaml")
        self.start(rules=None)
        self.wait_for(10)
        publish("..2026_01_02", 20)
        shutil.rmtree(self.rules / "..2026_01_01")
        self.wait_for(20)
        self.assertEqual(self.statuses(21, x_user="ann"), [200] * 20 + [429])

    def test_a_file_that_is_broken_changes_nothing(self):
        self.start()
        self.assertEqual(set(self.statuses(3, x_user="ann")), {200})
        for broken in ["domain: [", RULES.replace("rate_limit", "ratelimit"), ""]:
            with self.subTest(broken):
                before = len(self.fusebox.log())
                self.write(broken)
                wait_until(lambda: "rules.yaml" in self.fusebox.log()[before:], "a line in the log")
                self.assertEqual(self.limit(), "10, 10;w=86400")
        self.assertEqual(self.statuses(8, x_user="ann"), [200] * 7 + [429])
        self.write(self.rules_of(20))
        self.wait_for(20)

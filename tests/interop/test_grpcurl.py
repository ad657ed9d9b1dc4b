"""What a person with grpcurl sees."""

import json
import subprocess

from fusebox import PATIENCE_SECONDS, ROOT, SERVICE, TOOLS, ServerCase, environment

METHODS = ["Acquire", "AcquireBatch", "Report", "Session", "Watch"]


class Grpcurl(ServerCase):
    def grpcurl(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [TOOLS / "grpcurl", "-plaintext", *arguments],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )

    def printed(self, *arguments: str) -> str:
        done = self.grpcurl(*arguments)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        return done.stdout

    def acquire(self, request: dict) -> tuple[str, ...]:
        return ("-d", json.dumps(request), self.server.grpc, f"{SERVICE}/Acquire")

    def test_list_shows_the_services(self):
        services = self.printed(self.server.grpc, "list").splitlines()
        self.assertIn(SERVICE, services)
        self.assertIn("grpc.health.v1.Health", services)
        methods = self.printed(self.server.grpc, "list", SERVICE).splitlines()
        expected = [f"{SERVICE}.{method}" for method in METHODS]
        self.assertEqual(methods, expected)

    def test_describe_shows_each_field_with_its_meaning(self):
        text = self.printed(self.server.grpc, "describe", "fusebox.v1.AcquireRequest")
        self.assertIn("\n  // How much the call matters: ", text)
        self.assertIn("  repeated .fusebox.v1.Ask asks = 2;\n", text)

    def test_a_call_is_decided(self):
        request = {"namespace": "demo", "asks": [{"policy": "signup", "key": "alice", "cost": 3}]}
        answer = json.loads(self.printed(*self.acquire(request)))
        self.assertEqual(answer["decision"], "DECISION_ALLOW")
        # JSON of protobuf: 64-bit numbers are strings, and a set optional 0 is shown.
        self.assertEqual(answer["verdicts"][0]["remaining"], "0")

    def test_an_error_is_printed_with_its_fields_in_clear(self):
        request = {"namespace": "demo", "asks": [{"policy": "signup", "cost": 4}]}
        done = self.grpcurl(*self.acquire(request))
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("Code: InvalidArgument\n", done.stderr)
        self.assertIn('"@type": "type.googleapis.com/google.rpc.BadRequest"', done.stderr)
        self.assertIn('"field": "asks[0].cost"', done.stderr)

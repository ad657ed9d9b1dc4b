"""The server under test, and a client of it that knows no proto file."""

import http.client
import os
import re
import signal
import subprocess
import tempfile
import time
import unittest
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_status import rpc_status

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / ".tools" / "bin"
SERVICE = "fusebox.v1.Resilience"

# Far above what anything here takes, so that only what hangs reaches it.
PATIENCE_SECONDS = 30

DAY_SECONDS = 24 * 60 * 60
# Far more than a test takes.
BEFORE_MIDNIGHT_SECONDS = 60


def environment(**more: str) -> dict[str, str]:
    """Ours, without what would configure the server."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("FUSEBOX_")}
    return ours | more


def is_ready(ops: str) -> bool:
    """Whether the server behind this operations address wants traffic."""
    connection = http.client.HTTPConnection(ops, timeout=PATIENCE_SECONDS)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def wait_until(condition, what: str) -> None:
    """Returns once `condition()` holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE_SECONDS} s for {what}")
        time.sleep(0.02)


def wait_past_midnight() -> None:
    """Returns at once, but for the last minute of a day (UTC): limits of a day do not begin anew in a test."""
    left = DAY_SECONDS - time.time() % DAY_SECONDS
    if left < BEFORE_MIDNIGHT_SECONDS:
        time.sleep(left + 1)


class Server:
    """One `fusebox` on free loopback ports, with a data directory of its own if none is given.

    One that is started anew may `listen` where the one before it did.
    """

    def __init__(
        self,
        *arguments: str,
        under: tuple[str, ...] = (),
        data: Path | None = None,
        listen: str = "127.0.0.1:0",
    ):
        self._directory = tempfile.TemporaryDirectory(prefix="fusebox-interop-")
        directory = Path(self._directory.name)
        self._stdout, self._stderr = directory / "stdout", directory / "stderr"
        # Port 0: the system picks one that is free, and the server prints which.
        command = [*under, os.environ["FUSEBOX_BIN"], "--data", str(data or directory / "data")]
        command += ["--listen", listen, "--ops-listen", "127.0.0.1:0", *arguments]
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                command,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )
        try:
            self.grpc = self._printed(r"gRPC +(\S+)\n")
            self.ops = self._printed(r"operations +http://(\S+)\n")
            self._wait_until(lambda: is_ready(self.ops), "/readyz to answer 200")
        except BaseException:
            self.kill()
            raise
        self.channel = grpc.insecure_channel(self.grpc, [("grpc.enable_http_proxy", 0)])

    def metric(self, name: str) -> int:
        """The value of a metric without labels."""
        connection = http.client.HTTPConnection(self.ops, timeout=PATIENCE_SECONDS)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return int(re.search(rf"^{name} (\d+)$", text, re.MULTILINE)[1])

    def log(self) -> str:
        """What it has logged so far."""
        return self._stderr.read_text()

    def terminate(self) -> None:
        """Asks the server to end."""
        self._process.send_signal(signal.SIGTERM)

    def assert_exits_cleanly(self, within_seconds: float = PATIENCE_SECONDS) -> None:
        """Waits for the end that was asked for; the exit code is 0."""
        try:
            code = self._process.wait(within_seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {within_seconds} s\n{self.log()}") from None
        if code != 0:
            raise AssertionError(f"exit code {code}\n{self.log()}")

    def stop(self) -> None:
        """Ends the server as an orchestrator would; the exit code is 0."""
        try:
            self.terminate()
            self.assert_exits_cleanly()
        finally:
            self.channel.close()
            self.kill()

    def kill(self) -> None:
        """Leaves nothing behind, whatever happened before."""
        self._process.kill()
        self._process.wait()
        self._directory.cleanup()

    def _printed(self, pattern: str) -> str:
        def found():
            return re.search(pattern, self._stdout.read_text())

        self._wait_until(found, f"`{pattern}` on stdout")
        return found()[1]

    def _wait_until(self, condition, what: str) -> None:
        def holds() -> bool:
            if self._process.poll() is not None:
                raise AssertionError(f"exit code {self._process.returncode}\n{self.log()}")
            return condition()

        wait_until(holds, what)


@dataclass(frozen=True)
class Refusal:
    """An error of the server, as a client reads it."""

    code: str
    message: str
    details: list[Message]

    def fields(self) -> list[str]:
        """The fields that it names, out of its only detail: a google.rpc.BadRequest."""
        (bad_request,) = self.details
        assert bad_request.DESCRIPTOR.full_name == "google.rpc.BadRequest", bad_request
        return [violation.field for violation in bad_request.field_violations]


class Client:
    """Speaks one service, `fusebox.v1.Resilience` if not another, from what reflection tells."""

    def __init__(self, channel: grpc.Channel, service: str = SERVICE):
        self._channel = channel
        self._service = service
        self._pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        self.methods = self._pool.FindServiceByName(service).methods_by_name

    def request(self, method: str, fields: dict | None = None) -> Message:
        """The request of a method, with these fields set."""
        return message_factory.GetMessageClass(self.methods[method].input_type)(**(fields or {}))

    def call(self, method: str, request: dict | Message) -> Message:
        """Calls a method."""
        return self._start(self._channel.unary_unary, method, request)

    def stream(self, method: str, request: dict | Message) -> grpc.Call:
        """Calls a method that answers with many messages: what it returns is iterated, or cancelled."""
        return self._start(self._channel.unary_stream, method, request)

    def session(self, requests: Iterator[dict]) -> grpc.Call:
        """A session that asks this: what it returns is iterated, or cancelled."""
        return self._start(
            self._channel.stream_stream,
            "Session",
            (self.request("Session", fields) for fields in requests),
        )

    def refused(self, method: str, request: dict | Message) -> Refusal:
        """Calls a method that must fail."""
        try:
            response = self.call(method, request)
        except grpc.RpcError as error:
            status = rpc_status.from_call(error)
            details = [self._unpacked(detail) for detail in status.details] if status else []
            return Refusal(error.code().name, error.details(), details)
        raise AssertionError(f"{method} was not refused, but answered {response}")

    def _start(self, kind, method: str, request: dict | Message):
        if isinstance(request, dict):
            request = self.request(method, request)
        response = message_factory.GetMessageClass(self.methods[method].output_type)
        stub = kind(
            f"/{self._service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        return stub(request, timeout=PATIENCE_SECONDS)

    def _unpacked(self, detail) -> Message:
        descriptor = self._pool.FindMessageTypeByName(detail.TypeName())
        return message_factory.GetMessageClass(descriptor).FromString(detail.value)


def name(message: Message, field: str) -> str:
    """The name of the value of an enum field."""
    return _names(message, field)[getattr(message, field)].name


def names(message: Message, field: str) -> list[str]:
    """The names of the values of an enum field that has many."""
    return [_names(message, field)[number].name for number in getattr(message, field)]


def _names(message: Message, field: str):
    return message.DESCRIPTOR.fields_by_name[field].enum_type.values_by_number


class ServerCase(unittest.TestCase):
    """Tests that share one server; each uses keys of its own."""

    server: Server
    client: Client

    @classmethod
    def setUpClass(cls):
        cls.server = Server()
        cls.addClassCleanup(cls.server.stop)
        cls.client = Client(cls.server.channel)

    def acquire(self, *asks: dict) -> Message:
        """Acquires in namespace `demo`."""
        return self.client.call("Acquire", {"namespace": "demo", "asks": asks})

    def remaining(self, key: str) -> int:
        """Tokens of `signup` that this key has left; a peek."""
        return self.acquire({"policy": "signup", "key": key, "cost": 0}).verdicts[0].remaining

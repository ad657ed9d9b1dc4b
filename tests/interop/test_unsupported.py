"""No field is ever accepted and ignored: what a call may not say, it refuses by name.

The fields come from the server's own reflection, so that one added to the proto and forgotten in the
server fails here.
"""

import json
import subprocess
import tempfile
import unittest
from datetime import timedelta
from pathlib import Path

from fusebox import ROOT, TOOLS, Client, Server, environment
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.message import Message

# Fields by message. Every field that is not here is for sessions only, and refused in a call.
SUPPORTED = {
    "Client": {"id", "service", "zone"},
    "Ask": {"policy", "key", "cost", "lease", "estimated"},
    "AcquireRequest": {"namespace", "asks", "client", "request_id", "priority", "max_wait", "attempt"},
    "AcquireBatchRequest": {"namespace", "client", "requests"},
    "ReportRequest": {"namespace", "client", "sequence", "outcomes", "deltas", "renew_grant_ids", "goodbye"},
    "GrantOutcome": {
        "grant_id",
        "outcome",
        "latency",
        "actual_cost",
        "lease_returned",
        "partial",
        "error_kind",
    },
    "CircuitDelta": {
        "policy",
        "key",
        "generation",
        "successes",
        "failures",
        "slow",
        "ignored",
        "local_failures",
        "requests",
        "retries",
        "latency_counts",
        "error_kinds",
    },
    "WatchRequest": {"namespace", "client", "policies", "epoch", "version"},
}

# What is asked and told of.
POLICIES = {
    "signup": {"token_bucket": {"limit": 3, "per": "1m"}},
    "payments": {"breaker": {}},
    "retries": {"retry_budget": {"ratio": "20%"}},
}

# What the server accepts, with one element in each supported list.
CLIENT = {"id": "1", "service": "interop", "zone": "here"}
ASK = {"policy": "signup", "cost": 0, "lease": 1}
ACCEPTED = {
    "Acquire": {
        "namespace": "demo",
        "client": CLIENT,
        "asks": [ASK],
        "request_id": "1",
        "priority": 3,
        "max_wait": timedelta(seconds=1),
        "attempt": 1,
    },
    "AcquireBatch": {
        "namespace": "demo",
        "client": CLIENT,
        "requests": [{"asks": [ASK], "priority": 1, "request_id": "2"}],
    },
    "Report": {
        "namespace": "demo",
        "client": CLIENT,
        "sequence": 1,
        "outcomes": [
            {"grant_id": "x", "partial": True},
            {"grant_id": "x", "lease_returned": 1},
            {
                "grant_id": "x",
                "outcome": 2,
                "latency": timedelta(seconds=1),
                "error_kind": "timeout",
            },
        ],
        "deltas": [
            {
                "policy": "payments",
                "key": "x",
                "generation": 1,
                "successes": 1,
                "failures": 1,
                "slow": 1,
                "ignored": 1,
                "local_failures": 1,
                "latency_counts": [1, 1],
                "error_kinds": ["timeout"],
            },
            {"policy": "retries", "key": "x", "requests": 5, "retries": 1},
        ],
        "renew_grant_ids": ["x"],
        "goodbye": True,
    },
    "Watch": {
        "namespace": "demo",
        "client": CLIENT,
        "policies": ["payments"],
        "epoch": 1,
        "version": 1,
    },
}


def refused_fields(message: Message, path: str = ""):
    """Path, message and descriptor of each field here and below that a call may not set."""
    of = message.DESCRIPTOR.name
    supported = SUPPORTED[of]
    for field in message.DESCRIPTOR.fields:
        if field.name not in supported:
            yield f"{path}{field.name}", message, field
        elif not is_ours(field.message_type):
            continue
        elif not field.is_repeated:
            yield from refused_fields(getattr(message, field.name), f"{path}{field.name}.")
        else:
            elements = getattr(message, field.name)
            assert elements, f"ACCEPTED sets no {path}{field.name}"
            for index, element in enumerate(elements):
                yield from refused_fields(element, f"{path}{field.name}[{index}].")


def is_ours(message_type: Descriptor | None) -> bool:
    return message_type is not None and message_type.full_name.startswith("fusebox.")


def enum_values(field: FieldDescriptor) -> list[int]:
    return [value.number for value in field.enum_type.values if value.number != 0]


def set_values(field: FieldDescriptor) -> list:
    """Values that set a field; all of them where they can be counted."""
    if field.enum_type:
        return enum_values(field)
    if field.message_type:
        return [None]
    return {
        FieldDescriptor.CPPTYPE_STRING: ["x"],
        FieldDescriptor.CPPTYPE_BOOL: [True],
    }.get(field.cpp_type, [1])


def set_field(message: Message, field: FieldDescriptor, value) -> None:
    current = getattr(message, field.name)
    if field.message_type:
        current.add() if field.is_repeated else current.SetInParent()
    elif field.is_repeated:
        current.append(value)
    else:
        setattr(message, field.name, value)


class Unsupported(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        config = Path(directory.name) / "fusebox.yaml"
        config.write_text(json.dumps({"namespaces": {"demo": {"policies": POLICIES}}}))
        server = Server("--config", str(config))
        cls.addClassCleanup(server.stop)
        cls.client = Client(server.channel)

    def test_the_table_covers_every_method(self):
        # What a session says is what calls do; `test_session` has the rest.
        self.assertEqual(set(self.client.methods), {*ACCEPTED, "Session"})
        for method, fields in ACCEPTED.items():
            with self.subTest(method):
                if self.client.methods[method].server_streaming:
                    answers = self.client.stream(method, fields)
                    next(answers)
                    answers.cancel()
                else:
                    self.client.call(method, fields)

    def test_each_is_refused_by_name(self):
        for method, fields in ACCEPTED.items():
            request = self.client.request(method, fields)
            for path, message, field in refused_fields(request):
                for value in set_values(field):
                    with self.subTest(method, field=path, value=value):
                        set_field(message, field, value)
                        self.check(method, request, path)
                    message.ClearField(field.name)

    def check(self, method, request, path):
        refusal = self.client.refused(method, request)
        self.assertEqual(refusal.code, "INVALID_ARGUMENT")
        self.assertEqual(refusal.fields(), [path])
        self.assertTrue(refusal.message.startswith(f"{path}: "), refusal.message)

    def test_the_comment_of_each_says_so_and_no_other_does(self):
        with tempfile.TemporaryDirectory() as directory:
            image = Path(directory) / "image.binpb"
            build = [TOOLS / "buf", "build", "--as-file-descriptor-set", "--output", image]
            subprocess.run(build, cwd=ROOT / "proto", env=environment(), check=True)
            files = FileDescriptorSet.FromString(image.read_bytes()).file
        (proto,) = (file for file in files if file.name.endswith("/resilience.proto"))
        comments = {
            tuple(location.path): " ".join(location.leading_comments.lower().split())
            for location in proto.source_code_info.location
        }
        # 4 is `message_type` of a file, 2 is `field` of a message (descriptor.proto).
        fields = {
            (message.name, field.name): comments[4, m, 2, f]
            for m, message in enumerate(proto.message_type)
            for f, field in enumerate(message.field)
        }
        said = {field for field, text in fields.items() if "only on a session" in text}
        refused = {
            (message, field)
            for message, field in fields
            if message in SUPPORTED and field not in SUPPORTED[message]
        }
        self.assertEqual(said, refused)
        stale = {(m, f) for m, supported in SUPPORTED.items() for f in supported} - set(fields)
        self.assertEqual(stale, set(), "fields of the table that the proto does not have")

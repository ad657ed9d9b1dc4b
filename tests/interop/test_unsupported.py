"""No field is ever accepted and ignored: what this build does not have, it refuses by name.

The fields come from the server's own reflection, so that one added to the proto and forgotten in the
server fails here.
"""

import subprocess
import tempfile
from pathlib import Path

from fusebox import ROOT, TOOLS, ServerCase, environment
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.message import Message

# Fields by message. Every field that is not here is refused when it is set.
SUPPORTED = {
    "Ask": {"policy", "key", "cost", "estimated"},
    "AcquireRequest": {"namespace", "asks"},
    "AcquireBatchRequest": {"namespace", "requests"},
    "ReportRequest": {"namespace", "outcomes"},
    "GrantOutcome": {"grant_id", "actual_cost"},
}
# Values of refused enum fields that are accepted all the same.
SUPPORTED_VALUES = {"PRIORITY_NORMAL"}

# What the server accepts, with one element in each supported list.
ACCEPTED = {
    "Acquire": {"namespace": "demo", "asks": [{"policy": "signup", "cost": 0}]},
    "AcquireBatch": {
        "namespace": "demo",
        "requests": [{"asks": [{"policy": "signup", "cost": 0}]}],
    },
    "Report": {"namespace": "demo", "outcomes": [{"grant_id": "x"}]},
}


def refused_fields(message: Message, path: str = ""):
    """Path, message and descriptor of each field here and below that this build does not have."""
    for field in message.DESCRIPTOR.fields:
        if field.name not in SUPPORTED[message.DESCRIPTOR.name]:
            yield f"{path}{field.name}", message, field
        elif field.message_type:
            elements = getattr(message, field.name)
            assert elements, f"ACCEPTED sets no {path}{field.name}"
            for index, element in enumerate(elements):
                yield from refused_fields(element, f"{path}{field.name}[{index}].")


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


class Unsupported(ServerCase):
    def test_the_table_covers_every_method(self):
        self.assertEqual(set(self.client.methods), set(ACCEPTED))
        for method, fields in ACCEPTED.items():
            with self.subTest(method):
                self.client.call(method, fields)

    def test_each_is_refused_by_name(self):
        for method, fields in ACCEPTED.items():
            request = self.client.request(method, fields)
            for path, message, field in refused_fields(request):
                for value in set_values(field):
                    with self.subTest(method, field=path, value=value):
                        set_field(message, field, value)
                        self.check(method, request, path, field, value)
                    message.ClearField(field.name)

    def check(self, method, request, path, field, value):
        if field.enum_type and field.enum_type.values_by_number[value].name in SUPPORTED_VALUES:
            self.client.call(method, request)
            return
        refusal = self.client.refused(method, request)
        self.assertEqual(refusal.code, "UNIMPLEMENTED")
        self.assertEqual(refusal.fields(), [path])
        self.assertTrue(refusal.message.startswith(f"{path}: "), refusal.message)

    def test_the_comment_of_each_says_so_and_no_other_does(self):
        with tempfile.TemporaryDirectory() as directory:
            image = Path(directory) / "image.binpb"
            build = [TOOLS / "buf", "build", "--as-file-descriptor-set", "--output", image]
            subprocess.run(build, cwd=ROOT / "proto", env=environment(), check=True)
            files = FileDescriptorSet.FromString(image.read_bytes()).file
        (proto,) = (file for file in files if file.package == "fusebox.v1")
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
        said = {field for field, text in fields.items() if "not supported by this build" in text}
        refused = {
            (message, field)
            for message, field in fields
            if message in SUPPORTED and field not in SUPPORTED[message]
        }
        self.assertEqual(said, refused)
        stale = {(m, f) for m, supported in SUPPORTED.items() for f in supported} - set(fields)
        self.assertEqual(stale, set(), "fields of the table that the proto does not have")

"""The example under deploy/envoy, as a newcomer would try it: its files, and every command of its README."""

import os
import re
import shutil
import signal
import socket
import tempfile
from pathlib import Path
from unittest import TestCase

from envoy import is_live
from fusebox import ROOT, is_ready, wait_past_midnight
from test_readme import Command, Terminal, parse

EXAMPLE = ROOT / "deploy" / "envoy"

# What listens where, in the example.
FUSEBOX, OPS, ENVOY, ADMIN, UPSTREAM = PORTS = 3873, 3874, 10000, 9901, 8000


def free_ports(count: int) -> list[int]:
    """Ports that nobody else has now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def is_open(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


class Example(TestCase):
    def test_every_command_prints_what_is_shown(self):
        wait_past_midnight()
        temporary = tempfile.TemporaryDirectory(prefix="fusebox-example-")
        self.addCleanup(temporary.cleanup)
        directory = Path(temporary.name) / "envoy"
        shutil.copytree(EXAMPLE, directory, ignore=shutil.ignore_patterns("fusebox-data"))
        # Other ports, so that it runs beside whatever else does; nothing else is changed.
        ports = dict(zip(PORTS, free_ports(len(PORTS))))
        for file in filter(Path.is_file, directory.rglob("*")):
            text = file.read_text()
            for port, free in ports.items():
                text = re.sub(rf"\b{port}\b", str(free), text)
            file.write_text(text)
        bin = Path(temporary.name) / "bin"
        bin.mkdir()
        (bin / "fusebox").symlink_to(os.environ["FUSEBOX_BIN"])

        def background_is_ready(command: Command) -> bool:
            match command.text.split()[0]:
                case "fusebox":
                    return is_ready(f"127.0.0.1:{ports[OPS]}")
                case "envoy":
                    return is_live(f"127.0.0.1:{ports[ADMIN]}")
                case _:
                    return is_open(ports[UPSTREAM])

        terminal = Terminal(
            str(directory / "fusebox-data"), background_is_ready, directory=directory, bin=bin
        )
        self.addCleanup(terminal.close)
        for command in parse((directory / "README.md").read_text()):
            with self.subTest(line=command.line):
                terminal.run(command)
        # As a newcomer ends them: Python's server would die of a SIGTERM.
        terminal.stop_background(signal.SIGINT)

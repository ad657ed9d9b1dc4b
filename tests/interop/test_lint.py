"""The wire, as buf judges it."""

import subprocess
from unittest import TestCase

from fusebox import PATIENCE_SECONDS, ROOT, TOOLS, environment


class Lint(TestCase):
    def test_buf_builds_the_wire_and_has_nothing_to_say(self):
        for command in ["build", "lint"]:
            with self.subTest(command):
                done = subprocess.run(
                    [TOOLS / "buf", command],
                    cwd=ROOT / "proto",
                    env=environment(),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=PATIENCE_SECONDS,
                )
                self.assertEqual((done.returncode, done.stdout), (0, ""))

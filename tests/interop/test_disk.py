"""The disk under the server: that it is asked to keep what it is given, and what happens when it is full."""

import tempfile
from pathlib import Path
from unittest import TestCase

import grpc
from fusebox import Client, Server, is_ready, wait_until

BATCH = 1_000
# `ulimit -f` counts blocks of 512 bytes in a POSIX shell. A write beyond it fails, once its signal is ignored.
SMALL_DISK = ("sh", "-c", "trap '' XFSZ; ulimit -f 16384; exec \"$0\" \"$@\"")


def batch(first: int, cost: int) -> dict:
    """An AcquireBatch over keys of their own, of a policy that is slow enough to be written."""
    keys = range(first, first + BATCH)
    asks = [[{"policy": "signup", "key": str(key), "cost": cost}] for key in keys]
    return {"namespace": "demo", "requests": [{"asks": ask} for ask in asks]}


class Strict(TestCase):
    def test_what_is_allowed_was_synced_and_the_metric_says_how_often(self):
        with tempfile.TemporaryDirectory() as directory:
            trace = Path(directory) / "trace"
            # -D: the tracer is the grandchild, so that signals reach the server.
            under = ("strace", "-D", "-f", "-e", "trace=fdatasync", "-o", str(trace))
            server = Server(under=under)
            self.addCleanup(server.stop)

            def synced() -> int:
                return sum("fdatasync(" in line for line in trace.read_text().splitlines())

            def metric() -> int:
                return server.metric("fusebox_journal_syncs_total")

            wait_until(lambda: synced() == metric(), "the trace and the metric to agree")
            before = metric()
            client = Client(server.channel)
            for key in range(20):
                asks = [{"policy": "signup", "key": str(key)}]
                client.call("Acquire", {"namespace": "demo", "asks": asks})
            # One caller after the other: each had a commit of its own, and each commit its witness.
            self.assertEqual(metric() - before, 2 * 20)
            wait_until(lambda: synced() == metric(), "the trace and the metric to agree")

            # A policy that is full again before anybody would restart is never written.
            for _ in range(20):
                asks = [{"policy": "api", "key": "fast"}]
                client.call("Acquire", {"namespace": "demo", "asks": asks})
            self.assertEqual(metric() - before, 2 * 20)


class FullDisk(TestCase):
    def test_nothing_is_admitted_that_could_not_be_written(self):
        with tempfile.TemporaryDirectory() as directory:
            data = Path(directory) / "data"
            server = Server(under=SMALL_DISK, data=data)
            client, allowed, error = Client(server.channel), 0, None
            while error is None and allowed < 1_000_000:
                try:
                    client.call("AcquireBatch", batch(allowed, cost=3))
                    allowed += BATCH
                except grpc.RpcError as refused:
                    error = refused
            self.assertIsNotNone(error, "the disk is never full")
            self.assertEqual(error.code().name, "UNAVAILABLE", error)
            self.assertIn("the storage failed", error.details())
            self.assertGreater(allowed, 0)

            wait_until(lambda: not is_ready(server.ops), "/readyz to say no")
            self.assertIn("Free space or mend the disk, then restart", server.log())
            refusal = client.refused("Acquire", {"namespace": "demo", "asks": [{"policy": "api"}]})
            self.assertEqual(refusal.code, "UNAVAILABLE")
            server.channel.close()
            server.kill()

            server = Server(data=data)
            self.addCleanup(server.stop)
            client = Client(server.channel)
            for first in range(0, allowed, BATCH):
                answer = client.call("AcquireBatch", batch(first, cost=0))
                # A token comes back every 20 s: nobody has the three again that were spent.
                left = max(response.verdicts[0].remaining for response in answer.responses)
                self.assertLess(left, 3)

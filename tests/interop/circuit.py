"""A service that makes calls through a circuit, as any of a fleet: it asks before each, and tells after it.

    circuit.py payments --client a --fail 3     in as many terminals as you like, each with its own name

It prints a line for each call. The calls are pretended: the first ones fail, as many as you say, then all
succeed. Its messages come from the server, by reflection; with generated code the calls are the same.
"""

import argparse
import contextlib
import itertools
import sys
import time

import grpc
from fusebox import Client, name


def main() -> None:
    options = arguments()
    who = {"namespace": options.namespace, "client": {"id": options.client}}
    ask = {"policy": options.policy, "key": options.key}
    channel = grpc.insecure_channel(options.address, [("grpc.enable_http_proxy", 0)])
    try:
        client = Client(channel)
    except grpc.RpcError as error:
        sys.exit(f"no server at {options.address}: {error.details()}")
    left_to_fail = options.fail
    with contextlib.suppress(KeyboardInterrupt):
        for _ in itertools.count() if options.calls is None else range(options.calls):
            try:
                line, failed = call(client, who, ask, options.takes, left_to_fail > 0)
                left_to_fail -= failed
            except grpc.RpcError as error:
                # Nobody decided. Whether to call then is for each service to say; this one does not.
                line = f"not decided: {error.code().name}: {error.details()}"
            print(options.client, line, flush=True)
            time.sleep(options.every)
    # What it told is not held against the target when it is gone.
    with contextlib.suppress(grpc.RpcError):
        client.call("Report", {**who, "goodbye": True})


def call(client: Client, who: dict, ask: dict, takes: float, fails: bool) -> tuple[str, bool]:
    """Makes one call, if it may; the line to print, and whether it failed."""
    answer = client.call("Acquire", {**who, "asks": [ask]})
    (verdict,) = answer.verdicts
    if name(answer, "decision") != "DECISION_ALLOW":
        return f"refused: {why(verdict)}", False

    # Here the call would be made.
    time.sleep(takes)
    outcome = {"grant_id": answer.grant_id, "outcome": "OUTCOME_SUCCESS"}
    if fails:
        outcome |= {"outcome": "OUTCOME_FAILURE", "error_kind": "timeout"}
    report = client.call("Report", {**who, "outcomes": [outcome]})
    passed = "let through as a probe" if verdict.probe else "let through"
    (circuit,) = report.circuits
    now = f"the circuit is {spoken(circuit, 'state')}" + ", as only we fail" * circuit.outlier
    return f"{passed}: {'failed' if fails else 'succeeded'}; {now}", fails


def why(verdict) -> str:
    """Why a call is not let through, in words."""
    words = spoken(verdict, "reason")
    if verdict.HasField("retry_after"):
        words += f", again in {verdict.retry_after.ToMilliseconds() / 1000:.1f} s"
    evidence = verdict.evidence
    if evidence.forced_reason:
        return f"{words}: {evidence.forced_reason}"
    if evidence.calls:
        share, by = evidence.failure_rate_basis_points / 100, evidence.reporters
        words += f": {share:g}% of {evidence.calls} calls failed, told by {by} client{'s' * (by != 1)}"
    return words + f" ({', '.join(evidence.error_kinds)})" * bool(evidence.error_kinds)


def spoken(message, field: str) -> str:
    """REASON_CIRCUIT_OPEN is `circuit open`, CIRCUIT_STATE_OPEN is `open`."""
    value = name(message, field)
    return value.removeprefix("REASON_").removeprefix("CIRCUIT_STATE_").replace("_", " ").lower()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("policy", help="name of a breaker, such as payments")
    parser.add_argument("--key", default="", help="which of its circuits")
    parser.add_argument("--client", default="a", help="who calls: another for each terminal")
    parser.add_argument("--fail", type=int, default=0, help="so many calls fail, then they succeed")
    parser.add_argument("--calls", type=int, help="end after so many, refused ones too")
    parser.add_argument("--every", type=float, default=1, help="seconds between two")
    parser.add_argument("--takes", type=float, default=0.5, help="seconds that a call takes")
    parser.add_argument("--address", default="127.0.0.1:3873", help="host and port of the server")
    parser.add_argument("--namespace", default="demo", help="namespace of the policy")
    return parser.parse_args()


if __name__ == "__main__":
    main()

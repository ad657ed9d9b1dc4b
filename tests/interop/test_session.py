"""A session from another language: one stream for all that a client asks."""

import queue

import grpc
from fusebox import ServerCase, name


class Session:
    """Asks and is answered, one thing at a time."""

    def __init__(self, speaks, hello):
        self._requests = queue.SimpleQueue()
        self._last = 0
        self._answers = speaks.session(iter(self._requests.get, None))
        self.welcome = self.ask(hello=hello).welcome

    def ask(self, **request):
        """The answer to a request, past any heartbeat."""
        self._last += 1
        self._requests.put({"id": self._last, **request})
        answer = next(answer for answer in self._answers if answer.WhichOneof("response") != "heartbeat")
        assert answer.id == self._last, answer
        return answer

    def is_over(self):
        self._requests.put(None)
        return next(self._answers, None) is None and self._answers.code() == grpc.StatusCode.OK


class Sessions(ServerCase):
    def test_a_session_binds_acquires_reports_and_closes(self):
        who = {"id": "python", "service": "interop"}
        session = Session(self.client, {"namespace": "demo", "client": who})
        self.assertEqual(len(session.welcome.truth_id), 32)
        self.assertEqual(session.welcome.heartbeat.ToSeconds(), 1)

        bound = session.ask(bind={"handle": 1, "policy": "signup", "key": "session"}).bound
        self.assertEqual((bound.handle, bound.clients), (1, 1))
        self.assertEqual(bound.policy.token_bucket.limit, 3)
        self.assertEqual(name(bound.policy, "on_unreachable"), "ON_UNREACHABLE_LOCAL")

        acquired = session.ask(acquire={"asks": [{"handle": 1, "cost": 2}]}).acquire
        self.assertEqual(name(acquired, "decision"), "DECISION_ALLOW")
        self.assertEqual(self.remaining("session"), 1)
        refusal = session.ask(acquire={"asks": [{"handle": 1, "cost": 4}]}).refusal
        self.assertEqual(refusal.code, grpc.StatusCode.INVALID_ARGUMENT.value[0])
        self.assertIn("never possible", refusal.message)

        job = session.ask(acquire={"asks": [{"policy": "jobs", "key": "session"}]}).acquire
        outcome = {"grant_id": job.grant_id}
        report = session.ask(report={"outcomes": [outcome]}).report
        self.assertEqual(len(report.results), 1)

        session.ask(acquire={"asks": [{"policy": "jobs", "key": "session"}]})
        self.assertEqual(self.permits_left(), 0)
        self.assertEqual(session.ask(close={}).WhichOneof("response"), "closed")
        self.assertTrue(session.is_over())
        self.assertEqual(self.permits_left(), 1, "a close releases at once")

    def test_a_first_message_that_is_not_hello_ends_it(self):
        answers = self.client.session(iter([{"id": 1, "acquire": {}}]))
        with self.assertRaises(grpc.RpcError) as raised:
            next(answers)
        self.assertEqual(raised.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)

    def permits_left(self) -> int:
        return self.acquire({"policy": "jobs", "key": "session", "cost": 0}).verdicts[0].remaining

"""The README, as a reader would try it: every command that it shows, and what it says comes of it.

    ```console
    $ a command \
        that goes on
    what it prints
    $ another # not run here: why
    ```

A block `console background` has one command, which runs until the document ends; its output goes on after
what is shown. `…` stands for any text in a line, and alone on a line for any number of lines; nothing else
is fuzzy. Standard error is shown where it was printed, as on a terminal.
"""

import contextlib
import difflib
import os
import re
import signal
import subprocess
import tempfile
import time
import unittest
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fusebox import PATIENCE_SECONDS, ROOT, TOOLS, environment, is_ready

README = ROOT / "README.md"
DEFAULT_OPS = "127.0.0.1:3874"

# A command may be `cargo build`, on a machine that others use too.
COMMAND_SECONDS = 900

FENCE = re.compile(r"(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>.*)")
NOT_RUN = re.compile(r"\s# not run here:(?P<reason>.*)$")


class Malformed(Exception):
    """The document is not written as this runner reads it."""


@dataclass
class Command:
    line: int
    text: str
    background: bool
    output: list[str] = field(default_factory=list)

    def not_run(self) -> str | None:
        """Why it is not run, if it is not."""
        note = NOT_RUN.search(self.text)
        return note and note["reason"].strip()


def parse(document: str) -> list[Command]:
    """All commands of a document, in order."""
    commands: list[Command] = []
    lines = enumerate(document.splitlines(), 1)
    for number, line in lines:
        if not (fence := FENCE.fullmatch(line)):
            continue
        block = list(fenced(fence, number, lines))
        match fence["info"].split():
            case ["console"]:
                commands += console(block, background=False)
            case ["console", "background"]:
                some = console(block, background=True)
                if len(some) != 1:
                    raise Malformed(f"line {number}: a background block has one command")
                commands += some
            case ["console", *_]:
                raise Malformed(f"line {number}: `{fence['info']}` is no kind of block")
            case _ if any(text.startswith("$ ") for _, text in block):
                raise Malformed(f"line {number}: commands belong in a `console` block")
    return commands


def fenced(fence: re.Match, start: int, lines: Iterator) -> Iterator[tuple[int, str]]:
    """The numbered lines of a fenced block."""
    end = re.compile(rf" *{fence['fence']}{fence['fence'][0]}* *")
    for number, line in lines:
        if end.fullmatch(line):
            return
        yield number, line.removeprefix(fence["indent"])
    raise Malformed(f"line {start}: the block does not end")


def console(block: list[tuple[int, str]], background: bool) -> list[Command]:
    commands: list[Command] = []
    continues = False
    for number, line in block:
        if continues:
            if not line.startswith(("> ", " ")):
                raise Malformed(f"line {number}: a command goes on with `> ` or a space")
            commands[-1].text += "\n" + line.removeprefix("> ")
        elif line.startswith("$ "):
            commands.append(Command(number, line.removeprefix("$ "), background))
        elif commands:
            commands[-1].output.append(line)
        else:
            raise Malformed(f"line {number}: output of no command")
        continues = not commands[-1].output and line.endswith("\\")
    if continues:
        raise Malformed(f"line {block[-1][0]}: the command does not end")
    for command in commands:
        if command.not_run() == "":
            raise Malformed(f"line {command.line}: `not run here` gives no reason")
        while command.output and not command.output[-1]:
            command.output.pop()
    return commands


def pattern(output: list[str]) -> re.Pattern:
    """What output must look like, each line with its end."""
    return re.compile(
        "".join(
            r"(?:.*\n)*"
            if line.strip() == "…"
            else ".*".join(map(re.escape, line.split("…"))) + r"\n"
            for line in output
        )
    )


class Terminal:
    """What a reader has: a shell, at the root of the repository or elsewhere, with the tools installed.

    `bin` has programs besides.
    """

    def __init__(
        self,
        data: str,
        background_is_ready: Callable[[Command], bool],
        directory: Path = ROOT,
        bin: Path = TOOLS,
    ):
        self._background: list[subprocess.Popen] = []
        self._background_is_ready = background_is_ready
        self._directory = directory
        self._environment = environment(
            PATH=f"{bin}:{TOOLS}:{os.environ['PATH']}",
            FUSEBOX_DATA=data,
            CARGO_TERM_COLOR="never",
        )

    def run(self, command: Command) -> None:
        """Runs a command, whose output must be what is shown."""
        if command.background:
            self._start(command)
            return
        with tempfile.TemporaryFile() as printed:
            shell = self._shell(command, printed)
            try:
                code = shell.wait(COMMAND_SECONDS)
            finally:
                kill_group(shell)
            output = read(printed)
        if not pattern(command.output).fullmatch(output):
            raise mismatch(command, output)
        # A failure that shows in the output is part of the story; a silent one is not.
        if code != 0 and not command.output:
            raise AssertionError(f"line {command.line}: exit code {code}")

    def stop_background(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Ends what runs in the background as an orchestrator would; exit codes are 0."""
        early = [shell.args[-1] for shell in self._background if shell.poll() is not None]
        for shell in self._background:
            shell.send_signal(how)
        codes = [shell.wait(PATIENCE_SECONDS) for shell in self._background]
        if early or any(codes):
            raise AssertionError(f"background: exit codes {codes}; ended by themselves: {early}")

    def close(self) -> None:
        """Leaves nothing behind, whatever happened before."""
        for shell in self._background:
            kill_group(shell)

    def _start(self, command: Command) -> None:
        with tempfile.TemporaryFile() as printed:
            shell = self._shell(command, printed)
            self._background.append(shell)
            deadline = time.monotonic() + COMMAND_SECONDS
            while True:
                # First whether it has said all it will, then what it said.
                over = shell.poll() is not None or time.monotonic() > deadline
                ready = self._background_is_ready(command)
                output = read(printed)
                if over and not ready:
                    raise AssertionError(f"$ {command.text}\nnever ready; printed:\n{output}")
                if ready and not pattern(command.output).match(output):
                    raise mismatch(command, output)
                if ready:
                    return
                time.sleep(0.05)

    def _shell(self, command: Command, printed) -> subprocess.Popen:
        # Bash becomes its only command, so that signals and exit codes are those of the command.
        return subprocess.Popen(
            ["bash", "-c", command.text],
            cwd=self._directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill_group(shell: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(shell.pid, signal.SIGKILL)
    shell.wait()


def read(printed) -> str:
    """What is in a file that another process writes, without moving where it writes."""
    output = os.pread(printed.fileno(), os.fstat(printed.fileno()).st_size, 0)
    # Blank lines at the end do not show in a document.
    text = output.decode(errors="replace").rstrip("\n")
    return text and text + "\n"


def mismatch(command: Command, output: str) -> AssertionError:
    diff = difflib.unified_diff(
        command.output, output.splitlines(), f"line {command.line}", "printed", lineterm=""
    )
    return AssertionError(f"$ {command.text}\n" + "\n".join(diff))


class Readme(unittest.TestCase):
    def test_every_command_prints_what_is_shown(self):
        self.assertTrue(README.exists(), "there is no README.md")
        commands = parse(README.read_text(encoding="utf-8"))
        self.assertTrue(commands, "the README has no `console` block")
        self.assertFalse(is_ready(DEFAULT_OPS), f"another server is on {DEFAULT_OPS} already")
        data = tempfile.TemporaryDirectory(prefix="fusebox-readme-")
        self.addCleanup(data.cleanup)
        terminal = Terminal(data.name, lambda _: is_ready(DEFAULT_OPS))
        self.addCleanup(terminal.close)

        not_run = [command for command in commands if command.not_run()]
        for command in commands:
            if command in not_run:
                print(f"\n  README line {command.line} not run here: {command.not_run()}", end="")
                continue
            with self.subTest(line=command.line):
                terminal.run(command)
        terminal.stop_background()
        print(f"\n  README: {len(commands) - len(not_run)} commands run, {len(not_run)} not run here")


class Parser(unittest.TestCase):
    def test_commands_and_their_output(self):
        document = """\
# Title
```console
$ one
first

second
$ two # a comment
```
```yaml
not: a command
```
- in a list

  ```console background
  $ serve
  …
  ```
"""
        self.assertEqual(
            parse(document),
            [
                Command(3, "one", False, ["first", "", "second"]),
                Command(7, "two # a comment", False, []),
                Command(15, "serve", True, ["…"]),
            ],
        )

    def test_a_command_goes_on_after_a_backslash(self):
        document = "```console\n$ a \\\n>   b \\\n  c\nprinted \\\n too\n```"
        (command,) = parse(document)
        self.assertEqual(command.text, "a \\\n  b \\\n  c")
        self.assertEqual(command.output, ["printed \\", " too"])

    def test_what_is_not_run_says_why(self):
        document = "```console\n$ go install \\\n  x # not run here: installed already\n$ true\n```"
        reasons = [command.not_run() for command in parse(document)]
        self.assertEqual(reasons, ["installed already", None])

    def test_an_inner_fence_belongs_to_the_outer_block(self):
        self.assertEqual(parse("````\n```console\n$\n```\n````"), [])

    def test_what_would_be_overlooked_is_an_error(self):
        for document in [
            "```console\n$ unclosed",
            "```console\noutput of nothing\n```",
            "```console\n$ a \\\nb\n```",
            "```console\n$ a \\\n```",
            "```console\n$ a # not run here:\n```",
            "```console fast\n$ a\n```",
            "```console background\n$ a\n$ b\n```",
            "```console background\n```",
            "```sh\n$ untested\n```",
        ]:
            with self.subTest(document), self.assertRaises(Malformed):
                parse(document)


class Matcher(unittest.TestCase):
    def test_an_ellipsis_is_any_text_in_a_line_or_any_lines(self):
        for shown, printed in [
            (["a … c"], "a b c\n"),
            (["a…"], "a\n"),
            (["a", "…", "z"], "a\nz\n"),
            (["a", "  …", "z"], "a\nb\nc\nz\n"),
            (["…"], ""),
            ([], ""),
        ]:
            with self.subTest(shown):
                self.assertTrue(pattern(shown).fullmatch(printed))

    def test_nothing_else_is_fuzzy(self):
        for shown, printed in [
            (["a … c"], "a b\nc\n"),
            (["a"], "a \n"),
            (["a"], "a\nb\n"),
            (["a", "b"], "a\n"),
            (["."], "x\n"),
            (["..."], "abc\n"),
            ([], "a\n"),
            (["a"], ""),
        ]:
            with self.subTest(shown, printed=printed):
                self.assertFalse(pattern(shown).fullmatch(printed))


class Run(unittest.TestCase):
    def setUp(self):
        data = tempfile.TemporaryDirectory()
        self.addCleanup(data.cleanup)
        self.terminal = Terminal(data.name, lambda _: (Path(data.name) / "ready").exists())
        self.addCleanup(self.terminal.close)

    def run_all(self, *lines: str, kind: str = "console"):
        for command in parse("\n".join([f"```{kind}", *lines, "```"])):
            self.terminal.run(command)

    def test_output_as_shown_passes_standard_error_included(self):
        self.run_all("$ echo a; echo b >&2; echo; exit 3", "a", "b")

    def test_wrong_output_fails_and_shows_both(self):
        with self.assertRaisesRegex(AssertionError, r"-b\n\+a"):
            self.run_all("$ echo a", "b")

    def test_output_that_is_not_shown_fails(self):
        with self.assertRaises(AssertionError):
            self.run_all("$ echo a")

    def test_a_silent_failure_fails(self):
        with self.assertRaisesRegex(AssertionError, "exit code 1"):
            self.run_all("$ false")

    def test_the_background_runs_on_until_it_is_stopped(self):
        serve = "trap 'exit 0' TERM; echo up; touch $FUSEBOX_DATA/ready; while :; do sleep 0.1; done"
        self.run_all(f"$ {serve}", "up", kind="console background")
        self.run_all("$ echo meanwhile", "meanwhile")
        self.terminal.stop_background()

    def test_a_background_that_prints_something_else_fails(self):
        serve = "echo down; touch $FUSEBOX_DATA/ready; sleep 60"
        with self.assertRaisesRegex(AssertionError, r"-up\n\+down"):
            self.run_all(f"$ {serve}", "up", kind="console background")

    def test_a_background_that_ends_by_itself_fails(self):
        with self.assertRaisesRegex(AssertionError, "never ready; printed:\nup"):
            self.run_all("$ echo up", "up", kind="console background")

    def test_a_background_that_does_not_exit_with_0_fails(self):
        self.run_all("$ touch $FUSEBOX_DATA/ready; exec sleep 60", kind="console background")
        with self.assertRaisesRegex(AssertionError, "-15"):
            self.terminal.stop_background()

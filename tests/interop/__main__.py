"""Runs the tests, and counts them on a last line of its own."""

import sys
import unittest
from pathlib import Path

names = sys.argv[1:]
loader = unittest.defaultTestLoader
tests = loader.loadTestsFromNames(names) if names else loader.discover(str(Path(__file__).parent))
result = unittest.TextTestRunner(stream=sys.stdout, verbosity=2).run(tests)

# One test fails once, however many of its subtests do. A class whose server did not start never ran.
broken = {
    str(getattr(test, "test_case", test)): getattr(test, "test_case", test)
    for test, _ in result.failures + result.errors + result.skipped
} | {str(test): test for test in result.unexpectedSuccesses}
ran_and_broken = sum(isinstance(test, unittest.TestCase) for test in broken.values())
passed = result.testsRun - ran_and_broken
print(f"{passed} passed, {len(broken)} failed")
sys.exit(bool(broken) or passed == 0)

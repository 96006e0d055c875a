"""How a command ends when it cannot do what was asked: a sentence and an exit code.

Exit codes: 0 ok, 1 failure, 2 usage, 69 the broker cannot be reached, 78 configuration.
"""

import asyncio
import json
import sys
from collections.abc import Coroutine

from shared.errors import ConfigError, SeedwireError

EXIT_FAILURE, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_CONFIG = 1, 2, 69, 78
EXIT_INTERRUPTED = 130


class Failure(SeedwireError):
    """What was asked cannot be done; the text says why and what to change."""

    def __init__(self, text: str, *, code: int = EXIT_FAILURE) -> None:
        super().__init__(text)
        self.code = code


class Usage(Failure):
    """The command line contradicts itself."""

    def __init__(self, text: str) -> None:
        super().__init__(text, code=EXIT_USAGE)


def outcome(command: Coroutine[object, object, None], *, as_json: bool = False) -> int:
    """Run a command; its exit code. What a user can mend is told in a sentence, no traceback.

    With `as_json` that sentence is `{"error": ..., "code": ...}`, on stderr too.
    """
    try:
        asyncio.run(command)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Failure as failure:
        return told(failure, failure.code, as_json=as_json)
    except ConfigError as error:
        return told(error, EXIT_CONFIG, as_json=as_json)
    except SeedwireError as error:
        return told(error, EXIT_FAILURE, as_json=as_json)
    return 0


def told(error: Exception, code: int, *, as_json: bool = False) -> int:
    """Say what went wrong on stderr; returns `code`, to exit with."""
    line = json.dumps({"error": str(error), "code": code}) if as_json else f"error: {error}"
    print(line, file=sys.stderr)
    return code

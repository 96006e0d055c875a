"""Files on a model hub by name: hf://OWNER/REPO[@REVISION]/PATH, hf://datasets/OWNER/REPO/...

The package huggingface_hub fetches and caches them. It is imported in `fetch` alone; who must stay
small runs this module as a child: `python -m shared.hub NAME` prints where the file lies.
"""

import asyncio
import contextlib
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigError, TransientError
from shared.orphans import ends_with_parent
from shared.runtime import EXIT_CONFIG

SCHEME = "hf://"
DATA_SETS = "hf://datasets/"

_SHAPE = (
    "hf://OWNER/REPO/FILE or hf://datasets/OWNER/REPO/FILE, with @REVISION after REPO if wanted"
)
_NAME = re.compile(
    r"hf://(?P<data>datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/\s@]+))?/(?P<path>\S.*)",
    re.ASCII,
)
_EXIT_TRANSIENT = 75
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of one repository; an empty `revision` is its main branch."""

    repo: str
    is_data_set: bool
    revision: str
    path: str


def is_hub_name(text: str) -> bool:
    return text.startswith(SCHEME)


def parse(name: str, *, data_set: bool) -> HubFile:
    """The file that `name` means; `data_set`: rows are wanted, not a model.

    Raises:
        ConfigError: it is no such name; shows the shape.
    """
    found = _NAME.fullmatch(name)
    if found is None or ".." in found["path"].split("/"):
        raise ConfigError(f"{name}: give {_SHAPE}")
    if data_set and not found["data"]:
        raise ConfigError(f"{name}: rows come from a data set: {DATA_SETS}OWNER/REPO/FILE")
    if found["data"] and not data_set:
        raise ConfigError(f"{name}: this names a data set, not a model: {SCHEME}OWNER/REPO/FILE")
    revision = (found["revision"] or "").replace("%2F", "/")
    return HubFile(found["repo"], bool(found["data"]), revision, found["path"])


def fetch(file: HubFile) -> Path:
    """The file is here, fetched or from the cache. Honours HF_ENDPOINT, HF_TOKEN and HF_HOME.

    Raises:
        ConfigError: the package is missing, or the hub has no such file for this user.
        TransientError: the hub cannot be reached.
    """
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise ConfigError(
            "names on the hub need the package huggingface_hub: pip install 'seedwire[hub]', or "
            "fetch the file yourself and name it"
        ) from error
    shown = f"{'datasets/' * file.is_data_set}{file.repo}"
    try:
        path = hf_hub_download(
            file.repo,
            file.path,
            repo_type="dataset" if file.is_data_set else "model",
            revision=file.revision or None,
        )
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"{shown} is gated: accept its terms on the hub and set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"the hub has no {shown}, or not for you; check the name, or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"{shown} has no revision {file.revision!r}; check it") from error
    except errors.RemoteEntryNotFoundError as error:
        raise ConfigError(f"{shown} has no file {file.path}; check the name") from error
    except errors.HFValidationError as error:
        raise ConfigError(f"{shown}: {error}") from error
    except OSError as error:  # every error of the link, and of the disk
        why = str(error).partition("\n")[0]
        raise TransientError(
            f"{file.path} of {shown} cannot be fetched now: {why}; check the network and "
            "HF_ENDPOINT, or fetch the file yourself and name it",
            delay_s=30.0,
        ) from error
    return Path(str(path))


async def fetch_in_child(name: str, *, progress: bool = False) -> Path:
    """The same in a process of its own, which ends with this one or when this is cancelled.

    `progress`: it draws its bar on this process's stderr.

    Raises:
        ConfigError, TransientError: as `fetch`; TransientError also where the child was ended.
    """
    python_path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1"}
    if not progress:
        quiet["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "shared.hub", name),
        stdout=asyncio.subprocess.PIPE,
        stderr=None if progress else asyncio.subprocess.DEVNULL,
        env={**os.environ, **quiet, "PYTHONPATH": python_path},
        preexec_fn=ends_with_parent(),
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
    text = said.decode(errors="replace").strip()
    if process.returncode == 0:
        return Path(text)
    if process.returncode == EXIT_CONFIG:
        raise ConfigError(text)
    raise TransientError(
        text or f"{name}: the process that fetched it ended with {process.returncode}",
        delay_s=30.0,
    )


def main() -> int:
    """Fetch the file that the one argument names; print its path, or why it is not here."""
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    try:
        said, code = str(fetch(parse(name, data_set=name.startswith(DATA_SETS)))), 0
    except ConfigError as error:
        said, code = str(error), EXIT_CONFIG
    except TransientError as error:
        said, code = str(error), _EXIT_TRANSIENT
    sys.stdout.write(f"{said}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())

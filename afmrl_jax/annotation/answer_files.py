"""The files of annotations that annotate writes, and reads again when it goes on."""

import contextlib
import fcntl
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afmrl_jax.attributes.text import Parsed, Verdict
from afmrl_jax.core.errors import UserError

log = logging.getLogger(__name__)

FILES = ("attributes", "invalid")  # .jsonl: of valid answers, and of the others
KEPT_CHARACTERS = 10_000  # of an invalid answer


@dataclass(frozen=True)
class Annotation:
    """A model's answer to a listing, or the failure to answer.

    confidence: as in Description, of a generator; else None. failure: "" where there is an answer;
    "refused" or "stopped" where another attempt would fail as well, else "unanswered". reason: of
    the failure, in words.
    """

    text: str
    parsed: Parsed
    confidence: dict[str, float] | None = None
    failure: str = ""
    reason: str = ""

    @property
    def verdict(self) -> str:
        """The failure, else the parser's verdict."""
        return self.failure or self.parsed.verdict.value


class AnswerFiles:
    """attributes.jsonl and invalid.jsonl of a workdir.

    keys: (listing_id, `Content.key`) of each listing in them. A listing whose line is deleted is
    annotated again.
    """

    def __init__(self, workdir: Path):
        with contextlib.ExitStack() as stack:
            self._valid, self._invalid = (
                stack.enter_context(contextlib.closing(AnswerFile(workdir / f"{name}.jsonl")))
                for name in FILES
            )
            self._closed = stack.pop_all()
        self.workdir, self.keys = workdir, self._valid.keys | self._invalid.keys

    def close(self) -> None:
        """Ends the writing."""
        self._closed.close()

    def write(self, listing_id: str, content: str, annotation: Annotation) -> None:
        """Adds a line to the file of valid answers or to the other. content: the listing's key."""
        if annotation.verdict == Verdict.VALID.value:
            fields: dict[str, Any] = {"attributes": annotation.parsed.attributes}
            if annotation.parsed.form != "plain":
                fields["form"] = annotation.parsed.form
            if annotation.confidence is not None:
                fields["confidence"] = annotation.confidence
            self._valid.write(listing_id, **fields, content=content)
        else:
            reason = {"reason": annotation.reason} if annotation.reason else {}
            answer = annotation.text[:KEPT_CHARACTERS]
            fields = {"verdict": annotation.verdict, **reason, "answer": answer}
            self._invalid.write(listing_id, **fields, content=content)


class AnswerFile:
    """Lines of JSON, each with a listing_id; after a kill the last whole line stays the last.

    keys: of the listings in the file, as in AnswerFiles. Raises UserError where another run writes
    the file, or where a line has another format.
    """

    def __init__(self, path: Path):
        self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.keys, whole, tail = _read_keys(path)
            self._file.truncate(whole)
            self._file.write(tail)
        except BlockingIOError:
            raise UserError(f"{path} is being written by another run: wait until it ends") from None
        except UserError:
            self.close()
            raise

    def close(self) -> None:
        """Ends the writing, so that another run may write."""
        self._file.close()

    def write(self, listing_id: str, **fields: Any) -> None:
        """Adds a line, in one write."""
        line = json.dumps({"listing_id": listing_id, **fields}, ensure_ascii=False) + "\n"
        # A lone surrogate becomes \udXXX, as JSON writes it.
        self._file.write(line.encode(errors="backslashreplace"))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _read_keys(path: Path) -> tuple[set[tuple[str, str]], int, bytes]:
    """The keys of a file's whole lines, the number of their bytes, and the line end to add where an
    editor left out the last one."""
    keys, whole, tail = set(), 0, b""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                if not _is_json(line):
                    break  # torn when a run was killed
                tail = b"\n"
            whole += len(line)
            try:
                fields = json.loads(line)
                keys.add((fields["listing_id"], fields["content"]))
            except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
                raise UserError(
                    f"{path} line {number} is no answer of this program: delete the line"
                ) from None
    return keys, whole, tail

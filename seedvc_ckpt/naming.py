"""File names of checkpoints: (step, epoch) to a name and back, exact inverses of each other."""

from __future__ import annotations

import operator
import re
import string
from dataclasses import dataclass, field
from typing import NamedTuple, SupportsIndex

from seedvc_ckpt.errors import PatternError

__all__ = ["MAX_NUMBER", "SEED_VC", "NamePattern", "ParsedName"]

MAX_NUMBER = 2**53
"""The largest step or epoch: what every JSON reader still keeps exactly."""

_LONGEST_NAME = 200  # bytes; file systems allow 255, markers and temporary names need the rest
_FIELDS = ("step", "epoch")
_SPEC = re.compile(r"(?:0?([1-9][0-9]?))?d?")


class ParsedName(NamedTuple):
    """What a checkpoint's name says. Orders by step, then epoch."""

    step: int
    epoch: int = 0


@dataclass(frozen=True)
class NamePattern:
    """A template such as ``DiT_epoch_{epoch:05d}_step_{step:05d}.pth``.

    Fields are ``{step}``, required, and ``{epoch}``, each once, in any order, as ``{step}`` or zero-padded
    like ``{step:05d}``. A width is a minimum: step 123456 under ``:05d`` is ``123456``. ``{{`` and ``}}`` stand
    for braces; every other character stands for itself. `parse` accepts exactly the names that `format` makes.

    Raises:
        PatternError: for a template without ``{step}``, with other fields or format codes, or whose names could
            be read in two ways, leave the folder, or be mistaken for the library's own temporary files.
    """

    template: str
    _regex: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        pieces = _pieces(self.template)
        names = [name for _, name, _ in pieces if name]
        self._check(pieces, names)
        regex = "".join(re.escape(text) + (_number(name, width) if name else "") for text, name, width in pieces)
        object.__setattr__(self, "_regex", re.compile(regex))
        longest = self.format(MAX_NUMBER, MAX_NUMBER)
        try:
            size = len(longest.encode())
        except UnicodeEncodeError:
            raise self._error("has characters that no file name can hold") from None
        if size > _LONGEST_NAME:
            raise self._error(f"makes names of up to {size} bytes, the limit is {_LONGEST_NAME}: shorten it")

    def format(self, step: SupportsIndex, epoch: SupportsIndex = 0) -> str:
        """The file name of a checkpoint.

        Raises:
            PatternError: for a number that is negative, above `MAX_NUMBER`, or not a whole number.
        """
        numbers = {"step": checked_number("step", step), "epoch": checked_number("epoch", epoch)}
        return self.template.format(**numbers)

    def parse(self, name: str) -> ParsedName | None:
        """The numbers in `name`, or None when `format` would not have made it."""
        match = self._regex.fullmatch(name)
        if match is None:
            return None
        step = int(match["step"])
        epoch = int(match["epoch"]) if self._regex.groups > 1 else 0
        return ParsedName(step, epoch) if step <= MAX_NUMBER and epoch <= MAX_NUMBER else None

    def _error(self, problem: str) -> PatternError:
        return PatternError(f"the name pattern {self.template!r} {problem}")

    def _check(self, pieces: list[tuple[str, str, int]], names: list[str]) -> None:
        if "step" not in names:
            raise self._error("has no {step}: every checkpoint needs its step in its name")
        if len(set(names)) < len(names):
            raise self._error("names a field twice: keep one of each")
        for separator, _, _ in pieces[1 : len(names)]:
            if not re.search(r"[^0-9]", separator):
                raise self._error(
                    f"is ambiguous: between two numbers stands {separator!r}, so that one run of digits could be "
                    "split in several ways; put a letter or a sign such as '_' there"
                )
        literal = "".join(text for text, _, _ in pieces)
        if "/" in literal or any(ord(character) < 32 or ord(character) == 127 for character in literal):
            raise self._error("holds '/' or a control character: it must name a file, not a path")
        if self.template.startswith("."):
            raise self._error("begins with a dot: such names are kept for temporary and hidden files")
        if self.template.endswith((".pin", ".lock")):
            raise self._error("ends with .pin or .lock: such names are kept for the library's markers")


def checked_number(what: str, value: SupportsIndex) -> int:
    """`value` as an int between 0 and `MAX_NUMBER`; `what` names it in the error.

    Raises:
        PatternError: for anything else.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise PatternError(f"{what} must be a whole number, got {value!r} ({type(value).__name__})")
    number = operator.index(value)
    if not 0 <= number <= MAX_NUMBER:
        raise PatternError(f"{what} must be between 0 and 2**53, got {number}")
    return number


def _pieces(template: str) -> list[tuple[str, str, int]]:
    """(literal text, field name or "", minimum width) for each part of the template."""
    if not isinstance(template, str):
        raise PatternError(f"a name pattern is a string such as {SEED_VC.template!r}, got {template!r}")
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise PatternError(f"the name pattern {template!r} is malformed: {error}") from None
    pieces: list[tuple[str, str, int]] = []
    text = ""  # an escaped brace splits a literal in two
    for literal, name, spec, conversion in parsed:
        text += literal
        if name is None:
            continue
        if name not in _FIELDS or conversion:
            raise PatternError(
                f"the name pattern {template!r} has the field {{{name}{'!' + conversion if conversion else ''}}}: "
                "only {step} and {epoch} can be used"
            )
        match = _SPEC.fullmatch(spec or "")
        if match is None or (match[1] and not (spec or "").startswith("0")):
            raise PatternError(
                f"the name pattern {template!r} formats {{{name}:{spec}}}: only zero-padded whole numbers such as "
                f"{{{name}:05d}} can be read back"
            )
        pieces.append((text, name, int(match[1] or 1)))
        text = ""
    pieces.append((text, "", 0))
    return pieces


def _number(name: str, width: int) -> str:
    """A regular expression for exactly what format code ``0{width}d`` writes."""
    padded = f"[0-9]{{{width}}}"
    longer = f"[1-9][0-9]{{{width},{max(width, 16)}}}"
    return f"(?P<{name}>{padded}|{longer})"


SEED_VC = NamePattern("DiT_epoch_{epoch:05d}_step_{step:05d}.pth")
"""The names that Seed-VC's trainer gives its checkpoints."""

"""The error tree."""

import copy
import pickle
import re

import pytest

from seedvc_ckpt import CheckpointError, CorruptCheckpointError, ExportError, SaveFailedError, errors

TREE = dict(re.findall(r"[├└]── (\w+)(?: +\((\w+)\))?", errors.__doc__))


def example(kind):
    if kind is CorruptCheckpointError:
        return kind("a.pth", "data/3 (net['x'])", "its CRC is 1, 2 is recorded")
    if kind is SaveFailedError:
        return kind("no room", needed=10, free=3)
    if kind is ExportError:
        return kind("does not fit", ("a: missing", "b: missing"))
    return kind("found, where, remedy")


KINDS = [getattr(errors, name) for name in errors.__all__]


def test_the_drawn_tree_is_the_tree():
    """The tree at the top of the module names every error, once, and only these."""
    drawn = {"CheckpointError", *TREE}
    defined = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert drawn == set(errors.__all__) == defined
    assert errors.__all__ == sorted(errors.__all__)


@pytest.mark.parametrize("name", TREE)
def test_errors_are_the_builtins_that_users_expect(name):
    """Each error is a CheckpointError and the builtin that the tree shows beside it."""
    kind = getattr(errors, name)
    builtins = [base for base in kind.__mro__ if base.__module__ == "builtins" and base not in (object, BaseException)]
    assert issubclass(kind, CheckpointError)
    assert builtins[0].__name__ == (TREE[name] or "Exception")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_survive_pickling(kind, protocol):
    """Type, message and attributes come back from another process, and from copies."""
    error = example(kind)
    for twin in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is kind
        assert str(twin) == str(error) != ""
        assert twin.args == error.args
        assert vars(twin) == vars(error)


def test_attributes_say_what_the_message_says():
    """Programs need not parse messages: file, record, reason, bytes and differences are attributes."""
    corrupt, full, export = map(example, [CorruptCheckpointError, SaveFailedError, ExportError])
    assert (corrupt.name, corrupt.record, corrupt.reason) == (
        "a.pth",
        "data/3 (net['x'])",
        "its CRC is 1, 2 is recorded",
    )
    assert str(corrupt) == "a.pth: data/3 (net['x']): its CRC is 1, 2 is recorded"
    assert str(CorruptCheckpointError("a.pth", "", "too short")) == "a.pth: too short"
    assert (full.needed, full.free) == (10, 3)
    assert export.differences == ("a: missing", "b: missing")
    assert (SaveFailedError("x").needed, SaveFailedError("x").free) == (None, None)
    assert ExportError("x").differences == ()

"""Pickles as data: an interpreter of our own, which imports nothing, and calls and allocates only what it knows.

Python's own unpickler calls what a pickle names, sizes its memo by an index that a pickle claims, and hashes keys that
take it for ever. Here a file's names are looked up in a table, and memory and time grow no faster than the file.
"""

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import BinaryIO, NamedTuple

# What a pickle's calls may make, in sizes of the file: bytes that are written as text are a copy of that text.
_MAX_GROWTH = 3
# Larger integers can have one hash, so that a dict of them takes the square of their number.
_MAX_INT_KEY = 2**60
_MAX_NESTING = 64

_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False, b")": ()}
_EMPTY = {b"}": dict, b"]": list, b"\x8f": set}
_NUMBERS = {b"J": "<i", b"K": "<B", b"M": "<H", b"G": ">d"}
_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
_PUTS = {b"q": "<B", b"r": "<I"}
_GETS = {b"h": "<B", b"j": "<I"}


class CodeNeededError(pickle.UnpicklingError):
    """A pickle names something that is not data."""


class Name(NamedTuple):
    """What a pickle names.

    Attributes:
        text: module and name.
        make: takes the arguments with which the pickle calls it; None where it is data that is not called.
    """

    text: str
    make: Callable[..., object] | None


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _python2_text(data: bytes) -> str:
    return data.decode("latin1")


def _integer(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


# Of what follows its own length: the format of that length, and what its bytes stand for.
_SIZED = {
    b"T": ("<i", _python2_text), b"U": ("<B", _python2_text),
    b"X": ("<I", _text), b"\x8c": ("<B", _text), b"\x8d": ("<Q", _text),
    b"B": ("<I", bytes), b"C": ("<B", bytes), b"\x8e": ("<Q", bytes), b"\x96": ("<Q", bytearray),
    b"\x8a": ("<B", _integer), b"\x8b": ("<i", _integer),
}  # fmt: skip


def _line_integer(line: bytes) -> int | bool:
    # Protocols 0 and 1 write True as 01.
    return line == b"01" if line in (b"00", b"01") else int(line.removesuffix(b"L"))


def _line_string(line: bytes) -> str:
    if len(line) < 2 or line[:1] not in b"'\"" or line[-1:] != line[:1]:
        raise pickle.UnpicklingError("a string without quotes")
    return line[1:-1].decode("unicode_escape")


_LINES = {
    b"F": float, b"I": _line_integer, b"L": _line_integer, b"S": _line_string,
    b"V": lambda line: line.decode("raw_unicode_escape"),
}  # fmt: skip


class DataUnpickler:
    """Reads dicts, lists, tuples, sets, text, bytes and numbers, and what a subclass makes of names.

    Args:
        file: in memory or mapped to it, at the start of a pickle; after :meth:`load` it stands behind that.
        size: of the file, in bytes.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._made = 0

    def find(self, module: str, name: str) -> Name:
        """What a name stands for. Raises CodeNeededError where it is not known."""
        raise CodeNeededError(f"it names {module}.{name}")

    def build(self, made: object, state: object) -> None:
        """Give what a name made its state."""
        raise CodeNeededError(f"it gives a state to a {type(made).__name__}")

    def persistent(self, identity: object) -> object:
        """What is stored outside of the pickle."""
        raise pickle.UnpicklingError("it refers to something outside of itself")

    def claim(self, num_bytes: int) -> None:
        """Told before something of this size is made. Raises UnpicklingError where it is more than a file can hold."""
        self._made += num_bytes
        if self._made > _MAX_GROWTH * self._size:
            raise pickle.UnpicklingError(f"its values take more than {_MAX_GROWTH} times the size of the file")

    def load(self) -> object:
        """Read one pickle.

        Raises:
            CodeNeededError: it needs a name that is not known.
            pickle.UnpicklingError, ValueError, TypeError, IndexError, KeyError, struct.error: it is damaged.
        """
        self._stack: list = []
        self._marked: list[list] = []
        self._memo: dict[int, object] = {}
        while (code := self._read(1)) != b".":
            self._step(code)
        result = self._stack.pop()
        check_nesting(result)
        return result

    def _step(self, code: bytes) -> None:
        stack = self._stack
        if code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code in _EMPTY:
            stack.append(_EMPTY[code]())
        elif code in _NUMBERS:
            stack.append(self._number(_NUMBERS[code]))
        elif code in _SIZED:
            length, decode = _SIZED[code]
            stack.append(decode(self._read(self._number(length))))
        elif code in _LINES:
            stack.append(_LINES[code](self._line()))
        elif code in _GETS or code == b"g":
            stack.append(self._memo[self._number(_GETS[code]) if code in _GETS else int(self._line())])
        elif code in _PUTS or code == b"p":
            self._memo[self._number(_PUTS[code]) if code in _PUTS else int(self._line())] = stack[-1]
        elif code == b"\x94":
            self._memo[len(self._memo)] = stack[-1]
        elif code in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[code])))
        elif code == b"(":
            self._marked.append(stack)
            self._stack = []
        elif code in (b"t", b"l", b"d", b"e", b"u", b"\x90", b"\x91", b"1", b"o"):
            items, self._stack = stack, self._marked.pop()
            self._take_items(code, items)
        elif code in (b"a", b"s"):
            self._add(self._pop(1 if code == b"a" else 2), list if code == b"a" else dict)
        elif code == b"0":
            # Python's also takes a mark away, which no pickler leaves to it.
            stack.pop()
        elif code == b"2":
            stack.append(stack[-1])
        elif code in (b"c", b"\x93", b"i"):
            self._name(code)
        elif code in (b"R", b"\x81"):
            callee, arguments = self._pop(2)
            stack.append(_call(callee, arguments))
        elif code == b"b":
            (state,) = self._pop(1)
            self.build(stack[-1], state)
        elif code in (b"Q", b"P"):
            stack.append(self.persistent(stack.pop() if code == b"Q" else self._line().decode()))
        elif code in (b"\x80", b"\x95"):
            # The protocol, and the length of a part: neither is needed.
            self._read(1 if code == b"\x80" else 8)
        else:
            raise pickle.UnpicklingError(f"the instruction {code!r}, which data does not need")

    def _take_items(self, code: bytes, items: list) -> None:
        """An instruction that takes all that is on the stack above a mark."""
        stack = self._stack
        if code == b"t":
            stack.append(tuple(items))
        elif code == b"l":
            stack.append(items)
        elif code == b"d":
            stack.append({})
            self._add(items, dict)
        elif code == b"\x91":
            stack.append(frozenset(_checked_keys(items)))
        elif code == b"o":
            stack.append(_call(items[0], tuple(items[1:])))
        elif code != b"1":
            self._add(items, {b"e": list, b"u": dict, b"\x90": set}[code])

    def _add(self, items: list, kind: type) -> None:
        target = self._stack[-1]
        if not isinstance(target, kind):
            raise pickle.UnpicklingError(f"items for a {kind.__name__} are given to a {type(target).__name__}")
        if kind is list:
            target.extend(items)
        elif kind is set:
            target.update(_checked_keys(items))
        else:
            if len(items) % 2:
                raise pickle.UnpicklingError("a key without a value")
            target.update(zip(_checked_keys(items[::2]), items[1::2]))

    def _name(self, code: bytes) -> None:
        if code == b"\x93":
            module, name = self._pop(2)
        else:
            module, name = self._line().decode(), self._line().decode()
        found = self.find(module, name)
        if code == b"i":
            arguments, self._stack = self._stack, self._marked.pop()
            found = _call(found, tuple(arguments))
        self._stack.append(found)

    def _pop(self, count: int) -> list:
        if len(self._stack) < count:
            raise pickle.UnpicklingError("an instruction without its values")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _number(self, layout: str) -> int | float:
        return struct.unpack(layout, self._read(struct.calcsize(layout)))[0]

    def _read(self, length: int) -> bytes:
        # Before anything of a claimed length is allocated.
        if not 0 <= length <= self._size - self._file.tell():
            raise pickle.UnpicklingError(f"{length} bytes should follow byte {self._file.tell()}, and do not")
        return self._file.read(length)

    def _line(self) -> bytes:
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise pickle.UnpicklingError("its last line has no end")
        return line[:-1].rstrip(b"\r")


def checked_dict(pairs: Iterable) -> OrderedDict:
    """A dict of (key, value) with keys that a pickle may have."""
    pairs = [tuple(pair) for pair in pairs]
    return OrderedDict(zip(_checked_keys(key for key, _ in pairs), (value for _, value in pairs)))


def checked_set(items: Iterable = ()) -> set:
    """A set of what a pickle may have as keys."""
    return set(_checked_keys(items))


def _checked_keys(keys: Iterable) -> list:
    keys = list(keys)
    for key in keys:
        is_plain = key is None or type(key) in (str, bytes, float, bool) or (
            type(key) is int and abs(key) < _MAX_INT_KEY
        )  # fmt: skip
        # The hash of a nested tuple can take for ever.
        if not is_plain:
            raise pickle.UnpicklingError(f"a key of type {type(key).__name__}, or a huge number")
    return keys


def _call(callee: object, arguments: object) -> object:
    if not isinstance(callee, Name) or not isinstance(arguments, tuple):
        raise pickle.UnpicklingError(f"it calls a {type(callee).__name__}")
    if callee.make is None:
        raise CodeNeededError(f"it calls {callee.text}")
    return callee.make(*arguments)


def check_nesting(content: object) -> None:
    """Check that containers are in one another a few times at most. Raises UnpicklingError, also for circles.

    What is in several places is looked at once for each depth.
    """
    level, depth = [content], 0
    while level:
        if depth > _MAX_NESTING:
            raise pickle.UnpicklingError(f"its values are nested more than {_MAX_NESTING} deep, or in a circle")
        inner: dict[int, object] = {}
        for value in level:
            items = value.values() if isinstance(value, dict) else value
            if isinstance(value, dict | list | tuple):
                inner.update((id(item), item) for item in items if isinstance(item, dict | list | tuple))
        level, depth = list(inner.values()), depth + 1

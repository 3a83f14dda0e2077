"""CRC-32 of what was read in pieces."""

from __future__ import annotations

__all__ = ["combined"]

_POLYNOMIAL = 0xEDB88320  # of CRC-32 (ISO 3309, zip), the coefficient of x⁰ in the highest bit, x³² left out
_ONE = 1 << 31


def combined(first: int, second: int, size: int) -> int:
    """The CRC-32 of two stretches after each other, from those of each; the second is `size` bytes long.

    A byte more multiplies the polynomial of all before it by x⁸, modulo the generator; zlib's ``crc32_combine`` does
    the same.
    """
    factor, power = _ONE, _ONE >> 8  # x⁰, x⁸
    while size:
        if size & 1:
            factor = _product(factor, power)
        power, size = _product(power, power), size >> 1
    return _product(factor, first) ^ second


def _product(one: int, other: int) -> int:
    """Of two polynomials over GF(2), modulo the generator."""
    result = 0
    while one:
        if one & _ONE:
            result ^= other
        one = one << 1 & 0xFFFFFFFF
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
    return result

"""One alphabet of axes, for array names, einsums, parameter shapes and checkpoint layouts alike.

    B batch          T query time    S key time      D model         N query heads   K key/value heads
    G queries per key head           H head size     F hidden        E experts       V vocabulary
    L layers         P positions     Q blocks of 32 along D           R blocks of 32 along F
    Y the 16 bytes of an MXFP4 block

Arrays end in their axes (`logits_BTV`), a parameter's shape is a word in them (`"D3NH"`; a digit is an axis of that
length), and a checkpoint's layout is a rewriting of such words: `"D(3NH) -> D3NH"` says that the file stores the three
axes in brackets as one. Because a layout is data, its inverse is data too: import and export are the same table.
"""

from collections.abc import Mapping

import numpy as np

_LETTERS = frozenset("BTSDNKGHFEVLPQRY")


def shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Returns the shape that `axes` spell; bracketed axes are one.

    >>> shape("D(3NH)", dict(D=6, N=2, H=5))
    (6, 30)
    """
    return tuple(_product(group, sizes) for group in _groups(axes))


def inverse(layout: str) -> str:
    """Returns the layout that undoes `layout`.

    >>> inverse("(3NH)D -> D3NH")
    'D3NH -> (3NH)D'
    """
    source, target = _sides(layout)
    return f"{target} -> {source}"


def relayout(x: np.ndarray, layout: str, sizes: Mapping[str, int]) -> np.ndarray:
    """Returns `x` with its axes rearranged as `layout` says; a view where the rearrangement allows one.

    Raises:
      ValueError: `x` does not have the shape that the left side of `layout` spells.

    >>> relayout(np.zeros((30, 6)), "(3NH)D -> D3NH", dict(D=6, N=2, H=5)).shape
    (6, 3, 2, 5)
    """
    source, target = _sides(layout)
    if x.shape != shape(source, sizes):
        raise ValueError(f"layout {layout!r} takes shape {shape(source, sizes)}, found {x.shape}")
    source_axes, target_axes = "".join(_groups(source)), "".join(_groups(target))
    apart = x.reshape([_product(axis, sizes) for axis in source_axes])
    turned = apart.transpose([source_axes.index(axis) for axis in target_axes])
    return turned.reshape(shape(target, sizes))


def _sides(layout: str) -> tuple[str, str]:
    source, arrow, target = layout.partition(" -> ")
    if not arrow or sorted("".join(_groups(source))) != sorted("".join(_groups(target))):
        raise ValueError(
            f"layout {layout!r} must read 'AXES -> AXES' with the same axes on both sides"
        )
    return source, target


def _groups(axes: str) -> list[str]:
    """Splits "D(3NH)" into ["D", "3NH"]."""
    groups, depth = [], 0
    for character in axes:
        if character in "()":
            depth += 1 if character == "(" else -1
            if character == "(":
                groups.append("")
        elif character not in _LETTERS and not character.isdigit():
            raise ValueError(
                f"{character!r} in {axes!r} is no axis; see core.axes for the alphabet"
            )
        elif depth:
            groups[-1] += character
        else:
            groups.append(character)
    return groups


def _product(group: str, sizes: Mapping[str, int]) -> int:
    result = 1
    for axis in group:
        result *= int(axis) if axis.isdigit() else sizes[axis]
    return result

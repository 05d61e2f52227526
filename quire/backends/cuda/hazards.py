"""Copies of blocks that mean "one after the other", cut into groups of copies that may run at the same time."""

from __future__ import annotations


def hazard_free(pairs: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Groups of ``pairs`` (source, destination), in their order. Within a group no destination is the source or the destination of
    another pair, so that its copies, in any order, do what they do one after the other."""
    groups: list[list[tuple[int, int]]] = []
    read: set[int] = set()
    written: set[int] = set()
    for source, destination in pairs:
        if not groups or source in written or destination in written or destination in read:
            groups.append([])
            read, written = set(), set()
        groups[-1].append((source, destination))
        read.add(source)
        written.add(destination)
    return groups

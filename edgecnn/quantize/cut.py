"""The cheapest way to divide operators into two sides.

Source: Dinic 1970 (maximum flow by blocking flows); Ford and Fulkerson 1956 (the minimum cut is as large).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

INFINITE = 1 << 60
"""The capacity of an edge that is never cut."""


class FlowGraph:
    """A directed graph with capacities.

    Example:
        >>> graph = FlowGraph()
        >>> for a, b, capacity in (("s", "x", 3), ("x", "y", 1), ("y", "t", 2)):
        ...     graph.connect(a, b, capacity)
        >>> sorted(graph.far_side("s", "t"))
        ['t', 'y']
    """

    def __init__(self) -> None:
        self._number: dict[Hashable, int] = {}
        self._edges: list[list[int]] = []  # by node, indices into _to
        self._to: list[int] = []
        self._left: list[int] = []

    def connect(self, a: Hashable, b: Hashable, capacity: int) -> None:
        """Add an edge from a to b."""
        first, second = self._index(a), self._index(b)
        for source, target, size in ((first, second, capacity), (second, first, 0)):
            self._edges[source].append(len(self._to))
            self._to.append(target)
            self._left.append(size)

    def far_side(self, source: Hashable, sink: Hashable) -> set[Hashable]:
        """Return the nodes on the sink's side of a minimum cut, of several that with the fewest."""
        start, end = self._index(source), self._index(sink)
        while self._augment(start, end):
            pass
        reach, queue = {end}, deque([end])  # who can still reach the sink
        while queue:
            node = queue.popleft()
            for edge in self._edges[node]:
                other = self._to[edge]
                if other not in reach and self._left[edge ^ 1] > 0:
                    reach.add(other)
                    queue.append(other)
        return {name for name, number in self._number.items() if number in reach}

    def _index(self, name: Hashable) -> int:
        if name not in self._number:
            self._number[name] = len(self._edges)
            self._edges.append([])
        return self._number[name]

    def _augment(self, start: int, end: int) -> bool:
        """Send a blocking flow along shortest paths; return whether there was one."""
        level = {start: 0}
        queue = deque([start])
        while queue:
            node = queue.popleft()
            for edge in self._edges[node]:
                other = self._to[edge]
                if self._left[edge] > 0 and other not in level:
                    level[other] = level[node] + 1
                    queue.append(other)
        if end not in level:
            return False
        following = [0] * len(self._edges)
        path: list[int] = []
        node = start
        while True:
            if node == end:
                sent = min(self._left[edge] for edge in path)
                for edge in path:
                    self._left[edge] -= sent
                    self._left[edge ^ 1] += sent
                path, node = [], start
                continue
            onward = self._forward(node, level, following)
            if onward is not None:
                path.append(onward)
                node = self._to[onward]
            elif not path:
                return True
            else:  # a dead end
                node = self._to[path.pop() ^ 1]
                following[node] += 1

    def _forward(self, node: int, level: dict[int, int], following: list[int]) -> int | None:
        """Return the next edge to a node one level further, None if there is none left."""
        while following[node] < len(self._edges[node]):
            edge = self._edges[node][following[node]]
            if self._left[edge] > 0 and level.get(self._to[edge]) == level[node] + 1:
                return edge
            following[node] += 1
        return None

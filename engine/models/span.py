"""What is predicted from what, by the numbers of the views."""

from typing import NamedTuple


class Span(NamedTuple):
    """Views that are read one after the other, and the next one, which is predicted: `first`, ..., then `target`.

    If `target` is the smaller number, they are read backwards.
    """

    first: int
    target: int

    @property
    def observed(self) -> int:
        """Number of views that are read."""
        return abs(self.target - self.first)

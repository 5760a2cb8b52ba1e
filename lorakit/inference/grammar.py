"""What a text may consist of, token by token."""

from typing import Protocol

from torch import Tensor


class Constraint(Protocol):
    """The rules of one text: which tokens may come next, and where it may end."""

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""

    def allowed(self) -> Tensor:
        """Return which tokens may come next: bool [n] in host memory; ids from n on may not.

        The tokens that end a text are no business of this: `complete` decides on them.
        """

    def take(self, token: int) -> None:
        """Take a token that was allowed."""

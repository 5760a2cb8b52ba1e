"""Which pages of a cache are free, which are used, and which are kept for whoever comes next."""


class Pool:
    """The pages of one kind: how many rows use each, and what each holds."""

    def __init__(self, count: int):
        self.count = count
        self.free = list(range(count))[::-1]  # without a name; the next one stands last
        self.users = [0] * count
        self.page_of: dict[bytes, int] = {}
        self.name_of: dict[int, bytes] = {}
        self.idle: dict[int, None] = {}  # with a name and no user, the longest so first

    @property
    def room(self) -> int:
        """How many pages nobody uses."""
        return len(self.free) + len(self.idle)

    def take(self) -> int:
        """Return a page that nobody uses, for a new user."""
        if self.free:
            page = self.free.pop()
        else:
            page = next(iter(self.idle))
            del self.idle[page]
            self.forget(page)
        self.users[page] = 1
        return page

    def share(self, name: bytes) -> int:
        """Return the page of a name, which has one more user now."""
        page = self.page_of[name]
        self.idle.pop(page, None)
        self.users[page] += 1
        return page

    def name(self, page: int, name: bytes) -> None:
        """Name a page, unless another has the name already."""
        if name not in self.page_of:
            self.page_of[name], self.name_of[page] = page, name

    def forget(self, page: int) -> None:
        """Take a page's name away."""
        if page in self.name_of:
            del self.page_of[self.name_of.pop(page)]

    def leave(self, page: int) -> None:
        """Let a user go."""
        self.users[page] -= 1
        if not self.users[page]:
            if page in self.name_of:
                self.idle[page] = None
            else:
                self.free.append(page)

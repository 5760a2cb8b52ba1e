"""The label of a row that tells a class or a number; apart, as reading rows needs no torch."""

Label = str | int | float


def name_of(label: Label) -> str:
    """Return the name of the class that a label means."""
    return str(label).lower() if isinstance(label, bool) else str(label)

"""One adapter method a file: its settings, its part of a layer, and its plan."""

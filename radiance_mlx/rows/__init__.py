"""Rows of every known format as examples: the forms and what they mean, files, data sets, columns, a preview of all.

`understand` takes one row, as `POST /update` has it in its list or a file, uploaded or local, in one of its lines.
"""

from .forms import FORMATS, SHAPES, ExampleBody, Understood, understand

__all__ = ["FORMATS", "SHAPES", "ExampleBody", "Understood", "understand"]

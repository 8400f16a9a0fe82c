"""Single layers of a model replaced by this package's, and back."""

from .convert import convert, unfuse

__all__ = ["convert", "unfuse"]

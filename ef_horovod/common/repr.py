"""`repr()` of compressors and methods that omits defaults."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, ClassVar


class Shown:
    """Base of dataclasses whose `repr` omits fields with default values.

    A compressor in a field without a default is shown without the field's name.
    """

    shown_as: ClassVar[str] = ""  # the name to show, if it is another class's

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__repr__" not in vars(cls):
            cls.__repr__ = Shown.__repr__  # type: ignore[method-assign] # else dataclass adds one

    def __repr__(self) -> str:
        words, schedules = [], dict(getattr(self, "schedules", ()))
        for field in fields(self):  # type: ignore[arg-type]
            value = schedules.get(field.name, getattr(self, field.name))
            if isinstance(value, Shown) and field.default is MISSING:
                words.append(repr(value))
            elif field.repr and (field.default is MISSING or value != field.default):
                words.append(f"{field.name}={value!r}")
        return f"{self.shown_as or type(self).__name__}({', '.join(words)})"

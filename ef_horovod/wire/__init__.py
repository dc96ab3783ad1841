"""Payloads as bytes: header, padding to size classes.

docs/wire-format.md has the layout of every kind of payload.
"""

from ef_horovod.wire.header import (
    ABSENT,
    HEADER_NBYTES,
    MAGIC,
    MAX_ELEMENTS,
    MAX_NBYTES,
    REPLACE,
    SKIP,
    VERSION,
    Fields,
    Header,
    padded,
    padded_nbytes,
    padded_values,
    payload_nbytes,
    read_header,
    size_class,
)

__all__ = [
    "ABSENT",
    "HEADER_NBYTES",
    "MAGIC",
    "MAX_ELEMENTS",
    "MAX_NBYTES",
    "REPLACE",
    "SKIP",
    "VERSION",
    "Fields",
    "Header",
    "padded",
    "padded_nbytes",
    "padded_values",
    "payload_nbytes",
    "read_header",
    "size_class",
]

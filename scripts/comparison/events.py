"""TensorBoard's event files, as far as a comparison needs them: some scalars, and the last pictures.

TensorBoard's own reader checks the CRC of every record, of pictures too, in Python: minutes for some hundred runs.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

Scalars = dict[str, list[tuple[int, float]]]  # (step, value) by tag
HEADER, FOOTER = struct.Struct("<QI"), struct.Struct("<I")  # a record's length and that number's CRC; its data's CRC
MARK = b"brain.Event:"  # in the first event of a file
RESTART = b"\x3a"  # the first byte of the field that says a run was resumed, in an event that is short
SHORT = 64  # bytes of such an event, at most
MOST = 2**14  # bytes of an event with scalars; longer ones are pictures


class DamagedEvents(Exception):
    """An event file that cannot be read; the message says why."""


def read_scalars(folder: Path, tags: Collection[str]) -> Scalars:
    """The scalars of these tags in a run folder, without those that a resumed run made void. Raises DamagedEvents."""
    names = [tag.encode() for tag in tags]
    found: Scalars = {}
    for event in _events(folder, names, MOST):
        for value in event.summary.value:
            if value.tag in tags and value.WhichOneof("value") == "simple_value":
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
        if event.session_log.status == event.session_log.START:
            found = {tag: [one for one in scalars if one[0] < event.step] for tag, scalars in found.items()}
    return {tag: scalars for tag, scalars in found.items() if scalars}


def read_pictures(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The last picture under each tag, as a PNG, with its step. Raises DamagedEvents."""
    found: dict[str, tuple[bytes, int]] = {}
    for event in _events(folder, [b"\x89PNG"]):
        for value in event.summary.value:
            if value.WhichOneof("value") == "image":
                found[value.tag] = value.image.encoded_image_string, event.step
    return found


def _events(folder: Path, names: Collection[bytes], most: int | None = None) -> Iterator[Any]:
    """The events with one of `names` in them, and those that tell of a resume; none of more than `most` bytes."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event

    wanted = re.compile(b"|".join(map(re.escape, names)))
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for data in _records(path, most):
            if not wanted.search(data) and (len(data) > SHORT or RESTART not in data):
                continue
            try:
                yield Event.FromString(data)
            except DecodeError as error:
                raise DamagedEvents(f"{path.name}: {error}") from error


def _records(path: Path, most: int | None) -> Iterator[bytes]:
    """A file's records of `most` bytes; one that is not whole, as a run that is killed leaves it, is the last."""
    with path.open("rb") as file:
        if not (size := path.stat().st_size):
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            place = 0
            while place + HEADER.size <= size:
                length, _ = HEADER.unpack_from(whole, place)
                start, place = place + HEADER.size, place + HEADER.size + length + FOOTER.size
                if start == HEADER.size and (place > size or MARK not in whole[start : start + min(length, SHORT)]):
                    raise DamagedEvents(f"{path.name} does not begin as an event file")
                if place > size:
                    return
                if most is None or length <= most:
                    yield whole[start : start + length]

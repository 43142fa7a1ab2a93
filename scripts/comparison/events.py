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

from training.run_folder import EVENTS, events_folder

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


def _events(folder: Path, names: Collection[bytes], most: int = 2**63) -> Iterator[Any]:
    """The events with one of `names` in them, and those that tell of a resume; none of more than `most` bytes."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event

    wanted = re.compile(b"|".join(map(re.escape, names)))
    for path in sorted((events_folder(folder) or folder).glob(EVENTS)):
        if not path.stat().st_size:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            for start, end in _records(whole, path):
                length = end - start
                if length > most or not (
                    wanted.search(whole, start, end) or (length <= SHORT and whole.find(RESTART, start, end) >= 0)
                ):
                    continue
                try:
                    yield Event.FromString(whole[start:end])
                except DecodeError as error:
                    raise DamagedEvents(f"{path.name}: {error}") from error


def _records(whole: mmap.mmap, path: Path) -> Iterator[tuple[int, int]]:
    """Where a file's records are; one that is not whole, as a run that is killed leaves it, is left out."""
    unpack, skipped, place, size = HEADER.unpack_from, HEADER.size, 0, len(whole)
    while place + skipped <= size:
        start = place + skipped
        end = start + unpack(whole, place)[0]
        place = end + FOOTER.size
        if start == skipped and (place > size or whole.find(MARK, start, start + SHORT) < 0):
            raise DamagedEvents(f"{path.name} does not begin as an event file")
        if place > size:
            return
        yield start, end

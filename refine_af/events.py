"""Events for TensorBoard, on disk at once: tensorboardX's own writer queues them for a thread."""

import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from refine_af.models.writing import writing


class EventFile:
    """A new event file in `directory`; TensorBoard forgets what earlier ones say from `first` on.

    Raises:
        OSError: the disk is full, or cannot be written.
    """

    def __init__(self, directory: Path, first: int) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(directory / "events"))
        log = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=first, session_log=log))

    def add(self, step: int, summary: Summary) -> None:
        """Write what there is to say of a step."""
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Event) -> None:
        with writing(self._directory):
            self._writer.write_event(event)
            self._writer.flush()

    def close(self) -> None:
        """No more is written."""
        with writing(self._directory):
            self._writer.close()

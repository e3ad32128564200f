"""Reading one batch ahead: a thread makes and pins the next while the device is at work on this one."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import LongTensor

from actors.data.batches import TokenBatch


class ReadAhead:
    """Gives batches by the numbers of their sequences; the one that is announced is read meanwhile.

    Args:
        read: reads a batch; called in a thread of its own, one call at a time.
        pin: put batches into pinned memory, from which a GPU copies while the host goes on.
    """

    def __init__(self, read: Callable[[LongTensor], TokenBatch], pin: bool = False):
        self._read, self._pin = read, pin
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._announced: tuple[list[int], Future[TokenBatch]] | None = None

    def batch(self, chosen_B: LongTensor, next_B: LongTensor | None = None) -> TokenBatch:
        """Return the batch of those sequences, and begin to read `next_B`."""
        announced, wanted = self._announced, chosen_B.tolist()
        self._announced = None
        if announced is not None and announced[0] == wanted:
            batch = announced[1].result()
        else:
            batch = self._thread.submit(self._load, chosen_B).result()
        if next_B is not None:
            self._announced = next_B.tolist(), self._thread.submit(self._load, next_B)
        return batch

    def close(self) -> None:
        """Wait for what is being read, and end the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _load(self, chosen_B: LongTensor) -> TokenBatch:
        batch = self._read(chosen_B)
        return batch.pinned() if self._pin else batch

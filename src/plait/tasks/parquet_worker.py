"""The process that reads a parquet file: a small one may hold one value a billion times, or make Arrow's code fail.

It is run as a script, as `template_worker` is. A request is (path, bytes of address space); what answers it:

    r  pickle: rows, a list of mappings     e  error, as a sentence without its full stop     .  all rows were sent
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from importlib import import_module
from typing import Any

_BATCH, _ROWS = 16 << 20, 4096  # bytes, as stored without compression, and rows that are decoded at a time


def main() -> None:
    """Serve requests until stdin ends."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks; its end ends this one
    source.read(8)
    sys.path[:] = pickle.load(source)  # the parent's own bytes
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # others reserve more than they use
    parquet: Any = import_module("pyarrow.parquet")
    from plait.tasks.template_worker import answer, frame, limit_memory

    while (request := frame(source)) is not None:
        path, memory = pickle.loads(request)
        limit_memory(memory)
        try:
            with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
                stored = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
                size = min(_ROWS, max(1, _BATCH * file.metadata.num_rows // max(1, stored)))
                for batch in file.iter_batches(batch_size=size, use_threads=False):
                    answer(sink, b"r", pickle.dumps(batch.to_pylist(), protocol=5))
        except MemoryError:
            answer(sink, b"e", f"it needs more than {memory >> 20} MB of memory".encode())
        except RecursionError:
            answer(sink, b"e", b"its columns are nested too deeply")
        except Exception as error:  # pyarrow's own classes, and whatever a value cannot be turned into
            answer(sink, b"e", " ".join(str(error).split()).rstrip(".").encode("utf-8", "replace"))
        answer(sink, b".", b"")
        sink.flush()


if __name__ == "__main__":
    main()

"""A worker without a device: it asks for one, "measures" for a moment (or for ever), and tells a row."""

from __future__ import annotations

import time

from sweeps.child import Connection, connect


def _serve(connection: Connection) -> None:
    def enter(stage: str, holding: bool = False) -> None:
        connection.send({"event": "stage", "stage": stage, "at": time.monotonic(), "holding": holding})

    connection.send({"event": "ready", "note": ""})
    for request in connection:
        enter("prepare")
        time.sleep(request.get("prepare_s", 0.0))
        enter("waiting")
        if connection.receive() is None:
            return
        enter("measure", holding=True)
        time.sleep(600.0 if request["hang"] else 0.05)
        connection.send({"event": "row", "row": {"status": "ok", "message": ""}, "leaving": False})


if __name__ == "__main__":
    _serve(connect())

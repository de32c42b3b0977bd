"""Notices that this machine is about to be taken away: SIGTERM, or Google Cloud's metadata.

Cloud TPUs are told beforehand of maintenance and, where they are spot machines, of preemption, by
values of the machine's metadata server; SIGTERM may come late or not at all. What one process
notices, all learn at the same step, from the loop.
"""

import http.client
import os
import signal
import threading
import urllib.request
from pathlib import Path
from typing import Any

POLL_SECONDS = 5.0  # a spot machine has 30 s from the notice on
_MAINTENANCE = "instance/maintenance-event"
_VALUES = {  # of the metadata server -> what it says when this machine ends, and how that is told
    _MAINTENANCE: ("TERMINATE_ON_HOST_MAINTENANCE", "a notice of maintenance"),
    "instance/preempted": ("TRUE", "a notice of preemption"),
}
_PRODUCT = Path("/sys/class/dmi/id/product_name")  # tells Google Cloud's machines from others


class Preemption:
    """While it is entered, `asked` tells whether this process was told to end, and `reason` by
    what."""

    asked = False
    reason = "a notice to another process"  # where this one had none

    def __enter__(self) -> "Preemption":
        self._before = signal.signal(signal.SIGTERM, lambda *_: self._ask("SIGTERM"))
        self._left = threading.Event()
        if server := _metadata_server():
            threading.Thread(target=self._watch, args=(server,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._left.set()
        signal.signal(signal.SIGTERM, self._before)

    def _ask(self, reason: str) -> None:
        if not self.asked:
            self.reason, self.asked = reason, True

    def _watch(self, server: str) -> None:
        """Asks the metadata server until it says that this machine ends, or the run has ended.

        A notice of maintenance may stand for an hour. The run that hears of it saves and ends; one
        that starts meanwhile would stop again and again, so that it goes on until SIGTERM.
        """
        watched = dict(_VALUES)
        if _read(server, _MAINTENANCE) == _VALUES[_MAINTENANCE][0]:
            del watched[_MAINTENANCE]
        while not self.asked:
            for path, (ending, reason) in watched.items():
                if _read(server, path) == ending:
                    self._ask(reason)
            if self._left.wait(POLL_SECONDS):
                return


def _metadata_server() -> str:
    """Its host, and port where that is not 80; "" on machines that have none."""
    if server := os.environ.get("GCE_METADATA_HOST"):
        return server
    try:
        return "metadata.google.internal" if "Google" in _PRODUCT.read_text() else ""
    except OSError:
        return ""


def _read(server: str, path: str) -> str:
    """A value; "" where the server gives none just now, as it does while it is restarted."""
    url = f"http://{server}/computeMetadata/v1/{path}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    # No proxy: what a variable names for the rest of the world knows nothing of this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=POLL_SECONDS) as answer:
            return answer.read().decode().strip()
    except (OSError, http.client.HTTPException, ValueError):
        return ""

"""A metadata server on this machine, as Google Cloud's machines have one."""

import contextlib
import http.server
import threading
from collections.abc import Iterator

MAINTENANCE, PREEMPTED = "instance/maintenance-event", "instance/preempted"


class _Answers(http.server.BaseHTTPRequestHandler):
    """Values under /computeMetadata/v1/, and only for those who send Google's header."""

    def do_GET(self):
        name = self.path.removeprefix("/computeMetadata/v1/")
        known = self.headers.get("Metadata-Flavor") == "Google" and name in self.server.values
        self.send_response(200 if known else 403)
        self.end_headers()
        if known:
            self.wfile.write(self.server.values[name].encode())
        self.server.asked.set()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(**values: str) -> Iterator[http.server.ThreadingHTTPServer]:
    """The server, with its `address`, the `values` that it gives, which may be changed, and the
    event `asked`, set by each question."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        server.values = {MAINTENANCE: "NONE", PREEMPTED: "FALSE"} | values
        server.asked = threading.Event()
        server.address = f"127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()

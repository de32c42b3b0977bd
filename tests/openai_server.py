"""A real HTTP server that answers as any OpenAI-compatible one, or as a broken one does."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def said(content, finish="stop", **message):
    """A chat completion's body."""
    message = {"role": "assistant", "content": content, **message}
    choice = {"message": message, "finish_reason": finish}
    return json.dumps({"choices": [choice], "usage": {"total_tokens": 10}}).encode()


class Server(ThreadingHTTPServer):
    """reply(n): the body for the n-th request (from 0); or (status, body); or (status, the body's
    pieces, the length that it is said to have)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = lambda n: said("Color: red; type: mug")
        self.extra = {"retry-after-ms": "1"}  # headers: failures are soon tried again
        self.payloads, self.headers, self.lock = [], [], threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def texts(self):
        """What was asked, without the images."""
        return [payload["messages"][0]["content"][-1]["text"] for payload in self.payloads]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            n = len(self.server.payloads)
            self.server.payloads.append(payload)
            self.server.headers.append((self.path, self.headers["Authorization"]))
        reply = self.server.reply(n)
        reply = reply if isinstance(reply, tuple) else (200, reply)
        status, pieces, length = reply if len(reply) == 3 else (reply[0], [reply[1]], len(reply[1]))
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **self.server.extra}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client went away
            for piece in pieces:
                self.wfile.write(piece)

    def log_message(self, *_):
        pass

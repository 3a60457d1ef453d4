"""A web server that stands in for Google Drive, Hugging Face and any other host."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PAGE = b"<!DOCTYPE html><html><title>Sign in</title>Too many users have viewed this file</html>"
CONFIRM = b"""<!DOCTYPE html><html><form id="download-form" action="/uc" method="get">
<input type="hidden" name="id" value="confirm"><input type="hidden" name="confirm" value="t"></form></html>"""


class Host:
    """What the server gives, and which requests it got.

    Attributes:
        content: the file at every address, except where the address has one of these words: "page" (a web page),
            "confirm" (Drive's page for large files first), "short" (half of the file, then the end), "gone" (404).
        requests: method and path of each request.
        url: of the server.
    """

    def __init__(self, content: bytes):
        self.content = content
        self.requests = []
        self.url = ""


@contextmanager
def serve(content):
    host = Host(content)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            host.requests.append((self.command, self.path))
            # Time for others to come too.
            threading.Event().wait(0.05)
            body, kind = host.content, "application/octet-stream"
            if "gone" in self.path:
                self.send_error(404)
                return
            if "page" in self.path:
                body, kind = PAGE, "text/html"
            elif "id=confirm" in self.path and "confirm=t" not in self.path:
                body, kind = CONFIRM.replace(b"/uc", host.url.encode() + b"/uc"), "text/html"
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if kind != "text/html":
                self.send_header("Content-Disposition", 'attachment; filename="model_final.pth"')
                self.send_header("ETag", '"0123456789"')
                self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: len(body) // 2] if "short" in self.path else body)

        def log_message(self, *_):
            """Be quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    host.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.05}).start()
    try:
        yield host
    finally:
        server.shutdown()
        server.server_close()

"""A server of the chat interface that grades by a function, in this process; faults can be planted."""

import contextlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GARBAGE = (200, "<html>It works!</html>")


def reply(content, status=200, tokens=(100, 20)):
    """An answer whose message is this text."""
    usage = dict(zip(("prompt_tokens", "completion_tokens"), tokens, strict=True))
    return status, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}], "usage": usage})


def graded(score, reason="so"):
    return reply(json.dumps({"reason": reason, "score": score}))


class FakeJudge:
    """The server, in threads of its own.

    `grade` makes (status, body) of a completion; of `faults` each is taken for one call: such an answer, with headers or without,
    or a function that is called in its place.
    """

    def __init__(self, grade=lambda text: graded(len(text) % 11)):
        self.grade, self.faults, self.requests, self.headers = grade, [], [], []
        self.running = self.most = 0
        self.lock, self.ended = threading.Lock(), threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.requests.append(request)
                    fake.headers.append(dict(self.headers) | {"path": self.path})
                    fake.running += 1
                    fake.most = max(fake.most, fake.running)
                    fault = fake.faults.pop(0) if fake.faults else None
                answer = fault() if callable(fault) else fault or fake.grade(answer_of(request))
                with fake.lock:
                    fake.running -= 1
                if answer is None:  # it hangs up
                    self.close_connection = True
                    return
                status, body, *headers = answer
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    for name, value in (headers[0] if headers else {}).items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(body.encode())))
                    self.end_headers()
                    self.wfile.write(body.encode())

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def hang(self):
        """A fault: no answer until the test is over."""
        self.ended.wait(60)

    def close(self):
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()


def answer_of(request):
    """The completion in a request, found by its lines with the code."""
    return re.search(r"^----- (\w+) answer\n(.*)\n----- \1 end of answer\Z", request["messages"][1]["content"], re.S | re.M)[2]

"""A server of the chat interface that grades by a function, in this process; faults can be planted."""

import contextlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GARBAGE = (200, "<html>It works!</html>")


def reply(content):
    """An answer with this text as its message: status and body."""
    usage = {"prompt_tokens": 100, "completion_tokens": 20}
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}], "usage": usage})


def graded(score, reason="so"):
    return reply(json.dumps({"reason": reason, "score": score}))


def answer_of(request):
    """The completion in a request, found by its lines with the code."""
    return re.search(r"^----- (\w+) answer\n(.*)\n----- \1 end of answer\Z", request["messages"][1]["content"], re.S | re.M)[2]


class FakeJudge(ThreadingHTTPServer):
    """The server. `grade` answers a completion; of `faults` each is taken for one call: an answer, or what is called for it."""

    daemon_threads, request_queue_size = True, 128  # of two ranks, which connect 16 times each at once

    def __init__(self):
        self.grade, self.faults, self.requests, self.headers = (lambda text: graded(len(text) % 11)), [], [], []
        self.lock, self.ended, self.connections = threading.Lock(), threading.Event(), []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def get_request(self):
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def close(self):
        """End, with all connections: clients keep theirs open."""
        self.ended.set()
        self.shutdown()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def hang(self):
        """A fault: no answer until the test is over."""
        self.ended.wait(60)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        request, judge = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        with judge.lock:
            judge.requests.append(request)
            judge.headers.append({**self.headers, "path": self.path})
            fault = judge.faults.pop(0) if judge.faults else None
        status, body, *headers = (fault() if callable(fault) else fault or judge.grade(answer_of(request))) or (0, "")
        self.close_connection = not status  # it hangs up
        with contextlib.suppress(OSError):
            if status:
                self.send_response(status)
                for name, value in {**(headers[0] if headers else {}), "Content-Length": str(len(body.encode()))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

    def log_message(self, *args):
        pass

"""A server that answers as vLLM does to /v1/models, /tokenize and /v1/completions with prompt_logprobs, in this process."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeTeacher(ThreadingHTTPServer):
    """The server. It answers requests for log-probabilities by `logprobs`. Each of `faults` replaces one of these answers.

    Args:
        tokenizer: Tokenizes the prompts that it receives.
        logprobs: Function of token ids; returns a number for each but the first.
    """

    daemon_threads, request_queue_size = True, 128

    def __init__(self, tokenizer, logprobs):
        self.tokenizer, self.logprobs, self.faults, self.keys, self.asked = tokenizer, logprobs, [], set(), []
        self.was_asked, self.ended = threading.Event(), threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def close(self):
        self.ended.set()
        self.shutdown()
        self.server_close()

    def complete(self, ids):
        """Status and answer to a request for log-probabilities."""
        self.asked.append(tuple(ids))
        self.was_asked.set()
        fault = self.faults.pop(0) if self.faults else None
        if fault == "garbage":
            return 200, {"choices": [{}]}
        if fault is not None:
            return fault, {"error": {"message": "too busy"}}
        entries = [{str(token): {"logprob": value}} for token, value in zip(ids[1:], self.logprobs(ids), strict=True)]
        return 200, {"choices": [{"prompt_logprobs": [None, *entries]}]}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        self.server.keys.add(self.headers.get("Authorization"))
        status, answer = 200, {"data": [{"id": "teacher"}]}
        if self.path == "/tokenize":
            answer = {"tokens": self.server.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        elif self.path == "/v1/completions":
            status, answer = self.server.complete(body["prompt"])
        data = json.dumps(answer).encode()
        with contextlib.suppress(OSError):  # nobody waits any more
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def do_GET(self):
        self.do_POST()

    def log_message(self, *args):
        pass

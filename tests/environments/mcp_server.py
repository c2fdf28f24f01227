"""A small MCP server: by `python mcp_server.py`, over standard input and output and without a package; with a port over HTTP."""

import json
import os
import sys
import threading

STRING = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
ADD = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}, "required": ["x", "y"]}
TOOLS = {"add": ("Add two whole numbers.", ADD), "write": ("Write a text down.", STRING), "do": ("Do something.", STRING)}
notes = []


def called(name, arguments):
    if name == "add":
        return str(arguments["x"] + arguments["y"])
    if name == "write":
        notes.append(arguments["text"])
        return " ".join(notes)
    if arguments["text"] == "die":
        print("no more memory", file=sys.stderr, flush=True)
        os._exit(3)
    if arguments["text"] == "hang":
        threading.Event().wait()
    if arguments["text"] == "key":
        return str(os.environ.get("MCP_TEST_KEY"))
    raise ValueError(f"cannot {arguments['text']}")


def answer(method, params):
    if method == "initialize":
        return params | {"capabilities": {"tools": {}}, "serverInfo": {"name": "test", "version": "1"}}
    if method == "tools/list":  # in two pages
        first = params.get("cursor") is None
        names = list(TOOLS)[:2] if first else list(TOOLS)[2:]
        listed = [{"name": name, "description": TOOLS[name][0], "inputSchema": TOOLS[name][1]} for name in names]
        return {"tools": listed, **({"nextCursor": "2"} if first else {})}
    assert method == "tools/call", "no such method"
    try:
        return {"content": [{"type": "text", "text": called(params["name"], params["arguments"])}]}
    except ValueError as error:
        return {"content": [{"type": "text", "text": str(error)}], "isError": True}


def serve(line):
    request = json.loads(line)
    if "id" not in request:
        return
    try:
        reply = {"result": answer(request["method"], request.get("params") or {})}
    except AssertionError as error:
        reply = {"error": {"code": -32601, "message": str(error)}}
    print(json.dumps({"jsonrpc": "2.0", "id": request["id"], **reply}), flush=True)


def over_http(port):
    from mcp.server import MCPServer

    server = MCPServer("test", log_level="CRITICAL")

    @server.tool()
    def do(text: str) -> str:
        """Do something."""
        return called("do", {"text": text})

    server.run("streamable-http", port=port)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        over_http(int(sys.argv[1]))
    for line in sys.stdin:
        threading.Thread(target=serve, args=(line,), daemon=True).start()

#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The tests of ccr.py; standard library only, loopback only, nothing outside temporary folders.

    python3 test_ccr.py                  the core: under a minute
    python3 test_ccr.py all              and what is long or needs installed tools: load, full fuzz, browser, the real client
    python3 test_ccr.py TestX.test_y     only that; -v shows each test and the slowest
    CCR_TEST_SEED=7 python3 test_ccr.py  repeats a run: every random test prints the seed that failed

Classes marked @extended are left out of the core. The rest of this head is what all tests use:

    ScriptedProvider   a model server that says what a test tells it to, in four wire formats, or misbehaves
    Ccr                a real `ccr.py start --foreground` in a home of its own, on a free port
    Wire               an HTTP client on a bare socket: sends anything, reads strictly
    stream_faults      the checker of Anthropic's event protocol; every stream that a test reads goes through it
"""
import ast, atexit, base64, collections, contextlib, ctypes, difflib, errno, fcntl, functools, glob, gzip, hashlib, io, itertools, json
import math, os, queue, random, re, select, selectors, shlex, shutil, signal, socket, stat, string, struct, subprocess, sys
import tempfile, textwrap, threading, time, types, unittest, urllib.error, urllib.parse, urllib.request, zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
CCR_PY = os.path.join(HERE, "ccr.py")
REAL_HOME = os.path.expanduser("~")                     # only to look for installed tools
SEED = int(os.environ.get("CCR_TEST_SEED") or random.SystemRandom().randrange(10 ** 6))

sys.dont_write_bytecode = True
sys.path.insert(0, HERE)
TEST_HOME = tempfile.mkdtemp(prefix="ccr-test-")        # no test sees the user's own configuration, keys or proxies
atexit.register(shutil.rmtree, TEST_HOME, ignore_errors=True)
for _name in list(os.environ):
    if _name.startswith(("ANTHROPIC_", "CLAUDE_CODE_", "CCR_CONFIG")) or _name.endswith("_API_KEY") or \
            _name.lower().endswith("_proxy") or _name in ("SERVICE_PORT", "NOTIFY_SOCKET", "SYSTEMD_EXEC_PID", "XDG_RUNTIME_DIR"):
        del os.environ[_name]
os.environ["HOME"] = TEST_HOME
import ccr


def extended(case):
    """A class (or test) that only `python3 test_ccr.py all`, or its own name, runs."""
    case.is_extended = True
    return case


def seeded(name):
    """A random generator of this name: the same in every run with the same SEED, on every Python."""
    return random.Random("%d/%s" % (SEED, name))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(claim, seconds=10, step=0.01):
    """The first true value of claim(), or the last one when the time is over."""
    end = time.monotonic() + seconds
    while True:
        value = claim()
        if value or time.monotonic() > end:
            return value
        time.sleep(step)


# --- the scripted provider: what a model says, in the wire format of the path that was asked

def say(text="", reasoning="", tools=(), finish=None, usage=(10, 0, 3), **how):
    """A reply: text, reasoning, tools [(name, input or raw argument text)], usage (prompt, of these cached, completion) or None.

    How it gets there, all optional (a frame is one server-sent event; 0 is before the first):
      chunks=[dict or str]    these data payloads instead      sse=[bytes]       these bytes instead, one write each
      die=N, how="rst"|"eof"  break off after N frames         hang=N|"headers"  silent from there until the client leaves
      cut=N                   break off after N bytes of body  pause=S           seconds before each frame
      before=S                seconds before the headers       framing="chunked"|"length"|"close"   of the body
      lie=N                   content-length off by N          coding="gzip"|"badgzip"
      stream=True|False       whatever was asked for           headers={}        more of them
    """
    return dict(how, text=text, reasoning=reasoning, tools=list(tools), finish=finish, usage=usage)


def refuse(status, message="scripted refusal", headers=None, body=None, **how):
    """An error reply in OpenAI's shape, or with any other `body` (object, str or bytes)."""
    kind = "rate_limit_error" if status == 429 else "scripted_error"
    return dict(how, status=status, headers=headers or {},
                body={"error": {"message": message, "type": kind}} if body is None else body)


def pieces(text, size=5):
    return [text[i:i + size] for i in range(0, len(text), size)]


def argument_text(value):
    return value if isinstance(value, str) else json.dumps(value)


def openai_wire(reply, model):
    """(data payloads of the stream, whole JSON) of a reply as OpenAI chat completions."""
    calls = [{"index": i, "id": "call_%s_%d" % (os.urandom(3).hex(), i), "type": "function",
              "function": {"name": name, "arguments": argument_text(args)}} for i, (name, args) in enumerate(reply["tools"])]
    finish = reply["finish"] or ("tool_calls" if calls else "stop")
    deltas = [{"role": "assistant", "content": ""}]
    deltas += [{"reasoning_content": p} for p in pieces(reply["reasoning"])] + [{"content": p} for p in pieces(reply["text"])]
    for call in calls:
        deltas.append({"tool_calls": [dict(call, function={"name": call["function"]["name"], "arguments": ""})]})
        deltas += [{"tool_calls": [{"index": call["index"], "function": {"arguments": p}}]}
                   for p in pieces(call["function"]["arguments"])]
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": model}
    chunks = [dict(head, choices=[{"index": 0, "delta": d, "finish_reason": None}]) for d in deltas]
    chunks.append(dict(head, choices=[{"index": 0, "delta": {}, "finish_reason": finish}]))
    message = {"role": "assistant", "content": reply["text"] or None}
    message.update({"reasoning_content": reply["reasoning"]} if reply["reasoning"] else {})
    message.update({"tool_calls": [{k: c[k] for k in ("id", "type", "function")} for c in calls]} if calls else {})
    whole = dict(head, object="chat.completion", choices=[{"index": 0, "message": message, "finish_reason": finish}])
    if reply["usage"]:
        prompt, cached, completion = reply["usage"]
        whole["usage"] = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
                          "prompt_tokens_details": {"cached_tokens": cached}}
        chunks.append(dict(head, choices=[], usage=whole["usage"]))
    return chunks + ["[DONE]"], whole


def anthropic_wire(reply, model):
    """The same as Anthropic Messages."""
    prompt, cached, completion = reply["usage"] or (0, 0, 0)
    usage = {"input_tokens": prompt - cached, "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached,
             "output_tokens": completion}
    blocks = [{"type": "thinking", "thinking": reply["reasoning"], "signature": "c2lnbmF0dXJl"}] if reply["reasoning"] else []
    blocks += [{"type": "text", "text": reply["text"]}] if reply["text"] else []
    blocks += [{"type": "tool_use", "id": "toolu_%s_%d" % (os.urandom(3).hex(), i), "name": name, "input": args}
               for i, (name, args) in enumerate(reply["tools"])]
    stop = {"length": "max_tokens", None: "tool_use" if reply["tools"] else "end_turn"}.get(reply["finish"], reply["finish"])
    whole = {"id": "msg_" + os.urandom(6).hex(), "type": "message", "role": "assistant", "model": model, "content": blocks,
             "stop_reason": stop, "stop_sequence": None, "usage": usage}
    events = [{"type": "message_start", "message": dict(whole, content=[], stop_reason=None, usage=dict(usage, output_tokens=1))}]
    for i, block in enumerate(blocks):
        field, delta = {"text": ("text", "text_delta"), "thinking": ("thinking", "thinking_delta"),
                        "tool_use": ("input", "input_json_delta")}[block["type"]]
        empty = dict(block, **({"input": {}} if field == "input" else {field: ""}))
        events.append({"type": "content_block_start", "index": i,
                       "content_block": dict(empty, **({"signature": ""} if field == "thinking" else {}))})
        for p in pieces(argument_text(block[field])):
            events.append({"type": "content_block_delta", "index": i,
                           "delta": {"type": delta, "partial_json" if field == "input" else field: p}})
        if field == "thinking":
            events.append({"type": "content_block_delta", "index": i,
                           "delta": {"type": "signature_delta", "signature": block["signature"]}})
        events.append({"type": "content_block_stop", "index": i})
    events.append({"type": "message_delta", "delta": {"stop_reason": stop, "stop_sequence": None}, "usage": usage})
    return events + [{"type": "message_stop"}], whole


def responses_wire(reply, model):
    """The same as OpenAI Responses."""
    items = [{"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text",
                                                              "text": reply["reasoning"]}]}] if reply["reasoning"] else []
    if reply["text"]:
        items.append({"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
                      "content": [{"type": "output_text", "text": reply["text"], "annotations": []}]})
    items += [{"type": "function_call", "id": "fc_%d" % i, "call_id": "call_%s_%d" % (os.urandom(3).hex(), i), "name": name,
               "arguments": argument_text(args), "status": "completed"} for i, (name, args) in enumerate(reply["tools"])]
    status = "incomplete" if reply["finish"] == "length" else "completed"
    whole = {"id": "resp_1", "object": "response", "created_at": 1, "status": status, "model": model, "output": items}
    whole.update({"incomplete_details": {"reason": "max_output_tokens"}} if status == "incomplete" else {})
    if reply["usage"]:
        prompt, cached, completion = reply["usage"]
        whole["usage"] = {"input_tokens": prompt, "input_tokens_details": {"cached_tokens": cached}, "output_tokens": completion,
                          "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": prompt + completion}
    events = [{"type": "response.created", "response": dict(whole, status="in_progress", output=[])}]
    for n, item in enumerate(items):
        empty = {"reasoning": {"summary": []}, "message": {"content": []}, "function_call": {"arguments": ""}}[item["type"]]
        events.append({"type": "response.output_item.added", "output_index": n, "item": dict(item, **empty)})
        kind, text = {"reasoning": ("reasoning_summary_text", reply["reasoning"]), "message": ("output_text", reply["text"]),
                      "function_call": ("function_call_arguments", item.get("arguments"))}[item["type"]]
        place = {"item_id": item["id"], "output_index": n, "content_index": 0, "summary_index": 0}
        events += [dict(place, type="response.%s.delta" % kind, delta=p) for p in pieces(text)]
        done = {"arguments" if item["type"] == "function_call" else "text": text}
        events += [dict(place, type="response.%s.done" % kind, **done),
                   {"type": "response.output_item.done", "output_index": n, "item": item}]
    return events + [{"type": "response." + status, "response": whole}], whole


def gemini_wire(reply, model):
    """The same as Gemini generateContent."""
    parts = [{"text": p, "thought": True} for p in pieces(reply["reasoning"])] + [{"text": p} for p in pieces(reply["text"])]
    parts += [{"functionCall": {"name": name, "args": args}, "thoughtSignature": "c2ln"} for name, args in reply["tools"]]
    finish = {"length": "MAX_TOKENS", None: "STOP"}.get(reply["finish"], reply["finish"])
    usage = {}
    if reply["usage"]:
        prompt, cached, completion = reply["usage"]
        usage = {"usageMetadata": {"promptTokenCount": prompt, "cachedContentTokenCount": cached,
                                   "candidatesTokenCount": completion, "totalTokenCount": prompt + completion}}

    def candidate(some, **more):
        return {"candidates": [dict({"index": 0, "content": {"role": "model", "parts": some}}, **more)], "modelVersion": model}
    whole = dict(candidate(parts, finishReason=finish), **usage)
    return [candidate([p]) for p in parts] + [dict(candidate([], finishReason=finish), **usage)], whole


def wire_of(path, reply, model):
    """(data payloads, whole JSON, event names wanted) in the format that this path speaks."""
    if "enerateContent" in path:
        return gemini_wire(reply, model) + (False,)
    if path.endswith("/messages"):
        return anthropic_wire(reply, model) + (True,)
    return (responses_wire(reply, model) if path.endswith("/responses") else openai_wire(reply, model)) + (False,)


def sse_frame(payload, named=False):
    name = "event: %s\n" % payload["type"] if named and isinstance(payload, dict) else ""
    return (name + "data: %s\n\n" % (payload if isinstance(payload, str) else json.dumps(payload))).encode()


class Seen:
    """One request as the provider got it. `left` is set when its connection has ended, `left_at` says when."""

    def __init__(self, handler, raw):
        self.method, self.path, self.raw = handler.command, handler.path.split("?")[0], raw
        self.target, self.connection = handler.path, handler.client_address
        self.headers = {k.lower(): v for k, v in handler.headers.items()}
        self.at, self.left, self.left_at = time.monotonic(), threading.Event(), None
        try:
            self.body = json.loads(raw)
        except ValueError:
            self.body = None
        body = self.body if isinstance(self.body, dict) else {}
        named = re.search(r"/models/([^/:]+):", self.path)
        self.model = body.get("model") or (named and named.group(1))
        self.wants_stream = bool(body.get("stream")) or ":streamGenerateContent" in self.path

    def text(self):
        return self.raw.decode("utf-8", "replace")


class BreakOff(Exception):
    """The script says: no more on this connection."""


class ScriptedHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    seen = None

    def log_message(self, *_):
        pass

    def setup(self):
        super().setup()
        self.server.connections.add(self.connection)

    def handle(self):
        with contextlib.suppress(OSError, BreakOff, ValueError):
            super().handle()

    def finish(self):
        self.mark_left()
        self.server.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def mark_left(self):
        if self.seen and not self.seen.left.is_set():
            self.seen.left_at = time.monotonic()
            self.seen.left.set()

    def read_body(self):
        if "chunked" not in (self.headers.get("transfer-encoding") or ""):
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        body = b""
        while True:
            size = int(self.rfile.readline(), 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                return body

    def do_GET(self):
        self.seen = Seen(self, b"")
        self.server.requests.append(self.seen)
        models = self.server.models
        self.send_whole({"status": 200 if self.path.endswith("/models") else 404,
                         "body": {"object": "list", "data": [{"id": m, "object": "model"} for m in models]}})

    def do_CONNECT(self):
        self.seen = Seen(self, b"")
        self.server.requests.append(self.seen)
        self.send_whole({"status": 502, "body": "no tunnel here"})
        raise BreakOff

    def do_POST(self):
        self.seen = Seen(self, self.read_body())
        self.server.requests.append(self.seen)
        reply = self.server.next_reply(self.seen)
        if reply.get("before"):
            self.hold(reply["before"])
        if reply.get("hang") == "headers":
            self.hold()
        if "raw" in reply:
            self.wfile.write(reply["raw"])
            self.break_off(reply)
        if "status" in reply:
            return self.send_whole(reply)
        payloads, whole, named = wire_of(self.seen.path, reply, self.seen.model)
        if not reply.get("stream", self.seen.wants_stream):
            return self.send_whole(dict(reply, status=200, body=whole))
        if "sse" in reply:
            return self.send_stream(reply, reply["sse"])
        self.send_stream(reply, [sse_frame(p, named) for p in reply.get("chunks", payloads)])

    def send_whole(self, reply):
        body = reply["body"]
        kind = "application/json" if isinstance(body, (dict, list)) else "text/html"
        raw = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_head(reply, reply["status"], kind, [raw])
        self.send_body(reply, [raw] if raw else [])

    def send_stream(self, reply, frames):
        self.send_head(reply, 200, "text/event-stream", frames)
        self.send_body(reply, frames)

    def send_head(self, reply, status, kind, frames):
        self.send_response_only(status)
        self.framing = reply.get("framing") or ("chunked" if kind == "text/event-stream" else "length")
        head = {"content-type": kind}
        if reply.get("coding"):
            head["content-encoding"] = "gzip"
        if self.framing == "length":
            head["content-length"] = str(sum(map(len, frames)) + reply.get("lie", 0))
        elif self.framing == "chunked":
            head["transfer-encoding"] = "chunked"
        else:
            head["connection"] = "close"
        for name, value in dict(head, **(reply.get("headers") or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.flush()

    def send_body(self, reply, frames):
        if reply.get("coding"):
            packed = gzip.compress(b"".join(frames))
            frames = [packed if reply["coding"] == "gzip" else packed[:len(packed) // 2] + b"\xff\x00damage"
                      + packed[len(packed) // 2:]]
        room = reply.get("cut", 1 << 62)
        for n, frame in enumerate(frames):
            if n == reply.get("hang"):
                self.hold()
            if n == reply.get("die") or room <= 0:
                self.break_off(reply)
            if reply.get("pause"):
                self.hold(reply["pause"])
            frame, room = frame[:room], room - len(frame)
            self.wfile.write(b"%x\r\n%s\r\n" % (len(frame), frame) if self.framing == "chunked" else frame)
        if len(frames) == reply.get("hang"):
            self.hold()
        if len(frames) == reply.get("die") or room <= 0 or reply.get("lie", 0) > 0:
            self.break_off(reply)
        if self.framing == "chunked":
            self.wfile.write(b"0\r\n\r\n")
        if self.framing == "close" or reply.get("lie"):
            self.break_off(reply)

    def hold(self, seconds=1 << 30):
        """Say nothing for so long; when the client leaves (or the test ends) meanwhile, give up."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.server.is_over.is_set():
            readable = select.select([self.connection], [], [], min(0.2, max(0, end - time.monotonic())))[0]
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                self.mark_left()
                raise BreakOff
        if self.server.is_over.is_set():
            raise BreakOff

    def break_off(self, reply):
        if reply.get("how") == "rst":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        raise BreakOff


class ScriptedProvider(ThreadingHTTPServer):
    """play(...) says what it answers: replies in order (the last one repeats), {model: [replies]}, or function(Seen) -> reply."""
    daemon_threads, request_queue_size = True, 512

    def __init__(self, *replies, models=("m1", "m2")):
        super().__init__(("127.0.0.1", 0), ScriptedHandler)
        self.models, self.connections, self.is_over, self.lock = models, set(), threading.Event(), threading.Lock()
        self.port = self.server_address[1]
        self.url = "http://127.0.0.1:%d/v1/chat/completions" % self.port
        self.play(*(replies or [say("scripted answer")]))
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def play(self, *replies):
        """Start anew with these replies; what was seen before is forgotten."""
        with self.lock:
            self.requests, self.plan = [], replies[0] if len(replies) == 1 and not isinstance(replies[0], dict) else list(replies)
            if len(replies) == 1 and isinstance(replies[0], dict):
                self.plan = list(replies) if {"text", "status",
                                              "raw"} & set(replies[0]) else {k: list(v) for k, v in replies[0].items()}

    def next_reply(self, seen):
        with self.lock:
            if callable(self.plan):
                return self.plan(seen)
            queue_ = self.plan if isinstance(self.plan, list) else self.plan[seen.model]
            return queue_.pop(0) if len(queue_) > 1 else queue_[0]

    def handle_error(self, *_):
        pass

    def stop(self):
        self.is_over.set()
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


# --- the client: a bare socket that sends anything and reads strictly

class Broken(Exception):
    """What came back is not HTTP, or ended too early; .data is what there was."""

    def __init__(self, words, data=b""):
        super().__init__("%s: %r" % (words, data[-300:]))
        self.data = data


class Answer:
    """One HTTP answer: status, headers (lower case), body (bytes, dechunked), json, events."""

    def __init__(self, status, headers, body, version="1.1"):
        self.status, self.headers, self.body, self.version = status, headers, body, version

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def events(self):
        """The Anthropic events of a stream; raises AssertionError when they break the protocol."""
        events = read_events(self.body)
        faults = stream_faults(events)
        assert not faults, "%s in %s" % (faults, self.body.decode("utf-8", "replace")[-1500:])
        return events

    @property
    def message(self):
        """The Anthropic message, whether it came as JSON or as a stream."""
        return folded(self.events) if "event-stream" in self.headers.get("content-type", "") else self.json

    def __repr__(self):
        return "<%d %r>" % (self.status, self.body[:400])


class Wire:
    """A connection to `port`. Use as a context manager; `leave()` goes without a word (RST with reset=True)."""

    def __init__(self, port, timeout=20, host="127.0.0.1"):
        self.port, self.data = port, b""
        self.sock = socket.create_connection((host, port), timeout)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()

    def leave(self, reset=False):
        if reset:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def send(self, data):
        self.sock.sendall(data)
        return self

    def ask(self, method, path, body=None, headers=None, version="1.1"):
        """Send a request that is right in every way (body: object, bytes or None)."""
        return self.send(request_bytes(self.port, method, path, body, headers, version))

    def more(self):
        """Some more bytes; b"" at the end of the stream."""
        data = self.sock.recv(65536)
        self.data += data
        return data

    def until(self, mark):
        """Everything up to and with `mark`."""
        while mark not in self.data:
            if not self.more():
                raise Broken("connection ended before %r" % mark, self.data)
        at = self.data.index(mark) + len(mark)
        head, self.data = self.data[:at], self.data[at:]
        return head

    def exactly(self, size):
        while len(self.data) < size:
            if not self.more():
                raise Broken("connection ended %d bytes early" % (size - len(self.data)), self.data)
        part, self.data = self.data[:size], self.data[size:]
        return part

    def head(self):
        """(status, headers, version) of the next answer; 100 Continue is passed over."""
        lines = self.until(b"\r\n\r\n").decode("latin-1").split("\r\n")[:-2]
        status = re.fullmatch(r"HTTP/(1\.[01]) ([1-5]\d\d)( [^\r\n]*)?", lines[0])
        headers = [re.fullmatch(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n]*?)[ \t]*", line) for line in lines[1:]]
        if not status or not all(headers):
            raise Broken("not an HTTP head", "\r\n".join(lines).encode())
        if status.group(2) == "100":
            return self.head()
        names = [h.group(1).lower() for h in headers]
        if len({n for n in names if n in ("content-length", "transfer-encoding", "content-type")}) != \
                sum(n in ("content-length", "transfer-encoding", "content-type") for n in names):
            raise Broken("a header twice", "\r\n".join(lines).encode())
        return int(status.group(2)), {h.group(1).lower(): h.group(2) for h in headers}, status.group(1)

    def answer(self, method="POST"):
        """The next answer, whole. Raises Broken when it is not well-formed or ends early."""
        status, headers, version = self.head()
        if method == "HEAD" or status in (204, 304):
            body = b""
        elif "transfer-encoding" in headers:
            if "content-length" in headers or version == "1.0" or headers["transfer-encoding"] != "chunked":
                raise Broken("wrong framing %r" % headers)
            body = b"".join(iter(self.chunk, b""))
        elif "content-length" in headers:
            body = self.exactly(int(headers["content-length"]))
        else:
            while self.more():
                pass
            body, self.data = self.data, b""
        return Answer(status, headers, body, version)

    def chunk(self):
        size = self.until(b"\r\n")
        if not re.fullmatch(rb"[0-9a-fA-F]{1,8}\r\n", size):
            raise Broken("not a chunk size", size)
        data = self.exactly(int(size, 16))
        if self.exactly(2) != b"\r\n":
            raise Broken("chunk without line end", data)
        return data

    def is_closed(self, seconds=5):
        """Did the other side close this connection, with nothing more to read?"""
        self.sock.settimeout(seconds)
        try:
            return not self.data and not self.sock.recv(1)
        except socket.timeout:
            return False
        except OSError:
            return True


def request_bytes(port, method, path, body=None, headers=None, version="1.1"):
    raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    head = {"Host": "127.0.0.1:%d" % port}
    if body is not None:
        head.update({"Content-Type": "application/json", "Content-Length": str(len(raw))})
    head.update(headers or {})
    lines = ["%s %s HTTP/%s" % (method, path, version)] + ["%s: %s" % (k, v) for k, v in head.items() if v is not None]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + raw


def fetch(port, method, path, body=None, headers=None, timeout=20):
    """One request on a connection of its own -> Answer."""
    with Wire(port, timeout) as wire:
        return wire.ask(method, path, body, headers).answer(method)


# --- Anthropic's event protocol

STOP_REASONS = ("end_turn", "max_tokens", "stop_sequence", "tool_use", "pause_turn", "refusal", "model_context_window_exceeded")
DELTAS = {"text": ("text_delta", "citations_delta"), "thinking": ("thinking_delta", "signature_delta"),
          "tool_use": ("input_json_delta",), "server_tool_use": ("input_json_delta",)}
USAGE = {"input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens"}


def read_events(raw):
    """The events of an SSE body as Anthropic sends them: one `event:` and one `data:` line each, names equal to types."""
    events = []
    frames = raw.split(b"\n\n")
    assert frames.pop() == b"", "the stream ends inside a frame: %r" % raw[-200:]
    for frame in frames:
        parts = re.fullmatch(rb"event: ([a-z_]+)\ndata: ([^\n\r]+)", frame)
        assert parts, "not a frame: %r" % frame
        event = json.loads(parts.group(2))
        assert event["type"] == parts.group(1).decode(), "event name and type differ: %r" % frame
        events.append(event)
    return events


def stream_faults(events):
    """What is wrong with these events as one complete Anthropic stream; [] when they are well-formed.

    A stream ends with message_stop, after message_delta, or with one error event. See edge-cases.md, "What the client is strict about".
    """
    faults, phase, open_block, next_index, arguments = [], "new", None, 0, ""
    for n, event in enumerate(events):
        kind = event.get("type")

        def fault(words):
            faults.append("event %d (%s): %s" % (n, kind, words))
        if phase == "over":
            fault("comes after the end")
        elif kind == "error":
            fault_in_error = error_fault(event)
            phase = "over"
            if fault_in_error:
                fault(fault_in_error)
        elif kind == "message_start":
            message = event.get("message") or {}
            if phase != "new":
                fault("comes twice")
            if {"id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"} - set(message):
                fault("lacks fields: %r" % message)
            elif message["type"] != "message" or message["role"] != "assistant" or message["content"] != [] or message["stop_reason"]:
                fault("is not an empty message: %r" % message)
            elif USAGE - set(message["usage"]):
                fault("usage lacks %r" % (USAGE - set(message["usage"])))
            phase = "open"
        elif phase == "new":
            fault("comes before message_start")
            phase = "open"
        elif kind == "ping":
            pass
        elif phase == "delta" and kind != "message_stop":
            fault("comes after message_delta")
        elif kind == "content_block_start":
            if open_block is not None:
                fault("block %d is still open" % open_block[0])
            if event.get("index") != next_index:
                fault("index is %r, not %d" % (event.get("index"), next_index))
            block = event.get("content_block") or {}
            if block.get("type") == "tool_use" and not (block.get("id") and block.get("name") and block.get("input") == {}):
                fault("not an empty tool call: %r" % block)
            if block.get("type") in ("text", "thinking") and block.get(block["type"]) != "":
                fault("does not begin empty: %r" % block)
            open_block, next_index, arguments = (event.get("index"), block.get("type")), next_index + 1, ""
        elif kind in ("content_block_delta", "content_block_stop"):
            if open_block is None or event.get("index") != open_block[0]:
                fault("index %r, but %r is open" % (event.get("index"), open_block))
                continue
            if kind == "content_block_delta":
                delta = event.get("delta") or {}
                if open_block[1] in DELTAS and delta.get("type") not in DELTAS[open_block[1]]:
                    fault("a %s in a %s block" % (delta.get("type"), open_block[1]))
                arguments += delta.get("partial_json", "")
                continue
            if open_block[1] == "tool_use" and arguments and not is_json_object(arguments):
                fault("the call's input is not a JSON object: %r" % arguments[-200:])
            open_block = None
        elif kind == "message_delta":
            if open_block is not None:
                fault("block %d is still open" % open_block[0])
            if (event.get("delta") or {}).get("stop_reason") not in STOP_REASONS:
                fault("stop_reason: %r" % event.get("delta"))
            if not all(isinstance((event.get("usage") or {}).get(k), int) and event["usage"][k] >= 0 for k in USAGE):
                fault("usage lacks a number: %r" % event.get("usage"))
            phase = "delta"
        elif kind == "message_stop":
            if phase != "delta":
                fault("comes without message_delta")
            phase = "over"
        else:
            fault("unknown event")
    if phase != "over":
        faults.append("the stream ends in phase %r" % phase)
    return faults


def is_json_object(text):
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def error_fault(body):
    """None, or what is wrong with an error in Anthropic's shape."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or body.get("type") != "error":
        return "not an Anthropic error: %r" % (body,)
    kind, words = error.get("type"), error.get("message")
    if not (isinstance(kind, str) and re.fullmatch("[a-z_]+", kind) and isinstance(words, str) and words):
        return "error without type and message: %r" % (body,)


def message_fault(message):
    """None, or what is wrong with a complete message."""
    if not isinstance(message, dict) or (message.get("type"), message.get("role")) != ("message", "assistant"):
        return "not a message: %r" % (message,)
    if not (isinstance(message.get("id"), str) and isinstance(message.get("model"), str)
            and message.get("stop_reason") in STOP_REASONS):
        return "id, model or stop_reason: %r" % message
    if not all(isinstance(message.get("usage", {}).get(k), int) for k in USAGE):
        return "usage: %r" % message
    for block in message["content"]:
        if not isinstance(block.get("text" if block["type"] == "text" else "type"),
                          str) or not isinstance(block.get("input", {}), dict):
            return "a block: %r" % block


def folded(events):
    """The message that a well-formed stream tells, put together independently of ccr.fold. An error event becomes {"error": ...}."""
    message, texts = None, collections.defaultdict(str)
    for event in events:
        kind = event["type"]
        if kind == "error":
            return {"error": event["error"], "partial": message}
        if kind == "message_start":
            message = dict(event["message"], content=[])
        elif kind == "content_block_start":
            message["content"].append(dict(event["content_block"]))
        elif kind == "content_block_delta":
            delta, block = event["delta"], message["content"][event["index"]]
            field = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}.get(delta["type"])
            if field:
                block[field] = block.get(field, "") + delta[field]
            elif delta["type"] == "input_json_delta":
                texts[event["index"]] += delta["partial_json"]
        elif kind == "content_block_stop" and texts[event["index"]]:
            message["content"][event["index"]]["input"] = json.loads(texts[event["index"]])
        elif kind == "message_delta":
            message.update(event["delta"], usage=dict(message["usage"], **event["usage"]))
    return message


# --- the program: a real process in a home of its own

PROVIDER_KEY = "sk-provider-secret-0123456789"


def provider_entry(provider, name="prov", key=PROVIDER_KEY, path="/v1/chat/completions", models=("m1", "m2"), **more):
    """A `Providers` entry for a scripted provider."""
    return dict({"name": name, "api_base_url": "http://127.0.0.1:%d%s" % (provider.port, path), "models": list(models)},
                **dict({"api_key": key} if key else {}, **more))


def prompt(text="hi", model="claude-opus-5-5", **more):
    """A small Messages request."""
    return dict({"model": model, "max_tokens": 100, "messages": [{"role": "user", "content": text}]}, **more)


class Ccr:
    """`ccr.py start --foreground` as a process; config None: no file. patch: module constants of ccr, set before main runs."""

    def __init__(self, config, patch=None, env=None, arguments=(), home=None, wait=True):
        self.home = home or tempfile.mkdtemp(dir=TEST_HOME)
        self.port = free_port()
        self.config_path = os.path.join(self.home, ".claude-code-router", "config.json")
        if config is not None:
            self.write_config(config)
        self.env = dict({"HOME": self.home, "PATH": os.environ.get("PATH", ""), "LANG": "C.UTF-8", "TMPDIR": self.home,
                         "PYTHONDONTWRITEBYTECODE": "1"}, **(env or {}))
        program = [CCR_PY]
        if patch:
            program = ["-c",
                       "import sys; sys.path.insert(0, %r); import ccr\nfor k, v in %r.items(): assert hasattr(ccr, k), k; setattr(ccr, k, v)\n"
                             "sys.exit(ccr.main(sys.argv[1:]))" % (HERE, patch)]
        self.out = open(os.path.join(self.home, "stdout.txt"), "w+b")
        self.err = open(os.path.join(self.home, "stderr.txt"), "w+b")
        self.process = subprocess.Popen([sys.executable] + program + ["start", "--foreground", "--port", str(self.port)]
                                        + list(arguments),
                                        env=self.env, cwd=self.home, stdin=subprocess.DEVNULL, stdout=self.out, stderr=self.err)
        self.pid = self.process.pid
        if wait and not wait_for(lambda: self.process.poll() is not None or self.is_up(), 20):
            self.process.kill()
        if wait and self.process.poll() is not None:
            raise AssertionError("ccr did not start (status %s): %s" % (self.process.wait(), self.words()))

    def write_config(self, config):
        os.makedirs(os.path.dirname(self.config_path), exist_ok=True)
        with open(self.config_path, "w", encoding="utf-8") as f:
            f.write(config if isinstance(config, str) else json.dumps(config))
        os.chmod(self.config_path, 0o600)

    def is_up(self):
        try:
            return fetch(self.port, "GET", "/health", timeout=5).json["pid"] == self.pid
        except (OSError, Broken, ValueError, KeyError):
            return False

    def words(self):
        """All it wrote on stdout and stderr so far."""
        text = ""
        for name in ("stdout.txt", "stderr.txt"):
            with open(os.path.join(self.home, name), encoding="utf-8", errors="replace") as f:
                text += f.read()
        return text

    def logs(self):
        """All lines of all log files, as text."""
        text = ""
        for path in glob.glob(os.path.join(self.home, ".claude-code-router", "logs", "*")):
            with open(path, encoding="utf-8", errors="replace") as f:
                text += f.read()
        return text

    def fetch(self, method, path, body=None, headers=None, timeout=20):
        return fetch(self.port, method, path, body, headers, timeout)

    def ask(self, body=None, path="/v1/messages", headers=None, timeout=20):
        return self.fetch("POST", path, prompt() if body is None else body, headers, timeout)

    def wire(self, timeout=20):
        return Wire(self.port, timeout)

    def stop(self, seconds=30):
        """Ends it by SIGTERM; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = "killed after %s s" % seconds
            self.process.wait()
        self.out.close()
        self.err.close()
        return status


class CcrTest(unittest.TestCase):
    """Tests of one running ccr before one scripted provider. A subclass may override config(), patch, env.

    After its tests: no traceback was written, and the provider's key stands nowhere.
    """
    patch, env, arguments = None, None, ()
    maxDiff = 4000

    @classmethod
    def config(cls):
        return {"Providers": [provider_entry(cls.provider)], "Router": {"default": "prov,m1"}}

    @classmethod
    def setUpClass(cls):
        cls.provider = ScriptedProvider()
        try:
            cls.ccr = Ccr(cls.config(), cls.patch, cls.env, cls.arguments)
        except BaseException:
            cls.provider.stop()
            raise

    @classmethod
    def tearDownClass(cls):
        cls.provider.stop()
        status, words, logs = cls.ccr.stop(), cls.ccr.words(), cls.ccr.logs()
        assert "Traceback" not in words + logs, (words + logs)[-6000:]
        assert PROVIDER_KEY not in words + logs, "the provider's key was written"
        assert status == 0, "exit status %s: %s" % (status, words[-3000:])

    def setUp(self):
        self.provider.play(say("scripted answer"))

    def ask(self, body=None, path="/v1/messages", headers=None, timeout=20):
        return self.ccr.ask(body, path, headers, timeout)

    def both_ways(self, body=None):
        """(name, answer) of a request asked plainly and as a stream."""
        for name, stream in (("as JSON", False), ("as a stream", True)):
            yield name, self.ask(dict(prompt() if body is None else body, stream=stream))

    def assert_error(self, answer, status, kind, words=""):
        """`answer` is an HTTP error in Anthropic's shape, with this type, and words (a regular expression) in its message."""
        self.assertEqual(answer.status, status, answer)
        self.assertIn("application/json", answer.headers.get("content-type", ""))
        self.assertIsNone(error_fault(answer.json))
        self.assertEqual(answer.json["error"]["type"], kind, answer)
        self.assertRegex(answer.json["error"]["message"], words)
        self.assertNotIn(PROVIDER_KEY, answer.body.decode())


# === 3. Events =====================================================================

def tell(script, writer=None):
    """The events of a BlockWriter that is told [(method, *arguments), ...]."""
    writer = writer or ccr.BlockWriter("msg_1", "m", 7)
    return [event for name, *arguments in script for event in getattr(writer, name)(*arguments)]


class TestBlockWriter(unittest.TestCase):
    def blocks_of(self, script):
        events = tell(script)
        self.assertEqual(stream_faults(events), [])
        return ccr.fold(iter(events))["content"]

    def test_blocks_come_in_order_whatever_order_they_are_told_in(self):
        use = lambda id, name, input: {"type": "tool_use", "id": id, "name": name, "input": input}
        text = lambda text: {"type": "text", "text": text}
        for name, script, expected in [
            ("text in pieces is one block", [("text", "a"), ("text", ""), ("text", None), ("text", "b")], [text("ab")]),
            ("thinking ends where text begins", [("thinking", "t"), ("text", "a")],
             [{"type": "thinking", "thinking": "t", "signature": ""}, text("a")]),
            ("a signature closes a thought", [("thinking", "t"), ("signature", "s"), ("thinking", "u")],
             [{"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "thinking", "thinking": "u", "signature": ""}]),
            ("a signature alone is an empty thought", [("signature", "s")], [{"type": "thinking", "thinking": "", "signature": "s"}]),
            ("interleaved calls are told one after the other",
             [("tool", 0, "a", "f", ""), ("tool", 1, "b", "g", ""), ("tool", 0, None, None, '{"x"'), ("tool", 1, None, None, '{"y"'),
              ("tool", 0, None, None, ":1}"), ("tool", 1, None, None, ":2}")], [use("a", "f", {"x": 1}), use("b", "g", {"y": 2})]),
            ("text within a call waits until the call is whole",
             [("tool", 0, "a", "f", '{"x'), ("text", "mid"), ("tool", 0, None, None, '":1}'), ("text", "dle")],
             [use("a", "f", {"x": 1}), text("middle")]),
            ("a name may come late", [("tool", 0, "a", None, '{"x"'), ("text", "t"), ("tool", 0, None, "f", ":1}")],
             [use("a", "f", {"x": 1}), text("t")]),
            ("null arguments are none", [("tool", 0, "a", "f", "null")], [use("a", "f", {})]),
            ("a call without arguments does not swallow what follows", [("tool", 0, "a", "f", ""), ("tool", 1, "b", "g", "{}")],
             [use("a", "f", {}), use("b", "g", {})]),
            ("arguments that are sent once more when complete are ignored",
             [("tool", 0, "a", "f", '{"x":1}'), ("text", "t"), ("tool", 0, "a", "f", '{"x":1}')], [use("a", "f", {"x": 1}), text("t")]),
            ("a block of another type stands as it is", [("text", "a"), ("block", {"type": "redacted_thinking", "data": "x"}), ("text", "b")],
             [text("a"), {"type": "redacted_thinking", "data": "x"}, text("b")]),
        ]:
            with self.subTest(name):
                self.assertEqual(self.blocks_of(script + [("finish",)]), expected)

    def test_two_calls_never_share_an_id(self):
        first, second, third = self.blocks_of([("tool", 0, "c", "f", "{}"), ("tool", 1, "c", "f", "{}"), ("tool", 2, None, "f", "{}"), ("finish",)])
        self.assertEqual(first["id"], "c")
        self.assertEqual(len({first["id"], second["id"], third["id"]}), 3)

    def test_the_end_says_tool_use_exactly_when_a_call_was_made(self):
        for name, script, expected in [
            ("a call with stop", [("tool", 0, "a", "f", "{}"), ("finish", "end_turn")], "tool_use"),
            ("a call without a reason", [("tool", 0, "a", "f", "{}"), ("finish", None)], "tool_use"),
            ("a call and length", [("tool", 0, "a", "f", "{}"), ("finish", "max_tokens")], "max_tokens"),
            ("no call but tool_use", [("text", "a"), ("finish", "tool_use")], "end_turn"),
            ("nothing at all", [("finish",)], "end_turn"),
        ]:
            with self.subTest(name):
                self.assertEqual(ccr.fold(iter(tell(script)))["stop_reason"], expected)

    def test_the_last_usage_carries_all_four_numbers(self):
        delta = tell([("text", "a"), ("finish", "end_turn", {"input_tokens": 5, "output_tokens": 2, "cache_read_input_tokens": None})])[-2]
        self.assertEqual(delta["usage"], {"input_tokens": 5, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 2})

    def test_what_cannot_be_a_call_is_an_error(self):
        for name, script in [("a call without a name", [("tool", 0, "a", None, "{}"), ("finish",)]),
                             ("arguments after the end", [("tool", 0, "a", "f", "{}"), ("text", "t"), ("tool", 0, None, None, '{"x":1}')])]:
            with self.subTest(name), self.assertRaises(ccr.ApiError) as caught:
                tell(script)
            self.assertEqual(caught.exception.status, 502)

    def test_any_order_of_fragments_gives_a_valid_stream_with_everything_in_it(self):
        rng = seeded("block writer")
        for n in range(300):
            calls = {key: json.dumps({"n": key, "s": rng.choice(["}", "{", '"', "é\n"]) * rng.randrange(4)}) for key in range(rng.randrange(4))}
            left, script, text, thinking = dict(calls), [], "", ""
            while any(left.values()) or rng.random() < 0.7:
                kind = rng.randrange(4)
                if kind == 0:
                    script.append(("text", rng.choice("xyz"))), script
                    text += script[-1][1]
                elif kind == 1:
                    script.append(("thinking", rng.choice("uvw")))
                    thinking += script[-1][1]
                elif any(left.values()):
                    key = rng.choice([k for k in left if left[k]])
                    size = rng.randrange(1, 9)
                    script.append(("tool", key, "id%d" % key, "f%d" % key if rng.random() < .7 or len(left[key]) <= size else None, left[key][:size]))
                    left[key] = left[key][size:]
            events = tell(script + [("finish",)])
            self.assertEqual(stream_faults(events), [], script)
            content = ccr.fold(iter(events))["content"]
            self.assertEqual({b["name"]: b["input"] for b in content if b["type"] == "tool_use"},
                             {"f%d" % k: json.loads(v) for k, v in calls.items()}, script)
            self.assertEqual("".join(b["text"] for b in content if b["type"] == "text"), text, script)
            self.assertEqual("".join(b["thinking"] for b in content if b["type"] == "thinking"), thinking, script)


class TestFold(unittest.TestCase):
    def test_folding_an_unfolded_message_gives_it_again(self):
        usage = {"input_tokens": 1, "output_tokens": 2, "server_tool_use": {"web_search_requests": 1}}
        for name, content in [
            ("nothing", []),
            ("text with citations", [{"type": "text", "text": "hi", "citations": [{"url": "u"}]}]),
            ("empty text", [{"type": "text", "text": ""}]),
            ("thinking, signed and not", [{"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "thinking", "thinking": "t"}]),
            ("calls", [{"type": "tool_use", "id": "1", "name": "n", "input": {"a": [1, None, "é"]}}, {"type": "tool_use", "id": "2", "name": "n", "input": {}}]),
            ("a search", [{"type": "server_tool_use", "id": "1", "name": "web_search", "input": {"query": "q"}},
                          {"type": "web_search_tool_result", "tool_use_id": "1", "content": [{"type": "web_search_result", "url": "u", "title": "t"}]}]),
            ("a type nobody knows", [{"type": "hologram", "data": {"x": 1}}]),
        ]:
            message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": content, "stop_reason": "end_turn",
                       "stop_sequence": None, "usage": usage, "container": None}
            with self.subTest(name):
                events = list(ccr.unfold(message))
                self.assertEqual(ccr.fold(events), message)
                self.assertEqual(stream_faults(events), [])

    def test_arguments_that_are_no_object_are_an_error(self):
        for text in ('{"a":', "[1]", "nope"):
            with self.subTest(text), self.assertRaises(ccr.ApiError):
                ccr.fold(iter(tell([("tool", 0, "a", "f", text), ("finish",)])))


# === 4. SSE ========================================================================

class TestDecodeSse(unittest.TestCase):
    ROWS = [
        ("plain", b"data: 1\n\ndata: 2\n\n", [b"1", b"2"]),
        ("carriage returns", b"data: 1\r\n\r\ndata: 2\r\n\r\n", [b"1", b"2"]),
        ("no space after the colon", b"data:1\n\n", [b"1"]),
        ("comments and other fields", b": hello\nid: 7\nretry: 1\nevent: x\ndata: 1\n\n:\n\n", [b"1"]),
        ("data over several lines", b'data: {"a":\ndata: 1}\n\n', [b'{"a":\n1}']),
        ("no blank line at the end", b"data: 1\n\ndata: [DONE]", [b"1", b"[DONE]"]),
        ("one event a line", b'data: {"a":1}\ndata: {"b":2}\n\n', [b'{"a":1}', b'{"b":2}']),
        ("line separators inside JSON are no line ends", 'data: "\u2028\u0085"\n\n'.encode(), ['"\u2028\u0085"'.encode()]),
        ("an error event with bare words", b"event: error\ndata: it broke\n\n", [b'{"error":{"message":"it broke"}}']),
        ("an error event with an error object", b'event: error\ndata: {"error":{"message":"x"}}\n\n', [b'{"error":{"message":"x"}}']),
        ("nothing", b"", []),
    ]

    def test_frames_are_read_as_leniently_as_providers_write_them(self):
        for name, raw, expected in self.ROWS:
            with self.subTest(name):
                self.assertEqual(list(ccr.decode_sse([raw])), expected)

    def test_any_cutting_gives_the_same_frames(self):
        for name, raw, expected in self.ROWS:
            with self.subTest(name):
                for at in range(len(raw) + 1):
                    self.assertEqual(list(ccr.decode_sse([raw[:at], raw[at:]])), expected)
                self.assertEqual(list(ccr.decode_sse([raw[i:i + 1] for i in range(len(raw))])), expected)

    def test_an_endless_event_is_an_error_and_a_long_stream_is_not(self):
        with mock.patch.object(ccr, "MAX_EVENT_BYTES", 1000):
            self.assertEqual(len(list(ccr.decode_sse([b"data: 12345678\n\n"] * 1000))), 1000)
            with self.assertRaises(ccr.ApiError) as caught:
                list(ccr.decode_sse([b"data: "] + [b"x" * 100] * 11))
            self.assertEqual(caught.exception.status, 502)

    def test_json_is_sent_as_ascii_and_never_as_nan(self):
        self.assertEqual(ccr.encode_event({"type": "ping", "t": "é\ud800\n"}), b'event: ping\ndata: {"type":"ping","t":"\\u00e9\\ud800\\n"}\n\n')
        with self.assertRaises(ValueError):
            ccr.dump_json(float("nan"))


class TestShortcut(unittest.TestCase):
    """The short cut and the general way give the same events, for whatever frames and cuttings."""
    TEXTS = [" the value", 'say \\"so\\"', "caf\u00e9", "\\u00e9\\n", "\\ud83d\\ude00", "\\ud800", "\U0001f600", "", "\\\\", "</think>", "a\\/b", "\\u0001probe",
             "content", "x" * 300]
    SHAPES = [
        '{"id":"c1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":null}]}',
        '{"id":"c1","choices":[{"index":0,"delta":{"role":"assistant","content":"%s"},"logprobs":null,"finish_reason":null}],"usage":null}',
        '{"id":"c1","choices":[{"index":0,"delta":{"reasoning_content":"%s"},"finish_reason":null}]}',
        '{"id":"c1","choices":[{"index":0,"delta":{"content":"","reasoning":"%s"},"finish_reason":null}]}',
        '{"id":"c1","choices":[{"index":0,"delta":{"content":"%s","reasoning_content":null},"finish_reason":null}]}',
        '{"id":"c1","choices":[{"index":0,"delta":{"tool_calls":[{"index":%%d,"function":{"arguments":"%s"}}]}}]}',
        '{"choices":[{"index":0,"delta":{"content":"%s"}}],"usage":{"prompt_tokens":3,"completion_tokens":1}}',
    ]
    ODD = ['{"choices":[]}', '{"id":"c1","choices":[{"index":0,"delta":{"content":null}}]}', '{"choices":[{"delta":null}]}',
           '{"id":"c1","choices":[{"index":0,"delta":{"content":"\\ud83d"},"finish_reason":null}]}']

    def random_stream(self, rng):
        frames, calls = [], 0
        for _ in range(rng.randrange(2, 9)):
            shape = rng.choice(self.SHAPES)
            if "tool_calls" in shape:
                frames.append('{"id":"c1","choices":[{"index":0,"delta":{"tool_calls":[{"index":%d,"id":"t%d","function":{"name":"f","arguments":""}}]}}]}' % (calls, calls))
                texts = ['{\\"a\\":\\"', *(rng.choice(["b", "c d", "\\\\n", "é"]) for _ in range(rng.randrange(1, 30))), '\\"}']
                frames += [(shape % text) % calls for text in texts]
                calls += 1
            else:
                frames += [shape % rng.choice(self.TEXTS) for _ in range(rng.randrange(1, 40))]
            if rng.random() < 0.3:
                frames.append(rng.choice(self.ODD))
        frames += ['{"id":"c1","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}', "[DONE]"]
        end = rng.choice(["\n\n", "\r\n\r\n"])
        head = rng.choice(["data: ", "data:", ": c\ndata: "])
        return "".join(head + frame + end for frame in frames).encode("utf-8")

    def events_of(self, chunks, shortcut):
        """(the events that a client reads, how many deltas went the short way); an ApiError is given as its message."""
        out, hits = [], 0
        frames = ccr.decode_sse(chunks, shortcut)
        try:
            for event in ccr.OPENAI.parse_stream(frames, ccr.BlockWriter("msg_1", "m")):
                if type(event) is ccr.Spliced:
                    spliced = [json.loads(data) for data in ccr.decode_sse([event.data])]
                    hits += len(spliced)
                    out += spliced
                else:
                    if shortcut is not None:
                        shortcut.saw(event)
                    out.append(json.loads(ccr.dump_json(event)))
        except ccr.ApiError as e:
            out.append(e.message)
        return out, hits

    def cut(self, rng, raw):
        size = rng.choice([7, 100, 1000, 1 << 20])
        chunks, at = [], 0
        while at < len(raw):
            step = rng.randrange(1, size + 1)
            chunks.append(raw[at:at + step])
            at += step
        return chunks

    def test_both_ways_give_the_same_events(self):
        hits, runs = 0, 250
        for n in range(runs):
            rng = seeded("shortcut %d" % n)
            raw = self.random_stream(rng)
            if rng.random() < 0.2:    # damaged somewhere
                at = rng.randrange(len(raw))
                raw = raw[:at] + rng.choice([b"\xff", b"\x00", b'"', b"\\", b"}", b""]) + raw[at + 1:]
            general, _ = self.events_of([raw], None)
            short, found = self.events_of(self.cut(rng, raw), ccr.Shortcut(ccr.OPENAI.plain_delta))
            hits += found
            self.assertEqual(short, general, "seed %d/shortcut %d: %r" % (SEED, n, raw))
        self.assertGreater(hits, 3000, "the short cut was hardly used")

    def test_it_is_used_for_text_thinking_and_arguments(self):
        for shape in self.SHAPES[:3]:
            raw = b"".join(b"data: %s\n\n" % (shape % ("word%d" % i)).encode() for i in range(50))
            _, hits = self.events_of([raw + b"data: [DONE]\n\n"], ccr.Shortcut(ccr.OPENAI.plain_delta))
            self.assertGreater(hits, 40, shape)
        start = b'data: {"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"t","function":{"name":"f","arguments":""}}]}}]}\n\n'
        raw = b"".join(b"data: %s\n\n" % ((self.SHAPES[5] % ("%d," % i)) % 0).encode() for i in range(50))
        _, hits = self.events_of([start + raw], ccr.Shortcut(ccr.OPENAI.plain_delta))
        self.assertGreater(hits, 40)

    def test_frames_that_differ_beyond_their_text_are_not_learned_for_ever(self):
        shortcut = ccr.Shortcut(ccr.OPENAI.plain_delta)
        raw = b"".join(b'data: {"id":"c%d","choices":[{"index":0,"delta":{"content":"x"}}]}\n\n' % i for i in range(100))
        with mock.patch.object(shortcut, "_learn", wraps=shortcut._learn):
            self.events_of([raw], shortcut)
        self.assertEqual(shortcut.tries, 0)


# --- 5. Formats: what all formats share, and Anthropic Messages

def check_events(case, events):
    """The events are one whole, well-formed stream."""
    case.assertEqual(stream_faults([event for event in events]), [])


def cut_anywhere(data, rng):
    """The bytes in random pieces, now and then of one byte."""
    pieces, at = [], 0
    while at < len(data):
        size = rng.choice((1, 2, 3, 7, 40, 400))
        pieces.append(data[at:at + size])
        at += size
    return pieces


def parsed_stream(format, data, writer=None):
    """The events that a format's parser makes of the bytes (or pieces) of a stream."""
    chunks = [data] if isinstance(data, bytes) else data
    return list(format.parse_stream(ccr.decode_sse(iter(chunks)), writer or ccr.BlockWriter("msg_1", "m1")))


def without_ids(message):
    """Message or request without ids that a format makes anew, and without its usage of other formats' members."""
    return {**message, "id": "msg_x"}


RANDOM_WORDS = ["alpha", "b", "\u00e9t\u00e9", "\u4e2d\u6587", "\U0001f600", "\"quoted\"", "a\\b", "line\nbreak", "tab\t", "\u2028", "{", "}", "[DONE]", "data: x", "</think>",
                "null", "<b>", "  spaced  ", "\u0000", "'"]


def random_text(rng, least=1):
    return "w" + " ".join(rng.choice(RANDOM_WORDS) for _ in range(rng.randint(least, 6)))


def random_value(rng, depth=2):
    kind = rng.randint(0, 7 if depth else 5)
    if kind == 6:
        return [random_value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    if kind == 7:
        return random_input(rng, depth - 1)
    return [None, True, rng.randint(-9, 10 ** 12), rng.choice([0.5, -2.25, 1e30]), random_text(rng), ""][kind]


def random_input(rng, depth=2):
    return {rng.choice("abcdefgh") + random_text(rng, 0)[:3]: random_value(rng, depth) for _ in range(rng.randint(0, 3))}


def random_image(rng):
    if rng.random() < 0.3:
        return {"type": "image", "source": {"type": "url", "url": "https://example.test/%d.png" % rng.randint(0, 99)}}
    return {"type": "image", "source": {"type": "base64", "media_type": rng.choice(["image/png", "image/jpeg"]),
                                        "data": base64.b64encode(bytes(rng.randrange(256) for _ in range(rng.randint(1, 30)))).decode()}}


def random_answer(rng, names, signed=False, numbers=itertools.count(1)):
    """The content of an assistant message as lists of blocks: thinking, text, calls, in this order, at least one of them."""
    blocks = []
    if rng.random() < 0.4:
        blocks.append({"type": "thinking", "thinking": random_text(rng), "signature": "c2ln%d" % rng.randint(0, 99) if signed else ""})
    if rng.random() < 0.7 or not names:
        blocks.append({"type": "text", "text": random_text(rng)})
    if names and (rng.random() < 0.6 or not any(block["type"] == "text" for block in blocks)):
        blocks += [{"type": "tool_use", "id": "call_%d" % next(numbers), "name": rng.choice(names), "input": random_input(rng)} for _ in range(rng.choice((1, 1, 2, 3)))]
    return blocks


def plain_content(blocks):
    """Content as a string where it is one text: the way in which each format's parser writes it."""
    return blocks[0]["text"] if len(blocks) == 1 and blocks[0]["type"] == "text" and set(blocks[0]) == {"type", "text"} else blocks


def random_conversation(rng, signed=False, images=True, mid_system=True):
    """A request that every format can carry, in the shape that parsers make (one text as a string, thinking before text before calls).

    signed: thinking has signatures (else "", what formats without signatures give); images: in user messages; mid_system: role:system
    messages between turns. No consecutive messages of one role, every call answered.
    """
    tools = [{"name": "tool_%s" % letter, "description": random_text(rng), "input_schema": {
        "type": "object", "properties": {"a": {"type": "string", "description": random_text(rng)}, "b": {"type": "integer"}}, "required": ["a"]}}
        for letter in "abc"[:rng.randint(0, 3)]]
    names, messages = [tool["name"] for tool in tools], []
    request = {"model": "m%d" % rng.randint(1, 3), "max_tokens": rng.randint(1, 100000), "messages": messages}
    if rng.random() < 0.7:
        request["system"] = random_text(rng)
    calls = []
    for turn in range(rng.randint(1, 5)):
        blocks = [{"type": "tool_result", "tool_use_id": call["id"], "content": rng.choice(["", random_text(rng)]), **({"is_error": True} if rng.random() < 0.3 else {})}
                  for call in rng.sample(calls, len(calls))]
        if not blocks or rng.random() < 0.4:
            blocks += [random_image(rng) if images and rng.random() < 0.3 else {"type": "text", "text": random_text(rng)} for _ in range(rng.choice((1, 1, 2, 3)))]
        messages.append({"role": "user", "content": plain_content(blocks)})
        if mid_system and rng.random() < 0.25:
            messages.append({"role": "system", "content": random_text(rng)})
        answer = random_answer(rng, names, signed)
        calls = [block for block in answer if block["type"] == "tool_use"]
        messages.append({"role": "assistant", "content": plain_content(answer)})
    if calls or rng.random() < 0.8:
        messages.pop()
    if tools:
        request["tools"] = tools
        choice = rng.choice([None, {"type": "auto"}, {"type": "any"}, {"type": "none"}, {"type": "tool", "name": names[0]},
                             {"type": "auto", "disable_parallel_tool_use": True}])
        request.update({"tool_choice": choice} if choice else {})
    for key, values in (("temperature", (0, 0.5, 1)), ("top_p", (0.5, 1)), ("stop_sequences", (["END"], ["a", "b"])), ("stream", (True,)),
                        ("output_config", ({"effort": "low"}, {"effort": "medium"}, {"effort": "high"}))):
        if rng.random() < 0.3:
            request[key] = rng.choice(values)
    return request


def random_message(rng, signed=False):
    """A reply that every format can carry."""
    content = random_answer(rng, ["tool_a", "tool_b"] if rng.random() < 0.6 else [], signed)
    stop = "tool_use" if content[-1]["type"] == "tool_use" else rng.choice(("end_turn", "max_tokens"))
    return {"id": "msg_%d" % rng.randint(1, 10 ** 9), "type": "message", "role": "assistant", "model": "m1", "content": content, "stop_reason": stop, "stop_sequence": None,
            "usage": {"input_tokens": rng.randint(0, 999), "cache_creation_input_tokens": 0, "cache_read_input_tokens": rng.choice((0, rng.randint(1, 999))),
                      "output_tokens": rng.randint(0, 999)}}


def from_user(*blocks):
    return {"role": "user", "content": blocks[0] if len(blocks) == 1 and isinstance(blocks[0], str) else list(blocks)}


def from_model(*blocks):
    return {"role": "assistant", "content": blocks[0] if len(blocks) == 1 and isinstance(blocks[0], str) else list(blocks)}


def from_system(text):
    return {"role": "system", "content": text}


def call_block(id, name="f", **input_):
    return {"type": "tool_use", "id": id, "name": name, "input": input_}


def result_block(id, content="ok", **more):
    return dict({"type": "tool_result", "tool_use_id": id, "content": content}, **more)


PIC = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}


class TestProviderErrors(unittest.TestCase):
    def test_the_words_are_found_in_every_shape(self):
        for name, status, raw, want in (
                ("OpenAI's object", 400, {"error": {"message": "bad field", "type": "invalid_request_error", "param": "x", "code": None}}, (400, "bad field")),
                ("a string", 500, {"error": "plain words"}, (500, "plain words")),
                ("a bare message", 401, {"message": "no key", "request_id": "1"}, (401, "no key")),
                ("detail", 422, {"detail": "field required"}, (422, "field required")),
                ("FastAPI's list", 422, {"detail": [{"loc": ["body", "messages", 0], "msg": "field required", "type": "missing"}]}, (422, "body.messages.0: field required")),
                ("Google's list", 400, [{"error": {"code": 400, "message": "from Google", "status": "INVALID_ARGUMENT"}}], (400, "from Google")),
                ("OpenRouter's wrapping", 429, {"error": {"message": "Provider returned error", "code": 429, "metadata": {"raw": '{"error":{"message":"slow down"}}', "provider_name": "X"}}},
                 (429, "Provider returned error: slow down")),
                ("OpenRouter's wrapping of text", 502, {"error": {"message": "Provider returned error", "metadata": {"raw": "upstream sad"}}}, (502, "Provider returned error: upstream sad")),
                ("an object without words", 400, {"foo": 1}, (400, '{"foo": 1}')),
                ("a page", 502, b"<html><head><title>502 Bad\nGateway</title></head><body>x</body></html>", (502, "a web page: 502 Bad Gateway")),
                ("a page without title", 503, b"<!DOCTYPE html><body><h1>No  healthy</h1> upstream</body>", (503, "a web page: No healthy upstream")),
                ("text", 400, b"just text\n", (400, "just text")),
                ("nothing", 500, b"", (500, "no words came with this error (status 500)")),
                ("an empty object", 500, {}, (500, "no words came with this error (status 500)")),
                ("control characters", 400, {"error": "a\x1b[31mb\r\nc"}, (400, "a[31mb\nc")),
                ("a status that is none", 302, {"error": "moved"}, (502, "moved")),
                ("invalid UTF-8", 400, b"\xff\xfe no", (400, "\ufffd\ufffd no"))):
            with self.subTest(name):
                error = ccr.parse_error(status, raw if isinstance(raw, bytes) else json.dumps(raw).encode(), {})
                self.assertEqual((error.status, error.message), want)

    def test_context_overflow_becomes_the_400_on_which_the_client_compacts(self):
        for name, status, words, want in (
                ("OpenAI", 400, "This model's maximum context length is 8192 tokens.", (400, "This model's maximum context length is 8192 tokens.")),
                ("llama.cpp's 500", 500, "the request exceeds the available context size, try increasing it", (400, "the request exceeds the available context size, try increasing it")),
                ("a 413 that means tokens", 413, "Request too large: 9000 tokens, limit 8000", (400, "prompt is too long: Request too large: 9000 tokens, limit 8000")),
                ("a 413 that means bytes", 413, "Payload Too Large", (413, "Payload Too Large")),
                ("a rate limit that speaks of tokens stays one", 429, "please reduce the length of the messages", (429, "please reduce the length of the messages")),
                ("another 400", 400, "unknown model", (400, "unknown model"))):
            with self.subTest(name):
                error = ccr.parse_error(status, json.dumps({"error": {"message": words}}).encode(), {})
                self.assertEqual((error.status, error.message), want)
        error = ccr.parse_error(400, b'{"error": {"message": "Too much.", "code": "context_length_exceeded"}}', {})
        self.assertEqual((error.status, error.message), (400, "prompt is too long: Too much."))

    def test_an_error_in_a_200_says_its_status_itself(self):
        for name, value, want in (
                ("a number", {"error": {"message": "w", "code": 429}}, 429),
                ("a number as text", {"error": {"message": "w", "code": "503"}}, 503),
                ("a type", {"type": "error", "error": {"type": "overloaded_error", "message": "w"}}, 529),
                ("Google's status", {"error": {"message": "w", "status": "RESOURCE_EXHAUSTED"}}, 429),
                ("OpenAI's code", {"error": {"message": "w", "code": "rate_limit_exceeded"}}, 429),
                ("a number of their own", {"error": {"message": "w", "code": 1305}}, 502),
                ("nothing", {"error": "w"}, 502),
                ("damaged", {"error": {"message": ["w"], "code": {}, "type": [], "status": None}}, 502)):
            with self.subTest(name):
                error = ccr.error_in(value)
                self.assertEqual((error.status, error.message), (want, "w"))

    def test_retry_after_is_seconds(self):
        date = {"date": "Wed, 21 Oct 2026 07:28:00 GMT"}
        for name, headers, raw, want in (
                ("seconds", {"retry-after": "7"}, b"", "7"), ("fractions", {"retry-after": "1.5"}, b"", "1.5"),
                ("milliseconds", {"retry-after-ms": "1500"}, b"", "1.5"),
                ("a date", {"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT", **date}, b"", "30"),
                ("a date that is over", {"retry-after": "Wed, 21 Oct 2026 07:00:00 GMT", **date}, b"", "0"),
                ("a date without today's", {"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT"}, b"", None),
                ("nonsense", {"retry-after": "soon\r\n", **date}, b"", None), ("nothing", {}, b"", None),
                ("Google's details", {}, b'{"error":{"message":"w","details":[{"@type":"x.RetryInfo","retryDelay": "36.2s"}]}}', "36")):
            with self.subTest(name):
                self.assertEqual(ccr.parse_error(429, raw, headers).retry_after, want)

    def test_details_of_the_provider_are_kept(self):
        raw = b'{"type":"error","error":{"type":"invalid_request_error","message":"w","details":{"error_code":"thread_not_found"}}}'
        self.assertEqual(ccr.parse_error(400, raw, {}).details, {"error_code": "thread_not_found"})

    def test_damaged_errors_never_raise(self):
        rng = seeded("errors")
        for _ in range(300):
            value = {"error": random_value(rng, 3), "message": random_value(rng), "detail": random_value(rng), "code": random_value(rng)}
            error = ccr.parse_error(rng.choice((400, 500)), json.dumps(rng.choice([value, [value], value["error"]])).encode(), {})
            self.assertTrue(isinstance(error.message, str) and error.message)
        ccr.parse_error(400, b'{"error":' * 900 + b"1" + b"}" * 900, {})


class TestSettled(unittest.TestCase):
    STANDIN = result_block("b", ccr.NO_RESULT)

    def test_results_stand_right_after_their_calls(self):
        text, more = text_block("t"), text_block("u")
        for name, messages, want in (
                ("nothing to do", [from_user("a"), from_model("b"), from_system("c"), from_user("d")], [from_user("a"), from_model("b"), from_system("c"), from_user("d")]),
                ("results first", [from_model(call_block("a")), from_user(text, result_block("a"), more)], [from_model(call_block("a")), from_user(result_block("a"), text, more)]),
                ("a system message between", [from_model(call_block("a")), from_system("s"), from_user(result_block("a"))], [from_model(call_block("a")), from_user(result_block("a")), from_system("s")]),
                ("results in two messages", [from_model(call_block("a"), call_block("b")), from_user(result_block("b")), from_user(result_block("a"), text)],
                 [from_model(call_block("a"), call_block("b")), from_user(result_block("b"), result_block("a"), text)]),
                ("text after a system message stays after it", [from_model(call_block("a")), from_user(result_block("a")), from_system("s"), from_user("x")],
                 [from_model(call_block("a")), from_user(result_block("a")), from_system("s"), from_user("x")]),
                ("one turn in two messages", [from_model(call_block("a")), from_model(call_block("b")), from_user(result_block("a"), result_block("b"))],
                 [from_model(call_block("a"), call_block("b")), from_user(result_block("a"), result_block("b"))]),
                ("a missing result", [from_model(call_block("a"), call_block("b")), from_user(result_block("a")), from_model("x")], [from_model(call_block("a"), call_block("b")), from_user(result_block("a"), self.STANDIN), from_model("x")]),
                ("no result at all", [from_model(call_block("b")), from_user("go on")], [from_model(call_block("b")), from_user(self.STANDIN, text_block("go on"))]),
                ("a call at the end", [from_model(call_block("b"))], [from_model(call_block("b")), from_user(self.STANDIN)]),
                ("an orphan", [from_user(result_block("z", "lost"), text)], [from_user(text_block("[result of a call that is not in this conversation]\nlost"), text)]),
                ("an orphan with an image", [from_user(result_block("z", [PIC]))], [from_user(text_block("[result of a call that is not in this conversation]\n(the image follows)"), PIC)]),
                ("a second result of one call", [from_model(call_block("a")), from_user(result_block("a", "1"), result_block("a", "2"))],
                 [from_model(call_block("a")), from_user(result_block("a", "1"), text_block("[result of a call that is not in this conversation]\n2"))]),
                ("a result that comes a turn too late", [from_model(call_block("b")), from_user("x"), from_model("y"), from_user(result_block("b", "late"))],
                 [from_model(call_block("b")), from_user(self.STANDIN, text_block("x")), from_model("y"), from_user(text_block("[result of a call that is not in this conversation]\nlate"))]),
                ("ids that come again in a later turn", [from_model(call_block("a")), from_user(result_block("a", "1")), from_model(call_block("a")), from_user(result_block("a", "2"))],
                 [from_model(call_block("a")), from_user(result_block("a", "1")), from_model(call_block("a")), from_user(result_block("a", "2"))])):
            with self.subTest(name):
                self.assertEqual(ccr.settled(messages), want)

    def test_what_is_settled_does_not_depend_on_what_follows(self):
        rng = seeded("settled")
        for _ in range(100):
            messages = random_conversation(rng)["messages"]
            whole = ccr.settled(messages)
            for n in range(len(messages)):
                if messages[n]["role"] == "user" and messages[n + 1:n + 2] and messages[n + 1]["role"] == "assistant":
                    self.assertEqual(ccr.settled(messages[:n + 1]) + ccr.settled(messages[n + 1:]), whole)

    def test_for_strict_templates_system_messages_become_the_users(self):
        note = "<system-reminder>\ns\n</system-reminder>"
        for name, messages, want in (
                ("beside the user's", [from_user("a"), from_system("s"), from_model("b")], [from_user(text_block("a"), text_block(note)), from_model("b")]),
                ("alone", [from_model("b"), from_system("s"), from_model("c")], [from_model("b"), from_user(note), from_model("c")]),
                ("between two of the user's", [from_user("a"), from_system("s"), from_user("b")], [from_user(text_block("a"), text_block(note), text_block("b"))])):
            with self.subTest(name):
                self.assertEqual(ccr.without_system_roles(messages), want)
        for words in ("System message must be at the beginning.", "Conversation roles must alternate user/assistant/user/assistant/..."):
            self.assertTrue(ccr.STRICT_TEMPLATE.search(words), words)


class TestWordsForBlocks(unittest.TestCase):
    def test_every_block_says_something(self):
        for name, block, want in (
                ("text", text_block("t"), "t"),
                ("a text document", {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "body"}}, "T\nbody"),
                ("a document of blocks", {"type": "document", "source": {"type": "content", "content": [text_block("a"), text_block("b")]}}, "a\nb"),
                ("a PDF", {"type": "document", "title": "T", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBE"}},
                 '[document "T" (application/pdf): this model cannot be shown it]'),
                ("a document elsewhere", {"type": "document", "source": {"type": "url", "url": "https://x.test/a.pdf"}}, "[document (https://x.test/a.pdf): this model cannot be shown it]"),
                ("a search result", {"type": "search_result", "title": "T", "source": "https://x.test", "content": [text_block("c")]}, "T\nhttps://x.test\nc"),
                ("a tool reference", {"type": "tool_reference", "tool_name": "WebSearch"}, "Loaded tool: WebSearch"),
                ("a server's call", {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}}, '[web_search: {"query": "q"}]'),
                ("its links", {"type": "web_search_tool_result", "tool_use_id": "s", "content": [{"type": "web_search_result", "url": "https://x.test", "title": "T", "encrypted_content": "zzz"}]},
                 "[web search results]\n- T: https://x.test"),
                ("its failure", {"type": "web_search_tool_result", "tool_use_id": "s", "content": {"type": "web_search_tool_result_error", "error_code": "max_uses_exceeded"}},
                 "[web search failed: max_uses_exceeded]"),
                ("an unknown block", {"type": "hologram", "x": 1, "cache_control": {}}, '[hologram: {"x": 1}]'),
                ("an unknown block with text", {"type": "hologram", "text": "seen"}, "seen"),
                ("a long unknown block is cut", {"type": "hologram", "x": "y" * 5000}, '[hologram: {"x": "' + "y" * 993 + "]"),
                ("thinking of another model", {"type": "thinking", "thinking": "t"}, "")):
            with self.subTest(name):
                self.assertEqual(ccr.block_text(block), want)

    def test_a_result_is_text_and_images(self):
        for name, block, want in (
                ("a string", result_block("a", "t"), ("t", [])), ("nothing", {"type": "tool_result", "tool_use_id": "a"}, ("", [])), ("an empty list", result_block("a", []), ("", [])),
                ("blocks", result_block("a", [text_block("x"), {"type": "tool_reference", "tool_name": "T"}]), ("x\nLoaded tool: T", [])),
                ("an image", result_block("a", [PIC]), ("(the image follows)", [PIC])), ("text and image", result_block("a", [text_block("x"), PIC]), ("x", [PIC])),
                ("two images", result_block("a", [PIC, PIC]), ("(the images follow)", [PIC, PIC])), ("an error", result_block("a", "no", is_error=True), ("[tool error] no", [])),
                ("no error", result_block("a", "yes", is_error=False), ("yes", []))):
            with self.subTest(name):
                self.assertEqual(ccr.result_parts(block), want)

    def test_the_billing_header_is_no_part_of_the_system(self):
        header = "x-anthropic-billing-header: cc_version=2.1.330; cc_entrypoint=cli;"
        for name, system_, want in (
                ("a block", [text_block(header), text_block("one"), text_block("two")], "one\n\ntwo"), ("above other text", header + "\nrest", "rest"),
                ("a string", "all", "all"), ("nothing", None, ""), ("an empty list", [], ""), ("an unknown block", [{"type": "note", "text": "n"}], "n")):
            with self.subTest(name):
                self.assertEqual(ccr.system_text(system_), want)

    def test_the_effort_in_force(self):
        for name, request, want in (
                ("said", {"output_config": {"effort": "xhigh"}}, "xhigh"), ("adaptive without one", {"thinking": {"type": "adaptive"}}, None),
                ("off wins", {"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, None),
                ("a small budget", {"thinking": {"type": "enabled", "budget_tokens": 1024}}, "low"), ("a middle one", {"thinking": {"type": "enabled", "budget_tokens": 8192}}, "medium"),
                ("a large one", {"thinking": {"type": "enabled", "budget_tokens": 31999}}, "high"), ("none told", {"thinking": {"type": "enabled"}}, "high"),
                ("the word before the budget", {"thinking": {"type": "enabled", "budget_tokens": 31999}, "output_config": {"effort": "low"}}, "low"),
                ("changed on the way", {"output_config": {"effort": "low"}, "messages": [dict(from_system("a"), output_config={"effort": "max"}), from_user("b")]}, "max"),
                ("nothing", {}, None)):
            with self.subTest(name):
                self.assertEqual(ccr.effort_of({"messages": [], **request}), want)

    def test_functions_are_the_tools_that_have_a_schema(self):
        plain = {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {}}, "defer_loading": True}
        request = {"tools": [plain, {"name": "DeferredToolPlaceholder", "input_schema": {"type": "object", "properties": {}}}, {"type": "custom", "name": "g"},
                             {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}, {"type": "code_execution_20250825", "name": "code_execution"},
                             {"type": "computer_use_preview"}, {"type": "bash_20250124", "name": "bash"}]}
        self.assertEqual([tool["name"] for tool in ccr.functions_of(request)], ["f", "g", "bash"])
        self.assertEqual([tool["input_schema"]["type"] for tool in ccr.functions_of(request)], ["object"] * 3)
        self.assertEqual(ccr.unavailable_tools(request), ["code_execution", "computer_use_preview"])


class TestAnthropicRequests(unittest.TestCase):
    def test_wrong_types_are_named(self):
        def of(**more):
            return {"model": "m", "messages": [from_user("a")], **more}
        for name, body, words in (
                ("no object", [], "the body: expected an object, got a list"), ("no messages", {"model": "m"}, "messages: expected a list, got nothing"),
                ("empty messages", of(messages=[]), "messages: at least one message is required"), ("messages as text", of(messages="x"), "messages: expected a list, got a string"),
                ("a number as message", of(messages=[3]), "messages.0: expected an object, got an integer"),
                ("a strange role", of(messages=[from_user("a"), {"role": "tool", "content": "x"}]), 'messages.1.role: expected "user", "assistant" or "system", got "tool"'),
                ("a role of no kind", of(messages=[{"role": ["user"], "content": "x"}]), 'messages.0.role: expected "user", "assistant" or "system", got ["user"]'),
                ("no content", of(messages=[{"role": "user"}]), "messages.0.content: expected a list, got nothing"),
                ("a block without type", of(messages=[from_user({"text": "x"})]), "messages.0.content.0.type: expected a string, got nothing"),
                ("text that is none", of(messages=[from_user({"type": "text", "text": 1})]), "messages.0.content.0.text: expected a string, got an integer"),
                ("a call without id", of(messages=[from_model({"type": "tool_use", "name": "f", "input": {}})]), "messages.0.content.0.id: expected a string, got nothing"),
                ("input that is none", of(messages=[from_model(dict(call_block("a"), input=[]))]), "messages.0.content.0.input: expected an object, got a list"),
                ("a result in a result", of(messages=[from_user(result_block("a", [{"type": "text"}]))]), "messages.0.content.0.content.0.text: expected a string, got nothing"),
                ("a model that is none", of(model=5), "model: expected a string, got an integer"), ("max_tokens as text", of(max_tokens="9"), "max_tokens: expected an integer, got a string"),
                ("max_tokens true", of(max_tokens=True), "max_tokens: expected an integer, got true or false"), ("max_tokens 0.5", of(max_tokens=0.5), "max_tokens: expected an integer, got a number"),
                ("max_tokens -1", of(max_tokens=-1), "max_tokens: must be at least 1"), ("stream as text", of(stream="yes"), "stream: expected true or false, got a string"),
                ("system of numbers", of(system=[1]), "system.0: expected an object, got an integer"), ("tools as object", of(tools={}), "tools: expected a list, got an object"),
                ("a tool without a name", of(tools=[{"input_schema": {}}]), "tools.0.name: expected a string, got nothing"),
                ("a schema that is none", of(tools=[{"name": "f", "input_schema": "x"}]), "tools.0.input_schema: expected an object, got a string"),
                ("a stop that is none", of(stop_sequences=[1]), "stop_sequences.0: expected a string, got an integer")):
            with self.subTest(name), self.assertRaises(ccr.ApiError) as caught:
                ccr.ANTHROPIC.parse_request(body)
            self.assertEqual((caught.exception.status, caught.exception.type, caught.exception.message), (400, "invalid_request_error", words))

    def test_a_thread_is_refused_so_that_the_whole_history_comes(self):
        with self.assertRaises(ccr.ApiError) as caught:
            ccr.ANTHROPIC.parse_request({"thread": {"type": "continue"}, "messages": []})
        self.assertEqual((caught.exception.status, caught.exception.details), (400, {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}))

    def test_a_request_passes_as_the_same_object(self):
        for request in (claude_code_request(messages=[from_user("hi"), from_system("s"), {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "c2ln"}, call_block("toolu_1")]},
                                                      from_user(result_block("toolu_1"))]), random_conversation(seeded("same"), signed=True)):
            self.assertIs(ccr.ANTHROPIC.render_request(ccr.ANTHROPIC.parse_request(request)), request)

    def test_what_other_models_and_clients_left_is_made_acceptable(self):
        base = {"model": "m", "max_tokens": 5}
        for name, request, want in (
                ("thinking without a signature", {**base, "messages": [from_model({"type": "thinking", "thinking": "t", "signature": ""}, text_block("x"))]},
                 {**base, "messages": [from_model(text_block("x"))]}),
                ("a message of nothing else", {**base, "messages": [from_user("a"), from_model({"type": "thinking", "thinking": "t"}), from_user("b")]}, {**base, "messages": [from_user("a"), from_user("b")]}),
                ("ids with other letters", {**base, "messages": [from_model(call_block("functions.f:0")), from_user(result_block("functions.f:0"))]},
                 {**base, "messages": [from_model(call_block("functions_f_0")), from_user(result_block("functions_f_0"))]}),
                ("no max_tokens", {"model": "m", "messages": [from_user("a")]}, {"model": "m", "messages": [from_user("a")], "max_tokens": ccr.DEFAULT_MAX_TOKENS}),
                ("members of ccr's own", {**base, "messages": [{**from_user({**PIC, "x-openai": {"type": "image_url"}}), "x-openai": {"name": "bob"}}], "x-cache": True,
                                          "system": [{**text_block("s"), "x-openai": {"role": "developer"}}], "tools": [{"type": "x-openai", "name": "n", "x-openai": {}}]},
                 {**base, "messages": [from_user(PIC)], "system": [text_block("s")], "tools": []}),
                ("system messages of OpenAI clients", {**base, "messages": [from_user("a"), from_system("s")], "x-openai": {"seed": 1}},
                 {**base, "messages": [from_user(text_block("a"), text_block("<system-reminder>\ns\n</system-reminder>"))]})):
            with self.subTest(name):
                self.assertEqual(ccr.ANTHROPIC.render_request(request), want)

    def test_no_client_can_set_marks_of_ccr(self):
        self.assertEqual(ccr.ANTHROPIC.parse_request({"messages": [from_user("a")], "x-openai": {"model": "other"}}), {"messages": [from_user("a")]})

    def test_endpoint_and_key(self):
        for url, want in (("https://api.anthropic.com", "https://api.anthropic.com/v1/messages"), ("https://api.anthropic.com/", "https://api.anthropic.com/v1/messages"),
                          ("https://api.anthropic.com/v1", "https://api.anthropic.com/v1/messages"), ("https://api.anthropic.com/v1/messages/", "https://api.anthropic.com/v1/messages"),
                          ("https://api.deepseek.com/anthropic", "https://api.deepseek.com/anthropic/v1/messages"), ("https://x.test/v1/?a=b", "https://x.test/v1/messages?a=b"),
                          ("https://x.test/v1/messages?beta=true", "https://x.test/v1/messages?beta=true")):
            with self.subTest(url):
                self.assertEqual(ccr.ANTHROPIC.endpoint(url, "m", True), want)
        self.assertEqual([ccr.ANTHROPIC.auth(key) for key in (None, "k", "Bearer t")], [{}, {"x-api-key": "k"}, {"Authorization": "Bearer t"}])


class TestAnthropicReplies(unittest.TestCase):
    def events(self, *events):
        return parsed_stream(ccr.ANTHROPIC, b"".join(sse_frame(event) for event in events))

    START = {"type": "message_start", "message": {"id": "msg_9", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None, "stop_sequence": None,
                                                  "usage": {"input_tokens": 5, "cache_read_input_tokens": 2, "output_tokens": 1}}}
    END = [{"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": {"output_tokens": 7}}, {"type": "message_stop"}]

    def block(self, index, kind="text"):
        return {"type": "content_block_start", "index": index, "content_block": {"type": kind, kind: ""}}

    def delta(self, index, text):
        return {"type": "content_block_delta", "index": index, "delta": {"type": "text_delta", "text": text}}

    def stop(self, index):
        return {"type": "content_block_stop", "index": index}

    def test_messages_come_through_unchanged_however_they_are_cut(self):
        rng = seeded("anthropic replies")
        for _ in range(60):
            message = random_message(rng, signed=True)
            self.assertEqual(ccr.ANTHROPIC.parse_message(ccr.ANTHROPIC.render_message(message, {})), message)
            data = b"".join(ccr.ANTHROPIC.render_stream(ccr.unfold(message), {}))
            events = parsed_stream(ccr.ANTHROPIC, cut_anywhere(data, rng))
            self.assertEqual(events, parsed_stream(ccr.ANTHROPIC, data))
            check_events(self, events)
            self.assertEqual(ccr.fold(events), message)

    def test_the_final_usage_has_all_four_counts(self):
        events = self.events(self.START, self.block(0), self.delta(0, "x"), self.stop(0), *self.END)
        self.assertEqual(events[-2]["usage"], {"input_tokens": 5, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 2, "output_tokens": 7})
        check_events(self, events)

    def test_unknown_events_and_deltas_pass(self):
        odd = {"type": "content_block_delta", "index": 0, "delta": {"type": "citations_delta", "citation": {"url": "u"}}}
        events = self.events(self.START, {"type": "ping"}, {"type": "news", "x": 1}, self.block(0), odd, self.delta(0, "x"), self.stop(0), *self.END)
        self.assertIn(odd, events)
        self.assertIn({"type": "news", "x": 1}, events)

    def test_small_disorder_is_mended(self):
        want = [text_block("a"), text_block("b")]
        for name, events in (
                ("a block without its end", [self.START, self.block(0), self.delta(0, "a"), self.block(1), self.delta(1, "b"), *self.END]),
                ("numbers that begin elsewhere", [self.START, self.block(3), self.delta(3, "a"), self.stop(3), self.block(7), self.delta(7, "b"), self.stop(7), *self.END]),
                ("an end that comes twice", [self.START, self.block(0), self.delta(0, "a"), self.stop(0), self.stop(0), self.block(1), self.delta(1, "b"), self.stop(1), *self.END]),
                ("no message_start", [self.block(0), self.delta(0, "a"), self.stop(0), self.block(1), self.delta(1, "b"), self.stop(1), *self.END]),
                ("a ping before it", [{"type": "ping"}, self.START, self.block(0), self.delta(0, "a"), self.stop(0), self.block(1), self.delta(1, "b"), self.stop(1), *self.END]),
                ("text in the start of its block", [self.START, {"type": "content_block_start", "index": 0, "content_block": text_block("a")}, self.stop(0),
                                                    self.block(1), self.delta(1, "b"), self.stop(1), *self.END]),
                ("an empty message_start", [{"type": "message_start", "message": {}}, self.block(0), self.delta(0, "a"), self.stop(0), self.block(1), self.delta(1, "b"), self.stop(1), *self.END])):
            with self.subTest(name):
                told = self.events(*events)
                check_events(self, told)
                self.assertEqual(ccr.fold(told)["content"], want)

    def test_failures_are_errors(self):
        for name, events, status, words in (
                ("an error event", [self.START, {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}], 529, "busy"),
                ("no end", [self.START, self.block(0), self.delta(0, "x"), self.stop(0)], 502, "the provider's stream ended too early: no message_stop came"),
                ("nothing", [], 502, "the provider's stream ended too early: no message_stop came"),
                ("a delta for nobody", [self.START, self.delta(4, "x")], 502, "the provider sent a delta for block 4, which is not open"),
                ("a delta without its text", [self.START, self.block(0), {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta"}}], 502,
                 "the provider sent a text_delta without its text")):
            with self.subTest(name), self.assertRaises(ccr.ApiError) as caught:
                self.events(*events)
            self.assertEqual((caught.exception.status, caught.exception.message), (status, words))

    def test_a_reply_that_is_none_is_an_error(self):
        for name, body, status, words in (
                ("an error", {"type": "error", "error": {"type": "rate_limit_error", "message": "slow"}}, 429, "slow"),
                ("something else", {"hello": 1}, 502, "the provider's reply holds no message: {\"hello\": 1}"), ("a list", [], 502, "the provider's reply holds no message: []")):
            with self.subTest(name), self.assertRaises(ccr.ApiError) as caught:
                ccr.ANTHROPIC.parse_message(body)
            self.assertEqual((caught.exception.status, caught.exception.message), (status, words))

    def test_damaged_streams_end_in_events_or_an_error_in_words(self):
        rng = seeded("damaged anthropic")
        for n in range(400):
            events = list(ccr.unfold(random_message(rng, signed=True)))
            for _ in range(rng.randint(1, 3)):
                event = json.loads(json.dumps(rng.choice(events)))
                place = rng.choice([event, *[value for value in event.values() if isinstance(value, dict)]])
                place[rng.choice(list(place) or ["x"])] = random_value(rng)
                events[rng.randrange(len(events))] = event
            with self.subTest(n=n):
                try:
                    for event in self.events(*events):
                        self.assertIsInstance(event["type"], str)
                except ccr.ApiError:
                    pass


# --- Tokens

TOKEN_TEXTS = {    # short texts of five kinds; what they cost in two real tokenizers stands in TOKEN_COUNTS
    "prose": [
        """The harbour had been quiet for most of the winter. Ships that used to call twice a week now came once a month, if they
came at all, and the men who had unloaded them sat in the cafe behind the customs house and talked about the years when there
was more work than daylight. Nobody blamed anyone in particular. The railway had been extended, the new port down the coast had
deeper water and taller cranes, and a town does not vote on where the world sends its goods. When Marta inherited her uncle's
chandlery she was told, kindly and by several people, to sell the building while somebody still wanted it.""",
        """Most of what we call memory is reconstruction. When you remember your tenth birthday you do not replay a recording; you
assemble a plausible scene from fragments, from photographs you saw later, from stories other people told about the day, and from
your general idea of what birthdays are like. This is why two honest witnesses can disagree, and why confidence tells us so little
about accuracy. The practical lesson is not that memory is useless, but that it should be treated like any other source: compared
with independent evidence, and written down early, before the story has been improved by telling.""",
        """If the build fails, read the first error and ignore the rest until it is fixed; the others are usually its children.
Run the tests that touch the module you changed before you run everything, because a slow answer is an answer you will be
tempted not to wait for. Keep commits small enough that you could explain each one in a sentence. And when you find yourself
adding a flag to a function so that one caller can skip half of it, stop, and ask whether there are two functions here that
happen to share a beginning. Most of the time there are, and both of them turn out to be easier to name.""",
    ],
    "code": [
        '''class LeaseTable:
    """Leases by key, each good until its deadline; expired ones are dropped when somebody looks."""

    def __init__(self, clock=time.monotonic, limit=1024):
        self.clock = clock
        self.limit = limit
        self._leases = collections.OrderedDict()

    def acquire(self, key, owner, seconds=30.0):
        now = self.clock()
        lease = self._leases.get(key)
        if lease is not None and lease.deadline > now and lease.owner != owner:
            raise LeaseTaken("%r is held by %s for another %.1f s" % (key, lease.owner, lease.deadline - now))
        self._leases[key] = Lease(owner, now + seconds)
        self._leases.move_to_end(key)
        while len(self._leases) > self.limit:
            self._leases.popitem(last=False)
        return self._leases[key]

    def release(self, key, owner):
        if key in self._leases and self._leases[key].owner == owner:
            del self._leases[key]
''',
        '''export async function* readLines(stream: ReadableStream<Uint8Array>, signal?: AbortSignal): AsyncGenerator<string> {
  const reader = stream.getReader();
  const decoder = new TextDecoder("utf-8");
  let buffer = "";
  try {
    while (!signal?.aborted) {
      const { done, value } = await reader.read();
      if (done) break;
      buffer += decoder.decode(value, { stream: true });
      let newline: number;
      while ((newline = buffer.indexOf("\\n")) >= 0) {
        yield buffer.slice(0, newline).replace(/\\r$/, "");
        buffer = buffer.slice(newline + 1);
      }
    }
    if (buffer.length > 0) yield buffer;
  } finally {
    await reader.cancel().catch(() => undefined);
    reader.releaseLock();
  }
}
''',
        '''static int ring_push(struct ring *r, const void *data, size_t len)
{
    size_t free = r->size - (r->head - r->tail);
    if (len + sizeof(uint32_t) > free)
        return -ENOSPC;

    uint32_t n = htole32((uint32_t)len);
    ring_copy_in(r, r->head, &n, sizeof(n));
    ring_copy_in(r, r->head + sizeof(n), data, len);

    /* publish the record only after its bytes are in place */
    atomic_store_explicit(&r->head, r->head + sizeof(n) + len, memory_order_release);
    if (atomic_exchange(&r->sleeping, 0)) {
        uint64_t one = 1;
        if (write(r->eventfd, &one, sizeof(one)) != sizeof(one))
            return -errno;
    }
    return 0;
}
''',
    ],
    "json": [
        '''{"order":{"id":"ord_58213","status":"shipped","customer":{"name":"Ana Duarte","email":"ana.duarte@example.com","tier":"gold"},
"items":[{"sku":"KB-104-DE","title":"Mechanical keyboard, German layout","quantity":1,"unit_price":89.9,"currency":"EUR"},{"sku":
"CBL-USB-C-2M","title":"USB-C cable, 2 m","quantity":3,"unit_price":7.5,"currency":"EUR"}],"shipping":{"carrier":"DHL","tracking":
"JJD0099887766","address":{"street":"Rua do Sol 12","city":"Porto","postal_code":"4000-527","country":"PT"}},"total":112.4,
"paid":true,"notes":null,"created_at":"2025-03-14T09:26:53Z"}}''',
        '''{
  "name": "Grep",
  "description": "Searches file contents with a regular expression and returns matching lines, file names or counts.",
  "input_schema": {
    "type": "object",
    "properties": {
      "pattern": {"type": "string", "description": "The regular expression to search for"},
      "path": {"type": "string", "description": "File or directory to search in; the working directory if left out"},
      "output_mode": {"type": "string", "enum": ["content", "files_with_matches", "count"]},
      "ignore_case": {"type": "boolean", "description": "Case insensitive search"},
      "head_limit": {"type": "integer", "minimum": 1, "description": "Show only the first N results"}
    },
    "required": ["pattern"],
    "additionalProperties": false
  }
}''',
        '''[{"level":"warn","service":"billing","msg":"retrying charge","attempt":2,"customer_id":"cus_9xk2","error":{"code":"card_declined",
"retryable":true}},{"level":"info","service":"mailer","msg":"sent receipt","template":"receipt_v3","duration_ms":184,"recipient":
"ops@example.org"},{"level":"error","service":"search","msg":"index refresh failed","index":"products","shards":{"total":12,
"failed":1},"reason":"node_disconnected","labels":["prod","eu-west"]},{"level":"info","service":"gateway","msg":"request done",
"path":"/v1/checkout","status":201,"duration_ms":57,"user_agent":"curl/8.5.0"}]''',
    ],
    "chinese": [
        """分布式系统里最难的问题往往不是算法，而是如何判断一台机器到底是坏了还是只是慢了。网络没有办法区分这两种情况，
超时时间设得太短会误判，设得太长又会让用户一直等待。因此，大多数成熟的系统都会把超时、重试和幂等放在一起设计：
请求可以安全地重复发送，服务端能够识别重复的请求，而客户端在放弃之前会明确地告诉用户发生了什么事情。
工程上还有一个容易忽略的细节：重试本身会放大故障。当后端已经过载时，每个客户端都多发两次请求，只会让它恢复得更慢。
所以重试的间隔要随机、要逐步加长，并且要有总的上限；超过上限就应该快速失败，把选择权交还给上层。""",
        """这个函数负责读取配置文件并检查其中的每一个字段。如果某个字段缺失或者类型不对，它不会立刻报错退出，而是先把所有问题收集起来，
最后一次性地告诉用户。这样做的好处是，用户不需要反复修改、反复运行才能发现全部错误。请注意，密钥不应该直接写在配置文件里，
建议使用环境变量，例如 OPENAI_API_KEY，程序会在启动时自动替换。修改完成以后不需要重新启动服务。
如果运行 `ccr status` 时看到警告，请先检查 Router.default 的写法是否为 "provider,model"，再确认该模型确实出现在 models 列表中。
日志保存在 logs 目录下，每一行是一条 JSON 记录，包含时间、模型名称、输入和输出的 token 数量以及耗时（毫秒）。""",
        """春天来得比往年都晚。三月底的时候，山上的雪还没有化完，村里的人已经开始准备播种。老李每天早上都会走到河边看一看水位，
然后回家把看到的情况记在一个旧本子上。他说自己并不是为了什么特别的目的，只是习惯了。后来县里修水库，
工程师从他的本子里找到了四十年的记录，比任何档案都要完整。有人劝他把本子捐给博物馆，他摇摇头，说还要接着记。
那年夏天雨水特别多，水位涨到了桥面，老李半夜打着手电筒去量，回来的时候鞋子全湿了。孙女问他怕不怕，他笑着说，
河跟人一样，你天天跟它打招呼，它就不会吓唬你。""",
    ],
}
TOKEN_TEXTS["session"] = [    # what an agent's turn looks like: question, listing, numbered file, test run
    "\n".join([TOKEN_TEXTS["prose"][n][:260], """$ ls -la src
total 48
drwxr-xr-x  4 dev dev  4096 Mar  3 10:12 .
-rw-r--r--  1 dev dev  1893 Mar  2 18:40 __init__.py
-rw-r--r--  1 dev dev 12604 Mar  3 10:11 lease.py
-rw-r--r--  1 dev dev  5120 Mar  1 09:05 wire.py""",
               "\n".join("%6d\t%s" % (i + 1, line) for i, line in enumerate(TOKEN_TEXTS["code"][n].split("\n")[:14])),
               """FAILED tests/test_lease.py::test_release_by_another_owner - AssertionError: assert 1 == 0
E       +  where 1 = len(OrderedDict([('a', Lease(owner='x', deadline=30.0))]))
==================== 1 failed, 17 passed in 0.42s ====================
I'll fix the ownership check in `release` and run the tests again.""", TOKEN_TEXTS["json"][n][:300]]) for n in range(3)]
TOKEN_COUNTS = {    # recorded: gpt-tokenizer (npm, o200k_base); Gemma 3 by llama.cpp's /tokenize (../shared/realmodel)
    "gpt": {"prose": (132, 119, 131), "code": (227, 179, 200), "json": (183, 191, 162), "chinese": (196, 187, 199), "session": (549, 507, 548)},
    "gemma": {"prose": (132, 119, 133), "code": (270, 211, 246), "json": (223, 210, 180), "chinese": (175, 170, 173), "session": (618, 569, 628)},
}


def png_head(width, height):
    return base64.b64encode(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", width, height) + b"\x08\x02" + bytes(200)).decode()


def user(*blocks):
    return {"role": "user", "content": list(blocks)}


def image_of(data, media_type="image/png"):
    return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}


class TestTokens(unittest.TestCase):
    MODELS = {"gpt": "gpt-5", "gemma": "google/gemma-3-27b-it"}

    def sized(self, family, kind, order, copies=12):
        """(request of the texts of this kind, its real tokens): each a message of its own, 4 tokens around it."""
        texts, counts = TOKEN_TEXTS[kind], TOKEN_COUNTS[family][kind]
        return ({"messages": [user({"type": "text", "text": texts[n]}) for n in order] * copies},
                sum(counts[n] + 4 for n in order) * copies)

    def test_an_estimate_is_near_before_any_turn(self):
        for family, model in self.MODELS.items():
            for name, bound in ((model, 0.20), ("somebody/new-model", 0.35)):    # a family nobody knows: worst of tokens.md
                for kind in TOKEN_TEXTS:
                    request, real = self.sized(family, kind, (0, 1, 2))
                    error = ccr.estimate_tokens(request, name) / real - 1
                    with self.subTest("%s counted for %s" % (kind, name), tokenizer=family, error=error):
                        self.assertLessEqual(abs(error), bound)

    def test_after_five_turns_a_session_is_within_10_percent_though_a_third_of_it_is_new(self):
        """Beside it, the stricter figure: a text never seen, counted alone with what two others of its kind taught."""
        for family, model in self.MODELS.items():
            for kind in TOKEN_TEXTS:
                for new in range(3):
                    old = [n for n in range(3) if n != new]
                    calibration = ccr.Calibration()
                    for turn in range(5):
                        request, real = self.sized(family, kind, old + [old[turn % 2]])
                        calibration.learn(model, ccr.estimate_tokens(request, model), real)
                    for what, order, bound in (("a third is new", old + [new], 0.10), ("all is new", [new], 0.15)):
                        request, real = self.sized(family, kind, order)
                        error = ccr.estimate_tokens(request, model) * calibration.factor(model) / real - 1
                        with self.subTest("%s %d counted for %s" % (kind, new, model), what=what, error=error):
                            self.assertLessEqual(abs(error), bound)

    def test_a_session_of_all_kinds_is_within_10_percent_after_five_turns(self):
        for family, model in self.MODELS.items():
            calibration, messages, real = ccr.Calibration(), [], 0
            kinds = ["session", "prose", "code", "session", "json", "chinese"]
            for turn, kind in enumerate(kinds):
                for _ in range(3):
                    messages += [user({"type": "text", "text": text}) for text in TOKEN_TEXTS[kind]]
                    real += sum(n + 4 for n in TOKEN_COUNTS[family][kind])
                raw = ccr.estimate_tokens({"messages": messages}, model)
                error = raw * calibration.factor(model) / real - 1
                with self.subTest("turn %d, after %s came in" % (turn + 1, kind), tokenizer=family, error=error):
                    self.assertLessEqual(abs(error), 0.20 if turn < 5 else 0.10)
                calibration.learn(model, raw, real)

    def test_long_texts_are_sampled_and_cost_what_their_parts_cost(self):
        for kind, texts in TOKEN_TEXTS.items():
            long = "\n\n".join(texts[n % 3] for n in range(60))
            parts = sum(ccr.count_text(texts[n % 3], *ccr.weights_of("gpt-5")) for n in range(60))
            with self.subTest(kind):
                self.assertLess(abs(ccr.count_text(long, *ccr.weights_of("gpt-5")) / parts - 1), 0.08)

    def test_the_name_of_a_model_tells_its_tokenizer(self):
        for model, family in [("gpt-5.1-codex", "gpt"), ("openai/gpt-oss-120b", "gpt"), ("o3-mini", "gpt"), ("proto3-large", "generic"),
                              ("gemini-2.5-pro", "gemma"), ("gemma3:4b", "gemma"), ("qwen3-coder:480b-cloud", "qwen"), ("QwQ-32B", "qwen"),
                              ("deepseek-chat", "deepseek"), ("deepseek-r1-distill-llama-70b", "llama"), ("DeepSeek-R1-Distill-Qwen-7B", "qwen"),
                              ("meta-llama/Llama-3.3-70B", "llama"), ("mistral-large", "mistral"), ("devstral-small", "mistral"),
                              ("codestral", "mistral"), ("kimi-k2.6", "generic"), ("claude-opus-5-5", "generic"), ("", "generic")]:
            with self.subTest(model):
                self.assertEqual(ccr.weights_of(model)[1], family)
        for family, weights in ccr.WEIGHTS.items():
            with self.subTest("weights of " + family):
                self.assertEqual(len(weights), 20)

    def test_every_byte_has_its_class(self):
        shown = "aZ5 \t\r\n_é日".encode().translate(ccr.CHARACTER_CLASSES)
        self.assertEqual(shown, b"aA0  \n\n!L\x80H\x80\x80")
        for text, script in [("я", "C"), ("א", "O"), ("ع", "R"), ("ก", "V"), ("→", "E"), ("あ", "K"), ("中", "H"), ("한", "G"), ("😀", "F"), ("ö", "L")]:
            with self.subTest(text):
                self.assertEqual(text.encode().translate(ccr.CHARACTER_CLASSES)[:1], script.encode())

    def test_what_surrounds_a_text_is_counted(self):
        empty = {"messages": []}
        for name, request, tokens in [
            ("nothing",             empty, 0),
            ("a message",           {"messages": [user()]}, 4),
            ("a string",            {"messages": [{"role": "user", "content": ""}]}, 4),
            ("a call",              {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]}, 13),
            ("a result",            {"messages": [user({"type": "tool_result", "tool_use_id": "a"})]}, 9),
            ("tools: []",           {"messages": [], "tools": []}, 0),
            ("thinking is not",     {"messages": [user({"type": "thinking", "thinking": "long " * 500, "signature": "x" * 9000})]}, 4),
            ("blocks of no type",   {"messages": [user({}, {"type": 7}, "odd", None)], "system": [{}]}, 4),
        ]:
            with self.subTest(name):
                self.assertLessEqual(abs(ccr.estimate_tokens(request, "gpt-5") - tokens), 1)

    def test_system_tools_calls_results_and_search_results_count_their_words(self):
        text = TOKEN_TEXTS["prose"][0]
        alone = ccr.estimate_tokens({"system": text}, "gpt-5")
        for name, request, beside in [
            ("system blocks",  {"system": [{"type": "text", "text": text}]}, 0),
            ("a tool",         {"tools": [{"name": "a", "description": text, "input_schema": {}}]}, 70),
            ("a call",         {"messages": [user({"type": "tool_use", "input": {"content": text}})]}, 16),
            ("a result",       {"messages": [user({"type": "tool_result", "content": text})]}, 9),
            ("result blocks",  {"messages": [user({"type": "tool_result", "content": [{"type": "text", "text": text}]})]}, 9),
            ("text document",  {"messages": [user({"type": "document", "source": {"type": "text", "data": text}})]}, 4),
            ("block document", {"messages": [user({"type": "document", "source": {"type": "content", "content": text}})]}, 4),
            ("search result",  {"messages": [user({"type": "search_result", "source": "", "title": "", "content": [{"type": "text", "text": text}]})]}, 4),
        ]:
            with self.subTest(name):
                self.assertLess(abs(ccr.estimate_tokens(request, "gpt-5") - alone - beside), 9)

    def test_images_cost_their_pixels_and_base64_is_never_text(self):
        big = png_head(1000, 750) + "QUJD" * 500000
        for name, block, tokens in [
            ("an image",                     image_of(big), 1000),
            ("one in a tool result",         {"type": "tool_result", "content": [image_of(big)]}, 1005),
            ("a huge one is scaled down",    image_of(png_head(9000, 9000)), 4784),
            ("an unreadable one",            image_of("?!" * 90000), 1500),
            ("one with a lone surrogate",    image_of("\ud800" * 90000), 1500),
            ("a tiny one that is cut",       image_of("iVBORw0KGgo="), 1500),
            ("one behind a URL",             {"type": "image", "source": {"type": "url", "url": "https://a.b/c.png"}}, 1500),
            ("one without source",           {"type": "image"}, 1500),
            ("a PDF",                        {"type": "document", "source": {"type": "base64", "data": "JVBERi0x" * 20000}}, 3000),
            ("encrypted search results",     {"type": "web_search_tool_result", "content": [{"type": "web_search_result", "encrypted_content": "x" * 99999}]}, 0),
        ]:
            with self.subTest(name):
                self.assertEqual(ccr.estimate_tokens({"messages": [user(block)]}, "gpt-5"), tokens + 4)

    def test_the_size_of_an_image_is_read_from_its_head(self):
        sof = b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", 480, 640) + bytes(20)
        exif = b"\xff\xe1" + struct.pack(">H", 60000) + bytes(59998)
        for name, head, size in [
            ("PNG",                      base64.b64decode(png_head(70000, 3)), (70000, 3)),
            ("GIF",                      b"GIF89a" + struct.pack("<HH", 320, 200), (320, 200)),
            ("JPEG",                     b"\xff\xd8\xff\xe0\x00\x10" + bytes(14) + sof, (640, 480)),
            ("JPEG after two EXIF",      b"\xff\xd8" + exif + exif + sof, (640, 480)),
            ("progressive JPEG",         b"\xff\xd8\xff\xff\xff\xc4\x00\x02" + sof.replace(b"\xff\xc0", b"\xff\xc2"), (640, 480)),
            ("WebP, lossy",              b"RIFF\x00\x00\x00\x00WEBPVP8 " + bytes(4) + b"\x00\x00\x00\x9d\x01\x2a" + struct.pack("<HH", 800 | 1 << 14, 600), (800, 600)),
            ("WebP, lossless",           b"RIFF\x00\x00\x00\x00WEBPVP8L" + bytes(4) + b"\x2f" + struct.pack("<I", 799 | 599 << 14), (800, 600)),
            ("WebP, extended",           b"RIFF\x00\x00\x00\x00WEBPVP8X" + bytes(8) + (799).to_bytes(3, "little") + (599).to_bytes(3, "little"), (800, 600)),
            ("JPEG of nothing but fill", b"\xff\xd8" + b"\xff" * 90000, None),
            ("JPEG that is cut",         b"\xff\xd8\xff\xe0\xff", None),
            ("PNG that is cut",          b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0", None),
            ("TIFF",                     b"II*\0" + bytes(50), None),
            ("nothing",                  b"", None),
        ]:
            for whole in (head, head + bytes(3000)):
                with self.subTest(name, length=len(whole)):
                    self.assertEqual(ccr.image_size(base64.b64encode(whole).decode()), size)

    def test_a_memo_changes_nothing_but_the_time_and_stays_small(self):
        rng, memo = seeded("memo"), ccr.TokenMemo(size=50)
        texts = [text[i:i + rng.randrange(1, 5000)] for kind in TOKEN_TEXTS.values() for text in kind for i in range(0, 400, 7)]
        for _ in range(200):
            request = {"messages": [user({"type": "text", "text": rng.choice(texts)}) for _ in range(5)]}
            model = rng.choice(["gpt-5", "gemini-3-pro", "x"])
            with self.subTest(seed=SEED):
                self.assertEqual(ccr.estimate_tokens(request, model, memo), ccr.estimate_tokens(request, model))
                self.assertLessEqual(max(len(memo.young), len(memo.old)), 50)

    def test_a_memo_may_be_shared_by_threads(self):
        memo, wrong = ccr.TokenMemo(size=20), []

        def work(n):
            for i in range(2000):
                key = (i * n) % 61
                if memo.get(key) not in (None, key):
                    wrong.append(key)
                memo.put(key, key)
        threads = [threading.Thread(target=work, args=(n,)) for n in (1, 3, 7, 11)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])

    def test_counting_is_linear_and_takes_about_a_millisecond_per_100_kB(self):
        def milliseconds(text):
            best = 9.9
            for _ in range(5):
                start = time.thread_time()
                ccr.count_text(text, *ccr.weights_of("gpt-5"))
                best = min(best, time.thread_time() - start)
            return best * 1000
        for name, unit in [("code", TOKEN_TEXTS["code"][0]), ("one letter", "a"), ("one word", "word "), ("line ends", "\n"), ("digits", "0123456789"),
                           ("signs", "!a"), ("emoji", "\U0001f600"), ("Chinese", TOKEN_TEXTS["chinese"][0]), ("surrogates", "\ud800")]:
            short, long = ((unit * (n // len(unit) + 1))[:n] for n in (100000, 800000))
            with self.subTest(name):
                self.assertLess(milliseconds(short), 2)
                self.assertLess(milliseconds(long), 2 * 8)


class TestCalibration(unittest.TestCase):
    def test_a_model_without_lessons_is_taken_at_its_estimate(self):
        self.assertEqual(ccr.Calibration().factor("p,m"), 1.0)

    def test_a_report_teaches_only_when_it_is_large_and_near(self):
        for name, raw, real, taught in [
            ("999 tokens are all overhead", 999, 1100, False), ("1,000 are enough", 1000, 1100, True), ("half is too far", 2000, 1000, False),
            ("twice is too far", 2000, 4000, False), ("just under twice", 2000, 3999, True), ("nothing", 2000, 0, False)]:
            with self.subTest(name):
                calibration = ccr.Calibration()
                self.assertEqual(calibration.learn("m", raw, real), taught)
                self.assertEqual(calibration.factor("m") != 1.0, taught)

    def test_the_factor_is_the_median_of_the_last_nine(self):
        calibration = ccr.Calibration()
        for ratio in (1.9, 1.9, 1.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8):
            calibration.learn("m", 1000, round(1000 * ratio))
        self.assertEqual(calibration.lessons["m"], [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8])
        self.assertEqual(calibration.factor("m"), 1.4)
        self.assertEqual(calibration.factor("another"), 1.0)
        calibration.learn("two", 1000, 1200)
        calibration.learn("two", 1000, 1400)
        self.assertAlmostEqual(calibration.factor("two"), 1.3)

    def test_it_outlives_the_process_and_survives_damage(self):
        calibration, again = ccr.Calibration(), ccr.Calibration()
        calibration.learn("m", 1000, 1250)
        again.load(json.loads(json.dumps(calibration.dump())))
        self.assertEqual(again.factor("m"), 1.25)
        for damage in (None, [], "x", {"m": 3}, {"m": []}, {"m": ["1"]}, {"m": [float("nan")]}, {"m": [True]}, {"m": [-1]}):
            with self.subTest(repr(damage)):
                odd = ccr.Calibration()
                odd.load(damage)
                self.assertEqual(odd.factor("m"), 1.0)
        again.load({"m": [99.0]})
        self.assertEqual(again.factor("m"), 2)

    def test_it_keeps_a_bounded_number_of_models(self):
        calibration = ccr.Calibration()
        for n in range(1000):
            calibration.learn("m%d" % n, 1000, 1100)
        self.assertEqual(len(calibration.dump()), ccr.Calibration.MODELS)
        self.assertIn("m999", calibration.dump())


# --- the main road: issue 2 through real HTTP

CLIENT_HEADERS = {"Authorization": "Bearer client-token", "x-api-key": "client-key", "anthropic-version": "2023-06-01",
                  "Cookie": "a=b",
                  "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
                  "User-Agent": "claude-cli/2.1.330 (external, cli)",
                  "x-app": "cli", "X-Claude-Code-Session-Id": "11111111-2222-3333-4444-555555555555",
                  "x-stainless-retry-count": "0",
                  "x-claude-code-request-class": "main", "x-claude-1p-request-class": "main",
                  "Accept-Encoding": "gzip, deflate, br, zstd"}


def claude_code_request(**more):
    """A request as Claude Code 2.1.330 makes it, in the middle of a session (claude-code-wire.md, section 2)."""
    cached = {"cache_control": {"type": "ephemeral"}}
    return dict({
        "model": "claude-opus-5-5", "max_tokens": 128000, "stream": True,
        "thinking": {"type": "adaptive", "display": "updates"}, "output_config": {"effort": "medium"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "safeguards": [{"type": "x", "classifier_context": {"permission_mode": "default"}}],
        "metadata": {"user_id": json.dumps({"device_id": "0" * 64, "account_uuid": "",
                                            "session_id": "11111111-2222-3333-4444-555555555555"})},
        "system": [{"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.330.1; cc_entrypoint=cli;"},
                   dict({"type": "text", "text": "You are Claude Code."}, **cached),
                   dict({"type": "text", "text": "Be careful with files."}, **cached)],
        "tools": [{"name": "Read", "description": "Reads a file.",
                   "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}}},
                  {"name": "WebFetch", "description": "Gets a page.", "input_schema": {"type": "object", "properties": {}},
                   "defer_loading": True},
                  {"name": "DeferredToolPlaceholder", "description": "never call this tool.",
                   "input_schema": {"type": "object", "properties": {}},
                   "defer_loading": True}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "read both"}]},
            {"role": "system", "content": "The folder is /tmp/x."},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "Two files.", "signature": ""},
                                              {"type": "text", "text": "Reading."},
                                              {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"path": "a"}},
                                              {"type": "tool_use", "id": "toolu_2", "name": "Read", "input": {"path": "b"}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "alpha"},
                                         {"type": "tool_result", "tool_use_id": "toolu_2",
                                          "content": [{"type": "text", "text": "no such file"}], "is_error": True},
                                         dict({"type": "text", "text": "and now?"}, **cached)]}]}, **more)


class TestEndpoints(CcrTest):
    def test_health_tells_who_is_there(self):
        health = self.ccr.fetch("GET", "/health").json
        self.assertEqual((health["status"], health["version"], health["pid"]), ("ok", ccr.VERSION, self.ccr.pid))
        self.assertRegex(health["instance"], "^[0-9a-f]{8,}$")
        self.assertTrue([k for k in health if k.startswith("uptime")], health)

    def test_the_base_address_answers_and_head_has_no_body(self):
        with self.ccr.wire() as wire:
            for method, path in (("HEAD", "/"), ("GET", "/"), ("HEAD", "/api/hello"), ("HEAD", "/health"), ("GET", "/health")):
                with self.subTest(method + " " + path):
                    answer = wire.ask(method, path).answer(method)
                    self.assertEqual(answer.status, 200)
                    self.assertEqual(method == "HEAD", answer.body == b"")

    def test_messages_answers_as_asked_on_one_connection(self):
        with self.ccr.wire() as wire:
            for name, path, stream in (("absent stream is false", "/v1/messages", {}),
                                       ("stream", "/v1/messages", {"stream": True}),
                                       ("query string", "/v1/messages?beta=true", {}),
                                       ("any query", "/v1/messages?x=%2F&y", {"stream": True}),
                                       ("stream false", "/v1/messages?beta=true", {"stream": False})):
                with self.subTest(name):
                    answer = wire.ask("POST", path, prompt(**stream)).answer()
                    self.assertEqual(answer.status, 200, answer)
                    self.assertIn("text/event-stream" if stream.get("stream") else "application/json",
                                  answer.headers["content-type"])
                    message = answer.message
                    self.assertEqual(message["content"], [{"type": "text", "text": "scripted answer"}])
                    self.assertEqual((message["type"], message["role"], message["stop_reason"], message["stop_sequence"]),
                                     ("message", "assistant", "end_turn", None))
                    self.assertEqual(message["usage"], {"input_tokens": 10, "cache_creation_input_tokens": 0,
                                                        "cache_read_input_tokens": 0, "output_tokens": 3})

    def test_count_tokens_answers_without_asking_a_provider(self):
        counts = []
        for text in ("hi", "a few words more than that " * 50):
            answer = self.ask({"model": "claude-opus-5-5", "messages": [{"role": "user", "content": text}]},
                              "/v1/messages/count_tokens?beta=true")
            self.assertEqual((answer.status, list(answer.json)), (200, ["input_tokens"]), answer)
            counts.append(answer.json["input_tokens"])
        self.assertTrue(0 < counts[0] < 30 < counts[1] < 1000, counts)
        self.assertEqual(self.provider.requests, [])

    def test_models_are_listed_for_both_kinds_of_client(self):
        answer = self.ccr.fetch("GET", "/v1/models?limit=1000", headers={"anthropic-version": "2023-06-01"}).json
        self.assertEqual([m["id"] for m in answer["data"]], ["anthropic/prov,m1", "anthropic/prov,m2"])
        self.assertEqual((answer["has_more"], answer["first_id"], answer["last_id"]),
                         (False, "anthropic/prov,m1", "anthropic/prov,m2"))
        for model in answer["data"]:
            self.assertEqual(model["type"], "model")
            self.assertTrue(model["display_name"] and model["created_at"])
        answer = self.ccr.fetch("GET", "/v1/models").json
        self.assertEqual((answer["object"], [m["object"] for m in answer["data"]]), ("list", ["model", "model"]))
        self.assertEqual([m["id"] for m in answer["data"]], ["prov,m1", "prov,m2"])

    def test_an_id_from_the_list_is_understood(self):
        for model in ("anthropic/prov,m2", "prov,m2", "PROV,M2"):
            self.assertEqual(self.ask(prompt(model=model)).status, 200)
        self.assertEqual([r.model for r in self.provider.requests], ["m2"] * 3)

    def test_what_does_not_exist_is_said_in_json(self):
        for method, path, status in (("GET", "/nothing", 404), ("POST", "/v1/nothing", 404), ("GET", "/v1/messages", 405),
                                     ("DELETE", "/v1/messages", 405),
                                     ("PUT", "/health", 405), ("GET", "/health/../v1/models", 404),
                                     ("GET", "/../etc/passwd", 404)):
            with self.subTest(method + " " + path), self.ccr.wire() as wire:
                answer = wire.ask(method, path, {} if method in ("POST", "PUT") else None).answer(method)
                self.assertEqual(answer.status, status, answer)
                self.assertIsNone(error_fault(answer.json))


class TestUpward(CcrTest):
    def sent(self, body, headers=None):
        answer = self.ask(body, "/v1/messages?beta=true", headers)
        self.assertEqual(answer.status, 200, answer)
        return self.provider.requests[-1]

    def test_claude_codes_request_arrives_as_an_openai_provider_wants_it(self):
        body = self.sent(claude_code_request(), CLIENT_HEADERS).body
        self.assertEqual((body["model"], body["stream"], body["stream_options"]), ("m1", True, {"include_usage": True}))
        roles = [(m["role"], m.get("content") if isinstance(m.get("content"), str)
                  else "".join(p["text"] for p in m.get("content") or []))
                 for m in body["messages"]]
        self.assertEqual(roles[0][0], "system")
        self.assertIn("You are Claude Code.", roles[0][1])
        self.assertIn("Be careful with files.", roles[0][1])
        self.assertEqual(roles[1:4], [("user", "read both"), ("system", "The folder is /tmp/x."), ("assistant", "Reading.")])
        self.assertEqual([r[0] for r in roles[4:]], ["tool", "tool", "user"])
        self.assertEqual([m["tool_call_id"] for m in body["messages"][4:6]], ["toolu_1", "toolu_2"])
        self.assertEqual(roles[4][1], "alpha")
        self.assertRegex(roles[5][1], "(?i)error.*no such file")
        self.assertEqual(roles[6][1], "and now?")
        self.assertEqual([(c["id"], c["function"]["name"], json.loads(c["function"]["arguments"]))
                          for c in body["messages"][3]["tool_calls"]],
                         [("toolu_1", "Read", {"path": "a"}), ("toolu_2", "Read", {"path": "b"})])
        self.assertEqual([t["function"]["name"] for t in body["tools"]], ["Read", "WebFetch"])
        known = {"model", "messages", "tools", "stream", "stream_options", "max_tokens", "max_completion_tokens",
                 "reasoning_effort"}
        self.assertLessEqual(set(body), known)
        for word in ("cache_control", "defer_loading", "billing-header", "Placeholder", "safeguards", "device_id",
                     "clear_thinking"):
            self.assertNotIn(word, json.dumps(body))

    def test_headers_upstream_are_made_from_nothing(self):
        for name, stream in (("plain", False), ("stream", True)):
            with self.subTest(name):
                headers = self.sent(prompt(stream=stream), CLIENT_HEADERS).headers
                self.assertEqual(headers["authorization"], "Bearer " + PROVIDER_KEY)
                self.assertEqual(headers["accept-encoding"], "identity")
                self.assertLessEqual(set(headers), {"host", "content-type", "content-length", "authorization", "user-agent",
                                                    "accept",
                                                    "accept-encoding", "connection"})
                self.assertNotIn("claude-cli", headers.get("user-agent", ""))

    def test_usage_is_asked_for_only_in_streams(self):
        self.assertNotIn("stream_options", self.sent(prompt()).body)
        self.assertNotIn("stream_options", self.sent(prompt(stream=False)).body)
        self.assertIn("stream_options", self.sent(prompt(stream=True)).body)

    def test_any_client_of_the_anthropic_api_is_accepted(self):
        for name, headers in (("no version, no key", {}), ("a version of the future",
                                                           {"anthropic-version": "2031-01-01", "x-api-key": "k"}),
                              ("a bearer token", {"Authorization": "Bearer t", "anthropic-version": "2026-10-21"})):
            with self.subTest(name):
                self.assertEqual(self.ask(headers=headers).status, 200)

    def test_a_request_for_a_server_side_thread_gets_the_error_that_brings_the_whole_history(self):
        for thread in ({"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}):
            with self.subTest(thread["type"]):
                answer = self.ask(prompt(thread=thread))
                self.assert_error(answer, 400, "invalid_request_error", "thread")
                self.assertEqual(answer.json["error"]["details"], {"error_code": "thread_unsupported_request",
                                                                   "unsupported": ["thread"]})
        self.assertEqual(self.provider.requests, [])

    def test_model_validation_and_odd_but_right_requests_pass(self):
        for name, body in (("one token", prompt(max_tokens=1)), ("no max_tokens",
                                                                 {"model": "x", "messages": [{"role": "user", "content": "hi"}]}),
                           ("temperature 0", prompt(temperature=0)), ("no tools", prompt(tools=[])),
                           ("unknown fields", prompt(something={"new": 1})),
                           ("a lone surrogate", prompt("\ud83d half")), ("ends with role system", prompt(messages=[
                               {"role": "user", "content": "a"}, {"role": "system",
                                                                  "content": [{"type": "text", "text": "b"}]}])),
                           ("an unknown block", prompt(messages=[{"role": "user",
                                                                  "content": [{"type": "hologram", "x": 1}, {"type": "text", "text": "b"}]}])),
                           ("empty system", prompt(system="")), ("an empty system list", prompt(system=[]))):
            with self.subTest(name):
                self.sent(body)

    def test_temperature_zero_is_sent(self):
        body = self.sent(prompt(temperature=0, top_p=0.5, stop_sequences=["END"])).body
        self.assertEqual((body["temperature"], body["top_p"], body["stop"]), (0, 0.5, ["END"]))


def chunk(delta=None, finish=None, **more):
    """One OpenAI chunk."""
    return dict({"id": "same-id", "object": "chat.completion.chunk", "model": "m1",
                 "choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish}]}, **more)


def call(index=None, id=None, name=None, args=None):
    """One delta with a fragment of a tool call; what is None is left out."""
    function = {k: v for k, v in (("name", name), ("arguments", args)) if v is not None}
    return {"tool_calls": [{k: v for k, v in (("index", index), ("id", id), ("function", function)) if v is not None}]}


def text_block(text):
    return {"type": "text", "text": text}


def tool_block(name, input_):
    return {"type": "tool_use", "name": name, "input": input_}


class TestDownward(CcrTest):
    def assert_content(self, answer, content, stop_reason="end_turn"):
        """The answer's message is this; ids are there, but their value is the proxy's own."""
        self.assertEqual(answer.status, 200, answer)
        message = answer.message
        self.assertNotIn("error", message)
        got = [{k: v for k, v in block.items() if k not in ("id", "signature")} for block in message["content"]]
        self.assertEqual((got, message["stop_reason"]), (content, stop_reason))
        ids = [b["id"] for b in message["content"] if b["type"] == "tool_use"]
        self.assertEqual(len(ids), len(set(ids)))
        return message

    def test_what_the_model_says_arrives_in_both_forms(self):
        think = {"type": "thinking", "thinking": "hm, let me see"}
        for name, reply, content, stop in (
                ("text", say("hello wörld \u2028 \U0001f600"), [text_block("hello wörld \u2028 \U0001f600")], "end_turn"),
                ("reasoning and text", say("so", "hm, let me see"), [think, text_block("so")], "end_turn"),
                ("a call", say(tools=[("f", {"a": ["é", 1, None]})]), [tool_block("f", {"a": ["é", 1, None]})], "tool_use"),
                ("everything", say("now", "hm, let me see", [("f", {}), ("g", {"x": {"y": "\\\""}})]),
                 [think, text_block("now"), tool_block("f", {}), tool_block("g", {"x": {"y": "\\\""}})], "tool_use"),
                ("a call that ends with stop", say(tools=[("f", {})], finish="stop"), [tool_block("f", {})], "tool_use"),
                ("cut at max_tokens", say("begun", finish="length"), [text_block("begun")], "max_tokens"),
                ("an unknown end", say("x", finish="eos_token"), [text_block("x")], "end_turn"),
                ("think tags", say("<think>hm, let me see</think>so"), [think, text_block("so")], "end_turn")):
            self.provider.play(reply)
            for way, answer in self.both_ways():
                with self.subTest(name + " " + way):
                    self.assert_content(answer, content, stop)

    def test_no_order_or_numbering_of_deltas_loses_anything(self):
        end, two = chunk(finish="tool_calls"), [tool_block("f", {"a": 1}), tool_block("g", {"b": 2})]
        for name, chunks, content in (
                ("interleaved calls", [chunk(call(0, "c1", "f", '{"a"')), chunk(call(1, "c2", "g", '{"b"')),
                                       chunk(call(0, args=": 1}")),
                                       chunk(call(1, args=": 2}")), end], two),
                ("no index, own ids", [chunk(call(id="c1", name="f", args='{"a": 1}')),
                                       chunk(call(id="c2", name="g", args='{"b": 2}')), end], two),
                ("index 0 for every call", [chunk(call(0, "c1", "f", '{"a": 1}')), chunk(call(0, "c2", "g", '{"b": 2}')), end],
                 two),
                ("index from 1, id repeated in each", [chunk(call(1, "c1", "f", "")), chunk(call(1, "c1", args='{"a": 1}')),
                                                       chunk(call(2, "c2", "g", "")), chunk(call(2, "c2", args='{"b": 2}')), end],
                                                       two),
                ("arguments as an object", [chunk(call(0, "c1", "f", {"a": 1})), chunk(call(1, "c2", "g", {"b": 2})), end], two),
                ("no ids at all", [chunk(call(0, None, "f", '{"a": 1}')), chunk(call(1, None, "g", '{"b": 2}')), end], two),
                ("both in one chunk with the finish", [chunk({"tool_calls": call(0, "c1", "f", '{"a": 1}')["tool_calls"]
                                                             + call(1, "c2", "g", '{"b": 2}')["tool_calls"]}, "tool_calls")],
                                                             two),
                ("text after a call", [chunk(call(0, "c1", "f", '{"a": 1}')), chunk({"content": "after"}), chunk(finish="stop")],
                 [tool_block("f", {"a": 1}), text_block("after")]),
                ("reasoning after text", [chunk({"content": "a"}), chunk({"reasoning": "b"}), chunk({"content": "c"}),
                                          chunk(finish="stop")],
                 [text_block("a"), {"type": "thinking", "thinking": "b"}, text_block("c")]),
                ("empty fields in each chunk", [chunk({"content": "a", "tool_calls": None, "reasoning_content": ""}),
                                                chunk({"content": "b", "tool_calls": [], "reasoning_content": None}),
                                                chunk({"content": ""}, "stop")],
                 [text_block("ab")]),
                ("the same thought under two keys", [chunk({"reasoning": "t", "reasoning_content": "t"}),
                                                     chunk({"content": "a"}, "stop")],
                 [{"type": "thinking", "thinking": "t"}, text_block("a")])):
            with self.subTest(name):
                self.provider.play(say(chunks=chunks + ["[DONE]"]))
                kinds = {b["type"] for b in content}
                self.assert_content(self.ask(prompt(stream=True)), content, "tool_use" if "tool_use" in kinds else "end_turn")

    def test_server_sent_events_may_look_as_they_like(self):
        a, b = json.dumps(chunk({"content": "one\u2028"}),
                          ensure_ascii=False).encode(), json.dumps(chunk({"content": "two"}, "stop")).encode()
        for name, sse in (
                ("CRLF", [b"data: " + a + b"\r\n\r\ndata: " + b + b"\r\n\r\ndata: [DONE]\r\n\r\n"]),
                ("no space, comments, other fields", [b": hello\n\nid: 7\nretry: 1\ndata:" + a + b"\n\n: still here\n\ndata:" + b
                                                      + b"\n\ndata:[DONE]\n\n"]),
                ("one byte at a time", [bytes([x]) for x in b"data: " + a + b"\n\ndata: " + b + b"\n\ndata: [DONE]\n\n"]),
                ("no [DONE], but a finish_reason", [b"data: " + a + b"\n\ndata: " + b + b"\n\n"]),
                ("[DONE], but no finish_reason", [b"data: " + a + b"\n\ndata: " + b.replace(b'"stop"', b"null")
                                                  + b"\n\ndata: [DONE]\n\n"]),
                ("last line without its end", [b"data: " + a + b"\n\ndata: " + b]),
                ("an event name", [b"event: message\ndata: " + a + b"\n\nevent: message\ndata: " + b + b"\n\ndata: [DONE]\n\n"])):
            for framing in ("chunked", "close", "length"):
                with self.subTest(name + ", " + framing):
                    self.provider.play(say(sse=sse, framing=framing))
                    self.assert_content(self.ask(prompt(stream=True)), [text_block("one\u2028two")])

    def test_a_whole_json_body_is_its_own_end(self):
        whole = openai_wire(say("fine"), "m1")[1]
        whole["choices"][0]["finish_reason"] = None
        self.provider.play(refuse(200, body=whole))
        for way, answer in self.both_ways():
            with self.subTest(way):
                self.assert_content(answer, [text_block("fine")])

    def test_json_to_a_stream_request_and_the_reverse(self):
        for name, reply in (("JSON", say("so", "why", [("f", {"a": 1})], stream=False)),
                            ("a stream", say("so", "why", [("f", {"a": 1})], stream=True)),
                            ("JSON that claims to be a stream", say("so", "why", [("f", {"a": 1})], stream=False,
                                                                    headers={"content-type": "text/event-stream"})),
                            ("a stream that claims to be JSON", say("so", "why", [("f", {"a": 1})], stream=True,
                                                                    headers={"content-type": "application/json"})),
                            ("a stream without a type", say("so", "why", [("f", {"a": 1})], stream=True,
                                                            headers={"content-type": ""})),
                            ("gzip", say("so", "why", [("f", {"a": 1})], coding="gzip"))):
            self.provider.play(reply)
            for way, answer in self.both_ways():
                with self.subTest(name + " " + way):
                    self.assert_content(answer, [{"type": "thinking", "thinking": "why"}, text_block("so"),
                                                 tool_block("f", {"a": 1})], "tool_use")

    def test_usage_is_found_wherever_it_comes(self):
        usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107,
                 "prompt_tokens_details": {"cached_tokens": 60}}
        for name, chunks in (("after the finish", [chunk({"content": "a"}), chunk(finish="stop"),
                                                   dict(chunk(), choices=[], usage=usage)]),
                             ("with the finish", [chunk({"content": "a"}, "stop", usage=usage)]),
                             ("in each chunk", [chunk({"content": "a"}, usage=dict(usage, completion_tokens=1)),
                                                chunk(finish="stop", usage=usage)]),
                             ("null and then real", [chunk({"content": "a"}, usage=None), chunk(finish="stop", usage=None),
                                                     dict(chunk(), choices=[], usage=usage)])):
            with self.subTest(name):
                self.provider.play(say(chunks=chunks + ["[DONE]"]))
                final = [e for e in self.ask(prompt(stream=True)).events if e["type"] == "message_delta"][0]
                self.assertEqual(final["usage"], {"input_tokens": 40, "cache_creation_input_tokens": 0,
                                                  "cache_read_input_tokens": 60, "output_tokens": 7})

    def test_message_start_carries_an_estimate(self):
        first = self.ask(prompt("some words " * 100, stream=True)).events[0]
        self.assertTrue(50 < first["message"]["usage"]["input_tokens"] < 1000, first)

    def test_message_ids_are_unique_whatever_the_provider_sends(self):
        self.provider.play(say(chunks=[chunk({"content": "a"}, "stop"), "[DONE]"]))
        ids = [self.ask(prompt(stream=True)).message["id"] for _ in range(3)] + [self.ask().message["id"] for _ in range(3)]
        self.assertEqual(len(set(ids)), 6, ids)

    def test_a_delta_is_passed_on_when_it_comes(self):
        self.provider.play(say("first, then nothing for a while", hang=3))
        with self.ccr.wire(timeout=5) as wire:
            wire.ask("POST", "/v1/messages", prompt(stream=True))
            self.assertEqual(wire.head()[0], 200)
            wire.until(b"first")

    def test_one_event_may_be_ten_megabytes(self):
        big = "0123456789" * (1 << 20)
        self.provider.play(say(chunks=[chunk({"content": big}), chunk(finish="stop"), "[DONE]"]))
        self.assertEqual(self.ask(prompt(stream=True)).message["content"], [text_block(big)])


class TestEveryRoad(CcrTest):
    """Three kinds of client before four kinds of provider."""
    PROVIDERS = {"openai": ("/v1/chat/completions", None), "anthropic": ("/v1/messages", ["anthropic"]),
                 "responses": ("/v1/responses", ["openai-responses"]), "gemini": ("/v1beta/models/", ["gemini"])}

    @classmethod
    def config(cls):
        return {"Providers": [provider_entry(cls.provider, name, path=path, **({"transformer": {"use": use}} if use else {}))
                              for name, (path, use) in cls.PROVIDERS.items()]}

    TOOL = {"name": "look", "description": "Looks.", "input_schema": {"type": "object", "properties": {"at": {"type": "string"}},
                                                                      "required": ["at"]}}
    ASKS = {"/v1/messages": dict(prompt("what is there?"), tools=[TOOL]),
            "/v1/chat/completions": {"messages": [{"role": "user", "content": "what is there?"}],
                                     "tools": [{"type": "function",
                                                "function": {"name": "look", "parameters": TOOL["input_schema"]}}]},
            "/v1/responses": {"input": "what is there?", "tools": [{"type": "function", "name": "look",
                                                                    "parameters": TOOL["input_schema"]}]}}

    def told(self, path, answer):
        """(text, [(tool, input)], has reasoning, input tokens, output tokens) of an answer in the format of that path."""
        is_stream, body = "event-stream" in answer.headers["content-type"], answer.body
        data = [json.loads(line[6:]) for line in body.decode().split("\n") if line.startswith("data: ")
                and line != "data: [DONE]"] if is_stream else []
        if path == "/v1/messages":
            message = answer.message
            blocks = message["content"]
            return ("".join(b["text"] for b in blocks if b["type"] == "text"),
                    [(b["name"], b["input"]) for b in blocks if b["type"] == "tool_use"],
                    any(b["type"] == "thinking" and b["thinking"] == "hm" for b in blocks), message["usage"]["input_tokens"],
                    message["usage"]["output_tokens"])
        if path == "/v1/responses":
            done = data[-1]["response"] if is_stream else answer.json
            self.assertEqual(done["status"], "completed")
            if is_stream:
                self.assertEqual((data[0]["type"], data[-1]["type"]), ("response.created", "response.completed"))
                self.assertEqual([d["item"] for d in data if d["type"] == "response.output_item.done"], done["output"])
            items = done["output"]
            return ("".join(p["text"] for i in items if i["type"] == "message" for p in i["content"]),
                    [(i["name"], json.loads(i["arguments"])) for i in items if i["type"] == "function_call"],
                    any(i["type"] == "reasoning" and i["summary"][0]["text"] == "hm" for i in items),
                    done["usage"]["input_tokens"], done["usage"]["output_tokens"])
        if not is_stream:
            message, usage = answer.json["choices"][0]["message"], answer.json["usage"]
            return (message["content"], [(c["function"]["name"], json.loads(c["function"]["arguments"]))
                                         for c in message["tool_calls"]],
                    message.get("reasoning_content") == "hm", usage["prompt_tokens"], usage["completion_tokens"])
        self.assertTrue(body.endswith(b"data: [DONE]\n\n"), body[-100:])
        deltas = [d["choices"][0]["delta"] for d in data if d["choices"]]
        calls = [c for d in deltas for c in d.get("tool_calls") or []]
        usage = ([d["usage"] for d in data if d.get("usage")] or [{}])[-1]
        return ("".join(d.get("content") or "" for d in deltas), [(n,
                                                                   json.loads("".join(c["function"].get("arguments") or "" for c in calls)))
                                                                    for n in [c["function"]["name"] for c in calls if c["function"].get("name")]],
                "".join(d.get("reasoning_content") or "" for d in deltas) == "hm", usage.get("prompt_tokens"),
                usage.get("completion_tokens"))

    def test_each_client_gets_everything_from_each_provider(self):
        self.provider.play(say("It is here.", "hm", [("look", {"at": "é"})], usage=(12, 0, 5)))
        for (path, body), provider, stream in itertools.product(self.ASKS.items(), self.PROVIDERS, (False, True)):
            with self.subTest("%s -> %s%s" % (path, provider, ", stream" if stream else "")):
                more = {"stream_options": {"include_usage": True}} if stream and "chat" in path else {}
                answer = self.ask(dict(body, model=provider + ",m1", stream=stream, **more), path)
                self.assertEqual(answer.status, 200, answer)
                self.assertEqual(self.told(path, answer), ("It is here.", [("look", {"at": "é"})], True, 12, 5))
                self.assertEqual(self.provider.requests[-1].model, "m1")

    def test_an_error_has_the_shape_of_the_client_and_the_words_of_the_provider(self):
        self.provider.play(refuse(429, "too many, friend", {"Retry-After": "9"}))
        for path, body in self.ASKS.items():
            with self.subTest(path):
                answer = self.ask(dict(body, model="openai,m1"), path)
                self.assertEqual((answer.status, answer.headers.get("retry-after")), (429, "9"))
                self.assertIn("too many, friend", answer.json["error"]["message"])
                self.assertEqual(answer.json.get("type"), "error" if path == "/v1/messages" else None)

    def test_a_stream_that_breaks_ends_with_an_error_for_every_client(self):
        for (path, body), provider in itertools.product(self.ASKS.items(), self.PROVIDERS):
            with self.subTest("%s -> %s" % (path, provider)):
                self.provider.play(say("It is here, or so it seems.", die=4, how="eof", framing="close"))
                with self.ccr.wire() as wire:
                    answer = wire.ask("POST", path, dict(body, model=provider + ",m1", stream=True)).answer()
                if path == "/v1/messages":
                    self.assertIn("error", answer.message)
                elif path == "/v1/responses":
                    self.assertIn(b'"type":"response.failed"', answer.body)
                    self.assertNotIn(b"response.completed", answer.body)
                else:
                    self.assertIn(b'data: {"error":', answer.body)
                    self.assertNotIn(b"[DONE]", answer.body)


class TestErrors(CcrTest):
    def test_a_refusal_keeps_its_status_and_its_words(self):
        for name, reply, status, kind, words in (
                ("400", refuse(400, "messages: bad shape"), 400, "invalid_request_error", "messages: bad shape"),
                ("401", refuse(401, "no such key"), 401, "authentication_error", "no such key"),
                ("402", refuse(402, "insufficient credits"), 402, "billing_error", "insufficient credits"),
                ("403", refuse(403, "not for you"), 403, "permission_error", "not for you"),
                ("404", refuse(404, "model not found"), 404, "not_found_error", "model not found"),
                ("422", refuse(422, "bad field"), 422, "invalid_request_error", "bad field"),
                ("429", refuse(429, "slow down"), 429, "rate_limit_error", "slow down"),
                ("500", refuse(500, "it broke"), 500, "api_error", "it broke"),
                ("503", refuse(503, "too busy"), 503, "overloaded_error", "too busy"),
                ("529", refuse(529, "overloaded"), 529, "overloaded_error", "overloaded"),
                ("an error as text", refuse(500, body={"error": "plain words"}), 500, "api_error", "plain words"),
                ("detail", refuse(422, body={"detail": "field required"}), 422, "invalid_request_error", "field required"),
                ("a list", refuse(400, body=[{"error": {"code": 400, "message": "from Google"}}]), 400, "invalid_request_error",
                 "from Google"),
                ("a message", refuse(400, body={"message": "bare message"}), 400, "invalid_request_error", "bare message"),
                ("HTML", refuse(502, body="<html><head><title>502 Bad Gateway</title></head></html>"), 502, "api_error", "502"),
                ("text", refuse(400, body=b"just text"), 400, "invalid_request_error", "just text"),
                ("nothing", refuse(500, body=b""), 500, "api_error", "500"),
                ("context overflow", refuse(400, "This model's maximum context length is 8192 tokens"), 400,
                 "invalid_request_error", "maximum context length is 8192"),
                ("413 that means tokens", refuse(413, "Request too large: 9000 tokens, limit 8000 tokens"), 400,
                 "invalid_request_error", "prompt is too long"),
                ("200 with an error object", refuse(200, body={"error": {"message": "actually no", "code": 429}}), 429,
                 "rate_limit_error", "actually no"),
                ("200 with an error of no kind", refuse(200, body={"error": {"message": "actually no"}}), 502, "api_error",
                 "actually no"),
                ("200 with HTML", refuse(200, body="<html>login please</html>"), 502, "api_error", "prov"),
                ("200 with nothing", refuse(200, body=b""), 502, "api_error", "prov"),
                ("200 with other JSON", refuse(200, body={"hello": 1}), 502, "api_error", "prov"),
                ("an error as the first event", say(chunks=[{"error": {"message": "no capacity", "code": 503}}], stream=True),
                 503, "overloaded_error", "no capacity"),
                ("a stream of nothing", say(sse=[], stream=True), 502, "api_error", "prov"),
                ("no HTTP at all", {"raw": b"SSH-2.0-OpenSSH_9.9\r\n"}, 502, "api_error", "prov"),
                ("an unfinished head", {"raw": b"HTTP/1.1 200 OK\r\nContent-Ty"}, 502, "api_error", "prov"),
                ("nothing at all", {"raw": b""}, 502, "api_error", "prov"),
                ("a reset", {"raw": b"", "how": "rst"}, 502, "api_error", "prov"),
                ("bad gzip", say("abc " * 300, coding="badgzip"), 502, "api_error", "prov"),
                ("a body shorter than it says", say("abc", lie=50, stream=False), 502, "api_error", "prov")):
            self.provider.play(reply)
            for way, answer in self.both_ways():
                with self.subTest(name + " " + way):
                    if answer.status == 200 and "coding" in reply:     # damage may come after good events
                        self.assertIn("error", answer.message)
                    else:
                        self.assert_error(answer, status, kind, words)

    def test_retry_after_is_passed_on(self):
        for status in (429, 503, 529):
            self.provider.play(refuse(status, headers={"Retry-After": "7"}))
            for way, answer in self.both_ways():
                with self.subTest("%d %s" % (status, way)):
                    self.assertEqual((answer.status, answer.headers.get("retry-after")), (status, "7"))

    def test_long_words_are_cut_and_control_characters_are_harmless(self):
        self.provider.play(refuse(400, "x" * 100000 + "\r\nX-Evil: 1\x1b[31m"))
        answer = self.ask()
        self.assert_error(answer, 400, "invalid_request_error", "xxx")
        self.assertLess(len(answer.body), 8000)
        self.assertNotIn("x-evil", answer.headers)

    def test_a_failure_in_the_middle_is_one_error_event(self):
        text = chunk({"content": "half of "})
        for name, reply, words in (
                ("an error object", say(chunks=[text, {"error": {"message": "worker died"}}, "[DONE]"]), "worker died"),
                ("a named error event", say(sse=[sse_frame(text), b'event: error\ndata: {"message": "worker died"}\n\n']),
                 "worker died"),
                ("a reset", say("half of it", die=3, how="rst"), "prov"),
                ("a clean end in chunks", say(chunks=[text]), "prov"),
                ("a clean end by closing", say(chunks=[text], framing="close"), "prov"),
                ("an end inside the chunked framing", say("half of it", die=3), "prov"),
                ("less than content-length", say("half of it", framing="length", lie=9), "prov"),
                ("broken JSON", say(sse=[sse_frame(text), b'data: {"choices": [{"delta"\n\n', sse_frame("[DONE]")]), "prov"),
                ("half a call", say(chunks=[text, chunk(call(0, "c", "f", '{"cmd": "rm -rf /tm'))]), "prov"),
                ("half a call that claims to be whole", say(chunks=[text, chunk(call(0, "c", "f", '{"cmd": "rm -rf /tm')),
                                                                    chunk(finish="tool_calls"), "[DONE]"]), "")):
            with self.subTest(name):
                self.provider.play(reply)
                answer = self.ask(prompt(stream=True))
                self.assertEqual(answer.status, 200, answer)
                self.assertEqual([e["type"] for e in answer.events].count("error"), 1)
                self.assertNotIn(b"message_stop", answer.body)
                self.assertRegex(answer.message["error"]["message"], words)

    def test_a_stream_cut_at_any_byte_is_an_error_never_a_success(self):
        full = [chunk({"content": "Run é"}), chunk(call(0, "c1", "Bash", "")), chunk(call(0, args='{"command": ')),
                chunk(call(0, args='"ls -l"}')), chunk(finish="tool_calls")]
        slim = [{"choices": [{"delta": c["choices"][0]["delta"], "finish_reason": c["choices"][0]["finish_reason"]}]}
                for c in full]
        sse = b"".join(b"data: %s\n\n" % json.dumps(c, ensure_ascii=False, separators=(",", ":")).encode() for c in slim)
        end = sse.index(b'"tool_calls"}]}') + len(b'"tool_calls"}]}')     # from here on the finish_reason is known
        for n in range(len(sse)):
            how, framing = [("eof", "close"), ("rst", "chunked"), ("eof", "chunked")][n % 3]
            self.provider.play(say(sse=[sse], cut=n, how=how, framing=framing))
            answer = self.ask(prompt(stream=True))
            with self.subTest(cut=n, how=how, framing=framing):
                if answer.status != 200:
                    self.assert_error(answer, 502, "api_error")
                elif n < end:
                    self.assertIn("error", answer.message)
                    self.assertNotIn(b"message_stop", answer.body)
                else:
                    answer.events      # with the finish_reason a missing [DONE] may be forgiven, a broken framing may not

    def test_a_provider_that_is_not_there_is_named(self):
        gone = {"Providers": [{"name": "gone", "api_base_url": "http://127.0.0.1:%d/v1" % free_port(), "models": ["m"]},
                              {"name": "long", "api_base_url": "http://%s.example/v1" % ("a" * 70), "models": ["m"]}]}
        proxy = Ccr(gone)
        try:
            for name in ("gone", "long"):
                for stream in (False, True):
                    with self.subTest(name, stream=stream):
                        self.assert_error(proxy.ask(prompt(model=name + ",m", stream=stream)), 502, "api_error", name)
        finally:
            proxy.stop()

    def test_a_redirect_is_refused_and_the_other_host_never_asked(self):
        other = ScriptedProvider()
        try:
            for status in (301, 302, 303, 307, 308):
                with self.subTest(status):
                    self.provider.play(refuse(status, headers={"Location": "http://127.0.0.1:%d/steal" % other.port}, body=""))
                    for _, answer in self.both_ways():
                        self.assert_error(answer, 502, "api_error", "redirect.*127.0.0.1")
            self.assertEqual(other.requests, [])
        finally:
            other.stop()

    def test_an_unknown_provider_gets_a_4xx_that_names_what_there_is(self):
        answer = self.ask(prompt(model="nobody,m9"))
        self.assertIn(answer.status, (400, 404))
        self.assertIsNone(error_fault(answer.json))
        self.assertRegex(answer.json["error"]["message"], "nobody.*prov")
        self.assertEqual(self.provider.requests, [])


class TestSilence(CcrTest):
    """Pings and time-outs, with short intervals."""
    patch = {"FIRST_PING_S": 0.3, "PING_S": 0.2}

    @classmethod
    def config(cls):
        return {"Providers": [provider_entry(cls.provider, models=("m1", "m2"))], "API_TIMEOUT_MS": 1500,
                "Router": {"default": "prov,m1"}, "fallback": {"default": ["prov,m2"]}}

    def pings(self, events):
        return sum(e["type"] == "ping" for e in events)

    def test_silence_before_an_answer_is_filled_with_pings(self):
        for name, reply in (("before the headers", say("late", before=1)), ("after the headers", say("late", pause=0.13)),
                            ("in the middle", say("late, but there", sse=None))):
            if reply.get("sse", 1) is None:
                frames = [sse_frame(p) for p in openai_wire(say("late"), "m1")[0]]
                reply = say("late", sse=frames[:2] + [b""] + frames[2:], pause=0.5)
            with self.subTest(name):
                self.provider.play(dict(reply, framing="close"))
                answer = self.ask(prompt(stream=True))
                self.assertEqual(answer.message["content"], [text_block("late")])
                if name != "after the headers":
                    self.assertGreaterEqual(self.pings(answer.events), 2)

    def test_headers_and_message_start_go_out_while_the_provider_is_silent(self):
        self.provider.play(say("never", hang="headers"))
        with self.ccr.wire() as wire:
            wire.ask("POST", "/v1/messages", prompt(stream=True))
            self.assertEqual(wire.head()[0], 200)
            wire.until(b"message_start")
            wire.until(b"event: ping")

    def test_an_error_after_that_is_an_event(self):
        self.provider.play(refuse(400, "you are too late", before=0.8))
        answer = self.ask(prompt(stream=True))
        self.assertEqual(answer.status, 200)
        self.assertRegex(answer.message["error"]["message"], "you are too late")

    def test_a_fallback_takes_over_unseen_after_it(self):
        self.provider.play({"m1": [refuse(500, before=0.8)], "m2": [say("from the second")]})
        answer = self.ask(prompt(stream=True))
        self.assertEqual(answer.message["content"], [text_block("from the second")])
        self.assertEqual([e["type"] for e in answer.events].count("message_start"), 1)

    def test_a_provider_that_stays_silent_is_given_up(self):
        for name, reply in (("before the headers", say("x", hang="headers")), ("before the first event", say("x", hang=0)),
                            ("in the middle", say("x" * 30, hang=4))):
            for model in ("prov,m1", "prov,m2"):          # a named model has no fallback
                self.provider.play(reply)
                for way, answer in self.both_ways(prompt(model=model)):
                    if way == "as JSON" and name != "before the headers":
                        continue
                    with self.subTest("%s %s %s" % (name, model, way)):
                        if answer.status == 200:
                            self.assertEqual(answer.message["error"]["type"], "timeout_error")
                        else:
                            self.assert_error(answer, 504, "timeout_error", "prov")
                self.assertTrue(wait_for(lambda: all(r.left.is_set() for r in self.provider.requests), 2))

    def test_a_trickle_is_not_silence(self):
        frames = [sse_frame(p) for p in openai_wire(say("slow but sure"), "m1")[0]]
        self.provider.play(say(sse=frames, pause=0.35))
        self.assertEqual(self.ask(prompt(stream=True)).message["content"], [text_block("slow but sure")])


class TestLeaving(CcrTest):
    def test_the_client_that_leaves_ends_the_upstream_request_within_two_seconds(self):
        for name, reply, stream, mark in (
                ("waiting for headers, stream", say("x", hang="headers"), True, None),
                ("waiting for headers, plain", say("x", hang="headers"), False, None),
                ("headers came, nothing else", say("x", hang=0), True, None),
                ("silent in the middle", say("abcdefghij" * 3, hang=4), True, b"abcde"),
                ("in mid-stream", say("abcdefghij" * 400, pause=0.01), True, b"abcde"),
                ("in a plain answer's body", say("x", hang=0, framing="close", stream=False), False, None),
                ("a stream for a plain client", say("abcdefghij" * 400, pause=0.01, stream=True), False, None)):
            for reset in (False, True):
                with self.subTest(name, reset=reset):
                    self.provider.play(reply)
                    wire = self.ccr.wire()
                    wire.ask("POST", "/v1/messages", prompt(stream=stream))
                    self.assertTrue(wait_for(lambda: self.provider.requests))
                    if mark:
                        wire.until(mark)
                    left_at = time.monotonic()
                    wire.leave(reset)
                    seen = self.provider.requests[0]
                    self.assertTrue(seen.left.wait(5), "the upstream connection stays open")
                    self.assertLess(seen.left_at - left_at, 2)

    def test_bytes_that_are_no_end_are_left_alone(self):
        self.provider.play(say("first", before=0.3), say("second"))
        with self.ccr.wire() as wire:
            wire.ask("POST", "/v1/messages", prompt(stream=True)).ask("POST", "/v1/messages", prompt())
            self.assertEqual(wire.answer().message["content"], [text_block("first")])
            self.assertEqual(wire.answer().message["content"], [text_block("second")])

    def test_upstream_connections_are_used_again_after_complete_answers(self):
        for _ in range(4):
            self.ask(prompt(stream=True))
            self.ask()
        self.assertEqual(len({r.connection for r in self.provider.requests}), 1)

    def test_a_pooled_connection_that_died_is_no_failure(self):
        self.ask()
        for connection in list(self.provider.connections):
            connection.shutdown(socket.SHUT_RDWR)
        self.assertEqual(self.ask(prompt(stream=True)).message["content"], [text_block("scripted answer")])


class TestKeys(CcrTest):
    KEYS = ["key-one-0123456789", "key-two-0123456789", "key-three-0123456789"]

    @classmethod
    def config(cls):
        return {"Providers": [provider_entry(cls.provider, "many-%d" % n, key=[k + "-%d" % n for k in cls.KEYS])
                              for n in range(4)]
                + [provider_entry(cls.provider, "none", key=None), provider_entry(cls.provider, "env", key="$TEST_KEY"),
                   provider_entry(cls.provider, "env2", key="${TEST_KEY}")]}
    env = {"TEST_KEY": "key-from-the-environment"}

    def keys_used(self):
        return [r.headers.get("authorization", "").replace("Bearer ", "") for r in self.provider.requests]

    def test_keys_take_turns(self):
        for _ in range(6):
            self.assertEqual(self.ask(prompt(model="many-0,m1")).status, 200)
        self.assertEqual(collections.Counter(self.keys_used()), {k + "-0": 2 for k in self.KEYS})

    def test_a_refused_key_rests_and_the_same_request_goes_on_with_the_next(self):
        for status, name in ((401, "many-1"), (429, "many-2")):
            with self.subTest(status):
                bad = self.KEYS[1] + name[-2:]
                self.provider.play(lambda seen: refuse(status) if seen.headers["authorization"].endswith(bad) else say("fine"))
                for stream in (False, True) * 4:
                    self.assertEqual(self.ask(prompt(model=name + ",m1", stream=stream)).message["content"], [text_block("fine")])
                self.assertEqual(self.keys_used().count(bad), 1)
                self.assertEqual(len(self.keys_used()), 9)

    def test_when_all_are_refused_the_providers_words_come_back_and_the_last_key_never_rests(self):
        self.provider.play(refuse(401, "all bad"))
        self.assert_error(self.ask(prompt(model="many-3,m1")), 401, "authentication_error", "all bad")
        self.assertEqual(len(set(self.keys_used())), 3)
        self.provider.play(say("fine"))
        self.assertEqual(self.ask(prompt(model="many-3,m1")).status, 200)

    def test_a_provider_may_have_no_key_or_one_from_the_environment(self):
        for name in ("none", "env", "env2"):
            self.ask(prompt(model=name + ",m1"))
        self.assertEqual(self.keys_used(), ["", "key-from-the-environment", "key-from-the-environment"])
        self.assertNotIn("authorization", self.provider.requests[0].headers)


class TestStreamOptions(CcrTest):
    def test_a_provider_that_refuses_them_is_asked_once_without_and_that_is_remembered_if_it_worked(self):
        no = refuse(400, "Unrecognized request argument supplied: stream_options")
        self.provider.play(lambda seen: no if "stream_options" in seen.body or "bad" in seen.text() else say("fine"))
        self.assert_error(self.ask(prompt("bad", stream=True)), 400, "invalid_request_error", "stream_options")
        self.assertEqual(["stream_options" in r.body for r in self.provider.requests], [True, False])
        self.assertEqual(self.ask(prompt(stream=True)).message["content"], [text_block("fine")])
        self.assertEqual(["stream_options" in r.body for r in self.provider.requests[2:]], [True, False])
        self.assertEqual(self.ask(prompt(stream=True)).message["content"], [text_block("fine")])
        self.assertEqual(["stream_options" in r.body for r in self.provider.requests[4:]], [False])


class TestAddresses(CcrTest):
    SPELLINGS = {"full": "/v1/chat/completions", "slash": "/v1/chat/completions/", "v1": "/v1", "v1-slash": "/v1/"}

    @classmethod
    def config(cls):
        return {"PROXY_URL": "http://127.0.0.1:%d" % cls.provider.port,
                "Providers": [provider_entry(cls.provider, name, path=path) for name, path in cls.SPELLINGS.items()]
                + [{"name": "far", "api_base_url": "http://models.example/v1", "api_key": PROVIDER_KEY, "models": ["m1"]},
                   {"name": "far-tls", "api_base_url": "https://models.example/v1", "api_key": PROVIDER_KEY, "models": ["m1"]}]}

    def test_every_spelling_of_api_base_url_works(self):
        for name in self.SPELLINGS:
            with self.subTest(name):
                self.assertEqual(self.ask(prompt(model=name + ",m1")).status, 200)
                self.assertEqual(self.provider.requests[-1].target, "/v1/chat/completions")

    def test_a_proxy_is_used_for_far_hosts_only(self):
        self.assertEqual(self.ask(prompt(model="far,m1", stream=True)).message["content"], [text_block("scripted answer")])
        seen = self.provider.requests[-1]
        self.assertEqual((seen.target, seen.headers["host"]), ("http://models.example/v1/chat/completions", "models.example"))
        self.assertEqual(self.ask(prompt(model="v1,m1")).status, 200)
        self.assertEqual(self.provider.requests[-1].target, "/v1/chat/completions")

    def test_for_https_the_proxy_sees_a_tunnel_and_no_key(self):
        self.assert_error(self.ask(prompt(model="far-tls,m1")), 502, "api_error", "far-tls")
        seen = self.provider.requests[-1]
        self.assertEqual((seen.method, seen.target), ("CONNECT", "models.example:443"))
        self.assertNotIn("authorization", seen.headers)


class TestProxyEnvironment(CcrTest):
    """HTTPS_PROXY of the environment is for far hosts; it never applies to this machine."""

    @classmethod
    def setUpClass(cls):
        dead = "http://127.0.0.1:%d" % free_port()
        cls.env = {"HTTPS_PROXY": dead, "https_proxy": dead, "HTTP_PROXY": dead, "http_proxy": dead, "ALL_PROXY": dead}
        super().setUpClass()

    def test_a_provider_on_this_machine_is_asked_directly(self):
        self.assertEqual(self.ask().status, 200)


class TestRequestBodies(CcrTest):
    def test_packed_and_chunked_bodies_are_read(self):
        raw = json.dumps(prompt("packed")).encode()
        chunked = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(p), p) for p in (raw[:1], raw[1:20],
                                                                         raw[20:])) + b"0\r\nTrailer: x\r\n\r\n"
        for name, body, headers in (
                ("gzip", gzip.compress(raw), {"Content-Encoding": "gzip"}),
                ("chunked", chunked, {"Transfer-Encoding": "chunked", "Content-Length": None}),
                ("Chunked, in capitals", chunked, {"Transfer-Encoding": "CHUNKED", "Content-Length": None}),
                ("identity", raw, {"Content-Encoding": "identity"}),
                ("a byte order mark", b"\xef\xbb\xbf" + raw, {}),
                ("a charset", raw, {"Content-Type": "application/json; charset=utf-8"}),
                ("no type, as curl -d sends it without -H", raw, {"Content-Type": None})):
            with self.subTest(name), self.ccr.wire() as wire:
                for _ in range(2):                                     # and the connection goes on
                    answer = wire.ask("POST", "/v1/messages", body, headers).answer()
                    self.assertEqual(answer.status, 200, answer)
                    self.assertIn("packed", self.provider.requests[-1].text())

    def test_a_client_that_expects_to_be_told_to_continue_is_told(self):
        with self.ccr.wire(timeout=5) as wire:
            head, body = request_bytes(self.ccr.port, "POST", "/v1/messages", prompt(),
                                       {"Expect": "100-continue"}).split(b"\r\n\r\n")
            wire.send(head + b"\r\n\r\n")
            self.assertTrue(wire.until(b"\r\n\r\n").startswith(b"HTTP/1.1 100"))
            self.assertEqual(wire.send(body).answer().status, 200)

    def test_damaged_bodies_are_a_400(self):
        bomb = gzip.compress(b" " * (200 << 20), 9)
        for name, body, headers, statuses in (
                ("not gzip", b"{}", {"Content-Encoding": "gzip"}, (400,)),
                ("cut gzip", gzip.compress(b"{}" * 100)[:-9], {"Content-Encoding": "gzip"}, (400,)),
                ("a gzip bomb", bomb, {"Content-Encoding": "gzip"}, (400, 413)),
                ("an unknown coding", b"{}", {"Content-Encoding": "br"}, (400, 415)),
                ("no JSON", b"{nope", {}, (400,)), ("empty", b"", {}, (400,)), ("a list", b"[]", {}, (400,)),
                ("null", b"null", {}, (400,)),
                ("UTF-16", json.dumps(prompt()).encode("utf-16-le")[:-1], {}, (400,)),
                ("invalid UTF-8", b'{"model": "\xff\xfe"}', {}, (400,)),
                ("two values", b"{}{}", {}, (400,)), ("deep", b'{"messages":' + b"[" * 200000, {}, (400,)),
                ("deep and whole", b'{"messages":' + b"[" * 100000 + b"]" * 100000 + b"}", {}, (400,)),
                ("an endless number", b'{"max_tokens": ' + b"9" * 6000 + b"}", {}, (400,))):
            with self.subTest(name):
                answer = self.ask(body, headers=headers)
                self.assertIn(answer.status, statuses, answer)
                self.assertIsNone(error_fault(answer.json))
        self.assertEqual(self.provider.requests, [])

    def test_six_megabytes_arrive_whole(self):
        text = "".join(seeded("six").choice("abcdefgh \u00e9") for _ in range(6 << 10)) * 1000
        self.assertEqual(self.ask(prompt(text)).status, 200)
        self.assertEqual(self.provider.requests[-1].body["messages"][-1]["content"], text)


class TestFallback(CcrTest):
    @classmethod
    def config(cls):
        return {"Providers": [provider_entry(cls.provider, models=("m1", "m2", "m3"))],
                "Router": {"default": "prov,m1", "think": "prov,m3"},
                "fallback": {"default": ["prov,m2"]}}

    def setUp(self):
        self.provider.play({m: [say("from " + m)] for m in ("m1", "m2", "m3")})
        for model in ("m1", "m2", "m3"):                               # a success ends a rest that another test left
            self.ask(prompt(model="prov," + model))

    def test_another_model_takes_the_turn_before_the_first_event(self):
        for name, failure in (("500", refuse(500)), ("429", refuse(429)), ("404", refuse(404)), ("408", refuse(408)),
                              ("529", refuse(529)),
                              ("an error in a 200", refuse(200, body={"error": {"message": "no"}})), ("no HTTP", {"raw": b"?"}),
                              ("a reset", {"raw": b"", "how": "rst"}),
                              ("a stream that ends at once", say(sse=[], stream=True)),
                              ("only a role, then the end", say(chunks=[chunk({"role": "assistant"})])),
                              ("an error as first event", say(chunks=[{"error": {"message": "no"}}], stream=True))):
            for way in (False, True):
                if not way and "chunks" in failure and "stream" not in failure:
                    continue
                with self.subTest(name, stream=way):
                    self.setUp()
                    self.provider.play({"m1": [failure], "m2": [say("from m2")], "m3": [say("from m3")]})
                    answer = self.ask(prompt(stream=way))
                    self.assertEqual(answer.status, 200, answer)
                    self.assertEqual((answer.message["content"], answer.message["model"], answer.headers["x-ccr-model"]),
                                     ([text_block("from m2")], "m2", "prov,m2"))
                    self.assertEqual([r.model for r in self.provider.requests], ["m1", "m2"])

    def test_a_request_that_is_wrong_in_itself_goes_nowhere_else(self):
        for status in (400, 413, 422):
            with self.subTest(status):
                self.provider.play({"m1": [refuse(status, "your fault")], "m2": [say("from m2")]})
                self.assertEqual(self.ask().status, status)
                self.assertEqual([r.model for r in self.provider.requests], ["m1"])

    def test_after_the_first_word_nobody_takes_over(self):
        self.provider.play({"m1": [say("some words from m1", die=4)], "m2": [say("from m2")]})
        self.assertIn("error", self.ask(prompt(stream=True)).message)
        self.assertEqual([r.model for r in self.provider.requests], ["m1"])

    def test_when_all_fail_the_wanted_models_error_comes_back(self):
        self.provider.play({"m1": [refuse(503, "first is busy")], "m2": [refuse(500, "second broke")],
                            "m3": [refuse(500, "third broke")]})
        for way, answer in self.both_ways():
            with self.subTest(way):
                self.assert_error(answer, 503, "overloaded_error", "first is busy")

    def test_a_named_model_is_an_order(self):
        self.provider.play({"m1": [say("from m1")], "m2": [say("from m2")], "m3": [refuse(503, "busy")]})
        self.assert_error(self.ask(prompt(model="prov,m3")), 503, "overloaded_error", "busy")


class TestFreshMachine(unittest.TestCase):
    def test_without_a_config_the_demo_answers_and_no_file_is_written(self):
        proxy = Ccr(None)
        try:
            words = proxy.words()
            self.assertIn("http://127.0.0.1:%d" % proxy.port, words)
            self.assertIn("curl ", words)
            self.assertIn("demo,demo", words)
            for stream in (False, True):
                answer = proxy.ask(prompt("What is the answer?", stream=stream))
                text = "".join(b["text"] for b in answer.message["content"])
                self.assertRegex(text, "(?s)ccr init.*restart")
                self.assertIn("What is the answer?", text)
                self.assertEqual({b["type"] for b in answer.message["content"]}, {"text"})
            self.assertFalse(os.path.exists(proxy.config_path))
        finally:
            self.assertEqual(proxy.stop(), 0)

    def test_the_curl_line_that_start_prints_works(self):
        if not shutil.which("curl"):
            self.skipTest("no curl here")
        proxy = Ccr(None)
        try:
            line = re.search(r"^.*?(curl .*)$", proxy.words(), re.M).group(1)
            done = subprocess.run(["sh", "-c", line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20,
                                  env={"PATH": os.environ["PATH"]})
            self.assertEqual(done.returncode, 0, done)
            self.assertIn(b"ccr", done.stdout)
        finally:
            proxy.stop()

    def test_an_empty_list_of_providers_is_the_same(self):
        proxy = Ccr({"Providers": []})
        try:
            self.assertEqual(proxy.ask().status, 200)
        finally:
            proxy.stop()

    def test_all_faults_of_a_config_are_told_at_once_and_without_a_traceback(self):
        for name, config, words in (
                ("several", {"Providers": [{"name": "a", "api_base_url": "file:///etc/passwd", "models": ["m"]},
                                           {"name": "b", "models": "m"}], "PORT": "x",
                             "Router": {"default": "aa,m"}, "APIKEY": 7},
                 (r"Providers\[0\]\.api_base_url", r"Providers\[1\]\.api_base_url", r"Providers\[1\]\.models", "PORT",
                  r"Router\.default.*aa", "APIKEY")),
                ("syntax", '{"Providers": [\n  {"name": }\n]}', ("line 2",)),
                ("a list", "[]", ("object",)),
                ("an unset variable as APIKEY", {"APIKEY": "$CCR_TEST_UNSET", "Providers": []}, ("CCR_TEST_UNSET",))):
            with self.subTest(name):
                proxy = Ccr(config, wait=False)
                self.assertGreater(proxy.process.wait(20), 0)
                for word in words:
                    self.assertRegex(proxy.words(), word)
                self.assertNotIn("Traceback", proxy.words())
                proxy.stop()

    def test_an_existing_config_with_things_we_do_not_have_still_works(self):
        provider = ScriptedProvider()
        config = """{ // a comment
            "Providers": [{"name": "prov", "api_base_url": "%s", "api_key": "k", "models": ["m1",], "transformer": {"use": ["deepsek", "gone.js"]}},],
            "transformers": [{"path": "/nowhere/plugin.js"}], "Router": {"default": "prov,m9",}, "SomethingNew": {"x": 1},
        }""" % provider.url
        proxy = Ccr(config)
        try:
            self.assertEqual(proxy.ask().status, 200)
            self.assertEqual(provider.requests[-1].model, "m9")
            for word in ("deepsek", "deepseek", "plugin.js", "m9"):
                self.assertIn(word, proxy.words())
        finally:
            proxy.stop()
            provider.stop()


class TestSigterm(unittest.TestCase):
    def setUp(self):
        self.provider = ScriptedProvider()
        self.proxy = Ccr({"Providers": [provider_entry(self.provider)]})

    def tearDown(self):
        self.provider.stop()
        self.proxy.stop()
        self.assertNotIn("Traceback", self.proxy.words())

    def test_live_streams_finish_new_connections_are_refused_and_then_it_ends_with_0(self):
        self.provider.play(say("abcde" * 30, pause=0.03))
        with self.proxy.wire() as idle, self.proxy.wire() as wire:
            idle.ask("GET", "/health").answer()
            wire.ask("POST", "/v1/messages", prompt(stream=True)).until(b"abcde")
            self.proxy.process.send_signal(signal.SIGTERM)

            def is_refused():
                try:
                    Wire(self.proxy.port, 1).leave()
                except OSError:
                    return True
            self.assertTrue(wait_for(is_refused, 5))
            rest = b"".join(iter(wire.more, b""))
            self.assertIn(b"message_stop", rest)
            self.assertEqual(rest.count(b"abcde"), 29)
        self.assertEqual(self.proxy.process.wait(10), 0)

    def test_a_second_signal_ends_it_at_once(self):
        self.provider.play(say("abcde" * 30, hang=5))
        with self.proxy.wire() as wire:
            wire.ask("POST", "/v1/messages", prompt(stream=True)).until(b"abcde")
            self.proxy.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            self.assertIsNone(self.proxy.process.poll(), "it must wait for the stream")
            self.proxy.process.send_signal(signal.SIGTERM)
            self.proxy.process.wait(10)

    @extended
    def test_an_endless_stream_gets_an_error_event_within_20_seconds(self):
        self.provider.play(say("abcde" * 30, hang=5))
        with self.proxy.wire(timeout=30) as wire:
            wire.ask("POST", "/v1/messages", prompt(stream=True)).until(b"abcde")
            self.proxy.process.send_signal(signal.SIGTERM)
            rest = b"".join(iter(wire.more, b""))
            self.assertIn(b"event: error", rest)
            self.assertNotIn(b"message_stop", rest)
        self.assertEqual(self.proxy.process.wait(10), 0)


# --- a hostile world: issue 6, by the numbers of trust.md

class TestFraming(CcrTest):
    """S4-S10: what is no clear request is a 400, and the connection ends."""

    def post(self, *lines, body=b"{}", version="1.1"):
        head = ["POST /v1/messages HTTP/" + version, "Host: 127.0.0.1:%d" % self.ccr.port, "Content-Type: application/json"]
        return "\r\n".join(head + list(lines)).encode("latin-1") + b"\r\n\r\n" + body

    def get(self, *lines, first="GET /health HTTP/1.1"):
        return "\r\n".join([first, "Host: 127.0.0.1:%d" % self.ccr.port] + list(lines)).encode("latin-1") + b"\r\n\r\n"

    def assert_refused(self, raw, statuses=(400,)):
        with self.ccr.wire(timeout=8) as wire:
            with contextlib.suppress(OSError):         # it may close before it has read everything
                wire.send(raw)
            answer = wire.answer()
            self.assertIn(answer.status, statuses, answer)
            self.assertIsNone(error_fault(answer.json))
            self.assertTrue(wire.is_closed(), "the connection stays open")
        self.assertEqual(self.provider.requests, [])

    def test_the_length_of_a_body_must_be_beyond_doubt(self):
        for value in ("-1", "+2", "2_0", "0x2", "2 2", "2,2", "", "two", "9" * 16, "2.0", "\xb2"):
            with self.subTest("Content-Length", value=value):
                self.assert_refused(self.post("Content-Length: " + value))
        chunked = b"2\r\n{}\r\n0\r\n\r\n"
        for name, raw in (
                ("two lengths", self.post("Content-Length: 2", "Content-Length: 3")),
                ("both kinds", self.post("Content-Length: 2", "Transfer-Encoding: chunked", body=chunked)),
                ("both kinds, other order", self.post("Transfer-Encoding: chunked", "Content-Length: 2", body=chunked)),
                ("identity", self.post("Transfer-Encoding: identity")),
                ("gzip, chunked", self.post("Transfer-Encoding: gzip, chunked", body=chunked)),
                ("chunked twice", self.post("Transfer-Encoding: chunked", "Transfer-Encoding: chunked", body=chunked)),
                ("nearly chunked", self.post("Transfer-Encoding: xchunked", body=chunked)),
                ("chunked in HTTP/1.0", self.post("Transfer-Encoding: chunked", body=chunked, version="1.0")),
                ("a space before the colon", self.post("Content-Length : 2")),
                ("a space in the name", self.post("Content Length: 2", "Content-Length: 2")),
                ("a folded line", self.post("X-A: 1", " b", "Content-Length: 2")),
                ("a line without a colon", self.post("hello", "Content-Length: 2")),
                ("an empty name", self.post(": x", "Content-Length: 2")),
                ("a NUL", self.post("X-A: \0", "Content-Length: 2")),
                ("a bare CR", self.post("X-A: 1\rContent-Length: 9", "Content-Length: 2"))):
            with self.subTest(name):
                self.assert_refused(raw)

    def test_the_same_length_twice_is_no_doubt(self):
        raw = json.dumps(prompt()).encode()
        with self.ccr.wire() as wire:
            wire.send(self.post(*["Content-Length: %d" % len(raw)] * 2, body=raw))
            self.assertIn(wire.answer().status, (200, 400))

    def test_chunks_must_be_exact(self):
        for name, body in (("no number", b"zz\r\n{}\r\n0\r\n\r\n"), ("negative", b"-2\r\n{}\r\n0\r\n\r\n"),
                           ("signed", b"+2\r\n{}\r\n0\r\n\r\n"),
                           ("prefixed", b"0x2\r\n{}\r\n0\r\n\r\n"), ("underscored", b"0_2\r\n{}\r\n0\r\n\r\n"),
                           ("empty size", b"\r\n{}\r\n0\r\n\r\n"),
                           ("enormous", b"FFFFFFFFFFFFFFFFF\r\n{}\r\n0\r\n\r\n"), ("data too long", b"2\r\n{}}\r\n0\r\n\r\n"),
                           ("data without end", b"2\r\n{}0\r\n\r\n" + b"x" * 20),
                           ("an endless size line", b"2;" + b"x" * 200000)):
            with self.subTest(name):
                self.assert_refused(self.post("Transfer-Encoding: chunked", body=body), (400, 413, 431))

    def test_a_request_line_must_be_one(self):
        for name, raw in (("HTTP/0.9", b"GET /health\r\n\r\n"), ("no version", self.get(first="GET /health")),
                          ("another protocol", self.get(first="GET /health HTPP/1.1")),
                          ("HTTP/2", self.get(first="GET /health HTTP/2.0")), ("HTTP/9", self.get(first="GET /health HTTP/9.9")),
                          ("a version with words", self.get(first="GET /health HTTP/1.x")),
                          ("four words", self.get(first="GET /health x HTTP/1.1")),
                          ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)) + b"\r\n\r\n"),
                          ("nothing but NULs", b"\0" * 64 + b"\r\n\r\n"),
                          ("an empty method", self.get(first=" /health HTTP/1.1")),
                          ("no Host", b"GET /health HTTP/1.1\r\n\r\n"), ("two Hosts", self.get("Host: localhost"))):
            with self.subTest(name):
                self.assert_refused(raw)

    def test_heads_are_bounded(self):
        for name, raw in (("a long line", self.get(first="GET /%s HTTP/1.1" % ("x" * 200000))),
                          ("a long header", self.get("X-A: " + "x" * 200000)),
                          ("many headers", self.get(*["X-%d: 1" % n for n in range(3000)]))):
            with self.subTest(name):
                self.assert_refused(raw, (400, 414, 431))

    def test_an_enormous_body_is_refused_before_it_is_read(self):
        for length in (10 ** 12, 999999999999999):
            self.assert_refused(self.post("Content-Length: %d" % length), (413,))

    def test_nothing_is_relayed_by_its_request_line(self):
        for method, target in (("GET", "http://evil.example/"), ("POST", self.provider.url),
                               ("CONNECT", "127.0.0.1:%d" % self.provider.port),
                               ("TRACE", "/health"), ("PROPFIND", "/health"), ("get", "/health"), ("OPTIONS", "*"),
                               ("GET", "//evil.example/health"), ("GET", "health")):
            with self.subTest(method + " " + target), self.ccr.wire() as wire:
                answer = wire.ask(method, target, {} if method == "POST" else None).answer(method)
                self.assertIn(answer.status, (400, 403, 404, 405, 421, 501), answer)
        self.assertEqual(self.provider.requests, [])

    def test_a_refused_body_is_never_taken_for_the_next_request(self):
        inner = self.get()
        for name, path, headers, status in (("unknown path", "/v1/nothing", {}, 404),
                                            ("foreign origin", "/v1/messages", {"Origin": "http://evil.example"}, 403),
                                            ("wrong method", "/health", {}, 405)):
            with self.subTest(name), self.ccr.wire() as wire:
                self.assertEqual(wire.ask("POST", path, inner, headers).answer().status, status)
                try:
                    answer = wire.ask("GET", "/v1/models").answer()
                except (OSError, Broken):
                    continue                                   # it closed the connection: as good
                self.assertEqual((answer.status, "data" in answer.json), (200, True))

    def test_http_1_0_gets_an_answer_without_chunks_and_then_the_end(self):
        for stream in (False, True):
            with self.subTest(stream=stream), self.ccr.wire() as wire:
                answer = wire.ask("POST", "/v1/messages", prompt(stream=stream), version="1.0").answer()
                self.assertEqual((answer.status, answer.message["content"]), (200, [text_block("scripted answer")]))
                self.assertNotIn("transfer-encoding", answer.headers)
                self.assertTrue(wire.is_closed())

    def test_connection_close_is_heard(self):
        with self.ccr.wire() as wire:
            self.assertEqual(wire.ask("POST", "/v1/messages", prompt(stream=True),
                                      {"Connection": "close"}).answer().message["stop_reason"], "end_turn")
            self.assertTrue(wire.is_closed())

    def test_requests_in_one_packet_are_answered_in_order(self):
        with self.ccr.wire() as wire:
            wire.send(self.get() + request_bytes(self.ccr.port, "POST", "/v1/messages", prompt(stream=True)) + self.get())
            self.assertEqual([wire.answer().status for _ in range(3)], [200, 200, 200])

    def test_a_request_cut_anywhere_harms_nobody(self):
        raw = request_bytes(self.ccr.port, "POST", "/v1/messages", prompt())
        for n in range(0, len(raw), 3):
            with self.ccr.wire() as wire:
                wire.send(raw[:n])
                wire.leave(reset=n % 2 == 1)
        self.assertEqual(self.ask().status, 200)

    def test_a_request_may_come_in_any_pieces(self):
        raw = request_bytes(self.ccr.port, "POST", "/v1/messages", prompt())
        with self.ccr.wire() as wire:
            for n in range(0, len(raw), 40):
                wire.send(raw[n:n + 40])
                time.sleep(0.002)
            self.assertEqual(wire.answer().status, 200)


class TestGate(CcrTest):
    """B1-B4, B7: what a web page can do here, which is nothing."""
    ROUTES = [("GET", "/health"), ("GET", "/"), ("HEAD", "/"), ("POST", "/v1/messages"), ("POST", "/v1/messages/count_tokens"),
              ("GET", "/v1/models"),
              ("POST", "/v1/chat/completions"), ("POST", "/v1/responses"), ("GET", "/ui/"), ("GET", "/api/config"),
              ("POST", "/api/config"), ("PUT", "/api/config"),
              ("GET", "/api/turns"), ("GET", "/api/stats"), ("POST", "/api/providers/test"), ("GET", "/nothing")]

    def asked(self, method, path, headers):
        with self.ccr.wire() as wire:
            return wire.ask(method, path, prompt() if method in ("POST", "PUT") else None, headers).answer(method)

    def test_a_foreign_name_for_this_machine_is_refused_on_every_route(self):
        for method, path in self.ROUTES:
            with self.subTest(method + " " + path):
                self.assertIn(self.asked(method, path, {"Host": "evil.example"}).status, (403, 421))
        self.assertEqual(self.provider.requests, [])

    def test_which_names_are_ours(self):
        port = self.ccr.port
        for host, ours in (("127.0.0.1", True), ("127.0.0.1:%d" % port, True), ("localhost:%d" % port, True), ("LocalHost", True),
                           ("[::1]:%d" % port, True),
                           ("127.8.9.10:1", True), ("evil.example:%d" % port, False), ("127.0.0.1.evil.example", False),
                           ("localhost.evil.example", False),
                           ("evil.example@127.0.0.1", False), ("127.0.0.1:80@evil.example", False), ("192.168.1.1", False),
                           ("0.0.0.0", False), ("128.0.0.1", False),
                           ("127.0.0.1evil", False), ("", False), ("[::2]", False)):
            with self.subTest(host):
                self.assertIn(self.asked("GET", "/v1/models", {"Host": host}).status, (200,) if ours else (400, 403, 421))

    def test_a_page_of_another_origin_is_refused_on_every_route(self):
        for method, path in self.ROUTES:
            for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
                with self.subTest(method + " " + path, **headers):
                    answer = self.asked(method, path, dict(headers, **{"Content-Type": "text/plain"}))
                    self.assertEqual(answer.status, 403, answer)
                    self.assertFalse([h for h in answer.headers if h.startswith("access-control")])
        self.assertEqual(self.provider.requests, [])

    def test_which_origins_are_ours(self):
        port = self.ccr.port
        for origin, ours in (("http://127.0.0.1:%d" % port, True), ("http://localhost:%d" % port, True),
                             ("http://127.0.0.1", False),
                             ("http://127.0.0.1:%d" % (port - 1), False), ("http://127.0.0.1:%d.evil.example" % port, False),
                             ("http://localhost:%d@evil.example" % port, False),
                             ("http://localhost.evil.example:%d" % port, False), ("file://", False), ("", False),
                             ("http://127.0.0.1:%d1" % port, False),
                             ("chrome-extension://abcdef", False)):
            with self.subTest(origin):
                self.assertEqual(self.asked("GET", "/v1/models", {"Origin": origin}).status, 200 if ours else 403)

    def test_programs_send_no_origin_and_pages_of_ours_are_same_origin(self):
        for headers in ({}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}):
            self.assertEqual(self.asked("GET", "/v1/models", headers).status, 200)

    def test_no_preflight_is_ever_granted(self):
        for _, path in self.ROUTES:
            for origin in ("http://evil.example", "http://127.0.0.1:%d" % self.ccr.port):
                answer = self.asked("OPTIONS", path, {"Origin": origin, "Access-Control-Request-Method": "POST",
                                                      "Access-Control-Request-Headers": "content-type",
                                                      "Access-Control-Request-Private-Network": "true"})
                self.assertIn(answer.status, (403, 405))
                self.assertFalse([h for h in answer.headers if h.startswith("access-control")])

    def test_headers_of_a_provider_do_not_reach_the_client(self):
        self.provider.play(say("x", headers={"Access-Control-Allow-Origin": "*", "Set-Cookie": "a=b", "X-Evil": "1"}))
        for _, answer in self.both_ways():
            self.assertFalse({"access-control-allow-origin", "set-cookie", "x-evil"} & set(answer.headers))

    def test_an_upgrade_is_ignored(self):
        answer = self.asked("GET", "/health", {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": "AAAA",
                                               "Sec-WebSocket-Version": "13"})
        self.assertEqual(answer.status, 200)

    def test_a_get_changes_nothing(self):
        before = open(self.ccr.config_path, "rb").read()
        for path in ("/api/config?Router.default=x", "/api/restart", "/api/config/save", "/api/logs?file=/etc/passwd",
                     "/api/logs/../../etc/passwd", "/ui/../config.json",
                     "/ui/%2e%2e/config.json", "/ui//etc/passwd", "/ui/..%2f..%2fetc/passwd"):
            with self.subTest(path):
                answer = self.asked("GET", path, {})
                self.assertNotIn(PROVIDER_KEY, answer.body.decode())
                self.assertNotIn("root:", answer.body.decode())
        self.assertEqual(open(self.ccr.config_path, "rb").read(), before)


class TestApiKey(CcrTest):
    """A1-A7."""
    KEY = "client-secret-42"

    @classmethod
    def config(cls):
        return {"Providers": [provider_entry(cls.provider)], "APIKEY": cls.KEY, "HOST": "0.0.0.0"}

    def test_every_route_but_health_and_the_page_wants_the_key(self):
        for method, path in TestGate.ROUTES:
            with self.subTest(method + " " + path):
                answer = self.ccr.fetch(method, path, prompt() if method in ("POST", "PUT") else None)
                if path in ("/health", "/ui/", "/"):
                    self.assertLess(answer.status, 400)
                    self.assertNotIn(self.KEY, answer.body.decode())
                else:
                    self.assert_error(answer, 401, "authentication_error")
        self.assertEqual(self.provider.requests, [])

    def test_both_kinds_of_key_are_taken(self):
        for name, headers in (("bearer", {"Authorization": "Bearer " + self.KEY}), ("x-api-key", {"x-api-key": self.KEY}),
                              ("lower case scheme", {"authorization": "bearer " + self.KEY}),
                              ("both", {"Authorization": "Bearer " + self.KEY, "x-api-key": self.KEY}),
                              ("a foreign bearer beside it", {"Authorization": "Bearer other", "x-api-key": self.KEY})):
            with self.subTest(name):
                self.assertEqual(self.ask(headers=headers).status, 200)

    def test_nothing_else_opens(self):
        for name, headers in (("wrong", {"x-api-key": "wrong"}), ("prefix", {"x-api-key": self.KEY[:-1]}),
                              ("longer", {"x-api-key": self.KEY + "x"}), ("empty", {"x-api-key": ""}),
                              ("empty bearer", {"Authorization": "Bearer "}), ("only the scheme", {"Authorization": "Bearer"}),
                              ("basic", {"Authorization": "Basic " + self.KEY}),
                              ("bytes beyond ASCII", {"x-api-key": "\xff\xfe\xe9"}),
                              ("other case", {"x-api-key": self.KEY.upper()}), ("in a cookie", {"Cookie": "key=" + self.KEY})):
            with self.subTest(name):
                self.assert_error(self.ask(headers=headers), 401, "authentication_error")
        for path in ("/health/../v1/messages", "/v1/messages?/health", "//health/v1/messages", "/v1/messages#/health",
                     "/health%2f..%2fv1/messages", "/ui/../v1/messages",
                     "/v1/messages/", "/V1/messages", "/v1/messages?x-api-key=" + self.KEY, "/preset/x/v1/messages"):
            with self.subTest(path):
                self.assertIn(self.ask(path=path).status, (400, 401, 404))
        self.assertEqual(self.provider.requests, [])

    def test_the_key_is_asked_for_before_the_body_is_read(self):
        with self.ccr.wire(timeout=5) as wire:
            wire.send(b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 30000000\r\n\r\n{")
            answer = wire.answer()
            self.assertEqual(answer.status, 401)

    def test_with_a_key_other_names_of_this_machine_are_fine(self):
        self.assertEqual(self.ask(headers={"Host": "nas.local:3456", "x-api-key": self.KEY}).status, 200)
        self.assertEqual(self.ask(headers={"Host": "nas.local:3456"}).status, 401)
        self.assertEqual(self.ask(headers={"Host": "nas.local:3456", "x-api-key": self.KEY,
                                           "Origin": "http://evil.example"}).status, 403)

    def test_it_listens_where_the_config_says(self):
        with Wire(self.ccr.port, host="127.0.0.2") as wire:
            self.assertEqual(wire.ask("GET", "/health").answer().status, 200)

    def test_a_blank_key_is_no_key_and_keeps_it_on_loopback(self):
        for value in ("", "   ", None):
            with self.subTest(value=value):
                proxy = Ccr({"Providers": [provider_entry(self.provider)], "APIKEY": value, "HOST": "0.0.0.0"})
                try:
                    self.assertRaises(OSError, Wire, proxy.port, 2, "127.0.0.2")
                    self.assertIn("127.0.0.1", proxy.words())
                finally:
                    proxy.stop()


class TestSecrets(CcrTest):
    """A4, A5, C6, S12, U16: keys stay where they belong, whatever the provider echoes and the client writes."""
    ODD_KEY = 'sk-odd"key\\with/marks+%41-0123456789'
    env = {"URL_KEY": "url-secret-0123456789"}

    @classmethod
    def config(cls):
        return {"LOG": True, "LOG_LEVEL": "debug", "APIKEY": "client-secret-0123456789", "Providers": [
            provider_entry(cls.provider), provider_entry(cls.provider, "odd", key=cls.ODD_KEY),
            provider_entry(cls.provider, "query", key=None, path="/v1/chat/completions?key=$URL_KEY"),
            provider_entry(cls.provider, "gem", path="/v1beta/models/", transformer={"use": ["gemini"]})]}

    SECRETS = (PROVIDER_KEY, ODD_KEY, "url-secret-0123456789", "client-secret-0123456789")

    def ask(self, body=None, path="/v1/messages", headers=None, timeout=20):
        return super().ask(body, path, dict({"x-api-key": "client-secret-0123456789"}, **(headers or {})), timeout)

    def assert_no_secret(self, text, where):
        for secret in self.SECRETS:
            for form in (secret, json.dumps(secret)[1:-1], urllib.parse.quote(secret)):
                self.assertNotIn(form, text, where)

    def strings(self, value):
        if isinstance(value, str):
            yield value
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from self.strings(item)

    def test_keys_stand_in_no_error_and_no_log(self):
        echo = " and ".join(self.SECRETS) + " are wrong: Bearer " + PROVIDER_KEY
        for name, reply in (("an error object", refuse(401, echo)), ("text", refuse(400, body=echo)),
                            ("HTML", refuse(502, body="<p>" + echo)), ("JSON of another kind", refuse(200, body={"a": echo})),
                            ("a redirect", refuse(302, headers={"Location": "http://x.example/" + PROVIDER_KEY}, body="")),
                            ("a stream that breaks", say(chunks=[chunk({"content": "x"}), {"error": {"message": echo}}])),
                            ("a frame that is no JSON", say(sse=[sse_frame(chunk({"content": "x"})),
                                                                 b"data: {" + echo.encode() + b"\n\n"])),
                                                                 ("no HTTP", {"raw": echo.encode() + b"\r\n\r\n"})):
            for model in ("prov,m1", "odd,m1", "query,m1", "gem,m1"):
                self.provider.play(reply)
                for stream in (False, True):
                    with self.subTest(name, model=model, stream=stream):
                        answer = self.ask(prompt(model=model, stream=stream))
                        self.assert_no_secret(answer.body.decode() + repr(answer.headers), answer)
                        for text in self.strings(answer.json if answer.status != 200 or not stream else answer.events):
                            self.assert_no_secret(text, answer)
        self.assert_no_secret(self.ccr.words(), "stdout and stderr")
        logs = wait_for(lambda: self.ccr.logs().count('"model"') >= 10 and self.ccr.logs(), 5)
        self.assertTrue(logs, "nothing was logged")
        for line in logs.splitlines():
            for text in self.strings(json.loads(line)):
                self.assert_no_secret(text, line)
        with contextlib.suppress(OSError):
            self.assert_no_secret(open("/proc/%d/cmdline" % self.ccr.pid).read(), "command line")

    def test_nothing_that_a_client_writes_changes_address_key_or_scheme(self):
        evil = "http://evil.example:81/v1"
        more = {k: evil for k in ("api_base", "api_base_url", "base_url", "url", "proxy", "endpoint", "host", "api_key",
                                  "provider")}
        for name, body, headers in (
                ("in the body", prompt(model="prov,m1", **more), {}),
                ("deep in the body", prompt(model="prov,m1", metadata=more, litellm_params=more, extra_body=more), {}),
                ("in headers", prompt(model="prov,m1"), {"X-Api-Base": evil, "X-Forwarded-Host": "evil.example",
                                                         "X-Original-URL": evil, "Proxy": evil, "X-Provider-Key": "k"}),
                ("a path as model", prompt(model="gem,../../../steal?x=1#y"), {}),
                ("an address as model", prompt(model="gem,http://evil.example/x"), {}),
                ("spaces and line ends as model", prompt(model="gem,a b\r\nX-Evil: 1"), {}),
                ("line ends as model", prompt(model="prov,a\r\nX-Evil: 1\r\n\r\n"), {}),
                ("half a surrogate as model", prompt(model="gem,\ud800"), {}), ("NUL as model", prompt(model="gem,\0"), {})):
            for stream in (False, True):
                with self.subTest(name, stream=stream):
                    self.provider.play(say("fine"))
                    answer = self.ask(dict(body, stream=stream), headers=headers)
                    self.assertLess(answer.status, 500, answer)
                    self.assertNotIn("x-evil", answer.headers)
                    for seen in self.provider.requests:
                        self.assertRegex(seen.target,
                                         r"^(/v1/chat/completions|/v1beta/models/[^/?#\s:]+:(generateContent|streamGenerateContent\?alt=sse))$")
                        self.assertIn(PROVIDER_KEY, (seen.headers.get("authorization", "").replace("Bearer ", ""),
                                                     seen.headers.get("x-goog-api-key")))
                        self.assertNotIn("x-evil", seen.headers)
                        self.assertNotIn("evil", seen.headers["host"])

    def test_a_log_line_cannot_be_forged(self):
        forged = 'x"}\n{"level":"error","forged":true}\r\n\x1b[2J\u2028'
        self.ask(prompt(model="prov," + forged))
        self.ask(prompt(model=forged), headers={"X-Claude-Code-Session-Id": "a b\tc", "User-Agent": "\xff"})
        wait_for(lambda: "forged" in self.ccr.logs(), 5)
        for line in self.ccr.logs().split("\n"):
            if line:
                self.assertNotIn("forged", json.loads(line))
                self.assertNotIn("\x1b", line)


WRONG_VALUES = (None, 0, -1, True, "", "x", [], {}, [[]], [{}], {"type": 7}, 1e308, "\ud800")
NAMES_OF_FIELDS = (("messages.0.role", prompt(messages=[{"role": 7, "content": "x"}])),
                   ("messages.0.role", prompt(messages=[{"role": "nobody", "content": "x"}])),
                   ("messages.0.content", prompt(messages=[{"role": "user", "content": 5}])), ("messages", prompt(messages="hi")),
                   ("messages", {"model": "m", "max_tokens": 5}),
                   ("messages.1", prompt(messages=[{"role": "user", "content": "x"}, "y"])),
                   ("messages.0.content.0", prompt(messages=[{"role": "user", "content": [7]}])),
                   ("model", prompt(model=7)), ("tools", prompt(tools="x")), ("tools.0", prompt(tools=[3])),
                   ("system", prompt(system=9)), ("max_tokens", prompt(max_tokens="many")),
                   ("stream", prompt(stream="yes")))
CHAT_REQUEST = {"model": "prov,m1", "stream": False, "max_tokens": 9, "temperature": 0.5, "stop": ["x"], "tool_choice": "auto",
                "response_format": {"type": "json_object"},
                "messages": [{"role": "system", "content": "s"}, {"role": "user",
                                                                  "content": [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]},
                             {"role": "assistant", "content": None,
                              "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                             {"role": "tool", "tool_call_id": "c", "content": "r"}],
                "tools": [{"type": "function", "function": {"name": "f", "description": "d",
                                                            "parameters": {"type": "object", "properties": {}}}}]}
RESPONSES_REQUEST = {"model": "prov,m1", "stream": False, "instructions": "s", "max_output_tokens": 9,
                     "reasoning": {"effort": "low"}, "text": {"format": {"type": "text"}},
                     "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                               {"type": "reasoning", "id": "r", "summary": []},
                               {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                               {"type": "function_call_output", "call_id": "c", "output": "r"}],
                     "tools": [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}},
                               {"type": "custom", "name": "g"},
                               {"type": "namespace", "name": "mcp__x",
                                "tools": [{"type": "function", "name": "h", "parameters": {}}]}]}


def places(value, path=()):
    """Every path into a JSON value."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield path + (key,)
        yield from places(item, path + (key,))


def with_value(value, path, new):
    """A copy of `value` with `new` at `path`."""
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = with_value(copy[path[0]], path[1:], new) if len(path) > 1 else new
    return copy


def answer_fault(path, answer):
    """None, or what is wrong with an answer as a client of this path has to read it. An error is a good answer."""
    if answer.status != 200:
        error = answer.json.get("error") if isinstance(answer.json, dict) else None
        return error_fault(answer.json) if path.startswith("/v1/messages") else None if isinstance(error, dict) and error.get("message") else "no error: %r" % answer
    is_stream = "event-stream" in answer.headers.get("content-type", "")
    if path == "/v1/messages":
        return None if is_stream and answer.events else message_fault(answer.json)
    if not is_stream:
        return None if {"/v1/chat/completions": "choices",
                        "/v1/responses": "output"}.get(path, "input_tokens") in answer.json else "not an answer: %r" % answer
    last = answer.body.rstrip(b"\n").split(b"\n\n")[-1]
    good = (b"data: [DONE]", b'data: {"error"') if "chat" in path else (b"event: response.completed", b"event: response.failed",
                                                                        b"event: response.incomplete")
    return None if last.startswith(good) else "the stream ends with %r" % last


class TestWrongTypes(CcrTest):
    """S13."""
    BODIES = (("/v1/messages", claude_code_request(stream=False)), ("/v1/chat/completions", CHAT_REQUEST),
              ("/v1/responses", RESPONSES_REQUEST),
              ("/v1/messages/count_tokens", claude_code_request(stream=False)))

    def test_a_400_names_the_field(self):
        for field, body in NAMES_OF_FIELDS:
            with self.subTest(field, body=str(body)[:80]):
                self.assert_error(self.ask(body), 400, "invalid_request_error", re.escape(field))
        self.assertEqual(self.provider.requests, [])

    def cases(self):
        for path, body in self.BODIES:
            for place in places(body):
                for value in WRONG_VALUES:
                    yield path, body, place, value

    def check(self, cases):
        with self.ccr.wire() as wire:
            for path, body, place, value in cases:
                with self.subTest(path, place=place, value=value):
                    answer = wire.ask("POST", path, with_value(body, place, value)).answer()
                    self.assertLess(answer.status, 500, answer)
                    self.assertIsNone(answer_fault(path, answer))

    def test_no_wrong_type_is_worse_than_a_4xx(self):
        cases = list(self.cases())
        self.check(seeded("types").sample(cases, min(500, len(cases))))

    @extended
    def test_no_wrong_type_anywhere_is_worse_than_a_4xx(self):
        self.check(self.cases())


class TestBadProviders(CcrTest):
    """U-rows that are more than a reply of TestErrors."""

    @classmethod
    def config(cls):
        return {"Providers": [provider_entry(cls.provider)], "API_TIMEOUT_MS": 1500}

    def test_lies_floods_and_trickles_in_the_head_are_an_error_in_time(self):
        ok = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        for name, raw in (("a length beyond reason", ok + b"Content-Length: 1000000000000\r\n\r\n{}"),
                          ("a negative length", ok + b"Content-Length: -5\r\n\r\n{}"),
                          ("a length in words", ok + b"Content-Length: many\r\n\r\n{}"),
                          ("a flood of headers", ok + b"".join(b"X-%d: y\r\n" % n for n in range(5000)) + b"\r\n{}"),
                          ("an endless header", ok + b"X: " + b"y" * 300000 + b"\r\n\r\n{}"),
                          ("a flood of 100 Continue", b"HTTP/1.1 100 Continue\r\n\r\n" * 2000),
                          ("chunks that are none", ok + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"),
                          ("a chunk beyond reason", ok + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFF\r\n{}"),
                          ("status 999", b"HTTP/1.1 999 Odd\r\nContent-Length: 2\r\n\r\n{}"),
                          ("status 101", b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n"),
                          ("status 204", b"HTTP/1.1 204 No Content\r\n\r\n"),
                          ("status 000", b"HTTP/1.1 000 Odd\r\nContent-Length: 2\r\n\r\n{}")):
            self.provider.play({"raw": raw})
            for way, answer in self.both_ways():
                with self.subTest(name + " " + way):
                    self.assertGreaterEqual(answer.status, 400)
                    self.assertIsNone(error_fault(answer.json))

    def test_a_head_that_trickles_in_is_given_up(self):
        listener = socket.create_server(("127.0.0.1", 0))

        def trickle():
            with contextlib.suppress(OSError):
                connection = listener.accept()[0]
                for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"y" * 600:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.05)
        threading.Thread(target=trickle, daemon=True).start()
        proxy = Ccr({"Providers": [{"name": "slow", "api_base_url": "http://127.0.0.1:%d/v1" % listener.getsockname()[1],
                                    "models": ["m"]}], "API_TIMEOUT_MS": 1000})
        try:
            self.assert_error(proxy.ask(timeout=20), 504, "timeout_error", "slow")
        finally:
            listener.close()
            proxy.stop()

    def test_a_client_that_stops_reading_fills_no_memory_and_its_leaving_is_noticed(self):
        frame = sse_frame(chunk({"content": "x" * 60000}))
        self.provider.play(say(sse=[frame] * 5000))                    # 300 MB, if somebody took it
        wire = self.ccr.wire()
        wire.ask("POST", "/v1/messages", prompt(stream=True)).until(b"xxx")
        seen = self.provider.requests[0]
        time.sleep(1)
        self.assertFalse(seen.left.is_set(), "everything was read although nobody wants it")
        if os.path.exists("/proc/self/status"):
            self.assertLess(memory_kb(self.ccr.pid), 150000)
        wire.leave()
        self.assertTrue(seen.left.wait(2.5))

    @extended
    def test_an_event_without_end_is_an_error_before_memory_is_gone(self):
        # 200 MB in one line
        self.provider.play(say(sse=[b'data: {"choices":[{"delta":{"content":"'] + [b"x" * 100000] * 2000))
        answer = self.ask(prompt(stream=True), timeout=60)
        if answer.status == 200:
            self.assertIn("error", answer.message)
        else:
            self.assert_error(answer, 502, "api_error", "prov")

    @extended
    def test_endless_answers_to_plain_requests_are_bounded(self):
        self.provider.play(refuse(200, body=b" " * (300 << 20)))
        self.assert_error(self.ask(timeout=120), 502, "api_error", "prov")


def memory_kb(pid):
    with open("/proc/%d/status" % pid) as f:
        return int(re.search(r"VmRSS:\s+(\d+)", f.read()).group(1))


class TestSurroundings(unittest.TestCase):
    def test_a_stray_module_beside_the_program_is_not_imported(self):
        folder = tempfile.mkdtemp(dir=TEST_HOME)
        shutil.copy(CCR_PY, folder)
        for name in ("json", "select", "socket", "collections", "argparse", "subprocess"):
            with open(os.path.join(folder, name + ".py"), "w") as f:
                f.write("raise SystemExit('hijacked by %s')" % name)
        done = subprocess.run([sys.executable, os.path.join(folder, "ccr.py"), "--version"], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, cwd=folder)
        self.assertEqual((done.returncode, b"hijacked" in done.stdout), (0, False), done)

    def test_damaged_state_files_are_replaced(self):
        provider = ScriptedProvider()
        config = {"Providers": [provider_entry(provider)], "Router": {"default": "prov,m1"}}
        home = tempfile.mkdtemp(dir=TEST_HOME)
        try:
            for garbage in (None, b"\0\xff{garbage", b"", b"[]", b'{"a": NaN}'):
                with self.subTest(garbage=garbage):
                    folder = os.path.join(home, ".claude-code-router")
                    for path in glob.glob(folder + "/*") if garbage is not None else ():
                        if os.path.isfile(path) and not path.endswith("config.json"):
                            with open(path, "wb") as f:
                                f.write(garbage)
                    proxy = Ccr(config, home=home)
                    for n in range(3):
                        self.assertEqual(proxy.ask(prompt("many words " * 3000)).status, 200)
                    self.assertEqual(proxy.stop(), 0)
                    self.assertNotIn("Traceback", proxy.words())
        finally:
            provider.stop()


# --- fuzzers: the case number and CCR_TEST_SEED repeat a failure

NASTY = [b"\r\n", b"\n", b"\r", b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"{", b"}", b"[", b"]", b'"', b"\\",
         b"\\u", b"\\ud800", b"-1", b"1e999", b"9" * 40, b"NaN",
         b"null", b"true", b":", b": ", b",", b"data: ", b"data:[DONE]\n\n", b"event: error\n", b"\n\n", b"\r\n\r\n",
         b"Content-Length: 5\r\n", b"Content-Length: -1\r\n",
         b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n", b"Connection: close\r\n", b"Expect: 100-continue\r\n",
         b"0\r\n\r\n", b"ffffffff\r\n", b"HTTP/1.1 200 OK\r\n",
         b"%00", b"../", b" " * 70, b"x" * 5000, b"tool_calls", b'"finish_reason":"stop"', b"<think>", b"</think>"]
NASTY_VALUES = [None, True, 0, -1, 1.5, 1e308, "", "x" * 3000, "\ud800", "\0", [], {}, [[[]]], {"": {}}, {"type": "text"}, "null",
                "[DONE]", "tool_use", 10 ** 30]


def damaged_bytes(rng, data):
    """`data` with one to four faults."""
    for _ in range(rng.randint(1, 4)):
        a, b = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
        b = min(b, a + rng.choice((1, 2, 5, 40)))
        data = rng.choice((
            lambda: data[:a] + bytes([rng.randrange(256)]) + data[a + 1:],
            lambda: data[:a] + rng.choice(NASTY) + data[a:],
            lambda: data[:a] + rng.choice(NASTY) + data[b:],
            lambda: data[:a] + data[b:],
            lambda: data[:b] + data[a:b] + data[b:],
            lambda: data[:a] if rng.random() < 0.3 else data[:a] + bytes([data[a] ^ (1 << rng.randrange(8))]) + data[a + 1:]
            if a < len(data) else data))()
    return data


def damaged_json(rng, value):
    """`value` with one to three of its members replaced, taken away, doubled or renamed."""
    for _ in range(rng.randint(1, 3)):
        paths = list(places(value))
        if not paths:
            return rng.choice(NASTY_VALUES)
        path = rng.choice(paths)
        holder = functools.reduce(lambda v, k: v[k], path[:-1], value)
        kind = rng.randrange(4)
        if kind == 0 and isinstance(holder, dict):
            new = {k: v for k, v in holder.items() if k != path[-1]}
        elif kind == 1 and isinstance(holder, list):
            new = holder + holder
        elif kind == 2 and isinstance(holder, dict):
            new = {(k if k != path[-1] else k + "x"): v for k, v in holder.items()}
        else:
            new = with_value(holder, path[-1:], rng.choice(NASTY_VALUES))
        value = with_value(value, path[:-1], new) if len(path) > 1 else new
    return value


class TestFuzz(CcrTest):
    """Damaged requests and damaged replies: always a well-formed error or a well-formed answer, never a 5xx for the client's mistake."""
    EGRESS = {"openai": ("/v1/chat/completions", None), "anthropic": ("/v1/messages", ["anthropic"]),
              "responses": ("/v1/responses", ["openai-responses"]),
              "gemini": ("/v1beta/models/", ["gemini"])}
    ASKS = {"/v1/messages": prompt(), "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
            "/v1/responses": {"input": "hi"}}

    @classmethod
    def config(cls):
        return {"fallback": False, "API_TIMEOUT_MS": 4000, "Providers":
                [provider_entry(cls.provider)] + [provider_entry(cls.provider, name, path=path,
                                                                 **({"transformer": {"use": use}} if use else {})) for name,
                                                                 (path, use) in cls.EGRESS.items()]}

    def run_cases(self, check, numbers):
        """check(n) for all numbers, eight at a time; the first failures are told with how to repeat them."""
        failures, todo = [], iter(numbers)
        lock = threading.Lock()

        def work():
            while len(failures) < 3:
                with lock:
                    n = next(todo, None)
                if n is None:
                    return
                try:
                    check(n)
                except Exception as e:
                    failures.append("case %d of CCR_TEST_SEED=%d: %s: %s" % (n, SEED, type(e).__name__, str(e)[:3000]))
        workers = [threading.Thread(target=work) for _ in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self.assertEqual(failures, [])
        self.assertEqual(self.ccr.fetch("GET", "/health").status, 200)

    def damaged_request(self, rng):
        """(path, bytes of a whole request, is its framing right?)."""
        path, body = rng.choice(TestWrongTypes.BODIES + (("/v1/messages", prompt(stream=True)),
                                                         ("/v1/messages", claude_code_request())))
        framed = rng.random() < 0.4
        raw = json.dumps(damaged_json(rng, body) if framed else body).encode()
        headers = {}
        if not framed and rng.random() < 0.3:
            raw = damaged_bytes(rng, raw)                              # damage in the body only: the framing is still right
            framed = True
        if rng.random() < 0.15:
            raw = gzip.compress(raw)
            raw = damaged_bytes(rng, raw) if framed and rng.random() < 0.5 else raw
            headers["Content-Encoding"] = "gzip"
        if rng.random() < 0.15:
            cut = rng.randrange(len(raw) + 1)
            raw = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (raw[:cut], raw[cut:]) if p) + b"0\r\n\r\n"
            headers.update({"Transfer-Encoding": "chunked", "Content-Length": None})
        whole = request_bytes(self.ccr.port, "POST", path, raw, headers)
        return path, whole if framed else damaged_bytes(rng, whole), framed

    def check_request(self, n):
        path, raw, is_framed = self.damaged_request(seeded("request/%d" % n))
        with self.ccr.wire(timeout=20) as wire:
            with contextlib.suppress(OSError):
                wire.send(raw)
            if is_framed:
                answer = wire.answer()
                assert answer.status < 500, answer
                fault = answer_fault(path, answer)
                assert not fault, fault
                return
            is_waiting = not select.select([wire.sock], [], [], 0.1)[0]
            if is_waiting:                                             # it may rightly wait for the rest: there is none
                with contextlib.suppress(OSError):
                    wire.sock.shutdown(socket.SHUT_WR)
            try:
                answer = wire.answer()
            except (Broken, OSError) as e:
                assert is_waiting and not getattr(e, "data",
                                                  b""), "dropped without a word or broken: %s after %r" % (e, raw[:2000])
                return
            assert answer.status < 500, answer
            assert "event-stream" in answer.headers.get("content-type", "") or isinstance(answer.json, (dict, list)), answer

    def damaged_reply(self, rng, path, model):
        """Bytes of a whole HTTP reply in the provider's format."""
        reply = say(rng.choice(("hello there", "<think>a</think>b", "")), rng.choice(("hm hm", "")),
                    rng.choice(([], [("f", {"a": [1, "é"]})], [("f", {}), ("g", {"b": "c"})])),
                    rng.choice((None, "length")))
        payloads, whole, named = wire_of(path, reply, model)
        is_stream, in_json = rng.random() < 0.7, rng.random() < 0.5
        if is_stream:
            if in_json:
                at = rng.randrange(len(payloads))
                payloads = payloads[:at] + ([damaged_json(rng, payloads[at])] if isinstance(payloads[at], dict)
                                            else []) + payloads[at + 1:]
            body = b"".join(sse_frame(p, named and isinstance(p, dict) and isinstance(p.get("type"), str))
                            if isinstance(p, (dict, str)) else b"data: %s\n\n" % json.dumps(p).encode()
                            for p in payloads)
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            cut = rng.randrange(len(body) + 1)
            raw = head + b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (body[:cut], body[cut:]) if p) + b"0\r\n\r\n"
        else:
            body = json.dumps(damaged_json(rng, whole) if in_json else whole).encode()
            status = rng.choice((200, 200, 200, 400, 429, 500))
            raw = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body
        return raw if in_json and rng.random() < 0.8 else damaged_bytes(rng, raw)

    def check_reply(self, n):
        rng = seeded("ask/%d" % n)
        egress, (path, body) = rng.choice(list(self.EGRESS)), rng.choice([("/v1/messages", self.ASKS["/v1/messages"])] * 3
                                                                         + list(self.ASKS.items()))
        body = dict(body, model="%s,case-%d" % (egress, n), stream=rng.random() < 0.7)
        with self.ccr.wire(timeout=20) as wire:
            answer = wire.ask("POST", path, body).answer()
        assert 200 <= answer.status, answer
        fault = answer_fault(path, answer)
        assert not fault, fault

    def play_damaged_replies(self):
        def reply(seen):
            n = int(re.search(r"case-(\d+)", seen.model or seen.path).group(1))
            return {"raw": self.damaged_reply(seeded("reply/%d" % n), seen.path, "m1")}
        self.provider.play(reply)

    def test_five_hundred_damaged_requests(self):
        self.run_cases(self.check_request, range(500))

    def test_five_hundred_damaged_replies(self):
        self.play_damaged_replies()
        self.run_cases(self.check_reply, range(500))

    @extended
    def test_ten_thousand_damaged_requests(self):
        self.run_cases(self.check_request, range(500, 10000))

    @extended
    def test_ten_thousand_damaged_replies(self):
        self.play_damaged_replies()
        self.run_cases(self.check_reply, range(500, 10000))


# --- load: the figures of issue 6

def process_facts(pid):
    """(resident kB, open files, threads) of a process."""
    return memory_kb(pid), len(os.listdir("/proc/%d/fd" % pid)), len(os.listdir("/proc/%d/task" % pid))


@extended
@unittest.skipUnless(os.path.isdir("/proc/self/fd"), "needs /proc")
class TestLoad(CcrTest):
    STREAMS, EVENTS, IDLE = 200, 200, 200

    @classmethod
    def setUpClass(cls):
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY and hard < 65536 else max(soft, 4096),
                                                    hard))
        super().setUpClass()

    def frames_of(self, name):
        return [sse_frame(chunk({"content": "<%s:%d>" % (name, n)}))
                for n in range(self.EVENTS)] + [sse_frame(chunk(finish="stop")), sse_frame("[DONE]")]

    def watch_health(self, times, is_over):
        while not is_over.is_set():
            began = time.perf_counter()
            assert self.ccr.fetch("GET", "/health").status == 200
            times.append(time.perf_counter() - began)
            is_over.wait(0.05)

    def collect(self, wires):
        """What each of these connections got until the end of its answer, all read by one loop."""
        selector, got = selectors.DefaultSelector(), {}
        for name, wire in wires.items():
            wire.sock.setblocking(False)
            selector.register(wire.sock, selectors.EVENT_READ, (name, wire))
            got[name] = bytearray()
        end = time.monotonic() + 120
        while selector.get_map() and time.monotonic() < end:
            for key, _ in selector.select(1):
                name, wire = key.data
                data = wire.sock.recv(1 << 20)
                got[name] += data
                if not data or got[name].endswith(b"0\r\n\r\n"):
                    selector.unregister(wire.sock)
        return got

    def test_200_streams_beside_200_idle_connections_are_exact_and_health_answers(self):
        frames = {"s%d" % n: self.frames_of("s%d" % n) for n in range(self.STREAMS)}
        self.provider.play(lambda seen: say(sse=frames[seen.body["messages"][-1]["content"]], pause=0.02))
        idle = [self.ccr.wire().send(b"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1\r\n") for _ in range(self.IDLE)]
        times, is_over = [], threading.Event()
        watcher = threading.Thread(target=self.watch_health, args=(times, is_over))
        watcher.start()
        wires = {name: self.ccr.wire(timeout=60).ask("POST", "/v1/messages", prompt(name, stream=True)) for name in frames}
        got = self.collect(wires)
        is_over.set()
        watcher.join()
        for wire in list(wires.values()) + idle:
            wire.leave()
        for name, data in got.items():
            with self.subTest(name):
                replay = socket.socketpair()
                wire = Wire.__new__(Wire)
                wire.sock, wire.data = replay[0], bytes(data)
                replay[1].close()
                self.assertEqual(wire.answer().message["content"],
                                 [text_block("".join("<%s:%d>" % (name, n) for n in range(self.EVENTS)))])
                replay[0].close()
        times.sort()
        print("  %d health answers meanwhile: median %.0f ms, p90 %.0f ms, worst %.0f ms" % (
            len(times), times[len(times) // 2] * 1000, times[len(times) * 9 // 10] * 1000, times[-1] * 1000), file=sys.stderr)
        self.assertLess(times[len(times) * 9 // 10], 0.25)

    def run_and_leave(self, requests, leavers):
        """So many requests in a row, and so many clients that leave in mid-stream -> seconds until each one's upstream ended."""
        self.provider.play(lambda seen: say("abcdefghij" * 300, pause=0.02) if "leave" in seen.text() else say("fine " * 20))
        with self.ccr.wire() as wire:
            for n in range(requests):
                answer = wire.ask("POST", "/v1/messages", prompt("work " * 100, stream=n % 2 == 0)).answer()
                self.assertEqual(answer.message["content"], [text_block("fine " * 20)])
        left = {}
        for batch in range(0, leavers, 20):
            wires = {"leave-%d-" % n: self.ccr.wire().ask("POST", "/v1/messages", prompt("leave-%d-" % n, stream=True))
                     for n in range(batch, batch + 20)}
            for name, wire in wires.items():
                wire.until(b"abc")
                left[name] = time.monotonic()
                wire.leave(reset=len(left) % 2 == 0)
        ends = {r.body["messages"][-1]["content"]: r for r in self.provider.requests if "leave" in r.text()}
        self.assertEqual(len(ends), leavers)
        self.assertTrue(all(r.left.wait(10) for r in ends.values()))
        return sorted(ends[name].left_at - at for name, at in left.items())

    def test_2000_requests_and_300_leavers_leave_nothing_behind(self):
        self.run_and_leave(300, 60)
        time.sleep(1)
        memory, files, threads = process_facts(self.ccr.pid)
        seconds = self.run_and_leave(2000, 300)
        wait_for(lambda: process_facts(self.ccr.pid)[1] <= files and process_facts(self.ccr.pid)[2] <= threads, 10)
        after = process_facts(self.ccr.pid)
        print("  memory %d -> %d kB, files %d -> %d, threads %d -> %d; upstream ended after %.0f ms (median), %.0f ms (worst)" % (
            memory, after[0], files, after[1], threads, after[2], seconds[len(seconds) // 2] * 1000, seconds[-1] * 1000),
            file=sys.stderr)
        self.assertLess(after[0], memory * 1.2)
        self.assertLessEqual(after[1], files)
        self.assertLessEqual(after[2], threads)
        self.assertLess(seconds[-1], 2)

    def test_a_burst_of_connections_waits_for_no_retry_of_its_first_packet(self):
        wires = []
        began = time.monotonic()
        for _ in range(300):
            wires.append(self.ccr.wire().ask("GET", "/health"))
        for wire in wires:
            self.assertEqual(wire.answer().status, 200)
            wire.leave()
        self.assertLess(time.monotonic() - began, 20)


@extended
class TestIdleConnections(CcrTest):
    """S1: who sends nothing is let go within a minute; who waits for an answer is not."""

    def test_slow_heads_slow_bodies_and_idle_connections_are_closed(self):
        self.provider.play(say("abc", before=64))
        with self.ccr.wire(timeout=90) as nothing, self.ccr.wire(timeout=90) as head, self.ccr.wire(timeout=90) as body, self.ccr.wire(timeout=90) as idle, \
                self.ccr.wire(timeout=90) as live:
            live.ask("POST", "/v1/messages", prompt(stream=True))
            head.send(b"GET /health HTTP/1.1\r\nHost: 127")
            body.send(b"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
            idle.ask("GET", "/health").answer()
            end = time.monotonic() + 63
            for name, wire in (("sent nothing", nothing), ("half a head", head), ("half a body", body),
                               ("idle after an answer", idle)):
                with self.subTest(name):
                    wire.sock.settimeout(max(0.1, end - time.monotonic()))
                    try:
                        while wire.more():
                            pass
                    except ConnectionError:
                        pass
            self.assertEqual(live.answer().message["content"], [text_block("abc")])


# --- the real client: Claude Code itself, offline, in a network namespace that has loopback only

def find_claude():
    """CLAUDE_BIN, then PATH, then where .ci/run installs it; the native program, not the npm wrapper."""
    native = "node_modules/@anthropic-ai/claude-code-linux-*/claude"
    prefixes = [os.environ.get("CCR_CI_CACHE", os.path.join(REAL_HOME, ".cache", "ccr-ci"))]
    found = [os.environ.get("CLAUDE_BIN"), shutil.which("claude")]
    for prefix in prefixes:
        found += glob.glob(os.path.join(prefix,
                                        native)) + glob.glob(os.path.join(prefix, "node_modules/@anthropic-ai/claude-code",
                                                                          native))
    return next((os.path.realpath(f) for f in found if f and os.access(f, os.X_OK)), None)


@functools.lru_cache(None)
def namespace_command():
    """The command prefix that gives a private network, or None. Its processes end with it."""
    for flags in (["-n"], ["-Urn"]):
        command = ["unshare"] + flags + ["-p", "-f", "--kill-child", "--mount-proc"]
        with contextlib.suppress(OSError):
            if subprocess.run(command + ["true"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
                return command


def loopback_up():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        flags = struct.unpack("16sh", fcntl.ioctl(s, 0x8913, struct.pack("16sh", b"lo", 0)))[1]      # SIOCGIFFLAGS
        fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", flags | 1))                                # SIOCSIFFLAGS, IFF_UP


def in_namespace(test):
    """The test runs in another process, in a namespace of its own, where it can reach nothing but this machine's loopback."""
    @functools.wraps(test)
    def outside(self):
        if os.environ.get("CCR_TEST_INSIDE"):
            return test(self)
        name = "%s.%s" % (type(self).__name__, test.__name__)
        done = subprocess.run(namespace_command() + [sys.executable, os.path.join(HERE, "test_ccr.py"), name],
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, env=dict(os.environ, CCR_TEST_INSIDE="1", CLAUDE_BIN=find_claude(),
                                                                 CCR_TEST_SEED=str(SEED)), timeout=240)
        if done.returncode:
            self.fail("inside the namespace:\n" + done.stdout.decode("utf-8", "replace")[-6000:])
    return outside


class Conversation:
    """What a request to the provider is about: the last @@name@@ in user text, how many answers came after it, results, images."""

    def __init__(self, seen):
        self.seen, self.name, self.turn, self.results, self.images = seen, None, 0, [], []
        for message in seen.body["messages"]:
            parts = message.get("content") or ""
            parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
            text = "\n".join(p.get("text", "") for p in parts)
            self.images += [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
            mark = re.findall(r"@@([a-z]+)@@", text) if message["role"] == "user" else []
            if mark:
                self.name, self.turn, self.results = mark[-1], 0, []
            elif message["role"] == "assistant":
                self.turn += 1
            elif message["role"] == "tool":
                self.results.append(text)


@extended
class TestRealClient(unittest.TestCase):
    """Whole agent loops. `script` is {conversation: [reply or function(Conversation) -> reply]}; the last one repeats."""

    @classmethod
    def setUpClass(cls):
        cls.claude = find_claude()
        if not cls.claude:
            raise unittest.SkipTest("no claude found (CLAUDE_BIN, PATH, ~/.cache/ccr-ci); npm install --prefix ~/.cache/ccr-ci @anthropic-ai/claude-code@2.1.330")
        if not os.environ.get("CCR_TEST_INSIDE") and not namespace_command():
            raise unittest.SkipTest("no private network namespace can be made here (unshare -n, unshare -Urn): the client is never run outside one")

    def setUp(self):
        if not os.environ.get("CCR_TEST_INSIDE"):
            return
        loopback_up()
        names = [name for _, name in socket.if_nameindex()]
        self.assertFalse([n for n in names if n.startswith(("eth", "en", "wl", "veth", "docker"))],
                         "not a private network: %s" % names)
        self.provider = ScriptedProvider()
        self.addCleanup(self.provider.stop)
        models = ["main-model", "think-model", "image-model", "sub-model", "alt-model", "web-model", "small-model"]
        self.proxy = Ccr({"Providers": [provider_entry(self.provider, "fake", models=models)], "API_TIMEOUT_MS": 60000,
                          "Router": {
            "default": "fake,main-model", "think": "fake,think-model", "image": "fake,image-model", "webSearch": "fake,web-model",
            "background": "fake,small-model"}})
        self.addCleanup(self.proxy.stop)
        self.folder = os.path.join(self.proxy.home, "project")
        os.mkdir(self.folder)

    def path(self, name):
        return os.path.join(self.folder, name)

    def write(self, name, data):
        with open(self.path(name), "wb") as f:
            f.write(data)

    def script(self, **conversations):
        self.seen = collections.defaultdict(list)

        def reply(seen):
            about = Conversation(seen)
            turns = conversations.get(about.name)
            if not turns:
                return say('{"title": "side call"}')
            self.seen[about.name].append(about)
            turn = turns[min(about.turn, len(turns) - 1)]
            return turn(about) if callable(turn) else turn
        self.provider.play(reply)

    def run_claude(self, text, *arguments, **env):
        """Print mode -> (exit status, final result object, all events)."""
        command = [self.claude, "-p", "--output-format", "stream-json", "--verbose", *arguments, "--allowedTools", "Bash",
                   "Write", "Edit", "Read", "Agent", "WebSearch",
                   "ToolSearch", "--", text]
        done = subprocess.run(command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              timeout=120, env=dict({
            "HOME": self.proxy.home, "PATH": "/usr/local/bin:/usr/bin:/bin", "TERM": "dumb", "LANG": "C.UTF-8",
            "TMPDIR": self.proxy.home, "NO_PROXY": "127.0.0.1",
            "ANTHROPIC_BASE_URL": "http://127.0.0.1:%d" % self.proxy.port, "ANTHROPIC_AUTH_TOKEN": "test",
            "DISABLE_TELEMETRY": "1", "DISABLE_AUTOUPDATER": "1",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "CLAUDE_CODE_MAX_RETRIES": "2"}, **env))
        events = [json.loads(line) for line in done.stdout.decode().splitlines() if line.startswith("{")]
        final = next((e for e in reversed(events) if e.get("type") == "result"), {"result": "no result: %r" % done.stderr[-500:]})
        return done.returncode, final, events

    def assert_result(self, words, *arguments, text="@@main@@ go on", **env):
        status, final, events = self.run_claude(text, *arguments, **env)
        self.assertEqual(status, 0, final)
        self.assertRegex(str(final.get("result")), words)
        self.assertNotIn("Traceback", self.proxy.words())
        return final, [b for e in events if e.get("type") in ("assistant", "user") for b in e["message"]["content"]
                       if isinstance(b, dict)]

    def models(self, conversation="main"):
        return {about.seen.model for about in self.seen[conversation]}

    @in_namespace
    def test_hello_goes_to_the_default_model(self):
        self.script(main=[say("HELLO-OK from the model")])
        self.assert_result("HELLO-OK from the model")
        self.assertEqual(self.models(), {"main-model"})

    @in_namespace
    def test_a_file_is_written_edited_and_run(self):
        path = self.path("calc.py")
        self.script(main=[say("I will write it.", "A plan.", [("Write",
                                                               {"file_path": path,
                                                                "content": 'a = 6\nb = 1\nprint("answer", a * b)\n'})]),
                          say(tools=[("Edit", {"file_path": path, "old_string": "b = 1",
                                               "new_string": 'b = 7  # "quoted" \\ é'})]),
                          say(tools=[("Bash", {"command": "python3 calc.py", "description": "Run it"})]),
                          lambda about: say("FINISHED " + about.results[-1])])
        self.assert_result("FINISHED answer 42")
        with open(path, encoding="utf-8") as f:
            self.assertEqual(f.read(), 'a = 6\nb = 7  # "quoted" \\ é\nprint("answer", a * b)\n')

    @in_namespace
    def test_parallel_calls_get_their_own_results(self):
        self.write("one.txt", b"secret-ONE\n")
        self.write("two.txt", b"secret-TWO\n")
        self.script(main=[say(tools=[("Read", {"file_path": self.path("one.txt")}),
                                     ("Read", {"file_path": self.path("two.txt")})]),
                          lambda about: say("BOTH " + " | ".join(re.sub(r"\s+", " ", r)[:40] for r in about.results))])
        self.assert_result("BOTH .*secret-ONE.*secret-TWO")
        self.assertEqual(len(self.seen["main"]), 2)

    @in_namespace
    def test_a_failing_command_is_seen_as_failed(self):
        self.script(main=[say(tools=[("Bash", {"command": "echo broken >&2; exit 3", "description": "Fail"})]),
                          lambda about: say("SAW " + about.results[-1])])
        self.assert_result("(?s)SAW .*3.*broken")

    @in_namespace
    def test_reasoning_is_shown_as_thinking_and_is_no_part_of_the_text(self):
        self.script(main=[say("I know.", "Let me think carefully.",
                              [("Bash", {"command": "echo thought-$((3*3))", "description": "Compute"})]),
                          lambda about: say("THOUGHT " + about.results[-1], "Here it is.")])
        _, blocks = self.assert_result("THOUGHT thought-9", text="@@main@@ ultrathink about it")
        self.assertEqual([b["thinking"] for b in blocks if b["type"] == "thinking"], ["Let me think carefully.", "Here it is."])
        self.assertNotIn("carefully", "".join(b["text"] for b in blocks if b["type"] == "text"))
        self.assertEqual(self.models(), {"think-model"})

    @in_namespace
    def test_a_session_is_resumed_with_what_was_said(self):
        self.script(first=[say("NOTED the word is zebra-5")],
                    second=[lambda about: say("RECALL " + ("zebra-5" if "NOTED the word is zebra-5" in about.seen.text()
                                                           else "nothing"))])
        self.assert_result("NOTED", text="@@first@@ remember a word")
        self.assert_result("RECALL zebra-5", "-c", text="@@second@@ which word?")

    @in_namespace
    def test_the_providers_400_reaches_the_user_without_a_retry_loop(self):
        self.script(main=[refuse(400, "scripted-bad-request")])
        status, final, events = self.run_claude("@@main@@ hi")
        self.assertNotEqual(status, 0)
        self.assertIn("scripted-bad-request", final["result"])
        self.assertFalse([e for e in events if e.get("subtype") == "api_retry"])

    @in_namespace
    def test_a_429_is_waited_for(self):
        replies = [refuse(429, "slow down", {"Retry-After": "1"}), say("AFTER-429")]
        self.script(main=[lambda about: replies.pop(0) if len(replies) > 1 else replies[0]])
        self.assert_result("AFTER-429")

    @in_namespace
    def test_a_broken_stream_is_asked_for_again(self):
        replies = [say("half of an answer that breaks", die=3, how="rst"), say("WHOLE-ANSWER")]
        self.script(main=[lambda about: replies.pop(0) if len(replies) > 1 else replies[0]])
        self.assert_result("WHOLE-ANSWER")

    @in_namespace
    def test_the_providers_token_counts_reach_the_client(self):
        self.script(main=[say("COUNTED", usage=(54321, 4321, 67))])
        final, _ = self.assert_result("COUNTED")
        self.assertEqual([final["usage"][k] for k in ("input_tokens", "cache_read_input_tokens", "output_tokens")],
                         [50000, 4321, 67])

    @in_namespace
    def test_a_tagged_subagent_goes_to_its_model_and_the_tag_to_nobody(self):
        tagged = "<CCR-SUBAGENT-MODEL>fake,sub-model</CCR-SUBAGENT-MODEL>\n@@sub@@ find the number"
        self.script(main=[say(tools=[("Agent", {"description": "Look it up", "subagent_type": "general-purpose",
                                                "run_in_background": False, "prompt": tagged})]),
                          lambda about: say("MAIN-GOT " + re.sub(r"\s+", " ", about.results[-1])[:1000])],
                    sub=[say(tools=[("Bash", {"command": "echo sub-$((20+3))", "description": "Compute"})]),
                         lambda about: say("SUB-ANSWER " + about.results[-1])])
        self.assert_result("MAIN-GOT .*SUB-ANSWER sub-23", CLAUDE_CODE_GATEWAY_HINT_HEADERS="1")
        self.assertEqual((self.models("sub"), self.models("main")), ({"sub-model"}, {"main-model"}))
        for about in self.seen["sub"]:
            self.assertNotIn("CCR-SUBAGENT-MODEL", about.seen.text())

    @in_namespace
    def test_plan_mode_goes_to_the_think_model(self):
        self.write("notes.txt", b"planning-input-77\n")
        self.script(main=[say(tools=[("Read", {"file_path": self.path("notes.txt")})], reasoning="Look first."),
                          lambda about: say("PLAN " + re.sub(r"\s+", " ", about.results[-1]))])
        self.assert_result("PLAN .*planning-input-77", "--permission-mode", "plan")
        self.assertEqual(self.models(), {"think-model"})

    @in_namespace
    def test_a_picture_goes_to_the_image_model_as_a_picture(self):
        def part(kind, data):
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        self.write("pic.png", b"\x89PNG\r\n\x1a\n" + part(b"IHDR", struct.pack(">IIBBBBB", 24, 16, 8, 2, 0, 0, 0))
                   + part(b"IDAT", zlib.compress((b"\0" + b"\xc8\x1e\x1e" * 24) * 16)) + part(b"IEND", b""))
        self.script(main=[say(tools=[("Read", {"file_path": self.path("pic.png")})]),
                          lambda about: say("IMAGES %d" % len(about.images))])
        self.assert_result("IMAGES 1")
        self.assertTrue(self.seen["main"][-1].images[0].startswith("data:image/"))
        self.assertEqual([about.seen.model for about in self.seen["main"]], ["main-model", "image-model"])

    @in_namespace
    def test_a_named_model_is_used(self):
        self.script(main=[say("MODEL-OK")])
        self.assert_result("MODEL-OK", "--model", "fake,alt-model")
        self.assertEqual(self.models(), {"alt-model"})

    @in_namespace
    def test_four_sessions_at_once_do_not_mix(self):
        self.script(**{name: [say(tools=[("Bash", {"command": "echo %s-$((6*7))" % name, "description": "x"})]),
                              lambda about: say("END " + about.results[-1])]
                       for name in ("alpha", "bravo", "carol", "delta")})
        results, lock = {}, threading.Lock()

        def session(name):
            answer = self.run_claude("@@%s@@ go" % name)[1].get("result")
            with lock:
                results[name] = answer
        threads = [threading.Thread(target=session, args=(name,)) for name in ("alpha", "bravo", "carol", "delta")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual({n: str(r).strip() for n, r in results.items()}, {n: "END %s-42" % n for n in results})


# --- the house: what keeps one file readable

class TestHouse(unittest.TestCase):
    """Rules of the file itself, read from its text."""
    LONG_FUNCTIONS = {"main"}                           # lists of facts, not of decisions
    TOP_LEVEL = {"ccr.py", "test_ccr.py", "config.example.json", "ccr.service", "README.md"}
    IMPURE = {"socket", "select", "subprocess", "shutil", "tempfile", "time", "signal", "ssl", "fcntl", "datetime", "random",
              "http.client", "http.server", "urllib.request", "open", "print", "input"}
    PURE_SECTIONS = range(1, 8)

    @classmethod
    def setUpClass(cls):
        with open(CCR_PY, encoding="utf-8") as f:
            cls.text = f.read()
        cls.lines, cls.tree = cls.text.split("\n"), ast.parse(cls.text)
        cls.banners = [(n, line) for n, line in enumerate(cls.lines, 1) if line.startswith("# ===")]

    def section_of(self, line_number):
        titles = [re.match(r"# === (\d+)\.", line).group(1) for n, line in self.banners if n <= line_number]
        return int(titles[-1]) if titles else 0

    def test_the_map_in_the_docstring_is_the_banners(self):
        told = re.findall(r"^    (\d+)\. (\S.*?)(?:  .*)?$", self.tree.body[0].value.value, re.M)
        real = [re.fullmatch(r"# === (\d+)\. (.+?) =+", line).groups() for _, line in self.banners]
        self.assertEqual(told, real)
        self.assertEqual([int(n) for n, _ in real], list(range(1, len(real) + 1)))

    def test_sections_1_to_7_do_no_input_or_output(self):
        for node in ast.walk(self.tree):
            if not hasattr(node, "lineno") or self.section_of(node.lineno) not in self.PURE_SECTIONS:
                continue
            names = [a.name for a in node.names] if isinstance(node,
                                                               ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [node.id] if isinstance(node, ast.Name) else []
            for name in names:
                self.assertNotIn(name, self.IMPURE, "line %d" % node.lineno)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("os", "sys"):
                self.assertIn(node.attr, ("urandom", "maxsize", "version_info"), "line %d" % node.lineno)

    def test_only_the_standard_library_is_imported(self):
        if not hasattr(sys, "stdlib_module_names"):
            self.skipTest("needs Python 3.10")
        for name in ("ccr.py", "test_ccr.py"):
            with open(os.path.join(HERE, name), encoding="utf-8") as f:
                tree = ast.parse(f.read())
            modules = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
            modules |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
            self.assertLessEqual(modules - {"ccr"}, sys.stdlib_module_names, name)

    def test_the_grammar_is_that_of_python_3_9(self):
        for name in ("ccr.py", "test_ccr.py"):
            with open(os.path.join(HERE, name), encoding="utf-8") as f:
                ast.parse(f.read(), feature_version=(3, 9))

    def test_functions_are_short(self):
        long = {n.name: n.end_lineno - n.lineno + 1 for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef)
                and n.end_lineno - n.lineno >= 60}
        self.assertLessEqual(set(long), self.LONG_FUNCTIONS, long)

    def test_no_line_is_wider_than_130(self):
        wide = [n for n, line in enumerate(self.lines, 1) if len(line) > 130]
        self.assertEqual(wide, [])

    def test_no_name_is_defined_twice(self):
        for name in ("ccr.py", "test_ccr.py"):
            with open(os.path.join(HERE, name), encoding="utf-8") as f:
                tree = ast.parse(f.read())
            for scope in [tree] + [n for n in tree.body if isinstance(n, ast.ClassDef)]:
                names = [n.name for n in scope.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))
                         and not any(isinstance(d, ast.Attribute) and d.attr in ("setter", "getter") for d in n.decorator_list)]
                twice = [n for n, count in collections.Counter(names).items() if count > 1]
                self.assertEqual(twice, [], "%s, %s" % (name, getattr(scope, "name", "top level")))

    def test_importing_has_no_side_effects_and_commands_import_little(self):
        code = "import sys; sys.path.insert(0, %r); before = set(sys.modules); import ccr; print(sorted(set(sys.modules) - before))" % HERE
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              cwd=tempfile.mkdtemp(dir=TEST_HOME))
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        loaded = set(ast.literal_eval(done.stdout.decode()))
        self.assertFalse(loaded & {"urllib.request", "http.client", "http.server", "ssl", "argparse", "subprocess", "email",
                                   "hashlib", "tempfile"}, loaded)

    def test_the_folder_holds_what_the_card_says(self):
        if not os.path.isdir(os.path.join(HERE, ".git")):
            self.skipTest("not in the repository")
        done = subprocess.run(["git", "-C", HERE, "ls-files"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if done.returncode:
            self.skipTest("git cannot tell")
        tracked = {path.split("/")[0] for path in done.stdout.decode().splitlines()}
        self.assertEqual({p for p in tracked if not p.startswith(".")}, self.TOP_LEVEL)

    def test_the_program_is_executable_and_says_its_licence(self):
        self.assertEqual(self.lines[0], "#!/usr/bin/env python3")
        self.assertIn("SPDX-License-Identifier: MIT", self.lines[1])
        self.assertTrue(os.access(CCR_PY, os.X_OK))


class TestPapers(unittest.TestCase):
    """README.md and config.example.json say what is true."""

    def paper(self, name):
        path = os.path.join(HERE, name)
        if not os.path.exists(path):
            self.skipTest("no %s here" % name)
        with open(path, encoding="utf-8") as f:
            return f.read()

    def test_the_example_configuration_is_strict_json_without_a_fault_or_a_warning(self):
        raw = json.loads(self.paper("config.example.json"))
        env = {name: "x" * 20 for name in re.findall(r"\$\{?([A-Z_][A-Z0-9_]*)", json.dumps(raw))}
        config = ccr.parse_config(raw, env, ccr.known_transformers())
        self.assertEqual(config.warnings, ())

    def test_every_configuration_in_the_readme_is_valid(self):
        for block in re.findall(r"```json5?\n(.*?)```", self.paper("README.md"), re.S):
            with self.subTest(block[:60]):
                raw = ccr.parse_json5(block)
                if isinstance(raw, dict) and ("Providers" in raw or "Router" in raw):
                    env = {name: "x" * 20 for name in re.findall(r"\$\{?([A-Z_][A-Z0-9_]*)", block)}
                    ccr.parse_config(dict({"Providers": []}, **raw), env, ccr.known_transformers())

    def test_every_command_in_the_readme_exists(self):
        for command in set(re.findall(r"^(?:\$ )?(?:ccr|python3 ccr\.py) ([a-z]+)", self.paper("README.md"), re.M)):
            self.assertIn(command, ccr.COMMANDS)

    def test_links_inside_the_readme_lead_somewhere(self):
        text = self.paper("README.md")
        anchors = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
                   for title in re.findall(r"^#+ (.+)$", text, re.M)}
        self.assertLessEqual(set(re.findall(r"\]\(#([^)]+)\)", text)), anchors)


# --- running

class TimedResult(unittest.TextTestResult):
    """Remembers how long each test took."""
    times = ()

    def startTest(self, test):
        self.began = time.perf_counter()
        super().startTest(test)

    def stopTest(self, test):
        self.times = (*self.times, (time.perf_counter() - self.began, test.id().replace("__main__.", "")))
        super().stopTest(test)


def chosen_tests(names):
    """The suite for the names on the command line: none = the core, "all" = everything, else classes or tests."""
    module, loader = sys.modules[__name__], unittest.TestLoader()
    if names and names != ["all"]:
        return loader.loadTestsFromNames(names, module)

    def is_wanted(test):
        return names == ["all"] or not (getattr(type(test), "is_extended", False)
                                        or getattr(getattr(test, test._testMethodName, None), "is_extended", False))

    def leaves(suite):
        for item in suite:
            yield from (leaves(item) if isinstance(item, unittest.TestSuite) else [item])
    return unittest.TestSuite(test for test in leaves(loader.loadTestsFromModule(module)) if is_wanted(test))


def run_tests(arguments):
    flags = [a for a in arguments if a.startswith("-")]
    if set(flags) - {"-v", "-f", "-q"}:
        sys.exit(__doc__)
    is_wordy = "-v" in flags
    print("Python %s, CCR_TEST_SEED=%d" % (sys.version.split()[0], SEED), file=sys.stderr, flush=True)
    runner = unittest.TextTestRunner(verbosity=2 if is_wordy else 1, failfast="-f" in flags, resultclass=TimedResult)
    result = runner.run(chosen_tests([a for a in arguments if not a.startswith("-")]))
    if is_wordy:
        for seconds, name in sorted(result.times, reverse=True)[:15]:
            print("%7.2f s  %s" % (seconds, name), file=sys.stderr)
    for test, reason in result.skipped:
        print("skipped: %s: %s" % (str(test).split(" ")[0], reason), file=sys.stderr)
    if not result.wasSuccessful():
        print("repeat with CCR_TEST_SEED=%d" % SEED, file=sys.stderr)
    return 0 if result.wasSuccessful() and result.testsRun else 1


if __name__ == "__main__":
    sys.exit(run_tests(sys.argv[1:]))

"""A server on loopback with OpenAI's chat interface and vLLM's additions to it, answered by a model of the test."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from PIL import Image

from collator import encode, render
from data_prep.records import IMAGE_MARKER
from models.serving import served_name


class ChatServer:
    """Serves an engine's adapters by the names of their folders, and the base as "base".

    Attributes:
        url: where it is.
        bodies: the requests.
        limit: requests after which it goes down; None for never.
        names: of the engine's adapters by what requests call them.
        processor: what it reads prompts with; another one than the engine's stands for other server settings.
    """

    def __init__(self, engine, *, limit: int | None = None):
        self.engine, self.limit, self.bodies, self.lock = engine, limit, [], threading.Lock()
        self.processor = engine.processors[None]
        self.names = {"base": None, **{served_name(path): name for name, path in engine.adapters.items()}}
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (ChatHandler,), {"server_of": self}))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self) -> "ChatServer":
        return self

    def __exit__(self, *error) -> None:
        self.http.shutdown()
        self.http.server_close()

    def complete(self, body: dict) -> dict:
        adapter = self.names[body["model"]]
        example = to_example(body["messages"])
        processor = self.processor
        prompt = body.get("add_generation_prompt", True)
        text = render(processor, example["messages"], add_generation_prompt=prompt)
        inputs = encode(processor, [example], [text], padding_side="left")
        reply = {"prompt_token_ids": inputs["input_ids"][0].tolist()}
        if "prompt_logprobs" in body:
            return reply | {"prompt_logprobs": self.prompt_logprobs(inputs, adapter), "choices": []}
        with self.engine._use(adapter), torch.inference_mode():
            output = self.engine.model.generate(**inputs, max_new_tokens=body["max_tokens"])
        ids = output[0, inputs["input_ids"].size(1) :].tolist()
        cut = not set(self.engine.model.generation_config.eos_token_id) & set(ids)
        choice = {"message": {"content": processor.decode(ids, skip_special_tokens=True)}, "token_ids": ids}
        choice["finish_reason"] = "length" if cut else "stop"
        return reply | {"choices": [choice]}

    @torch.inference_mode()
    def prompt_logprobs(self, inputs: dict, adapter: str | None) -> list:
        with self.engine._use(adapter):
            logs = self.engine.model(**inputs).logits[0].log_softmax(-1)
        ids = inputs["input_ids"][0].tolist()
        return [None, *({str(token): {"logprob": logs[n, token].item()}} for n, token in enumerate(ids[1:]))]


def to_example(messages: list[dict]) -> dict:
    images, turns = [], []
    for message in messages:
        content = ""
        for part in message["content"]:
            if part["type"] == "image_url":
                head, _, data = part["image_url"]["url"].partition(",")
                assert head == "data:image/png;base64"
                images.append(Image.open(io.BytesIO(base64.b64decode(data))))
                content += IMAGE_MARKER
            else:
                content += part["text"]
        turns.append({"role": message["role"], "content": content})
    return {"id": "of a request", "images": images, "messages": turns}


class ChatHandler(BaseHTTPRequestHandler):
    server_of: ChatServer

    def do_GET(self):
        self.reply({"data": [{"id": name} for name in self.server_of.names]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server_of
        with server.lock:
            server.bodies.append(body)
            if server.limit is not None and len(server.bodies) > server.limit:
                self.close_connection = True
                return
            try:
                reply, code = server.complete(body), 200
            except (KeyError, ValueError) as error:
                reply, code = {"error": {"message": f"refused: {error!r}"}}, 400
        self.reply(reply, code)

    def reply(self, content: dict, code: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Say nothing."""

"""A running ComfyUI for the tests, over HTTP and the websocket, as a browser has it."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from pathlib import Path

from tests.avdm2_nodes.conftest import ROOT

START, RUN = 900, 600  # seconds that the server and a prompt may take on a busy machine


class Server:
    """A ComfyUI of its own on the CPU, its folders in `base`, the pack in its custom_nodes; `with` waits until it answers."""

    def __init__(self, comfyui_dir: Path, base: Path, pack: Path = ROOT, options: tuple[str, ...] = ()):
        for folder in ("custom_nodes", "input", "output", "temp", "user", "models"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        (base / "custom_nodes" / "AVDM2").symlink_to(pack, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.base, self.log_file = base, base / "server.log"
        command = [
            sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(base),
            "--database-url", "sqlite:///:memory:", "--disable-api-nodes", "--disable-auto-launch", "--preview-method", "auto",
            *options,
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=comfyui_dir, stdout=log, stderr=log, env=environment)

    def __enter__(self):
        try:
            self.wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        assert self.stop() in (0, -signal.SIGTERM)

    def wait_until_up(self):
        until = time.monotonic() + START
        while time.monotonic() < until:
            assert self.process.poll() is None, f"ComfyUI ended by itself:\n{self.log()[-4000:]}"
            try:
                return self.get("/system_stats")
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"ComfyUI did not answer in {START} s:\n{self.log()[-4000:]}")

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def get(self, path: str):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, said: dict):
        body, kind = json.dumps(said).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, kind)
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def submit(self, graph: dict, client: str = "") -> str:
        said = {"prompt": graph, "client_id": client, "extra_data": {"extra_pnginfo": {"workflow": {"drawn": "by a person"}}}}
        return self.post("/prompt", said)["prompt_id"]

    def wait_for(self, prompt_id: str) -> dict:
        """What the history says of a prompt once it has ended."""
        until = time.monotonic() + RUN
        while time.monotonic() < until:
            history = self.get(f"/history/{prompt_id}")
            if history:
                return history[prompt_id]
            time.sleep(0.05)
        raise AssertionError(f"the prompt did not end in {RUN} s:\n{self.log()[-4000:]}")

    def run(self, graph: dict) -> dict:
        """The outputs of a graph that must succeed."""
        ended = self.wait_for(self.submit(graph))
        assert ended["status"]["status_str"] == "success", ended["status"]["messages"]
        return ended["outputs"]

    def rss(self) -> float:
        """MB of memory that the server holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


class Client:
    """A websocket client: what the server has said to it, each with the time at which it came."""

    def __init__(self, port: int):
        self.id, self.said, self._loop = uuid.uuid4().hex, [], asyncio.new_event_loop()
        self._open = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._listen(port),), daemon=True)
        self._thread.start()
        assert self._open.wait(60)

    async def _listen(self, port):
        import aiohttp

        url = f"ws://127.0.0.1:{port}/ws?clientId={self.id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as connection:
            self._socket = connection
            self._open.set()
            async for message in connection:
                if message.type == aiohttp.WSMsgType.BINARY:
                    self.said.append((time.monotonic(), "binary", message.data))
                elif message.type == aiohttp.WSMsgType.TEXT:
                    told = json.loads(message.data)
                    self.said.append((time.monotonic(), told["type"], told["data"]))

    def of(self, kind: str) -> list:
        return [(when, data) for when, name, data in list(self.said) if name == kind]

    def wait_for(self, kind: str, count: int = 1) -> list:
        until = time.monotonic() + RUN
        while time.monotonic() < until:
            if len(found := self.of(kind)) >= count:
                return found
            time.sleep(0.005)
        raise AssertionError(f"expected {count} of {kind}, heard {[name for _, name, _ in self.said]}")

    def close(self):
        asyncio.run_coroutine_threadsafe(self._socket.close(), self._loop).result(60)
        self._thread.join(60)

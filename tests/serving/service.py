"""A service on a free port of this machine, with a stub model, for tests."""

import contextlib
import io
import threading
import time
from collections.abc import Iterator

import httpx2
import numpy as np
import uvicorn
from PIL import Image

from sparseinst.inference import Predictor
from sparseinst.serving.app import create_app
from sparseinst.serving.limits import Limits
from sparseinst.serving.model import ServedModel
from tests.red_segmenter import RedSegmenter, red_segmenter_config


class GatedSegmenter(RedSegmenter):
    """Wait in front of each prediction until the gate is open; fail where told to.

    Attributes:
        started: released once for each prediction that starts.
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Semaphore(0)
        self.num_started = 0
        self.error = None

    def forward(self, batched_inputs):
        self.num_started += 1
        self.started.release()
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        return super().forward(batched_inputs)


def stub_predictor(*opts):
    cfg = red_segmenter_config()
    cfg.merge_from_list(list(opts))
    return Predictor(cfg, model=GatedSegmenter(cfg).eval())


def image_bytes(kind="PNG", height=45, width=70, seed=0):
    """A photo with a red and a blue block at places that depend on the seed."""
    pixels = np.full((height, width, 3), 128, np.uint8)
    rng = np.random.default_rng(seed)
    for color in ((255, 0, 0), (0, 0, 255)):
        y, x = rng.integers(0, height - 12), rng.integers(0, width - 16)
        pixels[y : y + 12, x : x + 16] = color
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


@contextlib.contextmanager
def running(load, limits=None, file="model.pth", waits=True, hosts=None) -> Iterator[httpx2.Client]:
    """Run a service; yield a client of it, by default when its model is loaded or has failed."""
    app = create_app(ServedModel(load, str(file)), limits or Limits(), hosts)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started and server.servers)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False) as client:
            wait_until(lambda: not waits or client.get("/healthz").json()["status"] != "loading")
            yield client
    finally:
        server.should_exit = True
        thread.join()


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
    return result


def metric(client, name, **labels):
    """The value of a metric; 0 where it was not counted yet."""
    wanted = "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}" if labels else ""
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(f"{name}{wanted} "):
            return float(line.split()[-1])
    return 0.0

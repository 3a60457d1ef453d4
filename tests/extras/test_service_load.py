"""The service under load, started by its command: ``make test-extras``. Takes minutes.

SPARSEINST_LOAD_WEIGHTS names weights with config.yaml beside them; without it a tiny model is served.
"""

import asyncio
import io
import os
import random
import subprocess
import sys
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from sparseinst import load_config  # noqa: E402
from sparseinst.inference import Predictor, read_image, to_coco_results  # noqa: E402
from tests.data.test_images import png_that_claims  # noqa: E402
from tests.serving.service import metric, wait_until  # noqa: E402
from tests.tiny_model import tiny_cfg, tiny_model  # noqa: E402

REPO = Path(__file__).resolve().parents[2]
OPTS = ("MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0)
NUM_CLIENTS, NUM_REQUESTS, WARM_REQUESTS = 200, 2000, 200
WAITING, WORKERS = 64, 2
MAX_GROWTH = 50 * 2**20
# An image of 70 megapixels, one in so many requests; the service's memory at its peak, where both workers have one.
HUGE, HUGE_PERIOD, MAX_PEAK = (7000, 10_000), 200, 5 * 2**30


def photo(height, width, seed):
    """A smooth photo with noise, as a JPEG."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    if given := os.environ.get("SPARSEINST_LOAD_WEIGHTS"):
        return Path(given).resolve()
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.yaml").write_text(tiny_cfg(*OPTS).dump())
    torch.save({"model": tiny_model(*OPTS).state_dict()}, folder / "model.pth")
    return folder / "model.pth"


@pytest.fixture(scope="module")
def service(weights):
    """The address and the process of the service."""
    command = [sys.executable, "-m", "sparseinst", "serve", "--weights", str(weights), "--port", "0"]
    command += ["--max-waiting", str(WAITING), "--workers", str(WORKERS), "--max-upload-mib", "4", "--timeout", "600"]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stdout.readline, "")
        address = next(line.strip() for line in lines if line.startswith("http://"))
        wait_until(lambda: httpx2.get(f"{address}/healthz").status_code == 200, 300)
        yield address, process.pid
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def cases(weights, tmp_path_factory):
    """(share, upload, status, instances of the Predictor or a part of the error); the huge image is first."""
    predictor = Predictor(load_config(str(weights.with_name("config.yaml")), ["MODEL.WEIGHTS", str(weights)]))
    file = tmp_path_factory.mktemp("images") / "photo.jpg"
    cases = [(0, photo(*HUGE, 99), 200, None)]
    for seed, (height, width) in enumerate([(64, 64), (90, 60), (61, 133), (240, 320), (480, 640)] * 4):
        data = photo(height, width, seed)
        cases.append((5, data, 200, None))
    cases += [(1, photo(1500, 2000, seed), 200, None) for seed in range(50, 54)]
    for index, (share, data, status, _) in enumerate(cases):
        file.write_bytes(data)
        # As the service: boolean masks of the huge image would take gigabytes.
        with predictor.model.output_as(mask_format="rle"):
            (instances,) = predictor([read_image(file)], "RGB")
        results = to_coco_results(instances, 1, predictor.classes.category_ids)
        assert results
        cases[index] = (share, data, status, results)
    return [
        *cases,
        (8, b"", 400, "the file is empty"),
        (8, b"not an image", 400, "not an image"),
        (8, photo(240, 320, 0)[:-600], 400, "truncated"),
        (4, png_that_claims(60_000, 60_000), 413, "INPUT.MAX_IMAGE_PIXELS"),
        (2, bytes(6 * 2**20), 413, "larger than"),
    ]


class Load:
    """Send requests, and compare each answer."""

    def __init__(self, address, cases, seed=0):
        self._rng = random.Random(seed)
        self._address = address
        self._cases = cases
        self.num_sent = self.num_busy = 0
        self.wrong = []

    async def run(self, num_requests):
        cases = self._rng.choices(self._cases, [case[0] for case in self._cases], k=num_requests)
        cases[HUGE_PERIOD // 2 :: HUGE_PERIOD] = [self._cases[0]] * len(cases[HUGE_PERIOD // 2 :: HUGE_PERIOD])
        remaining = iter(cases)
        # A connection for each request: these clients share a busy process, and could come back to one that the service
        # has closed because it was idle for long.
        limits = httpx2.Limits(max_connections=NUM_CLIENTS, max_keepalive_connections=0)
        async with httpx2.AsyncClient(base_url=self._address, timeout=600, limits=limits, trust_env=False) as client:
            await asyncio.gather(*(self._client(client, remaining) for _ in range(NUM_CLIENTS)))

    async def _client(self, client, remaining):
        for _, data, status, expected in remaining:
            as_form = {"files": {"image": data}} if self._rng.random() < 0.5 and data else {"content": data}
            self.num_sent += 1
            try:
                while (response := await client.post("/predict?threshold=0", **as_form)).status_code == 429:
                    self.num_busy += 1
                    await asyncio.sleep(self._rng.uniform(0.2, 1) * float(response.headers["Retry-After"]))
            except httpx2.TransportError as error:
                self.wrong.append((status, repr(error), len(data)))
                continue
            if not is_right(response, status, expected):
                self.wrong.append((status, response.status_code, response.text[:200]))


def is_right(response, status, expected):
    if response.status_code != status:
        return False
    if isinstance(expected, str):
        return expected in response.json()["error"]
    found = response.json()["instances"]
    return [{key: one[key] for key in expected[0]} for one in found] == expected


def peak_memory(pid):
    """The most memory that was resident, bytes; 0 where the system does not tell."""
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def test_200_clients_get_right_answers_and_memory_stays(service, cases):
    address, pid = service
    with httpx2.Client(base_url=address, timeout=60) as client:
        load = Load(address, cases)
        asyncio.run(load.run(WARM_REQUESTS))
        before = metric(client, "process_resident_memory_bytes")
        asyncio.run(load.run(NUM_REQUESTS - WARM_REQUESTS))
        after = metric(client, "process_resident_memory_bytes")
        sizes = [f"{size / 2**20:.0f} MiB" for size in (before, after)]
        peak = peak_memory(pid)
        print(f"resident memory after {WARM_REQUESTS} and {load.num_sent} requests: {sizes}; {load.num_busy} times 429")
        print(f"at its peak: {peak / 2**20:.0f} MiB")
        assert load.num_sent == NUM_REQUESTS and not load.wrong, (len(load.wrong), load.wrong[:9])
        # More clients than places.
        assert load.num_busy > 0
        assert after - before < MAX_GROWTH and peak < MAX_PEAK
        assert metric(client, "sparseinst_running_requests") == 0

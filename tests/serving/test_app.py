"""The service over HTTP: its endpoints, limits, and what it does where something goes wrong."""

import asyncio
import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from sparseinst.serving.answers import answer  # noqa: E402
from sparseinst.serving.limits import Limits  # noqa: E402
from sparseinst.serving.model import _stamps  # noqa: E402
from sparseinst.serving.queue import PredictionQueue  # noqa: E402
from tests.serving.service import image_bytes, metric, running, stub_predictor, wait_until  # noqa: E402


@pytest.fixture(scope="module")
def predictor():
    return stub_predictor()


@pytest.fixture(scope="module")
def client(predictor):
    with running(lambda: predictor, Limits(upload_bytes=100_000)) as client:
        yield client


def expected(predictor, data, **options):
    return answer(predictor, data, **{"threshold": 0.5, **options})["instances"]


def error_of(response, status):
    """The error of an answer, which must be one line of JSON."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"] and "\n" not in response.json()["error"]
    return response.json()["error"]


def request_head(data):
    return f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()


def connect(client, content):
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=20)
    connection.sendall(content)
    return connection


def test_forms_and_bytes_give_the_same_answer(client, predictor):
    data = image_bytes("JPEG")
    for request in (
        {"files": {"image": ("photo.jpg", data)}},
        {"files": {"anything": data}, "data": {"a": "b"}},
        {"content": data, "headers": {"Content-Type": "image/jpeg"}},
        {"content": data, "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
        {"content": data},
    ):
        response = client.post("/predict", **request)
        assert response.status_code == 200, response.text
        assert response.json()["instances"] == expected(predictor, data)
    parameters = {"threshold": 0.1, "masks": "polygons", "image_id": 5}
    response = client.post("/predict", params=parameters, content=data)
    assert response.json()["instances"] == expected(predictor, data, **parameters) != expected(predictor, data)
    drawn = client.post("/draw", content=data)
    assert drawn.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(drawn.content)).size == (747, 480)


def test_what_is_not_an_image_gets_one_line(client):
    assert "not an image" in error_of(client.post("/predict", content=b"text"), 400)
    assert "the file is empty" in error_of(client.post("/predict", content=b""), 400)
    assert "truncated" in error_of(client.post("/predict", content=image_bytes("JPEG")[:-300]), 400)
    assert "has no file" in error_of(client.post("/predict", files={"a": (None, "x")}), 400)
    assert "Too many files" in error_of(client.post("/predict", files=[("a", b"x"), ("b", b"y")]), 400)
    form = {"Content-Type": "multipart/form-data"}
    error_of(client.post("/predict", content=b"x", headers=form), 400)
    error_of(client.post("/predict", content=b"x", headers={"Content-Type": "multipart/form-data; boundary=x"}), 400)
    for name, value in (("threshold", 2), ("threshold", "nan"), ("masks", "png"), ("maps", "5"), ("image_id", "x")):
        assert error_of(client.post("/predict", params={name: value}, content=b"x"), 422).startswith(f"{name}: ")
    error_of(client.get("/nothing"), 404)


def test_no_path_and_no_address_of_a_client_is_opened(client, tmp_path, predictor):
    path = tmp_path / "photo.pgm"
    Image.new("L", (70, 45), 128).save(path)
    for content in (str(path), f"file://{path}", f"{client.base_url}/icon.svg", json.dumps({"path": str(path)})):
        assert "not an image" in error_of(client.post("/predict", content=content.encode()), 400)
        assert "has no file" in error_of(client.post("/predict", files={"image": (None, content)}), 400)
    # The file of this name must not be read in place of the upload: Pillow would map its pixels.
    path.write_bytes(bytes(path.stat().st_size))
    data = image_bytes("PPM")
    response = client.post("/predict", files={"image": (str(path), data)})
    assert response.json()["instances"] == expected(predictor, data)
    for target in ("/../app.py", "/..%2fapp.py", "//etc/passwd", "/%2e%2e/%2e%2e/setup.py"):
        with connect(client, f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()) as connection:
            assert b" 404 " in connection.makefile("rb").readline()


def test_pages_of_other_sites_are_refused(client, predictor):
    before = predictor.model.num_started
    for path in ("/predict", "/draw", "/draw?instances=false"):
        for value in ("cross-site", "Cross-Site"):
            response = client.post(path, content=image_bytes(), headers={"Sec-Fetch-Site": value})
            assert "another site" in error_of(response, 403)
    assert predictor.model.num_started == before
    for value in ("same-origin", "same-site", "none"):
        assert client.post("/predict", content=image_bytes(), headers={"Sec-Fetch-Site": value}).status_code == 200


def test_uploads_over_the_limit_are_refused(client):
    too_large = "larger than 100000 bytes"
    for size in (100_001, 20_000_000):
        assert too_large in error_of(client.post("/predict", content=bytes(size)), 413)
        assert too_large in error_of(client.post("/predict", files={"image": bytes(size)}), 413)
        # Without a declared length.
        assert too_large in error_of(client.post("/predict", content=iter([bytes(50_000)] * (size // 50_000 + 1))), 413)
    # Nothing of the body is needed for the answer, also where the client waits for permission to send it.
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\nExpect: 100-continue\r\n\r\n"
    with connect(client, head) as connection:
        assert b" 413 " in connection.makefile("rb").readline()


def test_pixels_over_the_limit_are_refused():
    predictor = stub_predictor()
    predictor.max_image_pixels = 1000
    with running(lambda: predictor) as client:
        assert "3150 pixels" in error_of(client.post("/predict", content=image_bytes()), 413)
        assert client.get("/metadata").json()["limits"]["image_pixels"] == 1000


def test_what_describes_the_service(client, predictor):
    assert client.get("/healthz").json() == {"status": "ready", "error": None}
    metadata = client.get("/metadata").json()
    assert metadata["categories"] == [
        {"id": category_id, "name": name}
        for category_id, name in zip(predictor.classes.category_ids, predictor.classes.names)
    ]
    assert metadata["model"] == "model.pth" and metadata["architecture"] == "GatedSegmenter"
    assert metadata["limits"]["upload_bytes"] == 100_000 and not metadata["activation_maps"]
    assert "QOI" not in metadata["formats"] and "JPEG" in metadata["formats"]
    assert metadata["palette"][0] == "#2bff26" and len(metadata["palette"]) == 100
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {"/predict", "/draw", "/healthz", "/metadata", "/metrics"}
    for path, kind in (("/", "html"), ("/docs", "html"), ("/page.js", "javascript"), ("/style.css", "css")):
        assert kind in client.get(path).headers["content-type"]


def test_the_page_needs_nothing_else(client):
    """No file of the page names another server."""
    page = Path(__file__).resolve().parents[2] / "sparseinst" / "serving" / "page"
    files = sorted(page.iterdir())
    assert len(files) > 5
    for file in files:
        content = client.get(f"/{file.name}")
        assert content.text == file.read_text()
        assert "//" not in content.text.replace("http://www.w3.org/2000/svg", "").replace("// ", "").replace(
            "http://127", ""
        )


def test_metrics(client):
    before = [metric(client, "sparseinst_requests_total", endpoint="predict", status=status) for status in (200, 400)]
    num_instances = metric(client, "sparseinst_instances_total")
    client.post("/predict?threshold=0", content=image_bytes())
    client.post("/predict", content=b"text")
    after = [metric(client, "sparseinst_requests_total", endpoint="predict", status=status) for status in (200, 400)]
    assert [b - a for a, b in zip(before, after)] == [1, 1]
    assert metric(client, "sparseinst_instances_total") == num_instances + 2
    assert metric(client, "sparseinst_model_ready") == 1 and metric(client, "sparseinst_running_requests") == 0
    assert metric(client, "process_resident_memory_bytes") > 0


def test_requests_beyond_the_queue_get_429(predictor):
    model, data = predictor.model, image_bytes()
    with running(lambda: predictor, Limits(waiting=2)) as client, ThreadPoolExecutor(3) as threads:
        model.gate.clear()
        admitted = [threads.submit(client.post, "/predict", content=data) for _ in range(3)]
        wait_until(lambda: metric(client, "sparseinst_running_requests") == 3)
        for _ in range(5):
            response = client.post("/predict", content=bytes(5_000_000))
            assert "3 requests are waiting" in error_of(response, 429) and response.headers["retry-after"] == "1"
        # A client that reads the answer only when its upload is sent, as browsers do.
        large = bytes(20_000_000)
        with connect(client, request_head(large) + large) as connection:
            assert b" 429 " in connection.makefile("rb").readline()
        model.gate.set()
        assert [future.result().status_code for future in admitted] == [200] * 3
        assert client.post("/predict", content=data).status_code == 200


def test_workers_predict_at_the_same_time(predictor):
    model = predictor.model
    with running(lambda: predictor, Limits(workers=2)) as client, ThreadPoolExecutor(3) as threads:
        model.gate.clear()
        before = model.num_started
        answers = [threads.submit(client.post, "/predict", content=image_bytes(seed=seed)) for seed in range(3)]
        wait_until(lambda: metric(client, "sparseinst_running_requests") == 3)
        wait_until(lambda: model.num_started - before == 2)
        model.gate.set()
        for seed, future in enumerate(answers):
            assert future.result().json()["instances"] == expected(predictor, image_bytes(seed=seed))


def test_clients_that_leave_free_their_places(predictor):
    model, data = predictor.model, image_bytes()
    with running(lambda: predictor, Limits(waiting=3)) as client:
        model.gate.clear()
        before = model.num_started
        half = connect(client, request_head(data) + data[:50])
        connections = [connect(client, request_head(data) + data)]
        wait_until(lambda: model.num_started - before == 1)
        connections += [connect(client, request_head(data) + data) for _ in range(2)]
        wait_until(lambda: metric(client, "sparseinst_running_requests") == 4)
        for connection in (half, *connections):
            connection.close()
        # The one that runs keeps its place until it ends.
        wait_until(lambda: metric(client, "sparseinst_running_requests") == 1)
        assert metric(client, "sparseinst_requests_total", endpoint="predict", status=499) == 4
        model.gate.set()
        assert client.post("/predict", content=data).json()["instances"] == expected(predictor, data)
        # Those that waited were never predicted.
        assert model.num_started - before == 3
        assert metric(client, "sparseinst_running_requests") == 0


def test_time_limits(predictor):
    model, data = predictor.model, image_bytes()
    with running(lambda: predictor, Limits(seconds=0.5)) as client, ThreadPoolExecutor(2) as threads:
        slow = connect(client, request_head(data) + data[:50])
        assert b" 408 " in slow.makefile("rb").readline()
        slow.close()
        model.gate.clear()
        before = model.num_started
        futures = [threads.submit(client.post, "/predict", content=data) for _ in range(2)]
        answers = sorted(
            (error_of(future.result(), 503), future.result().headers.get("retry-after")) for future in futures
        )
        # A client that repeats the one that runs would let it run again.
        assert answers == [
            ("No answer within 0.5 s: the prediction is too slow, send a smaller image", None),
            ("No answer within 0.5 s; try again", "1"),
        ]
        # The one that waited is dropped, the one that runs keeps its turn: nothing else starts.
        wait_until(lambda: metric(client, "sparseinst_running_requests") == 1)
        error_of(client.post("/predict", content=data), 503)
        assert model.num_started - before == 1
        model.gate.set()
        wait_until(lambda: metric(client, "sparseinst_running_requests") == 0)
        assert client.post("/predict", content=data).status_code == 200


def test_changes_of_a_file_without_an_ending_are_seen(tmp_path):
    file = tmp_path / "weights"
    assert not _stamps(file) and not _stamps(tmp_path / "missing" / "weights")
    file.write_text("1")
    before = _stamps(file)
    file.write_text("12")
    assert before and before != _stamps(file)


class ReadUpload:
    """An upload of a client that stays."""

    async def read(self):
        return b""

    async def client_left(self):
        await asyncio.Event().wait()


@pytest.mark.parametrize(("first", "second", "header"), [(0.5, 0.4, {"Retry-After": "1"}), (0.0, 0.9, None)])
def test_only_a_prediction_that_is_slow_by_itself_is_not_tried_again(first, second, header):
    """The first job keeps the other one waiting."""

    async def run_both():
        queue = PredictionQueue(Limits(seconds=0.7, workers=1))
        jobs = [asyncio.create_task(queue.run(ReadUpload(), lambda _, s=s: time.sleep(s))) for s in (first, second)]
        _, error = await asyncio.gather(*jobs, return_exceptions=True)
        return error

    error = asyncio.run(run_both())
    assert error.status_code == 503 and error.headers == header


@pytest.mark.parametrize("error", [RuntimeError("out of\nmemory"), MemoryError(), KeyError("x")])
def test_the_service_goes_on_after_an_inference_that_fails(error):
    predictor, data = stub_predictor(), image_bytes()
    with running(lambda: predictor) as client:
        predictor.model.error = error
        assert error_of(client.post("/predict", content=data), 500).startswith("The inference failed: ")
        predictor.model.error = None
        assert client.post("/predict", content=data).json()["instances"] == expected(predictor, data)


def test_an_error_of_the_service_itself_is_counted(predictor, monkeypatch):
    async def fail(*args):
        raise RuntimeError("x")

    monkeypatch.setattr(PredictionQueue, "run", fail)
    with running(lambda: predictor) as client:
        # The server closes the connection after its own error.
        response = client.post("/predict", content=b"x", headers={"Connection": "close"})
        assert error_of(response, 500) == "The service failed: RuntimeError"
        assert metric(client, "sparseinst_requests_total", endpoint="predict", status=500) == 1
        assert metric(client, "sparseinst_requests_total", endpoint="predict", status=200) == 0


def test_a_model_that_cannot_be_loaded_is_loaded_when_its_file_changes(predictor, tmp_path, monkeypatch):
    monkeypatch.setattr("sparseinst.serving.model._RETRY_SECONDS", 0.02)
    file = tmp_path / "model.pth"
    loads = []

    def load():
        loads.append(file.exists())
        if not file.exists():
            raise ValueError("there is no\nmodel.pth")
        return predictor

    with running(load, file=file) as client:
        assert client.get("/healthz").status_code == 503
        assert client.get("/healthz").json() == {"status": "failed", "error": "there is no model.pth"}
        for response in (client.post("/predict", content=image_bytes()), client.get("/metadata")):
            assert error_of(response, 503) == "The model cannot be loaded: there is no model.pth"
        assert client.get("/").status_code == 200 and metric(client, "sparseinst_model_ready") == 0
        threading.Event().wait(0.2)
        assert loads == [False]
        file.touch()
        wait_until(lambda: client.get("/healthz").status_code == 200)
        assert loads == [False, True]
        assert client.post("/predict", content=image_bytes()).status_code == 200


def test_a_repaired_part_of_a_model_is_noticed(predictor, tmp_path, monkeypatch):
    """OpenVINO's weights are beside the file that is named."""
    monkeypatch.setattr("sparseinst.serving.model._RETRY_SECONDS", 0.02)

    def load():
        if (tmp_path / "model.bin").read_bytes() != b"good":
            raise ValueError("model.bin is damaged")
        return predictor

    for name in ("model.xml", "model.bin"):
        (tmp_path / name).write_bytes(b"")
    with running(load, file=tmp_path / "model.xml") as client:
        assert client.get("/healthz").json()["status"] == "failed"
        (tmp_path / "model.bin").write_bytes(b"good")
        wait_until(lambda: client.get("/healthz").status_code == 200)


def test_a_download_that_failed_is_tried_again(predictor, monkeypatch):
    monkeypatch.setattr("sparseinst.serving.model._RETRY_SECONDS", 0.02)
    monkeypatch.setattr("sparseinst.serving.model._DOWNLOAD_SECONDS", 0.2)
    loads = []

    def load():
        loads.append(time.monotonic())
        if len(loads) < 3:
            raise ValueError("the host does not answer")
        return predictor

    with running(load, file="https://example.com/models/model.pth") as client:
        assert client.get("/healthz").json()["status"] == "failed"
        wait_until(lambda: client.get("/healthz").status_code == 200)
        assert client.get("/metadata").json()["model"] == "model.pth"
    assert len(loads) == 3 and loads[2] - loads[0] >= 0.4


def test_a_model_whose_inference_fails_is_not_served(predictor):
    broken = stub_predictor()
    broken.model.error = RuntimeError("shapes differ")
    with running(lambda: broken) as client:
        assert client.get("/healthz").json() == {"status": "failed", "error": "RuntimeError: shapes differ"}


def test_requests_while_the_model_loads(predictor):
    is_allowed = threading.Event()

    def load():
        is_allowed.wait(20)
        return predictor

    with running(load, waits=False) as client:
        assert client.get("/healthz").status_code == 503
        assert client.get("/healthz").json() == {"status": "loading", "error": None}
        response = client.post("/predict", content=bytes(5_000_000))
        assert "is still loading" in error_of(response, 503) and response.headers["retry-after"] == "5"
        is_allowed.set()
        wait_until(lambda: client.get("/healthz").status_code == 200)

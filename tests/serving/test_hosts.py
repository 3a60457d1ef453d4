"""Test the names that requests may have in their header Host."""

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from sparseinst.serving.hosts import accepted_hosts  # noqa: E402
from tests.serving.service import image_bytes, running, stub_predictor  # noqa: E402

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
ROUTES = ("/", "/page.js", "/healthz", "/metadata", "/metrics", "/docs", "/openapi.json", "/nothing")


def test_only_a_service_that_is_not_exposed_limits_names():
    assert accepted_hosts("127.0.0.1", "localhost", []) == (*LOOPBACK, "localhost")
    assert accepted_hosts("127.0.1.1", "my-machine", []) == (*LOOPBACK, "my-machine")
    assert accepted_hosts("::1", "::1", ["a.example", "b.example"]) == (*LOOPBACK, "[::1]", "a.example", "b.example")
    assert accepted_hosts("0.0.0.0", "0.0.0.0", []) is accepted_hosts("::", "::", []) is None
    assert accepted_hosts("0.0.0.0", "0.0.0.0", ["a.example"])[-1] == "a.example"


def test_other_names_are_refused_on_every_route():
    predictor = stub_predictor()
    with running(lambda: predictor, hosts=accepted_hosts("127.0.0.1", "127.0.0.1", ["Photos.example"])) as client:
        before = predictor.model.num_started
        same_origin = {"Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"}
        evil = ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "[::1", "")
        for host in evil:
            headers = {"Host": host, **same_origin}
            answers = [client.post(f"/{name}", content=image_bytes(), headers=headers) for name in ("predict", "draw")]
            answers += [client.get(route, headers=headers) for route in ROUTES]
            for answer in answers:
                assert answer.status_code == 403 and "expected" in answer.json()["error"], (host, answer.url)
        assert predictor.model.num_started == before
        assert (
            "for the host 'evil.example'; expected 127.0.0.1, [::1], localhost, photos.example, or"
            in (client.get("/", headers={"Host": "evil.example:8000"}).json()["error"])
        )
        for host in ("localhost", "LocalHost:8000", "127.0.0.1:1", "[::1]:8000", "[::1]", "photos.example:443"):
            assert client.post("/predict", content=image_bytes(), headers={"Host": host}).status_code == 200
            assert client.get("/", headers={"Host": host}).status_code == 200


def test_all_names_are_answered_where_none_is_given():
    with running(stub_predictor) as client:
        assert client.get("/healthz", headers={"Host": "evil.example"}).status_code == 200

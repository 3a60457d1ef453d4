"""The web application of the service: its page, its endpoints and its errors."""

import contextlib
import functools
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

import sparseinst
from sparseinst.data.image_formats import FORMATS
from sparseinst.data.images import ImageReadError, ImageTooLargeError
from sparseinst.inference import Predictor
from sparseinst.ops.mask_output import MaskMemoryError
from sparseinst.serving import schemas
from sparseinst.serving.answers import answer, drawing
from sparseinst.serving.hosts import HostCheck
from sparseinst.serving.limits import Limits, Upload
from sparseinst.serving.metrics import Metrics
from sparseinst.serving.model import ServedModel, one_line
from sparseinst.serving.queue import PredictionQueue
from sparseinst.visualization.instances import rank_color
from sparseinst.visualization.paint import Color

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
_NUM_COLORS = 100
# Of a client that left before its answer; nobody reads it.
_CLIENT_LEFT = 499
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"image": {"type": "string", "format": "binary"}},
                    "required": ["image"],
                }
            },
            "image/*": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_REFUSALS = {
    400: "The image cannot be read, or the form has no file",
    403: "A page of another site sent the request, or it names another host",
    408: "The upload took too long",
    413: "The upload or the image is too large",
    422: "A parameter is wrong",
    429: "Too many requests are waiting",
    500: "The inference failed",
    503: "The model is not loaded, or no answer in time",
}
_ERRORS = {status: {"model": schemas.Error, "description": text} for status, text in _REFUSALS.items()}

Threshold = Annotated[float, Query(ge=0, le=1, description="lowest score of the instances")]


def create_app(model: ServedModel, limits: Limits, hosts: Sequence[str] | None = None) -> FastAPI:
    """Return the application, which loads the model when it starts.

    Args:
        model: not started.
        limits: of uploads, waiting requests and time.
        hosts: names in the header Host that are answered, without a port; None: all.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        model.start()
        yield
        model.stop()
        queue.close()

    queue = PredictionQueue(limits)
    metrics = Metrics(lambda: queue.num_running, lambda: model.predictor is not None)
    app = FastAPI(
        title="SparseInst", version=sparseinst.__version__, description="Instance segmentation of images.",
        docs_url=None, redoc_url=None, lifespan=lifespan,
    )  # fmt: skip
    if hosts is not None:
        app.add_middleware(HostCheck, hosts=hosts)
    _add_error_handlers(app)

    def ready() -> Predictor:
        if model.predictor is None:
            reason = "is still loading; try again" if model.error is None else f"cannot be loaded: {model.error}"
            raise HTTPException(503, f"The model {reason}", {"Retry-After": "5"})
        return model.predictor

    def timed(job: Callable[..., bytes], predictor: Predictor, data: bytes) -> bytes:
        with metrics.seconds.time(), _inference_errors():
            return job(predictor, data)

    async def queued(request: Request, endpoint: str, job: Callable[..., bytes]) -> bytes:
        """Run a job of (predictor, data) on the upload of a request, and count the answer."""
        status = 200
        try:
            _check_origin(request)
            return await queue.run(Upload(request, limits.upload_bytes), functools.partial(timed, job, ready()))
        except HTTPException as error:
            status = error.status_code
            raise
        except ClientDisconnect:
            status = _CLIENT_LEFT
            raise HTTPException(_CLIENT_LEFT, "The client left") from None
        except BaseException:
            status = 500
            raise
        finally:
            metrics.requests.labels(endpoint, status).inc()

    def encoded_answer(predictor: Predictor, data: bytes, **options: object) -> bytes:
        content = answer(predictor, data, **options)
        metrics.instances.inc(len(content["instances"]))
        return json.dumps(content).encode()

    @app.post(
        "/predict", response_model=schemas.Prediction, response_description="The instances", responses=_ERRORS,
        openapi_extra=_BODY,
    )  # fmt: skip
    async def predict(
        request: Request,
        threshold: Threshold = 0.5,
        masks: Annotated[Literal["rle", "polygons", "none"], Query(description="how masks are returned")] = "rle",
        maps: Annotated[bool, Query(description="return activation maps, where the model has them")] = False,
        image_id: Annotated[int, Query(description="of the COCO results")] = 1,
    ) -> Response:
        """Predict the instances of one image: the body itself, or the one file of a form."""
        options = {"threshold": threshold, "masks": masks, "with_maps": maps, "image_id": image_id}
        content = await queued(request, "predict", functools.partial(encoded_answer, **options))
        return Response(content, media_type="application/json")

    @app.post(
        "/draw", response_class=Response, openapi_extra=_BODY,
        responses={**_ERRORS, 200: {"content": {"image/jpeg": {}}, "description": "The drawn image"}},
    )  # fmt: skip
    async def draw(
        request: Request,
        threshold: Threshold = 0.5,
        instances: Annotated[bool, Query(description="false: convert the image, without a prediction")] = True,
    ) -> Response:
        """Draw the instances of one image, which is sent as to /predict; small images are enlarged."""
        job = functools.partial(drawing, threshold=threshold, with_instances=instances)
        content = await queued(request, "draw", job)
        return Response(content, media_type="image/jpeg")

    @app.get(
        "/healthz", response_model=schemas.Health, response_description="The model is ready",
        responses={503: {"model": schemas.Health, "description": "The model is loading, or cannot be loaded"}},
    )  # fmt: skip
    async def healthz() -> JSONResponse:
        """Return 200 where the model is ready, else 503."""
        health = {"status": model.status, "error": model.error}
        return JSONResponse(health, 200 if model.status == "ready" else 503)

    @app.get(
        "/metadata", response_model=schemas.Metadata, response_description="The model and the limits",
        responses={503: _ERRORS[503]},
    )  # fmt: skip
    async def metadata() -> JSONResponse:
        """Describe the model and the limits of the service."""
        predictor = ready()
        classes = zip(predictor.classes.category_ids, predictor.classes.names)
        return JSONResponse(
            {
                "version": sparseinst.__version__,
                "model": model.name,
                "architecture": type(getattr(predictor.model, "model", predictor.model)).__name__,
                "categories": [{"id": category_id, "name": name} for category_id, name in classes],
                "activation_maps": model.has_maps,
                "limits": {**limits._asdict(), "image_pixels": predictor.max_image_pixels},
                "formats": [name for name in FORMATS if name != "QOI"],
                "palette": [_hexadecimal(rank_color(rank)) for rank in range(_NUM_COLORS)],
            }
        )

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}, "description": "All metrics"}},
    )
    async def prometheus() -> Response:
        """Return the metrics of this process for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(PAGE / "docs.html")

    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


def _check_origin(request: Request) -> None:
    """Raise HTTPException for a request of another site's page; programs and old browsers send no such header."""
    if request.headers.get("sec-fetch-site", "").strip().lower() == "cross-site":
        raise HTTPException(403, "A page of another site sent this request; open the page of this service")


@contextlib.contextmanager
def _inference_errors() -> Iterator[None]:
    """Convert what a prediction raises to answers; an error that is not the client's is logged."""
    try:
        yield
    except (ImageTooLargeError, MaskMemoryError) as error:
        raise HTTPException(413, one_line(error)) from error
    except ImageReadError as error:
        raise HTTPException(400, one_line(error)) from error
    except Exception as error:
        logger.exception("The inference failed")
        raise HTTPException(500, f"The inference failed: {one_line(error)}") from error


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every error with one line of JSON."""

    def answer_error(status: int, text: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": text}, status, headers)

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return answer_error(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def wrong_parameter(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer_error(422, "; ".join(f"{problem['loc'][-1]}: {problem['msg']}" for problem in error.errors()))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return answer_error(500, f"The service failed: {type(error).__name__}")


def _hexadecimal(color: Color) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in color)

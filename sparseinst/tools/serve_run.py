"""Start the service, for the command `serve`."""

import argparse
import contextlib
import functools
import ipaddress
import logging
import math
import socket
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sparseinst.config import load_config
from sparseinst.config.arguments import check_least
from sparseinst.engine.console import report_error
from sparseinst.engine.run_setup import log_to_console
from sparseinst.inference import Predictor
from sparseinst.runtime.exported_file import is_exported
from sparseinst.runtime.exported_model import exported_config, has_imports

if TYPE_CHECKING:
    import uvicorn

logger = logging.getLogger(__name__)

# Of the extra `serve`, by the names of their modules.
_PACKAGES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
_MAX_CONNECTIONS = 1000
# Time for a complete request head. A busy machine may take seconds to read the next request of a connection.
_KEEP_ALIVE_SECONDS = 30


def run(args: argparse.Namespace) -> int:
    """Run the service. Return 0 after Ctrl-C, or 1 after a ValueError, ImportError or OSError at the start."""
    log_to_console(logging.INFO)
    # The parser of forms logs a warning for each broken form, which any client can send.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    try:
        check_arguments(args)
        missing = [name for name in _PACKAGES if find_spec(name) is None]
        if missing:
            raise ImportError(f"sparseinst serve needs {', '.join(missing)}. Install: pip install 'sparseinst[serve]'")
        load = predictor_loader(args.weights, args.config_file, args.opts)
        with contextlib.closing(listen(args.host, args.port)) as listener:
            return serve(args, load, listener)
    except (ValueError, ImportError, OSError) as error:
        return report_error(error)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for a wrong value of a flag."""
    check_least(args, {"--workers": 1, "--max-waiting": 0, "--port": 0})
    for flag, value in (("--max-upload-mib", args.max_upload_mib), ("--timeout", args.timeout)):
        if not 0 < value < math.inf:
            raise ValueError(f"{flag} is {value}; it must be above 0 and finite")
    if args.port > 65535:
        raise ValueError(f"--port is {args.port}; it must be at most 65535")


def predictor_loader(weights: str, config_file: str | None, opts: Sequence[str]) -> Callable[[], Predictor]:
    """Return a function that builds the Predictor of a checkpoint or of an exported model.

    A config file is read at once, the weights by the function. IMPORTS in an exported model are refused by both.

    Args:
        weights: the checkpoint's path or address, or the exported model, which needs no config.
        config_file: None: config.yaml in the checkpoint's folder.
        opts: KEY VALUE KEY VALUE ...

    Raises:
        ValueError: the config is missing or wrong, or it has IMPORTS or MODEL.TRUSTED_WEIGHTS, unless ``opts`` have the
            latter: the service runs no code of others.
    """
    if config_file is None and is_exported(weights):
        _refuse_imports(weights)
        return functools.partial(_exported_predictor, weights, opts)
    if config_file is None:
        config_file = str(Path(weights).parent / "config.yaml")
        if not Path(config_file).is_file():
            raise ValueError(f"{config_file} does not exist: name the config of {weights} by --config-file")
    cfg = load_config(config_file, [*opts, "MODEL.WEIGHTS", weights], allow_imports=False)
    if cfg.MODEL.TRUSTED_WEIGHTS and "MODEL.TRUSTED_WEIGHTS" not in opts[::2]:
        raise ValueError(
            f"{config_file} sets MODEL.TRUSTED_WEIGHTS to True, so that {weights} may run code. If you trust the "
            "weights, add --opts MODEL.TRUSTED_WEIGHTS True; else set it to False in the file"
        )
    return functools.partial(Predictor, cfg)


def _exported_predictor(weights: str, opts: Sequence[str]) -> Predictor:
    # The file may have changed.
    _refuse_imports(weights)
    return Predictor(exported_config(weights, opts))


def _refuse_imports(weights: str) -> None:
    """Raise ValueError where an exported file has IMPORTS. Its other flaws are for the loader, which reads it again."""
    try:
        refused = has_imports(weights)
    except ValueError:
        return
    if refused:
        raise ValueError(
            f"The config of {weights} has IMPORTS, and the service runs no code of others. "
            "sparseinst.inference.Predictor runs such a model, with your own config file"
        )


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raise ValueError where the address or the port cannot be used."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port} cannot be used: {error.strerror or error}") from error


def serve(args: argparse.Namespace, load: Callable[[], Predictor], listener: socket.socket) -> int:
    """Answer requests until Ctrl-C. Return 0."""
    import uvicorn

    from sparseinst.serving.app import create_app
    from sparseinst.serving.hosts import accepted_hosts
    from sparseinst.serving.limits import Limits
    from sparseinst.serving.model import ServedModel

    host, port = listener.getsockname()[:2]
    limits = Limits(round(args.max_upload_mib * 2**20), args.max_waiting, args.workers, args.timeout)
    hosts = accepted_hosts(host, args.host, args.allowed_host)
    app = create_app(ServedModel(load, args.weights), limits, hosts)
    if not ipaddress.ip_address(host).is_loopback:
        logger.warning("Every machine that reaches %s port %d can use this service: it has no password", host, port)
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    server = uvicorn.Server(server_config(app))
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    return 0


def server_config(app: Callable) -> "uvicorn.Config":
    """Return the settings of the server for an ASGI application."""
    import uvicorn

    from sparseinst.serving.protocol import HeadTimeoutProtocol

    return uvicorn.Config(
        app,
        http=HeadTimeoutProtocol,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        proxy_headers=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
    )

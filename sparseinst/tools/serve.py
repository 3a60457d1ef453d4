"""Serve a model, as a page and as POST /predict for programs: ``sparseinst serve --weights FILE``.

Open the printed address in a browser, and drop images. Programs send an image to /predict:
``curl -F image=@photo.jpg http://127.0.0.1:8000/predict``. /docs lists all endpoints. Only this machine can reach the
service, unless --host says otherwise; it has no password.
"""

import argparse
import sys

from sparseinst.config.arguments import CONFIG_HELP, add_opts_argument
from sparseinst.engine.console import prepare_console, with_exit_codes


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--weights", required=True, metavar="FILE", help="a checkpoint, sparseinst://NAME, or an exported model")
    add("--config-file", help=f"{CONFIG_HELP}; default: config.yaml in the folder of the checkpoint")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of this machine (default 127.0.0.1)")
    add("--allowed-host", action="append", default=[], metavar="NAME",
        help="further name in the address of requests, such as the name of a proxy; repeatable")  # fmt: skip
    add("--port", type=int, default=8000, help="0: a free one (default 8000)")
    add("--workers", type=int, default=1, help="images that are predicted at the same time (default 1)")
    add("--max-waiting", type=int, default=32,
        help="requests that may wait; further ones are answered with 429 (default 32)")  # fmt: skip
    add("--max-upload-mib", type=float, default=32.0, metavar="MIB", help="largest upload, in MiB (default 32)")
    add("--timeout", type=float, default=60.0, metavar="SECONDS",
        help="longest time from a request to its answer, the upload included (default 60)")  # fmt: skip
    add_opts_argument(parser)
    return parser


@with_exit_codes()
def main(argv: list[str] | None = None) -> int:
    """Run the command until Ctrl-C or SIGTERM.

    Args:
        argv: the arguments after the program's name; None: those of ``sys.argv``.

    Returns:
        Exit code: 0 after Ctrl-C, 130 before the service has started; 1 where a missing package, the arguments, the
        config or the port prevent a start. A model that cannot be loaded does not end the service: the log, the page
        and /healthz name the reason.
    """
    args = build_parser().parse_args(argv)
    prepare_console()
    from sparseinst.tools.serve_run import run

    return run(args)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m hafnium_predictor --model_name NAME --model_dir DIR`: serves one bundle."""

from __future__ import annotations

import sys

from hafnium_contract.errors import HafniumError
from hafnium_contract.serving.json_log import set_up
from hafnium_contract.serving.lean_sdk import lean_sdk
from hafnium_contract.serving.workers import is_worker, supervise


def main(argv: list[str] | None = None) -> int:
    """Runs the server. Returns the exit status: 0 after SIGTERM, 2 for bad arguments or gRPC's port when it is taken."""
    from hafnium_predictor.settings import parse_settings

    try:
        settings = parse_settings(sys.argv[1:] if argv is None else argv)
    except HafniumError as e:
        sys.stderr.write(f"hafnium_predictor: {e}\n")
        return 2
    if settings.workers > 1 and not is_worker():
        set_up(settings.log_format)
        arguments = sys.argv[1:] if argv is None else argv
        try:
            return supervise(
                "hafnium_predictor", arguments, host=settings.host, port=settings.http_port, workers=settings.workers,
                stop_s=settings.stop_s)
        except OSError as e:
            sys.stderr.write(f"hafnium_predictor: {settings.host}:{settings.http_port}: {e.strerror or e}\n")
            return 2
    sys.argv = [sys.argv[0], *settings.sdk_arguments]  # KServe reads sys.argv when it is imported
    lean_sdk()
    from kserve import model_server

    from hafnium_contract.serving.tracing import open_tracing
    from hafnium_predictor.server import PredictorServer

    unknown = model_server.parser.parse_known_args(list(settings.sdk_arguments))[1]
    if unknown:
        sys.stderr.write(f"hafnium_predictor: unknown argument {unknown[0]!r}; --help lists those that exist\n")
        return 2

    set_up(settings.log_format)  # after KServe's import, which sets its own
    try:
        tracing = open_tracing(settings.tracing, "hafnium-predictor")
    except HafniumError as e:
        sys.stderr.write(f"hafnium_predictor: {e}\n")
        return 2
    server = PredictorServer(settings, tracing)
    server.run()
    return server.exit_status


if __name__ == "__main__":
    sys.exit(main())

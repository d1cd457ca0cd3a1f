"""Loads a model and serves it until a signal ends the process."""

from __future__ import annotations

import importlib.util
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from moe_train.config.serving import ServeConfig
from moe_train.errors import LaunchError, MissingDependency
from moe_train.evaluation.inference.translation_model import TranslationModel
from moe_train.evaluation.loading import choose_device, open_run
from moe_train.evaluation.serving.batch_queue import BatchQueue
from moe_train.evaluation.translations import Translation
from moe_train.screen import Screen

_BACKLOG = 2048  # connections that wait to be accepted


def serve(config: ServeConfig) -> None:
    """Serves until SIGINT or SIGTERM; requests that wait then are answered.

    Raises:
        MissingDependency: the extra ``serve`` is not installed.
        LaunchError: the address cannot be listened at.
        UserError: the run cannot be loaded.
    """
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(f"moe-serve needs {' and '.join(missing)}", remedy="pip install 'moe_train[serve]'")
    import uvicorn

    from moe_train.evaluation.serving.web_app import make_app

    class Server(uvicorn.Server):
        """Ends normally at a signal; uvicorn's own raises the signal again."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            former = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in former.items():
                    signal.signal(number, handler)

    with _listening(config.host, config.port) as listener:
        model = _load(config)

        def translate(sentences: Sequence[str], source: str, target: str, experts: bool) -> Sequence[Translation]:
            return model.translate(sentences, source, target, return_experts=experts)

        queue = BatchQueue(translate, config.queue, config.batch_sentences)
        app = make_app(queue, config, _about(model))
        settings = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", server_header=False)
        name = f"[{config.host}]" if ":" in config.host else config.host
        Screen(stderr=True).print(f"serving http://{name}:{listener.getsockname()[1]}", highlight=False, markup=False)
        Server(settings).run(sockets=[listener])
        queue.close()


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        remedy = "choose another host=… or port=…"
        raise LaunchError(f"moe-serve cannot listen there ({error})", f"{host}:{port}", remedy) from error
    with listener:
        yield listener


def _load(config: ServeConfig) -> TranslationModel:
    if config.threads:
        torch.set_num_threads(config.threads)
    run = open_run(config.run, config.checkpoint, config.data, config.inference, verify=config.data_verify)
    run.translating_task  # noqa: B018  (raises before weights are read)
    device = choose_device(config.device)
    return TranslationModel(run.load(device), config.search, device)


def _about(model: TranslationModel) -> dict[str, Any]:
    run = model.run
    return {
        "model": run.folder.path.resolve().name,
        "checkpoint": run.checkpoint.name,
        "languages": list(model.languages),
        "directions": list(model.directions),
    }

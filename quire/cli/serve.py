"""quire serve [MODEL]: an HTTP server for a model, with the API of OpenAI."""

from __future__ import annotations

import argparse
from dataclasses import replace

from quire.config import MODEL_HELP, EngineConfig, ServerConfig, add_arguments, model_name, read_config_file, resolve


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over HTTP with the API of OpenAI. Options come from --config, then QUIRE_<OPTION> in the "
        "environment, then the command line; the last one wins.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        nargs="?",
        default=argparse.SUPPRESS,
        metavar="MODEL",
        help=MODEL_HELP,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with options of the engine and the server")
    add_arguments(parser, EngineConfig, ServerConfig)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    engine_config, server_config = resolve((EngineConfig, ServerConfig), vars(args), read_config_file(args.config))
    from quire.models.weights import resolve_model
    from quire.server.launch import open_socket, serve

    with open_socket(server_config.host, server_config.port):
        pass  # a wrong address is told before a model is downloaded
    folder = resolve_model(engine_config.model)
    return serve(replace(engine_config, model=str(folder)), server_config, folder, model_name(folder, engine_config.model))

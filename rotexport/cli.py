"""The command line: one function per verb, each a thin call."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rotexport import __version__
from rotexport.errors import RotexportError
from rotexport.progress import Stages, Verbosity

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGE_BUFFER = 2 << 20  # bytes
SPARE_HEAP = 64 << 20  # bytes
WINDOW_LENGTH = 1024  # tokens of a window of `eval`
WINDOW_OPTIONS = ("windows", "length")
STREAM_OPTIONS = ("tokens", "bucket", "no_dense", "pytorch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status: 0, 1 after an error, 2 for wrong usage, 130 if interrupted."""
    options = parser().parse_args(arguments)
    _allocate_large_buffers_anew()
    try:
        with _interrupted_once():
            status: int = options.verb(options)
    except RotexportError as error:
        print(f"rotexport: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("rotexport: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return 0  # the reader of a pipe has seen enough
    return status


def build_command(options: argparse.Namespace) -> int:
    """Compile a model."""
    from rotexport.build import BuildOptions, build, prepare
    from rotexport.recipe import load_recipe
    from rotexport.report.record import plan_text, summary
    from rotexport.targets.profiles import Profiles

    recipe = load_recipe(options.recipe, options.set)
    if options.dtype is not None:
        recipe = replace(recipe, dtype=options.dtype)
    choices = BuildOptions(
        target=options.target,
        gpus=tuple(name for part in options.gpu for name in part.split(",") if name),
        calibration=options.calibration,
        profiles=Profiles(options.max_batch, options.max_length),
        plugins=options.plugins,
        resume=options.resume,
        validate=not options.no_validate,
        force=options.force,
        trust_remote_code=options.trust_remote_code,
    )
    stages = _stages(options)
    if options.dry_run:
        print(plan_text(prepare(options.model, recipe, choices, stages).plan))
        return 0
    report = build(options.model, options.output, recipe, choices, stages)
    print(summary(report))
    print(f"report: {options.output / 'report.html'}")
    return 0


def validate_command(options: argparse.Namespace) -> int:
    """Repeat the proof of a build."""
    from rotexport.revalidate import revalidate

    proof = revalidate(options.output, options.text, options.model, _stages(options))
    print(json.dumps(proof.figures(), indent=2))
    proof.require()
    return 0


def eval_command(options: argparse.Namespace) -> int:
    """Measure perplexity."""
    from rotexport.revalidate import evaluate_path

    _only_for(options, "stream", STREAM_OPTIONS, WINDOW_OPTIONS)
    if options.stream:
        return _eval_stream(options)
    length = options.length or WINDOW_LENGTH
    result = evaluate_path(options.model, options.text, options.windows, length, _stages(options))
    if options.json:
        print(json.dumps(result.to_dict()))
    else:
        print(f"perplexity {result.perplexity:.4f} over {result.windows} windows, {result.tokens} tokens")
    return 0


def _eval_stream(options: argparse.Namespace) -> int:
    from rotexport.revalidate import StreamRequest, evaluate_streams
    from rotexport.streaming.evaluate import BUCKET

    request = StreamRequest(
        options.text, options.tokens, options.bucket or BUCKET, not options.no_dense, options.pytorch
    )
    folder = Path(options.model)
    result = evaluate_streams(folder, request, _stages(options))
    if options.json:
        print(json.dumps(result.to_dict()))
        return 0
    ways = {"stream": result.stream, "window only": result.window_only, "dense": result.dense}
    for name, way in ways.items():
        if way is not None:
            print(f"{name:<12} perplexity {way.perplexity:.4f} over {way.tokens} tokens")
    print(f"by position: {folder / 'report.html'}")
    return 0


def run_command(options: argparse.Namespace) -> int:
    """Generate text."""
    from rotexport.revalidate import tokenizer_of
    from rotexport.runtime.opening import open_build
    from rotexport.runtime.sampling import Sampling
    from rotexport.runtime.session import Session
    from rotexport.runtime.text import Request, reply

    sampling = Sampling(options.temperature, options.top_p, options.seed)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    request = Request(prompt, options.max_new_tokens, sampling, options.chat)
    tokenizer = tokenizer_of(options.output)
    session = Session.over(open_build(options.output, options.on, options.plugins))
    found = reply(session, tokenizer, request, lambda text: print(text, end="", flush=True))
    print(flush=True)
    if options.stats:
        print(found.text, file=sys.stderr)
    return EXIT_INTERRUPTED if found.interrupted else 0


def inspect_command(options: argparse.Namespace) -> int:
    """Print bases, pins, transforms and outliers."""
    from rotexport.inspection import inspect

    inspection = inspect(options.model, options.recipe, options.text, _stages(options))
    print(json.dumps(inspection.to_dict()) if options.json else inspection.text)
    return 0


def recipes_command(options: argparse.Namespace) -> int:
    """List recipes, or print one."""
    from rotexport.recipe import load_recipe, preset_names

    if options.name is not None:
        print(load_recipe(options.name).to_yaml(), end="")
        return 0
    for name in preset_names():
        print(f"{name:<22} {load_recipe(name).description}")
    return 0


def doctor_command(options: argparse.Namespace) -> int:
    """Say what works on this machine."""
    from rotexport.doctor import examine

    print(examine().text)
    return 0


def plugins_command(options: argparse.Namespace) -> int:
    """Build, list or test the plugin library."""
    from rotexport import plugins

    if options.action == "build":
        names = tuple(name for part in options.arch for name in part.split(",") if name)
        built = plugins.build_library(names or plugins.ALL_ARCHITECTURES, tensorrt_root=options.tensorrt_root)
        worst = max(resource.registers for resource in built.resources)
        print(f"{built.library}: {len(built.resources)} kernels, at most {worst} registers, no spills")
        return 0
    library = options.library or plugins.built_library()
    creators = plugins.list_creators(library) if options.action == "list" else plugins.test_library(library)
    for creator in creators:
        print(f"{creator.namespace}::{creator.name} {creator.version} ({', '.join(creator.fields)})")
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    top = argparse.ArgumentParser(prog="rotexport", description=_first_line())
    top.add_argument("--version", action="version", version=f"rotexport {__version__}")
    verbs = top.add_subparsers(required=True, metavar="COMMAND")
    _add_build(verbs)
    _add_validate(verbs)
    _add_eval(verbs)
    _add_run(verbs)
    _add_inspect(verbs)
    recipes = verbs.add_parser("recipes", help="list the recipes, or print one as YAML")
    recipes.add_argument("name", nargs="?", metavar="NAME", help="a recipe, or a YAML file")
    recipes.set_defaults(verb=recipes_command)
    doctor = verbs.add_parser("doctor", help="show versions, GPUs, and which targets work here")
    doctor.set_defaults(verb=doctor_command)
    _add_plugins(verbs)
    return top


def _add_build(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = verbs.add_parser("build", help="compile a model into validated graphs and engines")
    command.add_argument("model", metavar="MODEL", help="Hugging Face directory or hub id, or a .gguf file")
    command.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="directory to make")
    command.add_argument("--recipe", default="fp16", metavar="NAME|FILE", help="see `rotexport recipes`")
    command.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the recipe"
    )
    command.add_argument("--target", default="onnx", help="onnx (default), tensorrt-rtx or tensorrt")
    command.add_argument("--gpu", action="append", default=[], metavar="SM,…", help="for example sm89,sm120")
    command.add_argument("--calibration", type=Path, metavar="TEXT", help="text file for static scales")
    command.add_argument("--max-batch", type=int, default=1, metavar="N", help="largest batch of an engine")
    command.add_argument(
        "--max-length", type=int, default=2048, metavar="N", help="largest number of tokens, cached and new"
    )
    command.add_argument(
        "--plugins", type=Path, metavar="LIBRARY", help="our CUDA kernels, for target tensorrt"
    )
    command.add_argument(
        "--resume", type=Path, metavar="FOLDER", help="keep finished blocks here, and continue behind them"
    )
    command.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="float type of activations")
    command.add_argument("--no-validate", action="store_true", help="skip every check against PyTorch")
    command.add_argument("--dry-run", action="store_true", help="check everything, read no weights, stop")
    command.add_argument("--force", action="store_true", help="replace an existing build at OUT")
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model"
    )
    _add_verbosity(command)
    command.set_defaults(verb=build_command)


def _add_validate(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = verbs.add_parser("validate", help="repeat the proof of a build, on another text if given")
    command.add_argument("output", metavar="OUT", type=Path, help="what `rotexport build` made")
    command.add_argument("--text", type=Path, metavar="FILE", help="text to prove it on")
    command.add_argument(
        "--model", metavar="MODEL", help="the PyTorch model, if it is no longer where it was"
    )
    _add_verbosity(command)
    command.set_defaults(verb=validate_command)


def _add_eval(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = verbs.add_parser("eval", help="perplexity of a build, or of a PyTorch model")
    command.add_argument("model", metavar="OUT|MODEL", help="a build, or anything `build` takes")
    command.add_argument("--text", type=Path, metavar="FILE", required=True, help="text to predict")
    command.add_argument("--windows", type=int, metavar="N", help="windows from the start; all by default")
    command.add_argument("--length", type=int, metavar="N", help=f"tokens per window ({WINDOW_LENGTH})")
    command.add_argument("--json", action="store_true", help="print one JSON line")
    stream = command.add_argument_group("one continuous stream through a streaming build")
    stream.add_argument("--stream", action="store_true", help="read the text as one stream, by position")
    stream.add_argument("--tokens", type=int, metavar="N", help="tokens from the start; all by default")
    stream.add_argument("--bucket", type=int, metavar="N", help="positions per reported figure")
    stream.add_argument("--no-dense", action="store_true", help="leave out the PyTorch model beside it")
    stream.add_argument("--pytorch", metavar="MODEL", help="where the PyTorch model is, if it has moved")
    _add_verbosity(command)
    command.set_defaults(verb=eval_command, complain=command.error)


def _add_run(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = verbs.add_parser("run", help="generate text with a build")
    command.add_argument("output", metavar="OUT", type=Path, help="what `rotexport build` made")
    command.add_argument("prompt", metavar="PROMPT", help="text to continue; - reads standard input")
    command.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="where to stop (256)")
    command.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default)"
    )
    command.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest that share P"
    )
    command.add_argument("--seed", type=int, default=0, metavar="K", help="of the draws")
    command.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    command.add_argument("--stats", action="store_true", help="print speed and memory to standard error")
    command.add_argument(
        "--on",
        choices=("auto", "onnxruntime", "engine"),
        default="auto",
        help="what runs it: by default the engine for this machine's GPU, if there is one",
    )
    command.add_argument(
        "--plugins", type=Path, metavar="LIBRARY", help="our CUDA kernels, for an engine built with them"
    )
    command.set_defaults(verb=run_command)


def _add_inspect(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = verbs.add_parser("inspect", help="bases, what pins them, where transforms go, outliers")
    command.add_argument("model", metavar="MODEL|OUT|model.onnx")
    command.add_argument(
        "--recipe", default="quarot-w8a8", metavar="NAME|FILE", help="whose rotations to try"
    )
    command.add_argument("--text", type=Path, metavar="FILE", help="text that the outliers are measured on")
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_verbosity(command)
    command.set_defaults(verb=inspect_command)


def _add_plugins(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = verbs.add_parser("plugins", help="build, list or test the CUDA plugins for TensorRT")
    command.add_argument("action", choices=("build", "list", "test"))
    command.add_argument(
        "--arch", action="append", default=[], metavar="SM,…", help="for example sm_90a; all by default"
    )
    command.add_argument(
        "--tensorrt-root", type=Path, metavar="DIR", help="TensorRT's headers; default $TENSORRT_ROOT"
    )
    command.add_argument("--library", type=Path, help="what to list or test; by default what `build` left")
    command.set_defaults(verb=plugins_command)


def _add_verbosity(command: argparse.ArgumentParser) -> None:
    command.add_argument("-v", "--verbose", action="store_true", help="say more")
    command.add_argument("-q", "--quiet", action="store_true", help="print no progress")


def _only_for(
    options: argparse.Namespace, switch: str, with_it: Sequence[str], without: Sequence[str]
) -> None:
    """Refuse options that would be ignored: some mean nothing without a switch, others nothing beside it."""
    wrong = without if getattr(options, switch) else with_it
    for name in wrong:
        if getattr(options, name):
            flag, how = name.replace("_", "-"), "does not go with" if wrong is without else "needs"
            options.complain(f"--{flag} {how} --{switch}")


def _stages(options: argparse.Namespace) -> Stages:
    if options.quiet:
        return Stages(Verbosity.QUIET)
    return Stages(Verbosity.VERBOSE if options.verbose else Verbosity.NORMAL)


def _allocate_large_buffers_anew() -> None:
    """Have glibc give every large buffer back when it is freed, and PyTorch ask for huge pages for it.

    glibc's default learns from the sizes it sees to keep them in the heap instead, which adds 10 to 20 % to
    the peak memory of a build, and more the longer it runs. Fresh memory costs a fault per page, though: with
    pages of 4 KiB up to a third of the time that blocks train. PyTorch reads its variable when it is loaded.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BUFFER)
        mallopt(M_TRIM_THRESHOLD, SPARE_HEAP)


@contextlib.contextmanager
def _interrupted_once() -> Iterator[None]:
    """Let SIGTERM unwind as Ctrl-C does, and let nothing disturb the clearing up that follows."""
    signals = (signal.SIGINT, signal.SIGTERM)

    def interrupt(number: int, frame: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = [signal.signal(each, interrupt) for each in signals]
    try:
        yield
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)


def _first_line() -> str:
    return "Compile PyTorch language models into rotation-quantized ONNX graphs and TensorRT engines."
